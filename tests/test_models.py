"""Models: what comes from outside becomes a model, or one error that lists every field."""

from __future__ import annotations

import dataclasses
import json
import re
import time
import uuid

import pytest

import deploybot
from deploybot import (
    Event,
    EventFilter,
    Fields,
    Forbidden,
    Heartbeat,
    JobRequest,
    LogUpload,
    Malformed,
    Principal,
    Registration,
    Result,
    Scope,
    TimeOrderedIds,
    ValidationError,
)

SHA = "0123456789abcdef" * 2 + "01234567"
JOB_ID = "01a208d2-125d-7000-9179-b171dcd08d79"
STAMP = "2026-11-23T13:13:37.123Z"


def errors_of(parse, *data):
    """{field: message} of a refused input."""
    with pytest.raises(ValidationError) as caught:
        parse(*data)
    return dict(caught.value.errors)


def request(**more):
    return JobRequest.parse({"repo": "myorg/app", "ref": "main", "host": "web-01", **more})


def upload(*lines, **more):
    return LogUpload.parse({"attempt": 1, "offset": 0, "lines": list(lines), **more})


# -- names -------------------------------------------------------------------------------------------------------------

GOOD = {
    deploybot.is_repo: ["a/b", "My-Org/web.app_1", "a/.github", "0/0", "a" * 100 + "/" + "b" * 100, "a/..."],
    deploybot.is_ref: ["main", "release/1.0", "v1.2.3", "refs/heads/x", SHA, "a;touch${IFS}x", "$(id)", "x" * 255]
    + ["grün", "a@b", "a/-b", "HEAD", "a.b", "lock", "a.locks"],
    deploybot.is_host: ["a", "web-01", "web-01.example.com", "1.2.3.4", "0", "a" * 63, ".".join(["a" * 61] * 4)],
    deploybot.is_app: ["a", "web-frontend", "my_app.v2", "0", "a" * 64, "o--n"],
}
BAD = {
    deploybot.is_repo: ["", "a", "a/", "/b", "a/b/c", "a/.", "a/..", "../b", ".a/b", "-a/b", "a b/c", "a/b\n", "ä/b"]
    + ["a/b?x", "a//b", "a/b#", "a\0/b", "a" * 101 + "/b", "a/" + "b" * 101, "a/٣"],
    deploybot.is_ref: ["", "-x", "--upload-pack=x", ".a", "/a", "a/", "a.", "a..b", "a//b", "a/.b", "a.lock", "a.lock/b"]
    + ["@", "a@{0}", "a b", "a~1", "a^", "a:b", "a?b", "a*", "a[b", "a\\b", "a\n", "a\0", "\x1b[31m", "a\x7f", "a\u202eb"]
    + ["x" * 256, "a\u2028b", "a\x85"],
    deploybot.is_host: ["", "-a", "a-", "a.", ".a", "a..b", "a_b", "a b", "a/b", "a\n", "A", "ä", "a:80", "a" * 64]
    + [".".join(["a" * 63] * 4), "a\0", "٣", "a.-b"],
    deploybot.is_app: ["", "-a", ".a", "_a", "A", "a/b", "..", "a b", "a\n", "a\0", "ä", "a" * 65, "a;b", "٣"],
}


@pytest.mark.parametrize(("check", "text"), [(check, text) for check, texts in GOOD.items() for text in texts])
def test_good_names_are_taken(check, text):
    assert check(text) is None


@pytest.mark.parametrize(("check", "text"), [(check, text) for check, texts in BAD.items() for text in texts])
def test_hostile_names_are_refused(check, text):
    assert check(text)


def test_host_names_are_ascii_before_they_are_lowered():
    """The KELVIN SIGN becomes a plain k."""
    assert "host" in errors_of(JobRequest.parse, {"repo": "a/b", "ref": "m", "host": "\u212aeb-01"})
    assert "hostname" in errors_of(Registration.parse, {"hostname": "\u212aeb-01"})


