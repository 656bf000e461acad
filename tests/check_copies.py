#!/usr/bin/env python3
"""Keep the helpers that several scripts share equal, letter for letter.

Each training script is whole, so what they share stands in each as a copy. The rule that needs no marks: **same
name, same text**. A function, class or variable at the top level of two scripts has one text, with its decorators,
its docstring, its comments and the comment lines right above it. So has each flag, a statement in `add_flags`, under
its name with the two dashes. `OWN` lists the names that each script fills in its own way, `OWN_OF` those that one
script does: what has the same part in it, on another library.

    python3 tests/check_copies.py                             show what has drifted; exit status 1 if anything has
    python3 tests/check_copies.py --list                      show which script has what
    python3 tests/check_copies.py --take-from SCRIPT NAME ... give every other copy of NAME the text in SCRIPT
    python3 tests/check_copies.py --take-from SCRIPT --seed   the same for a flag
"""

from __future__ import annotations

import argparse
import ast
import collections
import difflib
import pathlib
import re
import sys
from dataclasses import dataclass

OWN = {
    "ADDITION_EMBED_TYPE",
    "EMA_FOLDER",
    "EXTRA_PARTS",
    "FIXED_FLAGS",
    "MODEL_KIND",
    "MODEL_LICENSE",
    "MODEL_TAGS",
    "Models",
    "PIPELINE",
    "REQUIREMENTS",
    "RESULT",
    "TEXT_ENCODERS",
    "TOKENIZERS",
    "VAE_SCALE",
    "add_flags",
    "make_example",
    "encode_batch",
    "encode_captions",
    "export_model",
    "load_models",
    "load_trained",
    "main",
    "make_ema",
    "make_kohya_facts",
    "make_kohya_name",
    "make_parameter_groups",
    "make_lora_configs",
    "make_pipeline",
    "parse_args",
    "save_trained",
}
OWN_OF = {
    "train_text_to_image_lora_sdxl.py": {"train_step"},
    "train_text_to_image_flax.py": set(
        "--allow_tf32 --dataloader_num_workers --mixed_precision INTERPOLATION_MODES Meter StopRequest TRACKERS "
        "cache_encodings cache_latents cache_text_states collate compute_held_out_loss compute_loss "
        "compute_snr_weights compute_target digest_network draw_images encode_captions encode_images "
        "load_model_configs load_state locate_model log_run_header logger make_accelerator make_dataloader "
        "make_objective prepare_training resume save_images save_state start_run train train_step transform_image "
        "validate".split()
    )
}
BANNER = re.compile(r"# -+ .+ -+")


@dataclass(frozen=True)
class Helper:
    """A named thing of a script: `text` is its lines `start` to `stop`, counted as slices are."""

    start: int
    stop: int
    text: str


def get_name(node: ast.stmt) -> str | None:
    """Return the name that a statement defines: of a function, a class, a variable or a flag; else None."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return node.name
    call = getattr(node, "value", None)
    if isinstance(call, ast.Call) and getattr(call.func, "id", None) in ("add", "switch"):
        return call.args[0].value
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return targets[0].id if len(targets) == 1 and isinstance(targets[0], ast.Name) else None


def find_start(node: ast.stmt, lines: list[str]) -> int:
    """Return the index of the first line of `node`, with its decorators and the comment lines right above it."""
    start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
    while start > 0 and lines[start - 1].startswith("#") and not BANNER.match(lines[start - 1]):
        start -= 1
    return start


def find_stop(node: ast.stmt, lines: list[str]) -> int:
    """Return the index after the last line of `node`, with indented comment lines right below it."""
    stop = node.end_lineno
    while stop < len(lines) and lines[stop].startswith(" "):
        stop += 1
    return stop


def read_lines(script: pathlib.Path) -> list[str]:
    """Return the lines of a script with their ends, divided where `ast` divides them."""
    with script.open(encoding="utf-8") as file:
        return file.readlines()


def read_helpers(script: pathlib.Path) -> dict[str, Helper]:
    """Return the helpers of a script by name, flags after the function that adds them."""
    lines = read_lines(script)
    helpers = {}
    for node in ast.parse("".join(lines), filename=str(script)).body:
        name = get_name(node)
        if name is not None:
            helpers[name] = make_helper(lines, find_start(node, lines), find_stop(node, lines))
        flags = [flag for flag in node.body if "--" in (get_name(flag) or "")] if name == "add_flags" else []
        helpers |= {get_name(flag): make_helper(lines, flag.lineno - 1, flag.end_lineno) for flag in flags}
    return helpers


def make_helper(lines: list[str], start: int, stop: int) -> Helper:
    """Return the helper that stands in some lines."""
    return Helper(start, stop, "".join(lines[start:stop]))


def collect_copies(scripts: list[pathlib.Path]) -> dict[str, dict[pathlib.Path, Helper]]:
    """Return for each name the scripts that have it, each with its text; names in the order of the scripts."""
    copies = collections.defaultdict(dict)
    for script in scripts:
        for name, helper in read_helpers(script).items():
            copies[name][script] = helper
    return dict(copies)


def is_own(name: str, script: pathlib.Path) -> bool:
    """Return whether a script fills a name in its own way."""
    return name in OWN or name in OWN_OF.get(script.name, ())


def select_shared(name: str, by_script: dict[pathlib.Path, Helper]) -> dict[pathlib.Path, Helper]:
    """Return those of a name's copies that are to be equal."""
    return {script: helper for script, helper in by_script.items() if not is_own(name, script)}


