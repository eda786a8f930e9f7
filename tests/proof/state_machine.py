"""The nine invariants of jobs (shared/design.md, section 4), held against whatever Hypothesis thinks of.

A state machine makes the calls of people, pushes and agents against a controller in this process, and against a model in plain
Python; after each step every invariant is checked by its number. Between the calls time passes, agents restart with and without
their memory, answers get lost or come late, the disk is full at any statement of a call, and the controller crashes at any
statement: the files as they stand then are copied, and a new Daemon opens the copy.

The calls go through the Dispatcher: everything from the token and the JSON to the SQL and the problem document is the real
thing. Sockets and threads are not: so one seed is one run, a thousand calls take a second, and "the answer was written" happens
when a rule says so. Where two calls share one commit (Store.write), a rule makes that happen with two threads.

    .venv-check/bin/python tests/proof/state_machine.py [--seed N] [--full]
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import logging
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import common
import hypothesis
from common import AT_COMMIT, TOKEN, Answer, Crash, Proof, Subject, check, run
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

sys.path.insert(0, str(common.ROOT))
sys.path.insert(0, str(common.ROOT / "tests"))

from conftest import FakeClock

import deploybot

SHORT, FULL = (220, 45), (8000, 100)  # examples, steps of each at most

ENROLMENT = "dbt_enrol"
SECRET = "a webhook secret"
AGENT_TIMEOUT, LOST_AFTER, PENDING_EXPIRY, GRACE = 60, 600, 86400, 60
LOG_LIMIT = 100  # bytes: so small that examples reach it
HOSTS = ("web-01", "web-02", "db-01")
APPS = [
    {"name": "web", "repo": "myorg/web", "hosts": ["web-01", "web-02"], "deploy_on_push": True, "branches": ["main"], "retries": 1},
    {"name": "api", "repo": "myorg/api", "hosts": ["web-01", "db-01"], "timeout": 120},
]  # fmt: skip
SETTINGS = {
    "token": TOKEN, "agent_token": ENROLMENT, "webhook_secret": SECRET, "agent_timeout": AGENT_TIMEOUT,
    "lost_after": LOST_AFTER, "pending_expiry": PENDING_EXPIRY, "log_limit": LOG_LIMIT, "retention_days": 0,
}  # fmt: skip
DEFAULTS = {"web": (1, 3600), "api": (0, 120), "myorg--other": (0, 3600)}  # app to retries and timeout
ENDED = ("success", "failed", "cancelled")
REASONS = {
    "success": {None},
    "failed": {"exit_code", "fetch_failed", "timeout", "health_check", "rejected", "agent_lost", "agent_crashed"},
    "cancelled": {"cancelled", "expired", "superseded"},
}
# From (status, attempt) to the next, as events tell: the change of the attempt, and the statuses that may follow.
NEXT = {
    "pending": {("pending", 0), ("running", 1), ("cancelled", 0)},
    "running": {("running", 0), ("pending", 0), *((status, 0) for status in ENDED)},
}

HAPPENED: collections.Counter[str] = collections.Counter()
# What a run has to reach: a machine that no longer gets there proves nothing.
EXPECTED = (
    "claim", "redelivery", "redelivery of a late answer", "requeue", "agent_crashed", "agent_lost", "timeout", "expired",
    "stale log refused", "stale result refused", "log gap refused", "log lines sent again", "log limit reached",
    "result repeated", "older session refused", "foreign host refused", "stranger refused", "duplicate answered", "forced duplicate",
    "lost answer", "late answer", "client gone", "cancel of a running job", "cancel of a lost job", "retry", "push", "push repeated",
    "push out of order", "drain", "host removed", "host reset", "crash", "crash before COMMIT", "crash after COMMIT", "disk full",
    "stop and start", "controller was stopped", "two calls in one commit", "worked off", "timed out",
)  # fmt: skip


def holds(number: int, condition: Any, *what: Any) -> None:
    """Invariant `number` of section 4; raises with its name."""
    check(condition, f"invariant {number}:", *what)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# The model
# Owns: what the state of each job has to be. Ignores: how the controller gets there.


@dataclasses.dataclass
class Job:
    """A job as it has to be. Persisted: all but the last four."""

    id: str
    repo: str
    ref: str
    host: str
    app: str
    retries: int
    timeout: int
    created_by: str
    queued: float
    retry_of: str | None = None
    forced: bool = False
    status: str = "pending"
    reason: str | None = None
    attempt: int = 0
    agent: str | None = None
    session: str | None = None
    exit_code: int | None = None
    commit: str | None = None
    cancel: bool = False
    started: float | None = None
    ended: float | None = None
    logs: dict[int, list[str]] = dataclasses.field(default_factory=dict)  # attempt to messages
    log_bytes: int = 0
    holder: str | None = None  # session that holds it, for all that the controller knows
    since: float = 0.0  # start of its lease
    deadline: float = 0.0  # when the controller ends it itself
    answered: bool = False  # the answer that carried it was written, or could not be

    @property
    def key(self) -> tuple[str, int]:
        return self.id, self.attempt

    @property
    def is_open(self) -> bool:
        return self.status not in ENDED

    def row(self) -> tuple[Any, ...]:
        """As ROW selects it."""
        stamp = [None if at is None else deploybot.rfc3339(at) for at in (self.started, self.ended, self.queued)]
        return (
            *(self.id, self.repo, self.ref, self.host, self.app, self.status, self.reason, None, self.attempt, self.retries),
            *(
                self.timeout,
                self.created_by,
                self.agent,
                self.session,
                self.exit_code,
                self.commit,
                self.retry_of,
                int(self.cancel),
            ),
            *stamp,
        )

    def end(self, status: str, reason: str | None, now: float, exit_code: int | None = None) -> None:
        self.status, self.reason, self.ended, self.exit_code = status, reason, now, exit_code

    def close(self, reason: str, now: float) -> None:
        """Its agent has lost it: the next attempt, where there is one."""
        if self.attempt <= self.retries and not self.cancel:
            HAPPENED["requeue"] += 1
            self.status, self.queued, self.started, self.agent, self.session, self.commit = ("pending", now, None, None, None, None)
        else:
            HAPPENED[reason] += 1
            self.end("failed", reason, now)

    def claim(self, host: Host, now: float) -> None:
        HAPPENED["claim"] += 1
        self.status, self.attempt, self.started, self.agent = "running", self.attempt + 1, now, host.id
        self.session = self.holder = host.session
        self.since, self.deadline, self.answered = now, now + self.timeout + GRACE, False


ROW = (
    "SELECT id, repo, ref, host, app, status, reason, hold, attempt, retries, timeout, created_by, assigned_agent, session,"
    ' exit_code, "commit", retry_of, cancel_requested_at IS NOT NULL, started_at, completed_at, queued_at FROM jobs ORDER BY id'
)


@dataclasses.dataclass
class Host:
    id: str
    session: str
    slots: int
    secret: str | None  # that it is bound to
    drained: bool = False
    contact: float = 0.0
    online: bool | None = True  # None: after a restart, until it is heard again


@dataclasses.dataclass
class Script:
    """What an agent runs for one attempt."""

    lines: list[str] = dataclasses.field(default_factory=list)
    acknowledged: int = 0
    result: dict[str, Any] | None = None


class Agent:
    """An agent as design.md wants it: starts no (job, attempt) twice, names all whose end is not acknowledged."""

    def __init__(self, host: str, slots: int):
        self.host, self.slots = host, slots
        self.secret = f"dbt_secret_of_{host}"
        self.id = self.session = ""
        self.scripts: dict[tuple[str, int], Script] = {}
        self.started: set[tuple[str, int]] = set()

    def running(self) -> list[dict[str, Any]]:
        return [{"job_id": job_id, "attempt": attempt} for job_id, attempt in self.scripts]


class Op(NamedTuple):
    """A call and what it has to do to the model."""

    ask: Callable[[], Any]
    told: Callable[[Any], Any]  # judges the answer, and changes the model
    kept: Callable[[int], Any]  # changes the model where there was no answer, after so many COMMITs
    received: Callable[[Any], Any] = lambda answer: None  # the answer arrived
    claims_for: str = ""  # the host that a heartbeat may claim for


# At any statement; the COMMIT and the first ones more often, as most calls have but a few.
HIT = st.tuples(st.sampled_from(("crash", "full")), st.one_of(st.just(AT_COMMIT), st.integers(1, 4), st.integers(1, 22)))
FAULT = st.one_of(st.none(), st.none(), st.none(), st.none(), HIT)
ANY = st.integers(0, 23)  # chooses one of those that are there
FATE = st.sampled_from(("arrives", "arrives", "arrives", "lost"))
RESULTS = (
    {"status": "success", "exit_code": 0},
    {"status": "failed", "exit_code": 3},
    {"status": "failed", "reason": "fetch_failed"},
    {"status": "failed", "reason": "timeout"},
    {"status": "cancelled"},
)


class Machine(RuleBasedStateMachine):
    """One life of a controller, its agents and its people."""

    folder = pathlib.Path(tempfile.gettempdir())

    def __init__(self) -> None:
        super().__init__()
        HAPPENED["examples"] += 1
        self.clock = FakeClock()
        self.here = pathlib.Path(tempfile.mkdtemp(dir=self.folder))
        self.subject = Subject(self.here, self.clock, APPS, SETTINGS)
        self.subject.faults.happened = HAPPENED
        self.jobs: dict[str, Job] = {}  # in the order of their making
        self.hosts: dict[str, Host] = {}
        self.agents: list[Agent] = []  # that live, older sessions too
        self.late: list[tuple[Agent, Answer]] = []  # answers that are not written yet
        self.starts: collections.Counter[tuple[str, int]] = collections.Counter()  # the ledger of scripts
        self.pushes: list[dict[str, Any]] = []
        self.swept = self.now
        self.numbers = itertools.count(1)
        self.lenient: set[str] | None = None  # jobs that a call in the same commit may have changed
        # What the checks remember of the database.
        self.position = 0
        self.history: dict[str, list[tuple[str, int]]] = {}
        self.stored: dict[tuple[str, int], list[str]] = {}
        self.frozen: dict[str, tuple[Any, ...]] = {}

    @property
    def now(self) -> float:
        return self.clock.at

    # -- how a call is made ---------------------------------------------------------------------------------------

    def make(self, op: Op, fault: tuple[str, int] | None = None, fate: str = "arrives") -> None:
        """One call, with the fault that may hit it."""
        HAPPENED["calls"] += 1
        faults = self.subject.faults
        faults.arm(fault)
        try:
            answer = op.ask()
        except Crash:
            self.crashed(op)
            return
        finally:
            fired, commits = faults.fired, faults.commits
            faults.arm(None)
        if fired:
            HAPPENED["disk full"] += 1
            check(answer is None or answer.status == 503, "a full disk is answered with 503, not", answer)
            op.kept(commits)
            return
        op.told(answer)
        if fate == "arrives":
            op.received(answer)
        else:
            HAPPENED["lost answer"] += 1

    def crashed(self, *ops: Op) -> None:
        commits = self.subject.faults.commits
        self.subject.faults.arm(None)
        HAPPENED["crash"] += 1
        self.subject.crash()
        for op in ops:
            op.kept(commits)
        self.restarted()

    def restarted(self) -> None:
        """Every lease starts anew, and what was said to nobody counts as said."""
        self.late.clear()
        for job in self.jobs.values():
            job.holder, job.since, job.answered = job.session, self.now, True
            job.deadline = (job.started or 0) + job.timeout + GRACE
        for host in self.hosts.values():
            host.online = None
        self.position, self.swept = 0, self.now

    # -- what the model says -----------------------------------------------------------------------------------------

    def running_on(self, host: str) -> list[Job]:
        return [job for job in self.jobs.values() if job.status == "running" and job.host == host]

    def claimable(self, host: str, only: str = "") -> Job | None:
        """The oldest that waits and whose app does not run there; `only`: that one, if it is one of them."""
        busy = {job.app for job in self.running_on(host)}
        waiting = (job for job in self.jobs.values() if job.status == "pending" and job.host == host and job.app not in busy)
        return next((job for job in waiting if only in ("", job.id)), None)

    def same(self, repo: str, ref: str, host: str, app: str) -> list[Job]:
        wanted = (repo, ref, host, app)
        found = (job for job in self.jobs.values() if (job.repo, job.ref, job.host, job.app) == wanted)
        return [job for job in found if job.is_open and not job.cancel]

    def row_of(self, job_id: str) -> tuple[Any, ...]:
        return next(row for row in self.subject.rows(ROW) if row[0] == job_id)

    def differ(self, jobs: Iterable[Job]) -> list[Job]:
        """Those that the database has otherwise than the model."""
        rows = {row[0]: row for row in self.subject.rows(ROW)}
        return [job for job in jobs if rows[job.id] != job.row()]

    def new_ids(self, count: int) -> list[str]:
        """The oldest that the model does not know; of two calls in one commit each takes its own, and invariant 1 sees what is left."""
        found = [row[0] for row in self.subject.rows(ROW) if row[0] not in self.jobs]
        holds(1, len(found) >= count, "made", found, "where", count, "were to be made")
        return found[:count]

    def add(self, job_id: str, repo: str, ref: str, host: str, app: str, by: str, **more: Any) -> Job:
        retries, timeout = DEFAULTS[app]
        holds(8, job_id > max(self.jobs, default=""), "ids are in the order of creation")
        job = Job(job_id, repo, ref, host, app, retries, timeout, by, self.now)
        for name, value in more.items():
            if value is not None:
                setattr(job, name, value)
        self.jobs[job_id] = job
        return job

    # -- people ------------------------------------------------------------------------------------------------------

    def submit_op(self, repo: str, ref: str, host: str, force: bool, retries: int | None, timeout: int | None) -> Op:
        app = {"myorg/web": "web", "myorg/api": "api"}.get(repo, "myorg--other")
        asked = {"repo": repo, "ref": ref, "host": host, "force": force, "retries": retries, "timeout": timeout}

        def change(job_id: Callable[[], str]) -> None:
            self.add(job_id(), repo, ref, host, app, "admin", forced=force, retries=retries, timeout=timeout)

        def told(answer: Answer) -> None:
            before = [] if force else self.same(repo, ref, host, app)
            holds(1, answer.status == 201, answer)
            holds(7, answer.body["created"] == (not before), "created", answer.body, "though there is", before)
            HAPPENED["forced duplicate"] += force and bool(self.same(repo, ref, host, app))
            if before:
                HAPPENED["duplicate answered"] += 1
                holds(7, answer.body["job"]["id"] in [job.id for job in before], answer.body, before)
            else:
                change(lambda: answer.body["job"]["id"])

        def kept(commits: int) -> None:
            if commits and (force or not self.same(repo, ref, host, app)):
                change(lambda: self.new_ids(1)[0])

        return Op(lambda: self.subject.ask("POST", "/v1/jobs", asked), told, kept)

    def cancel_op(self, job: Job) -> Op:
        def change() -> int:
            if job.status == "cancelled" or (job.status == "running" and job.cancel):
                return 200
            if not job.is_open:
                return 409
            job.cancel = True
            if job.status == "pending":
                job.end("cancelled", "cancelled", self.now)
            else:
                HAPPENED["cancel of a running job"] += 1
            return 200

        def told(answer: Answer) -> None:
            before = job.row()
            expected = change()
            holds(2, answer.status == expected, "cancel of", before, "answered", answer)
            if expected == 200:
                holds(1, answer.body["job"]["status"] == job.status, answer, job)

        return Op(
            lambda: self.subject.ask("POST", f"/v1/jobs/{job.id}/cancel"), told, lambda commits: change() if commits else None
        )

    def is_overtaken(self, job: Job) -> bool:
        """By a success that was asked for after it."""
        sql = f"SELECT 1 FROM releases WHERE app = '{job.app}' AND host = '{job.host}' AND job_id > '{job.id}'"
        return bool(self.subject.rows(sql))

    def retry_op(self, job: Job) -> Op:
        was_overtaken = self.is_overtaken(job)

        def change(job_id: Callable[[], str]) -> None:
            HAPPENED["retry"] += 1
            more = {"retry_of": job.id, "retries": job.retries, "timeout": job.timeout}
            self.add(job_id(), job.repo, job.ref, job.host, job.app, "admin", **more)

        def told(answer: Answer) -> None:
            before = self.same(job.repo, job.ref, job.host, job.app)
            expected = job.is_open or self.is_overtaken(job) if answer.status == 409 else not (job.is_open or was_overtaken)
            holds(2, answer.status in (201, 409) and expected, "retry of", job, "answered", answer)
            if answer.status == 201:
                holds(7, answer.body["created"] == (not before), answer.body, before)
                if not before:
                    change(lambda: answer.body["job"]["id"])

        def kept(commits: int) -> None:
            if commits and not job.is_open and not self.same(job.repo, job.ref, job.host, job.app):
                change(lambda: self.new_ids(1)[0])

        return Op(lambda: self.subject.ask("POST", f"/v1/jobs/{job.id}/retry"), told, kept)

    def push_op(self, push: dict[str, Any]) -> Op:
        """Two jobs, or none, in one transaction with the delivery and its place among the pushes."""
        body = json.dumps(push["event"]).encode()
        headers = {
            "x_github_event": "push", "x_github_delivery": push["id"], "x_hub_signature_256": deploybot.signature_of(SECRET, body)
        }  # fmt: skip

        def change(ids: list[str]) -> None:
            push["made"] = ids
            HAPPENED["push"] += 1
            older = [self.jobs[job_id] for one in self.pushes for job_id in one["made"] or () if job_id not in ids]
            for job_id, host in zip(ids, ("web-01", "web-02"), strict=True):
                self.add(job_id, "myorg/web", push["event"]["after"], host, "web", "github")
            for job in older:
                if job.status == "pending":  # latest wins
                    HAPPENED["superseded"] += 1
                    job.end("cancelled", "superseded", self.now)

        def is_late() -> bool:
            at = push["event"]["repository"]["pushed_at"]
            return any(one["made"] and one["event"]["repository"]["pushed_at"] > at for one in self.pushes)

        def told(answer: Answer) -> None:
            holds(1, answer.status == 200, answer)
            ids = answer.body["jobs_created"]
            if push["made"] is not None:
                HAPPENED["push repeated"] += 1
                holds(7, ids == push["made"], "a repeated push gets the first one's answer", push["made"], answer)
            elif is_late():
                HAPPENED["push out of order"] += 1
                holds(7, ids == [], "a push that came late replaces nothing", answer)
                push["made"] = []
            else:
                holds(1, len(ids) == 2, answer)
                change(ids)

        def kept(commits: int) -> None:
            if commits and push["made"] is None:
                push["made"] = []
                if not is_late():
                    change(self.new_ids(2))

        return Op(lambda: self.subject.ask("POST", "/v1/webhooks/github", body, **headers), told, kept)

    def host_op(self, method: str, name: str, action: str) -> Op:
        def change() -> int:
            host = self.hosts.get(name)
            if host is None:
                return 404
            if action == "remove":
                if self.running_on(name):
                    return 409
                HAPPENED["host removed"] += 1
                del self.hosts[name]
            elif action == "reset":
                HAPPENED["host reset"] += 1
                host.secret, host.session, host.online = None, "", None
            else:
                HAPPENED["drain"] += action == "drain"
                host.drained = action == "drain"
            return 200

        path = f"/v1/hosts/{name}" + ("" if action == "remove" else f"/{action}")
        return Op(
            lambda: self.subject.ask(method, path),
            lambda answer: check(answer.status == change(), action, name, answer),
            lambda commits: change() if commits else None,
        )

    # -- agents ------------------------------------------------------------------------------------------------------

    def register_op(self, agent: Agent) -> Op:
        body = {"hostname": agent.host, "slots": agent.slots, "token_sha256": sha256(agent.secret)}

        def change(agent_id: str, session: str) -> None:
            old = self.hosts.get(agent.host)
            holds(3, old is None or old.id == agent_id, "the same host name keeps its id")
            holds(3, old is None or old.session != session, "each registration is a new session")
            drained = old.drained if old else False
            self.hosts[agent.host] = Host(agent_id, session, agent.slots, agent.secret, drained, self.now)

        def told(answer: Answer) -> None:
            check(answer.status == 200, "register", answer)
            change(answer.body["id"], answer.body["session"])

        def kept(commits: int) -> None:
            if commits:
                change(*self.subject.rows("SELECT id, session FROM agents WHERE hostname = ?", agent.host)[0])

        def received(answer: Answer) -> None:
            agent.id, agent.session = answer.body["id"], answer.body["session"]

        return Op(lambda: self.subject.ask("POST", "/v1/agents/register", body, ENROLMENT), told, kept, received)

    def refusal(self, agent: Agent) -> tuple[int, ...]:
        """The statuses of a heartbeat that is refused; none for the session that counts."""
        host = self.hosts.get(agent.host)
        if host is None or host.secret != agent.secret:
            return (401, 429)
        if host.id != agent.id:
            return (404,)
        return () if host.session == agent.session else (409,)

    def to_close(self, host: str, running: set[tuple[str, int]]) -> list[Job]:
        """What an older session of the agent held, and the new one does not name."""
        session = self.hosts[host].session
        return [job for job in self.running_on(host) if job.holder != session and job.key not in running]

    def heartbeat_op(self, agent: Agent, says_running: bool, status: str, connected: bool) -> Op:
        listed = agent.running()
        body: dict[str, Any] = {"status": status, "session": agent.session}
        if says_running:
            body["running"] = listed
        running = {(one["job_id"], one["attempt"]) for one in listed}

        def settle(commits: int | None) -> int:
            """The closings that have happened; how many COMMITs are left to explain."""
            host = self.hosts[agent.host]
            # What comes when its client has gone brings back nobody who has said farewell.
            host.contact, host.online = self.now, status == "online" and (host.online is not False or connected)
            if not says_running:
                return commits or 0
            closings = self.to_close(agent.host, running)
            if commits is not None and commits < len(closings):
                closings = self.differ(closings)
                holds(2, len(closings) == commits, commits, "COMMITs closed", closings)
            for job in closings:
                job.close("agent_crashed", self.now)
            for job in self.running_on(agent.host):
                if job.key in running:
                    job.holder = host.session
            return (commits or 0) - len(closings)

        def undelivered() -> list[Job]:
            if not says_running or status != "online":
                return []
            return [job for job in self.running_on(agent.host) if job.answered and job.key not in running]

        def told(answer: Answer) -> None:
            refused = self.refusal(agent)
            if refused:
                HAPPENED["older session refused"] += answer.status == 409
                holds(3, answer.status in refused, "a heartbeat that does not count was answered", answer)
                return
            holds(6, answer.status == 200, answer)
            settle(None)
            given = answer.body["job"]
            lost = undelivered()
            again = [job for job in lost if not job.cancel]
            dropped = [job for job in lost if job.cancel]
            if again:
                dropped = self.differ(dropped)  # those that it came to before
            for job in dropped:  # it never arrived, so nothing has to be stopped
                HAPPENED["cancel of a lost job"] += 1
                job.end("cancelled", "cancelled", self.now)
            if again:
                self.judge_redelivery(given, again)
            else:
                self.judge_claim(agent, answer, max(len(running), 0) if says_running else 0, status == "online" and connected)
            self.judge_stops(agent, answer, running if says_running else set())
            HAPPENED["client gone"] += not connected
            if not connected:
                self.write(agent, answer, "lost")

        def kept(commits: int) -> None:
            if self.refusal(agent):
                return
            left = settle(commits)
            if left > 0 and (dropped := self.differ([job for job in undelivered() if job.cancel])):
                for job in dropped:
                    job.end("cancelled", "cancelled", self.now)
                left -= len(dropped)
            if left > 0:
                job = self.claimable(agent.host)
                holds(3, job is not None, "a COMMIT that nothing explains")
                job.claim(self.hosts[agent.host], self.now)
            for job in self.running_on(agent.host):  # of those that it came to before, memory knows the newer session
                lease = self.subject.daemon.jobs._leases.get(job.host, {}).get(job.id)
                job.holder = lease.session if lease else job.session

        path = f"/v1/agents/{agent.id}/heartbeat"
        return Op(
            lambda: self.subject.ask("POST", path, body, agent.secret, connected),
            told, kept, lambda answer: self.write(agent, answer, "arrives") if connected else None, agent.host,
        )  # fmt: skip

    def judge_redelivery(self, given: dict[str, Any] | None, lost: list[Job]) -> None:
        holds(6, given is not None, "jobs whose answers were lost were not delivered again:", lost)
        job = next((job for job in lost if job.id == given["id"]), None)
        holds(6, job is not None, "delivered", given["id"], "though these were lost:", lost)
        holds(6, given["attempt"] == job.attempt, "a redelivery has the same attempt", given["attempt"], job)
        HAPPENED["redelivery"] += 1
        job.answered = False

    def judge_claim(self, agent: Agent, answer: Answer, holding: int, takes: bool) -> None:
        host, given = self.hosts[agent.host], answer.body["job"]
        room = not host.drained and max(len(self.running_on(agent.host)), holding) < host.slots
        job = self.claimable(agent.host) if takes and room else None
        if given is None:
            # News of what to stop may come without a job: the next heartbeat gets that.
            holds(8, job is None or answer.body["cancel"], "a job that waits was not handed out:", job)
            return
        holds(3, takes and room, "handed out", given["id"], "to an agent that takes none:", host)
        if self.lenient is not None:  # it looked while the other call of its commit had not happened yet: another app was busy
            job = self.claimable(agent.host, given["id"])
        holds(8, job is not None and given["id"] == job.id, "handed out", given["id"], "where the oldest is", job)
        holds(4, given["attempt"] == job.attempt + 1, "a new delivery has the next attempt", given["attempt"], job)
        job.claim(host, self.now)

    def judge_stops(self, agent: Agent, answer: Answer, running: set[tuple[str, int]]) -> None:
        mine = self.running_on(agent.host)
        stops = {job.id for job in mine if job.cancel} | {key[0] for key in running - {job.key for job in mine}}
        said = set(answer.body["cancel"])
        holds(4, not (said ^ stops) - (self.lenient or set()), "to stop:", stops, "told:", said)

    def write(self, agent: Agent, answer: Answer, fate: str) -> None:
        """The answer to a heartbeat is written now: it arrives, or is lost on its way."""
        answer.sent()
        given = answer.body.get("job")
        job = self.jobs[given["id"]] if given else None
        if job and job.status == "running" and job.attempt == given["attempt"]:
            job.answered = True
        if fate == "lost":
            HAPPENED["lost answer"] += 1
            return
        if answer.status == 409:  # a newer agent has this host: this one ends, and its scripts with it
            self.agents.remove(agent)
        elif given:
            key = (given["id"], given["attempt"])
            holds(5, key not in agent.started, "the same attempt was delivered to an agent that has started it:", key)
            agent.started.add(key)
            agent.scripts[key] = Script()
            self.starts[key] += 1

    def logs_op(self, agent: Agent, key: tuple[str, int], offset: int, lines: list[str], commit: str | None) -> Op:
        job, attempt = self.jobs[key[0]], key[1]
        body = {"attempt": attempt, "offset": offset, "lines": [{"message": line} for line in lines], "commit": commit}

        def change() -> tuple[int, int | None]:
            """(status, next offset)."""
            if job.status != "running" or job.attempt != attempt:
                HAPPENED["stale log refused"] += 1
                return 409, None
            stored = job.logs.setdefault(attempt, [])
            end, last = len(stored), offset + len(lines)
            is_full = end > 0 and job.log_bytes > LOG_LIMIT  # it said so already
            if offset > end and not is_full:
                HAPPENED["log gap refused"] += 1
                return 409, end
            job.commit = commit or job.commit
            HAPPENED["log lines sent again"] += bool(lines) and offset < end
            for line in [] if is_full else lines[end - offset :]:
                if job.log_bytes + len(line) + 1 > LOG_LIMIT:
                    HAPPENED["log limit reached"] += 1
                    job.log_bytes = LOG_LIMIT + 1
                    stored.append(f"[the log of this job has reached its limit of {LOG_LIMIT} bytes: what follows is not kept]")
                    break
                job.log_bytes += len(line) + 1
                stored.append(line)
            return 200, max(end, last)

        def told(answer: Answer) -> None:
            if self.speaks_for(agent, job, answer):
                before = job.status, job.attempt
                status, offset = change()
                holds(4, answer.status == status, "logs of attempt", attempt, "while", before, "answered", answer)
                holds(9, answer.body.get("next_offset") == offset, "next offset", offset, "answered", answer)
                if status == 200:
                    holds(4, answer.body["cancel"] == job.cancel, "the cancel that was asked for", answer, job)

        def received(answer: Answer) -> None:
            if answer.status == 200:
                agent.scripts[key].acknowledged = min(answer.body["next_offset"], len(agent.scripts[key].lines))
            elif answer.status == 409 and "next_offset" not in answer.body:
                agent.scripts.pop(key, None)  # it is ended

        return Op(
            lambda: self.subject.ask("POST", f"/v1/jobs/{job.id}/logs", body, agent.secret),
            told, lambda commits: change() if commits and self.may_speak(agent, job) else None, received,
        )  # fmt: skip

    def result_op(self, agent: Agent, key: tuple[str, int], result: dict[str, Any]) -> Op:
        job, attempt = self.jobs[key[0]], key[1]
        default = {"failed": "exit_code", "cancelled": "cancelled"}.get(result["status"])
        told_so = (attempt, result["status"], result.get("reason") or default, result.get("exit_code"))

        def change() -> int:
            if (job.attempt, job.status, job.reason, job.exit_code) == told_so:
                HAPPENED["result repeated"] += 1
                return 200
            if job.status != "running" or job.attempt != attempt:
                HAPPENED["stale result refused"] += 1
                return 409
            job.end(told_so[1], told_so[2], self.now, told_so[3])
            return 200

        def told(answer: Answer) -> None:
            if self.speaks_for(agent, job, answer):
                before = job.status, job.reason, job.attempt
                expected = change()
                holds(4, answer.status == expected, "result", told_so, "while", before, "answered", answer)

        def received(answer: Answer) -> None:
            if answer.status in (200, 409):
                agent.scripts.pop(key, None)

        return Op(
            lambda: self.subject.ask("POST", f"/v1/jobs/{job.id}/result", {"attempt": attempt, **result}, agent.secret),
            told, lambda commits: change() if commits and self.may_speak(agent, job) else None, received,
        )  # fmt: skip

    def may_speak(self, agent: Agent, job: Job) -> bool:
        return agent.host in self.hosts and self.hosts[agent.host].secret == agent.secret and job.host == agent.host

    def speaks_for(self, agent: Agent, job: Job, answer: Answer) -> bool:
        """Whether the agent's secret counts for this job; where not, nothing may change."""
        if self.may_speak(agent, job):
            return True
        host = self.hosts.get(agent.host)
        known = host is not None and host.secret == agent.secret
        HAPPENED["foreign host refused"] += known
        holds(4, answer.status in ((403,) if known else (401, 429)), "somebody else's word was taken:", answer)
        return False

    def sweep_op(self) -> Op:
        def overdue() -> list[tuple[Job, str]]:
            found = []
            for job in self.jobs.values():
                if job.status != "running":
                    continue
                host = self.hosts.get(job.host)
                quiet = self.now - max(job.since, host.contact if host else 0.0)
                if self.now > job.deadline:
                    found.append((job, "timeout"))
                elif quiet > LOST_AFTER:
                    found.append((job, "agent_lost"))
            return found

        def change(commits: int | None) -> None:
            away, self.swept = self.now - self.swept, self.now
            for job in self.jobs.values():
                if away > deploybot.LONG_SWEEP:  # the controller was stopped: nobody could reach it, so nobody is lost
                    job.since, job.deadline = self.now, job.deadline + away
            closings = overdue()
            expired = [j for j in self.jobs.values() if j.status == "pending" and j.queued < self.now - PENDING_EXPIRY]
            done = {job.id for job, _ in closings}
            if commits is not None and commits < len(closings):
                done = {job.id for job in self.differ(job for job, _ in closings)}
                holds(2, len(done) == commits, commits, "COMMITs closed", done)
            for job, reason in closings:
                if job.id in done and reason == "timeout":
                    HAPPENED["timeout"] += 1
                    job.end("failed", "timeout", self.now)
                elif job.id in done:
                    job.close(reason, self.now)
            if commits is None or commits > len(closings):
                for job in expired:
                    HAPPENED["expired"] += 1
                    job.end("cancelled", "expired", self.now)

        return Op(self.subject.sweep, lambda answer: change(None), change)

    # -- rules -------------------------------------------------------------------------------------------------------

    def pick(self, which: int, among: Iterable[Any]) -> Any:
        found = list(among)
        return found[which % len(found)] if found else None

    @initialize(hosts=st.integers(1, len(HOSTS)), slots=st.integers(1, 2))
    def first_agents(self, hosts: int, slots: int) -> None:
        for host in HOSTS[:hosts]:
            self.agents.append(Agent(host, slots))
            self.make(self.register_op(self.agents[-1]))

    @rule(
        repo=st.sampled_from(("myorg/web", "myorg/api", "myorg/other")), ref=st.sampled_from(("main", "dev")),
        host=st.sampled_from(HOSTS), force=st.booleans(), retries=st.sampled_from((None, None, 0, 2)),
        timeout=st.sampled_from((None, None, 30)), fault=FAULT,
    )  # fmt: skip
    def submit(self, fault: Any, **asked: Any) -> None:
        self.make(self.submit_op(**asked), fault)

    @rule(
        repo=st.sampled_from(("myorg/web", "myorg/api", "myorg/other")), which=ANY, retries=st.sampled_from((None, 0, 2)),
        fate=st.sampled_from(("arrives", "arrives", "arrives", "lost", "late")),
        then=st.sampled_from(("", "", "it asks again", "it asks again", "cancelled", "silent", "controller stopped", "disk fails")), fault=FAULT,
    )  # fmt: skip
    def run_a_job(self, repo: str, which: int, retries: int | None, fate: str, then: str, fault: Any) -> None:
        """What most days are made of: a job is asked for, an agent that is well takes it (or what waits before it), and what comes then."""
        agent = self.pick(which, [agent for agent in self.agents if agent.id and not self.refusal(agent)])
        if agent is None:
            return
        self.make(self.submit_op(repo, f"run-{next(self.numbers)}", agent.host, False, retries, None))
        self.beat(agent, True, "online", "lost" if then == "disk fails" else fate, None)
        if then == "disk fails":  # at the first statement of the call that would bring it again
            fault = ("full", 1)
        if then in ("silent", "controller stopped"):
            self.clock.advance(LOST_AFTER + 1)
            self.sweep(then != "silent", fault)
        elif then:
            for job in self.running_on(agent.host) if then == "cancelled" else ():
                self.make(self.cancel_op(job))
            self.beat(agent, True, "online", "arrives", fault)

    @precondition(lambda self: self.jobs)
    @rule(which=ANY, force=st.booleans(), fault=FAULT)
    def submit_again(self, which: int, force: bool, fault: Any) -> None:
        """The same as one that there is: it may be open, to be cancelled, or over."""
        job = self.pick(which, self.jobs.values())
        self.make(self.submit_op(job.repo, job.ref, job.host, force, None, None), fault)

    @precondition(lambda self: self.jobs)
    @rule(which=ANY, what=st.sampled_from(("cancel it", "cancel one that runs", "retry")), fault=FAULT)
    def change_job(self, which: int, what: str, fault: Any) -> None:
        running = [job for job in self.jobs.values() if job.status == "running"]
        job = self.pick(which, running if what == "cancel one that runs" and running else self.jobs.values())
        self.make(self.retry_op(job) if what == "retry" else self.cancel_op(job), fault)

    @rule(kind=st.sampled_from(("new", "new", "again", "late")), which=ANY, fault=FAULT)
    def push(self, kind: str, which: int, fault: Any) -> None:
        push = self.pick(which, self.pushes) if kind == "again" else None
        if push is None:
            number = next(self.numbers)
            at = 1_790_000_000 + number - (1000 if kind == "late" else 0)
            repository = {"full_name": "myorg/web", "default_branch": "main", "pushed_at": at}
            event = {"ref": "refs/heads/main", "after": f"{number:040x}", "repository": repository}
            push = {"id": f"delivery-{number}", "event": event, "made": None}
            self.pushes.append(push)
        self.make(self.push_op(push), fault)

    @rule(
        name=st.sampled_from(HOSTS), fault=FAULT,
        what=st.sampled_from(("drain", "resume", "resume", "resume", "resume", "stranger", "stranger", "remove", "reset")),
    )  # fmt: skip
    def change_host(self, name: str, what: str, fault: Any) -> None:
        if what == "stranger":
            self.stranger(name)
        else:
            self.make(self.host_op("DELETE" if what == "remove" else "POST", name, what), fault)

    def stranger(self, host: str) -> None:
        """The enrolment token alone does not take a host over that is bound."""
        if host in self.hosts and self.hosts[host].secret:
            HAPPENED["stranger refused"] += 1
            for more in ({"token_sha256": sha256("another")}, {}):
                answer = self.subject.ask("POST", "/v1/agents/register", {"hostname": host, **more}, ENROLMENT)
                holds(3, answer.status == 409, "a host that is bound was registered anew:", answer)

    @rule(
        host=st.sampled_from(HOSTS), how=st.sampled_from(("restarted", "restarted", "forgetful", "second")),
        slots=st.integers(1, 3), fate=FATE, fault=FAULT,
    )  # fmt: skip
    def start_agent(self, host: str, how: str, slots: int, fate: str, fault: Any) -> None:
        """An agent comes (back): with its journal, without it, or beside one that still runs."""
        old = next((agent for agent in reversed(self.agents) if agent.host == host), None)
        agent = Agent(host, slots)
        if old and how != "second":
            self.agents.remove(old)
        if old and how == "restarted":
            agent.scripts, agent.started = old.scripts, old.started
            for script in agent.scripts.values():  # what it finds in its journal has ended with it
                script.result = script.result or {"status": "failed", "reason": "agent_crashed"}
        self.agents.append(agent)
        self.make(self.register_op(agent), fault, fate)

    @precondition(lambda self: self.agents)
    @rule(
        which=ANY, says_running=st.sampled_from((True, True, True, True, False)), status=st.sampled_from(("online",) * 5 + ("offline",)),
        fate=st.sampled_from(("arrives",) * 4 + ("lost", "late", "gone")), fault=FAULT,
    )  # fmt: skip
    def heartbeat(self, which: int, says_running: bool, status: str, fate: str, fault: Any) -> None:
        self.beat(self.pick(which, self.agents), says_running, status, fate, fault)

    def beat(self, agent: Agent, says_running: bool, status: str, fate: str, fault: Any) -> None:
        if not agent.id:  # its registration was not answered
            self.make(self.register_op(agent), fault)
            return
        op = self.heartbeat_op(agent, says_running, status, connected=fate != "gone")
        if fate == "late":
            op = op._replace(received=lambda answer: self.late.append((agent, answer)))
            HAPPENED["late answer"] += 1
        elif fate == "lost":
            op = op._replace(received=lambda answer: self.write(agent, answer, "lost"))
        self.make(op, fault)

    @rule(fault=FAULT)
    def all_heartbeats(self, fault: Any) -> None:
        for agent in list(self.agents):
            self.beat(agent, True, "online", "arrives", fault)

    @precondition(lambda self: self.late)
    @rule(which=ANY, fate=FATE)
    def write_late_answer(self, which: int, fate: str) -> None:
        """Until now the controller could not know that it was not on its way."""
        agent, answer = self.late.pop(which % len(self.late))
        given = answer.body.get("job")
        is_alive = agent in self.agents
        # An agent has one heartbeat under way: one that sent another has given this one up.
        HAPPENED["redelivery of a late answer"] += bool(given)
        self.write(agent, answer, fate if is_alive and not given else "lost")

    @precondition(lambda self: any(agent.scripts for agent in self.agents))
    @rule(
        which=ANY, new=st.integers(0, 5), how=st.sampled_from(("next", "next", "again", "overlap", "gap")),
        commit=st.booleans(), older=st.sampled_from((0, 0, 0, 1)), fate=FATE, fault=FAULT,
    )  # fmt: skip
    def upload(self, which: int, new: int, how: str, commit: bool, older: int, fate: str, fault: Any) -> None:
        agent, key = self.pick(which, [(agent, key) for agent in self.agents for key in agent.scripts])
        script = agent.scripts[key]
        script.lines += [f"{key[0][-6:]} {key[1]} line {next(self.numbers)}" for _ in range(new)]
        offset = {"again": 0, "overlap": max(0, script.acknowledged - 1), "gap": len(script.lines) + 2}.get(
            how, script.acknowledged
        )
        lines = script.lines[offset:] if how != "gap" else ["after a gap"]
        if key[1] - older >= 1:
            target = (key[0], key[1] - older)
            op = self.logs_op(agent, target, offset, lines, f"{next(self.numbers):040x}" if commit else None)
            self.make(op if not older else op._replace(received=lambda answer: None), fault, fate)

    @precondition(lambda self: any(agent.scripts for agent in self.agents))
    @rule(which=ANY, how=st.integers(0, len(RESULTS) - 1), fate=FATE, fault=FAULT)
    def report(self, which: int, how: int, fate: str, fault: Any) -> None:
        """A script has ended; its result is sent until it is acknowledged."""
        agent, key = self.pick(which, [(agent, key) for agent in self.agents for key in agent.scripts])
        script = agent.scripts[key]
        script.result = script.result or RESULTS[how]
        self.make(self.result_op(agent, key, script.result), fault, fate)

    @precondition(lambda self: self.agents and any(job.attempt for job in self.jobs.values()))
    @rule(which=ANY, whose=ANY, what=st.sampled_from(("logs", "result")), change=st.sampled_from((0, -1, 1)))
    def meddle(self, which: int, whose: int, what: str, change: int) -> None:
        """Any agent speaks for any job that was ever delivered."""
        agent = self.pick(whose, self.agents)
        job = self.pick(which, [job for job in self.jobs.values() if job.attempt])
        key = (job.id, job.attempt + change)
        if key[1] < 1 or (job.host == agent.host and change == 0):
            return
        op = self.logs_op(agent, key, 0, ["meddling"], None) if what == "logs" else self.result_op(agent, key, RESULTS[0])
        self.make(op._replace(received=lambda answer: None))

    @rule(
        seconds=st.sampled_from((1, 1, 5, 31, 61, 61, 89, 179, 179, 601, 601, 3661, 86401)),
        how=st.sampled_from(("awake", "awake", "awake", "stopped", "not swept")), fault=FAULT,
    )  # fmt: skip
    def time_passes(self, seconds: int, how: str, fault: Any) -> None:
        self.clock.advance(seconds)
        if how != "not swept":
            self.sweep(how == "stopped", fault)

    @rule(stopped=st.booleans(), fault=FAULT)
    def sweep(self, stopped: bool, fault: Any) -> None:
        """A leap of the clock between two sweeps is a controller that was stopped. One that was awake has swept every second: those
        sweeps are left out here, as what they would have done this one does."""
        if not stopped:
            self.swept = self.subject.daemon._swept = self.now
        HAPPENED["controller was stopped"] += self.now - self.swept > deploybot.LONG_SWEEP and any(
            job.status == "running" for job in self.jobs.values()
        )
        self.make(self.sweep_op(), fault)

    @rule(crashes=st.booleans())
    def restart(self, crashes: bool) -> None:
        if crashes:
            self.crashed()
        else:
            HAPPENED["stop and start"] += 1
            self.subject.stop_and_start()
            self.restarted()

    @rule(
        first=st.sampled_from(("submit", "cancel", "result", "logs", "heartbeat")), which=ANY,
        second=st.sampled_from(("submit", "cancel", "result", "logs", "heartbeat", "retry")), other=ANY,
        fault=st.one_of(st.none(), st.none(), HIT),
    )  # fmt: skip
    def together(self, first: str, which: int, second: str, other: int, fault: Any) -> None:
        """Two callers whose work one of them commits."""
        ops = [self.op_of(first, which), self.op_of(second, other)]
        if not all(ops) or ops[0].claims_for == ops[1].claims_for != "":  # who of two finds the queue empty says nothing
            return
        if "heartbeat" in (first, second):  # it may write twice
            fault = None
        answers, order, shared = self.subject.in_one_commit([op.ask for op in ops], fault)
        faults = self.subject.faults
        if any(isinstance(answer, Crash) for answer in answers):
            self.crashed(*ops)
        elif faults.fired:
            HAPPENED["disk full"] += 1
            check([answer.status for answer in answers] == [503, 503], "one of two in a commit that failed:", answers)
            faults.arm(None)
        else:
            faults.arm(None)
            HAPPENED["two calls in one commit"] += shared
            self.lenient = set(self.jobs)
            for number in order:
                ops[number].told(answers[number])
            self.lenient = None
            for op, answer in zip(ops, answers, strict=True):
                op.received(answer)

    def op_of(self, kind: str, which: int) -> Op | None:
        """A call that writes once."""
        scripts = [(agent, key) for agent in self.agents for key in agent.scripts if self.may_speak(agent, self.jobs[key[0]])]
        if kind == "submit":
            return self.submit_op(("myorg/web", "myorg/api")[which % 2], "main", HOSTS[which % 3], False, None, None)
        if kind in ("cancel", "retry"):
            job = self.pick(which, self.jobs.values())
            return job and (self.cancel_op(job) if kind == "cancel" else self.retry_op(job))
        if kind == "heartbeat":
            agent = self.pick(which, [agent for agent in self.agents if agent.id and not self.refusal(agent)])
            if agent is None or self.to_close(agent.host, set(agent.scripts)):
                return None
            if any(job.answered and job.key not in agent.scripts for job in self.running_on(agent.host)):
                return None
            return self.heartbeat_op(agent, True, "online", True)
        if not scripts:
            return None
        agent, key = self.pick(which, scripts)
        if kind == "result":
            return self.result_op(agent, key, agent.scripts[key].result or RESULTS[which % len(RESULTS)])
        agent.scripts[key].lines.append(f"line {next(self.numbers)}")
        return self.logs_op(
            agent, key, agent.scripts[key].acknowledged, agent.scripts[key].lines[agent.scripts[key].acknowledged :], None
        )

    # -- the nine ----------------------------------------------------------------------------------------------------

    @invariant()
    def the_nine(self) -> None:
        HAPPENED["steps"] += 1
        seen = Seen(self)
        for number, invariant_of in NINE.items():
            HAPPENED[f"invariant {number}"] += 1
            invariant_of(self, seen)

    def teardown(self) -> None:
        """Each job comes to its end: agents work it off, or time does."""
        try:
            if sys.exc_info()[0] is None:
                self.finish()
        finally:
            self.subject.close()
            shutil.rmtree(self.here, ignore_errors=True)

    def finish(self) -> None:
        while self.late:
            self.write_late_answer(0, "lost")
        if next(self.numbers) % 3:
            HAPPENED["worked off"] += 1
            self.work_off()
        else:
            HAPPENED["timed out"] += 1
            for _ in range(max([job.retries for job in self.jobs.values()], default=0) + 3):
                self.clock.advance(PENDING_EXPIRY + 3600 + GRACE + 1)
                self.sweep(False, None)
                self.the_nine()
        left = [job for job in self.jobs.values() if job.is_open]
        holds(1, not left, "these never end:", left)
        self.crashed()  # and all of it is on the disk
        self.the_nine()
        shown = self.subject.ask("GET", "/v1/jobs")
        holds(1, [job["id"] for job in shown.body["jobs"]] == sorted(self.jobs, reverse=True)[:100], "the list of jobs")

    def work_off(self) -> None:
        self.agents = []
        for name in HOSTS:
            if name in self.hosts:
                self.make(self.host_op("POST", name, "resume"))
            self.agents.append(Agent(name, 1))
            self.make(self.register_op(self.agents[-1]))
        for _ in range(4 * len(self.jobs) + 4):
            for agent in self.agents:
                self.make(self.heartbeat_op(agent, True, "online", True))
                for key in list(agent.scripts):
                    self.make(self.result_op(agent, key, RESULTS[0]))
            self.the_nine()
            if not any(job.is_open for job in self.jobs.values()):
                return


