"""The nine invariants of jobs, each with its tests. Where time matters the test holds the clock."""

import concurrent.futures
import contextlib
import json
import socket
import sqlite3
import threading
import time

import pytest
from conftest import Controller, wait_for

import deploybot

ENDS = ("success", "failed", "cancelled")


@pytest.fixture
def timed(make_controller, clock):
    """A controller whose clock the test holds."""
    return make_controller("timed", clock=clock)


def claimed(c, host="web-01", **more):
    """(agent, its running job)."""
    agent = c.register(host)
    c.create(host=host, **more)
    return agent, c.beat(agent)["job"]


def result(c, job, status="success", attempt=None, **more):
    return c.call("POST", f"/v1/jobs/{job['id']}/result", {"attempt": attempt or job["attempt"], "status": status, **more})


def holding(*jobs):
    return [{"job_id": job["id"], "attempt": job["attempt"]} for job in jobs]


def events(c, job):
    with c.daemon.store.read() as db:
        rows = db.rows("SELECT data FROM events WHERE job_id = ? AND kind = 'job' ORDER BY position", job["id"])
    return [json.loads(row[0])["status"] for row in rows]


def cancel(c, job):
    return c.ok("POST", f"/v1/jobs/{job['id']}/cancel")["job"]


def parked(c, host="web-01", count=1):
    """Waits until heartbeats of that host are parked."""
    lane = c.daemon.queue._lanes[host]
    wait_for(lambda: len(lane.woken._waiters) >= count)


def in_background(call, *args, **kwargs):
    future = concurrent.futures.Future()

    def run():
        try:
            future.set_result(call(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def request_bytes(path, body):
    data = json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    ).encode() + data


# 1. What was answered is in the database, and ends once


def test_1_an_answered_job_is_in_the_database(controller):
    job = controller.create()
    with sqlite3.connect(controller.config.db) as other:
        assert other.execute("SELECT status FROM jobs WHERE id = ?", (job["id"],)).fetchall() == [("pending",)]


@pytest.mark.parametrize("end", ENDS)
def test_1_a_job_ends_exactly_once(controller, end):
    _, job = claimed(controller)
    assert result(controller, job, end)[0] == 200
    assert result(controller, job, end)[0] == 200, "the same again answers the same"
    for other in ENDS:
        if other != end:
            assert result(controller, job, other)[0] == 409
    assert events(controller, job) == ["pending", "running", end]


def test_1_of_many_results_at_once_one_wins(controller):
    _, job = claimed(controller)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda i: result(controller, job, "failed", exit_code=i), range(12)))
    assert sorted(status for status, _ in answers) == [200] + [409] * 11
    won = next(answer["job"] for status, answer in answers if status == 200)
    assert controller.job(job["id"]) == won


# 2. An ended job never changes


@pytest.mark.parametrize("end", ENDS)
def test_2_an_ended_job_never_changes(timed, clock, end):
    agent, job = claimed(timed, retries=3, timeout=1)
    timed.logs(job, "one")
    ended = timed.end(job, end)
    result(timed, job, "failed", exit_code=9)
    timed.call("POST", f"/v1/jobs/{job['id']}/cancel")
    late = {"attempt": 1, "offset": 1, "lines": [{"message": "late"}], "commit": "d" * 40}
    assert timed.call("POST", f"/v1/jobs/{job['id']}/logs", late)[0] == 409
    clock.advance(100_000)
    timed.jobs.sweep()
    timed.beat(timed.register(), running=[])
    timed.beat(agent)
    timed.restart()
    assert timed.job(job["id"]) == ended
    assert [line["message"] for line in timed.lines(job)] == ["one"]


def test_2_a_change_names_status_and_attempt(controller):
    """Two that read the same state: the second changes nothing, nor does what it stands in."""
    _, job = claimed(controller)
    with controller.daemon.store.read() as db:
        seen = db.job(job["id"])

    def twice(tx):
        tx.change_job(seen, status="success")
        tx.change_job(seen, status="failed")

    with pytest.raises(AssertionError, match="was read in this transaction"):
        controller.daemon.store.write(twice)
    assert controller.job(job["id"])["status"] == "running"
    assert controller.daemon.store.write(lambda tx: tx.change_job(seen, status="success")).status == "success"


