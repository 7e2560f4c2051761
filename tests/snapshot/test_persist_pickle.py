"""The reader of pickles that runs nothing."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tolaria.snapshot.persist.plain_pickle import Called, Pairs, dump, parse

SIMPLE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda each: st.lists(each) | st.lists(each).map(tuple) | st.dictionaries(st.text(), each),
    max_leaves=20,
)


def plain(value: Any) -> Any:
    """With dictionaries again."""
    if isinstance(value, Pairs):
        return {key: plain(each) for key, each in value.items}
    if isinstance(value, list | tuple):
        return type(value)(plain(each) for each in value)
    return value


def simple(value: Any) -> Any:
    """With dictionaries as pairs."""
    if isinstance(value, dict):
        return Pairs([(key, simple(each)) for key, each in value.items()])
    if isinstance(value, list | tuple):
        return type(value)(simple(each) for each in value)
    return value


@given(SIMPLE, st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_it_reads_what_pickle_writes(value: object, protocol: int) -> None:
    found = plain(parse(pickle.dumps(value, protocol=protocol), ()))
    assert found == value
    assert repr(found) == repr(value)  # True is no 1


@given(SIMPLE)
def test_pickle_reads_what_it_writes(value: object) -> None:
    assert repr(pickle.loads(dump(simple(value)))) == repr(value)
    assert repr(plain(parse(dump(simple(value)), ()))) == repr(value)


def test_objects_are_named_and_not_made() -> None:
    found = parse(pickle.dumps(torch.Size([2, 3])), {"torch.Size"})
    assert (found.name, found.arguments, found.state) == ("torch.Size", ((2, 3),), None)
    found = parse(pickle.dumps(Fraction(1, 2)), {"fractions.Fraction"})
    assert (found.name, found.arguments) == ("fractions.Fraction", ("1/2",)) or found.arguments == (1, 2)


def test_pickle_makes_what_is_called_and_shares_what_is_shared() -> None:
    size = Called("torch.Size", ((2, 3),))
    first, second, dtype = pickle.loads(dump((size, size, Called("torch.float16"))))
    assert first == torch.Size([2, 3])
    assert first is second
    assert dtype is torch.float16
    made = pickle.loads(dump(Called("collections.OrderedDict", (), Pairs([("a", 1)]))))
    assert isinstance(made, OrderedDict)
    assert made.a == 1


def test_only_simple_data_can_be_written() -> None:
    with pytest.raises(TypeError, match="value: expected simple data, got float"):
        dump([1.5])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "pickle exhausted"),
        (b"\x80\x02K\x01", "pickle exhausted"),
        (b"\x80\x02K\x01.x", "it does not end where its pickle ends"),
        (b"\x80\x02K\x01K\x02.", "it does not end where its pickle ends"),
        (b"\x80\x02(K\x01.", "it does not end where its pickle ends"),
        (b"\x80\x02.", "it does not end where its pickle ends"),
        (b"\x80\x02h\x05.", "no pickle of simple data"),
        (b"\x80\x02t.", "no pickle of simple data"),
        (b"\x80\x02K\x01(\x86.", "no pickle of simple data"),  # the tuple would take what lies below the mark
        (b"\x80\x02K\x01K\x02a.", "no pickle of simple data"),
        (b"\x80\x02}K\x01K\x02K\x03(u.", "no pickle of simple data"),
        (b"\x80\x02}(K\x01u.", "argument 2 is shorter"),
        (b"\x80\x02ctorch\nSize\n)\x81N\x86b.", "no pickle of simple data"),
        (b"\x80\x02ctorch\nSize\nNb.", "it sets the attributes of what is no new object"),
        (b"\x80\x02ctorch\nSize\n)\x81}b}b.", "it sets the attributes of what is no new object"),
        (b"\x80\x02ctorch\nSize\n]R.", "it calls what is no class or function"),
        (b"\x80\x02ctorch\nSize\n)R)R.", "it calls what is no class or function"),
        (b"\x80\x02K\x01)R.", "no pickle of simple data"),
        (b"\x80\x04))\x93.", "no pickle of simple data"),
        (b"\x80\x02cos\nsystem\n.", "it names 'os.system', which is not allowed"),
        (b"\x80\x02X\xff\xff\xff\xffa.", "expected 4294967295 bytes"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fa.", "expected 9223372036854775807 bytes"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7fa.", "expected 9223372036854775807 bytes"),
        (b"\x80\x02G\x00\x00\x00\x00\x00\x00\x00\x00.", "it uses BINFLOAT"),
        (b"\x80\x02(itorch\nSize\n.", "it uses INST"),
        (b"\x80\x02\x82\x01.", "it uses EXT1"),
        (b"\x80\x02Pid\n.", "it uses PERSID"),
        (b"\x80\x02c\xff\nx\n.", "it is no pickle"),
    ],
)
def test_what_is_no_simple_data_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(data, {"torch.Size"})


def test_a_place_in_the_memo_costs_no_more_than_its_bytes() -> None:
    assert parse(b"\x80\x02K\x01r\xff\xff\xff\xff.", ()) == 1


def test_a_million_nested_tuples_are_never_hashed() -> None:
    nested = b"\x80\x02)" + b"\x85" * 10**6
    with pytest.raises(ValueError, match="no pickle of simple data"):
        parse(nested + nested[2:] + b"\x93.", ())  # as module and name
    found = parse(b"\x80\x02}" + nested[2:] + b"K\x01s.", ())  # as key
    assert len(found.items) == 1


@example(b"i\\\x00\n")
@given(st.binary(max_size=200))
def test_bytes_at_random(data: bytes) -> None:
    for start in (b"", b"\x80\x02", b"\x80\x02ctorch\nSize\n"):
        try:
            parse(start + data, {"torch.Size"})
        except ValueError:
            continue
