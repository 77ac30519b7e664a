"""Tokens that come one by one, as text that can be shown at once: no half characters, nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from llm.data.tokenizer import Tokenizer

UNKNOWN = "\ufffd"  # what decoders write for bytes that are no character, or not a whole one yet


class TextStream:
    """Text of one continuation. ``stopped`` is the stop text that was found, and nothing comes after it.

    Pieces that ``push`` and ``finish`` return, laid end to end, are the text; ``text`` is that so far.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.text = ""
        self.stopped: str | None = None
        self._tokenizer, self._stop = tokenizer, stop
        self._window: list[int] = []  # tokens that are decoded again with the next one: spaces depend on what is before
        self._known = 0  # how many of the window's characters were taken already
        self._clean = 0  # where in the window the last character began that may be continued
        self._held = ""  # decoded, but it may be how a stop text begins

    def push(self, token: int) -> str:
        """What can be shown after this token."""
        if self.stopped is not None:
            return ""
        self._window.append(token)
        decoded = self._tokenizer.decode(self._window)
        # The start of a character is written as one unknown, at the end. All before that is final.
        whole = not decoded.endswith(UNKNOWN)
        final = decoded if whole else decoded[:-1]
        fresh = final[self._known :]
        self._known = max(self._known, len(final))
        if whole:
            self._window = self._window[self._clean :]
            self._clean = len(self._window)
            self._known = len(self._tokenizer.decode(self._window))
        return self._show(fresh)

    def finish(self) -> str:
        """What is left, now that no token follows."""
        if self.stopped is not None:
            return ""
        shown = self._show(self._tokenizer.decode(self._window)[self._known :])
        held, self._held = self._held, ""
        self.text += held
        return shown + held

    def _show(self, fresh: str) -> str:
        text = self._held + fresh
        found = [(at, -len(stop), stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            at, _, self.stopped = min(found)
            shown, self._held = text[:at], ""
        else:
            keep = max((_overlap(text, stop) for stop in self._stop), default=0)
            shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` are how ``stop`` begins; not all of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
