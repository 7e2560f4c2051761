"""Hosts of all kinds: slices, channels_last, named tuples, autocast; and what germination refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tolaria import MorphogeneticModel, SeedSlot, create_model
from tolaria.nn import AlphaSchedule, CNNHost

IMAGE = torch.linspace(-1, 1, 2 * 4 * 6 * 6).view(2, 4, 6, 6)
SEQUENCE = torch.linspace(-1, 1, 2 * 5 * 8).view(2, 5, 8)


@pytest.mark.parametrize(
    "features",
    [SEQUENCE[:, 1:], SEQUENCE.chunk(2, -1)[1], SEQUENCE.transpose(0, 1), SEQUENCE[:, ::2]],
    ids=["slice", "chunk", "transposed", "strided"],
)
def test_incubation_keeps_the_strides_of_the_features(features: Tensor) -> None:
    """Layers choose kernels by strides, and kernels differ in the last bit: the host would notice."""
    slot = SeedSlot("mid")
    slot.germinate("low_rank", features)
    slot.start_training()
    out = slot(features.detach().requires_grad_())
    assert out.stride() == features.stride()
    assert torch.equal(out, features)
    assert out.data_ptr() != features.data_ptr()
    weights = torch.randn(features.shape)
    (gradient,) = torch.autograd.grad((out * weights).sum(), slot.seed.down.weight)  # type: ignore[union-attr]
    plain = slot.seed(features)  # type: ignore[misc]
    (expected,) = torch.autograd.grad((plain * weights).sum(), slot.seed.down.weight)  # type: ignore[union-attr]
    assert torch.equal(gradient, expected)


def test_incubation_beside_expanded_features() -> None:
    features = SEQUENCE[:1].expand(3, -1, -1)
    slot = SeedSlot("mid")
    slot.germinate("low_rank", features)
    slot.start_training()
    assert torch.equal(slot(features).mul_(2.0), 2.0 * features)


@pytest.mark.parametrize("blueprint", ["conv", "depthwise", "squeeze_excite", "norm"])
def test_incubation_in_channels_last(blueprint: str) -> None:
    """The group norm of torch 2.13 crashes backward on channels_last input that wants no gradient."""
    features = IMAGE.contiguous(memory_format=torch.channels_last)
    slot = SeedSlot("mid")
    seed = slot.germinate(blueprint, features)
    slot.start_training()
    out = slot(features)
    assert out.is_contiguous(memory_format=torch.channels_last)
    out.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in seed.parameters())


class States(NamedTuple):
    hidden: Tensor
    cell: Tensor


class Recurrent(nn.Module):
    def forward(self, x: Tensor) -> States:
        return States(x, x)


class Named(nn.Module):
    """Reads its middle layer's output by name."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = Recurrent()

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(x).hidden


def test_named_tuples_stay_named_tuples() -> None:
    model = MorphogeneticModel(Named(), {"mid": "middle"}, example_input=SEQUENCE)
    model.germinate("mid", "mlp")
    model.incubate("mid")
    assert torch.equal(model(SEQUENCE), SEQUENCE)


def test_fossil_keeps_the_dtype_under_autocast() -> None:
    slot = SeedSlot("mid")
    slot.germinate(lambda features: nn.Linear(8, 8), SEQUENCE)
    slot.start_training()
    slot.start_blending(1)
    slot.fossilize()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert slot(SEQUENCE).dtype is torch.float32


def test_a_schedule_in_the_users_hand_follows_the_model() -> None:
    model = MorphogeneticModel(CNNHost(widths=(4, 4)), example_input=torch.zeros(2, 1, 8, 8))
    model.germinate("stage0", "conv")
    model.incubate("stage0")
    schedule = model.blend("stage0", 2, "linear")
    model.to("meta")
    assert schedule is model.slot("stage0").schedule
    assert schedule.alpha is model.slot("stage0").alpha
    assert schedule.alpha.is_meta


class Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("blueprint", "options", "rng_seed", "error", "match"),
    [
        (lambda f: Raising(), None, None, ValueError, "slot 'mid': .* its forward raised RuntimeError: no"),
        (
            "depthwise",
            {"kernel": 4},
            None,
            ValueError,
            "slot 'mid': .*kernel: expected an odd integer.*got 4",
        ),
        ("norm", {"groups": 3}, None, ValueError, "slot 'mid': blueprint 'norm' .*'groups': 3.*divisible"),
        ("conv", 3, None, TypeError, "options: expected a mapping or None, got 3"),
        ("conv", None, "a", TypeError, "rng_seed: expected an integer or None, got 'a'"),
        ("conv", None, 2**63, ValueError, "rng_seed: expected an integer of at most 63 bits"),
    ],
    ids=["raises", "even", "groups", "options", "rng", "large-rng"],
)
def test_germination_names_what_is_wrong(
    blueprint: object, options: object, rng_seed: object, error: type[Exception], match: str
) -> None:
    slot = SeedSlot("mid")
    with pytest.raises(error, match=match):
        slot.germinate(blueprint, IMAGE, options=options, rng_seed=rng_seed)  # type: ignore[arg-type]
    assert slot.seed is None
    assert slot.generation == 0


def test_features_must_be_floating() -> None:
    with pytest.raises(TypeError, match=r"features: expected a floating point tensor, got torch.int64"):
        SeedSlot("mid").germinate("mlp", torch.zeros(2, 3, 4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((None, ["a"]), TypeError, "host: expected an nn.Module, got NoneType"),
        ((CNNHost(), 3), TypeError, "slots: expected names, or a mapping .*, got int"),
        ((CNNHost(), {3: "stages.0"}), ValueError, "slots: expected a name without dots, got 3"),
    ],
    ids=["host", "slots", "name"],
)
def test_bad_hosts_and_slots_are_named(arguments: tuple[object, object], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        MorphogeneticModel(*arguments)  # type: ignore[arg-type]


def test_bad_seeds_of_models_and_ends_of_schedules_are_named() -> None:
    with pytest.raises(TypeError, match=r"rng_seed: expected an integer or None, got 1.5"):
        create_model("digits", rng_seed=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"start: expected a number in .* got 'a'"):
        AlphaSchedule(torch.zeros(()), 3, start="a")  # type: ignore[arg-type]


class FunctionalNorm(nn.Module):
    """Group norm behind a frozen convolution, as a function."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.mix = nn.Conv2d(features.shape[1], features.shape[1], 1).requires_grad_(False)
        self.weight = nn.Parameter(torch.ones(features.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.group_norm(self.mix(x), 2, self.weight, self.weight)


GROUP_NORMS = {
    "first": lambda f: nn.Sequential(nn.GroupNorm(2, f.shape[1]), nn.Conv2d(f.shape[1], f.shape[1], 1)),
    "function behind a frozen layer": FunctionalNorm,
}


@pytest.mark.parametrize(
    "example", [torch.channels_last, torch.contiguous_format], ids=["as trained", "other"]
)
@pytest.mark.parametrize("seed", GROUP_NORMS.values(), ids=GROUP_NORMS.keys())
@pytest.mark.parametrize("frozen", [False, True])
def test_group_norm_of_a_users_seed_trains_in_channels_last(
    seed: Callable[[Tensor], nn.Module], example: torch.memory_format, frozen: bool
) -> None:
    host = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    host.requires_grad_(not frozen)
    model = MorphogeneticModel(
        host, {"mid": "1"}, example_input=torch.zeros(2, 3, 8, 8).to(memory_format=example)
    )
    model.germinate("mid", seed)
    model.incubate("mid")
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    grown = [p for p in model.seed_parameters() if p.requires_grad]
    for stage in ("incubate", "blend", "fossil"):  # a crash of torch's ends the process
        if stage == "blend":
            model.blend("mid", 1).step()
        elif stage == "fossil":
            model.fossilize("mid")
        model.zero_grad()
        model(x).square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in grown)
