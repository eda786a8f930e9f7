"""EventHub: a window on the newest events; a reader gets what is newer, or learns that it is behind."""

from __future__ import annotations

import concurrent.futures
import time

import pytest
from conftest import wait_for

from deploybot import Event, EventHub


def event(position, lines=1, data="[]"):
    return Event(position, lines, "log", "job", "host", "app", 1, 0, data)


def positions(events):
    return None if events is None else [one.position for one in events]


def fill(hub, *events):
    for one in events:
        hub.publish([event(one) if isinstance(one, int) else one])


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(4) as made:
        yield made


def park(hub, pool, position, count=1):
    parked = [pool.submit(hub.since, position, 20.0) for _ in range(count)]
    wait_for(lambda: len(hub._cond._waiters) == count)
    return parked


def test_a_reader_gets_what_is_newer_in_order():
    hub = EventHub(10)
    fill(hub, 11, 12, 13)
    assert positions(hub.since(10, 0)) == [11, 12, 13]
    assert positions(hub.since(12, 0)) == [13]
    assert hub.head == 13


def test_a_reader_in_the_middle_of_a_chunk_gets_that_chunk():
    hub = EventHub(0)
    fill(hub, event(5, lines=5), event(8, lines=3))
    assert positions(hub.since(6, 0)) == [8]
    assert positions(hub.since(2, 0)) == [5, 8]


def test_nothing_newer_is_an_empty_list_after_the_timeout():
    hub = EventHub(3)
    started = time.monotonic()
    assert hub.since(3, 0.05) == []
    assert 0.05 <= time.monotonic() - started < 5


def test_a_reader_behind_the_start_is_sent_to_the_database():
    hub = EventHub(100)
    fill(hub, 101)
    assert hub.since(99, 0) is None
    assert positions(hub.since(100, 0)) == [101]


def test_the_window_holds_so_many_events():
    hub = EventHub(0, max_events=3)
    fill(hub, 1, 2, 3)
    assert hub.floor == 0
    fill(hub, 4, 5)
    assert hub.floor == 2
    assert hub.since(1, 0) is None
    assert positions(hub.since(2, 0)) == [3, 4, 5]


def test_the_window_holds_so_many_bytes():
    hub = EventHub(0, max_bytes=event(1, data="x" * 1000).size() + event(2, data="x" * 1000).size())
    fill(hub, event(1, data="x" * 1000), event(2, data="x" * 1000))
    assert positions(hub.since(0, 0)) == [1, 2]
    fill(hub, event(3))
    assert hub.since(0, 0) is None
    assert positions(hub.since(1, 0)) == [2, 3]
    fill(hub, event(4))
    assert positions(hub.since(1, 0)) == [2, 3, 4]  # what went out is counted out


def test_an_event_greater_than_the_window_sends_its_readers_to_the_database():
    hub = EventHub(0, max_bytes=2000)
    fill(hub, 1, event(2, data="x" * 2001))
    assert (hub.floor, hub.head) == (2, 2)
    assert hub.since(1, 0) is None
    assert hub.since(2, 0) == []
    fill(hub, 3)
    assert positions(hub.since(2, 0)) == [3]


def test_publish_wakes_every_reader(pool):
    hub = EventHub(0)
    parked = park(hub, pool, 0, count=3)
    fill(hub, 1)
    assert [positions(one.result(10)) for one in parked] == [[1]] * 3


def test_a_reader_waits_through_events_that_it_has(pool):
    """A position ahead of the head (a chunk that is on its way) is waited for, not answered with what is older."""
    hub = EventHub(0)
    (parked,) = park(hub, pool, 2)
    fill(hub, 1, 2, 3)
    assert positions(parked.result(10)) == [3]


def test_close_ends_every_wait_and_gives_what_is_left(pool):
    hub = EventHub(0)
    parked = park(hub, pool, 0, count=2)
    hub.close()
    assert [one.result(10) for one in parked] == [[], []]
    assert hub.closed
    fill(hub, 1)
    assert positions(hub.since(0, 20.0)) == [1]
    started = time.monotonic()
    assert hub.since(1, 20.0) == []
    assert time.monotonic() - started < 10


def test_many_short_lines_are_counted_as_what_they_cost_a_reader():
    """A thousand empty lines are few bytes in the database, and a thousand frames in memory."""
    assert event(1000, lines=1000, data="[]").size() > 100 * 1000


def test_a_reader_far_behind_the_head_gets_all_of_the_window_in_parts_without_a_gap():
    hub = EventHub(0, max_events=2000)
    fill(hub, *[event(number, data="x" * 3000) for number in range(1, 1501)])
    position, seen = 0, []
    while position < hub.head:
        part = positions(hub.since(position, 0))
        seen += part
        position = part[-1]
    assert seen == list(range(1, 1501))
