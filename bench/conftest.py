"""How everything is measured: correct first, then warmed up, then side by side; the machine written down."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import detectors
import pytest
import torch
from ceilings import Pass, ceilings
from harness import FULL, QUICK, SMOKE, Effort, Function, interleaved, threads

import tolaria
from tolaria import _extension

OPTIONAL = ("compiled", *detectors.DETECTORS)
"""Implementations that may fail or be missing; why is written down beside the others' figures."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much to run, and where."""
    parser.addoption("--quick", action="store_true", help="the most telling cases alone, in two minutes")
    parser.addoption("--smoke", action="store_true", help="the first case of each bench, to see that it runs")
    parser.addoption("--bench-device", choices=("cpu", "cuda"), help="default: cuda if there is one")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what was not asked for; measure no fallback in the name of the extension."""
    ours = [item for item in items if item.path.name.startswith("bench_")]
    is_measured = ours and not (config.getoption("--smoke") or config.option.collectonly)
    if is_measured and not _extension.LOADED:
        raise pytest.UsageError(f"bench: there is nothing to measure: {_extension.LOAD_ERROR}")
    dropped = []
    if config.getoption("--smoke"):
        seen: set[str] = set()
        for item in ours:
            bench = item.nodeid.partition("[")[0]
            (dropped.append(item) if bench in seen else seen.add(bench))
    elif config.getoption("--quick"):
        dropped = [item for item in ours if item.get_closest_marker("slow")]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


_began: dict[Path, tuple[float, int]] = {}
"""When the first bench of a file began, and how many had failed by then."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[object]:
    """After the last bench of a file, tell how long the file took."""
    start, failed = _began.setdefault(item.path, (time.monotonic(), item.session.testsfailed))
    result = yield
    if nextitem is None or nextitem.path != item.path:
        verdict = "ok" if item.session.testsfailed == failed else "FAILED"
        reporter = item.config.pluginmanager.get_plugin("terminalreporter")
        if item.path.name.startswith("bench_") and reporter is not None:
            reporter.write_line(f"\n{item.path.stem}: {verdict}, {time.monotonic() - start:.0f} s")
    return result


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where the ops run."""
    wanted: str | None = request.config.getoption("--bench-device")
    return wanted or ("cuda" if torch.cuda.is_available() and _extension.CUDA else "cpu")


@pytest.fixture(scope="session")
def effort(request: pytest.FixtureRequest) -> Effort:
    """How long a case is measured."""
    if request.config.getoption("--smoke"):
        return SMOKE
    return QUICK if request.config.getoption("--quick") else FULL


@pytest.fixture(scope="session", autouse=True)
def untimed(request: pytest.FixtureRequest, effort: Effort, device: str) -> None:
    """All that takes long and is not timed, at once and before anything is: files tell what they have.

    ``beside(effort, device)`` starts something in a process of its own and returns how to wait for it;
    ``ahead(effort)`` runs here meanwhile.
    """
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    modules = list(dict.fromkeys(item.module for item in items if item.path.name.startswith("bench_")))
    waits = [module.beside(effort, device) for module in modules if hasattr(module, "beside")]
    for module in modules:
        if hasattr(module, "ahead"):
            module.ahead(effort)
    for wait in waits:
        wait()


def _cpuinfo(key: str) -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith(key))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _caches() -> dict[str, str]:
    """Size of each data cache of core 0, as the system tells."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level, size = (
            (folder / name).read_text().strip() if (folder / name).is_file() else ""
            for name in ("type", "level", "size")
        )
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What the numbers depend on, into the JSON."""
    machine_info.update(
        torch=torch.__version__,
        tolaria=tolaria.__version__,
        extension=_extension.LOADED,
        threads=torch.get_num_threads(),
        processor_name=_cpuinfo("model name"),
        caches=_caches(),
        capability=torch.backends.cpu.get_cpu_capability(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        load_at_start=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """How busy the machine was when everything was over."""
    if hasattr(os, "getloadavg"):
        output_json["machine_info"]["load_at_end"] = os.getloadavg()[0]


@pytest.fixture
def record(benchmark: Any) -> Callable[..., None]:
    """``record(group, impl, samples, calls, **info)``: hand samples taken elsewhere to pytest-benchmark.

    One bench measures several implementations in turn, which pytest-benchmark's own calls cannot: they time
    one after the other. This is the one place that knows how it keeps its figures.
    """
    name, fullname = benchmark.name, benchmark.fullname

    def add(group: str, impl: str, samples: Sequence[float | None], calls: int = 1, **info: object) -> None:
        benchmark.group, benchmark.name, benchmark.fullname = group, f"{name}[{impl}]", f"{fullname}[{impl}]"
        benchmark.extra_info = {"impl": impl, "samples": list(samples), **info}
        benchmark._mode = "pedantic"  # it was used, if not by a call
        stats = benchmark._make_stats(calls)
        for seconds in samples:
            if seconds is not None:
                stats.update(seconds * calls)

    return add


@pytest.fixture
def measure(record: Callable[..., None], device: str, effort: Effort) -> Callable[..., None]:
    """``measure(group, implementations, ...)``: check every result, then time all of them in turn.

    Arguments of the function:
        group: the name of the case.
        implementations: by name; each a function without arguments.
        check: called with each result once, raises if it is wrong.
        unchecked: implementations whose result is another one by design.
        passes: reads and writes of the ceiling.
        moved_bytes: read and written by one call, for bytes per second; default: that of the passes.
        absent: why an implementation that one would expect is not there, by name.
        one_thread: whether torch may use only one.
        full_only: implementations that ``--quick`` goes without, since they take too long.
        fresh: whether the implementations write to new memory, and the cold ceiling is theirs.
        autograd: whether they go forward and backward through a graph, and its ceiling is theirs.
        longer: how many times longer than others it is measured.
        info: more about the fused implementation.
    """

    def run(
        group: str,
        implementations: Mapping[str, Function],
        *,
        check: Callable[[Any], None] | None = None,
        unchecked: Sequence[str] = (),
        passes: Sequence[Pass] = (),
        moved_bytes: int | None = None,
        absent: Mapping[str, str] | None = None,
        one_thread: bool = False,
        full_only: Sequence[str] = ("compiled",),
        fresh: bool = True,
        autograd: bool = False,
        longer: float = 1.0,
        info: Mapping[str, object] | None = None,
    ) -> None:
        with threads(1 if one_thread else 0):
            missing = dict(absent or {})
            functions: dict[str, Function] = {}
            seconds: dict[str, float] = {}
            for name, function in implementations.items():
                if (effort is QUICK and name in full_only) or (effort is SMOKE and name == "compiled"):
                    missing[name] = "only in a full run"
                    continue
                try:
                    start = time.perf_counter()
                    result = function()
                    seconds[name] = 0.0 if name == "compiled" else time.perf_counter() - start
                    if check is not None and name not in unchecked:
                        check(result)
                except Exception as error:
                    if name not in OPTIONAL:
                        raise
                    missing[name] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
                    print(f"{group}: {name}: {missing[name]}")
                else:
                    functions[name] = function
                result = None  # large outputs go before the next one comes
            torch_alone = device == "cuda" or effort is SMOKE
            chosen = ceilings(passes, torch_alone=torch_alone, fresh=fresh, autograd=autograd)
            functions |= {name: function for name, (_, function) in chosen.items()}
            counted = sum(t.nbytes for reads, writes in passes for t in (*reads, *writes))
            # The first call of something small may be slow for once; that of something large is as any.
            known = seconds if counted >= 1 << 26 else {}
            samples, calls = interleaved(functions, effort.times(longer), device, known)
            for name in functions:
                record(
                    group,
                    name,
                    samples[name],
                    calls[name],
                    moved_bytes=counted if moved_bytes is None else moved_bytes,
                    device=device,
                    threads=torch.get_num_threads(),
                    **({"by": chosen[name][0]} if name in chosen else {}),
                    **({"absent": missing, **(info or {})} if name == "fused" else {}),
                )

    return run
