"""docs/monitoring.md against the program and the alerts. That Prometheus takes them is tests/proof/monitoring.py's."""

import re
from pathlib import Path

import yaml

import deploybot

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs/monitoring.md").read_text()
ALERTS = (ROOT / "examples/alerts.yml").read_text()


def rows(head):
    """First to the other cells of the table whose first column has that head."""
    table = TEXT.split(f"| {head} |")[1].split("\n\n")[0].splitlines()[2:]
    return {cells[0].strip("`"): cells[1:] for cells in ([cell.strip() for cell in row.strip("|").split(" | ")] for row in table)}


def test_the_alerts_are_those_in_examples():
    assert ALERTS in re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.M | re.S)


def test_each_alert_says_what_to_do():
    (group,) = yaml.safe_load(ALERTS)["groups"]
    assert list(rows("alert")) == [rule["alert"] for rule in group["rules"]]


def test_each_metric_is_there_with_its_type_and_no_other():
    def kind(name):
        return "histogram" if name in deploybot.BUCKETS else "counter" if name.endswith("_total") else "gauge"

    found = rows("name")
    assert {name: cells[0] for name, cells in found.items()} == {name: kind(name) for name in deploybot.METRICS}


def test_the_labels_are_those_of_the_program(controller):
    controller.set_app(name="web", repo="o/web", hosts=["web-01"])
    agent = controller.register()
    controller.ok("POST", "/v1/deployments", {"app": "web", "ref": "main"})
    controller.end(controller.beat(agent)["job"])
    text = controller.raw("GET", "/metrics")[2].decode()
    found = {name: set(cells[1].split(", ")) - {""} for name, cells in rows("name").items()}
    for name, labels in re.findall(r"^(\w+)\{(.*)\} ", text, re.M):
        assert set(re.findall(r'(\w+)="', labels)) - {"le"} == found.get(name, found.get(re.sub("_[a-z]+$", "", name))), name
