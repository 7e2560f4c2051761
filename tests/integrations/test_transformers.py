"""``TolariaCallback`` in Transformers' ``Trainer``: nine faults."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from faulty_runs import FAULTS, NAN_FAULTS, Fault
from trainers import need, poisoned_files

need("transformers")

from transformers_runs import governed, is_sane  # noqa: E402


def strict(path: Path) -> dict:
    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_survives(name: str, tmp_path: Path) -> None:
    run = governed(tmp_path, Fault(name))
    governor, recorder = run.callback.governor, run.records.recorder
    assert run.trainer.state.global_step == 140
    assert run.evaluation() < 0.3
    assert is_sane(run.losses)
    assert run.losses[-1] < 0.3
    assert math.isfinite(run.result.training_loss)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 7
    assert not poisoned_files(tmp_path, "model.safetensors", "optimizer.pt")
    assert all(recorder.exact)
    assert len(recorder.exact) == governor.rollback_count
    if name in NAN_FAULTS:
        assert governor.rollback_count == 1
        assert governor.last_report.tag in (59, 60)
        assert any("governor/rollbacks" in entry for entry in run.trainer.state.log_history)
    assert strict(tmp_path / "checkpoint-140" / "trainer_state.json")["stateful_callbacks"]["tolaria"]
