#!/usr/bin/env python3
"""The first minute with DeployBot: one push, from the signature to the deployed file, in a temporary folder.

    make demo        or        python3 examples/demo.py

It starts a real controller and a real agent on this machine, needs no network but 127.0.0.1, and leaves nothing behind, also
after Ctrl-C.
"""

import hashlib
import hmac
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPO, APP, HOST = "demo/hello", "hello", "demo-host"
COMMITTED = "2026-01-01T12:00:00Z"  # the commits have the same names at each run
START_LIMIT_S = 20  # for a controller that answers and an agent that is online; a loaded machine needs some
DEPLOY_LIMIT_S = 60
STOP_LIMIT_S = 15  # then SIGKILL
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)

BUILD = """\
#!/bin/sh
# Runs in the new release, before the switch.
set -e
echo "building $DEPLOY_APP at commit $DEPLOY_COMMIT"
for page in index about contact; do
    sleep 0.3                                # so that there is something to watch
    echo "page $page: done"
done
mkdir public
echo "Hello from commit $DEPLOY_COMMIT" > public/index.html
"""


# ------------------------------------------------------------------------------------------------------------------------
# What is shown


def paint(code, text):
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text


def step(number, text):
    print(f"\n{paint('1;36', f'{number}.')} {paint('1', text)}", flush=True)


def show(text):
    print(textwrap.indent(str(text), "   "), flush=True)


def note(text):
    show(paint("2", text))


# ------------------------------------------------------------------------------------------------------------------------
# The processes


def interrupt(number, _frame=None):
    raise KeyboardInterrupt(number)


