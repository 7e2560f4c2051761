"""Shape rules of the ops that return tensors: for ``torch.compile``, ``torch.export``, meta tensors.

Ops that return nothing get theirs from torch, but for meta tensors. The checks are the reference's, in the
words of the kernels'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch._prims_common import _is_non_overlapping_and_dense_or_false

from tolaria.reference import _checks, blend, metrics, stats

_Function = TypeVar("_Function", bound=Callable[..., object])


def _fake(name: str) -> Callable[[_Function], _Function]:
    register: Callable[[_Function], _Function] = torch.library.register_fake(f"tolaria::{name}")
    return register


def _is_dense(tensor: Tensor) -> bool:
    """Whether some order of its dimensions is contiguous; no guard where the sizes are unknown."""
    return bool(_is_non_overlapping_and_dense_or_false(tensor.shape, tensor.stride()))


@_fake("blend")
def _blend(host: Tensor, seed: Tensor, alpha: Tensor) -> Tensor:
    blend.check_arguments(host, seed, alpha)
    return torch.empty_like(host)


@_fake("blend_backward")
def _blend_backward(
    grad: Tensor,
    host: Tensor | None,
    seed: Tensor | None,
    alpha: Tensor,
    seed_dtype: torch.dtype,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    _checks.check_floating("blend_backward", "grad", grad)
    _checks.check_alpha("blend_backward", alpha, "grad", grad)
    order = grad
    if not _is_dense(grad):
        is_host_dense = host is not None and _is_dense(host)
        order = host if host is not None and is_host_dense else torch.empty_like(grad)
    return (
        torch.empty_like(order) if output_mask[0] else None,
        torch.empty_like(order, dtype=seed_dtype) if output_mask[1] else None,
        alpha.new_empty(alpha.shape) if output_mask[2] else None,
    )


@_fake("blend_backward_")
def _blend_backward_inplace(
    grad: Tensor,
    host: Tensor | None,
    seed: Tensor | None,
    alpha: Tensor,
    seed_dtype: torch.dtype,
    output_mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    return _blend_backward(grad, host, seed, alpha, seed_dtype, [True, *output_mask])[1:]


@_fake("seed_gate")
def _seed_gate(features: Tensor, alpha: Tensor) -> Tensor:
    blend.check_gate_arguments(features, alpha)
    return torch.empty_like(features)


@_fake("seed_gate_backward")
def _seed_gate_backward(grad: Tensor, alpha: Tensor) -> Tensor:
    _checks.check_floating("seed_gate_backward", "grad", grad)
    _checks.check_alpha("seed_gate_backward", alpha, "grad", grad)
    return torch.empty_like(grad)


@_fake("seed_gate_backward_")
def _seed_gate_backward_inplace(grad: Tensor, alpha: Tensor) -> None:
    _seed_gate_backward(grad, alpha)


@_fake("straight_through")
def _straight_through(host: Tensor, seed: Tensor) -> Tensor:
    _checks.check_pair("straight_through", host, seed)
    return torch.empty_like(host)


@_fake("tensor_stats")
def _tensor_stats(tensors: list[Tensor | None]) -> Tensor:
    kept = stats.check_list(tensors)
    return kept[0][1].new_empty(4, dtype=torch.float64)


@_fake("classification_metrics_")
def _classification_metrics(
    acc: Tensor, logits: Tensor, labels: Tensor, ignore_index: int = -100, topk: int = 5
) -> None:
    metrics.check_arguments(acc, logits, labels, topk)
