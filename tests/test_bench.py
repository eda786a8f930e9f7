"""The parts of bench/ that figures stand on: what wrk prints, our own client, what counts as a walk through a table, the plots."""

from __future__ import annotations

import contextlib
import json
import pathlib
import socketserver
import sqlite3
import sys
import threading
import time
import types
import xml.etree.ElementTree

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "bench"))
import agents
import bare
import clients
import database
import figures
import load
import machine
import page_work
import plots

# wrk 4.1.0; behind whole seconds it puts a blank.
WRK = """Running 2s test @ http://127.0.0.1:8080/
  1 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   612.11us  301.10us  12.01ms   92.85%
    Req/Sec    26.31k     1.02k   28.01k    70.00%
  Latency Distribution
     50%  585.00us
     75%  702.00us
     90%    1.02ms
     99%    1.53s{blank}
  52345 requests in 2.00s, 15.03MB read
{more}Requests/sec:  26170.12
Transfer/sec:      7.51MB
"""


def test_a_report_of_wrk_is_read_with_its_units():
    assert load.parse_wrk(WRK.format(more="", blank=" ")) == load.Load(26170.12, 52345, 0.585, 1530.0, 0, 0)


def test_refusals_and_broken_connections_in_a_report_of_wrk_are_counted():
    more = "  Socket errors: connect 1, read 2, write 3, timeout 4\n  Non-2xx or 3xx responses: 77\n"
    assert load.parse_wrk(WRK.format(more=more, blank=""))[-2:] == (77, 10)


def test_what_is_no_report_of_wrk_is_an_error():
    with pytest.raises(machine.Wrong):
        load.parse_wrk("unable to connect to 127.0.0.1:1 Connection refused\n")


class Slow(socketserver.BaseRequestHandler):
    """Takes 20 ms for each answer."""

    def handle(self):
        while self.request.recv(65536):
            time.sleep(0.02)
            self.request.sendall(bare.ANSWER)


@contextlib.contextmanager
def serving(handler):
    """The bare server in a thread: its port."""
    with bare.Server(("127.0.0.1", 0), handler) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield found.server_address[1]
        found.shutdown()
        thread.join()


@pytest.fixture
def server():
    with serving(bare.Handler) as port:
        yield port


def test_our_own_client_has_one_request_a_connection_under_way_and_counts_each_answer(server):
    seen = clients.closed_loop(None, server, [database.heartbeat(0), database.heartbeat(1)], 4, 0.1)
    assert seen["statuses"] == {200: seen["requests"]} and seen["requests"] > 8 and seen["lost"] == 0
    assert 0 < seen["p50_ms"] <= seen["p99_ms"] <= seen["max_ms"]


def test_paced_requests_keep_their_rate(server):
    begun = time.monotonic()
    seen = clients.paced(None, server, [database.heartbeat(0)], 2, 200.0, 0.2)
    most = (time.monotonic() - begun) * 200 + 1  # a busy machine lets it go on for longer than it was asked to
    assert seen["statuses"] == {200: seen["requests"]} and 0 < seen["sent"] <= most and seen["unsent"] == 0


def test_paced_requests_come_whatever_the_answers_take_and_the_wait_for_a_connection_counts():
    with serving(Slow) as port:
        seen = clients.paced(None, port, [database.heartbeat(0)], 1, 100.0, 0.3)  # twice what it can take
    assert seen["sent"] >= seen["requests"] + seen["unsent"] > seen["requests"] > 0
    assert seen["max_ms"] > 60


def test_refused_answers_are_part_of_what_was_asked_and_not_of_what_was_good():
    seen = {"statuses": {200: 30, 503: 10}, "requests": 30, "rate": 60.0, "p50_ms": 1.0, "p99_ms": 2.0, "lost": 1}
    assert load.as_load(seen) == load.Load(80.0, 40, 1.0, 2.0, 10, 1)


@pytest.mark.parametrize("status", [404, 503])
def test_under_a_load_below_the_limit_no_answer_may_be_refused(monkeypatch, tmp_path, status):
    seen = {"statuses": {200: 10_000}, "requests": 10_000, "rate": 60.0, "p50_ms": 1.0, "p99_ms": 2.0, "lost": 0}
    monkeypatch.setattr(load, "in_process", lambda *_: types.SimpleNamespace(result=lambda: seen))
    assert load.drive(1, [], 1, 1.0, tmp_path, wrk=False).requests == 10_000
    seen["statuses"][status] = 1
    with pytest.raises(machine.Wrong, match="of 10001 requests 1 were refused"):
        load.drive(1, [], 1, 1.0, tmp_path, wrk=False)


