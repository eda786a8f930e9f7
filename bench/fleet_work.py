"""Measurements of many agents and many readers at once.

Owns: the rows of the table about latency, memory and what happens under load. Ignores: single calls and large logs.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Iterator

from agents import claims, fleet, person, readers
from clients import paced, uploads
from database import FREE_HOSTS, Size, apps_file, count, heartbeat
from http_work import running_jobs
from machine import LOCALHOST, MIB, Controller, Task, Wrong, cpu_seconds, in_process, memory, unread, wait_for
from setting import Setting

PARK_LIMIT = 120.0  # seconds until a fleet must be parked
# By how many agents are parked: milliseconds from create to agent (p50, p99), MiB in all.
FLEET_TARGETS: dict[int, tuple[float | None, float | None, float | None]] = {1000: (2.5, 10.0, None), 10_000: (None, 25.0, 350.0)}
STOP_LIMIT = 15.0  # seconds: TimeoutStopSec of deploybot.service
BEATS = 400  # a second: those of 10,000 agents that each park for 25 s
FEW_BEATS = 100  # a second: those of a smaller fleet, beside a load that alone fills the machine


def is_all_parked(controller: Controller, task: Task, hosts: int) -> bool:
    """Each has sent its heartbeat, and the controller has read all there is."""
    task.send(("state", None))
    if task.receive("state") < hosts:
        return False
    connected, waiting = unread(controller.port)
    return connected >= hosts and waiting == 0


@contextlib.contextmanager
def parked(setting: Setting, controller: Controller, hosts: int, first: int = 0) -> Iterator[Task]:
    """A fleet of so many agents that wait for a job."""
    task = in_process(fleet, controller.port, setting.agent, first, hosts)
    try:
        wait_for(lambda: is_all_parked(controller, task, hosts), PARK_LIMIT, f"{hosts} parked agents", 0.2)
        yield task
        task.send(("end", None))
        seen = task.result()
        bad = {status: times for status, times in seen["statuses"].items() if status not in (200, 503)}
        setting.check(not bad, f"heartbeats of parked agents were answered {bad}")
    finally:
        task.end()


def reachable(setting: Setting) -> list[int]:
    """Sizes of fleets, as far as descriptors allow: an agent takes one in the controller, and one here."""
    return [min(hosts, setting.descriptors - 200) for hosts in setting.scale.fleets]


def fleets(setting: Setting) -> None:
    """From a create to the agent's socket, by how many agents are parked; and what they cost in memory."""
    resident, median, late = [], [], []
    for hosts in reachable(setting):
        with setting.controller(Size(hosts)) as controller, parked(setting, controller, hosts) as task:
            rss = memory(controller.pid)[0] / MIB
            task.send(("creates", setting.scale.creates))
            seen = task.receive("creates")
            peak = memory(controller.pid)[1] / MIB
        resident.append([hosts, rss])
        median.append([hosts, seen["p50_ms"]])
        late.append([hosts, seen["p99_ms"]])
        p50, p99, most = FLEET_TARGETS.get(hosts, (None, None, None))
        work = f"create to agent, {hosts:,} parked agents"
        setting.row(f"fleet_{hosts}_p50", f"{work}, p50", seen["p50_ms"], "ms", at_most=p50, detail=seen)
        setting.row(f"fleet_{hosts}_p99", f"{work}, p99", seen["p99_ms"], "ms", at_most=p99)
        more = {"resident_parked_mib": rss}
        setting.row(f"fleet_{hosts}_memory", f"resident at most, {hosts:,} parked agents", peak, "MiB", at_most=most, detail=more)
    setting.series |= {"memory_by_agents": resident, "latency_p50_by_agents": median, "latency_p99_by_agents": late}


def streams(setting: Setting) -> None:
    """Every line at every reader, and what that costs."""
    rate, hosts, count_of = 500, 10, setting.scale.readers
    seconds = max(1.0, 2 * setting.seconds)
    with setting.controller(Size(FREE_HOSTS)) as controller, contextlib.closing(controller.client()) as client:
        jobs = running_jobs(client, hosts)
        task = in_process(readers, controller.port, count_of, jobs, rate, seconds)
        task.receive("streaming")
        begun, before = time.monotonic(), cpu_seconds(controller.pid)
        seen = task.result()
        took, spent = time.monotonic() - begun, cpu_seconds(controller.pid) - before
    expected = seen["lines"] * count_of
    right = seen["arrived"] == expected and not seen["mistakes"]
    setting.check(right, f"{count_of} readers: {seen['arrived']} of {expected} lines arrived, {seen['mistakes']} out of order")
    work = f"{count_of} readers of the stream, {rate} lines/s"
    setting.row("streams_p99", f"{work}: upload to reader, p99", seen["p99_ms"], "ms", at_most=150.0, detail=seen)
    setting.row("streams_cpu", f"{work}: CPU of the controller", spent / took, "cores", at_most=1.0)


def claims_under_load(setting: Setting) -> None:
    """Heartbeats, and heartbeats that take a job, while 16 agents upload as fast as they can."""
    seconds = max(1.0, 2 * setting.seconds)
    with (
        setting.controller(Size(3 * FREE_HOSTS), "--log-limit", "100GiB") as controller,
        contextlib.closing(controller.client()) as client,
    ):
        jobs = running_jobs(client, FREE_HOSTS)
        beats = [heartbeat(number) for number in range(FREE_HOSTS, 2 * FREE_HOSTS)]
        loading = in_process(uploads, controller.port, jobs, 100, 80, seconds)
        claiming = in_process(claims, controller.port, list(range(2 * FREE_HOSTS, 2 * FREE_HOSTS + 8)), seconds)
        beating = in_process(paced, controller.port, beats, FREE_HOSTS, FEW_BEATS, seconds)
        beaten, claimed, loaded = beating.result(), claiming.result(), loading.result()
    setting.check(beaten["statuses"].keys() <= {200}, f"heartbeats were answered {beaten['statuses']}")
    work = "while 16 agents upload as fast as they can"
    more = {"lines_per_s": loaded["lines_per_s"], "claims_per_s": claimed["rate"], "p50_ms": claimed["p50_ms"]}
    setting.row("claims_p99", f"heartbeat that takes a job, {work}, p99", claimed["p99_ms"], "ms", at_most=50.0, detail=more)
    setting.row("claims_beat_p99", f"heartbeat, {work}, p99", beaten["p99_ms"], "ms", at_most=50.0, detail=beaten)


