"""Modules that were elsewhere before: the former paths work for one more version, with a warning.

Code may import them, and pickles name them. A finder at the end of ``sys.meta_path``, which is asked only for
what nobody else has found, answers for the names in :data:`MOVED` and for no others.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import FrameType, ModuleType

_G, _S, _T = "tolaria.governor.", "tolaria.snapshot.", "tolaria.telemetry."

MOVED: dict[str, tuple[str, ...]] = {
    **{
        _G + name: (_S + name,)
        for name in (
            *("arena", "coverage", "flight", "fresh_state", "graphs", "host_parts", "loose_state", "memory"),
            *("place", "rng", "schedules", "slots", "undo", "watch"),
        )
    },
    _G + "attach": (
        *(_S + "parts", _G + "attachment", _G + "row", _G + "config"),
        "tolaria._arguments",
    ),
    _G + "events": (_T + "events", _T + "mailbox"),
    _G + "sinks": (_T + "sinks",),
    _G + "telemetry": (_T + "delivery",),
    _G + "verdict": (_T + "verdict",),
    _G + "tracked": (_S + "covered", _S + "protocols"),
    _G + "host_state": (_S + "host_state", _S + "grad_scaler"),
    _G + "finite_state": (_S + "finite_state", _G + "judging"),
}
"""Former path, and where its names are now: in the first module that has them."""

RENAMED = {"TrackedState": "CoveredState", "TrackedTensor": "CoveredTensor"}
"""Names in those modules that are others now."""


class _Former(ModuleType):
    """Stands for a module whose names are in several now."""

    def __getattr__(self, name: str) -> object:
        for home in MOVED[self.__name__]:
            module = importlib.import_module(home)
            for wanted in (name, RENAMED.get(name, name)):
                if hasattr(module, wanted):
                    return getattr(module, wanted)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the former paths, and gives what is there now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_loader(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Former(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        name, homes = module.__name__, MOVED[module.__name__]
        _warn(f"{name} has moved to {' and '.join(homes)}; the former path goes with the next version")
        if len(homes) == 1:  # the very module, so that what is set in the one is set in the other
            sys.modules[name] = importlib.import_module(homes[0])


_FINDER = _Finder()


def install() -> None:
    """Answer for the former paths from here on."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)


def submodule(package: str, name: str) -> ModuleType:
    """For the package's ``__getattr__``: its former submodule ``name``, though nobody has imported it.

    Raises:
        AttributeError: there was none.
    """
    if f"{package}.{name}" not in MOVED:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return importlib.import_module(f"{package}.{name}")


def _warn(message: str) -> None:
    """Warn of whoever imports: the first frame that is neither here nor in the machinery of imports."""
    frame: FrameType | None = sys._getframe(1)
    own = (__name__, "importlib", *{name.rpartition(".")[0] for name in MOVED})
    while frame is not None and frame.f_back is not None:
        module = frame.f_globals.get("__name__", "")
        if module not in own and not module.startswith("importlib."):
            break
        frame = frame.f_back
    assert frame is not None
    file, line, names = frame.f_code.co_filename, frame.f_lineno, frame.f_globals
    registry = names.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, DeprecationWarning, file, line, names.get("__name__", file), registry)
