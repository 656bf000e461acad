"""The checker of copies on made-up scripts, and the shape of the real scripts: rooms, sizes, flags.

`make check` runs this file without conftest.py: it needs pytest and the standard library only.
"""

from __future__ import annotations

import ast
import pathlib
import re

import check_copies
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("train_*.py"))
ROOMS = [
    "Types",
    "Objective",
    "Data",
    "Training",
    "Arguments",
    "Setup",
    "Models",
    "Cache",
    "Optimization",
    "Checkpoints",
    "Validation and export",
    "Logging",
    "Main",
]
BANNER = re.compile(r"^# -+ (.+?) -+$", re.MULTILINE)
LINE_LENGTH = 119
FUNCTION_LINES = 60
CLOSURE_LINES = 20
FLAG_LINES = 5
LINES_OF = {"compute_loss": 50, "add_flags": 210}  # a list of flags is read by looking up, not from end to end
ACCEPTED_ONLY = {"foreach_ema", "from_pt", "local_rank"}  # flags of old commands that ask for what is always done

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# ---- The checker of copies ------------------------------------------------------------------------------------------

FIRST = '''"""One script."""

SIZE = 3
LIMIT: int = 4


# ---- Data ----
# Why it halves.
@cached
def halve(x):
    """Return half of `x`."""
    return x / 2  # exact in binary


class Progress:
    """Count."""

    step = 0


def add_flags(parser):
    """Add all flags."""
    add = parser.add_argument_group("size").add_argument
    add("--size", type=int,
        help="How large.")
    add("--speed", type=int, help="How fast.")


def main():
    halve(1)
'''
SECOND = FIRST.replace("One script", "Another").replace("halve(1)", "halve(2)")


@pytest.fixture
def folder(tmp_path):
    """Two scripts that differ in their docstring and in `main`, as they may."""
    (tmp_path / "train_a.py").write_text(FIRST)
    (tmp_path / "train_b.py").write_text(SECOND)
    return tmp_path


def run_check(folder, *argv):
    return check_copies.main(["--folder", str(folder), *argv])


def edit(script, old, new):
    text = script.read_text()
    assert old in text
    script.write_text(text.replace(old, new))


def test_equal_copies_pass(folder, capsys):
    assert run_check(folder) == 0
    assert "2 scripts, 6 shared helpers, 0 drifted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("x / 2", "x * 0.5", "halve"),
        ("half of", "a half of", "halve"),
        ("# exact in binary", "# exact", "halve"),
        ("# Why it halves.", "# Why.", "halve"),
        ("@cached", "@kept", "halve"),
        ("step = 0", "step = 1", "Progress"),
        ("SIZE = 3", "SIZE = 5", "SIZE"),
        ("LIMIT: int = 4", "LIMIT: int = 9", "LIMIT"),
        ("How large.", "How big.", "--size"),
    ],
)
def test_drift_is_found_in_every_part(folder, capsys, old, new, name):
    edit(folder / "train_b.py", old, new)
    assert run_check(folder) == 1
    out = capsys.readouterr().out
    assert f"{name} differs:" in out
    assert out.count("differs:") == 1
    assert re.search(r"^-.*" + re.escape(old), out, re.MULTILINE)
    assert re.search(r"^\+.*" + re.escape(new), out, re.MULTILINE)


def test_two_constants_drift_apart_from_each_other(folder, capsys):
    edit(folder / "train_b.py", "SIZE = 3\nLIMIT: int = 4", "SIZE = 4\nLIMIT: int = 3")
    assert run_check(folder) == 1
    out = capsys.readouterr().out
    assert "SIZE differs:" in out
    assert "LIMIT differs:" in out


def test_place_and_banner_do_not_count(folder):
    edit(folder / "train_b.py", "# ---- Data ----\n", "# ---- Setup ----\n")
    edit(folder / "train_b.py", "SIZE = 3\nLIMIT: int = 4\n", "LIMIT: int = 4\n\nSIZE = 3\n")
    assert run_check(folder) == 0


