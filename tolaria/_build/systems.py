"""Where the extension is built at all."""

from __future__ import annotations

import sys


def unsupported_system(platform: str = sys.platform) -> str | None:
    """Why there is no extension on this system, in a sentence; None on Linux."""
    if platform == "linux":
        return None
    name = {"darwin": "macOS", "win32": "Windows"}.get(platform, platform)
    return f"expected Linux, got {name}, where every op runs in pure PyTorch; install with TOLARIA_BUILD=0"
