"""Auth: who a token is, what needs none, and every route against every role."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import stat

import pytest
from conftest import SECRET, TOKENS

import deploybot
from deploybot import ROUTES, Auth, Principal, Scope, Unauthorized

ADMIN, AGENT, VIEWER = (
    Principal(name, scope) for name, scope in (("a", Scope.ADMIN), ("b", Scope.AGENT), ("c", Scope.VIEWER))
)
HERE, ELSEWHERE = (lambda: True), (lambda: False)


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def auth(open_mode=False, secrets=()):
    return Auth({"dbt_a": ADMIN, "dbt_b": AGENT}, open_mode, {sha256(one): host for one, host in secrets}.get)


@pytest.fixture
def closed(make_controller):
    return make_controller(open=False, webhook_secret=SECRET, **TOKENS)


def call(controller, method, path, body=None, token=None, **headers):
    """(status, answer) with exactly this token, or with none."""
    sent = {"Authorization": f"Bearer {token}" if token else None}
    return controller.call(
        method, path, body, {**sent, **{name.replace("_", "-"): value for name, value in headers.items()}}
    )


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["Bearer dbt_a", "bearer dbt_a", "BEARER dbt_a", "Bearer  dbt_a "])
def test_a_token_is_its_principal(header):
    assert auth().principal(header, ELSEWHERE) == ADMIN


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "dbt_a",
        "Basic dbt_a",
        "Bearer dbt_A",
        "Bearer dbt_a x",
        "Bearer x",
        "Bearer é",
        "Token dbt_a",
    ],
)
def test_what_is_no_token_is_nobody(header):
    with pytest.raises(Unauthorized):
        auth().principal(header, HERE)


def test_a_token_that_is_sent_counts_also_in_open_mode():
    assert auth(open_mode=True).principal("Bearer dbt_b", HERE) == AGENT
    with pytest.raises(Unauthorized):
        auth(open_mode=True).principal("Bearer wrong", HERE)


def test_open_mode_asks_where_a_request_comes_from():
    assert auth(open_mode=True).principal(None, HERE).scope is Scope.ADMIN
    with pytest.raises(Unauthorized):
        auth(open_mode=True).principal(None, ELSEWHERE)


def test_the_secret_of_a_host_speaks_for_that_host():
    assert auth(secrets=[("s", "web-01")]).principal("Bearer s", HERE) == Principal(
        "agent:web-01", Scope.AGENT, "web-01"
    )


@pytest.mark.parametrize("token", ["abc ", "abc\n", "a b", "é"])
def test_a_token_that_no_header_can_carry_is_refused_at_start(make_controller, token):
    """Or it works: "abc " set in a file of variables must not lock everybody out in silence."""
    try:
        controller = make_controller(open=False, token=token)
    except deploybot.StartError as error:
        assert "TOKEN" in str(error)
    else:
        assert call(controller, "GET", "/v1/jobs", token=token.strip())[0] == 200


# -- this machine ------------------------------------------------------------------------------------------------------

LOCAL = {"host": "localhost:8080"}


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8080", "127.0.0.1:80", "[::1]", "[::1]:8080", "app.localhost:1"]
)
def test_a_request_of_this_machine(peer, host):
    assert deploybot.is_from_here(peer, {"host": host})


@pytest.mark.parametrize(
    "peer", ["10.0.0.1", "192.168.1.1", "8.8.8.8", "::2", "fe80::1", "::ffff:10.0.0.1", "0.0.0.0", "", "localhost.evil"]
)
def test_a_request_of_another_machine(peer):
    assert not deploybot.is_from_here(peer, LOCAL)


NOT_FROM_HERE = [
    {"host": "evil.example.com"},
    {"host": "localhost.evil.com:8080"},
    {"host": "127.0.0.1.evil.com"},
    {"host": "127.0.0.1.nip.io:80"},
    {"host": "10.0.0.1:8080"},
    {"host": "0.0.0.0:8080"},
    {"host": "evil.com:localhost"},
    {"host": "localhost@evil.com"},
    {"host": "evil.com#localhost"},
    {"host": "notlocalhost"},
    {"forwarded": "for=127.0.0.1"},
    {"x-forwarded-for": "127.0.0.1"},
    {"x-forwarded-host": "localhost"},
    {"x-forwarded-proto": "https"},
    {"x-forwarded-whatever": ""},
    {"via": "1.1 proxy"},
    {"x-real-ip": "127.0.0.1"},
    {"origin": "https://evil.example.com"},
    {"origin": "null"},
    {"origin": "http://localhost:9999"},
    {"origin": "https://localhost:8080"},
    {"origin": ""},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
]


@pytest.mark.parametrize("headers", NOT_FROM_HERE, ids=str)
def test_a_proxy_a_foreign_name_or_a_foreign_page_is_not_this_machine(headers):
    assert not deploybot.is_from_here("127.0.0.1", {**LOCAL, **headers})


def test_no_host_header_is_not_this_machine():
    assert not deploybot.is_from_here("127.0.0.1", {})


@pytest.mark.parametrize(
    "headers", [{"origin": "http://localhost:8080"}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}]
)
def test_our_own_page_is_this_machine(headers):
    assert deploybot.is_from_here("127.0.0.1", {**LOCAL, **headers})


@pytest.mark.parametrize("headers", NOT_FROM_HERE, ids=str)
def test_open_mode_over_the_wire(controller, headers):
    """Refused without a token for each way in which it is not from here."""
    status, answer = controller.call("POST", "/v1/reload", headers=headers)
    assert (status, answer["status"]) == (401, 401)
    assert controller.call("POST", "/v1/reload")[0] == 200


def test_closed_mode_wants_a_token_from_this_machine_too(closed):
    status, headers, _ = closed.raw("GET", "/v1/jobs", headers={"Authorization": None})
    assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
    assert call(closed, "GET", "/v1/jobs?token=dbt_admin")[0] == 401


# -- secrets of hosts --------------------------------------------------------------------------------------------------


def enrol(controller, hostname, secret, token="dbt_agent"):
    return call(
        controller, "POST", "/v1/agents/register", {"hostname": hostname, "token_sha256": sha256(secret)}, token
    )


def beat(controller, agent, token):
    return call(controller, "POST", f"/v1/agents/{agent['id']}/heartbeat", {"status": "online"}, token)[0]


def test_a_host_with_a_secret_is_bound_to_it(closed):
    assert enrol(closed, "web-01", "one")[0] == 200
    assert enrol(closed, "web-01", "one")[0] == 200  # the same again is harmless
    status, answer = enrol(closed, "web-01", "two")
    assert (status, "ctl.py hosts remove web-01" in answer["detail"]) == (409, True)
    assert call(closed, "POST", "/v1/agents/register", {"hostname": "web-01"}, "dbt_agent")[0] == 409
    assert enrol(closed, "web-01", "one", token="one")[0] == 200
    assert beat(closed, enrol(closed, "web-01", "one")[1], "one") == 200


def test_a_secret_speaks_for_no_other_host(closed):
    (_, first), (_, second) = enrol(closed, "web-01", "one"), enrol(closed, "web-02", "two")
    assert (beat(closed, first, "one"), beat(closed, second, "one"), beat(closed, first, "two")) == (200, 403, 403)
    assert enrol(closed, "web-03", "three", token="one")[0] == 403
    closed.create(host="web-02")
    job = call(closed, "POST", f"/v1/agents/{second['id']}/heartbeat", {"status": "online"}, "two")[1]["job"]
    logs = {"attempt": 1, "offset": 0, "lines": [{"message": "x"}]}
    for secret, expected in (("one", 403), ("two", 200)):
        assert call(closed, "POST", f"/v1/jobs/{job['id']}/logs", logs, secret)[0] == expected
    result = {"attempt": 1, "status": "success", "exit_code": 0}
    for secret, expected in (("one", 403), ("two", 200), ("one", 403)):  # also where the job has ended so already
        assert call(closed, "POST", f"/v1/jobs/{job['id']}/result", result, secret)[0] == expected


def test_two_hosts_cannot_have_one_secret(closed):
    _, first = enrol(closed, "web-01", "one")
    assert enrol(closed, "web-02", "one")[0] == 409
    assert beat(closed, first, "one") == 200


def test_a_secret_that_was_replaced_or_removed_counts_no_more(closed):
    _, agent = enrol(closed, "web-01", "one")
    assert enrol(closed, "web-01", "two", token="one")[0] == 200
    assert (beat(closed, agent, "one"), beat(closed, agent, "two")) == (401, 200)
    closed.ok("DELETE", "/v1/hosts/web-01")
    assert beat(closed, agent, "two") == 401
    assert enrol(closed, "web-01", "three")[0] == 200


def test_a_secret_counts_after_a_restart(closed):
    _, agent = enrol(closed, "web-01", "one")
    enrol(closed, "web-01", "two", token="one")
    closed.restart()
    assert (beat(closed, agent, "one"), beat(closed, agent, "two")) == (401, 200)


def test_an_unknown_and_a_revoked_token_get_the_same_answer(closed):
    enrol(closed, "web-01", "one")
    closed.ok("DELETE", "/v1/hosts/web-01")
    assert call(closed, "GET", "/v1/jobs", token="one") == call(closed, "GET", "/v1/jobs", token="never")


def test_no_secret_is_shown_to_a_reader(closed):
    enrol(closed, "web-01", "one")
    for path in ("/v1/hosts", "/v1/jobs", "/v1/apps", "/metrics", "/health"):
        _, _, body = closed.raw("GET", path)
        for word in (*TOKENS.values(), SECRET, sha256("one"), "token_sha256", "session"):
            assert word.encode() not in body


# -- the token of a first start ----------------------------------------------------------------------------------------


def test_the_first_token_is_for_its_owner_alone(tmp_path):
    path = tmp_path / "admin.token"
    before = os.umask(0)
    try:
        token, made = deploybot.first_token(path)
    finally:
        os.umask(before)
    assert made
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert token.startswith("dbt_")
    assert len(token) >= 4 + 43  # 256 bits
    assert path.read_text() == token + "\n"
    assert deploybot.first_token(path) == (token, False)


def test_first_tokens_differ(tmp_path):
    assert len({deploybot.first_token(tmp_path / name)[0] for name in "abc"}) == 3


def test_a_closed_first_start_makes_a_token_and_keeps_it(make_controller, caplog):
    controller = make_controller(open=False)
    token = (controller.folder / "admin.token").read_text().strip()
    assert call(controller, "GET", "/v1/jobs")[0] == 401
    assert call(controller, "GET", "/v1/jobs", token=token)[0] == 200
    assert len([line for line in caplog.messages if "admin.token" in line]) == 1
    assert token not in caplog.text
    controller.restart()
    assert (controller.folder / "admin.token").read_text().strip() == token
    assert call(controller, "GET", "/v1/jobs", token=token)[0] == 200


def test_a_configured_token_makes_no_file(make_controller):
    for name, settings in (("a", {"open": False, "token": "dbt_x"}), ("b", {"open": True})):
        assert not (make_controller(name, **settings).folder / "admin.token").exists()


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe\n", b"two words\n"])
def test_a_spoilt_token_file_ends_the_start_in_one_line(make_controller, tmp_path, content):
    (tmp_path / "controller").mkdir()
    (tmp_path / "controller" / "admin.token").write_bytes(content)
    with pytest.raises(deploybot.StartError) as caught:
        make_controller(open=False)
    (line,) = caught.value.problems
    assert "admin.token" in line
    assert "\n" not in line


# -- role by route -----------------------------------------------------------------------------------------------------

ANYONE = frozenset({"none", "wrong", "admin", "agent", "viewer", "host"})
READERS, AGENTS, ADMINS = frozenset({"admin", "viewer"}), frozenset({"admin", "agent", "host"}), frozenset({"admin"})
MAY = {
    ("POST", "/v1/agents/register"): AGENTS,
    ("POST", "/v1/agents/{id}/heartbeat"): AGENTS,
    ("POST", "/v1/jobs"): ADMINS,
    ("GET", "/v1/jobs"): READERS,
    ("GET", "/v1/jobs/{id}"): READERS,
    ("POST", "/v1/jobs/{id}/cancel"): ADMINS,
    ("POST", "/v1/jobs/{id}/retry"): ADMINS,
    ("POST", "/v1/jobs/{id}/logs"): AGENTS,
    ("GET", "/v1/jobs/{id}/logs"): READERS,
    ("POST", "/v1/jobs/{id}/result"): AGENTS,
    ("GET", "/v1/hosts"): READERS,
    ("POST", "/v1/hosts/{hostname}/drain"): ADMINS,
    ("POST", "/v1/hosts/{hostname}/resume"): ADMINS,
    ("DELETE", "/v1/hosts/{hostname}"): ADMINS,
    ("GET", "/v1/apps"): READERS,
    ("POST", "/v1/reload"): ADMINS,
    ("GET", "/v1/logs/stream"): READERS,
    ("POST", "/v1/webhooks/github"): ANYONE,
    ("GET", "/health"): ANYONE,
    ("GET", "/metrics"): READERS,
    ("GET", "/"): ANYONE,
    ("GET", "/docs"): ANYONE,
    ("GET", "/redoc"): ANYONE,
    ("GET", "/openapi.json"): ANYONE,
    ("GET", "/agent.py"): ANYONE,
    ("GET", "/ctl.py"): ANYONE,
}
SENT = {
    "none": None,
    "wrong": "dbt_wrong",
    "admin": "dbt_admin",
    "agent": "dbt_agent",
    "viewer": "dbt_read",
    "host": "s3cret",
}


def test_every_route_is_in_the_matrix():
    assert set(MAY) == {(route.method, route.pattern) for route in ROUTES}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """A closed controller with a host that has a secret, and an ended job."""
    from conftest import Controller

    made = Controller(tmp_path_factory.mktemp("matrix"), open=False, webhook_secret=SECRET, **TOKENS)
    _, made.agent = enrol(made, "web-01", "s3cret")
    made.ended = made.create()
    made.ok("POST", f"/v1/jobs/{made.ended['id']}/cancel")
    yield made
    made.stop()


def status_of(controller, method, pattern, token):
    """The status of a call of that route; the body is not read, as a stream has no end."""
    path = pattern.replace("{id}", controller.agent["id"] if "agents" in pattern else controller.ended["id"])
    path = path.replace("{hostname}", "nowhere")
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    body = b"{}" if method == "POST" else None
    if "webhooks" in path:
        headers |= {"X-GitHub-Event": "ping", "X-Hub-Signature-256": deploybot.signature_of(SECRET, body)}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", controller.port, timeout=20)) as connection:
        connection.request(method, path, body, headers)
        return connection.getresponse().status


@pytest.mark.parametrize(("method", "pattern"), MAY, ids=[" ".join(route) for route in MAY])
def test_role_by_route(matrix, method, pattern):
    found = {role: status_of(matrix, method, pattern, token) for role, token in SENT.items()}
    may = MAY[method, pattern]
    expected = {role: "in" if role in may else 401 if role in ("none", "wrong") else 403 for role in SENT}
    assert {role: status if status in (401, 403) else "in" for role, status in found.items()} == expected
    assert not [status for status in found.values() if status >= 500]


def test_head_needs_what_get_needs(matrix):
    for (method, pattern), may in MAY.items():
        if method == "GET" and "stream" not in pattern:
            assert (status_of(matrix, "HEAD", pattern, None) == 401) == (may is READERS), pattern
