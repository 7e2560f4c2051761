"""Single ops on somebody else's model and loop: graft a branch into a network that knows nothing of tolaria.

    python examples/ops_alone.py

The host is a plain ``nn.Sequential``. A branch is added behind its second layer by a forward hook: first it
learns beside the host without touching it (``straight_through``), then it is faded in (``seed_gate`` and
``blend``). In between it is poisoned with NaN, and at alpha 0 the network does not notice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tolaria import ops


class Branch(nn.Module):
    """A residual block that is the identity at birth."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 32), nn.Tanh(), nn.Linear(32, width))
        nn.init.zeros_(self.inner[2].weight)
        nn.init.zeros_(self.inner[2].bias)

    def forward(self, features: Tensor) -> Tensor:
        """Same shape in and out."""
        return features + self.inner(features)


class Graft:
    """A forward hook that lets ``branch`` take over a layer's output, as far as ``alpha`` says."""

    def __init__(self, branch: nn.Module) -> None:
        self.branch = branch
        self.alpha = torch.zeros(())
        self.incubating = True

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], features: Tensor) -> Tensor:
        """What the next layer sees instead of ``features``."""
        if self.incubating:  # host values and gradients as without the branch, which learns all the same
            return ops.straight_through(features, self.branch(features.detach()))
        grown = self.branch(ops.seed_gate(features, self.alpha))
        return ops.blend(features, grown, self.alpha)


def main(steps: int = 300) -> tuple[float, float]:
    """Returns the loss before and after the branch was grafted."""
    torch.manual_seed(0)
    x = torch.rand(512, 1) * 6.0 - 3.0
    y = (3.0 * x).sin() + 0.3 * x
    host = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizers = [torch.optim.Adam(host.parameters(), lr=1e-2)]
    graft = Graft(Branch(8))

    def train(alphas: Tensor) -> float:
        for alpha in alphas:
            graft.alpha.copy_(alpha)
            loss = nn.functional.mse_loss(host(x), y)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        return loss.item()

    before = train(torch.zeros(steps))
    host[3].register_forward_hook(graft)
    optimizers.append(torch.optim.Adam(graft.branch.parameters(), lr=1e-2))
    beside = train(torch.zeros(steps))  # incubation: the host goes its way, the branch learns beside it
    graft.incubating = False

    healthy = {name: value.clone() for name, value in graft.branch.state_dict().items()}
    graft.alpha.zero_()
    with torch.no_grad():
        graft.branch.inner[0].weight.fill_(float("nan"))
    loss = nn.functional.mse_loss(host(x), y)
    host.zero_grad()
    loss.backward()
    _, _, bad, _ = ops.tensor_stats([p.grad for p in host.parameters()]).tolist()
    print(
        f"NaN in the branch at alpha 0: loss {loss.item():.4f}, {bad:.0f} non-finite values in the gradients"
    )
    graft.branch.load_state_dict(healthy)

    after = train(torch.linspace(0.0, 1.0, steps))  # alpha rises, in place
    print(
        f"loss {before:.4f} with the host alone, {beside:.4f} after incubation, {after:.4f} with the branch"
    )
    return before, after


if __name__ == "__main__":
    main()
