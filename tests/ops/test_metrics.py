"""classification_metrics_: loss, ranks, ties, ignored and invalid labels, layouts."""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import DTYPE_IDS, DTYPES, LAYOUTS, laid_out, same_bits
from torch.library import opcheck
from torch.nn.functional import cross_entropy

import tolaria
from tolaria import _extension
from tolaria.ops import MetricsAccumulator, MetricsField, classification_metrics_
from tolaria.reference import metrics as reference

INF, NAN = float("inf"), float("nan")
FIELDS = len(MetricsField)
needs_extension = pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")


def empty(classes, device="cpu"):
    return torch.zeros(FIELDS + 2 * classes, dtype=torch.float64, device=device)


@st.composite
def batches(draw):
    n, classes = draw(st.integers(0, 6)), draw(st.sampled_from([1, 2, 3, 10, 33, 1100]))
    extra = draw(st.sampled_from([(), (), (2,), (2, 3)]))
    torch.manual_seed(draw(st.integers(0, 999)))
    logits = torch.randn(n, classes, *extra) * draw(st.sampled_from([0.1, 3.0, 40.0]))
    if draw(st.booleans()):
        logits = logits.round()  # ties
    for value in draw(st.lists(st.sampled_from([INF, -INF, NAN]), max_size=2)):
        if logits.numel():
            logits.view(-1)[draw(st.integers(0, logits.numel() - 1))] = value
    labels = torch.randint(-1, classes, (n, *extra))
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
    label_dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.int16]))
    return laid_out(logits.to(dtype), layout), labels.to(label_dtype), draw(st.integers(1, 6))


@needs_extension
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=batches())
def test_fused_agrees_with_the_reference(batch):
    logits, labels, topk = batch
    classes = logits.shape[1]
    result, expected = empty(classes), empty(classes)
    with tolaria.backend("fused"):
        classification_metrics_(result, logits, labels, -1, topk)
    reference.classification_metrics_(expected, logits.double(), labels, -1, topk)
    assert same_bits(result[1:], expected[1:])
    torch.testing.assert_close(result[0], expected[0], rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", [(7, 1000), (2, 5, 6), (3, 4, 2, 5), (9,), (0, 4), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "strided"])
def test_shapes_and_layouts_of_cross_entropy(backend, device, dtype, shape, layout):
    logits = laid_out(torch.randn(shape, device=device).to(dtype), layout)
    dim = min(len(shape) - 1, 1)
    classes, labels_shape = shape[dim], shape[:dim] + shape[dim + 1 :]
    labels = torch.randint(0, classes, labels_shape, device=device)
    acc = empty(classes, device)
    classification_metrics_(acc, logits, labels)
    exact = cross_entropy(logits.double(), labels, reduction="sum")
    torch.testing.assert_close(acc[0], exact, rtol=1e-6, atol=1e-6)
    assert acc[MetricsField.COUNT] == labels.numel()
    assert acc[MetricsField.CORRECT] == (logits.argmax(dim) == labels).sum()
    assert acc[FIELDS:].sum() == acc[MetricsField.COUNT] + acc[MetricsField.CORRECT]


def test_ties_and_nan_are_sorted_as_argmax_does(backend, device):
    rows = [[1, 3, 3, 2], [1, NAN, 3, NAN], [5, 5, 5, 5], [-INF, -INF, 0, -INF]]
    logits = torch.tensor(rows, device=device)
    for label in range(4):
        labels = torch.full((4,), label, device=device)
        acc = empty(4, device)
        classification_metrics_(acc, logits, labels, topk=2)
        assert acc[MetricsField.CORRECT] == (logits.argmax(1) == labels).sum()
        in_two = [label in order for order in ([1, 2], [1, 3], [0, 1], [2, 0])]
        assert acc[MetricsField.TOPK_CORRECT] == sum(in_two)


def test_large_logits_are_stable(backend, device):
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4], [-3e38, 0.0, 3e38]], device=device)
    acc = empty(3, device)
    classification_metrics_(acc, logits, torch.tensor([1, 2], device=device))
    assert acc[0].item() == pytest.approx(1 + math.log1p(math.exp(-1)), rel=1e-6)


