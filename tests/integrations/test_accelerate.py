"""``guard`` under Accelerate: one line after ``prepare``, none in the loop."""

from __future__ import annotations

import gc
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trainers import need, poisoned_files, same

accelerate = need("accelerate")
need("accelerate.tracking")

from tolaria import GovernorConfig  # noqa: E402  (behind the look for what it needs)
from tolaria.governor import RollbackEvent  # noqa: E402
from tolaria.integrations.accelerate import guard  # noqa: E402

FAULTS = ["loss", "gradient", "weight", "moment", "buffer", "spike", "batch", "collapse", "large-lr"]
AT = 41


class Run:
    """A classifier in a loop of Accelerate's, which saves its state after every step."""

    def __init__(
        self, folder: Path, *, governed: bool = True, parts: int = 1, scaler: Any = None, **settings: Any
    ) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=parts)
        if scaler is not None:
            self.accelerator.scaler = scaler
        self.inner = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        self.inner.num_classes = 3
        optimizer = torch.optim.AdamW(self.inner.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + step / 200))
        x = torch.randn(128 * parts, 6)
        y = (x[:, :3].argmax(1) + (x[:, 3] > 0.5)) % 3
        loader = DataLoader(TensorDataset(x, y), batch_size=8)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            self.inner, optimizer, loader, schedule
        )
        self.events: list[Any] = []
        self.steps, self.states, self.restored = 0, [], []
        self.governor: Any = None
        if governed:
            config = GovernorConfig.balanced(snapshot_interval=8, probation=2, **settings)
            self.governor = guard(
                self.accelerator, self.model, self.optimizer, self.scheduler, config, sinks=[self.hear]
            )
        self.states.append(self.state())

    def hear(self, event: Any) -> None:
        self.events.append(event)
        if isinstance(event, RollbackEvent):
            self.restored.append(same(self.state(), self.states[event.report.restored_step]))

    def state(self) -> list[Tensor]:
        moments = [t for s in self.optimizer.state.values() for t in s.values()]
        return [t.detach().clone() for t in (*self.inner.state_dict().values(), *moments)]

    def epoch(self, *, fault: str = "", saves: bool = True) -> None:
        for x, y in self.loader:
            with self.accelerator.accumulate(self.model):
                is_due = fault and self.steps + 1 == AT
                if fault == "batch" and is_due:
                    x = torch.full_like(x, math.inf)
                loss = nn.functional.cross_entropy(self.model(x), y)
                scale = {"loss": math.nan, "spike": 1e6}.get(fault, 1.0) if is_due else 1.0
                self.accelerator.backward(loss * scale)
                if is_due:
                    self.break_it(fault)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
                self.last = loss.item()
            if self.accelerator.sync_gradients:
                self.steps += 1
                self.states.append(self.state())
                if saves:
                    self.accelerator.save_state(self.folder / str(self.steps))
                    torch.save(self.accelerator.get_state_dict(self.model), self.folder / f"{self.steps}.pt")

    @torch.no_grad()
    def break_it(self, fault: str) -> None:
        first, last = self.inner[0].weight, self.inner[3]
        if fault == "gradient":
            first.grad[0, 0] = math.nan
        elif fault == "weight":
            first[0, 0] = math.nan
        elif fault == "moment":
            self.optimizer.state[first]["exp_avg"][0, 0] = math.nan
        elif fault == "buffer":
            self.inner[1].running_mean[0] = math.nan
        elif fault == "collapse":
            last.weight.zero_()
        elif fault == "large-lr":
            self.optimizer.param_groups[0]["lr"] *= 3000


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_run_survives_and_saves_nothing_poisoned(fault: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    for _ in range(7):
        run.epoch(fault=fault)
    assert run.governor.step_count == run.steps == 7 * 16
    assert all(run.restored)
    if fault in ("loss", "gradient", "weight", "moment", "buffer", "batch"):
        assert run.governor.rollback_count == 1
    assert all(t.isfinite().all() for t in run.state())
    assert poisoned_files(tmp_path, "*.safetensors", "*.bin", "*.pt") == []
    assert run.scheduler.scheduler.last_epoch == run.steps  # it counts on
    if fault != "spike":  # left alone; it recovers slowly
        assert run.last < 0.9


@pytest.mark.parametrize("parts", [1, 3])
def test_a_clean_run_is_the_bare_one_bit_for_bit(parts: int, tmp_path: Path) -> None:
    ends = []
    for governed in (False, True):
        run = Run(tmp_path, governed=governed, parts=parts)
        for _ in range(2):
            run.epoch(saves=False)
        ends.append(run.state())
    assert same(*ends)
    assert run.governor.step_count == run.steps == 32
    assert run.governor.random_guess_loss == math.log(3)
    assert run.governor.rollback_count == 0


def test_a_run_is_resumed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for _ in range(3):
        run.epoch(fault="loss")
    other = Run(tmp_path / "other")
    other.accelerator.load_state(tmp_path / "48")
    other.steps = run.steps
    assert other.governor.rollback_count == 1
    for each in (run, other):
        each.epoch(saves=False)
    assert same(run.state(), other.state())
    assert other.governor.step_count == 64
    assert json.dumps(other.governor.state_dict()["policy"]) == json.dumps(
        run.governor.state_dict()["policy"]
    )


def test_steps_that_a_scaler_leaves_out_are_judged_too(tmp_path: Path) -> None:
    run = Run(tmp_path, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**127))
    run.epoch(saves=False)
    assert run.governor.step_count == run.steps
    assert run.governor.rollback_count == 0
    assert run.optimizer.state  # some were taken
    with torch.no_grad():
        run.inner[0].weight[0, 0] = math.nan  # no step is taken from here on
    run.epoch(saves=False)
    assert run.governor.rollback_count == 1
    assert all(t.isfinite().all() for t in run.state())


