"""HTTP on raw sockets: the one answer that each odd request gets, and what a connection does before and after it."""

import contextlib
import json
import logging
import os
import random
import re
import select
import socket
import struct
import threading
import time

import pytest
from conftest import TOKENS, wait_for

import deploybot

HOST = b"Host: 127.0.0.1\r\n"
JOB = json.dumps({"repo": "o/n", "ref": "main", "host": "web-01"}).encode()


def post(body=JOB, more=b"", path=b"/v1/jobs"):
    return b"POST %b HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n%b" % (path, HOST, more, len(body), body)


def get(path=b"/health", more=b""):
    return b"GET %b HTTP/1.1\r\n%b%b\r\n" % (path, HOST, more)


class Wire:
    """One connection; reads whole answers."""

    def __init__(self, controller, timeout=20):
        self.socket = socket.create_connection(("127.0.0.1", controller.port), timeout=timeout)
        self.buffer = b""

    def send(self, data):
        self.socket.sendall(data)
        return self

    def _more(self):
        chunk = self.socket.recv(65536)
        self.buffer += chunk
        return bool(chunk)

    def answer(self, body=True):
        """(status, headers by lower-case name, body) of the next answer."""
        while b"\r\n\r\n" not in self.buffer:
            assert self._more(), f"the connection ended after {self.buffer!r}"
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        status = int(re.fullmatch(r"HTTP/1\.1 ([0-9]{3}) [A-Za-z -]+", first)[1])
        length = int(headers.get("content-length", 0)) if body and status != 100 else 0
        while len(self.buffer) < length:
            assert self._more(), "the connection ended within an answer"
        data, self.buffer = self.buffer[:length], self.buffer[length:]
        return status, headers, data

    def rest(self):
        """Everything up to the end of the connection."""
        with contextlib.suppress(ConnectionResetError):
            while self._more():
                pass
        return self.buffer

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


@pytest.fixture
def wire(controller):
    with Wire(controller) as wire:
        yield wire


def jobs(controller):
    return controller.ok("GET", "/v1/jobs")["jobs"]


# One answer each

