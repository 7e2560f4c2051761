"""Mutants of C++ and CUDA sources, all in one build: each mutated place asks at run time which mutant is on.

``a + b`` becomes ``(::mutant::on(7) ? (a - b) : (a + b))``, a store ``{ if (!::mutant::on(8)) { x = y; } }``.
What is misunderstood (mutant_source.py) does not compile and is dropped by the caller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mutant_source import ASSIGNMENTS, KEYWORDS, LOOSEST, PRECEDENCE, Source

SWAPS = {
    **{"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="},
    **{"+": "-", "-": "+", "*": "+", "/": "*", "%": "/", "<<": ">>", ">>": "<<"},
    **{"&&": "||", "||": "&&", "&": "|", "|": "&"},
}
FENCES = re.compile(r"__syncthreads|__syncwarp|__threadfence|stream_fence|_mm_sfence|publish\(")
# What changes how fast, never what: nothing is to be found there.
ONLY_SPEED = re.compile(r"prefetch|madvise|ask_for_large_pages|reserve\(|__builtin_expect")
STORE = re.compile(r"(?<![=<>!])=(?!=)|\+\+|--")
EFFECTS = {*ASSIGNMENTS.split(), "++", "--"}


@dataclass
class Mutant:
    """One change: the source's characters from start to end become ``text``; a statement stays out."""

    kind: str
    start: int
    end: int
    what: str
    text: str = ""
    is_statement: bool = False
    file: str = ""
    line: int = 0
    number: int = 0


Found = Iterator[tuple[int, int, Mutant]]  # with its first and last token


def _change(
    source: Source, kind: str, first: int, last: int, text: str, what: str
) -> tuple[int, int, Mutant]:
    return first, last, Mutant(kind, source.tokens[first].start, source.tokens[last].end, what, text)


def _shortened(text: str) -> str:
    return text if len(text) < 90 else text[:87] + "..."


def _binaries(source: Source) -> Found:
    for i, token in enumerate(source.tokens):
        if token.role != "binary" or token.text not in SWAPS:
            continue
        level, swap = PRECEDENCE[token.text], SWAPS[token.text]
        first, last = source.left(i, level), source.right(i, level)
        kind = "comparison" if level in {3, 4} else "logic" if level >= 5 else "arithmetic"
        text, what = source.plain(first, last, {i: swap}), source.plain(first, last)
        yield _change(source, kind, first, last, text, f"`{token.text}` -> `{swap}` in `{_shortened(what)}`")


def _subscripts(source: Source) -> Found:
    tokens = source.tokens
    for i, token in enumerate(tokens):
        base, before = tokens[i - 1], tokens[i - 2]
        if token.text != "[" or token.match <= i + 1 or token.spaced or base.text in KEYWORDS:
            continue
        if base.role != "close" and base.kind != "name":
            continue
        if base.kind == "name" and base.spaced:  # `double sums[kLanes]` declares
            is_type = before.kind == "name" and before.text not in {"return", "else"}
            is_pointer = before.text in {"*", "&"} and not before.spaced
            is_more = before.text == "," and _is_declaration(source, i - 1)
            if is_type or is_pointer or is_more or (before.role == "close" and before.text == ">"):
                continue
        inner = source.plain(i + 1, token.match - 1)
        what = f"`{base.text}[{inner}]` -> `[{inner} + 1]`"
        yield _change(source, "index", i + 1, token.match - 1, f"({inner}) + 1", what)


def _is_declaration(source: Source, i: int) -> bool:
    """Whether the statement around token i begins with two names: `double a[n], b[n];`."""
    outer = source.tokens[i].outer
    while i > 0 and not (source.tokens[i].text in {";", "{", "}"} and source.tokens[i].outer == outer):
        i -= 1
    words = source.tokens[i + 1 : i + 3]
    return len(words) == 2 and all(word.kind == "name" for word in words)


def _constants(source: Source) -> Found:
    for i, token in enumerate(source.tokens):
        if token.kind != "number":
            continue
        text = f"{token.text} + 1"
        if not token.text.startswith("0x") and ("." in token.text or "e" in token.text):
            is_whole = float(token.text.rstrip("fF")) % 1 == 0
            one = "1.0f" if token.text.endswith("f") else "1.0"
            text = f"{token.text} + {one if is_whole else token.text + ' / 1024'}"
        what = f"`{token.text}` -> `{text}` after `{source.plain(max(i - 4, 0), i - 1)}`"
        yield _change(source, "constant", i, i, f"({text})", what)


def _extremes(source: Source) -> Found:
    tokens, swaps = source.tokens, {"min": "max", "max": "min"}
    for i, token in enumerate(tokens):
        if token.text not in swaps or tokens[i - 1].text in {".", "->"}:
            continue
        bracket = i + 1
        if tokens[bracket].text == "<" and tokens[bracket].match > 0:
            bracket = tokens[bracket].match + 1
        if tokens[bracket].text != "(" or tokens[bracket].match < 0:
            continue
        first, last = i - 2 if tokens[i - 1].text == "::" else i, tokens[bracket].match
        text, what = source.plain(first, last, {i: swaps[token.text]}), source.plain(first, last)
        yield _change(source, "min/max", first, last, text, f"`{_shortened(what)}` -> `{swaps[token.text]}`")


