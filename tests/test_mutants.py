"""The edits of ``tests/mutants`` fit the code as it is, and what tries them tells killed from survived."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutants.__main__ import Edit, edits

ROOT = Path(__file__).parent.parent
EDITS = edits()


def named_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


TESTS = Path(__file__).parent
KNOWN = {path.relative_to(TESTS).as_posix(): named_in(path) for path in TESTS.rglob("test_*.py")}


def misplaced(edit: Edit) -> Iterator[str]:
    """What is wrong with ``edit`` itself: sentences."""
    text = edit.applied(ROOT)
    if text is None:
        yield f"{edit.find!r} is not there exactly once: find its new place, or give more of it (tests/mutants)"
    else:
        try:
            ast.parse(text)
        except SyntaxError as error:
            yield f"{edit.put!r} in its place does not parse: {error}"
    if edit.put == edit.find:
        yield f"{edit.find!r} changes nothing"
    if not edit.tests:
        yield "names no test"
    for test in edit.tests:
        file, _, name = test.partition("::")
        if name.partition("[")[0] not in KNOWN.get(file, set()):
            yield f"there is no {test}"


@pytest.mark.parametrize("file", sorted({edit.file for edit in EDITS}))
def test_an_edit_applies_once_and_names_tests_that_exist(file):
    """Every edit of the file; one test for each of the thousands would take longer than they do."""
    assert [f"{edit.states}: {told}" for edit in EDITS if edit.file == file for told in misplaced(edit)] == []


def test_an_edit_out_of_place_is_told():
    here, test = "tests/test_mutants.py", "test_mutants.py::test_outcomes_are_told_apart"
    once = "def named_" + "in("  # in two parts, or it would be here a second time
    wrong = {
        "exactly once": Edit(here, "import", "export", (test,), "x"),
        "does not parse": Edit(here, once, "def (", (test,), "x"),
        "changes nothing": Edit(here, once, once, (test,), "x"),
        "names no test": Edit(here, once, "def named(", (), "x"),
        "there is no": Edit(here, once, "def named(", ("test_mutants.py::test_x",), "x"),
    }
    for words, edit in wrong.items():
        (told,) = misplaced(edit)
        assert words in told


def test_there_are_many_edits_and_no_two_are_the_same():
    assert len(EDITS) >= 250
    assert len({edit[:3] for edit in EDITS}) == len(EDITS)


def test_every_source_file_with_logic_is_edited():
    """A new file is on the list, too."""
    files = {str(path.relative_to(ROOT)) for folder in ("bench", "backbones") for path in (ROOT / folder).rglob("*.py")}
    bare = {file for file in files if not ast.parse((ROOT / file).read_text(encoding="utf-8")).body[1:]}
    exempt = {"bench/core/errors.py", "bench/data/__init__.py", "bench/guests/__init__.py"}  # names alone
    exempt |= {"bench/priors/models/__init__.py"}
    assert files - bare - exempt - {edit.file for edit in EDITS} == set()


def test_the_page_of_promises_names_tests_that_exist():
    """And all seventeen bugs of public code have theirs."""
    page = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)?test_\w+\.py)(?:::(test_\w+))?`", page)
    assert named
    for file, name in named:
        assert file in KNOWN, file
        assert not name or name in KNOWN[file], f"{file}::{name}"
    bugs = re.findall(r"^\| (\d+) \|.*`(?:\w+/)?test_\w+\.py::test_\w+`.*\|$", page, re.M)
    assert [int(number) for number in bugs] == list(range(1, 18))


def test_outcomes_are_told_apart(tmp_path):
    """On a project of two functions, one of them untested, from a process that has imported little."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "arithmetic.py").write_text("def double(x):\n    return 2 * x\n\ndef half(x):\n    return x / 2\n")
    (tmp_path / "tests/test_doubling.py").write_text(
        "from arithmetic import double\n\ndef test_double():\n    assert double(3) == 6\n"
        "\ndef test_wrong():\n    assert double(3) == 7\n"
    )
    test = ("test_doubling.py::test_double",)
    tried = [
        Edit("arithmetic.py", "2 * x", "3 * x", test, "killed"),
        Edit("arithmetic.py", "x / 2", "x / 3", test, "survived"),
        Edit("arithmetic.py", "x", "y", test, "inapplicable"),  # occurs several times
        Edit("arithmetic.py", "2 * x", "2 *", test, "inapplicable"),  # does not import
        Edit("arithmetic.py", "2 * x", "2 - x", test, "killed"),  # the edits before it were taken back
    ]
    program = (
        "import json, sys\nfrom pathlib import Path\nfrom rich.console import Console\n"
        "from tests.mutants.__main__ import Edit, run\n"
        "tried = [Edit(*row) for row in json.loads(sys.argv[2])]\n"
        "jobs, healthy = run(tried, Path(sys.argv[1]), 2, Console(stderr=True))\n"
        "print(json.dumps([healthy, {job.edit.find + job.edit.put: job.outcome for job in jobs}]))"
    )

    def outcomes(rows):
        command = [sys.executable, "-c", program, str(tmp_path), json.dumps(rows)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    assert outcomes(tried) == [True, {edit.find + edit.put: edit.states for edit in tried}]
    assert outcomes([tried[0]._replace(tests=("test_doubling.py::test_wrong",))]) == [False, {}]
