"""TLS: the handshake in the worker, certificates that change while it runs, and everything that a connection does, once more."""

import concurrent.futures
import contextlib
import http.client
import json
import logging
import os
import pty
import re
import signal
import socket
import ssl
import subprocess
import threading
import time

import pytest
from conftest import TOKENS, Controller, command, wait_for

import deploybot

HOST = b"Host: localhost\r\n"
BEARER = b"Authorization: Bearer dbt_admin\r\n"
GET = b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"
HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # the beginning of a ClientHello


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


class Pair:
    """A certificate for localhost and its key, made by openssl."""

    def __init__(self, folder, name):
        self.name, self.cert, self.key = name, folder / f"{name}.pem", folder / f"{name}.key"
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
        names = ("-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
        openssl("req", "-x509", *curve, "-nodes", "-days", "2", *names, "-keyout", self.key, "-out", self.cert)

    def context(self):
        return ssl.create_default_context(cafile=self.cert)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return Pair(folder, "first"), Pair(folder, "second")


class Calls(Controller):
    """The same calls over TLS."""

    trust: ssl.SSLContext

    def raw(self, method, path, body=None, headers=None, timeout=30):
        connection = http.client.HTTPSConnection("localhost", self.port, timeout=timeout, context=self.trust)
        with contextlib.closing(connection):
            sent = {"Authorization": f"Bearer {self.token}", **(headers or {})}
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()


def put(pair, cert, key):
    """Copies a pair to where the controller reads it."""
    cert.write_bytes(pair.cert.read_bytes())
    key.write_bytes(pair.key.read_bytes())


@pytest.fixture
def make_secure(tmp_path, pairs):
    made = []

    def make(**settings):
        cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
        put(pairs[0], cert, key)
        controller = Calls(tmp_path / "controller", tls_cert=cert, tls_key=key, **{**TOKENS, **settings})
        controller.trust, controller.cert, controller.key = pairs[0].context(), cert, key
        made.append(controller)
        return controller

    yield make
    for controller in made:
        controller.stop()


@pytest.fixture
def secure(make_secure):
    return make_secure()


def plain(controller, data=b""):
    """A connection without a handshake."""
    wire = socket.create_connection(("127.0.0.1", controller.port), timeout=20)
    wire.sendall(data)
    return wire


def tls(controller, data=b"", strict=False, context=None):
    """A connection after its handshake; `strict`: an end without TLS's own word for it raises."""
    wire = (context or controller.trust).wrap_socket(
        plain(controller), server_hostname="localhost", suppress_ragged_eofs=not strict
    )
    wire.sendall(data)
    return wire


def read_until(wire, text):
    said = b""
    while text not in said:
        chunk = wire.recv(65536)
        assert chunk, f"the end came after {said!r}"
        said += chunk
    return said


def post(path, value):
    body = json.dumps(value).encode()
    return b"POST %b HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n%b" % (path.encode(), HOST, BEARER, len(body), body)


def shown(controller):
    """The certificate that a new connection gets."""
    with contextlib.closing(tls(controller, context=ssl._create_unverified_context())) as wire:
        return wire.getpeercert(binary_form=True)


def of(pair):
    return ssl.PEM_cert_to_DER_cert(pair.cert.read_text())


def parked(controller, agent, wait=20):
    """A heartbeat that waits."""
    wire = tls(controller, post(f"/v1/agents/{agent['id']}/heartbeat", {"status": "online", "wait": wait}))
    lanes = controller.daemon.queue._lanes
    wait_for(lambda: len(lanes[agent["hostname"]].woken._waiters) == 1)
    return wire


# -- the handshake -----------------------------------------------------------------------------------------------------


def test_it_serves_over_tls(secure, caplog):
    assert secure.call("GET", "/health")[1]["status"] == "ok"
    big = {"repo": "o/n", "ref": "main", "host": "web-01", "metadata": {"a": "b" * 16_000}}
    assert secure.call("POST", "/v1/jobs", big)[0] == 201
    assert len(secure.raw("GET", "/openapi.json")[2]) > 100_000
    assert secure.call("POST", "/v1/jobs", b" " * (1 << 20))[0] == 400, "a body of 1 MiB was read"


def test_the_log_names_an_address_of_https(secure, caplog):
    caplog.set_level(logging.INFO, "deploybot")
    secure.restart()
    assert f"https://127.0.0.1:{secure.port}" in caplog.text


def test_who_says_nothing_keeps_nobody_waiting(secure):
    with contextlib.ExitStack() as wires:  # which end also when it fails: else the stop would wait for them
        for i in range(30):
            wires.enter_context(plain(secure, HELLO if i % 2 else b""))
        started = time.monotonic()
        for _ in range(5):
            assert secure.call("GET", "/health", timeout=5)[0] == 200
        assert time.monotonic() - started < 3
    wait_for(lambda: secure.daemon.server.connections() == 0)


@pytest.mark.parametrize("data", [b"", HELLO])
def test_a_handshake_has_a_deadline(secure, monkeypatch, data):
    monkeypatch.setattr(deploybot, "HEAD_DEADLINE", 0.3)
    with plain(secure, data) as wire:
        assert wire.recv(100) == b""


def test_a_handshake_that_trickles_has_the_same_deadline(secure, monkeypatch):
    monkeypatch.setattr(deploybot, "HEAD_DEADLINE", 0.4)
    started, ended = time.monotonic(), False
    with plain(secure) as wire:
        wire.settimeout(0.02)
        for byte in HELLO + b"\0" * 500:
            try:
                wire.sendall(bytes([byte]))
                ended = wire.recv(100) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                ended = True
            if ended:
                break
    assert ended and time.monotonic() - started < 5


@pytest.mark.parametrize("data", [GET, b"\r\n" * 10, b"\0" * 500, b"\x16\x03\x01\xff\xff" + b"\xff" * 600, b"\x15\x03\x01\0\x02\x02\x28", b"SSH-2.0-x\r\n"])  # fmt: skip
def test_what_is_no_handshake_ends_without_a_trace(secure, caplog, data):
    with plain(secure, data) as wire, contextlib.suppress(ConnectionError):
        while wire.recv(65536):
            pass
    wait_for(lambda: secure.daemon.server.connections() == 0)
    assert [record.getMessage() for record in caplog.records if record.name == "deploybot" and record.levelno >= logging.ERROR] == []  # fmt: skip
    assert secure.call("GET", "/health")[0] == 200


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
def test_old_versions_are_refused_by_name(secure, version):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    with plain(secure) as wire, pytest.raises(ssl.SSLError, match=r"(?i)alert.protocol.version"):
        context.wrap_socket(wire, server_hostname="localhost")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_new_versions_are_taken(secure, version):
    context = ssl.create_default_context(cafile=secure.cert)
    context.minimum_version = context.maximum_version = version
    with tls(secure, GET, context=context) as wire:
        assert read_until(wire, b"}\n").startswith(b"HTTP/1.1 200 ")
        assert wire.compression() is None


# -- certificates ------------------------------------------------------------------------------------------------------


def test_a_new_pair_is_taken_and_who_is_connected_goes_on(secure, pairs):
    agent = secure.register()
    with tls(secure, GET) as old, parked(secure, agent) as waiting:
        read_until(old, b"}\n")
        put(pairs[1], secure.cert, secure.key)
        assert shown(secure) == of(pairs[0]), "not before it is told"
        secure.daemon.reload()
        assert shown(secure) == of(pairs[1])
        old.sendall(GET)
        assert b" 200 OK" in read_until(old, b"}\n")
        secure.trust = pairs[1].context()
        secure.create()
        assert b'"job":{' in read_until(waiting, b"}\n")


BAD = {
    "a key of another": lambda pairs, cert, key: key.write_bytes(pairs[1].key.read_bytes()),
    "a certificate of another": lambda pairs, cert, key: cert.write_bytes(pairs[1].cert.read_bytes()),
    "an empty certificate": lambda pairs, cert, key: cert.write_bytes(b""),
    "half a certificate": lambda pairs, cert, key: cert.write_bytes(cert.read_bytes()[:200]),
    "no key": lambda pairs, cert, key: key.unlink(),
    "no certificate": lambda pairs, cert, key: cert.unlink(),
    "a folder as key": lambda pairs, cert, key: (key.unlink(), key.mkdir()),
    "the two exchanged": lambda pairs, cert, key: put_exchanged(cert, key),
    "an encrypted key": lambda pairs, cert, key: openssl("ec", "-in", pairs[0].key, "-aes256", "-passout", "pass:hunter22", "-out", key),
}  # fmt: skip


def put_exchanged(cert, key):
    first, second = cert.read_bytes(), key.read_bytes()
    cert.write_bytes(second)
    key.write_bytes(first)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_pair_leaves_the_old_one_in_force_and_is_no_start(secure, pairs, caplog, name):
    body = "".join(pairs[0].key.read_text().splitlines()[1:-1])
    BAD[name](pairs, secure.cert, secure.key)
    secure.daemon.reload()
    assert shown(secure) == of(pairs[0])
    assert secure.call("GET", "/health")[0] == 200
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(said) == 1 and str(secure.key) in said[0] and str(secure.cert) in said[0] and "\n" not in said[0]
    secure.stop()
    with pytest.raises(deploybot.StartError) as failed:
        secure.start()
    assert len(failed.value.problems) == 1 and str(secure.key) in str(failed.value)
    assert body[:40] not in caplog.text + str(failed.value) and "hunter22" not in caplog.text


def test_an_encrypted_key_asks_nobody(pairs, tmp_path):
    """A start by systemd has no terminal, and one by hand would wait for a phrase that the next start does not get."""
    key = tmp_path / "key.pem"
    openssl("ec", "-in", pairs[0].key, "-aes256", "-passout", "pass:hunter22", "-out", key)
    ours, its = pty.openpty()
    with open(ours, "rb", closefd=True):
        start = [
            "setsid",
            "--ctty",
            "--wait",
            *command("deploybot.py"),
            "--port",
            "0",
            "--tls-cert",
            pairs[0].cert,
            "--tls-key",
            key,
        ]
        process = subprocess.Popen(start, cwd=tmp_path, stdin=its, stdout=its, stderr=its)
        try:
            assert process.wait(20) == 1
            os.close(its)
            with contextlib.suppress(OSError):  # the end of a terminal
                said = os.read(ours, 65536)
            assert b"hunter22" not in said and b"phrase" not in said and b"--tls-key" in said
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("given", [("tls_cert",), ("tls_key",)])
def test_one_without_the_other_is_no_start(make_controller, pairs, given):
    with pytest.raises(deploybot.StartError, match="tls-cert and --tls-key"):
        make_controller(**{name: pairs[0].cert for name in given})


# -- a connection ------------------------------------------------------------------------------------------------------


def test_a_deadline_holds_for_heads_and_bodies_that_trickle(secure, monkeypatch):
    monkeypatch.setattr(deploybot, "HEAD_DEADLINE", 0.4)
    monkeypatch.setattr(deploybot, "BODY_DEADLINE", 0.4)
    for begin in (b"GET /health HTTP/1.1\r\nX: ", b"POST /v1/jobs HTTP/1.1\r\n" + HOST + BEARER + b"Content-Length: 900\r\n\r\n"):
        with tls(secure, begin) as wire:
            wire.settimeout(0.02)
            said = b""
            for _ in range(200):
                with contextlib.suppress(TimeoutError):
                    wire.sendall(b" ")
                    said = wire.recv(65536)
                if said:
                    break
            assert said.startswith(b"HTTP/1.1 408 ")
    assert secure.ok("GET", "/v1/jobs")["jobs"] == []


def test_a_silent_connection_ends(secure, monkeypatch):
    monkeypatch.setattr(deploybot, "IDLE_DEADLINE", 1)
    with tls(secure) as silent, tls(secure, GET) as idle:
        read_until(idle, b"}\n")
        assert silent.recv(100) == b"" and idle.recv(100) == b""


@pytest.mark.parametrize("more, length", [(b"Connection: close\r\n", None), (b"X : 1\r\n", None), (b"", 99_999_999)])
def test_the_end_is_told_and_the_answer_arrives_first(secure, more, length):
    """A reader that gets no word of the end must think that somebody cut the line (RFC 8446, 6.1)."""
    request = b"POST /v1/reload HTTP/1.1\r\n" + HOST + BEARER + more
    if length:
        request += b"Content-Length: %d\r\n" % length
    with tls(secure, request + b"\r\n" + b"x" * 300_000 * bool(length), strict=True) as wire:
        said = read_until(wire, b"}\n")
        assert re.match(rb"HTTP/1\.1 (200|400|413) ", said) and b"Connection: close" in said
        assert wire.recv(100) == b""


def test_pipelined_requests_within_one_record_are_all_answered(secure):
    """What OpenSSL has read and nobody has taken yet is not on the socket any more."""
    with tls(secure, GET * 30) as wire:
        said = b""
        while said.count(b"HTTP/1.1 200 OK") < 30:
            said += wire.recv(65536)


def test_nothing_behind_a_refused_request_is_executed(secure):
    made = post("/v1/jobs", {"repo": "o/n", "ref": "main", "host": "web-01"})
    with tls(secure, b"GET /health HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + made) as wire:
        assert read_until(wire, b"}\n").startswith(b"HTTP/1.1 400 ")
        assert wire.recv(100) == b""
    wait_for(lambda: secure.daemon.server.connections() == 0)
    assert secure.ok("GET", "/v1/jobs")["jobs"] == []


def test_a_parked_heartbeat_gets_its_job(secure):
    agent = secure.register()
    with parked(secure, agent) as wire:
        job = secure.create()
        assert job["id"].encode() in read_until(wire, b"}\n")


@pytest.mark.parametrize("way", ["with a word", "cut", "half"])
def test_a_parked_client_that_has_gone_claims_nothing(secure, way):
    agent = secure.register()
    wire = parked(secure, agent)
    if way == "with a word":
        wire.settimeout(0)
        with contextlib.suppress(OSError):
            wire.unwrap()
    if way == "half":
        socket.socket.shutdown(wire, socket.SHUT_WR)
    else:
        wire.close()
    job = secure.create()
    wait_for(lambda: secure.daemon.server.connections() == 0)
    assert secure.job(job["id"])["attempt"] == 0
    wire.close()


def test_a_stream_arrives_and_ends_with_its_reader(secure):
    threads = threading.active_count()
    with tls(secure, b"GET /v1/logs/stream HTTP/1.1\r\n" + HOST + BEARER + b"\r\n") as wire:
        read_until(wire, b"retry: ")
        job = secure.create()
        assert job["id"].encode() in read_until(wire, b"event: job")
    wait_for(lambda: secure.daemon.server.connections() == 0)
    wait_for(lambda: threading.active_count() <= threads)


def test_at_the_limit_the_oldest_unfinished_one_goes_and_who_is_parked_stays(secure):
    agent = secure.register()
    secure.daemon.server._limit = 8
    waiting = parked(secure, agent)
    stream = tls(secure, b"GET /v1/logs/stream HTTP/1.1\r\n" + HOST + BEARER + b"\r\n")
    read_until(stream, b"retry: ")
    crowd = []
    for begin in (plain, plain, lambda c: plain(c, HELLO), lambda c: tls(c, b"GET /he"), plain, plain):
        crowd.append(begin(secure))
        wait_for(lambda: len(secure.daemon.server.waiting) == len(crowd))
    for _ in range(3):
        with tls(secure, GET) as good:
            assert b" 200 OK" in read_until(good, b"}\n")
    assert crowd[0].recv(10) == b""
    job = secure.create()
    assert job["id"].encode() in read_until(waiting, b"}\n")
    assert job["id"].encode() in read_until(stream, b"event: job")
    for wire in (*crowd, waiting, stream):
        wire.close()


def test_a_cookie_is_for_tls_alone(secure):
    status, headers, _ = secure.raw("POST", "/v1/session", {"token": "dbt_admin"})
    assert status == 200 and re.search(r"; Secure(;|$)", headers["Set-Cookie"])


def test_what_is_being_answered_at_a_stop_is_answered_in_tls(secure, monkeypatch):
    """The stop ends the reading side of a connection that another thread works for; what that one then writes is not in the clear."""
    working, go_on = threading.Event(), threading.Event()

    def slow(*_):
        working.set()
        assert go_on.wait(20)
        return []

    monkeypatch.setattr(secure.jobs, "hosts", slow)
    with tls(secure, b"GET /v1/hosts HTTP/1.1\r\n" + HOST + BEARER + b"\r\n") as wire:
        assert working.wait(20)
        for connection in list(secure.daemon.server.open):
            deploybot.end_of(connection, socket.SHUT_RD)
        go_on.set()
        assert read_until(wire, b"}\n").startswith(b"HTTP/1.1 200 ")


# -- a process ---------------------------------------------------------------------------------------------------------


def test_signals_of_a_process(tmp_path, pairs):
    """SIGHUP reads the pair again, SIGTERM ends what is parked with its answer, within the promised time."""
    cert, key, log = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "log"
    put(pairs[0], cert, key)
    env = {**os.environ, **{"DEPLOYBOT_" + name.upper(): value for name, value in TOKENS.items()}}
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [*command("deploybot.py"), "--host", "127.0.0.1", "--port", "0", "--tls-cert", cert, "--tls-key", key],
            cwd=tmp_path, env=env, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        c = Calls.__new__(Calls)
        c.token, c.trust = "dbt_admin", pairs[0].context()
        c.port = int(wait_for(lambda: re.search(r" listens on \S+ port ([0-9]+)", log.read_text()), 30)[1])
        agents = [c.register(f"web-{i}") for i in range(5)]
        key.write_bytes(pairs[1].key.read_bytes())
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: "certificate in force stays" in log.read_text())
        assert shown(c) == of(pairs[0])
        put(pairs[1], cert, key)
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: shown(c) == of(pairs[1]))
        c.trust = pairs[1].context()
        silent, half = plain(c), plain(c, HELLO)
        stream = tls(c, b"GET /v1/logs/stream HTTP/1.1\r\n" + HOST + BEARER + b"\r\n")
        read_until(stream, b"retry: ")
        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            waiting = [pool.submit(c.beat, agent, wait=25) for agent in agents]
            read = "\ndeploybot_http_connections "
            wait_for(lambda: float(c.raw("GET", "/metrics")[2].decode().split(read)[1].split()[0]) >= 9)
            started = time.monotonic()
            process.terminate()
            assert all(answer.result(20)["acknowledged"] for answer in waiting)
        assert process.wait(20) == 0 and time.monotonic() - started < 8
        assert read_until(stream, b"0\r\n\r\n")
        for wire in (silent, half, stream):
            wire.close()
        assert "Traceback" not in log.read_text() and log.read_text().splitlines()[-1].endswith("stopped")
    finally:
        process.kill()
        process.wait()
