"""Errors that users see.

A command prints the message of a `RegistrationError` as one sentence and ends with exit code 1; a library caller
catches the type. Anything else that escapes is a defect of this project.
"""

from __future__ import annotations

import sys
from types import TracebackType

__all__ = ["InputError", "OutputError", "RegistrationError", "find_registration_error", "report_plainly"]


class RegistrationError(ValueError):
    """A registration cannot be done; the message is one clear sentence."""


class InputError(RegistrationError):
    """A file or value that the user gave is unusable; the message names it and the problem."""


class OutputError(RegistrationError):
    """Results cannot be written; the message names the path and the problem."""


def find_registration_error(error: BaseException | None) -> RegistrationError | None:
    """The typed error below the RuntimeErrors that MONAI's transforms and configs wrap around it."""
    while error is not None:
        if isinstance(error, RegistrationError):
            return error
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return InputError("the memory does not suffice; choose a larger spacing or a smaller size")
        error = error.__cause__
    return None


def report_plainly() -> None:
    """From now on a `RegistrationError` that ends the program is printed as one sentence, without a traceback.

    For errors that arise while MONAI builds the objects of a config, before anything of ours runs.
    """
    sys.excepthook = _print_sentence


def _print_sentence(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    cause = find_registration_error(error)
    if cause is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"error: {cause}", file=sys.stderr)
