"""State dicts as JSON and a flat mapping of tensors, and back: what is written to disk holds no pickles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from tolaria.errors import SnapshotError
from tolaria.snapshot.wrapped import is_wrapper


class Live:
    """Stands for an object that only the running program has: a function, a module, an optimizer."""

    def __repr__(self) -> str:
        return "LIVE"


LIVE: Final = Live()

_DTYPES = {str(v): v for v in vars(torch).values() if isinstance(v, torch.dtype)}


def to_plain(value: object, is_live: Callable[[object], bool]) -> tuple[Any, dict[str, Tensor]]:
    """``value`` as JSON, with the tensors apart. NaN and infinity stay: :func:`persist.write` knows a form.

    Args:
        value: containers of numbers, strings, bytes, tensors, NumPy arrays, dtypes and devices, to any depth;
            tensors that wrap others are written as those and their class's name.
        is_live: which objects stay in the running program; :data:`LIVE` comes back in their place.

    Returns:
        The JSON value, and the tensors by the names that stand in it: their paths.

    Raises:
        SnapshotError: it holds something else; the message says where.
    """
    writer = _Writer(is_live)
    return writer.plain(value, ""), writer.tensors


class _Writer:
    def __init__(self, is_live: Callable[[object], bool]) -> None:
        self._is_live = is_live
        self.tensors: dict[str, Tensor] = {}
        self._named: dict[int, tuple[Tensor, str]] = {}
        """By the tensor's id, which stays its own as long as it is kept here."""

    def plain(self, value: object, path: str) -> Any:  # noqa: ANN401  (JSON)
        """``value`` as JSON; ``path`` is where it stands."""
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Tensor):
            return self._wrapped(value, path) if is_wrapper(value) else {"$tensor": self._name(value, path)}
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if isinstance(value, torch.Size):
            return {"$size": list(value)}
        if type(value) is list or type(value) is tuple:
            items = [self.plain(item, f"{path}/{i}") for i, item in enumerate(value)]
            return items if type(value) is list else {"$tuple": items}
        return self._rare(value, path)

    def _wrapped(self, value: Tensor, path: str) -> Any:  # noqa: ANN401  (JSON)
        names, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = [[name, self.plain(getattr(value, name), f"{path}/{name}")] for name in names]
        form = self.plain(context, f"{path}/context"), list(value.size()), list(value.stride())
        return {"$wrapped": [_class_name(type(value)), inner, *form]}

    def _rare(self, value: object, path: str) -> Any:  # noqa: ANN401  (JSON)
        if isinstance(value, bool | int | float | str):  # of a subclass: an enumeration's
            return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))
        if isinstance(value, set | frozenset):
            kind = "$set" if isinstance(value, set) else "$frozenset"
            return {kind: [self.plain(item, f"{path}/{i}") for i, item in enumerate(sorted(value, key=repr))]}
        if isinstance(value, complex):
            return {"$complex": [value.real, value.imag]}
        if isinstance(value, bytes):
            return {"$bytes": value.hex()}
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value)}
        if isinstance(value, torch.device):
            return {"$device": str(value)}
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            return {
                "$array": [str(value.dtype), list(value.shape), np.ascontiguousarray(value).tobytes().hex()]
            }
        if self._is_live(value):
            return {"$live": type(value).__name__}
        raise SnapshotError(
            f"{path.lstrip('/')}: expected numbers, strings, tensors and containers of such, got a "
            f"{type(value).__name__}, which cannot be written to disk; say it in plain values in state_dict()"
        )

    def _mapping(self, value: Mapping[Any, Any], path: str) -> Any:  # noqa: ANN401  (JSON)
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.plain(item, f"{path}/{key}") for key, item in value.items()}
        items = value.items()
        return {"$dict": [[self.plain(k, f"{path}/key"), self.plain(v, f"{path}/{k}")] for k, v in items]}

    def _name(self, tensor: Tensor, path: str) -> str:
        """The name of a tensor, which is written once however often it stands there."""
        if id(tensor) not in self._named:
            name = path.lstrip("/") or "tensor"
            if name in self.tensors:  # two paths that read alike
                name = f"{name}~{len(self.tensors)}"
            self._named[id(tensor)] = tensor, name
            self.tensors[name] = tensor.detach()
        return self._named[id(tensor)][1]


def from_plain(plain: object, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401  (whatever was written)
    """What :func:`to_plain` was given; mappings come back as dicts.

    Raises:
        SnapshotError: it is nothing that :func:`to_plain` returned.
    """
    try:
        return _Reader(tensors).value(plain)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise SnapshotError(f"the document of a snapshot is damaged ({error!r})") from error


class _Reader:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def value(self, plain: object) -> Any:  # noqa: ANN401  (whatever was written)
        """The value of a piece of JSON."""
        if plain is None or isinstance(plain, bool | int | float | str):
            return plain
        if isinstance(plain, list):
            return [self.value(item) for item in plain]
        if not isinstance(plain, dict):
            raise TypeError(f"expected JSON, got {type(plain).__name__}")
        kind = next(iter(plain), "")
        if not kind.startswith("$"):
            return {key: self.value(item) for key, item in plain.items()}
        if len(plain) != 1:
            raise ValueError(f"{kind}: expected no other key beside it")
        return self._marked(kind, plain[kind])

    def _marked(self, kind: str, inner: Any) -> Any:  # noqa: ANN401  (JSON in, whatever was written out)
        if kind == "$tensor":
            return self._tensors[inner]
        if kind == "$dict":
            return {self.value(key): self.value(item) for key, item in inner}
        if kind == "$live":
            return LIVE
        if kind == "$bytes":
            return bytes.fromhex(inner)
        if kind == "$dtype":
            return _DTYPES[inner]
        if kind == "$device":
            return torch.device(str(inner))
        if kind == "$array":
            return _array(*inner)
        if kind == "$wrapped":
            name, parts, context, size, stride = inner
            found = {str(key): self.value(part) for key, part in parts}
            return _wrapped(name, found, self.value(context), torch.Size(size), tuple(stride))
        items = [self.value(item) for item in inner]
        makes: dict[str, Callable[[list[Any]], Any]] = {
            "$tuple": tuple,
            "$set": set,
            "$frozenset": frozenset,
            "$size": torch.Size,
            "$complex": lambda parts: complex(*parts),
        }
        return makes[kind](items)


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _wrapped(
    name: str, inner: dict[str, Tensor], context: object, size: torch.Size, stride: tuple[int, ...]
) -> Tensor:
    """A tensor that wraps others, of a class that torch's own loading of untrusted files would make."""
    allowed = (each for each in torch.serialization.get_safe_globals() if isinstance(each, type))
    kinds = (each for each in allowed if issubclass(each, Tensor) and hasattr(each, "__tensor_unflatten__"))
    kind: Any = next((each for each in kinds if _class_name(each) == name), None)
    if kind is None:
        raise SnapshotError(
            f"the snapshot holds a tensor of the class {name}, which is not among those that may be made: "
            "import its package, or allow it by torch.serialization.add_safe_globals"
        )
    try:
        made: Tensor = kind.__tensor_unflatten__(inner, context, size, stride)
    except Exception as error:
        raise ValueError(f"{name} refused its parts: {error!r}") from error
    return made


def _array(dtype: str, shape: list[int], content: str) -> np.ndarray[Any, Any]:
    kind = np.dtype(dtype)
    if kind.kind not in "biufc":
        raise ValueError(f"expected a numeric dtype, got {dtype}")
    return np.frombuffer(bytes.fromhex(content), dtype=kind).reshape(shape).copy()
