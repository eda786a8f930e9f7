"""Large databases: rows as the controller itself wrote them, many times over, by bulk SQL.

Owns: templates, ids, secrets and names of hosts and jobs. Ignores the schema: a controller makes it, and one row of each kind.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import pathlib
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from machine import Client, Controller, Wrong, http_request

REPO, APP = "myorg/bench", "bench"
PUSHED = 100  # apps that pushes are for, each on two hosts of its own
DAY = 86_400_000  # milliseconds
HOST = "host-{:05d}.example.com"
LOG_LINES = 100  # of the job whose events are the template


def host_name(number: int) -> str:
    return HOST.format(number)


def secret_of(number: int) -> str:
    return f"dbt_bench_secret_of_host_{number:05d}"


def agent_id(number: int) -> str:
    return ordered_id(1_700_000_000_000 + number)


def session_of(number: int) -> str:
    return f"{number:032x}"


def ordered_id(milliseconds: int, count: int = 0, low: int = 0) -> str:
    """A UUID of version 7 (RFC 9562), as the controller makes its ids."""
    text = f"{milliseconds:012x}7{count:03x}{(2 << 62) | low:016x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def stamp(milliseconds: int) -> str:
    moment = datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC)
    return moment.isoformat(timespec="milliseconds")[:-6] + "Z"


def heartbeat(number: int, wait: int = 0, running: Iterable[tuple[str, int]] = ()) -> bytes:
    """The heartbeat of that host's agent, as agent.py sends it."""
    held = [{"job_id": job, "attempt": attempt} for job, attempt in running]
    body = {"status": "online", "running": held, "session": session_of(number), **({"wait": wait} if wait else {})}
    return http_request("POST", f"/v1/agents/{agent_id(number)}/heartbeat", secret_of(number), json.dumps(body).encode())


def apps_file(folder: pathlib.Path, hosts: int) -> pathlib.Path:
    """An apps.yaml (as JSON): apps on 100 hosts each, until all hosts have one, and PUSHED ones on two each."""
    apps: list[dict[str, Any]] = []
    for first in range(0, hosts, 100):
        some = [host_name(number) for number in range(first, min(first + 100, hosts))]
        more = f"-{first // 100}" if first else ""
        apps.append({"name": APP + more, "repo": REPO + more, "hosts": some})
    for number in range(PUSHED):
        pair = [host_name(2 * number), host_name(2 * number + 1)]
        apps.append({"name": f"pushed-{number}", "repo": f"myorg/pushed-{number}", "hosts": pair, "deploy_on_push": True})
    path = folder / f"apps-{hosts}.yaml"
    path.write_text(json.dumps({"apps": apps}))
    return path


class Size(NamedTuple):
    """What a database holds. `ended` jobs are spread over `days` days before `age` days ago; of the newest `logged` of them
    there are events: one a change, and one log of 100 lines. Host 0 to 15 have no pending job."""

    hosts: int = 16
    pending: int = 0
    ended: int = 0
    logged: int = 0
    days: int = 80
    age: int = 1


FREE_HOSTS = 16  # hosts without a pending job, whose heartbeats bring none


class Template:
    """One row of a table, of which copies with other values in some columns are made."""

    def __init__(self, db: sqlite3.Connection, table: str, where: str, *values: Any):
        cursor = db.execute(f"SELECT * FROM {table} WHERE {where} LIMIT 1", values)
        self._table, self._names = table, [column[0] for column in cursor.description]
        self.row = cursor.fetchone()
        if self.row is None:
            raise Wrong(f"the controller wrote no row into {table} where {where}")

    def value(self, name: str) -> Any:
        return self.row[self._names.index(name)]

    def add(self, db: sqlite3.Connection, changes: Iterable[dict[str, Any]]) -> None:
        """A copy for each; each names the same columns, and those that the table does not have are left out."""
        index = {name: i for i, name in enumerate(self._names)}

        def rows() -> Iterator[list[Any]]:
            for change in changes:
                row = list(self.row)
                for name, value in change.items():
                    if name in index:
                        row[index[name]] = value
                yield row

        marks = ", ".join("?" * len(self._names))
        db.executemany(f"INSERT INTO {self._table} VALUES ({marks})", rows())


