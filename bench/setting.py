"""What all measurements share: how large, how long, which program, and the yardsticks.

Owns: the options of a run and its folder. Ignores: what is measured.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from database import Databases, Size, apps_file, heartbeat
from figures import Row
from load import Load, drive, flood, has_wrk
from machine import Controller, bare_server


class Scale(NamedTuple):
    """How much there is of everything."""

    seconds: float
    hosts: int = 10_000
    pending: int = 100_000
    ended: int = 1_000_000
    fleets: tuple[int, ...] = (100, 1000, 10_000)
    creates: int = 1000
    readers: int = 200
    log_lines: int = 1_000_000
    output: int = 1000  # MB of a script
    line_size: int = 1000  # bytes of its lines
    old_rows: int = 1_000_000
    listed: int = 20_000  # prepared requests of a list that is gone through again and again


SHORT = Scale(
    seconds=0.3,
    hosts=60,
    pending=400,
    ended=2000,
    fleets=(10, 30),
    creates=30,
    readers=10,
    log_lines=5000,
    output=2,
    old_rows=2000,
    listed=500,
)


class Setting:
    """One run of the benchmark."""

    def __init__(
        self, program: pathlib.Path, agent: pathlib.Path, folder: pathlib.Path, scale: Scale, judged: bool, descriptors: int
    ):
        self.program, self.agent, self.folder, self.scale, self.judged = program, agent, folder, scale, judged
        self.seconds, self.descriptors = scale.seconds, descriptors
        self.databases = Databases(program, folder)
        self.rows: list[Row] = []
        self.series: dict[str, Any] = {}
        self.wrong: list[str] = []
        self.begun = time.monotonic()
        self._commits = 0
        self.sqlite = 0.0  # rows a second, as measured last

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begun:6.1f} s  {text}", file=sys.stderr, flush=True)

    def row(self, name: str, work: str, value: float, unit: str, **more: Any) -> None:
        """A line of the table; the keywords are those of Row."""
        row = Row(name, work, value, unit, judged=self.judged, **more)
        self.rows.append(row)
        self.say("  ".join(cell for cell in (work, f"{value:,.2f} {unit}", row.target) if cell) + f"  {row.failed}".rstrip())

    def check(self, holds: bool, what: str) -> None:
        """What makes the run end with 1."""
        if not holds:
            self.wrong.append(what)
            self.say(f"WRONG: {what}")

    @contextlib.contextmanager
    def controller(self, size: Size, *flags: Any) -> Iterator[Controller]:
        """One that answers, on a database of that size, which goes with it."""
        path = self.databases.fresh(size)
        try:
            with Controller(self.program, path, apps_file(self.folder, size.hosts), *flags) as controller:
                yield controller
        finally:
            self.databases.remove(path)

    def big(self, **more: Any) -> Size:
        """The database of the targets: many hosts, jobs that wait, jobs that ended."""
        scale = self.scale
        logged = min(10_000, scale.ended)
        return Size(scale.hosts, scale.pending, scale.ended, logged)._replace(**more)

    def drive(self, port: int, requests: list[bytes], connections: int, own: bool = False) -> Load:
        """wrk has no fractions of a second, so the short form takes the client of ours."""
        return drive(port, requests, connections, self.seconds, self.folder, has_wrk() and self.seconds >= 1, own)

    def flood(self, port: int, requests: list[bytes], connections: int, rate: float) -> Load:
        """As drive(), at that many requests a second, of which some may be refused."""
        return flood(port, requests, connections, rate, max(1, round(self.seconds)), self.folder)

    @contextlib.contextmanager
    def bare(self) -> Iterator[int]:
        with bare_server(self.folder) as port:
            yield port

    def beside_bare(
        self, requests: list[bytes], connections: int, measure: Callable[[], Load], own: bool = False
    ) -> tuple[Load, tuple[str, list[float]]]:
        """What was measured, and the bare server with the same requests right before and after."""
        with self.bare() as port:
            before = self.drive(port, requests, connections, own).rate
            load = measure()
            after = self.drive(port, requests, connections, own).rate
        return load, ("bare server", [before, after])

    def commits(self) -> float:
        """The yardstick of SQLite: rows a second, one a commit, nothing beside it."""
        self._commits += 1
        self.sqlite = commits_per_second(self.folder / f"commits-{self._commits}.db", min(2.0, self.seconds / 2))
        return self.sqlite

    def some(self, steps: tuple[int, ...]) -> tuple[int, ...]:
        """All steps of a series; the first and the last of the short form."""
        return steps if self.judged else (steps[0], steps[-1])

    def plenty(self) -> int:
        """More requests that write than can be answered in the time of a measurement."""
        return int(self.seconds * (self.sqlite or self.commits()) * 4) + 1000

    def machine(self) -> dict[str, Any]:
        """The yardsticks, before all else."""
        beats = [heartbeat(number) for number in range(16)]
        with self.bare() as port:
            seconds = max(1, self.seconds)
            bare = {many: drive(port, beats, many, seconds, self.folder, has_wrk()).rate for many in (1, 16, 64)}
        return {
            "python": platform.python_version(),
            "sqlite": sqlite3.sqlite_version,
            "cores": len(os.sched_getaffinity(0)),
            "load_generator": "wrk" if has_wrk() else "a client of ours",
            "descriptors": self.descriptors,
            "folder": str(self.folder),
            "bare_requests_per_s": bare,
            "sqlite_commits_per_s": self.commits(),
        }


def commits_per_second(path: pathlib.Path, seconds: float) -> float:
    """WAL, synchronous=FULL, a row of 400 bytes with an integer key, each in a transaction of its own."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, text TEXT NOT NULL) STRICT")
        text, count, begun = "x" * 400, 0, time.monotonic()
        while (took := time.monotonic() - begun) < seconds:
            db.execute("INSERT INTO rows (text) VALUES (?)", (text,))
            count += 1
    for end in ("", "-wal", "-shm"):
        pathlib.Path(f"{path}{end}").unlink(missing_ok=True)
    return count / took
