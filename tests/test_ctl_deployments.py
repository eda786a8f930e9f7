"""ctl.py's verbs of deployments, against a server that holds the contract of docs/design.md and refuses all else.

The server keeps what a test puts there; a test moves its jobs by hand, and each move goes into the stream. Nothing sleeps
to wait: what is followed is read until the line is there, a terminal is read until it shows what is waited for.
"""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

import pytest
from test_ctl import CTL, HOSTS, JOB, LIMIT_S, json_lines
from test_ctl import at_once as at_once
from test_ctl import bare_environment as bare_environment
from test_ctl import here as here
from test_ctl import pauses as pauses
from test_ctl import run as run
from test_ctl import start as start

import ctl

# ----------------------------------------------------------------------------------------------------------------------
# The contract, as a server

HEX = "0123456789abcdef"
COMMITS = {letter: letter * 40 for letter in HEX}
TIME = "2026-11-23T13:13:37.123Z"
PARALLEL = {"type": "parallel", "batch": 1, "canary": None, "pause": 0, "max_failures": None}
ROLLING = {"type": "rolling", "batch": 1, "canary": "web-01", "pause": 300, "max_failures": 0}
LOCK = {"app": "web", "reason": "the database moves", "by": "alice", "at": TIME, "until": "2099-11-23T13:13:37.123Z"}

CALLS = {  # method and path: fields of the query, of the body
    r"POST /v1/deployments": ((), "app ref hosts rollback to lock override force dry_run metadata"),
    r"GET /v1/deployments": ("app status id before limit", ()),
    r"GET /v1/deployments/([^/]+)": ((), ()),
    r"POST /v1/deployments/([^/]+)/cancel": ((), ()),
    r"POST /v1/deployments/([^/]+)/retry": ((), ()),
    r"GET /v1/jobs": ("status host app repo id before limit deployment_id", ()),
    r"GET /v1/jobs/([^/]+)": ((), ()),
    r"GET /v1/hosts": ("limit after", ()),
    r"GET /v1/apps": ("limit after", ()),
    r"PUT /v1/apps/([^/]+)/lock": ((), "reason for"),
    r"DELETE /v1/apps/([^/]+)/lock": ((), ()),
    r"GET /v1/deliveries": ("repo before limit", ()),
    r"GET /v1/deliveries/([^/]+)": ((), ()),
    r"GET /v1/logs/stream": ("host app job_id tail", ()),
}


class Refused(Exception):
    """(status, detail)"""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        fake, parts = self.server.fake, urlsplit(self.path)
        query, data = dict(parse_qsl(parts.query)), self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(data) if data else None
        with fake.moved:
            fake.requests.append((self.command, parts.path, query, body))
            fake.moved.notify_all()
        fits = (re.fullmatch(pattern, f"{self.command} {parts.path}") for pattern in CALLS)
        found = next(filter(None, fits), None)
        asked, given = CALLS[found.re.pattern] if found else ((), ())
        if not found or set(query) - set(str(asked).split()) - set(asked) or set(body or ()) - set(str(given).split()):
            fake.strange.append((self.command, self.path, body))
            return self.send(422, {"title": "No", "detail": "not in the contract"})
        if parts.path.endswith("/stream"):
            return fake.stream(self, query)
        try:
            name = re.sub(r"\W+", "_", re.sub(r"\(.*?\)", "one", found.re.pattern)).lower().replace("_v1_", "_")
            status, document = getattr(fake, name)(*map(unquote, found.groups()), query, body or {})
            self.send(status, document)
        except Refused as refused:
            self.send(refused.args[0], {"title": "No", "detail": refused.args[1]}, "application/problem+json")

    def send(self, status, document, kind="application/json"):
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *args):
        pass


