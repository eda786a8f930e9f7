"""Store: what write() answers is durable, commits are shared, and a failing one leaves no trace anywhere."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import sqlite3
import subprocess
import threading

import pytest
from conftest import command, failing_at, wait_for

import deploybot
from deploybot import EventFilter, Job, NotFound, Principal, Queries, Scope, StartError, Store, Unavailable

NOW = "2026-11-23T13:13:37.123Z"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "deploybot.db"


@pytest.fixture
def store(path):
    made = Store(path)
    yield made
    if not made._lock_file.closed:
        made.close()


@pytest.fixture
def outside(store, path):
    """A connection of somebody else, which sees only what is committed."""
    with contextlib.closing(sqlite3.connect(path)) as made:
        yield made


def job(number=1, **columns):
    values = dict.fromkeys(Job._fields)
    values |= {"repo": "o/n", "ref": "main", "host": "web-01", "app": "web", "status": "pending", "metadata": "{}"}
    values |= {"attempt": 0, "retries": 0, "timeout": 60, "created_at": NOW, "created_by": "me", "spec": "{}"}
    values |= {"queued_at": NOW}
    return Job(**{**values, "id": f"00000000-0000-7000-8000-{number:012x}", **columns})


def ids(connection):
    return [row[0] for row in connection.execute("SELECT id FROM jobs ORDER BY id")]


def add(number, then=None, **columns):
    """Work that adds a job and an event, announces it, and may raise."""

    def do(tx):
        made = job(number, **columns)
        tx.add("jobs", *made)
        event = tx.add_event(made, "job", 1, 0, "{}")
        if then:
            then(tx)
        return event.position

    return do


@contextlib.contextmanager
def traced(store):
    """The statements that the writing connection runs."""
    seen = []
    store._db.set_trace_callback(seen.append)
    yield seen
    store._db.set_trace_callback(None)


def together(store, *works):
    """Runs all in one batch, each from a thread of its own, in that order; their futures, done."""
    with concurrent.futures.ThreadPoolExecutor(len(works)) as pool:
        with store._writer:
            futures = []
            for count, work in enumerate(works, 1):
                futures.append(pool.submit(store.write, work))
                wait_for(lambda count=count: len(store._waiting) == count)
        concurrent.futures.wait(futures, 20)
    return futures


# -- durability --------------------------------------------------------------------------------------------------------


def test_write_returns_the_value_after_the_commit(store, outside):
    assert store.write(add(1)) == 1
    assert ids(outside) == [job(1).id]
    assert store.position == 1


def test_what_happens_in_a_write_has_one_order(store, outside):
    def effect(word):
        seen.append(f"{word} sees {len(ids(outside))}")

    def work(tx):
        tx.after(effect, "effect 1")
        add(1)(tx)
        tx.after(effect, "effect 2")

    with traced(store) as seen:
        store.write(work)
        seen.append("returned")
    words = [line.split(" INTO")[0] for line in seen]
    assert words == [*("BEGIN IMMEDIATE", "INSERT", "INSERT", "COMMIT"), *("effect 1 sees 1", "effect 2 sees 1", "returned")]


def test_new_jobs_with_their_events_and_audit_rows_are_one_statement(store, outside):
    def make(number):
        return lambda tx: tx.add_job(job(number), "{}", "127.0.0.1", "job.create" if number else "", f"the {number}th")

    announced = []
    store.announce = announced.extend
    with traced(store) as seen:
        together(store, *map(make, range(3)))
    # The trace tells of each trigger that runs, too, with the same text.
    assert {line.split(" VALUES")[0] for line in seen} == {"INSERT INTO new_jobs"}
    assert ids(outside) == [job(number).id for number in range(3)]
    events = outside.execute("SELECT position, lines, kind, job_id, host, app, attempt, data FROM events ORDER BY position")
    made = [
        (number + 1, 1, "job", job(number).id, job(number).host, job(number).app, job(number).attempt, "{}") for number in range(3)
    ]
    assert list(events) == made
    assert [(event.position, event.job_id) for event in announced] == [(number + 1, job(number).id) for number in range(3)]
    rows = outside.execute("SELECT at, who, address, action, target, detail FROM audit ORDER BY id")
    one = (job(1).created_at, job(1).created_by, "127.0.0.1", "job.create")
    assert list(rows) == [(*one, job(number).id, f"the {number}th") for number in (1, 2)]


def test_wal_and_full_are_in_force(store, path):
    def pragma(name):
        return store._db.execute(f"PRAGMA {name}").fetchone()[0]

    assert (pragma("journal_mode"), pragma("synchronous"), pragma("auto_vacuum")) == ("wal", 2, 2)
    assert pragma("user_version") == len(deploybot.MIGRATIONS)
    store.close()
    again = Store(path)
    assert again._db.execute("PRAGMA synchronous").fetchone()[0] == 2  # it is a setting of the connection
    again.close()


@pytest.mark.parametrize("replicated", [True, False])
def test_whether_it_ever_writes_the_wal_back(path, replicated):
    """A first database, and one that is opened and closed without a read; 1,000 pages are SQLite's own threshold."""
    wal, sizes = path.with_name(f"{path.name}-wal"), []
    for pages in (3000, 0):
        made = Store(path, replicated=replicated)
        for number in range(pages // 30):
            made.write(lambda tx, number=number: tx.put("meta", f"name {number}", "x" * 4096 * 30))
        sizes.append(wal.stat().st_size)
        made.close()
        sizes.append(wal.stat().st_size if wal.exists() else None)
    if replicated:
        assert sizes[0] > 3000 * 4096 and set(sizes) == {sizes[0]}
    else:
        assert 0 < sizes[0] < 1100 * 4096 and sizes[1:] == [None, 0, None]
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM meta WHERE name LIKE 'name %'").fetchone()[0] == 100


def test_readers_can_neither_write_nor_checkpoint(store):
    store.write(add(1))
    with store.read() as db:
        for statement in ("DELETE FROM jobs", "PRAGMA user_version = 7"):
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                db._db.execute(statement)
        assert db._db.execute("PRAGMA query_only").fetchone()[0] == 1
        with contextlib.suppress(sqlite3.OperationalError):  # SQLite says it is read-only, or that it did nothing
            assert db._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[2] in (-1, 0)


def test_positions_go_on_after_a_restart(store, path):
    store.write(add(1))
    store.close()
    again = Store(path)
    assert (again.position, again.write(add(2))) == (1, 2)
    again.close()


# -- shared commits ----------------------------------------------------------------------------------------------------


def test_works_that_wait_share_one_commit(store, outside):
    with traced(store) as seen:
        done = together(store, *[add(number) for number in range(12)])
    assert seen.count("COMMIT") == 1
    assert len(ids(outside)) == 12
    assert [future.result() for future in done] == list(range(1, 13))  # each its own value


def test_many_threads_all_get_their_own_value(store, outside):
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        values = list(pool.map(lambda number: (number, store.write(add(number, lambda tx: None))), range(200)))
    positions = [position for _, position in values]
    assert sorted(positions) == list(range(1, 201))
    assert dict(outside.execute("SELECT job_id, position FROM events")) == {job(n).id: p for n, p in values}


def test_effects_run_in_the_order_of_commit(store):
    ran = []

    def work(number):
        return lambda tx: [tx.after(ran.append, (number, part)) for part in "ab"]

    together(store, *map(work, range(6)))
    store.write(work(6))
    assert ran == [(number, part) for number in range(7) for part in "ab"]


def test_a_failing_work_undoes_itself_alone(store, outside):
    ran = []

    def fail(tx):
        tx.after(ran.append, "never")
        raise NotFound("on purpose")

    good = [add(number, lambda tx, number=number: tx.after(ran.append, number)) for number in (1, 3)]
    first, bad, last = together(store, good[0], add(2, fail), good[1])
    with pytest.raises(NotFound, match="on purpose"):
        bad.result()
    assert ids(outside) == [job(1).id, job(3).id]
    assert ran == [1, 3]
    assert (first.result(), last.result(), store.position) == (1, 2, 2)  # its position is given to the next


def change(tx):
    """What SQLite does at once: it cannot be taken back alone."""
    assert tx.change_job(tx.job(job(9).id), commit="c" * 40)


def test_a_failing_work_that_changed_rows_undoes_itself_alone(store, outside):
    """The others are done again, each in a transaction of its own: once, with the effects of the last time."""
    ran = []
    store.write(add(9))

    def fail(tx):
        tx.after(ran.append, "never")
        change(tx)
        raise NotFound("on purpose")

    good = [add(number, lambda tx, number=number: tx.after(ran.append, number)) for number in (1, 3)]
    first, bad, last = together(store, good[0], add(2, fail), good[1])
    with pytest.raises(NotFound, match="on purpose"):
        bad.result()
    assert (ids(outside), ran) == ([job(1).id, job(3).id, job(9).id], [1, 3])
    assert (first.result(), last.result(), store.position) == (2, 3, 3)
    assert outside.execute('SELECT "commit" FROM jobs WHERE id = ?', (job(9).id,)).fetchone() == (None,)
    assert store.write(lambda tx: tx.job(job(9).id)).commit is None


def test_rows_that_were_put_off_are_seen_by_all_that_comes_later(store):
    def look(tx):
        return tx.one("SELECT count(*) FROM jobs")[0], tx.job(job(2).id).ref

    def own(tx):
        tx.add("jobs", *job(4))
        return look(tx)

    done = together(store, add(1), add(2, ref="dev"), look, add(3), own)
    assert [future.result() for future in done] == [1, 2, (2, "dev"), 3, (4, "dev")]


@pytest.mark.parametrize(("count", "statements"), [(1, 1), (2, 1), (64, 1), (65, 4), (130, 5)])
def test_many_rows_go_in_by_few_statements(store, outside, count, statements):
    """By one that is its own transaction, or by some between BEGIN and COMMIT."""

    def work(tx):
        for number in range(count):
            tx.add("jobs", *job(number, ref=f"r{number}"))

    with traced(store) as seen:
        store.write(work)
    assert len(seen) == statements
    assert list(outside.execute("SELECT id, ref FROM jobs ORDER BY id")) == [(job(n).id, f"r{n}") for n in range(count)]


def test_a_broken_constraint_of_a_row_that_was_put_off_hurts_nobody_else(store, outside):
    """Its own work did not look, another's read gave it to SQLite."""
    done = together(store, add(1), add(1), lambda tx: tx.one("SELECT count(*) FROM jobs")[0])
    assert isinstance(done[1].exception(), sqlite3.IntegrityError)
    assert (done[0].result(), done[2].result(), ids(outside)) == (1, 1, [job(1).id])


def test_what_sqlite_shows_of_a_job_is_what_we_would(store):
    metadata = {"a": [1, 2.5, None, True, 'é\U0001f600\x01\\"\n'], "b": {}}
    made = job(1, ref="dev\x7f'", metadata=deploybot.dump(metadata), exit_code=-(1 << 31), error="\t<&>")
    store.write(lambda tx: tx.add("jobs", *made))
    with store.read() as db:
        app, text = db.shown(made.id)
    assert (app, deploybot.load_json(text.encode())) == (made.app, made.public())


# -- what is known of recent jobs --------------------------------------------------------------------------------------


def keep(number, **columns):
    """Work that adds a job which the store will know."""

    def do(tx):
        add(number, **columns)(tx)
        tx.learn(job(number).id, (job(number, **columns), "text"))

    return do


def test_a_recent_job_is_known_without_asking_sqlite(store):
    store.write(keep(1))
    with traced(store) as seen:
        assert store.write(lambda tx: tx.job(job(1).id)) == job(1)
    assert [line for line in seen if "SELECT" in line] == []
    assert store.recent == {job(1).id: (job(1), "text")}


def test_what_a_failing_work_or_commit_would_have_taught_is_not_known(store):
    with pytest.raises(ZeroDivisionError):
        store.write(lambda tx: (keep(1)(tx), 1 / 0))
    with failing_at(store, "COMMIT"), pytest.raises(Unavailable):
        store.write(keep(2))
    assert store.recent == {}
    with pytest.raises(NotFound):
        store.write(lambda tx: tx.job(job(1).id))


def test_a_change_is_seen_at_once_and_by_works_of_the_same_commit(store):
    store.write(keep(1))

    def work(tx):
        tx.change_job(tx.job(job(1).id), commit="c" * 40)
        return tx.job(job(1).id).commit

    done = together(store, work, lambda tx: tx.job(job(1).id).commit)
    assert [future.result() for future in done] == ["c" * 40] * 2
    assert job(1).id not in store.recent  # until somebody says what it is now


def test_the_end_of_a_log_is_known_by_attempt(store):
    store.write(add(1))
    first = job(1, attempt=1)
    store.write(lambda tx: tx.add_event(first, "log", 3, 0, "[]", 30))
    with traced(store) as seen:
        ends = store.write(lambda tx: (tx.log_end(first.id, 1), tx.log_end(first.id, 2)))
    assert (ends, [line for line in seen if "SELECT" in line]) == (((3, 30), (0, 30)), [])
    store.recent.clear()
    assert store.write(lambda tx: (tx.log_end(first.id, 1), tx.log_end(first.id, 2))) == ((3, 30), (0, 30))


def test_the_oldest_is_forgotten_first(store, monkeypatch):
    monkeypatch.setattr(deploybot, "RECENT", 3)
    for number in (1, 2, 3, 1, 4):
        store.write(lambda tx, number=number: tx.learn(number, "known"))
    assert list(store.recent) == [3, 1, 4]


def test_a_failing_work_alone_leaves_nothing(store, outside):
    with pytest.raises(ZeroDivisionError):
        store.write(add(1, lambda tx: 1 / 0))
    assert (ids(outside), store.position, store.write(add(1))) == ([], 0, 1)


def test_a_broken_constraint_is_the_fault_of_its_work_alone(store, outside):
    good, bad = together(store, add(1), add(2, status="odd"))
    assert good.result() == 1
    assert isinstance(bad.exception(), sqlite3.IntegrityError)
    assert ids(outside) == [job(1).id]


def test_the_writer_is_free_after_each_failure(store):
    for error in (ZeroDivisionError, KeyboardInterrupt, SystemExit):

        def work(tx, error=error):
            raise error

        with pytest.raises(error):
            store.write(work)
        assert not store._writer.locked()
        assert not store._db.in_transaction
    assert store.write(add(1)) == 1


def test_an_effect_that_fails_hides_no_commit(store, outside):
    """Effects do not raise; should one, what was committed is still answered as done."""
    ran = []
    works = [add(1, lambda tx: tx.after(lambda: 1 / 0)), add(2, lambda tx: tx.after(ran.append, 2))]
    done = together(store, *works)
    assert [future.exception() for future in done] == [None, None]
    assert ([future.result() for future in done], ran, len(ids(outside))) == ([1, 2], [2], 2)


@pytest.mark.parametrize("replicated", [False, True])
def test_a_write_after_the_end_is_told_so(path, replicated):
    store = Store(path, replicated=replicated)
    store.close()
    for work in (add(1), lambda tx: tx.one("SELECT 1"), lambda tx: None):
        with concurrent.futures.ThreadPoolExecutor(1) as pool, pytest.raises(Unavailable, match="closed"):
            pool.submit(store.write, work).result(20)


@pytest.mark.parametrize("replicated", [False, True])
def test_the_end_waits_for_the_commit_under_way(path, replicated):
    store = Store(path, replicated=replicated)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        entered, go_on = threading.Event(), threading.Event()

        def slow(tx):
            entered.set()
            assert go_on.wait(20)
            return add(1)(tx)

        written = pool.submit(store.write, slow)
        assert entered.wait(20)
        closed = pool.submit(store.close)
        with pytest.raises(concurrent.futures.TimeoutError):
            closed.result(0.3)
        go_on.set()
        assert (written.result(20), closed.result(20)) == (1, None)


# -- a database that cannot be written ---------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", ["COMMIT", "BEGIN", "INSERT INTO events"])
def test_a_failing_statement_of_sqlite_changes_nothing_for_anybody(store, outside, statement):
    ran = []
    store.write(add(1))
    works = [add(number, lambda tx: tx.after(ran.append, "never")) for number in (2, 3, 4)]
    with failing_at(store, statement) as faulty:
        done = together(store, *works)
    assert faulty.seen >= 1
    for future in done:
        assert isinstance(future.exception(), Unavailable)
        assert "disk I/O error" in str(future.exception())
    assert (ids(outside), ran, store.position) == ([job(1).id], [], 1)
    assert not store._db.in_transaction
    assert store.write(add(5)) == 2
    assert ids(outside) == [job(1).id, job(5).id]


def test_a_full_disk_is_unavailable_until_there_is_room(store, outside):
    ran = []
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages + 2}")

    def large(tx):
        tx.after(ran.append, "never")
        return tx.add_event(job(1), "log", 1, 0, "x" * 100_000)

    done = together(store, add(1), large, add(2))
    assert [type(future.exception()) for future in done] == [Unavailable] * 3
    assert (ids(outside), ran, store.position) == ([], [], 0)
    with store.read() as db:
        assert db.jobs({}, None, None, 10)[2] == 0  # reading goes on
    store._db.execute(f"PRAGMA max_page_count = {pages + 1000}")
    assert store.write(large).position == 1


