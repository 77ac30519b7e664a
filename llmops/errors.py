"""The kinds of failure that a user sees as one line instead of a traceback, and what a run without a result raises."""

from __future__ import annotations


class OneLine(Exception):
    """What is told without a traceback."""

    def _render_traceback_(self) -> list[str]:
        """What notebooks show: the one line."""
        return [f"llmops: {self}"]


class UserError(OneLine):
    """What the user gave cannot work. The message says what, where (file, key, value) and what to do. Exit code 2."""

    exit_code = 2


class ClusterError(OneLine):
    """A scheduler or a store did not answer, or refused for a reason that is not the user's. Exit code 1."""

    exit_code = 1


class RunFailed(Exception):
    """A run whose result was asked for has none: it failed, or was cancelled. The message says why."""

    exit_code = 1
