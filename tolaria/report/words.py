"""Numbers and names as the page shows them."""

from __future__ import annotations

import math
import re
import unicodedata

LONGEST = 20_000
"""Characters of a text that reach the page; the page cuts further and keeps the whole in a title."""
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


def plain(value: object) -> str:
    """A text from a file: controls, marks of direction and halves of surrogates stand as their names."""
    text = str(value)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} (cut, {len(text)} characters)"
    return _UNSEEN.sub(lambda found: _name(found[0]), text)


def _name(sign: str) -> str:
    short = unicodedata.name(sign, "").title().replace(" ", "")
    return f"[U+{ord(sign):04X}{' ' + short if short else ''}]"


def figure(value: float | None, digits: int = 3) -> str:
    """A number for a sentence: three digits that count, large whole ones with commas."""
    if value is None:
        return "unknown"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinity" if value > 0 else "minus infinity"
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        size = 0 if value == 0 else math.floor(math.log10(abs(value)))
        return f"{value:,.{max(0, digits - 1 - size)}f}"
    return f"{value:.{digits - 1}e}"


def count(number: int, one: str, many: str | None = None) -> str:
    """``1 step``, ``2,000 steps``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def percent(value: float) -> str:
    """A share: ``2.0%``."""
    return f"{100 * value:.{2 if 0 < value < 0.01 else 1}f}%"


def duration(seconds: float) -> str:
    """``42 s``, ``3 min``, ``1.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(number: float) -> str:
    """``17.2 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
