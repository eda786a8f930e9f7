"""The dashboard in a real browser: Debian's chromium, driven by Playwright, against a controller of its own and agents that are played.

Sign in, watch a deployment live, cancel, roll back, lock and unlock, drain, lose and regain the controller, hostile log lines that stay
text, what a role may not do is not there, 500 hosts and 1,000 jobs without a hitch; no console error, no request to another host, no
serious violation that axe-core finds, the first paint in time. `--screenshots FOLDER` makes pictures of every view instead.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pathlib
import re
import shutil
import sqlite3
import sys
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import common
from common import READ_TOKEN, TOKEN, Controller, LightAgent, Proof, check, run, wait_for

AXE = pathlib.Path("node_modules", "axe-core", "axe.min.js")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage"
).split()
WIDE, PHONE = {"width": 1360, "height": 900}, {"width": 390, "height": 844}
FIRST_PAINT = 100  # ms, on an idle machine; five times that where others use it too
HITCH = 250  # ms that the page may at most keep a key press waiting; likewise
HOSTILE = [
    "<img src=x onerror=\"document.title='owned'\">",
    "</div><script>document.title='owned'</script>",
    "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x1b[0m \u202eturned",
    "\x1b[" + "1;" * 5000 + "m" + "\x1b[31m" * 5000 + "the end",
    "{{constructor.constructor('document.title=1')()}}",
    "javascript:document.title='owned'",
]
APPS = ["web", "api", "billing-worker"]
LONG = "a-long-name-of-an-application-that-somebody-chose-on-a-monday"


# ---------------------------------------------------------------------------------------------------------------------
# What stands behind the page
# Owns: apps, agents that are played, deployments of every outcome. Ignores: the browser.


def commit(n: int) -> str:
    return f"{n * 2654435761 % (1 << 160):040x}"[::-1]


class Fleet:
    """Hosts whose agents do what they are told by the proof, call by call."""

    def __init__(self, controller: Controller, hosts: list[str], **more: Any):
        self.controller, self.client = controller, controller.client()
        self.agents = {host: LightAgent(controller.port, host) for host in hosts}
        for agent in self.agents.values():
            status, answer = agent.register(**more)
            check(status == 200, "register answered", status, answer)

    def deploy(self, app: str, ref: str = "main", **more: Any) -> Any:
        return self.client.ok("POST", "/v1/deployments", {"app": app, "ref": ref, "force": True, **more})["deployment"]

    def take(self, host: str) -> Any:
        """The job that is handed out to that host."""
        status, answer = self.agents[host].beat()
        check(status == 200 and answer["job"], host, "got no job", status, answer)
        return answer["job"]

    def end(self, host: str, job: Any, status: str = "success", lines: Any = (), **more: Any) -> None:
        agent = self.agents[host]
        if lines:
            answer = agent.logs(job, 0, lines)
            check(answer[0] == 200, "logs answered", answer)
        answer = agent.result(job, status, **more)
        check(answer[0] == 200, "result answered", answer)

    def run(self, app: str, ref: str, lines: Any = (), failing: Any = (), **more: Any) -> Any:
        """A whole deployment: on the hosts in `failing` it fails."""
        made = self.deploy(app, ref)
        for job in sorted(self.client.jobs(deployment_id=made["id"]), key=lambda job: job["id"]):
            host = job["host"]
            if host in failing:
                self.end(host, self.take(host), "failed", lines, exit_code=1, error="./build.sh ended with exit code 1", **more)
            else:
                self.end(host, self.take(host), "success", lines, commit=ref if len(ref) == 40 else commit(7), **more)
        return made

    def close(self) -> None:
        self.client.close()
        for agent in self.agents.values():
            agent.close()


def mapping(hosts: list[str], **apps: Any) -> dict[str, Any]:
    shown = [{"name": name, "repo": f"acme/{name}", "hosts": hosts, "deploy_on_push": True, "branches": ["main"], **more} for name, more in apps.items()]
    return {"apps": shown}


# ---------------------------------------------------------------------------------------------------------------------
# The browser
# Owns: chromium, what it says and whom it asks. Ignores: what the page is for.


class Browser:
    """One chromium with a new folder for its data. Keeps every console error, page error and request."""

    def __init__(self, proof: Proof):
        try:
            from playwright.sync_api import sync_playwright
        except ImportError:
            raise common.Failure("Playwright is missing: pip install playwright") from None
        self.program = shutil.which("chromium")
        check(self.program, "chromium is missing: apt-get install chromium")
        self.said: list[str] = []
        self.asked: set[str] = set()
        self.driver = sync_playwright().start()
        self.chromium = self.driver.chromium.launch(executable_path=self.program, args=FLAGS)
        self.folder = proof.folder

    def page(self, url: str, token: str | None = TOKEN, size: Any = None, dark: bool = False, **more: Any) -> Any:
        """A new window, signed in unless `token` is None, with nothing of the others."""
        context = self.chromium.new_context(viewport=size or WIDE, color_scheme="dark" if dark else "light", **more)
        context.set_default_timeout(15_000)
        page = context.new_page()
        page.on("console", lambda message: self.said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.asked.add(urllib.parse.urlsplit(request.url).netloc))
        page.goto(url)
        if token:
            page.get_by_label("Token").fill(token)
            page.get_by_role("button", name="Sign in").click()
            page.get_by_role("status").get_by_text("live", exact=True).wait_for()
        return page

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.chromium.close()
        with contextlib.suppress(Exception):
            self.driver.stop()


@contextlib.contextmanager
def browsing(proof: Proof) -> Iterator[Browser]:
    browser = Browser(proof)
    try:
        yield browser
    finally:
        browser.close()


def quiet(browser: Browser, *expected: str) -> None:
    """Raises Failure for each thing that the console said and that does not begin as one of these."""
    unexpected = [text for text in browser.said if not text.startswith(expected)]
    check(not unexpected, "the console said:", unexpected)
    browser.said.clear()


def axe_source() -> str:
    """Of the environment's npm packages, as the Makefile puts them there."""
    places = [pathlib.Path(sys.prefix), common.ROOT, pathlib.Path(os.environ.get("AXE", "."))]
    found = [place / AXE for place in places if (place / AXE).exists()]
    check(found, "axe-core is missing: npm install axe-core, into", places[0])
    return found[0].read_text(encoding="utf-8")


