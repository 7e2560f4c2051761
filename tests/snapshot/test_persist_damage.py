"""Damaged and crafted snapshots: one clear error, nothing run, no memory taken that a file merely claims."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from tolaria.errors import SnapshotError
from tolaria.snapshot.persist import documents, newest, read, write
from tolaria.snapshot.persist.documents import FileDigest

DOCUMENT, METADATA, TENSORS = "document.json", ".metadata", "__0_0.distcp"
FILES = (DOCUMENT, METADATA, TENSORS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A snapshot, its neighbour of the same shapes being step_000000002."""
    for number in (2, 1):
        tensors = {"w": torch.full((2, 3), float(number)), "step": torch.tensor(number)}
        path = write(tmp_path, number, tensors, {"n": number})
    return path


def seal(path: Path) -> None:
    """Let the document name the digests of the files as they are now, as an attacker would."""
    contents = documents.from_bytes((path / DOCUMENT).read_bytes())
    files = {}
    for name in (METADATA, TENSORS):
        data = (path / name).read_bytes()
        files[name] = FileDigest(len(data), hashlib.sha256(data).hexdigest())
    (path / DOCUMENT).write_bytes(documents.to_bytes(replace(contents, files=files)))


def seal_document(path: Path, text: str) -> None:
    """A document whose own digest is right, whatever it says."""
    rest = text.removeprefix("{").encode()
    (path / DOCUMENT).write_bytes(
        b'{"sha256": "' + hashlib.sha256(rest).hexdigest().encode() + b'",\n' + rest
    )


