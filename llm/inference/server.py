"""``python -m llm.inference.server --run-url RUN``: a run's model behind OpenAI's API. See docs/serving.md.

Exit codes: 0 ended by a signal, 1 the engine failed or there is no sound checkpoint, 2 what was given cannot work, 75
ended by a supervisor's stop request.
"""

import sys

from llm.train.control import EXIT_STOPPED, Control, settle_signals

if __name__ == "__main__":
    settle_signals()  # before anything slow

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import msgspec

from llm.inference.serving import ServeConfig, ServingConfig, memory_blocks
from llm.utils.config import ConfigError, load, read
from llm.utils.storage import open_storage

if TYPE_CHECKING:
    from llm.checkpoint.format import Commit
    from llm.inference.app import Service
    from llm.inference.batching import Engine

POLL_S = 0.2
HEARTBEAT_S = 10.0
CLOSE_S = 5.0  # for clients to take the end of their answers
SEND_BUFFER = 1 << 18  # bytes the kernel keeps for a client that does not read
ENDPOINT = "endpoint.json"  # in the serving run's directory: where it listens


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal or a stop request; returns the exit code."""
    from llm.checkpoint.format import CheckpointError

    try:
        return run(configure(_parser().parse_args(argv)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(serving: ServingConfig) -> int:
    """Everything after the config is read. Raises ConfigError, CheckpointError, OSError."""
    if not serving.run:
        raise ConfigError("no run to serve: give --run-url, or run in the config")
    config = serving.serve
    key = _key(config.api_key_env)
    listener = listen(config)
    control = Control(0, os.environ.get("LLMOPS_CONTROL_DIR"))
    control.heartbeat("load")
    make, commit = _engine(serving.run, serving, config)
    name = config.name or serving.run.rstrip("/").rpartition("/")[2]
    failed = asyncio.run(_serve(make, config, name, key, listener, control, commit.step))
    if failed is not None:
        print(f"error: the engine failed: {type(failed).__name__}: {failed}", file=sys.stderr)
        return 1
    if control.directory is None:
        return 0
    control.stopped(commit.step, commit.path)
    return EXIT_STOPPED


def listen(config: ServeConfig) -> socket.socket:
    """An open socket. Raises ConfigError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Its connections inherit these: a client that reads nothing costs little, and not for ever.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(config.write_timeout_s * 1000))
        listener.bind((config.host, config.port or 0))
    except OSError as error:
        listener.close()
        raise ConfigError(f"serve.host={config.host}, serve.port={config.port}: {error.strerror or error}") from error
    return listener


async def _serve(
    make: Callable[..., "Engine"],
    config: ServeConfig,
    name: str,
    key: str | None,
    listener: socket.socket,
    control: Control,
    step: int,
) -> Exception | None:
    """Serve until somebody wants an end; the engine's failure, where that was it."""
    from llm.inference.app import Service

    service = Service(make, config, name, key)
    interrupted = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupted.set)
    server = _http(service)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not (server.started or serving.done()):
            await asyncio.wait({serving}, timeout=0.01)
        _announce(config, name, listener, step)
        beat = 0.0
        while not (interrupted.is_set() or control.stop_requested() or service.engine.failed or serving.done()):
            if time.monotonic() >= beat:
                control.heartbeat("serving")
                beat = time.monotonic() + HEARTBEAT_S
            await asyncio.wait({serving}, timeout=POLL_S)
        await _drain(service, _deadline(config, control))
    finally:
        service.close()
        server.should_exit = True
        await serving
    return service.engine.failed


async def _drain(service: "Service", deadline: float) -> None:
    """Take nothing new, and wait for what there is."""
    service.draining = True
    print(f"draining: {service.engine.active} texts are left", file=sys.stderr, flush=True)
    while service.engine.failed is None and (service.engine.active or len(service.readers)):
        if time.time() >= deadline:
            return
        await asyncio.sleep(POLL_S)


def _deadline(config: ServeConfig, control: Control) -> float:
    """When texts that are not done yet are broken off, in epoch seconds: before the supervisor's patience ends."""
    own = time.time() + config.drain_s
    with contextlib.suppress(FileNotFoundError):
        if control.directory is not None:
            own = min(own, float(json.loads((control.directory / "stop").read_text())["deadline"]) - 2 * CLOSE_S)
    return own