class Fake:
    """A controller with one app and what a test gives it."""

    def __init__(self):
        self.deployments, self.jobs, self.deliveries, self.lock, self.refusal = {}, {}, [], None, None
        self.skipped, self.plan, self.resumed = [], None, []
        self.requests, self.strange, self.events, self.number, self.moved = [], [], [], 0, threading.Condition()
        self.generation, self.streams, self.gap, self.host_fields = 0, 0, None, {"wanted": None, "actual": None}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.fake = True, self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self):
        self.cut()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    # What a test does

    def new_id(self):
        self.number += 1
        return f"0199c2f0-1111-7{self.number:03x}-8000-{self.number:012x}"

    def deployment(self, hosts=("web-01", "web-02", "web-03"), held=(), **more):
        one = {
            "id": self.new_id(), "app": "web", "repo": "myorg/web", "ref": "main", "branch": "main", "kind": "deploy", "status": "pending",
            "reason": None, "strategy": PARALLEL, "hosts": len(hosts), "progress": None, "hold": None, "resume_at": None,
            "override": False, "retry_of": None, "superseded_by": None, "delivery_id": None, "created_at": TIME, "created_by": "bob",
            "started_at": None, "completed_at": None, **more,
        }  # fmt: skip
        self.deployments[one["id"]] = one
        for host in hosts:
            hold = "batch" if host in held else None
            job = {
                **JOB,
                "id": self.new_id(),
                "host": host,
                "status": "pending",
                "attempt": 0,
                "hold": hold,
                "deployment_id": one["id"],
            }
            job |= {"started_at": None, "completed_at": None, "exit_code": None, "commit": None, "ref": one["ref"]}
            self.jobs[job["id"]] = job
        return one

    def count(self, one):
        numbers = dict.fromkeys(("held", "pending", "running", "success", "failed", "cancelled"), 0)
        for job in self.jobs.values():
            if job["deployment_id"] == one["id"]:
                numbers["held" if job["hold"] else job["status"]] += 1
        return {**one, "progress": numbers}

    def say(self, kind, data):
        with self.moved:
            self.events.append((kind, data))
            self.moved.notify_all()

    def move(self, host, status, **more):
        """A job of that host changes; so does its deployment, where it is the first to start."""
        job = next(one for one in self.jobs.values() if one["host"] == host)
        more = {"started_at": "2026-11-23T13:14:00.000Z", "attempt": max(job["attempt"], status != "pending"), "hold": None, **more}
        job |= {"status": status, "completed_at": "2026-11-23T13:15:43.000Z" if status in ctl.ENDED else None, **more}
        self.say("job", dict(job))

    def log(self, host, message):
        job = next(one for one in self.jobs.values() if one["host"] == host)
        line = {"job_id": job["id"], "host": host, "app": "web", "attempt": 1, "offset": 0, "position": 1}
        self.say("log", {**line, "message": message, "level": "info", "timestamp": TIME})

    def becomes(self, one, status, **more):
        one |= {"status": status, "completed_at": "2026-11-23T13:15:43.000Z" if status in ctl.OVER else None, **more}
        self.say("deployment", self.count(one))

    def opened(self, number=1):
        """Waits for so many streams in all."""
        with self.moved:
            assert self.moved.wait_for(lambda: self.streams >= number, LIMIT_S)

    def asked(self, path):
        """Waits for a request."""
        with self.moved:
            assert self.moved.wait_for(lambda: any(asked == path for _, asked, *_ in self.requests), LIMIT_S)

    def cut(self):
        """Ends every stream."""
        with self.moved:
            self.generation += 1
            self.moved.notify_all()

    # What it answers

    def post_deployments(self, query, body):
        if self.refusal:
            raise Refused(*self.refusal)
        if self.plan:
            assert body["dry_run"] is True
            return 200, {"plan": self.plan, "skipped": self.skipped}
        created = not self.deployments
        one = (
            self.deployment(kind="rollback" if body.get("rollback") else "deploy")
            if created
            else next(iter(self.deployments.values()))
        )
        jobs = [job for job in self.jobs.values() if job["deployment_id"] == one["id"]]
        return 201, {"deployment": self.count(one), "created": created, "jobs": jobs, "skipped": self.skipped}

    def found(self, table, one):
        if one not in table:
            raise Refused(404, f"no such thing as {one}")
        return table[one]

    def get_deployments(self, query, body):
        wanted = [
            one for one in self.deployments.values() if all(one[name] == query.get(name, one[name]) for name in ("app", "status"))
        ]
        wanted = [one for one in wanted if one["id"].startswith(query.get("id", "")) and one["id"] < query.get("before", "g")]
        shown = sorted(wanted, key=lambda one: one["id"], reverse=True)
        limit = int(query["limit"])
        return 200, {"deployments": list(map(self.count, shown[:limit])), "next": shown[limit - 1]["id"] if shown[limit:] else None}

    def get_deployments_one(self, one, query, body):
        return 200, {"deployment": self.count(self.found(self.deployments, one))}

    def post_deployments_one_cancel(self, one, query, body):
        if self.refusal:
            raise Refused(*self.refusal)
        one = self.found(self.deployments, one)
        for job in self.jobs.values():
            if job["status"] == "pending":
                self.move(job["host"], "cancelled", reason="cancelled", started_at=None)
        return 200, {"deployment": self.count(one)}

    def post_deployments_one_retry(self, one, query, body):
        old = self.found(self.deployments, one)
        failed = [job["host"] for job in self.jobs.values() if job["deployment_id"] == one and job["status"] != "success"]
        new = self.deployment(failed, kind="retry", retry_of=old["id"])
        jobs = [job for job in self.jobs.values() if job["deployment_id"] == new["id"]]
        return 201, {"deployment": self.count(new), "created": True, "jobs": jobs, "skipped": []}

    def get_jobs(self, query, body):
        fits = {"deployment_id", "host", "app", "status"} & set(query)
        found = [job for job in self.jobs.values() if all(job[name] == query[name] for name in fits)]
        found = [job for job in found if job["id"].startswith(query.get("id", "")) and job["id"] < query.get("before", "g")]
        found.sort(key=lambda job: job["id"], reverse=True)
        limit = min(int(query["limit"]), 2)  # small pages: that all are read is seen
        limit = int(query["limit"]) if "id" in query else limit
        assert int(query["limit"]) <= 1000
        return 200, {"jobs": found[:limit], "next": found[limit - 1]["id"] if found[limit:] else None}

    def get_jobs_one(self, one, query, body):
        return 200, {"job": self.found(self.jobs, one)}

    def get_hosts(self, query, body):
        return 200, {"hosts": [], "next": None}

    def get_apps(self, query, body):
        host = {"hostname": "web-01", "commit": COMMITS["a"], "job_id": None, "deployed_at": None, **self.host_fields}
        app = {"name": "web", "repo": "myorg/web", "clone_url": "x", "deploy_on_push": True, "branches": None, "hosts": [host]}
        return 200, {"apps": [{**app, "lock": self.lock, "labels": [], "strategy": ROLLING}], "next": None}

    def put_apps_one_lock(self, app, query, body):
        until = LOCK["until"] if "for" in body else None
        self.lock = {**LOCK, "app": app, "reason": body["reason"], "until": until}
        return 200, {"lock": self.lock}

    def delete_apps_one_lock(self, app, query, body):
        if not self.lock:
            raise Refused(404, f"{app} is not locked")
        return 200, {"app": app, "unlocked": True, "deployments": self.resumed}

    def get_deliveries(self, query, body):
        found = [one for one in self.deliveries if one["repo"] == query.get("repo", one["repo"])]
        return 200, {"deliveries": found[: int(query["limit"])], "next": None}

    def get_deliveries_one(self, one, query, body):
        return 200, {"delivery": self.found({each["id"]: each for each in self.deliveries}, one)}

    def stream(self, handler, query):
        """All events from Last-Event-ID on, of all deployments: which are wanted is the reader's affair. Ends with the next cut()."""
        last = handler.headers.get("Last-Event-ID")
        with self.moved:
            generation, at = self.generation, len(self.events) if last is None else int(last.removeprefix("e-"))
            self.streams += 1
            self.moved.notify_all()
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(f"retry: 2000\nid: e-{at}\n\n".encode())
        if self.gap and last:
            handler.wfile.write(f"event: gap\ndata: {json.dumps({'detail': self.gap})}\n\n".encode())
            self.gap, at = None, len(self.events)
        while True:
            with self.moved:
                while at == len(self.events) and generation == self.generation:
                    self.moved.wait()
                if generation != self.generation:
                    handler.close_connection = True
                    return
                kind, data = self.events[at]
                at += 1
            handler.wfile.write(f"id: e-{at}\nevent: {kind}\ndata: {json.dumps(data)}\n\n".encode())


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    monkeypatch.setenv("DEPLOYBOT_URL", fake.url)
    yield fake
    fake.close()
    assert fake.strange == [], "calls that are not in the contract"


def posted(fake):
    """The body of the only POST or PUT."""
    (body,) = [body for method, _, _, body in fake.requests if method in ("POST", "PUT")]
    return body


def controls(text):
    return re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)


# ----------------------------------------------------------------------------------------------------------------------
# deploy, rollback, dry run

DEPLOY = ("deploy", "--app", "web", "--ref", "main")


def test_a_deployment_is_asked_for_with_what_was_given_alone(here, fake):
    result = here(*DEPLOY)
    assert result.code == 0, result
    assert posted(fake) == {"app": "web", "ref": "main"}
    one = next(iter(fake.deployments.values()))
    assert re.search(rf"^deployment +{one['id']}$", result.out, re.MULTILINE)
    assert re.search("^strategy +all hosts at once$", result.out, re.MULTILINE)
    assert re.search("^progress +0 of 3 succeeded, 3 pending$", result.out, re.MULTILINE)
    assert re.search("^web-02 +pending +main$", result.out, re.MULTILINE)
    assert f"ctl.py follow {one['id']}" in result.err


def test_every_option_of_a_deployment_is_sent(here, fake):
    more = ("--host", "web-02", "--host", "web-01", "--host", "web-02", "--override", "--force", "--metadata", "ticket=7")
    answer = json.loads(here(*DEPLOY, *more, "--json").out)
    assert answer.keys() == {"deployment", "created", "jobs", "skipped"}
    wanted = {
        "app": "web",
        "ref": "main",
        "hosts": ["web-02", "web-01"],
        "override": True,
        "force": True,
        "metadata": {"ticket": "7"},
    }
    assert posted(fake) == wanted


