"""Seed slots: what each stage computes, what germination checks, and what it leaves as found."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tolaria import AlphaSchedule, MorphogeneticModel, SeedSlot, SeedStage
from tolaria.nn import CNNHost, IllegalTransitionError, TransformerHost, list_blueprints, register_blueprint
from tolaria.nn.randomness import random_state, streams_drawn
from tolaria.nn.stage import TRANSITIONS

IMAGE = torch.linspace(-1, 1, 2 * 4 * 6 * 6).view(2, 4, 6, 6)
SEQUENCE = torch.linspace(-1, 1, 2 * 5 * 8).view(2, 5, 8)


def slot_in(stage: SeedStage, blueprint: str | Callable[[Tensor], nn.Module] = "conv") -> SeedSlot:
    slot = SeedSlot("mid")
    if stage is SeedStage.DORMANT:
        return slot
    slot.germinate(blueprint, IMAGE, rng_seed=3)
    if stage is SeedStage.CULLED:
        slot.cull()
    if stage in (SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED):
        slot.start_training()
    if stage in (SeedStage.BLENDING, SeedStage.FOSSILIZED):
        slot.start_blending(10, "linear")
    if stage is SeedStage.FOSSILIZED:
        slot.fossilize()
    return slot


class Doubling(nn.Module):
    """Not identity-like, so that its output can be told from its input."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Pair(nn.Module):
    """Returns no tensor."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize("stage", [SeedStage.DORMANT, SeedStage.GERMINATED, SeedStage.CULLED])
def test_slot_without_a_live_seed_returns_its_features(stage: SeedStage) -> None:
    assert slot_in(stage)(IMAGE) is IMAGE


def test_training_keeps_host_values_and_gives_both_the_gradient() -> None:
    slot = slot_in(SeedStage.TRAINING, Doubling)
    features = IMAGE.clone().requires_grad_()
    out = slot(features)
    assert torch.equal(out, features)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    assert torch.equal(features.grad, weights)  # type: ignore[arg-type]
    assert slot.seed is not None
    (expected,) = torch.autograd.grad((slot.seed(IMAGE) * weights).sum(), list(slot.seed.parameters()))
    (gradient,) = (p.grad for p in slot.seed.parameters())
    assert gradient is not None
    assert torch.equal(gradient, expected)


def test_training_with_a_nan_seed_does_not_reach_the_loss() -> None:
    slot = slot_in(SeedStage.TRAINING)
    with torch.no_grad():
        for parameter in slot.parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(slot(IMAGE.clone().requires_grad_()), IMAGE)


def test_training_without_gradients_does_not_run_the_seed() -> None:
    slot = slot_in(SeedStage.TRAINING)
    with torch.no_grad():
        assert slot(IMAGE) is IMAGE


def test_blending_goes_from_host_to_seed() -> None:
    slot = slot_in(SeedStage.BLENDING, Doubling)
    assert slot.schedule is not None
    assert torch.equal(slot(IMAGE), IMAGE)
    for _ in range(5):
        slot.schedule.step()
    assert torch.allclose(slot(IMAGE), 1.5 * IMAGE)
    for _ in range(7):
        slot.schedule.step()
    assert torch.equal(slot(IMAGE), 2 * IMAGE)


def test_blending_nan_seed_at_alpha_zero_reaches_neither_values_nor_gradients() -> None:
    slot = slot_in(SeedStage.BLENDING)
    with torch.no_grad():
        for parameter in slot.parameters():
            parameter.fill_(float("nan"))
    features = IMAGE.clone().requires_grad_()
    out = slot(features)
    out.sum().backward()
    assert torch.equal(out, IMAGE)
    assert torch.equal(features.grad, torch.ones_like(IMAGE))  # type: ignore[arg-type]


def test_fossilized_is_the_seed_alone() -> None:
    slot = slot_in(SeedStage.FOSSILIZED, Doubling)
    assert torch.equal(slot(IMAGE), 2 * IMAGE)
    assert slot.alpha.item() == 1.0


def test_bypassed_passes_features_and_comes_back() -> None:
    slot = slot_in(SeedStage.FOSSILIZED, Doubling)
    with slot.bypassed():
        assert slot(IMAGE) is IMAGE
    assert torch.equal(slot(IMAGE), 2 * IMAGE)


@pytest.mark.parametrize("target", list(SeedStage))
@pytest.mark.parametrize("stage", list(SeedStage))
def test_transitions_are_checked(stage: SeedStage, target: SeedStage) -> None:
    slot = slot_in(stage)
    if target in TRANSITIONS[stage] and target is not SeedStage.GERMINATED:
        slot.advance(target, blend_steps=5)
        assert slot.stage is target
    elif target not in TRANSITIONS[stage]:
        with pytest.raises(
            IllegalTransitionError, match=f"'mid'.*may follow {stage.name}.*got {target.name}"
        ):
            slot.advance(target, blend_steps=5)
        assert slot.stage is stage
    else:
        with pytest.raises(ValueError, match="germinate"):
            slot.advance(target)


def test_advance_to_blending_asks_for_its_steps() -> None:
    with pytest.raises(ValueError, match="blend_steps"):
        slot_in(SeedStage.TRAINING).advance(SeedStage.BLENDING)


@pytest.mark.parametrize("blueprint", [*list_blueprints("image"), *list_blueprints("sequence")])
def test_built_in_seeds_are_the_identity_at_birth_and_can_learn(blueprint: str) -> None:
    features = IMAGE if blueprint in list_blueprints("image") else SEQUENCE
    slot = SeedSlot("mid")
    seed = slot.germinate(blueprint, features)
    assert torch.allclose(seed(features), features)
    seed(features).square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in seed.parameters())


def test_attention_seed_is_causal() -> None:
    seed = SeedSlot("mid").germinate("attention", SEQUENCE)
    with torch.no_grad():
        for parameter in seed.parameters():
            parameter.normal_()
    changed = SEQUENCE.clone()
    changed[:, -1] += 1.0
    assert torch.equal(seed(SEQUENCE)[:, :-1], seed(changed)[:, :-1])


def test_germination_leaves_every_random_stream_as_found() -> None:
    np.random.random(3)
    before = random_state()

    def noisy(features: Tensor) -> nn.Module:
        random.random(), np.random.random(), torch.rand(3)
        return nn.Sequential(nn.Dropout(0.5), nn.Conv2d(4, 4, 1))

    SeedSlot("mid").germinate(noisy, IMAGE)
    assert not streams_drawn(before)


def test_germination_depends_on_the_seed_alone() -> None:
    def weights(rng_seed: int) -> Tensor:
        torch.rand(rng_seed + 1)  # wherever the global stream stands
        return torch.cat(
            [p.flatten() for p in SeedSlot("mid").germinate("conv", IMAGE, rng_seed=rng_seed).parameters()]
        )

    assert torch.equal(weights(5), weights(5))
    assert not torch.equal(weights(5), weights(6))


def test_germination_tries_train_mode_on_a_copy() -> None:
    seed = SeedSlot("mid").germinate("conv", IMAGE)
    norm = next(m for m in seed.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))  # type: ignore[arg-type]
    assert seed.training


def test_germination_accepts_a_batch_of_one() -> None:
    SeedSlot("mid").germinate(lambda f: nn.BatchNorm2d(4), IMAGE[:1, :, :1, :1])


@pytest.mark.parametrize(
    ("blueprint", "error", "match"),
    [
        ("cnov", ValueError, "expected one of .*conv.*got 'cnov'; did you mean 'conv'"),
        ("mlp", ValueError, r"expected features \(B, T, C\), got shape \(2, 4, 6, 6\)"),
        (lambda f: nn.Conv2d(4, 5, 1), ValueError, r"keeps the shape .*\(2, 4, 6, 6\), got \(2, 5, 6, 6\)"),
        (lambda f: 3, TypeError, "build an nn.Module, got int"),
        (lambda f: Pair(), TypeError, "return a tensor, got tuple"),
        (3, TypeError, "a name or a callable"),
    ],
    ids=["unknown", "layout", "shape", "no-module", "no-tensor", "no-blueprint"],
)
def test_germination_that_does_not_fit_changes_nothing(
    blueprint: str, error: type[Exception], match: str
) -> None:
    slot = SeedSlot("mid")
    before = random_state()
    with pytest.raises(error, match=match):
        slot.germinate(blueprint, IMAGE)
    assert slot.stage is SeedStage.DORMANT
    assert slot.seed is None
    assert not streams_drawn(before)


def test_seed_takes_on_dtype_and_memory_format() -> None:
    features = IMAGE.double().to(memory_format=torch.channels_last)
    seed = SeedSlot("mid").germinate("conv", features)
    assert all(p.dtype is torch.float64 for p in seed.parameters())
    assert seed(features).is_contiguous(memory_format=torch.channels_last)


class Scribbler(nn.Module):
    """Writes into its input."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(3.0) * self.scale


