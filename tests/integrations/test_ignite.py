"""``TolariaHandler`` in ignite: nine faults, clean runs, checkpoints, other handlers."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_runs import FAULTS, NAN_FAULTS, Fault, Net, Recorder, points
from torch import nn
from trainers import need, poisoned_files, same

ignite = need("ignite")
need("ignite.engine")
need("ignite.metrics")

from ignite.engine import Engine, Events  # noqa: E402
from ignite.handlers import Checkpoint, DiskSaver, TerminateOnNan  # noqa: E402
from ignite.metrics import RunningAverage  # noqa: E402

from tolaria import GovernorConfig  # noqa: E402
from tolaria.integrations.ignite import TolariaHandler  # noqa: E402

CONFIG = GovernorConfig.balanced(snapshot_interval=21)


class Run:
    """35 iterations an epoch, four epochs; a checkpoint every 20 iterations and after each epoch."""

    def __init__(
        self, folder: Path, fault: Fault | None = None, *, is_governed: bool = True, accumulation: int = 1,
        config: GovernorConfig = CONFIG, as_dict: bool = False, last: bool = False,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.model, self.fault, self.accumulation = Net(), fault or Fault("none"), accumulation
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.999)
        data = points(35 * 16)
        self.loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
        self.engine = Engine(self._update if not as_dict else lambda e, b: {"loss": self._update(e, b)})
        self.handler: Any = None
        self.losses: list[float] = []
        self.saver = Checkpoint(
            {"model": self.model, "optimizer": self.optimizer},
            DiskSaver(folder, require_empty=False), n_saved=None,
        )  # fmt: skip
        self.average = RunningAverage(output_transform=lambda out: out["loss"] if as_dict else out)
        if last:
            self._others()
        if is_governed:
            chosen = (lambda out: out["loss"]) if as_dict else (lambda out: out)
            self.handler = TolariaHandler(
                self.model, self.optimizer, chosen, config=config, schedulers=[self.schedule]
            )
            assert self.handler.attach(self.engine) is self.handler
            self.recorder = Recorder(self.model, self.optimizer)
            self.engine.add_event_handler(Events.ITERATION_COMPLETED, self._record)
        if not last:
            self._others()

    def _others(self) -> None:
        self.engine.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
        self.average.attach(self.engine, "average")
        self.engine.add_event_handler(Events.ITERATION_COMPLETED, self._log)
        self.engine.add_event_handler(
            Events.ITERATION_COMPLETED(every=20) | Events.EPOCH_COMPLETED, self.saver
        )

    def _update(self, engine: Engine, batch: Any) -> float:
        step = (engine.state.iteration - 1) // self.accumulation + 1
        self.model.train()
        x = self.fault.batch(batch["x"], step)
        loss = self.fault.loss(self.model(x, batch["labels"])["loss"], step)
        (loss / self.accumulation).backward()
        if engine.state.iteration % self.accumulation == 0:
            self.fault.before_step(self.model, self.optimizer, step)
            self.optimizer.step()
            self.fault.after_step(self.model, self.optimizer, step)
            self.schedule.step()
            self.optimizer.zero_grad()
        return loss.item()

    def _record(self, engine: Engine) -> None:
        self.recorder.record(self.handler.governor)

    def _log(self, engine: Engine) -> None:
        output = engine.state.output
        self.losses.append(output["loss"] if isinstance(output, dict) else output)

    def train(self, epochs: int = 4) -> Run:
        self.engine.run(self.loader, max_epochs=epochs)
        return self

    def state(self) -> list[Any]:
        return [self.model.state_dict(), self.optimizer.state_dict(), self.schedule.state_dict(), self.losses]

    def score(self) -> float:
        data = points(64, seed=2)
        self.model.eval()
        with torch.no_grad():
            x, labels = torch.stack([d["x"] for d in data]), torch.stack([d["labels"] for d in data])
            return float(self.model(x, labels)["loss"])


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_survives(name: str, tmp_path: Path) -> None:
    run = Run(tmp_path, Fault(name)).train()
    governor = run.handler.governor
    assert run.engine.state.iteration == 140
    assert run.score() < 0.3
    assert all(map(math.isfinite, run.losses))
    assert math.isfinite(run.engine.state.metrics["average"])
    assert len(list(tmp_path.glob("*.pt"))) == 10
    assert not poisoned_files(tmp_path, "*.pt")
    assert len(run.recorder.exact) == governor.rollback_count or name in ("weight", "moment", "buffer")
    assert all(run.recorder.exact)
    if name in NAN_FAULTS:
        assert governor.rollback_count == 1
        assert governor.last_report.tag in (60, 61)


@pytest.mark.parametrize("name", NAN_FAULTS)
def test_the_rollback_of_a_save_is_exact(name: str, tmp_path: Path) -> None:
    run = Run(tmp_path, Fault(name, at=60))
    run.engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: run.model.state_dict())
    run.engine.add_event_handler(Events.ITERATION_COMPLETED, run._record)
    run.train(epochs=2)
    assert run.recorder.exact == [True]


@pytest.mark.parametrize("options", [{"as_dict": True}, {"last": True}, {"accumulation": 2}], ids=str)
def test_other_ways_to_be_attached(options: dict, tmp_path: Path) -> None:
    run = Run(tmp_path, Fault("loss", at=20), **options).train(epochs=2)
    governor = run.handler.governor
    assert run.engine.state.iteration == 70
    assert all(map(math.isfinite, run.losses))
    assert math.isfinite(run.engine.state.metrics["average"])
    assert governor.rollback_count == 1
    assert governor.step_count == 70 // options.get("accumulation", 1)
    assert not poisoned_files(tmp_path, "*.pt")


@pytest.mark.parametrize("options", [{}, {"accumulation": 2}], ids=str)
def test_a_clean_governed_run_is_the_bare_one(options: dict, tmp_path: Path) -> None:
    run = Run(tmp_path / "governed", **options).train(epochs=2)
    bare = Run(tmp_path / "bare", is_governed=False, **options).train(epochs=2)
    assert same(run.state(), bare.state())
    assert run.handler.governor.rollback_count == 0


def test_without_the_governor_the_run_ends(tmp_path: Path) -> None:
    run = Run(tmp_path, Fault("loss", at=20), is_governed=False).train(epochs=2)
    assert run.engine.state.iteration == 20


def test_a_rollback_between_micro_batches_drops_their_losses(tmp_path: Path) -> None:
    run = Run(tmp_path, accumulation=2)

    def strike(engine: Engine) -> None:
        with torch.no_grad():
            run.model.head.weight.fill_(math.nan)
        run.model.state_dict()

    run.engine.add_event_handler(Events.ITERATION_COMPLETED(once=20), strike)
    run.engine.add_event_handler(Events.ITERATION_COMPLETED(once=25), strike)
    run.train(epochs=1)
    assert run.engine.state.iteration == 35
    assert run.handler.governor.rollback_count == 2
    assert run.handler.governor.step_count == 17


def test_a_loss_of_none_judges_gradients_and_state(tmp_path: Path) -> None:
    run = Run(tmp_path, Fault("gradient", at=20), is_governed=False)
    handler = TolariaHandler(run.model, run.optimizer, lambda output: None, config=CONFIG).attach(run.engine)
    run.train(epochs=1)
    assert run.engine.state.iteration == 35
    assert handler.governor.rollback_count == 1
    assert handler.governor.history == []


def test_resuming_and_a_second_run_go_on(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole").train(epochs=2)
    counts = whole.handler.state_dict()
    again = Run(tmp_path / "again")
    again.model.load_state_dict(whole.model.state_dict())
    again.handler.load_state_dict(counts)
    assert again.handler.state_dict() == counts
    again.train(epochs=1)
    assert again.handler.governor.step_count == 105
    again.engine.run(again.loader, max_epochs=2)
    assert again.handler.governor.step_count == 140
    assert again.handler.governor.last_good_step >= 105


def test_batches_are_left_out_after_a_rollback(tmp_path: Path) -> None:
    run = Run(tmp_path, Fault("loss", at=20), config=CONFIG.replace(skip_batches=4)).train(epochs=2)
    assert run.handler.governor.batches_left_out == 4
    assert run.engine.state.iteration == 70


def test_copies_and_pickles_of_a_governed_model_are_nobodys(tmp_path: Path) -> None:
    run = Run(tmp_path).train(epochs=1)
    for twin in (copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))):
        with torch.no_grad():
            twin.head.weight.fill_(math.nan)
        assert twin.state_dict()["head.weight"].isnan().all()
    assert run.handler.governor.rollback_count == 0
    with torch.no_grad():
        run.model.head.weight.fill_(math.nan)
    assert run.model.head.state_dict()["weight"].isfinite().all()


def test_bad_arguments() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="config"):
        TolariaHandler(model, optimizer, config=1)
    with pytest.raises(TypeError, match="loss"):
        TolariaHandler(model, optimizer, loss=0.1)
    with pytest.raises(TypeError, match="engine"):
        TolariaHandler(model, optimizer).attach(object())
    engine = Engine(lambda engine, batch: 0.0)
    handler = TolariaHandler(model, optimizer).attach(engine)
    with pytest.raises(ValueError, match="engine"):
        handler.attach(engine)
