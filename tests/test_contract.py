"""The API as a transcript: send this, expect that. One part for each of the seven calls that all began with, then bad input."""

import json
import re
import uuid

import pytest
from conftest import SECRET, TOKENS

import deploybot

PUSH = {
    "ref": "refs/heads/main",
    "before": "b" * 40,
    "after": "a" * 40,
    "deleted": False,
    "repository": {"full_name": "myorg/app", "default_branch": "main"},
    "head_commit": {"id": "a" * 40, "message": "Fix the fix"},
    "pusher": {"name": "ada"},
}
APP = {"name": "app", "repo": "myorg/app", "hosts": ["web-01", "web-02"], "deploy_on_push": True, "branches": ["main"]}
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
JOB_FIELDS = set(
    [
        "id",
        "repo",
        "ref",
        "host",
        "app",
        "status",
        "reason",
        "hold",
        "metadata",
        "attempt",
        "retries",
        "timeout",
        "created_at",
        "created_by",
        "started_at",
        "completed_at",
        "cancel_requested_at",
        "assigned_agent",
        "exit_code",
        "error",
        "commit",
        "rolled_back_to",
        "superseded_by",
        "retry_of",
        "deployment_id",
    ]
)


def push(controller, delivery, event="push", secret=SECRET, signature=None, **changes):
    body = json.dumps({**PUSH, **changes}).encode()
    signed = deploybot.signature_of(secret, body) if signature is None else signature
    headers = {"X-GitHub-Event": event, "X-GitHub-Delivery": delivery, "X-Hub-Signature-256": signed}
    return controller.call("POST", "/v1/webhooks/github", body, headers)


def wrong_fields(answer):
    assert answer["type"] == "about:blank" and answer["title"] and answer["detail"]
    return sorted(error["field"] for error in answer["errors"])


# The seven


def test_registration_and_heartbeat(controller):
    status, agent = controller.call("POST", "/v1/agents/register", {"hostname": "Test-Host", "capabilities": {"os": "linux"}})
    assert status == 200
    assert (agent["hostname"], agent["capabilities"], agent["slots"]) == ("test-host", {"os": "linux"}, 1)
    assert agent["status"] == "online" and agent["session"]
    assert STAMP.fullmatch(agent["registered_at"]) and STAMP.fullmatch(agent["last_heartbeat"])

    status, answer = controller.call("POST", f"/v1/agents/{agent['id']}/heartbeat", {"status": "online"})
    assert (status, answer) == (200, {"acknowledged": True, "job": None, "cancel": [], "interval": 5})

    again = controller.register("test-host")
    assert again["id"] == agent["id"] and again["session"] != agent["session"]
    assert controller.call("POST", f"/v1/agents/{uuid.uuid4()}/heartbeat", {"status": "online"})[0] == 404


def test_creation_and_retrieval(controller):
    asked = {"repo": "myorg/app", "ref": "main", "host": "test-host", "metadata": {"why": "tea ☕"}, "timeout": 60}
    status, made = controller.call("POST", "/v1/jobs", asked)
    assert status == 201 and made["created"] is True
    job = made["job"]
    assert set(job) == JOB_FIELDS, "neither `spec` nor `session` is for readers"
    assert job["status"] == "pending" and job["app"] == "myorg--app" and job["attempt"] == 0 and job["timeout"] == 60
    assert job["metadata"] == {"why": "tea ☕"} and STAMP.fullmatch(job["created_at"])
    assert uuid.UUID(job["id"]).version == 7

    assert controller.call("GET", f"/v1/jobs/{job['id']}") == (200, {"job": job})
    assert controller.call("GET", "/v1/jobs") == (200, {"jobs": [job], "next": None})


