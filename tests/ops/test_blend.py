"""blend and seed_gate: values, gradients, layouts, dtypes, errors, tracing."""

import itertools

import pytest
import torch
from strategies import DTYPE_IDS, DTYPES, alpha_shapes, laid_out, same_bits
from torch.library import opcheck

import tolaria
from tolaria import _extension
from tolaria.ops import blend, seed_gate

needs_extension = pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
NAN = float("nan")


def gradients(function, host, seed, alpha, grad):
    inputs = [t.detach().requires_grad_() for t in (host, seed, alpha)]
    out = function(*inputs)
    return (out, *torch.autograd.grad(out, inputs, grad))


@needs_extension
@pytest.mark.parametrize("alpha_shape", [(), (64, 1), (64, 1027)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_blend_is_within_two_ulp_of_the_reference_even_where_host_and_seed_cancel(dtype, alpha_shape):
    host, seed = torch.randn(2, 64, 1027, dtype=torch.float64).to(dtype)
    alpha = torch.rand(alpha_shape, dtype=torch.float64).to(dtype)
    results = []
    for mode in ("fused", "reference"):
        with tolaria.backend(mode):
            results.append(blend(host, seed, alpha).double())
    apart = (results[0] - results[1]).abs()
    info = torch.finfo(dtype)
    ulp = torch.ldexp(torch.full_like(results[1], info.eps / 2), torch.frexp(results[1])[1])
    assert (apart <= 2 * ulp.clamp(min=info.smallest_normal * info.eps)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 3, 4, 5)], ids=str)
def test_ends_are_selected_bit_for_bit(backend, device, dtype, shape):
    host, seed = torch.randn(shape, device=device).to(dtype), torch.randn(shape, device=device).to(dtype)
    poison = torch.full_like(host, NAN)
    for value in (0.0, -0.0, -3.0, -float("inf")):
        assert same_bits(blend(host, poison, torch.tensor(value, device=device)), host)
    for value in (1.0, 2.5, float("inf")):
        assert same_bits(blend(poison, seed, torch.tensor(value, device=device)), seed)


@needs_extension
@pytest.mark.parametrize("seed_dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("host_dtype", DTYPES, ids=DTYPE_IDS)
def test_the_hosts_end_keeps_the_payload_of_a_nan(backend, device, host_dtype, seed_dtype):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[host_dtype.itemsize]
    for n, alphas in itertools.product((7, 33), (torch.zeros(()), torch.full((1,), -1.0), None)):
        alpha = torch.tensor([0.0, 0.5, -1.0, 1.0])[torch.arange(n) % 4] if alphas is None else alphas
        host = torch.full((n,), -1, dtype=integers, device=device).view(host_dtype).requires_grad_()
        alpha, seed = alpha.to(device), torch.ones(n, dtype=seed_dtype, device=device)
        out = blend(host, seed, alpha)
        (grad,) = torch.autograd.grad(out, host, host.detach())
        at_end = (alpha <= 0).expand(n)
        for result in (out.detach(), grad):
            assert (result.view(integers)[at_end] == -1).all()


@pytest.mark.parametrize("alpha_bits", [0x3E99999A, 0x3F333333, 0x7FFFFFFF], ids=["0.3", "0.7", "nan"])
def test_every_bfloat16_is_rounded_in_a_pack_as_alone(alpha_bits):
    """One alpha goes in packs, one per element does not. A NaN must not be rounded up to a number."""
    host = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    seed, grad = host.roll(12_345), host.roll(23_456)
    alpha = torch.tensor(alpha_bits, dtype=torch.int32).view(torch.float32)
    in_packs = gradients(blend, host, seed, alpha, grad)
    alone = gradients(blend, host, seed, alpha.expand(host.shape).contiguous(), grad)
    assert all(map(same_bits, in_packs[:3], alone[:3]))


@pytest.mark.parametrize("alpha_shape", [(), (2, 1, 1, 1), (3, 1, 1), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("seed_dtype", DTYPES, ids=DTYPE_IDS)
def test_poison_on_the_unused_side_reaches_no_gradient(backend, device, alpha_shape, seed_dtype):
    host = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
    seed = torch.full((2, 3, 4, 5), NAN, device=device, dtype=seed_dtype, requires_grad=True)
    grad = torch.full((2, 3, 4, 5), NAN, device=device)
    blend(host, seed, torch.zeros(alpha_shape, device=device)).backward(grad)
    assert host.grad.isnan().all()
    assert same_bits(seed.grad, torch.zeros_like(seed))
    host.grad = seed.grad = None
    blend(host, seed, torch.ones(alpha_shape, device=device)).backward(grad)
    assert same_bits(host.grad, torch.zeros_like(host))
    assert seed.grad.isnan().all()


def test_nan_alpha_is_seen(backend, device):
    host, seed = torch.randn(5, device=device), torch.randn(5, device=device)
    alpha = torch.tensor([NAN, 0.0, 1.0, 0.5, NAN], device=device)
    assert blend(host, seed, alpha).isnan().tolist() == [True, False, False, False, True]
    assert blend(host, seed, torch.tensor(NAN, device=device)).isnan().all()


def test_alpha_gradient_is_that_of_clamp(backend, device):
    host, seed = torch.zeros(5, device=device), torch.ones(5, device=device)
    alpha = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5], device=device, requires_grad=True)
    blend(host, seed, alpha).sum().backward()
    assert alpha.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "strided", "expanded"])