@pytest.mark.parametrize("stage", [SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED])
def test_seed_that_writes_into_its_input_does_not_reach_the_host(stage: SeedStage) -> None:
    slot = slot_in(stage, Scribbler)
    features = IMAGE.clone()
    features_before, source = features.clone(), features.requires_grad_()
    out = slot(source * 1.0)
    out.sum().backward()
    assert torch.equal(features.detach(), features_before)
    held = IMAGE.clone()
    slot(held)
    assert torch.equal(held, IMAGE)


class Noisy(nn.Module):
    """Draws from three streams."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            random.random(), np.random.random()
        return self.dropout(x) * self.weight


def test_seed_forward_leaves_every_random_stream_as_found() -> None:
    slot = slot_in(SeedStage.TRAINING, Noisy)
    before = random_state()
    outputs = [slot._run(slot.seed, IMAGE) for _ in range(3)]  # type: ignore[arg-type]
    assert not streams_drawn(before)
    assert not torch.equal(outputs[0], outputs[1])  # its own stream moves on
    assert not torch.equal(outputs[1], outputs[2])


def test_checkpointed_noisy_seed_gets_the_gradient_of_its_forward() -> None:
    slot = slot_in(SeedStage.FOSSILIZED, Noisy)
    features = torch.ones_like(IMAGE).requires_grad_()
    out = checkpoint(slot, features, use_reentrant=False)
    out.sum().backward()
    assert torch.equal(features.grad, out.detach())  # type: ignore[arg-type]


def test_alpha_stays_float32_at_its_address() -> None:
    slot = slot_in(SeedStage.BLENDING)
    address = slot.alpha.data_ptr()
    assert slot.schedule is not None
    slot.schedule.step()
    slot.fossilize()
    assert slot.alpha.data_ptr() == address
    slot = slot_in(SeedStage.BLENDING).half()
    assert slot.alpha.dtype is torch.float32
    assert slot.schedule is not None
    slot.schedule.step()
    assert slot.alpha.item() == pytest.approx(0.1)


def test_schedule_cannot_raise_alpha_after_a_drop_on_the_device() -> None:
    slot = slot_in(SeedStage.BLENDING)
    assert slot.schedule is not None
    slot.schedule.step()
    for tensor in slot.zero_alpha_tensors():
        tensor.zero_()
    slot.schedule.step()
    assert slot.alpha.item() == 0.0


@pytest.mark.parametrize("now", [SeedStage.TRAINING, SeedStage.BLENDING, SeedStage.FOSSILIZED])
@pytest.mark.parametrize("then", [SeedStage.DORMANT, SeedStage.TRAINING, SeedStage.BLENDING])
def test_rollback_drops_a_seed_that_was_no_fossil_at_capture(now: SeedStage, then: SeedStage) -> None:
    captured = slot_in(then).rollback_state()
    slot = slot_in(now)
    slot.load_rollback_state(captured)
    assert slot.seed is None
    assert slot.alpha.item() == 0.0
    assert slot.stage is (SeedStage.DORMANT if then is SeedStage.DORMANT else SeedStage.CULLED)
    assert slot.alpha_limit.item() == 1.0  # the slot may germinate again


def test_rollback_keeps_a_fossil() -> None:
    slot = slot_in(SeedStage.FOSSILIZED, Noisy)
    captured, seed = slot.rollback_state(), slot.seed
    first = slot(IMAGE)
    slot.load_rollback_state(captured)
    assert slot.seed is seed
    assert slot.stage is SeedStage.FOSSILIZED
    assert torch.equal(slot(IMAGE), first)  # its random stream went back, too


def test_structure_and_state_dict_rebuild_a_model_that_goes_on_identically() -> None:
    def grown() -> MorphogeneticModel:
        return MorphogeneticModel(CNNHost(widths=(4, 4)), example_input=torch.zeros(2, 1, 8, 8))

    model = grown()
    model.germinate("stage0", "conv", options={"expansion": 1.0}).start_training()
    schedule = model.blend("stage0", 8)
    for slot, blueprint in (("stage1", "squeeze_excite"),):
        model.germinate(slot, blueprint)
    schedule.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    again = grown()
    again.load_structure(model.structure())
    again.load_state_dict(model.state_dict())
    x = torch.randn(3, 1, 8, 8)
    for _ in range(3):
        schedule.step()
        other = again.slot("stage0").schedule
        assert other is not None
        other.step()
        assert torch.equal(model(x), again(x))
    assert again.structure() == model.structure()


def test_copy_of_a_model_grows_on_its_own() -> None:
    model = MorphogeneticModel(CNNHost(widths=(4, 4)), example_input=torch.zeros(2, 1, 8, 8))
    model.germinate("stage0", Doubling)
    model.incubate("stage0")
    model.blend("stage0", 1)
    x = torch.randn(3, 1, 8, 8)
    before = model(x)
    twin = copy.deepcopy(model)
    schedule = twin.slot("stage0").schedule
    assert isinstance(schedule, AlphaSchedule)
    schedule.step()
    assert torch.equal(model.eval()(x), model(x))
    assert model.slot("stage0").alpha.item() == 0.0
    assert twin.slot("stage0").alpha.item() == 1.0
    assert not torch.equal(twin(x), before)


def test_any_module_with_an_injection_point_can_be_a_host() -> None:
    host = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    model = MorphogeneticModel(host, {"hidden": "1"}, example_input=torch.zeros(1, 3))
    model.germinate("hidden", lambda features: nn.Linear(features.shape[-1], features.shape[-1]))
    assert [p.shape for p in model.seed_parameters()] == [(8, 8), (8,)]
    assert len(model.host_parameters()) == 4


def test_slots_inside_a_host_are_found() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.slot, self.last = nn.Linear(3, 4), SeedSlot("inner"), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.slot(self.first(x)))

    model = MorphogeneticModel(Host(), example_input=torch.zeros(2, 3))
    model.germinate("inner", lambda features: nn.Linear(4, 4))
    assert model.slot("inner").stage is SeedStage.GERMINATED
    assert len(model.seed_parameters("inner")) == 2
    assert len(model.host_parameters()) == 4


def test_slot_names_are_unique() -> None:
    host = nn.Sequential(nn.Linear(3, 3), SeedSlot("mid"))
    with pytest.raises(ValueError, match=r"each name once, got \['mid'\]"):
        MorphogeneticModel(host, {"mid": "0"})


def test_probing_leaves_modes_buffers_and_streams_as_found() -> None:
    model = MorphogeneticModel(CNNHost(widths=(4, 4), dropout=0.5), example_input=torch.zeros(2, 1, 8, 8))
    model.host.stages[0].eval()  # type: ignore[index,union-attr]
    modes = {name: module.training for name, module in model.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = random_state()
    model.features_at("stage1")
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert not streams_drawn(before)


@pytest.mark.parametrize(
    ("slots", "match"),
    [
        (["stage7"], r"injection points of CNNHost \(stage0, stage1\), got \['stage7'\]"),
        ({"a.b": "stages.0"}, "without dots"),
        ({"a": "nowhere"}, "path of a submodule"),
        ([], "at least one injection point"),
        (["stage0", "stage1", "stage0"], r"each injection point once, got \['stage0'\]"),
    ],
    ids=["unknown", "dots", "path", "none", "twice"],
)
def test_bad_slots_are_refused(slots: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MorphogeneticModel(CNNHost(), slots)  # type: ignore[arg-type]


def test_germination_without_an_example_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="pass example_input="):
        MorphogeneticModel(CNNHost()).germinate("stage0", "conv")


def test_unknown_slot_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="expected one of stage0, stage1, got 'mid'"):
        MorphogeneticModel(CNNHost()).slot("mid")


def test_tied_embedding_counts_once_and_long_input_is_refused() -> None:
    host = TransformerHost(vocabulary=11, context=4, width=8, depth=1, heads=2)
    assert host.head.weight is host.embedding.weight
    with pytest.raises(ValueError, match="at most 4 tokens, got 5"):
        host(torch.zeros(1, 5, dtype=torch.int64))


def test_blueprints_can_be_registered_once() -> None:
    register_blueprint("test-doubling", Doubling, replace=True)
    with pytest.raises(ValueError, match="taken"):
        register_blueprint("test-doubling", Doubling)
    slot = slot_in(SeedStage.FOSSILIZED, "test-doubling")
    assert torch.equal(slot(IMAGE), 2 * IMAGE)


# Without an extension dynamo traces the reference's autograd functions, and warns of its own way of doing so.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_slot_works_under_torch_compile() -> None:
    slot = slot_in(SeedStage.BLENDING, Doubling)
    assert slot.schedule is not None
    slot.schedule.step()
    compiled = torch.compile(slot, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IMAGE), slot(IMAGE))
