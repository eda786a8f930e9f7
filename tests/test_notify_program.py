"""notify.py against a scripted controller (its stream, as docs/design.md has it) and a web server that checks what it is sent.

The server refuses what GitHub and Slack document as wrong, so a request of another shape fails the test by its own answer. Most
tests drive the parts in this process; signals, kill -9 and two at once are tried on real ones. Nothing sleeps to wait.
"""

import hashlib
import hmac
import html
import http.client
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import wait_for

import notify

PROGRAM = Path(notify.__file__)
SECRET = "dbt_signs"
COMMIT = "4f2a" * 10
NOW = 1_790_000_000.0
START, LATER = "2026-09-21T14:13:20.000Z", "2026-09-21T14:14:00.000Z"  # NOW, and 40 s on
LIMIT_S = 15

Got = namedtuple("Got", "method path headers body data")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("DEPLOYBOT_") or name.lower().endswith("_proxy") or name in ("GITHUB_TOKEN", "STATE_DIRECTORY"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(notify, "GITHUB_PACE_S", 0)
    monkeypatch.chdir(tmp_path)


def deployment(status="running", name="d1", app="web", ref=COMMIT, **more):
    """As docs/design.md has it, of 3 hosts."""
    done = {"success": (3, 0), "partial": (2, 1), "failed": (0, 3), "rolled_back": (0, 3)}.get(status, (0, 0))
    progress = {"held": 0, "pending": 0, "running": 0, "success": done[0], "failed": done[1], "cancelled": 0}
    return {
        **{"id": name, "app": app, "repo": "myorg/web", "ref": ref, "branch": "main", "kind": "push", "status": status},
        **{"reason": None, "strategy": {"type": "parallel"}, "hosts": 3, "progress": progress, "hold": None, "resume_at": None},
        **{"override": False, "retry_of": None, "superseded_by": None, "delivery_id": None, "created_at": START},
        **{"created_by": "alice", "started_at": None if status == "pending" else LATER, "completed_at": None},
        **more,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Servers


class Server:
    """An HTTP server of this test; `answer(got)` gives (status, headers, body)."""

    def __init__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.handle(self)

            do_POST = do_GET

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # whoever asked was killed
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle(self, handler):
        length = int(handler.headers.get("Content-Length") or 0)
        data = handler.rfile.read(length)
        status, headers, body = self.answer(
            Got(handler.command, handler.path, handler.headers, json.loads(data) if data else None, data)
        )
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    def close(self):
        self.http.shutdown()
        self.http.server_close()


# https://docs.github.com/rest/commits/statuses#create-a-commit-status, rest/deployments/deployments#create-a-deployment,
# rest/deployments/statuses#create-a-deployment-status: field -> what it may be
GITHUB_BODIES = (
    (
        r"/repos/myorg/web/statuses/[0-9a-f]{40}",
        {"state": ("error", "failure", "pending", "success")},
        {"target_url": str, "description": str, "context": str},
    ),
    (
        r"/repos/myorg/web/deployments",
        {"ref": str},
        {"auto_merge": bool, "required_contexts": list, "payload": dict, "environment": str, "description": str, "task": str}
        | {"transient_environment": bool, "production_environment": bool},
    ),
    (
        r"/repos/myorg/web/deployments/[0-9]+/statuses",
        {"state": ("error", "failure", "inactive", "in_progress", "queued", "pending", "success")},
        {"target_url": str, "log_url": str, "description": str, "environment": str, "environment_url": str, "auto_inactive": bool},
    ),
)


def fits(value, kind):
    return value in kind if isinstance(kind, tuple) else type(value) is kind


def github_says(got, number):
    """(status, body), as GitHub's documentation has it."""
    if got.headers.get("Authorization") != "Bearer ghp_good":
        return 401, {"message": "Bad credentials"}
    headers = {"Accept": "application/vnd.github+json", "X-GitHub-Api-Version": "2022-11-28", "Content-Type": "application/json"}
    if {name: got.headers.get(name) for name in headers} != headers or "deploybot" not in got.headers.get("User-Agent", ""):
        return 400, {"message": "a header is wrong"}
    for pattern, needed, more in GITHUB_BODIES:
        if re.fullmatch(pattern, got.path.removeprefix("/api/v3")):
            known = needed | more
            wrong = [name for name, value in got.body.items() if name not in known or not fits(value, known[name])]
            wrong += [name for name in needed if name not in got.body]
            wrong += ["description"] if len(got.body.get("description", "")) > 140 else []
            return (422, {"message": f"wrong: {wrong}"}) if wrong else (201, {"id": number})
    return 404, {"message": "Not Found"}


def slack_says(got):
    """(status, body) of an incoming webhook: https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks"""
    body = got.body
    good = (
        got.headers["Content-Type"] == "application/json" and isinstance(body.get("text"), str) and set(body) <= {"text", "blocks"}
    )
    for block in body.get("blocks", ()):
        text = block.get("text", {})
        good = good and block["type"] == "section" and set(text) <= {"type", "text", "emoji", "verbatim"}
        good = good and text["type"] == "mrkdwn" and 1 <= len(text["text"]) <= 3000
    return (200, b"ok") if good else (400, b"invalid_payload")


class World(Server):
    """GitHub under /repos, Slack under /slack, and programs under all else. `script`: {start of a path: [answers ahead of these]}."""

    def __init__(self):
        self.got, self.script, self.lock, self.held = [], {}, threading.Lock(), {}
        super().__init__()

    def answer(self, got):
        with self.lock:
            self.got.append(got)
            number = len(self.got)
            found = next((path for path in self.script if got.path.startswith(path) and self.script[path]), None)
            scripted = self.script[found].pop(0) if found else None
        for path, gate in self.held.items():
            if got.path.startswith(path):
                gate.wait(LIMIT_S)
        if scripted:
            return scripted
        if "/repos/" in got.path:
            status, body = github_says(got, number)
            return status, {}, body
        if got.path.startswith("/slack"):
            status, body = slack_says(got)
            return status, {"Content-Type": "text/html"}, body
        return 200, {}, {"echo": got.path}

    def at(self, path):
        with self.lock:
            return [got for got in self.got if got.path.startswith(path)]

    def bodies(self, path):
        return [got.body for got in self.at(path)]

    def told(self, path="/hook"):
        return [(body["event"], body["deployment"]["id"]) for body in self.bodies(path)]


class FakeController(Server):
    """A stream of what news() says, resumable as the controller's. `cut`: connections end after so many events."""

    def __init__(self):
        self.epoch, self.events, self.deployments, self.asked, self.cut = "0a1b2c3d", [], {}, [], None
        self.pulse, self.token, self.gap = 0.05, None, None
        self.changed, self.closed = threading.Condition(), False
        super().__init__()

    def news(self, data, kind="deployment"):
        with self.changed:
            self.events.append((kind, json.dumps(data)))
            if kind == "deployment":
                self.deployments[data["id"]] = data
            self.changed.notify_all()

    def handle(self, handler):
        self.asked.append((handler.path, handler.headers.get("Last-Event-ID"), handler.headers.get("Authorization")))
        if self.token and handler.headers.get("Authorization") != f"Bearer {self.token}":
            return super().handle(handler)
        if not handler.path.startswith("/v1/logs/stream"):
            return super().handle(handler)
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        try:
            for piece in self.pieces(handler.headers.get("Last-Event-ID")):
                handler.wfile.write(piece.encode())
                handler.wfile.flush()
        except OSError:
            pass  # it went away

    def pieces(self, last_id):
        epoch, _, position = (last_id or "").partition("-")
        at = int(position) if epoch == self.epoch else len(self.events)
        yield f"retry: 2000\nid: {self.epoch}-{at}\n\n"
        if self.gap:
            yield f"event: gap\ndata: {json.dumps({'detail': self.gap})}\n\n"
        sent = 0
        while not self.closed:
            with self.changed:
                self.changed.wait_for(lambda at=at: len(self.events) > at or self.closed, self.pulse)
                new = self.events[at:]
            for kind, data in new:
                at, sent = at + 1, sent + 1
                yield f"id: {self.epoch}-{at}\nevent: {kind}\ndata: {data}\n\n"
                if self.cut and sent >= self.cut:
                    return
            if not new:
                yield f": nothing new\nid: {self.epoch}-{at}\n\n"

    def answer(self, got):
        if self.token and got.headers.get("Authorization") != f"Bearer {self.token}":
            return 401, {}, {"title": "Unauthorized"}
        if got.path == "/v1/jobs?limit=1":
            return 200, {}, {"jobs": [], "next": None}
        found = self.deployments.get(got.path.removeprefix("/v1/deployments/"))
        return (200, {}, {"deployment": found}) if found else (404, {}, {"title": "Not found"})

    def close(self):
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        super().close()


@pytest.fixture
def world():
    server = World()
    yield server
    for gate in server.held.values():
        gate.set()
    server.close()


@pytest.fixture
def controller():
    server = FakeController()
    yield server
    server.close()


# ----------------------------------------------------------------------------------------------------------------------
# notify.py in this process


class Program:
    """Its parts, put together as main() does, with a clock that stands still. No sender has a thread: deliver() is one."""

    def __init__(self, config):
        self.config, self.clock = config, NOW
        config.state.mkdir(exist_ok=True)
        self.restart()

    def restart(self):
        self.desk = notify.Desk(self.config, notify.read_apps(self.config), lambda: self.clock)
        self.reader = notify.Reader(self.config, self.desk)

    def takes(self, *deployments):
        for one in deployments:
            self.desk.take(one)

    def deliver(self):
        for receiver in self.desk.receivers.values():
            receiver.run(once=True)

    def tells(self, *deployments):
        self.takes(*deployments)
        self.deliver()

    def waiting(self):
        return sum(receiver.waiting() for receiver in self.desk.receivers.values())


def write_apps(folder, *targets, **more):
    app = {"name": "web", "repo": "myorg/web", "hosts": ["web-01"], "notify": list(targets), **more}
    (folder / "apps.yaml").write_text(json.dumps({"apps": [app]}))


@pytest.fixture
def make(tmp_path, world, controller):
    """Makes the program; its one app tells `targets`, and GitHub where `github`."""

    def make(*targets, github=False, apps=None, **more):
        write_apps(tmp_path, *targets, **{"clone_url": f"{world.url}/myorg/web.git", **(apps or {})})
        settings = {"url": controller.url, "apps": tmp_path / "apps.yaml", "state": tmp_path / "state", "api_url": world.url}
        settings |= {"public_url": "https://deploy.example.com", "stuck_after": 1800, "log_level": "INFO", "check": False}
        settings |= {"once": False, "token": None, "github_token": "ghp_good" if github else None, "secret": SECRET}
        return Program(notify.Config(**{**settings, **more}))

    return make


@pytest.fixture
def hook(world):
    return {"url": world.url + "/hook/T0K3N", "events": list(notify.EVENTS)}


@pytest.fixture
def slack(world):
    return {"url": world.url + "/slack/T0/B0/XYZ", "events": list(notify.EVENTS), "format": "slack"}


@pytest.fixture
def pauses(monkeypatch):
    """What senders would have waited, in seconds; nobody waits."""
    seen = []
    monkeypatch.setattr(notify.Receiver, "_rest", lambda self, pause, busy=False: seen.append(pause) if not busy else None)
    return seen


def until_empty(receiver):
    """Runs a sender that nobody ends until its queue is empty."""
    while (number := receiver._first(True)) is not None:
        pause = receiver._attempt(number)
        if pause is None:
            receiver._remove(number)
        else:
            receiver._rest(pause)


# ----------------------------------------------------------------------------------------------------------------------
# What people are told


@pytest.mark.parametrize(
    "statuses, events",
    [
        (["pending", "running", "success"], ["success"]),
        (["pending", "running", "failed"], ["failed"]),
        (["running", "partial"], ["failed"]),
        (["running", "rolled_back"], ["failed"]),
        (["pending", "cancelled"], []),
        (["failed", "failed"], ["failed"]),
        (["success", "failed"], ["success"]),  # an ended one does not end again
    ],
)
def test_each_end_is_told_once(make, world, hook, statuses, events):
    make(hook).tells(*map(deployment, statuses))
    assert [event for event, _ in world.told()] == events


@pytest.mark.parametrize("bad", ["failed", "partial", "rolled_back"])
def test_a_success_behind_a_failure_is_a_recovery_also_after_a_restart(make, world, hook, bad):
    program = make(hook)
    program.tells(deployment(bad, "d1"), deployment("cancelled", "d2"), deployment("running", "d3"))
    program.restart()
    program.tells(deployment("success", "d3"), deployment("success", "d4"))
    assert world.told() == [("failed", "d1"), ("recovered", "d3"), ("success", "d4")]


def test_a_recovery_is_a_success_to_who_asked_for_no_recoveries(make, world, hook):
    make(hook | {"events": ["success"]}).tells(deployment("failed"), deployment("success", "d2"))
    assert world.told() == [("success", "d2")]


def test_failures_and_recoveries_are_what_is_told_where_nothing_is_said(make, world, hook):
    del hook["events"]
    program = make(hook)
    program.tells(deployment("success"), deployment("failed", "d2"), deployment("success", "d3"), deployment("success", "d4"))
    assert world.told() == [("failed", "d2"), ("recovered", "d3")]


def test_another_app_and_another_repository_are_not_told_of(make, world, hook):
    program = make(hook, github=True)
    program.tells(deployment("failed", app="api"), deployment("failed", repo="evil/web"))
    assert world.got == []
    program.tells(deployment("failed", repo="MyOrg/Web"))
    assert world.told() == [("failed", "d1")]


def test_json_is_signed_and_as_the_readme_says(make, world, hook):
    news = deployment("failed", reason="2 hosts failed")
    make(hook).tells(news)
    (got,) = world.at("/hook")
    signature = "sha256=" + hmac.new(SECRET.encode(), got.data, hashlib.sha256).hexdigest()
    assert got.headers["X-DeployBot-Signature-256"] == signature
    assert got.headers["Content-Type"] == "application/json"
    link = "https://deploy.example.com/#deployment=d1"
    assert got.body == {"id": "d1-failed", "event": "failed", "at": "2026-09-21T14:13:20Z", "url": link, "deployment": news}


# ----------------------------------------------------------------------------------------------------------------------
# Stuck


def overdue(program, controller, now, **more):
    """The clock goes on, and the reader looks."""
    program.clock = now
    controller.deployments |= {"d1": deployment(**more)} if more else {}
    program.reader.look()
    program.deliver()


@pytest.mark.parametrize("status, begun", [("pending", 0), ("running", 40)])
def test_what_takes_too_long_is_stuck_once(make, world, controller, hook, status, begun):
    program = make(hook)
    controller.deployments["d1"] = deployment(status)
    program.takes(deployment(status))
    overdue(program, controller, NOW + 1799 + begun)
    assert world.told() == []
    overdue(program, controller, NOW + 1800 + begun)
    program.restart()
    asked = len(controller.asked)
    overdue(program, controller, NOW + 9000)
    assert len(controller.asked) == asked
    program.tells(deployment(status, hold="batch"), deployment("success"))
    assert world.told() == [("stuck", "d1"), ("success", "d1")]


@pytest.mark.parametrize("hold", ["lock", "pause"])
def test_what_is_held_on_purpose_is_not_stuck_and_its_time_begins_when_it_is_let_go(make, world, controller, hook, hold):
    program = make(hook)
    program.takes(deployment("running", hold=hold))
    overdue(program, controller, NOW + 9000, hold=hold)
    program.takes(deployment("running"))
    overdue(program, controller, NOW + 9000 + 1799, status="running")
    program.takes(deployment("running", hold="batch"))
    overdue(program, controller, NOW + 9000 + 1799, hold="batch")
    assert world.told() == []
    overdue(program, controller, NOW + 9000 + 1800)
    assert world.told() == [("stuck", "d1")]


def test_what_has_ended_meanwhile_is_told_as_such(make, world, controller, hook):
    program = make(hook)
    program.takes(deployment("running"))
    overdue(program, controller, NOW + 9000, status="failed")
    program.tells(deployment("failed"))  # the event of it, which came late
    assert world.told() == [("failed", "d1")]


def test_what_the_controller_does_not_know_any_more_is_forgotten(make, world, controller, hook):
    program = make(hook)
    program.takes(deployment("running"))
    overdue(program, controller, NOW + 9000)
    assert [path for path, *_ in controller.asked] == ["/v1/deployments/d1"]
    overdue(program, controller, NOW + 9000)
    assert len(controller.asked) == 1 and world.told() == []


def test_a_stream_without_news_looks_too(make, world, controller, hook, monkeypatch):
    monkeypatch.setattr(notify, "LOOK_EVERY_S", 0)
    program, looked = make(hook), []
    program.takes(deployment("running"))
    controller.deployments["d1"] = deployment("running")
    program.clock, program.desk.cursor = NOW + 9000, f"{controller.epoch}-0"

    def end():
        try:
            looked.append(wait_for(lambda: [path for path, *_ in controller.asked if path == "/v1/deployments/d1"], 5))
        finally:
            controller.news({}, kind="log")

    threading.Thread(target=end, daemon=True).start()
    program.reader.follow(until=1)
    program.deliver()
    assert looked and world.told() == [("stuck", "d1")]


# ----------------------------------------------------------------------------------------------------------------------
# GitHub


@pytest.mark.parametrize(
    "status, more, state, phase",
    [
        ("pending", {}, "pending", "queued"),
        ("pending", {"hold": "lock"}, "pending", "queued"),
        ("running", {}, "pending", "in_progress"),
        ("running", {"hold": "pause"}, "pending", "in_progress"),
        ("success", {}, "success", "success"),
        ("partial", {}, "failure", "failure"),
        ("failed", {}, "failure", "failure"),
        ("rolled_back", {}, "failure", "failure"),
        ("cancelled", {}, "error", "error"),
        ("cancelled", {"superseded_by": "d2"}, "error", "inactive"),
    ],
)
def test_github_gets_each_state(make, world, status, more, state, phase):
    program = make(github=True)
    program.tells(deployment(status, **more))
    link = "https://deploy.example.com/#deployment=d1"
    first, create, last = world.got
    words = first.body["description"]
    assert first.path == f"/repos/myorg/web/statuses/{COMMIT}"
    assert first.body == {"state": state, "context": "deploybot/web", "description": words, "target_url": link}
    made = {"ref": COMMIT, "environment": "web", "auto_merge": False, "required_contexts": []}
    assert create.body == made | {"description": "DeployBot: web", "payload": {"deploybot_id": "d1"}}
    assert last.path == "/repos/myorg/web/deployments/2/statuses"
    assert last.body == {"state": phase, "description": words, "log_url": link}
    assert program.waiting() == 0


def test_github_is_told_each_change_of_one_deployment_also_after_a_restart(make, world):
    program = make(github=True)
    program.tells(deployment("pending"))
    program.restart()
    program.tells(
        deployment("running"), deployment("running", hold="pause"), deployment("running", hold="pause"), deployment("success")
    )
    phases = [got.body["state"] for got in world.at("/repos/myorg/web/deployments/2/statuses")]
    assert phases == ["queued", "in_progress", "in_progress", "success"]
    assert len([got for got in world.got if got.path.endswith("/deployments")]) == 1
    assert len(world.at("/repos/myorg/web/statuses")) == 4


@pytest.mark.parametrize("ref", ["main", "v1.2", COMMIT[:39], COMMIT + "0", None, "../" * 10])
def test_github_is_told_of_full_commits_alone(make, world, ref):
    make(github=True).tells(deployment(ref=ref))
    assert world.got == []


@pytest.mark.parametrize(
    "api, clone, told",
    [
        ("https://api.github.com", None, True),
        ("https://api.github.com", "git@github.com:myorg/web.git", True),
        ("https://api.github.com", "ssh://git@ssh.github.com:443/myorg/web.git", True),
        ("https://api.github.com", "https://gitlab.com/myorg/web.git", False),
        ("https://api.github.com", "/srv/git/github.com/web.git", False),
        ("https://api.github.com", "https://github.com.evil.example/myorg/web.git", False),
        ("https://ghe.example.com/api/v3", "https://ghe.example.com/myorg/web.git", True),
        ("https://ghe.example.com/api/v3", None, False),
        ("https://api.corp.ghe.com", "git@corp.ghe.com:myorg/web.git", True),
    ],
)
def test_github_is_told_of_what_is_on_github(make, api, clone, told):
    program = make(github=True, api_url=api, apps={"clone_url": clone})
    assert program.desk.apps["web"].on_github is told


@pytest.mark.parametrize("repo", ["../web", "myorg/..", "myorg/web/../../x", "myorg/w b", "myorg"])
def test_no_repository_leads_elsewhere_in_the_api(make, world, repo):
    program = make(github=True, apps={"repo": repo, "clone_url": f"{world.url}/x.git"})
    program.tells(deployment(repo=repo))
    assert world.got == []


def test_without_a_token_github_is_told_nothing(make, world):
    make().tells(deployment())
    assert world.got == []


def test_the_api_of_an_enterprise_server_has_a_path(make, world):
    make(github=True, api_url=world.url + "/api/v3").tells(deployment())
    assert [got.path.partition("/repos")[0] for got in world.got] == ["/api/v3"] * 3


def test_a_long_or_hostile_reason_is_a_description_that_github_takes(make, world):
    program = make(github=True)
    program.tells(deployment("failed", reason="\x1b[31mno\n\U0001f600" + "x" * 500))
    descriptions = [got.body["description"] for got in world.got if "state" in got.body]
    assert len(descriptions) == 2 and program.waiting() == 0
    for text in descriptions:
        assert len(text) == 140 and text.startswith("failed: 0 of 3 hosts succeeded, 3 failed: no ?xx")


def test_a_deployment_that_github_does_not_make_is_dropped_and_said(make, world, caplog):
    world.script["/repos/myorg/web/deployments"] = [(409, {}, {"message": "Conflict: \x1b[2J"}), (202, {}, {"message": "merged"})]
    program = make(github=True)
    program.tells(deployment("pending"), deployment("running"), deployment("success"))
    assert [got.body["state"] for got in world.at("/repos/myorg/web/deployments/")] == ["success"]
    said = [record.getMessage() for record in caplog.records if "refuses" in record.getMessage()]
    assert len(said) == 2 and "409 Conflict: " in said[0] and "\x1b" not in said[0]


LIMITS = [
    ({"Retry-After": "17"}, {"message": "You have exceeded a secondary rate limit"}, 17),
    ({"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "2000000000"}, {"message": "API rate limit exceeded"}, notify.WAIT_MOST_S),
    ({"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1"}, {"message": "API rate limit exceeded"}, 1),
    ({}, {"message": "You have exceeded a secondary rate limit"}, 60),
]


@pytest.mark.parametrize("status", [403, 429])
@pytest.mark.parametrize("headers, body, wait", LIMITS)
def test_the_limits_of_github_are_kept_to(make, world, pauses, status, headers, body, wait):
    world.script["/repos"] = [(status, headers, body)]
    program = make(github=True)
    program.takes(deployment())
    until_empty(program.desk.receivers["github"])
    assert pauses == [wait]
    assert [got.path for got in world.got][:2] == [f"/repos/myorg/web/statuses/{COMMIT}"] * 2


def test_a_403_without_a_limit_is_for_good(make, world, pauses):
    world.script["/repos"] = [
        (403, {"X-RateLimit-Remaining": "4000"}, {"message": "Resource not accessible by personal access token"})
    ]
    program = make(github=True)
    program.takes(deployment())
    until_empty(program.desk.receivers["github"])
    assert pauses == [] and len(world.at("/repos/myorg/web/statuses")) == 1 and len(world.got) == 3


def test_requests_to_github_keep_a_second_between_them(make, world, monkeypatch):
    monkeypatch.setattr(notify, "GITHUB_PACE_S", 1)
    paces = []
    monkeypatch.setattr(notify.Receiver, "_rest", lambda self, pause, busy=False: paces.append((pause, busy)))
    make(github=True).tells(deployment())
    assert [busy for _, busy in paces] == [True] * 3
    assert paces[0][0] == 0 and all(0.5 < pause <= 1 for pause, _ in paces[1:])


# ----------------------------------------------------------------------------------------------------------------------
# Slack

HOSTILE = [
    "<!channel>",
    "<!here|x>",
    "<@U012AB3CD>",
    "<https://evil.example|sign in>",
    "&lt;!everyone&gt;",
    "<#C024BE91L>",
    "a\u202eb\x1b[0m\n",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("field", ["ref", "branch", "created_by", "reason", "app"])
def test_nothing_in_a_message_is_a_link_or_a_mention_but_our_link(make, world, slack, field, text):
    program = make(slack, apps={"name": text} if field == "app" else None)
    program.tells(deployment("failed", **{field: text}))
    assert program.waiting() == 0
    (body,) = world.bodies("/slack")
    (block,) = body["blocks"]
    shown = block["text"]["text"]
    assert block["text"]["verbatim"] is True
    assert re.findall("<[^>]*>", shown) == ["<https://deploy.example.com/#deployment=d1|details>"]
    assert "<" not in body["text"]
    assert notify.clean(text).strip() in html.unescape(shown)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", shown + body["text"])


def test_what_slack_is_told(make, world, slack, controller):
    program = make(slack)
    program.takes(deployment("running"))
    overdue(program, controller, NOW + 3000, status="running")
    program.tells(deployment("partial", reason="web-03 failed"), deployment("success", "d2"))
    shown = [body["blocks"][0]["text"]["text"].splitlines()[:3] for body in world.bodies("/slack")]
    assert shown == [
        ["*web is stuck (running for 49m)*", "4f2a4f2a of main by alice", "is being deployed: 0 of 3 hosts succeeded"],
        [
            "*web deployed in part*",
            "4f2a4f2a of main by alice",
            "deployed in part: 2 of 3 hosts succeeded, 1 failed: web-03 failed",
        ],
        ["*web works again*", "4f2a4f2a of main by alice", "deployed: 3 of 3 hosts succeeded"],
    ]
    assert "X-DeployBot-Signature-256" not in world.at("/slack")[0].headers


# ----------------------------------------------------------------------------------------------------------------------
# Receivers that fail


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
def test_what_may_pass_is_tried_again_in_order(make, world, hook, pauses, status):
    world.script["/hook"] = [(status, {"Retry-After": "33"}, b""), (status, {}, b""), (200, {}, b""), (503, {}, b"")]
    program = make(hook)
    program.takes(deployment("failed", "d1"), deployment("failed", "d2"), deployment("failed", "d3"))
    (receiver,) = program.desk.receivers.values()
    until_empty(receiver)
    assert [name for _, name in world.told()] == ["d1", "d1", "d1", "d2", "d2", "d3"]
    assert pauses[0] == 33 and 1 <= pauses[1] <= 2 and 0.5 <= pauses[2] <= 1


def test_pauses_grow_up_to_a_limit(make, world, hook, pauses):
    world.script["/hook"] = [(503, {}, b"")] * 20 + [(503, {"Retry-After": "999999"}, b"")]
    program = make(hook)
    program.takes(deployment("failed"))
    until_empty(*program.desk.receivers.values())
    assert all(2**n / 2 <= pause <= 2**n for n, pause in enumerate(pauses[:9]))
    assert all(150 <= pause <= 300 for pause in pauses[9:20]) and pauses[20] == 3600


@pytest.mark.parametrize("status", [301, 307, 400, 401, 403, 404, 410])
def test_what_is_refused_for_good_is_dropped_and_said_once(make, world, hook, pauses, caplog, status):
    elsewhere = {"Location": f"{world.url}/elsewhere"}
    world.script["/hook"] = [(status, elsewhere, b"no /hook/T0K3N here")]
    program = make(hook)
    program.takes(deployment("failed", "d1"), deployment("failed", "d2"))
    until_empty(*program.desk.receivers.values())
    assert [name for _, name in world.told()] == ["d1", "d2"] and pauses == []
    assert world.at("/elsewhere") == []
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"127.0.0.1 ({next(iter(program.desk.receivers))[:6]}) refuses message 1" in said and str(status) in said


def test_the_word_of_slack_is_in_the_log(make, world, slack, caplog):
    world.script["/slack"] = [(404, {}, b"no_service")]
    make(slack).tells(deployment("failed"))
    assert "404 no_service" in caplog.text


def test_no_url_and_no_secret_is_in_the_log(make, world, hook, slack, caplog):
    caplog.set_level(logging.DEBUG)
    world.script["/hook"] = [(404, {}, b"no /hook/T0K3N here"), (500, {}, b"/hook/T0K3N")]
    world.script["/repos"] = [(401, {}, {"message": "Bad credentials"}), (500, {}, b"")]
    program = make(hook, slack, {"url": "http://127.0.0.1:9/T0K3N"}, {"url": "http://a..b/T0K3N"}, github=True)
    program.tells(deployment("failed", "d1"), deployment("failed", "d2"))
    (program.config.apps).write_text("apps: []")
    notify.read_again(program.desk)
    assert "a receiver is gone, 2 messages" in caplog.text and "Connection refused" in caplog.text
    for secret in ("T0K3N", "XYZ", "ghp_", SECRET):
        assert secret not in caplog.text


def test_trouble_is_said_once_and_so_is_its_end(make, world, hook, pauses, caplog):
    caplog.set_level(logging.INFO)
    world.script["/hook"] = [(503, {}, b"")] * 5
    program = make(hook)
    program.takes(deployment("failed"))
    until_empty(*program.desk.receivers.values())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "503; 1 messages wait" in said[0] and "takes messages again" in said[1]


@pytest.mark.parametrize("busy, left", [(False, ["d3", "d4", "d5"]), (True, ["d1", "d4", "d5"])])
def test_where_too_many_wait_the_oldest_go_but_for_one_on_its_way(make, world, hook, caplog, monkeypatch, busy, left):
    monkeypatch.setattr(notify, "QUEUE_MOST", 3)
    program = make(hook)
    (receiver,) = program.desk.receivers.values()
    program.takes(deployment("failed", "d1"))
    receiver._busy = busy
    program.takes(*[deployment("failed", f"d{n}") for n in range(2, 6)])
    assert caplog.text.count("from here on the oldest are dropped") == 1
    assert len(list(receiver.folder.glob("*.json"))) == 3
    caplog.set_level(logging.INFO)
    program.deliver()
    assert [name for _, name in world.told()] == left
    assert "2 were dropped" in caplog.text
    assert program.waiting() == 0 and list(receiver.folder.glob("*.json")) == []


def test_a_certificate_of_an_unknown_ca_is_refused(make, world, tmp_path, caplog):
    import ssl

    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subprocess.run([*command, "-subj", "/CN=127.0.0.1", "-keyout", key, "-out", cert], capture_output=True, check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    world.http.socket = context.wrap_socket(world.http.socket, server_side=True)
    program = make({"url": f"https://127.0.0.1:{world.port}/hook"})
    program.tells(deployment("failed"))
    assert world.got == [] and program.waiting() == 1
    assert "self-signed certificate" in caplog.text


def test_what_was_taken_is_not_sent_again_because_its_answer_broke_off(make, world, hook, pauses, monkeypatch):
    world.script["/hook"] = [(200, {}, b""), (503, {}, b"")]
    real, errors = http.client.HTTPResponse.read, [ConnectionResetError(104, "reset")] * 2

    def breaks_off(self, size=None):
        if errors:
            raise errors.pop()
        return real(self, size)

    monkeypatch.setattr(http.client.HTTPResponse, "read", breaks_off)
    program = make(hook)
    program.takes(deployment("failed", "d1"), deployment("failed", "d2"))
    until_empty(*program.desk.receivers.values())
    assert [name for _, name in world.told()] == ["d1", "d2", "d2"] and len(pauses) == 1


def test_what_github_answers_is_needed_where_it_made_a_deployment(make, world, pauses):
    world.script["/repos/myorg/web/deployments"] = [(201, {"Content-Length": "99"}, b"")]
    program = make(github=True)
    program.takes(deployment())
    until_empty(program.desk.receivers["github"])
    assert [got.path for got in world.at("/repos/myorg/web/deployments/")] == ["/repos/myorg/web/deployments/3/statuses"]
    assert len(pauses) == 1


def test_a_number_of_github_that_cannot_be_noted_is_kept_in_mind(make, world, pauses, monkeypatch):
    program = make(github=True)
    program.takes(deployment())
    real, errors = notify.write_whole, [OSError(28, "No space left on device")]

    def full_once(path, text, sync=True):
        if path.name == "ids" and errors:
            raise errors.pop()
        return real(path, text, sync)

    monkeypatch.setattr(notify, "write_whole", full_once)
    until_empty(program.desk.receivers["github"])
    assert [got.path.rpartition("/web/")[2] for got in world.got[1:]] == ["deployments", "deployments/2/statuses"] and len(
        pauses
    ) == 1


def test_a_message_that_somebody_removed_or_that_is_damaged_holds_nothing_up(make, world, hook, pauses, caplog):
    program = make(hook)
    program.takes(*[deployment("failed", f"d{n}") for n in range(3)])
    (receiver,) = program.desk.receivers.values()
    receiver.path(1).unlink()
    receiver.path(2).write_text("{")
    until_empty(receiver)
    assert [name for _, name in world.told()] == ["d2"] and caplog.text.count("removed or damaged") == 2


# ----------------------------------------------------------------------------------------------------------------------
# What a crash leaves


@pytest.mark.parametrize("at", ["memory.json", "000000000001.json"])
def test_a_message_of_an_event_that_was_not_stored_is_made_anew(make, world, hook, monkeypatch, at):
    program = make(hook)
    real = notify.write_whole

    def dies(path, text, sync=True):
        if path.name == at:
            raise MemoryError  # as kill -9: nothing behind this line is run
        return real(path, text, sync)

    monkeypatch.setattr(notify, "write_whole", dies)
    with pytest.raises(MemoryError):
        program.takes(deployment("failed"))
    monkeypatch.setattr(notify, "write_whole", real)
    (receiver,) = program.desk.receivers.values()
    (receiver.folder / "000000000001.json.new").write_text("{")  # as if it were killed while it wrote
    program.restart()
    assert program.waiting() == 0 and list(receiver.folder.iterdir()) == []
    program.tells(deployment("failed"))
    assert world.told() == [("failed", "d1")]


def test_an_event_that_is_read_again_makes_no_second_message(make, world, hook):
    program = make(hook, github=True)
    program.tells(deployment("failed"))
    program.restart()
    program.tells(deployment("failed"))
    assert world.told() == [("failed", "d1")] and len(world.at("/repos")) == 3


def test_what_cannot_be_stored_does_not_count_and_is_taken_later(make, world, controller, hook, monkeypatch):
    program = make(hook, hook | {"url": world.url + "/other"})
    real = notify.write_whole

    def full(path, text, sync=True):
        if path.name == "memory.json":
            raise OSError(28, "No space left on device")
        return real(path, text, sync)

    controller.news(deployment("failed"))
    program.desk.cursor = f"{controller.epoch}-0"
    monkeypatch.setattr(notify, "write_whole", full)
    with pytest.raises(OSError, match="No space"):
        program.reader.follow(until=1)
    assert program.desk.cursor == f"{controller.epoch}-0"
    assert list(program.desk.outbox.glob("*/*.json")) == [] and program.waiting() == 0
    monkeypatch.setattr(notify, "write_whole", real)
    program.reader.follow(until=1)
    program.deliver()
    assert world.told() == [("failed", "d1")] and world.told("/other") == [("failed", "d1")]


def test_what_waits_is_there_after_a_restart_in_order(make, world, hook):
    world.script["/hook"] = [(503, {}, b"")]
    program = make(hook)
    program.tells(*[deployment("failed", f"d{n}") for n in range(12)])
    program.restart()
    assert program.waiting() == 12
    program.deliver()
    assert [name for _, name in world.told()][1:] == [f"d{n}" for n in range(12)]


def test_memory_has_a_limit(make, hook, monkeypatch):
    monkeypatch.setattr(notify, "KNOWN_MOST", 3)
    program = make(hook, github=True)
    program.tells(*[deployment("success", f"d{n}") for n in range(9)])
    assert list(program.desk.memory["known"]) == ["d6", "d7", "d8"]
    assert list(json.loads((program.desk.outbox / "github/ids").read_text())) == ["d6", "d7", "d8"]


def test_a_mapping_whose_queues_cannot_be_made_changes_nothing(make, world, hook, monkeypatch, caplog):
    program = make(hook)
    write_apps(program.config.apps.parent, hook | {"url": world.url + "/new"})
    program.desk.outbox.rename(program.desk.outbox.with_name("kept"))
    program.desk.outbox.write_text("in the way")
    notify.read_again(program.desk)
    program.desk.outbox.unlink()
    program.desk.outbox.with_name("kept").rename(program.desk.outbox)
    assert "the mapping in force stays: " in caplog.text
    program.tells(deployment("failed"))
    assert world.told("/hook") == [("failed", "d1")] and world.told("/new") == []


def test_state_that_is_none_of_ours_is_said(make, hook, tmp_path):
    program = make(hook)
    (tmp_path / "state/memory.json").write_text("{")
    with pytest.raises(notify.ConfigError, match="cannot be used"):
        program.restart()


def test_nobody_else_reads_the_state(make, hook, tmp_path):
    lock = notify.prepare(tmp_path / "state")
    program = make(hook, github=True)
    program.takes(deployment("failed"))
    program.desk.reached("0a1b2c3d-1", at_once=True)
    for path in (tmp_path / "state").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0 or path.is_dir(), path
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    os.close(lock)


# ----------------------------------------------------------------------------------------------------------------------
# The stream


def test_the_first_run_begins_with_the_newest(make, world, controller, hook):
    controller.news(deployment("failed", "old"))
    controller.cut = 1
    program = make(hook)
    threading.Timer(0, lambda: wait_for(lambda: program.desk.saved) and controller.news(deployment("failed", "new"))).start()
    with pytest.raises(notify.Later):
        program.reader.follow()
    program.deliver()
    assert world.told() == [("failed", "new")]
    assert controller.asked[0][:2] == ("/v1/logs/stream?tail=0", None)
    assert (program.config.state / "cursor").read_text() == f"{controller.epoch}-2"


def test_the_cursor_goes_on_where_it_was(make, world, controller, hook):
    program = make(hook, token="dbt_read")
    for n in range(5):
        controller.news(deployment("failed", f"d{n}"))
    program.desk.reached(f"{controller.epoch}-2", at_once=True)
    program.restart()
    program.reader.follow(until=5)
    program.deliver()
    assert [name for _, name in world.told()] == ["d2", "d3", "d4"]
    assert controller.asked[0] == ("/v1/logs/stream?tail=0", f"{controller.epoch}-2", "Bearer dbt_read")


def test_what_is_not_about_deployments_is_passed_over_and_does_not_cost_a_write_each(make, world, controller, hook, monkeypatch):
    program = make(hook)
    program.desk.reached(f"{controller.epoch}-0", at_once=True)
    written = []
    real = notify.write_whole
    monkeypatch.setattr(notify, "write_whole", lambda path, text, sync=True: (written.append(path.name), real(path, text, sync)))
    for n in range(50):
        controller.news({"message": "x", "status": "failed", "id": "j1"}, kind=("log", "job")[n % 2])
    program.reader.follow(until=50)
    assert written == [] and program.desk.cursor == f"{controller.epoch}-50"
    monkeypatch.setattr(notify, "CURSOR_EVERY_S", -1)
    controller.news({"message": "x"}, kind="log")
    program.reader.follow(until=51)
    assert set(written) == {"cursor"}


def test_a_gap_is_said_and_it_goes_on(make, world, controller, hook, caplog):
    program = make(hook)
    program.desk.reached("99999999-7", at_once=True)
    controller.news(deployment("failed", "old"))
    controller.gap = "the controller was restored\x1b[2J from a backup"
    threading.Timer(
        0, lambda: wait_for(lambda: program.desk.cursor[0] == "0") and controller.news(deployment("failed", "new"))
    ).start()
    program.reader.follow(until=2)
    program.deliver()
    assert world.told() == [("failed", "new")]
    assert "events are gone: the controller was restored from a backup" in caplog.text


@pytest.mark.parametrize(
    "news",
    [[], 7, {}, {"id": "d1"}, deployment("new"), deployment(app=None), deployment(repo=7), deployment(created_at=7, started_at=7)],
)
def test_what_is_not_understood_does_not_end_it(make, world, controller, hook, caplog, news):
    program = make(hook)
    controller.deployments["d1"] = None
    with controller.changed:
        controller.events += [("deployment", json.dumps(news)), ("deployment", "{"), ("gap", "[]")]
    controller.news(deployment("failed", "d2"))
    program.desk.reached(f"{controller.epoch}-0", at_once=True)
    program.reader.follow(until=4)
    program.deliver()
    assert world.told() == [("failed", "d2")]
    assert caplog.text.count("not understood") >= 2


def test_a_token_that_is_not_right_is_said(make, controller):
    controller.token = "dbt_other"
    with pytest.raises(notify.Later, match="401: is DEPLOYBOT_TOKEN right"):
        make(token="dbt_read").reader.follow()


# ----------------------------------------------------------------------------------------------------------------------
# apps.yaml


def problems_of(make, document, **settings):
    program = make(**settings)
    text = document if isinstance(document, str) else json.dumps(document)
    program.config.apps.write_text(text)
    with pytest.raises(notify.ConfigError) as caught:
        notify.read_apps(program.config)
    return [problem.removeprefix(f"{program.config.apps}: ") for problem in caught.value.problems]


def test_all_mistakes_are_told_at_once_and_none_repeats_a_url(make):
    bad = [{"url": "https://user:T0K3N@x/", "event": 1, "format": "xml"}, {"events": ["fail"]}, 7, {"url": "https://x/T0K3N#a"}]
    found = problems_of(
        make,
        {"apps": [{"name": "web", "repo": "a/b", "notify": bad}, {"name": "api"}, {"name": "x", "repo": "a/b", "notify": {}}, 3]},
    )
    assert found == [
        "apps[0] (web).notify[0]: unknown key 'event'",
        "apps[0] (web).notify[0]: url: must be http(s)://HOST/..., without user and fragment",
        "apps[0] (web).notify[0]: format: must be json or slack",
        "apps[0] (web).notify[1]: url: must be http(s)://HOST/..., without user and fragment",
        "apps[0] (web).notify[1]: events: must be a list of failed, recovered, success, stuck",
        "apps[0] (web).notify[2]: must be a mapping with url, events and format",
        "apps[0] (web).notify[3]: url: must be http(s)://HOST/..., without user and fragment",
        "apps[1] (api): must be a mapping with name and repo",
        "apps[3]: must be a mapping with name and repo",
    ]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://x/",
        "https:///x",
        "https://x:0/",
        "https://x:99999/",
        "http://[::1",
        "http://[1.2]/",
        "https://x/a b",
        "https://x/\n",
        "https://x/\u00e9",
        "//x",
        "",
    ],
)
def test_what_is_no_url_of_a_receiver(make, url):
    assert len(problems_of(make, {"apps": [{"name": "web", "repo": "a/b", "notify": [{"url": url}]}]})) == 1


@pytest.mark.parametrize(
    "text", ["[]", "apps: 7", "defaults: []\napps: [7]", "7", "apps: [}", "a: &a [*b]", "a: !!int x", "[" * 500]
)
def test_what_is_no_mapping(make, text):
    assert len(problems_of(make, text)) == 1


def test_no_piece_of_a_broken_file_is_repeated(make):
    (problem,) = problems_of(make, "apps:\n  - notify: [{url: https://x/T0K3N}\n  - x: 1\n")
    assert problem.startswith("line 3: ") and "T0K3N" not in problem


def test_json_is_signed_or_refused(make, hook):
    document = {"apps": [{"name": "web", "repo": "a/b", "notify": [{"url": "https://x/"}]}]}
    assert problems_of(make, document, secret=None)[0].endswith("set DEPLOYBOT_NOTIFY_SECRET or DEPLOYBOT_NOTIFY_SECRET_FILE")


def test_keys_of_the_controller_are_its_own_matter_and_defaults_are_defaults(make, tmp_path):
    program = make()
    (tmp_path / "apps.yaml").write_text(
        """
groups: {all: [web-01]}
defaults:
  clone_url: "http://127.0.0.1/x.git"
  notify: [{url: "https://hooks.slack.com/services/T/B/X", format: slack}]
apps:
  - {name: web, repo: myorg/web, hosts: ["@all"], strategy: {type: rolling, batch: 25%}}
  - {name: api, repo: myorg/api, clone_url: "git@example.com:api.git", notify: []}
"""
    )
    web, api = notify.read_apps(program.config).values()
    assert [target.url for target in web.targets] == ["https://hooks.slack.com/services/T/B/X"]
    assert web.targets[0].events == ("failed", "recovered") and web.on_github
    assert api.targets == [] and not api.on_github


def test_yaml_needs_pyyaml_and_json_does_not(make, hook, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert notify.read_apps(make(hook).config)["web"].targets
    assert "PyYAML" in problems_of(make, "apps: []")[0]


# ----------------------------------------------------------------------------------------------------------------------
# Settings


def load(*argv, **env):
    return notify.load_config([str(one) for one in argv], {name: str(value) for name, value in env.items()})


def test_flags_go_before_variables_and_variables_before_defaults(tmp_path):
    found = load()
    assert (found.url, found.api_url, found.public_url, found.stuck_after) == (
        "http://localhost:8080",
        "https://api.github.com",
        "",
        1800,
    )
    assert (found.apps, found.state) == (tmp_path / "apps.yaml", tmp_path / "notify-state")
    found = load("--url", "https://a/", DEPLOYBOT_URL="https://b", DEPLOYBOT_STUCK_AFTER="2h", STATE_DIRECTORY="/var/lib/x")
    assert (found.url, found.public_url, found.stuck_after, str(found.state)) == ("https://a", "https://a", 7200, "/var/lib/x")


def test_secrets_come_from_variables_files_and_credentials(tmp_path):
    for name in ("deploybot_token", "deploybot_github_token", "deploybot_notify_secret"):
        (tmp_path / name).write_text(f"of_{name}\n")
    assert load(CREDENTIALS_DIRECTORY=tmp_path)[-3:] == (
        "of_deploybot_token",
        "of_deploybot_github_token",
        "of_deploybot_notify_secret",
    )
    given = {"DEPLOYBOT_TOKEN": "a", "GITHUB_TOKEN": "b", "DEPLOYBOT_NOTIFY_SECRET": "c"}
    assert load(CREDENTIALS_DIRECTORY=tmp_path, **given)[-3:] == ("a", "b", "c")
    files = {
        name: tmp_path / "deploybot_token"
        for name in ("DEPLOYBOT_TOKEN_FILE", "DEPLOYBOT_GITHUB_TOKEN_FILE", "DEPLOYBOT_NOTIFY_SECRET_FILE")
    }
    assert load(**files)[-3:] == ("of_deploybot_token",) * 3


def test_every_problem_is_told_at_once(tmp_path, capsys):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "odd").write_bytes(b"\xff")
    with pytest.raises(notify.ConfigError) as caught:
        load(
            *(
                "--url",
                "https://x/y",
                "--api-url",
                "https://u:T0K3N@x",
                "--public-url",
                "x",
                "--stuck-after",
                "8d",
                "--log-level",
                "LOUD",
            ),
            **{"DEPLOYBOT_TOKEN": "T0K 3N", "GITHUB_TOKEN": "a", "DEPLOYBOT_GITHUB_TOKEN_FILE": tmp_path / "odd"},
            DEPLOYBOT_NOTIFY_SECRET_FILE=tmp_path / "empty",
        )
    found = caught.value.problems
    for start in (
        "--url: takes no path",
        "--api-url",
        "--public-url",
        "--stuck-after",
        "--log-level",
        "DEPLOYBOT_TOKEN: must",
        "GITHUB_TOKEN and",
    ):
        assert [one for one in found if one.startswith(start)], start
    assert [one for one in found if "it is not ASCII" in one] and [
        one for one in found if one.startswith("DEPLOYBOT_NOTIFY_SECRET_FILE: must")
    ]
    assert len(found) == 9 and "T0K" not in str(found)
    assert notify.main(["--url", "x", "--stuck-after", "x"]) == 2
    assert [line.partition(": ")[0] for line in capsys.readouterr().err.splitlines()] == ["notify.py"] * 2


# ----------------------------------------------------------------------------------------------------------------------
# --check, --once


@pytest.fixture
def argv(make, tmp_path, controller, world, monkeypatch):
    """Arguments with which main() does what make() would."""

    def argv(*targets, **more):
        make(*targets, **more)
        monkeypatch.setenv("DEPLOYBOT_NOTIFY_SECRET", SECRET)
        return [
            "--url",
            controller.url,
            "--apps",
            str(tmp_path / "apps.yaml"),
            "--state",
            str(tmp_path / "state"),
            "--api-url",
            world.url,
        ]

    return argv


def test_check_looks_at_the_mapping_the_tokens_and_the_controller(argv, world, controller, hook, monkeypatch, capsys):
    given = [*argv(hook), "--check"]
    controller.token = "dbt_read"
    monkeypatch.setenv("DEPLOYBOT_TOKEN", "dbt_read")
    monkeypatch.setenv("GITHUB_TOKEN", "ghp_good")
    assert notify.main(given) == 0
    said = capsys.readouterr().out
    assert "1 apps, 1 receivers: 127.0.0.1 (" in said and f"ok: {controller.url}" in said and f"ok: {world.url}" in said
    assert "T0K3N" not in said
    world.script["/rate_limit"] = [(401, {}, b"")]
    monkeypatch.setenv("DEPLOYBOT_TOKEN", "dbt_old")
    assert notify.main(given) == 1
    said = capsys.readouterr().out
    assert said.count("answers 401: is the token right?") == 2
    assert notify.main([*given, "--url", "http://127.0.0.1:9"]) == 1
    assert "Connection refused" in capsys.readouterr().out
    Path("apps.yaml").write_text("apps: 7")
    assert notify.main(given) == 2


def test_once_sends_what_is_due_and_ends(argv, world, controller, hook, slack, capsys):
    given = [*argv(hook, slack), "--once"]
    controller.news(deployment("failed", "old"))
    assert notify.main(given) == 0 and world.got == []
    controller.news(deployment("failed", "d1"))
    world.script["/hook"] = [(503, {}, b"")]
    assert notify.main(given) == 1
    assert len(world.at("/slack")) == 1 and "1 messages could not be sent" in capsys.readouterr().err
    controller.news(deployment("failed", "d2"))
    assert notify.main(given) == 0
    assert [name for _, name in world.told()] == ["d1", "d1", "d2"] and len(world.at("/slack")) == 2
    assert notify.main(given) == 0 and len(world.got) == 5


def test_once_says_that_there_was_a_gap(argv, controller, hook, tmp_path, capsys):
    given = [*argv(hook), "--once"]
    assert notify.main(given) == 0
    (tmp_path / "state/cursor").write_text("99999999-7")
    controller.gap = "the controller was restored"
    assert notify.main(given) == 0
    assert "events are gone: the controller was restored" in capsys.readouterr().err
    assert cursor_of(tmp_path) == f"{controller.epoch}-0"


def test_once_sends_what_waits_while_the_controller_is_away(argv, world, controller, hook):
    given = [*argv(hook), "--once"]
    assert notify.main(given) == 0
    controller.news(deployment("failed", "d1"))
    world.script["/hook"] = [(503, {}, b"")]
    assert notify.main(given) == 1
    assert notify.main([*given, "--url", "http://127.0.0.1:9"]) == 1
    assert [name for _, name in world.told()] == ["d1", "d1"]


# ----------------------------------------------------------------------------------------------------------------------
# The process


@pytest.fixture
def start(argv, tmp_path):
    """Starts notify.py; its log is read with said()."""
    made = []

    def start(*targets, setup="", **more):
        given = argv(*targets, **more) if targets or not made else made[0].given
        log = tmp_path / f"log{len(made)}"
        fast = "notify.GITHUB_PACE_S = 0; notify.RETRY_FIRST_S = 0.01; notify.RETRY_READER_S = notify.RETRY_SENDER_S = 0.05"
        code = f"import sys, notify; {fast}; {setup}\nsys.exit(notify.main())"
        environment = os.environ | {"PYTHONPATH": str(PROGRAM.parent), "PYTHONDONTWRITEBYTECODE": "1", "TZ": "JST-9"}
        with open(log, "wb") as file:
            process = subprocess.Popen([sys.executable, "-c", code, *given], env=environment, stdin=subprocess.DEVNULL, stderr=file)
        process.said, process.given = log.read_text, given
        made.append(process)
        return process

    yield start
    for process in made:
        process.kill()
        process.wait()


def cursor_of(folder):
    try:
        return (folder / "state/cursor").read_text()
    except OSError:
        return ""


def test_one_that_never_answers_holds_nobody_up_and_a_stop_is_soon(start, world, controller, hook, slack, tmp_path):
    world.held["/hook"] = threading.Event()
    process = start(hook, slack, setup="notify.STOP_LIMIT_S = 0.2")
    wait_for(lambda: cursor_of(tmp_path))
    for n in range(30):
        controller.news(deployment("failed", f"d{n}"))
    wait_for(lambda: len(world.at("/slack")) == 30)
    wait_for(lambda: cursor_of(tmp_path).endswith("-30"))
    assert len(world.at("/hook")) == 1
    process.terminate()
    assert process.wait(LIMIT_S) == 0
    assert process.said().endswith("ended\n")
    stamps = [datetime.fromisoformat(line.partition(" ")[0]) for line in process.said().splitlines()]
    assert all(abs((datetime.now(UTC) - stamp).total_seconds()) < 60 * LIMIT_S for stamp in stamps), "UTC, and it says so"


def test_a_stop_waits_for_the_answer_so_that_nothing_is_sent_twice(start, world, controller, hook, tmp_path):
    world.held["/hook"] = threading.Event()
    process = start(hook)
    wait_for(lambda: cursor_of(tmp_path))
    controller.news(deployment("failed", "d1"))
    controller.news(deployment("failed", "d2"))
    wait_for(lambda: world.at("/hook"))
    process.terminate()
    world.held["/hook"].set()
    assert process.wait(LIMIT_S) == 0
    world.held.clear()
    start()
    wait_for(lambda: len(world.at("/hook")) == 2)
    assert [name for _, name in world.told()] == ["d1", "d2"]


def test_sighup_reads_the_mapping_again_and_a_mistake_changes_nothing(start, world, controller, hook, tmp_path):
    process = start(hook)
    wait_for(lambda: cursor_of(tmp_path))
    (tmp_path / "apps.yaml").write_text("apps: 7")
    process.send_signal(signal.SIGHUP)
    wait_for(lambda: "the mapping in force stays" in process.said())
    controller.news(deployment("failed", "d1"))
    wait_for(lambda: world.at("/hook"))
    write_apps(tmp_path, hook | {"url": world.url + "/new"})
    process.send_signal(signal.SIGHUP)
    wait_for(lambda: "is in force" in process.said())
    controller.news(deployment("failed", "d2"))
    wait_for(lambda: world.at("/new"))
    assert world.told("/new") == [("failed", "d2")] and world.told("/hook") == [("failed", "d1")]


def test_it_comes_back_to_a_controller_that_was_away(start, world, controller, hook, tmp_path):
    controller.cut = 1
    process = start(hook)
    wait_for(lambda: cursor_of(tmp_path))
    for n in range(5):
        controller.news(deployment("failed", f"d{n}"))
    wait_for(lambda: len(world.at("/hook")) == 5)
    assert [name for _, name in world.told()] == [f"d{n}" for n in range(5)]
    assert process.said().count("the controller ended the stream; trying again") >= 1


def test_two_in_one_folder_would_send_twice(start, hook, tmp_path):
    start(hook)
    wait_for(lambda: cursor_of(tmp_path))
    second = start()
    assert second.wait(LIMIT_S) == 1
    # it is said on stderr, which is its log
    assert "another one works in" in second.said()


def test_a_mistake_of_ours_ends_the_program(start, controller, hook, tmp_path):
    process = start(hook, setup="notify.Webhook.send = lambda *_: 1 / 0")
    wait_for(lambda: cursor_of(tmp_path))
    controller.news(deployment("failed"))
    assert process.wait(LIMIT_S) == 1
    assert "ZeroDivisionError" in process.said()


def without_repeats(items):
    """What is left when each that comes again right behind itself is left out, and how many those were."""
    kept = [item for at, item in enumerate(items) if at == 0 or items[at - 1] != item]
    return kept, len(items) - len(kept)


def test_kill_9_at_any_point_loses_nothing_and_keeps_the_order(start, world, controller, hook, tmp_path, monkeypatch):
    """Killed at random points of receiving and sending. What is sent again comes right behind itself, at most once a kill."""
    seed = random.randrange(10**6)
    print("seed", seed)
    chance, names, kills = random.Random(seed), [f"d{n}" for n in range(60)], 0
    monkeypatch.setenv("GITHUB_TOKEN", "ghp_good")
    process = start(hook | {"events": ["failed"]})
    wait_for(lambda: cursor_of(tmp_path))
    for at, name in enumerate(names):
        controller.news(deployment("running", name, ref=f"{at:040x}"))
        controller.news(deployment("failed", name, ref=f"{at:040x}"))
        if at % 4 == 3:
            enough = len(world.got) + chance.randrange(12)
            wait_for(lambda enough=enough: len(world.got) >= enough or not any((tmp_path / "state/outbox").glob("*/*.json")))
            process.kill()
            process.wait()
            kills += 1
            process = start()
    wait_for(lambda: cursor_of(tmp_path) == f"{controller.epoch}-120" and not any((tmp_path / "state/outbox").glob("*/*.json")), 60)
    told, again = without_repeats([name for _, name in world.told()])
    assert told == names and again <= kills
    github = [(got.path.rpartition("/")[2], got.body["state"]) for got in world.at("/repos/myorg/web/statuses")]
    told, again = without_repeats(github)
    assert told == [(f"{at:040x}", state) for at in range(60) for state in ("pending", "failure")] and again <= kills
    made, again = without_repeats([got.body["ref"] for got in world.at("/repos") if got.path.endswith("/deployments")])
    assert made == [f"{at:040x}" for at in range(60)] and again <= kills
    phases, again = without_repeats([got.body["state"] for got in world.at("/repos/myorg/web/deployments/")])
    assert phases == ["in_progress", "failure"] * 60 and again <= kills


def test_a_real_controller_is_followed_through_a_restart(make_controller, world, hook, tmp_path):
    """A failure, then, while the controller was away in between, a success: in order, each once."""
    real = make_controller("real")
    real.set_app(name="web", repo="myorg/web", hosts=["web-01"])
    agent = real.register("web-01")
    write_apps(tmp_path, {**hook, "events": ["failed", "recovered", "success"]})
    environment = os.environ | {
        "DEPLOYBOT_NOTIFY_SECRET": SECRET,
        "DEPLOYBOT_URL": real.url,
        "STATE_DIRECTORY": str(tmp_path / "state"),
    }
    process = subprocess.Popen([sys.executable, PROGRAM, "--apps", str(tmp_path / "apps.yaml")], env=environment)
    try:
        wait_for(lambda: cursor_of(tmp_path))

        def deploy(ref, status):
            made = real.ok("POST", "/v1/deployments", {"app": "web", "ref": ref})["deployment"]["id"]
            real.end(real.beat(agent, session=agent["session"])["job"], status)
            return made

        first = deploy("a", "failed")
        wait_for(world.told)
        real.restart()
        second = deploy("b", "success")
        wait_for(lambda: len(world.told()) >= 2)
        assert world.told() == [("failed", first), ("recovered", second)]
    finally:
        process.terminate()
        assert process.wait(LIMIT_S) == 0
