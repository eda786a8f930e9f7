"""Parked heartbeats: answered when there is something, for whom it is, and at stop.

No speed is measured: what would be too late is the time-out of the parking, 25 s.
"""

import concurrent.futures
import time

import pytest
from conftest import wait_for

PARK = 25  # seconds
AT_ONCE = 12  # seconds: far under PARK, far over what a loaded machine needs


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(110) as pool:
        yield pool


def parked(controller, hosts):
    lanes = controller.daemon.queue._lanes
    wait_for(lambda: all(len(lanes[host].woken._waiters) == 1 for host in hosts))


def test_answered_at_once_when_a_job_is_made(controller, pool):
    agent = controller.register()
    waiting = pool.submit(controller.beat, agent, wait=PARK)
    parked(controller, ["web-01"])
    assert not waiting.done()
    started = time.monotonic()
    made = controller.create()
    assert waiting.result(PARK)["job"]["id"] == made["id"]
    assert time.monotonic() - started < AT_ONCE


def test_for_the_right_host_only(controller, pool):
    hosts = [f"web-0{i}" for i in range(4)]
    waiting = {host: pool.submit(controller.beat, controller.register(host), wait=PARK) for host in hosts}
    parked(controller, hosts)
    made = controller.create(host="web-02")
    assert waiting.pop("web-02").result(AT_ONCE)["job"]["id"] == made["id"]
    parked(controller, waiting)
    assert not any(one.done() for one in waiting.values())
    controller.stop()
    assert [one.result(AT_ONCE)["job"] for one in waiting.values()] == [None] * 3


def test_without_wait_it_answers_at_once_and_with_wait_at_its_end(controller):
    agent = controller.register()
    started = time.monotonic()
    assert controller.beat(agent)["interval"] > 0
    assert time.monotonic() - started < AT_ONCE
    started = time.monotonic()
    answer = controller.beat(agent, wait=1)
    assert (answer["job"], answer["interval"]) == (None, 0)
    assert time.monotonic() - started >= 0.95


def test_a_job_that_waits_needs_no_parking(controller):
    agent, made = controller.register(), controller.create()
    started = time.monotonic()
    assert controller.beat(agent, wait=PARK)["job"]["id"] == made["id"]
    assert time.monotonic() - started < AT_ONCE


def test_a_hundred_parked_agents_each_get_their_own_job(controller, pool):
    hosts = [f"host-{i:03}" for i in range(100)]
    agents = {host: controller.register(host) for host in hosts}
    waiting = {host: pool.submit(controller.beat, agent, wait=PARK) for host, agent in agents.items()}
    parked(controller, hosts)
    started = time.monotonic()
    made = {host: controller.create(host=host)["id"] for host in reversed(hosts)}
    got = {host: one.result(PARK)["job"] for host, one in waiting.items()}
    assert time.monotonic() - started < AT_ONCE
    assert {host: job["id"] for host, job in got.items()} == made
    assert all(job["assigned_agent"] == agents[host]["id"] for host, job in got.items())


def test_two_parked_calls_of_a_host_and_one_job(controller, pool):
    agent = controller.register()
    waiting = [pool.submit(controller.beat, agent, wait=PARK) for _ in range(2)]
    wait_for(lambda: len(controller.daemon.queue._lanes["web-01"].woken._waiters) == 2)
    controller.create()
    done, left = concurrent.futures.wait(waiting, AT_ONCE, concurrent.futures.FIRST_COMPLETED)
    assert len(done) == 1 and done.pop().result()["job"]
    parked(controller, ["web-01"])
    controller.stop()
    assert left.pop().result(AT_ONCE)["job"] is None


@pytest.mark.parametrize("change", ["end", "resume"])
def test_a_job_that_becomes_free_wakes_too(controller, pool, change):
    agent = controller.register(slots=2)
    if change == "end":
        running = controller.create(ref="first")
        controller.beat(agent)
    else:
        controller.ok("POST", "/v1/hosts/web-01/drain")
    made = controller.create(ref="second")
    waiting = pool.submit(controller.beat, agent, wait=PARK)
    parked(controller, ["web-01"])
    started = time.monotonic()
    if change == "end":
        controller.end(controller.job(running["id"]))
    else:
        controller.ok("POST", "/v1/hosts/web-01/resume")
    assert waiting.result(PARK)["job"]["id"] == made["id"]
    assert time.monotonic() - started < AT_ONCE


def test_stop_answers_the_parked(controller, pool):
    hosts = [f"host-{i}" for i in range(20)]
    waiting = [pool.submit(controller.beat, controller.register(host), wait=PARK) for host in hosts]
    parked(controller, hosts)
    started = time.monotonic()
    controller.stop()
    answers = [one.result(PARK) for one in waiting]
    assert time.monotonic() - started < AT_ONCE
    assert all(answer["acknowledged"] and answer["job"] is None for answer in answers)
