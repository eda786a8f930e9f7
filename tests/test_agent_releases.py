"""agent.py on one host: what is shared, how many releases stay, rollback, the health check, the way back, and what a crash leaves."""

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time

import pytest
from hosts import GRACE, ROOT, STUBBORN, as_root, lives, until

import agent

pytest_plugins = ("hosts",)


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
