"""The controller's unit and image: what they must say, and that the program works inside of what they allow.

systemd-analyze and hadolint are asked by `make check`; tests/proof/units.py boots a real systemd with the unit.
"""

import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import wait_for

import deploybot
import notify

ROOT = Path(__file__).resolve().parent.parent
START_LIMIT_S = 30
STOP_LIMIT_S = 5  # what the program promises
AGENTS = 10_000
MAPS = 65_530  # vm.max_map_count where nobody changed it
MAPS_A_THREAD = 3  # measured: guard page, stack, and what glibc keeps of its own


def settings(path):
    """{key: [values]} of all sections of a unit; an empty value stands for an emptied list."""
    found = {}
    for line in path.read_text().splitlines():
        if line and line[0] not in "#;[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


UNIT = settings(ROOT / "deploybot.service")


def one(key):
    (value,) = UNIT[key]
    return value


def seconds(text):
    number, unit = re.fullmatch(r"(\d+)(min|s)?", text).groups()
    return int(number) * {"min": 60}.get(unit, 1)


def assignments(values):
    return dict(value.split("=", 1) for value in values)


# ------------------------------------------------------------------------------------------------------------------------
# What the unit says


@pytest.mark.parametrize(
    "key, value",
    [
        ("Type", "notify"),
        ("NotifyAccess", "main"),
        ("Restart", "on-failure"),
        ("StartLimitIntervalSec", "0"),
        ("DynamicUser", "yes"),
        ("StateDirectory", "deploybot"),
        ("StateDirectoryMode", "0700"),
        ("UMask", "0077"),
        ("LimitCORE", "0"),
        ("LoadCredential", "deploybot:/etc/deploybot/credentials"),
        ("ExecReload", "/bin/kill -HUP $MAINPID"),
        ("CapabilityBoundingSet", ""),
        ("NoNewPrivileges", "yes"),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "yes"),
        ("PrivateUsers", "yes"),
        ("MemoryDenyWriteExecute", "yes"),
        ("RestrictAddressFamilies", "AF_INET AF_INET6 AF_UNIX"),
        ("SystemCallErrorNumber", "EPERM"),
    ],
)
def test_the_unit_says(key, value):
    assert UNIT.get(key) == [value]


def test_no_secret_stands_in_the_unit():
    assert set(assignments(UNIT["Environment"])) == {"DEPLOYBOT_DB", "DEPLOYBOT_APPS", "MALLOC_ARENA_MAX"}
    assert UNIT["EnvironmentFile"] == ["-/etc/deploybot/deploybot.env"]


def test_the_state_folder_is_where_the_database_is():
    at = assignments(UNIT["Environment"])
    assert at["DEPLOYBOT_DB"].startswith(f"/var/lib/{one('StateDirectory')}/")
    assert at["DEPLOYBOT_APPS"].startswith("/etc/deploybot/")


def test_the_limits_let_ten_thousand_agents_park():
    for limit in ("LimitNOFILE", "LimitNPROC", "TasksMax"):
        assert int(one(limit)) >= AGENTS * 11 // 10, limit
    assert int(one("TasksMax")) * MAPS_A_THREAD < MAPS


def test_systemd_waits_longer_than_the_program_takes():
    assert seconds(one("TimeoutStopSec")) > STOP_LIMIT_S
    assert 10 <= seconds(one("WatchdogSec")) <= 120
    assert seconds(one("TimeoutStartSec")) >= 600


# ------------------------------------------------------------------------------------------------------------------------
# The unit of notify.py

NOTIFY = settings(ROOT / "deploybot-notify.service")
OWN = {"SystemCallFilter", "LimitNPROC", "TasksMax", "LimitNOFILE", "WatchdogSec", "NotifyAccess", "TimeoutStartSec"}


def test_notifications_have_no_more_rights_than_the_controller():
    rights = {
        key
        for key in UNIT
        if re.match("Protect|Private|Restrict|Capab|Ambient|NoNew|SystemCall|Lock|Memory|UMask|Dynamic|Limit", key)
    }
    assert {key: NOTIFY.get(key) for key in rights - OWN} == {key: UNIT[key] for key in rights - OWN}
    assert set(NOTIFY["SystemCallFilter"]) < set(UNIT["SystemCallFilter"])


@pytest.mark.parametrize(
    "key, value",
    [
        ("Type", "exec"),
        ("Restart", "on-failure"),
        ("RestartPreventExitStatus", "2"),
        ("ExecStart", "/usr/bin/python3 /usr/local/lib/deploybot/notify.py"),
        ("ExecReload", "/bin/kill -HUP $MAINPID"),
        ("StateDirectory", "deploybot-notify"),
        ("StateDirectoryMode", "0700"),
        ("LoadCredential", "deploybot:/etc/deploybot/notify"),
        ("Environment", "DEPLOYBOT_APPS=/etc/deploybot/apps.yaml"),
    ],
)
def test_the_unit_of_notifications_says(key, value):
    assert NOTIFY.get(key) == [value]