def test_a_job_on_heartbeat(controller):
    agent, made = controller.register("test-host"), controller.create(host="test-host")
    job = controller.beat(agent)["job"]
    assert job["id"] == made["id"] and (job["status"], job["attempt"]) == ("running", 1)
    assert job["spec"] == {
        "clone_url": "https://github.com/myorg/app.git", "build": None, "activate": None, "deploy": None,
        "env": {}, "shared": [], "keep_releases": 5, "health_check": None, "rollback_on_failure": True,
    }  # fmt: skip
    assert job["assigned_agent"] == agent["id"] and STAMP.fullmatch(job["started_at"])
    assert controller.beat(agent)["job"] is None, "it was given out already"

    assert controller.logs(job, "cloning", "done") == {"next_offset": 2, "cancel": False}
    status, answer = controller.call(
        "POST",
        f"/v1/jobs/{job['id']}/result",
        {"attempt": 1, "status": "failed", "exit_code": 3, "error": "make failed", "commit": "c" * 40},
    )
    assert status == 200
    ended = answer["job"]
    assert (ended["status"], ended["reason"], ended["exit_code"]) == ("failed", "exit_code", 3)
    assert (ended["error"], ended["commit"]) == ("make failed", "c" * 40) and ended["completed_at"]
    assert controller.job(job["id"]) == ended


def test_idempotency(controller):
    first = controller.create()
    for same in ({}, {"repo": "MyOrg/App"}, {"host": "WEB-01"}):
        status, answer = controller.call("POST", "/v1/jobs", {"repo": "myorg/app", "ref": "main", "host": "web-01", **same})
        assert (status, answer["created"], answer["job"]["id"]) == (201, False, first["id"])
    for other in ({"ref": "dev"}, {"host": "web-02"}, {"repo": "myorg/other"}, {"app": "mine"}, {"force": True}):
        assert controller.create(**other)["id"] != first["id"]


def test_a_push_makes_the_jobs_of_both_hosts(controller):
    controller.set_app(**APP)
    status, answer = push(controller, "d-1")
    assert status == 200 and answer["received"] is True and len(answer["jobs_created"]) == 2
    jobs = [controller.job(job_id) for job_id in answer["jobs_created"]]
    assert [job["host"] for job in jobs] == ["web-01", "web-02"]
    for job in jobs:
        assert (job["repo"], job["ref"], job["app"], job["status"]) == ("myorg/app", "a" * 40, "app", "pending")
        expected = {"app": "app", "branch": "main", "commit_message": "Fix the fix", "trigger": "github_webhook"}
        assert expected.items() <= job["metadata"].items()

    assert push(controller, "d-1")[1]["jobs_created"] == answer["jobs_created"], "redelivered: the same answer"
    assert len(controller.ok("GET", "/v1/jobs")["jobs"]) == 2
    assert push(controller, "d-2", event="ping")[1] == {"received": True, "jobs_created": [], "message": "pong"}
    for delivery, change in (
        ("d-3", {"deleted": True, "after": "0" * 40}),
        ("d-4", {"ref": "refs/heads/dev"}),
        ("d-5", {"ref": "refs/tags/v1"}),
        ("d-6", {"repository": {"full_name": "myorg/unknown"}}),
    ):
        status, answer = push(controller, delivery, **change)
        assert (status, answer["jobs_created"]) == (200, []) and answer["message"].startswith("ignored"), change


def test_the_same_signed_body_under_another_delivery_deploys_once(controller):
    """trust.md 16: the id is not signed."""
    controller.set_app(**{**APP, "hosts": ["web-01"]})
    agent = controller.register("web-01")
    first = push(controller, "d-1")[1]["jobs_created"]
    controller.end(controller.beat(agent)["job"])
    assert push(controller, "d-2")[1]["jobs_created"] in ([], first)
    assert len(controller.ok("GET", "/v1/jobs")["jobs"]) == 1


