"""Types that threads decode are ready before the first thread: msgspec dies of two that decode a new one at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Each round makes the module's types anew, and lets threads that switch all the time decode them for the first time.
RACE = """
import importlib.util, sys, threading
import msgspec
sys.setswitchinterval(1e-6)
spec = importlib.util.find_spec(sys.argv[1])
for _ in range(100):
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for name in sys.argv[2:]:
        kind, gate = getattr(module, name), threading.Barrier(6)
        last = msgspec.json.encode({kind.__struct_encode_fields__[-1]: [{}]})  # built last
        def decode():
            gate.wait()
            try:
                msgspec.json.decode(last, type=kind)
            except msgspec.ValidationError:
                pass
        threads = [threading.Thread(target=decode) for _ in range(6)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
"""


@pytest.mark.parametrize(
    ("module", "types"),
    [
        ("llm.checkpoint.format", ["PartManifest", "Manifest"]),
        ("llmops.runs.model", ["RunRecord", "SubmissionRecord", "AttemptStart", "AttemptEnd"]),
        ("llmops.sweep.model", ["StudyRecord", "Result"]),
    ],
)
def test_threads_decode_a_type_that_is_new(module: str, types: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", RACE, module, *types], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-500:]}"
