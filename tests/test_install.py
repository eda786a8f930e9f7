"""agent.py install, uninstall, status and doctor, on a root of their own with commands that are kept and not run.

tests/proof/units.py does the same with a real systemd, useradd and the lines of docs/install.md.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import agent

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "dbt_" + "t" * 43


class Commands:
    """In place of commands: knows users, and a service that is there or not."""

    def __init__(self):
        self.users, self.enabled, self.active, self.failing, self.old_python = {"root"}, False, False, "", False
        self.uid = os.geteuid()  # of every user
        self.changes = []  # what was run that is more than a question

    def __call__(self, *command):
        name, *words = command
        answer = {
            "getent": lambda: words[1] in self.users and f"{words[1]}:x:{self.uid}:1:::",
            "git": lambda: "git version 2.39.5",
            "/usr/bin/python3": lambda: not self.old_python and "agent.py 0.0.9",
        }.get(name)
        if name == "systemctl" and words[0] in ("is-active", "is-enabled", "status"):
            good = self.enabled if words[0] == "is-enabled" else self.active
            return subprocess.CompletedProcess(command, 0 if good else 3, "active\n" if good else "inactive\n", "")
        if answer:
            said = answer()
            return subprocess.CompletedProcess(command, 0 if said else 2, said or "", "")
        self.changes.append(" ".join(command))
        if self.failing and self.failing in self.changes[-1]:
            return subprocess.CompletedProcess(command, 1, "", "no\x1b[2J such\nthing")
        if name in ("useradd", "userdel"):
            (self.users.add if name == "useradd" else self.users.discard)(words[-1])
        self.enabled = words[0] == "enable" or (self.enabled and words[0] != "disable")
        self.active = words[0] == "start" or (self.active and words[0] != "disable")
        return subprocess.CompletedProcess(command, 0, "", "")


class Machine:
    def __init__(self, folder):
        self.root, self.run = folder / "root", Commands()
        (self.root / "run/systemd/system").mkdir(parents=True)
        (self.root / "proc/self").mkdir(parents=True)
        (self.root / "proc/self/mounts").write_text("/dev/sda1 / ext4 rw 0 0\n")
        self.token = folder / "token"
        self.token.write_text(TOKEN + "\n")
        self.first = ["--controller=https://deploy.example.com", f"--token-file={self.token}", "--hostname=web-01"]

    def at(self, place):
        return self.root / place[1:]

    def does(self, verb, *argv):
        """The exit code, and the commands that changed something."""
        self.run.changes.clear()
        return agent.VERBS[verb](list(argv), agent.System(self.root, self.run)), list(self.run.changes)

    def problems(self, verb, *argv):
        with pytest.raises(agent.ConfigError) as caught:
            self.does(verb, *argv)
        return caught.value.problems

    def files(self):
        return {
            "/" + str(path.relative_to(self.root)): path.stat().st_mode & 0o7777
            for path in self.root.rglob("*")
            if path.is_file() and "proc" not in path.parts
        }

    def settings(self):
        return agent.settings_of(self.at(agent.SETTINGS).read_text())


@pytest.fixture
def machine(tmp_path):
    before = os.umask(0o022)
    yield Machine(tmp_path)
    os.umask(before)


FILES = {agent.PROGRAM: 0o644, agent.SETTINGS: 0o600, agent.UNIT_FILE: 0o644}
USERADD = "useradd --system --create-home --home-dir /var/lib/deploybot-agent --shell /usr/sbin/nologin deploybot-agent"
START = ["systemctl daemon-reload", "systemctl enable deploybot-agent", "systemctl start deploybot-agent"]


def test_the_unit_is_the_one_of_the_repository():
    assert (ROOT / "deploybot-agent.service").read_text() == agent.UNIT
    for place in (agent.PROGRAM, agent.SETTINGS, agent.STATE):
        assert f"{place}\n" in agent.UNIT


@pytest.mark.parametrize("mask", [0, 0o077])
def test_an_install_makes_user_files_and_service_whatever_the_umask(machine, capsys, mask):
    os.umask(mask)
    assert machine.does("install", *machine.first, "--label=role=web", "--label", "zone=a") == (0, [USERADD, *START])
    assert machine.files() == FILES
    assert {path.stat().st_mode & 0o777 for path in machine.at("/usr").rglob("*") if path.is_dir()} == {0o755}
    assert machine.at(agent.PROGRAM).read_bytes() == (ROOT / "agent.py").read_bytes()
    assert machine.at(agent.UNIT_FILE).read_text() == agent.UNIT
    assert machine.settings() == {
        "DEPLOYBOT_URL": "https://deploy.example.com", "DEPLOYBOT_AGENT_TOKEN": TOKEN, "DEPLOYBOT_HOSTNAME": "web-01",
        "DEPLOYBOT_LABELS": "role=web,zone=a",
    }  # fmt: skip
    said = capsys.readouterr().out
    assert TOKEN not in said
    steps = [f"run {USERADD}", *(f"write {place} ({mode:o})" for place, mode in FILES.items()), *(f"run {one}" for one in START)]
    assert said.splitlines()[:-1] == steps and "doctor" in said.splitlines()[-1]


def test_the_second_time_nothing_is_done(machine, capsys):
    machine.does("install", *machine.first)
    before = {place: machine.at(place).stat().st_ino for place in FILES}
    capsys.readouterr()
    for argv in (machine.first, []):
        assert machine.does("install", *argv) == (0, [])
        assert capsys.readouterr().out.splitlines()[:-1] == [f"{place} is as it should be" for place in FILES]
    assert {place: machine.at(place).stat().st_ino for place in FILES} == before


def test_a_dry_run_says_all_and_does_nothing(machine, capsys):
    assert machine.does("install", *machine.first, "--dry-run", "--run-as=deploy") == (0, []) and machine.files() == {}
    said = capsys.readouterr().out
    for what in ("would run useradd", *(f"would write {place}" for place in [*FILES, agent.DROP_IN]), "would run systemctl start"):
        assert what in said
    assert TOKEN not in said
    machine.does("install", *machine.first)
    files = machine.files()
    machine.at(agent.STATE).mkdir(parents=True)
    capsys.readouterr()
    assert machine.does("uninstall", "--purge", "--dry-run") == (0, []) and machine.files() == files
    assert "would remove /var/lib/deploybot-agent\n" in capsys.readouterr().out and machine.at(agent.STATE).exists()


def test_an_update_restarts_what_runs_once_its_job_has_ended_and_leaves_settings_alone(machine):
    machine.does("install", *machine.first)
    settings = machine.at(agent.SETTINGS)
    settings.write_text("# mine\nDEPLOYBOT_SLOTS=2\n" + settings.read_text() + "SSL_CERT_FILE=\n")
    before = settings.read_bytes()
    machine.at(agent.PROGRAM).write_text("old")
    assert machine.does("install") == (0, ["systemctl daemon-reload", "systemctl restart --no-block deploybot-agent"])
    assert machine.at(agent.PROGRAM).read_bytes() == (ROOT / "agent.py").read_bytes() and settings.read_bytes() == before
    machine.token.write_text("dbt_other")
    assert machine.does("install", f"--token-file={machine.token}")[1]
    assert settings.read_text().startswith("# mine\nDEPLOYBOT_SLOTS=2\nDEPLOYBOT_URL=")
    assert machine.settings()["DEPLOYBOT_AGENT_TOKEN"] == "dbt_other" and settings.read_text().count("AGENT_TOKEN") == 1
    assert machine.settings()["DEPLOYBOT_HOSTNAME"] == "web-01"
    machine.run.active = False
    assert machine.does("install") == (0, ["systemctl start deploybot-agent"])


def test_an_update_needs_no_token_where_the_settings_have_none_any_more(machine):
    machine.does("install", *machine.first)
    machine.at(agent.SETTINGS).write_text("DEPLOYBOT_URL=http://h\n")
    assert machine.does("install")[0] == 0 and "DEPLOYBOT_AGENT_TOKEN" not in machine.settings()


@pytest.mark.parametrize("token", ["a'b", 'a"b', "a\\b", "$(id)`id`$HOME", "#a;b", "a='b\"\\"])
def test_a_token_arrives_as_it_is(machine, token):
    machine.token.write_text(token + "\n")
    machine.does("install", *machine.first)
    assert machine.settings()["DEPLOYBOT_AGENT_TOKEN"] == token
    assert machine.does("install", *machine.first)[1] == []


def test_settings_that_cannot_be_changed_line_by_line_are_left_to_a_person(machine):
    machine.does("install", *machine.first)
    text = machine.at(agent.SETTINGS).read_text() + "OTHER='a\nDEPLOYBOT_URL=b\nc'\n"
    machine.at(agent.SETTINGS).write_text(text)
    assert machine.problems("install", "--controller=http://h") == [f"{agent.SETTINGS}: set DEPLOYBOT_URL there by hand"]
    assert machine.at(agent.SETTINGS).read_text() == text
    machine.at(agent.SETTINGS).write_text("hunter2\n")
    assert machine.problems("install") == [f"{agent.SETTINGS}: line 1 is no NAME=VALUE"]


NEEDED = "the first install needs --controller URL, and --token-file with what to register with"


@pytest.mark.parametrize(
    "argv, problem",
    [
        ([], NEEDED),
        (["--controller=http://h"], NEEDED),
        (["--controller=http://h", "--token-file=/dev/null"], NEEDED),
        (["--controller=ftp://h"], "--url: must be http"),
        (["--controller=http://h/a"], "--url takes no path: http://h"),
        (["--token-file=/does/not/exist"], "No such file"),
        (["--hostname=a b"], "--hostname: 'a b' is no host name"),
        (["--label=role"], "--label: 'role' is no KEY=VALUE"),
        *((["--run-as", name], "--run-as: must be") for name in ("root", "a b", "a\nUser=root", "A", "a" * 32)),
        (["--run-as=-x"], "--run-as: must be"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_done(machine, argv, problem):
    found = machine.problems("install", *argv)
    assert any(problem in line for line in found), found
    assert machine.run.changes == [] and machine.files() == {}


def test_only_root_installs_and_only_where_systemd_runs(machine, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for verb in ("install", "uninstall"):
        with pytest.raises(agent.ConfigError, match=r"^only root may do that: sudo"):
            agent.VERBS[verb]([], agent.System(run=machine.run))
    monkeypatch.undo()
    machine.run.old_python = True
    assert "older than 3.11" in machine.problems("install", *machine.first)[0]
    (machine.root / "run/systemd/system").rmdir()
    assert "systemd does not run here: start agent.py by hand" in machine.problems("install", *machine.first)[0]
    assert "systemd does not run here: there is no service to take away" in machine.problems("uninstall")[0]
    assert machine.run.changes == [] and machine.files() == {}


def test_scripts_as_another_user_are_a_drop_in_that_an_update_leaves(machine):
    changes = machine.does("install", *machine.first, "--run-as=deploy")[1]
    assert changes == ["useradd --system --create-home --shell /usr/sbin/nologin deploy", *START]
    assert machine.files() == {**FILES, agent.DROP_IN: 0o644}
    lines = machine.at(agent.DROP_IN).read_text().splitlines()
    assert lines[:4] == ["[Service]", "User=root", "Group=root", "Environment=DEPLOYBOT_RUN_AS=deploy"]
    machine.run.changes.clear()
    assert machine.does("install") == (0, []) and machine.run.users == {"root", "deploy"}


@pytest.mark.parametrize("place", [agent.SETTINGS, agent.SETTINGS + ".new", agent.PROGRAM, agent.UNIT_FILE + ".new"])
def test_no_link_is_written_through(machine, tmp_path, place):
    (tmp_path / "precious").write_text("DEPLOYBOT_SLOTS=1\n")
    machine.at(place).parent.mkdir(parents=True)
    machine.at(place).symlink_to(tmp_path / "precious")
    assert machine.does("install", *machine.first)[0] == 0
    assert (tmp_path / "precious").read_text() == "DEPLOYBOT_SLOTS=1\n" and machine.files() == FILES
    assert not any(machine.at(one).is_symlink() for one in FILES)


def test_a_file_that_others_can_read_or_change_is_made_anew(machine):
    machine.does("install", *machine.first)
    machine.at(agent.SETTINGS).chmod(0o644)
    machine.at(agent.PROGRAM).chmod(0o666)
    assert machine.does("install")[1] and machine.files() == FILES


def test_a_command_that_fails_ends_it_with_its_words(machine, capsys, monkeypatch):
    machine.run.failing = "useradd"
    assert machine.problems("install", *machine.first) == [f"{USERADD}: no [2J such thing"]
    assert machine.files() == {}
    monkeypatch.setattr(agent, "System", lambda: agent_system(machine))
    assert agent.main(["install", *machine.first]) == agent.EXIT_USAGE
    assert capsys.readouterr().err == f"agent.py: {USERADD}: no [2J such thing\n"


def agent_system(machine, made=agent.System):
    return made(machine.root, machine.run)


def test_an_uninstall_keeps_the_state_and_a_purge_does_not(machine, tmp_path):
    machine.does("install", *machine.first, "--run-as=deploy")
    machine.run.users.add("deploybot-agent")
    other = machine.at("/etc/deploybot/apps.yaml")
    other.write_text("apps: []\n")
    release = machine.at(agent.STATE) / "web/releases/1"
    release.mkdir(parents=True)
    (tmp_path / "precious").mkdir()
    (release / "link").symlink_to(tmp_path / "precious")
    assert machine.does("uninstall") == (0, ["systemctl disable --now deploybot-agent", "systemctl daemon-reload"])
    assert set(machine.files()) == {"/etc/deploybot/apps.yaml"} and release.exists() and "deploybot-agent" in machine.run.users
    assert machine.does("uninstall") == (0, [])
    assert machine.does("uninstall", "--purge") == (0, ["userdel deploybot-agent"])
    assert not machine.at(agent.STATE).exists() and (tmp_path / "precious").exists() and other.exists()
    assert machine.does("uninstall", "--purge") == (0, [])


def test_a_purge_empties_no_mount(machine):
    machine.does("install", *machine.first)
    machine.at("/proc/self/mounts").write_text(f"x / ext4 rw 0 0\nx {agent.STATE}/web/shared/uploads ext4 rw 0 0\n")
    assert "/web/shared/uploads, which is mounted" in machine.problems("uninstall", "--purge")[0]
    assert machine.run.changes == [] and machine.files() == FILES
    assert machine.does("uninstall")[0] == 0


def test_status_is_that_of_the_service(machine, capsys):
    assert machine.does("status") == (1, []) and "inactive" in capsys.readouterr().out
    machine.does("install", *machine.first)
    capsys.readouterr()
    assert machine.does("status") == (0, [])
    assert capsys.readouterr().out == f"{agent.PROGRAM}: agent.py 0.0.9\nactive\n"


def test_nothing_that_lies_beside_it_is_run(tmp_path):
    """Root runs it in a folder where others may write, such as /tmp."""
    shutil.copy(ROOT / "agent.py", tmp_path)
    for name in ("argparse", "codecs", "http", "yaml"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    for options in ([], ["-P"]):
        done = subprocess.run(
            [sys.executable, *options, "agent.py", "--version"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, f"agent.py {agent.VERSION}\n"), done.stderr
    assert not (tmp_path / "canary").exists()


# Doctor


class Patient(Machine):
    """An installed agent that its controller knows."""

    def __init__(self, folder, controller):
        super().__init__(folder)
        self.controller, self.work = controller, folder / "work"
        self.does("install", f"--controller={controller.url}", f"--token-file={self.token}", "--hostname=web-01")
        self.secret = self.work / ".agent/secret"
        (self.work / ".agent").mkdir(parents=True, mode=0o700)
        self.work.chmod(0o755)
        agent.write_whole(self.secret, "dbt_own\n")
        self.registers("dbt_own")
        self.set(DEPLOYBOT_WORKDIR=str(self.work))

    def registers(self, secret):
        digest = hashlib.sha256(secret.encode()).hexdigest()
        self.controller.acting(TOKEN).ok("POST", "/v1/agents/register", {"hostname": "web-01", "token_sha256": digest})

    def set(self, **values):
        path = self.at(agent.SETTINGS)
        path.write_text(agent.with_settings(path.read_text(), values))

    def is_for(self, host):
        """Its token, before it has registered."""
        token = self.controller.acting("dbt_admin").ok("POST", "/v1/tokens", {"role": "agent", "host": host})["secret"]
        self.secret.write_text("dbt_unknown\n")
        self.set(DEPLOYBOT_AGENT_TOKEN=token)

    def is_put_off(self):
        self.secret.write_text("dbt_unknown\n")
        self.set(DEPLOYBOT_AGENT_TOKEN="dbt_revoked")
        for _ in range(10):
            self.controller.acting("dbt_none").call("GET", "/v1/session")

    def says(self, capsys, *argv):
        capsys.readouterr()
        code = self.does("doctor", *argv)[0]
        said = capsys.readouterr().out
        assert "dbt_" not in said and {line[:5] for line in said.splitlines()} <= {"ok   ", "warn ", "FAIL "}
        assert code == int("\nFAIL" in said)
        return said


@pytest.fixture
def patient(machine, make_controller, tmp_path):
    (tmp_path / "patient").mkdir()
    return Patient(tmp_path / "patient", make_controller(open=False, token="dbt_admin", agent_token=TOKEN, read_token="dbt_read"))


def test_status_without_systemd_says_how_the_agent_is_looked_at(machine, capsys):
    machine.at("/run/systemd/system").rmdir()
    machine.run = lambda *command: subprocess.CompletedProcess(command, 1, "", "raw" if command[0] == "systemctl" else "")
    assert agent.VERBS["status"]([], agent.System(machine.root, machine.run)) == agent.EXIT_FAILED
    said = capsys.readouterr().out
    assert "no systemd here" in said and "agent.py doctor" in said and "raw" not in said


@pytest.mark.parametrize(
    ("word", "asked"),
    [("stats", "did you mean status?"), ("instal", "did you mean install or uninstall?"),
     ("x", "there are install, uninstall, status, doctor")],
)  # fmt: skip
def test_a_mistyped_verb_is_answered_in_one_line(capsys, word, asked):
    assert agent.main([word, "--dry-run"]) == agent.EXIT_USAGE
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"agent.py: no verb {word}: {asked} (see agent.py --help)\n")


def test_doctor_finds_nothing_where_all_is_well(patient, capsys):
    said = patient.says(capsys)
    assert "\nwarn" not in said and "FAIL" not in said
    for line in ("git version 2.39.5", "MiB are free in", "scripts run as deploybot-agent", "the service is active"):
        assert line in said
    assert "signs in with its own secret" in said and re.search("the clock is [01] s ahead", said)


@pytest.mark.parametrize(
    "spoil, line",
    [
        (lambda p, m: m.setattr(agent, "GIT_NEEDED", (99, 1)), "FAIL git version 2.39.5: the agent needs git 99.1 or newer"),
        (lambda p, m: m.setattr(agent, "FREE_NEEDED", 1 << 62), "make room"),
        (lambda p, m: m.setattr(agent, "CLOCK_LIMIT", -1), "timedatectl set-ntp true"),
        (lambda p, m: p.at(agent.SETTINGS).chmod(0o640), "has the mode 640: it holds a token, chmod 600 /etc/deploybot/agent.env"),
        (lambda p, m: p.run.users.clear(), "scripts run as deploybot-agent: there is no such user"),
        (lambda p, m: setattr(p.run, "active", False), "the service is inactive: journalctl -u deploybot-agent says why"),
        (lambda p, m: p.work.chmod(0o777), "work has the mode 777: chmod 755 "),
        (lambda p, m: (p.work / ".agent").chmod(0o755), ".agent has the mode 755: chmod 700 "),
        (lambda p, m: p.secret.chmod(0o644), "secret has the mode 644: chmod 600 "),
        (lambda p, m: p.set(DEPLOYBOT_URL="http://127.0.0.1:1"), "FAIL http://127.0.0.1:1 is not reached: Connection refused: does the controller run, is that its address and port"),
        (lambda p, m: p.set(DEPLOYBOT_URL=p.controller.url.replace("http", "https")), "it speaks http there: try http://"),
        (lambda p, m: p.set(DEPLOYBOT_URL="ftp://h"), "FAIL --url: must be http"),
        (lambda p, m: p.set(DEPLOYBOT_HOSTNAME="web-02"), "its own secret: which is for the role agent and the host web-01"),
        (lambda p, m: p.secret.unlink() or p.set(DEPLOYBOT_AGENT_TOKEN="dbt_read"), "which is for the role viewer and the host web-01"),
        (lambda p, m: p.is_for("web-05"), "which is for the role agent and the host web-05: `ctl.py token create --role agent --host"),
        (lambda p, m: p.is_put_off(), "was not judged: wait 60 s and run doctor again"),
        (lambda p, m: p.is_put_off() or p.is_for("web-05"), "which is for the role agent and the host web-05: `ctl.py token"),
        (lambda p, m: p.registers_anew(), "FAIL neither a secret nor a token of this host is known there: `ctl.py token create"),
    ],
)  # fmt: skip
def test_doctor_names_what_is_wrong_and_what_to_do(patient, capsys, monkeypatch, spoil, line):
    patient.registers_anew = lambda: (
        patient.controller.ok("POST", "/v1/hosts/web-01/reset"),
        patient.registers("dbt_another"),
        patient.set(DEPLOYBOT_AGENT_TOKEN="dbt_revoked"),
    )
    spoil(patient, monkeypatch)
    said = patient.says(capsys)
    assert line in said and "\nFAIL" in said
    assert said.count("\nFAIL") == 1, said


def test_doctor_names_what_belongs_to_another_than_the_agent(patient, capsys):
    patient.run.uid = 4711
    said = patient.says(capsys)
    assert said.count(f"belongs to user {os.geteuid()}: the agent is 4711: chown 4711 ") == said.count("\nFAIL") == 3


def test_doctor_warns_of_what_works_all_the_same(patient, capsys, monkeypatch):
    monkeypatch.setattr(agent, "VERSION", "0.0.9")
    patient.at(agent.UNIT_FILE).write_text("[Unit]\n")
    said = patient.says(capsys)
    assert "FAIL" not in said and said.count("\nwarn") == 2
    assert f"curl -fsS {patient.controller.url}/agent.py -o agent.py && sudo python3 agent.py install\n" in said
    shutil.rmtree(patient.work)
    said = patient.says(capsys)
    assert "is not there: the agent makes it" in said and "web-01 signs in with DEPLOYBOT_AGENT_TOKEN" in said


def test_doctor_reads_nothing_that_a_script_has_put_in_the_place_of_the_secret(patient, tmp_path, monkeypatch):
    (tmp_path / "shadow").write_text("root:x\n")
    patient.secret.unlink()
    patient.secret.symlink_to(tmp_path / "shadow")
    assert agent.known_secret(patient.work) is None
    patient.secret.unlink()
    os.mkfifo(patient.secret)
    assert not agent.known_secret(patient.work)  # and does not wait for a writer
    patient.secret.unlink()
    agent.write_whole(patient.secret, "dbt_own\n")
    real = os.fstat
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", lambda fd: SimpleNamespace(st_uid=-1, st_mode=real(fd).st_mode, st_blksize=0))
        assert agent.known_secret(patient.work) is None  # a hard link, or a folder that is a link, to another's file
    assert agent.known_secret(patient.work) == "dbt_own"


def test_doctor_without_a_service_looks_with_what_it_is_given(machine, controller, capsys, tmp_path):
    code, _ = machine.does("doctor", "--url", controller.url, "--hostname=h", f"--workdir={tmp_path / 'none'}")
    said = capsys.readouterr().out
    assert code == 0 and "no service deploybot-agent" in said and "h signs in with no token" in said  # an open controller
    machine.does("install", *machine.first)
    machine.at(agent.SETTINGS).chmod(0)
    if os.geteuid():  # root reads it all the same
        assert machine.problems("doctor") == [f"only root can read {agent.SETTINGS}: sudo python3 agent.py ..."]
