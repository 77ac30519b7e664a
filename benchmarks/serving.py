"""Tokens per second and time to the first token of servers on CPU: ours against transformers' own, the same weights.

    pip install -c constraints.txt -e '.[serve,bench]'
    python benchmarks/serving.py [--clients 1] [--clients 8] [--clients 64] [--rounds 5] [--json FILE] [SERVER ...]

20.8 M parameters, prompts of some 32 tokens that differ, 64 new ones, greedy, float32, 2 threads. Each
client streams one completion after the other over HTTP. ``transformers`` is ``transformers serve`` as it comes,
``transformers-batching`` the same with its continuous batching. The servers take turns, and those that wait are
halted: a round is all clients on one server, and ratios are of rounds that follow each other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

TREE = Path(__file__).parents[1]
ALL = ("transformers", "transformers-batching", "ours")
WORDS, NEW, THREADS, EACH = 24, 64, 2, 2  # words of a prompt, new tokens, threads of a server, completions of a client
PATIENCE_S = 600.0
VOCABULARY = 4096


def python(*arguments: str) -> None:
    """Run one of this project's programs."""
    subprocess.run(
        [sys.executable, "-m", *arguments], check=True, cwd=TREE, env={**os.environ, "PYTHONPATH": str(TREE)},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def make_models(folder: Path) -> tuple[Path, Path]:
    """The same random weights as a run, and as a folder of Hugging Face's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer, run, exported = folder / "tokenizer.json", folder / "run", folder / "hf"
    python(
        "llm.tools.train_tokenizer", "--vocab-size", str(VOCABULARY), "--output", str(tokenizer), "embedded:shakespeare"
    )
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=10,
            num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=256, bos_token_id=None,
            eos_token_id=None, pad_token_id=None,
        )
    ).save_pretrained(exported)  # fmt: skip
    PreTrainedTokenizerFast(tokenizer_file=str(tokenizer)).save_pretrained(exported)
    python("llm.tools.convert", "import", str(exported), str(run))
    return run, exported


class Server:
    """One of the servers, ready."""

    def __init__(self, name: str, run: Path, exported: Path) -> None:
        self.name = name
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        place = ["--host", "127.0.0.1", "--port", str(self.port)]
        if name == "ours":
            command = [sys.executable, "-m", "llm.inference.server", "--run-url", str(run), *place]
            self.model, health = "run", "readyz"
            self.extra: dict[str, Any] = {"stream_options": {"include_usage": True}, "ignore_eos": True}
        else:
            program = str(Path(sys.executable).with_name("transformers"))
            command = [program, "serve", str(exported), *place, "--device", "cpu", "--dtype", "float32"]
            command += ["--continuous-batching"] * name.endswith("-batching")
            self.model, health, self.extra = str(exported), "health", {}
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(TREE)}
        self.process = subprocess.Popen(command, cwd=TREE, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE_S
        while not self._answers(health):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{name} does not start: {' '.join(command)}")
            time.sleep(0.2)

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=10) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    async def complete(self, prompt: str) -> tuple[int, float]:
        """Stream one completion: its tokens, and seconds to the first of them."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": NEW, "temperature": 0, "stream": True}
        data = json.dumps({**body, **self.extra}).encode()
        began, first, tokens = time.perf_counter(), None, 0
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 20)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
        head += "Content-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + data)
        if b" 200 " not in (status := await reader.readline()):
            raise SystemExit(f"{self.name}: {status.decode()}{(await reader.read()).decode()}")
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            piece = json.loads(line[6:])
            if "error" in piece:
                raise SystemExit(f"{self.name}: {piece}")
            if first is None and any(choice["text"] for choice in piece["choices"]):
                first = time.perf_counter() - began
            tokens = (piece.get("usage") or {}).get("completion_tokens", tokens)
        writer.close()
        if not tokens or first is None:
            raise SystemExit(f"{self.name} gave no text")
        return tokens, first

    async def round(self, clients: int, number: int) -> dict[str, float]:
        """All clients at once: tokens per second of all together, and the median seconds to the first token."""

        async def client(who: int) -> list[tuple[int, float]]:
            return [await self.complete(prompt(number, who, turn)) for turn in range(EACH)]

        began = time.perf_counter()
        done = [each for told in await asyncio.gather(*map(client, range(clients))) for each in told]
        seconds = time.perf_counter() - began
        return {
            "tokens_per_s": sum(tokens for tokens, _ in done) / seconds,
            "first_s": statistics.median(first for _, first in done),
        }


def prompt(number: int, who: int, turn: int) -> str:
    """Words that no other completion begins with."""
    words = ("king", "queen", "night", "crown", "sword", "ghost", "heart", "storm", "grave", "feast", "horse")
    seed = (number * 1009 + who) * 31 + turn
    return f"Scene {seed}: " + " ".join(words[(seed * 7 + at * (1 + seed % 5)) % len(words)] for at in range(WORDS))


def compare(servers: list[Server], clients: int, rounds: int) -> list[dict[str, Any]]:
    """One number of clients."""
    found: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
    for number in range(rounds + 1):
        for server in servers:
            server.process.send_signal(signal.SIGCONT)
            told = asyncio.run(server.round(clients, number))
            server.process.send_signal(signal.SIGSTOP)  # some are busy even when they have nothing to do
            if number:  # the first warms up
                found[server.name].append(told)
    base = found[servers[0].name]

    def ratio(name: str, key: str) -> float:
        return statistics.median(mine[key] / its[key] for mine, its in zip(found[name], base, strict=True))

    return [
        {
            "clients": clients,
            "name": server.name,
            "tokens_per_s": statistics.median(each["tokens_per_s"] for each in found[server.name]),
            "first_s": statistics.median(each["first_s"] for each in found[server.name]),
            "speed_up": ratio(server.name, "tokens_per_s"),
            "first_ratio": ratio(server.name, "first_s"),
        }
        for server in servers
    ]


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="*", metavar="SERVER", help=", ".join(ALL))
    parser.add_argument("--clients", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    servers: list[Server] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            models = make_models(Path(folder))
            for name in arguments.servers or ALL:
                servers.append(Server(name, *models))
                servers[-1].process.send_signal(signal.SIGSTOP)
            rows = [
                row
                for clients in arguments.clients or (1, 8, 64)
                for row in compare(servers, clients, arguments.rounds)
            ]
        finally:
            for server in servers:
                server.process.send_signal(signal.SIGCONT)
                server.process.terminate()
                server.process.wait(PATIENCE_S)
    print(f"{'clients':>7} {'':<22} {'tokens/s':>9} {'speed-up':>9} {'first token ms':>15} {'ratio':>7}")
    for row in rows:
        print(
            f"{row['clients']:>7} {row['name']:<22} {row['tokens_per_s']:>9,.0f} {row['speed_up']:>9.2f} "
            f"{row['first_s'] * 1e3:>15,.0f} {row['first_ratio']:>7.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
