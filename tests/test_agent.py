"""agent.py, its parts on their own: settings, the spool, git, steps, locks, users and processes, with real git repositories."""

import ast
import contextlib
import json
import os
import pwd
import random
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import uuid
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hosts import ROOT, Host, Source, as_root, fake_git, lives, messages, seal, until

import agent

pytest_plugins = ("hosts",)


# An older Python


def test_an_older_python_is_told_so_before_anything_is_imported(monkeypatch):
    source, names = (ROOT / "agent.py").read_text(), {}
    ast.parse(source, feature_version=(3, 9))  # it gets as far as that line
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    with pytest.raises(SystemExit, match=r"^agent.py needs Python 3.11 or newer; this is 3.10$"):
        exec(compile(source, "agent.py", "exec"), names)
    assert set(names) == {"__builtins__", "__doc__", "annotations", "sys"}


# Config


def test_flags_win_over_variables_and_variables_over_defaults(tmp_path):
    config = agent.load_config(
        ["--url", "https://deploy.example.com/", "--slots=3"],
        {"DEPLOYBOT_URL": "http://ignored", "DEPLOYBOT_HOSTNAME": "web-01", "DEPLOYBOT_WORKDIR": str(tmp_path)},
    )
    assert config == agent.Config("https://deploy.example.com/", "web-01", tmp_path, "https:ssh", 3, False, "INFO", None)


def test_every_problem_is_named_at_once(tmp_path):
    env = {"DEPLOYBOT_AGENT_TOKEN": "a", "DEPLOYBOT_AGENT_TOKEN_FILE": str(tmp_path / "none"), "DEPLOYBOT_SLOTS": "65"}
    arguments = ["--url=ftp://x", "--hostname=a b", "--git-protocols=", "--log-level=loud"]
    with pytest.raises(agent.ConfigError) as caught:
        agent.load_config(arguments, env)
    problems = "\n".join(caught.value.problems)
    for name in ("--url", "--hostname", "--slots", "--log-level", "DEPLOYBOT_AGENT_TOKEN"):
        assert name in problems


@pytest.mark.parametrize("protocols", ["ftp", "https:ext", "https,ssh", "ssh:"])
def test_a_protocol_that_git_does_not_speak_is_refused_with_those_it_does(protocols):
    with pytest.raises(agent.ConfigError, match=r"^--git-protocols: must be some of file, git, http, https, ssh, with"):
        agent.load_config([], {"DEPLOYBOT_GIT_PROTOCOLS": protocols, "PATH": os.environ["PATH"]})


@pytest.mark.parametrize(
    "url", ["http://user:secret@host", "http://:secret@host/x", "http://", "host:8080", "http://h:port", "http://h/?a=b"]
)
def test_urls_that_are_none_are_refused_without_their_secret(url):
    with pytest.raises(agent.ConfigError) as caught:
        agent.load_config(["--url", url], {})
    assert "secret" not in str(caught.value)


def test_a_url_with_a_path_is_refused_with_the_one_to_give():
    with pytest.raises(agent.ConfigError, match=r"^--url takes no path: http://host:8080$"):
        agent.load_config(["--url=http://host:8080/v1/"], dict(os.environ))


def test_a_host_without_git_is_told_so(tmp_path):
    with pytest.raises(agent.ConfigError, match="git is not installed"):
        agent.load_config([], {"PATH": str(tmp_path)})


def test_the_token_comes_from_a_variable_or_a_file_and_never_from_a_flag(tmp_path):
    (tmp_path / "token").write_text("dbt_abc\n")
    assert agent.load_config([], {"DEPLOYBOT_AGENT_TOKEN": "dbt_x"}).token == "dbt_x"
    assert agent.load_config([], {"DEPLOYBOT_AGENT_TOKEN_FILE": str(tmp_path / "token")}).token == "dbt_abc"
    assert "--token" not in agent.build_parser().format_help()
    with pytest.raises(agent.ConfigError) as caught:
        agent.load_config([], {"DEPLOYBOT_AGENT_TOKEN": "two words"})
    assert "two words" not in str(caught.value)


def loaded(*arguments, **env):
    return agent.load_config(list(arguments), {"PATH": os.environ["PATH"], **env})


def problems_of(*arguments, **env):
    with pytest.raises(agent.ConfigError) as caught:
        loaded(*arguments, **env)
    return caught.value.problems


def test_repositories_that_are_allowed_come_from_flags_or_a_list():
    assert loaded("--allow-repo=MyOrg/*", "--allow-repo", "a/b").allow_repos == ("myorg/*", "a/b")
    assert loaded(DEPLOYBOT_ALLOW_REPO="a/b, c/d-[0-9]?,").allow_repos == ("a/b", "c/d-[0-9]?")
    assert loaded().allow_repos == ()
    for pattern in ("*", "myorg", "a/b/c", "https://github.com/a/b", "a /b", "/b"):
        assert problems_of("--allow-repo", pattern)[0].startswith("--allow-repo: must be OWNER/NAME"), pattern


def test_labels_come_from_flags_or_a_list():
    assert loaded("--label=role=web", "--label", "zone=eu-1.A_").labels == {"role": "web", "zone": "eu-1.A_"}
    assert loaded(DEPLOYBOT_LABELS="role=web, a.b_c-9=1,role=web,").labels == {"role": "web", "a.b_c-9": "1"}
    assert loaded("--label=a=b", DEPLOYBOT_LABELS="c=d").labels == {"a": "b"} and loaded().labels == {}
    for label in (
        "role",
        "=web",
        "role=",
        "Role=web",
        "a=b=c",
        "a b=c",
        "a=b c",
        "ä=b",
        "a=ä",
        f"{'a' * 64}=b",
        f"a={'b' * 64}",
        "a=b\n=c",
    ):
        assert problems_of("--label", label)[0].startswith("--label: "), label
    assert loaded("--label", f"{'a' * 63}={'b' * 63}").labels
    assert problems_of("--label=role=web,role=db") == ["--label: role has two values"]


