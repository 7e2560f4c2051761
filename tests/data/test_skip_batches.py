"""Batches are left out after a rollback: as many as asked for, once, wherever the loader stands."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from tolaria.data import SkipBatches
from tolaria.governor import GovernorBank, GovernorConfig, TolariaGovernor
from tolaria.train import grow, train_epoch_normal
from tolaria.train.faults import parse_fault
from tolaria.train.observers import GrowthObserver, StoryContext


def govern(n: int = 3, **settings: Any) -> TolariaGovernor:
    model = nn.Linear(1, 2)
    config = GovernorConfig(skip_batches=n, max_restores_of_one_capture=1000, **settings)
    return TolariaGovernor(model, torch.optim.SGD(model.parameters(), lr=0.1), config=config)


def train(
    batches: Iterable[Any], governor: TolariaGovernor, bad: Iterable[int] = (), epochs: int = 1
) -> list[int]:
    """The batches that a loop met, all epochs one after the other; ``bad`` counts those met, from 0."""
    met: list[int] = []
    for _ in range(epochs):
        for batch in batches:
            governor.step(math.nan if len(met) in bad else 1.0)
            met.append(int(batch))
    return met


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(12))


class Sequence:
    """Iterated by indices alone."""

    def __getitem__(self, i: int) -> int:
        if i >= 12:
            raise IndexError
        return i


LOADERS: dict[str, Callable[[], Any]] = {
    "list": lambda: list(range(12)),
    "range": lambda: range(12),
    "generator": lambda: (i for i in range(12)),
    "tensor": lambda: torch.arange(12),
    "sequence": Sequence,
    "data-loader": lambda: DataLoader(range(12), batch_size=None),  # type: ignore[arg-type]
    "workers": lambda: DataLoader(range(12), batch_size=1, num_workers=2),  # type: ignore[arg-type]
    "iterable-dataset": lambda: DataLoader(Endless(), batch_size=1),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_so_many_are_left_out_of_any_loader(kind: str) -> None:
    governor = govern()
    batches = SkipBatches(LOADERS[kind](), governor)
    assert train(batches, governor, bad=[4]) == [0, 1, 2, 3, 4, 8, 9, 10, 11]
    assert batches.left_out == ((0, 5), (0, 6), (0, 7))
    assert [left.epoch for left in batches.left_out] == [0, 0, 0]
    assert governor.batches_left_out == 3


def test_without_the_setting_and_under_log_only_nothing_is_left_out() -> None:
    for governor in (govern(0), govern(log_only=True)):
        assert train(SkipBatches(range(6), governor), governor, bad=[1, 3]) == list(range(6))
        assert governor.batches_left_out == 0


def test_what_a_loader_that_ends_could_not_leave_out_the_next_epoch_does() -> None:
    governor = govern(5)
    batches = SkipBatches(list(range(4)), governor)
    assert train(batches, governor, bad=[2], epochs=3) == [0, 1, 2, *range(4)]
    assert batches.left_out == ((0, 3), (1, 0), (1, 1), (1, 2), (1, 3))


def test_a_rollback_at_the_last_batch_belongs_to_the_next_epoch() -> None:
    governor = govern(2)
    batches = SkipBatches(list(range(4)), governor)
    assert train(batches, governor, bad=[3], epochs=2) == [0, 1, 2, 3, 2, 3]


def test_an_object_for_each_epoch_is_the_same_as_one() -> None:
    governor, met = govern(2), []
    for _ in range(3):
        met += train(SkipBatches(iter(range(4)), governor), governor, bad=[] if met else [1, 3])
    assert met == [0, 1, 0, 1, 2, 3, 0, 1, 2, 3]
    governor, met = govern(3), []
    for _ in range(2):
        met += train(SkipBatches(iter(range(4)), governor), governor, bad=[] if met else [2])
    assert met == [0, 1, 2, 2, 3]


def test_a_second_rollback_leaves_out_as_many_again() -> None:
    governor = govern(3)
    assert train(SkipBatches(range(16), governor), governor, bad=[2, 3]) == [0, 1, 2, 6, *range(10, 16)]


def test_rollbacks_before_the_next_batch_are_one_after_another() -> None:
    governor, met = govern(3), []
    for batch in SkipBatches(range(10), governor):
        met.append(batch)
        for _ in range(3 if batch == 1 else 0):
            governor.step(math.nan)
    assert met == [0, 1, *range(5, 10)]


def test_a_rollback_by_hand_leaves_batches_out_and_the_same_one_again_does_not() -> None:
    governor, met = govern(2), []
    for batch in SkipBatches(range(10), governor):
        met.append(batch)
        governor.step(1.0)
        for _ in range(2 if batch == 3 else 0):
            governor.execute_rollback()
    assert met == [0, 1, 2, 3, 6, 7, 8, 9]


def test_one_inside_another_leaves_out_once() -> None:
    governor = govern(2)
    inner = SkipBatches(list(range(8)), governor)
    outer = SkipBatches((batch for batch in inner), governor)
    assert train(outer, governor, bad=[1]) == [0, 1, 4, 5, 6, 7]
    assert governor.batches_left_out == 2
    assert outer.left_out == ()


def test_loaders_side_by_side_stay_side_by_side() -> None:
    governor, met = govern(2), []
    pairs = zip(SkipBatches(range(8), governor), SkipBatches(range(100, 108), governor), strict=True)
    for labelled, unlabelled in pairs:
        met.append(labelled)
        assert unlabelled == labelled + 100
        governor.step(math.nan if labelled == 2 else 1.0)
    assert met == [0, 1, 2, 5, 6, 7]


def test_a_loader_that_comes_later_owes_nothing_that_was_paid() -> None:
    governor = govern(2)
    later = SkipBatches(range(4), governor)
    train(SkipBatches(range(8), governor), governor, bad=[2])
    assert train(later, governor) == [0, 1, 2, 3]


def test_of_several_governors_the_one_with_most_decides() -> None:
    first, second, met = govern(2), govern(4), []
    for batch in SkipBatches(range(20), [first, second]):
        met.append(batch)
        first.step(math.nan if batch == 3 else 1.0)
        second.step(math.nan if batch in (3, 10) else 1.0)
    assert met == [0, 1, 2, 3, 8, 9, 10, 15, 16, 17, 18, 19]
    assert (first.batches_left_out, second.batches_left_out) == (2, 8)


def test_two_iterators_over_one_object_count_apart() -> None:
    governor = govern(2)
    batches = SkipBatches(list(range(6)), governor)
    one, other = iter(batches), iter(batches)
    assert (next(one), next(other)) == (0, 0)
    governor.step(math.nan)
    assert (list(one), list(other)) == ([3, 4, 5], [3, 4, 5])


def test_it_is_the_loader_in_all_else() -> None:
    governor = govern()
    sampler: DistributedSampler[Any] = DistributedSampler(range(8), num_replicas=1, rank=0)  # type: ignore[arg-type]
    loader = DataLoader(range(8), batch_size=2, sampler=sampler)  # type: ignore[arg-type]
    batches = SkipBatches(loader, governor)
    assert len(batches) == 4
    assert batches.sampler is sampler
    batches.sampler.set_epoch(3)
    assert sampler.epoch == 3
    assert bool(batches)
    assert bool(SkipBatches(iter(()), governor))
    assert not SkipBatches([], governor)
    assert list(SkipBatches(iter([1, 2]), governor)) == [1, 2]
    with pytest.raises(TypeError, match="no len"):
        len(SkipBatches(iter(()), governor))
    with pytest.raises(AttributeError, match="set_epoch"):
        SkipBatches([], governor).set_epoch(1)
    assert copy.copy(batches).loader is loader


def test_what_is_no_loader_or_governor_is_named() -> None:
    governor = govern()
    with pytest.raises(TypeError, match="loader: expected an iterable of batches, got int"):
        SkipBatches(3, governor)  # type: ignore[arg-type]
    for wrong in (None, nn.Linear(1, 1), GovernorBank(2), [governor, 3]):
        with pytest.raises(TypeError, match="governor: expected a TolariaGovernor"):
            SkipBatches([], wrong)  # type: ignore[arg-type]
    for several in ([], [governor, governor]):
        with pytest.raises(ValueError, match="governor: expected one governor or more, each once"):
            SkipBatches([], several)


def test_what_is_owed_survives_a_resume() -> None:
    first, second = govern(3), govern(3)
    train(SkipBatches(range(4), first), first, bad=[2])
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.batches_left_out == 1
    batches = SkipBatches(range(6), second)
    assert train(batches, second) == [2, 3, 4, 5]
    assert second.batches_left_out == 3


def test_loading_in_the_middle_of_an_epoch_takes_what_is_owed_then() -> None:
    governor, other = govern(3), govern(3)
    batches = iter(SkipBatches(range(10), governor))
    assert next(batches) == 0
    governor.load_state_dict(other.state_dict())
    assert next(batches) == 1
    other.step(math.nan)
    governor.load_state_dict(other.state_dict())
    assert next(batches) == 5
    governor.step(math.nan)
    governor.reset()
    assert next(batches) == 6, "all is forgotten"


def test_accumulation_leaves_out_batches_not_steps() -> None:
    governor, met = govern(3), []
    batches = iter(SkipBatches(range(14), governor))
    for step in range(5):
        met.append([next(batches) for _ in range(2)])
        governor.step(math.nan if step == 1 else 1.0)
    assert met == [[0, 1], [2, 3], [7, 8], [9, 10], [11, 12]]


class Noted:
    """A criterion that notes which batches it saw, and fails at one of its calls."""

    def __init__(self, bad: int) -> None:
        self.met: list[int] = []
        self.bad = bad

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.met.append(int(targets[0]))
        return logits.sum() * (math.nan if len(self.met) == self.bad else 0.0)


@pytest.mark.parametrize("is_wrapped", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loops_of_this_package_do_it_by_themselves(is_wrapped: bool, accumulation: int) -> None:
    governor, criterion = govern(3), Noted(bad=2)
    covered = governor._engine.covered
    data: Any = [(torch.ones(1, 1), torch.tensor([i])) for i in range(9)]
    loader = SkipBatches(data, governor) if is_wrapped else data
    stats = [
        train_epoch_normal(
            covered.model, loader, criterion, covered.optimizers[0], "cpu", governor=governor,
            accumulation_steps=accumulation,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert criterion.met == [0, 1, *range(5, 9), *range(9)]
    assert governor.batches_left_out == 3
    assert sum(each.samples for each in stats) == 15


def test_a_rollback_at_the_end_of_an_epoch_of_ours_belongs_to_the_next() -> None:
    governor, criterion = govern(2), Noted(bad=4)
    covered = governor._engine.covered
    data = [(torch.ones(1, 1), torch.tensor([i])) for i in range(4)]
    for _ in range(2):
        train_epoch_normal(
            covered.model, data, criterion, covered.optimizers[0], "cpu", governor=governor
        )  # fmt: skip
    assert criterion.met == [0, 1, 2, 3, 2, 3]


def test_what_max_steps_leaves_in_the_loader_is_not_drawn() -> None:
    governor, criterion = govern(2), Noted(bad=2)
    covered = governor._engine.covered
    data = iter([(torch.ones(1, 1), torch.tensor([i])) for i in range(12)])
    for _ in range(2):
        train_epoch_normal(
            covered.model, data, criterion, covered.optimizers[0], "cpu", governor=governor, max_steps=2
        )  # fmt: skip
    assert criterion.met == [0, 1, 4, 5]
    assert int(next(data)[1]) == 6


class Governors(GrowthObserver):
    def __init__(self) -> None:
        self.governors: list[Any] = []

    def on_start(self, context: StoryContext) -> None:
        self.governors.append(context.governor)


def test_a_phase_of_a_growing_network_is_no_shorter_for_it() -> None:
    seen = Governors()
    result = grow(
        "digits", observers=[seen], governor_config=GovernorConfig(skip_batches=7, snapshot_interval=8),
        faults=[parse_fault("nan-loss@12")], host_steps=20, incubate_steps=3, blend_steps=3, finish_steps=2,
        validate_every=10,
    )  # fmt: skip
    assert [phase.end_step for phase in result.phases] == [20, 23, 26, 28]
    assert [look.step for look in result.validations] == [10, 20, 23, 26, 28]
    (governor,) = seen.governors
    assert governor.batches_left_out == 7
