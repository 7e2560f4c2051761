"""C++ and CUDA as tokens, with no more grammar than it takes to find an operator's operands.

clang-format's spacing decides: a binary operator, ``<`` and ``*`` too, stands between spaces, a template's
brackets and a pointer's star do not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<comment>//[^\n]*|/\*.*?\*/)
    |(?P<directive>^[ \t]*\#(?:\\\n|[^\n])*)
    |(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])+')
    |(?P<number>(?:0x[0-9a-fA-F']+|\d[\d']*\.?\d*(?:e[-+]?\d+)?)[uUlLfF]*)
    |(?P<name>[A-Za-z_]\w*)
    |(?P<operator><<=|>>=|\.\.\.|->|::|\+\+|--|<<|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|.)""",
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
ASSIGNMENTS = "= += -= *= /= |= &= <<= >>= ^="
LEVELS = ("* / %", "+ -", "<< >>", "< <= > >=", "== !=", "&", "^", "|", "&&", "||", f"? : {ASSIGNMENTS}")
PRECEDENCE = {operator: level for level, operators in enumerate(LEVELS) for operator in operators.split()}
LOOSEST = PRECEDENCE["="]
TYPE_WORDS = (
    "auto const constexpr enum inline mutable static struct template typename union class virtual void"
)
JUMPS = "break case continue default do else for goto if return switch throw while"
OTHERS = "delete explicit friend namespace new operator private public sizeof static_assert typedef using"
CUDA_WORDS = "__shared__ __device__ __global__ extern alignas"
KEYWORDS = frozenset(f"{TYPE_WORDS} {JUMPS} {OTHERS} {CUDA_WORDS}".split())
NO_CODE = frozenset(("static_assert", "using", "typedef", "case", "enum", "friend", "constexpr"))
CONSTANT_CALLS = frozenset(("__launch_bounds__", "alignas", "__attribute__", "decltype", "sizeof", "aligned"))


@dataclass
class Token:
    """A piece of source that is not white space; ``kind`` is the name of its group in TOKEN."""

    kind: str
    text: str
    start: int
    spaced: bool  # white space before it
    role: str = ""  # "binary", "open", "close" or nothing
    match: int = -1  # the bracket that belongs to a bracket
    outer: int = -1  # the innermost open bracket around it

    @property
    def end(self) -> int:
        """Where it ends in the source."""
        return self.start + len(self.text)


@dataclass
class Source:
    """A file as tokens, brackets matched."""

    text: str
    tokens: list[Token] = field(default_factory=list)

    def __post_init__(self) -> None:
        spaced = True
        for found in TOKEN.finditer(self.text):
            kind = str(found.lastgroup)
            if kind in {"space", "comment"}:
                spaced = True
                continue
            self.tokens.append(Token(kind, found.group(), found.start(), spaced))
            spaced = False
        self._match_brackets()

    def _match_brackets(self) -> None:
        stack: list[int] = []
        for i, token in enumerate(self.tokens):
            token.outer = stack[-1] if stack else -1
            if token.kind != "operator":
                continue
            after = self.tokens[i + 1].spaced if i + 1 < len(self.tokens) else True
            text = token.text
            if text in "([{" or (text == "<" and not (token.spaced and after)):
                token.role = "open"
                stack.append(i)
            elif text in ")]}" or (text == ">" and stack and self.tokens[stack[-1]].text == "<"):
                while stack and text in ")]}" and self.tokens[stack[-1]].text == "<":
                    stack.pop()  # was no template
                token.role = "close"
                if stack:
                    token.match = stack.pop()
                    self.tokens[token.match].match = i
                    token.outer = stack[-1] if stack else -1
            elif text in PRECEDENCE and token.spaced and (text == ":" or (after and self._is_operand(i - 1))):
                token.role = "binary"

    def _is_operand(self, i: int) -> bool:
        token = self.tokens[i]
        if token.kind == "name":
            return token.text not in KEYWORDS or token.text == "sizeof"
        return token.kind in {"number", "string"} or token.role == "close"

    def left(self, i: int, level: int) -> int:
        """The first token of the operand that ends before token i, of an operator of this precedence."""
        while i > 0:
            token = self.tokens[i - 1]
            if token.role == "close" and token.match >= 0:
                before = self.tokens[token.match - 1]
                is_value = (before.kind == "name" and before.text not in KEYWORDS) or before.role == "close"
                if token.text == "}" and not is_value:
                    return i
                i = token.match
                continue
            if token.role == "open" or token.text in {",", ";", "{", "}", "return", "case", "else", ":"}:
                return i
            if token.kind == "directive" or (token.role == "binary" and PRECEDENCE[token.text] > level):
                return i
            i -= 1
        return i

    def right(self, i: int, level: int) -> int:
        """The last token of the operand that begins after token i."""
        while i + 1 < len(self.tokens):
            token = self.tokens[i + 1]
            if token.role == "open" and token.match > 0:
                i = token.match
                continue
            if token.role == "close" or token.text in {",", ";", "?", ":"}:
                return i
            if token.role == "binary" and PRECEDENCE[token.text] >= level:
                return i
            i += 1
        return i

    def plain(self, first: int, last: int, change: dict[int, str] | None = None) -> str:
        """The tokens from first to last in one line, some of them changed."""
        changed = change or {}
        pieces = []
        for i in range(first, last + 1):
            token = self.tokens[i]
            pieces.append((" " if token.spaced and i > first else "") + changed.get(i, token.text))
        return "".join(pieces)

    def has_directive(self, first: int, last: int) -> bool:
        """Whether a preprocessor line lies inside, which cannot be copied into one line."""
        return any(token.kind == "directive" for token in self.tokens[first : last + 1])

    def frozen(self) -> list[bool]:
        """Which tokens must stay: they are part of a type, a constant expression or an error message."""
        frozen = [token.kind == "directive" for token in self.tokens]
        for i, token in enumerate(self.tokens[:-1]):
            after = self.tokens[i + 1]
            first, last = i, i - 1
            if token.text == "<" and token.role == "open" and token.match > 0:
                last = token.match
            elif token.text == "constexpr" and after.text == "(":
                last = after.match
            elif token.text in NO_CODE:
                last = self._declaration_end(i)
            elif token.text in CONSTANT_CALLS and after.text == "(":
                last = after.match
            elif re.match(r"TORCH_(CHECK|INTERNAL_ASSERT)", token.text) and after.text == "(":
                commas = (j for j in range(i + 2, after.match) if self._is_comma_of(j, i + 1))
                first, last = next(commas, after.match), after.match
            frozen[first : last + 1] = [True] * (last + 1 - first)
        return frozen

    def _is_comma_of(self, i: int, bracket: int) -> bool:
        return self.tokens[i].text == "," and self.tokens[i].outer == bracket

    def _declaration_end(self, i: int) -> int:
        """The `;`, `:` or, of a constexpr function, `{` that ends what begins at token i."""
        begin = self.tokens[i].text
        while i + 1 < len(self.tokens):
            token, before = self.tokens[i], self.tokens[i - 1]
            if token.text == ";" or (token.text == ":" and begin == "case"):
                return i
            if token.role == "open" and token.match > 0:
                if token.text == "{" and begin != "enum" and before.text in {")", "const"}:
                    return i
                i = token.match
            i += 1
        return i
