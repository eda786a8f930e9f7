"""Deployments: jobs that belong together. Each is moved by step() alone, in the transaction that moved one of its jobs."""

from __future__ import annotations

import json

import pytest
from conftest import SECRET, EventStream, failing_at
from test_webhooks import deliver, payload

import deploybot

HOSTS = ("web-01", "web-02", "web-03", "web-04")
ROLLING = {"type": "rolling", "batch": 1}
OLD, NEW, NEWER = "1" * 40, "2" * 40, "3" * 40


class Fleet:
    """A controller whose clock stands still, one app on four hosts, and their agents."""

    def __init__(self, controller):
        self.controller = self.c = controller
        self.agents = {host: controller.register(host) for host in HOSTS}
        self.app()

    def app(self, **more):
        hosts = more.pop("hosts", list(HOSTS))
        self.c.set_app(name="web", repo="myorg/web", hosts=hosts, deploy_on_push=True, branches=["*"], **more)

    def deploy(self, ref=NEW, expected=(201,), **more):
        body = {"app": "web", **({"ref": ref} if ref else {}), **more}
        return self.c.ok("POST", "/v1/deployments", body, expected)

    def refused(self, path="/v1/deployments", method="POST", **body):
        status, answer = self.c.call(method, path, body)
        return status, answer["detail"] if "errors" not in answer else answer["errors"]

    def see(self, deployment):
        return self.c.ok("GET", f"/v1/deployments/{deployment['id']}")["deployment"]

    def jobs(self, deployment, *names):
        """{host: its status, or what `names` say} of a deployment."""
        found = self.c.ok("GET", f"/v1/jobs?limit=1000&deployment_id={deployment['id']}")["jobs"]
        return {job["host"]: tuple(job[name] for name in names) if names else job["status"] for job in found}

    def take(self, *hosts):
        """Hosts that got a job, with it."""
        found = {host: self.c.beat(self.agents[host])["job"] for host in hosts or HOSTS}
        return {host: job for host, job in found.items() if job}

    def end(self, job, status="success", **more):
        reason = {"reason": "exit_code", "exit_code": 1} if status == "failed" else {}
        return self.c.end(job, status, **{"commit": job["ref"], **reason, **more})

    def run(self, status="success", **more):
        """Every job that can be had, to its end; the hosts in the order of it."""
        ran = []
        while taken := self.take():
            for host, job in taken.items():
                self.end(job, status, **more)
                ran.append(host)
        return ran

    def push(self, commit=NEW, branch="main", **more):
        body = payload(ref=f"refs/heads/{branch}", after=commit, head_commit={"id": commit, "message": "x"}, **more)
        return deliver(self.c, body, X_GitHub_Delivery=f"{commit[:4]}-{branch}")[1]

    def newest(self, **query):
        more = "".join(f"&{name}={value}" for name, value in query.items())
        return self.c.ok("GET", f"/v1/deployments?limit=1{more}")["deployments"][0]


@pytest.fixture
def fleet(make_controller, clock):
    return Fleet(make_controller("fleet", clock=clock, webhook_secret=SECRET))


# -- a deployment ------------------------------------------------------------------------------------------------------


def test_a_deployment_is_all_jobs_of_an_app(fleet):
    made = fleet.deploy(metadata={"ticket": 7})
    found = made["deployment"]
    assert (made["created"], made["skipped"], found["kind"], found["status"], found["hosts"]) == (True, [], "deploy", "pending", 4)
    assert found["progress"] == {"held": 0, "pending": 4, "running": 0, "success": 0, "failed": 0, "cancelled": 0}
    assert {job["host"]: job["deployment_id"] for job in made["jobs"]} == dict.fromkeys(HOSTS, found["id"])
    assert made["jobs"][0]["metadata"] == {"ticket": 7, "app": "web", "trigger": "deploy"}
    assert fleet.see(found) == found == fleet.newest() and found["started_at"] is None


def test_its_status_goes_with_its_jobs(fleet):
    found = fleet.deploy()["deployment"]
    jobs = fleet.take()
    assert set(jobs) == set(HOSTS)
    running = fleet.see(found)
    assert (running["status"], running["progress"]["running"], running["completed_at"]) == ("running", 4, None)
    assert running["started_at"] is not None
    for job in jobs.values():
        fleet.end(job)
    ended = fleet.see(found)
    assert (ended["status"], ended["reason"], ended["progress"]["success"]) == ("success", None, 4)
    assert ended["completed_at"] is not None


ENDS = [
    (("success",) * 4, "success", None),
    (("success", "failed", "success", "success"), "partial", "1 failed of 4"),
    (("failed",) * 4, "failed", "4 failed of 4"),
    (("failed", "rolled_back", "failed", "failed"), "failed", "4 failed of 4"),
    (("rolled_back",) * 4, "rolled_back", "4 failed of 4"),
    (("cancelled", "rolled_back", "cancelled", "cancelled"), "rolled_back", "1 failed, 3 cancelled of 4"),
    (("cancelled",) * 4, "cancelled", "4 cancelled of 4"),
    (("cancelled", "success", "cancelled", "cancelled"), "partial", "3 cancelled of 4"),
]


@pytest.mark.parametrize(("ends", "status", "reason"), ENDS, ids=[f"{status}-{reason}" for _, status, reason in ENDS])
def test_the_end_is_what_the_jobs_say(fleet, ends, status, reason):
    found = fleet.deploy()["deployment"]
    for (_, job), end in zip(sorted(fleet.take().items()), ends, strict=True):
        if end == "rolled_back":
            fleet.end(job, "failed", rolled_back_to=OLD)
        elif end == "cancelled":
            fleet.c.ok("POST", f"/v1/jobs/{job['id']}/cancel")
            fleet.end(job, "cancelled")
        else:
            fleet.end(job, end)
    ended = fleet.see(found)
    assert (ended["status"], ended["reason"]) == (status, reason)


def test_what_is_under_way_is_not_made_twice(fleet):
    first = fleet.deploy()
    again = fleet.deploy()
    assert (again["created"], again["deployment"]["id"]) == (False, first["deployment"]["id"])
    assert [job["id"] for job in again["jobs"]] == [job["id"] for job in first["jobs"]]
    assert fleet.deploy(force=True)["created"]


def test_hosts_on_which_it_is_under_way_are_left_out(fleet):
    first = fleet.deploy(hosts=["web-01"])
    second = fleet.deploy()
    assert second["deployment"]["hosts"] == 3
    assert second["skipped"] == [{"host": "web-01", "reason": f"the same is under way: job {first['jobs'][0]['id']}"}]
    fleet.run()
    assert (fleet.see(first["deployment"])["status"], fleet.see(second["deployment"])["status"]) == ("success", "success")


WRONG = [
    ({"app": "web"}, "ref", "is required"),
    ({"app": "web", "ref": "main", "to": OLD}, "to", "is of a rollback"),
    ({"app": "web", "ref": "main", "rollback": True}, "ref", "has no place in a rollback: `to` names the commit"),
    ({"app": "web", "ref": "main", "hosts": ["web-1"]}, "hosts", "web-1 is no host of web; did you mean web-01?"),
    ({"app": "web", "ref": "main", "hosts": []}, "hosts", "must be a list with at least one string: [first, second]"),
    ({"app": "web", "ref": "-x"}, "ref", deploybot.is_ref("-x")),
    ({"app": "web", "ref": "main", "force_it": True}, "force_it", "is not known; did you mean force?"),
    ({"app": "web", "rollback": True, "to": "HEAD"}, "to", "must be a commit, or its first 7 digits or more"),
]