@contextmanager
def uninterrupted():
    """Holds a signal back until what is being made stands on the list of what to remove."""
    came = []
    before = {number: signal.signal(number, lambda number, _frame: came.append(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        interrupt(came[0])


class Demo:
    """The temporary folder and what runs in it; leaving the `with` ends all of it."""

    def __init__(self):
        self.processes = []

        self.token = "dbt_" + secrets.token_urlsafe(32)
        self.secret = secrets.token_hex(32)
        self.folder = None

    def __enter__(self):
        with uninterrupted():
            self.folder = Path(tempfile.mkdtemp(prefix="deploybot-demo-"))
        return self

    def __exit__(self, *_):
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        while self.processes:
            stop(self.processes.pop())  # the last one first: the agent before its controller
        shutil.rmtree(self.folder, ignore_errors=True)

    def environment(self, **more):
        """This one's, without anything that would configure DeployBot or git otherwise."""
        plain = {k: v for k, v in os.environ.items() if not k.startswith(("DEPLOYBOT_", "GIT_"))}
        return plain | {"HOME": str(self.folder), "GIT_CONFIG_NOSYSTEM": "1", "PYTHONDONTWRITEBYTECODE": "1"} | more

    def start(self, command, output=None, **variables):
        """One of the programs, in a session of its own: Ctrl-C reaches this process alone, which then ends them in order.
        What it says goes into its log here, or to `output`."""
        with open(self.folder / f"{command[0]}.log", "ab") as log, uninterrupted():
            process = subprocess.Popen(
                [sys.executable, str(ROOT / command[0]), *command[1:]],
                cwd=self.folder,
                env=self.environment(**variables),
                stdin=subprocess.DEVNULL,
                stdout=output or log,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self.processes.append(process)
        return process

    def git(self, *arguments):
        """Each takes milliseconds and is not cut short: what it starts could outlive it, and the folder."""
        with uninterrupted():
            done = subprocess.run(
                ["git", "-c", "user.name=Ada", "-c", "user.email=ada@example.com", "-c", "gc.auto=0", *arguments],
                cwd=self.folder / "hello",
                env=self.environment(GIT_AUTHOR_DATE=COMMITTED, GIT_COMMITTER_DATE=COMMITTED),
                stdin=subprocess.DEVNULL,
                check=True,
                capture_output=True,
                text=True,
                start_new_session=True,
            )
        return done.stdout.strip()

    def why(self, name):
        """The end of that program's log, for an error."""
        return "\n".join((self.folder / name + ".log").read_text(errors="replace").splitlines()[-10:])


def stop(process):
    """SIGTERM lets an agent finish its job, a second one makes it stop that job; the controller ends at the first."""
    deadline = time.monotonic() + STOP_LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        process.terminate()
        try:
            process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            continue
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


# ------------------------------------------------------------------------------------------------------------------------
# The calls


def call(port, method, path, body=None, headers=None):
    """(status, answer) of one call to the controller; raises OSError where nothing listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def until(demo, name, ready):
    """Wait for `ready()` to be true while the program `name` starts."""
    process, deadline = demo.processes[-1], time.monotonic() + START_LIMIT_S
    while True:
        try:
            if ready():
                return
        except (OSError, http.client.HTTPException):
            pass  # not listening yet
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"demo: {name} did not start:\n{demo.why(name)}")
        time.sleep(0.05)


def push_event(commit, before, message):
    """What GitHub sends for a push to main, as far as anyone reads it."""
    author = {"name": "Ada", "email": "ada@example.com", "username": "ada"}
    head = {"id": commit, "message": message, "author": author, "modified": ["build.sh"]}
    repository = {"name": "hello", "full_name": REPO, "default_branch": "main", "private": False}
    return {
        "ref": "refs/heads/main",
        "before": before,
        "after": commit,
        "created": False,
        "deleted": False,
        "forced": False,
        "repository": repository,
        "pusher": {"name": "ada", "email": "ada@example.com"},
        "sender": {"login": "ada"},
        "head_commit": head,
        "commits": [head],
    }


# ------------------------------------------------------------------------------------------------------------------------
# The story


def make_repository(demo):
    work = demo.folder / "hello"
    work.mkdir()
    demo.git("init", "--quiet", "--initial-branch=main")
    (work / "README").write_text("The demo's application.\n")
    demo.git("add", ".")
    demo.git("commit", "--quiet", "--message=Begin")
    before = demo.git("rev-parse", "HEAD")
    (work / "build.sh").write_text(BUILD)
    (work / "build.sh").chmod(0o755)
    demo.git("add", ".")
    demo.git("commit", "--quiet", "--message=Say hello")
    return before, demo.git("rev-parse", "HEAD")


def write_apps(demo):
    """JSON is YAML too; written so, it is read also where PyYAML is missing."""
    app = {
        "name": APP,
        "repo": REPO,
        "clone_url": f"file://{demo.folder}/hello",
        "hosts": [HOST],
        "deploy_on_push": True,
        "branches": ["main"],
        "build": ["./build.sh"],
    }
    (demo.folder / "apps.yaml").write_text(json.dumps({"apps": [app]}, indent=2))


def start_controller(demo):
    port = free_port()
    demo.start(
        ["deploybot.py", "--host", "127.0.0.1", "--port", str(port), "--db", "data/deploybot.db", "--apps", "apps.yaml"],
        DEPLOYBOT_TOKEN=demo.token,
        DEPLOYBOT_WEBHOOK_SECRET=demo.secret,
    )
    until(demo, "deploybot.py", lambda: call(port, "GET", "/health")[0] == 200)
    return port


def start_agent(demo, port):
    demo.start(
        ["agent.py", "--hostname", HOST, "--workdir", str(demo.folder / "host"), "--git-protocols", "file"],
        DEPLOYBOT_URL=f"http://127.0.0.1:{port}",
        DEPLOYBOT_AGENT_TOKEN=demo.token,
    )
    bearer = {"Authorization": f"Bearer {demo.token}"}

    def online():
        hosts = call(port, "GET", "/v1/hosts", headers=bearer)[1]["hosts"]
        return any(h["hostname"] == HOST and h["agent_status"] == "online" for h in hosts)

    until(demo, "agent.py", online)


def send_push(demo, port, commit, before):
    """The id of the job that the push made."""
    body = json.dumps(push_event(commit, before, "Say hello")).encode()
    signature = "sha256=" + hmac.new(demo.secret.encode(), body, hashlib.sha256).hexdigest()
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "GitHub-Hookshot/demo",
        "X-GitHub-Event": "push",
        "X-GitHub-Delivery": str(uuid.uuid4()),
        "X-Hub-Signature-256": signature,
    }
    note(f"POST http://127.0.0.1:{port}/v1/webhooks/github")
    note(f"X-Hub-Signature-256: {signature[:24]}...")
    status, answer = call(port, "POST", "/v1/webhooks/github", body, headers)
    show(f"{status} {json.dumps(answer)}")
    if status != 200 or len(answer["jobs_created"]) != 1:
        raise SystemExit("demo: the push should have made one job")
    return answer["jobs_created"][0]


def follow(demo, port, job):
    """The job's log as it comes, through `ctl.py logs -f`; raises SystemExit unless the deployment succeeded."""
    note(f"$ ./ctl.py logs --job {job[:13]} -f")
    ctl = demo.start(
        ["ctl.py", "logs", "--job", job, "-f"],
        subprocess.PIPE,
        DEPLOYBOT_URL=f"http://127.0.0.1:{port}",
        DEPLOYBOT_TOKEN=demo.token,
        PYTHONUNBUFFERED="1",
    )
    signal.alarm(DEPLOY_LIMIT_S)
    for line in ctl.stdout:
        show(line.rstrip("\n"))
    ctl.wait()
    signal.alarm(0)
    answer = call(port, "GET", f"/v1/jobs/{job}", headers={"Authorization": f"Bearer {demo.token}"})[1]["job"]
    if answer["status"] != "success":
        raise SystemExit(f"demo: the deployment ended as {answer['status']}: {answer['error']}\n{demo.why('agent.py')}")


def show_result(demo, commit):
    current = demo.folder / "host" / APP / "current"
    page = current / "public" / "index.html"
    note(f"$ readlink {current.relative_to(demo.folder)}")
    show(os.readlink(current))
    note(f"$ cat {page.relative_to(demo.folder)}")
    text = page.read_text()
    show(paint("32", text.strip()))
    if commit not in text:
        raise SystemExit("demo: that is not the commit that was pushed")


NEXT = """
Nothing of this is left on your machine. Where to go from here:
   make run                a controller on port 8080; then open http://localhost:8080/docs
   docs/guide.md           a real server: one file, a unit, a token, a webhook, an agent
   examples/apps.yaml      a static site, a systemd service, a docker compose project
   examples/agent.sh       an agent of your own, in four calls"""


def story(demo):
    print(paint("1", "DeployBot: a push, deployed."), f"Everything happens in {demo.folder}")
    step(1, f"A git repository, {REPO}, with a build script")
    before, commit = make_repository(demo)
    write_apps(demo)
    show(demo.git("log", "--oneline", "--no-decorate"))
    step(2, f"A controller (deploybot.py), and an agent (agent.py) for the host {HOST}")
    port = start_controller(demo)
    start_agent(demo, port)
    show(f"the controller listens on http://127.0.0.1:{port}, {HOST} is online")
    step(3, "GitHub's part: a push event, signed with the webhook's secret")
    job = send_push(demo, port, commit, before)
    step(4, "The agent deploys; its output, live")
    follow(demo, port, job)
    step(5, "What the host runs now")
    show_result(demo, commit)


def main():
    if shutil.which("git") is None:
        raise SystemExit("demo: it needs git (on Debian and Ubuntu: apt install git)")
    for number in SIGNALS:
        signal.signal(number, interrupt)
    try:
        with Demo() as demo:
            story(demo)
    except KeyboardInterrupt as stopped:
        number = stopped.args[0]
        if number == signal.SIGALRM:
            raise SystemExit(f"demo: no end of the deployment within {DEPLOY_LIMIT_S} s") from None
        print("\ndemo: stopped; nothing is left behind", file=sys.stderr)
        raise SystemExit(128 + number) from None
    except BrokenPipeError:  # nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    print(NEXT)


if __name__ == "__main__":
    main()
