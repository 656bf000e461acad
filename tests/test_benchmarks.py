"""The measuring itself, on a script whose updates take a known time, and the tables made from it."""

import json
import os
import pathlib
import re
import subprocess
import sys
from unittest import mock

import pytest
from runs import start_forkserver

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import compare_runs  # noqa: E402
import run  # noqa: E402

SCRIPT = """
import argparse, sys, time
import torch
from torch.utils.tensorboard import SummaryWriter

assert __name__ == "__main__"
parser = argparse.ArgumentParser()
for name in ("max_train_steps", "train_batch_size"):
    parser.add_argument("--" + name, type=int)
args, rest = parser.parse_known_args()
parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
optimizers = [torch.optim.AdamW(parameters, fused=True), torch.optim.SGD(parameters, lr=0.1)]
writer = SummaryWriter([word for word in rest if word.startswith("--output_dir=")][0].split("=")[1])
for step in range(1, args.max_train_steps + 1):
    time.sleep(0.3 if step <= 2 else 0.02 * args.train_batch_size)
    sum(parameter.sum() for parameter in parameters).backward()
    groups = optimizers[0].param_groups
    for parameter in parameters:  # as --optimizer_in_backward does
        optimizers[0].param_groups = [groups[0] | {"params": [parameter]}]
        optimizers[0].step()
    optimizers[0].param_groups = groups
    for optimizer in optimizers:
        optimizer.step()
    writer.add_scalar("data_wait", step / 100, global_step=step)
open("the_end", "w")
"""

JAX_SCRIPT = """
import sys, time
import jax
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

def update(weights, number):
    wait = lambda: time.sleep(0.1)
    jax.experimental.io_callback(wait, None)
    return weights + number, number.sum()

flags = dict(word.split("=") for word in sys.argv[1:])
compiled = jax.jit(update, donate_argnums=0).lower(jax.numpy.ones(3), jax.numpy.ones(3)).compile()
weights = jax.numpy.ones(3)
writer = EventFileWriter(flags["--output_dir"])
for step in range(1, int(flags["--max_train_steps"]) + 1):
    weights, metrics = compiled(weights, jax.numpy.ones(3))
    value = summary_pb2.Summary.Value(tag="data_wait", simple_value=step / 100)
    writer.add_event(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=[value])))
open("the_end", "w")
"""


@pytest.fixture(params=["torch", "jax"])
def script(tmp_path, request):
    """A script of a made-up name whose updates take 0.04 s in torch and 0.1 s in JAX."""
    if request.param == "jax":
        pytest.importorskip("jax")
    path = tmp_path / f"train_{request.param}.py"
    path.write_text({"torch": SCRIPT, "jax": JAX_SCRIPT}[request.param])
    return path


def measure(script, *flags):
    folder = script.parent
    command = [sys.executable, BENCHMARKS / "measure.py", "--json", folder / "report.json", "--updates", "5"]
    command += ["--warmup", "3", "--", script, "--train_batch_size=2", f"--output_dir={folder}", *flags]
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False)
    report = json.loads((folder / "report.json").read_text()) if done.returncode == 0 else None
    return done, report


def test_window_is_the_updates_after_the_warmup_and_the_script_stops_there(script):
    """With the updates go the wait for data and the memory."""
    done, report = measure(script, "--max_train_steps=100")
    assert done.returncode == 0, done.stderr
    assert len(report["seconds"]) == 5
    least = 0.04 if script.stem == "train_torch" else 0.08  # the thread that notes the time may wake late
    assert all(least <= seconds < 0.3 for seconds in report["seconds"])
    assert report["mean_seconds"] == pytest.approx(sum(report["seconds"]) / 5, rel=0.1)
    assert not (script.parent / "the_end").exists()
    # Updates 4 to 7 have logged when the eighth ends the run, and the first value of several is left out.
    assert report["data_wait"] == pytest.approx((0.05 + 0.06 + 0.07) / 3)
    assert report["peak_host_bytes"] > 50 * 2**20
    assert report["versions"][script.stem.removeprefix("train_")]


@pytest.mark.parametrize("script", ["jax"], indirect=True)  # which starts sooner
def test_a_script_that_ends_too_early_is_an_error(script):
    done, _ = measure(script, "--max_train_steps=4")
    assert done.returncode == 1
    assert "ended after 4 updates; 8 were to be measured" in done.stderr


