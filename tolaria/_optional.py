"""Optional packages: imported where they are needed, with one error that says how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType

from tolaria.errors import MissingDependencyError


def require(module: str, *, feature: str, package: str, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: what to import, ``"sklearn.datasets"``.
        feature: what needs it, as the error names it.
        package: the distribution's name, ``"scikit-learn"``.
        extra: tolaria's extra that brings it.

    Raises:
        MissingDependencyError: the package is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{feature} needs {package}, which cannot be imported ({error}); run "
            f'pip install {package}, or pip install ".[{extra}]" in a checkout of tolaria'
        ) from error
