"""classification_metrics_ against cross_entropy + argmax."""

from __future__ import annotations

import functools

import pytest
import torch
from compiled import compiled
from torch.nn.functional import cross_entropy

from tolaria import ops
from tolaria.reference import metrics as reference

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, from inside torch.compile

SHAPES = [(256, 10), (256, 1000), (4096, 1000), (2048, 50257)]
IMPLEMENTATIONS = {
    "fused": ops.classification_metrics_,
    "reference": reference.classification_metrics_,
    "compiled": compiled(reference.classification_metrics_, fullgraph=False),
}


def accumulating(function, acc, logits, labels):
    function(acc, logits, labels)
    return acc


def eager(logits, labels):
    """The two numbers that most loops ask for; the fused op gives top-k and counts per class beside them."""
    return cross_entropy(logits, labels), (logits.argmax(1) == labels).sum()


def eager_all(logits, labels):
    """What the fused op gives beside them, too, as eager PyTorch does it best (ties and NaN left aside)."""
    classes = logits.shape[1]
    hits = logits.topk(5, 1).indices == labels[:, None]
    first = hits[:, 0]
    counts = [torch.bincount(x, minlength=classes) for x in (labels[first], labels)]
    return cross_entropy(logits, labels, reduction="sum"), first.sum(), hits.any(1).sum(), *counts


def parameters():
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for one_thread in (False, True):
                quick = dtype == torch.float32 and shape != (4096, 1000) and not one_thread
                yield pytest.param(shape, dtype, one_thread, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("shape", "dtype", "one_thread"), list(parameters()))
def bench_metrics(shape, dtype, one_thread, measure, device):
    torch.manual_seed(0)
    logits = torch.randn(shape, device=device, dtype=dtype)
    labels = torch.randint(0, shape[1], shape[:1], device=device)
    sums = {
        name: torch.zeros(5 + 2 * shape[1], dtype=torch.float64, device=device) for name in IMPLEMENTATIONS
    }
    rows = min(64, shape[0])  # what is right is asked of the first rows, in float64

    def check_rows():
        wanted = cross_entropy(logits[:rows].double(), labels[:rows], reduction="sum").item()
        hits = (logits[:rows].argmax(1) == labels[:rows]).sum().item()
        for name in ("fused", "reference"):
            acc = torch.zeros_like(sums[name])
            IMPLEMENTATIONS[name](acc, logits[:rows], labels[:rows])
            assert acc[0].item() == pytest.approx(wanted, rel=1e-5), name
            assert acc[1:3].tolist() == [rows, hits], name

    check_rows()
    functions = {
        name: functools.partial(accumulating, run, sums[name], logits, labels)
        for name, run in IMPLEMENTATIONS.items()
    }
    is_large = logits.numel() > 10**8
    absent = {}
    if is_large and one_thread:
        del functions["reference"]
        absent["reference"] = "only with all threads: it takes seconds"
    functions["eager"] = lambda: eager(logits, labels)
    functions["eager, all"] = lambda: eager_all(logits, labels)
    threads = "1 thread" if one_thread else "all threads"
    measure(
        f"classification_metrics_/{shape[0]} x {shape[1]}/{str(dtype)[6:]}/{threads}",
        functions,
        passes=[([logits], [])],
        full_only=("compiled", "reference", "eager, all") if is_large else ("compiled",),
        absent=absent,
        one_thread=one_thread,
    )
