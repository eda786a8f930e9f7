"""Measurements of size: starting, memory, disk, long logs, and how cost grows.

Owns: the rows of the table about how much there is, and the series of the plots. Ignores: latency between agents and controller.
"""

from __future__ import annotations

import contextlib
import pathlib
import statistics
import time

from clients import uploads
from database import FREE_HOSTS, Size, apps_file, heartbeat
from fleet_work import parked, reachable
from http_work import FLEET, creates_of, running_jobs
from machine import MIB, Client, Controller, forget_peak, in_process, memory
from setting import Setting

SETTLE = 2.0  # seconds after a start at which memory is looked at once more: what it reads at start has been read


# -- start -----------------------------------------------------------------------------------------------------------------


def start_once(setting: Setting, path: pathlib.Path, hosts: int, as_script: bool = False) -> tuple[float, float]:
    """(milliseconds until /health answers, MiB resident then or a little later) of one start on that database."""
    controller = Controller(setting.program, path, apps_file(setting.folder, hosts), as_script=as_script)
    begun = controller.begin()
    with controller:
        took = controller.wait_until_healthy() - begun
        soon = memory(controller.pid)[0]
        time.sleep(SETTLE if setting.judged else 0.0)
        return took * 1000, max(soon, memory(controller.pid)[0]) / MIB


def starts(setting: Setting) -> None:
    """Until the port answers /health, and what is resident then. With an empty database: as a module, as the unit starts it, and
    as a script, which has no bytecode to read."""
    times = 5 if setting.judged else 1
    empty = [start_once(setting, setting.databases.empty(), 2) for _ in range(times)]
    script = [start_once(setting, setting.databases.empty(), 2, as_script=True) for _ in range(times)]
    first = [milliseconds for milliseconds, _ in empty]
    setting.row("start_empty", "start, empty database", statistics.median(first), "ms", at_most=150.0, detail={"all": first})
    setting.row("start_script", "start, empty database, as a script", statistics.median(took for took, _ in script), "ms")
    resident = statistics.median(mib for _, mib in empty)
    setting.row("idle_memory", "resident, idle", resident, "MiB", at_most=30.0)
    size = setting.big()
    path = setting.databases.fresh(size)
    took, resident = zip(*(start_once(setting, path, size.hosts) for _ in range(min(3, times))), strict=True)
    setting.databases.remove(path)
    work = f"start, {size.pending:,} pending, {size.ended:,} ended"
    setting.row("start_big", work, statistics.median(took), "ms", at_most=800.0, detail={"all": took})
    setting.row("start_big_memory", f"{work}: resident", max(resident), "MiB", at_most=80.0)


# -- one long log ------------------------------------------------------------------------------------------------------------


def by_pages(client: Client, job: str) -> tuple[int, float]:
    """(lines, seconds to the first)."""
    begun, first, lines, after = time.monotonic(), 0.0, 0, 0
    while after is not None:
        page = client.ok("GET", f"/v1/jobs/{job}/logs?after={after}&limit=1000")
        first = first or time.monotonic() - begun
        lines, after = lines + len(page["lines"]), page["next"]
    return lines, first


def as_text(client: Client, job: str) -> tuple[int, float]:
    return counted(client, f"/v1/jobs/{job}/logs", b"\n", Accept="text/plain")


def by_stream(client: Client, job: str, tail: int | None = None) -> tuple[int, float]:
    """From its start, or the last so many."""
    path = f"/v1/logs/stream?job_id={job}"
    if tail is not None:
        return counted(client, f"{path}&tail={tail}", b"event: log\n")
    answer = client.raw("GET", f"{path}&tail=0")
    epoch = answer.read(64).partition(b"id: ")[2].partition(b"-")[0].decode()
    client.close()  # the rest of that stream is not read
    return counted(client, path, b"event: log\n", Last_Event_ID=f"{epoch}-0")


def counted(client: Client, path: str, what: bytes, **headers: str) -> tuple[int, float]:
    """(how often that stands in the body, seconds to the first)."""
    begun, first, found, rest = time.monotonic(), 0.0, 0, b""
    answer = client.raw("GET", path, **{name.replace("_", "-"): value for name, value in headers.items()})
    while data := answer.read1(256 * 1024):
        data = rest + data
        found += data.count(what)
        rest = data[len(data) - len(what) + 1 :]
        if found and not first:
            first = time.monotonic() - begun
    return found, first


