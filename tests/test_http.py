"""HTTP on raw sockets: the one answer that each odd request gets, and what a connection does before and after it."""

import contextlib
import itertools
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
from typing import NamedTuple

import pytest
from conftest import SECRET, TOKENS, Controller, wait_for

import deploybot

HOST = b"Host: 127.0.0.1\r\n"
ADMIN = b"Authorization: Bearer dbt_admin\r\n"
JOB = json.dumps({"repo": "o/n", "ref": "main", "host": "web-01"}).encode()


def post(body=JOB, more=b"", path=b"/v1/jobs"):
    return b"POST %b HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n%b" % (path, HOST, more, len(body), body)


def get(path=b"/health", more=b""):
    return b"GET %b HTTP/1.1\r\n%b%b\r\n" % (path, HOST, more)


class Wire:
    """One connection; reads whole answers."""

    def __init__(self, controller, timeout=20):
        self.socket = socket.create_connection(("127.0.0.1", controller.port), timeout=timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is sent in pieces arrives in pieces
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


def jobs(controller, query=""):
    return controller.ok("GET", f"/v1/jobs{query}")["jobs"]


# -- one answer each ---------------------------------------------------------------------------------------------------

CLOSED, KEPT = "closed", "kept"


class Probe(NamedTuple):
    sent: bytes
    status: int
    then: str  # what becomes of the connection
    why: str = ""  # a word of the answer's detail, where one status has several reasons


PROBES: dict[str, Probe] = {}


def probes(status, then, rows, why=""):
    for name, sent in rows.items():
        assert name not in PROBES, name
        PROBES[name] = Probe(sent, status, then, why)


def line(text, more=b""):
    """A request with this first line."""
    return text + b"\r\n" + HOST + more + b"\r\n"


def job(more=b"", body=JOB):
    """A request that makes a job, if anything takes it: for `refused-01`, where there must be none."""
    return post(body.replace(b"web-01", b"refused-01"), ADMIN + more)


def lengths(*values, body=b"12345"):
    """A POST with these Content-Length lines and no other."""
    return line(b"POST /v1/jobs HTTP/1.1", ADMIN + b"".join(b"Content-Length: %b\r\n" % one for one in values)) + body


def bad(body):
    return post(body, ADMIN)


def quoted(data):
    return ascii(data)[1:]


PAD = b"X: %b\r\n"
SMUGGLED = job()
CONTROLS = [bytes([code]) for code in (*range(0x00, 0x09), *range(0x0A, 0x20), 0x7F)]
SIGNED = b"X-Hub-Signature-256: sha256=" + b"0" * 64 + b"\r\n"


def head_of(size, first=b"GET /health HTTP/1.1\r\n" + HOST, width=4000):
    """A head of exactly so many bytes, without its blank line, in lines of at most `width`."""
    left = size - len(first)
    while left > width + 5:
        first += PAD % (b"a" * (width - 3))
        left -= width + 2
    return first + b"X: " + b"a" * (left - 3) + b"\r\n\r\n"


# trust.md 1: what says how long a body is. Each pair is one that two servers have told apart differently.
CHUNKED = b"Transfer-Encoding: chunked\r\n"
EMBEDDED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)
probes(400, CLOSED, {
    "chunked": line(b"POST /v1/jobs HTTP/1.1", ADMIN + CHUNKED) + EMBEDDED,
    "chunked, the last chunk alone": line(b"POST /v1/jobs HTTP/1.1", CHUNKED) + b"0\r\n\r\n",
    "chunked with trailers": line(b"POST /v1/jobs HTTP/1.1", b"Trailer: X\r\n" + CHUNKED) + b"0\r\nX: a\r\n" + ADMIN + b"\r\n",
    "chunked with an extension": line(b"POST /v1/jobs HTTP/1.1", CHUNKED) + b"0;a=\"\r\n\r\n" + SMUGGLED,
    "CL.TE": line(b"POST /v1/jobs HTTP/1.1", ADMIN + b"Content-Length: 6\r\n" + CHUNKED) + b"0\r\n\r\nG",
    "TE.CL": line(b"POST /v1/jobs HTTP/1.1", ADMIN + CHUNKED + b"Content-Length: 4\r\n") + EMBEDDED,
    "transfer-encoding and a good length": job(CHUNKED),
    "chunked on a GET": get(more=CHUNKED) + EMBEDDED,
    "chunked in HTTP/1.0": line(b"POST /v1/jobs HTTP/1.0", ADMIN + CHUNKED) + EMBEDDED,
    "chunked twice": job(CHUNKED + CHUNKED),
    "chunked, then identity": job(CHUNKED + b"Transfer-Encoding: identity\r\n"),
    **{f"transfer-encoding {quoted(value)}": job(b"Transfer-Encoding:" + value + b"\r\n") for value in (
        b"", b" identity", b" gzip, chunked", b" chunked, identity", b" xchunked", b" \"chunked\"", b" CHUNKED", b"\tchunked",
        b"chunked", b" chunked ", b" ,chunked", b" chunked;q=1",
    )},
    "transfer-ENCODING": job(b"transfer-ENCODING: chunked\r\n"),
}, why="Transfer-Encoding")  # fmt: skip
probes(400, CLOSED, {
    "transfer-encoding behind a space": job(b"Transfer-Encoding : chunked\r\n"),
    "transfer-encoding behind VT": job(b"Transfer-Encoding:\x0bchunked\r\n"),
    "transfer-encoding behind FF": job(b"Transfer-Encoding: \x0cchunked\r\n"),
    "transfer-encoding ahead of NUL": job(b"Transfer-Encoding: chunked\0\r\n"),
    "transfer-encoding folded": job(b"Transfer-Encoding:\r\n chunked\r\n"),
    "transfer-encoding in a folded line": job(b"X: a\r\n Transfer-Encoding: chunked\r\n"),
    "transfer-encoding after LF": job(b"X: a\nTransfer-Encoding: chunked\r\n"),
    "transfer-encoding after CR": job(b"X: a\rTransfer-Encoding: chunked\r\n"),
    "transfer-encoding with a blank ahead": job(b" Transfer-Encoding: chunked\r\n"),
    "transfer-encoding with NUL in its name": job(b"Transfer\0Encoding: chunked\r\n"),
    "CL.CL": lengths(b"5", b"6"),
    "CL.CL, equal": lengths(b"5", b"5"),
    "CL.CL, other case": lengths(b"5\r\ncontent-LENGTH: 5"),
    "CL.CL on a GET": get(more=b"Content-Length: 0\r\nContent-Length: 5\r\n") + b"12345",
})  # fmt: skip
probes(400, CLOSED, {
    f"length {quoted(value[:14])}": lengths(value) for value in (
        b"-1", b"-0", b"+3", b"+0", b"1_0", b"0x5", b"0b1", b"", b" ", b"5, 5", b"5,5", b"5 5", b"5\t5", b"5;", b"'5'", b"5.", b"1.0",
        b"1e1", b"five", b"5a", b"NaN", b"9" * 10, b"0" * 10, b"9" * 5000, b"\xb2", b"\xb5", "\u0665".encode(), "\uff15".encode(),
        b"\xa05", b"5\xa0", b"5\x85",
    )
}, why="Content-Length")  # fmt: skip
probes(400, CLOSED, {f"length 5 and {quoted(code)}": lengths(b"5" + code) for code in (b"\0", b"\x0b", b"\x0c", b"\r", b"\n")})
probes(413, CLOSED, {
    "a body over the limit": bad(b" " * (deploybot.MAX_BODY + 1)),
    "999,999,999 bytes": lengths(b"999999999"),
    "999,999,999 bytes for a GET": get(more=b"Content-Length: 999999999\r\n"),
    "a push over 25 MiB": line(b"POST /v1/webhooks/github HTTP/1.1", SIGNED + b"Content-Length: 26214401\r\n"),
})  # fmt: skip
probes(200, KEPT, {
    "a body where none is needed": get(more=b"Content-Length: %d\r\n" % len(SMUGGLED)) + SMUGGLED,
    "a body of HEAD": get(more=b"Content-Length: %d\r\n" % len(SMUGGLED)).replace(b"GET", b"HEAD", 1) + SMUGGLED,
    "length 000": get(more=b"Content-Length: 000\r\n"),
    "length 9 digits": get(more=b"Content-Length: 000000005\r\n") + b"12345",
    "length with blanks around it": get(more=b"Content-Length: \t 5 \t\r\n") + b"12345",
    "an underscore is another name": get(more=b"Transfer_Encoding: chunked\r\nContent_Length: 5\r\n"),
    "TE is no transfer-encoding": get(more=b"TE: trailers, chunked\r\nTrailer: X\r\n"),
    "connection names no length away": get(more=b"Connection: keep-alive, Content-Length\r\nContent-Length: %d\r\n" % len(SMUGGLED)) + SMUGGLED,
    "an upgrade is not made": get(more=b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"),
    "no websocket either": get(more=b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"),
})  # fmt: skip
probes(400, KEPT, {"no length is no body": line(b"POST /v1/jobs HTTP/1.1", ADMIN)}, why="JSON")

# trust.md 2: what ends a line, and what a line may hold
probes(400, CLOSED, {
    **{f"{quoted(code)} in a value": get(more=b"X: a%bAuthorization: evil\r\n" % code) for code in CONTROLS},
    **{f"{quoted(code)} ahead of a value": get(more=b"X:%ba\r\n" % code) for code in CONTROLS},
    **{f"{quoted(code)} after a value": get(more=b"X: a%b\r\n" % code) for code in CONTROLS},
    **{f"{quoted(code)} in a name": get(more=b"X%bY: a\r\n" % code) for code in CONTROLS},
    **{f"{quoted(code)} after a name": get(more=b"X%b: a\r\n" % code) for code in (*CONTROLS, b" ", b"\t")},
    **{f"{quoted(code)} ahead of a name": get(more=b"%bX: a\r\n" % code) for code in (*CONTROLS, b" ", b"\t")},
    **{f"{quoted(code)} in the path": get(b"/hea%blth" % code) for code in (*CONTROLS, b" ", b"\t", b"\x80", b"\xff")},
    **{f"{quoted(code)} in the query": get(b"/health?a=%b" % code) for code in (*CONTROLS, b" ", b"\t", b"\x80", b"\xff")},
    **{f"a name with {quoted(code)}": get(more=b"X%bY: a\r\n" % code) for code in (
        b"(", b")", b"<", b">", b"@", b",", b";", b"\\", b'"', b"/", b"[", b"]", b"?", b"=", b"{", b"}", b" ", b"\t", b"\x80", b"\xff", "Ü".encode(),
    )},
    "LF-only lines": b"GET /health HTTP/1.1\nHost: x\n\n",
    "LF after the first line": b"GET /health HTTP/1.1\n" + HOST + b"\r\n",
    "LF after a header": b"GET /health HTTP/1.1\r\nHost: x\n\r\n",
    "LF LF as the end": b"GET /health HTTP/1.1\r\n" + HOST[:-2] + b"\n\n",
    "CR CR LF": get(more=b"X: a\r\r\n"),
    "CR-only lines": b"GET /health HTTP/1.1\rHost: x\r\r",
    "LF CR": b"GET /health HTTP/1.1\n\rHost: x\n\r\n\r",
    "a folded line": get(more=b"X: a\r\n b\r\n"),
    "a line folded with a tab": get(more=b"X: a\r\n\tb\r\n"),
    "a line of blanks": get(more=b"X: a\r\n   \r\n"),
    "the first header folded": b"GET /health HTTP/1.1\r\n " + HOST + b"\r\n",
    "no colon": get(more=b"nonsense\r\n"),
    "no name": get(more=b": x\r\n"),
    "a colon alone": get(more=b":\r\n"),
    "a blank ahead of a length": get(more=b" Content-Length: 5\r\n"),
    "a space before the colon of a length": get(more=b"Content-Length : 5\r\n") + b"12345",
    "a token behind a bare CR": b"POST /v1/jobs HTTP/1.1\r\n" + HOST + b"X: a\r" + ADMIN + b"Content-Length: %d\r\n\r\n%b" % (len(JOB), JOB),
    "an empty line ahead": b"\r\n" + get(),
    "a blank line ahead": b" \r\n" + get(),
    "only empty lines": b"\r\n\r\n",
})  # fmt: skip
probes(200, KEPT, {
    "blanks around a value": get(more=b"X:\t a \t\r\n"),
    "no blank ahead of a value": get(more=b"X:a\r\n"),
    "an empty value": get(more=b"X:\r\n"),
    "a tab in a value": get(more=b"X: a\tb\r\n"),
    "bytes over 127 in a value": get(more=b"X: \xff\xfe\x80\x85\xa0\r\n"),
    "a header twice": get(more=b"X: a\r\nX: b\r\n"),
    "every letter of a name": get(more=b"!#$%&'*+.^_`|~0-9Az: a\r\n"),
    "colons in a value": get(more=b"X:: a: b\r\n"),
})  # fmt: skip

# trust.md 3: how much of a head
probes(431, CLOSED, {
    "a path of over 8 KiB": get(b"/health?" + b"a" * 9000),
    "a first line one over 8 KiB": get(b"/health?" + b"a" * (deploybot.MAX_LINE - 20)),
    "a first line of over 8 KiB, unfinished": b"GET /" + b"a" * 9000,
    "a value of over 8 KiB": get(more=b"X: " + b"a" * 9000 + b"\r\n"),
    "a header line one over 8 KiB": get(more=PAD % (b"a" * (deploybot.MAX_LINE - 2))),
    "a name of over 8 KiB": get(more=b"X" * 9000 + b": a\r\n"),
    "a head of one over 16 KiB": head_of(deploybot.MAX_HEAD + 1),
    "a head of over 16 KiB": get(more=b"X-Y: zzzzzzzz\r\n" * 1200),
    "a head of over 16 KiB, unfinished": b"GET /health HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 3000,
    "a line of over 16 KiB, unfinished": b"GET /health HTTP/1.1\r\n" + HOST + b"X: " + b"y" * 17000,
    "5,000 headers": get(more=b"a:\r\n" * 5000),
    "a cookie of 100 KB": get(more=b"Cookie: a=" + b"b" * 100_000 + b"\r\n"),
})  # fmt: skip
probes(200, KEPT, {
    "a first line of 8 KiB": get(b"/health?" + b"a" * (deploybot.MAX_LINE - 21)),
    "a header line of 8 KiB": get(more=PAD % (b"a" * (deploybot.MAX_LINE - 3))),
    "a head of 16 KiB": head_of(deploybot.MAX_HEAD),
    "2,000 headers": get(more=b"a:b\r\n" * 2000),
})  # fmt: skip

# trust.md 4: the first line, and whose host
VERSIONS = (b"HTTP/0.9", b"HTTP/1.2", b"HTTP/1.10", b"HTTP/1.01", b"HTTP/01.1", b"HTTP/2.0", b"HTTP/2", b"HTTP/3", b"HTTP/1", b"HTTP/1.", b"HTTP/.1",
            b"HTTP/-1.1", b"HTTP/+1.1", b"HTTP/1.1.1", b"HTTP 1.1", b"HTTP/ 1.1", b"HTTP/1 .1", b"http/1.1", b"Http/1.1", b"HTTPS/1.1", b"ICY/1.1",
            b"HTTP/1,1", b"HTTP/1.x", b"HTTP/1.\xb9", b"/1.1", b"1.1", b"")  # fmt: skip
probes(400, CLOSED, {
    **{f"version {quoted(version)}": line(b"GET /health " + version) for version in VERSIONS},
    **{f"method {quoted(method[:21])}": line(method + b" /health HTTP/1.1") for method in (
        b"get", b"Get", b"gET", b"post", b"G" * 21, b"G" * 2000, b"", b"GE T", b"G\tT", b"G/T", b"GET:", b"G3T", b"GET\0", b"M-SEARCH", b"_GET", b"G\xc9T",
        b'"GET"', b"<GET>",
    )},
    **{f"target {quoted(target[:30])}": line(b"GET " + target + b" HTTP/1.1") for target in (
        b"http://127.0.0.1/health", b"https://127.0.0.1/health", b"HTTP://evil.example/", b"http:/health", b"http:", b"*", b"127.0.0.1:80", b"health", b"?a",
        b"#", b".", b"..", b"\\health", b"%2fhealth", b"", b" /health", b"/health ", b"/hea lth", b"/health\t", "/ü".encode(), b"file:///etc/passwd", b"@evil.example/", b"x/../health",
    )},
    "HTTP/0.9": b"GET /health\r\n",
    "HTTP/0.9 without a path": b"GET\r\n",
    "HTTP/0.9 with headers": b"GET /health\r\n" + HOST + b"\r\n",
    "CONNECT": line(b"CONNECT 127.0.0.1:80 HTTP/1.1"),
    "OPTIONS *": line(b"OPTIONS * HTTP/1.1"),
    "preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0",
    "a PROXY line": b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + get(),
    "a PROXY line of version 2": b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + b"\0" * 12 + get(),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
    "SMTP": b"EHLO evil.example\r\n",
    "an answer": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "two blanks": line(b"GET  /health HTTP/1.1"),
    "two blanks ahead of the version": line(b"GET /health  HTTP/1.1"),
    "a tab as blank": line(b"GET\t/health\tHTTP/1.1"),
    "a blank at the end": line(b"GET /health HTTP/1.1 "),
    "a blank ahead": line(b" GET /health HTTP/1.1"),
    "a word at the end": line(b"GET /health HTTP/1.1 x"),
    "no Host": b"GET /health HTTP/1.1\r\n\r\n",
    "no Host and a body": b"POST /v1/jobs HTTP/1.1\r\n" + ADMIN + b"Content-Length: %d\r\n\r\n%b" % (len(SMUGGLED), SMUGGLED),
    "an empty Host": b"GET /health HTTP/1.1\r\nHost:\r\n\r\n",
    "a Host of blanks": b"GET /health HTTP/1.1\r\nHost: \t \r\n\r\n",
    **{f"Host {quoted(host)}": b"GET /health HTTP/1.1\r\nHost: " + host + b"\r\n\r\n" for host in (
        b"a b", b"a\tb", b"a/b", b"a,b", b"a, b", b"user@a", b"http://a", b"a?b", b"a#b", b"a\\b", b'"a"', b"a:b", b"a:80:80", b"a:-1", b"a:123456", b"[::1", b"::1", b"[g::]",
        b"[]", b"a\xe4", b"a\xff", b"<a>", b"a|b", b"a^b", b"{a}", b"a`",
    )},
    "two Hosts": get(more=b"host: 127.0.0.1\r\n"),
    "two Hosts, two names": get(more=b"HOST: evil.example\r\n"),
    "two Hosts in HTTP/1.0": line(b"GET /health HTTP/1.0", b"Host: x\r\n"),
    "two tokens": get(b"/v1/jobs", ADMIN + b"Authorization: Bearer b\r\n"),
    "two types": get(more=b"Content-Type: a/b\r\ncontent-type: a/b\r\n"),
    "two origins": get(more=b"Origin: http://127.0.0.1\r\nOrigin: http://evil.example\r\n"),
    "two Last-Event-IDs": get(b"/v1/logs/stream", ADMIN + b"Last-Event-ID: a-1\r\nLast-Event-ID: a-2\r\n"),
})  # fmt: skip
probes(404, KEPT, {
    f"path {quoted(path)}": get(path) for path in (
        b"/nothing", b"/v1/../health", b"/../../etc/passwd", b"/./health", b"//evil.example", b"//evil.example/%2e%2e", b"//evil.example/..", b"///evil.example",
        b"/\\evil.example", b"/%2f/evil.example", b"/%5cevil.example", b"/http://evil.example", b"/%68ealth", b"/health/", b"/health//", b"/health;a", b"/health#a",
        b"/health%20", b"/health%00", b"/HEALTH", b"/.", b"/..", b"/www/dashboard.html", b"/deploybot.py", b"/v1", b"/v1/", b"/v1/jobs/", b"/v1//jobs",
        b"/%0d%0aX-Evil:1", b"/%0D%0ALocation:%20//evil.example", b"/%0a", b"/%00", b"/%ff", b"/%", b"/%zz", b"/\"<script>", b"/{id}",
    )
})  # fmt: skip
probes(404, KEPT, {
    f"path {quoted(path)}": get(path, ADMIN) for path in (
        b"/v1/jobs/%0d%0aX-Evil:1", b"/v1/jobs/%00", b"/v1/jobs/..", b"/v1/jobs/%2e%2e%2f", b"/v1/jobs/" + b"9" * 200, b"/v1/jobs/%F0%9F%98%80", b"/v1/jobs/-1/logs",
    )
})  # fmt: skip
probes(405, KEPT, {
    "an unknown method": line(b"BREW /health HTTP/1.1"),
    "a method of 20 letters": line(b"G" * 20 + b" /health HTTP/1.1"),
    "TRACE": line(b"TRACE /health HTTP/1.1", b"X-Secret: a\r\n"),
    "OPTIONS": line(b"OPTIONS /v1/jobs HTTP/1.1", b"Origin: http://evil.example\r\nAccess-Control-Request-Method: POST\r\n"),
    "PUT": line(b"PUT /v1/jobs HTTP/1.1", ADMIN + b"Content-Length: 0\r\n"),
    "HEAD of what takes POST alone": line(b"HEAD /v1/reload HTTP/1.1", ADMIN),
    "PRI": line(b"PRI /health HTTP/1.1"),
})  # fmt: skip
probes(200, KEPT, {
    **{f"Host {quoted(host)}": b"GET /health HTTP/1.1\r\nHost: " + host + b"\r\n\r\n" for host in (
        b"a", b"a:", b"a:80", b"A.B-c_d~e:65535", b"127.0.0.1", b"[::1]", b"[::1]:80", b"[::ffff:1.2.3.4]", b"a%41", b"\ta \t",
    )},
    "a query": get(b"/health?a=%00&b"),
    "an empty query": get(b"/health?"),
    "a method in a header is none": get(more=b"X-HTTP-Method-Override: DELETE\r\nX-Method-Override: PUT\r\nX-Original-URL: /v1/reload\r\nX-Rewrite-URL: /v1/jobs\r\n"),
    "a name that is forwarded moves nothing": get(more=b"X-Forwarded-Host: evil.example\r\nX-Forwarded-Prefix: //evil.example\r\nX-Host: evil.example\r\n"),
})  # fmt: skip

# trust.md 10: what is not read, not expected, or ends the connection all the same
probes(417, CLOSED, {
    f"expect {quoted(value)}": job(b"Expect: " + value + b"\r\n") for value in (
        b"200-ok", b"100", b"100-continue, 100-continue", b"100-continue;q=1", b"\"100-continue\"", b"x, 100-continue", b"100 continue",
    )
})  # fmt: skip
probes(400, CLOSED, {"two expectations": job(b"Expect: 100-continue\r\nexpect: 100-continue\r\n")})
probes(200, KEPT, {
    "an expectation without a body": get(more=b"Expect: 100-continue\r\n"),
    "an empty expectation": get(more=b"Expect:\r\n"),
    "an expectation whose body is there": get(more=b"Expect: 100-Continue\r\nContent-Length: 5\r\n") + b"12345",
})  # fmt: skip
probes(404, CLOSED, {"a body for no path": post(SMUGGLED, ADMIN, b"/v1/nothing")})
probes(405, CLOSED, {
    "a body for another method": post(SMUGGLED, ADMIN, b"/health"),
    "a body of TRACE": post(SMUGGLED, ADMIN).replace(b"POST", b"TRACE", 1),
})  # fmt: skip
probes(401, CLOSED, {
    "a body without a token": post(SMUGGLED),
    "a body of a push without a signature": post(SMUGGLED, path=b"/v1/webhooks/github"),
    "a body with a basic token": post(SMUGGLED, b"Authorization: Basic ZGJ0X2FkbWluOg==\r\n"),
})  # fmt: skip
probes(401, KEPT, {
    "no token": get(b"/v1/jobs"),
    "no token for a write": post(b""),
    "a token in the query": get(b"/v1/jobs?token=dbt_admin&access_token=dbt_admin"),
    "a push with a wrong signature": post(SMUGGLED, SIGNED, b"/v1/webhooks/github"),
})  # fmt: skip
probes(403, CLOSED, {"a body of who may only read": post(SMUGGLED, b"Authorization: Bearer dbt_read\r\n")})
probes(200, CLOSED, {
    "HTTP/1.0": b"GET /health HTTP/1.0\r\n\r\n",
    "HTTP/1.0 with keep-alive": b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    **{f"connection {quoted(value)}": get(more=b"Connection: " + value + b"\r\n") for value in (
        b"close", b"Close", b"x, close", b"close, x", b"x,\tclose", b"keep-alive, close", b"keep-alive\r\nConnection: close",
    )},
})  # fmt: skip
probes(200, KEPT, {
    f"connection {quoted(value)}": get(more=b"Connection: " + value + b"\r\n") for value in (b"keep-alive", b"", b"closed", b"te", b"x")
})  # fmt: skip

# trust.md 12: JSON
FIELDS = b'"repo":"o/n","ref":"main","host":"refused-01"'
probes(400, KEPT, {
    **{f"JSON {name}": bad(body) for name, body in {
        "of nothing": b"", "of blanks": b" \r\n\t", "cut": SMUGGLED[-20:-10], "not closed": b"{" + FIELDS, "twice": b"{" + FIELDS + b"} {}", "and more": b"{" + FIELDS + b"}x",
        "and NUL": b"{" + FIELDS + b"}\0", "with a comma too many": b"{" + FIELDS + b",}", "with single quotes": b"{'repo':'o/n'}", "with a comment": b"{" + FIELDS + b"/**/}",
        "without quotes": b"{repo:1}", "with a BOM": b"\xef\xbb\xbf{" + FIELDS + b"}", "as UTF-16": ("{" + FIELDS.decode() + "}").encode("utf-16"),
        "as UTF-16 without a mark": ("{" + FIELDS.decode() + "}").encode("utf-16-le"), "as UTF-32": "{}".encode("utf-32"),
        "in no UTF-8": b"{" + FIELDS + b',"metadata":{"a":"\xff"}}', "in overlong UTF-8": b'{"\xc0\xaf":1}', "with a surrogate in UTF-8": b'{"metadata":{"a":"\xed\xa0\x80"}}',
        "past U+10FFFF": b'{"a":"\xf4\x90\x80\x80"}', "with a line end in a string": b'{"a":"\n"}', "with a control character": b'{"a":"\x01"}', "with a bad escape": b'{"a":"\\x"}',
        "with a short escape": b'{"a":"\\u12"}', "as a form": b"payload=%7B%7D", "as XML": b"<a/>", "compressed": b"\x1f\x8b\x08\0\0\0\0\0",
        "with a high surrogate": b"{" + FIELDS + b',"metadata":{"a":"\\ud800"}}', "with a low surrogate": b"{" + FIELDS + b',"metadata":{"\\udfff":1}}',
        "with surrogates the wrong way": b"{" + FIELDS + b',"metadata":{"a":"\\ude00\\ud83d"}}', "with a surrogate as host": b'{"repo":"o/n","ref":"main","host":"\\ud800"}',
        "with a key twice": b"{" + FIELDS + b',"host":"refused-01"}', "with an escaped key twice": b"{" + FIELDS + b',"h\\u006fst":"refused-01"}',
        "with an inner key twice": b"{" + FIELDS + b',"metadata":{"a":1,"a":1}}', "with an empty key twice": b'{"":1,"":2}',
    }.items()},
    **{f"JSON of {quoted(number[:12])} ({len(number)})": bad(b"{" + FIELDS + b',"metadata":{"a":' + number + b"}}") for number in (
        b"NaN", b"Infinity", b"-Infinity", b"nan", b"1e999", b"-1e999", b"9223372036854775808", b"-9223372036854775809", b"9" * 20, b"9" * 5000, b"1" + b"0" * 400000,
        b"1." + b"0" * 10 + b"e999", b"+1", b"01", b"-", b".5", b"5.", b"1_0", b"0x1F", b"\xd9\xa5",
    )},
    "JSON 65 deep": bad(b"{" + FIELDS + b',"metadata":' + b'{"a":' * 64 + b"1" + b"}" * 65),
    "JSON of lists 65 deep": bad(b"[" * 65 + b"]" * 65),
    "JSON of 400,000 brackets": bad(b"[" * 400_000),
    "JSON of 500,000 objects": bad(b'{"":' * 200_000),
    "JSON mixed deep": bad(b'[{"a":' * 100_000),
    "JSON behind a string of brackets": bad(b'["' + b"\\\\" * 50 + b'", ' + b"[" * 65 + b"]" * 65 + b"]"),
    "a query that is no UTF-8": get(b"/v1/jobs?host=%ff", ADMIN),
    "a query of 33 parts": get(b"/v1/jobs?" + b"&".join(b"a%d=" % i for i in range(33)), ADMIN),
}, why="")  # fmt: skip
probes(422, KEPT, {
    **{f"JSON {quoted(body[:20])}": bad(body) for body in (b"[]", b"1", b"null", b"true", b'"{}"', b"{}", b"1e308", b"-0", b"[" * 64 + b"]" * 64)},
    **{f"host {quoted(host)}": bad(b'{"repo":"o/n","ref":"main","host":"%b"}' % host) for host in (
        b"", b"refused-01\\n", b"\\u0000", b"refused-01\\r\\nX: y", b"../refused-01", b"-refused-01", "ⓡefused-01".encode(), b"\\u001b[31m", b"refused_01/..",
    )},
    "a field nobody knows": bad(b"{" + FIELDS + b',"role":"admin"}'),
    "a prototype": bad(b"{" + FIELDS + b',"__proto__":{"admin":true}}'),
    "a limit with a sign": get(b"/v1/jobs?limit=%2b5", ADMIN),
    "a limit with an underscore": get(b"/v1/jobs?limit=1_0", ADMIN),
    "a limit of other digits": get(b"/v1/jobs?limit=%D9%A5", ADMIN),
    "a limit of 19 digits": get(b"/v1/jobs?limit=" + b"9" * 19, ADMIN),
    "a limit of 5,000 digits": get(b"/v1/jobs?limit=" + b"9" * 5000, ADMIN),
    "a limit twice": get(b"/v1/jobs?limit=1&limit=2", ADMIN),
    "a control character in the query": get(b"/v1/jobs?host=%0d%0aX-Evil:%201", ADMIN),
})  # fmt: skip


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    """One for all probes: what they leave behind would show in the next."""
    controller = Controller(tmp_path_factory.mktemp("closed"), webhook_secret=SECRET, **TOKENS)
    yield controller
    controller.stop()


AFTER = itertools.count()


def followed(sent, host=None, ref="main"):
    """(the probe and a request that makes a job behind it, the host of that job)."""
    host = host or f"after-{next(AFTER)}"
    made = {"repo": "o/n", "ref": ref, "host": host}
    return sent + post(json.dumps(made).encode(), ADMIN), host


def at_once(wire, sent):
    wire.send(sent)


def in_pieces(wire, sent):
    """Some bytes a packet, so that most end within a line."""
    step = 7 if len(sent) < 700 else 4001
    for start in range(0, len(sent), step):
        wire.send(sent[start : start + step])


def settled(controller):
    """Once every connection has ended: nothing more can come of what they were sent."""
    deadline = time.monotonic() + 15
    while controller.daemon.server.connections():
        assert time.monotonic() < deadline
        time.sleep(0.0002)


@pytest.mark.parametrize("name", PROBES)
def test_the_one_answer(closed, name):
    """Alone, with a request that makes a job right behind it, and so again in pieces. Behind a refused one nothing is executed."""
    sent, status, then, why = PROBES[name]
    whole, host = followed(sent)
    for send, data in ((at_once, sent), (at_once, whole), (in_pieces, followed(sent, host, "other")[0])):
        with Wire(closed) as wire:
            with contextlib.suppress(ConnectionError):
                send(wire, data)
            got, headers, body = wire.answer(body=not sent.startswith(b"HEAD"))
            if got == 100 and then == KEPT:  # its body had not come yet
                got, headers, body = wire.answer()
            assert (got, headers["connection"]) == (status, {CLOSED: "close", KEPT: "keep-alive"}[then]), body
            assert not {"location", "server", "x-evil", "access-control-allow-origin"} & set(headers)
            assert status != 405 or headers["allow"]
            if status >= 400 and body:
                assert headers["content-type"] == "application/problem+json"
                assert json.loads(body)["status"] == status and why in json.loads(body)["detail"]
            if then == KEPT and data is not sent:
                assert wire.answer()[0] == 201, "the connection goes on"
            if then == CLOSED:
                assert wire.rest() == b"", "one answer and the end"
    settled(closed)
    with Wire(closed) as wire:
        wire.send(get(f"/v1/jobs?host={host}".encode(), ADMIN) + get(b"/v1/jobs?host=refused-01&status=pending", ADMIN))
        behind, refused = (json.loads(wire.answer()[2])["jobs"] for _ in range(2))
        for made in refused:  # none of the next probe's
            wire.send(post(b"", ADMIN, f"/v1/jobs/{made['id']}/cancel".encode())).answer()
    assert len(behind) == (2 if then == KEPT else 0)
    assert refused == []


def test_the_probes_would_make_their_job_if_they_were_good(closed):
    """Else they would prove nothing."""
    for sent in (job(), SMUGGLED):
        with Wire(closed) as wire:
            assert wire.send(sent.replace(b"refused-01", b"taken---01")).answer()[0] == 201
    assert len(jobs(closed, "?host=taken---01")) == 1


def test_a_wrong_line_is_refused_without_waiting_for_the_end_of_the_head(closed):
    """A lone bad line, as other protocols begin with, is answered and not left to the deadline."""
    alone = [name for name, probe in PROBES.items() if b"\r\n\r\n" not in probe.sent]
    assert {"HTTP/0.9", "LF-only lines", "TLS", "SSH", "a first line of over 8 KiB, unfinished"} <= set(alone)
    for name in (*alone, "target " + quoted(b"http://127.0.0.1/health"), "HTTP/0.9 with headers"):
        with Wire(closed) as wire:
            first = PROBES[name].sent if name in alone else PROBES[name].sent.partition(b"\r\n")[0] + b"\r\n"
            assert wire.send(first).answer()[0] == PROBES[name].status, name


def test_it_does_not_matter_where_a_head_is_cut():
    """Packets end where they like: what is refused before its head is whole is refused as the whole is, and a good one never."""
    for name, (sent, status, then, _) in PROBES.items():
        end = sent.find(b"\r\n\r\n") + 4
        size = len(sent) if end < 4 else end
        cuts = range(size) if size < 400 else {*range(0, size, 997), *(size - back for back in range(1, 9))}
        for cut in cuts:
            try:
                deploybot.Handler._check_unfinished(sent[:cut])
            except deploybot.Refusal as refusal:
                assert (refusal.status, then) == (status, CLOSED), (name, cut)


def test_a_refused_request_ends_what_was_pipelined_before_and_behind(closed):
    """Good ones ahead are answered, in order; the bad one is the last."""
    for name in ("CL.TE", "two Hosts", "LF after a header", "a body without a token"):
        ahead, before = followed(b"")
        behind, after = followed(PROBES[name].sent)
        with Wire(closed) as wire:
            wire.send(ahead + behind + get())
            assert [wire.answer()[0], wire.answer()[0]] == [201, PROBES[name].status]
            assert wire.rest() == b""
        assert len(jobs(closed, f"?host={before}")) == 1 and jobs(closed, f"?host={after}") == []


# -- time --------------------------------------------------------------------------------------------------------------


def trickle(wire, data, seconds):
    """Sends byte by byte until there is an answer."""
    deadline = time.monotonic() + seconds
    for byte in data:
        if select.select([wire.socket], [], [], 0.02)[0] or time.monotonic() > deadline:
            return
        wire.send(bytes([byte]))


def test_a_head_that_trickles_has_a_deadline(wire, monkeypatch):
    monkeypatch.setattr(deploybot, "HEAD_DEADLINE", 0.5)
    started = time.monotonic()
    trickle(wire, b"GET /health HTTP/1.1\r\nX: " + b"a" * 2000, 15)
    status, headers, _ = wire.answer()
    assert time.monotonic() - started < 5, "its own bytes put no deadline off"
    assert (status, headers["connection"]) == (408, "close")
    assert wire.rest() == b""


def test_the_deadline_of_a_head_begins_anew_with_each_request(wire, monkeypatch):
    """It counts from the first byte of a head, not from the connection, and for what was pipelined too."""
    monkeypatch.setattr(deploybot, "HEAD_DEADLINE", 0.3)
    for _ in range(3):
        started = time.monotonic()
        assert wire.send(get()[:-2]).send(b"\r\n").answer()[0] == 200
        while time.monotonic() < started + 0.15:
            select.select([wire.socket], [], [], 0.05)
    assert wire.send(get() + b"GET").answer()[0] == 200
    assert wire.answer()[0] == 408


def test_a_body_that_trickles_has_a_deadline(controller, wire, monkeypatch):
    monkeypatch.setattr(deploybot, "BODY_DEADLINE", 0.5)
    wire.send(b"POST /v1/jobs HTTP/1.1\r\n" + HOST + b"Content-Length: 2000\r\n\r\n")
    started = time.monotonic()
    trickle(wire, b" " * 2000, 15)
    assert wire.answer()[0] == 408
    assert time.monotonic() - started < 5, "its own bytes put no deadline off"
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


# -- bodies ------------------------------------------------------------------------------------------------------------


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
        wire.send(line + b" HTTP/1.1\r\n" + HOST + token + b"Expect: 100-continue\r\nContent-Length: " + length + b"\r\n\r\n")
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


# -- connections -------------------------------------------------------------------------------------------------------


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


# -- headers of answers ------------------------------------------------------------------------------------------------


def test_no_request_makes_a_header(wire):
    for path in (b"/%0d%0aX-Evil:1", b"/v1/hosts/%0d%0aX-Evil:1", b"/v1/jobs?host=%0d%0aX-Evil:%201", b"/x?%0aX-Evil=1"):
        for method in (b"GET", b"PUT", b"DELETE"):
            _, headers, _ = wire.send(get(path).replace(b"GET", method)).answer()
            assert "x-evil" not in headers
    for value in ("a\r\nX-Evil: 1", "a\n", "\0"):
        with pytest.raises(ValueError, match="header value"):
            deploybot.header_value(value)


def test_answers_name_no_version_and_are_not_sniffed(wire):
    for path in (b"/health", b"/v1/jobs", b"/", b"/docs", b"/redoc", b"/openapi.json", b"/agent.py", b"/ctl.py", b"/no"):
        _, headers, _ = wire.send(get(path)).answer()
        assert headers["x-content-type-options"] == "nosniff" and "server" not in headers


@pytest.mark.parametrize("path", [b"/", b"/docs", b"/redoc"])
def test_pages_run_only_their_own_script(wire, path):
    status, headers, body = wire.send(get(path)).answer()
    policy = headers["content-security-policy"]
    assert status == 200 and headers["referrer-policy"] == "no-referrer"
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    nonce = re.search(r"script-src 'nonce-([^']+)'", policy)[1]
    opened = [tag for tag in re.findall(rb"<(?:script|style)\b[^>]*>", body) if b"text/plain" not in tag]
    # the header came in lower case through `answer`
    assert opened and all(re.search(rb'nonce="([^"]+)"', tag)[1].decode().lower() == nonce for tag in opened)
    again = wire.send(get(path)).answer()[1]["content-security-policy"]
    assert nonce not in again, "each answer has its own"


def test_a_500_shows_no_internals(controller, wire, caplog, monkeypatch):
    def fails(*page):
        raise RuntimeError("hunter2 in /etc/shadow")

    monkeypatch.setattr(controller.jobs, "hosts", fails)
    status, _, body = wire.send(get(b"/v1/hosts")).answer()
    assert status == 500
    for inner in (b"hunter2", b"RuntimeError", b"Traceback", b"deploybot.py", b"File"):
        assert inner not in body
    assert "hunter2" in caplog.text, "the log says more"
    assert wire.send(get()).answer()[0] == 200, "the connection goes on"


# -- who is this machine (open mode) -----------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [
    b"Forwarded: for=1.2.3.4", b"X-Forwarded-For: 1.2.3.4", b"X-Forwarded-Proto: https", b"Via: 1.1 proxy",
    b"Origin: https://evil.example", b"Origin: null", b"Sec-Fetch-Site: cross-site", b"Sec-Fetch-Site: same-site",
])  # fmt: skip
def test_what_only_looks_local_needs_a_token(wire, header):
    assert wire.send(get(b"/v1/jobs", header + b"\r\n")).answer()[0] == 401


@pytest.mark.parametrize("host, status", [
    (b"localhost:8080", 200), (b"[::1]:1", 200), (b"127.1.2.3", 200), (b"evil.example", 401), (b"10.0.0.1", 401),
    (b"localhost.evil.example", 401), (b"127.0.0.1.evil.example:80", 401), (b"localhost@evil.example", 400),
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