def test_list_hosts(controller):
    agent = controller.register("web-01", capabilities={"os": "linux"}, slots=2)
    controller.create()
    controller.beat(agent)
    controller.create(ref="dev")
    controller.create(host="nobody")
    status, answer = controller.call("GET", "/v1/hosts")
    assert status == 200
    nobody, web = answer["hosts"]
    assert STAMP.fullmatch(web.pop("last_seen"))
    assert web == {
        "hostname": "web-01", "agent_id": agent["id"], "agent_status": "online", "capabilities": {"os": "linux"},
        "agent_version": None, "behind": False, "slots": 2, "drained": False, "running": 1, "pending": 1,
    }  # fmt: skip
    assert (nobody["hostname"], nobody["agent_id"], nobody["agent_status"]) == ("nobody", None, "unknown")
    assert (nobody["last_seen"], nobody["running"], nobody["pending"]) == (None, 0, 1)

    controller.ok("POST", f"/v1/agents/{agent['id']}/heartbeat", {"status": "offline"})
    assert controller.ok("GET", "/v1/hosts")["hosts"][1]["agent_status"] == "offline"


def pages(controller, path, name, limit):
    """What `path` lists, page by page."""
    found, after = [], ""
    while True:
        page = controller.ok("GET", f"{path}?limit={limit}{after}")
        assert page[name] not in found or not page[name], "a page comes once"
        found.append(page[name])
        if page["next"] is None:
            return found
        after = f"&after={page['next']}"


def names_in(controller, limit):
    return [[host["hostname"] for host in page] for page in pages(controller, "/v1/hosts", "hosts", limit)]


def test_pages_of_hosts(controller):
    for name in ("web-03", "web-01", "a.b", "web-02"):
        controller.register(name)
    controller.create(host="b-without-agent")
    known = ["a.b", "b-without-agent", "web-01", "web-02", "web-03"]
    for limit in (1, 2, 4, 5, 1000):
        assert names_in(controller, limit) == [known[at : at + limit] for at in range(0, 5, limit)], limit
    assert controller.ok("GET", "/v1/hosts?after=WEB-0")["hosts"][0]["hostname"] == "web-01", "after a host that is none"
    assert controller.ok("GET", "/v1/hosts?after=web-03") == {"hosts": [], "next": None}
    for wrong in ("limit=0", "limit=1001", "limit=x", "after=-", "before=web-01"):
        assert controller.call("GET", f"/v1/hosts?{wrong}")[0] == 422, wrong


def test_the_list_of_hosts_follows_each_change(controller):
    """Asked for after each, as the order is kept between two pages."""
    assert names_in(controller, 10) == [[]]
    job = controller.create(host="web-01")
    assert names_in(controller, 10) == [["web-01"]], "a job names it"
    controller.register("db-01")
    assert names_in(controller, 10) == [["db-01", "web-01"]], "it has an agent"
    controller.ok("POST", f"/v1/jobs/{job['id']}/cancel")
    assert names_in(controller, 10) == [["db-01"]], "its last job has ended"
    job = controller.create(host="db-01")
    controller.ok("DELETE", "/v1/hosts/db-01")
    assert names_in(controller, 10) == [["db-01"]], "without an agent, but a job waits"
    controller.ok("POST", f"/v1/jobs/{job['id']}/cancel")
    assert names_in(controller, 10) == [[]]
    controller.register("web-02")
    assert names_in(controller, 10) == [["web-02"]]
    controller.ok("DELETE", "/v1/hosts/web-02")
    assert names_in(controller, 10) == [[]], "nothing names it any more"


def test_a_wrong_signature_is_refused(controller, make_controller):
    controller.set_app(**APP)
    for signature in ("", "sha256=", "sha256=" + "0" * 64, "sha1=" + "0" * 40, "sha256=ümlaut", "x" * 4000):
        status, answer = push(controller, "d", signature=signature.encode("latin-1").decode("latin-1"))
        assert status == 401 and answer["status"] == 401, signature
    assert push(controller, "d", secret="another")[0] == 401
    assert controller.ok("GET", "/v1/jobs")["jobs"] == []
    without = make_controller("no-secret")
    assert push(without, "d", secret="")[0] == 401, "with no secret set nothing is taken"


