"""Run a training script, unmodified, and measure its updates. `run.py` starts this once per figure.

    python benchmarks/measure.py --json out.json --updates 30 --warmup 5 -- train_text_to_image.py --flag value ...

The script is run as its own command line would run it. A hook notes the end of each update: torch's, which is called
after every step of any optimizer, or one around what JAX has compiled ahead of time, which is the update of a JAX
script. It ends the script when enough updates are measured: nothing is saved or exported. On a GPU the times are those
of the device; it is waited for at the start and at the end of the window only, so measuring does not slow what is
measured.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import pathlib
import platform
import queue
import re
import resource
import runpy
import sys
import threading
import time
import traceback
import warnings


class Finished(BaseException):
    """Raised in the script when all updates are measured; no `except Exception` stands in its way."""


class Window:
    """Measure the updates after the first `warmup`, with the clock of the framework that the script uses."""

    def __init__(self, clock: TorchClock | JaxClock, warmup: int, updates: int) -> None:
        self.clock, self.warmup, self.updates, self.count, self.ends = clock, warmup, updates, 0, []

    def end_update(self, result: object = None) -> None:
        """Note that the script has begun all work of an update, of which `result` will be the last to be ready."""
        self.count += 1
        if self.count == self.warmup:
            self.clock.wait(result)
            self.ends.append(time.perf_counter())
            self.clock.mark(result)
            self.clock.watch(True)
        elif self.count > self.warmup:
            self.clock.mark(result)
        if self.count == self.warmup + self.updates:
            self.clock.watch(False)
            self.clock.wait(result)
            self.ends.append(time.perf_counter())
            raise Finished


class TorchClock:
    """Times, memory and waits of a script that uses torch: on a GPU by marks in its stream."""

    packages = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "datasets")

    def __init__(self, script: str, sync_check: bool) -> None:
        """Prepare; `sync_check` counts what waits for the device, which costs time, so times then mean nothing."""
        import torch

        self.torch, self.cuda = torch, torch.cuda.is_available()
        torch.cuda.reset_peak_memory_stats = lambda *_: None  # by which a script counts updates only, not loading
        self.script, self.sync_check = script, sync_check
        self.optimizer, self.marks, self.syncs = None, [], collections.Counter()

    def start(self, window: Window) -> None:
        """Tell the window of every update: a step of the first optimizer that steps, where a script has several.

        Steps of one parameter are parts of an update, which --optimizer_in_backward makes.
        """
        from torch.optim.optimizer import register_optimizer_step_post_hook

        def end_step(optimizer, args: tuple, kwargs: dict) -> None:
            if [len(group["params"]) for group in optimizer.param_groups] == [1]:
                return
            self.optimizer = optimizer if self.optimizer is None else self.optimizer
            if optimizer is self.optimizer:
                window.end_update()

        register_optimizer_step_post_hook(end_step)

    def wait(self, result: None) -> None:
        """Wait for the device."""
        if self.cuda:
            self.torch.cuda.synchronize()

    def mark(self, result: None) -> None:
        """Note the end of an update, on a GPU without waiting for it."""
        if self.cuda:
            event = self.torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def watch(self, on: bool) -> None:
        """With `sync_check`, let torch warn of everything that makes the host wait for the device, or stop that."""
        if not (self.cuda and self.sync_check):
            return
        if on:
            warnings.simplefilter("always")
            warnings.showwarning = self.count_sync
        self.torch.cuda.set_sync_debug_mode("warn" if on else "default")

    def count_sync(self, message, category, filename, lineno, file=None, line=None) -> None:
        """Count a warning of torch under the line of the script, and the line called from there, that waited."""
        if "called a synchronizing" not in str(message):  # others say what the mode is, or warn of other things
            return
        stack = [frame for frame in traceback.extract_stack()[:-1] if not frame.filename.endswith("warnings.py")]
        self.syncs[describe_line(stack, self.script)] += 1

    def list_seconds(self) -> list[float]:
        """Return the seconds of each measured update."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        return [a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in pairs]

    def report_device(self) -> dict:
        """Return the device in words, its memory, and what waited for it."""
        cuda = self.torch.cuda
        return {
            "peak_device_bytes": cuda.max_memory_allocated() if self.cuda else None,
            "peak_device_reserved_bytes": cuda.max_memory_reserved() if self.cuda else None,
            "syncs": dict(self.syncs.most_common()) if self.sync_check and self.cuda else None,
            "device": cuda.get_device_name() if self.cuda else describe_cpu(self.torch.get_num_threads()),
            "versions": get_versions(self.packages) | ({"cuda": self.torch.version.cuda} if self.cuda else {}),
        }


