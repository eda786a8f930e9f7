"""Kills at named points: the worst moments of controller and agent, one by one, and what a restart makes of each.

The programs have no hooks. A wrapper imports one as a module, puts a function that kills its own process in the place of one of
its functions, and runs its main. After the kill the real program starts in the same folder, and must keep what shared/design.md
section 4 promises. Short: most points once; full: all, with each statement of each migration, many
moments of a backup, each step of a restore.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import hmac
import json
import pathlib
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from chaos import Agent, Repository
from common import LOST, ROOT, Controller, Failure, LightAgent, Process, Proof, check, environment, run, wait_for
from kill9 import Stored, copy_of

WRAPPER = """\
import os, signal, sys
sys.path.insert(0, {root!r})
sys.dont_write_bytecode, sys.pycache_prefix = False, {cache!r}  # compiled once for all the starts
import {module} as program

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def before(owner, name, nth=1, when=lambda *_, **__: True):
    '''The nth call of owner.name (that `when` counts) is never made.'''
    real, calls = getattr(owner, name), []
    def call(*args, **more):
        if when(*args, **more):
            calls.append(1)
            if len(calls) == nth:
                die()
        return real(*args, **more)
    setattr(owner, name, call)

def after(owner, name, nth=1, when=lambda value: True):
    '''The nth call of owner.name (whose value `when` counts) is made, and nobody learns of it.'''
    real, calls = getattr(owner, name), []
    def call(*args, **more):
        value = real(*args, **more)
        if when(value):
            calls.append(1)
            if len(calls) == nth:
                die()
        return value
    setattr(owner, name, call)

{patch}
sys.exit(program.main(sys.argv[1:]))
"""
SECRET = "It's a Secret to Everybody"
PUSH = {
    "ref": "refs/heads/main", "before": "0" * 40, "after": "1" * 40, "deleted": False,
    "repository": {"full_name": "myorg/app", "default_branch": "main"},
    "head_commit": {"id": "1" * 40, "message": "a change"}, "pusher": {"name": "ada"},
}  # fmt: skip
APPS = [{"name": "app", "repo": "myorg/app", "hosts": ["web-01", "web-02"], "deploy_on_push": True}]


class Stage:
    """A folder, and the processes of one scene in it."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.wrappers = 0
        self.lights: list[LightAgent] = []

    def wrapper(self, module: str, patch: str) -> pathlib.Path:
        self.wrappers += 1
        path = self.folder / f"{module}_{self.wrappers}.py"
        cache = str(self.folder.parent / "pycache")
        path.write_text(WRAPPER.format(root=str(ROOT), cache=cache, module=module, patch=patch))
        return path

    def whole(self, module: str) -> pathlib.Path:
        """The program as it is."""
        return self.wrapper(module, "")

    def controller(self, patch: str, *flags: Any, apps: Any = None) -> Controller:
        """One that will be killed at the point that `patch` names."""
        return Controller(
            self.folder / "controller", *flags, apps={"apps": apps or APPS}, program=self.wrapper("deploybot", patch),
            webhook_secret=SECRET,
        ).start()  # fmt: skip

    def again(self, controller: Controller) -> None:
        """The kill has happened; now the real one, in the same folder. The database is whole."""
        killed(controller)
        stored = Stored(copy_of(controller.db, self.folder / "copy"))
        check(stored.integrity == ["ok"], "integrity_check:", stored.integrity)
        controller.program = self.whole("deploybot")
        controller.start()
        for agent in self.lights:  # their connections died with it
            agent.close()

    def light(self, controller: Controller, host: str = "web-01") -> LightAgent:
        """One that has registered."""
        agent = LightAgent(controller.port, host)
        self.lights.append(agent)
        answered(agent.register())
        return agent


def killed(process: Any, seconds: float = 30) -> None:
    check(process.wait(seconds) == -signal.SIGKILL, "did not die at its point:", process.said()[-2000:])


def no_answer(call: Callable[[], Any]) -> None:
    """The call that the kill came into."""
    try:
        answer = call()
    except LOST:
        return
    raise Failure(f"an answer came before the kill: {answer}")


def answered(call: tuple[int, Any], expected: int = 200) -> Any:
    check(call[0] == expected, "answered", *call)
    return call[1]


def create(controller: Controller, host: str = "web-01", **more: Any) -> dict[str, Any]:
    return answered(controller.call("POST", "/v1/jobs", {"repo": "myorg/app", "ref": "main", "host": host, **more}), 201)


