"""Host networks with several injection points, and the registry of hosts.

A host is any module; one that lists ``injection_points`` (name to submodule path) can be grown by those
names.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tolaria.nn.seeds import attend

_HOSTS: dict[str, Callable[..., nn.Module]] = {}


def register_host(name: str, factory: Callable[..., nn.Module], *, replace: bool = False) -> None:
    """Make a host known under ``name``; ``factory(**options)`` builds it.

    Raises:
        ValueError: the name is empty or taken.  TypeError: ``factory`` is not callable.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"register_host: name: expected a non-empty string, got {name!r}")
    if not callable(factory):
        raise TypeError(f"register_host: factory: expected a callable, got {factory!r}")
    if name in _HOSTS and not replace:
        raise ValueError(f"register_host: name: {name!r} is taken; pass replace=True to replace it")
    _HOSTS[name] = factory


def create_host(name: str, **options: object) -> nn.Module:
    """Build the host registered under ``name``.

    Raises:
        ValueError: no such host; the message lists those there are.
    """
    if name not in _HOSTS:
        close = difflib.get_close_matches(str(name), _HOSTS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"create_host: name: expected one of {', '.join(sorted(_HOSTS))}, got {name!r}{hint}"
        )
    return _HOSTS[name](**options)


def list_hosts() -> list[str]:
    """Names of the registered hosts, sorted."""
    return sorted(_HOSTS)


class CNNHost(nn.Module):
    """A small convolutional classifier; per stage convolution, batch norm, ReLU, injection point, pooling.

    Args:
        in_channels: channels of the images.
        num_classes: classes to tell apart.
        widths: channels of each stage; the injection points are ``"stage0"``, ``"stage1"``, ...
        dropout: before the classifier.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        widths: Sequence[int] = (8, 16),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        channels = [in_channels, *widths]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in itertools.pairwise(channels)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels[-1], num_classes)

    @property
    def injection_points(self) -> Mapping[str, str]:
        """Name of each injection point, and the submodule behind which it lies."""
        return {f"stage{i}": f"stages.{i}" for i in range(len(self.stages))}

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        x = images_BCHW
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index + 1 < len(self.stages):
                x = F.max_pool2d(x, 2)
        return self.head(self.dropout(x.mean(dim=(2, 3))))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and perceptron, both residual, causal."""

    def __init__(self, width: int, heads: int, expansion: float, dropout: float) -> None:
        super().__init__()
        hidden = round(width * expansion)
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.mixed = nn.Identity()  # an injection point
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Same shape in and out."""
        mixed = attend(self.qkv(self.attention_norm(x_BTC)), self.heads, causal=True)
        x_BTC = self.mixed(x_BTC + self.dropout(self.project(mixed)))
        return x_BTC + self.dropout(self.mlp(self.mlp_norm(x_BTC)))  # type: ignore[no-any-return]


class TransformerHost(nn.Module):
    """A small causal language model over characters; the embedding is tied to the output layer.

    Args:
        vocabulary: number of different symbols.
        context: longest sequence.
        width: features per position.
        depth: number of blocks; the injection points are ``"attention0"`` (between attention and perceptron),
            ``"block0"`` (behind both), ``"attention1"``, ...
        heads: attention heads.
        expansion: hidden width of the perceptrons, in widths.
        dropout: on both residual branches.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int = 64,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        expansion: float = 2.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"TransformerHost: heads: expected a divisor of width {width}, got {heads}")
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, expansion, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        nn.init.normal_(self.position, std=0.02)
        self.head.weight = self.embedding.weight

    @property
    def injection_points(self) -> Mapping[str, str]:
        """Name of each injection point, and the submodule behind which it lies."""
        points = {}
        for i in range(len(self.blocks)):
            points[f"attention{i}"] = f"blocks.{i}.mixed"
            points[f"block{i}"] = f"blocks.{i}"
        return points

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Token ids (B, T), T <= context, to logits (B, T, vocabulary)."""
        length = tokens_BT.shape[1]
        if length > self.context:
            raise ValueError(f"TransformerHost: expected at most {self.context} tokens, got {length}")
        x_BTC = self.embedding(tokens_BT) + self.position[:length]
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.head(self.norm(x_BTC))  # type: ignore[no-any-return]


register_host("cnn", CNNHost)
register_host("transformer", TransformerHost)
