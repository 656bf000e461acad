"""How large the scripts may become. Tokens are limited together with lines, so that nobody wins by packing.

`make check` runs this file without conftest.py: it needs pytest and the standard library only.
"""

from __future__ import annotations

import ast
import io
import pathlib
import tokenize

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Lines, and tokens of code (without comments, docstrings, line ends): what each script has come down to and must not
# exceed, and where it is to end.
REACHED = {
    "train_text_to_image.py": (2355, 18_985),
    "train_text_to_image_lora.py": (2447, 19_732),
    "train_text_to_image_sdxl.py": (2378, 19_069),
    "train_text_to_image_lora_sdxl.py": (2518, 20_197),
    "train_text_to_image_flax.py": (2815, 24_779),
}
GOALS = {
    "train_text_to_image.py": (2400, 19_000),
    "train_text_to_image_lora.py": (2550, 20_000),
    "train_text_to_image_sdxl.py": (2400, 19_000),
    "train_text_to_image_lora_sdxl.py": (2550, 20_000),
    "train_text_to_image_flax.py": (3250, 27_500),
}
COMPUTE_LOSS_LINE = 350  # what people read first stands first
NOT_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING,
            tokenize.ENDMARKER}
# From Python 3.12 on an f-string is a token at its start, those of its parts, and one at its end, which alone counts.
FSTRING_START, FSTRING_END = (getattr(tokenize, name, None) for name in ("FSTRING_START", "FSTRING_END"))
NOT_CODE |= {FSTRING_START}


def count_tokens(source: str) -> int:
    """Return the number of tokens of code."""
    with_docstring = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {node.body[0].lineno for node in ast.walk(ast.parse(source))
                  if isinstance(node, with_docstring) and ast.get_docstring(node, clean=False) is not None}
    count = depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        depth -= token.type == FSTRING_END
        is_docstring = token.type == tokenize.STRING and token.start[0] in docstrings
        count += depth == 0 and token.type not in NOT_CODE and not is_docstring
        depth += token.type == FSTRING_START
    return count


def test_tokens_are_those_of_code():
    source = '"""One."""\n\n\ndef halve(x):  # two\n    """Three."""\n    return (\n        x / f"{f(2)}"\n    )\n'
    assert count_tokens(source) == len("def halve ( x ) : return ( x / STRING )".split())


def test_every_script_has_a_limit():
    assert REACHED.keys() == GOALS.keys() == {path.name for path in ROOT.glob("train_*.py")}


@pytest.mark.parametrize("name", REACHED)
def test_script_has_not_grown(name):
    source = (ROOT / name).read_text(encoding="utf-8")
    lines, tokens, limits = len(source.splitlines()), count_tokens(source), REACHED[name]
    assert lines <= limits[0] and tokens <= limits[1], (
        f"{lines} lines and {tokens} tokens, above {limits}: take something out; the goal is {GOALS[name]}")


@pytest.mark.parametrize("name", GOALS)
def test_the_objective_stands_near_the_top(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    (at,) = (number for number, line in enumerate(lines, 1) if line.startswith("def compute_loss("))
    assert at <= COMPUTE_LOSS_LINE
