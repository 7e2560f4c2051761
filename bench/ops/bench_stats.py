"""tensor_stats over whole models, against foreach_norm, the isfinite loop and the AMP check."""

import pytest
import torch

from tolaria import ops
from tolaria.reference import stats as reference

WIDTHS = (64, 128, 256, 512)


def resnet18_shapes():
    """The 62 parameter shapes of a ResNet-18."""
    yield from [(64, 3, 7, 7), (64,), (64,)]
    for before, width in zip((64, *WIDTHS), WIDTHS, strict=False):
        for source in (before, width):
            yield from [(width, source, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if source != width:
                yield from [(width, source, 1, 1), (width,), (width,)]
    yield from [(1000, 512), (1000,)]


LISTS = {"resnet18": list(resnet18_shapes()), "1000 x 100": [(100,)] * 1000}


def isfinite_loop(tensors):
    return [bool(t.isfinite().all()) for t in tensors]


def amp_check(tensors):
    found = torch.zeros(1)
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, torch.ones(1))
    return found


IMPLS = {
    "fused": ops.tensor_stats,
    "reference": reference.tensor_stats,
    "foreach_norm": torch._foreach_norm,
    "isfinite loop": isfinite_loop,
    "amp check": amp_check,
}


@pytest.mark.parametrize("impl", [*IMPLS, "ceiling"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(LISTS))
def bench_stats(impl, dtype, name, measure):
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for shape in LISTS[name]]
    nbytes = sum(t.nbytes for t in tensors)
    flat = torch.zeros(nbytes // 8, dtype=torch.float64)  # the same bytes, read by the fastest sum there is
    run = flat.sum if impl == "ceiling" else lambda: IMPLS[impl](tensors)
    is_ours = impl in ("fused", "reference")
    measure(
        run,
        group=f"stats/{name}/{str(dtype)[6:]}",
        impl=impl,
        moved_bytes=nbytes,
        expected=torch.cat([t.double().flatten() for t in tensors]).square().sum(),
        check=(lambda got, want: torch.testing.assert_close(got[0], want, rtol=1e-9, atol=0))
        if is_ours
        else None,
    )
