"""The house: imports point down the floors, and what every module promises."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A room imports from itself and from those before it; commands import from all rooms, and from no other command.
ROOMS = (
    *("core", "data", "metrics", "quantizers", "instruments", "training", "tokenizers", "guests"),
    *("priors", "analysis", "sweeps", "speeds"),
)
MODULES = sorted((ROOT / "bench").glob("**/*.py")) + sorted((ROOT / "backbones").glob("*.py"))


def imports(path: Path) -> set[str]:
    """Absolute names of all modules that ``path`` imports from this project or Optuna."""
    package = path.relative_to(ROOT).parent.parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("bench", "backbones", "studies", "optuna")}


def room_of(module: str) -> int:
    """Place in ROOMS of a module of bench; a command's is after all of them."""
    parts = module.split(".")
    return ROOMS.index(parts[1]) if len(parts) > 1 and parts[1] in ROOMS else len(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    """backbones know nobody, rooms only those before them, and Optuna is known to the room of sweeps alone."""
    found, here = imports(path), ".".join(path.relative_to(ROOT).with_suffix("").parts)
    assert not any(name.startswith("studies") for name in found)
    if here.startswith("backbones"):
        assert not any(name.startswith(("bench", "optuna")) for name in found)
        return
    assert here.startswith("bench.sweeps.") or not any(name.startswith("optuna") for name in found)
    for name in found:
        if name.startswith("bench."):
            assert room_of(name) <= room_of(here), f"{here} imports {name}"
            assert room_of(name) < len(ROOMS) or here == "bench.__init__", f"{here} imports the command {name}"


def test_the_house_shows_its_rooms_and_commands():
    """Whatever else lies in bench/ needs a place in this list, or in a room."""
    commands = {
        "run",
        "prior",
        "encode",
        "reconstruct",
        "score",
        "export",
        "study",
        "report",
        "diff",
        "doctor",
        "speed",
        "shard",
    }
    there = {path.stem for path in (ROOT / "bench").iterdir() if not path.name.startswith("__")}
    assert there - {"training"} == {*ROOMS, *commands} - {"training"}


def test_a_study_file_needs_one_import():
    for path in (ROOT / "studies").glob("[a-z]*.py"):
        statements = ast.parse(path.read_text()).body
        assert sum(isinstance(node, (ast.Import, ast.ImportFrom)) for node in statements) == 1, path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_things_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), path
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_torchvision_repair_is_inert_on_a_healthy_install():
    """With torchvision already importable, nothing is defined; on this machine's install either way, timm imports."""
    code = "from backbones.torchvision_repair import repair; repair(); repair.cache_clear(); print(repair())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