def test_what_was_left_out_and_what_is_there_already_is_said(here, fake):
    fake.deployment()
    fake.skipped = [{"host": "web-09", "reason": "it is drained"}]
    assert here(*DEPLOY).err.splitlines()[:2] == [
        "left out: web-09: it is drained",
        "this deployment is pending already, --force makes a new one",
    ]


@pytest.mark.parametrize(
    "argv, words",
    [
        (("deploy", "--ref", "main"), "--app APP"),
        (("deploy", "--ref", "main", "--app", "web", "--timeout", "5m"), "--repo"),
        (("deploy", "--ref", "main", "--app", "web", "--retries", "0"), "--repo"),
        (("deploy", "--ref", "main", "--repo", "a/b"), "--host"),
        (("deploy", "--ref", "main", "--repo", "a/b", "--host", "h", "--override"), "--app"),
        (("deploy", "--ref", "main", "--repo", "a/b", "--host", "h", "--dry-run"), "--app"),
        (("rollback",), "--app"),
        (("lock", "--app", "web"), "--reason"),
        (("lock", "--app", "web", "--reason", "x", "--for", "0"), "no time"),
    ],
)
def test_what_does_not_go_together_is_wrong_use_and_named(here, fake, argv, words):
    result = here(*argv)
    assert (result.code, result.out, fake.requests) == (ctl.WRONG_USE, "", [])
    assert words in result.err and result.err.count("\n") == 1


def test_a_locked_app_is_refused_with_both_ways_on(here, fake):
    fake.refusal = 409, "web is locked by alice: the database moves"
    result = here(*DEPLOY)
    assert result.code == ctl.REFUSED
    assert "web is locked by alice: the database moves: `ctl.py unlock --app web`" in result.err and "--override" in result.err


def test_how_to_unlock_is_said_once_and_as_it_can_be_copied(run, controller):
    controller.set_app(name="web", repo="myorg/web", hosts=["web-01"])
    assert run("lock", "--app", "web", "--reason", "a: b", "--for", "2h").code == 0
    said = run(*DEPLOY, "--url", controller.url).err
    remedy = (
        f": a: b: `ctl.py unlock --app web --url {controller.url}` ends the lock, --override deploys all the same (409 from POST "
    )
    assert remedy in said and said.count("unlock") == 1


def test_a_deployment_to_a_host_without_an_agent_says_so(run, controller):
    controller.set_app(name="web", repo="myorg/web", hosts=["web-01"])
    result = run("deploy", "--app", "web", "--ref", "main")
    assert result.code == 0 and result.err.startswith("waits for: no agent has registered as web-01\nto follow it: ")


def test_a_wrong_name_is_told_in_the_words_of_the_controller(here, fake):
    fake.refusal = 422, "no app is called wbe (web?)"
    assert "no app is called wbe (web?): mend" in here(*DEPLOY).err


PLAN = {
    "app": "web", "repo": "myorg/web", "kind": "deploy", "strategy": ROLLING, "build": ["npm", "run it"], "activate": "systemctl restart web",
    "deploy": None, "health_check": {"url": "http://127.0.0.1/up", "timeout": 30, "interval": 1, "success": 2}, "lock": None,
    "runs": {"web-01": "9f2c" * 10, "web-02": "9f2c" * 10, "web-03": "4f2a" * 10},
    "steps": [
        {"hosts": ["web-01"], "refs": {"web-01": "main"}, "waits": None},
        {"hosts": ["web-02", "web-03"], "refs": {"web-02": "main", "web-03": "4f2a" * 10}, "waits": "pause"},
        {"hosts": ["web-04"], "refs": {"web-04": "main"}, "waits": "success"},
    ],
}  # fmt: skip


def test_a_dry_run_shows_batches_and_commands_and_that_nothing_was_made(here, fake):
    fake.plan, fake.skipped = PLAN, [{"host": "web-09", "reason": "it is drained"}]
    result = here(*DEPLOY, "--dry-run")
    assert (result.code, result.err) == (0, "a dry run: nothing was made\n")
    assert result.out.splitlines() == [
        "web (myorg/web), deploy: 1 host at a time, canary web-01 first, watched for 5m, stops at the first failure",
        "  1. at once: main on web-01 (now 9f2c9f2c)",
        "  2. when the canary has been watched: main on web-02 (now 9f2c9f2c); 4f2a4f2a on web-03 (now 4f2a4f2a)",
        "  3. when the step before has succeeded: main on web-04",
        "  build: npm 'run it'",
        "  activate: systemctl restart web",
        "  health check: http://127.0.0.1/up",
        "  left out: web-09: it is drained",
    ]
    assert posted(fake) == {"app": "web", "ref": "main", "dry_run": True}
    assert json.loads(here(*DEPLOY, "--dry-run", "--json").out)["plan"] == PLAN


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"type": "parallel"}, "all hosts at once, canary web-01 first, watched for 5m, stops at the first failure"),
        ({"batch": "25%", "canary": None, "max_failures": None}, "25% of the hosts at a time"),
        ({"batch": 3, "canary": None, "max_failures": 2}, "3 hosts at a time, stops after more than 2 failures"),
    ],
)
def test_a_strategy_in_words(changed, words):
    assert ctl.strategy_words({**ROLLING, **changed}) == words


def test_a_rollback_shows_where_each_host_goes_and_that_the_app_is_locked(here, fake):
    one = fake.deployment(["web-01", "web-02"], kind="rollback", ref=COMMITS["b"])
    fake.skipped = [{"host": "web-03", "reason": "no success before the present one"}]
    for job, commit in zip(fake.jobs.values(), "bc", strict=True):
        job["ref"] = COMMITS[commit]
    result = here("rollback", "--app", "web", "--to", COMMITS["b"], "--host", "web-01")
    assert result.code == 0
    assert posted(fake) == {"app": "web", "rollback": True, "to": COMMITS["b"], "hosts": ["web-01"]}
    assert re.search("^web-01 +pending +bbbbbbbb$", result.out, re.MULTILINE)
    assert re.search("^web-02 +pending +cccccccc$", result.out, re.MULTILINE)
    assert "left out: web-03: no success before the present one\n" in result.err
    assert "web is locked now, so that no push brings it back: ctl.py unlock --app web\n" in result.err
    assert one["id"] in result.out


def test_a_rollback_without_a_lock_says_nothing_of_one(here, fake):
    assert "locked" not in here("rollback", "--app", "web", "--no-lock").err
    assert posted(fake) == {"app": "web", "rollback": True, "lock": False}


def test_a_dry_rollback_locks_nothing(here, fake):
    fake.plan = {**PLAN, "kind": "rollback", "lock": True}
    result = here("rollback", "--app", "web", "--dry-run")
    assert "  lock: the app is locked then\n" in result.out and result.err == "a dry run: nothing was made\n"


def test_where_no_host_can_go_back_it_says_what_else_there_is(here, fake):
    fake.refusal = 409, "no host can go back"
    result = here("rollback", "--app", "web")
    assert result.code == ctl.REFUSED and "--to COMMIT" in result.err and "--override" not in result.err


# ----------------------------------------------------------------------------------------------------------------------
# Lists, status, cancel, retry: by id


