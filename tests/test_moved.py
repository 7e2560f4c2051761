"""Former paths of modules: they give what is there now, and a warning; pickles that name them load."""

import importlib
import pickle
import subprocess
import sys

import pytest

from tolaria import _moved
from tolaria.governor import GovernorReport, PanicReason, RollbackEvent


@pytest.fixture(autouse=True)
def as_if_never_imported(monkeypatch):
    """A former path warns where it is imported first; others may have done so in this process."""
    for name in _moved.MOVED:
        forget(monkeypatch, name)


def forget(monkeypatch, name):
    """Let nobody have imported it."""
    monkeypatch.delitem(sys.modules, name, raising=False)
    package, _, leaf = name.rpartition(".")
    monkeypatch.delitem(vars(sys.modules[package]), leaf, raising=False)


@pytest.mark.parametrize("name", _moved.MOVED)
def test_former_path_warns_its_importer_and_gives_what_is_there(name):
    homes = [importlib.import_module(home) for home in _moved.MOVED[name]]
    with pytest.warns(DeprecationWarning, match=rf"{name} has moved to {homes[0].__name__}") as told:
        exec(compile(f"import {name} as former", "their_script.py", "exec"), found := {"__name__": "theirs"})
    assert [warning.filename for warning in told] == ["their_script.py"]
    for home in homes:
        for public in (n for n, v in vars(home).items() if getattr(v, "__module__", None) == home.__name__):
            assert getattr(found["former"], public) is getattr(home, public)
    assert importlib.import_module(name) is found["former"]  # without another warning


def test_each_way_to_import_one(monkeypatch):
    from tolaria.snapshot import slots as now

    for statement in (
        "import tolaria; former = tolaria.governor.slots",
        "from tolaria.governor import slots as former",
        "import tolaria.governor.slots as former",
    ):
        forget(monkeypatch, "tolaria.governor.slots")
        with pytest.warns(DeprecationWarning, match="has moved"):
            exec(statement, found := {})
        assert found["former"] is now
    assert now.__spec__.name == now.__name__ == "tolaria.snapshot.slots"


def test_former_names():
    from tolaria.snapshot.covered import CoveredState

    with pytest.warns(DeprecationWarning, match="has moved"):
        former = importlib.import_module("tolaria.governor.tracked")
    assert former.TrackedState is CoveredState
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        former.Nothing  # noqa: B018


def test_pickle_that_names_former_paths_loads():
    thresholds = (10.0, 2.0, 3.0)
    report = GovernorReport(
        reason=PanicReason.ANOMALY, step=7, loss=99.0, mean=1.0, std=0.1, thresholds=thresholds, steps_lost=3,
        consecutive_panics=2, restored_capture=1, restored_step=4, reward=-10.0, rollback_count=1,
    )  # fmt: skip
    event = RollbackEvent(step=7, report=report, bytes=1024)
    now = pickle.dumps(event, protocol=0)
    former = now.replace(b"tolaria.telemetry.", b"tolaria.governor.")
    assert former.count(b"tolaria.governor.") == 2
    with pytest.warns(DeprecationWarning, match="has moved"):
        assert pickle.loads(former).as_dict() == event.as_dict()


def test_nothing_else_is_found():
    import tolaria.governor

    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("tolaria.governor.never_was")
    with pytest.raises(AttributeError, match="never_was"):
        tolaria.governor.never_was  # noqa: B018


def test_tolaria_itself_uses_no_former_path():
    code = """
import pkgutil, importlib, sys, tolaria
from tolaria import _moved
from tolaria.governor import GovernorReport, PanicReason, RollbackEvent
for module in pkgutil.walk_packages(tolaria.__path__, "tolaria."):
    # an adapter imports its trainer, which may be missing, or use what torch has deprecated
    if not module.name.endswith("__main__") and not module.name.startswith("tolaria.integrations."):
        importlib.import_module(module.name)
assert not _moved.MOVED.keys() & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-W", "error::DeprecationWarning", "-c", code], check=True)
