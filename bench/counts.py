"""Count launches, host synchronisations and bytes on the virtual CUDA device, for the page's table of counts.

    vgpu/run python bench/counts.py      needs a CUDA build, and the virtual device's module ``vgpu``

Writes ``bench/counts.json``, which ``report.py`` puts on the page. Nothing here is a time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tolaria import GovernorConfig, TolariaGovernor, __version__, ops

SIZE = 1 << 18
"""Bytes of a feature tensor."""


def _row(name: str, vgpu: Any, work: Callable[[], object], bytes_note: str = "") -> list[object]:
    """Run ``work`` once from a quiet device and count."""
    torch.cuda.synchronize()
    vgpu.reset()
    kept = work()
    vgpu.run_all()
    stats = vgpu.stats()
    del kept
    kernels = stats["kernel_launches"].values()
    loads, stores = (sum(k[f"global_{kind}_bytes"] for k in kernels) for kind in ("load", "store"))
    return [
        name,
        sum(k["launches"] for k in kernels),
        sum(stats["aten_launches"].values()),
        stats["host_sync_total"],
        sum(m["count"] for m in stats["memcpy"].values()),
        stats["mallocs"]["count"] + stats["host_mallocs"]["count"],
        f"{loads:,} / {stores:,}{bytes_note}",
    ]


def op_rows(vgpu: Any) -> list[list[object]]:
    """Each op once, forward or forward + backward."""
    host, seed, grad = (torch.randn(SIZE // 4, device="cuda") for _ in range(3))
    alpha = torch.tensor(0.3, device="cuda")
    learned = alpha.clone().requires_grad_()
    h, s = host.clone().requires_grad_(), seed.clone().requires_grad_()
    logits = torch.randn(64, 1000, device="cuda")
    labels = torch.arange(64, device="cuda")
    acc = torch.zeros(5, dtype=torch.float64, device="cuda")
    config, state = GovernorConfig().to_tensor(2.3, "cuda"), ops.governor_state(1024, device="cuda")
    losses = torch.ones(1024, device="cuda")
    many = [torch.randn(100, device="cuda") for _ in range(1000)]
    size = f"{SIZE >> 10} KiB"

    def both(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], object]:
        wanted = [t for t in inputs if t.requires_grad]
        return lambda: torch.autograd.grad(function(*inputs), wanted, grad)

    works: dict[str, Callable[[], object]] = {
        f"blend, {size}, forward": lambda: ops.blend(host, seed, alpha),
        "the same, forward + backward": both(ops.blend, h, s, alpha),
        "the same with grad_alpha": both(ops.blend, h, s, learned),
        f"straight_through, {size}, forward + backward": both(ops.straight_through, h, s),
        f"seed_gate, {size}, forward + backward": both(ops.seed_gate, h, alpha),
        f"tensor_stats, one tensor of {size}": lambda: ops.tensor_stats([host]),
        "tensor_stats, 1,000 tensors of 100": lambda: ops.tensor_stats(many),
        "classification_metrics_, 64 x 1000": lambda: ops.classification_metrics_(acc, logits, labels),
        "governor_step_, 1,024 governors": lambda: ops.governor_step_(state, config, losses),
    }
    for work in works.values():
        work()  # allocations of the first time are the allocator's
    return [_row(name, vgpu, work) for name, work in works.items()]


def step_rows(vgpu: Any) -> list[list[object]]:
    """``governor.step`` on a clean step, with a capture, with a restore; what they move beside the state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, y = torch.randn(32, 64, device="cuda"), torch.arange(32, device="cuda") % 10
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(snapshot_interval=6, probation=1))
    bad = torch.tensor(float("nan"), device="cuda")
    loss = bad

    def train() -> None:
        nonlocal loss
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()

    rows, names = [], {4: "governor.step, clean", 12: "the same, capture due"}
    for step in range(1, 13):
        train()
        row = _row(names.get(step, ""), vgpu, lambda: governor.step(loss))
        if step in names:
            rows.append(row)
    state = f"{governor._engine.slots.table.nbytes:,}"
    train()
    rows.append(_row("the same, restore ordered by a NaN", vgpu, lambda: governor.step(bad)))
    governor.synchronize()
    assert governor.rollback_count == 1
    rows[1][0] = f"{rows[1][0]} (state: {state} bytes)"
    return rows


def main() -> int:
    """Count and write; says so and stops where there is no virtual device."""
    try:
        import vgpu
    except ImportError:
        print("counts: skipped, there is no module vgpu; run it on the virtual device")
        return 0
    vgpu.schedule("eager")
    rows = [*op_rows(vgpu), *step_rows(vgpu)]
    about = f"torch {torch.__version__}, tolaria {__version__}"
    path = Path(__file__).with_name("counts.json")
    path.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    print("\n".join(" | ".join(map(str, row)) for row in rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
