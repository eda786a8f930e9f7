"""ctl.py against a real controller, and against a scripted server where the controller would have to misbehave.

Most tests call `ctl.main` in this process; what only a process has (terminal, pipe, Ctrl-C) is tried on real ones.
Nothing sleeps to wait: an agent's heartbeat parks until there is a job, a reader reads until the line is there.
"""

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import ctl

CTL = Path(ctl.__file__)
LIMIT_S = 15  # a test that waits longer has failed
Result = namedtuple("Result", "code out err")

# ----------------------------------------------------------------------------------------------------------------------
# Running ctl


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch, tmp_path):
    """No setting of whoever runs the tests, and a folder without data/admin.token."""
    for name in list(os.environ):
        if (
            name.startswith(("DEPLOYBOT_", "PYTHON"))
            or name.lower().endswith("_proxy")
            or name in ("NO_COLOR", "COLUMNS", "SSL_CERT_FILE", "SSL_CERT_DIR")
        ):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def here(capsys):
    """Runs ctl in this process."""

    def run(*argv):
        code = ctl.main([str(one) for one in argv])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def run(controller, here, monkeypatch):
    """Runs ctl in this process, on the controller."""
    monkeypatch.setenv("DEPLOYBOT_URL", controller.url)
    if getattr(controller, "token", None):
        monkeypatch.setenv("DEPLOYBOT_TOKEN", controller.token)
    return here


@pytest.fixture
def start():
    """Starts ctl as a process of its own; what is still there at the end is killed."""
    processes = []

    def start(*argv, command=(str(CTL),), **options):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        processes.append(subprocess.Popen([sys.executable, *command, *argv], **options))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        for pipe in filter(None, (process.stdout, process.stderr)):
            pipe.close()


def json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# An agent of the tests


class Agent:
    """The four calls of an agent, made by hand."""

    def __init__(self, controller, hostname="web-01"):
        self.controller, self.hostname, self.offset = controller, hostname, 0
        self.id = self.call("POST", "/v1/agents/register", {"hostname": hostname, "capabilities": {}})["id"]

    def call(self, method, path, body=None):
        status, answer = self.controller.call(method, path, body)
        assert status < 300, answer
        return answer

    def take(self):
        """The next job of this host; waits for it."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            answer = self.call("POST", f"/v1/agents/{self.id}/heartbeat", {"status": "online", "wait": 5})
            if answer["job"]:
                self.offset = 0
                return answer["job"]
        raise AssertionError(f"no job for {self.hostname}")

    def log(self, job, *messages, level="info"):
        lines = [{"message": message, "level": level} for message in messages]
        body = {"attempt": job["attempt"], "offset": self.offset, "lines": lines}
        self.offset = self.call("POST", f"/v1/jobs/{job['id']}/logs", body)["next_offset"]

    def end(self, job, status="success", **result):
        self.call("POST", f"/v1/jobs/{job['id']}/result", {"attempt": job["attempt"], "status": status, **result})

    def work(self, *messages, status="success", **result):
        job = self.take()
        self.log(job, *messages)
        self.end(job, status, **result)

    def start(self, *messages, **result):
        """`work` in a thread, so that ctl can wait for it meanwhile."""
        thread = threading.Thread(target=self.work, args=messages, kwargs=result, daemon=True)
        thread.start()
        return thread


@pytest.fixture
def agent(controller):
    return Agent(controller)


def make(controller, ref="main", host="web-01", **more):
    status, answer = controller.call("POST", "/v1/jobs", {"repo": "myorg/web", "ref": ref, "host": host, **more})
    assert status == 201, answer
    return answer["job"]


FAILURE = {"status": "failed", "exit_code": 3, "error": "npm ci ended with 3", "reason": "exit_code"}
DEPLOY = ("deploy", "--repo", "myorg/web", "--ref", "main", "--host", "web-01")


def ended_job(controller, agent, *messages, ref="main", **result):
    job = make(controller, ref=ref, host=agent.hostname)
    agent.work(*messages, **result)
    return job


# ----------------------------------------------------------------------------------------------------------------------
# A server that does what it is told


class Scripted:
    """Answers each request with the next of `answers` (the last one for ever), and keeps the requests.

    An answer is (status, headers, body), or a function of the handler.
    """

    def __init__(self, *answers):
        self.answers, self.requests = list(answers), []
        script = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                script.requests.append(
                    (self.command, self.path, {name.lower(): value for name, value in self.headers.items()}, body)
                )
                step = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
                if callable(step):
                    return step(self)
                status, headers, text = step
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_POST = do_DELETE = answer

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def scripted():
    servers = []

    def make(*answers):
        servers.append(Scripted(*answers))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def as_json(status, document, **headers):
    return status, {"Content-Type": "application/json", **headers}, json.dumps(document)


def problem(status, detail, **more):
    return as_json(status, {"type": "about:blank", "title": "No", "status": status, "detail": detail, **more})


JOB = {
    "id": "0199c2f0-1111-7000-8000-000000000001", "repo": "myorg/web", "ref": "main", "host": "web-01", "app": "web", "status": "success",
    "reason": None, "hold": None, "metadata": {}, "attempt": 1, "retries": 0, "timeout": 3600, "created_at": "2026-11-23T13:13:37.123Z",
    "created_by": "admin", "started_at": "2026-11-23T13:13:38.000Z", "completed_at": "2026-11-23T13:15:43.000Z",
    "cancel_requested_at": None, "assigned_agent": None, "exit_code": 0, "error": None, "commit": "c0ffee" + "0" * 34,
    "rolled_back_to": None, "superseded_by": None, "retry_of": None, "deployment_id": None,
}  # fmt: skip


def frame(number, kind, data):
    return f"id: e-{number}\nevent: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def log_frame(number, message=None):
    where = {"position": number, "job_id": JOB["id"], "host": "web-01", "app": "web", "attempt": 1, "offset": number}
    return frame(number, "log", {**where, "message": message or f"line {number}", "level": "info", "timestamp": JOB["created_at"]})


END = frame(99, "end", {"job_id": JOB["id"], "status": "success"})


def events(*frames, then=None):
    """An event stream of `frames`; `then(handler)` runs before it breaks off."""

    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        handler.wfile.write(b"".join(frames))
        handler.wfile.flush()
        if then:
            then(handler)

    return answer


def reset(handler):
    """Ends the connection with RST."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


@pytest.fixture
def pauses(monkeypatch):
    """Pauses between connections take no time, and there are not many: their lengths."""
    pauses = []

    def sleep(length):
        pauses.append(length)
        assert len(pauses) < 20

    monkeypatch.setattr(ctl.Backoff.__init__, "__defaults__", (time.monotonic, sleep, lambda: 1))
    return pauses


@pytest.fixture
def at_once(pauses):
    """For tests to which their lengths are nothing."""


# ----------------------------------------------------------------------------------------------------------------------
# deploy, --wait, --follow


def test_deploy_makes_a_pending_job(run, controller, agent):
    result = run(*DEPLOY)
    assert result.code == 0
    header, row = result.out.splitlines()
    assert header.split()[:5] == ["JOB", "STATUS", "APP", "HOST", "REF"]
    job_id, *rest = row.split()
    assert rest[:4] == ["pending", "myorg--web", "web-01", "main"]
    assert len(job_id) == ctl.SHORT_ID
    assert len(controller.call("GET", f"/v1/jobs?id={job_id}")[1]["jobs"]) == 1


def test_deploy_json_is_one_document_with_what_was_asked(run, agent):
    more = ("--app", "site", "--timeout", "90", "--retries", "2", "--metadata", "ticket=OPS=7", "--metadata", "who=me")
    result = run(*DEPLOY, *more, "--json")
    (one,) = json.loads(result.out)["results"]
    assert one["created"] is True
    job = one["job"]
    assert (job["app"], job["timeout"], job["retries"]) == ("site", 90, 2)
    assert job["metadata"].items() >= {"ticket": "OPS=7", "who": "me"}.items()
    assert job["created_at"].endswith("Z")


def test_deploy_again_is_the_same_job_unless_forced(run, agent):
    first, second, third = (json.loads(run(*DEPLOY, "--json", *more).out)["results"][0] for more in ((), (), ("--force",)))
    assert second["job"]["id"] == first["job"]["id"] and second["created"] is False
    assert third["job"]["id"] != first["job"]["id"] and third["created"] is True
    assert "pending already" in run(*DEPLOY).err


def test_deploy_of_a_ref_that_runs_already_says_which_commit_that_is(run, controller, agent):
    make(controller)
    job = agent.take()
    words = "web-01: this deployment is running already, with main as it was at its start{}; --force deploys main as it is now\n"
    assert run(*DEPLOY).err == words.format("")
    body = {"attempt": 1, "offset": 0, "lines": [{"message": "x"}], "commit": "69c854d2" + "0" * 32}
    agent.call("POST", f"/v1/jobs/{job['id']}/logs", body)
    assert run(*DEPLOY).err == words.format(" (commit 69c854d2)")


def test_deploy_of_a_commit_that_runs_already_is_the_same_for_ever(run, controller, agent):
    sha = "a" * 40
    make(controller, ref=sha)
    agent.take()
    again = run("deploy", "--repo", "myorg/web", "--ref", sha, "--host", "web-01")
    assert again.err == "web-01: this deployment is running already, --force makes a new one\n"


def test_deploy_to_several_hosts_makes_a_job_each(run, controller):
    Agent(controller, "web-01"), Agent(controller, "web-02")
    result = run(*DEPLOY, "--host", "web-02", "--host", "web-01", "--json")
    assert [one["job"]["host"] for one in json.loads(result.out)["results"]] == ["web-01", "web-02"]


def test_a_refusal_among_several_hosts_tells_what_was_made(run, agent, controller):
    result = run(*DEPLOY, "--host", "not a host", "--host", "web-03")
    assert result.code == ctl.REFUSED
    assert "web-01" in result.out and "1 made before it go on" in result.err
    assert [job["host"] for job in controller.call("GET", "/v1/jobs")[1]["jobs"]] == ["web-01"]


def test_the_warning_of_an_unknown_host_goes_to_stderr(run, agent):
    result = run("deploy", "--repo", "myorg/web", "--ref", "main", "--host", "web-1", "--json")
    assert result.code == 0
    assert result.err.startswith("warning: ") and "web-1" in result.err
    json.loads(result.out)


def test_wait_is_quiet_and_prints_the_outcome(run, agent):
    thread = agent.start("building", commit="c0ffee" + "0" * 34)
    result = run(*DEPLOY, "--wait")
    thread.join()
    assert result.code == 0 and result.err == ""
    assert re.fullmatch(r"success: myorg--web on web-01, commit c0ffee00, took \w+\n", result.out)


def test_a_failed_deployment_ends_with_1_and_says_what_one_needs(run, agent):
    thread = agent.start("building", **FAILURE)
    result = run(*DEPLOY, "--wait")
    thread.join()
    assert result.code == ctl.FAILED
    assert "failed: myorg--web on web-01" in result.out
    assert "reason: exit_code" in result.out and "error: npm ci ended with 3" in result.out and "exit code: 3" in result.out
    command = re.search(r"log: ctl\.py (.*)", result.out)[1]
    assert run(*command.split()).out == "building\n"


def test_wait_json_is_one_document_with_the_ended_job(run, agent):
    thread = agent.start("building", **FAILURE)
    result = run(*DEPLOY, "--wait", "--json")
    thread.join()
    assert result.code == ctl.FAILED
    assert json.loads(result.out)["results"][0]["job"]["exit_code"] == 3