def has_fma(device):
    """Whether the metrics contract into FMA: those of GCC do from AVX2 on, but for the sanitizers (-O1)."""
    is_wide = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    is_gcc = "clang" not in str(_extension.INFO.compiler) and "ASAN_OPTIONS" not in os.environ
    return device.type == "cpu" and is_wide and is_gcc


@needs_extension
def test_the_exponential_keeps_its_bound(device):
    """The bounds of csrc/math/metrics.h, seen in log(1 + exp(-x)); 0 where float32 ends."""
    slope = 2e-8 if has_fma(device) else 8e-8
    for x in torch.linspace(0.0, 14.0, 169, dtype=torch.float64).float().tolist():
        acc = empty(2, device)
        with tolaria.backend("fused"):
            classification_metrics_(
                acc, torch.tensor([[0.0, -x]], device=device), torch.tensor([0], device=device)
            )
        exact = math.exp(-x)
        assert abs(math.expm1(acc[0].item()) - exact) <= (2.1e-7 + slope * x) * exact, x
    for far in (89.0, 200.0, 3e38, INF):
        acc = empty(2, device)
        classification_metrics_(
            acc, torch.tensor([[0.0, -far]], device=device), torch.tensor([0], device=device)
        )
        assert 0 <= acc[0] < 1e-37


def test_more_rows_than_are_kept_at_once(backend, device):
    rows = 65536 + 300
    logits = torch.randn(rows, 2, device=device)
    labels = torch.randint(-1, 2, (rows,), device=device)
    acc = empty(2, device)
    classification_metrics_(acc, logits, labels, -1)
    is_hit = (logits.argmax(1) == labels).cpu()
    exact = cross_entropy(logits.double(), labels, reduction="sum", ignore_index=-1)
    torch.testing.assert_close(acc[0], exact, rtol=1e-6, atol=0)
    hits = [int((is_hit & (labels.cpu() == c)).sum()) for c in (0, 1)]
    counts = [int((labels == c).sum()) for c in (0, 1)]
    assert acc[1:].tolist() == [sum(counts), sum(hits), sum(counts), 0, *hits, *counts]


def test_ignored_labels_leave_nothing(backend, device):
    acc = empty(3, device)
    logits = torch.full((4, 3), NAN, device=device)
    logits[1] = torch.tensor([0.0, 1.0, 0.0], device=device)
    classification_metrics_(acc, logits, torch.tensor([-100, 1, -100, -100], device=device))
    assert acc[1:].tolist() == [1, 1, 1, 0, 0, 1, 0, 0, 1, 0]
    assert acc[0].isfinite()
    short = torch.zeros(FIELDS, dtype=torch.float64, device=device)
    classification_metrics_(short, logits, torch.tensor([-100, 1, -100, -100], device=device))
    assert same_bits(short, acc[:FIELDS])


def test_batches_add_up(backend, device):
    logits, labels = torch.randn(20, 6, device=device), torch.randint(0, 6, (20,), device=device)
    whole, parts = empty(6, device), empty(6, device)
    classification_metrics_(whole, logits, labels)
    for part in range(0, 20, 7):
        classification_metrics_(parts, logits[part : part + 7], labels[part : part + 7])
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=0)


def test_topk_beyond_the_classes_is_always_a_hit(backend, device):
    acc = empty(3, device)
    classification_metrics_(
        acc, torch.randn(5, 3, device=device), torch.randint(0, 3, (5,), device=device), topk=9
    )
    assert acc[MetricsField.TOPK_CORRECT] == 5


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("label", [3, -1, 1000])
def test_a_label_out_of_range_is_an_error_and_changes_nothing(backend, label, position):
    acc, labels = empty(3), torch.tensor([0, -100, 2])
    labels[position] = label
    words = r"labels: expected class indices from 0 to 2 or ignore_index -100, "
    with pytest.raises(ValueError, match=rf"{words}got {label} at position {position}"):
        classification_metrics_(acc, torch.randn(3, 3), labels)
    assert not acc.any()


@pytest.mark.cuda
def test_a_label_out_of_range_is_counted_on_cuda(backend):
    acc = empty(3, "cuda")
    labels = torch.tensor([0, 3, -1, -100], device="cuda")
    classification_metrics_(acc, torch.randn(4, 3, device="cuda"), labels)
    assert acc[MetricsField.COUNT] == 1
    assert acc[MetricsField.INVALID] == 2


