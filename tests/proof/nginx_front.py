"""nginx in front: Debian's package with examples/nginx.conf (its TLS off, another port), and everything that goes through it.

A signed push of 25 MiB, an agent's whole deployment, a long poll of 25 s, a stream that arrives at once, connections to the
controller that are kept, each raw probe of tests/test_http.py without a request smuggled past nginx, the caller's address in the
audit (and no forged one), failed sign-ins counted by caller, and --open, which still asks for a token.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import common
from common import TOKEN, Process, Proof, check, environment, free_port, run, wait_for

sys.path.insert(0, str(common.ROOT / "tests"))
sys.path.insert(1, str(common.ROOT))

SECRET = "It's a Secret to Everybody"
EXAMPLE = common.ROOT / "examples" / "nginx.conf"
CALLER, OTHER, FORGED = "127.0.0.2", "127.0.0.3", "203.0.113.66"  # source addresses of ours; and one that nobody has
PUSH = 25 << 20  # bytes
FRAME = """
worker_processes 2;
pid {folder}/nginx.pid;
error_log stderr warn;
daemon off;
{user}
events {{ worker_connections 768; }}
http {{
    include /etc/nginx/mime.types;
    default_type application/octet-stream;
    gzip on;
    log_format proof '$status $upstream_status $request_length';
    access_log {folder}/access.log proof;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{site}
}}
"""


class Nginx(Process):
    """examples/nginx.conf as one includes it on Debian, in front of that port."""

    def __init__(self, folder: pathlib.Path, upstream: int):
        program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        check(program, "nginx is missing: apt-get install nginx")
        folder.mkdir(parents=True)
        self.folder, self.port = folder, free_port()
        site = EXAMPLE.read_text()
        for pattern, instead in (
            (r"server 127\.0\.0\.1:8080;", f"server 127.0.0.1:{upstream};"),
            (r"listen 443 ssl http2;", f"listen 127.0.0.1:{self.port};"),
            (r"listen \[::\]:443 ssl http2;", ""),
            (r"(?m)^ *ssl_.*$", ""),
            (r"(?ms)^server \{\s+listen 80;.*?^\}", ""),
        ):
            site, count = re.subn(pattern, instead, site)
            check(count, "examples/nginx.conf has no", pattern)
        user = "user root;" if os.geteuid() == 0 else ""
        config = folder / "nginx.conf"
        config.write_text(FRAME.format(folder=folder, user=user, site=site))
        super().__init__([program, "-p", folder, "-c", config], folder / "nginx.log", environment(), folder)

    def start(self) -> Nginx:
        self.launch()

        def listens() -> bool:
            check(self.poll() is None, "nginx ended:", self.said())
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5):
                return True
            return False

        wait_for(listens, 30, "nginx that listens")
        return self

    def proxied(self) -> int:
        """Requests that it passed on, with their answers logged."""
        lines = (self.folder / "access.log").read_text().splitlines()
        return sum(line.split()[1] != "-" for line in lines)


def call(port: int, method: str, path: str, body=None, token: str | None = TOKEN, source: str = CALLER, **headers: str):
    """(status, headers, JSON or bytes) of one call from that address."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60, source_address=(source, 0))
    with contextlib.closing(connection):
        sent = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {**sent, **{name.replace("_", "-"): value for name, value in headers.items()}})
        answer = connection.getresponse()
        said = answer.read()
        return answer.status, answer.headers, json.loads(said) if said[:1] == b"{" else said


def ok(*arguments, **headers):
    status, _, said = call(*arguments, **headers)
    check(status < 300, *arguments, "answered", status, said)
    return said


# ---------------------------------------------------------------------------------------------------------------------
# What goes through it


