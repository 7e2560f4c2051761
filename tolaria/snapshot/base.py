"""What all that captures and restores shares: a covered state, and slots that are kept in line with it.

The governor's engines, which obey a judge, stand on it; a snapshot by hand needs this and the ops.
"""

from __future__ import annotations

import warnings

from torch import Tensor
from torch.optim import Optimizer

from tolaria.errors import UncoveredWarning
from tolaria.snapshot.coverage import Coverage, check_unsharded
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.finite_state import StateCheck
from tolaria.snapshot.host_state import HostState
from tolaria.snapshot.inner_optimizers import with_inner
from tolaria.snapshot.place import is_finite
from tolaria.snapshot.slots import Slots, check_coverable
from tolaria.snapshot.watch import StructureWatch

_UNKNOWN = [-1]
"""A structure that no state has."""


class SnapshotBase:
    """Slots for a covered state.

    Args:
        covered: what is covered.
        storage: where the slots of a CUDA model lie, ``"pinned"`` or ``"device"``.
        copies: how many slots there are, 2 or 1.

    Attributes:
        covered: as given.
        slots: both copies; empty until :meth:`sync_structure`.
        structure: a cheap sign of growth as of the last look; see :meth:`look_again`.
        seed_holders: modules that may hold an incubating seed, as of the last look.
        state_check: looks whether the live state is finite.
        broken: names of the parameters that were not finite from the start.

    Raises:
        SnapshotError: a tensor cannot be copied byte by byte.
        RuntimeError: a parameter or buffer is a shard.
    """

    def __init__(self, covered: CoveredState, storage: str, copies: int = 2) -> None:
        self.covered = covered
        self.slots = Slots(covered.device, storage, copies, is_judged=not covered.by_hand)
        self.structure = covered.structure()
        self._walk = covered.walk()
        """That of the last look."""
        self.seed_holders = self._walk.seed_holders
        self._watch = StructureWatch(covered)
        self.state_check = StateCheck(covered, self.slots, self._watch)
        check_unsharded(covered)
        self.broken = self._find_exempt()
        self._exempt_parts: frozenset[str] | None = None
        self._coverage = Coverage(covered)
        self._coverage.look(attaching=True)

    def _find_exempt(self) -> list[str]:
        """Tensors that are non-finite from the start are copied but not searched, parameters excepted."""
        covered = self.covered.tensors()
        check_coverable(covered)
        bad = [t for t in covered if not is_finite(t.tensor)]
        broken = [t for t in bad if t.kind == "parameter" and (t.hooked or t.tensor.requires_grad)]
        self.slots.exempt = frozenset(t.key for t in bad) - {t.key for t in broken}
        return [t.name for t in broken]

    def refuse_nonfinite(self) -> None:
        """Look at the live tensors that a capture would search; waits for the device.

        Raises:
            ValueError: one holds a non-finite value.
        """
        bad = self.state_check.first_bad()
        if bad is not None:
            raise ValueError(f"model: expected a finite state, got NaN or infinity in {bad}")

    def host_parts(self) -> HostState:
        """The host-side parts of a capture about to be made; call :meth:`follow_structure` before.

        Raises:
            SnapshotError: a tensor is not covered, or a part cannot say its state.
        """
        self.slots.check_whole()
        return HostState.of(self.covered, self._walk)

    def bad_host_part(self, host: HostState, *, waits: bool = False) -> str | None:
        """The first extra of ``host`` that holds NaN or infinity, and did not at the first look.

        Args:
            host: the host-side parts of a capture.
            waits: look at tensors on a CUDA device too, which waits for it; else at those in CPU memory.
        """
        bad = {
            name
            for name, tensor in host.extra_tensors()
            if (tensor.is_cpu or (waits and tensor.is_cuda)) and not is_finite(tensor)
        }
        if self._exempt_parts is None:
            self._exempt_parts = frozenset(bad)
        return min(bad - self._exempt_parts, default=None)

    def extras_on_device(self, host: HostState) -> dict[str, list[Tensor]]:
        """What :meth:`bad_host_part` has to wait for: tensors of extras on the device, by extra."""
        found: dict[str, list[Tensor]] = {}
        for name, tensor in host.extra_tensors():
            if tensor.device == self.covered.device and name not in (self._exempt_parts or ()):
                found.setdefault(name, []).append(tensor)
        return found

    def may_have_moved(self) -> bool:
        """Whether :meth:`sync_structure` may find something; a look at every container and address."""
        return self.structure == _UNKNOWN or self._watch.has_moved()

    def look_again(self) -> None:
        """Whatever there is now, the next look finds a change."""
        self.structure = _UNKNOWN

    def follow_structure(self, *, leave_out: bool = False) -> None:
        """As :meth:`sync_structure`, where something may have changed."""
        if self.may_have_moved():
            self.sync_structure(leave_out=leave_out)

    def sync_structure(self, *, leave_out: bool = False) -> None:
        """Look for tensors that came, went or moved, and lay the slots out anew if there are any.

        Args:
            leave_out: go without tensors that cannot be covered; see :meth:`Slots.sync`.

        Raises:
            SnapshotError: a tensor cannot be covered. The slots and their table stay as they were, and the
                next act looks again.
        """
        known = len(self.slots.places)
        walk = self.covered.walk()
        tensors = self.covered.tensors(walk)
        self._walk = walk
        self._watch.forget()  # whatever happens from here on, the next look finds a change
        changed = self.slots.sync(tensors, leave_out=leave_out)
        self.structure = self.covered.structure()
        self.seed_holders = walk.seed_holders
        self.covered.note_forms(walk)
        if not self.slots.left_out:
            self._watch.mark(walk, tensors)
        if changed:
            self._structure_changed(known)
        if known:  # what is on another device changes no slot
            self._coverage.look()

    def _structure_changed(self, known: int) -> None:
        """The slots were laid out anew; there were ``known`` places before, 0 the first time."""

    def recreate_missing(self, slot: int, host: HostState) -> None:
        """Give what the capture in ``slot`` has and its owner dropped back to the owner."""
        for missing in self.slots.missing_live(slot, host.keys):
            self.covered.recreate(*missing)

    def remove_optimizer(self, optimizer: Optimizer) -> None:
        """Stop covering ``optimizer`` and those that it wraps; the captures forget them too."""
        leaving = {id(o) for o in with_inner([optimizer])}
        for gone in (o for o in self.covered.optimizers if id(o) in leaving):
            self.slots.forget_optimizer(gone)
        self.covered.optimizers = [o for o in self.covered.optimizers if id(o) not in leaving]

    def tell_left_out(self) -> None:
        """Warn of live tensors that a restore has left alone, unless an error has named them before."""
        if self.slots.left_out and (new := self.slots.untold(self.covered.tensors())):
            voice = self.covered.voice
            warnings.warn(
                f"{voice.who}: {voice.restore} leaves alone what no capture can hold: "
                + "; ".join(f"{name}: {why}" for name, why in new.items()),
                UncoveredWarning,
                stacklevel=2,
            )
