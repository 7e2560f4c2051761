"""What tests share: devices, dtypes, shapes, a restored random state, skips that can be made to fail."""

from __future__ import annotations

import importlib.metadata
import os
import random
from collections.abc import Generator, Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import pytest
import torch

import tolaria
from tolaria import _extension

if PathFinder.find_spec("hypothesis") is None:
    import without_hypothesis

    without_hypothesis.install()

from hypothesis import settings

REQUIRE_CUDA = os.environ.get("TOLARIA_REQUIRE_CUDA", "0") == "1"
OPTIONAL = {"matplotlib", "rich", "safetensors", "sklearn", "tensorboard", "expecttest"}
"""What a machine that runs the tests may lack."""


def pytest_configure(config: pytest.Config) -> None:
    """Have hypothesis draw the same examples every time in CI, unless a seed is given."""
    is_fixed = "CI" in os.environ and config.getoption("--hypothesis-seed", None) is None
    settings.register_profile("tolaria", deadline=None, derandomize=is_fixed, print_blob=True)
    settings.load_profile("tolaria")
    _refuse_a_tree_without_extension(config)


def _refuse_a_tree_without_extension(config: pytest.Config) -> None:
    """Refuse to test a source tree without an extension where a built tolaria is installed beside it."""
    here = Path(tolaria.__file__).resolve().parent
    if _extension.LOADED or here.parent != config.rootpath.resolve():
        return
    found = importlib.metadata.distributions(name="tolaria")
    installed = {Path(str(distribution.locate_file("tolaria"))).resolve() for distribution in found}
    if any(folder != here and any(folder.glob("_C.*")) for folder in installed):
        raise pytest.UsageError(
            "this would test the source tree, which has no extension, not the installed tolaria; run "
            "`pytest` instead of `python -m pytest`, or build in place: `python setup.py build_ext --inplace`"
        )


def _missing(item: pytest.Item) -> str | None:
    """What the markers of a test ask for and this machine or build has not."""
    wants_two = item.get_closest_marker("multi_gpu") is not None
    if not wants_two and item.get_closest_marker("cuda") is None:
        return None
    if not torch.cuda.is_available():
        return f"needs a CUDA device, torch {torch.__version__} sees none"
    if wants_two and torch.cuda.device_count() < 2:
        return "needs two CUDA devices, torch sees one"
    return (
        None if _extension.CUDA else f"needs CUDA kernels: {_extension.LOAD_ERROR or 'this is a CPU build'}"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a CUDA test where it cannot run; fail it there under ``TOLARIA_REQUIRE_CUDA=1``."""
    missing = _missing(item)
    if missing is not None:
        (pytest.fail if REQUIRE_CUDA else pytest.skip)(missing)


def _absent_package(error: BaseException | None) -> str | None:
    """The optional package that an error, or what caused it, could not import since it is not installed."""
    while error is not None:
        name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if name in OPTIONAL and PathFinder.find_spec(name) is None:
            return name
        error = error.__cause__ or error.__context__
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that needs a package which this machine lacks, itself or by a fixture, is skipped by name."""
    report = yield
    name = _absent_package(call.excinfo.value) if call.excinfo is not None and report.failed else None
    if name is not None:
        report.outcome = "skipped"
        reason = f"Skipped: needs {name}, which is not installed"
        report.longrepr = (str(item.path), (item.location[1] or 0) + 1, reason)
    return report


@pytest.fixture(autouse=True)
def rng() -> Iterator[torch.Generator]:
    """A generator seeded with 0; the global random streams are seeded too, and left as they were found."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield torch.Generator().manual_seed(0)
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device type with kernels."""
    return torch.device(request.param)


DTYPES = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each dtype the ops take."""
    return request.param


SHAPES = {"empty": (0,), "scalar": (), "one": (1,), "odd": (33,), "matrix": (7, 65), "image": (2, 3, 5, 7)}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request: pytest.FixtureRequest) -> tuple[int, ...]:
    """Shapes with the usual corner cases: empty, 0-dim, one, not a multiple of any vector width."""
    return request.param
