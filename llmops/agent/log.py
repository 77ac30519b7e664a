"""The job's own log."""

from __future__ import annotations

import time


def log(text: str) -> None:
    """One line in the job's own log."""
    print(f"llmops {time.strftime('%Y-%m-%dT%H:%M:%S')} {text}", flush=True)
