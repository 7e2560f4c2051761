"""A grown model on disk: its tensors as safetensors, its structure as JSON; nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tolaria._optional import require
from tolaria.errors import TolariaError
from tolaria.nn.device import validate_device
from tolaria.nn.model import MorphogeneticModel
from tolaria.tasks.spec import TaskSpec, create_model, get_task

TENSORS, STRUCTURE = "model.safetensors", "model.json"
_FORMAT = 1


def save_model(model: MorphogeneticModel, folder: str | Path, *, task: str) -> None:
    """Write ``model.safetensors`` and ``model.json``.

    Args:
        model: whose seeds all came from registered blueprints, or has none.
        folder: must exist; files of these names are replaced.
        task: the registered task that :func:`load_model` rebuilds the host from.

    Raises:
        MissingDependencyError: safetensors is not installed.
    """
    safetensors = require("safetensors.torch", feature="saving a model", package="safetensors", extra="train")
    where = Path(folder)
    described = {
        "format": _FORMAT, "task": task, "slots": sorted(model.slots), "structure": model.structure()
    }  # fmt: skip
    with whole_file(where / TENSORS) as tensors, whole_file(where / STRUCTURE) as structure:
        safetensors.save_model(model, str(tensors))  # tied tensors are written once
        structure.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to inside; afterwards the file stands at ``path``, or nothing has changed there."""
    draft = path.with_name(f".{path.name}.part")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def load_model(
    folder: str | Path, *, device: str | torch.device = "cpu", task: TaskSpec | None = None
) -> MorphogeneticModel:
    """The model that :func:`save_model` (or a run) left in ``folder``, seeds included, in eval mode.

    Args:
        folder: a run folder.
        device: where to put the model.
        task: the task it belongs to; looked up by its name if None.

    Raises:
        FileNotFoundError: there is no saved model in ``folder``.
        ValueError: an unknown task or blueprint, or a bad device.
        TolariaError: the files are of another format or do not fit each other.
        MissingDependencyError: safetensors is not installed.
    """
    where, target = Path(folder), validate_device(device)
    missing = [name for name in (TENSORS, STRUCTURE) if not (where / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"load_model: expected {TENSORS} and {STRUCTURE} in {where}, missing {missing}"
        )
    safetensors = require(
        "safetensors.torch", feature="loading a model", package="safetensors", extra="train"
    )
    described = json.loads((where / STRUCTURE).read_text(encoding="utf-8"))
    if not isinstance(described, dict) or described.get("format") != _FORMAT:
        raise TolariaError(f"load_model: {where / STRUCTURE}: expected format {_FORMAT}; save it anew")
    spec = task if task is not None else get_task(described["task"])
    model = create_model(spec, "cpu", rng_seed=0)
    model.load_structure(described["structure"])
    try:
        safetensors.load_model(model, str(where / TENSORS))
    except RuntimeError as error:
        raise TolariaError(
            f"load_model: {where / TENSORS} does not fit the host of task {spec.name!r}: {error}"
        ) from error
    return model.to(target).eval()
