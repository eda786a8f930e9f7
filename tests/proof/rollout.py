"""Deployments (docs/design.md) under whatever a seed thinks of: strategies, locks, pushes, rollbacks, lost agents, full disks, crashes.

Random steps of people, GitHub, a CI and agents against a controller in this process (common.Subject): two apps on five hosts, a clock
that stands still, and apps.yaml that changes under it. Some calls meet a full disk or a crash at a statement, the COMMIT above all; some
share one COMMIT. After each step the whole database, the events, the queue and the memory are held against what must always be true
of them (RULES), and each change against what was there before. A life ends when agents have worked everything off.

    .venv/bin/python tests/proof/rollout.py [--seed N] [--full] [--lives N] [--steps N]
"""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import pathlib
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import common
from common import AT_COMMIT, TOKEN, Answer, Crash, Failure, Proof, Subject, check, run

sys.path.insert(0, str(common.ROOT / "tests"))

from conftest import FakeClock

import deploybot

SHORT, FULL = (10, 100), (2000, 200)  # lives, steps of each
ROUNDS = 4  # of as many lives each, until each kind of event has come
HOSTS = ("canary-1", "db-01", "web-01", "web-02", "web-03")
BRANCHES, ENROLMENT, SECRET = ("main", "dev"), "dbt_enrol", "a webhook secret"
LOST_AFTER, EXPIRY, DAY = 600, 5 * 3600, 86400
SETTINGS = {
    "token": TOKEN, "agent_token": ENROLMENT, "webhook_secret": SECRET, "agent_timeout": 60, "lost_after": LOST_AFTER,
    "pending_expiry": EXPIRY, "retention_days": 1,
}  # fmt: skip
STRATEGIES: tuple[dict[str, Any], ...] = (
    {}, {"batch": 1}, {"batch": 2}, {"batch": "40%"}, {"batch": 1, "max_failures": 1}, {"max_failures": 1},
    {"canary": "web-02"}, {"canary": "web-02", "pause": 90}, {"canary": "web-02", "pause": 90, "batch": 2, "max_failures": 2},
    {"canary": "canary-1", "batch": "50%", "max_failures": 3, "pause": 30},
)  # fmt: skip
PLACES = ("held", "pending", "running", "success", "failed", "cancelled")
OPEN, ENDED = ("pending", "running"), ("success", "failed", "cancelled")
BY_ITSELF = ("push", "hook")  # kinds that a newer one of takes the place of

HAPPENED: collections.Counter[str] = collections.Counter()
# What a run has to reach: one that no longer gets there proves nothing.
EXPECTED = (
    "deployed", "same under way", "in part under way", "push", "push locked", "push older", "push repeated", "hook", "rolled back", "no way back",
    "rolled back with what was under way", "overridden", "locked: refused", "retried", "deployment cancelled", "job cancelled",
    "job retried", "overtaken", "single job", "lock", "lock for a time", "unlock", "claim", "lost", "another attempt", "expired", "superseded", "stopped",
    "paused", "pause over", "lock over", "batch let go", "canary let go", "reload", "app gone", "removed by retention", "restart", "crash",
    "full disk", "two in one commit", "lock and push in one commit", "success", "partial", "failed", "rolled_back", "cancelled", "job.success",
)  # fmt: skip


class Row(dict[str, Any]):
    """A row by its columns' names."""

    __getattr__ = dict.__getitem__


# ---------------------------------------------------------------------------------------------------------------------
# What is there after a step
# Owns: reading it whole. Ignores: what is right.


class Seen:
    def __init__(self, world: World):
        subject = world.subject
        self.jobs = {row.id: row for row in self._rows(subject, "jobs")}
        self.deployments = {row.id: row for row in self._rows(subject, "deployments")}
        self.locks = {row.app: row for row in self._rows(subject, "locks")}
        self.pushed = {(app, ref): at for app, ref, at in subject.rows("SELECT app, ref, pushed_at FROM pushes")}
        self.releases = {(app, host): job_id for app, host, job_id in subject.rows("SELECT app, host, job_id FROM releases")}
        self.now = subject.clock.stamp()
        self.of: dict[str, list[Row]] = collections.defaultdict(list)  # deployment to its jobs, in their turn
        for job in self.jobs.values():
            if job.deployment_id:
                self.of[job.deployment_id].append(job)
        self.changed: set[str] = set()  # jobs and deployments that are not what they were, and deployments of such jobs
        self.let_go: list[Row] = []  # jobs of deployments that had a hold, or were not there, and may run now

    def compare(self, before: Seen) -> None:
        for job in self.jobs.values():
            old = before.jobs.get(job.id)
            if old == job:
                continue
            self.changed |= {job.id, job.deployment_id}
            if job.deployment_id and job.hold is None and (old is None or place(old) == "held"):
                self.let_go.append(job)
        self.changed |= {one.id for one in self.deployments.values() if before.deployments.get(one.id) != one}

    @staticmethod
    def _rows(subject: Subject, table: str) -> Iterator[Row]:
        names = [row[1] for row in subject.rows(f"PRAGMA table_info({table})")]
        return (Row(zip(names, row, strict=True)) for row in subject.rows(f"SELECT * FROM {table} ORDER BY 1"))

    def held_back(self, deployment: Row) -> bool:
        return deployment.app in self.locks and not deployment.override

    def is_overtaken(self, job: Row) -> bool:
        """What runs there was asked for after it."""
        return bool(self.releases.get((job.app, job.host), "") > job.id)

    def open_ones(self, app: str, host: str, ref: str) -> list[Row]:
        return [job for job in self.jobs.values() if (job.app, job.host, job.ref) == (app, host, ref) and job.status in OPEN]


