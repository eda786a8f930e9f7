"""agent.py: first its parts on their own, then whole agents against a real controller and real git repositories."""

import ast
import contextlib
import hashlib
import json
import os
import pwd
import random
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import agent

ROOT = Path(__file__).resolve().parent.parent
GRACE = 0.4  # between TERM and KILL, instead of 10 s


# Tools


def until(condition, timeout=20.0, what="what the test waits for"):
    """Waits on the thing itself; returns what the condition gave."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not come within {timeout} s"
        time.sleep(0.01)
    return value


def lives(pid):
    found = agent.read_stat(pid)
    return found is not None and found.state not in "ZX"


class Source:
    """A git repository that deployments come from."""

    def __init__(self, path, env):
        self.path, self._env = path, env
        self.git("init", "--quiet", "--initial-branch=main", str(path), cwd=path.parent)
        self.git("config", "uploadpack.allowFilter", "true")

    @property
    def url(self):
        return f"file://{self.path}"

    def git(self, *args, cwd=None):
        done = subprocess.run(["git", *args], cwd=cwd or self.path, env=self._env, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit(self, files, message="a change"):
        for name, text in files.items():
            path = self.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            if text.startswith("#!"):
                path.chmod(0o755)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", f"--message={message}")
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def env(tmp_path, monkeypatch):
    """The environment of a host: its own git configuration, no prompts, none of the developer's settings."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".gitconfig").write_text('[user]\n\tname = T\n\temail = t@example.com\n[protocol "file"]\n\tallow = always\n')
    return {"PATH": os.environ["PATH"], "HOME": str(home), "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}


@pytest.fixture
def variables():
    """What --env-file gives to scripts: they get nothing else of the test's."""
    return {}


@pytest.fixture
def source(tmp_path, env):
    made = Source(tmp_path / "source", env)
    made.commit({"page.txt": "one\n"}, "first")
    return made


class Host:
    """One host without a controller: deploys what it is given, here and now."""

    def __init__(self, workdir, env, source, variables):
        self.machine = agent.Machine(workdir, "file", env, variables=variables, grace=GRACE)
        self.journal = agent.Journal(workdir / ".agent" / "jobs")
        self.agent_id = str(uuid.uuid4())  # what the controller calls this host
        self.source = source
        self.app = workdir / "web"
        self.output = ""
        self.entry = None

    def job(self, ref="main", timeout=30, metadata=None, app="web", clone_url=None, **spec):
        return {
            "id": str(uuid.uuid4()), "attempt": 1, "app": app, "repo": "o/n", "ref": ref, "host": "h", "timeout": timeout,
            "metadata": metadata or {}, "spec": {"clone_url": clone_url or self.source.url, **spec},
            "assigned_agent": self.agent_id,
        }  # fmt: skip

    def deploy(self, *args, stop=None, **kwargs):
        return self.perform(self.job(*args, **kwargs), stop)

    def perform(self, data, stop=None, step="perform"):
        self.entry = self.journal.begin(data, agent.boot_id())
        return self.go(self.entry, stop, step)

    def go(self, entry, stop=None, step="perform"):
        spool = agent.Spool(entry.spool_path, words=agent.secret_words(self.machine.variables.values()))
        self.told = []  # the commits
        deployment = agent.Deployment(
            agent.parse_job(entry.data["job"]), entry, spool, stop or agent.Stop(), self.machine, self.told.append
        )
        result = getattr(deployment, step)()
        spool.close()
        lines = [json.loads(line)[0] for line in entry.spool_path.read_text().splitlines()]
        self.output = "\n".join(line for line in lines if not line.startswith("[deploybot]"))
        self.said = "\n".join(line for line in lines if line.startswith("[deploybot]"))
        return result

    @property
    def folder(self):
        return agent.AppFolder(self.app, time.time, self.agent_id)

    @property
    def releases(self):
        return sorted(path.name for path in (self.app / "releases").iterdir())

    def read(self, name="page.txt"):
        return (self.app / "current" / name).read_text()


@pytest.fixture
def host(tmp_path, env, source, variables):
    return Host(tmp_path / "work", env, source, variables)


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


def messages(batch):
    return [json.loads(line)[0] for line in batch.splitlines()]


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


def fake_git(tmp_path, env, body):
    """Puts a git first on PATH that fails where `body` says so."""
    real = subprocess.run(["sh", "-c", "command -v git"], env=env, capture_output=True, text=True, check=True).stdout.strip()
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "git").write_text(f'#!/bin/sh\n{body}\nexec {real} "$@"\n')
    (folder / "git").chmod(0o755)
    return f"{folder}:{env['PATH']}"


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


def seal(monkeypatch, folder):
    """No one makes a folder in this one, root neither."""
    make = os.mkdir

    def mkdir(path, *args, **kwargs):
        if Path(path).parent == folder:
            raise PermissionError(13, "Permission denied", str(path))
        make(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)


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


# The user that scripts run as

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give its rights away")


@pytest.fixture
def public():
    """A folder that other users can enter; those of pytest are its own."""
    folder, umask = Path(tempfile.mkdtemp(prefix="deploybot-test-")), os.umask(0o022)
    folder.chmod(0o755)
    yield folder
    os.umask(umask)
    shutil.rmtree(folder)


@pytest.fixture
def nobody():
    problems = []
    account = agent.find_account("nobody", problems)
    assert problems == []
    return account


@pytest.fixture
def ruled(public, env, source, variables, nobody):
    """A host whose scripts run as nobody."""
    made = Host(public / "work", env, source, variables)
    agent.own_secret(public / "work/.agent")
    made.machine.account = nobody
    return made


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


# Processes

# A script whose grandchild leaves the group and the session, ignores TERM and prints without newlines.
STUBBORN = """#!/bin/sh
trap 'echo got TERM; exit 0' TERM
python3 - "$PIDS" <<'END'
import os, signal, sys, time
if os.fork():
    sys.exit()
os.setsid()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(sys.argv[1], "a") as file:
    file.write(f"{os.getpid()}\\n")
while True:
    os.write(1, b"x")
    time.sleep(0.01)
END
echo $$ >>"$PIDS"
while :; do sleep 0.05; done
"""


@pytest.fixture
def stubborn(host, tmp_path, variables):
    """The pids of the script and its grandchild, once both run."""
    variables["PIDS"] = str(tmp_path / "pids")
    host.source.commit({"stubborn.sh": STUBBORN})

    def pids():
        path = Path(variables["PIDS"])
        found = path.read_text().split() if path.exists() else []
        return [int(pid) for pid in found] if len(found) == 2 else []

    return pids


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


# What apps.yaml says of an app: variables, what is shared, how many releases stay


MALFORMED = {
    "env": [[], "A=b", {"1A": "x"}, {"A-B": "x"}, {"": "x"}, {"A\n": "x"}, {"A": 1}, {"A": None}, {"A": "x\0"}, {"A": "\ud800"}],
    "shared": [
        "uploads/", {}, [7], [""], ["/"], ["/etc"], ["."], [".."], ["../up"], ["a/../b"], ["a/./b"], ["a//b"], ["./a"], ["a\0"],
        ["a\nb"], ["\ud800"], ["x" * 256], ["a", "a"], ["a/", "a"], ["a/", "b", "a/b"], ["a/b/c", "a/b"],
    ],
    "keep_releases": [0, -1, 1001, "5", 5.0, True, [5]],
    "health_check": [
        [], "http://h/", {}, {"timeout": 5}, {"url": "http://h/", "command": "true"}, {"url": "ftp://h/"}, {"url": "file:///etc/passwd"},
        {"url": "http://"}, {"url": "http://h:x/"}, {"url": "http://h:0/"}, {"url": "http://[::1/"}, {"url": "http://h/ x"}, {"url": 7},
        {"url": "http://user:secret@h/"}, {"url": "http://h/\r\nX: y"}, {"url": "http://ä/"}, {"command": ""}, {"command": []},
        *({"url": "http://h/", "timeout": value} for value in (0, -1, "5", True, float("nan"), float("inf"))),
        *({"url": "http://h/", "interval": value} for value in (-1, "5", True, float("nan"))),
        *({"url": "http://h/", "success": value} for value in (0, 1.0, "1", True)),
    ],
    "rollback_on_failure": [0, "false", []],
    "reuse": [1, "true"],
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_malformed_in_a_spec_is_rejected_by_its_name(host, name):
    for value in MALFORMED[name]:
        with pytest.raises(agent.StepFailed) as caught:
            agent.parse_job(host.job(**{name: value}))
        said = caught.value.reason, str(caught.value)
        assert said == ("rejected", f"the agent does not take this job: spec.{name}"), value


def test_what_a_spec_does_not_say_is_as_it_was(host):
    plain = host.job()
    nothing = {**plain, "spec": plain["spec"] | dict.fromkeys(agent.SPEC_FIELDS)}
    job = agent.parse_job(plain)
    assert job == agent.parse_job(nothing)
    assert (job.env, job.shared, job.keep_releases, job.health_check) == ({}, (), 5, None)
    assert (job.rollback_on_failure, job.reuse) == (True, False)
    check = agent.parse_job(host.job(health_check={"url": "http://h:1/x?y", "command": None, "timeout": 9.5})).health_check
    assert check == agent.HealthCheck("http://h:1/x?y", None, 9.5, 2, 1)


def test_an_app_has_variables_of_its_own_and_those_of_the_host_and_the_job_win(host, variables):
    variables["PORT"] = "80"
    own = {"PORT": "8080", "MODE": "a b $HOME", "DEPLOY_HOST": "other", "DEPLOY_JOB_ID": "other", "HOME": "/else"}
    show = 'echo "$PORT|$MODE|$DEPLOY_HOST|$DEPLOY_JOB_ID|$HOME"'
    data = host.job(env=own, build=show, activate=show, health_check={"command": f'test "$({show})" = "$(cat seen)"'})
    host.source.commit({"seen": f"80|a b $HOME|h|{data['id']}|/else\n"})
    assert host.perform(data)["error"] is None
    assert host.output.splitlines() == [f"80|a b $HOME|h|{data['id']}|/else"] * 2
    data = host.job(env=own, deploy=show)
    host.perform(data)
    assert host.output == f"80|a b $HOME|h|{data['id']}|/else"
    assert "8080" not in json.dumps(host.machine.env)


def test_what_is_shared_is_linked_into_each_release_before_its_build(host):
    host.source.commit({"uploads/first": "from the commit\n", "etc/app/db.yml": "first\n", "note": "n\n"})
    shared = ["uploads/", "etc/app/db.yml", "cache/deep/"]
    assert host.deploy(shared=shared, build="echo built >uploads/made; echo x >cache/deep/x; cat etc/app/db.yml")["error"] is None
    assert host.output == "first"
    home = host.app / "shared"
    assert sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()) == [
        "cache/deep/x", "etc/app/db.yml", "uploads/first", "uploads/made",
    ]  # fmt: skip
    assert os.readlink(host.app / "current/etc/app/db.yml") == "../../../../shared/etc/app/db.yml"
    host.source.commit({"uploads/second": "too late\n", "etc/app/db.yml": "second\n", "etc/app/other": "o\n"})
    assert host.deploy(shared=shared, build="ls uploads; cat etc/app/db.yml etc/app/other", keep_releases=1)["status"] == "success"
    assert host.output.splitlines() == ["first", "made", "first", "o"]
    assert host.deploy(shared=shared, build="exit 3")["exit_code"] == 3
    host.deploy(shared=shared, keep_releases=1)
    assert len(host.releases) == 2 and (home / "uploads/made").read_text() == "built\n"
    assert sorted(path.name for path in host.app.iterdir()) == [
        "current", "lock", "releases", "releases.json", "repo.git", "shared",
    ]  # fmt: skip


def test_a_shared_file_that_is_missing_is_a_link_to_nowhere_and_one_line_says_so(host):
    assert host.deploy(shared=[".env", "etc/db.yml"])["status"] == "success"
    said = [line for line in host.said.splitlines() if "not there yet" in line]
    assert said == [f"[deploybot] shared {path} is not there yet: {host.app}/shared/{path}" for path in (".env", "etc/db.yml")]
    assert os.path.islink(host.app / "current/.env") and not (host.app / "current/.env").exists()
    (host.app / "shared/.env").write_text("A=b\n")
    assert host.read(".env") == "A=b\n"
    assert host.deploy(shared=[".env"])["status"] == "success" and "not there" not in host.said and host.read(".env") == "A=b\n"


@pytest.fixture
def outside(tmp_path):
    """What no commit may reach."""
    made = tmp_path / "outside"
    (made / "sub").mkdir(parents=True)
    (made / "file").write_text("precious\n")
    yield made
    assert sorted(str(path.relative_to(made)) for path in made.rglob("*")) == ["file", "sub"]
    assert (made / "file").read_text() == "precious\n" and not (made / "file").is_symlink()


@pytest.mark.parametrize("path", ["link/file", "link/sub/", "link/new/", "page.txt/x", "deep/link/file"])
def test_a_commit_whose_links_lead_out_of_it_is_rejected_where_something_is_shared_below(host, outside, path):
    host.deploy()
    before = os.readlink(host.app / "current")
    (host.source.path / "link").symlink_to(outside)
    (host.source.path / "deep").mkdir()
    (host.source.path / "deep/link").symlink_to(outside)
    host.source.commit({})
    result = host.deploy(shared=[path])
    assert result["reason"] == "rejected"
    parent = path.removesuffix("/").rpartition("/")[0].removesuffix("/sub")
    assert re.fullmatch(rf"shared {path}: {host.app}/releases/[^/]+/{parent} must be a folder, and no link", result["error"])
    assert os.readlink(host.app / "current") == before and len(host.releases) == 1


def test_a_link_of_the_commit_in_the_place_of_what_is_shared_is_replaced_and_not_taken_over(host, outside):
    for name, target in (("uploads", outside), ("file", outside / "file"), ("own", "../../shared/own")):
        (host.source.path / name).symlink_to(target)
    host.source.commit({"plain": "a file where a folder is to be\n", "tree/x": "a folder where a file is to be\n"})
    assert (
        host.deploy(shared=["uploads/", "file", "own/", "plain/", "tree"], build="touch uploads/x plain/x own/x")["error"] is None
    )
    home = host.app / "shared"
    assert sorted(path.name for path in home.iterdir()) == ["own", "plain", "tree", "uploads"]
    assert not [path for path in home.rglob("*") if path.is_symlink()] and (home / "tree/x").exists()


