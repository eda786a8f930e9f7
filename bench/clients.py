"""Many connections in one process: an epoll loop, and what the benchmark does with it.

Owns: sockets, framing of answers, timers. Ignores: what is asked and why.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import re
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from machine import LOCALHOST

LENGTH = re.compile(rb"\r\nContent-Length: *([0-9]+)", re.IGNORECASE)
RETRY_AFTER = re.compile(rb"\r\nRetry-After: *([0-9]+)", re.IGNORECASE)
now = time.monotonic


class Answer:
    """What came back: status, head, body, and how long it took from send to the last byte (s)."""

    __slots__ = ("body", "head", "seconds", "status")

    def __init__(self, status: int, head: bytes, body: bytes, seconds: float):
        self.status, self.head, self.body, self.seconds = status, head, body, seconds

    def retry_after(self) -> int | None:
        found = RETRY_AFTER.search(self.head)
        return int(found[1]) if found else None


class Connection:
    """One connection; at most one request is under way. `answered(connection, answer)` and `lost(connection)` are called by the
    loop; with `stream` set, everything behind the head goes there as it comes: `stream(connection, data)`."""

    def __init__(self, loop: Loop, answered: Callable[..., None], lost: Callable[..., None], stream: Any = None):
        self.loop, self.answered, self.lost, self.stream = loop, answered, lost, stream
        self.tag: Any = None  # the caller's
        self.sent = 0.0
        self.is_busy = False
        self._unsent, self._data, self._is_streaming = b"", b"", False
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = self.socket.connect_ex((LOCALHOST, loop.port))
        self.was_connected = code == 0
        loop.add(self)
        if code not in (0, errno.EINPROGRESS):
            loop.after(0.0, self.close_as_lost)

    def send(self, request: bytes) -> None:
        self.sent, self.is_busy = now(), True
        self._unsent += request
        self._flush()

    def _flush(self) -> None:
        if self.was_connected and self._unsent:
            try:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
            except BlockingIOError:
                pass
            except OSError:
                self.loop.after(0.0, self.close_as_lost)
                return
        self.loop.wants(self, bool(self._unsent) or not self.was_connected)

    @property
    def is_waiting(self) -> bool:
        """Its request is on its way, whole."""
        return self.is_busy and self.was_connected and not self._unsent

    def ready(self, events: int) -> None:
        if events & select.EPOLLOUT and not events & (select.EPOLLERR | select.EPOLLHUP):
            self.was_connected = True
            self._flush()
        if events & ~select.EPOLLOUT:
            self._receive()

    def _receive(self) -> None:
        try:
            data = self.socket.recv(256 * 1024)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close_as_lost()
        elif self._is_streaming:
            self.stream(self, data)
        else:
            self._data = self._data + data if self._data else data
            self._take()

    def _take(self) -> None:
        """One answer, where it is whole."""
        data = self._data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return
        status = int(data[9:12])
        if self.stream is not None and status == 200:
            self._is_streaming, self._data = True, b""
            self.stream(self, data[end + 4 :])
            return
        length = LENGTH.search(data, 0, end + 2)
        size = end + 4 + (int(length[1]) if length else 0)
        if len(data) >= size:
            self._data, self.is_busy = data[size:], False
            self.answered(self, Answer(status, data[: end + 2], data[end + 4 : size], now() - self.sent))

    def close(self) -> None:
        self.loop.remove(self)
        self.socket.close()

    def close_as_lost(self) -> None:
        if self.loop.has(self):
            self.close()
            self.lost(self)


class Loop:
    """All connections of one process to one port, and timers."""

    def __init__(self, port: int):
        self.port = port
        self.is_over = False
        self._epoll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self._watched: dict[int, Callable[[], None]] = {}
        self._masks: dict[int, int] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def connect(self, answered: Callable[..., None], lost: Callable[..., None] | None = None, stream: Any = None) -> Connection:
        return Connection(self, answered, lost or self._fail, stream)

    @staticmethod
    def _fail(connection: Connection) -> None:
        raise ConnectionError("the controller ended a connection")

    def add(self, connection: Connection) -> None:
        fd = connection.socket.fileno()
        self._connections[fd] = connection
        self._masks[fd] = select.EPOLLIN | select.EPOLLOUT
        self._epoll.register(fd, self._masks[fd])

    def wants(self, connection: Connection, write: bool) -> None:
        fd, mask = connection.socket.fileno(), select.EPOLLIN | (select.EPOLLOUT if write else 0)
        if self._masks.get(fd, mask) != mask:
            self._masks[fd] = mask
            self._epoll.modify(fd, mask)

    def count(self) -> int:
        """Connections that are open."""
        return len(self._connections)

    def has(self, connection: Connection) -> bool:
        return self._connections.get(connection.socket.fileno()) is connection

    def remove(self, connection: Connection) -> None:
        fd = connection.socket.fileno()
        if self._connections.pop(fd, None) is not None:
            del self._masks[fd]
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def watch(self, fd: int, do: Callable[[], None]) -> None:
        """`do()` whenever that descriptor can be read."""
        self._watched[fd] = do
        self._epoll.register(fd, select.EPOLLIN)

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        self.at(now() + seconds, do)

    def at(self, when: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (when, next(self._count), do))

    def stop(self) -> None:
        self.is_over = True

    def run(self, seconds: float = float("inf")) -> None:
        """Until stop() or for so long."""
        self.is_over, deadline = False, now() + seconds
        while not self.is_over and (left := deadline - now()) > 0:
            self._step(min(left, 60.0))

    def _step(self, patience: float) -> None:
        if self._timers:
            patience = min(patience, max(0.0, self._timers[0][0] - now()))
        for fd, events in self._epoll.poll(patience):
            if fd in self._watched:
                self._watched[fd]()
            elif fd in self._connections:
                self._connections[fd].ready(events)
        while self._timers and self._timers[0][0] <= now():
            heapq.heappop(self._timers)[2]()

    def close(self) -> None:
        for connection in list(self._connections.values()):
            connection.close()
        self._epoll.close()


def quantile(values: list[float], share: float) -> float:
    """The value that so large a share of the values does not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


