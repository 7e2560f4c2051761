"""One tensor as ``torch.load(weights_only=True)`` reads it, around its bytes as they lie in memory.

``torch.save`` would write the same kind of archive, but under the interpreter's lock, and what it writes can
only be read by running the pickle in it. Here all but the tensor's own bytes follows from dtype and shape, so
that a reader compares it and interprets nothing.

The archive is an uncompressed zip with 64-bit sizes: ``data.pkl`` (how to build the tensor), ``byteorder``,
``version``, then the bytes.
"""

from __future__ import annotations

import functools
import math
import re
import struct
import sys
import zlib

import numpy as np
import torch
from torch import Tensor

from tolaria.snapshot.persist.plain_pickle import number

_BYTES = b"archive/data/0"
_LOCAL, _DESCRIPTOR, _CENTRAL = 0x04034B50, 0x08074B50, 0x02014B50
_END, _END_64, _LOCATOR = 0x06054B50, 0x06064B50, 0x07064B50
_NEEDED, _DATE = 45, 0x21  # zip 4.5 has 64-bit sizes; the first day that zip knows
_CRC_FOLLOWS, _MOST = 8, 0xFFFFFFFF
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not re.match(r"torch\.(q|bits|u?int[1-7]$)", str(dtype))
}
"""What can be written, by torch's name: all but quantized types and those of less than a byte."""
MOST_DIMENSIONS = 32  # those that every numpy can hold


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, row by row; a copy only if it is not contiguous.

    numpy copies on this thread alone, where torch would start as many threads as it has for its operators.
    """
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_contiguous():
        return tensor.reshape(-1).view(torch.uint8).numpy().data
    whole = tensor.view(_INTEGERS.get(tensor.itemsize, tensor.dtype))
    return np.ascontiguousarray(whole.numpy()).reshape(-1).view(np.uint8).data


def head(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """What comes before the tensor's bytes."""
    return _head(dtype, shape)[0]


def tail(dtype: torch.dtype, shape: tuple[int, ...], crc: int) -> bytes:
    """What comes after the tensor's bytes, whose CRC-32 is ``crc``."""
    before, central = _head(dtype, shape)
    size = byte_count(dtype, shape)
    name, offset = _BYTES, len(before) - len(_BYTES) - 30 - 20
    sizes = struct.pack("<HHQQ", 1, 16, size, size)
    central += struct.pack(
        "<IHHHHHHIIIHHHHHII",
        *(_CENTRAL, _NEEDED, _NEEDED, _CRC_FOLLOWS, 0, 0, _DATE, crc, _MOST, _MOST),
        *(len(name), len(sizes), 0, 0, 0, 0, offset),
    )
    central += name + sizes
    descriptor = struct.pack("<IIQQ", _DESCRIPTOR, crc, size, size)
    start = len(before) + size + len(descriptor)
    end = struct.pack("<IQHHIIQQQQ", _END_64, 44, _NEEDED, _NEEDED, 0, 0, 4, 4, len(central), start)
    end += struct.pack("<IIQI", _LOCATOR, 0, start + len(central), 1)
    end += struct.pack("<IHHHHIIH", _END, 0, 0, 4, 4, len(central), _MOST, 0)
    return descriptor + central + end


def byte_count(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


@functools.lru_cache(maxsize=1024)
def _head(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What comes before the bytes, and what the directory at the end says of it."""
    before, central = b"", b""
    records = {"data.pkl": _pickled(dtype, shape), "byteorder": sys.byteorder.encode(), "version": b"3\n"}
    for name, data in records.items():
        path = f"archive/{name}".encode()
        known = struct.pack("<HHHHIIIH", 0, 0, 0, _DATE, zlib.crc32(data), len(data), len(data), len(path))
        central += struct.pack("<IHH", _CENTRAL, _NEEDED, _NEEDED) + known
        central += struct.pack("<HHHHII", 0, 0, 0, 0, 0, len(before)) + path
        before += struct.pack("<IH", _LOCAL, _NEEDED) + known + struct.pack("<H", 0) + path + data
    size = byte_count(dtype, shape)
    before += struct.pack(
        "<IHHHHHIIIHH", _LOCAL, _NEEDED, _CRC_FOLLOWS, 0, 0, _DATE, 0, _MOST, _MOST, len(_BYTES), 20
    )
    return before + _BYTES + struct.pack("<HHQQ", 1, 16, size, size), central


def _pickled(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    """``torch._utils._rebuild_tensor_v3(storage, 0, shape, strides, False, OrderedDict(), dtype)``."""
    strides = [math.prod(max(1, n) for n in shape[i + 1 :]) for i in range(len(shape))]
    storage = _text("storage") + b"ctorch.storage\nUntypedStorage\n" + _text("0") + _text("cpu")
    storage += number(byte_count(dtype, shape))
    arguments = b"(" + storage + b"tQ" + number(0) + _numbers(shape) + _numbers(strides) + b"\x89"
    arguments += b"ccollections\nOrderedDict\n)Rctorch\n" + str(dtype).removeprefix("torch.").encode() + b"\n"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n(" + arguments + b"tR."


def _numbers(values: tuple[int, ...] | list[int]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()
