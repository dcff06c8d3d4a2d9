"""Errors whose one-line message tells the user what to do."""

from __future__ import annotations


class UserError(Exception):
    """Invalid user input; the message says how to fix it."""


class FileError(UserError, ValueError):
    """A file cannot be read, used or written; the message says how to fix it."""
