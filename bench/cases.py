"""Parameters that the benches share."""

import pytest


def sizes(quick, full):
    """Parameters for sizes: those of ``full`` that are not in ``quick`` run only without ``--quick``."""
    return [size if size in quick else pytest.param(size, marks=pytest.mark.slow) for size in full]


def named(size):
    """``8 MiB`` for 8388608."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size} B"
