"""Averaged weights: the recursion, diffusers' EMAModel and its files, and which weights a run leaves where."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import in_two_scripts, make_args, read_scalars
from runs import assert_same_files, read_trained, run
from safetensors.torch import load_file, save_file

from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel


def make_network(seed: int = 0) -> torch.nn.Module:
    """Return a small network with parameters of several shapes."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5), torch.nn.Conv1d(5, 2, 1))


def make_averages(script, network: torch.nn.Module, decay: float, offload: bool = False):
    """Return a script's averages of all weights of a network."""
    return script.EmaWeights(list(network.parameters()), decay, offload)


def walk(network: torch.nn.Module, *steps) -> None:
    """Move the weights a little and call each of `steps`: an update of training, as far as averages can tell."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    for step in steps:
        step()


def copy_of(tensors) -> list[torch.Tensor]:
    """Return detached copies."""
    return [tensor.detach().clone() for tensor in tensors]


def assert_equal(first, second) -> None:
    """Check tensors for equality to the last bit."""
    torch.testing.assert_close(list(first), list(second), rtol=0, atol=0)


def assert_close(first: dict, second: dict) -> None:
    """Check that two sets of weights agree up to rounding."""
    assert first.keys() == second.keys()
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0, 0.5, 0.9999, 1])
def test_averages_follow_the_recursion(script, decay):
    """After n updates average = d average + (1 - d) weights with d = 0 for n = 1, else min(decay, n / (9 + n))."""
    network = make_network()
    averages = make_averages(script, network, decay)
    expected = [tensor.double() for tensor in copy_of(network.parameters())]
    for number in range(1, 41):
        walk(network, averages.step)
        share = 0 if number == 1 else min(decay, number / (9 + number))
        expected = [share * average + (1 - share) * weight.double()
                    for average, weight in zip(expected, copy_of(network.parameters()), strict=True)]
    assert {average.dtype for average in averages.averages} == {torch.float32}
    found = [average.double() for average in averages.averages]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.3, 0.9999])
def test_averages_are_those_of_diffusers(script, decay):
    """EMAModel decays at each update as ours do, and comes to the same averages."""
    network = make_network()
    averages, reference = make_averages(script, network, decay), EMAModel(network.parameters(), decay=decay)
    for _ in range(50):
        walk(network, lambda: reference.step(network.parameters()))
        assert averages.step() == reference.cur_decay_value
    assert averages.num_updates == reference.optimization_step == 50
    torch.testing.assert_close(averages.averages, reference.shadow_params, rtol=1e-5, atol=1e-6)


def test_offloaded_averages_are_the_same(full_script, monkeypatch):
    """--offload_ema changes where averages live, and nothing else; without CUDA, nothing of it is asked for."""
    if not torch.cuda.is_available():
        monkeypatch.delattr(torch.cuda, "stream")  # fails on Apple's devices even with None
    network = make_network()
    plain, offloaded = (make_averages(full_script, network, 0.99, offload) for offload in (False, True))
    for _ in range(20):
        walk(network, plain.step, offloaded.step)
    assert {average.device.type for average in offloaded.averages} == {"cpu"}
    assert_equal(plain.averages, offloaded.averages)
    pointers = [average.data_ptr() for average in offloaded.averages]
    walk(network, offloaded.step)
    assert [average.data_ptr() for average in offloaded.averages] == pointers  # no new buffers


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("offload", [False, True])
def test_swapping_in_restores_everything(full_script, offload, fails):
    """Inside, the network holds the averages; afterwards weights and averages are what they were, to the last bit."""
    network = make_network()
    averages = make_averages(full_script, network, 0.9, offload)
    for _ in range(5):
        walk(network, averages.step)
    kept = copy_of(averages.averages)
    weights, buffers = copy_of(network.parameters()), [parameter.data_ptr() for parameter in network.parameters()]
    try:
        with full_script.averaged_weights(SimpleNamespace(ema=averages)):
            assert_equal(network.parameters(), kept)
            if fails:
                raise KeyError("in the middle of a validation")
    except KeyError:
        assert fails
    assert_equal(network.parameters(), weights)
    assert_equal(averages.averages, kept)
    assert [parameter.data_ptr() for parameter in network.parameters()] == buffers  # the optimizer's


def average_unet(script, tiny_model: Path):
    """Return an accelerator, and models of which the UNet is trained and averaged."""
    unet = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    fields = dict.fromkeys(field.name for field in dataclasses.fields(script.Models))
    accelerator, models = Accelerator(cpu=True), script.Models(**{**fields, "unet": unet, "trained": ("unet",)})
    models.ema = script.EmaWeights(list(script.name_trained_parameters(models).values()), 0.99)
    optimizer = torch.optim.AdamW(unet.parameters())
    models.optimizer, models.lr_scheduler = accelerator.prepare(
        optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    return accelerator, models


def test_files_are_read_by_diffusers(full_script, tiny_model, tmp_path):
    """EMAModel.from_pretrained reads the averages of a checkpoint, and goes on as ours does."""
    accelerator, models = average_unet(full_script, tiny_model)
    unet, averages = models.unet, models.ema
    for _ in range(3):
        walk(unet, averages.step)
    weights = copy_of(unet.parameters())
    full_script.save_state(accelerator, models, tmp_path)
    assert_equal(unet.parameters(), weights)
    reference = EMAModel.from_pretrained(tmp_path / "unet_ema", UNet2DConditionModel)
    assert (reference.optimization_step, reference.decay, reference.min_decay) == (3, 0.99, 0)
    assert_equal(reference.shadow_params, averages.averages)
    walk(unet, averages.step, lambda: reference.step(unet.parameters()))
    torch.testing.assert_close(averages.averages, reference.shadow_params, rtol=1e-5, atol=1e-6)
    plain = UNet2DConditionModel.from_pretrained(tmp_path / "unet_ema")  # a model folder as any other
    assert plain.config.block_out_channels == unet.config.block_out_channels


def test_files_of_diffusers_are_read(full_script, tiny_model, tmp_path):
    """What EMAModel.save_pretrained writes is read, as checkpoints of the reference have it."""
    accelerator, models = average_unet(full_script, tiny_model)
    unet, averages = models.unet, models.ema
    reference = EMAModel(unet.parameters(), decay=0.99, model_cls=UNet2DConditionModel, model_config=unet.config)
    for _ in range(3):
        walk(unet, lambda: reference.step(unet.parameters()))
    checkpoint = tmp_path / "checkpoint-3"
    full_script.save_state(accelerator, models, checkpoint)
    (checkpoint / "random_states_0.pkl").touch()  # the file that makes it complete
    shutil.rmtree(checkpoint / "unet_ema")
    reference.save_pretrained(checkpoint / "unet_ema")
    full_script.resume(accelerator, models, checkpoint)
    assert averages.num_updates == 3
    assert_equal(averages.averages, reference.shadow_params)
    walk(unet, averages.step, lambda: reference.step(unet.parameters()))
    torch.testing.assert_close(averages.averages, reference.shadow_params, rtol=1e-5, atol=1e-6)


def test_a_run_exports_averages_and_keeps_both(script, tiny_model, image_folder, tmp_path):
    """What is exported are the averages; a checkpoint has the trained weights and, beside them, the averages."""
    out = tmp_path / "out"
    run(script, make_args(tiny_model, image_folder, out, use_ema=True, ema_decay=0.25, max_train_steps=4,
                          checkpointing_steps=1))
    weights = [read_trained(out / f"checkpoint-{step}") for step in range(1, 5)]
    expected = weights[0]
    for step, share in ((1, 2 / 11), (2, 0.25), (3, 0.25)):  # 3 / 12 and 4 / 13, which exceed the decay
        expected = {name: share * average + (1 - share) * weights[step][name] for name, average in expected.items()}
    averages = read_trained(out / "checkpoint-4", averaged=True)
    assert_close(averages, expected)
    exported = read_trained(out)
    assert exported.keys() == averages.keys()
    assert_equal((exported[name] for name in averages), averages.values())
    moved = [name for name in averages if not torch.equal(averages[name], weights[3][name])]
    assert len(moved) == len(averages)
    (config,) = out.glob("checkpoint-4/*_ema/config.json")
    state = json.loads(config.read_text())
    assert {name: state[name] for name in ("decay", "min_decay", "optimization_step", "update_after_step")} == {
        "decay": 0.25, "min_decay": 0, "optimization_step": 4, "update_after_step": 0}


def test_offloading_and_foreach_change_no_file(full_script, tiny_model, image_folder, tmp_path):
    """A run with --offload_ema or --foreach_ema leaves what it would have left without."""
    for name, flags in (("plain", {}), ("other", {"offload_ema": True, "foreach_ema": True})):
        run(full_script, make_args(tiny_model, image_folder, tmp_path / name, use_ema=True, **flags))
    assert_same_files(tmp_path / "plain/checkpoint-2", tmp_path / "other/checkpoint-2")
    plain, other = (read_trained(tmp_path / name) for name in ("plain", "other"))
    assert plain.keys() == other.keys()
    assert_equal(plain.values(), other.values())


@pytest.fixture
def hub_cache(tiny_model, tmp_path) -> Path:
    """A cache of the hub with the model team/model in two revisions: `main`, and `raw` with other UNet weights."""
    repository = tmp_path / "cache" / "models--team--model"
    for revision, commit in (("main", "a" * 40), ("raw", "b" * 40)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(tiny_model, repository / "snapshots" / commit)
    path = repository / "snapshots" / ("b" * 40) / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 0.5 * weight for name, weight in load_file(path).items()}, path, metadata={"format": "pt"})
    return tmp_path / "cache"


@in_two_scripts
def test_a_revision_is_trained(script, image_folder, hub_cache, tmp_path):
    """--revision and --cache_dir choose the weights to start from."""
    usual, raw = (next(hub_cache.rglob(commit * 40)) for commit in "ab")
    starts = {"out": ("team/model", {"cache_dir": hub_cache, "revision": "raw"}), "raw": (raw, {}),
              "usual": (usual, {})}
    losses = {}
    for name, (model, flags) in starts.items():
        run(script, make_args(model, image_folder, tmp_path / name, learning_rate=1e-12, adam_weight_decay=0,
                              max_train_steps=1, use_ema=True, report_to="tensorboard", **flags))
        losses[name] = read_scalars(tmp_path / name, "train_loss")[1]
    assert losses["out"] == losses["raw"] != losses["usual"]
    if "lora" not in script.__name__:
        assert_close(read_trained(tmp_path / "out"), read_trained(raw))


def test_weights_that_the_averaged_unet_lacks_are_told(full_script, image_folder, hub_cache, tmp_path):
    """Libraries would put random values in their place."""
    path = next(hub_cache.rglob("a" * 40)) / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["conv_in.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="its unet: the weights lack conv_in.weight"):
        run(full_script, make_args("team/model", image_folder, tmp_path / "out", cache_dir=hub_cache, use_ema=True,
                                   non_ema_revision="raw", max_train_steps=1))


def test_non_ema_revision_is_trained_and_the_other_averaged(full_script, image_folder, hub_cache, tmp_path):
    """The UNet starts from --non_ema_revision, its average from --revision at full decay, also when resumed."""
    flags = {"cache_dir": hub_cache, "non_ema_revision": "raw", "use_ema": True, "ema_decay": 0.9}
    out = tmp_path / "out"
    for steps in (1, 2):
        run(full_script, make_args("team/model", image_folder, out, max_train_steps=steps, **flags))
        flags["resume_from_checkpoint"] = "latest"
    expected, raw = (read_trained(next(hub_cache.rglob(commit * 40))) for commit in "ab")
    for step in (1, 2):
        weights = read_trained(out / f"checkpoint-{step}")
        assert max((weights[name] - raw[name]).abs().max() for name in raw) < 0.01  # ten learning rates
        expected = {name: 0.9 * average + 0.1 * weights[name] for name, average in expected.items()}
        assert_close(read_trained(out / f"checkpoint-{step}", averaged=True), expected)
    assert_close(read_trained(out), expected)
