"""Everything in this folder needs the real SLURM; what is about signals is asked of each of its process trackers."""

from __future__ import annotations

import os

import pytest

from tests.slurm import cluster
from tests.slurm.fixtures import proctrack, submit, trackers  # noqa: F401


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("signals") is None:
        return
    if "proctrack" not in metafunc.fixturenames:
        metafunc.fixturenames.insert(0, "proctrack")
    # A second cluster takes long: it is asked on request.
    once = os.environ.get("LLMOPS_THOROUGH") != "1"
    metafunc.parametrize("proctrack", trackers()[:1] if once else trackers(), indirect=True, scope="module")


def _tracker(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("proctrack", cluster.PROCTRACK)) if callspec else cluster.PROCTRACK


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.slurm)  # before `-m` chooses


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The cluster changes its tracker once, after everything else.
    items.sort(key=lambda item: _tracker(item) != cluster.PROCTRACK)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if os.environ.get("LLMOPS_SKIP_SLURM") != "1":
        problem = cluster.cgroup_problem()
        why = f"; no other: cgroups cannot be used here ({problem})" if problem else ""
        terminalreporter.line(f"process trackers for tests of SLURM's signals: {', '.join(trackers())}{why}")
