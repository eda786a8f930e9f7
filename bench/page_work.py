"""Measurements of what people and monitoring ask for on a large database, and of what happens beyond the limit.

Owns: pages, the plans of their SQL, overload. Ignores: agents.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import sqlite3
import sys
from typing import Any

from agents import person
from clients import paced
from database import FREE_HOSTS, app_of, apps_file, count, heartbeat, host_name
from http_work import FLEET, creates_of
from load import Load
from machine import HERE, TOKEN, Client, Controller, http_request, in_process
from setting import Setting

STATUSES = ("success", "failed", "pending")
BOUND = 1000.0  # milliseconds within which what is accepted is answered, however much comes
CROWD = 1000  # connections of a load beyond the limit
SCAN = re.compile(r"SCAN (jobs|events|audit)\b(?: AS \w+)?(?: USING (?:COVERING )?INDEX (\w+))?")


def pages(setting: Setting) -> None:
    """p99 of pages of 100 with very many jobs and hosts, and that no SQL behind them walks through a table."""
    size = setting.big()
    with setting.controller(size) as controller:
        asked = {name: paths_of(name, size.hosts) for name in ("jobs", "hosts", "apps", "metrics")}
        for name, paths in asked.items():
            page_of(setting, controller, name, paths)
    path = setting.databases.fresh(size)
    statements = statements_of(setting, path, size.hosts, [one for paths in asked.values() for one in paths[:9]])
    scans = scans_in(path, statements)
    setting.databases.remove(path)
    setting.check(len(statements) > 0, "no SQL of the pages was seen")
    more = {"scans": scans, "statements": len(statements)}
    setting.row("page_scans", "SQL of these pages that walks through a table", len(scans), "statements", at_most=0, detail=more)


def paths_of(name: str, hosts: int) -> list[str]:
    """What is asked: pages of 100 from all over the list, where the call has pages."""
    chosen = [host_name(number * hosts // 300) for number in range(300)]
    return {
        "jobs": [f"/v1/jobs?host={host}&status={STATUSES[number % 3]}&limit=100" for number, host in enumerate(chosen)],
        "hosts": [f"/v1/hosts?limit=100&after={host}" for host in chosen],
        "apps": [f"/v1/apps?limit=100&after={app_of(number * hosts // 300)}/{host}" for number, host in enumerate(chosen)],
        "metrics": ["/metrics"],
    }[name]


def page_of(setting: Setting, controller: Controller, name: str, paths: list[str]) -> None:
    requests = [http_request("GET", path, TOKEN) for path in paths]
    one, four = (setting.drive(controller.port, requests, connections) for connections in (1, 4))
    work = "GET " + re.sub(r"=(?!100\b)[^&]+", "=", paths[0])
    more = {"p99_ms_1": one.p99, "p99_ms_4": four.p99, "rate_1": one.rate, "rate_4": four.rate}
    setting.row(f"page_{name}", f"{work}, 1 and 4 connections, p99", max(one.p99, four.p99), "ms", at_most=50.0, detail=more)


def statements_of(setting: Setting, path: pathlib.Path, hosts: int, paths: list[str]) -> list[str]:
    """Every SQL statement that the controller executes while these are asked for."""
    file = path.with_suffix(".sql")
    program = Controller(setting.program, path, apps_file(setting.folder, hosts))
    program.run_by(sys.executable, HERE / "traced.py", file)
    with program as controller, contextlib.closing(Client(controller.port)) as client:
        before = file.stat().st_size
        for one in paths:
            client.call("GET", one)
        with open(file, "rb") as trace:
            trace.seek(before)
            return [json.loads(line) for line in trace]


def scans_in(path: pathlib.Path, statements: list[str]) -> list[str]:
    """Those of the statements whose plan walks through jobs, events or audit. What walks along an index of part of the rows (open
    jobs) is none, nor what stops at a LIMIT without having to leave out rows."""
    found = []
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        partial = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'index' AND sql LIKE '% WHERE %'")}
        for sql in dict.fromkeys(statements):
            if not sql.lstrip().upper().startswith(("SELECT", "WITH")):
                continue
            plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}")]
            walks = [match for match in map(SCAN.search, plan) if match and match[2] not in partial]
            stops = " LIMIT " in sql and " WHERE 1 ORDER BY" in sql
            found += [f"{match[0]}: {sql}" for match in walks if not stops]
    return found


# -- beyond the limit -------------------------------------------------------------------------------------------------------


def beyond(setting: Setting) -> None:
    """Twice as many heartbeats, then creates, as the controller can take, over very many connections."""
    beats = [heartbeat(number) for number in range(FREE_HOSTS, FLEET.hosts)]
    with setting.controller(FLEET) as controller:
        capacity = setting.drive(controller.port, beats, FREE_HOSTS).rate
        overload(setting, controller, "heartbeats", beats, capacity, beats[:FREE_HOSTS])
        prepared = setting.plenty()
        capacity = setting.drive(controller.port, creates_of(prepared, "capacity"), FREE_HOSTS).rate
        requests = creates_of(2 * prepared, "beyond")
        had = count(controller.db, "count(*) FROM jobs WHERE ref LIKE 'v-beyond-%'")
        load = overload(setting, controller, "creates", requests, capacity, creates_of(2000, "probe"))
        made = count(controller.db, "count(*) FROM jobs WHERE ref LIKE 'v-beyond-%'") - had
    good = load.requests - load.refused
    setting.check(made >= good, f"beyond the limit {good} creates were answered as made, {made} are in the database")


def overload(
    setting: Setting, controller: Controller, what: str, requests: list[bytes], capacity: float, probes: list[bytes]
) -> Load:
    """The load, and beside it a probe of the same calls and a person, who see how long an answer takes."""
    probing = in_process(paced, controller.port, probes, 16, 20.0, max(1.0, setting.seconds))
    asking = in_process(person, controller.port, 0.1, 0)
    load = setting.flood(controller.port, requests, CROWD if setting.judged else 64, 2 * capacity)
    probed = probing.result()
    asking.send("end")
    asked = asking.result()
    status, _ = Client(controller.port).call("GET", "/health")
    setting.check(status == 200, f"/health answered {status} after {what} beyond the limit")
    odd = probed["statuses"].keys() - {200, 201, 503}
    setting.check(not odd, f"{what} beyond the limit were answered {probed['statuses']}")
    setting.check(not probed["unhelpful"], f"{probed['unhelpful']} answers 503 had no Retry-After")
    accepted = (load.requests - load.refused) / max(load.requests, 1) * load.rate
    more = {
        "capacity": capacity,
        "asked_per_s": load.rate,
        "accepted_per_s": accepted,
        "refused": load.refused,
        "failed": load.failed,
    }
    work = f"{what} at twice the limit of {capacity:,.0f}/s"
    detail: dict[str, Any] = {**more, "probe": probed, "person": asked}
    setting.row(f"beyond_{what}_rate", f"{work}: accepted", accepted, "/s", yardstick=("capacity", [capacity]), detail=detail)
    setting.row(f"beyond_{what}_refused", f"{work}: refused with 503", load.rate - accepted, "/s")
    setting.row(f"beyond_{what}_p99", f"{work}: p99 of what is accepted", probed["p99_ms"], "ms", at_most=BOUND, detail=probed)
    setting.row(f"beyond_{what}_person", f"{work}: slowest answer to a person", asked["max_ms"], "ms", at_most=BOUND, detail=asked)
    return load
