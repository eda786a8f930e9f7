"""Tokens: made, listed and revoked over the API; they end by the clock, with the one they came from, and nowhere else than in memory
and as a hash. What each role may call stands in test_auth.py."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import re
import sqlite3

import pytest
from conftest import TOKENS, EventStream, wait_for

import deploybot

WEB = {"name": "web", "repo": "myorg/web", "hosts": ["web-01", "web-02"]}
API = {"name": "api", "repo": "myorg/api", "hosts": ["web-01"]}
SHA = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("own", "other")}
DAY = 86400


@pytest.fixture
def c(make_controller, clock):
    """Closed, with the three configured tokens; calls are the admin's."""
    return make_controller(open=False, clock=clock, apps=json.dumps({"apps": [WEB, API]}), **TOKENS)


def made(c, role="operator", **more):
    """(the token, the controller called with its secret)."""
    answer = c.ok("POST", "/v1/tokens", {"role": role, **more})
    return answer["token"], c.acting(answer["secret"])


def status(c, method="GET", path="/v1/session", body=None):
    return c.call(method, path, body)[0]


def listed(c, name=None):
    """All, or the one of that name."""
    tokens = c.ok("GET", "/v1/tokens")["tokens"]
    return next(token for token in tokens if token["name"] == name) if name else tokens


def revoke(c, token):
    return c.call("DELETE", f"/v1/tokens/{token['id']}")


def signed_in(c, token):
    """The headers of a browser that signed in with this token."""
    code, headers, _ = c.raw("POST", "/v1/session", {"token": token}, {"Authorization": None})
    assert code == 200
    return {"Authorization": None, "Cookie": headers["Set-Cookie"].split(";")[0]}


def stored(c, sql, *values):
    """Rows of the database as another program sees them."""
    with sqlite3.connect(c.config.db) as db:
        return db.execute(sql, values).fetchall()


def at_once(c, *calls):
    """What calls that write answer, where all share one commit, in that order."""
    store = c.daemon.store
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        with store._writer:
            futures = []
            for number, call in enumerate(calls, 1):
                futures.append(pool.submit(call))
                wait_for(lambda number=number: len(store._waiting) == number)
        return [future.result(20) for future in futures]


# -- made --------------------------------------------------------------------------------------------------------------


def test_a_new_token_is_shown_whole_and_its_secret_once(c, clock):
    c.set_app(name="web", repo="myorg/web", hosts=["web-01"])
    asked = {"role": "operator", "name": "ci-web", "app": "web", "expires_in": 3600}
    code, answer = c.call("POST", "/v1/tokens", asked)
    token, secret = answer["token"], answer["secret"]
    assert (code, set(answer)) == (201, {"token", "secret"})
    assert re.fullmatch(r"dbt_[\w-]{43}", secret), "256 bits, and a prefix that can be searched for"
    assert deploybot.ID.fullmatch(token["id"])
    assert token == {
        **{"id": token["id"], "name": "ci-web", "role": "operator", "host": None, "app": "web"},
        **{"created_at": clock.stamp(), "created_by": "admin", "expires_at": clock.stamp(ago=-3600), "last_used_at": None},
    }
    assert c.acting(secret).ok("GET", "/v1/session") == {
        **{"name": "ci-web", "role": "operator", "app": "web", "host": None, "expires_at": token["expires_at"]}
    }
    assert listed(c) == [token]


def test_a_token_of_an_app_that_is_not_there_is_made_with_a_warning(c):
    c.set_app(name="web", repo="myorg/web", hosts=["web-01"])
    code, answer = c.call("POST", "/v1/tokens", {"role": "operator", "app": "wbe"})
    assert (code, answer["token"]["app"]) == (201, "wbe")
    assert answer["warning"] == "apps.yaml has no app wbe; did you mean web?"
    assert "warning" not in c.ok("POST", "/v1/tokens", {"role": "operator"})


def test_no_secret_is_kept_as_it_is(c):
    secrets = [c.ok("POST", "/v1/tokens", {"role": "viewer"})["secret"], "dbt_admin"]
    secrets.append(signed_in(c, "dbt_admin")["Cookie"].partition("=")[2])
    secrets.append(c.acting("dbt_agent").register()["token"])
    kept = b"".join(path.read_bytes() for path in c.folder.glob("deploybot.db*"))
    for secret in secrets:
        assert secret.encode() not in kept
    assert hashlib.sha256(secrets[0].encode()).hexdigest().encode() in kept


def test_two_secrets_are_never_the_same(c):
    assert len({c.ok("POST", "/v1/tokens", {"role": "viewer"})["secret"] for _ in range(20)}) == 20


