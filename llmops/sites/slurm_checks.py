"""Does SLURM work here, and what will it do to a run that must go? Each setting beside what llmops makes of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence

from llmops.backends.slurm_machine import Here
from llmops.config.schema import SlurmCluster
from llmops.errors import ClusterError
from llmops.runs.records import whoami
from llmops.sites import slurm
from llmops.sites.checks import Check, Result, failed
from llmops.sites.stores import offset_check

SECTION = "slurm"
COMMANDS = ("sbatch", "squeue", "srun", "scancel", "scontrol", "sinfo", "sacct")
OLDEST = (20, 11)  # whose commands print the fields that are asked for
MARGIN_S = 5  # of the time to save, kept for the way out; see llmops.agent.policy.slurm.stop_deadline
NAMED = 3  # partitions in the name of a check
EXPIRE_S = 120  # SLURM's own cred_expire


def line(name: str, result: Result, found: str, remedy: str = "") -> Check:
    """A check of this section."""
    return Check(SECTION, name, result, found, remedy)


def commands() -> list[Check]:
    """Are SLURM's commands here?"""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        remedy = "run llmops on a login node, or install SLURM's client commands and put them on PATH"
        return [line("commands", "fail", f"not on PATH: {', '.join(missing)}", remedy)]
    return [line("commands", "ok", ", ".join(COMMANDS))]


def controller(timeout: float, save_s: float) -> list[Check]:
    """Everything that ``slurmctld`` says."""
    config, offset = slurm.settings(timeout)
    partitions = slurm.partitions(timeout)
    qos = slurm.qos(timeout) if config.get("PreemptType") == "preempt/qos" else []
    return [
        line("controller", "ok", f"cluster {config.get('ClusterName', '')} answers"),
        version(config.get("SLURM_VERSION", "")),
        *([offset_check(SECTION, "the controller", offset)] if offset is not None else []),
        *preemption(config, partitions, qos, save_s),
        *signals(config),
        *requeue(config),
        *limits(config, partitions),
    ]


def version(text: str) -> Check:
    """Of the controller."""
    numbers = tuple(map(int, re.findall(r"\d+", text)[:2]))
    if numbers and numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return line(
            "version", "warn", f"{text}, older than {oldest}", "ask for a newer SLURM: this one was never tried"
        )
    return line("version", "ok", text or "not told")


def preemption(
    config: Mapping[str, str], partitions: Sequence[slurm.Partition], qos: Sequence[slurm.Qos], save_s: float
) -> list[Check]:
    """A check for each way in which a partition's (or QOS's) jobs make way, and the time that they have to save."""
    kind, usual = config.get("PreemptType", ""), config.get("PreemptMode", "OFF")
    wait = slurm.number(config.get("KillWait", ""), 30)
    checks = [_kill_wait(wait, save_s)]
    if kind in ("", "preempt/none"):
        return [*checks, line("preemption", "ok", "no job makes way for another (PreemptType=preempt/none)")]
    ways: dict[tuple[str, int], list[str]] = {}
    if qos:
        for each in qos:
            mode = usual if each.preempt_mode in ("", "cluster") else each.preempt_mode
            ways.setdefault((mode.upper(), each.grace_s), []).append(f"QOS {each.name}")
    else:
        for part in partitions:
            ways.setdefault(((part.preempt_mode or usual).upper(), part.grace_s), []).append(part.name)
    return checks + [_way(names, mode, grace, wait, save_s) for (mode, grace), names in ways.items()]


def _kill_wait(wait: int, save_s: float) -> Check:
    found = (
        f"KILL comes {wait} s after TERM (KillWait), so {wait - MARGIN_S} s to save; checkpoint.save_seconds={save_s:g}"
    )
    if wait - MARGIN_S >= save_s:
        return line("time to save", "ok", found)
    return line("time to save", "warn", found, _more_time(wait, save_s))


def _more_time(wait: int, save_s: float) -> str:
    lower = f"checkpoint.save_seconds={wait - MARGIN_S} or less" if wait > MARGIN_S else "GraceTime on the partition"
    needed = f"{save_s + MARGIN_S:.0f}"
    return f"ask for KillWait={needed}; until then set {lower}, and save often (checkpoint.every_steps)"


def _way(names: Sequence[str], mode: str, grace: int, wait: int, save_s: float) -> Check:
    few = len(names) <= NAMED
    name = f"preemption: {', '.join(names) if few else f'{names[0]} and {len(names) - 1} more'}"
    of = "" if few else f"; of {', '.join(names)}"
    if mode in ("OFF", "DISABLED"):
        return line(name, "ok", f"its jobs never make way (PreemptMode=OFF){of}")
    if "SUSPEND" in mode:
        remedy = "ask for PreemptMode=REQUEUE: a run that is stopped keeps its memory, and looks hung to its peers"
        return line(name, "warn", f"its jobs are suspended (PreemptMode={mode}){of}", remedy)
    room = wait - MARGIN_S + grace
    how = (
        f"TERM to its steps, {grace} s later (GraceTime) to all, KILL {wait} s after that"
        if grace
        else "TERM, then KILL"
    )
    then = "requeued" if "REQUEUE" in mode else "cancelled; llmops queues a successor"
    found = f"{how}; {room} s to save; {then} (PreemptMode={mode}){of}"
    if room < save_s:
        return line(name, "warn", found, _more_time(wait, save_s))
    return line(name, "ok", found)