def test_checks_take_no_time_for_long_hostile_text():
    started = time.monotonic()
    for check in BAD:
        for text in ("a" * 200_000, "a." * 100_000, "a-" * 100_000, "a/" * 100_000, ".lock" * 50_000):
            assert check(text)
    assert time.monotonic() - started < 2


# -- Fields ------------------------------------------------------------------------------------------------------------


def test_every_wrong_field_is_told_at_once():
    wrong = {"repo": "x", "ref": "-x", "host": 1, "app": "A", "metadata": [], "force": 1, "timeout": 0, "retries": True}
    assert errors_of(JobRequest.parse, wrong).keys() == wrong.keys()


@pytest.mark.parametrize("data", [None, [], "x", 1, True])
def test_a_body_that_is_no_object_is_one_error(data):
    for parse in (JobRequest.parse, Registration.parse, Heartbeat.parse, Result.parse, deploybot.Push.parse):
        assert errors_of(parse, data) == {"body": "must be an object"}


def test_an_unknown_field_is_told_with_the_nearest_known_one():
    assert errors_of(JobRequest.parse, {"repos": 1, "repo": "a/b", "ref": "m", "host": "h"}) == {
        "repos": "is not known; did you mean repo?"
    }
    assert max(map(len, errors_of(JobRequest.parse, {"x" * 5000: 1}))) <= 100


def test_null_counts_as_left_out():
    assert request(app=None, metadata=None, timeout=None, retries=None, force=None) == request()
    assert "repo" in errors_of(JobRequest.parse, {"repo": None, "ref": "m", "host": "h"})


@pytest.mark.parametrize("value", [True, 1.0, "1", [], {}])
def test_an_integer_is_an_integer(value):
    assert errors_of(lambda: request(timeout=value)) == {"timeout": "must be an integer"}


@pytest.mark.parametrize("value", [1, 0, "true", [], {}])
def test_a_boolean_is_a_boolean(value):
    assert errors_of(lambda: request(force=value)) == {"force": "must be true or false"}


def test_nested_errors_name_their_place_and_stop_after_enough():
    told = errors_of(lambda: upload({"message": "a"}, {"message": 1}, "x", {"message": "b", "level": "loud"}))
    assert told.keys() == {"lines[1].message", "lines[2]", "lines[3].level"}
    assert len(errors_of(lambda: upload(*[{}] * 1000))) <= 30


def test_items_are_limited_in_number():
    assert len(upload(*[{"message": "x"}] * 1000).lines) == 1000
    assert errors_of(lambda: upload(*[{"message": "x"}] * 1001)) == {"lines": "must have at most 1000 entries"}


def test_query_errors_use_the_same_gathering():
    fields = Fields({"a": "x"}, {"b"})
    fields.integer("b", 1, 2, required=True)
    assert errors_of(fields.done, None).keys() == {"a", "b"}


