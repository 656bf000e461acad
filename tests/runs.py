"""Runs of the scripts, in this process or in others of their own, and what they leave, read back to be compared."""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from datetime import timedelta
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT, load_script
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers import DiffusionPipeline

# Other processes are forked from one that has imported everything and computed nothing: ready at once, and as separate
# as any, so that they can be stopped, killed and limited for real.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["runs", "datasets", "huggingface_hub"])
PATIENCE = 300  # seconds that another process may take for anything, beside others that use all cores
LORA_FILE = "pytorch_lora_weights.safetensors"


def run(script, argv: list) -> None:
    """Run a script in this process, as a new one would."""
    try:
        script.main([str(word) for word in argv])
    finally:
        forget_accelerate()


def forget_accelerate() -> None:
    """Leave accelerate as it is in a new process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def prepare(script, argv: list):
    """Return flags, models and samples of a run, with the caches made, by the script's own functions."""
    forget_accelerate()  # of what was prepared before
    args = script.parse_args(argv)
    accelerator, configs = script.make_accelerator(args), script.load_model_configs(args)
    images = script.make_captioned_images(args, args.train_data_dir)
    samples = script.make_data(args, images, None, 0, configs).train
    models = script.load_models(args, accelerator, configs)
    script.cache_encodings(args, accelerator, models, samples)
    return args, models, samples


@contextlib.contextmanager
def recorded(script, before=None):
    """Yield a list that gets, of each micro step of a run, the step and digests of its samples and of their noises.

    `before` is called with the step and all that has been recorded so far.
    """
    seen, original = [], script.train_step

    def train_step(accelerator, models, objective, batch, step):
        if before is not None:
            before(step, seen)
        count = int((batch["weights"] > 0).sum())  # the others only keep a process busy
        rows = [{key: tensor[row] for key, tensor in sorted(batch.items())} for row in range(count)]
        seen.append({"step": step, "samples": [make_digest(row) for row in rows],
                     "noises": [make_digest(row["noise"]) for row in rows]})
        return original(accelerator, models, objective, batch, step)

    script.train_step = train_step
    try:
        yield seen
    finally:
        script.train_step = original


def start_forkserver() -> None:
    """Start the process that the others are forked from, unless it runs."""
    os.environ["PYTHONPATH"] = str(ROOT / "tests")
    forkserver.ensure_running()
    del os.environ["PYTHONPATH"]


class Run:
    """A run in a process of its own, or one of several that train together; killed at the end of the `with`."""

    def __init__(self, script, argv: list, log: Path, limit: int | None = None, target=None,
                 **environment: object) -> None:
        environment = {key: str(value) for key, value in environment.items()}
        arguments = (Path(script.__file__).name, [str(word) for word in argv], str(log), limit, environment)
        start_forkserver()
        self.log, self.rank = Path(log), int(environment.get("RANK", 0))
        self.log.touch()  # a process killed at its start has not made it yet
        self.process = FORKS.Process(target=target or run_in_child, args=arguments)
        self.process.start()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error) -> None:
        if self.process.is_alive():
            self.kill(signal.SIGKILL)
        self.process.join()

    def wait_until(self, holds) -> None:
        """Wait until `holds()` is true; fail when the run ends before."""
        end = time.monotonic() + PATIENCE
        while not holds():
            assert self.process.is_alive() and time.monotonic() < end, self.log.read_text()
            time.sleep(0.001)

    def kill(self, number: int) -> None:
        """Send a signal to the process alone."""
        os.kill(self.process.pid, number)

    def end(self) -> int:
        """Wait for the end and return the exit status, as a shell would name it."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, self.log.read_text()
        return self.process.exitcode


def run_in_child(name: str, argv: list[str], log: str, limit: int | None, environment: dict[str, str]) -> None:
    """Run a script alone; what it trained on stands in `log` with the process's rank and .json at the end."""
    set_up_child(log, limit, environment)
    script = load_script(name)
    with recorded(script) as seen:
        try:
            script.main(argv)
        finally:
            Path(f"{log}.{environment.get('RANK', 0)}.json").write_text(json.dumps(seen))


