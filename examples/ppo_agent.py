"""A PPO agent that steers training runs, and whose rollout buffer receives the governor's -10.

    python examples/ppo_agent.py

Eight small training runs are the environments. In each step the agent chooses how far to raise its run's
learning rate: boldness pays (the reward is the fall of the loss) until the run blows up. ``GovernorBank``
judges all eight losses in one call, rolls a wrecked run back, and returns the rewards of that step: -10 for
each rollback, 0 elsewhere. They are added to the very rewards that PPO learns from. PPO itself is plain
PyTorch: a policy, a value, a clipped loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tolaria import GovernorBank, GovernorConfig

N_RUNS, HORIZON, GAMMA, LAMBDA, CLIP = 8, 16, 0.95, 0.9, 0.2
FACTORS = (0.5, 1.0, 2.0, 30.0)  # what an action does to the learning rate of 0.05: the last one is madness


class TrainingRuns:
    """Environments: linear regressions by plain gradient descent, one model and optimizer each."""

    def __init__(self, bank: GovernorBank) -> None:
        self.bank = bank
        self.x = torch.randn(N_RUNS, 64, 6)
        self.y = self.x @ torch.randn(N_RUNS, 6, 1) * 2.0
        self.models = [nn.Linear(6, 1) for _ in range(N_RUNS)]
        self.optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in self.models]
        for row, (model, optimizer) in enumerate(zip(self.models, self.optimizers, strict=True)):
            bank.attach(row, model, optimizer)
        self.losses = self._losses().detach()

    def _losses(self) -> Tensor:
        rows = zip(self.models, self.x, self.y, strict=True)
        return torch.stack([nn.functional.mse_loss(model(x), y) for model, x, y in rows])

    def observe(self) -> Tensor:
        """(n, 2): log loss, and one."""
        return torch.stack((self.losses.clamp(1e-6, 1e6).log(), torch.ones(N_RUNS)), dim=1)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Train each run by one step; rewards (n,) and the governor's part of them (n,)."""
        for optimizer, action in zip(self.optimizers, actions.tolist(), strict=True):
            optimizer.param_groups[0]["lr"] = 0.05 * FACTORS[action]
            optimizer.zero_grad()
        self._losses().sum().backward()
        for optimizer in self.optimizers:
            optimizer.step()
        after = self._losses().detach()  # of the weights just made: a run that blew up is caught at once
        punished = self.bank.step(after)  # one launch for all runs; wrecked ones are rolled back here
        progress = (self.losses.log() - after.log()).clamp(-1.0, 1.0)
        fell = punished < 0
        self.losses = self._losses().detach() if bool(fell.any()) else after
        return torch.where(fell, 0.0, progress) + punished, punished


@dataclass
class RolloutBuffer:
    """What PPO learns from; every tensor is (horizon, n, ...)."""

    observations: Tensor
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    rewards: Tensor

    def advantages(self, last_value: Tensor) -> Tensor:
        """Generalised advantage estimation."""
        out, running, following = torch.zeros_like(self.rewards), torch.zeros(N_RUNS), last_value
        for t in reversed(range(HORIZON)):
            delta = self.rewards[t] + GAMMA * following - self.values[t]
            running = delta + GAMMA * LAMBDA * running
            out[t], following = running, self.values[t]
        return out


class Agent(nn.Module):
    """Policy and value from the same observation."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, len(FACTORS)))
        self.value = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, observations: Tensor) -> tuple[torch.distributions.Categorical, Tensor]:
        """Distribution over actions and value of each observation."""
        logits = self.policy(observations)
        return torch.distributions.Categorical(logits=logits), self.value(observations).squeeze(-1)


def collect(agent: Agent, runs: TrainingRuns) -> tuple[RolloutBuffer, Tensor, float]:
    """One rollout; the buffer, the value after it, and what the governor took away."""
    rows: list[tuple[Tensor, ...]] = []
    taken = 0.0
    with torch.no_grad():
        for _ in range(HORIZON):
            seen = runs.observe()
            distribution, value = agent(seen)
            action = distribution.sample()
            with torch.enable_grad():
                reward, punished = runs.step(action)
            taken += float(punished.sum())
            rows.append((seen, action, distribution.log_prob(action), value, reward))
        last_value = agent(runs.observe())[1]
    return RolloutBuffer(*(torch.stack(column) for column in zip(*rows, strict=True))), last_value, taken


def improve(
    agent: Agent, optimizer: torch.optim.Optimizer, buffer: RolloutBuffer, last_value: Tensor
) -> None:
    """Four passes of PPO's clipped loss over the buffer."""
    advantages = buffer.advantages(last_value)
    returns = advantages + buffer.values
    normal = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    for _ in range(4):
        distribution, values = agent(buffer.observations)
        ratio = (distribution.log_prob(buffer.actions) - buffer.log_probs).exp()
        gain = torch.min(ratio * normal, ratio.clamp(1.0 - CLIP, 1.0 + CLIP) * normal)
        loss = -gain.mean() + 0.5 * (values - returns).square().mean() - 0.01 * distribution.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
        optimizer.step()


def main(updates: int = 25) -> list[float]:
    """Train the agent; returns the share of mad actions in each rollout."""
    torch.manual_seed(0)
    agent = Agent()
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
    config = GovernorConfig(
        rule="any", absolute_threshold=50.0, warmup_bound=50.0, multiplier=20.0, min_panics_before_rollback=1,
        snapshot_interval=4, probation=1, min_std=0.5, max_rollbacks=10_000,
        max_restores_of_one_capture=10_000,  # going back to the start again and again is what it learns from
    )  # fmt: skip
    shares = []
    for update in range(updates):
        runs = TrainingRuns(GovernorBank(N_RUNS, config=config))  # fresh runs: an episode is one rollout
        buffer, last_value, taken = collect(agent, runs)
        assert taken == float(buffer.rewards[buffer.rewards <= -5.0].sum()), "the -10 is in the buffer"
        shares.append(float((buffer.actions == len(FACTORS) - 1).float().mean()))
        if update % 6 == 0 or update == updates - 1:
            mean = float(buffer.rewards.mean())
            print(
                f"update {update:2d}: mean reward {mean:+.3f}, governor took {taken:+.0f}, "
                f"mad actions {100 * shares[-1]:.0f}%"
            )
        improve(agent, optimizer, buffer, last_value)
    return shares


if __name__ == "__main__":
    main()
