"""What the proofs share: a controller as a process, an HTTP client that keeps its connection, /proc, arguments and figures.

A proof is `python tests/proof/NAME.py [--seed N] [--full]`:

    def prove(proof):                       # proof.seed, proof.full, proof.folder, proof.options
        controller = proof.controller()     # a process of its own, on a free port, with a token
        client = controller.client()
        status, answer = client.call("GET", "/health")
        check(status == 200, "not healthy", answer)
        proof.figure("health", status)

    if __name__ == "__main__":
        sys.exit(run(prove, __doc__))

`run` prints the seed first and the figures last, ends every process that the proof started, and exits 1 on a failure. The
program under proof is the one beside `tests/`: a copy of the tree, with one line broken, proves that copy.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import hashlib
import http.client
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import deploybot

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPLOYBOT, AGENT, CTL = ROOT / "deploybot.py", ROOT / "agent.py", ROOT / "ctl.py"

TOKEN, AGENT_TOKEN, READ_TOKEN = "dbt_proof_admin", "dbt_proof_agents", "dbt_proof_reader"
START_LIMIT = 60.0  # seconds: a loaded machine is slow to start Python
SHORT_LIMIT, FULL_LIMIT = (300, 4 * 3600)  # seconds after which a proof that hangs is ended, with a traceback of each thread
LOST = (OSError, http.client.HTTPException)  # what a call raises whose answer did not come


class Failure(AssertionError):
    """What the proof holds does not hold."""


def check(holds: Any, *what: Any) -> None:
    """Raises Failure with `what` unless it holds."""
    if not holds:
        raise Failure(" ".join(map(str, what)))


def wait_for(condition: Callable[[], Any], seconds: float = 30.0, what: str = "what was waited for") -> Any:
    """The first true value of `condition()`. For what only another thread or process can bring about."""
    deadline, pause = time.monotonic() + seconds, 0.002
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)  # quick at first, and no load of its own later
    raise Failure(f"{what}: did not come within {seconds:g} s")


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# Owns: every process that a proof starts, so that none outlives it. Ignores: what they do.


class Process:
    """A child with its output in a file."""

    started: set[Process] = set()  # those that may still run

    def __init__(self, argv: list[Any], log: pathlib.Path, env: dict[str, str], cwd: pathlib.Path):
        self.argv, self.log, self.env, self.cwd = list(map(str, argv)), log, env, cwd
        self.popen: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        with open(self.log, "ab") as log:
            self.popen = subprocess.Popen(self.argv, cwd=self.cwd, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        Process.started.add(self)

    @property
    def pid(self) -> int:
        assert self.popen is not None
        return self.popen.pid

    def poll(self) -> int | None:
        assert self.popen is not None
        return self.popen.poll()

    def signal(self, number: int) -> None:
        assert self.popen is not None
        self.popen.send_signal(number)

    def wait(self, seconds: float = 30.0) -> int:
        """Its exit code."""
        assert self.popen is not None
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.argv} did not end within {seconds:g} s") from None

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        if self.popen is not None:
            self.popen.kill()
            self.popen.wait()
        Process.started.discard(self)

    def stop(self, seconds: float = 30.0) -> int:
        """SIGTERM; its exit code."""
        if self.poll() is None:
            self.signal(signal.SIGTERM)
        try:
            return self.wait(seconds)
        finally:
            self.kill()

    def said(self, start: int = 0) -> str:
        """Its output from that byte on."""
        try:
            with open(self.log, "rb") as log:
                log.seek(start)
                return log.read().decode(errors="replace")
        except FileNotFoundError:
            return ""

    def says(self, text: str, seconds: float = 30.0) -> None:
        wait_for(lambda: text in self.said(), seconds, f"{text!r} in {self.log}")


def environment(**settings: Any) -> dict[str, str]:
    """Ours without any DEPLOYBOT_*, and DEPLOYBOT_X for each x that is not None."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("DEPLOYBOT_")}
    return {**plain, **{"DEPLOYBOT_" + name.upper(): str(value) for name, value in settings.items() if value is not None}}


