"""Where the gradients' norm is taken, of which gradients, and that none is judged in silence."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tolaria
from tolaria.errors import UncoveredWarning
from tolaria.governor import GovernorConfig, PanicReason, TolariaGovernor


@pytest.fixture(params=["fused", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    with tolaria.backend(request.param):
        yield


def judged(governor: TolariaGovernor) -> float:
    verdict = governor.last_verdict
    assert verdict is not None
    return verdict.gradient_norm


def norm_of(model: nn.Module) -> float:
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def governed(model: nn.Module, optimizers: Any, **options: Any) -> TolariaGovernor:
    return TolariaGovernor(model, optimizers, config=GovernorConfig(gradient_norm=True), **options)


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_are_cleared_before_the_judgement_are_judged(to_none: bool) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    governor = governed(model, optimizer)
    for i in range(14):
        model(torch.ones(4, 3)).square().mean().mul(1.0 if i < 13 else math.nan).backward()  # type: ignore[no-untyped-call]
        expected = norm_of(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
        governor.step(1.0)
        if i < 13:
            assert judged(governor) == pytest.approx(expected, rel=1e-6)
    assert governor.last_report is not None
    assert governor.last_report.reason is PanicReason.GRADIENT_NORM


def test_none_is_judged_without_a_word_once() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = governed(model, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        governor.step(1.0)
        governor.step(1.0)
        optimizer.step()
        governor.check_vital_signs(1.0)
    assert caught[0].category is UncoveredWarning
    assert "gradient_norm is asked for (by the settings, or by step(None))" in str(caught[0].message)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert math.isnan(judged(governor))


def test_a_norm_that_is_handed_over_is_the_one() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = governed(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model(torch.ones(4, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            governor.step(1.0, gradient_norm=7.0)
            assert judged(governor) == 7.0
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        governor.step(1.0)
    assert judged(governor) == pytest.approx(norm_of(model))


@pytest.mark.parametrize(
    ("norm", "error", "words"),
    [
        ("a", TypeError, "gradient_norm: expected a number"),
        (True, TypeError, "gradient_norm: expected a number"),
        (torch.ones(2), ValueError, r"gradient_norm: expected one value, got shape \(2,\)"),
        (torch.ones(1, dtype=torch.long), TypeError, "gradient_norm: expected a floating tensor, got dtype"),
        (torch.ones((), device="meta"), ValueError, "gradient_norm: expected device cpu, got meta"),
    ],
)
def test_what_is_no_norm_is_named_and_judges_nothing(norm: Any, error: type[Exception], words: str) -> None:
    model = nn.Linear(3, 2)
    governor = governed(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = governor.state_dict()
    for call in (governor.step, governor.check_vital_signs):
        with pytest.raises(error, match=words):
            call(1.0, gradient_norm=norm)
    assert governor.state_dict() == before


def test_each_optimizer_is_looked_at_when_it_steps() -> None:
    """As in a GAN, where the generator's backward reaches the critic, too."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 1)
    both = nn.ModuleList([first, second])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in both]
    governor = governed(both, optimizers)
    second(torch.ones(3, 2)).square().mean().backward()
    of_second = norm_of(second)
    optimizers[1].step()
    second(first(torch.ones(3, 2))).square().mean().backward()
    of_first = norm_of(first)
    optimizers[0].step()
    governor.step(1.0)
    assert judged(governor) == pytest.approx(math.hypot(of_first, of_second))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.LBFGS])
def test_with_a_closure_they_are_those_it_leaves(make: Any) -> None:
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters(), lr=0.1)
    governor = governed(model, optimizer)
    norms: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 3)).square().mean()
        loss.backward()
        norms.append(norm_of(model))
        return loss

    for _ in range(3):
        norms.clear()
        optimizer.step(closure)
        optimizer.zero_grad()
        governor.step(1.0)
        assert judged(governor) == pytest.approx(norms[0], rel=1e-6)


