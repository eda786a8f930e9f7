"""Migrations: a database of each schema that ever was becomes exactly what a new one is; a failing step leaves the old one."""

from __future__ import annotations

import contextlib
import gc
import sqlite3

import pytest

import deploybot
from deploybot import MIGRATIONS, StartError, Status, Store

# Each schema that was ever released, as it was written then: frozen. A change of the schema appends one here and edits none.
SCHEMAS = [
    """
    CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
    INSERT INTO meta VALUES ('epoch', lower(hex(randomblob(4)))), ('removed_through', '0');
    CREATE TABLE agents (
            id TEXT PRIMARY KEY, hostname TEXT NOT NULL UNIQUE, capabilities TEXT NOT NULL, slots INTEGER NOT NULL,
            session TEXT NOT NULL, drained INTEGER NOT NULL DEFAULT 0, token_sha256 TEXT,
            registered_at TEXT NOT NULL, last_heartbeat TEXT NOT NULL
        ) STRICT;
    CREATE INDEX agents_secret ON agents (token_sha256);
    CREATE TABLE jobs (
            id TEXT PRIMARY KEY, repo TEXT NOT NULL, ref TEXT NOT NULL, host TEXT NOT NULL, app TEXT NOT NULL,
            status TEXT NOT NULL CHECK (status IN ('pending', 'running', 'success', 'failed', 'cancelled')),
            reason TEXT, hold TEXT CHECK (hold IN ('batch', 'lock', 'pause')), metadata TEXT NOT NULL,
            attempt INTEGER NOT NULL, retries INTEGER NOT NULL, timeout INTEGER NOT NULL,
            created_at TEXT NOT NULL, created_by TEXT NOT NULL, started_at TEXT, completed_at TEXT, cancel_requested_at TEXT,
            assigned_agent TEXT, exit_code INTEGER, error TEXT, "commit" TEXT, rolled_back_to TEXT, superseded_by TEXT,
            retry_of TEXT, deployment_id TEXT, spec TEXT NOT NULL, session TEXT,
            queued_at TEXT NOT NULL
        ) STRICT;
    CREATE INDEX jobs_open ON jobs (host, status, app) WHERE status IN ('pending', 'running');
    CREATE UNIQUE INDEX jobs_running ON jobs (host, app) WHERE status = 'running';
    CREATE INDEX jobs_host ON jobs (host, id);
    CREATE INDEX jobs_app ON jobs (app, id);
    CREATE INDEX jobs_repo ON jobs (repo COLLATE NOCASE, id);
    CREATE INDEX jobs_status ON jobs (status, id);
    CREATE TABLE events (
            position INTEGER PRIMARY KEY, lines INTEGER NOT NULL, kind TEXT NOT NULL CHECK (kind IN ('log', 'job')),
            job_id TEXT NOT NULL, host TEXT NOT NULL, app TEXT NOT NULL, attempt INTEGER NOT NULL,
            "offset" INTEGER NOT NULL, data TEXT NOT NULL
        ) STRICT;
    CREATE INDEX events_job ON events (job_id, position, kind);
    CREATE TABLE releases (
            app TEXT NOT NULL, host TEXT NOT NULL, job_id TEXT NOT NULL, "commit" TEXT, deployed_at TEXT NOT NULL,
            PRIMARY KEY (app, host)
        ) STRICT, WITHOUT ROWID;
    CREATE TABLE deliveries (
            id TEXT PRIMARY KEY, body_sha256 TEXT NOT NULL, received_at TEXT NOT NULL, jobs TEXT NOT NULL, message TEXT NOT NULL
        ) STRICT;
    CREATE INDEX deliveries_body ON deliveries (body_sha256);
    """,
    """
    CREATE TABLE tokens (
            id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, role TEXT NOT NULL, host TEXT, app TEXT, sha256 TEXT NOT NULL UNIQUE,
            parent TEXT, created_at TEXT NOT NULL, created_by TEXT NOT NULL, expires_at TEXT, last_used_at TEXT
        ) STRICT;
    CREATE TABLE audit (
            id INTEGER PRIMARY KEY, at TEXT NOT NULL, who TEXT NOT NULL, address TEXT NOT NULL, action TEXT NOT NULL,
            target TEXT NOT NULL, detail TEXT NOT NULL
        ) STRICT;
    CREATE TABLE pushes (
            app TEXT NOT NULL, ref TEXT NOT NULL, pushed_at INTEGER, before TEXT NOT NULL, PRIMARY KEY (app, ref)
        ) STRICT, WITHOUT ROWID;
    CREATE INDEX jobs_success ON jobs (app, host, id) WHERE status = 'success';
    ALTER TABLE events ADD COLUMN log_bytes INTEGER NOT NULL DEFAULT 0;
    """,
    """
    DROP INDEX jobs_open;
    """,
    """
    CREATE TABLE deployments (
            id TEXT PRIMARY KEY, app TEXT NOT NULL, repo TEXT NOT NULL, ref TEXT NOT NULL, branch TEXT, kind TEXT NOT NULL,
            status TEXT NOT NULL, reason TEXT, strategy TEXT NOT NULL, hosts INTEGER NOT NULL, held INTEGER NOT NULL,
            pending INTEGER NOT NULL, running INTEGER NOT NULL, success INTEGER NOT NULL, failed INTEGER NOT NULL,
            cancelled INTEGER NOT NULL, rolled_back INTEGER NOT NULL, hold TEXT, resume_at TEXT, override INTEGER NOT NULL,
            retry_of TEXT, superseded_by TEXT, delivery_id TEXT, created_at TEXT NOT NULL, created_by TEXT NOT NULL, started_at TEXT,
            completed_at TEXT
        ) STRICT;
    CREATE INDEX deployments_app ON deployments (app, id);
    CREATE INDEX deployments_status ON deployments (status, id);
    CREATE INDEX deployments_open ON deployments (app, id) WHERE completed_at IS NULL;
    CREATE INDEX deployments_paused ON deployments (resume_at) WHERE resume_at IS NOT NULL;
    CREATE INDEX jobs_deployment ON jobs (deployment_id, id) WHERE deployment_id IS NOT NULL;
    CREATE TABLE locks (
            app TEXT PRIMARY KEY, reason TEXT NOT NULL, "by" TEXT NOT NULL, at TEXT NOT NULL, until TEXT
        ) STRICT, WITHOUT ROWID;
    ALTER TABLE deliveries ADD COLUMN guid TEXT NOT NULL DEFAULT '';
    ALTER TABLE deliveries ADD COLUMN repo TEXT NOT NULL DEFAULT '';
    ALTER TABLE deliveries ADD COLUMN ref TEXT NOT NULL DEFAULT '';
    ALTER TABLE deliveries ADD COLUMN "commit" TEXT;
    ALTER TABLE deliveries ADD COLUMN pusher TEXT NOT NULL DEFAULT '';
    ALTER TABLE deliveries ADD COLUMN outcomes TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE deliveries ADD COLUMN settled INTEGER NOT NULL DEFAULT 1;
    UPDATE deliveries SET repo = substr(id, 1, instr(id, ' ') - 1), guid = substr(id, instr(id, ' ') + 1);
    CREATE INDEX deliveries_guid ON deliveries (guid);
    ALTER TABLE agents ADD COLUMN current TEXT NOT NULL DEFAULT '{}';
    PRAGMA writable_schema = ON;
    UPDATE sqlite_schema SET sql = replace(sql, '(''log'', ''job'')', '(''log'', ''job'', ''deployment'')')
            WHERE name = 'events';
    PRAGMA writable_schema = RESET;
    """,
]
ROWS = {
    1: """
    INSERT INTO agents VALUES ('a1', 'web-01', '{}', 1, 's', 0, NULL, '2026-01-01T00:00:00.000Z', '2026-01-01T00:00:00.000Z');
    INSERT INTO jobs (id, repo, ref, host, app, status, metadata, attempt, retries, timeout, created_at, created_by, spec, queued_at)
    VALUES ('01a208d2-125d-7000-9179-b171dcd08d79', 'o/n', 'main', 'web-01', 'web', 'pending', '{}', 0, 0, 60,
            '2026-01-01T00:00:00.000Z', 'me', '{}', '2026-01-01T00:00:00.000Z');
    INSERT INTO events VALUES (1, 1, 'job', '01a208d2-125d-7000-9179-b171dcd08d79', 'web-01', 'web', 0, 0, '{}');
    """,
    2: """
    INSERT INTO tokens VALUES ('t1', 'ci', 'operator', NULL, 'web', 'ab12', NULL, '2026-01-01T00:00:00.000Z', 'admin', NULL, NULL);
    INSERT INTO audit VALUES (1, '2026-01-01T00:00:00.000Z', 'admin', '192.0.2.1', 'token.create', 'ci', '');
    INSERT INTO pushes VALUES ('o/n', 'refs/heads/main', 1767225600, 'b');
    INSERT INTO deliveries VALUES ('o/n guid-1', 'sha256=ab', '2026-01-01T00:00:00.000Z', '["j1"]', '1 job for web');
    """,
}