# Bad input


def test_every_wrong_field_at_once(controller):
    status, answer = controller.call(
        "POST",
        "/v1/jobs",
        {"repo": "no-slash", "ref": "--upload-pack=x", "host": "a_b", "app": "UP", "timeout": True, "retries": -1,
         "force": "yes", "override": 1, "metadata": [], "reff": 1},
    )  # fmt: skip
    assert status == 422
    fields = ["app", "force", "host", "metadata", "override", "ref", "reff", "repo", "retries", "timeout"]
    assert wrong_fields(answer) == fields
    assert "did you mean ref" in next(error["message"] for error in answer["errors"] if error["field"] == "reff")
    assert wrong_fields(controller.call("POST", "/v1/jobs", {})[1]) == ["host", "ref", "repo"]
    assert wrong_fields(controller.call("POST", "/v1/jobs", [])[1]) == ["body"]

    bad = {"hostname": "-x", "slots": 0, "capabilities": 1, "token_sha256": "F" * 64}
    assert wrong_fields(controller.call("POST", "/v1/agents/register", bad)[1]) == sorted(bad)
    agent = controller.register()
    bad = {"status": "up", "session": "!", "running": [{"job_id": "x", "attempt": 0}], "wait": 26, "current": []}
    assert wrong_fields(controller.call("POST", f"/v1/agents/{agent['id']}/heartbeat", bad)[1]) == [
        "current", "running[0].attempt", "running[0].job_id", "session", "status", "wait",
    ]  # fmt: skip
    job = controller.create()
    bad = {"attempt": "1", "offset": -1, "lines": [{"message": 1, "level": "loud", "timestamp": "noon"}], "commit": "x"}
    assert wrong_fields(controller.call("POST", f"/v1/jobs/{job['id']}/logs", bad)[1]) == [
        "attempt", "commit", "lines[0].level", "lines[0].message", "lines[0].timestamp", "offset",
    ]  # fmt: skip
    bad = {"status": "done", "exit_code": 1 << 40, "error": 5, "reason": "because", "commit": "x", "rolled_back_to": 1}
    fields = sorted([*bad, "attempt"])
    assert wrong_fields(controller.call("POST", f"/v1/jobs/{job['id']}/result", bad)[1]) == fields
    query = "status=done&host=_&app=UP&repo=x&id=xyz&before=1&limit=0&deployment_id=1&nonsense=1"
    assert len(wrong_fields(controller.call("GET", f"/v1/jobs?{query}")[1])) == 9
    query = "status=done&app=UP&id=xyz&before=1&limit=0&nonsense=1"
    assert len(wrong_fields(controller.call("GET", f"/v1/deployments?{query}")[1])) == 6
    assert wrong_fields(controller.call("GET", "/v1/deliveries?repo=x&before=%20&limit=0&nonsense=1")[1]) == [
        "before", "limit", "nonsense", "repo",
    ]  # fmt: skip
    bad = {"app": "UP", "ref": "-x", "hosts": "web-01", "to": "main"}
    bad |= dict.fromkeys(("rollback", "lock", "override", "force", "dry_run", "metadata"), 1)
    assert wrong_fields(controller.call("POST", "/v1/deployments", {**bad, "x": 1})[1]) == sorted([*bad, "x"])
    bad = {"ref": "-x", "commit": "main", "message": 1, "pusher": 1, "hosts": [], "x": 1}
    assert wrong_fields(controller.call("POST", "/v1/hooks/web", bad)[1]) == sorted(bad)
    bad = {"reason": "a\nb", "for": 0, "x": 1}
    assert wrong_fields(controller.call("PUT", "/v1/apps/web/lock", bad)[1]) == sorted(bad)
    status, answer = controller.call("GET", "/v1/logs/stream?tail=1001&job_id=1")
    assert (status, wrong_fields(answer)) == (422, ["job_id", "tail"])


