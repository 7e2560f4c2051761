"""straight_through against clone (forward) and the usual detach expression."""

import pytest
import torch
from cases import named, sizes

from tolaria import ops
from tolaria.reference import straight_through as reference

KIB, MIB = 1 << 10, 1 << 20
IMPLS = {
    "fused": ops.straight_through,
    "reference": reference.straight_through,
    "eager": lambda host, seed: host + (seed - seed.detach()),
    "clone": lambda host, seed: host.clone(),
}
SIZES = sizes([4 * KIB, 8 * MIB], [KIB, 4 * KIB, 128 * KIB, MIB, 8 * MIB, 64 * MIB, 256 * MIB])


def tensors(size, dtype):
    torch.manual_seed(0)
    host, seed, grad = (torch.randn(size // dtype.itemsize).to(dtype) for _ in range(3))
    return host.requires_grad_(), seed.requires_grad_(), grad


@pytest.mark.parametrize("impl", list(IMPLS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES, ids=named)
def bench_straight_through_forward(impl, dtype, size, measure):
    host, seed, _ = tensors(size, dtype)
    measure(
        lambda: IMPLS[impl](host, seed),
        group=f"straight_through/forward/{named(size)}/{str(dtype)[6:]}",
        impl=impl,
        moved_bytes=2 * size,
        expected=host,
        check=lambda got, want: torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2),
    )


@pytest.mark.parametrize("impl", ["fused", "reference", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES, ids=named)
def bench_straight_through_both(impl, dtype, size, measure):
    host, seed, grad = tensors(size, dtype)
    measure(
        lambda: torch.autograd.grad(IMPLS[impl](host, seed), (host, seed), grad),
        group=f"straight_through/both/{named(size)}/{str(dtype)[6:]}",
        impl=impl,
        moved_bytes=2 * size,
        expected=(grad, grad),
        check=lambda got, want: torch.testing.assert_close(got, want),
    )
