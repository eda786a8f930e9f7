"""`make dist`: one file that serves everything alone, and what the plain file says when it stands alone."""

import ast
import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ["www/dashboard.html", "www/docs.html", "openapi.json", "agent.py", "ctl.py"]
START_LIMIT_S = 30


def build(target):
    return subprocess.run([sys.executable, ROOT / ".ci/dist", target], capture_output=True, text=True, check=False)


def get(port, path):
    """(status, headers, body)"""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()
    finally:
        connection.close()


@contextlib.contextmanager
def served(program, folder):
    """The port of a controller that runs `program` in `folder`, where nothing else is."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DEPLOYBOT_")}
    log = folder / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [sys.executable, program, "--open", "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            with contextlib.suppress(OSError):
                if get(port, "/health")[0] == 200:
                    break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The port of the built file, running in a folder of its own."""
    folder = tmp_path_factory.mktemp("alone")
    done = build(folder / "deploybot.py")
    assert done.returncode == 0, done.stderr
    with served(folder / "deploybot.py", folder) as port:
        yield port


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The port of deploybot.py as it is in the repository, copied without the files beside it."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copy(ROOT / "deploybot.py", folder)
    with served(folder / "deploybot.py", folder) as port:
        yield port


def as_pattern(page):
    """A pattern for `page` as it is served: each {{nonce}} a value."""
    parts = page.split("{{nonce}}")
    return re.escape(parts[0]) + "".join(f"(?P<n{i}>[A-Za-z0-9_+/=-]+)" + re.escape(p) for i, p in enumerate(parts[1:]))


SOURCES = [
    ("/", "www/dashboard.html"),
    ("/docs", "www/docs.html"),
    ("/redoc", "www/docs.html"),
    ("/openapi.json", "openapi.json"),
    ("/agent.py", "agent.py"),
    ("/ctl.py", "ctl.py"),
]


@pytest.mark.parametrize("path, source", SOURCES)
def test_one_file_serves_what_the_sources_say(alone, path, source):
    status, headers, body = get(alone, path)
    assert status == 200
    found = re.fullmatch(as_pattern((ROOT / source).read_text()), body)
    assert found, f"{path} differs from {source}"
    nonces = set(found.groupdict().values())
    assert len(nonces) <= 1
    assert all(f"'nonce-{nonce}'" in headers["Content-Security-Policy"] for nonce in nonces)


def test_one_file_names_the_programs_inside_it(alone, bare):
    programs = json.loads(get(alone, "/v1/programs")[2])["programs"]
    sources = {name: (ROOT / name).read_bytes() for name in ("agent.py", "ctl.py")}
    assert {one["name"]: one["sha256"] for one in programs} == {n: hashlib.sha256(d).hexdigest() for n, d in sources.items()}
    assert json.loads(get(bare, "/v1/programs")[2])["programs"] == []


def test_the_assets_are_all_there_and_the_file_is_python(tmp_path):
    assert build(tmp_path / "deploybot.py").returncode == 0
    tree = ast.parse((tmp_path / "deploybot.py").read_text())
    (value,) = [n.value for n in tree.body if isinstance(n, ast.AnnAssign) and n.target.id == "ASSETS"]
    assets = ast.literal_eval(value)
    assert list(assets) == ASSETS
    for name, text in assets.items():
        assert text.encode() == (ROOT / name).read_bytes(), name


def test_the_same_sources_give_the_same_bytes_ready_to_run(tmp_path):
    first, second = tmp_path / "a/deploybot.py", tmp_path / "b/deploybot.py"
    assert build(first).returncode == build(second).returncode == 0
    assert first.read_bytes() == second.read_bytes()
    assert stat.S_IMODE(first.stat().st_mode) == 0o755
    assert [p.name for p in first.parent.iterdir()] == ["deploybot.py"]


