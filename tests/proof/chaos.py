"""Agents and controller killed at random, answers dropped between them: no job is lost, none is run twice.

Real controller, real agents, a real repository. Between agents and controller stands a proxy of this file that drops answers
after the request got through, cuts them, cuts requests and delays. The deployed scripts append to a ledger: job, attempt, what
they did. At the end database, ledger, logs and what `current` leads to must tell one story. Short: 6 agents, up to 120 jobs; full:
20 agents, 10,000 jobs. The seed fixes who is killed and what is dropped, not the moments: two runs of one seed are alike, not equal.
"""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from common import AGENT, AGENT_TOKEN, LOST, Controller, Process, Proof, check, environment, run, wait_for
from kill9 import ENDED, Stored, copy_of

COMMITS = 4
LINES = 5  # that a script prints
SCRIPT_BYTES = 120  # that a script writes into the ledger, about
PATIENCE = 8.0  # seconds after which the next one is killed in any case
STANDSTILL = 90  # seconds: longer than an agent waits for the answer of a controller that was killed
APPS = ("whole", "steps")  # one with `deploy`, one with `build` and `activate`

# The attempt stands in the name of the agent's tracking file; a script without one would be started untracked.
DEPLOY = """\
#!/bin/sh
ledger=$1; locks=$2; attempt=0
for file in "$DEPLOY_RELEASE"/../../../.agent/jobs/"$DEPLOY_JOB_ID".*.json; do
    number=${file%.json}; number=${number##*.}
    [ "$number" -gt "$attempt" ] && attempt=$number
done
exec 9> "$locks/$DEPLOY_HOST.$DEPLOY_APP"
flock -n 9 || echo "overlap $DEPLOY_JOB_ID $attempt" >> "$ledger"
echo "start $DEPLOY_JOB_ID $attempt ${DEPLOY_PREVIOUS##*-}" >> "$ledger"
line=0
while [ $line -lt 5 ]; do
    echo "line $line of $DEPLOY_JOB_ID.$attempt"
    line=$((line + 1))
    [ $line -eq 3 ] && sleep "0.${DEPLOY_REF##*-}"
done
echo "end $DEPLOY_JOB_ID $attempt" >> "$ledger"
"""
ACTIVATE = """\
#!/bin/sh
sleep "0.${DEPLOY_REF##*-}"
echo "activate $DEPLOY_JOB_ID $DEPLOY_HOST $DEPLOY_APP $DEPLOY_COMMIT" >> "$1"
"""


