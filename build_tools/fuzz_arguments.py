"""Calls every op with odd arguments: shapes, strides, dtypes, layouts, and any bytes as governors' states.

A call may do its work or refuse; it may not crash, nor raise what is no refusal. Governor ops take any bytes
as state without refusing, alike by both implementations and inside guard bands. Under the sanitizers
(``build_tools/sanitize.py``) no call may touch memory that is not its own. What call number k does depends on
k alone: a finding is repeated with ``--first k --calls 1``.
"""

from __future__ import annotations

import argparse
import collections
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in (".", "tests")]

from any_bytes import CALLS, Scene, outcome  # noqa: E402

import tolaria  # noqa: E402
from tolaria import _extension, ops  # noqa: E402

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OTHER = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64)
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError)
SHAPES = ((), (0,), (1,), (7,), (33,), (4, 0, 3), (2, 3), (5, 257), (3, 4, 5), (2, 3, 8, 8), (2, 3, 2, 4, 5))
LARGE = ((1 << 19,), (3, 300_001), (8, 64, 32, 32))  # pooled, streamed and shared among threads

kernels = torch.ops.tolaria


class Draw(random.Random):
    """What a call is made of."""

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this shape, somewhere in a larger memory, in one of many layouts."""
        dtype = dtype or self.choice(FLOATING)
        way = self.choice(
            ("plain", "plain", "offset", "permuted", "gaps", "expanded", "any", "channels_last")
        )
        if way == "permuted":
            order = self.sample(range(len(shape)), len(shape))
            inverse = [order.index(i) for i in range(len(order))]
            return self._filled(tuple(shape[i] for i in order), dtype).permute(inverse)
        if way == "gaps" and shape:
            return self._filled((*shape[:-1], 2 * shape[-1] + 1), dtype)[..., 1::2]
        if way == "expanded" and shape:
            kept = tuple(1 if self.random() < 0.5 else n for n in shape)
            return self._filled(kept, dtype).expand(shape)
        if way == "any" and len(shape) < 4 and 0 not in shape:  # strides that may overlap
            strides = [self.choice((0, 1, 1, 2, 3, *shape)) for _ in shape]
            last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
            return self._filled((last + 1 + 3,), dtype).as_strided(shape, strides, self.randrange(4))
        if way == "channels_last" and len(shape) == 4:
            return self._filled(shape, dtype).contiguous(memory_format=torch.channels_last)
        skip = self.randrange(5) if way == "offset" else 0
        size = int(torch.Size(shape).numel())
        return self._filled((size + skip,), dtype)[skip:].view(shape)

    def _filled(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        bits = torch.empty(shape, dtype=dtype)
        if self.random() < 0.2 and dtype in FLOATING:  # any bytes
            return bits.copy_(
                torch.randint(256, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).view(shape)
            )
        return bits.copy_(torch.randn(shape) * 3)

    def odd(self, tensor: Tensor) -> object:
        """Something in the place of ``tensor`` that may not fit."""
        shape = tuple(tensor.shape)
        return self.choice(
            (
                lambda: self.tensor(self.choice(SHAPES), tensor.dtype),
                lambda: self.tensor(shape, self.choice(FLOATING + OTHER)),
                lambda: self.tensor((*shape, 1), tensor.dtype),
                lambda: self.tensor(shape[1:], tensor.dtype),
                lambda: tensor.detach().to("meta"),
                lambda: tensor.detach().to_sparse(),
                lambda: torch._neg_view(tensor.detach()),
                lambda: torch._efficientzerotensor(shape, dtype=tensor.dtype),
                lambda: torch.quantize_per_tensor(tensor.detach().float(), 0.1, 0, torch.qint8),
                lambda: tensor.detach().to(torch.float8_e4m3fn),
                lambda: tensor.detach().clone().requires_grad_(),
                lambda: None,
                lambda: 1.0,
            )
        )()

    def maybe_odd(self, arguments: list[Any]) -> list[Any]:
        """Half of the calls as they are, half with one argument replaced."""
        places = [i for i, value in enumerate(arguments) if isinstance(value, Tensor)]
        if places and self.random() < 0.5:
            place = self.choice(places)
            arguments[place] = self.odd(arguments[place])
        return arguments

    def shape(self) -> tuple[int, ...]:
        """Mostly small."""
        return self.choice(LARGE) if self.random() < 0.01 else self.choice(SHAPES)

    def alpha(self, shape: tuple[int, ...]) -> Tensor:
        """One that broadcasts to ``shape``, mostly."""
        kept = tuple(n if self.random() < 0.4 else 1 for n in shape)
        values = self.tensor(kept[self.randrange(len(kept) + 1) :] if self.random() < 0.5 else kept)
        return values if self.random() < 0.3 else values.clamp(0.0, 1.0)


def blend(draw: Draw) -> None:
    """Forward and, by autograd, backward."""
    shape = draw.shape()
    values = draw.maybe_odd([draw.tensor(shape), draw.tensor(shape), draw.alpha(shape)])
    values = [v.requires_grad_() if _may_train(draw, v) else v for v in values]
    out = ops.blend(*values)
    if out.requires_grad:
        out.backward(draw.tensor(tuple(out.shape), out.dtype))


def _may_train(draw: Draw, value: object) -> bool:
    return isinstance(value, Tensor) and value.is_leaf and value.is_floating_point() and draw.random() < 0.6


def blend_backward(draw: Draw) -> None:
    """The backward op itself, in place or not, with host and seed or without."""
    shape = draw.shape()
    dtype, other = draw.choice(FLOATING), draw.choice(FLOATING)
    asks_alpha = draw.random() < 0.5
    grad, host = draw.tensor(shape, dtype), draw.tensor(shape, dtype)
    seed = draw.tensor(shape, other)
    pair: list[Any] = [host, seed] if asks_alpha or draw.random() < 0.3 else [None, None]
    arguments = draw.maybe_odd([grad, *pair, draw.alpha(shape), other])
    if draw.random() < 0.1:
        arguments[4] = draw.choice(FLOATING + OTHER)
    if draw.random() < 0.5:
        kernels.blend_backward(*arguments, [draw.random() < 0.7, draw.random() < 0.7, asks_alpha])
    else:
        kernels.blend_backward_(*arguments, [draw.random() < 0.7, asks_alpha])


def gates(draw: Draw) -> None:
    """seed_gate, its backward and straight_through."""
    shape = draw.shape()
    first, second, alpha = draw.tensor(shape), draw.tensor(shape), draw.alpha(shape)
    name = draw.choice(("seed_gate", "seed_gate_backward", "seed_gate_backward_", "straight_through"))
    arguments = draw.maybe_odd([first, second if name == "straight_through" else alpha])
    getattr(kernels, name)(*arguments)


def stats(draw: Draw) -> None:
    """tensor_stats over lists of anything."""
    tensors: list[Any] = [
        draw.tensor(draw.shape(), draw.choice((*FLOATING, *OTHER))) if draw.random() < 0.9 else None
        for _ in range(draw.randrange(6))
    ]
    ops.tensor_stats(draw.maybe_odd(tensors))


def metrics(draw: Draw) -> None:
    """classification_metrics_, with labels of any value."""
    rows, classes = draw.choice((0, 1, 3, 17)), draw.choice((1, 2, 10, 1000))
    lead = draw.choice(((rows,), (rows, 2), ()))
    size = len(ops.MetricsField) + draw.choice((0, 2 * classes, 1))
    labels = torch.randint(-2, classes + draw.choice((0, 0, 5)), lead)
    if draw.random() < 0.1 and labels.numel():
        labels.view(-1)[0] = draw.choice((2**63 - 1, -(2**63), 2**31, 2**40))
    acc = torch.zeros(size, dtype=torch.float64)
    logits = draw.tensor((*lead, classes))
    arguments = draw.maybe_odd([acc, logits, labels])
    extra = [draw.choice((-100, -1, 0, 2**62, -(2**63))), draw.choice((1, 5, 0, -1, 2**40))]
    ops.classification_metrics_(*arguments, *extra)


def governors(draw: Draw) -> None:
    """A governor or snapshot op with any bytes as state, by both implementations, and guard bands."""
    number, call = draw.randrange(1 << 40), draw.choice(list(CALLS))
    bits = []
    for mode in ("reference", "fused"):
        with tolaria.backend(mode):  # type: ignore[arg-type]
            bits.append(outcome(Scene(number), call))
    for mine, wanted in zip(*bits, strict=True):
        assert torch.equal(mine, wanted), f"{call} of scene {number}: the implementations differ"


def governor_arguments(draw: Draw) -> None:
    """Governor ops with one argument that may not fit, by the op's own entrance and by the shortest way."""
    n = draw.choice((1, 1, 3, 20))
    state, mailbox = ops.governor_state(n, window=draw.choice((1, 5, 20))), ops.governor_mailbox(n, records=2)
    config = torch.randn(len(ops.ConfigField), dtype=torch.float64)
    flags = [draw.choice((None, torch.rand(n) < 0.5, torch.rand(n))) for _ in range(3)]
    gradient = draw.choice((None, torch.rand(n), torch.rand(n, 4, dtype=torch.float64)))
    arguments = draw.maybe_odd([state, config, draw.tensor((n,)), *flags[:2], mailbox, gradient, flags[2]])
    entrance = draw.choice(("step", "judge", "order", "capture", "restore"))
    given_state, given_config, given_box = arguments[0], arguments[1], arguments[5]
    column, number = draw.choice((0, n - 1, n, -1, 2**40)), draw.choice((0, 1, 2, 3, 4, -1, 2**33))
    owner = ops.SnapshotTable([ops.SnapshotEntry(torch.ones(3), (torch.ones(3), torch.ones(3)), 0, 0)])
    table: Any = owner.data  # of addresses in memory that the owner keeps
    if draw.random() < 0.5:
        table[0, :2] = torch.tensor([draw.choice((-1, 0, 1, 2, 2**62)), draw.choice((-1, 0, 1, 2, 2**62))])
    if draw.random() < 0.3:
        table = draw.odd(table)
        if isinstance(table, Tensor) and table.dtype == torch.int64 and not table.is_meta:
            table.zero_()  # no rows: a wrong address is beyond what an op can refuse
    if isinstance(given_state, Tensor) and given_state is state and draw.random() < 0.5:
        state[ops.StateField.restore_order] = 1.0
        state[ops.StateField.capture_order_0] = 0.0
    if entrance == "step":
        kernels.governor_step_(*arguments)
    elif entrance == "judge":
        _extension.judge(*[a for i, a in enumerate(arguments) if i not in (4, 7)], 0, [], [])
    elif entrance == "order":
        kernels.governor_order_(
            given_state, given_config, column, number, draw.choice((5, 99)), -1, given_box
        )
    elif entrance == "capture":
        kernels.snapshot_capture_(given_state, column, table, number, given_box)
    else:
        kernels.snapshot_restore_(given_state, column, given_config, table, given_box)


