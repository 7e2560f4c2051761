"""Makes ``tolaria._build`` importable where tolaria is not: without torch, or without an extension."""

from __future__ import annotations

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def expose() -> None:
    """Stand a bare ``tolaria`` in for the package, whose own ``__init__`` imports torch and the extension."""
    if "tolaria" not in sys.modules:
        package = types.ModuleType("tolaria", "A stand-in; see build_tools/bare_package.py.")
        package.__path__ = [str(ROOT / "tolaria")]
        sys.modules["tolaria"] = package


expose()
