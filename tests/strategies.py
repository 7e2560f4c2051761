"""What the property tests draw from: dtypes, memory layouts, shapes, alphas; and the tolerance rule."""

from __future__ import annotations

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


def _size(shape: list[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def assert_as_good(result: Tensor, reference: Tensor, exact: Tensor) -> None:
    """``err(result) <= 2 err(reference) + 2 ulp`` elementwise, both against ``exact``; NaN where it is."""
    result64, reference64 = result.double().cpu(), reference.double().cpu()
    exact = exact.double().cpu()
    info = torch.finfo(result.dtype)
    ulp = (exact.abs() * info.eps).clamp(min=info.smallest_normal * info.eps)
    allowed = 2 * (reference64 - exact).abs() + 2 * ulp
    worse = (
        ~((result64 - exact).abs() <= allowed) & ~(result64 == exact) & ~(result64.isnan() & exact.isnan())
    )
    overflowed = result64.isinf() & (exact.abs() > info.max)
    worse &= ~overflowed
    got, wanted = result64[worse][:3].tolist(), exact[worse][:3].tolist()
    assert not worse.any(), f"{int(worse.sum())} elements off: got {got}, exact {wanted}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal values and, for NaN, equal places; -0.0 and 0.0 are told apart."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach().cpu(), b.detach().cpu()
    nan = a.isnan() & b.isnan()
    return bool((nan | ((a == b) & (a.signbit() == b.signbit()))).all())
