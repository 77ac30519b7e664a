"""What SLURM's reasons mean, in words. The names are those of ``squeue``'s manual, JOB REASON CODES."""

from __future__ import annotations

_WORDS = {
    "Resources": "waits for nodes to become free",
    "Priority": "waits behind jobs of higher priority",
    "BeginTime": "its start time has not come yet",
    "Dependency": "waits for the job that it depends on",
    "DependencyNeverSatisfied": "what it depends on can never come true",
    "JobHeldUser": "held by its owner: scontrol release",
    "JobHeldAdmin": "held by an administrator",
    "JobArrayTaskLimit": "as many elements of its array run as may",
    "JobLaunchFailure": "its launch failed, and it is held",
    "Licenses": "waits for licences",
    "NodeDown": "a node that it needs is down",
    "PartitionConfig": "asks for more than its partition has: it will never start as it is",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition takes no jobs now",
    "PartitionNodeLimit": "asks for more nodes than its partition lets a job have",
    "PartitionTimeLimit": "asks for more time than its partition lets a job have",
    "Prolog": "the prolog runs on its nodes",
    "ReqNodeNotAvail": "a node that it asked for is not available",
    "Reservation": "waits for its reservation",
    "TimeLimit": "reached its time limit",
    "OutOfMemory": "ran out of memory",
    "NodeFail": "a node failed",
    "NonZeroExitCode": "ended with an error",
    "BadConstraints": "no node has what it asks for",
    "InvalidAccount": "its account is not valid",
    "InvalidQOS": "its QOS is not valid",
    "AccountNotAllowed": "its account may not use this partition",
    "QOSNotAllowed": "its QOS may not be used here",
    "launch failed requeued held": "its launch failed, and it is held: scontrol release",
}
_LIMITS = (
    ("QOSMax", "its QOS allows no more at present"),
    ("QOSGrp", "all jobs of its QOS together have reached a limit"),
    ("QOSMin", "asks for less than its QOS demands"),
    ("AssocMax", "its account allows no more at present"),
    ("AssocGrp", "all jobs of its account together have reached a limit"),
    ("MaxCpu", "its account allows no more CPUs at present"),
)


def in_words(reason: str) -> str:
    """``waits for nodes to become free (Resources)``; a reason that is not known as it is."""
    name = reason.strip("()")
    first = name.partition(",")[0].strip()  # some name what is missing behind a comma
    words = _WORDS.get(name) or _WORDS.get(first)
    words = words or next((words for prefix, words in _LIMITS if name.startswith(prefix)), None)
    return f"{words} ({name})" if words else reason
