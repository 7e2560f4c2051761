"""What the pages list is what there is: ops, seeds, stages, faults, files, variables, events, options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tolaria import chaos, governor, ops, tasks, train
from tolaria.cli.main import build_parser
from tolaria.nn import SeedStage, list_blueprints
from tolaria.nn.stage import TRANSITIONS
from tolaria.runs import folder
from tolaria.runs.storage import STRUCTURE, TENSORS
from tolaria.telemetry import events

ROOT = Path(__file__).resolve().parents[2]


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def words(text: str) -> set[str]:
    """Everything between single backticks."""
    return set(re.findall(r"`([^`]+)`", text))


def section(text: str, head: str) -> str:
    """From a heading to the next."""
    return re.split(r"^## ", text.partition(f"## {head}\n")[2], flags=re.MULTILINE)[0]


def first_column(text: str) -> set[str]:
    """The names in a table's first column, without their arguments."""
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return {name.partition("(")[0] for cell in cells for name in words(cell)}


def test_every_op_has_a_row():
    schemas = (ROOT / "csrc" / "registration.cpp").read_text(encoding="utf-8")
    registered = set(re.findall(r'"(\w+)\(', schemas)) & set(ops.__all__)
    assert len(registered) >= 9
    assert first_column(page("ops").partition("## ")[0]) == registered


def test_blueprints_and_stages():
    seeds = section(page("growing"), "Seeds")
    built_in = {name for name in list_blueprints() if name in words(seeds)}
    assert built_in == {
        "conv", "depthwise", "squeeze_excite", "norm", "mlp", "low_rank", "attention",
        "dense", "dense_low_rank",
    }  # fmt: skip
    rows = re.findall(r"^\| ([A-Z, ]+) \|", page("growing"), re.MULTILINE)
    assert {name.strip() for row in rows for name in row.split(",")} == set(SeedStage.__members__)
    assert all(len(TRANSITIONS[stage]) < 3 for stage in SeedStage)  # as the drawing below the table has it


def test_faults_and_tasks():
    assert set(train.list_faults()) <= words(section(page("training"), "Breaking a run on purpose"))
    count = len(chaos.list_chaos_faults())
    for text in ((ROOT / "README.md").read_text(encoding="utf-8"), page("governor")):
        assert f"in {count} ways" in text
    listed = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").partition("## ")[2]
    assert all(name in listed for name in tasks.list_tasks() if name in ("digits", "text", "cifar10"))


def test_files_of_a_run():
    rows = first_column(section(page("training"), "The run folder"))
    hidden = {name for name in folder._FILES if name.startswith(".")}
    assert rows == set(folder._FILES) - hidden
    assert {TENSORS, STRUCTURE} <= rows


def test_environment_variables():
    sources = [ROOT / "setup.py", ROOT / "tests" / "conftest.py"]
    sources += [p for part in ("tolaria", "build_tools") for p in (ROOT / part).rglob("*.py")]
    read: set[str] = set()
    for path in sources:
        text = path.read_text(encoding="utf-8")
        read |= set(re.findall(r'(?:environ\.get\(|environ\[|getenv\()\s*"(TOLARIA_\w+)"', text))
    inner = {name for name in read if name.startswith(("TOLARIA_MUTANT", "TOLARIA_SANITIZE"))}
    assert read - inner <= first_column(section(page("building"), "Environment variables"))


def test_kinds_of_events():
    classes = [
        c for c in vars(events).values() if isinstance(c, type) and issubclass(c, events.GovernorEvent)
    ]
    kinds = {c.__name__.removesuffix("Event").lower() for c in classes if c is not events.GovernorEvent}
    assert kinds - words(section(page("governor"), "Telemetry")) == set()


@pytest.mark.parametrize("command", ["train", "chaos", "build", "doctor"])
def test_options_that_pages_name_are_there(command):
    """Each ``--option`` in a code span that belongs to a command of ours."""
    known = set(re.findall(r"--[a-z][a-z-]+", build_parser(command).format_help()))
    parser = build_parser(command)
    known |= set(
        re.findall(r"--[a-z][a-z-]+", parser._subparsers._group_actions[0].choices[command].format_help())
    )
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for span in words(path.read_text(encoding="utf-8")):
            if span.startswith(f"tolaria {command}"):
                assert set(re.findall(r"--[a-z][a-z-]+", span)) <= known, (path.name, span)


def test_settings_that_pages_name_are_there():
    """``GovernorConfig(...)`` in a code span takes what it is given there."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for arguments in re.findall(r"`GovernorConfig\(([^)`]+)\)`", path.read_text(encoding="utf-8")):
            eval(f"GovernorConfig({arguments})", {"GovernorConfig": governor.GovernorConfig, "...": ...})
