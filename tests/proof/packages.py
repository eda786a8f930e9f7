"""What `pip install .` and `pipx install .` bring: the four commands, with the pages, from a wheel that needs no network.

A copy of the checkout is built into a wheel by setuptools, and that is installed into a fresh environment that holds nothing else.
There each command says its version, and the controller, started in an empty folder, answers /health and serves every page and
program. Nothing in it is random: the seed only names the run.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import urllib.request
import zipfile
from typing import Any

from common import READ_TOKEN, ROOT, TOKEN, Process, Proof, check, environment, free_port, run, wait_for

import deploybot

COMMANDS = ("deploybot", "deploybot-agent", "deploybot-ctl", "deploybot-notify")
SOURCES = ("deploybot.py", "agent.py", "ctl.py", "notify.py", "openapi.json", "www/dashboard.html", "www/docs.html")
PAGES = {"/": SOURCES[5], "/docs": SOURCES[6], "/openapi.json": SOURCES[4], "/agent.py": "agent.py", "/ctl.py": "ctl.py"}


def sh(*command: Any, cwd: pathlib.Path | None = None) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False, env=environment())
    check(done.returncode == 0, *command, "ended with", done.returncode, done.stdout, done.stderr)
    return done.stdout


def wheel_of(folder: pathlib.Path) -> pathlib.Path:
    """setuptools leaves its traces where it builds, so that is a copy."""
    copy = folder / "checkout"
    for name in ("pyproject.toml", "README.md", "LICENSE", *SOURCES):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    sh(sys.executable, "-m", "pip", "wheel", "--no-index", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, copy)
    (wheel,) = folder.glob("*.whl")
    return wheel


def installed(wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The folder of the commands."""
    sh(sys.executable, "-m", "venv", "--without-pip", folder)
    sh(sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--no-index", wheel)
    return folder / "bin"


def get(url: str, token: str = "") -> tuple[int, str]:
    asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(asked, timeout=10) as answer:
        return answer.status, answer.read().decode()


def serves(program: pathlib.Path, folder: pathlib.Path) -> None:
    folder.mkdir()
    (folder / "apps.yaml").write_text('{"apps": []}')
    port = free_port()
    argv = [program, "--host", "127.0.0.1", "--port", str(port)]
    controller = Process(
        argv, folder / "log", environment(token=TOKEN, agent_token="dbt_proof_agents", read_token=READ_TOKEN), folder
    )
    controller.launch()

    def healthy() -> Any:
        check(controller.poll() is None, "it ended:", controller.said())
        try:
            return get(f"http://127.0.0.1:{port}/health")
        except OSError:
            return None

    status, health = wait_for(healthy, 60, "/health")
    check(status == 200 and f'"version":"{deploybot.VERSION}"' in health.replace(" ", ""), "/health:", health)
    for path, name in PAGES.items():
        status, text = get(f"http://127.0.0.1:{port}{path}")
        parts = map(re.escape, (ROOT / name).read_text().split("{{nonce}}"))
        check(status == 200 and re.fullmatch("[A-Za-z0-9_+/=-]+".join(parts), text), path, "is not", name)
    check("deploybot_uptime_seconds" in get(f"http://127.0.0.1:{port}/metrics", READ_TOKEN)[1], "/metrics says nothing")
    controller.stop()


def prove(proof: Proof) -> None:
    wheel = wheel_of(proof.folder)
    check(wheel.name == f"deploybot-{deploybot.VERSION}-py3-none-any.whl", "the wheel is", wheel.name)
    inside = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    check(sorted(inside) == sorted(f"deploybot/{name}" for name in SOURCES), "it holds", inside)
    commands = installed(wheel, proof.folder / "fresh")
    for name in COMMANDS:
        said = sh(commands / name, "--version", cwd=proof.folder)
        check(said.split()[-1] == deploybot.VERSION, name, "--version says", said)
    serves(commands / "deploybot", proof.folder / "empty")
    proof.figure("wheel", f"{wheel.stat().st_size // 1024} KiB")
    proof.figure("commands", len(COMMANDS))
    proof.figure("pages", len(PAGES))


if __name__ == "__main__":
    sys.exit(run(prove, __doc__))