REFUSED = {
    "transfer-encoding": (b"POST /v1/jobs HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "transfer-encoding and length": (post(more=b"Transfer-Encoding: chunked\r\n"), 400),
    "transfer-encoding identity": (post(more=b"transfer-ENCODING: identity\r\n"), 400),
    "two lengths": (post(more=b"Content-Length: 5\r\n"), 400),
    "two equal lengths": (post(b"12345", more=b"Content-Length: 5\r\n"), 400),
    "bare CR in a value": (get(more=b"X: a\rAuthorization: evil\r\n"), 400),
    "bare CR before the end": (get(more=b"X: a\r\r\n"), 400),
    "LF in a value": (get(more=b"X: a\nY: b\r\n"), 400),
    "LF-only lines": (b"GET /health HTTP/1.1\nHost: x\n\n", 400),
    "NUL in a value": (get(more=b"X: a\0b\r\n"), 400),
    "NUL in the path": (get(b"/hea\0lth"), 400),
    "DEL in a value": (get(more=b"X: \x7f\r\n"), 400),
    "folded line": (get(more=b"X: a\r\n b\r\n"), 400),
    "folded with a tab": (get(more=b"X: a\r\n\tb\r\n"), 400),
    "first header folded": (b"GET /health HTTP/1.1\r\n " + HOST + b"\r\n", 400),
    "space before the colon": (get(more=b"Content-Length : 5\r\n"), 400),
    "tab before the colon": (get(more=b"X\t: 5\r\n"), 400),
    "no colon": (get(more=b"nonsense\r\n"), 400),
    "no name": (get(more=b": x\r\n"), 400),
    "name that is no token": (get(more=b"X(Y): x\r\n"), 400),
    "name of other letters": (get(more="Ünd: x\r\n".encode()), 400),
    "HTTP/0.9": (b"GET /health\r\n", 400),
    "HTTP/2.0": (b"GET /health HTTP/2.0\r\n" + HOST + b"\r\n", 400),
    "HTTP/1.2": (b"GET /health HTTP/1.2\r\n" + HOST + b"\r\n", 400),
    "http/1.1": (b"GET /health http/1.1\r\n" + HOST + b"\r\n", 400),
    "preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n", 400),
    "absolute form": (b"GET http://127.0.0.1/health HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "authority form": (b"CONNECT 127.0.0.1:80 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "asterisk form": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "no path": (b"GET  HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "two blanks": (b"GET  /health HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "blank at the end": (b"GET /health HTTP/1.1 \r\n" + HOST + b"\r\n", 400),
    "blank in the path": (b"GET /hea lth HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "letters outside ASCII": ("GET /ü HTTP/1.1\r\nHost: x\r\n\r\n".encode(), 400),
    "lower-case method": (b"get /health HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "long method": (b"G" * 21 + b" /health HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "no Host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "empty Host": (b"GET /health HTTP/1.1\r\nHost: \r\n\r\n", 400),
    "two Hosts": (get(more=b"host: 127.0.0.1\r\n"), 400),
    "two tokens": (get(more=b"Authorization: Bearer a\r\nAuthorization: Bearer b\r\n"), 400),
    "long line, unfinished": (b"GET /" + b"a" * 9000, 431),
    "long head, unfinished": (b"GET /health HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 3000, 431),
    "long head": (get(more=b"X-Y: zzzzzzzz\r\n" * 1200), 431),
    "unknown expectation": (post(more=b"Expect: 200-ok\r\n"), 417),
    "too large": (b"POST /v1/jobs HTTP/1.1\r\n" + HOST + b"Content-Length: 999999999\r\n\r\n", 413),
}  # fmt: skip
for length in (b"-1", b"+3", b"1_0", b"0x5", b" ", b"5, 5", b"5 5", b"9" * 10, b"9" * 5000, b"\xb2", b"1.0", b"five"):
    REFUSED[f"length {length[:12]!r}"] = (
        b"POST /v1/jobs HTTP/1.1\r\n" + HOST + b"Content-Length: " + length + b"\r\n\r\n12345", 400
    )  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_once_and_nothing_after_it_is_executed(controller, wire, name):
    request, expected = REFUSED[name]
    wire.send(request)
    with contextlib.suppress(OSError):
        wire.send(b"\r\n\r\n" + post())
    status, headers, body = wire.answer()
    assert status == expected
    assert headers["connection"] == "close" and headers["content-type"] == "application/problem+json"
    assert json.loads(body)["status"] == expected
    assert wire.rest() == b"", "one answer and the end"
    assert jobs(controller) == []


@pytest.mark.parametrize("name", ["HTTP/0.9", "LF-only lines", "TLS", "absolute form", "long line, unfinished"])
def test_a_wrong_line_is_refused_without_waiting_for_the_end_of_the_head(wire, name):
    assert wire.send(REFUSED[name][0]).answer()[0] == REFUSED[name][1]


@pytest.mark.parametrize("in_pieces", [False, True])
def test_a_line_of_over_8_kib_is_refused_however_it_arrives(controller, wire, in_pieces):
    for request in (get(b"/health?" + b"a" * 9000), get(more=b"X: " + b"a" * 9000 + b"\r\n")):
        with Wire(controller) as one:
            one.send(request[:8500])
            if in_pieces:
                select.select([one.socket], [], [], 0.2)
            with contextlib.suppress(OSError):
                one.send(request[8500:])
            assert one.answer()[0] in (400, 431)


TAKEN = {
    "blanks around a value": (get(more=b"X:\t a \t\r\n"), 200),
    "empty value": (get(more=b"X:\r\n"), 200),
    "bytes over 127 in a value": (get(more=b"X: \xff\xfe\r\n"), 200),
    "a header twice": (get(more=b"X: a\r\nX: b\r\n"), 200),
    "HTTP/1.0 without Host": (b"GET /health HTTP/1.0\r\n\r\n", 200),
    "a query": (get(b"/health?a=%00&b"), 200),
    "a body where none is needed": (b"GET /health HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\n12345", 200),
    "length 000": (b"GET /health HTTP/1.1\r\n" + HOST + b"Content-Length: 000\r\n\r\n", 200),
    "unknown method": (b"BREW /health HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "unknown path": (get(b"/nothing"), 404),
    "dots": (get(b"/v1/../health"), 404),
    "double slash": (get(b"//evil.example/%2e%2e"), 404),
    "percent": (get(b"/%68ealth"), 404),
}


@pytest.mark.parametrize("name", TAKEN)
def test_taken(wire, name):
    request, expected = TAKEN[name]
    status, headers, _ = wire.send(request).answer()
    assert status == expected and "location" not in headers
    if name != "HTTP/1.0 without Host":
        assert wire.send(get()).answer()[0] == 200, "the connection goes on"


# Time


def trickle(wire, data, seconds):
    """Sends byte by byte until there is an answer."""
    deadline = time.monotonic() + seconds
    for byte in data:
        if select.select([wire.socket], [], [], 0.02)[0] or time.monotonic() > deadline:
            return
        wire.send(bytes([byte]))


def test_a_head_that_trickles_has_a_deadline(wire, monkeypatch):
    monkeypatch.setattr(deploybot, "HEAD_DEADLINE", 0.5)
    trickle(wire, b"GET /health HTTP/1.1\r\nX: " + b"a" * 2000, 15)
    status, headers, _ = wire.answer()
    assert (status, headers["connection"]) == (408, "close")
    assert wire.rest() == b""


def test_a_body_that_trickles_has_a_deadline(controller, wire, monkeypatch):
    monkeypatch.setattr(deploybot, "BODY_DEADLINE", 0.5)
    wire.send(b"POST /v1/jobs HTTP/1.1\r\n" + HOST + b"Content-Length: 2000\r\n\r\n")
    trickle(wire, b" " * 2000, 15)
    assert wire.answer()[0] == 408
    assert wire.rest() == b"" and jobs(controller) == []


def test_a_silent_connection_ends(controller, monkeypatch):
    monkeypatch.setattr(deploybot, "IDLE_DEADLINE", 1)
    with Wire(controller) as wire:
        assert wire.rest() == b""
    with Wire(controller) as wire:
        assert wire.send(get()).answer()[0] == 200
        assert wire.rest() == b""


def test_slow_ones_cost_the_others_nothing(controller):
    wires = [Wire(controller) for _ in range(50)]
    for i, wire in enumerate(wires):
        wire.send(b"GET /hea" if i % 2 else b"POST /v1/jobs HTTP/1.1\r\n" + HOST + b"Content-Length: 100\r\n\r\n{")
    assert controller.call("GET", "/health")[0] == 200
    for wire in wires:
        wire.close()
    wait_for(lambda: controller.daemon.server.connections() == 0)


# Bodies


def test_continue_is_sent_before_an_accepted_body(wire):
    wire.send(post(more=b"Expect: 100-Continue\r\n")[: -len(JOB)])
    assert wire.answer()[0] == 100
    assert wire.send(JOB).answer()[0] == 201


@pytest.mark.parametrize("why", ["path", "method", "token", "size"])
def test_no_continue_for_what_is_refused(make_controller, why):
    closed = make_controller("closed", open=False, **TOKENS)
    token = b"" if why == "token" else b"Authorization: Bearer dbt_admin\r\n"
    line = {"path": b"POST /v1/nothing", "method": b"PUT /v1/jobs"}.get(why, b"POST /v1/jobs")
    length = b"9999999" if why == "size" else b"50"
    with Wire(closed) as wire:
        wire.send(
            line + b" HTTP/1.1\r\n" + HOST + token + b"Expect: 100-continue\r\nContent-Length: " + length + b"\r\n\r\n"
        )
        status, headers, _ = wire.answer()
        assert status == {"path": 404, "method": 405, "token": 401, "size": 413}[why]
        assert headers["connection"] == "close"


def test_413_arrives_although_the_body_was_not_read(controller):
    with Wire(controller) as wire:
        wire.send(post(b" " * (12 << 20)) + post())  # more than the sockets hold: it was read and thrown away
        status, headers, _ = wire.answer()
        assert (status, headers["connection"]) == (413, "close")
        assert not wire._more(), "an end, and no reset"
        assert jobs(controller) == []


def test_a_body_of_a_refused_request_is_not_executed(make_controller):
    """It looks like a request, and comes with the head or after it."""
    closed = make_controller("closed", open=False, **TOKENS)
    smuggled = post(more=b"Authorization: Bearer dbt_admin\r\n")
    for path in (b"/v1/jobs", b"/v1/nothing", b"/health"):
        with Wire(closed) as wire:
            wire.send(post(smuggled, path=path))
            assert wire.answer()[0] in (401, 404, 405)
            assert wire.rest() == b""
    closed.token = "dbt_admin"
    assert jobs(closed) == []


# Connections


def test_pipelined_requests_are_answered_in_order(controller, wire):
    other = JOB.replace(b"main", b"dev")
    wire.send(post() + get() + post(other) + get(b"/v1/jobs") + get(b"/nothing"))
    first, health, second, listed, nothing = (wire.answer() for _ in range(5))
    assert [first[0], health[0], second[0], listed[0], nothing[0]] == [201, 200, 201, 200, 404]
    assert [job["ref"] for job in json.loads(listed[2])["jobs"]] == ["dev", "main"]


def test_requests_in_pieces(controller, wire):
    for byte in get() + post():
        wire.send(bytes([byte]))
    assert [wire.answer()[0], wire.answer()[0]] == [200, 201]


def test_head_has_the_headers_of_get_and_no_body(wire):
    for path in (b"/health", b"/v1/jobs", b"/openapi.json"):
        status, headers, body = wire.send(get(path)).answer()
        wire.send(get(path).replace(b"GET", b"HEAD"))
        again, shown, _ = wire.answer(body=False)
        assert (again, shown["content-type"]) == (status, headers["content-type"])
        assert path == b"/health" or shown["content-length"] == headers["content-length"] == str(len(body))
    assert wire.send(get()).answer()[0] == 200
    wire.send(get(b"/v1/logs/stream").replace(b"GET", b"HEAD"))
    assert wire.answer(body=False)[1]["content-type"] == "text/event-stream"


@pytest.mark.parametrize("value", [b"close", b"Close", b"x, close", b"close, x", b"keep-alive\r\nConnection: close"])
def test_connection_close_is_obeyed(wire, value):
    status, headers, _ = wire.send(get(more=b"Connection: " + value + b"\r\n")).answer()
    assert (status, headers["connection"]) == (200, "close")
    assert wire.rest() == b""


def test_http_1_0_closes_and_is_not_chunked(controller):
    with Wire(controller) as wire:
        status, headers, _ = wire.send(b"GET /health HTTP/1.0\r\n\r\n").answer()
        assert (status, headers["connection"]) == (200, "close") and wire.rest() == b""
    with Wire(controller) as wire:
        wire.send(b"GET /v1/logs/stream HTTP/1.0\r\n" + HOST + b"\r\n")
        status, headers, _ = wire.answer()
        assert status == 200 and "transfer-encoding" not in headers and headers["connection"] == "close"
        controller.stop()
        assert wire.rest().startswith(b"retry: ")


def test_a_chunked_answer_keeps_the_connection(controller, wire):
    agent = controller.register()
    controller.create()
    job = controller.beat(agent)["job"]
    controller.logs(job, "a", "b")
    wire.send(get(f"/v1/jobs/{job['id']}/logs".encode(), b"Accept: text/plain\r\n") + get())
    status, headers, _ = wire.answer()
    assert (status, headers["transfer-encoding"]) == (200, "chunked")
    wait_for(lambda: b"0\r\n\r\n" in wire.buffer or not wire._more())
    chunks, _, wire.buffer = wire.buffer.partition(b"0\r\n\r\n")
    assert chunks == b"4\r\na\nb\n\r\n"
    assert wire.answer()[0] == 200


def test_each_answer_is_one_write(controller, monkeypatch):
    """Two small packets would wait for each other: 40 ms an answer."""
    writes, setup = [], deploybot.Handler.setup

    class Counting:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def sendall(self, data):
            writes.append(len(data))
            self.inner.sendall(data)

        def send(self, data):
            raise AssertionError("only sendall")

    def counted(handler):
        setup(handler)
        assert handler.request.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        handler.request = Counting(handler.request)

    monkeypatch.setattr(deploybot.Handler, "setup", counted)
    with Wire(controller) as wire:
        for i in range(20):
            assert wire.send(get() if i % 2 else post()).answer()[0] in (200, 201)
    assert len(writes) == 20


def test_twenty_answers_do_not_wait_for_nagle(wire):
    best = 60.0
    for _ in range(8):
        started = time.monotonic()
        for _ in range(20):
            wire.send(get()).answer()
        best = min(best, time.monotonic() - started)
    assert best < 0.4, "20 delayed answers take 0.8 s"


def test_a_client_that_goes_away_is_no_error(controller, caplog):
    agent = controller.register()
    beat = json.dumps({"status": "online", "wait": 20}).encode()
    threads = threading.active_count()
    for request in (
        b"", b"GET", get(), post()[:-5], get(b"/v1/logs/stream"), post(b" " * (2 << 20)), get() * 200,
        post(beat, path=f"/v1/agents/{agent['id']}/heartbeat".encode()), b"nonsense\r\n\r\n",
    ):  # fmt: skip
        for reset in (False, True):
            wire = Wire(controller)
            with contextlib.suppress(OSError):
                wire.send(request)
            if reset:
                wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            wire.close()
    made = controller.create()  # what is parked finds that its client has gone
    wait_for(lambda: controller.daemon.server.connections() == 0, 30)
    wait_for(lambda: threading.active_count() <= threads, 30)
    assert controller.job(made["id"])["attempt"] == 0
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


# Headers of answers


def test_no_request_makes_a_header(wire):
    for path in (
        b"/%0d%0aX-Evil:1",
        b"/v1/hosts/%0d%0aX-Evil:1",
        b"/v1/jobs?host=%0d%0aX-Evil:%201",
        b"/x?%0aX-Evil=1",
    ):
        for method in (b"GET", b"PUT", b"DELETE"):
            _, headers, _ = wire.send(get(path).replace(b"GET", method)).answer()
            assert "x-evil" not in headers
    for value in ("a\r\nX-Evil: 1", "a\n", "\0"):
        with pytest.raises(ValueError, match="header value"):
            deploybot.header_value(value)


def test_answers_name_no_version_and_are_not_sniffed(wire):
    for path in (
        b"/health",
        b"/v1/jobs",
        b"/",
        b"/docs",
        b"/redoc",
        b"/openapi.json",
        b"/agent.py",
        b"/ctl.py",
        b"/no",
    ):
        _, headers, _ = wire.send(get(path)).answer()
        assert headers["x-content-type-options"] == "nosniff" and "server" not in headers


@pytest.mark.parametrize("path", [b"/", b"/docs", b"/redoc"])
def test_pages_run_only_their_own_script(wire, path):
    status, headers, body = wire.send(get(path)).answer()
    policy = headers["content-security-policy"]
    assert status == 200 and headers["referrer-policy"] == "no-referrer"
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    nonce = re.search(r"script-src 'nonce-([^']+)'", policy)[1]
    opened = re.findall(rb"<(?:script|style)\b[^>]*>", body)
    # the header came in lower case through `answer`
    assert opened and all(re.search(rb'nonce="([^"]+)"', tag)[1].decode().lower() == nonce for tag in opened)
    again = wire.send(get(path)).answer()[1]["content-security-policy"]
    assert nonce not in again, "each answer has its own"


def test_a_500_shows_no_internals(controller, wire, caplog, monkeypatch):
    def fails():
        raise RuntimeError("hunter2 in /etc/shadow")

    monkeypatch.setattr(controller.jobs, "hosts", fails)
    status, _, body = wire.send(get(b"/v1/hosts")).answer()
    assert status == 500
    for inner in (b"hunter2", b"RuntimeError", b"Traceback", b"deploybot.py", b"File"):
        assert inner not in body
    assert "hunter2" in caplog.text, "the log says more"
    assert wire.send(get()).answer()[0] == 200, "the connection goes on"


# Who is this machine (open mode)


@pytest.mark.parametrize("header", [
    b"Forwarded: for=1.2.3.4", b"X-Forwarded-For: 1.2.3.4", b"X-Forwarded-Proto: https", b"Via: 1.1 proxy",
    b"Origin: https://evil.example", b"Origin: null", b"Sec-Fetch-Site: cross-site", b"Sec-Fetch-Site: same-site",
])  # fmt: skip
def test_what_only_looks_local_needs_a_token(wire, header):
    assert wire.send(get(b"/v1/jobs", header + b"\r\n")).answer()[0] == 401


@pytest.mark.parametrize("host, status", [
    (b"localhost:8080", 200), (b"[::1]:1", 200), (b"127.1.2.3", 200), (b"evil.example", 401), (b"10.0.0.1", 401),
    (b"localhost.evil.example", 401), (b"127.0.0.1.evil.example:80", 401), (b"localhost@evil.example", 401),
])  # fmt: skip
def test_only_loopback_names_are_local(wire, host, status):
    assert wire.send(b"GET /v1/jobs HTTP/1.1\r\nHost: " + host + b"\r\n\r\n").answer()[0] == status


def test_a_thousand_seeded_bad_requests(controller, caplog):
    """No 5xx, no traceback, no thread and no descriptor left."""
    seed = int.from_bytes(os.urandom(4), "big")
    print("seed", seed)
    chance = random.Random(seed)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    good = [get(), post(), get(b"/v1/logs/stream?tail=1"), post(b"{}", path=b"/v1/agents/register")]
    for _ in range(1000):
        data = bytearray(chance.choice(good))
        for _ in range(chance.randrange(1, 6)):
            at = chance.randrange(len(data))
            data[at : at + chance.randrange(3)] = chance.choice(
                [b"\r", b"\n", b"\0", b":", b" ", b"\xff", b"9", b"\r\n", b"{", b'"', bytes([chance.randrange(256)])]
            )
        with Wire(controller, timeout=20) as wire:
            wire.send(bytes(data))
            wire.socket.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while len(wire.buffer) < 12 and wire._more():
                    pass
            assert not wire.buffer or re.match(rb"HTTP/1\.1 [1-4]", wire.buffer), (seed, bytes(data), wire.buffer)
    wait_for(lambda: controller.daemon.server.connections() == 0, 30)
    wait_for(lambda: threading.active_count() <= threads, 30)
    assert len(os.listdir("/proc/self/fd")) <= files + 4
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
