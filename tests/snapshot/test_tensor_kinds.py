"""Every kind of tensor that may stand in a model: captured and put back bit for bit, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import tolaria
from tolaria import _extension
from tolaria.errors import SnapshotError, UncoveredWarning
from tolaria.governor import GovernorConfig, PanicReason, TolariaGovernor
from tolaria.ops._layout import MAX_RUNS

Make = Callable[[torch.device], Tensor]


def attach(model: nn.Module) -> TolariaGovernor:
    config = GovernorConfig(snapshot_interval=1000, probation=1)
    return TolariaGovernor(model, torch.optim.SGD(model.parameters(), lr=0.1), config=config)


def promote(governor: TolariaGovernor) -> None:
    """Make the state of now the last known good one."""
    governor.snapshot()
    governor.step(1.0)
    governor.synchronize()


def elements(tensor: Tensor) -> Tensor:
    """Its values, as bytes of a tensor that is laid out plainly."""
    plain = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.view(-1).view(torch.uint8).cpu()


def randoms(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(device, dtype)


COVERED: dict[str, Make] = {
    "zero_dim": lambda d: randoms(device=d),
    "empty": lambda d: randoms(3, 0, device=d),
    "empty_of_odd_strides": lambda d: randoms(8, device=d).as_strided((0, 3), (5, 2)),
    "int": lambda d: torch.arange(7, device=d),
    "bool": lambda d: torch.tensor([True, False], device=d),
    "float8": lambda d: torch.arange(6.0, device=d).to(torch.float8_e4m3fn),
    "complex": lambda d: randoms(5, device=d, dtype=torch.complex64),
    "conj": lambda d: randoms(5, device=d, dtype=torch.complex64).conj(),
    "neg": lambda d: randoms(5, device=d, dtype=torch.complex64).conj().imag,
    "one_neg": lambda d: randoms(1, device=d, dtype=torch.complex64).conj().imag,
    "double_conj": lambda d: randoms(4, 4, device=d, dtype=torch.complex128).conj().t(),
    "column": lambda d: randoms(9, 2, device=d)[:, 0],
    "reversed_dims": lambda d: randoms(3, 4, 5, device=d).permute(2, 0, 1),
    "expanded": lambda d: randoms(4, 1, device=d).expand(4, 3),
    "windows": lambda d: randoms(9, device=d).unfold(0, 4, 1),
    "windows_2d": lambda d: randoms(6, 6, device=d).unfold(0, 3, 1).unfold(1, 2, 2),
    "interleaved": lambda d: randoms(8, device=d).as_strided((2, 3), (3, 2)),
    "offset": lambda d: randoms(9, device=d)[1:],
    "inference": lambda d: inference_tensor(d),
    "lazy_clone": lambda d: torch._lazy_clone(randoms(5, device=d)),
}


def inference_tensor(device: torch.device) -> Tensor:
    with torch.inference_mode():
        return randoms(5, device=device)


def scribble(tensor: Tensor) -> None:
    """Other bytes everywhere."""
    with torch.inference_mode():
        raw = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        raw.copy_(torch.randint(0, 60, raw.shape).to(raw))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("later", [False, True], ids=["attach", "later"])
@pytest.mark.parametrize("make", COVERED.values(), ids=COVERED.keys())
def test_covered_bit_for_bit(make: Make, later: bool, backend: str, device: torch.device) -> None:
    if backend == "reference" and device.type == "cuda":
        pytest.skip("one reference is enough")
    with tolaria.backend(backend):
        model, tensor = nn.Linear(2, 2).to(device), make(device)
        form = (tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
        if not later:
            model.register_buffer("odd", tensor)
        governor = attach(model)
        if later:
            model.register_buffer("odd", tensor)
            governor.notify_structure_changed()
        at_birth, address = elements(tensor), tensor.data_ptr()
        for capture in (False, True):
            scribble(tensor)
            captured = elements(tensor) if capture else at_birth
            if capture:
                promote(governor)
                scribble(tensor)
            governor.execute_rollback()
            assert model.odd is tensor
            assert torch.equal(elements(tensor), captured)
            assert tensor.data_ptr() == address
            now = (tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
            assert now == form


@pytest.mark.parametrize(
    "make", [COVERED["conj"], COVERED["neg"], COVERED["windows"]], ids=["conj", "neg", "windows"]
)
def test_dropped_one_comes_back_in_its_form(make: Make, device: torch.device) -> None:
    model = nn.Linear(2, 2).to(device)
    model.register_buffer("odd", make(device))
    kept, form = elements(model.odd), (model.odd.stride(), model.odd.is_conj(), model.odd.is_neg())
    governor = attach(model)
    for _ in range(2):
        model.odd = None
        governor.execute_rollback()
        assert torch.equal(elements(model.odd), kept)
        assert (model.odd.stride(), model.odd.is_conj(), model.odd.is_neg()) == form


@pytest.mark.parametrize("bit", ["conj", "neg"])
def test_moments_of_a_parameter_with_a_bit(bit: str, device: torch.device) -> None:
    """What an optimizer's state was before the first step is 0, or what it says, whatever the bits."""
    whole = randoms(6, device=device, dtype=torch.complex64).conj()
    parameter = nn.Parameter(whole.imag if bit == "neg" else whole, requires_grad=False)
    optimizer = torch.optim.Adagrad([parameter], initial_accumulator_value=0.25)
    del optimizer.state[parameter]["sum"]
    model = nn.Module()
    model.p = parameter
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(snapshot_interval=1000, probation=1))
    moment = torch.full_like(whole, 7.0).conj()
    optimizer.state[parameter]["sum"] = moment.imag if bit == "neg" else moment
    governor.notify_structure_changed()
    place = next(p for p in governor._engine.slots.places.values() if "sum" in p.name)
    governor.synchronize()
    for slot in place.slots:
        logical = torch._neg_view(slot) if bit == "neg" else slot.conj()
        assert bool((logical == 0.25).all())


