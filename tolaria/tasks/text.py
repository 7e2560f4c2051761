"""Characters of Python's own documentation (``pydoc_data.topics``): a language model without a download."""

from __future__ import annotations

import functools
import importlib
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tolaria.errors import MissingDependencyError
from tolaria.nn.host import create_host
from tolaria.tasks.data import TaskData, WindowBatches
from tolaria.tasks.spec import TaskSpec, TrainSettings

CONTEXT = 64
_TEST_PART, _VALIDATION_PART, _LONG_PART = 0.10, 0.05, 0.02


@dataclass(frozen=True, slots=True)
class Corpus:
    """The text as numbers."""

    symbols: str
    """Every character that occurs, in order of its number."""
    train: Tensor
    """(N,) int64."""
    validation: Tensor
    """(M,) int64, topics that are in no other part."""
    test: Tensor
    """(K,) int64, topics that are in no other part."""

    def unigram_entropy(self) -> float:
        """Entropy of a single character of the held-out test part, in nats."""
        counts = torch.bincount(self.test, minlength=len(self.symbols)).double()
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * shares.log()).sum())


@functools.cache
def load_corpus() -> Corpus:
    """Read the topics of Python's own help, whole topics to each part.

    Raises:
        MissingDependencyError: this Python came without ``pydoc_data``.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise MissingDependencyError(
            "the text task needs pydoc_data.topics, which this Python came without; install the full "
            "standard library (on Debian: libpython3-stdlib), or register a task of your own text"
        ) from error
    texts = sorted(set(topics.values()))  # some topics share one text
    random.Random(0).shuffle(texts)
    symbols = "".join(sorted(set("".join(texts))))
    number = {symbol: index for index, symbol in enumerate(symbols)}
    train, validation, test = (
        torch.tensor([number[symbol] for symbol in "\n".join(part)], device="cpu") for part in _split(texts)
    )
    return Corpus(symbols, train, validation, test)


def _split(texts: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Training, validation and test topics; one so long that it would be a part of its own is trained on."""
    total = sum(map(len, texts))
    train: list[str] = []
    validation: list[str] = []
    test: list[str] = []
    for text in texts:
        short = len(text) < _LONG_PART * total
        if short and sum(map(len, test)) < _TEST_PART * total:
            test.append(text)
        elif short and sum(map(len, validation)) < _VALIDATION_PART * total:
            validation.append(text)
        else:
            train.append(text)
    return train, validation, test


def load_text(*, batch_size: int = 32, rng_seed: int = 0, data_dir: Path | None = None) -> TaskData:
    """Windows of 64 characters; inputs and targets (B, 64) int64, targets one character further.

    Args:
        batch_size: windows in a training batch.
        rng_seed: seeds their starts; the split is always the same.
        data_dir: not needed, the text comes with Python.

    Raises:
        MissingDependencyError: this Python came without ``pydoc_data``.
    """
    corpus = load_corpus()
    return TaskData(
        train=WindowBatches(corpus.train, CONTEXT, batch_size, shuffle=True, rng_seed=rng_seed),
        validation=WindowBatches(corpus.validation, CONTEXT, 128),
        test=WindowBatches(corpus.test, CONTEXT, 128),
    )


def _host() -> nn.Module:
    return create_host(
        "transformer", vocabulary=len(load_corpus().symbols), context=CONTEXT, width=64, depth=1, heads=4
    )


def _example() -> Tensor:
    return torch.zeros(2, CONTEXT, dtype=torch.int64, device="cpu")


def make_spec() -> TaskSpec:
    """The task ``text``."""
    corpus = load_corpus()
    return TaskSpec(
        name="text",
        summary="characters of Python's own documentation, a transformer of one block",
        topology="transformer",
        task_type="lm",
        num_classes=len(corpus.symbols),
        model_factory=_host,
        load_data=load_text,
        example_input=_example,
        needs_files=False,
        random_guess_loss=corpus.unigram_entropy(),
        defaults=TrainSettings(
            batch_size=32,
            host_steps=300,
            incubate_steps=100,
            blend_steps=100,
            finish_steps=700,
            trial_steps=100,
            lr=8e-3,
            seed_lr=8e-3,
            slot="block0",
            blueprint="mlp",
            blueprint_options={"expansion": 4.0},
        ),
    )