def test_follow_shows_the_log_then_the_outcome(run, agent):
    thread = agent.start("one", "two")
    result = run(*DEPLOY, "--follow")
    thread.join()
    assert result.code == 0
    assert result.out.splitlines()[:2] == ["one", "two"]
    assert result.out.splitlines()[2].startswith("success: myorg--web on web-01")


def test_follow_of_several_hosts_names_the_host_of_each_line(run, controller):
    threads = [Agent(controller, "web-01").start("a", "b"), Agent(controller, "web-02").start("c", **FAILURE)]
    result = run(*DEPLOY, "--host", "web-02", "--follow")
    for thread in threads:
        thread.join()
    lines = result.out.splitlines()
    assert result.code == ctl.FAILED
    assert [line for line in lines if line.startswith("web-01 | ")] == ["web-01 | a", "web-01 | b"]
    assert "web-02 | c" in lines
    assert any(line.startswith("success: myorg--web on web-01") for line in lines)
    assert any(line.startswith("failed: myorg--web on web-02") for line in lines)


def test_follow_json_is_an_object_a_line_and_ends_with_the_results(run, agent):
    thread = agent.start("one", "two")
    result = run(*DEPLOY, "--follow", "--json")
    thread.join()
    lines = json_lines(result.out)
    assert [line["data"]["message"] for line in lines if line["event"] == "log"] == ["one", "two"]
    assert lines[-1]["event"] == "results"
    assert lines[-1]["data"]["results"][0]["job"]["status"] == "success"


# ----------------------------------------------------------------------------------------------------------------------
# status, jobs, and how a job is named


def test_status_shows_a_job_by_the_start_of_its_id(run, controller, agent):
    job = ended_job(controller, agent, "x", **FAILURE)
    result = run("status", job["id"][:18].upper())
    assert result.code == 0
    assert re.search(r"^status +failed \(exit_code\)$", result.out, re.MULTILINE)
    assert re.search(r"^created +\w+ ago by ", result.out, re.MULTILINE)
    assert json.loads(run("status", job["id"], "--json").out)["job"]["id"] == job["id"]


def waits_for(run, job):
    found = re.search(r"^waits for +(.+)$", run("status", job["id"]).out, re.MULTILINE)
    return found and found[1]


def test_status_says_what_a_pending_job_waits_for(run, controller):
    job = make(controller)
    assert waits_for(run, job) == "no agent has registered as web-01"
    agent = Agent(controller)
    assert waits_for(run, job) is None
    run("hosts", "drain", "web-01")
    assert waits_for(run, job) == "web-01 is drained (ctl.py hosts resume web-01)"
    assert f"(ctl.py hosts resume web-01 --url {controller.url})\n" in run("status", job["id"], "--url", controller.url).out
    assert json.loads(run("status", job["id"], "--json").out).keys() == {"job"}
    run("hosts", "resume", "web-01")
    agent.take()
    assert waits_for(run, job) is None
    others = [make(controller, ref=ref) for ref in "abc"]
    assert waits_for(run, others[1]) == "web-01 runs 1 job, 3 wait there"


def test_a_host_that_is_offline_is_waited_for(monkeypatch):
    host = {"hostname": "web-01", "agent_status": "offline", "last_seen": JOB["created_at"], "drained": True}
    host |= {"running": 2, "pending": 1}
    monkeypatch.setattr(time, "time", lambda: ctl.seconds(JOB["created_at"]) + 310)
    client = ctl.Client("http://h", None, "")
    assert ctl.why_waits(client, host) == "web-01 is offline since 5m: is its agent running?"
    online = {**host, "agent_status": "online", "drained": False}
    assert ctl.why_waits(client, online) == "web-01 runs 2 jobs, 1 waits there"
    assert ctl.why_waits(client, {**online, "pending": 0}) is None, "it has taken the job meanwhile"


HOSTS = {
    "hosts": [{"hostname": "web-01", "agent_status": "unknown", "last_seen": None, "drained": False, "running": 0, "pending": 1}],
    "next": None,
}
PENDING = {**JOB, "status": "pending", "attempt": 0, "started_at": None, "completed_at": None}


@pytest.mark.parametrize("option", ["--wait", "--follow"])
def test_who_waits_is_told_once_what_for(here, scripted, option):
    made, job = as_json(201, {"job": PENDING, "created": True}), as_json(200, {"job": PENDING})
    server = scripted(made, as_json(200, HOSTS), job, events(END), as_json(200, {"job": JOB}))
    result = here(*DEPLOY, option, "--url", server.url)
    assert (result.code, result.err) == (0, "waits for: no agent has registered as web-01\n")


@pytest.mark.parametrize("verb", [("follow",), ("logs", "-f", "--job")])
@pytest.mark.parametrize("options, said", [((), "waits for: no agent has registered as web-01\n"), (("--json",), "")])
def test_who_follows_a_job_is_told_once_what_it_waits_for(here, scripted, verb, options, said):
    job, ended = as_json(200, {"job": PENDING}), as_json(200, {"job": JOB})
    server = scripted(job, events(END), *(() if options else (as_json(200, HOSTS), job)), ended)
    result = here(*verb, JOB["id"], *options, "--url", server.url)
    assert (result.code, result.err) == (0, said)
    assert "stream" in server.requests[1][1], "not before the stream is open: it may end meanwhile"


def test_what_a_job_waited_for_is_not_told_late_or_twice_or_to_programs(here, scripted):
    made, job = {"job": PENDING, "created": True}, as_json(200, {"job": JOB})
    taken = scripted(as_json(201, made), as_json(200, HOSTS), job, events(END), job)
    assert here(*DEPLOY, "--wait", "--url", taken.url).err == ""
    warned = as_json(201, {**made, "warning": "no agent has registered as web-01 (web-02?)"})
    server = scripted(warned, as_json(200, HOSTS), events(END), job)
    assert here(*DEPLOY, "--wait", "--url", server.url).err.count("\n") == 1
    program = scripted(as_json(201, made), events(END), job)
    assert here(*DEPLOY, "--wait", "--json", "--url", program.url).err == ""


@pytest.mark.parametrize("after", [(), (as_json(200, HOSTS),)])
def test_that_nobody_knows_what_a_job_waits_for_keeps_nothing_up(here, scripted, after):
    busy, job = (503, {}, ""), as_json(200, {"job": JOB})
    server = scripted(as_json(201, {"job": PENDING, "created": True}), *after, busy, events(END), job)
    result = here(*DEPLOY, "--wait", "--url", server.url)
    assert (result.code, result.err) == (0, "")


def common_start(one, other):
    return one[: next(i for i in range(36) if one[i] != other[i])]


def test_an_ambiguous_start_lists_the_candidates(run, controller):
    first, second = make(controller, "a"), make(controller, "b")
    result = run("cancel", common_start(first["id"], second["id"]))
    assert result.code == ctl.WRONG_USE
    said, *candidates = result.err.splitlines()
    assert f" is the start of 2 ids ({controller.url}), give more of one:" in said
    ids = [re.fullmatch(r"(\S{36})  myorg--web on web-01, \d+s ago", line)[1] for line in candidates]
    assert ids == [second["id"], first["id"]]
    assert controller.call("GET", f"/v1/jobs/{first['id']}")[1]["job"]["status"] == "pending"


@pytest.mark.parametrize("name", ["ffffffff", "ffffffff-ffff-7fff-8fff-ffffffffffff"])
@pytest.mark.parametrize("verb", ["status", "cancel", "retry"])
def test_a_job_that_is_not_there_is_refused(run, controller, verb, name):
    make(controller)
    result = run(verb, name)
    assert result.code == ctl.REFUSED
    assert controller.url in result.err and result.err.count("\n") == 1 and result.out == ""
    assert "limit=" not in result.err


@pytest.mark.parametrize("name", ["", "../hosts", "xyz", "0" * 37])
def test_what_cannot_start_an_id_is_wrong_use(run, name):
    assert run("status", name).code == ctl.WRONG_USE


def test_jobs_are_listed_newest_first_and_filtered(run, controller, agent):
    ended_job(controller, agent, "x", ref="old", **FAILURE)
    make(controller, "new")
    make(controller, "other", host="web-02", app="api")

    def refs(*argv):
        return [job["ref"] for job in json.loads(run("jobs", "--json", *argv).out)["jobs"]]

    assert refs() == ["other", "new", "old"]
    assert refs("--status", "failed") == ["old"]
    assert refs("--host", "web-02") == refs("--app", "api") == ["other"]
    assert refs("--repo", "myorg/none") == []
    assert refs("--limit", "1") == ["other"]


def test_jobs_as_a_table(run, controller, agent):
    job = ended_job(controller, agent, "x", ref="a" * 40, **FAILURE)
    header, row = run("jobs").out.splitlines()
    assert header.split() == ["JOB", "STATUS", "APP", "HOST", "REF", "COMMIT", "CREATED", "TOOK", "REASON"]
    cells = re.split(r"  +", row)
    assert cells[:6] == [job["id"][:13], "failed", "myorg--web", "web-01", "a" * 8, "-"]
    assert cells[6].endswith("s ago") and cells[8] == "exit_code"


def test_jobs_beyond_a_page_are_fetched_page_by_page(run, controller, monkeypatch):
    monkeypatch.setattr(ctl, "PAGE_JOBS", 2)
    made = [make(controller, f"r{number}")["id"] for number in range(5)]
    listed = json.loads(run("jobs", "--limit", "5", "--json").out)
    assert [job["id"] for job in listed["jobs"]] == made[::-1]
    assert "older" not in run("jobs", "--limit", "5").err
    assert "--limit 30" in run("jobs", "--limit", "3").err


def test_no_jobs_says_how_to_make_one(run):
    result = run("jobs")
    assert (result.code, result.out) == (0, "") and "ctl.py deploy" in result.err


# ----------------------------------------------------------------------------------------------------------------------
# logs


def test_logs_of_a_job_come_page_by_page(run, controller, agent, monkeypatch):
    monkeypatch.setattr(ctl, "PAGE_LINES", 2)
    job = ended_job(controller, agent, "1", "2", "3", "4", "5")
    assert run("logs", "--job", job["id"][:20]).out.split() == ["1", "2", "3", "4", "5"]
    assert run("logs", "--job", job["id"], "--tail", "3").out.split() == ["3", "4", "5"]
    assert run("logs", "--job", job["id"], "--tail", "0").out == ""
    lines = json.loads(run("logs", "--job", job["id"], "--json").out)["lines"]
    assert [(line["message"], line["offset"], line["host"]) for line in lines] == [(str(n + 1), n, "web-01") for n in range(5)]


def test_timestamps_stand_before_the_lines(run, controller, agent):
    make(controller)
    job = agent.take()
    lines = [{"message": f"line {n}", "timestamp": f"2026-11-23T13:13:37.13{n}Z"} for n in (1, 2)]
    agent.call("POST", f"/v1/jobs/{job['id']}/logs", {"attempt": job["attempt"], "offset": 0, "lines": lines})
    told = [f"{line['timestamp']} {line['message']}" for line in lines]
    assert run("logs", "-t", "--job", job["id"]).out.splitlines() == told
    assert run("logs", "--timestamps").out.splitlines()[0] == "2026-11-23T13:13:37.131Z web-01 myorg--web | line 1"


