"""Snapshots on disk: what is written comes back, and only so many stay."""

from __future__ import annotations

import json
import math
import os
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tolaria.errors import FolderInUseError, SnapshotError
from tolaria.snapshot.persist import folders, newest, read, write
from tolaria.snapshot.persist.tensor_bytes import DTYPES

NAN_WITH_PAYLOAD = torch.tensor([0x7FC12345, -0x3ABCDE], dtype=torch.int32).view(torch.float32)
ODD_TENSORS = {
    "no dimensions": torch.tensor(2.5),
    "no elements": torch.empty(0, 3),
    "no columns": torch.empty(3, 0, dtype=torch.bfloat16),
    "NaN with payload": NAN_WITH_PAYLOAD,
    "expanded": torch.tensor([3.0]).expand(4, 5),
    "transposed": torch.arange(20.0).view(4, 5).t(),
    "transposed bfloat16": torch.arange(20.0).view(4, 5).bfloat16().t(),
    "transposed float8": torch.arange(20.0).view(4, 5).to(torch.float8_e4m3fn).t(),
    "transposed complex128": torch.arange(20.0).view(4, 5).to(torch.complex128).t(),
    "every third": torch.arange(10)[::3],
    "from the middle": torch.arange(10)[3:7],
    "channels last": torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    "conjugated": torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "negated": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "parameter": nn.Parameter(torch.rand(3)),
    "two pieces and a bit": torch.arange(2**19 + 3, dtype=torch.float32),
    "": torch.tensor(True),
    "näme.with/slash and\nline": torch.zeros(1),
}


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Subclass(Tensor):
    pass


def bits(tensor: Tensor) -> list[int]:
    plain = tensor.detach().resolve_conj().resolve_neg()
    plain = plain.view(INTEGERS.get(plain.itemsize, plain.dtype)).contiguous()  # not every dtype has a copy
    return plain.reshape(-1).view(torch.uint8).tolist()  # type: ignore[no-any-return]


def write_numbers(folder: Path, *numbers: int, keep: int = 2) -> Path:
    for number in numbers:
        path = write(folder, number, {"w": torch.full((3,), float(number))}, {"n": number}, keep=keep)
    return path


def numbers_in(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.iterdir() if path.name != ".snapshots.lock")


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    dtype = DTYPES[name]
    every_byte = torch.arange(256, dtype=torch.uint8).view(2, 8, 16)
    tensor = (every_byte % 2 if dtype == torch.bool else every_byte).view(dtype)
    write(tmp_path, 1, {"w": tensor, "t": tensor.transpose(0, 1), "first": tensor[0, 0, 0]}, {})
    _, tensors = read(tmp_path)
    for key, expected in {"w": tensor, "t": tensor.transpose(0, 1), "first": tensor[0, 0, 0]}.items():
        assert tensors[key].dtype == dtype
        assert tensors[key].shape == expected.shape
        assert bits(tensors[key]) == bits(expected)


def test_every_layout_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = write(tmp_path, 1, ODD_TENSORS, {})
    _, tensors = read(path)
    assert list(tensors) == list(ODD_TENSORS)
    for name, expected in ODD_TENSORS.items():
        assert tensors[name].dtype == expected.dtype
        assert tensors[name].shape == expected.shape
        assert not tensors[name].requires_grad
        assert bits(tensors[name]) == bits(expected), name


def test_what_is_read_belongs_to_the_reader(tmp_path: Path) -> None:
    path = write_numbers(tmp_path, 7)
    read(path)[1]["w"].fill_(1.0)
    assert read(path)[1]["w"].tolist() == [7.0] * 3


def test_no_tensors_and_nothing_in_the_document(tmp_path: Path) -> None:
    assert read(write(tmp_path, 0, {}, {})) == ({}, {})


def test_the_document_comes_back_and_its_file_is_strict_json(tmp_path: Path) -> None:
    class Stage(IntEnum):
        GROWN = 3

    document = {
        "losses": [1.5, math.inf, -math.inf, 1e-300, -0.0],
        "nothing": None,
        "flags": {"on": True, "": [[], {}]},
        "name": 'ä\n"\ud800',
        "large": 2**200,
        "stage": Stage.GROWN,
        "window": (1, 2),
        "$float": "mine",
        "$$": {"$float": "nan"},
    }
    path = write(tmp_path, 1, {}, document)

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    json.loads((path / "document.json").read_text(), parse_constant=refuse)
    found, _ = read(path)
    assert found == document | {"stage": 3, "window": [1, 2]}
    assert math.copysign(1.0, found["losses"][-1]) == -1.0


