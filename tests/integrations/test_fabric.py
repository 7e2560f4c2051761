"""``TolariaCallback`` in Fabric: no trainer, and nothing to call in the loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainers import is_poisoned, need, same

fabric_package = need("lightning.fabric")

from tolaria import GovernorConfig  # noqa: E402  (behind the look for what it needs)
from tolaria.integrations.lightning import TolariaCallback  # noqa: E402


class Run:
    """A loop of Fabric's, with ``parts`` micro-batches a step."""

    def __init__(self, folder: Path, *, governed: bool = True, parts: int = 1, apart: bool = False) -> None:
        torch.manual_seed(0)
        config = GovernorConfig.balanced(snapshot_interval=4, probation=1)
        self.callback = TolariaCallback(config) if governed else None
        callbacks = [self.callback] if self.callback else []
        self.fabric = fabric_package.Fabric(accelerator="cpu", devices=1, callbacks=callbacks)
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        optimizer = torch.optim.AdamW(self.inner.parameters(), lr=1e-2)
        if apart:
            self.model = self.fabric.setup_module(self.inner)
            self.optimizer = self.fabric.setup_optimizers(optimizer)
            if self.callback:
                self.callback.on_after_setup(self.fabric, self.model)
        else:
            self.model, self.optimizer = self.fabric.setup(self.inner, optimizer)
        self.folder, self.parts, self.steps = folder, parts, 0

    def step(self, fault: str = "") -> None:
        generator = torch.Generator().manual_seed(self.steps)
        for _ in range(self.parts):
            loss = self.model(torch.randn(8, 4, generator=generator)).square().mean()
            self.fabric.backward(loss * (math.nan if fault == "loss" else 1.0))
        weight = self.inner[0].weight
        with torch.no_grad():
            if fault == "gradient":
                weight.grad[0, 0] = math.inf
            elif fault == "weight":
                weight[0, 0] = math.nan
            elif fault == "moment":
                self.optimizer.state[weight]["exp_avg"][0, 0] = math.nan
            elif fault == "buffer":
                self.inner[1].running_var[0] = math.nan
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        state = {"model": self.model, "optimizer": self.optimizer}
        if self.callback:
            state["tolaria"] = self.callback
        self.fabric.save(self.folder / f"{self.steps}.ckpt", state)

    def state(self) -> list[Tensor]:
        moments = [t for s in self.optimizer.state.values() for t in s.values()]
        return [t.detach().clone() for t in (*self.inner.state_dict().values(), *moments)]


@pytest.mark.parametrize("fault", ["loss", "gradient", "weight", "moment", "buffer"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_broken_run_survives_and_saves_nothing_poisoned(fault: str, apart: bool, tmp_path: Path) -> None:
    run = Run(tmp_path, apart=apart)
    states = [run.state()]
    for step in range(1, 20):
        run.step(fault if step == 11 else "")
        states.append(run.state())
        if step == 11 and fault != "buffer":
            assert run.callback.governor.last_report.restored_step == 8
            assert same(run.state(), states[8])
    assert run.callback.governor.rollback_count == 1
    assert run.callback.governor.step_count == 19
    for path in tmp_path.glob("*.ckpt"):
        assert not is_poisoned(torch.load(path, weights_only=False))


def test_a_clean_run_is_the_bare_one_bit_for_bit(tmp_path: Path) -> None:
    ends = []
    for governed in (False, True):
        run = Run(tmp_path, governed=governed, parts=3)
        for _ in range(12):
            run.step()
        ends.append(run.state())
    assert same(*ends)
    assert run.callback.governor.step_count == 12
    assert len(run.callback.governor.history) == 12


def test_its_state_is_saved_and_loaded_by_fabric(tmp_path: Path) -> None:
    run, other = Run(tmp_path / "one"), Run(tmp_path / "other")
    for _ in range(6):
        run.step()
    state: dict[str, Any] = {"model": other.model, "optimizer": other.optimizer, "tolaria": other.callback}
    other.fabric.load(tmp_path / "one" / "6.ckpt", state)
    other.steps = 6
    for _ in range(3):
        run.step()
        other.step()
    assert same(run.state(), other.state())
    assert other.callback.governor.step_count == 9
    assert other.callback.governor.history == run.callback.governor.history


def test_optimizers_of_several_modules_are_covered(tmp_path: Path) -> None:
    callback = TolariaCallback(GovernorConfig.balanced(snapshot_interval=4, probation=1))
    fabric = fabric_package.Fabric(accelerator="cpu", devices=1, callbacks=[callback])
    torch.manual_seed(0)
    pairs = []
    for _ in range(2):
        inner = nn.Linear(3, 3)
        pairs.append(fabric.setup(inner, torch.optim.SGD(inner.parameters(), lr=0.1, momentum=0.9)))
    other = nn.Linear(2, 2)  # none of Fabric's
    for _ in range(3):
        other(torch.ones(1, 2)).sum().backward()
        torch.optim.SGD(other.parameters()).step()
        for model, optimizer in pairs:
            fabric.backward(model(torch.ones(1, 3)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert callback.governor.step_count == 6
    fabric.backward(pairs[1][0](torch.ones(1, 3)).square().mean() * math.nan)
    pairs[1][1].step()
    assert callback.governor.rollback_count == 1
    assert all(p.isfinite().all() for model, _ in pairs for p in model.parameters())
