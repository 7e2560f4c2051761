"""CPU and CUDA: elementwise results bit for bit, reductions within bounds and the same at every call."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import DTYPE_IDS, DTYPES, LAYOUTS, alpha_shapes, laid_out, same_bits

from tolaria.ops import (
    MetricsField,
    blend,
    classification_metrics_,
    seed_gate,
    straight_through,
    tensor_stats,
)
from tolaria.reference import blend as reference

pytestmark = pytest.mark.cuda
INF, NAN = float("inf"), float("nan")
FIELDS = len(MetricsField)
SPECIAL = (NAN, INF, -INF, 0.0, -0.0, 1e-40, -6e-8, 3e38, 65504.0)
ALPHAS = torch.tensor([-INF, -1.0, -0.0, 0.0, 1e-3, 0.3, 0.5, 0.7, 1.0, 1.5, INF, NAN])
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16)
# Around packs, warps, blocks and tiles, one and several rows of each; each alpha layout meets each of them.
SHAPES = [
    *[(n,) for n in (0, 1, 3, 7, 8, 9, 31, 33, 255, 257, 1023, 4095, 4096, 4097, 8200)],
    *[(2, 0, 3), (3, 5, 1), (1, 1, 1), (5, 3, 257), (2, 3, 16, 17), (2, 4099), (3, 8192), (40, 8, 3, 3)],
    *[(1025, 5), (33, 129), (600, 7), (70, 48), (300, 2, 2), (3, 8, 12, 10), (2, 3, 2, 4, 5), (16, 8, 7, 7)],
]


def quickly(examples):
    return settings(max_examples=examples, suppress_health_check=[HealthCheck.function_scoped_fixture])


def placed(values, layout, skew, device):
    """``values`` on a device in a memory layout; a dense tensor begins ``skew`` elements into its storage."""
    tensor = laid_out(values.to(device), layout)
    if skew == 0 or not tensor.is_contiguous():
        return tensor
    room = torch.empty(tensor.numel() + skew, dtype=tensor.dtype, device=device)
    return room[skew:].view(tensor.shape).copy_(tensor)


def with_specials(shape, dtype, generator):
    """Normal values, some of them replaced by what arithmetic stumbles over."""
    values = torch.randn(shape, generator=generator)
    chosen = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < 0.1, chosen, values).to(dtype)


@st.composite
def blends(draw):
    """Makers of host, seed, alpha and grad on a device."""
    shape = draw(st.sampled_from(SHAPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    host_dtype, seed_dtype = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    alpha_shape = draw(st.sampled_from(alpha_shapes(shape)))
    alpha = ALPHAS[torch.randint(len(ALPHAS), alpha_shape, generator=generator)].to(
        draw(st.sampled_from(DTYPES))
    )
    tensors = [with_specials(shape, dtype, generator) for dtype in (host_dtype, seed_dtype, host_dtype)]
    tensors.insert(2, alpha)
    skews = st.one_of(st.just(0), st.integers(0, 15))
    places = [(draw(st.sampled_from(LAYOUTS)), draw(skews)) for _ in tensors]
    if draw(st.booleans()):  # as they come from an allocator, where the wide accesses are
        places = [("contiguous", 0)] * 4
    return lambda device: [placed(t, *place, device) for t, place in zip(tensors, places, strict=True)]


def gradients(function, *tensors):
    """Result and gradients; the last tensor is the incoming one."""
    *inputs, grad = tensors
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = function(*inputs)
    return (out.detach(), *torch.autograd.grad(out, inputs, grad, allow_unused=True))


def assert_same(cpu, cuda):
    assert same_bits(cpu, cuda)
    assert cpu.stride() == cuda.stride()


@quickly(150)
@given(make=blends())
def test_blend_is_the_same_bit_for_bit(make):
    cpu, cuda = (gradients(blend, *make(device)) for device in ("cpu", "cuda"))
    for here, there in zip(cpu[:3], cuda[:3], strict=True):
        assert_same(here, there)
    host, seed, alpha, grad = make("cuda")
    masked = torch.ops.tolaria.blend_backward(grad, None, None, alpha, seed.dtype, [True, True, False])
    for here, there in zip(cpu[1:3], masked[:2], strict=True):
        assert same_bits(here, there)
    ends = (alpha <= 0).expand_as(host)
    assert torch.equal(bits(blend(host, seed, alpha))[ends], bits(host)[ends])  # the payloads of NaN, too


def bits(tensor):
    """The same bytes as integers."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


@quickly(40)
@given(make=blends())
def test_gates_are_the_same_bit_for_bit(make):
    for function in (seed_gate, straight_through):
        results = []
        for device in ("cpu", "cuda"):
            host, seed, alpha, grad = make(device)
            results.append(gradients(function, host, alpha if function is seed_gate else seed, grad))
        for here, there in zip(*results, strict=True):
            assert (here is None) == (there is None)
            if here is not None:
                assert same_bits(here, there)
        assert torch.equal(bits(results[1][0]), bits(host))