def fake(device: torch.device) -> Tensor:
    return FakeTensorMode().from_tensor(torch.ones(3, device=device))


def shrunk(device: torch.device) -> Tensor:
    tensor = torch.ones(64, device=device)
    tensor.untyped_storage().resize_(16)
    return tensor


def emptied(device: torch.device) -> Tensor:
    tensor = torch.ones(64, device=device)
    tensor.untyped_storage().resize_(0)
    return tensor


REFUSED: dict[str, tuple[Make, str]] = {
    "zero_tensor": (lambda d: torch._efficientzerotensor(4, device=d), "ZeroTensor"),
    "wrapper": (lambda d: TwoTensor(torch.ones(2, device=d), torch.ones(2, device=d)), "TwoTensor"),
    "fake": (fake, "FakeTensor"),
    "functional": (lambda d: torch._to_functional_tensor(torch.ones(3, device=d)), "memory of its own"),
    "shrunk": (shrunk, r"storage of at least 256 bytes.*got 16"),
    "emptied": (emptied, r"storage of at least 256 bytes.*got 0"),
    "gaps": (lambda d: torch.ones(9, device=d).as_strided((3, 3), (2, 2)), "overlap, with gaps"),
    "pieces": (lambda d: torch.ones(MAX_RUNS + 1, 2, device=d)[:, 0], "contiguous pieces"),
    "coo": (lambda d: torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
    "csr": (lambda d: torch.eye(3).to_sparse_csr(), "layout torch.sparse_csr"),
    "mkldnn": (lambda d: torch.eye(3).to_mkldnn(), "layout torch._mkldnn"),
    "quantized": (lambda d: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8), "quantized"),
    "nested": (lambda d: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    "jagged": (
        lambda d: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "nested",
    ),
}
ON_CPU = {"coo", "csr", "mkldnn", "quantized", "nested", "jagged"}


@pytest.mark.parametrize("later", [False, True], ids=["attach", "later"])
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support",
    "ignore:The PyTorch API of nested tensors",
    "ignore:torch.quantize_per_tensor",
)
def test_refused_by_name_with_nothing_half_done(kind: str, later: bool, device: torch.device) -> None:
    if device.type == "cuda" and kind in ON_CPU:
        pytest.skip("the virtual device has no such tensors")
    make, why = REFUSED[kind]
    model, odd = nn.Linear(2, 2).to(device), make(device)
    if kind == "zero_tensor" and not odd._is_zerotensor():
        pytest.skip("the virtual device makes it an ordinary one")
    if not later:
        model.register_buffer("odd", odd)
        with pytest.raises(SnapshotError, match=rf"^odd: .*{why}"):
            attach(model)
        return
    governor = attach(model)
    kept = elements(model.weight)
    slots, table = governor._engine.slots, governor._engine.slots.table.data.clone()
    model.register_buffer("odd", odd)
    for call in (governor.notify_structure_changed, governor.snapshot, governor.reset):
        with pytest.raises(SnapshotError, match=rf"^odd: .*{why}"):
            call()
        assert slots.names == ("weight", "bias")
        assert torch.equal(slots.table.data, table)
    with torch.no_grad():
        model.weight.fill_(9.0)
    governor.execute_rollback()
    assert torch.equal(elements(model.weight), kept)
    assert model.odd is odd
    model.odd = torch.ones(3, device=device)
    promote(governor)
    model.odd.fill_(2.0)
    governor.execute_rollback()
    assert bool((model.odd == 1).all())