def test_nan_comes_back_as_nan(tmp_path: Path) -> None:
    found, _ = read(write(tmp_path, 1, {}, {"loss": [math.nan, torch.tensor(math.nan).item()]}))
    assert all(math.isnan(loss) for loss in found["loss"])


def test_the_newest_two_stay_and_so_does_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "step_5").mkdir()
    (tmp_path / "step_0000000000000").mkdir()  # not how 0 is written
    (tmp_path / "notes").write_text("mine")
    write_numbers(tmp_path, 1, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".snapshots.lock",
        "notes",
        "step_0000000000000",
        "step_000000002",
        "step_000000003",
        "step_5",
    ]
    assert newest(tmp_path) == tmp_path / "step_000000003"


def test_one_or_many_may_stay(tmp_path: Path) -> None:
    write_numbers(tmp_path, 1, 2, 3, keep=9)
    assert numbers_in(tmp_path) == [1, 2, 3]
    write_numbers(tmp_path, 4, keep=1)
    assert numbers_in(tmp_path) == [4]


def test_the_newest_is_what_was_written_last_not_the_highest_number(tmp_path: Path) -> None:
    write_numbers(tmp_path, 900, 1000)
    write_numbers(tmp_path, 100)  # a new run, in the folder of an old one
    assert numbers_in(tmp_path) == [100, 1000]
    assert read(tmp_path)[0] == {"n": 100}
    write_numbers(tmp_path, 200)
    assert numbers_in(tmp_path) == [100, 200]


def test_an_existing_number_is_replaced(tmp_path: Path) -> None:
    write_numbers(tmp_path, 1, 2)
    path = write(tmp_path, 1, {"other": torch.zeros(2)}, {"second": True})
    assert numbers_in(tmp_path) == [1, 2]
    assert newest(tmp_path) == path
    assert read(tmp_path)[0] == {"second": True}
    assert list(read(path)[1]) == ["other"]


def test_a_writer_killed_while_it_replaces_leaves_one_of_the_two(tmp_path: Path) -> None:
    path = write_numbers(tmp_path, 1)
    path.rename(folders.replaced_path(path))  # the moment before the new one takes the name
    assert read(tmp_path)[0] == {"n": 1}
    assert newest(tmp_path) == folders.replaced_path(path)
    write_numbers(tmp_path, 1)
    write_numbers(tmp_path, 2)
    assert numbers_in(tmp_path) == [1, 2]
    path.rename(folders.replaced_path(path))
    write_numbers(tmp_path, 1, keep=9)
    (tmp_path / "step_000000002").rename(tmp_path / "aside")
    write_numbers(tmp_path, 1)  # and the moment after
    assert read(tmp_path)[0] == {"n": 1}