def test_each_role_gets_a_name_of_its_own(c):
    for role, drained in (("admin", 404), ("operator", 404), ("viewer", 403), ("agent", 403)):  # 404: may, no such host
        token, mine = made(c, role)
        assert (token["name"], token["role"]) == (f"{role}-{token['id'][-6:]}", role)
        assert (token["expires_at"], token["created_by"]) == (None, "admin")
        assert status(mine, "POST", "/v1/hosts/nobody/drain") == drained, role


def test_who_made_it_is_named(c):
    _, boss = made(c, "admin", name="boss")
    token, _ = made(boss, "viewer", name="mine")
    assert token["created_by"] == "boss"
    assert (listed(c, "mine")["created_by"], [one["name"] for one in listed(c)]) == ("boss", ["boss", "mine"])


WRONG = [
    ({}, {"role"}),
    ({"role": "public"}, {"role"}),
    ({"role": "root"}, {"role"}),
    ({"role": 7}, {"role"}),
    ({"role": "viewer", "expires": 60}, {"expires"}),
    ({"role": "viewer", "expires_in": 59}, {"expires_in"}),
    ({"role": "viewer", "expires_in": 315360001}, {"expires_in"}),
    ({"role": "viewer", "expires_in": "30d"}, {"expires_in"}),
    ({"role": "viewer", "host": "web-01"}, {"host"}),
    ({"role": "operator", "host": "web-01"}, {"host"}),
    ({"role": "admin", "host": "web-01"}, {"host"}),
    ({"role": "agent", "app": "web"}, {"app"}),
    ({"role": "admin", "app": "web"}, {"app"}),
    ({"role": "agent", "host": "web_01"}, {"host"}),
    ({"role": "viewer", "app": "Web"}, {"app"}),
    *[({"role": "viewer", "name": name}, {"name"}) for name in ("", "-x", ".x", "a b", "a/b", "ä", "x" * 65, "a\n", 7)],
]


def test_what_is_no_token_is_refused_with_its_fields(c):
    for asked, fields in WRONG:
        code, answer = c.call("POST", "/v1/tokens", asked)
        assert (code, {error["field"] for error in answer["errors"]}) == (422, fields), asked
    assert listed(c) == []


def test_names_and_lives_up_to_their_limits_are_taken(c, clock):
    for name in ("x", "CI_web-2.main@github", "x" * 63 + "y", "0"):
        assert made(c, "viewer", name=name)[0]["name"] == name
    for seconds in (60, 315360000):
        assert made(c, "viewer", expires_in=seconds)[0]["expires_at"] == clock.stamp(ago=-seconds)


def test_no_token_takes_the_name_of_what_is_configured(c):
    """The audit could not tell them apart."""
    for name in ("admin", "agents", "reader", "local", "github", "controller"):
        assert status(c, "POST", "/v1/tokens", {"role": "viewer", "name": name}) == 409
    assert listed(c) == []


def test_a_name_is_in_use_until_its_token_is_revoked(c, clock):
    token, _ = made(c, "viewer", name="ci", expires_in=60)
    code, answer = c.call("POST", "/v1/tokens", {"role": "operator", "name": "ci"})
    assert (code, "revoke" in answer["detail"]) == (409, True)
    clock.advance(61)  # also one that ran out is told apart by its name
    assert c.call("POST", "/v1/tokens", {"role": "operator", "name": "ci"})[0] == 409
    assert revoke(c, token)[0] == 200
    assert made(c, "operator", name="ci")[0]["role"] == "operator"


def test_of_many_that_want_a_name_at_once_one_gets_it(c):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(lambda _: status(c, "POST", "/v1/tokens", {"role": "viewer", "name": "one"}), range(8)))
    assert sorted(codes) == [201] + [409] * 7
    assert len(listed(c)) == 1


# -- listed, used ------------------------------------------------------------------------------------------------------


def test_the_list_is_in_order_of_age_and_without_sign_ins(c, clock):
    names = ["zeta", "alpha", "mid"]
    for name in names:
        made(c, "viewer", name=name)
        clock.advance(1)
    signed_in(c, "dbt_admin")
    assert [token["name"] for token in listed(c)] == names
    c.restart()
    assert [token["name"] for token in listed(c)] == names
    assert not {"sha256", "parent", "secret"} & {key for token in listed(c) for key in token}


def test_the_last_use_is_told_and_outlives_a_restart(c, clock):
    token, mine = made(c, name="ci")
    clock.advance(DAY)
    used = clock.stamp()
    assert status(mine) == 200
    clock.advance(deploybot.FLUSH_INTERVAL)
    c.daemon.sweep()
    at = listed(c, "ci")["last_used_at"]
    assert deploybot.unix_time(at) - deploybot.unix_time(used) <= deploybot.FLUSH_INTERVAL
    clock.advance(DAY)
    c.daemon.sweep()
    assert listed(c, "ci")["last_used_at"] == at, "nobody used it since"
    c.restart()
    assert listed(c, "ci") == {**token, "last_used_at": at}