def _http(service: "Service") -> Any:
    import uvicorn

    class Server(uvicorn.Server):
        """Leaves signals alone: what they mean is decided here."""

        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None, None, None]:
            yield

    return Server(
        uvicorn.Config(
            service.app, loop="asyncio", ws="none", lifespan="off", log_config=None, access_log=False,
            server_header=False, timeout_graceful_shutdown=int(CLOSE_S),
        )
    )  # fmt: skip


def _announce(config: ServeConfig, name: str, listener: socket.socket, step: int) -> None:
    """Tell where it listens: on stdout, and in the run's directory where it is a run's job."""
    port = listener.getsockname()[1]
    host = f"[{config.host}]" if ":" in config.host else config.host
    if url := os.environ.get("LLMOPS_RUN_URL"):
        record = {
            "host": config.host,
            "port": port,
            "node": os.environ.get("LLMOPS_POD") or socket.gethostname(),
            "model": name,
            "step": step,
            "time": time.time(),
            "attempt": os.environ.get("LLMOPS_ATTEMPT"),
        }
        open_storage(url).replace(ENDPOINT, json.dumps(record).encode())
    print(f"serving {name} (step {step}) at http://{host}:{port}/v1", flush=True)


def _engine(run_url: str, serving: ServingConfig, config: ServeConfig) -> "tuple[Callable[..., Engine], Commit]":
    import torch

    from llm.eval.watch import select
    from llm.inference.batching import Engine
    from llm.inference.load import load_model, load_run_tokenizer
    from llm.inference.paged import BLOCK, block_bytes

    training = load(f"{run_url.rstrip('/')}/config.yaml")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, config.dtype)
    model, commit = load_model(training, run_url, device, dtype, select(open_storage(run_url), serving.step))
    tokenizer = load_run_tokenizer(run_url, commit)
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else None
    blocks = memory_blocks(config, training.model.max_seq_len, BLOCK, block_bytes(training.model, dtype), free)

    def make(deliver: Callable[..., None]) -> Engine:
        return Engine(
            model, tokenizer, deliver, blocks=blocks, max_batch=config.max_batch, step_tokens=config.step_tokens,
            max_queue=config.max_queue,
        )  # fmt: skip

    return make, commit


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    if not (key := os.environ.get(name)):
        raise ConfigError(f"serve.api_key_env={name}: there is no such variable, or it is empty")
    return key


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llm.inference.server", description="Serve a trained model.")
    parser.add_argument("--config", metavar="FILE", help="YAML with run, step and serve; flags win over it")
    parser.add_argument("--run-url", metavar="URL", help="run directory: a path or an fsspec URL")
    parser.add_argument("--step", type=lambda text: text if text == "newest" else int(text), metavar="N",
                        help="which checkpoint (default: the newest)")  # fmt: skip
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=int, help="default: a free one")
    parser.add_argument("--name", help="what the model is called (default: the name of the run's directory)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of weights and cache")
    parser.add_argument("--max-batch", type=int, metavar="N", help="texts that are written together")
    parser.add_argument("--step-tokens", type=int, metavar="N", help="tokens of one forward, prompts' included")
    parser.add_argument("--cache-mb", type=float, metavar="MB", help="memory of keys and values")
    parser.add_argument("--max-queue", type=int, metavar="N", help="texts that may wait; more are refused with 429")
    parser.add_argument("--max-body-kb", type=int, metavar="KB", help="the largest request")
    parser.add_argument("--write-timeout-s", type=float, metavar="S", help="how long a client may read nothing")
    parser.add_argument("--drain-s", type=float, metavar="S", help="how long texts may go on after a signal to end")
    parser.add_argument("--api-key-env", metavar="NAME", help="variable with the key that clients have to send")
    return parser


def configure(options: argparse.Namespace) -> ServingConfig:
    """The file with the flags in it. Raises ConfigError."""
    base = read(options.config, ServingConfig) if options.config else ServingConfig()
    given = {name: value for name, value in vars(options).items() if value is not None and name != "config"}
    data = msgspec.to_builtins(base)
    data["run"], data["step"] = given.pop("run_url", base.run), given.pop("step", base.step)
    try:
        return msgspec.convert({**data, "serve": {**data["serve"], **given}}, ServingConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{options.config or 'command line'}: {str(error).replace('$.', '')}") from error


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written. Taking the interpreter with torch apart would cost seconds of what a stop request leaves.
    os._exit(code)
