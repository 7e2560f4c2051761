"""tolaria: keep networks that grow while they train alive, at no cost."""

from tolaria._backend import backend, current_mode

__version__ = "0.1.0"

__all__ = ["__version__", "backend", "current_mode"]
