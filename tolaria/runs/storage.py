"""A grown model on disk: its tensors as safetensors, its structure as JSON; nothing is pickled.

The two files belong together: ``model.json`` names size and SHA-256 of ``model.safetensors``. They change at
one moment, when ``.model.json.next`` appears, complete, beside a complete draft of the tensors; what remains
(two renames) is finished by the next save, and until then a load reads the new model from where it lies.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tolaria._disk import sync_folder
from tolaria._optional import require
from tolaria.errors import MissingDependencyError, ModelFileError, ModelMissingError
from tolaria.nn.device import validate_device
from tolaria.nn.model import MorphogeneticModel
from tolaria.nn.structure import check_whole_number, count_elements
from tolaria.runs.files import draft_of, folder_held, write_draft
from tolaria.tasks.spec import TaskSpec, create_model, get_task

if TYPE_CHECKING:
    from collections.abc import Iterator

TENSORS, STRUCTURE = "model.safetensors", "model.json"
NEXT = ".model.json.next"
MODEL_FILES = (STRUCTURE, TENSORS, NEXT, f".{STRUCTURE}.part", f".{TENSORS}.part")
"""Every name that a model in a folder may have, the decisive one first."""
_FORMAT = 2
_FIELDS = ("format", "task", "slots", "structure", "tensors")
_MOST_JSON = 2**24  # bytes of model.json
_MOST_HEADER, _MOST_BYTES = 2**24, 8  # bytes of the header of model.safetensors, and of an element in it


def save_model(model: MorphogeneticModel, folder: str | Path, *, task: str) -> None:
    """Write ``model.safetensors`` and ``model.json``, both or neither.

    Whatever ends the process or makes the call fail, :func:`load_model` finds the former model or this one.

    Args:
        model: whose seeds all came from registered blueprints, or has none.
        folder: must exist; files of these names are replaced.
        task: the registered task that :func:`load_model` rebuilds the host from.

    Raises:
        TypeError: an argument has the wrong type, or the model's state holds something that is no tensor, or
            options that JSON cannot hold.
        OSError: the files cannot be written.
        MissingDependencyError: safetensors is not installed.
    """
    safetensors = require("safetensors.torch", feature="saving a model", package="safetensors", extra="train")
    if not isinstance(model, MorphogeneticModel):
        raise TypeError(f"save_model: model: expected a MorphogeneticModel, got {type(model).__name__}")
    if not isinstance(task, str):
        raise TypeError(f"save_model: task: expected a name, got {type(task).__name__}")
    where = Path(folder)
    tensors: bytes = safetensors.save(_distinct(model))
    described = {
        "format": _FORMAT,
        "task": task,
        "slots": model.slot_paths(),
        "structure": model.structure(),
        "tensors": {"bytes": len(tensors), "sha256": hashlib.sha256(tensors).hexdigest()},
    }
    structure = (json.dumps(described, indent=2, allow_nan=False) + "\n").encode()
    with folder_held(where):
        _finish_former(where)
        try:
            write_draft(where / TENSORS, tensors)
            os.replace(write_draft(where / STRUCTURE, structure), where / NEXT)
        except BaseException:
            if not (where / NEXT).exists():
                draft_of(where / TENSORS).unlink(missing_ok=True)
                draft_of(where / STRUCTURE).unlink(missing_ok=True)
            raise
        sync_folder(where)  # from here on this is the model
        _finish_former(where)


def _finish_former(where: Path) -> None:
    """The two renames that are left once a model is complete."""
    if not (where / NEXT).exists():
        return
    draft = draft_of(where / TENSORS)
    if draft.exists():
        os.replace(draft, where / TENSORS)
        sync_folder(where)
    os.replace(where / NEXT, where / STRUCTURE)
    sync_folder(where)


def _distinct(model: MorphogeneticModel) -> dict[str, Tensor]:
    """The state by name, each tensor once (tied ones by the first of their names), contiguous, of its own."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"save_model: {name}: expected a tensor, got {type(value).__name__}; what is no "
                "tensor cannot be saved without pickling it"
            )
        found.setdefault(id(value), (name, value))
    return {
        name: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, value in found.values()
    }


# ------------------------------------------------------------------ loading


