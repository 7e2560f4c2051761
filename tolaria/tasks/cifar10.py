"""CIFAR-10 from a local folder: the published Python batches, read without letting a pickle run code."""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tolaria.nn.host import create_host
from tolaria.tasks.data import TaskData, TensorBatches
from tolaria.tasks.spec import TaskSpec, TrainSettings

FOLDER = "cifar-10-batches-py"
VALIDATION_ROWS = 5000
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Knows numpy arrays and plain containers; anything else in the file is an error, not a call."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR-10 batch")
        return super().find_class(module.replace("numpy.core", "numpy._core") if _NEW_NUMPY else module, name)


_NEW_NUMPY = int(np.__version__.split(".")[0]) >= 2


def _read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 of one file."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        images, labels = np.asarray(batch[b"data"], dtype=np.uint8), batch[b"labels"]
    except (pickle.UnpicklingError, KeyError, TypeError, ValueError, EOFError) as error:
        raise ValueError(
            f"cifar10: {path}: expected a batch of 3072-byte images with labels, got {error}"
        ) from error
    if images.ndim != 2 or images.shape[1] != 3072 or len(labels) != len(images):
        got = f"data of shape {images.shape} and {len(labels)} labels"
        raise ValueError(f"cifar10: {path}: expected 3072-byte images with a label each, got {got}")
    return torch.from_numpy(images.copy()).view(-1, 3, 32, 32), torch.tensor(
        labels, dtype=torch.int64, device="cpu"
    )


def find_folder(data_dir: Path | None) -> Path:
    """The folder that holds ``data_batch_1``: ``data_dir`` or its subfolder ``cifar-10-batches-py``.

    Raises:
        FileNotFoundError: it is not there; the message says how to get it.
    """
    roots = [Path(data_dir)] if data_dir is not None else [Path("data"), Path()]
    for root in roots:
        for folder in (root, root / FOLDER):
            if (folder / "data_batch_1").is_file():
                return folder
    raise FileNotFoundError(
        f"cifar10: expected {FOLDER}/data_batch_1 under {' or '.join(repr(str(r)) for r in roots)}; unpack "
        "cifar-10-python.tar.gz (https://www.cs.toronto.edu/~kriz/cifar.html) there, or say where it is with "
        "data_dir"
    )


def load_cifar10(*, batch_size: int = 128, rng_seed: int = 0, data_dir: Path | None = None) -> TaskData:
    """45,000 training, 5,000 validation and 10,000 test images, (B, 3, 32, 32) float32, normalised.

    Args:
        batch_size: of the training batches.
        rng_seed: seeds their order; the split is always the same.
        data_dir: the folder ``cifar-10-batches-py`` or the one around it; ``data`` or the current one if
            None.

    Raises:
        FileNotFoundError: the files are not there.  ValueError: a file is not what it should be.
    """
    folder = find_folder(data_dir)
    parts = [_read_batch(folder / f"data_batch_{i}") for i in range(1, 6)]
    images = torch.cat([part[0] for part in parts])
    labels = torch.cat([part[1] for part in parts])
    test_images, test_labels = _read_batch(folder / "test_batch")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0), device="cpu")
    held, train = order[:VALIDATION_ROWS], order[VALIDATION_ROWS:]
    return TaskData(
        train=TensorBatches(
            _scaled(images[train]), labels[train], batch_size, shuffle=True, rng_seed=rng_seed
        ),
        validation=TensorBatches(_scaled(images[held]), labels[held], 500),
        test=TensorBatches(_scaled(test_images), test_labels, 500),
    )


def _scaled(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device="cpu").view(3, 1, 1) for values in (_MEAN, _STD))
    return images.float().div_(255.0).sub_(mean).div_(std)


def _host() -> nn.Module:
    return create_host("cnn", in_channels=3, num_classes=10, widths=(32, 64, 128))


def _example() -> Tensor:
    return torch.zeros(2, 3, 32, 32, device="cpu")


def make_spec() -> TaskSpec:
    """The task ``cifar10``."""
    return TaskSpec(
        name="cifar10",
        summary="CIFAR-10 from a local folder, a small CNN",
        topology="cnn",
        num_classes=10,
        model_factory=_host,
        load_data=load_cifar10,
        example_input=_example,
        random_guess_loss=math.log(10),
        defaults=TrainSettings(
            batch_size=128, host_steps=1500, incubate_steps=350, blend_steps=350, finish_steps=1500,
            slot="stage1", validate_every=350,
        ),
    )  # fmt: skip