# ---------------------------------------------------------------------------------------------------------------------
# The invariants
# Owns: the nine, each by its number. Ignores: how it came to this state.


class Seen:
    """The state after a step: the database whole, and the memory that is its index."""

    def __init__(self, machine: Machine):
        subject = machine.subject
        self.rows = {row[0]: row for row in subject.rows(ROW)}
        self.whole = {row[0]: row for row in subject.rows("SELECT * FROM jobs")}
        jobs = subject.daemon.jobs
        with jobs._lock:
            leases = [lease for held in jobs._leases.values() for lease in held.values()]
        self.leases = {(lease.job_id, lease.attempt) for lease in leases}
        lanes = subject.daemon.queue._lanes
        self.queue = {host: [entry[0] for entry in lane.waiting] for host, lane in lanes.items() if lane.waiting}
        self._events(machine)

    def _events(self, machine: Machine) -> None:
        """What is new of the events, or all of them after a restart."""
        sql = 'SELECT position, lines, kind, job_id, attempt, "offset", data FROM events WHERE position > ? ORDER BY position'
        if machine.position == 0:
            machine.history.clear()
            machine.stored.clear()
        for position, lines, kind, job_id, attempt, offset, data in machine.subject.rows(sql, machine.position):
            holds(9, position == machine.position + lines, "positions have a gap or a repeat at", position)
            machine.position = position
            if kind == "job":
                shown = json.loads(data)
                machine.history.setdefault(job_id, []).append((shown["status"], shown["attempt"]))
            elif kind == "log":  # deployments are rollout.py's matter
                stored = machine.stored.setdefault((job_id, attempt), [])
                holds(9, offset == len(stored), "lines of", job_id, attempt, "stored at", offset, "after", len(stored))
                stored += [line[0] for line in json.loads(data)]
                holds(9, len(json.loads(data)) == lines, "an upload of", lines)
        holds(9, machine.subject.daemon.hub.head == machine.position, "what is announced is what is committed")


