"""Auth: who a token is, what needs none, and every route against every role. How tokens are made and end: test_tokens.py."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import itertools
import json
import os
import stat

import pytest
from conftest import SECRET, TOKENS, Controller, FakeClock

import deploybot
from deploybot import ROUTES, Auth, Principal, Router, Scope, Unauthorized

ADMIN, AGENT, VIEWER = (Principal(name, scope) for name, scope in (("a", Scope.ADMIN), ("b", Scope.AGENT), ("c", Scope.VIEWER)))
HERE, ELSEWHERE = (lambda: True), (lambda: False)


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def auth(tmp_path, clock):
    """Makes an Auth with two configured tokens; who_is(header) asks it."""
    store = deploybot.Store(tmp_path / "auth.db")

    def make(open_mode=False, secrets=()):
        made = Auth({"dbt_a": ADMIN, "dbt_b": AGENT}, open_mode, {sha256(one): own for one, own in secrets}, store, clock)
        return lambda header, where: made.principal(
            {} if header is None else {"authorization": header}, "10.0.0.1", where
        )._replace(address="")

    yield make
    store.close()


@pytest.fixture
def closed(make_controller):
    return make_controller(open=False, webhook_secret=SECRET, **TOKENS)


def call(controller, method, path, body=None, token=None, **headers):
    """(status, answer) with exactly this token, or with none."""
    sent = {"Authorization": f"Bearer {token}" if token else None}
    return controller.call(method, path, body, {**sent, **{name.replace("_", "-"): value for name, value in headers.items()}})


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["Bearer dbt_a", "bearer dbt_a", "BEARER dbt_a", "Bearer  dbt_a "])
def test_a_token_is_its_principal(auth, header):
    assert auth()(header, ELSEWHERE) == ADMIN


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
def test_what_is_no_token_is_nobody(auth, header):
    with pytest.raises(Unauthorized):
        auth()(header, HERE)


def test_a_token_that_is_sent_counts_also_in_open_mode(auth):
    assert auth(open_mode=True)("Bearer dbt_b", HERE) == AGENT
    with pytest.raises(Unauthorized):
        auth(open_mode=True)("Bearer wrong", HERE)


def test_open_mode_asks_where_a_request_comes_from(auth):
    assert auth(open_mode=True)(None, HERE) == Principal("local", Scope.ADMIN)
    with pytest.raises(Unauthorized):
        auth(open_mode=True)(None, ELSEWHERE)


def test_the_secret_of_a_host_speaks_for_that_host(auth):
    own = Principal("agent:web-01", Scope.AGENT, "web-01", is_own=True)
    assert auth(secrets=[("s", own)])("Bearer s", HERE) == own


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
@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8080", "127.0.0.1:80", "[::1]", "[::1]:8080", "app.localhost:1"])
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
NO_HOST_AT_ALL = ("evil.com:localhost", "localhost@evil.com", "evil.com#localhost")  # refused as no Host header


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
    """Refused without a token for each way in which it is not from here; from another site's page also with one."""
    status, answer = controller.call("POST", "/v1/reload", headers=headers)
    unauthorized = 400 if headers.get("host") in NO_HOST_AT_ALL else 401
    expected = 403 if headers.keys() & {"origin", "sec-fetch-site"} else unauthorized
    assert (status, answer["status"]) == (expected, expected)
    assert controller.call("GET", "/v1/jobs", headers=headers)[0] == unauthorized
    assert controller.call("POST", "/v1/reload")[0] == 200


def test_closed_mode_wants_a_token_from_this_machine_too(closed):
    status, headers, _ = closed.raw("GET", "/v1/jobs", headers={"Authorization": None})
    assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
    assert call(closed, "GET", "/v1/jobs?token=dbt_admin")[0] == 401


# -- secrets of hosts --------------------------------------------------------------------------------------------------


def enrol(controller, hostname, secret, token="dbt_agent"):
    return call(controller, "POST", "/v1/agents/register", {"hostname": hostname, "token_sha256": sha256(secret)}, token)


def beat(controller, agent, token):
    return call(controller, "POST", f"/v1/agents/{agent['id']}/heartbeat", {"status": "online"}, token)[0]