@pytest.mark.parametrize(("body", "name", "message"), WRONG, ids=[f"{name}-{message[:20]}" for _, name, message in WRONG])
def test_what_is_wrong_is_named(fleet, body, name, message):
    status, errors = fleet.refused(**body)
    assert (status, errors) == (422, [{"field": name, "message": message}])
    assert fleet.c.ok("GET", "/v1/deployments")["deployments"] == []


@pytest.mark.parametrize("form", ["h{}", "no host {}"])
def test_of_many_wrong_hosts_some_are_named(fleet, form):
    """A body has room for a hundred thousand, and to find what each looks like would take seconds."""
    hosts = [form.format(number) for number in range(50_000)]
    for path, more in (("/v1/deployments", {"app": "web", "ref": "main"}), ("/v1/hooks/web", {"ref": "main"})):
        status, errors = fleet.refused(path, hosts=hosts, **more)
        assert (status, len(errors), {error["field"] for error in errors}) == (422, deploybot.MAX_ERRORS, {"hosts"})


def test_an_app_that_apps_yaml_does_not_have(fleet):
    assert fleet.refused(app="wbe", ref="main") == (404, "apps.yaml has no app wbe; did you mean web?")


def test_pages_of_deployments(fleet):
    made = [fleet.deploy(ref, hosts=["web-01"])["deployment"]["id"] for ref in ("a", "b", "c")]
    page = fleet.c.ok("GET", "/v1/deployments?limit=2")
    assert ([one["id"] for one in page["deployments"]], page["next"]) == (made[:0:-1], made[1])
    rest = fleet.c.ok("GET", f"/v1/deployments?limit=2&before={page['next']}")
    assert ([one["id"] for one in rest["deployments"]], rest["next"]) == (made[:1], None)
    assert len(fleet.c.ok("GET", "/v1/deployments?status=pending&app=web")["deployments"]) == 3
    assert fleet.c.ok("GET", "/v1/deployments?status=success")["deployments"] == []
    assert fleet.c.ok("GET", f"/v1/deployments?id={made[0][:18]}")["deployments"][0]["app"] == "web"


def test_the_stream_tells_of_each_change(fleet):
    with EventStream(fleet.c, "/v1/logs/stream?app=web&tail=0") as stream:
        found = fleet.deploy(hosts=["web-01"])["deployment"]
        fleet.run()
        seen = []
        for event in stream:
            if event["event"] == "deployment":
                seen.append((event["data"]["id"], event["data"]["status"]))
            if seen and seen[-1][1] == "success":
                break
    assert seen == [(found["id"], status) for status in ("pending", "running", "success")]


def test_a_stream_of_one_job_has_no_deployment(fleet):
    made = fleet.deploy(hosts=["web-01"])
    fleet.run()
    with EventStream(fleet.c, f"/v1/logs/stream?job_id={made['jobs'][0]['id']}", last_id=f"{fleet.c.jobs.epoch}-0") as stream:
        assert {event["event"] for event in stream} == {"job", "end"}


# -- cancel and retry --------------------------------------------------------------------------------------------------


def test_cancel_ends_what_waits_and_stops_what_runs(fleet):
    fleet.app(strategy=ROLLING)
    found = fleet.deploy()["deployment"]
    (job,) = fleet.take().values()
    told = fleet.c.ok("POST", f"/v1/deployments/{found['id']}/cancel")["deployment"]
    assert (told["status"], told["progress"]["cancelled"], told["progress"]["running"]) == ("running", 3, 1)
    assert fleet.c.beat(fleet.agents["web-01"], running=[{"job_id": job["id"], "attempt": 1}])["cancel"] == [job["id"]]
    fleet.end(job, "cancelled")
    ended = fleet.see(found)
    assert (ended["status"], ended["reason"]) == ("cancelled", "cancelled by local")
    assert set(fleet.jobs(found, "status", "reason").values()) == {("cancelled", "cancelled")}
    assert fleet.take() == {}
    assert fleet.refused(f"/v1/deployments/{found['id']}/cancel") == (
        409,
        f"deployment {found['id']} cannot be cancelled: cancelled",
    )


def test_retry_is_of_the_hosts_that_failed(fleet):
    found = fleet.deploy()["deployment"]
    assert fleet.refused(f"/v1/deployments/{found['id']}/retry")[0] == 409
    for host, job in fleet.take().items():
        fleet.end(job, "failed" if host in ("web-02", "web-04") else "success")
    again = fleet.c.ok("POST", f"/v1/deployments/{found['id']}/retry")
    assert (again["deployment"]["kind"], again["deployment"]["retry_of"], again["deployment"]["ref"]) == ("retry", found["id"], NEW)
    failed = fleet.jobs(found, "id")
    assert {job["host"]: (job["retry_of"],) for job in again["jobs"]} == {host: failed[host] for host in ("web-02", "web-04")}
    fleet.run()
    status, detail = fleet.refused(f"/v1/deployments/{again['deployment']['id']}/retry")
    assert (status, detail.endswith("has no host to try again: all succeeded")) == (409, True)


def test_what_a_newer_success_has_overtaken_is_not_tried_again(fleet):
    """It would put back what is older, and say nothing."""
    found = fleet.deploy(OLD)["deployment"]
    for host, job in fleet.take().items():
        fleet.end(job, "failed" if host in ("web-02", "web-04") else "success")
    failed = fleet.jobs(found, "id")
    fleet.deploy(NEW, hosts=["web-02"])
    fleet.run()
    (overtaken,) = failed["web-02"]
    status, detail = fleet.refused(f"/v1/jobs/{overtaken}/retry")
    assert (status, detail) == (409, f"a newer web succeeded on web-02 since: to put {OLD} back, deploy it by its name")
    again = fleet.c.ok("POST", f"/v1/deployments/{found['id']}/retry")
    assert [job["host"] for job in again["jobs"]] == ["web-04"]
    assert again["skipped"] == [{"host": "web-02", "reason": "a newer one succeeded there since"}]
    fleet.run()
    status, detail = fleet.refused(f"/v1/deployments/{found['id']}/retry")
    assert status == 409 and detail.endswith(f"newer ones succeeded since: to put {OLD} back, deploy it by its name")
    (newest,) = fleet.jobs(again["deployment"], "id")["web-04"]
    fleet.c.ok("POST", f"/v1/jobs/{newest}/retry")  # what runs there may be made again


# -- rolling, canary ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "sizes"), [(1, [1, 1, 1, 1]), (3, [3, 1]), ("25%", [1, 1, 1, 1]), ("30%", [2, 2]), (9, [4])])
def test_a_batch_begins_when_the_one_before_has_succeeded(fleet, batch, sizes):
    fleet.app(strategy={"type": "rolling", "batch": batch})
    found = fleet.deploy()["deployment"]
    seen = []
    while taken := fleet.take():
        seen.append(len(taken))
        *first, last = taken.values()
        for job in first:
            fleet.end(job)
        if first:
            assert fleet.take() == {}, "its batch has not ended"
        fleet.end(last)
    assert seen == sizes and fleet.see(found)["status"] == "success"


