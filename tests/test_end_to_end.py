"""The main job on real input: git repository, controller and two agents as processes, ctl.py; a signed push deploys on both hosts."""

import json
import os
import re
import subprocess
import threading
from pathlib import Path

import pytest
from conftest import SECRET, Controller, EventStream, command, wait_for

import deploybot

ROOT = Path(deploybot.__file__).resolve().parent
LIMIT = 60  # seconds for a deployment
HOSTS = ("web-01", "web-02")
BUILD = """\
#!/bin/sh
set -e
echo "building $DEPLOY_APP on $DEPLOY_HOST at $DEPLOY_COMMIT from $DEPLOY_BRANCH"
while [ -e "$GATE/hold" ]; do sleep 0.05; done
if [ -e broken ] || [ "$DEPLOY_HOST" = "$(cat broken-on)" ]; then echo "this build is broken" >&2; exit 3; fi
echo "page of $DEPLOY_COMMIT" > built.txt
echo "built with $TOKEN_OF_A_REGISTRY"
"""


class Site:
    """A repository, a controller and an agent for each host."""

    def __init__(self, folder, hosts=HOSTS, **more):
        self.folder, self.source, self.gate, self.hosts = folder, folder / "source", folder / "gate", hosts
        self.gate.mkdir()
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("DEPLOYBOT_", "GIT_"))}
        self.env = {**plain, "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1", "NO_COLOR": "1"}
        self.variables = folder / "variables.env"  # of the scripts
        self.variables.touch(0o600)
        self.variables.write_text(f"GATE='{self.gate}'\nTOKEN_OF_A_REGISTRY=hunter2000\n")
        self.processes = []
        self.source.mkdir()
        self.git("init", "--quiet", "--initial-branch=main")
        self.git("config", "user.name", "Ada")
        self.git("config", "user.email", "ada@example.com")
        app = {
            "name": "web", "repo": "myorg/web", "clone_url": f"file://{self.source}", "hosts": hosts,
            "deploy_on_push": True, "branches": ["main"], "build": ["./build.sh"], **more,
        }  # fmt: skip
        (folder / "apps.yaml").write_text(json.dumps({"apps": [app]}))

    def begin(self):
        folder = self.folder
        process = self.start(
            "deploybot.py", "--open", "--host", "127.0.0.1", "--port", "0", "--db", str(folder / "data" / "deploybot.db"),
            "--apps", str(folder / "apps.yaml"), DEPLOYBOT_WEBHOOK_SECRET=SECRET,
        )  # fmt: skip
        found = wait_for(lambda: self.alive(process) and re.search(r"listens on \S+ port (\d+)", self.said(0)), LIMIT)
        self.api = Calls(int(found[1]))
        for host in self.hosts:
            self.start(
                "agent.py", "--url", self.api.url, "--hostname", host, "--workdir", str(folder / host),
                "--git-protocols", "file", "--env-file", str(self.variables), "--allow-repo", "MyOrg/*",
            )  # fmt: skip
        wait_for(lambda: {host["hostname"] for host in self.api.ok("GET", "/v1/hosts")["hosts"]} == set(self.hosts), LIMIT)

    def start(self, program, *arguments, **more):
        with open(self.folder / f"log-{len(self.processes)}", "wb") as log:
            process = subprocess.Popen(
                [*command(program), *arguments], cwd=self.folder, env={**self.env, **more}, stdout=log, stderr=log
            )
        self.processes.append(process)
        return process

    def said(self, number):
        return (self.folder / f"log-{number}").read_text()

    def alive(self, process):
        assert process.poll() is None, self.said(self.processes.index(process))
        return True

    def git(self, *arguments):
        done = subprocess.run(["git", *arguments], cwd=self.source, env=self.env, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def commit(self, **files):
        """The new commit of main."""
        (self.source / "build.sh").write_text(BUILD)
        (self.source / "build.sh").chmod(0o755)
        (self.source / "broken-on").touch()
        for name, text in files.items():
            (self.source / name).write_text(text)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message=a change; touch $(canary)")
        return self.git("rev-parse", "HEAD")

    def push(self, commit):
        """The ids of the jobs that a signed push of main makes, by host."""
        event = {
            "ref": "refs/heads/main", "after": commit, "repository": {"full_name": "myorg/web", "default_branch": "main"},
            "head_commit": {"id": commit, "message": "a change; touch $(canary)"}, "pusher": {"name": "ada"},
        }  # fmt: skip
        body = json.dumps(event).encode()
        headers = {
            "X-GitHub-Event": "push", "X-GitHub-Delivery": commit, "X-Hub-Signature-256": deploybot.signature_of(SECRET, body)
        }  # fmt: skip
        status, answer = self.api.call("POST", "/v1/webhooks/github", body, headers)
        assert status == 200 and len(answer["jobs_created"]) == len(self.hosts), answer
        return {self.api.job(job_id)["host"]: job_id for job_id in answer["jobs_created"]}

    def ended(self, jobs):
        """The jobs by host, once all have ended."""
        return wait_for(
            lambda: (
                all((found := {host: self.api.job(one) for host, one in jobs.items()})[h]["completed_at"] for h in jobs) and found
            ),
            LIMIT,
        )

    def ctl(self, *arguments):
        """(exit code, output, errors)."""
        done = subprocess.run(
            [*command("ctl.py"), *arguments],
            cwd=self.folder,
            env={**self.env, "DEPLOYBOT_URL": self.api.url},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def page(self, host):
        return (self.folder / host / "web" / "current" / "built.txt").read_text()

    def end(self):
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Calls(Controller):
    """The calls of a controller that runs elsewhere."""

    def __init__(self, port):
        self.port, self.url, self.token, self.daemon = port, f"http://127.0.0.1:{port}", None, None


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    (made.gate / "hold").touch()
    try:
        made.begin()
        yield made
    finally:
        (made.gate / "hold").unlink(missing_ok=True)
        made.end()


def follow(site, path):
    """Events of a stream, gathered by a thread as they come."""
    gathered, stream = [], EventStream(site.api, path, timeout=LIMIT)

    def read():
        for event in stream:
            gathered.append(event)

    threading.Thread(target=read, daemon=True).start()
    return gathered


def messages(events, host=None):
    return [e["data"]["message"] for e in events if e["event"] == "log" and host in (None, e["data"]["host"])]


def test_a_push_deploys_on_both_hosts_and_a_bad_one_changes_nothing(site):
    first = site.commit(page="one")
    seen = follow(site, "/v1/logs/stream?tail=0&app=web")
    jobs = site.push(first)

    # while it runs, its output is seen
    for host in HOSTS:
        said = f"building web on {host} at {first} from main"
        wait_for(lambda: said in messages(seen, host), LIMIT)  # noqa: B023
    assert all(site.api.job(job)["status"] == "running" and site.api.job(job)["commit"] == first for job in jobs.values())
    following = subprocess.Popen(
        [*command("ctl.py"), "logs", "-f", "--job", jobs["web-01"][:30]],
        env={**site.env, "DEPLOYBOT_URL": site.api.url, "PYTHONUNBUFFERED": "1"},
        cwd=site.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    shown = ""
    while "building web on web-01" not in shown:
        line = following.stdout.readline()
        assert line, shown
        shown += line
    assert site.api.job(jobs["web-01"])["status"] == "running", "ctl.py showed it live"
    assert not (site.folder / "web-01" / "web" / "current").exists()

    # it goes on, and is switched to
    (site.gate / "hold").unlink()
    for host, job in site.ended(jobs).items():
        assert (job["status"], job["exit_code"], job["commit"], job["ref"]) == ("success", 0, first, first)
        assert job["metadata"]["trigger"] == "github_webhook" and job["metadata"]["commit_message"].startswith("a change")
        assert site.page(host) == f"page of {first}\n"
        assert (site.folder / host / "web" / "current").is_symlink()
        wait_for(lambda: "built with ***" in messages(seen, host), LIMIT)  # noqa: B023
    shown += following.communicate(timeout=LIMIT)[0]
    assert following.returncode == 0 and "built with ***" in shown
    assert not list(site.folder.rglob("canary")), "what is pushed is no code"
    stored = [line["message"] for line in site.api.lines({"id": jobs["web-02"]})]
    wait_for(lambda: messages(seen, "web-02") == stored, LIMIT)
    hosts = site.api.ok("GET", "/v1/apps")["apps"][0]["hosts"]
    assert [(one["hostname"], one["commit"]) for one in hosts] == [(host, first) for host in HOSTS]

    # a push whose build fails
    second = site.commit(broken="")
    jobs = site.push(second)
    for host, job in site.ended(jobs).items():
        assert (job["status"], job["reason"], job["exit_code"], job["commit"]) == ("failed", "exit_code", 3, second)
        assert site.page(host) == f"page of {first}\n", "current stays"
        assert any("this build is broken" in line["message"] for line in site.api.lines(job))
    assert [one["commit"] for one in site.api.ok("GET", "/v1/apps")["apps"][0]["hosts"]] == [first, first]
    check_ctl(site, first, second, jobs["web-01"])


def check_ctl(site, first, second, failed):
    """What a script makes of ctl.py's exit codes."""
    code, out, errors = site.ctl("logs", "-f", "--job", failed)
    assert code == 1 and "this build is broken" in out, errors
    code, out, _ = site.ctl("status", failed)
    assert code == 0 and "failed" in out and "exit_code" in out
    deploy = ("deploy", "--repo", "myorg/web", "--host", "web-01", "--app", "web", "--ref")
    assert site.ctl(*deploy, second, "--wait")[0] == 1
    code, out, errors = site.ctl(*deploy, first, "--follow")
    assert code == 0 and "built" in out, errors
    assert site.page("web-01") == f"page of {first}\n"
    code, out, _ = site.ctl("hosts", "--json")
    assert code == 0 and all(host in out for host in HOSTS)
    assert site.ctl("cancel", failed)[0] == 4
    assert site.ctl("status", "00000000")[0] == 4
    assert site.ctl("deploy", "--nonsense")[0] == 2
    site.api.url = "http://127.0.0.1:1"
    code, _, errors = site.ctl("jobs")
    assert code == 3 and len(errors.splitlines()) == 1 and "http://127.0.0.1:1" in errors


# As in docs/apps.md, with a check of health that looks at the release that is current.
ROLLING = {
    "strategy": {"type": "rolling", "batch": 1},
    "activate": "cat page > started.txt",
    "health_check": {"command": "test ! -e sick", "timeout": "200ms", "interval": "50ms", "success": 2},
    "shared": ["uploads/"],
    "env": {"NODE_ENV": "production"},
}


@pytest.fixture
def three(tmp_path):
    made = Site(tmp_path, ("web-01", "web-02", "web-03"), **ROLLING)
    try:
        made.begin()
        yield made
    finally:
        made.end()


def newest(site):
    """(the newest deployment, {host: (status, reason)}), at its end."""
    found = wait_for(
        lambda: (one := site.api.ok("GET", "/v1/deployments?limit=1")["deployments"][0])["completed_at"] and one, LIMIT
    )
    jobs = site.api.ok("GET", f"/v1/jobs?deployment_id={found['id']}")["jobs"]
    return found, {job["host"]: (job["status"], job["reason"]) for job in jobs}


def pages(site):
    return [site.page(host).split()[-1] for host in site.hosts]


def test_a_rolling_deployment_stops_at_the_host_that_fails_and_can_be_rolled_back(three):
    first = three.commit(page="one")
    code, out, errors = three.ctl("deploy", "--app", "web", "--ref", "main", "--follow")
    assert code == 0, out + errors
    assert pages(three) == [first] * 3 and newest(three)[0]["status"] == "success"

    # the second host fails: the third is untouched
    second = three.commit(**{"broken-on": "web-02"})
    three.push(second)
    found, hosts = newest(three)
    assert (found["status"], found["reason"]) == ("partial", "stopped: 1 failed of 3")
    assert hosts == {"web-01": ("success", None), "web-02": ("failed", "exit_code"), "web-03": ("cancelled", "stopped")}
    assert pages(three) == [second, first, first]
    code, out, _ = three.ctl("why", second)  # the delivery's id
    assert code == 0 and "deployed" in out and found["id"][:8] in out

    # the first can be rolled back, without a fetch
    (three.folder / "source").rename(three.folder / "away")
    code, out, errors = three.ctl("rollback", "--app", "web", "--host", "web-01", "--follow")
    (three.folder / "away").rename(three.folder / "source")
    assert code == 0 and "unlock" in out + errors, out + errors
    assert pages(three) == [first] * 3

    # a push to the app, which is locked now, waits for unlock
    third = three.commit(**{"broken-on": ""})
    three.push(third)
    code, out, _ = three.ctl("apps")
    assert code == 0 and "locked" in out
    assert three.ctl("deploy", "--app", "web", "--ref", "main")[0] == 4
    assert three.ctl("unlock", "--app", "web")[0] == 0
    assert newest(three)[0]["status"] == "success" and pages(three) == [third] * 3
    wait_for(lambda: {one["actual"] for one in three.api.ok("GET", "/v1/apps")["apps"][0]["hosts"]} == {third}, LIMIT)


def test_a_release_that_is_not_well_goes_back_by_itself(three):
    first = three.commit(page="one")
    three.push(first)
    assert newest(three)[0]["status"] == "success"
    (three.folder / "web-01" / "web" / "current" / "uploads" / "kept").write_text("by hand")
    second = three.commit(page="two", sick="")
    three.push(second)
    found, hosts = newest(three)
    assert found["status"] == "rolled_back" and hosts["web-01"] == ("failed", "health_check")
    (job,) = (job for job in three.api.ok("GET", f"/v1/jobs?deployment_id={found['id']}")["jobs"] if job["host"] == "web-01")
    assert job["rolled_back_to"] == first and pages(three) == [first] * 3
    current = three.folder / "web-01" / "web" / "current"
    assert (current / "started.txt").read_text() == "one" and (current / "uploads" / "kept").read_text() == "by hand"
    assert three.ctl("deploy", "--app", "web", "--ref", second, "--wait")[0] == 1