@pytest.mark.parametrize("body", [
    b"", b"{", b"\xff", b'{"a":1,"a":2}', b'{"timeout":NaN}', b'{"timeout":Infinity}', b'{"timeout":9223372036854775808}',
    b'{"timeout":' + b"9" * 5000 + b"}", b'{"ref":"\\ud800"}', b"[" * 1000, b'{"timeout":1e999}', b"{} {}",
    b"\xef\xbb\xbf{}",
])  # fmt: skip
def test_what_cannot_be_parsed_is_400(controller, body):
    status, headers, data = controller.raw("POST", "/v1/jobs", body)
    assert (status, headers["Content-Type"]) == (400, "application/problem+json")
    assert json.loads(data)["status"] == 400


def test_unknown_things_are_404(controller):
    unknown = uuid.uuid4()
    for method, path, body in (
        ("GET", f"/v1/jobs/{unknown}", None),
        ("GET", "/v1/jobs/short", None),
        ("POST", f"/v1/jobs/{unknown}/cancel", None),
        ("POST", f"/v1/jobs/{unknown}/retry", None),
        ("GET", f"/v1/jobs/{unknown}/logs", None),
        ("POST", f"/v1/jobs/{unknown}/logs", {"attempt": 1, "offset": 0, "lines": []}),
        ("POST", f"/v1/jobs/{unknown}/result", {"attempt": 1, "status": "success"}),
        ("GET", f"/v1/logs/stream?job_id={unknown}", None),
        ("POST", "/v1/deployments", {"app": "web", "ref": "main"}),
        ("GET", f"/v1/deployments/{unknown}", None),
        ("GET", "/v1/deployments/short", None),
        ("POST", f"/v1/deployments/{unknown}/cancel", None),
        ("POST", f"/v1/deployments/{unknown}/retry", None),
        ("POST", "/v1/hooks/web", {"ref": "main"}),
        ("PUT", "/v1/apps/web/lock", {"reason": "x"}),
        ("DELETE", "/v1/apps/web/lock", None),
        ("GET", "/v1/deliveries/none", None),
        ("POST", "/v1/hosts/nobody/drain", None),
        ("POST", "/v1/hosts/nobody/resume", None),
        ("DELETE", "/v1/hosts/nobody", None),
        ("GET", "/v1", None),
        ("GET", "/v1/jobs/", None),
        ("GET", "//health", None),
    ):
        status, answer = controller.call(method, path, body)
        assert (status, answer["status"]) == (404, 404), (method, path)


def test_a_wrong_state_is_409_in_words(controller):
    agent = controller.register()
    job = controller.create()
    status, answer = controller.call("POST", f"/v1/jobs/{job['id']}/retry")
    assert status == 409 and "pending" in answer["detail"]
    job = controller.beat(agent)["job"]
    status, answer = controller.call("POST", f"/v1/jobs/{job['id']}/retry")
    assert status == 409 and "running (attempt 1)" in answer["detail"]
    status, answer = controller.call("DELETE", "/v1/hosts/web-01")
    assert status == 409 and "runs a job" in answer["detail"]
    controller.end(job, "failed", exit_code=7)
    for call, body in (("cancel", None), ("logs", {"attempt": 1, "offset": 0, "lines": [{"message": "late"}]})):
        status, answer = controller.call("POST", f"/v1/jobs/{job['id']}/{call}", body)
        assert status == 409 and "failed (exit_code 7)" in answer["detail"], call
        assert "next_offset" not in answer
    assert controller.call("POST", f"/v1/jobs/{job['id']}/result", {"attempt": 1, "status": "success"})[0] == 409


