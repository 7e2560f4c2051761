"""The guard of an agent of Stable-Baselines3: nine faults, clean runs, several optimizers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_runs import FAULTS, NAN_FAULTS, Fault, Recorder
from torch import nn
from trainers import is_poisoned, need, same

sb3 = need("stable_baselines3")
gymnasium = need("gymnasium")

from stable_baselines3.common.callbacks import CheckpointCallback  # noqa: E402
from stable_baselines3.common.save_util import load_from_zip_file  # noqa: E402
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor  # noqa: E402

from tolaria import GovernorConfig  # noqa: E402
from tolaria.integrations.sb3 import guard  # noqa: E402

CONFIG = GovernorConfig.balanced(snapshot_interval=5, probation=2)


class Nearer(gymnasium.Env):
    """Go to 0 on a line; one step of an episode is broken if a fault says so."""

    def __init__(self, fault: Fault, *, continuous: bool = False) -> None:
        self.observation_space = gymnasium.spaces.Box(-10.0, 10.0, (2,))
        box = gymnasium.spaces.Box(-1.0, 1.0, (1,))
        self.action_space = box if continuous else gymnasium.spaces.Discrete(2)
        self.fault, self.steps = fault, 0

    def _see(self) -> Any:
        return torch.tensor([self.place, 1.0]).numpy()

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place, self.age = float(self.np_random.uniform(-1, 1)), 0
        return self._see(), {}

    def step(self, action: Any) -> Any:
        self.steps, self.age = self.steps + 1, self.age + 1
        move = (
            float(action[0])
            if isinstance(self.action_space, gymnasium.spaces.Box)
            else 2.0 * float(action) - 1.0
        )
        self.place = max(-2.0, min(2.0, self.place + 0.1 * move))
        is_bad = self.fault.name == "corrupted batch" and 250 <= self.steps < 280
        return self._see(), 1e6 if is_bad else -abs(self.place), False, self.age >= 16, {}


class Normed(BaseFeaturesExtractor):
    """Features with a buffer that training moves."""

    def __init__(self, space: Any) -> None:
        super().__init__(space, 2)
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


class Strikes:
    """Faults inside the steps of an optimizer, in front of the guard's hooks."""

    def __init__(self, fault: Fault, model: nn.Module, optimizer: Any) -> None:
        self.fault, self.model, self.steps = fault, model, 0
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    @torch.no_grad()
    def before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.steps += 1
        factor = self.fault.loss(torch.ones(()), self.steps)  # a loss's gradient is as bad as the loss
        if factor != 1.0:
            for p in self.model.parameters():
                if p.grad is not None:
                    p.grad *= factor
        self.fault.before_step(self.model, optimizer, self.steps)

    def after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.fault.after_step(self.model, optimizer, self.steps)


def ppo(folder: Path | None, fault: Fault, *, is_governed: bool = True, timesteps: int = 64 * 8) -> Any:
    agent = sb3.PPO(
        "MlpPolicy", Nearer(fault), n_steps=64, batch_size=32, n_epochs=2, seed=0, device="cpu",
        policy_kwargs={"features_extractor_class": Normed},
    )  # fmt: skip
    Strikes(fault, agent.policy, agent.policy.optimizer)
    governor = guard(agent, config=CONFIG) if is_governed else None
    recorder = Recorder(agent.policy, agent.policy.optimizer)
    if governor is not None:
        agent.policy.optimizer.register_step_post_hook(lambda *args: recorder.record(governor))
    saves = None if folder is None else CheckpointCallback(32, str(folder))
    agent.learn(timesteps, callback=saves)
    return agent, governor, recorder


def poisoned(folder: Path) -> list[str]:
    found = sorted(folder.glob("*.zip"))
    assert found
    return [path.name for path in found if is_poisoned(list(load_from_zip_file(path)[1:]))]