def load_model(
    folder: str | Path, *, device: str | torch.device = "cpu", task: TaskSpec | None = None
) -> MorphogeneticModel:
    """The model that :func:`save_model` (or a run) left in ``folder``, seeds included, in eval mode.

    Nothing in the files is trusted: names, types, ranges, sizes and the digest are checked, and no memory is
    allocated for a size that a file only claims.

    Args:
        folder: a run folder.
        device: where to put the model.
        task: the task it belongs to; looked up by its name if None.

    Raises:
        ModelMissingError: there is no saved model in ``folder`` (also a FileNotFoundError).
        ModelFileError: a file is damaged or of another format, the files do not fit each other or the task,
            the task or a blueprint is not known, or a value is not finite or out of range.
        ValueError, RuntimeError: a bad device.
        MissingDependencyError: safetensors is not installed.
    """
    where, target = Path(folder), validate_device(device)
    safetensors = require(
        "safetensors.torch", feature="loading a model", package="safetensors", extra="train"
    )
    if not where.is_dir():
        raise ModelMissingError(f"load_model: expected a folder with {TENSORS} and {STRUCTURE}, got {where}")
    with folder_held(where, shared=True):
        path = where / NEXT if (where / NEXT).exists() else where / STRUCTURE
        described = _description(path)
        model, elements = _host(path, described, task)
        raw = _tensors(where, described["tensors"], elements, is_next=path.name == NEXT)
    with _named(path, "seeds that can be rebuilt"):
        model.load_structure(described["structure"])
    with _named(where / TENSORS, "tensors of the model"):
        _fill(model, safetensors.load(raw))
    return model.to(target).eval()


