"""Optimizers over covered parameters that nobody handed over: named once; all others: not a word."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from tolaria import MorphogeneticModel, train_epoch_blended, train_epoch_normal
from tolaria.errors import UncoveredWarning
from tolaria.governor import GovernorBank, GovernorConfig, TolariaGovernor

pytestmark = pytest.mark.filterwarnings("error")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def step(model: nn.Module, *optimizers: Any) -> Tensor:
    loss = model(torch.ones(2, 3)).square().mean()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss


def test_an_untold_optimizer_is_named_once_with_its_parameters() -> None:
    model = net()
    head = AdamW(model[2].parameters())
    governor = TolariaGovernor(model, SGD(model[0].parameters(), lr=0.1))
    with pytest.warns(UncoveredWarning, match=r"AdamW\) steps over 2.weight and 1 more.*add_optimizer"):
        step(model, head)
    step(model, head)
    governor.add_optimizer(head)
    step(model, head)


def test_an_untold_optimizer_of_an_extra_is_named() -> None:
    model, critic = net(), net()
    optimizer, other = SGD(model.parameters(), lr=0.1), AdamW(critic.parameters())
    governor = TolariaGovernor(model, optimizer, extras={"critic": critic})
    with pytest.warns(UncoveredWarning, match=r"AdamW\) steps over critic\.0\.weight and 3 more"):
        governor.step(step(critic, other))


def test_one_that_replaces_another_in_mid_run_is_named() -> None:
    model = net()
    first = SGD(model.parameters(), lr=0.1)
    governor = TolariaGovernor(model, first)
    governor.step(step(model, first))
    second = Adam(model.parameters())
    with pytest.warns(UncoveredWarning, match="Adam"):
        governor.step(step(model, second))


def test_a_row_of_a_bank_is_watched_until_it_is_detached() -> None:
    bank = GovernorBank(2, config=GovernorConfig())
    model = net()
    bank.attach(1, model, SGD(model.parameters(), lr=0.1))
    with pytest.warns(UncoveredWarning):
        step(model, Adam(model.parameters()))
    bank.detach(1)
    step(model, Adam(model.parameters()))


def test_parameters_that_join_later_are_watched() -> None:
    model, late = net(), nn.Linear(4, 2)
    optimizer, theirs = SGD(model.parameters(), lr=0.1), Adam(late.parameters())
    governor = TolariaGovernor(model, optimizer)
    theirs.step()
    model[2] = late
    governor.step(1.0)
    governor.notify_structure_changed()
    with pytest.warns(UncoveredWarning, match=r"2.weight"):
        theirs.step()


class Lookahead(Optimizer):
    """Wraps another optimizer, whose groups are its own."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


@pytest.mark.parametrize("handed", ["outer", "inner"])
def test_wrappers_and_what_they_wrap_are_one(handed: str) -> None:
    model = net()
    inner = SGD(model.parameters(), lr=0.1)
    outer = Lookahead(inner)
    governor = TolariaGovernor(model, outer if handed == "outer" else inner)
    governor.step(step(model, outer))


def test_others_are_not_spoken_of() -> None:
    model, other = net(), net()
    optimizer = SGD(model.parameters(), lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(model)
    governor = TolariaGovernor(model, optimizer, extras={"average": average})
    theirs = TolariaGovernor(other, Adam(other.parameters()))
    twin = copy.deepcopy(model)
    step(other, theirs._engine.covered.optimizers[0])
    step(twin, SGD(twin.parameters(), lr=0.1))
    for _ in range(3):
        governor.step(step(model, optimizer))
        average.update_parameters(model)
    governor.remove_optimizer(optimizer)
    step(model, optimizer)  # as its owner wishes


def test_two_governors_may_share_a_model() -> None:
    model = net()
    body, head = SGD(model[0].parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)
    governors = TolariaGovernor(model, body), TolariaGovernor(model, head)
    loss = step(model, body, head)
    for governor in governors:
        governor.step(loss)


def test_the_hook_goes_with_the_last_governor() -> None:
    gc.collect()
    hooks = torch_optimizer._global_optimizer_pre_hooks
    before = dict(hooks)
    model = net()
    governors = [TolariaGovernor(model, SGD(model.parameters(), lr=0.1)) for _ in range(3)]
    assert len(hooks) == 1, "one for all"
    governors.pop().close()
    with pytest.warns(UncoveredWarning):
        step(model, Adam(model.parameters()))
    governors.clear()
    gc.collect()
    assert hooks == before
    step(model, Adam(model.parameters()))


def test_a_model_that_is_gone_is_not_kept() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    governor = TolariaGovernor(model, optimizer)
    governor.step(step(model, optimizer))
    gone = [weakref.ref(model), weakref.ref(optimizer)]
    del model, optimizer, governor
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def batches(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 4, generator=draw), torch.randint(3, (16,), generator=draw)) for _ in range(count)
    ]


def test_loops_cover_the_optimizers_that_they_see() -> None:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    model = MorphogeneticModel(host, {"a": "1"}, example_input=torch.zeros(2, 4))
    first = AdamW(model.host_parameters())
    config = GovernorConfig(snapshot_interval=10, probation=1)
    governor = TolariaGovernor(model, first, num_classes=3, config=config)
    model.germinate("a", lambda f: nn.Linear(8, 8))
    seed = AdamW(model.seed_parameters())
    loop: dict[str, Any] = {
        "criterion": nn.CrossEntropyLoss(),
        "host_optimizer": first,
        "seed_optimizer": seed,
        "device": "cpu",
        "governor": governor,
    }
    model.incubate("a")
    model.blend("a", 3)
    train_epoch_blended(model, batches(5), **loop)
    model.fossilize("a")
    governor.snapshot()
    train_epoch_blended(model, batches(5), **loop)
    bad = batches(1, 9)
    bad[0][0].fill_(float("nan"))
    train_epoch_blended(model, bad, **loop)
    stats = train_epoch_blended(model, batches(100, 3), **loop)
    assert bool(torch.isfinite(stats.losses).all())
    assert governor.rollback_count == 1
    third = SGD(model.parameters(), lr=0.1)
    train_epoch_normal(model, batches(3), nn.CrossEntropyLoss(), third, "cpu", governor=governor)
    assert third in governor._engine.covered.optimizers


def test_warnings_may_be_errors() -> None:
    model = net()
    TolariaGovernor(model, [])  # nobody holds it: gone at once
    governor = TolariaGovernor(model, [])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UncoveredWarning)
        with pytest.raises(UncoveredWarning):
            step(model, SGD(model.parameters(), lr=0.1))
    governor.close()