def test_a_use_just_before_the_stop_is_not_forgotten(c, clock):
    _, mine = made(c, name="ci")
    clock.advance(1)
    assert status(mine) == 200
    c.restart()
    assert listed(c, "ci")["last_used_at"] is not None


def test_a_browser_that_stays_signed_in_is_no_use_of_its_token(c, clock):
    token = c.ok("POST", "/v1/tokens", {"role": "viewer", "name": "eve"})
    signed_in(c, token["secret"])
    clock.advance(deploybot.FLUSH_INTERVAL)
    c.daemon.sweep()
    before = listed(c, "eve")["last_used_at"]
    for _ in range(3):
        clock.advance(3600)
        c.daemon.sweep()
    assert listed(c, "eve")["last_used_at"] == before


def test_a_token_that_was_refused_was_not_used(c, clock):
    _, mine = made(c, "viewer", name="old", expires_in=60)
    clock.advance(60)
    assert status(mine) == 401
    clock.advance(deploybot.FLUSH_INTERVAL)
    c.daemon.sweep()
    assert listed(c, "old")["last_used_at"] is None


# -- ended -------------------------------------------------------------------------------------------------------------


def test_a_token_ends_at_its_time(c, clock):
    token, mine = made(c, expires_in=60)
    clock.advance(59.999)
    assert status(mine) == 200
    clock.advance(0.001)
    assert (clock.stamp(), status(mine)) == (token["expires_at"], 401)
    assert listed(c) == [{**token, "last_used_at": None}], "it is shown until it is revoked"


def test_a_token_that_ended_stays_ended_after_a_restart(c, clock):
    _, mine = made(c, expires_in=60)
    _, other = made(c)
    clock.advance(61)
    c.restart()
    assert (status(mine), status(other)) == (401, 200)


def test_a_revoked_token_is_gone_at_once_and_for_good(c):
    token, mine = made(c, name="ci")
    assert status(mine) == 200
    assert revoke(c, token) == (200, {"token": token})
    assert status(mine) == 401
    assert (revoke(c, token)[0], listed(c)) == (404, [])
    c.restart()
    assert (status(mine), listed(c)) == (401, [])


def test_revoking_what_is_no_token_is_404(c):
    made(c)
    for token_id in ("nothing", "01a208d2-125d-7000-9179-b171dcd08d79", "x" * 500, "%00"):
        code, answer = c.call("DELETE", f"/v1/tokens/{token_id}")
        assert (code, len(listed(c)), len(answer["detail"]) < 200) == (404, 1, True)


def test_a_token_that_never_was_ran_out_or_was_revoked_gets_one_answer(c, clock):
    """So that nobody can find out which of them ever counted."""
    token, revoked = made(c)
    _, expired = made(c, expires_in=60)
    revoke(c, token)
    clock.advance(60)
    answers = set()
    for mine in (revoked, expired, c.acting("dbt_" + "x" * 43), c.acting("x")):
        code, headers, body = mine.raw("GET", "/v1/jobs")
        answers.add((code, body, tuple(name for name, _ in headers.items()), headers["WWW-Authenticate"]))
    assert len(answers) == 1 and next(iter(answers))[0] == 401


def test_an_admin_may_revoke_the_token_that_it_uses(c):
    token, mine = made(c, "admin")
    assert revoke(mine, token)[0] == 200
    assert status(mine) == 401


def test_revoked_while_its_last_use_is_written_it_stays_revoked(c, clock):
    """Both changes share one commit."""
    token, mine = made(c, name="ci")
    assert status(mine) == 200
    clock.advance(deploybot.FLUSH_INTERVAL)
    at_once(c, lambda: revoke(c, token), c.daemon.auth.sweep)
    assert (status(mine), listed(c)) == (401, [])


def test_of_two_that_revoke_a_token_at_once_one_did_it(c):
    token, _ = made(c, name="ci")
    answers = at_once(c, *[lambda: revoke(c, token)[0]] * 2)
    assert answers == [200, 404]
    assert [row["action"] for row in c.ok("GET", "/v1/audit")["audit"]] == ["token.revoke", "token.create"]


@pytest.mark.parametrize("how", ["its token", "its sign-in", "its parent", "its time"])
def test_a_stream_ends_with_its_token(c, clock, how):
    answer = c.ok("POST", "/v1/tokens", {"role": "viewer", "expires_in": 60})
    token, secret = answer["token"], answer["secret"]
    headers = signed_in(c, secret) if how in ("its sign-in", "its parent") else None
    cookie = {"Cookie": headers["Cookie"]} if headers else {}
    with EventStream(c.acting(None if headers else secret), headers=cookie) as stream:
        assert stream.status == 200
        c.create()
        assert next(iter(stream))["event"] == "job"
        if how == "its sign-in":
            assert c.call("DELETE", "/v1/session", headers=headers)[0] == 200
        elif how == "its time":
            clock.advance(61)
        else:
            revoke(c, token)
        c.create("secret")
        assert (list(stream), stream.was_cut) == ([], False), "not even the event that came next"


