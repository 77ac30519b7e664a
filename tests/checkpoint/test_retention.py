"""Which checkpoints stay: the rules, the lineage they apply to, and that nothing goes which somebody holds."""

from __future__ import annotations

import threading
import time

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.checkpoint import leases, retention
from llm.checkpoint.format import MANIFEST, CheckpointError, Commit
from llm.checkpoint.leases import MARGIN_S, LeaseRecord, lease, leased, read_leases
from llm.checkpoint.lineage import commits, is_committed, newest_commit, read_manifest
from llm.checkpoint.retention import CommitInfo, Retention, lineage, metrics_of, plan
from llm.checkpoint.tags import add_tag
from llm.checkpoint.verify import verify
from llm.utils.local_storage import LocalStorage
from llm.utils.storage import open_storage
from tests.checkpoint.maker import make_commit

HELD = [{"x": (np.arange(4, dtype=np.float32), [4], [0])}]


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path)


def at(step, attempt=0, generation=0):
    return Commit(attempt=attempt, generation=generation, step=step)


def info(step, **metrics):
    return CommitInfo(commit=at(step), metrics=metrics)


def steps(commits):
    return [commit.step for commit in commits]


# The rules

TEN = [info(step, loss=100 / step) for step in range(10, 110, 10)]


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ({}, list(range(10, 110, 10))),
        ({"keep_last": 1}, [100]),
        ({"keep_last": 3}, [80, 90, 100]),
        ({"keep_last": 99}, list(range(10, 110, 10))),
        ({"keep_every": 50}, [50, 100]),
        ({"keep_every": 30}, [30, 60, 90, 100]),
        ({"keep_every": 1000}, [100]),
        ({"keep_best": "loss:max"}, [10, 100]),
        ({"keep_best": "loss:min"}, [100]),
        ({"keep_best": "accuracy:max"}, [100]),
        ({"keep_last": 2, "keep_every": 40, "keep_best": "loss:max"}, [10, 40, 80, 90, 100]),
    ],
)
def test_rules(keep, left):
    gone = plan(TEN, Retention(**keep), set())
    assert [each.commit.step for each in TEN if each.commit not in gone] == left
    assert steps(plan(TEN, Retention(**keep), {at(70)})) == [step for step in steps(gone) if step != 70]


def test_of_equally_good_ones_the_newest_stays():
    assert steps(plan([info(1, a=1.0), info(2, a=1.0), info(3, a=0.0)], Retention(keep_best="a:max"), set())) == [1]


@pytest.mark.parametrize(
    "keep",
    [
        {"keep_last": 0},
        {"keep_last": -1},
        {"keep_every": 0},
        {"keep_best": "loss"},
        {"keep_best": ":min"},
        {"keep_best": "loss:low"},
    ],
)
def test_rules_that_mean_nothing(keep):
    with pytest.raises(ValueError, match=next(iter(keep))):
        Retention(**keep)
    with pytest.raises(msgspec.ValidationError, match=next(iter(keep))):
        msgspec.convert(keep, Retention)


def test_metrics_are_the_finite_numbers_of_a_state():
    state = {
        "step": 7,
        "metrics": {"loss": 2.5, "eval": {"loss": 2}},
        "on": True,
        "a": [1],
        "b": "1",
        "nan": float("nan"),
    }
    assert metrics_of(state) == {
        "step": 7.0, "metrics.loss": 2.5, "loss": 2.5, "metrics.eval.loss": 2.0, "eval.loss": 2.0,
    }  # fmt: skip


RULES = st.builds(
    Retention,
    keep_last=st.none() | st.integers(1, 8),
    keep_every=st.none() | st.integers(1, 50),
    keep_best=st.none() | st.sampled_from(["loss:min", "loss:max", "none:min"]),
)


