"""How everything is measured: correct first, then warmed up and in batches, the machine written down."""

from __future__ import annotations

import math
import os
import platform
import time

import pytest
import torch

import tolaria


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--quick`` for two minutes of the most telling cases; ``--bench-threads`` for a number of threads."""
    parser.addoption("--quick", action="store_true", help="the most telling cases alone, fewer rounds")
    parser.addoption("--bench-threads", type=int, default=0, help="threads of torch (default: all)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under ``--quick``, leave out what is marked slow."""
    if config.getoption("--quick"):
        skip = pytest.mark.skip(reason="not in --quick")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def threads(request):
    """The number of threads asked for, over the whole session."""
    if request.config.getoption("--bench-threads"):
        torch.set_num_threads(request.config.getoption("--bench-threads"))
    return torch.get_num_threads()


def pytest_benchmark_update_machine_info(config, machine_info):
    """What the numbers depend on, into the JSON."""
    machine_info["torch"] = torch.__version__
    machine_info["tolaria"] = tolaria.__version__
    machine_info["threads"] = config.getoption("--bench-threads") or torch.get_num_threads()
    machine_info["load_at_start"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    machine_info["processor_name"] = _processor()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


@pytest.fixture
def measure(benchmark, request):
    """``measure(function, group=..., impl=..., moved_bytes=...)``: check the result, then time it."""

    def run(function, *, group, impl, moved_bytes, expected=None, check=None):
        if check is not None:
            check(function(), expected)
        start = time.perf_counter()
        function()
        once = time.perf_counter() - start
        quick = request.config.getoption("--quick")
        budget = 0.15 if quick else 0.6  # seconds for a case
        iterations = max(1, min(2000, math.ceil(1e-3 / max(once, 1e-7))))
        rounds = max(7, min(60, int(budget / max(once * iterations, 1e-7))))
        benchmark.group = group
        benchmark.extra_info.update(impl=impl, moved_bytes=moved_bytes, device="cpu")
        benchmark.pedantic(function, rounds=rounds, iterations=iterations, warmup_rounds=2)

    return run