def test_a_rollback_at_the_first_sight_of_what_it_cannot_cover_says_so(device: torch.device) -> None:
    model = nn.Linear(2, 2).to(device)
    governor = attach(model)
    kept = elements(model.weight)
    with torch.no_grad():
        model.weight.fill_(9.0)
    model.register_buffer("odd", fake(device))
    with pytest.warns(UncoveredWarning, match="odd: .*FakeTensor"):
        governor.execute_rollback()
    assert torch.equal(elements(model.weight), kept)
    governor.execute_rollback()  # said once
    with pytest.raises(SnapshotError, match="odd"):
        governor.snapshot()


def test_lazy_tensor_that_joins_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    governor = attach(model)
    model.append(nn.LazyLinear(3))
    with pytest.raises(SnapshotError, match=r"^1\.weight .*run one forward first"):
        governor.notify_structure_changed()
    governor.execute_rollback()
    model(torch.ones(1, 2))
    promote(governor)


def shrink(p: nn.Parameter) -> None:
    p.untyped_storage().resize_(8)


def empty_storage(p: nn.Parameter) -> None:
    p.untyped_storage().resize_(0)


def empty_and_refill(p: nn.Parameter) -> None:
    nbytes = p.untyped_storage().nbytes()
    p.untyped_storage().resize_(0)
    p.untyped_storage().resize_(nbytes)
    with torch.no_grad():
        p.fill_(5.0)


def enlarge(p: nn.Parameter) -> None:
    p.untyped_storage().resize_(1 << 16)
    with torch.no_grad():
        p.fill_(5.0)


def set_to(p: nn.Parameter) -> None:
    with torch.no_grad():
        p.set_(torch.full((64, 64), 5.0, device=p.device))  # type: ignore[call-overload]


def assign_data(p: nn.Parameter) -> None:
    p.data = torch.full((64, 64), 5.0, device=p.device)


def assign_transposed_data(p: nn.Parameter) -> None:
    p.data = torch.full((64, 64), 5.0, device=p.device).t()


def swap(p: nn.Parameter) -> None:
    torch.utils.swap_tensors(p, nn.Parameter(torch.full((64, 64), 5.0, device=p.device)))


def swap_for_another_shape(p: nn.Parameter) -> None:
    torch.utils.swap_tensors(p, nn.Parameter(torch.full((7,), 5.0, device=p.device)))


def swap_for_sparse(p: nn.Parameter) -> None:
    torch.utils.swap_tensors(p, nn.Parameter(torch.eye(64).to_sparse(), requires_grad=False))


def clone_lazily(p: nn.Parameter) -> None:
    p.lazy = torch._lazy_clone(p.detach())  # type: ignore[attr-defined]


WRECKS = [
    shrink,
    empty_storage,
    empty_and_refill,
    enlarge,
    set_to,
    assign_data,
    assign_transposed_data,
    swap,
    swap_for_another_shape,
    swap_for_sparse,
    clone_lazily,
]


@pytest.mark.parametrize("looked", [False, True], ids=["unseen", "seen"])
@pytest.mark.parametrize("wreck", WRECKS, ids=lambda f: f.__name__)
def test_covered_tensor_whose_memory_goes_away(
    wreck: Callable[[nn.Parameter], None], looked: bool, device: torch.device
) -> None:
    """A rollback gives it its bytes; no memory but its own is written, whenever the change is noticed."""
    if device.type == "cuda" and wreck is swap_for_sparse:
        pytest.skip("the virtual device has no such tensors")
    model = nn.Linear(64, 64).to(device)
    governor = attach(model)
    kept, bias = elements(model.weight), elements(model.bias)
    parameter = model.weight
    wreck(parameter)
    refused = wreck in (shrink, empty_storage, swap_for_sparse)
    if looked and refused:
        with pytest.raises(SnapshotError, match=r"^weight: "):
            governor.notify_structure_changed()
    elif looked:
        governor.notify_structure_changed()
    lazy = getattr(parameter, "lazy", torch.zeros(1, device=device)) + 0
    strangers = [torch.zeros(64, 64, device=device) for _ in range(8)]  # may lie where the weight was
    with torch.no_grad():
        model.bias.fill_(3.0)
    for _ in range(2):
        governor.execute_rollback()
        assert torch.equal(elements(model.weight), kept)
        assert torch.equal(elements(model.bias), bias)
        assert not any(bool(stranger.any()) for stranger in strangers)
        assert wreck is swap_for_sparse or model.weight is parameter
    assert torch.equal(getattr(parameter, "lazy", torch.zeros(1, device=device)), lazy)
    promote(governor)


