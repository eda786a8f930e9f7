"""Beyond the limit: what came too late and what the disk cannot take is shed with 503, pushes are not, agents are paced."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import socket
import sys
import threading
import time

import pytest
from conftest import SECRET, wait_for

import deploybot
from deploybot import age_of_input, signature_of

JOB = {"repo": "myorg/app", "host": "web-01"}


@pytest.fixture
def crowded(controller, monkeypatch):
    """A controller with many connections, whose requests have lain unread for `late.seconds`."""

    class Late:
        seconds = 0.0

    monkeypatch.setattr(deploybot, "MANY", 0)
    monkeypatch.setattr(deploybot, "age_of_input", lambda connection: Late.seconds)
    controller.late = Late
    return controller


def push(controller, number=1):
    body = {"ref": "refs/heads/main", "after": f"{number:040x}", "repository": {"full_name": "myorg/app", "default_branch": "main"}}
    data = json.dumps(body).encode()
    return controller.call("POST", "/v1/webhooks/github", data, {"X-Hub-Signature-256": signature_of(SECRET, data)})


# -- how late a request is ---------------------------------------------------------------------------------------------


def test_the_age_of_what_came_is_that_of_its_last_bytes():
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        client = socket.create_connection(server.getsockname())
        connection, _ = server.accept()
        with contextlib.closing(client), contextlib.closing(connection):
            client.sendall(b"x")
            wait_for(lambda: age_of_input(connection) >= 0.2)
            connection.recv(1)
            assert age_of_input(connection) >= 0.2, "reading makes it no younger"
            client.sendall(b"y")
            wait_for(lambda: age_of_input(connection) < 0.2)


@pytest.mark.parametrize(("seconds", "agent", "person"), [(0.0, 200, 200), (1.9, 200, 200), (2.1, 503, 200), (5.1, 503, 503)])
def test_agents_are_told_to_come_again_before_people_are(crowded, seconds, agent, person):
    path = f"/v1/agents/{crowded.register()['id']}/heartbeat"
    crowded.late.seconds = seconds
    for method, target, body, expected in (("POST", path, {"status": "online"}, agent), ("GET", "/v1/jobs", None, person)):
        status, headers, data = crowded.raw(method, target, body)
        assert status == expected
        if status == 503:
            problem = json.loads(data)
            assert (headers["Retry-After"], headers["Connection"]) == ("5", "keep-alive"), "its body was read"
            assert "try again later" in problem["detail"]


def test_nothing_that_was_shed_has_happened(crowded):
    crowded.late.seconds = 9.0
    assert crowded.call("POST", "/v1/jobs", {**JOB, "ref": "main"})[0] == 503
    crowded.late.seconds = 0.0
    assert crowded.ok("GET", "/v1/jobs")["jobs"] == []


def test_pushes_and_the_health_check_are_taken_however_late(crowded):
    crowded.set_app(name="web", repo="myorg/app", hosts=["web-01"], deploy_on_push=True)
    crowded.late.seconds = 9.0
    assert crowded.call("GET", "/health")[0] == 200
    status, answer = push(crowded)
    assert (status, len(answer["jobs_created"])) == (200, 1)


def test_with_few_connections_nobody_looks(controller, monkeypatch):
    monkeypatch.setattr(deploybot, "age_of_input", lambda connection: 9.0)
    assert controller.call("GET", "/v1/jobs")[0] == 200


def test_a_request_is_late_for_itself(crowded, monkeypatch):
    """The next one of the same connection, with the same head, is looked at anew, and is no later than the answer before."""
    wire = http.client.HTTPConnection("127.0.0.1", crowded.port, timeout=20)
    real, passed = time.monotonic, 0.0
    monkeypatch.setattr(deploybot.time, "monotonic", lambda: real() + passed)
    with contextlib.closing(wire):
        seen = []
        for seconds, after, many in ((9.0, 0.0, 0), (0.0, 10.0, 0), (9.0, 10.0, 0), (9.0, 0.0, 0), (9.0, 10.0, 64)):
            crowded.late.seconds, passed = seconds, passed + after
            monkeypatch.setattr(deploybot, "MANY", many)
            wire.request("GET", "/v1/jobs")
            answer = wire.getresponse()
            answer.read()
            seen.append(answer.status)
    assert seen == [503, 200, 503, 200, 200]


def test_what_lies_behind_a_parked_heartbeat_is_not_late_for_that(crowded):
    """Two in one segment: the second has waited for the first, which we let wait."""
    path, lanes = f"/v1/agents/{crowded.register()['id']}/heartbeat", crowded.daemon.queue._lanes
    body = b'{"status": "online", "wait": %d}'
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body % 0)}\r\n\r\n".encode()
    with contextlib.closing(socket.create_connection(("127.0.0.1", crowded.port), 20)) as wire:
        wire.sendall(head + body % 9 + head + body % 0)
        wait_for(lambda: "web-01" in lanes and len(lanes["web-01"].woken._waiters) == 1)
        crowded.late.seconds = 9.0
        crowded.daemon.queue.wake("web-01")
        said = b""
        while said.count(b"HTTP/1.1 ") < 2:
            said += wire.recv(65536)
        assert said.count(b"HTTP/1.1 200") == 2


# -- what the disk cannot take -----------------------------------------------------------------------------------------


def test_writes_beyond_the_limit_are_shed_and_pushes_wait(controller, monkeypatch):
    monkeypatch.setattr(deploybot, "MAX_WRITES", 3)
    controller.set_app(name="web", repo="myorg/app", hosts=["web-01"], deploy_on_push=True)
    store = controller.daemon.store
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        with store._writer:
            waiting = []
            for number in range(3):
                waiting.append(pool.submit(controller.create, ref=f"r{number}"))
                wait_for(lambda number=number: len(store._waiting) == number + 1)
            status, headers, _ = controller.raw("POST", "/v1/jobs", {**JOB, "ref": "one-too-many"})
            assert (status, headers["Retry-After"]) == (503, "5")
            assert controller.call("GET", "/v1/jobs")[0] == 200, "reading goes on"
            pushed = pool.submit(push, controller)
            wait_for(lambda: len(store._waiting) == 4)
        made = [one.result(20)["ref"] for one in waiting]
        assert pushed.result(20)[0] == 200
    refs = {job["ref"] for job in controller.ok("GET", "/v1/jobs")["jobs"]}
    assert refs == {*made, f"{1:040x}"}


def test_who_stores_little_waits_for_some_uploads_and_not_for_all(controller, monkeypatch):
    monkeypatch.setattr(deploybot, "UPLOADS", 100)
    store, order = controller.daemon.store, []

    def work(name):
        return lambda tx: tx.after(order.append, (name, tx))

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        with store._writer:
            for number in range(5):
                pool.submit(store.write, work(f"upload {number}"), 60)
                wait_for(lambda number=number: len(store._uploads) == number + 1)
            pool.submit(store.write, work("claim"))
            wait_for(lambda: len(store._waiting) == 1)
    commits = [tx for _, tx in order]
    together = [[name for name, tx in order if tx is one] for one in dict.fromkeys(commits)]
    assert together == [["claim", "upload 0", "upload 1"], ["upload 2", "upload 3"], ["upload 4"]]


# -- the pace of agents ------------------------------------------------------------------------------------------------


def test_agents_that_do_not_park_are_paced_by_how_many_there_are(controller, monkeypatch):
    agents = [controller.register(f"web-{number}") for number in range(7)]
    assert controller.beat(agents[0])["interval"] == 5
    monkeypatch.setattr(deploybot, "POLLS", 1)
    assert controller.beat(agents[0])["interval"] == 7


@pytest.mark.parametrize(("returns", "interval"), [(500, 0), (2, 3), (1, 7)])
def test_a_stop_spreads_the_return_of_parked_agents(controller, monkeypatch, returns, interval):
    """The last of `returns` a second; a small fleet comes back at once."""
    monkeypatch.setattr(deploybot, "RETURNS", returns)
    monkeypatch.setattr(deploybot.secrets, "randbelow", lambda limit: limit - 1)
    agents = [controller.register(f"web-{number}") for number in range(7)]
    lanes = controller.daemon.queue._lanes
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        path = f"/v1/agents/{agents[0]['id']}/heartbeat"
        parked = pool.submit(controller.raw, "POST", path, {"status": "online", "wait": 20})
        wait_for(lambda: len(lanes["web-0"].woken._waiters) == 1)
        controller.stop()
        status, headers, data = parked.result(20)
    answer = json.loads(data)
    assert (status, answer["job"], answer["interval"], headers["Connection"]) == (200, None, interval, "close")


def test_an_agent_that_is_told_to_come_again_is_not_lost(crowded):
    crowded.token = None
    token = crowded.ok("POST", "/v1/agents/register", {"hostname": "web-01", "token_sha256": deploybot.sha256("own")})
    agent = crowded.jobs._by_host["web-01"]
    agent.contact = before = agent.contact - 100
    crowded.late.seconds = 3.0
    path = f"/v1/agents/{token['id']}/heartbeat"
    assert crowded.acting("own").call("POST", path, {"status": "online"})[0] == 503
    assert agent.contact > before + 99


def test_the_sweep_is_not_shed(controller, monkeypatch):
    controller.beat(controller.register())
    monkeypatch.setattr(deploybot, "MAX_WRITES", 0)
    controller.jobs.flush_contacts()
    controller.daemon.auth.sweep(every=0)
    controller.jobs._retain()
    with pytest.raises(deploybot.Unavailable):
        controller.daemon.store.write(lambda tx: None)


# -- the way in ----------------------------------------------------------------------------------------------------------


def test_all_that_wait_to_be_accepted_are_accepted_at_once(controller, monkeypatch):
    server, here, held, calls, at = controller.daemon.server, threading.Event(), [], [], []
    begin, process = server._begin, server.process_request

    def watched(request, address):
        at.append(time.monotonic())
        assert here.wait(20)
        held.append(server.turnstile.locked())
        begin(request, address)

    monkeypatch.setattr(server, "_begin", watched)
    monkeypatch.setattr(server, "process_request", lambda *accepted: (calls.append(accepted), process(*accepted)))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", controller.port), 20)) for _ in range(5)]
        wait_for(lambda: at and time.monotonic() >= at[0] + 0.2)
        here.set()
        for client in clients:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"
        assert held == [True] * 5 and len(calls) == 1
        wait_for(lambda: server._others_until >= at[0] + 10 * 0.2)  # nine times as long for the others
        assert not server.turnstile.locked()


def test_who_connects_without_end_does_not_keep_the_others_out(controller, monkeypatch):
    server, held = controller.daemon.server, []
    begin = server._begin
    monkeypatch.setattr(server, "_begin", lambda *accepted: (held.append(server.turnstile.locked()), begin(*accepted)))
    for ahead, expected in ((deploybot.RUSH + 1000, False), (deploybot.RUSH / 2, True)):
        server._others_until = time.monotonic() + ahead
        with contextlib.closing(socket.create_connection(("127.0.0.1", controller.port), 20)) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"
        assert held.pop() is expected and not held


def test_the_more_are_connected_the_rarer_a_thread_looks_up_whether_it_may_go_on(controller):
    """At 5 ms ten thousand threads that all want the GIL keep a core busy with looking, and it never ends."""
    with contextlib.ExitStack() as stack:
        stack.callback(sys.setswitchinterval, sys.getswitchinterval())
        for connections, seconds in ((1, 0.005), (120, 0.012)):
            while len(controller.daemon.server.open) < connections:
                client = stack.enter_context(socket.create_connection(("127.0.0.1", controller.port), 20))
                client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert client.recv(12) == b"HTTP/1.1 200"  # so it is counted
            assert sys.getswitchinterval() == pytest.approx(seconds)


def test_who_is_connected_stands_still_while_others_are_accepted(controller, monkeypatch):
    class Turnstile:
        """What a connection sees of it, until the accepting is over."""

        arrived, over = threading.Event(), threading.Event()

        def __enter__(self):
            self.arrived.set()
            assert self.over.wait(20)

        def __exit__(self, *error):
            pass

    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", controller.port, timeout=20)) as wire:
        wire.connect()
        wait_for(lambda: controller.daemon.server.open)
        wire.sock.sendall(head)
        answer = wire.sock.recv(4096)
        assert answer.startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(controller.daemon.server, "turnstile", Turnstile())
        wire.sock.sendall(head)  # the thread may be behind the old turnstile already, and then takes this one
        wire.sock.sendall(head)
        assert Turnstile.arrived.wait(20)
        wire.sock.setblocking(False)
        read = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                read += wire.sock.recv(4096)
        assert read.count(b"HTTP/1.1 200") <= 1
        wire.sock.settimeout(20)
        Turnstile.over.set()
        while read.count(b"HTTP/1.1 200") < 2:
            read += wire.sock.recv(4096)