class Controller(Process):
    """deploybot.py on a free port of the loopback; a restart keeps port and database.

    `settings` are variables without DEPLOYBOT_; token, agent_token and read_token are set unless they are given (None: unset).
    `program` is what Python runs in place of deploybot.py: a wrapper of the test.
    """

    def __init__(self, folder: pathlib.Path, *flags: Any, apps: Any = None, program: Any = DEPLOYBOT, **settings: Any):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.flags, self.program = folder, flags, program
        self.settings = {"token": TOKEN, "agent_token": AGENT_TOKEN, "read_token": READ_TOKEN, **settings}
        self.token = self.settings["token"]
        self.db, self.apps_file = folder / "data" / "deploybot.db", folder / "apps.yaml"
        if apps is not None or not self.apps_file.exists():
            self.apps_file.write_text(json.dumps(apps or {"apps": []}))
        self.port = free_port()
        super().__init__([], folder / "controller.log", {}, folder)

    def begin(self) -> int:
        """Starts it without waiting until it listens; the length of its log before."""
        self.argv = [sys.executable, str(self.program), "--host", "127.0.0.1", "--port", str(self.port), *map(str, self.flags)]
        self.env = environment(**self.settings)
        before = self.log.stat().st_size if self.log.exists() else 0
        self.launch()
        return before

    def start(self, seconds: float = START_LIMIT) -> Controller:
        before = self.begin()
        pattern = re.compile(r" listens on 127\.0\.0\.1 port ([0-9]+)")

        def listening() -> Any:
            check(self.poll() is None, "the controller ended at its start:", self.said(before)[-2000:])
            return pattern.search(self.said(before))

        self.port = int(wait_for(listening, seconds, "a controller that listens")[1])
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def restart(self) -> None:
        """SIGKILL and a new start."""
        self.kill()
        self.start()

    def client(self, token: str | None = "", port: int | None = None, timeout: float = 30.0) -> Client:
        """With the admin's token unless another (or None) is given; `port`: of something in between."""
        return Client(port or self.port, self.token if token == "" else token, timeout)

    def call(self, method: str, path: str, body: Any = None, token: str | None = "") -> tuple[int, Any]:
        """One call on a connection of its own."""
        with contextlib.closing(self.client(token)) as client:
            return client.call(method, path, body)

    def usage(self) -> dict[str, int]:
        return usage(self.pid)


def usage(pid: int) -> dict[str, int]:
    """`rss` and its peak `hwm` in bytes, `threads`, `fds` of a process of ours."""
    fields = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines())
    kib = {name: int(fields[key].split()[0]) * 1024 for name, key in (("rss", "VmRSS"), ("hwm", "VmHWM"))}
    return {**kib, "threads": int(fields["Threads"]), "fds": len(os.listdir(f"/proc/{pid}/fd"))}


def rss(pid: int) -> int:
    return usage(pid)["rss"]


def threads(pid: int) -> int:
    return usage(pid)["threads"]


def fds(pid: int) -> int:
    return usage(pid)["fds"]


def free_port() -> int:
    """One that was free a moment ago, below those that Linux gives to outgoing connections: a restart finds it free again."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


# ---------------------------------------------------------------------------------------------------------------------
# HTTP
# Owns: one connection a client, kept alive. Ignores: what is to be sent again; that is the caller's to decide.


class Client:
    """For one thread. A call whose answer does not come raises one of LOST, and the next call connects anew."""

    def __init__(self, port: int, token: str | None = TOKEN, timeout: float = 30.0, host: str = "127.0.0.1"):
        self.host, self.port, self.token, self.timeout = host, port, token, timeout
        self._connection: http.client.HTTPConnection | None = None

    def raw(self, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, Any, bytes]:
        """(status, headers, bytes). A body that is no bytes is sent as JSON."""
        if self._connection is None:
            self._connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        sent = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.token}"} if self.token else {})}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            self._connection.request(method, path, data, {**sent, **(headers or {})})
            answer = self._connection.getresponse()
            read = answer.read()
        except BaseException:
            self.close()
            raise
        if answer.will_close:
            self.close()
        return answer.status, answer.headers, read

    def call(self, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, Any]:
        """(status, the JSON of the answer)."""
        status, _, data = self.raw(method, path, body, headers)
        return status, json.loads(data) if data else {}

    def ok(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of an answer that must be 2xx."""
        status, answer = self.call(method, path, body)
        check(200 <= status < 300, method, path, "answered", status, answer)
        return answer

    def jobs(self, **query: Any) -> Iterator[dict[str, Any]]:
        """Every job, newest first."""
        before: str | None = None
        while True:
            asked = {"limit": 1000, **query, **({"before": before} if before else {})}
            page = self.ok("GET", "/v1/jobs?" + urllib.parse.urlencode(asked))
            yield from page["jobs"]
            before = page["next"]
            if before is None:
                return

    def lines(self, job_id: str) -> list[dict[str, Any]]:
        """Every stored line of a job, of all its attempts."""
        lines, after = [], 0
        while after is not None:
            page = self.ok("GET", f"/v1/jobs/{job_id}/logs?limit=10000&after={after}")
            lines += page["lines"]
            after = page["next"]
        return lines

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


