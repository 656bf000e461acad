"""What a network with random weights cannot show, on the trained one that the quickstart starts from."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, SDXL_SCRIPTS, TORCH_SCRIPTS, in_first_script, load_script, make_args, read_scalars
from PIL import Image
from runs import run

# The base is a Stable Diffusion: the scripts for SDXL cannot train it.
SD_SCRIPTS = [name for name in TORCH_SCRIPTS if name not in SDXL_SCRIPTS]
BASE, IMAGES, HELD_OUT = (ROOT / "quickstart" / name for name in ("base", "images", "validation_images"))
FLAGS = {"resolution": 64, "train_batch_size": 8, "max_train_samples": 64, "validation_data_dir": HELD_OUT,
         "report_to": "tensorboard", "checkpointing_steps": 1000}


@pytest.fixture(scope="module", params=SD_SCRIPTS)
def script(request):
    """Each script for Stable Diffusion in turn, as a module."""
    return load_script(request.param)


def fine_tune(script, out: Path, **flags) -> Path:
    """Run a script on the quickstart's pictures; LoRA at a rate ten times that of full fine-tuning."""
    factor = 10 if "lora" in script.__name__ else 1
    flags["learning_rate"] = factor * flags["learning_rate"]
    run(script, make_args(BASE, IMAGES, out, **{**FLAGS, **flags}))
    return out


def get_held_out_loss(out: Path) -> float:
    """Return the held-out loss at the end of a run."""
    return list(read_scalars(out, "validation_loss").values())[-1]


@pytest.fixture(scope="module")
def first_loss(script, tmp_path_factory) -> float:
    """The held-out loss of the base, before anything is learned."""
    return get_held_out_loss(fine_tune(script, tmp_path_factory.mktemp("first"), learning_rate=0, max_train_steps=1))


def test_the_base_has_learned_to_draw(first_loss):
    """The base predicts noise in pictures of another style far better than by predicting none, whose loss is 1."""
    assert first_loss < 0.35


def test_fine_tuning_lowers_the_held_out_loss(script, tmp_path, first_loss):
    """Pictures that were not trained on are predicted better after a few updates in their style."""
    out = fine_tune(script, tmp_path / "out", learning_rate=5e-4, max_train_steps=14, use_ema=True, ema_decay=0.8)
    assert get_held_out_loss(out) < 0.9 * first_loss


@in_first_script
def test_averaged_weights_are_better_than_raw_ones(script, tmp_path):
    """At a rate that is too high for the raw weights, their average predicts better."""
    flags = {"learning_rate": 3e-3, "max_train_steps": 16, "train_batch_size": 2}
    raw = get_held_out_loss(fine_tune(script, tmp_path / "raw", **flags))
    averaged = get_held_out_loss(fine_tune(script, tmp_path / "averaged", **flags, use_ema=True, ema_decay=0.9))
    assert math.isfinite(raw) and averaged < raw


def launch_here(command: list[str], **options) -> SimpleNamespace:
    """Do what `accelerate launch` would do with its arguments, in this process."""
    args = launch_command_parser().parse_args(command[3:])
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"] and args.mixed_precision == "no"
    run(load_script(Path(args.training_script).name), args.training_script_args)
    return SimpleNamespace(returncode=0)


def test_the_quickstart_shows_what_it_promises(tmp_path, monkeypatch):
    """A few updates of it: the base draws flat, sharp things by name, and the look turns towards 3D at once."""
    quickstart = load_script("quickstart/quickstart.py")
    shorter = ["--validation_inference_steps", 5, "--validation_steps", 7, "--max_train_samples", 112,
               "--train_batch_size", 8, "--lr_warmup_steps", 1]
    for name, value in {"DRAWS_PER_PROMPT": 1, "INFERENCE_STEPS": 12, "NOISE_DRAWS": 1,
                        "TRAIN_ARGS": [*quickstart.TRAIN_ARGS, *shorter]}.items():
        monkeypatch.setattr(quickstart, name, value)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--max_train_steps", "14", "--output_dir", str(tmp_path)])
    monkeypatch.setattr(quickstart.subprocess, "run", launch_here)
    quickstart.main()
    out = tmp_path / "run-1"
    summary = json.loads((out / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    for numbers in (before, after):
        assert numbers["right_thing_trained"] >= 0.9 and numbers["right_thing_others"] >= 0.6
    assert before["look_3d_trained"] <= 0.1 and before["look_3d_others"] <= 0.1
    assert after["look_3d_trained"] >= 0.25 and after["look_3d_others"] >= 0.25
    assert min(before["sharpness"], after["sharpness"]) >= 0.9 and after["loss"] < 0.9 * before["loss"]
    for name in ("before_after", "progress", "loss"):
        width, height = Image.open(out / f"{name}.png").size
        assert width > 300 and height > 300
