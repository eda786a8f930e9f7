"""Limits: failed sign-ins, writes of a token, whose address counts, large bodies, connections, and that no table grows for ever."""

import concurrent.futures
import contextlib
import http.client
import json
import socket
import threading
import time
import tracemalloc

import pytest
from conftest import SECRET, TOKENS, wait_for

import deploybot
from deploybot import RateLimit, TooMany, forwarded, networks

HOST = b"Host: localhost\r\n"
SIGNED = b"X-Hub-Signature-256: sha256=" + b"0" * 64 + b"\r\n"
JOB = {"repo": "o/n", "ref": "main", "host": "web-01"}


@pytest.fixture
def closed(make_controller, clock):
    return make_controller(open=False, clock=clock, webhook_secret=SECRET, **TOKENS)


def ask(controller, method="GET", path="/v1/jobs", body=None, token="dbt_wrong", source="127.0.0.1", **headers):
    """(status, headers, answer) of a call from that address; a token of None is none."""
    connection = http.client.HTTPConnection("127.0.0.1", controller.port, timeout=30, source_address=(source, 0))
    with contextlib.closing(connection):
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token:
            sent["Authorization"] = f"Bearer {token}"
        connection.request(method, path, body if body is None else json.dumps(body), sent)
        answer = connection.getresponse()
        data = answer.read()
        return answer.status, answer.headers, json.loads(data) if data[:1] == b"{" else {}


def fail(controller, times, **more):
    return [ask(controller, **more)[0] for _ in range(times)]


# -- failed sign-ins ---------------------------------------------------------------------------------------------------


def test_the_eleventh_failed_sign_in_of_a_minute_is_429_until_it_is_over(closed, clock):
    assert fail(closed, 10) == [401] * 10
    clock.advance(20)
    status, headers, problem = ask(closed)
    assert status == 429 and headers["Content-Type"] == "application/problem+json"
    assert headers["Retry-After"] == "40" and problem["retry_after"] == 40
    clock.advance(39)
    assert ask(closed)[1]["Retry-After"] == "1"
    clock.advance(1)
    assert fail(closed, 11) == [401] * 10 + [429]


def test_a_valid_token_is_never_locked_out(closed):
    """Else whoever shares an address with an agent (a proxy, a NAT, an attacker who forges nothing) could stop its deployments."""
    host_token = closed.ok("POST", "/v1/tokens", {"role": "agent", "host": "web-01"})["secret"]
    fail(closed, 15)
    for token in ("dbt_admin", "dbt_read"):
        assert ask(closed, token=token)[0] == 200
    agent = ask(closed, "POST", "/v1/agents/register", {"hostname": "web-02"}, "dbt_agent")[2]
    for token, hostname in ((host_token, "web-01"), (agent["token"], "web-02")):
        status, _, registered = ask(closed, "POST", "/v1/agents/register", {"hostname": hostname}, token)
        assert status == 200
        beat = f"/v1/agents/{registered['id']}/heartbeat"
        assert ask(closed, "POST", beat, {"status": "online"}, token)[0] == 200
    assert ask(closed, "POST", "/v1/session", {"token": "dbt_admin"}, None)[0] == 200
    assert ask(closed)[0] == 429, "and the others still are"


def test_all_ways_to_send_a_wrong_token_count_together(closed):
    token = closed.ok("POST", "/v1/tokens", {"role": "viewer"})
    closed.ok("DELETE", f"/v1/tokens/{token['token']['id']}")
    gone = token["secret"]
    ways = (
        {}, {"method": "POST", "body": JOB}, {"path": "/v1/hosts"}, {"token": gone}, {"token": "dbt_Admin"}, {"method": "POST", "path": "/v1/reload"},
        {"method": "POST", "path": "/v1/agents/register", "body": {"hostname": "web-01"}}, {"path": "/v1/session"}, {"path": "/metrics"},
        {"method": "POST", "path": "/v1/session", "body": {"token": "dbt_wrong"}, "token": None},
    )  # fmt: skip
    assert [ask(closed, **way)[0] for way in ways] == [401] * 10
    assert [ask(closed, **way)[0] for way in ways] == [429] * 10, "the revoked one too: there is no telling them apart"


