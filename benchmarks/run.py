#!/usr/bin/env python3
"""Measure the speed and the memory of a training script through its own command line: one command, one table.

    python benchmarks/run.py --config small --resolution 256 --batch 4
    python benchmarks/run.py --config sd15 --batch 1 4 16 --mixed_precision bf16 fp16 --out benchmarks/results/sd15
    python benchmarks/run.py --config small --resolution 256 --batch 4 --against FOLDER --rounds 5
    python benchmarks/run.py --config sd15 --batch 4 --mixed_precision bf16 --against train_text_to_image_flax.py
    python benchmarks/run.py --config sd15 --batch 4 --mixed_precision bf16 --sync_check -- --use_ema

What stands after `--` goes to the script. See benchmarks/README.md for what each column means.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
CONFIGS = ["sd15", "sd21", "sdxl", "small", "small_sdxl"]
PRECISIONS = ["no", "fp16", "bf16"]
GIB = 2**30
ERROR_LINES = 25


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Return the command line; what stands after `--` is in `extra`."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--script", type=pathlib.Path, default=pathlib.Path("train_text_to_image.py"))
    parser.add_argument("--config", choices=CONFIGS, default="small", help="the model, with random weights")
    parser.add_argument("--resolution", type=int, default=512, help="pixels that the script trains at")
    parser.add_argument("--batch", type=int, nargs="+", default=[4], help="batch sizes")
    parser.add_argument("--mixed_precision", nargs="+", choices=PRECISIONS, default=["no"])
    parser.add_argument("--updates", type=int, default=30, help="updates measured; the median of their times is shown")
    parser.add_argument("--warmup", type=int, default=5, help="updates that pass unmeasured first")
    parser.add_argument("--rounds", type=int, default=1, help="how often to run each; with --against in turn, A B A B")
    parser.add_argument("--against", type=pathlib.Path, help="another script, or a folder with one of the same name")
    parser.add_argument("--ours", default="", help="arguments, in one string, for our script and not the other")
    parser.add_argument("--image_size", type=int, default=768, help="shorter side of the JPEG pictures, in pixels")
    parser.add_argument("--num_images", type=int, default=256)
    parser.add_argument("--cache", type=pathlib.Path, default=HERE / "cache", help="models and pictures are kept here")
    parser.add_argument("--sync_check", action="store_true", help="count host waits by source line (CUDA only)")
    parser.add_argument("--out", type=pathlib.Path, help="write the results to OUT.md and OUT.json")
    args = parser.parse_args(argv[:split])
    args.extra = argv[split + 1 :]
    if min(args.warmup, args.updates, args.rounds, *args.batch) < 1:
        parser.error("--warmup, --updates, --rounds and --batch must be at least 1.")
    for script in list_scripts(args).values():
        if not script.is_file():
            parser.error(f"{script} is not a file.")
    return args


def list_scripts(args: argparse.Namespace) -> dict[str, pathlib.Path]:
    """Return the scripts to run in turn, by what to call them: with --against two, by their names if these differ."""
    if args.against is None:
        return {"ours": args.script}
    other = args.against / args.script.name if args.against.is_dir() else args.against
    if other.name != args.script.name:
        return {args.script.stem: args.script, other.stem: other}
    return {"ours": args.script, "other": other}


def make_environment(cache: pathlib.Path) -> dict[str, str]:
    """Return the environment of the children: offline, and one cache of prepared pictures for both sides."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache / "datasets")}