def test_links_in_shared_itself_are_not_followed_by_the_agent(host, outside):
    """Scripts own what is in there, and may put one there between a look and the next step."""
    host.deploy(shared=["etc/"])
    for path in ("etc/file", "etc/sub/", "etc/sub/new/"):
        (host.app / "shared/etc").rename(host.app / "shared/was")
        (host.app / "shared/etc").symlink_to(outside)
        result = host.deploy(shared=[path])
        assert (result["reason"], result["error"]) == (
            "rejected",
            f"shared {path}: {host.app}/shared/etc must be a folder, and no link",
        )
        (host.app / "shared/etc").unlink()
        (host.app / "shared/was").rename(host.app / "shared/etc")
    (host.app / "shared").rename(host.app / "was")
    (host.app / "shared").symlink_to(outside)
    assert host.deploy(shared=["new/"])["error"] == f"shared new/: {host.app}/shared must be a folder, and no link"


@pytest.mark.parametrize("side", ["shared", "release"])
def test_a_folder_that_becomes_a_link_between_two_steps_leads_nowhere(host, outside, monkeypatch, side):
    host.source.commit({"etc/app/x": "x"})
    host.deploy(shared=["etc/app/x"])
    look, swapped = agent.entry_at, []

    def swap(folder, name):
        found = look(folder, name)
        base = os.readlink(f"/proc/self/fd/{folder}")
        mine = base.endswith("/shared") if side == "shared" else "/releases/" in base
        if name == "etc" and mine and not swapped:
            swapped.append(base)
            os.rename(f"{base}/etc", f"{base}/was")
            os.symlink(outside, f"{base}/etc")
        return found

    monkeypatch.setattr(agent, "entry_at", swap)
    result = host.deploy(shared=["etc/app/x"])
    assert swapped and result["reason"] == "rejected" and "must be a folder, and no link" in result["error"]


def test_a_shared_place_on_another_disk_is_named(host, monkeypatch):
    rename = os.rename

    def elsewhere(source, target, *args, **kwargs):
        if kwargs.get("dst_dir_fd") and target == "uploads":
            raise OSError(18, "Invalid cross-device link")
        rename(source, target, *args, **kwargs)

    monkeypatch.setattr(os, "rename", elsewhere)
    result = host.deploy(shared=["uploads/"])
    assert (result["reason"], result["error"]) == (
        "rejected",
        "shared uploads: that place is on another disk: make it there by hand",
    )
    (host.app / "shared/uploads").mkdir()
    assert host.deploy(shared=["uploads/"])["status"] == "success"


@as_root
def test_what_is_shared_is_the_scripts_own_and_nothing_that_they_put_there_becomes_theirs(ruled, public, nobody):
    ruled.source.commit({"uploads/sub/x": "x", "etc/db.yml": "d"})
    (public / "roots").write_text("root's")
    shared = ["uploads/", "etc/db.yml", "made/deep/", "missing/file"]
    umask = os.umask(0o077)  # as root often has it
    try:
        write = "echo y >>uploads/sub/x; echo y >>etc/db.yml; echo y >made/deep/y; echo y >missing/file"
        assert ruled.deploy(shared=shared, build=f"set -e; {write}; mv etc other; mkdir etc; touch etc/db.yml")["error"] is None
    finally:
        os.umask(umask)
    home = ruled.app / "shared"
    found = [home, *home.rglob("*")]
    assert len(found) == 11 and {path.lstat().st_uid for path in found} == {nobody.uid}
    assert {path.lstat().st_uid for path in (ruled.app, ruled.app / "releases", ruled.app / "releases.json")} == {0}
    commit = ruled.source.git("rev-parse", "main")
    os.link(public / "roots", home / "uploads/hard")  # as an old kernel lets everyone do
    os.link(public / "roots", ruled.app / "current/page2.txt")
    os.link(public / "roots", ruled.app / "current/etc/hard")
    more = [*shared, "page2.txt", "later/", "below/later/"]
    first = ruled.app / "current"
    assert ruled.deploy(ref=commit, reuse=True, shared=more)["error"] is None
    assert first.resolve().name == ruled.releases[0] and len(ruled.releases) == 1
    assert (public / "roots").lstat().st_uid == 0 and (home / "page2.txt").samefile(public / "roots")
    assert (first / "etc/db.yml").is_symlink() and {path.stat().st_uid for path in (home / "later", home / "below/later")} == {
        nobody.uid
    }
    assert (first / "below").stat().st_uid == nobody.uid
    assert not (ruled.app / "shared.new").exists()


@as_root
def test_what_is_handed_over_lies_where_only_the_agent_gets(ruled, monkeypatch):
    ruled.source.commit({"uploads/x": "x"})
    given, hand_over = [], agent.hand_over

    def watch(tree, account):
        given.append(tree)
        if tree.parent.name == "shared.new":
            assert tree.parent.lstat().st_uid == 0 and stat.S_IMODE(tree.parent.lstat().st_mode) == 0o700
        hand_over(tree, account)

    monkeypatch.setattr(agent, "hand_over", watch)
    assert ruled.deploy(shared=["uploads/", "deep/er/"])["error"] is None
    assert [tree.relative_to(ruled.app).parts[0] for tree in given] == ["shared.new"] * 4 + ["releases"]


def test_as_many_releases_stay_as_the_app_says(host):
    for _ in range(4):
        host.deploy(keep_releases=3)
    assert len(host.releases) == 3
    host.deploy(keep_releases=1)
    assert len(host.releases) == 2  # the current one, and the one before


def stale(host, **spec):
    """A deployment that fails after its switch, and stays."""
    result = host.deploy(activate="exit 5", rollback_on_failure=False, **spec)
    assert result["exit_code"] == 5
    return os.path.basename(os.readlink(host.app / "current"))


def test_a_failed_release_pushes_out_no_good_one_and_goes_first(host):
    host.deploy()
    host.deploy()
    good = host.releases
    failed = [stale(host), stale(host)]
    assert host.releases == good + failed
    host.deploy(keep_releases=3)
    assert [name for name in host.releases if name in failed] == failed[1:]  # it was the one before
    assert set(good) < set(host.releases)
    host.deploy(build="exit 1")
    host.deploy(keep_releases=3)
    assert not set(failed) & set(host.releases) and good[1] in host.releases and len(host.releases) == 3
    refs = host.source.git("for-each-ref", "--format=%(refname:lstrip=2)", "refs/deploybot", cwd=host.app / "repo.git")
    assert refs.split() == host.releases == sorted(json.loads((host.app / "releases.json").read_text()))


@pytest.mark.parametrize("text", [None, "", "[]", '{"x": 1}', '{"x": {"commit": 1}}'])
def test_releases_that_no_ledger_has_are_those_of_an_earlier_version_and_good(host, text):
    commit = host.deploy()["commit"]
    host.deploy()
    good = host.releases
    path = host.app / "releases.json"
    path.unlink() if text is None else path.write_text(text)
    host.deploy(keep_releases=3)
    assert host.releases[:2] == good and len(host.releases) == 3
    assert json.loads(path.read_text())[good[0]]["commit"] == commit
    host.deploy(keep_releases=3)
    assert host.releases[0] == good[1]


def test_a_rollback_removes_no_release_that_the_ledger_has_not(host):
    first = host.deploy()["commit"]
    host.source.commit({"page.txt": "two\n"})
    for _ in range(3):
        host.deploy()
    path, every = host.app / "releases.json", host.releases
    path.write_text(json.dumps({name: entry for name, entry in json.loads(path.read_text()).items() if name == every[0]}))
    assert host.deploy(ref=first, reuse=True)["status"] == "success" and host.releases == every
    assert json.loads(path.read_text())[every[1]]["commit"] is None  # a mirror that no fetch has looked at is not asked


# A rollback


def away(host):
    """The git server is gone."""
    host.source.path.rename(host.source.path.with_name("away"))


def test_a_rollback_takes_a_release_that_is_still_there_without_git_and_build(host, health):
    first = host.deploy(build="echo built >made", shared=["log/"])["commit"]
    good = host.releases[0]
    second = host.source.commit({"page.txt": "two\n"})
    host.deploy(shared=["log/"])
    release = host.app / "releases" / good
    (release / "log").unlink()  # and what is shared meanwhile is linked as well
    (host.app / "shared/log/x").touch()
    away(host)
    server = health()
    activate = 'cat page.txt; echo "$DEPLOY_COMMIT"; echo "$DEPLOY_PREVIOUS"'
    spec = {"shared": ["log/", "new/"], "build": "exit 1", "activate": activate, "health_check": {"url": server.url}}
    result = host.deploy(ref=first, reuse=True, **spec)
    assert (result["status"], result["commit"], result["rolled_back_to"], host.told) == ("success", first, None, [first])
    current = host.app / "releases" / host.releases[1]
    assert host.output.splitlines() == ["one", first, str(current)] and len(server.asked) == 1
    assert os.readlink(host.app / "current") == f"releases/{good}" and host.read("made") == "built\n"
    assert (host.app / "current/log/x").exists() and (host.app / "current/new").is_symlink() and len(host.releases) == 2
    assert host.deploy(ref=second, reuse=True)["status"] == "success" and host.read() == "two\n"


def test_a_rollback_without_that_release_fetches_and_builds(host):
    first = host.deploy()["commit"]
    host.source.commit({"page.txt": "two\n"})
    host.deploy(keep_releases=1)
    host.deploy(keep_releases=1)
    assert first[:12] not in "".join(host.releases)
    result = host.deploy(ref=first, reuse=True, build="echo built")
    assert (result["status"], host.output, host.read()) == ("success", "built", "one\n")
    host.deploy()
    assert host.deploy(ref=first, build="echo built")["status"] == "success" and host.output == "built"  # it is no rollback
    assert host.deploy(ref="main", reuse=True, build="echo built")["status"] == "success" and host.output == "built"


def test_a_release_that_failed_is_not_used_again(host):
    host.deploy()
    commit = host.source.commit({"page.txt": "two\n"})
    failed = stale(host)
    assert host.deploy(ref=commit, reuse=True, build="echo built")["status"] == "success"
    assert host.output == "built" and not os.readlink(host.app / "current").endswith(failed)


@as_root
def test_a_release_of_another_user_is_not_used_again(ruled, nobody):
    ruled.machine.account = None
    commit = ruled.deploy()["commit"]
    ruled.machine.account = nobody
    assert ruled.deploy(ref=commit, reuse=True, build="id -u")["status"] == "success"
    assert ruled.output == str(nobody.uid)


def test_a_rollback_that_fails_goes_back_and_keeps_what_it_took(host):
    first = host.deploy()["commit"]
    second = host.source.commit({"page.txt": "two\n"})
    host.deploy()
    both = host.releases
    result = host.deploy(ref=first, reuse=True, health_check={"command": "grep two page.txt"} | QUICK)
    assert (result["reason"], result["rolled_back_to"], host.read()) == ("health_check", second, "two\n")
    assert host.releases == both
    assert host.deploy(ref=first, reuse=True)["status"] == "success" and host.releases == both


def test_a_rollback_to_what_is_current_leads_nowhere_else_when_it_fails(host):
    commit = host.deploy()["commit"]
    result = host.deploy(ref=commit, reuse=True, activate="echo again; exit 3")
    assert (result["exit_code"], result["rolled_back_to"], host.output, host.read()) == (3, None, "again", "one\n")
    assert result["error"] == f"activate ended with exit code 3; current stays at releases/{host.releases[0]}"
    assert host.deploy(ref=commit, reuse=True, shared=["log/"])["status"] == "success" and len(host.releases) == 1
    link = (host.app / "current/log").lstat()
    host.deploy(ref=commit, reuse=True, shared=["log/"])
    assert (host.app / "current/log").lstat().st_ctime_ns == link.st_ctime_ns  # it serves meanwhile


def test_a_release_that_was_taken_again_is_one_of_the_newest(host):
    """What counts is when it last was current after a success, as the next rollback goes to the newest of these."""
    first = host.deploy(keep_releases=3)["commit"]
    oldest = host.releases[0]
    for page in ("two\n", "three\n"):
        host.source.commit({"page.txt": page})
        host.deploy(keep_releases=3)
    host.deploy(ref=first, reuse=True, keep_releases=3)
    assert len(host.releases) == 3
    for page in ("four\n", "five\n"):
        host.source.commit({"page.txt": page})
        host.deploy(keep_releases=3)
    assert host.releases[0] == oldest and len(host.releases) == 3


# The health check


class Pulse:
    """Answers each GET with the next of its answers, the last one for ever: a status, (status, body), or a function of the handler."""

    def __init__(self, answers):
        asked = self.asked = []
        left = list(answers) or [200]

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                answer = left.pop(0) if len(left) > 1 else left[0]
                if callable(answer):
                    return answer(self)
                status, body = answer if isinstance(answer, tuple) else (answer, "")
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with contextlib.suppress(OSError):  # who asked has seen enough
                    self.wfile.write(body.encode())

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/health?key=hidden"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def health():
    servers = []

    def make(*answers):
        servers.append(Pulse(answers))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


QUICK = {"timeout": 2, "interval": 0.05}
PATIENT = {"timeout": 20, "interval": 0.01}


def told_of_health(host):
    marked = "[deploybot] health check: "
    return [line.removeprefix(marked) for line in host.said.splitlines() if line.startswith(marked)]


def test_a_health_check_passes_after_so_many_good_answers_in_a_row_and_its_log_is_short(host, health):
    server = health(503, 503, 200, (503, "starting"), 500, 500, 204, 200, 200)
    result = host.deploy(health_check={"url": server.url, "success": 3} | PATIENT)
    assert (result["status"], result["exit_code"]) == ("success", 0)
    assert server.asked == ["/health?key=hidden"] * 9
    asked, *said, passed = told_of_health(host)
    assert asked == server.url.partition("?")[0]
    assert said == ["503 Service Unavailable", "503 Service Unavailable: starting", "500 Internal Server Error"]
    assert re.fullmatch(r"passed after \d+\.\d s", passed)


