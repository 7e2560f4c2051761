"""blend and its gradients against float64: every ordered dtype pair through every branch of the kernels."""

import itertools

import pytest
import torch
from exact import arithmetic_dtype, assert_blend_is_exact, assert_ends_keep_bits
from hypothesis import HealthCheck, example, given, settings
from strategies import DTYPE_IDS, DTYPES, blend_cases, case_tensors, laid_out, same_bits

import tolaria
from tolaria import _extension
from tolaria.ops import blend, seed_gate, straight_through

needs_extension = pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
INF, NAN = float("inf"), float("nan")
PAIRS = list(itertools.product(DTYPES, DTYPES))
PAIR_IDS = [f"{host}-{seed}" for host, seed in itertools.product(DTYPE_IDS, DTYPE_IDS)]

# Around the packs (16, 32 and 256 elements) and the piece of a partial sum.
LENGTHS = [1, 15, 17, 31, 33, 255, 257, 300, 519, 32768 + 300]
# Both branches of lerp, both ends and beyond, and what float32 rounds to an end.
SCALARS = [0.3, 0.7, 1e-30, 1.0 - 2**-12, 0.0, 1.0, -0.5, 2.0, INF, -INF, NAN, 1e-50, 1 - 1e-12]
LAYOUTS = ["contiguous", "offset", "strided", "expanded", "permuted", "channels_last"]
every_pair = pytest.mark.parametrize(("host_dtype", "seed_dtype"), PAIRS, ids=PAIR_IDS)


@pytest.fixture(params=["cpu", "cpu, streamed", pytest.param("cuda", marks=pytest.mark.cuda)])
def kernel(request):
    """Each device with kernels, and the CPU with small tensors written past the caches as large ones are."""
    if not _extension.LOADED:
        pytest.skip("needs the compiled extension")
    device, _, way = request.param.partition(", ")
    former = _extension.set_stream_above(0) if way else None
    yield torch.device(device)
    if former is not None:
        _extension.set_stream_above(former)


def operands(shape, host_dtype, seed_dtype, device, layouts=("contiguous",) * 3):
    """Host, seed and grad."""
    return [
        laid_out(torch.randn(shape, dtype=torch.float64).to(dtype).to(device), layout)
        for dtype, layout in zip((host_dtype, seed_dtype, host_dtype), layouts, strict=True)
    ]


def gradients(host, seed, alpha, grad):
    """Result and gradients through autograd."""
    inputs = [t.detach().requires_grad_() for t in (host, seed, alpha)]
    out = blend(*inputs)
    return (out, *torch.autograd.grad(out, inputs, grad))


def check(host, seed, alpha, grad):
    """The whole of autograd, the functional backward with each mask and the one in place against float64."""
    results = gradients(host, seed, alpha, grad)
    assert_blend_is_exact(host, seed, alpha, grad, results)
    assert_ends_keep_bits(host, seed, alpha, results[0])
    ops = torch.ops.tolaria
    for mask in itertools.product([False, True], repeat=3):
        found = ops.blend_backward(grad, host, seed, alpha, seed.dtype, list(mask))
        assert_blend_is_exact(host, seed, alpha, grad, (None, *found))
        assert [t is not None for t in found] == list(mask)
    for mask in itertools.product([False, True], repeat=2):
        # preserve_format, unlike contiguous(): an unaligned or permuted gradient stays what it is
        target = grad.clone() if not grad.storage_offset() else laid_out(grad, "offset")
        found = ops.blend_backward_(target, host, seed, alpha, seed.dtype, list(mask))
        assert_blend_is_exact(host, seed, alpha, grad, (None, target, *found))


@every_pair
def test_one_alpha_for_runs_of_every_length(host_dtype, seed_dtype, kernel):
    for n, value in itertools.product(LENGTHS, SCALARS):
        host, seed, grad = operands(n, host_dtype, seed_dtype, kernel)
        alpha = torch.tensor(value, dtype=torch.float64, device=kernel)
        results = gradients(host, seed, alpha, grad)
        assert_blend_is_exact(host, seed, alpha, grad, results)
        assert_ends_keep_bits(host, seed, alpha, results[0])


