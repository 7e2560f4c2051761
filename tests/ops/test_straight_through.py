"""straight_through: the host's bits forward, the gradient to both backward."""

import pytest
import torch
from strategies import DTYPE_IDS, DTYPES, LAYOUTS, laid_out, same_bits
from torch.library import opcheck

from tolaria import _extension
from tolaria.ops import straight_through

NAN = float("nan")


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (2, 3, 4, 5)], ids=str)
def test_forward_is_the_host_whatever_the_seed_holds(backend, device, dtype, layout, shape):
    host = laid_out(torch.randn(shape, device=device).to(dtype), layout)
    out = straight_through(host, torch.full(shape, NAN, device=device, dtype=dtype))
    assert same_bits(out, host)
    assert out.stride() == torch.empty_like(host).stride()
    assert out.numel() == 0 or out.data_ptr() != host.data_ptr()


@pytest.mark.parametrize("seed_dtype", DTYPES, ids=DTYPE_IDS)
def test_gradient_goes_to_both_unscaled(backend, device, seed_dtype):
    host = torch.randn(4, 6, device=device, requires_grad=True)
    seed = torch.randn(4, 6, device=device).to(seed_dtype).requires_grad_()
    grad = torch.randn(6, 4, device=device).t()
    out = straight_through(host, seed)
    grads = torch.autograd.grad(out, (host, seed), grad, retain_graph=True)
    again = torch.autograd.grad(out, (host, seed), grad)
    for got in (grads, again):
        assert same_bits(got[0], grad)
        assert same_bits(got[1], grad.to(seed_dtype))


def test_backward_moves_nothing(backend, device):
    host, seed = (torch.randn(4, 6, device=device, requires_grad=True) for _ in range(2))
    grad = torch.randn(4, 6, device=device)
    got = torch.autograd.grad(straight_through(host, seed), (host, seed), grad)
    assert [g.data_ptr() for g in got] == [grad.data_ptr()] * 2


@pytest.mark.parametrize("wants", [(True, False), (False, True)], ids=["host", "seed"])
def test_only_the_gradients_asked_for(backend, device, wants):
    host, seed = (torch.randn(3, device=device, requires_grad=want) for want in wants)
    straight_through(host, seed).sum().backward()
    assert [t.grad is not None for t in (host, seed)] == list(wants)


@pytest.mark.parametrize(
    "consume", [torch.relu_, lambda t: t.mul_(2), lambda t: t.add_(1)], ids=["relu", "mul", "add"]
)
def test_in_place_consumer_is_right(backend, device, consume):
    hidden = torch.randn(50, device=device, requires_grad=True)
    seed = torch.randn(50, device=device, requires_grad=True)
    host = torch.sigmoid(hidden)  # saves its own output: must not be the memory that the consumer writes
    kept = host.detach().clone()
    out = consume(straight_through(host, seed))
    assert same_bits(host, kept)
    grads = torch.autograd.grad(out.sum(), (hidden, seed))
    plain = torch.sigmoid(hidden)
    expected = torch.autograd.grad(consume(plain + (seed - seed.detach())).sum(), (hidden, seed))
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_inference_and_no_grad(backend, device):
    host, seed = (torch.randn(3, device=device, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        assert not straight_through(host, seed).requires_grad
    with torch.inference_mode():
        assert same_bits(straight_through(host, seed), host)


def test_second_derivatives_are_the_identity_s(backend):
    host, seed = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    grad = torch.randn(5, dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad(straight_through(host, seed), (host, seed), grad, create_graph=True)
    (again,) = torch.autograd.grad(grads[0].sum() + 2 * grads[1].sum(), grad)
    assert again.tolist() == [3.0] * 5


@pytest.mark.parametrize(
    ("host", "seed", "error", "words"),
    [
        (torch.ones(2), torch.ones(3), ValueError, r"seed: expected host's shape \[2\], got \[3\]"),
        (torch.ones(2).long(), torch.ones(2), TypeError, "host: expected dtype float32, .* got int64"),
        (
            torch.ones(2),
            torch.ones(2, device="meta"),
            ValueError,
            "seed: expected host's device cpu, got meta",
        ),
        (torch.ones(2), None, TypeError, "seed: expected a Tensor, got NoneType"),
    ],
    ids=["shape", "integer", "device", "none"],
)
def test_bad_arguments_are_named(backend, host, seed, error, words):
    if seed is not None and seed.is_meta and backend == "fused":
        pytest.skip("torch hands a call with a meta tensor to the fake, which runs before any kernel")
    with pytest.raises(error, match="tolaria.straight_through: " + words):
        straight_through(host, seed)


@pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
@pytest.mark.parametrize("seed_dtype", DTYPES, ids=DTYPE_IDS)
def test_opcheck(seed_dtype):
    host = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    seed = torch.randn(4, 3, 2, 2).to(seed_dtype).requires_grad_()
    opcheck(torch.ops.tolaria.straight_through, (host, seed))


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # torch's own, in dynamo
def test_compiles_without_a_graph_break(backend):
    def step(host, seed):
        return straight_through(host, seed).square().sum()

    inputs = [torch.randn(4, 5, requires_grad=True) for _ in range(2)]
    torch._dynamo.reset()
    traced = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(step(*inputs), inputs), torch.autograd.grad(traced(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)