def test_lazy_clone_of_a_covered_tensor_keeps_its_values(device: torch.device) -> None:
    """Both share memory until one is written; a capture or rollback writes to the covered one alone."""
    model = nn.Linear(32, 32).to(device)
    governor = attach(model)
    kept = elements(model.weight)
    with torch.no_grad():
        model.weight.fill_(7.0)
    twin = torch._lazy_clone(model.weight.detach())
    governor.execute_rollback()
    assert torch.equal(elements(model.weight), kept)
    assert bool((twin == 7.0).all())
    twin.fill_(math.nan)
    promote(governor)
    assert governor.last_report is not None
    assert governor.last_report.reason is PanicReason.MANUAL
    assert torch.equal(elements(model.weight), kept)


@pytest.mark.parametrize("later", [False, True], ids=["attach", "later"])
@pytest.mark.parametrize("cut", [slice(0, 4), slice(3, 8), slice(0, 8, 2), slice(0, 8)], ids=str)
def test_views_registered_beside_their_base(cut: slice, later: bool, device: torch.device) -> None:
    """A view that joins later shares what the captures hold of its bytes; neither undoes the other."""
    model = nn.Linear(8, 8).to(device)
    if not later:
        model.register_buffer("part", model.weight.detach()[cut])
        model.register_buffer("corner", model.weight.detach().view(-1)[5:40])
    governor = attach(model)
    kept = elements(model.weight)
    with torch.no_grad():
        model.weight.mul_(3.0)
    if later:
        model.register_buffer("part", model.weight.detach()[cut])
        model.register_buffer("corner", model.weight.detach().view(-1)[5:40])
        model.register_buffer("seen", model.weight[cut])  # not even a leaf
    for _ in range(2):
        governor.execute_rollback()
        assert torch.equal(elements(model.weight), kept)
        assert torch.equal(elements(model.part), elements(model.weight[cut]))
        with torch.no_grad():
            model.weight.fill_(11.0)
    promote(governor)
    model.part.zero_()
    governor.execute_rollback()
    assert bool((model.weight == 11.0).all())


def test_buffer_that_comes_back_after_a_capture_without_it_has_its_birth_value(device: torch.device) -> None:
    model = nn.Linear(2, 2).to(device)
    model.register_buffer("seen", torch.ones(3, device=device))
    governor = attach(model)
    model.seen = None
    promote(governor)
    promote(governor)
    model.seen = torch.full((3,), 2.0, device=device)
    governor.notify_structure_changed()
    model.seen.fill_(5.0)
    governor.execute_rollback()
    assert bool((model.seen == 2).all())


def test_slots_do_not_grow_with_seeds_of_every_size(device: torch.device) -> None:
    model = nn.ModuleList([nn.Linear(2, 2)]).to(device)
    governor = attach(model)
    slots = governor._engine.slots
    base = slots.nbytes
    for width in [*range(1, 60), *range(60, 0, -7)]:
        model.append(nn.Linear(width, width, device=device))
        promote(governor)
        del model[1]
        promote(governor)
        promote(governor)
        largest = 2 * 4 * (60 * 60 + 60) + 2 * 512
        assert slots.nbytes - base <= (2 if device.type == "cpu" else 5) * largest
    if device.type == "cpu":
        governor.notify_structure_changed()
        promote(governor)
        assert slots.nbytes <= base + 2 * 1024


@pytest.mark.skipif(not _extension.LOADED, reason="compares with the compiled extension")
def test_rows_of_a_table_tile_each_slot_once() -> None:
    model = nn.Linear(4, 4)
    for name, make in COVERED.items():
        model.register_buffer(name, make(torch.device("cpu")))
    slots = attach(model)._engine.slots
    count = int(slots.table.data[0, 1])
    rows = slots.table.data[1 : 1 + count]
    for side in (1, 2):
        taken = sorted((int(row[side]), int(row[3])) for row in rows)
        for (start, nbytes), (after, _) in pairwise(taken):
            assert start + nbytes <= after
