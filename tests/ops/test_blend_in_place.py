"""The backward that writes over the gradient it was handed: only where nobody can see it, same bits."""

import gc
import weakref

import numpy as np
import pytest
import torch
from strategies import DTYPE_IDS, DTYPES, laid_out, same_bits
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tolaria
from tolaria import _extension
from tolaria.ops import blend, seed_gate

pytestmark = pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
LAYOUTS = ["channels_last", "strided"]
ALPHAS = [(), (2, 1, 1, 1), (3, 1, 1), (5,), (2, 3, 4, 5)]


class Source(torch.autograd.Function):
    """Hands on the gradient that ``make()`` returns."""

    @staticmethod
    def forward(ctx, x, make):
        ctx.make = make
        return x.sum()

    @staticmethod
    def backward(ctx, _):
        return ctx.make(), None


def leaves(*shape, count=2):
    return [torch.randn(shape, requires_grad=True) for _ in range(count)]


def ops_of(function):
    """Names of the tolaria ops that a call runs."""
    with torch.autograd.profiler.profile() as profile:
        function()
    return {event.name for event in profile.function_events if event.name.startswith("tolaria::")}


def gradients(consume, grad=None):
    """Gradients of a blend after ``consume``."""
    torch.manual_seed(0)
    host, seed = leaves(64, 1024)
    alpha = torch.tensor(0.3, requires_grad=True)
    return torch.autograd.grad(consume(blend(host, seed, alpha)), (host, seed, alpha), grad)


def test_memory_of_a_gradient_that_nobody_holds_becomes_the_hosts():
    weight, results = torch.randn(64, 1024), []
    assert "tolaria::blend_backward_" in ops_of(
        lambda: results.extend(gradients(lambda out: (out * weight).sum()))
    )
    for result, value in zip(results, gradients(lambda out: out, weight), strict=True):
        assert same_bits(result, value)
    host, gate = torch.randn(64, 1024, requires_grad=True), torch.tensor([[0.0], [0.5]]).repeat(32, 1)
    assert "tolaria::seed_gate_backward_" in ops_of(lambda: (seed_gate(host, gate) * weight).sum().backward())
    assert same_bits(host.grad, torch.where(gate > 0, weight, 0.0))


@pytest.mark.parametrize(
    "kept", ["tensor", "view", "detached", "storage", "numpy", "from_numpy", "slice", "lazy"]
)
def test_gradient_that_somebody_can_see_is_left_alone(kept):
    grad, keeper = torch.randn(64, 1024), []

    def make():
        mine = grad.clone()
        match kept:
            case "tensor":
                keeper.append(mine)
            case "view":
                keeper.append(mine[1])
            case "detached":
                keeper.append(mine.detach())
            case "storage":
                keeper.append(mine.untyped_storage())
            case "numpy":
                keeper.append(mine.numpy())
            case "from_numpy":
                keeper.append(np.array(grad.numpy()))
                return torch.from_numpy(keeper[0])
            case "slice":
                keeper.append(torch.cat([mine, mine]))
                return keeper[0][:64]
            case "lazy":
                keeper.append(mine)
                return torch._lazy_clone(mine)
        return mine

    results = gradients(lambda out: Source.apply(out, make))
    for result, value in zip(results, gradients(lambda out: out, grad), strict=True):
        assert same_bits(result, value)
    left = torch.tensor([]).set_(keeper[0]) if kept == "storage" else torch.as_tensor(keeper[0])
    assert same_bits(left.flatten()[: 64 * 1024], (grad[1] if kept == "view" else grad).flatten())


@pytest.mark.parametrize("times", [1, 2])
def test_callers_gradient_is_untouched(times):
    host, seed = leaves(3, 1000)
    out, grad = blend(host, seed, torch.tensor(0.3)), torch.randn(3, 1000)
    before = grad.clone()
    for _ in range(times):
        out.backward(grad, retain_graph=True)
    assert same_bits(grad, before)
    torch.testing.assert_close(host.grad, times * 0.7 * grad)


def keeping_hooks():
    """Name and attachment of everything through which a program may look at a gradient on its way."""

    def retain_grad(out, kept):
        out.retain_grad()
        return lambda: out.grad

    def tensor_hook(out, kept):
        out.register_hook(kept.append)

    def prehook(out, kept):
        out.grad_fn.register_prehook(lambda grads: kept.extend(grads))

    def post_hook(out, kept):
        out.grad_fn.register_hook(lambda _, grads: kept.extend(grads))

    def weak(out, kept):
        out.register_hook(lambda grad: kept.append(weakref.ref(grad)))

    def multi(out, kept):
        torch.autograd.graph.register_multi_grad_hook((out,), lambda grads: kept.extend(grads))

    return [retain_grad, tensor_hook, prehook, post_hook, weak, multi]


@pytest.mark.parametrize("hook", keeping_hooks(), ids=lambda hook: hook.__name__)
@pytest.mark.parametrize("op", ["blend", "seed_gate"])
def test_hooks_keep_what_they_saw(hook, op):
    host, seed = leaves(3, 1000)
    out = blend(host, seed, torch.tensor(0.3)) if op == "blend" else seed_gate(host, torch.tensor(-1.0))
    kept = []
    read = hook(out, kept)
    (out.square().sum() / 2).backward()
    gc.collect()
    seen = read() if read else kept[0]() if isinstance(kept[0], weakref.ref) else kept[0]
    if seen is not None:
        torch.testing.assert_close(seen, out.detach())