def test_deployments_are_listed_filtered_and_cut_to_ids_that_name_them(here, fake):
    old, new = fake.deployment(status="failed", reason="all hosts failed"), fake.deployment(hold="lock", held=["web-02"])
    header, first, second = here("deployments").out.splitlines()
    assert header.split() == ["DEPLOYMENT", "STATUS", "APP", "REF", "KIND", "HOSTS", "CREATED", "TOOK", "BY", "REASON"]
    assert "0 of 3 succeeded, 2 pending, 1 held" in first and first.endswith("the app is locked")
    assert second.split()[:2] == [old["id"][:18], "failed"] and second.endswith("all hosts failed")
    short = first.split()[0]
    assert json.loads(here("status", short, "--json").out)["deployment"]["id"] == new["id"]
    shown = json.loads(here("deployments", "--app", "web", "--status", "failed", "--json").out)
    assert [one["id"] for one in shown["deployments"]] == [old["id"]] and shown["next"] is None
    assert here("deployments", "--limit", "1").err == "there are older ones: --limit 10\n"
    assert "no such deployments" in here("deployments", "--status", "rolled_back").err


def test_status_of_a_deployment_says_how_far_it_is_and_why_it_waits(here, fake):
    fake.lock = LOCK
    one = fake.deployment(hold="lock", strategy=ROLLING)
    hosts = iter(fake.jobs.values())
    next(hosts).update(status="success")
    next(hosts).update(status="cancelled", reason="stopped")
    text = here("status", one["id"]).out
    assert re.search("^progress +1 of 3 succeeded, 1 pending, 1 stopped$", text, re.MULTILINE)
    locked = r"^waits for +locked by alice \w+ ago \(ctl.py unlock --app web\): the database moves, until 2099-11-23 13:13:37 UTC$"
    assert re.search(locked, text, re.MULTILINE)
    assert [line.split()[3] for line in text.splitlines()[-3:]] == ["web-01", "web-02", "web-03"], "in the order of the batches"
    one |= {"hold": "pause", "resume_at": "2099-01-01T10:20:30.000Z"}
    assert "the canary is watched until 2099-01-01 10:20:30 UTC (in " in here("status", one["id"]).out
    assert json.loads(here("status", one["id"], "--json").out).keys() == {"deployment", "jobs"}


def test_a_job_is_found_before_a_deployment_and_the_start_of_both_is_ambiguous(here, fake):
    one = fake.deployment(["web-01"])
    job = next(iter(fake.jobs.values()))
    assert json.loads(here("status", job["id"][:18], "--json").out).keys() == {"job"}
    assert json.loads(here("status", job["id"], "--json").out).keys() == {"job"}
    assert json.loads(here("status", one["id"][:18].upper(), "--json").out).keys() == {"deployment", "jobs"}
    assert json.loads(here("status", one["id"][:13], "--json").out).keys() == {"job"}, "the time of both"
    fake.deployment(["web-02"])
    result = here("cancel", one["id"][:13])
    assert result.code == ctl.WRONG_USE and "is the start of 4 ids" in result.err
    assert re.search(rf"^{one['id']}  web deployment, ", result.err, re.MULTILINE)
    assert re.search(rf"^{job['id']}  web on web-01, ", result.err, re.MULTILINE)
    assert all(method == "GET" for method, *_ in fake.requests), "nothing was cancelled"


@pytest.mark.parametrize("name", ["ffffffff", "ff-f", "ffffffff-ffff-7fff-8fff-ffffffffffff"])
@pytest.mark.parametrize("verb", ["status", "follow", "cancel", "retry", "why"])
def test_an_id_that_nothing_has_is_refused(here, fake, verb, name):
    fake.deployment()
    result = here(verb, name)
    assert (result.code, result.out) == (ctl.REFUSED, "")
    assert "`ctl.py deployments`" in result.err and result.err.count("\n") == 1


def test_logs_of_a_deployment_lead_to_its_jobs(here, fake):
    one = fake.deployment()
    result = here("logs", "--job", one["id"])
    assert result.code == ctl.WRONG_USE and f"`ctl.py status {one['id']}`" in result.err


def test_cancel_of_a_deployment_says_what_still_runs(here, fake):
    one = fake.deployment()
    fake.move("web-01", "running")
    result = here("cancel", one["id"])
    assert re.search("^progress +0 of 3 succeeded, 1 running, 2 cancelled$", result.out, re.MULTILINE)
    assert result.err == f"to follow it: ctl.py follow {one['id']}\n"
    fake.move("web-01", "cancelled", reason="cancelled")
    one["status"] = "cancelled"
    result = here("cancel", one["id"][:18])
    assert re.search("^progress +0 of 3 succeeded, 3 cancelled$", result.out, re.MULTILINE) and result.err == ""
    fake.refusal = 409, "it has ended"
    result = here("cancel", one["id"])
    assert result.code == ctl.REFUSED and "it has ended: `ctl.py status ID`" in result.err


def test_retry_of_a_deployment_is_one_of_the_hosts_without_success(here, fake):
    one = fake.deployment(status="partial")
    fake.move("web-01", "success"), fake.move("web-02", "failed"), fake.move("web-03", "cancelled", reason="stopped")
    result = here("retry", one["id"][:18])
    assert re.search(rf"^retry of +{one['id']}$", result.out, re.MULTILINE)
    assert "web-01" not in result.out and "web-02" in result.out and "web-03" in result.out


# ----------------------------------------------------------------------------------------------------------------------
# lock, unlock, apps


def test_lock_and_unlock_say_what_follows(here, fake):
    result = here("lock", "--app", "web", "--reason", "the database moves", "--for", "2h")
    assert posted(fake) == {"reason": "the database moves", "for": 7200}
    locked = r"web is locked until 2099-11-23 13:13:37 UTC \(in \d+d\): pushes are held, deploys are refused \(ctl.py unlock --app web\)\n"
    assert re.fullmatch(locked, result.out)
    one = fake.deployment()
    fake.resumed = [one["id"]]
    said, _, row = here("unlock", "--app", "web").out.splitlines()
    assert said == "web is unlocked: deployments that waited and go on: 1" and row.split()[0] == one["id"][:18]
    assert json.loads(here("unlock", "--app", "web", "--json").out)["deployments"] == [one["id"]]
    fake.resumed = []
    assert here("unlock", "--app", "web").out == "web is unlocked: nothing waited; the next push is deployed\n"


def test_a_lock_without_an_end_and_an_unlock_of_nothing(here, fake):
    result = here("unlock", "--app", "web")
    assert result.code == ctl.REFUSED and "web is not locked: `ctl.py apps` shows which are" in result.err
    assert here("lock", "--app", "web", "--reason", "x").out.startswith("web is locked: ")
    assert posted(fake) == {"reason": "x"}