def test_own_names_may_differ_and_a_needless_one_is_reported(folder, capsys):
    run_check(folder)
    assert "main is in OWN" not in capsys.readouterr().out
    edit(folder / "train_b.py", "halve(2)", "halve(1)")
    assert run_check(folder) == 0
    assert "main is in OWN and yet the same in every script" in capsys.readouterr().out


def test_the_same_flag_is_the_same_in_functions_that_differ(folder, capsys):
    edit(folder / "train_b.py", '    add("--speed", type=int, help="How fast.")\n', "")
    assert run_check(folder) == 0
    edit(folder / "train_a.py", "type=int,\n ", "type=float,\n ")
    assert run_check(folder) == 1
    assert capsys.readouterr().out.count("differs:") == 1
    assert run_check(folder, "--take-from", "train_a.py", "--size", "halve") == 0
    assert "type=float,\n" + " " * 8 + 'help="How large.")\n\n\ndef main' in (folder / "train_b.py").read_text()


@pytest.mark.parametrize("source", ["train_a.py", "train_b.py"])
def test_take_from_mends_all_others_from_either_side(folder, capsys, source):
    (folder / "train_c.py").write_text(FIRST)
    edit(folder / source, "x / 2  # exact in binary", "x / 2\n    # exact in binary")
    edit(folder / source, "SIZE = 3", "SIZE = (\n    3\n)")
    assert run_check(folder) == 1
    assert run_check(folder, "--take-from", source, "halve", "SIZE") == 0
    assert "2 scripts" not in capsys.readouterr().err
    for script in folder.glob("train_*.py"):
        assert "return x / 2\n    # exact in binary\n\n\nclass" in script.read_text()
        assert "SIZE = (\n    3\n)\nLIMIT" in script.read_text()
    assert "halve(2)" in (folder / "train_b.py").read_text()


def test_take_from_names_scripts_with_a_text_of_their_own(folder, capsys, monkeypatch):
    """What calls it may have changed with it."""
    monkeypatch.setitem(check_copies.OWN_OF, "train_b.py", {"halve"})
    edit(folder / "train_a.py", "x / 2", "x * 0.5")
    before = (folder / "train_b.py").read_text()
    assert run_check(folder, "--take-from", "train_a.py", "halve") == 0
    assert "train_b.py: halve has its own text" in capsys.readouterr().out
    assert (folder / "train_b.py").read_text() == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train_a.py", "main"], "main is in OWN"),
        (["train_a.py", "absent"], "absent is no helper or flag of train_a.py"),
        (["train_a.py", "--absent"], "--absent is no helper or flag of train_a.py"),
        (["train_z.py", "halve"], "train_z.py is not one of train_a.py, train_b.py"),
    ],
)
def test_take_from_refuses(folder, capsys, argv, message):
    assert run_check(folder, "--take-from", *argv) == 2
    assert message in capsys.readouterr().err


def test_list_marks_each_name(folder, capsys):
    edit(folder / "train_b.py", "SIZE = 3", "SIZE = 5")
    edit(folder / "train_b.py", "LIMIT", "BOUND")
    assert run_check(folder, "--list") == 0
    rows = capsys.readouterr().out.splitlines()
    assert {"x  x  SIZE", "=  =  halve", "o  o  main", ".     LIMIT", "   .  BOUND"} <= set(rows)


def test_copies_in_the_real_scripts_are_equal(capsys):
    status = check_copies.main([])
    assert status == 0, capsys.readouterr().out


# ---- The shape of the real scripts ----------------------------------------------------------------------------------


@pytest.fixture(params=SCRIPTS, ids=lambda path: path.stem, scope="module")
def script(request):
    """Each training script in turn."""
    return request.param


@pytest.fixture(scope="module")
def source(script):
    return script.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tree(source):
    return ast.parse(source)