def accessible(page: Any, source: str, where: str) -> int:
    """The number of rules that passed. Raises Failure for a violation that is serious or worse. By the debugger's door, as the page's policy lets nothing in."""
    page.evaluate(f"() => {{ {source}; window.axe = axe; }}")
    found = page.evaluate("() => axe.run(document, {resultTypes: ['violations']})")
    serious = [
        f"{one['id']}: {node['target']} {node['failureSummary']}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]
    check(not serious, "axe in", where, serious[:5])
    return len(found["passes"])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def furnish(controller: Controller) -> tuple[Fleet, dict[str, str]]:
    """A fleet with a past: deployments of every outcome, on 14 days; one is under way, one app is locked. (fleet, views)."""
    hosts = ["web-01.example.com", "web-02.example.com", "web-03.example.com", "batch-eu-central-1a.internal.example.com"]
    fleet = Fleet(controller, hosts, capabilities={"labels": {"role": "web", "zone": "eu"}, "version": "0.1.0"})
    lines = [
        "\x1b[1mnpm ci\x1b[0m",
        *[f"added {n * 37} packages in {n}s" for n in range(1, 14)],
        "\x1b[32m✓\x1b[0m built in 4.21s",
        "\x1b[33mwarning\x1b[0m 2 packages look for funding",
        "\x1b[36minfo\x1b[0m switched \x1b[4mcurrent\x1b[0m to the new release",
    ]
    for n in range(1, 31):
        app = [*APPS, LONG][n % 4]
        failing = {9: hosts[:1], 14: hosts, 21: hosts[1:3], 30: hosts[3:]}.get(n, ())
        fleet.run(app, commit(n), lines, failing)
    controller.stop()
    with contextlib.closing(sqlite3.connect(controller.db)) as db, db:
        ids = [row[0] for row in db.execute("SELECT id FROM deployments ORDER BY id")]
        for n, one in enumerate(ids):
            begun = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=13.4 * (1 - ((n + 1) / len(ids)) ** 0.8), minutes=7 + n % 5)
            ends = begun + datetime.timedelta(seconds=40 + (n * 37) % 90)
            times = [moment.strftime("%Y-%m-%dT%H:%M:%S.000Z") for moment in (begun, begun, ends)]
            db.execute("UPDATE deployments SET created_at = ?, started_at = ?, completed_at = ? WHERE id = ?", (*times, one))
            db.execute("UPDATE jobs SET created_at = ?, started_at = ?, completed_at = ? WHERE deployment_id = ?", (*times, one))
            db.execute("UPDATE releases SET deployed_at = ? WHERE job_id IN (SELECT id FROM jobs WHERE deployment_id = ?)", (times[2], one))
    controller.start()
    for agent in fleet.agents.values():
        agent.close()
        agent.register(capabilities={"labels": {"role": "web", "zone": "eu"}, "version": "0.1.0"})
    fleet.client.close()
    fleet.client.ok("PUT", "/v1/apps/billing-worker/lock", {"reason": "month-end close, ask Ada before anything goes out", "for": 14400})
    message = {"commit_message": "Charge the right account when two orders come at once", "branch": "main"}
    open_one = fleet.deploy("web", commit(77), metadata=message)
    first, second, *_ = (job["host"] for job in reversed(list(fleet.client.jobs(deployment_id=open_one["id"]))))
    fleet.end(first, fleet.take(first), "success", lines, commit=commit(77))
    running = fleet.take(second)
    fleet.agents[second].logs(running, 0, lines * 4)
    failed = next(fleet.client.jobs(status="failed"))
    fleet.client.ok("POST", f"/v1/hosts/{hosts[2]}/drain")
    views = {
        "overview": "", "deployments": "deployments", "deployment": f"deployment={open_one['id']}", "jobs": "jobs", "job": f"job={running['id']}&line=18",
        "failed": f"job={failed['id']}", "apps": "apps", "app": "app=web", "hosts": "hosts", "pushes": "pushes",
    }  # fmt: skip
    return fleet, views