def _description(path: Path) -> dict[str, Any]:
    """What ``model.json`` says, each field of the right type."""
    raw = _read(path, None, _MOST_JSON)
    try:
        said = json.loads(raw.decode(), object_pairs_hook=_without_repetition, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        reason = "brackets nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ModelFileError(f"load_model: {path}: expected JSON, got {reason}") from error
    if not isinstance(said, dict) or isinstance(said.get("format"), bool) or said.get("format") != _FORMAT:
        got = said.get("format") if isinstance(said, dict) else type(said).__name__
        raise ModelFileError(
            f"load_model: {path}: expected format {_FORMAT}, got {str(got)[:40]}; save it anew (format 1 may "
            "mix two models)"
        )
    with _named(path, "the description of a model"):
        _check_description(said)
    return said


def _check_description(said: Mapping[str, Any]) -> None:
    if set(said) != set(_FIELDS):
        raise ValueError(f"fields: expected {', '.join(_FIELDS)}, got {', '.join(sorted(said))[:200]}")
    if not isinstance(said["task"], str):
        raise TypeError(f"task: expected a name, got {type(said['task']).__name__}")
    slots, structure, tensors = said["slots"], said["structure"], said["tensors"]
    if not isinstance(slots, dict) or not all(isinstance(p, str | None) for p in slots.values()):
        raise TypeError("slots: expected a mapping from a slot's name to the path of a submodule or null")
    if not isinstance(structure, dict) or set(structure) != set(slots):
        raise ValueError("structure: expected a description of each slot")
    if not isinstance(tensors, dict) or set(tensors) != {"bytes", "sha256"}:
        raise ValueError("tensors: expected bytes and sha256")
    check_whole_number("tensors: bytes", tensors["bytes"], 0, 2**63 - 1)
    if not isinstance(tensors["sha256"], str) or re.fullmatch("[0-9a-f]{64}", tensors["sha256"]) is None:
        raise ValueError("tensors: sha256: expected 64 hexadecimal digits")


def _host(path: Path, described: Mapping[str, Any], task: TaskSpec | None) -> tuple[MorphogeneticModel, int]:
    """The ungrown host that ``described`` belongs to, and how many elements it has when it is grown."""
    with _named(path, "a task that is registered"):
        spec = task if task is not None else get_task(described["task"])
    paths = {name: path for name, path in described["slots"].items() if path is not None}
    with _named(path, f"slots of the host of task {spec.name!r}"):
        own = spec.slots is None and not paths  # a host that holds its slots itself
        model = create_model(spec, "cpu", slots=None if own else paths, rng_seed=0)
        if model.slot_paths() != described["slots"]:
            raise ValueError(f"got {', '.join(described['slots'])[:200]}, has {', '.join(model.slots)}")
    with _named(path, "seeds that can be rebuilt"):
        seeds = model.structure_numel(described["structure"])
    return model, seeds + count_elements(model)


def _tensors(where: Path, claimed: Mapping[str, Any], elements: int, *, is_next: bool) -> bytes:
    """The bytes of ``model.safetensors`` that ``model.json`` speaks of, if so many elements fit into them."""
    path = draft_of(where / TENSORS) if is_next else where / TENSORS
    if is_next and not path.exists():  # the first of the two renames is done
        path = where / TENSORS
    if not elements <= claimed["bytes"] <= _MOST_BYTES * elements + _MOST_HEADER:
        raise ModelFileError(
            f"load_model: {where / TENSORS}: expected a file that fits a model of {elements} numbers, got "
            f"one of {claimed['bytes']} bytes"
        )
    raw = _read(path, claimed["bytes"], claimed["bytes"])
    if hashlib.sha256(raw).hexdigest() != claimed["sha256"]:
        raise ModelFileError(
            f"load_model: {path}: expected the tensors that {STRUCTURE} describes, got damaged ones or "
            "another model's (their SHA-256 differs)"
        )
    return raw


def _read(path: Path, size: int | None, most: int) -> bytes:
    """The bytes of a regular file, ``size`` of them if that is known; none are read if there are too many."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError as error:
        raise ModelMissingError(
            f"load_model: expected {TENSORS} and {STRUCTURE} in {path.parent}, missing {path.name}"
        ) from error
    except OSError as error:
        raise ModelFileError(f"load_model: {path}: expected a file that can be read, got {error}") from error
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ModelFileError(f"load_model: {path}: expected a regular file, got another kind")
        if size is not None and found.st_size != size:
            raise ModelFileError(f"load_model: {path}: expected {size} bytes, got {found.st_size}")
        if found.st_size > most:
            raise ModelFileError(f"load_model: {path}: expected at most {most} bytes, got {found.st_size}")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(found.st_size)
    finally:
        os.close(handle)


def _fill(model: MorphogeneticModel, tensors: Mapping[str, Tensor]) -> None:
    """Load ``tensors`` where every one fits: name, shape, kind, finite, alpha as the stage wants it."""
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, value in state.items():
        first.setdefault(id(value), name)
    missing, unknown = sorted({*first.values()} - {*tensors}), sorted({*tensors} - {*first.values()})
    if missing or unknown:
        raise ValueError(f"missing {missing[:3]}, unknown {unknown[:3]}")
    for name in first.values():
        _check_tensor(name, tensors[name], state[name])
    for name, slot in model.slots.items():
        alpha = float(tensors[next(n for n, v in state.items() if v is slot.alpha)])
        if not slot.allows_alpha(alpha):
            raise ValueError(f"slot {name!r}: alpha: expected one of stage {slot.stage.name}, got {alpha}")
    model.load_state_dict({name: tensors[first[id(value)]] for name, value in state.items()})


def _check_tensor(name: str, tensor: Tensor, place: Tensor) -> None:
    if tensor.shape != place.shape:
        raise ValueError(f"{name}: expected shape {tuple(place.shape)}, got {tuple(tensor.shape)}")
    same_kind = tensor.is_floating_point() and place.is_floating_point()
    if tensor.dtype != place.dtype and not same_kind:
        raise ValueError(f"{name}: expected {place.dtype}, got {tensor.dtype}")
    if same_kind:
        bad = ~tensor.to(place.dtype).isfinite() & place.detach().isfinite()  # a mask of -inf is born so
        if bad.any():
            raise ValueError(f"{name}: expected finite values, got {int(bad.sum())} that are NaN or infinite")


@contextmanager
def _named(path: Path, expected: str) -> Iterator[None]:
    """Whatever a file's content makes raise inside becomes a ModelFileError that names the file."""
    try:
        yield
    except (ModelFileError, MissingDependencyError, MemoryError):
        raise
    except Exception as error:
        raise ModelFileError(f"load_model: {path}: expected {expected}: {error}") from error


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which no name stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object that names something twice")
    return found


def _no_number(word: str) -> None:
    raise ValueError(f"{word}, which JSON does not know")