class LightAgent:
    """The four calls of an agent, for one thread, without git and scripts. Signs in with a secret that it made itself."""

    def __init__(self, port: int, hostname: str, enrolment: str = AGENT_TOKEN, timeout: float = 40.0):
        self.hostname, self.secret = hostname, f"dbt_secret_of_{hostname}"
        self.enrolment = Client(port, enrolment, timeout)
        self.client = Client(port, self.secret, timeout)
        self.id = self.session = ""

    def register(self, **more: Any) -> tuple[int, Any]:
        digest = hashlib.sha256(self.secret.encode()).hexdigest()
        body = {"hostname": self.hostname, "token_sha256": digest, **more}
        status, answer = self.enrolment.call("POST", "/v1/agents/register", body)
        if status == 200:
            self.id, self.session = answer["id"], answer["session"]
        return status, answer

    def beat(self, running: Iterable[tuple[str, int]] = (), wait: int = 0, **more: Any) -> tuple[int, Any]:
        """`running`: (job id, attempt) of all that it holds."""
        held = [{"job_id": job_id, "attempt": attempt} for job_id, attempt in running]
        body = {"status": "online", "session": self.session, "running": held, **({"wait": wait} if wait else {}), **more}
        return self.client.call("POST", f"/v1/agents/{self.id}/heartbeat", body)

    def logs(self, job: dict[str, Any], offset: int, messages: Iterable[str]) -> tuple[int, Any]:
        body = {"attempt": job["attempt"], "offset": offset, "lines": [{"message": message} for message in messages]}
        return self.client.call("POST", f"/v1/jobs/{job['id']}/logs", body)

    def result(self, job: dict[str, Any], status: str = "success", **more: Any) -> tuple[int, Any]:
        body = {"attempt": job["attempt"], "status": status, **more}
        return self.client.call("POST", f"/v1/jobs/{job['id']}/result", body)

    def close(self) -> None:
        self.enrolment.close()
        self.client.close()


# ---------------------------------------------------------------------------------------------------------------------
# A controller in this process
# Owns: its files, its crashes, its full disk; one call as an Answer. Ignores: what is right.


class Crash(BaseException):
    """The process has ended here: nothing above catches it."""


AT_COMMIT = 0  # in place of the number of a statement: the first COMMIT, whichever statement that is


class Faults:
    """Counts the statements of one call and breaks one of them."""

    def __init__(self, snapshot: Callable[[], None]):
        self._snapshot = snapshot
        self.happened: collections.Counter[str] = collections.Counter()
        self.kind, self.at, self.count, self.commits, self.fired = "", 0, 0, 0, False
        self.unfenced = ""  # a statement that changes a job in whatever state it is

    def arm(self, fault: tuple[str, int] | None) -> None:
        self.kind, self.at = fault or ("", 0)
        self.count, self.commits, self.fired = 0, 0, False

    def around(self, sql: str, execute: Callable[[], Any], commits: bool) -> Any:
        """Before its statement the disk is full; after it the process has ended. `commits`: what it does is durable then."""
        if "UPDATE jobs" in sql and "WHERE id = ? AND status = ? AND attempt = ?" not in sql:
            self.unfenced = sql
        if sql == "ROLLBACK":
            return execute()
        self.count += 1
        is_it = commits if self.at == AT_COMMIT else self.count == self.at
        if self.kind == "full" and is_it and not self.fired:
            self.fired = True
            raise sqlite3.OperationalError("database or disk is full")
        value = execute()
        self.commits += commits
        if self.kind == "crash" and is_it and not self.fired:
            self.fired = True
            self.happened["crash after COMMIT" if self.commits else "crash before COMMIT"] += 1
            self._snapshot()
            raise Crash
        return value


