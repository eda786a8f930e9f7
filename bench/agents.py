"""Clients that behave as agents and as people do, each function in a process of its own.

Owns: fleets of parked agents, claims, readers of the stream, a person. Ignores: which figures are made of what they saw.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import random
import re
import sys
from collections.abc import Callable
from typing import Any

from clients import Answer, Connection, Loop, Tally, now, quantile
from database import APP, REPO, heartbeat, host_name, secret_of
from machine import TOKEN, Wrong, http_request

WAIT = 25  # seconds that a heartbeat parks
CONNECTS = 2000  # new connections a second
JOB_ID = re.compile(rb'"job": ?\{"id": ?"([0-9a-f-]{36})"')
LINE = re.compile(rb'"message": ?"L(\d+) (\d+) (\d+)')


def load_agent(path: pathlib.Path) -> Any:
    """agent.py as a module: how it waits and when it comes back is its own."""
    spec = importlib.util.spec_from_file_location("agent_under_test", path)
    if spec is None or spec.loader is None:
        raise Wrong(f"{path} is no program in Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def create(number: int, host: int, run: str) -> bytes:
    body = {"repo": REPO, "ref": f"{run}-{number}", "host": host_name(host), "app": APP}
    return http_request("POST", "/v1/jobs", TOKEN, json.dumps(body).encode())


def result(job: str, host: int, attempt: int = 1) -> bytes:
    body = {"attempt": attempt, "status": "success", "exit_code": 0}
    return http_request("POST", f"/v1/jobs/{job}/result", secret_of(host), json.dumps(body).encode())


class Heart:
    """The heart of one agent, as Agent._beat of agent.py has it: beats, obeys, comes back after trouble."""

    def __init__(self, fleet: Fleet, host: int):
        self.host, self._fleet = host, fleet
        self._parked = heartbeat(host, WAIT)
        self._backoff = fleet.program.Backoff(fleet.program.RETURN_FIRST)
        self._connection: Connection | None = None
        self._is_reused = False  # an answer came over this connection
        self._begun = 0.0

    @property
    def is_parked(self) -> bool:
        return self._connection is not None and self._connection.is_waiting

    def beat(self, request: bytes | None = None) -> None:
        """Parks, or sends that request."""
        if self._connection is None:
            self._connection, self._is_reused = self._fleet.loop.connect(self._answered, self._lost), False
        self._begun = now()
        self._connection.send(request or self._parked)

    def _answered(self, connection: Connection, answer: Answer) -> None:
        fleet, self._is_reused = self._fleet, True
        fleet.tally.add(answer)
        if b"\r\nconnection: close" in answer.head.lower():
            connection.close()
            self._connection = None
        if answer.status == 200:
            self._backoff.reset()
            interval = json.loads(answer.body).get("interval") or 0
            pause = max(min(interval, fleet.program.INTERVAL_LIMIT), fleet.program.IDLE_PAUSE - (now() - self._begun))
            if found := JOB_ID.search(answer.body):
                fleet.took(self, found[1].decode())
                return
        else:
            pause = self._backoff.next(float(answer.retry_after() or 0) if answer.status in (429, 503) else 0.0)
        self._again(pause)

    def _again(self, pause: float) -> None:
        if pause > 0:
            self._fleet.loop.after(pause, self.beat)
        else:
            self.beat()

    def _lost(self, connection: Connection) -> None:
        """A kept connection that was closed meanwhile is no trouble yet: the call is made once more."""
        was_busy, self._connection = connection.is_busy, None
        if not was_busy:
            return
        self._fleet.tally.lost += 1
        self._again(0.0 if self._is_reused else self._backoff.next(0.0))


class Fleet:
    """Parked agents, one connection each; jobs are made for them, taken by them and ended at once."""

    def __init__(self, pipe: Any, port: int, agent: pathlib.Path, first: int, hosts: int):
        self.loop, self.tally, self.program = Loop(port), Tally(), load_agent(agent)
        self._pipe = pipe
        self._hearts = [Heart(self, first + number) for number in range(hosts)]
        self._chance = random.Random(1)
        self._made = self._wanted = 0
        self._sent = 0.0
        self._target: Heart | None = None
        self._is_answered = self._is_taken = False
        self._latencies: list[float] = []
        self.loop.watch(pipe.fileno(), self._told)
        self._creator: Connection | None = None  # these two are there while jobs are made
        self._reporter: Connection | None = None

    def run(self) -> dict[str, Any]:
        """All park; then what the pipe says, until it says `end`."""
        for number, heart in enumerate(self._hearts):
            # Of a fleet that has run for long, parked calls end at any moment, not all at once.
            first = heartbeat(heart.host, 1 + self._chance.randrange(WAIT))
            self.loop.after(number / CONNECTS, lambda heart=heart, first=first: heart.beat(first))
        self.loop.run()
        return {"statuses": self.tally.statuses, "lost": self.tally.lost}

    def _told(self) -> None:
        kind, value = self._pipe.recv()
        if kind == "state":
            self._pipe.send(("state", sum(heart.is_parked for heart in self._hearts)))
        elif kind == "creates":
            self._wanted, self._latencies = self._made + value, []
            self._creator, self._reporter = self.loop.connect(self._create_answered), self.loop.connect(self._result_answered)
            self._create()
        elif kind == "end":
            self.loop.stop()

    def _create(self) -> None:
        assert self._creator is not None and self._reporter is not None
        if self._made == self._wanted:
            self._creator.close()
            self._reporter.close()
            self._tell_latencies()
            return
        heart = self._chance.choice(self._hearts)
        if not heart.is_parked:
            self.loop.after(0.001, self._create)
            return
        self._made += 1
        self._target, self._is_answered, self._is_taken = heart, False, False
        self._creator.send(create(self._made, heart.host, "fleet"))
        self._sent = self._creator.sent

    def _tell_latencies(self) -> None:
        seen = [seconds * 1000 for seconds in self._latencies]
        told = {"p50_ms": quantile(seen, 0.5), "p99_ms": quantile(seen, 0.99), "max_ms": max(seen), "creates": len(seen)}
        self._pipe.send(("creates", told))

    def _create_answered(self, connection: Connection, answer: Answer) -> None:
        if answer.status != 201:
            raise Wrong(f"a create was answered {answer.status}: {answer.body.decode()}")
        self._is_answered = True
        self._go_on()

    def took(self, heart: Heart, job: str) -> None:
        """The job is at the agent."""
        self._latencies.append(now() - self._sent)
        if heart is not self._target:
            raise Wrong("a job came to another host")
        assert self._reporter is not None
        self._reporter.send(result(job, heart.host))

    def _result_answered(self, connection: Connection, answer: Answer) -> None:
        if answer.status != 200:
            raise Wrong(f"a result was answered {answer.status}: {answer.body.decode()}")
        assert self._target is not None
        self._target.beat()
        self._is_taken = True
        self._go_on()

    def _go_on(self) -> None:
        if self._is_answered and self._is_taken:
            self._create()


def fleet(pipe: Any, port: int, agent: pathlib.Path, first: int, hosts: int) -> dict[str, Any]:
    return Fleet(pipe, port, agent, first, hosts).run()


def claims(pipe: Any, port: int, hosts: list[int], seconds: float) -> dict[str, Any]:
    """Each host again and again: a job is made for it, a heartbeat that does not park takes it (timed), its end is told."""
    loop, tally = Loop(port), Tally()
    deadline = now() + seconds
    made = 0

    def begin(connection: Connection) -> None:
        nonlocal made
        made += 1
        connection.answered = created
        connection.send(create(made, connection.tag, "claim"))

    def created(connection: Connection, answer: Answer) -> None:
        expect(answer, 201)
        connection.answered = taken
        connection.send(heartbeat(connection.tag))

    def taken(connection: Connection, answer: Answer) -> None:
        expect(answer, 200)
        tally.add(answer)
        found = JOB_ID.search(answer.body)
        if not found:
            raise Wrong(f"a heartbeat brought no job: {answer.body.decode()}")
        connection.answered = ended
        connection.send(result(found[1].decode(), connection.tag))

    def ended(connection: Connection, answer: Answer) -> None:
        expect(answer, 200)
        if now() < deadline:
            begin(connection)

    begun = now()
    for host in hosts:
        connection = loop.connect(created)
        connection.tag = host
        begin(connection)
    loop.run(seconds)
    return tally.told(now() - begun)


def expect(answer: Answer, status: int) -> None:
    if answer.status != status:
        raise Wrong(f"answered {answer.status}: {answer.body.decode()}")


def person(pipe: Any, port: int, every: float, host: int) -> dict[str, Any]:
    """Asks for the jobs, or for a new one on that host, over a connection of its own each time, until it is told to end. While nobody listens
    it tries again; how long an answer took counts from the connecting."""
    loop, tally = Loop(port), Tally()
    asked = 0
    is_over = False

    def answered(connection: Connection, answer: Answer) -> None:
        answer.seconds = now() - connection.tag
        tally.add(answer)
        connection.close()
        finish()

    def lost(connection: Connection) -> None:
        tally.lost += connection.was_connected
        finish()

    def finish() -> None:
        if is_over and not loop.count():
            loop.stop()

    def ask() -> None:
        nonlocal asked
        if is_over:
            return
        asked += 1
        connection = loop.connect(answered, lost)
        connection.tag = now()
        connection.send(http_request("GET", "/v1/jobs", TOKEN) if asked % 2 else create(asked, host, "person"))
        loop.after(every, ask)

    def told() -> None:
        nonlocal is_over
        pipe.recv()
        is_over = True
        finish()

    loop.watch(pipe.fileno(), told)
    begun = now()
    ask()
    loop.run()
    return tally.told(now() - begun)


class Chunks:
    """Takes the chunks of a body apart (RFC 9112, 7.1)."""

    def __init__(self) -> None:
        self._data, self._left = b"", 0

    def feed(self, data: bytes) -> bytes:
        """What of the body has come; a chunk that is not whole yet gives what is there."""
        self._data += data
        found = []
        while self._data:
            if not self._left:
                line, ended, rest = self._data.lstrip(b"\r\n").partition(b"\r\n")
                if not ended:
                    break
                self._left, self._data = int(line, 16), rest
                if not self._left:
                    break
            part = self._data[: self._left]
            found.append(part)
            self._left -= len(part)
            self._data = self._data[len(part) :]
        return b"".join(found)


class Reader:
    """One reader of the stream: every line of every job in its order."""

    def __init__(self, loop: Loop, began: Callable[[], None], came: Callable[[int, list[float]], None]):
        self._chunks, self._text, self._next = Chunks(), b"", {}
        self._began: Callable[[], None] | None = began
        self._came = came
        self.mistakes = 0
        connection = loop.connect(self._refused, stream=self._take)
        connection.send(http_request("GET", "/v1/logs/stream?tail=0", TOKEN))

    @staticmethod
    def _refused(connection: Connection, answer: Answer) -> None:
        raise Wrong(f"a stream was answered {answer.status}: {answer.body.decode()}")

    def _take(self, connection: Connection, data: bytes) -> None:
        text, end, self._text = (self._text + self._chunks.feed(data)).rpartition(b"\n\n")
        if end and self._began:  # it is told at once where it begins
            self._began()
            self._began = None
        lines = LINE.findall(text)
        at, latencies = now(), []
        for job, number, sent in lines:
            if self._next.get(job, 0) != int(number):
                self.mistakes += 1
            self._next[job] = int(number) + 1
            latencies.append(at - int(sent) / 1e6)
        if lines:
            self._came(len(lines), latencies)


def readers(pipe: Any, port: int, count: int, jobs: list[tuple[str, str, int]], rate: int, seconds: float) -> dict[str, Any]:
    """So many readers of all jobs, while each job's log grows by 10 lines at a time, `rate` lines a second in all. Latency: from the
    sending of an upload to the arrival of each of its lines at each reader."""
    loop, tally = Loop(port), Tally()
    latencies: list[float] = []
    begun_readers = sent = arrived = 0
    per_call, every = 10, 10 * len(jobs) / rate

    def began() -> None:
        nonlocal begun_readers, deadline
        begun_readers += 1
        if begun_readers == count:
            deadline = now() + seconds
            pipe.send(("streaming", count))
            for number, connection in enumerate(uploaders):
                loop.after(every * number / len(jobs), lambda connection=connection: upload(connection))

    def came(lines: int, seconds: list[float]) -> None:
        nonlocal arrived
        arrived += lines
        latencies.extend(seconds)

    def look() -> None:
        """The end is there once every line is."""
        if now() >= deadline and arrived >= sent * count and not any(connection.is_busy for connection in uploaders):
            loop.stop()
        loop.after(0.02, look)

    def upload(connection: Connection) -> None:
        nonlocal sent
        number, offset, due = connection.tag
        if now() >= deadline:
            return
        if connection.is_busy:  # the one before is not taken yet
            loop.after(0.005, lambda: upload(connection))
            return
        job, token, attempt = jobs[number]
        clock = int(now() * 1e6)
        lines = [{"message": f"L{number} {offset + i} {clock} {'x' * 60}", "level": "info"} for i in range(per_call)]
        body = json.dumps({"attempt": attempt, "offset": offset, "lines": lines}).encode()
        connection.send(http_request("POST", f"/v1/jobs/{job}/logs", token, body))
        sent += per_call
        connection.tag = (number, offset + per_call, max(due + every, now()))
        loop.at(connection.tag[2], lambda: upload(connection))

    def uploaded(connection: Connection, answer: Answer) -> None:
        expect(answer, 200)
        tally.add(answer)

    uploaders = [loop.connect(uploaded) for _ in jobs]
    for number, connection in enumerate(uploaders):
        connection.tag = (number, 0, now())
    everyone = [Reader(loop, began, came) for _ in range(count)]
    deadline = float("inf")
    look()
    loop.after(seconds + 60.0, loop.stop)
    loop.run()
    return {
        "lines": sent,
        "arrived": arrived,
        "mistakes": sum(reader.mistakes for reader in everyone),
        "p50_ms": quantile(latencies, 0.5) * 1000,
        "p99_ms": quantile(latencies, 0.99) * 1000,
        "upload_p99_ms": quantile(tally.good, 0.99) * 1000,
    }