def test_what_sends_no_token_is_no_failed_sign_in(closed):
    assert fail(closed, 20, token=None) == [401] * 20
    assert [ask(closed, token=None, Authorization="Basic eDp5")[0] for _ in range(20)] == [401] * 20
    assert [ask(closed, token=None, path="/health")[0] for _ in range(20)] == [200] * 20
    assert ask(closed)[0] == 401


def test_a_guess_in_a_cookie_finds_nothing(closed):
    """A cookie counts only where a sign-in made it: so the tokens that people chose cannot be tried through it, at any speed."""
    for token in ("dbt_admin", "dbt_read", "dbt_wrong"):
        assert ask(closed, token=None, Cookie=f"deploybot_session={token}")[0] == 401


def test_each_address_has_its_own(closed):
    assert fail(closed, 12, source="127.0.0.2")[-1] == 429
    assert ask(closed, source="127.0.0.3")[0] == 401
    assert ask(closed, source="127.0.0.1")[0] == 401


def test_many_at_once_are_counted_one_by_one(closed):
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(lambda _: ask(closed)[0], range(40)))
    assert sorted(statuses) == [401] * 10 + [429] * 30


def test_a_guess_is_told_to_the_log_without_the_token(closed, caplog):
    ask(closed, token="dbt_nearly_right", source="127.0.0.2")
    assert "dbt_nearly" not in caplog.text


# -- whose address -----------------------------------------------------------------------------------------------------

FAR = "203.0.113.7"


@pytest.mark.parametrize("peer, given, trusted, expected", [
    ("127.0.0.1", FAR, "", "127.0.0.1"), ("127.0.0.1", FAR, "127.0.0.1", FAR), ("127.0.0.2", FAR, "127.0.0.1", "127.0.0.2"),
    ("127.0.0.1", f"9.9.9.9, {FAR}", "127.0.0.1", FAR), ("127.0.0.1", f"{FAR}, 10.0.0.5", "127.0.0.1,10.0.0.0/8", FAR),
    ("127.0.0.1", f"9.9.9.9,{FAR} ,\t10.0.0.5", "127.0.0.0/8, 10.0.0.0/8", FAR), ("127.0.0.1", "10.0.0.5", "127.0.0.1,10.0.0.0/8", "127.0.0.1"),
    ("127.0.0.1", None, "127.0.0.1", "127.0.0.1"), ("127.0.0.1", "", "127.0.0.1", "127.0.0.1"), ("127.0.0.1", " , ,", "127.0.0.1", "127.0.0.1"),
    ("127.0.0.1", "evil", "127.0.0.1", "127.0.0.1"), ("127.0.0.1", f"{FAR}, evil", "127.0.0.1", "127.0.0.1"), ("127.0.0.1", f"evil, {FAR}", "127.0.0.1", FAR),
    ("127.0.0.1", f"{FAR}:80", "127.0.0.1", "127.0.0.1"), ("127.0.0.1", "unknown", "127.0.0.1", "127.0.0.1"),
    ("::1", "2001:DB8::7", "::1", "2001:db8::7"), ("::1", FAR, "127.0.0.1", "::1"), ("fd00::9", "2001:db8::7, fd00::2", "fd00::/8", "2001:db8::7"),
])  # fmt: skip
def test_the_address_is_the_nearest_that_is_no_trusted_proxy(peer, given, trusted, expected):
    headers = {} if given is None else {"x-forwarded-for": given}
    assert forwarded(peer, headers, networks(trusted))[0] == expected


@pytest.mark.parametrize("peer, proto, secure", [
    ("127.0.0.1", "https", True), ("127.0.0.1", "HTTPS", True), ("127.0.0.1", "http", False), ("127.0.0.1", None, False), ("127.0.0.2", "https", False),
    ("127.0.0.1", "https, http", False),
])  # fmt: skip
def test_only_a_trusted_proxy_says_that_it_was_tls(peer, proto, secure):
    headers = {} if proto is None else {"x-forwarded-proto": proto}
    assert forwarded(peer, headers, networks("127.0.0.1"))[1] is secure


def test_a_long_list_of_hops_takes_no_time():
    """It is read from its end, and what whoever asks put ahead of that is not looked at."""
    hops = ", ".join(["1.2.3.4"] * 900)
    trusted = networks(",".join(f"10.{i}.0.0/16" for i in range(20)) + ",127.0.0.1")
    started = time.thread_time()
    for _ in range(50):
        assert forwarded("127.0.0.1", {"x-forwarded-for": hops}, trusted)[0] == "1.2.3.4"
    assert time.thread_time() - started < 0.2  # all of it: 0.9 s


