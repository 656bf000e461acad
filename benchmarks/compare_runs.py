"""Compare small runs of the scripts here with the same runs of the scripts of another commit, bit for bit.

    python benchmarks/compare_runs.py --against COMMIT [--runs "sd/*" "*/resume*"] [--jobs 2]

Each run is `script/row` of the table below: tiny models with random weights, ten pictures, a few updates on the CPU in
float32. Compared are the losses, every tensor of the checkpoints (weights, EMA weights, optimizer, schedule, random
states), the place in training, the exported result and the pictures drawn on the way.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib.metadata import version
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from conftest import make_image_folder, make_tiny_sdxl, make_tiny_stable_diffusion, read_scalars  # noqa: E402
from PIL import Image  # noqa: E402
from runs import FORKS, make_digest  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

CACHE = ROOT / "benchmarks" / "cache" / "compare"
PRELOADED = ["runs", "datasets", "huggingface_hub", "peft", "torchvision"]
LIBRARIES = "torch diffusers transformers accelerate peft datasets numpy pillow jax orbax-checkpoint".split()
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(ROOT / "tests"), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=1",
    "JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}
TIMEOUT = 300  # seconds per run
FAILED = "the run itself"

# ---- The table ------------------------------------------------------------------------------------------------------

SCRIPTS = {
    "sd": "train_text_to_image.py", "lora": "train_text_to_image_lora.py", "sdxl": "train_text_to_image_sdxl.py",
    "lora_sdxl": "train_text_to_image_lora_sdxl.py", "flax": "train_text_to_image_flax.py"}
BASE = """--train_data_dir ../../inputs/data --output_dir out --cache_dir hf --resolution 32 --train_batch_size 4
    --max_train_steps 4 --checkpointing_steps 2 --learning_rate 1e-3 --lr_warmup_steps 0 --seed 0 --logging_steps 1
    --report_to tensorboard --num_validation_images 1 --validation_inference_steps 2"""
UNCACHED = "--no_cache_latents --no_cache_text_embeddings"
CACHED = "--cache_latents --cache_text_embeddings"
HELD_OUT = "--validation_data_dir ../../inputs/held_out"
LISTS = "--train_data_dir ../../inputs/lists --caption_column texts"


class Row(NamedTuple):
    """A kind of run: the scripts that know its flags, and the checkpoint it is resumed from once more."""

    scripts: str
    flags: str
    processes: int = 1
    resume: str | None = None


ROWS = {
    "plain": Row("sd lora sdxl lora_sdxl flax", ""),
    "uncached": Row("sd lora sdxl lora_sdxl flax", UNCACHED),
    "cached": Row("sd lora sdxl lora_sdxl flax", f"{CACHED} --cache_crops 2 --proportion_empty_prompts 0.2"),
    "cached-fp32": Row("sd sdxl", f"{CACHED} --cache_dtype fp32 --encoded_dir encoded --random_flip"),
    "accumulation": Row("sd lora sdxl lora_sdxl flax", "--gradient_accumulation_steps 2 --train_batch_size 2"),
    "ema": Row("sd lora sdxl lora_sdxl flax", "--use_ema --ema_decay 0.9 --gradient_checkpointing"),
    "text-encoder": Row("sd lora sdxl lora_sdxl",
                        f"--train_text_encoder --text_encoder_lr 1e-4 --use_ema {UNCACHED}"),
    "targets": Row("lora lora_sdxl", "--lora_target attention feed_forward convolution conv_out --rank 8 "
                                     f"--lora_alpha 4 --lora_dropout 0.1 --train_text_encoder --use_ema {UNCACHED}"),
    "dora": Row("lora lora_sdxl", "--use_dora --use_rslora --save_kohya_format --lora_target attn2.to_k attn2.to_q"),
    "dream": Row("sd lora sdxl lora_sdxl flax", "--dream_training --dream_detail_preservation 2 --snr_gamma 5"),
    "noise": Row("sd lora sdxl lora_sdxl flax",
                 "--noise_offset 0.1 --input_perturbation 0.1 --snr_gamma 5 --proportion_empty_prompts 0.3"),
    "v-prediction": Row("sd lora sdxl lora_sdxl flax",
                        "--prediction_type v_prediction --rescale_betas_zero_snr --snr_gamma 5"),
    "sample": Row("sd", "--prediction_type sample --snr_gamma 5"),
    "bias": Row("sd sdxl flax",
                "--timestep_bias_strategy later --timestep_bias_multiplier 3 --timestep_bias_portion 0.5"),
    "bias-range": Row("lora lora_sdxl", "--timestep_bias_strategy range --timestep_bias_multiplier 2 "
                                        "--timestep_bias_begin 200 --timestep_bias_end 600"),
    "validation": Row("sd lora sdxl lora_sdxl flax",
                      f"{HELD_OUT} --validation_prompts one two --validation_steps 2 --use_ema"),
    "validation-one": Row("sd lora_sdxl", "--validation_prompt one --num_validation_images 2 --validation_epochs 1"),
    "captions": Row("sd lora sdxl lora_sdxl flax", f"{LISTS} --random_flip --center_crop"),
    "captions-cached": Row("sd lora_sdxl", f"{LISTS} {CACHED} --cache_crops 2 --random_flip"),
    "epochs": Row("sd lora_sdxl flax", "--num_train_epochs 2 --max_train_samples 7 --dataset_name ../../inputs/data "
                                       "--dataloader_num_workers 2 --train_batch_size 2"),
    "schedule": Row("sd lora flax", "--lr_scheduler cosine --lr_warmup_steps 2 --scale_lr --max_grad_norm 0.1 "
                                    "--adam_beta1 0.8 --adam_weight_decay 0.1 --gradient_accumulation_steps 2"),
    "cycles": Row("sdxl", "--lr_scheduler cosine_with_restarts --lr_num_cycles 2"),
    "adafactor": Row("sd lora_sdxl", "--use_adafactor --channels_last"),
    "in-backward": Row("sd sdxl", "--optimizer_in_backward --max_grad_norm 0 --use_ema --offload_ema"),
    "bf16": Row("sd lora_sdxl flax", "--mixed_precision bf16 --use_ema"),
    "resume": Row("sd lora sdxl lora_sdxl flax", "--checkpointing_steps 1 --use_ema --random_flip", 1, "checkpoint-2"),
    "resume-accumulation": Row("sd", f"{CACHED} --gradient_accumulation_steps 2 --train_batch_size 1 {HELD_OUT} "
                                     "--validation_steps 3 --max_train_steps 7 --checkpointing_steps 3 "
                                     "--lr_scheduler linear", 1, "checkpoint-3"),
    "resume-text-encoder": Row("sdxl lora_sdxl", f"--train_text_encoder {UNCACHED} --checkpointing_steps 1", 1,
                               "checkpoint-1"),
    "pair": Row("sd lora sdxl lora_sdxl", f"--gradient_accumulation_steps 2 --train_batch_size 2 {HELD_OUT} --use_ema "
                                          "--validation_prompts one two three --validation_steps 2", 2),
    "pair-cached": Row("sd lora_sdxl", f"{CACHED} --train_batch_size 3", 2),
    "pair-resume": Row("sd lora", "--train_batch_size 2 --checkpointing_steps 1 --use_ema", 2, "checkpoint-1"),
    "devices": Row("flax", "--train_batch_size 2 --fsdp --use_ema", 2),  # two of one process
}


def list_runs(patterns: list[str]) -> list[str]:
    """Return the names of the runs that match, as script/row."""
    names = [f"{script}/{name}" for name, row in ROWS.items() for script in row.scripts.split()]
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


# ---- Running --------------------------------------------------------------------------------------------------------


def make_inputs(folder: Path) -> str:
    """Write the models and the data that all runs share; return their digest."""
    make_tiny_stable_diffusion(folder / "sd")
    make_tiny_sdxl(folder / "sdxl")
    for name, count in (("data", 10), ("held_out", 3), ("lists", 10)):
        make_image_folder(folder / name, count)
    rows = [{"file_name": f"{index:03d}.png", "texts": [f"{index} as {word}" for word in "abc"[:1 + index % 3]]}
            for index in range(10)]
    (folder / "lists" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return make_digest({str(path.relative_to(folder)): read_file(path) for path in sorted(folder.rglob("*.*"))})


def copy_scripts(source: str | Path, folder: Path) -> None:
    """Copy the scripts of a folder or a commit into `folder`."""
    folder.mkdir()
    for name in SCRIPTS.values():
        text = Path(source, name).read_bytes() if Path(source).is_dir() else subprocess.run(
            ["git", "show", f"{source}:{name}"], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        (folder / name).write_bytes(text)


def run_script(path: str, argv: list[str], folder: str, environment: dict[str, str]) -> None:
    """Run a script as a command in `folder`; for a process of its own."""
    os.chdir(folder)
    stream = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [path, *argv]
    runpy.run_path(path, run_name="__main__")


def execute(script: Path, argv: list[str], folder: Path, processes: int) -> bool:
    """Run a script in one process, or in several as torchrun does; return whether all ended well."""
    environments: list[dict] = [{}]
    if "flax" in script.name:
        flags = f"{ENVIRONMENT['XLA_FLAGS']} --xla_force_host_platform_device_count={processes}"
        environments = [{"XLA_FLAGS": flags}]
    elif processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]),
                      "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    children = [FORKS.Process(target=run_script, args=(str(script), argv, str(folder), environment))
                for environment in environments]
    for child in children:
        child.start()
    for child in children:
        child.join(TIMEOUT)
        child.kill()
        child.join()
    return all(child.exitcode == 0 for child in children)


def make_run(name: str, scripts: Path, folder: Path) -> dict[str, dict]:
    """Return what a run leaves: by file, its values by name. A run that fails leaves its last line of output."""
    script, row = name.split("/")[0], ROWS[name.split("/")[1]]
    model = "sdxl" if "sdxl" in script else "sd"
    argv = shlex.split(f"--pretrained_model_name_or_path ../../inputs/{model} {BASE} {row.flags}")
    folder.mkdir(parents=True)
    done = execute(scripts / SCRIPTS[script], argv, folder, row.processes)
    if done and row.resume:
        (folder / "out").rename(folder / "first")
        shutil.copytree(folder / "first" / row.resume, folder / "out" / row.resume)
        argv += ["--resume_from_checkpoint", "latest"]
        done = execute(scripts / SCRIPTS[script], argv, folder, row.processes)
    if not done:
        log = (folder / "log.txt").read_text(errors="replace").strip() or "no output"
        return {FAILED: {f"fails: {log.splitlines()[-1]}": None}}
    return {path: dict(flatten(value)) for path, value in read_outputs(folder)}


# ---- Reading what a run leaves --------------------------------------------------------------------------------------


def read_outputs(folder: Path) -> Iterator[tuple[str, object]]:
    """Yield the name and the content of everything that is compared."""
    for out in filter(Path.is_dir, (folder / "first", folder / "out")):
        for tag in ("train_loss", "validation_loss"):
            yield f"{out.name}/{tag}", read_scalars(out, tag)
        states = [path.parent for path in out.rglob("_METADATA")]  # Orbax writes one file of several into a folder
        yield from ((str(path.relative_to(folder)), read_state(path)) for path in states)
        for path in sorted(out.rglob("*")):
            skipped = path.is_dir() or path.suffix == ".md" or any(state in path.parents for state in states)
            if not skipped and "logs" not in path.parts:
                yield str(path.relative_to(folder)), read_file(path)


def read_state(folder: Path) -> dict:
    """Return the arrays that Orbax has written."""
    import orbax.checkpoint as ocp  # here: takes seconds

    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        restore = ocp.checkpoint_utils.construct_restore_args(tree)
        return checkpointer.restore(folder, restore_args=restore)


def read_file(path: Path) -> object:
    """Return the values in a file."""
    if path.name == "run_record.json":
        return json.loads(path.read_text())["progress"]
    if path.suffix in (".bin", ".pkl"):
        return torch.load(path, map_location="cpu", weights_only=False)
    readers = {".safetensors": load_file, ".json": lambda path: json.loads(path.read_text()),
               ".png": lambda path: np.asarray(Image.open(path))}
    return readers.get(path.suffix, Path.read_bytes)(path)


def flatten(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Yield the values in nested dictionaries, and in lists of them, with their names."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield name, value
        return
    for key, item in value.items():
        yield from flatten(item, f"{name}/{key}" if name else str(key))


# ---- Comparing ------------------------------------------------------------------------------------------------------


def make_digests(outputs: dict[str, dict]) -> dict[str, dict[str, str]]:
    """Return a digest in place of each value."""
    return {path: {name: make_digest(value) for name, value in values.items()} for path, values in outputs.items()}


def get_reference(name: str, work: Path, inputs: str) -> dict[str, dict[str, str]]:
    """Return the digests of a run of the other commit's script: kept ones, unless anything that counts has changed."""
    script, row = name.split("/")
    text = (work / "there" / SCRIPTS[script]).read_text()
    versions = [f"{library} {version(library)}" for library in LIBRARIES]
    key = hashlib.sha256(repr((text, inputs, BASE, ROWS[row], versions, sys.version)).encode()).hexdigest()[:20]
    path = CACHE / f"{script}-{row}-{key}.json"
    if not path.is_file():
        digests = make_digests(make_run(name, work / "there", work / "runs-there" / name.replace("/", "-")))
        path.write_text(json.dumps(digests))
    return json.loads(path.read_text())