# 3. One agent holds a job; slots; one job of an app on a host


def test_3_an_agent_holds_one_job(controller):
    agent, first = claimed(controller)
    second = controller.create(repo="myorg/other")
    assert controller.beat(agent)["job"] is None
    assert controller.beat(agent, running=holding(first))["job"] is None
    controller.end(first)
    assert controller.beat(agent)["job"]["id"] == second["id"]


def test_3_slots_give_as_many(controller):
    agent = controller.register(slots=3)
    made = [controller.create(repo=f"o/r{i}")["id"] for i in range(5)]
    assert [controller.beat(agent)["job"]["id"] for _ in range(3)] == made[:3]
    assert controller.beat(agent)["job"] is None


def test_3_one_job_of_an_app_on_a_host(controller):
    agent = controller.register(slots=3)
    first, _, other = controller.create(ref="a"), controller.create(ref="b"), controller.create(repo="o/other")
    assert controller.beat(agent)["job"]["id"] == first["id"]
    assert controller.beat(agent)["job"]["id"] == other["id"], "the second of the app lets others pass"
    assert controller.beat(agent)["job"] is None
    controller.end(controller.job(first["id"]))
    assert controller.beat(agent)["job"]["ref"] == "b"


def test_3_the_index_of_the_database_says_so_too(controller):
    claimed(controller)
    waiting = controller.create(ref="b")
    controller.stop()
    with sqlite3.connect(controller.config.db) as db, pytest.raises(sqlite3.IntegrityError):
        db.execute("UPDATE jobs SET status = 'running' WHERE id = ?", (waiting["id"],))


def test_3_many_heartbeats_at_once_get_a_job_once(controller):
    agent = controller.register(slots=64)
    made = {controller.create(repo=f"o/r{i}")["id"] for i in range(10)}
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        given = [answer["job"] for answer in pool.map(lambda _: controller.beat(agent), range(20))]
    ids = [job["id"] for job in given if job]
    assert len(ids) == 10 and set(ids) == made


# 4. The attempt is the fence; the first end wins


def second_attempt(c, clock):
    """A job whose first attempt was lost; (agent, attempt 1, attempt 2)."""
    agent, first = claimed(c, retries=1)
    c.logs(first, "of the first")
    c.passes(c.config.lost_after + 1)
    return agent, first, c.beat(agent, running=[])["job"]


def test_4_logs_and_results_of_an_older_attempt_change_nothing(timed, clock):
    _, first, second = second_attempt(timed, clock)
    assert (second["id"], second["attempt"]) == (first["id"], 2)
    before = timed.job(first["id"]), timed.lines(first)
    for attempt in (1, 3):
        body = {"attempt": attempt, "offset": 1, "lines": [{"message": "stale"}], "commit": "e" * 40}
        status, answer = timed.call("POST", f"/v1/jobs/{first['id']}/logs", body)
        assert status == 409 and "running (attempt 2)" in answer["detail"] and "next_offset" not in answer
        assert result(timed, first, "failed", attempt=attempt)[0] == 409
    assert (timed.job(first["id"]), timed.lines(first)) == before
    timed.end(second)


def test_4_a_pending_job_takes_no_result(controller):
    job = controller.create()
    assert result(controller, job, attempt=1)[0] == 409
    assert controller.job(job["id"])["status"] == "pending"


def test_4_a_result_before_the_cancel_took_effect_stands(controller):
    _, job = claimed(controller)
    assert cancel(controller, job)["status"] == "running"
    assert controller.end(job, "success")["status"] == "success"
    assert controller.call("POST", f"/v1/jobs/{job['id']}/cancel")[0] == 409


def test_4_a_late_failure_of_a_lost_job_is_refused(timed, clock):
    """Also where it looks like the end that the controller gave it."""
    _, job = claimed(timed)
    timed.passes(timed.config.lost_after + 1)
    assert result(timed, job, "failed", reason="fetch_failed")[0] == 409
    assert timed.job(job["id"])["reason"] == "agent_lost"


# 5. Lost contact


