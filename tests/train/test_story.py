"""The whole story on a tiny task: every outcome, every fault, and what observers are told."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from small_hosts import image_batches
from torch import nn

from tolaria import GovernorConfig, SeedStage, TaskSpec, TrainingDivergedError
from tolaria.governor import GovernorEvent
from tolaria.nn import CNNHost
from tolaria.nn.randomness import random_state, streams_drawn
from tolaria.tasks import TaskData, TensorBatches, TrainSettings
from tolaria.train import (
    GrowthObserver,
    GrowthResult,
    PhaseRecord,
    SeedRecord,
    StepRecord,
    StoryContext,
    ValidationRecord,
    grow,
    list_faults,
    parse_fault,
)


def load(*, batch_size: int, rng_seed: int, data_dir: object = None) -> TaskData:
    images, labels = (torch.cat(parts) for parts in zip(*image_batches(40, rows=8), strict=True))
    return TaskData(
        train=TensorBatches(images[:240], labels[:240], batch_size, shuffle=True, rng_seed=rng_seed),
        validation=TensorBatches(images[240:280], labels[240:280], 64),
        test=TensorBatches(images[280:], labels[280:], 64),
    )


TASK = TaskSpec(
    name="tiny",
    topology="cnn",
    num_classes=10,
    model_factory=lambda: CNNHost(widths=(4, 6)),
    load_data=load,
    example_input=lambda: torch.zeros(2, 1, 8, 8),
    defaults=TrainSettings(
        batch_size=16, host_steps=40, incubate_steps=10, blend_steps=10, finish_steps=20, lr=1e-2,
        seed_lr=1e-2, warmup_steps=5, slot="stage0", validate_every=20, min_gain=-10.0,
    ),
)  # fmt: skip
EAGER = GovernorConfig(snapshot_interval=5)


class Diary(GrowthObserver):
    """Writes everything down."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.steps: list[StepRecord] = []
        self.alphas: list[float] = []
        self.events: list[GovernorEvent] = []
        self.stages: list[SeedStage] = []
        self.validations: list[ValidationRecord] = []
        self.context: StoryContext | None = None
        self.result: GrowthResult | None = None

    def on_start(self, context: StoryContext) -> None:
        self.context = context

    def on_phase_end(self, record: PhaseRecord) -> None:
        self.phases.append(record.phase)

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)
        self.alphas.append(record.alpha.item())

    def on_events(self, events: Sequence[GovernorEvent]) -> None:
        self.events.extend(events)

    def on_seed(self, record: SeedRecord) -> None:
        self.stages.append(record.stage)

    def on_validation(self, record: ValidationRecord) -> None:
        self.validations.append(record)

    def on_finish(self, result: GrowthResult) -> None:
        self.result = result


def test_the_whole_story_is_told() -> None:
    diary = Diary()
    before = random_state()
    result = grow(TASK, observers=[diary], governor_config=EAGER, min_gain=-10.0)
    assert not streams_drawn(before)
    assert result.steps == len(diary.steps) == 80
    assert [record.step for record in diary.steps] == list(range(1, 81))
    assert diary.phases == ["host", "incubate", "blend", "finish"]
    assert [record.step for record in diary.validations] == [20, 40, 50, 60, 80]
    assert diary.context is not None
    assert diary.context.total_steps == 80
    assert diary.result is result
    assert max(diary.alphas[:50]) == 0.0
    assert 0.0 < diary.alphas[50] < diary.alphas[55] < diary.alphas[59] == pytest.approx(1.0)
    assert diary.events
    assert result.rollbacks == 0
    assert result.test is not None
    assert result.host_test is not None
    assert result.outcome in ("fossilized", "culled")
    expected = [SeedStage.GERMINATED, SeedStage.TRAINING, SeedStage.BLENDING]
    assert diary.stages[:3] == expected
    assert result.model.slot("stage0").stage is diary.stages[3]


def test_the_same_seed_tells_the_same_story() -> None:
    first, second = grow(TASK, rng_seed=3), grow(TASK, rng_seed=3)
    other = grow(TASK, rng_seed=4)
    assert first.test == second.test
    assert first.test != other.test


def test_a_governor_that_never_acts_changes_nothing() -> None:
    assert grow(TASK, governor_config=EAGER).test == grow(TASK, use_governor=False).test


def test_a_seed_that_does_not_earn_its_place_is_culled() -> None:
    diary = Diary()
    result = grow(TASK, observers=[diary], min_gain=0.999)
    assert result.outcome == "culled"
    assert diary.stages[-1] is SeedStage.CULLED
    assert "did not earn its place: beside the host alone for the same steps" in result.seeds[-1].reason
    assert result.model.seed_parameters() == []
    assert result.steps == 80


def test_no_germinations_leaves_the_host_alone() -> None:
    diary = Diary()
    result = grow(TASK, observers=[diary], max_germinations=0)
    assert result.outcome == "none"
    assert diary.stages == []
    assert result.steps == 80