def test_a_cause_that_changes_without_end_does_not_fill_the_log(host, health):
    server = health(*[500, 503] * 40, 200)
    assert host.deploy(health_check={"url": server.url} | PATIENT)["status"] == "success"
    assert len(told_of_health(host)) == 2 + agent.HEALTH_LINES


def test_the_health_check_comes_after_the_switch_and_activate(host):
    host.deploy()
    check = {"command": 'test "$PWD" = "$DEPLOY_RELEASE" && test "$(readlink -f "$DEPLOY_CURRENT")" = "$PWD" && test -e active'}
    assert host.deploy(activate="touch active", health_check=check | QUICK)["error"] is None
    assert host.deploy(deploy="touch active", health_check=check | QUICK)["error"] is None  # that form has one too
    assert host.deploy(health_check=check | QUICK)["reason"] == "health_check"


def dribble(handler):
    """A byte each moment, of headers that never end."""
    with contextlib.suppress(OSError):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while True:
            handler.wfile.write(b"x")
            time.sleep(0.02)


def endless(handler):
    with contextlib.suppress(OSError):
        handler.send_response(500)
        handler.end_headers()
        while True:
            handler.wfile.write(b"hunter2000 " * 1000)


def no_http(handler):
    handler.wfile.write(b"SSH-2.0-OpenSSH\r\n")


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (301, "301 Moved Permanently (redirects are not followed)"),
        (304, "304 Not Modified (redirects are not followed)"),
        (404, "404 Not Found"),
        ((500, "line\none\x1b[2J"), "500 Internal Server Error: line one [2J"),
        (dribble, "no answer in time"),
        (endless, "500 Internal Server Error: " + ("*** " * 50).strip()),
        (no_http, "SSH-2.0-OpenSSH"),
    ],
)
def test_what_is_no_good_answer_is_named(host, health, variables, monkeypatch, answer, cause):
    monkeypatch.setattr(agent, "HEALTH_ANSWER", 0.2)
    variables["PASSWORD"] = "hunter2000"
    server, begun = health(answer), time.monotonic()
    result = host.deploy(health_check={"url": server.url} | QUICK)
    assert (result["status"], result["reason"], result["exit_code"]) == ("failed", "health_check", None)
    assert result["error"] == f"the health check did not pass within 2 s: {cause}" and cause in told_of_health(host)
    assert "/elsewhere" not in server.asked and time.monotonic() - begun < 10


def test_an_answer_that_does_not_come_is_given_up_for_the_next(host, health, monkeypatch):
    monkeypatch.setattr(agent, "HEALTH_ANSWER", 0.2)
    server = health(dribble, 200)
    assert host.deploy(health_check={"url": server.url} | PATIENT)["error"] is None
    assert told_of_health(host)[1] == "no answer in time" and len(server.asked) == 2


def test_a_place_where_nobody_answers_is_named(host):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert "Connection refused" in host.deploy(health_check={"url": f"http://127.0.0.1:{port}"} | QUICK)["error"]
    error = host.deploy(health_check={"url": "https://127.0.0.1:1/"} | QUICK)["error"]
    assert error.startswith("the health check did not pass within 2 s: ")


def test_a_health_check_that_speaks_tls_checks_the_certificate(host, health, authority, monkeypatch):
    server = health()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "cert.pem", authority / "key.pem")
    server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
    url = server.url.replace("http:", "https:").replace("127.0.0.1", "localhost")
    assert "certificate" in host.deploy(health_check={"url": url} | QUICK)["error"]
    monkeypatch.setenv("SSL_CERT_FILE", str(authority / "ca.pem"))
    assert host.deploy(health_check={"url": url} | PATIENT)["error"] is None


def test_good_answers_that_are_too_few_are_counted(host, health):
    result = host.deploy(health_check={"url": health().url, "success": 100} | QUICK)
    assert re.search(r"within 2 s: it passed \d+ of 100 times in a row$", result["error"])


@pytest.mark.parametrize("how", ["cancelled", "timeout"])
@pytest.mark.parametrize("check", ["url", "command", "pause"])
def test_a_cancel_and_the_jobs_timeout_end_a_health_check(host, health, monkeypatch, how, check):
    monkeypatch.setattr(agent, "HEALTH_ANSWER", 30)
    first = host.deploy()["commit"]
    host.source.commit({"page.txt": "two\n"})
    stop, late, begun = agent.Stop(), [0], time.monotonic()
    host.machine.clock = lambda: time.monotonic() + late[0]
    server = health({"url": dribble, "pause": 500}.get(check), 200)  # what is asked on the way back is well
    hanging = {"command": "grep one page.txt || { touch asked; sleep 60; }"} if check == "command" else {"url": server.url}

    def waits():
        in_pause = check != "pause" or "Internal Server Error" in host.entry.spool_path.read_text()
        return (server.asked and in_pause) or (host.app / "current/asked").exists()

    def end():
        until(waits)
        if how == "cancelled":
            stop.set("cancelled")
        late[0] = 40 if how == "timeout" else 0

    ender = threading.Thread(target=end)
    ender.start()
    result = host.deploy(health_check=hanging | {"timeout": 60, "interval": 50 if check == "pause" else 70}, timeout=30, stop=stop)
    ender.join()
    assert (result["reason"], result["rolled_back_to"], host.read()) == (how, first, "one\n")
    assert time.monotonic() - begun < 8


def test_a_command_that_fails_ends_nothing_of_what_activate_left_running(host, variables, tmp_path):
    variables |= {"PIDS": str(tmp_path / "pids"), "ASKED": str(tmp_path / "asked")}
    host.source.commit({"asked.sh": 'echo "pid $$"; echo x >>"$ASKED"; test $(wc -l <"$ASKED") -ge 4\n'})
    serve = 'sleep 60 >/dev/null 2>&1 & echo $! >"$PIDS"'
    assert host.deploy(activate=serve, health_check={"command": ["sh", "asked.sh"]} | PATIENT)["status"] == "success"
    pid = int((tmp_path / "pids").read_text())
    assert lives(pid) and len((tmp_path / "asked").read_text().split()) == 4
    [asked, failed, passed] = told_of_health(host)
    assert asked == "running its command" and re.fullmatch(r"exit code 1: pid \d+", failed) and passed.startswith("passed")
    assert host.output == ""
    os.kill(pid, signal.SIGKILL)


def test_what_a_failing_command_starts_is_ended_with_it(host, variables, tmp_path):
    variables["PIDS"] = str(tmp_path / "pids")
    hang = 'sleep 60 & echo $! >>"$PIDS"; sleep 60'
    result = host.deploy(health_check={"command": hang} | QUICK)
    assert result["error"] == "the health check did not pass within 2 s: its command did not end in time"
    assert not any(lives(int(pid)) for pid in (tmp_path / "pids").read_text().split())
    assert "No such file" in host.deploy(health_check={"command": ["./none"]} | QUICK)["error"]


@as_root
def test_the_command_of_a_health_check_has_the_rights_of_scripts(ruled, nobody):
    check = {"command": f'test "$(id -u)" = {nobody.uid} && test ! -r "$DEPLOY_RELEASE/../../../.agent/secret"'}
    assert ruled.deploy(health_check=check | QUICK)["error"] is None


# The way back


def test_a_failing_health_check_goes_the_way_back_and_the_old_release_is_asked_too(host, variables, tmp_path):
    variables |= {"PIDS": str(tmp_path / "pids"), "ASKED": str(tmp_path / "asked")}
    check = {"command": 'cat page.txt >>"$ASKED"; grep -q one page.txt'} | QUICK
    first = host.deploy(health_check=check)["commit"]
    (tmp_path / "asked").unlink()
    host.source.commit({"page.txt": "bad\n"})
    activate = 'cat page.txt; test ! -e "$PIDS" || exit 0; sleep 60 >/dev/null 2>&1 & echo $! >"$PIDS"'
    result = host.deploy(activate=activate, health_check=check)
    assert (result["reason"], result["rolled_back_to"], result["exit_code"]) == ("health_check", first, None)
    assert result["error"] == "the health check did not pass within 2 s: exit code 1"
    assert host.output.splitlines() == ["bad", "one"] and host.read() == "one\n" and len(host.releases) == 1
    asked = (tmp_path / "asked").read_text().split()
    assert set(asked[:-1]) == {"bad"} and asked[-1] == "one" and "passed after" in host.said
    assert not lives(int((tmp_path / "pids").read_text()))  # what activate of the bad one left


def test_the_way_back_has_time_for_its_health_check(host, monkeypatch):
    monkeypatch.setattr(agent, "WAY_BACK_LIMIT", 0)
    first = host.deploy()["commit"]
    host.source.commit({"page.txt": "bad\n"})
    result = host.deploy(health_check={"command": "grep one page.txt", "timeout": 10, "interval": 11})
    assert (result["reason"], result["rolled_back_to"]) == ("health_check", first)


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ({"activate": "exit 9"}, "activate ended with exit code 9; going back to {} failed too: activate ended with exit code 9"),
        (
            {"activate": "exit 9", "health_check": {"command": "true"}},
            "activate ended with exit code 9; going back to {} failed too: activate ended with exit code 9",
        ),
        (
            {"activate": "grep -q one page.txt", "health_check": {"command": "false"} | QUICK},
            "activate ended with exit code 1; going back to {} failed too: the health check did not pass within 2 s: exit code 1",
        ),
        (
            {"health_check": {"command": "cat page.txt; exit 1"} | QUICK},
            "the health check did not pass within 2 s: exit code 1: two; going back to {} failed too: "
            "the health check did not pass within 2 s: exit code 1: one",
        ),
    ],
)
def test_a_way_back_that_fails_too_names_both_causes(host, spec, error):
    host.deploy()
    where = os.readlink(host.app / "current")
    host.source.commit({"page.txt": "two\n"})
    result = host.deploy(**spec)
    assert (result["status"], result["rolled_back_to"], host.read()) == ("failed", None, "one\n")
    assert result["error"] == error.format(where) and f"going back to {where} failed too" in host.said


def test_a_last_question_that_was_cut_short_is_not_the_cause(host):
    """It had what was left of the time, not what it takes."""
    now, asked = [0.0], []

    def ask(limits):
        asked.append(now[0])
        now[0] += 0.8
        return agent.Verdict("exit code 1" if now[0] < 2 else "its command did not end in time")

    check = agent.HealthCheck(command="x", timeout=2, interval=0.1, success=1)
    limits = agent.Limits(agent.Stop(), float("inf"), lambda: now[0])
    watch = agent.Watch(check, ask, Lines(), limits)
    watch._wait = lambda until: now.__setitem__(0, max(now[0], until))
    with pytest.raises(agent.StepFailed, match=r"did not pass within 2 s: exit code 1$"):
        watch.run()
    assert len(asked) == 3


class Lines:
    """A spool of which nothing is asked but to take lines."""

    def say(self, text, level="info"):
        pass

    def masked(self, text):
        return text


def test_a_way_back_that_the_disk_refuses_says_so(host, monkeypatch):
    host.deploy()
    switch, calls = agent.AppFolder.switch, []

    def full(self, release):
        calls.append(release)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        switch(self, release)

    monkeypatch.setattr(agent.AppFolder, "switch", full)
    error = host.deploy(activate="exit 9")["error"]
    assert error.startswith("activate ended with exit code 9; going back to releases/") and error.endswith(
        "No space left on device"
    )


@pytest.mark.parametrize(
    ("spec", "cause"),
    [
        ({"activate": "echo tried; exit 9"}, "activate ended with exit code 9"),
        ({"health_check": {"command": "false"} | QUICK}, "the health check did not pass within 2 s: exit code 1"),
    ],
)
def test_without_a_rollback_current_stays_at_the_new_release(host, spec, cause):
    host.deploy()
    host.source.commit({"page.txt": "two\n"})
    result = host.deploy(rollback_on_failure=False, **spec)
    where = f"releases/{host.releases[1]}"
    assert (result["status"], result["rolled_back_to"]) == ("failed", None)
    assert result["error"] == f"{cause}; current stays at {where}"
    assert host.read() == "two\n" and host.output.count("tried") <= 1 and "going back" not in host.said


def test_a_build_that_fails_says_nothing_of_current(host):
    host.deploy()
    assert host.deploy(build="exit 3", rollback_on_failure=False)["error"] == "build ended with exit code 3"
    assert len(host.releases) == 1


# After a crash


def test_after_a_crash_what_ran_is_ended_and_reported(host, stubborn, tmp_path):
    """The agent is gone, its script is not: the journal and the mark are all that is left."""
    data = host.job(deploy=["./stubborn.sh"])
    entry = host.journal.begin(data, agent.boot_id())
    release = host.folder.add(host.folder.new_name("a" * 40))
    entry.note(release=release.name)
    (release / "stubborn.sh").write_text(STUBBORN)
    child = subprocess.Popen(
        ["sh", "stubborn.sh"], cwd=release, start_new_session=True, stdout=subprocess.DEVNULL,
        env={**host.machine.env, **host.machine.variables, "DEPLOY_JOB_ID": data["id"]},
    )  # fmt: skip
    entry.note(leader=[child.pid, agent.read_stat(child.pid).start])
    until(stubborn)
    [left] = host.journal.unfinished()
    result = host.go(left, step="recover")
    child.wait()
    assert (result["status"], result["reason"]) == ("failed", "agent_crashed")
    assert not any(map(lives, stubborn())) and not release.exists()


def test_a_crash_in_activate_goes_the_way_back(host):
    first = host.deploy()["commit"]
    old = host.releases[0]
    data = host.job(activate='echo "again $DEPLOY_COMMIT"')
    entry = host.journal.begin(data, agent.boot_id())
    folder = host.folder
    release = folder.add(folder.new_name("b" * 40))
    entry.note(release=release.name, switched_from=old)
    folder.switch(release)
    result = host.go(entry, step="recover")
    assert (result["reason"], result["rolled_back_to"], host.output) == ("agent_crashed", first, f"again {first}")
    assert folder.active().name == old and host.releases == [old]


