"""Layers: a package imports only from those below it, no two files import each other; likewise in csrc."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASE = {"errors", "_arguments", "_build", "_disk", "_fossils", "_optional"}
BACKEND = {"_extension", "_backend", *BASE}
ALLOWED = {
    "errors": set(),
    "_build": {"errors"},
    "_arguments": set(),
    "_disk": set(),
    "_fossils": set(),
    "_optional": {"errors"},
    "reference": BASE,
    "_extension": BASE,
    "_backend": {"_extension", *BASE},
    "ops": {"reference", *BACKEND},
    "nn": {"ops", *BASE},
    "snapshot": {"ops", "_extension", *BASE},
    "telemetry": {"ops", *BASE},
    "governor": {"snapshot", "telemetry", "ops", "_extension", "_moved", *BASE},
    "tasks": {"nn", *BASE},
    "data": {"governor", *BASE},
    "integrations": {"data", "governor", "snapshot", "telemetry", *BASE},
    "train": {"data", "tasks", "nn", "governor", "snapshot", "ops", *BASE},
    "runs": {"snapshot", "telemetry", "ops", "train", "tasks", "nn", "governor", "_backend", *BASE},
    "report": {"runs", "governor", "ops", "_backend", *BASE},
    "chaos": {"train", "data", "tasks", "nn", "governor", "ops", *BASE},
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


def imported_names(path):
    """Everything that the module imports, anywhere in it: inside functions and for type checkers, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_layers(path):
    """First name below ``tolaria`` of everything that the module imports."""
    return {name.split(".")[1] for name in imported_names(path) if name.startswith("tolaria.")}


def module_name(path):
    """The name by which the module is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_imports_from_below(path):
    layer = path.relative_to(ROOT / "tolaria").parts[0].removesuffix(".py")
    if layer == "cli":
        return  # may import everything
    above = imported_layers(path) - ALLOWED[layer] - {layer, "__version__"}
    assert not above, f"{path.relative_to(ROOT)} imports from {sorted(above)}"


def test_no_files_import_each_other():
    files = {module_name(path): path for path in (ROOT / "tolaria").rglob("*.py")}
    imports = {}
    for module, path in files.items():
        # `from a.b import c` is the file a/b/c.py, if there is one, and the name c of a.b otherwise
        names = (name if name in files else name.rpartition(".")[0] for name in imported_names(path))
        imports[module] = {name for name in names if name in files and name != module}
    assert sum(map(len, imports.values())) > 300  # it does see them
    graphlib.TopologicalSorter(imports).prepare()  # a CycleError names the files


def test_the_page_knows_every_folder_and_its_files():
    page = (ROOT / "docs/architecture.md").read_text()
    folders = [path.parent.name for path in (ROOT / "tolaria").glob("*/__init__.py")]
    assert [name for name in folders if f"| `tolaria.{name}` |" not in page] == []
    rooms = ("snapshot", "telemetry", "governor")
    files = [path for path in MODULES if path.parent.name in rooms and path.name != "__init__.py"]
    assert [str(path.relative_to(ROOT)) for path in files if f"`{path.name}`" not in page] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_includes_from_its_layer(path):
    included = {name.split("/")[0] for name in re.findall(r'#include "([^"]+)"', path.read_text())}
    assert included <= CSRC[path.parent.name], f"{path.relative_to(ROOT)} includes {sorted(included)}"


def test_only_one_module_imports_the_extension():
    users = [
        path for path in (ROOT / "tolaria").rglob("*.py") if re.search(r"tolaria\._C\b", path.read_text())
    ]
    assert [path.name for path in users if "import_module" in path.read_text()] == ["_extension.py"]
