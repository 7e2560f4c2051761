"""Fused ops, usable alone on any model; ``tolaria.backend`` chooses the implementation."""

from tolaria import _extension

if _extension.LOADED:
    from tolaria.ops import _fake as _fake  # registers the shape rules
from tolaria.ops.blend import blend, seed_gate
from tolaria.ops.straight_through import straight_through

__all__ = ["blend", "seed_gate", "straight_through"]
