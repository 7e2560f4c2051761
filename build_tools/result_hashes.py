"""What every CPU op computes, as hashes: the same on every processor and of every compiler.

    python -m build_tools.result_hashes > results.json

Prints JSON: ``exact``, a hash of the bits of each case, and ``bounded``, the values of those whose last bits
may differ (metrics: see csrc/cpu/metrics.cpp). Inputs are made of random integers, never of a function whose
bits may depend on the processor. Computed NaNs are made one, since their sign and payload do; those that are
only copied are not. ``build_tools/processors.py`` runs it on several processors and compares.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tolaria import _extension, ops
from tolaria.governor import GovernorConfig
from tolaria.ops import Order, PanicReason, SnapshotEntry, SnapshotTable, StateField

Case = tuple[str, list[Tensor]]

FLOATS = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}
PAIRS = [(a, b) for a in FLOATS for b in FLOATS if a == b or (("f32" in (a, b)) and ("f64" not in (a, b)))]
_EXPONENT = {torch.float32: 8, torch.float64: 11, torch.float16: 5, torch.bfloat16: 8}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
SIZES = (1, 15, 16, 17, 255, 513, 40_007)
"""Below and above a pack of every dtype, with a rest; the last is more than a piece of the parallel loop."""


class Source:
    """Tensors of random bits.

    Args:
        seed: the same seed gives the same tensors everywhere.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def integers(self, n: int, low: int, high: int) -> Tensor:
        """int64 from ``low`` to ``high - 1``."""
        raw = self._bits.random_raw(n) >> np.uint64(16)
        return torch.from_numpy((raw % np.uint64(high - low)).astype(np.int64)) + low

    def floats(self, n: int, dtype: torch.dtype, *, odd: bool = False) -> Tensor:
        """Values of either sign from about 1/16 to 16; ``odd``: a third of them any bits or special ones."""
        size, width = dtype.itemsize * 8, _EXPONENT[dtype]
        mantissa = size - 1 - width
        bias = (1 << (width - 1)) - 1
        bits = self.integers(n, 0, 1 << mantissa) | (self.integers(n, bias - 4, bias + 4) << mantissa)
        if odd:
            full, kind = ((1 << width) - 1) << mantissa, self.integers(n, 0, 24)
            special = [0, 1, full, full | 1, full | (1 << (mantissa - 1)) | 5, full - 1, 1 << mantissa]
            for number, value in enumerate(
                special
            ):  # zero, the least, infinity, NaNs, the largest, the least normal
                bits[kind == number] = value
            bits[kind == len(special)] = self.integers(n, 0, 1 << (size - 1))[kind == len(special)]
        negative = self.integers(n, 0, 2) << (size - 1)  # wraps around to the sign of an int64
        return (bits | negative).to(_BITS[dtype.itemsize]).view(dtype)


def one_nan(values: Tensor) -> Tensor:
    """``values`` with one NaN for all."""
    return torch.where(values.isnan(), float("nan"), values)


