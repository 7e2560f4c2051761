"""The three loops: what they compute, what they accept, what they refuse."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small_hosts import cnn, image_batches, token_batches, transformer
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from tolaria import (
    GovernorConfig,
    MorphogeneticModel,
    SeedStage,
    TolariaGovernor,
    train_epoch_blended,
    train_epoch_incubator_mode,
    train_epoch_normal,
)
from tolaria.ops import PanicReason
from tolaria.telemetry.events import VerdictEvent
from tolaria.train import StepHooks

CE = nn.CrossEntropyLoss()


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def plain_loop(batches: list[tuple[Tensor, Tensor]], clip: float | None) -> tuple[Tensor, list[float]]:
    """The loop everybody writes."""
    model = cnn()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(3)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = CE(model(x), y)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return parameters(model), losses


@pytest.mark.parametrize("clip", [None, 0.5])
def test_normal_epoch_is_the_loop_everybody_writes(clip: float | None) -> None:
    batches = image_batches(12)
    expected, losses = plain_loop(batches, clip)
    model = cnn()
    torch.manual_seed(3)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    stats = train_epoch_normal(model, iter(batches), CE, optimizer, "cpu", max_grad_norm=clip)
    assert torch.equal(parameters(model), expected)
    assert stats.losses.tolist() == pytest.approx(losses)
    assert stats.mean_loss.item() == pytest.approx(sum(losses) / len(losses))
    assert (stats.steps, stats.samples) == (12, 96)


def test_accumulation_steps_with_the_mean_of_its_batches() -> None:
    def run(batches: list[tuple[Tensor, Tensor]], accumulation_steps: int) -> tuple[Tensor, int]:
        model = transformer(dropout=0.0)
        stats = train_epoch_normal(
            model,
            batches,
            CE,
            SGD(model.parameters(), 0.1),
            "cpu",
            "lm",
            accumulation_steps=accumulation_steps,
        )
        return parameters(model), stats.steps

    batches = token_batches(5, rows=4)
    joined = [
        tuple(torch.cat(parts) for parts in zip(*batches[i : i + 2], strict=True)) for i in range(0, 5, 2)
    ]
    apart, steps = run(batches, 2)
    together, other_steps = run(joined, 1)  # type: ignore[arg-type]
    assert steps == other_steps == 3
    torch.testing.assert_close(apart, together)


def test_mean_loss_weighs_by_sample_and_is_nan_for_nothing() -> None:
    x, y = image_batches(1, rows=9)[0]
    model = cnn(dropout=0.0)
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    stats = train_epoch_normal(model, batches, CE, SGD(model.parameters(), 0.0), "cpu", max_steps=5)
    assert stats.mean_loss.item() == pytest.approx(((8 * stats.losses[0] + stats.losses[1]) / 9).item())
    nothing = train_epoch_normal(model, [], CE, SGD(model.parameters(), 0.0), "cpu")
    assert nothing.steps == nothing.samples == 0
    assert nothing.mean_loss.isnan()


def test_max_steps_leaves_the_rest_of_the_loader_alone() -> None:
    stream: Iterator[object] = iter(image_batches(5))
    model = cnn()
    stats = train_epoch_normal(model, stream, CE, SGD(model.parameters(), 0.1), "cpu", max_steps=2)
    assert stats.steps == 2
    assert len(list(stream)) == 3


def test_mappings_and_output_objects_are_understood() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Output:
            return Output(self.inner(x))

    model = Wrapped()
    batch = {"inputs": torch.ones(4, 3), "labels": torch.zeros(4, dtype=torch.int64)}
    assert train_epoch_normal(model, [batch], CE, SGD(model.parameters(), 0.1), "cpu").samples == 4


def test_blending_steps_the_schedule_of_the_slot_and_trains_both() -> None:
    model = cnn()
    model.germinate("stage0", "conv").start_training()
    schedule = model.blend("stage0", 4, "linear")
    host, seed = AdamW(model.host_parameters(), 1e-2), AdamW(model.seed_parameters(), 1e-2)
    before = parameters(model)
    alphas: list[float] = []

    class Watch(StepHooks):
        def before_forward(self) -> None:
            alphas.append(model.slot("stage0").alpha.item())

    train_epoch_blended(model, image_batches(6), CE, host, seed, "cpu", hooks=Watch())
    assert alphas == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert schedule.done
    assert (parameters(model) != before).all() or (parameters(model) != before).float().mean() > 0.9
    model.fossilize("stage0")
    train_epoch_blended(model, image_batches(2), CE, AdamW(model.parameters()), None, "cpu")


def test_governor_hears_the_mean_micro_batch_loss_once_per_step() -> None:
    model = cnn()
    optimizer = AdamW(model.parameters(), 1e-2)
    governor = TolariaGovernor(model, optimizer, num_classes=10)
    stats = train_epoch_normal(
        model, image_batches(8), CE, optimizer, "cpu", governor=governor, accumulation_steps=2
    )
    assert governor.step_count == stats.steps == 4
    assert governor.history == pytest.approx(stats.losses.tolist())


def test_an_anomalous_step_is_left_out() -> None:
    class SpikeOnce(StepHooks):
        def __init__(self) -> None:
            self.step = 0

        def before_forward(self) -> None:
            self.step += 1
            if self.step == 3:
                kept.append(torch.cat([t.flatten().double() for t in model.state_dict().values()]))

        def on_loss(self, loss: Tensor) -> Tensor:
            return loss * 1e6 if self.step == 3 else loss

        def after_step(self, loss: Tensor) -> None:
            if self.step == 3:
                kept.append(torch.cat([t.flatten().double() for t in model.state_dict().values()]))

    kept: list[Tensor] = []
    model = cnn()
    optimizer = AdamW(model.parameters(), 1e-2)
    config = GovernorConfig(skip_anomalous_steps=True, warmup_bound=100.0)
    governor = TolariaGovernor(model, optimizer, num_classes=10, config=config)
    train_epoch_normal(
        model, image_batches(5), CE, optimizer, "cpu", governor=governor, hooks=SpikeOnce(), max_grad_norm=1.0
    )
    assert (governor.step_count, governor.rollback_count) == (5, 0)
    assert torch.equal(kept[0], kept[1])


def test_a_seed_that_a_rollback_took_leaves_the_loop_running() -> None:
    class NanOnce(StepHooks):
        step = 0

        def on_loss(self, loss: Tensor) -> Tensor:
            self.step += 1
            return loss * float("nan") if self.step == 3 else loss

    model = cnn()
    host = AdamW(model.host_parameters(), 1e-2)
    governor = TolariaGovernor(model, host, num_classes=10)
    model.germinate("stage0", "conv").start_training()
    seed = AdamW(model.seed_parameters(), 1e-2)
    governor.add_optimizer(seed)
    scaler = GradScaler("cpu", init_scale=64.0)
    stats = train_epoch_incubator_mode(
        model, image_batches(6), CE, host, seed, "cpu",
        governor=governor, hooks=NanOnce(), scaler=scaler, max_grad_norm=1.0, seed_max_grad_norm=1.0,
    )  # fmt: skip
    assert stats.steps == 6
    assert governor.rollback_count == 1
    assert model.slot("stage0").stage in (SeedStage.CULLED, SeedStage.DORMANT)
    assert torch.isfinite(parameters(model)).all()


def incubating() -> MorphogeneticModel:
    model = cnn()
    model.germinate("stage0", "conv").start_training()
    return model


def test_incubation_wants_a_slot_in_training_and_optimizers_apart() -> None:
    model = cnn()
    host = SGD(model.host_parameters(), 0.1)
    model.germinate("stage0", "conv")
    seed = SGD(model.seed_parameters(), 0.1)
    with pytest.raises(ValueError, match=r"stage TRAINING, got stage0: GERMINATED, stage1: DORMANT"):
        train_epoch_incubator_mode(model, [], CE, host, seed, "cpu")
    model.incubate("stage0")
    with pytest.raises(
        ValueError, match=r"seed_optimizer: expected parameters that host_optimizer does not have"
    ):
        train_epoch_incubator_mode(model, [], CE, SGD(model.parameters(), 0.1), seed, "cpu")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"task_type": "vision"}, ValueError, "task_type"),
        ({"accumulation_steps": 0}, ValueError, "accumulation_steps: expected an integer >= 1, got 0"),
        ({"max_steps": 1.5}, ValueError, "max_steps"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm: .*got -1.0"),
        ({"amp_dtype": torch.float64}, ValueError, "amp_dtype"),
    ],
    ids=["task", "accumulation", "steps", "norm", "amp"],
)
def test_bad_options_are_refused_before_anything_runs(
    options: dict[str, object], error: type[Exception], match: str
) -> None:
    model = cnn()
    before = parameters(model)
    with pytest.raises(error, match=match):
        train_epoch_normal(model, image_batches(1), CE, SGD(model.parameters(), 0.1), "cpu", **options)  # type: ignore[arg-type]
    assert torch.equal(parameters(model), before)


class _Steep(StepHooks):
    """Makes the gradient of one step steep."""

    def __init__(self, model: nn.Module, step: int) -> None:
        self.model, self.left = model, step

    def after_backward(self) -> None:
        self.left -= 1
        if self.left == 0:
            for p in self.model.parameters():
                assert p.grad is not None
                p.grad.mul_(1e4)


@pytest.mark.parametrize("skip", [False, True])
def test_governor_judges_the_gradient_from_before_clipping(skip: bool) -> None:
    model = cnn()
    optimizer = SGD(model.parameters(), lr=1e-3)
    config = GovernorConfig(gradient_norm=True, skip_anomalous_steps=skip)
    governor = TolariaGovernor(model, optimizer, config=config)
    train_epoch_normal(
        model, image_batches(24), CE, optimizer, "cpu", max_grad_norm=1e-2, governor=governor,
        hooks=_Steep(model, 20),
    )  # fmt: skip
    (verdict,) = [event for event in governor.poll() if isinstance(event, VerdictEvent)]
    assert (verdict.step, verdict.reason) == (20, PanicReason.GRADIENT_NORM)
    assert verdict.gradient_norm > 100.0


def test_plateau_schedulers_and_odd_batches_are_type_errors() -> None:
    model = cnn()
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match="ReduceLROnPlateau needs a metric"):
        train_epoch_normal(model, [], CE, optimizer, "cpu", schedulers=[ReduceLROnPlateau(optimizer)])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"loader: expected batches .*got a tuple of 3"):
        train_epoch_normal(model, [(1, 2, 3)], CE, optimizer, "cpu")
    with pytest.raises(TypeError, match="got a mapping with keys"):
        train_epoch_normal(model, [{"z": 1}], CE, optimizer, "cpu")


def test_schedulers_step_once_per_optimizer_step() -> None:
    model = cnn()
    optimizer = SGD(model.parameters(), 1.0)
    train_epoch_normal(
        model, image_batches(4), CE, optimizer, "cpu", accumulation_steps=2,
        schedulers=[StepLR(optimizer, step_size=1, gamma=0.5)],
    )  # fmt: skip
    assert optimizer.param_groups[0]["lr"] == 0.25
