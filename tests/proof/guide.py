"""docs/guide.md typed as it stands, under a real systemd: from nothing to a push that is live; then a move.

A systemd of this machine is PID 1 of namespaces of its own (units.py has it), and is both machines of the guide. All blocks that
the guide does not mark as not run are run in their order; a signed push stands for GitHub's. Not here: TLS, so the controller is called
by http; GitHub, so the repository is a local one. Then the lines of docs/operations.md for an agent without sudo, and for a move to
another machine: this one, after the controller was wiped from it. Nothing in it is random.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import shutil
import subprocess
import sys

from common import ROOT, Proof, check, run, wait_for
from units import OPERATIONS, Machine, block, booted

GUIDE = (ROOT / "docs/guide.md").read_text()
URL = "http://127.0.0.1:8080"
HOST = "web-01.example.com"
REPOSITORY = "/srv/website"
GIT = f"git -c safe.directory=* -c user.name=me -c user.email=me@example.com -c init.defaultBranch=main -C {REPOSITORY}"
WIPED = (
    "rm -rf /var/lib/deploybot /var/lib/private/deploybot /etc/deploybot/credentials /etc/deploybot/apps.yaml "
    "/etc/deploybot/deploybot.env /etc/systemd/system/deploybot.service /usr/local/lib/deploybot/deploybot.py"
)


class Reader:
    """Who follows the guide: knows what was printed, and puts it where the guide says."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.agent_token = ""

    def credential(self, name: str) -> str:
        return (self.machine.root / "etc/deploybot/credentials" / name).read_text().strip()

    def type(self, text: str) -> str:
        text = text.replace("https://deploy.example.com", URL)
        text = text.replace(f"login {URL}", f"login {URL} --token-stdin < /etc/deploybot/credentials/token")
        text = text.replace("what token create printed", self.agent_token)
        text = text.replace("repo: myorg/website\n", f"repo: myorg/website\n    clone_url: file://{REPOSITORY}\n")
        said = self.machine.do(text)
        if "token create" in text:
            (self.agent_token,) = re.findall(r"^dbt_\S+$", said, re.M)
        if "agent.py install" in text:  # a repository of this machine, in place of GitHub's
            self.machine.do(
                f"chown deploybot-agent {REPOSITORY} {REPOSITORY}/.git; echo DEPLOYBOT_GIT_PROTOCOLS=file >> /etc/deploybot/agent.env"
            )
            self.machine.do("systemctl restart deploybot-agent")
            wait_for(lambda: "online" in self.ctl("hosts"), 15, "the agent to come")
        return said

    def ctl(self, *words: str) -> str:
        return self.machine.do("./ctl.py " + " ".join(words))

    def push(self, text: str) -> str:
        """A commit of main, and GitHub's request for it; the commit."""
        root = self.machine.root
        (root / REPOSITORY[1:] / "index.html").write_text(text)
        commit = self.machine.do(f"{GIT} add . && {GIT} commit -qm change && {GIT} rev-parse HEAD").strip()
        repository = {"full_name": "myorg/website", "default_branch": "main"}
        head = {"id": commit, "message": "change"}
        body = json.dumps({"ref": "refs/heads/main", "after": commit, "repository": repository, "head_commit": head}).encode()
        (root / "root/new/push.json").write_bytes(body)
        signature = hmac.new(self.credential("webhook_secret").encode(), body, hashlib.sha256).hexdigest()
        headers = f"-H X-GitHub-Event:push -H X-GitHub-Delivery:{commit} -H X-Hub-Signature-256:sha256={signature}"
        said = self.machine.do(
            f"curl -sS -f {headers} -H Content-Type:application/json --data-binary @push.json {URL}/v1/webhooks/github"
        )
        check(len(json.loads(said)["jobs_created"]) == 1, "the push was answered", said)
        return commit

    def serves(self, text: str) -> None:
        page = self.machine.root / "var/lib/deploybot-agent/website/current/index.html"
        wait_for(lambda: self.machine.do(f"cat /{page.relative_to(self.machine.root)} || true") == text, 30, f"{text!r} to be live")
        wait_for(lambda: "running" not in self.ctl("jobs", "--json"), 15, "the job to end")


