"""Trainings whose loss is no plain mean over labelled samples: text, a game of two networks, a policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arena.learners import Learner, Spoil, points, untouched

CONTEXT = 32


@cache
def text() -> tuple[Tensor, Tensor, int]:
    """Characters of Python's own documentation: training, validation, how many kinds there are."""
    from tolaria.tasks.text import load_corpus

    corpus = load_corpus()
    return corpus.train, corpus.validation, len(corpus.symbols)


class Transformer(nn.Module):
    """Two layers, causal, on characters."""

    def __init__(self, symbols: int, width: int = 48) -> None:
        super().__init__()
        self.symbol, self.place = nn.Embedding(symbols, width), nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next character at each place."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        hidden = self.symbol(x) + self.place.weight[: x.shape[1]]
        return self.head(self.norm(self.layers(hidden, mask=mask, is_causal=True)))


class Text(Learner):
    """The next character; AdamW. Of a spoiled batch only the labels are."""

    def _build(self) -> None:
        *_, symbols = text()
        self.model = Transformer(symbols)
        self.optimizers = [torch.optim.AdamW(self.parameters(), self.rate)]
        self.random_guess_loss = math.log(symbols)

    @staticmethod
    def _windows(source: Tensor, starts: Tensor) -> Tensor:
        return source[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]

    def gradients(self, step: int, spoil: Spoil = untouched, times: float = 1.0) -> Tensor:
        train, _, _ = text()
        starts = torch.randint(len(train) - CONTEXT, (self.batch,), generator=self.draw(step))
        windows = self._windows(train, starts)
        _, y = spoil((windows[:, :-1].float(), windows[:, 1:]))
        logits = self.model(windows[:, :-1])
        return self._backward(F.cross_entropy(logits.flatten(0, 1), y.flatten()), times)

    @torch.no_grad()
    def score(self) -> float:
        _, validation, _ = text()
        starts = torch.linspace(0, len(validation) - CONTEXT - 1, 64).long()
        windows = self._windows(validation, starts)
        output = self.model(windows[:, :-1])
        right = (output.argmax(2) == windows[:, 1:]) & output.isfinite().all(2)
        return points(float(right.float().mean()))


class Ring(Learner):
    """Two networks that play for eight points on a ring; two Adams, the sum of both losses is judged."""

    def _build(self) -> None:
        generator = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
        critic = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        self.model = nn.ModuleDict({"critic": critic, "generator": generator})
        self.optimizers = [
            torch.optim.Adam(part.parameters(), self.rate, betas=(0.5, 0.9)) for part in (generator, critic)
        ]

    @staticmethod
    def _real(count: int, source: torch.Generator) -> Tensor:
        angle = torch.randint(8, (count,), generator=source) * (math.pi / 4)
        return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2, generator=source)

    def gradients(self, step: int, spoil: Spoil = untouched, times: float = 1.0) -> Tensor:
        source = self.draw(step)
        real, _ = spoil((self._real(self.batch, source), torch.zeros(0)))
        noise = torch.randn(self.batch, 8, generator=source)
        generator, critic = self.model["generator"], self.model["critic"]
        made = generator(noise)
        of_critic = F.softplus(-critic(real)).mean() + F.softplus(critic(made.detach())).mean()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        of_generator = F.softplus(-critic(made)).mean()
        (times * of_generator).backward()  # type: ignore[no-untyped-call]
        self.optimizers[1].zero_grad()
        (times * of_critic).backward()  # type: ignore[no-untyped-call]
        return (of_critic + of_generator).detach()

    @torch.no_grad()
    def score(self) -> float:
        """One less the energy distance between what is made and what is real."""
        source = torch.Generator().manual_seed(3)
        real, made = self._real(512, source), self.model["generator"](torch.randn(512, 8, generator=source))
        between = torch.cdist(made, real).mean()
        within = 0.5 * (torch.cdist(made, made).mean() + torch.cdist(real, real).mean())
        return points(1.0 - float(between - within))


class Policy(Learner):
    """A policy gradient: five arms, whose rewards a context decides. The surrogate loss is around zero."""

    def _build(self) -> None:
        self.model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 5))
        self.optimizers = [torch.optim.Adam(self.parameters(), self.rate)]
        source = torch.Generator().manual_seed(11)
        self._arms = torch.randn(16, 5, generator=source)

    def gradients(self, step: int, spoil: Spoil = untouched, times: float = 1.0) -> Tensor:
        source = self.draw(step)
        context = torch.randn(self.batch, 16, generator=source)
        rewards = context @ self._arms + torch.randn(self.batch, 5, generator=source)
        context, rewards = spoil((context, rewards))
        logits = self.model(context).log_softmax(1)
        uniform = torch.rand(self.batch, 5, generator=source)
        chosen = (logits.detach() - (-uniform.log()).log()).argmax(
            1, keepdim=True
        )  # Gumbel: a draw of the policy
        reward = rewards.gather(1, chosen).squeeze(1)
        surrogate = -(logits.gather(1, chosen).squeeze(1) * (reward - reward.mean())).mean()
        return self._backward(surrogate, times)

    @torch.no_grad()
    def score(self) -> float:
        """The expected reward, between guessing and the best arm."""
        context = torch.randn(1024, 16, generator=torch.Generator().manual_seed(5))
        rewards = context @ self._arms
        expected = (self.model(context).softmax(1) * rewards).sum(1).mean()
        return points(float(expected / rewards.max(1).values.mean()))

    def last_layer(self) -> Sequence[nn.Parameter]:
        return list(self.model[-1].parameters())
