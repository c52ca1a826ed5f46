"""Errors that are the user's to mend: the command line prints their one line and exits with their
code."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: the message is one line that names the thing and says what works."""

    exit_code = 2


class NonFiniteError(UserError):
    """A loss, gradient, log-prob or weight is no finite number: the policy has diverged, or its
    weights are damaged. Nothing may be learned from it or saved after it."""

    exit_code = 76