DYING = f"""
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import agent
workdir, env, patch = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
exec(patch)
machine = agent.Machine(workdir, "file", env, grace={GRACE})
[entry] = agent.Journal(workdir / ".agent/jobs").unfinished()
spool = agent.Spool(entry.spool_path)
agent.Deployment(agent.parse_job(entry.data["job"]), entry, spool, agent.Stop(), machine, lambda commit: None).perform()
"""


def killed(host, patch, **spec):
    """An agent of its own deploys, and is killed where the patch says; the entry that it leaves."""
    for path in (host.machine.workdir / ".agent/jobs").glob("*"):
        path.unlink()  # of what ended before
    host.journal.begin(host.job(**spec), agent.boot_id())
    command = [sys.executable, "-c", DYING, str(host.machine.workdir), json.dumps(host.machine.env), patch]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    [entry] = host.journal.unfinished()
    assert entry.result is None
    return entry


BEFORE_THE_CHECK = "agent.Watch.run = die"
AFTER_THE_CHECK = "agent.Entry.end = die"
CHECKED = {"activate": "cat page.txt", "health_check": {"command": 'cat page.txt >>"$DEPLOY_CURRENT.asked"'}}


@pytest.mark.parametrize("patch", [BEFORE_THE_CHECK, AFTER_THE_CHECK, "agent.ask_url = agent.Runner.end = die"])
def test_a_kill_between_switch_and_the_end_of_the_health_check_goes_the_way_back(host, patch, health):
    first = host.deploy()["commit"]
    old = host.releases
    host.source.commit({"page.txt": "two\n"})
    check = {"url": health().url} | PATIENT if "ask_url" in patch else CHECKED["health_check"]
    entry = killed(host, patch, activate=CHECKED["activate"], health_check=check)
    assert host.read() == "two\n" and len(host.releases) == 2
    result = host.go(entry, step="recover")
    assert (result["reason"], result["rolled_back_to"]) == ("agent_crashed", first)
    assert result["error"] == "the agent ended while this ran; its processes were stopped"
    assert host.output.splitlines()[-1] == "one" and "passed after" in host.said
    assert host.releases == old and host.read() == "one\n"
    assert host.deploy(keep_releases=1)["status"] == "success" and len(host.releases) == 2


def test_a_kill_whose_way_back_fails_names_both(host):
    host.deploy()
    where = os.readlink(host.app / "current")
    host.source.commit({"page.txt": "two\n"})
    entry = killed(host, BEFORE_THE_CHECK, health_check={"command": "false"} | QUICK)
    result = host.go(entry, step="recover")
    assert (result["reason"], result["rolled_back_to"], host.read()) == ("agent_crashed", None, "one\n")
    assert result["error"] == (
        f"the agent ended while this ran; its processes were stopped; going back to {where} failed too: "
        "the health check did not pass within 2 s: exit code 1"
    )


def test_a_kill_without_a_rollback_leaves_current_where_it_was(host):
    host.deploy()
    host.source.commit({"page.txt": "two\n"})
    entry = killed(host, BEFORE_THE_CHECK, rollback_on_failure=False, **CHECKED)
    result = host.go(entry, step="recover")
    assert (result["reason"], result["rolled_back_to"], host.read(), host.output) == ("agent_crashed", None, "two\n", "two")
    assert result["error"].endswith(f"; current stays at releases/{host.releases[1]}")
    entry = killed(host, "agent.AppFolder.switch = die", rollback_on_failure=False)
    result = host.go(entry, step="recover")
    assert result["error"] == "the agent ended while this ran; its processes were stopped" and len(host.releases) == 2


@pytest.mark.parametrize("patch", [BEFORE_THE_CHECK, AFTER_THE_CHECK, "agent.AppFolder.switch = die", "agent.Shared.link = die"])
def test_a_kill_in_a_rollback_keeps_the_release_that_it_took(host, patch):
    first = host.deploy()["commit"]
    second = host.source.commit({"page.txt": "two\n"})
    host.deploy()
    both = host.releases
    entry = killed(host, patch, ref=first, reuse=True, shared=["log/"], **CHECKED)
    result = host.go(entry, step="recover")
    assert (result["reason"], host.read(), host.releases) == ("agent_crashed", "two\n", both)
    assert result["rolled_back_to"] == (None if "link" in patch else second)
    away(host)
    assert host.deploy(ref=first, reuse=True)["status"] == "success" and host.read() == "one\n"


def test_a_kill_while_something_is_moved_into_shared_costs_that_release_alone(host):
    host.source.commit({"uploads/x": "x\n"})
    patch = "agent.Shared._give = die"
    entry = killed(host, patch, shared=["uploads/"])
    assert host.go(entry, step="recover")["reason"] == "agent_crashed" and host.releases == []
    assert host.deploy(shared=["uploads/"])["status"] == "success"
    assert (host.app / "shared/uploads/x").read_text() == "x\n" and not (host.app / "shared.new").exists()


def test_a_crash_after_the_deployment_undoes_nothing(host):
    assert host.deploy(activate="true")["status"] == "success"
    [entry] = host.journal.unfinished()
    assert entry.result["status"] == "success"


def test_the_journal_keeps_the_end_and_forgets_the_commands(host):
    host.deploy(build="true s3cret")
    host.entry.done(0)
    [path] = (host.machine.workdir / ".agent/jobs").glob("*.json")
    assert "s3cret" not in path.read_text() and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert host.journal.unfinished() == []
    assert host.journal.find(host.entry.key).result["status"] == "success"


def test_a_tracking_file_that_cannot_be_read_still_says_that_the_job_was_started(host):
    key = host.journal.begin(host.job(), agent.boot_id()).key
    [path] = (host.machine.workdir / ".agent/jobs").glob("*.json")
    path.write_text("")
    assert host.journal.find(key).result["reason"] == "agent_crashed"
    assert [entry.key for entry in host.journal.unfinished()] == [key]


def test_old_tracking_files_go(host, monkeypatch):
    monkeypatch.setattr(agent, "KEEP_ENTRIES", 2)
    for _ in range(4):
        entry = host.journal.begin(host.job(), agent.boot_id())
        entry.spool_path.touch()  # as one leaves it that is killed right after
        entry.done(0)
    host.journal.unfinished()
    left = sorted(path.suffix for path in (host.machine.workdir / ".agent/jobs").iterdir())
    assert left == [".json", ".json"]


# Talking to a controller that misbehaves


class Scripted:
    """Answers requests by a function of (path, body, token), a status of None by cutting the connection; keeps what was asked."""

    def __init__(self, answer):
        asked = self.asked = []
        self.connections = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                outer.connections += 1
                super().setup()

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
                asked.append((self.path, body, token))
                status, answered, headers = answer(self.path, body, token)
                if status is None:
                    self.close_connection = True
                    return
                data = answered if isinstance(answered, bytes) else json.dumps(answered).encode()
                kind = "application/json" if status < 300 else "application/problem+json"
                self.send_response(status)
                for name, value in ({"Content-Type": kind, "Content-Length": len(data)} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):  # the agent may have given this call up
                    self.wfile.write(data)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def scripted():
    servers = []

    def make(answer):
        servers.append(Scripted(answer))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def ask(server, **kwargs):
    return agent.Controller(server.url + "/", lambda: "dbt_x", **kwargs).call("POST", "/v1/x", {"a": 1})


def test_an_answer_is_the_object_of_a_request_that_carries_the_token(scripted):
    server = scripted(lambda *asked: (200, {"b": 2}, {}))
    assert ask(server) == {"b": 2}
    assert server.asked == [("/v1/x", {"a": 1}, "dbt_x")]


def test_one_connection_serves_many_calls_and_a_closed_one_is_no_failure(scripted):
    server = scripted(lambda path, body, token: (200, {}, {"Connection": "close"} if body.get("last") else {}))
    controller = agent.Controller(server.url, lambda: None)
    for _ in range(3):
        controller.call("POST", "/", {})
    assert server.connections == 1
    controller._connection.sock.shutdown(socket.SHUT_RDWR)
    controller.call("POST", "/", {"last": True})
    controller.call("POST", "/", {})
    assert server.connections == 3
    controller.close()


def test_redirects_are_not_followed(scripted):
    thief = scripted(lambda *asked: (200, {}, {}))
    server = scripted(lambda *asked: (307, {}, {"Location": thief.url}))
    with pytest.raises(agent.Unreachable, match="not followed"):
        ask(server)
    assert thief.asked == []


def test_a_problem_is_a_refusal(scripted):
    server = scripted(lambda *asked: (409, {"detail": "a\ngap", "next_offset": 7}, {}))
    with pytest.raises(agent.Refused, match="409: a gap") as caught:
        ask(server)
    assert (caught.value.status, caught.value.next_offset) == (409, 7)


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (404, b"<html>not here</html>", {"Content-Type": "text/html"}),  # a proxy, while the controller restarts
        (200, b"<html>welcome</html>", {"Content-Type": "text/html"}),
        (409, [], {}),
        (503, {"detail": "full"}, {}),
        (429, {"detail": "slow"}, {}),
    ],
)
def test_what_may_pass_is_tried_again(scripted, status, body, headers):
    server = scripted(lambda *asked: (status, body, headers | {"Retry-After": "7"}))
    with pytest.raises(agent.Unreachable) as caught:
        ask(server)
    assert caught.value.retry_after == 7


def test_a_controller_that_is_not_there_and_one_that_says_nothing(scripted):
    over = threading.Event()
    server = scripted(lambda *asked: over.wait(10) and (200, {}, {}))
    with pytest.raises(agent.Unreachable, match="timed out"):
        ask(server, timeout=0.1)
    over.set()
    with pytest.raises(agent.Unreachable, match="refused"):
        agent.Controller("http://127.0.0.1:1", lambda: None).call("POST", "/", {})


def test_https_to_a_controller_that_speaks_http_is_told_apart(scripted):
    address = scripted(lambda *asked: (200, {}, {})).url.removeprefix("http://")
    with pytest.raises(agent.Unreachable, match=f"^it speaks http there: try http://{address}$"):
        agent.Controller(f"https://{address}", lambda: None).call("POST", "/", {})


class Lone:
    """An Agent in this process, whose heart is driven by hand."""

    def __init__(self, host, url="http://127.0.0.1:1", **config):
        self.config = agent.Config(url, "h", host.machine.workdir, "file", **config)
        self.agent = agent.Agent(self.config, host.machine, lambda first: agent.Backoff(first, chance=lambda: 0.0))

    def take(self, data):
        self.agent._take(data)
        for run in self.agent._holding():
            assert run.ended.wait(20)

    def close(self):
        self.agent._over.set()
        until(lambda: all(run.ended.is_set() for run in self.agent._holding()))


