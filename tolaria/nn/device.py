"""Device names, checked before anything is built on them."""

from __future__ import annotations

import re

import torch

SUPPORTED = ("cpu", "cuda")
_FORM = re.compile(r"([a-z_]+)(?::(\d+))?")


def validate_device(device: str | torch.device) -> torch.device:
    """The device that ``device`` names, if it is there.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or a :class:`torch.device`.

    Returns:
        The device; ``"cuda"`` becomes the current CUDA device, index and all.

    Raises:
        TypeError: neither a string nor a torch.device.
        ValueError: the string is malformed, or the device type is not one that tolaria supports.
        RuntimeError: this machine or this torch has no such device, or not so many of them.
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device: expected a string such as 'cuda:0' or a torch.device, got {device!r}")
    match = _FORM.fullmatch(str(device))
    if match is None:
        raise ValueError(
            f"device: expected '<type>' or '<type>:<index>' such as 'cpu' or 'cuda:0', got {device!r}"
        )
    kind, index = match[1], int(match[2]) if match[2] else None
    if kind not in SUPPORTED:
        raise ValueError(f"device: expected a device of type {' or '.join(SUPPORTED)}, got type {kind!r}")
    if kind == "cpu":
        if index:
            raise RuntimeError(f"device: there is one CPU device, got {str(device)!r}; use 'cpu'")
        return torch.device("cpu")
    return _cuda_device(index)


def _cuda_device(index: int | None) -> torch.device:
    if torch.version.cuda is None:
        raise RuntimeError(
            f"device: this torch ({torch.__version__}) was built without CUDA; "
            "install a CUDA build of torch, or use 'cpu'"
        )
    count = torch.cuda.device_count()
    if count == 0 or not torch.cuda.is_available():
        raise RuntimeError(
            "device: torch finds no CUDA device on this machine; check the driver (nvidia-smi) and "
            "CUDA_VISIBLE_DEVICES, or use 'cpu'"
        )
    if index is None:
        index = torch.cuda.current_device()
    if index >= count:
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise RuntimeError(
            f"device: index {index} is out of range, {count} CUDA device(s) found; use {there}"
        )
    return torch.device("cuda", index)
