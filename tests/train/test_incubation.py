"""Incubation: the host moves bit for bit as it would alone, the seed by plain autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small_hosts import Batches, cnn, image_batches, token_batches, transformer
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW

from tolaria import MorphogeneticModel, train_epoch_incubator_mode, train_epoch_normal
from tolaria.train import StepHooks

STEPS = 200
Build = Callable[[], MorphogeneticModel]

HOSTS = {
    "cnn": (cnn, image_batches, "stage0", "conv", "classification"),
    "transformer": (transformer, token_batches, "block0", "mlp", "lm"),
}
MODES = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.5},
    "clipped-scaled": {"max_grad_norm": 0.5, "scaled": True},
    "accumulated-bf16": {"accumulation_steps": 2, "amp_dtype": torch.bfloat16, "scaled": True},
}


def fingerprint(model: MorphogeneticModel) -> list[Tensor]:
    """Everything of the host: parameters, gradients, buffers, and the random stream."""
    gradients = [p.grad.clone() for p in model.host.parameters() if p.grad is not None]
    return [*(t.clone() for t in model.host.state_dict().values()), *gradients, torch.get_rng_state()]


class Recorder(StepHooks):
    """Losses of every step."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def after_step(self, loss: Tensor) -> None:
        self.losses.append(loss.clone())


def train(
    build: Build,
    batches: Batches,
    task_type: str,
    seed: Callable[[MorphogeneticModel], None] | None,
    **mode: object,
) -> tuple[list[Tensor], float | None]:
    """200 steps, with or without a seed beside them: losses and the host at the end, and the scale."""
    options = dict(mode)
    scaler = (
        GradScaler("cpu", init_scale=1024.0, growth_interval=30) if options.pop("scaled", False) else None
    )
    model, recorder = build(), Recorder()
    host_optimizer = AdamW(model.host_parameters(), lr=3e-3)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(host_optimizer, STEPS)]
    common = {
        "task_type": task_type,
        "scaler": scaler,
        "schedulers": schedulers,
        "hooks": recorder,
        **options,
    }
    torch.manual_seed(7)
    if seed is None:
        train_epoch_normal(model, batches, nn.CrossEntropyLoss(), host_optimizer, "cpu", **common)  # type: ignore[arg-type]
    else:
        seed(model)
        seed_optimizer = AdamW(model.seed_parameters(), lr=1e-2)
        train_epoch_incubator_mode(
            model, batches, nn.CrossEntropyLoss(), host_optimizer, seed_optimizer, "cpu",
            seed_max_grad_norm=0.1, **common,
        )  # type: ignore[arg-type]  # fmt: skip
    return [*recorder.losses, *fingerprint(model)], scaler.get_scale() if scaler is not None else None


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS.keys())
def test_host_trajectory_is_bit_for_bit_that_of_the_host_alone(
    host: tuple[Build, Callable[[int], Batches], str, str, str], mode: dict[str, object]
) -> None:
    build, make_batches, slot, blueprint, task_type = host
    batches = make_batches(STEPS)  # with accumulation, half as many steps
    born: list[Tensor] = []

    def graft(model: MorphogeneticModel) -> None:
        model.germinate(slot, blueprint).start_training()
        born.extend(p.clone() for p in model.seed_parameters())
        models.append(model)

    models: list[MorphogeneticModel] = []
    alone, scale = train(build, batches, task_type, None, **mode)
    beside, other_scale = train(build, batches, task_type, graft, **mode)
    assert len(alone) == len(beside) > STEPS // 2
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
    assert scale == other_scale
    moved = [not torch.equal(a, b) for a, b in zip(born, models[0].seed_parameters(), strict=True)]
    assert all(moved)


class Unruly(nn.Module):
    """A seed that draws random numbers, writes into its input, and whose gradient overflows."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm2d(features.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        x.add_(torch.rand_like(x))
        return self.norm(x) * self.weight * 1e38


def test_an_unruly_seed_does_not_reach_the_host() -> None:
    mode = {"max_grad_norm": 0.5, "scaled": True}
    models: list[MorphogeneticModel] = []

    def graft(model: MorphogeneticModel) -> None:
        model.germinate("stage1", Unruly).start_training()
        models.append(model)

    batches = image_batches(STEPS)
    alone, scale = train(cnn, batches, "classification", None, **mode)
    beside, other_scale = train(cnn, batches, "classification", graft, **mode)
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
    assert scale == other_scale
    assert scale is not None
    assert scale > 1024.0  # the host's scale has grown, undisturbed
    assert models[0].seed_parameters()[0].item() == 1.0  # each step of the seed was skipped


@pytest.mark.parametrize("blueprint", ["conv", "depthwise", "squeeze_excite", "norm"])
def test_seed_gradient_is_plain_autograd(blueprint: str) -> None:
    class Grab(StepHooks):
        def after_backward(self) -> None:
            gradients.extend(p.grad.clone() for p in model.seed_parameters() if p.grad is not None)

    def noise(model: MorphogeneticModel) -> None:
        with torch.no_grad():
            for i, parameter in enumerate(model.seed_parameters()):
                parameter.add_(torch.linspace(-0.2, 0.2, parameter.numel()).view_as(parameter) * (i + 1))

    gradients: list[Tensor] = []
    criterion, (x, y) = nn.CrossEntropyLoss(), image_batches(1)[0]
    model = cnn(dropout=0.0)
    model.germinate("stage1", blueprint, rng_seed=4).start_training()
    noise(model)
    host_optimizer, seed_optimizer = SGD(model.host_parameters(), 0.0), SGD(model.seed_parameters(), 0.0)
    train_epoch_incubator_mode(
        model, [(x, y)], criterion, host_optimizer, seed_optimizer, "cpu", hooks=Grab()
    )

    twin = cnn(dropout=0.0)
    twin.germinate("stage1", blueprint, rng_seed=4)
    noise(twin)
    seen: list[Tensor] = []
    handle = twin.host.stages[1].register_forward_hook(lambda m, i, out: seen.append(out))  # type: ignore[index,union-attr]
    loss = criterion(twin(x), y)
    handle.remove()
    (at_slot,) = torch.autograd.grad(loss, seen[0])
    seed = twin.slot("stage1").seed
    assert seed is not None
    expected = torch.autograd.grad(seed(seen[0].detach()), list(seed.parameters()), at_slot)
    assert len(gradients) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_scaled_seed_gradient_is_unscaled_before_its_step() -> None:
    def run(scaler: GradScaler | None) -> Tensor:
        model = cnn(dropout=0.0)
        model.germinate("stage1", "conv", rng_seed=4).start_training()
        train_epoch_incubator_mode(
            model, image_batches(3), nn.CrossEntropyLoss(), SGD(model.host_parameters(), 0.01),
            SGD(model.seed_parameters(), 0.01), "cpu", scaler=scaler,
        )  # fmt: skip
        return torch.cat([p.detach().flatten() for p in model.seed_parameters()])

    assert torch.equal(run(None), run(GradScaler("cpu", init_scale=256.0)))  # powers of two are exact


def test_a_poisoned_seed_does_not_reach_the_host() -> None:
    def graft(model: MorphogeneticModel) -> None:
        model.germinate("stage0", "conv").start_training()
        with torch.no_grad():
            model.seed_parameters()[0].fill_(float("nan"))

    batches = image_batches(STEPS)
    alone, _ = train(cnn, batches, "classification", None, max_grad_norm=1.0)
    beside, _ = train(cnn, batches, "classification", graft, max_grad_norm=1.0)
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
    assert all(torch.isfinite(t).all() for t in beside if t.is_floating_point())
