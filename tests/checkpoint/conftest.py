"""Fixtures of the tests that harm real ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.checkpoint.ranks import Nursery


@pytest.fixture(scope="session")
def all_ranks() -> Iterator[Nursery]:
    """One process that has imported torch, and forks ranks."""
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def nursery(all_ranks: Nursery) -> Iterator[Nursery]:
    """Starts ranks that do not outlive the test."""
    yield all_ranks
    all_ranks.sweep()
