"""Leaving out the optimizer step of a loss that was not healthy."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tolaria.governor.closures import is_of_torch, outermost
from tolaria.governor.engine import Engine
from tolaria.governor.left_out import LeftOutSteps
from tolaria.ops import StateField
from tolaria.snapshot import graphs
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.finite_state import PutBack
from tolaria.snapshot.fresh_state import fresh_value
from tolaria.snapshot.undo import HostCounters, UndoCopy
from tolaria.snapshot.wrapped import inner_tensors, is_wrapper
from tolaria.telemetry.events import GovernorEvent, RollbackEvent, VerdictEvent


class StepSkipper:
    """Makes ``optimizer.step()`` do nothing after an unhealthy verdict; undoes the forward's buffer changes.

    On the CPU the step is not taken, with a closure, too (:class:`LeftOutSteps`): parameters, moments and
    counters stay as they are. On CUDA the host does not know the verdict, so two ways lead there:

    * a fused optimizer of torch skips by itself when its ``found_inf`` is set, which is merged with
      GradScaler's;
    * any other takes the step, which is then undone from a copy made just before: it costs the memory of its
      parameters and state once more, and copying them at every step. Counters that it keeps on the host
      follow when the host hears of the verdict.

    The buffers are copied after every step, since the next forward changes them before its loss can be
    judged. Those of seed slots (alpha) are not put back: a schedule moves them, no forward.

    Args:
        engine: what covers the model and its optimizers.
    """

    def __init__(self, engine: Engine) -> None:
        # Weakly: the optimizers' hooks know this object, and must not keep the engine and its slots.
        self._engine: Engine = weakref.proxy(engine)
        self._covered = covered = engine.covered
        self._on_device = covered.device.type == "cuda"
        self._skip = False
        self._flag = torch.zeros((), dtype=torch.float32, device=covered.device)
        self.handles: list[RemovableHandle] = []
        self._loss = torch.zeros((), dtype=torch.float64, device=covered.device)
        self._left_out: list[LeftOutSteps] = []
        self._undone: list[_UndoneOptimizer] = []
        self._lent: dict[int, bool] = {}
        self._newborns: dict[int, _Newborns] = {}
        self._buffers = _Buffers(covered)
        for optimizer in covered.optimizers:
            self.hook(optimizer)
        self.after_step()

    def hook(self, optimizer: Optimizer) -> None:
        """Watch one more optimizer."""
        if not self._on_device:
            left_out = LeftOutSteps(self._covered, optimizer, lambda: self._skip, lambda: self._loss.clone())
            self._left_out.append(left_out)
            self.handles += left_out.hook()
        elif is_of_torch(optimizer) and all(group.get("fused") for group in optimizer.param_groups):
            self._newborns[id(optimizer)] = _Newborns(optimizer)
            self._watch(optimizer, self._set_found_inf, self._remove_found_inf)
        else:
            undone = _UndoneOptimizer(optimizer, self._covered.device)
            self._undone.append(undone)
            self._watch(optimizer, self._save(undone), self._put_back(undone))

    def _watch(self, optimizer: Optimizer, before: Callable[..., None], after: Callable[..., None]) -> None:
        covered = self._covered
        self.handles.append(optimizer.register_step_pre_hook(outermost(before, covered)))
        self.handles.append(optimizer.register_step_post_hook(outermost(after, covered)))

    def _set_found_inf(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lent_to: Any = optimizer  # what fused kernels read is no declared attribute
        if self._lent.pop(id(optimizer), False):  # the last step raised, and kept what it was lent
            del lent_to.grad_scale, lent_to.found_inf
        scalers = getattr(optimizer, "found_inf", None)
        self._lent[id(optimizer)] = not hasattr(optimizer, "grad_scale")
        if self._lent[id(optimizer)]:
            lent_to.grad_scale = None
        lent_to.found_inf = self._flag if scalers is None else torch.maximum(scalers, self._flag)
        self._newborns[id(optimizer)].before_step()

    def _remove_found_inf(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        lent_to: Any = optimizer
        self._newborns[id(optimizer)].undo(lent_to.found_inf)
        if self._lent.pop(id(optimizer), False):  # GradScaler removes what it set itself
            del lent_to.grad_scale, lent_to.found_inf

    def _save(self, undone: _UndoneOptimizer) -> Callable[..., None]:
        engine = self._engine
        return lambda *_: undone.save(engine.enqueued_step, engine.step_count)

    def _put_back(self, undone: _UndoneOptimizer) -> Callable[..., None]:
        flag = self._flag
        return lambda *_: undone.put_back(flag)

    def put_back_buffers(self) -> PutBack:
        """What the buffers hold once a bad step has been left out."""
        return self._buffers.as_put_back()

    def after_verdict(self, state: Tensor) -> None:
        """Leave out the optimizer steps up to the next :meth:`after_step` if the last verdict is not healthy.

        Args:
            state: of the governor, alone.
        """
        reason = state[StateField.reason]
        if self._on_device:
            if graphs.is_recording(self._flag.device):
                graphs.outlive(self._flag)
            self._flag.copy_((reason != 0).view(()))
            self._buffers.put_back(self._flag)
        else:
            self._skip = bool(reason != 0)
            self._loss.copy_(state[StateField.loss].view(()))
            if self._skip:
                self._buffers.put_back(None)

    def after_step(self) -> None:
        """The step is over: what the buffers hold now is what an undone forward goes back to."""
        for left_out in self._left_out:
            left_out.finish()  # one that raised has not come to its hook
        self._skip = False
        if self._on_device:
            self._flag.zero_()
        self._buffers.save()

    def learn(self, events: Sequence[GovernorEvent]) -> None:
        """Correct what optimizers keep on the host for the steps that were skipped on the device."""
        for event in events:
            if isinstance(event, RollbackEvent) and not self._on_device:
                self.after_step()  # carried out already, maybe between two steps
            for undone in self._undone:
                if isinstance(event, RollbackEvent):
                    undone.counters.clear()
                elif isinstance(event, VerdictEvent) and event.is_of_step:
                    right = undone.counters.skipped(event.step)
                    self._engine.correct_host_values(undone.optimizer, right)

    def close(self) -> None:
        """Remove the hooks."""
        remove_hooks(self.handles)


def remove_hooks(handles: Sequence[RemovableHandle]) -> None:
    """Remove every one of ``handles``."""
    for handle in handles:
        handle.remove()


class _Buffers:
    """The buffers that a forward may change, and their copies."""

    def __init__(self, covered: CoveredState) -> None:
        self._covered = covered
        self._undo = UndoCopy(covered.device) if covered.device.type == "cuda" else None
        self._homes: list[tuple[nn.Module, str]] = []
        self._live: list[Tensor] = []
        self._memory: list[Tensor] = []
        self._copies: list[Tensor] = []

    def save(self) -> None:
        scheduled = {id(slot) for _, slot in self._covered.walk().participants}
        homes = [
            (module, name, buffer)
            for module in self._covered.model.modules()
            if id(module) not in scheduled
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._homes = [(module, name) for module, name, _ in homes]
        self._live = [buffer for *_, buffer in homes]
        # With a version counter of their own: the backward of the step that is left out may be still to come.
        memory = [buffer.data for buffer in self._live]
        if self._undo is not None:
            if memory:
                self._undo.save(memory)
        elif [b.data_ptr() for b in memory] != [b.data_ptr() for b in self._memory]:
            with torch.inference_mode(False):
                self._copies = [b.clone() for b in memory]
        elif memory:
            torch._foreach_copy_(self._copies, memory)
        self._memory = memory

    def as_put_back(self) -> PutBack:
        """The buffers of now that :meth:`put_back` concerns, and the values that it gives them."""
        buffers = frozenset(id(module._buffers.get(name)) for module, name in self._homes)
        return PutBack(buffers, self._copies if self._undo is None else self._undo.copies)

    def put_back(self, flag: Tensor | None) -> None:
        """Unconditionally on the CPU; on CUDA unless ``flag`` is 0."""
        if not self._live:
            return
        if self._undo is not None and flag is not None:
            self._undo.put_back(flag)
        elif self._undo is None:
            torch._foreach_copy_(self._memory, self._copies)
        # A forward may assign a new tensor rather than write to the old one.
        for (module, name), saved in zip(self._homes, self._live, strict=True):
            now = module._buffers.get(name)
            if flag is None:
                module._buffers[name] = saved
            elif now is not None and now is not saved and now.shape == saved.shape:
                now.data.copy_(torch.where(flag != 0, saved, now))


class _Newborns:
    """Optimizer state that a step brings into being: where the step is left out it must begin afresh.

    A fused optimizer that skips its first step may leave it uninitialised.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._known: set[int] | None = None

    def before_step(self) -> None:
        """Note what there is, if some parameter has no state yet."""
        expected = sum(len(group["params"]) for group in self._optimizer.param_groups)
        grown = len(self._optimizer.state) >= expected
        self._known = None if grown else {id(tensor) for _, _, tensor in self.tensors()}

    def undo(self, flag: Tensor) -> None:
        """Give what came since its value before the first step, unless ``flag`` is 0."""
        if self._known is not None:
            for group, key, born in self.tensors():
                if id(born) in self._known:
                    continue
                if is_wrapper(born):
                    _empty(born, flag)
                else:
                    fresh = fresh_value(self._optimizer, group, key)
                    born.copy_(torch.where(flag != 0, 0.0 if fresh is None else fresh, born))

    def tensors(self) -> list[tuple[dict[str, Any], str, Tensor]]:
        """The state that lies beside its parameter, with its group and key."""
        return [
            (group, key, value)
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            for key, value in self._optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor) and value.device == parameter.device
        ]


