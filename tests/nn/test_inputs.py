"""What an example input may be, what an injection point may return, and what is said of anything else."""

from __future__ import annotations

from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tolaria.nn import MorphogeneticModel, SeedSlot, register_blueprint
from tolaria.tasks import TaskSpec, create_model

Pair = namedtuple("Pair", ["x", "scale"])


class Host(nn.Module):
    def __init__(self, returned=lambda x: x) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.middle = nn.Identity()
        self.middle.forward = returned  # type: ignore[method-assign]

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        out = self.middle(self.first(x) * scale)
        return self.last(
            next(iter(out.values()))
            if isinstance(out, dict)
            else out[0]
            if type(out) in (tuple, list)
            else out
        )


def linear(features: Tensor) -> nn.Module:
    return nn.Linear(features.shape[-1], features.shape[-1])


X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    "example",
    [
        X,
        (X,),
        [X],
        (X, 2.0),
        Pair(X, torch.ones(())),
        {"x": X},
        {"x": X, "scale": torch.ones(())},
        UserDict(x=X),
    ],
    ids=["tensor", "tuple", "list", "number", "namedtuple", "mapping", "two", "userdict"],
)
def test_example_is_handed_over_as_a_batch_is(example):
    for model in (
        MorphogeneticModel(Host(), {"mid": "first"}, example_input=example),
        MorphogeneticModel(Host(), {"mid": "first"}),
    ):
        model.germinate("mid", linear, example_input=example)
        assert model.slot("mid").seed.in_features == 6


@pytest.mark.parametrize(
    "example", [3, "x", np.zeros((3, 4)), {}, (), {"x": 3}, {1: X}, {"x": {"y": [None]}}, {X}]
)
def test_example_that_no_model_takes_is_one_sentence(example):
    with pytest.raises(
        TypeError, match="example_input: expected a tensor, a tuple of arguments or a mapping"
    ):
        MorphogeneticModel(Host(), {"mid": "first"}, example_input=example)
    with pytest.raises(TypeError, match="germinate: example_input: expected a tensor"):
        MorphogeneticModel(Host(), {"mid": "first"}).germinate("mid", linear, example_input=example)


def test_task_may_call_its_host_by_keyword():
    spec = TaskSpec(
        name="named", topology="mlp", num_classes=2, model_factory=Host, load_data=lambda **_: None,
        slots={"mid": "first"}, example_input=lambda: {"x": X},
    )  # fmt: skip
    create_model(spec).germinate("mid", linear)


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda x: {"features": x}, "got dict"),
        (lambda x: [x], "got list"),
        (lambda x: ({"features": x}, x), "got tuple that begins with dict"),
        (lambda x: (None, x), "got tuple that begins with NoneType"),
        (lambda x: (), "got tuple that is empty"),
    ],
)
def test_injection_point_that_returns_no_tensor_is_told_as_it_is(returned, got):
    model = MorphogeneticModel(Host(returned), {"mid": "middle"}, example_input=X)
    with pytest.raises(
        TypeError, match=f"slot 'mid': expected its injection point to return a tensor .*{got}; name"
    ):
        model.germinate("mid", linear)
    assert model.slot("mid").seed is None
    assert not model.host.middle._forward_pre_hooks


@pytest.mark.parametrize("returned", [lambda x: (x, None), lambda x: Pair(x, None)])
def test_tuple_that_begins_with_a_tensor_may_be_grown(returned):
    class First(Host):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.first(x))[0])

    model = MorphogeneticModel(First(returned), {"mid": "middle"}, example_input=X)
    model.germinate("mid", linear)
    model.incubate("mid")
    assert model(X).shape == (3, 2)


def test_hosts_own_slot_is_called_with_features_or_says_so():
    class Own(nn.Module):
        def __init__(self, call) -> None:
            super().__init__()
            self.slot, self.call = SeedSlot("own"), call

        def forward(self, x: Tensor) -> Tensor:
            return self.call(self.slot, x)

    by_name = MorphogeneticModel(Own(lambda slot, x: slot(features=x)), example_input=X)
    by_name.germinate("own", linear)
    wrong = MorphogeneticModel(Own(lambda slot, x: slot({"features": x})["features"]), example_input=X)
    with pytest.raises(TypeError, match="slot 'own': expected features as a tensor, got dict"):
        wrong.germinate("own", linear)


def test_only_a_seed_that_is_one_is_called_the_identity():
    model = create_model("digits")
    for blueprint in ("conv", "depthwise", "squeeze_excite", "norm"):
        model.germinate("stage0", blueprint)
        assert model.slot("stage0").born_as_identity
        model.cull("stage0")
        assert not model.slot("stage0").born_as_identity
    model.germinate("stage0", lambda features: nn.Conv2d(features.shape[1], features.shape[1], 1))
    assert not model.slot("stage0").born_as_identity


def test_story_says_what_the_seed_was_at_birth():
    from tolaria.train import grow

    register_blueprint(
        "halved", lambda channels: nn.Conv2d(channels, channels, 1), layout="image", replace=True
    )
    for blueprint, said in (
        ("halved", "grafted, not the identity at birth"),
        ("conv", "grafted, the identity at birth"),
    ):
        result = grow(
            "digits", blueprint=blueprint, host_steps=2, incubate_steps=1, blend_steps=1, finish_steps=1
        )
        assert result.seeds[0].reason == said
