"""The torch scripts on a CUDA device that is not there: no waits for it, no mixed devices, no needless kernels.

The device answers for the whole process that it is loaded into: this file, run by itself, is that process.
"""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TORCH_SCRIPTS, make_args
from runs import forget_accelerate
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(ROOT / "benchmarks"))
import estimate  # noqa: E402

SPARE_LAUNCHES = 20  # of an update, for what the least loop does not do: weights of samples, numbers to log
FAULTS = (("loss.detach()", "loss.item()", 1),  # and how often each waits: for the copy, and back for the index
          ("objective.alpha[timesteps]", "objective.alpha[timesteps.cpu()]", 2))


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_models, image_folder) -> dict[str, dict]:
    """What each script takes of the device, and the first one with FAULTS."""
    folder = tmp_path_factory.mktemp("device")
    try:
        library = estimate.build_device(folder)
    except estimate.Unavailable as error:
        pytest.skip(str(error))
    source = (ROOT / TORCH_SCRIPTS[0]).read_text()
    for right, wrong, _ in FAULTS:
        assert source.count(right) == 1
        source = source.replace(right, wrong)
    (folder / "faulty.py").write_text(source)
    scripts = [*(ROOT / name for name in TORCH_SCRIPTS), folder / "faulty.py"]
    command = [sys.executable, __file__, folder, tiny_models["sd"], tiny_models["sdxl"], image_folder, *scripts]
    done = subprocess.run(list(map(str, command)), env=estimate.make_environment(library), capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", TORCH_SCRIPTS)
def test_training_never_waits_for_the_device_and_mixes_no_devices(found, name):
    assert found[name]["waits_per_update"] == {}
    assert found[name]["mismatches"] == {}


@pytest.mark.parametrize("name", TORCH_SCRIPTS)
def test_training_launches_hardly_more_than_the_least_loop(found, name):
    assert found[name]["least"] < found[name]["launches_per_update"] <= found[name]["least"] + SPARE_LAUNCHES


@pytest.mark.parametrize("name", TORCH_SCRIPTS)
def test_norms_stay_in_half_precision(found, name):
    """CUDA's autocast would run them, and what follows, in float32."""
    assert found[name]["norm_dtypes"] == ["torch.bfloat16"]


@pytest.mark.parametrize("name", TORCH_SCRIPTS)
def test_text_encoders_leave_their_memory_to_the_vae(found, name):
    """With their states cached, they are in host memory again when a picture is decoded."""
    assert found[name]["text_encoder"] == ["cpu"]


def test_copies_of_offloaded_averages_run_beside_the_passes(found):
    """Their stream waits for the update whose weights it reads; what changes these, an update or a swap, for it."""
    update = ["main: wait", "main: update", "side: wait", "side: average"]
    assert found["offloaded"] == [*update, *update, "main: wait"]


def test_memory_and_work_of_each_phase_are_reported(found):
    for name in TORCH_SCRIPTS:
        peaks = found[name]["peak_gib"]
        assert list(peaks) == ["encoding", "training", "drawing"]
        assert all(0 < peak["allocated"] <= peak["reserved"] for peak in peaks.values())
        assert found[name]["tflop_per_image"] > 0


def test_a_wait_and_a_mixture_are_found_with_their_lines(found):
    waits, mismatches = found["faulty.py"]["waits_per_update"], found["faulty.py"]["mismatches"]
    for _, wrong, expected in FAULTS:
        assert [count for line, count in waits.items() if wrong in line] == [expected], waits
    assert len(mismatches) == 1 and "timesteps.cpu()" in next(iter(mismatches))


def test_a_machine_without_a_compiler_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(estimate.Unavailable, match="no C\\+\\+ compiler .* install one"):
        estimate.build_device(tmp_path)


def run_least_loop(script, accelerator, models, objective, batch: dict) -> None:
    """Make one update with as few kernels as torch allows, on a batch in pinned memory, with both caches."""
    unet = models.unet
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    data = {name: tensor.to("cuda", non_blocking=True) for name, tensor in batch.items() if name != "sources"}
    mean, std = data["moments"].float().chunk(2, dim=1)
    latents = (mean + std * data["posterior_noise"]) * 0.18215
    text, added = data["encoder_hidden_states"].float(), {}
    if "pooled_prompt_embeds" in data:
        added = {"text_embeds": data["pooled_prompt_embeds"].float(), "time_ids": data["time_ids"]}
    alpha, sigma = (table[data["timesteps"]].view(-1, 1, 1, 1) for table in (objective.alpha, objective.sigma))
    noisy = alpha * latents + sigma * data["noise"]
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        predicted = unet(noisy, data["timesteps"], text, added_cond_kwargs=added, return_dict=False)[0]
    F.mse_loss(predicted.float(), data["noise"]).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    models.optimizer.optimizer.step()
    models.optimizer.optimizer.zero_grad()


def estimate_with_least_loop(script, argv: list[str]) -> dict:
    """Return what a script takes of the device, and the launches of the least loop with the same networks."""
    batches, run, places, send, train = [], [], set(), script.send_to_device, script.train

    def send_and_keep(batch, *args, **kwargs):
        batches.append(dict(batch))
        return send(batch, *args, **kwargs)

    def train_and_keep(args, *others):
        run.extend(others[:3])
        vae, text_encoder = run[1].vae, run[1].text_encoder
        vae.decoder.register_forward_pre_hook(lambda *_: places.add(text_encoder.device.type))
        return train(args, *others)

    script.send_to_device, script.train = send_and_keep, train_and_keep
    found, device, dtypes = estimate.estimate(script, argv), estimate.Device(script.__file__), set()
    for module in run[1].unet.modules():
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            module.register_forward_hook(lambda module, inputs, output: dtypes.add(str(output.dtype)))
    with device.counted():
        run_least_loop(script, *run, batches[-1])
    return found | {"least": device.num_launches, "norm_dtypes": sorted(dtypes), "text_encoder": sorted(places)}


def list_offloaded_work(script, argv: list[str]) -> list[str]:
    """Return the stream of each update, of each average in host memory, and of each wait for the other stream."""
    work, main_stream, wait_stream = [], torch.cuda.default_stream(), torch.cuda.Stream.wait_stream

    def note(stream, what: str) -> None:
        line = f"{'main' if stream == main_stream else 'side'}: {what}"
        if work[-1:] != [line]:
            work.append(line)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            for name, what in (("_fused_adamw_", "update"), ("lerp_", "average")):
                if func._schema.name == f"aten::{name}":
                    note(torch.cuda.current_stream(), what)
            return func(*args, **(kwargs or {}))

    def wait(stream, other) -> None:
        note(stream, "wait")
        wait_stream(stream, other)

    torch.cuda.Stream.wait_stream, script.save_checkpoint, script.export_model = wait, lambda *_: None, lambda *_: None
    with Watch():
        script.main([*argv, "--use_ema", "--offload_ema", "--max_train_steps=2"])
    torch.cuda.Stream.wait_stream = wait_stream
    return work


def main(folder: str, sd: str, sdxl: str, images: str, *scripts: str) -> None:
    found = {}
    for path in map(Path, scripts):
        model = sdxl if "sdxl" in path.name else sd
        argv = make_args(model, images, Path(folder, path.stem), mixed_precision="bf16", cache_latents=True,
                         cache_text_embeddings=True, encoded_dir=Path(folder, "encoded"), validation_prompt="a",
                         validation_inference_steps=1, num_validation_images=1)
        with contextlib.redirect_stdout(sys.stderr):
            found[path.name] = estimate_with_least_loop(estimate.load_script(path), list(map(str, argv)))
            forget_accelerate()
            if path.name == TORCH_SCRIPTS[0]:
                found["offloaded"] = list_offloaded_work(
                    estimate.load_script(path), [*map(str, argv), f"--output_dir={folder}/offloaded"])
                forget_accelerate()
    Path(folder, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
