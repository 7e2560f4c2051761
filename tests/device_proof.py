"""Guarded runs of a small CNN and a transformer on CUDA, with faults, whose every restore can be checked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from device_run import no_host_sync
from small_hosts import cnn, image_batches, token_batches, transformer
from torch import Tensor, nn

from tolaria.governor import GovernorConfig, PromotionEvent, RollbackEvent, TolariaGovernor

FAULTS = {
    **dict.fromkeys((24, 57, 58, 101, 163, 222, 284), "nan"),
    **dict.fromkeys((77, 130, 131, 196, 197, 251, 252), "spike"),
}
"""By step. One spike is an anomaly, two in a row roll back, a NaN does at once."""
Log = list[tuple[str, int, int]]


class ProofRun:
    """A model, its data and its governor; all random numbers come from the device, none is rolled back.

    Args:
        kind: ``"cnn"`` (batch norm, dropout) or ``"transformer"`` (tied weights, dropout).
        faults: what happens to the loss, by step.
    """

    def __init__(self, kind: str, faults: Mapping[int, str]) -> None:
        self.model = (cnn() if kind == "cnn" else transformer()).cuda()
        self.tokens = kind != "cnn"
        batches = token_batches(4, rows=2) if self.tokens else image_batches(4, rows=3)
        self.batches = [(x.cuda(), y.cuda()) for x, y in batches]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        config = GovernorConfig(snapshot_interval=6, probation=2, restore_rng=False)
        self.governor = TolariaGovernor(self.model, self.optimizer, config=config)
        self.faults = faults
        self.factors = {
            "nan": torch.full((), float("nan"), device="cuda"),
            "spike": torch.full((), 1e4, device="cuda"),
        }
        torch.cuda.manual_seed(7)
        torch.cuda.synchronize()

    def loss(self, i: int) -> Tensor:
        x, y = self.batches[i % len(self.batches)]
        logits = self.model(x)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()) if self.tokens else None
        loss = nn.functional.cross_entropy(logits, y) if loss is None else loss
        return loss * self.factors[self.faults[i]] if i in self.faults else loss

    def step(self, i: int) -> None:
        loss = self.loss(i)
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        self.optimizer.step()
        self.governor.step(loss)

    def state(self) -> Tensor:
        """The bytes of everything covered, in one tensor on the current stream.

        An empty seed slot's limit is left out: it comes back as 0 until the host hears of the rollback.
        """
        buffers = [b for name, b in self.model.named_buffers() if not name.endswith("alpha_limit")]
        tensors = [*self.model.parameters(), *buffers]
        tensors += [t for state in self.optimizer.state.values() for t in state.values()]
        return torch.cat([t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors])

    def story(self, steps: int) -> tuple[Log, Tensor]:
        """Train; the promotions and rollbacks, and the last state.

        Raises:
            AssertionError: a restore was not bit for bit the state at a capture that had been promoted.
        """
        states: dict[int, Tensor] = {}
        with no_host_sync():
            for i in range(1, steps + 1):
                self.step(i)
                states[i] = self.state()
        log: Log = []
        for event in self.governor.synchronize():
            if isinstance(event, PromotionEvent):
                log.append(("promoted", event.step, event.capture_step))
            elif isinstance(event, RollbackEvent):
                log.append(("rollback", event.step, event.report.restored_step))
                good = event.report.restored_step
                assert good == 0 or ("promoted", good) in {(kind, captured) for kind, _, captured in log}
                assert good == 0 or torch.equal(states[event.step], states[good]), f"step {event.step}: torn"
        return log, states[steps].cpu()
