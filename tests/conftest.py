"""Fixtures that all tests share: a clock that a test holds, and a controller in this process."""

from __future__ import annotations

import contextlib
import copy
import functools
import http.client
import json
import os
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

import pytest

import deploybot

pytest.register_assert_rewrite("hosts")

# Settings of whoever runs the tests are none of the programs that they start.
for name in [name for name in os.environ if name.startswith("DEPLOYBOT_")]:
    del os.environ[name]

# The folder of the programs, for those that `command` starts.
os.environ["PYTHONPATH"] = str(Path(deploybot.__file__).resolve().parent)

# A shell that starts the tests in the background lets them ignore Ctrl-C, and so would the programs that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

SECRET = "It's a Secret to Everybody"
TOKENS = {"token": "dbt_admin", "agent_token": "dbt_agent", "read_token": "dbt_read"}


class FakeClock(deploybot.Clock):
    """Stands still until it is moved."""

    def __init__(self):
        self.at = 1_790_000_000.0

    def now(self):
        return self.at

    def monotonic(self):
        return self.at

    def advance(self, seconds):
        self.at += seconds


@functools.cache
def empty_database():
    """Its bytes, made once: the most of what a first start takes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deploybot.db"
        deploybot.Store(path).close()
        return path.read_bytes()


class Controller:
    """A controller on a free port of the loopback, with calls to it."""

    def __init__(self, folder, apps="", clock=None, pulse=0.2, **settings):
        self.folder, self.clock, self.pulse = folder, clock, pulse
        self.token = settings.get("token")  # what the calls below send
        folder.mkdir(parents=True, exist_ok=True)
        self.apps_file = folder / "apps.yaml"
        if apps or not self.apps_file.exists():
            self.apps_file.write_text(apps)
        if not (folder / "deploybot.db").exists():
            (folder / "deploybot.db").write_bytes(empty_database())
        env = {"DEPLOYBOT_" + name.upper(): str(value) for name, value in settings.items()}
        self.config = deploybot.Config.load(
            {"host": "127.0.0.1", "port": "0", "db": str(folder / "deploybot.db"), "apps": str(self.apps_file)}, env
        )
        self.daemon = None
        self.start()

    def start(self):
        self.daemon = deploybot.Daemon(self.config, self.clock, self.pulse)
        self.daemon.start(poll_interval=0.01)
        self.port = self.daemon.port
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self):
        if self.daemon:
            self.daemon.stop()
            self.daemon = None

    def restart(self, **changes):
        """Stop and start on the same port and database; `changes`: fields of Config."""
        self.stop()
        self.config = deploybot.dataclasses.replace(self.config, port=self.port, **changes)
        self.start()

    def passes(self, seconds):
        """So much time goes by; Daemon.sweep() would say of the leap that the controller was stopped meanwhile."""
        self.clock.advance(seconds)
        self.daemon.jobs.sweep()
        self.daemon.deployments.sweep()
        self.daemon.auth.sweep()

    def acting(self, token):
        """The same controller, called with that token."""
        other = copy.copy(self)
        other.token = token
        return other

    @property
    def jobs(self):
        return self.daemon.jobs

    def set_app(self, **app):
        """Makes this the only app of the mapping in force."""
        self.apps_file.write_text(json.dumps({"apps": [app]}))
        self.daemon.apps.all = deploybot.read_apps(self.apps_file)

    def raw(self, method, path, body=None, headers=None, timeout=30):
        """(status, headers, bytes) of one call on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            sent = {"Content-Type": "application/json", **(headers or {})}
            if self.token and "Authorization" not in sent:
                sent["Authorization"] = f"Bearer {self.token}"
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, {name: value for name, value in sent.items() if value is not None})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def call(self, method, path, body=None, headers=None, timeout=30):
        """(status, the JSON of the answer)."""
        status, _, data = self.raw(method, path, body, headers, timeout)
        return status, json.loads(data) if data else {}

    # The calls that most tests make; each asserts that it went well.

    def ok(self, method, path, body=None, expected=(200, 201)):
        status, answer = self.call(method, path, body)
        assert status in expected, (method, path, status, answer)
        return answer

    def register(self, hostname="web-01", **more):
        return self.ok("POST", "/v1/agents/register", {"hostname": hostname, **more})

    def beat(self, agent, **more):
        return self.ok("POST", f"/v1/agents/{agent['id']}/heartbeat", {"status": "online", **more})

    def create(self, ref="main", host="web-01", repo="myorg/app", **more):
        return self.ok("POST", "/v1/jobs", {"repo": repo, "ref": ref, "host": host, **more})["job"]

    def job(self, job_id):
        return self.ok("GET", f"/v1/jobs/{job_id}")["job"]

    def logs(self, job, *messages, offset=0, attempt=None):
        lines = [{"message": message} for message in messages]
        body = {"attempt": attempt or job["attempt"], "offset": offset, "lines": lines}
        return self.ok("POST", f"/v1/jobs/{job['id']}/logs", body)

    def end(self, job, status="success", **more):
        return self.ok("POST", f"/v1/jobs/{job['id']}/result", {"attempt": job["attempt"], "status": status, **more})["job"]

    def lines(self, job, **query):
        """Every stored line of a job."""
        after, lines = 0, []
        while after is not None:
            found = self.ok("GET", f"/v1/jobs/{job['id']}/logs?" + urllib.parse.urlencode({"after": after, **query}))
            lines += found["lines"]
            after = found["next"]
        return lines