def test_scripts_run_as_another_user_only_where_that_takes_rights_away(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    nobody = pwd.getpwnam("nobody")
    found = loaded("--run-as=nobody").account
    assert (found.uid, found.gid, found.home) == (nobody.pw_uid, nobody.pw_gid, nobody.pw_dir)
    assert set(found.groups) == set(os.getgrouplist("nobody", nobody.pw_gid))
    assert problems_of(DEPLOYBOT_RUN_AS="root") == ["--run-as: is to take rights away from scripts, and root has them all"]
    assert problems_of("--run-as=no-one-here") == ["--run-as: there is no user 'no-one-here' on this machine"]
    monkeypatch.setattr(os, "geteuid", lambda: nobody.pw_uid)
    [problem] = problems_of("--run-as=nobody")
    assert problem == "--run-as: only root can run scripts as another user; this agent runs as nobody"


ENV_FILE = r"""
# a comment, and another
; KEY=value
PLAIN=one two  # no comment<BLANK>
 SPACED = x
EMPTY=
NONE=''
SINGLE='a "b" \n $c'   'and more'
DOUBLE="a 'b' \"c\" \\ \$d \e"
TWO='several
lines'
JOINED=one\
two
ESCAPED=a\ b\\c\"
KEPT=end\<BLANK>
QUOTES=a"b"'c'
GLUED="a"b
#HIDDEN=x
LAST=x""".replace("<BLANK>", " ")


def test_the_env_file_is_read_as_systemd_reads_it(tmp_path):
    """systemd.exec(5), EnvironmentFile=, and src/basic/env-file.c where that leaves something open."""
    path = tmp_path / "env"
    path.touch(0o640)
    path.write_text(ENV_FILE)
    assert loaded("--env-file", str(path)).variables == {
        "PLAIN": "one two  # no comment", "SPACED": "x", "EMPTY": "", "NONE": "", "SINGLE": r'a "b" \n $cand more',
        "DOUBLE": r"""a 'b' "c" \ $d \e""", "TWO": "several\nlines", "JOINED": "onetwo", "ESCAPED": r'a b\c"', "KEPT": "end ",
        "QUOTES": "a\"b\"'c'", "GLUED": "ab", "LAST": "x",
    }  # fmt: skip
    path.write_bytes(b"A=b\r\nC='d'\r\n")
    assert loaded(DEPLOYBOT_ENV_FILE=str(path)).variables == {"A": "b", "C": "d"}


def test_what_is_wrong_with_an_env_file_is_named_by_its_line_and_never_by_its_text(tmp_path):
    path = tmp_path / "env"
    path.touch(0o600)
    lines = ["GOOD=1", "hunter2", "export A=hunter2", "1A=x", "DEPLOYBOT_AGENT_TOKEN=hunter2", "A=x\0", "B='hunter2", "C=1"]
    path.write_text("\n".join(lines))
    assert problems_of("--env-file", str(path)) == [
        "--env-file: line 2 is no NAME=VALUE",
        "--env-file: line 3 is no NAME=VALUE",
        "--env-file: line 4 is no NAME=VALUE",
        "--env-file: line 5: DEPLOYBOT_AGENT_TOKEN is a setting of the agent, and no script gets it",
        "--env-file: line 6: the value of A has no closing quote, or a NUL",
        "--env-file: line 7: the value of B has no closing quote, or a NUL",
    ]
    assert "No such file" in problems_of("--env-file", str(tmp_path / "none"))[0]
    path.write_bytes(b"A=\xff")
    assert "can't decode" in problems_of("--env-file", str(path))[0]


@pytest.mark.parametrize(("mode", "good"), [(0o600, True), (0o640, True), (0o644, False), (0o660, False), (0o602, False)])
def test_an_env_file_that_others_can_read_or_change_is_refused(tmp_path, mode, good):
    path = tmp_path / "env"
    path.write_text("A=b\n")
    path.chmod(mode)
    if good:
        assert loaded("--env-file", str(path)).variables == {"A": "b"}
    else:
        said = f"--env-file: others can read or change {path}: chmod u=rw,g=r,o= {path}"
        assert problems_of("--env-file", str(path)) == [said]


def test_a_ca_file_that_holds_none_is_named_at_the_start(tmp_path):
    (tmp_path / "empty.pem").touch()
    for name in ("none.pem", "empty.pem"):
        [problem] = problems_of("--url=https://deploy.example.com", SSL_CERT_FILE=str(tmp_path / name))
        assert problem.startswith(f"SSL_CERT_FILE: no certificate can be read from {tmp_path / name}")
    assert loaded("--url=http://deploy.example.com", SSL_CERT_FILE=str(tmp_path / "none.pem")).url


def test_help_names_each_flag_with_its_variable():
    text = agent.build_parser().format_help()
    for flag, variable, _ in agent.OPTIONS:
        assert flag in text and f"[{variable}]" in text.replace("\n", " ").replace("  ", "")


def test_a_working_folder_that_cannot_be_written_is_named_with_its_setting(tmp_path, capsys):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "work"
    assert agent.main(["--workdir", str(folder)]) == agent.EXIT_USAGE
    said = f"agent.py: --workdir {folder}: cannot be written by {pwd.getpwuid(os.geteuid()).pw_name} (Not a directory)\n"
    assert capsys.readouterr().err == said


# Models


HOSTILE = [
    "-main", "--upload-pack=touch x", "a b", "a..b", "a~1", "a^{}", "a:b", "x\ny", "\x00", "", "@", "a@{1}", "../a", "/a", "a/", ".a",
    "a.lock", "a//b", "a\\b", "refs/heads/a?b", "x" * 256, "\ud800", 7, None, ["main"],
]  # fmt: skip


@pytest.mark.parametrize("ref", HOSTILE)
def test_refs_that_git_would_not_take_are_rejected(host, ref):
    with pytest.raises(agent.StepFailed) as caught:
        agent.parse_job(host.job(ref=ref))
    assert (caught.value.reason, str(caught.value)) == ("rejected", "the agent does not take this job: ref")


def test_every_field_at_fault_is_named(host):
    data = host.job(app="../up", clone_url="-x", build=[], activate="", deploy=["a\0b"], timeout=-1) | {"repo": "a", "host": "a/b"}
    with pytest.raises(agent.StepFailed) as caught:
        agent.parse_job(data)
    names = ["app", "repo", "host", "timeout", "spec.build", "spec.activate", "spec.deploy", "spec.clone_url"]
    assert [name for name in names if name in str(caught.value)] == names


@pytest.mark.parametrize("change", [{"id": "../../x"}, {"id": 7}, {"attempt": 0}, {"attempt": "1"}, {"attempt": True}])
def test_a_job_without_usable_key_is_no_job(host, change):
    assert agent.parse_key(host.job() | change) is None


# Spool


def cut(*pieces):
    cutter = agent.LineCutter()
    lines = [line for piece in pieces for line in cutter.feed(piece)]
    return lines + cutter.feed(b"", final=True) + cutter.flush()


def test_messages_are_lines_without_their_newline():
    assert cut(b"a\n\nb", b"c\r\nd") == ["a", "", "bc\r", "d"]


def test_a_character_that_comes_in_two_reads_stays_whole():
    euro = "€".encode()
    assert cut(euro[:1], euro[1:] + b"\n" + euro[:2]) == ["€", "\ufffd"]


def test_output_that_ends_inside_a_character_is_stored_all_the_same(tmp_path):
    spool = agent.Spool(tmp_path / "log")
    spool.write("€".encode()[:2])
    spool.close()
    assert messages(spool.batch(0)) == ["\ufffd"]


@pytest.mark.parametrize("text", ["x" * 200_000, "€" * 70_000, "x" + "😀" * 40_000 + "\nend"])
def test_long_lines_come_in_pieces_that_fit_and_put_together_are_the_output(text):
    raw = text.encode()
    lines = cut(*(raw[i : i + 7001] for i in range(0, len(raw), 7001)))
    assert max(len(line.encode()) for line in lines) <= agent.LINE_LIMIT
    assert "".join(lines) == text.replace("\n", "")
    assert len(lines) < 10


class Clock:
    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


def test_a_batch_is_due_after_a_moment_or_when_it_is_large(tmp_path):
    clock = Clock()
    spool = agent.Spool(tmp_path / "log", clock, clock)
    spool.write(b"one\n")
    assert spool.batch(0) == b""
    clock.time += agent.BATCH_AFTER
    assert messages(spool.batch(0)) == ["one"]
    spool.seek(1)
    spool.write(b"x" * 60_000 + b"\n" + b"y" * 6_000 + b"\n")
    assert [len(message) for message in messages(spool.batch(0))] == [60_000, 6_000]


def test_a_line_without_end_shows_after_a_moment_and_never_twice(tmp_path):
    clock = Clock()
    spool = agent.Spool(tmp_path / "log", clock, clock)
    spool.write(b"Password: ")
    spool.idle()
    clock.time += agent.PARTIAL_AFTER + agent.BATCH_AFTER
    assert spool.batch(0) == b""
    spool.idle()
    clock.time += agent.BATCH_AFTER
    assert messages(spool.batch(0)) == ["Password: "]
    spool.write(b"x\n")
    spool.close()
    spool.seek(1)
    assert messages(spool.batch(0)) == ["x"]
    spool.seek(2)
    assert spool.batch(0) is None


def test_a_line_is_not_cut_because_an_earlier_one_was_slow(tmp_path):
    clock = Clock()
    spool = agent.Spool(tmp_path / "log", clock, clock)
    for piece in (b"one\ntw", b"o\nthr", b"ee\n"):
        spool.write(piece)
        clock.time += agent.PARTIAL_AFTER * 0.8
        spool.idle()
    assert messages(spool.batch(0)) == ["one", "two", "three"]


def test_bodies_stay_below_their_limits(tmp_path):
    spool = agent.Spool(tmp_path / "log")
    spool.write(b"a\n" * 2500 + b"\x01" * 300_000)
    spool.close()
    sizes, total = [], 0
    while (batch := spool.batch(0)) is not None:
        assert len(batch) <= agent.BODY_BYTES
        sizes.append(batch.count(b"\n"))
        total += sizes[-1]
        spool.seek(total)
    assert sizes[:3] == [1000, 1000, 502]
    assert total == 2500 + 5


def test_the_controller_decides_where_to_go_on(tmp_path):
    spool = agent.Spool(tmp_path / "log")
    spool.write(b"0\n1\n2\n3\n")
    spool.close()
    for offset, expected in ((2, ["2", "3"]), (0, ["0", "1", "2", "3"]), (3, ["3"])):
        spool.seek(offset)
        assert (spool.offset, messages(spool.batch(0))) == (offset, expected)


def test_a_spool_outlives_its_agent_less_a_line_that_it_was_writing(tmp_path):
    first = agent.Spool(tmp_path / "log")
    first.write(b"kept\n")
    with open(tmp_path / "log", "ab") as file:
        file.write(b'["to')
    second = agent.Spool(tmp_path / "log")
    second.say("after")
    second.close()
    assert messages(second.batch(0)) == ["kept", "[deploybot] after"]


def acknowledge(spool):
    """All that is there, as a controller does that takes everything."""
    taken = []
    while spool._position < spool._end:
        batch = spool.batch(1)
        taken += messages(batch)
        spool.seek(spool.offset + len(messages(batch)))
    return taken


def test_output_past_the_limit_is_dropped_until_the_controller_is_back_and_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(agent, "SPOOL_LIMIT", 1 << 20)
    monkeypatch.setattr(agent, "SPOOL_ANEW", 1 << 19)
    spool = agent.Spool(tmp_path / "log", words=("hunter2000",))
    for _ in range(300):
        spool.write(b"x" * 8191 + b"\n")
    spool.write(b"and then hunter")
    spool.say("the agent itself is still heard")
    assert (tmp_path / "log").stat().st_size < (1 << 20) + 10_000
    *output, dropped, said = acknowledge(spool)
    assert set(output) == {"x" * 8191} and said == "[deploybot] the agent itself is still heard"
    assert dropped == "[deploybot] 1 MiB wait for the controller: output is not kept from here until it is back"
    spool.write(b"2000")
    spool.write(b"2000\nwhole again\n")
    spool.close()
    assert acknowledge(spool) == ["whole again"] and b"2000" not in (tmp_path / "log").read_bytes()


def test_a_file_that_has_grown_and_is_acknowledged_is_begun_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(agent, "SPOOL_ANEW", 1 << 20)
    spool, largest, taken = agent.Spool(tmp_path / "log"), 0, []
    for number in range(2900):
        spool.write(b"%01999d\n" % number)
        largest = max(largest, (tmp_path / "log").stat().st_size)
        if number % 100 == 99:
            taken += acknowledge(spool)
    assert list(map(int, taken)) == list(range(2900)) and spool.offset == 2900
    assert (1 << 20) <= largest < (1 << 20) + 300_000
    begun = spool._first
    assert 2000 < begun < 2900
    spool.write(b"one more\n")
    spool.seek(begun + 1)  # of a controller that was restored
    assert int(messages(spool.batch(1))[0]) == begun + 1
    second = agent.Spool(tmp_path / "log")  # of an agent that was killed
    assert second.offset == begun and acknowledge(second)[-1] == "one more" and second.offset == 2901
    second.seek(begun - 5)
    [bridge, first, *_] = messages(second.batch(1))
    assert bridge.startswith("[deploybot] 5 line(s) are missing here") and int(first) == begun
    acknowledge(second)
    monkeypatch.setattr(agent, "SPOOL_ANEW", 0)
    second.write(b"again\n")
    second.seek(second._first - 1)
    [bridge, last] = messages(second.batch(1))
    assert bridge.startswith("[deploybot] 1 line(s) are missing here") and last == "again"


def test_a_script_is_held_back_while_the_controller_takes_lines_and_not_while_it_is_away(tmp_path):
    clock, line = Clock(), b"x" * 1023 + b"\n"
    spool = agent.Spool(tmp_path / "log", clock, clock)
    clock.time += 3600  # of silence before the first line are none in which the controller was away
    assert spool.room(0)
    spool.write(line * (agent.HELD_FROM // 1024))
    assert not spool.room(0)
    clock.time += agent.HELD_FOR - 1
    spool.seek(1)  # slow as it is, it is there
    clock.time += agent.HELD_FOR - 1
    assert not spool.room(0)
    clock.time += 1
    assert spool.room(0)
    spool.seek(2)
    assert not spool.room(0)
    acknowledge(spool)
    assert spool.room(0)


def test_a_file_that_has_grown_is_acknowledged_whole_before_a_script_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(agent, "SPOOL_ANEW", 1 << 20)
    spool = agent.Spool(tmp_path / "log")
    spool.write(b"x\n" * 30_000)
    assert not spool.room(0)  # less than HELD_FROM
    spool.seek(29_999)
    assert not spool.room(0)
    acknowledge(spool)
    assert spool.room(0)


def test_lines_that_a_full_disk_takes_half_of_spoil_none_that_follow(tmp_path):
    spool = agent.Spool(tmp_path / "log")
    spool.write(b"one\n")
    whole = spool._writer

    class Full:
        def write(self, data):
            return whole.write(data[: data.index(b"\n") + 9])

        def __getattr__(self, name):
            return getattr(whole, name)

    spool._writer = Full()
    spool.write(b"two\nthree\n")
    spool._writer = whole
    spool.write(b"four\n")
    spool.close()
    assert acknowledge(spool) == ["one", "four"]


@pytest.mark.parametrize("first", [0.5, 8.0])
def test_pauses_lie_in_a_window_that_doubles_up_to_a_limit(first):
    backoff = agent.Backoff(first, chance=lambda: 1.0)
    assert [backoff.next() for _ in range(6)] == [min(15.0, first * 2**number) for number in range(6)]
    assert backoff.next(at_least=60) == 75  # more than all the others that were told so
    backoff.reset()
    assert backoff.next() == first
    assert agent.Backoff(first, chance=lambda: 0.0).next() == 0.0


@pytest.mark.parametrize("away", [0.1, 2.0, 8.0, 60.0])
def test_ten_thousand_agents_that_lose_the_controller_at_once_come_back_spread(away):
    """No second with more than the 2,000 that a controller takes, and nobody later than the longest pause."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance, returns = random.Random(seed), []
    for _ in range(10_000):
        backoff, now = agent.Backoff(agent.RETURN_FIRST, chance.random), 0.0
        while (now := now + max(agent.IDLE_PAUSE, backoff.next())) < away:
            pass
        returns.append(now - away)
    assert max(returns) <= agent.BACKOFF_LIMIT
    assert max(sum(second <= moment < second + 1 for moment in returns) for second in range(16)) <= 2000
    assert sorted(returns)[5000] < agent.RETURN_FIRST


# Secrets in the output


def masked(words, *pieces):
    masker = agent.Masker(words)
    return "".join([masker.feed(piece) for piece in pieces] + [masker.feed("", final=True)])


def reference(words, text):
    """Letter by letter: what stands in any occurrence of a word, or in the beginning of one at the end, is hidden."""
    hidden = [False] * len(text)
    for at in range(len(text)):
        for word in words:
            if text.startswith(word, at) or (word.startswith(text[at:]) and len(text) - at >= agent.MASK_FROM):
                hidden[at : at + len(word)] = [True] * len(text[at : at + len(word)])
    return "".join("*" if hide else letter for letter, hide in zip(text, hidden, strict=True))


def test_a_mask_is_the_same_however_the_text_comes_in_pieces():
    """Two letters make words that overlap, repeat and begin one another as often as can be."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    chance, met = random.Random(seed), 0
    for _ in range(1500):
        letters = chance.choice(["ab", "abc\n"])
        words = agent.secret_words("".join(chance.choices("ab", k=chance.randint(6, 9))) for _ in range(chance.randint(1, 3)))
        text = "".join(chance.choices([*letters, *words, *(word[:4] for word in words)], k=chance.randint(0, 30)))
        cuts = sorted(chance.choices(range(len(text) + 1), k=chance.randint(0, 12)))
        pieces = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        shown = masked(words, *pieces)
        assert re.sub(r"\*+", "*", shown) == re.sub(r"\*+", "*", reference(words, text)), (words, pieces)
        assert shown == masked(words, text)
        met += "*" in shown
    assert met > 500


def test_what_is_hidden_and_what_not():
    words = agent.secret_words(["hunter2000", "hunter2000-and-more", "short", " padded-value ", "first line\nsecond\r\nab"])
    assert words == ("first line", "hunter2000", "hunter2000-and-more", "padded-value", "second")
    for text, shown in (
        ("a hunter2000, a hunter2000-and-more\n", "a ***, a ***\n"),
        ("hunter2000-and-mor\n", "***-and-mor\n"),
        ("hunter2000hunter2000", "******"),
        ("hunter200", "***"),  # the writer was cut off in it
        ("hunte", "hunte"),
        ("short\nab\nfirst line\nsecond\n", "short\nab\n***\n***\n"),
        ("hunter\n2000", "hunter\n2000"),
    ):
        assert masked(words, text) == masked(words, *text) == shown
    assert masked((), "hunter2000") == "hunter2000"


def test_nothing_is_held_back_that_starts_no_secret():
    masker = agent.Masker(("hunter2000",))
    assert [masker.feed(piece) for piece in ("Password: ", "hunt", "ing", " the hunter200", "1\nh")] == [
        "Password: ", "", "hunting", " the ", "hunter2001\n"
    ]  # fmt: skip


def test_secrets_in_the_pieces_that_a_line_goes_up_in(tmp_path):
    """A line goes up in pieces when it waits for its end, when it is long, and when a batch is due in the middle of it."""
    clock, shown = Clock(), []
    spool = agent.Spool(tmp_path / "log", clock, clock, words=("hunter2000",))

    def take():
        clock.time += agent.PARTIAL_AFTER + agent.BATCH_AFTER
        spool.idle()
        clock.time += agent.BATCH_AFTER
        output = messages(spool.batch(0) or b"")
        spool.seek(spool.offset + len(output))
        shown.extend(output)

    for piece in (b"key: hun", b"ter2", b"000", b" used\n", b"x" * (agent.LINE_LIMIT - 4) + b"hunter2000\nhunter2"):
        spool.write(piece)
        take()
    spool.close()
    take()
    assert shown == ["key: ", "***", " used", "x" * (agent.LINE_LIMIT - 4) + "***", "***"]
    assert b"hunt" not in (tmp_path / "log").read_bytes()


def test_the_limit_of_the_spool_cuts_no_secret_open(tmp_path, monkeypatch):
    monkeypatch.setattr(agent, "SPOOL_LIMIT", 1 << 20)
    spool = agent.Spool(tmp_path / "log", words=("hunter2000",))
    for piece in (b"x" * (1 << 20), b"y hunter2", b"000 z"):
        spool.write(piece)
    assert spool._dropping
    spool.close()
    assert b"hunt" not in (tmp_path / "log").read_bytes() and b"***" in (tmp_path / "log").read_bytes()


def test_secrets_stay_out_of_logs_and_errors(host, variables):
    variables |= {"PASSWORD": "hunter2000", "KEY": "-----BEGIN KEY-----\nMIIEvQIBADANBgkq\n-----END KEY-----\n", "PIN": "1234"}
    slowly = 'for part in hun ter2 000; do printf %s "$part"; sleep 0.1; done'
    result = host.deploy(build=f'echo "$PASSWORD"; printf %s "$KEY"; {slowly}; echo; echo "$PIN"; ./no-such-hunter2000')
    lines = host.output.splitlines()
    assert [line for line in lines if line][:6] == ["***", "***", "***", "***", "***", "1234"]
    assert result["exit_code"] == 127 and "./no-such-***" in lines[-1] and "./no-such-***" in result["error"]
    assert host.deploy(ref="hunter2000")["error"].endswith(" has no branch, tag or commit ***")
    assert host.deploy(clone_url=f"{host.source.url}-hunter2000")["reason"] == "fetch_failed"
    assert host.said == f"[deploybot] fetching {host.source.url}-***"
    spools = "".join(path.read_text() for path in (host.machine.workdir / ".agent/jobs").glob("*.log"))
    assert "hunter" not in spools and "MIIE" not in spools and "[deploybot] " in spools


# Git and releases


def test_a_deployment_checks_out_and_switches(host):
    result = host.deploy(build="cat page.txt; ls -A", activate=["sh", "-c", 'readlink "$DEPLOY_CURRENT"; pwd'])
    commit = host.source.git("rev-parse", "main")
    assert result == {
        "status": "success", "exit_code": 0, "reason": None, "error": None, "commit": commit, "rolled_back_to": None
    }  # fmt: skip
    release = host.releases[0]
    assert re.fullmatch(rf"\d{{8}}T\d{{9}}Z-{commit[:12]}", release)
    assert host.output.splitlines() == ["one", "page.txt", f"releases/{release}", str(host.app / "releases" / release)]
    assert os.readlink(host.app / "current") == f"releases/{release}"


def test_what_a_ref_means(host):
    source = host.source
    first = source.git("rev-parse", "main")
    source.git("tag", "--annotate", "v1", "--message=one")
    source.git("checkout", "--quiet", "-b", "release/1.x")
    second = source.commit({"page.txt": "two\n"})
    source.git("branch", "v1")  # a tag of the same name: the branch counts
    for ref, commit in (
        ("main", first), ("release/1.x", second), ("refs/heads/main", first), ("refs/tags/v1", first), ("v1", second),
        (first, first), (second[:8], second), (first.upper(), first),
    ):  # fmt: skip
        assert host.deploy(ref)["commit"] == commit, ref
    assert host.deploy("v1", build='echo "$DEPLOY_BRANCH $DEPLOY_REF"')["status"] == "success"
    assert host.output == "v1 v1"


def test_a_branch_that_moved_back_or_went_is_followed(host):
    source = host.source
    first = source.git("rev-parse", "main")
    source.git("branch", "other")
    second = source.commit({"page.txt": "two\n"})
    assert host.deploy()["commit"] == second
    source.git("reset", "--quiet", "--hard", first)
    source.git("branch", "-D", "--quiet", "other")
    assert host.deploy()["commit"] == first
    assert host.deploy("other")["reason"] == "fetch_failed"
    source.git("branch", "other/below")
    assert host.deploy("other/below")["commit"] == first


def test_a_commit_that_no_branch_or_tag_reaches_is_not_deployed(host):
    source = host.source
    source.git("checkout", "--quiet", "--detach")
    fork = source.commit({"page.txt": "from a fork\n"})
    source.git("update-ref", "refs/pull/1/head", fork)
    source.git("checkout", "--quiet", "main")
    host.deploy()
    mirror = host.app / "repo.git"
    source.git("fetch", "--quiet", source.url, "refs/pull/1/head", cwd=mirror)  # it is even there already
    for ref in (fork, fork[:10], "refs/pull/1/head"):
        result = host.deploy(ref)
        assert (result["status"], result["reason"], result["commit"]) == ("failed", "fetch_failed", None), ref
    assert host.read() == "one\n"


def test_a_repository_that_is_not_there_says_why_without_passwords(host):
    result = host.deploy(clone_url="https://user:secret@127.0.0.1:1/x.git")
    assert result["reason"] == "fetch_failed"
    host.machine.git_protocols = "https"
    result = host.deploy(clone_url="https://user:secret@127.0.0.1:1/x.git")
    assert result["reason"] == "fetch_failed" and "127.0.0.1" in result["error"]
    assert "secret" not in result["error"] + host.said
    assert not (host.app / "current").exists()


@pytest.mark.parametrize("url", ["ext::sh -c touch% canary", "ext::touch%20canary", "file:///nowhere"])
def test_only_the_allowed_protocols_are_spoken(host, tmp_path, url):
    host.machine.git_protocols = "https:ssh"
    result = host.deploy(clone_url=url) if " " not in url else {"reason": "fetch_failed", "error": "not allowed"}
    assert result["reason"] == "fetch_failed" and "not allowed" in result["error"]
    assert not list(tmp_path.rglob("canary"))


def test_a_protocol_that_could_be_allowed_comes_with_the_setting(host):
    host.machine.git_protocols = "ssh"
    hint = "; allow it with --git-protocols / DEPLOYBOT_GIT_PROTOCOLS on the agent"
    for url, protocol in (("file:///nowhere", "file"), ("https://127.0.0.1:1/x.git", "https")):
        assert host.deploy(clone_url=url)["error"].endswith(f"transport '{protocol}' not allowed{hint}")
    assert hint not in host.deploy(clone_url="ext::true")["error"]


def test_blobs_come_when_they_are_needed_where_the_remote_can_do_that(host):
    host.source.commit({"page.txt": "two\n"})
    assert host.deploy()["status"] == "success"
    kinds = host.source.git("cat-file", "--batch-check", "--batch-all-objects", cwd=host.app / "repo.git").split()
    assert kinds.count("blob") == 1  # "one" was never fetched
    assert kinds.count("commit") == 2


def test_a_remote_without_filters_is_fetched_whole(host):
    host.source.git("config", "uploadpack.allowFilter", "false")
    host.source.commit({"page.txt": "two\n"})
    assert host.deploy()["status"] == "success"
    kinds = host.source.git("cat-file", "--batch-check", "--batch-all-objects", cwd=host.app / "repo.git").split()
    assert kinds.count("blob") == 2


@pytest.mark.parametrize("where", ["fetch", "checkout"])
def test_a_remote_that_fails_with_filters_is_fetched_whole(host, tmp_path, env, where):
    env["PATH"] = fake_git(tmp_path, env, {
        "fetch": 'case "$*" in *--filter=blob:none*) echo no filters here >&2; exit 1;; esac',
        "checkout": 'case "$*" in *read-tree*) grep -q "partial.: true" "$GIT_DIR/deploybot.json" && exit 128;; esac',
    }[where])  # fmt: skip
    assert host.deploy()["status"] == "success"
    assert json.loads((host.app / "repo.git/deploybot.json").read_text())["partial"] is False


def test_locks_that_a_killed_git_left_do_not_stop_the_next_fetch(host):
    host.deploy()
    mirror = host.app / "repo.git"
    for name in ("packed-refs.lock", "refs/heads/main.lock", "config.lock", "deploybot.index.lock"):
        (mirror / name).write_text("")
    host.source.commit({"page.txt": "two\n"})
    before = (mirror / "deploybot.json").stat()
    assert host.deploy()["status"] == "success"
    assert host.read() == "two\n"
    assert (mirror / "deploybot.json").stat().st_mtime_ns == before.st_mtime_ns  # it is still the same mirror


def test_a_broken_mirror_is_made_anew_but_not_for_a_remote_that_is_away(host):
    host.deploy()
    mirror = host.app / "repo.git"
    host.source.path.rename(host.source.path.with_name("away"))
    assert host.deploy()["reason"] == "fetch_failed" and (mirror / "deploybot.json").exists()
    host.source.path.with_name("away").rename(host.source.path)
    for path in (mirror / "objects/pack").iterdir():
        path.unlink()
    host.source.commit({"page.txt": "two\n"})
    assert host.deploy()["status"] == "success"
    assert host.read() == "two\n"


def test_a_mirror_that_was_never_complete_is_made_anew(host):
    mirror = host.app / "repo.git"
    mirror.mkdir(parents=True)
    (mirror / "config").write_text("half a")
    assert host.deploy()["status"] == "success"


def test_another_clone_url_makes_another_mirror(host, tmp_path, env):
    host.deploy()
    other = Source(tmp_path / "other", env)
    other.commit({"page.txt": "other\n"})
    assert host.deploy(clone_url=other.url)["status"] == "success"
    assert host.read() == "other\n"


def test_submodules_are_there_as_plain_files(host, tmp_path, env):
    inner = Source(tmp_path / "inner", env)
    inner.commit({"deep.txt": "deep\n"})
    library = Source(tmp_path / "library", env)
    library.commit({"lib.txt": "v1\n"})
    library.git("submodule", "--quiet", "add", "../inner", "inner")
    library.commit({}, "with a submodule of its own")
    host.source.git("submodule", "--quiet", "add", "../library", "vendor/library")
    host.source.commit({}, "with a submodule")
    for version in ("v1\n", "v2\n"):
        assert host.deploy()["error"] is None
        assert host.read("vendor/library/lib.txt") == version
        assert host.read("vendor/library/inner/deep.txt") == "deep\n"
        assert not list((host.app / "current").resolve().rglob(".git"))
        library.commit({"lib.txt": "v2\n"})
        if version == "v1\n":  # the library also moves to another place
            library.path.rename(library.path.with_name("moved"))
            library.path = library.path.with_name("moved")
            host.source.git("config", "-f", ".gitmodules", "submodule.vendor/library.url", "../moved")
            host.source.git("submodule", "--quiet", "sync")
            host.source.git("submodule", "--quiet", "update", "--remote")
            host.source.commit({}, "a newer library")


def test_hooks_of_the_host_do_not_run_in_a_checkout(host, tmp_path, env):
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    for name in ("post-checkout", "reference-transaction", "post-index-change"):
        (hooks / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/canary\n")
        (hooks / name).chmod(0o755)
    Path(env["HOME"], ".gitconfig").write_text(f"[core]\n\thooksPath = {hooks}\n\tautocrlf = true\n")
    assert host.deploy()["status"] == "success"
    assert not (tmp_path / "canary").exists()
    assert (host.app / "current/page.txt").read_bytes() == b"one\n"


def test_the_credentials_of_the_host_are_used(host, tmp_path, env):
    """insteadOf stands for all that a host's own git configuration brings."""
    Path(env["HOME"], ".gitconfig").write_text(f'[url "{host.source.url}"]\n\tinsteadOf = https://git.example.com/o/n.git\n')
    assert host.deploy(clone_url="https://git.example.com/o/n.git")["status"] == "success"


def test_five_releases_stay_and_always_the_current_one_and_the_one_before(host, tmp_path):
    moments = iter(range(1_000_000_000, 2_000_000_000, 60))
    host.machine.now = lambda: next(moments)
    host.deploy()
    host.deploy()
    oldest = host.releases[:2]
    for _ in range(4):
        host.deploy()
    assert len(host.releases) == agent.KEEP_RELEASES and host.releases[0] == oldest[1]
    folder = host.folder
    current = folder.active()
    assert current.name == host.releases[-1]
    folder.switch(folder.release(host.releases[0]))  # someone went back by hand
    before = host.releases[0]
    host.deploy()
    host.deploy()
    assert before not in host.releases[-5:]
    refs = host.source.git("for-each-ref", "--format=%(refname:lstrip=2)", "refs/deploybot", cwd=host.app / "repo.git")
    assert refs.split() == host.releases


def test_the_release_before_stays_however_old_it_is(host):
    moments = iter(range(1_000_000_000, 2_000_000_000, 60))
    host.machine.now = lambda: next(moments)
    for _ in range(5):
        host.deploy()
    folder = host.folder
    folder.switch(folder.release(host.releases[0]))
    before = host.releases[0]
    host.deploy()
    assert before in host.releases and len(host.releases) == 6


def test_failed_releases_push_out_no_good_one(host):
    host.deploy()
    host.deploy()
    good = host.releases
    for _ in range(5):
        assert host.deploy(build="mkdir sealed; touch sealed/x; chmod 500 sealed; exit 7")["exit_code"] == 7
    assert host.releases == good
    assert host.read() == "one\n"


def test_current_leads_somewhere_at_every_moment(host):
    host.deploy()
    folder = host.folder
    releases = [folder.active(), folder.add(folder.new_name("f" * 40))]
    missing, over = [], threading.Event()

    def watch():
        while not over.is_set():
            try:
                os.readlink(host.app / "current")
            except OSError as error:
                missing.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for turn in range(100):
        folder.switch(releases[turn % 2])
    over.set()
    watcher.join()
    assert not missing and folder.active() == releases[1]


def test_a_release_folder_that_cannot_be_written_is_named(host, monkeypatch):
    host.deploy()
    seal(monkeypatch, host.app / "releases")
    result = host.deploy()
    assert result["reason"] == "rejected"
    assert re.fullmatch(rf"cannot write {host.app}/releases/\S+: Permission denied", result["error"])


# Steps


def test_a_failing_build_leaves_current_where_it_was(host):
    host.deploy()
    before = os.readlink(host.app / "current")
    result = host.deploy(build=["sh", "-c", "echo broken >&2; exit 3"], activate="touch activated")
    assert (result["status"], result["reason"], result["exit_code"]) == ("failed", "exit_code", 3)
    assert (host.output, os.readlink(host.app / "current")) == ("broken", before)


def test_a_failing_activate_goes_the_way_back(host):
    first = host.deploy(activate="echo $DEPLOY_COMMIT")["commit"]
    before = os.readlink(host.app / "current")
    second = host.source.commit({"page.txt": "bad\n"})
    result = host.deploy(activate='echo "$DEPLOY_COMMIT in $(cat page.txt)"; grep -q one page.txt')
    assert (result["status"], result["exit_code"], result["commit"], result["rolled_back_to"]) == ("failed", 1, second, first)
    assert host.output.splitlines() == [f"{second} in bad", f"{first} in one"]
    assert os.readlink(host.app / "current") == before and len(host.releases) == 1


def test_a_way_back_that_fails_too_is_no_rollback(host):
    host.deploy()
    host.source.commit({"page.txt": "two\n"})
    result = host.deploy(activate="exit 9")
    assert (result["exit_code"], result["rolled_back_to"]) == (9, None)
    assert "going back to" in host.said and "failed too: activate ended with exit code 9" in host.said
    assert host.read() == "one\n"


def test_a_first_activate_that_fails_leaves_nothing_behind(host):
    assert host.deploy(activate="exit 1")["status"] == "failed"
    assert not os.path.lexists(host.app / "current") and host.releases == []


def test_the_deploy_form_runs_before_the_switch_and_instead_of_both(host):
    host.deploy()
    before = os.readlink(host.app / "current")
    result = host.deploy(deploy='readlink "$DEPLOY_CURRENT"; echo "$DEPLOY_PREVIOUS"', build="exit 1", activate="exit 1")
    assert result["status"] == "success"
    assert host.output.splitlines() == [before, str(host.app / before)]
    assert os.readlink(host.app / "current") != before


def test_the_convention_of_the_repository(host):
    host.source.commit({".deploybot/deploy": '#!/bin/sh\necho "$0 for $DEPLOY_APP"\n'})
    assert host.deploy()["status"] == "success"
    assert host.output == "./.deploybot/deploy for web"
    host.deploy(build="echo configured")
    assert host.output == "configured"
    (host.source.path / ".deploybot/deploy").chmod(0o644)
    host.source.commit({}, "no longer executable")
    assert host.deploy()["status"] == "success" and host.output == ""


@pytest.mark.parametrize(("command", "code"), [(["./no-such"], 127), (["./page.txt"], 126), ("kill -TERM $$", 143)])
def test_exit_codes_are_those_of_a_shell(host, command, code):
    result = host.deploy(build=command)
    assert (result["reason"], result["exit_code"]) == ("exit_code", code)


@pytest.mark.parametrize(
    ("command", "code", "cause", "hint"),
    [
        (["./page.txt"], 126, "./page.txt: Permission denied", "is it executable?"),
        (["./none"], 127, "./none: No such file or directory", "is it there, and what its #! line names?"),
        ("echo before; ./page.txt", 126, "./page.txt: Permission denied", "is it executable?"),
        ("echo before; no-such", 127, "not found", "is it there, and what its #! line names?"),
    ],
)
def test_the_error_of_a_command_that_does_not_start_has_the_cause(host, command, code, cause, hint):
    error = host.deploy(build=command)["error"]
    assert error.startswith(f"build ended with exit code {code}: ") and error.endswith(f"{cause}; {hint}")


def test_an_exit_code_of_126_without_a_word_gets_no_cause_of_an_earlier_command(host):
    assert host.deploy(build="echo built", activate="exit 126")["error"] == "activate ended with exit code 126"


def test_scripts_see_their_variables_and_nothing_else(host, env, variables):
    env |= {"DEPLOYBOT_AGENT_TOKEN": "dbt_secret", "DEPLOYBOT_URL": "x", "NOTIFY_SOCKET": "x", "CREDENTIALS_DIRECTORY": "/x"}
    env |= {"AWS_SECRET_ACCESS_KEY": "of whoever started the agent", "LD_PRELOAD": "", "LANG": "C"}
    variables |= {"PORT": "8080", "DEPLOY_HOST": "not from here"}
    commit = host.source.git("rev-parse", "main")
    data = host.job(build=["/usr/bin/env"], metadata={"branch": "feature/x"})
    host.perform(data)
    release = str(host.app / "releases" / host.releases[0])
    assert dict(line.split("=", 1) for line in host.output.splitlines()) == {
        "PATH": env["PATH"], "HOME": env["HOME"], "USER": agent.user_name(), "LANG": "C", "PORT": "8080",
        "DEPLOY_APP": "web", "DEPLOY_REPO": "o/n", "DEPLOY_REF": "main", "DEPLOY_COMMIT": commit, "DEPLOY_BRANCH": "feature/x",
        "DEPLOY_HOST": "h", "DEPLOY_JOB_ID": data["id"], "DEPLOY_RELEASE": release, "DEPLOY_PREVIOUS": "",
        "DEPLOY_CURRENT": str(host.app / "current"),
    }  # fmt: skip


def test_commands_stay_out_of_the_log(host):
    host.deploy(build="true s3cret-argument")
    assert "s3cret" not in host.said + host.output


@pytest.mark.parametrize("name", ["a;touch${IFS}canary", "$(touch${IFS}canary)", "`touch${IFS}canary`", "x'|touch'canary", "a&&b"])
def test_what_is_pushed_never_runs(host, tmp_path, name):
    host.source.git("checkout", "--quiet", "-b", name)
    host.source.commit({"page.txt": "pushed\n"}, "$(touch canary); `touch canary` '; touch canary; '")
    metadata = {"branch": name, "commit_message": "$(touch canary)"}
    result = host.deploy(name, build='echo "$DEPLOY_REF"', activate=["sh", "-c", "echo $DEPLOY_BRANCH"], metadata=metadata)
    assert result["status"] == "success"
    assert host.output.splitlines() == [name, name]
    assert not list(tmp_path.rglob("*canary*")) or all("refs" in str(path) for path in tmp_path.rglob("*canary*"))


def test_two_jobs_of_one_app_wait_for_each_other(host):
    held = agent.take_lock(host.folder.path / "lock")
    assert host.deploy(timeout=0.3)["reason"] == "timeout"
    assert "waiting for another job of web" in host.said
    os.close(held)
    assert host.deploy()["status"] == "success"


# What a host does not do


def test_a_repository_that_is_not_allowed_here_is_not_even_fetched(host):
    host.machine.allow_repos = agent.repo_patterns("MyOrg/*,o/n?", [])
    result = host.deploy()
    assert (result["status"], result["reason"]) == ("failed", "rejected")
    assert result["error"] == "this host does not deploy o/n: --allow-repo is myorg/*, o/n?"
    assert not (host.app / "repo.git").exists() and host.releases == []
    host.machine.allow_repos = agent.repo_patterns("myorg/*, O/N", [])
    assert host.deploy()["status"] == "success"


def submodule(source, text, path="sub"):
    """A commit whose .gitmodules says what no git would write."""
    (source.path / ".gitmodules").write_text(text)
    commit = source.git("rev-parse", "HEAD")
    source.git("add", ".gitmodules")
    source.git("update-index", "--add", "--cacheinfo", f"160000,{commit},{path}")
    source.git("commit", "--quiet", "--message=a submodule")


@pytest.mark.parametrize(
    ("name", "path", "url", "more"),
    [
        ("sub", "sub", "ext::sh -c touch% {canary}", ""),
        ("sub", "sub", "-u./payload", ""),
        ("sub", "sub", "{source}", "update = !touch {canary}"),
        ("../../../outside", "sub", "{source}", ""),
        ("sub", "../../../outside", "{source}", ""),
    ],
)
def test_a_hostile_submodule_runs_nothing_and_leaves_no_folder_but_its_own(host, tmp_path, env, name, path, url, more):
    """The host's own configuration lets git speak all protocols; what the agent says has to count."""
    canary = tmp_path / "canary"
    (host.source.path / "payload").write_text(f"#!/bin/sh\ntouch {canary}\n")
    (host.source.path / "payload").chmod(0o755)
    with open(Path(env["HOME"], ".gitconfig"), "a") as file:
        file.write('[protocol]\n\tallow = always\n[protocol "ext"]\n\tallow = always\n')
    said = {"canary": canary, "source": host.source.url}
    text = f'[submodule "{name}"]\n\tpath = {path}\n\turl = {url.format(**said)}\n\t{more.format(**said)}\n'
    host.source.commit({})
    submodule(host.source, text)
    before = {entry.name for entry in tmp_path.iterdir()}
    result = host.deploy()
    assert not canary.exists() and {entry.name for entry in tmp_path.iterdir()} == before | {"work"}
    if path == "sub" and not more and name == "sub":
        assert result["reason"] == "fetch_failed" and not (host.app / "current").exists()
    assert not list(tmp_path.rglob("outside"))


@pytest.fixture
def over_http(host):
    """The source over dumb HTTP; where the path starts with /locked, a password is asked for."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(host.source.path))

        def do_GET(self):
            if not self.path.startswith("/locked"):
                return super().do_GET()
            self.send_response(401)
            self.send_header("WWW-Authenticate", "Basic realm=x")
            self.send_header("Content-Length", "0")
            return self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    host.machine.git_protocols = "http"
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_repository_from_afar_gets_no_file_of_this_machine_as_its_submodule(host, over_http, tmp_path, env):
    private = Source(tmp_path / "private", env)
    private.commit({"key.txt": "private\n"})
    submodule(host.source, f'[submodule "sub"]\n\tpath = sub\n\turl = {private.path}\n')
    host.source.git("update-server-info")
    result = host.deploy(clone_url=f"{over_http}/.git")
    assert result["reason"] == "fetch_failed" and "transport 'file' not allowed" in result["error"], result
    host.source.git("rm", "--quiet", "-r", "--cached", "sub", ".gitmodules")
    host.source.git("commit", "--quiet", "--message=none")
    host.source.git("update-server-info")
    assert host.deploy(clone_url=f"{over_http}/.git")["status"] == "success"


def test_git_asks_nobody_for_a_password(host, over_http):
    result = host.deploy(clone_url=f"{over_http}/locked.git", timeout=10)
    assert result["reason"] == "fetch_failed" and "terminal prompts disabled" in result["error"]


def test_what_git_is_told(host, tmp_path, env):
    """A ref stands only behind --end-of-options, from there on hex alone; each call carries what protects it."""
    said = tmp_path / "said"
    host.source.git("branch", "a;b$(c)")
    env["PATH"] = fake_git(tmp_path, env, f'echo "$GIT_ALLOW_PROTOCOL $GIT_TERMINAL_PROMPT $*" >>{said}')
    assert host.deploy("a;b$(c)")["status"] == "success"
    calls = said.read_text().splitlines()
    assert len(calls) > 5
    for call in calls:
        assert call.startswith("file 0 ") and " -c core.hooksPath=/dev/null " in call
        assert "a;b$(c)" not in call or call.endswith(" --end-of-options refs/heads/a;b$(c)^{commit}")
    assert sum("a;b$(c)" in call for call in calls) == 1


def test_nothing_but_hex_goes_on_from_where_a_ref_is_resolved(host, tmp_path, env):
    said = tmp_path / "said"
    answer = 'case "$*" in *rev-parse*) echo --output=/canary; exit 0;; esac'
    env["PATH"] = fake_git(tmp_path, env, f'echo "$*" >>{said}; {answer}')
    assert host.deploy()["error"].endswith("has no branch, tag or commit main")
    assert "canary" not in said.read_text()


def test_a_mirror_of_another_user_is_made_anew_as_its_configuration_can_name_commands(host, tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    host.deploy()
    mirror = host.app / "repo.git"
    assert stat.S_IMODE(mirror.stat().st_mode) == 0o700
    host.source.git("config", "remote.origin.uploadpack", f"touch {canary}; git-upload-pack", cwd=mirror)
    assert host.deploy()["status"] == "success" and canary.exists()  # it is one that would run
    canary.unlink()
    if os.geteuid() == 0:
        os.chown(mirror, 65534, 65534)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 65534)
    assert host.deploy()["status"] == "success" and not canary.exists()


def test_a_build_whose_folders_cannot_be_written_goes_without_touching_what_it_links_to(host, tmp_path, monkeypatch):
    """As one sees it that is not root, who has to open such folders first."""
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o755)
    tree = tmp_path / "tree"
    (tree / "sealed").mkdir(parents=True)
    (tree / "sealed/file").touch()
    (tree / "link").symlink_to(outside)
    agent.open_folders(tree)
    assert stat.S_IMODE((tree / "sealed").stat().st_mode) == 0o700 and stat.S_IMODE(outside.stat().st_mode) == 0o755


# Locks


def test_agents_with_folders_of_their_own_do_not_run_one_app_of_one_host_at_once(host, tmp_path, env, source, variables):
    other = Host(tmp_path / "elsewhere", env, source, variables)
    other.agent_id = host.agent_id
    job = agent.parse_job(host.job())
    with agent.AppFolder(host.app, time.time, f"{job.agent} {job.host}").locked(patient(), lambda: None):
        assert other.deploy(timeout=0.3)["reason"] == "timeout"
        assert "waiting for another job of web on this host" in other.said
        assert other.deploy(app="api")["status"] == "success"
        other.agent_id = str(uuid.uuid4())  # a host of its own at the controller, or of another controller
        assert other.deploy()["status"] == "success"
    other.agent_id = host.agent_id
    assert other.deploy()["status"] == "success"


def patient():
    return agent.Limits(None, float("inf"), time.monotonic)


def test_the_name_of_an_app_ends_with_the_process_that_holds_it():
    name = str(uuid.uuid4())
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import agent; held = agent.take_name({name!r}); print(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        assert agent.take_name(name) is None
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with until(lambda: agent.take_name(name)):
        assert agent.take_name(name) is None


@as_root
def test_scripts_run_as_another_user_who_owns_its_release_and_nothing_else(ruled, public, nobody):
    outside = public / "outside"
    outside.mkdir()
    (outside / "file").touch()
    source = ruled.source
    source.commit({"deep/er/file": "x", "probe": """#!/bin/sh
        echo "$(id -u) $(id -g) $(id -G) $HOME $USER"
        grep -E "^Cap(Inh|Prm|Eff|Amb):" /proc/self/status | tr -d "\\n"; echo
        for file in .agent .agent/secret .agent/jobs web/repo.git/config; do
            cat "$DEPLOY_RELEASE/../../../$file" >/dev/null 2>&1 && echo "read $file"
        done
        touch "$DEPLOY_RELEASE/../x" "$DEPLOY_CURRENT.x" 2>/dev/null && echo "wrote beside the release"
        ln -sfn /tmp "$DEPLOY_CURRENT" 2>/dev/null && echo "moved current"
        touch "$DEPLOY_RELEASE/made" deep/er/made && rm page.txt && echo "wrote in the release"
        """})  # fmt: skip
    (source.path / "link").symlink_to(outside / "file")
    (source.path / "folder").symlink_to(outside)
    source.commit({})
    umask, groups = os.umask(0o077), os.getgroups()  # as root often has them
    os.setgroups([0, 4, 1000])
    try:
        assert ruled.deploy(build=["./probe"])["error"] is None
    finally:
        os.umask(umask)
        os.setgroups(groups)
    groups = " ".join(map(str, sorted({nobody.gid, *nobody.groups})))
    who, capabilities, *done = ruled.output.splitlines()
    assert who == f"{nobody.uid} {nobody.gid} {groups} {nobody.home} nobody"
    assert set(re.findall(r"Cap\w+:\s*(\w+?)(?=Cap|$)", capabilities)) == {"0" * 16}
    assert done == ["wrote in the release"]
    release = ruled.app / "releases" / ruled.releases[0]
    owners = {path.lstat().st_uid for path in [release, *release.rglob("*")]}
    assert owners == {nobody.uid}
    kept = (ruled.app, ruled.app / "releases", ruled.app / "repo.git", ruled.app / "current", outside, outside / "file")
    assert {path.lstat().st_uid for path in kept} == {0}
    assert ruled.deploy(build="mkdir sealed; touch sealed/x; chmod 0 sealed; exit 7")["exit_code"] == 7
    assert len(ruled.releases) == 1


def test_a_folder_is_handed_over_after_what_is_in_it(tmp_path, monkeypatch):
    """Else its new owner could put a link in the place of what comes next."""
    (tmp_path / "tree/a/b").mkdir(parents=True)
    (tmp_path / "tree/a/b/c").touch()
    (tmp_path / "tree/z").touch()
    given = []

    def chown(path, uid, gid, dir_fd=None, follow_symlinks=True):
        folder = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd else ""
        given.append(os.path.join(folder, path))

    monkeypatch.setattr(os, "chown", chown)
    agent.hand_over(tmp_path / "tree", agent.Account("x", 1, 1, (), "/"))
    assert sorted(given) == [str(tmp_path / "tree" / name).rstrip("/") for name in ("", "a", "a/b", "a/b/c", "z")]
    assert not [(one, later) for at, one in enumerate(given) for later in given[at:] if later.startswith(one + "/")]


STAYING = """#!/bin/sh
setsid sh -c 'trap "" TERM; echo $$ >>pids; while :; do sleep 0.05; done' &
echo $$ >>pids
while :; do sleep 0.05; done
"""


@as_root
@pytest.mark.parametrize("how", ["timeout", "crash"])
def test_the_processes_of_another_user_are_ended_too(ruled, how):
    ruled.source.commit({"run": STAYING})
    found = []

    def pids():
        files = list((ruled.app / "releases").glob("*/pids"))
        found[:] = files[0].read_text().split() if files else []
        return len(found) == 2

    data = ruled.job(deploy=["./run"], timeout=0.7)
    if how == "timeout":
        watcher = threading.Thread(target=lambda: until(pids))
        watcher.start()
        assert ruled.perform(data)["reason"] == "timeout"
        watcher.join()
    else:
        entry = ruled.journal.begin(data, agent.boot_id())
        release = ruled.folder.add(ruled.folder.new_name("a" * 40))
        (release / "run").write_text(STAYING)
        agent.hand_over(release, ruled.machine.account)
        entry.note(release=release.name)
        child = subprocess.Popen(
            ["sh", "run"],
            cwd=release,
            env={"DEPLOY_JOB_ID": data["id"], "PATH": "/usr/bin:/bin"},
            user=65534,
            start_new_session=True,
        )
        until(pids)
        assert ruled.go(entry, step="recover")["reason"] == "agent_crashed"
        child.wait()
        assert not release.exists()
    assert not any(lives(int(pid)) for pid in found)


@as_root
@pytest.mark.parametrize("name", ["web", "web/releases"])
def test_folders_that_scripts_could_swap_are_not_worked_in(ruled, nobody, name):
    ruled.deploy()
    folder = ruled.machine.workdir / name
    os.chown(folder, nobody.uid, nobody.gid)
    result = ruled.deploy()
    assert (result["reason"], result["error"]) == ("rejected", f"{folder} must be root's own folder: chown root: {folder}")
    os.chown(folder, 0, 0)
    assert ruled.deploy()["status"] == "success"
    folder.rename(folder.with_name("moved"))
    folder.symlink_to(folder.with_name("moved"))
    assert ruled.deploy()["reason"] == "rejected"


@as_root
def test_a_working_folder_that_scripts_could_change_or_not_enter_ends_the_start(public, nobody, tmp_path):
    work = public / "above/work"
    (work / ".agent").mkdir(parents=True, mode=0o700)
    agent.check_account(nobody, work)
    for folder, change, back in (
        (work, lambda: os.chown(work, nobody.uid, -1), lambda: os.chown(work, 0, -1)),
        (work.parent, lambda: work.parent.chmod(0o775), lambda: work.parent.chmod(0o755)),
        (work / ".agent", lambda: os.chown(work / ".agent", nobody.uid, -1), lambda: os.chown(work / ".agent", 0, -1)),
    ):
        change()
        with pytest.raises(
            agent.ConfigError, match=f"^--run-as: only root may write {folder}: chown root: {folder}; chmod go-w {folder}$"
        ):
            agent.check_account(nobody, work)
        back()
    work.parent.chmod(0o700)
    with pytest.raises(agent.ConfigError, match=f"^--run-as: nobody may not enter {work}: chmod a\\+x"):
        agent.check_account(nobody, work)


def public_python():
    """An interpreter that other users can run, too."""
    for path in (os.path.realpath(sys.executable), "/usr/bin/python3"):
        probe = [path, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        with contextlib.suppress(OSError):
            if subprocess.run(probe, user="nobody", capture_output=True, check=False).returncode == 0:
                return path
    pytest.skip("no Python that another user could run")


@as_root
def test_a_script_of_the_same_user_cannot_read_the_token_out_of_the_agents_memory(public, nobody):
    work = public / "work"
    work.mkdir()
    os.chown(work, nobody.uid, nobody.gid)
    (public / "agent.py").write_bytes((ROOT / "agent.py").read_bytes())
    code = "import sys, time; sys.path.insert(0, sys.argv.pop(1)); import agent; agent.Agent.run = lambda self: print(flush=True) or time.sleep(60); agent.main()"
    process = subprocess.Popen(
        [public_python(), "-c", code, str(public), "--workdir", str(work)], stdout=subprocess.PIPE, cwd="/",
        user=nobody.uid, group=nobody.gid, extra_groups=(), env={"PATH": "/usr/bin:/bin", "DEPLOYBOT_AGENT_TOKEN": "dbt_enrol"},
    )  # fmt: skip
    try:
        process.stdout.readline()
        rights = {"user": nobody.uid, "group": nobody.gid, "extra_groups": ()}
        for file in ("environ", "maps"):
            argv = ["cat", f"/proc/{process.pid}/{file}"]
            done = subprocess.run(argv, capture_output=True, text=True, check=False, **rights)
            assert "Permission denied" in done.stderr and done.stdout == ""
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def stop_when(condition, stop, cause):
    thread = threading.Thread(target=lambda: (until(condition), stop.set(cause)))
    thread.start()
    return thread


def test_cancel_leaves_no_process_not_even_a_daemon_that_ignores_term(host, stubborn):
    stop = agent.Stop()
    waiter = stop_when(stubborn, stop, "cancelled")
    result = host.deploy(deploy=["./stubborn.sh"], stop=stop)
    waiter.join()
    assert (result["status"], result["reason"], result["error"]) == ("cancelled", "cancelled", "cancelled")
    assert len(stubborn()) == 2 and not any(map(lives, stubborn()))
    assert "got TERM" in host.output.replace("x", "").replace("\n", "")
    assert host.releases == []


def test_the_timeout_leaves_no_process(host, stubborn):
    result = host.deploy(deploy=["./stubborn.sh"], timeout=1)
    assert (result["status"], result["reason"]) == ("failed", "timeout")
    assert "1 s" in result["error"]
    assert len(stubborn()) == 2 and not any(map(lives, stubborn()))


def test_a_failing_script_leaves_no_process(host, tmp_path, variables, monkeypatch):
    monkeypatch.setattr(agent, "DRAIN", 0.1)
    variables["PIDS"] = str(tmp_path / "pids")
    host.deploy(build='sleep 60 & echo $! >"$PIDS"; exit 4')
    assert not lives(int((tmp_path / "pids").read_text()))


def test_a_cancel_in_activate_goes_the_way_back(host):
    first = host.deploy()["commit"]
    host.source.commit({"page.txt": "two\n"})
    stop = agent.Stop()
    marker = host.app / "activating"
    waiter = stop_when(marker.exists, stop, "cancelled")
    result = host.deploy(activate=f"grep -q one page.txt && exit; touch {marker}; sleep 60", stop=stop)
    waiter.join()
    assert (result["status"], result["rolled_back_to"], host.read()) == ("cancelled", first, "one\n")


def test_a_cancel_ends_a_script_that_is_held_back(host, monkeypatch):
    monkeypatch.setattr(agent, "HELD_FROM", 1 << 20)
    monkeypatch.setattr(agent, "HELD_FOR", 60.0)
    stop, begun = agent.Stop(), time.monotonic()
    logs = host.machine.workdir / ".agent/jobs"
    held = stop_when(lambda: sum(path.stat().st_size for path in logs.glob("*.log")) >= agent.HELD_FROM, stop, "cancelled")
    assert host.deploy(build="yes " + "x" * 999, stop=stop)["status"] == "cancelled"
    held.join()
    assert time.monotonic() - begun < 20


def test_the_last_words_of_a_script_that_was_held_back_are_kept(host, monkeypatch):
    monkeypatch.setattr(agent, "HELD_FROM", 10_000)
    monkeypatch.setattr(agent, "HELD_FOR", 60.0)
    stored = f"until [ $(cat {host.machine.workdir}/.agent/jobs/*.log | wc -c) -gt 10000 ]; do sleep 0.01; done"
    assert host.deploy(build=f"seq 1000; {stored}; echo the last words")["status"] == "success"
    assert host.output.endswith("\n1000\nthe last words")


def test_what_a_successful_script_leaves_running_stays_and_holds_nobody_up(host, tmp_path, variables, monkeypatch):
    monkeypatch.setattr(agent, "DRAIN", 0.1)
    variables["PIDS"] = str(tmp_path / "pids")
    begun = time.monotonic()
    assert host.deploy(activate='sleep 60 & echo $! >"$PIDS"; echo done')["status"] == "success"
    assert host.output == "done" and time.monotonic() - begun < agent.DRAIN + 5
    pid = int((tmp_path / "pids").read_text())
    assert lives(pid)
    os.kill(pid, signal.SIGKILL)


def test_output_that_comes_a_moment_after_the_exit_is_kept(host):
    host.deploy(build="(sleep 0.2; echo late) & echo early")
    assert host.output.splitlines() == ["early", "late"]


def test_a_script_that_closes_its_output_goes_on(host):
    host.deploy(build="echo before; exec >&- 2>&-; sleep 0.2; exit 5")
    assert host.entry.data["job"]["id"] and host.output == "before"


def test_without_proc_the_process_group_is_ended(host, monkeypatch, tmp_path, variables):
    variables["PIDS"] = str(tmp_path / "pids")
    monkeypatch.setattr(agent, "PROC", tmp_path / "no-proc")
    monkeypatch.setattr(agent, "KILL_PATIENCE", 0.2)  # the zombies of the group count here, where macOS leaves them out
    monkeypatch.delattr(os, "pidfd_open")
    monkeypatch.delattr(os, "waitid")
    result = host.deploy(build='sleep 60 & echo $! >"$PIDS"; sleep 60', timeout=0.5)
    assert result["reason"] == "timeout"
    monkeypatch.undo()
    until(lambda: not lives(int((tmp_path / "pids").read_text())))


def test_a_pid_that_belongs_to_another_now_gets_no_signal():
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        real = agent.read_stat(process.pid)
        earlier = real.start - 1
        assert agent.Family(str(uuid.uuid4()), False, agent.Leader(process.pid, earlier)).members() == {}
        assert process.pid in agent.Family(str(uuid.uuid4()), False, agent.Leader(process.pid, real.start)).members()
        agent.send_signal(process.pid, real._replace(start=earlier), signal.SIGKILL)
        agent.send_signal(process.pid, real, signal.SIGTERM)
        assert process.wait(5) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