def test_a_failure_stops_the_rest(fleet):
    fleet.app(strategy=ROLLING)
    found = fleet.deploy()["deployment"]
    assert (found["hold"], found["progress"]["held"], found["progress"]["pending"]) == ("batch", 3, 1)
    fleet.end(fleet.take()["web-01"])
    fleet.end(fleet.take()["web-02"], "failed")
    ended = fleet.see(found)
    assert (ended["status"], ended["reason"], ended["hold"]) == ("partial", "stopped: 1 failed of 4", None)
    stopped = fleet.jobs(found, "status", "reason", "error")
    assert stopped["web-03"] == stopped["web-04"] == ("cancelled", "stopped", "1 failed of 4")
    assert fleet.take() == {}


def test_so_many_failures_are_allowed(fleet):
    fleet.app(strategy={**ROLLING, "max_failures": 1})
    found = fleet.deploy()["deployment"]
    fleet.end(fleet.take()["web-01"], "failed")
    fleet.end(fleet.take()["web-02"])
    fleet.end(fleet.take()["web-03"], "failed")
    assert fleet.take() == {} and fleet.jobs(found, "reason")["web-04"] == ("stopped",)


def test_what_runs_goes_on_when_the_rest_is_stopped(fleet):
    fleet.app(strategy={"type": "rolling", "batch": 3})
    found = fleet.deploy()["deployment"]
    jobs = fleet.take("web-01", "web-02")
    fleet.end(jobs["web-01"], "failed")
    assert fleet.jobs(found) == {"web-01": "failed", "web-02": "running", "web-03": "cancelled", "web-04": "cancelled"}
    fleet.end(jobs["web-02"])
    assert fleet.see(found)["status"] == "partial"


def test_all_at_once_is_not_stopped_by_a_failure(fleet):
    found = fleet.deploy()["deployment"]
    fleet.end(fleet.take("web-01")["web-01"], "failed")
    assert len(fleet.run()) == 3 and fleet.see(found)["status"] == "partial"


def test_a_canary_goes_first_and_is_watched(fleet, clock):
    fleet.app(strategy={"canary": "web-03", "pause": "5m"})
    found = fleet.deploy()["deployment"]
    assert found["strategy"]["canary"] == "web-03"
    fleet.end(fleet.take()["web-03"])
    paused = fleet.see(found)
    assert (paused["status"], paused["hold"]) == ("running", "pause")
    assert deploybot.unix_time(paused["resume_at"]) == clock.now() + 300
    assert set(fleet.jobs(found, "hold").values()) == {(None,), ("pause",)}
    fleet.c.passes(299)
    assert fleet.take() == {}
    fleet.c.passes(2)
    assert (fleet.see(found)["hold"], fleet.see(found)["resume_at"]) == (None, None)
    assert sorted(fleet.run()) == ["web-01", "web-02", "web-04"] and fleet.see(found)["status"] == "success"


def test_a_pause_outlives_a_restart(fleet):
    fleet.app(strategy={"canary": "web-01", "pause": "5m", **ROLLING})
    found = fleet.deploy()["deployment"]
    fleet.end(fleet.take()["web-01"])
    fleet.c.restart()
    assert fleet.take() == {}
    fleet.c.passes(301)
    assert list(fleet.take()) == ["web-02"] and fleet.see(found)["progress"]["held"] == 2


def test_a_canary_that_fails_ends_the_rest(fleet):
    fleet.app(strategy={"canary": "web-03", "pause": "5m"})
    found = fleet.deploy()["deployment"]
    fleet.end(fleet.take()["web-03"], "failed", rolled_back_to=OLD)
    ended = fleet.see(found)
    assert (ended["status"], ended["progress"]["cancelled"]) == ("rolled_back", 3)


def test_a_canary_is_alone_and_watched_although_another_was_cancelled(fleet):
    fleet.app(strategy={"canary": "web-03", "pause": "5m", "batch": 2, "max_failures": 1})
    fleet.c.ok("PUT", "/v1/apps/web/lock", {"reason": "x"})
    fleet.push(NEW)
    found = fleet.newest()
    fleet.c.ok("POST", f"/v1/jobs/{fleet.jobs(found, 'id')['web-01'][0]}/cancel")
    fleet.c.ok("DELETE", "/v1/apps/web/lock")
    taken = fleet.take()
    assert list(taken) == ["web-03"]
    fleet.end(taken["web-03"])
    assert (fleet.see(found)["hold"], fleet.take()) == ("pause", {})
    fleet.c.passes(301)
    assert sorted(fleet.run()) == ["web-02", "web-04"]


def test_a_deployment_without_the_canary_has_none(fleet):
    fleet.app(strategy={"canary": "web-03", "pause": "5m"})
    found = fleet.deploy(hosts=["web-01", "web-02"])["deployment"]
    assert found["strategy"]["canary"] is None and sorted(fleet.run()) == ["web-01", "web-02"]


def test_a_held_job_is_cancelled_alone_and_counts_as_no_success(fleet):
    fleet.app(strategy=ROLLING)
    made = fleet.deploy()
    fleet.c.ok("POST", f"/v1/jobs/{made['jobs'][3]['id']}/cancel")
    assert fleet.see(made["deployment"])["reason"] == "stopped: 1 cancelled of 4"


def test_a_batch_of_a_lost_agent_stops_the_rest(fleet):
    fleet.app(strategy=ROLLING)
    found = fleet.deploy()["deployment"]
    fleet.take("web-01")
    fleet.c.passes(fleet.c.config.lost_after + 1)
    assert fleet.jobs(found, "status", "reason")["web-01"] == ("failed", "agent_lost")
    assert fleet.jobs(found, "reason")["web-02"] == ("stopped",)


def test_a_job_that_gets_another_attempt_goes_back_to_those_that_wait(fleet):
    fleet.app(strategy=ROLLING, retries=1)
    found = fleet.deploy()["deployment"]
    fleet.take("web-01")
    fleet.c.passes(fleet.c.config.lost_after + 1)
    progress = fleet.see(found)["progress"]
    assert (progress["held"], progress["pending"], progress["running"]) == (3, 1, 0)
    fleet.end(fleet.take()["web-01"])
    assert list(fleet.take()) == ["web-02"]


def test_pending_jobs_of_a_deployment_expire_together(fleet):
    fleet.app(strategy=ROLLING)
    found = fleet.deploy()["deployment"]
    fleet.c.passes(fleet.c.config.pending_expiry + 1)
    assert fleet.see(found)["status"] == "cancelled" and set(fleet.jobs(found).values()) == {"cancelled"}


def test_one_that_holds_nothing_any_more_has_no_hold(fleet):
    fleet.app(strategy={"type": "rolling", "batch": 2})
    found = fleet.deploy()["deployment"]
    jobs = fleet.take()
    fleet.end(jobs["web-01"], "failed")
    stopped = fleet.see(found)
    assert (stopped["status"], stopped["progress"]["held"], stopped["hold"]) == ("running", 0, None)


