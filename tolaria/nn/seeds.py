"""Seed blueprints: a registry of small modules to graft.

A built-in seed is the identity at birth: ``x + f(x)`` (or ``x * g(x)``) whose last layer starts at zero, so
that ``seed(x) == x`` when it is grafted. One of your own is what you make it. Blueprints for images read
``(B, C, H, W)``, blueprints for sequences ``(B, T, C)``, blueprints for vectors ``(B, C)``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layout = Literal["image", "sequence", "vector", "any"]


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A registered way to build a seed."""

    name: str
    """What :meth:`SeedSlot.germinate` is told."""
    factory: Callable[..., nn.Module]
    """``factory(channels, **options)``, or ``factory(features, **options)`` when ``layout`` is ``"any"``."""
    layout: Layout
    """``"image"`` for (B, C, H, W), ``"sequence"`` for (B, T, C), ``"vector"`` for (B, C), ``"any"`` for a
    factory that looks for itself."""
    summary: str
    """One line for people."""


_BLUEPRINTS: dict[str, Blueprint] = {}
_SHAPES = {"image": (4, 1, "(B, C, H, W)"), "sequence": (3, 2, "(B, T, C)"), "vector": (2, 1, "(B, C)")}


def register_blueprint(
    name: str,
    factory: Callable[..., nn.Module],
    *,
    layout: Layout = "any",
    summary: str = "",
    replace: bool = False,
) -> Blueprint:
    """Make a blueprint known under ``name``.

    Args:
        name: what ``germinate`` is told.
        factory: called as ``factory(channels, **options)``; with ``layout="any"`` as ``factory(features,
            **options)``.
        layout: which features it is for; the number of dimensions is checked at germination.
        summary: one line for people.
        replace: whether an existing blueprint of that name may be replaced.

    Raises:
        ValueError: the name is empty or taken, or the layout unknown.  TypeError: ``factory`` is not
            callable.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"register_blueprint: name: expected a non-empty string, got {name!r}")
    if not callable(factory):
        raise TypeError(f"register_blueprint: factory: expected a callable, got {factory!r}")
    if layout not in get_args(Layout):
        raise ValueError(f"register_blueprint: layout: expected one of {get_args(Layout)}, got {layout!r}")
    if name in _BLUEPRINTS and not replace:
        raise ValueError(f"register_blueprint: name: {name!r} is taken; pass replace=True to replace it")
    _BLUEPRINTS[name] = Blueprint(name, factory, layout, summary)
    return _BLUEPRINTS[name]


def get_blueprint(name: str) -> Blueprint:
    """The blueprint registered under ``name``.

    Raises:
        ValueError: no such blueprint; the message lists those there are.
    """
    if name not in _BLUEPRINTS:
        close = difflib.get_close_matches(str(name), _BLUEPRINTS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"blueprint: expected one of {', '.join(sorted(_BLUEPRINTS))}, got {name!r}{hint}")
    return _BLUEPRINTS[name]


def list_blueprints(layout: Layout | None = None) -> list[str]:
    """Names of the registered blueprints, sorted; those for ``layout`` only, if given."""
    return sorted(name for name, each in _BLUEPRINTS.items() if layout in (None, each.layout))


def build_seed(
    blueprint: str | Callable[[Tensor], nn.Module],
    features: Tensor,
    *,
    rng_seed: int,
    options: Mapping[str, object],
    where: str,
) -> nn.Module:
    """Build a seed for ``features``, initialised from ``rng_seed``; the caller preserves the random streams.

    The module is built on the CPU, so that a seed is the same whatever the device, and then takes on the
    device, dtype and memory format of ``features``.

    Raises:
        ValueError: unknown blueprint or features of the wrong layout.
        TypeError: bad options, or the blueprint did not build a module.
    """
    torch.default_generator.manual_seed(rng_seed)
    with torch.device("cpu"):
        seed = _call_factory(blueprint, features, options, where)
    if not isinstance(seed, nn.Module):
        raise TypeError(f"{where}: expected the blueprint to build an nn.Module, got {type(seed).__name__}")
    seed.to(device=features.device, dtype=features.dtype)
    is_nhwc = features.dim() == 4 and features.is_contiguous(memory_format=torch.channels_last)
    if is_nhwc and not features.is_contiguous():
        seed.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return seed


def describe_seed(
    blueprint: str, features: Tensor, options: Mapping[str, object], *, where: str
) -> nn.Module:
    """The seed that :func:`build_seed` would build, on the meta device: names, shapes and dtypes, no memory.

    Raises:
        ValueError, TypeError: as :func:`build_seed`; also for a blueprint that needs values to build a seed.
    """
    try:
        with torch.device("meta"):
            seed = _call_factory(blueprint, features.to("meta"), options, where)
    except (ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"{where}: blueprint {blueprint!r} cannot be built with options {dict(options)}: {error}"
        ) from error
    if not isinstance(seed, nn.Module):
        raise TypeError(f"{where}: expected the blueprint to build an nn.Module, got {type(seed).__name__}")
    return seed


def _call_factory(
    blueprint: str | Callable[[Tensor], nn.Module],
    features: Tensor,
    options: Mapping[str, object],
    where: str,
) -> object:
    if not isinstance(blueprint, str):
        if not callable(blueprint):
            raise TypeError(f"{where}: blueprint: expected a name or a callable, got {blueprint!r}")
        return blueprint(features, **options)
    known = get_blueprint(blueprint)
    if known.layout == "any":
        return _built(known, features, options, where)
    dims, channel_dim, shape = _SHAPES[known.layout]
    if features.dim() != dims:
        raise ValueError(
            f"{where}: blueprint {blueprint!r} expected features {shape}, got shape {tuple(features.shape)}; "
            f"for {features.dim()}-dim features choose another or register your own"
        )
    return _built(known, features.shape[channel_dim], options, where)


def _built(blueprint: Blueprint, argument: Tensor | int, options: Mapping[str, object], where: str) -> object:
    try:
        return blueprint.factory(argument, **options)
    except (TypeError, ValueError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(
            f"{where}: blueprint {blueprint.name!r} cannot be built with options {dict(options)}: {error}"
        ) from error


# ---------------------------------------------------------------------- images


class ConvResidual(nn.Module):
    """``x + conv(relu(norm(conv(x))))``: 3x3 convolutions through ``expansion * channels`` features."""

    def __init__(self, channels: int, expansion: float = 2.0) -> None:
        super().__init__()
        hidden = max(1, round(channels * expansion))
        self.expand = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.project = nn.Conv2d(hidden, channels, 3, padding=1)
        _zero(self.project)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Same shape in and out."""
        return x_BCHW + self.project(F.relu(self.norm(self.expand(x_BCHW))))  # type: ignore[no-any-return]