def test_a_damaged_one_of_the_same_number_is_replaced(tmp_path: Path) -> None:
    path = write_numbers(tmp_path, 1)
    (path / "document.json").write_text("{}")
    assert write_numbers(tmp_path, 1) == path
    assert numbers_in(tmp_path) == [1]
    assert read(tmp_path)[0] == {"n": 1}


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_snapshot_is_not_replaced(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    elsewhere = write_numbers(tmp_path / "else", 1)
    path = folder / "step_000000001"
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        path.mkdir()
        (path / "mine").write_text("mine")
    else:
        path.symlink_to(elsewhere)
    with pytest.raises(SnapshotError, match="step_000000001: expected a snapshot or nothing"):
        write_numbers(folder, 1)
    assert sorted(each.name for each in folder.iterdir()) == [".snapshots.lock", "step_000000001"]
    assert read(elsewhere)[0] == {"n": 1}


def test_a_snapshot_is_read_by_any_name_or_link_that_is_given(tmp_path: Path) -> None:
    path = write_numbers(tmp_path, 1)
    (tmp_path / "latest").symlink_to(path)
    assert read(str(tmp_path / "latest"))[0] == {"n": 1}
    path.rename(tmp_path / "best")
    assert read(tmp_path / "best")[0] == {"n": 1}


def test_there_is_nothing_to_read(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "missing") is None
    with pytest.raises(SnapshotError, match="expected a whole snapshot in it, found none"):
        read(tmp_path)
    with pytest.raises(SnapshotError, match="missing: expected a folder with snapshots"):
        read(tmp_path / "missing")
    with pytest.raises(SnapshotError, match="step_000000009: cannot be read"):
        read(tmp_path / "step_000000009")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"folder": 3}, TypeError, "folder: expected a path, got int"),
        ({"folder": b"x"}, TypeError, "folder: expected a path, got bytes"),
        ({"number": -1}, ValueError, "number: expected an int, from 0 to"),
        ({"number": 10**18}, ValueError, "number: expected an int, from 0 to"),
        ({"number": True}, TypeError, "number: expected an int, got bool"),
        ({"number": 1.0}, TypeError, "number: expected an int, got float"),
        ({"keep": 0}, ValueError, "keep: expected an int, at least 1, got 0"),
        ({"keep": None}, TypeError, "keep: expected an int, got NoneType"),
        ({"rest": -0.5}, ValueError, "rest: expected a number from 0 to"),
        ({"rest": math.nan}, ValueError, "rest: expected a number from 0 to"),
        ({"rest": "no"}, TypeError, "rest: expected a number"),
        ({"tensors": []}, TypeError, "tensors: expected a mapping, got list"),
        ({"tensors": {1: torch.ones(1)}}, TypeError, "tensors: expected strings as names, got int"),
        ({"tensors": {"w": 1.0}}, TypeError, r"tensors\['w'\]: expected a plain Tensor, got float"),
        ({"tensors": {"w": Subclass([1])}}, TypeError, r"tensors\['w'\]: expected a plain .*, got Subclass"),
        ({"tensors": {"w": torch.ones(1, device="meta")}}, ValueError, r"tensors\['w'\]: .* on meta"),
        ({"tensors": {"w": torch.ones(1).to_sparse()}}, ValueError, r"tensors\['w'\]: .* torch.sparse_coo"),
        ({"tensors": {"w": torch.ones([1] * 33)}}, ValueError, r"tensors\['w'\]: .* 32 dimensions, got 33"),
        ({"document": [1]}, TypeError, "document: expected a mapping, got list"),
        ({"document": {1: 2}}, TypeError, "document: expected strings as keys, got int"),
        ({"document": {"a": [0, {2}]}}, TypeError, r"document\['a'\]\[1\]: .* got set"),
        ({"document": {"a": 10**5000}}, ValueError, "document: expected what JSON can hold"),
        ({"document": {"a": "x" * 2**26}}, ValueError, "document: expected at most 67108864 bytes"),
    ],
)
def test_a_bad_argument_is_named_and_nothing_is_written(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"folder": tmp_path / "out", "number": 1, "tensors": {}, "document": {}}
    with pytest.raises(error, match=message):
        write(**(arguments | change))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_quantized_tensor_is_refused(tmp_path: Path) -> None:
    tensor = torch.quantize_per_tensor(torch.ones(1), 1.0, 0, torch.qint8)
    with pytest.raises(ValueError, match=r"tensors\['w'\]: .* torch.qint8"):
        write(tmp_path, 1, {"w": tensor}, {})


def test_a_document_may_be_100_deep(tmp_path: Path) -> None:
    nested: list[Any] = []
    for _ in range(98):
        nested = [nested]
    assert read(write(tmp_path, 1, {}, {"a": nested}))[0] == {"a": nested}
    nested.append(nested)
    with pytest.raises(ValueError, match="document: expected at most 100 levels"):
        write(tmp_path, 2, {}, {"a": nested})


def test_the_folder_is_made_with_all_above_it(tmp_path: Path) -> None:
    path = write_numbers(tmp_path / "a" / "b", 1)
    assert path == tmp_path / "a" / "b" / "step_000000001"
    assert read(os.fspath(tmp_path / "a" / "b"))[0] == {"n": 1}


def test_a_paced_writer_writes_the_same(tmp_path: Path) -> None:
    tensors = {str(i): torch.rand(1000) for i in range(100)}
    paced = write(tmp_path / "paced", 1, tensors, {}, rest=0.5)
    plain = write(tmp_path / "plain", 1, tensors, {})
    for name in (".metadata", "__0_0.distcp", "document.json"):
        assert (paced / name).read_bytes() == (plain / name).read_bytes()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    write_numbers(tmp_path, 1)
    draft = folders.draft_path(tmp_path, 2, "part")
    with folders.locked(tmp_path) as is_alone:
        assert is_alone
        draft.mkdir()  # of the one who has the lock
        with pytest.raises(FolderInUseError, match=rf"process {os.getpid()} on .* writes one now"):
            write_numbers(tmp_path, 3)
        assert draft.is_dir()
        assert read(tmp_path)[0] == {"n": 1}  # readers need no lock
    write_numbers(tmp_path, 3)
    assert numbers_in(tmp_path) == [1, 3]  # and the draft that nobody has is gone
