"""Errors that users see.

A command prints the message of a `RegistrationError` as one sentence and ends with exit code 1; a library caller
catches the type. Anything else that escapes is a defect of this project.
"""

from __future__ import annotations

__all__ = ["InputError", "OutputError", "RegistrationError"]


class RegistrationError(ValueError):
    """A registration cannot be done; the message is one clear sentence."""


class InputError(RegistrationError):
    """A file or value that the user gave is unusable; the message names it and the problem."""


class OutputError(RegistrationError):
    """Results cannot be written; the message names the path and the problem."""
