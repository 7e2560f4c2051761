from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_what_if_learns(capsys):
    assert load("what_if").main(stretches=4) > 95.0
    assert "stretch 4" in capsys.readouterr().out


def test_drop_in_survives_its_broken_step(capsys):
    assert load("drop_in").main(steps=200, broken_step=120) > 95.0
    assert "step 120: NON_FINITE, back to the state of step 100" in capsys.readouterr().out


def test_ops_alone_improves_the_host_and_keeps_the_poison_out(capsys):
    before, after = load("ops_alone").main()
    assert after < before
    assert "0 non-finite values" in capsys.readouterr().out


def test_ppo_agent_learns_from_the_punishment(capsys):
    module = load("ppo_agent")
    shares = module.main(updates=10)
    assert max(shares[-3:]) < shares[0] / 2
    assert "governor took -" in capsys.readouterr().out


def test_every_example_is_tested():
    """Here, or with the trainers that they are about."""
    tests = [Path(__file__), *(ROOT / "tests" / "integrations").glob("test_*examples.py")]
    tested = {name for path in tests for name in re.findall(r'load\("(\w+)"\)', path.read_text())}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested
