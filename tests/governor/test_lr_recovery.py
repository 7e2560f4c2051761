"""Rates that a rollback lowered for a time end where the schedule alone would have taken them, to the bit."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupting import Interruption
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

from tolaria.errors import ConfigError, UncoveredWarning
from tolaria.governor import GovernorBank, GovernorConfig, TolariaGovernor, load_snapshot

FACTOR = 0.3
"""Which no float holds: multiplied and divided, a rate is another."""

Make = Callable[[Optimizer], LRScheduler] | None

SCHEDULES: dict[str, Make] = {
    "none": None,
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.97**n),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.7, total_steps=400),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=60, eta_min=0.011),
    "warm-restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=17, eta_min=0.003),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.973),
    "step": lambda o: lr_scheduler.StepLR(o, 7, 0.31),
    "swa": lambda o: SWALR(o, swa_lr=0.013, anneal_epochs=30),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 50, eta_min=0.007)],
        milestones=[25],
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler([
        lr_scheduler.ConstantLR(o, 0.3, total_iters=14), lr_scheduler.ExponentialLR(o, 0.9)
    ]),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, step_size_up=7),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=50, power=1.7),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.93),
}  # fmt: skip


class Run:
    """A model, two groups of different rates, maybe a schedule."""

    def __init__(self, make: Make = None, *, is_tensor: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(2, 2)
        rates: list[Any] = [torch.tensor(0.3), torch.tensor(0.07)] if is_tensor else [0.3, 0.07]
        groups = zip(self.model.parameters(), rates, strict=True)
        self.optimizer = torch.optim.AdamW([{"params": [p], "lr": rate} for p, rate in groups], foreach=False)
        self.schedule = None if make is None else make(self.optimizer)

    def govern(self, steps: int = 12, **settings: Any) -> TolariaGovernor:
        config = {"lr_factor": FACTOR, "snapshot_interval": 5, "probation": 1, **settings}
        options = {"schedules": config.pop("schedules", "rewind")}
        self.governor = TolariaGovernor(
            self.model,
            self.optimizer,
            config=GovernorConfig(lr_recovery_steps=steps, **config),
            schedulers=[] if self.schedule is None else [self.schedule],
            **options,
        )
        return self.governor

    def train(self) -> None:
        self.optimizer.zero_grad()
        (self.model(torch.ones(1, 2)).sum() * 1e-3).backward()
        self.optimizer.step()

    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def settings(self) -> Any:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        return copy.deepcopy((groups, None if self.schedule is None else self.schedule.state_dict()))

    def load(self, settings: Any) -> None:
        groups, schedule = copy.deepcopy(settings)
        for group, values in zip(self.optimizer.param_groups, groups, strict=True):
            for key, value in values.items():
                if isinstance(group[key], Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value
        if self.schedule is not None:
            self.schedule.load_state_dict(schedule)


@pytest.mark.parametrize("is_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("schedules", ["rewind", "keep"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rates_are_those_of_the_schedule_alone(name: str, schedules: str, is_tensor: bool) -> None:
    run, alone = (Run(SCHEDULES[name], is_tensor=is_tensor) for _ in range(2))
    governor = run.govern(schedules=schedules)
    captures, lowered = {0: alone.settings()}, []
    for step in range(1, 60):
        for each in (run, alone):
            each.train()
            if each.schedule is not None and step % 4:
                each.schedule.step()
        governor.step(math.nan if step in (9, 13, 14) else 1.0)
        for event in governor.poll():
            if event.kind == "capture":
                captures[event.capture_step] = alone.settings()  # type: ignore[attr-defined]
            elif event.kind == "rollback" and schedules == "rewind":
                alone.load(captures[event.report.restored_step])  # type: ignore[attr-defined]
        if run.rates() != alone.rates():
            lowered.append(step)
        if step in (9, 14):
            times = FACTOR ** (1 if step == 9 else 3)
            if name != "cyclic":
                assert run.rates() == pytest.approx([times * rate for rate in alone.rates()], rel=0.2)
    assert lowered == list(range(9, 26)), "12 healthy steps after step 14"
    assert repr(run.settings()) == repr(alone.settings())


def test_a_bad_step_that_is_let_pass_and_a_cooldown_begin_the_count_anew() -> None:
    run = Run()
    governor = run.govern(4, cooldown=3, warmup_bound=5.0, absolute_threshold=5.0)
    losses = [1.0, math.nan, 1.0, 1.0, 1.0, 1.0, 1.0, 99.0, 1.0, 1.0, 1.0]
    for loss in losses:
        governor.step(loss)
    assert run.rates()[0] == 0.3 * FACTOR
    governor.step(1.0)
    assert run.rates() == [0.3, 0.07]


def test_without_recovery_the_rates_stay_lowered() -> None:
    run = Run()
    governor = run.govern(0)
    governor.step(math.nan)
    for _ in range(50):
        governor.step(1.0)
    assert run.rates()[0] == 0.3 * FACTOR


def test_a_capture_of_the_lowered_time_brings_the_own_rates_back() -> None:
    run = Run()
    governor = run.govern(8, snapshot_interval=5)
    governor.step(math.nan)
    for _ in range(7):
        governor.step(1.0)
    assert governor.last_good_step == 6, "it holds lowered rates"
    for _ in range(2):
        governor.step(1.0)
    assert run.rates() == [0.3, 0.07]
    governor.execute_rollback()
    assert run.rates() == [0.3 * FACTOR, 0.07 * FACTOR], "once, since the last recovery"
    for _ in range(8):
        governor.step(1.0)
    assert run.rates() == [0.3, 0.07]


def test_a_rate_that_was_set_by_hand_meanwhile_stays_as_it_was_set() -> None:
    run = Run()
    governor = run.govern(6)
    governor.step(math.nan)
    governor.step(1.0)
    run.optimizer.param_groups[0]["lr"] = 0.123
    for _ in range(6):
        governor.step(1.0)
    assert run.rates() == [0.123, 0.07]


def test_a_rate_that_is_set_at_every_step_is_left_to_who_sets_it() -> None:
    run = Run()
    governor = run.govern(6)
    for step in range(1, 20):
        for group in run.optimizer.param_groups:
            group["lr"] = 0.5 / step
        governor.step(math.nan if step == 5 else 1.0)
        if step != 5:
            assert run.rates() == [0.5 / step] * 2


def test_the_plateau_schedule_keeps_what_it_lowered_itself() -> None:
    def make(optimizer: Optimizer) -> LRScheduler:
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=1, min_lr=0.05)

    run, alone = Run(make), Run(make)
    governor = run.govern(12, snapshot_interval=1000, schedules="keep")
    governor.step(math.nan)
    for _ in range(12):
        for each in (run, alone):
            each.schedule.step(1.0)  # type: ignore[union-attr,arg-type]
        governor.step(1.0)
    assert run.settings()[0] == alone.settings()[0]
    assert run.rates() == [pytest.approx(0.3 * 0.7**5), 0.05]


def test_a_schedule_that_is_told_the_epoch_is_followed() -> None:
    def make(optimizer: Optimizer) -> LRScheduler:
        return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=2, T_mult=2, eta_min=0.01)

    run, alone = Run(make), Run(make)
    governor = run.govern(12, schedules="keep")
    for step in range(1, 40):
        for each in (run, alone):
            each.schedule.step(step / 7)  # type: ignore[union-attr,arg-type]
        governor.step(math.nan if step == 9 else 1.0)
    assert run.rates() == alone.rates()


class Warmup(LRScheduler):
    """As packages write them: another schedule inside, and a list that is no rate."""

    def __init__(self, optimizer: Optimizer, after: LRScheduler) -> None:
        self.after, self.log = after, [0.0]
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        if self.last_epoch < 5:
            return [base * (self.last_epoch + 1) / 5 for base in self.base_lrs]
        self.after.step()
        return self.after.get_last_lr()


def test_a_schedule_inside_another_is_stepped_by_nobody_else() -> None:
    def make(optimizer: Optimizer) -> LRScheduler:
        return Warmup(optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 60, eta_min=0.01))

    run, alone = Run(make), Run(make)
    governor = run.govern(12, schedules="keep")
    for step in range(1, 40):
        for each in (run, alone):
            each.train()
            each.schedule.step()  # type: ignore[union-attr]
        governor.step(math.nan if step == 9 else 1.0)
    assert run.schedule.after.last_epoch == alone.schedule.after.last_epoch  # type: ignore[union-attr]
    assert run.rates() == alone.rates()


def test_a_group_that_joins_keeps_its_rate() -> None:
    run = Run()
    governor = run.govern(6)
    governor.step(math.nan)
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.9})
    for _ in range(6):
        governor.step(1.0)
    assert run.rates() == [0.3, 0.07, 0.9]


def test_reset_leaves_the_way_back_open() -> None:
    run = Run()
    governor = run.govern(6)
    governor.step(math.nan)
    governor.step(1.0)
    governor.reset()
    for _ in range(5):
        governor.step(1.0)
    assert run.rates() == [0.3, 0.07]


@pytest.mark.parametrize("through", ["torch", "json"])
@pytest.mark.parametrize("is_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", ["none", "lambda", "cosine", "sequential"])
def test_a_run_resumed_on_the_way_goes_on_as_if_never_interrupted(
    name: str, is_tensor: bool, through: str
) -> None:
    whole = Run(SCHEDULES[name], is_tensor=is_tensor)
    _live(whole, whole.govern(10), range(1, 40))
    first = Run(SCHEDULES[name], is_tensor=is_tensor)
    _live(first, first.govern(10), range(1, 14))
    file = io.BytesIO()
    torch.save([first.settings(), first.optimizer.state_dict(), first.model.state_dict()], file)
    saved = first.governor.state_dict()
    if through == "json":
        saved = json.loads(json.dumps(saved, allow_nan=False))
    file.seek(0)
    settings, optimizer, model = torch.load(file, weights_only=False)
    second = Run(SCHEDULES[name], is_tensor=is_tensor)
    governor = second.govern(10)
    second.model.load_state_dict(model)
    second.optimizer.load_state_dict(optimizer)
    second.load(settings)
    governor.load_state_dict(saved)
    assert second.rates() == first.rates()
    _live(second, governor, range(14, 40))
    assert repr(second.settings()) == repr(whole.settings())
    assert all(map(torch.equal, second.model.parameters(), whole.model.parameters()))


def _live(run: Run, governor: TolariaGovernor, steps: range) -> None:
    for step in steps:
        run.train()
        if run.schedule is not None:
            run.schedule.step()
        governor.step(math.nan if step in (9, 12) else 1.0)


def test_a_state_on_disk_goes_on_from_its_capture(tmp_path: Path) -> None:
    run = Run(SCHEDULES["cosine"])
    governor = run.govern(10)
    _live(run, governor, range(1, 20))
    assert governor.last_good_step == 17, "of the lowered time"
    path = governor.save(tmp_path).result()
    _live(run, governor, range(20, 40))
    other = Run(SCHEDULES["cosine"])
    load_snapshot(path, other.govern(10))
    assert other.rates()[0] < 0.1
    _live(other, other.governor, range(18, 40))
    assert repr(other.settings()) == repr(run.settings())


def test_rates_that_do_not_fit_stay_as_they_are_and_say_so() -> None:
    first, second = Run(SCHEDULES["lambda"]), Run()
    first.govern(10).step(math.nan)
    governor = second.govern(10)
    with pytest.warns(UncoveredWarning, match="expected the 8 rates .* got optimizers and schedulers with 2"):
        governor.load_state_dict(first.governor.state_dict())
    for _ in range(12):
        governor.step(1.0)
    assert second.rates() == [0.3, 0.07]


def test_a_rate_that_was_not_loaded_is_its_own() -> None:
    first, second = Run(), Run()
    first.govern(10).step(math.nan)
    second.optimizer.param_groups[0]["lr"] = 0.3 * FACTOR  # as if loaded; the other group is not
    governor = second.govern(10)
    governor.load_state_dict(first.governor.state_dict())
    for _ in range(10):
        governor.step(1.0)
    assert second.rates() == [0.3, 0.07]


def test_rows_of_a_bank_recover_apart() -> None:
    bank = GovernorBank(2, config=GovernorConfig(lr_factor=FACTOR, lr_recovery_steps=5))
    runs = [Run(), Run()]
    for i, run in enumerate(runs):
        bank.attach(i, run.model, run.optimizer)
    bank.step(torch.tensor([math.nan, 1.0]))
    for _ in range(2):
        bank.step(torch.ones(2))
    bank.step(torch.tensor([1.0, math.nan]))
    for _ in range(2):
        bank.step(torch.ones(2))
    assert [run.rates()[0] for run in runs] == [0.3, 0.3 * FACTOR]


def test_a_clean_step_takes_the_shortest_way_before_and_after() -> None:
    run = Run()
    governor = run.govern(3)
    ways = [governor._attached.plain is not None]
    for loss in (1.0, math.nan, 1.0, 1.0, 1.0):
        governor.step(torch.tensor(loss))
        ways.append(governor._attached.plain is not None)
    assert ways == [True, True, False, False, False, True]


PLACES = ("policy.py", "following.py", "lowered_rates.py")
DETAIL = {"end_step", "_end_step", "recovered", "apply", "caught_up"}


@pytest.mark.parametrize("when", ["lowered", "recovered"])
def test_interrupted_anywhere_the_rates_are_lowered_or_their_own(when: str) -> None:
    def prepare() -> tuple[Run, Callable[[], None]]:
        run = Run(SCHEDULES["cosine"])
        governor = run.govern(4)
        for loss in [1.0] if when == "lowered" else [math.nan, 1.0, 1.0, 1.0]:
            governor.step(loss)
        return run, lambda: governor.step(math.nan if when == "lowered" else 1.0)

    whole = Interruption(within=PLACES, in_detail=DETAIL)
    run, call = prepare()
    before = run.rates()
    with whole.on():
        call()
    right = [0.3 * FACTOR, 0.07 * FACTOR] if when == "lowered" else [0.3, 0.07]
    assert run.rates() == right
    for at in range(0, len(whole.places), 3):
        run, call = prepare()
        interruption = Interruption(at, within=PLACES, in_detail=DETAIL)
        try:
            with interruption.on():
                call()
        except KeyboardInterrupt:
            assert run.rates() in (before, right), list(whole.places)[at]
        run.governor.step(1.0)
        if interruption.has_happened:
            assert run.rates() in (before, right) if when == "lowered" else run.rates() == right
        for _ in range(6):
            run.governor.step(1.0)
        assert run.rates() == [0.3, 0.07]
        assert run.schedule.base_lrs == [0.3, 0.07]  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [-1, 1.5, True, None])
def test_bad_settings_are_named(value: Any) -> None:
    for name in ("lr_recovery_steps", "skip_batches"):
        with pytest.raises(ConfigError, match=f"{name}: expected an integer of at least 0"):
            GovernorConfig(**{name: value})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda r: r.update(own=[1.0]), "policy.rates.lowered: expected as many rates as in own, 1, got 0"),
        (lambda r: r.update(own=["x"], lowered=[1.0]), r"policy.rates.own\[0\]: expected a number"),
        (lambda r: r.update(times=-1), "policy.rates.times: expected a whole number"),
        (lambda r: r.pop("own"), "policy.rates: expected the keys .* lacks own"),
    ],
)
def test_damaged_rates_are_refused_by_name(damage: Callable[[Any], None], said: str) -> None:
    governor = Run().govern()
    saved = governor.state_dict()
    damage(saved["policy"]["rates"])
    with pytest.raises(ValueError, match=said):
        governor.load_state_dict(saved)
