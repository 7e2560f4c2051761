"""Optimizer state that wraps tensors, as quantised moments do: those inside come back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tolaria import Snapshot, load_snapshot
from tolaria.errors import SnapshotError
from tolaria.governor import GovernorConfig, TolariaGovernor
from tolaria.governor.skipping import _Newborns
from tolaria.snapshot.plain_form import from_plain
from tolaria.snapshot.wrapped import inner_tensors

CONFIG = GovernorConfig(snapshot_interval=1000)


class Quantised(Tensor):
    """Numbers as codes of a lookup table, times a scale for each row; without memory of its own."""

    codes: Tensor
    scale: Tensor
    table: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, table: Tensor, bits: int = 8) -> Quantised:
        return Tensor._make_wrapper_subclass(cls, codes.shape, device=codes.device)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, codes: Tensor, scale: Tensor, table: Tensor, bits: int = 8) -> None:
        self.codes, self.scale, self.table, self.bits = codes, scale, table, bits

    def __tensor_flatten__(self) -> tuple[list[str], int]:
        return ["codes", "scale", "table"], self.bits

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], bits: int, size: Any, stride: Any) -> Quantised:
        return cls(inner["codes"], inner["scale"], inner["table"], bits)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale, args[0].table, args[0].bits)
        if func is torch.ops.aten.copy_.default:
            args[0].put(args[1])
            return args[0]
        if func is torch.ops.aten._to_copy.default and kwargs.keys() <= {"device", "dtype"}:
            return args[0]
        raise NotImplementedError(f"{func} on Quantised")

    def numbers(self) -> Tensor:
        return self.table[self.codes.long()] * self.scale

    def put(self, numbers: Tensor) -> None:
        self.scale.copy_(numbers.abs().amax(-1, keepdim=True).clamp(min=1e-12))
        self.codes.copy_(torch.bucketize(numbers / self.scale, self.table).clamp(max=255))


class Momentum(torch.optim.Optimizer):
    """SGD whose momentum is quantised; ``shares``: one table for all states, its own for each otherwise."""

    def __init__(self, params: Any, *, shares: bool = False, in_place: bool = True) -> None:
        super().__init__(params, {"lr": 0.05})
        self.table = torch.linspace(-1, 1, 256)
        self.shares, self.in_place = shares, in_place

    def born(self, p: Tensor) -> Quantised:
        self.table = self.table.to(p.device)
        table = self.table if self.shares else self.table.clone()
        return Quantised(torch.full_like(p, 128, dtype=torch.uint8), p.new_zeros(*p.shape[:-1], 1), table)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if not state:
                state["step"], state["momentum"] = torch.zeros(()), self.born(p)
            state["step"] += 1
            numbers = state["momentum"].numbers() * 0.9 + p.grad
            if not self.in_place:
                state["momentum"] = self.born(p)
            state["momentum"].put(numbers)
            p.add_(state["momentum"].numbers(), alpha=-0.05)


MAKERS: dict[str, Callable[[nn.Module], Momentum]] = {
    "own_tables": lambda m: Momentum(m.parameters()),
    "one_table": lambda m: Momentum(m.parameters(), shares=True),
    "new_at_every_step": lambda m: Momentum(m.parameters(), in_place=False),
}


def made(name: str, steps: int, device: str | torch.device = "cpu") -> tuple[nn.Module, Momentum]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(device)
    optimizer = MAKERS[name](model)
    train(model, optimizer, steps, seed=1)
    return model, optimizer


def train(model: nn.Module, optimizer: Momentum, steps: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        inputs = torch.randn(8, 4, generator=rng).to(model[0].weight.device)
        loss = model(inputs).square().mean()
        model.zero_grad()
        loss.backward()
        optimizer.step()


def states(optimizer: Momentum) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        for _, value in sorted(state.items()):
            yield from (inner for _, inner in inner_tensors(value))


def wreck(model: nn.Module, optimizer: Momentum) -> None:
    with torch.no_grad():
        for tensor in (*model.parameters(), *states(optimizer)):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)


def assert_same(mine: tuple[nn.Module, Momentum], other: tuple[nn.Module, Momentum]) -> None:
    a = [*mine[0].parameters(), *states(mine[1])]
    b = [*other[0].parameters(), *states(other[1])]
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def lose(optimizer: Momentum) -> None:
    optimizer.state.clear()


def replace(optimizer: Momentum) -> None:
    """The same state as another object, as ``load_state_dict`` leaves it."""
    table = optimizer.table.clone()
    for state in optimizer.state.values():
        old = state["momentum"]
        new = table if optimizer.shares else old.table.clone()
        state["momentum"] = Quantised(old.codes.clone(), old.scale.clone(), new)


def put_other_tensors_inside(optimizer: Momentum) -> None:
    for state in optimizer.state.values():
        state["momentum"].codes = state["momentum"].codes.clone()
        state["momentum"].scale = state["momentum"].scale.new_zeros(3)


def make_plain(optimizer: Momentum) -> None:
    for state in optimizer.state.values():
        state["momentum"] = state["momentum"].numbers()


def change_bits(optimizer: Momentum) -> None:
    for state in optimizer.state.values():
        old = state["momentum"]
        state["momentum"] = Quantised(old.codes, old.scale, old.table, bits=4)


TROUBLE = [lambda optimizer: None, lose, replace, put_other_tensors_inside, make_plain, change_bits]


@pytest.mark.parametrize("by_hand", [False, True], ids=["governor", "snapshot"])
@pytest.mark.parametrize("warm", [0, 5], ids=["fresh", "warm"])
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("trouble", TROUBLE, ids=lambda t: t.__name__.strip("<>"))
def test_training_goes_on_as_if_nothing_had_been(
    name: str, warm: int, by_hand: bool, trouble: Callable[[Momentum], None], device: torch.device
) -> None:
    mine, other = made(name, warm, device), made(name, warm, device)
    if by_hand:
        snapshot = Snapshot(*mine)
        snapshot.capture()
    else:
        governor = TolariaGovernor(*mine, config=CONFIG)
    for seed in (2, 3):
        train(*mine, 4, seed=seed)
        wreck(*mine)
        trouble(mine[1])
        snapshot.restore() if by_hand else governor.execute_rollback()
        assert_same(mine, other)
    assert all(s["momentum"].bits == 8 for s in mine[1].state.values())
    for each in (mine, other):
        train(*each, 6, seed=4)
    assert_same(mine, other)


def test_a_steady_restore_keeps_every_object_and_address() -> None:
    model, optimizer = made("own_tables", 3)
    governor = TolariaGovernor(model, optimizer, config=CONFIG)
    objects = [state["momentum"] for state in optimizer.state.values()]
    addresses = [t.data_ptr() for t in states(optimizer)]
    train(model, optimizer, 2, seed=2)
    governor.execute_rollback()
    assert all(s["momentum"] is o for s, o in zip(optimizer.state.values(), objects, strict=True))
    assert [t.data_ptr() for t in states(optimizer)] == addresses


def test_a_later_capture_sees_other_tensors_inside() -> None:
    model, optimizer = made("own_tables", 3)
    snapshot = Snapshot(model, optimizer)
    for seed in range(3):
        for state in optimizer.state.values():
            state["momentum"].codes = state["momentum"].codes.clone()
        train(model, optimizer, 1, seed=seed)
        snapshot.capture()
        kept = [t.clone() for t in states(optimizer)]
        wreck(model, optimizer)
        snapshot.restore()
        assert all(torch.equal(a, b) for a, b in zip(states(optimizer), kept, strict=True))


def test_a_nan_inside_is_found_and_named() -> None:
    model, optimizer = made("own_tables", 3)
    snapshot = Snapshot(model, optimizer)
    optimizer.state[model[0].weight]["momentum"].scale[0] = float("nan")
    snapshot.capture()
    assert snapshot.nonfinite == "optimizer[0].momentum(0.weight).scale"


def test_state_dict_holds_tensors_of_the_same_kind() -> None:
    model, optimizer = made("one_table", 3)
    snapshot = Snapshot(model, optimizer)
    snapshot.capture()
    kept = [t.clone() for t in states(optimizer)]
    train(model, optimizer, 2, seed=2)
    (saved,) = snapshot.state_dict()["optimizers"]
    found = [
        t for state in saved["state"].values() for _, v in sorted(state.items()) for _, t in inner_tensors(v)
    ]
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))
    assert type(saved["state"][0]["momentum"]) is Quantised


def test_it_goes_to_disk_and_comes_back(tmp_path: Path) -> None:
    mine, other = made("own_tables", 3), made("own_tables", 0)
    TolariaGovernor(*mine, config=CONFIG).save(tmp_path).result()
    governor = TolariaGovernor(*other, config=CONFIG)
    with pytest.raises(SnapshotError, match=r"the class .*Quantised, which is not among"):
        load_snapshot(tmp_path, governor)
    with torch.serialization.safe_globals([Quantised]):
        load_snapshot(tmp_path, governor)
    for each in (mine, other):
        train(*each, 4, seed=2)
    assert_same(mine, other)


def test_a_crafted_one_is_refused() -> None:
    name = f"{Quantised.__module__}.Quantised"
    with torch.serialization.safe_globals([Quantised, nn.Linear]):
        for inner in ([["codes", 3]], [["codes", {"$tensor": "gone"}]], 7):
            with pytest.raises(SnapshotError, match="damaged"):
                from_plain({"$wrapped": [name, inner, 8, [1], [1]]}, {})
        with pytest.raises(SnapshotError, match="not among"):
            from_plain({"$wrapped": ["torch.nn.modules.linear.Linear", [], 8, [1], [1]]}, {})


def test_a_first_step_that_is_left_out_leaves_nothing(device: torch.device) -> None:
    model, optimizer = made("own_tables", 0, device)
    config = GovernorConfig(snapshot_interval=4, skip_anomalous_steps=True)
    governor = TolariaGovernor(model, optimizer, config=config)
    for loss in (float("nan"), 1.0, 1.0):
        model(torch.ones(2, 4, device=device)).sum().mul(loss).backward()
        verdict = governor.check_vital_signs(torch.tensor(loss, device=device))
        optimizer.step()
        governor.step(verdict)
        model.zero_grad()
    governor.synchronize()
    tensors = [*model.parameters(), *states(optimizer)]
    assert all(bool(t.isfinite().all()) for t in tensors)


def test_what_an_undone_first_step_made_starts_at_zero() -> None:
    model, optimizer = made("one_table", 0)
    newborns = _Newborns(optimizer)
    newborns.before_step()
    train(model, optimizer, 1, seed=1)
    kept = [t.clone() for t in states(optimizer)]
    newborns.undo(torch.zeros(()))
    assert all(torch.equal(a, b) for a, b in zip(states(optimizer), kept, strict=True))
    newborns.undo(torch.ones(()))
    assert torch.equal(optimizer.table, torch.linspace(-1, 1, 256))
    assert all(bool((s["momentum"].numbers().abs() < 1e-9).all()) for s in optimizer.state.values())


def test_what_has_no_bytes_inside_is_refused_at_attach_by_name() -> None:
    model, optimizer = made("own_tables", 3)
    optimizer.state[model[0].weight]["momentum"].scale = torch.ones(3).to_sparse()
    for attach in (TolariaGovernor, Snapshot):
        with pytest.raises(SnapshotError, match=r"optimizer\[0\]\.momentum\(0\.weight\)\.scale: .*sparse"):
            attach(model, optimizer)