def test_every_alpha_shape_and_layout(backend, device, layout):
    shape = (2, 3, 4, 5)
    host = laid_out(torch.randn(shape, dtype=torch.float64, device=device), layout)
    seed = laid_out(torch.randn(shape, dtype=torch.float64, device=device), layout)
    for alpha_shape in alpha_shapes(shape):
        alpha = torch.rand(alpha_shape, dtype=torch.float64, device=device)
        exact = gradients(lambda h, s, a: h + a * (s - h), host, seed, alpha, torch.ones_like(host))
        for result, value in zip(
            gradients(blend, host, seed, alpha, torch.ones_like(host)), exact, strict=True
        ):
            torch.testing.assert_close(result, value, rtol=1e-12, atol=1e-12)


def test_expanded_alpha_gets_a_gradient_per_element(backend, device):
    alpha = torch.tensor(0.25, device=device).expand(2, 1).requires_grad_()
    (grad,) = torch.autograd.grad(
        blend(torch.zeros(2, 3, device=device), torch.ones(2, 3, device=device), alpha).sum(), alpha
    )
    assert grad.tolist() == [[3.0], [3.0]]


@pytest.mark.parametrize(
    ("memory_format", "shape"),
    [(torch.channels_last, (2, 3, 4, 5)), (torch.channels_last_3d, (2, 3, 2, 4, 5))],
    ids=["channels_last", "channels_last_3d"],
)
def test_memory_format_is_kept(backend, device, memory_format, shape):
    host = torch.randn(shape, device=device).contiguous(memory_format=memory_format).requires_grad_()
    seed = torch.randn(shape, device=device, requires_grad=True)
    out = blend(host, seed, torch.rand(shape[0], *[1] * (len(shape) - 1), device=device))
    assert out.is_contiguous(memory_format=memory_format)
    out.sum().backward()
    assert host.grad.shape == seed.grad.shape == shape