def test_one_that_succeeded_although_it_was_to_be_cancelled_has_no_reason(fleet):
    found = fleet.deploy(hosts=["web-01"])["deployment"]
    (job,) = fleet.take().values()
    fleet.c.ok("POST", f"/v1/deployments/{found['id']}/cancel")
    fleet.end(job)
    assert (fleet.see(found)["status"], fleet.see(found)["reason"]) == ("success", None)


def test_what_waits_for_its_turn_does_not_expire(fleet):
    fleet.app(strategy=ROLLING)
    found = fleet.deploy()["deployment"]
    for host in HOSTS:  # each takes most of the day
        fleet.c.passes(fleet.c.config.pending_expiry / 2 + 1)
        fleet.end(fleet.take()[host])
    assert fleet.see(found)["status"] == "success"


# -- latest wins -------------------------------------------------------------------------------------------------------


def test_a_newer_push_ends_what_an_older_one_has_not_begun(fleet):
    fleet.push(NEW)
    older = fleet.newest()
    running = fleet.take("web-01")["web-01"]
    fleet.push(NEWER)
    newer = fleet.newest()
    jobs, by = fleet.jobs(older, "status", "reason", "superseded_by"), fleet.jobs(newer, "id")
    assert jobs["web-01"] == ("running", None, None)
    assert jobs["web-02"] == ("cancelled", "superseded", by["web-02"][0])
    assert fleet.jobs(older, "error")["web-02"] == (f"by {newer['id']}",)
    fleet.end(running)
    ended = fleet.see(older)
    assert (ended["status"], ended["superseded_by"], ended["reason"]) == ("partial", newer["id"], f"superseded by {newer['id']}")
    assert sorted(fleet.run()) == list(HOSTS)


def test_a_push_to_another_branch_ends_nothing(fleet):
    fleet.push(NEW, "main")
    older = fleet.newest()
    fleet.push(NEWER, "release/1")
    assert set(fleet.jobs(older).values()) == {"pending"}


def test_a_persons_deployment_is_not_superseded_by_a_push(fleet):
    mine = fleet.deploy("main")["deployment"]
    fleet.push(NEWER)
    assert set(fleet.jobs(mine).values()) == {"pending"}


def test_an_older_push_that_comes_late_makes_nothing(fleet):
    fleet.push(NEWER, repository={"full_name": "myorg/web", "pushed_at": 20})
    answer = fleet.push(NEW, repository={"full_name": "myorg/web", "pushed_at": 10})
    assert (answer["jobs_created"], answer["message"]) == ([], "ignored: web: a newer push to main was taken before")


def test_a_host_that_was_away_gets_the_latest_alone(fleet):
    for commit in (OLD, NEW, NEWER):
        fleet.push(commit)
        for host in HOSTS[:3]:
            for job in fleet.take(host).values():
                fleet.end(job)
    assert [job["ref"] for job in [*fleet.take().values()]] == [NEWER]
    assert fleet.take() == {}


def test_a_push_while_a_rolling_one_is_under_way(fleet):
    fleet.app(strategy=ROLLING)
    fleet.push(NEW)
    older = fleet.newest()
    running = fleet.take()["web-01"]
    fleet.push(NEWER)
    assert fleet.see(older)["progress"] == {"held": 0, "pending": 0, "running": 1, "success": 0, "failed": 0, "cancelled": 3}
    assert fleet.take() == {}, "one job of an app runs on a host at a time"
    fleet.end(running)
    assert fleet.run() == list(HOSTS) and fleet.newest()["status"] == "success"


def hook(fleet, ref=NEW, branch="main"):
    return fleet.c.ok("POST", "/v1/hooks/web", {"ref": branch, "commit": ref})


def test_the_same_asked_for_again_ends_nothing_of_itself(fleet):
    """A CI that calls twice: what has run already is made anew, what waits stays where it is."""
    fleet.app(strategy=ROLLING)
    first = hook(fleet)["deployment"]
    fleet.end(fleet.take()["web-01"])
    again = hook(fleet)
    assert [job["host"] for job in again["jobs"]] == ["web-01"] and len(again["skipped"]) == 3
    assert fleet.see(first)["superseded_by"] is None
    assert sorted(fleet.run()) == list(HOSTS) and fleet.see(first)["status"] == "success"


def test_a_ci_that_goes_host_by_host_ends_nothing_of_itself(fleet):
    made = [fleet.c.ok("POST", "/v1/hooks/web", {"ref": "main", "commit": NEW, "hosts": [host]})["deployment"] for host in HOSTS]
    assert sorted(fleet.run()) == list(HOSTS) and {fleet.see(one)["status"] for one in made} == {"success"}


def test_of_a_host_that_is_the_apps_no_more_an_older_push_ends_too(fleet):
    fleet.push(NEW)
    older = fleet.newest()
    fleet.app(hosts=["web-01", "web-02"])
    fleet.push(NEWER)
    assert set(fleet.jobs(older).values()) == {"cancelled"}


def test_a_push_of_what_a_person_deploys_already_ends_the_older_one(fleet):
    fleet.push(NEW)
    older = fleet.newest()
    mine = fleet.deploy(NEWER)["deployment"]
    assert fleet.push(NEWER)["message"].endswith("the same deployment is under way")
    assert (fleet.see(older)["status"], fleet.see(older)["superseded_by"]) == ("cancelled", mine["id"])


# -- locks -------------------------------------------------------------------------------------------------------------


def lock(fleet, reason="incident 7", **more):
    return fleet.c.ok("PUT", "/v1/apps/web/lock", {"reason": reason, **more})["lock"]


def unlock(fleet):
    return fleet.c.ok("DELETE", "/v1/apps/web/lock")["deployments"]


def test_a_push_is_held_while_the_app_is_locked(fleet):
    told = lock(fleet)
    assert (told["app"], told["reason"], told["by"], told["until"]) == ("web", "incident 7", "local", None)
    answer = fleet.push(NEW)
    assert answer["message"] == "4 jobs for web, held: the app is locked"
    held = fleet.newest()
    assert (held["hold"], held["status"], held["progress"]["held"]) == ("lock", "pending", 4)
    assert set(fleet.jobs(held, "hold").values()) == {("lock",)} and fleet.take() == {}
    assert unlock(fleet) == [held["id"]]
    assert sorted(fleet.run()) == list(HOSTS) and fleet.see(held)["status"] == "success"


def test_of_pushes_to_a_locked_app_the_newest_is_kept(fleet):
    lock(fleet)
    for commit, branch in ((OLD, "main"), (NEW, "release/1"), (NEWER, "main")):
        fleet.push(commit, branch)
    statuses = [one["status"] for one in fleet.c.ok("GET", "/v1/deployments")["deployments"]]
    assert statuses == ["pending", "cancelled", "cancelled"]
    assert unlock(fleet) == [fleet.newest()["id"]]
    assert {job["ref"] for job in fleet.take().values()} == {NEWER}


def test_a_persons_deploy_is_refused_with_who_and_why(fleet):
    lock(fleet)
    status, detail = fleet.refused(app="web", ref="main")
    assert status == 409 and detail.startswith("web is locked by local since 20") and ": incident 7: unlock it" in detail
    job = {"repo": "myorg/web", "ref": "main", "host": "web-01"}
    assert fleet.c.call("POST", "/v1/jobs", job)[0] == 409
    assert fleet.c.call("POST", "/v1/jobs", {**job, "override": True})[0] == 201
    assert fleet.c.ok("GET", "/v1/audit")["audit"][0]["detail"].endswith(" on web-01, although it is locked")


