"""--fsdp: two processes, each with half of the model, train as two with a copy each, and leave the same files."""

import contextlib
import json
import re
import signal
import time
from functools import partial, partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FULL_SCRIPTS, load_script, make_args, make_image, make_image_folder, read_scalars
from PIL import Image
from runs import assert_same_checkpoint, fail_at, read_folder, read_trained, run, run_pair, set_up_child, start_pair
from safetensors.torch import load_file

# The other has the same text here, and more text encoders.
in_first_script = pytest.mark.parametrize("script", FULL_SCRIPTS[:1], indirect=True)
NUM_UPDATES = 4
LOGGED = ("train_loss", "grad_norm", "validation_loss")


@pytest.fixture(scope="module", params=FULL_SCRIPTS)
def script(request):
    """Each script that trains whole networks, in turn."""
    return load_script(request.param)


@pytest.fixture
def args(tiny_model, image_folder, tmp_path_factory):
    """Return a function that gives a command line with most of what --fsdp has to get right.

    Nine samples, so that one process has none in the last micro step; three prompts, so that one has none to draw.
    """
    held_out = make_image_folder(tmp_path_factory.mktemp("held-out") / "images", count=5)
    defaults = {
        "max_train_samples": 9, "max_train_steps": NUM_UPDATES, "learning_rate": 2e-4, "checkpointing_steps": 2,
        "use_ema": True, "dream_training": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
        "train_text_encoder": True, "no_cache_text_embeddings": True, "clip_skip": 1, "lr_scheduler": "cosine",
        "lr_warmup_steps": 2, "report_to": "tensorboard", "logging_steps": 2,
        "validation_prompts": ["one", "two", "three"], "validation_steps": 2,
        "validation_inference_steps": 2, "validation_data_dir": held_out}
    return lambda output_dir, **flags: make_args(tiny_model, image_folder, output_dir, **{**defaults, **flags})


@pytest.fixture(scope="module")
def done():
    """What `pairs` has run."""
    return {}


@pytest.fixture
def pairs(script, args, done, tmp_path_factory):
    """Return the output folders of two processes with --fsdp, and of two without it; measured, with logs beside."""
    if script not in done:
        folder = tmp_path_factory.mktemp("pairs")
        for name in ("fsdp", "copies"):
            run_measured(script, args(folder / name, fsdp=name == "fsdp"), folder / f"{name}.log")
        done[script] = folder / "fsdp", folder / "copies"
    return done[script]


def run_measured(script, argv: list, log: Path) -> None:
    """Run two processes that train together until both have ended well, with `measure_in_child`."""
    first, second = start_pair(script, argv, log, target=measure_in_child)
    with first, second:
        assert (first.end(), second.end()) == (0, 0), log.read_text()


