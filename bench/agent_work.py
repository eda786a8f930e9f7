"""Measurements of agent.py: a script with very much output.

Owns: one real agent, a repository and an app for it. Ignores: how the output gets there.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import subprocess
import sys
import time

from machine import LOCALHOST, MIB, TOKEN, Client, Controller, Process, Wrong, environment, memory, wait_for
from setting import Setting

HOST = "loud.example.com"
PRINTER = """import sys
size, lines = int(sys.argv[1]), int(sys.argv[2])
pad = b" " + b"x" * (size - 12) + b"\\n"
for first in range(0, lines, 1000):
    sys.stdout.buffer.write(b"".join(b"%010d" % number + pad for number in range(first, min(lines, first + 1000))))
"""
LIMIT = 900.0  # seconds for all of the output


def output(setting: Setting) -> None:
    """MB/s through the agent into the controller, what the agent holds of it in memory and on disk, and every line."""
    loud(setting, "output", setting.scale.line_size, setting.scale.output, 50.0)
    loud(setting, "output_short_lines", 100, max(1, setting.scale.output // 10), None)


def repository(folder: pathlib.Path) -> pathlib.Path:
    """A git repository with the script."""
    path = folder / "loud"
    path.mkdir(exist_ok=True)
    (path / "loud.py").write_text(PRINTER)
    identity = ["-c", "user.name=bench", "-c", "user.email=bench@example.com"]
    for command in (["init", "--quiet", "--initial-branch=main"], ["add", "."], [*identity, "commit", "--quiet", "--message=loud"]):
        subprocess.run(["git", "-C", str(path), *command], check=True, capture_output=True)
    return path


def loud(setting: Setting, name: str, size: int, megabytes: int, at_least: float | None) -> None:
    lines = megabytes * 1_000_000 // size
    path = setting.databases.empty()
    folder = path.parent
    command = [sys.executable, "loud.py", str(size), str(lines)]
    app = {"name": "loud", "repo": "myorg/loud", "clone_url": f"file://{repository(folder)}", "hosts": [HOST], "deploy": command}
    apps = folder / "apps.yaml"
    apps.write_text(json.dumps({"apps": [app]}))
    with Controller(setting.program, path, apps, "--log-limit", "100GiB") as controller:
        with contextlib.closing(Client(controller.port, timeout=LIMIT)) as client:
            seen = deployed(setting, controller, client, folder)
            stored, is_whole = check_lines(client, seen["job"], size, lines)
    setting.databases.remove(path)
    work = f"agent: {megabytes:,} MB of output in lines of {size} bytes"
    failed = "" if is_whole else f"{stored:,} of {lines:,} lines arrived"
    setting.row(name, work, megabytes / seen["seconds"], "MB/s", at_least=at_least, failed=failed)
    grown = (seen["peak"] - seen["before"]) / MIB
    setting.row(f"{name}_memory", f"{work}: memory of the agent up by", grown, "MiB", at_most=20.0, detail=seen)
    spool = seen["spool"] / MIB
    setting.row(f"{name}_spool", f"{work}: on the host's disk at most", spool, "MiB", at_most=max(128.0, megabytes / 4))


def deployed(setting: Setting, controller: Controller, client: Client, folder: pathlib.Path) -> dict[str, float]:
    """The job is done; seconds from the script's start to the end of the job at the controller, bytes of the agent's memory before
    and at most, and of its spool at most."""
    work = folder / "work"
    env = environment(agent_token=TOKEN)
    argv = [sys.executable, setting.agent, "--url", f"http://{LOCALHOST}:{controller.port}", "--hostname", HOST, "--workdir", work]
    agent = Process([*argv, "--git-protocols", "file"], folder / "agent.log", folder, env)
    wait_for(lambda: any(host["agent_id"] for host in client.ok("GET", "/v1/hosts")["hosts"]), 30.0, "an agent that has registered")
    before, spool = memory(agent.pid)[0], 0
    asked = {"repo": "myorg/loud", "ref": "main", "host": HOST, "app": "loud"}
    job = client.ok("POST", "/v1/jobs", asked)["job"]["id"]
    deadline = time.monotonic() + LIMIT
    while (now := client.ok("GET", f"/v1/jobs/{job}")["job"])["status"] in ("pending", "running"):
        spool = max(spool, spooled(work))
        if agent.is_over() or time.monotonic() > deadline:
            raise Wrong(f"the agent did not get through: {agent.said()}")
        time.sleep(0.05)
    peak = memory(agent.pid)[1]
    agent.stop()
    if now["status"] != "success":
        raise Wrong(f"the script with much output ended as {now['status']} ({now['reason']}): {now['error']}")
    return {"job": job, "seconds": took(now), "before": before, "peak": peak, "spool": spool}


def took(job: dict[str, str]) -> float:
    start, end = (datetime.datetime.fromisoformat(job[name]) for name in ("started_at", "completed_at"))
    return (end - start).total_seconds()


def spooled(work: pathlib.Path) -> int:
    """Bytes that the agent keeps of output that is on its way."""
    found = 0
    for folder, _, names in os.walk(work / ".agent"):
        for name in names:
            with contextlib.suppress(OSError):
                found += os.stat(os.path.join(folder, name)).st_blocks * 512
    return found


def check_lines(client: Client, job: str, size: int, lines: int) -> tuple[int, bool]:
    """(how many lines of the script are there, whether these are all, in their order)."""
    answer = client.raw("GET", f"/v1/jobs/{job}/logs", Accept="text/plain")
    found, is_whole = 0, True
    for line in answer:
        if line[:10].isdigit() and len(line) == size:
            is_whole = is_whole and int(line[:10]) == found
            found += 1
    return found, is_whole and found == lines