def test_a_database_that_another_program_holds_is_unavailable(store, outside):
    store._db.execute("PRAGMA busy_timeout = 10")
    outside.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable, match="locked"):
        store.write(add(1))
    outside.execute("ROLLBACK")
    assert store.write(add(1)) == 1


def test_a_controller_answers_503_and_goes_on(controller):
    with failing_at(controller.daemon.store, "COMMIT"):
        status, headers, _ = controller.raw("POST", "/v1/jobs", {"repo": "o/n", "ref": "main", "host": "web-01"})
        assert (status, int(headers["Retry-After"]) > 0) == (503, True)
        assert controller.ok("GET", "/v1/jobs")["jobs"] == []
    assert controller.daemon.queue.depth == 0
    made = controller.create()
    assert controller.beat(controller.register())["job"]["id"] == made["id"]


# -- readers -----------------------------------------------------------------------------------------------------------


def test_readers_cannot_write(store):
    for _ in range(deploybot.READERS + 1):  # also those that come back into the pool
        with pytest.raises(Unavailable, match=r"readonly|read-only"), store.read() as db:
            db.rows("DELETE FROM jobs")


def test_readers_are_few_and_shared(store):
    with contextlib.ExitStack() as stack:
        connections = {id(stack.enter_context(store.read())._db) for _ in range(deploybot.READERS)}
        assert store._readers.empty()
    assert len(connections) == store._readers.qsize() == deploybot.READERS