@pytest.mark.parametrize("kind", list_faults())
def test_every_fault_ends_in_a_healthy_network(kind: str) -> None:
    diary = Diary()
    result = grow(TASK, observers=[diary], governor_config=EAGER, faults=[parse_fault(f"{kind}@33")])
    assert result.steps == 80
    assert all(torch.isfinite(p).all() for p in result.model.state_dict().values())
    if kind != "lobotomy":  # at step 33 the tiny network may not have learnt enough to be lobotomised
        assert result.rollbacks >= 1
    assert result.test is not None
    assert result.test.val_loss < TASK.guess_loss


@pytest.mark.parametrize("step", [45, 55], ids=["incubating", "blending"])
def test_a_dropped_seed_is_followed_by_another_if_time_permits(step: int) -> None:
    diary = Diary()
    result = grow(TASK, observers=[diary], governor_config=EAGER, faults=[parse_fault(f"nan-loss@{step}")])
    assert result.rollbacks == 1
    assert diary.stages.count(SeedStage.GERMINATED) == 2
    assert any("rollback" in record.reason for record in result.seeds)
    assert result.steps == 80
    assert all(torch.isfinite(p).all() for p in result.model.state_dict().values())


def test_a_fossil_that_a_rollback_took_is_noticed() -> None:
    faults = [parse_fault("nan-loss@61")]  # before a capture with the fossil can have been promoted
    diary = Diary()
    result = grow(TASK, observers=[diary], governor_config=EAGER, faults=faults, finish_steps=60)
    assert result.steps == 120
    assert diary.stages.count(SeedStage.GERMINATED) == 2
    assert [r.stage for r in result.seeds if "rollback" in r.reason] == [SeedStage.CULLED]
    assert result.outcome in ("fossilized", "culled")
    assert diary.phases == ["host", "incubate", "blend", "finish", "incubate", "blend", "finish"]


def test_a_fossil_survives_a_rollback_once_it_was_captured() -> None:
    faults = [parse_fault("nan-loss@66")]
    result = grow(TASK, governor_config=EAGER, faults=faults)
    assert result.rollbacks == 1
    assert result.outcome == "fossilized"
    assert result.model.slot("stage0").stage is SeedStage.FOSSILIZED


def test_without_a_governor_a_fault_is_not_caught() -> None:
    result = grow(TASK, use_governor=False, faults=[parse_fault("nan-weight@30")])
    assert not all(torch.isfinite(p).all() for p in result.model.parameters())


def test_ctrl_c_returns_the_story_so_far() -> None:
    class Impatient(Diary):
        def on_step(self, record: StepRecord) -> None:
            super().on_step(record)
            if record.step == 25:
                raise KeyboardInterrupt

    diary = Impatient()
    result = grow(TASK, observers=[diary])
    assert result.interrupted
    assert result.steps == 25
    assert diary.result is result
    assert result.test is None


def test_divergence_is_raised_after_the_observers_have_the_story() -> None:
    config = GovernorConfig(snapshot_interval=5, max_rollbacks=1)
    faults = [parse_fault("nan-loss@20"), parse_fault("nan-loss@22"), parse_fault("nan-loss@24")]
    diary = Diary()
    with pytest.raises(TrainingDivergedError):
        grow(TASK, observers=[diary], governor_config=config, faults=faults)
    assert diary.result is not None
    assert diary.result.error is not None


def test_bad_arguments_are_named_before_anything_runs() -> None:
    for changes, match in (
        ({"blueprnt": "conv"}, "did you mean 'blueprint'"),
        ({"blueprint": "cnov"}, "did you mean 'conv'"),
        ({"slot": "stage9"}, "expected one of stage0, stage1, got 'stage9'"),
        ({"blueprint": "mlp"}, r"expected features \(B, T, C\)"),
        ({"lr": -1, "batch_size": 0}, "batch_size: .*got 0; lr: .*got -1"),
    ):
        with pytest.raises(ValueError, match=match):
            grow(TASK, **changes)
    with pytest.raises(TypeError, match=r"'conv' cannot be built with options \{'heads': 2\}"):
        grow(TASK, blueprint_options={"heads": 2})
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        grow("digit")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("nan-loss", "expected '<kind>@<step>'"),
        ("nan-loss@x", "expected '<kind>@<step>'"),
        ("nan-loss@0", "expected '<kind>@<step>'"),
        ("nan-los@3", "did you mean 'nan-loss'"),
    ],
)
def test_bad_faults_are_named(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        parse_fault(text)


def test_a_model_of_ones_own_can_be_grown() -> None:
    from tolaria import create_model

    model = create_model(TASK, rng_seed=9)
    result = grow(TASK, model=model, slot="stage1", blueprint="norm", finish_steps=0)
    assert result.model is model
    assert result.slot == "stage1"
    assert isinstance(model, nn.Module)
