#!/usr/bin/env python3
"""Estimate what a torch script takes of a GPU, without one: memory, kernel launches, FLOPs, waits for the device.

    python benchmarks/estimate.py --config sd15 --batch 4
    python benchmarks/estimate.py --script train_text_to_image_sdxl.py --config sdxl --resolution 1024 -- --use_ema

What stands after `--` goes to the script. It runs as it is, from its command line to the end, on a CUDA device that is
not there (pretended_cuda.cpp), with networks of the published shape whose weights have no values. It needs Linux,
torch's CUDA 13 wheel and a C++ compiler. See benchmarks/README.md for what the figures mean.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import datetime
import functools
import importlib.util
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback

import measure

HERE = pathlib.Path(__file__).resolve().parent
LIBRARY = "PRETENDED_CUDA"  # environment variable: the compiled device, in a process that it is loaded into
COUNTED = 2  # updates whose launches and waits are counted, after one that makes the moments; FLOPs are of a fourth
PHASES = ("encoding", "training", "drawing")
COPIES = ("aten.copy_.default", "aten._to_copy.default")  # which may have tensors on two devices
GIB = 2**30


class Unavailable(Exception):
    """No device can be pretended here; says why."""


def build_device(folder: pathlib.Path) -> pathlib.Path:
    """Compile the pretended device into a folder."""
    if sys.platform != "linux":
        raise Unavailable(f"A GPU can be pretended on Linux alone; this is {sys.platform}.")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        raise Unavailable("There is no C++ compiler (c++, g++, clang++): install one, or name it in CXX.")
    packages = pathlib.Path(importlib.util.find_spec("torch").origin).parent.parent
    names = ("nvidia/cu13/include", "triton/backends/nvidia/include", "nvidia/cudnn/include")
    for name in names:
        if not (packages / name).is_dir():
            raise Unavailable(f"torch's wheel for CUDA 13 is needed, which brings {packages / name}: there is none.")
    library = folder / "libpretended_cuda.so"
    command = [compiler, "-O1", "-std=c++17", "-shared", "-fPIC", *(f"-I{packages / name}" for name in names)]
    command += [HERE / "pretended_cuda.cpp", "-Wl,-soname,libcuda.so.1", "-o", library]  # passes for the driver too
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{compiler} cannot compile pretended_cuda.cpp: {done.stderr.strip().splitlines()[0]}")
    return library


def make_environment(library: pathlib.Path) -> dict[str, str]:
    """Return the environment of a process on the pretended device: offline, torch's allocator as it comes."""
    kept = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    return kept | {LIBRARY: str(library), "LD_PRELOAD": str(library), "HF_HUB_OFFLINE": "1",
                   "CUDA_VISIBLE_DEVICES": "0"}


class Device:
    """The pretended device, in a process that it is loaded into; counts what `script` makes it do."""

    def __init__(self, script: str) -> None:
        import torch

        if torch.version.cuda is None:
            raise Unavailable(f"torch's wheel for CUDA 13 is needed; {torch.__version__} is built without CUDA.")
        self.script, self.library = script, ctypes.CDLL(os.environ[LIBRARY])
        self.library.pretended_launches.restype = ctypes.c_ulonglong
        self.note_wait = ctypes.CFUNCTYPE(None)(lambda: self.note(self.waits))
        self.waits, self.mismatches = collections.Counter(), collections.Counter()  # by line
        self.num_launches, self.flops, self.peaks = 0, 0, {}

    def note(self, counter: collections.Counter) -> None:
        """Count the line that is being run."""
        stack = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
        counter[measure.describe_line(stack, self.script)] += 1

    @contextlib.contextmanager
    def counted(self):
        """Count launches and waits."""
        before = self.library.pretended_launches()
        self.library.pretended_on_wait(self.note_wait)
        yield
        self.library.pretended_on_wait(None)
        self.num_launches += self.library.pretended_launches() - before

    @contextlib.contextmanager
    def watched(self):
        """Count FLOPs, and operators with tensors on several devices; watching changes launches and memory."""
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves
        from torch.utils.flop_counter import flop_registry

        device = self

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
                if len({tensor.device.type for tensor in tensors}) > 1 and str(func) not in COPIES:
                    device.note(device.mismatches)
                count = flop_registry.get(func._overloadpacket, lambda *_, **__: 0)
                device.flops += count(*args, **(kwargs or {}), out_val=result)
                return result

        with Watch():
            yield

    def note_peak(self, phase: str) -> None:
        """Note the most memory since the last reset, in GiB."""
        from torch.cuda import max_memory_allocated, max_memory_reserved

        self.peaks[phase] = {"allocated": max_memory_allocated() / GIB, "reserved": max_memory_reserved() / GIB}

    def with_peak(self, phase: str, function):
        """Wrap a function, to note the peak while it runs."""
        from torch.cuda import reset_peak_memory_stats

        @functools.wraps(function)
        def run(*args, **kwargs):
            reset_peak_memory_stats()
            result = function(*args, **kwargs)
            self.note_peak(phase)
            return result

        return run


