"""straight_through against clone (forward) and the usual detach expression."""

from __future__ import annotations

import pytest
import torch
from cases import KIB, MIB, sample, sweep
from compiled import compiled

from tolaria import ops
from tolaria.reference import straight_through as reference

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, from inside torch.compile


def detach(host, seed):
    """What people write; a NaN of the seed reaches the loss."""
    return host + (seed - seed.detach())


IMPLEMENTATIONS = {
    "fused": ops.straight_through,
    "reference": reference.straight_through,
    "compiled": compiled(reference.straight_through),
    "detach": detach,
}


def in_quick(case):
    plain = case.dtype == torch.float32 and case.layout == "contiguous" and not case.one_thread
    return plain and case.size in (4 * KIB, 8 * MIB) and case.direction != "backward"


@pytest.mark.parametrize("case", sweep(["forward", "backward", "both"], in_quick))
def bench_straight_through(case, measure, device):
    host, seed, grad = case.tensors(3, device)
    inputs = (host.requires_grad_(), seed.requires_grad_())

    def run(function):
        kept = []

        def backward():  # of a graph made once: nothing is moved, it is the price of two gradients handed on
            if not kept:
                kept.append(function(*inputs))
            return torch.autograd.grad(kept[0], inputs, grad, retain_graph=True)

        return {
            "forward": lambda: function(host.detach(), seed.detach()),
            "backward": backward,
            "both": lambda: torch.autograd.grad(function(*inputs), inputs, grad),
        }[case.direction]

    def check(result):
        results, want = (result, grad) if isinstance(result, tuple) else ([result], host)
        for got in results:
            torch.testing.assert_close(sample(got), sample(want), rtol=2e-2, atol=2e-2)

    functions = {name: run(function) for name, function in IMPLEMENTATIONS.items()}
    if case.direction == "forward":
        functions["clone"] = host.detach().clone
    measure(
        f"straight_through/{case.name}",
        functions,
        check=check,
        passes=[([host], [host])] if case.direction != "backward" else [],
        one_thread=case.one_thread,
        longer=min(1, case.longer),
    )