def fail_at(moment: str, count: int, number: int, name: str, argv: list[str], *others) -> None:
    """Run a script where the process of rank 1 gets a signal as it enters a function for the `count`th time.

    The other waits 6 seconds for it while it trains, else 10; of JAX 4. `others` are for `set_up_child`.
    """
    set_up_child(*others)
    script = load_script(name)
    if hasattr(script, "jax"):
        script.jax.distributed.initialize = partial(script.jax.distributed.initialize, heartbeat_timeout_seconds=4)
    else:
        script.LONGEST_WAIT, script.LONGEST_PAUSE = timedelta(seconds=10), timedelta(seconds=6)
    original, calls = getattr(script, moment), itertools.count(1)

    def failing(*args, **kwargs):
        if os.environ["RANK"] == "1" and next(calls) == count:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(script, moment, failing)
    script.main(argv)


def run_elsewhere(name: str, argv: list[str], log: str, limit: int | None, environment: dict[str, str]) -> None:
    """Run a script in a working directory of its own, so that relative folders are as on a machine of its own."""
    set_up_child(log, limit, environment)
    os.chdir(tempfile.mkdtemp(dir=Path(log).parent))
    load_script(name).main(argv)


def run_and_measure_shares(runs: list[list[str]], name: str, argv: list[str], log: str, *others) -> None:
    """Run the JAX script once for each command line in `runs`.

    What share one device holds of each thing that a compiled update is given stands in `log`.json, with the share of
    the state that the update may overwrite. `argv` is not used; `others` are for `set_up_child`.
    """
    set_up_child(log, *others)
    script, facts = load_script(name), []
    leaves, original = script.jax.tree.leaves, script.compile_train_step

    def count_own(arrays) -> int:
        return sum(array.addressable_shards[0].data.nbytes for array in leaves(arrays))

    def compile_train_step(models, batch):
        compiled = original(models, batch)
        state = models.state
        given = {"weights": state.weights, "moments": state.moments, "averages": state.averages,
                 "batch": {key: batch[key] for key in ("images", "noise")}}
        shares = {key: count_own(arrays) / sum(array.nbytes for array in leaves(arrays))
                  for key, arrays in given.items()}
        facts.append(shares | {"donated": compiled.memory_analysis().alias_size_in_bytes / count_own(state)})
        return compiled

    script.compile_train_step = compile_train_step
    for words in runs:
        script.main(words)
    Path(f"{log}.json").write_text(json.dumps(facts))


def set_up_child(log: str, limit: int | None, environment: dict[str, str]) -> None:
    """Make this process one of its own: output to `log`, no file larger than `limit` bytes, a process group."""
    os.setsid()
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # loader processes as in any other run, not as this one
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def start_pair(script, argv: list, log: Path, target=None, **environment: object) -> list[Run]:
    """Start two processes that train together, on the CPU unless the environment says else, as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
              "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, **environment}
    return [Run(script, argv, log, target=target, RANK=rank, LOCAL_RANK=rank, **shared) for rank in range(2)]


def run_pair(script, argv: list, log: Path) -> list[list[dict]]:
    """Run two processes that train together until both have ended well; return what each has trained on."""
    first, second = start_pair(script, argv, log)
    with first, second:
        assert (first.end(), second.end()) == (0, 0), log.read_text()
    return [json.loads(Path(f"{log}.{rank}.json").read_text()) for rank in range(2)]


def get_command(script, argv: list) -> list[str]:
    """Return the command line that a user types, without a launcher."""
    return [sys.executable, script.__file__, *(str(word) for word in argv)]


def keep_configs_only(model: Path, folder: Path, **changes) -> Path:
    """Copy a model without its weights, with `changes` of its configurations as {"unet": {"in_channels": 9}}."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for part, new in changes.items():
        path = next((folder / part).glob("*config.json"))
        path.write_text(json.dumps({**json.loads(path.read_text()), **new}))
    return folder


def list_names(folder: Path, pattern: str = "checkpoint-*") -> set[str]:
    """Return the names in a folder."""
    return {path.name for path in Path(folder).glob(pattern)}


def read_record(checkpoint: Path) -> dict:
    """Return a checkpoint's record of its run."""
    return json.loads(Path(checkpoint, "run_record.json").read_text())


