"""Tokens per second of our data loader against mosaicml-streaming and litdata, and how soon a resumed run has data.

    python benchmarks/loading.py [--rounds 3] [--tokens 50331648] [--json FILE] [CONTENDER ...]

All write the same uint16 tokens in their own format, and give batches of 8 rows of 2,048 tokens, shuffled as they do by
default, as int64. Places are a local disk whose files are in the page cache, and an S3 server on loopback: ``cold``,
nothing is on this machine, and the time is that of everything, from opening on; ``warm``, the copies that an epoch
before has left. Elsewhere the rate counts from the first batch on; how long that one takes is told by itself. Resumes
are from a state that was saved deep in an epoch; their first batch has to be the one that would have come next.

An epoch is exact when it has every token once: in the first round, which is not timed, by the checksums of all rows, in
the others by the sum of all tokens. How many were is told; ours have to be, and what a peer raises is told, counts as
one that was not, and is tried again. Memory is the peak of the first round, above what there was before, of the
loader's processes without the page cache.

Contenders are processes that stay and take turns, in an order that rotates. A ratio is the median over rounds of the
quotient of two measurements of the same round. The peers go into an environment of their own:

    python benchmarks/loading.py --install /tmp/peers    # mosaicml-streaming 0.13.0, litdata 0.2.76
    /tmp/peers/bin/python benchmarks/loading.py
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from checkpoint_store import BUCKET, client, s3_server
from loading_contenders import CONTENDERS, LENGTH, ROWS, VOCAB, quiet

TREE = Path(__file__).parents[1]
OURS = "ours"
PLACES = ("disk", "s3 cold", "s3 warm")
RESUMED = ("disk", "s3 cold")
WORKERS = (0, 2)
DEPTHS = (0.1, 0.9)
ANSWER = "answer "
SAMPLE_S = 0.05
TRIES = 5  # epochs until all of a dataset has been copied, or until one ends

# What the peers import, but for torchvision, which is only for images.
PEERS = ("mosaicml-streaming==0.13.0", "litdata==0.2.76", "lightning-utilities", "catalogue", "obstore", "tifffile")
PEERS += ("brotli", "cramjam", "python-snappy", "zstd", "boto3", "s3transfer", "transformers==5.23.0")


def make_environment(folder: Path) -> None:
    """A virtual environment that sees this one's packages: mosaicml-streaming asks for an older NumPy, both for
    torchvision."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    (site,) = (folder / "lib").glob("python3*/site-packages")
    (site / "parent.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "-c", str(TREE / "constraints.txt"), *PEERS], check=True)
    (folder / "bin" / "weed").symlink_to(Path(sys.executable).parent / "weed")


# --- a contender's process -------------------------------------------------------------------------------------------


def serve(name: str) -> None:
    """Be a contender: an answer for every request on standard input, both JSON."""
    import torch

    torch.set_num_threads(1)
    quiet()
    for line in sys.stdin:
        request = json.loads(line)
        answer = {"prepare": prepare, "epoch": epoch, "states": states, "resume": resume}[request.pop("do")]
        try:
            result = answer(CONTENDERS[name], **request)
        except Exception as error:
            result = {"error": " ".join(str(error).split())[-150:]}
        print(ANSWER + json.dumps(result), flush=True)


def prepare(contender: Any, tokens: str, folder: str) -> None:
    """Write the tokens in a file into ``folder``."""
    contender.prepare(np.load(tokens), Path(folder))


def epoch(contender: Any, place: str, cache: str | None, workers: int, check: bool) -> dict[str, Any]:
    """Seconds to the first batch and from there to the end; rows, and the sum of their tokens or of their checksums."""
    began = time.perf_counter()
    loader = contender(place, cache, workers, None)
    rows = total = 0
    first_s = 0.0
    with contextlib.closing(loader):
        for batch in loader:
            first_s = first_s or time.perf_counter() - began
            rows += len(batch)
            total += digest(batch) if check else int(batch.sum())
        all_s = time.perf_counter() - began
    return {"first_s": first_s, "all_s": all_s, "rows": rows, "total": total}


def states(contender: Any, place: str, cache: str | None, workers: int, batches: list[int]) -> list[Any]:
    """The states after so many batches, and the digests of the batches that come next."""
    loader = contender(place, cache, workers, None)
    found, state = [], None
    with contextlib.closing(loader):
        for number, batch in enumerate(loader, 1):
            if state is not None:
                found.append((state, digest(batch)))
            state = json.loads(json.dumps(loader.state())) if number in batches else None
            if len(found) == len(batches):
                break
    return found


def resume(contender: Any, place: str, cache: str | None, workers: int, state: dict[str, Any]) -> dict[str, Any]:
    """Seconds from opening to the first batch, and its digest."""
    began = time.perf_counter()
    loader = contender(place, cache, workers, state)
    with contextlib.closing(loader):
        batch = next(iter(loader))
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "digest": digest(batch)}