@pytest.mark.parametrize("text", ["localhost", "10.0.0.1/8", "10.0.0.0/33", "1.2.3", "::1/129", "10.0.0.0 10.0.0.1", "*"])
def test_a_proxy_is_an_address_or_a_network(make_controller, text):
    with pytest.raises(deploybot.StartError, match="TRUSTED_PROXY"):
        make_controller(trusted_proxy=text)


def test_failed_sign_ins_behind_a_proxy_count_for_whoever_made_them(make_controller):
    proxied = make_controller(open=False, trusted_proxy="127.0.0.2", **TOKENS)
    assert fail(proxied, 12, source="127.0.0.2", X_Forwarded_For=FAR)[-1] == 429
    assert ask(proxied, source="127.0.0.2", X_Forwarded_For="203.0.113.8")[0] == 401
    assert fail(proxied, 12, source="127.0.0.3", X_Forwarded_For="203.0.113.9")[-1] == 429, "who is not trusted pays himself"
    assert ask(proxied, source="127.0.0.3", X_Forwarded_For="203.0.113.10")[0] == 429, "whatever he says"
    assert ask(proxied, source="127.0.0.2", X_Forwarded_For="203.0.113.9")[0] == 401


def test_the_audit_has_the_address_of_who_asked(make_controller):
    proxied = make_controller(open=False, trusted_proxy="127.0.0.2", **TOKENS)
    for number, (source, said, expected) in enumerate((("127.0.0.2", FAR, FAR), ("127.0.0.3", FAR, "127.0.0.3"), ("127.0.0.2", f"{FAR}, 8.8.8.8", "8.8.8.8"))):  # fmt: skip
        body = {**JOB, "ref": f"r{number}"}
        assert ask(proxied, "POST", body=body, token="dbt_admin", source=source, X_Forwarded_For=said)[0] == 201
        assert proxied.ok("GET", "/v1/audit?limit=1")["audit"][0]["address"] == expected


def test_a_trusted_proxy_makes_no_caller_local(make_controller):
    proxied = make_controller(open=True, trusted_proxy="127.0.0.0/8", **TOKENS)
    for said in ("127.0.0.1", "::1", FAR, "localhost"):
        assert ask(proxied, token=None, X_Forwarded_For=said)[0] == 401


# -- --rate-limit ------------------------------------------------------------------------------------------------------


@pytest.fixture
def limited(make_controller, clock):
    return make_controller(open=False, clock=clock, rate_limit=5, **TOKENS)


def writes(controller, times, token="dbt_admin", **more):
    return [ask(controller, "POST", "/v1/jobs", JOB, token, **more)[0] for _ in range(times)]


def test_the_writes_of_a_token_have_a_limit_a_minute(limited, clock):
    assert writes(limited, 5) == [201] * 5
    status, headers, problem = ask(limited, "POST", "/v1/jobs", JOB, "dbt_admin")
    assert (status, headers["Retry-After"], problem["retry_after"]) == (429, "60", 60)
    assert ask(limited, "POST", "/v1/reload", None, "dbt_admin")[0] == 429
    assert ask(limited, "DELETE", "/v1/hosts/web-01", None, "dbt_admin")[0] == 429
    assert [ask(limited, token="dbt_admin")[0] for _ in range(10)] == [200] * 10, "reading has none"
    clock.advance(60)
    assert writes(limited, 6) == [201] * 5 + [429]


def test_nothing_of_a_write_over_the_limit_is_done(limited):
    writes(limited, 5)
    assert ask(limited, "POST", "/v1/jobs", {**JOB, "ref": "other"}, "dbt_admin")[0] == 429
    assert [job["ref"] for job in limited.ok("GET", "/v1/jobs")["jobs"]] == ["main"]


def test_agents_and_pushes_have_no_limit_of_writes(make_controller, clock):
    limited = make_controller(open=False, clock=clock, rate_limit=2, webhook_secret=SECRET, **TOKENS)
    agent = limited.register()
    own = agent.get("token") or "dbt_admin"
    path = f"/v1/agents/{agent['id']}/heartbeat"
    assert [ask(limited, "POST", path, {"status": "online"}, own)[0] for _ in range(10)] == [200] * 10
    push = {"method": "POST", "path": "/v1/webhooks/github", "body": {}, "token": None}
    assert 429 not in [ask(limited, **push, X_Hub_Signature_256="sha256=" + "0" * 64)[0] for _ in range(10)]


