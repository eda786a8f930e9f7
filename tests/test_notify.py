"""What systemd is told (sd_notify(3)), over a real datagram socket, and what it brings: credentials."""

from __future__ import annotations

import itertools
import math
import os
import signal
import socket
import time

import pytest
from test_main import deploybot_py, environment
from test_main import run as run
from test_migrations import make as make_old

import deploybot
from deploybot import Config, StartError, Unavailable


class Systemd:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, address):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1))
        self.socket.settimeout(20)

    def hears(self):
        """The next message: its lines as a dict."""
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().split("\n"))

    def waits_for(self, name):
        """The next message that has it, and what came before."""
        before = []
        while name not in (message := self.hears()):
            before.append(message)
        return message, before

    def heard(self):
        """All that has come up to now."""
        found = []
        self.socket.setblocking(False)
        try:
            while True:
                found.append(self.hears())
        except BlockingIOError:
            self.socket.settimeout(20)
            return found


@pytest.fixture(params=["path", "abstract"])
def systemd(request, tmp_path, monkeypatch):
    address = str(tmp_path / "notify") if request.param == "path" else f"@deploybot-test-{os.getpid()}-{time.monotonic_ns()}"
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    made = Systemd(address)
    yield made
    made.socket.close()


# -- a real process ----------------------------------------------------------------------------------------------------


def test_a_life_under_systemd(run, systemd, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "2400000")
    c = run()
    assert systemd.hears() == {"READY": "1"}, "the first thing"
    assert c.ok("GET", "/health")["status"] == "ok", "ready means that it answers"

    times = []
    while len(times) < 3:
        assert systemd.hears() == {"WATCHDOG": "1"}
        times.append(time.monotonic())
    assert max(b - a for a, b in itertools.pairwise(times)) < 1.2, "in less than half of what it has"

    earliest = time.monotonic_ns() // 1000
    c.process.send_signal(signal.SIGHUP)
    reloading, _ = systemd.waits_for("RELOADING")
    assert reloading["RELOADING"] == "1"
    assert earliest <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    assert systemd.hears() == {"READY": "1"}, "and the reload is over"
    assert "is in force" in c.said()

    assert c.stop() == 0
    assert systemd.waits_for("STOPPING")[0] == {"STOPPING": "1"}
    assert systemd.heard() == []


def test_a_migration_asks_for_time_before_it_begins(run, systemd, tmp_path):
    db = tmp_path / "process" / "data" / "deploybot.db"
    db.parent.mkdir(parents=True)
    make_old(db, 1)
    c = run()
    message = systemd.hears()
    assert message.keys() == {"EXTEND_TIMEOUT_USEC"} and int(message["EXTEND_TIMEOUT_USEC"]) == 3600 * 10**6
    assert systemd.hears() == {"READY": "1"}
    assert c.stop() == 0
    c.start()
    assert "EXTEND_TIMEOUT_USEC" not in systemd.waits_for("READY")[1], "once"


def test_it_asks_before_the_backup(tmp_path, monkeypatch):
    make_old(tmp_path / "deploybot.db", 1)
    did = []
    monkeypatch.setattr(deploybot, "copy_database", lambda *paths: did.append("backup"))
    deploybot.Store(tmp_path / "deploybot.db", lambda: did.append("asks")).close()
    assert did == ["asks", "backup"]


def test_a_start_that_fails_was_never_ready(systemd, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "deploybot.db").write_bytes(b"no database" * 1000)
    assert deploybot_py(tmp_path, "--port", "0")[0] == 1
    assert systemd.heard() == []


