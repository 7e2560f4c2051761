"""Two processes (gloo): every rank judges the same loss and none rolls back alone."""

from __future__ import annotations

import multiprocessing as mp
import queue
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import Queue
from pathlib import Path

import pytest
import torch
from torch import nn
from two_ranks import worker


def test_ranks_roll_back_together(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    out: Queue[tuple[int, list[str]]] = context.Queue()
    ranks = [context.Process(target=worker, args=(r, str(tmp_path / "store"), out)) for r in range(2)]
    try:
        for process in ranks:
            process.start()
        stories = dict(_next(out, ranks) for _ in ranks)
        for process in ranks:
            process.join()
            assert process.exitcode == 0
    finally:
        for process in ranks:
            process.kill()
    assert stories[0] == stories[1]
    assert stories[0][0] == "6 NON_FINITE 4"
    assert stories[0][1].split()[1] == "NON_FINITE_STATE"
    assert len(stories[0]) == 12
    assert stories[0][2:5] == ["fine False, 3", "fine False, 4", "closed 5, True"]
    assert stories[0][5] == f"mean {(13 * 1.5 + (2.0 + 1.5) / 2) / 14}"
    assert all("one rank must never roll back alone" in text for text in stories[0][6:8])
    tell, rollback, validated, norms = stories[0][8:]
    steps = [step for step in range(5, 18, 4)]
    assert tell == f"tell {[('promotion', step) for step in [*steps, 41, 45]]}"
    promoted = [("promotion", step) for step in [*range(5, 38, 4), 51, 52]]
    assert validated == f"validated {promoted}"
    assert norms == "norms [('GRADIENT_NORM', 17)]"
    assert rollback.count("'rollback'") == 2
    assert rollback.index("'rollback'") < rollback.rindex("'promotion'")


def _next(out: Queue[tuple[int, list[str]]], ranks: list[SpawnProcess]) -> tuple[int, list[str]]:
    """What the next rank says; an error once one of them has died, however long the others take."""
    while True:
        try:
            return out.get(timeout=0.5)
        except queue.Empty:
            assert not any(process.exitcode for process in ranks), "a rank died"


def test_sharded_parameters_are_refused() -> None:
    from tolaria.governor import TolariaGovernor

    class FlatParameter(nn.Parameter):
        pass

    model = nn.Module()
    model.register_parameter("flat", FlatParameter(torch.ones(3)))
    with pytest.raises(RuntimeError, match="flat is sharded"):
        TolariaGovernor(model, [])