def job_of(controller: Controller, job_id: str) -> dict[str, Any]:
    return answered(controller.call("GET", f"/v1/jobs/{job_id}"))["job"]


def all_jobs(controller: Controller) -> list[dict[str, Any]]:
    return answered(controller.call("GET", "/v1/jobs"))["jobs"]


def taken(agent: LightAgent) -> dict[str, Any]:
    job = answered(agent.beat())["job"]
    check(job, "no job came")
    return job


POINTS: dict[str, Callable[[Stage], None]] = {}
QUICK: list[str] = []  # of these, the ones that `make test` runs
LONG: list[str] = []  # and the ones that the full form alone runs


def point(quick: bool = False, long: bool = False) -> Callable[[Callable[[Stage], None]], Callable[[Stage], None]]:
    def add(play: Callable[[Stage], None]) -> Callable[[Stage], None]:
        POINTS[play.__name__] = play
        QUICK.extend([play.__name__] * quick)
        LONG.extend([play.__name__] * long)
        return play

    return add


# ---------------------------------------------------------------------------------------------------------------------
# The controller: after commit, before answer


@point(quick=True)
def created_and_not_answered(stage: Stage) -> None:
    """The job is there; who asks again gets that one."""
    c = stage.controller("after(program.Jobs, 'submit')")
    no_answer(lambda: create(c))
    stage.again(c)
    (job,) = all_jobs(c)
    again = create(c)
    check((again["created"], again["job"]["id"]) == (False, job["id"]), "asked again:", again)
    check(taken(stage.light(c))["id"] == job["id"], "the agent got another")


@point(long=True)
def created_and_not_committed(stage: Stage) -> None:
    """Nothing of it is there."""
    c = stage.controller("after(program.Jobs, 'add')")
    no_answer(lambda: create(c))
    stage.again(c)
    check(all_jobs(c) == [], all_jobs(c))
    check(create(c)["created"], "a new one is made")


@point(long=True)
def cancelled_and_not_answered(stage: Stage) -> None:
    c = stage.controller("after(program.Jobs, 'cancel')")
    job_id = create(c)["job"]["id"]
    no_answer(lambda: c.call("POST", f"/v1/jobs/{job_id}/cancel"))
    stage.again(c)
    check(job_of(c, job_id)["status"] == "cancelled", job_of(c, job_id))
    answered(c.call("POST", f"/v1/jobs/{job_id}/cancel"))
    check(answered(stage.light(c).beat())["job"] is None, "a cancelled job was given out")


@point()
def cancel_of_a_running_job(stage: Stage) -> None:
    """The agent is told after the restart."""
    c = stage.controller("after(program.Jobs, 'cancel')")
    agent, job_id = stage.light(c), create(c)["job"]["id"]
    job = taken(agent)
    no_answer(lambda: c.call("POST", f"/v1/jobs/{job_id}/cancel"))
    stage.again(c)
    beat = answered(agent.beat([(job_id, 1)], wait=20))
    check(beat["cancel"] == [job_id], "the agent was told", beat)
    check(answered(agent.result(job, "cancelled"))["job"]["status"] == "cancelled", "and reports it")


@point(quick=True)
def push_halfway(stage: Stage) -> None:
    """Delivery and jobs are one transaction: none of it, or all; GitHub's redelivery makes it whole, and once."""
    c = stage.controller("after(program.Jobs, 'add', 1)")
    no_answer(lambda: push(c))
    stage.again(c)
    check(all_jobs(c) == [], "half of a push is stored:", all_jobs(c))
    made = answered(push(c))["jobs_created"]
    check(len(made) == 2 and answered(push(c))["jobs_created"] == made and len(all_jobs(c)) == 2, made, all_jobs(c))


@point()
def push_and_not_answered(stage: Stage) -> None:
    c = stage.controller("after(program.Deployments, 'push')")
    no_answer(lambda: push(c))
    stage.again(c)
    made = {job["id"] for job in all_jobs(c)}
    check(len(made) == 2 and set(answered(push(c))["jobs_created"]) == made and len(all_jobs(c)) == 2, made, all_jobs(c))


def push(controller: Controller) -> tuple[int, Any]:
    body = json.dumps(PUSH).encode()
    signature = "sha256=" + hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
    headers = {"X-GitHub-Event": "push", "X-GitHub-Delivery": "d-1", "X-Hub-Signature-256": signature}
    with contextlib.closing(controller.client(None)) as client:
        return client.call("POST", "/v1/webhooks/github", body, headers)


# ---------------------------------------------------------------------------------------------------------------------
# The controller: a job on its way to the agent and back


