"""The only importer of the compiled extension ``tolaria._C``."""

from __future__ import annotations

import importlib

LOAD_ERROR: Exception | None = None
"""Why the extension could not be loaded (None when it is loaded)."""

try:
    importlib.import_module("tolaria._C")
except ImportError as error:
    LOAD_ERROR = error

LOADED: bool = LOAD_ERROR is None
CUDA: bool = False
"""True when the loaded extension holds CUDA kernels."""