def load_script(path: pathlib.Path):
    """Return a script as a module, anew each time."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_network(script, args: argparse.Namespace, part: str, dtype):
    """Return a network of a script without values; its memory is not touched, so that none is taken."""
    import torch

    (where, files), kind = script.locate_part(args, part), script.NETWORK_CLASSES[part]
    with torch.device("meta"):
        if part in ("unet", "vae"):
            network = kind.from_config(kind.load_config(where, **files))
        else:
            network = kind(kind.config_class.from_pretrained(where, **files))
    return torch.nn.Module.to(network, dtype).to_empty(device="cpu").requires_grad_(False).eval()


def estimate(script, argv: list[str]) -> dict:
    """Run a script to its end, but for the files of models; return what it takes of the device."""
    fixed = {"max_train_steps": COUNTED + 2, "logging_steps": 1000, "checkpointing_steps": 1000, "report_to": "none"}
    argv = [*argv, *(f"--{name}={value}" for name, value in fixed.items())]
    args, device, watch = script.parse_args(argv), Device(script.__file__), contextlib.ExitStack()
    end_update = script.Meter.end_update

    def end_and_count(meter, global_step: int, numbers: dict) -> None:
        end_update(meter, global_step, numbers)
        if global_step == 1:
            watch.enter_context(device.counted())
        elif global_step == COUNTED + 1:
            watch.close()
            device.note_peak("training")
            watch.enter_context(device.watched())
        elif global_step == COUNTED + 2:
            watch.close()

    script.Meter.end_update = end_and_count
    script.load_network = functools.partial(make_network, script)
    script.digest_network = repr
    script.save_checkpoint = script.export_model = lambda *_: None
    if args.cache_latents or args.cache_text_embeddings:
        script.cache_encodings = device.with_peak("encoding", script.cache_encodings)
    script.draw_images = device.with_peak("drawing", script.draw_images)
    script.main(argv)
    num_images = args.train_batch_size * args.gradient_accumulation_steps
    return {"peak_gib": {phase: device.peaks[phase] for phase in PHASES if phase in device.peaks},
            "launches_per_update": device.num_launches / COUNTED, "tflop_per_image": device.flops / 1e12 / num_images,
            "waits_per_update": {line: count / COUNTED for line, count in device.waits.items()},
            "mismatches": dict(device.mismatches)}


def run_on_device(args: argparse.Namespace, folder: pathlib.Path) -> dict:
    """Return the figures of what the command line asks for, in a process that the device is loaded into."""
    import build
    import torch

    script = load_script(args.script.resolve())
    flags = {"pretrained_model_name_or_path": build.build_model(folder, args.config, with_weights=False),
             "resolution": args.resolution, "train_batch_size": args.batch, "mixed_precision": args.mixed_precision,
             "output_dir": folder / "out", "encoded_dir": folder / "encoded", "validation_epochs": 1000}
    argv = [*(f"--{name}={value}" for name, value in flags.items()), *args.extra]
    accumulation = script.parse_args([*argv, "--train_data_dir=."]).gradient_accumulation_steps
    pictures = build.build_pictures(folder, args.batch * accumulation, 64)  # an update is an epoch
    return {"torch": torch.__version__, **estimate(script, [*argv, f"--train_data_dir={pictures}"])}


def format_report(records: list[dict]) -> str:
    """Return a table of estimates, and below it the lines that waited or mixed devices."""
    head = ["command", *(f"{phase}, GiB" for phase in PHASES), "launches", "TFLOP per image", "waits", "mismatches"]
    rows, notes = [head, ["---"] * len(head)], []
    for record in records:
        peaks = [record["peak_gib"].get(phase) for phase in PHASES]
        waits, mismatches = record["waits_per_update"], record["mismatches"]
        rows.append([f"`{record['command']}`",
                     *(f"{peak['allocated']:.1f} / {peak['reserved']:.1f}" if peak else "-" for peak in peaks),
                     f"{record['launches_per_update']:,.0f}", f"{record['tflop_per_image']:.2f}",
                     f"{sum(waits.values()):g}", str(sum(mismatches.values()))])
        notes += [f"- `{record['command']}` waits {count:g} times per update: {line}" for line, count in waits.items()]
        notes += [f"- `{record['command']}` has tensors on two devices: {line}" for line in mismatches]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    title = "Memory allocator on a pretended device, no kernel run: peak / reserved."
    return "\n".join([title, "", *lines, "", *notes]).rstrip()


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Return the command line; what stands after `--` is in `extra`."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--script", type=pathlib.Path, default=pathlib.Path("train_text_to_image.py"))
    parser.add_argument("--config", choices=["sd15", "sd21", "sdxl"], default="sd15", help="shape of the model")
    parser.add_argument("--resolution", type=int, default=512, help="pixels that the script trains at")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="bf16")
    parser.add_argument("--out", type=pathlib.Path, help="add the figures to OUT.json and the table in OUT.md")
    args = parser.parse_args(argv[:split])
    args.extra = argv[split + 1 :]
    if not args.script.is_file() or "flax" in args.script.name:
        parser.error(f"--script {args.script} is not one of the scripts for torch.")
    if "--torch_compile" in args.extra:
        parser.error("--torch_compile makes kernels that a pretended device cannot run: leave it out.")
    return args


def main(argv: list[str]) -> int:
    """Start this again on the pretended device, show what it finds; return the exit status."""
    args = parse_args(argv)
    if LIBRARY in os.environ:
        folder = pathlib.Path(os.environ[LIBRARY]).parent
        (folder / "record.json").write_text(json.dumps(run_on_device(args, folder)), encoding="utf-8")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        environment = make_environment(build_device(pathlib.Path(scratch))) | {"HF_HOME": scratch}
        if subprocess.run([sys.executable, __file__, *argv], env=environment, check=False).returncode:
            return 1
        found = json.loads(pathlib.Path(scratch, "record.json").read_text(encoding="utf-8"))
    private = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    private.add_argument("--out")
    command = shlex.join(["python", "benchmarks/estimate.py", *private.parse_known_args(argv)[1]])
    record = {"command": command, "date": datetime.date.today().isoformat(), **found}
    print(format_report([record]))
    if args.out:
        path = args.out.with_suffix(".json")
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        records = list(({other["command"]: other for other in before} | {command: record}).values())
        path.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(format_report(records) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Unavailable as error:
        sys.exit(str(error))