def test_logs_without_a_job_are_the_last_lines_of_the_newest_jobs(run, controller, agent):
    ended_job(controller, agent, "a1", "a2", ref="a")
    ended_job(controller, Agent(controller, "web-02"), "b1", ref="b")
    ended_job(controller, agent, "c1", "c2", ref="c")
    make(controller, "d")
    every = ["web-01 myorg--web | a2", "web-02 myorg--web | b1", "web-01 myorg--web | c1", "web-01 myorg--web | c2"]
    assert run("logs", "--tail", "4").out.splitlines() == every
    told = [line.partition(" of job ")[0] for line in run("logs", "--tail", "4").err.splitlines()]
    assert told == [f"-- myorg--web on {host}: success (attempt 1" for host in ("web-01", "web-02", "web-01")]
    alone = run("logs", "--host", "web-02")
    assert (alone.out, alone.err) == ("myorg--web | b1\n", "")
    assert run("logs", "--host", "web-01", "--app", "myorg--web", "--tail", "3").out.split() == ["a2", "c1", "c2"]
    assert json.loads(run("logs", "--tail", "1", "--json").out)["lines"][0]["message"] == "c2"


def test_logs_f_of_a_job_ends_with_it(run, controller, agent):
    job = ended_job(controller, agent, "1", "2", "3", **FAILURE)
    result = run("logs", "-f", "--job", job["id"], "--tail", "2")
    assert result.code == ctl.FAILED
    assert result.out.splitlines()[:2] == ["2", "3"] and result.out.splitlines()[2].startswith("failed: ")
    lines = json_lines(run("logs", "-f", "--job", job["id"], "--json").out)
    assert [line["data"]["message"] for line in lines if line["event"] == "log"] == ["1", "2", "3"]
    assert lines[-1] == {"event": "end", "data": {"job_id": job["id"], "status": "failed"}}


def test_logs_f_of_a_host_shows_what_comes_and_only_that_host(controller, agent, start, run):
    make(controller)
    job = agent.take()
    agent.log(job, "before")
    process = start("logs", "-f", "--host", "web-01", env=dict(os.environ))
    assert process.stdout.readline() == "myorg--web | before\n"
    ended_job(controller, Agent(controller, "web-02"), "elsewhere")
    agent.log(job, "after")
    assert process.stdout.readline() == "myorg--web | after\n"
    agent.end(job)
    for line in process.stderr:
        if "success" in line:
            assert line.startswith("-- myorg--web on web-01: success")
            break


def test_logs_of_an_app_or_host_that_is_not_there_say_so(run, controller, agent):
    controller.set_app(name="shop", repo="myorg/shop", hosts=["web-02"])
    for argv, name in ((("--app", "shpo"), "shop"), (("--host", "web-1"), "web-01"), (("--host", "web-2"), "web-02")):
        told = run("logs", *argv)
        assert (told.code, told.out, told.err) == (0, "", run("jobs", *argv).err) and told.err.endswith(f"; did you mean {name}?\n")
        told = run("logs", "-f", *argv)
        said = f"ctl.py: no {argv[0][2:]} is called {argv[1]} at {controller.url}; did you mean {name}?\n"
        assert told == (ctl.REFUSED, "", said), "it would be followed for ever"
    assert run("logs", "--app", "shop").err.startswith("no such jobs at ")
    assert run("logs", "-f", "--app", "zzz").err.endswith(": `ctl.py apps` lists them\n")
    assert json.loads(run("logs", "--app", "shpo", "--json").out) == {"lines": []}


@pytest.mark.parametrize("argv", [("--app", "shop"), ("--app", "myorg--web"), ("--host", "web-09"), ("--host", "web-02")])
def test_an_app_or_host_that_has_jobs_or_stands_in_the_apps_is_followed(run, controller, argv, monkeypatch):
    controller.set_app(name="shop", repo="myorg/shop", hosts=["web-02"])
    controller.ok("POST", f"/v1/jobs/{make(controller, host='web-09')['id']}/cancel")
    assert [one["hostname"] for one in controller.ok("GET", "/v1/hosts")["hosts"]] == [], "what is known of web-09 is its job"
    monkeypatch.setattr(ctl, "Stream", lambda *given, **more: [ctl.Event("opened", None)])
    assert run("logs", "-f", *argv) == (0, "", "")


EVIL = "red \x1b[31mtext\x1b[0m \x1b]0;title\x07 \x9b2J a\tb \x08\x00\u202egnp.exe \x1b]8;;http://evil\x1b\\link"


def test_control_characters_are_stripped_unless_raw(run, controller, agent):
    job = ended_job(controller, agent, EVIL)
    assert run("logs", "--job", job["id"]).out == "red text  2J a\tb gnp.exe link\n"
    assert run("logs", "--job", job["id"], "--raw").out == EVIL + "\n"
    followed = run("logs", "-f", "--job", job["id"]).out + run("logs").out
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", followed) and "gnp.exe" in followed
    assert "\x1b" not in run("logs", "--job", job["id"], "--json").out


def test_control_characters_of_every_other_answer_are_stripped(here, scripted, monkeypatch):
    evil = {name: "x\x1b[2J\r\ny" if isinstance(value, str) and not name.endswith("_at") else value for name, value in JOB.items()}
    evil |= {"status": "failed\x1b[2J", "id": JOB["id"], "metadata": {"k\x1b[2J": "v\x07"}}
    host = {
        "hostname": "h\x1b[2J",
        "agent_status": "online",
        "last_seen": None,
        "running": 0,
        "pending": 0,
        "slots": 1,
        "drained": False,
    }
    app = {"name": "a\x07", "repo": "r\x1b", "hosts": [], "deploy_on_push": True, "branches": ["m\x9bain"]}
    document = {"job": evil, "jobs": [evil], "next": None, "hosts": [host], "apps": [app], "message": "m\x1b[2J", "created": True}
    document |= {"status": "ok\x07", "version": "1\x07", "database": "ok\x07", "uptime": 1, "warning": "w\x1b[2J"}
    server = scripted(as_json(200, document))
    monkeypatch.setenv("DEPLOYBOT_URL", server.url)
    verbs = (
        ["status", JOB["id"]],
        ["jobs"],
        ["hosts"],
        ["apps"],
        ["cancel", JOB["id"]],
        ["retry", JOB["id"]],
        ["reload"],
        ["health"],
    )
    for argv in (*verbs, [*DEPLOY]):
        result = here(*argv)
        assert result.code == 0, result
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", result.out + result.err), argv
    refused = scripted(problem(409, "no\x1b[2J\nway"))
    result = here("jobs", "--url", refused.url)
    assert result.err.count("\n") == 1 and "\x1b" not in result.err


# ----------------------------------------------------------------------------------------------------------------------
# hosts, apps, cancel, retry, reload, health


def test_hosts_and_apps_are_shown_whole_whatever_a_page_holds(run, controller, monkeypatch):
    """An app that goes over several pages is one."""
    names = [f"web-{number:02}" for number in range(7)]
    for name in names:
        make(controller, host=name)
    apps = [{"name": name, "repo": f"o/{name}", "hosts": names[:count]} for name, count in (("web", 5), ("api", 2), ("db", 1))]
    controller.apps_file.write_text(json.dumps({"apps": apps}))
    controller.ok("POST", "/v1/reload")
    whole = [json.loads(run(verb, "--json").out) for verb in ("hosts", "apps")]
    assert [host["hostname"] for host in whole[0]["hosts"]] == names
    assert [(app["name"], len(app["hosts"])) for app in whole[1]["apps"]] == [("api", 2), ("db", 1), ("web", 5)]
    for size in (1, 2, 7, 8):
        monkeypatch.setattr(ctl, "PAGE_NAMES", size)
        assert [json.loads(run(verb, "--json").out) for verb in ("hosts", "apps")] == whole, size


def test_hosts_and_what_is_done_to_them(run, controller, agent):
    make(controller)
    make(controller, host="web-09")
    header, *rows = run("hosts").out.splitlines()
    assert header.split() == ["HOST", "AGENT", "LAST", "SEEN", "RUNNING", "PENDING", "SLOTS"]
    cells = {row.split()[0]: re.split(r"  +", row) for row in rows}
    assert cells["web-01"][1] == "online" and cells["web-01"][2].endswith(" ago") and cells["web-01"][3:5] == ["0", "1"]
    assert cells["web-09"][1:3] == ["unknown", "-"]
    assert run("hosts", "drain", "web-01") == (0, "web-01 drained: it gets no new job\n", "")
    assert re.search(r"^web-01 .* drained$", run("hosts").out, re.MULTILINE)
    controller.register("web-01", capabilities={"agent": "0.0.9"})
    assert re.search(r"^web-01 .* drained, behind: 0.0.9$", run("hosts").out, re.MULTILINE)
    assert json.loads(run("hosts", "resume", "web-01", "--json").out)["host"]["drained"] is False
    assert json.loads(run("hosts", "remove", "web-01", "--json").out) == {"hostname": "web-01", "removed": True}
    assert run("hosts", "remove", "web-01").code == ctl.REFUSED
    assert {host["hostname"]: host["agent_id"] for host in json.loads(run("hosts", "--json").out)["hosts"]}["web-01"] is None


def test_a_host_with_a_running_job_is_not_removed(run, controller, agent):
    make(controller)
    agent.take()
    result = run("hosts", "remove", "web-01")
    assert result.code == ctl.REFUSED and "409" in result.err and controller.url in result.err


def test_what_help_says_of_a_running_job_is_so(run, controller, agent):
    """A drained or reset host's goes on, and a host is not removed below one; that removal forgets the drain, and a reset does not."""
    job = make(controller)
    agent.take()
    make(controller, "b")
    assert run("hosts", "drain", "web-01").code == run("hosts", "reset", "web-01").code == 0
    assert run("hosts", "remove", "web-01").code == ctl.REFUSED
    host = controller.ok("GET", "/v1/hosts")["hosts"][0]
    assert (host["drained"], host["running"], host["pending"]) == (True, 1, 1)
    assert controller.ok("GET", f"/v1/jobs/{job['id']}")["job"]["status"] == "running"
    agent = Agent(controller)
    agent.end({**job, "attempt": 1})
    assert run("hosts", "remove", "web-01").code == 0
    Agent(controller)
    host = controller.ok("GET", "/v1/hosts")["hosts"][0]
    assert (host["drained"], host["running"], host["pending"]) == (False, 0, 1)


def test_no_hosts_says_what_to_run(run):
    assert "agent.py" in run("hosts").err


def test_cancel(run, controller, agent):
    pending, running = make(controller, "a", host="web-02"), make(controller, "b")
    agent.take()
    result = run("cancel", pending["id"])
    assert result.code == 0 and result.out.startswith("cancelled: ")
    result = run("cancel", running["id"])
    assert result.code == 0 and result.out.startswith("cancel asked for: the agent of web-01")
    assert "cancel asked for" in run("status", running["id"]).out
    agent.end({**running, "attempt": 1}, "failed", exit_code=1)
    result = run("cancel", running["id"])
    assert result.code == ctl.REFUSED and "failed" in result.err


def test_a_cancelled_job_is_called_so_once(run, controller, agent):
    pending, running = make(controller, "a", host="web-02"), make(controller, "b")
    assert run("cancel", pending["id"]).out.splitlines()[0] == "cancelled: myorg--web on web-02"
    agent.end(agent.take(), "cancelled", error="cancelled", reason="cancelled")
    shown = run("logs", "-f", "--job", running["id"])
    assert re.fullmatch(r"cancelled: myorg--web on web-01, took \w+\n  log: .+\n", shown.out)
    assert [line.count("cancelled") for line in shown.err.splitlines() if "cancelled" in line] == [1]
    for job in (pending, running):
        assert run("status", job["id"]).out.count("cancelled") == 1
    assert [row.count("cancelled") for row in run("jobs").out.splitlines()] == [0, 1, 1]


