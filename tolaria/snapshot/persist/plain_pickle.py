"""Pickles as the data that they are: no import, no call, no hash, no memory that one merely claims.

``pickle.Unpickler`` with an allow-list would still let a crafted file set attributes of the allowed classes,
ask for a memo of 2**32 places, or overflow the stack by hashing nested tuples. And ``pickle.dumps`` holds the
interpreter's lock until it is done.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Called:
    """A class or function that the pickle names, and what it would be called with.

    Attributes:
        name: with its module, ``torch.Size``.
        arguments: None if it is only named; an empty tuple makes an object without its ``__init__``.
        state: what the object's attributes would be set from, if they are.
    """

    name: str
    arguments: tuple[Any, ...] | None = None
    state: Any = None


@dataclass(eq=False)
class Pairs:
    """A dictionary, its keys not hashed."""

    items: list[tuple[Any, Any]] = field(default_factory=list)


def parse(data: bytes, allowed: Collection[str]) -> Any:  # noqa: ANN401  (whatever it holds)
    """What the pickle holds, of None, bools, ints, strings, tuples, lists, :class:`Pairs`, :class:`Called`.

    Args:
        data: protocols 2 to 5.
        allowed: the names that may occur, with their modules.

    Raises:
        ValueError: it is damaged, names anything else, or uses what simple data does not need.
    """
    machine = _Machine(allowed)
    stream = io.BytesIO(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in text opcodes, which are refused anyway
            for opcode, argument, _ in pickletools.genops(stream):
                machine.run(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError):
        raise ValueError("it is no pickle of simple data") from None
    except (RecursionError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"it is no pickle: {type(error).__name__}") from None
    if stream.read(1) or len(machine.stack) != 1 or machine.marks:
        raise ValueError("it does not end where its pickle ends")
    return machine.stack[0]


def number(value: int) -> bytes:
    """The opcode that pushes an integer or a bool."""
    if 0 <= value < 256 and not isinstance(value, bool):
        return b"K" + value.to_bytes(1, "little")
    return pickle.dumps(value, protocol=2)[2:-1]


def dump(value: object) -> bytes:
    """The pickle (protocol 2) of what :func:`parse` returns; one :class:`Called` may stand in many places.

    Raises:
        TypeError: it holds anything else.
    """
    out = bytearray(b"\x80\x02")
    _append(value, out, {})
    return bytes(out + b".")


def _append(value: object, out: bytearray, memo: dict[str | int, bytes]) -> None:
    if isinstance(value, str):
        encoded = value.encode("utf-8", "surrogatepass")
        out += b"X" + len(encoded).to_bytes(4, "little") + encoded
    elif isinstance(value, int):
        out += number(value)
    elif isinstance(value, tuple):
        out += b"("
        for each in value:
            _append(each, out, memo)
        out += b"t"
    elif isinstance(value, Called):
        _append_call(value, out, memo)
    elif isinstance(value, Pairs):
        out += b"}("
        for key, each in value.items:
            _append(key, out, memo)
            _append(each, out, memo)
        out += b"u"
    elif isinstance(value, list):
        out += b"]("
        for each in value:
            _append(each, out, memo)
        out += b"e"
    elif value is None:
        out += b"N"
    else:
        raise TypeError(f"value: expected simple data, got {type(value).__name__}")


def _append_call(value: Called, out: bytearray, memo: dict[str | int, bytes]) -> None:
    known = value.name if value.arguments is None else id(value)
    if known in memo:
        out += b"j" + memo[known]
        return
    if value.arguments is None:
        module, _, name = value.name.rpartition(".")
        out += f"c{module}\n{name}\n".encode()
    else:
        _append_call(Called(value.name), out, memo)
        _append(value.arguments, out, memo)
        out += b"R" if value.arguments else b"\x81"
        if value.state is not None:
            _append(value.state, out, memo)
            out += b"b"
    memo[known] = len(memo).to_bytes(4, "little")
    out += b"r" + memo[known]


class _Machine:
    """The stack, its marks and the memo of a pickle."""

    def __init__(self, allowed: Collection[str]) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._allowed = allowed

    def run(self, opcode: str, argument: Any) -> None:  # noqa: ANN401
        """Do what one opcode says.

        Raises:
            ValueError: it is none of those that are needed, or used wrongly.
            IndexError, KeyError, TypeError, AttributeError: used wrongly, too.
        """
        if opcode in _LITERALS:
            self.stack.append(_LITERALS[opcode]())
        elif opcode in _ARGUMENTS:
            self.stack.append(argument)
        elif opcode in ("BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[argument])
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self.stack[-1]
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self)
        elif opcode == "GLOBAL":
            self._name(*argument.split(" ", 1))
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"it uses {opcode}, which simple data does not need")

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self.stack[-1]

    def named(self) -> None:
        self._name(*self.top(2))

    def call(self) -> None:
        called, arguments = self.top(2)
        if called.arguments is not None or not isinstance(arguments, tuple):
            raise ValueError("it calls what is no class or function")
        self.stack.append(Called(called.name, arguments))

    def build(self) -> None:
        (state,) = self.top(1)
        called = self.stack[-1]
        if called.arguments is None or called.state is not None:
            raise ValueError("it sets the attributes of what is no new object")
        called.state = state

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError
        self.stack[-1].extend(values)

    def update(self, values: list[Any]) -> None:
        self.stack[-1].items.extend(zip(values[::2], values[1::2], strict=True))

    def tuple_of(self, count: int) -> None:
        self.stack.append(tuple(self.top(count)))

    def marked(self) -> list[Any]:
        """Take what was pushed since the last mark."""
        return self.top(len(self.stack) - self.marks.pop())

    def top(self, count: int) -> list[Any]:
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0) or count < 0:
            raise IndexError
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def _name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):  # before anything hashes them
            raise TypeError
        if (full := f"{module}.{name}") not in self._allowed:
            raise ValueError(f"it names {full[:200]!r}, which is not allowed")
        self.stack.append(Called(full))


_LITERALS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": Pairs,
}
_ARGUMENTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"}
_ACTIONS: dict[str, Callable[[_Machine], None]] = {
    "MARK": _Machine.mark,
    "MEMOIZE": _Machine.memoize,
    "STACK_GLOBAL": _Machine.named,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "APPEND": lambda machine: machine.extend(machine.top(1)),
    "APPENDS": lambda machine: machine.extend(machine.marked()),
    "SETITEM": lambda machine: machine.update(machine.top(2)),
    "SETITEMS": lambda machine: machine.update(machine.marked()),
    "TUPLE": lambda machine: machine.stack.append(tuple(machine.marked())),
    "TUPLE1": lambda machine: machine.tuple_of(1),
    "TUPLE2": lambda machine: machine.tuple_of(2),
    "TUPLE3": lambda machine: machine.tuple_of(3),
}