def test_413_and_405(controller):
    status, headers, data = controller.raw("POST", "/v1/jobs", b"x" * (deploybot.MAX_BODY + 1))
    assert (status, headers["Connection"]) == (413, "close") and json.loads(data)["status"] == 413
    assert controller.call("POST", "/v1/jobs", b" " * deploybot.MAX_BODY)[0] == 400, "the limit itself is taken"
    for method, path, allowed in (
        ("DELETE", "/v1/jobs", {"GET", "HEAD", "POST"}),
        ("GET", "/v1/agents/register", {"POST"}),
        ("BREW", "/health", {"GET", "HEAD"}),
        ("OPTIONS", "/v1/hosts/web-01", {"DELETE"}),
        ("GET", "/v1/apps/web/lock", {"DELETE", "PUT"}),
        ("PUT", "/v1/deployments", {"GET", "HEAD", "POST"}),
        ("POST", "/v1/deliveries/one", {"GET", "HEAD"}),
    ):
        status, headers, _ = controller.raw(method, path)
        assert status == 405 and set(headers["Allow"].split(", ")) == allowed


# Warnings, lists, texts, hosts


def test_a_job_for_an_unregistered_host_is_taken_with_a_warning(controller):
    controller.register("web-01.example.com")
    for host, meant in (("web-01", "web-01.example.com"), ("web-02.example.com", "web-01.example.com")):
        _, answer = controller.call("POST", "/v1/jobs", {"repo": "o/n", "ref": "main", "host": host})
        assert answer["warning"] == f"no agent has registered as {host}; did you mean {meant}?"
    _, answer = controller.call("POST", "/v1/jobs", {"repo": "o/n", "ref": "main", "host": "zzz"})
    assert answer["created"] and answer["warning"] == "no agent has registered as zzz"
    answer = controller.call("POST", "/v1/jobs", {"repo": "o/n", "ref": "main", "host": "web-01.example.com"})[1]
    assert "warning" not in answer


def test_jobs_come_newest_first_page_by_page(controller):
    ids = [controller.create(ref=f"r{i}", host=f"h{i % 2}")["id"] for i in range(7)][::-1]
    seen, before = [], ""
    while before is not None:
        page = controller.ok("GET", "/v1/jobs?limit=3" + (f"&before={before}" if before else ""))
        assert len(page["jobs"]) <= 3
        seen += [job["id"] for job in page["jobs"]]
        before = page["next"]
    assert seen == ids == sorted(ids, reverse=True)
    assert len(controller.ok("GET", "/v1/jobs?host=h0")["jobs"]) == 4
    assert len(controller.ok("GET", "/v1/jobs?repo=MYORG/APP&status=pending&app=myorg--app")["jobs"]) == 7
    assert controller.ok("GET", "/v1/jobs?status=failed")["jobs"] == []


def test_jobs_by_the_start_of_an_id(controller):
    ids = [controller.create(ref=f"r{i}")["id"] for i in range(3)]
    for length in (36, 30):
        found = controller.ok("GET", f"/v1/jobs?id={ids[1][:length].upper()}")["jobs"]
        assert [job["id"] for job in found] == [ids[1]]
    assert len(controller.ok("GET", f"/v1/jobs?id={ids[0][:1]}")["jobs"]) == 3
    assert controller.ok("GET", "/v1/jobs?id=f")["jobs"] == []