def test_what_is_said_beyond_cancelled_is_shown(here, scripted):
    job = {**JOB, "status": "cancelled", "reason": "cancelled", "error": "the agent was stopped"}
    server = scripted(as_json(200, {"job": job}))
    for verb in ("status", "cancel"):
        assert "the agent was stopped" in here(verb, JOB["id"], "--url", server.url).out
    named = scripted(as_json(200, {"job": {**JOB, "app": "success", "ref": "success", "host": "success"}}))
    assert len(re.findall(" success$", here("status", JOB["id"], "--url", named.url).out, re.MULTILINE)) == 4


def test_retry_is_a_new_job_of_an_ended_one(run, controller, agent):
    old = ended_job(controller, agent, "x", **FAILURE)
    thread = agent.start("again")
    result = run("retry", old["id"][:20], "--wait")
    thread.join()
    assert result.code == 0 and result.out.startswith("success: ")
    new = json.loads(run("jobs", "--limit", "1", "--json").out)["jobs"][0]
    assert new["retry_of"] == old["id"]
    pending = make(controller, "pending")
    result = run("retry", pending["id"])
    assert result.code == ctl.REFUSED and "409" in result.err


def test_health(run, controller):
    result = run("health")
    assert result.code == 0
    assert re.search(r"^status +ok$", result.out, re.MULTILINE) and controller.url in result.out
    assert json.loads(run("health", "--json").out)["version"] == ctl.VERSION


def test_a_sick_controller_is_shown_and_ends_with_3(here, scripted):
    sick = {"status": "error", "version": "0.1.0", "uptime": 90061, "database": "disk I/O error"}
    server = scripted(as_json(503, sick))
    result = here("health", "--url", server.url)
    assert result.code == ctl.NOT_REACHED
    assert "1d1h" in result.out and "disk I/O error" in result.err
    assert json.loads(here("health", "--json", "--url", server.url).out) == sick


def test_apps_as_a_table_with_a_row_a_host(here, scripted):
    ran = {"hostname": "web-01", "commit": "c0ffee" + "0" * 34, "job_id": JOB["id"], "deployed_at": JOB["completed_at"]}
    never = {"hostname": "web-02", "commit": None, "job_id": None, "deployed_at": None}
    apps = [
        {"name": "web", "repo": "myorg/web", "hosts": [ran, never], "deploy_on_push": True, "branches": ["main", "release/*"]},
        {"name": "api", "repo": "myorg/api", "hosts": [], "deploy_on_push": False, "branches": None},
    ]
    server = scripted(as_json(200, {"apps": apps, "next": None}))
    rows = [re.split(r"  +", row) for row in here("apps", "--url", server.url).out.splitlines()]
    assert rows[0] == ["APP", "REPO", "HOST", "WANTED", "ACTUAL", "DEPLOYED", "JOB", "ON PUSH", "STRATEGY"]
    assert rows[1][:5] == ["web", "myorg/web", "web-01", "-", "(c0ffee00)"] and rows[1][6:] == [
        "0199c2f0-1111",
        "main, release/*",
        "-",
    ]
    assert rows[2][1:] == ["web-02", "-", "-", "-", "-"]
    assert rows[3] == ["api", "myorg/api", "-", "-", "-", "-", "-", "-", "-"]


def test_reload_takes_a_good_file_and_refuses_a_wrong_one_with_its_line(run, controller):
    app = {"name": "web", "repo": "myorg/web", "hosts": ["web-01"], "deploy_on_push": True}
    controller.apps_file.write_text(json.dumps({"apps": [app]}))
    result = run("reload")
    assert result.code == 0 and result.out.endswith(", apps: 1\n")
    assert json.loads(run("reload", "--json").out)["apps"] == 1
    assert [one["name"] for one in json.loads(run("apps", "--json").out)["apps"]] == ["web"]
    assert re.search(r"^web +myorg/web +web-01 +- .* default branch +all hosts at once$", run("apps").out, re.MULTILINE)
    controller.apps_file.write_text('{"apps": [\n {"name": "web", "repo": "no repo", "hosts": ["web-01"],\n "no": 1}\n]}')
    result = run("reload")
    assert (result.code, result.out) == (ctl.REFUSED, "")
    first, *mistakes = result.err.splitlines()
    assert first == f"ctl.py: the mapping in force at {controller.url} stays, apps.yaml is wrong:"
    assert len(mistakes) == 2 and all(re.match(r"line \d: \w+: ", line) for line in mistakes)
    assert [one["name"] for one in json.loads(run("apps", "--json").out)["apps"]] == ["web"]


def test_a_mistake_of_the_mapping_is_a_line_without_controls(here, scripted):
    wrong = problem(422, "no", errors=[{"field": "line 3", "message": "a\x1b[2J\nb"}, {"field": "line 9", "message": "c"}])
    assert here("reload", "--url", scripted(wrong).url).err.splitlines()[1:] == ["line 3: a b", "line 9: c"]


def test_apps_of_a_controller_without_any(run):
    result = run("apps")
    assert result.code == 0 and "reload" in result.err
    assert json.loads(run("apps", "--json").out) == {"apps": []}


# ----------------------------------------------------------------------------------------------------------------------
# Exit codes and error lines


@pytest.mark.parametrize(
    "argv",
    [
        [], ["nonsense"], ["deploy"], ["deploy", "--repo", "a/b"], ["deploy", "--rep", "a/b", "--ref", "m", "--host", "h"],
        [*DEPLOY, "--timeout", "0"], [*DEPLOY, "--retries", "-1"], [*DEPLOY, "--metadata", "novalue"], ["jobs", "--status", "done"],
        ["jobs", "--limit", "0"], ["status"], ["hosts", "drain"], ["hosts", "explode", "web-01"], ["logs", "--job", "01", "--host", "h"],
        ["logs", "-f", "--tail", "1001"], ["jobs", "--url", "ftp://example.com"], ["jobs", "--url", "http://me:secret@example.com"],
        ["jobs", "--url", "http://example.com:99999"], ["jobs", "--url", "file:///etc/passwd"], ["jobs", "--url", "http://h/?token=secret"],
        ["jobs", "--url", "http://h\r\nX: y/"], ["token"], ["token", "make"], ["token", "create"], ["token", "create", "--role", "root"],
        ["token", "create", "--role", "viewer", "--expires", "59s"], ["token", "create", "--role", "viewer", "--expires", "3651d"],
        ["token", "revoke"], ["token", "list", "ci"], ["hosts", "reset"], ["whoami", "me"], ["audit", "--limit", "0"],
    ],
)  # fmt: skip
def test_wrong_use_is_2_in_one_line(here, argv):
    result = here(*argv)
    assert (result.code, result.out) == (ctl.WRONG_USE, "")
    assert result.err.startswith("ctl.py: ") and result.err.count("\n") == 1
    assert "secret" not in result.err


@pytest.mark.parametrize(
    ("text", "length"),
    [("30s", 30), ("5m", 300), ("2h", 7200), ("1d", 86400), ("90", 90), ("1", 1), ("7d", 604800), ("604800", 604800)],
)
def test_a_timeout_has_a_unit_or_is_in_seconds(run, controller, text, length):
    assert json.loads(run(*DEPLOY, "--timeout", text, "--json").out)["results"][0]["job"]["timeout"] == length


@pytest.mark.parametrize("text", ["0", "0m", "8d", "604801", "1.5m", "5 m", "5M", "200ms", "1h30m", "-5", "m", "", "٣"])
def test_a_timeout_that_is_none_says_how_to_write_one(here, text):
    result = here(*DEPLOY, f"--timeout={text}")
    assert result.code == ctl.WRONG_USE and "write 30s, 5m, 2h, 1d or plain seconds" in result.err


@pytest.mark.parametrize("path", ["/v1/", "/docs", "/v1/jobs?"])
def test_a_url_takes_no_path(here, monkeypatch, path):
    refused = "takes no path: http://localhost:18090\n"
    assert here("jobs", "--url", "http://localhost:18090" + path) == (ctl.WRONG_USE, "", f"ctl.py: --url {refused}")
    monkeypatch.setenv("DEPLOYBOT_URL", "http://localhost:18090" + path)
    assert here("jobs").err == f"ctl.py: DEPLOYBOT_URL {refused}"


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1//", "http://h:1?", "http://h:1/#"])
def test_what_is_empty_behind_the_host_is_left_out(url):
    assert ctl.read_url(url) == "http://h:1"


def test_https_to_a_plain_port_says_to_try_http(run, controller):
    result = run("jobs", "--url", controller.url.replace("http", "https"))
    assert (result.code, result.out) == (ctl.NOT_REACHED, "")
    assert result.err.endswith(f": it speaks http there: try {controller.url}\n") and "SSL" not in result.err


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("argv", [["jobs"], ["status", "01"], [*DEPLOY], ["logs", "-f"], ["health"], ["hosts", "drain", "h"]])
def test_a_controller_that_is_not_there_is_3_and_named(here, argv, monkeypatch):
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("DEPLOYBOT_URL", url)
    result = here(*argv)
    assert (result.code, result.out) == (ctl.NOT_REACHED, "")
    assert url in result.err and "refused" in result.err and "DEPLOYBOT_URL" in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize(
    "answer",
    [
        as_json(500, {"detail": "no"}), as_json(502, {}), (200, {}, "<html>"), (200, {}, "[]"), (200, {}, '{"unexpected": 1}'), (200, {}, ""),
        (200, {}, "[" * 100_000), (200, {"Content-Length": "100"}, "{"), reset, (302, {"Location": "/login"}, ""), (503, {}, "busy"),
    ],
)  # fmt: skip
def test_an_answer_that_is_no_controllers_is_3(here, scripted, answer):
    server = scripted(answer)
    result = here("jobs", "--url", server.url)
    assert result.code == ctl.NOT_REACHED
    assert server.url in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 413, 422, 429])
def test_a_refusal_is_4_and_says_why(here, scripted, status):
    server = scripted(problem(status, "because of this"))
    result = here(*DEPLOY, "--url", server.url)
    assert (result.code, result.out) == (ctl.REFUSED, "")
    assert result.err.startswith("ctl.py: because of this: ") and result.err.count("\n") == 1
    assert result.err.endswith(f" ({status} from POST {server.url}/v1/jobs)\n")


def test_an_answer_that_asks_is_not_followed_by_a_colon(here, scripted):
    server = scripted(problem(404, "apps.yaml has no app helo; did you mean hello?"))
    said = here(*DEPLOY, "--url", server.url).err
    assert said.startswith("ctl.py: apps.yaml has no app helo; did you mean hello? `"), said