# -- load_json ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'{"a": [1, -2, 0.5, true, null, "\\u00e9"]}', {"a": [1, -2, 0.5, True, None, "é"]}),
        (b" [] \n", []),
        ('"\\ud83d\\ude00 😀"'.encode(), "😀 😀"),
        (str(2**63 - 1).encode(), 2**63 - 1),
        (str(-(2**63)).encode(), -(2**63)),
        (b"1e308", 1e308),
        (b"[" * 64 + b"]" * 64, None),
        (b'{"a":[' * 32 + b"1" + b"]}" * 32, None),
        (b'{"a":"' + b"[" * 200 + b'"}', {"a": "[" * 200}),
        (b'["' + b'\\"[' * 200 + b'"]', ['"[' * 200]),
        (b"[" + b"[]," * 100 + b"[]]", [[]] * 101),
        (b'[{"a":1},{"a":2}]', [{"a": 1}, {"a": 2}]),
        (b'["","","' + b"[" * 65 + b'",""]', ["", "", "[" * 65, ""]),
    ],
)
def test_good_json_is_taken(body, value):
    assert value is None or deploybot.load_json(body) == value
    deploybot.load_json(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{} {}",
        b"{'a': 1}",
        b"[1,]",
        b"nul",
        b"\xff",
        b'"\xed\xa0\x80"',
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        b'"a\nb"',
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"1e999",
        b"-1e999",
        str(2**63).encode(),
        str(-(2**63) - 1).encode(),
        b"9" * 5000,
        b'{"a":1,"a":1}',
        b'{"x":{"a":1,"\\u0061":2}}',
        b'"\\ud800"',
        b'{"\\udfff":1}',
        b'["\\ude00\\ud83d"]',
        b"[" * 65 + b"]" * 65,
        b'{"a":' * 65 + b"1" + b"}" * 65,
        b'{"a":[' * 33 + b"1" + b"]}" * 33,
        b"[" + b'"]",[' * 64 + b"]" * 65,
        b"[" * 500_000,
        b'["' + b'\\\\", ' + b"[" * 65 + b"]" * 65 + b', ""]',
        b'["","",' + b"[" * 65 + b'""' + b"]" * 65 + b"]",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_bad_json_is_malformed(body):
    with pytest.raises(Malformed):
        deploybot.load_json(body)


@pytest.mark.parametrize("unit", [r"\"", '"', '"[', "\\", "[", "]", '"]', "x", r"\\"], ids=repr)
def test_depth_is_counted_in_linear_time(unit):
    """A megabyte of it must not hold the interpreter, and with it the whole controller, for an hour."""
    started = time.thread_time()
    deploybot.is_too_deep(("[" * 65 + '"' + unit * 30_000).encode())
    deploybot.is_too_deep(("[" * 65 + unit * 30_000).encode())
    assert time.thread_time() - started < 1  # quadratic: more than 10 s


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_job_request_has_its_defaults():
    assert request() == JobRequest("myorg/app", "main", "web-01", None, {}, False, None, None)


def test_host_names_are_lowered():
    assert request(host="Web-01.Example.COM").host == "web-01.example.com"
    assert Registration.parse({"hostname": "WEB"}).hostname == "web"


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("timeout", [1, 604800], [0, -1, 604801, 2**62]),
        ("retries", [0, 100], [-1, 101]),
        ("force", [True, False], []),
        ("metadata", [{}, {"a": {"b": [1]}}], [{"a": "x" * 16384}]),
    ],
)
def test_a_job_request_has_limits(field, good, bad):
    for value in good:
        assert getattr(request(**{field: value}), field) == value
    for value in bad:
        assert errors_of(lambda value=value: request(**{field: value})).keys() == {field}


def test_metadata_is_limited_in_bytes():
    assert "metadata" in errors_of(lambda: request(metadata={"a": "é" * 12_000}))


def test_registration():
    assert Registration.parse({"hostname": "a"}) == Registration("a", {}, 1, None)
    full = {"hostname": "a", "capabilities": {"gpu": True}, "slots": 64, "token_sha256": "ab" * 32}
    assert Registration.parse(full) == Registration("a", {"gpu": True}, 64, "ab" * 32)
    wrong = {"hostname": "a b", "capabilities": [], "slots": 65, "token_sha256": "AB" * 32}
    assert errors_of(Registration.parse, wrong).keys() == wrong.keys()
    assert "slots" in errors_of(Registration.parse, {"hostname": "a", "slots": 0})


def test_a_heartbeat_of_one_word_is_enough():
    assert Heartbeat.parse({"status": "online"}) == Heartbeat("online", None, None, 0)
    assert Heartbeat.parse({"status": "offline", "running": []}).running == frozenset()


