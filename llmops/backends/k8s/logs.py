"""What a job's pods print, as their nodes still have it: of pods too that never got as far as the run store."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from llmops.backends.k8s import pods as pod_words
from llmops.backends.k8s.client import Api, backoff, lines
from llmops.backends.k8s.explain import ApiError, Unanswered
from llmops.backends.k8s.resources import INDEX, MANAGED, POD, POD_LABEL, JobId
from llmops.backends.k8s.watch import watch
from llmops.errors import ClusterError

MAX_FOLLOWED = 128  # connections at once
READERS = 8
QUIET_S = 300.0  # a stream without a line for so long is opened anew: its connection may be dead
LOOK_S = 2.0  # how often ``done`` is asked while nothing comes
UNCONFIRMED = 5  # times that a stream may end before the watch has said that the pod is over

_WAITING = re.compile(r"is waiting to start: (?P<why>.*)", re.DOTALL)
_COLLECTED = b"unable to retrieve container logs for "


class PodLine(NamedTuple):
    """One line of a pod. ``note``: ours about the pod, where it has printed nothing."""

    pod: str
    text: str
    note: bool = False


def tail(api: Api, job: JobId, n: int | None = None) -> Iterator[PodLine]:
    """The last ``n`` lines (None: all) of each pod of the job, pod by pod."""
    pods = api.list(POD, job.namespace, selector(job))[0]
    pods.sort(key=lambda pod: str(pod["metadata"]["name"]))
    with ThreadPoolExecutor(READERS) as readers:
        for block in readers.map(lambda pod: list(_read(api, job.namespace, pod, n)), pods):
            yield from block


def follow(
    api: Api, job: JobId, done: Callable[[], bool], n: int | None = 10, wait_s: float = LOOK_S
) -> Iterator[PodLine]:
    """The last ``n`` lines of each pod, then every line as it comes, of new pods too.

    Costs one list, one watch and a connection for each running pod, of which at most :data:`MAX_FOLLOWED` are read.
    Ends after ``done()`` said True and what had come by then was given out; it is asked while nothing comes.
    """
    follower = _Follower(api, job, n)
    follower.start()
    over = False
    try:
        while True:
            try:
                line = follower.lines.get(timeout=wait_s)
            except queue.Empty:
                if over and not follower.reading():
                    return
                over = over or done()
                continue
            if isinstance(line, BaseException):
                raise line
            yield line
    finally:
        follower.stop()


def selector(job: JobId) -> str:
    """The labels of the job's pods; of an element of an array, of its own."""
    element = "" if job.position is None else f",{INDEX}={job.position}"
    return f"{MANAGED},{POD_LABEL[job.kind]}={job.name}{element}"


def _read(api: Api, namespace: str, pod: dict[str, Any], n: int | None) -> Iterator[PodLine]:
    """What one pod has printed; a note where it has printed nothing and something is wrong."""
    name = str(pod["metadata"]["name"])
    query: dict[str, Any] = {"container": _container(pod)}
    if n is not None:
        query["tailLines"] = n
    nothing = True
    try:
        answer = api.stream(POD.path(namespace, name, "log"), query, QUIET_S)
        try:
            for line in lines(answer):
                nothing = False
                yield _line(name, line)
        finally:
            answer.release_conn()
    except Unanswered as error:
        yield PodLine(name, f"(the rest cannot be read: {error})", note=True)
        return
    except ApiError as error:
        yield PodLine(name, refusal(error, pod), note=True)
        return
    if nothing and n != 0:
        told = pod_words.trouble(pod)
        yield PodLine(name, f"(no output{f': {told}' if told else ''})", note=True)


def refusal(error: ApiError, pod: dict[str, Any]) -> str:
    """Why a pod's log cannot be had, as a note. Raises the error where it is not about the pod."""
    if error.status == 404 and not error.unserved:
        return "(the pod is gone, and its log with it)"
    waiting = _WAITING.search(error.message)
    if error.status == 400 and waiting:
        return f"(no output yet: {pod_words.trouble(pod) or waiting['why']})"
    if error.status == 400 or error.status >= 500:  # 500: its node does not answer
        return f"(no log: {error})"
    raise error


def _line(name: str, line: bytes) -> PodLine:
    if line.startswith(_COLLECTED):  # sent with a 200
        return PodLine(name, "(its container was removed from the node, and its log with it)", note=True)
    return PodLine(name, line.decode("utf-8", "replace").rstrip("\r"))


def _container(pod: dict[str, Any]) -> str:
    """The first: what others there are was injected, and without a name the server refuses several."""
    return str(pod["spec"]["containers"][0]["name"])