@pytest.mark.parametrize(
    ("acc", "logits", "labels", "options", "error", "words"),
    [
        (
            empty(3),
            torch.ones(2, 3),
            torch.zeros(3).long(),
            {},
            ValueError,
            r"labels: expected shape \[2\] for",
        ),
        (
            empty(3),
            torch.ones(2, 3),
            torch.zeros(2),
            {},
            TypeError,
            "labels: expected integers .* got float32",
        ),
        (empty(3), torch.ones(2, 3).int(), torch.zeros(2).long(), {}, TypeError, "logits: .* got int32"),
        (
            empty(4),
            torch.ones(2, 3),
            torch.zeros(2).long(),
            {},
            ValueError,
            r"acc: .* 11 values for 3 classes",
        ),
        (
            empty(3).float(),
            torch.ones(2, 3),
            torch.zeros(2).long(),
            {},
            TypeError,
            "acc: expected dtype float64",
        ),
        (
            empty(3),
            torch.ones(2, 3),
            torch.zeros(2).long(),
            {"topk": 0},
            ValueError,
            "topk: expected at least 1",
        ),
        (empty(3), torch.tensor(1.0), torch.tensor(0), {}, ValueError, "logits: .* got a 0-dim tensor"),
        (empty(3), torch.ones(2, 3), [0, 1], {}, TypeError, "labels: expected a Tensor, got list"),
    ],
    ids=["shape", "float-labels", "integer-logits", "classes", "float32", "topk", "scalar", "list"],
)
def test_bad_arguments_are_named(backend, acc, logits, labels, options, error, words):
    with pytest.raises(error, match="tolaria.classification_metrics_: " + words):
        classification_metrics_(acc, logits, labels, **options)


@needs_extension
def test_layout_of_the_accumulator_is_the_compiled_one():
    assert torch.ops.tolaria.metrics_fields() == [field.name.lower() for field in MetricsField]


@needs_extension
def test_result_is_the_same_for_any_thread_count():
    logits, labels, before, results = (
        torch.randn(500, 300),
        torch.randint(0, 300, (500,)),
        torch.get_num_threads(),
        [],
    )
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(empty(300))
            classification_metrics_(results[-1], logits, labels)
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(results[0], r) for r in results)


def test_accumulator_reports_means(backend, device):
    metrics = MetricsAccumulator(3, device=device, ignore_index=-1, topk=2)
    assert math.isnan(metrics.compute().loss)
    logits = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [5.0, 9.0, 0], [0, 0, 9.0]], device=device)
    metrics.update(logits, torch.tensor([0, 1, 0, -1], device=device))
    report = metrics.compute()
    assert (report.count, report.invalid) == (3, 0)
    assert report.accuracy == pytest.approx(200 / 3)
    assert report.topk_accuracy == 100
    assert report.per_class_accuracy[:2] == (50.0, 100.0)
    assert math.isnan(report.per_class_accuracy[2])
    assert report.perplexity == pytest.approx(math.exp(report.loss))
    metrics.reset()
    assert metrics.compute().count == 0
    assert MetricsAccumulator(3, per_class=False).compute().per_class_accuracy is None
    with pytest.raises(ValueError, match="num_classes: expected at least 1, got 0"):
        MetricsAccumulator(0)


def test_a_change_of_the_accumulator_is_seen_by_autograd(backend):
    weight, acc = torch.ones(FIELDS, dtype=torch.float64, requires_grad=True), empty(0)
    product = weight * acc  # saves acc
    classification_metrics_(acc, torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@needs_extension
def test_opcheck():
    for options in ({}, {"ignore_index": 1, "topk": 2}):
        labels = torch.tensor([0, 1, 2, 1])
        opcheck(torch.ops.tolaria.classification_metrics_, (empty(3), torch.randn(4, 3), labels), options)


@needs_extension
def test_compiles_without_a_graph_break():
    def step(acc, logits, labels):
        classification_metrics_(acc, logits * 2, labels)
        return acc + 0

    logits, labels, eager = torch.randn(5, 3), torch.randint(0, 3, (5,)), empty(3)
    step(eager, logits, labels)
    torch._dynamo.reset()
    traced = empty(3)
    torch.compile(step, fullgraph=True, backend="aot_eager")(traced, logits, labels)
    assert same_bits(eager, traced)