@pytest.mark.parametrize("op", ["blend", "seed_gate"])
def test_gradients_shared_between_branches(op):
    def gated(x, other):
        return (
            blend(x, other, torch.tensor(0.25))
            if op == "blend"
            else seed_gate(x, torch.tensor([[0.0], [1.0], [0.0]]))
        )

    results = []
    for mode in ("fused", "reference"):
        torch.manual_seed(3)
        a, b, c = leaves(3, 1000, count=3)
        with tolaria.backend(mode):
            x, y = gated(a * 2, c), gated(b * 3, c)
            total = (
                x
                + y
                + x * y
                + (x - a)
                + y.t().reshape(3, 1000)
                + x.view(-1).view(3, 1000)
                + (x + y).expand(2, 3, 1000)[1]
            )
            results.append(torch.autograd.grad((total * c).square().mean(), (a, b, c)))
    for fused, reference in zip(*results, strict=True):
        torch.testing.assert_close(fused, reference)


def test_gradients_captured_on_the_way():
    host, seed = leaves(3, 1000)
    out = blend(host * 1, seed, torch.tensor(0.3))
    grad_out, grad_host = torch.autograd.grad((out.square().sum() / 2), (out, host))
    torch.testing.assert_close(grad_out, out.detach())
    torch.testing.assert_close(grad_host, 0.7 * out.detach())


def test_graph_run_twice_checkpointed_and_under_anomaly_detection():
    host, seed = leaves(3, 1000)
    alpha = torch.tensor(0.3, requires_grad=True)

    def loss(h, s, a):
        return blend(h * 2, seed_gate(s, a.detach()), a).square().sum()

    kept = loss(host, seed, alpha)
    plain = torch.autograd.grad(kept, (host, seed, alpha), retain_graph=True)
    with torch.autograd.set_detect_anomaly(True):
        others = [torch.autograd.grad(kept, (host, seed, alpha))]
    others.append(
        torch.autograd.grad(checkpoint(loss, host, seed, alpha, use_reentrant=False), (host, seed, alpha))
    )
    others.append(torch.autograd.grad(loss(host, seed, alpha), (host, seed, alpha), create_graph=True))
    for other in others[:2]:
        assert all(same_bits(a, b) for a, b in zip(plain, other, strict=True))
    for a, b in zip(plain, others[2], strict=True):
        torch.testing.assert_close(a, b.detach())
    assert all(g.requires_grad for g in others[2])


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_what_watches_sees_the_functional_ops():
    with Names() as mode:
        gradients(lambda out: (out * out.detach()).sum())
    assert "tolaria::blend_backward" in mode.names
    assert "tolaria::blend_backward_" not in mode.names


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("seed_dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_form_has_the_bits_of_the_other(device, dtype, seed_dtype, layout):
    torch.manual_seed(1)
    shape = (2, 3, 4, 5)
    host = laid_out(torch.randn(shape, device=device).to(dtype), layout)
    seed = laid_out(torch.randn(shape, device=device).to(seed_dtype), "contiguous")
    for alpha_shape in ALPHAS:
        for alpha in (
            torch.rand(alpha_shape),
            torch.zeros(alpha_shape),
            torch.ones(alpha_shape),
            torch.randn(alpha_shape),
        ):
            alpha = alpha.to(device)
            for mask in ([True, True], [True, False], [False, True]):
                grad = laid_out(torch.randn(shape, device=device).to(dtype), layout)
                wanted = torch.ops.tolaria.blend_backward(grad, host, seed, alpha, seed_dtype, [True, *mask])
                rest = torch.ops.tolaria.blend_backward_(grad, host, seed, alpha, seed_dtype, mask)
                for result, value in zip((grad, *rest), wanted, strict=True):
                    assert (result is None) == (value is None)
                    assert value is None or same_bits(result, value)
            grad = laid_out(torch.randn(shape, device=device).to(dtype), layout)
            wanted = torch.ops.tolaria.seed_gate_backward(grad, alpha)
            torch.ops.tolaria.seed_gate_backward_(grad, alpha)
            assert same_bits(grad, wanted)


@pytest.mark.parametrize("alpha", [0.3, 0.0, 1.0, float("nan")])
def test_many_blocks_and_threads_in_place(alpha):
    alpha = torch.tensor(alpha)
    host, seed, grad = (torch.randn(200_003) for _ in range(3))
    wanted = torch.ops.tolaria.blend_backward(grad, host, seed, alpha, torch.float32, [True, True, True])
    rest = torch.ops.tolaria.blend_backward_(grad, host, seed, alpha, torch.float32, [True, True])
    assert all(same_bits(a, b) for a, b in zip((grad, *rest), wanted, strict=True))


def test_lazy_copy_is_made_real_before_it_is_written():
    grad = torch.randn(5000)
    lazy, before = torch._lazy_clone(grad), grad.clone()
    torch.ops.tolaria.blend_backward_(lazy, None, None, torch.tensor(0.5), torch.float32, [False, False])
    assert same_bits(grad, before)
    assert same_bits(lazy, before * 0.5)


def test_gradient_with_holes_costs_one_copy_and_no_more():
    host, seed = leaves(64, 1024)
    out = blend(host, seed, torch.tensor(0.25))
    out.sum().backward()  # an expanded gradient
    assert same_bits(host.grad, torch.full_like(host, 0.75))
    assert same_bits(seed.grad, torch.full_like(host, 0.25))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck_of_the_in_place_forms(layout):
    host, seed, grad = (laid_out(torch.randn(2, 3, 4, 5), layout) for _ in range(3))
    alpha = torch.rand(2, 1, 1, 1)
    for mask in ([True, True], [True, False]):
        opcheck(torch.ops.tolaria.blend_backward_, (grad, host, seed, alpha, torch.float32, mask))
    opcheck(torch.ops.tolaria.seed_gate_backward_, (grad, alpha))