def digest(tensors: list[Tensor]) -> str:
    """A hash of their bits."""
    found = hashlib.sha256()
    for tensor in tensors:
        whole = tensor.detach().contiguous()
        found.update(f"{whole.dtype} {tuple(whole.shape)}".encode())
        found.update(whole.view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _blended(host: Tensor, seed: Tensor, alpha: Tensor, grad: Tensor) -> list[Tensor]:
    """The value and the three gradients."""
    inputs = [t.clone().requires_grad_() for t in (host, seed, alpha)]
    out = ops.blend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def blends() -> Iterator[Case]:
    """Values and gradients of blend: every pair of dtypes, every branch, alpha of any shape."""
    for number, (a, b) in enumerate(PAIRS):
        for alpha in (0.0, 0.3, 0.5, 0.7, 1.0, float("nan")):
            for odd in (False, True):
                found: list[Tensor] = []
                for size in SIZES:
                    source = Source(1000 * number + size)
                    host, grad = (source.floats(size, FLOATS[a], odd=odd) for _ in range(2))
                    found += _blended(
                        host, source.floats(size, FLOATS[b], odd=odd), torch.tensor(alpha), grad
                    )
                keeps = a == b and alpha in (0.0, 1.0)  # but for alpha's own gradient, nothing is computed
                found = [t if keeps and t.dim() else one_nan(t) for t in found]
                yield f"blend {a} {b} alpha={alpha}{' odd' * odd}", found
        yield (
            f"blend {a} {b} alpha varies",
            [one_nan(t) for t in _varied(Source(number), FLOATS[a], FLOATS[b])],
        )


def _varied(source: Source, host_dtype: torch.dtype, seed_dtype: torch.dtype) -> list[Tensor]:
    """Alpha by sample, by channel and by element, of contiguous and of channels_last tensors."""
    found: list[Tensor] = []
    shape = (5, 7, 9, 11)
    for alpha_shape in ((5, 1, 1, 1), (1, 7, 1, 1), (11,), shape):
        for memory in (torch.contiguous_format, torch.channels_last):
            n, alphas = 5 * 7 * 9 * 11, int(np.prod(alpha_shape))
            dtypes = (host_dtype, seed_dtype, host_dtype)
            host, seed, grad = (
                source.floats(n, d).view(shape).contiguous(memory_format=memory) for d in dtypes
            )
            alpha = (source.integers(alphas, -2, 11).float() / 8).view(alpha_shape)
            found += _blended(host, seed, alpha, grad)
    return found


def gates() -> Iterator[Case]:
    """What only selects and copies, NaNs with their bits."""
    for name, dtype in FLOATS.items():
        source, found = Source(3), []
        for size in SIZES:
            host, grad = (source.floats(size, dtype, odd=True) for _ in range(2))
            found.append(ops.straight_through(host, host))
            for alpha in (torch.tensor(-1.0), torch.tensor(0.5), source.integers(size, -1, 2).float()):
                features = host.clone().requires_grad_()
                found += torch.autograd.grad(ops.seed_gate(features, alpha), features, grad)
        yield f"seed_gate and straight_through {name}", found


def statistics() -> Iterator[Case]:
    """tensor_stats: floating dtypes with and without special values, integers."""
    for name, dtype in FLOATS.items():
        for odd in (False, True):
            tensors = [Source(k).floats(n, dtype, odd=odd) for k, n in enumerate(SIZES)]
            yield f"tensor_stats {name}{' odd' * odd}", [ops.tensor_stats(tensors)]
    for whole in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool):
        drawn = [Source(k).integers(n, -(2**40), 2**40).to(whole) for k, n in enumerate(SIZES)]
        yield f"tensor_stats {str(whole)[6:]}", [ops.tensor_stats(drawn)]