KINDS: tuple[Callable[[Draw], None], ...] = (
    *(blend, blend_backward, gates, stats, metrics),
    *(governors, governors, governor_arguments),
)


def run(first: int, calls: int) -> collections.Counter[str]:
    """Make so many calls; how many did their work and how many refused, by kind.

    Raises:
        Exception: whatever a call should not have raised, behind a line that says which one it was.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    for number in range(first, first + calls):
        draw = Draw(number)
        torch.manual_seed(number)
        kind = draw.choice(KINDS)
        refusals = () if kind is governors else REFUSALS
        try:
            kind(draw)
        except refusals:
            outcomes[f"{kind.__name__} refused"] += 1
        except BaseException:
            print(
                f"fuzz: call {number} ({kind.__name__}); repeat it with --first {number} --calls 1",
                flush=True,
            )
            raise
        else:
            outcomes[f"{kind.__name__} done"] += 1
    return outcomes


def main() -> None:
    """Parse the arguments, make the calls, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=20_000, help="how many calls (default 20000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first call (default 0)")
    chosen = parser.parse_args()
    if not _extension.LOADED:
        sys.exit(f"fuzz: expected the compiled extension, got none: {_extension.LOAD_ERROR}")
    warnings.simplefilter("ignore")
    outcomes = run(chosen.first, chosen.calls)
    for name in sorted(outcomes):
        print(f"fuzz: {name}: {outcomes[name]}")
    print(f"fuzz: {chosen.calls} calls, none that crashed")


if __name__ == "__main__":
    main()
