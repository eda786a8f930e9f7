r"""200 hostile strings through everything that takes a text, down to real deployments of a real repository: none is ever code.

Each string would, where it is taken for a command, an option, a path, a template, a statement or a header, touch a file of its
own in the canary's folder; that file must never appear. Where it is only shown it must stay on its line: nothing raw in the log
of the controller or the agent, every SSE event framed, no control character in what ctl.py prints without --raw. And what was
taken comes back as it was.

    .venv-check/bin/python tests/proof/hostile.py [--seed N] [--full]

Short: every string through the API, the log, the stream and ctl.py; every one as a ref, straight into the agent's git; a sample
deployed by agent.py. Full: all deployed, as branch, as full ref, as tag and by a signed push. tests/check/test_hostile.py is the part for
`make test`.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import itertools
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import common
from common import AGENT, Proof, check, run, wait_for

sys.path.insert(0, str(common.ROOT))

import agent
import ctl
import deploybot

SECRET = "It's a Secret to Everybody"
HOST = "web-01"
APP = "a"  # the one of the part through the API
SAMPLE = 36  # deployments of the short form
APPS = [f"app{number}" for number in range(8)]  # one repository, several apps: so many deployments at once
REPO = "myorg/hostile"
DEPLOYED = 120  # seconds for one deployment on a busy machine


# ---------------------------------------------------------------------------------------------------------------------
# The corpus
# Owns: the strings. Ignores: where they go. ¦ stands between them, C for the file that one would touch, _ for ${IFS}.

SHELL = r"""
$(touch C)¦`touch C`¦;touch C;¦;touch_C¦$(touch_C)¦`touch_C`¦a;touch_C¦a|touch_C¦a&&touch_C¦a||touch_C¦|touch_C¦a&touch_C&¦main$(touch_C)
main;$(touch_C)¦"$(touch C)"¦"$(touch_C)"¦'$(touch C)'¦";touch C;"¦';touch C;'¦";touch_C;"¦';touch_C;'¦"`touch_C`"¦x'$(touch_C)'y
${x:-$(touch C)}¦${x:=$(touch_C)}¦$((a[$(touch C)]))¦x[$(touch_C)]¦<(touch C)¦<(touch_C)¦>C¦>>C¦2>C¦<C>C¦{touch,C}¦main;{touch,C}¦$'\x74ouch'_C
$(touch$IFS'C')¦$(touch${IFS%??}C)¦`touch$IFS"C"`¦() { :;}; touch C¦(){ :;};touch_C¦!!;touch C¦%0atouch_C¦$@;touch_C¦#;touch_C
$(</dev/null;touch_C)¦eval_touch_C¦;eval_"touch_C"¦feature/$(touch_C)¦feature/;touch_C;/x¦$0;touch_C¦`:;touch_C`¦&&{_touch_C;}
"""
OPTIONS = r"""
--upload-pack=touch C¦--upload-pack=touch_C¦--upload-pack=touch C;¦-u touch C¦-utouch_C¦--receive-pack=touch_C¦--exec=touch_C¦-c core.sshCommand=touch_C
-ccore.sshCommand=touch_C¦-c=core.fsmonitor=touch_C¦--config=core.pager=touch_C¦--config-env=core.editor=C¦--output=C¦-oC¦--output-directory=C
-oProxyCommand=touch_C¦--exec-path=C¦--git-dir=C¦--help¦--version¦--open-files-in-pager=touch_C¦--template=C¦--filter=sparse:oid=C¦-¦--¦--end-of-options
ext::sh -c touch% C¦ext::sh_-c_touch_C¦file:///dev/null;touch_C¦ssh://-oProxyCommand=touch_C/x¦-x:y@z/C
"""
PATHS = r"""
../C¦../../../../../../C¦..¦.¦...¦./C¦C¦/C¦//C¦~/C¦~root/C¦../../repo.git/hooks/post-update¦.git/hooks/post-checkout¦refs/heads/../../C¦refs/../C¦a/../../C
..\..\C¦\\server\share\C¦file:C¦C%00¦%2e%2e/%2e%2e/C¦..%2f..%2fC¦..%252f..%252fC¦....//....//C¦releases/../../C¦current/../C¦.agent/secret
HEAD¦FETCH_HEAD¦@¦@{-1}¦main@{1}¦main^{/C}¦main~1¦:/C¦:(exclude)C¦stash@{0}¦refs/heads/main¦refs/remotes/origin/main¦a.lock¦a/.lock/b¦.a¦a.
con¦nul¦aux.txt¦a:b
"""
MARKUP = r"""
<script>alert(1)</script>¦<img src=x onerror=alert(1)>¦"><svg/onload=alert(1)>¦</script><script>1</script>¦javascript:alert(1)¦<!--¦]]>¦&lt;b&gt;
{{7*7}}¦${7*7}¦<%= 7*7 %>¦#{7*7}¦{{constructor.constructor('alert(1)')()}}¦' onmouseover='alert(1)¦<iframe src=//x>¦</textarea><b>
"""
DATA = r"""
'; DROP TABLE jobs; --¦' OR '1'='1¦1; DELETE FROM jobs¦" UNION SELECT secret FROM tokens --¦%' ESCAPE '¦x' AND randomblob(1e9)¦); ATTACH 'C' AS x; --
!!python/object/apply:os.system ["touch C"]¦!!python/object/new:os.system [touch C]¦&a [*a,*a]¦{a: b}¦- a¦key: value¦? x¦--- ¦... ¦yes¦null¦~¦0x10¦1e999
{"a": 1}¦"}],"status":"success","x":[{"¦\u0000¦\ud800¦%s%s%s%n¦%(message)s¦{0}¦{0.__class__}¦{0.__globals__[os].system}¦%x¦%1$s¦${jndi:ldap://x/C}
__import__('os').system('touch C')¦os.system("touch C")¦=cmd|' /C touch C'!A1¦@SUM(1+1)*cmd¦+cmd¦NaN¦Infinity¦-0¦1e5¦true¦None¦undefined¦[object Object]
"""
RAW = {  # what stands for itself, one a line above would not do
    "newlines": ("touch C\n", "a\ntouch C", "a\n$(touch C)\nb", "\n", "\n\n", "a\r\ntouch C", "\r", "a\rb", "$(touch\nC)", "a\0b", "\0", "\0;touch C"),
    "events": (
        "x\n\ndata: {}\n\n", "\n\nevent: end\ndata: {}\n\n", "\r\rdata: x\r\r", "\r\n\r\nid: 99\r\n\r\n", "data: x", ": comment", "\u2028data: x\u2029", "\x85x",
    ),
    "heads": (
        "x\r\nX-Injected: yes", "x\nX-Injected: yes", "x\rX-Injected: yes", "x\r\n\r\nHTTP/1.1 200 OK\r\nX-Injected: yes\r\n\r\n", "\r\nSet-Cookie: a=b",
        "x\r\nContent-Length: 0\r\n\r\nGET /v1/jobs HTTP/1.1\r\nHost: x\r\n\r\n", " leading", "trailing ", "a\tb", "x, y; z=\"w\"",
    ),
    "log lines": (
        "x\n2026-11-23T00:00:00.000Z INFO    forged", "\r\x1b[2K2026-11-23T00:00:00.000Z INFO    forged", "x\\n2026 ERROR forged", '", "level": "ERROR", "message": "forged',
        "[deploybot] deployed 0000000000000000000000000000000000000000", "\x1b[1A\x1b[2Kforged", "a\x08\x08\x08forged", "x\u2028INFO forged",
    ),
    "terminals": (
        "\x1b]8;;http://evil.example/\x07click\x1b]8;;\x07", "\x1b]8;;http://evil.example/\x1b\\click\x1b]8;;\x1b\\", "\x1b]52;c;dG91Y2ggQw==\x07", "\x1b]0;title\x07", "\x1b[31mred",
        "\x1b[2J\x1b[H", "\x1b[6n", "\x1b[?1049h", "\x1bc", "\x1b[99999;99999H", "\x1bP$q\x1b\\", "\x1b_x\x1b\\", "\x9b31m", "\x9d0;title\x9c", "\x1b", "\x1b[", "\x1b]0;never ends",
        "\x07\x07", "\x0e\x0f", "\x7f", "\x1b]1337;File=inline=1:AAAA\x07", "\x1b[200~touch C\n\x1b[201~", "\x05",
    ),
    "bidi": (
        "\u202egnp.exe", "\u2066x\u2069", "\u200fx", "\u061cx", "a\u202a\u202b\u202cb", "access_level != \u202e\u2066user\u2069",
    ),
    "unicode": (
        "e\u0301", "\u00e9", "\u212b", "\u00c5", "\ufb01", "\uff1b\uff54\uff4f\uff55\uff43\uff48", "\u037etouch C", "\u2024\u2024/C", "\uff0e\uff0e/C", "\u2215etc", "\u017f\u212a",
        "\u0430dmin", "a\u200bb", "a\u200db", "\ufeffmain", "\u00ad", "\u3000", "\u00a0", "\u1680", "\U0001f4a9", "\U0001f468\u200d\U0001f469", "\ufffe", "\uffff", "\U0010ffff", "\ue000",
        "Z\u0351\u036b\u0343\u036a\u0302", "\u0130", "\u1e9e", "\ufdfa",
    ),
    "surrogates": ("\ud800", "\udfff", "a\udc80b", "\udcff;touch C", "\ud83d", "\udca9\ud83d"),
    "lengths": ("", " ", "a" * 255, "a" * 256, "\u00e9" * 255, "a/" * 120 + "a", "(" * 200, "a" * 9000, "\U0001f4a9" * 17000, "x" * 70000, "$(touch C)" * 500, "\x1b[31m" * 2000),
}  # fmt: skip


class Hostile(NamedTuple):
    number: int
    kind: str
    text: str
    canary: pathlib.Path


def corpus(folder: pathlib.Path) -> list[Hostile]:
    """Each with its own file in that folder, which is made. Half are spelt with ${IFS}, as a ref takes no blank."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"shell": SHELL, "options": OPTIONS, "paths": PATHS, "markup": MARKUP, "data": DATA}
    lines = {kind: [word for line in table.strip().split("\n") for word in line.split("¦")] for kind, table in tables.items()}
    found = []
    for number, (kind, text) in enumerate((kind, text) for kind, texts in (lines | RAW).items() for text in texts):
        canary = folder / str(number)
        made = text.replace("_", "${IFS}") if re.search(r"touch_|_C|eval_", text) else text
        found.append(Hostile(number, kind, re.sub(r"(?<![A-Z])C(?![A-Za-z_-])", str(canary), made), canary))
    return found


def no_canary(folder: pathlib.Path, strings: Iterable[Hostile], where: str) -> None:
    sung = [string for string in strings if string.canary.exists()]
    check(not sung, where, "ran as code:", [(string.kind, string.text) for string in sung])
    others = [path for path in folder.iterdir() if not path.name.isdigit()]
    check(not others, where, "left in the folder of the canary:", others)


# ---------------------------------------------------------------------------------------------------------------------
# Through the API
# Owns: the calls that take a text, and what must be true of each answer. Ignores: what kind of process answers.

UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR) +\S.*")
REFUSED = (400, 401, 403, 404, 405, 409, 413, 414, 422, 429, 431)
Call = Callable[
    [str, str, Any, dict[str, str]], tuple[int, Any, bytes]
]  # (method, path, body, headers) to (status, headers, bytes)