def _empty(wrapper: Tensor, flag: Tensor) -> None:
    """Make it hold zeros unless ``flag`` is 0, as it says zero itself: a table inside stays what it is."""
    inner = [tensor for _, tensor in inner_tensors(wrapper)]
    kept = [tensor.clone() for tensor in inner]
    wrapper.copy_(torch.zeros(wrapper.shape, dtype=wrapper.dtype, device=wrapper.device))
    for tensor, before in zip(inner, kept, strict=True):
        tensor.copy_(torch.where(flag != 0, tensor, before))


class _UndoneOptimizer:
    """An optimizer on CUDA whose steps are taken, and undone if the device finds that they should not be."""

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        self.counters = HostCounters(optimizer, device)
        self._newborns = _Newborns(optimizer)
        self._undo = UndoCopy(device)

    def save(self, step: int, heard: int) -> None:
        self._newborns.before_step()
        tensors = [p.detach() for group in self.optimizer.param_groups for p in group["params"]]
        states = (inner_tensors(state) for _, _, state in self._newborns.tensors())
        self._undo.save(tensors + [inner for state in states for _, inner in state])
        if not torch.cuda.is_current_stream_capturing():
            self.counters.note(step, heard)

    def put_back(self, flag: Tensor) -> None:
        self._undo.put_back(flag)
        self._newborns.undo(flag)