def make_reports(*seconds):
    common = {"data_wait": 0.5, "peak_host_bytes": 2**30, "peak_device_bytes": None, "syncs": None}
    common |= {"peak_device_reserved_bytes": None, "device": "CPU", "versions": {"torch": "2"}}
    return [{"seconds": [second] * 3, "mean_seconds": second, **common} for second in seconds]


def test_ratio_is_taken_round_by_round():
    records = [
        run.make_record("ours", "no", 4, 4, make_reports(1.0, 2.0, 3.0)),
        run.make_record("other", "no", 4, 4, make_reports(1.5, 2.0, 6.0)),
    ]
    assert records[0]["images_per_second"] == 2.0
    assert "| no        | 4     | 1.500           | 1.000  | 2.000   | 3      |" in run.format_ratios(records)
    assert "| ours   | no        | 4     | 2.0000   | 2.00     | 1.00     | -          | 50.0%     |" in (
        run.format_figures(records)
    )


def test_scripts_of_two_names_are_compared_under_their_names():
    folder = BENCHMARKS.parent
    scripts = [str(folder / name) for name in ("train_text_to_image.py", "train_text_to_image_flax.py")]
    sides = run.list_scripts(run.parse_args(["--script", scripts[0], "--against", scripts[1]]))
    assert {side: str(path) for side, path in sides.items()} == {pathlib.Path(path).stem: path for path in scripts}
    assert list(run.list_scripts(run.parse_args(["--script", scripts[0], "--against", str(folder)]))) == [
        "ours", "other"]
    records = [run.make_record(side, "no", 4, 4, make_reports(1.0)) for side in sides]
    assert "train_text_to_image over train_text_to_image_flax" in run.format_ratios(records)


def test_a_failed_run_leaves_its_error_in_the_report():
    record = run.make_record("ours", "fp16", 4, 4, [{"error": "out of memory"}])
    args = run.parse_args(["--script", str(BENCHMARKS / "run.py")])
    report = run.format_report(args, "command", [record], load=0.5)
    assert "| ours   | fp16      | 4     | failed " in report
    assert "- ours fp16 batch 4: out of memory" in report


def test_images_per_update_counts_accumulation():
    assert run.get_accumulation(["--use_ema", "--gradient_accumulation_steps", "4"]) == 4
    assert run.get_accumulation(["--use_ema"]) == 1


def test_command_in_the_report_names_no_folder_of_this_machine():
    argv = ["--batch", "1", "4", "--against", "/a/b/reference", "--out", "/a/c", "--", "--use_ema"]
    command = run.format_command(argv, pathlib.Path("/a/b/reference"))
    assert command == "python benchmarks/run.py --batch 1 4 --against reference -- --use_ema"


def test_runs_are_compared_bit_for_bit(tmp_path, capsys):
    """The same script gives the same; a loss that is a little larger, or a flag that is unknown there, is found."""
    for path in BENCHMARKS.parent.glob("train_text_to_image*.py"):
        changes = {"train_text_to_image.py": "plain_loss = compute_loss\n\n\n"
                   "def compute_loss(*args):\n    return 1.0001 * plain_loss(*args)\n\n\n",
                   "train_text_to_image_sdxl.py": "sys.argv.append('--no_such_flag')\n"}
        (tmp_path / path.name).write_text(
            path.read_text().replace("if __name__ ==", f"{changes.get(path.name, '')}if __name__ =="))
    start_forkserver()  # in the environment of the tests
    with mock.patch.dict(os.environ):
        assert compare_runs.main(["--against", str(tmp_path), "--runs", "lora/dora", "sd/accumulation",
                                  "sdxl/plain"]) == 1
    printed = capsys.readouterr().out
    found = dict(re.findall(r"^(\S+/\S+) +(same|DIFFERENT)$", printed, re.MULTILINE))
    assert found == {"lora/dora": "same", "sd/accumulation": "DIFFERENT", "sdxl/plain": "DIFFERENT"}
    assert re.search(r"out/train_loss: 4 of 4 values differ, first 1: [\d.]+ there, [\d.]+ here", printed)
    assert re.search(r"out/checkpoint-2/unet/\S+: .* max abs difference \d", printed)
    assert re.search("there fails: .*unrecognized arguments: --no_such_flag", printed)
