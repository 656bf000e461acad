"""Kill runs at random moments and resume them, until they end like a run that was never killed, bit for bit.

    make torture MINUTES=60                                                        each script for an hour
    make torture ARGS="--scripts train_text_to_image.py --num_processes 2"         one of them, on two processes
    make torture ARGS="--long 20000"          a run of 20,000 updates of each script, in which nothing may grow

A run is killed when it enters a moment drawn at random (encoding, an update, a save) or a little later, by kill -9
or by a signal that asks it to save and stop, and then repeated with --resume_from_checkpoint latest. After each kill
the newest checkpoint must hold all but the last --checkpointing_steps updates. At the end the last checkpoint, the
exported model and the logged losses must be those of the run without kills; nothing else may be left, no process
either. Only pictures may be missing: a run that was killed between a checkpoint and the validation after it does not
draw them again.
"""

import argparse
import collections
import contextlib
import functools
import json
import os
import random
import re
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from conftest import (
    SCRIPTS,
    load_script,
    make_args,
    make_image_folder,
    make_tiny_sdxl,
    make_tiny_stable_diffusion,
    read_scalars,
)
from runs import PATIENCE, Run, assert_same_checkpoint, read_file, set_up_child, start_pair

from diffusers import UNet2DConditionModel

NUM_UPDATES, CHECKPOINTING_STEPS = 8, 3
FLAGS = {
    "max_train_steps": NUM_UPDATES, "checkpointing_steps": CHECKPOINTING_STEPS, "checkpoints_total_limit": 2,
    "validation_steps": 3, "validation_prompt": "a cat", "num_validation_images": 1,
    "validation_inference_steps": 1, "cache_latents": True, "cache_text_embeddings": True, "use_ema": True,
    "random_flip": True, "report_to": "tensorboard", "logging_steps": 2, "resume_from_checkpoint": "latest"}
# A moment is a function that a run is in; "start" is what comes before the first of them.
MOMENTS = ("start", "cache_encodings", "make_optimizer", "end_update", "save_checkpoint", "replace_folder", "remove",
           "validate", "export_model", "save_model_card")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LONG_FLAGS = FLAGS | {
    "checkpointing_steps": 1000, "validation_steps": 1000, "logging_steps": 10,
    "train_batch_size": 1, "resolution": 8, "learning_rate": 1e-5}
# Of their UNet, with one block: what may leak is around it.
SMALLEST_UNET = {"block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",), "norm_num_groups": 4,
                 "up_block_types": ("CrossAttnUpBlock2D",), "attention_head_dim": 4, "transformer_layers_per_block": 1}
MEASURED_STEPS = 100  # updates between two measurements of a long run
# Last quarter over the second one; XLA starts threads of its pool when it first needs them, one of 30 after long.
LARGEST_GROWTH = {"memory": 1.05, "files": 1, "threads": 1.05, "cpu_time": 1.1}