def test_a_host_with_a_secret_is_bound_to_it(closed):
    assert enrol(closed, "web-01", "one")[0] == 200
    assert enrol(closed, "web-01", "one")[0] == 200  # the same again is harmless
    status, answer = enrol(closed, "web-01", "two")
    assert (status, "ctl.py hosts reset web-01" in answer["detail"]) == (409, True)
    assert call(closed, "POST", "/v1/agents/register", {"hostname": "web-01"}, "dbt_agent")[0] == 409
    assert enrol(closed, "web-01", "one", token="one")[0] == 200
    assert beat(closed, enrol(closed, "web-01", "one")[1], "one") == 200
    assert beat(closed, enrol(closed, "web-01", "one")[1], "dbt_agent") == 403  # the enrolment token has done its work


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
        token = deploybot.first_token(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert token.startswith("dbt_")
    assert len(token) >= 4 + 43  # 256 bits
    assert path.read_text() == token + "\n"
    assert deploybot.first_token(path) == token


def test_first_tokens_differ(tmp_path):
    assert len({deploybot.first_token(tmp_path / name) for name in "abc"}) == 3


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

# Who asks, a column each. "@web": of the app web alone. "+": made over the API. "bare": the admin's token itself in the place of
# the cookie. "page": the admin's cookie, sent by another site's page. The last four: open mode, with no token, with no token
# through a proxy, with no token from another site's page, with a wrong token.
#
# A cell is the status of that call; a call that is refused (401, 403) has changed nothing either. A line is a route with one
# target: {web} and {api} are jobs of those apps on web-01, {fresh} and {over} new ones of web, {held} runs on web-01, {done} has
# run there; {agent} is web-01's, {spare} a host that nobody needs, {new} one that nobody knows, {token} a token. {dweb} and {dapi} are
# deployments that were cancelled, {dfresh} and {dover} new ones of web, {dother} one of api; {delivery} a push that was received.
TABLE = """
                                      none wrong revoked expired | viewer @web operator @web | enrol + host own other | admin + | cookie @web bare page | here proxied page wrong
POST   /v1/agents/register?{new}      401  401   401     401     | 403    403  403      403  | 200 200 403  403 403   | 200 200 | 200    403  401  403  | 200  401     403  401
POST   /v1/agents/register?web-01     401  401   401     401     | 403    403  403      403  | 409 409 200  200 403   | 200 200 | 200    403  401  403  | 200  401     403  401
POST   /v1/agents/{agent}/heartbeat   401  401   401     401     | 403    403  403      403  | 403 403 200  200 403   | 200 200 | 200    403  401  403  | 200  401     403  401
POST   /v1/agents/nobody/heartbeat    401  401   401     401     | 403    403  403      403  | 404 404 404  404 404   | 404 404 | 404    403  401  403  | 404  401     403  401
POST   /v1/jobs?web                   401  401   401     401     | 403    403  201      201  | 403 403 403  403 403   | 201 201 | 201    201  401  403  | 201  401     403  401
POST   /v1/jobs?web&elsewhere         401  401   401     401     | 403    403  201      403  | 403 403 403  403 403   | 201 201 | 201    403  401  403  | 201  401     403  401
POST   /v1/jobs?api                   401  401   401     401     | 403    403  201      403  | 403 403 403  403 403   | 201 201 | 201    403  401  403  | 201  401     403  401
POST   /v1/jobs?unknown               401  401   401     401     | 403    403  201      403  | 403 403 403  403 403   | 201 201 | 201    403  401  403  | 201  401     403  401
GET    /v1/jobs                       401  401   401     401     | 200    200  200      200  | 403 403 403  403 403   | 200 200 | 200    200  401  200  | 200  401     401  401
GET    /v1/jobs?app=web               401  401   401     401     | 200    200  200      200  | 403 403 403  403 403   | 200 200 | 200    200  401  200  | 200  401     401  401
GET    /v1/jobs?app=api               401  401   401     401     | 200    403  200      403  | 403 403 403  403 403   | 200 200 | 200    403  401  200  | 200  401     401  401
GET    /v1/jobs/{web}                 401  401   401     401     | 200    200  200      200  | 403 403 403  403 403   | 200 200 | 200    200  401  200  | 200  401     401  401
GET    /v1/jobs/{api}                 401  401   401     401     | 200    403  200      403  | 403 403 403  403 403   | 200 200 | 200    403  401  200  | 200  401     401  401
GET    /v1/jobs/unknown               401  401   401     401     | 404    404  404      404  | 403 403 403  403 403   | 404 404 | 404    404  401  404  | 404  401     401  401
POST   /v1/jobs/{fresh}/cancel        401  401   401     401     | 403    403  200      200  | 403 403 403  403 403   | 200 200 | 200    200  401  403  | 200  401     403  401
POST   /v1/jobs/{api}/cancel          401  401   401     401     | 403    403  200      403  | 403 403 403  403 403   | 200 200 | 200    403  401  403  | 200  401     403  401
POST   /v1/jobs/{over}/retry          401  401   401     401     | 403    403  201      201  | 403 403 403  403 403   | 201 201 | 201    201  401  403  | 201  401     403  401
POST   /v1/jobs/{api}/retry           401  401   401     401     | 403    403  201      403  | 403 403 403  403 403   | 201 201 | 201    403  401  403  | 201  401     403  401
POST   /v1/jobs/{held}/logs           401  401   401     401     | 403    403  403      403  | 403 403 200  200 403   | 200 200 | 200    403  401  403  | 200  401     403  401
GET    /v1/jobs/{web}/logs            401  401   401     401     | 200    200  200      200  | 403 403 403  403 403   | 200 200 | 200    200  401  200  | 200  401     401  401
GET    /v1/jobs/{api}/logs            401  401   401     401     | 200    403  200      403  | 403 403 403  403 403   | 200 200 | 200    403  401  200  | 200  401     401  401
POST   /v1/jobs/{done}/result         401  401   401     401     | 403    403  403      403  | 403 403 200  200 403   | 200 200 | 200    403  401  403  | 200  401     403  401
GET    /v1/logs/stream                401  401   401     401     | 200    200  200      200  | 403 403 403  403 403   | 200 200 | 200    200  401  200  | 200  401     401  401
GET    /v1/logs/stream?app=web        401  401   401     401     | 200    200  200      200  | 403 403 403  403 403   | 200 200 | 200    200  401  200  | 200  401     401  401
GET    /v1/logs/stream?app=api        401  401   401     401     | 200    403  200      403  | 403 403 403  403 403   | 200 200 | 200    403  401  200  | 200  401     401  401
GET    /v1/logs/stream?job_id={api}   401  401   401     401     | 200    403  200      403  | 403 403 403  403 403   | 200 200 | 200    403  401  200  | 200  401     401  401
GET    /v1/hosts                      401  401   401     401     | 200    403  200      403  | 403 403 403  403 403   | 200 200 | 200    403  401  200  | 200  401     401  401
POST   /v1/hosts/{spare}/drain        401  401   401     401     | 403    403  200      403  | 403 403 403  403 403   | 200 200 | 200    403  401  403  | 200  401     403  401
POST   /v1/hosts/{spare}/resume       401  401   401     401     | 403    403  200      403  | 403 403 403  403 403   | 200 200 | 200    403  401  403  | 200  401     403  401
POST   /v1/hosts/{spare}/reset        401  401   401     401     | 403    403  403      403  | 403 403 403  403 403   | 200 200 | 200    403  401  403  | 200  401     403  401
DELETE /v1/hosts/{spare}              401  401   401     401     | 403    403  403      403  | 403 403 403  403 403   | 200 200 | 200    403  401  403  | 200  401     403  401
GET    /v1/apps                       401  401   401     401     | 200    200  200      200  | 403 403 403  403 403   | 200 200 | 200    200  401  200  | 200  401     401  401
PUT    /v1/apps/web/lock              401  401   401     401     | 403    403  200      200  | 403 403 403  403 403   | 200 200 | 200    200  401  403  | 200  401     403  401
PUT    /v1/apps/api/lock              401  401   401     401     | 403    403  200      403  | 403 403 403  403 403   | 200 200 | 200    403  401  403  | 200  401     403  401
PUT    /v1/apps/unknown/lock          401  401   401     401     | 403    403  404      403  | 403 403 403  403 403   | 404 404 | 404    403  401  403  | 404  401     403  401
DELETE /v1/apps/web/lock?locked       401  401   401     401     | 403    403  200      200  | 403 403 403  403 403   | 200 200 | 200    200  401  403  | 200  401     403  401
DELETE /v1/apps/api/lock              401  401   401     401     | 403    403  404      403  | 403 403 403  403 403   | 404 404 | 404    403  401  403  | 404  401     403  401
POST   /v1/deployments?web            401  401   401     401     | 403    403  201      201  | 403 403 403  403 403   | 201 201 | 201    201  401  403  | 201  401     403  401
POST   /v1/deployments?api            401  401   401     401     | 403    403  201      403  | 403 403 403  403 403   | 201 201 | 201    403  401  403  | 201  401     403  401
POST   /v1/deployments?api&dry        401  401   401     401     | 403    403  200      403  | 403 403 403  403 403   | 200 200 | 200    403  401  403  | 200  401     403  401
POST   /v1/deployments?unknown        401  401   401     401     | 403    403  404      403  | 403 403 403  403 403   | 404 404 | 404    403  401  403  | 404  401     403  401
GET    /v1/deployments                401  401   401     401     | 200    200  200      200  | 403 403 403  403 403   | 200 200 | 200    200  401  200  | 200  401     401  401
GET    /v1/deployments?app=web        401  401   401     401     | 200    200  200      200  | 403 403 403  403 403   | 200 200 | 200    200  401  200  | 200  401     401  401
GET    /v1/deployments?app=api        401  401   401     401     | 200    403  200      403  | 403 403 403  403 403   | 200 200 | 200    403  401  200  | 200  401     401  401
GET    /v1/deployments/{dweb}         401  401   401     401     | 200    200  200      200  | 403 403 403  403 403   | 200 200 | 200    200  401  200  | 200  401     401  401
GET    /v1/deployments/{dapi}         401  401   401     401     | 200    403  200      403  | 403 403 403  403 403   | 200 200 | 200    403  401  200  | 200  401     401  401
GET    /v1/deployments/unknown        401  401   401     401     | 404    404  404      404  | 403 403 403  403 403   | 404 404 | 404    404  401  404  | 404  401     401  401
POST   /v1/deployments/{dfresh}/cancel 401  401   401     401     | 403    403  200      200  | 403 403 403  403 403   | 200 200 | 200    200  401  403  | 200  401     403  401
POST   /v1/deployments/{dother}/cancel 401  401   401     401     | 403    403  200      403  | 403 403 403  403 403   | 200 200 | 200    403  401  403  | 200  401     403  401
POST   /v1/deployments/{dover}/retry  401  401   401     401     | 403    403  201      201  | 403 403 403  403 403   | 201 201 | 201    201  401  403  | 201  401     403  401
POST   /v1/deployments/{dapi}/retry   401  401   401     401     | 403    403  201      403  | 403 403 403  403 403   | 201 201 | 201    403  401  403  | 201  401     403  401
POST   /v1/hooks/web                  401  401   401     401     | 403    403  201      201  | 403 403 403  403 403   | 201 201 | 201    201  401  403  | 201  401     403  401
POST   /v1/hooks/api                  401  401   401     401     | 403    403  201      403  | 403 403 403  403 403   | 201 201 | 201    403  401  403  | 201  401     403  401
POST   /v1/hooks/unknown              401  401   401     401     | 403    403  404      403  | 403 403 403  403 403   | 404 404 | 404    403  401  403  | 404  401     403  401
GET    /v1/deliveries                 401  401   401     401     | 200    403  200      403  | 403 403 403  403 403   | 200 200 | 200    403  401  200  | 200  401     401  401
GET    /v1/deliveries/{delivery}      401  401   401     401     | 200    403  200      403  | 403 403 403  403 403   | 200 200 | 200    403  401  200  | 200  401     401  401
GET    /v1/deliveries/unknown         401  401   401     401     | 404    403  404      403  | 403 403 403  403 403   | 404 404 | 404    403  401  404  | 404  401     401  401
POST   /v1/reload                     401  401   401     401     | 403    403  403      403  | 403 403 403  403 403   | 200 200 | 200    403  401  403  | 200  401     403  401
POST   /v1/tokens                     401  401   401     401     | 403    403  403      403  | 403 403 403  403 403   | 201 201 | 201    403  401  403  | 201  401     403  401
GET    /v1/tokens                     401  401   401     401     | 403    403  403      403  | 403 403 403  403 403   | 200 200 | 200    403  401  200  | 200  401     401  401
DELETE /v1/tokens/{token}             401  401   401     401     | 403    403  403      403  | 403 403 403  403 403   | 200 200 | 200    403  401  403  | 200  401     403  401
GET    /v1/session                    401  401   401     401     | 200    200  200      200  | 200 200 200  200 200   | 200 200 | 200    200  401  200  | 200  401     401  401
POST   /v1/session                    200  200   200     200     | 200    200  200      200  | 200 200 200  200 200   | 200 200 | 200    200  200  403  | 200  200     403  200
POST   /v1/session?agent              403  403   403     403     | 403    403  403      403  | 403 403 403  403 403   | 403 403 | 403    403  403  403  | 403  403     403  403
DELETE /v1/session                    200  200   200     200     | 200    200  200      200  | 200 200 200  200 200   | 200 200 | 200    200  200  403  | 200  200     403  200
GET    /v1/audit                      401  401   401     401     | 403    403  403      403  | 403 403 403  403 403   | 200 200 | 200    403  401  200  | 200  401     401  401
POST   /v1/webhooks/github            200  200   200     200     | 200    200  200      200  | 200 200 200  200 200   | 200 200 | 200    200  200  403  | 200  200     403  200
POST   /v1/webhooks/github?unsigned   401  401   401     401     | 401    401  401      401  | 401 401 401  401 401   | 401 401 | 401    401  401  403  | 401  401     403  401
GET    /v1/programs                   200  200   200     200     | 200    200  200      200  | 200 200 200  200 200   | 200 200 | 200    200  200  200  | 200  200     200  200
GET    /health                        200  200   200     200     | 200    200  200      200  | 200 200 200  200 200   | 200 200 | 200    200  200  200  | 200  200     200  200
GET    /metrics                       401  401   401     401     | 200    403  200      403  | 403 403 403  403 403   | 200 200 | 200    403  401  200  | 200  401     401  401
GET    /                              200  200   200     200     | 200    200  200      200  | 200 200 200  200 200   | 200 200 | 200    200  200  200  | 200  200     200  200
GET    /docs                          200  200   200     200     | 200    200  200      200  | 200 200 200  200 200   | 200 200 | 200    200  200  200  | 200  200     200  200
GET    /redoc                         200  200   200     200     | 200    200  200      200  | 200 200 200  200 200   | 200 200 | 200    200  200  200  | 200  200     200  200
GET    /openapi.json                  200  200   200     200     | 200    200  200      200  | 200 200 200  200 200   | 200 200 | 200    200  200  200  | 200  200     200  200
GET    /agent.py                      200  200   200     200     | 200    200  200      200  | 200 200 200  200 200   | 200 200 | 200    200  200  200  | 200  200     200  200
GET    /ctl.py                        200  200   200     200     | 200    200  200      200  | 200 200 200  200 200   | 200 200 | 200    200  200  200  | 200  200     200  200
GET    /nothing                       404  404   404     404     | 404    404  404      404  | 404 404 404  404 404   | 404 404 | 404    404  404  404  | 404  404     404  404
PUT    /v1/jobs                       405  405   405     405     | 405    405  405      405  | 405 405 405  405 405   | 405 405 | 405    405  405  405  | 405  405     405  405
"""  # fmt: skip
WHO = (
    *("nobody", "wrong", "revoked", "expired", "viewer", "viewer@web", "operator", "operator@web"),
    *("enrol", "enrol+", "host", "own", "other", "admin", "admin+", "cookie", "cookie@web", "bare", "page"),
    *("open", "open proxied", "open page", "open wrong"),
)
ROWS = {
    tuple(words[:2]): tuple(map(int, words[2:])) for words in (line.replace("|", "").split() for line in TABLE.split("\n")[2:-1])
}
WEB = {"name": "web", "repo": "myorg/web", "hosts": ["web-01"]}
API = {"name": "api", "repo": "myorg/api", "hosts": ["web-01"]}
ELSEWHERES_PAGE = {"Origin": "https://evil.example.com"}
RESULT = {"attempt": 1, "status": "success", "exit_code": 0}


class Matrix:
    """A closed and an open controller with the same jobs and hosts, and the headers of everyone."""

    def __init__(self, folder):
        self.clock, self.count = FakeClock(), itertools.count(1)
        apps = json.dumps({"apps": [WEB, API]})
        settings = {"clock": self.clock, "apps": apps, "webhook_secret": SECRET}
        self.closed = Controller(folder / "closed", open=False, **settings, **TOKENS)
        self.open = Controller(folder / "open", open=True, **settings, **TOKENS)
        self.targets = {c: self.fixed(c) for c in (self.closed, self.open)}
        self.headers = self.everyone()

    def fixed(self, c):
        """What no call of the table changes for the calls behind it."""
        secret = {"token_sha256": sha256("dbt_own")} if c is self.closed else {}
        agent = c.register("web-01", slots=8, **secret)
        if c is self.closed:
            c.register("web-02", token_sha256=sha256("dbt_other"))
        jobs = {app: c.create(ref="old", repo=f"myorg/{app}") for app in ("web", "api")}
        for job in jobs.values():
            c.ok("POST", f"/v1/jobs/{job['id']}/cancel")
        made = [c.create(repo=f"myorg/{name}") for name in ("held", "done")]
        claims = {job["id"]: job for job in (c.beat(agent)["job"], c.beat(agent)["job"])}
        c.end(claims[made[1]["id"]], exit_code=0)
        ids = {"held": made[0]["id"], "done": made[1]["id"], **{name: job["id"] for name, job in jobs.items()}}
        for app in ("web", "api"):
            ids[f"d{app}"] = self.deployment(c, app, "old", ends=True)
        body = json.dumps({"ref": "refs/heads/main", "after": "a" * 40, "repository": {"full_name": "myorg/web"}}).encode()
        signed = {"X-GitHub-Delivery": "guid-1", "X-Hub-Signature-256": deploybot.signature_of(SECRET, body)}
        assert c.raw("POST", "/v1/webhooks/github", body, signed)[0] == 200
        return {"agent": agent["id"], "delivery": "guid-1", **ids}

    @staticmethod
    def deployment(c, app, ref, ends=False):
        made = c.ok("POST", "/v1/deployments", {"app": app, "ref": ref})["deployment"]["id"]
        if ends:
            c.ok("POST", f"/v1/deployments/{made}/cancel")
        return made

    def everyone(self):
        def bearer(token):
            return {"Authorization": f"Bearer {token}"}

        def made(role, **more):
            return self.closed.ok("POST", "/v1/tokens", {"role": role, **more})

        revoked, expired = made("admin"), made("admin", expires_in=60)
        self.closed.ok("DELETE", f"/v1/tokens/{revoked['token']['id']}")
        self.clock.advance(61)
        self.of_web = made("operator", app="web")["secret"]
        return {
            "nobody": {},
            "wrong": bearer("dbt_wrong"),
            "revoked": bearer(revoked["secret"]),
            "expired": bearer(expired["secret"]),
            "viewer": bearer("dbt_read"),
            "viewer@web": bearer(made("viewer", app="web")["secret"]),
            "operator": bearer(made("operator")["secret"]),
            "operator@web": bearer(self.of_web),
            "enrol": bearer("dbt_agent"),
            "enrol+": bearer(made("agent")["secret"]),
            "host": bearer(made("agent", host="web-01")["secret"]),
            "own": bearer("dbt_own"),
            "other": bearer("dbt_other"),
            "admin": bearer("dbt_admin"),
            "admin+": bearer(made("admin")["secret"]),
            "bare": {"Cookie": "deploybot_session=dbt_admin"},
            "open": {},
            "open proxied": {"X-Forwarded-For": "127.0.0.1"},
            "open page": ELSEWHERES_PAGE,
            "open wrong": bearer("dbt_wrong"),
        }

    def sign_in(self, token):
        answer = self.closed.raw("POST", "/v1/session", {"token": token}, {"Authorization": None})
        assert answer[0] == 200
        return {"Cookie": answer[1]["Set-Cookie"].partition(";")[0]}

    def sign_everyone_in(self):
        """Anew for each line: one of them signs out."""
        cookie = self.sign_in("dbt_admin")
        self.headers |= {"cookie": cookie, "cookie@web": self.sign_in(self.of_web), "page": cookie | ELSEWHERES_PAGE}

    def target(self, c, path):
        """The path with what it names, made just now where the call uses it up."""
        number = next(self.count)
        found = dict(self.targets[c])
        if "{fresh}" in path:
            found["fresh"] = c.create(ref=f"fresh-{number}", repo="myorg/web")["id"]
        if "{over}" in path:
            found["over"] = c.create(ref=f"over-{number}", repo="myorg/web")["id"]
            c.ok("POST", f"/v1/jobs/{found['over']}/cancel")
        for name, app in (("dfresh", "web"), ("dover", "web"), ("dother", "api")):
            if f"{{{name}}}" in path:
                found[name] = self.deployment(c, app, f"{name}-{number}", ends=name == "dover")
        for app in ("web", "api"):  # no line is about a lock of the one before
            with contextlib.suppress(KeyError):
                c.ok("DELETE", f"/v1/apps/{c.daemon.jobs.locks[app].app}/lock")
        if path.endswith("?locked"):
            c.ok("PUT", "/v1/apps/web/lock", {"reason": "x"})
        if "{spare}" in path:
            found["spare"] = c.register(f"spare-{number}")["hostname"]
        if "{token}" in path:
            found["token"] = c.ok("POST", "/v1/tokens", {"role": "viewer"})["token"]["id"]
        return path.format(new=f"new-{number}", **found)

    def body(self, method, path):
        """Of a call of that line; what stands behind its question mark is ours alone."""
        target, _, which = path.partition("?")
        if target == "/v1/agents/register":
            return {"hostname": which}
        if target == "/v1/jobs" and method == "POST":
            host = "web-09" if which.endswith("elsewhere") else "web-01"
            return {"repo": f"myorg/{which.partition('&')[0]}", "ref": "main", "host": host}
        if target == "/v1/session":
            return {"token": "dbt_agent" if which else "dbt_read"}
        if target == "/v1/deployments":
            app, _, dry = which.partition("&")
            return {"app": app, "ref": "main", "dry_run": bool(dry)}
        if target.startswith("/v1/hooks/"):
            return {"ref": "main"}
        last = target.rpartition("/")[2]
        bodies = {
            "heartbeat": {"status": "offline"},
            "lock": {"reason": "x"},
            "logs": {"attempt": 1, "offset": 0, "lines": []},
            "result": RESULT,
            "tokens": {"role": "viewer"},
        }
        return bodies.get(last, {})

    def ask(self, who, method, path):
        """The status of that call. The body is not read, as a stream has no end."""
        c = self.open if who.startswith("open") else self.closed
        path = self.target(c, path)
        data = json.dumps(self.body(method, path)).encode() if method not in ("GET", "HEAD") else None
        headers = {"Content-Type": "application/json", **self.headers[who]}
        if "webhooks" in path:
            secret = "another" if "unsigned" in path else SECRET
            headers |= {"X-GitHub-Event": "ping", "X-Hub-Signature-256": deploybot.signature_of(secret, data)}
        before = self.state(c) if data is not None else None
        sent = path if method in ("GET", "HEAD") else path.partition("?")[0]
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", c.port, timeout=20)) as connection:
            connection.request(method, sent, data, headers)
            status = connection.getresponse().status
        if status in (401, 403, 404, 405, 409):
            assert self.state(c) == before or data is None, f"{who} was refused {method} {path}, and something has changed"
        return status

    @staticmethod
    def state(c):
        """All that a call could have changed."""
        tables = ("jobs", "agents", "releases", "deliveries", "pushes", "deployments", "locks")
        with c.daemon.store.read() as db:
            rows = [db.rows(f"SELECT * FROM {table}") for table in tables]
            rows += [db.last_position(), db.one("SELECT count(*) FROM audit"), db.rows("SELECT id FROM tokens")]
            return [*rows, c.daemon.apps.all]

    def stop(self):
        self.closed.stop()
        self.open.stop()


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    made = Matrix(tmp_path_factory.mktemp("matrix"))
    yield made
    made.stop()


def route_of(method, path):
    with contextlib.suppress(deploybot.NotFound, deploybot.MethodNotAllowed):
        route, _ = Router(ROUTES).find(method, path.partition("?")[0])
        return route.method, route.pattern


def test_every_route_has_a_line():
    assert {route_of(*line) for line in ROWS} - {None} == {(route.method, route.pattern) for route in ROUTES}


@pytest.mark.parametrize(("method", "path"), ROWS, ids=[" ".join(line) for line in ROWS])
def test_role_by_route(matrix, method, path):
    matrix.clock.advance(61)  # each line has a minute of its own for the tokens that are not valid
    matrix.sign_everyone_in()
    found = {who: matrix.ask(who, method, path) for who in WHO}
    assert found == dict(zip(WHO, ROWS[method, path], strict=True))


def test_head_is_answered_as_get(matrix):
    for (method, path), expected in ROWS.items():
        if method == "GET":
            matrix.clock.advance(61)
            matrix.sign_everyone_in()
            found = {who: matrix.ask(who, "HEAD", path) for who in WHO}
            assert found == dict(zip(WHO, expected, strict=True)), path