def describe_line(stack: traceback.StackSummary, script: str) -> str:
    """Return the line of the script that a stack is in, and the innermost one that was called from there."""
    in_script = [frame for frame in stack if frame.filename == script]
    name = f"{pathlib.Path(script).name}:{in_script[-1].lineno} {in_script[-1].line}" if in_script else "?"
    if stack and stack[-1].filename != script:
        name += f"  ({'/'.join(pathlib.Path(stack[-1].filename).parts[-3:])}:{stack[-1].lineno})"
    return name


class JaxClock:
    """Times and memory of a JAX script: a thread waits for each update's result, while the script goes on."""

    packages = ("jax", "jaxlib", "flax", "optax", "transformers", "datasets")

    def __init__(self) -> None:
        import jax

        self.jax, self.marks, self.results = jax, [], queue.Queue()
        threading.Thread(target=self.note_ends, daemon=True).start()

    def start(self, window: Window) -> None:
        """Tell the window of every update: a call of what the script has compiled ahead of time, by `.compile()`."""
        call = self.jax.stages.Compiled.__call__

        def call_and_note(compiled, *args, **kwargs):
            results = call(compiled, *args, **kwargs)
            window.end_update(self.jax.tree.leaves(results)[-1])  # a number: weights are given to the next update
            return results

        self.jax.stages.Compiled.__call__ = call_and_note

    def note_ends(self) -> None:
        """Note when each result is ready."""
        while True:
            self.jax.block_until_ready(self.results.get())
            self.marks.append(time.perf_counter())
            self.results.task_done()

    def wait(self, result: object) -> None:
        """Wait for a result, and until all before it are noted."""
        self.jax.block_until_ready(result)
        self.results.join()

    def mark(self, result: object) -> None:
        """Have the end of an update noted, without waiting for it."""
        self.results.put(result)

    def watch(self, on: bool) -> None:
        """Do nothing: JAX tells of no waits."""

    def list_seconds(self) -> list[float]:
        """Return the seconds of each measured update."""
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]

    def report_device(self) -> dict:
        """Return the device in words and its memory."""
        device = self.jax.local_devices()[0]
        memory = device.memory_stats() or {}
        return {
            "peak_device_bytes": memory.get("peak_bytes_in_use"),
            "peak_device_reserved_bytes": memory.get("peak_pool_bytes"),
            "syncs": None,
            "device": describe_cpu(os.cpu_count()) if device.platform == "cpu" else device.device_kind,
            "versions": get_versions(self.packages),
        }


def record_scalars(scalars: dict[str, dict[int, float]]) -> None:
    """Keep a copy of every TensorBoard scalar in `scalars`, as {tag: {step: value}}."""
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    add_event = EventFileWriter.add_event

    def add_and_keep(self, event):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
        return add_event(self, event)

    EventFileWriter.add_event = add_and_keep


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


def describe_cpu(threads: int) -> str:
    """Return the processor in words."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    rows = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [row.split(":")[1].strip() for row in rows if row.startswith("model name")]
    return f"CPU, {threads} threads, {models[0] if models else platform.machine()}"


def get_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions that decide a figure."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def make_report(window: Window, scalars: dict[str, dict[int, float]]) -> dict:
    """Return everything measured."""
    return {
        "seconds": window.clock.list_seconds(),
        "mean_seconds": (window.ends[1] - window.ends[0]) / window.updates,
        "data_wait": compute_data_wait(scalars, window.warmup),
        "peak_host_bytes": get_peak_host_bytes(),
        **window.clock.report_device(),
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
    uses_jax = re.search(r"^import jax$", pathlib.Path(script).read_text(encoding="utf-8"), re.MULTILINE)
    clock = JaxClock() if uses_jax else TorchClock(script, args.sync_check)
    window, scalars = Window(clock, args.warmup, args.updates), {}
    record_scalars(scalars)
    clock.start(window)
    sys.argv, sys.path[0] = [script, *argv], os.path.dirname(os.path.abspath(script))
    try:
        runpy.run_path(script, run_name="__main__")
    except Finished:
        args.json.write_text(json.dumps(make_report(window, scalars)), encoding="utf-8")
        return
    sys.exit(f"{script} ended after {window.count} updates; {args.warmup + args.updates} were to be measured.")


if __name__ == "__main__":
    main()