def run_and_tell(name: str, argv: list[str], log: str, limit: int | None, environment: dict[str, str]) -> None:
    """Run a script, writing each moment that it enters (+) and leaves (-) to `log`.RANK.moments."""
    set_up_child(log, limit, environment)
    script = load_script(name)
    told = os.open(f"{log}.{environment.get('RANK', 0)}.moments", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def tell(function, moment: str):
        @functools.wraps(function)
        def telling(*args, **kwargs):
            step = args[1] if moment == "end_update" else 0
            os.write(told, f"+{moment} {step}\n".encode())
            try:
                return function(*args, **kwargs)
            finally:
                os.write(told, f"-{moment} {step}\n".encode())

        return telling

    script.Meter.end_update = tell(script.Meter.end_update, "end_update")
    for moment in MOMENTS:
        if hasattr(script, moment):
            setattr(script, moment, tell(getattr(script, moment), moment))
    script.main(argv)


def run_and_measure(name: str, argv: list[str], log: str, limit: int | None, environment: dict[str, str]) -> None:
    """Run a script, writing to `log`.jsonl what its process holds in the course of training.

    `cpu_time` is that of an update, relative to a loop's beside it: other programs on the machine slow down both.
    """
    set_up_child(log, limit, environment)
    script, process = load_script(name), psutil.Process()
    end_update, last = script.Meter.end_update, [time.process_time()]

    def measure(meter, step: int, *numbers) -> None:
        end_update(meter, step, *numbers)
        if step % MEASURED_STEPS == 0:
            began = time.process_time()
            sum(range(10**6))
            ended = time.process_time()
            facts = {"memory": process.memory_info().rss, "files": process.num_fds(), "threads": process.num_threads(),
                     "cpu_time": (began - last[0]) / MEASURED_STEPS / (ended - began)}
            with open(f"{log}.jsonl", "a") as file:
                file.write(json.dumps(facts) + "\n")
            last[0] = time.process_time()

    script.Meter.end_update = measure
    script.main(argv)


def read_moments(run: Run) -> list[tuple[str, str, str]]:
    """Return (+ or -, moment, update) of all that a run has told."""
    path = Path(f"{run.log}.{run.rank}.moments")
    text = path.read_text() if path.is_file() else ""
    return [(line[0], *line[1:].split(" ")) for line in text.split("\n")[:-1]]


def find_moment(run: Run) -> str:
    """Return the innermost moment that a run is in."""
    stack = ["start"]
    for sign, moment, _ in read_moments(run):
        stack.append(moment) if sign == "+" else stack.pop()
    return stack[-1] if len(stack) > 1 or not read_moments(run) else "between"


def wait_until_gone(run: Run) -> None:
    """Fail if processes that a run has started outlive it: loaders look for it every 5 seconds."""
    end = time.monotonic() + 15
    while left := [process for process in psutil.process_iter() if is_of(process, run.process.pid)]:
        assert time.monotonic() < end, f"{left} outlive their run: {run.log.read_text()}"
        time.sleep(0.05)


def is_of(process: psutil.Process, group: int) -> bool:
    with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    return False


class Victim:
    """A script, and a run of it that was never killed."""

    def __init__(self, name: str, folder: Path, num_processes: int = 1) -> None:
        self.script, self.folder, self.num_processes = load_script(name), folder, num_processes
        make_model = make_tiny_sdxl if "sdxl" in name else make_tiny_stable_diffusion
        self.model, self.data = make_model(folder / "model"), make_image_folder(folder / "data")
        self.whole, self.count = folder / "whole", 0
        self.finish(self.whole)

    def start(self, out: Path, num_workers: int = 0) -> list[Run]:
        """Start the run that goes to a folder, or go on with it."""
        self.count += 1
        argv = make_args(self.model, self.data, out, encoded_dir=f"{out}-encoded", dataloader_num_workers=num_workers,
                         **FLAGS)
        log = self.folder / f"log-{self.count}"
        if self.num_processes == 1:
            return [Run(self.script, argv, log, target=run_and_tell)]
        return start_pair(self.script, argv, log, target=run_and_tell)

    def finish(self, out: Path) -> None:
        with contextlib.ExitStack() as stack:
            runs = [stack.enter_context(run) for run in self.start(out)]
            assert [run.end() for run in runs] == [0] * len(runs), runs[0].log.read_text()

    def find_newest_step(self, out: Path) -> int:
        return max(map(self.script.get_checkpoint_step, self.script.list_checkpoints(str(out))), default=0)

    def kill(self, out: Path, moment: str, number: int, delay: float, victim: int,
             num_workers: int) -> tuple[str, int]:
        """Go on with a run and kill it; return the moment at which it happened and how many updates it cost.

        The moment is "end" if the run ended before.
        """
        with contextlib.ExitStack() as stack:
            runs = [stack.enter_context(run) for run in self.start(out, num_workers)]
            run, end = runs[victim % len(runs)], time.monotonic() + PATIENCE
            while run.process.is_alive() and moment not in ("start", *(name for _, name, _ in read_moments(run))):
                assert time.monotonic() < end, f"stuck before {moment}: {run.log.read_text()}"
                time.sleep(0.005)
            time.sleep(delay)
            with contextlib.suppress(ProcessLookupError):
                run.kill(number)
            where = find_moment(run)
            run.end()
            for other in runs:  # a launcher stops the others
                with contextlib.suppress(ProcessLookupError):
                    other.process.join(1)
                    other.kill(signal.SIGTERM)
                    other.process.join(10)
                    other.kill(signal.SIGKILL)
            statuses = [run.end() for run in runs]
            for run in runs:
                wait_until_gone(run)
        log = f"{statuses} after {number} in {where}: {runs[0].log.read_text()}"
        if statuses[0] == 0:
            return "end", 0
        if len(runs) == 1:  # Ctrl-C at the start is an exception, which ends a process with status 1
            assert statuses[0] in {-number, 128 + number, 1 if number == signal.SIGINT else -number}, log
        done = max([int(step) for sign, name, step in read_moments(runs[0]) if (sign, name) == ("-", "end_update")],
                   default=0)
        newest = self.find_newest_step(out)
        if statuses[0] == 128 + number:  # saved and stopped
            assert re.search(rf"after update {newest}, which is saved", log), log
        return where, max(0, done - newest)

    def compare(self, out: Path) -> None:
        """Fail unless a run that was killed and finished left what the other one left, and nothing else."""
        last = f"checkpoint-{NUM_UPDATES}"
        names, expected = ({str(path.relative_to(folder)) for path in folder.rglob("*")
                            if not path.relative_to(folder).parts[0].startswith(("logs", "checkpoint-"))}
                           for folder in (out, self.whole))
        undrawn = {name for name in expected - names if name.startswith("validation/step-")}
        assert names == expected - undrawn, names ^ expected
        # one more if the last save was complete when the run was killed: a run that has nothing to train removes none
        assert len(self.script.list_checkpoints(str(out))) <= FLAGS["checkpoints_total_limit"] + 1
        if "flax" not in self.script.__name__:  # whose files have other names each time
            assert_same_checkpoint(out / last, self.whole / last)
        logged, expected = (read_scalars(folder, "train_loss") for folder in (out, self.whole))
        assert logged == expected, (logged, expected)
        for name in names:
            if (out / name).is_file() and name != "README.md":
                assert read_file(out / name) == read_file(self.whole / name), name


def torture(victim: Victim, rng: random.Random, until) -> collections.Counter:
    """Kill and finish runs until `until(kills)` is true; return the number of kills by moment and signal."""
    kills, most_lost, rounds, began = collections.Counter(), 0, 0, time.monotonic()
    while not until(kills.total()):
        out = victim.folder / f"out-{rounds}"
        for _ in range(rng.randint(1, 6)):
            if until(kills.total()):
                break
            moment, number, delay = rng.choice(MOMENTS), rng.choice(SIGNALS), rng.choice((0, rng.random() * 0.3))
            if moment == "start":
                delay = rng.random()
            where, lost = victim.kill(out, moment, number, delay, rng.randrange(2), rng.randrange(2))
            if where == "end":
                break
            assert lost <= CHECKPOINTING_STEPS, f"{number} in {where} lost {lost} updates"
            kills[where, signal.Signals(number).name] += 1
            most_lost = max(most_lost, lost)
        victim.finish(out)
        victim.compare(out)
        rounds += 1
    print(f"{victim.script.__name__}, {victim.num_processes} processes: {kills.total()} kills in {rounds} runs, "
          f"at most {most_lost} updates lost, {time.monotonic() - began:.0f} s")
    for where in sorted({where for where, _ in kills}):
        print(f"  {where:16}", ", ".join(f"{name} {count}" for (place, name), count in sorted(kills.items())
                                         if place == where))
    return kills


def run_long(name: str, folder: Path, num_updates: int) -> None:
    """Train for many updates and fail if memory, open files, threads or the time of an update grow."""
    make_model = make_tiny_sdxl if "sdxl" in name else make_tiny_stable_diffusion
    model = make_model(folder / "model")
    unet_config = UNet2DConditionModel.load_config(model / "unet")
    UNet2DConditionModel.from_config({**unet_config, **SMALLEST_UNET}).save_pretrained(model / "unet")
    argv = make_args(model, make_image_folder(folder / "data"), folder / "out",
                     **LONG_FLAGS | {"max_train_steps": num_updates, "encoded_dir": folder / "encoded"})
    with Run(load_script(name), argv, folder / "log", target=run_and_measure) as run:
        run.process.join()
        assert run.process.exitcode == 0, run.log.read_text()[-10_000:]
    rows = [json.loads(line) for line in Path(f"{run.log}.jsonl").read_text().splitlines()]
    facts = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    logs = sum(path.stat().st_size for path in (folder / "out" / "logs").rglob("*") if path.is_file())
    print(f"{Path(name).stem}: {num_updates} updates, {logs / num_updates:.0f} bytes of TensorBoard and "
          f"{run.log.stat().st_size / num_updates:.0f} of text per update")
    for key, values in facts.items():
        quarters = [np.median(quarter) for quarter in np.array_split(values, 4)]
        print(f"  {key:12}", *(f"{value:14,.6g}" for value in quarters), flush=True)
        assert quarters[3] <= LARGEST_GROWTH[key] * quarters[1], f"{key} grows: {quarters}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=SCRIPTS)
    parser.add_argument("--minutes", type=float, default=60, help="For each script.")
    parser.add_argument("--num_processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--long", type=int, metavar="UPDATES", help="Do not kill: train that long.")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="Of the moments.")
    args = parser.parse_args()
    print(f"--seed {args.seed}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache",
                       "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
                       "XLA_FLAGS": "--xla_backend_optimization_level=1"}
        for name in args.scripts:
            if args.long:
                run_long(name, Path(folder, name), args.long)
                continue
            victim, end = Victim(name, Path(folder, name), args.num_processes), time.monotonic() + 60 * args.minutes
            torture(victim, random.Random(args.seed), lambda kills, end=end: time.monotonic() > end)


if __name__ == "__main__":
    main()
