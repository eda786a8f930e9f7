"""The audit: what a person or a push asked for has one row, with who and from where, in the transaction that did it."""

from __future__ import annotations

import hashlib
import json

import pytest
from conftest import SECRET, TOKENS, failing_at

import deploybot

WEB = {"name": "web", "repo": "myorg/web", "hosts": ["web-01"], "deploy_on_push": True}
ASKED = {"repo": "myorg/web", "ref": "main", "host": "web-01"}
OWN = hashlib.sha256(b"own").hexdigest()
COMMIT = "a" * 40


@pytest.fixture
def c(make_controller, clock):
    """Closed; calls are the admin's."""
    apps = json.dumps({"apps": [WEB]})
    return make_controller(open=False, clock=clock, apps=apps, webhook_secret=SECRET, **TOKENS)


def audit(c, query=""):
    return c.ok("GET", "/v1/audit" + query)["audit"]


def push(c, delivery="d-1", headers=None, **more):
    """(status, answer) of a signed push to main."""
    repository = {"full_name": "MyOrg/web", "default_branch": "main"}
    body = {"ref": "refs/heads/main", "before": "0" * 40, "after": COMMIT, "repository": repository, **more}
    data = json.dumps(body).encode()
    signed = {"X-Hub-Signature-256": deploybot.signature_of(SECRET, data), "X-GitHub-Delivery": delivery}
    return c.call("POST", "/v1/webhooks/github", data, {"Authorization": None, **signed, **(headers or {})})


class Stage:
    """What the actions below act on."""

    def __init__(self, c):
        self.c = c
        self.agent = c.register("web-01", token_sha256=OWN)
        self.ended = c.create(**ASKED, app="web")
        c.end(c.beat(self.agent)["job"])
        self.running = c.create("v1", repo="myorg/web")
        c.beat(self.agent)
        self.waiting = c.create("v2", repo="myorg/web")
        c.register("idle")
        c.ok("POST", "/v1/hosts/idle/drain")
        made = c.ok("POST", "/v1/tokens", {"role": "operator", "name": "ci", "app": "web"})
        self.token, self.secret = made["token"], made["secret"]
        self.op = c.acting(c.ok("POST", "/v1/tokens", {"role": "operator", "name": "ada"})["secret"])
        _, headers, _ = c.raw("POST", "/v1/session", {"token": self.op.token}, {"Authorization": None})
        self.browser = {"Authorization": None, "Cookie": headers["Set-Cookie"].split(";")[0]}

    def state(self):
        """All that an action can change, but for the audit."""
        with self.c.daemon.store.read() as db:
            tables = {
                name: db.rows(f"SELECT * FROM {name}") for name in ("agents", "jobs", "events", "deliveries", "pushes", "releases")
            }
            # the last use of a token is written at any time
            tables["tokens"] = db.rows("SELECT id, sha256 FROM tokens")
        seen = {name: self.c.ok("GET", f"/v1/{name}")[name] for name in ("hosts", "jobs", "apps")}
        listed = [token["name"] for token in self.c.ok("GET", "/v1/tokens")["tokens"]]
        signed_in = self.c.call("GET", "/v1/session", headers=self.browser)[0]
        return tables, seen, listed, signed_in, self.c.daemon.queue.depth


def made_job(answer):
    return answer["job"]["id"]


