"""Backup, restore, the backup before a migration, and what a start says of a database that is damaged or not ours."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import sqlite3
import stat
import subprocess
import threading

import pytest
from conftest import EventStream, command, failing_at, wait_for
from test_main import deploybot_py, environment
from test_main import run as run
from test_migrations import make as make_old

import deploybot
from deploybot import MIGRATIONS, StartError, Store, Unavailable


@pytest.fixture(autouse=True)
def umask():
    """restore() sets it for its process, which here is the one of all tests."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def verb(capsys):
    """Runs a verb in this process: (exit code, output, lines of errors)."""

    def call(*arguments):
        code = deploybot.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err.splitlines()

    return call


def connect(path):
    return contextlib.closing(sqlite3.connect(path))


def one(path, sql):
    with connect(path) as db:
        return db.execute(sql).fetchone()[0]


def contents(path):
    """Every row of every table, but for the mark of a copy."""
    with connect(path) as db:
        tables = sorted(row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'"))
        rows = {table: sorted(db.execute(f"SELECT * FROM {table}"), key=repr) for table in tables}
    rows["meta"] = [row for row in rows["meta"] if row[0] != "copied_at"]
    return rows


def files(folder):
    """Name to (bytes, time of change) of all that stands in it."""
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.iterdir()
        if path.is_file() and not path.name.endswith(("-shm", ".lock"))
    }


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def db(tmp_path):
    """A database at rest with a few jobs, and the folder that it is in."""
    path = tmp_path / "data" / "deploybot.db"
    fill(path)
    return path


NO_JOB = deploybot.Job._make([None] * len(deploybot.Job._fields))


def fill(path, jobs=3, ended=0):
    store = Store(path)
    app = deploybot.app_without_entry("o/n", None)
    clock = deploybot.Clock()
    ids, made = deploybot.TimeOrderedIds(clock, None), []
    for i in range(jobs + ended):
        job = NO_JOB._replace(
            id=ids(), repo="o/n", ref=f"r{i}", host="web-01", app=app.name, metadata="{}", spec=app.spec, attempt=0,
            status="pending" if i < jobs else "success", retries=2, timeout=60, created_by="me", created_at=clock.stamp(),
            queued_at=clock.stamp(),
        )  # fmt: skip
        made.append(job)
    store.write(lambda tx: [tx.add("jobs", *job) for job in made])
    store.close()


# -- backup ------------------------------------------------------------------------------------------------------------


def test_a_backup_while_it_runs_and_is_written_to(run, tmp_path):
    c = run()
    created, done = [], threading.Event()

    def create():
        while not done.is_set():
            created.append(c.create(ref=f"r{len(created)}")["id"])

    writer = threading.Thread(target=create)
    writer.start()
    try:
        for i in range(3):
            wait_for(lambda i=i: len(created) >= 40 * (i + 1))
            before = list(created)
            code, out, errors = deploybot_py(c.folder, "backup", tmp_path / f"b{i}.db")
            assert (code, errors) == (0, [])
            assert one(tmp_path / f"b{i}.db", "PRAGMA integrity_check") == "ok"
            with connect(tmp_path / f"b{i}.db") as backup:
                stored = {row[0] for row in backup.execute("SELECT id FROM jobs")}
            assert set(before) <= stored, "all that was acknowledged before it began"
            assert re.search(rf"b{i}\.db: \d+\.\d MiB, {len(stored)} jobs, 0 agents, schema {len(MIGRATIONS)}$", out.strip())
    finally:
        done.set()
        writer.join()
    assert c.ok("GET", "/health")["status"] == "ok" and "Traceback" not in c.said()


def test_a_backup_only_reads(run, tmp_path):
    """Neither a running daemon's files nor, after a kill, the WAL that alone holds the newest rows."""
    c = run()
    for i in range(5):
        c.create(ref=f"r{i}")
    wait_for(lambda: one(c.db, "PRAGMA freelist_count") == 0)  # the first sweep gives back what the migrations left
    for killed in (False, True):
        if killed:
            c.kill()
        before = files(c.db.parent)
        assert before[c.db.name + "-wal"], "there is a WAL"
        assert deploybot_py(c.folder, "backup", tmp_path / "b.db")[0] == 0
        assert files(c.db.parent) == before
        assert one(tmp_path / "b.db", "SELECT count(*) FROM jobs") == 5
    assert mode(tmp_path / "b.db") == 0o600 and sorted(path.name for path in tmp_path.iterdir()) == ["b.db", "process"]


def test_a_backup_is_whole_one_file_and_like_its_source(verb, db, tmp_path):
    assert verb("backup", tmp_path / "b.db", "--db", db)[0] == 0
    assert contents(tmp_path / "b.db") == contents(db)
    for pragma in ("user_version", "auto_vacuum"):
        assert one(tmp_path / "b.db", f"PRAGMA {pragma}") == one(db, f"PRAGMA {pragma}")
    assert one(tmp_path / "b.db", "PRAGMA journal_mode") == "delete", "one file, that opens also where nobody may write"


def test_a_backup_goes_to_disk_before_it_gets_its_name(verb, db, tmp_path, monkeypatch):
    did = []
    monkeypatch.setattr(os, "fsync", lambda file: did.append(("fsync", os.readlink(f"/proc/self/fd/{file}"))))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (did.append(("rename", str(names[0]))), replace(*names)))
    checked = deploybot.examine
    monkeypatch.setattr(deploybot, "examine", lambda path: (did.append(("check", str(path))), checked(path))[1])
    assert verb("backup", tmp_path / "b.db", "--db", db)[0] == 0
    assert [step for step, _ in did] == ["check", "fsync", "rename", "fsync"]
    assert len({name for _, name in did[:3]}) == 1 and did[3][1] == str(tmp_path)


