"""The server among clients that behave badly, many at once, and at its end: nothing leaks, nobody is left waiting."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.inference.generate import generate
from llm.inference.load import load_model
from llm.inference.rows import CachedRows
from llm.inference.sampling import Sampling
from llm.utils.config import load
from tests.data.tokenizer_files import json_tokenizer
from tests.inference.server_process import KEY, LIMIT_S, ServerProcess, make_run

LONG = 4096  # tokens of a text that takes seconds
LASTING = {"model": "hamlet", "prompt": "Who", "max_tokens": LONG, "ignore_eos": True, "stream": True}
WRITE_S = 2.0
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "hamlet", max_seq_len=LONG)


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[ServerProcess]:
    started = ServerProcess(
        run, "--api-key-env", "SERVE_KEY", "--max-batch", "48", "--max-queue", "400", "--cache-mb", "24",
        "--step-tokens", "128", "--max-body-kb", "64", "--write-timeout-s", str(WRITE_S), SERVE_KEY=KEY,
    )  # fmt: skip
    yield started
    assert started.stop() == 0


class Client:
    """A connection that asks once, byte by byte as HTTP has it."""

    def __init__(self, server: ServerProcess, buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(LIMIT_S)
        self.socket.connect(("127.0.0.1", server.port))

    def ask(self, body: Any, path: str = "/v1/completions", key: str = KEY) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        self.socket.sendall(head.encode() + data)

    def close(self) -> None:
        self.socket.close()


async def stream(server: ServerProcess, body: dict[str, Any], pieces: int | None = None, pause: float = 0) -> str:
    """The text that a stream has; after so many ``pieces`` the client goes. ``pause``: seconds between reads."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 20)
    data = json.dumps({**body, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(data)}\r\n"
    writer.write(head.encode() + b"Connection: close\r\n\r\n" + data)
    text, seen = "", 0
    assert b" 200 " in await reader.readline()
    async for line in reader:
        if line.startswith(b"data: {"):
            choice = json.loads(line[6:])["choices"][0]
            text += choice["text"]
            seen += 1
            if seen == pieces:
                break
            await asyncio.sleep(pause)
        elif line.startswith(b"data: [DONE]"):
            text += "\0"  # it came to its end
    writer.close()
    return text


def settle(server: ServerProcess, quiet: dict[str, float], threads: int, sockets: int) -> None:
    """Wait until the server is as it was before anybody came."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        now = server.metrics()
        left = {name: now[name] for name, value in quiet.items() if now[name] != value}
        if not left and server.threads() <= threads and server.sockets() <= sockets:
            return
        assert time.monotonic() < deadline, f"left over: {left}, {server.threads()} threads, {server.sockets()} sockets"
        time.sleep(0.1)


def quiet_state(server: ServerProcess) -> dict[str, float]:
    names = ("waiting", "running", "readers", "tasks", "cache_blocks_free")
    found = server.metrics()
    assert found["llm_serve_cache_blocks"] == found["llm_serve_cache_blocks_free"]
    return {f"llm_serve_{name}": found[f"llm_serve_{name}"] for name in names}


def test_two_hundred_clients_of_all_kinds(server: ServerProcess, run: Path) -> None:
    server.post("/v1/completions", {"model": "hamlet", "prompt": "warm", "max_tokens": 2})  # threads are there now
    quiet, threads, sockets = quiet_state(server), server.threads(), server.sockets()
    tokenizer = json_tokenizer("llama3")
    model, _ = load_model(load(f"{run}/config.yaml"), str(run), torch.device("cpu"))
    prompts = ["To be", "Who's there?", "Long live the king! " * 20, "é ü 漢字"]
    settings = [{"max_tokens": 40 + 30 * at, "temperature": at % 2, "seed": at} for at in range(4)]
    bodies = [
        {"model": "hamlet", "prompt": prompt, **setting} for prompt, setting in zip(prompts, settings, strict=True)
    ]
    expected = [
        generate(CachedRows(model), tokenizer, [tokenizer.encode(prompt)], Sampling(**setting), limit=LONG)[0].text
        for prompt, setting in zip(prompts, settings, strict=True)
    ]

    async def everybody() -> list[str]:
        whole = [stream(server, bodies[at % 4]) for at in range(140)]
        slow = [stream(server, bodies[at % 4], pause=0.01) for at in range(20)]
        going = [stream(server, {**LASTING, "prompt": str(at)}, pieces=1 + at % 5) for at in range(40)]
        async with asyncio.timeout(LIMIT_S):
            return await asyncio.gather(*whole, *slow, *going)

    told = asyncio.run(everybody())
    assert told[:160] == [expected[at % 4] + "\0" for at in (*range(140), *range(20))]
    assert not any("\0" in text for text in told[160:])
    settle(server, quiet, threads, sockets)
    assert server.metrics()['llm_serve_requests_total{finish="cancelled"}'] >= 40


def test_characters_that_several_tokens_spell_come_whole(server: ServerProcess, run: Path) -> None:
    tokenizer = json_tokenizer("llama3")
    body = {"model": "hamlet", "prompt": "漢", "max_tokens": 500, "temperature": 1.5, "seed": 3, "ignore_eos": True}
    streamed = asyncio.run(stream(server, body))
    model, _ = load_model(load(f"{run}/config.yaml"), str(run), torch.device("cpu"))
    sampling = Sampling(max_tokens=500, temperature=1.5, seed=3, ignore_end=True)
    expected = generate(CachedRows(model), tokenizer, [tokenizer.encode("漢")], sampling)[0]
    assert streamed == tokenizer.decode(expected.tokens) + "\0"
    spelled = {tokenizer.decode([token]) for token in range(tokenizer.vocab_size)}
    assert any(not char.isascii() and char not in spelled for char in streamed)


def test_clients_that_do_not_read_are_let_go(server: ServerProcess) -> None:
    quiet, threads, sockets = quiet_state(server), server.threads(), server.sockets()
    message = {"role": "user", "content": "Who?"}
    body = {"model": "hamlet", "messages": [message], "max_tokens": 800, "n": 3, "logprobs": True, "top_logprobs": 20,
            "stream": True, "ignore_eos": True}  # fmt: skip
    clients = [Client(server, buffer=4096) for _ in range(4)]
    for client in clients:
        client.ask(body, "/v1/chat/completions")
    others = server.post("/v1/completions", {"model": "hamlet", "prompt": "Who", "max_tokens": 20})
    assert others[0] == 200
    settle(server, quiet, threads, sockets)  # they are still connected, and read nothing
    for client in clients:
        client.close()


def test_a_client_that_goes_while_it_waits_for_all(server: ServerProcess) -> None:
    quiet, threads, sockets = quiet_state(server), server.threads(), server.sockets()
    client = Client(server)
    client.ask({**LASTING, "stream": False})
    wait_for(lambda: server.metrics()["llm_serve_running"] == 1)
    client.close()
    settle(server, quiet, threads, sockets)


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_cannot_be_answered_has_its_status(server: ServerProcess) -> None:
    quiet = quiet_state(server)
    good = {"model": "hamlet", "prompt": "Who", "max_tokens": 2}
    cases: list[tuple[Any, str, int, str | None]] = [
        (b"{", KEY, 400, "invalid_json"),
        (b"\xff\xfe", KEY, 400, "invalid_json"),
        (b"[" * 60_000, KEY, 400, None),
        (b'"text"', KEY, 400, None),
        (b"", KEY, 400, "invalid_json"),
        (good, "wrong", 401, "invalid_api_key"),
        (good, "", 401, "invalid_api_key"),
        ({**good, "prompt": "word " * 8000}, KEY, 400, "context_length_exceeded"),
        ({**good, "prompt": "x" * 70_000}, KEY, 413, "request_too_large"),
        ({**good, "model": "other"}, KEY, 404, "model_not_found"),
        ({**good, "n": 0}, KEY, 400, None),
        ({**good, "prompt": "\ud800 alone"}, KEY, 400, "invalid_json"),
        ({**good, "prompt": ""}, KEY, 200, None),
        ({**good, "prompt": []}, KEY, 400, None),
        ({**good, "max_tokens": 0}, KEY, 200, None),
        ({**good, "temperature": 0, "seed": -(2**63)}, KEY, 200, None),
    ]
    for body, key, status, code in cases:
        found, answer, _ = server.post("/v1/completions", body, key)
        assert found == status, (body, answer)
        if status != 200:
            assert set(answer["error"]) == {"message", "type", "param", "code"}
            assert code in (None, answer["error"]["code"])
    assert server.post("/v1/nothing", good)[0] == 404
    assert server.post("/v1/models", good)[0] == 405
    client = Client(server)  # a body that does not come
    client.socket.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
                          + f"Authorization: Bearer {KEY}\r\n\r\n{{".encode())  # fmt: skip
    assert client.socket.recv(100).startswith(b"HTTP/1.1 408 ")
    client.close()
    wait_for(lambda: quiet_state(server) == quiet)


def test_a_full_queue_says_when_to_come_back(run: Path) -> None:
    server = ServerProcess(run, "--max-batch", "1", "--max-queue", "1")
    clients = [Client(server) for _ in range(2)]
    for client in clients:
        client.ask(LASTING)
    wait_for(lambda: server.metrics()["llm_serve_running"] + server.metrics()["llm_serve_waiting"] == 2)
    status, answer, headers = server.post("/v1/completions", {**LASTING, "stream": False})
    assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 1 <= int(headers["retry-after"]) <= 60
    for client in clients:
        client.close()
    wait_for(lambda: server.metrics()["llm_serve_running"] + server.metrics()["llm_serve_waiting"] == 0)
    assert server.post("/v1/completions", {**LASTING, "stream": False, "max_tokens": 3})[0] == 200
    assert server.stop(signal.SIGINT) == 0


def get(server: ServerProcess, path: str) -> int:
    try:
        with urllib.request.urlopen(server.url + path, timeout=LIMIT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def read_all(client: Client) -> bytes:
    data = b""
    while part := client.socket.recv(1 << 16):
        data += part
    client.close()
    return data


def test_sigterm_lets_what_was_begun_end(run: Path) -> None:
    server = ServerProcess(run)
    assert (get(server, "/healthz"), get(server, "/readyz")) == (200, 200)
    client = Client(server)
    client.ask({**LASTING, "n": 2, "max_tokens": 2000})
    answer: list[bytes] = []
    reading = threading.Thread(target=lambda: answer.append(read_all(client)))
    reading.start()
    wait_for(lambda: server.metrics()["llm_serve_running"] == 2)
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: get(server, "/readyz") == 503)
    assert get(server, "/healthz") == 200
    status, refusal, headers = server.post("/v1/completions", {**LASTING, "stream": False})
    assert (status, refusal["error"]["code"]) == (503, "shutting_down")
    assert "retry-after" in headers
    assert server.stop() == 0
    reading.join(LIMIT_S)
    assert answer[0].count(b'"finish_reason":"length"') == 2
    assert b"data: [DONE]" in answer[0]


def test_a_stop_request_with_little_time_breaks_off_and_says_so(run: Path, tmp_path: Path) -> None:
    control = tmp_path / "control"
    server = ServerProcess(run, "--drain-s", "600", control=control, LLMOPS_RUN_URL=str(tmp_path))
    endpoint = json.loads((tmp_path / "endpoint.json").read_text())
    assert (endpoint["port"], endpoint["model"]) == (server.port, "hamlet")
    wait_for(lambda: json.loads((control / "heartbeat.0").read_text())["phase"] == "serving")
    client = Client(server)
    client.ask({**LASTING, "n": 8})
    wait_for(lambda: server.metrics()["llm_serve_running"] == 8)
    (control / ".stop").write_text(json.dumps({"cause": "preempted", "deadline": time.time() + 10.5}))
    (control / ".stop").rename(control / "stop")
    answer = read_all(client)
    assert b'"code":"shutting_down"' in answer
    assert b"[DONE]" not in answer
    assert server.process.wait(LIMIT_S) == 75
    assert server.stop() == 75
    assert json.loads((control / "stopped.0").read_text())["step"] == 7