def _conditions(source: Source) -> Found:
    tokens = source.tokens
    for i, token in enumerate(tokens):
        if token.text == "if" and tokens[i + 1].text == "(":
            first, last = i + 2, tokens[i + 1].match - 1
            if any(t.text in {";", "="} and t.outer == i + 1 for t in tokens[first : last + 1]):
                continue
            condition = _shortened(source.plain(first, last))
            for forced in ("true", "false"):
                what = f"`if ({condition})` always {forced}"
                yield _change(source, "branch", first, last, f"static_cast<bool>({forced})", what)
        elif token.text == "?" and token.role == "binary":
            first, last = source.left(i, LOOSEST - 1), i - 1
            condition = source.plain(first, last)
            yield _change(
                source, "branch", first, last, f"!({condition})", f"`{_shortened(condition)} ?` negated"
            )
        elif token.text == "!" and token.kind == "operator":
            last = source.right(i, 0)
            inner = source.plain(i + 1, last)
            yield _change(source, "branch", i, last, f"!!({inner})", f"`!{inner}` -> `{inner}`")


def _returns(source: Source) -> Found:
    tokens = source.tokens
    for i, token in enumerate(tokens):
        if token.text != "return" or tokens[i + 1].text in {";", "{"}:
            continue
        last = i + 1
        while tokens[last + 1].text != ";" or tokens[last + 1].outer != token.outer:
            last += 1
        inner = source.plain(i + 1, last)
        what = f"`return {_shortened(inner)}` -> its type's zero"
        yield _change(source, "return", i + 1, last, f"::mutant::zero_of({inner})", what)


def _statements(source: Source) -> Found:
    tokens = source.tokens
    for i in range(1, len(tokens)):
        before, token = tokens[i - 1], tokens[i]
        if token.outer >= 0 and tokens[token.outer].text != "{":
            continue
        is_after = before.text in {";", "{", "}", "else", "do", ":"} or before.kind == "directive"
        if not (is_after or (before.text == ")" and _is_header(source, i - 1))):
            continue
        last = i
        while last + 1 < len(tokens) and not (tokens[last].text == ";" and tokens[last].outer == token.outer):
            if tokens[last].role == "close" and tokens[last].match < i:
                break
            last += 1
        if tokens[last].text != ";" or not _is_effect(source, i, last):
            continue
        text = source.plain(i, last)
        kind = "fence" if FENCES.match(text) else "store" if STORE.search(text) else "call"
        first, last, mutant = _change(source, kind, i, last, "", f"`{_shortened(text)}` left out")
        mutant.is_statement = True
        yield first, last, mutant


def _is_header(source: Source, i: int) -> bool:
    opening = source.tokens[i].match
    return opening > 0 and source.tokens[opening - 1].text in {"if", "for", "while", "constexpr"}


def _is_effect(source: Source, first: int, last: int) -> bool:
    """Whether the statement is an expression (a store, a call) or a jump, not a declaration."""
    tokens = source.tokens
    if tokens[first].text in {"break", "continue"} and last == first + 1:
        return True
    if tokens[first].text in KEYWORDS or tokens[first].text.startswith(("TORCH_", "C10_")):
        return False
    if tokens[first].kind != "name" and tokens[first].text not in {"*", "++", "--", "("}:
        return False
    has_effect, i = False, first
    while i < last:
        token = tokens[i]
        if token.role == "open" and token.match > 0:
            has_effect |= token.text == "("
            i = min(token.match, last - 1)
            token = tokens[i]
        after = tokens[i + 1]
        is_type = token.kind == "name" or (token.text in {"*", "&", ">"} and not token.spaced)
        if is_type and after.kind == "name" and after.spaced and not has_effect:
            return False
        has_effect |= token.text in EFFECTS
        i += 1
    return has_effect


OPERATORS: tuple[Callable[[Source], Found], ...] = (
    _statements,
    _conditions,
    _returns,
    _binaries,
    _extremes,
    _subscripts,
    _constants,
)


def mutants_of(text: str, file: str) -> list[Mutant]:
    """Every mutant of a source, in its order."""
    source = Source(text)
    frozen = source.frozen()
    found = []
    for operator in OPERATORS:
        for first, last, mutant in operator(source):
            if frozen[first] or (not mutant.is_statement and source.has_directive(first, last)):
                continue
            if mutant.kind in {"index", "constant"} and any(frozen[first : last + 1]):
                continue
            if ONLY_SPEED.search(text[mutant.start : mutant.end].split("{")[0]):
                continue
            mutant.file, mutant.line = file, text.count("\n", 0, mutant.start) + 1
            found.append(mutant)
    return sorted(found, key=lambda mutant: (mutant.start, -mutant.end))


def rewrite(text: str, mutants: list[Mutant]) -> str:
    """The source with its mutants built in; lines keep their numbers."""

    def build(start: int, end: int, inside: list[Mutant]) -> str:
        pieces, at, i = [], start, 0
        while i < len(inside):
            outer = inside[i]
            if outer.end > end or outer.start < at:  # neither apart nor nested: not understood
                i += 1
                continue
            j = i + 1
            while j < len(inside) and inside[j].start < outer.end:
                j += 1
            original = build(outer.start, outer.end, inside[i + 1 : j])
            pieces.append(text[at : outer.start])
            if outer.is_statement:
                pieces.append(f"{{ if (!::mutant::on({outer.number})) {{ {original} }} }}")
            else:
                pieces.append(f"(::mutant::on({outer.number}) ? ({outer.text}) : ({original}))")
            at, i = outer.end, j
        pieces.append(text[at:end])
        return "".join(pieces)

    ordered = sorted(mutants, key=lambda m: (m.start, -m.end, not m.is_statement, m.number))
    return build(0, len(text), ordered)