@point(long=True)
def claim_and_not_committed(stage: Stage) -> None:
    """The job waits as before, and its first attempt is the first."""
    c = stage.controller("after(program.Jobs, '_claim')")
    agent, job_id = stage.light(c), create(c)["job"]["id"]
    no_answer(agent.beat)
    stage.again(c)
    job = job_of(c, job_id)
    check((job["status"], job["attempt"], job["started_at"]) == ("pending", 0, None), job)
    check(taken(agent)["attempt"] == 1, "attempt 1")


@point(quick=True)
def claim_and_not_sent(stage: Stage) -> None:
    """The same session gets the same attempt, in the order of the queue, and no other agent gets it."""
    c = stage.controller("after(program.Jobs, 'heartbeat', when=lambda order: order[0])")
    agent, job_id = stage.light(c), create(c)["job"]["id"]
    later = create(c, ref="later")["job"]["id"]
    no_answer(agent.beat)
    stage.again(c)
    check(job_of(c, job_id)["status"] == "running", job_of(c, job_id))
    check(answered(stage.light(c, "web-02").beat())["job"] is None, "another host got it")
    job = taken(agent)
    check((job["id"], job["attempt"]) == (job_id, 1), "redelivered:", job)
    check(answered(agent.beat([(job_id, 1)]))["job"] is None, "one at a time")
    answered(agent.result(job))
    check(taken(agent)["id"] == later, "then the next")


@point()
def sent_and_not_noted(stage: Stage) -> None:
    """The agent has it and says so: it goes on, and is not given out again."""
    c = stage.controller("before(program.Jobs, 'delivered')")
    agent, job_id = stage.light(c), create(c)["job"]["id"]
    job = taken(agent)
    stage.again(c)
    beat = answered(agent.beat([(job_id, 1)]))
    check(beat["job"] is None and beat["cancel"] == [], beat)
    check(answered(agent.result(job))["job"]["status"] == "success", "and ends well")


@point()
def claim_and_a_new_session(stage: Stage) -> None:
    """The answer got lost and the agent was restarted too: the attempt is gone, the next one comes where retries say so."""
    c = stage.controller("after(program.Jobs, 'heartbeat', when=lambda order: order[0])")
    agent, first = stage.light(c), create(c, retries=1)["job"]["id"]
    no_answer(agent.beat)
    stage.again(c)
    answered(agent.register())
    job = taken(agent)
    check((job["id"], job["attempt"]) == (first, 2), "the next attempt:", job)
    answered(agent.register())
    check(answered(agent.beat())["job"] is None and job_of(c, first)["reason"] == "agent_crashed", job_of(c, first))


@point(quick=True)
def lines_and_not_answered(stage: Stage) -> None:
    """Sent again, they are stored once."""
    c = stage.controller("after(program.Jobs, 'append_logs', 2)")
    agent = stage.light(c)
    create(c)
    job = taken(agent)
    answered(agent.logs(job, 0, ["one", "two"]))
    no_answer(lambda: agent.logs(job, 2, ["three", "four"]))
    stage.again(c)
    check(answered(agent.logs(job, 2, ["three", "four", "five"]))["next_offset"] == 5, "goes on at 5")
    stored = [line["message"] for line in c.client().lines(job["id"])]
    check(stored == ["one", "two", "three", "four", "five"], stored)


@point(quick=True)
def result_and_not_answered(stage: Stage) -> None:
    """The same again answers the same; another one is refused."""
    c = stage.controller("after(program.Jobs, 'finish')")
    agent = stage.light(c)
    create(c)
    job = taken(agent)
    no_answer(lambda: agent.result(job, "failed", exit_code=3))
    stage.again(c)
    ended = job_of(c, job["id"])
    check((ended["status"], ended["exit_code"]) == ("failed", 3), ended)
    check(answered(agent.result(job, "failed", exit_code=3))["job"] == ended, "the same")
    answered(agent.result(job, "success"), 409)
    answered(agent.logs(job, 0, ["late"]), 409)
    check(job_of(c, job["id"]) == ended and answered(agent.beat())["job"] is None, "and nothing more")


@point(long=True)
def registered_and_not_answered(stage: Stage) -> None:
    """The host is bound to the secret that its agent made, so to register again is harmless; what it ran goes on."""
    c = stage.controller("after(program.Jobs, 'register', 2)")
    agent, job_id = stage.light(c), create(c)["job"]["id"]
    taken(agent)
    no_answer(agent.register)
    stage.again(c)
    answered(agent.beat([(job_id, 1)]), 409)
    answered(agent.register())
    beat = answered(agent.beat([(job_id, 1)]))
    check(beat["cancel"] == [] and job_of(c, job_id)["status"] == "running", beat)