@every_pair
@pytest.mark.parametrize("alpha_shape", [(), (3, 1, 1, 1), (5, 1, 1), (5, 1, 9), (3, 5, 7, 9)], ids=str)
def test_every_alpha_and_mask(host_dtype, seed_dtype, alpha_shape, kernel):
    for order in ("contiguous", "channels_last"):
        host, seed, grad = operands((3, 5, 7, 9), host_dtype, seed_dtype, kernel, (order,) * 3)
        for alpha in (torch.rand(alpha_shape), torch.randint(-2, 7, alpha_shape) / 4):
            check(host, seed, alpha.to(kernel), grad)


@every_pair
def test_rows_with_an_alpha_each(host_dtype, seed_dtype, kernel):
    alpha = torch.tensor([[0.3], [0.0], [0.7], [1.0], [NAN], [INF]], device=kernel)
    for n in (33, 519):
        check(*_with(alpha, operands((6, n), host_dtype, seed_dtype, kernel)))
        check(*_with(alpha[:, 0].repeat(n)[:n], operands((6, n), host_dtype, seed_dtype, kernel)))
        check(*_with(alpha.expand(6, n), operands((6, n), host_dtype, seed_dtype, kernel)))


@every_pair
def test_alpha_with_a_hole_is_summed_in_float64(host_dtype, seed_dtype, kernel):
    """Its terms are stored first, and added up over the hole."""
    host, seed, grad = operands((4, 700, 3), host_dtype, seed_dtype, kernel)
    for alpha_dtype in DTYPES:
        alpha = torch.rand(4, 1, 3, dtype=torch.float64).to(alpha_dtype).to(kernel)
        assert_blend_is_exact(host, seed, alpha, grad, gradients(host, seed, alpha, grad))


def _with(alpha, tensors):
    host, seed, grad = tensors
    return host, seed, alpha, grad


@every_pair
def test_every_layout_of_every_operand(host_dtype, seed_dtype, kernel):
    for which, layout in itertools.product(range(3), LAYOUTS):
        layouts = ["contiguous"] * 3
        layouts[which] = layout
        tensors = operands((2, 3, 10, 13), host_dtype, seed_dtype, kernel, layouts)
        for alpha in (torch.tensor(0.3), torch.rand(2, 1, 1, 1), torch.rand(3, 1, 1)):
            check(*_with(alpha.to(kernel), tensors))


@every_pair
def test_reference_is_as_exact(host_dtype, seed_dtype, device):
    sums_in = arithmetic_dtype(host_dtype, seed_dtype)
    with tolaria.backend("reference"):
        for n, value in itertools.product((1, 300), SCALARS):
            host, seed, grad = operands(n, host_dtype, seed_dtype, device)
            alpha = torch.tensor(value, dtype=torch.float64, device=device)
            results = gradients(host, seed, alpha, grad)
            assert_blend_is_exact(host, seed, alpha, grad, results, sums_in)
            assert_ends_keep_bits(host, seed, alpha, results[0])


