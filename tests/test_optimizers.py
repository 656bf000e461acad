"""Other optimizers, updates within the backward pass, and no clipping."""

import importlib.util
import math

import pytest
import torch
import transformers
from conftest import FULL_SCRIPTS, UNCACHED, in_first_script, in_two_scripts, make_args, read_scalars
from runs import assert_same_checkpoint, read_trained, run
from safetensors.torch import load_file

NO_8_BIT = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
OPTIMIZERS = [pytest.param({}, id="AdamW"), pytest.param({"use_adafactor": True}, id="Adafactor"),
              pytest.param({"use_8bit_adam": True}, id="8-bit AdamW", marks=NO_8_BIT)]
# With the first script, and of SDXL the one that needs the least memory.
in_full_scripts = pytest.mark.parametrize(("full_script", "optimizer"), [
    *(pytest.param(FULL_SCRIPTS[0], *each.values, id=each.id, marks=each.marks) for each in OPTIMIZERS),
    pytest.param(FULL_SCRIPTS[1], {"use_adafactor": True}, id="SDXL, Adafactor")], indirect=["full_script"])


def make_train(script, tiny_model, image_folder, tmp_path):
    """Return a function that runs a script and returns its output folder."""

    def with_flags(name: str, **flags):
        run(script, make_args(tiny_model, image_folder, tmp_path / name, **flags))
        return tmp_path / name

    return with_flags


@pytest.fixture
def train(script, tiny_model, image_folder, tmp_path):
    """`make_train` of each script in turn."""
    return make_train(script, tiny_model, image_folder, tmp_path)


@pytest.fixture
def train_full(full_script, tiny_model, image_folder, tmp_path):
    """`make_train` of each script that trains whole networks, in turn."""
    return make_train(full_script, tiny_model, image_folder, tmp_path)


@in_full_scripts
def test_updates_in_the_backward_pass_are_those_after_it(train_full, optimizer):
    """--optimizer_in_backward leaves the same files to the last bit: from the start, and resumed, with EMA."""
    flags = {"max_grad_norm": 0, "use_ema": True, "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 1,
             "gradient_checkpointing": True, "train_text_encoder": True, "no_cache_text_embeddings": True,
             **optimizer}
    whole = train_full("whole", **flags, max_train_steps=4, checkpointing_steps=2)
    part = train_full("part", **flags, max_train_steps=2, optimizer_in_backward=True)
    assert_same_checkpoint(part / "checkpoint-2", whole / "checkpoint-2")
    train_full("part", **flags, max_train_steps=4, optimizer_in_backward=True, resume_from_checkpoint="latest")
    assert_same_checkpoint(part / "checkpoint-4", whole / "checkpoint-4")


def test_gradients_are_freed_in_the_backward_pass(full_script, train_full, monkeypatch):
    """After a pass none is left, where without --optimizer_in_backward each is; its norm is 0."""
    left, original = [], full_script.train_step

    def train_step(accelerator, models, *given):
        losses = original(accelerator, models, *given)
        left.append(sum(parameter.grad is not None for parameter in models.unet.parameters()))
        return losses

    monkeypatch.setattr(full_script, "train_step", train_step)
    flags = {"max_grad_norm": 0, "report_to": "tensorboard", "max_train_steps": 1}
    for name, in_backward in (("after", False), ("within", True)):
        out = train_full(name, **flags, optimizer_in_backward=in_backward)
        assert (read_scalars(out, "grad_norm")[1] > 0) == (not in_backward)
        assert read_scalars(out, "train_loss")
    assert left[0] > 10 and left[1] == 0


@in_full_scripts
def test_bf16_weights_train_and_resume_exactly(train_full, optimizer):
    """--weight_dtype bf16 keeps and exports weights in bf16, their moments not, and resumes bit for bit."""
    flags = {"weight_dtype": "bf16", "mixed_precision": "bf16", "optimizer_in_backward": True, "max_grad_norm": 0,
             "learning_rate": 1e-5, **optimizer}
    whole = train_full("whole", **flags, max_train_steps=4, checkpointing_steps=2)
    part = train_full("part", **flags, max_train_steps=4, resume_from_checkpoint=whole / "checkpoint-2")
    assert_same_checkpoint(part / "checkpoint-4", whole / "checkpoint-4")
    first, last = read_trained(whole / "checkpoint-2"), read_trained(whole / "checkpoint-4")
    assert {tensor.dtype for tensor in last.values()} == {torch.bfloat16}
    assert sum(not torch.equal(first[name], last[name]) for name in first) > 0.8 * len(first)
    states = torch.load(whole / "checkpoint-4" / "optimizer.bin", weights_only=True)["state"].values()
    assert torch.bfloat16 not in {value.dtype for state in states for value in state.values()
                                  if isinstance(value, torch.Tensor)}
    assert {tensor.dtype for tensor in load_file(next((whole / "unet").glob("*.safetensors"))).values()} == {
        torch.bfloat16}