@point()
def lost_agent_and_not_announced(stage: Stage) -> None:
    """The sweep gave an attempt up: there is exactly one more, not two."""
    c = stage.controller("after(program.Jobs, '_close')", "--lost-after", "1s", "--agent-timeout", "1s")
    agent, job_id = stage.light(c), create(c, retries=1)["job"]["id"]
    job = taken(agent)
    stage.again(c)
    check((job_of(c, job_id)["status"], job_of(c, job_id)["attempt"]) == ("pending", 1), job_of(c, job_id))
    answered(agent.result(job), 409)
    check(taken(agent)["attempt"] == 2, "attempt 2")


# ---------------------------------------------------------------------------------------------------------------------
# Migrations, backup, restore


def schema(path: pathlib.Path) -> int:
    with contextlib.closing(sqlite3.connect(path)) as db:
        check(db.execute("PRAGMA integrity_check").fetchall() == [("ok",)], "damaged:", path)
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def old_database(path: pathlib.Path, version: int) -> None:
    """One that a DeployBot of that schema left, with a job that waits."""
    sys.path.insert(0, str(ROOT))
    import deploybot

    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA journal_mode = WAL")
        for statement in (statement for step in deploybot.MIGRATIONS[:version] for statement in step):
            db.execute(statement)
        db.execute(
            "INSERT INTO jobs (id, repo, ref, host, app, status, metadata, attempt, retries, timeout, created_at, created_by, spec,"
            " queued_at) VALUES (?, 'myorg/app', 'main', 'web-01', 'app', 'pending', '{}', 0, 0, 60, ?, 'me', '{}', ?)",
            ("01a208d2-125d-7000-9179-b171dcd08d79", *["2099-01-01T00:00:00.000Z"] * 2),
        )
        db.execute(f"PRAGMA user_version = {version}")


def migrations() -> list[int]:
    """How many statements each has."""
    sys.path.insert(0, str(ROOT))
    import deploybot

    return [len(step) for step in deploybot.MIGRATIONS]


def killed_migration(stage: Stage, version: int, patch: str, schemas: tuple[int, ...]) -> None:
    """From that schema, killed at that point: one of these schemas is there whole; the next start completes it."""
    c = Controller(stage.folder / "controller", program=stage.wrapper("deploybot", patch))
    if version:
        old_database(c.db, version)
    c.begin()
    killed(c, 60)
    c.program = stage.whole("deploybot")
    check(schema(copy_of(c.db, stage.folder / "copy")) in schemas, "neither before nor after:", version, patch)
    c.start()
    check(schema(copy_of(c.db, stage.folder / "copy")) == len(migrations()), "not brought to the newest schema")
    jobs = [job["id"] for job in all_jobs(c)]
    check(jobs == (["01a208d2-125d-7000-9179-b171dcd08d79"] if version else []), "jobs:", jobs)
    if version:
        kept = c.db.with_name(f"{c.db.name}.schema-{version}")
        check(schema(kept) == version, "what was kept as", kept)
    c.kill()


def dying_step(number: int, statement: int) -> str:
    return f"""
class Dying(tuple):
    def __iter__(self):
        for number, statement in enumerate(tuple.__iter__(self)):
            if number == {statement}:
                die()
            yield statement
        die()
steps = list(program.MIGRATIONS)
steps[{number}] = Dying(steps[{number}])
program.MIGRATIONS = tuple(steps)
"""