class _Follower:
    """One thread that watches the pods, and one for each pod that is read."""

    def __init__(self, api: Api, job: JobId, n: int | None) -> None:
        self.api, self.job, self.n = api, job, n
        self.lines: queue.Queue[PodLine | BaseException] = queue.Queue(maxsize=10_000)
        self._lock = threading.Lock()
        self._pods: dict[str, dict[str, Any]] = {}  # by uid, as last seen; those that are gone are not here
        self._readers: dict[str, threading.Thread] = {}
        self._stopped = threading.Event()
        self._told: set[tuple[str, str]] = set()

    def start(self) -> None:
        threading.Thread(target=self._guarded, args=(self._watch,), name="pods", daemon=True).start()

    def stop(self) -> None:
        """The threads end with their next line or answer; they are daemons, and hold no state."""
        self._stopped.set()

    def reading(self) -> bool:
        with self._lock:
            return any(thread.is_alive() for thread in self._readers.values())

    def _guarded(self, run: Callable[..., None], *args: Any) -> None:
        try:
            run(*args)
        except ClusterError as error:
            if not self._stopped.is_set():
                self._put(error)

    def _put(self, line: PodLine | BaseException) -> None:
        """Wait for room: who reads slowly slows the streams down."""
        while not self._stopped.is_set():
            try:
                self.lines.put(line, timeout=1.0)
                return
            except queue.Full:
                continue

    def _watch(self) -> None:
        stopped = self._stopped.is_set
        for change in watch(self.api, POD, self.job.namespace, selector(self.job), stopped):
            if stopped():
                return
            if change.kind == "LISTED":
                continue
            uid = str(change.item["metadata"]["uid"])
            with self._lock:
                if change.kind == "DELETED":
                    self._pods.pop(uid, None)
                else:
                    self._pods[uid] = change.item
            if change.kind != "DELETED":
                self._consider(uid, change.item)

    def _consider(self, uid: str, pod: dict[str, Any]) -> None:
        """Read a pod that has something to read; say what is wrong with one that has not, once for each cause."""
        name = str(pod["metadata"]["name"])
        states = pod["status"].get("containerStatuses") or []
        started = any(
            "running" in each.get("state", {}) or "terminated" in {**each.get("lastState", {}), **each.get("state", {})}
            for each in states
        )
        told = pod_words.trouble(pod)
        if told not in ("", "starting", "waits for the scheduler") and (uid, told) not in self._told:
            self._told.add((uid, told))
            self._put(PodLine(name, f"({told})", note=True))
        with self._lock:
            if not started or uid in self._readers:
                return
            alive = sum(thread.is_alive() for thread in self._readers.values())
            if alive < MAX_FOLLOWED:
                reader = threading.Thread(
                    target=self._guarded, args=(self._pod, uid, pod), name=f"log {name}", daemon=True
                )
                self._readers[uid] = reader
                reader.start()
                return
        if ("", "many") not in self._told:
            self._told.add(("", "many"))
            self._put(
                PodLine(name, f"(more than {MAX_FOLLOWED} pods run; this one and others are not read)", note=True)
            )

    def _pod(self, uid: str, pod: dict[str, Any]) -> None:
        """Follow one pod until its containers have ended, over as many connections as it takes."""
        name, place = str(pod["metadata"]["name"]), _Place()
        failures = ends = 0
        while not self._stopped.is_set():
            with self._lock:
                now = self._pods.get(uid)
            if now is None:  # another pod may have its name by now
                return
            over = pod_words.over(now)
            query: dict[str, Any] = {"container": _container(pod), "follow": "true", "timestamps": "true"}
            if place.time:
                query["sinceTime"] = place.time
            elif self.n is not None:
                query["tailLines"] = self.n
            began, whole = time.monotonic(), False
            try:
                self._stream(name, query, place)
                whole, ends = True, ends + 1
            except ApiError as error:
                if error.status == 429 or (error.status >= 500 and failures < UNCONFIRMED):
                    failures += 1
                elif error.status == 400 and _WAITING.search(error.message) and not over:
                    ends = 0  # between two containers of the same pod
                else:
                    note = refusal(error, pod)
                    if not place.time:  # of a pod whose lines were shown, people know
                        self._put(PodLine(name, note, note=True))
                    return
            except Unanswered:
                failures += 1  # its lines are the node's to give again: the run's own log has them all
            if (over and whole) or ends >= UNCONFIRMED or failures >= 4 * UNCONFIRMED:
                return
            if time.monotonic() - began > QUIET_S / 10:
                failures = ends = 0
            self._stopped.wait(backoff(max(1, failures + ends)))

    def _stream(self, name: str, query: dict[str, Any], place: _Place) -> None:
        answer = self.api.stream(POD.path(self.job.namespace, name, "log"), query, QUIET_S)
        place.again()
        try:
            for line in lines(answer):
                if self._stopped.is_set():
                    return
                if line.startswith(_COLLECTED):
                    self._put(_line(name, line))
                    return
                stamp, _, text = line.partition(b" ")
                if place.new(stamp.decode("ascii", "replace")):
                    self._put(_line(name, text))
        finally:
            answer.close()


class _Place:
    """How far a pod's log was read: ``sinceTime`` gives lines of its own time, or second, once more."""

    def __init__(self) -> None:
        self.time = ""  # RFC 3339 with nanoseconds, as the node sends it
        self._at_time = 0  # lines of just that time that were given out
        self._skip = 0
        self._until = ""

    def again(self) -> None:
        """A connection begins: what it repeats is skipped."""
        self._until, self._skip = self.time, self._at_time

    def new(self, stamp: str) -> bool:
        if self._until:
            if _fixed(stamp) < _fixed(self._until):
                return False
            if stamp == self._until and self._skip:
                self._skip -= 1
                return False
            self._until = ""
        self._at_time = self._at_time + 1 if stamp == self.time else 1
        self.time = stamp
        return True


def _fixed(stamp: str) -> str:
    """With nine digits of fraction, so that two of one zone compare as text: Go leaves trailing zeros out."""
    match = re.fullmatch(r"([^.Z+]*)(?:\.(\d+))?(.*)", stamp)
    return f"{match[1]}.{(match[2] or '').ljust(9, '0')}" if match else stamp
