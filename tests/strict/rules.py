"""What a strict stand-in raises."""

from __future__ import annotations


class BrokenRule(AssertionError):  # noqa: N818  (what it is)
    """A careless use of a device, with the number of the rule that forbids it and the call that broke it."""

    def __init__(self, number: int, call: str, why: str) -> None:
        super().__init__(f"rule {number}: {call}: {why}")
        self.number, self.call = number, call