# name: (who, what is called as (controller, method, path, body), the target, the detail)
ACTIONS = {
    "job.create": (
        *("ada", lambda s: s.op.call("POST", "/v1/jobs", {**ASKED, "ref": "v9"})),
        *(lambda s, answer: made_job(answer), "web v9 on web-01"),
    ),
    "job.cancel": (
        *("ci", lambda s: s.c.acting(s.secret).call("POST", f"/v1/jobs/{s.waiting['id']}/cancel")),
        *(lambda s, answer: s.waiting["id"], "web v2 on web-01"),
    ),
    "job.cancel (running)": (
        *("admin", lambda s: s.c.call("POST", f"/v1/jobs/{s.running['id']}/cancel")),
        *(lambda s, answer: s.running["id"], "web v1 on web-01"),
    ),
    "job.retry": (
        *("ada", lambda s: s.c.call("POST", f"/v1/jobs/{s.ended['id']}/retry", headers=s.browser)),
        *(lambda s, answer: made_job(answer), "web main on web-01"),
    ),
    "push": ("github", lambda s: push(s.c), lambda s, _: "MyOrg/web", f"main {COMMIT}: 1 job for web"),
    "host.enrol": (
        *("agents", lambda s: s.c.acting("dbt_agent").call("POST", "/v1/agents/register", {"hostname": "New-01"})),
        *(lambda s, _: "new-01", ""),
    ),
    "host.enrol (rotated)": (
        "agent:web-01",
        lambda s: s.c.acting("own").call("POST", "/v1/agents/register", {"hostname": "web-01", "token_sha256": OWN[::-1]}),
        *(lambda s, _: "web-01", ""),
    ),
    "host.drain": ("ada", lambda s: s.op.call("POST", "/v1/hosts/WEB-01/drain"), lambda s, _: "web-01", ""),
    "host.resume": ("ada", lambda s: s.op.call("POST", "/v1/hosts/idle/resume"), lambda s, _: "idle", ""),
    "host.reset": ("admin", lambda s: s.c.call("POST", "/v1/hosts/web-01/reset"), lambda s, _: "web-01", ""),
    "host.remove": ("admin", lambda s: s.c.call("DELETE", "/v1/hosts/idle"), lambda s, _: "idle", ""),
    "token.create": (
        *("admin", lambda s: s.c.call("POST", "/v1/tokens", {"role": "viewer", "name": "eve", "app": "web"})),
        *(lambda s, _: "eve", "viewer for web, expires never"),
    ),
    "token.revoke": ("admin", lambda s: s.c.call("DELETE", f"/v1/tokens/{s.token['id']}"), lambda s, _: "ci", ""),
    "session.create": (
        *("ci", lambda s: s.c.call("POST", "/v1/session", {"token": s.secret}, {"Authorization": None})),
        *(lambda s, _: None, ""),
    ),
    "session.end": (*("ada", lambda s: s.c.call("DELETE", "/v1/session", headers=s.browser)), *(lambda s, _: None, "")),
    "reload": (
        "admin",
        lambda s: (s.c.apps_file.write_text("apps: []"), s.c.call("POST", "/v1/reload"))[1],
        *(lambda s, _: str(s.c.apps_file), "0 apps"),
    ),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_an_action_has_one_row_or_neither_happens(c, clock, name):
    """First the row cannot be written, then the commit fails, then all goes well."""
    who, act, target, detail = ACTIONS[name]
    stage = Stage(c)
    clock.advance(100)
    before, rows = stage.state(), audit(c)
    row = "INSERT INTO " + ("new_jobs" if name in ("job.create", "job.retry") else "audit")  # a trigger brings that one
    for statement in (row, "COMMIT"):
        with failing_at(c.daemon.store, statement) as faulty:
            code, answer = act(stage)
        assert (code, faulty.seen) == (503, 1), answer
        assert (stage.state(), audit(c)) == (before, rows)
    code, answer = act(stage)
    assert code in (200, 201), answer
    row, *rest = audit(c)
    assert rest == rows, "one row"
    assert stage.state() != before
    expected = {"at": clock.stamp(), "who": who, "address": "127.0.0.1", "action": name.partition(" ")[0]}
    assert expected.items() <= row.items()
    assert (row["target"], row["detail"]) == (target(stage, answer) or row["target"], detail)


def test_every_action_of_the_code_is_tested_here():
    with open(deploybot.__file__, encoding="utf-8") as file:
        source = file.read()
    named = set(deploybot.re.findall(r'"((?:job|host|token|session)\.[a-z]+|push|reload)"', source)) - {"push"}
    assert named == {name.partition(" ")[0] for name in ACTIONS} - {"push"}


def test_what_changed_nothing_has_no_row(c):
    stage = Stage(c)
    c.ok("POST", f"/v1/jobs/{stage.running['id']}/cancel")
    c.ok("POST", f"/v1/jobs/{stage.waiting['id']}/cancel")
    push(c)
    retried = c.ok("POST", f"/v1/jobs/{stage.ended['id']}/retry")
    assert retried["created"]
    rows = audit(c)
    c.apps_file.write_text("apps: [")
    job, beat = stage.running, f"/v1/agents/{stage.agent['id']}/heartbeat"
    for caller, method, path, body in (
        (c, "POST", "/v1/jobs", {**ASKED, "app": "web"}),  # there is one
        (c, "POST", f"/v1/jobs/{stage.ended['id']}/retry", None),  # its retry waits
        (c, "POST", f"/v1/jobs/{job['id']}/cancel", None),  # asked for already
        (c, "POST", f"/v1/jobs/{stage.waiting['id']}/cancel", None),
        (c, "POST", f"/v1/jobs/{stage.ended['id']}/cancel", None),  # 409
        (c, "POST", "/v1/jobs", {}),
        (c, "POST", "/v1/reload", None),  # 422
        (c, "POST", "/v1/hosts/nobody/drain", None),
        (c, "POST", "/v1/hosts/nobody/reset", None),
        (c, "DELETE", "/v1/hosts/web-01", None),  # runs a job
        (c, "POST", "/v1/tokens", {"role": "viewer", "name": "ci"}),  # 409
        (c, "DELETE", "/v1/tokens/nothing", None),
        (c, "POST", "/v1/session", {"token": "wrong"}),
        (c, "DELETE", "/v1/session", None),  # a token does not sign out
        (stage.op, "POST", "/v1/tokens", {"role": "admin"}),  # 403
        (c.acting("dbt_read"), "POST", "/v1/jobs", ASKED),
        (c.acting("wrong"), "POST", "/v1/jobs", ASKED),
        (c.acting("own"), "POST", "/v1/agents/register", {"hostname": "web-01"}),  # it has its secret
        (c, "POST", beat, {"status": "online"}),
        (c, "POST", f"/v1/jobs/{job['id']}/logs", {"attempt": 1, "offset": 0, "lines": [{"message": "x"}]}),
        (c, "POST", f"/v1/jobs/{job['id']}/result", {"attempt": 1, "status": "cancelled"}),
        (c, "GET", "/v1/jobs", None),
        (c, "GET", "/v1/audit", None),
    ):
        caller.call(method, path, body)
    push(c)  # delivered again
    push(c, "d-2", after="b" * 40, ref="refs/heads/other")
    c.daemon.sweep()
    assert audit(c) == rows


def test_a_push_that_came_late_has_a_row_too(c):
    """It was signed, and it made nothing: the row says why."""
    push(c, "d-2", repository={"full_name": "myorg/web", "default_branch": "main", "pushed_at": 200})
    push(c, "d-1", after="b" * 40, repository={"full_name": "myorg/web", "default_branch": "main", "pushed_at": 100})
    row = audit(c)[0]
    assert row["detail"] == f"main {'b' * 40}: ignored: web: a newer push to main was taken before"


def test_in_open_mode_it_was_local(controller):
    controller.create()
    row = audit(controller)[0]
    assert (row["who"], row["address"], row["action"]) == ("local", "127.0.0.1", "job.create")


@pytest.mark.parametrize(("trusted", "address"), [("127.0.0.0/8", "198.51.100.7"), ("192.0.2.0/24", "127.0.0.1")])
def test_the_address_is_what_a_trusted_proxy_says(make_controller, trusted, address):
    apps = json.dumps({"apps": [WEB]})
    c = make_controller(open=False, trusted_proxy=trusted, webhook_secret=SECRET, apps=apps, **TOKENS)
    proxied = {"X-Forwarded-For": "203.0.113.9, 198.51.100.7"}
    c.call("POST", "/v1/jobs", ASKED, proxied)
    push(c, headers=proxied)
    c.call("POST", "/v1/session", {"token": "dbt_read"}, proxied)
    assert [(row["action"], row["address"]) for row in audit(c)] == [
        *[("session.create", address), ("push", address), ("job.create", address)]
    ]


def test_a_row_outlives_the_restart_and_what_it_is_of(c):
    c.register("web-01")
    c.ok("DELETE", "/v1/hosts/web-01")
    before = audit(c)
    c.restart()
    assert [row["action"] for row in audit(c)] == ["host.remove", "host.enrol"] and audit(c) == before


# -- read --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(c, clock):
    """Twelve rows of two people: drain and resume, one after the other."""
    op = c.acting(c.ok("POST", "/v1/tokens", {"role": "operator", "name": "ada"})["secret"])
    c.register("web-01")
    for number in range(5):
        clock.advance(1)
        (op if number % 2 else c).ok("POST", "/v1/hosts/web-01/drain")
        clock.advance(1)
        c.ok("POST", "/v1/hosts/web-01/resume")
    return c


def test_pages_are_newest_first_and_leave_nothing_out(filled):
    everything = audit(filled)
    assert len(everything) == 12
    assert [row["id"] for row in everything] == sorted((row["id"] for row in everything), reverse=True)
    assert [row["at"] for row in everything] == sorted((row["at"] for row in everything), reverse=True)
    for size in (1, 5, 6, 12):
        seen, before = [], ""
        while before is not None:
            page = filled.ok("GET", f"/v1/audit?limit={size}&before={before}")
            assert len(page["audit"]) == min(size, 12 - len(seen))
            seen += page["audit"]
            before = page["next"]
        assert seen == everything
    assert filled.ok("GET", "/v1/audit?limit=12")["next"] is None


def test_rows_that_come_meanwhile_move_no_page(filled):
    first = filled.ok("GET", "/v1/audit?limit=4")
    rest = audit(filled, f"?before={first['next']}")
    filled.create()
    assert audit(filled, f"?before={first['next']}") == rest


def test_filters_narrow_together_and_by_the_whole_word(filled):
    everything = audit(filled)
    for query, wanted in (
        ("who=ada", lambda row: row["who"] == "ada"),
        ("action=host.drain", lambda row: row["action"] == "host.drain"),
        ("who=admin&action=host.drain", lambda row: (row["who"], row["action"]) == ("admin", "host.drain")),
        ("who=", lambda row: True),
    ):
        expected = [row for row in everything if wanted(row)]
        assert expected and audit(filled, "?" + query) == expected
        page = filled.ok("GET", f"/v1/audit?{query}&limit=1")
        assert page["audit"] == expected[:1]
        assert audit(filled, f"?{query}&before={page['next']}") == expected[1:]
    for query in ("who=ad", "action=host", "who=ADA", "who=%25", "who=' OR 1=1 --"):
        assert audit(filled, "?" + query.replace(" ", "%20")) == []


def test_by_default_a_page_has_a_hundred(c):
    row = ("2026-01-01T00:00:00.000Z", "ada", "192.0.2.1", "push", "o/n", "")
    c.daemon.store.write(lambda tx: [tx.rows("INSERT INTO audit VALUES (NULL, ?, ?, ?, ?, ?, ?)", *row) for _ in range(101)])
    page = c.ok("GET", "/v1/audit")
    assert (len(page["audit"]), len(audit(c, f"?before={page['next']}"))) == (100, 1)


def test_a_query_that_is_none_is_refused_with_its_fields(c):
    for query, field in (
        *(("limit=0", "limit"), ("limit=1001", "limit"), ("limit=x", "limit"), ("before=0", "before")),
        *(("before=-1", "before"), ("before=x", "before"), ("from=1", "from"), ("who=a&who=b", "who")),
        *(("who=" + "x" * 201, "who"), ("action=" + "x" * 201, "action")),
    ):
        code, answer = c.call("GET", "/v1/audit?" + query)
        assert (code, [error["field"] for error in answer["errors"]]) == (422, [field]), query


def test_admins_alone_read_it(c):
    for role in ("operator", "viewer", "agent", "admin"):
        token = c.ok("POST", "/v1/tokens", {"role": role})["secret"]
        assert c.acting(token).call("GET", "/v1/audit")[0] == (200 if role == "admin" else 403)
    assert c.call("GET", "/v1/audit", headers={"Authorization": None})[0] == 401


def test_no_secret_stands_in_it(c):
    stage = Stage(c)
    for _, act, _, _ in ACTIONS.values():
        act(stage)
    text = json.dumps(audit(c, "?limit=1000"))
    for secret in (stage.secret, stage.op.token, stage.browser["Cookie"].partition("=")[2], SECRET, *TOKENS.values()):
        assert secret not in text
    assert "dbt_" not in text
