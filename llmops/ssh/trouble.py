"""What ssh says when it fails, in one line that says what to do."""

from __future__ import annotations

import re

from llmops.errors import ClusterError, UserError
from llmops.ssh.address import Address
from llmops.ssh.command import NO_PYTHON, PYTHONS, TOO_OLD

# In this order: what is said first is the cause of what is said after it.
_KNOWN: tuple[tuple[str, type[UserError] | type[ClusterError], str], ...] = (
    ("Could not resolve hostname", UserError, "there is no host of that name; correct it, here or in your ssh config"),
    (
        "HOST IDENTIFICATION HAS CHANGED",
        UserError,
        "its host key is not the one that you know; ask its owners, and if they changed it, remove it: ssh-keygen -R",
    ),
    (
        "host key is known for|Host key verification failed",
        UserError,
        "its host key is not known here: `ssh` to it once by hand and compare the fingerprint",
    ),
    (
        "Permission denied|Too many authentication failures|No more authentication methods",
        UserError,
        "it refused your login; add your key to its authorized_keys, and to your agent with ssh-add",
    ),
    (
        "Bad owner or permissions|bad permissions|Bad configuration option|terminating, .* bad configuration",
        UserError,
        "correct your ssh configuration",
    ),
    ("timed out|No route to host|Network is unreachable", ClusterError, "it does not answer; try again later"),
    ("Connection refused", ClusterError, "nothing answers at its port; is the port right, and the host up?"),
)
NOISE = re.compile(r"^(@+|\s*|Warning: Permanently added .*)$")


def explain(address: Address, code: int | None, said: str) -> UserError | ClusterError:
    """The error for an ssh that ended with ``code`` before the other end was ready. ``said``: on its stderr."""
    lines = [line.strip() for line in said.replace("\r", "").splitlines() if not NOISE.match(line)]
    if code == TOO_OLD:
        return UserError(
            f"{address}: its Python is older than 3.9; set LLMOPS_SSH_PYTHON to a newer one there, such as that of the "
            "environment that your jobs run in"
        )
    if code == NO_PYTHON:
        return UserError(
            f"{address}: there is no Python on it ({PYTHONS[0]} … {PYTHONS[-1]}); set LLMOPS_SSH_PYTHON to the path "
            "of one"
        )
    for pattern, kind, remedy in _KNOWN:
        if any(re.search(pattern, line) for line in lines):
            shown = next(line for line in lines if re.search(pattern, line))
            return kind(f"{address}: {remedy} ({shown.strip('@ ').rstrip('.')})")
    last = f" ({lines[-1]})" if lines else ""
    return ClusterError(f"{address}: ssh ended with {code} before the host was ready{last}")