def everything(subject: Subject) -> Any:
    """The database, and the memory that is its index: what a transaction that failed must leave as it was."""
    tables = ("jobs", "deployments", "locks", "events", "audit", "deliveries", "pushes", "releases")
    jobs, store = subject.daemon.jobs, subject.daemon.store
    lanes = {host: list(lane.waiting) for host, lane in subject.daemon.queue._lanes.items() if lane.waiting}
    leases = sorted((lease.job_id, lease.attempt, lease.cancel) for held in jobs._leases.values() for lease in held.values())
    memory = (dict(jobs.locks), lanes, subject.daemon.queue.depth, leases, dict(jobs._open), dict(jobs._open_on), store.position)
    return (
        [subject.rows(f"SELECT * FROM {table} ORDER BY 1") for table in tables],
        memory,
        dict(store.recent),
        subject.daemon.hub.head,
    )


def place(job: Row) -> str:
    return "held" if job.hold and job.status == "pending" else job.status


def status_of(counts: collections.Counter[str], hosts: int) -> str:
    """The table of docs/design.md."""
    if counts["held"] + counts["pending"] + counts["running"]:
        return "running" if counts["running"] + counts["success"] + counts["failed"] else "pending"
    if counts["success"]:
        return "success" if counts["success"] == hosts else "partial"
    if counts["failed"]:
        return "rolled_back" if counts["rolled_back"] == counts["failed"] else "failed"
    return "cancelled"


# ---------------------------------------------------------------------------------------------------------------------
# What must always be true
# Owns: the rules, each with its name. Ignores: which step was made.


def counts_are_those_of_the_jobs(world: World, seen: Seen) -> None:
    for one in seen.deployments.values():
        if one.id not in seen.changed:
            continue
        jobs = list(world.all_jobs_of(one.id))
        counts = collections.Counter(map(place, jobs))
        counts["rolled_back"] = sum(job.status == "failed" and job.rolled_back_to is not None for job in jobs)
        stored = {name: one[name] for name in (*PLACES, "rolled_back")}
        check(stored == {name: counts[name] for name in stored}, one.id, "says", stored, "its jobs", counts)
        check(one.hosts == len(jobs), one.id, "has", len(jobs), "jobs, not", one.hosts)
        check(one.status == status_of(counts, one.hosts), one.id, "is", one.status, "with", counts)
        check((one.completed_at is None) == any(job.status in OPEN for job in jobs), one.id, "completed", one.completed_at, counts)
        check((one.hold is None) == (counts["held"] == 0), one.id, "hold", one.hold, counts)
        check({job.hold for job in jobs if place(job) == "held"} <= {one.hold}, one.id, one.hold, [job.hold for job in jobs])
        check(one.status != "success" or one.reason is None, one.id, "succeeded:", one.reason)


def what_has_ended_stays(world: World, seen: Seen) -> None:
    for kind, rows in (("job", seen.jobs), ("deployment", seen.deployments)):
        for row_id, row in rows.items():
            before = world.ended.get(row_id)
            check(before in (None, row), kind, row_id, "has changed after its end:", before, row)
            if row.status in ENDED or (kind == "deployment" and row.completed_at):
                world.ended[row_id] = row


def the_queue_has_what_waits_without_a_hold(world: World, seen: Seen) -> None:
    daemon = world.subject.daemon
    wanted: dict[str, list[str]] = collections.defaultdict(list)
    for job in seen.jobs.values():
        if place(job) == "pending":
            wanted[job.host].append(job.id)
    lanes = {host: [job_id for job_id, _ in lane.waiting] for host, lane in daemon.queue._lanes.items() if lane.waiting}
    check(lanes == wanted, "queue", lanes, "is to be", dict(wanted))
    check(daemon.queue.depth == sum(map(len, wanted.values())), "depth", daemon.queue.depth)
    leases = {lease.job_id for held in daemon.jobs._leases.values() for lease in held.values()}
    check(leases == {job.id for job in seen.jobs.values() if job.status == "running"}, "leases", leases)


def memory_is_what_is_stored(world: World, seen: Seen) -> None:
    jobs, store = world.subject.daemon.jobs, world.subject.daemon.store
    check({name: lock._asdict() for name, lock in jobs.locks.items()} == seen.locks, jobs.locks, seen.locks)
    for key, known in store.recent.items():
        if isinstance(key, str) and key in seen.jobs:
            check(known[0]._asdict() == seen.jobs[key], "recent", known[0], seen.jobs[key])
            check(key not in seen.changed or json.loads(known[1]) == known[0].public(), "recent", known)
    open_ids = sorted(job.id for job in seen.jobs.values() if job.status in OPEN)
    check(sorted(job_id for ids in jobs._open.values() for job_id in ids) == open_ids, jobs._open, open_ids)
    on = collections.Counter(job.host for job in seen.jobs.values() if job.status in OPEN)
    check(+jobs._open_on == on, jobs._open_on, on)


def nothing_is_let_go_while_locked(world: World, seen: Seen) -> None:
    if world.locked_last:  # in the same commit, behind what went before it
        return
    for job in seen.let_go:
        check(not seen.held_back(seen.deployments[job.deployment_id]), job.id, "was let go while", job.app, "is locked")
    for job in world.new(seen.jobs):
        if job.app in seen.locks and job.id not in world.may_pass:
            one = seen.deployments.get(job.deployment_id or "")
            passes = one.override if one else False
            check(passes or job.hold or job.created_at < seen.locks[job.app].at, job.id, "was made without a hold while locked")