def test_a_heartbeat_is_checked_whole():
    running = [{"job_id": JOB_ID, "attempt": 1}] * 2
    full = {"status": "online", "session": "ab12", "running": running, "wait": 25}
    assert Heartbeat.parse(full) == Heartbeat("online", "ab12", frozenset({(JOB_ID, 1)}), 25)
    wrong = {"status": "busy", "session": "x y", "running": [{"job_id": "1", "attempt": 0}, 7], "wait": 26}
    assert errors_of(Heartbeat.parse, wrong).keys() == {
        *("status", "session", "running[0].job_id", "running[0].attempt", "running[1]", "wait")
    }
    assert "running" in errors_of(Heartbeat.parse, {"status": "online", "running": running * 129})
    assert "running[0].job_id" in errors_of(Heartbeat.parse, {"status": "online", "running": [{"job_id": [], "attempt": 1}]})


def test_log_lines_have_defaults():
    assert upload({"message": "x"}).lines == [["x", "info", None]]
    given = {"message": "", "level": "error", "timestamp": "2026-01-02T03:04:05+01:00"}
    assert upload(given, commit=SHA) == LogUpload(1, 0, [["", "error", "2026-01-02T02:04:05.000Z"]], SHA)


def test_a_log_line_may_be_a_list():
    stamp, long = "2026-01-02T03:04:05+01:00", "x" * (deploybot.MAX_MESSAGE + 1)
    lines = [["a", "error", stamp], ["", None, None], {"message": "b", "timestamp": stamp}, [long, "debug", None]]
    kept = "2026-01-02T02:04:05.000Z"
    assert upload(["a", "error", kept], ["b", "info", None]).lines == [["a", "error", kept], ["b", "info", None]]
    expected = [["a", "error", kept], ["", "info", None], ["b", "info", kept], [deploybot.fit_line(long), "debug", None]]
    assert upload(*lines).lines == expected
    assert [upload(line).lines for line in lines] == [[line] for line in expected]
    assert [deploybot.log_line(line) for line in lines] == expected  # what is read line by line comes to the same


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["x"],
        ["x", "info"],
        ["x", "info", None, None],
        [1, "info", None],
        [None, None, None],
        ["x", "", None],
        ["x", "loud", None],
    ]
    + [
        ["x", [], None],
        ["x", None, ""],
        ["x", None, 1],
        ["x", None, []],
        ["x", None, {}],
        ["x", None, "noon"],
        "abc",
        1,
        None,
        [{}] * 3,
    ],
    ids=repr,
)
def test_a_bad_log_line_is_named(line):
    good = ["y", "info", None]
    assert errors_of(lambda: upload(good, line, {"message": "z"})).keys() == {"lines[1]"}


@pytest.mark.parametrize(
    "stamp",
    ["", "now", "2026-11-23", "2026-11-23T13:13:37", "2026-11-23 13:13:37Z", "2026-11-23T13:13:37Z\n", "٢٠٢٦-11-23T13:13:37Z"]
    + ["2026-99-99T99:99:99Z", "2026-02-30T00:00:00Z"],
)
def test_a_timestamp_is_a_time(stamp):
    assert errors_of(lambda: upload({"message": "x", "timestamp": stamp})).keys() == {"lines[0].timestamp"}


@pytest.mark.parametrize(
    "stamp",
    ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "0000-01-01T00:00:00Z", "2026-11-23T24:00:00Z"]
    + ["2026-11-23T13:13:60Z", "2026-11-23T13:13:37.123456789Z", "2026-11-23T13:13:37+99:99", "1969-01-01T00:00:00Z"],
)
def test_a_time_at_the_edge_is_refused_or_kept_in_our_form(stamp):
    try:
        ((_, _, kept),) = upload({"message": "x", "timestamp": stamp}).lines
    except ValidationError as error:
        assert error.errors[0][0] == "lines[0].timestamp"
    else:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", kept)


def test_a_log_upload_is_checked_whole():
    wrong = {"attempt": 0, "offset": -1, "lines": {}, "commit": SHA.upper()}
    assert errors_of(LogUpload.parse, wrong).keys() == wrong.keys()
    assert errors_of(LogUpload.parse, {}).keys() == {"attempt", "offset", "lines"}


