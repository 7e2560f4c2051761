"""The data: real, split for good, shuffled by a stream of its own."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from tolaria import get_task
from tolaria.nn.randomness import random_state, streams_drawn
from tolaria.tasks import TensorBatches, WindowBatches


def test_digits_are_split_into_disjoint_parts() -> None:
    data = get_task("digits").load_data(batch_size=64, rng_seed=0, data_dir=None)
    parts = [data.train, data.validation, data.test]
    assert [len(part.inputs) for part in parts] == [1197, 150, 450]  # type: ignore[attr-defined]
    images, labels = next(iter(data.train))
    assert images.shape == (64, 1, 8, 8)
    assert images.dtype is torch.float32
    assert labels.dtype is torch.int64
    assert set(torch.cat([part.targets for part in parts]).tolist()) == set(range(10))  # type: ignore[attr-defined]


def test_text_is_split_by_topic_and_knows_its_entropy() -> None:
    task = get_task("text")
    data = task.load_data(batch_size=8, rng_seed=0, data_dir=None)
    inputs, targets = next(iter(data.train))
    assert inputs.shape == targets.shape == (8, 64)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert 2.5 < task.guess_loss < 4.0
    sizes = [len(part.tokens) for part in (data.train, data.validation, data.test)]  # type: ignore[attr-defined]
    assert sizes[0] > 200_000
    assert min(sizes) > 10_000
    assert int(data.test.tokens.max()) < task.num_classes  # type: ignore[attr-defined]


def test_shuffling_never_touches_the_global_streams_and_can_be_resumed() -> None:
    rows = torch.arange(50)
    for batches in (
        TensorBatches(rows, rows, 8, shuffle=True, rng_seed=3),
        WindowBatches(rows, 4, 3, shuffle=True, rng_seed=3),
    ):
        before = random_state()
        first = [x.tolist() for x, _ in batches]
        state = batches.state_dict()
        second = [x.tolist() for x, _ in batches]
        assert len(first) == len(batches)
        assert first != second
        batches.load_state_dict(state)
        assert [x.tolist() for x, _ in batches] == second
        assert not streams_drawn(before)


def test_an_epoch_of_rows_is_every_row_once() -> None:
    rows = torch.arange(50)
    batches = TensorBatches(rows, rows * 2, 8, shuffle=True)
    seen = list(batches)
    assert sorted(itertools.chain.from_iterable(x.tolist() for x, _ in seen)) == rows.tolist()
    assert all(torch.equal(y, x * 2) for x, y in seen)
    assert len(list(TensorBatches(rows, rows, 8, drop_last=True))) == 6


def test_windows_side_by_side_cover_the_text_once() -> None:
    tokens = torch.arange(41)
    targets = torch.cat([y.flatten() for _, y in WindowBatches(tokens, 4, 3)])
    assert targets.tolist() == list(range(1, 41))


def test_bad_batches_are_refused() -> None:
    rows = torch.arange(5)
    with pytest.raises(ValueError, match="batch_size: expected an integer >= 1, got 0"):
        TensorBatches(rows, rows, 0)
    with pytest.raises(ValueError, match="expected 5 rows like inputs, got 4"):
        TensorBatches(rows, rows[:4], 2)
    with pytest.raises(ValueError, match="expected more than 5"):
        WindowBatches(rows, 5, 2)


def write_cifar(folder: Path, rows: int = 1100) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {
            b"data": generator.integers(0, 256, (rows, 3072), dtype=np.uint8),
            b"labels": generator.integers(0, 10, rows).tolist(),
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def test_cifar10_is_read_from_a_folder(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-10-batches-py")
    data = get_task("cifar10").load_data(batch_size=32, rng_seed=0, data_dir=tmp_path)
    images, labels = next(iter(data.train))
    assert images.shape == (32, 3, 32, 32)
    assert labels.shape == (32,)
    assert [len(part.inputs) for part in (data.train, data.validation, data.test)] == [500, 5000, 1100]  # type: ignore[attr-defined]


def test_cifar10_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cifar-10-python\.tar\.gz"):
        get_task("cifar10").load_data(batch_size=32, rng_seed=0, data_dir=tmp_path)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run by a pickle",)


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), pickle.dumps({b"data": 3}), b"", b"garbage"])
def test_cifar10_never_runs_code_from_a_file(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(ValueError, match="data_batch_1: expected a batch"):
        get_task("cifar10").load_data(batch_size=32, rng_seed=0, data_dir=tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"generator": None},
        {"generator": torch.zeros(3)},
        {"generator": torch.zeros(5056, dtype=torch.uint8)},
        {"generator": torch.Generator().get_state(), "more": 1},
        {"generator": torch.full_like(torch.Generator().get_state(), 255)},
    ],
    ids=["none", "empty", "no-tensor", "float", "zeros", "more", "ones"],
)
def test_a_damaged_state_is_refused_and_the_order_stays(state):
    x = torch.arange(10.0)
    for batches in (TensorBatches(x, x, 3, shuffle=True), WindowBatches(x.long(), 2, 2, shuffle=True)):
        kept = batches.state_dict()["generator"].clone()
        with pytest.raises(ValueError, match=r"state: .*expected"):
            batches.load_state_dict(state)
        assert torch.equal(batches.state_dict()["generator"], kept)