def describe_difference(first: object, second: object) -> str:
    """Return how two values differ."""
    if all(isinstance(value, torch.Tensor | np.ndarray) for value in (first, second)):
        first, second = (torch.as_tensor(np.array(value) if isinstance(value, np.ndarray) else value)
                         for value in (first, second))
        if first.shape != second.shape or first.dtype != second.dtype:
            return f"{first.dtype} {list(first.shape)} there, {second.dtype} {list(second.shape)} here"
        return f"max abs difference {(first.double() - second.double()).abs().max().item():.3g}"
    return f"{str(first)[:100]} there, {str(second)[:100]} here"


def compare(name: str, work: Path, inputs: str) -> list[str]:
    """Return the differences of a run between the two sides, a line per file."""
    folder = name.replace("/", "-")
    outputs = make_run(name, work / "here", work / "runs-here" / folder)
    digests, reference = make_digests(outputs), get_reference(name, work, inputs)
    failures = [f"{where} {line}" for side, where in ((reference, "there"), (digests, "here"))
                for line in side.get(FAILED, {})]
    if failures:
        return failures
    lines, values = [], None
    for path in sorted(digests.keys() | reference.keys()):
        ours, theirs = digests.get(path), reference.get(path)
        if ours is None or theirs is None:
            lines.append(f"{path}: only {'there' if ours is None else 'here'}")
        elif ours != theirs:
            if values is None:  # digests tell where, values how much
                shutil.rmtree(work / "runs-there" / folder, ignore_errors=True)
                values = make_run(name, work / "there", work / "runs-there" / folder)
            different = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
            first, missing = different[0], "nothing"
            detail = describe_difference(values[path].get(first, missing), outputs[path].get(first, missing))
            lines.append(f"{path}: {len(different)} of {len(ours)} values differ, first {first or 'it'}: {detail}")
    for side in ("runs-here", "runs-there"):
        shutil.rmtree(work / side / folder, ignore_errors=True)
    return lines


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", metavar="COMMIT", default="HEAD",
                        help="The other commit, or a folder with other scripts; HEAD if left out.")
    parser.add_argument("--runs", nargs="+", default=["*"], metavar="PATTERN", help="Only these, such as 'sd/*'.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time.")
    parser.add_argument("--list", action="store_true", help="Print the names of the runs and their flags.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print each run's name with `same` or its differences; return 1 if there are any."""
    args = parse_args(argv)
    names = list_runs(args.runs)
    if not names:
        sys.exit(f"--runs {' '.join(args.runs)} matches none; --list prints all names.")
    if args.list:
        print("\n".join(f"{name:30} {ROWS[name.split('/')[1]].flags}" for name in names))
        return 0
    CACHE.mkdir(parents=True, exist_ok=True)
    os.environ.update(ENVIRONMENT)
    with_jax = any(name.startswith("flax") for name in names)
    FORKS.set_forkserver_preload(PRELOADED + ["jax", "orbax.checkpoint"] * with_jax)
    forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        work = Path(folder)
        inputs = make_inputs(work / "inputs")
        copy_scripts(args.against, work / "there")
        copy_scripts(ROOT, work / "here")
        different = 0
        for name, lines in zip(names, pool.map(lambda name: compare(name, work, inputs), names), strict=True):
            print(f"{name:30} {'DIFFERENT' if lines else 'same'}", *lines, sep="\n    ", flush=True)
            different += bool(lines)
    print(f"{len(names)} runs, {different} different")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
