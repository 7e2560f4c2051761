"""What the loss never shows: a tensor far larger than in any promoted capture."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.suspicious_run import INTERVAL, SUSPICIOUS, Net, Run, promotions, rollbacks, suspicions
from tolaria.errors import TrainingDivergedError
from tolaria.governor import (
    AcceptanceEvent,
    PanicReason,
    VerdictEvent,
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -- what is told, promoted and captured ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weight", "bias", "mean"])
def test_a_suspect_is_named_and_the_next_capture_comes_an_interval_later(place: str, name: str) -> None:
    run = Run(device=place)
    assert promotions(run.events) == [INTERVAL, 2 * INTERVAL, 3 * INTERVAL, 4 * INTERVAL]
    run.to_capture()
    tensor = getattr(run.model, name).data
    before = tensor.clone()
    tensor.fill_(2e3)
    told = run.train(2 * INTERVAL + 2)
    assert suspicions(told) == [(name, False)] * 3
    steps = [e.step for e in told if isinstance(e, VerdictEvent)]
    assert steps[1] - steps[0] == INTERVAL
    assert not promotions(told)
    tensor.copy_(before)
    told = run.train(INTERVAL + 1)
    assert len(promotions(told)) == 1
    assert not suspicions(told)


def test_a_verdict_stays_that_on_the_loss() -> None:
    """A suspicion under "tell" skips no step, counts as no bad step and keeps no loss out of the window."""
    run = Run(skip_anomalous_steps=True, window=40)
    run.to_capture()
    before = len(run.governor.history)
    with torch.no_grad():
        run.model.weight.fill_(1e9)
        for _ in range(3):
            verdict = run.governor.check_vital_signs(1.0)
            assert verdict.is_healthy
            run.governor.step(verdict)
    told = run.governor.poll()
    assert suspicions(told) == [("weight", False)]
    assert len(run.governor.history) == before + 3
    assert run.governor.offending_steps == ()


def test_a_suspect_that_is_restored_by_another_panic_is_forgotten(place: str) -> None:
    run = Run(device=place)
    run.to_capture()
    run.train(1, lambda: run.model.weight.fill_(1e9))
    run.train(2)
    with torch.no_grad():
        run.governor.step(math.nan)
    (back,) = rollbacks(run.governor.synchronize())
    assert back[0] is PanicReason.NON_FINITE
    assert float(run.model.weight.detach().max()) == 0.5
    run.model.weight.data.fill_(5.0)  # above what a tensor still under suspicion may be
    told = run.train(2 * INTERVAL)
    assert not suspicions(told)
    assert promotions(told)


def test_the_last_known_good_state_is_from_before() -> None:
    run = Run()
    run.to_capture()
    run.train(3 * INTERVAL, lambda: run.model.mean.fill_(1e6))
    run.governor.execute_rollback()
    assert float(run.model.mean.max()) == pytest.approx(0.1)


def test_a_manual_snapshot_is_judged_too(place: str) -> None:
    run = Run(device=place)
    with torch.no_grad():
        run.model.weight.fill_(1e6)
    run.governor.snapshot()
    told = run.train(1)
    assert suspicions(told) == [("weight", False)]
    assert not promotions(told)


@pytest.mark.parametrize("how", ["tell", "rollback"])
def test_a_poisoned_capture_is_poisoned(place: str, how: str) -> None:
    run = Run(device=place, suspicious_state=how)
    run.to_capture()
    with torch.no_grad():
        run.model.weight.fill_(1e9)
        run.model.mean[0] = math.nan
    told = run.train(2)
    assert rollbacks(told) == [(PanicReason.NON_FINITE_STATE, "mean", 4 * INTERVAL)]
    assert not suspicions(told)


def test_log_only_tells_and_does_not_act() -> None:
    run = Run(log_only=True, suspicious_state="rollback")
    for _ in range(4):
        run.governor.snapshot()
        run.train(1)
    with torch.no_grad():
        run.model.weight.fill_(1e6)
    run.governor.snapshot()
    told = run.train(1)
    assert suspicions(told) == [("weight", True)]
    assert not rollbacks(told)
    assert float(run.model.weight.detach().max()) == 1e6


# -- what lasts is accepted ----------------------------------------------------------------------------------


def test_a_level_that_lasts_for_five_intervals_is_accepted_and_told_once(place: str) -> None:
    run = Run(device=place)
    run.to_capture()
    told = run.train(8 * INTERVAL, lambda: run.model.mean.fill_(5e3))
    assert len(suspicions(told)) == 5
    (accepted,) = [e for e in told if isinstance(e, AcceptanceEvent)]
    assert accepted.tensor_name == "mean"
    assert promotions(told)[0] == accepted.capture_step
    assert len(promotions(told)) >= 2  # and the ones after it as always
    run.to_capture()
    assert suspicions(run.train(2, lambda: run.model.mean.fill_(6e6))) == [("mean", False)]


@pytest.mark.parametrize(("factor", "is_accepted"), [(0.995, True), (0.97, False), (1.1, True), (1.3, False)])
def test_a_level_that_falls_or_multiplies_is_another_one(factor: float, is_accepted: bool) -> None:
    """A tenth down or twice up, over the five intervals that it has to last: it heals, or it explodes."""
    run = Run()
    run.to_capture()
    value = [1e8]

    def change() -> None:
        value[0] *= factor ** (1 / INTERVAL)
        run.model.mean.fill_(value[0])

    told = run.train(7 * INTERVAL, change)
    assert any(isinstance(e, AcceptanceEvent) for e in told) == is_accepted
    assert bool(promotions(told)) == is_accepted


def test_a_level_that_swings_is_accepted_once_its_range_is_known() -> None:
    """A buffer that adds up over an epoch and is reset: between 1,000 and 40,000, never the same twice."""
    run = Run()
    run.to_capture()
    step = [0]

    def change() -> None:
        step[0] += 1
        run.model.mean.fill_(1e3 + 1e3 * (7 * step[0] % 40))

    told = run.train(16 * INTERVAL, change)
    assert len([e for e in told if isinstance(e, AcceptanceEvent)]) == 1
    assert promotions(told)


def test_two_suspects_are_both_waited_for() -> None:
    run = Run()
    run.to_capture()
    run.train(3 * INTERVAL, lambda: run.model.mean.fill_(1e4))
    told = run.train(6 * INTERVAL, lambda: run.model.weight.fill_(1e5))
    names = [name for name, _ in suspicions(told)]
    assert names == ["weight"] * 5
    assert len([e for e in told if isinstance(e, AcceptanceEvent)]) == 1


def test_snapshots_at_every_step_do_not_make_a_level_last() -> None:
    run = Run()

    def change() -> None:
        run.model.mean.fill_(1e4)
        run.governor.snapshot()

    told = run.train(4 * INTERVAL, change)
    assert not promotions(told)
    assert not any(isinstance(e, AcceptanceEvent) for e in told)


def test_undone_twice_and_there_again_it_is_accepted(place: str) -> None:
    """The training makes the state so, no accident does: going back for ever would help nobody."""
    run = Run(device=place, suspicious_state="rollback")
    run.to_capture()
    told = run.train(6 * INTERVAL, lambda: run.model.mean.fill_(5e3))
    assert rollbacks(told) == [(SUSPICIOUS, "mean", 4 * INTERVAL)] * 2
    assert run.governor.offending_steps == ()
    assert [e.tensor_name for e in told if isinstance(e, AcceptanceEvent)] == ["mean"]
    assert promotions(told)


def test_undone_and_different_each_time_ends_the_run_with_the_name() -> None:
    run = Run(suspicious_state="rollback")
    run.to_capture()
    value = [1e3]

    def change() -> None:
        value[0] *= 2.0
        run.model.mean.fill_(value[0])

    with pytest.raises(TrainingDivergedError, match="SUSPICIOUS_STATE in mean"):
        run.train(40 * INTERVAL, change)


# -- what grows by itself ------------------------------------------------------------------------------------


def test_what_is_born_as_zeros_grows(place: str) -> None:
    """Biases, the second matrix of LoRA, the last layer of an identity seed: from 0 to ordinary sizes."""
    run = Run(device=place)
    steps = iter([1e-12, 1e-9, 1e-6, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0, 3.0, 10.0, 50.0])
    for size in steps:
        assert not suspicions(run.train(INTERVAL, lambda size=size: run.model.bias.fill_(size)))  # type: ignore[misc]
    assert float(run.model.bias.detach().max()) == 50.0


def test_a_tensor_that_joins_begins_its_history_then(place: str) -> None:
    run = Run(device=place)
    with torch.no_grad():
        late = nn.Parameter(torch.zeros(3, device=run.model.weight.device))
        run.model.register_parameter("late", late)
        run.optimizer.add_param_group({"params": [late]})
        run.train(INTERVAL, lambda: late.fill_(1e-6))
        assert not suspicions(run.train(2 * INTERVAL, lambda: late.fill_(1e6)))  # two promoted captures
        run.train(2 * INTERVAL, lambda: late.fill_(2e6))
        run.to_capture()
        assert suspicions(run.train(2, lambda: late.fill_(1e10))) == [("late", False)]


def test_another_tensor_in_the_place_of_one_has_a_history_of_its_own(place: str) -> None:
    run = Run(device=place)
    with torch.no_grad():
        run.model.mean = torch.full((7,), 1e6, device=run.model.weight.device)
        assert not suspicions(run.train(3 * INTERVAL))
        del run.model.mean
        run.model.register_buffer("other", torch.full((3,), 1e6, device=run.model.weight.device))
        assert not suspicions(run.train(3 * INTERVAL))
        run.to_capture()
        assert suspicions(run.train(2, lambda: run.model.other.fill_(1e10))) == [("other", False)]


def test_the_table_grows_with_the_model_and_forgets_nothing(place: str) -> None:
    run = Run(device=place)
    with torch.no_grad():
        for k in range(20):
            run.model.register_buffer(f"b{k}", torch.ones(2, device=run.model.weight.device))
        run.train(INTERVAL)
        run.to_capture()
        assert suspicions(run.train(2, lambda: run.model.weight.fill_(1e6))) == [("weight", False)]


def test_tied_weights_and_views_are_one_tensor_each() -> None:
    model = Net()
    model.register_parameter("tied", model.weight)
    run = Run(model)
    run.to_capture()
    assert suspicions(run.train(2, lambda: run.model.weight.fill_(1e6))) == [("weight", False)]


def test_what_is_not_covered_is_not_judged() -> None:
    model = Net()
    model.register_parameter("frozen", nn.Parameter(torch.ones(3), requires_grad=False))
    run = Run(model, cover="trained")
    run.to_capture()
    assert not suspicions(run.train(2, lambda: run.model.frozen.fill_(1e6)))
    run.to_capture()
    assert suspicions(run.train(2, lambda: run.model.weight.fill_(1e6))) == [("weight", False)]


def test_optimizer_state_integers_and_masks_are_not_judged() -> None:
    model = Net()
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    run = Run(model)
    run.optimizer.state[run.model.weight]["momentum_buffer"] = torch.ones(4)
    run.train(4 * INTERVAL)

    def change() -> None:
        run.model.count.fill_(10**12)
        run.model.mask[0] = 1e9
        run.optimizer.state[run.model.weight]["momentum_buffer"].fill_(1e9)

    told = run.train(2 * INTERVAL, change)
    assert not suspicions(told)
    assert promotions(told)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.float8_e5m2], ids=str
)
def test_every_floating_dtype_is_judged(place: str, dtype: torch.dtype) -> None:
    model = Net()
    model.register_buffer("odd", torch.full((5,), 0.25).to(dtype))
    run = Run(model, place)
    run.to_capture()
    big = torch.tensor(-2e4 + 1e-3j if dtype.is_complex else -2e4).to(dtype)
    assert suspicions(run.train(2, lambda: run.model.odd.copy_(big.expand(5)))) == [("odd", False)]