def signals(config: Mapping[str, str]) -> list[Check]:
    """Who hears of a preemption, and whether anything of a job can outlive it."""
    sends = "send_user_signal" in slurm.options(config.get("PreemptParameters", "")) or (
        "preempt_send_user_signal" in slurm.options(config.get("SlurmctldParameters", ""))
    )
    told = (
        "the batch host is told at once, by the signal that llmops asks for"
        if sends
        else ("not set: a job's steps are told by TERM, to which llmops listens on every node")
    )
    tracker = config.get("ProctrackType", "").removeprefix("proctrack/")
    checks = [line("send_user_signal", "ok", told)]
    if tracker == "cgroup":
        return [*checks, line("ProctrackType", "ok", "cgroup: no process of a job can outlive it")]
    found = {
        "linuxproc": "linuxproc: signals go to every process, and one whose parent has ended may outlive its job",
        "pgid": "pgid: processes that leave their group outlive their job, and keep their GPU",
    }.get(tracker, f"{tracker or 'not told'}: not known to llmops")
    return [*checks, line("ProctrackType", "warn", found, "ask for ProctrackType=proctrack/cgroup")]


def requeue(config: Mapping[str, str]) -> list[Check]:
    """May jobs run again, and how soon?"""
    on = config.get("JobRequeue", "1") == "1"
    told = "1" if on else "0: llmops asks for each of its jobs to be requeued all the same (--requeue)"
    delay = slurm.options(config.get("SchedulerParameters", "")).get("requeue_delay")
    expire = slurm.options(config.get("AuthInfo", "")).get("cred_expire")
    held = int(delay) if delay and delay.isdigit() else slurm.number(expire or "", EXPIRE_S) + 1
    cause = f"requeue_delay={delay}" if delay else f"cred_expire={expire or EXPIRE_S}"
    wait = f"a requeued job is held for {held} s ({cause})" + ("; llmops cuts it to 5 s" if held > 5 else "")
    return [line("JobRequeue", "ok", told), line("requeue delay", "ok", wait)]


def limits(config: Mapping[str, str], partitions: Sequence[slurm.Partition]) -> list[Check]:
    """What is refused, what waits for ever, and how large an array may be."""
    enforced = config.get("EnforcePartLimits", "NO").upper()
    if enforced == "NO":
        told = "NO: sbatch takes what can never run; llmops looks at the partitions itself and refuses it"
    else:
        told = f"{enforced}: sbatch refuses what can never run"
    largest = slurm.number(config.get("MaxArraySize", ""), 1001) - 1
    checks = [
        line("EnforcePartLimits", "ok", told),
        line("MaxArraySize", "ok", f"a sweep may have {largest:,} trials in one array"),
    ]
    up = [part.name for part in partitions if part.up]
    if not up:
        remedy = "wait, or ask the administrator which partition you may use"
        return [*checks, line("partitions", "fail", "none is up", remedy)]
    default = next((part.name for part in partitions if part.default), None)
    names = ", ".join(f"{name} (default)" if name == default else name for name in up)
    if default is None:
        return [
            *checks,
            line("partitions", "warn", f"{names}; none is the default", f"set cluster.partition, as {up[0]}"),
        ]
    return [*checks, line("partitions", "ok", names)]


def accounting(timeout: float) -> list[Check]:
    """Does the accounting answer, and has the user an account?"""
    config, _ = slurm.settings(timeout)
    if config.get("AccountingStorageType", "").endswith("/none"):
        kept = slurm.number(config.get("MinJobAge", ""), 300)
        told = f"there is none: SLURM forgets a job {kept} s after its end"
        return [
            line("accounting", "warn", told, "ask for slurmdbd; until then `llmops status` has the run store alone")
        ]
    code, _, errors = Here().call("sacct", "-n", "-X", "-P", "-S", "now", "-o", "jobid", timeout=timeout)
    if code:
        remedy = "tell the administrator that slurmdbd does not answer; running jobs go on"
        return [line("accounting", "fail", f"sacct: {errors or f'returned {code}'}", remedy)]
    checks = [line("accounting", "ok", f"{config.get('AccountingStorageType')} answers")]
    user = whoami()[0]
    enforced = "associations" in config.get("AccountingStorageEnforce", "")
    try:
        found = slurm.associations(timeout, user, config.get("ClusterName", ""))
    except ClusterError as error:
        return [*checks, failed(SECTION, "accounts", str(error), "warn")]
    names = ", ".join(dict.fromkeys(each.account for each in found))
    if not found and enforced:
        remedy = f"ask the administrator for an account: sacctmgr add user {user} account=NAME"
        return [*checks, line("accounts", "fail", f"{user} has none, and jobs without one are refused", remedy)]
    return [*checks, line("accounts", "ok", names or f"{user} has none, and none is asked for")]


def submission(timeout: float, cluster: SlurmCluster) -> list[Check]:
    """Would a job be taken? ``sbatch --test-only`` submits none."""
    given = {"partition": cluster.partition, "account": cluster.account, "qos": cluster.qos}
    options = [f"--{name}={value}" for name, value in given.items() if value]
    code, output, errors = Here().call("sbatch", "--test-only", *options, "--wrap=true", timeout=timeout)
    text = errors or " ".join(output.split())
    if code:
        chosen = ", ".join(f"cluster.{name}={value}" for name, value in given.items() if value)
        remedy = f"change {chosen}" if chosen else "set cluster.partition, cluster.account or cluster.qos"
        return [line("test submission", "fail", text.replace("sbatch: ", "") or f"sbatch returned {code}", remedy)]
    found = re.search(r"to start at \S+ .*", text)
    return [line("test submission", "ok", f"a job would be taken{f', {found[0]}' if found else ''}")]