# -- sign-ins of browsers ----------------------------------------------------------------------------------------------


def test_a_sign_in_is_a_cookie_that_no_script_and_no_other_site_gets(c, clock):
    code, headers, body = c.raw("POST", "/v1/session", {"token": "dbt_read"}, {"Authorization": None})
    cookie = headers["Set-Cookie"]
    assert code == 200
    assert re.fullmatch(r"deploybot_session=dbt_[\w-]{43}; Path=/; Max-Age=604800; HttpOnly; SameSite=Strict", cookie)
    who = {"name": "reader", "role": "viewer", "app": None, "host": None, "expires_at": clock.stamp(ago=-7 * DAY)}
    assert json.loads(body) == who
    browser = {"Authorization": None, "Cookie": "theme=dark; " + cookie.split(";")[0]}
    assert c.call("GET", "/v1/session", headers=browser) == (200, who)
    assert c.call("GET", "/v1/jobs", headers=browser)[0] == 200
    assert c.call("POST", "/v1/jobs", {}, headers=browser)[0] == 403, "it has the role of its token"


def test_a_sign_in_has_role_app_and_name_of_its_token(c):
    answer = c.ok("POST", "/v1/tokens", {"role": "operator", "name": "ci", "app": "web"})
    browser = signed_in(c, answer["secret"])
    who = c.call("GET", "/v1/session", headers=browser)[1]
    assert (who["name"], who["role"], who["app"]) == ("ci", "operator", "web")
    asked = {"repo": "myorg/web", "ref": "main", "host": "web-01"}
    assert c.call("POST", "/v1/jobs", asked, headers=browser)[1]["job"]["created_by"] == "ci"
    assert c.call("POST", "/v1/jobs", {**asked, "repo": "myorg/api"}, headers=browser)[0] == 403


def test_a_sign_in_names_a_token(c):
    for sent in ({}, {"token": ""}, {"token": " "}, {"token": 7}, {"token": "x", "more": 1}, []):
        assert c.call("POST", "/v1/session", sent, {"Authorization": None})[0] == 422, sent


def test_a_wrong_token_signs_nobody_in(c):
    code, headers, _ = c.raw("POST", "/v1/session", {"token": "wrong"}, {"Authorization": None})
    assert (code, headers["Set-Cookie"]) == (401, None)
    assert stored(c, "SELECT count(*) FROM tokens") == [(0,)]


def test_an_agent_signs_in_nowhere(c):
    _, host = made(c, "agent", host="web-01")
    own = c.acting("dbt_agent").register("web-02")["token"]
    for token in ("dbt_agent", host.token, own):
        assert c.call("POST", "/v1/session", {"token": token}, {"Authorization": None})[0] == 403
    assert stored(c, "SELECT count(*) FROM tokens WHERE parent IS NOT NULL") == [(0,)]


def test_a_sign_in_ends_after_a_week(c, clock):
    browser = signed_in(c, "dbt_admin")
    clock.advance(7 * DAY - 1)
    assert c.call("GET", "/v1/session", headers=browser)[0] == 200
    clock.advance(1)
    assert c.call("GET", "/v1/session", headers=browser)[0] == 401
    clock.advance(deploybot.FLUSH_INTERVAL)
    c.daemon.sweep()
    assert stored(c, "SELECT count(*) FROM tokens") == [(0,)], "the database does not gather them"


def test_a_sign_in_ends_no_later_than_its_token(c, clock):
    answer = c.ok("POST", "/v1/tokens", {"role": "viewer", "expires_in": 3600})
    clock.advance(1000)
    browser = signed_in(c, answer["secret"])
    assert c.call("GET", "/v1/session", headers=browser)[1]["expires_at"] == answer["token"]["expires_at"]
    clock.advance(2600)
    assert c.call("GET", "/v1/session", headers=browser)[0] == 401


def test_a_sign_in_of_a_sign_in_lives_no_longer_and_ends_with_the_token(c, clock):
    answer = c.ok("POST", "/v1/tokens", {"role": "viewer"})
    first = signed_in(c, answer["secret"])
    clock.advance(6 * DAY)
    second = signed_in(c, first["Cookie"].partition("=")[2])
    assert c.call("GET", "/v1/session", headers=second)[1]["expires_at"] == clock.stamp(ago=-DAY)
    revoke(c, answer["token"])
    assert [c.call("GET", "/v1/session", headers=browser)[0] for browser in (first, second)] == [401, 401]


