"""The house: imports point down the floors, and what every module promises."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "files": 0,
    "progress": 0,
    "losses": 0,
    "codebook": 0,
    "adapters": 0,
    "quantizers": 0,
    "weights": 0,
    "metrics": 0,
    "data": 0,
    "config": 0,
    "priors": 0,
    "prior_config": 0,
    "discriminator": 1,
    "tokenizer": 1,
    "costs": 2,
    "evaluate": 2,
    "train": 2,
    "codes": 2,
    "train_prior": 3,
    "generate": 3,
    "store": 3,
    "plots": 3,
    "trial": 3,
    "prior_trial": 3,
    "child": 4,
    "frames": 3,
    "statistics": 4,
    "charts": 4,
    "report": 4,
    "match": 3,
    "plan": 4,
    "index": 4,
    "cli": 4,
    "run": 4,
    "prior": 4,
    "encode": 4,
    "diff": 4,
    "study": 5,
    "doctor": 4,
}
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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    found = imports(path)
    if path.parent.name == "backbones":
        assert not any(name.startswith(("bench", "studies", "optuna")) for name in found)
        return
    assert not any(name.startswith("studies") for name in found)
    assert path.stem == "index" or not any(name.startswith("optuna") for name in found)
    if path.stem == "__init__":
        return
    here = FLOORS[
        path.relative_to(ROOT / "bench").parts[0].removesuffix(".py")
    ]  # a KeyError here: give the new module its floor
    for name in found:
        parts = name.split(".")
        if parts[0] == "bench" and len(parts) > 1:
            assert FLOORS[parts[1]] <= here, f"{path.name} on floor {here} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_things_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), path
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_torchvision_repair_is_inert_on_a_healthy_install():
    """With torchvision already importable, nothing is defined; on this machine's install either way, timm imports."""
    code = "import backbones.torchvision_repair as r, importlib; importlib.reload(r); print(r.REPAIRED)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