def measure_in_child(name: str, argv: list[str], log: str, limit: int | None, environment: dict[str, str]) -> None:
    """Run a script; write when this process had whole networks, and the bytes of state that it holds at the end."""
    set_up_child(log, limit, environment)
    script = load_script(name)
    load, shard, original, turn = script.load_models, script.shard_networks, script.export_model, []

    def load_models(*given):
        turn.append(time.monotonic())
        return load(*given)

    def shard_networks(*given):
        shard(*given)
        Path(f"{log}.{environment['RANK']}.turn").write_text(json.dumps([*turn, time.monotonic()]))

    def export_model(args, accelerator, models):
        weights = list(script.name_trained_parameters(models).values())
        moments = [state[name] for state in models.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        tensors = [getattr(tensor, "_local_tensor", tensor) for tensor in (*weights, *moments, *models.ema.averages)]
        count = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        Path(f"{log}.{environment['RANK']}.bytes").write_text(str(count))
        original(args, accelerator, models)

    script.load_models, script.shard_networks, script.export_model = load_models, shard_networks, export_model
    script.main(argv)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights, EMA weights and moments in a checkpoint or an export."""
    tensors = {f"{path.relative_to(folder)} {name}": tensor for path in folder.rglob("*.safetensors")
               for name, tensor in load_file(path).items()}
    if (folder / "optimizer.bin").is_file():
        for key, moments in torch.load(folder / "optimizer.bin")["state"].items():
            tensors |= {f"{key} {name}": tensor for name, tensor in moments.items()}
    return tensors


def assert_close(first: Path, second: Path) -> None:
    """Fail unless two folders hold the same tensors, up to the order of floating-point sums.

    The bias of keys has no influence on attention: its gradients are rounding errors, which Adam makes steps of.
    """
    tensors, others = read_tensors(first), read_tensors(second)
    assert tensors and tensors.keys() == others.keys()
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("k_proj.bias")}
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=1e-6, msg=lambda text, name=name: name + text)


# ---- The same training ----------------------------------------------------------------------------------------------


def test_they_train_as_two_with_a_copy_each(pairs):
    """Losses, norms, weights, EMA weights and moments agree; so do the pictures, and what the files are."""
    fsdp, copies = pairs
    for tag in LOGGED:
        logged = read_scalars(copies, tag)
        assert len(logged) == (2 if tag == "validation_loss" else NUM_UPDATES)
        assert read_scalars(fsdp, tag) == pytest.approx(logged, rel=1e-6), tag
    contents, others = ({name: content for name, content in read_folder(out).items() if not name.startswith("logs")}
                        for out in pairs)
    assert contents.keys() == others.keys()
    assert [name for name in contents if name.endswith(".json") and contents[name] != others[name]] == []
    for name in (name for name in contents if name.endswith(".png")):
        drawn, expected = (np.asarray(Image.open(out / name)).astype(int) for out in pairs)
        assert abs(drawn - expected).max() <= 2  # of 255
    for folder in ("checkpoint-2", f"checkpoint-{NUM_UPDATES}", "unet", "text_encoder"):
        assert_close(fsdp / folder, copies / folder)


def test_they_load_in_turn(pairs):
    """One has kept its part before the other loads: a machine never holds two whole models."""
    log = pairs[0].with_name("fsdp.log")
    first, second = sorted(json.loads(log.with_name(f"{log.name}.{rank}.turn").read_text()) for rank in range(2))
    assert first[0] < first[1] <= second[0] < second[1]


def test_the_export_is_the_last_average(pairs):
    """The pipeline of the output folder has the EMA weights of the last checkpoint, bit for bit."""
    fsdp, _ = pairs
    exported, average = read_trained(fsdp), read_trained(fsdp / f"checkpoint-{NUM_UPDATES}", averaged=True)
    assert exported.keys() == average.keys()
    assert all(torch.equal(exported[name], average[name]) for name in average)
    assert not torch.equal(exported["conv_in.weight"], read_trained(fsdp / "checkpoint-4")["conv_in.weight"])


@in_first_script
def test_they_resume_exactly(script, args, pairs, tmp_path):
    """Two processes go on from a checkpoint as if they had not stopped, bit for bit, and keep no more than a half."""
    (fsdp, copies), out = pairs, tmp_path / "out"
    argv = args(out, fsdp=True, resume_from_checkpoint=fsdp / "checkpoint-2")
    run_measured(script, argv, tmp_path / "out.log")
    assert_same_checkpoint(out / f"checkpoint-{NUM_UPDATES}", fsdp / f"checkpoint-{NUM_UPDATES}")
    for tag in LOGGED:
        logged = read_scalars(fsdp, tag)
        assert read_scalars(out, tag) == {step: number for step, number in logged.items() if step > 2}
    for rank in range(2):
        started, resumed, whole = (int(folder.with_name(f"{folder.name}.log.{rank}.bytes").read_text())
                                   for folder in (fsdp, out, copies))
        assert 0.49 < started / whole < 0.54 and resumed == started


# ---- The same text in both scripts: one is enough -------------------------------------------------------------------

QUIET = {"validation_prompts": None, "validation_data_dir": None}


@in_first_script
@pytest.mark.parametrize(("source", "fsdp"), [(1, True), (0, False)])
def test_a_checkpoint_goes_on_in_another_way(script, args, pairs, source, fsdp, tmp_path):
    """From copies to --fsdp, and from --fsdp to one process with twice the batch."""
    out, checkpoint = tmp_path / "out", pairs[source] / "checkpoint-2"
    flags = {"resume_from_checkpoint": checkpoint, **QUIET}
    if fsdp:
        run_pair(script, args(out, fsdp=True, **flags), tmp_path / "log")
    else:
        run(script, args(out, train_batch_size=4, **flags))
    assert_close(out / f"checkpoint-{NUM_UPDATES}", pairs[source] / f"checkpoint-{NUM_UPDATES}")


@in_first_script
def test_updates_in_the_backward_pass_are_those_after_it(script, args, tmp_path):
    """--optimizer_in_backward with two processes does what it does in one; so does --offload_ema."""
    flags = {"gradient_accumulation_steps": 1, "max_grad_norm": 0, "optimizer_in_backward": True, "offload_ema": True,
             "max_train_steps": 2, **QUIET}
    run_pair(script, args(tmp_path / "pair", fsdp=True, **flags), tmp_path / "log")
    run(script, args(tmp_path / "one", train_batch_size=4, **flags))
    assert_close(tmp_path / "pair/checkpoint-2", tmp_path / "one/checkpoint-2")


@in_first_script
def test_caches_buckets_and_a_stop(script, args, tmp_path):
    """Encoded images of two shapes, stopped by SIGTERM and resumed, train as copies do that are never stopped."""
    data, out, log, last = make_image_folder(tmp_path / "data"), tmp_path / "out", tmp_path / "log", "checkpoint-4"
    for index in range(4):
        make_image(index, (64, 32)).save(data / f"{index:03d}.png")
    flags = {"train_data_dir": data, "aspect_ratio_buckets": True, "bucket_step": 8, "train_text_encoder": None,
             "cache_latents": True, "no_cache_text_embeddings": None, "cache_text_embeddings": True,
             "encoded_dir": tmp_path / "encoded", "max_train_steps": 4, **QUIET}
    run_pair(script, args(tmp_path / "copies", **flags), log)
    stopping = partial(fail_at, "train_step", 3, signal.SIGTERM)  # in the second update
    first, second = start_pair(script, args(out, fsdp=True, **flags), log, target=stopping)
    with first, second:
        assert (first.end(), second.end()) == (128 + signal.SIGTERM,) * 2, log.read_text()
    assert "stopped by SIGTERM after update 2" in log.read_text()
    run_pair(script, args(out, fsdp=True, resume_from_checkpoint="latest", **flags), log)
    assert_close(out / last, tmp_path / "copies" / last)


def count_graphs(name: str, argv: list[str], log: str, limit: int | None, environment: dict[str, str]) -> None:
    """Run a script, which compiles without making kernels, and write how many graphs it has."""
    set_up_child(log, limit, environment)
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    load_script(name).main(argv)
    Path(f"{log}.{environment['RANK']}.graphs").write_text(str(torch._dynamo.utils.counters["stats"]["unique_graphs"]))


@in_first_script
def test_compiled_blocks_train_as_plain_ones(script, args, pairs, tmp_path):
    """With --torch_compile a run goes on from any checkpoint, and differs by rounding; files keep their names."""
    out, last = tmp_path / "out", f"checkpoint-{NUM_UPDATES}"
    argv = args(out, fsdp=True, torch_compile=True, resume_from_checkpoint=pairs[0] / "checkpoint-2", **QUIET)
    first, second = start_pair(script, argv, tmp_path / "log", target=count_graphs)
    with first, second:
        assert (first.end(), second.end()) == (0, 0), (tmp_path / "log").read_text()
    assert all(int(Path(tmp_path, f"log.{rank}.graphs").read_text()) > 0 for rank in range(2))
    assert_close(out / last, pairs[0] / last)
    assert "recompile_limit" not in (tmp_path / "log").read_text()


@in_first_script
def test_validation_that_fails_in_one_process_ends_both(script, args, tmp_path):
    """The other would wait for its part of the weights: the run ends, and says why."""
    broken, out = make_image_folder(tmp_path / "broken", count=5), tmp_path / "out"
    (broken / "001.png").write_bytes(b"no picture")
    argv = args(out, fsdp=True, validation_data_dir=broken, validation_prompts=None, validation_steps=1)
    first, second = start_pair(script, argv, tmp_path / "log")
    with first, second:
        assert first.end() != 0 and second.end() != 0
    log = (tmp_path / "log").read_text()
    assert re.search(r"row 1 of the data .* cannot be read as an image", log) and "the run goes on" not in log


@in_first_script
@pytest.mark.parametrize(("killed", "fsdp"), [(0, True), (1, False)])
def test_where_one_is_killed_the_other_says_what_to_do(script, args, killed, fsdp, tmp_path):
    """It ends by itself, with shards as with copies."""
    out, log = tmp_path / "out", tmp_path / "log"
    pair = start_pair(script, args(out, fsdp=fsdp, max_train_steps=100_000, **QUIET), log)
    with pair[0], pair[1]:
        pair[killed].wait_until((out / "checkpoint-2").exists)
        pair[killed].kill(signal.SIGKILL)
        assert pair[1 - killed].end() == 1
    assert re.search("another process has ended, or hangs: .* --resume_from_checkpoint latest", log.read_text())


@in_first_script
def test_torch_before_2_11_is_refused(script, args, tmp_path, capsys, monkeypatch):
    """With 2.7 and 2.9 the losses were off by 0.04%, silently."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for version, status in (("2.10.1+cu128", 2), ("2.11.0+cu130", None)):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        with pytest.raises(SystemExit) if status else contextlib.nullcontext():
            script.parse_args(args(tmp_path / "out", fsdp=True))
    assert "--fsdp needs torch 2.11" in capsys.readouterr().err


@in_first_script
@pytest.mark.parametrize("flag", ["use_8bit_adam", "use_adafactor", "channels_last"])
def test_what_cannot_be_sharded_is_refused(script, args, flag, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        script.parse_args(args(tmp_path / "out", fsdp=True, **{flag: True}))
    assert f"--fsdp excludes --{flag}" in capsys.readouterr().err


@in_first_script
def test_one_process_is_refused(script, args, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(args(tmp_path / "out", fsdp=True))
    assert "--multi_gpu" in capsys.readouterr().err


# ---- Host memory ----------------------------------------------------------------------------------------------------


def test_float32_weights_are_mapped_not_copied(each_script, base_args):
    """Processes of a machine share the pages of the model's files, so that many start in the memory of one.

    All but the VAE's convolutions, which are laid out anew, channels last.
    """
    args = each_script.parse_args(base_args)
    accelerator, configs = each_script.make_accelerator(args), each_script.load_model_configs(args)
    models = each_script.load_models(args, accelerator, configs)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [range(*(int(end, 16) for end in line[0].split("-")))
              for line in maps if line[-1].endswith("safetensors")]
    for part in each_script.NETWORK_CLASSES:
        for name, weight in getattr(models, part).named_parameters():
            is_own = "lora" in name or part == "vae" and weight.dim() == 4
            assert is_own or any(weight.data_ptr() in pages for pages in mapped), f"{part}.{name}"
