"""Launch every kernel at small and odd sizes and compare with the reference; a program for compute-sanitizer.

    python bench/every_kernel.py [--device cuda]

All arguments are made on the CPU and copied, so that a kernel that reads what nobody wrote reads memory that
nobody wrote. Needs torch and tolaria, nothing else. Prints a line for each family of ops; exit status 1 if a
result was wrong. ``tests/bench/test_every_kernel.py`` holds that no kernel is left out.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import tolaria
from tolaria import _extension
from tolaria.governor import GovernorConfig
from tolaria.ops import (
    MetricsField,
    Order,
    SnapshotEntry,
    SnapshotTable,
    blend,
    classification_metrics_,
    governor_mailbox,
    governor_order_,
    governor_state,
    governor_step_,
    seed_gate,
    snapshot_capture_,
    snapshot_restore_,
    straight_through,
    tensor_stats,
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Shape, alpha's shape: one alpha; one for each element, row, column (few, many, whole packs), and channel.
FORMS = (
    ((257,), ()),
    ((8200,), ()),
    ((33, 5, 3), (33, 5, 3)),
    ((5, 3, 257), (5, 1, 1)),
    ((2, 4099), (2, 1)),
    ((1025, 5), (5,)),
    ((300, 33), (33,)),
    ((70, 48), (48,)),
    ((2, 3, 16, 17), (1, 3, 1, 1)),
)
Outcome = tuple[str, Tensor, Tensor | None]
"""A result, its name, and how far it may be from the reference; None: not a bit."""


def values(shape: tuple[int, ...], dtype: torch.dtype, number: int) -> Tensor:
    """Normal values of a number of their own, on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(dtype)


def placed(tensor: Tensor, device: str, skew: int = 0) -> Tensor:
    """The tensor on a device, ``skew`` elements behind the beginning of its memory."""
    room = torch.zeros(tensor.numel() + skew, dtype=tensor.dtype)
    room[skew:] = tensor.reshape(-1)
    return room.to(device)[skew:].view(tensor.shape)


def epsilon(*dtypes: torch.dtype) -> float:
    """Of the type that an op computes in."""
    return torch.finfo(torch.float64 if torch.float64 in dtypes else torch.float32).eps


def blends(device: str) -> Iterator[Outcome]:
    """``blend`` forward and backward: every pair of dtypes and form of alpha, on 16 bytes and beside them."""
    for number, (host_dtype, seed_dtype, (shape, alpha_shape), skew) in enumerate(
        itertools.product(DTYPES, DTYPES, FORMS, (0, 1))
    ):
        host, seed, grad = (
            values(shape, dtype, number + k) for k, dtype in enumerate((host_dtype, seed_dtype, host_dtype))
        )
        alpha = values(alpha_shape, torch.float32, number).mul(0.5).add(0.5)
        sizes = grad.double().abs() * (host.double().abs() + seed.double().abs())
        slack = 4 * epsilon(host_dtype, seed_dtype) * sizes.sum_to_size(alpha_shape)
        inputs = [placed(t, device, skew).requires_grad_() for t in (host, seed)]
        coefficients = placed(alpha, device).requires_grad_()
        incoming = placed(grad, device, skew)
        name = f"{host_dtype} {seed_dtype} {shape} {alpha_shape} {skew}"
        out = blend(*inputs, coefficients)
        yield f"blend {name}", out, ulps(out, 4)
        for learned in ((coefficients,), ()):
            out = blend(*inputs, coefficients if learned else coefficients.detach())
            found = torch.autograd.grad(out, [*inputs, *learned], incoming)
            for what, gradient in zip(("host", "seed"), found[:2], strict=True):
                yield f"grad_{what} {name}", gradient, ulps(gradient, 4)
            for gradient in found[2:]:
                yield f"grad_alpha {name}", gradient, slack


def ulps(tensor: Tensor, count: int) -> Tensor:
    """So many units in the last place of each element, and of the smallest values that matter here."""
    return count * torch.finfo(tensor.dtype).eps * tensor.detach().double().cpu().abs().clamp(min=1e-2)


