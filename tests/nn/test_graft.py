"""Slots on a user's own module: it stays what it is, its state_dict carries the seeds and regrows them."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from tolaria import (
    GovernorConfig,
    SeedSlot,
    SeedStage,
    TolariaGovernor,
    graft,
    train_epoch_blended,
    train_epoch_incubator_mode,
)

CE = nn.CrossEntropyLoss()


class Net(nn.Module):
    """A user's network, whose forward somebody inspects."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, pixel_values: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(torch.relu(self.mid(torch.relu(self.stem(pixel_values))))) * scale  # type: ignore[no-any-return]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 4, generator=draw), torch.randint(3, (16,), generator=draw)) for _ in range(count)
    ]


SLOTS = {"a": "stem", "b": "mid"}
EXAMPLE = torch.zeros(2, 4)


def grown() -> Net:
    """One seed is part of the network, one is half blended in, both have learnt."""
    host = net()
    handle = graft(host, SLOTS, example_input=EXAMPLE)
    handle.germinate("a", "dense", rng_seed=1, options={"expansion": 1.0})
    handle.germinate("b", "dense_low_rank", rng_seed=2)
    optimizers = AdamW(handle.host_parameters(), 1e-2), AdamW(handle.seed_parameters(), 1e-2)
    handle.incubate("a")
    handle.incubate("b")
    train_epoch_incubator_mode(host, batches(), CE, *optimizers, "cpu")
    handle.blend("a", 4)
    train_epoch_blended(host, batches(), CE, *optimizers, "cpu")
    handle.fossilize("a")
    handle.blend("b", 16)
    train_epoch_blended(host, batches(), CE, *optimizers, "cpu")
    return host


def test_host_stays_what_it_is() -> None:
    host = net()
    names, signature = [n for n, _ in host.named_parameters()], inspect.signature(host.forward)
    x = torch.randn(5, 4)
    before = host(x)
    handle = graft(host, SLOTS, example_input=EXAMPLE)
    assert type(host) is Net
    assert [n for n, _ in host.named_parameters()] == names
    assert inspect.signature(host.forward) == signature
    assert torch.equal(host(x), before)
    assert handle.host is host
    assert list(handle.slots) == ["a", "b"]
    assert torch.equal(handle(x, scale=2.0), before * 2.0)


def test_state_dict_carries_the_seeds_and_regrows_them() -> None:
    host = grown()
    file = io.BytesIO()
    torch.save(host.state_dict(), file)
    file.seek(0)
    other = net()
    handle = graft(other, SLOTS, example_input=EXAMPLE)
    assert other.load_state_dict(torch.load(file, weights_only=True))  # it says <All keys matched>
    x = torch.randn(5, 4)
    assert torch.equal(other(x), host(x))
    assert handle.slot("a").stage is SeedStage.FOSSILIZED
    assert handle.slot("b").stage is SeedStage.BLENDING
    assert handle.slot("b").schedule.position == 8  # type: ignore[union-attr]
    for model in (host, other):
        optimizer = AdamW(model.parameters(), 1e-2)
        train_epoch_blended(model, batches(), CE, optimizer, None, "cpu")
    assert torch.equal(other(x), host(x))


def test_loading_goes_back_and_forth() -> None:
    host = grown()
    handle, later = graft(host), copy.deepcopy(host.state_dict())
    seed = handle.slot("a").seed
    empty = graft(net(), SLOTS, example_input=EXAMPLE).host.state_dict()
    host.load_state_dict(later)
    assert handle.slot("a").seed is seed  # nothing to rebuild
    host.load_state_dict(empty)
    assert handle.slot("a").stage is handle.slot("b").stage is SeedStage.DORMANT
    assert [n for n, _ in host.named_parameters()] == [n for n, _ in net().named_parameters()]
    host.load_state_dict(later)
    assert all(torch.equal(v, later[k]) for k, v in host.state_dict().items())


