"""deploybot.py as a process: start, signals, `kill -9` in the middle of everything, and what it says."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import SECRET, TOKENS, Controller, command, wait_for

import deploybot

PROGRAM = command("deploybot.py")
START_LIMIT = 30  # seconds
STOP_LIMIT = 5  # seconds: what is promised; the tests add the load of the machine
GOOD = {"apps": [{"name": "app", "repo": "myorg/app", "hosts": ["web-01"]}]}


def environment(**settings):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("DEPLOYBOT_")}
    return {**plain, **{"DEPLOYBOT_" + name.upper(): str(value) for name, value in settings.items()}}


class Process(Controller):
    """The controller as a process of its own, with the same calls."""

    def __init__(self, folder, *flags, apps=GOOD, **settings):
        self.folder, self.flags, self.settings, self.token = folder, flags, settings, None
        folder.mkdir(parents=True, exist_ok=True)
        self.apps_file, self.log, self.db = folder / "apps.yaml", folder / "log", folder / "data" / "deploybot.db"
        self.apps_file.write_text(json.dumps(apps))
        self.port = 0
        self.start()

    def start(self):
        before = len(self.said())
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*PROGRAM, "--host", "127.0.0.1", "--port", str(self.port), *self.flags],
                cwd=self.folder,
                env=environment(**self.settings),
                stdout=log,
                stderr=log,
            )
        pattern = re.compile(r" listens on 127\.0\.0\.1 port ([0-9]+)")

        def listening():
            assert self.process.poll() is None, self.said()
            return pattern.search(self.said(), before)

        try:
            self.port = int(wait_for(listening, START_LIMIT)[1])
        except BaseException:
            self.kill()
            raise
        self.url = f"http://127.0.0.1:{self.port}"

    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    def says(self, text, seconds=20):
        wait_for(lambda: text in self.said(), seconds)

    def stop(self):
        """Its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(30)
        finally:
            self.kill()

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def run(tmp_path):
    """Starts processes that end with the test."""
    made = []

    def start(*flags, name="process", **settings):
        made.append(Process(tmp_path / name, *flags, **{"open": True, **settings}))
        return made[-1]

    yield start
    for process in made:
        process.kill()