def test_without_systemd_nothing_is_told(run, systemd, monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET")
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    c = run()
    c.process.send_signal(signal.SIGHUP)
    c.says("is in force")
    assert c.stop() == 0 and systemd.heard() == [] and "Traceback" not in c.said()


def test_a_systemd_that_does_not_listen_is_no_error(run, tmp_path, monkeypatch):
    for address in (str(tmp_path / "nobody"), "@nobody-at-all", "vsock:2:1234", "x" * 500):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        deploybot.notify("READY=1")
    c = run()
    assert c.ok("GET", "/health") and c.stop() == 0 and "Traceback" not in c.said()


# -- the watchdog ------------------------------------------------------------------------------------------------------


class Sweeping:
    """A daemon of which only the sweeps count: each answers as it is told, after the last it is stopped."""

    def __init__(self, *answers):
        self.answers = iter(answers)
        self.signals, self.writer = os.pipe()
        self.times = []

    def sweep(self):
        self.times.append(time.monotonic())
        answer = next(self.answers, None)
        if answer is None:
            os.write(self.writer, bytes([signal.SIGTERM]))
            return False
        return answer

    def run(self):
        deploybot.run(self, self.signals)
        for end in (self.signals, self.writer):
            os.close(end)


@pytest.fixture
def pauses(monkeypatch):
    """How long run() would have waited for a signal before each sweep; it does not wait."""
    asked, select = [], deploybot.select.select

    def at_once(readers, writers, errors, timeout):
        asked.append(timeout)
        return select(readers, writers, errors, 0)

    monkeypatch.setattr(deploybot.select, "select", at_once)
    return asked


def test_a_sweep_that_went_through_is_the_sign_of_life(systemd, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "60000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    Sweeping(True, False, False, True, False).run()
    assert systemd.heard() == [{"WATCHDOG": "1"}] * 2


@pytest.mark.parametrize("usec, pid", [(None, None), ("", None), ("0", None), ("x", None), ("-5", None), ("1000", "1")])
def test_who_is_not_watched_gives_no_sign(systemd, monkeypatch, pauses, usec, pid):
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert deploybot.watchdog(os.environ) == math.inf
    Sweeping(True).run()
    assert systemd.heard() == [] and set(pauses) == {1.0}


@pytest.mark.parametrize("usec", [300_000, 1_500_000, 30_000_000])
def test_sweeps_come_more_than_twice_in_that_time_and_at_least_once_a_second(monkeypatch, pauses, usec):
    monkeypatch.setenv("WATCHDOG_USEC", str(usec))
    Sweeping(True, True).run()
    assert pauses and all(0 < pause <= 1 and pause < usec / 2e6 for pause in pauses)


def test_a_database_that_cannot_be_written_is_no_reason_to_be_restarted(make_controller, monkeypatch, caplog):
    daemon = make_controller().daemon
    assert daemon.sweep() is True
    for error, answer in ((Unavailable("the disk is full"), True), (RuntimeError("a fault of ours"), False)):

        def fail(error=error):
            raise error

        monkeypatch.setattr(daemon.jobs, "sweep", fail)
        assert daemon.sweep() is answer


# -- credentials -------------------------------------------------------------------------------------------------------


@pytest.fixture
def credentials(tmp_path):
    def put(**files):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        return {"CREDENTIALS_DIRECTORY": str(tmp_path)}

    return put


def test_each_secret_may_be_a_credential(credentials):
    env = credentials(**{f"deploybot_{name}": f"secret-{name}\n" for name in deploybot.SECRETS})
    config = Config.load({}, env)
    for name in deploybot.SECRETS:
        assert getattr(config, name) == f"secret-{name}"


def test_a_variable_and_a_file_stand_before_a_credential(credentials, tmp_path):
    env = credentials(deploybot_token="credential", deploybot_read_token="credential", file="from-the-file")
    config = Config.load({}, {**env, "DEPLOYBOT_TOKEN": "variable", "DEPLOYBOT_READ_TOKEN_FILE": str(tmp_path / "file")})
    assert (config.token, config.read_token, config.agent_token) == ("variable", "from-the-file", None)


def test_a_credential_that_is_empty_is_refused_and_one_that_is_not_there_is_none(credentials, tmp_path):
    with pytest.raises(StartError, match=r"DEPLOYBOT_TOKEN: .*deploybot_token is an empty file"):
        Config.load({}, credentials(deploybot_token="\n"))
    for folder in ("", str(tmp_path / "none"), str(tmp_path / "deploybot_token")):
        assert Config.load({}, {"CREDENTIALS_DIRECTORY": folder}).token is None


def test_the_tls_pair_may_be_credentials(credentials, tmp_path):
    env = credentials(deploybot_tls_cert="c", deploybot_tls_key="k")
    config = Config.load({}, env)
    assert (config.tls_cert, config.tls_key) == (tmp_path / "deploybot_tls_cert", tmp_path / "deploybot_tls_key")
    config = Config.load({"tls_cert": "/a"}, {**env, "DEPLOYBOT_TLS_KEY": "/b"})
    assert (str(config.tls_cert), str(config.tls_key)) == ("/a", "/b")
    with pytest.raises(StartError, match="belong together"):
        Config.load({"tls_cert": ""}, env)


def test_no_credential_reaches_the_settings_that_are_none(credentials):
    assert Config.load({}, credentials(deploybot_db="/elsewhere", deploybot_open="true")) == Config.load({}, {})


def test_the_process_takes_them(run, credentials, monkeypatch):
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", credentials(deploybot_token="dbt_from_systemd")["CREDENTIALS_DIRECTORY"])
    assert "DEPLOYBOT_TOKEN" not in environment()
    c = run(open=False)
    assert c.call("GET", "/v1/jobs")[0] == 401
    assert c.call("GET", "/v1/jobs", headers={"Authorization": "Bearer dbt_from_systemd"})[0] == 200
    assert "dbt_from_systemd" not in c.said() and not (c.db.parent / "admin.token").exists()
