"""A task of the user's own on the command line: ``module:attribute``."""

import json
import sys

import pytest

from tolaria import get_task
from tolaria.cli.main import main

OWN = """
import torch
from torch import nn
from tolaria import TaskSpec
from tolaria.tasks import TaskData, TensorBatches


def load(*, batch_size, rng_seed, data_dir):
    x = torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
    y = (x.sum(dim=1) > 0).long()
    part = lambda a, b: TensorBatches(x[a:b], y[a:b], batch_size)
    return TaskData(train=part(0, 40), validation=part(40, 60), test=part(60, 80))


def make():
    return TaskSpec(
        name="sums", topology="mlp", num_classes=2, load_data=load, slots={"hidden": "1"}, needs_files=False,
        model_factory=lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)),
        example_input=lambda: torch.zeros(2, 8),
    )


sums, three = make(), 3
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_task_module.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    sys.modules.pop("own_task_module", None)


@pytest.mark.parametrize("option", [[], ["--task"]], ids=["in its place", "by the option"])
def test_a_task_of_ones_own_is_trained_by_its_path(own_module, option, capsys):
    arguments = [
        "train",
        *option,
        "own_task_module:sums",
        "--no-grow",
        "--steps",
        "4",
        "--quiet",
        "--no-plot",
    ]
    assert main([*arguments, "--out", "run"]) == 0
    assert json.loads((own_module / "run" / "config.json").read_text())["task"] == "own_task_module:sums"
    assert "own_task_module:sums" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_task_module:nothing", "AttributeError"),
        ("no_such_module_at_all:x", "ModuleNotFoundError"),
        ("own_task_module:three", "got int"),
        (":", "importable from here"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_sentence(own_module, name, said, capsys):
    for command in ("train", "chaos"):
        assert main([command, "--task", name]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1


def test_a_path_may_name_what_makes_the_task(own_module, monkeypatch):
    monkeypatch.syspath_prepend(str(own_module))
    assert get_task("own_task_module:make").num_classes == 2


def test_a_task_is_named_once(capsys):
    assert main(["train", "digits", "--task", "text"]) == 2
    assert "expected not to come with TASK (digits)" in capsys.readouterr().err
