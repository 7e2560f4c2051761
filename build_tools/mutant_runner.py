"""A pytest plugin that runs the collected tests once for each mutant, in a forked child, until one fails.

Started by mutants.py in the tree with the mutants built in; reads ``jobs.json``, writes ``results.jsonl``.
torch and the tests are imported once. What has killed a mutant of the same file goes first, then short tests.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import time
from collections import Counter
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import Phase, settings

MEMORY = 24 << 30  # address space: a mutant may ask for any amount
PATIENCE = 2.0  # seconds of the processor beyond five times what a test takes without a mutant
DEADLOCK = 300.0  # seconds by the clock


class Runner:
    """One session: a run without a mutant, which must be green, then one for each job."""

    def __init__(self, items: list[pytest.Item]) -> None:
        self.items = items
        self.seconds: dict[str, float] = {}
        self.kills: dict[str, Counter[str]] = {}
        self.budget = float(os.environ.get("TOLARIA_MUTANT_BUDGET", "0"))

    def ordered(self, file: str) -> list[pytest.Item]:
        """The tests, the likely killers of a mutant of this file first, as many as the budget allows."""
        kills = self.kills.setdefault(file, Counter())
        ordered = sorted(
            self.items, key=lambda item: (-kills[item.nodeid], self.seconds.get(item.nodeid, 0.0))
        )
        if not self.budget:
            return ordered
        times = accumulate(self.seconds.get(item.nodeid, 0.0) for item in ordered)
        return [item for item, seconds in zip(ordered, times, strict=True) if seconds <= self.budget]

    def run(
        self, number: int, items: list[pytest.Item], keep_going: bool = False
    ) -> tuple[list[str], str, float]:
        """Fork and test: the tests that failed, how (failed, crashed, hung), and the seconds taken."""
        begin = time.monotonic()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            try:
                _test(number, items, self.seconds, write, keep_going)
            finally:
                os._exit(3)
        os.close(write)
        failed, how = self._watch(child, read)
        os.close(read)
        return failed, how, time.monotonic() - begin

    def _watch(self, child: int, pipe: int) -> tuple[list[str], str]:
        """Follow what a child says of its tests, one line at the begin and one at the end of each."""
        failed: list[str] = []
        current, began, text = "", time.monotonic(), ""
        while True:
            ready = select.select([pipe], [], [], max(0.0, began + DEADLOCK - time.monotonic()))[0]
            if not ready:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return [*failed, current], "hung"
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                break
            text += chunk.decode()
            *lines, text = text.split("\n")
            for line in lines:
                verb, _, name = line.partition(" ")
                if verb == "begin":
                    current, began = name, time.monotonic()
                elif verb == "failed":
                    failed.append(name)
                else:
                    self.seconds.setdefault(current, float(name))
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) in {0, 1}:
            return failed, "failed"
        is_hung = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
        return [*failed, current], "hung" if is_hung else "crashed"


class _Failures:
    """Remembers whether the test that just ran failed."""

    def __init__(self) -> None:
        self.found = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.found |= report.failed


def _switch_on(number: int) -> None:
    from tolaria import _C

    library = ctypes.CDLL(_C.__file__)
    library.tolaria_set_mutant(number)
    for name in os.environ.get("TOLARIA_MUTANT_UNITS", "").split():
        getattr(library, f"tolaria_set_mutant_{name}")(number)


def _test(
    number: int, items: list[pytest.Item], usual: dict[str, float], pipe: int, keep_going: bool
) -> None:
    """In the child: the mutant on, test after test, until one fails."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(null, stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if "TOLARIA_MUTANT_UNITS" not in os.environ:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    _switch_on(number)
    failures, status = _Failures(), 0
    items[0].config.pluginmanager.register(failures)
    for i, item in enumerate(items):
        os.write(pipe, f"begin {item.nodeid}\n".encode())
        begin = time.process_time()
        signal.setitimer(
            signal.ITIMER_PROF, 5 * usual.get(item.nodeid, 30.0) + PATIENCE
        )  # SIGPROF ends the child
        after = items[i + 1] if i + 1 < len(items) else None
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        os.write(pipe, f"took {time.process_time() - begin}\n".encode())
        if failures.found:
            os.write(pipe, f"failed {item.nodeid}\n".encode())
            failures.found, status = False, 1
            if not keep_going:
                break
    os._exit(status)


def pytest_sessionstart() -> None:
    """Hypothesis: the same cases each time, and none made smaller, which takes long and changes no answer."""
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("mutants", deadline=None, derandomize=True, database=None, phases=phases)
    settings.load_profile("mutants")


def pytest_runtestloop(session: pytest.Session) -> bool:
    """Instead of running the tests once."""
    runner = Runner(session.items)
    with Path("results.jsonl").open("a") as results:

        def tell(number: int, killer: str, how: str, seconds: float) -> None:
            results.write(
                json.dumps({"number": number, "by": killer, "how": how, "seconds": round(seconds, 2)}) + "\n"
            )
            results.flush()

        failed, how, seconds = runner.run(0, runner.items, keep_going=True)
        if how != "failed":
            raise pytest.UsageError(f"without a mutant {failed[-1]} {how}")
        for name in failed:
            tell(0, name, "failed", seconds)
        runner.items = [item for item in runner.items if item.nodeid not in failed]
        for job in json.loads(Path("jobs.json").read_text()):
            failed, how, seconds = runner.run(job["number"], runner.ordered(job["file"]))
            if failed:
                runner.kills[job["file"]][failed[-1]] += 1
            tell(job["number"], failed[-1] if failed else "", how if failed else "survived", seconds)
    return True