def long_log(setting: Setting) -> None:
    """One job with very many lines, read in each way: what the controller holds of it, and when the first line comes."""
    lines = setting.scale.log_lines
    flags = ("--log-limit", "100GiB")
    with setting.controller(Size(2), *flags) as controller, contextlib.closing(Client(controller.port)) as client:
        jobs = running_jobs(client, 1)
        in_process(uploads, controller.port, jobs, 1000, 80, 600.0, lines).result(600.0)
        job, token, attempt = jobs[0]
        with contextlib.closing(Client(controller.port, token)) as agent:
            agent.ok("POST", f"/v1/jobs/{job}/result", {"attempt": attempt, "status": "success"})
        tail = 50
        ways = {
            "pages": (lambda: by_pages(client, job), lines),
            "text": (lambda: as_text(client, job), lines),
            "stream": (lambda: by_stream(client, job), lines),
            "tail": (lambda: by_stream(client, job, tail), tail),
        }
        for name, (read, expected) in ways.items():
            before, begun = forget_peak(controller.pid), time.monotonic()
            found, first = read()
            took, grown = time.monotonic() - begun, (memory(controller.pid)[1] - before) / MIB
            setting.check(found == expected, f"a log of {lines} lines by {name}: {found} of {expected} came")
            work = f"a log of {lines:,} lines, by {name}"
            more = {"seconds": took, "lines_per_s": found / took}
            setting.row(f"long_log_{name}_memory", f"{work}: memory up by", grown, "MiB", at_most=20.0, detail=more)
            setting.row(f"long_log_{name}_first", f"{work}: first line", first * 1000, "ms", at_most=50.0)


# -- disk ----------------------------------------------------------------------------------------------------------------------


def disk(setting: Setting) -> None:
    """Bytes of the database for each ended job with its log."""
    jobs, lines = (300 if setting.judged else 20), 100
    path = setting.databases.fresh(Size(2))
    apps = apps_file(setting.folder, 2)
    with Controller(setting.program, path, apps):
        pass  # what a start writes is not the jobs'
    before = path.stat().st_size
    with Controller(setting.program, path, apps) as controller, contextlib.closing(Client(controller.port)) as client:
        for number in range(jobs):
            [(job, _, attempt)] = running_jobs(client, 1, run=f"disk-{number}")
            sent = [{"message": f"{line:06d} {'x' * 73}", "level": "info"} for line in range(lines)]
            client.ok("POST", f"/v1/jobs/{job}/logs", {"attempt": attempt, "offset": 0, "lines": sent})
            client.ok("POST", f"/v1/jobs/{job}/result", {"attempt": attempt, "status": "success", "commit": "c" * 40})
    grown = (path.stat().st_size - before) / jobs / 1024
    setting.row("disk", f"database for each ended job with {lines} log lines of 80 bytes", grown, "KiB")
    setting.databases.remove(path)


# -- growth --------------------------------------------------------------------------------------------------------------------


def rates(setting: Setting, controller: Controller, first: int = 0) -> tuple[float, float]:
    """Heartbeats and creates a second; the jobs are for hosts from that one on."""
    beats = [heartbeat(number) for number in range(FREE_HOSTS)]
    beaten = setting.drive(controller.port, beats, FREE_HOSTS).rate
    requests = creates_of(setting.plenty(), "growth", first)
    return beaten, setting.drive(controller.port, requests, FREE_HOSTS).rate


def growth(setting: Setting) -> None:
    """How rates change with what there is: the series of the plots."""
    scale = setting.scale
    plain = Size(max(scale.hosts, FLEET.hosts))
    pending = [
        plain._replace(pending=number) for number in setting.some((scale.pending // 100, scale.pending // 10, scale.pending))
    ]
    ended = [plain._replace(ended=number) for number in setting.some((0, scale.ended // 10, scale.ended))]
    for name, sizes in (("pending", pending), ("ended", ended)):
        points = []
        for size in sizes:
            with setting.controller(size) as controller:
                points.append((getattr(size, name), *rates(setting, controller)))
        keep(setting, name, points)
    points = []
    for hosts in reachable(setting):
        first = FREE_HOSTS + hosts
        with setting.controller(Size(first + FLEET.hosts)) as controller, parked(setting, controller, hosts, FREE_HOSTS):
            points.append((hosts, *rates(setting, controller, first)))
    keep(setting, "agents", points)
    lines_by_call(setting)


def keep(setting: Setting, name: str, points: list[tuple[int, float, float]]) -> None:
    setting.series[f"heartbeats_by_{name}"] = [[number, beaten] for number, beaten, _ in points]
    setting.series[f"creates_by_{name}"] = [[number, made] for number, _, made in points]
    shown = ", ".join(f"{number:,}: {beaten:,.0f} and {made:,.0f}" for number, beaten, made in points)
    setting.say(f"heartbeats and creates a second by {name}: {shown}")


def lines_by_call(setting: Setting) -> None:
    """Log lines a second by how many come in one call."""
    points = []
    for lines in setting.some((1, 10, 100, 1000)):
        flags = ("--log-limit", "100GiB")
        with setting.controller(Size(FREE_HOSTS), *flags) as controller, contextlib.closing(Client(controller.port)) as client:
            jobs = running_jobs(client, FREE_HOSTS)
            seen = in_process(uploads, controller.port, jobs, lines, 80, setting.seconds).result()
        points.append([lines, seen["lines_per_s"]])
    setting.series["lines_by_call"] = points
    setting.say("log lines a second by lines a call: " + ", ".join(f"{lines:,}: {rate:,.0f}" for lines, rate in points))