def digest(batch: Any) -> int:
    """The sum of checksums of the rows of a batch."""
    return checksum(batch.numpy().astype("<u2"))


def checksum(rows: np.ndarray[Any, Any]) -> int:
    """The sum of CRC-32Cs of rows: the same in any order, and another one where a row is missing or comes twice."""
    from crc32c import crc32c

    return sum(crc32c(row) for row in rows)


class Contender:
    """A process that waits for its turn."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str]) -> None:
        self.name, self.folder, self.log = name, folder / name, folder / f"{name}.log"
        self.cache = folder / f"{name}.cache"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--serve", name],
                env={
                    **os.environ,
                    **environment,
                    "PYTHONPATH": f"{TREE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def ask(self, do: str, **request: Any) -> Any:
        """Have it do something. Raises SystemExit where it cannot."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        for text in self.process.stdout:  # what libraries print is left out
            if text.startswith(ANSWER):
                return json.loads(text.removeprefix(ANSWER))
        raise SystemExit(f"{self.name} ended:\n{self.log.read_text(errors='replace')[-3000:]}")

    def try_to(self, do: str, place: str, workers: int, **request: Any) -> Any:
        """The same at ``place``; what it raises is told, and is the answer's ``error``."""
        answer = self.ask(do, **self.where(place, workers), **request)
        if "error" in answer:
            self.note(f"{place}, {workers} workers, {do}: {answer['error']}")
        return answer

    def insist(self, do: str, place: str, workers: int, **request: Any) -> Any:
        """The same, several times if need be."""
        for _ in range(TRIES):
            if "error" not in (answer := self.try_to(do, place, workers, **request)):
                return answer
        raise SystemExit(f"{self.name} cannot be measured")

    def note(self, text: str) -> None:
        """Tell what went wrong."""
        print(f"{self.name}, {text}", file=sys.stderr, flush=True)

    def where(self, place: str, workers: int) -> dict[str, Any]:
        """What to open. A cold place has no copies."""
        if place == "disk":
            return {"place": str(self.folder), "cache": None, "workers": workers}
        if place == "s3 cold":
            shutil.rmtree(self.cache, ignore_errors=True)
        return {"place": f"s3://{BUCKET}/{self.name}", "cache": str(self.cache), "workers": workers}

    def copied(self) -> bool:
        """Is the whole dataset in the cache?"""
        return size(self.cache) >= size(self.folder) - 1_000_000  # but for the index

    def memory(self) -> int:
        """Bytes of its processes, without the page cache; shared ones count once."""
        return sum(own_memory(pid) for pid in family(self.process.pid))


def size(folder: Path) -> int:
    """Bytes of the files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def family(pid: int) -> Iterator[int]:
    """A process and all its descendants."""
    yield pid
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in path.read_text().split():
                yield from family(int(child))


def own_memory(pid: int) -> int:
    """Bytes of a process, its part of what it shares, without files; 0 when it has ended."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        fields = (line.split() for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
        return sum(int(amount) for _, amount, _ in fields) << 10
    return 0


