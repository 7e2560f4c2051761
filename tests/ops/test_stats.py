"""tensor_stats: what is summed, counted and skipped, over lists of every kind."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import DTYPE_IDS, DTYPES, LAYOUTS, laid_out, same_bits
from torch.library import opcheck

import tolaria
from tolaria import _extension
from tolaria.ops import tensor_stats
from tolaria.reference import stats as reference

INF, NAN = float("inf"), float("nan")
needs_extension = pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")

values = st.one_of(
    st.floats(width=16), st.sampled_from([0.0, -0.0, INF, -INF, NAN, 65504.0, 6e-8, 1e-40, -3e38, 1e300])
)
tensors = st.builds(
    lambda data, dtype, layout: laid_out(
        torch.tensor(data, dtype=torch.float64).to(dtype).reshape(-1), layout
    ),
    st.lists(values, max_size=70),
    st.sampled_from(DTYPES),
    st.sampled_from(LAYOUTS),
)
lists = st.lists(st.one_of(st.none(), tensors), max_size=8)


@needs_extension
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=lists)
def test_fused_agrees_with_the_reference(tensors):
    expected = reference.tensor_stats(tensors)
    with tolaria.backend("fused"):
        result = tensor_stats(tensors)
    torch.testing.assert_close(result[0], expected[0], rtol=1e-13, atol=0)
    assert result[1:].tolist() == expected[1:].tolist()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=lists)
def test_reference_agrees_with_the_definition(tensors):
    kept = [(i, t.double()) for i, t in enumerate(tensors) if t is not None]
    finite = torch.cat([t[t.isfinite()] for _, t in kept] or [torch.empty(0, dtype=torch.float64)])
    bad = [i for i, t in kept if not t.isfinite().all()]
    result = reference.tensor_stats(tensors)
    torch.testing.assert_close(result[0], finite.square().sum(), rtol=1e-13, atol=0)
    assert result[1] == (finite.abs().max() if len(finite) else 0.0)
    assert result[2] == sum(int((~t.isfinite()).sum()) for _, t in kept)
    assert result[3] == (bad[0] if bad else -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("size", [1, 15, 16, 17, 1023, 1025, 32768, 100_003])
def test_long_tensors_and_any_place_of_a_nan(backend, device, dtype, size):
    tensor = torch.randn(size, device=device).to(dtype)
    clean = tensor_stats([tensor])
    assert clean[2:].tolist() == [0.0, -1.0]
    torch.testing.assert_close(clean[0], tensor.double().square().sum(), rtol=1e-12, atol=0)
    for place in {0, size // 2, size - 1}:
        for poison in (NAN, INF, -INF):
            broken = tensor.clone()
            broken[place] = poison
            rest = torch.cat([broken[:place], broken[place + 1 :]]).double()
            result = tensor_stats([None, tensor, broken])
            assert result[2:].tolist() == [1.0, 2.0]
            torch.testing.assert_close(result[0], clean[0] + rest.square().sum(), rtol=1e-12, atol=0)
            assert result[1] == tensor.double().abs().max()


def test_integers_bools_and_empty_tensors_are_finite(backend, device):
    tensors = [
        torch.tensor([3, -4], device=device),
        torch.tensor([True, False, True], device=device),
        torch.empty(0, 3, device=device),
        torch.tensor(-7, dtype=torch.int8, device=device),
        torch.tensor([200], dtype=torch.uint8, device=device),
    ]
    assert tensor_stats(tensors).tolist() == pytest.approx([9 + 16 + 2 + 49 + 40000, 200.0, 0.0, -1.0])


def test_nothing_to_look_at(backend, device):
    for empty in ([], [None], [None, torch.empty(0, device=device)]):
        assert tensor_stats(empty).tolist() == [0.0, 0.0, 0.0, -1.0]


def test_float32_squares_do_not_overflow(backend, device):
    result = tensor_stats([torch.tensor([3e38, -3e38, 1e-30], device=device)])
    assert result[0].item() == pytest.approx(2 * float(torch.tensor(3e38)) ** 2, rel=1e-12)
    assert result[2] == 0


def test_any_iterable_and_tensors_that_require_grad(backend, device):
    layer = torch.nn.Linear(3, 4).to(device)
    result = tensor_stats(layer.parameters())
    assert not result.requires_grad
    assert result[0].item() == pytest.approx(
        sum(float(p.detach().double().square().sum()) for p in layer.parameters())
    )


def test_expanded_and_strided_values_count_as_often_as_they_are_seen(backend, device):
    assert tensor_stats([torch.full((1,), 2.0, device=device).expand(5)])[0].item() == pytest.approx(20)
    assert tensor_stats([torch.arange(6.0, device=device)[::2]])[0].item() == pytest.approx(20)
    assert tensor_stats([torch.full((1,), NAN, device=device).expand(5)])[2] == 5.0


@needs_extension
def test_result_is_the_same_for_any_thread_count():
    tensors, before, results = [torch.randn(n) for n in (100_000, 7, 333_333)], torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(tensor_stats(tensors))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(results[0], r) for r in results)


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        (
            lambda: [torch.ones(2), torch.ones(2).to_sparse()],
            TypeError,
            r"tensors\[1\]: expected a strided tensor, got Sparse",
        ),
        (
            lambda: [torch.eye(2).to_sparse_csr()],
            TypeError,
            r"tensors\[0\]: expected a strided tensor, got SparseCsr",
        ),
        (
            lambda: [None, torch.ones(2).cfloat()],
            TypeError,
            r"tensors\[1\]: .*an integer or bool, got complex64",
        ),
        (lambda: [torch.ones(2).to(torch.float8_e4m3fn)], TypeError, r"tensors\[0\]: .*got float8_e4m3fn"),
        (lambda: [3.0], TypeError, "tensors: expected Tensors and None, got float"),
    ],
    ids=["sparse", "sparse-csr", "complex", "float8", "number"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_bad_tensors_are_named(backend, tensors, error, words):
    with pytest.raises(error, match="tolaria.tensor_stats: " + words):
        tensor_stats(tensors())


@pytest.mark.cuda
def test_mixed_devices_are_an_error(backend):
    for first, second in (("cpu", "cuda:0"), ("cuda:0", "cpu")):
        words = rf"tensors\[1\]: expected tensors\[0\]'s device {first}, got {second}; call it once for each"
        with pytest.raises(ValueError, match=words):
            tensor_stats([torch.ones(2, device=first), torch.ones(2, device=second)])


@needs_extension
def test_opcheck():
    samples = [torch.randn(4, 3, requires_grad=True), None, torch.arange(5), torch.empty(0)]
    opcheck(torch.ops.tolaria.tensor_stats, (samples,))


@needs_extension
def test_compiles_without_a_graph_break():
    def step(a, b):
        return tensor_stats([a, None, b * 2])

    a, b = torch.randn(5), torch.randn(3)
    torch._dynamo.reset()
    assert same_bits(torch.compile(step, fullgraph=True, backend="aot_eager")(a, b), step(a, b))