def test_sign_ins_end_with_their_token(c):
    """And no others."""
    answer = c.ok("POST", "/v1/tokens", {"role": "viewer"})
    mine = [signed_in(c, answer["secret"]) for _ in range(2)]
    other = signed_in(c, "dbt_read")
    revoke(c, answer["token"])
    for restart in (False, True):
        if restart:
            c.restart()
        assert [c.call("GET", "/v1/jobs", headers=browser)[0] for browser in [*mine, other]] == [401, 401, 200]
    assert stored(c, "SELECT count(*) FROM tokens") == [(1,)]


def test_sign_ins_outlive_a_restart(c, clock):
    browser = signed_in(c, "dbt_admin")
    before = c.call("GET", "/v1/session", headers=browser)
    clock.advance(DAY)
    c.restart()
    assert c.call("GET", "/v1/session", headers=browser) == before
    assert c.call("GET", "/v1/tokens", headers=browser)[0] == 200


def test_sign_ins_end_where_the_configured_token_changes(c, clock):
    admin, reader = signed_in(c, "dbt_admin"), signed_in(c, "dbt_read")
    c.restart(token="dbt_changed")
    c.token = "dbt_changed"
    assert [c.call("GET", "/v1/session", headers=browser)[0] for browser in (admin, reader)] == [401, 200]
    c.restart(token="dbt_changed", read_token=None)
    assert c.call("GET", "/v1/session", headers=reader)[0] == 401
    clock.advance(deploybot.FLUSH_INTERVAL)
    c.daemon.sweep()
    assert stored(c, "SELECT count(*) FROM tokens") == [(0,)]


def test_signing_out_ends_the_cookie_and_nothing_else(c):
    answer = c.ok("POST", "/v1/tokens", {"role": "viewer"})
    mine, other = (signed_in(c, answer["secret"]) for _ in range(2))
    code, headers, body = c.raw("DELETE", "/v1/session", headers=mine)
    assert (code, json.loads(body)) == (200, {})
    assert headers["Set-Cookie"].startswith("deploybot_session=; Path=/; Max-Age=0;")
    assert [c.call("GET", "/v1/session", headers=browser)[0] for browser in (mine, other)] == [401, 200]
    assert c.raw("DELETE", "/v1/session", headers=mine)[0] == 200, "once more does no harm"
    assert status(c.acting(answer["secret"]), "DELETE") == 200
    assert status(c.acting(answer["secret"])) == 200, "a token is revoked, not signed out"


def test_of_many_sign_ins_with_one_token_the_oldest_goes(c, clock, monkeypatch):
    """Who holds a token cannot fill the database with them."""
    monkeypatch.setattr(deploybot, "MAX_SESSIONS", 3)
    other, browsers = signed_in(c, "dbt_read"), []
    for _ in range(5):
        clock.advance(1)
        browsers.append(signed_in(c, "dbt_admin"))
    assert [c.call("GET", "/v1/session", headers=one)[0] for one in [*browsers, other]] == [401, 401, 200, 200, 200, 200]
    for _ in range(5):  # nor by signing in with the sign-in before
        clock.advance(1)
        browsers.append(signed_in(c, browsers[-1]["Cookie"].partition("=")[2]))
    assert stored(c, "SELECT count(*) FROM tokens") == [(4,)]
    assert c.call("DELETE", "/v1/session", headers=browsers[-2])[0] == 200
    assert c.call("GET", "/v1/session", headers=browsers[-1])[0] == 200, "it hangs on the token alone"


def test_at_the_limit_two_may_sign_in_at_once(c, monkeypatch):
    """For both the oldest is the same one."""
    monkeypatch.setattr(deploybot, "MAX_SESSIONS", 2)
    for _ in range(2):
        signed_in(c, "dbt_admin")
    browsers = at_once(c, *[lambda: signed_in(c, "dbt_admin")] * 2)
    assert [c.call("GET", "/v1/session", headers=one)[0] for one in browsers] == [200, 200]


def test_a_token_that_is_sent_counts_for_more_than_the_cookie(c):
    browser = {**signed_in(c, "dbt_read"), "Authorization": "Bearer dbt_admin"}
    assert c.call("GET", "/v1/session", headers=browser)[1]["name"] == "admin"
    assert c.call("GET", "/v1/session", headers={**browser, "Authorization": "Bearer wrong"})[0] == 401


# -- the tokens of hosts -----------------------------------------------------------------------------------------------


def four_calls(agent, controller, job):
    """Statuses of the calls of an agent, made in that order."""
    log = {"attempt": job["attempt"], "offset": 0, "lines": [{"message": "x"}]}
    return [
        status(controller, "POST", "/v1/agents/register", {"hostname": agent["hostname"]}),
        status(controller, "POST", f"/v1/agents/{agent['id']}/heartbeat", {"status": "online"}),
        status(controller, "POST", f"/v1/jobs/{job['id']}/logs", log),
        status(controller, "POST", f"/v1/jobs/{job['id']}/result", {"attempt": job["attempt"], "status": "success"}),
    ]


