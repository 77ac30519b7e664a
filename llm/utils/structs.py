"""msgspec's types, made safe for threads."""

from __future__ import annotations

from typing import Any

import msgspec


def ready(*types: Any) -> None:
    """Build what msgspec needs to decode these types. Call it where they are defined.

    msgspec builds it when a type is first decoded, and a second thread that decodes the same type meanwhile reads what
    is not there yet: the process dies of SIGSEGV (seen with 0.22.0). Modules are imported by one thread alone.
    """
    for each in types:
        msgspec.json.Decoder(each)