def test_a_job_is_not_retried_while_the_app_is_locked(fleet):
    job = fleet.deploy(hosts=["web-01"])["jobs"][0]
    fleet.run("failed")
    lock(fleet)
    status, detail = fleet.refused(f"/v1/jobs/{job['id']}/retry")
    assert (status, detail.endswith("incident 7: unlock it first (ctl.py unlock --app web)")) == (409, True)
    unlock(fleet)
    assert fleet.c.ok("POST", f"/v1/jobs/{job['id']}/retry")["created"]


def test_a_job_is_not_tried_again_while_the_app_is_locked(fleet):
    fleet.deploy(hosts=["web-01"])
    job = fleet.take()["web-01"]
    fleet.end(job, "failed")
    lock(fleet)
    status, detail = fleet.refused(f"/v1/jobs/{job['id']}/retry")
    assert (status, detail.startswith("web is locked by local")) == (409, True) and fleet.take() == {}
    unlock(fleet)
    assert fleet.c.ok("POST", f"/v1/jobs/{job['id']}/retry")["created"]


def drafted(fleet, kind=deploybot.Kind.HOOK):
    """What makes a deployment that was drafted a moment ago."""
    deployments = fleet.c.daemon.deployments
    app = fleet.c.daemon.apps.named("web")
    plan = deploybot.Plan(app, kind, NEW, [(host, NEW) for host in HOSTS], branch="main")
    return deployments._maker(plan, deploybot.Principal("ci", deploybot.Scope.OPERATOR), "deployment.hook")


def test_one_that_was_drafted_before_the_lock_is_held(fleet):
    make = drafted(fleet)
    lock(fleet)
    made = fleet.c.daemon.store.write(make)
    assert (made.deployment.hold, made.deployment.held, fleet.take()) == ("lock", 4, {})
    assert set(fleet.jobs({"id": made.deployment.id}, "hold").values()) == {("lock",)}
    unlock(fleet)
    assert len(fleet.run()) == 4


def test_one_that_was_drafted_before_the_unlock_goes_on_and_ends_no_other_branch(fleet):
    lock(fleet)
    make = drafted(fleet)
    unlock(fleet)
    other = hook(fleet, OLD, "dev")["deployment"]
    assert fleet.c.daemon.store.write(make).deployment.pending == 4
    assert fleet.see(other)["status"] == "pending"


def test_override_does_not_wait_for_the_same_that_is_held(fleet):
    lock(fleet)
    fleet.push(NEW)
    job = {"repo": "myorg/web", "ref": NEW, "host": "web-04", "override": True}
    assert fleet.c.ok("POST", "/v1/jobs", job)["created"]
    assert fleet.deploy(NEW, override=True, hosts=["web-01", "web-02"])["created"]
    assert sorted(fleet.take()) == ["web-01", "web-02", "web-04"]


def test_override_passes_the_lock_and_is_audited(fleet):
    fleet.app(strategy={"type": "rolling", "batch": 2})
    lock(fleet)
    made = fleet.deploy(override=True)["deployment"]
    assert made["override"] and len(fleet.run()) == 4
    rows = fleet.c.ok("GET", "/v1/audit")["audit"]
    assert [row["action"] for row in rows][:2] == ["deployment.create", "app.lock"]
    assert rows[0]["detail"] == f"deploy of web {NEW} on 4 hosts, although it is locked"


def test_a_lock_keeps_back_what_no_host_has_taken(fleet):
    found = fleet.deploy()["deployment"]
    running = fleet.take("web-01")["web-01"]
    lock(fleet)
    assert fleet.take() == {}
    told = fleet.see(found)
    assert (told["hold"], told["progress"]["held"], told["progress"]["running"]) == ("lock", 3, 1)
    fleet.end(running)
    assert unlock(fleet) == [found["id"]]
    assert sorted(fleet.run()) == list(HOSTS[1:]) and fleet.see(found)["status"] == "success"


def test_a_lock_keeps_the_next_batch_back(fleet):
    fleet.app(strategy=ROLLING)
    found = fleet.deploy()["deployment"]
    running = fleet.take()["web-01"]
    lock(fleet)
    assert fleet.see(found)["hold"] == "lock"
    fleet.end(running)
    assert fleet.take() == {}
    unlock(fleet)
    assert fleet.see(found)["hold"] == "batch"
    assert fleet.run() == list(HOSTS[1:])


def test_what_a_lock_holds_does_not_expire(fleet):
    lock(fleet)
    fleet.push(NEW)
    fleet.c.passes(fleet.c.config.pending_expiry * 3)
    unlock(fleet)
    fleet.c.passes(fleet.c.config.pending_expiry - 1)
    assert len(fleet.take()) == 4, "its time counts from the unlock"


def test_a_lock_ends_by_itself(fleet):
    told = lock(fleet, **{"for": 7200})
    assert deploybot.unix_time(told["until"]) == fleet.c.clock.now() + 7200
    fleet.push(NEW)
    fleet.c.passes(7199)
    assert fleet.take() == {}
    fleet.c.passes(2)
    assert sorted(fleet.take()) == list(HOSTS)
    assert fleet.c.ok("GET", "/v1/audit")["audit"][0]["who"] == "controller"


def test_a_lock_that_is_over_takes_no_newer_one_with_it(fleet):
    lock(fleet, "short", **{"for": 60})
    fleet.c.clock.advance(61)
    deployments, unlock_it = fleet.c.daemon.deployments, fleet.c.daemon.deployments.unlock

    def unlock_late(*args):
        lock(fleet, "incident 8")  # comes between the look of the sweep and its transaction
        return unlock_it(*args)

    deployments.unlock = unlock_late
    deployments.sweep()
    assert fleet.c.ok("GET", "/v1/apps")["apps"][0]["lock"]["reason"] == "incident 8"


def test_a_lock_outlives_a_restart_and_is_shown(fleet):
    told = lock(fleet)
    fleet.push(NEW)
    fleet.c.restart()
    assert fleet.take() == {}
    assert fleet.c.ok("GET", "/v1/apps")["apps"][0]["lock"] == told
    assert lock(fleet, "another reason")["reason"] == "another reason"
    unlock(fleet)
    assert fleet.c.ok("GET", "/v1/apps")["apps"][0]["lock"] is None
    assert len(fleet.take()) == 4


def test_what_cannot_be_locked(fleet):
    assert fleet.refused("/v1/apps/wbe/lock", "PUT", reason="x") == (404, "apps.yaml has no app wbe; did you mean web?")
    for body, name in (
        ({}, "reason"),
        ({"reason": " "}, "reason"),
        ({"reason": "a\nb"}, "reason"),
        ({"reason": "x", "for": 0}, "for"),
    ):
        status, errors = fleet.refused("/v1/apps/web/lock", "PUT", **body)
        assert (status, [error["field"] for error in errors]) == (422, [name])
    assert fleet.c.call("DELETE", "/v1/apps/web/lock")[1]["detail"] == "web is not locked"
    unknown = fleet.c.call("DELETE", "/v1/apps/wbe/lock")[1]
    assert (unknown["status"], unknown["detail"]) == (404, "apps.yaml has no app wbe; did you mean web?")


