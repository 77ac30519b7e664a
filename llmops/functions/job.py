"""``python -m llmops.functions.job``: a rank that calls a function, under the supervisor.

On a stop request the supervisor sends SIGTERM. A function with submitit's ``checkpoint()`` is asked by it what to call
next time, in the main thread, between two of the function's own instructions; the next attempt calls that. Any other
function is called anew.

Exit codes: 0 it returned, 1 it raised, 2 it could not be called, 75 it was stopped and its state is saved.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from llmops.errors import ClusterError, UserError
from llmops.functions import signed
from llmops.functions.call import NUMBER, dumps, name_of, python_version
from llmops.runs.store import Store, open_store

STOPPED = 75


class Refused(Exception):
    """The function cannot be called. One line."""


@dataclass(frozen=True)
class Place:
    """Where this rank is, and what it may read and write."""

    key: bytes
    store: Store  # the run's
    run_id: str
    attempt: int
    rank: int
    call: int
    control: Path | None  # the directory in which the supervisor is told that the state is saved

    @classmethod
    def here(cls, environ: dict[str, str]) -> Place:
        """As the supervisor tells it in the environment."""
        try:
            control = environ.get("LLMOPS_CONTROL_DIR")
            return cls(
                signed.load_key(),
                open_store(environ["LLMOPS_RUN_URL"]),
                environ["LLMOPS_RUN_ID"],
                int(environ["LLMOPS_ATTEMPT"]),
                int(environ["RANK"]),
                int(environ.get(NUMBER, "0")),
                Path(control) if control else None,
            )
        except KeyError as error:
            raise UserError(f"{error.args[0]} is not set: this program is started by llmops.submit") from error

    def source(self) -> tuple[Store, str, str]:
        """The object that holds what is to be called: its store, its run or study, and its name there."""
        before = [int(name) for name in self.store.list("saved") if name.isdigit() and int(name) < self.attempt]
        if before:
            return self.store, self.run_id, f"saved/{max(before):04d}"
        study, dot, _ = self.run_id.rpartition(".")
        if not dot:
            return self.store, self.run_id, f"calls/{self.call:04d}"
        return open_store(self.store.url.rsplit("/", 2)[0]), study, f"calls/{self.call:04d}"

    def load(self) -> Any:
        """The call. Raises :class:`Refused` for one that cannot be made here."""
        store, owner, name = self.source()
        try:
            found = signed.unseal(self.key, f"{owner}/{name}", store.get(name))
        except (FileNotFoundError, signed.Forged) as error:
            raise Refused(f"{store.url}: {error}") from error
        if found.header["python"] != python_version():
            raise Refused(
                f"the function was submitted by Python {found.header['python']}, and the job runs Python "
                f"{python_version()} ({sys.executable}): set cluster.python to one of the same version"
            )
        if found.header["path"]:
            sys.path.insert(0, str(Path(found.header["path"]).absolute()))
        try:
            return pickle.loads(found.payload)  # noqa: S301 - signed by this user, for this place
        except Exception as error:  # loading runs code of whatever was pickled
            raise Refused(
                f"the function cannot be loaded in the job ({type(error).__name__}: {error}); what it imports must be "
                "installed there, or be in the code snapshot"
            ) from error

    def write(self, kind: str, payload: bytes = b"", text: str = "") -> None:
        """Store what became of the call."""
        name = f"returned/{self.attempt:04d}-{self.rank:04d}"
        header = {"kind": kind, "text": text, "python": python_version()}
        self.store.create(name, signed.seal(self.key, f"{self.run_id}/{name}", header, payload), mode=0o600)

    def save(self, payload: bytes) -> None:
        """Store what the next attempt calls."""
        name = f"saved/{self.attempt:04d}"
        header = {"python": python_version(), "path": ""}
        self.store.create(name, signed.seal(self.key, f"{self.run_id}/{name}", header, payload), mode=0o600)

    def tell_saved(self) -> None:
        """Tell the supervisor that this rank has nothing left to lose."""
        if self.control is not None:
            aside = self.control / f".stopped.{self.rank}"
            aside.write_text(json.dumps({"step": None}))
            aside.replace(self.control / f"stopped.{self.rank}")


class Stop:
    """What is done on a stop signal."""

    def __init__(self, place: Place, call: Any) -> None:
        self.place, self.call = place, call
        self.code: int | None = None  # with which this rank leaves

    def listen(self) -> None:
        """From here on. The second signal is the one that submitit's own jobs are stopped by."""
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self.heard)

    def close(self) -> None:
        """The call is over: nothing is left to save, and what it returned is stored whatever is asked for now."""
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)

    def heard(self, number: int, frame: FrameType | None) -> None:
        """Save and leave, by an exception that lets the function's own ``finally`` run."""
        if self.code is not None:
            return
        self.code = 128 + number
        if self._save():
            self.place.tell_saved()
            self.code = STOPPED
        raise SystemExit(self.code)

    def _save(self) -> bool:
        """Whether the next attempt goes on. As with submitit, rank 0 alone is asked."""
        function = self.call.function
        if not hasattr(function, "checkpoint") and not hasattr(function, "__submitit_checkpoint__"):
            _say(f"{name_of(function)} has no checkpoint(): the next attempt calls it anew")
            return False
        if self.place.rank != 0:
            return True
        try:
            again = self.call._checkpoint_function()
            if again is None:
                _say(f"{name_of(function)}.checkpoint() returned None: the next attempt calls it anew")
                return False
            self.place.save(dumps(again))
        except Exception:  # noqa: BLE001 - whatever it is, the attempt ends here, and says why
            traceback.print_exc()
            _say(f"{name_of(function)}.checkpoint() failed: the next attempt goes on from what was saved before")
            return False
        return True


