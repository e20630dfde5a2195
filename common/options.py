"""Values of options as the command line hands them on."""

from __future__ import annotations

from typing import Any

from common.errors import InputError

__all__ = ["as_flag"]

_WORDS = {"true": True, "false": False}


def as_flag(value: Any, option: str) -> bool:
    """True or False, also from the words: Fire leaves `false` a text, and a text that is not empty counts as true.

    Raises:
        InputError: for anything else, naming the option.
    """
    found = _WORDS.get(value.lower(), value) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise InputError(f"--{option} is either True or False, got {value!r}")
    return found