def deploybot_py(folder, *arguments, **settings):
    """One that ends by itself: (exit code, output, lines of errors)."""
    done = subprocess.run(
        [*PROGRAM, *arguments], cwd=folder, env=environment(**settings), capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


# Stop


def test_sigterm_ends_within_five_seconds(run):
    c = run()
    agents = [c.register(f"web-{i}") for i in range(10)]
    running = c.create(host="web-0")
    assert c.beat(agents[0])["job"]
    silent = socket.create_connection(("127.0.0.1", c.port))
    half = socket.create_connection(("127.0.0.1", c.port))
    half.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: x")
    streams = [socket.create_connection(("127.0.0.1", c.port), timeout=30) for _ in range(5)]
    for stream in streams:
        stream.sendall(b"GET /v1/logs/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert stream.recv(12) == b"HTTP/1.1 200"
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        parked = [pool.submit(c.beat, agent, wait=25) for agent in agents]
        read = "\ndeploybot_http_connections "
        wait_for(lambda: int(float(c.raw("GET", "/metrics")[2].decode().split(read)[1].split()[0])) >= 18)
        started = time.monotonic()
        assert c.stop() == 0
        took = time.monotonic() - started
        assert all(answer.result(20)["acknowledged"] for answer in parked)
    for stream in streams:
        with stream, stream.makefile("rb") as rest:
            assert rest.read().endswith(b"0\r\n\r\n"), "with its last chunk"
    assert took < STOP_LIMIT + 3
    for connection in (silent, half):
        with connection:
            assert connection.recv(1) == b""
    assert c.said().splitlines()[-1].endswith("stopped") and "Traceback" not in c.said()
    c.start()
    assert c.job(running["id"])["status"] == "running"


def test_sigint_ends_too(run):
    c = run()
    c.process.send_signal(signal.SIGINT)
    assert c.process.wait(20) == 0
    assert "Traceback" not in c.said()


def test_signals_count_from_the_moment_it_listens(run):
    """systemd sends a SIGHUP or a SIGTERM when it likes."""
    c = run()
    c.process.send_signal(signal.SIGHUP)
    c.says("is in force")
    assert c.stop() == 0
    for _ in range(2):
        c.start()
        assert c.stop() == 0


# One core


def test_all_threads_stay_on_one_core(run):
    c = run()
    agent = c.register()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        parked = pool.submit(c.beat, agent, wait=25)  # a thread of a connection
        wait_for(lambda: "deploybot_http_connections 2" in c.raw("GET", "/metrics")[2].decode())
        threads = [int(name) for name in os.listdir(f"/proc/{c.process.pid}/task")]
        cores = {frozenset(os.sched_getaffinity(thread)) for thread in threads}
        assert c.stop() == 0
        assert parked.result(20)["job"] is None
    assert len(threads) >= 2
    assert [len(some) for some in cores] == [1], cores


def test_it_stays_where_it_may_be(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 5})
    chosen = []
    monkeypatch.setattr("os.sched_setaffinity", lambda process, cores: chosen.append(cores))
    deploybot.stay_on_one_core()
    assert chosen in ([{3}], [{5}])


def test_a_sandbox_may_refuse_it(monkeypatch):
    def refuse(process, cores):
        raise PermissionError

    monkeypatch.setattr("os.sched_setaffinity", refuse)
    deploybot.stay_on_one_core()
    monkeypatch.delattr("os.sched_setaffinity")
    deploybot.stay_on_one_core()


# kill -9


class Load:
    """Threads that create, claim, log and end jobs, and remember what was acknowledged."""

    HOSTS = 3

    def __init__(self, c, seed):
        self.c, self.chance = c, random.Random(seed)
        self.lock = threading.Lock()
        self.created, self.lines, self.ended, self.given, self.failures = set(), {}, {}, [], []
        self.stopped = threading.Event()
        jobs = [(self.create, i) for i in range(2)] + [(self.work, i) for i in range(self.HOSTS)]
        self.threads = [threading.Thread(target=self.go, args=job, daemon=True) for job in jobs]
        for thread in self.threads:
            thread.start()

    def go(self, work, number):
        while not self.stopped.is_set():
            try:
                work(number)
            except (OSError, http.client.HTTPException):
                self.stopped.wait(0.01)  # it was killed: once more
            except Exception as error:
                self.failures.append(error)
                raise

    def ask(self, path, body):
        status, answer = self.c.call("POST", path, body)
        return answer if status < 300 else None

    def create(self, number):
        ref = f"r{number}-{len(self.created)}-{time.monotonic_ns()}"
        made = self.ask("/v1/jobs", {"repo": "o/n", "ref": ref, "host": f"web-{self.chance.randrange(self.HOSTS)}"})
        if made:
            with self.lock:
                self.created.add(made["job"]["id"])

    def work(self, number):
        agent = self.ask("/v1/agents/register", {"hostname": f"web-{number}"})
        held = []
        while agent and not self.stopped.is_set():
            try:
                body = {"status": "online", "running": held, "wait": 1, "session": agent["session"]}
                job = (self.ask(f"/v1/agents/{agent['id']}/heartbeat", body) or {}).get("job")
            except (OSError, http.client.HTTPException):
                continue
            if job:
                held = [{"job_id": job["id"], "attempt": job["attempt"]}]
                with self.lock:
                    self.given.append((job["id"], job["attempt"]))
                self.deploy(job)
                held = []

    def deploy(self, job):
        said, offset = [f"{job['id']} {i}" for i in range(12)], 0
        while offset < len(said) and not self.stopped.is_set():
            lines = [{"message": message} for message in said[offset : offset + 5]]
            with contextlib.suppress(OSError, http.client.HTTPException):
                body = {"attempt": job["attempt"], "offset": offset, "lines": lines}
                status, answer = self.c.call("POST", f"/v1/jobs/{job['id']}/logs", body)
                assert status in (200, 409), answer
                offset = answer["next_offset"]
                self.lines[job["id"]] = said[:offset]
        while not self.stopped.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.ask(f"/v1/jobs/{job['id']}/result", {"attempt": job["attempt"], "status": "success"}):
                    self.ended[job["id"]] = "success"
                    return

    def end(self):
        self.stopped.set()
        for thread in self.threads:
            thread.join(40)
            assert not thread.is_alive()
        assert self.failures == []


def test_kill_9_in_the_middle_of_everything(run):
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    c = run()
    load = Load(c, seed)
    for _ in range(5):
        enough = len(load.created) + chance.randrange(10, 40)
        ends = len(load.ended) + 2
        wait_for(lambda: len(load.created) >= enough and len(load.ended) >= ends, 40)  # noqa: B023
        c.kill()
        check_database(c, load)
        c.start()
    load.end()
    check_database(c, load)
    assert len(load.ended) >= 10
    assert len(load.given) == len(set(load.given)), "none was started twice"
    assert all(attempt == 1 for _, attempt in load.given)
    for job_id, status in load.ended.items():
        assert c.job(job_id)["status"] == status
    for job_id, said in load.lines.items():
        stored = [line["message"] for line in c.lines({"id": job_id})]
        assert stored[: len(said)] == said and len(stored) == len(set(stored)), "acknowledged: stored once, in order"
    assert "Traceback" not in c.said()


def check_database(c, load):
    """What was acknowledged up to now is in it, whatever else is; nothing runs twice."""
    with load.lock:
        created = set(load.created)
    with contextlib.closing(sqlite3.connect(c.db, timeout=20)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        stored = dict(db.execute("SELECT id, status FROM jobs"))
        assert created <= stored.keys()
        twice = "SELECT host, app, count(*) FROM jobs WHERE status = 'running' GROUP BY 1, 2 HAVING count(*) > 1"
        assert db.execute(twice).fetchall() == []
        ends = "SELECT job_id FROM events WHERE kind = 'job' AND data LIKE '%\"status\":\"success\"%'"
        ended = [row[0] for row in db.execute(ends)]
        assert len(ended) == len(set(ended)), "each ended once"


# SIGHUP


def test_sighup_reads_apps_yaml_again(run):
    c = run()
    assert [app["name"] for app in c.ok("GET", "/v1/apps")["apps"]] == ["app"]
    two = GOOD["apps"] + [{"name": "two", "repo": "o/two", "hosts": ["web-02"]}]
    c.apps_file.write_text(json.dumps({"apps": two}))
    c.process.send_signal(signal.SIGHUP)
    wait_for(lambda: len(c.ok("GET", "/v1/apps")["apps"]) == 2)
    c.says("2 apps")


@pytest.mark.parametrize("text, said", [
    ("apps:\n  - name: app\n    repo: nonsense\n    hosts: [web-01]\n", "apps.yaml:3: repo"),
    ("apps: [", "apps.yaml:"),
    ("[" * 100_000, "apps.yaml:"),
    ('{"apps": ' + "1" * 5000 + "}", "apps.yaml:"),
    ("apps: 2026-13-45\n", "apps.yaml:"),
    (None, "apps.yaml"),
])  # fmt: skip
def test_a_bad_apps_yaml_changes_nothing(run, text, said):
    c = run()
    c.says("listens")
    before = len(c.said())
    if text is None:
        c.apps_file.unlink()
    else:
        c.apps_file.write_text(text)
    c.process.send_signal(signal.SIGHUP)
    wait_for(lambda: said in c.said()[before:])
    status, answer = c.call("POST", "/v1/reload")
    assert (status, bool(answer.get("errors"))) == ((503, False) if text is None else (422, True))
    assert [app["name"] for app in c.ok("GET", "/v1/apps")["apps"]] == ["app"], "the mapping in force stays"
    assert "Traceback" not in c.said()


# Wrong use


def test_an_old_python_is_told(monkeypatch):
    """Before anything that it would not know: each program is copied onto machines of every age."""
    head = Path(deploybot.__file__).read_text().partition("\nVERSION = ")[0]
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or newer; this is 3\."):
        exec(head, {})


def test_every_wrong_setting_at_once(tmp_path):
    code, out, errors = deploybot_py(
        tmp_path, "--port", "99999", "--log-level", "LOUD", "--agent-timeout", "soon", log_format="xml", lost_after="-1",
        token="a", token_file="/b", read_token_file="/nonexistent",
    )  # fmt: skip
    assert code == 1 and out == ""
    told = ("--port", "--log-level", "--agent-timeout", "DEPLOYBOT_LOG_FORMAT", "DEPLOYBOT_LOST_AFTER",
            "DEPLOYBOT_TOKEN", "DEPLOYBOT_READ_TOKEN")  # fmt: skip
    assert len(errors) == len(told) and all(any(name in line for line in errors) for name in told), errors
    assert list(tmp_path.iterdir()) == [], "nothing was made"


def test_unknown_flags_and_help(tmp_path):
    code, _, errors = deploybot_py(tmp_path, "--prot", "8080")
    assert code == 2 and "--prot" in errors[-1]
    assert deploybot_py(tmp_path, "--por", "8080")[0] == 2, "no abbreviations"
    code, out, _ = deploybot_py(tmp_path, "--help")
    assert code == 0
    for option in deploybot.OPTIONS:
        assert f"--{option.name}" in out and option.variable in out.replace("\n", "")
    assert all("DEPLOYBOT_" + name.upper() in out for name in deploybot.SECRETS)
    assert deploybot_py(tmp_path, "--version")[:2] == (0, f"deploybot {deploybot.VERSION}\n")


def test_a_start_that_cannot_be_is_one_line(run, tmp_path):
    c = run()
    (tmp_path / "apps.yaml").write_text("{}")
    bad = tmp_path / "bad.yaml"
    bad.write_text("apps:\n- name: X Y\n")
    (tmp_path / "broken.db").write_bytes(b"not a database, really not" * 100)
    flags = ["--host", "127.0.0.1", "--apps", tmp_path / "apps.yaml"]
    for more, said in (
        (["--port", str(c.port), "--db", tmp_path / "other.db"], f"--port {c.port}"),
        (["--port", "0", "--db", c.db], "another deploybot.py"),
        (["--port", "0", "--db", tmp_path / "broken.db"], "broken.db"),
        (["--port", "0", "--db", bad / "x" / "deploybot.db"], "bad.yaml"),
    ):
        code, out, lines = deploybot_py(tmp_path, *flags, *more, open=True)
        errors = [line for line in lines if " WARNING " not in line]  # that a database is made
        assert (code, out, len(errors)) == (1, "", 1), lines
        assert errors[0].startswith("deploybot.py: ") and said in errors[0]
    code, _, errors = deploybot_py(tmp_path, *flags[:2], "--port", "0", "--db", tmp_path / "n.db", "--apps", bad, open=True)
    assert code == 1 and all(f"{bad}:2: " in line for line in errors) and len(errors) == 3
    assert c.ok("GET", "/health")["status"] == "ok", "the first one goes on"


def test_check_apps(tmp_path):
    (tmp_path / "good.yaml").write_text(json.dumps(GOOD))
    code, out, errors = deploybot_py(tmp_path, "check-apps", "good.yaml")
    assert (code, errors) == (0, []) and "app: myorg/app" in out and "web-01" in out and "1 app" in out
    (tmp_path / "bad.yaml").write_text("apps:\n  - name: a\n    repo: x\n    hosst: []\n")
    code, out, errors = deploybot_py(tmp_path, "check-apps", "bad.yaml")
    assert (code, out) == (1, "") and len(errors) == 3
    assert any("bad.yaml:4: hosst" in line and "did you mean hosts" in line for line in errors)
    assert deploybot_py(tmp_path, "check-apps", "none.yaml")[0] == 1
    assert deploybot_py(tmp_path, "check-apps")[0] == 2


# What it says


def test_json_logs(run):
    c = run("--log-format", "json")
    c.register()
    c.create()
    c.ok("POST", f"/v1/jobs/{c.create()['id']}/cancel")
    c.stop()
    records = [json.loads(line) for line in c.said().splitlines()]
    assert all({"time", "level", "message"} <= record.keys() for record in records)
    assert any("agent of web-01 registered" in record["message"] for record in records)
    assert records[-1]["message"] == "stopped"


def test_the_first_start_makes_a_token_and_the_second_finds_it(run):
    c = run(open=False)
    path = c.db.parent / "admin.token"
    token = path.read_text().strip()
    assert token.startswith("dbt_") and len(token) > 40 and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert c.said().count(str(path.name)) == 1 and token not in c.said()
    assert c.call("GET", "/v1/jobs")[0] == 401
    c.token = token
    assert c.call("GET", "/v1/jobs")[0] == 200
    c.stop()
    c.start()
    assert path.read_text().strip() == token
    assert c.call("GET", "/v1/jobs")[0] == 200


def test_no_log_line_and_no_answer_shows_a_secret(run, tmp_path):
    secrets = {**{name: f"{value}_hidden" for name, value in TOKENS.items()}, "webhook_secret": SECRET}
    spec = {**GOOD["apps"][0], "deploy": "deploy --key spec-hidden", "deploy_on_push": True}
    c = run("--log-level", "DEBUG", open=False, apps={"apps": [spec]}, **secrets)
    admin, agent_token = ({"Authorization": "Bearer " + secrets[name]} for name in ("token", "agent_token"))
    own = "own-hidden"
    register = {"hostname": "web-01", "token_sha256": deploybot.sha256(own)}
    answers = [c.call("POST", "/v1/agents/register", register, agent_token)]
    agent = answers[0][1]
    for headers in (admin, agent_token, {"Authorization": "Bearer guess-hidden"}, {"Authorization": "guess-hidden"}, {}):
        answers += [
            c.call(method, path, body, headers)
            for method, path, body in (
                ("GET", "/v1/apps", None), ("GET", "/v1/hosts", None), ("GET", "/health", None), ("POST", "/v1/reload", None),
                ("POST", "/v1/jobs", {"repo": "myorg/app", "ref": "main", "host": "web-01"}), ("GET", "/v1/jobs", None),
                ("POST", "/v1/jobs", b"{"), ("GET", "/nothing", None),
                ("POST", "/v1/webhooks/github", {"ref": 1}),
            )
        ]  # fmt: skip
    shown = json.dumps(answers)
    beat = c.call("POST", f"/v1/agents/{agent['id']}/heartbeat", {"status": "online"}, {"Authorization": f"Bearer {own}"})
    assert "spec-hidden" in json.dumps(beat), "its agent alone gets the commands"
    c.apps_file.write_text(json.dumps({"apps": [{**spec, "clone_url": "https://me:url-hidden@example.com/x.git"}]}))
    shown += json.dumps(c.call("POST", "/v1/reload", None, admin))
    c.process.send_signal(signal.SIGHUP)
    c.says("the mapping in force stays")
    c.stop()
    code, _, errors = deploybot_py(c.folder, "--port", "nonsense", **secrets)
    assert code == 1
    for text in (c.said(), shown, "\n".join(errors)):
        assert "hidden" not in text and SECRET not in text