def test_notifications_are_given_the_time_that_they_take_to_stop():
    assert seconds(NOTIFY["TimeoutStopSec"][0]) > notify.STOP_LIMIT_S


def test_what_the_unit_of_notifications_starts_finds_its_credentials_and_its_folder(make_controller, tmp_path):
    controller = make_controller(open=False, token="dbt_admin", read_token="dbt_read")
    (tmp_path / "state").mkdir()
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials/deploybot_token").write_text("dbt_read\n")
    environment = {"PATH": os.environ["PATH"], "STATE_DIRECTORY": str(tmp_path / "state")}
    environment |= assignments(NOTIFY["Environment"]) | {
        "DEPLOYBOT_APPS": str(controller.apps_file),
        "DEPLOYBOT_URL": controller.url,
    }
    environment |= {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")}
    command = [sys.executable, "-B", ROOT / "notify.py", "--once"]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False, timeout=START_LIMIT_S)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"[0-9a-f]{8}-\d+", (tmp_path / "state/cursor").read_text())


# ------------------------------------------------------------------------------------------------------------------------
# The program under the unit


class Service:
    """The program as ExecStart and the settings of the unit start it, and the socket that it notifies."""

    def __init__(self, folder, **more):
        self.folder = folder
        for name in ("credentials", "state", "cwd"):
            (folder / name).mkdir()
        (folder / "apps.yaml").write_text("apps: []\n")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(folder / "notify"))
        self.heard = ""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DEPLOYBOT_")}
        environment |= assignments(UNIT["Environment"])
        environment |= {
            "DEPLOYBOT_DB": str(folder / "state/deploybot.db"),
            "DEPLOYBOT_APPS": str(folder / "apps.yaml"),
            "DEPLOYBOT_HOST": "127.0.0.1",
            "DEPLOYBOT_PORT": "0",
            "NOTIFY_SOCKET": str(folder / "notify"),
            "PYTHONPATH": str(ROOT),  # in place of the working directory, which is one that nobody may write to
            "CREDENTIALS_DIRECTORY": str(folder / "credentials"),
            **more,
        }
        self.environment = environment
        self.process = None

    def start(self):
        assert shlex.split(one("ExecStart")) == ["/usr/bin/python3", "-m", "deploybot"]
        assert one("WorkingDirectory") == "/usr/local/lib/deploybot"
        (self.folder / "cwd").chmod(0o500)
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                [*self.nobody_writes(), sys.executable, "-B", "-m", "deploybot"],
                cwd=self.folder / "cwd",
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self

    def nobody_writes(self):
        """Where this machine lets us: all is read-only but the state folder, as ProtectSystem=strict has it."""
        mounts = (
            "mount --bind / /mnt && mount -o remount,bind,ro /mnt && mount -t proc proc /mnt/proc && mount --rbind /dev /mnt/dev && "
            "{ mount -o remount,bind,ro /mnt/dev/shm; :; } 2>/dev/null && "  # the folders of a test may be there
            'mount --bind "$1" "/mnt$1" && shift && exec chroot /mnt sh -c "$@"'
        )
        inside = ['cd "$1" && shift && exec "$@"', "sh", str(self.folder / "cwd")]
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mounts, "sh", str(self.folder / "state")]
        return [*command, *inside] if os.geteuid() == 0 and mounts_allowed() else []

    def log(self):
        return (self.folder / "log").read_text()

    def hears(self, text, limit=START_LIMIT_S):
        """All that was notified until `text` came."""
        self.socket.settimeout(limit)
        before = len(self.heard)
        while text not in self.heard[before:]:
            try:
                self.heard += self.socket.recv(4096).decode() + "\n"
            except TimeoutError:
                pytest.fail(f"no {text} within {limit} s; heard {self.heard!r}; log: {self.log()}")
        return self.heard

    def call(self, path, token=None):
        port = int(re.search(r"listens on 127\.0\.0\.1 port (\d+)", self.log())[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def end(self):
        if self.process:
            self.process.kill()
            self.process.wait()
        (self.folder / "cwd").chmod(0o700)
        self.socket.close()


def mounts_allowed():
    probe = ["unshare", "--mount", "--propagation", "private", "mount", "--bind", "/", "/mnt"]
    return shutil.which("unshare") and subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.fixture
def service(tmp_path):
    made = []

    def make(**more):
        made.append(Service(tmp_path, **more))
        return made[-1]

    yield make
    for started in made:
        started.end()


def test_what_the_unit_starts_becomes_ready_with_its_credentials_and_writes_only_its_state(service):
    controller = service()
    for name in ("token", "agent_token", "read_token", "webhook_secret"):
        (controller.folder / "credentials" / f"deploybot_{name}").write_text(f"dbt_{name}\n")
    controller.start().hears("READY=1")
    assert controller.call("/health")[0] == 200
    assert controller.call("/v1/hosts", "dbt_token")[0] == 200
    assert controller.call("/v1/hosts", "dbt_read_token")[0] == 200
    assert controller.call("/v1/audit", "dbt_read_token")[0] == 403
    assert controller.call("/v1/hosts", "dbt_webhook_secret")[0] == 401
    assert not list((controller.folder / "cwd").iterdir())
    assert "deploybot.db" in {path.name for path in (controller.folder / "state").iterdir()}
    assert not (controller.folder / "state/admin.token").exists()
    controller.process.terminate()
    controller.hears("STOPPING=1", STOP_LIMIT_S)
    assert controller.process.wait(30) == 0


def test_without_any_credential_it_makes_a_token_in_its_state(service):
    controller = service()
    controller.start().hears("READY=1")
    token = (controller.folder / "state/admin.token").read_text().strip()
    assert controller.call("/v1/hosts", token)[0] == 200


def test_it_is_not_ready_before_it_answers_and_says_nothing_when_it_cannot_start(service):
    controller = service(DEPLOYBOT_APPS="/does/not/exist.yaml", DEPLOYBOT_TLS_CERT="/does/not/exist")
    assert controller.start().process.wait(START_LIMIT_S) == 1
    controller.socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        controller.socket.recv(4096)


def test_the_watchdog_is_fed_well_within_its_time(service):
    controller = service(WATCHDOG_USEC="2000000")
    controller.start().hears("READY=1")
    for _ in range(3):
        controller.hears("WATCHDOG=1", 1.5)


def test_a_reload_is_what_execreload_sends(service):
    controller = service()
    controller.start().hears("READY=1")
    (controller.folder / "apps.yaml").write_text("apps: [{name: web, repo: me/web, hosts: [web-01]}]\n")
    controller.process.send_signal(signal.SIGHUP)
    token = (controller.folder / "state/admin.token").read_text().strip()
    wait_for(lambda: json.loads(controller.call("/v1/apps", token)[1])["apps"])


# ------------------------------------------------------------------------------------------------------------------------
# The image. No engine builds it here: what a layer would hold is made from the lines of the Dockerfile.


def instructions():
    """(name, rest) of each instruction, with continued lines joined."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line and not line.startswith("#")]


def instruction(name):
    (rest,) = [rest for found, rest in instructions() if found == name]
    return rest


def image_environment():
    return assignments(shlex.split(instruction("ENV")))


def copies():
    """(sources, target) of each COPY."""
    for rest in (rest for name, rest in instructions() if name == "COPY"):
        words = shlex.split(rest)
        assert words[0] == "--chmod=755"  # files of a checkout with umask 077 have to be readable for the user
        yield words[1:-1], words[-1]


def test_the_image_runs_as_a_number_without_root():
    user, group = instruction("USER").split(":")
    assert user.isdigit() and group.isdigit() and int(user) > 0 and int(group) > 0
    names = [name for name, _ in instructions()]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in ("RUN", "COPY"))
    assert f"--owner={user} --group={group} --mode=0700 /data" in instruction("RUN")
    assert instruction("VOLUME") == "/data"


def test_the_base_is_pinned_and_so_is_what_is_installed():
    assert re.fullmatch(r"python:3\.\d+-slim-[a-z]+", instruction("FROM"))
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"PyYAML==[\d.]+", instruction("RUN"))[0] in makefile


def test_the_build_gets_what_the_dockerfile_copies_and_nothing_else():
    sources = {source for given, _ in copies() for source in given}
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert [line for line in lines if line and line[0] not in "#!"] == ["*"]
    assert {line[1:] for line in lines if line.startswith("!")} == sources
    for source in sources:
        assert (ROOT / source).exists()


def test_the_image_has_what_the_program_serves():
    copied = {source for given, _ in copies() for source in given}
    assert {"deploybot.py", "agent.py", "ctl.py", "notify.py", "openapi.json", "www", "apps.yaml"} == copied


@pytest.fixture
def image(tmp_path):
    """Starts the image's command line as its user, in a root where only /data can be written."""
    if os.geteuid() or not mounts_allowed():
        pytest.skip("needs root and mounts: another user and a read-only root are what is tested")
    made = []

    def start(**environment):
        root = tmp_path / "root"
        files = tmp_path / "files"
        for given, target in copies():
            for source in given:
                into = files / target.lstrip("/").removeprefix("./") if target.startswith("/") else files / "app" / target
                into = into / source if target.endswith("/") else into
                into.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, into)
        subprocess.run(["chmod", "-R", "755", files], check=True)
        root.mkdir()
        python = f"{sys.base_prefix}/bin/python3.{sys.version_info[1]}"
        packages = Path(yaml.__file__).resolve().parent.parent
        user, group = instruction("USER").split(":")
        script = tmp_path / "start.sh"
        script.write_text(f"""set -eu
mount -t tmpfs tmpfs {root}
cd {root}
cp -a {files}/. .
mkdir -p data usr packages proc dev tmp .{sys.base_prefix}
for name in bin lib lib64; do ln -s usr/$name $name; done
mount --rbind /usr usr
[ -x .{python} ] || mount --bind {sys.base_prefix} .{sys.base_prefix}
mount --bind {packages} packages
mount -t proc proc proc
mount --rbind /dev dev
mount -o remount,ro,bind {root}
mount -t tmpfs -o uid={user},gid={group},mode=0700 tmpfs data
exec chroot {root} setpriv --reuid={user} --regid={group} --clear-groups --no-new-privs --bounding-set=-all "$@"
""")
        command = json.loads(instruction("ENTRYPOINT"))
        assert command[0] == "python"
        settings = image_environment() | {"PYTHONPATH": "/packages"} | environment
        words = ["env", "-i", *[f"{name}={value}" for name, value in settings.items()]]
        log = open(tmp_path / "log", "wb")  # noqa: SIM115 (the process has it)
        process = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", script, *words]
            + ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", instruction("WORKDIR"), python, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        log.close()
        made.append(process)
        process.said = (tmp_path / "log").read_text

        def listening():
            assert process.poll() is None, process.said()
            return re.search(r"listens on \S+ port (\d+)", process.said())

        process.port = int(wait_for(listening, START_LIMIT_S)[1])
        return process

    yield start
    for process in made:
        process.kill()
        process.wait()


def healthcheck(**environment):
    """The exit code of the image's HEALTHCHECK."""
    command = json.loads(instruction("HEALTHCHECK").partition("CMD ")[2])
    assert command[0] == "python"
    done = subprocess.run([sys.executable, *command[1:]], env=environment, capture_output=True, text=True, timeout=10, check=False)
    return done.returncode


def test_the_image_works_with_a_read_only_root_and_as_its_user(image):
    controller = image(DEPLOYBOT_PORT="0")
    ids = re.search(r"^Uid:\s+(.*)\nGid:\s+(.*)$", Path(f"/proc/{controller.pid}/status").read_text(), re.M).groups()
    assert [set(found.split()) for found in ids] == [{number} for number in instruction("USER").split(":")]
    status = Path(f"/proc/{controller.pid}/status").read_text()
    assert "CapEff:\t0000000000000000\n" in status and "CapBnd:\t0000000000000000\n" in status
    assert "NoNewPrivs:\t1" in status
    root = Path(f"/proc/{controller.pid}/root")
    writable = [path for path in ("app", "etc/deploybot", "data", "usr", "") if not os.statvfs(root / path).f_flag & os.ST_RDONLY]
    assert "data" in writable and not {"app", "etc/deploybot", ""} & set(writable)
    assert healthcheck(DEPLOYBOT_PORT=str(controller.port)) == 0
    for path in ("/", "/docs", "/openapi.json", "/agent.py", "/ctl.py"):
        connection = http.client.HTTPConnection("127.0.0.1", controller.port, timeout=10)
        connection.request("GET", path)
        assert connection.getresponse().status == 200, path
        connection.close()
    assert {"deploybot.db", "admin.token"} <= set(os.listdir(root / "data"))
    controller.terminate()
    assert controller.wait(30) == 0


def test_the_health_check_fails_where_nothing_listens():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    assert healthcheck(DEPLOYBOT_PORT=str(port)) != 0


def test_the_health_check_speaks_tls_where_the_controller_does(make_controller, tmp_path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        + ["-subj", "/CN=deploy.example.com", "-keyout", key, "-out", cert],
        capture_output=True,
        check=True,
    )
    controller = make_controller(tls_cert=cert, tls_key=key)
    assert healthcheck(DEPLOYBOT_PORT=str(controller.port), DEPLOYBOT_TLS_CERT=str(cert)) == 0
    assert healthcheck(DEPLOYBOT_PORT=str(controller.port)) != 0
    plain = make_controller("plain")
    assert healthcheck(DEPLOYBOT_PORT=str(plain.port), DEPLOYBOT_TLS_CERT="") == 0


# ------------------------------------------------------------------------------------------------------------------------
# Compose


def test_compose_is_closed_read_only_and_keeps_its_data():
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["controller"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert any(volume.endswith(":/data") for volume in service["volumes"])
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert "--open" not in str(service) and "DEPLOYBOT_OPEN" not in str(service)
    assert set(service["environment"]) <= {"DEPLOYBOT_" + name.upper() for name in deploybot.Config.__annotations__}
