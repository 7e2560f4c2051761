"""Layers: a package imports only from those below it, and csrc keeps its own order."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASE = {"errors", "_optional", "_sources"}
BACKEND = {"_extension", "_backend", *BASE}
ALLOWED = {
    "errors": set(),
    "_optional": {"errors"},
    "reference": BASE,
    "_extension": BASE,
    "_backend": {"_extension", *BASE},
    "ops": {"reference", *BACKEND},
    "nn": {"ops", *BASE},
    "governor": {"ops", "_extension", *BASE},
    "tasks": {"nn", *BASE},
    "train": {"tasks", "nn", "governor", "ops", *BASE},
    "runs": {"train", "tasks", "nn", "governor", "_backend", *BASE},
    "chaos": {"train", "tasks", "nn", "governor", "ops", *BASE},
}
CSRC = {
    "math": {"math"},
    "common": {"math", "common"},
    "cpu": {"math", "common", "cpu", "ops.h"},
    "cuda": {"math", "common", "cuda", "ops.h"},
    "autograd": {"common", "autograd", "ops.h"},
    "csrc": {"math", "ops.h"},
}
MODULES = sorted(path for path in (ROOT / "tolaria").rglob("*.py") if path.parent != ROOT / "tolaria")
MODULES += [ROOT / "tolaria" / name for name in ("errors.py", "_extension.py", "_backend.py")]
SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*.*") if path.parent.name in CSRC)


def imported_layers(path):
    """First name below ``tolaria`` of everything that the module imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [
                f"{node.module}.{alias.name}" if node.module == "tolaria" else node.module
                for alias in node.names
            ]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("tolaria."))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_imports_from_below(path):
    layer = path.relative_to(ROOT / "tolaria").parts[0].removesuffix(".py")
    if layer == "cli":
        return  # may import everything
    above = set(imported_layers(path)) - ALLOWED[layer] - {layer, "__version__"}
    assert not above, f"{path.relative_to(ROOT)} imports from {sorted(above)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_includes_from_its_layer(path):
    included = {name.split("/")[0] for name in re.findall(r'#include "([^"]+)"', path.read_text())}
    assert included <= CSRC[path.parent.name], f"{path.relative_to(ROOT)} includes {sorted(included)}"


def test_only_one_module_imports_the_extension():
    users = [
        path for path in (ROOT / "tolaria").rglob("*.py") if re.search(r"tolaria\._C\b", path.read_text())
    ]
    assert [path.name for path in users if "import_module" in path.read_text()] == ["_extension.py"]
