"""The supervisor as one file: a zipapp that any Python 3.9 or later starts, named by its content."""

from __future__ import annotations

import functools
import hashlib
import io
import zipfile
from pathlib import Path

_MAIN = "import sys\nfrom llmops.agent.__main__ import main\nsys.exit(main(sys.argv[1:]))\n"
_EPOCH = (1980, 1, 1, 0, 0, 0)


@functools.cache
def build() -> tuple[str, bytes]:
    """Return ``(<digest>.pyz, content)``. The same sources always give the same bytes."""
    package = Path(__file__).parent / "agent"
    files = {"__main__.py": _MAIN.encode(), "llmops/__init__.py": b""}
    files["llmops/preempt.py"] = (package.parent / "preempt.py").read_bytes()  # for the jobs' own programs
    for path in sorted(package.rglob("*.py")):
        files[f"llmops/agent/{path.relative_to(package).as_posix()}"] = path.read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), content, zipfile.ZIP_DEFLATED)
    data = buffer.getvalue()
    return f"{hashlib.sha256(data).hexdigest()[:20]}.pyz", data
