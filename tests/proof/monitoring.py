"""Prometheus reads what /metrics says, and its alerts fire: its own programs and parser say so.

A controller to which what is counted has happened is scraped. prometheus_client parses the text, `promtool check metrics` finds
nothing against the names, and `promtool check config` takes the scrape configuration of docs/monitoring.md. Each alert of
examples/alerts.yml is tested by alerts.test.yml beside this file, whose series are those that the controller has. Nothing in it is
random: the seed only names the run.
"""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import yaml
from common import ROOT, Controller, LightAgent, Proof, check, run
from prometheus_client.parser import text_string_to_metric_families

import deploybot

ALERTS, CASES, GUIDE = ROOT / "examples/alerts.yml", ROOT / "tests/proof/alerts.test.yml", ROOT / "docs/monitoring.md"
APPS = {"apps": [{"name": "web", "repo": "o/web", "hosts": ["web-01"]}]}
OTHERS = {"up": {"job", "instance"}}  # series that Prometheus makes itself


def promtool(*arguments: Any, text: str = "") -> str:
    """What it says; it has to be content."""
    program = shutil.which("promtool")
    check(program, "promtool is missing: on Debian, .ci/run takes it out of the package prometheus")
    done = subprocess.run([program, *map(str, arguments)], input=text, capture_output=True, text=True, check=False)  # type: ignore[list-item]
    check(done.returncode == 0, "promtool", *arguments, "said", done.stdout, done.stderr)
    return done.stdout + done.stderr


def happen(controller: Controller) -> None:
    """One of each of what is counted."""
    client, agent = controller.client(), LightAgent(controller.port, "web-01")
    agent.register()
    for status in ("success", "failed"):
        client.ok("POST", "/v1/deployments", {"app": "web", "ref": status})
        job = agent.beat([])[1]["job"]
        agent.logs(job, 0, ["a line"])
        agent.result(job, status, **({} if status == "success" else {"reason": "exit_code", "exit_code": 1}))
    wrong = {"X-Hub-Signature-256": "sha256=" + "0" * 64, "X-GitHub-Event": "push", "X-GitHub-Delivery": "one"}
    check(client.raw("POST", "/v1/webhooks/github", b"{}", wrong)[0] == 401, "a wrong signature was taken")
    check(client.raw("GET", "/no/such/path")[0] == 404, "a path of nobody's was found")


def families_of(text: str) -> dict[str, Any]:
    """{name as it stands in the text: family}; each sample once, each histogram whole."""
    families = {f"{one.name}_total" if one.type == "counter" else one.name: one for one in text_string_to_metric_families(text)}
    for name, family in families.items():
        check(family.documentation and family.type != "unknown", name, "has no HELP or no TYPE")
        seen = [(one.name, frozenset(one.labels.items())) for one in family.samples]
        check(len(seen) == len(set(seen)), name, "has a sample twice")
        if family.type == "histogram":
            whole(name, family)
    return families


def whole(name: str, family: Any) -> None:
    buckets: dict[frozenset[tuple[str, str]], list[tuple[float, float]]] = {}
    counts: dict[frozenset[tuple[str, str]], float] = {}
    for one in family.samples:
        labels = frozenset((key, value) for key, value in one.labels.items() if key != "le")
        if one.name.endswith("_bucket"):
            buckets.setdefault(labels, []).append((float(one.labels["le"]), one.value))
        elif one.name.endswith("_count"):
            counts[labels] = one.value
    check(buckets.keys() == counts.keys() and buckets, name, "has buckets without a count")
    for labels, found in buckets.items():
        check(found == sorted(found) and found[-1] == (float("inf"), counts[labels]), name, dict(labels), "is no histogram", found)
        check([n for _, n in found] == sorted(n for _, n in found), name, dict(labels), "does not add up", found)


def labels_of(family: Any) -> set[str]:
    return {key for one in family.samples for key in one.labels} - {"le"}


def tested(families: dict[str, Any]) -> int:
    """Number of alerts; each is expected to fire and not to, over series that there are."""
    cases = yaml.safe_load(CASES.read_text())
    alerts = {rule["alert"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}
    rows = [row for case in cases["tests"] for row in case["alert_rule_test"]]
    for fires in (True, False):
        there = {row["alertname"] for row in rows if bool(row["exp_alerts"]) is fires}
        check(there == alerts, "alerts and their tests differ", fires, there ^ alerts)
    for case in cases["tests"]:
        for series in case["input_series"]:
            name, *labels = re.findall(r"(\w+)(?:=\"|\{|$)", series["series"])
            has = OTHERS.get(name) or labels_of(families[name])
            check(set(labels) <= has, series["series"], "is none of the controller's:", has)
    selectors = re.findall(r"(deploybot_\w+)(?:{([^}]*)})?", ALERTS.read_text())
    for name, inside in selectors:
        check(name in families, name, "is in an alert and not in /metrics")
        check(set(re.findall(r"(\w+)=", inside)) <= labels_of(families[name]), name, inside, "names no labels of it")
    return len(alerts)


def configuration(folder: pathlib.Path) -> pathlib.Path:
    """The guide's, with files of this folder in place of those in /etc."""
    (block,) = (one for one in re.findall(r"^```yaml\n(.*?)^```$", GUIDE.read_text(), re.M | re.S) if "scrape_configs" in one)
    for name, file in (("deploybot.token", "token"), ("deploybot-alerts.yml", "alerts.yml")):
        check(f"/etc/prometheus/{name}" in block, name, "is not in the guide's configuration")
        block = block.replace(f"/etc/prometheus/{name}", str(folder / file))
    (folder / "token").write_text("dbt_x")
    shutil.copy(ALERTS, folder / "alerts.yml")
    (folder / "prometheus.yml").write_text(block)
    return folder / "prometheus.yml"


def prove(proof: Proof) -> None:
    controller = proof.controller(apps=APPS, webhook_secret="a secret of some length")
    happen(controller)
    _, headers, body = controller.client().raw("GET", "/metrics")
    check(headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8", "the type is", headers["Content-Type"])
    families = families_of(body.decode())
    missing = deploybot.METRICS.keys() ^ families.keys()
    check(not missing, "what is counted and what is told differ by", missing)
    said = promtool("check", "metrics", text=body.decode())
    check(not said, "promtool check metrics:", said)
    promtool("check", "config", configuration(proof.folder))
    promtool("check", "rules", ALERTS)
    promtool("test", "rules", CASES)
    proof.figure("metrics", len(families))
    proof.figure("samples", sum(len(family.samples) for family in families.values()))
    proof.figure("alerts", tested(families))


if __name__ == "__main__":
    sys.exit(run(prove, __doc__))