@pytest.mark.parametrize(
    "wanted, actual, shown",
    [
        (COMMITS["a"], COMMITS["b"], ["aaaaaaaa", "bbbbbbbb", "drift"]),
        (COMMITS["a"], COMMITS["a"], ["aaaaaaaa", "aaaaaaaa"]),
        ("main", COMMITS["b"], ["main", "bbbbbbbb"]),
        (COMMITS["a"], None, ["aaaaaaaa", "(aaaaaaaa)"]),
        (None, None, ["-", "(aaaaaaaa)"]),
    ],
)
def test_apps_show_lock_strategy_and_drift(here, fake, wanted, actual, shown):
    fake.lock, fake.host_fields = LOCK, {"wanted": wanted, "actual": actual}
    header, row, locked = here("apps").out.splitlines()
    assert re.split("  +", header) == ["APP", "REPO", "HOST", "WANTED", "ACTUAL", "DEPLOYED", "JOB", "ON PUSH", "STRATEGY"]
    assert re.split("  +", row)[3 : 3 + len(shown)] == shown and ("drift" in row) == ("drift" in shown)
    assert row.endswith("1 host at a time, canary web-01 first, watched for 5m, stops at the first failure")
    assert re.fullmatch(r"web is locked by alice \w+ ago \(ctl.py unlock --app web\): the database moves, until 2099.*", locked)


# ----------------------------------------------------------------------------------------------------------------------
# why, deliveries


def delivery(fake, *outcomes, **more):
    one = {
        "id": "72d3162e-cc78-11e3-81ab-4c9367dc0958", "received_at": TIME, "repo": "myorg/web", "ref": "refs/heads/main",
        "commit": COMMITS["a"], "pusher": "octocat", "message": "1 job for api", "outcomes": list(outcomes), **more,
    }  # fmt: skip
    fake.deliveries.append(one)
    return one


def outcome(rule, deployment_id=None, app="web", detail=""):
    return {"app": app, "rule": rule, "detail": detail, "deployment_id": deployment_id}


@pytest.mark.parametrize("name", ["72d3162e-cc78-11e3-81ab-4c9367dc0958", "72d3162e", "72d3162e-cc78-11e3"])
def test_why_of_a_delivery_names_the_rule_of_each_app(here, fake, name):
    delivery(fake, outcome("paths", detail="README.md"), outcome("deployed", "0199c2f0", "api"))
    text = here("why", name).out
    assert re.search("^push +refs/heads/main of myorg/web, aaaaaaaa, by octocat$", text, re.MULTILINE)
    assert re.search("^answered +1 job for api$", text, re.MULTILINE), "to the sender: it is not the commit's message"
    assert re.search(r"^web +paths: no file of the push is one of its paths \(README.md\)$", text, re.MULTILINE)
    assert re.search(r"^api +deployed: it was deployed \[ctl.py why 0199c2f0\]$", text, re.MULTILINE)
    assert json.loads(here("why", name, "--json").out) == {"delivery": fake.deliveries[0]}


def test_every_rule_of_the_contract_has_its_words():
    design = (CTL.parent / "docs/design.md").read_text()
    said = re.search(r"that applies is named:\n(.*?)\n\n", design, re.DOTALL)[1]
    rules = re.findall(r"`([a-z_]+)`", re.sub(r"\(.*?\)|`app: null`", "", said))
    assert set(ctl.RULES) == set(rules)
    statuses = re.findall(
        r"^\| .* \| `(\w+)` \|$", design.partition("The status is a function")[2].partition("##")[0], re.MULTILINE
    )
    assert {"pending", "running", *ctl.OVER} == set(statuses)


def test_why_of_a_job_tells_what_made_it_and_what_took_its_place(here, fake):
    one = fake.deployment(["web-01"], kind="push", created_by="github", delivery_id="72d3162e-cc78-11e3-81ab-4c9367dc0958")
    delivery(fake, outcome("deployed", one["id"]), outcome("ref", None, "api"))
    job = next(iter(fake.jobs.values()))
    job.update(status="cancelled", reason="superseded", superseded_by=COMMITS["b"])
    text = here("why", job["id"][:18]).out
    for words in (
        f"job +{job['id']}",
        r"status +cancelled \(superseded\)",
        "what +web main on web-01",
        r"made +\w+ ago by admin: push",
        "push +refs/heads/main of myorg/web, .*",
        "rule +deployed: it was deployed",
        f"deployment +{one['id']}, pending",
        "because +a newer push took its place",
        rf"superseded by +{COMMITS['b']} \(ctl.py why {COMMITS['b']}\)",
    ):
        assert re.search(f"^{words}$", text, re.MULTILINE), (words, text)
    assert len(re.findall("^rule ", text, re.MULTILINE)) == 1 and "waits for" not in text
    assert json.loads(here("why", job["id"], "--json").out).keys() == {"job", "deployment", "delivery"}


def test_why_of_what_waits_says_what_for(here, fake):
    one = fake.deployment(["web-01"], held=["web-01"], hold="batch", kind="rollback")
    assert "waits for   the next batch waits" in here("why", one["id"]).out
    job = next(iter(fake.jobs.values()))
    assert "waits for   the next batch waits" in here("why", job["id"]).out
    fake.lock, job["hold"], one["hold"] = LOCK, "lock", "lock"
    assert "waits for   locked by alice" in here("why", job["id"]).out
    assert re.search(r"^made +\w+ ago by bob: rollback$", here("why", one["id"]).out, re.MULTILINE)
    job["deployment_id"] = None
    assert re.search(r"^made +\w+ ago by admin: a job of its own$", here("why", job["id"]).out, re.MULTILINE)


def test_why_and_status_of_what_failed_name_hosts_causes_and_logs(here, fake):
    one = fake.deployment([f"web-{number}" for number in range(8)], status="failed", reason="7 failed of 8")
    first, *failed = fake.jobs.values()
    first["status"] = "success"
    for job in failed:
        job.update(status="failed", reason="timeout", exit_code=143, error=None)
    failed[0].update(reason="exit_code", error="npm ci ended with exit code 3", exit_code=3, rolled_back_to=COMMITS["b"])
    said = [
        f"web-1: exit_code: npm ci ended with exit code 3, back on bbbbbbbb (ctl.py logs --job {failed[0]['id']})",
        *(f"{job['host']}: timeout, exit code 143 (ctl.py logs --job {job['id']})" for job in failed[1:5]),
    ]
    text = here("why", one["id"]).out
    assert "because     7 failed of 8\n" in text
    assert re.findall("^failed +(.*)$", text, re.MULTILINE) == [*said, f"and 2 more failed: ctl.py status {one['id']}"]
    told = here("status", one["id"])
    assert told.err.splitlines() == [*said, "and 2 more failed"]
    assert told.out.count(" timeout\n") == 6
    assert json.loads(here("why", one["id"], "--json").out).keys() == {"job", "deployment", "delivery"}
    text = here("why", failed[0]["id"]).out
    assert f"log         ctl.py logs --job {failed[0]['id']}\n" in text and not re.search("^failed", text, re.MULTILINE)
    assert not re.search("^log ", here("why", first["id"]).out, re.MULTILINE)


def test_deliveries_are_listed_with_what_became_of_them(here, fake):
    delivery(fake, outcome("deployed", "x"), outcome("paths", app="api")), delivery(fake, outcome("no_app", app=None), id="x y/z")
    header, first, second = here("deliveries", "--repo", "myorg/web").out.splitlines()
    assert header.split() == ["DELIVERY", "RECEIVED", "REPO", "REF", "COMMIT", "PUSHER", "OUTCOME"]
    assert first.endswith("octocat  web deployed, api paths") and second.endswith("- no_app")
    assert here("why", "x y/z").code == 0, "an id is whatever the forge sent"


