"""Several seeds at once: what goes wrong in one reaches neither its neighbours nor the host, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Adam, AdamW, Optimizer

from tolaria import MorphogeneticModel, train_epoch_blended, train_epoch_incubator_mode

SLOTS = ("a", "b", "c")
CE = nn.CrossEntropyLoss()


def grown() -> MorphogeneticModel:
    torch.manual_seed(0)
    host = nn.Sequential(
        nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
    )
    model = MorphogeneticModel(host, {"a": "0", "b": "2", "c": "4"}, example_input=torch.zeros(2, 4))
    for number, name in enumerate(SLOTS):
        model.germinate(
            name, lambda f: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1), nn.Linear(8, 8)), rng_seed=number
        )
        model.incubate(name)
    return model


def batches(count: int = 12) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 4, generator=draw), torch.randint(3, (16,), generator=draw)) for _ in range(count)
    ]


def one_over_all(model: MorphogeneticModel) -> Optimizer:
    return AdamW(model.seed_parameters(), lr=1e-2)


def a_group_each(model: MorphogeneticModel) -> Optimizer:
    return Adam([{"params": model.seed_parameters(name)} for name in model.slots], lr=1e-2, foreach=False)


def one_each(model: MorphogeneticModel) -> list[Optimizer]:
    return [SGD(model.seed_parameters(name), lr=1e-1, momentum=0.9) for name in model.slots]


OPTIMIZERS = [one_over_all, a_group_each, one_each]


def nan_weights(seed: nn.Module) -> None:
    with torch.no_grad():
        seed[2].weight.fill_(float("nan"))  # type: ignore[index,operator]


def infinite_gradients(seed: nn.Module) -> None:
    seed[0].weight.register_hook(lambda g: g * float("inf"))  # type: ignore[index,union-attr,operator]


def late_overflow(seed: nn.Module) -> None:
    calls = [0]

    def overflow(gradient: Tensor) -> Tensor:
        calls[0] += 1
        return gradient * (float("inf") if calls[0] in (3, 4, 9) else 1.0)

    seed[0].weight.register_hook(overflow)  # type: ignore[index,union-attr,operator]


POISONS = [nan_weights, infinite_gradients, late_overflow]


def fingerprint(model: MorphogeneticModel, losses: Tensor, names: tuple[str, ...]) -> list[Tensor]:
    """Losses, the host, healthy seeds, and their gradients."""
    watched = [model.host, *(model.slot(name) for name in names)]
    state = [t.clone() for module in watched for t in module.state_dict().values()]
    gradients = [p.grad.clone() for m in watched for p in m.parameters() if p.grad is not None]
    return [losses, *state, *gradients, torch.get_rng_state()]


def incubated(
    make: Callable[[MorphogeneticModel], Optimizer | list[Optimizer]],
    poison: Callable[[nn.Module], None] | None,
    *,
    scaled: bool,
    clip: float | None,
    accumulation: int = 1,
) -> list[Tensor]:
    model = grown()
    optimizers = make(model)
    if poison is not None:
        poison(model.slot("b").seed)  # type: ignore[arg-type]
    torch.manual_seed(5)
    stats = train_epoch_incubator_mode(
        model, batches(), CE, AdamW(model.host_parameters(), lr=1e-2), optimizers, "cpu",
        max_grad_norm=clip, seed_max_grad_norm=clip, accumulation_steps=accumulation,
        scaler=GradScaler("cpu", init_scale=1024.0, growth_interval=4) if scaled else None,
    )  # fmt: skip
    return fingerprint(model, stats.losses, ("a", "c"))


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize(("scaled", "clip"), [(False, None), (False, 0.3), (True, None), (True, 0.3)])
def test_poisoned_seed_of_three_touches_nobody(
    make: Callable[[MorphogeneticModel], Optimizer | list[Optimizer]],
    poison: Callable[[nn.Module], None],
    scaled: bool,
    clip: float | None,
) -> None:
    beside = incubated(make, poison, scaled=scaled, clip=clip)
    alone = incubated(make, None, scaled=scaled, clip=clip)
    assert len(beside) == len(alone) > 20
    assert all(torch.equal(a, b) for a, b in zip(beside, alone, strict=True))


def test_poisoned_seed_touches_nobody_over_accumulated_batches() -> None:
    beside = incubated(one_over_all, late_overflow, scaled=True, clip=0.3, accumulation=3)
    alone = incubated(one_over_all, None, scaled=True, clip=0.3, accumulation=3)
    assert all(torch.equal(a, b) for a, b in zip(beside, alone, strict=True))


def test_overflown_seed_misses_its_step_and_no_other() -> None:
    model = grown()
    late_overflow(model.slot("b").seed)  # type: ignore[arg-type]
    optimizer = AdamW(model.seed_parameters(), lr=1e-2)
    train_epoch_incubator_mode(
        model, batches(), CE, AdamW(model.host_parameters()), optimizer, "cpu", scaler=GradScaler("cpu")
    )
    taken = [int(optimizer.state[model.seed_parameters(name)[0]]["step"]) for name in SLOTS]
    assert taken == [12, 9, 12]


def blended(poison: bool, *, scaled: bool, clip: float | None, joint: bool) -> list[Tensor]:
    """The first seed is blended in while the others incubate; one optimizer over everything if ``joint``."""
    model = grown()
    model.blend("a", 20)
    host: list[nn.Parameter] = model.host_parameters()
    own: Optimizer | None = one_over_all(model)
    if joint:
        host, own = [*host, *model.seed_parameters()], None
    if poison:
        nan_weights(model.slot("b").seed)  # type: ignore[arg-type]
    torch.manual_seed(5)
    stats = train_epoch_blended(
        model, batches(), CE, AdamW(host, lr=1e-2), own, "cpu", max_grad_norm=clip, seed_max_grad_norm=clip,
        scaler=GradScaler("cpu", init_scale=1024.0) if scaled else None,
    )  # fmt: skip
    return fingerprint(model, stats.losses, ("a", "c"))


@pytest.mark.parametrize("joint", [False, True], ids=["two optimizers", "one optimizer"])
@pytest.mark.parametrize(("scaled", "clip"), [(False, None), (False, 1.0), (True, None), (True, 1.0)])
def test_blending_seed_goes_on_learning_beside_a_poisoned_one(
    scaled: bool, clip: float | None, joint: bool
) -> None:
    beside = blended(True, scaled=scaled, clip=clip, joint=joint)
    alone = blended(False, scaled=scaled, clip=clip, joint=joint)
    assert torch.isfinite(beside[0]).all()
    assert all(torch.equal(a, b) for a, b in zip(beside, alone, strict=True))


def test_optimizers_of_seeds_are_checked() -> None:
    model = grown()
    host = AdamW(model.host_parameters())
    first = AdamW(model.seed_parameters("a"))
    with pytest.raises(ValueError, match="expected parameters that other seeds' optimizers do not have"):
        train_epoch_incubator_mode(model, batches(), CE, host, [first, one_over_all(model)], "cpu")
    with pytest.raises(ValueError, match="one for each seed, got none"):
        train_epoch_incubator_mode(model, batches(), CE, host, [], "cpu")
    with pytest.raises(TypeError, match="seed_optimizer: expected a torch optimizer, got int"):
        train_epoch_blended(model, batches(), CE, host, [first, 3], "cpu")  # type: ignore[list-item]