@pytest.mark.parametrize("step", ["examine", "sync", "connect"])
def test_a_backup_that_fails_leaves_what_was_there(verb, db, tmp_path, monkeypatch, step):
    (tmp_path / "b.db").write_text("the one of yesterday")
    calls = []

    def fail(path, *rest):
        calls.append(path)
        if "partial" in str(path):
            raise sqlite3.OperationalError("database or disk is full")
        return real(path, *rest)

    real = getattr(deploybot, step)
    monkeypatch.setattr(deploybot, step, fail)
    code, out, errors = verb("backup", tmp_path / "b.db", "--db", db)
    assert (code, out, errors) == (1, "", [f"deploybot.py: database {db} to {tmp_path / 'b.db'}: database or disk is full"])
    assert (tmp_path / "b.db").read_text() == "the one of yesterday" and calls
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.db", "data"]


def test_a_backup_without_room(db, tmp_path):
    """The limit on the size of files is what a disk of that size would be."""
    fill(db.parent / "big.db", 3000)
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 64; exec "$@"', "-", *command("deploybot.py"), "backup", tmp_path / "b.db", "--db", db.parent / "big.db"],
        env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1), done
    assert "b.db: " in done.stderr and sorted(path.name for path in tmp_path.iterdir()) == ["data"]


@pytest.mark.parametrize("end", ["", "-wal", "-shm", "-journal", ".lock"])
def test_a_backup_onto_the_database_itself_is_refused(verb, db, tmp_path, monkeypatch, end):
    before = files(db.parent)
    monkeypatch.chdir(tmp_path)
    code, out, errors = verb("backup", f"data/../data/deploybot.db{end}", "--db", db)
    assert (code, out, len(errors)) == (1, "", 1) and "choose another FILE" in errors[0]
    assert files(db.parent) == before


# -- what is no database of ours ---------------------------------------------------------------------------------------


def garbage(path):
    path.write_bytes(random.Random(1).randbytes(8192))


def foreign(version):
    def write(path):
        with connect(path) as db:
            db.execute("CREATE TABLE customers (id INTEGER)")
            db.execute(f"PRAGMA user_version = {version}")

    return write


def of_version(version):
    def write(path):
        fill(path)
        with connect(path) as db:
            db.execute(f"PRAGMA user_version = {version}")

    return write


def cut(path):
    fill(path, 500)
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)


def zeroed(path):
    fill(path, 500)
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(bytes(path.stat().st_size - 4096))


def unreadable_text(path):
    fill(path)
    with connect(path) as db:
        db.execute("INSERT INTO agents VALUES ('a', 'web-01', '{}', 1, 's', 0, NULL, 'x', 'no time', '{}')")
        db.commit()


def unreadable_token(path):
    fill(path)
    with connect(path) as db:
        db.execute(
            "INSERT INTO tokens (id, name, role, sha256, created_at, created_by) VALUES ('t', CAST(x'ff' AS TEXT), 'admin', 's', '', '')"
        )
        db.commit()


def odd_schema(path):
    """With what would begin a line or speak to a terminal in the words of SQLite itself."""
    fill(path)
    with connect(path) as db:
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_master SET sql = replace(sql, 'STRICT', char(10) || char(27) || '[2J') WHERE name = 'jobs'")
        db.commit()


UNSEEN = (unreadable_text, unreadable_token)  # SQLite finds nothing wrong with them
NEWER = ("made by a newer DeployBot",)
NOT_OURS = ("choose another --db", "restore FILE")
DAMAGED = ("restore FILE",)
BAD = {
    "garbage": (garbage, DAMAGED),
    "cut": (cut, DAMAGED),
    "zeroed": (zeroed, DAMAGED),
    "foreign": (foreign(0), NOT_OURS),
    "foreign with a version": (foreign(1), NOT_OURS),
    "foreign with a high version": (foreign(1000), NOT_OURS),
    "without its version": (of_version(0), NOT_OURS),
    "with a negative version": (of_version(-7), NOT_OURS),
    "newer": (of_version(len(MIGRATIONS) + 1), NEWER),
    "with nonsense in a row": (unreadable_text, DAMAGED),
    "with nonsense in a token": (unreadable_token, DAMAGED),
    "with an odd schema": (odd_schema, DAMAGED),
    "a folder": (lambda path: path.mkdir(), ()),
}
bad_ones = pytest.mark.parametrize("spoil, said", BAD.values(), ids=list(BAD))
seen_ones = pytest.mark.parametrize("spoil", [spoil for spoil, _ in BAD.values() if spoil not in UNSEEN])


