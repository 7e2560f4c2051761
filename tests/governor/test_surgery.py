"""Surgery between a capture and a rollback: every object gets its own bytes, and its place if it lost it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import tolaria
from tolaria.governor import GovernorConfig, TolariaGovernor


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.rnn = nn.LSTM(4, 4, batch_first=True)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.relu(block(x))
        x = self.rnn(x.unsqueeze(1))[0][:, -1]
        return self.head(self.norm(x))


class Surgeon:
    """A model with a capture behind it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        config = GovernorConfig(snapshot_interval=1000)
        self.governor = TolariaGovernor(self.model, self.optimizer, config=config)
        self.train(4)
        self.governor.reset()
        self.objects = dict(self.model.named_parameters())
        self.values = {name: p.detach().clone() for name, p in self.objects.items()}
        self.buffers = {name: b.detach().clone() for name, b in self.model.named_buffers()}
        self.moments = {
            name: {k: copy.deepcopy(v) for k, v in self.optimizer.state[p].items()}
            for name, p in self.objects.items()
        }
        self.x = torch.randn(8, 4)
        self.output = self.run()

    def run(self) -> Tensor:
        self.model.eval()
        with torch.no_grad():
            output: Tensor = self.model(self.x)
        self.model.train()
        return output

    def train(self, steps: int, *, poison: bool = False) -> None:
        for _ in range(steps):
            loss = nn.functional.cross_entropy(self.model(torch.randn(8, 4)), torch.randint(2, (8,)))
            loss = loss * float("nan") if poison else loss
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.governor.step(loss)

    def assert_restored(self) -> None:
        """Every object of the capture has its bytes, its moments and its place in the optimizer."""
        held = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        for name, p in self.objects.items():
            assert torch.equal(p, self.values[name]), name
            assert held.count(id(p)) == 1, name
            for key, value in self.moments[name].items():
                assert torch.equal(self.optimizer.state[p][key], value), (name, key)

    def assert_trains(self) -> None:
        """Everything that the model uses moves, and the loss is finite."""
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.train(3)
        still = [name for name, p in self.model.named_parameters() if torch.equal(p, before[name])]
        assert not still
        assert all(bool(torch.isfinite(p).all()) for p in self.model.parameters())


def insert_block(net: Net) -> None:
    net.blocks.insert(0, nn.Linear(4, 4))


def reverse_blocks(net: Net) -> None:
    net.blocks = nn.ModuleList(reversed(list(net.blocks)))


def wrap_block(net: Net) -> None:
    net.blocks[1] = nn.Sequential(net.blocks[1], nn.Identity())


def compile_block(net: Net) -> None:
    net.blocks[0] = torch.compile(net.blocks[0], backend="eager")


def prune_head(net: Net) -> None:
    prune.l1_unstructured(net.head, "weight", amount=0.25)  # type: ignore[no-untyped-call]


def spectral(net: Net) -> None:
    parametrizations.spectral_norm(net.head)


MOVED = [insert_block, reverse_blocks, wrap_block, compile_block, prune_head, spectral]


@pytest.mark.parametrize("surgery", MOVED, ids=lambda f: f.__name__)
def test_what_was_moved_gets_its_own_bytes(surgery: Callable[[Net], None]) -> None:
    run = Surgeon()
    surgery(run.model)
    shape = [type(m) for m in run.model.modules()]
    run.train(1, poison=True)
    assert run.governor.rollback_count == 1
    run.assert_restored()
    assert [type(m) for m in run.model.modules()] == shape, "the surgery stays"
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())


def test_a_block_that_was_inserted_keeps_its_birth_value() -> None:
    run = Surgeon()
    new = nn.Linear(4, 4)
    born = copy.deepcopy(new.state_dict())
    run.model.blocks.insert(0, new)
    run.optimizer.add_param_group({"params": list(new.parameters())})
    run.train(1, poison=True)  # the first step that it takes is the bad one
    run.assert_restored()
    for name, value in new.state_dict().items():
        assert torch.equal(value, born[name])
    run.assert_trains()


def remove_block(net: Net) -> None:
    del net.blocks[1]


def replace_head(net: Net) -> None:
    net.head = nn.Linear(4, 2)


def replace_by_other_kind(net: Net) -> None:
    net.head = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def assign(net: Net) -> None:
    net.load_state_dict(
        {k: torch.randn_like(v.float()).to(v.dtype) for k, v in net.state_dict().items()}, assign=True
    )


def own_parameters(net: Net) -> None:
    net.head.weight = nn.Parameter(torch.randn(2, 4))
    net.norm.register_parameter("weight", nn.Parameter(torch.randn(4)))


