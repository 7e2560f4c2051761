"""The examples for trainers do what they say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from trainers import need

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_lightning_callback_saves_nothing_poisoned(capsys: pytest.CaptureFixture[str]) -> None:
    need("lightning.pytorch")
    loss, poisoned = load("lightning_callback").main()
    assert loss < 0.4
    assert poisoned == 0
    assert "step 61: GRADIENT_NORM, back to the state of step 25" in capsys.readouterr().out


def test_accelerate_guard_saves_nothing_poisoned(capsys: pytest.CaptureFixture[str]) -> None:
    need("accelerate")
    loss, poisoned = load("accelerate_guard").main()
    assert loss < 0.5
    assert poisoned == 0
    assert "step 91: NON_FINITE_STATE, back to the state of step 25" in capsys.readouterr().out


def test_transformers_callback_saves_nothing_poisoned(capsys: pytest.CaptureFixture[str]) -> None:
    need("transformers")
    loss, poisoned = load("transformers_callback").main()
    assert loss < 0.6
    assert poisoned == 0
    told = capsys.readouterr().out
    assert "step 61: GRADIENT_NORM, back to the state of step 25" in told
    assert "step 90: NON_FINITE_STATE" in told


def test_ignite_handler_saves_nothing_poisoned(capsys: pytest.CaptureFixture[str]) -> None:
    need("ignite.engine")
    loss, poisoned = load("ignite_handler").main()
    assert loss < 0.4
    assert poisoned == 0
    told = capsys.readouterr().out
    assert "step 60: NON_FINITE, back" in told
    assert "step 160: NON_FINITE_STATE, back" in told


def test_sb3_guard_survives_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    need("stable_baselines3")
    rollbacks, share = load("sb3_guard").main()
    assert rollbacks == 1
    assert share < 0.2  # of four actions
    told = capsys.readouterr().out
    assert "step 50: NON_FINITE, back" in told
    assert int(told.split(" runs were wrecked")[0].split()[-1]) > 20
