"""The take-over of docs/capacity.md under two real systemds: every line of it, with the units as they are shipped.

The first machine is installed by the lines of docs/install.md and docs/capacity.md, gets jobs, and is gone. The second one, whose
controller never ran, takes over by the lines of "Take over" and goes on replicating. Held: both units are active and of one user,
Litestream starts ahead of the controller and stops after it, what was replicated is there, and belongs to the controller; what the
controller wrote while it stopped is in the replica. Changed in the lines: the replica is a folder, not a bucket. Where this
machine allows no systemd of its own, it says so and ends (see units.py). The Litestream is 0.5.17, that of PyPI.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Set

from common import ROOT, Proof, check, run, wait_for
from litestream import programs
from units import Machine, block, installed

CAPACITY = "docs/capacity.md"
REPLICA = "/srv/replica"


def prepared(machine: Machine, program: pathlib.Path) -> str:
    """The controller as docs/install.md installs it, Litestream as docs/capacity.md does; the admin's token."""
    token = installed(machine)
    shutil.copy(program, machine.root / "root/new/litestream")
    for name in ("litestream.yml", "litestream.service"):
        shutil.copy(ROOT / "examples" / name, machine.root / "root/new")
    machine.do(
        re.sub(r"s3://BUCKET/deploybot", f"file://{REPLICA}/deploybot", block("Set it up", "LITESTREAM_ACCESS_KEY_ID", CAPACITY))
    )
    dropin = machine.root / "etc/systemd/system/litestream.service.d/proof.conf"
    dropin.parent.mkdir()
    dropin.write_text(f"[Service]\nReadWritePaths={REPLICA}\n")
    machine.do(f"mkdir --mode=1777 {REPLICA}; systemctl daemon-reload")
    return token


def jobs(machine: Machine, token: str) -> dict[str, str]:
    """Ref to status."""
    return {job["ref"]: job["status"] for job in json.loads(machine.ask("/v1/jobs?limit=1000", token)[1])["jobs"]}


def ask_for(machine: Machine, token: str, ref: str) -> None:
    body = json.dumps({"repo": "me/it", "ref": ref, "host": "web-01"})
    status, said = machine.ask("/v1/jobs", token, f"-d '{body}' -H 'Content-Type: application/json'")
    check(status == 201, "a job:", status, said)


def files(machine: Machine) -> set[pathlib.Path]:
    return {path for path in (machine.root / REPLICA[1:]).rglob("*") if path.is_file()}


def replicates(machine: Machine, before: Set[pathlib.Path] = frozenset()) -> None:
    """Since there were these files. Litestream sends nothing at a stop in its first second."""
    for unit in ("litestream", "deploybot"):
        check(machine.do(f"systemctl is-active {unit}").strip() == "active", unit, "is not active")
    users = {
        machine.do(f"ps -o uid= -p $(systemctl show {unit} -p MainPID --value)").strip() for unit in ("litestream", "deploybot")
    }
    check(len(users) == 1 and 61184 <= int(*users) <= 65519, "the units have the users", users)
    owners = machine.do("find /var/lib/private/deploybot -printf '%U %P\\n'")
    check({line.split()[0] for line in owners.splitlines()} == users, "in the folder of the database:", owners)
    wait_for(lambda: files(machine) - before, 20, "a replica")


def stopped_in_order(machine: Machine) -> None:
    machine.do("systemctl stop deploybot litestream")
    said = machine.do("journalctl --no-pager -o cat _PID=1")
    first, second = (said.rindex(f"Stopped {unit}") for unit in ("deploybot.service", "litestream.service"))
    check(first < second, "Litestream was stopped ahead of the controller")
    first, second = (said.rindex(f"Started {unit}") for unit in ("litestream.service", "deploybot.service"))
    check(first < second, "Litestream was started behind the controller")


def booted(folder: pathlib.Path) -> Machine:
    """Raises OSError where this machine allows none."""
    folder.mkdir()
    machine = Machine(folder)
    try:
        return machine.start()
    except BaseException:
        with contextlib.suppress(AttributeError):
            machine.end()
        raise


def prove(proof: Proof) -> None:
    found = programs()
    program = found[max(found)]
    machines: list[Machine] = []
    try:
        try:
            machines.append(booted(proof.folder / "one"))
        except OSError as error:
            proof.figure("not run", f"this machine allows no systemd of its own: {error}")
            return
        one = machines[0]
        token = prepared(one, program)
        said = one.do(block("Set it up", "systemctl enable litestream", CAPACITY))
        check(said.startswith("active\nactive\n"), "after the lines of the document:", said)
        replicates(one)
        ask_for(one, token, "replicated")
        stopped_in_order(one)
        before = files(one)
        one.do("systemctl start deploybot")
        ask_for(one, token, "of-the-second-start")
        replicates(one, before)
        proof.say("the first machine replicates")
        one.do("systemctl stop deploybot litestream")  # its replica is complete, and it does not come back
        shutil.copytree(one.root / REPLICA[1:], proof.folder / "replica")
        shutil.copytree(one.root / "etc/deploybot", proof.folder / "etc")
        machines.pop().end()

        two = booted(proof.folder / "two")
        machines.append(two)
        prepared(two, program)
        two.do("systemctl disable --now deploybot; rm -rf /var/lib/deploybot /var/lib/private/deploybot")  # it never ran
        for source, target in (("etc", "etc/deploybot"), ("replica", REPLICA[1:])):
            shutil.rmtree(two.root / target)
            shutil.copytree(proof.folder / source, two.root / target)
        two.do(f"chmod 1777 {REPLICA}")
        before = files(two)
        begun = time.monotonic()
        two.do(block("Take over", "litestream restore", CAPACITY))
        wait_for(lambda: two.ask("/health")[0] == 200, 30, "the controller on the second machine")
        proof.figure("from the first line to a healthy controller", f"{time.monotonic() - begun:.1f} s")
        check(jobs(two, token) == {"replicated": "cancelled", "of-the-second-start": "cancelled"}, "there are", jobs(two, token))
        replicates(two, before)
        check((two.root / "srv/replica/deploybot-2").is_dir(), "the second machine replicates to the place of the first")
        ask_for(two, token, "after-the-move")
        stopped_in_order(two)
        restored = two.do(
            "set -a; . /etc/deploybot/litestream.env\n"
            "litestream restore -config /etc/litestream.yml -o /root/again.db /var/lib/deploybot/deploybot.db\n"
            "/usr/bin/python3 -c \"import sqlite3; print(sqlite3.connect('/root/again.db')"
            ".execute('SELECT count(*) FROM jobs').fetchone()[0])\""
        )
        check(restored.split()[-1] == "3", "the replica of the second machine has", restored)
        proof.figure("Litestream", two.do("litestream version").strip())
        proof.figure("systemd", two.do("systemctl --version").split("\n", 1)[0])
    except BaseException:
        for machine in machines:
            with contextlib.suppress(Exception):
                print(machine.do("journalctl --no-pager | tail -n 60"))
        raise
    finally:
        for machine in machines:
            machine.end()


if __name__ == "__main__":
    sys.exit(run(prove, __doc__))