def test_5_a_heartbeat_that_comes_behind_the_farewell_brings_nobody_back(controller):
    """The agent hung up before its last heartbeat was read, and its farewell came first, over another connection."""
    agent = controller.register()
    controller.beat(agent, status="offline", session=agent["session"])
    held_up = deploybot.Heartbeat.parse({"status": "online", "session": agent["session"]})
    host = deploybot.Principal("web-01", deploybot.Scope.AGENT, "web-01")
    controller.jobs.heartbeat(agent["id"], held_up, host, lambda: False)
    assert controller.ok("GET", "/v1/hosts")["hosts"][0]["agent_status"] == "offline"
    controller.beat(agent, session=agent["session"])
    assert controller.ok("GET", "/v1/hosts")["hosts"][0]["agent_status"] == "online"


def test_5_offline_then_back_and_the_result_is_taken(timed, clock):
    agent, job = claimed(timed)
    timed.passes(timed.config.agent_timeout + 1)
    assert timed.ok("GET", "/v1/hosts")["hosts"][0]["agent_status"] == "offline"
    assert timed.job(job["id"])["status"] == "running"
    timed.beat(agent, running=holding(job))
    assert timed.ok("GET", "/v1/hosts")["hosts"][0]["agent_status"] == "online"
    assert timed.end(job)["status"] == "success"


def test_5_agent_lost(timed, clock):
    _, job = claimed(timed)
    timed.passes(timed.config.lost_after - 1)
    assert timed.job(job["id"])["status"] == "running"
    timed.passes(2)
    ended = timed.job(job["id"])
    assert (ended["status"], ended["reason"]) == ("failed", "agent_lost")
    assert "no contact" in ended["error"]


def test_5_retries_make_another_attempt_and_then_no_more(timed, clock):
    _, first, second = second_attempt(timed, clock)
    timed.passes(timed.config.lost_after + 1)
    ended = timed.job(second["id"])
    assert (ended["status"], ended["reason"], ended["attempt"]) == ("failed", "agent_lost", 2)
    assert events(timed, first) == ["pending", "running", "pending", "running", "failed"]


def test_5_a_cancelled_job_gets_no_other_attempt(timed, clock):
    _, job = claimed(timed, retries=5)
    cancel(timed, job)
    timed.passes(timed.config.lost_after + 1)
    assert timed.job(job["id"])["status"] in ("failed", "cancelled")


def test_5_a_heartbeat_renews_the_lease(timed):
    agent, job = claimed(timed, timeout=86400)
    for _ in range(5):
        timed.passes(timed.config.lost_after - 1)
        timed.beat(agent)
    assert timed.job(job["id"])["status"] == "running"


def test_5_the_controller_ends_a_job_a_minute_after_its_timeout(timed):
    agent, job = claimed(timed, timeout=100, retries=3)
    timed.passes(100 + deploybot.GRACE - 1)
    timed.beat(agent)
    assert timed.job(job["id"])["status"] == "running", "the agent has the first word"
    timed.passes(2)
    ended = timed.job(job["id"])
    assert (ended["status"], ended["reason"]) == ("failed", "timeout")
    assert timed.beat(agent, running=holding(job))["cancel"] == [job["id"]], "the agent is told to stop it"


def test_5_a_controller_that_was_stopped_blames_nobody(timed, clock):
    """SIGSTOP, a paused machine: nobody could reach it, so leases and times start anew as after a restart."""
    agent, job = claimed(timed, timeout=100)
    _, other = claimed(timed, "web-02", timeout=86400)
    for _ in range(60):
        clock.advance(1)
        timed.daemon.sweep()
    clock.advance(timed.config.lost_after * 10)
    timed.daemon.sweep()
    assert [timed.job(one["id"])["status"] for one in (job, other)] == ["running", "running"]
    timed.passes(40 + deploybot.GRACE - 1)
    assert timed.job(job["id"])["status"] == "running", "what was left of its time is left"
    timed.passes(2)
    assert timed.job(job["id"])["reason"] == "timeout"
    timed.beat(agent)
    assert timed.job(other["id"])["status"] == "running"
    timed.passes(timed.config.lost_after)
    assert timed.job(other["id"])["reason"] == "agent_lost"


def test_5_leases_start_anew_after_a_restart(timed, clock):
    _, job = claimed(timed, timeout=7 * 86400)
    clock.advance(timed.config.lost_after * 10)
    timed.restart()
    timed.jobs.sweep()
    assert timed.job(job["id"])["status"] == "running"
    timed.passes(timed.config.lost_after + 1)
    assert timed.job(job["id"])["reason"] == "agent_lost"


