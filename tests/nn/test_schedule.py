"""Alpha schedules: exact ends, monotone between, state that continues identically."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tolaria import AlphaSchedule
from tolaria.nn.schedule import alpha_fraction

KINDS = ("linear", "cosine", "sigmoid")


@given(kind=st.sampled_from(KINDS), left=st.floats(0, 1), right=st.floats(0, 1))
def test_fraction_is_monotone_with_exact_ends(kind: str, left: float, right: float) -> None:
    low, high = sorted((left, right))
    assert 0.0 <= alpha_fraction(kind, low) <= alpha_fraction(kind, high) <= 1.0
    assert (alpha_fraction(kind, 0.0), alpha_fraction(kind, 1.0)) == (0.0, 1.0)
    assert alpha_fraction(kind, 0.5) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_write_the_values_in_place(kind: str) -> None:
    alpha = torch.full((), 0.3)
    address = alpha.data_ptr()
    schedule = AlphaSchedule(alpha, 4, kind)
    seen = [alpha.item()]
    for _ in range(6):
        schedule.step()
        seen.append(alpha.item())
    assert seen == pytest.approx([alpha_fraction(kind, min(1, i / 4)) for i in range(7)])
    assert seen[0] == 0.0
    assert seen[-3:] == [1.0, 1.0, 1.0]
    assert alpha.data_ptr() == address
    assert schedule.done


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_continues_identically(kind: str) -> None:
    one, two = torch.zeros(()), torch.zeros(())
    first = AlphaSchedule(one, 7, kind, end=0.9)
    for _ in range(3):
        first.step()
    second = AlphaSchedule(two, 7, kind, end=0.9)
    second.load_state_dict(first.state_dict())
    for _ in range(6):
        assert torch.equal(one, two)
        first.step()
        second.step()
    with pytest.raises(ValueError, match="steps: expected 7 like this schedule, got 8"):
        second.load_state_dict({**first.state_dict(), "steps": 8})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *[({"position": p}, "position: expected an integer from 0 to 7") for p in (-1, 8, 2**80, 1.0, True)],
        ({"position": torch.tensor([1, 2])}, "position: expected an integer"),
        ({"kind": torch.ones(2)}, "kind: expected 'linear'"),
        ({"end": float("nan")}, "end: expected 0.9"),
        ({"steps": 7.0}, "steps: expected 7"),
        ({"speed": 1}, "expected the keys .*speed"),
        ({"position": None}, "position: expected an integer"),
    ],
)
def test_a_damaged_state_is_named_and_changes_nothing(change: dict[str, object], said: str) -> None:
    alpha = torch.zeros(())
    schedule = AlphaSchedule(alpha, 7, end=0.9)
    schedule.step()
    kept = alpha.clone()
    with pytest.raises(ValueError, match=said):
        schedule.load_state_dict({**schedule.state_dict(), **change})
    with pytest.raises(ValueError, match="expected the keys"):
        schedule.load_state_dict({"steps": 7})
    with pytest.raises(TypeError, match="expected a dict, got list"):
        schedule.load_state_dict([1])  # type: ignore[arg-type]
    assert torch.equal(alpha, kept)
    assert schedule.position == 1


def test_a_position_of_any_value_stays_inside_the_schedule() -> None:
    alpha, position = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    schedule = AlphaSchedule(alpha, 4, position=position)
    for value, arrived in ((-5, 0.0), (-(2**63), 0.0), (2**40, 1.0), (2**63 - 1, None)):
        position.fill_(value)
        schedule.step()
        assert 0.0 <= float(alpha) <= 1.0
        assert arrived is None or float(alpha) == arrived


@pytest.mark.parametrize(
    ("alpha", "settings", "error", "match"),
    [
        (torch.zeros(()), {"steps": 0}, ValueError, "steps: expected an integer >= 1, got 0"),
        (torch.zeros(()), {"steps": True}, ValueError, "steps"),
        (torch.zeros(()), {"steps": 3, "kind": "cubic"}, ValueError, "kind: .*'sigmoid'.*got 'cubic'"),
        (torch.zeros(()), {"steps": 3, "end": 1.5}, ValueError, r"end: .*\[0, 1\], got 1.5"),
        (torch.zeros(()), {"steps": 3, "start": float("nan")}, ValueError, "start"),
        (torch.zeros(1), {"steps": 3}, ValueError, r"0-dim tensor, got shape \(1,\)"),
        (
            torch.zeros((), dtype=torch.int64),
            {"steps": 3},
            TypeError,
            "floating point tensor, got torch.int64",
        ),
    ],
    ids=["zero", "bool", "kind", "end", "nan", "dim", "dtype"],
)
def test_bad_arguments_are_named(
    alpha: torch.Tensor, settings: dict[str, object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        AlphaSchedule(alpha, **settings)  # type: ignore[arg-type]