@pytest.mark.parametrize(
    "called, path, expected",
    [
        ("./ctl.py", "/usr/bin", "./ctl.py"),
        ("ctl.py", "/usr/bin", "./ctl.py"),
        ("plain/ctl.py", "/usr/bin", "python3 plain/ctl.py"),
        ("{here}/ctl.py", "/usr/bin", "{here}/ctl.py"),
        ("{here}/ctl.py", "{here}", "ctl.py"),
        ("/opt/bin/deploybot-ctl", "{here}", "deploybot-ctl"),
        ("/usr/bin/pytest", "/usr/bin", "ctl.py"),
        ("-c", "/usr/bin", "ctl.py"),
    ],
)
def test_a_hint_can_be_copied(monkeypatch, tmp_path, called, path, expected):
    (tmp_path / "plain").mkdir()
    for name, mode in (("ctl.py", 0o755), ("deploybot-ctl", 0o755), ("plain/ctl.py", 0o644)):
        (tmp_path / name).touch(mode)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", path.format(here=tmp_path))
    monkeypatch.setattr(sys, "argv", [called.format(here=tmp_path)])
    client = ctl.Client("http://h", None, "")
    assert client.command("apps") == f"{expected.format(here=tmp_path)} apps"


def test_the_real_controller_names_each_wrong_field(run, controller):
    result = run("deploy", "--repo", "no repo", "--ref=-x", "--host", "bad host")
    assert result.code == ctl.REFUSED
    assert f"422 from POST {controller.url}/v1/jobs" in result.err and result.err.count("\n") == 1
    for field in ("repo: ", "ref: ", "host: "):
        assert field in result.err


def test_a_refusal_says_when_to_come_back(here, scripted):
    server = scripted((429, {"Retry-After": "17"}, "{}"))
    assert "try again in 17 s" in here("jobs", "--url", server.url).err


def test_a_redirect_is_not_followed(here, scripted, monkeypatch):
    monkeypatch.setenv("DEPLOYBOT_TOKEN", "dbt_secret")
    elsewhere = scripted(as_json(200, {"jobs": [], "next": None}))
    for status in (301, 302, 303, 307, 308):
        server = scripted((status, {"Location": elsewhere.url + "/v1/jobs"}, ""))
        assert here("jobs", "--url", server.url).code == ctl.NOT_REACHED
        assert len(server.requests) == 1
    assert elsewhere.requests == []


# ----------------------------------------------------------------------------------------------------------------------
# Tokens and addresses


@pytest.fixture
def sent(here, scripted):
    """The Authorization header that a call with the present settings sends."""
    server = scripted(as_json(200, {"jobs": [], "next": None}))

    def sent(expect=0):
        result = here("jobs", "--url", server.url)
        assert result.code == expect
        assert "dbt_" not in result.out + result.err
        return server.requests[-1][2].get("authorization")

    return sent


def admin_token(text="dbt_admin\n"):
    os.mkdir("data")
    Path(ctl.TOKEN_FILE).write_text(text)


def test_the_token_comes_from_the_first_place_that_has_one(sent, monkeypatch, tmp_path):
    assert sent() is None
    admin_token()
    assert sent() == "Bearer dbt_admin"
    (tmp_path / "token").write_text("dbt_file\n")
    monkeypatch.setenv("DEPLOYBOT_TOKEN_FILE", str(tmp_path / "token"))
    assert sent() == "Bearer dbt_file"
    monkeypatch.setenv("DEPLOYBOT_TOKEN", "dbt_env")
    assert sent() == "Bearer dbt_env"


def test_a_closed_controller_is_open_to_the_admin_token_beside_it(here, make_controller, monkeypatch):
    """As after `deploybot.py` and `ctl.py` in one folder: the database, and so admin.token, is in ./data."""
    controller = make_controller("data", open=False, read_token="dbt_read")
    monkeypatch.setenv("DEPLOYBOT_URL", controller.url)
    assert here(*DEPLOY).code == 0
    monkeypatch.setenv("DEPLOYBOT_TOKEN", "dbt_read")
    assert here("jobs").code == 0
    result = here(*DEPLOY)
    assert result.code == ctl.REFUSED and "403 from POST" in result.err
    monkeypatch.setenv("DEPLOYBOT_TOKEN", "dbt_wrong")
    result = here("jobs")
    assert result.code == ctl.REFUSED and "401" in result.err and "dbt_wrong" not in result.err
    monkeypatch.delenv("DEPLOYBOT_TOKEN")
    os.remove(ctl.TOKEN_FILE)
    assert "no token was sent" in here("jobs").err
    assert here("health").code == 0


def test_a_token_file_of_someone_else_is_not_read(sent, monkeypatch):
    admin_token()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert sent() is None


@pytest.mark.parametrize("host", ["example.com", "10.0.0.1", "127.0.0.1.example.com", "localhost.example.com", "[::2]"])
def test_admin_token_stays_on_this_machine(host):
    admin_token()
    assert ctl.controller_token(f"http://{host}:8080")[0] is None


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "[::1]"])
def test_admin_token_is_for_loopback(host):
    admin_token()
    assert ctl.controller_token(f"http://{host}:8080")[0] == "dbt_admin"


def test_a_token_that_no_header_can_carry_is_not_printed(here, monkeypatch):
    for bad in ("dbt_a\r\nX: y", "dbt_é", "dbt_ a"):
        monkeypatch.setenv("DEPLOYBOT_TOKEN", bad)
        result = here("jobs")
        assert result.code == ctl.WRONG_USE and "dbt_" not in result.err and result.err.count("\n") == 1


def test_a_missing_token_file_is_named(here, monkeypatch):
    monkeypatch.setenv("DEPLOYBOT_TOKEN_FILE", "/no/such/file")
    result = here("jobs")
    assert result.code == ctl.WRONG_USE and "/no/such/file: No such file" in result.err


def test_a_401_says_whether_a_token_was_sent(here, scripted, monkeypatch):
    server = scripted(problem(401, "A token is needed."))
    assert "no token was sent, set DEPLOYBOT_TOKEN" in here("jobs", "--url", server.url).err
    monkeypatch.setenv("DEPLOYBOT_TOKEN", "dbt_wrong")
    result = here("jobs", "--url", server.url)
    assert "the token from DEPLOYBOT_TOKEN is not valid" in result.err and "dbt_wrong" not in result.err


def test_a_proxy_is_not_asked_for_loopback(here, scripted, monkeypatch):
    proxy, server = scripted((200, {}, "proxy")), scripted(as_json(200, {"jobs": [], "next": None}))
    monkeypatch.setenv("http_proxy", proxy.url)
    assert here("jobs", "--url", server.url).code == 0
    assert here("jobs", "--url", "http://controller.example.com").code == ctl.NOT_REACHED
    assert [request[1] for request in proxy.requests] == ["http://controller.example.com/v1/jobs?limit=20"]


def test_the_url_flag_wins_and_stands_in_the_commands_shown(here, scripted, monkeypatch):
    monkeypatch.setenv("DEPLOYBOT_URL", f"http://127.0.0.1:{free_port()}")
    server = scripted(as_json(200, {"job": JOB}))
    for argv in (["--url", server.url + "/", "status", JOB["id"]], ["status", JOB["id"], "--url", server.url]):
        result = here(*argv)
        assert result.code == 0 and f"ctl.py logs --job {JOB['id']} --url {server.url}\n" in result.out


# ----------------------------------------------------------------------------------------------------------------------
# token, whoami, audit, hosts reset


@pytest.fixture
def closed(make_controller, monkeypatch):
    """A controller that wants tokens; ctl has the admin's."""
    controller = make_controller("closed", open=False, token="dbt_admin", agent_token="dbt_agents", read_token="dbt_read")
    monkeypatch.setenv("DEPLOYBOT_URL", controller.url)
    monkeypatch.setenv("DEPLOYBOT_TOKEN", "dbt_admin")
    return controller


@pytest.fixture
def as_token(monkeypatch):
    def use(secret):
        monkeypatch.setenv("DEPLOYBOT_TOKEN", secret.strip())

    return use


def test_token_create_prints_the_secret_alone_and_it_works(here, closed, as_token):
    result = here("token", "create", "--role", "operator", "--name", "ci", "--expires", "30d")
    assert re.fullmatch(r"dbt_[\w-]{43}\n", result.out) and result.code == 0
    assert re.fullmatch(r"token ci, operator, ends in 30d\. It is not shown again; .*DEPLOYBOT_TOKEN.*\n", result.err)
    assert "dbt_" not in result.err
    as_token(result.out)
    assert json.loads(here("whoami", "--json").out)["name"] == "ci"
    assert here(*DEPLOY).code == 0
    assert here("reload").code == ctl.REFUSED


def test_token_create_for_an_app_that_is_not_there_warns(here, closed):
    result = here("token", "create", "--role", "operator", "--app", "wbe")
    assert result.code == 0 and result.err.startswith("warning: apps.yaml has no app wbe\ntoken ")
    assert re.fullmatch(r"dbt_[\w-]{43}\n", result.out)


def test_token_create_json_is_the_answer(here, closed):
    result = here("token", "create", "--role", "agent", "--host", "web-01", "--json")
    answer = json.loads(result.out)
    assert answer["token"]["host"] == "web-01" and answer["secret"].startswith("dbt_")
    assert answer["token"]["expires_at"] is None and answer["token"]["name"].startswith("agent-")
    assert "agent for host web-01 alone, ends never" in result.err and "DEPLOYBOT_AGENT_TOKEN of the agent" in result.err


def test_what_was_left_out_is_not_sent(here, scripted):
    made = {"token": {**TOKEN, "name": "n"}, "secret": "dbt_" + "x" * 43}
    server = scripted(as_json(201, made))
    assert here("token", "create", "--role", "viewer", "--url", server.url).code == 0
    assert json.loads(server.requests[0][3]) == {"role": "viewer"}
    assert here("token", "create", "--role", "viewer", "--app", "web", "--expires", "90", "--url", server.url).code == 0
    assert json.loads(server.requests[1][3]) == {"role": "viewer", "app": "web", "expires_in": 90}


def test_a_token_of_an_app_may_deploy_that_app_alone(here, closed, as_token):
    closed.set_app(name="web", repo="myorg/web", hosts=["web-01"])
    as_token(here("token", "create", "--role", "operator", "--app", "web").out)
    assert here(*DEPLOY).code == 0
    shown = here("whoami").out
    assert re.search(r"^role +operator$", shown, re.MULTILINE) and re.search(r"^app +web$", shown, re.MULTILINE)
    other = here("deploy", "--repo", "myorg/api", "--ref", "main", "--host", "web-01")
    assert other.code == ctl.REFUSED and "403" in other.err and "web alone" in other.err
    assert here("hosts").code == ctl.REFUSED and here("apps").code == 0
    job = json.loads(here("jobs", "--json").out)["jobs"][0]
    assert here("status", job["id"]).code == 0, "what it waits for is not this token's to know, and keeps nothing up"


def test_a_403_names_the_role_that_is_needed(here, closed, as_token):
    as_token("dbt_read")
    for argv, role in ((DEPLOY, "operator"), (("reload",), "admin"), (("token", "list"), "admin"), (("audit",), "admin")):
        result = here(*argv)
        assert result.code == ctl.REFUSED and result.err.count("\n") == 1
        assert f"needs a token of the role {role}; this one has viewer: `ctl.py whoami`" in result.err