def read_folder(folder: Path) -> dict[str, object]:
    """Return what a file, or each one in a folder but the record, holds: by its path, to be compared bit for bit."""
    paths = [path for path in [Path(folder), *sorted(Path(folder).rglob("*"))]
             if path.is_file() and path.name != "run_record.json"]
    return {str(path.relative_to(folder)): read_file(path) for path in paths}


def read_file(path: Path) -> object:
    """Return what a file holds: its bytes, or what torch and safetensors read, whose bytes tell of more than that."""
    if path.suffix in (".bin", ".pkl"):
        return make_comparable(torch.load(path, map_location="cpu", weights_only=False))
    if path.suffix == ".safetensors":  # the order of the metadata is not the same each time
        with safe_open(path, framework="pt") as file:
            return make_comparable({"metadata": file.metadata(), **load_file(path)})
    return path.read_bytes()


def read_trained(folder: Path, *, averaged: bool = False) -> dict[str, torch.Tensor]:
    """Return the UNet, or the adapter, that a run left in a checkpoint or its output folder, or the average of it."""
    adapter = Path(folder, "lora_ema" if averaged else "", LORA_FILE)
    if adapter.is_file():
        return load_file(adapter)
    return load_file(Path(folder, "unet_ema" if averaged else "unet", "diffusion_pytorch_model.safetensors"))


DAMAGES = ("cut", "empty", "gone", "foreign")


def assert_damage_is_found(script, checkpoint: Path, other: Path, damage: str) -> None:
    """Damage each file of the newest checkpoint in turn: `latest` is refused then, with `other` as the whole one."""
    out, files = checkpoint.parent, [path for path in checkpoint.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        content, twin = path.read_bytes(), other / path.relative_to(checkpoint)
        if damage == "gone" and path.name == script.RUN_RECORD:
            continue  # as in a checkpoint of the reference
        if damage == "gone":
            path.unlink()
        else:
            foreign = twin.read_bytes() if twin.is_file() else b"foreign"
            path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "foreign": foreign}[damage])
        if damage == "gone" or path.read_bytes() != content:
            with pytest.raises(ValueError, match=f"latest is not a complete .* {out} holds {other.name}\\."):
                script.find_checkpoint("latest", str(out))
        path.write_bytes(content)
    assert script.find_checkpoint("latest", str(out)) == checkpoint


def load_pipeline(output_dir: Path, base: Path, **schedule) -> DiffusionPipeline:
    """Return what a run left to draw with: a pipeline, or an adapter, which is put on its base.

    `schedule` is what an adapter's user has to know of its noise schedule, which a pipeline brings along.
    """
    if not Path(output_dir, LORA_FILE).is_file():
        return DiffusionPipeline.from_pretrained(output_dir, safety_checker=None)
    pipeline = DiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **schedule)
    pipeline.load_lora_weights(output_dir, weight_name=LORA_FILE)  # by name: offline, diffusers asks for it
    return pipeline


def list_exported(output_dir: Path) -> set[str]:
    """Return the names of what a run left in its output folder beside checkpoints, logs and texts."""
    return {path.name for path in Path(output_dir).iterdir()
            if path.name != "logs" and not path.name.startswith("checkpoint-") and path.suffix not in (".md", ".png")}


def make_comparable(value: object) -> object:
    """Return a value with the bytes of its tensors and arrays in place of them."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: make_comparable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [make_comparable(item) for item in value]
    return value


def make_digest(value: object) -> str:
    """Return a short text that differs where values do."""
    return hashlib.sha256(repr(make_comparable(value)).encode()).hexdigest()[:16]


def assert_same_files(first: Path, second: Path) -> None:
    """Fail unless two folders hold the same files with the same content, records apart."""
    contents, others = read_folder(first), read_folder(second)
    assert contents and contents.keys() == others.keys()
    assert [name for name in contents if contents[name] != others[name]] == []


def assert_same_checkpoint(first: Path, second: Path) -> None:
    """Fail unless two checkpoints are the same bit for bit and stand at the same place."""
    assert_same_files(first, second)
    assert read_record(first)["progress"] == read_record(second)["progress"]