class Connection:
    """Of SQLite, with Faults in front."""

    def __init__(self, real: sqlite3.Connection, faults: Faults):
        self._real, self._faults = real, faults

    def execute(self, sql: str, *values: Any) -> Any:
        commits = sql == "COMMIT" or (sql.startswith("INSERT") and not self._real.in_transaction)
        return self._faults.around(sql, lambda: self._real.execute(sql, *values), commits)

    def executemany(self, sql: str, *values: Any) -> Any:
        return self._faults.around(sql, lambda: self._real.executemany(sql, *values), False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class Answer(NamedTuple):
    status: int
    body: dict[str, Any]
    sent: Callable[[], None]  # says that it was written, or could not be


class Subject:
    """A Daemon that serves nothing, and its folder."""

    def __init__(self, folder: pathlib.Path, clock: Any, apps: Any, settings: dict[str, Any]):
        """`settings` as in Controller; `clock`: one that the proof holds."""
        self.folder, self.clock, self._lives = folder, clock, 0
        (folder / "apps.json").write_text(json.dumps({"apps": apps}))
        flags = {"host": "127.0.0.1", "port": "0", "db": str(folder / "0.db"), "apps": str(folder / "apps.json")}
        self._config = deploybot.Config.load(flags, {f"DEPLOYBOT_{name.upper()}": str(v) for name, v in settings.items()})
        self.faults = Faults(self.snapshot)
        self._copy: pathlib.Path | None = None  # what a crash has left, once it has happened
        self._open()

    def _open(self) -> None:
        self.daemon = deploybot.Daemon(self._config, self.clock)
        store = self.daemon.store
        store._db = Connection(store._db, self.faults)
        for _ in range(store._readers.qsize()):
            store._readers.put(Connection(store._readers.get(), self.faults))

    def _release(self) -> None:
        self.daemon.server.server_close()
        self.daemon.store.close()

    def snapshot(self) -> None:
        """The files as they stand now. A WAL without its -shm is what a dead process leaves, and SQLite reads it again."""
        self._lives += 1
        self._copy = self.folder / f"{self._lives}.db"
        for suffix in ("", "-wal"):
            if (found := pathlib.Path(f"{self._config.db}{suffix}")).exists():
                shutil.copyfile(found, f"{self._copy}{suffix}")

    def crash(self) -> None:
        """What comes after was never there: a new Daemon opens the files as they were."""
        if self._copy is None:
            self.snapshot()
        self._release()
        self._config = dataclasses.replace(self._config, db=self._copy)
        self._copy = None
        self._open()

    def stop_and_start(self) -> None:
        """The order of Daemon.stop(), without a server that serves."""
        self.daemon.queue.close()
        self.daemon.hub.close()
        self.daemon.jobs.flush_contacts()
        self._release()
        self._open()

    def close(self) -> None:
        self._release()

    def ask(self, method: str, path: str, body: Any = None, token: str = TOKEN, connected: bool = True, **headers: str) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"host": "localhost", "authorization": f"Bearer {token}", "content-type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        request = deploybot.Request(method, path, "", sent, "127.0.0.1", "127.0.0.1", False, lambda: connected)
        response = self.daemon.server.dispatcher.respond(request, lambda *limits: data)
        check(response.status != 500, method, path, "is a fault of the controller:", response)
        return Answer(response.status, json.loads(response.body or b"{}"), response.sent or (lambda: None))

    def sweep(self) -> None:
        self.daemon.sweep()

    def rows(self, sql: str, *values: Any) -> list[Any]:
        with self.daemon.store.read() as db:
            return db._db._real.execute(sql, values).fetchall()

    def in_one_commit(self, asks: list[Callable[[], Any]], fault: Any) -> tuple[list[Any], list[int], bool]:
        """Two calls: their answers (or the Crash), the order in which they happened (one that has nothing to write is first, one that
        uploads is last), and whether they shared a commit."""
        store, answers, early, uploads = self.daemon.store, [None, None], [], []
        self.faults.arm(None)

        def call(number: int) -> None:
            try:
                answers[number] = asks[number]()
            except BaseException as error:
                answers[number] = error

        threads = [threading.Thread(target=call, args=(number,), daemon=True) for number in (0, 1)]
        with store._writer:
            for number, thread in enumerate(threads):
                waiting, uploading = len(store._waiting), len(store._uploads)
                thread.start()
                while thread.is_alive() and (len(store._waiting), len(store._uploads)) == (waiting, uploading):
                    time.sleep(0.0001)
                if len(store._uploads) > uploading:
                    uploads.append(number)
                elif len(store._waiting) == waiting:
                    early.append(number)
            self.faults.arm(None if early else fault)
        for thread in threads:
            thread.join()
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, Crash):
                raise answer
        return answers, sorted((0, 1), key=lambda number: (number not in early, number in uploads, number)), not early