def connect(path):
    return contextlib.closing(sqlite3.connect(path))


def make(path, version):
    """A database of that schema, with rows."""
    with connect(path) as db:
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        for number, schema in enumerate(SCHEMAS[:version], 1):
            db.executescript(schema + ROWS.get(number, ""))
        db.execute(f"PRAGMA user_version = {version}")
        db.commit()


def shape(path):
    """The schema, without what is only layout of its text."""
    with connect(path) as db:
        rows = db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name").fetchall()
        version = db.execute("PRAGMA user_version").fetchone()[0]
    return version, [(*row[:3], " ".join((row[3] or "").replace("(", " ( ").replace(")", " ) ").split())) for row in rows]


def columns(path):
    """What SELECT * gives, table by table: the order of columns counts, too."""
    with connect(path) as db:
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {table: db.execute(f"PRAGMA table_xinfo({table})").fetchall() for table in tables}


@pytest.fixture
def fresh(tmp_path):
    path = tmp_path / "fresh.db"
    Store(path).close()
    return path


@pytest.fixture
def with_step(monkeypatch):
    def add(*statements):
        monkeypatch.setattr(deploybot, "MIGRATIONS", (*MIGRATIONS, statements))

    return add


def test_every_schema_is_frozen_here():
    assert len(SCHEMAS) == len(MIGRATIONS), "a new migration needs its schema in this file"


