"""Programs that are not ours, preempted together by one more important job: each goes on to the same end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.launcher.harness import TREE, Launcher
from tests.slurm import cluster

EXAMPLES = TREE / "examples" / "preempt"
HOLD = str(TREE / "tests" / "slurm" / "hold.py")
HELD, STEPS = 5, 9  # the step at which the job is preempted, the last step
ONCE = "--every=100"  # only the stop saves
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
# What COMMAND of steps.sh is: a line for each number, and the wait for the stop.
ITEM = """echo "$2" >> "$1/items"
[ "$LLMOPS_ATTEMPT-$2" = 0-HELD ] || exit 0
touch "$1/held.0"
while [ ! -e "$LLMOPS_CONTROL_DIR/stop" ]; do sleep 0.05; done
""".replace("HELD", str(HELD))


class Program(NamedTuple):
    """A command line for so many nodes; that many ``ranks`` tell of themselves. FOLDER: where it leaves files."""

    nodes: int
    ranks: int
    command: tuple[str, ...]


def held(script: str, *arguments: str, before: tuple[str, ...] = (sys.executable,)) -> tuple[str, ...]:
    return (*before, HOLD, "FOLDER", str(HELD), str(EXAMPLES / script), f"--steps={STEPS}", ONCE, *arguments)


PROGRAMS = {
    "ddp": Program(2, 2, held("ddp.py")),
    "torchrun": Program(2, 4, held("ddp.py", "--loaders=1", before=TORCHRUN)),
    "hf_trainer": Program(1, 1, held("hf_trainer.py")),
    "lightning_trainer": Program(1, 1, held("lightning_trainer.py")),
    "shell": Program(1, 1, ("sh", str(EXAMPLES / "steps.sh"), str(STEPS), "sh", "-c", ITEM, "item", "FOLDER")),
}


@pytest.fixture(scope="module")
def store(slurm: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    yield Launcher(tmp_path_factory.mktemp("programs"), "slurm")
    cluster.cancel_all()


@pytest.fixture(scope="module")
def runs(store: Launcher) -> dict[str, str]:
    """The run of each program: all were preempted after the same step."""
    found = {}
    for name, program in PROGRAMS.items():
        (folder := folder_of(store, name)).mkdir(parents=True)
        command = tuple(str(folder) if word == "FOLDER" else word for word in program.command)
        found[name] = store.submit(
            "code.enabled=false", f"cluster.nodes={program.nodes}", "--name", name, command=command
        )
    for name, program in PROGRAMS.items():
        for rank in range(program.ranks):
            path = folder_of(store, name) / f"held.{rank}"
            store.wait_for(path.exists, 180, f"rank {rank} of {name}", found[name])
    cluster.preempt()
    return found


def folder_of(store: Launcher, name: str) -> Path:
    return store.root.with_name(f"{store.root.name}-files") / name


@pytest.fixture(scope="module")
def undisturbed(runs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What each program comes to on a laptop, outside of any job; while the jobs go on."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LLMOPS_", "SLURM_"))}
    running = {
        name: subprocess.Popen(
            [sys.executable, str(EXAMPLES / f"{name}.py"), f"--steps={STEPS}", ONCE],
            cwd=tmp_path_factory.mktemp("laptop"),
            env={**env, "PYTHONPATH": str(TREE)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("ddp", "hf_trainer", "lightning_trainer")
    }
    found = {name: result(process.communicate(timeout=180)[0]) for name, process in running.items()}
    return {**found, "torchrun": found["ddp"]}


def result(output: str) -> float:
    match = re.search(rf"done at {STEPS}: ([0-9.]+)", output)
    assert match, output
    return float(match[1])


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_preempted_program_goes_on_to_the_same_end(
    name: str, store: Launcher, runs: dict[str, str], undisturbed: dict[str, float]
) -> None:
    run_id = runs[name]
    value = store.wait(run_id, "finished", timeout=300)
    first, second = value["attempts"]
    assert [first["reason"], second["reason"]] == ["preempted", "finished"]
    assert (first["last_step"], second["resume_step"], second["first_step"]) == (HELD, HELD, HELD + 1), (
        f"saved after the very step, and went on with the next\n{store.trace(run_id)}"
    )
    assert value["step"] == STEPS
    ends = [json.loads(path.read_text()) for path in sorted(store.root.glob(f"{run_id}/attempts/*/end.json"))]
    assert [end["saved"] for end in ends] == [True, False]
    assert store.shares(run_id)["lost"] == 0
    output = store.ok("logs", run_id, "--rank", "all")
    if name == "shell":
        assert (folder_of(store, name) / "items").read_text().split() == [str(step) for step in range(1, STEPS + 1)]
        assert f"done at {STEPS}" in output
    else:
        # As many ranks as there may be: the sums of a step are the same but for their last digits.
        assert result(output) == pytest.approx(undisturbed[name], rel=1e-9)
    store.wait_for(lambda: store.alive(run_id) == [], 60, "all processes to be gone", run_id)