@pytest.mark.parametrize("name", FAULTS)
def test_an_agent_survives(name: str, tmp_path: Path) -> None:
    agent, governor, recorder = ppo(tmp_path, Fault(name, at=19))
    assert agent.num_timesteps == 512
    assert governor.step_count == 32
    assert len(list(tmp_path.glob("*.zip"))) == 16
    assert not poisoned(tmp_path)
    assert not is_poisoned([agent.policy.state_dict(), agent.policy.optimizer.state_dict()])
    assert recorder.exact == [True] * governor.rollback_count
    if name in NAN_FAULTS:
        assert governor.rollback_count == 1
        assert governor.last_report.step == 19


def test_the_bare_agent_does_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nan"):
        ppo(None, Fault("gradient", at=19), is_governed=False)


def test_a_clean_governed_agent_is_the_bare_one(tmp_path: Path) -> None:
    def end(is_governed: bool) -> list[Any]:
        agent = ppo(tmp_path, Fault("none"), is_governed=is_governed)[0]
        return [agent.policy.state_dict(), agent.policy.optimizer.state_dict(), torch.get_rng_state()]

    assert same(end(True), end(False))


def test_what_is_saved_is_verified(tmp_path: Path) -> None:
    agent, governor, _ = ppo(None, Fault("none"), timesteps=128)
    with torch.no_grad():
        agent.policy.action_net.weight[0, 0] = math.nan
    agent.save(tmp_path / "agent.zip")
    assert governor.rollback_count == 1
    assert not poisoned(tmp_path)
    again = sb3.PPO.load(tmp_path / "agent.zip", env=Nearer(Fault("none")))
    assert guard(again, config=CONFIG).step_count == 0


def off_policy(kind: str, fault: Fault, *, is_governed: bool = True) -> Any:
    options = {"learning_starts": 20, "batch_size": 16, "seed": 0, "device": "cpu", "buffer_size": 500}
    env = Nearer(fault, continuous=kind != "DQN")
    options |= {"train_freq": 1} if kind == "DQN" else {}
    agent = getattr(sb3, kind)("MlpPolicy", env, policy_kwargs={"net_arch": [16]}, **options)
    optimizers = (
        [agent.policy.optimizer] if kind == "DQN" else [agent.critic.optimizer, agent.actor.optimizer]
    )
    if kind == "SAC":
        optimizers.append(agent.ent_coef_optimizer)
    Strikes(fault, agent.policy if kind == "DQN" else agent.critic, optimizers[0])
    governor = guard(agent, config=CONFIG) if is_governed else None
    agent.learn(80)
    return agent, governor, optimizers


@pytest.mark.parametrize("name", ["none", "gradient", "weight", "moment"])
@pytest.mark.parametrize("kind", ["DQN", "SAC", "TD3"])
def test_off_policy_agents(kind: str, name: str) -> None:
    def state(agent: Any, optimizers: Any) -> list[Any]:
        found = [agent.policy.state_dict(), *(each.state_dict() for each in optimizers)]
        return [*found, agent.log_ent_coef.detach()] if kind == "SAC" else found

    agent, governor, optimizers = off_policy(kind, Fault(name, at=15))
    assert agent.num_timesteps == 80
    assert governor.rollback_count == int(name != "none")
    assert not is_poisoned(state(agent, optimizers))
    if name == "none":
        bare, _, others = off_policy(kind, Fault("none"), is_governed=False)
        assert same(state(agent, optimizers), state(bare, others))


def test_a_learnt_entropy_coefficient_goes_back_too() -> None:
    agent, governor, _ = off_policy("SAC", Fault("none"))
    governor.reset()
    with torch.no_grad():
        before = agent.log_ent_coef.clone()
        agent.log_ent_coef.add_(1.0)
    governor.execute_rollback()
    assert torch.equal(agent.log_ent_coef, before)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="agent"):
        guard(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="config"):
        guard(sb3.PPO("MlpPolicy", Nearer(Fault("none")), device="cpu"), config=1)
    with pytest.raises(ValueError, match="agent"):
        guard(sb3.PPO("MlpPolicy", Nearer(Fault("none")), device="cpu", _init_setup_model=False))