# 6. Lost claims, sessions


def test_6_a_lost_claim_is_delivered_again(controller):
    agent, job = claimed(controller)
    wait_for(lambda: controller.jobs._leases["web-01"][job["id"]].answered is not None)
    again = controller.beat(agent, running=[], session=agent["session"])["job"]
    assert again == job, "same id, same attempt"
    assert controller.beat(agent, running=holding(job))["job"] is None
    assert controller.beat(agent)["job"] is None, "who does not say what it holds gets nothing again"
    assert events(controller, job) == ["pending", "running"]


def test_6_only_for_heartbeats_that_came_after_the_answer(controller, monkeypatch):
    """A heartbeat that was under way while another one claimed does not know of the job yet."""
    agent = controller.register(slots=2)
    waiting = in_background(controller.beat, agent, running=[], wait=20)
    parked(controller)
    wrote, go_on = threading.Event(), threading.Event()
    send = deploybot.Handler._send

    def late(self, response, *rest):
        if response.sent:
            wrote.set()
            assert go_on.wait(20)
        send(self, response, *rest)

    monkeypatch.setattr(deploybot.Handler, "_send", late)
    controller.create()
    assert wrote.wait(20)
    assert controller.beat(agent, running=[])["job"] is None, "the answer with the job is not written yet"
    go_on.set()
    job = waiting.result(20)["job"]
    wait_for(lambda: controller.jobs._leases["web-01"][job["id"]].answered is not None)
    assert controller.beat(agent, running=[])["job"] == job


def test_6_a_heartbeat_that_was_parked_all_the_time_does_not_get_it_again(controller):
    """It came before the answer was written, so its `running` says nothing of that job."""
    agent = controller.register(slots=2)
    waiting = [in_background(controller.beat, agent, running=[], wait=25) for _ in range(2)]
    parked(controller, count=2)
    controller.create()
    (done,), (left,) = concurrent.futures.wait(waiting, 20, concurrent.futures.FIRST_COMPLETED)
    job = done.result()["job"]
    wait_for(lambda: controller.jobs._leases["web-01"][job["id"]].answered is not None)
    parked(controller)
    second = controller.create(repo="o/other")  # wakes it: it looks again
    taken = left.result(20)["job"]
    assert taken["id"] == second["id"]
    assert controller.beat(agent, running=holding(taken))["job"] == job


def test_6_a_claim_whose_connection_dropped_is_delivered_again(controller):
    """The client goes after the claim began: reset before the answer."""
    agent, job = controller.register(), controller.create()
    claim, began, go_on = controller.jobs._claim, threading.Event(), threading.Event()

    def slow(*args):
        began.set()
        assert go_on.wait(20)
        return claim(*args)

    controller.jobs._claim = slow
    with socket.create_connection(("127.0.0.1", controller.port)) as client:
        client.sendall(request_bytes(f"/v1/agents/{agent['id']}/heartbeat", {"status": "online", "running": []}))
        assert began.wait(20)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, deploybot.struct.pack("ii", 1, 0))
    go_on.set()
    wait_for(lambda: controller.job(job["id"])["status"] == "running")
    again = wait_for(lambda: controller.beat(agent, running=[])["job"])
    assert (again["id"], again["attempt"]) == (job["id"], 1)


def test_6_a_parked_call_whose_client_has_gone_claims_nothing(controller):
    agent = controller.register()
    with socket.create_connection(("127.0.0.1", controller.port)) as client:
        client.sendall(request_bytes(f"/v1/agents/{agent['id']}/heartbeat", {"status": "online", "wait": 25}))
        parked(controller)
    job = controller.create()
    wait_for(lambda: controller.daemon.server.connections() == 0)
    assert controller.job(job["id"])["attempt"] == 0
    assert controller.beat(agent)["job"]["id"] == job["id"], "it is in the queue still"


def test_6_a_new_session_ends_what_it_left_out(controller):
    _, job = claimed(controller)
    restarted = controller.register()
    controller.beat(restarted, running=[], session=restarted["session"])
    ended = controller.job(job["id"])
    assert (ended["status"], ended["reason"]) == ("failed", "agent_crashed")