def test_before_the_step_they_are_those_of_now_and_no_others_later() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = governed(model, optimizer)
    for factor in (1.0, 2.0):
        optimizer.zero_grad()
        (model(torch.ones(4, 3)).sum() * factor).backward()
        verdict = governor.check_vital_signs(1.0)
        assert verdict.gradient_norm == pytest.approx(norm_of(model))
        optimizer.step()
        governor.step(verdict)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("conjugate", [False, True])
def test_complex_gradients_count_by_their_magnitude(dtype: torch.dtype, conjugate: bool) -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=dtype))
    model = nn.ParameterList([weight, nn.Parameter(torch.zeros(1))])
    optimizer = torch.optim.Adam(model.parameters())
    governor = governed(model, optimizer)
    gradient = torch.tensor([3 + 4j, 0j], dtype=dtype)
    weight.grad, model[1].grad = gradient.conj() if conjugate else gradient, torch.tensor([12.0])
    if not conjugate:  # torch's own cannot take a gradient that is still to be conjugated
        optimizer.step()
    governor.step(1.0)
    assert judged(governor) == 13.0
    weight.grad = torch.tensor([1.0, complex(0.0, math.nan)], dtype=dtype)
    governor.step(1.0)
    assert governor.last_report is not None
    assert governor.last_report.reason is PanicReason.GRADIENT_NORM


def test_sparse_gradients_count_by_their_sums() -> None:
    model = nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(list(model.parameters()))
    governor = governed(model, optimizer)
    model(torch.tensor([1, 1, 3])).sum().backward()
    optimizer.step()
    governor.step(1.0)
    assert judged(governor) == pytest.approx(math.sqrt(2 * 2.0**2 + 2 * 1.0))


def test_the_scale_of_a_fused_step_is_no_part_of_the_norm() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    governor = governed(model, optimizer, scaler=scaler)
    scaler.scale(model(torch.ones(4, 3)).sum()).backward()  # type: ignore[no-untyped-call]
    expected = norm_of(model) / 1024.0
    scaler.step(optimizer)
    scaler.update()
    governor.step(1.0)
    assert judged(governor) == pytest.approx(expected)


@pytest.mark.parametrize("unscaled", [0, 1, 2], ids=["none", "one", "both"])
def test_before_the_step_the_scale_is_no_part_of_the_norm_either(unscaled: int) -> None:
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 1)])
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1)
    governor = governed(model, optimizers, scaler=scaler)
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model[1](model[0](torch.ones(4, 3))).square().mean()
        right = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        scaler.scale(loss).backward()
        for optimizer in optimizers[:unscaled]:
            scaler.unscale_(optimizer)
        verdict = governor.check_vital_signs(loss)
        assert verdict.gradient_norm == pytest.approx(float(torch.cat([g.flatten() for g in right]).norm()))
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        governor.step(verdict)


def test_an_optimizer_inside_another_counts_once() -> None:
    class Outer(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            return self.inner.step(closure)

    model = nn.Linear(3, 2)
    optimizer = Outer(torch.optim.SGD(model.parameters(), lr=0.1))
    governor = governed(model, optimizer)
    model(torch.ones(4, 3)).sum().backward()
    expected = norm_of(model)
    optimizer.step()
    governor.step(1.0)
    assert judged(governor) == pytest.approx(expected)
    governor.step(1.0)  # as they are now
    assert judged(governor) == pytest.approx(norm_of(model))


def test_a_removed_optimizer_is_none_of_ours() -> None:
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(2, 1)])
    ours, other = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model)
    governor = governed(model, [ours, other])
    governor.remove_optimizer(other)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in (ours, other):
        optimizer.step()
    governor.step(1.0)
    assert judged(governor) == pytest.approx(math.sqrt(8.0))


def test_an_added_optimizer_is_watched_and_a_closed_governor_watches_none() -> None:
    model = nn.Linear(3, 2)
    governor = governed(model, [])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor.add_optimizer(optimizer)
    model(torch.ones(4, 3)).sum().backward()
    expected = norm_of(model)
    optimizer.step()
    optimizer.zero_grad()
    governor.step(1.0)
    assert judged(governor) == pytest.approx(expected)
    governor.close()
    assert not optimizer._optimizer_step_pre_hooks  # type: ignore[attr-defined]
