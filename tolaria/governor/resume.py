"""Reads a state that was saved beside training, and goes on from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from tolaria._arguments import as_flag, check_optional
from tolaria.errors import SnapshotError
from tolaria.governor.governor import TolariaGovernor
from tolaria.governor.saving import KIND, VERSION
from tolaria.snapshot import persist
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.plain_form import LIVE, from_plain
from tolaria.snapshot.snapshot import Snapshot

_PARTS = ("step", "governor", "model", "optimizers", "schedulers", "scaler", "extras", "attributes", "rng")


def load_snapshot(
    path: str | os.PathLike[str], governor: TolariaGovernor | None = None, *, restore_rng: bool = True
) -> dict[str, Any]:
    """Read a state that :meth:`TolariaGovernor.save` or ``save_every`` wrote, and go on from it.

    In a new process: build model, optimizers and schedules as then, attach a governor, and::

        step = tolaria.load_snapshot("run/snapshots", governor)["step"]

    Args:
        path: the folder given to ``save``, of which the newest whole snapshot is read; or one snapshot in it.
        governor: what it was made with gets its part of the state; its own statistics, rollbacks, and when
            captures are due go on as if the run had not been interrupted. None: only read.
        restore_rng: whether the random generators of the process go on, too.

    Returns:
        ``step`` of the capture, and as for :meth:`Snapshot.state_dict` ``model``, ``optimizers``,
        ``schedulers``, ``scaler``, ``extras``, ``attributes``, ``rng``; ``governor``: for its
        ``load_state_dict``. Tensors are on the CPU.

    Raises:
        TypeError, ValueError: a bad argument.
        SnapshotError: there is no whole snapshot, it is damaged, or it does not fit what the governor
            covers. Whatever is raised, nothing has changed.
    """
    check_optional("governor", governor, TolariaGovernor)
    as_flag("restore_rng", restore_rng)
    document, tensors = persist.read(path)
    state = from_plain(document, tensors)
    if not isinstance(state, dict) or state.get("kind") != KIND or state.get("version") != VERSION:
        raise SnapshotError(f"{os.fspath(path)}: expected a state that TolariaGovernor.save wrote")
    missing = [part for part in _PARTS if part not in state]
    if missing:
        raise SnapshotError(f"{os.fspath(path)}: it lacks {', '.join(missing)}")
    parts = {part: state[part] for part in _PARTS}
    if governor is not None:
        _put_in_place(parts, governor, restore_rng=restore_rng)
    return parts


def _put_in_place(parts: dict[str, Any], governor: TolariaGovernor, *, restore_rng: bool) -> None:
    """All of it, or nothing: a snapshot of what is there now takes as much memory as one slot meanwhile."""
    governor.synchronize()
    covered = governor._engine.covered
    covered.find_schedules()
    _check_fits(parts, covered)
    undo = Snapshot(
        covered.model,
        covered.optimizers,
        schedulers=covered.schedulers,
        scaler=covered.scaler,
        extras=covered.extras,
        generators=covered.generators.own,
        restore_rng=True,
    )
    undo.capture()
    try:
        _load(parts, covered)
        if restore_rng:
            covered.generators.load(parts["rng"], 0)
        governor.load_state_dict(parts["governor"])
    except Exception as error:
        with suppress(SnapshotError):  # an extra that refuses its former state, too
            undo.restore()
        if isinstance(error, SnapshotError):
            raise
        raise SnapshotError(f"the saved state does not fit: {error}") from error


def _check_fits(parts: Mapping[str, Any], covered: CoveredState) -> None:
    for name, live in (("optimizers", covered.optimizers), ("schedulers", covered.schedulers)):
        if len(parts[name]) != len(live):
            raise SnapshotError(
                f"{name}: expected as many as were saved, {len(parts[name])}, got {len(live)}; attach the "
                "governor with the same ones"
            )
    if set(parts["extras"]) != set(covered.extras):
        raise SnapshotError(
            f"extras: expected those that were saved, {sorted(parts['extras'])}, got {sorted(covered.extras)}"
        )
    if (parts["scaler"] is None) != (covered.scaler is None):
        wanted = "none, as when it was saved" if parts["scaler"] is None else "the GradScaler that was saved"
        raise SnapshotError(f"scaler: expected {wanted}")


def _load(parts: dict[str, Any], covered: CoveredState) -> None:
    frozen = {name: p for name, p in covered.model.named_parameters() if covered.leaves_out(p)}
    kept = {name: p.detach() for name, p in frozen.items() if name not in parts["model"]}
    _named("model", covered.model.load_state_dict, {**parts["model"], **kept})
    for name, extra in covered.extras.items():
        _named(f"extras[{name!r}]", extra.load_state_dict, parts["extras"][name])
    paths = {prefix + path: module for prefix, path, module in covered.walk().modules}
    for path, attributes in parts["attributes"].items():
        if path not in paths:
            raise SnapshotError(f"{path}: expected the module that was saved, found none")
        vars(paths[path]).update(attributes)
    for i, (optimizer, saved) in enumerate(zip(covered.optimizers, parts["optimizers"], strict=True)):
        _keep_live(saved.get("param_groups", ()), optimizer.param_groups)
        _named(f"optimizers[{i}]", optimizer.load_state_dict, saved)
    for i, (schedule, saved) in enumerate(zip(covered.schedulers, parts["schedulers"], strict=True)):
        _named(f"schedulers[{i}]", schedule.load_state_dict, _without_live(saved))
    if covered.scaler is not None and parts["scaler"]:
        _named("scaler", covered.scaler.load_state_dict, parts["scaler"])


def _named(name: str, load: Callable[[Any], object], saved: object) -> None:
    try:
        with torch.no_grad():
            load(saved)
    except Exception as error:
        raise SnapshotError(f"{name}: it refused the saved state: {error}") from error


def _keep_live(saved: Sequence[dict[str, Any]], live: Sequence[dict[str, Any]]) -> None:
    """Functions and modules in groups are those of now."""
    for group, of_now in zip(saved, live, strict=False):
        group.update({key: of_now.get(key) for key, value in group.items() if value is LIVE})


def _without_live(saved: Any) -> Any:  # noqa: ANN401  (a state dict)
    """Without what a schedule takes from the program by itself."""
    if isinstance(saved, dict):
        return {key: _without_live(value) for key, value in saved.items() if value is not LIVE}
    if isinstance(saved, list):
        return [None if value is LIVE else _without_live(value) for value in saved]
    return saved
