"""A disk that is full, a file system that turns read-only, a database with flipped bytes.

Full: the database lies on a tmpfs of 12 MiB that is filled and emptied again and again under load. Every write is acknowledged
or answered 503 with Retry-After; reads, /health and streams go on; what was acknowledged is there, and the same process takes
writes again as soon as there is room. Read-only: an ext4 of its own whose kernel is told that it met an error (errors=remount-ro).
Flipped: each start of a damaged copy ends with one line that names the restore command, or serves, and never makes a new
database. Where mounting is not allowed the proof says so, and holds the lesser form. Short: 4 fillings, 80 damaged copies; full:
60 and 6,000.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import pathlib
import random
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from common import LOST, ROOT, Controller, LightAgent, Proof, check, run, wait_for

sys.path.insert(0, str(ROOT))
import deploybot

DISK = 12 << 20  # bytes
IMAGE = 24 << 20  # bytes: about the least that ext4 takes with a journal
LINE = "x" * 400


def can(*argv: Any) -> bool:
    """Whether that command went well."""
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(list(map(str, argv)), capture_output=True, check=False).returncode == 0
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Places that can be filled
# Owns: mounting and filling. Ignores: what lies there.


class Tmpfs:
    """A real one, of DISK bytes."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.filler = folder, folder / "filler"
        self.mounted = can("mount", "-t", "tmpfs", "-o", f"size={DISK},mode=0700", "tmpfs", folder)

    def fill(self, controller: Controller, slack: int) -> None:
        """All but `slack` bytes."""
        with open(self.filler, "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        size = self.filler.stat().st_size
        os.truncate(self.filler, max(0, size - slack))

    def empty(self, controller: Controller) -> None:
        self.filler.unlink()

    def close(self) -> None:
        if self.mounted:
            can("umount", "--lazy", self.folder)


class SizeLimit:
    """The lesser form: no file of the process may grow past its largest one. Without a mount there is no more to be had."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder

    def fill(self, controller: Controller, slack: int) -> None:
        largest = max(path.stat().st_size for path in self.folder.iterdir())
        resource.prlimit(controller.pid, resource.RLIMIT_FSIZE, (largest + slack, resource.RLIM_INFINITY))

    def empty(self, controller: Controller) -> None:
        resource.prlimit(controller.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def close(self) -> None:
        pass


class Ext4:
    """A file system in a file, which turns read-only at its first error."""

    def __init__(self, image: pathlib.Path, folder: pathlib.Path):
        self.image, self.folder = image, folder
        with open(image, "wb") as file:
            file.truncate(IMAGE)
        self.mounted = can("mkfs.ext4", "-q", image) and self.mount()

    def mount(self) -> bool:
        return can("mount", "-o", "loop,errors=remount-ro", self.image, self.folder)

    def fail(self) -> bool:
        """Tells the kernel of an error; whether the file system now refuses to be written."""
        source = subprocess.run(
            ["findmnt", "--noheadings", "--output", "SOURCE", self.folder], capture_output=True, text=True, check=False
        ).stdout.strip()
        with contextlib.suppress(OSError):
            pathlib.Path("/sys/fs/ext4", pathlib.Path(source).name, "trigger_fs_error").write_text("proof")
        try:
            (self.folder / "probe").touch()
        except OSError:
            return True
        return False

    def close(self) -> None:
        if self.mounted:
            can("umount", self.folder) or can("umount", "--lazy", self.folder)


# ---------------------------------------------------------------------------------------------------------------------
# Load
# Owns: calls, and what was acknowledged. Ignores: what is wrong with the disk.


class Load:
    """Writes of every kind, one after another."""

    def __init__(self, controller: Controller, chance: random.Random):
        self.controller, self.chance, self.client = controller, chance, controller.client()
        self.created: list[str] = []
        self.lines = 0  # acknowledged, of the one job that runs
        self.ended: set[str] = set()
        self.refused = self.taken = 0
        self.agent = LightAgent(controller.port, "web-01")
        check(self.agent.register()[0] == 200, "no agent")
        self.running = self.claim(self.create())

    def connect_anew(self) -> None:
        """After a restart: what was kept open is over."""
        for client in (self.client, self.agent.client):
            client.close()

    def create(self) -> str:
        job = self.client.ok("POST", "/v1/jobs", self.asked())["job"]
        self.created.append(job["id"])
        return job["id"]

    def asked(self) -> dict[str, Any]:
        return {"repo": "o/n", "ref": f"r{len(self.created)}", "host": "web-02", "metadata": {"text": LINE}, "force": True}

    def claim(self, job_id: str) -> dict[str, Any]:
        status, answer = self.client.call("POST", "/v1/jobs", {"repo": "o/runs", "ref": "main", "host": "web-01"})
        check(status == 201, status, answer)
        self.created.append(answer["job"]["id"])
        job = self.agent.beat()[1]["job"]
        check(job and job["id"] == answer["job"]["id"], "no job for the agent")
        return job

    def write(self) -> int:
        """One write; its status, which is 2xx or a 503 that says when to come again."""
        path, body, done = self.chance.choice((self.one_job, self.one_upload, self.one_upload, self.one_cancel))()
        client = self.agent.client if path.endswith("/logs") else self.client
        status, headers, data = client.raw("POST", path, body)
        answer = json.loads(data)
        if 200 <= status < 300:
            self.taken += 1
            done(answer)
            return status
        check(status == 503, "a write was answered", status, answer)
        check(re.fullmatch("[0-9]+", headers.get("Retry-After", "")), "503 without Retry-After", dict(headers))
        check(headers["Content-Type"] == "application/problem+json" and answer["status"] == 503, answer)
        self.refused += 1
        return status

    def one_job(self) -> Any:
        return "/v1/jobs", self.asked(), lambda answer: self.created.append(answer["job"]["id"])

    def one_upload(self) -> Any:
        lines = [{"message": f"{self.lines + i} {LINE}"} for i in range(self.chance.randrange(1, 40))]
        body = {"attempt": self.running["attempt"], "offset": self.lines, "lines": lines}
        return f"/v1/jobs/{self.running['id']}/logs", body, self.stored

    def stored(self, answer: dict[str, Any]) -> None:
        self.lines = answer["next_offset"]

    def one_cancel(self) -> Any:
        open_ones = [job_id for job_id in self.created if job_id not in self.ended and job_id != self.running["id"]]
        if not open_ones:
            return self.one_job()
        job_id = self.chance.choice(open_ones)
        return f"/v1/jobs/{job_id}/cancel", None, lambda answer: self.ended.add(job_id)

    def reads(self) -> None:
        """What must go on, whatever the disk does."""
        for path in ("/health", "/v1/jobs?limit=1000", "/v1/hosts", "/v1/apps", "/metrics", "/"):
            status, _, data = self.client.raw("GET", path)
            check(status == 200, path, "answered", status, data[:300])
        health = self.client.ok("GET", "/health")
        check((health["status"], health["database"]) == ("ok", "ok"), health)
        job_id = self.chance.choice(self.created)
        check(self.client.ok("GET", f"/v1/jobs/{job_id}")["job"]["id"] == job_id, "a job that was acknowledged is not there")
        status, answer = self.agent.beat([(self.running["id"], self.running["attempt"])])
        check(status == 200 and answer["acknowledged"], "a heartbeat with nothing to write was answered", status, answer)
        with stream(self.controller, "/v1/logs/stream?tail=1") as events:
            check(events.readline().startswith(b"retry:"), "a new stream says nothing")

    def verify(self) -> None:
        """All that was acknowledged is there, once."""
        stored = {job["id"]: job for job in self.client.jobs()}
        missing = [job_id for job_id in self.created if job_id not in stored]
        check(not missing, len(missing), "acknowledged jobs are not there:", missing[:3])
        check(all(stored[job_id]["status"] == "cancelled" for job_id in self.ended), "a cancel was acknowledged and is not there")
        lines = self.client.lines(self.running["id"])
        numbers = [int(line["message"].split()[0]) for line in lines]
        check(numbers[: self.lines] == list(range(self.lines)), "acknowledged lines are missing, twice or out of order")


@contextlib.contextmanager
def stream(controller: Controller, path: str) -> Iterator[Any]:
    connection = http.client.HTTPConnection("127.0.0.1", controller.port, timeout=60)
    connection.request("GET", path, headers={"Authorization": f"Bearer {controller.token}"})
    answer = connection.getresponse()
    check(answer.status == 200, path, "answered", answer.status)
    try:
        yield answer
    finally:
        connection.close()


class Reader:
    """A stream that is open from the beginning to the end, and counts what it brings."""

    def __init__(self, controller: Controller):
        self.jobs: set[str] = set()
        self.ended: str | None = None
        self.controller = controller
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self) -> None:
        try:
            with stream(self.controller, "/v1/logs/stream?tail=0") as answer:
                for line in answer:
                    if line.startswith(b"data: ") and b'"created_at"' in line:
                        self.jobs.add(json.loads(line[6:])["id"])
            self.ended = "ended"
        except LOST as error:
            self.ended = repr(error)


def whole(path: pathlib.Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        found = db.execute("PRAGMA integrity_check").fetchall()
    check(found == [("ok",)], "integrity_check says", found[:3])


# ---------------------------------------------------------------------------------------------------------------------
# The three proofs


def loudly(proof: Proof, what: str) -> None:
    print(f"\n!!!! {what}\n", flush=True)
    proof.figure("LESSER FORM", what)


def full_disk(proof: Proof) -> None:
    folder = proof.folder / "full"
    (folder / "data").mkdir(parents=True)
    place: Any = Tmpfs(folder / "data")
    if not place.mounted:
        loudly(proof, "no tmpfs could be mounted here: RLIMIT_FSIZE of the process stands for the full disk")
        place = SizeLimit(folder / "data")
    try:
        controller = Controller(folder, log_level="ERROR" if proof.full else None)
        controller.settings["log_limit"] = "1GiB"
        fill_and_empty(proof, place, controller.start())
    finally:
        place.close()


def fill_and_empty(proof: Proof, place: Any, controller: Controller) -> None:
    chance = proof.chance
    reader, load, pid = Reader(controller), Load(controller, chance), controller.pid
    recovered: list[float] = []
    rounds = 60 if proof.full else 4
    for _ in range(rounds):
        for _ in range(chance.randrange(5, 25)):
            load.write()
        place.fill(controller, chance.choice((0, 0, 4096, 20_000, 100_000)))
        in_a_row, tried = 0, 0
        while in_a_row < 12:
            in_a_row = in_a_row + 1 if load.write() == 503 else 0
            tried += 1
            check(tried < 3000, "the disk is full, and writes are taken")
        load.reads()
        check(reader.ended is None, "an open stream was ended:", reader.ended)
        place.empty(controller)
        started = time.monotonic()
        wait_for(lambda: load.write() != 503, 20, "a write that is taken once there is room")
        recovered.append(time.monotonic() - started)
        check(controller.poll() is None and controller.pid == pid, "it did not live through it")
    load.verify()
    wait_for(lambda: set(load.created[2:]) <= reader.jobs, 30, "every acknowledged job on the open stream")
    proof.figure("fillings", rounds)
    proof.figure("writes taken", load.taken)
    proof.figure("writes answered 503", load.refused)
    proof.figure("longest way back", f"{max(recovered) * 1000:.0f} ms")
    kill_on_full_disk(proof, place, controller, load)
    check(controller.stop() == 0, "it did not stop as it should")
    whole(controller.db)
    check("Traceback" not in controller.said(), "a traceback in the log:", controller.said()[-3000:])


def kill_on_full_disk(proof: Proof, place: Any, controller: Controller, load: Load) -> None:
    """Killed while the disk is full; a start there serves or ends with one line, and with room all is there."""
    place.fill(controller, 0)
    wait_for(lambda: load.write() == 503, 20, "a full disk")
    controller.kill()
    if isinstance(place, Tmpfs):
        before = controller.begin()
        wait_for(lambda: controller.poll() is not None or " listens on " in controller.said(before), 60, "a start or its end")
        if controller.poll() is not None:
            one_line(controller.said(before))
        proof.figure("a start on a full disk", "serves" if controller.poll() is None else "ends with one line")
        controller.kill()
        place.empty(controller)
    controller.start()
    load.connect_anew()
    load.verify()


def one_line(said: str) -> None:
    lines = [line for line in said.splitlines() if " WARNING " not in line and " INFO " not in line]
    check(len(lines) == 1 and lines[0].startswith("deploybot.py: "), "it ended with", lines or "nothing")
    check("Traceback" not in said, said)


def read_only(proof: Proof) -> None:
    folder = proof.folder / "readonly"
    (folder / "data").mkdir(parents=True)
    disk = Ext4(folder / "image", folder / "data")
    if not disk.mounted:
        loudly(proof, "no ext4 could be mounted here: that a file system turns read-only is not proved")
        return
    try:
        controller = Controller(folder).start()
        reader, load = Reader(controller), Load(controller, proof.chance)
        for _ in range(40):
            load.write()
        if not disk.fail():
            loudly(proof, "the kernel here takes no trigger_fs_error: that a file system turns read-only is not proved")
            return
        refused = [load.write() for _ in range(30)]
        check(set(refused) == {503}, "on a read-only file system writes are answered", set(refused))
        load.reads()
        check(reader.ended is None, "an open stream was ended:", reader.ended)
        proof.figure("read-only: writes answered 503", len(refused))
        check(controller.stop() == 0, "it did not stop as it should")
        before = controller.begin()
        check(controller.wait(60) == 1, "it started on a read-only file system")
        one_line(controller.said(before))
        proof.figure("read-only: a start says", controller.said(before).strip().partition(": database ")[2])
        check(can("umount", disk.folder), "umount")
        can("e2fsck", "-y", disk.image)
        check(disk.mount(), "mount")
        controller.start()
        load.connect_anew()
        load.verify()
        check(load.write() < 300, "no write after the repair")
        controller.stop()
        whole(controller.db)
        check("Traceback" not in controller.said(), "a traceback in the log:", controller.said()[-3000:])
    finally:
        for process in list(Controller.started):
            process.kill()
        disk.close()


def flip(raw: bytearray, chance: random.Random) -> str:
    """Damages it in one of the ways that disks and people have; which."""
    pages = len(raw) // 4096
    kind = chance.choice(
        ("a byte", "a byte", "16 bytes", "header", "head of a page", "zeroed page", "swapped pages", "cut", "tail")
    )
    if kind == "a byte":
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    elif kind == "16 bytes":
        for _ in range(16):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
    elif kind == "header":
        raw[chance.randrange(100)] = chance.randrange(256)
    elif kind == "head of a page":
        raw[chance.randrange(pages) * 4096 + chance.randrange(12)] = chance.randrange(256)
    elif kind == "zeroed page":
        at = chance.randrange(pages) * 4096
        raw[at : at + 4096] = bytes(4096)
    elif kind == "swapped pages":
        a, b = (chance.randrange(pages) * 4096 for _ in range(2))
        raw[a : a + 4096], raw[b : b + 4096] = raw[b : b + 4096], raw[a : a + 4096]
    elif kind == "cut":
        del raw[chance.randrange(1, len(raw)) :]
    else:
        raw[len(raw) - 512 * chance.randrange(1, 16) :] = b""
    return kind


PATHS = ("/health", "/v1/jobs?limit=1000", "/v1/hosts", "/v1/apps", "/v1/tokens", "/v1/audit", "/metrics")


def ask_all(port: int, job_ids: list[str]) -> dict[str, int]:
    """Path to status, of every kind of call."""
    found: dict[str, int] = {}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    calls: list[tuple[str, str, Any]] = [("GET", path, None) for path in PATHS]
    calls += [("GET", f"/v1/jobs/{job_id}{end}", None) for job_id in job_ids for end in ("", "/logs")]
    calls += [("POST", "/v1/jobs", {"repo": "o/new", "ref": "main", "host": "web-09"})]
    calls += [("POST", f"/v1/jobs/{job_id}/cancel", None) for job_id in job_ids]
    calls += [("POST", "/v1/agents/register", {"hostname": "web-01"})]
    for method, path, body in calls:
        connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        found[f"{method} {path}"] = answer.status
    return found


def serve_damaged(folder: pathlib.Path, job_ids: list[str]) -> int:
    """In a child of its own: what `deploybot.py` does with that database; the exit code. What it answered goes to a file."""
    os.chdir(folder)
    start = deploybot.Daemon.start

    def asked(daemon: Any) -> None:
        start(daemon, 0.01)

        def ask() -> None:
            try:
                pathlib.Path("answers").write_text(json.dumps(ask_all(daemon.port, job_ids)))
            finally:
                os.kill(os.getpid(), 15)

        threading.Thread(target=ask, daemon=True).start()

    deploybot.Daemon.start = asked
    return deploybot.main(["--host", "127.0.0.1", "--port", "0", "--open", "--db", "damaged.db", "--log-level", "INFO"])


def damaged(proof: Proof) -> None:
    base, job_ids = make_base(proof)
    outcomes: dict[str, int] = {}
    for number in range(6000 if proof.full else 80):
        chance = random.Random(f"{proof.seed}-{number}")
        raw = bytearray(base)
        kind = flip(raw, chance)
        folder = proof.folder / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "damaged.db").write_bytes(raw)
        (folder / "apps.yaml").write_text("{}")
        # Every second one as if it were too large to be read at the start.
        deploybot.CHECKED_AT_START = 256 << 20 if number % 2 else 0
        outcome = one_start(folder, job_ids, f"copy {number} ({kind})")
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    for outcome, count in sorted(outcomes.items()):
        proof.figure(f"damaged: {outcome}", count)
    check(len(outcomes) > 1, "all had the same outcome: nothing is proved")


def one_start(folder: pathlib.Path, job_ids: list[str], name: str) -> str:
    child = os.fork()
    if not child:
        code = 99
        try:
            log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = serve_damaged(folder, job_ids)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = (folder / "log").read_text(errors="replace")
    check("new database is made" not in said, name, "was made anew:", said)
    check(code in (0, 1), name, "ended with", code, said[-2000:])
    if code == 1:
        one_line(said)
        check("damaged.db" in said, name, said)
        return "refused at the start"
    answers = json.loads((folder / "answers").read_text())
    # A letter of a stored text may change without SQLite noticing. The one call that reads a text of JSON which is none any more
    # answers 500, and the log says why; so does a write into an index that is wrong, where nothing was checked at the start.
    known = ("json.decoder.JSONDecodeError", *(() if deploybot.CHECKED_AT_START else ("sqlite3.IntegrityError",)))
    causes = re.findall(r"^([\w.]+(?:Error|Exception)\b.*)$", said, re.MULTILINE)
    check(all(cause.startswith(known) for cause in causes), name, "failed by", causes, said[-3000:])
    check(len(causes) == said.count("Traceback"), name, said[-3000:])
    fine = (200, 201, 404, 409, 503, *((500,) if causes else ()))
    wrong = {path: status for path, status in answers.items() if status not in fine}
    check(not wrong, name, "answered", wrong, said[-3000:])
    check(answers["GET /health"] in (200, 503), name, answers)
    return "serves" + (", some calls 503" if 503 in answers.values() else "") + (", a text is spoilt: 500" if causes else "")


def make_base(proof: Proof) -> tuple[bytes, list[str]]:
    """A database with some of everything, at rest; and the ids of a few jobs."""
    controller = proof.controller(name="base")
    client, agent = controller.client(), LightAgent(controller.port, "web-01")
    agent.register()
    ids = []
    for i in range(60):
        body = {"repo": "o/n", "ref": f"r{i}", "host": f"web-0{i % 3 + 1}", "metadata": {"n": i}}
        ids.append(client.ok("POST", "/v1/jobs", body)["job"]["id"])
    for i in range(12):
        job = agent.beat()[1]["job"]
        for batch in range(4):
            agent.logs(job, batch * 20, [f"{batch} {line} {LINE[:80]}" for line in range(20)])
        if i < 11:
            agent.result(job, "success" if i % 2 else "failed", commit="a" * 40)
    client.ok("POST", "/v1/tokens", {"role": "viewer"})
    controller.stop()
    return controller.db.read_bytes(), ids[:2] + ids[-2:] + [ids[33]]


PARTS: dict[str, Callable[[Proof], None]] = {"full": full_disk, "readonly": read_only, "damaged": damaged}


def prove(proof: Proof) -> None:
    for name, part in PARTS.items():
        if proof.options.only in (None, name):
            proof.say(name)
            part(proof)


if __name__ == "__main__":
    sys.exit(run(prove, __doc__, ("--only", {"choices": list(PARTS), "help": "one of the three alone"})))