def count_lines(node):
    return node.end_lineno - node.lineno + 1


def find_functions(node):
    return [child for child in ast.walk(node) if isinstance(child, FUNCTIONS)]


def find_flags(tree):
    """Return the calls that add a flag and the name under which `args` holds the value of each."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and getattr(call.func, "id", None) in ("add", "switch"):
            dest = next((keyword.value.value for keyword in call.keywords if keyword.arg == "dest"), None)
            yield call, dest or call.args[0].value.removeprefix("--")


def find_reads(tree):
    """Return every NAME of `args.NAME`, read or written, as {name: is it read anywhere}."""
    reads = {}
    for node in ast.walk(tree):
        owner = getattr(node, "value", None)  # `args`, or the `self.args` of a class that keeps it
        if isinstance(node, ast.Attribute) and "args" in (getattr(owner, "id", None), getattr(owner, "attr", None)):
            reads[node.attr] = reads.get(node.attr, False) or isinstance(node.ctx, ast.Load)
    return reads


def test_rooms_stand_in_their_order(source):
    rooms = BANNER.findall(source)
    if "Networks" in rooms:  # JAX has no library that brings them
        assert rooms.pop(rooms.index("Training") + 1) == "Networks"
    assert rooms == ROOMS
    assert {len(match.group()) for match in BANNER.finditer(source)} == {LINE_LENGTH}


def test_shared_helpers_stand_in_the_same_room():
    rooms = {}
    for script in SCRIPTS:
        lines = check_copies.read_lines(script)
        for name, helper in check_copies.read_helpers(script).items():
            rooms.setdefault(name, set()).update(BANNER.findall("".join(lines[: helper.stop]))[-1:])
    assert {name: found for name, found in rooms.items() if len(found) > 1} == {}


def test_script_has_a_docstring_and_ends_in_main(tree):
    assert ast.get_docstring(tree)
    functions = [node for node in tree.body if isinstance(node, FUNCTIONS)]
    assert functions[-1].name == "main"


def test_script_is_whole(tree):
    local = {path.stem for path in ROOT.glob("*.py")} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name.split(".")[0] in local | {""}} == set()


def test_docstring_has_a_map_of_what_is_there(tree):
    """It names what to read and what to edit: five things at the top level."""
    section = ast.get_docstring(tree).partition("Read these; the rest is plumbing:\n\n")[2].partition("\n\n")[0]
    names = [line.split()[0] for line in section.splitlines()]
    assert len(names) == 5
    assert set(names) <= {getattr(node, "name", None) for node in tree.body}


def test_functions_are_not_too_long(tree):
    sizes = {function.name: count_lines(function) for function in find_functions(tree)}
    assert {name: size for name, size in sizes.items() if size > LINES_OF.get(name, FUNCTION_LINES)} == {}


def test_functions_inside_functions_are_short(tree):
    inner = {
        inside.name: count_lines(inside)
        for outside in find_functions(tree)
        for inside in find_functions(outside)
        if inside is not outside
    }
    assert {name: size for name, size in inner.items() if size > CLOSURE_LINES} == {}


def test_every_flag_is_read(tree):
    reads = find_reads(tree)
    unread = {name for _, name in find_flags(tree) if not reads.get(name)}
    assert unread <= ACCEPTED_ONLY


def test_every_value_read_has_a_flag(tree):
    defined = {name for _, name in find_flags(tree)}
    assert sorted(set(find_reads(tree)) - defined) == []


def test_flags_are_short_and_never_bool(tree):
    flags = list(find_flags(tree))
    assert {name: count_lines(call) for call, name in flags if count_lines(call) > FLAG_LINES} == {}
    types = {name: keyword.value for call, name in flags for keyword in call.keywords if keyword.arg == "type"}
    assert [name for name, value in types.items() if getattr(value, "id", None) == "bool"] == []


def test_script_does_not_print(tree):
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if getattr(call.func, "id", None) == "print"] == []
