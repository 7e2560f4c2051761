"""What the property tests draw from: dtypes, memory layouts, shapes, alphas; and the tolerance rule."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DTYPE_IDS = ["f32", "f64", "f16", "bf16"]

LAYOUTS = ["contiguous", "channels_last", "permuted", "strided", "expanded", "offset"]


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A tensor equal to ``values`` in the named memory layout, as far as its shape allows one."""
    if values.dim() == 0:
        return values.clone()
    if layout == "channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return values.contiguous(memory_format=formats.get(values.dim(), torch.contiguous_format))
    if layout == "permuted":  # dense, in reversed memory order
        return (
            values.permute(*reversed(range(values.dim())))
            .contiguous()
            .permute(*reversed(range(values.dim())))
        )
    if layout == "strided":  # every second element
        room = torch.full((*values.shape[:-1], 2 * values.shape[-1]), 7.0).to(values)
        room[..., ::2] = values
        return room[..., ::2]
    if layout == "expanded":  # stride 0 along the first dimension
        return values[:1].expand(values.shape) if values.shape[0] else values
    if layout == "offset":  # dense, but starting one element into its storage: unaligned
        room = torch.empty(values.numel() + 1, dtype=values.dtype, device=values.device)
        room[1:] = values.reshape(-1)
        return room[1:].view(values.shape)
    return values.contiguous()


def alpha_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Shapes that broadcast to ``shape``: scalar, leading, per dimension, holes, full."""
    shapes: list[tuple[int, ...]] = [()]
    for mask in range(2 ** len(shape)):
        chosen = tuple(n if mask >> d & 1 else 1 for d, n in enumerate(shape))
        shapes.append(chosen)
        shapes.append(chosen[1:])
    return sorted(set(shapes))


@st.composite
def blend_cases(draw: st.DrawFn) -> dict[str, object]:
    """Shape, dtypes, layouts, and alpha's shape and dtype."""
    shape = tuple(
        draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 33]), max_size=5).filter(lambda s: _size(s) < 40000))
    )
    return {
        "shape": shape,
        "host_dtype": draw(st.sampled_from(DTYPES)),
        "seed_dtype": draw(st.sampled_from(DTYPES)),
        "alpha_dtype": draw(st.sampled_from(DTYPES)),
        "host_layout": draw(st.sampled_from(LAYOUTS)),
        "seed_layout": draw(st.sampled_from(LAYOUTS)),
        "grad_layout": draw(st.sampled_from(LAYOUTS)),
        "alpha_shape": draw(st.sampled_from(alpha_shapes(shape))),
        "alpha_layout": draw(st.sampled_from(LAYOUTS)),
        "rng_seed": draw(st.integers(0, 2**16)),
    }


def case_tensors(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Host, seed, alpha and grad of a case of :func:`blend_cases`."""
    torch.manual_seed(case["rng_seed"])
    shape = case["shape"]
    host = laid_out(torch.randn(shape).to(case["host_dtype"]), case["host_layout"])
    seed = laid_out(torch.randn(shape).to(case["seed_dtype"]), case["seed_layout"])
    grad = laid_out(torch.randn(shape).to(case["host_dtype"]), case["grad_layout"])
    alpha = torch.randint(-2, 7, case["alpha_shape"]) / 4  # -0.5 to 1.5, both ends and the middle hit exactly
    return host, seed, laid_out(alpha.to(case["alpha_dtype"]), case["alpha_layout"]), grad


def _size(shape: list[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal values and, for NaN, equal places; -0.0 and 0.0 are told apart."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach().cpu(), b.detach().cpu()
    nan = a.isnan() & b.isnan()
    return bool((nan | ((a == b) & (a.signbit() == b.signbit()))).all())