def test_the_lock_of_an_app_that_left_apps_yaml_can_be_ended(fleet):
    fleet.c.ok("PUT", "/v1/apps/web/lock", {"reason": "x"})
    fleet.c.set_app(name="api", repo="myorg/api", hosts=["web-01"])
    assert fleet.c.ok("DELETE", "/v1/apps/web/lock")["unlocked"] is True
    assert fleet.c.call("DELETE", "/v1/apps/web/lock")[1]["detail"] == "apps.yaml has no app web"


# -- rollback ----------------------------------------------------------------------------------------------------------


def released(fleet, *commits):
    for commit in commits:
        fleet.deploy(commit)
        fleet.run()


def test_a_rollback_goes_to_the_success_before_and_locks(fleet):
    released(fleet, OLD, NEW)
    made = fleet.deploy(None, rollback=True)
    assert (made["deployment"]["kind"], made["deployment"]["ref"]) == ("rollback", OLD)
    jobs = fleet.take()
    assert {(job["ref"], job["spec"]["reuse"]) for job in jobs.values()} == {(OLD, True)}
    assert fleet.c.ok("GET", "/v1/apps")["apps"][0]["lock"]["reason"] == f"rolled back to {OLD[:12]}"
    for job in jobs.values():
        fleet.end(job)
    fleet.push(NEWER)
    assert fleet.newest()["hold"] == "lock"


def test_null_is_a_lock_that_was_left_out(fleet):
    released(fleet, OLD, NEW)
    assert fleet.deploy(None, rollback=True, lock=None)["created"]
    assert fleet.c.ok("GET", "/v1/apps")["apps"][0]["lock"]["reason"] == f"rolled back to {OLD[:12]}"
    assert fleet.refused(app="web", rollback=True, lock="no") == (422, [{"field": "lock", "message": "must be true or false"}])


def test_a_second_rollback_goes_further_back(fleet):
    released(fleet, OLD, NEW, NEWER)
    for expected in (NEW, OLD):
        made = fleet.deploy(None, rollback=True, lock=False)
        assert made["deployment"]["ref"] == expected
        fleet.run()
    status, detail = fleet.refused(app="web", rollback=True)
    assert (status, detail[:45]) == (409, "no host can go back: web-01: runs 11111111111")
    assert fleet.c.ok("GET", "/v1/apps")["apps"][0]["lock"] is None


def test_a_rollback_to_a_commit(fleet):
    released(fleet, OLD, NEW, NEWER)
    made = fleet.deploy(None, rollback=True, to=OLD[:8], hosts=["web-01"])
    assert ([job["host"] for job in made["jobs"]], made["deployment"]["ref"]) == (["web-01"], OLD)
    assert fleet.refused(app="web", rollback=True, to="9999999")[0] == 409
    assert fleet.deploy(None, rollback=True, to="9" * 40, hosts=["web-02"])["deployment"]["ref"] == "9" * 40, "it can be fetched"


def test_each_host_goes_back_to_its_own(fleet):
    released(fleet, OLD)
    fleet.deploy(NEW, hosts=["web-01"])
    fleet.run()
    fleet.deploy(NEWER, hosts=["web-01", "web-02"])
    fleet.run()
    made = fleet.deploy(None, rollback=True)
    assert {job["host"]: job["ref"] for job in made["jobs"]} == {"web-01": NEW, "web-02": OLD}
    assert made["skipped"] == [
        {"host": host, "reason": f"runs {OLD[:12]}; no release before that is known"} for host in ("web-03", "web-04")
    ]


def test_a_rollback_does_not_wait_for_the_same_that_is_held(fleet):
    released(fleet, OLD, NEW)
    lock(fleet)
    fleet.push(OLD)
    pushed = fleet.newest()
    assert fleet.deploy(None, rollback=True)["created"]
    assert fleet.see(pushed)["status"] == "cancelled" and len(fleet.take()) == 4


def test_a_rollback_is_the_same_as_a_whole_or_not_at_all(fleet):
    """A job that it would share could be ended with the rest of its deployment."""
    fleet.app(strategy=ROLLING)
    released(fleet, OLD, NEW)
    mine = fleet.deploy(OLD, hosts=["web-01", "web-02"])["deployment"]
    back = fleet.deploy(None, rollback=True)
    assert (len(back["jobs"]), back["skipped"], fleet.see(mine)["superseded_by"]) == (4, [], back["deployment"]["id"])
    assert fleet.run() == list(HOSTS)


def test_a_rollback_ends_what_waits_behind_the_same_that_runs(fleet):
    fleet.app(strategy=ROLLING)
    released(fleet, OLD, NEW)
    mine = fleet.deploy(OLD)["deployment"]
    running = fleet.take()["web-01"]
    back = fleet.deploy(None, rollback=True, hosts=["web-01", "web-02"])
    assert [one["host"] for one in back["skipped"]] == ["web-01"] and fleet.jobs(mine)["web-03"] == "cancelled"
    fleet.end(running)
    assert fleet.run() == ["web-02"]


def test_a_rollback_is_not_made_twice(fleet):
    fleet.app(strategy=ROLLING)
    released(fleet, OLD, NEW)
    back = fleet.deploy(None, rollback=True)["deployment"]
    again = fleet.deploy(None, rollback=True)
    assert (again["created"], again["deployment"]["id"]) == (False, back["id"]) and fleet.run() == list(HOSTS)


def test_a_rollback_ends_what_has_not_begun(fleet):
    released(fleet, OLD, NEW)
    bad = fleet.deploy(NEWER)["deployment"]
    fleet.end(fleet.take("web-01")["web-01"], "failed")
    back = fleet.deploy(None, rollback=True)["deployment"]
    assert fleet.see(bad)["superseded_by"] == back["id"] and set(fleet.jobs(bad).values()) == {"failed", "cancelled"}
    assert {job["ref"] for job in fleet.take().values()} == {OLD}


def back_in_part(fleet):
    """A rollback to NEW, after NEWER, that fails on web-01: (it, the job that failed)."""
    released(fleet, OLD, NEW, NEWER)
    back = fleet.deploy(None, rollback=True)["deployment"]
    jobs = fleet.take()
    for host, job in jobs.items():
        fleet.end(job, "failed" if host == "web-01" else "success")
    return back, jobs["web-01"]


def test_a_job_of_a_rollback_is_tried_again_although_that_has_locked(fleet):
    _, failed = back_in_part(fleet)
    assert fleet.c.ok("POST", f"/v1/jobs/{failed['id']}/retry")["created"]
    assert fleet.take()["web-01"]["spec"]["reuse"]


@pytest.mark.parametrize("path", ["deployments", "jobs"])
def test_a_rollback_that_was_tried_again_is_one(fleet, path):
    back, failed = back_in_part(fleet)
    fleet.c.ok("POST", f"/v1/{path}/{(back if path == 'deployments' else failed)['id']}/retry")
    job = fleet.take()["web-01"]
    assert (job["ref"], job["spec"]["reuse"]) == (NEW, True)
    fleet.end(job)
    again = fleet.deploy(None, rollback=True)
    assert {job["host"]: job["ref"] for job in again["jobs"]} == dict.fromkeys(HOSTS, OLD), "not forward to NEWER"