def running(c, host="web-01", **more):
    """(agent, its running job), by the admin."""
    agent = c.register(host, **more)
    c.create(host=host)
    return agent, c.beat(agent)["job"]


def test_an_enrolment_token_registers_and_nothing_else(c):
    agent, job = running(c)
    for enrols in (c.acting("dbt_agent"), made(c, "agent", name="enrol")[1]):
        assert four_calls(agent, enrols, job)[1:] == [403, 403, 403]
        _, answer = enrols.call("POST", f"/v1/agents/{agent['id']}/heartbeat", {"status": "online"})
        assert "the host's own secret" in answer["detail"]
    assert c.job(job["id"])["status"] == "running"


def test_an_agent_without_a_secret_is_told_one_once(c):
    enrols = c.acting("dbt_agent")
    agent = enrols.register("web-01")
    assert re.fullmatch(r"dbt_[\w-]{43}", agent["token"])
    own = c.acting(agent["token"])
    c.create()
    job = own.beat(agent)["job"]
    assert four_calls(agent, own, job) == [200] * 4
    assert "token" not in own.register("web-01")
    code, answer = enrols.call("POST", "/v1/agents/register", {"hostname": "web-01"})
    assert (code, "ctl.py hosts reset web-01" in answer["detail"]) == (409, True)
    assert own.beat(own.register("web-01"))["acknowledged"], "the refused registration changed nothing"


def test_a_secret_of_the_agents_own_is_bound_and_repeated_without_harm(c):
    enrols = c.acting("dbt_agent")
    first = enrols.register("web-01", token_sha256=SHA["own"])
    again = enrols.register("web-01", token_sha256=SHA["own"])
    assert (first["id"], "token" in first, "token" in again) == (again["id"], False, False)
    assert status(c.acting("own"), "POST", "/v1/agents/register", {"hostname": "web-01"}) == 200
    for more in ({}, {"token_sha256": SHA["other"]}):
        code, answer = enrols.call("POST", "/v1/agents/register", {"hostname": "web-01", **more})
        assert (code, "ctl.py hosts reset web-01" in answer["detail"]) == (409, True)
    assert status(c.acting("other")) == 401


def test_a_secret_speaks_for_its_host_alone(c):
    agents = [c.register(host, token_sha256=SHA[name]) for host, name in (("web-01", "own"), ("web-02", "other"))]
    c.create(host="web-02")
    job = c.beat(agents[1])["job"]
    assert four_calls(agents[1], c.acting("own"), job) == [403] * 4
    assert c.job(job["id"])["status"] == "running"
    assert four_calls(agents[1], c.acting("other"), job) == [200] * 4


def test_the_secret_of_one_host_is_not_taken_by_another(c):
    enrols = c.acting("dbt_agent")
    enrols.register("web-01", token_sha256=SHA["own"])
    for caller in (enrols, c):
        assert status(caller, "POST", "/v1/agents/register", {"hostname": "web-02", "token_sha256": SHA["own"]}) == 409
    assert [host["hostname"] for host in c.ok("GET", "/v1/hosts")["hosts"]] == ["web-01"]


def test_the_token_of_a_host_makes_its_calls_and_no_others(c):
    _, mine = made(c, "agent", host="Web-01")
    agent = mine.register("web-01")
    assert "token" not in agent
    c.create()
    job = mine.beat(agent)["job"]
    other, others = running(c, "web-02")
    assert four_calls(other, mine, others) == [403] * 4
    assert four_calls(agent, mine, job) == [200] * 4
    code, answer = mine.call("POST", "/v1/agents/register", {"hostname": "web-03"})
    assert (code, answer["detail"]) == (403, "this token belongs to web-01, not to web-03")


def test_the_token_of_a_host_replaces_no_secret(c):
    c.acting("dbt_agent").register("web-01", token_sha256=SHA["own"])
    _, mine = made(c, "agent", host="web-01")
    assert status(mine, "POST", "/v1/agents/register", {"hostname": "web-01", "token_sha256": SHA["other"]}) == 409
    mine.register("web-01", token_sha256=SHA["own"])
    mine.register("web-01")
    assert status(c.acting("own"), "POST", "/v1/agents/register", {"hostname": "web-01"}) == 200
    assert status(c.acting("other")) == 401