@settings(max_examples=150, deadline=None)
@given(st.data(), RULES)
def test_whatever_the_rules_what_must_stay_stays(data, keep):
    wanted = data.draw(st.lists(st.integers(0, 100), unique=True, max_size=12))
    values = [CommitInfo(commit=at(step, step // 40), metrics={"loss": data.draw(st.floats(0, 9))}) for step in wanted]
    protected = {each.commit for each in values if data.draw(st.booleans())}
    gone = plan(values, keep, protected)
    assert gone == sorted(gone)
    assert set(gone) <= {each.commit for each in values}
    assert not set(gone) & protected
    if values:
        assert max(each.commit for each in values) not in gone
    left = [each for each in values if each.commit not in gone]
    assert plan(left, keep, protected) == [], "a second look removes no more"
    if keep == Retention():
        assert gone == []
    if keep.keep_last is not None:
        newest = sorted((each.commit for each in values), reverse=True)[: keep.keep_last]
        assert not set(gone) & set(newest)
    if keep.keep_every is not None:
        assert all(commit.step % keep.keep_every for commit in gone)
    if keep.keep_best in ("loss:min", "loss:max") and values:
        best = (min if keep.keep_best == "loss:min" else max)(each.metrics["loss"] for each in values)
        assert any(each.metrics["loss"] == best for each in left)


# The lineage


class Simulated:
    """Runs as they are: attempts that resume, some of which go on although they were thought dead, and roll back."""

    def __init__(self):
        self.parents = {}
        self.chains = {}  # attempt -> the commits that lead to its present state
        self.position = {}  # attempt -> (step, generation, last step saved)
        self.attempts = 0

    def start(self):
        head = max(self.parents, default=None)
        self.chains[self.attempts] = [*self.true_chain(head)] if head else []
        self.position[self.attempts] = (head.step if head else 0, 0, -1)
        self.attempts += 1

    def true_chain(self, commit):
        chain = []
        while commit is not None:
            chain.append(commit)
            commit = self.parents[commit]
        return chain[::-1]

    def save(self, attempt, steps):
        step, generation, last = self.position[attempt]
        step += steps
        generation += step <= last
        commit = Commit(attempt=attempt, generation=generation, step=step)
        chain = self.chains[attempt]
        self.parents[commit] = chain[-1] if chain else None
        chain.append(commit)
        self.position[attempt] = (step, generation, step)

    def roll_back(self, attempt, index):
        if chain := self.chains[attempt]:
            del chain[index % len(chain) + 1 :]
            self.position[attempt] = (chain[-1].step, *self.position[attempt][1:])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_the_newest_commit_descends_from_is_always_in_its_lineage(data):
    run = Simulated()
    run.start()
    run.save(0, 10)
    moves = st.one_of(
        st.tuples(st.just("start"), st.none()),
        st.tuples(st.sampled_from(["save", "save", "save", "zombie"]), st.integers(1, 3)),
        st.tuples(st.just("roll back"), st.integers(0, 5)),
    )
    for move, number in data.draw(st.lists(moves, max_size=25)):
        newest = run.attempts - 1
        if move == "start":
            run.start()
        elif move == "save":
            run.save(newest, number)
        elif move == "zombie":
            run.save(newest // 2, number)
        else:
            run.roll_back(newest, number)
    head = max(run.parents)
    truth = set(run.true_chain(head))
    assert lineage(run.parents, head) == truth, "without gaps it is exact"
    existing = {commit for commit in run.parents if commit == head or data.draw(st.integers(0, 2))}
    unreadable = {commit for commit in existing if not data.draw(st.integers(0, 3))}
    parents = {commit: parent for commit, parent in run.parents.items() if commit in existing - unreadable}
    found = lineage(parents, head, unreadable)
    assert found <= existing
    assert truth & existing <= found


def test_a_gap_does_not_hide_what_was_kept_before_it():
    """keep_every leaves gaps: what lies before them is no leftover; what a zombie wrote past the fork is."""
    parents = {
        at(50): at(40), at(60): at(50), at(70): at(60),  # attempt 0 went on to 70
        at(80, 1): at(70, 1), at(90, 1): at(80, 1),  # attempt 1 forked at 50; 60 and 70 of it are removed
        at(55, 1): at(50),
    }  # fmt: skip
    assert lineage(parents, at(90, 1)) == {at(90, 1), at(80, 1), at(55, 1), at(50)}


# Removing


def make_run(storage, count=5, **states):
    chain = []
    for step in range(10, 10 * count + 10, 10):
        parent = chain[-1].path if chain else None
        chain.append(make_commit(storage, step, HELD, parent=parent, state={"loss": float(abs(step - 30))}))
    return chain


def test_apply_keeps_the_last_and_tells_what_is_left(storage):
    chain = make_run(storage)
    assert steps(retention.apply(storage, chain, Retention(keep_last=2))) == [40, 50]
    assert steps(commits(storage)) == [40, 50]
    assert storage.list("checkpoints") == ["step_00000040", "step_00000050"]


def test_apply_keeps_the_best_the_tagged_and_the_leased(storage):
    chain = make_run(storage)
    add_tag(storage, chain[0], "first")
    with lease(storage, chain[1]):
        left = retention.apply(storage, chain, Retention(keep_last=1, keep_best="loss:min"))
        assert steps(left) == [10, 20, 30, 50]
        assert verify(storage, chain[1]).damage == []
    left = retention.apply(storage, left, Retention(keep_last=1, keep_best="loss:min"))
    assert steps(left) == steps(commits(storage)) == [10, 30, 50]


def test_apply_does_nothing_once_a_newer_attempt_has_started(storage):
    chain = make_run(storage)
    storage.create("attempts/0000/start.json", b"{}")
    storage.create("attempts/0001/start.json", b"{}")
    assert retention.apply(storage, chain, Retention(keep_last=1)) == chain
    assert commits(storage) == chain


def test_apply_after_something_else_removed_or_damaged_a_commit(storage):
    chain = make_run(storage)
    retention.remove(storage, chain[2])
    storage.replace(f"{chain[1].path}/{MANIFEST}", b"{")
    assert steps(retention.apply(storage, chain, Retention(keep_last=1, keep_best="loss:min"))) == [40, 50]


def test_a_tag_that_cannot_be_read_stops_removal(storage):
    chain = make_run(storage)
    storage.write("tags/good.json", b"{")
    with pytest.raises(CheckpointError, match=r"tags/good\.json cannot be read"):
        retention.apply(storage, chain, Retention(keep_last=1))
    assert commits(storage) == chain


class Watched(LocalStorage):
    """Does something just before or after the manifest goes."""

    def __init__(self, root, before=None, after=None):
        super().__init__(root)
        self.before, self.after = before, after

    def remove(self, path):
        if path.endswith(MANIFEST) and self.before:
            before, self.before = self.before, None
            before()
        super().remove(path)
        if path.endswith(MANIFEST) and self.after:
            after, self.after = self.after, None
            after()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_reader_that_comes_while_a_commit_is_removed_either_reads_it_or_is_told(storage, moment):
    """A reader that got its lease before the manifest went keeps the data; one that came after is refused."""
    commit, newest = make_run(storage, 2)
    reading, refused = [], []

    def read():
        context = lease(storage, commit)
        try:
            context.__enter__()
            reading.append(context)
        except CheckpointError as error:
            refused.append(str(error))

    removed = retention.remove(Watched(storage.root, **{moment: read}), commit)
    assert removed == bool(refused) != bool(reading)
    if reading:
        assert verify(storage, commit).damage == []
        reading[0].__exit__(None, None, None)
    else:
        assert "no longer, committed" in refused[0]
        assert commits(storage) == [newest]
    assert storage.list("leases") == []


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_tag_that_comes_while_a_commit_is_removed_either_holds_it_or_is_refused(storage, moment):
    commit, _ = make_run(storage, 2)
    refused = []

    def tag():
        try:
            add_tag(storage, commit, "mine")
        except CheckpointError as error:
            refused.append(str(error))

    removed = retention.remove(Watched(storage.root, **{moment: tag}), commit)
    assert removed == bool(refused) == (not is_committed(storage, commit))
    assert storage.list("tags") == ([] if refused else ["mine.json"])


def test_a_removal_that_dies_at_any_point_leaves_no_commit_without_data(storage):
    """The manifest goes first: whatever is still called committed is whole."""
    chain = make_run(storage)

    class Dying(LocalStorage):
        def remove_folder(self, path, only_empty=False):
            (self.root / path / "rank00000-000.safetensors").unlink()
            raise OSError("the machine is gone")

    with pytest.raises(OSError, match="gone"):
        retention.remove(Dying(storage.root), chain[0])
    assert commits(storage) == chain[1:]
    assert all(verify(storage, each).damage == [] for each in chain[1:])
    assert retention.remove(storage, chain[0]), "what is left goes the next time"
    assert storage.list("checkpoints")[0] == "step_00000020"


def test_on_a_real_s3_server(s3_url):
    storage = open_storage(s3_url)
    chain = make_run(storage, 4)
    add_tag(storage, chain[0], "first")
    with pytest.raises(CheckpointError, match="first is"):
        add_tag(storage, chain[1], "first")
    with lease(storage, chain[1], seconds=0.3):
        deadline = time.monotonic() + 20
        first = read_leases(storage)[0]
        while read_leases(storage)[0].expires == first.expires:
            assert time.monotonic() < deadline, "the lease was not renewed"
        assert steps(retention.apply(storage, chain, Retention(keep_last=1))) == [10, 20, 40]
    assert storage.list("leases") == []
    assert steps(retention.apply(storage, chain, Retention(keep_last=1))) == [10, 40]
    assert steps(commits(storage)) == [10, 40]
    files = {name.split("/checkpoints/")[1].split("/")[0] for name in storage.fs.find(f"{storage.root}/checkpoints")}
    assert files == {"step_00000010", "step_00000040"}


# Leases


def test_a_lease_ends_with_its_block(storage):
    (commit,) = make_run(storage, 1)
    with lease(storage, commit, by="a test"):
        assert leased(storage) == {commit}
        (record,) = read_leases(storage)
        assert record.by == "a test"
    assert read_leases(storage) == []
    with pytest.raises(RuntimeError), lease(storage, commit):
        raise RuntimeError
    assert read_leases(storage) == []


def test_a_lease_on_what_is_gone_is_refused(storage):
    with pytest.raises(CheckpointError, match="not, or no longer, committed"), lease(storage, at(10)):
        pass
    assert storage.list("leases") == []


def test_a_lease_is_renewed_until_its_limit(storage):
    (commit,) = make_run(storage, 1)
    seen = set()
    with lease(storage, commit, seconds=0.06, limit_s=60):
        deadline = time.monotonic() + 30
        while len(seen) < 4:
            assert time.monotonic() < deadline
            seen.update(each.expires for each in read_leases(storage))
    with lease(storage, commit, seconds=0.06, limit_s=0.0):
        names = {thread.name: thread for thread in threading.enumerate()}
        for name, thread in names.items():
            if name.startswith("lease"):
                thread.join(20)
                assert not thread.is_alive(), "a reader that hangs holds nothing for ever"


def test_leases_expire_with_a_margin_for_other_clocks(storage):
    (commit,) = make_run(storage, 1)
    now = 1_000_000.0
    storage.create("leases/a.json", msgspec.json.encode(LeaseRecord(commit=commit.path, expires=now)))
    assert leased(storage, now + MARGIN_S - 1) == {commit}
    assert leased(storage, now + MARGIN_S + 1) == set()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"commit": "../..", "expires": 1e300}', b'{"commit": 5}', b"\xff"]
)
def test_what_is_no_lease_protects_nothing(storage, content):
    (commit,) = make_run(storage, 1)
    storage.write("leases/x.json", content)
    assert leased(storage) == set()
    (found,) = read_leases(storage)
    assert found.expired(0.0)
    assert read_manifest(storage, commit).commit == newest_commit(storage)


def test_renewal_goes_on_after_a_store_that_did_not_answer(storage, monkeypatch):
    (commit,) = make_run(storage, 1)
    failures, succeeded = [], threading.Event()
    replace = LocalStorage.replace

    def sometimes(self, path, data):
        if len(failures) < 2:
            failures.append(path)
            raise TimeoutError("no answer")
        replace(self, path, data)
        succeeded.set()

    monkeypatch.setattr(LocalStorage, "replace", sometimes)
    with lease(storage, commit, seconds=0.03):
        assert succeeded.wait(30)
    assert len(failures) == 2
    assert leases.read_leases(storage) == []