def test_a_rollback_passes_the_lock_that_is_there(fleet):
    released(fleet, OLD, NEW)
    lock(fleet, "mine")
    fleet.deploy(None, rollback=True)
    assert len(fleet.run()) == 4
    assert fleet.c.ok("GET", "/v1/apps")["apps"][0]["lock"]["reason"] == "mine"


# -- dry run, targets, drift -------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be(fleet):
    fleet.app(strategy={"type": "rolling", "batch": 2, "canary": "web-02", "pause": 60}, activate="systemctl restart web")
    told = fleet.deploy("main", (200,), dry_run=True)
    plan = told["plan"]
    assert [(step["hosts"], step["waits"]) for step in plan["steps"]] == [
        (["web-02"], None), (["web-01", "web-03"], "pause"), (["web-04"], "success")
    ]  # fmt: skip
    assert (plan["activate"], plan["kind"], plan["lock"], told["skipped"]) == ("systemctl restart web", "deploy", None, [])
    assert fleet.c.ok("GET", "/v1/jobs")["jobs"] == [] and fleet.c.ok("GET", "/v1/deployments")["deployments"] == []
    assert fleet.refused(app="web", rollback=True, dry_run=True)[0] == 409


def test_a_dry_run_of_a_rollback_says_where_each_host_goes(fleet):
    released(fleet, OLD)
    fleet.deploy(NEW, hosts=["web-01"])
    fleet.run()
    fleet.deploy(NEWER, hosts=["web-01", "web-02"])
    fleet.run()
    told = fleet.deploy(None, (200,), rollback=True, dry_run=True)
    assert [step["refs"] for step in told["plan"]["steps"]] == [{"web-01": NEW, "web-02": OLD}]
    assert told["plan"]["runs"] == {"web-01": NEWER, "web-02": NEWER}
    assert [one["host"] for one in told["skipped"]] == ["web-03", "web-04"]


def test_labels_are_resolved_when_the_deployment_is_made(fleet):
    fleet.app(hosts=["web-01", "role=edge"])
    assert fleet.deploy("a")["deployment"]["hosts"] == 1
    fleet.c.register("edge-1", capabilities={"labels": {"role": "edge", "dc": "a"}})
    fleet.c.register("edge-2", capabilities={"labels": {"role": "core"}})
    assert [job["host"] for job in fleet.deploy("b")["jobs"]] == ["edge-1", "web-01"]
    assert [host["hostname"] for host in fleet.c.ok("GET", "/v1/apps")["apps"][0]["hosts"]] == ["edge-1", "web-01"]
    fleet.c.restart()
    assert [job["host"] for job in fleet.deploy("c")["jobs"]] == ["edge-1", "web-01"]
    fleet.app(hosts=["role=gone"])
    message = "no agent has a label of web: it has no hosts now"
    assert fleet.refused(app="web", ref="d") == (422, [{"field": "app", "message": message}])


def test_labels_that_make_no_sense_are_none(fleet):
    fleet.app(hosts=["web-01", "role=edge"])
    for labels in (["role=edge"], "role=edge", 7, {"role": ["edge"]}, None):
        fleet.c.register("edge-1", capabilities={"labels": labels})
    assert fleet.deploy("b")["deployment"]["hosts"] == 1


def test_wanted_and_actual_of_each_host(fleet):
    released(fleet, OLD)
    fleet.c.beat(fleet.agents["web-01"], current={"web": OLD, "other": NEW})
    fleet.c.beat(fleet.agents["web-02"], current={"web": NEWER, "Bad name": NEW, "x": "main", "y": 7})
    fleet.deploy(NEW, hosts=["web-01"])

    def shown():
        return {host["hostname"]: (host["wanted"], host["actual"]) for host in fleet.c.ok("GET", "/v1/apps")["apps"][0]["hosts"]}

    seen = shown()
    assert (seen["web-01"], seen["web-02"], seen["web-03"]) == ((NEW, OLD), (OLD, NEWER), (OLD, None))
    fleet.c.restart()
    assert shown() == seen


def test_what_a_host_runs_is_written_when_it_changes(fleet):
    writes, write = [], fleet.c.daemon.store.write
    fleet.c.daemon.store.write = lambda *args, **more: writes.append(args) or write(*args, **more)
    for commit in (OLD, OLD, OLD, NEW):
        fleet.c.beat(fleet.agents["web-01"], current={"web": commit})
    assert len(writes) == 2


# -- hooks, deliveries -------------------------------------------------------------------------------------------------


def test_a_ci_deploys_by_a_hook(fleet):
    answer = fleet.c.ok("POST", "/v1/hooks/web", {"ref": "main", "commit": NEW, "message": "Built", "pusher": "ci"})
    found = answer["deployment"]
    assert (found["kind"], found["ref"], found["branch"]) == ("hook", NEW, "main")
    assert answer["jobs"][0]["metadata"]["commit_message"] == "Built"
    fleet.c.ok("POST", "/v1/hooks/web", {"ref": "main", "commit": NEWER})
    assert fleet.see(found)["status"] == "cancelled", "latest wins"
    lock(fleet)
    assert fleet.c.ok("POST", "/v1/hooks/web", {"ref": "other"})["deployment"]["hold"] == "lock"


def test_the_token_of_one_app_deploys_that_alone(make_controller):
    closed = make_controller("closed", open=False, token="t" * 32)
    closed.token = "t" * 32
    apps = [{"name": name, "repo": f"o/{name}", "hosts": ["web-01"]} for name in ("web", "api")]
    closed.apps_file.write_text(json.dumps({"apps": apps}))
    closed.ok("POST", "/v1/reload")
    secret = closed.ok("POST", "/v1/tokens", {"name": "ci", "role": "operator", "app": "web"})["secret"]
    ci = closed.acting(secret)
    assert ci.ok("POST", "/v1/hooks/web", {"ref": "main"})["created"]
    assert ci.ok("POST", "/v1/deployments", {"app": "web", "ref": "next"})["created"]
    mine = ci.ok("GET", "/v1/deployments")["deployments"]
    other = closed.ok("POST", "/v1/deployments", {"app": "api", "ref": "main"})["deployment"]
    assert len(mine) == 2 == len(ci.ok("GET", "/v1/deployments")["deployments"])
    for method, path, body in (
        ("POST", "/v1/hooks/api", {"ref": "main"}),
        ("POST", "/v1/hooks/apj", {"ref": "main"}),
        ("POST", "/v1/deployments", {"app": "apj", "ref": "main"}),
        ("PUT", "/v1/apps/apj/lock", {"reason": "x"}),
        ("POST", "/v1/deployments", {"app": "api", "ref": "main"}),
        ("POST", "/v1/deployments", {"app": "api", "ref": "main", "dry_run": True}),
        ("GET", f"/v1/deployments/{other['id']}", None),
        ("POST", f"/v1/deployments/{other['id']}/cancel", None),
        ("POST", f"/v1/deployments/{other['id']}/retry", None),
        ("PUT", "/v1/apps/api/lock", {"reason": "x"}),
        ("DELETE", "/v1/apps/api/lock", None),
        ("GET", "/v1/deliveries", None),
    ):
        assert ci.call(method, path, body)[0] == 403, (method, path)
    for method, path, body in (  # nor is it told of another by what it looks like
        ("POST", "/v1/hooks/apii", {"ref": "main"}),
        ("POST", "/v1/deployments", {"app": "apii", "ref": "main"}),
        ("PUT", "/v1/apps/apii/lock", {"reason": "x"}),
        ("DELETE", "/v1/apps/apii/lock", None),
    ):
        status, answer = ci.call(method, path, body)
        assert (status, answer["detail"]) == (403, "this token is for the app web alone"), (method, path)


