"""blend, forward and with backward: lerp with clamp, the reference, its compilation, the memory."""

import pytest
import torch
from cases import named, sizes

from tolaria import ops
from tolaria.reference import blend as reference

# torch's own warnings, from inside torch.compile
pytestmark = pytest.mark.filterwarnings("ignore")
KIB, MIB = 1 << 10, 1 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def eager(host, seed, alpha):
    """The strongest short form in eager PyTorch (it lets a NaN of the unused side through)."""
    return torch.lerp(host, seed, alpha.clamp(0, 1).to(host.dtype))


def ceiling(host, seed, alpha):
    """As many reads and writes as the op must make, with arithmetic that costs nothing."""
    return torch.add(host, seed)


FORWARD = {
    "fused": ops.blend,
    "reference": reference.blend,
    "eager": eager,
    "compiled": None,
    "ceiling": ceiling,
}
SIZES = sizes(
    [4 * KIB, 128 * KIB, 8 * MIB], [KIB, 4 * KIB, 32 * KIB, 128 * KIB, MIB, 8 * MIB, 64 * MIB, 256 * MIB]
)


def inputs(size, dtype, layout):
    torch.manual_seed(0)
    numel = size // dtype.itemsize
    shape = (numel,) if layout == "contiguous" else (numel // 256, 64, 2, 2)
    host, seed, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    if layout == "channels_last":
        host, seed, grad = (t.contiguous(memory_format=torch.channels_last) for t in (host, seed, grad))
    return host, seed, grad, torch.tensor(0.3)


def implementation(impl):
    if impl != "compiled":
        return FORWARD[impl]
    torch._dynamo.reset()
    return torch.compile(reference.blend, fullgraph=True, dynamic=False)


def agrees(result, expected):
    for got, want in zip(result, expected, strict=True):
        if got.numel() == 1:  # a sum over all elements
            torch.testing.assert_close(got, want, rtol=1e-2, atol=got.numel() + 1.0)
        else:
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("impl", list(FORWARD))
@pytest.mark.parametrize("layout", ["contiguous", pytest.param("channels_last", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("size", SIZES, ids=named)
def bench_blend_forward(impl, layout, dtype, size, measure):
    host, seed, _, alpha = inputs(size, DTYPES[dtype], layout)
    function = implementation(impl)
    measure(
        lambda: function(host, seed, alpha),
        group=f"blend/forward/{named(size)}/{dtype}/{layout}",
        impl=impl,
        moved_bytes=3 * size,
        expected=[reference.blend(host, seed, alpha)],
        check=None if impl == "ceiling" else lambda got, want: agrees([got], want),
    )


def both(function, host, seed, alpha, grad):
    wanted = [t for t in (host, seed, alpha) if t.requires_grad]
    return torch.autograd.grad(function(host, seed, alpha), wanted, grad)


@pytest.mark.parametrize("impl", list(FORWARD))
@pytest.mark.parametrize("alpha_grad", [False, True], ids=["ramp", "learned"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("size", SIZES, ids=named)
def bench_blend_both(impl, alpha_grad, dtype, size, measure):
    host, seed, grad, alpha = inputs(size, DTYPES[dtype], "contiguous")
    host.requires_grad_()
    seed.requires_grad_()
    alpha.requires_grad_(alpha_grad)
    if impl == "ceiling":

        def run():
            plain = torch.add(host.detach(), seed.detach())
            if alpha_grad:
                (host.detach().sum(), seed.detach().sum())
            return plain, grad * 0.7, grad * 0.3

    else:
        function = implementation(impl)

        def run():
            return both(function, host, seed, alpha, grad)

    measure(
        run,
        group=f"blend/both{'+alpha' if alpha_grad else ''}/{named(size)}/{dtype}",
        impl=impl,
        moved_bytes=(8 if alpha_grad else 6) * size,
        expected=both(reference.blend, host, seed, alpha, grad),
        check=None if impl == "ceiling" else agrees,
    )
