"""The ops under torch.func and forward-mode AD: the values and derivatives that they have without."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import tolaria
from tolaria import ops
from tolaria.nn import SeedSlot

# torch's own forward derivatives are made with it
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

ALPHAS = [-math.inf, -0.5, 0.0, 0.3, 1.0, 2.0, math.inf]


@pytest.fixture(params=["auto", "reference"], autouse=True)
def mode(request):
    with tolaria.backend(request.param):
        yield request.param


def cross(host, seed, alpha):
    return ops.blend(ops.straight_through(host, seed), ops.seed_gate(seed, alpha), alpha)


def pair(dtype=torch.float64, shape=(3, 4)):
    source = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=source, dtype=torch.float64).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("value", ALPHAS)
@pytest.mark.parametrize("seed_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_backward(value, seed_dtype):
    host, seed = pair()
    seed, alpha = seed.to(seed_dtype), torch.tensor(value, dtype=torch.float64)
    found = grad(lambda *x: cross(*x).square().sum(), argnums=(0, 1, 2))(host, seed, alpha)
    inputs = [t.clone().requires_grad_() for t in (host, seed, alpha)]
    expected = torch.autograd.grad(cross(*inputs).square().sum(), inputs)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (4,), (3, 1), (3, 4)])
def test_gradients_of_each_sample_are_those_of_samples_alone(shape):
    host, seed = pair(shape=(5, 3, 4))
    alpha = torch.rand(5, *shape, dtype=torch.float64)
    loss = lambda *x: cross(*x).square().sum()  # noqa: E731
    found = vmap(grad(loss, argnums=(0, 1, 2)))(host, seed, alpha)
    for k in range(5):
        expected = grad(loss, argnums=(0, 1, 2))(host[k], seed[k], alpha[k])
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine[k], theirs)
    shared = vmap(loss, in_dims=(0, None, None))(host, seed[0], alpha[0])
    torch.testing.assert_close(shared[2], loss(host[2], seed[0], alpha[0]))


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_derivatives_of_both_directions_agree(value):
    host, seed = pair()
    alpha = torch.tensor(value, dtype=torch.float64)
    for f, inputs in (
        (ops.blend, (host, seed, alpha)),
        (ops.straight_through, (host, seed)),
        (lambda h: ops.seed_gate(h, alpha), (host,)),
    ):
        directions = tuple(torch.randn_like(t) for t in inputs)
        result, tangent = jvp(f, inputs, directions)
        _, back = vjp(f, *inputs)
        weights = torch.randn_like(result)
        gradients = back(weights)
        there = (tangent * weights).sum()
        torch.testing.assert_close(
            there, sum((d * g).sum() for d, g in zip(directions, gradients, strict=True))
        )


def test_forward_derivatives_are_those_of_differences():
    host, seed = (t.requires_grad_() for t in pair())
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(ops.blend, (host, seed, alpha), check_forward_ad=True, check_backward_ad=False)
    assert gradcheck(
        lambda h: ops.seed_gate(h, alpha.detach()), (host,), check_forward_ad=True, check_backward_ad=False
    )


def test_second_derivatives_in_any_order():
    host, seed = pair()
    loss = lambda a: cross(host, seed, a).pow(3).sum()  # noqa: E731
    alpha = torch.full((4,), 0.3, dtype=torch.float64)
    inputs = alpha.clone().requires_grad_()
    expected = torch.autograd.functional.hessian(loss, inputs)
    for second in (hessian(loss), jacfwd(jacfwd(loss)), jacrev(jacrev(loss)), jacrev(jacfwd(loss))):
        torch.testing.assert_close(second(alpha), expected)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_what_an_unused_side_holds_reaches_no_derivative(value):
    host, seed = pair()
    alpha = torch.tensor(value, dtype=torch.float64)
    unused = seed if value == 0.0 else host
    unused.fill_(math.nan)
    mine = 0 if value == 0.0 else 1
    f = lambda used: ops.blend(*((used, seed) if mine == 0 else (host, used)), alpha)  # noqa: E731
    used = (host, seed)[mine]
    result, tangent = jvp(f, (used,), (torch.ones_like(used),))
    assert bool((result == used).all() and (tangent == 1).all())
    gradient = grad(lambda u: ops.blend(*((used, u) if mine == 0 else (u, used)), alpha).sum())(unused)
    assert bool((gradient == 0).all())


def test_forward_mode_without_functorch():
    host, seed = pair(torch.float32)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(host, torch.ones_like(host))
        found = forward_ad.unpack_dual(ops.blend(dual, seed, torch.tensor(0.25)))
    assert bool((found.tangent == 0.75).all())


@pytest.mark.parametrize("stage", ["training", "blending"])
def test_gradients_of_each_sample_through_a_network(stage):
    """With a slot: what a differentially private optimizer asks for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), SeedSlot("one"), nn.ReLU(), nn.Linear(8, 2))
    slot, x = model[1], torch.randn(6, 4)
    slot.germinate(lambda features: nn.Linear(8, 8), model[0](x))
    slot.start_training()
    if stage == "blending":
        schedule = slot.start_blending(4)
        schedule.step()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    loss = lambda p, sample: functional_call(model, (p, buffers), (sample[None],)).square().sum()  # noqa: E731
    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    model.zero_grad()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name].sum(0), parameter.grad)


def test_bad_arguments_are_named_as_ever():
    host, seed = pair()
    with pytest.raises(ValueError, match=r"tolaria.blend: seed: expected host's shape"):
        grad(lambda h: ops.blend(h, seed[:2], torch.tensor(0.3)).sum())(host)
    with pytest.raises(TypeError, match=r"tolaria.straight_through: host: expected dtype float32"):
        vmap(ops.straight_through)(host.long(), seed)
