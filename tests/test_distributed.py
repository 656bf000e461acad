"""Two processes on the CPU train as one with twice the batch, stop together, and are resumed exactly."""

import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_first_script, in_two_scripts, make_args, make_image_folder, read_scalars
from PIL import Image
from runs import (
    assert_same_checkpoint,
    fail_at,
    get_command,
    list_names,
    read_record,
    recorded,
    run,
    run_elsewhere,
    run_pair,
    start_pair,
)
from safetensors.torch import load_file

# These tests stop processes at a moment of their own, which a busy machine may let pass: each gets one more try.

NUM_UPDATES = 7
PROMPTS = ["one", "two", "three"]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Folder of five pictures that are not trained on: an odd number, too."""
    return make_image_folder(tmp_path_factory.mktemp("held-out") / "images", count=5)


@pytest.fixture
def args(tiny_model, image_folder, held_out):
    """Return a function that gives a command line: nine samples, so that the last update of an epoch has only one."""
    defaults = {
        "max_train_samples": 9, "max_train_steps": NUM_UPDATES, "checkpointing_steps": 3, "use_ema": True,
        "random_flip": True, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "report_to": "tensorboard",
        "validation_prompts": PROMPTS, "validation_steps": 4,
        "validation_inference_steps": 2, "validation_data_dir": held_out, "logging_steps": 2}
    return lambda output_dir, **flags: make_args(tiny_model, image_folder, output_dir, **{**defaults, **flags})


@pytest.fixture(scope="module")
def done():
    """What the two fixtures below have run."""
    return {}


@pytest.fixture
def pair(script, args, done, tmp_path_factory):
    """Output of two processes with batches of 2, and what each of them trained on."""
    if (script, "pair") not in done:
        folder = tmp_path_factory.mktemp("pair")
        done[script, "pair"] = folder / "out", run_pair(script, args(folder / "out"), folder / "log")
    return done[script, "pair"]


@pytest.fixture
def single(script, args, done, tmp_path_factory):
    """Output of one process with batches of 4, and what it trained on."""
    if (script, "single") not in done:
        out = tmp_path_factory.mktemp("single") / "out"
        with recorded(script) as seen:
            run(script, args(out, train_batch_size=4))
        done[script, "single"] = out, seen
    return done[script, "single"]


def assert_close_weights(checkpoint: Path, other: Path) -> None:
    """Fail unless two checkpoints hold the same weights, up to the order of floating-point sums."""
    names = [path.relative_to(checkpoint) for path in checkpoint.rglob("*.safetensors")]
    assert names
    for name in names:
        weights, others = load_file(checkpoint / name), load_file(other / name)
        assert weights.keys() == others.keys()
        for key, tensor in weights.items():
            torch.testing.assert_close(tensor, others[key], rtol=1e-3, atol=2e-5, msg=lambda text, key=key: key + text)


# ---- The same training ----------------------------------------------------------------------------------------------


@in_two_scripts
def test_there_are_two_processes(pair):
    """Each has saved its random states, and the record counts two: launchers are known to start one in silence."""
    out, seen = pair
    for checkpoint in (out / "checkpoint-3", out / f"checkpoint-{NUM_UPDATES}"):
        assert {"random_states_0.pkl", "random_states_1.pkl"} <= list_names(checkpoint, "*")
        assert read_record(checkpoint)["num_processes"] == 2
    states = [torch.load(out / f"checkpoint-3/random_states_{rank}.pkl", weights_only=False) for rank in range(2)]
    assert not torch.equal(states[0]["torch_manual_seed"], states[1]["torch_manual_seed"])
    assert all(len(micro_steps) == NUM_UPDATES for micro_steps in seen)


@in_two_scripts
def test_processes_draw_different_noise_and_together_what_one_draws(pair, single):
    """Side by side, their samples with all that is random about them are those of one process, each of them once."""
    (first, second), (_, whole) = pair[1], single
    assert len(whole) == NUM_UPDATES
    for one, other, both in zip(first, second, whole, strict=True):
        assert tuple(one["step"]) == tuple(other["step"]) == both["step"]
        assert one["samples"] + other["samples"] == both["samples"]
        assert len({*one["noises"], *other["noises"]}) == len(both["samples"])
    counts = [(len(one["samples"]), len(other["samples"])) for one, other in zip(first, second, strict=True)]
    assert counts == [(2, 2), (2, 2), (0, 1), (2, 2), (2, 2), (0, 1), (2, 2)]


@in_two_scripts
def test_two_processes_train_as_one_with_twice_the_batch(pair, single):
    """Losses, gradients and weights agree, also after updates with a single sample, for which one process waits."""
    for tag in ("train_loss", "lr", "grad_norm", "epoch"):
        logged = read_scalars(single[0], tag)
        assert list(logged) == list(range(1, NUM_UPDATES + 1))
        assert read_scalars(pair[0], tag) == pytest.approx(logged, rel=1e-4), tag
    for step in (3, 6, NUM_UPDATES):
        assert_close_weights(pair[0] / f"checkpoint-{step}", single[0] / f"checkpoint-{step}")


@in_two_scripts
def test_processes_share_the_validation(pair, single):
    """All three pictures are there, in the order of the prompts, and they and the held-out loss are those of one."""
    assert list_names(pair[0] / "validation", "*") == {"step-4", f"step-{NUM_UPDATES}"}
    for step in ("step-4", f"step-{NUM_UPDATES}"):
        folders = [out / "validation" / step for out in (pair[0], single[0])]
        assert list_names(folders[0], "*") == {"00.png", "01.png", "02.png", "grid.png"}
        for name in list_names(folders[0], "*"):
            drawn, expected = (np.asarray(Image.open(folder / name)).astype(int) for folder in folders)
            assert abs(drawn - expected).max() <= 2  # of 255
        pictures = [np.asarray(Image.open(folders[0] / f"{index:02d}.png")).astype(int) for index in range(3)]
        assert all(abs(pictures[i] - pictures[i - 1]).mean() > 3 for i in range(3))
    losses = read_scalars(single[0], "validation_loss")
    assert list(losses) == [4, NUM_UPDATES]
    assert read_scalars(pair[0], "validation_loss") == pytest.approx(losses, rel=1e-4)


@in_first_script
def test_validation_that_fails_in_one_process_holds_up_neither(script, args, held_out, tmp_path):
    """A picture that one of them cannot read costs the number, not the run, and nobody waits for the other."""
    broken, out = shutil.copytree(held_out, tmp_path / "broken"), tmp_path / "out"
    (broken / "001.png").write_bytes(b"no picture")
    run_pair(script, args(out, max_train_steps=2, validation_steps=1, validation_data_dir=broken), tmp_path / "log")
    assert "validation failed; the run goes on" in (tmp_path / "log").read_text()
    assert list_names(out / "validation", "*") == {"step-1", "step-2"} and list_names(out) == {"checkpoint-2"}


@in_first_script
@pytest.mark.parametrize(("accumulation", "total"), [(1, 10), (4, 4)])
def test_learning_rate_is_scheduled_in_updates(script, args, accumulation, total, tmp_path):
    """Warm-up and decay are as long as the flags say, for two processes and any number of accumulation steps."""
    argv = args(
        tmp_path / "out", max_train_samples=None, max_train_steps=None, num_train_epochs=2, train_batch_size=1,
        gradient_accumulation_steps=accumulation, lr_scheduler="linear", use_ema=False, validation_prompts=None,
        validation_data_dir=None)
    run_pair(script, argv, tmp_path / "log")
    rates = [min(done / 2, (total - done) / (total - 2)) for done in range(total)]
    assert read_scalars(tmp_path / "out", "lr") == pytest.approx({i + 1: 1e-3 * rate for i, rate in enumerate(rates)})


# ---- Stopping and going on ------------------------------------------------------------------------------------------


@in_first_script
def test_signal_to_one_process_stops_both_in_the_same_update(script, args, tmp_path):
    """They save it once and say how to go on; resumed, they repeat the run that was not stopped there."""
    out, log = tmp_path / "out", tmp_path / "log"
    flags = {"validation_prompts": None, "validation_data_dir": None, "lr_scheduler": "constant", "lr_warmup_steps": 0}
    first, second = start_pair(script, args(out, max_train_steps=100_000, checkpointing_steps=2, **flags), log)
    with first, second:
        second.wait_until((out / "checkpoint-2").exists)
        second.kill(signal.SIGTERM)
        assert (first.end(), second.end()) == (143, 143), log.read_text()
    newest = script.list_checkpoints(str(out))[-1]
    step = read_record(newest)["progress"]["global_step"]
    assert list_names(out) == {f"checkpoint-{number}" for number in range(2, step + 1, 2)} | {newest.name}
    assert log.read_text().count(f"stopped by SIGTERM after update {step}, which is saved") == 1
    assert "Traceback" not in log.read_text()
    for folder, start in (("from 2", out / "checkpoint-2"), ("from the stop", newest)):
        argv = args(tmp_path / folder, max_train_steps=step + 2, resume_from_checkpoint=start, **flags)
        run_pair(script, argv, log)
    assert_same_checkpoint(*(tmp_path / folder / f"checkpoint-{step + 2}" for folder in ("from 2", "from the stop")))


@in_two_scripts
def test_two_processes_are_resumed_exactly(script, args, pair, tmp_path, caplog):
    """From any checkpoint two processes repeat what two processes did, bit for bit, pictures and losses included."""
    out = tmp_path / "out"
    run_pair(script, args(out, resume_from_checkpoint=pair[0] / "checkpoint-3"), tmp_path / "log")
    assert "with the same captions, noise and settings" in (tmp_path / "log").read_text()
    for step in (6, NUM_UPDATES):
        assert_same_checkpoint(out / f"checkpoint-{step}", pair[0] / f"checkpoint-{step}")
    for tag in ("train_loss", "grad_norm", "validation_loss"):
        logged = read_scalars(pair[0], tag)
        assert read_scalars(out, tag) == {step: number for step, number in logged.items() if step > 3}


@in_two_scripts
def test_one_process_goes_on_where_two_stopped(script, args, pair, tmp_path, caplog):
    """With twice the batch it trains on the same samples and ends at the same weights; the change is said."""
    out = tmp_path / "out"
    run(script, args(out, train_batch_size=4, resume_from_checkpoint=pair[0] / "checkpoint-3"))
    assert "num_processes 2 -> 1" in caplog.text and "train_batch_size 2 -> 4" in caplog.text
    assert_close_weights(out / f"checkpoint-{NUM_UPDATES}", pair[0] / f"checkpoint-{NUM_UPDATES}")


FAILURES = {  # what one process does: the function in which it does that, at which call, and what the other says
    "is killed while encoding": ("encode_images", 1, signal.SIGKILL, "Connection (closed|reset) by peer"),
    "hangs while encoding": ("encode_images", 1, signal.SIGSTOP, "Timed out waiting 10000ms"),
    "hangs in training": ("train_step", 4, signal.SIGSTOP, "Timed out waiting 6000ms"),
    "is killed while drawing": ("draw_images", 1, signal.SIGKILL, "another process has ended, or hangs: see its log"),
    "is killed while saving":
        ("save_state", 2, signal.SIGKILL, "checkpoint-4 could not be written: .*(closed|reset) by peer"),
}


@in_first_script
@pytest.mark.parametrize("failure", FAILURES)
def test_when_one_process_fails_the_other_ends_in_time(script, args, tmp_path, failure):
    """It gives the reason; nothing is damaged, and the run goes on from the last checkpoint."""
    moment, count, number, reason = FAILURES[failure]
    out, log = tmp_path / "out", tmp_path / "log"
    argv = args(out, max_train_steps=4, checkpointing_steps=2, validation_steps=3, validation_data_dir=None,
                validation_prompts=["a"], validation_inference_steps=1, cache_latents=True,
                encoded_dir=tmp_path / "encoded", resume_from_checkpoint="latest")
    first, second = start_pair(script, argv, log, target=functools.partial(fail_at, moment, count, number))
    with first, second:
        assert first.end() == 1
    assert re.search(reason, log.read_text()), log.read_text()
    assert list_names(out) == ({"checkpoint-2"} if moment != "encode_images" else set())
    run(script, argv)
    assert list_names(out) == {"checkpoint-2", "checkpoint-4"} and list_names(out, ".partial-*") == set()


@in_first_script
def test_a_broken_picture_in_the_share_of_one_process_ends_both(script, args, image_folder, tmp_path):
    """One names the picture, the other says where to look."""
    broken = shutil.copytree(image_folder, tmp_path / "broken")
    (broken / "004.png").write_bytes(b"no picture")
    argv = args(tmp_path / "out", train_data_dir=broken, max_train_samples=None, validation_prompts=None,
                validation_data_dir=None)
    first, second = start_pair(script, argv, tmp_path / "log")
    with first, second:
        assert (first.end(), second.end()) == (1, 1)
    log = (tmp_path / "log").read_text()
    assert re.search(r"row 4 of the data .*004.png.* cannot be read as an image", log)
    assert log.count("another process has ended, or hangs: see its log") == 2


@in_first_script
@pytest.mark.parametrize("flag", ["--output_dir", "--encoded_dir"])
def test_folders_that_machines_do_not_share_are_refused(script, args, tmp_path, flag):
    """Each process sees a folder of its own, as on two machines without a common file system."""
    folders = {"--output_dir": tmp_path / "out", "--encoded_dir": tmp_path / "encoded", flag: "here"}
    argv = args(folders["--output_dir"], encoded_dir=folders["--encoded_dir"], cache_latents=True, max_train_steps=1)
    first, second = start_pair(script, argv, tmp_path / "log", target=run_elsewhere)
    with first, second:
        assert (first.end(), second.end()) == (1, 1)
    log = (tmp_path / "log").read_text()
    assert re.search(f"UserError: .*({flag} .* is not the same folder on all|name an {flag} all see)", log), log


@in_first_script
def test_signal_to_the_launcher_stops_all(script, args, tmp_path):
    """`accelerate launch` passes SIGTERM on, to the loaders' processes as well: the run saves once and ends."""
    out, log = tmp_path / "out", tmp_path / "log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = args(out, max_train_steps=100_000, checkpointing_steps=100_000, dataloader_num_workers=1, logging_steps=2,
                validation_steps=None)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--main_process_port", str(port), *get_command(script, argv)[1:]]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with log.open("w") as stream, subprocess.Popen(command, stdout=stream, stderr=stream, env=environment) as launcher:
        end = time.monotonic() + 180
        while "loss" not in log.read_text() and launcher.poll() is None and time.monotonic() < end:
            time.sleep(0.05)  # the bar shows a loss after the first two updates
        launcher.terminate()
        assert launcher.wait(180) != 0
    (name,) = list_names(out)
    assert read_record(out / name)["num_processes"] == 2
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= list_names(out / name, "*")
    assert f"stopped by SIGTERM after update {name.removeprefix('checkpoint-')}, which is saved" in log.read_text()
    assert list_names(out, ".partial*") == set()
