"""Stable-Baselines3: an agent lives through a NaN gradient, and another one steers training runs.

    python examples/sb3_guard.py

needs ``pip install ".[sb3]"``.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO
from torch import nn

from tolaria import GovernorConfig
from tolaria.governor import GovernorEvent, RollbackEvent
from tolaria.integrations.sb3 import GovernedVecEnv, guard

FACTORS = (0.5, 1.0, 2.0, 1e4)  # what an action does to the learning rate: the last one is madness


class Regression(gymnasium.Env):
    """A training run; each step the agent chooses the learning rate."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gymnasium.spaces.Discrete(len(FACTORS))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """A new model and new data."""
        super().reset(seed=seed)
        self.x, self.steps = torch.randn(64, 6), 0
        self.y = self.x @ torch.randn(6, 1)
        self.model = nn.Linear(6, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        return self._see(1.0), {}

    def _see(self, loss: float) -> Any:  # noqa: ANN401  (an array)
        return np.array([math.log(min(max(loss, 1e-6), 1e6)), 1.0], np.float32)

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step of gradient descent; the reward is the fall of the loss."""
        self.steps += 1
        self.optimizer.param_groups[0]["lr"] = 0.05 * FACTORS[int(action)]
        before = nn.functional.mse_loss(self.model(self.x), self.y)
        self.optimizer.zero_grad()
        before.backward()
        self.optimizer.step()
        with torch.no_grad():
            after = nn.functional.mse_loss(self.model(self.x), self.y)
        reward = max(-1.0, min(1.0, float(before.detach().log() - after.log())))
        return self._see(float(after)), reward, False, self.steps >= 16, {"loss": after}


def main(updates: int = 10) -> tuple[int, float]:
    """Train two agents; return the first one's rollbacks, and the share of mad actions of the second."""
    agent = PPO("MlpPolicy", "CartPole-v1", n_steps=128, seed=0, device="cpu")
    agent.policy.optimizer.register_step_pre_hook(break_one_gradient)
    governor = guard(agent, sinks=[tell])  # the one line
    agent.learn(512)

    at_once = GovernorConfig(  # an episode is too short to wait whether a run recovers by itself
        rule="any", absolute_threshold=50.0, warmup_bound=50.0, multiplier=20.0, min_panics_before_rollback=1,
        snapshot_interval=4, probation=1, min_std=0.5, max_rollbacks=10**6, max_restores_of_one_capture=10**6,
    )  # fmt: skip
    env = GovernedVecEnv(Regression, 8, at_once)
    steering = PPO(
        "MlpPolicy", env, n_steps=16, batch_size=64, learning_rate=3e-3, gamma=0.9, seed=0, device="cpu"
    )
    steering.learn(8 * 16 * updates)
    share = float((steering.rollout_buffer.actions == len(FACTORS) - 1).mean())
    print(f"{sum(env.wrecks)} runs were wrecked; at the end {100 * share:.0f}% of the actions are mad")
    return governor.rollback_count, share


def break_one_gradient(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ANN401
    """At the 50th step of the optimizer."""
    break_one_gradient.steps = getattr(break_one_gradient, "steps", 0) + 1
    if break_one_gradient.steps == 50:
        optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = math.nan


def tell(event: GovernorEvent) -> None:
    """Print rollbacks."""
    if isinstance(event, RollbackEvent):
        report = event.report
        print(f"step {report.step}: {report.reason.name}, back to the state of step {report.restored_step}")


if __name__ == "__main__":
    main()