def test_logs_page_by_page_and_as_text(controller):
    agent = controller.register()
    controller.create()
    job = controller.beat(agent)["job"]
    for start in range(0, 25, 5):
        controller.logs(job, *(f"line {i} ☕" for i in range(start, start + 5)), offset=start)
    for limit in (1, 4, 5, 7, 25, 1000):
        lines = controller.lines(job, limit=limit)
        assert [line["message"] for line in lines] == [f"line {i} ☕" for i in range(25)], limit
        assert [line["offset"] for line in lines] == list(range(25))
        positions = [line["position"] for line in lines]
        assert positions == sorted(set(positions))
    assert controller.ok("GET", f"/v1/jobs/{job['id']}/logs?limit=25")["next"] is None
    line = controller.lines(job)[0]
    assert (line["level"], line["attempt"]) == ("info", 1) and STAMP.fullmatch(line["timestamp"])
    status, headers, data = controller.raw("GET", f"/v1/jobs/{job['id']}/logs", headers={"Accept": "text/plain"})
    assert (status, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    assert data.decode() == "".join(f"line {i} ☕\n" for i in range(25))


def test_retry(controller):
    agent = controller.register()
    first = controller.create(metadata={"a": 1}, timeout=77, retries=2)
    controller.end(controller.beat(agent)["job"], "failed", exit_code=1)
    status, answer = controller.call("POST", f"/v1/jobs/{first['id']}/retry")
    assert (status, answer["created"]) == (201, True)
    again = answer["job"]
    assert again["id"] != first["id"] and again["retry_of"] == first["id"] and again["status"] == "pending"
    for field in ("repo", "ref", "host", "app", "metadata", "timeout", "retries"):
        assert again[field] == first[field], field
    twice = controller.ok("POST", f"/v1/jobs/{first['id']}/retry")
    assert (twice["job"]["id"], twice["created"]) == (again["id"], False)


def test_drain_resume_remove(controller):
    agent, job = controller.register(), controller.create()
    assert controller.ok("POST", "/v1/hosts/web-01/drain")["host"]["drained"] is True
    assert controller.beat(agent)["job"] is None
    _, answer = controller.call("POST", "/v1/jobs", {"repo": "o/n", "ref": "main", "host": "web-01"})
    assert "drained" in answer["warning"]
    controller.restart()
    agent = controller.register()
    assert controller.beat(agent)["job"] is None, "drained after a restart and a new registration too"
    assert controller.ok("POST", "/v1/hosts/web-01/resume")["host"]["drained"] is False
    assert controller.beat(agent)["job"]["id"] == job["id"]
    controller.end(controller.job(job["id"]))
    controller.ok("POST", f"/v1/jobs/{answer['job']['id']}/cancel")
    assert controller.ok("DELETE", "/v1/hosts/web-01") == {"hostname": "web-01", "removed": True}
    assert controller.call("POST", f"/v1/agents/{agent['id']}/heartbeat", {"status": "online"})[0] == 404
    assert controller.ok("GET", "/v1/hosts")["hosts"] == []
    assert controller.beat(controller.register())["acknowledged"]


# Tokens


def test_a_host_is_bound_to_its_own_secret(make_controller):
    c = make_controller(open=False, **TOKENS)
    digest = {name: deploybot.sha256(name) for name in ("one", "two")}

    def register(token, host, **more):
        return c.call("POST", "/v1/agents/register", {"hostname": host, **more}, {"Authorization": f"Bearer {token}"})

    assert register("dbt_agent", "web-01", token_sha256=digest["one"])[0] == 200
    assert register("dbt_agent", "web-01", token_sha256=digest["two"])[0] == 409
    assert register("dbt_agent", "web-01")[0] == 409
    assert register("one", "web-02")[0] == 403
    status, agent = register("one", "web-01", token_sha256=digest["two"])
    assert status == 200
    path = f"/v1/agents/{agent['id']}/heartbeat"
    beat = {token: c.call("POST", path, {"status": "online"}, {"Authorization": f"Bearer {token}"})[0]
            for token in ("one", "two", "dbt_read", "nonsense")}  # fmt: skip
    assert beat == {"one": 401, "two": 200, "dbt_read": 403, "nonsense": 401}, "a replaced secret counts no more"


def test_a_mistyped_repository_is_warned_of(make_controller):
    """It deploys, as it may be meant; but without the commands of any app."""
    controller = make_controller()
    controller.set_app(name="hello", repo="myorg/hello", hosts=["web-01"])
    controller.register("web-01")
    asked = {"repo": "myorg/helo", "ref": "main", "host": "web-01"}
    warning = controller.ok("POST", "/v1/jobs", asked)["warning"]
    assert warning.startswith("apps.yaml has no app of myorg/helo; did you mean myorg/hello?")
    assert "warning" not in controller.ok("POST", "/v1/jobs", {**asked, "repo": "myorg/Hello"})
