"""A request that repeats the head of the one before: what is kept of that head is right for it, and not once longer than it may.

Each test sends the same bytes over one connection, as an agent does, and changes what the answer depends on in between.
"""

import json
import socket
import time

import pytest
from conftest import TOKENS, FakeClock, wait_for

AT = "/v1/agents/{}/heartbeat"


class Wire:
    """One connection that is kept."""

    def __init__(self, port):
        self._socket = socket.create_connection(("127.0.0.1", port), 20)
        self._file = self._socket.makefile("rb")

    def line(self):
        return self._file.readline()

    def send(self, data):
        self._socket.sendall(data)

    def answer(self):
        """(status, headers, JSON)."""
        status = int(self._file.readline().split()[1])
        lines = iter(self._file.readline, b"\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.decode().partition(":") for line in lines)}
        return status, headers, json.loads(self._file.read(int(headers["content-length"])))

    def ask(self, data):
        self.send(data)
        return self.answer()

    def close(self):
        self._file.close()
        self._socket.close()


def request(agent, token, **more):
    body = json.dumps({"status": "online", "session": agent["session"], "running": [], **more}).encode()
    head = f"POST {AT.format(agent['id'])} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Agent:
    """Registered; its heartbeat was answered twice on one connection, so that the next is known there."""

    def __init__(self, controller, token=TOKENS["token"], **more):
        self.data = controller.register()
        self.bytes = request(self.data, token, **more)
        self.wire = Wire(controller.port)
        for _ in range(2):
            assert self.beat()[0] == 200

    def beat(self):
        return self.wire.ask(self.bytes)


@pytest.fixture
def c(make_controller):
    return make_controller(clock=FakeClock(), **TOKENS)


@pytest.fixture
def agent(c):
    made = Agent(c)
    yield made
    made.wire.close()


def counted(c):
    """Heartbeats in /metrics, by status."""
    lines = c.raw("GET", "/metrics")[2].decode().splitlines()
    return {
        line.split('"')[5]: int(line.split()[-1])
        for line in lines
        if line.startswith("deploybot_http_requests") and "heartbeat" in line
    }


def test_it_is_answered_as_on_a_connection_of_its_own(c, agent):
    other = Wire(c.port)
    (status, headers, answer), (again, repeated, same) = other.ask(agent.bytes), agent.beat()
    other.close()
    headers.pop("date"), repeated.pop("date")
    assert (again, repeated, same) == (status, headers, answer)
    assert answer == {"acknowledged": True, "job": None, "cancel": [], "interval": 5}


def test_the_date_goes_on(agent, monkeypatch):
    seen = []
    for second in (1_790_000_000, 1_790_000_061):
        monkeypatch.setattr("deploybot.time.time", lambda second=second: second + 0.5)
        seen.append(agent.beat()[1]["date"])
    assert seen == ["Mon, 21 Sep 2026 14:13:20 GMT", "Mon, 21 Sep 2026 14:14:21 GMT"]


def test_it_counts(c, agent):
    before = counted(c)["200"]
    agent.beat()
    assert counted(c) == {"200": before + 1}


def test_it_keeps_the_host_online(c, agent):
    for _ in range(5):
        c.passes(c.config.agent_timeout - 1)
        agent.beat()
    assert c.ok("GET", "/v1/hosts")["hosts"][0]["agent_status"] == "online"
    c.passes(c.config.agent_timeout + 1)
    assert c.ok("GET", "/v1/hosts")["hosts"][0]["agent_status"] == "offline"


def test_it_brings_the_job_that_came_meanwhile(c, agent):
    made = c.create()
    assert agent.beat()[2]["job"]["id"] == made["id"]


def test_it_brings_the_job_again_whose_answer_got_lost_and_then_what_is_to_stop(c, agent):
    made = c.create()
    first = agent.beat()[2]["job"]
    assert (first["id"], agent.beat()[2]["job"]) == (made["id"], first)
    c.end(first)
    assert agent.beat()[2]["job"] is None
    assert agent.beat()[2]["job"] is None


def test_a_revoked_token_ends_it(c, make_controller):
    made = c.ok("POST", "/v1/tokens", {"role": "agent", "name": "mine", "host": "web-01"})
    agent = Agent(c, made["secret"])
    c.ok("DELETE", f"/v1/tokens/{made['token']['id']}")
    assert agent.beat()[0] == 401
    agent.wire.close()


def test_the_use_of_a_token_is_noted(c):
    made = c.ok("POST", "/v1/tokens", {"role": "agent", "name": "mine", "host": "web-01"})
    agent = Agent(c, made["secret"])
    c.passes(3600)
    agent.beat()
    c.passes(60)
    (token,) = [one for one in c.ok("GET", "/v1/tokens")["tokens"] if one["name"] == "mine"]
    assert token["last_used_at"] == c.clock.stamp()
    agent.wire.close()


def test_a_newer_session_ends_it(c, agent):
    c.register()
    assert agent.beat()[0] == 409


def test_a_host_that_was_removed_ends_it(c, agent):
    c.passes(c.config.agent_timeout + 1)
    c.ok("DELETE", "/v1/hosts/web-01")
    assert agent.beat()[0] == 404


def test_a_changed_pace_is_told(c, agent, monkeypatch):
    monkeypatch.setattr("deploybot.POLL_INTERVAL", 77)
    assert agent.beat()[2]["interval"] == 77
    assert agent.beat()[2]["interval"] == 77


def test_another_request_in_between(c, agent):
    job = c.create(host="web-02")
    get = f"GET /v1/jobs/{job['id']} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKENS['token']}\r\n\r\n".encode()
    assert agent.wire.ask(get)[2]["job"]["id"] == job["id"]
    assert agent.wire.ask(get)[2]["job"]["id"] == job["id"]
    assert agent.beat()[2]["acknowledged"]


def test_another_body_behind_the_same_head(c, agent):
    other = agent.bytes.replace(b'"online"', b'"paused"')
    assert agent.wire.ask(other)[0] == 422
    assert agent.beat()[0] == 200


def test_two_at_once_and_in_pieces(agent):
    agent.wire.send(agent.bytes * 3)
    assert [agent.wire.answer()[0] for _ in range(3)] == [200] * 3
    for cut in (1, 30, len(agent.bytes) - 1):
        agent.wire.send(agent.bytes[:cut])
        agent.wire.send(agent.bytes[cut:])
        assert agent.wire.answer()[0] == 200
    assert agent.beat()[0] == 200


def test_a_head_that_comes_before_its_body(c, agent):
    for body, expected in ((b'{"status": "online"}', 200), (b'{"status": "paused"}', 422)):
        head, _, _ = request(agent.data, TOKENS["token"]).partition(b"Content-Length")
        agent.wire.send(head + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert agent.wire.line() + agent.wire.line() == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert agent.wire.ask(body)[0] == expected


def test_one_that_lay_for_too_long_is_shed(c, agent, monkeypatch):
    monkeypatch.setattr("deploybot.MANY", 0)
    monkeypatch.setattr("deploybot.age_of_input", lambda connection: 60.0)
    assert agent.beat()[0] == 200  # it lay behind the one before until just now
    real = time.monotonic
    monkeypatch.setattr("deploybot.time.monotonic", lambda: real() + 60.0)
    assert agent.beat()[0] == 503
    monkeypatch.undo()
    assert agent.beat()[0] == 200


def test_its_connection_is_not_the_oldest_that_owes_something(c, agent):
    """Who is evicted first is who has said nothing for longest."""
    silent = Wire(c.port)
    waiting = c.daemon.server.waiting
    agent.beat()
    wait_for(lambda: len(waiting) >= 2)
    agent.beat()
    first = next(iter(waiting)).getpeername()
    assert first == silent._socket.getsockname()
    silent.close()
