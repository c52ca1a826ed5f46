"""Errors that are the user's to mend: the command line prints their one line and exits with 2."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: the message is one line that names the thing and says what works."""