class Repository:
    """Branches rN-T on a few commits; T is what a script sleeps, in tenths of a second."""

    def __init__(self, folder: pathlib.Path, branches: int, chance: random.Random):
        self.folder = folder
        self.env = {**environment(), "HOME": str(folder.parent), "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
        folder.mkdir()
        self.git("init", "--quiet", "--initial-branch=main")
        self.git("config", "user.name", "Ada")
        self.git("config", "user.email", "ada@example.com")
        for name, text in (("deploy.sh", DEPLOY), ("activate.sh", ACTIVATE)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        commits = []
        for number in range(COMMITS):
            (folder / "page").write_text(f"{number}\n")
            self.git("add", "--all")
            self.git("commit", "--quiet", "--message", f"page {number}")
            commits.append(self.git("rev-parse", "HEAD"))
        self.branches = [f"r{number}-{chance.choice((0, 0, 1, 9))}" for number in range(branches)]
        for name in self.branches:
            self.git("branch", name, chance.choice(commits))
        self.git("pack-refs", "--all")

    def git(self, *arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=self.folder, env=self.env, check=True, capture_output=True, text=True)
        return done.stdout.strip()


# ---------------------------------------------------------------------------------------------------------------------
# The proxy


class Proxy:
    """TCP, two threads a connection. What it does to a packet is drawn by lot; `rate` is the chance of a fault a packet."""

    REQUEST = {"request cut": 0.3}
    ANSWER = {"answer dropped": 1.0, "answer cut": 0.5, "answer delayed": 1.0}

    def __init__(self, target: int, seed: int, rate: float):
        self.target, self.rate = target, rate
        # Guards the two below, which every pump uses.
        self._lock = threading.Lock()
        self._chance = random.Random(f"{seed} proxy")
        self.counts: collections.Counter[str] = collections.Counter()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                down, _ = self._listener.accept()
            except OSError:
                return  # closed
            try:
                up = socket.create_connection(("127.0.0.1", self.target), timeout=10)
            except OSError:
                down.close()
                continue
            self.counts["connections"] += 1
            for end in (down, up):
                end.settimeout(None)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._carry, args=(down, up), daemon=True).start()

    def _carry(self, down: socket.socket, up: socket.socket) -> None:
        answers = threading.Thread(target=self._pump, args=(up, down, self.ANSWER), daemon=True)
        answers.start()
        self._pump(down, up, self.REQUEST)
        answers.join()
        down.close()
        up.close()

    def _pump(self, source: socket.socket, target: socket.socket, faults: dict[str, float]) -> None:
        broken = True
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                with self._lock:
                    fault, wait, part = (self._fault(faults), self._chance.uniform(0.01, 1.0), self._chance.randrange(len(data)))
                if fault == "answer delayed":
                    time.sleep(wait)
                elif fault:
                    target.sendall(b"" if fault == "answer dropped" else data[:part])
                    break
                target.sendall(data)
            else:  # the end of one direction: the other goes on, as TCP has it
                target.shutdown(socket.SHUT_WR)
                broken = False
        for end in (source, target) if broken else ():  # wakes the other pump
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _fault(self, faults: dict[str, float]) -> str | None:
        lot = self._chance.random() / (self.rate or 1e-9)
        for name, weight in faults.items():
            lot -= weight
            if lot < 0:
                self.counts[name] += 1
                return name
        return None

    def close(self) -> None:
        """Takes no new connection."""
        self._listener.close()


# ---------------------------------------------------------------------------------------------------------------------
# Those that act


class Agent(Process):
    """agent.py as a process; a restart keeps its folder."""

    def __init__(self, folder: pathlib.Path, host: str, port: int, env: dict[str, str], *flags: str, program: Any = AGENT):
        folder.mkdir(parents=True, exist_ok=True)
        self.host, self.workdir = host, folder / host
        argv = [
            sys.executable, program, "--url", f"http://127.0.0.1:{port}", "--hostname", host,
            "--workdir", self.workdir, "--git-protocols", "file", *flags,
        ]  # fmt: skip
        super().__init__(argv, folder / f"{host}.log", {**env, "DEPLOYBOT_AGENT_TOKEN": AGENT_TOKEN}, folder)

    def active_commit(self, app: str) -> str | None:
        """The first 12 digits of what `current` leads to."""
        with contextlib.suppress(OSError):
            return os.readlink(self.workdir / app / "current").rpartition("-")[2]
        return None


class Load:
    """Makes the jobs, a backlog of a few a host, and cancels some; ends early where the machine is too slow for `seconds`."""

    def __init__(self, controller: Controller, hosts: list[str], branches: list[str], jobs: int, seed: int, seconds: float):
        self.deadline = time.monotonic() + seconds
        self.controller, self.chance = controller, random.Random(f"{seed} load")
        self.wanted = [(host, ref, app) for ref in branches for host in hosts for app in APPS]
        self.chance.shuffle(self.wanted)
        del self.wanted[jobs:]
        self.created: dict[str, int] = {}  # job id to its retries
        self.failure: BaseException | None = None
        self.done = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            client = self.controller.client()
            backlog = 2 * len({host for host, _, _ in self.wanted})
            for number, (host, ref, app) in enumerate(self.wanted):
                while number % 10 == 0 and self._waiting(client) > backlog:
                    time.sleep(0.1)
                if time.monotonic() > self.deadline:
                    return
                body = {"repo": "myorg/app", "ref": ref, "host": host, "app": app, "retries": self.chance.choice((0, 0, 1, 3))}
                job = self._insist(client, "/v1/jobs", body)["job"]
                self.created[job["id"]] = body["retries"]
                if self.chance.random() < 0.03:
                    self._insist(client, f"/v1/jobs/{self.chance.choice(list(self.created)[-30:])}/cancel", None)
        except BaseException as error:
            self.failure = error
        finally:
            self.done.set()

    def _insist(self, client: Any, path: str, body: Any) -> Any:
        while True:
            with contextlib.suppress(*LOST):
                status, answer = client.call("POST", path, body)
                check(status in (200, 201) or (status == 409 and body is None), path, "answered", status, answer)
                return answer
            time.sleep(0.05)

    def _waiting(self, client: Any) -> int:
        with contextlib.suppress(*LOST):
            return len(client.ok("GET", "/v1/jobs?status=pending&limit=1000")["jobs"])
        return 1 << 30


class Chaos:
    """Kills one process after the other and starts it again, until it is told to stop; `pause`: scripts between two kills."""

    def __init__(self, controller: Controller, agents: list[Agent], ledger: pathlib.Path, seed: int, pause: float):
        self.controller, self.agents, self.ledger, self.pause = controller, agents, ledger, pause
        self.chance = random.Random(f"{seed} chaos")
        self.kills: collections.Counter[str] = collections.Counter()
        self.killed: collections.Counter[str] = collections.Counter()  # host to kills of its agent
        self.stopped, self.failure = threading.Event(), None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            while self._wait(self.chance.uniform(0.2, 1.8) * self.pause * SCRIPT_BYTES):
                if self.chance.random() < 0.2:
                    self.kills["controller"] += 1
                    self.controller.kill()
                    self.stopped.wait(self.chance.uniform(0.0, 0.5))
                    self.controller.start()
                else:
                    self.kills["agents"] += 1
                    agent = self.chance.choice(self.agents)
                    self.killed[agent.host] += 1
                    check(agent.poll() is None, "the agent of", agent.host, "ended by itself:", agent.said()[-1500:])
                    agent.kill()
                    self.stopped.wait(self.chance.uniform(0.0, 0.3))
                    agent.launch()
        except BaseException as error:
            self.failure = error

    def _wait(self, growth: float) -> bool:
        """Until the ledger has grown so much, so that a slow machine is not killed to a standstill; False at the end."""
        enough, deadline = self.ledger.stat().st_size + growth, time.monotonic() + PATIENCE
        while self.ledger.stat().st_size < enough and time.monotonic() < deadline and not self.stopped.is_set():
            time.sleep(self.chance.uniform(0.01, 0.05))
        return not self.stopped.is_set()

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join(120)
        check(not self.thread.is_alive(), "the killer hangs")


# ---------------------------------------------------------------------------------------------------------------------
# The story that is told at the end


class Ledger:
    """What the scripts wrote, in its order."""

    def __init__(self, path: pathlib.Path):
        self.starts: dict[str, list[int]] = collections.defaultdict(list)
        self.ends: dict[str, list[int]] = collections.defaultdict(list)
        self.active: dict[tuple[str, str], str] = {}  # (host, app) to the commit that was activated last
        self.previous: dict[str, list[str]] = collections.defaultdict(list)  # what `current` led to when a script began
        self.overlaps: list[str] = []
        for line in path.read_text().splitlines():
            what, job_id, *rest = line.split()
            if what == "start":
                self.starts[job_id].append(int(rest[0]))
                self.previous[job_id].append(rest[1] if len(rest) > 1 else "")
            elif what == "end":
                self.ends[job_id].append(int(rest[0]))
            elif what == "activate":
                self.active[rest[0], rest[1]] = rest[2]
            else:
                self.overlaps.append(line)


def verify_jobs(stored: Stored, created: dict[str, int]) -> None:
    lost = created.keys() - stored.jobs.keys()
    check(not lost, len(lost), "jobs are lost:", sorted(lost)[:5])
    ends = stored.ends()
    for job_id, job in stored.jobs.items():
        check(job["status"] in ENDED and ends.get(job_id) == 1, "not ended once:", job_id, job["status"], ends.get(job_id))
        how = (job["status"], job["reason"])
        known = (("success", None), ("failed", "agent_crashed"), ("cancelled", "cancelled"))
        check(how in known, job_id, "ended as", how, job["error"])
        check(job["attempt"] <= job["retries"] + 1, job_id, "had", job["attempt"], "attempts of", job["retries"] + 1)


def verify_ledger(stored: Stored, ledger: Ledger) -> None:
    check(not ledger.overlaps, "two scripts of one app at once:", ledger.overlaps[:5])
    for job_id, attempts in ledger.starts.items():
        job = stored.jobs[job_id]
        check(attempts == sorted(set(attempts)), "attempts of", job_id, "as they started:", attempts)
        check(attempts[0] >= 1 and attempts[-1] <= job["attempt"], "attempts of", job_id, attempts, "of", job["attempt"])
        check(len(attempts) <= job["retries"] + 1, "run again unasked:", job_id, attempts)
        check(len(ledger.ends[job_id]) == len(set(ledger.ends[job_id])), "ended twice:", job_id, ledger.ends[job_id])
    for job_id, job in stored.jobs.items():
        ran = (ledger.starts.get(job_id) or [0])[-1:], (ledger.ends.get(job_id) or [0])[-1:]
        check(job["status"] != "success" or ran == ([job["attempt"]],) * 2, job_id, "ended well, and its script", ran)


def verify_previous(stored: Stored, ledger: Ledger) -> None:
    """Each script found the release of the last success: what died between switch and report was undone."""
    good: dict[tuple[str, str], list[tuple[str, str]]] = collections.defaultdict(list)
    for job in stored.jobs.values():
        if job["status"] == "success":
            good[job["host"], job["app"]].append((job["completed_at"], job["commit"][:12]))
    for job_id, previous in ledger.previous.items():
        job = stored.jobs[job_id]
        before = [end for end in good[job["host"], job["app"]] if end[0] < (job["started_at"] or job["completed_at"])]
        expected = max(before)[1] if before else ""
        check(set(previous) == {expected}, job_id, "found", previous, "on its host, and the last success was", expected)


def verify_logs(stored: Stored) -> None:
    """What a script printed is stored once and in order; all of it where the job ended well."""
    logs = stored.logs()
    for (job_id, attempt), messages in logs.items():
        printed = [message for message in messages if message.startswith("line ")]
        expected = [f"line {number} of {job_id}.{attempt}" for number in range(LINES)]
        check(printed == expected[: len(printed)], "the log of", job_id, attempt, messages)
        job = stored.jobs[job_id]
        whole = (job["status"], job["attempt"]) != ("success", attempt) or printed == expected
        check(whole, "lines are missing of", job_id, attempt, messages)
    for job_id, job in stored.jobs.items():
        check(job["status"] != "success" or (job_id, job["attempt"]) in logs, "no log of", job_id)


def verify_hosts(apps: list[dict[str, Any]], agents: dict[str, Agent], ledger: Ledger) -> int:
    """What the controller says of a host, what `current` leads to, and what was activated last are the same; how many."""
    seen = 0
    for app in apps:
        for host in app["hosts"]:
            place = (host["hostname"], app["name"])
            if host["commit"] is None:
                continue
            current = agents[place[0]].active_commit(place[1])
            check(current == host["commit"][:12], place, "runs", current, "and the controller says", host["commit"])
            activated = ledger.active.get(place, host["commit"])
            check(activated == host["commit"], place, "activated", activated, "last, and `current` leads to", current)
            seen += 1
    return seen


def prove(proof: Proof) -> None:
    count = proof.options.agents or (20 if proof.full else 6)
    jobs = proof.options.jobs or (10_000 if proof.full else 120)
    hosts = [f"web-{number:02}" for number in range(1, count + 1)]
    repository = Repository(proof.folder / "source", -(-jobs // (count * len(APPS))), random.Random(f"{proof.seed} refs"))
    ledger, locks = proof.folder / "ledger", proof.folder / "locks"
    ledger.touch()
    locks.mkdir()
    common = {"repo": "myorg/app", "clone_url": f"file://{repository.folder}", "hosts": hosts}
    script, activate = ["./deploy.sh", str(ledger), str(locks)], ["./activate.sh", str(ledger)]
    apps = [{"name": APPS[0], **common, "deploy": script}, {"name": APPS[1], **common, "build": script, "activate": activate}]
    controller = proof.controller(apps={"apps": apps})
    proxy = Proxy(controller.port, proof.seed, proof.options.rate)
    slots = {host: 1 + number % 2 for number, host in enumerate(hosts)}  # half of the hosts run both apps at once
    agents = {host: Agent(proof.folder / "hosts", host, proxy.port, repository.env, "--slots", str(slots[host])) for host in hosts}
    for agent in agents.values():
        agent.launch()
    began = time.monotonic()
    load = Load(controller, hosts, repository.branches, jobs, proof.seed, 3 * 3600 if proof.full else 15)
    chaos = Chaos(controller, list(agents.values()), ledger, proof.seed, proof.options.pause or (8 if proof.full else 3))
    client = controller.client()

    def open_jobs() -> int:
        for failure in (load.failure, chaos.failure):
            if failure:
                raise failure
        with contextlib.suppress(*LOST):
            return sum(1 for status in ("pending", "running") for _ in client.jobs(status=status))
        return 1 << 30

    told = moved = time.monotonic()
    size = 0
    while not (load.done.is_set() and open_jobs() <= max(5, jobs // 50)):
        time.sleep(0.5)
        if ledger.stat().st_size > size:
            size, moved = ledger.stat().st_size, time.monotonic()
        check(
            time.monotonic() < moved + STANDSTILL, "no script has done anything for", STANDSTILL, "s;", open_jobs(), "jobs are open"
        )
        if time.monotonic() > told + 60:
            told = time.monotonic()
            proof.say(f"{len(load.created):,} jobs made, {sum(chaos.kills.values()):,} kills")
    chaos.stop()
    wait_for(lambda: open_jobs() == 0, 180, "the end of the last jobs")
    took = time.monotonic() - began
    for agent in agents.values():
        check(agent.poll() is None, "the agent of", agent.host, "ended by itself:", agent.said()[-1500:])
        agent.signal(signal.SIGTERM)
    shown = client.ok("GET", "/v1/apps")["apps"]
    for agent in agents.values():
        check(agent.wait(60) == 0, "the agent of", agent.host, "did not end well:", agent.said()[-1500:])
        check("Traceback" not in agent.said(), "a traceback in", agent.log)
    proxy.close()
    controller.kill()
    check("Traceback" not in controller.said(), "a traceback in", controller.log)
    stored, written = Stored(copy_of(controller.db, proof.folder / "copy")), Ledger(ledger)
    check(stored.integrity == ["ok"], "integrity_check:", stored.integrity)
    verify_jobs(stored, load.created)
    verify_ledger(stored, written)
    verify_previous(stored, written)
    verify_logs(stored)
    places = verify_hosts(shown, agents, written)
    ends = collections.Counter(f"{job['status']}" for job in stored.jobs.values())
    lost = sum(job["attempt"] - (job["status"] == "success") for job in stored.jobs.values() if job["status"] != "cancelled")
    most = sum(count * slots[host] for host, count in chaos.killed.items())
    check(lost <= most, lost, "attempts were lost, and the agents that were killed held", most, "at most")
    proof.figure("agents", count)
    proof.figure("jobs", len(stored.jobs))
    proof.figure("lost, run twice, two of one app at once", "0, 0, 0")
    for name, value in (*ends.items(), ("attempts that died with an agent", lost)):
        proof.figure(name, value)
    proof.figure("scripts started", sum(map(len, written.starts.values())))
    proof.figure("hosts and apps whose `current` was compared", places)
    for name, value in (*((f"kills of {who}", n) for who, n in chaos.kills.items()), *proxy.counts.items()):
        proof.figure(name, value)
    proof.figure("jobs a second", len(stored.jobs) / took)
    check(chaos.kills["agents"] and chaos.kills["controller"] and ends["success"], "too little happened to prove anything")


OPTIONS = (
    ("--agents", {"type": int, "help": "how many [6, 20]"}),
    ("--jobs", {"type": int, "help": "how many [120, 10000]"}),
    ("--rate", {"type": float, "default": 0.03, "help": "chance of a fault, a packet [0.03]"}),
    ("--pause", {"type": float, "help": "scripts between two kills, on average [3, 8]"}),
)

if __name__ == "__main__":
    sys.exit(run(prove, __doc__, *OPTIONS))
