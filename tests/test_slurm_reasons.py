"""SLURM's reasons in words."""

from __future__ import annotations

import pytest

from llmops.backends.slurm_reasons import in_words


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Resources", "waits for nodes to become free (Resources)"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-4]", "a node that it asked for is not available (ReqNodeNot"),
        ("QOSMaxJobsPerUserLimit", "its QOS allows no more at present (QOSMaxJobsPerUserLimit)"),
        ("AssocGrpCpuLimit", "all jobs of its account together have reached a limit (AssocGrpCpuLimit)"),
        ("(Priority)", "waits behind jobs of higher priority (Priority)"),
        ("SomethingNew", "SomethingNew"),
    ],
)
def test_words(reason: str, words: str) -> None:
    assert in_words(reason).startswith(words)
