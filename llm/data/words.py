"""Encoding word by word, each distinct word once: the fast way through a byte-level BPE.

Such a tokenizer splits a text by a regular expression and encodes every piece ("word") on its own, so that the ids of a
word can be kept. What the libraries do per word is replaced by a look-up; the splitting is done by Python's ``re``,
which knows no ``\\p{L}``: classes of characters are written out. They are written out for characters on whose class
all versions of Unicode agree, and a text with any other is not for this module (``split`` says so).
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Patterns as the libraries have them, whose translation is tested for every character that is safe.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + _LETTERS + r"\p{N}{1,3}" + _REST  # also GPT-4's (cl100k_base)
QWEN2 = CONTRACTIONS + _LETTERS + r"\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K_WORD = r"[^\r\n\p{L}\p{N}]?" + _UPPER + "%s" + _LOWER + "%s" + CONTRACTIONS + "?|"
O200K = (
    _O200K_WORD % ("*", "+")
    + _O200K_WORD % ("+", "*")
    + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KNOWN = frozenset((GPT2, LLAMA3, QWEN2, O200K))

LONGEST = 64  # characters of a word that is kept
MOST = 1 << 18  # words that are kept, some 50 MB; then all are forgotten
CHUNK = 1 << 20  # characters that are split at a time: the words of a text take twenty times its memory

# White_Space of Unicode, of which Python's own \s differs.
SPACES = "\t\n\x0b\x0c\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
PICTURES = range(0x1F300, 0x1FB00)  # symbols, or not assigned yet: no letters, digits or spaces in any version
UNSAFE_LETTERS = "\u017f\u212a"  # long s and the Kelvin sign: equal to s and k where case is ignored
# After a letter and before a space that a letter follows, all patterns end a word, whatever else there is.
_CUT = re.compile(r"[A-Za-z](?= [A-Za-z])")


@lru_cache
def safe_characters() -> str:
    """Characters whose class is the same in Unicode 3.2 and in this Python's: it is in every version."""
    old = unicodedata.ucd_3_2_0.category
    plane = (chr(code) for code in range(0x10000))
    found = [
        char
        for char in plane
        if unicodedata.category(char) == old(char) not in ("Cn", "Cs", "Co") and char not in UNSAFE_LETTERS
    ]
    return "".join(found) + "".join(map(chr, PICTURES))


@lru_cache
def _class(name: str) -> str:
    """What ``\\p{name}`` means among the safe characters, for use within brackets."""
    return _ranges(char for char in safe_characters() if unicodedata.category(char).startswith(name))


def _ranges(characters: Iterator[str]) -> str:
    text, first, last = "", -1, -2
    for code in [*map(ord, characters), -1]:
        if code != last + 1:
            if first >= 0:
                text += re.escape(chr(first)) + ("-" + re.escape(chr(last)) if last > first else "")
            first = code
        last = code
    return text


@lru_cache
def _unsafe() -> re.Pattern[str]:
    return re.compile(f"[^{_ranges(iter(safe_characters()))}]")


@lru_cache
def translated(pattern: str) -> re.Pattern[str]:
    """One of the ``KNOWN`` patterns for Python's ``re``; right for safe characters alone."""
    text, within = "", False
    for part in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL):
        if part in ("[", "]"):
            within = part == "["
        if part.startswith("\\p"):
            part = _class(part[3:-1]) if within else f"[{_class(part[3:-1])}]"
        elif part == "\\s":
            part = SPACES if within else f"[{SPACES}]"
        elif part == "\\S":  # never within brackets
            part = f"[^{SPACES}]"
        text += part
    return re.compile(text)


class Words(dict[str, bytes]):
    """Word -> its ids, as bytes of uint32. ``encode`` gives the ids of a word that was not seen yet."""

    def __init__(self, pattern: str, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._find = translated(pattern).findall
        self._encode = encode

    def __missing__(self, word: str) -> bytes:
        ids = array("I", self._encode(word)).tobytes()
        if len(word) <= LONGEST:
            if len(self) >= MOST:
                self.clear()
            self[word] = ids
        return ids

    def ids(self, text: str) -> NDArray[np.uint32] | None:
        """The ids of ``text`` (uint32, read-only), or None if it has characters that are not safe."""
        if not text.isascii() and _unsafe().search(text):
            return None
        if len(text) <= CHUNK:
            return np.frombuffer(b"".join(map(self.__getitem__, self._find(text))), np.uint32)
        parts = [b"".join(map(self.__getitem__, self._find(text, start, end))) for start, end in _chunks(text)]
        return np.frombuffer(b"".join(parts), np.uint32)


def _chunks(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + CHUNK)
        end = cut.end() if cut else len(text)
        yield start, end
        start = end