def test_6_a_new_session_makes_the_next_attempt_where_retries_say_so(controller):
    _, job = claimed(controller, retries=1)
    restarted = controller.register()
    again = controller.beat(restarted, running=[], session=restarted["session"])["job"]
    assert (again["id"], again["attempt"]) == (job["id"], 2)


def test_6_a_new_session_goes_on_with_what_it_has(controller):
    _, job = claimed(controller)
    restarted = controller.register()
    controller.beat(restarted, running=holding(job), session=restarted["session"])
    assert controller.job(job["id"])["status"] == "running"
    controller.beat(restarted, running=holding(job), session=restarted["session"])
    assert controller.end(job)["status"] == "success"


def test_6_two_agents_of_one_host_the_older_is_told_and_takes_nothing(controller):
    older = controller.register()
    waiting = in_background(
        controller.call,
        "POST",
        f"/v1/agents/{older['id']}/heartbeat",
        {"status": "online", "session": older["session"], "wait": 25},
    )
    parked(controller)
    newer = controller.register()
    status, answer = waiting.result(20)
    assert status == 409 and "newer" in answer["detail"]
    job = controller.create()
    for say in ("online", "offline"):
        body = {"status": say, "session": older["session"]}
        assert controller.call("POST", f"/v1/agents/{older['id']}/heartbeat", body)[0] == 409
    assert controller.ok("GET", "/v1/hosts")["hosts"][0]["agent_status"] == "online", "it speaks for nobody"
    assert controller.beat(newer, session=newer["session"])["job"]["id"] == job["id"]


def test_6_a_claim_of_the_older_session_is_refused_in_the_database(controller):
    """The newer agent registers between the queue and the transaction."""
    older, job = controller.register(), controller.create()
    write, newer = controller.daemon.store.write, []

    def between(do):
        if not newer:
            newer.append(None)
            newer[0] = controller.register()
        return write(do)

    controller.daemon.store.write = between
    body = {"status": "online", "session": older["session"]}
    assert controller.call("POST", f"/v1/agents/{older['id']}/heartbeat", body)[0] == 409
    controller.daemon.store.write = write
    assert controller.job(job["id"])["attempt"] == 0
    assert controller.beat(newer[0])["job"]["id"] == job["id"]


def test_6_a_database_failure_while_claiming_puts_the_job_back(controller):
    agent, job = controller.register(), controller.create()
    controller.create(ref="later")
    claim = controller.jobs._claim

    def fails(*args):
        claim(*args)
        raise sqlite3.OperationalError("disk I/O error")

    controller.jobs._claim = fails
    status, headers, _ = controller.raw("POST", f"/v1/agents/{agent['id']}/heartbeat", {"status": "online"})
    assert status == 503 and headers["Retry-After"]
    controller.jobs._claim = claim
    assert controller.job(job["id"])["attempt"] == 0
    taken = controller.beat(agent, running=[])["job"]
    assert (taken["id"], taken["attempt"]) == (job["id"], 1), "at its old place"


# Cancel


def test_cancel_of_a_pending_job_ends_it_at_once(controller):
    agent, job = controller.register(), controller.create()
    ended = cancel(controller, job)
    assert (ended["status"], ended["reason"], ended["attempt"]) == ("cancelled", "cancelled", 0)
    assert cancel(controller, job) == ended
    assert controller.beat(agent)["job"] is None


def test_cancel_ends_one_parking_and_stands_in_every_answer(controller):
    agent, job = claimed(controller)
    waiting = in_background(controller.beat, agent, running=holding(job), wait=25)
    parked(controller)
    cancel(controller, job)
    assert waiting.result(20)["cancel"] == [job["id"]]
    assert controller.beat(agent, running=holding(job))["cancel"] == [job["id"]]
    waiting = in_background(controller.beat, agent, running=holding(job), wait=1)
    started = time.monotonic()
    assert waiting.result(20)["cancel"] == [job["id"]]
    assert time.monotonic() - started > 0.7, "told once, it parks again: no busy loop"
    body = {"attempt": 1, "offset": 0, "lines": [{"message": "stopping"}]}
    assert controller.ok("POST", f"/v1/jobs/{job['id']}/logs", body)["cancel"] is True
    assert controller.end(job, "cancelled")["reason"] == "cancelled"
    assert controller.beat(agent, running=[])["cancel"] == []