def test_a_missing_source_is_named_and_nothing_is_written(tmp_path):
    copy = tmp_path / "checkout"
    (copy / ".ci").mkdir(parents=True)
    (copy / "www").mkdir()
    for name in [".ci/dist", "deploybot.py", *ASSETS]:
        if name != "www/docs.html":
            shutil.copy(ROOT / name, copy / name)
    done = subprocess.run([sys.executable, copy / ".ci/dist"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "dist: www/docs.html: No such file or directory\n")
    assert not (copy / "dist").exists()


def test_a_built_file_is_no_source_for_another(tmp_path):
    copy = tmp_path / "checkout"
    (copy / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci/dist", copy / ".ci/dist")
    assert build(copy / "deploybot.py").returncode == 0
    done = subprocess.run([sys.executable, copy / ".ci/dist"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "exactly once" in done.stderr


def test_all_programs_are_there_with_sums_that_hold_and_the_same_again(tmp_path):
    def made(name):
        copy = tmp_path / name
        for source in [".ci/dist", "deploybot.py", "notify.py", *ASSETS]:
            (copy / source).parent.mkdir(parents=True, exist_ok=True)
            (copy / source).write_bytes((ROOT / source).read_bytes())
        done = subprocess.run([sys.executable, copy / ".ci/dist"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return {path.name: path for path in (copy / "dist").iterdir()}

    first, second = made("a"), made("elsewhere/b")
    programs = ["agent.py", "ctl.py", "deploybot.py", "notify.py"]
    assert sorted(first) == sorted(second) == sorted([*programs, "SHA256SUMS"])
    for name, path in first.items():
        assert path.read_bytes() == second[name].read_bytes(), name
        assert stat.S_IMODE(path.stat().st_mode) == (0o644 if name == "SHA256SUMS" else 0o755)
    for name in ("agent.py", "ctl.py", "notify.py"):
        assert first[name].read_bytes() == (ROOT / name).read_bytes()
    sums = [line.split("  ") for line in first["SHA256SUMS"].read_text().splitlines()]
    assert sums == [[hashlib.sha256(first[name].read_bytes()).hexdigest(), name] for name in programs]
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=first["SHA256SUMS"].parent, check=False).returncode == 0


@pytest.mark.parametrize("path, missing", SOURCES)
def test_the_plain_file_alone_says_which_file_is_missing(bare, path, missing):
    _, _, body = get(bare, path)
    assert missing in body
    assert get(bare, "/v1/hosts")[0] == 200


# -- the number --------------------------------------------------------------------------------------------------------


def version_in(program):
    (found,) = re.findall(r'^VERSION = "([0-9]+\.[0-9]+\.[0-9]+)"$', (ROOT / program).read_text(), re.M)
    return found


VERSION = version_in("deploybot.py")
PROGRAMS = {"deploybot.py": "deploybot", "agent.py": "agent.py", "ctl.py": "ctl.py", "notify.py": "notify.py"}


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_has_the_version_of_the_controller_and_says_it(program):
    assert version_in(program) == VERSION
    done = subprocess.run([sys.executable, ROOT / program, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{PROGRAMS[program]} {VERSION}\n")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_is_installed_calls_itself_by_that_name(tmp_path, program):
    name = f"deploybot-{program}".removesuffix(".py").removeprefix("deploybot-deploybot") or "deploybot"
    (tmp_path / name).symlink_to(ROOT / program)
    there = {"PATH": str(tmp_path)}

    def said(word):
        done = subprocess.run([sys.executable, tmp_path / name, word], capture_output=True, text=True, check=False, env=there)
        return done.stdout + done.stderr

    assert said("--version") == f"{name} {VERSION}\n" and said("--help").startswith(f"usage: {name} [")
    wrong = said("instal")
    assert name in wrong and program not in wrong


def test_the_package_reads_the_version_and_has_each_command():
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert about["project"]["dynamic"] == ["version"] and "version" not in about["project"]
    assert about["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "deploybot.deploybot.VERSION"}
    assert list(about["project"]["scripts"]) == ["deploybot", "deploybot-agent", "deploybot-ctl", "deploybot-notify"]
    assert "dependencies" not in about["project"], "the standard library is enough"


def test_the_version_is_that_of_the_api_document_and_of_the_changelog():
    assert json.loads((ROOT / "openapi.json").read_text())["info"]["version"] == VERSION
    entries = re.findall(r"^## \[(.+?)\] - (Unreleased|[0-9]{4}-[0-9]{2}-[0-9]{2})$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert entries[0][0] == VERSION