@pytest.fixture
def spoilt(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data" / "deploybot.db"


@bad_ones
def test_a_start_says_in_one_line_what_is_wrong_and_changes_nothing(spoilt, tmp_path, spoil, said):
    spoil(spoilt)
    before = files(spoilt.parent).get(spoilt.name)
    for level in ("INFO", "DEBUG"):
        flags = ["--port", "0", "--host", "127.0.0.1", "--log-level", level]
        code, out, lines = deploybot_py(tmp_path, *flags, open=True)
        errors = [line for line in lines if line.startswith("deploybot.py: ")]
        assert (code, out, len(errors)) == (1, "", 1) and all(map(str.isprintable, lines)), lines
        assert level == "DEBUG" or all(line in errors or " WARNING " in line for line in lines), lines
        assert str(spoilt.name) in errors[0] and all(word in errors[0] for word in said)
        if level == "INFO":
            assert not any("Traceback" in line or "new database" in line for line in lines)
        if spoil not in (cut, zeroed, *UNSEEN):  # found once it is in use
            assert files(spoilt.parent).get(spoilt.name) == before


@seen_ones
def test_a_backup_of_it_is_refused(verb, spoilt, tmp_path, spoil):
    spoil(spoilt)
    code, out, errors = verb("backup", tmp_path / "b.db", "--db", spoilt)
    assert (code, out, len(errors)) == (1, "", 1) and not (tmp_path / "b.db").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


@seen_ones
def test_to_restore_it_is_refused_and_changes_nothing(verb, db, tmp_path, spoil):
    spoil(tmp_path / "b.db")
    before = files(db.parent)
    code, out, errors = verb("restore", tmp_path / "b.db", "--db", db)
    assert (code, out, len(errors)) == (1, "", 1) and str(tmp_path / "b.db") in errors[0]
    assert files(db.parent) == before


def spoilt_index(path):
    """An index that lacks a row: what only reading all of it finds."""
    fill(path)
    with connect(path) as db:
        db.execute("PRAGMA writable_schema = ON")
        sql = db.execute("SELECT sql FROM sqlite_master WHERE name = 'jobs_host'").fetchone()[0]
        db.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'jobs_host'", (sql + " WHERE id = ''",))
        db.commit()
    with connect(path) as db:
        db.execute(
            "INSERT INTO jobs SELECT 'x' || id, " + ", ".join(f'"{name}"' for name in deploybot.Job._fields[1:]) + " FROM jobs"
        )
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_master SET sql = ? WHERE name = 'jobs_host'", (sql,))
        db.commit()


def test_a_start_reads_all_of_a_database_unless_it_is_large(tmp_path, monkeypatch):
    path = tmp_path / "deploybot.db"
    spoilt_index(path)
    with pytest.raises(StartError, match=r"damaged: .*jobs_host.*restore FILE"):
        Store(path)
    gc.collect()
    monkeypatch.setattr(deploybot, "CHECKED_AT_START", path.stat().st_size - 1)
    Store(path).close()


def test_to_restore_what_lacks_a_row_in_an_index_is_refused(verb, db, tmp_path):
    """A copy of it would be whole: nobody would learn that FILE is not what was written."""
    spoilt_index(tmp_path / "b.db")
    code, _, errors = verb("restore", tmp_path / "b.db", "--db", db)
    assert code == 1 and "jobs_host" in errors[0] and jobs_of(db) == 3


def test_what_is_not_there_is_neither_backed_up_nor_restored(verb, db, tmp_path):
    none, folder = tmp_path / "none.db", tmp_path / "no"
    before = files(db.parent)

    def does(name, file, path):
        return verb(name, file, "--db", path)[::2]

    assert does("backup", tmp_path / "b.db", none) == (1, [f"deploybot.py: there is no file {none}: name the database with --db"])
    assert does("backup", folder / "b.db", db) == (1, [f"deploybot.py: there is no folder {folder}: make it, or name another FILE"])
    said = f"deploybot.py: there is no file {none}: name the FILE that backup wrote"
    assert does("restore", none, db) == does("restore", none, folder / "new.db") == (1, [said])
    assert [path.name for path in tmp_path.iterdir()] == ["data"] and files(db.parent) == before


def test_a_new_database_is_never_made_in_silence(tmp_path, caplog):
    path = tmp_path / "new.db"
    for made in (True, False):
        caplog.clear()
        Store(path).close()
        assert ("a new database is made" in caplog.text) is made
    path.write_bytes(b"")
    Store(path).close()
    assert "a new database is made" in caplog.text, "also where an empty file was"


def test_a_folder_that_cannot_be_written_is_one_line(db, tmp_path):
    if subprocess.run(["mount", "--bind", db.parent, db.parent], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here: tests/proof/disk_full.py says how else")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", db.parent], check=True)
        code, out, errors = deploybot_py(tmp_path, "--port", "0", "--log-level", "ERROR", open=True)
        assert (code, out, len(errors)) == (1, "", 1) and "Read-only file system" in errors[0]
        code, out, errors = deploybot_py(tmp_path, "restore", db)
        assert (code, out, len(errors)) == (1, "", 1) and "Read-only file system" in errors[0]
    finally:
        subprocess.run(["umount", db.parent], check=True)


@pytest.mark.parametrize("statement", ["INSERT", "COMMIT", "BEGIN"])
def test_a_write_that_meets_damage_is_told_to_try_later(db, statement):
    """As with every other fault of the database, the whole batch: a transaction that met damage is not committed."""
    store = Store(db)
    job = NO_JOB._replace(
        **{"id": "x", "repo": "o/n", "ref": "main", "host": "web-01", "app": "web", "status": "pending", "metadata": "{}"},
        **{"attempt": 0, "retries": 0, "timeout": 60, "created_at": "", "created_by": "me", "spec": "{}", "queued_at": ""},
    )
    damage = sqlite3.DatabaseError("database disk image is malformed")
    with failing_at(store, statement, damage), pytest.raises(Unavailable, match="malformed"):
        store.write(lambda tx: tx.add("jobs", *job))
    assert not store._db.in_transaction
    store.close()


# -- before a migration ------------------------------------------------------------------------------------------------


