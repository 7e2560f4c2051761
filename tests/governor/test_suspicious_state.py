"""What the loss never shows: a tensor far larger than in any promoted capture."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tolaria.errors import ConfigError, TrainingDivergedError
from tolaria.governor import (
    AcceptanceEvent,
    GovernorBank,
    GovernorConfig,
    GovernorEvent,
    PanicReason,
    PromotionEvent,
    RollbackEvent,
    TolariaGovernor,
    VerdictEvent,
)
from tolaria.ops import StateField

INTERVAL = 4
SUSPICIOUS = PanicReason.SUSPICIOUS_STATE


class Net(nn.Module):
    """Two parameters and two buffers that nobody trains."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 0.5))
        self.bias = nn.Parameter(torch.zeros(2))
        self.register_buffer("mean", torch.full((3,), 0.1))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.mean: Tensor


class Run:
    """Steps whose losses are all healthy; ``events`` holds what was told, by step."""

    def __init__(
        self, model: nn.Module | None = None, device: str = "cpu", steps: int = 4 * INTERVAL + 1, **given: Any
    ) -> None:
        self.model: Any = (model or Net()).to(device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.0)
        self.options = {name: given.pop(name) for name in ("cover",) if name in given}
        self.config = GovernorConfig(**{"snapshot_interval": INTERVAL, "probation": 1, **given})
        self.governor = self.attach()
        self.events: list[GovernorEvent] = []
        self.train(steps)

    def attach(self) -> TolariaGovernor:
        return TolariaGovernor(self.model, self.optimizer, config=self.config, **self.options)

    def train(self, steps: int, change: Callable[[], object] = lambda: None) -> list[GovernorEvent]:
        """So many steps, ``change`` before each; what was told."""
        told: list[GovernorEvent] = []
        with torch.no_grad():
            for _ in range(steps):
                change()
                self.governor.step(1.0)
                told += self.governor.synchronize()
        self.events += told
        return told

    def to_capture(self) -> None:
        """Up to the step before the next capture."""
        with torch.no_grad():
            while (self.governor.step_count - self.due_from) < INTERVAL - 1:
                self.train(1)

    @property
    def due_from(self) -> int:
        return int(self.governor._attached.row.state[StateField.due_from])


def suspicions(events: list[GovernorEvent]) -> list[tuple[str | None, bool]]:
    return [
        (e.tensor_name, e.rollback) for e in events if isinstance(e, VerdictEvent) and e.reason is SUSPICIOUS
    ]


def promotions(events: list[GovernorEvent]) -> list[int]:
    return [e.capture_step for e in events if isinstance(e, PromotionEvent)]


def rollbacks(events: list[GovernorEvent]) -> list[tuple[PanicReason, str | None, int]]:
    found = [e.report for e in events if isinstance(e, RollbackEvent)]
    return [(r.reason, r.tensor_name, r.restored_step) for r in found]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -- one batch that is scaled by 1e4 -------------------------------------------------------------------------