def gates(device: str) -> Iterator[Outcome]:
    """``seed_gate`` and ``straight_through``, forward and backward, bit for bit."""
    for number, (dtype, (shape, alpha_shape), skew) in enumerate(itertools.product(DTYPES, FORMS, (0, 1))):
        features, seed, grad = (values(shape, dtype, number + k) for k in range(3))
        alpha = placed(values(alpha_shape, torch.float32, number), device)
        inputs = [placed(t, device, skew).requires_grad_() for t in (features, seed)]
        incoming, name = placed(grad, device, skew), f"{dtype} {shape} {alpha_shape} {skew}"
        out = seed_gate(inputs[0], alpha)
        yield f"seed_gate {name}", out, None
        yield f"its gradient {name}", torch.autograd.grad(out, inputs[0], incoming)[0], None
        out = straight_through(*inputs)
        yield f"straight_through {name}", out, None
        for gradient in torch.autograd.grad(out, inputs, incoming):
            yield f"its gradient {name}", gradient, None


def statistics(device: str) -> Iterator[Outcome]:
    """``tensor_stats``: every dtype, odd lengths and starts, several tables of tensors."""
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    lengths = (0, 1, 3, 17, 257, 4097, 70_001)
    mixed: list[Tensor | None] = [None]
    for number, (dtype, length) in enumerate(itertools.product((*DTYPES, *integers), lengths)):
        mixed.append(placed(values((length,), torch.float32, number).abs().to(dtype), device, number % 2))
    many = list(placed(values((2400 * 3,), torch.float32, 7), device).split(3))
    bad = [*many[:5], placed(torch.tensor([1.0, float("nan"), float("-inf")]), device)]
    for name, tensors in (("mixed", mixed), ("many", many), ("bad", bad)):
        found = tensor_stats(tensors)
        yield f"{name}: sum of squares", found[:1], found[:1].detach().cpu().abs() * 1e-12
        yield f"{name}: the rest", found[1:], None


