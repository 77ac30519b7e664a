"""Time until all trials of a sweep are submitted, side by side with the peers in one run: medians and ratios.

    .venv/bin/python benchmarks/sweep.py [--rounds 3] [--sizes 50 200 1000] [--json FILE]

Needs a SLURM to submit to (slurm/dev-cluster.sh up). Jobs are submitted held and cancelled at once. The clock of whole
commands runs from the start of the process until `sbatch` has returned for the last time: a wrapper on PATH notes when.
submitit one by one is asked for at most 200 trials, since it sleeps between two calls. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

PYTHON = sys.executable
BIN = Path(sys.executable).parent
ONE_BY_ONE = 200  # trials, at most
PATIENCE_S = 600.0
# After everything is imported and composed: what is left is to write the study down and to hand it over. Raw sbatch
# takes no snapshot of the code, so neither does this; the whole command below does.
SUBMIT = """
import sys, time
from llmops import studies
count, url = int(sys.argv[1]), sys.argv[2]
began = time.perf_counter()
overrides = ["cluster=slurm", "code.enabled=false", "recipe=tiny", 'cluster.extra=["--hold"]']
prepared = studies.prepare([*overrides, f"train.seed=range(0,{count})"], runs_url=url)
composed = time.perf_counter()
studies.start(prepared)
print(composed - began, time.perf_counter() - composed)
"""
SUBMITIT = """
import sys, submitit
executor = submitit.AutoExecutor(folder=sys.argv[2], cluster="slurm")
executor.update_parameters(slurm_additional_parameters={"hold": True}, timeout_min=5)
for number in range(int(sys.argv[1])):
    executor.submit(print, number)
"""
HYDRA = """
import hydra
@hydra.main(version_base="1.3", config_path=None)
def main(config):
    pass
main()
"""


class Clock:
    """An `sbatch` on PATH that notes when the real one returned."""

    def __init__(self, folder: Path) -> None:
        self.notes = folder / "sbatch-returned"
        self.folder = folder / "bin"
        self.folder.mkdir()
        script = self.folder / "sbatch"
        real = shutil.which("sbatch")
        script.write_text(f'#!/bin/sh\n{real} "$@"\ncode=$?\ndate +%s.%N >>{self.notes}\nexit $code\n')
        script.chmod(0o755)
        self.env = {**os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}"}

    def until_submitted(self, argv: list[str], cwd: Path, calls: int) -> float:
        """Seconds from the start of a command to the end of its last `sbatch`; it is ended then."""
        self.notes.unlink(missing_ok=True)
        began = time.time()
        with subprocess.Popen(
            argv, cwd=cwd, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            while not self.notes.exists() or len(self.notes.read_text().splitlines()) < calls:
                if process.poll() is not None and not self.notes.exists():
                    sys.exit(f"{argv} returned {process.returncode}: {process.communicate()[1].decode()}")
                if time.time() - began > PATIENCE_S:
                    sys.exit(f"{argv} did not submit {calls} times within {PATIENCE_S:.0f} s")
                time.sleep(0.002)
            process.terminate()
        return float(self.notes.read_text().splitlines()[-1]) - began


def raw_array(folder: Path, count: int) -> float:
    """Seconds of `sbatch --array`, as a process of its own."""
    script = folder / "job.sh"
    script.write_text("#!/bin/bash\ntrue\n")
    began = time.perf_counter()
    subprocess.run(
        ["sbatch", "--hold", "-o", "/dev/null", f"--array=0-{count - 1}", str(script)], check=True, capture_output=True
    )
    return time.perf_counter() - began


def measure(folder: Path, clock: Clock, count: int, peers: bool) -> dict[str, float]:
    """Seconds of each way to submit ``count`` trials."""
    project = folder / "project"
    url = str(folder / "runs")
    out = subprocess.run(
        [PYTHON, "-c", SUBMIT, str(count), url], cwd=project, check=True, capture_output=True, text=True
    )
    composing, submitting = (float(each) for each in out.stdout.split())
    found = {"raw sbatch --array": raw_array(folder, count), "llmops: composed": composing}
    found["llmops: handed over"] = submitting
    sweep = [str(BIN / "llmops"), "sweep", "--backend", "slurm", "--runs-url", url, "recipe=tiny"]
    sweep += [f"train.seed=range(0,{count})", 'cluster.extra=["--hold"]']
    found["llmops sweep"] = clock.until_submitted(sweep, project, 1)
    hydra = [PYTHON, str(project / "app.py"), "--multirun", "hydra/launcher=submitit_slurm", f"+seed=range(0,{count})"]
    hydra += ["+hydra.launcher.additional_parameters.hold=true", f"hydra.sweep.dir={folder}/multirun"]
    if peers:
        found["hydra-submitit-launcher"] = clock.until_submitted(hydra, project, 1)
    if peers and count <= ONE_BY_ONE:
        one_by_one = [PYTHON, "-c", SUBMITIT, str(count), str(folder / "submitit")]
        found["submitit one by one"] = clock.until_submitted(one_by_one, project, count)
    subprocess.run(["scancel", "--me"], check=True)
    return found


def main() -> int:
    """Measure, print the table and return 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 200, 500, 1000])
    parser.add_argument("--peers-up-to", type=int, default=1000, help="trials; with more, the peers are left out")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    medians: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="llmops-bench-") as name:
        folder = Path(name)
        project = folder / "project"
        project.mkdir()
        (project / "app.py").write_text(HYDRA)
        subprocess.run(["git", "init", "-q", str(project)], check=True)  # a small project to snapshot
        clock = Clock(folder)
        for count in arguments.sizes:
            peers = count <= arguments.peers_up_to
            turns = track(range(arguments.rounds + 1), f"{count} trials")
            taken = [measure(folder, clock, count, peers) for _ in turns]
            # The first round warms the page cache and the compositions.
            medians[count] = {each: statistics.median(row[each] for row in taken[1:]) for each in taken[0]}
    names = list(max(medians.values(), key=len))
    table = Table("seconds", *map(str, medians), title=f"medians of {arguments.rounds} rounds, by number of trials")
    for each in names:
        table.add_row(each, *(f"{row[each]:.3f}" if each in row else "-" for row in medians.values()))
    bars = Table("bar", *map(str, medians))
    handed = {count: row["llmops: handed over"] / row["raw sbatch --array"] for count, row in medians.items()}
    whole = {count: row["llmops: composed"] + row["llmops: handed over"] for count, row in medians.items()}
    bars.add_row("handed over / raw sbatch --array, ≤ 2", *(f"{ratio:.2f}" for ratio in handed.values()))
    bars.add_row("500 composed and submitted, ≤ 2 s", *(f"{each:.2f} s" for each in whole.values()))
    theirs = {count: row.get("hydra-submitit-launcher", float("nan")) for count, row in medians.items()}
    ratios = [f"{row['llmops sweep'] / theirs[count]:.3f}" for count, row in medians.items()]
    bars.add_row("llmops sweep / hydra-submitit-launcher", *ratios)
    Console().print(table, bars)
    if arguments.json:
        arguments.json.write_text(json.dumps(medians, indent=1))
    return 1 if max(handed.values()) > 2 or whole.get(500, 0.0) > 2 else 0


if __name__ == "__main__":
    sys.exit(main())