class Databases:
    """Makes databases in a folder. The seed is one that a controller made, with one job of each state."""

    def __init__(self, program: pathlib.Path, folder: pathlib.Path):
        self._program, self._folder = program, folder
        self._made: dict[Size, pathlib.Path] = {}
        self._count = 0
        self._seed: pathlib.Path | None = None

    def fresh(self, size: Size) -> pathlib.Path:
        """A database of that size for one controller: a copy, where it is wanted more than once."""
        kept = self._made.get(size)
        if kept is None:
            kept = self._made[size] = self._build(size)
        self._count += 1
        path = self._folder / f"run-{self._count}" / "deploybot.db"
        path.parent.mkdir()
        shutil.copyfile(kept, path)
        return path

    def empty(self) -> pathlib.Path:
        """Where a database is yet to be made."""
        self._count += 1
        path = self._folder / f"run-{self._count}" / "deploybot.db"
        path.parent.mkdir()
        return path

    def remove(self, path: pathlib.Path) -> None:
        """A copy that is not needed any more: large ones would fill the disk."""
        shutil.rmtree(path.parent, ignore_errors=True)

    def seed(self) -> pathlib.Path:
        if self._seed is None:
            path = self.empty()
            with Controller(self._program, path, apps_file(self._folder, 2)) as controller:
                self._live(controller)
            self._seed = path
        return self._seed

    @staticmethod
    def _live(controller: Controller) -> None:
        """One agent, a job that waits and one that succeeded with a log of LOG_LINES lines."""
        with contextlib.closing(controller.client()) as admin, contextlib.closing(Client(controller.port)) as agent:
            registered = agent.ok("POST", "/v1/agents/register", {"hostname": host_name(0)})
            for ref in ("ended", "pending"):
                job = admin.ok("POST", "/v1/jobs", {"repo": REPO, "ref": ref, "host": host_name(0), "app": APP})["job"]
                if ref == "ended":
                    beat = {"status": "online", "session": registered["session"], "running": []}
                    taken = agent.ok("POST", f"/v1/agents/{registered['id']}/heartbeat", beat)["job"]
                    lines = [{"message": f"{number:04d} {'x' * 75}"} for number in range(LOG_LINES)]
                    agent.ok("POST", f"/v1/jobs/{job['id']}/logs", {"attempt": taken["attempt"], "offset": 0, "lines": lines})
                    result = {"attempt": taken["attempt"], "status": "success", "exit_code": 0, "commit": "c" * 40}
                    agent.ok("POST", f"/v1/jobs/{job['id']}/result", result)

    def _build(self, size: Size) -> pathlib.Path:
        path = self._folder / f"size-{len(self._made)}.db"
        shutil.copyfile(self.seed(), path)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = OFF")
            db.execute("PRAGMA synchronous = OFF")
            db.execute("PRAGMA cache_size = -400000")
            Filler(db, size).fill()
            db.execute("PRAGMA journal_mode = WAL")
        return path


