"""The dashboard in a real browser: Debian's chromium, driven by Playwright, against a controller of its own and agents that are played.

Sign in, watch a deployment live, cancel, roll back, lock and unlock, drain, lose and regain the controller, hostile log lines that stay
text, what a role may not do is not there, 500 hosts and 1,000 jobs without a hitch; no console error, no request to another host, no
serious violation that axe-core finds, the first paint hardly later than that of a bare page. `--screenshots FOLDER` makes pictures of every view instead.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import pathlib
import re
import shutil
import sqlite3
import statistics
import sys
import urllib.parse
from collections.abc import Iterator
from typing import Any

import common
from common import READ_TOKEN, TOKEN, Controller, LightAgent, Proof, check, run, wait_for

AXE = pathlib.Path("node_modules", "axe-core", "axe.min.js")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
WIDE, PHONE = {"width": 1360, "height": 900}, {"width": 390, "height": 844}
LATER = 1.15  # times as long as that of a page of one line the dashboard's first frame may take
FIRST_PAINT, HITCH = 100, 100  # ms until something is seen, on an idle machine; for which a key press may have to wait
BUSY = 5  # times as long where others use the machine too
DRAWING = """() => { // ms of the quickest of 5: others may hold the processor, and none of them makes it quicker
    const time = action => { const start = performance.now(); action(); document.body.offsetHeight; return performance.now() - start; };
    const best = action => Math.min(...Array.from({length: 5}, () => time(action)));
    return [best(() => { document.getElementById("main").replaceChildren(); draw(); }), best(draw)];
}"""
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

        def beat() -> Any:
            status, answer = self.agents[host].beat(wait=2)
            check(status == 200, "heartbeat answered", status, answer)
            return answer["job"]

        return wait_for(beat, 15, f"a job for {host}")

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
    shown = [
        {"name": name, "repo": f"acme/{name}", "hosts": hosts, "deploy_on_push": True, "branches": ["main"], **more}
        for name, more in apps.items()
    ]
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
        page.on(
            "request", lambda request: self.asked.add(urllib.parse.urlsplit(request.url).netloc) if ":" in request.url[:6] else None
        )
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
            begun = datetime.datetime.now(datetime.UTC) - datetime.timedelta(
                days=13.4 * (1 - ((n + 1) / len(ids)) ** 0.8), minutes=7 + n % 5
            )
            ends = begun + datetime.timedelta(seconds=40 + (n * 37) % 90)
            times = [moment.strftime("%Y-%m-%dT%H:%M:%S.000Z") for moment in (begun, begun, ends)]
            db.execute("UPDATE deployments SET created_at = ?, started_at = ?, completed_at = ? WHERE id = ?", (*times, one))
            db.execute("UPDATE jobs SET created_at = ?, started_at = ?, completed_at = ? WHERE deployment_id = ?", (*times, one))
            db.execute(
                "UPDATE releases SET deployed_at = ? WHERE job_id IN (SELECT id FROM jobs WHERE deployment_id = ?)", (times[2], one)
            )
    controller.start()
    for agent in fleet.agents.values():
        agent.close()
        agent.register(capabilities={"labels": {"role": "web", "zone": "eu"}, "version": "0.1.0"})
    fleet.client.close()
    fleet.client.ok(
        "PUT", "/v1/apps/billing-worker/lock", {"reason": "month-end close, ask Ada before anything goes out", "for": 14400}
    )
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
        "failed": f"job={failed['id']}", "apps": "apps", "app": "app=web", "hosts": "hosts",
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


# ---------------------------------------------------------------------------------------------------------------------
# The proof
# Owns: what a person does, and what has to be seen then. Each part leaves the page signed in.

AWAY = ("Failed to load resource",)  # what chromium itself says of a refusal, and of a controller that is away
HOSTS = ["alpha.example.com", "beta.example.com", "gamma.example.com"]


def see(page: Any, text: str, within: str = "main") -> Any:
    """Waits until that text is to be seen there; the first place."""
    found = page.locator(within).get_by_text(text, exact=False).first
    found.wait_for()
    return found


def visit(page: Any, fields: str) -> None:
    page.evaluate("fields => { location.hash = fields; }", fields)


def confirm(page: Any, name: str, **fields: str) -> None:
    """Fills the dialog and presses its button; waits until it is gone."""
    dialog = page.get_by_role("dialog")
    for label, text in fields.items():
        dialog.get_by_label(label.replace("_", " ")).fill(text)
    dialog.get_by_role("button", name=name, exact=True).click()
    dialog.wait_for(state="hidden")


def sign_in(browser: Browser, proof: Proof, controller: Controller) -> Any:
    page = browser.page(controller.url, None)
    for _ in range(3):
        page.get_by_label("Token").press("Escape")
    page.get_by_label("Token").fill("dbt_wrong")
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("alert").get_by_text(re.compile("token", re.I)).wait_for()
    check(page.get_by_label("Token").is_visible(), "the dialog is gone after a wrong token")
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("status").get_by_text("live", exact=True).wait_for()
    quiet(browser, *AWAY)
    cookies = page.context.cookies()
    check([(one["httpOnly"], one["sameSite"]) for one in cookies] == [(True, "Strict")], "cookies:", cookies)
    kept = page.evaluate(
        "() => [document.cookie, localStorage.length, sessionStorage.length, document.body.innerText.includes('dbt_proof')]"
    )
    check(kept == ["", 0, 0, False], "the page can read", kept)
    paints = []
    for _ in range(3):
        page.reload()
        page.get_by_role("status").get_by_text("live", exact=True).wait_for()
        paints.append(page.evaluate("() => performance.getEntriesByName('first-contentful-paint')[0].startTime"))
    check(min(paints) < FIRST_PAINT * BUSY, "first paint after", paints, "ms")
    proof.figure("first paint after a reload, signed in, best and worst of 3, ms", f"{min(paints):.0f}, {max(paints):.0f}")
    return page


def paint(browser: Browser, proof: Proof, controller: Controller) -> None:
    """How much later than a page of one line the dashboard is first seen, signed out. A round that others disturbed may be made again."""
    pages = {path: browser.page(controller.url + path, None) for path in ("/", "/health")}
    rounds: list[tuple[float, float]] = []
    while not rounds or (len(rounds) < 3 and rounds[-1][0] > LATER * rounds[-1][1]):
        times = [[first_paint(page, controller.url + path) for path, page in pages.items()] for _ in range(30)]
        rounds.append(tuple(map(statistics.median, zip(*times[5:], strict=True))))  # the first five warm chromium
    for page in pages.values():
        page.context.close()
    check(rounds[-1][0] <= LATER * rounds[-1][1], "first paint of the dashboard and of /health:", rounds, "ms")
    proof.figure("first paint of the dashboard and of /health, ms", "{:.0f}, {:.0f}".format(*rounds[-1]))
    quiet(browser, *AWAY)


def first_paint(page: Any, url: str) -> float:
    """Milliseconds from the start of the navigation to the first frame that shows anything."""
    page.goto("about:blank")
    page.goto(url)
    page.wait_for_function("() => performance.getEntriesByName('first-contentful-paint').length")
    time = page.evaluate("() => performance.getEntriesByName('first-contentful-paint')[0].startTime")
    page.evaluate("() => new Promise(done => requestIdleCallback(done))")
    return float(time)


def watch(page: Any, fleet: Fleet) -> None:
    """Deploys by the keyboard and sees it go on, host by host, without a reload."""
    visit(page, "app=web")
    page.get_by_role("button", name="Deploy…").press("Enter")
    page.keyboard.press("Escape")
    page.get_by_role("dialog").wait_for(state="hidden")
    page.get_by_role("button", name="Deploy…").press("Enter")
    page.get_by_label("Branch, tag or commit").press("Enter")
    see(page, "web at main")
    for n, host in enumerate(HOSTS):
        job = fleet.take(host)
        page.get_by_role("listitem").filter(has_text=host).get_by_text("running").wait_for()
        if n == 0:
            cancel = page.get_by_role("listitem").filter(has_text=HOSTS[2]).get_by_role("button", name="Cancel")
            cancel.focus()
        fleet.end(host, job, lines=["done"], commit=commit(1))
        see(page, f"{n + 1} success")
        if n == 0:
            check(cancel.evaluate("node => node === document.activeElement"), "the focus was lost when the list changed")
    page.locator(".title").get_by_text("success").wait_for()
    check(page.title().startswith("success: web"), "the title is", page.title())
    late = "id => { const one = store.deployments.get(id); keep('deployments', {...one, status: 'running', completed_at: null}); }"
    page.evaluate(late, page.url.split("=")[-1])
    page.wait_for_timeout(300)
    check(page.title().startswith("success: web"), "an older answer undid the end:", page.title())


def read_log(page: Any, fleet: Fleet) -> None:
    """Hostile lines stay text; follow, search, the link to a line, download."""
    made = fleet.deploy("api")
    host, agent = HOSTS[0], fleet.agents[HOSTS[0]]
    job = fleet.take(host)
    visit(page, f"job={job['id']}")
    see(page, "Nothing written yet")
    agent.logs(job, 0, HOSTILE)
    lines = page.get_by_role("log")
    lines.get_by_text("the end").wait_for()
    shown = lines.locator(".text").all_inner_texts()
    for said in (HOSTILE[0], HOSTILE[1], HOSTILE[4], HOSTILE[5]):
        check(said in shown, "not shown as it is:", said, shown)
    check("red turned" in shown[2] and "\x1b" not in "".join(shown) and "\u202e" not in "".join(shown), "shown:", shown[2])
    check(lines.locator("img, script, b").count() == 0, "a log line made an element")
    check(lines.locator(".bad", has_text="red").count() == 1, "no colour")
    check("owned" not in page.title(), "a log line ran")
    agent.logs(job, len(HOSTILE), [f"line number {n}" for n in range(1, 301)])
    see(page, "line number 300", ".lines").wait_for()
    low = "() => { const list = document.querySelector('.lines'); return list.scrollTop + list.clientHeight > list.scrollHeight - 5; }"
    page.wait_for_function(low)
    page.keyboard.press("/")
    page.keyboard.type("number 77")
    see(page, "1 found", "#log")
    page.keyboard.press("Enter")
    see(page, "1 of 1 found", "#log")
    wanted = len(HOSTILE) + 77
    check(page.url.endswith(f"line={wanted}"), "the address is", page.url)
    check(page.get_by_role("button", name="Follow").get_attribute("aria-pressed") == "false", "it still follows")
    agent.logs(job, len(HOSTILE) + 300, ["one more"])
    page.reload()
    page.locator(".at", has_text="line number 77").wait_for()
    page.wait_for_function("""() => {
        const node = document.querySelector(".at"), list = node.parentNode, top = node.offsetTop - list.offsetTop - list.scrollTop;
        return top >= 0 && top < list.clientHeight;
    }""")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    text = pathlib.Path(download.value.path()).read_text()
    check(text.splitlines()[0] == HOSTILE[0] and text.rstrip().endswith("one more"), "downloaded", text[:200])
    fleet.agents[host].result(job, "success", commit=commit(2))
    page.locator(".title").get_by_text("success").wait_for()
    for other in HOSTS[1:]:
        fleet.end(other, fleet.take(other), commit=commit(2))
    wait_for(
        lambda: fleet.client.ok("GET", f"/v1/deployments/{made['id']}")["deployment"]["status"] == "success",
        what="the deployment's end",
    )


def change(page: Any, fleet: Fleet) -> None:
    """Cancel, roll back, unlock, lock, drain, resume: each by its button, asked once, done by the API, shown without a reload."""
    made = fleet.deploy("web", commit(3))
    visit(page, f"deployment={made['id']}")
    page.locator(".title").get_by_role("button", name="Cancel").click()
    confirm(page, "Cancel it")
    page.locator(".title").get_by_text("cancelled").wait_for()
    fleet.run("api", commit(4))
    visit(page, "app=api")
    see(page, commit(4)[:7])
    page.get_by_role("button", name="Roll back…").click()
    page.get_by_role("dialog").get_by_text(commit(2)[:7]).first.wait_for()
    confirm(page, "Roll back")
    see(page, "api back to")
    for host in HOSTS:
        fleet.end(host, fleet.take(host), commit=commit(2))
    page.locator(".title").get_by_text("success").wait_for()
    visit(page, "app=api")
    page.get_by_role("button", name="Unlock").click()
    confirm(page, "Unlock")
    page.get_by_role("button", name="Lock…").click()
    confirm(page, "Lock", Why="<b>not</b> tonight")
    see(page, "<b>not</b> tonight")
    (locked,) = [app["lock"] for app in fleet.client.ok("GET", "/v1/apps")["apps"] if app["name"] == "api"]
    check(locked["reason"] == "<b>not</b> tonight", "the lock is", locked)
    page.get_by_role("button", name="Deploy…").click()
    page.get_by_role("dialog").get_by_role("button", name="Deploy").click()
    page.get_by_role("dialog").get_by_role("alert").get_by_text("locked").wait_for()
    page.get_by_role("button", name="Back", exact=True).click()
    visit(page, "overview")
    see(page, "<b>not</b> tonight")
    visit(page, "hosts")
    row = page.get_by_role("listitem").filter(has_text=HOSTS[1])
    row.get_by_role("button", name="Drain").click()
    confirm(page, "Drain")
    row.get_by_text("drained").wait_for()
    row.get_by_role("button", name="Resume").click()
    row.get_by_text("online").wait_for()


def hear(page: Any, fleet: Fleet) -> None:
    """What somebody else locks and drains is seen by the stream, not when the page looks by itself, each 15 s."""
    soon = 1000 * BUSY
    visit(page, "apps")
    for verb, path, body, shown in (
        ("PUT", "apps/api/lock", {"reason": "somebody else was here"}, "visible"),
        ("DELETE", "apps/api/lock", None, "hidden"),
    ) * 3:
        fleet.client.ok(verb, f"/v1/{path}", body)
        page.get_by_text("somebody else was here").first.wait_for(state=shown, timeout=soon)
    visit(page, "hosts")
    host = fleet.client.ok("GET", "/v1/hosts")["hosts"][0]["hostname"]
    for verb, shown in (("drain", "visible"), ("resume", "hidden")) * 3:
        fleet.client.ok("POST", f"/v1/hosts/{host}/{verb}")
        page.get_by_role("listitem").filter(has_text=host).get_by_text("drained").wait_for(state=shown, timeout=soon)


def lose(page: Any, fleet: Fleet, browser: Browser) -> None:
    """The controller is killed and comes back: the page says so, and shows what went on in between."""
    made = fleet.deploy("web", commit(5))
    job = fleet.take(HOSTS[0])
    visit(page, f"deployment={made['id']}")
    see(page, "running")
    fleet.controller.kill()
    page.get_by_role("status").get_by_text("the controller is away").wait_for()
    fleet.controller.start()
    fleet.client.close()
    for agent in fleet.agents.values():
        agent.close()
    fleet.end(HOSTS[0], job, lines=["written meanwhile"], commit=commit(5))
    page.get_by_role("status").get_by_text("live", exact=True).wait_for()
    see(page, "1 success")
    for host in HOSTS[1:]:
        fleet.end(host, fleet.take(host), commit=commit(5))
    page.locator(".title").get_by_text("success").wait_for()
    quiet(browser, *AWAY)


def look_only(browser: Browser, fleet: Fleet) -> None:
    """A viewer sees all of it and no button that is not for viewers."""
    fleet.run("web", commit(6), failing=HOSTS[2:])
    page = browser.page(fleet.controller.url, READ_TOKEN)
    for fields in ("overview", "app=web", "apps", "hosts", "deployments"):
        visit(page, fields)
        see(page, "web" if fields != "hosts" else HOSTS[0])
        shown = page.locator("main button:not([data-do=more])").all_inner_texts()
        check(not shown, "a viewer sees in", fields, shown)
    page.get_by_role("button", name="Sign out").click()
    page.get_by_label("Token").wait_for()
    check(not page.context.cookies(), "signed out, with", page.context.cookies())
    page.context.close()
    quiet(browser, *AWAY)


def judge(browser: Browser, proof: Proof, fleet: Fleet) -> None:
    """axe-core on every view, in light and dark, wide and on a phone."""
    source, job = axe_source(), next(fleet.client.jobs())["id"]
    passed = 0
    views = [
        "overview",
        "deployments",
        f"deployment={next(fleet.client.jobs())['deployment_id']}",
        "jobs",
        f"job={job}",
        "apps",
        "app=api",
        "hosts",
    ]
    for dark, size in ((False, WIDE), (True, PHONE)):
        page = browser.page(fleet.controller.url, TOKEN, size, dark)
        for fields in views:
            visit(page, fields)
            page.locator("main .box").first.wait_for()
            passed += accessible(page, source, f"{fields}, {'dark' if dark else 'light'}")
            wide = page.evaluate("() => document.documentElement.scrollWidth - innerWidth")
            check(wide <= 0, fields, "is wider than the window by", wide)
        page.get_by_role("link", name="Apps").click()
        page.get_by_role("button", name="Deploy…").first.click()
        passed += accessible(page, source, "a dialog")
        page.context.close()
    page = browser.page(fleet.controller.url, None)
    passed += accessible(page, source, "sign-in")
    page.context.close()
    quiet(browser, *AWAY)
    proof.figure("rules of axe passed", passed)


def night(browser: Browser, proof: Proof) -> None:
    """What a tired person could miss: a host without an agent, what is open behind 520 newer deployments, a job of no deployment that failed."""
    here, ghost, stray, spare = HOSTS[0], "ghost-01", "ghost-02", "ghost-03"
    controller = proof.controller(name="night", apps=mapping([here, ghost], web={}, zone={"hosts": [spare]}))
    page = browser.page(controller.url)
    see(page, f"{here}, {ghost}, {spare} never registered")
    fleet = Fleet(controller, [here])
    see(page, f"{ghost}, {spare} never registered")
    for host, ref in ((stray, "main"), (here, "broken")):
        job = fleet.client.ok("POST", "/v1/jobs", {"repo": "acme/api", "ref": ref, "host": host})["job"]
    fleet.end(here, fleet.take(here), "failed", ["one", "the last line"], exit_code=1, error="./build.sh ended with exit code 1")
    see(page, f"{here}: ./build.sh ended with exit code 1")
    under = page.get_by_role("region", name="Under way")
    under.get_by_text(stray).wait_for()
    open_ = fleet.deploy("web", "opened-first")
    for n in range(520):
        made = fleet.deploy("web", f"v{n}", hosts=[ghost])
        fleet.client.ok("POST", f"/v1/deployments/{made['id']}/cancel")
    check(fleet.client.ok("GET", f"/v1/deployments/{open_['id']}")["deployment"]["status"] == "pending", "it is not open any more")
    page.reload()
    under.get_by_text("opened-first").wait_for()
    under.get_by_text(stray).click()
    see(page, "for its host: no agent")
    visit(page, f"job={job['id']}&line=99999")
    see(page, "the last line", ".at")
    visit(page, "hosts")
    see(page, "no agent", f"li[data-key='{spare}']")
    for program, view in (("agent.py", "hosts"), ("ctl.py", "apps")):
        visit(page, view)
        digest = hashlib.sha256((common.ROOT / program).read_bytes()).hexdigest()
        see(page, f"echo '{digest}  {program}' | sha256sum -c")
    see(page, "/v1/webhooks/github")
    page.context.close()
    fleet.close()


def crowd(browser: Browser, proof: Proof) -> None:
    """500 hosts, 1,000 jobs, a hundred of which move while somebody looks."""
    hosts = [f"host-{n:03}.example.com" for n in range(500)]
    controller = proof.controller(name="crowd", apps=mapping(hosts, web={}, api={}))
    fleet = Fleet(controller, hosts)
    one = fleet.deploy("web")
    fleet.deploy("api")
    page, times = browser.page(controller.url), []
    for fields in ("hosts", "jobs", "apps", "app=web", f"deployment={one['id']}"):
        visit(page, fields)
        page.locator(".rows > li").first.wait_for()
        page.wait_for_timeout(300)  # what the view reads
        times += [page.evaluate(DRAWING)]
    for host in hosts[:100]:
        fleet.end(host, fleet.take(host), commit=commit(9))
    see(page, "100 success")
    check(page.locator(".rows > li").count() <= 100, "the list has", page.locator(".rows > li").count())
    built, drawn = (max(column) for column in zip(*times, strict=True))
    check(max(built, drawn) < HITCH * BUSY, "it stands still for", times, "ms")
    proof.figure("500 hosts, 1,000 jobs: a view made anew, and drawn again, ms", f"{built:.0f}, {drawn:.0f}")
    page.context.close()
    fleet.close()


def prove(proof: Proof) -> None:
    if proof.options.screenshots:
        return screenshots(proof, proof.options.screenshots)
    controller = proof.controller(apps=mapping(HOSTS, web={"strategy": {"type": "rolling", "batch": 1}}, api={}))
    fleet = Fleet(controller, HOSTS)
    with browsing(proof) as browser:
        paint(browser, proof, controller)
        page = sign_in(browser, proof, controller)
        for part in (watch, read_log):
            part(page, fleet)
            quiet(browser)
            proof.say(part.__name__)
        change(page, fleet)
        hear(page, fleet)
        quiet(browser, *AWAY)
        proof.say("change")
        lose(page, fleet, browser)
        look_only(browser, fleet)
        proof.say("lost and regained, looked at")
        judge(browser, proof, fleet)
        proof.say("judged")
        check(browser.asked == {f"127.0.0.1:{controller.port}"}, "asked", browser.asked)
        for part in (night, crowd):
            part(browser, proof)
            quiet(browser, *AWAY)
            proof.say(part.__name__)
    fleet.close()
    proof.figure("bytes of the page", (common.ROOT / "www" / "dashboard.html").stat().st_size)


if __name__ == "__main__":
    sys.exit(
        run(
            prove,
            __doc__,
            ("--screenshots", {"type": pathlib.Path, "metavar": "FOLDER", "help": "pictures of every view, instead of the proof"}),
        )
    )
