"""SLURM through its own commands: text formats with explicit fields, which every release since 20.11 prints alike."""

from __future__ import annotations

import calendar
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmops import agent_zip
from llmops.agent import carry
from llmops.agent.rundir import is_url
from llmops.backends.base import Ambiguous, ArrayLimits, Look, Rejected, Submission
from llmops.backends.slurm_limits import check_limits, check_reachable
from llmops.backends.slurm_machine import NO_ANSWER, Here, LoginNode, Machine
from llmops.backends.slurm_reasons import in_words
from llmops.config.schema import SlurmCluster, time_limit_seconds
from llmops.errors import ClusterError, UserError
from llmops.job import JobSpec, JobState, JobView
from llmops.render import render_template, sbatch_options
from llmops.runs.ssh_store import connect

REQUEUE_DELAY_S = 5  # must outlast the end of the job and its epilog; see llmops.agent.scontrol.cut_wait
LOST_DAYS = 7  # how far back the accounting is searched for a job by its name
UTC = {"TZ": "UTC0"}  # for the times that are printed: a login node may be elsewhere
MANY = 100  # with more jobs than this, one listing of all is cheaper than naming each

_STATES: dict[str, JobState] = {
    "PENDING": "pending",
    "REQUEUED": "pending",
    "REQUEUE_HOLD": "pending",
    "REQUEUE_FED": "pending",
    "SPECIAL_EXIT": "pending",
    "RUNNING": "running",
    "CONFIGURING": "running",
    "SUSPENDED": "running",
    "STOPPED": "running",
    "SIGNALING": "running",
    "STAGE_OUT": "running",
    "RESIZING": "running",
    "COMPLETING": "completing",
    "COMPLETED": "finished",
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
}