def test_a_host_may_change_its_own_secret(c):
    agent = c.acting("dbt_agent").register("web-01", token_sha256=SHA["own"])
    renewed = c.acting("own").register("web-01", token_sha256=SHA["other"])
    assert (renewed["id"], status(c.acting("own"))) == (agent["id"], 401)
    assert c.acting("other").beat(renewed)["acknowledged"]
    c.restart()
    assert (status(c.acting("own")), c.acting("other").beat(renewed)["acknowledged"]) == (401, True)


def test_an_admin_may_bind_anew(c):
    c.acting("dbt_agent").register("web-01", token_sha256=SHA["own"])
    c.register("web-01", token_sha256=SHA["other"])
    assert status(c.acting("own")) == 401
    c.register("web-01")
    assert status(c.acting("other"), "POST", "/v1/agents/register", {"hostname": "web-01"}) == 200, "none sent, none lost"


@pytest.mark.parametrize("how", ["reset", "remove"])
def test_after_a_reset_the_old_secret_is_none_and_the_host_enrols_anew(c, how):
    enrols = c.acting("dbt_agent")
    agent = enrols.register("web-01", token_sha256=SHA["own"])
    if how == "reset":
        answer = c.ok("POST", "/v1/hosts/WEB-01/reset")["host"]
        assert (answer["hostname"], answer["agent_id"]) == ("web-01", agent["id"])
    else:
        c.ok("DELETE", "/v1/hosts/web-01")
    for restart in (False, True):
        if restart:
            c.restart()
        assert status(c.acting("own"), "POST", f"/v1/agents/{agent['id']}/heartbeat", {"status": "online"}) == 401
        assert status(c.acting("own"), "POST", "/v1/agents/register", {"hostname": "web-01"}) == 401
    anew = enrols.register("web-01", token_sha256=SHA["other"])
    assert (anew["id"] == agent["id"]) == (how == "reset")
    assert c.acting("other").beat(anew)["acknowledged"]


def test_a_reset_ends_the_session_also_for_a_token_that_still_counts(c):
    """404, not 409: register again, nobody else has the host."""
    _, mine = made(c, "agent", host="web-01")
    agent = mine.register("web-01")
    c.ok("POST", "/v1/hosts/web-01/reset")
    beat = {"status": "online", "session": agent["session"]}
    assert status(mine, "POST", f"/v1/agents/{agent['id']}/heartbeat", beat) == 404
    again = mine.register("web-01")
    assert mine.beat(again, session=again["session"])["acknowledged"]


def test_a_host_that_was_reset_is_offline_and_keeps_its_job(c):
    agent = c.acting("dbt_agent").register("web-01", token_sha256=SHA["own"])
    c.create()
    job = c.acting("own").beat(agent)["job"]
    host = c.ok("POST", "/v1/hosts/web-01/reset")["host"]
    assert (host["agent_status"], host["running"]) == ("offline", 1)
    anew = c.acting("dbt_agent").register("web-01", token_sha256=SHA["other"])
    held = [{"job_id": job["id"], "attempt": job["attempt"]}]
    assert c.acting("other").beat(anew, session=anew["session"], running=held)["cancel"] == []
    assert c.acting("other").end(job)["status"] == "success"


def test_nobody_to_reset_is_404(c):
    c.register("web-01")
    code, answer = c.call("POST", "/v1/hosts/web-02/reset")
    assert (code, answer["detail"]) == (404, "no agent has registered as web-02; did you mean web-01?")


def test_a_drained_host_keeps_contact_secret_and_job(c, clock):
    """What a change of one column leaves as it was."""
    agent = c.acting("dbt_agent").register("web-01", token_sha256=SHA["own"])
    own = c.acting("own")
    c.create()
    job = own.beat(agent)["job"]
    for _ in range(20):
        clock.advance(50)
        own.beat(agent, session=agent["session"], running=[{"job_id": job["id"], "attempt": 1}])
    before = c.ok("GET", "/v1/hosts")["hosts"][0]
    drained = c.ok("POST", "/v1/hosts/web-01/drain")["host"]
    assert drained == {**before, "drained": True}
    c.daemon.sweep()
    assert c.job(job["id"])["status"] == "running"
    assert own.beat(agent, session=agent["session"])["acknowledged"]
    assert c.ok("POST", "/v1/hosts/web-01/resume")["host"] == {**before, "last_seen": clock.stamp()}


# -- the tokens of apps ------------------------------------------------------------------------------------------------


@pytest.fixture
def ci(c):
    """What may deploy the app web, and nothing else."""
    return made(c, "operator", name="ci", app="web")[1]


ASKED = {"repo": "myorg/web", "ref": "main", "host": "web-01"}


