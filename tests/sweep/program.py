"""What trials run in tests: a deterministic curve that depends on LR and SEED, saved and gone on from, step by step.

Environment: LR, SEED, STEPS, STEP_S (seconds a step), SAVE_EVERY; MISFORTUNE=crash|nan at half of its steps;
GATE=file that must be there before it goes on after its first save.
"""

import json
import math
import os
import random
import sys
import time
from pathlib import Path

folder, control = Path(os.environ["LLMOPS_RUN_URL"]), Path(os.environ["LLMOPS_CONTROL_DIR"])
lr, seed, steps = float(os.environ["LR"]), int(os.environ.get("SEED", "0")), int(os.environ.get("STEPS", "20"))
pause, save_every = float(os.environ.get("STEP_S", "0.01")), int(os.environ.get("SAVE_EVERY", "5"))
gate = os.environ.get("GATE")
misfortune, state = os.environ.get("MISFORTUNE", ""), folder / "state.json"


def save(step: int, loss: float) -> None:
    aside = state.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps({"step": step, "loss": loss}))
    aside.replace(state)


done = json.loads(state.read_text()) if state.exists() else {"step": 0, "loss": 10.0}
step, loss = done["step"], done["loss"]
while step < steps:
    step += 1
    # Fastest where lr is 0.01; the noise is the step's own, so that a step that is run again gives the same.
    speed = math.exp(-abs(math.log10(lr) + 2)) / 4
    loss = loss * (1 - speed) + random.Random(f"{seed}/{step}").random() / 100
    if misfortune == "crash" and step == steps // 2:
        sys.exit("as it was told, this trial fails")
    shown = math.nan if misfortune == "nan" and step >= steps // 2 else loss
    print(f"step={step} loss={shown!r}", flush=True)
    if step % save_every == 0:
        save(step, loss)
    (control / f"heartbeat.{os.environ['RANK']}").write_text(
        json.dumps({"step": step, "first_step": done["step"] + 1, "phase": "train", "time": time.time()})
    )
    deadline = time.monotonic() + 120
    while gate and step == save_every and not Path(gate).exists() and not (control / "stop").exists():
        if time.monotonic() > deadline:
            sys.exit(f"waited 120 s for {gate}")
        time.sleep(0.02)
    if (control / "stop").exists():
        save(step, loss)
        (control / f"stopped.{os.environ['RANK']}").write_text(json.dumps({"step": step}))
        sys.exit(75)
    time.sleep(pause)