def test_a_result_has_the_reason_of_its_end():
    def reason(**more):
        return Result.parse({"attempt": 1, **more}).reason

    assert reason(status="success") is None
    assert reason(status="success", reason="timeout") is None
    assert reason(status="failed") == "exit_code"
    assert reason(status="failed", reason="fetch_failed") == "fetch_failed"
    assert reason(status="cancelled") == "cancelled"


def test_a_result_is_checked_whole():
    wrong = {"attempt": 0, "status": "done", "exit_code": 2**31, "error": 1, "reason": "expired", "commit": "main"}
    wrong["rolled_back_to"] = "x"
    assert errors_of(Result.parse, wrong).keys() == wrong.keys()
    assert errors_of(Result.parse, {"attempt": 1, "status": "running"}).keys() == {"status"}
    assert len(Result.parse({"attempt": 1, "status": "failed", "error": "x" * 5000}).error) == 4096


# -- fit_line ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("char", ["x", "é", "€", "😀"])
def test_a_long_line_is_cut_at_64_kib_and_says_so(char):
    size = len(char.encode())
    fits = char * (65536 // size)
    assert deploybot.fit_line(fits) == fits
    cut = deploybot.fit_line(fits + char * 2)
    assert len(cut.encode()) <= 65536
    assert cut.endswith(f" [cut: the line had {len((fits + char * 2).encode())} bytes]")
    assert set(cut.partition(" [")[0]) == {char}


def test_a_short_line_is_left_as_it_is():
    assert deploybot.fit_line("\x1b[31mred\t\0") == "\x1b[31mred\t\0"


# -- ids ---------------------------------------------------------------------------------------------------------------


def test_ids_are_uuids_of_version_7_and_carry_the_time(clock):
    made = TimeOrderedIds(clock, None)()
    parsed = uuid.UUID(made)
    assert (parsed.version, parsed.variant, str(parsed)) == (7, uuid.RFC_4122, made)
    assert parsed.int >> 80 == int(clock.at * 1000)


def test_ids_grow_within_a_millisecond_and_past_its_4096(clock):
    new = TimeOrderedIds(clock, None)
    made = [new() for _ in range(10_000)]
    assert made == sorted(set(made))
    clock.advance(0.002)
    assert new() > made[-1]


def test_ids_grow_also_when_the_clock_goes_back(clock):
    new = TimeOrderedIds(clock, None)
    made = [new()]
    for step in (-3600, 1, -0.001, 7200, -86400):
        clock.advance(step)
        made += [new() for _ in range(3)]
    assert made == sorted(set(made))


def test_ids_grow_past_the_last_one_before_a_restart(clock):
    last = TimeOrderedIds(clock, None)()
    clock.advance(-3600)
    assert TimeOrderedIds(clock, last)() > last


def test_a_start_of_the_id_of_a_deployment_is_that_of_none_of_its_jobs(clock):
    jobs, deployments = TimeOrderedIds(clock, None), TimeOrderedIds(clock, None, kind=1)
    made = [make() for make in (deployments, jobs, jobs, deployments, jobs) * 900]  # more than fit into one millisecond
    assert len({one[:18] for one in made}) == len(made)
    clock.advance(1)
    assert deployments()[:18] != jobs()[:18]
    after = [TimeOrderedIds(clock, made[-1], kind) for kind in (0, 1)]
    assert all(one() > max(made) for one in after)


def test_the_floor_of_a_time_parts_the_ids_before_it_from_those_after(clock):
    early = TimeOrderedIds(clock, None)()
    clock.advance(1)
    floor = TimeOrderedIds.layout(clock.ms())
    assert early < floor <= TimeOrderedIds(clock, None)()


# -- events ------------------------------------------------------------------------------------------------------------


def chunk():
    """Lines at the positions 11 to 13, offsets 5 to 7."""
    data = json.dumps([[text, "info", STAMP] for text in "abc"])
    return Event(13, 3, "log", JOB_ID, "web-01", "app", 2, 5, data)


def test_a_chunk_knows_the_position_and_offset_of_each_line():
    assert [(line["position"], line["offset"], line["message"]) for line in chunk().log_lines()] == [
        *((11, 5, "a"), (12, 6, "b"), (13, 7, "c"))
    ]
    assert next(chunk().log_lines()) == {
        **{"position": 11, "attempt": 2, "offset": 5, "message": "a", "level": "info", "timestamp": STAMP}
    }


@pytest.mark.parametrize(("position", "left"), [(0, "abc"), (10, "abc"), (11, "bc"), (12, "c"), (13, "")])
def test_a_reader_in_the_middle_of_a_chunk_gets_the_rest(position, left):
    rest = chunk().after(position)
    lines = list(rest.log_lines())
    assert "".join(line["message"] for line in lines) == left
    assert all(line["position"] == 11 + "abc".index(line["message"]) for line in lines)
    assert all(line["offset"] == 5 + "abc".index(line["message"]) for line in lines)
    assert rest.lines == len(left)
    assert rest.position == 13


def test_filters_want_what_matches_in_all():
    event = chunk()
    for wanted in (EventFilter(), EventFilter("web-01"), EventFilter("web-01", "app", JOB_ID), EventFilter(app="app")):
        assert wanted.wants(event)
    for other in (EventFilter("web-02"), EventFilter("web-01", "other"), EventFilter("web-01", "app", "x")):
        assert not other.wants(event)


# -- who, when ---------------------------------------------------------------------------------------------------------


def test_a_role_may_do_its_own_and_an_admin_all():
    may = {scope: {asked for asked in Scope if Principal("x", scope).may(asked)} for scope in deploybot.ROLES}
    assert may == {
        Scope.VIEWER: {Scope.PUBLIC, Scope.ANY, Scope.VIEWER},
        Scope.OPERATOR: {Scope.PUBLIC, Scope.ANY, Scope.VIEWER, Scope.OPERATOR},
        Scope.AGENT: {Scope.PUBLIC, Scope.ANY, Scope.AGENT},
        Scope.ADMIN: set(Scope),
    }


def test_a_principal_of_a_host_speaks_for_that_host_alone():
    Principal("x", Scope.AGENT, "a").speaks_for("a")
    Principal("x", Scope.ADMIN).speaks_for("b")
    with pytest.raises(Forbidden, match="belongs to a, not to b"):
        Principal("x", Scope.AGENT, "a").speaks_for("b")
    with pytest.raises(Forbidden, match="may only register"):
        Principal("x", Scope.AGENT).speaks_for("b")


def test_a_principal_of_an_app_sees_that_app_alone():
    for app in (None, "web"):
        Principal("x", Scope.OPERATOR, app=app).sees("web")
    with pytest.raises(Forbidden, match="the app web alone"):
        Principal("x", Scope.OPERATOR, app="web").sees("webb")


@pytest.mark.parametrize("seconds", [0.0, 1_790_000_000.123, 951_782_400.999])
def test_times_go_to_text_and_back(seconds):
    text = deploybot.rfc3339(seconds)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text)
    assert deploybot.unix_time(text) == pytest.approx(seconds, abs=0.001)


def test_readers_of_a_job_see_neither_its_spec_nor_its_session():
    values = dict.fromkeys(deploybot.Job._fields) | {"metadata": '{"a":1}', "spec": '{"build":"hunter2"}', "session": "s3cr3t"}
    job = deploybot.Job(**values)
    assert job.public()["metadata"] == {"a": 1}
    assert not {"hunter2", "s3cr3t"} & set(re.findall(r"\w+", json.dumps(job.public())))
    assert job.for_agent()["spec"] == {"build": "hunter2"}
    assert "session" not in job.for_agent()


def test_statuses_and_reasons_are_the_words_of_the_api():
    assert {str(word) for word in deploybot.ENDED} == set(deploybot.ENDED_WORDS)
    assert set(deploybot.AGENT_REASONS) <= {str(word) for word in deploybot.Reason}
    assert dataclasses.is_dataclass(deploybot.Config)