def one(machine: Machine, seen: Seen) -> None:
    """A job whose creation was answered is in the database, and reaches exactly one of three ends."""
    holds(1, seen.rows.keys() == machine.jobs.keys(), "jobs", seen.rows.keys() ^ machine.jobs.keys())
    for row in seen.rows.values():
        status, reason, completed = row[5], row[6], row[19]
        if status in ENDED:
            holds(1, reason in REASONS[status] and completed is not None, row)
        else:
            holds(1, status in ("pending", "running") and reason is None and completed is None, row)


def two(machine: Machine, seen: Seen) -> None:
    """An ended job never changes again; transitions are those of the design."""
    holds(2, not machine.subject.faults.unfenced, "not fenced:", machine.subject.faults.unfenced)
    for job_id, row in seen.whole.items():
        if job_id in machine.frozen:
            holds(2, row == machine.frozen[job_id], "an ended job has changed:", machine.frozen[job_id], row)
        elif seen.rows[job_id][5] in ENDED:
            machine.frozen[job_id] = row
    for job_id, states in machine.history.items():
        holds(2, states[0] == ("pending", 0), job_id, states)
        for (status, attempt), (later, next_attempt) in itertools.pairwise(states):
            holds(2, (later, next_attempt - attempt) in NEXT.get(status, ()), job_id, states)
        holds(2, states[-1] == (seen.rows[job_id][5], seen.rows[job_id][8]), "told:", states, "stored:", seen.rows[job_id])