@pytest.fixture
def lone(host):
    made = []

    def make(*args, **kwargs):
        made.append(Lone(host, *args, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_no_attempt_is_started_twice(host, lone, tmp_path, variables):
    ledger = tmp_path / "ledger"
    variables |= {"LEDGER": str(ledger), "GO": str(tmp_path / "go")}
    data = host.job(deploy='echo "$DEPLOY_JOB_ID" >>"$LEDGER"; until [ -e "$GO" ]; do sleep 0.02; done')
    first = lone()
    first.agent._take(data)
    until(ledger.exists)
    first.agent._take(data)  # delivered again while it runs
    (tmp_path / "go").touch()
    first.close()
    second = lone()
    second.take(data)  # and again to the next agent, before it looked at what the first one left
    second.take(data | {"attempt": 2})
    assert ledger.read_text().split() == [data["id"]] * 2
    assert [run.entry.result["status"] for run in second.agent._holding()] == ["success", "success"]


def test_a_job_that_the_agent_does_not_take_is_answered(host, lone):
    one = lone()
    one.take(host.job(app="../up"))
    [run] = one.agent._holding()
    assert (run.entry.result["status"], run.entry.result["reason"]) == ("failed", "rejected")
    assert "app" in run.entry.result["error"]


def test_the_agents_own_log_says_how_a_job_ended(host, lone, caplog):
    caplog.set_level("INFO")
    one = lone()
    good, bad = host.job(), host.job(build="exit 3")
    for data in (good, bad):
        one.take(data)
    assert f"job {good['id']}: web success" in caplog.messages
    assert f"job {bad['id']}: web failed exit_code" in caplog.messages


def test_an_app_folder_that_cannot_be_made_is_named(host, lone, monkeypatch):
    one = lone()
    seal(monkeypatch, host.app)
    one.take(host.job())
    [run] = one.agent._holding()
    expected = {"status": "failed", "reason": "rejected", "error": f"cannot write {host.app}/releases: Permission denied"}
    assert run.entry.result == expected


def test_a_job_does_not_start_when_it_cannot_be_tracked(host, lone, monkeypatch, tmp_path, variables):
    variables["LEDGER"] = str(tmp_path / "ledger")
    one = lone()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(agent, "write_whole", full)
    with pytest.raises(OSError, match="No space"):
        one.agent._take(host.job(deploy="touch $LEDGER"))
    assert one.agent._holding() == [] and not (tmp_path / "ledger").exists()


def test_a_full_disk_in_the_middle_of_a_job_leaves_no_process(host, monkeypatch, tmp_path, env):
    env["PIDS"] = str(tmp_path / "pids")
    real = agent.write_whole

    def full_when_it_runs(path, text, sync=True):
        if not sync and '"release"' in text:
            until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().strip())
            raise OSError(28, "No space left on device")
        real(path, text, sync)

    monkeypatch.setattr(agent, "write_whole", full_when_it_runs)
    host.machine.env["PATH"] = fake_git(tmp_path, env, 'case "$*" in *update-ref*) echo $$ >"$PIDS"; exec sleep 60;; esac')
    assert host.deploy()["status"] == "failed"
    assert not lives(int((tmp_path / "pids").read_text()))


def test_the_host_signs_in_with_its_own_secret_and_registers_its_digest(host, lone, scripted):
    server = scripted(lambda path, body, token: (200, {"id": "a1", "session": "s1", "job": None, "interval": 0}, {}))
    one = lone(server.url, token="dbt_enrol").agent
    one._register()
    one._send_heartbeat()
    (path, body, token), (beat_path, beat, secret) = server.asked
    assert (path, token) == ("/v1/agents/register", "dbt_enrol")
    assert secret.startswith("dbt_") and body["token_sha256"] == hashlib.sha256(secret.encode()).hexdigest()
    assert (beat_path, beat) == ("/v1/agents/a1/heartbeat", {"status": "online", "running": [], "session": "s1", "wait": 25})
    file = host.machine.workdir / ".agent/secret"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and file.read_text().strip() == secret
    assert lone(server.url).agent._secret == secret  # the next agent is the same host


def test_a_host_that_is_known_shows_its_own_secret_first(host, lone, scripted):
    """A token that was revoked meanwhile is not shown again: it would count as a failed sign-in, of all behind this address."""
    known = []

    def answer(path, body, token):
        good = token == "dbt_enrol" or body["token_sha256"] in known
        return (200, {"id": "a1"}, {}) if good else (401, {"detail": "no"}, {})

    server = scripted(answer)
    one = lone(server.url, token="dbt_enrol").agent
    secret = one._secret

    def shown(token):
        before = len(server.asked)
        lone(server.url, token=token).agent._register()
        return [sent for *_, sent in server.asked[before:]]

    assert shown("dbt_enrol") == ["dbt_enrol"]
    known.append(hashlib.sha256(secret.encode()).hexdigest())
    assert shown("dbt_revoked") == [secret] == shown(None)
    known.clear()  # hosts reset
    assert shown("dbt_enrol") == [secret, "dbt_enrol"]


def test_an_agent_of_an_earlier_version_falls_back_on_its_own_secret(lone, scripted):
    """It left no note that it is registered."""
    server = scripted(
        lambda path, body, token: (
            (200, {"id": "a1"}, {})
            if body["token_sha256"] == hashlib.sha256(token.encode()).hexdigest()
            else (403, {"detail": "no"}, {})
        )
    )
    one = lone(server.url, token="dbt_revoked").agent
    one._register()
    assert [token for *_, token in server.asked] == ["dbt_revoked", one._secret]


def test_a_host_that_was_reset_is_told_how_it_gets_in_again(lone, scripted, caplog):
    let_in = [True]
    server = scripted(lambda *asked: (200, {"id": "a1"}, {}) if let_in else (401, {"detail": "no"}, {}))
    lone(server.url, token="dbt_enrol").agent._register()
    let_in.clear()
    said = refused(lone(server.url).agent, caplog)
    assert said == (
        "401: the secret of this host is no longer known there: set DEPLOYBOT_AGENT_TOKEN "
        "(`ctl.py token create --role agent --host h` makes one)"
    )


def refused(one, caplog):
    """What a refused registration says in the agent's own log."""
    with pytest.raises(agent.Refused) as caught:
        one._register()
    assert one._is_newer(caught.value) is False
    return caplog.messages[-1].removeprefix("the controller refused: ")


@pytest.mark.parametrize(
    ("token", "status", "said"),
    [
        (None, 401, "401: no token: set DEPLOYBOT_AGENT_TOKEN (the value is in the controller's settings)"),
        ("dbt_wrong", 401, "401: DEPLOYBOT_AGENT_TOKEN is not the controller's: the right value is in the controller's settings"),
        ("dbt_read", 403, "401: DEPLOYBOT_AGENT_TOKEN is not the controller's: the right value is in the controller's settings"),
    ],
)  # fmt: skip
def test_a_refused_token_says_what_to_do(lone, scripted, caplog, token, status, said):
    server = scripted(lambda path, body, sent: (status if sent == token else 401, {"detail": "no"}, {}))
    assert refused(lone(server.url, token=token).agent, caplog) == said


@pytest.mark.parametrize(
    ("token", "owner"), [(None, "403: this folder belongs to the host vm"), ("dbt_agent", "409: this folder belongs to another host")]
)  # fmt: skip
def test_a_folder_of_another_host_is_named_with_the_ways_out(host, lone, make_controller, caplog, token, owner):
    closed = make_controller(open=False, token="dbt_admin", agent_token="dbt_agent")
    one = lone(closed.url, token=token).agent
    digest = hashlib.sha256(one._secret.encode()).hexdigest()
    closed.register("vm", token_sha256=digest)
    way_out = f"use another --workdir for h, or remove {host.machine.workdir}/.agent"
    assert refused(one, caplog) == f"{owner}: {way_out}"


@pytest.mark.parametrize("status", [401, 404])
def test_a_host_that_was_removed_registers_anew(lone, scripted, status):
    ids = iter(("a1", "a2"))

    def answer(path, body, token):
        if path.endswith("register"):
            return 200, {"id": next(ids), "session": "s"}, {}
        return (status, {"detail": "unknown"}, {}) if "a1" in path else (200, {"job": None, "interval": 300}, {})

    server = scripted(answer)
    one = lone(server.url, token="dbt_enrol").agent
    heart = threading.Thread(target=one._beat, daemon=True)
    heart.start()
    until(lambda: len(server.asked) == 4)
    one._silent.set()
    one._hurry()
    heart.join(5)
    paths = [path.removeprefix("/v1/agents/") for path, *_ in server.asked]
    assert paths == ["register", "a1/heartbeat", "register", "a2/heartbeat"] and not heart.is_alive()


def test_a_parked_heartbeat_does_not_go_on_naming_a_job_that_has_ended(host, lone, scripted, tmp_path):
    """The controller hands out no more jobs than there are slots, and counts what the heartbeat names."""
    go = tmp_path / "go"
    over, said, data = threading.Event(), [], host.job(build=f"until [ -e {go} ]; do sleep 0.02; done")

    def answer(path, body, token):
        if path.endswith("register"):
            return 200, {"id": "a1", "session": "s"}, {}
        if not path.endswith("heartbeat"):
            return 200, {}, {}
        said.append([entry["job_id"] for entry in body["running"]])
        if body["running"]:
            go.touch()
            over.wait(20)
        return 200, {"job": data if len(said) == 1 else None, "interval": 0 if len(said) == 1 else 300}, {}

    one = lone(scripted(answer).url).agent
    heart = threading.Thread(target=one._beat, daemon=True)
    heart.start()
    until(lambda: len(said) == 3, timeout=10)
    over.set()
    one._silent.set()
    one._hurry()
    heart.join(5)
    assert said == [[], [data["id"]], []]


def test_the_interval_of_the_answer_is_kept_and_has_a_limit(lone):
    one = lone().agent
    assert [one._obey({"interval": value}) for value in (5, 0, 1e9, -1, "x", None)] == [5.0, 0.0, 300.0, 0.0, 0.0, 0.0]


def test_log_lines_that_are_never_taken_do_not_keep_the_result_back(host, lone, scripted):
    server = scripted(lambda path, *_: (422, {"detail": "no"}, {}) if path.endswith("logs") else (200, {"job": {}}, {}))
    one = lone(server.url)
    one.agent._take(host.job(build="echo hello"))
    until(lambda: not one.agent._holding())
    assert server.asked[-1][1]["status"] == "success"


def test_a_gap_is_closed_from_the_spool(host, lone, scripted):
    """The controller was restored from a backup and knows fewer lines than it had acknowledged."""
    stored, lost = [], []

    def answer(path, body, token):
        if path.endswith("result"):
            return 200, {"job": {}}, {}
        if not lost and len(stored) > 2:
            lost.append(stored.pop())
            return 409, {"detail": "gap", "next_offset": len(stored)}, {}
        stored.extend(line[0] for line in body["lines"][len(stored) - body["offset"] :])
        return 200, {"next_offset": len(stored), "cancel": False}, {}

    one = lone(scripted(answer).url)
    one.agent._take(host.job(build="for i in 1 2 3 4; do echo $i; sleep 0.12; done"))
    until(lambda: not one.agent._holding())
    assert lost and [line for line in stored if line.isdigit()] == ["1", "2", "3", "4"]


def test_a_slow_controller_holds_the_script_back_and_loses_no_line(host, lone, scripted, monkeypatch):
    """Each of its answers comes when the script is as far ahead as it may be."""
    for name, size in (("HELD_FROM", 1 << 18), ("SPOOL_ANEW", 1 << 20), ("SPOOL_LIMIT", 1 << 21)):
        monkeypatch.setattr(agent, name, size)
    stored, ahead = [], []

    def answer(path, body, token):
        if path.endswith("result"):
            return 200, {"job": {}}, {}
        [run] = one.agent._holding()
        until(lambda: run.ended.is_set() or not run.spool.room(0))
        ahead.append(run.spool._end - run.spool._position)
        assert body["offset"] == len(stored)
        stored.extend(line[0] for line in body["lines"])
        return 200, {"next_offset": len(stored), "cancel": False}, {}

    one = lone(scripted(answer).url)
    one.agent._take(host.job(build="seq -f %0999.0f 1 6000"))
    until(lambda: not one.agent._holding())
    assert [int(line) for line in stored if line.isdigit()] == list(range(1, 6001))
    assert max(ahead) < agent.HELD_FROM + 2 * agent.PIPE_BYTES


class Pauses(threading.Event):
    """In place of what wakes the heart: keeps how long it means to pause."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def wait(self, timeout=None):
        self.asked.append(timeout)
        return super().wait(timeout)


def beats(server):
    return [body for path, body, _ in server.asked if path.endswith("heartbeat")]


def welcoming(heartbeat, elsewhere=(200, {}, {})):
    """An answer of a controller that registers all; the rest as given, the heartbeat by its body."""

    def answer(path, body, token):
        if path.endswith("register"):
            return 200, {"id": "a1", "session": "s"}, {}
        return heartbeat(body) if path.endswith("heartbeat") else elsewhere

    return answer


def accepting(*accepts):
    """A controller that takes more in a heartbeat."""
    return lambda path, body, token: (200, {"id": "a1", "session": "s", "accepts": list(accepts)}, {})


def test_labels_go_up_with_the_registration(lone, scripted):
    server = scripted(accepting())
    lone(server.url, labels={"role": "web"}).agent._register()
    lone(server.url).agent._register()
    first, second = [body["capabilities"] for _, body, _ in server.asked]
    assert first["labels"] == {"role": "web"} and second["labels"] == {} and first["agent"] == agent.VERSION


@pytest.mark.parametrize("accepts", [None, [], "current", ["other"], [7], {"current": 1}])
def test_a_controller_that_does_not_ask_for_it_is_not_told_what_is_current(host, lone, scripted, accepts):
    host.deploy()
    server = scripted(lambda path, body, token: (200, {"id": "a1", "session": "s"} | ({"accepts": accepts} if accepts else {}), {}))
    one = lone(server.url).agent
    one._register()
    one._send_heartbeat()
    assert "current" not in beats(server)[0]


OLD_JOB = ("id", "attempt", "app", "repo", "ref", "host", "timeout", "metadata", "spec", "assigned_agent")


@pytest.mark.parametrize("newer", [False, True])
def test_an_older_and_a_newer_controller_are_worked_for(host, lone, scripted, newer):
    """The older one answers no `accepts`, and of a job's spec only what the first agents knew; the newer one more than this agent knows."""
    job, results = host.job(deploy=["cat", "page.txt"]), []
    assert tuple(job) == OLD_JOB and set(job["spec"]) == {"clone_url", "deploy"}
    more = {"later": {"a": [1]}} if newer else {}
    job = {**job, **more, "spec": {**job["spec"], **more}}

    def answer(path, body, token):
        if path.endswith("register"):
            accepts = {"accepts": ["current", "later"]} if newer else {}
            return 200, {"id": "a1", "hostname": "h", "session": "s", **accepts, **more}, {}
        if path.endswith("heartbeat"):
            assert set(body) <= {"status", "running", "session", "wait", *(["current"] if newer else [])}
            return 200, {"job": None if body["running"] or results else job, "cancel": [], **more}, {}
        if path.endswith("logs"):
            return 200, {"next_offset": body["offset"] + len(body["lines"]), "cancel": False, **more}, {}
        results.append(body)
        return 200, {"job": {}, **more}, {}

    one = lone(scripted(answer).url).agent
    one._register()
    one._obey(one._send_heartbeat())
    until(lambda: not one._holding())
    assert [(body["status"], body["exit_code"]) for body in results] == [("success", 0)] and host.read() == "one\n"
    assert set(results[0]) <= {"attempt", "status", "exit_code", "commit", "reason", "error"}
    one._obey(one._send_heartbeat())


def test_a_heartbeat_says_what_is_current_and_looks_at_no_folder_for_it(host, lone, scripted, health, monkeypatch):
    first = host.deploy()["commit"]
    host.deploy(app="never", build="exit 1")
    (host.machine.workdir / "by-hand").mkdir()
    (host.machine.workdir / "by-hand/current").symlink_to("releases/x")
    server = scripted(accepting("current", "more"))
    one = lone(server.url)
    one.agent._register()

    def current():
        with monkeypatch.context() as patch:
            patch.setattr(os, "readlink", None)
            patch.setattr(os, "listdir", None)
            one.agent._send_heartbeat()
        return beats(server)[-1]["current"]

    assert current() == {"web": first}
    second = host.source.commit({"page.txt": "two\n"})
    seen = []
    pulse = health(lambda handler: (seen.append(current()), handler.send_response(200), handler.end_headers()))
    one.take(host.job(app="other", health_check={"url": pulse.url}))
    assert seen == [{"web": first, "other": second}]  # from the switch on
    one.take(host.job(activate="grep one page.txt"))
    assert current() == {"web": first, "other": second}  # it went back
    one.take(host.job(activate="exit 1", rollback_on_failure=False))
    assert current() == {"web": second, "other": second}  # it stayed
    one.take(host.job(ref=first, reuse=True))
    assert current() == {"web": first, "other": second}
    one.take(host.job(app="new", activate="exit 1"))
    assert "new" not in current()
    one.agent._register()
    assert lone(server.url).agent._current == {"web": first, "other": second}  # the next agent


def test_a_newer_controller_that_gives_way_to_an_older_one_is_not_told(host, lone, scripted):
    host.deploy()
    answers = iter([["current"], None])
    server = scripted(
        lambda path, body, token: (200, {"id": "a1"} | ({"accepts": next(answers)} if "register" in path else {}), {})
    )
    one = lone(server.url).agent
    for _ in range(2):
        one._register()
        one._send_heartbeat()
    assert ["current" in body for body in beats(server)] == [True, False]


@pytest.mark.parametrize(
    ("answer", "least", "most"),
    [
        ((None, {}, {}), 2.0, 2.0),  # a controller that was killed cuts all parked calls in one moment
        ((503, {"detail": "stopping"}, {"Retry-After": "3"}), 5.0, 5.0),
        ((404, {"detail": "unknown"}, {}), 0.01, agent.IDLE_PAUSE),  # it is there: the agent has but to register again
        ((200, {"interval": 7.5}, {}), 7.5, 7.5),
    ],
)
def test_how_long_the_heart_pauses_before_it_comes_back(lone, scripted, answer, least, most):
    server = scripted(welcoming(lambda body: answer))
    one = lone(server.url).agent
    one._backoff = lambda first: agent.Backoff(first, chance=lambda: 0.25)
    one._nudge = pauses = Pauses()
    heart = threading.Thread(target=one._beat, daemon=True)
    heart.start()
    until(lambda: pauses.asked)
    one._silent.set()
    one._hurry()
    heart.join(5)
    (pause,) = pauses.asked
    assert least <= pause <= most and len(beats(server)) == 1 and not heart.is_alive()


def test_a_heart_that_is_interrupted_looks_again_at_once(lone, scripted):
    """Whether that comes before or after it began its call: the controller was not lost."""
    over, server = threading.Event(), scripted(welcoming(lambda body: (200, {"interval": 300 * over.wait(20)}, {})))
    one = lone(server.url).agent
    one._nudge = pauses = Pauses()
    heart = threading.Thread(target=one._beat, daemon=True)
    heart.start()
    until(lambda: len(beats(server)) == 1)
    one._heart.interrupt()
    until(lambda: len(beats(server)) == 2)
    over.set()
    until(lambda: pauses.asked)
    one._silent.set()
    one._hurry()
    heart.join(5)
    assert pauses.asked == [300.0]


def test_a_connection_that_was_hung_up_while_nothing_was_asked_is_not_used_again(scripted):
    controller = agent.Controller(scripted(lambda *asked: (200, {}, {})).url, lambda: None)
    for _ in range(20):
        controller.call("POST", "/", {})
        controller.interrupt(patience=0.01)
        controller.resume()
    controller.close()


def test_a_signal_ends_a_pause_that_the_controller_asked_for(lone, scripted):
    server = scripted(welcoming(lambda body: (200, {"interval": 300}, {})))
    one, codes = lone(server.url).agent, []
    one._nudge = pauses = Pauses()
    main = threading.Thread(target=lambda: codes.append(one.run()), daemon=True)
    main.start()
    until(lambda: pauses.asked)
    one.events.put("signal")
    main.join(20)
    assert codes == [agent.EXIT_DONE] and beats(server)[-1]["status"] == "offline"


def test_a_farewell_that_was_not_heard_is_said_again(lone, scripted):
    said = []

    def hear(body):
        said.append(body["status"])
        return (503, {}, {}) if said == ["online", "offline"] else (200, {"interval": 300}, {})

    one = lone(scripted(welcoming(hear)).url).agent
    one._register()
    assert one._send_heartbeat() == {"interval": 300}
    one._say_goodbye(agent.EXIT_DONE)
    assert said == ["online", "offline", "offline"]


def test_a_job_that_ends_in_a_pause_is_reported_at_once_and_does_not_end_the_pause(host, lone, scripted, tmp_path):
    go = tmp_path / "go"
    data = host.job(build=f"until [ -e {go} ]; do sleep 0.02; done")

    def heartbeat(body):
        return 200, {"interval": 300} if body["running"] else {"job": data}, {}

    server = scripted(welcoming(heartbeat))
    one = lone(server.url).agent
    one._nudge = pauses = Pauses()
    heart = threading.Thread(target=one._beat, daemon=True)
    heart.start()
    until(lambda: 300.0 in pauses.asked)
    go.touch()
    until(lambda: not one._holding())
    assert [path for path, *_ in server.asked if path.endswith("result")] and not pauses.is_set()
    one._silent.set()
    one._hurry()
    heart.join(5)
    assert len(beats(server)) == 2


# What is tracked, and what is fenced off


def test_a_script_is_tracked_on_disk_before_it_starts(host, lone, monkeypatch, variables):
    events, fsync, start, jobs = [], os.fsync, agent.CHILDREN.start, str(host.machine.workdir / ".agent/jobs")

    def sync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if path.startswith(jobs):  # the threads of an earlier test may still have something to sync
            events.append(path.removeprefix(jobs))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(agent.CHILDREN, "start", lambda *args: (events.append("started"), start(*args))[1])
    variables["JOBS"] = jobs
    one = lone()
    file = '"$JOBS/$DEPLOY_JOB_ID.1.json"'
    noted = f'until grep -q "leader.: .$$," {file}; do sleep 0.02; done'  # a moment later, for whoever comes after a crash
    one.take(host.job(deploy=f'grep -c "state.: .running" {file}; {noted}; exit 3'))
    [run] = one.agent._holding()
    assert events[:3] == [f"/{run.key.job_id}.1.json.new", "", "started"]  # the file, its folder
    assert [line for line in spooled(run) if not line.startswith("[")] == ["1"]


def spooled(run):
    return [json.loads(line)[0] for line in run.entry.spool_path.read_text().splitlines()]


@pytest.mark.parametrize("where", ["logs", "heartbeat", "result"])
def test_a_script_ends_when_its_attempt_is_no_longer_its_own(host, lone, scripted, tmp_path, variables, where):
    """409 to its logs ends one that prints; one that is silent learns it from the heartbeat; a result is then not wanted."""
    variables["PIDS"] = str(tmp_path / "pids")
    noise = "echo noise; " if where == "logs" else ""
    wait = "sleep 60" if where != "result" else "exit 3"
    data = host.job(deploy=f'sleep 70 & echo $! $$ >"$PIDS"; {noise}{wait}')
    named = []

    def answer(path, body, token):
        if path.endswith("register"):
            return 200, {"id": "a1", "session": "s"}, {}
        runs = bool((tmp_path / "pids").exists() and (tmp_path / "pids").read_text())
        if not path.endswith("heartbeat"):
            fenced = path.endswith("result") or (path.endswith(where) and runs)
            return (409, {"detail": "attempt 2 is running"}, {}) if fenced else (200, {}, {})
        named.append([entry["job_id"] for entry in body["running"]])
        cancel = named[-1] if where == "heartbeat" and runs else []
        return 200, {"job": data if len(named) == 1 else None, "cancel": cancel, "interval": 0.05}, {}

    server = scripted(answer)
    one = lone(server.url).agent
    heart = threading.Thread(target=one._beat, daemon=True)
    heart.start()
    until(lambda: len(named) > 2 and named[-1] == [] and (tmp_path / "pids").exists())  # it may end before a heartbeat names it
    one._silent.set()
    one._hurry()
    heart.join(5)
    assert not any(lives(int(pid)) for pid in (tmp_path / "pids").read_text().split())
    assert one._journal.find(agent.JobKey(data["id"], 1)).data["state"] == "done"


@pytest.mark.parametrize("cancel", [False, True])
def test_a_newer_attempt_ends_the_older_one_and_is_not_cancelled_in_its_place(host, lone, tmp_path, variables, cancel):
    """`cancel` has job ids alone: of two attempts it means the one that the controller has given up."""
    variables |= {"LEDGER": str(tmp_path / "ledger")}
    script = 'echo $$ >>"$LEDGER"; [ $(wc -l <"$LEDGER") = 2 ] || sleep 60'
    data = host.job(deploy=script)
    one = lone()
    one.agent._take(data)
    until((tmp_path / "ledger").exists)
    one.agent._take(data | {"attempt": 2})
    if cancel:
        one.agent._obey({"cancel": [data["id"]]})
    runs = sorted(one.agent._holding(), key=lambda run: run.key)
    assert all(run.ended.wait(20) for run in runs)
    assert [run.entry.result["status"] for run in runs] == ["cancelled", "success"]
    assert runs[0].entry.result["error"] == "the controller gave this job up"


def test_a_cancel_of_the_only_attempt_is_a_cancel(host, lone, tmp_path, variables):
    variables["LEDGER"] = str(tmp_path / "ledger")
    one = lone()
    data = host.job(deploy='touch "$LEDGER"; sleep 60')
    one.agent._take(data)
    until((tmp_path / "ledger").exists)
    one.agent._obey({"cancel": [data["id"]]})
    [run] = one.agent._holding()
    assert run.ended.wait(20) and run.entry.result["error"] == "cancelled"


def test_what_a_dead_agent_left_of_an_app_is_ended_before_its_next_job_starts(host, lone, scripted, tmp_path, variables):
    host.machine.grace = 1.0  # the newer one has the time to start, if it is let
    variables |= {"NEW": str(tmp_path / "new"), "OVERLAP": str(tmp_path / "overlap")}
    data = host.job(deploy='touch "$NEW"; sleep 0.1')
    entry = host.journal.begin(data, agent.boot_id())
    script = 'trap "" TERM; echo; while :; do [ -e "$NEW" ] && touch "$OVERLAP"; sleep 0.02; done'
    child = subprocess.Popen(
        ["sh", "-c", script], env={**host.machine.env, **variables, "DEPLOY_JOB_ID": data["id"]}, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    child.stdout.readline()
    entry.note(leader=[child.pid, agent.read_stat(child.pid).start])
    results, handed, following = {}, [], data | {"id": str(uuid.uuid4())}

    def answer(path, body, token):
        if path.endswith("register"):
            return 200, {"id": "a1", "session": "s"}, {}
        if path.endswith("result"):
            results[path.split("/")[3]] = (body["status"], body.get("reason"))
        job = following if path.endswith("heartbeat") and not handed else None
        handed.extend([job] if job else [])
        return 200, {"job": job, "interval": 0.05}, {}

    one = lone(scripted(answer).url).agent
    thread = threading.Thread(target=one.run, daemon=True)
    thread.start()
    until(lambda: len(results) == 2)
    one.events.put("signal")
    thread.join(10)
    child.wait()
    child.stdout.close()
    assert not thread.is_alive() and not (tmp_path / "overlap").exists()
    assert results == {data["id"]: ("failed", "agent_crashed"), following["id"]: ("success", None)}


class Restored:
    """A controller that has the first `kept` lines of a job's log, as one does that was restored from a backup."""

    def __init__(self, scripted, kept):
        self.lines, self.results = [f"line {number}" for number in range(kept)], []
        self.url = scripted(self._answer).url

    def _answer(self, path, body, token):
        if path.endswith("result"):
            self.results.append(body)
            return 200, {"job": {}}, {}
        if body["offset"] > len(self.lines):
            return 409, {"detail": "a gap", "next_offset": len(self.lines)}, {}
        self.lines += [line[0] for line in body["lines"][len(self.lines) - body["offset"] :]]
        return 200, {"next_offset": len(self.lines), "cancel": False}, {}


@pytest.mark.parametrize("kept", [0, 3, 8])
def test_a_job_that_a_restored_controller_hands_out_again_is_answered_and_its_gap_filled(host, lone, scripted, tmp_path, kept):
    """Its 8 lines were acknowledged, and are gone here."""
    data = host.job(deploy=f"touch {tmp_path}/again")
    entry = host.journal.begin(data, agent.boot_id())
    entry.end({"status": "failed", "reason": "exit_code", "exit_code": 6, "error": "as it was"})
    entry.done(8)
    controller = Restored(scripted, kept)
    one = lone(controller.url)
    one.agent._take(data)
    until(lambda: not one.agent._holding())
    gap = [f"[deploybot] {8 - kept} line(s) are missing here: the controller lost them, and this host no longer has them"]
    again = "[deploybot] this attempt ended before; its result goes up again"
    assert controller.lines[kept:] == (gap if kept < 8 else []) + [again]
    assert [(body["exit_code"], body["error"]) for body in controller.results] == [(6, "as it was")]
    assert not (tmp_path / "again").exists()
    one.agent._take(data)  # and once more: the lines since count, too
    until(lambda: not one.agent._holding())
    assert controller.lines[-1] == again and len(controller.lines) == kept + (3 if kept < 8 else 2)


def test_a_bridge_over_a_gap_is_sent_again_like_any_line(tmp_path):
    spool = agent.Spool(tmp_path / "log", first=8)
    spool.write(b"a\nb\n")
    spool.close()

    def batch():
        return spool.offset, messages(spool.batch(0))

    assert batch() == (8, ["a", "b"])
    spool.seek(3)
    offset, lines = batch()
    assert offset == 3 and lines[0].startswith("[deploybot] 5 line(s) are missing") and lines[1:] == ["a", "b"]
    spool.seek(3)  # the answer was lost
    assert batch() == (3, lines)
    spool.seek(4)
    assert batch() == (4, ["a", "b"])
    spool.seek(3)
    spool.seek(5)
    assert batch() == (5, ["b"])
    spool.seek(1)  # restored once more, from an older backup
    offset, lines = batch()
    assert offset == 1 and lines[0].startswith("[deploybot] 3 line(s) are missing") and lines[1:] == ["a", "b"]
    spool.seek(4)
    assert spool.batch(0) is None


@pytest.mark.parametrize("wanted", [lambda offset: offset, lambda offset: (offset + 1) % 3, lambda offset: 10**9])
def test_a_controller_that_names_gaps_without_end_gets_the_result_all_the_same(host, lone, scripted, wanted):
    def answer(path, body, token):
        if path.endswith("logs"):
            return 409, {"detail": "a gap", "next_offset": wanted(body["offset"])}, {}
        return 200, {"job": {}}, {}

    server = scripted(answer)
    one = lone(server.url)
    one.agent._take(host.job(build="echo 1; sleep 0.1; echo 2; sleep 0.1; echo 3"))
    until(lambda: not one.agent._holding())
    assert server.asked[-1][1]["status"] == "success" and len(server.asked) < 40


# A controller with a certificate


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A private CA and a certificate of it for localhost: the files ca.pem, cert.pem, key.pem."""
    folder = tmp_path_factory.mktemp("authority")

    def openssl(*args):
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    usage = ("-addext", "keyUsage=critical,keyCertSign")  # from Python 3.13 on a CA has to say what RFC 5280 asks of it
    openssl("req", "-x509", *new_key, *usage, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=A private CA")
    openssl("req", *new_key, "-keyout", "key.pem", "-out", "request", "-subj", "/CN=localhost")
    (folder / "names").write_text("subjectAltName=DNS:localhost\nauthorityKeyIdentifier=keyid\n")
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "1", "-extfile", "names")
    openssl("x509", "-req", "-in", "request", *signed, "-out", "cert.pem")
    return folder


@pytest.fixture
def over_tls(make_controller, authority):
    made = make_controller(tls_cert=authority / "cert.pem", tls_key=authority / "key.pem", open=False, agent_token="dbt_agent")
    return f"https://localhost:{made.port}"


def test_a_private_ca_is_trusted_where_it_is_named_and_refused_where_not(lone, over_tls, authority, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    said = r"^its certificate is of a CA that this machine does not know: name the file of that CA in SSL_CERT_FILE \("
    with pytest.raises(agent.Unreachable, match=said):
        lone(over_tls, token="dbt_agent").agent._register()
    monkeypatch.setenv("SSL_CERT_FILE", str(authority / "ca.pem"))
    one = lone(over_tls, token="dbt_agent").agent
    one._register()
    assert one._identity
    by_address = over_tls.replace("localhost", "127.0.0.1")
    with pytest.raises(agent.Unreachable, match=r"^its certificate is refused: IP address mismatch"):
        lone(by_address, token="dbt_agent").agent._register()


# Whole agents


class Gate:
    """Stands between agent and controller: `open` or not, and may lose answers on their way back."""

    def __init__(self, url):
        host, port = url.removeprefix("http://").split(":")
        self._target = (host, int(port))
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self._open = True
        self._pairs = set()
        self.lose_answers = 0
        self.heartbeats = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._server.accept()
                if not self._open:
                    client.close()
                    continue
                with contextlib.suppress(OSError):
                    pair = (client, socket.create_connection(self._target))
                    self._pairs.add(pair)
                    for from_, to, answers in ((*pair, False), (*pair[::-1], True)):
                        threading.Thread(target=self._pass_on, args=(pair, from_, to, answers), daemon=True).start()

    def _pass_on(self, pair, from_, to, answers):
        with contextlib.suppress(OSError):
            while data := from_.recv(65536):
                self.heartbeats += data.count(b"/heartbeat HTTP/1.1")
                if answers and self.lose_answers:
                    self.lose_answers -= 1
                    break
                to.sendall(data)
        with contextlib.suppress(OSError):
            to.shutdown(socket.SHUT_WR)
        if answers:
            self._cut(pair)

    def _cut(self, pair):
        for sock in pair:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._pairs.discard(pair)

    def shut(self):
        self._open = False
        for pair in list(self._pairs):
            self._cut(pair)

    def reopen(self):
        self._open = True

    def close(self):
        self.shut()
        self._server.close()


RUNNER = f"""
import functools, os, sys
sys.path.insert(0, {str(ROOT)!r})
import agent
agent.VERSION = os.environ.get("TEST_VERSION", agent.VERSION)
agent.Machine = functools.partial(agent.Machine, grace={GRACE})
agent.BACKOFF_LIMIT = 0.5
agent.HELD_FROM, agent.HELD_FOR = 1 << 20, 0.5
sys.exit(agent.main())
"""


class Site:
    """A controller, a repository, and agents as real processes."""

    def __init__(self, controller, source, env, tmp_path):
        self.controller, self.source, self.env, self.tmp_path = controller, source, env, tmp_path
        self.variables = {}  # of the scripts
        self.gate = Gate(controller.url)
        self.processes = []

    def start(self, *flags, hostname="h", work="work", **variables):
        settings = {
            "DEPLOYBOT_URL": self.gate.url, "DEPLOYBOT_HOSTNAME": hostname, "DEPLOYBOT_WORKDIR": str(self.tmp_path / work),
            "DEPLOYBOT_GIT_PROTOCOLS": "file", "DEPLOYBOT_ENV_FILE": self.env_file(), **variables,
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-c", RUNNER, *flags], env=self.env | settings, stderr=subprocess.PIPE, start_new_session=True
        )
        process.errors = []
        process.reader = threading.Thread(target=lambda: process.errors.extend(process.stderr), daemon=True)
        process.reader.start()
        self.processes.append(process)
        return process

    def env_file(self):
        path = self.tmp_path / "variables.env"
        path.touch(mode=0o600)
        path.write_text("".join(f"{name}='{value}'\n" for name, value in self.variables.items()))
        return str(path)

    def apps(self, *names, hosts=("h",), **commands):
        entries = [{"name": name, "repo": "o/n", "clone_url": self.source.url, "hosts": hosts, **commands} for name in names]
        self.controller.apps_file.write_text(json.dumps({"apps": entries}))
        self.controller.ok("POST", "/v1/reload")

    def submit(self, ref="main", app="web", host="h", **more):
        return self.controller.create(ref, host, "o/n", app=app, **more)["id"]

    def job(self, job_id):
        return self.controller.job(job_id)

    def ended(self, job_id):
        return until(lambda: self.job(job_id)["completed_at"] and self.job(job_id), what=f"the end of {job_id}")

    def messages(self, job_id):
        return [line["message"] for line in self.controller.lines({"id": job_id}, limit=10_000)]

    def output(self, job_id):
        """The output of the scripts, less its newlines."""
        return "".join(line for line in self.messages(job_id) if not line.startswith("[deploybot]"))

    def agent_status(self):
        return self.controller.ok("GET", "/v1/hosts")["hosts"][0]["agent_status"]

    def close(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            process.reader.join(5)
            process.stderr.close()
        self.gate.close()


@pytest.fixture
def site(controller, source, env, tmp_path):
    made = Site(controller, source, env, tmp_path)
    yield made
    made.close()


def script_app(site, files, **spec):
    site.source.commit(files)
    site.apps("web", **(spec or {"deploy": ["./run"]}))


def test_an_agent_deploys_what_is_asked_for_and_tells_the_commit(site):
    script_app(site, {"run": "#!/bin/sh\necho hello from $DEPLOY_HOST\n"})
    process = site.start()
    job_id = site.submit()
    job = site.ended(job_id)
    assert (job["status"], job["exit_code"], job["commit"]) == ("success", 0, site.source.git("rev-parse", "main"))
    assert site.output(job_id) == "hello from h"
    second = site.submit()  # the same agent takes one after another
    assert site.ended(second)["status"] == "success"
    assert process.poll() is None


@pytest.mark.parametrize("version, behind", [("0.0.9", True), ("0.2.0", False)])
def test_an_agent_one_minor_version_older_or_newer_works(site, version, behind):
    script_app(site, {"run": "#!/bin/sh\necho hello\n"}, deploy=["./run"], shared=["log/"])
    site.start(TEST_VERSION=version)
    job_id = site.submit()
    assert site.ended(job_id)["status"] == "success" and site.output(job_id) == "hello"
    (host,) = site.controller.ok("GET", "/v1/hosts")["hosts"]
    assert (host["agent_version"], host["behind"], host["agent_status"]) == (version, behind, "online")


def test_a_closed_controller_knows_an_agent_by_its_own_secret(make_controller, source, env, tmp_path):
    closed = make_controller(open=False, agent_token="dbt_agent")
    closed.token = (closed.folder / "admin.token").read_text().strip()
    site = Site(closed, source, env, tmp_path)
    try:
        script_app(site, {"run": "#!/bin/sh\nenv | grep -c dbt_\ntrue\n"})
        stranger = site.start("--once", work="stranger", DEPLOYBOT_AGENT_TOKEN="dbt_wrong")
        until(lambda: any(b"refused: 401" in line for line in stranger.errors))
        stranger.kill()
        job_id = site.submit()
        assert site.start("--once", DEPLOYBOT_AGENT_TOKEN="dbt_agent").wait(15) == agent.EXIT_DONE
        assert site.output(job_id) == "0"
        job_id = site.submit(force=True)
        assert site.start("--once").wait(15) == agent.EXIT_DONE  # known by now
        assert site.job(job_id)["status"] == "success"
    finally:
        site.close()


def test_a_restart_of_the_controller_disturbs_no_job(site):
    site.variables["GO"] = str(site.tmp_path / "go")
    script_app(site, {"run": WAITING})
    process = site.start()
    job_id = site.submit()
    until(lambda: "begun" in site.output(job_id))
    site.controller.restart()
    (site.tmp_path / "go").touch()
    assert site.ended(job_id)["status"] == "success" and site.output(job_id) == "begunfinished"
    assert site.ended(site.submit(force=True))["status"] == "success"
    assert process.poll() is None


def test_output_is_seen_while_the_script_runs_prompts_as_well(site):
    script_app(site, {"run": '#!/bin/sh\necho line\nprintf "Continue? "\nuntil [ -e "$DEPLOY_RELEASE/go" ]; do sleep 0.02; done\n'})
    site.start()
    job_id = site.submit()
    until(lambda: site.output(job_id) == "lineContinue? ")
    assert site.job(job_id)["commit"] == site.source.git("rev-parse", "main") and site.job(job_id)["status"] == "running"
    (next((site.tmp_path / "work/web/releases").iterdir()) / "go").touch()
    assert site.ended(job_id)["status"] == "success"


# Its grandchild leaves group, session and environment behind, ignores TERM, and counts without newlines.
COUNTING = """#!/bin/sh
echo $$ >>"$PIDS"
exec python3 - "$PIDS" 3>&1 <<'END'
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.fork():
        os._exit(0)
    code = '''
import os, sys, time
open(sys.argv[1], "a").write(f"{os.getpid()}\\\\n")
number = 0
while True:
    try:
        os.write(1, f"<{number}>".encode())
    except OSError:
        pass
    number += 1
    time.sleep(0.002)
'''
    os.execvpe(sys.executable, ["python3", "-c", code, sys.argv[1]], EMPTY)
time.sleep(600)
END
"""
CUTS = {"cancel": "{}", "timeout": "{}", "kill -9": "os.environ"}


@pytest.mark.parametrize("how", ["cancel", "timeout", "kill -9"])
def test_nothing_runs_on_and_every_byte_is_stored_once(site, how):
    """After kill -9 nothing but the mark in the environment is left to find a daemon by; else an empty one hides nobody."""
    pids = site.tmp_path / "pids"
    site.variables["PIDS"] = str(pids)
    script_app(site, {"run": COUNTING.replace("EMPTY", CUTS[how])})
    process = site.start()
    job_id = site.submit(timeout=2 if how == "timeout" else 60)
    until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    until(lambda: "<50>" in site.output(job_id))
    if how == "cancel":
        site.controller.ok("POST", f"/v1/jobs/{job_id}/cancel")
    elif how == "kill -9":
        process.kill()
        process.wait()
        assert all(lives(int(pid)) for pid in pids.read_text().split())
        site.start()
    job = site.ended(job_id)
    expected = {"cancel": ("cancelled", "cancelled"), "timeout": ("failed", "timeout"), "kill -9": ("failed", "agent_crashed")}
    assert (job["status"], job["reason"]) == expected[how]
    assert not any(lives(int(pid)) for pid in pids.read_text().split())
    numbers = re.fullmatch(r"((?:<\d+>)*)(?:<\d*)?(Terminated|Killed)?", site.output(job_id))[1]
    assert re.findall(r"\d+", numbers) == [str(number) for number in range(numbers.count("<"))]


def test_the_script_goes_on_while_the_controller_is_away(site):
    """Held back at first, then more than 1 MiB waits on disk; answers that get lost on the way make no line come twice."""
    wait = 'echo begun\nuntil [ -e "$GO" ]; do sleep 0.02; done'
    script_app(site, {"run": f'#!/bin/sh\n{wait}\nseq -f %030.0f 1 20000\ntouch "$GO.done"\n'})
    site.variables["GO"] = str(site.tmp_path / "go")
    site.start()
    job_id = site.submit()
    until(lambda: "begun" in site.output(job_id))
    site.gate.shut()
    (site.tmp_path / "go").touch()
    until((site.tmp_path / "go.done").exists)
    state = site.tmp_path / "work/.agent/jobs"
    until(lambda: [path for path in state.glob("*.json") if json.loads(path.read_text())["state"] == "ended"])
    assert sum(path.stat().st_size for path in state.glob("*.log")) > 1 << 20
    assert site.job(job_id)["status"] == "running"
    site.gate.lose_answers = 6
    site.gate.reopen()
    assert site.ended(job_id)["status"] == "success"
    lines = [line for line in site.messages(job_id) if line.isdigit()]
    assert lines == [f"{number:030}" for number in range(1, 20_001)]
    assert site.gate.lose_answers == 0


def test_a_result_outlives_its_agent(site):
    script_app(site, {"run": '#!/bin/sh\nuntil [ -e "$GO" ]; do sleep 0.02; done\necho the last words\nexit 6\n'})
    site.variables["GO"] = str(site.tmp_path / "go")
    first = site.start()
    job_id = site.submit()
    until(lambda: "running" in "".join(site.messages(job_id)))
    site.gate.shut()
    (site.tmp_path / "go").touch()
    [path] = (site.tmp_path / "work/.agent/jobs").glob("*.json")
    until(lambda: json.loads(path.read_text())["state"] == "ended")
    first.kill()
    first.wait()
    site.gate.reopen()
    site.start()
    job = site.ended(job_id)
    assert (job["status"], job["reason"], job["exit_code"]) == ("failed", "exit_code", 6)
    assert site.output(job_id) == "the last words"
    until(lambda: json.loads(path.read_text())["state"] == "done")
    until(lambda: not path.with_suffix(".log").exists())


WAITING = '#!/bin/sh\necho begun\nuntil [ -e "$GO" ]; do sleep 0.02; done\necho finished\n'


def test_term_lets_the_running_job_finish_and_takes_no_other(site):
    site.variables["GO"] = str(site.tmp_path / "go")
    script_app(site, {"run": WAITING})
    process = site.start("--slots=2")
    job_id = site.submit()
    until(lambda: "begun" in site.output(job_id) and site.gate.heartbeats >= 2)  # the second one is parked
    process.terminate()
    until(lambda: any(b"still to finish" in line for line in process.errors))
    other = site.submit(ref="refs/heads/main")
    until(lambda: site.agent_status() == "offline")
    (site.tmp_path / "go").touch()
    assert process.wait(15) == agent.EXIT_DONE
    assert site.job(job_id)["status"] == "success" and site.output(job_id) == "begunfinished"
    assert site.job(other)["status"] == "pending"


def test_a_second_term_stops_the_job(site):
    site.variables["GO"] = str(site.tmp_path / "go")
    script_app(site, {"run": WAITING})
    process = site.start()
    job_id = site.submit()
    until(lambda: "begun" in site.output(job_id))
    process.terminate()
    until(lambda: any(b"still to finish" in line for line in process.errors))
    process.terminate()
    assert process.wait(15) == agent.EXIT_DONE
    job = site.job(job_id)
    assert (job["status"], job["reason"], job["error"]) == ("cancelled", "cancelled", "the agent was stopped")


def test_an_idle_agent_ends_at_once_and_says_so(site):
    process = site.start()
    until(lambda: any(b"registered" in line for line in process.errors))
    until(lambda: site.agent_status() == "online")
    begun = time.monotonic()
    process.terminate()
    assert process.wait(15) == agent.EXIT_DONE and time.monotonic() - begun < 5
    assert site.agent_status() == "offline", process.errors


@pytest.mark.parametrize(("code", "expected"), [(0, agent.EXIT_DONE), (5, agent.EXIT_FAILED)])
def test_once_takes_one_job_and_ends(site, code, expected):
    script_app(site, {"run": f"#!/bin/sh\nexit {code}\n"})
    first, second = site.submit(), site.submit(ref="refs/heads/main")
    assert site.start("--once").wait(15) == expected
    assert site.job(first)["exit_code"] == code and site.job(second)["status"] == "pending"


def test_the_older_of_two_agents_with_one_hostname_ends(site):
    script_app(site, {"run": "#!/bin/sh\necho ran >>$LEDGER\n"})
    site.variables["LEDGER"] = str(site.tmp_path / "ledger")
    older = site.start(work="one")
    until(lambda: site.gate.heartbeats and site.agent_status() == "online")  # parked: in open mode only such a one is told 409
    newer = site.start(work="two", DEPLOYBOT_AGENT_TOKEN="")
    assert older.wait(15) == agent.EXIT_NEWER
    site.ended(site.submit())
    assert newer.poll() is None and (site.tmp_path / "ledger").read_text() == "ran\n"
    assert (site.tmp_path / "two/web/current").exists() and not (site.tmp_path / "one/web").exists()


def test_two_agents_do_not_share_a_folder(site):
    first = site.start()
    until(lambda: any(b"registered" in line for line in first.errors))
    second = site.start()
    assert second.wait(15) == agent.EXIT_BUSY
    assert first.poll() is None


def test_slots_run_jobs_of_different_apps_at_once(site):
    script_app(
        site, {"run": '#!/bin/sh\ntouch "$MEET.$DEPLOY_APP"\nuntil [ -e "$MEET.web" -a -e "$MEET.api" ]; do sleep 0.02; done\n'}
    )
    site.apps("web", "api", deploy=["./run"])
    site.variables["MEET"] = str(site.tmp_path / "meet")
    site.start("--slots=2")
    jobs = [site.submit(app=app, timeout=15) for app in ("web", "api")]
    assert [site.ended(job_id)["status"] for job_id in jobs] == ["success", "success"]


@pytest.fixture
def closed_site(make_controller, source, env, tmp_path):
    """A controller that wants tokens."""
    closed = make_controller(open=False, token="dbt_admin", agent_token="dbt_enrol")
    made = Site(closed, source, env, tmp_path)
    yield made
    made.close()


def create_token(site, **more):
    return site.controller.ok("POST", "/v1/tokens", {"role": "agent", **more})["secret"]


def test_two_agents_of_one_host_never_run_an_app_at_once_whatever_their_folders(closed_site):
    """The older one hangs in the middle of a script. Its host is reset for a newer one; the older one's job is given up, the newer
    one gets the next, and waits for what the older one left; that one ends, and its script with it, once it hears of it."""
    site = closed_site
    site.variables |= {"LEDGER": str(site.tmp_path / "ledger"), "GO": str(site.tmp_path / "go")}
    script = 'echo begun >>"$LEDGER"\n[ -e "$GO" ] || sleep 60 || exit\necho ended >>"$LEDGER"\n'
    script_app(site, {"run": f"#!/bin/sh\n{script}"})
    older = site.start(work="one", DEPLOYBOT_AGENT_TOKEN="dbt_enrol")
    first = site.submit()
    ledger = site.tmp_path / "ledger"
    until(ledger.exists)
    older.send_signal(signal.SIGSTOP)
    site.controller.ok("POST", "/v1/hosts/h/reset")
    newer = site.start(work="two", DEPLOYBOT_AGENT_TOKEN="dbt_enrol")
    try:
        assert site.ended(first)["reason"] == "agent_crashed"
        (site.tmp_path / "go").touch()
        second = site.submit()
        waits = "[deploybot] waiting for another job of web on this host"
        until(lambda: waits in site.messages(second))
        assert ledger.read_text().split() == ["begun"]
    finally:
        older.send_signal(signal.SIGCONT)
    assert older.wait(15) == agent.EXIT_NEWER
    assert site.ended(second)["status"] == "success" and newer.poll() is None
    assert ledger.read_text().split() == ["begun", "begun", "ended"]


def test_a_token_of_a_host_lets_its_agent_in_and_no_other(closed_site):
    site = closed_site
    script_app(site, {"run": "#!/bin/sh\ntrue\n"})
    token = create_token(site, host="h")
    other = site.start("--once", hostname="other", work="other", DEPLOYBOT_AGENT_TOKEN=token)
    until(lambda: any(b"refused: 40" in line for line in other.errors))
    job_id = site.submit()
    assert site.start("--once", DEPLOYBOT_AGENT_TOKEN=token).wait(15) == agent.EXIT_DONE
    assert site.job(job_id)["status"] == "success"
    lost = site.start("--once", work="a-new-disk", DEPLOYBOT_AGENT_TOKEN=token)
    until(lambda: any(b"hosts reset h" in line for line in lost.errors))


def test_a_host_that_was_reset_registers_anew_with_its_token_and_its_script_goes_on(closed_site):
    site = closed_site
    site.variables["GO"] = str(site.tmp_path / "go")
    script_app(site, {"run": WAITING})
    process = site.start(DEPLOYBOT_AGENT_TOKEN="dbt_enrol")
    first = site.submit()
    until(lambda: "begun" in site.output(first))
    site.controller.ok("POST", "/v1/hosts/h/reset")
    until(lambda: sum(b"registered as" in line for line in process.errors) == 2)
    (site.tmp_path / "go").touch()
    assert site.ended(first)["status"] == "success" and site.output(first) == "begunfinished"
    process.kill()
    process.wait()
    alone = site.start()  # without a token it is let in by its own secret
    until(lambda: any(b"registered as" in line for line in alone.errors))
    site.controller.ok("POST", "/v1/hosts/h/reset")
    until(lambda: any(b"the secret of this host is no longer known there" in line for line in alone.errors))
    assert alone.poll() is None


@as_root
def test_run_as_allow_repo_and_env_file_in_a_whole_agent(site, public):
    site.variables |= {"PASSWORD": "hunter2000"}
    script_app(site, {"run": '#!/bin/sh\nid -un\necho "$PASSWORD"\ncat "$DEPLOY_RELEASE/../../../.agent/secret"\nexit 3\n'})
    process = site.start("--run-as=nobody", "--allow-repo=O/*", work=public / "work")
    job_id = site.submit()
    assert site.ended(job_id)["exit_code"] == 3
    assert re.fullmatch(r"nobody\*\*\*cat: .*/\.agent/secret'?: Permission denied", site.output(job_id))
    site.controller.apps_file.write_text("")
    site.controller.ok("POST", "/v1/reload")
    other = site.controller.create("main", "h", "someone/else")["id"]
    assert site.ended(other)["reason"] == "rejected" and "--allow-repo is o/*" in site.job(other)["error"]
    assert process.poll() is None


def test_an_agent_hides_its_own_tokens_too(closed_site):
    """Where scripts are the agent's user they can read its secret; the log, which more people read, does not show it."""
    site = closed_site
    script_app(site, {"run": '#!/bin/sh\ncat "$DEPLOY_RELEASE/../../../.agent/secret"\necho dbt_enrol\n'})
    site.start(DEPLOYBOT_AGENT_TOKEN="dbt_enrol")
    job_id = site.submit()
    assert site.ended(job_id)["status"] == "success" and site.output(job_id) == "******"


@contextlib.contextmanager
def shell_agent(site, command="true", hostname="sh-host", **variables):
    process = subprocess.Popen(
        ["sh", ROOT / "examples/agent.sh", hostname, command], start_new_session=True, cwd=site.tmp_path,
        env=site.env | {"DEPLOYBOT_URL": site.gate.url, **variables}, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()


def test_the_shell_agent_does_it_with_four_calls(site):
    words = 'a "quoted" \\\\ back\\\\slash\ttab € end'
    site.apps("web", hosts=["sh-host"])
    command = f"printf '%s\\n' '{words}' \"$DEPLOY_REF\"; printf unterminated; env | grep -c TOKEN; exit 3"
    with shell_agent(site, command, TOKEN="exported by someone"):
        job_id = site.submit(host="sh-host", ref="it;touch${IFS}canary")
        job = site.ended(job_id)
        assert (job["status"], job["exit_code"], job["reason"]) == ("failed", 3, "exit_code")
        assert site.messages(job_id) == [words.replace("\t", " "), "it;touch${IFS}canary", "unterminated0"]
        assert not (site.tmp_path / "canary").exists()
        second = site.submit(host="sh-host")
        assert site.ended(second)["status"] == "failed"


def test_the_shell_agent_keeps_the_secret_that_it_enrols_for(closed_site, env):
    site, kept = closed_site, Path(env["HOME"], ".deploybot-sh-host")
    site.apps("web", hosts=["sh-host"])

    def deploys(**variables):
        with shell_agent(site, "env | grep -c dbt_", **variables):
            job_id = site.submit(host="sh-host", force=True)
            return site.ended(job_id)["exit_code"] == 1 and site.output(job_id) == "0"

    assert deploys(DEPLOYBOT_AGENT_TOKEN="dbt_enrol")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600 and kept.read_text().startswith("dbt_")
    assert deploys()
    secret = kept.read_text()
    site.controller.ok("POST", "/v1/hosts/sh-host/reset")
    assert deploys(DEPLOYBOT_AGENT_TOKEN="dbt_enrol") and kept.read_text() != secret
    with shell_agent(site, hostname="other", DEPLOYBOT_AGENT_TOKEN="dbt_wrong") as process:
        assert process.wait(15) == 1 and b"401" in process.stderr.read()


def test_the_shell_agent_takes_a_token_of_its_host(closed_site, env):
    site = closed_site
    site.apps("web", hosts=["sh-host"])
    with shell_agent(site, DEPLOYBOT_AGENT_TOKEN=create_token(site, host="sh-host")):
        assert site.ended(site.submit(host="sh-host"))["status"] == "success"
    assert not Path(env["HOME"], ".deploybot-sh-host").exists()


def test_a_whole_agent_over_tls(make_controller, authority, source, env, tmp_path):
    closed = make_controller(
        tls_cert=authority / "cert.pem", tls_key=authority / "key.pem", open=False, agent_token="dbt_enrol", token="dbt_admin"
    )
    site = Site(closed, source, env, tmp_path)
    try:
        settings = {"DEPLOYBOT_URL": f"https://localhost:{closed.port}", "DEPLOYBOT_AGENT_TOKEN": "dbt_enrol"}
        stranger = site.start(**settings)
        until(lambda: any(b"SSL_CERT_FILE" in line for line in stranger.errors))
        stranger.kill()
        stranger.wait()
        process = site.start(**settings, SSL_CERT_FILE=str(authority / "ca.pem"))
        until(lambda: any(b"registered as h at https" in line for line in process.errors))
    finally:
        site.close()


def test_a_script_goes_on_while_its_controller_is_restored_from_a_backup(site):
    """What it printed since the backup goes up again; what had ended here and not there is answered again, and not run."""
    database, copy = site.controller.folder / "deploybot.db", site.tmp_path / "backup.db"
    site.variables |= {"GO": str(site.tmp_path / "go"), "LEDGER": str(site.tmp_path / "ledger")}
    print_and_wait = 'echo $1 >>"$LEDGER"; echo "begun $1"; until [ -e "$GO.$1" ]; do sleep 0.02; done; echo "finished $1"\n'
    site.source.commit({"run": f'#!/bin/sh\nset "$DEPLOY_APP"\n{print_and_wait}'})
    site.apps("web", "api", deploy=["./run"])
    process = site.start("--slots=2")
    jobs = {app: site.submit(app=app) for app in ("web", "api")}
    for app, job_id in jobs.items():
        until(lambda: f"begun {app}" in site.output(job_id))  # noqa: B023
    subprocess.run([sys.executable, ROOT / "deploybot.py", "backup", copy, "--db", database], check=True)
    (site.tmp_path / "go.web").touch()
    assert site.ended(jobs["web"])["status"] == "success"
    site.controller.stop()
    subprocess.run([sys.executable, ROOT / "deploybot.py", "restore", copy, "--db", database], check=True)
    site.controller.restart()
    (site.tmp_path / "go.api").touch()
    assert site.ended(jobs["api"])["status"] == "success" and site.output(jobs["api"]) == "begun apifinished api"
    assert site.ended(jobs["web"])["status"] == "success" and process.poll() is None
    gap, again = site.messages(jobs["web"])[-2:]
    assert "line(s) are missing here" in gap and again == "[deploybot] this attempt ended before; its result goes up again"
    assert sorted((site.tmp_path / "ledger").read_text().split()) == ["api", "web"]
