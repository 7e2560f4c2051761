"""The governor in Stable-Baselines3: of an agent (``guard``), and of the runs that an agent steers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tolaria._arguments import check_optional
from tolaria._optional import require
from tolaria.governor import GovernorBank, GovernorConfig, Sink
from tolaria.integrations._sb3_agent import guard

__all__ = ["GovernedVecEnv", "guard"]

_vec_env = require(
    "stable_baselines3.common.vec_env", feature="GovernedVecEnv", package="stable-baselines3", extra="sb3"
)


class GovernedVecEnv(_vec_env.DummyVecEnv):  # type: ignore[misc, name-defined]
    """Training runs as environments, judged in one launch by a :class:`GovernorBank`.

    A run is a ``gymnasium.Env`` of which each step trains something and tells its loss in
    ``info["loss"]``. One that has attributes ``model`` and ``optimizer`` (or several in a list) is captured
    and rolled back as well. A step at which a run is wrecked ends its episode: ``terminated``, so that nobody
    bootstraps from there, with minus ``death_penalty`` as the raw reward in place of the run's own, which may
    be NaN. ``info["governor"]`` then names the reason. The run goes back to its last good state before it is
    reset. Put ``VecMonitor`` and ``VecNormalize`` around this, not inside.

    Args:
        make_run: makes the run of number ``i`` (0 to n - 1); or, without an argument, any.
        n: how many.
        config: settings; None means :meth:`GovernorConfig.balanced` without an end after many rollbacks, from
            which the agent is to learn.
        num_classes, random_guess_loss, sinks: as for :class:`GovernorBank`.

    Attributes:
        bank: judges; its rows begin anew with each episode.
        wrecks: how often each run was wrecked.

    Raises:
        TypeError, ValueError: an argument, or what ``make_run`` makes, is something else.
    """

    def __init__(
        self,
        make_run: Callable[..., Any],
        n: int,
        config: GovernorConfig | None = None,
        *,
        num_classes: int | None = None,
        random_guess_loss: float | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        if not callable(make_run):
            raise TypeError(f"make_run: expected a function that makes a run, got {type(make_run).__name__}")
        check_optional("config", config, GovernorConfig)
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n: expected an integer of at least 1, got {n!r}")
        if config is not None and config.death_penalty == 0.0:
            raise ValueError("config: expected a death_penalty above 0, got 0; by it a wreck is known")
        numbered = _takes_a_number(make_run)
        runs = [make_run(i) if numbered else make_run() for i in range(n)]
        super().__init__([lambda run=run: run for run in runs])
        devices = {next(run.model.parameters()).device for run in map(_unwrapped, runs) if _is_covered(run)}
        if len(devices) > 1:
            raise ValueError(f"make_run: expected models on one device, got {sorted(map(str, devices))}")
        endless = GovernorConfig.balanced(max_rollbacks=10**9, max_restores_of_one_capture=10**9)
        self.bank = GovernorBank(
            n, config=config or endless, num_classes=num_classes, random_guess_loss=random_guess_loss,
            sinks=sinks, device=devices.pop() if devices else "cpu",
        )  # fmt: skip
        self.wrecks = [0] * n
        self._device = self.bank._state.device
        self._idle = [nn.ParameterList([nn.Parameter(torch.zeros(1, device=self._device))]) for _ in range(n)]

    def reset(self) -> Any:  # noqa: ANN401  (observations)
        """Begin all episodes; the states of the runs are the last good ones then."""
        for i in range(self.num_envs):
            self.bank.detach(i)
        observations = super().reset()
        for i in range(self.num_envs):
            self._begin_episode(i)
        return observations

    def step_wait(self) -> Any:  # noqa: ANN401  (as DummyVecEnv's)
        """Step the runs, judge their losses together, and reset those whose episodes have ended."""
        before = self._obs_from_buf()
        steps = [env.step(action) for env, action in zip(self.envs, self.actions, strict=True)]
        losses = torch.cat([self._loss(i, step[4]) for i, step in enumerate(steps)])
        punished = self.bank.step(losses).tolist()
        for i, (seen, reward, terminated, truncated, told) in enumerate(steps):
            is_wrecked = punished[i] < 0.0
            info = {**told, "TimeLimit.truncated": bool(truncated and not terminated and not is_wrecked)}
            if is_wrecked:
                reward, seen = punished[i], _finite(seen, _row(before, i))
                self.wrecks[i] += 1
                info["governor"] = self.bank.reasons[i].name
            self.buf_rews[i], self.buf_infos[i] = reward, info
            self.buf_dones[i] = terminated or truncated or is_wrecked
            if self.buf_dones[i]:
                info["terminal_observation"] = seen
                self.bank.detach(i)
                seen, self.reset_infos[i] = self.envs[i].reset()
                self._begin_episode(i)
            self._save_obs(i, seen)
        return self._obs_from_buf(), self.buf_rews.copy(), self.buf_dones.copy(), deepcopy(self.buf_infos)

    def _begin_episode(self, i: int) -> None:
        """What was judged belongs to the last one; a run without a model is judged by its loss alone."""
        run = _unwrapped(self.envs[i])
        model, optimizers = (run.model, run.optimizer) if _is_covered(run) else (self._idle[i], [])
        self.bank.attach(i, model, optimizers)

    def _loss(self, i: int, info: dict[str, Any]) -> Tensor:
        loss = info.get("loss")
        if isinstance(loss, Tensor) and loss.numel() == 1:
            return loss.detach().reshape(1).to(self._device, torch.float64)
        if isinstance(loss, int | float | np.number) and not isinstance(loss, bool):
            return torch.tensor([float(loss)], dtype=torch.float64, device=self._device)
        raise ValueError(f'make_run: expected info["loss"] of one number from run {i}, got {loss!r}')


def _takes_a_number(make_run: Callable[..., Any]) -> bool:
    try:
        inspect.signature(make_run).bind(0)
    except TypeError:
        return False
    return True


def _unwrapped(env: Any) -> Any:  # noqa: ANN401  (gymnasium's)
    return env.unwrapped


def _is_covered(run: Any) -> bool:  # noqa: ANN401  (gymnasium's)
    return isinstance(getattr(run, "model", None), nn.Module) and hasattr(run, "optimizer")


def _row(observations: Any, i: int) -> Any:  # noqa: ANN401  (arrays, in a dict or a tuple maybe)
    if isinstance(observations, dict):
        return {name: each[i] for name, each in observations.items()}
    if isinstance(observations, tuple):
        return tuple(each[i] for each in observations)
    return observations[i]


def _finite(seen: Any, before: Any) -> Any:  # noqa: ANN401  (likewise)
    """``seen``, or what was seen before where that is not finite: it is stored, and 0 * NaN is NaN."""
    arrays = seen.values() if isinstance(seen, dict) else seen if isinstance(seen, tuple) else [seen]
    return seen if all(np.isfinite(each).all() for each in arrays) else before