def test_a_migration_keeps_what_was_before_it(tmp_path, caplog):
    path = tmp_path / "deploybot.db"
    make_old(path, 1)
    before = contents(path)
    Store(path).close()
    kept = tmp_path / "deploybot.db.schema-1"
    assert one(path, "PRAGMA user_version") == len(MIGRATIONS) and one(kept, "PRAGMA user_version") == 1
    assert contents(kept) == before and mode(kept) == 0o600
    assert str(kept) in caplog.text
    Store(path).close()
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, path.name + ".lock", kept.name], "once"


def test_no_migration_without_its_backup(tmp_path):
    path = tmp_path / "deploybot.db"
    make_old(path, 1)
    before = contents(path)
    (tmp_path / "deploybot.db.schema-1").mkdir()
    with pytest.raises(StartError) as caught:
        Store(path)
    assert len(caught.value.problems) == 1 and "schema-1" in str(caught.value)
    assert contents(path) == before and one(path, "PRAGMA user_version") == 1


def test_a_migration_that_fails_leaves_both(tmp_path, monkeypatch):
    path = tmp_path / "deploybot.db"
    make_old(path, 1)
    monkeypatch.setattr(deploybot, "MIGRATIONS", (MIGRATIONS[0], ("this is no SQL",)))
    with pytest.raises(StartError):
        Store(path)
    kept = tmp_path / "deploybot.db.schema-1"
    assert contents(path) == contents(kept) and one(path, "PRAGMA user_version") == 1


def test_a_new_database_needs_none(tmp_path):
    Store(tmp_path / "deploybot.db").close()
    assert not list(tmp_path.glob("*.schema-*"))


# -- restore -----------------------------------------------------------------------------------------------------------


def test_restored_from_a_backup_nothing_is_given_out_again(run, tmp_path):
    """The whole way, with agents and readers that know more than the database now does."""
    c = run()
    agents = {host: c.register(host) for host in ("web-01", "web-02")}
    goes_on, pending = c.create(ref="on", retries=3), c.create(ref="waits")
    assert c.beat(agents["web-01"])["job"]["id"] == goes_on["id"]
    c.logs({**goes_on, "attempt": 1}, "a line")
    ended_later = c.create(ref="later", host="web-02", retries=3)
    assert c.beat(agents["web-02"])["job"]["id"] == ended_later["id"]
    with EventStream(c) as stream:
        old_id = next(iter(stream))["id"]
    assert deploybot_py(c.folder, "backup", tmp_path / "b.db")[0] == 0
    # What the backup knows nothing of.
    c.end({**ended_later, "attempt": 1})
    c.create(ref="new")
    c.stop()
    code, out, errors = deploybot_py(c.folder, "restore", tmp_path / "b.db")
    assert (code, errors) == (0, [])
    assert "3 jobs" in out and "before-restore-" in out and "start the controller" in out
    (kept,) = c.db.parent.glob("*.before-restore-*")
    assert one(kept, "SELECT count(*) FROM jobs") == 4 and mode(kept) == mode(c.db) == 0o600

    before = one(kept, "SELECT value FROM meta WHERE name = 'epoch'")
    c.start()
    shown = {job["ref"]: job for job in c.ok("GET", "/v1/jobs")["jobs"]}
    assert shown.keys() == {"on", "waits", "later"}
    assert (shown["waits"]["status"], shown["waits"]["reason"]) == ("cancelled", "cancelled")
    assert "restored" in shown["waits"]["error"]
    assert [(shown[ref]["status"], shown[ref]["retries"]) for ref in ("on", "later")] == [("running", 0)] * 2
    with EventStream(c, last_id=old_id) as stream:
        first = next(iter(stream))
        assert first["event"] == "gap" and "restored" in first["data"]["detail"]
    with EventStream(c, f"/v1/logs/stream?job_id={pending['id']}") as stream:
        assert [event["event"] for event in stream][-1] == "end", "the stream of a cancelled one has its end"
    assert one(c.db, "SELECT value FROM meta WHERE name = 'epoch'") != before

    # Agents: told to register anew, never that a newer one has their host.
    for host, agent in agents.items():
        for session in ({}, {"session": agent["session"]}):
            status, answer = c.call("POST", f"/v1/agents/{agent['id']}/heartbeat", {"status": "online", **session})
            assert (status, "register again" in answer["detail"]) == (404, True), host
    again = c.register("web-01")
    assert again["id"] == agents["web-01"]["id"]
    held = [{"job_id": goes_on["id"], "attempt": 1}]
    assert c.beat(again, session=again["session"], running=held)["cancel"] == []
    assert c.end({**goes_on, "attempt": 1})["status"] == "success", "what still runs goes on"
    again = c.register("web-02")
    assert c.beat(again, session=again["session"], running=[])["job"] is None
    assert (c.job(ended_later["id"])["status"], c.job(ended_later["id"])["reason"]) == ("failed", "agent_crashed")

    # Once: the next start is like any other.
    epoch, job = one(c.db, "SELECT value FROM meta WHERE name = 'epoch'"), c.create(ref="after")
    c.stop()
    c.start()
    assert one(c.db, "SELECT value FROM meta WHERE name = 'epoch'") == epoch
    assert c.job(job["id"])["status"] == "pending" and c.said().count("a new epoch begins") == 1


def test_a_backup_that_is_only_copied_into_place_counts_as_restored(run, tmp_path):
    c = run()
    c.create()
    assert deploybot_py(c.folder, "backup", tmp_path / "b.db")[0] == 0
    before = one(c.db, "SELECT value FROM meta WHERE name = 'epoch'")
    c.stop()
    shutil.copy(tmp_path / "b.db", c.db)
    c.start()
    assert one(c.db, "SELECT value FROM meta WHERE name = 'epoch'") != before
    assert c.ok("GET", "/v1/jobs")["jobs"][0]["status"] == "cancelled"


