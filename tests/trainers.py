"""What the tests of the adapters share: packages that may be absent, and a look into checkpoints."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


def need(module: str) -> Any:
    """Import a package with whatever it warns of; skip the test, or the module of tests, if it is absent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != module.partition(".")[0]:
                raise
            pytest.skip(f"needs {module}, which is not installed", allow_module_level=True)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers; numbers count as tensors."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, float):
        yield torch.tensor(value)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)


def is_poisoned(value: Any) -> bool:
    """Whether anything in it is not finite."""
    return any(not bool(t.isfinite().all()) for t in tensors_in(value) if t.is_floating_point())


def poisoned_files(folder: Path, *patterns: str) -> list[str]:
    """The names of the checkpoints below ``folder`` that hold NaN or infinity; there must be some."""
    found = sorted(path for pattern in patterns for path in folder.rglob(pattern))
    assert found, f"no checkpoint in {folder}"
    bad = []
    for path in found:
        if path.suffix == ".safetensors":
            value = importlib.import_module("safetensors.torch").load_file(path)
        else:
            value = torch.load(path, map_location="cpu", weights_only=False)
        if is_poisoned(value):
            bad.append(str(path.relative_to(folder)))
    return bad


def same(one: Any, other: Any) -> bool:
    """Whether two nests of tensors are equal bit for bit, NaN and the sign of zero included."""
    ones, others = list(tensors_in(one)), list(tensors_in(other))
    return len(ones) == len(others) and all(
        a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)
        for a, b in zip(ones, others, strict=True)
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
