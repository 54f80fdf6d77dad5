"""Failures that a person should hear of in one line, without a traceback."""

from __future__ import annotations


class CommandFailed(RuntimeError):
    """A command could not do its work, through no mistake in what was asked; exit code 1."""
