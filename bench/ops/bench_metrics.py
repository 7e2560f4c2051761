"""classification_metrics_ against cross_entropy + argmax."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from tolaria import ops
from tolaria.reference import metrics as reference

SHAPES = [(256, 10), (256, 1000), (512, 50257), pytest.param((2048, 50257), marks=pytest.mark.slow)]


def accumulate(function, acc):
    def run(logits, labels):
        function(acc, logits, labels)
        return acc

    return run


def eager(logits, labels):
    return cross_entropy(logits, labels), (logits.argmax(1) == labels).sum()


@pytest.mark.parametrize("impl", ["fused", "reference", "eager", "ceiling"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def bench_metrics(impl, dtype, shape, measure):
    torch.manual_seed(0)
    logits, labels = torch.randn(shape).to(dtype), torch.randint(0, shape[1], shape[:1])
    acc = torch.zeros(5 + 2 * shape[1], dtype=torch.float64)
    runs = {
        "fused": accumulate(ops.classification_metrics_, acc),
        "reference": accumulate(reference.classification_metrics_, acc),
        "eager": eager,
        "ceiling": lambda logits, labels: logits.sum(),
    }
    is_ours = impl in ("fused", "reference")
    measure(
        lambda: runs[impl](logits, labels),
        group=f"metrics/{'x'.join(map(str, shape))}/{str(dtype)[6:]}",
        impl=impl,
        moved_bytes=logits.nbytes,
        expected=cross_entropy(logits.double(), labels, reduction="sum"),
        check=(lambda got, want: torch.testing.assert_close(got[0], want, rtol=1e-5, atol=0))
        if is_ours
        else None,
    )
