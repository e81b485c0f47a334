"""How many at the least and at the most, in a word."""

from __future__ import annotations

import re

from hart_runtime.common.errors import InputError, shown


def bounds(text: str, most: int) -> tuple[int, int]:
    """Of ``"4"`` and ``"1..8"``: the least number, and the largest.

    Args:
        most: that there may be.

    Raises:
        InputError: neither; the message does not say what of.
    """
    found = re.fullmatch(r"(\d{1,6})(?:\.\.(\d{1,6}))?", text, re.ASCII)
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= low <= high <= most:
        raise InputError(f"expected a number such as 4, or two such as 1..8, found {shown(text)}")
    return low, high
