"""A seed that rolls dice under activation checkpointing: gradients are those without it, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.utils.checkpoint import checkpoint

from tolaria import MorphogeneticModel

Call = Callable[[nn.Module, Tensor], Tensor]


def plain(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)  # type: ignore[no-any-return]


def modern(module: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(module, x, use_reentrant=False)  # type: ignore[no-any-return]


def reentrant(module: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(module, x, use_reentrant=True)  # type: ignore[no-any-return]


def nested(module: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda h: modern(module, h), x, use_reentrant=False)  # type: ignore[no-any-return]


def twice_inside(module: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda h: module(torch.tanh(module(h))), x, use_reentrant=False)  # type: ignore[no-any-return]


def twice_plain(module: nn.Module, x: Tensor) -> Tensor:
    return module(torch.tanh(module(x)))  # type: ignore[no-any-return]


class ByHand(torch.autograd.Function):
    """A checkpoint as people write it themselves."""

    @staticmethod
    def forward(ctx, module, x):  # type: ignore[no-untyped-def]
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.module(x), gradient)
        return None, x.grad


def by_hand(module: nn.Module, x: Tensor) -> Tensor:
    return ByHand.apply(module, x)  # type: ignore[no-any-return]


class Host(nn.Module):
    """A layer that may be checkpointed, behind one that may not."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.stem, self.head, self.call = nn.Linear(8, 8), nn.Linear(8, 4), call
        self.layer = nn.Sequential(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.call(self.layer, self.stem(x))))  # type: ignore[no-any-return]


def siamese(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - model(y)).square().mean()


def same_twice(model: nn.Module, x: Tensor, _: Tensor) -> Tensor:
    return (model(x) - model(x)).square().mean()


def looked_at_between(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = model(x).square().mean()
    with torch.no_grad():
        model(y)
    return loss  # type: ignore[no-any-return]


LOSSES = [siamese, same_twice, looked_at_between]


def gradients(
    call: Call, loss: Callable[[nn.Module, Tensor, Tensor], Tensor], prepare: bool = False
) -> Tensor:
    torch.manual_seed(0)
    model = MorphogeneticModel(Host(call), {"s": "layer.0"}, example_input=torch.zeros(4, 8))
    if prepare:
        composable_checkpoint(model.host.layer)  # type: ignore[arg-type]
    model.germinate(
        "s", lambda f: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)), rng_seed=3
    )
    model.incubate("s")
    model.blend("s", 1).step()
    torch.manual_seed(1)
    value = loss(model, torch.randn(16, 8), torch.randn(16, 8))
    value.backward()
    return torch.cat([value.detach().view(1), *(p.grad.flatten() for p in model.parameters())])  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the probe at germination
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("call", [modern, reentrant, nested, by_hand])
def test_each_forward_is_run_anew_with_what_it_drew(
    call: Call, loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
) -> None:
    assert torch.equal(gradients(call, loss), gradients(plain, loss))


@pytest.mark.parametrize("loss", LOSSES)
def test_slot_that_is_passed_twice_in_one_checkpoint(
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> None:
    assert torch.equal(gradients(twice_inside, loss), gradients(twice_plain, loss))


@pytest.mark.parametrize("loss", LOSSES)
def test_checkpoint_that_lives_in_hooks_of_a_module(
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> None:
    assert torch.equal(gradients(plain, loss, prepare=True), gradients(plain, loss))
