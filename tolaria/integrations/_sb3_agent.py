"""The guard of an agent of Stable-Baselines3."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tolaria._arguments import check_optional
from tolaria._optional import require
from tolaria.errors import UncoveredWarning
from tolaria.governor import GovernorConfig, Sink
from tolaria.governor.optimizer_guard import Guard
from tolaria.integrations._found import say
from tolaria.integrations._saving import VerifiedStateDicts

_base = require(
    "stable_baselines3.common.base_class", feature="sb3.guard", package="stable-baselines3", extra="sb3"
)


class _AgentGuard(Guard):
    """Judges after the steps of one optimizer of several, the last of a gradient step.

    A rollback between the others would change weights in place through which a backward is still to come.
    """

    def __init__(
        self,
        policy: nn.Module,
        optimizers: Sequence[Optimizer],
        last: Optimizer,
        **options: Any,  # noqa: ANN401  (those of its base)
    ) -> None:
        self._last = last
        super().__init__(policy, optimizers, **options)

    def _watch(self, optimizer: Optimizer) -> None:
        if optimizer is self._last:
            super()._watch(optimizer)


def guard(agent: Any, *, config: GovernorConfig | None = None, sinks: Sequence[Sink] = ()) -> Guard:  # noqa: ANN401
    """Govern an agent while it learns: ``guard(agent)`` before ``agent.learn(...)``, and after a load.

    Like :func:`tolaria.guard`, by hooks on the optimizers, since the agent hands no loss over: judged are
    gradients and state, after each step of ``policy.optimizer`` or, of actor and critic, of the actor's.
    Covered is what ``agent.save`` writes: the policy with its target networks, every optimizer, an entropy
    coefficient that is learnt. What is saved is verified before.

    Args:
        agent: of any algorithm of Stable-Baselines3 or its contrib that has an optimizer.
        config: settings; None means :meth:`GovernorConfig.balanced`.
        sinks: called with every event.

    Returns:
        The governor, which need not be kept.

    Raises:
        TypeError: it is no agent.
        ValueError: it has no policy yet (``_init_setup_model=False``) or no optimizer, or as for
            :func:`tolaria.guard`.
    """
    if not isinstance(agent, _base.BaseAlgorithm):
        raise TypeError(f"agent: expected an agent of stable_baselines3, got {type(agent).__name__}")
    check_optional("config", config, GovernorConfig)
    if not isinstance(getattr(agent, "policy", None), nn.Module):
        raise ValueError("agent: expected one with a policy, got one not set up")  # noqa: TRY004  (its state)
    found = {name: attrgetter(name)(agent) for name in agent._get_torch_save_params()[0]}
    optimizers = {name: each for name, each in found.items() if isinstance(each, Optimizer)}
    if not optimizers:
        raise ValueError(f"agent: expected one with an optimizer, got {type(agent).__name__}")
    last = optimizers.get("actor.optimizer", next(iter(optimizers.values())))
    config = config or GovernorConfig.balanced()
    if config.skip_anomalous_steps:
        raise ValueError(
            "config: expected skip_anomalous_steps=False, got True; an agent is judged after its step"
        )
    with (
        warnings.catch_warnings()
    ):  # the coefficient is in no module, but its optimizer's parameters are covered
        warnings.simplefilter("ignore", UncoveredWarning)
        governor = _AgentGuard(agent.policy, list(optimizers.values()), last, config=config, sinks=sinks)
    VerifiedStateDicts(governor, agent.policy, list(optimizers.values()))
    say("Stable-Baselines3", agent=type(agent).__name__, optimizers=dict(optimizers))
    return governor
