"""``GovernorConfig.balanced()``: what lasts is caught, what passes is not, at any scale of the loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import tolaria
from tolaria import ops
from tolaria.errors import ConfigError
from tolaria.governor import GovernorConfig, TolariaGovernor
from tolaria.ops import Order, PanicReason, StateField

START = 250


def noisy(steps: int, seed: int = 0) -> Tensor:
    """Losses around 0.5, float64 ``(steps,)``."""
    source = torch.Generator().manual_seed(seed)
    return 0.5 + 0.1 * torch.randn(steps, generator=source, dtype=torch.float64)


def falling(steps: int) -> Tensor:
    """Losses that come down from 2.5."""
    return noisy(steps) + 2.0 * torch.exp(-torch.arange(steps) / 15.0)


def told(losses: Tensor, norms: Tensor | None = None, **settings: object) -> list[tuple[int, str]]:
    """Steps and reasons of rollbacks; afterwards the rule goes on as if nothing had been put back."""
    config = GovernorConfig.balanced(log_only=True, **settings)
    state, tensor = ops.governor_state(1, attached=False), config.to_tensor(None, "cpu")
    found = []
    for step, loss in enumerate(losses):
        norm = torch.tensor([1.0 if norms is None else float(norms[step])], dtype=torch.float64)
        ops.governor_step_(state, tensor, loss.reshape(1), gradient=norm)
        if state[StateField.rollback, 0]:
            found.append((step, PanicReason(int(state[StateField.reason, 0])).name))
    return found


def shifted(by: float, length: int = 10**6) -> Tensor:
    """Losses that rise by so much at ``START``, for ``length`` steps."""
    losses = falling(400)
    losses[START : START + length] += by
    return losses


@pytest.mark.parametrize("mode", ["fused", "reference"])
@pytest.mark.parametrize("by", [0.4, 2.0, 1e6, 1e300])
def test_a_level_that_stays_high_is_caught(by: float, mode: str) -> None:
    with tolaria.backend(mode):  # type: ignore[arg-type]
        step, reason = told(shifted(by))[0]
    assert reason == "DRIFT"
    assert START + 20 <= step <= START + 45


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**-7, 2.0**13, 2.0**40])
def test_the_unit_of_the_loss_does_not_matter(scale: float) -> None:
    for losses in (shifted(0.4), shifted(2.0), shifted(2.0, 12), falling(400)):
        assert told(scale * losses) == told(losses)


@pytest.mark.parametrize("level", [0.0, -0.5, -40.0])
def test_losses_around_zero_and_below_are_judged(level: float) -> None:
    losses = noisy(250) - 0.5 + level
    assert told(losses) == []
    losses[150:] += 5.0
    assert [reason for _, reason in told(losses)][:1] == ["DRIFT"]


def policy_gradient(seed: int, steps: int = 350) -> tuple[Tensor, Tensor]:
    """Surrogate losses and norms of a policy that learns which of five arms a context favours."""
    source = torch.Generator().manual_seed(seed)
    arms = torch.randn(16, 5, generator=source)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        policy = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 5))
    optimizer, losses, norms = torch.optim.Adam(policy.parameters(), 0.01), [], []
    for _ in range(steps):
        context = torch.randn(128, 16, generator=source)
        chances = policy(context).log_softmax(1)
        chosen = torch.multinomial(chances.detach().exp(), 1, generator=source)
        reward = (context @ arms).gather(1, chosen).squeeze(1)
        loss = -(chances.gather(1, chosen).squeeze(1) * (reward - reward.mean())).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.get_total_norm([p.grad for p in policy.parameters() if p.grad is not None]))
        losses.append(loss.detach())
        optimizer.step()
    return torch.stack(losses).double(), torch.stack(norms)


@pytest.mark.parametrize("seed", range(4))
def test_a_surrogate_that_rises_to_zero_is_no_shift(seed: int) -> None:
    losses, norms = policy_gradient(seed)
    assert told(losses, norms) == []
    losses[250:] += 3.0
    assert [reason for _, reason in told(losses, norms)][:1] == ["DRIFT"]


@pytest.mark.parametrize(("by", "length"), [(1e6, 1), (50.0, 5), (2.0, 12), (0.3, 15)])
def test_what_passes_is_left_alone(by: float, length: int) -> None:
    assert told(shifted(by, length)) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_rolls_back_at_once(bad: float) -> None:
    losses = falling(120)
    losses[50] = bad
    assert told(losses) == [(50, "NON_FINITE")]


def test_a_gradient_that_is_not_finite_rolls_back_at_once() -> None:
    norms = torch.ones(120)
    norms[50] = math.inf
    assert told(falling(120), norms) == [(50, "GRADIENT_NORM")]


def test_after_a_spike_of_the_gradient_a_small_shift_is_enough() -> None:
    losses, norms = shifted(0.15), torch.ones(400)
    late, _ = told(losses)[0]
    norms[START] = 1e4
    soon, reason = told(losses, norms)[0]
    assert reason == "DRIFT"
    assert soon < START + 40 < START + 90 < late
    assert told(falling(400), norms) == []


def test_late_in_a_run_a_jump_that_costs_nothing_is_no_shift() -> None:
    losses = falling(300) - 0.49
    losses = torch.where(torch.arange(300) > 150, 0.01 + 0.001 * noisy(300), losses)
    losses[220:] += 0.02  # triple, and a hundredth of what the losses have come down
    assert told(losses) == []
    losses[220:] += 0.2
    assert told(losses)[0][1] == "DRIFT"


def test_losses_that_depend_on_those_before_are_no_shift_every_time() -> None:
    source = torch.Generator().manual_seed(3)
    alarms = []
    for wandering in (True, False):
        state, losses = 0.0, []
        for _ in range(4000):
            fresh = float(torch.randn((), generator=source))
            state = 0.9 * state + math.sqrt(1 - 0.81) * fresh if wandering else fresh
            losses.append(0.5 * math.exp(0.2 * state))
        alarms.append(len(told(torch.tensor(losses, dtype=torch.float64))))
    assert alarms[1] == 0
    assert alarms[0] <= 20


def test_to_relearn_is_to_take_the_next_losses_as_the_level() -> None:
    config = GovernorConfig.balanced(log_only=True).to_tensor(None, "cpu")
    states = [ops.governor_state(1, attached=False) for _ in range(2)]
    for number, state in enumerate(states):
        for step, loss in enumerate(shifted(2.0)):
            if step == START and number:
                ops.governor_order_(state, config, 0, Order.RELEARN, PanicReason.MANUAL, -1)
            ops.governor_step_(state, config, loss.reshape(1))
            if state[StateField.rollback, 0]:
                break
    assert [bool(state[StateField.rollback, 0]) for state in states] == [True, False]


def run(losses: list[float], config: GovernorConfig) -> tuple[TolariaGovernor, nn.Linear]:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    governor = TolariaGovernor(model, optimizer, config=config)
    for step, loss in enumerate(losses):
        model.weight.grad = torch.ones_like(model.weight)
        model.bias.grad = torch.ones_like(model.bias)
        with torch.no_grad():
            model.weight.fill_(float(step))
        optimizer.step()
        governor.step(loss)
    return governor, model


def test_no_state_under_suspicion_becomes_the_last_known_good_one() -> None:
    losses = shifted(2.0).tolist()
    for late in range(START - 30, START + 25, 5):  # whenever the capture is due
        config = GovernorConfig.balanced(snapshot_interval=late, max_restores_of_one_capture=1000)
        governor, model = run(losses[: START + 45], config)
        assert governor.rollback_count >= 1
        assert float(model.weight.detach()[0, 0]) < START + 45
        report = governor.last_report
        assert report is not None
        assert report.reason is PanicReason.DRIFT
        assert report.restored_step <= START + 3


def test_it_says_what_it_is_for() -> None:
    config = GovernorConfig.balanced(window=30)
    assert (config.window, config.shift_horizon, config.gradient_norm) == (30, 40, True)
    with pytest.raises(tolaria.ConfigError, match="shift_slack"):
        GovernorConfig.balanced(shift_slack=-1.0)
    for field, value in (("shift_horizon", -1), ("shift_threshold", 0.0), ("shift_spike", 0.0)):
        with pytest.raises(tolaria.ConfigError, match=field):
            GovernorConfig(**{field: value})


def restarted(losses: Tensor, rates: list[float]) -> int:
    """Rollbacks of a run with these losses, whose rate at each step is this."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=rates[0])
    governor = TolariaGovernor(
        model, optimizer, config=GovernorConfig.balanced(max_restores_of_one_capture=1000)
    )
    for loss, rate in zip(losses.tolist(), rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        model.weight.grad, model.bias.grad = torch.zeros(1, 2), torch.zeros(1)
        optimizer.step()
        governor.step(loss)
    return governor.rollback_count


def test_losses_that_rise_with_a_warm_restart_are_expected() -> None:
    losses = shifted(0.7)
    high_again = [0.1] * 50 + [0.001] * (START - 51) + [0.1] * 151
    assert restarted(losses, high_again) == 0
    assert restarted(losses, [0.1] * 400) > 0
    assert restarted(losses, [0.01] * (START - 1) + [0.1] * 151) > 0  # a burst


@pytest.mark.parametrize("name", ["Balanced", "", None, 1, ["strict"]])
def test_a_preset_that_is_none_is_refused(name: object) -> None:
    with pytest.raises(ConfigError, match="preset: expected one of default, balanced, strict, classic, got "):
        GovernorConfig.preset(name)  # type: ignore[arg-type]


def test_presets_by_name_are_those_of_their_own() -> None:
    assert GovernorConfig.preset("default") == GovernorConfig()
    assert GovernorConfig.preset("balanced", window=30) == GovernorConfig.balanced(window=30)
    assert GovernorConfig.preset("strict") == GovernorConfig.strict()
    assert GovernorConfig.preset("classic") == GovernorConfig.classic()
