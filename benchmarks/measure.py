"""Run a training script, unmodified, and measure its updates. `run.py` starts this once per figure.

    python benchmarks/measure.py --json out.json --updates 30 --warmup 5 -- train_text_to_image.py --flag value ...

The script is run as its own command line would run it. A hook that torch calls after every step of any optimizer
notes the time, and ends the script when enough updates are measured: nothing is saved or exported. On a GPU the times
are those of the device, marked in its stream; it is waited for at the start and at the end of the window only, so
measuring does not slow what is measured.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import runpy
import sys
import time
import traceback
import warnings

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

PACKAGES = ["torch", "torchvision", "diffusers", "transformers", "accelerate", "datasets"]


class Finished(BaseException):
    """Raised in the script when all updates are measured; no `except Exception` stands in its way."""


class Window:
    """Measure the updates after the first `warmup`, as the optimizers' hook."""

    def __init__(self, warmup: int, updates: int, script: str, sync_check: bool) -> None:
        """Prepare; `sync_check` counts what waits for the device, which costs time, so times then mean nothing."""
        self.warmup, self.updates, self.script, self.sync_check = warmup, updates, script, sync_check
        self.cuda = torch.cuda.is_available()
        self.optimizer, self.count, self.marks, self.ends = None, 0, [], []
        self.syncs = collections.Counter()

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """Note the end of an update: a step of the first optimizer that steps, where a script has several."""
        self.optimizer = optimizer if self.optimizer is None else self.optimizer
        if optimizer is not self.optimizer:
            return
        self.count += 1
        if self.count == self.warmup:
            self.wait()
            self.mark()
            self.watch(self.sync_check)
        elif self.count > self.warmup:
            self.mark()
        if self.count == self.warmup + self.updates:
            self.watch(False)
            self.wait()
            raise Finished

    def wait(self) -> None:
        """Wait for the device and note the time."""
        if self.cuda:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def mark(self) -> None:
        """Note the end of an update, on a GPU without waiting for it."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def watch(self, on: bool) -> None:
        """Let torch warn of everything that makes the host wait for the device, or stop that."""
        if not self.cuda:
            return
        if on:
            warnings.simplefilter("always")
            warnings.showwarning = self.count_sync
        torch.cuda.set_sync_debug_mode("warn" if on else "default")

    def count_sync(self, message, category, filename, lineno, file=None, line=None) -> None:
        """Count a warning of torch under the line of the script, and the line called from there, that waited."""
        if "synchronizing" not in str(message):
            return
        stack = [frame for frame in traceback.extract_stack()[:-1] if not frame.filename.endswith("warnings.py")]
        in_script = [frame for frame in stack if frame.filename == self.script]
        name = f"{pathlib.Path(self.script).name}:{in_script[-1].lineno} {in_script[-1].line}" if in_script else "?"
        inner = stack[-1] if stack else None
        if inner and inner.filename != self.script:
            name += f"  ({'/'.join(pathlib.Path(inner.filename).parts[-3:])}:{inner.lineno})"
        self.syncs[name] += 1

    def list_seconds(self) -> list[float]:
        """Return the seconds of each measured update."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        return [a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in pairs]


def record_scalars(scalars: dict[str, dict[int, float]]) -> None:
    """Keep a copy of every TensorBoard scalar in `scalars`, as {tag: {step: value}}."""
    from torch.utils.tensorboard import SummaryWriter

    add_scalar = SummaryWriter.add_scalar

    def add_and_keep(self, tag, scalar_value, global_step=None, *args, **kwargs):
        scalars.setdefault(tag, {})[global_step] = scalar_value
        return add_scalar(self, tag, scalar_value, global_step, *args, **kwargs)

    SummaryWriter.add_scalar = add_and_keep


def compute_data_wait(scalars: dict[str, dict[int, float]], warmup: int) -> float | None:
    """Return the mean share of time waited for data; the first value covers the start and goes if others are left."""
    values = [float(value) for step, value in sorted(scalars.get("data_wait", {}).items()) if step > warmup]
    values = values[1:] or values
    return sum(values) / len(values) if values else None


def get_peak_host_bytes() -> int:
    """Return the most memory this process has held; the loader's worker processes are not in it."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def get_device() -> str:
    """Return the device in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    rows = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [row.split(":")[1].strip() for row in rows if row.startswith("model name")]
    return f"CPU, {torch.get_num_threads()} threads, {models[0] if models else platform.machine()}"


def get_versions() -> dict[str, str]:
    """Return the versions that decide a figure."""
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda if torch.cuda.is_available() else None}
    versions |= {package: importlib.metadata.version(package) for package in PACKAGES}
    return {name: version for name, version in versions.items() if version}


def make_report(window: Window, scalars: dict[str, dict[int, float]]) -> dict:
    """Return everything measured."""
    cuda = window.cuda
    return {
        "seconds": window.list_seconds(),
        "mean_seconds": (window.ends[1] - window.ends[0]) / window.updates,
        "data_wait": compute_data_wait(scalars, window.warmup),
        "peak_host_bytes": get_peak_host_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "peak_device_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
        "syncs": dict(window.syncs.most_common()) if window.sync_check and cuda else None,
        "device": get_device(),
        "versions": get_versions(),
    }


def main() -> None:
    """Measure the script that the command line names after `--`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, required=True, help="where the report goes")
    parser.add_argument("--updates", type=int, required=True, help="how many updates to measure")
    parser.add_argument("--warmup", type=int, required=True, help="how many updates to let pass first, at least 1")
    parser.add_argument("--sync_check", action="store_true", help="count what makes the host wait for a CUDA device")
    parser.add_argument("command", nargs="+", help="the script and its arguments, after --")
    args = parser.parse_args()
    script, *argv = args.command
    window, scalars = Window(args.warmup, args.updates, script, args.sync_check), {}
    record_scalars(scalars)
    register_optimizer_step_post_hook(window)
    sys.argv, sys.path[0] = [script, *argv], os.path.dirname(os.path.abspath(script))
    try:
        runpy.run_path(script, run_name="__main__")
    except Finished:
        args.json.write_text(json.dumps(make_report(window, scalars)), encoding="utf-8")
        return
    sys.exit(f"{script} ended after {window.count} updates; {args.warmup + args.updates} were to be measured.")


if __name__ == "__main__":
    main()
