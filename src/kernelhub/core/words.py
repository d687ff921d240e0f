"""Counted things, as messages have them."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """A number and what it counts.

    >>> counted(1, "key"), counted(2, "key"), counted(1024, "value")
    ('1 key', '2 keys', '1,024 values')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
