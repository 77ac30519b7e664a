"""What a cluster does with an Indexed Job whose indexes are retried alone, as far as its own rules say."""

from __future__ import annotations

import signal
import subprocess
from collections import Counter
from pathlib import Path

from tests.agent.pods import Pods
from tests.k8s.api.server import ApiServer
from tests.k8s.api.store import KINDS, POD, Object, now
from tests.k8s.kubelet import INDEX, LABEL, value

JOB = next(each for each in KINDS if each.kind == "Job")


class IndexedJob(Pods):
    """Carries out the Job of a study: pods as processes, as many at a time as its parallelism says."""

    def __init__(self, server: ApiServer, root: Path) -> None:
        self.server, self.root = server, root
        self.name = [name for kind, _, name in server.store.objects if kind == JOB][-1]  # the newest
        self.pods: dict[int, subprocess.Popen[bytes]] = {}  # by index
        self.made: Counter[int] = Counter()  # pods that each index has had
        self.failures: Counter[int] = Counter()  # of these, those that count
        self.completed: set[int] = set()
        self.failed: set[int] = set()
        self.codes: list[tuple[int, int]] = []
        self.most = 0  # pods that there were at a time

    def job(self) -> Object | None:
        """None once it is deleted, though its pods may still stop."""
        job = self.server.store.objects.get((JOB, "default", self.name))
        return None if job is None or "deletionTimestamp" in job["metadata"] else job

    def pod_name(self, index: int) -> str:
        """Of the newest pod of an index."""
        return f"{self.name}-{index}-{self.made[index]:05d}"

    def remove(self, index: int) -> None:
        """``kubectl delete pod``."""
        self.server.store.delete(POD, "default", self.pod_name(index), None)

    def control(self) -> None:
        """One pass: what was deleted is stopped, what has ended is counted, what there is room for is started."""
        for index, process in list(self.pods.items()):
            pod = self.server.store.objects[POD, "default", self.pod_name(index)]
            if "deletionTimestamp" in pod["metadata"] and not pod.get("told"):
                pod["told"] = True
                process.send_signal(signal.SIGTERM)
            code = process.poll()
            if code is not None:
                del self.pods[index]
                self.codes.append((index, code if code >= 0 else 128 - code))
                self._ended(index, pod, self.codes[-1][1])
        job = self.job()
        if job is None or job["spec"].get("suspend"):
            return
        open_ = [each for each in range(job["spec"]["completions"]) if each not in self.completed | self.failed]
        for index in open_:
            if index not in self.pods and len(self.pods) < job["spec"]["parallelism"]:
                self._start(job, index)
        self.most = max(self.most, len(self.pods))
        self._tell(job, not open_)

    def _start(self, job: Object, index: int) -> None:
        self.made[index] += 1
        template = job["spec"]["template"]
        labels = {**template["metadata"]["labels"], LABEL["Job"]: self.name, INDEX: str(index)}
        annotations = {**template["metadata"].get("annotations", {}), INDEX: str(index)}
        running = {"state": {"running": {"startedAt": now()}}, "imageID": "lab/train@sha256:0123"}
        status = {"phase": "Running", "podIP": "127.0.0.1", "startTime": now(), "conditions": []}
        owner = {"uid": job["metadata"]["uid"], "kind": "Job", "name": self.name, "apiVersion": "batch/v1"}
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": self.pod_name(index),
                "labels": labels,
                "annotations": annotations,
                "ownerReferences": [owner],
            },
            "spec": {**template["spec"], "nodeName": f"host{index}"},
            "status": {**status, "containerStatuses": [{"name": "node", "ready": True, **running}]},
        }
        self.server.store.put(pod)
        (container,) = pod["spec"]["containers"]
        environment = dict(value(each, pod) for each in container["env"])
        self.spawn(index, container["command"], {**environment, "JOB_COMPLETION_INDEX": str(index)})

    def _ended(self, index: int, pod: Object, code: int) -> None:
        job = self.job()
        if job is None or "deletionTimestamp" in pod["metadata"]:
            self.server.store.drop(POD, "default", self.pod_name(index))
        else:
            ended = {"terminated": {"exitCode": code, "reason": "Error" if code else "Completed", "finishedAt": now()}}
            phase = {"phase": "Failed" if code else "Succeeded"}
            states = {"containerStatuses": [{"name": "node", "ready": False, "state": ended}]}
            status = {**pod["status"], **phase, **states}
            self.server.store.put({**pod, "apiVersion": "v1", "kind": "Pod", "status": status})
        if job is None:
            return
        if code == 0:
            self.completed.add(index)
            return
        action = next(
            (
                rule["action"]
                for rule in job["spec"]["podFailurePolicy"]["rules"]
                if code in rule.get("onExitCodes", {}).get("values", ())
            ),
            "Count",
        )
        if action == "FailJob":  # the others end with it
            self.failed |= set(range(job["spec"]["completions"])) - self.completed
        self.failures[index] += action == "Count"
        if action == "FailIndex" or self.failures[index] > job["spec"]["backoffLimitPerIndex"]:
            self.failed.add(index)

    def _tell(self, job: Object, over: bool) -> None:
        done = {"type": "Failed" if self.failed else "Complete", "status": "True", "lastTransitionTime": now()}
        why = {"reason": "FailedIndexes", "message": "Job has failed indexes"} if self.failed else {}
        status = {
            "active": len(self.pods),
            "completedIndexes": ",".join(map(str, sorted(self.completed))),
            "failedIndexes": ",".join(map(str, sorted(self.failed))),
            "conditions": [{**done, **why}] if over else [],
        }
        if job.get("status") != status:
            self.server.store.put({**job, "status": status})

    def until_over(self) -> None:
        """Until every index is over, or the Job is deleted, and no pod is left."""
        self.until(lambda: not self.pods and (self.job() is None or bool(_ending(self.job()))), "the end of the Job")


def _ending(job: Object | None) -> list[Object]:
    return list((job or {}).get("status", {}).get("conditions") or [])
