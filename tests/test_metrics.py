"""Metrics: counters and gauges in Prometheus's text format."""

from __future__ import annotations

import pathlib
import re
import threading

import deploybot
from deploybot import Metrics

SAMPLE = re.compile(r'([a-z_]+)(?:\{([a-z_]+="[^"\\\n]*"(?:,[a-z_]+="[^"\\\n]*")*)\})? (-?[0-9.e+-]+)')


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
            assert list(typed)[-1] == match[1], "samples of one metric stand together, under their TYPE"
            assert (match[1], match[2]) not in found, "a sample stands once"
            found[match[1], match[2]] = float(match[3])
            assert (typed[match[1]] == "counter") == match[1].endswith("_total")
    return found


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
    assert len(counted) >= 7 and set(counted) <= deploybot.METRICS.keys()


def test_an_ended_deployment_is_counted(controller):
    controller.set_app(name="web", repo="o/web", hosts=["web-01"])
    made = controller.ok("POST", "/v1/deployments", {"app": "web", "ref": "main"})["deployment"]
    controller.ok("POST", f"/v1/deployments/{made['id']}/cancel")
    status, _, data = controller.raw("GET", "/metrics")
    assert (status, samples(data.decode())["deploybot_deployments_ended_total", 'status="cancelled"']) == (200, 1)


def test_gauges_stand_with_their_value():
    text = Metrics().text({"deploybot_queue_jobs": 3, "deploybot_uptime_seconds": 0.25})
    assert samples(text) == {("deploybot_queue_jobs", None): 3, ("deploybot_uptime_seconds", None): 0.25}
    assert "# TYPE deploybot_queue_jobs gauge\n" in text


def test_threads_lose_no_count():
    metrics = Metrics()

    def work():
        for _ in range(500):
            metrics.count("deploybot_log_lines_total")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert samples(metrics.text({})) == {("deploybot_log_lines_total", None): 2000}


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
    assert {name for name, _ in found} <= set(deploybot.METRICS)


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