def metrics(device: str) -> Iterator[Outcome]:
    """``classification_metrics_``: short rows, long rows, and classes that lie apart."""
    shapes = ((7, 10), (3, 1500), (5, 32_003), (2, 10, 5, 3), (1, 1))
    for number, (dtype, shape) in enumerate(itertools.product(DTYPES, shapes)):
        logits, classes = values(shape, dtype, number), shape[1]
        labels_shape = (shape[0], *shape[2:])
        labels = torch.arange(logits.numel() // classes).view(labels_shape) % classes
        labels.view(-1)[::4] = -100
        acc = placed(torch.zeros(len(MetricsField) + 2 * classes, dtype=torch.float64), device)
        classification_metrics_(acc, placed(logits, device), placed(labels, device), topk=3)
        slack = 64 * epsilon(dtype) * (logits.double().abs().amax() + 12) * labels.numel()
        yield f"loss {dtype} {shape}", acc[:1], slack.reshape(1)
        yield f"counts {dtype} {shape}", acc[1:], None


def governors(device: str) -> Iterator[Outcome]:
    """``governor_step_`` and ``governor_order_`` with every argument; state and mailbox bit for bit."""
    n = 33
    config = placed(GovernorConfig.balanced().to_tensor(2.3, "cpu"), device)
    for number, dtype in enumerate(DTYPES):
        state = placed(governor_state(n), device)
        mailbox = governor_mailbox(n, records=4, pin_memory=device != "cpu")
        for step in range(14):
            loss = values((n,), torch.float32, 100 * number + step).mul(0.1).add(1)
            loss[step % n] = (float("nan"), 1e4, 1.0)[step % 3]
            flags = [placed(torch.arange(n) % k == 0, device) if step % 2 else None for k in (11, 3, 17)]
            norms = loss.abs() if step % 4 < 2 else loss.abs()[:, None].repeat(1, 4)
            gradient = placed(norms.double(), device) if step % 3 else None
            nonfinite, active, state_bad = flags
            moved = placed(loss.to(dtype), device)
            governor_step_(state, config, moved, nonfinite, active, mailbox, gradient, state_bad)
            governor_order_(state, config, step, list(Order)[step % len(Order)], mailbox=mailbox)
        yield f"state {dtype}", state, None
        yield f"mailbox {dtype}", mailbox, None


def slots_like(live: Tensor, is_locked: bool) -> tuple[Tensor, Tensor]:
    """Two slots for a tensor, where it lies or in page-locked memory."""

    def slot() -> Tensor:
        if is_locked and live.device.type != "cpu":
            return torch.ops.tolaria.page_locked(live.nbytes).zero_().view(live.dtype)
        return placed(torch.zeros(live.shape, dtype=live.dtype), str(live.device))

    return slot(), slot()


def snapshots(device: str) -> Iterator[Outcome]:
    """Capture, promote, capture beside other work, restore: slots in page-locked and in device memory."""
    dtypes = (*DTYPES, torch.int64, torch.int16, torch.uint8, torch.complex64)
    kinds = list(enumerate(itertools.product(dtypes, (1, 3, 17, 257, 40_001))))
    for is_locked in (True, False):
        live = [placed(values((size,), dtype, k), device, k % 2) for k, (dtype, size) in kinds]
        slots = [slots_like(t, is_locked) for t in live]
        table = SnapshotTable(
            [
                SnapshotEntry(t, pair, part=k % 2, report_index=k, zeroed=k == 4, birth=k % 3)
                for k, (t, pair) in enumerate(zip(live, slots, strict=True))
            ],
            device=device,
        )
        state = placed(governor_state(), device)
        config = placed(GovernorConfig.balanced().to_tensor(2.3, "cpu"), device)
        for number, order in enumerate((Order.PROMOTE, Order.ROLLBACK)):
            for t in live[: number * len(live)]:
                t.zero_()
            governor_order_(state, config, 0, Order.CAPTURE)
            for part in (0, 1):
                snapshot_capture_(state, 0, table, part, ticket=part + 1, aside=part == 1)
            governor_order_(state, config, 0, order)
        snapshot_restore_(state, 0, config, table)
        name = f"with {'page-locked' if is_locked else 'device'} slots"
        yield f"state {name}", state, None
        for k, (t, pair) in enumerate(zip(live, slots, strict=True)):
            yield f"tensor {k} {name}", t, None
            for slot, kept in enumerate(pair):
                yield f"slot {slot} of tensor {k} {name}", kept, None


FAMILIES: dict[str, Callable[[str], Iterator[Outcome]]] = {
    "blend": blends,
    "gates": gates,
    "tensor_stats": statistics,
    "metrics": metrics,
    "governor": governors,
    "snapshot": snapshots,
}


def is_same(found: Tensor, wanted: Tensor, slack: Tensor | None) -> bool:
    """Whether a result is the reference's, as far as is promised."""
    a, b = found.detach().cpu().contiguous(), wanted.detach().cpu().contiguous()
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if slack is None:
        return torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    return bool(((a.double() - b.double()).abs() <= slack).all())


def check(family: str, device: str) -> tuple[int, list[str]]:
    """How many results of a family there are, and which are wrong."""
    with tolaria.backend("fused"):
        found = list(FAMILIES[family](device))
    if device != "cpu":
        torch.cuda.synchronize()  # what kernels write to page-locked memory is there, too
    with tolaria.backend("reference"):
        wanted = [tensor for _, tensor, _ in FAMILIES[family]("cpu")]
    wrong = [
        name
        for (name, tensor, slack), right in zip(found, wanted, strict=True)
        if not is_same(tensor, right, slack)
    ]
    return len(found), wrong


def main() -> int:
    """Command line; the exit status is 0 if every result was right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", help="default: cuda if there is one and the extension has kernels for it")
    parser.add_argument("--only", choices=FAMILIES, help="one family of ops")
    arguments = parser.parse_args()
    has_kernels = torch.cuda.is_available() and _extension.CUDA
    device = arguments.device or ("cuda" if has_kernels else "cpu")
    total, failed = 0, 0
    for family in [arguments.only] if arguments.only else FAMILIES:
        count, wrong = check(family, device)
        total, failed = total + count, failed + len(wrong)
        print(f"{family}: {count} results, {len(wrong)} wrong{''.join(f'; {name}' for name in wrong[:5])}")
    print(f"every kernel on {device}: {total} results, {failed} wrong", flush=True)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