def run(place: Place) -> int:
    """Make the call and store what came of it."""
    try:
        call = place.load()
    except Refused as error:
        place.write("refused", text=str(error))
        _say(str(error))
        return 2
    stop = Stop(place, call)
    try:
        stop.listen()
        value = call.result()
    except Exception as error:  # noqa: BLE001 - whatever it raises is raised again where it was submitted
        stop.close()
        if stop.code is not None:
            return stop.code
        text = "".join(traceback.format_exception(_shortened(error)))
        sys.stderr.write(text)
        place.write("error", _pickled_error(error), text)
        return 1
    except SystemExit as leaving:
        stop.close()
        if stop.code is not None or leaving.code == STOPPED:  # the second: it takes part in the stop by itself
            return stop.code if stop.code is not None else STOPPED
        text = f"{name_of(call.function)} left by SystemExit({leaving.code!r}) instead of returning"
        place.write("refused", text=text)
        _say(text)
        return 1
    stop.close()
    if stop.code is not None:  # it took the exception for its own; what it returned is not what was asked for
        return stop.code
    try:
        payload = dumps(value)
    except Exception as error:  # noqa: BLE001 - pickling runs code of whatever is pickled
        text = f"what {name_of(call.function)} returned cannot be pickled ({type(error).__name__}: {error})"
        place.write("refused", text=text)
        _say(text)
        return 1
    place.write("value", payload)
    return 0


def _shortened(error: Exception) -> Exception:
    """Without the frames of this module and of submitit, which called the function."""
    trace = error.__traceback__
    for _ in range(2):
        trace = trace.tb_next if trace and trace.tb_next else trace
    return error.with_traceback(trace)


def _pickled_error(error: Exception) -> bytes:
    """Empty where it cannot be loaded again, as with an ``__init__`` of other arguments."""
    try:
        data = dumps(error)
        pickle.loads(data)  # noqa: S301 - made in the line above
    except Exception:  # noqa: BLE001 - its traceback is told instead
        return b""
    return data


def _say(text: str) -> None:
    print(f"llmops: {text}", file=sys.stderr, flush=True)


def submitit_environment(environ: dict[str, str]) -> dict[str, str]:
    """What ``submitit.JobEnvironment`` reads: ranks and nodes as the supervisor placed them."""
    return {
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_JOB_ID": environ["LLMOPS_RUN_ID"],
        "SUBMITIT_LOCAL_NTASKS": environ["WORLD_SIZE"],
        "SUBMITIT_LOCAL_JOB_NUM_NODES": str(int(environ["WORLD_SIZE"]) // int(environ["LOCAL_WORLD_SIZE"])),
        "SUBMITIT_LOCAL_NODEID": environ["NODE_RANK"],
        "SUBMITIT_LOCAL_GLOBALID": environ["RANK"],
        "SUBMITIT_LOCAL_LOCALID": environ["LOCAL_RANK"],
    }


def main() -> int:
    """Find out where this is, and make the call."""
    try:
        place = Place.here(dict(os.environ))
        os.environ.update(submitit_environment(dict(os.environ)))
        return run(place)
    except (UserError, ClusterError) as error:
        _say(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
