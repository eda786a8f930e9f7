"""`kill -9` of the controller under load: what it acknowledged is there after each restart, and nothing is handed out twice.

People create, cancel and retry jobs; agents (threads that speak the protocol) take them, send lines, report, and now and then
crash. Each writes into a ledger what the controller acknowledged. The controller is killed at a random moment, at times while
it starts. Between kill and start a copy of the database is held against the ledger; the controller itself recovers from what
the kill left. Short: 8 kills; full: 100.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import random
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from common import LOST, Client, Controller, LightAgent, Proof, check, run, wait_for

HOSTS = tuple(f"web-{number:02}" for number in range(1, 7))
PEOPLE = 3
BACKLOG = 120  # waiting jobs at which people pause, so that the queue is long and yet drains
ENDED = ("success", "failed", "cancelled")
SAME = ("status", "reason", "attempt", "exit_code", "error", "commit", "created_at", "started_at", "completed_at", "retry_of")


def shown(job: dict[str, Any]) -> tuple[Any, ...]:
    """What of an ended job may never change."""
    return tuple(job[name] for name in SAME)


class Facts:
    """What was acknowledged, and what the agents were given."""

    def __init__(self) -> None:
        self.created: dict[str, str] = {}  # job id to host
        self.waiting: set[str] = set()  # of these, the ones that no agent has and that did not end
        self.ended: dict[str, dict[str, Any]] = {}  # job id to the job of the answer
        self.asked: set[str] = set()  # jobs whose cancel was acknowledged while they ran
        self.lines: dict[tuple[str, int], int] = {}  # (job id, attempt) to acknowledged lines
        self.started: dict[tuple[str, int], str] = {}  # (job id, attempt) to host
        self.order: dict[str, list[str]] = {host: [] for host in HOSTS}  # job ids in the order of their first delivery
        self.counts = dict.fromkeys(
            ("lost answers", "crashes of agents", "lines sent again", "retried jobs", "overtaken, so not retried"), 0
        )


class Ledger:
    """One lock over the facts. Its methods raise Failure where the controller contradicts what it said before."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.facts = Facts()

    def snapshot(self) -> Facts:
        with self.lock:
            copy = Facts()
            for name, value in vars(self.facts).items():
                setattr(copy, name, value.copy())
            return copy

    def count(self, name: str, by: int = 1) -> None:
        with self.lock:
            self.facts.counts[name] += by

    def create(self, job: dict[str, Any]) -> None:
        with self.lock:
            facts = self.facts
            known = job["id"] in facts.created or job["id"] in facts.ended or job["attempt"] > 0
            facts.created[job["id"]] = job["host"]
            if not known and not any((job["id"], attempt) in facts.started for attempt in (1, 2, 3)):
                facts.waiting.add(job["id"])

    def end(self, job: dict[str, Any]) -> None:
        with self.lock:
            self.facts.waiting.discard(job["id"])
            before = self.facts.ended.setdefault(job["id"], job)
        check(shown(before) == shown(job), "an ended job changed:", shown(before), shown(job))

    def start(self, host: str, job: dict[str, Any]) -> None:
        """An agent takes it, as it has never seen this attempt."""
        key, order = (job["id"], job["attempt"]), self.facts.order[host]
        check(job["host"] == host, "a job of", job["host"], "was given to", host)
        with self.lock:
            self.facts.waiting.discard(job["id"])
            check(key not in self.facts.started, "given out twice:", key)
            check(job["id"] not in self.facts.ended, "given out after its end:", key)
            check(job["attempt"] == 1 or any((job["id"], n) in self.facts.started for n in range(1, job["attempt"])), key)
            self.facts.started[key] = host
            if job["attempt"] == 1:
                check(not order or order[-1] < job["id"], host, "got", job["id"], "after the younger", order[-1:])
                order.append(job["id"])

    def acknowledge(self, job: dict[str, Any], lines: int) -> None:
        with self.lock:
            self.facts.lines[job["id"], job["attempt"]] = lines


