"""Nothing is unpickled that the user's own key has not signed for this place."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmops.errors import RunFailed, UserError
from llmops.functions import call, job, signed
from llmops.runs import records
from llmops.runs.store import open_store
from tests.conftest import MadeRun, RunMaker
from tests.functions.work import add


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path


@pytest.fixture
def made(make_run: RunMaker) -> MadeRun:
    """A run that called a function and has finished, as far as its store says."""
    made = make_run("add", backend="local", command=["python3", "-m", call.MODULE])
    made.submission(0, "1")
    made.start(0, job_id="1")
    made.end(0, "finished")
    return made


def place(made: MadeRun, **changes: Any) -> job.Place:
    run = made.load()
    own = job.Place(signed.load_key(make=True), open_store(run.url), run.id, 0, 0, 0, None)
    return replace(own, **changes)


def put_call(made: MadeRun, data: bytes, **header: Any) -> None:
    run_id = made.load().id
    head = {"python": call.python_version(), "path": "", **header}
    made.store.put("calls/0000", signed.seal(signed.load_key(make=True), f"{run_id}/calls/0000", head, data))


def test_there_and_back(made: MadeRun) -> None:
    for name, data in call.sealed(made.load().id, [call.pickled(add, (1,), {"b": 2})], None).items():
        made.store.create(name, data)
    before = {name: made.store.get(f"calls/{name}") for name in made.store.list("calls")}
    assert list(before) == ["0000"]
    found = place(made).load()
    assert (found.function, found.args, found.kwargs) == (add, (1,), {"b": 2})
    place(made).write("value", pickle.dumps({"x": 1}))
    assert call.returned(made.load(), 0, "finished", "") == {"x": 1}


def test_who_has_no_key_cannot_make_anybody_unpickle(made: MadeRun, home: Path) -> None:
    bomb = pickle.dumps(Bomb(home / "went-off"))
    run_id = made.load().id
    head = {"kind": "value", "text": "", "python": call.python_version(), "path": ""}
    signed.load_key(make=True)
    for attempt in (bomb, b"", signed.seal(b"0" * 64, f"{run_id}/returned/0000-0000", head, bomb)):
        made.store.put("returned/0000-0000", attempt)
        with pytest.raises(RunFailed, match="not unpickled"):
            call.returned(made.load(), 0, "finished", "")
    for attempt in (bomb, b"", signed.seal(b"0" * 64, f"{run_id}/calls/0000", head, bomb)):
        made.store.put("calls/0000", attempt)
        with pytest.raises(job.Refused, match="not unpickled"):
            place(made).load()
    assert not (home / "went-off").exists()


@pytest.mark.parametrize("elsewhere", ["other/returned/0000-0000", "{}/returned/0001-0000", "{}/returned/0000-0001"])
def test_what_was_signed_for_another_place_does_not_count_here(made: MadeRun, elsewhere: str) -> None:
    head = {"kind": "value", "text": "", "python": call.python_version()}
    name = elsewhere.format(made.load().id)
    made.store.put("returned/0000-0000", signed.seal(signed.load_key(make=True), name, head, pickle.dumps(1)))
    with pytest.raises(RunFailed, match="copied or changed"):
        call.returned(made.load(), 0, "finished", "")


def test_every_byte_is_signed(made: MadeRun) -> None:
    place(made).write("value", pickle.dumps(1))
    good = made.store.get("returned/0000-0000")
    for at in range(len(good)):
        made.store.put("returned/0000-0000", good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(RunFailed, match="not unpickled"):
            call.returned(made.load(), 0, "finished", "")


def test_a_key_that_others_can_read_is_refused() -> None:
    signed.load_key(make=True)
    assert signed.key_file().stat().st_mode & 0o777 == 0o600
    signed.key_file().chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        signed.load_key()


def test_a_job_without_the_key_says_so() -> None:
    with pytest.raises(UserError, match="home folder"):
        signed.load_key()


def test_another_python_is_named_and_nothing_is_loaded(made: MadeRun, home: Path) -> None:
    put_call(made, pickle.dumps(Bomb(home / "went-off")), python="3.9")
    assert job.run(place(made)) == 2
    with pytest.raises(RunFailed, match=r"submitted by Python 3\.9, and the job runs Python 3\.1.*cluster\.python"):
        call.returned(made.load(), 0, "failed", "")
    assert not (home / "went-off").exists()


def test_a_result_of_another_python_is_not_loaded(made: MadeRun) -> None:
    head = {"kind": "value", "text": "", "python": "3.9"}
    name = f"{made.load().id}/returned/0000-0000"
    made.store.put("returned/0000-0000", signed.seal(signed.load_key(make=True), name, head, b"not even a pickle"))
    with pytest.raises(UserError, match=r"Python 3\.9"):
        call.returned(made.load(), 0, "finished", "")


def test_a_module_that_the_job_does_not_have_is_named(made: MadeRun) -> None:
    put_call(made, b"cnowhere.to_be_found\nf\n.")
    assert job.run(place(made)) == 2
    with pytest.raises(RunFailed, match=r"No module named 'nowhere'.*code snapshot"):
        call.returned(made.load(), 0, "failed", "")


def test_the_newest_state_saved_before_an_attempt_is_what_it_calls(made: MadeRun) -> None:
    put_call(made, pickle.dumps("first"))
    for attempt in (0, 2, 5):
        place(made, attempt=attempt).save(pickle.dumps(f"saved by {attempt}"))
    assert [place(made, attempt=number).load() for number in (0, 1, 3, 5, 6)] == [
        "first",
        "saved by 0",
        "saved by 2",
        "saved by 2",
        "saved by 5",
    ]


def test_an_element_calls_its_own(tmp_path: Path) -> None:
    study = "20260101-000000-x-aaaa-sweep"
    store = open_store(tmp_path / "runs" / study)
    for name, data in call.sealed(study, [pickle.dumps(number) for number in range(3)], None).items():
        store.create(name, data)
    trial = records.trial_id(study, 2)
    own = job.Place(signed.load_key(), store.sub(f"trials/{trial}"), trial, 0, 0, 2, None)
    assert own.load() == 2