@contextlib.contextmanager
def peak(contender: Contender) -> Iterator[list[int]]:
    """Yields a list that has, afterwards, how many bytes more than before ``contender`` had at most."""
    before, over, found = contender.memory(), threading.Event(), [0]

    def watch() -> None:
        while not over.wait(SAMPLE_S):
            found[0] = max(found[0], contender.memory() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


# --- all of them -----------------------------------------------------------------------------------------------------


def turns(contenders: list[Contender], rounds: int) -> Iterator[list[Contender]]:
    """Who comes first moves on by one."""
    for number in range(rounds):
        at = number % len(contenders)
        yield contenders[at:] + contenders[:at]


def rates(contenders: list[Contender], place: str, workers: int, rounds: int, rows: int, sums: tuple[int, int]) -> Any:
    """By contender: tokens per second of each round, seconds to each first batch, bytes of memory, exact epochs."""
    found: dict[str, Any] = {each.name: {"rate": [], "first_s": [], "memory": 0, "exact": []} for each in contenders}

    def run(contender: Contender, check: bool) -> dict[str, Any]:
        for _ in range(TRIES):
            answer = contender.try_to("epoch", place, workers, check=check)
            exact = (answer.get("rows"), answer.get("total")) == (rows, sums[check])
            found[contender.name]["exact"].append(exact)
            if not exact:
                if "error" not in answer:
                    contender.note(f"{place}, {workers} workers: not every token came once")
                if contender.name == OURS:
                    raise SystemExit("ours has to give every token once")
            if "error" not in answer:
                return answer
        raise SystemExit(f"{contender.name} cannot be measured")

    for contender in contenders:
        with peak(contender) as bytes_more:
            run(contender, True)
        found[contender.name]["memory"] = bytes_more[0]
        for _ in range(TRIES):
            if place != "s3 warm" or contender.copied():
                break
            run(contender, True)
        else:
            raise SystemExit(f"{contender.name} does not keep what it has read: {size(contender.cache)} bytes")
    for order in turns(contenders, rounds):
        for contender in order:
            answer = run(contender, False)
            tokens, seconds = rows * LENGTH, answer["all_s"]
            if place != "s3 cold":
                tokens, seconds = tokens - ROWS * LENGTH, seconds - answer["first_s"]
            found[contender.name]["rate"].append(tokens / seconds)
            found[contender.name]["first_s"].append(answer["first_s"])
    return found


def resumes(contenders: list[Contender], place: str, workers: int, rounds: int, rows: int) -> Any:
    """By contender and depth: seconds to the first batch of each round."""
    batches = [int(rows / ROWS * depth) for depth in DEPTHS]
    saved = {each.name: each.insist("states", place, workers, batches=batches) for each in contenders}
    found: dict[str, Any] = {each.name: {f"{depth:.0%}": [] for depth in DEPTHS} for each in contenders}
    for order in turns(contenders, rounds):
        for contender, (number, depth) in itertools.product(order, enumerate(DEPTHS)):
            state, expected = saved[contender.name][number]
            answer = contender.insist("resume", place, workers, state=state)
            if answer["digest"] != expected:
                raise SystemExit(f"{contender.name} ({place}, {workers} workers) goes on with another batch at {depth}")
            found[contender.name][f"{depth:.0%}"].append(answer["seconds"])
    return found


def against(found: dict[str, Any], name: str, pick: Any) -> float:
    """The median over rounds of the quotient of a contender's measurement and ours."""
    if OURS not in found:
        return float("nan")
    return statistics.median(a / b for a, b in zip(pick(found[name]), pick(found[OURS]), strict=True))


def compare(names: list[str], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Prepare, run all, print a line for each; returns the lines."""
    rows = tokens // (LENGTH * ROWS * 2) * ROWS * 2
    data = np.random.default_rng(0).integers(0, VOCAB, (rows, LENGTH), np.uint16)
    sums = int(data.sum(dtype=np.int64)), checksum(data)
    lines = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        environment = stack.enter_context(s3_server(folder / "s3"))
        contenders = [Contender(name, folder, environment) for name in names]
        for contender in contenders:
            stack.callback(contender.process.wait)
            stack.callback(contender.process.kill)
        np.save(folder / "tokens.npy", data.reshape(-1))
        del data
        for contender in contenders:
            if answer := contender.ask("prepare", tokens=str(folder / "tokens.npy"), folder=str(contender.folder)):
                raise SystemExit(f"{contender.name}: {answer}")
            for path in filter(Path.is_file, contender.folder.iterdir()):
                client(environment).upload_file(str(path), BUCKET, f"{contender.name}/{path.name}")
        print(f"{rows * LENGTH:,} tokens; load of the machine {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
        titles = ("place   ", "workers", "M tokens/s", " of ours", " first s", " peak MiB", " exact")
        print(f"\n{'':<20} {' '.join(titles)}")
        for place, workers in itertools.product(PLACES, WORKERS):
            for name, each in (found := rates(contenders, place, workers, rounds, rows, sums)).items():
                line = {"what": "rate", "name": name, "place": place, "workers": workers, **each}
                line |= {"of_ours": against(found, name, lambda one: one["rate"]), "load": os.getloadavg()[0]}
                lines.append(line)
                print(
                    f"{name:<20} {place:<8} {workers:>7} {statistics.median(each['rate']) / 1e6:>10.1f} "
                    f"{line['of_ours']:>8.2f} {statistics.median(each['first_s']):>8.3f} "
                    f"{each['memory'] / 2**20:>9.0f} {sum(each['exact']):>4}/{len(each['exact'])}",
                    flush=True,
                )
        print(f"\n{'first batch, resumed':<20} {'place':<8} {'workers':>7} {'depth':>6} {'s':>8} {'of ours':>8}")
        for place, workers in itertools.product(RESUMED, WORKERS):
            found = resumes(contenders, place, workers, rounds, rows)
            for name, depth in itertools.product(found, (f"{depth:.0%}" for depth in DEPTHS)):
                seconds = found[name][depth]
                line = {"what": "resume", "name": name, "place": place, "workers": workers, "depth": depth}
                line |= {"seconds": seconds, "of_ours": against(found, name, lambda one, depth=depth: one[depth])}
                lines.append(line | {"load": os.getloadavg()[0]})
                print(
                    f"{name:<20} {place:<8} {workers:>7} {depth:>6} {statistics.median(seconds):>8.3f} "
                    f"{line['of_ours']:>8.1f}",
                    flush=True,
                )
        print("every resume went on with the batch that would have come next")
        print(f"load of the machine at the end {os.getloadavg()[0]:.1f}")
    return lines


def main() -> None:
    """Parse, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", metavar="CONTENDER", help=", ".join(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=3 << 24, help="about as many")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--install", type=Path, metavar="FOLDER", help="make the peers' environment, and end")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve)
    if arguments.install:
        return make_environment(arguments.install)
    lines = compare(arguments.contenders or list(CONTENDERS), arguments.tokens, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
