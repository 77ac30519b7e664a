"""What was probably meant: the one place that guesses at misspelt verbs, options, keys, values and names."""

from __future__ import annotations

import re
from collections.abc import Iterable


def close(word: str, known: Iterable[object], n: int = 1, cutoff: float = 0.6) -> list[str]:
    """Up to ``n`` of ``known`` that look like ``word``, the likeliest first.

    Case and punctuation count for nothing: ``7B`` is near ``7b``, and ``Llama-3.2-1B`` near ``llama3_2_1b``.
    """
    from difflib import get_close_matches  # a few milliseconds that only a mistake costs

    names: dict[str, list[str]] = {}
    for each in known:
        names.setdefault(_plain(str(each)), []).append(str(each))
    found = get_close_matches(_plain(word), names, n, cutoff)
    return [name for plain in found for name in names[plain]][:n]


def hint(word: str, known: Iterable[object], n: int = 1, cutoff: float = 0.6) -> str:
    """``; did you mean X?``, to end a message with; empty when nothing looks like ``word``."""
    found = close(word, known, n, cutoff)
    return f"; did you mean {' or '.join(found)}?" if found else ""


def _plain(word: str) -> str:
    return re.sub(r"[\W_]+", "", word).lower() or word
