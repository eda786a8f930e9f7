"""Measurements of single calls: heartbeats, reads, creates, pushes, log uploads.

Owns: the rows of the table that are about requests a second. Ignores: fleets of agents and large logs.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
from typing import Any

from clients import uploads
from database import APP, PUSHED, REPO, Size, agent_id, count, heartbeat, host_name, ids_of, secret_of, session_of
from load import Load
from machine import TOKEN, WEBHOOK_SECRET, Client, Controller, Wrong, http_request, in_process
from setting import Setting

FLEET = Size(hosts=1000)  # what creates go to
BUSY = 16  # connections of agents


def heartbeats(setting: Setting) -> None:
    """A heartbeat that brings no job, beside the bare server; then with a large database, beside one without."""
    beats = [heartbeat(number) for number in range(BUSY)]
    with setting.controller(Size(BUSY)) as small:
        load, bare = setting.beside_bare(beats, BUSY, lambda: setting.drive(small.port, beats, BUSY, True), own=True)
        more = {"p50_ms": load.p50, "p99_ms": load.p99}
        setting.row("heartbeat", f"heartbeat, {BUSY} connections", load.rate, "/s", yardstick=bare, at_least=0.75, detail=more)
        size = setting.big()
        with setting.controller(size) as big:
            before = setting.drive(small.port, beats, BUSY, True).rate
            load = setting.drive(big.port, beats, BUSY, True)
            after = setting.drive(small.port, beats, BUSY, True).rate
    work = f"heartbeat, {size.pending:,} pending, {size.ended:,} ended"
    setting.row("heartbeat_big", work, load.rate, "/s", yardstick=("without them", [before, after]), at_least=0.9)


def reads(setting: Setting) -> None:
    """GET /v1/jobs/{id}: of a job that was just made, and of any one of very many."""
    with setting.controller(FLEET) as controller, contextlib.closing(controller.client()) as client:
        jobs = [client.ok("POST", "/v1/jobs", job_asked(number))["job"]["id"] for number in range(100)]
        read_of(setting, controller, jobs, "get_recent", "GET a recent job", 0.75)
    size = setting.big()
    with setting.controller(size) as controller:
        jobs = ids_of(controller.db, "status IN ('success', 'failed')", setting.scale.listed)
        read_of(setting, controller, jobs, "get_random", f"GET one of {size.ended:,} jobs at random", 0.35)


def read_of(setting: Setting, controller: Controller, jobs: list[str], name: str, work: str, at_least: float) -> None:
    gets = [http_request("GET", f"/v1/jobs/{job}", TOKEN) for job in jobs]
    load, bare = setting.beside_bare(gets, BUSY, lambda: setting.drive(controller.port, gets, BUSY))
    setting.row(
        name, f"{work}, {BUSY} connections", load.rate, "/s", yardstick=bare, at_least=at_least, detail={"p99_ms": load.p99}
    )


def job_asked(number: int, run: str = "a", first: int = 0) -> dict[str, Any]:
    """The body of a create; each number is another job, for one of FLEET.hosts hosts from that one on."""
    return {"repo": REPO, "ref": f"v-{run}-{number:08d}", "host": host_name(first + number % FLEET.hosts), "app": APP}


def creates_of(how_many: int, run: str, first: int = 0) -> list[bytes]:
    asked = (json.dumps(job_asked(number, run, first)).encode() for number in range(how_many))
    return [http_request("POST", "/v1/jobs", TOKEN, body) for body in asked]


def creates(setting: Setting) -> None:
    """POST /v1/jobs, each a new job, durable before its answer."""
    with setting.controller(FLEET) as controller:
        for connections, at_least in ((1, 0.4), (16, 1.0), (64, 1.3)):
            before = setting.commits()
            requests = creates_of(setting.plenty(), f"c{connections}")
            had = count(controller.db, "count(*) FROM jobs")
            load = setting.drive(controller.port, requests, connections)
            made = count(controller.db, "count(*) FROM jobs") - had
            check_made(setting, load, made, len(requests), connections, "POST /v1/jobs")
            setting.row(
                f"create_{connections}",
                f"POST /v1/jobs, {connections} connection{'s' * (connections > 1)}",
                load.rate,
                "/s",
                yardstick=("SQLite alone", [before, setting.commits()]),
                at_least=at_least,
                detail={"p50_ms": load.p50, "p99_ms": load.p99, "jobs": made},
            )


def check_made(setting: Setting, load: Load, made: int, prepared: int, connections: int, what: str) -> None:
    """Each answer stands for one that is there. Those under way when the load ended may be there too."""
    if load.requests + connections > prepared:
        raise Wrong(f"{what}: faster than was prepared for: {load.requests} of {prepared}")
    right = load.requests <= made <= load.requests + connections
    setting.check(right, f"{what}: {load.requests} were answered as made, {made} are in the database")


def push_request(number: int, size: int = 7 * 1024) -> bytes:
    """A push event of about that size, signed, as GitHub sends it: another commit each, of one of many repositories."""
    repo = f"pushed-{number % PUSHED}"
    commit, before = f"{number + 1:040x}", f"{number + (1 << 80):040x}"  # 0 is that of a ref that was deleted
    author = {"name": "Ann Example", "email": "ann@example.com", "username": "ann"}
    change = {"id": commit, "message": f"Change number {number}", "timestamp": "2026-11-22T10:00:00+01:00", "author": author}
    owner = {"name": "myorg", "login": "myorg", "id": 1, "type": "Organization", "url": "https://api.github.com/orgs/myorg"}
    payload = {
        "ref": "refs/heads/main",
        "before": before,
        "after": commit,
        "repository": {
            "id": 1,
            "name": repo,
            "full_name": f"myorg/{repo}",
            "owner": owner,
            "default_branch": "main",
            "pushed_at": 1_790_000_000,
        },
        "pusher": {"name": "ann", "email": "ann@example.com"},
        "sender": {"login": "ann", "id": 2, "type": "User"},
        "created": False,
        "deleted": False,
        "forced": False,
        "head_commit": change,
        "commits": [change],
    }
    files: list[str] = []
    missing = size - len(json.dumps(payload))
    while missing > 0:
        files.append(f"src/package/module_{len(files):04d}.py")
        missing -= len(files[-1]) + 3
    payload["commits"] = [{**change, "added": [], "removed": [], "modified": files}]
    body = json.dumps(payload, separators=(",", ":")).encode()
    return http_request("POST", "/v1/webhooks/github", None, body, **github_headers(body, number))


def github_headers(body: bytes, number: int) -> dict[str, str]:
    digest = hmac.new(WEBHOOK_SECRET.encode(), body, hashlib.sha256).hexdigest()
    return {
        "X_GitHub_Event": "push",
        "X_GitHub_Delivery": f"72d3162e-cc78-11e3-81ab-{number:012x}",
        "X_Hub_Signature_256": f"sha256={digest}",
    }


def pushes(setting: Setting) -> None:
    """A signed push of 7 KiB that makes a job on each of two hosts, durable with its delivery before the answer."""
    with setting.controller(FLEET) as controller:
        before = setting.commits()
        requests = [push_request(number) for number in range(setting.plenty() // 3)]
        load = setting.drive(controller.port, requests, BUSY)
        deliveries = count(controller.db, "count(*) FROM deliveries")
        jobs = count(controller.db, "count(*) FROM jobs")
    check_made(setting, load, deliveries, len(requests), BUSY, "pushes")
    setting.check(jobs == 2 * deliveries, f"{deliveries} pushes for two hosts each made {jobs} jobs")
    setting.row(
        "push",
        f"signed push of 7 KiB for two hosts, {BUSY} connections",
        load.rate,
        "/s",
        yardstick=("SQLite alone", [before, setting.commits()]),
        at_least=0.4,
        detail={"p50_ms": load.p50, "p99_ms": load.p99, "deliveries": deliveries, "jobs": jobs, "bytes": len(requests[0])},
    )


def running_jobs(client: Client, hosts: int, first: int = 0, run: str = "run") -> list[tuple[str, str, int]]:
    """A job that each of those hosts has taken: (id, token of the host, attempt)."""
    jobs = []
    for number in range(first, first + hosts):
        asked = {"repo": REPO, "ref": f"{run}-{number}", "host": host_name(number), "app": APP}
        client.ok("POST", "/v1/jobs", asked)
        beat = {"status": "online", "session": session_of(number), "running": []}
        job = client.ok("POST", f"/v1/agents/{agent_id(number)}/heartbeat", beat)["job"]
        if job is None:
            raise Wrong(f"{host_name(number)} got no job")
        jobs.append((job["id"], secret_of(number), job["attempt"]))
    return jobs


def log_uploads(setting: Setting) -> None:
    """Log lines of as many running jobs as there are connections, durable before the answer."""
    lines, size = 100, 80
    with setting.controller(Size(BUSY), "--log-limit", "100GiB") as controller, contextlib.closing(controller.client()) as client:
        jobs = running_jobs(client, BUSY)
        seen = in_process(uploads, controller.port, jobs, lines, size, setting.seconds).result()
        stored = sum(lines_of(client, job) for job, _, _ in jobs)
    setting.check(seen["statuses"].keys() <= {200}, f"log uploads were answered {seen['statuses']}")
    setting.check(stored == seen["lines"], f"{seen['lines']} log lines were acknowledged, {stored} are there")
    work = f"log upload, {lines} lines of {size} bytes a call, {BUSY} connections"
    more = {name: seen[name] for name in ("p50_ms", "p99_ms", "rate")}
    setting.row("logs", work, seen["lines_per_s"], "lines/s", at_least=150_000, detail=more)


def lines_of(client: Client, job: str) -> int:
    """How many lines of its log there are, by its text."""
    answer = client.raw("GET", f"/v1/jobs/{job}/logs", Accept="text/plain")
    lines = 0
    while data := answer.read(1 << 20):
        lines += data.count(b"\n")
    return lines