class SlurmBackend:
    """Jobs of one SLURM cluster: of this machine's, or of the one that the host ``login`` is a login node of."""

    name = "slurm"
    text_name = "sbatch.sh"
    own_image = False

    def __init__(self, login: str | None = None) -> None:
        self.machine: Machine = Here() if login is None else LoginNode(connect(login))

    def check(self, cluster: SlurmCluster, run_url: str) -> None:
        """One look at the partitions: what SLURM would accept and leave pending for ever is refused here."""
        machine = self.machine
        if cluster.log_dir is not None and not machine.is_folder(machine.absolute(cluster.log_dir)):
            raise UserError(f"cluster.log_dir={cluster.log_dir}: there is no such folder; make it, on every node")
        code, output, errors = machine.call("sinfo", "-h", "-a", "-e", "-o", "%P|%a|%D|%c|%m|%l|%s|%G", timeout=30)
        if code:
            raise ClusterError(
                f"the SLURM controller does not answer ({errors}); nothing was submitted: try again later"
            )
        partition = check_limits(cluster, output)
        if not is_url(run_url):
            names = ("sinfo", "-h", "-p", partition, "-O", "NodeHost:64")
            check_reachable(run_url, *machine.place(run_url), partition, lambda: machine.call(*names)[1])

    def options(self, cluster: SlurmCluster, spec_values: Mapping[str, Any]) -> dict[str, Any]:
        """What the supervisor adds to its ``srun``, and when it is warned."""
        container, runs = cluster.container, str(spec_values["runs_url"])
        cpus = (cluster.cpus_per_rank or 1) * cluster.ranks_per_node
        srun, wrap = [f"--cpus-per-task={cpus}"], list[str]()
        if container.runtime == "pyxis":
            mounts = [*([] if is_url(runs) else [f"{runs}:{runs}"]), *container.mounts]
            srun.append(f"--container-image={container.image}")
            srun += [f"--container-mounts={','.join(mounts)}"] if mounts else []
            srun += container.args
        elif container.runtime == "apptainer":
            wrap = ["apptainer", "exec"] if is_url(runs) else ["apptainer", "exec", "--bind", runs]
            wrap += [part for mount in container.mounts for part in ("--bind", mount)]
            wrap += [*container.args, str(container.image)]
        return {
            "srun_args": srun,
            "wrap": wrap,
            "signal_s": spec_values["warning_s"],
            "requeue_delay_s": REQUEUE_DELAY_S,
        }

    def render(self, cluster: SlurmCluster, spec: JobSpec, agent: Path | None) -> str:
        """The batch script."""
        folder, output = self._output(cluster, spec)
        cpus = (cluster.cpus_per_rank or 1) * cluster.ranks_per_node
        limit = time_limit_seconds(cluster.time)
        options = {
            "job-name": spec.tag,
            "nodes": cluster.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": cpus,
            "gpus-per-node": cluster.gpus_per_node,
            "gres": cluster.gres,
            "mem": cluster.mem,
            "mem-per-cpu": cluster.mem_per_cpu,
            "time": cluster.time if limit is not None else None,
            "partition": cluster.partition,
            "account": cluster.account,
            "qos": cluster.qos,
            "constraint": cluster.constraint,
            "exclude": cluster.exclude,
            "nodelist": cluster.nodelist,
            "reservation": cluster.reservation,
            "exclusive": cluster.exclusive,
            "mail-user": cluster.mail_user,
            "mail-type": cluster.mail_type,
            "comment": cluster.comment,
            "dependency": cluster.dependency,
            "chdir": _pattern_free(folder),
            # A name without a pattern but the job's number: it fits arrays, and append keeps the lines of earlier
            # attempts.
            "output": f"{_pattern_free(output.parent)}/{output.name}",
            "array": _array(spec),
            "open-mode": "append",
            "requeue": True,
            "signal": f"B:USR1@{spec.options['signal_s']}",
        }
        values = {
            "comment": f"{spec.run_id}, submission {spec.submission}: written by llmops, kept as submitted",
            "options": [*sbatch_options(options), *cluster.extra],
            "setup": cluster.setup,
            # The batch host is outside the container: there it is the interpreter that runs this launcher.
            "python": spec.python if cluster.container.runtime == "none" else self.machine.python,
            "what": "--study" if spec.array else "--run",
            "run": spec.run_url,
            "submission": spec.submission,
            "spec": spec,
            "cluster": cluster,
        }
        if agent is not None:
            values["agent"] = agent
        else:
            values |= {"bootstrap": carry.BOOTSTRAP, "embedded": carry.embed(agent_zip.build()[1]).rstrip()}
        return render_template("sbatch.sh.j2", cluster.template, values)

    def submit(self, submission: Submission) -> str:
        """``sbatch``; when it does not answer, the tag is looked up before anything is said."""
        spec, command, text = submission.spec, ["sbatch", "--parsable"], submission.text
        if submission.agent is not None:
            command, text = [*command, f"{spec.run_url}/job/{spec.submission:04d}/sbatch.sh"], ""
        code, output, errors = self.machine.call(*command, hidden=submission.hidden_env, text=text, once=True)
        if code == 0 and output.strip():
            return output.strip().splitlines()[-1].split(";")[0]
        if not _unanswered(code, errors):
            raise Rejected(errors or f"sbatch returned {code}")
        try:
            found = self.find(spec.tag)
        except ClusterError:
            found = None
        if found:
            return found
        raise Ambiguous(errors)

    def find(self, tag: str) -> str | None:
        """The job with this name, in the queue or in the accounting."""
        look = self.look((), (tag,))
        if tag not in look.found and "unreachable" in look.views:
            raise ClusterError(look.views["unreachable"].reason)
        return look.found.get(tag)

    def look(self, job_ids: Sequence[str], tags: Sequence[str] = ()) -> Look:
        """One ``squeue``; for jobs that have left the queue, one ``sacct``, where there is accounting.

        Names are looked for among all jobs, since neither command can ask for ids or names.
        """
        wanted = list(dict.fromkeys(job_ids))
        if not wanted and not tags:
            return Look({}, {})
        known = set(wanted)
        jobs = list(dict.fromkeys(map(_base, wanted)))
        named = ["-j", ",".join(jobs)] if len(jobs) <= MANY and not tags else []
        squeue = ("squeue", "-h", "-r", "-t", "all", *named, "-o", "%i|%T|%S|%j|%r")
        code, output, errors = self.machine.call(*squeue, env=UTC, timeout=30)
        if code and "Invalid job id" not in errors:
            silent = {
                job_id: JobView(job_id, "unreachable", f"squeue: {errors}") for job_id in wanted or ["unreachable"]
            }
            return Look(silent, {})
        views: dict[str, JobView] = {}
        found: dict[str, str] = {}
        for line in output.splitlines():
            # A name of somebody else's may hold the separator.
            job_id, state, start, *name, reason = line.split("|")
            tagged = "|".join(name) in tags
            if tagged:
                found.setdefault("|".join(name), _base(job_id))
            for each in {job_id, _base(job_id)} if tagged else {job_id}:
                if each in known or tagged:
                    views[each] = _view(each, state, reason, start)
        missing = [job_id for job_id in wanted if job_id not in views]
        lost = [tag for tag in tags if tag not in found]
        if missing or lost:
            which = ["-S", f"now-{LOST_DAYS}days"] if lost else ["-j", ",".join(dict.fromkeys(map(_base, missing)))]
            fields = ("sacct", "-X", "-n", "-P", *which, "-o", "jobid,state,start,jobname")
            code, output, _ = self.machine.call(*fields, env=UTC, timeout=30)
            for line in output.splitlines() if code == 0 else []:
                job_id, state, start, name_ = line.split("|", 3)
                if name_ in lost:
                    found.setdefault(name_, _base(job_id))
                    views.setdefault(_base(job_id), _view(_base(job_id), state.split(" ")[0], "", start))
                for each in _elements(job_id):
                    if each in known and each not in views:
                        views[each] = _view(each, state.split(" ")[0], "", start)
        gone = {job_id: JobView(job_id, "gone", "SLURM knows no such job") for job_id in wanted if job_id not in views}
        return Look({**views, **gone}, {tag: found[tag] for tag in tags if tag in found})

    def array_limits(self, cluster: SlurmCluster, parallel: int | None) -> ArrayLimits:
        """MaxArraySize is above the largest index; MaxJobCount counts each element as a job."""
        code, output, errors = self.machine.call("scontrol", "show", "config", timeout=30)
        if code:
            raise ClusterError(
                f"the SLURM controller does not answer ({errors}); nothing was submitted: try again later"
            )
        found = dict(re.findall(r"^(MaxArraySize|MaxJobCount)\s*=\s*(\d+)", output, re.MULTILINE))
        return ArrayLimits(
            int(found["MaxArraySize"]) if "MaxArraySize" in found else None,
            int(found["MaxJobCount"]) if "MaxJobCount" in found else None,
        )

    def element(self, job_id: str, index: int) -> str:
        """As SLURM names it."""
        return f"{job_id}_{index}"

    def cancel(self, job_ids: Sequence[str], graceful: bool) -> None:
        """``scancel``, or the warning signal to the batch host alone. A job that waits has nothing to save."""
        views = self.look(job_ids).views
        running = [job_id for job_id, view in views.items() if view.state == "running"]
        signalled = running if graceful else []
        killed = [job_id for job_id in job_ids if job_id not in signalled]
        for command, ids in ((["scancel", "--batch", "--signal=USR1"], signalled), (["scancel"], killed)):
            if not ids:
                continue
            code, _, errors = self.machine.call(*command, *ids, timeout=30)
            if code and "Invalid job id" not in errors and "already completing or completed" not in errors:
                raise ClusterError(f"scancel: {errors}; the cancellation is recorded, so the run will not start again")

    def _output(self, cluster: SlurmCluster, spec: JobSpec) -> tuple[Path, Path]:
        """The folder that the job starts in, and SLURM's own output file, named by a pattern for the job's number."""
        number = "%A_%a" if spec.array else "%j"
        if is_url(spec.run_url) or cluster.log_dir is not None:
            folder = self.machine.absolute(cluster.log_dir or ".")
            return folder, folder / f"{spec.run_id}.{number}.out"
        return Path(spec.run_url), Path(spec.run_url, "job", f"{spec.submission:04d}", f"slurm-{number}.out")