def _losses(source: Source, n: int, step: int) -> Tensor:
    """A falling loss with noise and every kind of fault."""
    loss = source.integers(n, 900, 1100).double() / 512 + 8.0 / (1 + step // 3)
    fault = source.integers(n, 0, 60)
    for number, value in enumerate((float("nan"), float("inf"), 1e4, 1e300, -3.0, 2.302)):
        loss = torch.where(fault == number, value, loss)
    return loss


def governors() -> Iterator[Case]:
    """The judge, for one governor and for many side by side, under every preset."""
    for preset in ("default", "balanced", "strict", "classic"):
        config = GovernorConfig.preset(preset, snapshot_interval=5, probation=2).to_tensor(2.302, "cpu")
        for n in (1, 3, 37, 1100):
            source, state, box = Source(n), ops.governor_state(n), ops.governor_mailbox(n, records=8)
            for step in range(60):
                loss = _losses(source, n, step).to(torch.float32 if step % 2 else torch.float64)
                norm = source.integers(n, 1, 1000).double() / 64
                active, flag = source.integers(n, 0, 9) > 0, source.integers(n, 0, 80) == 0
                ops.governor_step_(
                    state, config, loss, flag, active, box, norm if preset != "classic" else None
                )
                if step % 7 == 6:
                    for column in range(0, n, 5):
                        orders = (Order.CAPTURE, Order.PROMOTE, Order.ROLLBACK, Order.RELEARN, Order.HOLD)
                        ops.governor_order_(
                            state, config, column, orders[step % 5], PanicReason.MANUAL, mailbox=box
                        )
                state[StateField.restore_order] = 0.0
            yield f"governor {preset} n={n}", [state, box]


def snapshots() -> Iterator[Case]:
    """Copies with their magnitudes, and back; every kind of value, cut between threads."""
    dtypes = [*FLOATS.values(), torch.int32, torch.float8_e4m3fn, torch.float8_e5m2]
    for odd in (False, True):
        source, config, state = Source(7), GovernorConfig().to_tensor(2.302, "cpu"), ops.governor_state()
        live = []
        for k, size in enumerate((1, 31, 33, 2047, 100_003) * 2):
            dtype = dtypes[k % len(dtypes)]
            if dtype in FLOATS.values():
                live.append(source.floats(size, dtype, odd=odd and k % 3 == 0))
            else:
                live.append(source.integers(size * dtype.itemsize, 0, 120).to(torch.uint8).view(dtype))
        entries = [
            SnapshotEntry(t, (torch.zeros_like(t), torch.zeros_like(t)), k % 2, k, birth=k + 1)
            for k, t in enumerate(live)
        ]
        table, found = SnapshotTable(entries), []
        for number in range(5):
            ops.governor_order_(state, config, 0, Order.CAPTURE, PanicReason.MANUAL)
            for part in (0, 1):
                ops.snapshot_capture_(state, 0, table, part, None, number)
            assert table.magnitudes is not None
            found += [state.clone(), table.magnitudes.clone()]
            ops.governor_order_(state, config, 0, Order.PROMOTE, PanicReason.MANUAL)
            live[0].mul_(4096)
        for tensor in live:
            tensor.zero_()
        ops.governor_order_(state, config, 0, Order.ROLLBACK, PanicReason.MANUAL)
        ops.snapshot_restore_(state, 0, config, table)
        yield f"snapshot{' odd' * odd}", [*found, state, *live]


def metrics() -> Iterator[Case]:
    """Cross entropy and counts."""
    for name, dtype in FLOATS.items():
        for classes in (2, 10, 1000, 5003):
            rows = 4000 // classes + 3
            source = Source(classes)
            logits = source.floats(rows * classes, dtype).view(rows, classes)
            acc = torch.zeros(5 + 2 * classes, dtype=torch.float64)
            labels = source.integers(rows, 0, classes)
            labels[1] = -100
            ops.classification_metrics_(acc, logits, labels)
            yield f"metrics {name} classes={classes}", [acc]


def results() -> dict[str, dict[str, object]]:
    """All of them."""
    exact: dict[str, object] = {}
    for size in ("", " past the caches"):
        before = _extension.set_stream_above(0) if size else None
        for kind in (blends, gates, snapshots):
            exact |= {name + size: digest(found) for name, found in kind()}
        if before is not None:
            _extension.set_stream_above(before)
    for kind in (statistics, governors):
        exact |= {name: digest(found) for name, found in kind()}
    bounded: dict[str, object] = {}
    for name, (acc,) in metrics():
        exact[f"{name}: counts"] = digest([acc[1:]])
        bounded[f"{name}: loss"] = acc[0].item()
    return {"exact": exact, "bounded": bounded}


if __name__ == "__main__":
    if not _extension.LOADED:
        sys.exit(f"result_hashes: expected the compiled extension, got: {_extension.LOAD_ERROR}")
    json.dump(results(), sys.stdout, indent=1)