def test_a_lowered_rate_stays_lowered(tmp_path: Path) -> None:
    run = Run(tmp_path, lr_factor=0.5)
    for _ in range(3):
        run.epoch(fault="loss", saves=False)
    assert run.governor.rollback_count == 1
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 1e-2 / (1 + 48 / 200))


def test_what_is_returned_need_not_be_kept_and_ends_with_close(tmp_path: Path) -> None:
    run = Run(tmp_path)
    known, run.governor = run.governor, None
    run.epoch(saves=False)
    gc.collect()
    assert known.step_count == 16
    known.close()
    run.epoch(saves=False)
    assert known.step_count == 16


def test_trackers_get_the_numbers_and_what_was_found_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[Any, Any]] = []

    class Tracker(accelerate.tracking.GeneralTracker):  # type: ignore[misc, name-defined]
        name, requires_logging_directory = "told", False
        tracker = property(lambda self: self)

        def log(self, values: Any, step: Any = None, **_: Any) -> None:
            told.append((step, values))

    with caplog.at_level(logging.INFO, "tolaria.integrations"):
        run = Run(tmp_path)
    run.accelerator.trackers = [Tracker()]
    for _ in range(3):
        run.epoch(fault="loss", saves=False)
    assert (8, {"governor/capture": 2.0}) in told
    assert (AT, {"governor/rollbacks": 1.0, "governor/steps_lost": 9.0}) in told
    lines = [record.getMessage() for record in caplog.records if record.name == "tolaria.integrations"]
    assert lines == [
        "tolaria in Accelerate: optimizers AcceleratedOptimizer, schedulers AcceleratedScheduler, "
        "scaler none, extras none, classes 3, ranks 1"
    ]


def test_bad_arguments_are_named() -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match="accelerator: expected an Accelerator, got Linear"):
        guard(model, model, optimizer)
    with pytest.raises(TypeError, match="config: expected GovernorConfig or None, got str"):
        guard(accelerator, model, optimizer, config="balanced")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="config: expected skip_anomalous_steps=False, got True"):
        guard(accelerator, model, optimizer, config=GovernorConfig(skip_anomalous_steps=True))
