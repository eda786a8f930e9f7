"""The live log: what is told, in which order, and what a reader that goes, stays away or does not read costs the others."""

import concurrent.futures
import contextlib
import json
import random
import socket
import threading
import time

import pytest
from conftest import EventStream, wait_for

import deploybot

LIMIT = 20  # seconds after which what is waited for does not come


def running(c, host="web-01", repo="myorg/app", **more):
    agent = c.register(host)
    c.create(host=host, repo=repo, **more)
    return c.beat(agent)["job"]


def position(event):
    return int(event["id"].split("-")[1])


def text(event):
    return event["data"].get("message")


def read(c, count, query="", last_id=None):
    """The first events of a stream."""
    with EventStream(c, "/v1/logs/stream" + query, last_id) as stream:
        assert stream.status == 200
        return take(iter(stream), count)


def take(events, count):
    return [next(events) for _ in range(count)]


def database(c):
    """Every event as a reader of all should see it: {position: line or status}."""
    seen = {}
    with c.daemon.store.read() as db:
        for event in db.events(deploybot.EventFilter(), 0, 1 << 60):
            if event.kind == "job":
                seen[event.position] = (event.job_id, json.loads(event.data)["status"])
            for line in event.log_lines() if event.kind == "log" else ():
                seen[line["position"]] = (event.job_id, line["message"])
    return seen


# What is told


def test_first_the_tail_then_what_comes(controller):
    job = running(controller)
    for start in range(0, 90, 9):
        controller.logs(job, *(f"l{i}" for i in range(start, start + 9)), offset=start)
    for tail, expected in (("", 50), ("?tail=1", 1), ("?tail=13", 13), ("?tail=90", 90)):
        with EventStream(controller, "/v1/logs/stream" + tail) as stream:
            events = iter(stream)
            assert [text(event) for event in take(events, expected)] == [f"l{i}" for i in range(90 - expected, 90)]
    with EventStream(controller, "/v1/logs/stream?tail=0") as stream:
        controller.logs(job, "live ☕\r\ndata: x", offset=90)
        controller.end(job)
        line, change = take(iter(stream), 2)
    assert line["event"] == "log" and line["data"] == {
        "position": position(line), "job_id": job["id"], "host": "web-01", "app": "myorg--app", "attempt": 1,
        "offset": 90, "message": "live ☕\r\ndata: x", "level": "info", "timestamp": line["data"]["timestamp"],
    }  # fmt: skip
    assert change["event"] == "job" and change["data"] == controller.job(job["id"])
    assert position(change) > position(line)


def test_the_tail_of_a_running_job_is_its_tail(controller):
    job = running(controller)
    controller.logs(job, *(f"l{i}" for i in range(30)))
    with EventStream(controller, f"/v1/logs/stream?job_id={job['id']}&tail=3") as stream:
        assert [text(event) for event in take(iter(stream), 3)] == ["l27", "l28", "l29"]


def test_the_head_of_a_stream(controller):
    with EventStream(controller) as stream:
        assert stream.answer.headers["Content-Type"] == "text/event-stream"
        assert stream.answer.headers["Cache-Control"] == "no-store"
        assert stream.answer.headers["X-Accel-Buffering"] == "no"


def test_the_order_is_that_of_commit(controller):
    one, two = running(controller), running(controller, "web-02")
    with EventStream(controller, "/v1/logs/stream?tail=0") as stream:
        controller.logs(one, "1")
        controller.logs(two, "2")
        controller.end(one)
        controller.logs(two, "3", offset=1)
        events = take(iter(stream), 4)
    assert [text(event) or event["data"]["status"] for event in events] == ["1", "2", "success", "3"]
    assert [position(event) for event in events] == sorted(position(event) for event in events)