def three(machine: Machine, seen: Seen) -> None:
    """One agent a job; one job of an app a host; no more jobs than slots."""
    running = [row for row in seen.rows.values() if row[5] == "running"]
    places = [(row[3], row[4]) for row in running]
    holds(3, len(places) == len(set(places)), "two jobs of an app run on a host", running)
    for row in running:
        holds(3, row[12] and row[13], "runs, and nobody has it", row)
    holds(3, seen.leases == {(row[0], row[8]) for row in running}, "leases", seen.leases, "running", running)
    sql = machine.subject.rows("SELECT sql FROM sqlite_master WHERE name = 'jobs_running'")
    holds(3, "UNIQUE" in sql[0][0] and "status = 'running'" in sql[0][0], "the partial unique index is gone", sql)


def four(machine: Machine, seen: Seen) -> None:
    """The attempt is the fencing token: what an older one says changes nothing."""
    for job in machine.jobs.values():
        row = seen.rows[job.id]
        deliveries = sum(later[0] == "running" != state[0] for state, later in itertools.pairwise(machine.history.get(job.id, ())))
        holds(4, row[8] == job.attempt == deliveries, "attempt", row[8], "after", deliveries, "deliveries", job)
        holds(4, (row[8] == 0) <= (row[5] != "running"), row)
        holds(4, all(attempt <= job.attempt for attempt in job.logs), job)