class DepthwiseResidual(nn.Module):
    """``x + pointwise(relu(norm(depthwise(x))))``: few parameters, a wide view."""

    def __init__(self, channels: int, kernel: int = 5) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd integer >= 1, got {kernel!r}")
        self.depthwise = nn.Conv2d(
            channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False
        )
        self.norm = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)
        _zero(self.pointwise)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Same shape in and out."""
        return x_BCHW + self.pointwise(F.relu(self.norm(self.depthwise(x_BCHW))))  # type: ignore[no-any-return]


class SqueezeExcite(nn.Module):
    """``x * 2 sigmoid(f(mean of x))``: channels weighted by what the whole image shows."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)
        _zero(self.excite)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Same shape in and out."""
        weights = self.excite(F.relu(self.squeeze(x_BCHW.mean(dim=(2, 3)))))
        return x_BCHW * (2.0 * torch.sigmoid(weights))[:, :, None, None]


class NormResidual(nn.Module):
    """``x + gain * groupnorm(x) + bias``, gain and bias starting at zero."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        _zero(self.norm)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Same shape in and out."""
        # Contiguous, since group norm's channels_last backward crashes the process (torch 2.13 and 2.14) when
        # its input wants no gradient, as the detached features of an incubating seed do.
        return x_BCHW + self.norm(x_BCHW.contiguous())  # type: ignore[no-any-return]


# ------------------------------------------------------------------- sequences


class MLPResidual(nn.Module):
    """``x + W2 dropout(gelu(W1 norm(x)))`` through ``expansion * channels`` features."""

    def __init__(self, channels: int, expansion: float = 2.0, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = max(1, round(channels * expansion))
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, hidden)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(hidden, channels)
        _zero(self.project)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C), or (B, C): same shape in and out."""
        return x_BTC + self.project(self.dropout(F.gelu(self.expand(self.norm(x_BTC)))))  # type: ignore[no-any-return]


class LowRank(nn.Module):
    """``x + B A x`` with ``rank`` features between: the smallest seed that mixes channels."""

    def __init__(self, channels: int, rank: int = 8) -> None:
        super().__init__()
        self.down = nn.Linear(channels, rank, bias=False)
        self.up = nn.Linear(rank, channels, bias=False)
        _zero(self.up)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C), or (B, C): same shape in and out."""
        return x_BTC + self.up(self.down(x_BTC))  # type: ignore[no-any-return]


class AttentionResidual(nn.Module):
    """``x + W attention(norm(x))``, causal unless told otherwise."""

    def __init__(self, channels: int, heads: int = 4, causal: bool = True) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"attention seed: heads: expected a divisor of {channels} channels, got {heads}")
        self.heads, self.causal = heads, causal
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.project = nn.Linear(channels, channels)
        _zero(self.project)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Same shape in and out."""
        return x_BTC + self.project(attend(self.qkv(self.norm(x_BTC)), self.heads, self.causal))  # type: ignore[no-any-return]


def attend(qkv_BTF: Tensor, heads: int, causal: bool) -> Tensor:
    """Multi-head attention over packed queries, keys and values: (B, T, 3C) to (B, T, C)."""
    batch, length, packed = qkv_BTF.shape
    queries, keys, values = qkv_BTF.view(batch, length, 3, heads, packed // (3 * heads)).permute(
        2, 0, 3, 1, 4
    )
    mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
    return mixed.transpose(1, 2).reshape(batch, length, packed // 3)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


register_blueprint("conv", ConvResidual, layout="image", summary="residual pair of 3x3 convolutions")
register_blueprint(
    "depthwise", DepthwiseResidual, layout="image", summary="depthwise 5x5, then 1x1, residual"
)
register_blueprint(
    "squeeze_excite", SqueezeExcite, layout="image", summary="channel weights from the global mean"
)
register_blueprint("norm", NormResidual, layout="image", summary="group norm, residual")
register_blueprint(
    "mlp", MLPResidual, layout="sequence", summary="two-layer perceptron per position, residual"
)
register_blueprint("low_rank", LowRank, layout="sequence", summary="low-rank channel mixing, residual")
register_blueprint(
    "attention", AttentionResidual, layout="sequence", summary="causal self-attention, residual"
)
register_blueprint("dense", MLPResidual, layout="vector", summary="two-layer perceptron, residual")
register_blueprint("dense_low_rank", LowRank, layout="vector", summary="low-rank channel mixing, residual")