@pytest.mark.parametrize("query", ["host=web-02", "app=other--app", "job_id={id}", "host=web-02&app=other--app"])
def test_filters(controller, query):
    here, there = running(controller), running(controller, "web-02", "other/app")
    controller.logs(there, "stored")
    controller.logs(here, "not wanted")
    with EventStream(controller, "/v1/logs/stream?" + query.format(id=there["id"])) as stream:
        events = iter(stream)
        got = []
        for event in events:
            got.append(event)
            if text(event) == "stored":
                break
        controller.logs(here, "not wanted either", offset=1)
        controller.end(here)
        controller.logs(there, "live", offset=1)
        got.append(next(events))
    assert text(got[-1]) == "live"
    assert {event["data"].get("job_id") or event["data"]["id"] for event in got} == {there["id"]}


# Going on


def test_it_goes_on_in_the_middle_of_a_chunk(controller):
    job = running(controller)
    controller.logs(job, *"abcde")
    controller.logs(job, *"fg", offset=5)
    first = read(controller, 7, "?tail=7")
    for restart in (False, True):
        if restart:
            controller.restart()
        for i, event in enumerate(first[:-1]):
            assert read(controller, 6 - i, last_id=event["id"]) == first[i + 1 :], "neither lost nor repeated"


def test_it_goes_on_after_everything(controller):
    job = running(controller)
    controller.logs(job, "old")
    last = read(controller, 1, "?tail=1")[-1]
    with EventStream(controller, last_id=last["id"]) as stream:
        controller.logs(job, "new", offset=1)
        assert text(next(iter(stream))) == "new"


def test_the_stream_of_a_job_ends_after_the_job(controller):
    job = running(controller)
    with EventStream(controller, f"/v1/logs/stream?job_id={job['id']}") as stream:
        controller.logs(job, "last words")
        controller.end(job, "failed", exit_code=1)
        events = list(stream)
    assert [event["event"] for event in events][-3:] == ["log", "job", "end"]
    assert events[-1]["data"] == {"job_id": job["id"], "status": "failed"}

    with EventStream(controller, f"/v1/logs/stream?job_id={job['id']}") as stream:
        again = list(stream)
    assert [text(event) for event in again if event["event"] == "log"] == ["last words"]
    assert again[-1]["event"] == "end"
    with EventStream(controller, f"/v1/logs/stream?job_id={job['id']}&tail=0") as stream:
        assert [event["event"] for event in stream][-2:] == ["job", "end"]
    with EventStream(controller, f"/v1/logs/stream?job_id={job['id']}", events[-2]["id"]) as stream:
        assert stream.status == 204
    with EventStream(controller, f"/v1/logs/stream?job_id={job['id']}", events[-3]["id"]) as stream:
        assert [event["event"] for event in stream] == ["job", "end"], "one that had not read the end gets it"


@pytest.mark.parametrize("why", ["another epoch", "from the future", "removed"])
def test_a_gap_is_told(controller, why):
    job = running(controller)
    controller.logs(job, *"abc")
    epoch, last = read(controller, 3, "?tail=3")[-1]["id"].split("-")
    last_id = {
        "another epoch": f"{'0' * 8}-{last}", "from the future": f"{epoch}-{int(last) + 1000}", "removed": f"{epoch}-1"
    }[why]  # fmt: skip
    if why == "removed":
        controller.jobs.removed_through = 2
    gap, *lines = read(controller, 4, "?tail=3", last_id)
    assert gap["event"] == "gap" and gap["data"]["detail"]
    assert [text(line) for line in lines] == ["a", "b", "c"]


@pytest.mark.parametrize("last_id", ["nonsense", "-", "zzzzzzzz-1", "1"])
def test_an_id_that_is_none_of_ours_starts_anew(controller, last_id):
    job = running(controller)
    controller.logs(job, "a")
    assert text(read(controller, 1, "?tail=1", last_id)[-1]) == "a"


# What a reader costs