def quoted(text: str) -> str:
    return urllib.parse.quote(text, safe="", errors="surrogatepass")


def is_unicode(text: str) -> bool:
    return not re.search("[\ud800-\udfff]", text)


class Api:
    """A controller that is called, as an admin and as the agent of HOST."""

    def __init__(self, call: Call, port: int, token: str):
        self._call, self.port, self.token = call, port, token
        self.sent: list[str] = []  # the log lines that were stored, in order
        self.commits = itertools.count(1 << 64)
        self.agent = self.ok("POST", "/v1/agents/register", {"hostname": HOST, "slots": 1})["id"]

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """(status, JSON). Never a fault, and never a header that somebody sent."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        status, answered, data = self._call(method, path, body, sent)
        check(status < 500, method, path[:200], "is a fault:", status, data[:500])
        check("X-Injected" not in answered and answered.get_all("Set-Cookie", []) == [], method, path[:200], answered)
        return status, json.loads(data) if data[:1] == b"{" else data

    def ok(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        status, answer = self.call(method, path, body, **headers)
        check(status in (200, 201), method, path, status, answer)
        return answer

    def may(self, *taken: int) -> Callable[..., int]:
        """A call that is taken with one of these statuses, or refused."""

        def ask(method: str, path: str, body: Any = None, **headers: str) -> int:
            status, answer = self.call(method, path, body, **headers)
            check(status in (*taken, *REFUSED), method, path[:200], status, answer)
            return status

        return ask

    # What takes a text. Each is given every string.

    def as_fields(self, text: str) -> None:
        """Every field of a request for a job; what is taken is what was asked for, not a cleaned form of it."""
        base = {"repo": REPO, "ref": "main", "host": "elsewhere", "force": True}
        for name in ("repo", "ref", "host", "app"):
            status, answer = self.call("POST", "/v1/jobs", {**base, name: text})
            check(status in (201, 400, 422), name, repr(text[:200]), status, answer)
            same = text.lower() if name == "host" else text
            check(status != 201 or answer["job"][name] == same, name, repr(text[:200]), "became", answer)
            check(status != 201 or (text.isprintable() and text[0] not in "-/."), name, repr(text[:200]), "was taken")

    def as_deployment(self, text: str) -> None:
        """Every field of a deployment, a hook and a lock; what is taken comes back as it was, there and in the jobs."""
        deploy = {"app": APP, "ref": "main", "hosts": ["elsewhere"], "force": True}
        for name, value in (("ref", text), ("app", text), ("hosts", [text]), ("to", text), ("metadata", {"a": text[:2000]})):
            status, answer = self.call("POST", "/v1/deployments", {**deploy, name: value})
            check(status in (201, 400, 404, 422), name, repr(text[:200]), status, answer)
            check(status != 201 or name in ("ref", "metadata"), name, repr(text[:200]), "was taken", answer)
            if status == 201:
                ref, job = (text if name == "ref" else "main"), answer["jobs"][0]
                check(answer["deployment"]["ref"] == job["ref"] == ref, repr(text[:200]), "became", answer)
                check(ref.isprintable() and ref[0] not in "-/.", repr(text[:200]), "was taken")
                check(name == "ref" or job["metadata"]["a"] == text[:2000], repr(text[:200]), "became", answer)
                self.ok("POST", f"/v1/deployments/{answer['deployment']['id']}/cancel")
        for name, value in (("ref", text), ("commit", text), ("message", text[:1000]), ("pusher", text[:100]), ("hosts", [text])):
            asked = {"ref": "main", "commit": f"{next(self.commits):040x}", "hosts": ["elsewhere"]}  # else it is the one before
            status, answer = self.call("POST", f"/v1/hooks/{APP}", {**asked, name: value})
            check(status in (201, 400, 422), name, repr(text[:200]), status, answer)
            told = {"ref": "branch", "message": "commit_message", "pusher": "pusher"}.get(name)
            job = answer["jobs"][0] if status == 201 else None
            check(job is None or (told and job["metadata"][told] == value), name, repr(text[:200]), "became", answer)
        self.may(404)("POST", f"/v1/hooks/{quoted(text)[:4000]}", asked)
        self.as_lock(text)

    def as_lock(self, text: str) -> None:
        """The reason is told to whoever is refused, in the list of apps and in the audit: it is one line, or refused."""
        status, answer = self.call("PUT", f"/v1/apps/{APP}/lock", {"reason": text})
        check(status in (200, 400, 422), repr(text[:200]), status, answer)
        if status == 200:
            check(answer["lock"]["reason"] == text and text.isprintable() and text.strip(), repr(text), "became", answer)
            status, refused = self.call("POST", "/v1/deployments", {"app": APP, "ref": "main"})
            check(status == 409 and f": {text}: unlock it" in refused["detail"], repr(text), status, refused)
            self.ctl("deploy", "--repo", REPO, "--host", "elsewhere", "--ref", "main", "--app", APP, fails=True)
            for words in (("apps",), ("audit", "--limit", "3")):
                self.ctl(*words)
            self.ok("DELETE", f"/v1/apps/{APP}/lock")
        self.may()("PUT", f"/v1/apps/{quoted(text)[:4000]}/lock", {"reason": "x"})
        self.may()("DELETE", f"/v1/apps/{quoted(text)[:4000]}/lock")

    def as_names(self, text: str) -> None:
        ask = self.may(200, 201)
        ask("POST", "/v1/agents/register", {"hostname": text})
        ask("POST", "/v1/tokens", {"role": "viewer", "name": text, "expires_in": 60})
        ask("POST", f"/v1/agents/{self.agent}/heartbeat", {"status": "offline", "session": text})
        ask("POST", "/v1/agents/register", {"hostname": HOST, "capabilities": {text: text, "labels": {text: text, "role": text}}})
        ask("POST", f"/v1/agents/{self.agent}/heartbeat", {"status": "offline", "current": {text: text, APP: text}})
        hosts = self.ok("GET", "/v1/apps")["apps"][0]["hosts"]
        check([host["hostname"] for host in hosts] == ["elsewhere"], repr(text[:200]), "is the label of", hosts)

    def as_addresses(self, text: str) -> None:
        ask = self.may(200)
        some = quoted(text)[:4000]
        ask("GET", f"/v1/jobs?app={some}&host={some}")
        ask("GET", f"/v1/jobs?repo={some}&id={some}&{some}={some}")
        ask("GET", f"/v1/jobs?deployment_id={some}")
        ask("GET", f"/v1/deployments?app={some}&status={some}&id={some}&before={some}")
        ask("GET", f"/v1/deliveries?repo={some}&before={some}")
        for path in (f"/v1/deployments/{some}", f"/v1/deliveries/{some}"):
            ask("GET", path)
        for action in ("cancel", "retry"):
            ask("POST", f"/v1/deployments/{some}/{action}")
        ask("GET", f"/v1/audit?who={some}")
        ask("HEAD", f"/v1/logs/stream?host={some}&app={some}&job_id={some}&tail={some}")
        ask("POST", f"/v1/hosts/{some}/drain")
        ask("DELETE", f"/v1/tokens/{some}")
        ask("GET", f"/{some}")

    def as_push(self, number: int, text: str) -> None:
        """A signed push of such a branch, with such texts: GitHub signs whatever people push."""
        event = {
            "ref": f"refs/heads/{text}", "before": text, "after": f"{number:040x}", "pusher": {"name": text},
            "repository": {"full_name": REPO, "default_branch": text}, "head_commit": {"message": text, "id": text},
        }  # fmt: skip
        for repo in (REPO, text):
            event["repository"] = {"full_name": repo, "default_branch": text}
            body = json.dumps(event).encode()
            signed = deploybot.signature_of(SECRET, body)
            sent = {"X_GitHub_Event": "push", "X_Hub_Signature_256": signed}
            if self.may(200)("POST", "/v1/webhooks/github", body, **sent) == 200:
                self.check_delivery(signed[7:47], event)

    def check_delivery(self, guid: str, event: dict[str, Any]) -> None:
        """It is kept as it was sent."""
        delivery = self.ok("GET", f"/v1/deliveries/{guid}")["delivery"]
        told = {"ref": event["ref"][:255], "pusher": event["pusher"]["name"][:100], "repo": event["repository"]["full_name"]}
        check(told.items() <= {name: str(value) for name, value in delivery.items()}.items(), event, "became", delivery)

    def as_output(self, text: str) -> str | None:
        """A job whose metadata, output and error it is; its id. All three come back as they were."""
        status, answer = self.call(
            "POST", "/v1/jobs", {"repo": REPO, "ref": "main", "host": HOST, "force": True, "metadata": {"commit_message": text[:1000], "pusher": text[:100]}}
        )  # fmt: skip
        if not is_unicode(text):
            check(status == 400, "half of a surrogate pair was taken:", repr(text), answer)
            return None
        check(status == 201, repr(text[:200]), status, answer)
        job = self.ok("POST", f"/v1/agents/{self.agent}/heartbeat", {"status": "online"})["job"]
        check(job["id"] == answer["job"]["id"], "another job was delivered", job)
        self.may(200)(
            "POST",
            f"/v1/jobs/{job['id']}/logs",
            {"attempt": 1, "offset": 0, "lines": [{"message": "x", "level": text, "timestamp": text}]},
        )
        lines = [{"message": text}, {"message": f"behind {job['id']}"}]
        self.ok("POST", f"/v1/jobs/{job['id']}/logs", {"attempt": 1, "offset": 0, "lines": lines})
        self.may(200)("POST", f"/v1/jobs/{job['id']}/result", {"attempt": 1, "status": text, "reason": text, "commit": text})
        self.ok("POST", f"/v1/jobs/{job['id']}/result", {"attempt": 1, "status": "failed", "error": text})
        self.check_stored(job["id"], text)
        return job["id"]

    def check_stored(self, job_id: str, text: str) -> None:
        job = self.ok("GET", f"/v1/jobs/{job_id}")["job"]
        check(job["metadata"] == {"commit_message": text[:1000], "pusher": text[:100]}, "metadata became", job["metadata"])
        check((job["error"] or "") == text[:4096], "the error", repr(text[:100]), "became", job["error"])
        lines = [line["message"] for line in self.ok("GET", f"/v1/jobs/{job_id}/logs")["lines"]]
        whole = len(text.encode()) <= deploybot.MAX_MESSAGE
        check(len(lines) == 2 and (not whole or lines[0] == text), "the line", repr(text[:100]), "became", lines)
        self.sent += lines

    def as_head(self, text: str) -> None:
        """Raw, in the values of headers and in the target: one answer, then the end of the connection."""
        value = text.encode("utf-8", "surrogatepass")[:6000]
        names = (b"User-Agent", b"X-GitHub-Delivery", b"X-Forwarded-For", b"Last-Event-ID", b"Cookie", b"Origin", b"Accept")
        head = b"".join(b"%b: %b\r\n" % (name, value) for name in names[len(text) % 7 :])
        token = f"Authorization: Bearer {self.token}\r\n".encode()
        for target, headers in (
            (b"/v1/jobs?limit=1", head + token),
            (b"/v1/jobs/" + value, token),
            (b"/health", b"Authorization: " + value + b"\r\n"),
        ):
            data = self.exchange(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + headers + b"\r\n")
            status = re.match(rb"HTTP/1\.1 (\d{3}) [A-Za-z ]+\r\n", data)
            check(status and int(status[1]) < 500, repr(text[:100]), "in a head was answered", data[:300])
            answered = data.partition(b"\r\n\r\n")[0]
            check(b"X-Injected" not in answered and b"Set-Cookie" not in answered, "the answer has a header of ours:", answered)

    def exchange(self, data: bytes) -> bytes:
        with contextlib.closing(socket.create_connection(("127.0.0.1", self.port), timeout=20)) as connection:
            received = b""
            with contextlib.suppress(ConnectionError):  # it may refuse before it has read all
                connection.sendall(data)
            with contextlib.suppress(ConnectionError):
                while chunk := connection.recv(65536):
                    received += chunk
            return received

    def attack(self, strings: Iterable[Hostile], every: int = 1) -> dict[str, str]:
        """All of it with each of them, or, but for the output, each with a part; the ids of the jobs that have it as output, to the text."""
        ways = (
            lambda string: (self.as_fields(string.text), self.as_deployment(string.text)),
            lambda string: (self.as_push(string.number, string.text), self.as_names(string.text)),
            lambda string: (self.as_addresses(string.text), self.as_head(string.text)),
        )
        jobs = {}
        for string in strings:
            for way in ways[string.number % every :: every]:
                way(string)
            if job_id := self.as_output(string.text):
                jobs[job_id] = string.text
        return jobs

    # What is shown.

    def stream_position(self) -> str:
        """The id of the newest event."""
        with contextlib.closing(self._stream("/v1/logs/stream?tail=0", None)) as connection:
            answer = connection.getresponse()
            return re.search(rb"id: (\S+)\n", answer.read1(65536))[1].decode()

    def _stream(self, path: str, last_id: str | None) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"Authorization": f"Bearer {self.token}", **({"Last-Event-ID": last_id} if last_id else {})}
        connection.request("GET", path, headers=headers)
        return connection

    def check_stream(self, since: str) -> int:
        """Every event since then is framed, and brings the lines as they were sent; the number of events."""
        wanted = self.sent[-1].encode()  # names a job of its own: it comes once
        with contextlib.closing(self._stream("/v1/logs/stream", since)) as connection:
            answer, data = connection.getresponse(), b""
            check(answer.status == 200, "the stream", answer.status)
            while wanted not in data or not data.endswith(b"\n\n"):
                more = answer.read1(1 << 20)
                check(more, "the stream ended before", wanted)
                data += more
        events = [parse_event(block) for block in re.split(r"(?:\r\n|\r|\n){2}", data.decode())[:-1]]
        lines = [event["data"]["message"] for event in events if event.get("event") == "log"]
        check(lines == self.sent, "the stream brought", len(lines), "lines where", len(self.sent), "were stored")
        return len(events)

    def check_ctl(self, jobs: dict[str, str], verbose: Iterable[str] = ()) -> int:
        """What ctl.py prints about all this; the number of calls. `verbose`: jobs to be shown one by one."""
        listed = 0
        for words, count in (
            (("jobs", "--limit", "5000"), None), (("jobs", "--host", HOST, "--limit", "5000"), len(jobs) + 1), (("hosts",), None),
            (("apps",), None), (("token", "list"), None), (("audit", "--limit", "5000"), None), (("whoami",), None),
            (("logs", "--tail", "100", "--host", HOST), None),
        ):  # fmt: skip
            out, _ = self.ctl(*words)
            check(count is None or len(out.splitlines()) == count, words, "printed", len(out.splitlines()), "lines for", count)
            listed += 1
        for job_id in verbose:
            self.ctl("status", job_id)
            out, _ = self.ctl("logs", "--job", job_id)
            check(len(out.split("\n")) == 3 and out.endswith(f"behind {job_id}\n"), "two lines became", repr(out[:300]))
            listed += 2
        return listed

    def check_ctl_arguments(self, text: str) -> int:
        """What a person pastes behind a verb; no argument can hold a NUL. The number of calls."""
        given = text.replace("\0", "")[:2000]
        deploy = ("deploy", "--repo", REPO, "--host", "elsewhere", f"--ref={given}")
        calls = (deploy, ("status", given), ("hosts", "drain", given), ("token", "revoke", given))
        for words in calls:
            self.ctl(*words, fails=True)
        return len(calls)

    def ctl(self, *words: str, fails: bool = False) -> tuple[str, str]:
        """(stdout, stderr) of ctl.py; neither holds a control character."""
        settings = {"DEPLOYBOT_URL": f"http://127.0.0.1:{self.port}", "DEPLOYBOT_TOKEN": self.token}
        before, out, err = dict(os.environ), capture(), capture()
        os.environ.update(settings)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    code = ctl.main(list(words))
                except SystemExit as end:  # of argparse
                    code = end.code
        finally:
            os.environ.clear()
            os.environ.update(before)
        said = tuple(stream.buffer.getvalue().decode() for stream in (out, err) if not stream.flush())
        check(fails or code == 0, "ctl.py", words, "ended with", code, said[1])
        for text in said:
            found = UNPRINTABLE.search(text)
            check(not found, "ctl.py", words[:1], "printed", found and repr(text[max(0, found.start() - 40) : found.end() + 40]))
        check("Traceback" not in said[1], "ctl.py", words, said[1])
        return said


def capture() -> io.TextIOWrapper:
    """A stdout as a program has it: its buffer keeps the bytes."""
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)


def parse_event(block: str) -> dict[str, Any]:
    """https://html.spec.whatwg.org/multipage/server-sent-events.html, which also takes a lone CR for the end of a line."""
    event: dict[str, Any] = {}
    for line in re.split(r"\r\n|\r|\n", block):
        name, colon, value = line.partition(": ")
        check(line.startswith(":") or (colon and name in ("id", "event", "data", "retry")), "a line of the stream is", repr(line))
        check(line.startswith(":") or name not in event, "twice in one event:", repr(block[:300]))
        event[name] = value
    if "event" in event:
        check(event["event"] in ("log", "job", "deployment", "gap", "end"), "an event that there is not:", repr(block[:300]))
        event["data"] = json.loads(event["data"])
    return event