def test_rounding_to_bf16_keeps_the_mean(full_script):
    """A value goes to one of its two neighbors, by chance in proportion; what bf16 has stays what it is."""
    torch.manual_seed(0)
    for sign in (1, -1):
        values = torch.full((100_000,), sign * (1 + 2**-10))  # an eighth of the way from 1 to its neighbor
        rounded = full_script.round_to_bf16(values)
        assert rounded.dtype == torch.bfloat16
        assert rounded.float().abs().unique().tolist() == [1, 1 + 2**-7]
        assert abs((rounded.float() * sign - 1).mean().item() / 2**-10 - 1) < 0.05  # five standard errors
    exact = torch.tensor([0.0, -1.5, 2.0**-130, math.inf, -math.inf])
    assert torch.equal(full_script.round_to_bf16(exact).float(), exact)
    of_gpus = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)
    assert full_script.round_to_bf16(torch.tensor([math.nan, *of_gpus])).isnan().all()


@pytest.mark.parametrize("setting", [("WORLD_SIZE", "2"), ("ACCELERATE_MIXED_PRECISION", "fp16")], ids="{0[0]}".format)
def test_updates_in_the_backward_pass_are_refused_where_gradients_come_later(
        full_script, image_folder, tmp_path, monkeypatch, capsys, setting):
    """Two processes would update before they have exchanged gradients, fp16 before it has divided by its scale."""
    monkeypatch.setenv(*setting)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        full_script.parse_args(make_args("model", image_folder, tmp_path / "out", optimizer_in_backward=True,
                                         max_grad_norm=0))
    assert "it needs one process or --fsdp, and --mixed_precision bf16 or no" in capsys.readouterr().err


@in_two_scripts
def test_adafactor_trains_and_resumes_exactly(script, train, tiny_model):
    """--use_adafactor keeps a row and a column per matrix, moves all weights, and goes on as if it had not stopped."""
    whole = train("whole", use_adafactor=True, max_train_steps=4, checkpointing_steps=2, learning_rate=1e-2)
    train("part", use_adafactor=True, max_train_steps=4, resume_from_checkpoint=whole / "checkpoint-2",
          learning_rate=1e-2)
    assert_same_checkpoint(whole.with_name("part") / "checkpoint-4", whole / "checkpoint-4")
    (entry, *_) = torch.load(whole / "checkpoint-4" / "optimizer.bin", weights_only=True)["state"].values()
    assert {"exp_avg_sq_row", "exp_avg_sq_col"} <= entry.keys() and "exp_avg" not in entry
    first, last = read_trained(whole / "checkpoint-2"), read_trained(whole / "checkpoint-4")
    assert [name for name in first if torch.equal(first[name], last[name])] == []


@pytest.mark.parametrize("side", [3, 1])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_adafactor_takes_a_convolution_as_a_matrix(script, memory_format, side):
    """It moves as that matrix does by itself, in the memory where it lies, with moments of a row and a column."""
    torch.manual_seed(0)
    kernel = torch.nn.Parameter(torch.randn(4, 5, side, side).to(memory_format=memory_format))
    matrix, place = torch.nn.Parameter(kernel.detach().flatten(1).clone()), kernel.data_ptr()
    ours = script.Adafactor([kernel], 0.1, scale_parameter=False, relative_step=False)
    library = transformers.optimization.Adafactor([matrix], 0.1, scale_parameter=False, relative_step=False)
    for _ in range(3):
        gradient = torch.randn_like(kernel)
        kernel.grad, matrix.grad = gradient, gradient.flatten(1).clone()
        ours.step()
        library.step()
    assert torch.allclose(kernel.flatten(1), matrix, rtol=1e-6, atol=1e-7)
    assert kernel.data_ptr() == place and kernel.is_contiguous(memory_format=memory_format)
    assert {name: tuple(ours.state[kernel][f"exp_avg_sq_{name}"].shape) for name in ("row", "col")} == {
        "row": (4,), "col": (5 * side**2,)}


@in_first_script
def test_moments_of_adafactor_fit_no_adamw(script, train):
    """A checkpoint of one is refused by the other, by the flag's name."""
    train("out", use_adafactor=True, max_train_steps=1)
    with pytest.raises(ValueError, match="checkpoint-1 does not fit: use_adafactor True -> False"):
        train("out", max_train_steps=2, resume_from_checkpoint="latest")


@in_two_scripts
def test_a_norm_of_0_clips_nothing(train):
    """--max_grad_norm 0 trains as a norm that is out of reach, and the gradient's own is logged all the same."""
    flags = {"max_train_steps": 2, "report_to": "tensorboard", **UNCACHED}
    never, none, clipped = (train(str(norm), max_grad_norm=norm, **flags) for norm in (1e9, 0, 1e-3))
    assert_same_checkpoint(never / "checkpoint-2", none / "checkpoint-2")
    assert read_scalars(never, "grad_norm") == read_scalars(none, "grad_norm") != {}
    weights, others = read_trained(none / "checkpoint-2"), read_trained(clipped / "checkpoint-2")
    assert any(not torch.equal(weights[name], others[name]) for name in weights)