def test_two_hundred_readers_that_vanish_leave_nothing(controller):
    job = running(controller)
    wait_for(lambda: controller.daemon.server.connections() == 0)
    threads = threading.active_count()
    request = b"GET /v1/logs/stream HTTP/1.1\r\nHost: localhost\r\n\r\n"
    readers = [socket.create_connection(("127.0.0.1", controller.port)) for _ in range(200)]
    for reader in readers:
        reader.sendall(request)
    for reader in readers:
        assert reader.recv(12) == b"HTTP/1.1 200"
    assert controller.daemon.server.connections() == 200
    for i, reader in enumerate(readers):
        if i % 2:  # half of them without a goodbye
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, deploybot.struct.pack("ii", 1, 0))
        reader.close()
        if i % 20 == 0:
            controller.logs(job, f"line {i}", offset=i // 20)
    wait_for(lambda: controller.daemon.server.connections() == 0, 30)
    wait_for(lambda: threading.active_count() <= threads, 30)


def test_readers_that_vanish_in_silence_are_found(controller):
    """No event comes: the comment of the pulse finds them."""
    threads = threading.active_count()
    streams = [EventStream(controller) for _ in range(10)]
    for stream in streams:
        stream.answer.close()
        stream.close()
    wait_for(lambda: controller.daemon.server.connections() == 0, 30)
    wait_for(lambda: threading.active_count() <= threads, 30)


def test_a_reader_that_never_reads_costs_nobody_anything(make_controller):
    controller = make_controller(log_limit="1GiB")
    job = running(controller)
    sleeper = socket.socket()
    sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sleeper.connect(("127.0.0.1", controller.port))
    sleeper.sendall(b"GET /v1/logs/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert sleeper.recv(12) == b"HTTP/1.1 200"
    line = "x" * 60_000
    with contextlib.closing(sleeper), EventStream(controller, "/v1/logs/stream?tail=0") as stream:
        events = iter(stream)
        for offset in range(0, 200, 10):  # 12 MB: more than the sleeper's sockets and the hub hold
            controller.logs(job, *(f"{i} {line}" for i in range(offset, offset + 10)), offset=offset)
            got = take(events, 10)
            assert [event["data"]["offset"] for event in got] == list(range(offset, offset + 10))
        assert controller.daemon.server.connections() >= 2, "the sleeper was there all the time"
        assert controller.ok("GET", "/health")["status"] == "ok"


def test_a_reader_without_progress_is_sent_away(controller, monkeypatch):
    monkeypatch.setattr(deploybot, "SEND_DEADLINE", 1)
    job = running(controller)
    with contextlib.closing(socket.socket()) as sleeper:
        sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sleeper.connect(("127.0.0.1", controller.port))
        sleeper.sendall(b"GET /v1/logs/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert sleeper.recv(12) == b"HTTP/1.1 200"
        for offset in range(0, 180, 15):
            controller.logs(job, *["x" * 60_000] * 15, offset=offset)
        wait_for(lambda: controller.daemon.server.connections() == 0, 30)


def test_what_no_event_tells_of_is_said_to_whoever_may_show_it(make_controller):
    c = make_controller(
        apps="apps:\n- {name: web, repo: myorg/web, hosts: [web-01]}\n- {name: other, repo: myorg/other, hosts: [db-01]}\n"
    )
    changes = (
        lambda: c.register("web-01"),
        lambda: c.ok("POST", "/v1/hosts/web-01/drain"),
        lambda: c.ok("POST", "/v1/hosts/web-01/resume"),
        lambda: c.ok("PUT", "/v1/apps/web/lock", {"reason": "exams"}),
        lambda: c.ok("DELETE", "/v1/apps/web/lock"),
        lambda: c.ok("POST", "/v1/hosts/web-01/reset"),
        lambda: c.ok("DELETE", "/v1/hosts/web-01"),
        lambda: c.ok("POST", "/v1/reload"),
        c.daemon.reload,  # as on SIGHUP
    )
    filters = ("", "&app=other", "&host=db-01")
    with contextlib.ExitStack() as stack:
        whole, app, host = (iter(stack.enter_context(EventStream(c, f"/v1/logs/stream?tail=0{more}"))) for more in filters)
        for change in changes:
            change()
            for events in (whole, app):
                assert next(events) == {"event": "change", "id": None, "data": {}}
        job = c.create(host="db-01", repo="myorg/other")
        assert next(host)["data"]["id"] == job["id"], "and nothing before"


def test_a_change_while_the_stream_begins_is_told(controller, monkeypatch):
    """Who has the head of the answer reads the hosts: what changes after that must not go by unseen."""
    jobs = controller.daemon.jobs
    start = jobs.stream_start
    monkeypatch.setattr(jobs, "stream_start", lambda *given: (controller.register("web-01"), start(*given))[1])
    assert read(controller, 1, "?tail=0")[0]["event"] == "change"


def test_stop_ends_streams(controller):
    with socket.create_connection(("127.0.0.1", controller.port), timeout=LIMIT) as reader:
        reader.sendall(b"GET /v1/logs/stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        said = reader.recv(12)
        controller.stop()
        while chunk := reader.recv(65536):
            said += chunk
    assert said.startswith(b"HTTP/1.1 200") and said.endswith(b"0\r\n\r\n"), "with its last chunk"


def test_nothing_is_lost_or_repeated_whatever_happens(controller):
    """A reader goes a hundred times while two jobs write, the controller restarts in between and the hub overflows."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance = random.Random(seed)
    small_hub(controller)
    jobs = [running(controller), running(controller, "web-02", "other/app")]
    pause, stopped = threading.Lock(), threading.Event()

    def write(job, chance):
        offset = 0
        while not stopped.is_set():
            count = chance.randrange(1, 8)
            with pause:
                lines = (f"{job['host']} {i}" for i in range(offset, offset + count))
                offset = controller.logs(job, *lines, offset=offset)["next_offset"]
            stopped.wait(0.002)
        controller.end(job)

    seen, last_id, rounds = [], None, 0
    deadline = time.monotonic() + 60
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write, job, random.Random(chance.random())) for job in jobs]
        try:
            while rounds < 100:
                assert time.monotonic() < deadline
                rounds += 1
                if rounds in (30, 60, 90):
                    with pause:
                        controller.restart()
                        small_hub(controller)
                last_id = some(controller, last_id, seen, chance.randrange(1, 30), first=rounds == 1)
        finally:
            stopped.set()
    for writer in writers:
        writer.result()
    stored = database(controller)
    start = position(seen[0]) if seen else 0
    expected = {at: what for at, what in stored.items() if at >= start}
    while position(seen[-1]) < max(expected):
        some(controller, seen[-1]["id"], seen, max(expected) - position(seen[-1]))
    ids = [position(event) for event in seen]
    assert ids == sorted(expected), f"seed {seed}"
    told = {
        position(e): (e["data"]["job_id"], text(e)) if e["event"] == "log" else (e["data"]["id"], e["data"]["status"]) for e in seen
    }
    assert told == expected, f"seed {seed}"
    for job in jobs:
        mine = [text(e) for e in seen if e["event"] == "log" and e["data"]["job_id"] == job["id"]]
        assert mine == [line["message"] for line in controller.lines(job)][-len(mine) :], f"seed {seed}"


def small_hub(controller):
    """So that a reader that was away for a moment has to ask the database."""
    controller.daemon.hub._max_events = 4


def some(controller, last_id, seen, count, first=False):
    """Reads that many events more and goes away in the middle of what is sent; the id to go on from."""
    with EventStream(controller, "/v1/logs/stream" + ("?tail=1" if first else ""), last_id) as stream:
        assert stream.status == 200
        for event in stream:
            assert event["event"] != "gap", event
            seen.append(event)
            count -= 1
            if count == 0:
                break
    return seen[-1]["id"]