class EventStream:
    """One SSE connection, read event by event. It is cut at a time: comments come for ever, so no time-out of a socket ends a wait
    for an event that does not."""

    def __init__(self, controller, path="/v1/logs/stream", last_id=None, timeout=10, headers=None):
        self.connection = http.client.HTTPConnection("127.0.0.1", controller.port, timeout=timeout)
        sent = {**({"Last-Event-ID": last_id} if last_id else {}), **(headers or {})}
        if controller.token:
            sent.setdefault("Authorization", f"Bearer {controller.token}")
        self.connection.request("GET", path, headers=sent)
        self.answer = self.connection.getresponse()
        self.status = self.answer.status
        self.was_cut = False
        self.watch = threading.Timer(max(20, timeout), self.cut, [self.connection.sock])
        self.watch.daemon = True
        self.watch.start()

    def cut(self, connection):
        self.was_cut = True
        with contextlib.suppress(OSError, AttributeError):
            connection.shutdown(socket.SHUT_RDWR)

    def __iter__(self):
        event = {}
        for raw in self.answer:
            line = raw.decode().rstrip("\n")
            if not line and "data" in event:
                yield {"event": event["event"], "id": event.get("id"), "data": json.loads(event["data"])}
            if not line:
                event = {}
            elif not line.startswith(":"):
                name, _, value = line.partition(": ")
                event[name] = value

    def close(self):
        self.watch.cancel()
        self.connection.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


class Faulty:
    """A connection that fails at a statement. An INSERT that is a transaction by itself is its BEGIN and its COMMIT, too."""

    def __init__(self, db, statement, error=None):
        self.db, self.statement, self.seen = db, statement, 0
        self.error = error or sqlite3.OperationalError("disk I/O error")

    def execute(self, sql, *values):
        is_whole = sql.startswith("INSERT") and not self.db.in_transaction and self.statement in ("BEGIN", "COMMIT")
        if sql.startswith(self.statement) or is_whole:
            self.seen += 1
            raise self.error
        return self.db.execute(sql, *values)

    def __getattr__(self, name):
        return getattr(self.db, name)


def command(program):
    """What starts one of our programs, "deploybot.py", as `python3 FILE` does, but from what Python compiled of it before: a start of
    the controller takes a third of the time."""
    return [sys.executable, "-m", program.removesuffix(".py")]


@contextlib.contextmanager
def failing_at(store, statement, error=None):
    """The writing connection of that store fails at statements that start so."""
    db = store._db
    store._db = Faulty(db, statement, error)
    try:
        yield store._db
    finally:
        store._db = db


def wait_for(condition, seconds=15.0):
    """The first true value of `condition()`; fails after `seconds`. For what only another thread or process can bring about."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError("what was waited for did not come")


@pytest.fixture
def make_controller(tmp_path):
    """Makes controllers that end with the test."""
    made = []

    def make(name="controller", **settings):
        settings = {"open": True, **settings}
        controller = Controller(tmp_path / name, **settings)
        made.append(controller)
        return controller

    yield make
    for controller in made:
        controller.stop()


@pytest.fixture
def controller(make_controller):
    """In open mode, with a webhook secret and no apps."""
    return make_controller(webhook_secret=SECRET)


@pytest.fixture
def clock():
    return FakeClock()
