"""docs/capacity.md: the lines for more than one controller, and for what waited at a take-over, run as they stand."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import pytest

import deploybot

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TEXT = (ROOT / "docs/capacity.md").read_text()
COMMIT = "0123456789abcdef" * 2 + "01234567"


def blocks(language, mark):
    found = [block for block in re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.M | re.S) if mark in block]
    assert found, mark
    return found


def shell(script, folder, **environment):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("DEPLOYBOT_")}
    plain |= {"HOME": str(folder), "NO_COLOR": "1", "PATH": f"{folder}:{os.environ['PATH']}", **environment}
    done = subprocess.run(["sh", "-euc", script], cwd=folder, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (script, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture
def folder(tmp_path):
    """Where somebody stands who has ctl.py and deploybot.py."""
    for name in ("ctl.py", "deploybot.py"):
        (tmp_path / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / name}" "$@"\n')
        (tmp_path / name).chmod(0o755)
    return tmp_path


@pytest.fixture
def pair(make_controller, folder):
    """The two controllers of the document, each with its apps.yaml."""
    made = {}
    (folder / ".config/deploybot").mkdir(parents=True)
    for name, text in zip(("eu", "us"), blocks("yaml", "hosts: [web-01."), strict=True):
        (folder / f"{name}.yaml").write_text(text)
        secret = f"secret-of-{name}"
        made[name] = make_controller(name=name, apps=text, open=False, token=f"dbt_{name}", webhook_secret=secret)
        (folder / ".config/deploybot" / name).write_text(f"dbt_{name}\n")
        (folder / f"{name}.url").write_text(made[name].url)
    return made


def here(script):
    """With the URLs of the test."""
    assert "https://deploy-$name.example.com" in script
    return script.replace("https://deploy-$name.example.com", '"$(cat "$name.url")"')


def hosts_of(controller):
    return sorted(job["host"] for job in controller.ok("GET", "/v1/jobs")["jobs"])


def push(controller, name, delivery):
    body = json.dumps({
        "ref": "refs/heads/main", "before": "0" * 40, "after": COMMIT, "deleted": False, "created": False, "forced": False,
        "head_commit": {"id": COMMIT, "message": "a change", "author": {"name": "Alice"}, "timestamp": "2026-11-23T13:13:37Z"},
        "repository": {"full_name": "myorg/web-frontend", "default_branch": "main", "pushed_at": 1_790_000_000},
        "pusher": {"name": "alice"},
    }).encode()  # fmt: skip
    signature = "sha256=" + hmac.new(f"secret-of-{name}".encode(), body, hashlib.sha256).hexdigest()
    headers = {"X-GitHub-Event": "push", "X-GitHub-Delivery": delivery, "X-Hub-Signature-256": signature, "Authorization": None}
    return controller.call("POST", "/v1/webhooks/github", body, headers)


def test_one_push_to_both_controllers_deploys_on_the_hosts_of_each(pair):
    for name, controller in pair.items():
        status, answer = push(controller, name, "11111111-2222-3333-4444-555555555555")
        assert status in (200, 202), answer
    assert hosts_of(pair["eu"]) == ["web-01.eu.example.com", "web-02.eu.example.com"]
    assert hosts_of(pair["us"]) == ["web-01.us.example.com"]
    assert push(pair["us"], "eu", "21111111-2222-3333-4444-555555555555")[0] == 401, "the secret of the other one"


def test_ctl_speaks_to_each(pair, folder):
    (script,) = blocks("sh", "on eu deploy")
    said = shell(here(script), folder)
    assert hosts_of(pair["eu"]) == ["web-01.eu.example.com"] and hosts_of(pair["us"]) == []
    assert "web-02.eu.example.com" in said and "web-01.us.example.com" in said


def test_everywhere_is_one_controller_after_the_other(pair, folder):
    """The second is asked after the first is done, and not at all where that one failed."""
    functions = here(blocks("sh", "on eu deploy")[0].partition("on eu deploy")[0])
    (script,) = blocks("sh", "everywhere()")
    agents = {host: (c, c.register(host)) for c in pair.values() for host in c.daemon.apps.all[0].hosts}
    order, code = [], {"status": "success"}

    def deploys(host, c, agent):
        job = c.beat(agent, wait=20)["job"]
        if job:
            order.append(host)
            c.ok("POST", f"/v1/jobs/{job['id']}/result", {"attempt": 1, **code})

    for expected in (True, False):
        threads = [threading.Thread(target=deploys, args=(host, *of)) for host, of in agents.items() if expected or ".eu." in host]
        for thread in threads:
            thread.start()
        shell(functions + script if expected else f"{functions}{script.rstrip()} && exit 9 || true", folder)
        for thread in threads:
            thread.join(30)
        code = {"status": "failed", "exit_code": 3}
    assert order[2] == "web-01.us.example.com" and len(order) == 5
    assert hosts_of(pair["us"]) == ["web-01.us.example.com"], "asked once, as the second time the first controller failed"


def test_a_host_in_two_files_is_found(pair, folder):
    (script,) = blocks("sh", "uniq -d")
    assert shell(script, folder) == ""
    (folder / "us.yaml").write_text((folder / "us.yaml").read_text().replace("[web-01.us", "[web-02.eu.example.com, web-01.us"))
    assert shell(script, folder) == "web-02.eu.example.com\n"


def test_what_waited_at_a_take_over_is_asked_for_again(make_controller, folder):
    c = make_controller(open=False, token="dbt_admin")
    for number in range(3):
        c.create(ref=f"r{number}", host=f"web-{number}")
    c.ok("POST", f"/v1/jobs/{c.create(ref='other')['id']}/cancel")
    c.stop()
    copy, kept = folder / "copy.db", folder / "kept.db"
    deploybot.copy_database(c.config.db, copy)
    deploybot.restore_database(copy, c.config.db, kept)
    c.start()
    (script,) = blocks("sh", "cancelled.json")
    shell(script, folder, DEPLOYBOT_URL=c.url, DEPLOYBOT_TOKEN="dbt_admin")
    waiting = [job["ref"] for job in c.ok("GET", "/v1/jobs?status=pending")["jobs"]]
    assert waiting == ["r2", "r1", "r0"], "newest first: made in their old order, without the one that somebody cancelled"


def test_examples_are_those_that_the_document_installs():
    names = set(re.findall(r"\(\.\./examples/([\w.]+)\)", TEXT))
    assert names == {"litestream.yml", "litestream.service"}
    unit = (ROOT / "examples/litestream.service").read_text()
    assert "ExecStart=/usr/local/bin/litestream replicate -config /etc/litestream.yml\n" in unit
    assert "EnvironmentFile=/etc/deploybot/litestream.env\n" in unit
    assert "User=deploybot\n" in unit and "StateDirectory=deploybot\n" in unit and "Before=deploybot.service\n" in unit