@every_pair
@pytest.mark.parametrize("alpha_dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_second_derivatives(backend, host_dtype, seed_dtype, alpha_dtype, device):
    """Those of the formula with its ends selected: finite for any alpha, even infinite, and NaN for NaN."""
    values = [0.3, 0.7, 0.0, 1.0, -0.5, 2.0, INF, -INF, 1e-50, 1 - 1e-12]
    kind = arithmetic_dtype(host_dtype, seed_dtype)
    alpha = torch.tensor(values, dtype=alpha_dtype, device=device)[:, None]
    host, seed, grad = operands((len(values), 40), host_dtype, seed_dtype, device)
    weights = [torch.randn(t.shape, dtype=torch.float64).to(device) for t in (host, seed, alpha)]

    def second(first, *tensors):
        inputs = [t.detach().requires_grad_() for t in tensors]
        grads = first(*inputs)
        total = sum((w * g.double()).sum() for w, g in zip(weights, grads, strict=True))
        return grads, torch.autograd.grad(total, inputs)

    def by_autograd(h, s, a, g):
        return torch.autograd.grad(blend(h, s, a), (h, s, a), g, create_graph=True)

    def by_formula(h, s, a, g):
        inner = torch.where((a > 0) & (a < 1), a, 0.5)
        to_host = torch.where(a <= 0, g, torch.where(a >= 1, 0.0, g * (1 - inner)))
        to_seed = torch.where(a >= 1, g, torch.where(a <= 0, 0.0, g * inner))
        is_live = (a >= 0) & (a <= 1)
        return to_host, to_seed, torch.where(is_live, g * (s - h), 0.0).sum_to_size(a.shape)

    found, again = second(by_autograd, host, seed, alpha, grad)
    wide = (host.double(), seed.double(), alpha.to(kind).double(), grad.double())
    _, exactly = second(by_formula, *wide)
    assert_blend_is_exact(host, seed, alpha, grad, (None, *found), torch.float32)
    for name, result, value in zip(["host", "seed", "alpha", "grad"], again, exactly, strict=True):
        eps = max(torch.finfo(t).eps for t in (kind, alpha_dtype, host_dtype, seed_dtype))
        scale = value.abs().amax(1, keepdim=True).clamp(min=1.0) * (40 if name == "alpha" else 1)
        bad = ~((result.double() - value).abs() <= 8 * eps * scale)
        assert not bad.any(), (name, bad.nonzero()[:4].tolist(), result[bad][:4], value[bad][:4])
    nan = torch.full_like(alpha, NAN)
    found, _ = second(by_autograd, host, seed, nan, grad)
    assert found[0].isnan().all()
    assert found[1].isnan().all()


@needs_extension
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(
    case={
        "shape": (257,),
        "host_dtype": torch.bfloat16,
        "seed_dtype": torch.float32,
        "alpha_dtype": torch.float32,
        "host_layout": "contiguous",
        "seed_layout": "contiguous",
        "grad_layout": "contiguous",
        "alpha_shape": (),
        "alpha_layout": "contiguous",
        "rng_seed": 3,
    }
)
@given(case=blend_cases())
def test_any_case(case):
    host, seed, alpha, grad = case_tensors(case)
    with tolaria.backend("fused"):
        results = gradients(host, seed, alpha, grad)
    assert_blend_is_exact(host, seed, alpha, grad, results)
    assert_ends_keep_bits(host, seed, alpha, results[0])
    assert results[0].stride() == torch.empty_like(host).stride()
    assert results[3].dtype == alpha.dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("value", [*SCALARS, torch.tensor([[0.3], [0.0], [NAN]])], ids=str)
def test_gate_selects_by_the_same_alpha(backend, device, dtype, value):
    features = torch.randn(3, 300).to(dtype).to(device).requires_grad_()
    alpha = torch.as_tensor(value, dtype=torch.float64).to(device)
    grad = torch.randn(3, 300).to(dtype).to(device)
    out = seed_gate(features, alpha)
    (found,) = torch.autograd.grad(out, features, grad)
    is_shut = (alpha.to(arithmetic_dtype(dtype)) <= 0).expand(3, 300)
    assert same_bits(out, features)
    assert same_bits(found, torch.where(is_shut, 0.0, grad))


@every_pair
def test_straight_through_hands_on_every_bit(backend, device, host_dtype, seed_dtype):
    host, seed, grad = operands((3, 300), host_dtype, seed_dtype, device)
    inputs = [t.requires_grad_() for t in (host, seed)]
    out = straight_through(*inputs)
    found = torch.autograd.grad(out, inputs, grad)
    assert same_bits(out, host)
    assert same_bits(found[0], grad)
    assert same_bits(found[1], grad.to(seed_dtype))
