"""Errors whose message tells a user what to do. Both are one line."""

from __future__ import annotations


class UserError(Exception):
    """Invalid user input; the message says how to fix it."""


class FileError(UserError, ValueError):
    """A file that cannot be read, used or written; the message says what to do."""
