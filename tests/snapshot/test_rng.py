"""What the random generators do at a rollback: nothing by default, else a replay that is not repeated."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tolaria.governor import AttachEvent, GovernorConfig, TolariaGovernor

Draw = tuple[float, ...]


class Drawing:
    """A governor and every generator that it may put back."""

    def __init__(self, **settings: Any) -> None:
        self.own = torch.Generator().manual_seed(4)
        model = nn.Linear(2, 2)
        self.governor = TolariaGovernor(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            config=GovernorConfig(max_restores_of_one_capture=50, **settings),
            generators=[self.own],
        )

    def draw(self) -> Draw:
        return (
            float(torch.rand(())),
            float(torch.rand((), generator=self.own)),
            random.random(),
            float(np.random.rand()),
        )

    def restored(self) -> Draw:
        self.governor.step(1.0)
        self.governor.step(float("nan"))
        return self.draw()


def test_generators_go_on_by_default() -> None:
    run = Drawing()
    (attached,) = [e for e in run.governor.poll() if isinstance(e, AttachEvent)]
    assert attached.generators == ()
    states = torch.get_rng_state(), run.own.get_state(), random.getstate()
    run.governor.step(float("nan"))
    assert run.governor.rollback_count == 1
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(run.own.get_state(), states[1])
    assert random.getstate() == states[2]


def test_first_restore_replays_and_a_repeated_one_draws_anew_but_reproducibly() -> None:
    stories = []
    for _ in range(2):
        torch.manual_seed(1)
        random.seed(2)
        np.random.seed(3)
        run = Drawing(restore_rng=True)
        captured = run.draw()
        restored = [run.restored() for _ in range(4)]
        assert restored[0] == captured
        for generator in zip(captured, *restored[1:], strict=True):
            assert len(set(generator)) == len(generator), "two restores drew the same"
        stories.append(restored)
    assert stories[0] == stories[1]


def test_repeated_restore_is_no_mere_shift_of_the_numbers() -> None:
    run = Drawing(restore_rng=True)
    replayed = torch.randint(0, 1 << 40, (64,)).tolist()
    run.restored()
    run.governor.step(1.0)
    run.governor.step(float("nan"))
    assert not set(replayed) & set(torch.randint(0, 1 << 40, (64,)).tolist())


def test_the_same_restore_once_more_draws_the_same() -> None:
    run = Drawing(restore_rng=True)
    run.restored()
    drawn = run.restored()
    run.governor.execute_rollback()
    assert run.draw() == drawn


def test_a_new_capture_is_replayed_first() -> None:
    run = Drawing(restore_rng=True, snapshot_interval=5, probation=1)
    for _ in range(2):
        run.restored()
    for _ in range(6):
        run.governor.step(1.0)
    assert run.governor.last_good_step > 0
    run.governor.snapshot()
    captured = run.draw()
    run.governor.step(1.0)
    assert run.restored() == captured


def test_numpy_may_have_another_generator() -> None:
    former = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        run = Drawing(restore_rng=True)
        captured = run.draw()
        assert run.restored() == captured
        assert run.restored()[3] != captured[3]
    finally:
        np.random.set_bit_generator(former)


@pytest.mark.cuda
def test_the_devices_generator_is_one_of_them() -> None:
    model = nn.Linear(2, 2).cuda()
    config = GovernorConfig(restore_rng=True, max_restores_of_one_capture=50)
    governor = TolariaGovernor(model, torch.optim.SGD(model.parameters(), lr=0.1), config=config)
    drawn = [torch.rand((), device="cuda").item()]
    for _ in range(3):
        governor.step(1.0)
        governor.step(float("nan"))
        governor.synchronize()
        drawn.append(torch.rand((), device="cuda").item())
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3
