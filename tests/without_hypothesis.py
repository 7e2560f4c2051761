"""A stand-in for hypothesis on machines that lack it: property tests are skipped by name, all others run."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest


class _Anything:
    """A strategy, or what makes one; nothing is ever drawn from it."""

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: object, **__: object) -> _Anything:
        return self

    def __or__(self, other: object) -> _Anything:
        return self


class _Settings:
    """``settings`` as a decorator leaves a test what it is."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, test: Any) -> Any:
        return test

    @staticmethod
    def register_profile(*_: object, **__: object) -> None:
        pass

    @staticmethod
    def load_profile(*_: object) -> None:
        pass


def install() -> None:
    """Be ``hypothesis`` and ``hypothesis.strategies`` for whatever imports them from now on."""
    package, strategies = ModuleType("hypothesis"), ModuleType("hypothesis.strategies")
    strategies.__getattr__ = lambda name: getattr(_Anything(), name)  # type: ignore[method-assign]
    package.given = lambda *_, **__: pytest.mark.skip(reason="needs hypothesis, which is not installed")
    package.example = lambda *_, **__: lambda test: test
    package.settings, package.HealthCheck, package.strategies = _Settings, _Anything(), strategies
    sys.modules |= {"hypothesis": package, "hypothesis.strategies": strategies}