# ----------------------------------------------------------------------------------------------------------------------
# Following, in lines


def ends_in_time(process):
    """Kills a process that takes too long, so that whoever reads of it reads its end."""
    timer = threading.Timer(LIMIT_S, process.kill)
    timer.daemon = True
    timer.start()
    return timer


class Follower:
    """A ctl that follows, as a process, and its lines."""

    def __init__(self, process):
        self.process, self.timer = process, ends_in_time(process)

    def until(self, words):
        for line in self.process.stdout:
            if words in line:
                return line
        raise AssertionError((words, self.process.stderr.read()))

    def end(self):
        out, err = self.process.communicate()
        self.timer.cancel()
        return self.process.returncode, out, err


@pytest.fixture
def follower(start, fake):
    return lambda *argv: Follower(start(*argv, env=dict(os.environ)))


def test_following_is_a_line_a_change_and_ends_with_the_outcome(follower, fake):
    one = fake.deployment(held=["web-03"])
    ctl_ = follower("follow", one["id"])
    assert re.fullmatch(r"\d\d:\d\d:\d\dZ web main: pending, 0 of 3 succeeded, 2 pending, 1 held\n", ctl_.until("web main"))
    fake.becomes(one, "running", started_at=TIME)
    fake.move("web-01", "running")
    assert ctl_.until("web-01") == "13:14:00Z web-01: running\n"
    fake.log("web-01", "building")
    fake.move("web-01", "running", commit=COMMITS["a"])  # no change of its status
    fake.move("web-01", "success")
    fake.move("web-02", "failed", reason="exit_code", error="npm ci ended with 3", rolled_back_to=COMMITS["b"])
    assert ctl_.until("web-01") == "13:15:43Z web-01: success\n"
    assert ctl_.until("web-02") == "13:15:43Z web-02: failed (exit_code: npm ci ended with 3, back on bbbbbbbb)\n"
    fake.move("web-03", "cancelled", reason="stopped", started_at=None)
    fake.becomes(one, "partial", reason="1 of 1 failed", started_at=TIME)
    code, out, err = ctl_.end()
    assert (code, err) == (ctl.FAILED, "")
    job = next(job for job in fake.jobs.values() if job["host"] == "web-02")
    assert out.splitlines() == [
        "13:15:43Z web-03: cancelled (stopped)",
        "13:15:43Z deployment: partial",
        "partial: web main, 1 of 3 succeeded, 1 failed, 1 stopped, took 2m5s",
        "  reason: 1 of 1 failed",
        f"  web-02: exit_code: npm ci ended with 3, back on bbbbbbbb ({ctl.__file__} logs --job {job['id']})",
        f"  once more where it did not succeed: {ctl.__file__} retry {one['id']}",
    ]


def test_deploy_follow_ends_with_0_after_a_success_and_shows_no_other_deployment(follower, fake):
    ctl_ = follower(*DEPLOY, "--follow")
    ctl_.until("web main: pending")
    one = next(iter(fake.deployments.values()))
    other = fake.deployment(["db-01"])
    fake.move("db-01", "running")
    fake.becomes(other, "failed")
    for host in ("web-01", "web-02", "web-03"):
        fake.move(host, "success")
    fake.becomes(one, "success", started_at=TIME)
    code, out, _ = ctl_.end()
    assert code == 0 and "db-01" not in out and out.splitlines()[-1] == "success: web main, 3 of 3 succeeded, took 2m5s"


def end_of(fake, one, status="success"):
    for job in list(fake.jobs.values()):
        if job["deployment_id"] == one["id"] and job["status"] not in ctl.ENDED:
            fake.move(job["host"], "success")
    fake.becomes(one, status, started_at=TIME)


def test_wait_says_how_it_ended_alone(follower, fake):
    one = fake.deployment()
    ctl_ = follower(*DEPLOY, "--wait")
    fake.opened()
    end_of(fake, one)
    code, out, err = ctl_.end()
    assert (code, out) == (0, "success: web main, 3 of 3 succeeded, took 2m5s\n")
    assert err == "this deployment is pending already, --force makes a new one\n"


def test_wait_says_what_is_waited_for(follower, fake):
    fake.get_hosts = lambda query, body: (200, HOSTS)
    ctl_ = follower(*DEPLOY, "--wait")
    fake.asked("/v1/hosts")
    fake.move("web-02", "running")
    end_of(fake, next(iter(fake.deployments.values())))
    code, out, err = ctl_.end()
    assert (code, err, out.count("\n")) == (0, "waits for: no agent has registered as web-01\n", 1)


def test_wait_json_is_one_document(follower, fake):
    fake.get_hosts = lambda query, body: (200, HOSTS)
    ctl_ = follower(*DEPLOY, "--wait", "--json")
    fake.opened()
    end_of(fake, next(iter(fake.deployments.values())), "cancelled")
    code, out, err = ctl_.end()
    document = json.loads(out)
    assert err == "" and (code, document["deployment"]["status"], document["created"]) == (ctl.FAILED, "cancelled", True)
    assert {job["status"] for job in document["jobs"]} == {"success"}


def test_what_has_ended_is_followed_to_its_end_at_once(here, fake):
    one = fake.deployment()
    end_of(fake, one)
    result = here("follow", one["id"][:18])
    assert result.code == 0 and result.out.splitlines()[-1] == "success: web main, 3 of 3 succeeded, took 2m5s"


def test_follow_of_a_job_is_its_log(here, fake):
    fake.deployment()
    job = next(iter(fake.jobs.values()))
    fake.move("web-01", "success")
    fake.stream = lambda handler, query: handler.send(204, {})
    result = here("follow", job["id"])
    assert result.code == 0 and result.out.startswith("success: web on web-01")


def test_follow_json_is_an_object_a_line_with_logs_and_the_results(follower, fake):
    ctl_ = follower(*DEPLOY, "--follow", "--json")
    fake.opened()
    fake.asked("/v1/jobs")
    fake.move("web-01", "running")
    fake.log("web-01", "building")
    other = fake.deployment(["db-01"])
    fake.move("db-01", "running"), fake.log("db-01", "no"), fake.becomes(other, "failed")
    end_of(fake, next(iter(fake.deployments.values())))
    code, out, _ = ctl_.end()
    lines = json_lines(out)
    assert code == 0 and [line["event"] for line in lines] == ["job", "log", "job", "job", "job", "deployment", "results"]
    assert lines[-1]["data"]["deployment"]["status"] == "success" and len(lines[-1]["data"]["jobs"]) == 3
    assert "db-01" not in out


def test_what_a_deployment_waits_for_is_a_line(follower, fake):
    one = fake.deployment(strategy=ROLLING)
    ctl_ = follower("follow", one["id"])
    ctl_.until("web main")
    fake.becomes(one, "running", hold="pause", resume_at="2099-01-01T10:20:30.000Z")
    assert "deployment: running (the canary is watched until 2099-01-01 10:20:30 UTC" in ctl_.until("deployment")
    fake.lock = LOCK
    fake.becomes(one, "running", hold="lock")
    assert "deployment: running (locked by alice" in ctl_.until("deployment")
    end_of(fake, one)
    assert ctl_.end()[0] == 0