def test_each_token_has_its_own_and_a_sign_in_brings_no_new_one(limited):
    first, second = (limited.ok("POST", "/v1/tokens", {"role": "operator", "name": name})["secret"] for name in ("one", "two"))
    assert writes(limited, 6, first) == [201] * 5 + [429]
    assert writes(limited, 1, second) == [201]
    headers = ask(limited, "POST", "/v1/session", {"token": first}, None)[1]
    cookie = headers["Set-Cookie"].partition(";")[0]
    assert writes(limited, 1, None, Cookie=cookie) == [429]


def test_an_address_does_not_matter_for_writes(limited):
    assert writes(limited, 5, source="127.0.0.2") == [201] * 5
    assert writes(limited, 1, source="127.0.0.3") == [429]


def test_without_the_option_there_is_no_limit(closed):
    assert 429 not in writes(closed, 150)


# -- tables ------------------------------------------------------------------------------------------------------------


def refused(limit, key):
    try:
        limit.add(key, "things")
    except TooMany:
        return True
    return False


def test_many_addresses_fill_no_memory(clock):
    """An attacker has as many as he likes (IPv6)."""
    limit = RateLimit(10, clock)
    tracemalloc.start()
    try:
        for i in range(deploybot.MAX_RATE_KEYS + 2000):
            limit.add(f"2001:0db8:{i >> 16:04x}:{i & 0xFFFF:04x}", "things")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(limit._minutes) <= deploybot.MAX_RATE_KEYS
    assert most < 4 << 20


def test_the_oldest_goes_when_the_table_is_full(clock, monkeypatch):
    monkeypatch.setattr(deploybot, "MAX_RATE_KEYS", 3)
    limit = RateLimit(1, clock)
    assert [refused(limit, key) for key in "abccab"] == [False, False, False, True, True, True]
    assert not refused(limit, "d")
    assert [refused(limit, key) for key in "cb"] == [True, True]
    assert len(limit._minutes) == 3


def test_a_minute_begins_with_the_first_and_none_is_longer(clock):
    """Who goes on trying is not kept out for ever, or a clock that is wrong would do so."""
    limit = RateLimit(2, clock)
    for _ in range(3):
        assert [refused(limit, "a") for _ in range(4)] == [False, False, True, True]
        clock.advance(59)
        assert refused(limit, "a")
        clock.advance(1)


@pytest.mark.parametrize("first, second, same", [
    ("10.0.0.1", "10.0.0.1", True), ("10.0.0.1", "10.0.0.2", False), ("2001:db8::1", "2001:db8:0:0:ffff::2", True), ("2001:db8::1", "2001:db8:0:1::1", False),
    ("fe80::1%eth0", "fe80::2%eth0", True), ("::1", "::1", True),
])  # fmt: skip
def test_an_ipv6_caller_is_its_network(first, second, same):
    """A /64 is what one has at least: each of its 2^64 addresses with ten tries of its own would be no limit."""
    assert (deploybot.network_of(first) == deploybot.network_of(second)) is same


# -- IPv6 --------------------------------------------------------------------------------------------------------------


def ipv6_here():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not ipv6_here(), reason="this machine has no ::1")


def serve_on(controller, host):
    """The same controller on another address."""
    controller.stop()
    controller.config = deploybot.dataclasses.replace(controller.config, host=host, port=0)
    controller.start()
    return controller