class Load:
    """People and agents, each a thread with a Random of its own."""

    def __init__(self, port: int, seed: int):
        self.port, self.ledger = port, Ledger()
        self.no_more_jobs, self.stopped = threading.Event(), threading.Event()
        self.failures: list[BaseException] = []
        parts = [(self.person, str(number)) for number in range(PEOPLE)] + [(self.agent, host) for host in HOSTS]
        self.threads = [
            threading.Thread(target=self._part, args=(part, name, random.Random(f"{seed} {name}")), daemon=True)
            for part, name in parts
        ]
        for thread in self.threads:
            thread.start()

    def _part(self, part: Callable[[str, random.Random], None], name: str, chance: random.Random) -> None:
        try:
            part(name, chance)
        except BaseException as error:
            self.failures.append(error)

    def insist(self, call: Callable[[], tuple[int, Any]], expected: int) -> Any:
        """Sends it until it is answered; None when the proof ends before that."""
        while not self.stopped.is_set():
            try:
                status, answer = call()
            except LOST:
                self.ledger.count("lost answers")
                self.stopped.wait(0.01)
                continue
            check(status == expected, "answered", status, answer)
            return answer
        return None

    # -- people

    def person(self, name: str, chance: random.Random) -> None:
        client, facts = Client(self.port), self.ledger.facts
        number, last = 0, None
        while not self.no_more_jobs.is_set():
            what = chance.random()
            if what < 0.7:
                if len(facts.waiting) > BACKLOG:
                    time.sleep(0.02)
                    continue
                number += 1
                if last is None or what > 0.1:  # else the same once more: it is the one that waits, or a new one
                    last = {
                        "repo": f"o/n{chance.randrange(3)}", "ref": f"r{name}-{number}", "host": chance.choice(HOSTS),
                        "retries": chance.randrange(3), "metadata": {"person": name, "number": number},
                    }  # fmt: skip
                self.create(client, last)
            elif what < 0.85:
                self.cancel(client, chance)
            else:
                self.retry(client, chance)
        client.close()

    def create(self, client: Client, body: dict[str, Any]) -> None:
        answer = self.insist(lambda: client.call("POST", "/v1/jobs", body), 201)
        if answer:
            check(all(answer["job"][name] == body[name] for name in ("repo", "ref", "host")), "another job:", answer)
            self.ledger.create(answer["job"])

    def cancel(self, client: Client, chance: random.Random) -> None:
        job_id = self._one_of(self.ledger.facts.waiting if chance.random() < 0.5 else self.ledger.facts.created, chance)
        if job_id is None:
            return
        with contextlib.suppress(*LOST):
            status, answer = client.call("POST", f"/v1/jobs/{job_id}/cancel")
            check(status in (200, 409), "cancel answered", status, answer)
            if status == 200 and answer["job"]["status"] == "cancelled":
                self.ledger.end(answer["job"])
            elif status == 200:
                with self.ledger.lock:
                    self.ledger.facts.asked.add(job_id)

    def retry(self, client: Client, chance: random.Random) -> None:
        job_id = self._one_of(self.ledger.facts.ended, chance)
        if job_id is None or len(self.ledger.facts.waiting) > BACKLOG:
            return
        with contextlib.suppress(*LOST):
            status, answer = client.call("POST", f"/v1/jobs/{job_id}/retry")
            if status == 409 and answer["detail"].startswith("a newer "):
                return self.ledger.count("overtaken, so not retried")
            check(status == 201, "retry of an ended job answered", status, answer)
            self.ledger.create(answer["job"])
            self.ledger.count("retried jobs")

    def _one_of(self, ids: Any, chance: random.Random) -> str | None:
        with self.ledger.lock:
            known = sorted(ids)[-200:]
        return chance.choice(known) if known else None

    # -- agents

    def agent(self, host: str, chance: random.Random) -> None:
        agent = LightAgent(self.port, host)
        self.insist(agent.register, 200)
        while not self.stopped.is_set():
            answer = self.insist(lambda: agent.beat(wait=1), 200)
            if answer and answer["job"]:
                self.ledger.start(host, answer["job"])
                self.deploy(agent, answer["job"], chance)
        agent.close()

    def deploy(self, agent: LightAgent, job: dict[str, Any], chance: random.Random) -> None:
        key = (job["id"], job["attempt"])
        said, offset, cancelled = [f"{key[0]}.{key[1]}.{number}" for number in range(chance.randrange(3, 25))], 0, False
        while offset < len(said) and not cancelled:
            if chance.random() < 0.02:  # it crashes: a new session that knows nothing of the job
                self.ledger.count("crashes of agents")
                self.insist(agent.register, 200)
                return
            if chance.random() < 0.2:
                answer = self.insist(lambda: agent.beat([key]), 200)
                check(not answer or answer["job"] is None, "one slot, and yet another job:", answer)
                cancelled = bool(answer) and job["id"] in answer["cancel"]
            first = max(0, offset - chance.choice((0, 0, 0, 2)))  # some lines a second time
            lines = said[first : offset + chance.randrange(1, 9)]
            answer = self.insist(lambda: agent.logs(job, first, lines), 200)  # noqa: B023
            if answer is None:
                return
            check(answer["next_offset"] == first + len(lines), "next_offset", answer, "after", first, len(lines))
            self.ledger.count("lines sent again", offset - first)
            offset, cancelled = answer["next_offset"], answer["cancel"]
            self.ledger.acknowledge(job, offset)
        code = 0 if chance.random() < 0.8 else 3
        how = {"status": "cancelled"} if cancelled else {"status": "failed" if code else "success", "exit_code": code}
        answer = self.insist(lambda: agent.result(job, **how), 200)
        if answer:
            check(answer["job"]["status"] == how["status"], "reported", how, "answered", answer)
            self.ledger.end(answer["job"])

    # -- the end

    def watch(self) -> None:
        if self.failures:
            raise self.failures[0]

    def end(self) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join(60)
            check(not thread.is_alive(), "a thread hangs:", thread)
        self.watch()