@pytest.mark.parametrize("version", range(1, len(SCHEMAS) + 1))
def test_an_old_database_becomes_exactly_a_new_one(tmp_path, fresh, version):
    path = tmp_path / "old.db"
    make(path, version)
    Store(path).close()
    assert shape(path) == shape(fresh)
    assert columns(path) == columns(fresh)


@pytest.mark.parametrize("version", range(1, len(SCHEMAS) + 1))
def test_an_upgrade_keeps_what_was_there(tmp_path, version):
    path = tmp_path / "old.db"
    make(path, version)
    store = Store(path)
    with store.read() as db:
        (job,) = db.jobs_that_are(Status.PENDING)
        assert (job.repo, job.status, db.last_position(), db.agent_of("web-01").id) == ("o/n", "pending", 1, "a1")
        assert db.log_end(job.id, 0) == (0, 0)
        if version > 1:
            assert [(token.name, token.app) for token in db.tokens()] == [("ci", "web")]
            assert [row["target"] for row in db.audit({}, None, 10)] == ["ci"]
            assert db.newest_push("o/n", "refs/heads/main") == (1767225600, "b")
    store.close()


def test_a_second_start_changes_nothing(fresh):
    before = shape(fresh)
    with connect(fresh) as db:
        epoch = db.execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone()
    Store(fresh).close()
    assert shape(fresh) == before
    with connect(fresh) as db:
        assert db.execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone() == epoch


def test_a_step_is_taken_once(fresh, with_step):
    with_step("CREATE TABLE extra (a) STRICT".replace("(a)", "(a INTEGER)"), "INSERT INTO extra VALUES (1)")
    for _ in range(2):
        Store(fresh).close()
    with connect(fresh) as db:
        assert db.execute("SELECT * FROM extra").fetchall() == [(1,)]
    assert shape(fresh)[0] == len(MIGRATIONS) + 1


@pytest.mark.parametrize("bad", ["INSERT INTO nowhere VALUES (1)", "this is no SQL", "INSERT INTO meta VALUES ('epoch', 'x')"])
def test_a_failing_step_leaves_the_old_version_whole(fresh, with_step, bad):
    before = shape(fresh)
    with_step("CREATE TABLE extra (a INTEGER) STRICT", "UPDATE meta SET value = 'changed'", bad)
    with pytest.raises(StartError) as caught:
        Store(fresh)
    assert str(fresh) in str(caught.value)
    assert shape(fresh) == before
    with connect(fresh) as db:
        assert db.execute("SELECT count(*) FROM meta WHERE value = 'changed'").fetchone() == (0,)
    del caught
    gc.collect()  # the exception held the Store, and with it the lock
    with_step("CREATE TABLE extra (a INTEGER) STRICT")
    Store(fresh).close()
    assert shape(fresh)[0] == len(MIGRATIONS) + 1


def test_a_failing_first_step_leaves_an_empty_database(tmp_path, monkeypatch):
    path = tmp_path / "new.db"
    monkeypatch.setattr(deploybot, "MIGRATIONS", ((*MIGRATIONS[0], "this is no SQL"),))
    with pytest.raises(StartError):
        Store(path)
    assert shape(path) == (0, [])