def test_a_lost_connection_loses_and_repeats_nothing(follower, fake):
    ctl_ = follower(*DEPLOY, "--follow")
    ctl_.until("web main")
    fake.move("web-01", "running")
    ctl_.until("web-01: running")
    fake.cut()
    fake.move("web-01", "success")
    fake.move("web-02", "success")
    end_of(fake, next(iter(fake.deployments.values())))
    code, out, err = ctl_.end()
    assert code == 0 and [line.split(" ", 1)[1] for line in out.splitlines()[:3]] == [f"web-0{n}: success" for n in (1, 2, 3)]
    assert "connection lost" in err and "connected again" in err


def test_after_a_gap_the_state_is_read_again(follower, fake):
    ctl_ = follower(*DEPLOY, "--follow")
    ctl_.until("web main")
    fake.gap = "some events were removed"
    events = list(fake.events)
    fake.move("web-01", "failed", reason="timeout")
    fake.events[:] = events  # that one is in no stream
    fake.cut()
    assert "web-01: failed (timeout)" in ctl_.until("web-01")
    end_of(fake, next(iter(fake.deployments.values())), "partial")
    assert ctl_.end()[0] == ctl.FAILED


def test_the_state_is_read_after_the_stream_is_open(here, fake):
    """What happens between the creation and the stream is in the picture; what happens in between both is not told twice."""
    answer = fake.get_deployments_one

    def late(one, query, body):
        fake.get_deployments_one = answer
        assert fake.streams == 1
        end_of(fake, fake.deployments[one])
        return answer(one, query, body)

    fake.get_deployments_one = late
    result = here(*DEPLOY, "--follow")
    assert result.code == 0 and len(result.out.splitlines()) == 5


def test_what_tells_of_earlier_changes_nothing():
    board = ctl.Board(None, {"id": "d", "status": "running", "hold": None})
    for status, attempt, shown in (
        ("running", 2, "running"),
        ("pending", 1, "running"),
        ("failed", 2, "failed"),
        ("running", 3, "failed"),
    ):
        board.take(ctl.Event("job", {**JOB, "deployment_id": "d", "status": status, "attempt": attempt}))
        assert board.jobs[JOB["id"]]["status"] == shown
    for status in ("partial", "running"):
        board.take(ctl.Event("deployment", {"id": "d", "status": status, "hold": None}))
        assert board.deployment["status"] == "partial"


def test_reading_the_state_waits_for_the_controller(here, fake, pauses):
    answer, away = fake.get_deployments_one, [503, 503]

    def stumbling(*given):
        if away:
            raise Refused(away.pop(), "a moment")
        return answer(*given)

    fake.get_deployments_one = stumbling
    end_of(fake, fake.deployment())
    result = here(*DEPLOY, "--follow")
    assert result.code == 0 and len(pauses) == 2


def test_ctrl_c_says_how_to_go_on_and_how_to_end_it(follower, fake):
    ctl_ = follower(*DEPLOY, "--follow")
    ctl_.until("web main")
    ctl_.process.send_signal(signal.SIGINT)
    code, out, err = ctl_.end()
    one = next(iter(fake.deployments))
    assert (code, out) == (130, "")
    assert err == (
        f"no longer watched, the deployment goes on; to follow it again: {ctl.__file__} follow {one}; to end it: {ctl.__file__} cancel {one}\n"
    )
    assert not any("cancel" in path for _, path, *_ in fake.requests)


# ----------------------------------------------------------------------------------------------------------------------
# Following, on a terminal


class Terminal:
    """A ctl on a terminal of its own, which makes Ctrl-C and resizes into signals; without `ticks` it draws only what happens.

    `lines`: what a terminal shows of what it wrote; of the sequences that ctl uses, no others.
    """

    def __init__(self, *argv, size=(24, 80), ticks=True):
        self.master, slave = pty.openpty()
        self.resize(*size)
        program = "import sys, ctl\nif not int(sys.argv[1]): ctl.TICK_S = 3600\nsys.exit(ctl.main(sys.argv[2:]))"
        command = ["setsid", "--ctty", sys.executable, "-c", program, str(int(ticks)), *argv]
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=dict(os.environ), cwd=CTL.parent)
        os.close(slave)
        self.timer = ends_in_time(self.process)
        self.text, self.raw, self.lines, self.row = b"", b"", [""], 0

    def resize(self, lines, columns):
        self.size = lines, columns
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self):
        """More of what it writes; False at its end."""
        try:
            data = os.read(self.master, 65536)
        except OSError:  # EIO: it has gone
            return False
        self.text, self.raw = self.text + data, self.raw + data
        end = max(self.text.rfind(b"\n"), self.text.rfind(b"J")) + 1  # whole frames
        self.show(self.text[:end].decode())
        self.text = self.text[end:]
        return True

    def show(self, text):
        for sequence, letter, plain in re.findall(r"(\x1b\[([0-9;]*[A-Za-z]))|([^\x1b]+)", text):
            kind, number = letter[-1:], int(re.match(r"[0-9]*", letter)[0] or 0)
            if kind == "A":
                self.row -= number
                assert self.row >= 0, "above the screen"
                assert all(ctl.width(line) <= self.size[1] for line in self.lines[self.row :]), (self.size, self.lines)
            elif kind == "H":
                self.row = 0
            elif kind == "J" and number == 2:
                self.lines = [""]
            elif kind == "J":
                del self.lines[self.row :]
            elif kind == "K":
                self.put("")
            elif kind != "m":
                assert not sequence, sequence
                for part in re.findall(r"[^\r\n]+|\r|\n", plain):
                    if part == "\n":
                        self.row += 1
                    elif part != "\r":
                        self.put((self.lines[self.row] if self.row < len(self.lines) else "") + part)

    def put(self, text):
        self.lines += [""] * (self.row + 1 - len(self.lines))
        self.lines[self.row] = text

    def until(self, words):
        """Reads until `words` are on the screen; its lines."""
        while not any(words in line for line in self.lines):
            assert self.read(), (words, self.lines)
        return list(self.lines)

    def key(self, key):
        os.write(self.master, key)

    def end(self):
        while self.read():
            pass
        return self.process.wait(LIMIT_S), self.lines


@pytest.fixture
def terminal(fake):
    made = []

    def open_one(*argv, **options):
        made.append(Terminal(*argv, **options))
        return made[-1]

    yield open_one
    for one in made:
        one.timer.cancel()
        one.process.kill()
        one.process.wait()
        os.close(one.master)


