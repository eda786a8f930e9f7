"""Agents and controllers of different versions: who is behind, and that each works with the other.

The transcript is that of the agents up to commit 21c433e, the last that landed before deployments; agents of the same code under
another number, and a controller that answers as one did then, are in test_agent.py.
"""

import hashlib

import pytest

import agent
import deploybot


def versions(controller):
    return {host["hostname"]: (host["agent_version"], host["behind"]) for host in controller.ok("GET", "/v1/hosts")["hosts"]}


@pytest.mark.parametrize(
    "said, version, behind",
    [
        ("0.1.0", "0.1.0", True),
        ("1.1.9", "1.1.9", True),
        ("1.2.2", "1.2.2", True),
        ("1.2.3", "1.2.3", False),
        ("1.2.10", "1.2.10", False),
        ("1.10.0", "1.10.0", False),
        ("2.0.0", "2.0.0", False),
        ("1.2", None, False),
        ("1.1.0\n", None, False),
        ("1.1.0\x1b[2J", None, False),
        ("\u0661.1.0", None, False),  # int() takes other scripts' digits
        ("1.1.0-rc1", None, False),
        ("1.1." + "9" * 5000, None, False),
        ("", None, False),
        (None, None, False),
        (1.1, None, False),
        (["1.1.0"], None, False),
    ],
)
def test_a_host_is_behind_where_its_agent_is_older(controller, monkeypatch, said, version, behind):
    monkeypatch.setattr(deploybot, "VERSION", "1.2.3")
    controller.register("web-01", capabilities={"agent": said})
    controller.register("bare")
    controller.create(host="nobody")
    assert versions(controller) == {"web-01": (version, behind), "bare": (None, False), "nobody": (None, False)}
    assert controller.ok("POST", "/v1/hosts/web-01/drain")["host"]["behind"] is behind


def test_the_version_is_that_of_the_last_registration(controller):
    controller.register("web-01", capabilities={"agent": "0.0.9"})
    assert versions(controller)["web-01"] == ("0.0.9", True)
    controller.register("web-01", capabilities={"agent": agent.VERSION})
    assert versions(controller)["web-01"] == (agent.VERSION, False)


def test_programs_are_named_with_what_a_download_has(controller):
    answer = controller.acting(None).ok("GET", "/v1/programs")
    assert answer["version"] == deploybot.VERSION and [one["name"] for one in answer["programs"]] == ["agent.py", "ctl.py"]
    for one in answer["programs"]:
        data = controller.raw("GET", "/" + one["name"])[2]
        assert (one["sha256"], one["size"]) == (hashlib.sha256(data).hexdigest(), len(data))


@pytest.mark.parametrize("as_objects", [True, False])
def test_an_agent_that_knows_neither_labels_nor_current_works(make_controller, as_objects):
    """Each body has what that agent sent, and nothing else; the fields that it read of the answers are there."""
    closed = make_controller(open=False, token="dbt_admin", agent_token="dbt_agent")
    person, enrolling, own = closed.acting("dbt_admin"), closed.acting("dbt_agent"), closed.acting("dbt_" + "s" * 43)
    person.set_app(name="web", repo="o/n", hosts=["h"], shared=["log/"], env={"A": "b"}, deploy=["./run"])
    capabilities = {"agent": "0.0.9", "python": "3.11.2", "system": "Linux"}
    me = {"hostname": "h", "capabilities": capabilities, "slots": 1, "token_sha256": hashlib.sha256(own.token.encode()).hexdigest()}
    known = enrolling.ok("POST", "/v1/agents/register", me)
    job = person.ok("POST", "/v1/deployments", {"app": "web", "ref": "main"})["jobs"][0]
    beat = {"status": "online", "running": [], "session": known["session"], "wait": 25}
    taken = own.ok("POST", f"/v1/agents/{known['id']}/heartbeat", beat)["job"]
    assert {"id", "attempt", "app", "repo", "ref", "host", "timeout", "metadata", "spec", "assigned_agent"} <= taken.keys()
    assert {"clone_url", "build", "activate", "deploy"} <= taken["spec"].keys() and taken["id"] == job["id"]
    rows = [["one", "info", "2026-11-25T13:00:50.000Z"], ["failed: no", "error", "2026-11-25T13:00:51.000Z"]]
    lines = [dict(zip(("message", "level", "timestamp"), row, strict=True)) for row in rows] if as_objects else rows
    upload = {"attempt": 1, "offset": 0, "lines": lines}
    assert own.ok("POST", f"/v1/jobs/{job['id']}/logs", upload) == {"next_offset": 2, "cancel": False}
    beat = {"status": "online", "running": [{"job_id": job["id"], "attempt": 1}], "session": known["session"]}
    assert own.ok("POST", f"/v1/agents/{known['id']}/heartbeat", beat)["cancel"] == []
    result = {"attempt": 1, "status": "failed", "reason": "exit_code", "exit_code": 1, "error": "no", "commit": "c" * 40}
    own.ok("POST", f"/v1/jobs/{job['id']}/result", result)
    ended = person.job(job["id"])
    assert (ended["status"], ended["reason"], ended["rolled_back_to"]) == ("failed", "exit_code", None)
    assert [line["message"] for line in person.lines(job)] == ["one", "failed: no"]
    (runs,) = person.ok("GET", "/v1/apps")["apps"][0]["hosts"]
    assert runs["actual"] is None and versions(person) == {"h": ("0.0.9", True)}
    own.ok("POST", f"/v1/agents/{known['id']}/heartbeat", {**beat, "running": [], "status": "offline"})
    assert person.ok("GET", "/v1/hosts")["hosts"][0]["agent_status"] == "offline"
