"""Tensors that are not what they seem, as any argument of any op: right values, or an error that says so."""

import pytest
import torch
from strategies import same_bits

import tolaria
from tolaria import _extension
from tolaria.governor import GovernorConfig
from tolaria.ops import (
    blend,
    classification_metrics_,
    governor_mailbox,
    governor_state,
    governor_step_,
    seed_gate,
    straight_through,
    tensor_stats,
)
from tolaria.ops.governor import judge_

pytestmark = pytest.mark.filterwarnings("ignore:.*(sparse|Sparse|nested|prototype|quantized|COW).*")
needs_extension = pytest.mark.skipif(not _extension.LOADED, reason="needs the compiled extension")
SHAPE = (3, 2000)
ALPHA = torch.tensor(0.3)


class Unwrapped(torch.Tensor):
    """A subclass without memory of its own: it hands its inner tensor to every op."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def inner(x):
            return x.inner if isinstance(x, cls) else x

        return func(*torch.utils._pytree.tree_map(inner, args), **(kwargs or {}))


def pooled_lazy(x):
    """A lazy copy of memory from the pool of outputs."""
    large = straight_through(x.repeat(100, 1), x.repeat(100, 1))
    return torch._lazy_clone(large)[:3]


def resized(x, size):
    x = x.clone()
    x.untyped_storage().resize_(size)
    return x


# Kind: what makes it of a plain tensor, and its values.
RIGHT = {
    "zero tensor": lambda x: (torch._efficientzerotensor(x.shape, dtype=x.dtype), torch.zeros_like(x)),
    "neg bit": lambda x: (torch._neg_view(x), -x),
    "imaginary part of a conjugate": lambda x: (torch.complex(x, x).conj().imag, -x),
    "lazy copy": lambda x: (torch._lazy_clone(x), x),
    "lazy copy of pooled memory": lambda x: (pooled_lazy(x), x),
    "view that requires grad": lambda x: (x.clone().requires_grad_()[:], x),
    "parameter": lambda x: (torch.nn.Parameter(x), x),
    "subclass without memory": lambda x: (Unwrapped(x), x),
}
STRIDED, DTYPE, MEMORY = (
    "expected a strided tensor, got",
    "expected dtype .*got",
    "expected memory for its 6000",
)
WRONG = {
    "storage of 0 bytes": (lambda x: resized(x, 0), ValueError, MEMORY),
    "storage of 4 bytes": (lambda x: resized(x, 4), ValueError, MEMORY),
    "storage one byte short": (lambda x: resized(x, x.nbytes - 1), ValueError, MEMORY),
    "sparse": (torch.Tensor.to_sparse, TypeError, STRIDED),
    "sparse-csr": (torch.Tensor.to_sparse_csr, TypeError, STRIDED),
    "mkldnn": (torch.Tensor.to_mkldnn, TypeError, STRIDED),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), TypeError, STRIDED),
    "jagged": (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), TypeError, STRIDED),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), TypeError, DTYPE),
    "complex": (lambda x: torch.complex(x, x).conj(), TypeError, DTYPE),
}


def metrics(logits):
    acc = torch.zeros(5, dtype=torch.float64)
    classification_metrics_(acc, logits, torch.tensor([0, 1, 2]))
    return acc


# Every floating argument of every op, as a function of that argument; `x` is a plain tensor.
CALLS = {
    "blend: host": lambda odd, x: blend(odd, x, ALPHA),
    "blend: seed": lambda odd, x: blend(x, odd, ALPHA),
    "blend: alpha": lambda odd, x: blend(x, x + 1, odd),
    "seed_gate: features": lambda odd, x: seed_gate(odd, ALPHA),
    "seed_gate: alpha": lambda odd, x: seed_gate(x, odd),
    "straight_through: host": lambda odd, x: straight_through(odd, x),
    "straight_through: seed": lambda odd, x: straight_through(x, odd),
    r"tensor_stats: tensors\[1\]": lambda odd, x: tensor_stats([x, odd]),
    "classification_metrics_: logits": lambda odd, x: metrics(odd),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", RIGHT)
def test_values_are_seen_through_whatever_holds_them(backend, kind, call):
    x = torch.randn(SHAPE)
    odd, plain = RIGHT[kind](x.clone())
    found, wanted = (CALLS[call](t, x) for t in (odd, plain.clone()))
    assert same_bits(found.detach(), wanted)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", WRONG)
def test_what_has_no_such_values_is_named(backend, kind, call):
    make, error, words = WRONG[kind]
    x = torch.randn(SHAPE)
    with pytest.raises(error, match=rf"tolaria\.{call}: {words}"):
        CALLS[call](make(x.clone()), x)


class Hands(torch.autograd.Function):
    """Hands the gradient that ``make`` returns to what came before, with no other reference to it."""

    @staticmethod
    def forward(ctx, x, make):
        ctx.make = make
        return x.sum()

    @staticmethod
    def backward(ctx, _):
        return ctx.make(), None


BACKWARDS = {
    "blend_backward": lambda h, s: blend(h, s, torch.tensor(0.3)),
    "seed_gate_backward": lambda h, _: seed_gate(h, torch.tensor([[0.0], [0.5], [1.0]])),
}


@pytest.mark.parametrize("op", BACKWARDS)
@pytest.mark.parametrize("kind", [*[k for k in RIGHT if "subclass" not in k and "grad" not in k], "sparse"])
def test_gradients_of_any_kind_are_read_right(backend, op, kind):
    x = torch.randn(SHAPE)

    def make(plain):
        odd, values = (x.to_sparse(), x) if kind == "sparse" else RIGHT[kind](x.clone())
        return values.clone() if plain else odd.detach()

    inputs = [t.requires_grad_() for t in torch.randn(2, *SHAPE).unbind()]
    found, wanted = (
        torch.autograd.grad(
            Hands.apply(BACKWARDS[op](*inputs), lambda plain=plain: make(plain)), inputs, allow_unused=True
        )
        for plain in (False, True)
    )
    assert same_bits(found[0], wanted[0])
    assert op == "seed_gate_backward" or same_bits(found[1], wanted[1])


@pytest.mark.parametrize("op", BACKWARDS)
@pytest.mark.parametrize("size", [0, 4])
def test_gradient_without_memory_is_named(backend, op, size):
    inputs = [t.requires_grad_() for t in torch.randn(2, *SHAPE).unbind()]
    total = Hands.apply(BACKWARDS[op](*inputs), lambda: resized(torch.randn(SHAPE), size))
    with pytest.raises(ValueError, match=rf"tolaria\.{op}: grad: {MEMORY}"):
        total.backward()


@pytest.mark.parametrize("argument", ["acc", "labels"])
def test_metrics_without_memory_are_named(backend, argument):
    tensors = {"acc": torch.zeros(5, dtype=torch.float64), "labels": torch.tensor([0, 1, 2])}
    tensors[argument] = resized(tensors[argument], 8)
    with pytest.raises(ValueError, match=rf"tolaria\.classification_metrics_: {argument}: expected memory"):
        classification_metrics_(tensors["acc"], torch.randn(3, 4), tensors["labels"])


def test_metrics_are_written_through_a_neg_bit_and_a_lazy_copy(backend):
    logits, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    plain, base = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    classification_metrics_(plain, logits, labels)
    classification_metrics_(torch._neg_view(base), logits, labels)
    assert same_bits(-base + 0.0, plain)
    lazy = torch._lazy_clone(torch.zeros(5, dtype=torch.float64))
    classification_metrics_(lazy, logits, labels)
    assert same_bits(lazy, plain)


@pytest.mark.parametrize("kind", [kind for kind in RIGHT if "grad" not in kind])
@pytest.mark.parametrize("short", [False, True], ids=["op", "shortest way"])
def test_judge_sees_the_values(backend, kind, short):
    if kind == "lazy copy of pooled memory":
        pytest.skip("a loss is never that large")
    config = GovernorConfig().to_tensor(2.3, "cpu")
    rows = []
    for plain in (False, True):
        state, mailbox = governor_state(1), governor_mailbox(1)
        for number in range(3):
            odd, values = RIGHT[kind](torch.tensor([0.5 + number]))
            loss = values.clone() if plain else odd
            if short:
                judge_(state, config, loss, None, mailbox, None, 0, [], [])
            else:
                governor_step_(state, config, loss, None, None, mailbox, None)
        rows.append(state.view(torch.int64))
    assert torch.equal(*rows)


def test_meta_tensors_have_shapes_alone(backend):
    x, alpha = torch.empty(SHAPE, device="meta"), torch.tensor(0.3, device="meta")
    for out in (blend(x, x, alpha), seed_gate(x, alpha), straight_through(x, x)):
        assert out.is_meta
        assert out.shape == SHAPE
    acc, labels = (
        torch.zeros(5, dtype=torch.float64, device="meta"),
        torch.zeros(3, dtype=torch.long).to("meta"),
    )
    if backend == "fused":
        assert tensor_stats([x]).shape == (4,)
        classification_metrics_(acc, x, labels)
        with pytest.raises(ValueError, match="labels: expected shape"):
            classification_metrics_(acc, x, labels[:2])


@needs_extension
def test_transforms_are_not_asked_for_memory():
    """vmap's and grad's wrappers have none; the reference takes them as they are."""
    x, y = torch.randn(2, 4, 5)
    with tolaria.backend("reference"):
        wanted = blend(x, y, ALPHA)
    assert torch.equal(torch.vmap(lambda a, b: torch.ops.tolaria.blend(a, b, ALPHA))(x, y), wanted)