def test_tokens_are_listed_and_revoked_by_name_or_id(here, closed, as_token):
    assert "ctl.py token create" in here("token", "list").err
    here("token", "create", "--role", "viewer", "--name", "wall", "--expires", "12h")
    here("token", "create", "--role", "operator", "--app", "web", "--name", "ci")
    bot = here("token", "create", "--role", "agent", "--host", "web-01", "--name", "bot").out.strip()
    header, *rows = here("token", "list").out.splitlines()
    cells = {row.split()[0]: re.split(r"  +", row) for row in rows}
    assert re.split(r"  +", header) == ["NAME", "ROLE", "ONLY FOR", "CREATED", "BY", "ENDS", "LAST USED", "ID"]
    assert list(cells) == ["wall", "ci", "bot"]
    assert cells["wall"][1:3] == ["viewer", "-"] and cells["wall"][4:7] == ["admin", "in 12h", "-"]
    assert cells["ci"][2] == "app web" and cells["ci"][5] == "never" and cells["bot"][2] == "host web-01"
    assert "dbt_" not in here("token", "list", "--json").out
    ids = {one["name"]: one["id"] for one in json.loads(here("token", "list", "--json").out)["tokens"]}
    assert here("token", "revoke", "wall") == (0, "wall revoked: it counts no more\n", "")
    assert json.loads(here("token", "revoke", ids["ci"], "--json").out)["token"]["name"] == "ci"
    assert here("token", "revoke", ids["bot"][:30].upper()).code == 0
    assert json.loads(here("token", "list", "--json").out) == {"tokens": []}
    as_token(bot)
    assert "401" in here("whoami").err


TOKEN = {
    "id": "0199c2f0-1111-7000-8000-000000000001", "name": "ci", "role": "operator", "host": None, "app": "web", "created_at": JOB["created_at"],
    "created_by": "admin", "expires_at": None, "last_used_at": None,
}  # fmt: skip


def test_a_token_is_found_by_whole_id_then_name_then_start(here, scripted):
    others = [{**TOKEN, "id": TOKEN["id"][:-1] + str(n), "name": name} for n, name in ((2, TOKEN["id"]), (3, "0199"))]
    listed, ended = as_json(200, {"tokens": [TOKEN, *others]}), as_json(200, {"token": TOKEN})

    def revoked(text):
        server = scripted(listed, ended)
        result = here("token", "revoke", text, "--url", server.url)
        return result, [path.rpartition("/")[2] for method, path, *_ in server.requests if method == "DELETE"]

    assert revoked(TOKEN["id"])[1] == [TOKEN["id"]], "a name that looks like another's id takes nothing from it"
    assert revoked("0199")[1] == [others[1]["id"]]
    assert revoked(TOKEN["id"][:-1] + "2")[1] == [others[0]["id"]]
    unclear, none = revoked("0199c2f0")
    assert unclear.code == ctl.WRONG_USE and none == [] and len(unclear.err.splitlines()) == 4
    for text in ("nobody", "", "CI"):
        missing, none = revoked(text)
        assert missing.code in (ctl.REFUSED, ctl.WRONG_USE) and none == []


def test_a_name_in_use_is_refused_with_where_to_look(here, closed):
    assert here("token", "create", "--role", "viewer", "--name", "ci").code == 0
    for name in ("ci", "admin"):
        result = here("token", "create", "--role", "viewer", "--name", name)
        assert result.code == ctl.REFUSED and result.out == ""
        assert "409" in result.err and name in result.err and "`ctl.py token list`" in result.err


def test_a_token_on_the_command_line_goes_no_further(here, scripted):
    secret = "dbt_" + "Zz-_9" * 8 + "abc"
    server = scripted(problem(404, f"no token {secret}"))
    for argv in (
        ["token", "revoke", secret], ["whoami", secret], ["token", "create", "--role", secret], ["token", "list", "--" + secret], [secret],
        ["audit", "--who", secret], ["audit", "--limit", secret], ["status", secret], ["jobs", "--url", secret],
    ):  # fmt: skip
        result = here(*argv, *(() if "--url" in argv else ("--url", server.url)))
        assert result.code != 0 and secret not in result.err + result.out and "Zz-_9" not in result.err
    assert "that is a token itself" in here("token", "revoke", secret).err
    asked = [path for _, path, *_ in server.requests if "Zz-_9" in path]
    assert asked == [f"/v1/audit?who={secret}&limit=20"], "where any text may be asked for"


def test_no_verb_takes_a_token(here):
    for verb in ctl.VERBS:
        options = re.findall(r"--[a-z-]+", here(*verb.name.split(), "--help").out)
        assert not {"--token", "--password", "--secret"}.intersection(options)


def test_whoami_of_each(here, closed, as_token, monkeypatch):
    shown = here("whoami").out
    assert re.search(r"^name +admin\nrole +admin\nends +never\ntoken +DEPLOYBOT_TOKEN\nurl +http://127", shown, re.MULTILINE)
    as_token("dbt_read")
    assert json.loads(here("whoami", "--json").out) == {
        "name": "reader",
        "role": "viewer",
        "app": None,
        "host": None,
        "expires_at": None,
    }
    as_token(here_admin(here, monkeypatch, "--role", "viewer", "--expires", "2h"))
    assert re.search(r"^ends +in 2h$", here("whoami").out, re.MULTILINE)
    monkeypatch.delenv("DEPLOYBOT_TOKEN")
    assert "no token was sent" in here("whoami").err


def here_admin(here, monkeypatch, *options):
    monkeypatch.setenv("DEPLOYBOT_TOKEN", "dbt_admin")
    return here("token", "create", *options).out


def test_whoami_in_open_mode(run):
    shown = run("whoami").out
    assert re.search(r"^name +local\nrole +admin\nends +never\ntoken +none was sent$", shown, re.MULTILINE)


def test_a_host_is_reset_and_may_enrol_anew(here, closed):
    def register(**more):
        return closed.call("POST", "/v1/agents/register", {"hostname": "web-01", **more}, {"Authorization": "Bearer dbt_agents"})

    assert register(token_sha256="a" * 64)[0] == 200
    status, refused = register(token_sha256="b" * 64)
    assert status == 409 and "ctl.py hosts reset web-01" in refused["detail"]
    result = here("hosts", "reset", "web-01")
    assert (result.code, result.err) == (0, "") and result.out.startswith("web-01 reset: its secret no longer counts")
    assert register(token_sha256="b" * 64)[0] == 200
    assert json.loads(here("hosts", "reset", "web-01", "--json").out)["host"]["hostname"] == "web-01"
    assert here("hosts", "reset", "web-02").code == ctl.REFUSED


def test_the_audit_is_a_table_newest_first(here, closed):
    agent = closed.register("web-01")
    assert agent
    job = json.loads(here(*DEPLOY, "--json").out)["results"][0]["job"]
    here("cancel", job["id"])
    here("token", "create", "--role", "viewer", "--name", "wall")
    header, *rows = here("audit").out.splitlines()
    assert re.split(r"  +", header) == ["TIME (UTC)", "WHO", "FROM", "ACTION", "TARGET", "DETAIL"]
    cells = [re.split(r"  +", row) for row in rows]
    assert [row[3] for row in cells[:3]] == ["token.create", "job.cancel", "job.create"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", cells[0][0]) and cells[0][1:3] == ["admin", "127.0.0.1"]
    assert cells[0][4] == "wall" and cells[2][4] == job["id"][:13] and cells[2][5] == "myorg--web main on web-01"
    assert here("audit", "--limit", "2").err == "there are older ones: --limit 20\n"
    only = json.loads(here("audit", "--action", "job.cancel", "--who", "admin", "--json").out)["audit"]
    assert [(one["action"], one["target"]) for one in only] == [("job.cancel", job["id"])]
    assert here("audit", "--who", "nobody") == (0, "", f"nothing of that kind was done at {closed.url}\n")


def test_the_audit_beyond_a_page_is_fetched_page_by_page(here, closed, monkeypatch):
    monkeypatch.setattr(ctl, "PAGE_JOBS", 2)
    for number in range(5):
        here("token", "create", "--role", "viewer", "--name", f"t{number}")
    listed = json.loads(here("audit", "--limit", "5", "--json").out)
    assert [one["target"] for one in listed["audit"]] == ["t4", "t3", "t2", "t1", "t0"]
    monkeypatch.setattr(ctl, "PAGE_JOBS", 1000)
    assert len(json.loads(here("audit", "--limit", "1001", "--json").out)["audit"]) == 5, "more than one call gives"


def test_control_characters_of_tokens_and_audit_are_stripped(here, scripted):
    evil = "x\x1b[2J\r\n\x9by\u202e"
    token = {**TOKEN, **dict.fromkeys(("name", "role", "app", "created_by"), evil)}
    entry = {"id": 1, "at": JOB["created_at"], **dict.fromkeys(("who", "address", "action", "target", "detail"), evil)}
    document = {"tokens": [token], "audit": [entry], "next": None, "token": token, "secret": "dbt_x" + evil}
    server = scripted(as_json(200, {**document, "name": evil, "role": evil, "app": evil, "host": evil, "expires_at": None}))
    for argv in (["token", "list"], ["audit"], ["whoami"], ["token", "create", "--role", "viewer"], ["token", "revoke", evil]):
        result = here(*argv, "--url", server.url)
        assert result.code == 0, result
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", result.out + result.err), argv


@pytest.mark.parametrize("columns", [50, 80])
def test_the_new_tables_fit_the_terminal(run, controller, columns):
    controller.ok("POST", "/v1/tokens", {"role": "operator", "app": "a" * 60, "name": "n" * 60})
    for verb in (("token", "list"), ("audit",)):
        lines = re.sub(r"\x1b\[\d+m", "", on_terminal(controller.url, *verb, columns=columns)).splitlines()
        assert len(lines) == 2 and max(map(len, lines)) <= columns


# ----------------------------------------------------------------------------------------------------------------------
# TLS


def openssl(folder, *argv):
    subprocess.run(["openssl", *argv], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A folder with ca.pem, other.pem (of another CA), and pairs NAME.pem, NAME.key that ca.pem signed."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not there to make certificates")
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("ca", "other"):
        make = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}")
        usage = ("-addext", "keyUsage=critical,keyCertSign")  # Python 3.13 asks for this, and for the key's identifier below
        openssl(folder, *make, *usage, "-days", "2", "-keyout", f"{name}.key", "-out", f"{name}.pem")
    for name, address, days in (
        ("good", "IP:127.0.0.1", "2"),
        ("elsewhere", "DNS:web.example.com", "2"),
        ("over", "IP:127.0.0.1", "-1"),
    ):
        (folder / "san").write_text(f"subjectAltName={address}\nauthorityKeyIdentifier=keyid\n")
        new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=controller")
        openssl(folder, *new, "-keyout", f"{name}.key", "-out", "csr")
        sign = ("x509", "-req", "-in", "csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "san")
        openssl(folder, *sign, "-days", days, "-out", f"{name}.pem")
    return folder


@pytest.fixture
def behind_tls(make_controller, certificates, monkeypatch):
    """Starts a controller with that certificate and a token that ctl has; its URL."""

    def start(name):
        pair = {"tls_cert": certificates / f"{name}.pem", "tls_key": certificates / f"{name}.key"}
        controller = make_controller(name, open=False, token="dbt_admin", **pair)
        monkeypatch.setenv("DEPLOYBOT_URL", f"https://127.0.0.1:{controller.port}")
        monkeypatch.setenv("DEPLOYBOT_TOKEN", "dbt_admin")
        return controller

    return start


def test_a_private_ca_is_named_in_ssl_cert_file(here, behind_tls, certificates, monkeypatch):
    controller = behind_tls("good")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.pem"))
    assert here("whoami").code == 0 and here(*DEPLOY).code == 0
    job = json.loads(here("jobs", "--json").out)["jobs"][0]
    assert here("cancel", job["id"]).code == 0
    assert here("logs", "-f", "--job", job["id"]).code == ctl.FAILED, "the stream too"
    assert "https" in here("health").out and controller.port


def test_a_certificate_that_is_wrong_in_itself_is_to_be_made_anew():
    """Such as one without a key identifier, which Python 3.13 refuses (X509_V_ERR_MISSING_AUTHORITY_KEY_IDENTIFIER)."""
    assert ctl.certificate_hint(92) == "make the controller's certificate anew"


def test_http_to_a_port_that_wants_https_says_so(here, behind_tls):
    url = f"http://127.0.0.1:{behind_tls('good').port}"
    result = here("whoami", "--url", url)
    assert result.code == ctl.NOT_REACHED and result.err.endswith(
        f": if it speaks https there, write {url.replace('http', 'https')}\n"
    )


@pytest.mark.parametrize(
    ("certificate", "ca", "words"),
    [
        ("good", None, "name the file of its CA in SSL_CERT_FILE\n"),
        ("good", "other.pem", "name the file of its CA in SSL_CERT_FILE ("),
        ("good", "missing.pem", "SSL_CERT_FILE cannot be read: "),
        ("elsewhere", "ca.pem", "use a name that the certificate has in --url or DEPLOYBOT_URL\n"),
        ("over", "ca.pem", "renew the controller's certificate, or set the clock"),
    ],
)
def test_a_certificate_that_is_refused_says_what_to_do(here, behind_tls, certificates, monkeypatch, certificate, ca, words):
    behind_tls(certificate)
    if ca:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates / ca))
    result = here("whoami")
    assert (result.code, result.out) == (ctl.NOT_REACHED, "")
    assert words in result.err and result.err.count("\n") == 1 and "_ssl.c" not in result.err