# -- work ----------------------------------------------------------------------------------------------------------------


class Tally:
    """What a client saw: answers by status, seconds of each that was good, and connections that it lost."""

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.good: list[float] = []
        self.lost = 0
        self.unhelpful = 0  # 503 without Retry-After

    def add(self, answer: Answer) -> None:
        self.statuses[answer.status] = self.statuses.get(answer.status, 0) + 1
        if answer.status < 300:
            self.good.append(answer.seconds)
        elif answer.status == 503 and answer.retry_after() is None:
            self.unhelpful += 1

    def told(self, seconds: float) -> dict[str, Any]:
        good = len(self.good)
        return {
            "requests": good,
            "rate": good / seconds,
            "p50_ms": quantile(self.good, 0.5) * 1000,
            "p99_ms": quantile(self.good, 0.99) * 1000,
            "max_ms": max(self.good, default=0.0) * 1000,
            "statuses": self.statuses,
            "lost": self.lost,
            "unhelpful": self.unhelpful,
        }


def closed_loop(pipe: Any, port: int, requests: list[bytes], connections: int, seconds: float) -> dict[str, Any]:
    """As wrk does it: each connection sends the next request once it has its answer."""
    loop, tally, following = Loop(port), Tally(), itertools.cycle(requests)

    def answered(connection: Connection, answer: Answer) -> None:
        tally.add(answer)
        connection.send(next(following))

    begun = now()
    for _ in range(connections):
        loop.connect(answered).send(next(following))
    loop.run(seconds)
    return tally.told(now() - begun)


def paced(pipe: Any, port: int, requests: list[bytes], connections: int, rate: float, seconds: float) -> dict[str, Any]:
    """So many requests a second, whatever the answers take: one that finds no free connection waits, and its wait counts."""
    loop, tally, following = Loop(port), Tally(), itertools.cycle(requests)
    due: list[float] = []  # of requests that wait for a connection, oldest last
    idle: list[Connection] = []

    def give(connection: Connection, when: float) -> None:
        connection.send(next(following))
        connection.sent = when

    def answered(connection: Connection, answer: Answer) -> None:
        tally.add(answer)
        if due:
            give(connection, due.pop())
        else:
            idle.append(connection)

    def lost(connection: Connection) -> None:
        tally.lost += 1
        idle.append(loop.connect(answered, lost))

    begun, sent = now(), 0

    def tick() -> None:
        nonlocal sent
        while (when := begun + sent / rate) <= now():
            sent += 1
            if idle:
                give(idle.pop(), when)
            else:
                due.insert(0, when)
        loop.at(begun + sent / rate, tick)

    idle += [loop.connect(answered, lost) for _ in range(connections)]
    loop.after(0.0, tick)
    loop.run(seconds)
    return {**tally.told(now() - begun), "sent": sent, "unsent": len(due)}


def uploads(
    pipe: Any, port: int, jobs: list[tuple[str, str, int]], lines: int, size: int, seconds: float, most: float = float("inf")
) -> dict[str, Any]:
    """Log lines of running jobs, a connection each, as fast as they are taken, at most `most` of each. `jobs`: (id, token, attempt);
    `lines` a call, of `size` bytes each."""
    loop, tally = Loop(port), Tally()
    stamp = "2026-11-22T10:00:00.000Z"
    text = ",".join(f'["{i:06d} {"x" * (size - 7)}","info","{stamp}"]' for i in range(lines))
    stored = dict.fromkeys((job for job, _, _ in jobs), 0)

    def head_of(job: str, token: str) -> bytes:
        return (
            f"POST /v1/jobs/{job}/logs HTTP/1.1\r\nHost: {LOCALHOST}:{port}\r\nAccept-Encoding: identity\r\n"
            f"Content-Type: application/json\r\nUser-Agent: deploybot-agent/0.1.0\r\nAuthorization: Bearer {token}\r\n"
        ).encode()

    def send(connection: Connection) -> None:
        job, attempt, head = connection.tag
        body = f'{{"attempt": {attempt}, "offset": {stored[job]}, "lines": [{text}]}}'.encode()  # as agent.py writes it
        connection.send(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    def answered(connection: Connection, answer: Answer) -> None:
        tally.add(answer)
        if answer.status == 200:
            stored[connection.tag[0]] += lines
        if now() < deadline and stored[connection.tag[0]] < most:
            send(connection)
        elif not any(other.is_busy for other in everyone):
            loop.stop()

    begun = now()
    deadline = begun + seconds
    everyone = []
    for job, token, attempt in jobs:
        connection = loop.connect(answered)
        connection.tag = (job, attempt, head_of(job, token))
        everyone.append(connection)
        send(connection)
    loop.run(seconds + 30.0)
    took = now() - begun
    return {**tally.told(took), "lines": sum(stored.values()), "lines_per_s": sum(stored.values()) / took, "stored": stored}
