"""The corpus of tests/proof/hostile.py, the quick part: through the API, the log, the stream, ctl.py and the agent's first look.
Real deployments of a repository with such branches are the proof's: python tests/proof/hostile.py."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import pathlib
import sys

import pytest
from conftest import SECRET, Controller

import deploybot

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "proof"))
import common
import hostile

PLAIN = [string for string in hostile.corpus(pathlib.Path("/tmp")) if 0 < len(string.text) < 1000]


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """A controller that was given every string, its two logs, and what was sent."""
    folder = tmp_path_factory.mktemp("hostile")
    canaries = folder / "canary"
    app = {"name": hostile.APP, "repo": hostile.REPO, "hosts": ["elsewhere", "role=edge"]}
    app |= {"deploy_on_push": True, "branches": ["*"]}
    logs = [io.StringIO(), io.StringIO()]
    handlers = [logging.StreamHandler(log) for log in logs]
    for handler, as_json in zip(handlers, (False, True), strict=True):
        handler.setFormatter(deploybot.LogFormat(as_json))
        deploybot.log.addHandler(handler)
    level = deploybot.log.level
    deploybot.log.setLevel(logging.INFO)
    controller = Controller(
        folder / "controller", json.dumps({"apps": [app]}), open=False, token="dbt_admin", webhook_secret=SECRET
    )
    controller.strings = hostile.corpus(canaries)
    with contextlib.closing(common.Client(controller.port, "dbt_admin")) as client:
        controller.api = hostile.Api(client.raw, controller.port, "dbt_admin")
        controller.before = controller.api.stream_position()
        controller.shown = controller.api.attack(controller.strings, every=3)
        controller.said = [log.getvalue() for log in logs]
        yield controller
    controller.stop()
    deploybot.log.setLevel(level)
    for handler in handlers:
        deploybot.log.removeHandler(handler)
    hostile.no_canary(canaries, controller.strings, "the test")


def test_the_corpus_has_two_hundred_of_every_kind():
    kinds = [string.kind for string in PLAIN]
    assert len(kinds) >= 200
    assert all(kinds.count(kind) >= 5 for kind in set(kinds))
    assert len({string.text for string in PLAIN}) == len(PLAIN)


def test_every_string_is_taken_as_it_is_or_refused(attacked):
    """What each call has to answer is checked where it is made: Api.attack()."""
    assert len(attacked.shown) == sum(hostile.is_unicode(string.text) for string in attacked.strings)


def test_none_is_forged_or_raw_in_the_log(attacked):
    plain, as_json = attacked.said
    assert hostile.check_log(plain) == hostile.check_log(as_json, as_json=True) > len(attacked.shown)


@pytest.mark.parametrize("as_json", [False, True])
def test_whatever_is_logged_stays_on_its_line(as_json):
    """The controller logs next to nothing that others wrote; what it would log is held here."""
    made = [logging.LogRecord("deploybot", logging.WARNING, "", 0, "sent %s.", (string.text,), None) for string in PLAIN]
    assert hostile.check_log("".join(deploybot.LogFormat(as_json).format(record) + "\n" for record in made), as_json) == len(PLAIN)


def test_every_event_of_the_stream_is_framed(attacked):
    assert attacked.api.check_stream(attacked.before) > len(attacked.api.sent)


def test_ctl_prints_no_control_character(attacked):
    some = list(attacked.shown)[:: max(1, len(attacked.shown) // 20)]
    attacked.api.check_ctl(attacked.shown, some)


def test_raw_is_what_prints_them(attacked):
    """The check above would see one."""
    job_id = next(job_id for job_id, text in attacked.shown.items() if text == "\x1b[31mred")
    with pytest.raises(common.Failure, match="printed"):
        attacked.api.ctl("logs", "--raw", "--job", job_id)


def test_ctl_takes_every_string_for_an_argument(attacked):
    for string in attacked.strings[::24]:
        attacked.api.check_ctl_arguments(string.text)


def test_an_agent_takes_no_such_field(attacked):
    assert hostile.check_agent_fields(attacked.strings) > 600


@pytest.mark.parametrize("kind", sorted({string.kind for string in PLAIN}))
def test_apps_yaml_runs_nothing(tmp_path, kind):
    """Whoever writes it chooses commands; a word of it that is no command is still no code."""
    strings = [string for string in hostile.corpus(tmp_path / "canary") if string.kind == kind]
    for string in strings:
        file = tmp_path / "apps.yaml"
        for text in (f"apps:\n- name: {string.text}\n", f"apps: {string.text}", string.text):
            file.write_bytes(text.encode("utf-8", "surrogatepass"))
            try:
                deploybot.read_apps(file)
            except deploybot.AppsError as error:
                said = "\n".join(f"{line}: {message}" for line, message in error.problems)
                assert said.replace("\n", "").isprintable(), said
    hostile.no_canary(tmp_path / "canary", strings, "apps.yaml")