@point(quick=True)
def migration_halfway(stage: Stage) -> None:
    """One transaction: the old schema is there, the copy of it too, and the next start completes it."""
    last = len(migrations()) - 1
    killed_migration(stage, last, dying_step(last, migrations()[last] // 2), (last,))


@point()
def first_schema_halfway(stage: Stage) -> None:
    killed_migration(stage, 0, dying_step(0, 5), (0,))


@point(long=True)
def migration_before_its_commit(stage: Stage) -> None:
    last = len(migrations()) - 1
    killed_migration(stage, last, dying_step(last, 1000), (last,))


@point()
def migration_committed(stage: Stage) -> None:
    last = len(migrations()) - 1
    killed_migration(stage, last, "after(program.Store, '_prepare')", (last + 1,))


@point()
def copy_before_a_migration(stage: Stage) -> None:
    """The copy is there whole or not at all."""
    last = len(migrations()) - 1
    killed_migration(stage, last, "before(program.os, 'replace')", (last,))


@point(long=True)
def every_statement_of_every_migration(stage: Stage) -> None:
    for number, count in enumerate(migrations()):
        for statement in range(count + 1):
            killed_migration(Stage(stage.folder / f"{number}-{statement}"), number, dying_step(number, statement), (number,))


class Store:
    """A controller with some jobs, and the verbs on its database."""

    def __init__(self, stage: Stage, jobs: int = 20):
        self.stage = stage
        self.controller = Controller(stage.folder / "controller", apps={"apps": APPS}, program=stage.whole("deploybot")).start()
        self.jobs = self.add(jobs)

    def add(self, count: int) -> set[str]:
        client = self.controller.client()
        body = {"repo": "myorg/app", "ref": "main", "host": "web-01", "force": True, "metadata": {"text": "x" * 500}}
        return {client.ok("POST", "/v1/jobs", body)["job"]["id"] for _ in range(count)}

    def verb(self, *arguments: Any, patch: str = "") -> subprocess.CompletedProcess[str]:
        program = self.stage.wrapper("deploybot", patch)
        argv = [sys.executable, program, *arguments, "--db", self.controller.db]
        return subprocess.run(list(map(str, argv)), env=environment(), capture_output=True, text=True, timeout=120, check=False)


def ids_in(path: pathlib.Path) -> set[str]:
    schema(path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        return {row[0] for row in db.execute("SELECT id FROM jobs")}


def killed_backup(stage: Stage, patch: str) -> None:
    """FILE is the old backup whole or the new one whole, the controller does not notice, and the next backup works."""
    store, file = Store(stage), stage.folder / "backup.db"
    check(store.verb("backup", file).returncode == 0, "the first backup")
    first, second = store.jobs, store.jobs | store.add(5)
    done = store.verb("backup", file, patch=patch)
    check(done.returncode == -signal.SIGKILL, "did not die at its point:", patch, done)
    check(ids_in(file) in (first, second), "half a backup")
    check(ids_in(copy_of(store.controller.db, stage.folder / "copy")) == second, "the database itself")
    third = second | store.add(1)
    done = store.verb("backup", file)
    check(done.returncode == 0 and ids_in(file) == third, "the next backup:", done)
    check("ERROR" not in store.controller.said(), store.controller.said())
    store.controller.kill()


VACUUM = """
connect = program.connect
def dying(*args, **more):
    db = connect(*args, **more)
    db.set_progress_handler(die, {steps})
    return db
program.connect = dying
"""


@point(quick=True)
def backup_before_its_rename(stage: Stage) -> None:
    killed_backup(stage, "before(program.os, 'replace')")


@point()
def backup_within_its_copy(stage: Stage) -> None:
    killed_backup(stage, VACUUM.format(steps=300))


@point(long=True)
def backup_renamed(stage: Stage) -> None:
    killed_backup(stage, "after(program.os, 'replace')")


@point(long=True)
def many_moments_of_a_backup(stage: Stage) -> None:
    for steps in (1, 50, 100, 200, 400, 800):
        killed_backup(Stage(stage.folder / str(steps)), VACUUM.format(steps=steps))


def whole(path: pathlib.Path) -> set[str]:
    """The ids in a database and its WAL; none where it is not whole."""
    with contextlib.suppress(sqlite3.Error), tempfile.TemporaryDirectory() as folder:
        return ids_in(copy_of(path, pathlib.Path(folder) / "copy"))
    return set()


def killed_restore(stage: Stage, patch: str) -> None:
    """The old database serves on, or the start names the way on; to restore again gives the backup, and the old one is kept."""
    store, file = Store(stage), stage.folder / "backup.db"
    check(store.verb("backup", file).returncode == 0, "the backup")
    old, c = store.jobs | store.add(5), store.controller
    c.kill()  # so that the WAL holds a part of it
    done = store.verb("restore", file, patch=patch)
    check(done.returncode == -signal.SIGKILL, "did not die at its point:", patch, done)
    before = c.begin()
    try:
        wait_for(lambda: c.poll() is not None or " listens on " in c.said(before), 60)
        if c.poll() is None:
            there = {job["id"] for job in all_jobs(c)}
            check(there in (old, store.jobs), "neither the old one nor the backup:", len(there))
        else:
            check("deploybot.py restore" in c.said(before), "does not say what to do:", c.said(before))
    finally:
        c.kill()
    done = store.verb("restore", file)
    check(done.returncode == 0, "to restore again:", done)
    c.start()
    check({job["id"] for job in all_jobs(c)} == store.jobs, "not what the backup had")
    kept = list(map(whole, sorted(c.db.parent.glob("*.before-restore-*Z"))))  # one a restore, the first has it all
    check(old in kept, "what was there before is not kept:", list(map(len, kept)))
    c.kill()


def restore_points() -> Iterator[tuple[str, str]]:
    for name in ("link", "replace", "unlink"):
        for nth in (1, 2, 3):
            for when in ("before", "after"):
                owner = "program.pathlib.Path" if name == "unlink" else "program.os"
                yield f"{when}-{name}-{nth}", f"{when}({owner}, {name!r}, {nth})"


@point()
def restore_between_its_renames(stage: Stage) -> None:
    killed_restore(stage, "before(program.os, 'replace', 2)")


@point(long=True)
def every_step_of_a_restore(stage: Stage) -> None:
    """A point that is never reached is none."""
    reached = 0
    for name, patch in restore_points():
        try:
            killed_restore(Stage(stage.folder / name), patch)
            reached += 1
        except Failure as failure:
            if "did not die at its point" not in str(failure):
                raise
    check(reached >= 6, "only", reached, "points were reached")


# ---------------------------------------------------------------------------------------------------------------------
# The agent


SCRIPT = """\
#!/bin/sh
echo "$1 $DEPLOY_JOB_ID $DEPLOY_COMMIT" >> "$2"
if [ "$1" = activate ] && [ -e bad ]; then exit 7; fi
if [ "$1" = build ]; then case $DEPLOY_REF in slow) sleep 60;; esac; fi
"""


class Template:
    """A repository with four branches, and a host on which `good` runs: made once, copied for each scene."""

    lock = threading.Lock()
    folder: pathlib.Path | None = None
    repository: Repository
    commits: dict[str, str]

    @classmethod
    def copy(cls, folder: pathlib.Path) -> None:
        with cls.lock:
            if cls.folder is None or not cls.folder.exists():
                cls.folder = folder.parent / "template"
                cls._make(cls.folder)
            shutil.copytree(cls.folder, folder, symlinks=True, dirs_exist_ok=True)

    @classmethod
    def _make(cls, folder: pathlib.Path) -> None:
        cls.repository = Repository(folder.with_name("repository"), 0, random.Random(0))
        script = cls.repository.folder / "script.sh"
        script.write_text(SCRIPT)
        script.chmod(0o755)
        cls.commits = {name: cls._commit(name) for name in ("good", "next", "slow", "bad")}
        host = Host(Stage(folder), new=True)
        job = host.ended(host.deploy("good"))
        check(job["status"] == "success", job)
        host.agent.stop()
        host.controller.stop()

    @classmethod
    def _commit(cls, name: str) -> str:
        if name == "bad":
            (cls.repository.folder / "bad").touch()
        (cls.repository.folder / "page").write_text(name)
        cls.repository.git("add", "--all")
        cls.repository.git("commit", "--quiet", "--message", name)
        cls.repository.git("branch", name)
        return cls.repository.git("rev-parse", "HEAD")


class Host:
    """A controller, and an agent of web-01; unless it is `new`, that runs `good` already."""

    def __init__(self, stage: Stage, new: bool = False):
        if not new:
            Template.copy(stage.folder)
        self.stage, self.ledger = stage, stage.folder / "ledger"
        self.repository, self.commits = Template.repository, Template.commits
        self.ledger.touch()
        app = {
            "name": "app", "repo": "myorg/app", "clone_url": f"file://{self.repository.folder}", "hosts": ["web-01"],
            "build": ["./script.sh", "build", str(self.ledger)], "activate": ["./script.sh", "activate", str(self.ledger)],
        }  # fmt: skip
        self.controller = Controller(stage.folder / "controller", apps={"apps": [app]}, program=stage.whole("deploybot")).start()
        if new:
            self.start()

    def start(self, patch: str = "") -> Agent:
        program = self.stage.wrapper("agent", patch)
        self.agent = Agent(self.stage.folder / "hosts", "web-01", self.controller.port, self.repository.env, program=program)
        self.agent.launch()
        return self.agent

    def deploy(self, ref: str, **more: Any) -> str:
        return create(self.controller, ref=ref, **more)["job"]["id"]

    def ended(self, job_id: str) -> dict[str, Any]:
        client = self.controller.client()
        wait_for(lambda: client.ok("GET", f"/v1/jobs/{job_id}")["job"]["completed_at"], 60, f"the end of {job_id}")
        return client.ok("GET", f"/v1/jobs/{job_id}")["job"]

    def did(self, job_id: str) -> list[tuple[str, str]]:
        """(step, name of the commit) of each script of that job, in order."""
        names = {commit: name for name, commit in self.commits.items()}
        lines = [line.split() for line in self.ledger.read_text().splitlines()]
        return [(step, names[commit]) for step, job, commit in lines if job == job_id]

    def killed_at(self, patch: str, ref: str = "next", **more: Any) -> str:
        """The id of a job whose agent was killed there; a new agent runs by now."""
        self.start(patch)
        job_id = self.deploy(ref, **more)
        killed(self.agent, 60)
        self.start()
        return job_id

    def ends_with(self, job: dict[str, Any], current: str, did: list[tuple[str, str]], more: bool = False, **columns: Any) -> None:
        """What must be true at the end; with `more` the host takes another job as if nothing had been."""
        check({name: job[name] for name in columns} == columns, "the job:", job)
        check(self.did(job["id"]) == did, "its scripts:", self.did(job["id"]), "expected:", did)
        check(self.agent.active_commit("app") == self.commits[current][:12], "current is not", current)
        releases = {path.name.rpartition("-")[2] for path in (self.agent.workdir / "app" / "releases").iterdir()}
        good = {self.commits[name][:12] for name in ("good", current)}
        check(releases <= good, "releases that are left:", releases)
        if more:
            job = self.ended(self.deploy("next", force=True))
            active = self.agent.active_commit("app")
            check(job["status"] == "success" and active == self.commits["next"][:12], "the next job:", job)
        self.agent.stop()
        self.controller.kill()


CRASHED = {"status": "failed", "reason": "agent_crashed", "attempt": 1}


@point(long=True)
def job_arrived_and_not_tracked(stage: Stage) -> None:
    """The agent never knew it: it has crashed with its session."""
    host = Host(stage)
    job = host.ended(host.killed_at("before(program.Agent, '_take')"))
    host.ends_with(job, "good", [], **CRASHED)


@point()
def tracked_and_not_started(stage: Stage) -> None:
    """It counts as started: reported as crashed, run by nobody."""
    host = Host(stage)
    job = host.ended(host.killed_at("after(program.Journal, 'begin')"))
    host.ends_with(job, "good", [], **CRASHED)


@point()
def job_arrived_and_not_tracked_with_retries(stage: Stage) -> None:
    """The next attempt runs it, once."""
    host = Host(stage)
    job = host.ended(host.killed_at("before(program.Agent, '_take')", retries=1))
    host.ends_with(job, "next", [("build", "next"), ("activate", "next")], status="success", attempt=2)


@point(long=True)
def tracked_and_not_started_with_retries(stage: Stage) -> None:
    """What an agent itself reports is an end: `retries` are for attempts that nobody can speak of."""
    host = Host(stage)
    job = host.ended(host.killed_at("after(program.Journal, 'begin')", retries=1))
    host.ends_with(job, "good", [], **CRASHED)


@point()
def script_started_and_not_noted(stage: Stage) -> None:
    """It is found by its mark, and ended."""
    host = Host(stage)
    patch = f"""
import time
script, building = program.Deployment._script, []
def flagged(self, *args):
    building.append(1)
    script(self, *args)
def wait_and_die(self):
    while building:
        if open({str(host.ledger)!r}).read().count("build") == 2:
            die()
        time.sleep(0.01)
program.Deployment._script, program.Deployment._note_leader = flagged, wait_and_die
"""
    job_id = host.killed_at(patch, "slow")
    job = host.ended(job_id)
    check(not processes_of(job_id), "still runs:", processes_of(job_id))
    host.ends_with(job, "good", [("build", "slow")], more=True, **CRASHED)


def processes_of(job_id: str) -> list[int]:
    from fencing import processes_of as living

    return living(job_id)


@point(long=True)
def within_the_switch(stage: Stage) -> None:
    """`current` leads to the old release, and its activate runs again: nobody knows how far it was."""
    host = Host(stage)
    patch = """
def half(self, release):
    (self.path / "current.new").symlink_to(os.path.join("releases", release.name))
    die()
program.AppFolder.switch = half
"""
    job = host.ended(host.killed_at(patch))
    did = [("build", "next"), ("activate", "good")]
    host.ends_with(job, "good", did, rolled_back_to=host.commits["good"], **CRASHED)


@point(quick=True)
def switched_and_not_activated(stage: Stage) -> None:
    """Back to the old release, with its activate."""
    host = Host(stage)
    job = host.ended(host.killed_at("after(program.AppFolder, 'switch')"))
    did = [("build", "next"), ("activate", "good")]
    host.ends_with(job, "good", did, rolled_back_to=host.commits["good"], more=True, **CRASHED)


@point()
def activated_and_not_noted(stage: Stage) -> None:
    """Between switch and report: the result is not on disk, so the way back is taken."""
    host = Host(stage)
    job = host.ended(host.killed_at("before(program.Entry, 'end')"))
    did = [("build", "next"), ("activate", "next"), ("activate", "good")]
    host.ends_with(job, "good", did, rolled_back_to=host.commits["good"], **CRASHED)


@point()
def noted_and_not_reported(stage: Stage) -> None:
    """The result is on disk: it goes up, and nothing runs again."""
    host = Host(stage)
    job = host.ended(host.killed_at("after(program.Entry, 'end')"))
    host.ends_with(job, "next", [("build", "next"), ("activate", "next")], status="success", attempt=1, commit=host.commits["next"])


@point(long=True)
def reported_and_not_noted(stage: Stage) -> None:
    """The controller has it already; the same again is taken as the same."""
    host = Host(stage)
    job = host.ended(host.killed_at("after(program.Uploader, '_result')"))
    host.ends_with(job, "next", [("build", "next"), ("activate", "next")], status="success", attempt=1)


@point()
def on_the_way_back(stage: Stage) -> None:
    """A failed activate was being undone: that is taken up again, to its end."""
    host = Host(stage)
    job = host.ended(host.killed_at("after(program.AppFolder, 'switch', 2)", "bad"))
    did = [("build", "bad"), ("activate", "bad"), ("activate", "good")]
    host.ends_with(job, "good", did, rolled_back_to=host.commits["good"], more=True, **CRASHED)


@point()
def release_made_and_not_noted(stage: Stage) -> None:
    """An empty release is none, and pushes out no good one."""
    host = Host(stage)
    job = host.ended(host.killed_at("before(program.Entry, 'note', when=lambda self, **values: 'release' in values)"))
    host.ends_with(job, "good", [], more=True, **CRASHED)


@point(long=True)
def within_the_checkout(stage: Stage) -> None:
    """Half a release is no release."""
    host = Host(stage)
    job = host.ended(host.killed_at("after(program.Mirror, '_read_tree')"))
    host.ends_with(job, "good", [], more=True, **CRASHED)


@point()
def within_a_fetch(stage: Stage) -> None:
    """What git was holding does not stop the next fetch."""
    host = Host(stage)
    patch = """
def lock(self, *_):
    for name in ("packed-refs.lock", "shallow.lock", "config.lock", "HEAD.lock"):
        (self._path / name).touch()
    die()
program.Mirror._fetch = lock
"""
    job = host.ended(host.killed_at(patch))
    host.ends_with(job, "good", [], more=True, **CRASHED)


@point(long=True)
def within_a_tracking_file(stage: Stage) -> None:
    """It is written whole or not at all: the half is not read as one."""
    host = Host(stage)
    patch = "before(program.os, 'replace', when=lambda source, target: str(target).endswith('.1.json'), nth=2)"
    job = host.ended(host.killed_at(patch))
    host.ends_with(job, "good", [], more=True, **CRASHED)


# ---------------------------------------------------------------------------------------------------------------------


def end_processes(folder: pathlib.Path) -> None:
    """What a scene left running."""
    for process in [process for process in Process.started if process.log.is_relative_to(folder)]:
        process.kill()


def prove(proof: Proof) -> None:
    names = [proof.options.only] if proof.options.only else [name for name in POINTS if proof.full or name not in LONG]
    plays = [POINTS[name] for name in names]
    proof.chance.shuffle(plays)
    times: dict[str, float] = {}

    def one(play: Callable[[Stage], None]) -> None:
        began = time.monotonic()
        try:
            play(Stage(proof.folder / play.__name__))
        except Exception as error:
            error.add_note(f"at the point {play.__name__}")
            raise
        finally:
            end_processes(proof.folder / play.__name__)
            times[play.__name__] = time.monotonic() - began

    with concurrent.futures.ThreadPoolExecutor(3) as pool:  # most of the time they wait
        failures = [future.exception() for future in [pool.submit(one, play) for play in plays]]
    for failure in filter(None, failures):
        raise failure
    slowest = max(times, key=times.__getitem__)
    proof.figure("points", len(plays))
    proof.figure("slowest point", f"{slowest}, {times[slowest]:.1f} s")


if __name__ == "__main__":
    sys.exit(run(prove, __doc__, ("--only", {"help": "one point by its name"})))