# ----------------------------------------------------------------------------------------------------------------------
# The stream: reconnecting


def follow(here, server):
    return here("logs", "-f", "--job", JOB["id"], "--url", server.url)


@pytest.mark.parametrize("breakage", [None, reset])
def test_a_broken_stream_goes_on_where_it_was(here, scripted, at_once, breakage):
    job = as_json(200, {"job": JOB})
    busy = (503, {"Retry-After": "1"}, "")
    first = events(log_frame(1), log_frame(2), b"id: e-3\nevent: log\ndata: {half", then=breakage)
    server = scripted(job, busy, first, busy, busy, events(log_frame(3), log_frame(4), END), job)
    result = follow(here, server)
    assert result.code == 0
    assert result.out.splitlines()[:4] == ["line 1", "line 2", "line 3", "line 4"]
    assert [line.split()[1] for line in result.err.splitlines()] == ["lost,", "again"] * 2
    lost = [line.partition("again")[2] for line in result.err.splitlines()[::2]]
    why = "Connection reset by peer" if breakage else "the controller ended the stream"
    assert lost == [f" in 1 s: {server.url} (503 Service Unavailable)", f": {server.url} ({why})"]
    resumed = [headers.get("last-event-id") for _, path, headers, _ in server.requests if "stream" in path]
    assert resumed == [None, None, "e-2", "e-2", "e-2"]


def test_following_through_connections_that_break_shows_each_line_once(controller, agent, start, run):
    """The real controller behind a relay that cuts every connection after some bytes."""
    make(controller)
    job = agent.take()
    wanted = [f"line {number}" for number in range(60)]
    with Relay(controller.url, cut_after=4000) as relay:
        process = start("logs", "-f", "--job", job["id"], "--tail", "1000", "--url", relay.url, env=dict(os.environ))
        got = []
        for line in wanted:
            agent.log(job, line)
            got.append(process.stdout.readline().rstrip("\n"))
        agent.end(job)
        rest, said = process.communicate(timeout=LIMIT_S)
    assert got == wanted
    assert rest.startswith("success: ") and process.returncode == 0
    assert relay.cuts >= 2 and said.count("connected again") >= 2


def test_following_goes_on_over_a_restart_of_the_controller(controller, agent, start, run):
    make(controller)
    job = agent.take()
    agent.log(job, "before")
    process = start("logs", "-f", "--job", job["id"], env=dict(os.environ))
    assert process.stdout.readline() == "before\n"
    controller.restart()
    agent.log(job, "after")
    assert process.stdout.readline() == "after\n"
    agent.end(job, **FAILURE)
    rest, said = process.communicate(timeout=LIMIT_S)
    assert rest.startswith("failed: ") and process.returncode == ctl.FAILED
    assert [line.split()[1] for line in said.splitlines() if line.startswith("connect")] == ["lost,", "again"]


class Relay:
    """Passes bytes on to a controller, and cuts each connection after `cut_after` bytes of answer."""

    def __init__(self, url, cut_after):
        self.target = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        self.cut_after, self.cuts = cut_after, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def __enter__(self):
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.listener.close()

    def accept(self):
        while True:
            try:
                client = self.listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self.pass_on, args=(client,), daemon=True).start()

    def pass_on(self, client):
        with client, socket.create_connection(self.target) as upstream:
            upstream.sendall(client.recv(65536))
            left = self.cut_after
            while data := upstream.recv(min(left, 65536)):
                client.sendall(data)
                left -= len(data)
                if not left:
                    self.cuts += 1
                    return


@pytest.mark.parametrize(
    ("argv", "asked"),
    [((), []), (("--host", "web-01"), [as_json(200, {"jobs": [JOB], "next": None})]), (("--host", "x"), [(503, {}, "")])],
)
def test_a_stream_that_may_not_start_yet_starts_when_it_may(here, scripted, pauses, argv, asked):
    """`asked`: what is answered to the question whether there is such a host; none keeps the stream up."""
    later = problem(429, "too many tokens from your address were not valid")
    busy = (429, {"Retry-After": "17"}, later[2])
    server = scripted(busy, busy, events(log_frame(1)), *asked, (503, {"Retry-After": "4"}, ""), problem(403, "not yours"))
    result = here("logs", "-f", *argv, "--url", server.url)
    assert result.code == ctl.REFUSED and "line 1" in result.out
    assert [pause for pause in pauses if pause > 1] == [17, 17, 4]
    first, *rest = result.err.splitlines()
    assert first == f"not now, trying again in 17 s: {server.url} (429 too many tokens from your address were not valid)"
    assert [line.split()[0] for line in rest] == ["connected", "connection", "ctl.py:"]


def test_a_stream_that_may_start_tomorrow_is_not_waited_for(here, scripted, pauses):
    server = scripted((429, {"Retry-After": "86400"}, "{}"))
    result = here("logs", "-f", "--url", server.url)
    assert result.code == ctl.REFUSED and "try again in 86400 s" in result.err.splitlines()[-1] and pauses == []


@pytest.mark.parametrize("value", ["soon", "-1", "Wed, 21 Oct 2026 07:28:00 GMT", "1" * 7])
def test_a_retry_after_that_is_no_number_is_none(here, scripted, value):
    server = scripted((429, {"Retry-After": value}, "{}"))
    result = here("logs", "-f", "--url", server.url)
    assert result.code == ctl.REFUSED and "try again in 5 s" in result.err


def test_a_silent_connection_is_dead(here, scripted, at_once, monkeypatch):
    monkeypatch.setattr(ctl, "STREAM_SILENCE_S", 0.1)
    released = threading.Event()
    job = as_json(200, {"job": JOB})
    server = scripted(job, events(log_frame(1), then=lambda handler: released.wait(LIMIT_S)), events(END), job)
    result = follow(here, server)
    released.set()
    assert result.code == 0 and "no answer in time" in result.err


def test_comments_keep_a_quiet_connection_alive(here, scripted, monkeypatch):
    monkeypatch.setattr(ctl, "STREAM_SILENCE_S", 1)

    def comments(handler):
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            handler.wfile.write(b": still here\n\n")
            threading.Event().wait(0.2)
        handler.wfile.write(END)

    job = as_json(200, {"job": JOB})
    server = scripted(job, events(log_frame(1), then=comments), job)
    result = follow(here, server)
    assert result.code == 0 and result.err == ""


def test_a_204_ends_the_following(here, scripted, at_once):
    job = as_json(200, {"job": JOB})
    server = scripted(job, events(log_frame(1)), (204, {}, ""), job)
    result = follow(here, server)
    assert result.code == 0 and result.out.splitlines()[0] == "line 1"


def test_a_refusal_on_the_way_ends_the_following(here, scripted, at_once):
    server = scripted(as_json(200, {"job": JOB}), events(log_frame(1)), problem(401, "revoked"))
    result = follow(here, server)
    assert result.code == ctl.REFUSED and "401" in result.err.splitlines()[-1]


def test_a_gap_is_told(here, scripted):
    job = as_json(200, {"job": JOB})
    server = scripted(job, events(frame(5, "gap", {"detail": "12 lines went with retention"}), END), job)
    assert "12 lines went with retention" in follow(here, server).err


def test_a_stream_of_no_events_is_3(here, scripted):
    server = scripted(as_json(200, {"job": JOB}), events(b"event: log\ndata: not json\n\n"))
    result = follow(here, server)
    assert result.code == ctl.NOT_REACHED and result.err.count("\n") == 1


def test_a_deployment_that_was_made_is_followed_though_the_controller_stumbles(here, scripted, at_once):
    made = as_json(201, {"job": JOB, "created": True})
    server = scripted(made, (503, {}, ""), reset, events(log_frame(1), END), as_json(200, {"job": JOB}))
    result = here(*DEPLOY, "--follow", "--url", server.url)
    assert result.code == 0 and result.out.startswith("line 1\nsuccess: ")


def test_a_deployment_that_cannot_be_followed_goes_on(here, scripted):
    server = scripted(as_json(201, {"job": JOB, "created": True}), problem(403, "not yours"))
    result = here(*DEPLOY, "--wait", "--url", server.url)
    assert result.code == ctl.REFUSED and f"the deployment goes on; to end it: ctl.py cancel {JOB['id']}" in result.err


def test_one_stream_that_fails_among_several_ends_with_its_error(here, scripted):
    made = as_json(201, {"job": JOB, "created": True})
    server = scripted(made, made, problem(404, "gone"))
    result = here(*DEPLOY, "--host", "web-02", "--follow", "--url", server.url)
    assert result.code == ctl.REFUSED and "gone" in result.err


def test_backoff_grows_to_its_limit_and_gives_up():
    clock, pauses = [0.0], []

    def sleep(length):
        pauses.append(length)
        clock[0] += length

    backoff = ctl.Backoff(now=lambda: clock[0], sleep=sleep, jitter=lambda: 1)
    while backoff.wait():
        pass
    assert pauses[:6] == [0.5, 1, 2, 4, 8, 10] and set(pauses[6:]) == {10}
    assert ctl.GIVE_UP_S < clock[0] <= ctl.GIVE_UP_S + 20
    backoff.connected()
    assert backoff.wait() and pauses[-1] == 10
    backoff.delivered()
    assert backoff.wait() and pauses[-1] == 0.5
    assert backoff.wait(30) and pauses[-1] == 30
    assert not backoff.wait(ctl.GIVE_UP_S + 1)


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_events_are_the_same_wherever_the_bytes_are_cut(end):
    text = ": x\n\nid: e-1\nevent: log\ndata: a\ndata:b\n\nid: e-2\n\ndata: é\nid\n\n: x\n".replace("\n", end).encode()
    wanted = [(None, "message", None), ("e-1", "log", "a\nb"), ("e-2", "message", None), ("", "message", "é")]
    for size in range(1, len(text) + 1):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert list(ctl.sse_events(ctl.sse_lines(pieces))) == wanted


# ----------------------------------------------------------------------------------------------------------------------
# Text