# ---------------------------------------------------------------------------------------------------------------------
# The database against the ledger


def copy_of(database: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Database and WAL as the kill left them; to open the original would clear up what the controller has to recover from."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for suffix in ("", "-wal"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(f"{database}{suffix}", folder / f"copy.db{suffix}")
    return folder / "copy.db"


class Stored:
    """All of a database that the facts are held against."""

    def __init__(self, path: pathlib.Path):
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.row_factory = sqlite3.Row
            self.integrity = [row[0] for row in db.execute("PRAGMA integrity_check")]
            self.jobs = {row["id"]: dict(row) for row in db.execute("SELECT * FROM jobs")}
            self.events = db.execute(
                'SELECT position, lines, kind, job_id, attempt, "offset", data FROM events ORDER BY 1'
            ).fetchall()
            tables = {row[0] for row in db.execute("SELECT name FROM sqlite_schema")}
            sql = "SELECT target FROM audit WHERE action IN ('job.create', 'job.retry')"
            self.audited = [row[0] for row in db.execute(sql)] if "audit" in tables else None

    def logs(self) -> dict[tuple[str, int], list[str]]:
        """(job id, attempt) to its messages, each upload where the one before ended."""
        logs: dict[tuple[str, int], list[str]] = {}
        for event in self.events:
            if event["kind"] == "log":
                log = logs.setdefault((event["job_id"], event["attempt"]), [])
                check(event["offset"] == len(log), "a gap or a repeat in the log of", event["job_id"], event["offset"], len(log))
                log += [line[0] for line in json.loads(event["data"])]
                check(len(log) == event["offset"] + event["lines"], "lines of an event", tuple(event)[:6])
        return logs

    def ends(self) -> dict[str, int]:
        """How often each job's end was announced."""
        ends: dict[str, int] = {}
        for event in self.events:
            if event["kind"] == "job" and json.loads(event["data"])["status"] in ENDED:
                ends[event["job_id"]] = ends.get(event["job_id"], 0) + 1
        return ends


def verify(facts: Facts, stored: Stored) -> None:
    check(stored.integrity == ["ok"], "integrity_check:", stored.integrity)
    lost = facts.created.keys() - stored.jobs.keys()
    check(not lost, len(lost), "acknowledged jobs are not there:", sorted(lost)[:5])
    for job_id, job in facts.ended.items():
        check(shown(stored.jobs[job_id]) == shown(job), "an ended job changed:", shown(job), shown(stored.jobs[job_id]))
    for job_id in facts.asked:
        check(stored.jobs[job_id]["cancel_requested_at"], "an acknowledged cancel is not there:", job_id)
    for (job_id, attempt), host in facts.started.items():
        job = stored.jobs.get(job_id)
        check(job and job["attempt"] >= attempt and job["host"] == host, "given out, and not stored so:", job_id, attempt)
    verify_logs(facts.lines, stored.logs())
    verify_running(stored)
    before = 0
    for event in stored.events:
        check(event["position"] - event["lines"] == before, "positions are not one sequence at", event["position"])
        before = event["position"]
    twice = [job_id for job_id, count in stored.ends().items() if count != 1]
    check(not twice, "ended more than once:", twice[:5])
    if stored.audited is not None:
        check(len(stored.audited) == len(set(stored.audited)), "a job has two audit rows")
        missing = facts.created.keys() - set(stored.audited)
        check(not missing, "acknowledged, and not in the audit log:", sorted(missing)[:5])


def verify_logs(acknowledged: dict[tuple[str, int], int], logs: dict[tuple[str, int], list[str]]) -> None:
    """Each line once and in order; what was acknowledged is there."""
    for key, messages in logs.items():
        check(messages == [f"{key[0]}.{key[1]}.{number}" for number in range(len(messages))], "the log of", key, messages)
    for key, count in acknowledged.items():
        check(len(logs.get(key, ())) >= count, count, "lines of", key, "were acknowledged, stored are", len(logs.get(key, ())))


def verify_running(stored: Stored) -> None:
    running, waiting = set(), set()
    for job in stored.jobs.values():
        place, deployment = (job["host"], job["app"]), (job["repo"], job["ref"], job["host"], job["app"])
        if job["status"] == "running":
            check(place not in running, "two jobs run at once:", place)
            running.add(place)
        if job["status"] in ("pending", "running") and not job["cancel_requested_at"]:
            check(deployment not in waiting, "the same deployment is open twice:", deployment)
            waiting.add(deployment)


# ---------------------------------------------------------------------------------------------------------------------
# The proof


def kill_and_check(proof: Proof, controller: Controller, load: Load) -> Stored:
    controller.kill()
    facts = load.ledger.snapshot()  # what was acknowledged by now was committed before the kill
    stored = Stored(copy_of(controller.db, proof.folder / "copy"))
    verify(facts, stored)
    return stored


def start_killed(controller: Controller, chance: random.Random) -> None:
    """A start that does not get far."""
    controller.begin()
    time.sleep(chance.uniform(0.0, 0.4))
    controller.kill()


def wait_for_acknowledgements(load: Load, more: int) -> None:
    def done() -> int:
        facts = load.ledger.facts
        return len(facts.created) + len(facts.ended) + len(facts.lines)

    wanted = done() + more
    wait_for(lambda: load.failures or done() >= wanted, 60, f"{more} more acknowledgements")
    load.watch()


def prove(proof: Proof) -> None:
    kills, chance = proof.options.kills or (100 if proof.full else 8), proof.chance
    controller = proof.controller()
    load = Load(controller.port, proof.seed)
    starts = 0
    for number in range(kills):
        wait_for_acknowledgements(load, chance.randrange(20, 300))
        kill_and_check(proof, controller, load)
        while chance.random() < 0.2:
            start_killed(controller, chance)
            starts += 1
        controller.start()
        if proof.full and (number + 1) % 10 == 0:
            proof.say(f"{number + 1} kills, {len(load.ledger.facts.created):,} jobs")
    wait_for(lambda: load.failures or load.ledger.facts.asked, 60, "a cancel of a job that runs")
    load.no_more_jobs.set()
    client = controller.client()

    def drained() -> bool:
        load.watch()
        return not any(client.ok("GET", f"/v1/jobs?limit=1&status={status}")["jobs"] for status in ("pending", "running"))

    wait_for(drained, 120, "the end of all jobs")
    load.end()
    stored = kill_and_check(proof, controller, load)
    facts = load.ledger.facts
    left = [job["id"] for job in stored.jobs.values() if job["status"] not in ENDED]
    check(not left and stored.ends().keys() == stored.jobs.keys(), "jobs without an end:", left[:5])
    for job in stored.jobs.values():
        took = job["status"] != "success" or (job["id"], job["attempt"]) in facts.started
        check(took, "ended well, and no agent had it:", job["id"])
    controller.start()
    for job in controller.client().jobs():
        check(job["id"] not in facts.ended or shown(job) == shown(facts.ended[job["id"]]), "an ended job changed:", job)
    check("Traceback" not in controller.said(), "a traceback in", controller.log)
    for name, value in (
        ("kills", kills + 1), ("kills during a start", starts), ("jobs acknowledged", len(facts.created)),
        ("jobs stored", len(stored.jobs)), ("jobs lost", 0), ("attempts given out", len(facts.started)),
        ("given out twice", 0), ("ends acknowledged", len(facts.ended)), ("log lines acknowledged", sum(facts.lines.values())),
        *facts.counts.items(),
    ):  # fmt: skip
        proof.figure(name, value)
    check(len(facts.ended) > kills and facts.lines and facts.asked, "too little happened to prove anything")


if __name__ == "__main__":
    sys.exit(run(prove, __doc__, ("--kills", {"type": int, "help": "how often to kill it [8, 100]"})))
