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
    with pytest.raises(ValueError, match="like"):
        second.load_state_dict({**first.state_dict(), "steps": 8})


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
