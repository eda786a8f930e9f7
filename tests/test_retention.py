"""Retention: what is old goes in small slices and leaves what is still needed; and the log of one job has a limit that it names."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shutil
import sqlite3
import time

import pytest
from conftest import SECRET, Controller, EventStream, FakeClock, failing_at

import deploybot

DAY = 86400
HOSTS = ("web-01", "web-02")


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """One sweep is one walk, however slow the machine is."""
    monkeypatch.setattr(deploybot, "RETENTION_BUDGET", 60.0)


@pytest.fixture
def c(make_controller, clock):
    """In open mode, with an agent on each of the hosts; what waits does not expire."""
    made = make_controller(clock=clock, webhook_secret=SECRET, pending_expiry="3650d")
    made.agents = {host: made.register(host) for host in HOSTS}
    return made


@pytest.fixture
def small(monkeypatch):
    """Slices of a few rows."""
    monkeypatch.setattr(deploybot, "RETENTION_JOBS", 3)
    monkeypatch.setattr(deploybot, "RETENTION_EVENTS", 7)


def deploy(c, end="success", repo="myorg/web", host="web-01", lines=2):
    """An ended job; each line is an upload of its own."""
    c.create(host=host, repo=repo, force=True)
    job = c.beat(c.agents[host])["job"]
    for number in range(lines):
        c.logs(job, f"line {number}", offset=number)
    return c.end(job, end, commit="c" * 40)


@pytest.fixture(scope="module")
def past(tmp_path_factory):
    """A folder with the database of what `history` says, the agents, and the ids that stay."""
    made = Controller(tmp_path_factory.mktemp("past"), clock=FakeClock(), open=True)
    made.agents = {host: made.register(host) for host in HOSTS}
    jobs = {}
    for end in ("success", "failed", "success", "success", "cancelled"):
        for repo in ("myorg/web", "myorg/api"):
            for host in HOSTS:
                jobs.setdefault((repo, host), []).append(deploy(made, end, repo, host)["id"])
    made.stop()
    return made.folder, made.agents, sorted(job for five in jobs.values() for job in five[2:4])


@pytest.fixture
def history(past, make_controller, clock, tmp_path):
    """As c: five jobs of each of two apps on each of two hosts, interleaved; `stay`: the last two successes of each."""
    folder, agents, stay = past
    shutil.copytree(folder, tmp_path / "history")
    made = make_controller("history", clock=clock, pending_expiry="3650d")
    made.agents, made.stay = agents, stay
    return made


def rows(c, sql, *values):
    """As another program reads them."""
    with contextlib.closing(sqlite3.connect(c.config.db)) as db:
        return db.execute(sql, values).fetchall()


def ids(c):
    return sorted(row[0] for row in rows(c, "SELECT id FROM jobs"))


def count(c, table):
    return rows(c, f"SELECT count(*) FROM {table}")[0][0]


def kept_whole(c, jobs):
    """These jobs are all that there is, each with all that it said."""
    assert ids(c) == sorted(jobs)
    assert {row[0] for row in rows(c, "SELECT DISTINCT job_id FROM events")} == set(jobs)
    for job in jobs:
        assert [line["message"] for line in c.lines({"id": job})] == ["line 0", "line 1"]


# -- what goes and what stays ------------------------------------------------------------------------------------------


def test_the_last_two_successes_of_each_app_on_each_host_stay(history, clock):
    """And what runs now is still shown, with the job that brought it."""
    history.set_app(name="web", repo="other/web", hosts=["web-01"])
    release = deploy(history, repo="other/web")
    assert len(ids(history)) == 21
    clock.advance(91 * DAY)
    history.daemon.sweep()
    kept_whole(history, [*history.stay, release["id"]])
    (host,) = history.ok("GET", "/v1/apps")["apps"][0]["hosts"]
    runs = {"hostname": "web-01", "commit": "c" * 40, "job_id": release["id"], "deployed_at": release["completed_at"]}
    assert host == {**runs, "wanted": "c" * 40, "actual": None}


def test_what_is_removed_is_found_nowhere(c, clock):
    gone, stays = deploy(c, "failed"), deploy(c)
    clock.advance(91 * DAY)
    c.daemon.sweep()
    for path in ("", "/logs"):
        assert c.call("GET", f"/v1/jobs/{gone['id']}{path}")[0] == 404
    assert c.call("GET", f"/v1/logs/stream?job_id={gone['id']}")[0] == 404
    assert [job["id"] for job in c.ok("GET", "/v1/jobs")["jobs"]] == [stays["id"]]


def test_a_third_success_lets_the_first_go(c, clock):
    first, second = deploy(c)["id"], deploy(c)["id"]
    clock.advance(91 * DAY)
    c.daemon.sweep()
    assert ids(c) == [first, second]
    third = deploy(c)["id"]
    clock.advance(deploybot.RETENTION_PAUSE)
    c.daemon.sweep()
    assert ids(c) == [second, third]


def test_to_the_millisecond(c, clock):
    """Of its end; it was made a day before."""
    job = c.create()
    clock.advance(DAY)
    c.end(c.beat(c.agents["web-01"])["job"], "failed")
    clock.advance(90 * DAY)
    c.daemon.sweep()
    assert ids(c) == [job["id"]]
    clock.advance(0.001)
    c.restart()
    c.daemon.sweep()
    assert ids(c) == []


def test_age_counts_from_the_end(c, clock):
    """A job that waited for months is as young as its end."""
    waited = c.create()
    clock.advance(89 * DAY)
    c.end(c.beat(c.agents["web-01"])["job"], "failed")
    for days, left in ((80, [waited["id"]]), (11, [])):
        clock.advance(days * DAY)
        c.daemon.sweep()
        assert ids(c) == left


def test_what_waits_or_runs_stays_however_old(make_controller, clock):
    c = make_controller(clock=clock, pending_expiry="3650d", lost_after="3650d", retention_days=1)
    c.agents = {"web-01": c.register("web-01")}
    gone = deploy(c, "failed")["id"]
    c.create(timeout=7 * DAY)
    running = c.beat(c.agents["web-01"])["job"]
    c.logs(running, "line 0", "line 1")
    waiting = c.create("next")
    clock.advance(3 * DAY)
    c.daemon.sweep()
    assert ids(c) == [running["id"], waiting["id"]] and gone not in ids(c)
    assert [line["message"] for line in c.lines(running)] == ["line 0", "line 1"]
    c.end(running)
    assert c.beat(c.agents["web-01"])["job"]["id"] == waiting["id"]


def test_what_is_young_stays_whole(history, clock):
    before = ids(history), count(history, "events"), count(history, "audit")
    clock.advance(89 * DAY)
    history.daemon.sweep()
    assert (ids(history), count(history, "events"), count(history, "audit")) == before


def test_0_days_are_for_ever(history, clock):
    history.restart(retention_days=0)
    before = ids(history), count(history, "events"), count(history, "audit")
    clock.advance(4000 * DAY)
    history.daemon.sweep()
    assert (ids(history), count(history, "events"), count(history, "audit")) == before


def test_more_days_than_there_are_harm_nothing(history, clock):
    """The calendar ends before them."""
    history.restart(retention_days=999_999_999, pending_expiry=1e14)
    before = ids(history)
    clock.advance(4000 * DAY)
    history.daemon.jobs.sweep()
    assert ids(history) == before


def test_the_audit_goes_as_the_jobs_do(c, clock):
    c.ok("POST", "/v1/hosts/web-01/drain")
    clock.advance(50 * DAY)
    c.ok("POST", "/v1/hosts/web-01/resume")
    for days, actions in ((40, ["host.resume", "host.drain", "host.enrol"]), (1, ["host.resume"]), (50, [])):
        clock.advance(days * DAY)
        c.daemon.sweep()
        assert list(dict.fromkeys(row["action"] for row in c.ok("GET", "/v1/audit")["audit"])) == actions


def test_a_delivery_is_remembered_for_thirty_days(c, clock):
    c.set_app(name="web", repo="myorg/web", hosts=["web-01"], deploy_on_push=True)
    body = {"ref": "refs/heads/main", "before": "0" * 40, "after": "a" * 40, "repository": {"full_name": "myorg/web"}}
    data = json.dumps(body).encode()
    signed = {"X-Hub-Signature-256": deploybot.signature_of(SECRET, data), "X-GitHub-Delivery": "d-1"}

    def deliver():
        (job,) = c.call("POST", "/v1/webhooks/github", data, signed)[1]["jobs_created"]
        return job

    first = deliver()
    c.end(c.beat(c.agents["web-01"])["job"])
    clock.advance(30 * DAY)
    c.daemon.sweep()
    assert deliver() == first
    clock.advance(DAY)
    c.daemon.sweep()
    assert count(c, "deliveries") == 0
    assert deliver() != first


# -- how ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def after_each_write(c, look):
    """`look()` is called after each transaction."""
    write = c.daemon.store.write

    def watched(do, **how):
        value = write(do, **how)
        look()
        return value

    c.daemon.store.write = watched
    try:
        yield
    finally:
        c.daemon.store.write = write


@pytest.mark.parametrize(("jobs", "events"), [(3, 1000), (50, 7)])
def test_it_goes_in_slices_that_keep_nobody_waiting(history, clock, monkeypatch, jobs, events):
    """Of so many jobs, and of so many events, also of one job."""
    monkeypatch.setattr(deploybot, "RETENTION_JOBS", jobs)
    monkeypatch.setattr(deploybot, "RETENTION_EVENTS", events)
    deploy(history, "failed", lines=20)
    clock.advance(91 * DAY)
    left = [(count(history, "jobs"), count(history, "events"))]
    with after_each_write(history, lambda: left.append((count(history, "jobs"), count(history, "events")))):
        history.daemon.sweep()
    for before, after in itertools.pairwise(left):
        assert before[0] - after[0] <= jobs and before[1] - after[1] <= events
    kept_whole(history, history.stay)


def test_a_sweep_gives_it_a_moment_and_the_next_one_goes_on(history, clock, small, monkeypatch):
    """The controller has other things to do every second."""
    clock.advance(91 * DAY)
    monkeypatch.setattr(deploybot, "RETENTION_BUDGET", 0.02)
    sweeps, slices = 0, 0

    def slow():
        nonlocal slices
        slices += 1
        time.sleep(0.015)

    with after_each_write(history, slow):
        while ids(history) != history.stay:
            before, sweeps = slices, sweeps + 1
            history.daemon.sweep()
            assert slices - before <= 2
            assert sweeps < 50
    assert sweeps > 2
    kept_whole(history, history.stay)


def test_after_a_walk_it_pauses_and_begins_anew(c, clock):
    first = deploy(c, "failed")["id"]
    clock.advance(600)
    second = deploy(c, "failed")["id"]
    clock.advance(90 * DAY - 599)
    c.daemon.sweep()
    assert ids(c) == [second]
    clock.advance(deploybot.RETENTION_PAUSE - 1)
    c.daemon.sweep()
    assert ids(c) == [second], "old by now, but it is not looked for"
    clock.advance(1)
    c.daemon.sweep()
    assert ids(c) == []
    assert first != second


def test_pages_are_given_back(c, clock):
    c.create()
    job = c.beat(c.agents["web-01"])["job"]
    for number in range(40):
        c.logs(job, "x" * 60_000, offset=number)
    c.end(job, "failed")
    pages = rows(c, "PRAGMA page_count")[0][0]
    clock.advance(91 * DAY)
    c.daemon.sweep()
    assert rows(c, "PRAGMA page_count")[0][0] < pages / 5
    assert rows(c, "PRAGMA freelist_count")[0][0] < 10


def test_it_reads_no_history(c, clock):
    """Each statement of a walk finds its rows by an index."""
    deploy(c, "failed")
    deploy(c)
    clock.advance(91 * DAY)
    db, seen = c.daemon.store._db, []
    db.set_trace_callback(seen.append)
    c.daemon.sweep()
    db.set_trace_callback(None)
    statements = [sql for sql in seen if sql.startswith(("SELECT", "DELETE", "UPDATE"))]
    assert any("DELETE FROM events" in sql for sql in statements)
    for sql in statements:
        for row in db.execute("EXPLAIN QUERY PLAN " + sql):
            assert not row[3].startswith(("SCAN jobs", "SCAN events")), sql


# -- crashes -----------------------------------------------------------------------------------------------------------


def test_a_crash_between_two_slices_harms_nothing(history, clock, small, make_controller, tmp_path):
    """The database as it was after each slice is opened by another controller, which ends the walk."""
    deploy(history, "failed", lines=20)
    clock.advance(91 * DAY)
    images = []

    def image():
        folder = tmp_path / f"crash-{len(images)}"
        folder.mkdir()
        for path in history.folder.glob("deploybot.db*"):
            shutil.copy(path, folder)
        images.append(folder.name)

    with after_each_write(history, image):
        history.daemon.sweep()
    assert len(images) > 8
    for name in (images[2], images[len(images) // 2], images[-3]):
        again = make_controller(name, clock=clock, pending_expiry="3650d")
        assert again.jobs.removed_through > 0 and ids(again) != history.stay
        again.daemon.sweep()
        kept_whole(again, history.stay)
        assert rows(again, "PRAGMA integrity_check") == [("ok",)]


def test_a_slice_that_cannot_be_written_is_tried_again(history, clock, caplog):
    before = ids(history)
    clock.advance(91 * DAY)
    for statement in ("COMMIT", "DELETE FROM jobs"):
        with failing_at(history.daemon.store, statement), caplog.at_level(logging.ERROR, "deploybot"):
            history.daemon.sweep()
        assert ids(history) == before
        assert history.jobs.removed_through == 0, "nobody is told of a gap that is none"
    assert {record.message for record in caplog.records if record.name == "deploybot"} == {
        "the database cannot be written: disk I/O error",
        "sweep: the database cannot be written now: disk I/O error",
    }
    history.daemon.sweep()
    kept_whole(history, history.stay)


# -- readers of the stream ---------------------------------------------------------------------------------------------


def resumed(c, last_id, tail=1):
    """The first event of a stream that goes on from there."""
    with EventStream(c, f"/v1/logs/stream?tail={tail}", last_id) as stream:
        return next(iter(stream))


def test_who_comes_back_behind_what_was_removed_is_told_of_the_gap(c, clock):
    gone = deploy(c, "failed")
    with EventStream(c, f"/v1/logs/stream?job_id={gone['id']}") as stream:
        last = [event for event in stream if event["id"]][-1]["id"]
    stays = deploy(c)
    clock.advance(91 * DAY)
    c.daemon.sweep()
    epoch, position = last.split("-")
    for restart in (False, True):
        if restart:
            c.restart()
        for behind in (f"{epoch}-{int(position) - 1}", f"{epoch}-0"):
            gap = resumed(c, behind)
            assert (gap["event"], "retention" in gap["data"]["detail"]) == ("gap", True)
        first = resumed(c, last)
        assert (first["event"], first["data"]["id"]) == ("job", stays["id"]), "who had read all of it misses nothing"


def test_positions_are_not_used_twice_when_the_newest_events_were_removed(c, clock):
    """Where the last job was an old failure, as on a quiet controller."""
    gone = deploy(c, "failed")
    with EventStream(c, f"/v1/logs/stream?job_id={gone['id']}") as stream:
        last = [event for event in stream if event["id"]][-1]["id"]
    clock.advance(91 * DAY)
    c.daemon.sweep()
    assert count(c, "events") == 0
    c.restart()
    with EventStream(c, last_id=last) as stream:
        made = c.create()
        event = next(iter(stream))
    assert (event["event"], event["data"].get("id")) == ("job", made["id"]), "no gap: all that was removed was read"
    assert int(event["id"].split("-")[1]) > int(last.split("-")[1])
    with EventStream(c, last_id=event["id"]) as stream:
        made = c.create("next")
        assert next(iter(stream))["data"].get("id") == made["id"]


# -- the limit of a log ------------------------------------------------------------------------------------------------


@pytest.fixture
def limited(make_controller, clock):
    """A log holds 100 bytes, of which each line costs one more than it has."""
    made = make_controller(clock=clock, log_limit="100", pending_expiry="3650d")
    made.agents = {host: made.register(host) for host in HOSTS}
    return made


NOTE = "[the log of this job has reached its limit of 100 bytes: what follows is not kept]"


def running(c, **more):
    c.create(**more)
    return c.beat(c.agents["web-01"])["job"]


def messages(c, job):
    return [line["message"] for line in c.lines(job)]


def test_what_fits_exactly_is_kept_and_the_next_line_says_so(limited):
    """In one upload, in two, and where the next line is empty."""
    for uploads, more in (
        ([["a" * 49, "b" * 49]], "c"),
        ([["a" * 49], ["b" * 49]], "c"),
        ([["a" * 99]], ""),
        ([["a" * 98, ""]], ""),
        ([["ä" * 49 + "a"]], "c"),  # bytes, not characters
    ):
        job, sent = running(limited), []
        for lines in uploads:
            limited.logs(job, *lines, offset=len(sent))
            sent += lines
        assert messages(limited, job) == sent
        assert limited.logs(job, more, offset=len(sent)) == {"next_offset": len(sent) + 1, "cancel": False}
        assert messages(limited, job) == [*sent, NOTE]
        limited.end(job)


def test_one_byte_more_is_not_kept(limited):
    for lines, fit in (
        (["a" * 49, "b" * 50], 1),
        (["a" * 100], 0),
        (["ä" * 50], 0),
        (["a" * 40, "b" * 60, "c"], 1),  # nothing behind the first that does not fit, however short
    ):
        job = running(limited)
        assert limited.logs(job, *lines)["next_offset"] == len(lines)
        assert messages(limited, job) == [*lines[:fit], NOTE]
        limited.end(job)


def test_one_line_says_so_and_what_follows_is_acknowledged_and_dropped(limited, clock):
    job = running(limited)
    with EventStream(limited, f"/v1/logs/stream?job_id={job['id']}&tail=0") as stream:
        limited.logs(job, "a" * 60, "b" * 60, "c")
        for offset in (3, 4, 104):  # also a gap: there is nothing that could be missing
            assert limited.logs(job, "d", offset=offset)["next_offset"] == offset + 1
        limited.restart()
        assert limited.logs(job, "e", "f", offset=105)["next_offset"] == 107
        limited.end(job)
    lines = limited.lines(job)
    assert [line["message"] for line in lines] == ["a" * 60, NOTE]
    assert {**lines[1], "position": 0} == {
        **{"position": 0, "attempt": 1, "offset": 1, "message": NOTE, "level": "warning", "timestamp": clock.stamp()}
    }
    with EventStream(limited, f"/v1/logs/stream?job_id={job['id']}") as stream:
        assert [event["data"]["message"] for event in stream if event["event"] == "log"] == ["a" * 60, NOTE]


def test_an_upload_that_comes_again_does_no_harm(limited):
    """Its answer got lost: the one below the limit, the one that reached it, and one behind it."""
    job = running(limited)
    uploads = [(0, ["a" * 30]), (1, ["b" * 30, "c" * 60, "d"]), (4, ["e"])]
    for number, (offset, lines) in enumerate(uploads):
        for _ in range(2):
            for before, sent in uploads[: number + 1]:
                expected = max(before + len(sent), 1)
                assert limited.logs(job, *sent, offset=before)["next_offset"] >= expected
        assert limited.logs(job, *lines, offset=offset)["next_offset"] == offset + len(lines)
    assert messages(limited, job) == ["a" * 30, "b" * 30, NOTE]


def test_below_the_limit_a_gap_is_a_gap(limited):
    job = running(limited)
    limited.logs(job, "a" * 99)
    body = {"attempt": 1, "offset": 5, "lines": [{"message": "x"}]}
    status, answer = limited.call("POST", f"/v1/jobs/{job['id']}/logs", body)
    assert (status, answer["next_offset"]) == (409, 1)


def test_the_limit_is_that_of_the_job_whatever_its_attempts(limited):
    job = running(limited, retries=2)
    limited.logs(job, "a" * 60)
    for attempt, kept in ((2, ["b" * 30]), (3, [])):
        limited.passes(limited.config.lost_after + 1)
        job = limited.beat(limited.agents["web-01"])["job"]
        assert job["attempt"] == attempt
        assert limited.logs(job, "b" * 30, "c" * 30)["next_offset"] == 2
        assert limited.logs(job, "d", offset=2)["next_offset"] == 3
        mine = [line["message"] for line in limited.lines(job) if line["attempt"] == attempt]
        assert mine == [*kept, NOTE]


def test_each_job_has_a_limit_of_its_own(limited):
    first = running(limited)
    limited.logs(first, "a" * 200)
    limited.end(first)
    second = running(limited)
    limited.logs(second, "b" * 99)
    assert messages(limited, second) == ["b" * 99]


def test_the_commit_and_the_cancel_are_told_behind_the_limit_too(limited):
    job = running(limited)
    limited.logs(job, "a" * 200)
    limited.ok("POST", f"/v1/jobs/{job['id']}/cancel")
    body = {"attempt": 1, "offset": 1, "lines": [{"message": "x"}], "commit": "c" * 40}
    assert limited.ok("POST", f"/v1/jobs/{job['id']}/logs", body) == {"next_offset": 2, "cancel": True}
    assert limited.job(job["id"])["commit"] == "c" * 40


def test_the_limit_is_named_as_people_do(make_controller):
    c = make_controller(log_limit="1MiB")
    c.agents = {"web-01": c.register("web-01")}
    job = running(c)
    for offset in range(0, 18, 9):
        c.logs(job, *["x" * 64_000] * 9, offset=offset)
    assert len(c.lines(job)) == 17
    assert messages(c, job)[-1] == ("[the log of this job has reached its limit of 1 MiB: what follows is not kept]")
    assert deploybot.Config.load({}, {}).log_limit == 10 * 1024 * 1024
