"""Errors that are meant for people: what was wrong, where, and what to write instead."""

from __future__ import annotations


class FedrecError(Exception):
    """A user's mistake or an unusable input. The command line prints it in one line and exits with 2."""

    exit_code = 2


class ConfigError(FedrecError):
    """A configuration key or value that cannot be run; the message names the key and the remedy."""


class DataError(FedrecError):
    """A data source that cannot be read as interactions; the message names file, row and remedy."""


class RunFailed(FedrecError):
    """A run that had to stop (too few devices answered, training diverged); the reason is the message."""

    exit_code = 1