@quickly(60)
@given(
    shape=st.sampled_from([shape for shape in SHAPES if 0 not in shape]),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    skew=st.sampled_from([0, 0, 1, 3]),
    layout=st.sampled_from(["contiguous", "channels_last", "permuted"]),
    data=st.data(),
)
def test_alpha_gradient_is_bounded_and_repeats(shape, dtypes, skew, layout, data):
    generator = torch.Generator().manual_seed(0)
    host, seed, grad = (
        placed(torch.randn(shape, generator=generator).to(dtype), layout, skew, "cuda")
        for dtype in (*dtypes, dtypes[0])
    )
    alpha_shape = data.draw(st.sampled_from(alpha_shapes(shape)))
    alpha = torch.rand(alpha_shape, generator=generator, dtype=torch.float64).cuda()
    result = gradients(blend, host, seed, alpha, grad)[3]
    assert same_bits(result, gradients(blend, host, seed, alpha, grad)[3])
    wide = [t.double().cpu() for t in (host, seed, alpha, grad)]
    exact = gradients(reference.blend, *wide)[3]
    # A term has two roundings of the arithmetic type; the sum, in float64, adds less than one more.
    eps = torch.finfo(torch.float64 if torch.float64 in dtypes else torch.float32).eps
    sizes = (wide[3].abs() * (wide[1] - wide[0]).abs()).sum_to_size(alpha_shape)
    slack = (host.numel() + 4) * torch.finfo(torch.float64).eps
    assert ((result.cpu() - exact).abs() <= (1.01 * eps + slack) * sizes).all()


@st.composite
def lists(draw):
    """A list for tensor_stats, on the CPU: dtypes, layouts and starts of every kind."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    sizes = st.sampled_from([0, 1, 2, 3, 15, 16, 17, 31, 33, 255, 257, 4097, 32767, 32768, 32769, 70_001])
    tensors = []
    for _ in range(draw(st.integers(1, 6))):
        dtype, size = draw(st.sampled_from([*DTYPES, *INTEGERS, None])), draw(sizes)
        if dtype is None:
            tensors.append((None, "contiguous", 0))
            continue
        values = torch.randn(size, generator=generator)
        if dtype in DTYPES and draw(st.booleans()):
            values = with_specials((size,), dtype, generator)
        layout = draw(st.sampled_from(["contiguous", "contiguous", "strided"]))
        tensors.append(((values * 3).abs().to(dtype), layout, draw(st.integers(0, 15))))
    return tensors


@quickly(60)
@given(tensors=lists())
def test_statistics_agree(tensors):
    cpu, cuda = (
        [None if t is None else placed(t, layout, skew, device) for t, layout, skew in tensors]
        for device in ("cpu", "cuda")
    )
    expected, result = tensor_stats(cpu), tensor_stats(cuda)
    assert same_bits(expected[1:], result[1:])  # magnitude, count and place are exact
    torch.testing.assert_close(result[0].cpu(), expected[0], rtol=1e-12, atol=0)
    assert same_bits(result, tensor_stats(cuda))


@pytest.mark.parametrize("count", [1, 1125, 1126, 5000])
def test_statistics_of_long_lists(count):
    tensors = [torch.full((i % 4,), float(i)) for i in range(count)]
    cuda = [t.cuda() for t in tensors]
    assert same_bits(tensor_stats(tensors), tensor_stats(cuda))
    for place in {count - 1, count // 2 | 1}:
        if tensors[place % count].numel():
            cuda[place % count][-1] = NAN
            assert tensor_stats(cuda)[3] == min(i for i, t in enumerate(cuda) if t.isnan().any())


@quickly(80)
@given(
    classes=st.sampled_from([1, 2, 3, 7, 10, 16, 100, 1000, 4095, 4096, 4097, 50257]),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 5),
    skew=st.integers(0, 15),
    layout=st.sampled_from(["contiguous", "contiguous", "strided", "permuted", "expanded"]),
    rng_seed=st.integers(0, 999),
    specials=st.booleans(),
    per_class=st.booleans(),
)
def test_metrics_agree(classes, dtype, rows, skew, layout, rng_seed, specials, per_class):
    torch.manual_seed(rng_seed)
    logits = (torch.randn(rows, classes) * 4).to(dtype)
    if rng_seed % 2:
        logits = logits.round()  # ties
    if specials:
        logits.view(-1)[torch.randint(logits.numel(), (2,))] = torch.tensor([NAN, -INF, INF])[
            torch.randint(3, (2,))
        ].to(dtype)
    labels = torch.randint(-1, classes, (rows,))
    results = []
    for device in ("cpu", "cuda", "cuda"):
        acc = torch.zeros(FIELDS + 2 * classes * per_class, dtype=torch.float64, device=device)
        classification_metrics_(acc, placed(logits, layout, skew, device), labels.to(device), -1, 3)
        results.append(acc)
    cpu, cuda, again = results
    assert same_bits(cpu[1:], cuda[1:])
    assert same_bits(cuda, again)
    torch.testing.assert_close(cuda[0].cpu(), cpu[0], rtol=2e-6, atol=1e-5, equal_nan=True)


def test_rows_of_logits_beyond_two_to_the_31_elements():
    gap = 2**31 + 5  # rows further apart than 32 bits count; the gap itself is never touched
    room = torch.empty(gap + 8, dtype=torch.bfloat16, device="cuda")
    logits = room.as_strided((2, 8), (gap, 1))
    logits.copy_(torch.arange(16.0).view(2, 8))
    acc = torch.zeros(FIELDS, dtype=torch.float64, device="cuda")
    classification_metrics_(acc, logits, torch.tensor([7, 7], device="cuda"))
    assert acc[MetricsField.CORRECT] == 2
    assert tensor_stats([logits])[1] == 15.0


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_integers_are_summed_exactly_enough(dtype):
    tensors = [torch.tensor([2**62, -(2**62), 3], device="cuda"), torch.ones(3, device="cuda", dtype=dtype)]
    assert tensor_stats(tensors).tolist() == [2.0 * 2.0**124, 2.0**62, 0.0, -1.0]
