"""Where the user's caches are. Free of imports that take longer than reading an entry does."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path | None:
    """``$LLMOPS_CACHE_DIR``, else ``llmops`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; ``None`` without a home."""
    chosen = os.environ.get("LLMOPS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    # Not through platformdirs: importing it costs more than reading an entry does.
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not shared.is_absolute():
        shared = Path(os.path.expanduser("~/.cache"))  # noqa: PTH111 - Path.expanduser fails where there is no home
    return shared / "llmops" if shared.is_absolute() else None
