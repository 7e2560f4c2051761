"""Random calls of every op and every gradient, against float64 or, where bits are promised, the reference.

By hand, from the repository's root (the suite runs a slice, tests/ops/test_fuzz.py):

    PYTHONPATH=.:tests python tests/fuzz_ops.py --calls 200000 --seed 1 [--device cuda] [--only blend]

Prints each wrong call with what repeats it (``--seed S --start N --calls 1``), then a line with the figures;
exit status 1 if one was wrong. Every call draws from a generator of its own number.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable

import torch
from exact import F64, Exact, arithmetic_dtype, assert_blend_is_exact, assert_ends_keep_bits, assert_within
from strategies import DTYPES, LAYOUTS, alpha_shapes, laid_out, same_bits
from torch import Tensor

import tolaria
from tolaria import _extension
from tolaria.governor import GovernorConfig
from tolaria.ops import (
    MetricsField,
    Order,
    SnapshotEntry,
    SnapshotTable,
    StateField,
    blend,
    classification_metrics_,
    governor_mailbox,
    governor_order_,
    governor_state,
    governor_step_,
    seed_gate,
    straight_through,
    tensor_stats,
)

INF, NAN = math.inf, math.nan
SIZES = [0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 65]
LENGTHS = [*SIZES, 127, 255, 256, 257, 300, 511, 519, 1023, 1025, 4097]
ALPHAS = [-INF, -1.0, -1e-50, -0.0, 0.0, 1e-50, 1e-30, 1e-3, 0.3, 0.5, 0.7, 1 - 1e-12, 1.0, 1.5, INF, NAN]
SPECIAL = [NAN, INF, -INF, 0.0, -0.0, 1e-40, -6e-8, 65504.0]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


class Draw:
    """Random arguments of one call."""

    def __init__(self, number: int, device: str) -> None:
        self.generator = torch.Generator().manual_seed(number)
        self.device = device

    def below(self, n: int) -> int:
        return int(torch.randint(n, (), generator=self.generator))

    def one(self, choices: list) -> object:
        return choices[self.below(len(choices))]

    def chance(self, part: float) -> bool:
        return bool(torch.rand((), generator=self.generator) < part)

    def dtype(self) -> torch.dtype:
        return self.one(DTYPES)

    def shape(self) -> tuple[int, ...]:
        """One long dimension, or several short ones."""
        if self.chance(0.4):
            return (self.one(LENGTHS),)
        shape, size = [], 1
        for _ in range(1 + self.below(4)):
            shape.append(self.one([n for n in SIZES if size * n <= 5000]))
            size *= max(1, shape[-1])
        return tuple(shape)

    def values(self, shape: tuple[int, ...], scale: float = 1.0, specials: bool = True) -> Tensor:
        """float64: normal values, a tenth of them special in a fifth of the calls."""
        values = torch.randn(shape, dtype=F64, generator=self.generator) * scale
        if specials and self.chance(0.2):
            chosen = torch.tensor(SPECIAL, dtype=F64)
            chosen = chosen[torch.randint(len(SPECIAL), shape, generator=self.generator)]
            values = torch.where(torch.rand(shape, generator=self.generator) < 0.1, chosen, values)
        return values

    def placed(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The values in a dtype, a memory layout and at a start of their own."""
        layout = self.one(LAYOUTS) if self.chance(0.5) else "contiguous"
        return laid_out(values.to(dtype).to(self.device), layout)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return self.placed(self.values(shape, scale), dtype)

    def alpha(self, shape: tuple[int, ...]) -> Tensor:
        shape = self.one(alpha_shapes(shape)) if self.chance(0.6) else ()
        if self.chance(0.5):
            values = torch.rand(shape, dtype=F64, generator=self.generator)
        else:
            values = torch.tensor(ALPHAS, dtype=F64)
            values = values[torch.randint(len(ALPHAS), shape, generator=self.generator)]
        return self.placed(values, self.dtype())

    def blend(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Host, seed, alpha and grad; scales that no product of theirs overflows float32 with."""
        shape, host, seed = self.shape(), self.dtype(), self.dtype()
        scale = self.one([1.0, 1.0, 1.0, 1e-3, 30.0, 1e-20])
        return (
            self.tensor(shape, host, scale),
            self.tensor(shape, seed, scale),
            self.alpha(shape),
            self.tensor(shape, host),
        )


def fuzz_blend(draw: Draw) -> None:
    """Result and gradients through autograd, those asked for; in a quarter also of a second backward."""
    host, seed, alpha, grad = draw.blend()
    wants = [draw.chance(0.8) for _ in range(3)]
    inputs = [t.detach().requires_grad_(want) for t, want in zip((host, seed, alpha), wants, strict=True)]
    out = blend(*inputs)
    found = [None, None, None]
    if any(wants):
        asked = [t for t in inputs if t.requires_grad]
        if draw.chance(0.5):  # a gradient that nobody else holds is written over
            total = (out * grad.detach().clone(memory_format=torch.preserve_format)).sum()
            given = iter(torch.autograd.grad(total, asked))
        else:
            given = iter(torch.autograd.grad(out, asked, grad))
        found = [next(given) if want else None for want in wants]
    assert_blend_is_exact(host, seed, alpha, grad, (out, *found))
    assert_ends_keep_bits(host, seed, alpha, out)
    assert out.dtype == host.dtype
    assert all(f is None or f.dtype == t.dtype for f, t in zip(found, inputs, strict=True))


def fuzz_blend_backward(draw: Draw) -> None:
    """The functional op, and the one in place beside it, bit for bit."""
    host, seed, alpha, grad = draw.blend()
    mask = [draw.chance(0.7) for _ in range(3)]
    ops, kept = torch.ops.tolaria, grad.clone()
    sources = (host, seed) if mask[2] else (None, None)
    found = ops.blend_backward(grad, *sources, alpha, seed.dtype, mask)
    assert_blend_is_exact(host, seed, alpha, kept, (None, *found))
    assert same_bits(grad, kept)
    assert [f is not None for f in found] == mask
    if grad.is_contiguous():  # an expanded one cannot be written
        target = grad.clone() if not grad.storage_offset() else laid_out(grad.clone(), "offset")
        rest = ops.blend_backward_(target, *sources, alpha, seed.dtype, mask[1:])
        assert_blend_is_exact(host, seed, alpha, kept, (None, target, *rest))


def fuzz_second(draw: Draw) -> None:
    """create_graph: first derivatives as without it, second ones NaN only where something of it is."""
    host, seed, alpha, grad = draw.blend()
    inputs = [t.detach().requires_grad_() for t in (host, seed, alpha, grad)]
    first = torch.autograd.grad(blend(*inputs[:3]), inputs[:3], inputs[3], create_graph=True)
    sums = arithmetic_dtype(host.dtype, seed.dtype)
    assert_blend_is_exact(host, seed, alpha, grad, (None, *first), sums)
    total = sum(g.double().sum() for g in first)
    second = torch.autograd.grad(total, inputs, allow_unused=True)
    kind = arithmetic_dtype(host.dtype, seed.dtype)
    a = alpha.detach().to(kind).double().expand(host.shape)
    # d/d grad of the sums: (1 - a) + a + (seed - host), the last where alpha is live
    h, s = host.double(), seed.double()
    is_host, is_seed, live = a <= 0, a >= 1, (a >= 0) & (a <= 1)
    weights = torch.where(is_host | is_seed, 1.0, (1 - a) + a) + torch.where(live, s - h, 0.0)
    eps = max(torch.finfo(t).eps for t in (kind, host.dtype, seed.dtype, alpha.dtype))
    slack = 8 * eps * (2 + torch.where(live, h.abs() + s.abs(), 0.0))
    assert_within(second[3], Exact(weights.cpu(), slack.cpu()), "second derivative of grad")


def fuzz_seed_gate(draw: Draw) -> None:
    shape, dtype = draw.shape(), draw.dtype()
    features, grad, alpha = draw.tensor(shape, dtype), draw.tensor(shape, dtype), draw.alpha(shape)
    leaf = features.detach().requires_grad_()
    out = seed_gate(leaf, alpha)
    if draw.chance(0.5):
        (found,) = torch.autograd.grad(out, leaf, grad)
    else:
        (found,) = torch.autograd.grad((out * grad).sum(), leaf)
        grad = grad * torch.ones_like(grad)
    shut = (alpha.to(arithmetic_dtype(dtype)) <= 0).expand(shape)
    assert same_bits(out, features)
    assert same_bits(found, torch.where(shut, 0.0, grad))


def fuzz_straight_through(draw: Draw) -> None:
    shape, host_dtype, seed_dtype = draw.shape(), draw.dtype(), draw.dtype()
    host, seed = draw.tensor(shape, host_dtype), draw.tensor(shape, seed_dtype)
    grad = draw.tensor(shape, host_dtype)
    leaves = [t.detach().requires_grad_() for t in (host, seed)]
    out = straight_through(*leaves)
    found = torch.autograd.grad(out, leaves, grad)
    assert same_bits(out, host)
    assert same_bits(found[0], grad)
    assert same_bits(found[1], grad.to(seed_dtype))


def fuzz_tensor_stats(draw: Draw) -> None:
    tensors: list[Tensor | None] = []
    for _ in range(draw.below(6)):
        shape = draw.shape() if draw.chance(0.95) else (32768 + draw.one(LENGTHS),)
        if draw.chance(0.15):
            tensors.append(None)
        elif draw.chance(0.2):
            tensors.append(draw.placed(draw.values(shape, 50.0, specials=False).abs(), draw.one(INTEGERS)))
        else:
            tensors.append(draw.tensor(shape, draw.dtype(), draw.one([1.0, 1e-3, 1e3])))
    found = tensor_stats(tensors).cpu()
    wide = [(i, t.double().cpu()) for i, t in enumerate(tensors) if t is not None]
    finite = [t[t.isfinite()] for _, t in wide]
    exact = math.fsum(v for t in finite for v in t.square().tolist())
    count = sum(t.numel() for t in finite)
    bad = [i for i, t in wide if not t.isfinite().all()]
    assert abs(float(found[0]) - exact) <= (count + 4) * 2.0**-53 * exact, (float(found[0]), exact)
    assert float(found[1]) == max((float(t.abs().max()) for t in finite if t.numel()), default=0.0)
    assert float(found[2]) == sum(int((~t.isfinite()).sum()) for _, t in wide)
    assert float(found[3]) == (bad[0] if bad else -1)


def fuzz_metrics(draw: Draw) -> None:
    classes = draw.one([1, 2, 3, 5, 10, 17, 33, 100, 1000, 1025])
    rest = tuple(draw.one([1, 2, 3, 5, 8]) for _ in range(draw.below(3)))
    shape = (classes,) if draw.chance(0.1) else (draw.one([0, 1, 2, 7, 16]), classes, *rest)
    dtype, topk, ignore = draw.dtype(), 1 + draw.below(6), draw.one([-100, 0, 3])
    logits = draw.placed(draw.values(shape, draw.one([1.0, 10.0]), specials=False), dtype)
    labels_shape = shape[:1] * (len(shape) > 1) + shape[2:]
    labels = torch.randint(classes, labels_shape, generator=draw.generator)
    labels[torch.rand(labels_shape, generator=draw.generator) < 0.2] = ignore
    valid = ((labels >= 0) & (labels < classes)) | (labels == ignore)
    labels = torch.where(valid, labels, 0)
    least, most = min(ignore, 0), max(ignore, classes - 1)
    kind = draw.one([t for t in INTEGERS if torch.iinfo(t).min <= least and most <= torch.iinfo(t).max])
    per_class = draw.chance(0.5)
    acc = torch.zeros(len(MetricsField) + 2 * classes * per_class, dtype=F64, device=draw.device)
    for _ in range(2):  # adds up
        classification_metrics_(acc, logits, labels.to(kind).to(draw.device), ignore, topk)
    found = acc.cpu() / 2

    rows = logits.double().cpu()
    rows = rows.movedim(1, -1).reshape(-1, classes) if len(shape) > 1 else rows[None]
    flat = labels.flatten()
    counted = flat != ignore
    rows, flat = rows[counted], flat[counted]
    losses = torch.logsumexp(rows, 1) - rows.gather(1, flat[:, None])[:, 0]
    unit = torch.finfo(arithmetic_dtype(dtype)).eps
    size = (losses.abs() + rows.abs().amax(1) + math.log(classes) + 1).sum() if len(rows) else torch.zeros(())
    assert abs(found[0] - losses.sum()) <= 16 * unit * size + 1e-30, (found[0], losses.sum())
    target = rows.gather(1, flat[:, None])
    earlier = torch.arange(classes) < flat[:, None]
    ranks = ((rows > target) | ((rows == target) & earlier)).sum(1)
    hits = ranks == 0
    assert found[1:5].tolist() == [len(flat), int(hits.sum()), int((ranks < topk).sum()), 0]
    if per_class:
        wanted = torch.stack([torch.bincount(part, minlength=classes) for part in (flat[hits], flat)])
        assert torch.equal(found[5:].view(2, classes), wanted.double())


def fuzz_governor(draw: Draw) -> None:
    """Random losses, flags and orders for a few governors, against the reference bit for bit."""
    n, window = 1 + draw.below(5), draw.one([2, 3, 4, 8, 20])
    config = GovernorConfig(
        window=window,
        min_history=draw.one([w for w in (2, 3, 10) if w <= window]),
        snapshot_interval=3 + draw.below(4),
        probation=1 + draw.below(2),
        min_panics_before_rollback=1 + draw.below(3),
        rule=draw.one(["all", "any"]),
        absolute_threshold=draw.one([2.0, 10.0]),
    ).to_tensor(2.3, "cpu")
    states = [governor_state(n, window=window) for _ in range(2)]
    boxes = [governor_mailbox(n, records=4) for _ in range(2)]
    dtype = draw.dtype()
    device = draw.device
    box = boxes[0].pin_memory() if torch.device(device).type == "cuda" else boxes[0]
    fused = [states[0].to(device), box, config.to(device)]
    for _ in range(4 + draw.below(12)):
        loss = 1 + 0.3 * draw.values((n,))
        loss = torch.where(torch.rand(n, generator=draw.generator) < 0.2, loss * 30, loss).to(dtype)
        flags = torch.rand(n, generator=draw.generator) < 0.1 if draw.chance(0.3) else None
        active = torch.rand(n, generator=draw.generator) < 0.8 if draw.chance(0.3) else None
        gradient = draw.values((n,)).abs() if draw.chance(0.3) else None
        order = draw.one(list(Order)) if draw.chance(0.2) else None
        column = draw.below(n)

        def run(state: Tensor, mailbox: Tensor, settings: Tensor, *rest: Tensor | None) -> None:
            governor_step_(state, settings, rest[0], rest[1], rest[2], mailbox, rest[3])
            if order is not None:  # noqa: B023
                governor_order_(state, settings, column, order, mailbox=mailbox)  # noqa: B023

        rest = (loss, flags, active, gradient)
        run(*fused, *(None if t is None else t.to(device) for t in rest))
        with tolaria.backend("reference"):
            run(states[1], boxes[1], config, *rest)
        state = fused[0].cpu()  # after which the mailbox is written, too
        assert torch.equal(state.view(torch.int64), states[1].view(torch.int64)), "state"
        assert torch.equal(fused[1].view(torch.int64), boxes[1].view(torch.int64)), "mailbox"


def fuzz_snapshot(draw: Draw) -> None:
    """Capture, look for what is not finite, promote, overwrite, restore: the bytes as they were."""
    live, kinds = [], [*DTYPES, *INTEGERS]
    for _ in range(1 + draw.below(5)):
        shape, dtype = draw.shape(), draw.one(kinds)
        values = draw.values(shape) if dtype.is_floating_point else draw.values(shape, 20.0, False).abs()
        live.append(laid_out(values.to(dtype).to(draw.device), draw.one(["contiguous", "offset"])))
    slots = [tuple(torch.zeros_like(t) for _ in range(2)) for t in live]
    first = draw.below(len(live) + 1)  # of part 1
    checked = [draw.chance(0.7) for _ in live]
    table = SnapshotTable(
        [SnapshotEntry(t, slots[k], int(k >= first), k if checked[k] else -1) for k, t in enumerate(live)],
        device=draw.device,
    )
    config, state = (t.to(draw.device) for t in (GovernorConfig().to_tensor(2.3, "cpu"), governor_state()))

    def capture() -> int:
        governor_order_(state, config, 0, Order.CAPTURE)
        slot = int(state[StateField.candidate])
        for part in (0, 1):
            torch.ops.tolaria.snapshot_capture_(state, 0, table.data, part, None)
        assert all(same_bytes(t, pair[slot]) for t, pair in zip(live, slots, strict=True))
        bad = [k for k, t in enumerate(live) if checked[k] and not bool(t.isfinite().all())]
        assert int(state[StateField.candidate_bad]) in ([-1] if not bad else bad[:1])
        return len(bad)

    if capture():
        return
    governor_order_(state, config, 0, Order.PROMOTE)
    wanted = [t.clone() for t in live]
    for t in live:
        t.zero_()
    capture()  # another candidate, which the rollback forgets
    governor_order_(state, config, 0, Order.ROLLBACK)
    torch.ops.tolaria.snapshot_restore_(state, 0, config, table.data, None)
    assert all(same_bytes(a, b) for a, b in zip(live, wanted, strict=True))


def same_bytes(a: Tensor, b: Tensor) -> bool:
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return torch.equal(a.view(words), b.view(words))


FUZZERS: dict[str, Callable[[Draw], None]] = {
    "blend": fuzz_blend,
    "blend_backward": fuzz_blend_backward,
    "second": fuzz_second,
    "seed_gate": fuzz_seed_gate,
    "straight_through": fuzz_straight_through,
    "tensor_stats": fuzz_tensor_stats,
    "classification_metrics_": fuzz_metrics,
    "governor": fuzz_governor,
    "snapshot": fuzz_snapshot,
}
# Half of the calls are blend's: it has the most branches.
SCHEDULE = [*["blend"] * 5, *["blend_backward"] * 4, *[name for name in FUZZERS if "blend" not in name]]


def run_call(seed: int, number: int, device: str = "cpu", only: str | None = None) -> str:
    """One random call; its op's name. Every other one of those on the CPU writes past the caches."""
    name = only or SCHEDULE[number % len(SCHEDULE)]
    draw = Draw(seed * 1_000_003 + number, device)
    former = _extension.set_stream_above(0) if device == "cpu" and draw.chance(0.5) else None
    try:
        FUZZERS[name](draw)
    finally:
        if former is not None:
            _extension.set_stream_above(former)
    return name


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=FUZZERS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    done, wrong = Counter[str](), 0
    with tolaria.backend("fused"):
        for number in itertools.islice(itertools.count(arguments.start), arguments.calls):
            try:
                done[run_call(arguments.seed, number, arguments.device, arguments.only)] += 1
            except Exception as error:  # every kind of failure counts, and the others are wanted, too
                wrong += 1
                what = f"{type(error).__name__}: {error}"
                print(f"WRONG --seed {arguments.seed} --start {number}: {what}", flush=True)
    figures = ", ".join(f"{name} {count}" for name, count in sorted(done.items()))
    print(f"{arguments.calls} calls on {arguments.device}: {wrong} wrong ({figures})")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