def five(machine: Machine, seen: Seen) -> None:
    """Jobs belong to a host, and none is run twice unasked; a host without contact is shown offline."""
    for job in machine.jobs.values():
        row = seen.rows[job.id]
        holds(5, row[3] == job.host and row[8] <= row[9] + 1, "more attempts than retries allow", row)
        if row[5] == "running":
            holds(5, row[12] == machine.hosts[job.host].id, "held by another host's agent", row)
    twice = [key for key, count in machine.starts.items() if count > 1]
    holds(5, not twice, "scripts that were started twice:", twice)
    shown = {host["hostname"]: host for host in machine.subject.ask("GET", "/v1/hosts").body["hosts"]}
    for name, host in machine.hosts.items():
        online = host.online and machine.now - host.contact <= AGENT_TIMEOUT
        status = shown[name]["agent_status"]
        holds(5, host.online is None or status == ("online" if online else "offline"), name, status, host)


def six(machine: Machine, seen: Seen) -> None:
    """A claim whose answer got lost is not lost: somebody has it, or the next heartbeat gets it again."""
    held = {key for agent in machine.agents for key in agent.scripts}
    under_way = {(answer.body["job"]["id"], answer.body["job"]["attempt"]) for _, answer in machine.late if answer.body.get("job")}
    for job in machine.jobs.values():
        if job.status == "running" and job.key not in held | under_way:
            lease = machine.subject.daemon.jobs._leases.get(job.host, {}).get(job.id)
            holds(6, lease and job.answered and lease.answered is not None, "nobody has it, and nobody will get it:", job)