def batches_wait_for_one_another(world: World, seen: Seen) -> None:
    for one in seen.deployments.values():
        if one.id not in seen.changed:
            continue
        strategy, jobs = json.loads(one.strategy), seen.of[one.id]
        begun = [job for job in jobs if not job.hold]
        under_way = [job for job in begun if job.status in OPEN]
        size = strategy["batch"]
        size = size if isinstance(size, int) else max(1, -(-one.hosts * int(size[:-1]) // 100))
        canary = next((job for job in jobs if job.host == strategy["canary"]), None)
        check(not strategy["canary"] or one.id in world.trimmed or jobs[0] is canary, one.id, "the canary does not come first")
        if canary and canary in under_way:
            size = 1
        check(len(under_way) <= size, one.id, len(under_way), "jobs at once, of", size, one.strategy)
        fresh = [job for job in seen.let_go if job.deployment_id == one.id]
        earlier = [job for job in begun if job not in fresh and job.status in OPEN]
        check(not fresh or not earlier, one.id, "a batch begins while the one before runs", fresh, earlier)
        waits = [job.id for job in jobs if place(job) == "held"]
        check(not fresh or not waits or max(job.id for job in fresh) < min(waits), one.id, "not in their turn", fresh, waits)
        for job in fresh:
            HAPPENED["canary let go" if job is canary else "batch let go"] += 1
            if canary and job is not canary and canary.status == "success" and strategy["pause"]:
                since = deploybot.unix_time(canary.completed_at)
                check(world.now >= since + strategy["pause"], one.id, "went on", world.now - since, "s after its canary")


def too_many_failures_stop_the_rest(world: World, seen: Seen) -> None:
    for one in seen.deployments.values():
        limit = json.loads(one.strategy)["max_failures"]
        if limit is not None and one.failed + one.cancelled > limit:
            check(one.held + one.pending == 0, one.id, "goes on after", one.failed, "failed,", one.cancelled, "cancelled of", limit)


def none_is_stuck(world: World, seen: Seen) -> None:
    """An open one runs, or can be had, or waits for something that is there."""
    for one in seen.deployments.values():
        if one.held and not (one.pending or one.running):
            locked = one.hold == "lock" and seen.held_back(one)
            paused = one.hold == "pause" and one.resume_at > world.swept
            check(locked or paused, one.id, "waits for nothing:", one.hold, one.resume_at, "now", seen.now)
            HAPPENED["paused"] += paused


def the_stream_tells_each_change_once(world: World, seen: Seen) -> None:
    sql = "SELECT position, lines, kind, job_id, data FROM events WHERE position > ? ORDER BY position"
    for position, lines, kind, row_id, data in world.subject.rows(sql, world.position):
        check(position == world.position + lines, "positions have a gap at", position)
        world.position = position
        if kind == "deployment":
            told, before = json.loads(data), world.told.get(row_id)
            if before:
                names = ("status", "hold", "resume_at", "reason", "superseded_by")
                check(any(told[name] != before[name] for name in names), row_id, "told twice:", told)
                check(before["completed_at"] is None, row_id, "told after its end:", told)
            world.told[row_id] = told
        elif kind == "job":
            world.told[row_id] = json.loads(data)
    for one in (one for one in seen.deployments.values() if one.id in seen.changed):
        names = one.keys() if one.completed_at else ("status", "hold", "resume_at", "completed_at")
        shown = deploybot.Deployment(**one).public()
        told = world.told[one.id]
        check(all(told[name] == shown[name] for name in names if name in shown), one.id, "told", told, "is", shown)
    for job in (job for job in seen.jobs.values() if job.id in seen.changed):
        shown = deploybot.Job(**job).public()
        check(world.told[job.id] == shown, job.id, "told", world.told[job.id], "is", shown)
    check(world.subject.daemon.hub.head == world.position, "announced", world.subject.daemon.hub.head, "committed", world.position)


def ids_point_to_something(world: World, seen: Seen) -> None:
    world.ever |= seen.jobs.keys() | seen.deployments.keys()
    for row in (*seen.jobs.values(), *seen.deployments.values()):
        for name in ("superseded_by", "retry_of", "deployment_id"):
            check(row.get(name) is None or row[name] in world.ever, row.id, name, row.get(name))
    check(not seen.jobs.keys() & seen.deployments.keys(), "an id of both")


RULES: tuple[Callable[[World, Seen], None], ...] = (
    counts_are_those_of_the_jobs, what_has_ended_stays, the_queue_has_what_waits_without_a_hold, memory_is_what_is_stored,
    nothing_is_let_go_while_locked, batches_wait_for_one_another, too_many_failures_stop_the_rest, none_is_stuck,
    the_stream_tells_each_change_once, ids_point_to_something,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The world
# Owns: who asks for what, and what each answer must bring. Ignores: how the controller gets there.


class Call(NamedTuple):
    ask: Callable[[], Answer]
    told: Callable[[Answer, Seen, Seen], None] = lambda answer, before, after: None  # judges the answer by what was and what is


def is_a_lock(call: Call) -> bool:
    return ".lock." in call.told.__qualname__


class World:
    def __init__(self, chance: random.Random, folder: pathlib.Path):
        self.chance, self.folder, self.clock = chance, folder, FakeClock()
        self.apps: dict[str, dict[str, Any]] = {}
        self.script: list[str] = []
        self.subject = Subject(folder, self.clock, [], SETTINGS)
        self.agents: dict[str, tuple[str, str]] = {}  # host to (id, session)
        self.holding: dict[str, dict[str, int]] = {host: {} for host in HOSTS}  # what each agent runs: job to attempt
        self.commits = 0
        self.pushes: list[tuple[str, bytes]] = []
        # What the rules remember.
        self.ended: dict[str, Row] = {}
        self.known: dict[str, Row] = {}  # jobs, also those that retention has removed
        self.trimmed: set[str] = set()  # deployments of which it has
        self.told: dict[str, Any] = {}
        self.ever: set[str] = set()
        self.may_pass: set[str] = set()  # jobs that may be made without a hold while locked
        self.locked_last = False  # the last step was two calls, the second of them a lock
        self.position = 0
        self.swept = ""
        self.ways: dict[tuple[str, str], list[str]] = collections.defaultdict(list)  # (app, host) to commits: the way back
        self.steps_back: dict[tuple[str, str, str], list[str]] = {}  # the way as it was when a commit came there first
        self.in_order: dict[tuple[str, str], str] = {}  # the newest job that succeeded there; "~" where one overtook another
        self.before = Seen(self)
        self.reload()
        for host in HOSTS:
            self.register(host)

    @property
    def now(self) -> float:
        return self.clock.at

    # -- what the rules ask ------------------------------------------------------------------------------------------

    def all_jobs_of(self, deployment_id: str) -> Iterable[Row]:
        return (job for job in self.known.values() if job.deployment_id == deployment_id)

    def new(self, rows: dict[str, Row]) -> list[Row]:
        return [row for row_id, row in rows.items() if row_id not in self.before.jobs and row_id not in self.before.deployments]

    # -- how a step is made ------------------------------------------------------------------------------------------

    def step(self, call: Call, name: str, fault: tuple[str, int] | None = None) -> Answer | None:
        """One call, what must be true after it, and its own word; None where there was no answer."""
        HAPPENED["steps"] += 1
        self.script.append(f"{name} {fault or ''}")
        faults = self.subject.faults
        untouched = everything(self.subject) if fault else None
        faults.arm(fault)
        try:
            answer = call.ask()
        except Crash:
            faults.arm(None)
            HAPPENED["crash"] += 1
            self.subject.crash()
            answer = None
        fired, commits = faults.fired, faults.commits
        faults.arm(None)
        if fired and answer is not None:
            HAPPENED["full disk"] += 1
            check(answer.status == 503, "a full disk is answered with 503, not", answer)
            check(commits or everything(self.subject) == untouched, "a transaction that failed has changed something")
        self.settle(call if answer is not None and not fired else None, answer)
        return None if fired else answer

    def settle(self, call: Call | None, answer: Answer | None) -> None:
        seen = Seen(self)
        seen.compare(self.before)
        self.remember(seen)
        for rule in RULES:
            HAPPENED[rule.__name__] += 1
            try:
                rule(self, seen)
            except Failure as failure:
                raise Failure(f"{rule.__name__}: {failure}") from None
        if call and answer:
            call.told(answer, self.before, seen)
        self.before = seen

    def remember(self, seen: Seen) -> None:
        for job_id in self.before.jobs.keys() - seen.jobs.keys():
            HAPPENED["removed by retention"] += 1
            job = self.before.jobs[job_id]
            check(job.status in ENDED, "an open job was removed", job)
            self.trimmed.add(job.deployment_id)
            self.in_order[(job.app, job.host)] = "~"
        for job in seen.jobs.values():
            before = self.known.get(job.id)
            if job.status in ENDED and (before is None or before.status not in ENDED):
                is_in_turn = before and before.status == "pending" and before.hold in ("batch", "pause")
                check(job.reason != "expired" or not is_in_turn, "expired, though its turn had not come:", job)
                self.count(job)
            if before and before.status == "running" and job.status == "pending":
                HAPPENED["another attempt"] += 1
            self.known[job.id] = job
        for one in seen.deployments.values():
            before = self.before.deployments.get(one.id)
            if one.completed_at and (before is None or not before.completed_at):
                HAPPENED[one.status] += 1

    def count(self, job: Row) -> None:
        """A job has ended: what its host runs, and what it went back to."""
        HAPPENED[
            job.reason if job.reason in ("expired", "superseded", "stopped") else "lost" if job.reason == "agent_lost" else "x"
        ] += 1
        if job.status != "success":
            return
        HAPPENED["job.success"] += 1
        key, commit = (job.app, job.host), job.commit
        if self.in_order.get(key) == "~" or job.id < self.in_order.get(key, ""):
            self.in_order[key] = "~"
            return
        self.in_order[key] = job.id
        if json.loads(job.spec).get("reuse"):
            self.ways[key] = list(self.steps_back.get((*key, commit), [commit]))
        else:
            self.ways[key] = [*self.ways[key], commit]
            self.steps_back[(*key, commit)] = list(self.ways[key])

    def way_back(self, app: str, host: str) -> str | None:
        way = self.ways[(app, host)]
        return next((commit for commit in reversed(way) if commit != way[-1]), None) if way else None

    # -- apps.yaml, time ---------------------------------------------------------------------------------------------

    def reload(self, gone: str = "") -> None:
        for name, hosts in (("web", HOSTS), ("api", HOSTS[1:4])):
            some = (
                sorted(self.chance.sample(hosts, self.chance.randint(2, len(hosts)))) if self.chance.random() < 0.3 else list(hosts)
            )
            strategy = self.chance.choice([one for one in STRATEGIES if one.get("canary", some[0]) in some])
            about = {"hosts": some, "strategy": strategy, "retries": self.chance.choice((0, 1))}
            self.apps[name] = {"name": name, "repo": f"myorg/{name}", "deploy_on_push": True, "branches": ["*"], **about}
        self.apps.pop(gone, None)
        (self.folder / "apps.json").write_text(json.dumps({"apps": list(self.apps.values())}))
        told = json.dumps([(app["name"], app["hosts"], app["strategy"], app["retries"]) for app in self.apps.values()])
        HAPPENED["reload"] += 1
        HAPPENED["app gone"] += bool(gone)
        answer = self.step(Call(lambda: self.subject.ask("POST", "/v1/reload")), f"reload {told}")
        check(answer and answer.status == 200, answer)

    def passes(self, seconds: float, fault: Any = None) -> None:
        """Time, heartbeats of most agents, and a sweep that thinks nothing of the leap."""
        self.clock.advance(seconds)
        for host in HOSTS:
            if self.chance.random() < (0.5 if LOST_AFTER < seconds < EXPIRY else 0.85):
                self.beat(host, may_claim=False)
        self.sweep(fault, f"{seconds} s pass")

    def sweep(self, fault: Any = None, name: str = "sweep") -> None:
        self.subject.daemon._swept = self.now
        if self.chance.random() < 0.3:
            self.subject.daemon.jobs._retention_due = 0.0
        paused = {one.id for one in self.before.deployments.values() if one.hold == "pause"}
        locked = set(self.before.locks)

        def ask() -> Answer:
            self.subject.sweep()
            return Answer(503 if self.subject.faults.fired else 200, {}, lambda: None)

        answer = self.step(Call(ask), name, fault)
        if answer:  # the sweep came to its end
            self.swept = self.clock.stamp()
            HAPPENED["lock over"] += len(locked - self.before.locks.keys())
            HAPPENED["pause over"] += sum(
                one.hold != "pause" for one_id in paused if (one := self.before.deployments.get(one_id)) is not None
            )
            for app, lock in self.before.locks.items():
                check(lock.until is None or lock.until > self.swept, app, "is locked until", lock.until, "and it is", self.swept)

    def restart(self) -> None:
        HAPPENED["restart"] += 1
        if self.chance.random() < 0.5:
            self.subject.stop_and_start()
        else:
            self.subject.crash()
        self.script.append("restart")
        self.settle(None, None)

    # -- people ------------------------------------------------------------------------------------------------------

    def commit(self) -> str:
        """Mostly a new one; an old one now and then: it may be under way."""
        self.commits += self.chance.random() < 0.6 or not self.commits
        return f"{self.commits if self.chance.random() < 0.7 else self.chance.randint(1, self.commits):040x}"

    def some_hosts(self, app: str) -> list[str] | None:
        hosts = self.apps[app]["hosts"]
        return None if self.chance.random() < 0.6 else self.chance.sample(hosts, self.chance.randint(1, len(hosts)))

    def reaches(self, after: Seen, app: str, wanted: dict[str, str], is_free: bool = False) -> None:
        """Each of these hosts has a job with that ref; `is_free`: that no lock holds."""
        for host, ref in wanted.items():
            found = after.open_ones(app, host, ref)
            check(found, host, "gets no", ref, "of", app)
            free = [job for job in found if job.hold != "lock"]
            check(free or not is_free, host, "waits for the lock, which this passes:", found)

    def judge_made(
        self, answer: Answer, before: Seen, after: Seen, app: str, wanted: dict[str, str], is_free: bool = False
    ) -> None:
        check(answer.status == 201, answer)
        self.reaches(after, app, wanted, is_free)
        made, skipped = answer.body["jobs"], {one["host"] for one in answer.body["skipped"]}
        fresh = [job for job in made if job["id"] not in before.jobs]
        check(answer.body["created"] == bool(fresh), answer.body["created"], fresh)
        if answer.body["created"]:
            HAPPENED["in part under way"] += bool(skipped)
            one = answer.body["deployment"]
            check({job["host"] for job in made} | skipped >= wanted.keys(), "told", answer.body, "wanted", wanted)
            check({job["id"] for job in made} == {job.id for job in after.of[one["id"]]}, "its jobs", answer.body)
            check(one == deploybot.Deployment(**after.deployments[one["id"]]).public(), "told", one)
            canary, places = self.apps[app]["strategy"].get("canary"), {job["host"] for job in made}
            if canary in places and len(places) > 1 and not skipped:
                check(one["strategy"]["canary"] == canary == made[0]["host"], "where is its canary?", one)
        else:
            HAPPENED["same under way"] += 1

    def deploy(self) -> Call:
        app, ref, override, force = self.an_app(), self.commit(), self.chance.random() < 0.25, self.chance.random() < 0.15
        body: dict[str, Any] = {"app": app, "ref": ref, "override": override, "force": force}
        if hosts := self.some_hosts(app):
            body["hosts"] = hosts
        wanted = dict.fromkeys(hosts or self.apps[app]["hosts"], ref)

        def told(answer: Answer, before: Seen, after: Seen) -> None:
            if app in before.locks and not override:
                HAPPENED["locked: refused"] += 1
                check(answer.status == 409 and before.jobs == after.jobs, answer)
                return
            HAPPENED["deployed"] += 1
            HAPPENED["overridden"] += app in before.locks
            self.judge_made(answer, before, after, app, wanted, override)
            check(not force or len(answer.body["jobs"]) == len(wanted), "force makes all anew", answer)

        return Call(lambda: self.subject.ask("POST", "/v1/deployments", body), told)

    def rollback(self, app: str = "") -> Call:
        app = app or self.an_app()
        hosts = self.some_hosts(app)
        body: dict[str, Any] = {"app": app, "rollback": True, "lock": self.chance.random() < 0.6}
        if self.chance.random() < 0.2:
            body["to"] = f"{self.chance.randint(1, max(1, self.commits)):040x}"
        if hosts:
            body["hosts"] = hosts

        def told(answer: Answer, before: Seen, after: Seen) -> None:
            if answer.status == 409:
                HAPPENED["no way back"] += 1
                check(before.jobs == after.jobs and "no host can go back" in answer.body["detail"], answer)
                for host in hosts or self.apps[app]["hosts"]:
                    known = self.in_order.get((app, host), "") != "~" and "to" not in body
                    check(not known or self.way_back(app, host) is None, host, "can go back:", self.ways[(app, host)], answer)
                return
            check(answer.status == 201, body, answer)
            HAPPENED["rolled back"] += 1
            skipped = {one["host"] for one in answer.body["skipped"] if "under way" not in one["reason"]}
            wanted = {}
            for host in set(hosts or self.apps[app]["hosts"]) - skipped:
                known = self.in_order.get((app, host), "") != "~"
                jobs = [job for job in after.jobs.values() if (job.app, job.host) == (app, host) and job.status in OPEN]
                ref = body.get("to") or self.way_back(app, host)
                if known:
                    wanted[host] = ref
                check(jobs, host, "was neither skipped nor sent back", answer)
            self.judge_made(answer, before, after, app, wanted, True)
            if answer.body["created"]:
                HAPPENED["rolled back with what was under way"] += any(
                    job.app == app and job.status == "pending" for job in before.jobs.values()
                )
                left = [job for job in after.jobs.values() if job.app == app and place(job) in ("held", "pending")]
                left = [job for job in left if job.deployment_id not in (None, answer.body["deployment"]["id"])]
                check(not left, "these would go forward again:", left)
                check(not body["lock"] or app in after.locks, "is not locked after a rollback")

        return Call(lambda: self.subject.ask("POST", "/v1/deployments", body), told)

    def push(self) -> Call:
        app, branch = self.an_app(), self.chance.choice(BRANCHES)
        kind = self.chance.choice(("new", "new", "new", "new", "older", "again"))
        if kind == "again" and self.pushes:
            return self.deliver(*self.chance.choice(self.pushes), {}, True)
        return self.a_push(app, branch, -1000 if kind == "older" else 0)

    def a_push(self, app: str, branch: str, late: int = 0) -> Call:
        commit, at = self.commit(), 1_790_000_000 + len(self.pushes) + late
        repository = {"full_name": f"myorg/{app}", "default_branch": "main", "pushed_at": at}
        event = {"ref": f"refs/heads/{branch}", "after": commit, "before": "0" * 40, "repository": repository}
        push = (f"guid-{len(self.pushes)}", json.dumps(event).encode())
        self.pushes.append(push)
        return self.deliver(*push, {"app": app, "branch": branch, "commit": commit, "at": at}, False)

    def deliver(self, guid: str, body: bytes, about: dict[str, Any], again: bool) -> Call:
        headers = {"x_github_event": "push", "x_github_delivery": guid, "x_hub_signature_256": deploybot.signature_of(SECRET, body)}

        def told(answer: Answer, before: Seen, after: Seen) -> None:
            check(answer.status == 200, answer)
            newest = before.pushed.get((about.get("app"), f"refs/heads/{about.get('branch')}"), 0)
            if again and "taken before" in answer.body["message"]:
                HAPPENED["push repeated"] += 1
                check(before.jobs == after.jobs, "a push that is repeated makes something")
            elif not again and about["at"] < newest:
                HAPPENED["push older"] += 1
                check(before.jobs == after.jobs, "an older push makes something", answer)
            elif not again:
                HAPPENED["push"] += 1
                HAPPENED["push locked"] += about["app"] in before.locks
                self.judge_newest(after, about["app"], about["branch"], about["commit"])

        return Call(lambda: self.subject.ask("POST", "/v1/webhooks/github", body, **headers), told)

    def judge_newest(self, after: Seen, app: str, branch: str, commit: str, hosts: Iterable[str] | None = None) -> None:
        """Each host gets it, and no older one of the branch waits any more."""
        hosts = set(hosts or self.apps[app]["hosts"])
        self.reaches(after, app, dict.fromkeys(hosts, commit))
        for one in after.deployments.values():
            if one.app == app and one.kind in BY_ITSELF and (one.branch == branch or app in after.locks):
                places = hosts | ({job.host for job in after.of[one.id]} - set(self.apps[app]["hosts"]))
                left = [job for job in after.of[one.id] if job.status == "pending" and job.ref != commit and job.host in places]
                check(not left, "an older push waits on:", left, "behind", commit)

    def hook(self) -> Call:
        app, branch, commit = self.an_app(), self.chance.choice(BRANCHES), self.commit()
        body: dict[str, Any] = {"ref": branch, "commit": commit}
        if hosts := self.some_hosts(app):
            body["hosts"] = hosts

        def told(answer: Answer, before: Seen, after: Seen) -> None:
            HAPPENED["hook"] += 1
            wanted = dict.fromkeys(hosts or self.apps[app]["hosts"], commit)
            self.judge_made(answer, before, after, app, wanted)
            self.judge_newest(after, app, branch, commit, wanted)

        return Call(lambda: self.subject.ask("POST", f"/v1/hooks/{app}", body), told)

    def one_of(self, rows: dict[str, Row], weight: Callable[[Row], bool] = lambda row: True) -> Row | None:
        """Those that fit more often than others."""
        found = [row for row in rows.values() if weight(row)] if self.chance.random() < 0.8 else list(rows.values())
        return self.chance.choice(found) if found else None

    def retry_deployment(self) -> Call | None:
        one = self.one_of(self.before.deployments, lambda row: bool(row.completed_at) and row.status != "success")
        if one is None:
            return None

        def told(answer: Answer, before: Seen, after: Seen) -> None:
            ended = [job for job in before.of[one.id] if job.status in ("failed", "cancelled")]
            failed = {job.host: job.ref for job in ended if not before.is_overtaken(job)}
            HAPPENED["overtaken"] += len(ended) - len(failed)
            failed = {host: ref for host, ref in failed.items() if host in self.apps.get(one.app, {}).get("hosts", ())}
            if one.app not in self.apps:
                check(answer.status == 404 or not one.completed_at, answer)
            elif one.completed_at is None or not failed or (one.app in before.locks and not one.override):
                check(answer.status == 409 and before.jobs == after.jobs, "retry of", one, "answered", answer)
            else:
                HAPPENED["retried"] += 1
                self.judge_made(answer, before, after, one.app, failed, bool(one.override))

        return Call(lambda: self.subject.ask("POST", f"/v1/deployments/{one.id}/retry"), told)

    def cancel_deployment(self) -> Call | None:
        one = self.one_of(self.before.deployments, lambda row: not row.completed_at)
        if one is None:
            return None

        def told(answer: Answer, before: Seen, after: Seen) -> None:
            check(answer.status == (409 if one.completed_at else 200), answer)
            HAPPENED["deployment cancelled"] += answer.status == 200
            check(not any(job.status == "pending" for job in after.of[one.id]), "waits on after it was cancelled", one.id)
            for job in after.of[one.id]:
                check(job.status != "running" or job.cancel_requested_at, job.id, "runs on unasked")

        return Call(lambda: self.subject.ask("POST", f"/v1/deployments/{one.id}/cancel"), told)

    def cancel_job(self) -> Call | None:
        job = self.one_of(self.before.jobs, lambda row: row.status in OPEN)
        if job is None:
            return None

        def told(answer: Answer, before: Seen, after: Seen) -> None:
            check(answer.status == (409 if job.status in ("success", "failed") else 200), answer)
            HAPPENED["job cancelled"] += job.status in OPEN

        return Call(lambda: self.subject.ask("POST", f"/v1/jobs/{job.id}/cancel"), told)

    def retry_job(self) -> Call | None:
        job = self.one_of(self.before.jobs, lambda row: row.status in ("failed", "cancelled"))
        if job is None:
            return None

        def told(answer: Answer, before: Seen, after: Seen) -> None:
            goes_back = json.loads(job.spec).get("reuse", False)
            HAPPENED["overtaken"] += before.is_overtaken(job)
            if job.status in OPEN or before.is_overtaken(job) or (job.app in before.locks and not goes_back):
                check(answer.status == 409 and before.jobs == after.jobs, "retry of", job, "answered", answer)
                return
            HAPPENED["job retried"] += 1
            check(answer.status == 201, answer)
            made = after.jobs[answer.body["job"]["id"]]
            check(
                json.loads(made.spec).get("reuse", False) == goes_back or not answer.body["created"],
                "does what it did before",
                made,
            )
            self.reaches(after, job.app, {job.host: job.ref})

        call = Call(lambda: self.subject.ask("POST", f"/v1/jobs/{job.id}/retry"), told)
        if json.loads(job.spec).get("reuse"):
            return self.passing(call)
        return call

    def passing(self, call: Call) -> Call:
        """Jobs that this makes may run although the app is locked."""

        def ask() -> Answer:
            before = {row[0] for row in self.subject.rows("SELECT id FROM jobs")}
            try:
                return call.ask()
            finally:
                self.may_pass |= {row[0] for row in self.subject.rows("SELECT id FROM jobs")} - before

        return Call(ask, call.told)

    def single_job(self) -> Call:
        app, ref, override = self.an_app(), self.commit(), self.chance.random() < 0.4
        host = self.chance.choice(self.apps[app]["hosts"])
        body = {
            "repo": f"myorg/{app}",
            "app": app,
            "ref": ref,
            "host": host,
            "override": override,
            "force": self.chance.random() < 0.2,
        }

        def told(answer: Answer, before: Seen, after: Seen) -> None:
            if app in before.locks and not override:
                check(answer.status == 409 and before.jobs == after.jobs, answer)
                return
            HAPPENED["single job"] += 1
            check(answer.status == 201, answer)
            self.reaches(after, app, {host: ref}, override)

        call = Call(lambda: self.subject.ask("POST", "/v1/jobs", body), told)
        return self.passing(call) if override else call

    def lock(self, app: str = "") -> Call:
        app = app or self.an_app()
        body: dict[str, Any] = {"reason": f"reason {self.chance.randint(1, 9)}"}
        if self.chance.random() < 0.4:
            body["for"] = self.chance.choice((30, 120, 3600))

        def told(answer: Answer, before: Seen, after: Seen) -> None:
            HAPPENED["lock for a time" if "for" in body else "lock"] += 1
            check(answer.status == 200 and after.locks[app] == answer.body["lock"], answer)

        return Call(lambda: self.subject.ask("PUT", f"/v1/apps/{app}/lock", body), told)

    def unlock(self) -> Call:
        app = self.chance.choice(sorted(self.before.locks) or ["web"])

        def told(answer: Answer, before: Seen, after: Seen) -> None:
            check(answer.status == (200 if app in before.locks else 404) and app not in after.locks, answer)
            HAPPENED["unlock"] += answer.status == 200

        return Call(lambda: self.subject.ask("DELETE", f"/v1/apps/{app}/lock"), told)

    def an_app(self) -> str:
        return self.chance.choice([*self.apps, "web"] if "web" in self.apps else list(self.apps))

    # -- agents ------------------------------------------------------------------------------------------------------

    def register(self, host: str) -> None:
        digest = hashlib.sha256(f"dbt_{host}".encode()).hexdigest()
        body = {"hostname": host, "token_sha256": digest, "slots": 1 + (host == "web-01")}
        answer = self.step(Call(lambda: self.subject.ask("POST", "/v1/agents/register", body, ENROLMENT)), f"register {host}")
        check(answer and answer.status == 200, answer)
        self.agents[host] = (answer.body["id"], answer.body["session"])

    def beat(self, host: str, may_claim: bool = True, fault: Any = None) -> None:
        """Without a claim it says that it is offline: contact all the same."""
        agent, session = self.agents[host]
        running = [{"job_id": job_id, "attempt": attempt} for job_id, attempt in self.holding[host].items()]
        body = {"status": "online" if may_claim else "offline", "session": session, "running": running}

        def told(answer: Answer, before: Seen, after: Seen) -> None:
            check(answer.status == 200, answer)
            given = answer.body["job"]
            if given:
                was = before.jobs.get(given["id"])
                check(was is None or was.status == "running" or place(was) == "pending", "a held job was handed out", was)
                HAPPENED["claim"] += 1

        call = Call(lambda: self.subject.ask("POST", f"/v1/agents/{agent}/heartbeat", body, f"dbt_{host}"), told)
        answer = self.step(call, f"beat {host}", fault)
        if answer:
            answer.sent()
            if given := answer.body["job"]:
                self.holding[host][given["id"]] = given["attempt"]
            for job_id in answer.body["cancel"]:
                if (job_id in self.holding[host] and job_id not in self.before.jobs) or self.before.jobs[
                    job_id
                ].status != "running":
                    self.holding[host].pop(job_id, None)

    def end(self, fault: Any = None, well: float = 0.7) -> None:
        held = [(host, job_id) for host in HOSTS for job_id in self.holding[host]]
        if not held:
            return
        host, job_id = self.chance.choice(held)
        job = self.before.jobs.get(job_id)
        status = "success" if self.chance.random() < well else self.chance.choice(("failed", "failed", "back"))
        if job and job.cancel_requested_at and self.chance.random() < 0.8:
            status = "cancelled"
        body: dict[str, Any] = {"attempt": self.holding[host][job_id], "status": "failed" if status == "back" else status}
        if job:
            body["commit"] = job.ref
        if status == "back":
            body["rolled_back_to"] = "f" * 40
        call = Call(lambda: self.subject.ask("POST", f"/v1/jobs/{job_id}/result", body, f"dbt_{host}"))
        answer = self.step(call, f"end {host} {job_id} {status}", fault)
        if answer and answer.status in (200, 409, 404):
            self.holding[host].pop(job_id)

    # -- two at once -------------------------------------------------------------------------------------------------

    def together(self) -> None:
        """Two callers who share a COMMIT: what each made ready before may not be so any more."""
        app = self.an_app()
        first = self.chance.choice((self.lock(app), self.unlock(), self.deploy(), self.hook(), self.rollback()))
        second = self.chance.choice((self.a_push(app, "main"), self.a_push(app, "dev"), self.hook(), self.deploy(), self.lock(app)))
        HAPPENED["steps"] += 1
        HAPPENED["lock and push in one commit"] += is_a_lock(first) and "deliver" in second.told.__qualname__
        self.script.append(f"together {first.told.__qualname__} {second.told.__qualname__}")
        answers, _, shared = self.subject.in_one_commit([first.ask, second.ask], None)
        HAPPENED["two in one commit"] += shared
        check(all(answer.status < 500 for answer in answers), answers)
        self.locked_last = is_a_lock(second)
        self.settle(None, None)
        self.locked_last = False

    # -- a life ------------------------------------------------------------------------------------------------------

    def fault(self) -> tuple[str, int] | None:
        if self.chance.random() > 0.12:
            return None
        return self.chance.choice(("full", "crash")), self.chance.choice((AT_COMMIT, AT_COMMIT, self.chance.randint(1, 12)))

    def live(self) -> None:
        asks = (
            [self.deploy] * 4 + [self.push] * 6 + [self.hook] * 2 + [self.rollback] * 3 + [self.retry_deployment] * 2
            + [self.cancel_deployment, self.cancel_job, self.cancel_job, self.retry_job, self.single_job]
            + [self.lock] * 2 + [self.unlock] * 3
        )  # fmt: skip
        kind = self.chance.choices(("ask", "beat", "end", "time", "other"), (24, 34, 26, 10, 6))[0]
        if kind == "ask":
            make = self.chance.choice(asks)
            call = make()
            if call:
                self.step(call, make.__name__, self.fault())
        elif kind == "beat":
            self.beat(self.chance.choice(HOSTS), fault=self.fault())
        elif kind == "end":
            self.end(self.fault())
        elif kind == "time":
            seconds = self.chance.choices((1, 31, 61, LOST_AFTER + 1, EXPIRY + 1, 2 * DAY), (6, 4, 4, 6, 1, 1))[0]
            self.passes(seconds, self.fault())
        else:
            what = self.chance.choice(("together",) * 3 + ("restart", "reload", "reload", "gone", "release", "release"))
            if what == "gone":
                self.reload(self.chance.choice(("web", "api")))
            else:
                {"together": self.together, "restart": self.restart, "reload": self.reload, "release": self.release}[what]()

    def release(self) -> None:
        """What most days are made of: a new commit, everywhere, and now and then the way back at once."""
        app = self.an_app()
        self.commits += 1
        body = {"app": app, "ref": f"{self.commits:040x}", "override": True}
        self.step(Call(lambda: self.subject.ask("POST", "/v1/deployments", body)), f"release {app} {self.commits}")
        for _ in range(8):
            for host in self.apps[app]["hosts"]:
                self.beat(host)
            while any(self.holding.values()):
                self.end(well=1.0)
        if self.chance.random() < 0.5:
            self.step(self.rollback(app), "rollback")

    def work_off(self) -> None:
        """Unlocked, and with agents that are well, everything comes to its end."""
        for app in list(self.before.locks):
            self.step(Call(lambda app=app: self.subject.ask("DELETE", f"/v1/apps/{app}/lock")), "unlock")
        for _ in range(3 * len(self.before.jobs) + 20):
            if not any(job.status in OPEN for job in self.before.jobs.values()):
                break
            for host in HOSTS:
                self.beat(host)
            while any(self.holding.values()):
                self.end(well=1.0)
            if any(one.hold == "pause" for one in self.before.deployments.values()):
                self.passes(91)
        left = [job for job in self.before.jobs.values() if job.status in OPEN]
        check(not left, "these never end:", left)
        check(all(one.completed_at for one in self.before.deployments.values()), "a deployment never ends")


def prove(proof: Proof) -> None:
    logging.disable()
    lives, steps = FULL if proof.full else SHORT
    lives, steps = proof.options.lives or lives, proof.options.steps or steps
    memory = pathlib.Path("/dev/shm")  # a disk that forgets at a power cut is another proof's matter
    base = pathlib.Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else proof.folder))
    try:
        for life in range(lives * ROUNDS):
            missing = [name for name in EXPECTED if not HAPPENED[name]]
            if life >= lives and (not missing or proof.options.lives):
                break
            world = World(random.Random(f"{proof.seed} {life}"), pathlib.Path(tempfile.mkdtemp(dir=base)))
            try:
                for _ in range(steps):
                    world.live()
                world.work_off()
            except BaseException:
                print(f"life {life}, its last steps:", *world.script[-25:], sep="\n  ")
                raise
            finally:
                world.subject.close()
                shutil.rmtree(world.folder, ignore_errors=True)
            HAPPENED["lives"] += 1
        check(not missing or proof.options.lives, "never came to:", missing)
    finally:
        shutil.rmtree(base, ignore_errors=True)
        for name in ("lives", "steps", *EXPECTED):
            proof.figure(name, HAPPENED[name])


if __name__ == "__main__":
    numbers = [(flag, {"type": int, "default": None}) for flag in ("--lives", "--steps")]
    sys.exit(run(prove, __doc__, *numbers))
