"""Gradients under ``torch.compile`` are those of eager mode: every differentiable op, dtype pair and layout.

torch 2.11 loses them in silence where the forward of a Function ends in what hands back its own operand.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from strategies import DTYPES, laid_out

import tolaria
from tolaria.ops import blend, seed_gate, straight_through
from tolaria.reference import blend as blend_reference
from tolaria.reference import straight_through as straight_through_reference
from tolaria.reference import transforms

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"  # torch's own, in dynamo
)

OPS = {
    "blend": blend,
    "seed_gate": lambda host, seed, alpha: seed_gate(host, alpha) * seed.detach(),
    "straight_through": lambda host, seed, alpha: straight_through(host, seed),
}
PAIRS = list(itertools.product(DTYPES, DTYPES))
SHAPE = (2, 3, 4, 5)


def leaves(pair, layout, alpha_shape):
    """Host, seed and alpha, all to be differentiated; alpha lies at the ends and in between."""
    values = [torch.randn(SHAPE), torch.randn(SHAPE), torch.rand(alpha_shape) * 1.5 - 0.25]
    layouts = (layout, "contiguous", "contiguous")
    made = [laid_out(v.to(d), where) for v, d, where in zip(values, (*pair, pair[1]), layouts, strict=True)]
    return [tensor.detach().requires_grad_() for tensor in made]


def loss_of(op):
    """A loss of all pairs together, as a compiler takes seconds for each graph."""

    def loss(*tensors):
        weights = torch.linspace(-1, 1, 120).view(SHAPE)
        cases = [tensors[k : k + 3] for k in range(0, len(tensors), 3)]
        return sum((op(*case).float() * (weights + k)).sum() for k, case in enumerate(cases))

    return loss


def gradients(step, tensors):
    return torch.autograd.grad(step(*tensors), tensors, allow_unused=True)


@pytest.mark.parametrize(
    ("pairs", "layout", "alpha_shape"),
    [(PAIRS, "contiguous", ()), (PAIRS[::5], "channels_last", (2, 1, 1, 1)), (PAIRS[::5], "permuted", SHAPE)],
    ids=["all-pairs", "alpha-per-sample", "another-order-than-alpha"],
)
@pytest.mark.parametrize("op", OPS)
def test_compiled_gradients_are_those_of_eager_mode(backend, op, pairs, layout, alpha_shape):
    tensors = [tensor for pair in pairs for tensor in leaves(pair, layout, alpha_shape)]
    step = loss_of(OPS[op])
    expected = gradients(step, tensors)
    torch._dynamo.reset()
    got = gradients(torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=False), tensors)
    for k, (a, b) in enumerate(zip(expected, got, strict=True)):
        what = f"{op}, {pairs[k // 3]}: gradient of {('host', 'seed', 'alpha')[k % 3]}"
        assert (a is None) == (b is None), what
        if a is not None:
            torch.testing.assert_close(b, a, msg=lambda text, what=what: f"{what}: {text}")


def test_every_function_of_ours_is_differentiated_here():
    """A new one needs a line in OPS."""
    here = {
        blend_reference._Blend,
        blend_reference._SeedGate,
        straight_through_reference._StraightThrough,
    }
    ours = {f for f in torch.autograd.Function.__subclasses__() if f.__module__.startswith(tolaria.__name__)}
    assert ours == here | {transforms._Transformable}  # never compiled: tests/ops/test_transforms.py
    assert len(transforms._Transformable.__subclasses__()) == len(here)
