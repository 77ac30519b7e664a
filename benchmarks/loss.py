"""CPU seconds and peak memory of the loss in chunks, ``llm.model.loss``, against F.linear + F.cross_entropy.

    python benchmarks/loss.py [--rounds 3] [--positions 2048] [--dim 512] [--json FILE]

Forward and backward of one micro-batch's loss on one thread, in seconds of CPU: other load on the machine takes the
wall clock's. Every run is a process of its own, whose peak is that of its resident memory above what it had before
(Linux's VmHWM); contenders take turns. A ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

CASES = [(vocab, dtype) for vocab in (32_000, 128_256) for dtype in ("bfloat16", "float32")]
WAYS = ("chunked", "plain")
STEPS = 2  # the second is timed: the first one fills the allocator


def resident(field: str) -> int:
    """Bytes of VmRSS, now, or VmHWM, at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


def once(way: str, vocab: int, dtype: str, positions: int, dim: int, chunk: int) -> dict[str, float]:
    """CPU seconds of a step, and bytes above the inputs at its peak."""
    import torch
    import torch.nn.functional as F

    from llm.model.loss import linear_cross_entropy

    torch.set_num_threads(1)
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    x = torch.randn(1, positions, dim, dtype=kind, requires_grad=True)
    weight = (torch.randn(vocab, dim, dtype=kind) * dim**-0.5).requires_grad_()
    targets = torch.randint(0, vocab, (1, positions))
    warm = torch.randn(64, 64, dtype=kind)
    (warm @ warm).sum().item()  # loads the kernels' own buffers
    before, taken, loss = resident("VmRSS"), 0.0, torch.zeros(())
    for _ in range(STEPS):
        x.grad = weight.grad = None
        began = time.process_time()
        if way == "chunked":
            loss = linear_cross_entropy(x, weight, targets, chunk, 0.0)[0]
        else:
            logits = F.linear(x, weight)
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
            del logits
        loss.backward()
        taken = time.process_time() - began
    return {"seconds": taken, "peak": float(resident("VmHWM") - before), "loss": float(loss.detach()) / positions}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--once", nargs=3, metavar=("WAY", "VOCAB", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = (arguments.positions, arguments.dim, arguments.chunk)
    if arguments.once:
        way, vocab, dtype = arguments.once
        print(json.dumps(once(way, int(vocab), dtype, *sizes)))
        return
    rows = []
    names = ("vocabulary", "type", "chunked s", "plain s", "ratio", "chunked MB", "plain MB", "ratio")
    print(" ".join(f"{name:>10}" for name in names))
    for vocab, dtype in CASES:
        taken: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(arguments.rounds):
            for way in WAYS:
                options = [
                    f"--{name}={value}" for name, value in zip(("positions", "dim", "chunk"), sizes, strict=True)
                ]
                command = [sys.executable, __file__, *options, "--once", way, str(vocab), dtype]
                taken[way].append(
                    json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                )
        ours, plain = taken["chunked"], taken["plain"]
        assert abs(ours[0]["loss"] / plain[0]["loss"] - 1) < 1e-2, (ours[0], plain[0])
        row = {"vocab": vocab, "dtype": dtype}
        for what in ("seconds", "peak"):
            row |= {f"chunked_{what}": statistics.median(each[what] for each in ours)}
            row |= {f"plain_{what}": statistics.median(each[what] for each in plain)}
            row |= {f"ratio_{what}": statistics.median(a[what] / b[what] for a, b in zip(ours, plain, strict=True))}
        rows.append(row)
        seconds = [f"{row[f'{name}_seconds']:10.2f}" for name in ("chunked", "plain", "ratio")]
        peaks = [f"{row[f'{way}_peak'] / 1e6:10,.0f}" for way in WAYS]
        print(f"{vocab:>10,} {dtype:>10}", *seconds, *peaks, f"{row['ratio_peak']:10.2f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
