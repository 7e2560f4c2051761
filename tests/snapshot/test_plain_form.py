"""State dicts as JSON and tensors, and back."""

from __future__ import annotations

import json
import math
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tolaria.errors import SnapshotError
from tolaria.snapshot.plain_form import LIVE, from_plain, to_plain

ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=4)
    | st.complex_numbers(allow_nan=False)
    | st.sampled_from([torch.float32, torch.device("cpu"), torch.Size([1, 2]), LIVE])
)
KEYS = st.text(max_size=3) | st.integers() | st.tuples(st.integers(), st.booleans()) | st.just("$tensor")
TREES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.frozensets(st.integers(), max_size=3)
        | st.sets(st.text(max_size=2), max_size=3)
    ),
    max_leaves=12,
)


def round_trip(value: object) -> Any:
    plain, tensors = to_plain(value, lambda thing: thing is LIVE or callable(thing))
    return from_plain(json.loads(json.dumps(plain)), tensors)


@given(TREES)
def test_whatever_goes_out_comes_back(tree: Any) -> None:
    back = round_trip(tree)
    assert back == tree
    assert repr(back) == repr(tree) or isinstance(tree, set | frozenset | dict | list | tuple)


def test_tensors_keep_their_ties_and_their_paths() -> None:
    shared = torch.arange(3.0)
    tree = {"model": OrderedDict(a=shared, b=shared), "optimizers": [{"state": {0: {"m": torch.ones(2)}}}]}
    plain, tensors = to_plain(tree, callable)
    assert list(tensors) == ["model/a", "optimizers/0/state/0/m"]
    back = from_plain(json.loads(json.dumps(plain)), tensors)
    assert back["model"]["a"] is back["model"]["b"]
    assert back["optimizers"][0]["state"][0]["m"].tolist() == [1.0, 1.0]


def test_paths_that_read_alike_name_two_tensors() -> None:
    tree = {
        "a/b": torch.zeros(1),
        "a": {"b": torch.ones(1)},
        1: torch.full((1,), 2.0),
        "1": torch.full((1,), 3.0),
    }
    back = round_trip(tree)
    assert {key: value for key, value in back.items() if isinstance(value, Tensor)}.keys() == {"a/b", 1, "1"}
    assert [float(t) for t in (back["a/b"], back["a"]["b"], back[1], back["1"])] == [0.0, 1.0, 2.0, 3.0]


def test_numbers_that_json_has_not() -> None:
    back = round_trip([math.nan, math.inf, -math.inf, np.float32(0.5), np.int64(3), np.bool_(True), -0.0])
    assert math.isnan(back[0])
    assert back[1:6] == [math.inf, -math.inf, 0.5, 3, True]
    assert math.copysign(1, back[6]) == -1


@pytest.mark.parametrize("dtype", ["uint32", "float64", "bool", "complex64", ">i4"])
def test_arrays(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    back = round_trip({"x": array, "transposed": array.T, "empty": array[:0]})
    for name, value in (("x", array), ("transposed", array.T), ("empty", array[:0])):
        assert back[name].dtype == value.dtype
        assert np.array_equal(back[name], value)
    back["x"][0, 0] = 1  # it can be written to


def test_the_state_of_every_random_generator() -> None:
    import random

    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    back = round_trip(states)
    first = random.random(), np.random.rand(), float(torch.rand(()))
    random.setstate(back["python"])
    np.random.set_state(back["numpy"])
    torch.set_rng_state(back["torch"])
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == first


def test_mappings_come_back_as_dicts_and_live_objects_as_a_mark() -> None:
    back = round_trip({"d": defaultdict(list, {"x": [1]}), "f": len, "m": nn.Linear(1, 1)})
    assert back == {"d": {"x": [1]}, "f": LIVE, "m": LIVE}
    assert type(back["d"]) is dict


def test_what_cannot_be_written_is_named() -> None:
    with pytest.raises(SnapshotError, match=r"extras/ema/0/x: .*got a object"):
        to_plain({"extras": {"ema": [{"x": object()}]}}, callable)


@pytest.mark.parametrize(
    "plain",
    [
        {"$tensor": "gone"},
        {"$tensor": ["x"]},
        {"$complex": ["1", 2]},
        {"$dtype": "os.system"},
        {"$nothing": 1},
        {"$tuple": 3},
        {"$dict": [[1]]},
        {"$dict": [[[1], 2]]},
        {"$array": ["O", [1], ""]},
        {"$array": ["int64", [99999999999], "00"]},
        {"$array": ["int64", [1], "zz"]},
        {"$complex": [1, 2, 3]},
        {"$live": 1, "x": 2},
        {"$size": ["a"]},
        {"$wrapped": ["x"]},
        object(),
    ],
)
def test_what_was_not_written_so_is_refused(plain: object) -> None:
    with pytest.raises(SnapshotError, match="damaged"):
        from_plain(plain, {})
