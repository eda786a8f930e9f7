"""JobQueue: first come, first served for each host; nobody is woken in vain, nobody is forgotten."""

from __future__ import annotations

import concurrent.futures
import threading
import time

import pytest
from conftest import wait_for

from deploybot import JobQueue

NONE_BUSY = frozenset()


@pytest.fixture
def queue():
    made = JobQueue()
    yield made
    made.close()


@pytest.fixture
def pool(queue):
    """Threads; a test that fails leaves none parked."""
    with concurrent.futures.ThreadPoolExecutor(8) as made:
        yield made
        queue.close()


def take(queue, host="a", busy=NONE_BUSY, seconds=0.0, ticket=None):
    ticket = queue.ticket(host) if ticket is None else ticket
    return queue.take(host, busy, ticket, time.monotonic() + seconds)


def is_parked(queue, host, count=1):
    """Whether so many threads wait for that host. Reads the Condition's own list: there is no other way to see a wait."""
    with queue._lock:
        lane = queue._lanes.get(host)
        return lane is not None and len(lane.woken._waiters) == count


def park(queue, pool, host="a", busy=NONE_BUSY, count=1):
    """Futures of `count` calls that wait in take()."""
    parked = [pool.submit(take, queue, host, busy, 20.0) for _ in range(count)]
    wait_for(lambda: is_parked(queue, host, count))
    return parked


def test_jobs_come_in_the_order_they_were_put(queue):
    for number in range(5):
        queue.put("a", f"{number}", "app")
    assert [take(queue)[0] for _ in range(5)] == list("01234")
    assert take(queue) is None


def test_a_job_that_comes_back_takes_its_old_place(queue):
    for job in "12345":
        queue.put("a", job, "app")
    assert [take(queue)[0], take(queue)[0], take(queue)[0]] == ["1", "2", "3"]
    queue.put("a", "2", "app")
    queue.put("a", "1", "app")
    queue.put("a", "3", "app")
    assert [take(queue)[0] for _ in range(5)] == list("12345")


def test_busy_apps_are_skipped_and_keep_their_place(queue):
    for job, app in (("1", "x"), ("2", "y"), ("3", "x")):
        queue.put("a", job, app)
    assert take(queue, busy=frozenset("x")) == ("2", "y")
    assert take(queue, busy=frozenset("xy")) is None
    assert [take(queue), take(queue)] == [("1", "x"), ("3", "x")]


def test_busy_none_takes_nothing(queue):
    queue.put("a", "1", "x")
    assert take(queue, busy=None) is None
    assert queue.depth == 1


def test_hosts_do_not_share_jobs(queue):
    queue.put("a", "1", "x")
    assert take(queue, "b") is None
    assert take(queue, "a") == ("1", "x")


def test_remove_takes_one_job_out(queue):
    for job in "123":
        queue.put("a", job, "x")
    queue.remove("a", "2")
    queue.remove("a", "2")
    queue.remove("b", "2")
    assert queue.depth == 2
    assert [take(queue)[0], take(queue)[0]] == ["1", "3"]


def test_the_depth_counts_all_that_waits(queue):
    """Kept beside the lanes, as a scrape must not walk over thousands of hosts."""
    seen = []
    for step in (
        lambda: queue.load("a", [("1", "x"), ("2", "y")]),
        lambda: queue.load("b", [("3", "x")]),
        lambda: queue.put("a", "5", "x"),
        lambda: queue.put("a", "4", "x"),  # takes its old place
        lambda: take(queue, busy=frozenset("x")),
        lambda: take(queue, busy=frozenset("xy")),  # gets none
        lambda: queue.remove("a", {"1", "5", "gone"}),
        lambda: queue.remove("nobody", {"1"}),
        lambda: [take(queue), take(queue, "b"), take(queue)],
    ):
        step()
        seen.append((queue.depth, sum(len(lane.waiting) for lane in queue._lanes.values())))
    assert seen == [(depth, depth) for depth in (2, 3, 4, 5, 4, 4, 2, 2, 0)]


def test_a_ticket_misses_no_wake(queue):
    ticket = queue.ticket("a")
    queue.wake("a")
    started = time.monotonic()
    assert take(queue, ticket=ticket, seconds=20.0) is None
    assert time.monotonic() - started < 10


def test_a_ticket_misses_no_job_of_a_busy_app(queue):
    """The job cannot be taken, yet whoever took the ticket before it looks again."""
    ticket = queue.ticket("a")
    queue.put("a", "1", "x")
    started = time.monotonic()
    assert take(queue, busy=frozenset("x"), ticket=ticket, seconds=20.0) is None
    assert time.monotonic() - started < 10


def test_a_take_without_news_waits_to_its_deadline_and_no_longer(queue):
    started = time.monotonic()
    assert take(queue, seconds=0.05) is None
    assert 0.05 <= time.monotonic() - started < 5


def test_a_parked_take_gets_the_job_that_is_put(queue, pool):
    (parked,) = park(queue, pool)
    queue.put("a", "1", "x")
    assert parked.result(10) == ("1", "x")


def test_of_two_parked_takes_one_gets_the_job_and_both_return(queue, pool):
    parked = park(queue, pool, count=2)
    queue.put("a", "1", "x")
    assert sorted([one.result(10) for one in parked], key=str) == [("1", "x"), None]


def test_wake_ends_a_parked_take_that_wants_no_job(queue, pool):
    (parked,) = park(queue, pool, busy=None)
    queue.wake("a")
    assert parked.result(10) is None


def test_a_put_does_not_wake_the_waiters_of_another_host(queue, pool):
    (parked,) = park(queue, pool, "b")
    with queue._lock:
        condition = queue._lanes["b"].woken
        before = list(condition._waiters)
    for number in range(20):
        queue.put("a", str(number), "x")
    with queue._lock:
        assert list(condition._waiters) == before  # a woken waiter would have left the list
    queue.put("b", "1", "x")
    assert parked.result(10) == ("1", "x")


def test_close_ends_every_parked_take_and_no_more_park(queue, pool):
    parked = park(queue, pool, "a", count=2) + park(queue, pool, "b", busy=None)
    queue.close()
    assert [one.result(10) for one in parked] == [None] * 3
    queue.put("a", "1", "x")
    started = time.monotonic()
    assert take(queue, seconds=20.0) is None
    assert take(queue, "new", seconds=20.0) is None
    assert time.monotonic() - started < 10


def test_no_job_is_lost_or_given_twice_between_many_threads(queue, pool):
    wanted = {f"{number:04}" for number in range(200)}
    got, done = [], threading.Event()

    def work():
        while not done.is_set():
            entry = take(queue, seconds=0.05)
            if entry:
                got.append(entry[0])

    workers = [pool.submit(work) for _ in range(4)]
    for job in sorted(wanted):
        queue.put("a", job, "x")
    wait_for(lambda: len(got) >= len(wanted))
    done.set()
    for worker in workers:
        worker.result(10)
    assert sorted(got) == sorted(wanted)
