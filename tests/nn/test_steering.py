"""What a person or an agent may do with a seed: ramps, early fossils, several behind one another."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from tolaria import MorphogeneticModel, SeedSlot, SeedStage
from tolaria.nn import IllegalTransitionError


def grown(**slots: str) -> MorphogeneticModel:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return MorphogeneticModel(host, slots or {"a": "1"}, example_input=torch.zeros(2, 4))


def blending(steps: int = 4) -> MorphogeneticModel:
    model = grown()
    model.germinate("a", lambda f: nn.Linear(8, 8), rng_seed=1)
    model.incubate("a")
    model.blend("a", steps, "linear")
    return model


def test_ramp_goes_on_from_where_alpha_is() -> None:
    model = blending()
    slot = model.slot("a")
    for _ in range(3):
        slot.schedule.step()  # type: ignore[union-attr]
    down = model.ramp("a", 0.0, 3, "linear")
    seen = [float(slot.alpha)]
    for _ in range(4):
        down.step()
        seen.append(float(slot.alpha))
    assert seen == pytest.approx([0.75, 0.5, 0.25, 0.0, 0.0])
    x = torch.randn(5, 4)
    assert torch.equal(model(x), model.host[2](torch.relu(model.host[0](x))))  # type: ignore[index,operator]
    model.cull("a")
    assert slot.stage is SeedStage.CULLED


def test_alpha_may_stay_at_a_target() -> None:
    model = grown()
    model.germinate("a", lambda f: nn.Linear(8, 8))
    model.incubate("a")
    schedule = model.blend("a", 2, target=0.5)
    for _ in range(5):
        schedule.step()
    assert float(model.slot("a").alpha) == 0.5
    model.ramp("a", 1.0, 1).step()
    assert float(model.slot("a").alpha) == 1.0


@pytest.mark.parametrize("target", [1.5, -0.1, float("nan"), True, "0"])
def test_bad_targets_are_named(target: object) -> None:
    model = blending()
    with pytest.raises(ValueError, match=r"slot 'a': ramp: target: expected a number from 0 to 1"):
        model.ramp("a", target, 3)  # type: ignore[arg-type]
    model.cull("a")
    with pytest.raises(IllegalTransitionError, match="expected a seed in stage BLENDING, got CULLED"):
        model.ramp("a", 0.0, 3)


def test_early_fossil_is_warned_of() -> None:
    model = blending()
    for _ in range(3):
        model.slot("a").schedule.step()  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match=r"slot 'a': fossilize: alpha jumps from 0.75 to 1"):
        model.fossilize("a")
    model = blending(1)
    model.slot("a").schedule.step()  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fossilize("a")


class Pair(nn.Module):
    """Returns a tuple, writes into its input, and is asked for an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.width = nn.Linear(8, 8), 8

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return self.inner(x), 3


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pair, self.head = nn.Linear(4, 8), Pair(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, three = self.pair(torch.relu(self.stem(x)))
        return self.head(y.view(-1, self.pair.width)) * three  # type: ignore[no-any-return]


class InPlace(nn.Module):
    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.mul_(2.0))  # type: ignore[no-any-return]


def to_the_end(model: MorphogeneticModel, slot: str, stage: SeedStage) -> None:
    model.incubate(slot)
    if stage is not SeedStage.TRAINING:
        model.blend(slot, 1).step()
    if stage is SeedStage.FOSSILIZED:
        model.fossilize(slot)


@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.FOSSILIZED])
def test_plain_network_computes_the_same(stage: SeedStage) -> None:
    torch.manual_seed(0)
    model = MorphogeneticModel(
        Host(),
        {"pair": "pair", "again": "pair", "stem": "stem", "empty": "head"},
        example_input=torch.zeros(2, 4),
    )
    model.germinate("pair", InPlace)
    model.germinate("again", lambda f: nn.Linear(8, 8))
    model.germinate("stem", lambda f: nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    for name in ("pair", "again"):
        to_the_end(model, name, SeedStage.FOSSILIZED)
    to_the_end(model, "stem", stage)
    plain = model.to_plain()
    x = torch.randn(6, 4)
    for module in (model, plain):
        module.train()
    assert torch.equal(plain(x), model(x))
    for module in (model, plain):
        module.eval()
    assert torch.equal(plain(x), model(x))
    assert isinstance(plain, Host)
    assert not any("Slot" in type(m).__name__ or "Morphogenetic" in type(m).__name__ for m in plain.modules())
    held = {id(p) for p in model.parameters()}
    assert not any(id(p) in held for p in plain.parameters())  # a copy
    assert model.slot("pair").stage is SeedStage.FOSSILIZED


def test_plain_network_of_one_that_holds_its_slots() -> None:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(4, 8), SeedSlot("own"), nn.Linear(8, 8), SeedSlot("idle"))
    model = MorphogeneticModel(host, {}, example_input=torch.zeros(2, 4))
    model.germinate("own", lambda f: nn.Linear(8, 8))
    to_the_end(model, "own", SeedStage.FOSSILIZED)
    x = torch.randn(3, 4)
    assert torch.equal(model.to_plain()(x), model(x))


def test_plain_network_of_a_slot_on_the_whole_host() -> None:
    model = grown(all="")
    model.germinate("all", lambda f: nn.Linear(3, 3))
    to_the_end(model, "all", SeedStage.FOSSILIZED)
    x = torch.randn(3, 4)
    assert torch.equal(model.to_plain()(x), model(x))


def test_a_blending_seed_has_no_plain_form() -> None:
    with pytest.raises(ValueError, match=r"to_plain: .* got \['a'\] in BLENDING; fossilize or cull"):
        blending().to_plain()


def test_seeds_one_after_another_behind_one_layer() -> None:
    model = grown(first="1", second="1")
    for name in ("first", "second"):  # the second reads what the first has made
        model.germinate(name, lambda f: nn.Linear(8, 8))
        to_the_end(model, name, SeedStage.FOSSILIZED)
    x = torch.randn(5, 4)
    hidden = torch.relu(model.host[0](x))  # type: ignore[index,operator]
    for name in ("first", "second"):
        hidden = model.slot(name).seed(hidden)  # type: ignore[misc]
    assert torch.equal(model(x), model.host[2](hidden))  # type: ignore[index,operator]