def test_cancel_is_told_after_a_restart_too(controller):
    agent, job = claimed(controller)
    cancel(controller, job)
    controller.restart()
    assert controller.beat(agent, running=holding(job), session=agent["session"])["cancel"] == [job["id"]]


def test_cancel_of_a_claim_that_never_arrived(controller):
    agent, job = claimed(controller)
    cancel(controller, job)
    answer = controller.beat(agent, running=[])
    assert answer["job"] is None and answer["cancel"] == []
    assert controller.job(job["id"])["status"] == "cancelled"


def test_strays_are_told_once_a_parking(controller):
    agent, job = claimed(controller)
    controller.end(job)
    for _ in range(2):
        assert controller.beat(agent, running=holding(job), wait=0)["cancel"] == [job["id"]]
    started = time.monotonic()
    assert controller.beat(agent, running=holding(job), wait=1)["cancel"] == [job["id"]]
    assert time.monotonic() - started > 0.7


# 7. The same again


def test_7_fifty_requests_at_the_same_moment_make_one_job(controller):
    together = threading.Barrier(50)

    def ask(_):
        together.wait(30)
        return controller.call("POST", "/v1/jobs", {"repo": "myorg/app", "ref": "main", "host": "web-01"})

    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))
    assert {status for status, _ in answers} == {201}
    assert len({answer["job"]["id"] for _, answer in answers}) == 1
    assert sum(answer["created"] for _, answer in answers) == 1
    assert len(controller.ok("GET", "/v1/jobs")["jobs"]) == 1


def test_7_pending_or_running_and_no_longer(controller):
    agent, job = claimed(controller)
    assert controller.create()["id"] == job["id"]
    controller.end(job)
    second = controller.create()
    assert second["id"] != job["id"]
    assert controller.create(force=True)["id"] not in (job["id"], second["id"])
    assert controller.beat(agent)["job"]["id"] == second["id"]


def test_7_the_job_shows_the_commit_as_soon_as_the_agent_knows_it(controller):
    _, job = claimed(controller)
    controller.ok("POST", f"/v1/jobs/{job['id']}/logs", {"attempt": 1, "offset": 0, "lines": [], "commit": "c" * 40})
    assert controller.create()["commit"] == "c" * 40
    assert controller.end(job)["commit"] == "c" * 40


# 8. Restart


def test_8_restart_keeps_order_and_running_jobs(controller):
    agent, running = claimed(controller, ref="r")
    made = [controller.create(ref=f"p{i}") for i in range(5)]
    controller.logs(running, "before")
    before = controller.ok("GET", "/v1/jobs")
    controller.restart()
    assert controller.ok("GET", "/v1/jobs") == before
    assert controller.beat(agent, running=holding(running), session=agent["session"])["job"] is None
    controller.logs(running, "after", offset=1)
    controller.end(running)
    for job in made:
        taken = controller.beat(agent, running=[], session=agent["session"])["job"]
        assert taken["id"] == job["id"]
        controller.end(taken)
    assert [line["message"] for line in controller.lines(running)] == ["before", "after"]


def test_8_a_claim_that_was_lost_in_a_restart_is_delivered_again(controller):
    agent, job = claimed(controller)
    controller.restart()
    again = controller.beat(agent, running=[], session=agent["session"])["job"]
    assert (again["id"], again["attempt"]) == (job["id"], 1)


def test_8_a_job_with_a_hold_is_in_no_queue(controller):
    agent, held = controller.register(), controller.create()
    controller.stop()
    with sqlite3.connect(controller.config.db) as db:
        db.execute("UPDATE jobs SET hold = 'lock' WHERE id = ?", (held["id"],))
    db.close()
    controller.start()
    assert controller.call("POST", f"/v1/agents/{agent['id']}/heartbeat", {"status": "online"})[1]["job"] is None


def test_8_a_second_daemon_is_kept_off_the_database(controller):
    with pytest.raises(deploybot.StartError, match="another"):
        Controller(controller.folder, open=True)


# 9. Lines exactly once


def test_9_whatever_is_sent_again_is_stored_once(controller):
    _, job = claimed(controller)
    said = [f"line {i}" for i in range(40)]
    for start, end in ((0, 5), (0, 5), (0, 10), (3, 12), (12, 13), (2, 4), (8, 20), (20, 20), (0, 40), (39, 40)):
        answer = controller.logs(job, *said[start:end], offset=start)
        assert answer["next_offset"] >= end
    lines = controller.lines(job)
    assert [line["message"] for line in lines] == said
    assert [line["offset"] for line in lines] == list(range(40))


