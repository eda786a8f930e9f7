"""What the tests of agent.py share: git repositories to deploy from, and hosts without a controller. A plugin of pytest."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
        if not path.exists():
            self.git("init", "--quiet", "--initial-branch=main", "--template=", str(path), cwd=path.parent)
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


def new_env(home):
    """The environment of a host: its own git configuration, no prompts, none of the developer's settings."""
    home.mkdir()
    (home / ".gitconfig").write_text('[user]\n\tname = T\n\temail = t@example.com\n[protocol "file"]\n\tallow = always\n')
    return {"PATH": os.environ["PATH"], "HOME": str(home), "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}


@pytest.fixture
def env(tmp_path):
    return new_env(tmp_path / "home")


@pytest.fixture
def variables():
    """What --env-file gives to scripts: they get nothing else of the test's."""
    return {}


@pytest.fixture(scope="session")
def first_commit(tmp_path_factory):
    """The source's folder as each test finds it: made once, since it takes git five processes."""
    folder = tmp_path_factory.mktemp("first")
    made = Source(folder / "source", new_env(folder / "home"))
    made.commit({"page.txt": "one\n"}, "first")
    return made.path


@pytest.fixture
def source(tmp_path, env, first_commit):
    return Source(shutil.copytree(first_commit, tmp_path / "source", symlinks=True), env)


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


def messages(batch):
    return [json.loads(line)[0] for line in batch.splitlines()]


def fake_git(tmp_path, env, body):
    """Puts a git first on PATH that fails where `body` says so."""
    real = subprocess.run(["sh", "-c", "command -v git"], env=env, capture_output=True, text=True, check=True).stdout.strip()
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "git").write_text(f'#!/bin/sh\n{body}\nexec {real} "$@"\n')
    (folder / "git").chmod(0o755)
    return f"{folder}:{env['PATH']}"


def seal(monkeypatch, folder):
    """No one makes a folder in this one, root neither."""
    make = os.mkdir

    def mkdir(path, *args, **kwargs):
        if Path(path).parent == folder:
            raise PermissionError(13, "Permission denied", str(path))
        make(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)


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