def check_log(text: str, as_json: bool = False) -> int:
    """Each line of a controller's log is one record, and printable; the number of lines."""
    lines = text.split("\n")[:-1]
    for line in lines:
        check(line.isprintable(), "raw in the log:", repr(line[:300]))
        if as_json:
            check(json.loads(line).keys() == {"time", "level", "message"}, "forged in the log:", repr(line[:300]))
        else:
            check(LOG_LINE.fullmatch(line), "forged in the log:", repr(line[:300]))
        check("forged" not in line[:34], "forged in the log:", repr(line[:300]))
    return len(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Down to the deployment
# Owns: a repository with such names, and an agent that deploys it. Ignores: the API, which has its part above.


class Repository:
    """A bare one, written by git fast-import: a branch and a tag for each string that git takes, with hostile commits."""

    def __init__(self, folder: pathlib.Path, strings: list[Hostile]):
        self.path, self._folder = folder / "hostile.git", folder
        self.git("init", "--quiet", "--bare", "--initial-branch=main", str(self.path))
        self.strings = [string for string in strings if self.takes(string.text)]
        names = {string.text for string in self.strings}  # a branch a/b keeps a branch a away
        self.strings = [s for s in self.strings if not any(other.startswith(s.text + "/") for other in names)]
        self._write(strings)
        listed = self.git("for-each-ref", "--format=%(refname) %(objectname)").split("\n")  # not splitlines(): U+2028 is no end
        self.commits = dict(line.rsplit(" ", 1) for line in listed)

    def git(self, *words: str, **more: Any) -> str:
        done = subprocess.run(
            ["git", *words], cwd=self._folder if words[0] == "init" else self.path, capture_output=True, check=True, **more
        )
        return done.stdout.decode(errors="surrogateescape").strip()

    def takes(self, text: str) -> bool:
        if not text or "\0" in text or not is_unicode(text) or len(text.encode()) > 200 or text == "main":
            return False
        argv = ["git", "check-ref-format", f"refs/heads/{text}"]
        return subprocess.run(argv, capture_output=True, check=False).returncode == 0

    def _write(self, strings: list[Hostile]) -> None:
        """Files whose names and contents are hostile, in commits whose messages and authors are."""
        parts = [self._commit("refs/heads/main", "main", "first")]
        others = itertools.cycle(string for string in strings if is_unicode(string.text) and len(string.text) < 1000)
        for string in self.strings:
            message = next(others).text
            for kind in ("heads", "tags"):
                parts.append(self._commit(f"refs/{kind}/{string.text}", f"{kind} {string.number}", f"{message}\n\n{string.text}"))
        subprocess.run(["git", "fast-import", "--quiet"], cwd=self.path, input=b"".join(parts), check=True)

    def _commit(self, ref: str, content: str, message: str) -> bytes:
        author = re.sub(r"[<>\n\0]", "", message)[:100].strip() or "nobody"
        data, text = content.encode(), message.encode()
        files = [
            b"M 100644 inline page\n",
            b'M 100644 inline "-rf"\n',
            b'M 100644 inline "$(touch x)"\n',
            b'M 100644 inline "a\\nb"\n',
        ]
        head = b"commit %b\nauthor %b <a@b> 0 +0000\ncommitter %b <a@b> 0 +0000\n" % (
            ref.encode(),
            author.encode(),
            author.encode(),
        )
        return (
            head + b"data %d\n%b\n" % (len(text), text) + b"".join(b"%bdata %d\n%b\n" % (file, len(data), data) for file in files)
        )


def short_name(branch: str) -> str:
    """What a branch is asked for by; one that is called as a full ref is, by its own full ref."""
    return f"refs/heads/{branch}" if agent.FULL_REF.fullmatch(branch) else branch


class Site:
    """A controller and an agent of HOST as processes, and the repository."""

    def __init__(self, proof: Proof, strings: list[Hostile], canaries: pathlib.Path):
        self.proof, self.canaries, self.strings = proof, canaries, strings
        self.folder = proof.folder / "site"
        (self.folder / "seen").mkdir(parents=True)
        self.repository = Repository(self.folder, strings)
        build = f'{{ env -0; printf "DEPLOYED=%s" "$(cat page)"; }} > {self.folder}/seen/$DEPLOY_JOB_ID'
        shared = {"repo": REPO, "clone_url": f"file://{self.repository.path}", "hosts": [HOST], "build": build}
        apps = [
            {"name": name, **shared, "deploy_on_push": True, "branches": [f"*{i}*" if i else "*"]} for i, name in enumerate(APPS)
        ]
        self.controller = proof.controller(name="deploying", apps={"apps": apps}, webhook_secret=SECRET)
        self.client = self.controller.client()
        env = {name: value for name, value in os.environ.items() if not name.startswith(("DEPLOYBOT_", "GIT_"))}
        env |= {"DEPLOYBOT_AGENT_TOKEN": common.AGENT_TOKEN, "HOME": str(self.folder), "GIT_CONFIG_NOSYSTEM": "1"}
        self.workdir = self.folder / "work"
        argv = [
            sys.executable, AGENT, "--url", self.controller.url, "--hostname", HOST, "--workdir", self.workdir, "--slots", len(APPS),
            "--git-protocols", "file",
        ]  # fmt: skip
        self.agent = common.Process(argv, self.folder / "agent.log", env, self.folder)
        self.agent.launch()

    def deploy(self, number: int, ref: str, content: str, told: str, **metadata: str) -> None:
        """Asks for it; what is refused is none of the agent's business."""
        body = {"repo": REPO, "ref": ref, "host": HOST, "app": APPS[number % len(APPS)], "metadata": metadata, "force": True}
        status, answer = self.client.call("POST", "/v1/jobs", body)
        check(status in (201, 422), repr(ref), status, answer)
        refusal = deploybot.is_ref(ref)
        check((status == 422) == bool(refusal), repr(ref), status, refusal)
        if status == 201:
            self.expected[answer["job"]["id"]] = (ref, content, told)

    def push(self, string: Hostile) -> None:
        commit = self.repository.commits[f"refs/heads/{string.text}"]
        event = {
            "ref": f"refs/heads/{string.text}", "after": commit, "repository": {"full_name": REPO}, "pusher": {"name": string.text},
            "head_commit": {"id": commit, "message": string.text},
        }  # fmt: skip
        body = json.dumps(event).encode()
        headers = {"X-GitHub-Event": "push", "X-Hub-Signature-256": deploybot.signature_of(SECRET, body)}
        status, answer = self.client.call("POST", "/v1/webhooks/github", body, headers)
        if deploybot.is_ref(string.text):
            check(status == 422, repr(string.text), status, answer)
            return
        check(status == 200 and answer["jobs_created"], repr(string.text), status, answer)
        for job_id in answer["jobs_created"]:
            self.expected[job_id] = (commit, f"heads {string.number}", string.text)

    expected: dict[str, tuple[str, str, str]]  # job id to ref, content of the release, branch

    def deploy_all(self, full: bool) -> None:
        self.expected = {}
        chosen = self.repository.strings
        if not full:
            chosen = self.proof.chance.sample(chosen, min(SAMPLE, len(chosen)))
        for number, string in enumerate(chosen):
            ways = (
                lambda s=string, n=number: self.deploy(n, short_name(s.text), f"heads {s.number}", s.text),
                lambda s=string, n=number: self.deploy(n, f"refs/heads/{s.text}", f"heads {s.number}", s.text),
                lambda s=string, n=number: self.deploy(n, f"refs/tags/{s.text}", f"tags {s.number}", ""),
                lambda s=string: self.push(s),
            )  # fmt: skip
            for way in ways if full else [ways[number % len(ways)]]:
                way()
        for number, string in enumerate(s for s in self.strings if agent.is_text(s.text) and len(s.text) < 4000):
            if full or number % 16 == self.proof.seed % 16:
                self.deploy(number, "main", "main", string.text or "main", branch=string.text, commit_message=string.text)
        for job_id, (ref, content, branch) in self.expected.items():
            self.check_deployed(job_id, ref, content, branch)

    def check_deployed(self, job_id: str, ref: str, content: str, branch: str) -> None:
        job = wait_for(lambda: self._ended(job_id), DEPLOYED, f"the end of the deployment of {ref!r}")
        check(job["status"] == "success", repr(ref), job, self.client.lines(job_id))
        *variables, deployed = (self.folder / "seen" / job_id).read_bytes().decode().split("\0")
        env = dict(variable.partition("=")[::2] for variable in variables)
        check(deployed == f"DEPLOYED={content}", repr(ref), "deployed", deployed, "not", content)
        check((env["DEPLOY_REF"], env["DEPLOY_BRANCH"]) == (ref, branch), "the script was told", env, "not", (ref, branch))

    def _ended(self, job_id: str) -> dict[str, Any] | None:
        check(self.agent.poll() is None, "the agent ended:", self.agent.said()[-2000:])
        job = self.client.ok("GET", f"/v1/jobs/{job_id}")["job"]
        return job if job["completed_at"] else None

    def check_host(self) -> None:
        """Nothing lies where it does not belong, and nothing raw stands in the agent's log."""
        own = {*APPS, ".agent", REPO.replace("/", "--")}
        strangers = [path.name for path in self.workdir.iterdir() if path.name not in own]
        check(not strangers, "in the agent's folder:", strangers)
        for line in self.agent.said().split("\n"):
            check(line.isprintable(), "raw in the agent's log:", repr(line))
            check(not line or (LOG_LINE.fullmatch(line) and "forged" not in line[:34]), "forged in the agent's log:", repr(line))
        check_log(self.controller.said())


def straight_into_git(repository: Repository, strings: list[Hostile], folder: pathlib.Path) -> int:
    """Every string as the ref of a job that no check of ours has seen: nothing but a commit comes of it."""
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_ALLOW_PROTOCOL": "file",
        "GIT_TERMINAL_PROMPT": "0",
    }

    def run_git(argv: list[str], cwd: pathlib.Path, env: dict[str, str], sink: Any) -> int:
        done = subprocess.run(
            argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
        sink.write(done.stdout)
        return done.returncode

    mirror = agent.Mirror(folder / "mirror.git", f"file://{repository.path}", run_git, env)
    mirror.fetch()
    resolved = 0
    for string in strings:
        if "\0" in string.text or not is_unicode(string.text) or len(string.text) > 10_000:  # argv cannot hold it
            continue
        with contextlib.suppress(agent.GitError):
            found = mirror.resolve(string.text)
            check(re.fullmatch(r"[0-9a-f]{40}", found.commit), repr(string.text), "resolved to", found)
            resolved += 1
    check(resolved >= len(repository.strings), "only", resolved, "of", len(repository.strings), "branches were found")
    return resolved


def sings(strings: list[Hostile], folder: pathlib.Path) -> int:
    """The proof has teeth: those strings that do run where a program is careless; their canaries are taken away again."""
    careless = [
        ["/bin/bash", "-c", "true {}"],
        ["/bin/bash", "-c", "true '{}'"],
        ["/bin/bash", "-c", 'true "{}"'],
        ["git", "ls-remote", "{}", "."],
    ]
    sung = 0
    for string in strings:
        if "\0" in string.text or not is_unicode(string.text) or len(string.text) > 10_000 or str(string.canary) not in string.text:
            continue
        for argv in careless:
            words = [word.replace("{}", string.text) for word in argv]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(words, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)
        sung += string.canary.exists()
        string.canary.unlink(missing_ok=True)
    return sung


def check_agent_fields(strings: Iterable[Hostile]) -> int:
    """A controller that was taken over hands out such fields: the agent takes none that could be an option or leave its folder."""
    good = {
        "id": "01a0c450-6c00-7000-8000-000000000000", "attempt": 1, "app": "web", "repo": REPO, "ref": "main", "host": HOST, "timeout": 60,
        "spec": {"clone_url": "https://example.com/x.git", "build": None, "activate": None, "deploy": None},
    }  # fmt: skip
    agent.parse_job(good)
    refused = 0
    for _, _, text, _ in strings:
        for name in ("app", "repo", "ref", "host"):
            try:
                job = agent.parse_job({**good, name: text})
            except agent.StepFailed:
                refused += 1
                continue
            value = getattr(job, name)
            check(value == text and "\0" not in value, name, repr(text), "became", repr(value))
            check(not value.startswith(("-", "/", ".")) and ".." not in value.split("/"), name, repr(text), "was taken")
            check(name == "ref" or re.fullmatch(r"[A-Za-z0-9._/-]+", value), name, repr(text), "was taken")
        with contextlib.suppress(agent.StepFailed):
            url = agent.parse_job({**good, "spec": {**good["spec"], "clone_url": text}}).clone_url
            check(not re.search(r"^-|[\x00-\x20\x7f]", url), "clone_url", repr(text), "was taken")
        check(
            agent.parse_key({"id": text, "attempt": 1}) is None or re.fullmatch(r"[0-9a-f-]{1,64}", text),
            "id",
            repr(text),
            "was taken",
        )
    return refused


def prove(proof: Proof) -> None:
    canaries = proof.folder / "canary"
    strings = corpus(canaries)
    check(len(strings) >= 200, "the corpus has", len(strings))
    proof.figure("strings", len(strings))
    proof.figure("of them run where a program is careless", sings(strings, proof.folder))
    no_canary(canaries, strings, "the trial")

    controller = proof.controller(
        webhook_secret=SECRET,
        apps={
            "apps": [{"name": APP, "repo": REPO, "hosts": ["elsewhere", "role=edge"], "deploy_on_push": True, "branches": ["*"]}]
        },
    )
    client = controller.client()
    api = Api(client.raw, controller.port, common.TOKEN)
    position = api.stream_position()
    jobs = api.attack(strings, 1 if proof.full else 2)
    proof.say("through the API")
    proof.figure("events of the stream, framed", api.check_stream(position))
    step = 1 if proof.full else 4
    shown = api.check_ctl(jobs, list(jobs)[proof.seed % step :: step])
    for string in strings[proof.seed % step :: step]:
        shown += api.check_ctl_arguments(string.text)
    proof.figure("calls of ctl.py, printable", shown)
    proof.figure("lines of the log, printable", check_log(controller.said()))
    proof.figure("fields that the agent refused", check_agent_fields(strings))
    no_canary(canaries, strings, "the API")
    proof.say("shown")

    site = Site(proof, strings, canaries)
    proof.figure("refs straight into git, found", straight_into_git(site.repository, strings, proof.folder))
    no_canary(canaries, strings, "git")
    site.deploy_all(proof.full)
    site.check_host()
    no_canary(canaries, strings, "a deployment")
    proof.figure("branches and tags that git takes", 2 * len(site.repository.strings))
    proof.figure("deployments", len(site.expected))


if __name__ == "__main__":
    sys.exit(run(prove, __doc__))