def seven(machine: Machine, seen: Seen) -> None:
    """The same while one is open gives the one that exists; the job shows its commit."""
    open_ones = [job for job in machine.jobs.values() if job.is_open and not job.cancel and not job.forced]
    keys = collections.Counter((job.repo, job.ref, job.host, job.app) for job in open_ones)
    holds(7, all(count == 1 for count in keys.values()), "two open jobs of the same:", keys)
    for job in machine.jobs.values():
        holds(7, seen.rows[job.id][15] == job.commit, "commit", seen.rows[job.id][15], "is to be", job.commit)


def eight(machine: Machine, seen: Seen) -> None:
    """Nothing is lost over a restart, nor otherwise: the database is the model, and the queue its index in the old order."""
    for job in machine.jobs.values():
        holds(8, seen.rows[job.id] == job.row(), "\n  is     ", seen.rows[job.id], "\n  must be", job.row())
    waiting: dict[str, list[str]] = {}
    for row in sorted(seen.rows.values()):
        if row[5] == "pending":
            waiting.setdefault(row[3], []).append(row[0])
    holds(8, seen.queue == waiting, "queue", seen.queue, "database", waiting)


def nine(machine: Machine, seen: Seen) -> None:
    """A log line that was acknowledged is stored once, in order."""
    expected = {(job.id, attempt): lines for job in machine.jobs.values() for attempt, lines in job.logs.items() if lines}
    holds(9, machine.stored == expected, "stored", machine.stored, "acknowledged", expected)


