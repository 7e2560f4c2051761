"""``GovernedVecEnv``: training runs as environments of Stable-Baselines3."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from trainers import is_poisoned, need

sb3 = need("stable_baselines3")
gymnasium = need("gymnasium")

from stable_baselines3.common.callbacks import BaseCallback  # noqa: E402
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize  # noqa: E402

from tolaria import GovernorConfig  # noqa: E402
from tolaria.integrations.sb3 import GovernedVecEnv  # noqa: E402

CONFIG = GovernorConfig(
    rule="any", absolute_threshold=50.0, warmup_bound=50.0, multiplier=20.0, min_panics_before_rollback=1,
    snapshot_interval=4, probation=1, min_std=0.5, max_rollbacks=10**6, max_restores_of_one_capture=10**6,
)  # fmt: skip
WRECK, CALM = 1, 0


class Regression(gymnasium.Env):
    """A linear regression by gradient descent; the second action wrecks it."""

    def __init__(self, number: int = 0, length: int = 25, has_model: bool = True) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
        self.action_space = gymnasium.spaces.Discrete(2)
        self.number, self.length = number, length
        draws = torch.Generator().manual_seed(number)
        self.x = torch.randn(32, 4, generator=draws)
        self.y = self.x @ torch.randn(4, 1, generator=draws)
        self.models = 0
        if has_model:
            self.model, self.optimizer = self._make()

    def _make(self) -> Any:
        self.net = nn.Linear(4, 1)
        return self.net, torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.5)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.age, self.models = 0, self.models + 1
        if hasattr(self, "model"):
            self.model, self.optimizer = self._make()
        else:
            self.sgd = self._make()[1]
        return self._see(1.0), {}

    def _see(self, loss: float) -> Any:
        return np.array([math.log(loss) if loss == loss else loss, 1.0], dtype=np.float32)

    def step(self, action: Any) -> Any:
        self.age += 1
        optimizer = self.optimizer if hasattr(self, "optimizer") else self.sgd
        optimizer.zero_grad()
        nn.functional.mse_loss(self.net(self.x), self.y).backward()
        if action == WRECK:
            self.net.weight.grad.fill_(math.nan if self.number % 2 else 1e6)
        optimizer.step()
        with torch.no_grad():
            loss = nn.functional.mse_loss(self.net(self.x), self.y)
        value = float(loss)
        reward = math.nan if math.isnan(value) else -min(value, 5.0) / 10.0
        return self._see(value), reward, False, self.age >= self.length, {"loss": loss}


def actions(*numbers: int) -> Any:
    return np.array(numbers)


def test_a_wreck_ends_its_episode_with_the_penalty_in_the_raw_reward() -> None:
    env = GovernedVecEnv(Regression, 3, CONFIG)
    env.reset()
    for _ in range(12):
        _, rewards, dones, infos = env.step(actions(CALM, CALM, CALM))
        assert not dones.any()
        assert (rewards > -1).all()
        assert not any("governor" in info for info in infos)
    wrecked = [run.model for run in env.envs]
    seen, rewards, dones, infos = env.step(actions(CALM, WRECK, WRECK))
    assert rewards[1:].tolist() == [-10.0, -10.0]
    assert rewards[0] > -1
    assert dones.tolist() == [False, True, True]
    assert infos[1]["governor"] == "NON_FINITE"
    assert infos[2]["governor"] == "ANOMALY"
    for info in infos[1:]:
        assert not info["TimeLimit.truncated"]
        assert np.isfinite(info["terminal_observation"]).all()
    assert np.isfinite(seen).all()
    assert all(model.weight.isfinite().all() and model.weight.abs().max() < 100 for model in wrecked)
    assert env.wrecks == [0, 1, 1]
    assert [run.models for run in env.envs] == [1, 2, 2]
    assert env.envs[1].model is not wrecked[1]
    for _ in range(11):
        _, rewards, dones, infos = env.step(actions(CALM, CALM, CALM))
        assert (rewards > -1).all()
    assert not dones[1:].any()


@pytest.mark.parametrize("has_model", [True, False])
def test_an_episode_begins_with_losses_of_its_own(has_model: bool) -> None:
    config = CONFIG.replace(rule="all", absolute_threshold=0.01, multiplier=5.0)
    env = GovernedVecEnv(lambda: Regression(0, 60, has_model), 1, config)
    env.reset()
    ends = 0
    for _ in range(150):  # the losses of a new model are a hundred times those at the end of the last one's
        _, _, dones, infos = env.step(actions(CALM))
        assert "governor" not in infos[0]
        ends += int(dones[0] and infos[0]["TimeLimit.truncated"])
    assert ends == 2
    assert env.wrecks == [0]


def test_the_penalty_survives_monitor_and_normalisation() -> None:
    env = VecNormalize(VecMonitor(GovernedVecEnv(Regression, 2, CONFIG)), norm_reward=False)
    env.reset()
    for _ in range(5):
        env.step(actions(CALM, CALM))
    _, rewards, dones, infos = env.step(actions(WRECK, CALM))
    assert dones.tolist() == [True, False]
    assert rewards[0] == -10.0
    assert infos[0]["episode"]["r"] < -9.5


def test_ppo_learns_from_it() -> None:
    shares: list[float] = []

    class Looks(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            buffer = self.model.rollout_buffer
            shares.append(float((buffer.actions == WRECK).mean()))
            assert ((buffer.rewards == -10.0) == (buffer.actions[..., 0] == WRECK)).all()

    env = VecMonitor(GovernedVecEnv(Regression, 4, CONFIG))
    agent = sb3.PPO(
        "MlpPolicy", env, n_steps=16, batch_size=32, learning_rate=5e-3, seed=0, device="cpu", gamma=0.9
    )
    agent.learn(4 * 16 * 6, callback=Looks())
    assert shares[-1] < shares[0] / 2


def test_no_nan_reaches_a_replay_buffer() -> None:
    env = VecMonitor(GovernedVecEnv(Regression, 4, CONFIG))
    agent = sb3.DQN("MlpPolicy", env, learning_starts=20, buffer_size=400, seed=0, device="cpu")
    agent.learn(160)
    buffer = agent.replay_buffer
    assert (buffer.rewards == -10.0).any()
    for stored in (buffer.observations, buffer.next_observations, buffer.rewards):
        assert np.isfinite(stored).all()
    assert not is_poisoned(agent.policy.state_dict())


def test_settings_and_arguments() -> None:
    env = GovernedVecEnv(lambda i: Regression(i), 2)
    assert env.bank.config.shift_horizon == GovernorConfig.balanced().shift_horizon
    assert [run.number for run in env.envs] == [0, 1]
    with pytest.raises(TypeError, match="make_run"):
        GovernedVecEnv(Regression(), 2)
    with pytest.raises(ValueError, match="n: "):
        GovernedVecEnv(Regression, 0)
    with pytest.raises(TypeError, match="config"):
        GovernedVecEnv(Regression, 2, "balanced")
    with pytest.raises(ValueError, match="death_penalty"):
        GovernedVecEnv(Regression, 2, CONFIG.replace(death_penalty=0.0))

    class Silent(Regression):
        def step(self, action: Any) -> Any:
            return (*super().step(action)[:4], {})

    silent = GovernedVecEnv(Silent, 1)
    silent.reset()
    with pytest.raises(ValueError, match=r'info\["loss"\]'):
        silent.step(actions(CALM))