@pytest.mark.parametrize("wants", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_the_gradients_asked_for(backend, device, wants):
    tensors = [
        torch.rand(4, 5, device=device),
        torch.rand(4, 5, device=device),
        torch.rand(4, 1, device=device),
    ]
    inputs = [t.requires_grad_(want) for t, want in zip(tensors, wants, strict=True)]
    out = blend(*inputs)
    assert out.requires_grad == any(wants)
    if any(wants):
        out.sum().backward()
    assert [t.grad is not None for t in inputs] == list(wants)


def test_features_are_saved_for_alpha_alone(device, backend):
    host, seed = (torch.rand(64, device=device, requires_grad=True) for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        blend(host, seed, torch.tensor(0.5, device=device))
    assert sum(saved) == 1


@pytest.mark.parametrize("alpha_shape", [(), (2, 1), (3,), (2, 3)], ids=str)
def test_gradcheck_and_gradgradcheck(backend, alpha_shape):
    inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs.append((torch.rand(alpha_shape, dtype=torch.float64) * 0.3 + 0.1).requires_grad_())
    assert torch.autograd.gradcheck(blend, inputs)
    assert torch.autograd.gradgradcheck(blend, inputs)
    features, alpha = inputs[0], inputs[2].detach()
    assert torch.autograd.gradcheck(seed_gate, (features, alpha))
    assert torch.autograd.gradgradcheck(seed_gate, (features, alpha))


def test_second_derivative_keeps_the_selection(backend):
    host = torch.randn(3, requires_grad=True)
    seed = torch.full((3,), NAN, requires_grad=True)
    alpha = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    grad = torch.randn(3, requires_grad=True)
    grads = torch.autograd.grad(blend(host, seed, alpha), (host, seed, alpha), grad, create_graph=True)
    again = torch.autograd.grad(sum(g.sum() for g in grads), (grad, alpha), allow_unused=True)
    assert same_bits(again[0], torch.ones(3))
    assert again[1] is None or same_bits(again[1], torch.zeros(3)) or (again[1] == 0).all()


def test_backward_twice_and_non_contiguous_grad(backend, device):
    host, seed = (torch.randn(4, 6, device=device, requires_grad=True) for _ in range(2))
    alpha = torch.rand(4, 1, device=device, requires_grad=True)
    out = blend(host, seed, alpha)
    grad = torch.randn(6, 4, device=device).t()
    first = torch.autograd.grad(out, (host, seed, alpha), grad, retain_graph=True)
    second = torch.autograd.grad(out, (host, seed, alpha), grad)
    for a, b in zip(first, second, strict=True):
        assert same_bits(a, b)
    assert torch.allclose(first[0], grad * (1 - alpha))


def test_in_place_consumer_is_right(backend, device):
    host, seed = (torch.randn(8, device=device, requires_grad=True) for _ in range(2))
    alpha = torch.tensor(0.25, device=device, requires_grad=True)
    results = []
    for consume in (lambda t: t.mul_(3), lambda t: t * 3):
        out = consume(blend(host, seed, alpha))
        results.append(torch.autograd.grad(out.sum(), (host, seed, alpha)))
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)


def test_autocast_mixes_dtypes_by_itself(backend):
    linear = torch.nn.Linear(8, 8)
    host = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seed = linear(host)
        out = blend(host, seed, torch.tensor(0.5))
        back = blend(seed, host, torch.tensor(0.5))
    assert seed.dtype == torch.bfloat16
    assert out.dtype == torch.float32
    assert back.dtype == torch.bfloat16
    out.sum().backward()
    assert linear.weight.grad is not None


@needs_extension
def test_result_is_the_same_for_any_thread_count():
    host, seed = torch.randn(3, 40, 50, 60), torch.randn(3, 40, 50, 60)
    grad, before, runs = torch.randn_like(host), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            alphas = [
                torch.rand(s, generator=torch.Generator().manual_seed(1)) for s in [(), (3, 1, 1, 1), (60,)]
            ]
            runs.append([t for a in alphas for t in gradients(blend, host, seed, a, grad)])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(same_bits(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize(
    ("host", "seed", "alpha", "error", "words"),
    [
        (
            torch.ones(2, 3),
            torch.ones(2, 4),
            torch.tensor(0.5),
            ValueError,
            r"seed: expected host's shape \[2, 3\], got \[2, 4\]",
        ),
        (
            torch.ones(2, 3),
            torch.ones(2, 3),
            torch.ones(2),
            ValueError,
            r"alpha: .*broadcasts to host's \[2, 3\], got \[2\]",
        ),
        (
            torch.ones(3),
            torch.ones(3),
            torch.ones(2, 3),
            ValueError,
            r"alpha: .*broadcasts to host's \[3\], got \[2, 3\]",
        ),
        (
            torch.ones(3).int(),
            torch.ones(3),
            torch.tensor(0.5),
            TypeError,
            "host: expected dtype float32, .* got int32",
        ),
        (
            torch.ones(3),
            torch.ones(3).cfloat(),
            torch.tensor(0.5),
            TypeError,
            "seed: expected dtype .* got complex64",
        ),
        (torch.ones(3), torch.ones(3), torch.tensor(1), TypeError, "alpha: expected dtype .* got int64"),
        (
            torch.ones(3),
            torch.ones(3),
            0.5,
            TypeError,
            r"alpha: expected a Tensor, got float; pass torch\.tensor",
        ),
        (
            torch.ones(3, device="meta"),
            torch.ones(3, device="meta"),
            torch.tensor(0.5),
            ValueError,
            r"alpha: expected host's device meta, got cpu; move it with alpha\.to\('meta'\)",
        ),
    ],
    ids=[
        "shape",
        "alpha-shape",
        "alpha-larger",
        "integer",
        "complex",
        "integer-alpha",
        "float-alpha",
        "device",
    ],
)
def test_bad_arguments_are_named(backend, host, seed, alpha, error, words):
    with pytest.raises(error, match="tolaria.blend: " + words):
        blend(host, seed, alpha)


@pytest.mark.cuda
def test_cpu_alpha_beside_cuda_features_is_a_device_error(backend):
    host = torch.ones(3, device="cuda")
    with pytest.raises(ValueError, match=r"alpha: expected host's device cuda:0, got cpu"):
        blend(host, host, torch.tensor(0.5))


def test_seed_gate_selects_the_gradient(backend, device):
    features = torch.randn(3, 4, device=device, requires_grad=True)
    out = seed_gate(features, torch.tensor([[0.0], [0.5], [NAN]], device=device))
    assert same_bits(out, features)
    assert out.data_ptr() != features.data_ptr()
    out.backward(torch.full((3, 4), NAN, device=device))
    assert same_bits(features.grad[0], torch.zeros(4))
    assert features.grad[1:].isnan().all()


def test_seed_gate_lets_no_poison_through_a_blend(backend):
    features = torch.randn(2, 4, requires_grad=True)
    weight = torch.full((4, 4), NAN, requires_grad=True)
    alpha = torch.tensor(0.0)
    blend(features, seed_gate(features, alpha) @ weight, alpha).sum().backward()
    assert same_bits(features.grad, torch.ones(2, 4))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("alpha_shape", [(), (4, 1, 1, 1), (3, 1, 1)], ids=str)
@needs_extension
def test_opcheck(dtype, alpha_shape):
    host = torch.randn(4, 3, 2, 2).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    seed = torch.randn(4, 3, 2, 2).requires_grad_()
    alpha = torch.rand(alpha_shape)
    opcheck(torch.ops.tolaria.blend, (host, seed, alpha))
    opcheck(torch.ops.tolaria.blend, (host, seed, alpha.clone().requires_grad_()))
    opcheck(torch.ops.tolaria.seed_gate, (host, alpha))
    opcheck(torch.ops.tolaria.seed_gate_backward, (host.detach(), alpha))
    for mask in ([True, True, True], [True, True, False]):
        opcheck(
            torch.ops.tolaria.blend_backward,
            (host.detach(), host.detach(), seed.detach(), alpha, torch.float32, mask),
        )


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # torch's own, in dynamo
@pytest.mark.parametrize("alpha_grad", [False, True], ids=["ramp", "learned"])
def test_compiles_without_a_graph_break(backend, alpha_grad):
    def step(host, seed, alpha):
        return blend(host, seed_gate(seed, alpha), alpha).square().sum()

    inputs = [torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)]
    alpha = torch.tensor(0.3, requires_grad=alpha_grad)
    wanted = [*inputs, alpha] if alpha_grad else inputs
    eager = torch.autograd.grad(step(*inputs, alpha), wanted)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    traced = torch.autograd.grad(compiled(*inputs, alpha), wanted)
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b)