def test_checkpoint_from_before_the_graft_is_taken() -> None:
    host, plain = net(), Net()
    graft(host, SLOTS, example_input=EXAMPLE)
    host.load_state_dict(plain.state_dict())
    x = torch.randn(3, 4)
    assert torch.equal(host(x), plain(x))


def test_seed_of_a_callable_is_loaded_in_its_place_and_not_rebuilt_elsewhere() -> None:
    host = net()
    handle = graft(host, {"a": "stem"}, example_input=EXAMPLE)
    handle.germinate("a", lambda f: nn.Linear(8, 8))
    handle.incubate("a")
    saved = copy.deepcopy(host.state_dict())
    handle.blend("a", 1).step()
    with torch.no_grad():
        handle.slot("a").seed.weight.zero_()  # type: ignore[union-attr,operator]
    host.load_state_dict(saved)
    assert handle.slot("a").stage is SeedStage.TRAINING
    assert torch.equal(handle.slot("a").seed.weight, saved["seed_slots.a.seed.weight"])  # type: ignore[union-attr]
    fresh = net()
    graft(fresh, {"a": "stem"}, example_input=EXAMPLE)
    with pytest.raises(ValueError, match=r"its seed was built by a callable; register a blueprint"):
        fresh.load_state_dict(saved)
    assert graft(fresh).slot("a").stage is SeedStage.DORMANT


def test_copy_of_a_host_grows_on_its_own() -> None:
    host = grown()
    twin = copy.deepcopy(host)
    graft(twin).cull("b")
    assert graft(host).slot("b").stage is SeedStage.BLENDING
    x = torch.randn(3, 4)
    assert not torch.equal(host(x), twin(x))
    twin.load_state_dict(host.state_dict())
    assert torch.equal(host(x), twin(x))


def test_governor_over_a_grafted_host_takes_its_seeds_back() -> None:
    host = net()
    handle = graft(host, SLOTS, example_input=EXAMPLE)
    optimizer = AdamW(host.parameters(), 1e-2)
    config = GovernorConfig(snapshot_interval=10_000, probation=1)
    governor = TolariaGovernor(host, optimizer, num_classes=3, config=config)
    handle.germinate("a", "dense")
    handle.incubate("a")
    seed = AdamW(handle.seed_parameters(), 1e-2)
    train_epoch_incubator_mode(host, batches(), CE, optimizer, seed, "cpu", governor=governor)
    governor.execute_rollback()
    assert handle.slot("a").stage is SeedStage.DORMANT
    assert torch.equal(host(EXAMPLE + 1), net()(EXAMPLE + 1))


class Taken(Net):
    def __init__(self) -> None:
        super().__init__()
        self.seed_slots = nn.Identity()


def test_bad_grafts_are_named() -> None:
    with pytest.raises(TypeError, match=r"graft: host: expected an nn\.Module, got int"):
        graft(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="path of a submodule of the host, got 'nowhere'"):
        graft(net(), {"a": "nowhere"})
    with pytest.raises(ValueError, match="at least one injection point"):
        graft(net())
    with pytest.raises(ValueError, match="without an attribute 'seed_slots'"):
        graft(Taken(), {"a": "stem"})
    with pytest.raises(ValueError, match="holds SeedSlot modules"):
        graft(nn.Sequential(nn.Linear(2, 2), SeedSlot("x")), {"a": "0"})
    host = net()
    graft(host, SLOTS)
    with pytest.raises(ValueError, match="grafted already"):
        graft(host, SLOTS)


@pytest.mark.parametrize("saved", [3, torch.zeros(4, dtype=torch.uint8), torch.tensor([300.5]), None])
def test_damaged_structure_is_named(saved: object) -> None:
    host = grown()
    state = {**host.state_dict(), "seed_slots._extra_state": saved}
    with pytest.raises((ValueError, RuntimeError), match="_extra_state"):
        graft(net(), SLOTS, example_input=EXAMPLE).host.load_state_dict(state)