def test_a_reader_comes_back_after_an_error(store):
    for _ in range(deploybot.READERS * 2):
        with pytest.raises(NotFound), store.read() as db:
            db.job("nothing")
        with pytest.raises(Unavailable), store.read() as db:
            db.rows("SELECT nonsense")
    assert store._readers.qsize() == deploybot.READERS


def test_a_reader_that_stops_in_the_middle_holds_no_old_state(store):
    for number in (1, 2, 3):
        store.write(add(number))
    for _ in range(deploybot.READERS):
        with store.read() as db:
            for _ in db.events(EventFilter(), 0, 3):
                break
    store.write(add(4))
    for _ in range(deploybot.READERS):
        with store.read() as db:
            assert len(list(db.events(EventFilter(), 0, 10))) == 4
    assert store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0  # nobody holds the log


def test_readers_work_while_somebody_writes(store):
    inside, go = threading.Event(), threading.Event()

    def work(tx):
        add(1)(tx)
        inside.set()
        assert go.wait(20)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        writing = pool.submit(store.write, work)
        assert inside.wait(20)
        with store.read() as db:
            assert db.jobs({}, None, None, 10)[2] == 0
        go.set()
        writing.result(20)


# -- transitions -------------------------------------------------------------------------------------------------------


def test_a_change_names_the_status_and_attempt_it_starts_from(store):
    pending = job(1)
    store.write(add(1))
    running = store.write(lambda tx: tx.change_job(pending, status="running", attempt=1))
    assert (running.status, running.attempt) == ("running", 1)
    for seen in (pending, running._replace(attempt=2)):
        with pytest.raises(AssertionError, match="was read in this transaction"):
            store.write(lambda tx, seen=seen: tx.change_job(seen, status="failed"))
    with store.read() as db:
        assert db.job(pending.id) == running