def test_a_restored_backup_names_the_time_when_it_was_written(verb, db, tmp_path):
    sql = "SELECT value FROM meta WHERE name = 'copied_at'"
    assert verb("backup", tmp_path / "b.db", "--db", db)[0] == 0
    written = one(tmp_path / "b.db", sql)
    assert verb("restore", tmp_path / "b.db", "--db", db)[0] == 0
    assert one(db, sql) == written


def test_restore_asks_for_the_daemon_to_be_stopped(run, tmp_path):
    c = run()
    c.create()
    assert deploybot_py(c.folder, "backup", tmp_path / "b.db")[0] == 0
    code, out, errors = deploybot_py(c.folder, "restore", tmp_path / "b.db")
    assert (code, out, len(errors)) == (1, "", 1) and "another deploybot.py uses it" in errors[0]
    assert c.ok("GET", "/health")["database"] == "ok" and not list(c.db.parent.glob("*restor*"))


def test_no_daemon_starts_while_a_restore_works(db, tmp_path, verb, monkeypatch):
    seen = []

    def look(*names):
        seen.append(deploybot_py(tmp_path, "--port", "0", "--db", db, open=True))
        return link(*names)

    link = os.link
    assert verb("backup", tmp_path / "b.db", "--db", db)[0] == 0
    monkeypatch.setattr(os, "link", look)
    assert verb("restore", tmp_path / "b.db", "--db", db)[0] == 0
    assert seen and all(code == 1 and "another deploybot.py" in lines[-1] for code, _, lines in seen)


def test_an_older_backup_is_brought_up_by_the_next_start(verb, db, tmp_path):
    make_old(tmp_path / "old.db", 1)
    code, out, _ = verb("restore", tmp_path / "old.db", "--db", db)
    assert code == 0 and "schema 1" in out
    Store(db).close()
    assert one(db, "PRAGMA user_version") == len(MIGRATIONS) and one(db, "SELECT count(*) FROM jobs") == 1
    assert one(db.with_name("deploybot.db.schema-1"), "PRAGMA user_version") == 1


def test_what_is_kept_has_its_wal_with_it(run, tmp_path):
    """After a kill the newest rows stand in the WAL alone, and a WAL left in place would be played into the other database."""
    c = run()
    c.create(ref="old")
    assert deploybot_py(c.folder, "backup", tmp_path / "b.db")[0] == 0
    for i in range(5):
        c.create(ref=f"r{i}")
    c.kill()
    assert deploybot_py(c.folder, "restore", tmp_path / "b.db")[0] == 0
    (kept,) = c.db.parent.glob("*.before-restore-*Z")
    assert pathlib.Path(f"{kept}-wal").stat().st_size and not pathlib.Path(f"{c.db}-wal").exists()
    assert one(kept, "SELECT count(*) FROM jobs") == 6
    assert one(c.db, "SELECT count(*) FROM jobs") == 1 and one(c.db, "PRAGMA integrity_check") == "ok"
    c.start()
    assert [job["ref"] for job in c.ok("GET", "/v1/jobs")["jobs"]] == ["old"]


def test_a_damaged_or_lost_database_is_no_hindrance(verb, db, tmp_path):
    assert verb("backup", tmp_path / "b.db", "--db", db)[0] == 0
    whole = contents(db)
    garbage(db)
    code, out, _ = verb("restore", tmp_path / "b.db", "--db", db)
    assert code == 0 and contents(db) == whole and "kept" in out
    (kept,) = db.parent.glob("*.before-restore-*")
    kept.unlink()
    db.unlink()
    code, out, _ = verb("restore", tmp_path / "b.db", "--db", db)
    assert code == 0 and contents(db) == whole and "kept" not in out
    code, _, _ = verb("restore", tmp_path / "b.db", "--db", tmp_path / "elsewhere" / "deploybot.db")
    assert code == 0 and contents(tmp_path / "elsewhere" / "deploybot.db") == whole


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can give a folder to somebody else")
def test_root_restores_for_the_user_of_the_daemon(db, tmp_path, verb):
    assert verb("backup", tmp_path / "b.db", "--db", db)[0] == 0
    pathlib.Path(f"{db}.lock").unlink()
    for path in (db.parent, db):
        os.chown(path, 54321, 54322)
    assert verb("restore", tmp_path / "b.db", "--db", db)[0] == 0
    for path in (db, pathlib.Path(f"{db}.lock")):
        assert (path.stat().st_uid, path.stat().st_gid) == (54321, 54322), path


# A kill at every step of a restore, and what a start and a second restore then make of it.

KILLED = 77