@pytest.mark.parametrize(
    ("length", "words"),
    [(-5, "0s"), (0.4, "0s"), (59, "59s"), (60, "1m"), (125, "2m5s"), (3600, "1h"), (3605, "1h"), (90061, "1d1h"), (864000, "10d")],
)
def test_span(length, words):
    assert ctl.span(length) == words


def test_ago_is_the_largest_unit_and_never_negative(monkeypatch):
    now = ctl.seconds("2026-11-23T13:13:37.123Z")
    monkeypatch.setattr(time, "time", lambda: now)
    stamps = (None, "2026-11-23T13:13:40.000Z", "2026-11-23T13:13:30.000Z", "2026-11-23T11:01:00.000Z")
    assert [ctl.ago(stamp) for stamp in stamps] == ["-", "0s ago", "7s ago", "2h ago"]


@pytest.mark.parametrize(
    ("second", "words"), [(2.0, "in 2s"), (1.95, "in 2s"), (59, "in 59s"), (60, "in 1m"), (7199.9, "in 2h"), (-7200, "2h ago")]
)
def test_an_end_is_told_as_one_gave_it(monkeypatch, second, words):
    now = ctl.seconds("2026-11-23T13:13:37.123Z")
    monkeypatch.setattr(time, "time", lambda: now - second)
    assert ctl.ends("2026-11-23T13:13:37.123Z") == words and ctl.ends(None) == "never"


@pytest.mark.parametrize("verb", [("deploy", "--timeout"), ("lock", "--for"), ("token", "create", "--expires")])
def test_each_option_of_a_time_says_how_to_write_it(here, verb):
    *verb, option = verb
    text = " ".join(here(*verb, "--help").out.split())
    assert re.search(rf"{option} TIME 30s, 15m, 2h, 1d or plain seconds \(default: ", text)


def test_short_ids_are_as_long_as_it_takes():
    one, two = "0199c2f0-1111-7abc-8000-000000000001", "0199c2f0-1111-7abd-8000-000000000001"
    assert ctl.short_ids([one]) == {one: "0199c2f0-1111"}
    assert ctl.short_ids([one, two, one]) == {one: "0199c2f0-1111-7abc", two: "0199c2f0-1111-7abd"}
    twins = [one, one[:-1] + "2"]
    assert ctl.short_ids(twins) == {twins[0]: twins[0], twins[1]: twins[1]}


@pytest.mark.parametrize(
    ("most", "wanted"),
    [(100, [14, 20, 5]), (39, [14, 16, 5]), (37, [14, 14, 5]), (33, [12, 12, 5]), (32, [12, 12]), (25, [12]), (12, [12])],
)
def test_tables_shrink_then_lose_their_last_columns(most, wanted):
    assert ctl.fit([14, 20, 5], [True, True, False], most) == wanted


def test_wide_characters_take_two_columns():
    assert ctl.width("界a") == 3 and ctl.width("e\u0301") == 1
    assert ctl.cut("界界界", 5) == "界界…" and ctl.cut("abc", 3) == "abc"


# ----------------------------------------------------------------------------------------------------------------------
# As a process


def on_terminal(url, *argv, columns=100, **environment):
    """What ctl writes to a terminal of so many columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "DEPLOYBOT_URL": url, **environment}
    process = subprocess.Popen([sys.executable, str(CTL), *argv], stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    text = b""
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # EIO: the last writer has gone
            break
        if not data:
            break
        text += data
    os.close(master)
    assert process.wait(LIMIT_S) == 0
    return text.decode().replace("\r\n", "\n")


def test_colour_is_for_terminals_that_want_it(run, controller):
    make(controller)
    assert "\x1b[33mpending" in on_terminal(controller.url, "jobs")
    plain = re.sub(r"\x1b\[\d+m", "", on_terminal(controller.url, "jobs"))
    for setting in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        text = on_terminal(controller.url, "jobs", **setting)
        assert "\x1b" not in text and text.split()[:9] == plain.split()[:9]
    assert "\x1b" not in run("jobs").out
    assert "\x1b" not in on_terminal(controller.url, "jobs", "--json")


@pytest.mark.parametrize("columns", [50, 60, 80])
def test_tables_fit_the_terminal(run, controller, columns):
    make(controller, ref="feature/" + "x" * 80, host="a-rather-long-name.of-a-host.example.com")
    lines = re.sub(r"\x1b\[\d+m", "", on_terminal(controller.url, "jobs", columns=columns)).splitlines()
    assert len(lines) == 2 and max(map(len, lines)) <= columns
    assert "…" in lines[1] and lines[1].split()[1] == "pending"
    assert "x" * 80 in run("jobs").out


def test_it_starts_as_a_script_as_a_module_and_from_anywhere(start, tmp_path):
    shutil.copy(CTL, tmp_path / "elsewhere.py")
    for command, cwd in (((str(CTL),), tmp_path), (("-m", "ctl"), CTL.parent), ((str(tmp_path / "elsewhere.py"),), "/")):
        out, err = start("--version", command=command, cwd=cwd).communicate(timeout=LIMIT_S)
        assert (out, err) == (f"ctl.py {ctl.VERSION}\n", "")


def test_an_older_python_is_told_in_a_sentence(monkeypatch, capsys):
    head = CTL.read_text().partition("\nVERSION = ")[0]
    exec(head, {})
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    monkeypatch.setattr(sys, "version", "3.10.13 (main)")
    with pytest.raises(SystemExit) as end:
        exec(head, {})
    assert end.value.code == 2
    assert capsys.readouterr().err == "ctl.py needs Python 3.11 or newer; this is 3.10.13\n"


def test_what_is_slow_to_import_waits_until_it_is_needed(start):
    slow = "{'http.client', 'urllib.request', 'ssl', 'datetime', 'email', 'queue', 'random'}"
    code = f"import ctl, sys; ctl.main(['--help']); sys.exit(str({slow} & set(sys.modules)))"
    process = start(command=("-c", code), cwd=CTL.parent)
    assert process.communicate(timeout=LIMIT_S)[1] == "set()\n"


def test_help_has_an_example_of_every_verb_and_every_exit_code(here):
    text = here("--help").out
    for verb in ctl.VERBS:
        example = here(*verb.name.split(), "--help").out.partition("example:")[2]
        assert f"  ctl.py {verb.name}" in text and f"ctl.py {verb.name}" in example
    for code in (0, 1, 2, 3, 4, 130, 141):
        assert re.search(rf"^  {code} +\w", text, re.MULTILINE)
    for name in ("DEPLOYBOT_URL", "DEPLOYBOT_TOKEN", "DEPLOYBOT_TOKEN_FILE", "NO_COLOR"):
        assert name in text


def test_installed_under_another_name_it_is_called_by_that(start, tmp_path, closed):
    """Usage, examples, and what one is told to type."""
    (tmp_path / "deploybot-ctl").symlink_to(CTL)
    there = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DEPLOYBOT_TOKEN": "dbt_admin"}
    (tmp_path / "deploybot-ctl").chmod(0o755)

    def told(*argv):
        return "".join(start(*argv, command=(str(tmp_path / "deploybot-ctl"),), env=there).communicate(timeout=LIMIT_S))

    for verb in ((), ("deploy",), ("token",), ("token", "create")):
        text = told(*verb, "--help")
        assert text.startswith(f"usage: {' '.join(['deploybot-ctl', *verb])} [-h]") and "ctl.py" not in text
        assert f"  deploybot-ctl {' '.join(verb)}" in text.partition("example")[2]
    assert told("--version") == f"deploybot-ctl {ctl.VERSION}\n"
    wrong = (
        ["xyz"],
        ["deploy", "--apq"],
        ["apps", "x"],
        ["deploy", "--app"],
        [],
        ["hosts", "drain"],
        ["status", "x"],
        ["status", "00"],
    )
    for argv in (
        *wrong,
        ["hosts", "drain", "web-09"],
        ["jobs"],
        ["apps"],
        ["deployments"],
        ["token", "list"],
        ["token", "revoke", "x"],
    ):
        text = told(*argv)
        assert "deploybot-ctl " in text and "ctl.py" not in text, argv


def test_help_of_hosts_has_a_line_an_action_and_token_its_examples(here):
    text = here("hosts", "drain", "--help").out
    for action in ctl.HOST_ACTIONS:
        (line,) = re.findall(rf"^  {action} +(.*)$", text, re.MULTILINE)
        assert re.search("run", line) or action == "resume", "what becomes of a running job"
    assert max(map(len, text.splitlines())) < 140
    example = here("token", "--help").out.partition("examples:\n")[2].splitlines()
    assert [line.split()[:3] for line in example] == [["ctl.py", "token", name] for name in ("create", "list", "revoke")]


def test_ctrl_c_ends_with_130_and_says_that_the_deployment_goes_on(start, run, controller, agent):
    process = start(*DEPLOY, "--follow", env=dict(os.environ))
    job = agent.take()
    agent.log(job, "under way")
    assert process.stdout.readline() == "under way\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out) == (130, "")
    assert "the deployment goes on" in err and f"ctl.py cancel {job['id']}" in err and "Traceback" not in err


def test_ctrl_c_while_several_hosts_are_followed(start, run, controller, agent):
    process = start(*DEPLOY, "--host", "web-02", "--follow", env=dict(os.environ))
    agent.log(agent.take(), "under way")
    assert process.stdout.readline() == "web-01 | under way\n"
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 130 and "Traceback" not in err and "Fatal" not in err


@pytest.mark.parametrize("argv", [["jobs"], ["jobs", "--json"], ["logs", "-f"], ["--help"]])
def test_a_reader_that_has_gone_is_no_error(start, run, controller, agent, argv):
    ended_job(controller, agent, "x")
    reading, writing = os.pipe()
    os.close(reading)
    process = start(*argv, stdout=writing, env=dict(os.environ))
    os.close(writing)
    err = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == ctl.BROKEN_PIPE
    assert "Traceback" not in err and "BrokenPipe" not in err


def test_a_full_disk_is_one_line(start, run, controller):
    make(controller)
    with open("/dev/full", "w") as full:
        process = start("jobs", stdout=full, env=dict(os.environ))
    err = process.communicate(timeout=LIMIT_S)[1]
    assert err == "ctl.py: cannot write the output: No space left on device\n" and process.returncode == ctl.WRONG_USE


@pytest.mark.parametrize("argv", [["jobs"], ["health"], ["logs", "-f"]])
def test_exit_codes_of_a_process(start, argv):
    url = f"http://127.0.0.1:{free_port()}"
    process = start(*argv, env={**os.environ, "DEPLOYBOT_URL": url, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"})
    out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, out) == (ctl.NOT_REACHED, "") and url in err


def test_a_terminal_that_knows_only_ascii_gets_question_marks(start, run, controller, agent):
    job = ended_job(controller, agent, "schön 界")
    process = start("logs", "--job", job["id"], env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert process.communicate(timeout=LIMIT_S)[0] == "sch?n ?\n"


def test_a_state_that_did_not_change_is_not_told_again(run, controller, agent):
    """The commit of a running job makes an event of its own."""
    job = make(controller)
    taken = agent.take()
    for offset, commit in enumerate((None, "a" * 40, "b" * 40)):
        body = {"attempt": 1, "offset": offset, "lines": [{"message": "x"}], "commit": commit}
        agent.call("POST", f"/v1/jobs/{job['id']}/logs", body)
    agent.end(taken)
    told = run("logs", "--job", job["id"], "-f").err
    assert told.count("running (attempt 1") == 1 and told.count("success (attempt 1") == 1