def old_weight_norm(net: Net) -> None:
    nn.utils.weight_norm(net.head)


def drop_norm(net: Net) -> None:
    net.norm = nn.Identity()


LOST = [remove_block, replace_head, replace_by_other_kind, assign, own_parameters, old_weight_norm, drop_norm]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("surgery", LOST, ids=lambda f: f.__name__)
def test_what_was_lost_comes_back_with_its_module(surgery: Callable[[Net], None]) -> None:
    run = Surgeon()
    surgery(run.model)
    run.train(1, poison=True)
    assert run.governor.rollback_count == 1
    run.assert_restored()
    assert dict(run.model.named_parameters()).keys() == run.objects.keys()
    assert all(p is run.objects[name] for name, p in run.model.named_parameters())
    for name, buffer in run.model.named_buffers():
        assert torch.equal(buffer, run.buffers[name]), name
    assert torch.equal(run.run(), run.output)
    run.assert_trains()


def unprune(run: Surgeon) -> None:
    prune.remove(run.model.head, "weight")  # type: ignore[no-untyped-call]


def unparametrize(run: Surgeon) -> None:
    parametrize.remove_parametrizations(run.model.head, "weight")


@pytest.mark.parametrize(("before", "after"), [(prune_head, unprune), (spectral, unparametrize)])
def test_a_parametrization_taken_away_comes_back(
    before: Callable[[Net], None], after: Callable[[Surgeon], None]
) -> None:
    run = Surgeon()
    before(run.model)
    run.train(1)
    run.governor.reset()
    run.objects = dict(run.model.named_parameters())
    run.values = {name: p.detach().clone() for name, p in run.objects.items()}
    kind, output = type(run.model.head), run.run()
    after(run)
    run.train(1, poison=True)
    assert all(torch.equal(p, run.values[name]) for name, p in run.model.named_parameters())
    assert type(run.model.head) is kind
    assert torch.equal(run.run(), output)
    run.assert_trains()


def test_a_tie_that_was_cut_stays_cut_and_one_that_was_made_stays_made() -> None:
    run = Surgeon()
    run.model.blocks[0].weight = run.model.blocks[1].weight
    run.train(1, poison=True)
    tied = run.model.blocks[1].weight
    assert torch.equal(tied, run.values["blocks.1.weight"])
    assert torch.isfinite(run.model.blocks[0].weight).all()


def test_groups_are_known_by_their_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    groups = [{"params": list(m.parameters()), "lr": 0.1 * (i + 1)} for i, m in enumerate(model)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(snapshot_interval=1000))

    def live() -> list[dict[str, Any]]:
        return optimizer.param_groups

    def rates() -> dict[int, float]:
        return {id(p): group["lr"] for group in live() for p in group["params"]}

    captured, order = rates(), [[id(p) for p in group["params"]] for group in live()]
    surgeries: list[Callable[[], Any]] = [
        lambda: live().reverse(),
        lambda: live().pop(1),
        lambda: live().clear(),
        lambda: live()[0]["params"].append(live().pop(2)["params"][0]),
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
        lambda: live()[1].update(params=live()[1]["params"][:1]),
    ]
    for surgery in surgeries:
        surgery()
        for group in live():
            group["lr"] = 7.0
        seen = live()
        governor.execute_rollback()
        assert live() is seen
        assert rates() == captured
        assert [[id(p) for p in group["params"]] for group in live()] == order


def test_layers_replaced_with_their_optimizer_stay() -> None:
    """Their optimizer was taken away: nobody would train the old ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(snapshot_interval=1000))
    model[0], model[2] = nn.Linear(4, 16), nn.Linear(16, 2)
    born = [p.detach().clone() for p in model.parameters()]
    wider = torch.optim.AdamW(model.parameters())
    governor.add_optimizer(wider)
    governor.remove_optimizer(optimizer)
    for step in range(4):
        loss = model(torch.randn(8, 4)).square().mean() * (float("nan") if step == 2 else 1.0)
        wider.zero_grad()
        loss.backward()
        wider.step()
        governor.step(loss)
        if step == 2:
            assert all(torch.equal(p, b) for p, b in zip(model.parameters(), born, strict=True))
    assert governor.rollback_count == 1


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_graph_from_before_a_rollback_is_refused(backend: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    with tolaria.backend(backend):
        governor = TolariaGovernor(model, torch.optim.SGD(model.parameters(), lr=0.1))
        before: Tensor = model(torch.randn(3, 4)).square().sum()
        governor.execute_rollback()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            before.backward()
        model(torch.randn(3, 4)).square().sum().backward()