def test_a_heart_of_the_fleet_that_loses_the_controller_waits_as_agent_py_does():
    program, pauses = agents.load_agent(machine.ROOT / "agent.py"), []
    loop = types.SimpleNamespace(after=lambda pause, do: pauses.append(pause))
    fleet = types.SimpleNamespace(program=program, loop=loop, tally=clients.Tally())
    for number in range(100):
        agents.Heart(fleet, number)._lost(types.SimpleNamespace(is_busy=True))
    assert program.BACKOFF_FIRST < max(pauses) < program.RETURN_FIRST


def test_chunks_are_taken_apart_wherever_they_are_cut():
    sent = b"5\r\nhello\r\n1a\r\n" + b"x" * 26 + b"\r\n0\r\n\r\n"
    for size in range(1, len(sent) + 1):
        chunks = agents.Chunks()
        found = b"".join(chunks.feed(sent[start : start + size]) for start in range(0, len(sent), size))
        assert found == b"hello" + b"x" * 26, size


def test_ids_made_by_sql_are_those_made_in_python():
    sql = f"WITH n (i) AS (SELECT 4097) SELECT {database.sql_id('1700000000123')}, {database.sql_stamp('1700000000123')}"
    found = sqlite3.connect(":memory:").execute(f"{sql}, {database.sql_host('7')} FROM n").fetchone()
    assert found == (database.ordered_id(1_700_000_000_123, 4097), "2023-11-14T22:13:20.123Z", database.host_name(7))


def test_sql_that_walks_through_a_table_is_found(tmp_path):
    path = tmp_path / "some.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE jobs (id TEXT PRIMARY KEY, host TEXT, status TEXT, error TEXT)")
        db.execute("CREATE INDEX jobs_open ON jobs (host) WHERE status = 'pending'")
        db.execute("CREATE INDEX jobs_host ON jobs (host, id)")
    good = (
        "SELECT * FROM jobs WHERE host = 'a' ORDER BY id DESC LIMIT 100",
        "SELECT host, count(*) FROM jobs INDEXED BY jobs_open WHERE status = 'pending' GROUP BY host",
        "SELECT * FROM jobs WHERE 1 ORDER BY id DESC LIMIT 100",
        "COMMIT",
    )
    bad = ("SELECT count(*) FROM jobs", "SELECT * FROM jobs WHERE error = 'x' ORDER BY id LIMIT 100")
    assert page_work.scans_in(path, list(good)) == []
    assert [scan.partition(": ")[2] for scan in page_work.scans_in(path, [*good, *bad])] == list(bad)


def test_a_row_holds_by_its_ratio_where_there_is_a_yardstick_and_by_its_value_where_not():
    assert figures.Row("a", "a", 80.0, "/s", yardstick=("bare", [90.0, 110.0]), at_least=0.75).holds
    assert not figures.Row("a", "a", 70.0, "/s", yardstick=("bare", [90.0, 110.0]), at_least=0.75).holds
    assert figures.Row("a", "a", 50.0, "ms", at_most=50.0).holds
    assert not figures.Row("a", "a", 1.0, "ms", at_most=50.0, failed="lines are missing").holds
    assert figures.Row("a", "a", 60.0, "ms", at_most=50.0, judged=False).holds is None
    assert figures.Row("a", "a", 60.0, "ms").holds is None


def test_the_table_marks_what_does_not_hold_and_says_why():
    rows = [
        figures.Row("a", "first", 1.0, "ms", at_most=2.0),
        figures.Row("b", "second", 1.0, "ms", failed="half of it is missing"),
    ]
    lines = figures.table(rows).splitlines()
    assert lines[2].split()[-1] == "yes" and lines[3].split()[-1] == "NO" and lines[4].strip() == "half of it is missing"


SERIES = {key: [[100, 5.0], [1000, 7.5], [10_000, 42.0]] for plot in plots.PLOTS for _, key in plot.lines}


def test_the_same_figures_give_the_same_plots_and_each_is_good_xml(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    names = plots.plot_all({"series": SERIES}, first)
    assert names == [plot.file for plot in plots.PLOTS]
    assert plots.plot_all(json.loads(json.dumps({"series": SERIES})), second) == names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
        xml.etree.ElementTree.parse(first / name)


def test_a_plot_whose_series_are_missing_is_left_out(tmp_path):
    some = {"lines_by_call": [[1, 10.0], [100, 500.0]], "heartbeats_by_agents": [[100, 5.0]]}
    assert plots.plot_all({"series": some}, tmp_path) == ["log-lines.svg"]