class Filler:
    """Fills one database that holds the seed."""

    def __init__(self, db: sqlite3.Connection, size: Size):
        self._db, self._size = db, size
        self._now = int(time.time() * 1000)
        self._agent = Template(db, "agents", "1")
        self._ended = Template(db, "jobs", "status = 'success'")
        self._pending = Template(db, "jobs", "status = 'pending'")
        self._release = Template(db, "releases", "1")
        job = self._ended.value("id")
        rows = db.execute("SELECT position FROM events WHERE job_id = ? ORDER BY position", (job,)).fetchall()
        self._events = [Template(db, "events", "position = ?", position) for (position,) in rows]

    def fill(self) -> None:
        indexes = self._without_indexes()
        self._db.execute("BEGIN")
        for table in ("agents", "jobs", "events", "releases", "audit"):
            self._db.execute(f"DELETE FROM {table}")
        self._agent.add(self._db, self._agents())
        self._ended.add(self._db, self._ended_jobs())
        self._pending.add(self._db, self._pending_jobs())
        self._add_events()
        self._release.add(self._db, self._releases())
        self._db.execute("COMMIT")
        for sql in indexes:
            self._db.execute(sql)

    def _without_indexes(self) -> list[str]:
        """Drops the indexes that are not part of a table; the SQL that makes them again."""
        found = self._db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL").fetchall()
        for name, _ in found:
            self._db.execute(f'DROP INDEX "{name}"')
        return [sql for _, sql in found]

    def _agents(self) -> Iterator[dict[str, Any]]:
        """Out of contact for a day, so that whoever is online has come since."""
        away = stamp(self._now - DAY)
        for number in range(self._size.hosts):
            yield {
                "id": agent_id(number),
                "hostname": host_name(number),
                "session": session_of(number),
                "token_sha256": hashlib.sha256(secret_of(number).encode()).hexdigest(),
                "registered_at": away,
                "last_heartbeat": away,
            }

    def _ended_at(self, number: int) -> int:
        """Milliseconds at which that ended job was made, oldest first."""
        size = self._size
        return self._now - size.age * DAY - (size.ended - number) * size.days * DAY // size.ended

    def _ended_id(self, number: int) -> str:
        return ordered_id(self._ended_at(number), number % 4096, number)

    def _ended_jobs(self) -> Iterator[dict[str, Any]]:
        """One in ten did not succeed."""
        for number in range(self._size.ended):
            at, host = stamp(self._ended_at(number)), number % self._size.hosts
            failed = {"status": "failed", "reason": "exit_code", "exit_code": 1}
            yield {
                **(failed if number % 10 == 0 else {"status": "success", "reason": None, "exit_code": 0}),
                "id": self._ended_id(number),
                "ref": f"release-{number:07d}",
                "host": host_name(host),
                "created_at": at,
                "queued_at": at,
                "started_at": at,
                "completed_at": at,
                "assigned_agent": agent_id(host),
                "session": session_of(host),
                "commit": f"{number:040x}",
            }

    def _pending_jobs(self) -> Iterator[dict[str, Any]]:
        """Made within the last hour."""
        size = self._size
        for number in range(size.pending):
            at = self._now - (size.pending - number) * 3_600_000 // size.pending
            host = FREE_HOSTS + number % max(1, size.hosts - FREE_HOSTS)
            yield {
                "id": ordered_id(at, number % 4096, number),
                "ref": f"pending-{number:07d}",
                "host": host_name(host),
                "created_at": stamp(at),
                "queued_at": stamp(at),
            }

    def _add_events(self) -> None:
        old = {name: self._ended.value(name) for name in ("id", "host", "ref")}
        per_job = sum(event.value("lines") for event in self._events)
        first = self._size.ended - self._size.logged
        for event in self._events:
            offset = event.value("position") - self._events[0].value("position")
            text = event.value("data")
            names = [name for name in old if isinstance(text, str) and old[name] in text]
            event.add(self._db, self._copies(text, names, old, offset + 1 - first * per_job, per_job, first))

    def _copies(
        self, text: Any, names: list[str], old: dict[str, str], start: int, per_job: int, first: int
    ) -> Iterator[dict[str, Any]]:
        for number in range(first, self._size.ended):
            new = {"id": self._ended_id(number), "host": host_name(number % self._size.hosts), "ref": f"release-{number:07d}"}
            data = text
            for name in names:
                data = data.replace(old[name], new[name])
            position = start + number * per_job + self._events[0].value("lines") - 1
            yield {"position": position, "job_id": new["id"], "host": new["host"], "data": data}

    def _releases(self) -> Iterator[dict[str, Any]]:
        """The last success of each host, as far as there are so many."""
        last: dict[int, int] = {}
        for number in range(self._size.ended - 1, max(-1, self._size.ended - 2 * self._size.hosts - 1), -1):
            if number % 10:
                last.setdefault(number % self._size.hosts, number)
        for host, number in last.items():
            yield {
                "host": host_name(host),
                "job_id": self._ended_id(number),
                "commit": f"{number:040x}",
                "deployed_at": stamp(self._ended_at(number)),
            }


def ids_of(path: pathlib.Path, where: str, limit: int, order: str = "random()") -> list[str]:
    """Ids of some jobs of a database."""
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        return [row[0] for row in db.execute(f"SELECT id FROM jobs WHERE {where} ORDER BY {order} LIMIT ?", (limit,))]


def count(path: pathlib.Path, what: str, *values: Any) -> int:
    """`what` stands behind SELECT; read while the controller runs, and changes nothing."""
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=30.0)) as db:
        return int(db.execute(f"SELECT {what}", values).fetchone()[0] or 0)
