"""What ids look like. Free of imports, for the completion in shells."""

from __future__ import annotations

import re

RUN = re.compile(r"\d{8}-\d{6}-.+-[a-z2-7]{4}")
STUDY = re.compile(r"\d{8}-\d{6}-.+-[a-z2-7]{4}-sweep")
TRIAL = re.compile(rf"({STUDY.pattern})\.(\d{{4,}})")
