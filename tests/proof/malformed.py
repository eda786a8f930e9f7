"""Malformed requests: 10,000 (short form: 1,500) seeded ones to every route, and the controller is as it was before.

Good requests of every route are damaged: bytes, headers, query, JSON, length, token, signature; cut, pipelined, in pieces,
left by a close, a reset or half a close; some are random bytes. Then holds: no 5xx (503 only with Retry-After, where it is a
limit), each answer is well-formed, no hang, no traceback and no error in the log, threads and descriptors are back, memory
grew by less than 5 MB, the database is sound and a good request is served.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import copy
import hashlib
import hmac
import json
import os
import pathlib
import random
import re
import select
import socket
import sqlite3
import struct
import sys
import threading
import time

import common
from common import AGENT_TOKEN, READ_TOKEN, TOKEN, Proof, check, run, wait_for

sys.path.insert(0, str(common.ROOT))
from deploybot import ROUTES

SECRET = "It's a Secret to Everybody"
SHORT, FULL = 1_500, 10_000
CLIENTS = 8  # threads that send
GROWTH = 5_000_000  # bytes that the controller may keep
HANG = 10.0  # seconds for an answer, where nothing may wait
WARM = 1_100  # jobs ahead of all, which fill what is remembered of recent events
SHA = "0123456789abcdef0123456789abcdef01234567"
NASTY_BYTES = (
    b"\r", b"\n", b"\0", b"\r\n", b"\r\n\r\n", b"\n\n", b" ", b"\t", b":", b",", b";", b"/", b"//", b"..", b"%", b"%00", b"%0d%0a", b"?", b"#", b"&", b"=",
    b"\x7f", b"\x80", b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b'"', b"\\", b"\\u", b"\\ud800", b"'", b"-", b"+", b"9",
    b"0" * 40, b"9" * 40, b"A" * 5000, b"A" * 20000, b"[" * 3000, b"NaN", b"null", b"1e999", b"HTTP/1.1", b"HTTP/0.9", b"GET", b"POST", b"Content-Length: 5",
    b"Transfer-Encoding: chunked\r\n", b"Host: x\r\n", b"Expect: 100-continue\r\n", b"Connection: close\r\n",
)  # fmt: skip
NASTY_HEADERS = (
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", b"Content-Length: 0", b"Content-Length: 3", b"Content-Length: -1", b"Content-Length: +1",
    b"Content-Length: 99999999", b"Content-Length: 999999999999", b"content-length:1_0", b"Host: evil.example", b"host:", b"Expect: 100-continue", b"Expect: x",
    b"Connection: close", b"Connection: upgrade", b"Upgrade: h2c", b"X: " + b"y" * 9000, b"X: \xff\xfe", b"X\x01: a", b"X : a", b" X: a", b"X: a\rY: b", b"X: a\nY: b",
    b"Origin: null", b"Origin: https://evil.example", b"Origin: :::", b"Sec-Fetch-Site: cross-site", b"Last-Event-ID: a-1", b"Last-Event-ID: " + b"9" * 400,
    b"Last-Event-ID: \xff", b"Last-Event-ID: --", b"Cookie: deploybot_session=" + TOKEN.encode(), b"Cookie: deploybot_session=\xff", b"Cookie: ;;==;" + b";" * 3000,
    b"X-Forwarded-For: 1.2.3.4", b"X-Forwarded-For: " + b"," * 3000, b"X-Forwarded-Proto: https", b"Forwarded: for=\"", b"X-GitHub-Event: " + b"z" * 3000,
    b"X-GitHub-Delivery: \xff\xfe" + b"d" * 400, b"X-Hub-Signature-256: sha256=", b"Content-Type: application/x-www-form-urlencoded", b"Content-Type: \xff;;;",
    b"Accept: text/plain", b"Accept: \xff", b"Range: bytes=0-,5-1", b"If-None-Match: *", b"Authorization: Bearer", b"Authorization: Basic Og==", b"TE: trailers",
)  # fmt: skip
NASTY_VALUES = (
    None, True, False, -1, 0, 1, 25, 1.5, -0.0, 1e308, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63) - 1, 10**400, float("nan"), float("inf"), "", " ", "a", "A" * 300,
    "A" * 70_000, "\ud800", "\udfff\ud800", "\0", "\r\n", "\x1b[31m", "\u202e", "\u2028", "\U0001f600", "../../etc/passwd", "-rf", "$(id)", "a;touch${IFS}x", "';--",
    "%s%n", "{0}", "null", "2026-11-23T13:13:37.123Z", "9999-99-99T99:99:99Z", "2026-02-30T00:00:00+99:99", SHA, "f" * 64, [], {}, [[]], [{}], {"a": {"b": [None]}},
    [0] * 2000, ["x"] * 1500, [{"message": "m"}] * 1001, {str(i): i for i in range(500)}, "[" * 100, "main", "web-01", "o/n", "success", "admin", 365 * 86400,
)  # fmt: skip
NASTY_QUERIES = (
    b"limit=", b"limit=-1", b"limit=%2b1", b"limit=1_0", b"limit=99999999999999999999", b"limit=1&limit=2", b"before=x", b"before=%00", b"id=%ff", b"id=-", b"host=%0d%0a",
    b"host=" + b"a" * 300, b"app=..", b"repo=%2f", b"status=pending", b"status=%F0%9F%98%80", b"after=-1", b"after=9007199254740993", b"tail=1001", b"job_id=x", b"x=y",
    b"&&&&", b"=", b"%", b"%zz", b"a=b" * 500, b"&".join(b"a%d=" % i for i in range(40)), b"limit=1;limit=2", b"deployment_id=x", b"before=" + b"z" * 101, b"who=%", b"action=" + b"a" * 300, b"limit=1000",
)  # fmt: skip


class Samples:
    """A good request of every route, with ids that exist."""

    def __init__(self, controller: common.Controller):
        client = controller.client()
        self.agent = client.ok("POST", "/v1/agents/register", {"hostname": "web-01", "slots": 64})
        self.job = client.ok("POST", "/v1/jobs", {"repo": "o/n", "ref": "main", "host": "web-01"})["job"]["id"]
        client.ok("POST", f"/v1/agents/{self.agent['id']}/heartbeat", {"status": "online"})
        self.token = client.ok("POST", "/v1/tokens", {"role": "viewer", "name": "sample"})["token"]["id"]
        self.deployment = client.ok("POST", "/v1/deployments", {"app": "app", "ref": "main"})["deployment"]["id"]
        self.epoch = self._epoch(controller)
        client.close()
        self.bodies = {
            "/v1/agents/register": {"hostname": "web-02", "capabilities": {"a": 1}, "slots": 2, "token_sha256": "a" * 64},
            "/v1/agents/{id}/heartbeat": {
                "status": "online", "session": self.agent["session"], "running": [{"job_id": self.job, "attempt": 1}], "wait": 0,
                "current": {"app": SHA},
            },
            "/v1/jobs": {
                "repo": "o/n", "ref": "main", "host": "web-03", "metadata": {"a": [1]}, "force": True, "timeout": 60, "retries": 1,
                "override": True,
            },
            "/v1/jobs/{id}/logs": {
                "attempt": 1, "offset": 0, "lines": [{"message": "m", "level": "info", "timestamp": "2026-11-23T13:13:37Z"}], "commit": SHA,
            },
            "/v1/jobs/{id}/result": {"attempt": 1, "status": "failed", "exit_code": 1, "error": "e", "reason": "exit_code", "commit": SHA},
            "/v1/deployments": {
                "app": "app", "ref": "main", "hosts": ["web-01"], "rollback": False, "to": None, "lock": True, "override": True, "force": True,
                "dry_run": False, "metadata": {"a": [1]},
            },
            "/v1/hooks/{app}": {"ref": "main", "commit": SHA, "message": "m", "pusher": "ci", "hosts": ["web-01"]},
            "/v1/apps/{app}/lock": {"reason": "r", "for": 1},
            "/v1/tokens": {"role": "agent", "host": "web-01", "expires_in": 60},
            "/v1/session": {"token": TOKEN},
            "/v1/webhooks/github": {
                "ref": "refs/heads/main", "before": "0" * 40, "after": SHA, "deleted": False,
                "repository": {"full_name": "myorg/app", "default_branch": "main", "pushed_at": 1_790_000_000},
                "head_commit": {"id": SHA, "message": "m", "timestamp": "2026-11-23T13:13:37Z"}, "pusher": {"name": "octocat"},
            },
        }  # fmt: skip
        self.empty = {  # writes that take no body
            "/v1/jobs/{id}/cancel", "/v1/jobs/{id}/retry", "/v1/hosts/{hostname}/drain", "/v1/hosts/{hostname}/resume",
            "/v1/hosts/{hostname}/reset", "/v1/reload", "/v1/deployments/{id}/cancel", "/v1/deployments/{id}/retry",
        }  # fmt: skip
        missing = {route.pattern for route in ROUTES if route.method in ("POST", "PUT")} - set(self.bodies) - self.empty
        check(not missing, "no sample for", missing)

    @staticmethod
    def _epoch(controller: common.Controller) -> str:
        with socket.create_connection(("127.0.0.1", controller.port), timeout=30) as stream:
            stream.sendall(b"GET /v1/logs/stream?tail=0 HTTP/1.0\r\nAuthorization: Bearer %b\r\n\r\n" % TOKEN.encode())
            said = b""
            while b"id: " not in said:
                said += stream.recv(4096)
        return re.search(rb"id: (.+)-[0-9]+\n", said)[1].decode()

    def path(self, pattern: str) -> bytes:
        ids = {"agents": self.agent["id"], "deployments": self.deployment, "deliveries": "1", "tokens": self.token}
        _, _, kind, *_ = f"{pattern}//".split("/", 3)
        for name, value in (("{hostname}", "web-02"), ("{app}", "app"), ("{id}", ids.get(kind, self.job))):
            pattern = pattern.replace(name, value)
        return pattern.encode()


class Maker:
    """Makes one connection's worth of bytes from a generator of random numbers."""

    def __init__(self, samples: Samples, chance: random.Random):
        self.samples, self.chance = samples, chance

    def connection(self) -> bytes:
        chance, kind = self.chance, self.chance.random()
        if kind < 0.05:
            return chance.randbytes(chance.choice((1, 3, 20, 200, 3000, 20000)))
        data = b"".join(self.request() for _ in range(1 if kind < 0.75 else chance.randrange(2, 6)))
        if chance.random() < 0.2:
            data = self.damaged(data)
        if chance.random() < 0.08:
            data = data[: chance.randrange(len(data) + 1)]
        return data

    def damaged(self, data: bytes) -> bytes:
        """Bytes put in, taken out, exchanged; mostly in the head."""
        chance, data = self.chance, bytearray(data)
        for _ in range(chance.randrange(1, 6)):
            at = chance.randrange(min(len(data), 400) or 1)
            what = chance.choice(NASTY_BYTES) if chance.random() < 0.8 else chance.randbytes(chance.randrange(1, 5))
            data[at : at + chance.choice((0, 0, 1, 2, len(what), 40))] = what
        return bytes(data)

    def request(self) -> bytes:
        chance = self.chance
        route = chance.choice(ROUTES)
        method = (
            route.method
            if chance.random() < 0.9
            else chance.choice(("GET", "HEAD", "PUT", "OPTIONS", "TRACE", "DELETE", "POST", "X"))
        )
        path = self.samples.path(route.pattern)
        if chance.random() < 0.3:
            path += b"?" + b"&".join(chance.choice(NASTY_QUERIES) for _ in range(chance.randrange(1, 3)))
        if chance.random() < 0.1:
            path = path.replace(b"/", chance.choice((b"//", b"/../", b"/%2e/", b"/%00", b"\\")), 1)
        body = (
            self.body(route.pattern)
            if route.pattern in self.samples.bodies
            else chance.choice((b"", b"", b"", b"{}", b"x" * 70_000))
        )
        lines = [b"%b %b HTTP/1.%d" % (method.encode(), path, chance.random() < 0.95), b"Host: 127.0.0.1", *self.token(route)]
        if route.pattern == "/v1/webhooks/github":
            lines += [
                b"X-GitHub-Event: push",
                b"X-GitHub-Delivery: %d" % chance.randrange(1 << 30),
                b"X-Hub-Signature-256: " + self.signature(body),
            ]
        if route.pattern == "/v1/logs/stream" and chance.random() < 0.5:
            lines.append(f"Last-Event-ID: {self.samples.epoch}-{chance.choice((0, 1, 5, -1, 10**9, 10**18, 10**30))}".encode())
        if body or method != "GET":
            lines.append(
                b"Content-Length: %d" % (len(body) if chance.random() < 0.9 else chance.choice((0, 1, len(body) + 7, 10**6, 10**8)))
            )
        for _ in range(chance.choice((0, 0, 0, 0, 1, 2))):
            lines.insert(chance.randrange(1, len(lines) + 1), chance.choice(NASTY_HEADERS))
        return b"\r\n".join(lines) + b"\r\n\r\n" + body

    def token(self, route) -> list[bytes]:
        kind = self.chance.random()
        if kind < 0.2:
            return []
        if kind < 0.3:
            return [
                b"Authorization: Bearer "
                + self.chance.choice((READ_TOKEN.encode(), AGENT_TOKEN.encode(), self.samples.agent.get("token", "").encode()))
            ]
        if kind < 0.35:
            return [
                b"Authorization: "
                + self.chance.choice(
                    (
                        b"",
                        b"Bearer",
                        b"Bearer x",
                        b"Bearer \xff\xfe",
                        b"Bearer " + b"x" * 7000,
                        b"Basic x",
                        b"bearer\t" + TOKEN.encode(),
                    )
                )
            ]
        return [b"Authorization: Bearer " + TOKEN.encode()]

    def signature(self, body: bytes) -> bytes:
        if self.chance.random() < 0.2:
            return self.chance.choice((b"", b"sha256=", b"sha256=" + b"0" * 64, b"sha256=" + b"\xff" * 64, b"sha1=0"))
        return b"sha256=" + hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest().encode()

    def body(self, pattern: str) -> bytes:
        chance = self.chance
        value = json.loads(json.dumps(self.samples.bodies[pattern]))
        for _ in range(chance.choice((0, 1, 1, 2, 3))):
            value = self.worse(value)
        text = json.dumps(value, ensure_ascii=chance.random() < 0.7).encode("utf-8", "surrogatepass")
        kind = chance.random()
        if kind < 0.1:
            text = self.damaged(text)
        elif kind < 0.15:
            text = chance.choice(
                (
                    b"[" * 100_000,
                    b'{"":' * 50_000,
                    b'{"a":1,"a":2}',
                    text[:-1] + b',"ref":"x"}',
                    b"\xef\xbb\xbf" + text,
                    text * 2,
                    b"9" * 5000,
                    b"",
                    b" " * 1_048_570,
                )
            )
        elif kind < 0.17:
            text = b"payload=" + chance.choice((b"%7B%7D", b"%ff", b"%", b"", b"&" * 40))
        return text

    def worse(self, value):
        """One thing in it is another."""
        chance = self.chance
        if isinstance(value, dict) and value and chance.random() < 0.9:
            key = chance.choice(list(value))
            kind = chance.random()
            if kind < 0.15:
                del value[key]
            elif kind < 0.25:
                value[chance.choice(("x", "", "\0", "__class__", "\ud800", "a" * 300))] = self.nasty()
            elif kind < 0.5 and isinstance(value[key], dict | list):
                value[key] = self.worse(value[key])
            else:
                value[key] = self.nasty()
            return value
        if isinstance(value, list) and value and chance.random() < 0.7:
            return [self.worse(value[0]), *value[1:]]
        return self.nasty()

    def nasty(self):
        return copy.deepcopy(self.chance.choice(NASTY_VALUES))


