"""Metrics: counters, histograms and gauges in Prometheus's text format. tests/proof/monitoring.py asks Prometheus's own parsers."""

from __future__ import annotations

import json
import os
import pathlib
import re
import threading

import pytest
from conftest import FakeClock

import deploybot
from deploybot import Metrics

SAMPLE = re.compile(r'([a-z_]+)(?:\{([a-z_]+="[^"\\\n]*"(?:,[a-z_]+="[^"\\\n]*")*)\})? (-?[0-9.e+-]+)')
REQUEST, WAIT, TOOK = (
    "deploybot_http_request_duration_seconds",
    "deploybot_queue_wait_seconds",
    "deploybot_deployment_duration_seconds",
)


def samples(text):
    """{(name, labels): value}; fails where the text is not as the format says."""
    assert text.endswith("\n")
    found, typed = {}, {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in typed, "one TYPE a metric"
            typed[name] = kind
        elif not line.startswith("# HELP "):
            match = SAMPLE.fullmatch(line)
            assert match, line
            name = list(typed)[-1]
            parts = [f"{name}_{part}" for part in ("bucket", "sum", "count")] if typed[name] == "histogram" else [name]
            assert match[1] in parts, "samples of one metric stand together, under their TYPE"
            assert (match[1], match[2]) not in found, "a sample stands once"
            found[match[1], match[2]] = float(match[3])
            assert (typed[name] == "counter") == name.endswith("_total")
    return found


def scraped(controller):
    return samples(controller.raw("GET", "/metrics")[2].decode())


def tally(found, name, labels=""):
    """({upper end: how many are not above it}, how many in all, their sum) of one histogram."""
    pattern, own = re.compile(re.escape(f"{labels}," if labels else "") + 'le="([^"]+)"'), labels or None
    buckets = {
        m[1]: n for (one, all_labels), n in found.items() if one == f"{name}_bucket" and (m := pattern.fullmatch(all_labels))
    }
    return buckets, found.get((f"{name}_count", own)), found.get((f"{name}_sum", own))


@pytest.fixture
def held(make_controller):
    """A controller whose clock stands still."""
    return make_controller(clock=FakeClock())


def test_counters_add_up_by_labels():
    metrics = Metrics()
    metrics.count("deploybot_jobs_ended_total", 'status="failed",reason="timeout"')
    metrics.count("deploybot_jobs_created_total")
    metrics.count("deploybot_jobs_ended_total", 'status="success",reason=""', by=2)
    metrics.count("deploybot_jobs_ended_total", 'status="failed",reason="timeout"')
    assert samples(metrics.text({})) == {
        ("deploybot_jobs_created_total", None): 1,
        ("deploybot_jobs_ended_total", 'status="failed",reason="timeout"'): 2,
        ("deploybot_jobs_ended_total", 'status="success",reason=""'): 2,
    }


def test_every_name_that_is_counted_has_its_help():
    source = pathlib.Path(deploybot.__file__).read_text()
    counted = re.findall(r'\bcount(?:\(|, )"(\w+)"', source)
    assert len(counted) >= 6 and set(counted) <= deploybot.METRICS.keys()
    observed = re.findall(r'\bobserve(?:\(|, )"(\w+)"', source)
    assert set(observed) == deploybot.BUCKETS.keys() <= deploybot.METRICS.keys()


@pytest.mark.parametrize("name", deploybot.METRICS)
def test_names_have_their_unit_in_the_plural_and_at_their_end(name):
    """https://prometheus.io/docs/practices/naming/"""
    assert re.fullmatch("deploybot(_[a-z]+)+", name)
    assert not re.search("_(second|byte|ms|milliseconds|minutes|kib|mib|percent|count|sum|bucket)(_|$)", name)
    assert re.search("_(total|seconds|bytes|jobs|online|registered|connections)$", name)


def test_a_histogram_counts_what_is_not_above_each_end():
    metrics = Metrics()
    for seconds in (0.05, 0.1, 0.1001, 60, 60_000):
        metrics.observe(WAIT, "", seconds)
    buckets, count, total = tally(samples(metrics.text({})), WAIT)
    assert list(buckets) == ["0.1", "1", "5", "15", "60", "300", "900", "3600", "14400", "43200", "+Inf"]
    assert list(buckets.values()) == [2, 3, 3, 3, 4, 4, 4, 4, 4, 4, 5]
    assert (count, total) == (5, pytest.approx(60_060.2501))


@pytest.mark.parametrize("name", deploybot.BUCKETS)
def test_buckets_are_in_their_order_and_few(name):
    ends = deploybot.BUCKETS[name]
    assert list(ends) == sorted(set(ends)) and 8 <= len(ends) <= 12


def test_requests_are_counted_by_status_and_timed_by_route():
    metrics = Metrics()
    for method, route, status, seconds in (
        ("GET", "/v1/jobs", 200, 0.002),
        ("GET", "/v1/jobs", 200, 0.004),
        ("GET", "/v1/jobs", 401, 0.0005),
        ("POST", "/v1/jobs", 201, 7.0),
    ):
        metrics.observe(REQUEST, (method, route, status), seconds)
    for _ in range(2):  # to ask changes nothing
        found = samples(metrics.text({}))
        by_status = {labels: n for (name, labels), n in found.items() if name == "deploybot_http_requests_total"}
        assert by_status == {
            'method="GET",route="/v1/jobs",status="200"': 2,
            'method="GET",route="/v1/jobs",status="401"': 1,
            'method="POST",route="/v1/jobs",status="201"': 1,
        }
        buckets, count, total = tally(found, REQUEST, 'method="GET",route="/v1/jobs"')
        assert (buckets["0.001"], buckets["0.0025"], buckets["0.005"], buckets["+Inf"], count) == (1, 2, 3, 3, 3)
        assert total == pytest.approx(0.0065)
        buckets, count, total = tally(found, REQUEST, 'method="POST",route="/v1/jobs"')
        assert (buckets["5"], buckets["30"], count, total) == (0, 1, 1, 7)


def test_a_parked_heartbeat_takes_its_time(controller):
    agent = controller.register()
    controller.beat(agent, wait=1)
    _, count, total = tally(scraped(controller), REQUEST, 'method="POST",route="/v1/agents/{id}/heartbeat"')
    assert count == 1 and 1 <= total < 20


def test_what_a_job_waited_for_its_agent_is_told(held):
    agent, _ = held.register(), held.create()
    held.clock.advance(7)
    held.beat(agent)
    buckets, count, total = tally(scraped(held), WAIT)
    assert (buckets["5"], buckets["15"], count, total) == (0, 1, 1, 7)


def test_another_attempt_waits_anew(held):
    agent, job = held.register(), held.create(retries=1)
    held.beat(agent)
    held.clock.advance(1000)
    held.jobs.sweep()  # agent_lost: it waits again
    held.clock.advance(2)
    assert held.beat(held.register())["job"]["id"] == job["id"]
    assert tally(scraped(held), WAIT)[1:] == (2, 2)


def test_an_ended_deployment_is_counted_and_timed(held):
    held.set_app(name="web", repo="o/web", hosts=["web-01"])
    agent = held.register()
    held.ok("POST", "/v1/deployments", {"app": "web", "ref": "main"})
    held.clock.advance(20)
    job = held.beat(agent)["job"]
    held.clock.advance(20)
    held.end(job)
    gone = held.ok("POST", "/v1/deployments", {"app": "web", "ref": "main", "force": True})["deployment"]
    held.ok("POST", f"/v1/deployments/{gone['id']}/cancel")
    found = scraped(held)
    ended = {labels: n for (name, labels), n in found.items() if name == "deploybot_deployments_ended_total"}
    assert ended == {'app="web",status="success"': 1, 'app="web",status="cancelled"': 1}
    buckets, count, total = tally(found, TOOK, 'status="success"')
    assert (buckets["30"], buckets["60"], count, total) == (0, 1, 1, 40)
    assert tally(found, TOOK, 'status="cancelled"')[1:] == (1, 0)


def test_an_app_that_apps_yaml_does_not_have_is_no_label(held):
    held.set_app(name="web", repo="o/web", hosts=["web-01"])
    made = held.ok("POST", "/v1/deployments", {"app": "web", "ref": "main"})["deployment"]
    held.set_app(name="renamed", repo="o/web", hosts=["web-01"])
    held.ok("POST", f"/v1/deployments/{made['id']}/cancel")
    assert scraped(held)["deploybot_deployments_ended_total", 'app="other",status="cancelled"'] == 1


def test_too_many_apps_are_not_told_apart(held, monkeypatch):
    monkeypatch.setattr(deploybot, "MAX_APP_LABELS", 1)
    apps = [{"name": name, "repo": f"o/{name}", "hosts": ["web-01"]} for name in ("one", "two")]
    for known, label in ((apps[:1], "one"), (apps, "other")):
        held.apps_file.write_text(json.dumps({"apps": known}))
        held.daemon.apps.all = deploybot.read_apps(held.apps_file)
        made = held.ok("POST", "/v1/deployments", {"app": "one", "ref": label})["deployment"]
        held.ok("POST", f"/v1/deployments/{made['id']}/cancel")
        assert scraped(held)["deploybot_deployments_ended_total", f'app="{label}",status="cancelled"'] == 1


def test_the_oldest_job_that_waits_has_an_age_unless_its_host_is_drained(held):
    def age():
        return scraped(held)["deploybot_queue_oldest_job_age_seconds", None]

    assert age() == 0
    agents = {name: held.register(name) for name in ("web-01", "web-02")}
    held.create("first", host="web-02")
    held.clock.advance(5)
    held.create("second", host="web-01")
    held.clock.advance(20)
    held.create("third", host="web-01")
    held.clock.advance(40)
    assert age() == 65
    held.ok("POST", "/v1/hosts/web-02/drain")
    assert age() == 60
    held.beat(agents["web-01"])
    held.ok("POST", "/v1/hosts/web-01/drain")
    assert age() == 0
    held.ok("POST", "/v1/hosts/web-02/resume")
    assert age() == 65


def test_the_agent_that_is_silent_for_longest_has_an_age_unless_its_host_is_drained(held):
    def age():
        return scraped(held)["deploybot_agents_oldest_contact_age_seconds", None]

    assert age() == 0
    first = held.register("web-01")
    held.clock.advance(100)
    second = held.register("web-02")
    assert age() == 100
    held.ok("POST", "/v1/hosts/web-01/drain")
    assert age() == 0
    held.ok("POST", "/v1/hosts/web-01/resume")
    held.beat(first)
    held.clock.advance(30)
    held.beat(first)
    assert age() == 30
    held.beat(second, status="offline")  # a farewell is contact, and after it there is none
    held.clock.advance(31)
    held.beat(first)
    assert age() == 31


def test_disk_and_database_are_measured(controller, monkeypatch):
    controller.create()
    disk, path = os.statvfs(controller.folder), controller.config.db
    found = scraped(controller)
    assert found["deploybot_disk_free_bytes", None] == pytest.approx(disk.f_bavail * disk.f_frsize, rel=0.2)
    assert found["deploybot_database_size_bytes", None] == path.stat().st_size
    assert found["deploybot_database_wal_size_bytes", None] == pathlib.Path(f"{path}-wal").stat().st_size > 0

    def gone(path):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("deploybot.os.statvfs", gone)
    status, _, body = controller.raw("GET", "/metrics")
    assert (status, json.loads(body)["detail"]) == (503, "the database cannot be looked at: No such file or directory")


def test_gauges_stand_with_their_value():
    text = Metrics().text({"deploybot_queue_jobs": 3, "deploybot_uptime_seconds": 0.25})
    assert samples(text) == {("deploybot_queue_jobs", None): 3, ("deploybot_uptime_seconds", None): 0.25}
    assert "# TYPE deploybot_queue_jobs gauge\n" in text


def test_threads_lose_no_count():
    metrics = Metrics()

    def work():
        for _ in range(500):
            metrics.count("deploybot_log_lines_total")
            metrics.observe(WAIT, "", 1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = samples(metrics.text({}))
    assert found["deploybot_log_lines_total", None] == tally(found, WAIT)[1] == tally(found, WAIT)[2] == 2000


def test_a_controller_counts_what_happened(controller):
    agent = controller.register()
    job = controller.create()
    controller.create("other", host="web-02")
    claimed = controller.beat(agent)["job"]
    controller.logs(claimed, "one", "two")
    controller.end(claimed, "failed", exit_code=3)
    controller.raw("GET", "/no/such/path")
    controller.raw("DELETE", "/v1/jobs")
    status, headers, body = controller.raw("GET", "/metrics")
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    found = samples(body.decode())
    assert job["id"] == claimed["id"]
    expected = {
        ("deploybot_jobs_created_total", None): 2,
        ("deploybot_jobs_ended_total", 'status="failed",reason="exit_code"'): 1,
        ("deploybot_log_lines_total", None): 2,
        ("deploybot_queue_jobs", None): 1,
        ("deploybot_running_jobs", None): 0,
        ("deploybot_agents_online", None): 1,
        ("deploybot_agents_registered", None): 1,
        ("deploybot_http_requests_total", 'method="POST",route="/v1/jobs",status="201"'): 2,
        ("deploybot_http_requests_total", 'method="POST",route="/v1/jobs/{id}/logs",status="200"'): 1,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert {re.sub("_(bucket|sum|count)$", "", name) for name, _ in found} <= set(deploybot.METRICS)


def test_lines_sent_again_are_not_counted_as_stored(controller):
    agent, _ = controller.register(), controller.create()
    job = controller.beat(agent)["job"]
    controller.logs(job, "one", "two")
    controller.logs(job, "one", "two", "three")
    found = samples(controller.raw("GET", "/metrics")[2].decode())
    assert found["deploybot_log_lines_total", None] == 3


def test_no_path_or_method_of_a_stranger_becomes_a_label(controller):
    for number in range(5):
        controller.raw("GET", f"/evil-{number}")
        controller.raw(f"EVIL{chr(65 + number)}", "/health")
        controller.raw("GET", f"/v1/jobs/evil-{number}")
    assert "evil" not in controller.raw("GET", "/metrics")[2].decode().lower()