def test_the_token_of_an_app_deploys_that_app(c, ci):
    for more in ({}, {"app": "web", "host": "web-02"}, {"repo": "MyOrg/WEB", "ref": "v1"}):
        code, answer = ci.call("POST", "/v1/jobs", {**ASKED, **more})
        assert (code, answer["job"]["app"], answer["job"]["created_by"]) == (201, "web", "ci")
    job = ci.ok("GET", "/v1/jobs")["jobs"][0]
    assert ci.ok("POST", f"/v1/jobs/{job['id']}/cancel")["job"]["status"] == "cancelled"
    assert ci.ok("POST", f"/v1/jobs/{job['id']}/retry")["job"]["retry_of"] == job["id"]


def test_the_token_of_an_app_deploys_nothing_else(c, ci):
    for more in (
        *({"repo": "myorg/api"}, {"repo": "myorg/api", "app": "api"}, {"repo": "myorg/api", "app": "web"}),
        *({"repo": "evil/web"}, {"repo": "evil/web", "app": "web"}, {"app": "other"}),
        *({"host": "db-01"}, {"host": "db-01", "app": "web"}),
    ):
        assert status(ci, "POST", "/v1/jobs", {**ASKED, **more}) in (403, 422), more
    assert c.ok("GET", "/v1/jobs")["jobs"] == []


def test_no_other_repository_comes_by_the_name_that_it_would_have(c):
    """An app without an entry is named owner--name: one that has an entry of that name is not it."""
    c.set_app(name="acme--web", repo="acme/website", hosts=["web-01"])
    _, ci = made(c, "operator", app="acme--web")
    assert status(ci, "POST", "/v1/jobs", {**ASKED, "repo": "acme/website"}) == 201
    assert status(ci, "POST", "/v1/jobs", {**ASKED, "repo": "acme/web"}) in (403, 422)
    assert {job["repo"] for job in c.ok("GET", "/v1/jobs")["jobs"]} == {"acme/website"}


def test_an_app_that_apps_yaml_lost_is_not_deployed(c, ci):
    job = ci.create(**ASKED)
    c.ok("POST", f"/v1/jobs/{job['id']}/cancel")
    c.set_app(**API)
    assert status(ci, "POST", "/v1/jobs", {**ASKED, "app": "web"}) == 403
    assert status(ci, "POST", f"/v1/jobs/{job['id']}/retry") == 403


def test_the_token_of_an_app_sees_that_app_alone(c, ci):
    mine, other = c.create(**ASKED), c.create(repo="myorg/api")
    assert [job["id"] for job in ci.ok("GET", "/v1/jobs")["jobs"]] == [mine["id"]]
    assert [job["id"] for job in ci.ok("GET", "/v1/jobs?app=web&host=web-01")["jobs"]] == [mine["id"]]
    assert [app["name"] for app in ci.ok("GET", "/v1/apps")["apps"]] == ["web"]
    assert status(ci, "GET", "/v1/jobs?app=api") == 403
    for query in ("app=api", f"job_id={other['id']}"):
        with EventStream(ci, "/v1/logs/stream?" + query) as stream:
            assert stream.status == 403
    for method, path in (("GET", ""), ("GET", "/logs"), ("POST", "/cancel"), ("POST", "/retry")):
        assert status(ci, method, f"/v1/jobs/{other['id']}{path}") == 403
        assert status(ci, method, f"/v1/jobs/{mine['id']}{path}") in (200, 201)
    assert c.job(other["id"])["status"] == "pending"


def test_the_text_of_another_apps_log_is_refused_too(c, ci):
    agent = c.register()
    c.create(repo="myorg/api")
    job = c.beat(agent)["job"]
    c.logs(job, "secret of the api")
    code, _, body = ci.raw("GET", f"/v1/jobs/{job['id']}/logs", headers={"Accept": "text/plain"})
    assert code == 403 and b"secret of" not in body


def test_the_stream_of_an_app_brings_that_app_alone(c, ci):
    with EventStream(ci, "/v1/logs/stream?tail=0") as stream:
        c.create(repo="myorg/api")
        mine = c.create(**ASKED)
        assert next(iter(stream))["data"]["id"] == mine["id"]


def test_all_the_rest_is_not_for_the_token_of_an_app(c, ci):
    c.register()
    for method, path in (
        *(("GET", "/v1/hosts"), ("GET", "/metrics"), ("GET", "/v1/audit"), ("GET", "/v1/tokens"), ("POST", "/v1/tokens")),
        *(("POST", "/v1/hosts/web-01/drain"), ("POST", "/v1/hosts/web-01/resume"), ("POST", "/v1/reload")),
    ):
        assert status(ci, method, path) == 403, path


def test_a_viewer_of_an_app_changes_nothing(c):
    mine = c.create(**ASKED)
    _, viewer = made(c, "viewer", app="web")
    assert viewer.job(mine["id"]) == mine
    for path in ("/v1/jobs", f"/v1/jobs/{mine['id']}/cancel", f"/v1/jobs/{mine['id']}/retry"):
        assert status(viewer, "POST", path, ASKED) == 403