# -- after a restart -----------------------------------------------------------------------------------------------------


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOCALHOST, port)) == 0


def restarts(setting: Setting) -> None:
    """All agents come back to a controller that was stopped, or killed, while a person goes on asking."""
    hosts = reachable(setting)[-1]
    with setting.controller(Size(hosts + 1)) as controller, parked(setting, controller, hosts) as task:
        for word, number in (("stop", signal.SIGTERM), ("kill", signal.SIGKILL)):
            took, by_itself = end(controller, number)
            if number == signal.SIGTERM:
                failed = "" if by_itself else "it had to be killed"
                setting.row("restart_end", f"stop with {hosts:,} agents", took, "s", at_most=STOP_LIMIT, failed=failed)
            back, seen = restart(setting, controller, task, hosts)
            work = f"{hosts:,} agents after a {word} and a start"
            setting.row(f"restart_{word}", f"{work}: all are back", back, "s", at_most=30.0)
            slowest = seen["max_ms"] / 1000
            setting.row(f"restart_{word}_person", f"{work}: slowest answer to a person", slowest, "s", at_most=1.0, detail=seen)
            shed = seen["statuses"].get(503, 0)
            setting.row(f"restart_{word}_shed", f"{work}: 503 to a person", shed, "answers", at_most=0)


def end(controller: Controller, number: int) -> tuple[float, bool]:
    """Ends it by that signal, and as systemd does it where it does not end in time: (seconds, whether it ended by itself)."""
    begun = time.monotonic()
    controller.process.signal(number)
    try:
        wait_for(controller.process.is_over, STOP_LIMIT, "the end of a controller")
        return time.monotonic() - begun, True
    except Wrong:
        return time.monotonic() - begun, False
    finally:
        controller.process.kill()


def restart(setting: Setting, controller: Controller, task: Task, hosts: int) -> tuple[float, dict[str, object]]:
    """A start: (seconds from listening until all are parked again, what a person saw)."""
    asking = in_process(person, controller.port, 0.1, hosts)
    controller.begin()
    wait_for(lambda: listens(controller.port), PARK_LIMIT, "a controller that listens", 0.005)
    begun = time.monotonic()
    wait_for(lambda: is_all_parked(controller, task, hosts), PARK_LIMIT, f"{hosts} agents that are back", 0.25)
    back = time.monotonic() - begun
    asking.send("end")
    seen = asking.result()
    bad = {status: times for status, times in seen["statuses"].items() if status not in (200, 201, 503)}
    setting.check(not bad and not seen["lost"], f"a person was answered {bad} after a restart, {seen['lost']} calls were lost")
    return back, seen


# -- retention -----------------------------------------------------------------------------------------------------------


def retention(setting: Setting) -> None:
    """Old jobs and their events go by themselves, in slices, while heartbeats are answered."""
    jobs = setting.scale.old_rows // 5  # a job, its three changes and its log
    hosts = min(1000, setting.scale.hosts)
    size = Size(hosts, ended=jobs, logged=jobs, days=30, age=100)
    seconds = 10 * setting.seconds
    path = setting.databases.fresh(size)
    left = "(SELECT count(*) FROM jobs) + (SELECT count(*) FROM events)"
    rows = count(path, left)
    beats = [heartbeat(number) for number in range(FREE_HOSTS)]
    with Controller(setting.program, path, apps_file(setting.folder, hosts)) as controller:
        begun = time.monotonic()
        beating = in_process(paced, controller.port, beats, FREE_HOSTS, BEATS, seconds)
        largest, steps, last = watch_slices(controller, begun + seconds)
        beaten = beating.result()
        took, removed = last - begun, rows - count(path, left)
    setting.databases.remove(path)
    setting.check(beaten["statuses"].keys() <= {200}, f"heartbeats were answered {beaten['statuses']}")
    setting.check(removed > 0, "retention removed nothing")
    more = {"rows": rows, "removed": removed, "largest_step_positions": largest, "steps": steps, "seconds": took, "beats": beaten}
    work = f"retention of {rows:,} old rows"
    setting.row("retention_p99", f"{work}: heartbeat p99 meanwhile", beaten["p99_ms"], "ms", at_most=50.0, detail=more)
    setting.row("retention_rate", f"{work}: removed", removed / took, "rows/s")
    setting.row("retention_slices", f"{work}: steps seen", steps, "steps", failed="" if steps > 1 else "not in slices")


def watch_slices(controller: Controller, until: float) -> tuple[int, int, float]:
    """(the largest, how many, when the last one came) of the steps in which the oldest position moved on, as far as a look each 5 ms
    sees them."""
    largest = steps = 0
    oldest, moved = count(controller.db, "min(position) FROM events"), time.monotonic()
    while time.monotonic() < until:
        found = count(controller.db, "min(position) FROM events")
        if found != oldest:
            largest, steps, oldest, moved = max(largest, found - oldest), steps + 1, found, time.monotonic()
        time.sleep(0.005)
    return largest, steps, moved