def screenshots(proof: Proof, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    hosts = ["web-01.example.com", "web-02.example.com", "web-03.example.com", "batch-eu-central-1a.internal.example.com"]
    rolling = {"strategy": {"type": "rolling", "batch": 1}}
    controller = proof.controller(apps=mapping(hosts, web=rolling, api={}, **{"billing-worker": {}, LONG: {}}))
    bare = proof.controller(name="bare")
    fleet, views = furnish(controller)
    with browsing(proof) as browser:
        for dark in (False, True):
            for size in (WIDE, PHONE):
                kind = f"{'dark' if dark else 'light'}-{'wide' if size is WIDE else 'phone'}"
                browser.page(controller.url, None, size, dark).get_by_role("dialog").screenshot(path=folder / f"sign-in-{kind}.png")
                empty = browser.page(bare.url, TOKEN, size, dark)
                empty.get_by_text("Getting started").wait_for()
                empty.screenshot(path=folder / f"empty-{kind}.png", full_page=True)
                page = browser.page(controller.url, TOKEN, size, dark)
                for name, fields in views.items():
                    page.evaluate("fields => { location.hash = fields; }", fields)
                    page.wait_for_timeout(700)
                    page.screenshot(path=folder / f"{name}-{kind}.png", full_page=name != "jobs")
                page.evaluate("() => { location.hash = 'app=web'; }")
                page.get_by_role("button", name="Roll back…").click()
                page.get_by_role("dialog").wait_for()
                page.screenshot(path=folder / f"roll-back-{kind}.png")
    fleet.close()
    proof.figure("pictures", len(list(folder.glob("*.png"))))


def prove(proof: Proof) -> None:
    if proof.options.screenshots:
        return screenshots(proof, proof.options.screenshots)
    raise common.Failure("not yet")


if __name__ == "__main__":
    sys.exit(run(prove, __doc__, ("--screenshots", {"type": pathlib.Path, "metavar": "FOLDER", "help": "pictures of every view, instead of the proof"})))