def kept_connections(proof: Proof, front: int, controller: common.Controller) -> None:
    """Requests of new clients go over the connections that nginx has; the controller has seen no other."""

    def peers() -> set[str]:
        local = f"0100007F:{controller.port:04X}"
        rows = [line.split() for line in pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return {row[2] for row in rows if row[1] == local and row[2] != "00000000:0000"}

    for _ in range(20):
        ok(front, "GET", "/v1/jobs")
    before = peers()
    for _ in range(100):
        ok(front, "GET", "/v1/jobs")
    new = peers() - before
    check(len(new) <= 4, "nginx made", len(new), "new connections for 100 requests")
    proof.figure("new connections to the controller in 100 requests", len(new))


def push(proof: Proof, front: int) -> None:
    def deliver(size: int, ref: str):
        event = {
            "ref": "refs/heads/main", "before": "0" * 40, "after": hashlib.sha1(ref.encode()).hexdigest(), "deleted": False,
            "repository": {"full_name": "myorg/big", "default_branch": "main"}, "pusher": {"name": "octocat"}, "padding": "",
        }  # fmt: skip
        event["padding"] = "x" * (size - len(json.dumps(event))) if size else ""
        body = json.dumps(event).encode()
        signature = "sha256=" + hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
        begun = time.monotonic()
        status, _, said = call(
            front,
            "POST",
            "/v1/webhooks/github",
            body,
            None,
            X_Hub_Signature_256=signature,
            X_GitHub_Event="push",
            X_GitHub_Delivery=ref,
        )
        return status, said, time.monotonic() - begun, len(body)

    status, said, _, _ = deliver(0, "small")
    check(status == 200 and len(said["jobs_created"]) == 1, "a push:", status, said)
    status, said, took, size = deliver(PUSH, "large")
    check(size == PUSH and status == 200 and len(said["jobs_created"]) == 1, "a push of 25 MiB:", status, said)
    proof.figure("a signed push of 25 MiB, s", took)
    try:
        status = deliver(PUSH + 1, "too large")[0]
    except (ConnectionError, BrokenPipeError):  # nginx answers and goes away while the body is still sent
        status = 413
    check(status == 413, "a push of 25 MiB and a byte:", status)


def long_poll(front: int) -> float:
    """Seconds that a heartbeat of 25 s waited through nginx."""
    agent = ok(front, "POST", "/v1/agents/register", {"hostname": "waits"})
    begun = time.monotonic()
    said = ok(front, "POST", f"/v1/agents/{agent['id']}/heartbeat", {"status": "online", "wait": 25})
    check(said["job"] is None, said)
    return time.monotonic() - begun


def stream(proof: Proof, front: int) -> None:
    """Each event arrives when it happens, not when a buffer is full."""
    with socket.create_connection(("127.0.0.1", front), 30) as wire:
        wire.sendall(b"GET /v1/logs/stream?tail=0 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\r\n\r\n" % TOKEN.encode())
        said = b""
        while b"retry: " not in said:
            said += wire.recv(65536)
        check(b"text/event-stream" in said and b"gzip" not in said, said)
        slowest = 0.0
        for i in range(20):
            begun = time.monotonic()
            ok(front, "POST", "/v1/jobs", {"repo": "o/n", "ref": f"stream-{i}", "host": "streamed"})
            while b'"stream-%d"' % i not in said:
                said += wire.recv(65536)
            slowest = max(slowest, time.monotonic() - begun)
    check(slowest < 2, "an event came after", slowest, "s")
    proof.figure("20 events: asked for, streamed, slowest ms", 1000 * slowest)


def quiet_stream(front: int) -> None:
    """A stream on which nothing happens for longer than nginx waits for an answer: its comments keep it."""
    with socket.create_connection(("127.0.0.1", front), 80) as wire:
        wire.sendall(b"GET /v1/logs/stream?host=nobody HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n\r\n" % TOKEN.encode())
        until, said = time.monotonic() + 70, b""
        while time.monotonic() < until:
            chunk = wire.recv(65536)
            check(chunk, "nginx ended a stream on which nothing happened")
            said += chunk
        check(said.count(b"\n: ") >= 3, "no comments:", said)


def agent_cycle(proof: Proof, front: int, folder: pathlib.Path) -> None:
    """agent.py itself, which knows nginx's address alone, deploys a push."""
    plain = {name: value for name, value in environment(agent_token=common.AGENT_TOKEN).items() if not name.startswith("GIT_")}
    agent = Process(
        [sys.executable, common.AGENT, "--url", f"http://127.0.0.1:{front}", "--hostname", "web-01", "--workdir", folder / "work", "--git-protocols", "file"],
        folder / "agent.log", plain, folder,
    )  # fmt: skip
    agent.launch()
    job = ok(front, "POST", "/v1/jobs", {"repo": "myorg/web", "ref": "main", "host": "web-01"})["job"]["id"]
    begun = time.monotonic()

    def ended() -> dict | None:
        found = ok(front, "GET", f"/v1/jobs/{job}")["job"]
        return found if found["status"] in ("success", "failed") else None

    found = wait_for(ended, 60, "the end of a job")
    check(found["status"] == "success", "the deployment failed:", found, agent.said())
    text = call(front, "GET", f"/v1/jobs/{job}/logs", Accept="text/plain")[2].decode()
    check("built through nginx" in text, "the log:", text)
    agent.stop()
    proof.figure("a deployment by agent.py, s", time.monotonic() - begun)


def repository(folder: pathlib.Path) -> pathlib.Path:
    source = folder / "source"
    (source / ".deploybot").mkdir(parents=True)
    script = source / ".deploybot" / "deploy"
    script.write_text("#!/bin/sh\necho built through nginx\n")
    script.chmod(0o755)
    env = {**os.environ, "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1"}
    for command in (
        ["init", "-q", "-b", "main"],
        ["add", "."],
        ["-c", "user.name=Ada", "-c", "user.email=a@example.com", "commit", "-q", "-m", "one"],
    ):
        subprocess.run(["git", *command], cwd=source, env=env, check=True, capture_output=True)
    return source


# ---------------------------------------------------------------------------------------------------------------------
# What does not


# nginx reads a chunked body and what comes behind it; it takes an Expect away. What it then passes on is one good request each.
GOOD_FOR_NGINX = ("chunked with an extension", "expect ", "two expectations")


def smuggling(proof: Proof, front: int, nginx: Nginx, controller: common.Controller) -> None:
    """Every probe, with a request behind it that makes a job: the controller answers no request that nginx does not know of."""
    from test_http import ADMIN, PROBES, post

    admin = ADMIN.replace(b"dbt_admin", TOKEN.encode())
    probes = {name: probe.sent.replace(ADMIN, admin) for name, probe in PROBES.items()}

    def handled() -> int:
        """Requests that the controller knows of; the look itself goes past nginx and is the one that is taken away."""
        text = call(controller.port, "GET", "/metrics", source="127.0.0.1")[2].decode()
        return sum(float(count) for count in re.findall(r"(?m)^deploybot_http_requests_total\{.*\} ([0-9.e+]+)$", text))

    before, passed, answers = handled(), nginx.proxied(), 0
    for number, (name, sent) in enumerate(probes.items()):
        body = json.dumps({"repo": "o/n", "ref": "main", "host": f"behind-{number}"}).encode()
        with socket.create_connection(("127.0.0.1", front), 20) as wire:
            wire.settimeout(0.5)  # what is unfinished for nginx too gets no answer
            got = b""
            with contextlib.suppress(OSError):
                wire.sendall(sent + post(body, admin + b"Connection: close\r\n"))
                while chunk := wire.recv(65536):
                    got += chunk
        statuses = re.findall(rb"(?m)^HTTP/1\.1 ([0-9]{3}) ", got)
        answers += len(statuses)
        check(not {b"500", b"502", b"503", b"504"} & set(statuses), f"{name}: nginx answers {statuses}")
        status, _, said = call(front, "GET", f"/v1/jobs?host=behind-{number}")
        check(status == 200 and len(said["jobs"]) <= 1, f"{name}: another answer than the one to our question: {status} {said}")
        for job in ok(front, "GET", "/v1/jobs?host=refused-01&status=pending")["jobs"]:
            check(name.startswith(GOOD_FOR_NGINX), f"{name}: was executed")
            ok(front, "POST", f"/v1/jobs/{job['id']}/cancel")
    known = nginx.proxied() - passed
    done = handled() - before - 1  # the look itself, which goes past nginx
    check(done <= known, "the controller executed", done, "requests, and nginx passed on", known)
    proof.figure("smuggling probes, their answers", f"{len(probes):,}, {answers:,}")
    proof.figure("requests that nginx passed on, that the controller executed", f"{known:,}, {done:,.0f}")


def addresses(proof: Proof, front: int, controller: common.Controller) -> None:
    """The audit has the caller's address; who says another one is not believed, in front of nginx or past it."""

    def audited(ref: str, port: int, source: str, **headers: str) -> str:
        job = ok(port, "POST", "/v1/jobs", {"repo": "o/n", "ref": ref, "host": "audited"}, TOKEN, source, **headers)["job"]["id"]
        rows = ok(controller.port, "GET", "/v1/audit?action=job.create")["audit"]
        return next(row["address"] for row in rows if row["target"] == job)

    forged = {"X_Forwarded_For": FORGED}
    for ref, port, source, headers, expected in (
        ("through nginx", front, CALLER, {}, CALLER),
        ("through nginx, another", front, OTHER, {}, OTHER),
        ("through nginx, forged", front, CALLER, forged, CALLER),
        ("through nginx, forged twice", front, CALLER, {"X_Forwarded_For": f"{FORGED}, 127.0.0.1, {FORGED}"}, CALLER),
        ("through nginx, forged with junk", front, CALLER, {"X_Forwarded_For": "', x, ::::"}, CALLER),
        ("past nginx, forged", controller.port, OTHER, forged, OTHER),
    ):
        found = audited(ref.replace(" ", "-").replace(",", ""), port, source, **headers)
        check(found == expected, f"{ref}: the audit has {found}, not {expected}")
    for _ in range(11):
        status = call(front, "GET", "/v1/jobs", None, "dbt_wrong", OTHER, **forged)[0]
    check(status == 429, "the eleventh failed sign-in of one caller:", status)
    check(call(front, "GET", "/v1/jobs", None, "dbt_wrong", CALLER)[0] == 401, "another caller pays for it")
    check(call(front, "GET", "/v1/jobs", None, TOKEN, OTHER)[0] == 200, "a valid token is locked out")
    status, headers, _ = call(front, "POST", "/v1/session", {"token": TOKEN}, None, X_Forwarded_Proto="https")
    check(status == 200 and "Secure" not in headers["Set-Cookie"], "nginx says http, the caller says https:", headers["Set-Cookie"])


def origins(front: int) -> None:
    """Host comes through with its port, so that a page of ours may write and another's may not."""
    host = f"deploy.example.com:{front}"
    for origin, expected in ((f"http://{host}", 201), ("http://deploy.example.com", 403), ("https://evil.example", 403)):
        status = call(front, "POST", "/v1/jobs", {"repo": "o/n", "ref": "page", "host": "pages"}, Host=host, Origin=origin)[0]
        check(status == expected, "a write of", origin, "is answered with", status)


def open_mode(proof: Proof) -> None:
    """What makes a caller local in open mode never comes through nginx, trusted or not."""
    for name, flags in (("open", ("--open",)), ("open-trusted", ("--open", "--trusted-proxy", "127.0.0.1"))):
        controller = proof.controller(*flags, name=name)
        nginx = Nginx(proof.folder / f"nginx-{name}", controller.port).start()
        check(call(controller.port, "GET", "/v1/jobs", None, None, "127.0.0.1")[0] == 200, "open mode asks for a token here")
        for headers in ({}, {"Host": "localhost"}, {"Host": "127.0.0.1"}, {"Host": "localhost", "X_Forwarded_For": "127.0.0.1"}):
            for method, path in (("GET", "/v1/jobs"), ("POST", "/v1/reload"), ("GET", "/v1/logs/stream")):
                status = call(nginx.port, method, path, None, None, "127.0.0.1", **headers)[0]
                check(status == 401, f"--open behind nginx: {method} {path} {headers} is answered with {status}")
        check(call(nginx.port, "GET", "/v1/jobs", None, TOKEN)[0] == 200, "a token does not count")
        nginx.stop()
        controller.stop()


def prove(proof: Proof) -> None:
    source = repository(proof.folder)
    apps = {
        "apps": [
            {"name": "web", "repo": "myorg/web", "clone_url": f"file://{source}", "hosts": ["web-01"]},
            {"name": "big", "repo": "myorg/big", "hosts": ["web-09"], "deploy_on_push": True},
        ]
    }
    controller = proof.controller("--trusted-proxy", "127.0.0.1", apps=apps, webhook_secret=SECRET)
    nginx = Nginx(proof.folder / "nginx", controller.port).start()
    front = nginx.port
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waited = pool.submit(long_poll, front)
        quiet = pool.submit(quiet_stream, front) if proof.full else None
        agent_cycle(proof, front, proof.folder)
        push(proof, front)
        stream(proof, front)
        addresses(proof, front, controller)
        origins(front)
        kept_connections(proof, front, controller)
        smuggling(proof, front, nginx, controller)
        check(24 < waited.result(60) < 28, "a heartbeat of 25 s waited for", waited.result(), "s")
        proof.figure("a long poll of 25 s, s", waited.result())
        if quiet:
            quiet.result(90)
    check(not re.search(r"upstream (prematurely|sent)", nginx.said()), nginx.said()[-2000:])
    said = controller.said()
    check("Traceback" not in said and " ERROR " not in said, "the log says:", said[-3000:])
    nginx.stop()
    controller.stop()
    open_mode(proof)


if __name__ == "__main__":
    sys.exit(run(prove, __doc__))
