"""What `GovernorConfig.strict()` adds: slow climbs are found, gradients judged, nothing healthy is shot."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tolaria
from tolaria import ops
from tolaria.errors import TolariaError, UncoveredWarning
from tolaria.governor import GovernorBank, GovernorConfig, PanicReason, TolariaGovernor, VerdictEvent

RUNS, STEPS, START = 300, 900, 200


@pytest.fixture(params=["fused", "reference"])
def backend(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    with tolaria.backend(request.param):
        yield


def noise(scale: float) -> Tensor:
    source = torch.Generator().manual_seed(int(1000 * scale))
    return torch.exp(scale * torch.randn(STEPS, RUNS, generator=source, dtype=torch.float64))


def time() -> Tensor:
    return torch.arange(STEPS, dtype=torch.float64).unsqueeze(1)


def warm_restarts(jump: float, rise: int, period: int = 200) -> Tensor:
    """Cosine annealing: at each restart the loss climbs ``jump``-fold in ``rise`` steps, then comes down."""
    phase = time() % period
    high = 1.0 + (jump - 1.0) * 0.5 * (1.0 + torch.cos(math.pi * phase / period))
    return 0.1 * torch.where(phase < rise, 1.0 + (high - 1.0) * (phase + 1.0) / rise, high)


def drifted(levels: Tensor, scale: float) -> tuple[float, float]:
    """Share of the runs shot for a drift, and the median number of steps from START to that."""
    config = GovernorConfig.strict(rule="all", log_only=True)
    state, settings = ops.governor_state(RUNS, attached=False), config.to_tensor(None, "cpu")
    first = torch.full((RUNS,), math.nan)
    for step, loss in enumerate(levels * noise(scale)):
        ops.governor_step_(state, settings, loss)
        hit = (state[ops.StateField.reason] == PanicReason.DRIFT) & first.isnan()
        first[hit] = step - START
    return 1.0 - float(first.isnan().float().mean()), float(first.nanmedian())


@pytest.mark.parametrize("scale", [0.0, 0.02, 0.1, 0.3])
@pytest.mark.parametrize(
    "levels",
    [
        pytest.param(lambda: torch.ones(STEPS, 1).double() * 0.5, id="plateau"),
        pytest.param(lambda: 0.05 + 2.25 * torch.exp(-time() / 120.0), id="learning-curve"),
        pytest.param(lambda: 2.3 * (1.0 + time() / 20.0) ** -0.7, id="power-law"),
        pytest.param(lambda: warm_restarts(2.0, 1), id="restart-2x"),
        pytest.param(lambda: warm_restarts(10.0, 10), id="restart-10x-in-10-steps"),
    ],
)
def test_healthy_runs_do_not_drift(levels: Callable[[], Tensor], scale: float) -> None:
    assert drifted(levels(), scale)[0] == 0.0


@pytest.mark.parametrize(
    ("growth", "scale", "within"), [(0.005, 0.02, 150), (0.01, 0.1, 150), (0.03, 0.3, 150)]
)
def test_slow_climbs_are_found(growth: float, scale: float, within: int) -> None:
    climb = 0.3 * torch.exp(growth * (time() - START).clamp(0, 600))
    share, steps = drifted(climb, scale)
    assert share == 1.0
    assert 0 < steps < 150


def test_strict_governor_rolls_a_climb_back_and_says_why() -> None:
    stories = []
    for config in (GovernorConfig(), GovernorConfig.strict(gradient_norm=False)):
        model = nn.Linear(2, 2)
        governor = TolariaGovernor(model, [], config=config, num_classes=10)
        for step in range(400):
            governor.step(0.3 * 1.01 ** max(0, step - 200) * (1.0 + 0.02 * (step % 5)))
            if governor.rollback_count:
                break
        stories.append(governor.last_report)
    assert stories[0] is None
    assert stories[1] is not None
    assert stories[1].reason is PanicReason.DRIFT
    assert stories[1].drift > 100.0
    assert stories[1].steps_lost <= 102


@pytest.mark.usefixtures("backend")
def test_drift_sum_goes_back_with_a_rollback() -> None:
    bank = GovernorBank(1, config=GovernorConfig.strict(rule="all"))
    model = nn.Linear(1, 1)
    bank.attach(0, model, [])
    for step in range(130):
        bank.step(torch.tensor([0.5 if step < 20 else 0.5 * 1.01 ** min(step - 20, 60)]))
    rows = [ops.memory_row(which, 20, ops.MemoryField.drift_sum) for which in (0, 1, 2)]
    before = bank._state[rows, 0].tolist()
    bank.step(torch.tensor([math.nan]))
    slot = int(bank._state[ops.StateField.last_good, 0])
    assert before[1 + slot] > 0.0
    assert before[0] != before[1 + slot]
    assert bank._state[rows[0], 0].item() == before[1 + slot]


def make_governor(**changes: Any) -> tuple[TolariaGovernor, nn.Linear, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    settings = {"gradient_norm": True, **changes}
    return TolariaGovernor(model, optimizer, config=GovernorConfig(**settings)), model, optimizer


def fill_gradients(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


@pytest.mark.usefixtures("backend")
def test_gradient_norm_is_judged_beside_the_loss() -> None:
    governor, model, _ = make_governor()
    for step in range(15):
        fill_gradients(model, 1.0 + 0.1 * (step % 2))
        governor.step(1.0)
    fill_gradients(model, 100.0)
    verdict = governor.check_vital_signs(1.0)
    assert verdict.reason is PanicReason.GRADIENT_NORM
    assert not verdict
    assert verdict.gradient_norm == pytest.approx(100.0 * math.sqrt(8))
    assert verdict.gradient_norm > verdict.gradient_threshold > 0
    governor.step(verdict)
    governor.step(1.0)
    (event, second) = [e for e in governor.poll() if isinstance(e, VerdictEvent)]
    assert (event.reason, event.rollback) == (PanicReason.GRADIENT_NORM, False)
    assert second.rollback
    report = governor.last_report
    assert report is not None
    assert report.reason is PanicReason.GRADIENT_NORM
    assert report.consecutive_panics == 2
    assert all(p.grad is None for p in model.parameters())
    with pytest.warns(UncoveredWarning, match="gradient_norm is asked for"):
        governor.step(1.0)
    assert governor.rollback_count == 1, "a step without gradients is judged by its loss alone"


@pytest.mark.usefixtures("backend")
def test_non_finite_gradient_panics_at_once_unless_a_scaler_is_at_work() -> None:
    governor, model, _ = make_governor()
    fill_gradients(model, 1.0)
    governor.step(1.0)
    fill_gradients(model, math.inf)
    governor.step(1.0)
    assert governor.last_report is not None
    assert governor.last_report.reason is PanicReason.GRADIENT_NORM
    assert math.isnan(governor.last_report.gradient_norm)
    model = nn.Linear(3, 2)
    scaled = TolariaGovernor(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        config=GovernorConfig(gradient_norm=True),
        scaler=torch.amp.GradScaler("cpu"),
    )
    fill_gradients(model, math.inf)
    scaled.step(1.0)
    assert scaled.rollback_count == 0


@pytest.mark.usefixtures("backend")
def test_norm_handed_over_is_judged_instead_of_the_gradients() -> None:
    governor, model, _ = make_governor(gradient_norm=False)
    for _ in range(12):
        fill_gradients(model, math.nan)
        assert not governor.check_vital_signs(1.0, gradient_norm=torch.tensor(2.0))
    assert governor.check_vital_signs(1.0, gradient_norm=50.0).reason is PanicReason.GRADIENT_NORM
    verdict = governor.check_vital_signs(1.0)
    assert math.isnan(verdict.gradient_norm)
    with pytest.raises(ValueError, match="gradient_norm: expected None with a verdict"):
        governor.step(verdict, gradient_norm=1.0)
    with pytest.raises(TypeError, match="gradient_norm: expected a number"):
        governor.step(1.0, gradient_norm="big")  # type: ignore[arg-type]


def test_absolute_threshold_of_strict_follows_the_loss_of_guessing() -> None:
    strict = GovernorConfig.strict()
    for classes, expected in ((10, 10.0), (50257, 1.5 * math.log(50257))):
        governor = TolariaGovernor(nn.Linear(1, 1), [], config=strict, num_classes=classes)
        verdict = governor.check_vital_signs(math.log(classes))
        assert verdict.is_healthy, "the loss of an untrained network is no anomaly"
        assert verdict.thresholds[0] == expected
        assert not governor.check_vital_signs(expected + 0.1).is_healthy, "the warm-up is bounded"


def test_settings_are_fixed_once_a_governor_is_made() -> None:
    governor, *_ = make_governor()
    before = governor.config
    with pytest.raises(TolariaError, match="expected no assignment"):
        governor.config = before.replace(cooldown=7)
    assert governor.config is before
