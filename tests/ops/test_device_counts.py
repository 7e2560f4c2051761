"""What the kernels move, counted on the virtual device: whole sectors, each array once, no local memory."""

import math

import pytest
import torch
from strategies import DTYPE_IDS, DTYPES

from tolaria.ops import MetricsField, blend, classification_metrics_, tensor_stats

pytestmark = pytest.mark.cuda
SECTOR = 32


@pytest.fixture
def count():
    """A function that calls another and returns the counters of our kernels."""
    vgpu = pytest.importorskip("vgpu", reason="counts accesses on the virtual device")

    def run(function, *arguments):
        vgpu.run_all()
        vgpu.reset()
        function(*arguments)
        vgpu.run_all()
        return [c for name, c in vgpu.stats()["kernel_launches"].items() if "tolaria" in name]

    return run


def sectors(counters):
    return sum(c["global_load_sectors"] + c["global_store_sectors"] for c in counters)


def assert_economical(counters, arrays, more=1.05):
    """Sectors of all kernels against the arrays, and of each large kernel against its own bytes."""
    assert counters
    for c in counters:
        assert c["local_bytes"] == 0
        moved = c["global_load_bytes"] + c["global_store_bytes"]
        if moved > 1 << 16:
            assert SECTOR * sectors([c]) <= 1.05 * moved
    assert SECTOR * sectors(counters) <= more * sum(t.nbytes for t in arrays)


def filled(shape, dtype, memory_format=torch.contiguous_format):
    return torch.ones(shape, device="cuda", dtype=dtype).contiguous(memory_format=memory_format)


ALPHAS = {"scalar": (), "sample": (-1, 1, 1, 1), "channel": (1, -1, 1, 1), "full": (-1, -1, -1, -1)}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("learned", [False, True], ids=["ramp", "learned"])
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("alpha_kind", ALPHAS)
@pytest.mark.parametrize("size", [8, 7], ids=["even", "odd"])
def test_blend_moves_each_array_once(count, size, alpha_kind, memory_format, learned):
    shape = (48, 24, size, size)
    shape_of_alpha = tuple(n if k < 0 else k for n, k in zip(shape, ALPHAS[alpha_kind], strict=False))
    for host_dtype, seed_dtype in [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16)]:
        host, grad = (filled(shape, host_dtype, memory_format) for _ in range(2))
        seed = filled(shape, seed_dtype, memory_format)
        acc = torch.float64 if host_dtype == torch.float64 else torch.float32
        alpha = torch.full(shape_of_alpha, 0.5, device="cuda", dtype=acc)
        if alpha_kind == "full":
            alpha = alpha.contiguous(memory_format=memory_format)
        own = [alpha] if alpha_kind == "full" else []
        # Alphas of rows or columns are read again by every pack that meets them, from the cache.
        more = 1.15 if alpha_kind == "channel" else 1.05
        assert_economical(count(blend, host, seed, alpha), [host, seed, host, *own], more)
        backward = torch.ops.tolaria.blend_backward
        counters = count(backward, grad, host, seed, alpha, seed.dtype, [True, True, learned])
        assert sum(c["launches"] for c in counters) == (2 if learned and alpha_kind != "full" else 1)
        arrays = [grad, host, seed, *own]
        if learned:
            arrays += [host, seed, *own]
            assert_economical(counters, arrays, more + 0.05)  # partial sums, written and read
        else:
            assert_economical(counters, arrays, more)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_seed_gate_moves_its_gradient_once(count, dtype):
    grad, alpha = filled((1 << 17,), dtype), torch.tensor(0.5, device="cuda")
    assert_economical(count(torch.ops.tolaria.seed_gate_backward, grad, alpha), [grad, grad])


@pytest.mark.parametrize("skew", [0, 1, 5])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.uint8], ids=[*DTYPE_IDS, "i64", "u8"])
def test_statistics_read_each_tensor_once(count, dtype, skew):
    tensors = [filled((size + skew,), dtype)[skew:] for size in (1 << 16, 40_001, 3)]
    counters = count(tensor_stats, tensors)
    assert [c["launches"] for c in counters] == [1]
    assert_economical(counters, tensors)


def test_statistics_take_a_launch_for_each_table(count):
    tensors = [filled((3,), torch.float32) for _ in range(2500)]
    for size in (1, 1000, 2500):
        counters = count(tensor_stats, tensors[:size])
        assert sum(c["launches"] for c in counters) == math.ceil(size / 1125)


@pytest.mark.parametrize(
    ("classes", "skew"), [(1000, 0), (8192, 0), (8192, 1), (50257, 0), (50257, 1)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_metrics_read_the_logits_once(count, dtype, classes, skew):
    rows = (1 << 17) // classes
    logits = filled((rows * classes + skew,), dtype)[skew:].view(rows, classes)
    labels = torch.zeros(rows, dtype=torch.int64, device="cuda")
    acc = torch.zeros(len(MetricsField), dtype=torch.float64, device="cuda")
    counters = count(classification_metrics_, acc, logits, labels)
    assert [c["launches"] for c in counters] == [1]
    assert_economical(counters, [logits], more=1.1)  # beside them labels, and the label's logit again
