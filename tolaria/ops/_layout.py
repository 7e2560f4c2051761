"""Where the bytes of a tensor are, and whether they can be copied without asking the tensor."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from tolaria.errors import SnapshotError

MAX_RUNS = 65536
"""Most contiguous pieces of one tensor: each is a row of a table."""


def live_view(tensor: Tensor) -> Tensor:
    """The distinct elements of ``tensor`` as they lie in memory: detached, without conjugate or negative bit.

    Dimensions expanded with stride 0 count once. Elements that overlap otherwise (the windows of ``unfold``)
    come as the one-dimensional stretch of memory that they fill.

    Args:
        tensor: any tensor that has memory of its own; one that is a lazy clone gets its own here.

    Returns:
        A view whose bytes are the tensor's, no byte twice; shares memory with ``tensor``.

    Raises:
        SnapshotError: there are no such bytes: a sparse, quantized, nested or lazy tensor, one without memory
            (meta, fake, functional, a ZeroTensor, a subclass that wraps others), one whose storage was shrunk
            below its size, or one that falls into too many pieces.
    """
    _check_has_bytes(tensor)
    view = tensor.detach()
    if view.is_conj():
        view = view.conj()  # of a conjugate: the elements as they are stored
    if view.is_neg():
        view = torch._neg_view(view)
    for dim, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True)):
        if stride == 0 and size > 1:
            view = view.narrow(dim, 0, 1)
    if view.numel() == 0:
        return view
    if view.data_ptr() != tensor.data_ptr():
        raise _refusal(f"a {type(tensor).__name__} whose detach() is other memory")
    view = _without_overlap(view)
    pieces = _number_of_runs(view)
    if pieces > MAX_RUNS:
        raise SnapshotError(
            f"a tensor of shape {tuple(view.shape)} with strides {view.stride()} falls into {pieces} "
            f"contiguous pieces, more than {MAX_RUNS}; make it contiguous before it is captured"
        )
    return view


def _refusal(got: str) -> SnapshotError:
    return SnapshotError(
        f"expected a dense tensor with memory of its own, got {got}; a snapshot copies bytes: replace it by "
        "an ordinary tensor, or keep it out of the model's parameters and buffers"
    )


def _check_has_bytes(tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise SnapshotError("expected an initialised tensor, got a lazy one; run one forward first")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise _refusal("a nested one" if tensor.is_nested else f"layout {tensor.layout}")
    if tensor.is_quantized:
        raise _refusal(f"a quantized one ({tensor.dtype})")
    if tensor.numel() == 0:
        return
    address, held = _memory_of(tensor)
    is_zero = tensor._is_zerotensor()
    if (address == 0 and held) or is_zero or torch._is_functional_tensor(tensor):
        kind = "ZeroTensor" if is_zero else type(tensor).__name__
        raise _refusal(f"a {kind} on {tensor.device} that has none")
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + extent + 1) * tensor.element_size()
    if needed > held:
        raise SnapshotError(
            f"expected a storage of at least {needed} bytes for shape {tuple(tensor.shape)}, got {held}: it "
            "was shrunk by untyped_storage().resize_(); give it its size back, or assign a new tensor"
        )


def _memory_of(tensor: Tensor) -> tuple[int, int]:
    """Address of the first element, and bytes of the storage; ``(0, 1)`` if it only stands for others."""
    try:
        # Mutable access: it also gives a lazy clone (copy on write) memory of its own, which may be written.
        if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
            return tensor.data_ptr(), tensor.untyped_storage().nbytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fake tensor warns of the question
            return tensor.data_ptr(), tensor.untyped_storage().nbytes()
    except RuntimeError:
        return 0, 1


def _without_overlap(view: Tensor) -> Tensor:
    """``view``, or the stretch that its elements fill where they share some of them."""
    extent = 1
    strided = sorted(
        (stride, size) for size, stride in zip(view.shape, view.stride(), strict=True) if size > 1
    )
    for stride, size in strided:
        if stride < extent:
            break
        extent += (size - 1) * stride
    else:
        return view
    places = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in strided:
        steps = torch.arange(size, dtype=torch.int64, device="cpu") * stride
        places = (places[:, None] + steps).flatten()
    span = int(places.max()) + 1
    filled = torch.zeros(span, dtype=torch.bool, device="cpu")
    filled[places] = True
    distinct = int(filled.sum())
    if distinct == view.numel():
        return view
    if distinct == span:
        return view.as_strided((span,), (1,), view.storage_offset())
    raise SnapshotError(
        f"a tensor of shape {tuple(view.shape)} with strides {view.stride()} has elements that overlap, with "
        "gaps between them; clone() it before it is captured"
    )


def _is_dense(view: Tensor) -> bool:
    """Whether the elements fill their span of memory without gap or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(view.stride(), view.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def slot_view(arena: Tensor, offset: int, live: Tensor) -> Tensor:
    """``live``'s place in a slot: same shape and dtype, same strides if it is dense, else contiguous."""
    span = arena[offset : offset + live.numel() * live.element_size()].view(live.dtype)
    if live.numel() and _is_dense(live):
        return span.as_strided(live.shape, live.stride())
    return span.view(live.shape)


def _inner_run(live: Tensor) -> tuple[int, int]:
    """How many leading dimensions are walked, and elements of the contiguous run at each of their places."""
    inner, run = live.dim(), 1
    while inner > 0 and (live.shape[inner - 1] == 1 or live.stride(inner - 1) == run):
        run *= live.shape[inner - 1]
        inner -= 1
    return inner, run


def _number_of_runs(live: Tensor) -> int:
    return 1 if _is_dense(live) else math.prod(live.shape[: _inner_run(live)[0]])


def runs(live: Tensor) -> Iterator[tuple[int, int, int]]:
    """``live``, a :func:`live_view`, as contiguous runs ``(address, offset in the slot, bytes)``."""
    item = live.element_size()
    if live.numel() == 0:
        return
    if _is_dense(live):
        yield live.data_ptr(), 0, live.numel() * item
        return
    inner, run = _inner_run(live)
    outer = [
        [i * stride for i in range(size)]
        for size, stride in zip(live.shape[:inner], live.stride()[:inner], strict=True)
    ]
    start = live.data_ptr()
    for number, offsets in enumerate(itertools.product(*outer)):
        yield start + sum(offsets) * item, number * run * item, run * item
