"""agent.py and its controller: one that misbehaves, what is fenced off, certificates, then whole agents against a real one."""

import contextlib
import hashlib
import json
import logging
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import types
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import command
from hosts import GRACE, ROOT, as_root, fake_git, lives, messages, seal, until

import agent
import deploybot

pytest_plugins = ("hosts",)


# Talking to a controller that misbehaves


class Scripted:
    """Answers requests by a function of (path, body, token), a status of None by cutting the connection; keeps what was asked."""

    def __init__(self, answer):
        asked = self.asked = []
        self.connections = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                outer.connections += 1
                super().setup()

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
                asked.append((self.path, body, token))
                status, answered, headers = answer(self.path, body, token)
                if status is None:
                    self.close_connection = True
                    return
                data = answered if isinstance(answered, bytes) else json.dumps(answered).encode()
                kind = "application/json" if status < 300 else "application/problem+json"
                self.send_response(status)
                for name, value in ({"Content-Type": kind, "Content-Length": len(data)} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):  # the agent may have given this call up
                    self.wfile.write(data)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def scripted():
    servers = []

    def make(answer):
        servers.append(Scripted(answer))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def ask(server, **kwargs):
    return agent.Controller(server.url + "/", lambda: "dbt_x", **kwargs).call("POST", "/v1/x", {"a": 1})


def test_an_answer_is_the_object_of_a_request_that_carries_the_token(scripted):
    server = scripted(lambda *asked: (200, {"b": 2}, {}))
    assert ask(server) == {"b": 2}
    assert server.asked == [("/v1/x", {"a": 1}, "dbt_x")]


def test_one_connection_serves_many_calls_and_a_closed_one_is_no_failure(scripted):
    server = scripted(lambda path, body, token: (200, {}, {"Connection": "close"} if body.get("last") else {}))
    controller = agent.Controller(server.url, lambda: None)
    for _ in range(3):
        controller.call("POST", "/", {})
    assert server.connections == 1
    controller._connection.sock.shutdown(socket.SHUT_RDWR)
    controller.call("POST", "/", {"last": True})
    controller.call("POST", "/", {})
    assert server.connections == 3
    controller.close()


def test_redirects_are_not_followed(scripted):
    thief = scripted(lambda *asked: (200, {}, {}))
    server = scripted(lambda *asked: (307, {}, {"Location": thief.url}))
    with pytest.raises(agent.Unreachable, match="not followed"):
        ask(server)
    assert thief.asked == []


def test_a_problem_is_a_refusal(scripted):
    server = scripted(lambda *asked: (409, {"detail": "a\ngap", "next_offset": 7}, {}))
    with pytest.raises(agent.Refused, match="409: a gap") as caught:
        ask(server)
    assert (caught.value.status, caught.value.next_offset) == (409, 7)


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (404, b"<html>not here</html>", {"Content-Type": "text/html"}),  # a proxy, while the controller restarts
        (200, b"<html>welcome</html>", {"Content-Type": "text/html"}),
        (409, [], {}),
        (503, {"detail": "full"}, {}),
        (429, {"detail": "slow"}, {}),
    ],
)
def test_what_may_pass_is_tried_again(scripted, status, body, headers):
    server = scripted(lambda *asked: (status, body, headers | {"Retry-After": "7"}))
    with pytest.raises(agent.Unreachable) as caught:
        ask(server)
    assert caught.value.retry_after == 7


def test_a_controller_that_is_not_there_and_one_that_says_nothing(scripted):
    over = threading.Event()
    server = scripted(lambda *asked: over.wait(10) and (200, {}, {}))
    with pytest.raises(agent.Unreachable, match="timed out"):
        ask(server, timeout=0.1)
    over.set()
    with pytest.raises(agent.Unreachable, match="refused"):
        agent.Controller("http://127.0.0.1:1", lambda: None).call("POST", "/", {})


def test_https_to_a_controller_that_speaks_http_is_told_apart(scripted):
    address = scripted(lambda *asked: (200, {}, {})).url.removeprefix("http://")
    with pytest.raises(agent.Unreachable, match=f"^it speaks http there: try http://{address}$"):
        agent.Controller(f"https://{address}", lambda: None).call("POST", "/", {})


class Lone:
    """An Agent in this process, whose heart is driven by hand."""

    def __init__(self, host, url="http://127.0.0.1:1", **config):
        self.config = agent.Config(url, "h", host.machine.workdir, "file", **config)
        self.agent = agent.Agent(self.config, host.machine, lambda first: agent.Backoff(first, chance=lambda: 0.0))

    def take(self, data):
        self.agent._take(data)
        for run in self.agent._holding():
            assert run.ended.wait(20)

    def beat(self):
        """A heartbeat, sent again where the end of a job cut it off, as the heart does."""
        while True:
            self.agent._heart.resume()
            try:
                return self.agent._send_heartbeat()
            except agent.Unreachable:
                if not self.agent._heart.interrupted:
                    raise

    def close(self):
        self.agent._over.set()
        until(lambda: all(run.ended.is_set() for run in self.agent._holding()))


