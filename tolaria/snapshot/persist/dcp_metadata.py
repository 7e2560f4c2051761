"""``.metadata``: what ``torch.distributed.checkpoint`` must know of the tensors, written and read without it.

Its own ``save`` warns, logs and plans under the interpreter's lock, for milliseconds that a training loop
feels; its own reader unpickles, and so runs, whatever lies there.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from tolaria.snapshot.persist.plain_pickle import Called, Pairs, dump, parse
from tolaria.snapshot.persist.tensor_bytes import DTYPES, MOST_DIMENSIONS

MOST_BYTES = 2**28
"""Of a ``.metadata``: about half a million tensors."""
_VERSION = "1.0.0"  # of torch's format
_CLASSES = "torch.distributed.checkpoint.metadata."
_PLACE = "torch.distributed.checkpoint.filesystem._StorageInfo"
_LAYOUT = "torch.serialization._get_layout"
_ALLOWED = {
    f"{_CLASSES}ChunkStorageMetadata",
    f"{_CLASSES}Metadata",
    f"{_CLASSES}MetadataIndex",
    f"{_CLASSES}StorageMeta",
    f"{_CLASSES}TensorProperties",
    f"{_CLASSES}TensorStorageMetadata",
    f"{_CLASSES}_MEM_FORMAT_ENCODING",
    _PLACE,
    _LAYOUT,
    "torch.Size",
    *(f"torch.{name}" for name in DTYPES),
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


@functools.lru_cache(maxsize=1)  # the next snapshot of a run nearly always has the same
def to_bytes(tensors: tuple[Stored, ...]) -> bytes:
    """The file, as torch's own writer would fill it for whole tensors."""
    sizes = {each.shape: Called("torch.Size", (each.shape,)) for each in tensors}
    zeros = {shape: Called("torch.Size", ((0,) * len(shape),)) for shape in sizes}
    kinds = {(each.dtype, each.shape) for each in tensors}
    described = {(dtype, shape): _described(dtype, sizes[shape], zeros[shape]) for dtype, shape in kinds}
    fields = {
        "state_dict_metadata": Pairs([(each.name, described[each.dtype, each.shape]) for each in tensors]),
        "planner_data": Pairs([(each.name, (each.name,)) for each in tensors]),
        "storage_data": Pairs([(_key(each.name, zeros[each.shape]), _place(each)) for each in tensors]),
        "storage_meta": _object("StorageMeta", checkpoint_id=None, save_id=None, load_id=None, modules=[]),
        "version": _VERSION,
    }
    return dump(_object("Metadata", **fields))


def from_bytes(data: bytes) -> list[Stored]:
    """What the file says of each tensor; nothing in it is imported, called or believed.

    A range in a file may lie anywhere, and its path be any: the caller knows the files.

    Raises:
        ValueError: it is damaged, or says of a tensor what :func:`to_bytes` would not; the message says what.
    """
    fields = _fields(parse(data, _ALLOWED), f"{_CLASSES}Metadata")
    places = {}
    for index, place in _pairs(fields.get("storage_data"), "storage_data"):
        name = _fields(index, f"{_CLASSES}MetadataIndex").get("fqn")
        if not isinstance(name, str) or name in places:
            raise ValueError("storage_data: expected each tensor once, by name")
        places[name] = _fields(place, _PLACE)
    found = []
    for name, described in _pairs(fields.get("state_dict_metadata"), "state_dict_metadata"):
        if not isinstance(name, str) or name not in places:
            raise ValueError("state_dict_metadata: expected a name that storage_data knows, got another")
        found.append(_stored(name, _fields(described, f"{_CLASSES}TensorStorageMetadata"), places.pop(name)))
    if places:
        raise ValueError("storage_data: expected no tensor but those of state_dict_metadata, got more")
    return found


def _described(dtype: torch.dtype, size: Called, zeros: Called) -> Called:
    layout = Called(_LAYOUT, ("torch.strided",))
    rows_first = Called(f"{_CLASSES}_MEM_FORMAT_ENCODING", (0,))
    properties = Called(f"{_CLASSES}TensorProperties", ())
    properties.state = Called(str(dtype)), layout, False, rows_first, False
    chunk = _object("ChunkStorageMetadata", offsets=zeros, sizes=size)
    return _object("TensorStorageMetadata", properties=properties, size=size, chunks=[chunk])


def _key(name: str, zeros: Called) -> Called:
    return _object("MetadataIndex", fqn=name, offset=zeros, index=None)


def _place(tensor: Stored) -> Called:
    said = [("relative_path", tensor.file), ("offset", tensor.offset), ("length", tensor.length)]
    return Called(_PLACE, (), Pairs(said))


def _object(name: str, **fields: object) -> Called:
    return Called(_CLASSES + name, (), Pairs(list(fields.items())))


def _stored(name: str, described: dict[str, Any], place: dict[str, Any]) -> Stored:
    shape = _shape(described.get("size"))
    match described.get("chunks"):
        case [chunk]:
            part = _fields(chunk, f"{_CLASSES}ChunkStorageMetadata")
        case _:
            raise ValueError("chunks: expected one for each tensor")
    if _shape(part.get("sizes")) != shape or any(_shape(part.get("offsets"))):
        raise ValueError("chunks: expected the whole tensor, got a part")
    match described.get("properties"):
        case Called(_, (), (Called(str(dtype), None, None), *_)) if dtype.removeprefix("torch.") in DTYPES:
            dtype = dtype.removeprefix("torch.")
        case _:
            raise ValueError("properties: expected a dtype of this torch, got something else")
    match place:
        case {"relative_path": str(file), "offset": int(offset), "length": int(length), **rest} if not rest:
            pass
        case _:
            raise ValueError("storage_data: expected a path, an offset and a length, got something else")
    if isinstance(offset, bool) or isinstance(length, bool) or offset < 0 or length < 0:
        raise ValueError("storage_data: expected natural numbers as offset and length")
    return Stored(name, DTYPES[dtype], shape, file, offset, length)


def _shape(value: object) -> tuple[int, ...]:
    match value:
        case Called("torch.Size", (tuple(sizes),), None) if len(sizes) <= MOST_DIMENSIONS:
            is_shape = all(type(n) is int and n >= 0 for n in sizes)
            if is_shape and math.prod(max(1, n) for n in sizes) < 2**63:  # so that its strides fit
                return sizes
    raise ValueError(f"size: expected at most {MOST_DIMENSIONS} natural numbers, got something else")


def _fields(value: object, name: str) -> dict[str, Any]:
    """The attributes of an object of this class."""
    if not isinstance(value, Called) or value.name != name or value.arguments != ():
        raise ValueError(f"expected an object {name}, got something else")
    fields: dict[str, Any] = {}
    for key, each in _pairs(value.state, name):
        if not isinstance(key, str) or key in fields:
            raise ValueError(f"{name}: expected each field once, by name")
        fields[key] = each
    return fields


def _pairs(value: object, name: str) -> list[tuple[Any, Any]]:
    if isinstance(value, Pairs):
        return value.items
    raise ValueError(f"{name}: expected a dictionary, got something else")