def build(args: argparse.Namespace) -> tuple[str, str]:
    """Build the model and the pictures where they do not stand already; return their folders."""
    command = [sys.executable, HERE / "build.py", "--cache", args.cache, "--config", args.config]
    command += ["--num_images", str(args.num_images), "--image_size", str(args.image_size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=make_environment(args.cache))
    model, pictures = done.stdout.split("\n")[:2]
    return model, pictures


def make_flags(args: argparse.Namespace, precision: str, batch: int) -> list[str]:
    """Return the flags that both sides get: only such as the diffusers example scripts have too."""
    flags = {
        "resolution": args.resolution,
        "train_batch_size": batch,
        "max_train_steps": args.warmup + args.updates + 1,
        "mixed_precision": precision,
        "checkpointing_steps": 100000,
        "report_to": "tensorboard",
        "seed": 0,
    }
    return [f"--{name}={value}" for name, value in flags.items()] + args.extra


def measure(args: argparse.Namespace, script: pathlib.Path, flags: list[str], folders: tuple[str, str]) -> dict:
    """Run the script once in a process of its own; return the report of measure.py, or the error."""
    model, pictures = folders
    with tempfile.TemporaryDirectory(dir=args.cache) as scratch:
        report, log = pathlib.Path(scratch, "report.json"), args.cache / "last.log"
        command = [sys.executable, HERE / "measure.py", "--json", report]
        command += ["--updates", str(args.updates), "--warmup", str(args.warmup)]
        command += ["--sync_check"] if args.sync_check else []
        command += ["--", script, f"--pretrained_model_name_or_path={model}", f"--train_data_dir={pictures}"]
        command += [f"--output_dir={scratch}/out", *flags]
        with log.open("w", encoding="utf-8") as output:
            done = subprocess.run(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=make_environment(args.cache),
                check=False,
            )
        if done.returncode == 0:
            return json.loads(report.read_text(encoding="utf-8"))
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [f"status {done.returncode}"]
    print("\n".join(lines[-ERROR_LINES:]), file=sys.stderr)
    return {"error": lines[-1]}


def get_accumulation(flags: list[str]) -> int:
    """Return how many batches make an update."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    return parser.parse_known_args(flags)[0].gradient_accumulation_steps


def run_case(args: argparse.Namespace, precision: str, batch: int, folders: tuple[str, str]) -> list[dict]:
    """Measure every side in turn, `--rounds` times; return a record per side."""
    flags = make_flags(args, precision, batch)
    reports = {side: [] for side in list_scripts(args)}
    for number in range(args.rounds):
        for side, script in list_scripts(args).items():
            own = shlex.split(args.ours) if script == args.script else []
            report = measure(args, script, flags + own, folders)
            reports[side].append(report)
            seconds = statistics.median(report["seconds"]) if "seconds" in report else None
            shown = report.get("error") or f"{seconds:.4f} s per update"
            print(f"{side} {precision} batch {batch}, round {number + 1}: {shown}", file=sys.stderr)
    images = batch * get_accumulation(flags)
    return [make_record(side, precision, batch, images, found) for side, found in reports.items()]


def make_record(side: str, precision: str, batch: int, images: int, reports: list[dict]) -> dict:
    """Return the figures of one side: medians over its rounds, the largest of the peaks."""
    record = {"side": side, "mixed_precision": precision, "batch": batch, "images_per_update": images}
    good = [report for report in reports if "seconds" in report]
    record["errors"] = [report["error"] for report in reports if "error" in report]
    if not good:
        return record
    medians = [statistics.median(report["seconds"]) for report in good]
    waits = [report["data_wait"] for report in good if report["data_wait"] is not None]
    return record | {
        "seconds_per_update": statistics.median(medians),
        "seconds_per_update_of_rounds": medians,
        "mean_seconds_per_update_of_rounds": [report["mean_seconds"] for report in good],
        "images_per_second": images / statistics.median(medians),
        "data_wait": statistics.median(waits) if waits else None,
        "peak_host_bytes": max(report["peak_host_bytes"] for report in good),
        "peak_device_bytes": max(report["peak_device_bytes"] or 0 for report in good) or None,
        "peak_device_reserved_bytes": max(report["peak_device_reserved_bytes"] or 0 for report in good) or None,
        "syncs": good[-1]["syncs"],
        "device": good[-1]["device"],
        "versions": good[-1]["versions"],
    }


def format_rows(rows: list[list[str]]) -> str:
    """Return a Markdown table, columns padded so that it also reads well as text."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def format_figures(records: list[dict]) -> str:
    """Return the table of figures, a row per side, precision and batch."""
    rows = [["script", "precision", "batch", "s/update", "images/s", "host GiB", "device GiB", "data wait"]]
    for record in records:
        row = [record["side"], record["mixed_precision"], str(record["batch"])]
        if "seconds_per_update" not in record:
            rows.append([*row, "failed", "", "", "", ""])
            continue
        device, wait = record["peak_device_bytes"], record["data_wait"]
        row += [f"{record['seconds_per_update']:.4f}", f"{record['images_per_second']:.2f}"]
        row += [f"{record['peak_host_bytes'] / GIB:.2f}", f"{device / GIB:.2f}" if device else "-"]
        rows.append([*row, "-" if wait is None else f"{wait:.1%}"])
    return format_rows(rows)


def format_ratios(records: list[dict]) -> str:
    """Return the table of how many times the second script's images per second the first makes, round by round."""
    sides = f"{records[0]['side']} over {records[1]['side']}"
    rows = [["precision", "batch", sides, "lowest", "highest", "rounds"]]
    for ours, other in zip(records[::2], records[1::2], strict=True):
        row = [ours["mixed_precision"], str(ours["batch"])]
        if ours["errors"] or other["errors"]:
            rows.append([*row, "failed", "", "", ""])
            continue
        pairs = zip(ours["seconds_per_update_of_rounds"], other["seconds_per_update_of_rounds"], strict=True)
        ratios = [theirs / mine for mine, theirs in pairs]
        row += [f"{value:.3f}" for value in (statistics.median(ratios), min(ratios), max(ratios))]
        rows.append([*row, str(len(ratios))])
    return format_rows(rows)


def format_syncs(records: list[dict]) -> str:
    """Return what made the host wait for the device, by source line."""
    parts = []
    for record in records:
        title = f"{record['side']} {record['mixed_precision']} batch {record['batch']}"
        syncs = record.get("syncs")
        if syncs is None:
            parts.append(f"{title}: not checked, which needs torch and a CUDA device.")
        else:
            lines = [f"    {count:6d}  {line}" for line, count in syncs.items()] or ["    none"]
            parts.append("\n".join([f"{title}, host waits during the measured updates:", *lines]))
    return "\n\n".join(parts)


def format_command(argv: list[str], against: pathlib.Path | None) -> str:
    """Return the command as anyone would type it: without folders of this machine."""
    split = argv.index("--") if "--" in argv else len(argv)
    private = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    private.add_argument("--out")
    private.add_argument("--cache")
    words = private.parse_known_args(argv[:split])[1] + argv[split:]
    words = [against.resolve().name if against and word == str(against) else word for word in words]
    return shlex.join(["python", "benchmarks/run.py", *words])


def format_report(args: argparse.Namespace, command: str, records: list[dict], load: float) -> str:
    """Return the whole report in Markdown: what was run, on what, and the tables."""
    measured = next((record for record in records if "versions" in record), {})
    found = {name: version for record in records for name, version in record.get("versions", {}).items()}
    versions = ", ".join(f"{name} {version}" for name, version in found.items())
    head = [
        f"# {args.script.name}, {args.config}, {args.resolution} px",
        f"    {command}",
        f"- date: {datetime.date.today().isoformat()}",
        f"- device: {measured.get('device', 'unknown')}",
        f"- versions: {versions}",
        f"- other work on the machine: a load of {load:.1f} on {os.cpu_count()} cores when this began",
        f"- {args.updates} updates measured after {args.warmup}; {args.num_images} pictures, shorter side"
        f" {args.image_size} px",
    ]
    parts = ["\n\n".join(head[:2]), "\n".join(head[2:])]
    # A loop watched for waits is a slower loop: its times would only mislead.
    parts.append(format_syncs(records) if args.sync_check else format_figures(records))
    if args.against and not args.sync_check:
        parts.append("Images per second of one over the other's, both run in turn:\n\n" + format_ratios(records))
    errors = [f"- {r['side']} {r['mixed_precision']} batch {r['batch']}: {e}" for r in records for e in r["errors"]]
    return "\n\n".join([*parts, *(["Failed:\n\n" + "\n".join(errors)] if errors else [])]) + "\n"


def write_results(args: argparse.Namespace, command: str, records: list[dict], report: str) -> None:
    """Write the report as Markdown, and every figure behind it as JSON."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(report, encoding="utf-8")
    content = {"command": command, "date": datetime.date.today().isoformat(), "records": records}
    args.out.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    """Build, measure, show; return the exit status."""
    args = parse_args(argv)
    args.cache.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    folders = build(args)
    records = []
    for precision in args.mixed_precision:
        for batch in args.batch:
            records += run_case(args, precision, batch, folders)
    command = format_command(argv, args.against)
    report = format_report(args, command, records, load)
    print(report)
    if args.out:
        write_results(args, command, records, report)
    return 1 if any(record["errors"] for record in records) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
