"""tensor_stats over whole models, against foreach_norm, the isfinite loop and the AMP check."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import MIB, SIZES, named
from compiled import compiled
from models import ResNet18

from tolaria import ops
from tolaria.reference import stats as reference

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, from inside torch.compile


def isfinite_loop(tensors):
    return [bool(t.isfinite().all()) for t in tensors]


def amp_check(tensors):
    """GradScaler's: it multiplies in place, too."""
    found = torch.zeros(1, device=tensors[0].device)
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, torch.ones(1, device=found.device))
    return found


IMPLEMENTATIONS = {
    "fused": ops.tensor_stats,
    "reference": reference.tensor_stats,
    "foreach_norm": torch._foreach_norm,
    "isfinite loop": isfinite_loop,
    "AMP check": amp_check,
}
COMPILED = compiled(reference.tensor_stats, fullgraph=False)
NO_COMPILE = {"1000 x 100": "not tried: inductor unrolls the list, and compiles 2,000 kernels for minutes"}


@functools.cache
def shapes(name):
    if name == "resnet18":
        return [p.shape for p in ResNet18().parameters()]
    return [(100,)] * 1000


def compare(name, tensors, measure, one_thread, absent):
    functions = {key: functools.partial(run, tensors) for key, run in IMPLEMENTATIONS.items()}
    if not absent:
        functions["compiled"] = functools.partial(COMPILED, tensors)
    expected = sum(float(t.double().square().sum()) for t in tensors)

    def check(got):
        assert float(got[0]) == pytest.approx(expected, rel=1e-9)
        assert got[2:].tolist() == [0, -1]

    # What is read has been written: untouched memory would be one page of zeros, from the caches.
    flat = torch.cat([t.flatten() for t in tensors])
    measure(
        f"tensor_stats/{name}",
        functions,
        check=check,
        unchecked=("foreach_norm", "isfinite loop", "AMP check"),
        passes=[([flat], [])],
        absent=absent,
        one_thread=one_thread,
    )


@pytest.mark.parametrize(
    "one_thread", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["all", "one"]
)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)],
    ids=["float32", "bfloat16"],
)
@pytest.mark.parametrize("name", ["1000 x 100", "resnet18"])
def bench_stats_of_a_list(name, dtype, one_thread, measure, device):
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=device).to(dtype) for shape in shapes(name)]
    absent = {"compiled": NO_COMPILE[name]} if name in NO_COMPILE else {}
    if one_thread or dtype != torch.float32:
        absent["compiled"] = "only for float32 and all threads: a list takes long to compile"
    threads = "1 thread" if one_thread else "all threads"
    compare(f"{name}/{str(dtype)[6:]}/{threads}", tensors, measure, one_thread, absent)


@pytest.mark.parametrize(
    "size", [pytest.param(s, marks=[] if s == 8 * MIB else pytest.mark.slow) for s in SIZES], ids=named
)
def bench_stats_of_a_tensor(size, measure, device):
    torch.manual_seed(0)
    tensors = [torch.randn(size // 4, device=device)]
    compare(f"one tensor/{named(size)}/float32/all threads", tensors, measure, False, {})
