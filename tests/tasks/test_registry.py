"""Tasks: the registry, create_model and devices, with errors that help."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

from tolaria import (
    ConfigError,
    MissingDependencyError,
    TaskSpec,
    create_model,
    get_task,
    list_tasks,
    register_task,
    validate_device,
)
from tolaria.nn import create_host, list_hosts, register_host
from tolaria.nn.randomness import random_state, streams_drawn
from tolaria.tasks import TrainSettings


def spec(name: str = "mine", **changes: object) -> TaskSpec:
    fields: dict[str, object] = {
        "name": name,
        "topology": "perceptron",
        "num_classes": 3,
        "model_factory": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)),
        "load_data": lambda **_: None,
        "example_input": lambda: torch.zeros(1, 4),
        "slots": {"hidden": "1"},
    }
    return TaskSpec(**{**fields, **changes})  # type: ignore[arg-type]


def test_built_in_tasks_are_listed() -> None:
    assert {"cifar10", "digits", "text"} <= set(list_tasks())


def test_a_task_of_ones_own_is_registered_once_and_built() -> None:
    register_task(spec("registered"), replace=True)
    with pytest.raises(ValueError, match="'registered' is taken"):
        register_task(spec("registered"))
    model = create_model("registered", rng_seed=1)
    assert model(torch.zeros(2, 4)).shape == (2, 3)
    assert list(model.slots) == ["hidden"]
    assert get_task("registered").guess_loss == math.log(3)


def test_built_in_names_are_taken() -> None:
    with pytest.raises(ValueError, match="'digits' is taken"):
        register_task(spec("digits"))


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("digit", ValueError, "expected one of .*text.*got 'digit'; did you mean 'digits'"),
        ("zzz", ValueError, "got 'zzz'$"),
        (3, TypeError, "name of a task or a TaskSpec, got int"),
    ],
)
def test_unknown_tasks_are_named(name: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        create_model(name)


def test_a_bad_spec_lists_every_field() -> None:
    with pytest.raises(
        ConfigError, match=r"num_classes: .*got 1; model_factory: .*got 3; random_guess_loss: .*got -1"
    ):
        spec(num_classes=1, model_factory=3, random_guess_loss=-1.0)
    with pytest.raises(ConfigError, match=r"lr: .*got nan; alpha_kind: .*got 'cubic'"):
        TrainSettings(lr=math.nan, alpha_kind="cubic")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'host_steps'"):
        TrainSettings().replace(host_step=3)


def test_options_belong_to_their_blueprint() -> None:
    settings = TrainSettings(blueprint="mlp", blueprint_options={"expansion": 4.0})
    assert settings.replace(lr=0.1).blueprint_options == {"expansion": 4.0}
    assert settings.replace(blueprint="attention").blueprint_options == {}
    assert settings.replace(blueprint="low_rank", blueprint_options={"rank": 2}).blueprint_options == {
        "rank": 2
    }


def test_rng_seed_decides_the_weights_and_leaves_the_streams() -> None:
    before = random_state()
    one, two, three = (create_model("digits", rng_seed=s) for s in (1, 1, 2))
    assert not streams_drawn(before)
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (one, two, three)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    create_model("digits")
    assert streams_drawn(before) == {"torch"}


def test_slots_can_be_chosen() -> None:
    assert list(create_model("digits", slots=["stage1"]).slots) == ["stage1"]
    with pytest.raises(ValueError, match=r"injection points of CNNHost \(stage0, stage1\)"):
        create_model("digits", slots=["stage5"])


def test_hosts_are_registered_once() -> None:
    register_host("test-linear", nn.Linear, replace=True)
    assert "test-linear" in list_hosts()
    assert isinstance(create_host("test-linear", in_features=2, out_features=3), nn.Linear)
    with pytest.raises(ValueError, match="taken"):
        register_host("test-linear", nn.Linear)
    with pytest.raises(ValueError, match="did you mean 'transformer'"):
        create_host("transformr")


@pytest.mark.parametrize(
    ("device", "expected"), [("cpu", "cpu"), ("cpu:0", "cpu"), (torch.device("cpu"), "cpu")]
)
def test_good_devices(device: str, expected: str) -> None:
    assert validate_device(device) == torch.device(expected)


@pytest.mark.parametrize(
    ("device", "error", "match"),
    [
        ("", ValueError, "'<type>:<index>'"),
        ("cuda:x", ValueError, "'<type>:<index>'"),
        ("cuda:-1", ValueError, "'<type>:<index>'"),
        ("CPU!", ValueError, "'<type>:<index>'"),
        ("gpu", ValueError, "type cpu or cuda, got type 'gpu'"),
        (torch.device("meta"), ValueError, "type cpu or cuda, got type 'meta'"),
        ("cpu:1", RuntimeError, "one CPU device"),
        (0, TypeError, "expected a string such as"),
        (None, TypeError, "expected a string such as"),
    ],
)
def test_bad_devices_each_have_their_own_error(device: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        validate_device(device)  # type: ignore[arg-type]
    if not isinstance(device, int | None):
        with pytest.raises(error, match=match):
            create_model("digits", device)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("version", "count", "device", "match"),
    [
        (None, 0, "cuda", "built without CUDA"),
        ("13.0", 0, "cuda", "finds no CUDA device"),
        ("13.0", 2, "cuda:2", "index 2 is out of range, 2 .*cuda:0 to cuda:1"),
    ],
    ids=["build", "absent", "range"],
)
def test_absent_cuda_devices(
    monkeypatch: pytest.MonkeyPatch, version: str | None, count: int, device: str, match: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    with pytest.raises(RuntimeError, match=match):
        validate_device(device)


def test_a_missing_package_is_an_error_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        MissingDependencyError,
        match=r'needs scikit-learn.*; run pip install scikit-learn, or pip install "\.\[train\]"',
    ):
        get_task("digits").load_data(batch_size=8, rng_seed=0, data_dir=None)
