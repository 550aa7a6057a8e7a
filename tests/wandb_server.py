"""A small server that speaks as much of W&B's API as the real client and the real agent need.

GraphQL and the file stream, over loopback: it registers agents, hands out the runs of a grid, takes in
rows, stops runs early, and gives preempted ones out again. It can misbehave on demand.
"""

import gzip
import json
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

ENTITY, PROJECT = "me", "bert-heads"


@dataclass
class MirroredRun:
    """A run as the server knows it."""

    name: str
    config: dict[str, Any]
    sweep: str | None = None
    state: str = "pending"
    rows: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None
    preempting: bool = False
    is_to_stop: bool = False
    starts: int = 0


class Server:
    """State, and the answers."""

    def __init__(self) -> None:
        self.runs: dict[str, MirroredRun] = {}
        self.sweeps: dict[str, dict[str, Any]] = {}
        self.agents: dict[str, str] = {}
        """Agent -> sweep."""
        self.handed_out: dict[str, str] = {}
        """Run -> agent that has it."""
        self.operations: list[str] = []
        self.unknown: list[str] = []
        self.misbehaviour: str | None = None
        """None, refuse, fail (500), hang, slow or vanish."""
        self.bytes_seen = b""
        self.lock = threading.Lock()

    def add_sweep(self, content: dict[str, Any], cells: list[dict[str, Any]]) -> str:
        """Register a sweep whose runs are these choices of values."""
        sweep = uuid.uuid4().hex[:8]
        self.sweeps[sweep] = content
        for cell in cells:
            name = uuid.uuid4().hex[:8]
            self.runs[name] = MirroredRun(name, cell, sweep)
        return sweep

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer a GraphQL request."""
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found[1] if found else "anonymous"
        with self.lock:
            self.operations.append(name)
            method = getattr(self, f"do_{name.lower()}", None)
            if method is None:
                self.unknown.append(query)
                return {}
            return method(variables)

    def do_viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        return {
            "viewer": {
                "id": "1",
                "entity": ENTITY,
                "username": ENTITY,
                "flags": "{}",
                "teams": teams,
            }
        }

    def do_sweepwithruns(self, variables: dict[str, Any]) -> dict[str, Any]:
        sweep = variables["sweep"]
        facts = {"id": sweep, "name": sweep, "config": yaml.safe_dump(self.sweeps[sweep])}
        return {"project": {"sweep": facts | {"state": "RUNNING", "runs": {"edges": []}}}}

    def do_createagent(self, variables: dict[str, Any]) -> dict[str, Any]:
        agent = uuid.uuid4().hex[:8]
        self.agents[agent] = variables["sweep"]
        return {"createAgent": {"agent": {"id": agent}}}

    def do_heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        agent = variables["id"]
        alive = json.loads(variables["runState"])
        commands = [
            {"type": "stop", "run_id": name} for name in alive if self.runs[name].is_to_stop
        ]
        if not alive and not commands:
            commands = [self._next(agent)]
        return {"agentHeartbeat": {"agent": {"id": agent}, "commands": json.dumps(commands)}}

    def _next(self, agent: str) -> dict[str, Any]:
        """Hand out a run: one that was preempted, then one that is new."""
        sweep = self.agents[agent]
        ours = [run for run in self.runs.values() if run.sweep == sweep]
        for state, kind in (("preempted", "resume"), ("pending", "run")):
            for run in ours:
                if run.state == state:
                    run.state = "handed out"
                    args = {key: {"value": value} for key, value in run.config.items()}
                    if kind == "resume":  # with all that the run has logged of itself
                        args["_wandb"] = {"value": {"desc": None, "t": {"1": [1]}}}
                    program = self.sweeps[sweep]["program"]
                    self.handed_out[run.name] = agent
                    return {"type": kind, "run_id": run.name, "args": args, "program": program}
        return {"type": "exit"}

    def do_upsertbucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name") or uuid.uuid4().hex[:8]
        is_new = name not in self.runs
        run = self.runs.setdefault(name, MirroredRun(name, {}))
        if run.state != "running":  # a client also calls this in the middle of a run
            run.starts += 1
            run.state, run.preempting, run.exit_code = "running", False, None
        project = {"id": "p", "name": PROJECT, "entity": {"id": "e", "name": ENTITY}}
        bucket = {
            "id": f"id-{name}",
            "name": name,
            "displayName": variables.get("displayName") or name,
            "description": "",
            "config": json.dumps(variables.get("config") or {}),
            "sweepName": run.sweep,
            "project": project,
            "historyLineCount": len(run.rows),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def do_runresumestatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        bucket = None
        if run and run.starts:
            tail = json.dumps([json.dumps(row) for row in run.rows[-1:]])
            bucket = {
                "id": f"id-{run.name}",
                "name": run.name,
                "summaryMetrics": "{}",
                "displayName": run.name,
                "logLineCount": 0,
                "historyLineCount": len(run.rows),
                "eventsLineCount": 0,
                "historyTail": tail,
                "eventsTail": "[]",
                "config": "{}",
                "tags": [],
                "wandbConfig": "{}",
            }
        return {
            "model": {
                "id": "p",
                "name": PROJECT,
                "entity": {"id": "e", "name": ENTITY},
                "bucket": bucket,
            }
        }

    def do_createrunfiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Let files go nowhere: rows come through the stream."""
        return {"createRunFiles": {"runID": "", "uploadHeaders": [], "files": []}}

    def do_runstoppedstatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"stopped": False}}}

    def take_stream(self, name: str, content: dict[str, Any]) -> dict[str, Any]:
        """Take in what a run streams."""
        with self.lock:
            run = self.runs.setdefault(name, MirroredRun(name, {}))
            history = content.get("files", {}).get("wandb-history.jsonl", {})
            for line in history.get("content", []):
                run.rows.append(json.loads(line))
            run.preempting = run.preempting or bool(content.get("preempting"))
            if content.get("complete"):
                run.exit_code = content.get("exitcode")
                failed = "preempted" if run.preempting else "failed"
                run.state = failed if run.exit_code else "finished"
        return {"exitcode": None, "limits": {}}


class Handler(BaseHTTPRequestHandler):
    """HTTP for a `Server`."""

    server: "HttpServer"
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if body[:2] == b"\x1f\x8b":
            body = gzip.decompress(body)
        state = self.server.state
        state.bytes_seen += body
        if not self._behave(state.misbehaviour):
            return
        if self.path == "/graphql":
            content = json.loads(body)
            answer = {"data": state.answer(content["query"], content.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            answer = state.take_stream(self.path.split("/")[-2], json.loads(body))
        else:
            state.unknown.append(self.path)
            answer = {}
        self._send(200, answer)

    do_PUT = do_POST

    def do_GET(self) -> None:
        if self._behave(self.server.state.misbehaviour):
            self._send(200, {})

    def _behave(self, misbehaviour: str | None) -> bool:
        if misbehaviour == "fail":
            self._send(500, {"error": "injected"})
        elif misbehaviour == "hang":
            self.server.ended.wait(300)
        elif misbehaviour == "slow":
            time.sleep(3)
        return misbehaviour in (None, "slow")

    def _send(self, code: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class HttpServer(ThreadingHTTPServer):
    """Listens on loopback only."""

    daemon_threads = True

    def __init__(self, state: Server) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.state = state
        self.ended = threading.Event()


@contextmanager
def serving() -> Iterator[tuple[Server, str]]:
    """Yield a server and its address."""
    state = Server()
    http = HttpServer(state)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield state, f"http://127.0.0.1:{http.server_address[1]}"
    finally:
        http.ended.set()
        http.shutdown()
        http.server_close()