@pytest.fixture
def lone(host):
    made = []

    def make(*args, **kwargs):
        made.append(Lone(host, *args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_no_attempt_is_started_twice(host, lone, tmp_path, variables):
    ledger = tmp_path / "ledger"
    variables |= {"LEDGER": str(ledger), "GO": str(tmp_path / "go")}
    data = host.job(deploy='echo "$DEPLOY_JOB_ID" >>"$LEDGER"; until [ -e "$GO" ]; do sleep 0.02; done')
    first = lone()
    first.agent._take(data)
    until(ledger.exists)
    first.agent._take(data)  # delivered again while it runs
    (tmp_path / "go").touch()
    first.close()
    second = lone()
    second.take(data)  # and again to the next agent, before it looked at what the first one left
    second.take(data | {"attempt": 2})
    assert ledger.read_text().split() == [data["id"]] * 2
    assert [run.entry.result["status"] for run in second.agent._holding()] == ["success", "success"]


def test_a_job_that_the_agent_does_not_take_is_answered(host, lone):
    one = lone()
    one.take(host.job(app="../up"))
    [run] = one.agent._holding()
    assert (run.entry.result["status"], run.entry.result["reason"]) == ("failed", "rejected")
    assert "app" in run.entry.result["error"]


def test_the_agents_own_log_says_how_a_job_ended(host, lone, caplog):
    caplog.set_level("INFO")
    one = lone()
    good, bad = host.job(), host.job(build="exit 3")
    for data in (good, bad):
        one.take(data)
    assert f"job {good['id']}: web success" in caplog.messages
    assert f"job {bad['id']}: web failed exit_code" in caplog.messages


def test_an_app_folder_that_cannot_be_made_is_named(host, lone, monkeypatch):
    one = lone()
    seal(monkeypatch, host.app)
    one.take(host.job())
    [run] = one.agent._holding()
    expected = {"status": "failed", "reason": "rejected", "error": f"cannot write {host.app}/releases: Permission denied"}
    assert run.entry.result == expected


def test_a_job_does_not_start_when_it_cannot_be_tracked(host, lone, monkeypatch, tmp_path, variables):
    variables["LEDGER"] = str(tmp_path / "ledger")
    one = lone()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(agent, "write_whole", full)
    with pytest.raises(OSError, match="No space"):
        one.agent._take(host.job(deploy="touch $LEDGER"))
    assert one.agent._holding() == [] and not (tmp_path / "ledger").exists()


def test_a_full_disk_in_the_middle_of_a_job_leaves_no_process(host, monkeypatch, tmp_path, env):
    env["PIDS"] = str(tmp_path / "pids")
    real = agent.write_whole

    def full_when_it_runs(path, text, sync=True):
        if not sync and '"release"' in text:
            until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().strip())
            raise OSError(28, "No space left on device")
        real(path, text, sync)

    monkeypatch.setattr(agent, "write_whole", full_when_it_runs)
    host.machine.env["PATH"] = fake_git(tmp_path, env, 'case "$*" in *update-ref*) echo $$ >"$PIDS"; exec sleep 60;; esac')
    assert host.deploy()["status"] == "failed"
    assert not lives(int((tmp_path / "pids").read_text()))


def test_the_host_signs_in_with_its_own_secret_and_registers_its_digest(host, lone, scripted):
    server = scripted(lambda path, body, token: (200, {"id": "a1", "session": "s1", "job": None, "interval": 0}, {}))
    one = lone(server.url, token="dbt_enrol").agent
    one._register()
    one._send_heartbeat()
    (path, body, token), (beat_path, beat, secret) = server.asked
    assert (path, token) == ("/v1/agents/register", "dbt_enrol")
    assert secret.startswith("dbt_") and body["token_sha256"] == hashlib.sha256(secret.encode()).hexdigest()
    assert (beat_path, beat) == ("/v1/agents/a1/heartbeat", {"status": "online", "running": [], "session": "s1", "wait": 25})
    file = host.machine.workdir / ".agent/secret"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and file.read_text().strip() == secret
    assert lone(server.url).agent._secret == secret  # the next agent is the same host


def test_a_host_that_is_known_shows_its_own_secret_first(host, lone, scripted):
    """A token that was revoked meanwhile is not shown again: it would count as a failed sign-in, of all behind this address."""
    known = []

    def answer(path, body, token):
        good = token == "dbt_enrol" or body["token_sha256"] in known
        return (200, {"id": "a1"}, {}) if good else (401, {"detail": "no"}, {})

    server = scripted(answer)
    one = lone(server.url, token="dbt_enrol").agent
    secret = one._secret

    def shown(token):
        before = len(server.asked)
        lone(server.url, token=token).agent._register()
        return [sent for *_, sent in server.asked[before:]]

    assert shown("dbt_enrol") == ["dbt_enrol"]
    known.append(hashlib.sha256(secret.encode()).hexdigest())
    assert shown("dbt_revoked") == [secret] == shown(None)
    known.clear()  # hosts reset
    assert shown("dbt_enrol") == [secret, "dbt_enrol"]


def test_an_agent_of_an_earlier_version_falls_back_on_its_own_secret(lone, scripted):
    """It left no note that it is registered."""
    server = scripted(
        lambda path, body, token: (
            (200, {"id": "a1"}, {})
            if body["token_sha256"] == hashlib.sha256(token.encode()).hexdigest()
            else (403, {"detail": "no"}, {})
        )
    )
    one = lone(server.url, token="dbt_revoked").agent
    one._register()
    assert [token for *_, token in server.asked] == ["dbt_revoked", one._secret]


def test_a_host_that_was_reset_is_told_how_it_gets_in_again(lone, scripted, caplog):
    let_in = [True]
    server = scripted(lambda *asked: (200, {"id": "a1"}, {}) if let_in else (401, {"detail": "no"}, {}))
    lone(server.url, token="dbt_enrol").agent._register()
    let_in.clear()
    said = refused(lone(server.url).agent, caplog)
    assert said == (
        "401: the secret of this host is no longer known there: set DEPLOYBOT_AGENT_TOKEN "
        "(`ctl.py token create --role agent --host h` makes one)"
    )


def refused(one, caplog):
    """What a refused registration says in the agent's own log."""
    with pytest.raises(agent.Refused) as caught:
        one._register()
    assert one._is_newer(caught.value) is False
    return caplog.messages[-1].removeprefix("the controller refused: ")


MAKE = "`ctl.py token create --role agent --host h` makes one"


@pytest.mark.parametrize(
    ("token", "status", "said"),
    [
        (None, 401, f"401: no token: set DEPLOYBOT_AGENT_TOKEN ({MAKE})"),
        ("dbt_wrong", 401, f"401: DEPLOYBOT_AGENT_TOKEN is not known there, or not any more ({MAKE})"),
        ("dbt_read", 403, f"403: DEPLOYBOT_AGENT_TOKEN is for something else: no ({MAKE})"),
    ],
)  # fmt: skip
def test_a_refused_token_says_what_to_do(lone, scripted, caplog, token, status, said):
    server = scripted(lambda path, body, sent: (status if sent == token else 401, {"detail": "no"}, {}))
    assert refused(lone(server.url, token=token).agent, caplog) == said


@pytest.mark.parametrize("too_many", [False, True])
def test_a_token_of_another_host_is_said_to_be_one_also_at_the_limit(lone, make_controller, caplog, too_many):
    """The host's own secret, which is tried behind it, is not known there yet: that 401, or 429, says nothing."""
    closed = make_controller(open=False, token="dbt_admin", agent_token="dbt_agent")
    bound = closed.acting("dbt_admin").ok("POST", "/v1/tokens", {"role": "agent", "host": "web-01"})["secret"]
    for _ in range(10 * too_many):
        closed.acting("dbt_none").call("GET", "/v1/session")
    said = refused(lone(closed.url, token=bound).agent, caplog)
    assert said == f"403: DEPLOYBOT_AGENT_TOKEN is for something else: this token belongs to web-01, not to h ({MAKE})"


def test_a_token_that_is_valid_gets_in_where_the_secret_is_put_off(lone, scripted):
    """Others behind its address are at the limit of failed sign-ins; it passes all the same."""
    server = scripted(lambda path, body, sent: (200, {"id": "a1"}, {}) if sent == "dbt_good" else (429, {"detail": "no"}, {}))
    one = lone(server.url, token="dbt_good").agent
    one._registered.touch()
    one._register()
    assert one._identity == ("a1", None)


class HeartPauses:
    """In the place of Agent._nudge: notes what the heart would wait, and is over after so many."""

    def __init__(self, one, number):
        self.one, self.number, self.waited = one, number, []

    def wait(self, pause):
        self.waited.append(pause)
        if len(self.waited) == self.number:
            self.one._silent.set()

    def clear(self):
        pass


def test_an_agent_that_nobody_knows_stays_below_the_failed_sign_ins_of_a_minute(lone, scripted):
    server = scripted(lambda *asked: (401, {"detail": "no"}, {}))
    one = lone(server.url, token="dbt_wrong").agent
    one._nudge = HeartPauses(one, 12)
    one._beat()
    waited = one._nudge.waited
    assert waited == sorted(waited) and 6 < waited[-1] <= 60
    at, each = [sum(waited[:n]) for n in range(len(waited))], len(server.asked) // len(waited)
    most = max(sum(begun <= other < begun + 60 for other in at) for begun in at) * each
    assert each == 2 and most < 10, (waited, most)


def test_an_upload_of_an_agent_that_nobody_knows_waits_for_long_from_the_second_time_on(scripted):
    waited = []

    class Over:
        def wait(self, pause):
            waited.append(pause)
            return len(waited) == 4

    server = scripted(lambda *asked: (401, {"detail": "no"}, {}))
    pauses = agent.Backoff(chance=lambda: 0.0)
    upload = agent.Uploader(
        agent.Controller(server.url, lambda: "dbt_x"), types.SimpleNamespace(key=agent.JobKey("j", 1)), Over(), pauses
    )
    with pytest.raises(agent.Unreachable):
        upload._insist("/x", {})
    assert waited == [0.0, 30.0, 30.0, 30.0]


@pytest.fixture
def tokyo(monkeypatch):
    """A machine whose time is not UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "JST-9")
        time.tzset()
        yield
    time.tzset()


def test_times_in_the_log_have_the_form_of_the_controllers(tokyo):
    record = logging.makeLogRecord({"created": 1_795_936_014.25, "msecs": 250.0, "levelname": "INFO", "msg": "registered"})
    theirs = deploybot.LogFormat(False).format(record)
    assert agent.LogFormat("%(asctime)s %(levelname)-7s %(message)s").format(record) == theirs


def test_a_controller_that_puts_the_agent_off_was_reached(lone, scripted, caplog):
    server = scripted(lambda *asked: (429, {"detail": "more than 10 tokens"}, {"Retry-After": "43"}))
    one = lone(server.url, token="dbt_wrong").agent
    one._nudge = HeartPauses(one, 1)
    one._beat()
    assert caplog.messages == [f"the controller at {server.url} puts this address off: 429: more than 10 tokens"]
    assert one._nudge.waited == [43.0]


@pytest.mark.parametrize(
    ("token", "owner"), [(None, "403: this folder belongs to the host vm"), ("dbt_agent", "409: this folder belongs to another host")]
)  # fmt: skip
def test_a_folder_of_another_host_is_named_with_the_ways_out(host, lone, make_controller, caplog, token, owner):
    closed = make_controller(open=False, token="dbt_admin", agent_token="dbt_agent")
    one = lone(closed.url, token=token).agent
    digest = hashlib.sha256(one._secret.encode()).hexdigest()
    closed.register("vm", token_sha256=digest)
    way_out = f"use another --workdir for h, or remove {host.machine.workdir}/.agent"
    assert refused(one, caplog) == f"{owner}: {way_out}"


@pytest.mark.parametrize("status", [401, 404])
def test_a_host_that_was_removed_registers_anew(lone, scripted, status):
    ids = iter(("a1", "a2"))

    def answer(path, body, token):
        if path.endswith("register"):
            return 200, {"id": next(ids), "session": "s"}, {}
        return (status, {"detail": "unknown"}, {}) if "a1" in path else (200, {"job": None, "interval": 300}, {})

    server = scripted(answer)
    one = lone(server.url, token="dbt_enrol").agent
    heart = threading.Thread(target=one._beat, daemon=True)
    heart.start()
    until(lambda: len(server.asked) == 4)
    one._silent.set()
    one._hurry()
    heart.join(5)
    paths = [path.removeprefix("/v1/agents/") for path, *_ in server.asked]
    assert paths == ["register", "a1/heartbeat", "register", "a2/heartbeat"] and not heart.is_alive()


def test_a_parked_heartbeat_does_not_go_on_naming_a_job_that_has_ended(host, lone, scripted, tmp_path):
    """The controller hands out no more jobs than there are slots, and counts what the heartbeat names."""
    go = tmp_path / "go"
    over, said, data = threading.Event(), [], host.job(build=f"until [ -e {go} ]; do sleep 0.02; done")

    def answer(path, body, token):
        if path.endswith("register"):
            return 200, {"id": "a1", "session": "s"}, {}
        if not path.endswith("heartbeat"):
            return 200, {}, {}
        said.append([entry["job_id"] for entry in body["running"]])
        if body["running"]:
            go.touch()
            over.wait(20)
        return 200, {"job": data if len(said) == 1 else None, "interval": 0 if len(said) == 1 else 300}, {}

    one = lone(scripted(answer).url).agent
    heart = threading.Thread(target=one._beat, daemon=True)
    heart.start()
    until(lambda: len(said) == 3, timeout=10)
    over.set()
    one._silent.set()
    one._hurry()
    heart.join(5)
    assert said == [[], [data["id"]], []]


def test_the_interval_of_the_answer_is_kept_and_has_a_limit(lone):
    one = lone().agent
    assert [one._obey({"interval": value}) for value in (5, 0, 1e9, -1, "x", None)] == [5.0, 0.0, 300.0, 0.0, 0.0, 0.0]


def test_log_lines_that_are_never_taken_do_not_keep_the_result_back(host, lone, scripted):
    server = scripted(lambda path, *_: (422, {"detail": "no"}, {}) if path.endswith("logs") else (200, {"job": {}}, {}))
    one = lone(server.url)
    one.agent._take(host.job(build="echo hello"))
    until(lambda: not one.agent._holding())
    assert server.asked[-1][1]["status"] == "success"


def test_a_gap_is_closed_from_the_spool(host, lone, scripted):
    """The controller was restored from a backup and knows fewer lines than it had acknowledged."""
    stored, lost = [], []

    def answer(path, body, token):
        if path.endswith("result"):
            return 200, {"job": {}}, {}
        if not lost and len(stored) > 2:
            lost.append(stored.pop())
            return 409, {"detail": "gap", "next_offset": len(stored)}, {}
        stored.extend(line[0] for line in body["lines"][len(stored) - body["offset"] :])
        return 200, {"next_offset": len(stored), "cancel": False}, {}

    one = lone(scripted(answer).url)
    one.agent._take(host.job(build="for i in 1 2 3 4; do echo $i; sleep 0.12; done"))
    until(lambda: not one.agent._holding())
    assert lost and [line for line in stored if line.isdigit()] == ["1", "2", "3", "4"]


def test_a_slow_controller_holds_the_script_back_and_loses_no_line(host, lone, scripted, monkeypatch):
    """Each of its answers comes when the script is as far ahead as it may be."""
    for name, size in (("HELD_FROM", 1 << 18), ("SPOOL_ANEW", 1 << 20), ("SPOOL_LIMIT", 1 << 21)):
        monkeypatch.setattr(agent, name, size)
    stored, ahead = [], []

    def answer(path, body, token):
        if path.endswith("result"):
            return 200, {"job": {}}, {}
        [run] = one.agent._holding()
        until(lambda: run.ended.is_set() or not run.spool.room(0))
        ahead.append(run.spool._end - run.spool._position)
        assert body["offset"] == len(stored)
        stored.extend(line[0] for line in body["lines"])
        return 200, {"next_offset": len(stored), "cancel": False}, {}

    one = lone(scripted(answer).url)
    one.agent._take(host.job(build="seq -f %0999.0f 1 6000"))
    until(lambda: not one.agent._holding())
    assert [int(line) for line in stored if line.isdigit()] == list(range(1, 6001))
    assert max(ahead) < agent.HELD_FROM + 2 * agent.PIPE_BYTES


class Pauses(threading.Event):
    """In place of what wakes the heart: keeps how long it means to pause."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def wait(self, timeout=None):
        self.asked.append(timeout)
        return super().wait(timeout)


def beats(server):
    return [body for path, body, _ in server.asked if path.endswith("heartbeat")]


def welcoming(heartbeat, elsewhere=(200, {}, {})):
    """An answer of a controller that registers all; the rest as given, the heartbeat by its body."""

    def answer(path, body, token):
        if path.endswith("register"):
            return 200, {"id": "a1", "session": "s"}, {}
        return heartbeat(body) if path.endswith("heartbeat") else elsewhere

    return answer


def accepting(*accepts):
    """A controller that takes more in a heartbeat."""
    return lambda path, body, token: (200, {"id": "a1", "session": "s", "accepts": list(accepts)}, {})


def test_labels_go_up_with_the_registration(lone, scripted):
    server = scripted(accepting())
    lone(server.url, labels={"role": "web"}).agent._register()
    lone(server.url).agent._register()
    first, second = [body["capabilities"] for _, body, _ in server.asked]
    assert first["labels"] == {"role": "web"} and second["labels"] == {} and first["agent"] == agent.VERSION


@pytest.mark.parametrize("accepts", [None, [], "current", ["other"], [7], {"current": 1}])
def test_a_controller_that_does_not_ask_for_it_is_not_told_what_is_current(host, lone, scripted, accepts):
    host.deploy()
    server = scripted(lambda path, body, token: (200, {"id": "a1", "session": "s"} | ({"accepts": accepts} if accepts else {}), {}))
    one = lone(server.url).agent
    one._register()
    one._send_heartbeat()
    assert "current" not in beats(server)[0]


OLD_JOB = ("id", "attempt", "app", "repo", "ref", "host", "timeout", "metadata", "spec", "assigned_agent")


@pytest.mark.parametrize("newer", [False, True])
def test_an_older_and_a_newer_controller_are_worked_for(host, lone, scripted, newer):
    """The older one answers no `accepts`, and of a job's spec only what the first agents knew; the newer one more than this agent knows."""
    job, results = host.job(deploy=["cat", "page.txt"]), []
    assert tuple(job) == OLD_JOB and set(job["spec"]) == {"clone_url", "deploy"}
    more = {"later": {"a": [1]}} if newer else {}
    job = {**job, **more, "spec": {**job["spec"], **more}}

    def answer(path, body, token):
        if path.endswith("register"):
            accepts = {"accepts": ["current", "later"]} if newer else {}
            return 200, {"id": "a1", "hostname": "h", "session": "s", **accepts, **more}, {}
        if path.endswith("heartbeat"):
            assert set(body) <= {"status", "running", "session", "wait", *(["current"] if newer else [])}
            return 200, {"job": None if body["running"] or results else job, "cancel": [], **more}, {}
        if path.endswith("logs"):
            return 200, {"next_offset": body["offset"] + len(body["lines"]), "cancel": False, **more}, {}
        results.append(body)
        return 200, {"job": {}, **more}, {}

    alone = lone(scripted(answer).url)
    one = alone.agent
    one._register()
    one._obey(alone.beat())
    until(lambda: not one._holding())
    assert [(body["status"], body["exit_code"]) for body in results] == [("success", 0)] and host.read() == "one\n"
    assert set(results[0]) <= {"attempt", "status", "exit_code", "commit", "reason", "error"}
    one._obey(alone.beat())


def test_a_heartbeat_says_what_is_current_and_looks_at_no_folder_for_it(host, lone, scripted, health, monkeypatch):
    first = host.deploy()["commit"]
    host.deploy(app="never", build="exit 1")
    (host.machine.workdir / "by-hand").mkdir()
    (host.machine.workdir / "by-hand/current").symlink_to("releases/x")
    server = scripted(accepting("current", "more"))
    one = lone(server.url)
    one.agent._register()

    def current():
        with monkeypatch.context() as patch:
            patch.setattr(os, "readlink", None)
            patch.setattr(os, "listdir", None)
            one.beat()
        return beats(server)[-1]["current"]

    assert current() == {"web": first}
    second = host.source.commit({"page.txt": "two\n"})
    seen = []
    pulse = health(lambda handler: (seen.append(current()), handler.send_response(200), handler.end_headers()))
    one.take(host.job(app="other", health_check={"url": pulse.url}))
    assert seen == [{"web": first, "other": second}]  # from the switch on
    one.take(host.job(activate="grep one page.txt"))
    assert current() == {"web": first, "other": second}  # it went back
    one.take(host.job(activate="exit 1", rollback_on_failure=False))
    assert current() == {"web": second, "other": second}  # it stayed
    one.take(host.job(ref=first, reuse=True))
    assert current() == {"web": first, "other": second}
    one.take(host.job(app="new", activate="exit 1"))
    assert "new" not in current()
    one.agent._register()
    assert lone(server.url).agent._current == {"web": first, "other": second}  # the next agent


def test_a_newer_controller_that_gives_way_to_an_older_one_is_not_told(host, lone, scripted):
    host.deploy()
    answers = iter([["current"], None])
    server = scripted(
        lambda path, body, token: (200, {"id": "a1"} | ({"accepts": next(answers)} if "register" in path else {}), {})
    )
    one = lone(server.url).agent
    for _ in range(2):
        one._register()
        one._send_heartbeat()
    assert ["current" in body for body in beats(server)] == [True, False]


@pytest.mark.parametrize(
    ("answer", "least", "most"),
    [
        ((None, {}, {}), 2.0, 2.0),  # a controller that was killed cuts all parked calls in one moment
        ((503, {"detail": "stopping"}, {"Retry-After": "3"}), 5.0, 5.0),
        ((404, {"detail": "unknown"}, {}), 0.01, agent.IDLE_PAUSE),  # it is there: the agent has but to register again
        ((200, {"interval": 7.5}, {}), 7.5, 7.5),
    ],
)
def test_how_long_the_heart_pauses_before_it_comes_back(lone, scripted, answer, least, most):
    server = scripted(welcoming(lambda body: answer))
    one = lone(server.url).agent
    one._backoff = lambda first: agent.Backoff(first, chance=lambda: 0.25)
    one._nudge = pauses = Pauses()
    heart = threading.Thread(target=one._beat, daemon=True)
    heart.start()
    until(lambda: pauses.asked)
    one._silent.set()
    one._hurry()
    heart.join(5)
    (pause,) = pauses.asked
    assert least <= pause <= most and len(beats(server)) == 1 and not heart.is_alive()


def test_a_heart_that_is_interrupted_looks_again_at_once(lone, scripted):
    """Whether that comes before or after it began its call: the controller was not lost."""
    over, server = threading.Event(), scripted(welcoming(lambda body: (200, {"interval": 300 * over.wait(20)}, {})))
    one = lone(server.url).agent
    one._nudge = pauses = Pauses()
    heart = threading.Thread(target=one._beat, daemon=True)
    heart.start()
    until(lambda: len(beats(server)) == 1)
    one._heart.interrupt()
    until(lambda: len(beats(server)) == 2)
    over.set()
    until(lambda: pauses.asked)
    one._silent.set()
    one._hurry()
    heart.join(5)
    assert pauses.asked == [300.0]


def test_a_connection_that_was_hung_up_while_nothing_was_asked_is_not_used_again(scripted):
    controller = agent.Controller(scripted(lambda *asked: (200, {}, {})).url, lambda: None)
    for _ in range(20):
        controller.call("POST", "/", {})
        controller.interrupt(patience=0.01)
        controller.resume()
    controller.close()


def test_a_signal_ends_a_pause_that_the_controller_asked_for(lone, scripted):
    server = scripted(welcoming(lambda body: (200, {"interval": 300}, {})))
    one, codes = lone(server.url).agent, []
    one._nudge = pauses = Pauses()
    main = threading.Thread(target=lambda: codes.append(one.run()), daemon=True)
    main.start()
    until(lambda: pauses.asked)
    one.events.put("signal")
    main.join(20)
    assert codes == [agent.EXIT_DONE] and beats(server)[-1]["status"] == "offline"


def test_a_farewell_that_was_not_heard_is_said_again(lone, scripted):
    said = []

    def hear(body):
        said.append(body["status"])
        return (503, {}, {}) if said == ["online", "offline"] else (200, {"interval": 300}, {})

    one = lone(scripted(welcoming(hear)).url).agent
    one._register()
    assert one._send_heartbeat() == {"interval": 300}
    one._say_goodbye(agent.EXIT_DONE)
    assert said == ["online", "offline", "offline"]


def test_a_job_that_ends_in_a_pause_is_reported_at_once_and_does_not_end_the_pause(host, lone, scripted, tmp_path):
    go = tmp_path / "go"
    data = host.job(build=f"until [ -e {go} ]; do sleep 0.02; done")

    def heartbeat(body):
        return 200, {"interval": 300} if body["running"] else {"job": data}, {}

    server = scripted(welcoming(heartbeat))
    one = lone(server.url).agent
    one._nudge = pauses = Pauses()
    heart = threading.Thread(target=one._beat, daemon=True)
    heart.start()
    until(lambda: 300.0 in pauses.asked)
    go.touch()
    until(lambda: not one._holding())
    assert [path for path, *_ in server.asked if path.endswith("result")] and not pauses.is_set()
    one._silent.set()
    one._hurry()
    heart.join(5)
    assert len(beats(server)) == 2


# What is tracked, and what is fenced off


def test_a_script_is_tracked_on_disk_before_it_starts(host, lone, monkeypatch, variables):
    events, fsync, start, jobs = [], os.fsync, agent.CHILDREN.start, str(host.machine.workdir / ".agent/jobs")

    def sync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.startswith(jobs):  # the threads of an earlier test may still have something to sync
            events.append(path.removeprefix(jobs))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(agent.CHILDREN, "start", lambda *args: (events.append("started"), start(*args))[1])
    variables["JOBS"] = jobs
    one = lone()
    file = '"$JOBS/$DEPLOY_JOB_ID.1.json"'
    noted = f'until grep -q "leader.: .$$," {file}; do sleep 0.02; done'  # a moment later, for whoever comes after a crash
    one.take(host.job(deploy=f'grep -c "state.: .running" {file}; {noted}; exit 3'))
    [run] = one.agent._holding()
    assert events[:3] == [f"/{run.key.job_id}.1.json.new", "", "started"]  # the file, its folder
    assert [line for line in spooled(run) if not line.startswith("[")] == ["1"]


def spooled(run):
    return [json.loads(line)[0] for line in run.entry.spool_path.read_text().splitlines()]


@pytest.mark.parametrize("where", ["logs", "heartbeat", "result"])
def test_a_script_ends_when_its_attempt_is_no_longer_its_own(host, lone, scripted, tmp_path, variables, where):
    """409 to its logs ends one that prints; one that is silent learns it from the heartbeat; a result is then not wanted."""
    variables["PIDS"] = str(tmp_path / "pids")
    noise = "echo noise; " if where == "logs" else ""
    wait = "sleep 60" if where != "result" else "exit 3"
    data = host.job(deploy=f'sleep 70 & echo $! $$ >"$PIDS"; {noise}{wait}')
    named = []

    def answer(path, body, token):
        if path.endswith("register"):
            return 200, {"id": "a1", "session": "s"}, {}
        runs = bool((tmp_path / "pids").exists() and (tmp_path / "pids").read_text())
        if not path.endswith("heartbeat"):
            fenced = path.endswith("result") or (path.endswith(where) and runs)
            return (409, {"detail": "attempt 2 is running"}, {}) if fenced else (200, {}, {})
        named.append([entry["job_id"] for entry in body["running"]])
        cancel = named[-1] if where == "heartbeat" and runs else []
        return 200, {"job": data if len(named) == 1 else None, "cancel": cancel, "interval": 0.05}, {}

    server = scripted(answer)
    one = lone(server.url).agent
    heart = threading.Thread(target=one._beat, daemon=True)
    heart.start()
    until(lambda: len(named) > 2 and named[-1] == [] and (tmp_path / "pids").exists())  # it may end before a heartbeat names it
    one._silent.set()
    one._hurry()
    heart.join(5)
    assert not any(lives(int(pid)) for pid in (tmp_path / "pids").read_text().split())
    assert one._journal.find(agent.JobKey(data["id"], 1)).data["state"] == "done"


@pytest.mark.parametrize("cancel", [False, True])
def test_a_newer_attempt_ends_the_older_one_and_is_not_cancelled_in_its_place(host, lone, tmp_path, variables, cancel):
    """`cancel` has job ids alone: of two attempts it means the one that the controller has given up."""
    variables |= {"LEDGER": str(tmp_path / "ledger")}
    script = 'echo $$ >>"$LEDGER"; [ $(wc -l <"$LEDGER") = 2 ] || sleep 60'
    data = host.job(deploy=script)
    one = lone()
    one.agent._take(data)
    until((tmp_path / "ledger").exists)
    one.agent._take(data | {"attempt": 2})
    if cancel:
        one.agent._obey({"cancel": [data["id"]]})
    runs = sorted(one.agent._holding(), key=lambda run: run.key)
    assert all(run.ended.wait(20) for run in runs)
    assert [run.entry.result["status"] for run in runs] == ["cancelled", "success"]
    assert runs[0].entry.result["error"] == "the controller gave this job up"


def test_a_cancel_of_the_only_attempt_is_a_cancel(host, lone, tmp_path, variables):
    variables["LEDGER"] = str(tmp_path / "ledger")
    one = lone()
    data = host.job(deploy='touch "$LEDGER"; sleep 60')
    one.agent._take(data)
    until((tmp_path / "ledger").exists)
    one.agent._obey({"cancel": [data["id"]]})
    [run] = one.agent._holding()
    assert run.ended.wait(20) and run.entry.result["error"] == "cancelled"


def test_what_a_dead_agent_left_of_an_app_is_ended_before_its_next_job_starts(host, lone, scripted, tmp_path, variables):
    host.machine.grace = 1.0  # the newer one has the time to start, if it is let
    variables |= {"NEW": str(tmp_path / "new"), "OVERLAP": str(tmp_path / "overlap")}
    data = host.job(deploy='touch "$NEW"; sleep 0.1')
    entry = host.journal.begin(data, agent.boot_id())
    script = 'trap "" TERM; echo; while :; do [ -e "$NEW" ] && touch "$OVERLAP"; sleep 0.02; done'
    child = subprocess.Popen(
        ["sh", "-c", script], env={**host.machine.env, **variables, "DEPLOY_JOB_ID": data["id"]}, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    child.stdout.readline()
    entry.note(leader=[child.pid, agent.read_stat(child.pid).start])
    results, handed, following = {}, [], data | {"id": str(uuid.uuid4())}

    def answer(path, body, token):
        if path.endswith("register"):
            return 200, {"id": "a1", "session": "s"}, {}
        if path.endswith("result"):
            results[path.split("/")[3]] = (body["status"], body.get("reason"))
        job = following if path.endswith("heartbeat") and not handed else None
        handed.extend([job] if job else [])
        return 200, {"job": job, "interval": 0.05}, {}

    one = lone(scripted(answer).url).agent
    thread = threading.Thread(target=one.run, daemon=True)
    thread.start()
    until(lambda: len(results) == 2)
    one.events.put("signal")
    thread.join(10)
    child.wait()
    child.stdout.close()
    assert not thread.is_alive() and not (tmp_path / "overlap").exists()
    assert results == {data["id"]: ("failed", "agent_crashed"), following["id"]: ("success", None)}


class Restored:
    """A controller that has the first `kept` lines of a job's log, as one does that was restored from a backup."""

    def __init__(self, scripted, kept):
        self.lines, self.results = [f"line {number}" for number in range(kept)], []
        self.url = scripted(self._answer).url

    def _answer(self, path, body, token):
        if path.endswith("result"):
            self.results.append(body)
            return 200, {"job": {}}, {}
        if body["offset"] > len(self.lines):
            return 409, {"detail": "a gap", "next_offset": len(self.lines)}, {}
        self.lines += [line[0] for line in body["lines"][len(self.lines) - body["offset"] :]]
        return 200, {"next_offset": len(self.lines), "cancel": False}, {}


@pytest.mark.parametrize("kept", [0, 3, 8])
def test_a_job_that_a_restored_controller_hands_out_again_is_answered_and_its_gap_filled(host, lone, scripted, tmp_path, kept):
    """Its 8 lines were acknowledged, and are gone here."""
    data = host.job(deploy=f"touch {tmp_path}/again")
    entry = host.journal.begin(data, agent.boot_id())
    entry.end({"status": "failed", "reason": "exit_code", "exit_code": 6, "error": "as it was"})
    entry.done(8)
    controller = Restored(scripted, kept)
    one = lone(controller.url)
    one.agent._take(data)
    until(lambda: not one.agent._holding())
    gap = [f"[deploybot] {8 - kept} line(s) are missing here: the controller lost them, and this host no longer has them"]
    again = "[deploybot] this attempt ended before; its result goes up again"
    assert controller.lines[kept:] == (gap if kept < 8 else []) + [again]
    assert [(body["exit_code"], body["error"]) for body in controller.results] == [(6, "as it was")]
    assert not (tmp_path / "again").exists()
    one.agent._take(data)  # and once more: the lines since count, too
    until(lambda: not one.agent._holding())
    assert controller.lines[-1] == again and len(controller.lines) == kept + (3 if kept < 8 else 2)


def test_a_bridge_over_a_gap_is_sent_again_like_any_line(tmp_path):
    spool = agent.Spool(tmp_path / "log", first=8)
    spool.write(b"a\nb\n")
    spool.close()

    def batch():
        return spool.offset, messages(spool.batch(0))

    assert batch() == (8, ["a", "b"])
    spool.seek(3)
    offset, lines = batch()
    assert offset == 3 and lines[0].startswith("[deploybot] 5 line(s) are missing") and lines[1:] == ["a", "b"]
    spool.seek(3)  # the answer was lost
    assert batch() == (3, lines)
    spool.seek(4)
    assert batch() == (4, ["a", "b"])
    spool.seek(3)
    spool.seek(5)
    assert batch() == (5, ["b"])
    spool.seek(1)  # restored once more, from an older backup
    offset, lines = batch()
    assert offset == 1 and lines[0].startswith("[deploybot] 3 line(s) are missing") and lines[1:] == ["a", "b"]
    spool.seek(4)
    assert spool.batch(0) is None


@pytest.mark.parametrize("wanted", [lambda offset: offset, lambda offset: (offset + 1) % 3, lambda offset: 10**9])
def test_a_controller_that_names_gaps_without_end_gets_the_result_all_the_same(host, lone, scripted, wanted):
    def answer(path, body, token):
        if path.endswith("logs"):
            return 409, {"detail": "a gap", "next_offset": wanted(body["offset"])}, {}
        return 200, {"job": {}}, {}

    server = scripted(answer)
    one = lone(server.url)
    one.agent._take(host.job(build="echo 1; sleep 0.1; echo 2; sleep 0.1; echo 3"))
    until(lambda: not one.agent._holding())
    assert server.asked[-1][1]["status"] == "success" and len(server.asked) < 40


# A controller with a certificate


@pytest.fixture
def over_tls(make_controller, authority):
    made = make_controller(tls_cert=authority / "cert.pem", tls_key=authority / "key.pem", open=False, agent_token="dbt_agent")
    return f"https://localhost:{made.port}"


def test_a_private_ca_is_trusted_where_it_is_named_and_refused_where_not(lone, over_tls, authority, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    said = r"^its certificate is of a CA that this machine does not know: name the file of that CA in SSL_CERT_FILE \("
    with pytest.raises(agent.Unreachable, match=said):
        lone(over_tls, token="dbt_agent").agent._register()
    monkeypatch.setenv("SSL_CERT_FILE", str(authority / "ca.pem"))
    one = lone(over_tls, token="dbt_agent").agent
    one._register()
    assert one._identity
    by_address = over_tls.replace("localhost", "127.0.0.1")
    with pytest.raises(agent.Unreachable, match=r"^its certificate is refused: IP address mismatch"):
        lone(by_address, token="dbt_agent").agent._register()


# Whole agents


class Gate:
    """Stands between agent and controller: `open` or not, and may lose answers on their way back."""

    def __init__(self, url):
        host, port = url.removeprefix("http://").split(":")
        self._target = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self._open = True
        self._pairs = set()
        self.lose_answers = 0
        self.heartbeats = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                if not self._open:
                    client.close()
                    continue
                with contextlib.suppress(OSError):
                    pair = (client, socket.create_connection(self._target))
                    self._pairs.add(pair)
                    for from_, to, answers in ((*pair, False), (*pair[::-1], True)):
                        threading.Thread(target=self._pass_on, args=(pair, from_, to, answers), daemon=True).start()

    def _pass_on(self, pair, from_, to, answers):
        with contextlib.suppress(OSError):
            while data := from_.recv(65536):
                self.heartbeats += data.count(b"/heartbeat HTTP/1.1")
                if answers and self.lose_answers:
                    self.lose_answers -= 1
                    break
                to.sendall(data)
        with contextlib.suppress(OSError):
            to.shutdown(socket.SHUT_WR)
        if answers:
            self._cut(pair)

    def _cut(self, pair):
        for sock in pair:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._pairs.discard(pair)

    def shut(self):
        self._open = False
        for pair in list(self._pairs):
            self._cut(pair)

    def reopen(self):
        self._open = True

    def close(self):
        self.shut()
        self._server.close()


RUNNER = f"""
import functools, os, sys
sys.path.insert(0, {str(ROOT)!r})
import agent
agent.VERSION = os.environ.get("TEST_VERSION", agent.VERSION)
agent.Machine = functools.partial(agent.Machine, grace={GRACE})
agent.BACKOFF_LIMIT = 0.5
agent.HELD_FROM, agent.HELD_FOR = 1 << 20, 0.5
sys.exit(agent.main())
"""


class Site:
    """A controller, a repository, and agents as real processes."""

    def __init__(self, controller, source, env, tmp_path):
        self.controller, self.source, self.env, self.tmp_path = controller, source, env, tmp_path
        self.variables = {}  # of the scripts
        self.gate = Gate(controller.url)
        self.processes = []

    def start(self, *flags, hostname="h", work="work", **variables):
        settings = {
            "DEPLOYBOT_URL": self.gate.url, "DEPLOYBOT_HOSTNAME": hostname, "DEPLOYBOT_WORKDIR": str(self.tmp_path / work),
            "DEPLOYBOT_GIT_PROTOCOLS": "file", "DEPLOYBOT_ENV_FILE": self.env_file(), **variables,
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-c", RUNNER, *flags], env=self.env | settings, stderr=subprocess.PIPE, start_new_session=True
        )
        process.errors = []
        process.reader = threading.Thread(target=lambda: process.errors.extend(process.stderr), daemon=True)
        process.reader.start()
        self.processes.append(process)
        return process

    def env_file(self):
        path = self.tmp_path / "variables.env"
        path.touch(mode=0o600)
        path.write_text("".join(f"{name}='{value}'\n" for name, value in self.variables.items()))
        return str(path)

    def apps(self, *names, hosts=("h",), **commands):
        entries = [{"name": name, "repo": "o/n", "clone_url": self.source.url, "hosts": hosts, **commands} for name in names]
        self.controller.apps_file.write_text(json.dumps({"apps": entries}))
        self.controller.ok("POST", "/v1/reload")

    def submit(self, ref="main", app="web", host="h", **more):
        return self.controller.create(ref, host, "o/n", app=app, **more)["id"]

    def job(self, job_id):
        return self.controller.job(job_id)

    def ended(self, job_id):
        return until(lambda: self.job(job_id)["completed_at"] and self.job(job_id), what=f"the end of {job_id}")

    def messages(self, job_id):
        return [line["message"] for line in self.controller.lines({"id": job_id}, limit=10_000)]

    def output(self, job_id):
        """The output of the scripts, less its newlines."""
        return "".join(line for line in self.messages(job_id) if not line.startswith("[deploybot]"))

    def agent_status(self):
        return self.controller.ok("GET", "/v1/hosts")["hosts"][0]["agent_status"]

    def close(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            process.reader.join(5)
            process.stderr.close()
        self.gate.close()


@pytest.fixture
def site(controller, source, env, tmp_path):
    made = Site(controller, source, env, tmp_path)
    yield made
    made.close()


def script_app(site, files, **spec):
    site.source.commit(files)
    site.apps("web", **(spec or {"deploy": ["./run"]}))


def test_an_agent_deploys_what_is_asked_for_and_tells_the_commit(site):
    script_app(site, {"run": "#!/bin/sh\necho hello from $DEPLOY_HOST\n"})
    process = site.start()
    job_id = site.submit()
    job = site.ended(job_id)
    assert (job["status"], job["exit_code"], job["commit"]) == ("success", 0, site.source.git("rev-parse", "main"))
    assert site.output(job_id) == "hello from h"
    second = site.submit()  # the same agent takes one after another
    assert site.ended(second)["status"] == "success"
    assert process.poll() is None


@pytest.mark.parametrize("version, behind", [("0.0.9", True), ("0.2.0", False)])
def test_an_agent_one_minor_version_older_or_newer_works(site, version, behind):
    script_app(site, {"run": "#!/bin/sh\necho hello\n"}, deploy=["./run"], shared=["log/"])
    site.start(TEST_VERSION=version)
    job_id = site.submit()
    assert site.ended(job_id)["status"] == "success" and site.output(job_id) == "hello"
    (host,) = site.controller.ok("GET", "/v1/hosts")["hosts"]
    assert (host["agent_version"], host["behind"], host["agent_status"]) == (version, behind, "online")


def test_a_closed_controller_knows_an_agent_by_its_own_secret(make_controller, source, env, tmp_path):
    closed = make_controller(open=False, agent_token="dbt_agent")
    closed.token = (closed.folder / "admin.token").read_text().strip()
    site = Site(closed, source, env, tmp_path)
    try:
        script_app(site, {"run": "#!/bin/sh\nenv | grep -c dbt_\ntrue\n"})
        stranger = site.start("--once", work="stranger", DEPLOYBOT_AGENT_TOKEN="dbt_wrong")
        until(lambda: any(b"refused: 401" in line for line in stranger.errors))
        stranger.kill()
        job_id = site.submit()
        assert site.start("--once", DEPLOYBOT_AGENT_TOKEN="dbt_agent").wait(15) == agent.EXIT_DONE
        assert site.output(job_id) == "0"
        job_id = site.submit(force=True)
        assert site.start("--once").wait(15) == agent.EXIT_DONE  # known by now
        assert site.job(job_id)["status"] == "success"
    finally:
        site.close()


def test_a_restart_of_the_controller_disturbs_no_job(site):
    site.variables["GO"] = str(site.tmp_path / "go")
    script_app(site, {"run": WAITING})
    process = site.start()
    job_id = site.submit()
    until(lambda: "begun" in site.output(job_id))
    site.controller.restart()
    (site.tmp_path / "go").touch()
    assert site.ended(job_id)["status"] == "success" and site.output(job_id) == "begunfinished"
    assert site.ended(site.submit(force=True))["status"] == "success"
    assert process.poll() is None


def test_output_is_seen_while_the_script_runs_prompts_as_well(site):
    script_app(site, {"run": '#!/bin/sh\necho line\nprintf "Continue? "\nuntil [ -e "$DEPLOY_RELEASE/go" ]; do sleep 0.02; done\n'})
    site.start()
    job_id = site.submit()
    until(lambda: site.output(job_id) == "lineContinue? ")
    assert site.job(job_id)["commit"] == site.source.git("rev-parse", "main") and site.job(job_id)["status"] == "running"
    (next((site.tmp_path / "work/web/releases").iterdir()) / "go").touch()
    assert site.ended(job_id)["status"] == "success"


# Its grandchild leaves group, session and environment behind, ignores TERM, and counts without newlines.
COUNTING = """#!/bin/sh
echo $$ >>"$PIDS"
exec python3 - "$PIDS" 3>&1 <<'END'
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork():
        os._exit(0)
    code = '''
import os, sys, time
open(sys.argv[1], "a").write(f"{os.getpid()}\\\\n")
number = 0
while True:
    try:
        os.write(1, f"<{number}>".encode())
    except OSError:
        pass
    number += 1
    time.sleep(0.002)
'''
    os.execvpe(sys.executable, ["python3", "-c", code, sys.argv[1]], EMPTY)
time.sleep(600)
END
"""
CUTS = {"cancel": "{}", "timeout": "{}", "kill -9": "os.environ"}


@pytest.mark.parametrize("how", ["cancel", "timeout", "kill -9"])
def test_nothing_runs_on_and_every_byte_is_stored_once(site, how):
    """After kill -9 nothing but the mark in the environment is left to find a daemon by; else an empty one hides nobody."""
    pids = site.tmp_path / "pids"
    site.variables["PIDS"] = str(pids)
    script_app(site, {"run": COUNTING.replace("EMPTY", CUTS[how])})
    process = site.start()
    job_id = site.submit(timeout=2 if how == "timeout" else 60)
    until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    until(lambda: "<50>" in site.output(job_id))
    if how == "cancel":
        site.controller.ok("POST", f"/v1/jobs/{job_id}/cancel")
    elif how == "kill -9":
        process.kill()
        process.wait()
        assert all(lives(int(pid)) for pid in pids.read_text().split())
        site.start()
    job = site.ended(job_id)
    expected = {"cancel": ("cancelled", "cancelled"), "timeout": ("failed", "timeout"), "kill -9": ("failed", "agent_crashed")}
    assert (job["status"], job["reason"]) == expected[how]
    assert not any(lives(int(pid)) for pid in pids.read_text().split())
    numbers = re.fullmatch(r"((?:<\d+>)*)(?:<\d*)?(Terminated|Killed)?", site.output(job_id))[1]
    assert re.findall(r"\d+", numbers) == [str(number) for number in range(numbers.count("<"))]


def test_the_script_goes_on_while_the_controller_is_away(site):
    """Held back at first, then more than 1 MiB waits on disk; answers that get lost on the way make no line come twice."""
    wait = 'echo begun\nuntil [ -e "$GO" ]; do sleep 0.02; done'
    script_app(site, {"run": f'#!/bin/sh\n{wait}\nseq -f %030.0f 1 20000\ntouch "$GO.done"\n'})
    site.variables["GO"] = str(site.tmp_path / "go")
    site.start()
    job_id = site.submit()
    until(lambda: "begun" in site.output(job_id))
    site.gate.shut()
    (site.tmp_path / "go").touch()
    until((site.tmp_path / "go.done").exists)
    state = site.tmp_path / "work/.agent/jobs"
    until(lambda: [path for path in state.glob("*.json") if json.loads(path.read_text())["state"] == "ended"])
    assert sum(path.stat().st_size for path in state.glob("*.log")) > 1 << 20
    assert site.job(job_id)["status"] == "running"
    site.gate.lose_answers = 6
    site.gate.reopen()
    assert site.ended(job_id)["status"] == "success"
    lines = [line for line in site.messages(job_id) if line.isdigit()]
    assert lines == [f"{number:030}" for number in range(1, 20_001)]
    assert site.gate.lose_answers == 0


def test_a_result_outlives_its_agent(site):
    script_app(site, {"run": '#!/bin/sh\nuntil [ -e "$GO" ]; do sleep 0.02; done\necho the last words\nexit 6\n'})
    site.variables["GO"] = str(site.tmp_path / "go")
    first = site.start()
    job_id = site.submit()
    until(lambda: "running" in "".join(site.messages(job_id)))
    site.gate.shut()
    (site.tmp_path / "go").touch()
    [path] = (site.tmp_path / "work/.agent/jobs").glob("*.json")
    until(lambda: json.loads(path.read_text())["state"] == "ended")
    first.kill()
    first.wait()
    site.gate.reopen()
    site.start()
    job = site.ended(job_id)
    assert (job["status"], job["reason"], job["exit_code"]) == ("failed", "exit_code", 6)
    assert site.output(job_id) == "the last words"
    until(lambda: json.loads(path.read_text())["state"] == "done")
    until(lambda: not path.with_suffix(".log").exists())


WAITING = '#!/bin/sh\necho begun\nuntil [ -e "$GO" ]; do sleep 0.02; done\necho finished\n'


def test_term_lets_the_running_job_finish_and_takes_no_other(site):
    site.variables["GO"] = str(site.tmp_path / "go")
    script_app(site, {"run": WAITING})
    process = site.start("--slots=2")
    job_id = site.submit()
    until(lambda: "begun" in site.output(job_id) and site.gate.heartbeats >= 2)  # the second one is parked
    process.terminate()
    until(lambda: any(b"still to finish" in line for line in process.errors))
    other = site.submit(ref="refs/heads/main")
    until(lambda: site.agent_status() == "offline")
    (site.tmp_path / "go").touch()
    assert process.wait(15) == agent.EXIT_DONE
    assert site.job(job_id)["status"] == "success" and site.output(job_id) == "begunfinished"
    assert site.job(other)["status"] == "pending"


def test_a_second_term_stops_the_job(site):
    site.variables["GO"] = str(site.tmp_path / "go")
    script_app(site, {"run": WAITING})
    process = site.start()
    job_id = site.submit()
    until(lambda: "begun" in site.output(job_id))
    process.terminate()
    until(lambda: any(b"still to finish" in line for line in process.errors))
    process.terminate()
    assert process.wait(15) == agent.EXIT_DONE
    job = site.job(job_id)
    assert (job["status"], job["reason"], job["error"]) == ("cancelled", "cancelled", "the agent was stopped")


def test_an_idle_agent_ends_at_once_and_says_so(site):
    process = site.start()
    until(lambda: any(b"registered" in line for line in process.errors))
    until(lambda: site.agent_status() == "online")
    begun = time.monotonic()
    process.terminate()
    assert process.wait(15) == agent.EXIT_DONE and time.monotonic() - begun < 5
    assert site.agent_status() == "offline", process.errors


@pytest.mark.parametrize(("code", "expected"), [(0, agent.EXIT_DONE), (5, agent.EXIT_FAILED)])
def test_once_takes_one_job_and_ends(site, code, expected):
    script_app(site, {"run": f"#!/bin/sh\nexit {code}\n"})
    first, second = site.submit(), site.submit(ref="refs/heads/main")
    assert site.start("--once").wait(15) == expected
    assert site.job(first)["exit_code"] == code and site.job(second)["status"] == "pending"


def test_the_older_of_two_agents_with_one_hostname_ends(site):
    script_app(site, {"run": "#!/bin/sh\necho ran >>$LEDGER\n"})
    site.variables["LEDGER"] = str(site.tmp_path / "ledger")
    older = site.start(work="one")
    until(lambda: site.gate.heartbeats and site.agent_status() == "online")  # parked: in open mode only such a one is told 409
    newer = site.start(work="two", DEPLOYBOT_AGENT_TOKEN="")
    assert older.wait(15) == agent.EXIT_NEWER
    site.ended(site.submit())
    assert newer.poll() is None and (site.tmp_path / "ledger").read_text() == "ran\n"
    assert (site.tmp_path / "two/web/current").exists() and not (site.tmp_path / "one/web").exists()


def test_two_agents_do_not_share_a_folder(site):
    first = site.start()
    until(lambda: any(b"registered" in line for line in first.errors))
    second = site.start()
    assert second.wait(15) == agent.EXIT_BUSY
    assert first.poll() is None


def test_slots_run_jobs_of_different_apps_at_once(site):
    script_app(
        site, {"run": '#!/bin/sh\ntouch "$MEET.$DEPLOY_APP"\nuntil [ -e "$MEET.web" -a -e "$MEET.api" ]; do sleep 0.02; done\n'}
    )
    site.apps("web", "api", deploy=["./run"])
    site.variables["MEET"] = str(site.tmp_path / "meet")
    site.start("--slots=2")
    jobs = [site.submit(app=app, timeout=15) for app in ("web", "api")]
    assert [site.ended(job_id)["status"] for job_id in jobs] == ["success", "success"]


@pytest.fixture
def closed_site(make_controller, source, env, tmp_path):
    """A controller that wants tokens."""
    closed = make_controller(open=False, token="dbt_admin", agent_token="dbt_enrol")
    made = Site(closed, source, env, tmp_path)
    yield made
    made.close()


def create_token(site, **more):
    return site.controller.ok("POST", "/v1/tokens", {"role": "agent", **more})["secret"]


def test_two_agents_of_one_host_never_run_an_app_at_once_whatever_their_folders(closed_site):
    """The older one hangs in the middle of a script. Its host is reset for a newer one; the older one's job is given up, the newer
    one gets the next, and waits for what the older one left; that one ends, and its script with it, once it hears of it."""
    site = closed_site
    site.variables |= {"LEDGER": str(site.tmp_path / "ledger"), "GO": str(site.tmp_path / "go")}
    script = 'echo begun >>"$LEDGER"\n[ -e "$GO" ] || sleep 60 || exit\necho ended >>"$LEDGER"\n'
    script_app(site, {"run": f"#!/bin/sh\n{script}"})
    older = site.start(work="one", DEPLOYBOT_AGENT_TOKEN="dbt_enrol")
    first = site.submit()
    ledger = site.tmp_path / "ledger"
    until(ledger.exists)
    older.send_signal(signal.SIGSTOP)
    site.controller.ok("POST", "/v1/hosts/h/reset")
    newer = site.start(work="two", DEPLOYBOT_AGENT_TOKEN="dbt_enrol")
    try:
        assert site.ended(first)["reason"] == "agent_crashed"
        (site.tmp_path / "go").touch()
        second = site.submit()
        waits = "[deploybot] waiting for another job of web on this host"
        until(lambda: waits in site.messages(second))
        assert ledger.read_text().split() == ["begun"]
    finally:
        older.send_signal(signal.SIGCONT)
    assert older.wait(15) == agent.EXIT_NEWER
    assert site.ended(second)["status"] == "success" and newer.poll() is None
    assert ledger.read_text().split() == ["begun", "begun", "ended"]


def test_a_token_of_a_host_lets_its_agent_in_and_no_other(closed_site):
    site = closed_site
    script_app(site, {"run": "#!/bin/sh\ntrue\n"})
    token = create_token(site, host="h")
    other = site.start("--once", hostname="other", work="other", DEPLOYBOT_AGENT_TOKEN=token)
    until(lambda: any(b"refused: 40" in line for line in other.errors))
    job_id = site.submit()
    assert site.start("--once", DEPLOYBOT_AGENT_TOKEN=token).wait(15) == agent.EXIT_DONE
    assert site.job(job_id)["status"] == "success"
    lost = site.start("--once", work="a-new-disk", DEPLOYBOT_AGENT_TOKEN=token)
    until(lambda: any(b"hosts reset h" in line for line in lost.errors))


def test_a_host_that_was_reset_registers_anew_with_its_token_and_its_script_goes_on(closed_site):
    site = closed_site
    site.variables["GO"] = str(site.tmp_path / "go")
    script_app(site, {"run": WAITING})
    process = site.start(DEPLOYBOT_AGENT_TOKEN="dbt_enrol")
    first = site.submit()
    until(lambda: "begun" in site.output(first))
    site.controller.ok("POST", "/v1/hosts/h/reset")
    until(lambda: sum(b"registered as" in line for line in process.errors) == 2)
    (site.tmp_path / "go").touch()
    assert site.ended(first)["status"] == "success" and site.output(first) == "begunfinished"
    process.kill()
    process.wait()
    alone = site.start()  # without a token it is let in by its own secret
    until(lambda: any(b"registered as" in line for line in alone.errors))
    site.controller.ok("POST", "/v1/hosts/h/reset")
    until(lambda: any(b"the secret of this host is no longer known there" in line for line in alone.errors))
    assert alone.poll() is None


@as_root
def test_run_as_allow_repo_and_env_file_in_a_whole_agent(site, public):
    site.variables |= {"PASSWORD": "hunter2000"}
    script_app(site, {"run": '#!/bin/sh\nid -un\necho "$PASSWORD"\ncat "$DEPLOY_RELEASE/../../../.agent/secret"\nexit 3\n'})
    process = site.start("--run-as=nobody", "--allow-repo=O/*", work=public / "work")
    job_id = site.submit()
    assert site.ended(job_id)["exit_code"] == 3
    assert re.fullmatch(r"nobody\*\*\*cat: .*/\.agent/secret'?: Permission denied", site.output(job_id))
    site.controller.apps_file.write_text("")
    site.controller.ok("POST", "/v1/reload")
    other = site.controller.create("main", "h", "someone/else")["id"]
    assert site.ended(other)["reason"] == "rejected" and "--allow-repo is o/*" in site.job(other)["error"]
    assert process.poll() is None


def test_an_agent_hides_its_own_tokens_too(closed_site):
    """Where scripts are the agent's user they can read its secret; the log, which more people read, does not show it."""
    site = closed_site
    script_app(site, {"run": '#!/bin/sh\ncat "$DEPLOY_RELEASE/../../../.agent/secret"\necho dbt_enrol\n'})
    site.start(DEPLOYBOT_AGENT_TOKEN="dbt_enrol")
    job_id = site.submit()
    assert site.ended(job_id)["status"] == "success" and site.output(job_id) == "******"


@contextlib.contextmanager
def shell_agent(site, command="true", hostname="sh-host", **variables):
    process = subprocess.Popen(
        ["sh", ROOT / "examples/agent.sh", hostname, command], start_new_session=True, cwd=site.tmp_path,
        env=site.env | {"DEPLOYBOT_URL": site.gate.url, **variables}, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()


def test_the_shell_agent_does_it_with_four_calls(site):
    words = 'a "quoted" \\\\ back\\\\slash\ttab € end'
    site.apps("web", hosts=["sh-host"])
    command = f"printf '%s\\n' '{words}' \"$DEPLOY_REF\"; printf unterminated; env | grep -c TOKEN; exit 3"
    with shell_agent(site, command, TOKEN="exported by someone"):
        job_id = site.submit(host="sh-host", ref="it;touch${IFS}canary")
        job = site.ended(job_id)
        assert (job["status"], job["exit_code"], job["reason"]) == ("failed", 3, "exit_code")
        assert site.messages(job_id) == [words.replace("\t", " "), "it;touch${IFS}canary", "unterminated0"]
        assert not (site.tmp_path / "canary").exists()
        second = site.submit(host="sh-host")
        assert site.ended(second)["status"] == "failed"


def test_the_shell_agent_keeps_the_secret_that_it_enrols_for(closed_site, env):
    site, kept = closed_site, Path(env["HOME"], ".deploybot-sh-host")
    site.apps("web", hosts=["sh-host"])

    def deploys(**variables):
        with shell_agent(site, "env | grep -c dbt_", **variables):
            job_id = site.submit(host="sh-host", force=True)
            return site.ended(job_id)["exit_code"] == 1 and site.output(job_id) == "0"

    assert deploys(DEPLOYBOT_AGENT_TOKEN="dbt_enrol")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600 and kept.read_text().startswith("dbt_")
    assert deploys()
    secret = kept.read_text()
    site.controller.ok("POST", "/v1/hosts/sh-host/reset")
    assert deploys(DEPLOYBOT_AGENT_TOKEN="dbt_enrol") and kept.read_text() != secret
    with shell_agent(site, hostname="other", DEPLOYBOT_AGENT_TOKEN="dbt_wrong") as process:
        assert process.wait(15) == 1 and b"401" in process.stderr.read()


def test_the_shell_agent_takes_a_token_of_its_host(closed_site, env):
    site = closed_site
    site.apps("web", hosts=["sh-host"])
    with shell_agent(site, DEPLOYBOT_AGENT_TOKEN=create_token(site, host="sh-host")):
        assert site.ended(site.submit(host="sh-host"))["status"] == "success"
    assert not Path(env["HOME"], ".deploybot-sh-host").exists()


def test_a_whole_agent_over_tls(make_controller, authority, source, env, tmp_path):
    closed = make_controller(
        tls_cert=authority / "cert.pem", tls_key=authority / "key.pem", open=False, agent_token="dbt_enrol", token="dbt_admin"
    )
    site = Site(closed, source, env, tmp_path)
    try:
        settings = {"DEPLOYBOT_URL": f"https://localhost:{closed.port}", "DEPLOYBOT_AGENT_TOKEN": "dbt_enrol"}
        stranger = site.start(**settings)
        until(lambda: any(b"SSL_CERT_FILE" in line for line in stranger.errors))
        stranger.kill()
        stranger.wait()
        process = site.start(**settings, SSL_CERT_FILE=str(authority / "ca.pem"))
        until(lambda: any(b"registered as h at https" in line for line in process.errors))
    finally:
        site.close()


def test_a_script_goes_on_while_its_controller_is_restored_from_a_backup(site):
    """What it printed since the backup goes up again; what had ended here and not there is answered again, and not run."""
    database, copy = site.controller.folder / "deploybot.db", site.tmp_path / "backup.db"
    site.variables |= {"GO": str(site.tmp_path / "go"), "LEDGER": str(site.tmp_path / "ledger")}
    print_and_wait = 'echo $1 >>"$LEDGER"; echo "begun $1"; until [ -e "$GO.$1" ]; do sleep 0.02; done; echo "finished $1"\n'
    site.source.commit({"run": f'#!/bin/sh\nset "$DEPLOY_APP"\n{print_and_wait}'})
    site.apps("web", "api", deploy=["./run"])
    process = site.start("--slots=2")
    jobs = {app: site.submit(app=app) for app in ("web", "api")}
    for app, job_id in jobs.items():
        until(lambda: f"begun {app}" in site.output(job_id))  # noqa: B023
    subprocess.run([*command("deploybot.py"), "backup", copy, "--db", database], check=True)
    (site.tmp_path / "go.web").touch()
    assert site.ended(jobs["web"])["status"] == "success"
    site.controller.stop()
    subprocess.run([*command("deploybot.py"), "restore", copy, "--db", database], check=True)
    site.controller.restart()
    (site.tmp_path / "go.api").touch()
    assert site.ended(jobs["api"])["status"] == "success" and site.output(jobs["api"]) == "begun apifinished api"
    assert site.ended(jobs["web"])["status"] == "success" and process.poll() is None
    gap, again = site.messages(jobs["web"])[-2:]
    assert "line(s) are missing here" in gap and again == "[deploybot] this attempt ended before; its result goes up again"
    assert sorted((site.tmp_path / "ledger").read_text().split()) == ["api", "web"]