def _array(spec: JobSpec) -> str | None:
    if spec.array is None:
        return None
    return f"0-{spec.array.size - 1}" + (f"%{spec.array.parallel}" if spec.array.parallel else "")


def _base(job_id: str) -> str:
    """The array of an element ``123_4``."""
    return job_id.partition("_")[0]


def _elements(job_id: str) -> list[str]:
    """The elements that a line of ``sacct`` speaks of: ``123_[0-3,7%2]`` stands for those that never started."""
    found = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", job_id)
    if found is None:
        return [job_id]
    spans = [part.partition("-")[::2] for part in found[2].split(",")]
    return [f"{found[1]}_{index}" for first, last in spans for index in range(int(first), int(last or first) + 1)]


def _pattern_free(path: Path) -> str:
    """A path in which sbatch sees no filename pattern. A backslash would switch off all of them and cannot be used."""
    if "\\" in str(path):
        raise UserError(f"{path}: sbatch cannot write to a path with a backslash; choose another folder")
    return str(path).replace("%", "%%")


def _unanswered(code: int, errors: str) -> bool:
    """Whether a failed command may have reached the controller all the same."""
    signs = ["timed out", "did not answer", "Socket", "Zero Bytes", "connect failure", "Unable to contact"]
    signs.append("Unexpected message received")  # what 23.11 says where 22.05 says that it timed out
    return code == NO_ANSWER or any(sign in errors for sign in signs)


def _view(job_id: str, state: str, reason: str, start: str) -> JobView:
    begin = None
    if start[:1].isdigit():
        begin = float(calendar.timegm(time.strptime(start, "%Y-%m-%dT%H:%M:%S")))
    told = "" if reason in ("None", "") else in_words(reason)
    known = _STATES.get(state, "failed")
    return JobView(job_id, known, told if known == "pending" else state if not told else f"{state}: {told}", begin)