def test_every_push_is_kept_with_what_became_of_it(fleet):
    fleet.push(NEW)
    deliver(fleet.c, payload(repository={"full_name": "else/where"}), X_GitHub_Delivery="guid-2")
    newest, older = fleet.c.ok("GET", "/v1/deliveries")["deliveries"]
    assert (newest["id"], [one["rule"] for one in newest["outcomes"]], newest["outcomes"][0]["app"]) == ("guid-2", ["no_app"], None)
    assert (older["repo"], older["commit"], older["ref"], older["pusher"]) == ("myorg/web", NEW, "refs/heads/main", "octocat")
    (outcome,) = older["outcomes"]
    assert (outcome["app"], outcome["rule"], outcome["deployment_id"]) == ("web", "deployed", fleet.newest()["id"])
    assert fleet.newest()["delivery_id"] == older["id"]
    assert fleet.c.ok("GET", f"/v1/deliveries/{older['id']}")["delivery"] == older
    assert fleet.c.ok("GET", "/v1/deliveries?repo=Else/Where&limit=1") == {"deliveries": [newest], "next": None}
    page = fleet.c.ok("GET", "/v1/deliveries?limit=1")
    assert fleet.c.ok("GET", f"/v1/deliveries?before={page['next']}")["deliveries"] == [older]
    assert fleet.c.call("GET", "/v1/deliveries/none")[0] == 404


@pytest.mark.parametrize("guid", ["a b", "a/b", "a?b=c", "%61", "\u00e9", "x" * 101, "", None])
def test_a_delivery_has_an_id_that_a_path_can_name(fleet, guid):
    body = payload()
    deliver(fleet.c, body, X_GitHub_Delivery=guid)
    (delivery,) = fleet.c.ok("GET", "/v1/deliveries")["deliveries"]
    assert delivery["id"] == deploybot.signature_of(SECRET, json.dumps(body).encode())[7:47] == fleet.newest()["delivery_id"]
    assert fleet.c.ok("GET", f"/v1/deliveries/{delivery['id']}")["delivery"] == delivery
    assert fleet.c.ok("GET", f"/v1/deliveries?before={delivery['id']}")["deliveries"] == []


def test_the_rule_of_each_push(fleet):
    def rule(**more):
        deliver(fleet.c, payload(**more), X_GitHub_Delivery="-".join(map(str, more.values()))[:60] or "first")
        return fleet.c.ok("GET", "/v1/deliveries?limit=1")["deliveries"][0]["outcomes"][0]["rule"]

    fleet.app()
    assert rule() == "deployed"
    assert rule(after="0" * 40, deleted=True) == "deleted"
    lock(fleet)
    assert rule(after=NEWER) == "locked"
    unlock(fleet)
    fleet.app(hosts=["role=gone"])
    assert rule(after="4" * 40) == "no_host"
    fleet.c.set_app(name="web", repo="myorg/web", hosts=["web-01"])
    assert rule(after="5" * 40) == "not_on_push"


def test_a_push_that_made_nothing_counts_once_apps_yaml_says_more(fleet):
    fleet.c.set_app(name="web", repo="myorg/web", hosts=["web-01"])
    assert fleet.push(NEW)["jobs_created"] == []
    fleet.app()
    assert len(fleet.push(NEW)["jobs_created"]) == 4
    assert fleet.push(NEW)["message"].startswith("taken before")
    assert len(fleet.c.ok("GET", "/v1/deliveries")["deliveries"]) == 1


# -- what holds whatever happens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", ["BEGIN", "UPDATE deployments", "COMMIT"])
def test_a_database_that_fails_changes_nothing(fleet, statement):
    fleet.app(strategy=ROLLING)
    found = fleet.deploy()["deployment"]
    (job,) = fleet.take().values()
    before = fleet.see(found), fleet.jobs(found, "status", "hold")
    with failing_at(fleet.c.daemon.store, statement):
        body = {"attempt": 1, "status": "failed", "reason": "exit_code"}
        assert fleet.c.call("POST", f"/v1/jobs/{job['id']}/result", body)[0] == 503
    assert (fleet.see(found), fleet.jobs(found, "status", "hold")) == before
    fleet.end(job, "failed")
    assert fleet.see(found)["status"] == "failed"


def test_the_counts_are_those_of_the_jobs(fleet):
    """After all of the above that a deployment can meet, on one app."""
    fleet.app(strategy={"type": "rolling", "batch": 2, "canary": "web-02", "pause": 10, "max_failures": 1}, retries=1)
    fleet.push(NEW)
    fleet.end(fleet.take()["web-02"])
    lock(fleet)
    fleet.c.passes(11)
    fleet.push(NEWER)
    unlock(fleet)
    fleet.end(fleet.take()["web-02"], "failed", rolled_back_to=NEW)
    fleet.c.passes(11)
    fleet.take()
    fleet.c.passes(fleet.c.config.lost_after + 1)
    for found in fleet.c.ok("GET", "/v1/deployments")["deployments"]:
        jobs = fleet.c.ok("GET", f"/v1/jobs?deployment_id={found['id']}")["jobs"]
        places = [("held" if job["hold"] and job["status"] == "pending" else job["status"]) for job in jobs]
        assert found["progress"] == {name: places.count(name) for name in found["progress"]}


def test_a_restored_backup_cancels_what_waited(fleet, tmp_path):
    fleet.app(strategy=ROLLING)
    found = fleet.deploy()["deployment"]
    deploybot.copy_database(fleet.c.config.db, tmp_path / "copy.db")
    fleet.c.stop()
    for end in ("", "-wal", "-shm"):
        fleet.c.config.db.with_name(fleet.c.config.db.name + end).unlink(missing_ok=True)
    (tmp_path / "copy.db").rename(fleet.c.config.db)
    fleet.c.restart()
    assert fleet.see(found)["status"] == "cancelled" and set(fleet.jobs(found).values()) == {"cancelled"}


def test_retention_removes_a_deployment_after_its_jobs(fleet):
    old = fleet.deploy(OLD)["deployment"]
    fleet.run()
    mid = fleet.deploy(NEW)["deployment"]
    fleet.run()
    fleet.c.clock.advance(fleet.c.config.retention_days * 86400 + 10)
    released(fleet, NEWER, "4" * 40)
    fleet.c.jobs._retention_due = 0
    fleet.c.jobs.sweep()
    assert fleet.c.call("GET", f"/v1/deployments/{old['id']}")[0] == fleet.c.call("GET", f"/v1/deployments/{mid['id']}")[0] == 404
    with fleet.c.daemon.store.read() as db:
        left = {row[0] for row in db.rows("SELECT DISTINCT job_id FROM events WHERE kind = 'deployment'")}
    assert left == {one["id"] for one in fleet.c.ok("GET", "/v1/deployments")["deployments"]} and len(left) == 2