def test_one_app_runs_once_on_a_host(store):
    for number in (1, 2):
        store.write(add(number))
    store.write(lambda tx: tx.change_job(job(1), status="running", attempt=1))
    with pytest.raises(sqlite3.IntegrityError):
        store.write(lambda tx: tx.change_job(job(2), status="running", attempt=1))
    store.write(add(3, app="other", status="running"))
    store.write(add(4, host="web-02", status="running"))


@pytest.mark.parametrize(
    "columns", [{"status": "odd"}, {"hold": "odd"}, {"attempt": "x"}, {"repo": None}, {"timeout": 1.5}], ids=str
)
def test_the_database_refuses_what_is_no_job(store, columns):
    with pytest.raises(sqlite3.IntegrityError):
        store.write(add(1, **columns))


# -- start -------------------------------------------------------------------------------------------------------------


def refusal(path):
    with pytest.raises(StartError) as caught:
        Store(path)
    (line,) = caught.value.problems
    assert "\n" not in line
    return line


def test_a_second_daemon_on_the_same_database_is_refused(store, path):
    assert f"{path}: another deploybot.py uses it" in refusal(path)
    store.close()
    Store(path).close()


def test_a_second_process_is_refused_in_one_line(store, path):
    start = [*command("deploybot.py"), "--port", "0", "--db", str(path), "--apps", str(path) + ".none"]
    done = subprocess.run(start, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"deploybot.py: database {path}: another deploybot.py uses it"
    assert "Traceback" not in done.stderr


def test_a_newer_schema_is_refused_and_left_as_it_is(path):
    Store(path).close()
    newer = len(deploybot.MIGRATIONS) + 1
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {newer}")
    assert f"newer DeployBot (schema {newer}" in refusal(path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == newer


def test_an_unusable_path_is_one_line(tmp_path):
    folder, file, garbage = tmp_path / "folder", tmp_path / "file", tmp_path / "garbage"
    folder.mkdir()
    file.write_text("x")
    garbage.write_bytes(b"this is no database" * 500)
    for path in (folder, file / "x.db", garbage, file / "deeper" / "x.db"):
        assert str(path) in refusal(path)
    assert garbage.read_bytes() == b"this is no database" * 500  # never made anew in silence


def test_a_failed_start_lets_the_next_one_in(path):
    path.parent.mkdir(parents=True)
    path.write_bytes(b"this is no database" * 500)
    refusal(path)
    path.unlink()
    gc.collect()  # the exception held the first Store
    Store(path).close()


def test_the_folder_is_made(tmp_path):
    path = tmp_path / "a" / "b" / "deploybot.db"
    Store(path).close()
    assert path.exists()


# -- plans -------------------------------------------------------------------------------------------------------------

JOB = job(1).id
QUERIES = {
    "agent_of": [("web-01",)],
    "agents": [()],
    "audit": [({}, None, 101), ({}, 500, 101), ({"who": "github"}, None, 101), ({"action": "push", "who": "github"}, 9, 5)],
    "before": [("web", "host-1", None), ("web", "gone", "abcdef0")],
    "deliveries": [(None, None, 20), ("o/n", None, 20), (None, "guid-5", 20), (None, None, 1, "guid-5")],
    "delivery": [("x", "y")],
    "deployment": [(JOB,)],
    "deployments": [
        (equal, None, None, 20) for equal in ({}, {"app": "web"}, {"status": "success"}, {"app": "a", "status": "failed"})
    ]
    + [({}, "00000000-0000", None, 20), ({}, None, JOB, 20)],
    "events": [(EventFilter(), 2990, 3100), (EventFilter(job_id=JOB), 0, 9000), (EventFilter("quiet"), 2990, 3100)],
    "expired": [(JOB, NOW)],
    "job": [(JOB,)],
    "jobs": [
        *[(equal, None, None, 20) for equal in ({}, {"host": "web-01"}, {"app": "web"}, {"repo": "O/N"}, {"status": "success"})],
        *[({"host": "quiet", "status": "success"}, None, None, 20), ({"app": "quiet", "status": "success"}, None, None, 20)],
        *[({"repo": "o/quiet", "status": "success"}, None, None, 20), ({"host": "web-01", "app": "quiet"}, None, None, 20)],
        *[({}, "00000000-0000", None, 20), ({}, None, JOB, 20), ({"status": "pending"}, None, None, 20)],
    ],
    "jobs_of": [(JOB,), (JOB, "status = 'pending'", 20)],
    "jobs_that_are": [("running",)],
    "last_id": [("jobs",), ("deployments",)],
    "last_position": [()],
    "last_position_of": [(JOB, "job"), (JOB, "log")],
    "lock_of": [("web",)],
    "locks": [()],
    "log_end": [(JOB, 1)],
    "log_events": [(JOB, 0)],
    "meta": [("epoch",)],
    "newest_push": [("O/N", "refs/heads/main")],
    "open_deployments": [("web",)],
    "old_jobs": [("", "~", 20), (JOB, "~", 20), ("", JOB, 20)],
    "paused_until": [(NOW,)],
    "pending": [()],
    "recent_chunks": [
        (EventFilter(), 50),
        (EventFilter(job_id=JOB), 50),
        (EventFilter("web-01"), 50),
        (EventFilter("web-01", "web"), 50),
    ],
    "releases": [
        ([("web", "host-1"), ("web", "gone"), ("other", "host-1")],),
        ([("web", f"host-{number}") for number in range(100)],),
    ],
    "running_apps": [("web-01",)],
    "shown": [(JOB,)],
    "tokens": [()],
    "was_overtaken": [(job(0),)],
}
CALLS = [(name, values) for name, calls in QUERIES.items() for values in calls]
HISTORY = 3000  # ended jobs


@pytest.fixture(scope="module")
def aged(tmp_path_factory):
    """A database with a long history and little going on."""
    made = Store(tmp_path_factory.mktemp("aged") / "deploybot.db")

    def fill(tx):
        for number in range(HISTORY):
            ended = job(number, status="success")
            tx.add("jobs", *ended)
            tx.add_event(ended, "job", 1, 0, "{}")
            tx.audited(NOW, Principal("github", Scope.PUBLIC), "push", "o/n")
            tx.put("releases", "web", f"host-{number}", ended.id, None, NOW)
            about = ("web", "o/n", "main", "main", "push", "success", None, "{}", 1, 0, 0, 0, 1, 0, 0, 0, None, None, 0, None, None)
            tx.add("deployments", ended.id, *about, f"guid-{number}", NOW, "me", NOW, NOW)
            told = (f"guid-{number}", "o/n", "refs/heads/main", None, "me", "[]", 1)
            tx.put("deliveries", f"o/n guid-{number}", f"sha256={number}", NOW, "[]", "", *told)
        for number in range(3):
            tx.add("jobs", *job(HISTORY + number, host=f"quiet-{number}", app="other", status="running", attempt=1))
        tx.position += 50_000  # the newest log lines are looked for in the last 50,000 positions
        tx.add_event(job(0), "log", 1, 0, "[]")

    made.write(fill)
    yield made
    made.close()


def test_every_query_is_in_the_table():
    public = {name for name in vars(Queries) if not name.startswith("_")} - {"one", "rows"}
    assert public == set(QUERIES)


@pytest.mark.parametrize(("name", "values"), CALLS, ids=[f"{name}-{values}"[:60] for name, values in CALLS])
def test_no_query_reads_the_history(aged, name, values):
    """Counted in steps of SQLite's machine: a row costs it about five."""
    db = aged._db
    steps, seen = [], []
    db.set_progress_handler(lambda: steps.append(1), 100)
    db.set_trace_callback(seen.append)
    try:
        found = getattr(Queries(db), name)(*values)
        rows = len(list(found)) if found is not None and not isinstance(found, int | str | Job) else 1
    except NotFound:
        rows = 1
    finally:
        db.set_progress_handler(None, 0)
        db.set_trace_callback(None)
    assert len(steps) * 100 < 3000 + rows * 100, (rows, [plan(db, sql) for sql in seen])


def plan(db, sql):
    return [row[3] for row in db.execute("EXPLAIN QUERY PLAN " + sql)]


@pytest.mark.parametrize(("name", "values"), CALLS, ids=[f"{name}-{values}"[:60] for name, values in CALLS])
def test_no_query_scans_jobs_or_events(aged, name, values):
    """But for the newest of all, which are read from the end of an index and limited."""
    seen = []
    aged._db.set_trace_callback(seen.append)
    with contextlib.suppress(NotFound):
        found = getattr(Queries(aged._db), name)(*values)
        list(found) if hasattr(found, "__next__") else None
    aged._db.set_trace_callback(None)
    assert seen
    for sql in seen:
        for line in plan(aged._db, sql):
            if line.startswith(("SCAN jobs", "SCAN events")) and "jobs_open" not in line:  # that index holds open jobs alone
                assert "DESC LIMIT" in sql and "TEMP B-TREE" not in str(plan(aged._db, sql)), (line, sql)


def test_the_claim_reads_running_jobs_alone(aged):
    seen = []
    aged._db.set_trace_callback(seen.append)
    Queries(aged._db).running_apps("web-01")
    aged._db.set_trace_callback(None)
    for sql in seen:
        assert all("jobs_running (host=?" in line for line in plan(aged._db, sql) if "jobs" in line), sql


def test_the_walk_of_retention_reads_a_page_of_ids_and_two_successes_a_job(aged):
    """In the order of the primary key, so that it goes on where it was; what stays is found in the index of successes."""
    seen = []
    aged._db.set_trace_callback(seen.append)
    assert [kept for *_, kept in Queries(aged._db).old_jobs("", "~", 3)] == [0, 0, 0]
    assert [kept for *_, kept in Queries(aged._db).old_jobs(job(HISTORY - 4).id, "~", 4)] == [0, 1, 1, 0]
    aged._db.set_trace_callback(None)
    for sql in seen:
        reads = str(plan(aged._db, sql))
        assert "sqlite_autoindex_jobs_1 (id>? AND id<?)" in reads
        assert "jobs_success (app=? AND host=? AND id>?)" in reads
        assert "SCAN jobs" not in reads and "TEMP B-TREE" not in reads


def test_a_row_that_sqlite_cannot_take_is_the_fault_of_its_work_alone(store, outside):
    """Its own work did not give it to SQLite; whoever looks next must not pay for it, and nobody is told that it was stored."""

    def bad(tx):
        tx.add("audit", None, NOW, "\ud800", "", "a", "b", "c")
        return "stored"

    def look(tx):
        return len(tx.audit({}, None, 10))

    done = together(store, add(1), bad, look, add(2))
    assert isinstance(done[1].exception(), UnicodeEncodeError)
    assert (done[0].result(), done[2].result(), done[3].result(), ids(outside)) == (1, 0, 2, [job(1).id, job(2).id])