def test_a_terminal_shows_a_line_a_host_in_place(terminal, fake):
    one = fake.deployment(held=["web-03"], strategy=ROLLING)
    shown = terminal("follow", one["id"])
    lines = shown.until("web-03")
    mark, *title = lines[0]
    assert "".join(title) == " web main: pending, 0 of 3 succeeded, 2 pending, 1 held"
    while shown.lines[0][0] == mark:  # it turns
        assert shown.read()
    assert lines[1].startswith("1 host at a time, canary web-01 first, watched for 5m")
    assert [line.split() for line in lines[2:]] == [
        ["HOST", "STATUS", "TIME"], ["web-01", "pending"], ["web-02", "pending"], ["web-03", "held", "its", "batch", "comes", "later"],
    ]  # fmt: skip
    fake.move("web-01", "running")
    fake.log("web-01", "npm ci\x1b[2J " + "x" * 200)
    lines = shown.until("npm ci")
    assert len(lines) == 6 and lines[3].startswith("web-01  running  ") and lines[3].endswith("x…") and len(lines[3]) <= 80
    fake.move("web-01", "success", commit=COMMITS["a"])
    assert re.fullmatch("web-01  success  1m43s  aaaaaaaa", shown.until("aaaaaaaa")[3])
    fake.move("web-02", "failed", reason="exit_code", error="npm ci ended with 3")
    assert re.fullmatch("web-02  failed   1m43s  exit_code: npm ci ended with 3", shown.until("npm ci ended")[4])
    fake.move("web-03", "cancelled", reason="stopped", started_at=None)
    fake.becomes(one, "partial", started_at=TIME)
    code, lines = shown.end()
    assert code == ctl.FAILED and len(lines) == 9
    assert lines[0] == "web main: partial, 1 of 3 succeeded, 1 failed, 1 stopped, took 2m5s".replace("took ", "")
    assert lines[6] == "partial: web main, 1 of 3 succeeded, 1 failed, 1 stopped, took 2m5s"


def test_of_hundreds_of_hosts_those_that_count_are_shown(terminal, fake):
    hosts = [f"web-{number:03}" for number in range(300)]
    one = fake.deployment(hosts, held=hosts[40:], started_at="2026-01-01T13:14:00.000Z", branch="x")
    for host in hosts[:30]:
        fake.move(host, "success")
    fake.move("web-030", "running"), fake.move("web-031", "failed", reason="timeout")
    shown = terminal("follow", one["id"], size=(12, 60))
    lines = shown.until("others")
    assert len(lines) == 11, "one is left for the cursor"
    assert re.search(r"…, \d+d\d+h$", lines[0]), "how long it takes is not cut off"
    assert [line.split()[0] for line in lines[3:]] == [f"web-{number:03}" for number in range(30, 37)] + ["and"]
    assert lines[-1] == "and 293 others: 30 succeeded, 3 pending, 260 held".replace("succeeded", "success")
    fake.log("web-030", "a line")
    assert len(shown.until("a line")) == 11


def test_a_resize_draws_anew_and_fits(terminal, fake):
    one = fake.deployment([f"a-rather-long-name-of-web-{number}.example.com" for number in range(8)])
    shown = terminal("follow", one["id"], ticks=False)
    assert len(shown.until("web-7")) == 11
    shown.resize(6, 30)
    lines = shown.until("others")
    assert len(lines) == 5 and lines[0].endswith("…") and lines[-1] == "and 7 others: 7 pending"
    shown.resize(24, 80)
    assert len(shown.until("web-7.example.com")) == 11


def test_ctrl_c_on_a_terminal_leaves_it_in_order(terminal, fake):
    one = fake.deployment()
    shown = terminal("follow", one["id"], size=(24, 200))
    shown.until("web-03")
    shown.key(b"\x03")
    code, lines = shown.end()
    assert code == 130 and len(lines) == 7
    assert lines[5].startswith("web-03") and lines[6].startswith("no longer watched, the deployment goes on; to follow it again")


def test_a_lost_connection_is_told_in_the_frame(terminal, fake):
    one = fake.deployment()
    shown = terminal("follow", one["id"], size=(24, 120))
    shown.until("web-03")
    fake.cut()
    shown.until("connect")
    fake.opened(2)
    fake.move("web-01", "running")
    lines = shown.until("web-01  running")
    assert not any("connect" in line for line in lines) and len(lines) == 6
    end_of(fake, one)
    assert shown.end()[0] == 0


def test_a_dumb_terminal_gets_lines(terminal, fake, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    one = fake.deployment()
    end_of(fake, one)
    code, lines = terminal("follow", one["id"]).end()
    assert code == 0 and re.match(r"\d\d:\d\d:\d\dZ web main: success", lines[0])


def test_colours_are_for_terminals_that_want_them(terminal, fake, monkeypatch):
    one = fake.deployment()
    fake.move("web-01", "failed", reason="timeout")
    coloured = terminal("follow", one["id"])
    while b"\x1b[31mfailed" not in coloured.raw:
        assert coloured.read()
    monkeypatch.setenv("NO_COLOR", "1")
    plain = terminal("follow", one["id"])
    plain.until("failed")
    assert not re.search(rb"\x1b\[[0-9;]*m", plain.raw)


# ----------------------------------------------------------------------------------------------------------------------
# What comes from outside


def test_no_control_character_of_any_answer_reaches_the_terminal(here, fake):
    evil = "x\x1b[2J\x07\r\ny\u202e"
    dirty = {"app": evil, "repo": evil, "ref": evil, "branch": evil, "reason": evil, "created_by": evil, "kind": evil}
    one = fake.deployment([evil], strategy={**ROLLING, "canary": evil}, delivery_id="72d3162e-cc78-11e3-81ab-4c9367dc0958", **dirty)
    job = next(iter(fake.jobs.values()))
    job.update(
        {name: evil for name in ("app", "ref", "repo", "error", "reason", "created_by", "host")},
        status="failed",
        superseded_by=evil,
    )
    fake.skipped, fake.lock = [{"host": evil, "reason": evil}], {**LOCK, "reason": evil, "by": evil, "app": evil}
    one["hold"], fake.host_fields = "lock", {"wanted": evil, "actual": evil}
    delivery(fake, outcome(evil, evil, evil, evil), ref=evil, pusher=evil, message=evil, repo=evil)
    verbs = [
        ("status", one["id"]), ("deployments",), ("apps",), ("why", one["id"]), ("why", job["id"]), ("deliveries",), ("why", "72d3162e"),
        ("retry", one["id"]), ("cancel", one["id"]), DEPLOY, ("rollback", "--app", "web"), ("unlock", "--app", "web"),
    ]  # fmt: skip
    for argv in verbs:
        result = here(*argv)
        assert result.code == 0, result
        assert not controls(result.out + result.err) and "\u202e" not in result.out + result.err, argv
    one["status"] = "failed"
    job.update(status="failed", reason=evil, error=evil, id="0" + evil, rolled_back_to=evil)
    result = here("follow", one["id"])
    assert result.code == ctl.FAILED and "ctl.py logs --job 0x y" in result.out and not controls(result.out + result.err)
    fake.plan = {
        **PLAN,
        "app": evil,
        "strategy": one["strategy"],
        "build": [evil],
        "deploy": evil,
        "lock": fake.lock or LOCK,
        "steps": [{"hosts": [evil], "refs": {evil: evil}, "waits": evil}],
    }
    result = here(*DEPLOY, "--dry-run")
    assert result.code == 0 and not controls(result.out + result.err)