def norm_network(device: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(3, (400,))
    x = torch.randn(400, 6) + 2.0 * nn.functional.one_hot(labels, 6)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    return model.to(device), x.to(device), labels.to(device)


def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        score = float((model(x).argmax(1) == labels).float().mean())
    model.train()
    return score


def train_with_a_scaled_batch(
    device: str, config: GovernorConfig
) -> tuple[list[GovernorEvent], list[float], int]:
    """Events, the accuracy after each step, and the step of the bad batch."""
    model, x, labels = norm_network(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    governor = TolariaGovernor(model, optimizer, config=config, num_classes=3)
    events, scores, bad = [], [], 100
    for step in range(1, 301):
        rows = torch.arange(32 * step, 32 * step + 32) % 300
        batch = x[rows] * (1e4 if step == bad else 1.0)
        loss = nn.functional.cross_entropy(model(batch), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        governor.step(loss)
        events += governor.synchronize()
        scores.append(accuracy(model, x[300:], labels[300:]))
    return events, scores, bad


def test_running_statistics_of_one_scaled_batch_are_never_promoted(place: str) -> None:
    events, scores, bad = train_with_a_scaled_batch(place, GovernorConfig(snapshot_interval=20))
    assert scores[bad - 2] > 0.85
    assert max(scores[bad - 1 : bad + 80]) < 0.7  # the loss shows nothing of it
    told = suspicions(events)
    assert told
    assert all(name is not None and name.startswith("1.running_") and not rolls for name, rolls in told)
    assert not rollbacks(events)
    at = promotions(events)
    assert max(step for step in at if step < bad) == bad - 20
    first = min(step for step in at if step >= bad)
    assert scores[first - 1] > 0.8  # promoted again once it has healed
    assert max(at) >= 280


def test_one_scaled_batch_is_undone_where_the_settings_say_so(place: str) -> None:
    config = GovernorConfig(snapshot_interval=20, suspicious_state="rollback")
    events, scores, bad = train_with_a_scaled_batch(place, config)
    ((reason, name, step),) = rollbacks(events)
    assert (reason, step) == (SUSPICIOUS, bad - 20)
    assert name is not None
    assert name.startswith("1.running_")
    caught = next(e.step for e in events if isinstance(e, RollbackEvent))
    assert caught <= bad + 21
    assert min(scores[caught - 1 :]) > 0.8
    assert not any(isinstance(e, AcceptanceEvent) for e in events)


def test_switched_off_nothing_is_told() -> None:
    events, *_ = train_with_a_scaled_batch(
        "cpu", GovernorConfig(snapshot_interval=20, suspicious_state="off")
    )
    assert len(promotions(events)) == 14
    assert not suspicions(events)


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


# -- saved, resumed, in a bank -------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["state_dict", "last_good"])
def test_a_resumed_run_knows_what_the_first_one_knew(place: str, through: str) -> None:
    run = Run(device=place)
    run.train(2 * INTERVAL)
    saved = run.governor.state_dict()
    if through == "last_good":
        saved = run.governor.last_good_state_dict()["governor"]
    assert saved["magnitudes"]["weight"][0] == 0.5
    other = Run(copy.deepcopy(run.model), place, steps=0)
    other.governor.load_state_dict(saved)
    other.to_capture()
    assert suspicions(other.train(2, lambda: other.model.weight.fill_(1e6))) == [("weight", False)]
    fresh = Run(copy.deepcopy(run.model), place, steps=0)
    fresh.to_capture()
    assert not suspicions(fresh.train(2, lambda: fresh.model.weight.fill_(1e6)))


def test_promoted_captures_are_counted_once_whatever_is_saved() -> None:
    """Judged from the same capture on, resumed or not."""
    for steps in range(3 * INTERVAL):
        whole = Run(steps=steps)
        part = Run(copy.deepcopy(whole.model), steps=0)
        part.governor.load_state_dict(whole.governor.state_dict())
        found = []
        for run in (whole, part):
            run.train(INTERVAL * 4 - steps)
            run.governor.state_dict()
            table = run.governor._engine.slots.table.magnitudes
            assert table is not None
            found.append(run.governor.state_dict()["magnitudes"])
        assert found[0] == found[1], steps


def test_reset_begins_every_history_anew() -> None:
    run = Run()
    run.governor.reset()
    run.to_capture()
    assert not suspicions(run.train(2, lambda: run.model.weight.fill_(1e6)))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ([], "magnitudes: expected a dict"),
        ({"weight": 3}, r"magnitudes\['weight'\]: expected two numbers, got 3"),
        ({"weight": [1.0]}, r"magnitudes\['weight'\]: expected two numbers"),
        ({"weight": ["inf", 1]}, r"magnitudes\['weight'\]: expected two numbers"),
        (
            {"weight": [-1.0, 1]},
            r"magnitudes\['weight'\]\[0\]: expected a finite number of at least 0, got -1.0",
        ),
        ({"weight": [1.0, 0.5]}, r"magnitudes\['weight'\]\[1\]: expected a whole number"),
        ({"weight": [1.0, -1]}, r"magnitudes\['weight'\]\[1\]: expected a whole number"),
        ({7: [1.0, 1]}, r"magnitudes\[7\]: expected the name of a tensor"),
    ],
)
def test_damaged_magnitudes_are_refused_by_name(damage: Any, said: str) -> None:
    run = Run()
    before = run.governor.state_dict()
    with pytest.raises(ValueError, match=said):
        run.governor.load_state_dict({**before, "magnitudes": damage})
    assert repr(run.governor.state_dict()) == repr(before)


def test_rows_of_a_bank_have_histories_of_their_own(place: str) -> None:
    models = [Net().to(place) for _ in range(3)]
    bank = GovernorBank(3, config=GovernorConfig(snapshot_interval=INTERVAL, probation=1), device=place)
    for i, model in enumerate(models):
        bank.attach(i, model, torch.optim.SGD(model.parameters(), lr=0.0))
    losses, told = torch.ones(3, device=place), []
    for step in range(6 * INTERVAL):
        if step == 5 * INTERVAL - 2:
            with torch.no_grad():
                models[1].weight.fill_(1e6)
        bank.step(losses)
        if place != "cpu":
            torch.cuda.synchronize()
        told += bank.poll()
    assert {e.row for e in told if isinstance(e, VerdictEvent)} == {1}
    assert {name for name, _ in suspicions(told)} == {"weight"}


@pytest.mark.parametrize("bad", [None, True, "undo", 1])
def test_other_settings_are_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match="suspicious_state: expected 'off', 'tell' or 'rollback', got"):
        GovernorConfig(suspicious_state=bad)


def test_the_presets_say_what_is_done() -> None:
    assert GovernorConfig().suspicious_state == "tell"
    assert GovernorConfig.strict().suspicious_state == "rollback"
    assert GovernorConfig.classic().suspicious_state == "off"
