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
