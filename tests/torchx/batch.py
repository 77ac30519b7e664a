"""As much of AWS Batch as TorchX's scheduler uses, over HTTP: the real client talks to it."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Batch:
    """A queue in memory. Lists hold no more than the newest ``listed`` jobs, as TorchX asks for a hundred."""

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.definitions: dict[str, dict[str, Any]] = {}
        self.listed = 100
        self.lose_answers = 0  # of submissions that are taken all the same
        self.refuse = ""  # with this message
        batch = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                action = self.path.removeprefix("/v1/")
                if action == "submitjob" and batch.refuse:
                    self.reply(400, {"message": batch.refuse})
                    return
                answer = getattr(batch, action)(body)
                if action == "submitjob" and batch.lose_answers:
                    batch.lose_answers -= 1
                    self.close_connection = True
                    return
                self.reply(200, answer)

            def reply(self, code: int, value: dict[str, Any]) -> None:
                text = json.dumps(value).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                if code != 200:
                    self.send_header("x-amzn-ErrorType", "ClientException")
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.env = {
            "AWS_ENDPOINT_URL_BATCH": f"http://127.0.0.1:{self.server.server_port}",
            "AWS_DEFAULT_REGION": "eu-west-1",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
        }

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def describejobqueues(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"jobQueues": [{"jobQueueName": "gpu"}]}

    def registerjobdefinition(self, body: dict[str, Any]) -> dict[str, Any]:
        self.definitions[body["jobDefinitionName"]] = body
        return {"jobDefinitionName": body["jobDefinitionName"], "jobDefinitionArn": "arn", "revision": 1}

    def submitjob(self, body: dict[str, Any]) -> dict[str, Any]:
        number = str(len(self.jobs))
        arn = f"arn:aws:batch:eu-west-1:1:job/{number}"
        properties = self.definitions[body["jobDefinition"]]["nodeProperties"]
        known = {"jobId": number, "jobArn": arn, "jobName": body["jobName"], "tags": body["tags"]}
        self.jobs.append({**known, "nodeProperties": properties, "status": "RUNNABLE"})
        return {"jobId": number, "jobName": body["jobName"], "jobArn": arn}

    def listjobs(self, body: dict[str, Any]) -> dict[str, Any]:
        (asked,) = body["filters"]
        found = self.jobs[-self.listed :] if self.listed else []
        if asked["name"] == "JOB_NAME":
            (name,) = asked["values"]
            start, star, _ = name.partition("*")
            found = [job for job in self.jobs if job["jobName"] == name or (star and job["jobName"].startswith(start))]
        return {"jobSummaryList": [{key: job[key] for key in ("jobId", "jobArn", "jobName")} for job in found]}

    def describejobs(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"jobs": [job for job in self.jobs if job["jobId"] in body["jobs"] or job["jobArn"] in body["jobs"]]}

    def terminatejob(self, body: dict[str, Any]) -> dict[str, Any]:
        for job in self.jobs:
            if body["jobId"] in (job["jobId"], job["jobArn"]):
                job["status"] = "FAILED"
        return {}
