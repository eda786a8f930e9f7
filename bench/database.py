"""Large databases: rows as the controller itself wrote them, many times over, by bulk SQL.

Owns: templates, ids, secrets and names of hosts and jobs. Ignores the schema: a controller makes it, and one row of each kind.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import shutil
import sqlite3
import time
from collections.abc import Iterable
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


def ordered_id(milliseconds: int, number: int = 0) -> str:
    """A UUID of version 7 (RFC 9562), as the controller makes its ids."""
    time = f"{milliseconds:012x}"
    return f"{time[:8]}-{time[8:]}-7{number % 4096:03x}-8000-{number:012x}"


def sql_id(milliseconds: str) -> str:
    """The same in SQL, of row i."""
    time = f"printf('%012x', {milliseconds})"
    return f"substr({time}, 1, 8) || '-' || substr({time}, 9) || printf('-7%03x-8000-%012x', i % 4096, i)"


def sql_stamp(milliseconds: str) -> str:
    """RFC 3339, in SQL."""
    return f"strftime('%Y-%m-%dT%H:%M:%fZ', {milliseconds} / 1000.0, 'unixepoch')"


def sql_host(number: str) -> str:
    return f"printf('host-%05d.example.com', {number})"


def quoted(text: str) -> str:
    """A text as SQL."""
    return "'" + text.replace("'", "''") + "'"


def heartbeat(number: int, wait: int = 0, running: Iterable[tuple[str, int]] = ()) -> bytes:
    """The heartbeat of that host's agent, as agent.py sends it."""
    held = [{"job_id": job, "attempt": attempt} for job, attempt in running]
    body = {"status": "online", "running": held, "session": session_of(number), **({"wait": wait} if wait else {})}
    return http_request("POST", f"/v1/agents/{agent_id(number)}/heartbeat", secret_of(number), json.dumps(body).encode())


def app_of(host: int) -> str:
    """The app that is on that host."""
    return f"{APP}-{host // 100}" if host >= 100 else APP


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

    def add(self, db: sqlite3.Connection, first: int, end: int, where: str = "1", **changes: str) -> None:
        """A copy for each i from `first` on, before `end`, that fits. `changes`: column to SQL over i; those that the table does not
        have are left out."""
        selected = [f"({changes[name]})" if name in changes else "?" for name in self._names]
        kept = [value for name, value in zip(self._names, self.row, strict=True) if name not in changes]
        if first < end:
            numbers = f"WITH RECURSIVE n (i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {end - 1})"
            db.execute(f"INSERT INTO {self._table} {numbers} SELECT {', '.join(selected)} FROM n WHERE {where}", kept)


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
        last = self._now - size.age * DAY
        self._ended_at = f"({last} - ({size.ended} - i) * {size.days * DAY} / {size.ended or 1})"
        self._ended_id, self._host = sql_id(self._ended_at), sql_host(f"(i % {size.hosts})")
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
        self._add_agents()
        self._add_ended()
        self._add_pending()
        self._add_events()
        self._add_releases()
        self._db.execute("COMMIT")
        for sql in indexes:
            self._db.execute(sql)

    def _without_indexes(self) -> list[str]:
        """Drops the indexes that are not part of a table; the SQL that makes them again."""
        found = self._db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL").fetchall()
        for name, _ in found:
            self._db.execute(f'DROP INDEX "{name}"')
        return [sql for _, sql in found]

    def _add_agents(self) -> None:
        """Out of contact for a day, so that whoever is online has come since."""
        self._db.create_function("agent_id", 1, agent_id, deterministic=True)
        self._db.create_function("session_of", 1, session_of, deterministic=True)
        self._db.create_function("secret_digest", 1, lambda i: hashlib.sha256(secret_of(i).encode()).hexdigest())
        away = sql_stamp(str(self._now - DAY))
        self._agent.add(
            self._db,
            *(0, self._size.hosts),
            id="agent_id(i)",
            hostname=sql_host("i"),
            session="session_of(i)",
            token_sha256="secret_digest(i)",
            registered_at=away,
            last_heartbeat=away,
        )

    def _add_ended(self) -> None:
        """One in ten did not succeed."""
        at = sql_stamp(self._ended_at)
        columns = {
            "id": self._ended_id,
            "ref": "printf('release-%07d', i)",
            "host": self._host,
            "commit": "printf('%040x', i)",
            **dict.fromkeys(("created_at", "queued_at", "started_at", "completed_at"), at),
        }
        failed = {"status": "'failed'", "reason": "'exit_code'", "exit_code": "1"}
        self._ended.add(self._db, 0, self._size.ended, "i % 10 > 0", **columns)
        self._ended.add(self._db, 0, self._size.ended, "i % 10 = 0", **columns, **failed)

    def _add_pending(self) -> None:
        """Made within the last hour."""
        size = self._size
        at = f"({self._now} - ({size.pending} - i) * 3600000 / {size.pending or 1})"
        host = sql_host(f"({FREE_HOSTS} + i % {max(1, size.hosts - FREE_HOSTS)})")
        columns = {"id": sql_id(at), "ref": "printf('pending-%07d', i)", "host": host}
        self._pending.add(self._db, 0, size.pending, **columns, created_at=sql_stamp(at), queued_at=sql_stamp(at))

    def _add_events(self) -> None:
        """Positions go on from job to job; what names the job in the data names its copy."""
        old, first = self._ended, self._size.ended - self._size.logged
        start = self._events[0].value("position") - self._events[0].value("lines")
        per_job = self._events[-1].value("position") - start
        for event in self._events:
            position = f"((i - {first}) * {per_job} + {event.value('position') - start})"
            columns = {"position": position, "job_id": self._ended_id, "host": self._host}
            if isinstance(event.value("data"), str):
                named = f"replace({quoted(event.value('data'))}, {quoted(old.value('id'))}, {self._ended_id})"
                columns["data"] = f"replace({named}, {quoted(old.value('host'))}, {self._host})"
            event.add(self._db, first, self._size.ended, **columns)

    def _add_releases(self) -> None:
        """The last job of each host, where that succeeded."""
        size = self._size
        number = f"(i % {size.hosts})"
        app = f"CASE WHEN {number} < 100 THEN {quoted(APP)} ELSE {quoted(APP)} || '-' || {number} / 100 END"  # as app_of()
        columns = {"app": app, "host": self._host, "job_id": self._ended_id, "commit": "printf('%040x', i)"}
        at = sql_stamp(self._ended_at)
        self._release.add(self._db, max(0, size.ended - size.hosts), size.ended, "i % 10 > 0", **columns, deployed_at=at)


def ids_of(path: pathlib.Path, where: str, limit: int, order: str = "random()") -> list[str]:
    """Ids of some jobs of a database."""
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        return [row[0] for row in db.execute(f"SELECT id FROM jobs WHERE {where} ORDER BY {order} LIMIT ?", (limit,))]


def count(path: pathlib.Path, what: str, *values: Any) -> int:
    """`what` stands behind SELECT; read while the controller runs, and changes nothing."""
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=30.0)) as db:
        return int(db.execute(f"SELECT {what}", values).fetchone()[0] or 0)
