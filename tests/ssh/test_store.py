"""The run store on another host: a real sshd, and the commands of a launcher that was never there."""

from __future__ import annotations
