"""The kinds of failure that a user sees as one line instead of a traceback, and what a run without a result raises."""

from __future__ import annotations


class UserError(Exception):
    """What the user gave cannot work. The message says what, where (file, key, value) and what to do. Exit code 2."""

    exit_code = 2


class ClusterError(Exception):
    """A scheduler or a store did not answer, or refused for a reason that is not the user's. Exit code 1."""

    exit_code = 1


class RunFailed(Exception):
    """A run whose result was asked for has none: it failed, or was cancelled. The message says why."""

    exit_code = 1