class Sender:
    """Sends, reads every answer, and remembers what came."""

    def __init__(self, port: int):
        self.port = port
        self.lock = threading.Lock()
        self.statuses: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    def send(self, number: int, data: bytes, chance: random.Random) -> None:
        way = chance.choice(("half", "half", "half", "half", "half", "half", "read", "close", "reset"))
        got, ended = b"", True
        with socket.create_connection(("127.0.0.1", self.port), timeout=HANG) as wire:
            with contextlib.suppress(OSError):  # it may have refused us already
                for piece in self.pieces(data, chance):
                    wire.sendall(piece)
                if way == "half":
                    wire.shutdown(socket.SHUT_WR)
                if way in ("half", "read"):
                    got, ended = self.read(wire, b"heartbeat" in data or b"stream" in data, way == "half")
            if way == "reset":
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        wrong = [] if ended else [f"no end within {HANG} s after {got[-200:]!r}"]
        statuses = self.answers(got, wrong, b"HEAD" in data)
        with self.lock:
            self.statuses.update(statuses or ["none"])
            self.wrong += [f"request {number}: {one}; sent {data[:300]!r}" for one in wrong]

    @staticmethod
    def pieces(data: bytes, chance: random.Random):
        kind = chance.random()
        if kind < 0.8 or len(data) < 2:
            return [data]
        step = max(1, len(data) // chance.choice((2, 3, 50)))
        return [data[at : at + step] for at in range(0, len(data), step)]

    @staticmethod
    def read(wire: socket.socket, may_wait: bool, to_end: bool) -> tuple[bytes, bool]:
        """(what came, False where the end should have come and did not)."""
        got, deadline = b"", time.monotonic() + (HANG if to_end and not may_wait else 0.3)
        while True:
            ready, _, _ = select.select([wire], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return got, may_wait or not to_end
            chunk = wire.recv(1 << 16)
            if not chunk:
                return got, True
            got += chunk
            if not to_end:
                deadline = min(deadline, time.monotonic() + 0.05)

    @staticmethod
    def answers(got: bytes, wrong: list[str], may_be_of_head: bool) -> list[str]:
        """Statuses, as strictly as they can be read; stops at a stream, where the rest is not there, and where an answer may be one
        to HEAD, which says a length and has no body."""
        statuses = []
        while got:
            head, end, rest = got.partition(b"\r\n\r\n")
            match = re.match(rb"HTTP/1\.1 ([1-5][0-9]{2}) [A-Za-z -]+\r\n", got)
            if not match or re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]|(?<!\r)\n|\r(?!\n)", head):
                wrong.append(f"the answer is not HTTP: {got[:200]!r}")
                break
            status = match[1].decode()
            statuses.append(status)
            if status[0] == "5" and not (status == "503" and b"\r\nRetry-After: " in head):
                wrong.append(f"status {status}: {rest[:300]!r}")
            if not end or may_be_of_head or b"\r\nTransfer-Encoding:" in head:
                break
            length = re.search(rb"\r\nContent-Length: ([0-9]+)", head)
            if not length and b"\r\nConnection: close" in head:  # HTTP/1.0: it ends with the connection
                break
            if status not in ("100", "204") and not length:
                wrong.append(f"no length: {head!r}")
                break
            got = rest[int(length[1]) if length else 0 :]
        return statuses


def warm(controller: common.Controller, proof: Proof) -> None:
    """Fills what the controller remembers on purpose (recent events, page caches, threads' heaps), with good requests alone."""

    def some(number: int) -> None:
        with contextlib.closing(controller.client()) as client:
            for i in range(WARM // CLIENTS):
                client.ok("POST", "/v1/jobs", {"repo": "o/n", "ref": f"w{number}-{i}", "host": f"warm-{number}"})
                if not i % 50:
                    client.ok("GET", "/v1/jobs?limit=1000")
                    client.raw("POST", "/v1/jobs", b" " * 1_048_570)
                    client.raw("GET", "/openapi.json")

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(some, range(CLIENTS)))


def usage(controller: common.Controller) -> dict[str, int]:
    """Its use of the machine; `fds` without those of the database, which a reader opens when it is first needed."""
    folder, fds = pathlib.Path(f"/proc/{controller.pid}/fd"), 0
    for descriptor in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            fds += not os.readlink(descriptor).startswith(str(controller.db))
    return {**controller.usage(), "fds": fds}


def wake_streams(controller: common.Controller, number: int) -> None:
    """A stream whose reader has gone ends with the next event."""
    controller.call("POST", "/v1/jobs", {"repo": "o/n", "ref": f"wake-{number}", "host": "wake", "force": True})


def settled(controller: common.Controller, before: dict[str, int]) -> dict[str, int]:
    """Its use of the machine once every connection has ended."""
    numbers = iter(range(10_000))

    def back() -> dict[str, int] | None:
        wake_streams(controller, next(numbers))
        time.sleep(0.2)  # between two looks
        now = usage(controller)
        return now if now["threads"] <= before["threads"] and now["fds"] <= before["fds"] else None

    try:
        return wait_for(back, 60, "threads and descriptors back to where they were")
    except common.Failure as failure:
        raise common.Failure(f"{failure}: before {before}, now {usage(controller)}") from None


def prove(proof: Proof) -> None:
    os.environ["MALLOC_ARENA_MAX"] = "2"  # as the unit and the image set it: else each thread's heap keeps its pieces
    apps = {"apps": [{"name": "app", "repo": "myorg/app", "hosts": ["web-01"], "deploy_on_push": True, "branches": ["*"]}]}
    controller = proof.controller("--agent-timeout", "1h", "--lost-after", "2h", apps=apps, webhook_secret=SECRET)
    total = FULL if proof.full else SHORT
    first = usage(controller)
    samples = Samples(controller)
    warm(controller, proof)
    sender = Sender(controller.port)

    def work(number: int) -> None:
        chance = random.Random(f"{proof.seed}-{number}")  # each request by itself: what the threads do in between does not matter
        sender.send(number, Maker(samples, chance).connection(), chance)

    def many(numbers: range) -> None:
        with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(work, numbers))

    many(range(-total // 5, 0))  # so many of the same kind ahead: what grows only once is no leak
    before = settled(controller, first)
    proof.say("before", before)
    many(range(total))
    after = settled(controller, before)
    proof.say("after", after)
    proof.figure("requests", total)
    proof.figure("answers", " ".join(f"{status}:{count}" for status, count in sorted(sender.statuses.items())))
    for name, figure in (("before", before["rss"]), ("after", after["rss"]), ("at most", after["hwm"])):
        proof.figure(f"memory {name}, MB", figure / 1e6)
    proof.figure("threads before, after", f"{before['threads']}, {after['threads']}")
    proof.figure("descriptors before, after", f"{before['fds']}, {after['fds']}")
    check(not sender.wrong, f"{len(sender.wrong)} wrong:", "\n".join(sender.wrong[:5]))
    said = controller.said()
    check("Traceback" not in said and " ERROR " not in said, "the log says:", said[max(0, said.find("ERROR") - 300) :][:3000])
    check(after["rss"] - before["rss"] < GROWTH, "memory grew by", after["rss"] - before["rss"])
    for status in ("200", "201", "400", "401", "403", "404", "405", "409", "413", "417", "422", "431"):
        check(sender.statuses[status], "no request was answered with", status, "- the damage is not wide enough")
    check(controller.call("GET", "/health")[1].get("status") == "ok", "it is not healthy any more")
    check(controller.stop() == 0, "it did not stop well")
    with contextlib.closing(sqlite3.connect(controller.db)) as db:
        check(db.execute("PRAGMA integrity_check").fetchone() == ("ok",), "the database is not sound")


if __name__ == "__main__":
    sys.exit(run(prove, __doc__))
