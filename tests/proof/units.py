"""The controller's unit under a real systemd: installed by the lines of docs/install.md, it starts, reloads, is watched and stops.

A systemd of this machine is PID 1 of namespaces of its own, on an overlay of this machine's root: nothing of it stays. There the
The page's lines are run as they stand. Short: install, credentials, rights, reload, watchdog, kill, backup, upgrade and back; full:
also 10,000 agents that park. Where this machine allows no mounts (not root, a container without rights), it says so and ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

from common import ROOT, Proof, check, run, wait_for

SYSTEMD = pathlib.Path("/usr/lib/systemd/systemd")
TARGETS = ("default", "basic", "sysinit", "shutdown", "multi-user", "network-online")
JOURNAL = ("systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket")
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
AGENTS = 10_000


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# Owns: namespaces, root, PID 1, and the end of all of it. Ignores: what is installed there.


def sh(*command: str | pathlib.Path, **options: object) -> None:
    subprocess.run(list(map(str, command)), check=True, **options)  # type: ignore[call-overload]


def cgroup2() -> pathlib.Path | None:
    """Where this machine has the unified hierarchy."""
    for line in pathlib.Path("/proc/self/mounts").read_text().splitlines():
        _, path, kind, options, *_ = line.split()
        if kind == "cgroup2" and "rw" in options.split(","):
            return pathlib.Path(path)
    return None


def become_machine(folder: pathlib.Path) -> None:
    """In new namespaces: makes the root and becomes its systemd. Nothing that is mounted here is seen outside."""
    root = folder / "root"
    sh("mount", "-t", "tmpfs", "tmpfs", folder)
    for name in ("root", "upper", "work"):
        (folder / name).mkdir()
    sh("mount", "-t", "overlay", "overlay", "-o", f"lowerdir=/,upperdir={folder}/upper,workdir={folder}/work", root)
    for name, kind, options in (
        ("proc", "proc", "rw"),
        ("sys", "sysfs", "ro"),
        ("sys/fs/cgroup", "cgroup2", "rw"),
        ("run", "tmpfs", "mode=755"),
        ("tmp", "tmpfs", "mode=1777"),
        ("dev", "tmpfs", "mode=755"),
        ("usr/lib/systemd/system", "tmpfs", "mode=755"),
    ):
        sh("mount", "-t", kind, "-o", options, kind, root / name)
    sh("mount", "--bind", root / "proc/sys", root / "proc/sys")
    sh("mount", "-o", "remount,bind,ro", root / "proc/sys")
    for name in DEVICES:
        (root / "dev" / name).touch()
        sh("mount", "--bind", f"/dev/{name}", root / "dev" / name)
    for name in ("shm", "pts", "mqueue", "hugepages"):
        (root / "dev" / name).mkdir()
    sh("mount", "-t", "tmpfs", "tmpfs", root / "dev/shm")
    sh("mount", "-t", "devpts", "-o", "newinstance,ptmxmode=0666", "devpts", root / "dev/pts")
    for name, target in (("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        (root / "dev" / name).symlink_to(target)
    for left in ("etc/systemd/system", "etc/deploybot", "var/lib/private", "var/lib/deploybot", "var/log/journal"):
        shutil.rmtree(root / left, ignore_errors=True)
    (root / "etc/systemd/system").mkdir(parents=True)
    (root / "etc/machine-id").write_text(os.urandom(16).hex() + "\n")
    units = root / "usr/lib/systemd/system"
    for name in TARGETS:
        (units / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    (units / "default.target").write_text("[Unit]\nDefaultDependencies=no\nWants=" + " ".join(JOURNAL) + "\n")
    for name in JOURNAL:
        shutil.copy(pathlib.Path("/usr/lib/systemd/system") / name, units)
    socket.sethostname("proof")
    with socket.socket() as any_socket:  # `ip link set lo up`
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 0x1 | 0x40))
    (root / ".old").mkdir()
    os.chdir(root)
    sh("pivot_root", ".", ".old")
    os.chroot(".")
    sh("umount", "--lazy", "/.old")
    os.rmdir("/.old")
    sh("mount", "--make-rshared", "/")  # as the credentials of a service are mounted elsewhere and moved to it
    environment = {"container": "proof", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    os.execve(SYSTEMD, [str(SYSTEMD), "--system", "--log-target=journal", "--show-status=no"], environment)


class Machine:
    """It runs from `start` to `end`. Raises OSError where this one allows none."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        group = cgroup2()
        if os.geteuid() != 0 or group is None or not SYSTEMD.exists():
            raise OSError("needs root, systemd and cgroup2")
        self.group = group / f"proof-units-{os.getpid()}"

    def start(self) -> Machine:
        self.group.mkdir()
        mine = pathlib.Path(__file__).resolve()
        join = f'echo 0 > {self.group}/cgroup.procs && exec "$@"'
        spaces = ["--mount", "--pid", "--fork", "--kill-child", "--cgroup", "--uts", "--ipc", "--net"]
        with open(self.folder.with_suffix(".log"), "wb") as log:
            self.process = subprocess.Popen(
                ["sh", "-c", join, "sh", "unshare", *spaces, "--propagation", "private"]
                + [sys.executable, str(mine), "--inside", str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.pid = wait_for(self._booted, 30, "a systemd that booted")
        return self

    def _booted(self) -> int | None:
        if self.process.poll() is not None:
            raise OSError(self.folder.with_suffix(".log").read_text().strip()[-500:])
        children = pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        if children and pathlib.Path(f"/proc/{children[0]}/root/run/systemd/private").exists():
            return int(children[0])
        return None

    @property
    def root(self) -> pathlib.Path:
        return pathlib.Path(f"/proc/{self.pid}/root")

    def do(self, script: str, fails: bool = False, limit: float = 60.0) -> str:
        """What a shell there says to that script; it has to succeed, or to fail."""
        enter = ["nsenter", "--all", "--root", "--wd", "--target", str(self.pid), "--", "sh", "-euc"]
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        done = subprocess.run(
            [*enter, "cd /root/new\n" + script], env=environment, capture_output=True, text=True, timeout=limit, check=False
        )
        check((done.returncode != 0) == fails, script, "ended with", done.returncode, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def show(self, name: str) -> str:
        return self.do(f"systemctl show deploybot --property={name} --value").strip()

    def ask(self, path: str, token: str = "", more: str = "") -> tuple[int, str]:
        header = f"-H 'Authorization: Bearer {token}'" if token else ""
        said = self.do(f"curl -s -w '\\n%{{http_code}}' {more} {header} http://localhost:8080{path}")
        body, _, status = said.rpartition("\n")
        return int(status), body

    def end(self) -> None:
        self.process.kill()  # and its child, PID 1 there, and with that all else
        self.process.wait()
        with contextlib.suppress(OSError):
            wait_for(self._gone, 10)

    def _gone(self) -> bool:
        for group, _, _ in os.walk(self.group, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(group)
        return not self.group.exists()


# ---------------------------------------------------------------------------------------------------------------------
# What the pages say

INSTALL, OPERATIONS = "docs/install.md", "docs/operations.md"


def blocks(title: str, document: str = INSTALL) -> list[str]:
    """The shell blocks under that heading, without their lines that install packages."""
    text = (ROOT / document).read_text()
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |\Z)", text, re.M | re.S)
    check(found, document, "has no section", title)
    assert found is not None
    shown = re.findall(r"^```sh\n(.*?)^```$", found[2], re.M | re.S)
    return [re.sub(r"^apt .*\n", "", block, flags=re.M) for block in shown]


def block(title: str, mark: str, document: str = INSTALL) -> str:
    """The only one that holds `mark`."""
    found = [text for text in blocks(title, document) if mark in text]
    check(len(found) == 1, f"{len(found)} blocks with {mark!r} under {title!r}")
    return found[0]


# ---------------------------------------------------------------------------------------------------------------------
# The proof


def installed(machine: Machine) -> str:
    """Runs the page's lines; the admin's token."""
    new = machine.root / "root/new"
    new.mkdir(parents=True)
    sh(sys.executable, ROOT / ".ci/dist", new / "deploybot.py", stdout=subprocess.DEVNULL)
    for name in ("deploybot.service", "apps.yaml"):
        shutil.copy(ROOT / name, new)
    title = "On a real server"
    machine.do(block(title, "install -D --mode=644 deploybot.service"))
    machine.do("systemctl daemon-reload; systemctl start deploybot", fails=True)
    check(machine.show("ExecMainStatus") == "243", "without the folder of credentials it ended as", machine.show("ExecMainStatus"))
    machine.do("systemctl stop deploybot")
    machine.do(block(title, "for name in token"))
    machine.do(block(title, "curl http://localhost:8080/health").partition("journalctl")[0])
    folder = machine.root / "etc/deploybot/credentials"
    check(folder.stat().st_mode & 0o777 == 0o700, "credentials are open to others")
    check({file.name for file in folder.iterdir()} == {"token", "agent_token", "webhook_secret"}, "other credentials")
    check(all(file.stat().st_mode & 0o777 == 0o600 for file in folder.iterdir()), "a credential is open to others")
    return (folder / "token").read_text().strip()


def rights(machine: Machine, token: str) -> None:
    """What the process there may, and what of the secrets others can see."""
    pid = int(machine.show("MainPID"))
    status = machine.do(f"cat /proc/{pid}/status")
    for line in ("CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"):
        check(line in status, line, "is not so:", status)
    uid = re.search(r"^Uid:\t(\d+)", status, re.M)
    check(uid and 61184 <= int(uid[1]) <= 65519, "no dynamic user:", uid and uid[1])
    for place in ("environ", "cmdline"):
        check(token not in machine.do(f"tr '\\0' '\\n' < /proc/{pid}/{place}"), "the token stands in", place)
    check(token not in machine.do("journalctl --no-pager"), "the token stands in the journal")
    check(re.search(r"^Max core file size +0 +0 ", machine.do(f"cat /proc/{pid}/limits"), re.M), "it may leave core files")
    state = machine.do("find /var/lib/private/deploybot -printf '%m %u %P\\n'")
    check("admin.token" not in state, "a token was made though one was given")
    check("600 root" not in state and " deploybot.db\n" in state, "state:", state)


def reloaded(machine: Machine, token: str) -> None:
    apps = machine.root / "etc/deploybot/apps.yaml"
    apps.write_text("apps:\n  - {name: from-the-proof, repo: me/it, hosts: [web-01]}\n")
    before = machine.show("MainPID")
    machine.do("systemctl reload deploybot")
    wait_for(lambda: "from-the-proof" in machine.ask("/v1/apps", token)[1], 10, "the new mapping")
    check(machine.show("MainPID") == before, "a reload made a new process")


def restarted(machine: Machine, what: str, limit: float) -> float:
    """Seconds until it is active again after that was done to its process."""
    before, count, start = machine.show("MainPID"), int(machine.show("NRestarts")), time.monotonic()
    machine.do(f"{what} {before}")
    wait_for(
        lambda: int(machine.show("NRestarts")) > count and machine.show("ActiveState") == "active", limit, f"a restart after {what}"
    )
    check(machine.ask("/health")[0] == 200, "not healthy after", what)
    return time.monotonic() - start


def upgraded(machine: Machine, token: str) -> None:
    """The lines of "The controller, and back", one after the other."""
    for name in ("deploybot.py", "deploybot.service"):
        shutil.copy(machine.root / "root/new" / name, machine.root / "root")
    for text in blocks("The controller, and back", OPERATIONS):
        if "agent" not in text:
            machine.do(text)
            check(machine.show("ActiveState") == "active", "not active after", text)
            check(machine.ask("/v1/hosts", token)[0] == 200, "does not answer after", text)


def operated(machine: Machine, token: str) -> None:
    """The lines of docs/operations.md: doctor, backups and one that is restored."""
    machine.do("mkdir -p /etc/cron.daily; " + block("Backup and restore", "cron.daily", OPERATIONS))
    said = machine.do(block("Backup and restore", "doctor", OPERATIONS))
    check("a controller runs on it" in said and "DEPLOYBOT_TOKEN is set" in said, "doctor said", said)
    machine.do("/etc/cron.daily/deploybot; cd /var/backups/deploybot; mv ?.db any; mv any 1.db")
    machine.do(block("Backup and restore", "restore", OPERATIONS))
    check(machine.ask("/v1/hosts", token)[0] == 200, "does not answer from a backup")
    owners = machine.do("stat -c '%U %a' /var/lib/private/deploybot/deploybot.db*")
    check(set(owners.splitlines()) == {"deploybot 600"}, "the restored database belongs to", owners)


def encrypted(machine: Machine, token: str) -> None:
    """A certificate of its own as docs/install.md installs it, a renewal by the hook, and port 443."""
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 9 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    machine.do(f"{make} -keyout privkey.pem -out fullchain.pem 2>&1")
    machine.do(block("A certificate of its own", "tls_cert"))
    ask = f"curl -s --cacert /root/new/fullchain.pem -H 'Authorization: Bearer {token}' -o /dev/null -w '%{{http_code}}'"
    check(machine.do(f"{ask} https://localhost:8443/v1/hosts") == "200", "no TLS on 8443")
    machine.do("mkdir -p /etc/letsencrypt/renewal-hooks/deploy; " + block("TLS", "renewal-hooks", OPERATIONS))
    machine.do(f"{make} -keyout privkey.pem -out fullchain.pem 2>&1")
    machine.do("RENEWED_LINEAGE=/root/new /etc/letsencrypt/renewal-hooks/deploy/deploybot")
    check(machine.do(f"{ask} https://localhost:8443/v1/hosts") == "200", "the renewed certificate is not in force")
    machine.do("sed -i /DEPLOYBOT_PORT/d /etc/deploybot/deploybot.env; " + block("TLS", "CAP_NET_BIND_SERVICE", OPERATIONS))
    check(machine.do(f"{ask} https://localhost/v1/hosts") == "200", "no TLS on 443")
    status = machine.do(f"cat /proc/{machine.show('MainPID')}/status")
    check("CapEff:\t0000000000000400" in status, "it has other capabilities than that of low ports")


PROGRAM = "/usr/local/lib/deploybot/agent.py"


def agent_installed(machine: Machine) -> None:
    """The agent as docs/install.md installs it: what it makes, that doctor has nothing to say, that a second time does nothing."""
    shutil.copy(ROOT / "ctl.py", machine.root / "root/new")
    secret = (machine.root / "etc/deploybot/credentials/agent_token").read_text().strip()
    (sum_of,) = re.findall(r'"name":"agent.py","sha256":"(\w+)"', machine.ask("/v1/programs")[1].replace(" ", ""))
    text = block("The agent on a host", "sha256sum").replace("https://deploy.example.com", "http://localhost:8080")
    text = text.replace("what cat /etc/deploybot/credentials/agent_token says on the controller", secret)
    machine.do(text.replace("the SHA256 of agent.py", "0" * 64), fails=True)
    check(not (machine.root / PROGRAM[1:]).exists(), "another agent.py than that of the checksum was installed")
    said = machine.do("umask 077\n" + text.replace("the SHA256 of agent.py", sum_of))
    check("run useradd" in said and "run systemctl start deploybot-agent" in said and secret not in said, "install said", said)
    wait_for(lambda: "web-01.example.com" in machine.do("journalctl --no-pager -u deploybot-agent"), 15, "an agent that registered")
    wait_for(lambda: "signs in with its own secret" in doctor(machine), 15, "an agent that is known")
    said = doctor(machine)
    check("FAIL" not in said and "warn" not in said, "doctor said", said)
    files = f"{PROGRAM} /etc/deploybot/agent.env /etc/systemd/system/deploybot-agent.service /usr/local/lib/deploybot"
    modes = machine.do(f"stat -c '%a %U' {files}").splitlines()
    check(modes == ["644 root", "600 root", "644 root", "755 root"], "modes", modes)
    pid = machine.do("systemctl show deploybot-agent --property=MainPID --value").strip()
    check(secret not in machine.do(f"cat /proc/{pid}/cmdline; systemctl show deploybot-agent"), "the token can be seen")
    said = machine.do(f"python3 {PROGRAM} install")
    check("run " not in said and "write" not in said, "a second install said", said)
    check("active (running)" in machine.do(f"python3 {PROGRAM} status"), "status")
    machine.do("systemctl stop deploybot-agent")
    check("the service is inactive" in machine.do(f"python3 {PROGRAM} doctor", fails=True), "a stopped service is no finding")
    check("run systemctl start" in machine.do(f"python3 {PROGRAM} install"), "a stopped service was not started")


def doctor(machine: Machine) -> str:
    return machine.do(f"python3 {PROGRAM} doctor || true")


def agent_uninstalled(machine: Machine) -> None:
    gone = machine.root / PROGRAM[1:]
    machine.do(f"cp {PROGRAM} agent.py; python3 {PROGRAM} uninstall")
    check(not gone.exists() and (machine.root / "var/lib/deploybot-agent/web/current").is_symlink(), "releases went")
    said = machine.do("systemctl status deploybot-agent", fails=True)
    check("could not be found" in said, "the unit is still there:", said)
    machine.do("python3 agent.py uninstall --purge")
    check(not (machine.root / "var/lib/deploybot-agent").exists(), "the state is still there")
    machine.do("getent passwd deploybot-agent", fails=True)


def agent_deploys(machine: Machine) -> None:
    """The agent with scripts as another user: that user makes the release, and reads no secret."""
    machine.do(block("The agent on a host", "scripts.env"))
    said = machine.do(block("Agents", "--run-as", OPERATIONS))
    check("write /etc/systemd/system/deploybot-agent.service.d/run-as.conf (644)" in said, "install --run-as said", said)
    (machine.root / "etc/deploybot/apps.yaml").write_text(
        "apps: [{name: web, repo: me/web, clone_url: 'file:///srv/web', hosts: [web-01.example.com], deploy: 'sh ./deploy.sh'}]\n"
    )
    repository = machine.root / "srv/web"
    repository.mkdir()
    (repository / "deploy.sh").write_text("id -un; stat -c %U .; cat /var/lib/deploybot-agent/.agent/secret || echo $NPM_TOKEN\n")
    git = "git -c user.name=me -c user.email=me@example.com -c init.defaultBranch=main -C /srv/web"
    machine.do(f"{git} init -q; {git} add .; {git} commit -qm one; echo DEPLOYBOT_GIT_PROTOCOLS=file >> /etc/deploybot/agent.env")
    machine.do("systemctl reload deploybot; systemctl restart deploybot-agent")
    deploy = "./ctl.py deploy --repo me/web --ref main --host web-01.example.com --follow"
    said = machine.do(f"export DEPLOYBOT_TOKEN=$(cat /etc/deploybot/credentials/token); {deploy}")
    check("\ndeploy\ndeploy\n" in said and "Permission denied" in said and "success" in said, "the deployment said", said)


def notified(machine: Machine, token: str) -> None:
    """notify.py as docs/notify.md installs it: it follows the stream with a viewer's token, reads apps.yaml again, and comes back."""
    title = "Tell GitHub and people"
    for name in ("deploybot-notify.service", "notify.py", "ctl.py"):
        shutil.copy(ROOT / name, machine.root / "root/new")
    machine.do(block(title, "deploybot-notify.service /etc", "docs/notify.md"))
    cursor = "cat /var/lib/private/deploybot-notify/cursor || true"
    wait_for(lambda: re.search(r"^[0-9a-f]{8}-[0-9]+$", machine.do(cursor)), 15, "the cursor of notify.py")
    pid = machine.do("systemctl show deploybot-notify --property=MainPID --value").strip()
    status = machine.do(f"cat /proc/{pid}/status")
    for line in ("CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"):
        check(line in status, "of notify.py", line, "is not so:", status)
    machine.do("systemctl reload deploybot-notify")
    said = "journalctl --no-pager -u deploybot-notify"
    wait_for(lambda: "/etc/deploybot/apps.yaml is in force" in machine.do(said), 10, "the mapping of notify.py")
    machine.do("systemctl kill --signal=KILL deploybot-notify; systemctl restart deploybot-notify; systemctl stop deploybot-notify")
    result = machine.do("systemctl show deploybot-notify --property=Result --value").strip()
    check(result == "success", "the stop of notify.py ended as", result)
    secrets = machine.do("cat /etc/deploybot/notify/*").split()
    check(len(secrets) == 2 and not [one for one in [token, *secrets] if one in machine.do(said)], "a secret stands in the journal")


CROWD = """
import json, resource, socket, sys, time
count, token = int(sys.argv[1]), open("/etc/deploybot/credentials/token").read().strip()
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
def send(sock, path, body):
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\\r\\nHost: localhost\\r\\nAuthorization: Bearer {token}\\r\\nContent-Length: {len(data)}\\r\\n\\r\\n"
    sock.sendall(head.encode() + data)
def answer(sock):
    data = b""
    while b"\\r\\n\\r\\n" not in data:
        data += sock.recv(65536)
    head, _, body = data.partition(b"\\r\\n\\r\\n")
    length = int(head.lower().partition(b"content-length: ")[2].split()[0])
    while len(body) < length:
        body += sock.recv(65536)
    assert b" 200 " in head or b" 201 " in head, data
    return json.loads(body)
def connected():
    return socket.create_connection(("127.0.0.1", 8080))
first, agents = connected(), []
for number in range(count):
    send(first, "/v1/agents/register", {"hostname": f"host-{number}"})
    agents.append(answer(first)["id"])
crowd = [connected() for _ in agents]
for sock, agent in zip(crowd, agents):
    send(sock, f"/v1/agents/{agent}/heartbeat", {"status": "online", "wait": 25})
print("sent", flush=True)
sys.stdin.readline()
sock = connected()
send(sock, "/v1/jobs", {"repo": "me/it", "ref": "main", "host": f"host-{count - 1}"})
job, start = answer(sock)["job"]["id"], time.monotonic()
assert answer(crowd[-1])["job"]["id"] == job
print(f"handed over in {(time.monotonic() - start) * 1000:.0f} ms", flush=True)
"""


def crowded(machine: Machine, proof: Proof) -> None:
    """Ten thousand agents park, and one of them gets a job."""
    (machine.root / "root/new/crowd.py").write_text(CROWD)
    enter = ["nsenter", "--all", "--root", "--wd", "--target", str(machine.pid), "--"]
    crowd = subprocess.Popen(
        [*enter, "/usr/bin/python3", "/root/new/crowd.py", str(AGENTS)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert crowd.stdin and crowd.stdout
    said = crowd.stdout.readline()
    check(said == "sent\n", "agents could not park:", said, crowd.stdout.read() if said != "sent\n" else "")
    status = f"cat /proc/{machine.show('MainPID')}/status"

    def threads() -> int:
        return int(machine.do(status).partition("Threads:\t")[2].split()[0])

    wait_for(lambda: threads() > AGENTS, 20, f"{AGENTS} parked agents")
    proof.figure("threads", threads())
    proof.figure("resident memory", machine.do(status).partition("VmRSS:")[2].split("\n")[0].strip())
    crowd.stdin.write("\n")
    crowd.stdin.close()
    proof.figure("a job for one of 10,000", crowd.stdout.readline().strip())
    check(crowd.wait(60) == 0, "the crowd failed:", crowd.stdout.read())


@contextlib.contextmanager
def booted(proof: Proof) -> Iterator[Machine | None]:
    """A machine of its own, whose journal is shown where the proof fails; None, and a figure that says why, where there can be none."""
    folder = proof.folder / "machine"
    folder.mkdir()
    try:
        machine = Machine(folder)
        try:
            machine.start()
        except BaseException:
            with contextlib.suppress(AttributeError):
                machine.end()
            raise
    except OSError as error:
        proof.figure("not run", f"this machine allows no systemd of its own: {error}")
        yield None
        return
    try:
        yield machine
    except BaseException:
        with contextlib.suppress(Exception):
            print(machine.do("journalctl --no-pager | grep -v registered | tail -n 60"))
        raise
    finally:
        machine.end()


def prove(proof: Proof) -> None:
    with booted(proof) as machine:
        if machine is not None:
            used(machine, proof)


def used(machine: Machine, proof: Proof) -> None:
    token = installed(machine)
    proof.say("installed, active")
    check(machine.ask("/health")[0] == 200, "not healthy")
    check(machine.ask("/v1/hosts", token)[0] == 200, "the credential does not count")
    check(machine.ask("/v1/hosts", "dbt_other")[0] == 401, "another token counts")
    rights(machine, token)
    reloaded(machine, token)
    notified(machine, token)
    proof.say("notified")
    dropin = machine.root / "etc/systemd/system/deploybot.service.d/proof.conf"
    dropin.parent.mkdir()
    dropin.write_text("[Service]\nWatchdogSec=3\nRestartSec=1\n")
    machine.do("systemctl daemon-reload; systemctl restart deploybot")
    proof.figure("again after kill -9, RestartSec=1", restarted(machine, "kill -KILL", 30))
    proof.figure("again after kill -STOP, WatchdogSec=3", restarted(machine, "kill -STOP", 60))
    proof.say("killed, stopped, back each time")
    dropin.unlink()
    machine.do("systemctl daemon-reload")
    upgraded(machine, token)
    proof.say("upgraded, and back")
    agent_installed(machine)
    agent_deploys(machine)
    check("FAIL" not in doctor(machine), "doctor said", doctor(machine))
    agent_uninstalled(machine)
    proof.say("deployed; agent installed, looked over, uninstalled")
    operated(machine, token)
    proof.say("looked over, backed up, restored")
    if proof.full:
        crowded(machine, proof)
    encrypted(machine, token)
    proof.say("encrypted, on port 443")
    machine.do("systemctl stop deploybot")
    check(machine.show("Result") == "success", "the stop ended as", machine.show("Result"))
    proof.figure("systemd", machine.do("systemctl --version").split("\n", 1)[0])
    proof.figure("lines of the journal", len(machine.do("journalctl --no-pager -u deploybot").splitlines()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        become_machine(pathlib.Path(sys.argv[2]))
    sys.exit(run(prove, __doc__))