def body_of(path: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((path / DOCUMENT).read_bytes())
    del body["sha256"]
    return body


def peak_memory() -> int:
    """Bytes of address space that this process has ever had."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmPeak:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.proof}",)


def flip(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def zero(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + bytes(min(512, len(data) - at)) + data[at + 512 :]


def append(data: bytes, draw: random.Random) -> bytes:
    return data + draw.randbytes(draw.randrange(1, 64))


def insert(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + draw.randbytes(1) + data[at:]


def test_random_damage_is_always_found(path: Path) -> None:
    draw = random.Random(7)
    whole = {name: (path / name).read_bytes() for name in FILES}
    for round_ in range(500):
        name = draw.choice(FILES)
        damage = draw.choice([flip, cut, zero, append, insert])
        damaged = damage(whole[name], draw)
        if damaged == whole[name]:
            continue
        (path / name).write_bytes(damaged)
        with pytest.raises(SnapshotError, match=r"step_000000001/") as caught:
            read(path)
        assert len(str(caught.value)) < 2000, round_
        (path / name).write_bytes(whole[name])
    assert read(path)[0] == {"n": 1}


def test_random_damage_under_a_right_seal_is_found_or_harmless(path: Path) -> None:
    draw = random.Random(8)
    whole = {name: (path / name).read_bytes() for name in FILES}
    found = 0
    for _ in range(300):
        name = draw.choice([METADATA, TENSORS])
        (path / name).write_bytes(draw.choice([flip, cut, zero, insert])(whole[name], draw))
        seal(path)
        try:
            _, tensors = read(path)
        except SnapshotError:
            found += 1
        else:  # a name that reads well, a field that nobody needs
            assert sum(tensor.nbytes for tensor in tensors.values()) == 32
        for each in FILES:
            (path / each).write_bytes(whole[each])
    assert found > 200


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", ["missing", "empty", "of another", "link", "folder", "pipe"])
def test_a_file_that_is_not_the_one_that_was_written(path: Path, name: str, change: str) -> None:
    file = path / name
    other = path.with_name("step_000000002") / name
    aside = path.parent / "aside"
    file.rename(aside)
    match change:
        case "empty":
            file.touch()
        case "of another":
            file.write_bytes(other.read_bytes())
        case "link":
            file.symlink_to(aside)
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
    if (change, name) == ("of another", METADATA):
        assert aside.read_bytes() == other.read_bytes()  # the shapes are the same: so is what it says
        return
    with pytest.raises(SnapshotError, match=re.escape(str(file))):
        read(path)
    with pytest.warns(RuntimeWarning, match=re.escape(str(file))):
        assert read(path.parent)[0] == {"n": 2}


def test_a_damaged_newest_falls_back_to_the_one_before_with_a_warning(path: Path) -> None:
    data = (path / TENSORS).read_bytes()
    (path / TENSORS).write_bytes(data[:-100] + b"?" + data[-99:])
    assert newest(path.parent) == path  # which looks at no more than documents and sizes
    with pytest.warns(RuntimeWarning, match=r"step_000000001/__0_0.distcp: .*step_000000002 is read instead"):
        document, tensors = read(path.parent)
    assert document == {"n": 2}
    assert tensors["w"].tolist() == [[2.0] * 3] * 2
    (path.with_name("step_000000002") / DOCUMENT).unlink()
    assert newest(path.parent) == path
    with pytest.raises(
        SnapshotError, match=r"found none\n.*step_000000002/document.json.*\n.*step_000000001/"
    ):
        read(path.parent)


def test_a_snapshot_under_the_name_of_another_is_refused(path: Path) -> None:
    other = path.with_name("step_000000003")
    path.rename(other)
    with pytest.raises(SnapshotError, match=r"step_000000003/document.json: it belongs to snapshot 1, not 3"):
        read(other)


def test_a_link_in_the_parent_is_no_snapshot(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / path.name).symlink_to(path)
    assert newest(folder) is None
    with pytest.raises(SnapshotError, match=r"step_000000001: expected a folder with a snapshot"):
        read(folder)


def test_pickled_commands_in_the_metadata_do_not_run(path: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (path / METADATA).write_bytes(pickle.dumps(Payload(proof), protocol=protocol))
        seal(path)
        with pytest.raises(SnapshotError, match=r"\.metadata: .*(posix|nt)\.system|\.metadata: it uses"):
            read(path)
    assert not proof.exists()


def test_pickled_commands_in_the_tensors_do_not_run(path: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    size = (path / TENSORS).stat().st_size
    torch.save(Payload(proof), path / TENSORS)
    os.truncate(path / TENSORS, size)
    seal(path)
    with pytest.raises(SnapshotError, match=r"__0_0.distcp: expected 'w' as torch.float32 of shape"):
        read(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins getattr", "builtins eval", "os system", "torch load", "torch.nn Module", "torch hub.load"],
)
def test_other_names_are_not_even_looked_up(path: Path, name: str) -> None:
    (path / METADATA).write_bytes(b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n.")
    seal(path)
    with pytest.raises(SnapshotError, match=f"it names '{name.replace(' ', '.')}', which is not allowed"):
        read(path)


def metadata_of(path: Path) -> Metadata:
    metadata: Metadata = pickle.loads((path / METADATA).read_bytes())
    return metadata


def sized(*shape: int, **change: object) -> Callable[[Metadata], None]:
    def resize(metadata: Metadata) -> None:
        described: Any = metadata.state_dict_metadata["w"]
        described.size = described.chunks[0].sizes = torch.Size(shape)
        described.chunks[0].offsets = torch.Size([0] * len(shape))
        placed(**change)(metadata)

    return resize


def no_shape(metadata: Metadata) -> None:
    metadata.state_dict_metadata["w"].size = torch.Size([2**62, 2**62, 0])  # type: ignore[union-attr]


def other_chunk(metadata: Metadata) -> None:
    metadata.state_dict_metadata["w"].chunks[0].offsets = torch.Size([0, 1])  # type: ignore[union-attr]


def two_chunks(metadata: Metadata) -> None:
    metadata.state_dict_metadata["w"].chunks *= 2  # type: ignore[union-attr]


def other_dtype(metadata: Metadata) -> None:
    metadata.state_dict_metadata["w"].properties.dtype = torch.int32  # type: ignore[union-attr]


def missing_key(metadata: Metadata) -> None:
    del metadata.state_dict_metadata["w"]


def missing_place(metadata: Metadata) -> None:
    del metadata.storage_data[MetadataIndex("w", [0, 0])]


def missing_field(metadata: Metadata) -> None:
    del metadata.storage_data


def swapped(metadata: Metadata) -> None:
    first, second = metadata.storage_data
    places = metadata.storage_data
    places[first], places[second] = places[second], places[first]


def placed(**change: object) -> Callable[[Metadata], None]:
    def change_place(metadata: Metadata) -> None:
        place: _StorageInfo = metadata.storage_data[MetadataIndex("w", [0, 0])]
        for key, value in change.items():
            setattr(place, key, value)

    return change_place


@pytest.mark.parametrize(
    ("craft", "message"),
    [
        pytest.param(craft, message, id=f"{craft.__name__} {message}")
        for craft, message in [
            (sized(10**15), "storage_data: expected 4000000000000000 bytes or more from 0, got others"),
            (sized(10**15, length=10**16), "storage_data: expected 8 bytes or more from 10000000000000000"),
            (sized(2**33), "storage_data: expected 34359738368 bytes or more"),
            (no_shape, "size: expected at most 32 natural numbers"),
            (other_chunk, "chunks: expected the whole tensor, got a part"),
            (two_chunks, "chunks: expected one for each tensor"),
            (other_dtype, "__0_0.distcp: expected 'w' as torch.int32"),
            (sized(3, 2), r"__0_0.distcp: expected 'w' as torch.float32 of shape \(3, 2\)"),
            (missing_key, "storage_data: expected no tensor but those of state_dict_metadata"),
            (missing_place, "state_dict_metadata: expected a name that storage_data knows"),
            (missing_field, "storage_data: expected a dictionary"),
            (swapped, "__0_0.distcp: expected"),
            (placed(offset=-1), "storage_data: expected natural numbers"),
            (placed(offset=1), "storage_data: expected 24 bytes or more from 0"),
            (placed(offset="0"), "storage_data: expected a path, an offset and a length"),
            (placed(length=-1), "storage_data: expected natural numbers"),
            (placed(length=True), "storage_data: expected natural numbers"),
            (placed(length=3), "storage_data: expected 24 bytes or more from 0"),
            (placed(relative_path="/etc/passwd"), "storage_data: expected the file __0_0.distcp, got '/etc"),
            (placed(relative_path="../step_000000002/__0_0.distcp"), "storage_data: expected the file"),
            (placed(transform_descriptors=["zstd"]), "storage_data: expected a path, an offset and a length"),
        ]
    ],
)
def test_metadata_that_lies(path: Path, craft: Callable[[Metadata], None], message: str) -> None:
    metadata = metadata_of(path)
    craft(metadata)
    (path / METADATA).write_bytes(pickle.dumps(metadata))
    seal(path)
    before = peak_memory()
    with pytest.raises(SnapshotError, match=message):
        read(path)
    assert peak_memory() - before < 2**26


def test_metadata_of_torch_s_own_pickler_is_read_as_well(path: Path) -> None:
    expected = read(path)[1]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (path / METADATA).write_bytes(pickle.dumps(metadata_of(path), protocol=protocol))
        seal(path)
        found = read(path)[1]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"document": [1]}, "expected an object as its document, got list"),
        ({"document": None}, "expected an object as its document, got NoneType"),
        ({"document": {"x": {"$float": "1.5"}}}, "it holds a number that is none"),
        ({"document": {"x": {"$float": {}}}}, "it holds a number that is none"),
        ({"format": "tolaria snapshot 2"}, "expected the format 'tolaria snapshot 1', got another"),
        ({"byteorder": "middle"}, "its tensors are not .*-endian"),
        ({"number": -1}, "expected a natural number as its number"),
        ({"number": True}, "expected a natural number as its number"),
        ({"sequence": "1"}, "expected a natural number as its sequence"),
        ({"files": []}, "expected an object as its files, got list"),
        ({"files": {}}, "expected it to name .metadata and __0_0.distcp, and no other files"),
        ({"files": {METADATA: [1, "00"], "../x": [1, "00"]}}, "and no other files"),
        ({"files": {METADATA: [-1, "00"]}}, "it names a file without size and digest"),
        (
            {"files": {METADATA: [10**15, "00"], TENSORS: [10**15, "00"]}},
            "expected a file of 1000000000000000",
        ),
    ],
)
def test_a_document_that_lies(path: Path, change: dict[str, Any], message: str) -> None:
    seal_document(path, json.dumps(body_of(path) | change))
    with pytest.raises(SnapshotError, match=message):
        read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "document.json: Expecting"),
        ('{"document": ' + "[" * 10**6, "it is nested too deeply"),
        ('{"document": ' + '{"a":' * 10**6, "it is nested too deeply"),
        ('{"format": NaN}', "it holds NaN, which JSON does not know"),
        ('{"format": 1, "format": 2}', "it names a key twice"),
        ('{"number": ' + "9" * 10**5 + "}", "document.json: Exceeds the limit"),
        ('{"format": "\ud800"}', "document.json"),
    ],
)
def test_a_document_that_is_no_json(path: Path, text: str, message: str) -> None:
    if "\ud800" in text:
        rest = text.removeprefix("{").encode("utf-8", "surrogatepass")
        head = b'{"sha256": "' + hashlib.sha256(rest).hexdigest().encode() + b'",\n'
        (path / DOCUMENT).write_bytes(head + rest)
    else:
        seal_document(path, text)
    with pytest.raises(SnapshotError, match=message):
        read(path)


def test_a_document_that_is_too_large_is_not_read(path: Path) -> None:
    os.truncate(path / DOCUMENT, 10**12)  # a file of zeros that takes no room on the disk
    before = peak_memory()
    with pytest.raises(SnapshotError, match=r"document.json: expected at most"):
        read(path)
    assert peak_memory() - before < 2**29