def wire_ask(controller, address, more=b"", path=b"/v1/jobs"):
    """The status that a GET to this address gets."""
    with socket.create_connection((address, controller.port), timeout=20) as wire:
        host = b"[::1]" if ":" in address else b"127.0.0.1"
        wire.sendall(b"GET %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (path, host, more))
        return int(wire.recv(12)[9:])


@needs_ipv6
def test_it_serves_ipv6(closed, caplog):
    caplog.set_level("INFO", "deploybot")
    serve_on(closed, "::1")
    assert f"http://[::1]:{closed.port}" in caplog.text
    assert wire_ask(closed, "::1", b"Authorization: Bearer dbt_admin\r\n") == 200
    wrong = b"Authorization: Bearer dbt_wrong\r\n"
    assert [wire_ask(closed, "::1", wrong) for _ in range(11)] == [401] * 10 + [429]


@needs_ipv6
def test_both_families_on_one_socket_are_told_apart(make_controller):
    """An IPv4 caller of `--host ::` is 127.0.0.1 and not ::ffff:127.0.0.1, for open mode, trusted proxies and the limits."""
    both = serve_on(make_controller(open=True, trusted_proxy="127.0.0.2", **TOKENS), "::")
    assert wire_ask(both, "127.0.0.1") == wire_ask(both, "::1") == 200, "open: from this machine"
    wrong = b"Authorization: Bearer dbt_wrong\r\n"
    assert [wire_ask(both, "127.0.0.1", wrong) for _ in range(11)][-1] == 429
    assert wire_ask(both, "::1", wrong) == 401
    assert ask(both, "POST", "/v1/jobs", JOB, "dbt_admin", "127.0.0.2", X_Forwarded_For=FAR)[0] == 201
    assert ask(both, "GET", "/v1/audit", token="dbt_admin")[2]["audit"][0]["address"] == FAR


# -- large bodies ------------------------------------------------------------------------------------------------------


def begin_push(controller, claimed, sent, more=SIGNED):
    wire = socket.create_connection(("127.0.0.1", controller.port), timeout=20)
    wire.sendall(b"POST /v1/webhooks/github HTTP/1.1\r\n" + HOST + more + b"Content-Length: %d\r\n\r\n" % claimed)
    with contextlib.suppress(ConnectionError):
        wire.sendall(b"x" * sent)
    return wire


def status_of(wire):
    with wire:
        return int(wire.recv(12)[9:] or 0)


def used(controller):
    return deploybot.MAX_PUBLIC_BODIES - controller.daemon.server.budget


def test_bodies_of_who_has_no_token_have_a_budget_and_give_it_back(closed):
    """Four pushes of 20 MiB do not fit into 64: the fourth is told to come again, and the first three go on."""
    size, rest = 20 << 20, 100
    wires = [begin_push(closed, size, size - rest) for _ in range(3)]
    wait_for(lambda: used(closed) >= 3 * (size - rest))
    with begin_push(closed, size, size - rest) as wire:
        head = wire.recv(65536)
        assert head.startswith(b"HTTP/1.1 503 ") and b"\r\nRetry-After: 5\r\n" in head and b"Connection: close" in head
    assert used(closed) <= 3 * size, "what was refused holds nothing"
    for wire in wires:
        wire.sendall(b"x" * rest)
        assert status_of(wire) == 401
    wait_for(lambda: used(closed) == 0)
    assert status_of(begin_push(closed, size, size)) == 401


@pytest.mark.parametrize("end", ["close", "deadline"])
def test_a_body_that_never_comes_gives_its_budget_back(closed, monkeypatch, end):
    monkeypatch.setattr(deploybot, "BODY_DEADLINE", 0.5 if end == "deadline" else 20)
    wire = begin_push(closed, 5 << 20, 1 << 20)
    wait_for(lambda: used(closed))
    if end == "close":
        wire.close()
    wait_for(lambda: used(closed) == 0)
    wire.close()


def test_a_claim_holds_no_more_than_what_has_come(closed):
    """Else some connections that send a head and little more would keep all large pushes out."""
    some = 100_000
    wires = [begin_push(closed, 25 << 20, some) for _ in range(10)]
    wait_for(lambda: used(closed) >= 10 * some)
    assert used(closed) == 10 * some
    assert status_of(begin_push(closed, 20 << 20, 20 << 20)) == 401
    for wire in wires:
        wire.close()


def test_small_pushes_and_callers_with_a_token_pass_when_it_is_used_up(closed):
    closed.daemon.server.budget = 0
    assert status_of(begin_push(closed, 60_000, 60_000)) == 401
    assert status_of(begin_push(closed, 200_000, 200_000)) == 503
    agent = closed.register()
    big = {"status": "online", "running": [], "session": agent["session"]}
    body = json.dumps(big).encode() + b" " * 900_000
    assert closed.raw("POST", f"/v1/agents/{agent['id']}/heartbeat", body)[0] == 200
    assert ask(closed, "POST", "/v1/session", {"token": "dbt_admin"}, None)[0] == 200


def test_a_sign_in_is_a_few_bytes(closed):
    with socket.create_connection(("127.0.0.1", closed.port), timeout=20) as wire:
        wire.sendall(b"POST /v1/session HTTP/1.1\r\n" + HOST + b"Content-Length: 100000\r\n\r\n")
        assert wire.recv(12) == b"HTTP/1.1 413"


# -- connections -------------------------------------------------------------------------------------------------------

UNFINISHED = {
    "silent": b"",
    "in its head": b"GET /health HTTP/1.1\r\nX: ",
    "in its body": b"POST /v1/webhooks/github HTTP/1.1\r\n" + HOST + SIGNED + b"Content-Length: 9\r\n\r\n{",
    "kept alive": b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n",
}


def line_up(controller, number, data):
    """So many connections, each of which has come as far as its data brings it before the next one comes."""
    wires, server = [], controller.daemon.server
    for i in range(number):
        wires.append(socket.create_connection(("127.0.0.1", controller.port), timeout=20))
        wires[-1].sendall(data)
        if data.endswith(b"\r\n\r\n"):
            assert wires[-1].recv(65536).startswith(b"HTTP/1.1 200")
        wait_for(lambda i=i: len(server.waiting) == i + 1)
    return wires


def parked(controller, agent):
    body = json.dumps({"status": "online", "wait": 20}).encode()
    wire = socket.create_connection(("127.0.0.1", controller.port), timeout=20)
    head = b"POST /v1/agents/%b/heartbeat HTTP/1.1\r\n" % agent["id"].encode() + HOST
    wire.sendall(head + b"Authorization: Bearer dbt_admin\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    lanes = controller.daemon.queue._lanes
    wait_for(lambda: len(lanes[agent["hostname"]].woken._waiters) == 1)
    return wire


@pytest.mark.parametrize("name", UNFINISHED)
def test_at_the_limit_the_oldest_unfinished_one_goes_and_who_is_parked_stays(closed, name):
    agent = closed.register()
    wait_for(lambda: closed.daemon.server.connections() == 0)
    waiting = parked(closed, agent)
    closed.daemon.server._limit = 6
    crowd = line_up(closed, 5, UNFINISHED[name])
    newest = socket.create_connection(("127.0.0.1", closed.port), timeout=20)
    newest.sendall(b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n")
    assert newest.recv(12) == b"HTTP/1.1 200"
    assert crowd[0].recv(100) == b"", "the oldest"
    for wire in crowd[1:]:
        wire.setblocking(False)
        with pytest.raises(BlockingIOError):
            wire.recv(1)
    closed.create()
    assert waiting.recv(12) == b"HTTP/1.1 200"
    for wire in (*crowd, waiting, newest):
        wire.close()


def test_where_all_are_parked_a_new_one_is_sent_away_and_nobody_else(closed):
    agents = [closed.register(f"web-{i}") for i in range(3)]
    wait_for(lambda: closed.daemon.server.connections() == 0)
    closed.daemon.server._limit = 3
    wires = [parked(closed, agent) for agent in agents]
    with socket.create_connection(("127.0.0.1", closed.port), timeout=20) as new, contextlib.suppress(ConnectionError):
        assert new.recv(100) == b""
    closed.daemon.server._limit = 10
    for agent in agents:
        closed.create(host=agent["hostname"])
    assert [wire.recv(12) for wire in wires] == [b"HTTP/1.1 200"] * 3
    for wire in wires:
        wire.close()


def test_where_no_thread_can_be_made_the_oldest_unfinished_one_goes(closed, monkeypatch):
    """A limit of threads (TasksMax, memory maps) may come ahead of that of descriptors: then, too, the next one finds room."""
    crowd = line_up(closed, 3, b"GET /he")
    start, room = threading.Thread.start, threading.Event()

    def no_more(thread):
        if not room.is_set() and "process_request_thread" in repr(thread._target):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", no_more)
    with socket.create_connection(("127.0.0.1", closed.port), timeout=20) as new, contextlib.suppress(ConnectionError):
        assert new.recv(100) == b""
    assert crowd[0].recv(100) == b""
    room.set()
    assert closed.call("GET", "/health")[0] == 200
    wait_for(lambda: closed.daemon.server.connections() == 2)
    for wire in crowd:
        wire.close()


def test_the_limit_of_connections_leaves_descriptors_for_the_database(closed):
    files = deploybot.resource.getrlimit(deploybot.resource.RLIMIT_NOFILE)[0]
    assert 16 <= closed.daemon.server._limit <= max(16, files - 50)