def steps() -> list[tuple[str, str]]:
    """(language, text) of each block of the guide that is for typing, `push` for the one that pushes."""
    found = re.findall(r"^(?:<!-- not run: ([^\n]*) -->\n)?```(\w+)\n(.*?)^```$", GUIDE, re.M | re.S)
    return [("push" if "git push" in text else language, text) for why, language, text in found if not why or "git push" in text]


def followed(reader: Reader, proof: Proof) -> None:
    typed = 0
    for language, text in steps():
        if language == "push":
            reader.serves("<p>by hand</p>\n")  # what step 6 deployed
            reader.push("<h1>Hello</h1>\n")
            reader.serves("<h1>Hello</h1>\n")
        else:
            reader.type(text)
            typed += 1
    check(typed >= 10, "only", typed, "blocks were typed")
    proof.figure("blocks typed", typed)
    said = reader.ctl("deliveries", "--repo", "myorg/website")
    check("deployed" in said and said.count("\n") == 2, "deliveries:", said)


def hardened(reader: Reader) -> None:
    """The drop-in of docs/operations.md for hosts without sudo: the agent has no rights left, and deploys."""
    reader.machine.do(block("Agents", "no-sudo.conf", OPERATIONS))
    reader.push("<h1>Hardened</h1>\n")
    reader.serves("<h1>Hardened</h1>\n")
    pid = reader.machine.do("systemctl show deploybot-agent --property=MainPID --value").strip()
    status = reader.machine.do(f"cat /proc/{pid}/status")
    check("CapBnd:\t0000000000000000" in status and "NoNewPrivs:\t1" in status, "the agent has rights left:", status)


def moved(reader: Reader) -> None:
    """The controller leaves the machine, and comes back from the archive alone."""
    machine, title = reader.machine, "Move to another machine"
    secret = (machine.root / "var/lib/deploybot-agent/.agent/secret").read_text()
    machine.do(block(title, "disable --now", OPERATIONS))
    machine.do(WIPED + "; systemctl daemon-reload; mv /root/deploybot.tar.gz /root/new/; rm /root/deploybot.db.moved")
    mode = machine.do("stat -c %a deploybot.tar.gz").strip()
    check(mode == "600", "others may read the archive:", mode)
    machine.do(block(title, "restore --db", OPERATIONS))
    wait_for(lambda: "online" in reader.ctl("hosts"), 30, "the agent to come back")
    check((machine.root / "var/lib/deploybot-agent/.agent/secret").read_text() == secret, "the agent has another secret")
    reader.push("<h1>Moved</h1>\n")
    reader.serves("<h1>Moved</h1>\n")
    check("Hello" not in reader.ctl("deployments") and reader.ctl("deployments").count("success") == 4, "history is lost")


def prove(proof: Proof) -> None:
    with booted(proof) as machine:
        if machine is not None:
            read(machine, proof)


def read(machine: Machine, proof: Proof) -> None:
    new = machine.root / "root/new"
    new.mkdir(parents=True)
    subprocess.run([sys.executable, ROOT / ".ci/dist", new / "deploybot.py"], check=True, stdout=subprocess.DEVNULL)
    shutil.copy(ROOT / "deploybot.service", new)
    (machine.root / REPOSITORY[1:]).mkdir(parents=True)
    (machine.root / REPOSITORY[1:] / "index.html").write_text("<p>by hand</p>\n")
    machine.do(f"{GIT} init -q && {GIT} add . && {GIT} commit -qm one")
    reader = Reader(machine)
    followed(reader, proof)
    proof.say("followed, live")
    hardened(reader)
    proof.say("hardened")
    moved(reader)
    proof.say("moved")


if __name__ == "__main__":
    sys.exit(run(prove, __doc__))
