"""``.metadata``: what ``torch.distributed.checkpoint`` must know of the tensors, and its cautious reader."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from tolaria.snapshot.persist.plain_pickle import Called, Pairs, parse
from tolaria.snapshot.persist.tensor_bytes import DTYPES, MOST_DIMENSIONS

MOST_BYTES = 2**28
"""Of a ``.metadata``: about a million tensors."""
_VERSION = "1.0.0"  # of torch's format, since 2.3
_META = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    (_META, "ChunkStorageMetadata"),
    (_META, "Metadata"),
    (_META, "MetadataIndex"),
    (_META, "StorageMeta"),
    (_META, "TensorProperties"),
    (_META, "TensorStorageMetadata"),
    (_META, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", name) for name in DTYPES),
}
"""The same from torch 2.9 to 2.14."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor is: ``length`` bytes from ``offset`` of a file are its archive."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


def to_bytes(tensors: Iterable[Stored]) -> bytes:
    """The file, as torch's own writer would fill it for whole tensors."""
    metadata = Metadata(state_dict_metadata={}, planner_data={}, storage_data={}, storage_meta=StorageMeta())
    metadata.version = _VERSION
    for each in tensors:
        size, offsets = torch.Size(each.shape), torch.Size([0] * len(each.shape))
        metadata.state_dict_metadata[each.name] = TensorStorageMetadata(
            TensorProperties(each.dtype), size, [ChunkStorageMetadata(offsets, size)]
        )
        metadata.planner_data[each.name] = (each.name,)
        index = MetadataIndex(each.name, offsets)
        metadata.storage_data[index] = _StorageInfo(each.file, each.offset, each.length)
    return pickle.dumps(metadata, protocol=4)


def from_bytes(data: bytes) -> list[Stored]:
    """What the file says of each tensor; nothing in it is imported, called or believed.

    A range in a file may lie anywhere, and its path be any: the caller knows the files.

    Raises:
        ValueError: it is damaged, or says of a tensor what :func:`to_bytes` would not; the message says what.
    """
    fields = _fields(parse(data, _ALLOWED), "Metadata")
    storage = {}
    for index, info in _pairs(fields.get("storage_data"), "storage_data"):
        name = _fields(index, "MetadataIndex").get("fqn")
        if not isinstance(name, str) or name in storage:
            raise ValueError("storage_data: expected each tensor once, by name")
        storage[name] = _fields(info, "_StorageInfo")
    found = []
    for name, described in _pairs(fields.get("state_dict_metadata"), "state_dict_metadata"):
        if not isinstance(name, str) or name not in storage:
            raise ValueError("state_dict_metadata: expected a name that storage_data knows, got another")
        found.append(_stored(name, _fields(described, "TensorStorageMetadata"), storage.pop(name)))
    if storage:
        raise ValueError("storage_data: expected no tensor but those of state_dict_metadata, got more")
    return found


def _stored(name: str, described: dict[str, object], where: dict[str, object]) -> Stored:
    shape = _shape(described.get("size"))
    match described.get("chunks"):
        case [chunk]:
            part = _fields(chunk, "ChunkStorageMetadata")
        case _:
            raise ValueError("chunks: expected one for each tensor")
    if _shape(part.get("sizes")) != shape or any(_shape(part.get("offsets"))):
        raise ValueError("chunks: expected the whole tensor, got a part")
    match described.get("properties"):
        case Called("TensorProperties", (), (Called(str(dtype), None, None), *_)) if dtype in DTYPES:
            pass
        case _:
            raise ValueError("properties: expected a dtype of this torch, got something else")
    match where:
        case {"relative_path": str(file), "offset": int(offset), "length": int(length), **rest} if not rest:
            pass
        case _:
            raise ValueError("storage_data: expected a path, an offset and a length, got something else")
    if isinstance(offset, bool) or isinstance(length, bool) or offset < 0 or length < 0:
        raise ValueError("storage_data: expected natural numbers as offset and length")
    return Stored(name, DTYPES[dtype], shape, file, offset, length)


def _shape(value: object) -> tuple[int, ...]:
    match value:
        case Called("Size", (tuple(sizes),), None) if len(sizes) <= MOST_DIMENSIONS:
            if all(type(n) is int and 0 <= n < 2**63 for n in sizes):
                return sizes
    raise ValueError(f"size: expected at most {MOST_DIMENSIONS} natural numbers, got something else")


def _fields(value: object, name: str) -> dict[str, object]:
    """The attributes of an object of this class."""
    if not isinstance(value, Called) or value.name != name or value.arguments != ():
        raise ValueError(f"expected a {name}, got something else")
    fields: dict[str, object] = {}
    for key, each in _pairs(value.state, name):
        if not isinstance(key, str) or key in fields:
            raise ValueError(f"{name}: expected each field once, by name")
        fields[key] = each
    return fields


def _pairs(value: object, name: str) -> list[tuple[object, object]]:
    if isinstance(value, Pairs):
        return value.items
    raise ValueError(f"{name}: expected a dictionary, got something else")