NINE = {1: one, 2: two, 3: three, 4: four, 5: five, 6: six, 7: seven, 8: eight, 9: nine}


ROUNDS = 4  # of as many examples each, until each kind of event has come


def prove(proof: Proof) -> None:
    logging.disable()
    memory = pathlib.Path("/dev/shm")  # a disk that forgets at a power cut is another proof's matter
    Machine.folder = pathlib.Path(tempfile.mkdtemp(dir=memory)) if memory.is_dir() else proof.folder
    examples, steps = FULL if proof.full else SHORT
    examples = proof.options.examples or examples
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=proof.options.steps or steps,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    try:
        for seed in range(proof.seed, proof.seed + ROUNDS):  # by bad luck one round may leave a rare event out
            run_state_machine_as_test(hypothesis.seed(seed)(Machine), settings=settings)
            missing = [name for name in EXPECTED if not HAPPENED[name]]
            if not missing or proof.options.examples is not None:
                break
        check(not missing or proof.options.examples is not None, "the machine never came to:", missing)
    except Exception as error:
        print("\n".join(getattr(error, "__notes__", ())))  # the shortest steps that lead there
        raise
    finally:
        shutil.rmtree(Machine.folder, ignore_errors=True)
        for name in ("examples", "steps", "calls", *EXPECTED):
            proof.figure(name, HAPPENED[name])
        for number in NINE:
            proof.figure(f"invariant {number}, checks", HAPPENED[f"invariant {number}"])


if __name__ == "__main__":
    numbers = [(flag, {"type": int, "default": None}) for flag in ("--examples", "--steps")]
    sys.exit(run(prove, __doc__, *numbers))