def is_equal(copies: dict[pathlib.Path, Helper]) -> bool:
    """Return whether all copies have one text."""
    return len({helper.text for helper in copies.values()}) <= 1


def list_drifted(copies: dict[str, dict[pathlib.Path, Helper]]) -> list[str]:
    """Return the shared names whose texts differ."""
    return [name for name, by_script in copies.items() if not is_equal(select_shared(name, by_script))]


def list_needless(copies: dict[str, dict[pathlib.Path, Helper]]) -> list[str]:
    """Return the names in `OWN` and `OWN_OF` that are in fact the same in every one of several scripts."""
    names = OWN.union(*OWN_OF.values())
    return sorted(name for name in names if len(copies.get(name, {})) > 1 and is_equal(copies[name]))


def make_diff(name: str, by_script: dict[pathlib.Path, Helper]) -> str:
    """Return how each other text of `name` differs from the most frequent one."""
    scripts_of = collections.defaultdict(list)
    for script, helper in by_script.items():
        scripts_of[helper.text].append(script.name)
    usual, *others = sorted(scripts_of, key=lambda text: -len(scripts_of[text]))
    parts = [f"{name} differs:"]
    for other in others:
        labels = ", ".join(scripts_of[usual]), ", ".join(scripts_of[other])
        parts += difflib.unified_diff(usual.splitlines(), other.splitlines(), *labels, lineterm="")
    parts.append(f"Fix: --take-from SCRIPT {name}, or give one of them a name of its own.\n")
    return "\n".join(parts)


def show_list(copies: dict[str, dict[pathlib.Path, Helper]], scripts: list[pathlib.Path]) -> None:
    """Print a table: a row per name, a column per script."""
    for number, script in enumerate(scripts, 1):
        print(f"{number}  {script.name}")
    print("= shared, x drifted, o each its own, . the only one\n")
    drifted = list_drifted(copies)
    for name, by_script in copies.items():
        marks = {script: "o" if is_own(name, script) else "x" if name in drifted else "=" for script in by_script}
        if len(by_script) == 1 and name not in OWN:
            marks = dict.fromkeys(by_script, ".")
        print("  ".join(marks.get(script, " ") for script in scripts) + "  " + name)


def take_from(source: pathlib.Path, names: list[str], scripts: list[pathlib.Path]) -> list[str]:
    """Give every script that has one of `names` the text that `source` has; return a line on each script changed."""
    taken, changed = read_helpers(source), []
    for name in names:
        if is_own(name, source):
            listed = "OWN" if name in OWN else "OWN_OF"
            raise ValueError(f"{name} is in {listed}: that script has its own text; take it off that list first.")
        if name not in taken:
            raise ValueError(f"{name} is no helper or flag of {source.name}: --list shows those.")
        for script in scripts:
            helper = read_helpers(script).get(name)
            if helper is None or helper.text == taken[name].text:
                continue
            if is_own(name, script):
                changed.append(f"{script.name}: {name} has its own text: change it by hand if callers changed")
                continue
            lines = read_lines(script)
            lines[helper.start : helper.stop] = [taken[name].text]
            script.write_text("".join(lines), encoding="utf-8")
            changed.append(f"{script.name}: {name} now as in {source.name}")
    return changed


def check(copies: dict[str, dict[pathlib.Path, Helper]], scripts: list[pathlib.Path]) -> int:
    """Print a diff per drifted helper and a note per needless entry of `OWN`; return the exit status."""
    drifted = list_drifted(copies)
    for name in drifted:
        print(make_diff(name, select_shared(name, copies[name])))
    for name in list_needless(copies):
        listed = "OWN" if name in OWN else "OWN_OF"
        print(f"{name} is in {listed} and yet the same in every script: take it off that list.")
    shared = sum(len(select_shared(name, by_script)) > 1 for name, by_script in copies.items())
    print(f"{len(scripts)} scripts, {shared} shared helpers, {len(drifted)} drifted.")
    return 1 if drifted else 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Keep the helpers that several scripts share equal.",
                                     allow_abbrev=False)
    parser.add_argument("--list", action="store_true", help="show which script has what, and stop")
    parser.add_argument("--take-from", nargs="+", metavar=("SCRIPT", "NAME"), help="copy NAME from SCRIPT to the rest")
    here = pathlib.Path(__file__).resolve().parent.parent
    parser.add_argument("--folder", type=pathlib.Path, default=here, help="where the scripts train_*.py are")
    args, flags = parser.parse_known_args(argv)  # to argparse the flag of a script is an option that it does not know
    if flags and not args.take_from:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    args.take_from = [*(args.take_from or []), *flags]
    if len(args.take_from) == 1:
        parser.error("--take-from needs a script and at least one name.")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = parse_args(argv)
    scripts = sorted(args.folder.glob("train_*.py"))
    try:
        if args.take_from:
            source, *names = args.take_from
            path = args.folder / pathlib.Path(source).name
            if path not in scripts:
                raise ValueError(f"--take-from {source} is not one of {', '.join(script.name for script in scripts)}.")
            print("\n".join(take_from(path, names, scripts) or ["nothing to change"]))
        copies = collect_copies(scripts)
    except (ValueError, SyntaxError) as error:
        print(f"check_copies: {error}", file=sys.stderr)
        return 2
    if args.list:
        show_list(copies, scripts)
        return 0
    return check(copies, scripts)


if __name__ == "__main__":
    sys.exit(main())
