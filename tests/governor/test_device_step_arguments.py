"""Steps in all their forms on CUDA: they say what they say on the CPU, and wait for nothing."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from device_run import no_host_sync
from torch import Tensor, nn

from tolaria.governor import GovernorConfig, GovernorEvent, TolariaGovernor

pytestmark = pytest.mark.cuda

CONFIGS = {
    "default": GovernorConfig(snapshot_interval=5, probation=2),
    "balanced": GovernorConfig.balanced(snapshot_interval=6, probation=2),
    "strict": GovernorConfig.strict(snapshot_interval=5),
    "skipping": GovernorConfig(skip_anomalous_steps=True, gradient_norm=True, snapshot_interval=5),
}
FACTORS = [1.0] * 12 + [math.nan] + [1.0] * 6 + [math.nan] * 2 + [1.0] * 8


class Run:
    def __init__(self, device: str, config: GovernorConfig) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).to(device)
        capturable = device == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, capturable=capturable)
        self.governor = TolariaGovernor(self.model, self.optimizer, config=config)
        self.x = torch.linspace(-1.0, 1.0, 24, device=device).view(6, 4)

    def step(self, how: str, factor: Tensor, tag: int) -> None:
        loss = self.model(self.x).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        loss = loss.detach() * factor
        told: Any = loss
        if how == "judged before":
            told = self.governor.check_vital_signs(loss)
        elif how == "without a loss":
            told = None
            for parameter in self.model.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(factor)
        self.optimizer.step()
        if self.governor.config.gradient_norm:
            self.optimizer.zero_grad()  # they have been looked at
        if how == "in parts":
            self.governor.add_loss(loss, weight=3)
            self.governor.add_loss(loss, weight=torch.ones((), device=loss.device))
            self.governor.step(tag=tag)
        else:
            self.governor.step(told, tag=tag)


def told(event: GovernorEvent) -> tuple[object, ...]:
    report = getattr(event, "report", event)
    reason, restored = getattr(report, "reason", None), getattr(report, "restored_step", None)
    return event.kind, event.step, event.tag, reason, restored


@pytest.mark.parametrize("how", ["a loss", "judged before", "in parts", "without a loss"])
@pytest.mark.parametrize("name", CONFIGS)
def test_all_forms_say_what_the_cpu_says_and_wait_for_nothing(name: str, how: str) -> None:
    stories, verdicts = [], []
    for device in ("cpu", "cuda"):
        run = Run(device, CONFIGS[name])
        factors = torch.tensor(FACTORS, device=device).unbind()
        if device == "cuda":
            torch.cuda.synchronize()
        fields = []
        with no_host_sync() if device == "cuda" else nullcontext():
            for i, factor in enumerate(factors):
                run.step(how, factor, tag=100 + i)
                verdict = run.governor.last_verdict
                assert verdict is not None
                fields.append(verdict.fields)
        events = [e for e in run.governor.synchronize() if e.kind not in ("attach", "structure")]
        stories.append([*map(told, events), run.governor.is_quiet, run.governor.pending])
        verdicts.append(torch.stack(fields).cpu())
        assert run.governor.verify()
    assert stories[0] == stories[1]
    assert any(isinstance(each, tuple) and each[0] == "verdict" for each in stories[0])
    torch.testing.assert_close(verdicts[1], verdicts[0], rtol=1e-3, atol=1e-9, equal_nan=True)
