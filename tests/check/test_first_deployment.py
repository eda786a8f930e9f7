"""The first deployment of README.md: its lines, typed into a copy of the checkout, against a controller that `make run` started."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request

from conftest import wait_for
from test_readme import ROOT, blocks, section

LIMIT_S = 60


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def in_another_terminal(line, folder, environment):
    """That line runs until the end of the block; Ctrl-C ends it as it would there."""
    with open(folder / "terminal.txt", "ab") as said:
        process = subprocess.Popen(
            ["sh", "-c", line], cwd=folder, env=environment, stdout=said, stderr=said, start_new_session=True
        )
    try:
        yield
        assert process.poll() is None, (folder / "terminal.txt").read_text()
        os.killpg(process.pid, signal.SIGINT)
        process.wait(LIMIT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def on_another_port(url):
    """The variables of the line about a port that is taken, with a free one."""
    line = section("README.md", "Install in three commands").strip().splitlines()[-1]
    given = dict(re.findall(r"(DEPLOYBOT_[A-Z]+)=([^ `]+)", line))
    assert given == {"DEPLOYBOT_PORT": "9180", "DEPLOYBOT_URL": "http://localhost:9180"}
    return {"DEPLOYBOT_PORT": url.rpartition(":")[2], "DEPLOYBOT_URL": url}


def test_the_first_deployment_of_the_readme(tmp_path):
    folder, url = tmp_path / "deploybot", f"http://127.0.0.1:{free_port()}"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DEPLOYBOT_", "MAKE", "MFLAGS"))}
    names = {f"GIT_{who}_{what}": "somebody@example.com" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    environment |= names | {"PYTHON": sys.executable, "HOME": str(tmp_path), "ARGS": "--host 127.0.0.1", **on_another_port(url)}

    def typed(text):
        text = text.replace("/tmp/hello", str(tmp_path / "hello")).replace("http://localhost:8080", url)
        done = subprocess.run(
            ["sh", "-euc", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def answers():
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200

    (install,) = blocks(section("README.md", "Install in three commands"), "sh")
    _, run, agent = (re.sub(r"\s+#.*", "", line) for line in install.splitlines())
    make, mapping, change, back = blocks(section("README.md", "A first deployment in five minutes"), "sh")
    with in_another_terminal(run, folder, environment):
        wait_for(answers, LIMIT_S)
        with in_another_terminal(agent, folder, environment):
            wait_for(lambda: "online" in typed("./ctl.py hosts"), LIMIT_S)
            typed(make)
            assert typed(mapping).endswith("\n<h1>Hello</h1>\n")
            typed(change)
            page = folder / "data/web-01/hello/current/index.html"
            wait_for(lambda: typed("./ctl.py deployments --status success").count("success") == 2, LIMIT_S)
            assert page.read_text() == "<h1>Helo</h1>\n"
            assert "locked" in typed(back)
            assert page.read_text() == "<h1>Hello</h1>\n"
            assert "locked" not in typed("./ctl.py apps")
    (clean,) = re.findall(r"`(rm -rf [^`;]+);", section("README.md", "A first deployment in five minutes"))
    typed(clean)
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert left - {"terminal.txt"} == set(tracked) and not (tmp_path / "hello").exists()