def killed_at(step, verb, file, path):
    """Runs a verb in a process that is gone at its n-th step that changes something; False where it came to its end."""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        left = itertools.count(step, -1)

        def dying(function):
            return lambda *arguments, **more: function(*arguments, **more) if next(left) > 1 else os._exit(KILLED)

        for module, names in ((os, ("link", "unlink", "replace", "chown", "fsync", "open")), (pathlib.Path, ("unlink",))):
            for name in names:
                setattr(module, name, dying(getattr(module, name)))
        os._exit(deploybot.main([verb, str(file), "--db", str(path)]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED


def jobs_of(path):
    return one(path, "SELECT count(*) FROM jobs")


def test_a_restore_may_be_killed_at_any_step(db, tmp_path):
    """Before: 3 jobs in the database and 4 more in its WAL. In the backup: 11."""
    fill(tmp_path / "b.db", 11)
    with connect(db) as writer:
        writer.executescript("UPDATE jobs SET ref = 'known'; PRAGMA wal_checkpoint(TRUNCATE)")
        more = "INSERT INTO jobs SELECT id || ?, repo, ref || ?, " + ", ".join(f'"{name}"' for name in deploybot.Job._fields[3:])
        for i in range(4):
            writer.execute(more + " FROM jobs WHERE id = (SELECT min(id) FROM jobs)", (f"-{i}", f"-{i}"))
        writer.commit()
        shutil.copytree(db.parent, tmp_path / "whole")  # as after a kill: with a WAL
    shutil.copytree(tmp_path / "whole", tmp_path / "looked at")  # whoever looks writes the WAL back
    assert jobs_of(tmp_path / "looked at" / "deploybot.db") == 7 and (tmp_path / "whole" / "deploybot.db-wal").stat().st_size
    step, outcomes = 0, []
    while True:
        step += 1
        shutil.rmtree(db.parent)
        shutil.copytree(tmp_path / "whole", db.parent)
        if not killed_at(step, "restore", tmp_path / "b.db", db):
            break
        trial = tmp_path / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(db.parent, trial)
        outcomes.append(start_or_refuse(trial / "deploybot.db"))
        # The old one is whole under its own name or the one that it was given.
        olds = [path for path in db.parent.iterdir() if re.fullmatch(r"deploybot\.db(\.before-restore-.*Z)?", path.name)]
        copies = tmp_path / "copies"
        shutil.rmtree(copies, ignore_errors=True)
        shutil.copytree(db.parent, copies)
        assert 7 in [jobs_of(copies / path.name) for path in olds], (step, olds)
        # And to restore once more ends the work.
        assert deploybot.main(["restore", str(tmp_path / "b.db"), "--db", str(db)]) == 0
        assert start_or_refuse(db) == 11, step
    assert step > 12 and jobs_of(db) == 11
    assert set(outcomes) == {7, None, 11} and outcomes == sorted(outcomes, key=[7, None, 11].index), outcomes


def start_or_refuse(path):
    """How many jobs a start finds; None where it refuses in words."""
    try:
        store = Store(path)
    except StartError as error:
        assert "a restore was interrupted" in str(error) and "restore FILE" in str(error)
        return None
    with store.read() as queries:
        count = queries.one("SELECT count(*) FROM jobs")[0]
    store.close()
    return count


def test_a_backup_that_is_killed_leaves_the_last_one(db, tmp_path):
    for step in range(1, 20):
        (tmp_path / "b.db").write_text("the one of yesterday")
        if not killed_at(step, "backup", tmp_path / "b.db", db):
            break
        if (tmp_path / "b.db").read_bytes()[:3] != b"the":
            assert contents(tmp_path / "b.db") == contents(db)
    assert step > 4 and contents(tmp_path / "b.db") == contents(db)


# -- how they are asked for --------------------------------------------------------------------------------------------


def test_the_verbs_take_the_settings_of_the_controller(tmp_path, db):
    for verb in ("backup", "restore"):
        code, out, _ = deploybot_py(tmp_path, verb, "--help")
        assert code == 0 and all(f"--{option.name}" in out for option in deploybot.OPTIONS) and "FILE" in out
        assert deploybot_py(tmp_path, verb)[0] == 2
        assert deploybot_py(tmp_path, verb, "x.db", port="nonsense")[0] == 1
    _, out, _ = deploybot_py(tmp_path, "--help")
    assert all(f"  {verb} " in out for verb in deploybot.VERBS if verb != "serve")
    assert deploybot_py(tmp_path, "backup", "b.db", db=db)[0] == 0
    assert json.loads(json.dumps(contents(tmp_path / "b.db"))).keys() == contents(db).keys()


@pytest.mark.parametrize(
    ("word", "asked"),
    [
        ("bakup", "did you mean backup?"),
        ("check-app", "did you mean check-apps?"),
        ("x", "there are serve, backup, restore, doctor, check-apps"),
    ],
)
def test_a_mistyped_verb_is_answered_in_one_line(verb, word, asked):
    said = f"deploybot.py: no verb {word}: {asked} (see deploybot.py --help)"
    assert verb(word, "b.db") == (2, "", [said])


# -- doctor ------------------------------------------------------------------------------------------------------------


class Doctor:
    """What it says of a folder in which all is well, but for what a test changes."""

    def __init__(self, folder, monkeypatch, capsys):
        self.folder, self.capsys, self.flags, self.monkeypatch = folder, capsys, [], monkeypatch
        monkeypatch.chdir(folder)
        for name in ("token", "agent_token", "read_token", "webhook_secret"):
            monkeypatch.setenv(f"DEPLOYBOT_{name.upper()}", f"{name}-" + "0123456789abcdef" * 2)
        self.db = folder / "data" / "deploybot.db"
        fill(self.db)
        for path, mode in ((self.db, 0o600), (self.db.parent, 0o700)):
            path.chmod(mode)
        (folder / "apps.yaml").write_text(json.dumps({"apps": [PUSHED]}))

    def says(self):
        """(exit code, {level: [lines]})."""
        code = deploybot.main(["doctor", *self.flags])
        said = self.capsys.readouterr()
        assert "Traceback" not in said.err and not re.search("[0-9]{5}abcdef", said.out + said.err), "no secret is shown"
        lines = [(line[:5].strip(), line[5:]) for line in said.out.splitlines()]
        assert {level for level, _ in lines} <= {"ok", "warn", "FAIL"}
        return code, {level: [text for name, text in lines if name == level] for level in ("ok", "warn", "FAIL")}

    def complains(self, level, *words):
        """Of one thing alone, which has all these words."""
        code, said = self.says()
        other = said["warn" if level == "FAIL" else "FAIL"]
        assert code == (level == "FAIL") and len(said[level]) == 1 and not other, said
        assert all(str(word) in said[level][0] for word in words), said[level]


PUSHED = {"name": "web", "repo": "o/n", "hosts": ["web-01"], "deploy_on_push": True}


@pytest.fixture
def doctor(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "place"
    folder.mkdir()
    return Doctor(folder, monkeypatch, capsys)


def test_a_sound_place_has_no_complaint(doctor):
    code, said = doctor.says()
    assert (code, said["warn"], said["FAIL"]) == (0, [], [])
    text = "\n".join(said["ok"])
    for words in (
        sqlite3.sqlite_version, "MiB are free", "3 jobs", f"schema {len(MIGRATIONS)}", "no controller runs", "mode 600", "descriptors",
        "apps.yaml has 1 apps", "DEPLOYBOT_TOKEN is set", "no --tls-cert",
    ):  # fmt: skip
        assert words in text, words


def test_a_doctor_changes_nothing(doctor):
    before = files(doctor.db.parent), files(doctor.folder)
    doctor.says()
    wal = pathlib.Path(f"{doctor.db}-wal")
    assert not wal.stat().st_size, "SQLite makes an empty one to read"
    wal.unlink()
    assert (files(doctor.db.parent), files(doctor.folder)) == before


def test_doctor_beside_a_running_controller(run):
    c = run()
    c.register()
    code, out, _ = deploybot_py(c.folder, "doctor", open=True)
    assert code == 0 and "ok   a controller runs on it" in out and "1 agents" in out and "warn --open" in out
    assert c.ok("GET", "/health")["status"] == "ok"
    c.stop()
    c.start()


@pytest.mark.parametrize("spoil", [garbage, cut, foreign(0), of_version(len(MIGRATIONS) + 1)])
def test_doctor_names_the_way_out_of_a_bad_database(doctor, spoil):
    doctor.db.unlink()
    spoil(doctor.db)
    doctor.db.chmod(0o600)
    doctor.complains("FAIL", "deploybot.db", "" if spoil not in (garbage, cut) else "deploybot.py restore FILE")


def test_doctor_without_a_database(doctor):
    doctor.db.unlink()
    doctor.complains("warn", "is not there", "restore FILE")
    shutil.rmtree(doctor.db.parent)
    doctor.complains("warn", "is not there", "restore FILE")
    assert not doctor.db.parent.exists()


def test_an_old_sqlite_is_told(doctor, monkeypatch):
    """As Debian 11 and RHEL 9 have it."""
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    doctor.complains("FAIL", "too old", "3.37")
    with pytest.raises(StartError, match="too old"):
        Store(doctor.folder / "new.db")


@pytest.mark.parametrize("version, mended", [
    ("3.40.1", False), ("3.44.5", False), ("3.44.6", True), ("3.45.0", False), ("3.50.6", False), ("3.50.7", True), ("3.51.0", False),
    ("3.51.2", False), ("3.51.3", True), ("3.53.0", True),
])  # fmt: skip
def test_doctor_knows_the_sqlites_with_which_two_may_not_checkpoint(doctor, monkeypatch, version, mended):
    monkeypatch.setattr(deploybot, "SQLITE", version)
    assert doctor.says()[1]["warn"] == [], "the controller alone writes and checkpoints"
    doctor.flags = ["--replicated"]
    if mended:
        assert doctor.says()[1]["warn"] == []
    else:
        doctor.complains("warn", f"SQLite {version}", "WAL-reset bug")


def test_doctor_sees_a_wal_that_litestream_does_not_write_back(doctor, monkeypatch):
    monkeypatch.setattr(deploybot, "SQLITE", "3.53.0")
    monkeypatch.setattr(deploybot, "examine", lambda path: (len(MIGRATIONS), 0, 0))  # SQLite would make a real WAL of it
    wal = pathlib.Path(f"{doctor.db}-wal")
    with open(wal, "wb") as file:
        file.truncate(2**30)
    wal.chmod(0o600)
    assert doctor.says()[1]["warn"] == [], "where nobody replicates, it is written back by the next commit"
    doctor.flags = ["--replicated"]
    doctor.complains("warn", "1024 MiB", "systemctl status litestream")


def test_doctor_counts_the_free_disk(doctor, monkeypatch):
    real = os.statvfs(doctor.folder)
    free = [257 * 2**20, 255 * 2**20]
    size = os.statvfs_result((1, 1, 1, 1, free.pop(0), 1, 1, 1, 1, 255, 0)) if real else None
    monkeypatch.setattr(os, "statvfs", lambda path: size)
    assert doctor.says()[1]["warn"] == []
    size = os.statvfs_result((1, 1, 1, 1, free.pop(0), 1, 1, 1, 1, 255, 0))
    doctor.complains("warn", "255 MiB are free", "make room")


@pytest.mark.parametrize("name, mode, cure", [
    ("data/deploybot.db", 0o644, "chmod 600"), ("data/admin.token", 0o604, "chmod 600"), ("secret", 0o604, "chmod 600"),
    ("data", 0o777, "chmod go-w"), ("data", 0o720, "chmod go-w"), ("data/deploybot.db.lock", 0o666, "chmod go-w"),
])  # fmt: skip
def test_doctor_knows_what_others_may_not_read_or_change(doctor, name, mode, cure):
    path = doctor.folder / name
    if not path.exists():
        path.write_text("dbt_0123456789abcdef0123456789abcdef\n")
        path.chmod(0o600)
    doctor.monkeypatch.delenv("DEPLOYBOT_READ_TOKEN")
    if name == "secret":
        doctor.monkeypatch.setenv("DEPLOYBOT_READ_TOKEN_FILE", str(path))
    assert doctor.says()[1]["FAIL"] == []
    path.chmod(mode)
    doctor.complains("FAIL", path.name, cure)


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can give a file to somebody else")
def test_doctor_finds_what_root_left(doctor):
    for path in (doctor.db.parent, doctor.db):
        os.chown(path, 54321, 54321)
    doctor.complains("FAIL", "deploybot.db.lock", "chown --reference=")
    for end in ("-wal", "-shm"):
        assert pathlib.Path(f"{doctor.db}{end}").stat().st_uid == 54321, "and leaves nothing itself"


def test_doctor_counts_descriptors_for_agents(doctor, monkeypatch):
    with connect(doctor.db) as db:
        for i in range(600):
            row = (f"a{i}", f"web-{i}", "{}", 1, "s", 0, None, "2026-01-01T00:00:00.000Z", "2026-01-01T00:00:00.000Z", "{}")
            db.execute("INSERT INTO agents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        db.commit()
    for limit, level in ((1024, "warn"), (4096, "ok"), (deploybot.resource.RLIM_INFINITY, "ok")):
        monkeypatch.setattr(deploybot.resource, "getrlimit", lambda which, limit=limit: (limit, limit))
        (line,) = [line for line in doctor.says()[1][level] if "descriptors for 600 agents" in line]
        assert level == "ok" or "LimitNOFILE" in line


def test_doctor_reads_apps_yaml(doctor):
    path = doctor.folder / "apps.yaml"
    path.write_text("apps:\n- name: X Y\n")
    code, said = doctor.says()
    assert code == 1 and len(said["FAIL"]) == 3 and all(line.startswith("apps.yaml:2: ") for line in said["FAIL"])
    path.unlink()
    doctor.complains("warn", "apps.yaml is not there")
    path.mkdir()
    doctor.complains("FAIL", "apps.yaml")


def test_doctor_judges_secrets_by_their_length(doctor, monkeypatch):
    monkeypatch.setenv("DEPLOYBOT_TOKEN", "hunter2")
    doctor.complains("warn", "DEPLOYBOT_TOKEN", "short", "openssl rand")
    monkeypatch.setenv("DEPLOYBOT_TOKEN", "")
    assert doctor.says()[1]["warn"] == []
    monkeypatch.setenv("DEPLOYBOT_WEBHOOK_SECRET", "0123456789abcdef0123456789abcdef,hunter2")
    doctor.complains("warn", "DEPLOYBOT_WEBHOOK_SECRET", "short")
    monkeypatch.delenv("DEPLOYBOT_WEBHOOK_SECRET")
    doctor.complains("warn", "web", "set DEPLOYBOT_WEBHOOK_SECRET")
    (doctor.folder / "apps.yaml").write_text(json.dumps({"apps": [{**PUSHED, "deploy_on_push": False}]}))
    assert doctor.says()[1]["warn"] == []


def test_doctor_says_every_wrong_setting(doctor, capsys):
    assert deploybot.main(["doctor", "--port", "x", "--log-level", "y"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 2


def make_cert(folder, name, days):
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=x",
         "-keyout", folder / f"{name}.key", "-out", folder / f"{name}.pem", "-days", str(days)],
        check=True, capture_output=True,
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make certificates")
def test_doctor_reads_the_certificate(doctor, monkeypatch):
    for name, days in (("a", 30), ("b", 30), ("old", 40_000)):
        make_cert(doctor.folder, name, days)
    doctor.flags = ["--tls-cert", "a.pem", "--tls-key", "a.key"]
    assert "a.pem is good for 29 days" in doctor.says()[1]["ok"]
    now = deploybot.time.time
    for passed, level, words in ((17, "warn", "12 days"), (29.5, "warn", "0 days"), (31, "FAIL", "renew it")):
        monkeypatch.setattr(deploybot.time, "time", lambda passed=passed: now() + passed * 86400)
        doctor.complains(level, "a.pem", words, "SIGHUP")
    monkeypatch.setattr(deploybot.time, "time", now)
    doctor.flags = ["--tls-cert", "a.pem", "--tls-key", "b.key"]
    doctor.complains("FAIL", "a.pem", "b.key", "pair")
    doctor.flags = ["--tls-cert", "a.pem", "--tls-key", "none.key"]
    doctor.complains("FAIL", "none.key", "No such file")
    doctor.flags = ["--tls-cert", "old.pem", "--tls-key", "old.key"]
    assert "old.pem is good for 39999 days" in doctor.says()[1]["ok"], "times after 2049 are written another way"
    (doctor.folder / "chain.pem").write_text("".join((doctor.folder / f"{name}.pem").read_text() for name in ("a", "old")))
    doctor.flags = ["--tls-cert", "chain.pem", "--tls-key", "a.key"]
    assert "chain.pem is good for 29 days" in doctor.says()[1]["ok"], "its own is the first"
    os.chmod(doctor.folder / "a.key", 0o644)
    doctor.complains("FAIL", "a.key", "chmod 600")
