"""Processes of the benchmark, what /proc says of them, and one plain HTTP client.

Owns: every process that the benchmark starts, so that none outlives it. Ignores: what is measured.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import os
import pathlib
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
TOKEN, WEBHOOK_SECRET = "dbt_bench_admin_0123456789abcdef", "bench webhook secret 0123456789abcdef"
LOCALHOST = "127.0.0.1"
START_LIMIT = 120.0  # seconds until a controller must answer
MIB = 1024 * 1024
TICKS = os.sysconf("SC_CLK_TCK")


class Wrong(Exception):
    """Something that no speed excuses: an error status, a lost line, a program that does not start."""


def raise_descriptor_limit() -> int:
    """The soft limit becomes the hard one, also for what is started from here; returns it."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def free_port() -> int:
    """One that was free a moment ago, below those that Linux gives to outgoing connections: a restart finds it free again."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((LOCALHOST, port))
            return port


def wait_for(condition: Callable[[], Any], seconds: float, what: str, pause: float = 0.002) -> Any:
    """The first true value of `condition()`, for what only another process can bring about. Raises Wrong."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(pause)
    raise Wrong(f"{what}: did not come within {seconds:g} s")


# -- /proc -------------------------------------------------------------------------------------------------------------


def memory(pid: int) -> tuple[int, int]:
    """(resident bytes, their peak)."""
    fields = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


def forget_peak(pid: int) -> int:
    """The peak begins anew at what is resident now, which is returned (proc_pid_clear_refs(5))."""
    pathlib.Path(f"/proc/{pid}/clear_refs").write_text("5")
    return memory(pid)[0]


def cpu_seconds(pid: int) -> float:
    """Of user and system together."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def unread(port: int) -> tuple[int, int]:
    """(connections that a server on that port has accepted or is yet to accept, those among them that it has not read from)."""
    connected, waiting = 0, 0
    local = f":{port:04X}"
    with open("/proc/net/tcp") as table:
        next(table)
        for line in table:
            fields = line.split(maxsplit=5)
            if not fields[1].endswith(local):
                continue
            backlog = int(fields[4].partition(":")[2], 16)
            if fields[3] == "01":  # established
                connected += 1
                waiting += backlog > 0
            elif fields[3] == "0A":  # listens: those that wait for accept()
                waiting += backlog
    return connected, waiting


# -- processes ---------------------------------------------------------------------------------------------------------


class Process:
    """A child with its output in a file."""

    started: set[Process] = set()  # those that may still run

    def __init__(self, argv: list[Any], log: pathlib.Path, cwd: pathlib.Path, env: dict[str, str] | None = None):
        self.log = log
        with open(log, "ab") as out:
            self._popen = subprocess.Popen([*map(str, argv)], cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        self.pid = self._popen.pid
        Process.started.add(self)

    def is_over(self) -> bool:
        return self._popen.poll() is not None

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()
        Process.started.discard(self)

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def wait(self, seconds: float) -> int:
        """Its exit code; it is killed where it does not end in time."""
        try:
            return self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Wrong(f"{self._popen.args} did not end within {seconds:g} s") from None
        finally:
            self.kill()

    def stop(self, seconds: float = 60.0) -> None:
        if not self.is_over():
            self.signal(signal.SIGTERM)
        self.wait(seconds)

    def said(self, size: int = 2000) -> str:
        """The end of its output."""
        return self.log.read_text(errors="replace")[-size:]


def end_all() -> None:
    for process in list(Process.started):
        with contextlib.suppress(OSError):
            process.kill()
    for child in multiprocessing.active_children():
        child.kill()


def environment(**settings: Any) -> dict[str, str]:
    """Ours without any DEPLOYBOT_*, and DEPLOYBOT_X for each x. Python may keep its bytecode, as it does under the unit."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("DEPLOYBOT_")}
    plain.pop("PYTHONDONTWRITEBYTECODE", None)
    return {**plain, **{"DEPLOYBOT_" + name.upper(): str(value) for name, value in settings.items()}}