def test_9_a_gap_is_409_with_the_next_offset(controller):
    _, job = claimed(controller)
    controller.logs(job, "0", "1")
    body = {"attempt": 1, "offset": 3, "lines": [{"message": "3"}], "commit": "d" * 40}
    status, answer = controller.call("POST", f"/v1/jobs/{job['id']}/logs", body)
    assert (status, answer["next_offset"]) == (409, 2)
    assert len(controller.lines(job)) == 2
    assert controller.job(job["id"])["commit"] is None, "refused is refused whole"


def test_9_many_that_send_the_same_at_once(controller):
    _, job = claimed(controller)
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        for start in range(0, 50, 10):
            list(pool.map(lambda _: controller.logs(job, *map(str, range(start, start + 10)), offset=start), range(10)))  # noqa: B023
    assert [line["message"] for line in controller.lines(job)] == [str(i) for i in range(50)]


def test_9_offsets_count_for_each_attempt(timed, clock):
    _, _, second = second_attempt(timed, clock)
    assert timed.logs(second, "of the second")["next_offset"] == 1
    assert [(line["attempt"], line["offset"], line["message"]) for line in timed.lines(second)] == [
        (1, 0, "of the first"),
        (2, 0, "of the second"),
    ]


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize(
    "message", ["plain", "", "☕ é \x7f\u2028", 'say "x"', "C:\\x", "\x1b[31mred\t\0", "a, [b], {c}", "x" * 70_000]
)
def test_9_a_line_is_stored_as_it_came(controller, message, ascii_only):
    _, job = claimed(controller)
    lines = [[message, "error", "2026-11-23T13:13:37.131Z"], {"message": message}, [message, None, None]]
    body = json.dumps({"attempt": 1, "offset": 0, "lines": lines}, ensure_ascii=ascii_only).encode()
    assert controller.call("POST", f"/v1/jobs/{job['id']}/logs", body)[0] == 200
    stored = [(line["message"], line["level"]) for line in controller.lines(job)]
    kept = deploybot.fit_line(message)
    assert stored == [(kept, "error"), (kept, "info"), (kept, "info")]
    with contextlib.closing(sqlite3.connect(controller.config.db)) as db:
        ((data,),) = db.execute("SELECT data FROM events WHERE kind = 'log'")
    assert data == deploybot.dump(json.loads(data))


def test_9_a_long_line_is_cut_and_says_so(controller):
    _, job = claimed(controller)
    controller.logs(job, "☕" * 50_000, "next")
    cut, following = controller.lines(job)
    assert len(cut["message"].encode()) <= deploybot.MAX_MESSAGE and "cut" in cut["message"][-60:]
    assert following["message"] == "next"


# Expiry


def test_a_job_that_nobody_takes_expires(timed, clock):
    agent, old = timed.register(), timed.create()
    clock.advance(timed.config.pending_expiry - 1)
    young = timed.create(ref="young")
    timed.jobs.sweep()
    assert timed.job(old["id"])["status"] == "pending"
    timed.passes(2)
    ended = timed.job(old["id"])
    assert ended["reason"] == "expired" and ended["status"] in ENDS
    assert timed.beat(agent)["job"]["id"] == young["id"]


def test_a_second_attempt_does_not_expire_by_the_age_of_the_job(timed, clock):
    agent, job = claimed(timed, timeout=7 * 86400, retries=1)
    for _ in range(3):
        clock.advance(timed.config.pending_expiry / 2)
        timed.beat(agent, running=holding(job))
        timed.jobs.sweep()
    timed.passes(timed.config.lost_after + 1)
    timed.jobs.sweep()
    assert timed.job(job["id"])["status"] == "pending"


def test_a_heartbeat_with_much_beside_it_is_not_kept(controller):
    agent = controller.register()
    deploybot.heartbeat_of.cache_clear()
    controller.beat(agent, x="y" * 5000)
    assert deploybot.heartbeat_of.cache_info().currsize == 0
    controller.beat(agent)
    assert deploybot.heartbeat_of.cache_info().currsize == 1