# ---------------------------------------------------------------------------------------------------------------------
# A proof
# Owns: arguments, seed, folder, figures, the end of all processes. Ignores: what is proved.


class Proof:
    def __init__(self, options: argparse.Namespace, folder: pathlib.Path):
        self.options, self.seed, self.full, self.folder = options, options.seed, options.full, folder
        self.chance = random.Random(options.seed)
        self.figures: list[tuple[str, str]] = []
        self.started = time.monotonic()

    def controller(self, *flags: Any, name: str = "controller", **settings: Any) -> Controller:
        """One that listens."""
        return Controller(self.folder / name, *flags, **settings).start()

    def figure(self, name: str, value: Any) -> None:
        """A line of the table at the end."""
        self.figures.append(
            (name, f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value))
        )

    def say(self, *words: Any) -> None:
        """Progress, for who waits."""
        print(f"{time.monotonic() - self.started:7.1f} s ", *words, flush=True)


def show(figures: list[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in figures), default=0)
    for name, value in figures:
        print(f"  {name:<{width}}  {value}")


def end_all() -> None:
    for process in list(Process.started):
        with contextlib.suppress(OSError):
            process.kill()


def watch(limit: float, again: str) -> None:
    """Ends a proof that hangs, and says where."""

    def over() -> None:
        print(f"FAILED: did not end within {limit:g} s; run again: {again}", flush=True)
        faulthandler.dump_traceback()
        end_all()
        os._exit(1)

    timer = threading.Timer(limit, over)
    timer.daemon = True
    timer.start()


def run(prove: Callable[[Proof], None], doc: str | None, *extra: tuple[str, dict[str, Any]]) -> int:
    """The exit code. `extra`: further options, each (flag, keywords of argparse)."""
    text = (doc or "").strip()
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32), help="repeat that run")
    parser.add_argument("--full", action="store_true", help="the figures that are promised, in place of the short form")
    parser.add_argument("--keep", action="store_true", help="leave the folder with databases and logs")
    for flag, keywords in extra:
        parser.add_argument(flag, **keywords)
    options = parser.parse_args()
    name = pathlib.Path(sys.argv[0]).name
    again = f"python tests/proof/{name} --seed {options.seed}{' --full' if options.full else ''}"
    print(f"seed {options.seed}  ({again})", flush=True)
    watch(FULL_LIMIT if options.full else SHORT_LIMIT, again)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that what was started ends too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"proof-{name.removesuffix('.py')}-"))
    proof = Proof(options, folder)
    failed = False
    try:
        prove(proof)
    except Failure as failure:
        failed = True
        print(f"FAILED: {failure}", flush=True)
    except Exception:
        failed = True
        traceback.print_exc(file=sys.stdout)
    finally:
        end_all()
        if options.keep or failed:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    proof.figure("time", f"{time.monotonic() - proof.started:.1f} s")
    show(proof.figures)
    print(f"FAILED; run again: {again}" if failed else f"{name.removesuffix('.py')}: ok", flush=True)
    return int(failed)