class Controller:
    """deploybot.py as a process: closed, with its default configuration, its log in a file. A restart keeps port and database."""

    def __init__(self, program: pathlib.Path, db: pathlib.Path, apps: pathlib.Path, *flags: Any, as_script: bool = False):
        self.db, self._flags, self._apps = db, flags, apps
        self._cwd = program.parent
        self._start = [sys.executable, program] if as_script else [sys.executable, "-m", program.stem]
        self.port = free_port()
        self._process: Process | None = None

    def run_by(self, *argv: Any) -> None:
        """Another program runs it, which takes its path and arguments behind these."""
        self._start = [*argv, self._cwd / f"{self._start[-1]}.py"]

    def begin(self) -> float:
        """Starts it and does not wait; the time (monotonic)."""
        argv = [*self._start, "--host", LOCALHOST, "--port", self.port, "--db", self.db, "--apps", self._apps, *self._flags]
        begun = time.monotonic()
        env = environment(token=TOKEN, webhook_secret=WEBHOOK_SECRET)
        self._process = Process(argv, self.db.with_suffix(".log"), self._cwd, env)
        return begun

    def start(self) -> Controller:
        self.begin()
        self.wait_until_healthy()
        return self

    def wait_until_healthy(self) -> float:
        """When /health answered for the first time (monotonic)."""

        def healthy() -> bool:
            if self.process.is_over():
                raise Wrong(f"the controller ended at its start: {self.process.said()}")
            with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(Client(self.port)) as client:
                return client.call("GET", "/health")[0] == 200
            return False

        wait_for(healthy, START_LIMIT, "a controller that answers /health", 0.001)
        return time.monotonic()

    @property
    def process(self) -> Process:
        assert self._process is not None
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def client(self) -> Client:
        return Client(self.port)

    def stop(self) -> None:
        self.process.stop()

    def __enter__(self) -> Controller:
        return self if self._process else self.start()

    def __exit__(self, *_: Any) -> None:
        if not self.process.is_over():
            self.stop()


def in_process(work: Callable[..., Any], *values: Any) -> Task:
    """`work(pipe, *values)` in a process of its own, forked from here."""
    return Task(work, values)


class Task:
    """A function that runs in a forked process; `pipe` is its other end, for what it says on its way and is told."""

    def __init__(self, work: Callable[..., Any], values: tuple[Any, ...]):
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=self._run, args=(theirs, work, values), daemon=True)
        self._process.start()
        theirs.close()

    @staticmethod
    def _run(pipe: Any, work: Callable[..., Any], values: tuple[Any, ...]) -> None:
        Process.started.clear()  # its parent's
        try:
            pipe.send(("result", work(pipe, *values)))
        except Exception as error:
            pipe.send(("failed", f"{type(error).__name__}: {error}"))

    def receive(self, kind: str, seconds: float = 300.0) -> Any:
        """The next message, which must be of that kind. Raises Wrong."""
        try:
            if not self.pipe.poll(seconds):
                raise Wrong(f"a client of the benchmark said nothing for {seconds:g} s")
            got, value = self.pipe.recv()
        except (EOFError, OSError):
            raise Wrong("a client of the benchmark ended") from None
        if got != kind:
            raise Wrong(f"a client of the benchmark: {value}")
        return value

    def send(self, message: Any) -> None:
        """Raises Wrong with what ended it, where it has ended."""
        try:
            self.pipe.send(message)
        except OSError:
            self.receive("still there")

    def result(self, seconds: float = 300.0) -> Any:
        try:
            return self.receive("result", seconds)
        finally:
            self.end()

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


# -- HTTP --------------------------------------------------------------------------------------------------------------


class Client:
    """One kept connection of the admin, for setting up and for looking."""

    def __init__(self, port: int, token: str = TOKEN, timeout: float = 60.0):
        self._token = token
        self._connection = http.client.HTTPConnection(LOCALHOST, port, timeout=timeout)

    def raw(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        """The answer, yet to be read."""
        data = None if body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}", **headers}
        self._connection.request(method, path, data, sent)
        return self._connection.getresponse()

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        answer = self.raw(method, path, body)
        data = answer.read()
        is_json = "json" in answer.headers.get("Content-Type", "")
        return answer.status, json.loads(data) if is_json else data

    def ok(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of an answer that must be 2xx."""
        status, answer = self.call(method, path, body)
        if not 200 <= status < 300:
            raise Wrong(f"{method} {path} answered {status}: {answer}")
        return answer

    def close(self) -> None:
        self._connection.close()


def http_request(method: str, path: str, token: str | None, body: bytes = b"", **headers: str) -> bytes:
    """A whole request as agent.py and ctl.py send it by http.client; names of `headers` are written with _ for -."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {LOCALHOST}:8080", "Accept-Encoding: identity"]
    if body:
        lines += [f"Content-Length: {len(body)}", "Content-Type: application/json"]
    lines += ["User-Agent: deploybot-agent/0.1.0"]
    lines += [f"Authorization: Bearer {token}"] if token else []
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@contextlib.contextmanager
def bare_server(folder: pathlib.Path) -> Iterator[int]:
    """The yardstick of HTTP in a process of its own: its port."""
    port = free_port()
    process = Process([sys.executable, HERE / "bare.py", port], folder / "bare.log", folder)

    def listens() -> bool:
        if process.is_over():
            raise Wrong(f"the bare server ended: {process.said()}")
        with contextlib.suppress(OSError), socket.create_connection((LOCALHOST, port), 1):
            return True
        return False

    try:
        wait_for(listens, START_LIMIT, "the bare server")
        yield port
    finally:
        process.kill()
