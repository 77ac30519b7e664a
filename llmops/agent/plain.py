"""Text that others wrote, as one line for logs, mails and chats."""

from __future__ import annotations

import re
import unicodedata

_ESCAPE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c\n]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]?"
)
_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")


def plain(text: str, most: int = 500) -> str:
    """One line without control, escape, bidirectional or invisible characters, of at most ``most``."""
    text = _ESCAPE.sub("", text)
    shown = "".join(" " if unicodedata.category(each) in _INVISIBLE else each for each in text)
    words = " ".join(shown.split())
    return words if len(words) <= most else words[: most - 3] + "..."
