"""Apps: apps.yaml as YAML and as JSON, each mistake with its line; a bad file changes nothing."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tracemalloc

import pytest
from conftest import command

import deploybot
from deploybot import Apps, AppsError, read_apps

ENTRY = {"name": "web", "repo": "myorg/web", "hosts": ["web-01"]}


@pytest.fixture
def read(tmp_path):
    """Reads a text or bytes as apps.yaml."""

    def read(text):
        path = tmp_path / "apps.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_apps(path)

    return read


@pytest.fixture
def refused(read):
    """The problems of a text: [(line, message)]."""

    def refused(text):
        with pytest.raises(AppsError) as caught:
            read(text)
        return caught.value.problems

    return refused


@pytest.fixture
def without_yaml(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)


def entry(**more):
    """A good file with one app, as JSON, a line a key; a value of None takes a key out."""
    values = {key: value for key, value in {**ENTRY, **more}.items() if value is not None}
    return json.dumps({"apps": [values]}, indent=1)


FULL = """
apps:
  - name: web-frontend
    repo: MyOrg/web-frontend          # compared without case
    clone_url: git@github.com:myorg/web-frontend.git
    hosts: [Web-01.example.com, web-02.example.com]
    deploy_on_push: true
    branches: [main, "release/*"]
    build: ["npm", "ci"]
    activate: "systemctl restart web"
  - {name: api, repo: myorg/api, hosts: [api-01], deploy: ["./deploy.sh"]}
"""


# -- what is taken -----------------------------------------------------------------------------------------------------


def test_a_yaml_file_with_every_key(read):
    api, web = read(FULL)
    assert web.hosts == ("web-01.example.com", "web-02.example.com")
    assert (web.deploy_on_push, web.branches) == (True, ("main", "release/*"))
    assert json.loads(web.spec) == {
        "clone_url": "git@github.com:myorg/web-frontend.git",
        "build": ["npm", "ci"],
        "activate": "systemctl restart web",
        "deploy": None,
        **{"env": {}, "shared": [], "keep_releases": 5, "health_check": None, "rollback_on_failure": True},
    }
    assert (api.clone_url, api.deploy_on_push, api.branches) == ("https://github.com/myorg/api.git", False, None)


def test_json_and_yaml_say_the_same(read, without_yaml):
    expected = json.dumps({"apps": [{**ENTRY, "build": "make\n", "branches": ["a\u00e9", "b*"]}]})
    (from_json,) = read(expected)
    assert (from_json.build, from_json.branches) == ("make\n", ("aé", "b*"))


def test_json_is_read_without_pyyaml_and_like_yaml(read, monkeypatch):
    text = json.dumps({"apps": [ENTRY]}, indent=2)
    as_yaml = read("# a comment makes it YAML\n" + text)
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert read(text) == as_yaml


@pytest.mark.parametrize("text", ["", "\n# nothing\n", "apps:\n", "apps: []", "{}", '{"apps": []}', "---\n"])
def test_no_apps_is_no_mistake(read, text):
    assert read(text) == ()


def test_flow_style_yaml_that_starts_like_json(read):
    assert read("{apps: [{name: web, repo: myorg/web, hosts: [web-01]}]}")[0].name == "web"


def test_an_alias_stands_for_its_value(read):
    first, second = read("apps:\n- {name: a, repo: o/a, hosts: &web [h1, h2]}\n- {name: b, repo: o/b, hosts: *web}\n")
    assert first.hosts == second.hosts == ("h1", "h2")


def test_one_repository_may_have_many_apps(read, tmp_path):
    text = json.dumps(
        {"apps": [{**ENTRY, "name": name, "repo": repo} for name, repo in (("a", "o/R"), ("b", "O/r"), ("c", "o/x"))]}
    )
    read(text)
    apps = Apps(tmp_path / "apps.yaml")
    apps.all = deploybot.read_apps(apps.path)
    assert [app.name for app in apps.of_repo("o/r")] == ["a", "b"]
    assert apps.named("c").repo == "o/x"
    assert apps.named("d") is None


def test_a_host_that_stands_twice_counts_once(read):
    assert read(entry(hosts=["web-01", "WEB-01", "web-01"]))[0].hosts == ("web-01",)


def test_the_example_that_is_shipped_is_good():
    for path in ("apps.yaml", "examples/apps.yaml"):
        found = deploybot.pathlib.Path(deploybot.__file__).parent / path
        assert read_apps(found) is not None


def test_an_app_without_entry_has_a_name_of_its_own():
    assert deploybot.app_without_entry("MyOrg/Web", None).name == "myorg--web"
    long = [deploybot.app_without_entry(f"{'o' * 90}/{'n' * 90}{end}", None).name for end in "ab"]
    for name in [*long, deploybot.app_without_entry("o/_x", None).name, deploybot.app_without_entry("O/.github", None).name]:
        assert deploybot.is_app(name) is None
    assert long[0] != long[1]


# -- what is refused, with its line ------------------------------------------------------------------------------------


MISTAKES = [
    ("name: Web", 2, "name: 'Web' must be"),
    ("repo: web", 3, "repo: 'web' must be owner/name"),
    ("hosts: [web-01, web_02]", 4, "hosts: 'web_02' must be a host name"),
    ("hosts: web-01", 4, "hosts: must be a list"),
    ("hosts: []", 4, "hosts: must be a list with at least one"),
    ("hosts: [1]", 4, "hosts: must be a list with at least one string"),
    ("clone_url: https://me:hunter2@github.com/o/n.git", 5, "clone_url: "),
    ("clone_url: --upload-pack=x", 5, "clone_url: "),
    ("deploy_on_push: 'yes'", 6, "deploy_on_push: must be true or false"),
    ("branches: main", 7, "branches: must be a list"),
    ("branches: ['']", 7, "branches: "),
    ("build: []", 8, "build: must be a command"),
    ("build: [make, 1]", 8, "build: must be a command"),
    ("build: ' '", 8, "build: must be a command"),
    ("activate: {a: b}", 9, "activate: must be a command"),
    ("hots: [web-01]", 10, "hots: is not known; did you mean hosts?"),
    ("zzzzzz: 1", 10, "zzzzzz: is not known"),
]
LINES = ["apps:", "- name: web", "  repo: myorg/web", "  hosts: [web-01]", "  clone_url: https://example.com/a.git"]
LINES += ["  deploy_on_push: true", "  branches: [main]", "  build: make", "  activate: run"]


@pytest.mark.parametrize(("wrong", "line", "message"), MISTAKES, ids=[wrong for wrong, _, _ in MISTAKES])
def test_each_mistake_of_yaml_has_its_line(refused, wrong, line, message):
    lines = [*LINES, ""]
    lines[line - 1] = ("- " if line == 2 else "  ") + wrong
    ((told, text),) = refused("\n".join(lines) + "\n")
    assert told == line
    assert text.startswith(message)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"name": "Web"}, 4),
        ({"repo": "x"}, 5),
        ({"hosts": "x"}, 6),
        ({"hots": 1}, 9),
        ({"deploy_on_push": 1}, 9),
        ({"build": []}, 9),
    ],
    ids=str,
)
def test_each_mistake_of_json_has_its_line(refused, without_yaml, wrong, line):
    """Line 1 is `{`, 2 the list of apps, 3 the app; hosts take three lines."""
    ((told, text),) = refused(entry(**wrong))
    assert (told, text.partition(":")[0]) == (line, next(iter(wrong)))


def test_a_json_value_that_looks_like_a_key_is_none(refused, without_yaml):
    ((line, _),) = refused('{"apps": [{"name": "hosts",\n"repo": "o/n",\n"hosts": ["bad host"]}]}')
    assert line == 3


def test_every_mistake_is_told_at_once_in_order_of_lines(refused):
    text = "apps:\n- name: A\n  repo: x\n- repo: o/n\n  hosts: [h]\n- 7\n- name: c\n  repo: o/c\n  hosts: [h]\n  hots: 1\n"
    told = refused(text)
    assert told == sorted(told)
    assert {(line, message.partition(":")[0]) for line, message in told} == {
        *((2, "name"), (3, "repo"), (2, "hosts"), (4, "name"), (1, "apps"), (10, "hots"))
    }


def test_deploy_stands_alone(refused):
    ((line, message),) = refused("apps:\n- name: a\n  repo: o/n\n  hosts: [h]\n  build: make\n  deploy: run\n")
    assert (line, message) == (6, "deploy: stands instead of build and activate; keep one form")


def test_two_apps_of_one_name(refused):
    ((line, message),) = refused("apps:\n- {name: a, repo: o/n, hosts: [h]}\n- repo: o/n\n  hosts: [h]\n  name: a\n")
    assert (line, "a stands here twice" in message) == (5, True)


@pytest.mark.parametrize("text", ["hello", "- a", "7", "[]", '"apps"', "true"])
def test_a_document_that_is_no_mapping(refused, text):
    assert refused(text) == [(1, "must be a mapping with the key 'apps'")]


@pytest.mark.parametrize("value", ["{}", "{a: b}", "x", "0", "false", '""', "7"])
def test_apps_that_are_no_list(refused, value):
    assert refused(f"\napps: {value}\n") == [(2, "apps: must be a list")]


def test_an_unknown_key_at_the_top(refused):
    assert refused("apps: []\nappz: []\n") == [(2, "appz: is not known; did you mean apps?")]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("apps: []\n\n\napps: []\n", 4),
        ("apps:\n- name: a\n  repo: o/n\n  hosts: [h]\n  name: b\n", 5),
        ('{"apps": [],\n\n"apps": []}', 3),
    ],
    ids=["yaml", "yaml app", "json"],
)
def test_a_key_that_stands_twice_is_refused_where_it_stands_again(refused, text, line):
    ((told, message),) = refused(text)
    assert "stands here for the second time" in message
    assert told == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("apps:\n- name: a\n   repo: x\n", 3),
        ("apps:\n- name: 'a\n", None),
        ("apps: []\n---\napps: []\n", 2),
        ("apps:\n- name: *nothing\n", 2),
        ("apps:\n\t- x\n", 2),
        ("apps:\n- name: !!python/object/apply:os.system [id]\n", 2),
        ("apps:\n- name: a\n  repo: o/n\x01\n  hosts: [h]\n", 3),
        ("apps:\n- repo: o/n\n  name: 2024-13-45\n  hosts: [h]\n", 3),
        ("apps:\n- repo: o/n\n  name: 0x_\n  hosts: [h]\n", 3),
        ("apps:\n- repo: o/n\n  name: !!int abc\n  hosts: [h]\n", 3),
        ("apps:\n- repo: o/n\n  name: !!bool abc\n  hosts: [h]\n", 3),
        ("apps:\n- repo: o/n\n  name: !!timestamp abc\n  hosts: [h]\n", 3),
        (f"apps:\n- repo: o/n\n  name: {'1' * 5000}\n  hosts: [h]\n", 3),
        ("apps:\n- ? [a, b]\n  : c\n", None),
        ("apps:\n- ? {a: b}\n  : c\n", None),
    ],
)
def test_broken_yaml_has_one_message_of_one_line(refused, text, line):
    (told, message), *_ = refused(text)
    assert line is None or told == line
    assert message.isprintable()


@pytest.mark.parametrize(("data", "line"), [(b"\xff", 1), (b"apps:\n\n- name: \xff\n", 3), ('{"apps": []}'.encode("utf-16"), 1)])
def test_what_is_not_utf_8_is_told_with_its_line(refused, data, line):
    assert refused(data) == [(line, "is not UTF-8")]


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 50_000, "- " * 5000, "apps: &a [*a]\n", "apps: &a {apps: *a}\n", "&a [*a]"]
)
def test_what_nests_without_end_is_refused(refused, text):
    assert refused(text)


def test_the_most_nested_json_is_refused_without_pyyaml_too(refused, without_yaml):
    assert refused("[" * 100_000)


@pytest.mark.parametrize(
    "place", ["- name: *a5\n", "- hosts: *a5\n", "- hosts: [*a5]\n", "- build: *a5\n", "- ? *a5\n  : 1\n", "- *a5\n"]
)
def test_an_alias_bomb_does_not_grow(refused, place):
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
    bomb += "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 6))
    tracemalloc.start()
    try:
        told = refused(bomb + "apps:\n" + place)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # written out it is more than 2 MB, and 80 times as much per level
    finally:
        tracemalloc.stop()
    assert max(len(message) for _, message in told) < 500


def test_a_yaml_file_without_pyyaml_gives_one_error_that_names_the_package(refused, without_yaml):
    ((line, message),) = refused("apps: []\n")
    assert line == 1
    assert "apt install python3-yaml" in message


def test_broken_json_without_pyyaml_is_told_as_json(refused, without_yaml):
    ((line, message),) = refused('{"apps": [\n{"name" "x"}]}')
    assert line == 2
    assert "PyYAML" not in message


URLS = ["https://github.com/o/n.git", "ssh://git@host:22/o/n", "git@github.com:o/n.git", "/srv/git/n.git", "../n", "file:///srv/n"]
BAD_URLS = [
    "",
    "-x",
    "--upload-pack=x",
    "ext::sh -c id",
    "ext::x",
    "fd::7",
    "https://u:p@host/n",
    "https://u:@host/n",
    "ssh://u:p@h/n",
]
BAD_URLS += [
    "http://u:p@[::1]/n",
    "https://h/n\n",
    "https://h/\x1b[31m",
    "https://h/a b",
    "https://[::1",
    "HTTPS://u:p@h/n",
    "x" * 2049,
]


@pytest.mark.parametrize("url", URLS)
def test_clone_urls(read, url):
    assert read(entry(clone_url=url))[0].clone_url == url


@pytest.mark.parametrize("url", BAD_URLS)
def test_hostile_clone_urls_and_passwords_are_refused(refused, url):
    ((_, message),) = refused(entry(clone_url=url))
    assert message.startswith("clone_url: must ")


def test_the_password_itself_is_not_repeated(refused):
    assert "hunter2" not in str(refused(entry(clone_url="https://me:hunter2@github.com/o/n.git")))


@pytest.mark.parametrize("command", ["\0", ["a\0"], "\ud800", ["make", "\ud800"], "", [""], [[]], 7, True])
def test_a_command_is_text_that_can_be_stored_and_run(refused, command):
    ((_, message),) = refused(entry(build=command))
    assert message.startswith("build: ")


# -- the whole file ----------------------------------------------------------------------------------------------------

HOOK = {"url": "https://hooks.example.com/s3cr3t", "events": ["failed", "recovered"], "format": "slack"}
CHECK = {"url": "http://127.0.0.1:3000/health", "timeout": "60s", "interval": "200ms", "success": 2}
ROLLING = {"type": "rolling", "batch": "25%", "canary": "web-01", "pause": "5m", "max_failures": 0}
WHOLE = {
    "groups": {"web": ["web-01", "Web-02"], "all": ["@web", "db-01"]},
    "defaults": {"keep_releases": 7, "timeout": "15m"},
    "apps": [
        {
            **{
                "name": "web",
                "repo": "myorg/web",
                "clone_url": "git@github.com:myorg/web.git",
                "hosts": ["@all", "role=Edge", "x-1"],
            },
            **{"deploy_on_push": True, "branches": ["main"], "tags": ["v*"], "paths": ["web/**"], "ignore_paths": ["**/*.md"]},
            **{"strategy": ROLLING, "shared": [".env", "uploads/"], "env": {"NODE_ENV": "production"}, "build": ["npm", "ci"]},
            **{"activate": "systemctl restart web", "health_check": CHECK, "rollback_on_failure": False, "retries": 1},
            "notify": [HOOK, {"url": "http://other.example.com"}],
        }
    ],
}


def as_yaml(document):
    """The same lines as the JSON has, behind a first one."""
    return "# YAML\n" + json.dumps(document, indent=1)


@pytest.mark.parametrize("as_text", [as_yaml, json.dumps])
def test_the_whole_of_apps_yaml(read, as_text, request):
    if as_text is json.dumps:
        request.getfixturevalue("without_yaml")
    (web,) = read(as_text(WHOLE))
    assert (web.hosts, web.labels) == (("db-01", "web-01", "web-02", "x-1"), ("role=Edge",))
    assert (web.tags, web.paths, web.ignore_paths) == (("v*",), ("web/**",), ("**/*.md",))
    assert web.strategy == deploybot.Strategy("rolling", "25%", "web-01", 300, 0)
    assert (web.keep_releases, web.timeout, web.rollback_on_failure, web.retries) == (7, 900, False, 1)
    assert web.notify == [
        {**HOOK, "events": ("failed", "recovered")},
        {"url": "http://other.example.com", "events": ("failed", "recovered"), "format": "json"},
    ]
    assert json.loads(web.spec) == {
        **{
            "clone_url": "git@github.com:myorg/web.git",
            "build": ["npm", "ci"],
            "activate": "systemctl restart web",
            "deploy": None,
        },
        **{"env": {"NODE_ENV": "production"}, "shared": [".env", "uploads/"], "keep_releases": 7, "rollback_on_failure": False},
        "health_check": {"url": "http://127.0.0.1:3000/health", "timeout": 60, "interval": 0.2, "success": 2},
    }


def test_what_is_left_out_has_its_default(read):
    (web,) = read(entry())
    assert (web.labels, web.tags, web.paths, web.ignore_paths, web.branches) == ((), (), (), (), None)
    assert (web.strategy.type, web.strategy.canary, web.strategy.pause) == ("parallel", None, 0)
    assert (web.shared, web.env, web.keep_releases, web.health_check) == ((), {}, 5, None)
    assert (web.rollback_on_failure, web.notify) == (True, [])
    (web,) = read(json.dumps({"apps": [{**ENTRY, "rollback_on_failure": None, "health_check": {"command": "true"}}]}))
    assert web.rollback_on_failure is True
    assert web.health_check == {"command": "true", "timeout": 60, "interval": 2, "success": 1}


def test_hosts_may_be_labels_alone(read, tmp_path):
    (web,) = read(entry(hosts=["role=edge", "az=eu-1b"]))
    assert (web.hosts, web.labels) == ((), ("az=eu-1b", "role=edge"))


@pytest.mark.parametrize(
    ("given", "type", "max_failures", "sizes"),  # of 1, 3, 4, 10 and 1,000 hosts
    [
        ({}, "parallel", None, [1, 3, 4, 10, 1000]),
        ({"canary": "web-01", "pause": "1s"}, "parallel", None, [1, 3, 4, 10, 1000]),
        ({"type": "parallel", "max_failures": 2}, "parallel", 2, [1, 3, 4, 10, 1000]),
        ({"type": "rolling"}, "rolling", 0, [1, 1, 1, 1, 1]),
        ({"batch": 3}, "rolling", 0, [3, 3, 3, 3, 3]),
        ({"batch": "25%"}, "rolling", 0, [1, 1, 1, 3, 250]),
        ({"batch": "1%", "max_failures": 5}, "rolling", 5, [1, 1, 1, 1, 10]),
        ({"batch": "67%"}, "rolling", 0, [1, 3, 3, 7, 670]),
        ({"batch": "100%"}, "rolling", 0, [1, 3, 4, 10, 1000]),
    ],
    ids=str,
)
def test_the_size_of_a_batch(read, given, type, max_failures, sizes):
    strategy = read(entry(strategy=given))[0].strategy
    assert (strategy.type, strategy.max_failures) == (type, max_failures)
    assert [strategy.size(hosts) for hosts in (1, 3, 4, 10, 1000)] == sizes
    assert strategy.size(0) >= 1


@pytest.mark.parametrize(
    ("defaults", "said", "expected"),
    [
        ({"retries": 3}, {}, {"retries": 3}),
        ({"retries": 3}, {"retries": 1}, {"retries": 1}),
        ({"retries": 3}, {"retries": None}, {"retries": 0}),
        ({"health_check": CHECK}, {"health_check": None}, {"health_check": None}),
        ({"env": {"A": "1"}}, {"env": {"B": "2"}}, {"env": {"B": "2"}}),
        ({"build": "make", "activate": "run"}, {"deploy": "all"}, {"build": None, "activate": None, "deploy": "all"}),
        ({"deploy": "all"}, {"activate": "run"}, {"activate": "run", "deploy": None}),
        ({"deploy": "all"}, {"build": None}, {"deploy": "all"}),
        ({"strategy": ROLLING}, {}, {"strategy": deploybot.Strategy("rolling", "25%", "web-01", 300, 0)}),
    ],
    ids=str,
)
def test_an_app_says_otherwise_than_the_defaults(read, defaults, said, expected):
    app = {**ENTRY, **said}
    (web,) = read(as_yaml({"defaults": defaults, "apps": [app]}))
    assert {name: getattr(web, name) for name in expected} == expected


def test_many_groups_in_each_other_cost_nothing(read):
    """Written out they are 2^60 hosts."""
    groups = {f"g{i}": [f"@g{i + 1}", f"@h{i + 1}"] for i in range(60)} | {f"h{i}": [f"@g{i + 1}"] for i in range(60)}
    groups |= {"g60": ["web-60"], "h60": ["web-61"]}
    (web,) = read(json.dumps({"groups": groups, "apps": [{**ENTRY, "hosts": ["@g0"]}]}))
    assert web.hosts == ("web-60", "web-61")


APP = {"apps": [{**ENTRY, "strategy": ROLLING, "health_check": CHECK, "notify": [HOOK], "env": {"A": "b"}}]}
TARGET = "must be a host name as in RFC 1123, the @name of a group, or a label such as role=edge"
BATCH = "must be a number of hosts, 1 or more, or a share from 1% to 100%"
DURATION = "must be a duration such as 200ms, 30s, 5m, 2h or 3d"
VARIABLE = "must be the name of a variable, and none of the agent's own, DEPLOY_..."
VALUE = "must be a string (in quotes) of at most 32768 characters, without NUL"
SHARED = "must be a path within the release, such as .env or uploads/"
PATHS = "must be a pattern of paths such as web/** or **/*.md, where ** stands alone between slashes"
WEB_URL = "must be a URL that starts with http:// or https://"

# (where: keys from the app on, or from the top where it begins with /; value; field and message as told).
REFUSED = [
    ("hots", ["h"], "hots: is not known; did you mean hosts?"),
    ("strategy/bach", 1, "strategy.bach: is not known; did you mean batch?"),
    ("health_check/intervall", 1, "health_check.intervall: is not known; did you mean interval?"),
    ("notify/0/event", [], "notify[0].event: is not known; did you mean events?"),
    ("/defaults/retrys", 1, "defaults.retrys: is not known; did you mean retries?"),
    ("/defaults/hosts", ["h"], "defaults.hosts: is not known"),
    ("/group", {}, "group: is not known; did you mean groups?"),
    ("timeout", "5 min", f"timeout: {DURATION}"),
    ("timeout", True, f"timeout: {DURATION}"),
    ("strategy/pause", "5x", f"strategy.pause: {DURATION}"),
    ("strategy/pause", "8d", "strategy.pause: must be at most 7d"),
    ("health_check/timeout", -1, f"health_check.timeout: {DURATION}"),
    ("health_check/interval", [], f"health_check.interval: {DURATION}"),
    ("health_check/interval", "0s", f"health_check.interval: {DURATION}"),
    ("/defaults/timeout", "1y", f"defaults.timeout: {DURATION}"),
    ("hosts", ["web-01", "@wbe"], "hosts: '@wbe' is no group; did you mean @web?"),
    ("/groups/web", ["@wbe"], "groups.web: '@wbe' is no group; did you mean @web?"),
    ("/groups/web", ["@web"], "groups.web: holds itself, by the groups in it"),
    ("/groups/web", ["a=b"], "groups.web: 'a=b' must be a host name as in RFC 1123, or the @name of a group"),
    ("/groups/web", [], "groups.web: must be a list with at least one string: [first, second]"),
    ("/groups/web", None, "groups.web: is required"),
    ("/groups/@web", ["h"], "groups.@web: must be 1 to 64 of a-z"),
    ("/groups", ["h"], "groups: must be a mapping"),
    ("/defaults", ["h"], "defaults: must be a mapping"),
    ("hosts", ["web_01"], f"hosts: 'web_01' {TARGET}"),
    ("hosts", ["web-01", "role="], f"hosts: 'role=' {TARGET}"),
    ("hosts", ["web-01", "=edge"], f"hosts: '=edge' {TARGET}"),
    ("hosts", ["web-01", "a=b=c"], f"hosts: 'a=b=c' {TARGET}"),
    ("hosts", ["web-01", "@"], f"hosts: '@' {TARGET}"),
    ("hosts", ["web-01", ""], f"hosts: '' {TARGET}"),
    ("strategy/canary", "web-02", "strategy.canary: web-02 is none of the hosts that web names; did you mean web-01?"),
    ("strategy/canary", 7, "strategy.canary: must be a string"),
    ("strategy/type", "rollign", "strategy.type: 'rollign' must be one of parallel, rolling; did you mean rolling?"),
    ("strategy/type", "parallel", "strategy.batch: is for the type rolling alone"),
    ("strategy/canary", None, "strategy.pause: comes after the canary: name one"),
    *(
        (f"strategy/{key}", value, f"strategy.{key}: {message}")
        for key, value, message in [
            *(("batch", value, BATCH) for value in (0, -1, 10_001, 1.5, True, "", "2", "0%", "01%", "101%", "25 %", "٣%", [1])),
            *(("max_failures", value, "must be ") for value in (-1, "1", 10_001, True)),
        ]
    ),
    ("strategy", "rolling", "strategy: must be a mapping"),
    *(
        ("shared", [value], f"shared: {value!r} {SHARED}")
        for value in ("/etc/passwd", "..", "a/../b", "../x", "a//b", ".", "", "/", "a\n")
    ),
    ("shared", ["x" * 256], "shared: 'xxx"),
    ("shared", ".env", "shared: must be a list"),
    *((f"env/{name}", "x", f"env.{name}: {VARIABLE}") for name in ("1A", "A-B", "", "A=B", "DEPLOY_REF", "É", "A B", "A" * 129)),
    *(("env/A", value, f"env.A: {VALUE}") for value in (1, True, None, 1.5, ["x"], "s3cr3t\0", "\ud800", "s3cr3t" * 6000)),
    ("env", ["A=b"], "env: must be a mapping"),
    ("keep_releases", 0, "keep_releases: must be from 1 to 1000"),
    ("keep_releases", "5", "keep_releases: must be an integer"),
    ("health_check/command", "true", "health_check.command: stands instead of url; keep one"),
    ("health_check/url", None, "health_check.url: is required, or a command"),
    ("health_check/success", 0, "health_check.success: must be from 1 to 100"),
    ("health_check", "http://x", "health_check: must be a mapping"),
    *(
        (f"health_check/{key}", value, f"health_check.{key}: {WEB_URL}")
        for key, value in [
            *(
                ("url", value)
                for value in (
                    "ftp://x",
                    "x",
                    "http://",
                    "http:///x",
                    "http://a b",
                    "http://[",
                    "https://h/\n",
                    7,
                    "http://" + "x" * 2041,
                )
            )
        ]
    ),
    ("health_check", {"url": "http://h/", "timeout": "0s"}, "health_check.timeout: must be a duration"),
    ("health_check", {"url": "http://me@h/"}, "health_check.url: must not hold a password or token"),
    ("shared", ["a", "a/"], "shared: a lies within a, which is shared already"),
    ("shared", ["b", "a/b/c", "a/"], "shared: a/b/c lies within a, which is shared already"),
    ("hosts", ["h1", "Role=x"], "hosts: 'Role=x' must be a host name as in RFC 1123"),
    ("rollback_on_failure", "yes", "rollback_on_failure: must be true or false"),
    (
        "notify/0/events",
        ["failed", "faild"],
        "notify[0].events: 'faild' must be one of failed, recovered, success, stuck; did you mean failed?",
    ),
    ("notify/0/events", [], "notify[0].events: must be a list with at least one"),
    ("notify/0/format", "slak", "notify[0].format: 'slak' must be one of json, slack; did you mean slack?"),
    ("notify/0/url", "slack://s3cr3t", f"notify[0].url: {WEB_URL}"),
    ("notify/0/url", None, "notify[0].url: is required"),
    ("notify", {}, "notify: must be a list of mappings"),
    ("notify", ["https://s3cr3t"], "notify: each must be a mapping"),
    ("tags", "v*", "tags: must be a list"),
    *(
        ("paths", [value], f"paths: {value!r} {PATHS}")
        for value in ("", "/web/**", "web/", "a//b", "**.md", "web**", "!web/**", "a\n")
    ),
    ("ignore_paths", ["web/**/"], f"ignore_paths: 'web/**/' {PATHS}"),
    ("ignore_paths", [7], "ignore_paths: must be a list with at least one string"),
]


def changed(where, value):
    """The document of APP with that value there."""
    document = json.loads(json.dumps({"groups": {"web": ["h1"]}, "defaults": {"retries": 0}, **APP}))
    *keys, last = where.removeprefix("/").split("/")
    at = document if where[0] == "/" else document["apps"][0]
    for key in keys:
        at = at[int(key) if isinstance(at, list) else key]
    at[last] = value
    return document


def line_of(field, as_text):
    """Where the key stands that a message names so."""
    where = re.sub(r"\[(\d)\]", r"/\1", field).replace(".", "/")
    is_top = where.partition("/")[0] in ("groups", "defaults", "group")
    text = as_text(changed(f"/{where}" if is_top else where, "HERE"))
    return text[: text.index('"HERE"')].count("\n") + 1


@pytest.mark.parametrize("as_text", [as_yaml, functools.partial(json.dumps, indent=1)], ids=["yaml", "json"])
@pytest.mark.parametrize(("where", "value", "told"), REFUSED, ids=[f"{where}={value!r:.20}" for where, value, _ in REFUSED])
def test_a_mistake_is_told_with_its_line_and_key(refused, monkeypatch, as_text, where, value, told):
    if as_text is not as_yaml:
        monkeypatch.setitem(sys.modules, "yaml", None)
    ((line, message),) = refused(as_text(changed(where, value)))
    assert message.startswith(told)
    assert "s3cr3t" not in message
    assert line == line_of(told.partition(": ")[0], as_text)


def test_every_mistake_at_every_level_is_told_at_once(refused):
    text = """
groups:
  a: ["@b"]
  b: ["@a", "@c"]
defaults:
  timeout: x
apps:
- name: web
  repo: o/n
  hosts: ["@d", web-01]
  strategy:
    type: rolling
    batch: 0
    canary: web-01
  env:
    DEPLOY_X: y
    B: 1
  notify:
  - url: https://x.example.com
  - url: 7
    format: x
"""
    told = [(line, message.partition(":")[0]) for line, message in refused(text)]
    assert told == [
        *((3, "groups.a"), (4, "groups.b"), (4, "groups.b"), (6, "defaults.timeout"), (10, "hosts"), (13, "strategy.batch")),
        *((16, "env.DEPLOY_X"), (17, "env.B"), (20, "notify[1].url"), (21, "notify[1].format")),
    ]


def test_a_mistake_in_the_defaults_is_told_once_for_many_apps(refused):
    apps = [{**ENTRY, "name": name} for name in ("a", "b")]
    assert len(refused(json.dumps({"defaults": {"strategy": {"batch": 0}, "env": {"A": 1}}, "apps": apps}))) == 2
    told = refused(json.dumps({"defaults": {"strategy": {"canary": "web-02"}}, "apps": apps}, indent=1))
    assert [line for line, _ in told] == [4, 4], "which is wrong for each of the apps"


# -- the verb and the reload -------------------------------------------------------------------------------------------


def run(*arguments):
    return subprocess.run([*command("deploybot.py"), *map(str, arguments)], capture_output=True, text=True, timeout=30, check=False)


def test_check_apps_says_what_would_be_taken(tmp_path):
    path = tmp_path / "apps.yaml"
    path.write_text(
        as_yaml({**WHOLE, "apps": [*WHOLE["apps"], ENTRY | {"name": "asked", "health_check": {"command": ["curl", "x"]}}]})
    )
    done = run("check-apps", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout
        == f"""\
asked: myorg/web
  from      https://github.com/myorg/web.git
  hosts     web-01
  order     all hosts at once
  deploys   only when asked
  health    ["curl", "x"]
            every 2s, 1 in a row within 1m
web: myorg/web
  from      git@github.com:myorg/web.git
  hosts     db-01, web-01, web-02, x-1
  and with  role=Edge
  order     canary web-01, 5m, then 25% of the hosts at a time
  stops     at the first failure
  deploys   pushes to main; tags v*
  paths     web/**
  but not   **/*.md
  build     ["npm", "ci"]
  activate  "systemctl restart web"
  health    http://127.0.0.1:3000/health
            every 200ms, 2 in a row within 1m
  shared    .env, uploads/
  env       NODE_ENV
  notify    slack: failed, recovered
  notify    json: failed, recovered
{path} is good: 2 apps
"""
    )


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"strategy": {"canary": "h1"}}, "order     canary h1, then all others at once"),
        ({"strategy": {"canary": "h1", "batch": "25%", "pause": "90s"}}, "order     canary h1, 90s, then 2 hosts at a time (25%)"),
        ({"strategy": {"batch": 1}}, "order     1 host at a time"),
        ({"strategy": {"batch": "1%", "max_failures": 1}}, "order     1 host at a time (1%)"),
        ({"strategy": {"batch": "100%"}}, "order     all hosts at once"),
        ({"strategy": {"batch": 3}, "hosts": ["a=b"]}, "order     3 hosts at a time"),
        ({"strategy": {"batch": "30%"}, "hosts": ["a=b"]}, "order     30% of the hosts at a time"),
        ({"strategy": {"batch": 2, "max_failures": 1}}, "stops     at more than 1 failure"),
        ({"strategy": {"max_failures": 2}}, "stops     at more than 2 failures"),
        ({"deploy_on_push": True}, "deploys   pushes to the default branch"),
        ({"deploy_on_push": True, "tags": ["v*"]}, "deploys   tags v*"),
        ({"deploy_on_push": True, "paths": ["a", "b/**"]}, "paths     a, b/**"),
        ({"build": "é\n\x1b[31m"}, 'build     "\\u00e9\\n\\u001b[31m"'),
        ({"build": "x" * 200}, 'build     "' + "x" * 64 + "..."),
        (
            {"hosts": [f"web-{n:03}.example.com" for n in range(500)]},
            "hosts     web-000.example.com, web-001.example.com and 498 more",
        ),
        ({"hosts": ["x" * 60 + "." + "y" * 60]}, "hosts     " + "x" * 60 + ".yyyy..."),
        ({"hosts": ["a", "b"] + ["x" * 60 + "." + "y" * 60]}, "hosts     a, b and 1 more"),
        (
            {"env": {f"VARIABLE_{n}": "s3cr3t" for n in range(9)}},
            "env       VARIABLE_0, VARIABLE_1, VARIABLE_2, VARIABLE_3 and 5 more",
        ),
    ],
    ids=str,
)
def test_check_apps_fits_in_80_columns(tmp_path, capsys, monkeypatch, more, line):
    """Of a terminal: a program gets all."""
    path = tmp_path / "a"
    path.write_text(entry(**{"hosts": [f"h{n}" for n in range(8)], "notify": [HOOK], **more}))
    assert deploybot.main(["check-apps", str(path)]) == 0
    whole = capsys.readouterr().out
    assert "..." not in whole and " more" not in whole.replace("more than", "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert deploybot.main(["check-apps", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"  {line}" in out.splitlines()
    assert max(map(len, out.splitlines()[:-1])) <= 80
    assert out.isascii() and "s3cr3t" not in out


def check(path, capsys):
    """(exit code, lines on stderr) of the verb in this process."""
    code = deploybot.main(["check-apps", str(path)])
    out, err = capsys.readouterr()
    assert not (code and out)
    return code, err.splitlines()


def test_check_apps_says_every_mistake_with_file_and_line(tmp_path, capsys):
    path = tmp_path / "apps.yaml"
    path.write_text("apps:\n- name: A\n  repo: x\n  hosts: [h]\n")
    code, lines = check(path, capsys)
    assert code == 1
    assert [line.split(": ")[1] for line in lines] == [f"{path}:2", f"{path}:3"]


def test_check_apps_of_a_file_that_cannot_be_read_is_one_line(tmp_path, capsys):
    for path in (tmp_path / "none.yaml", tmp_path):
        code, (line,) = check(path, capsys)
        assert code == 1
        assert str(path) in line


def test_check_apps_wants_a_file():
    done = run("check-apps")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_bad_file_ends_the_start_with_its_lines(make_controller, tmp_path):
    with pytest.raises(deploybot.StartError) as caught:
        make_controller(apps="apps:\n- name: A\n  repo: x\n  hosts: [h]\n")
    assert [line.partition("apps.yaml:")[2][:2] for line in caught.value.problems] == ["2:", "3:"]


def test_a_reload_takes_the_new_file(controller):
    controller.apps_file.write_text(entry())
    assert controller.ok("POST", "/v1/reload")["apps"] == 1
    (app,) = controller.ok("GET", "/v1/apps")["apps"]
    assert app["hosts"] == [
        {"hostname": "web-01", "commit": None, "job_id": None, "deployed_at": None, "wanted": None, "actual": None}
    ]
    assert not {"build", "activate", "deploy", "spec"} & set(app)


@pytest.mark.parametrize(
    "text",
    ["apps: [", "apps:\n- name: A\n", b"\xff", "[" * 100_000, "apps:\n- {name: 2024-13-45}\n"],
    ids=lambda text: repr(text[:12]),
)
def test_a_refused_reload_keeps_the_mapping_in_force(controller, text):
    controller.set_app(**ENTRY)
    controller.apps_file.write_bytes(text if isinstance(text, bytes) else text.encode())
    status, answer = controller.call("POST", "/v1/reload")
    assert status == 422
    assert all(error["field"].startswith("line ") and error["message"] for error in answer["errors"])
    assert [app["name"] for app in controller.ok("GET", "/v1/apps")["apps"]] == ["web"]
    controller.daemon.reload()  # as SIGHUP does: it logs, and does not raise
    assert [app["name"] for app in controller.ok("GET", "/v1/apps")["apps"]] == ["web"]


def test_a_reload_of_a_file_that_is_gone_keeps_the_mapping_in_force(controller):
    controller.set_app(**ENTRY)
    controller.apps_file.unlink()
    status, answer = controller.call("POST", "/v1/reload")
    assert status == 503
    assert "No such file" in answer["detail"] and str(controller.apps_file) in answer["detail"]
    controller.daemon.reload()
    assert len(controller.ok("GET", "/v1/apps")["apps"]) == 1


def of_app(name, *hosts):
    return {"name": name, "repo": f"o/{name}", "hosts": hosts}


def places(controller, query):
    """([(app, [host, ...])], next) of a page."""
    page = controller.ok("GET", f"/v1/apps?{query}")
    return [(app["name"], [host["hostname"] for host in app["hosts"]]) for app in page["apps"]], page["next"]


@pytest.fixture
def paged(controller):
    apps = [of_app("web", "h3", "h1", "h2"), of_app("web-2", "h1"), of_app("api", "h9", "h10")]
    controller.apps_file.write_text(json.dumps({"apps": apps}))
    controller.ok("POST", "/v1/reload")
    return controller


def test_a_page_of_apps_has_so_many_hosts(paged):
    assert places(paged, "") == ([("api", ["h10", "h9"]), ("web", ["h1", "h2", "h3"]), ("web-2", ["h1"])], None)
    assert places(paged, "limit=2") == ([("api", ["h10", "h9"])], "api/h9")
    assert places(paged, "limit=2&after=api/h9") == ([("web", ["h1", "h2"])], "web/h2")
    assert places(paged, "limit=2&after=web/h2") == ([("web", ["h3"]), ("web-2", ["h1"])], None)
    assert places(paged, "limit=3") == ([("api", ["h10", "h9"]), ("web", ["h1"])], "web/h1")
    assert places(paged, "limit=6&after=web-2/h1") == ([], None)


def test_after_an_app_come_the_others(paged):
    assert places(paged, "after=api")[0] == [("web", ["h1", "h2", "h3"]), ("web-2", ["h1"])]
    assert places(paged, "after=web")[0] == [("web-2", ["h1"])]
    assert places(paged, "after=gone/h1")[0] == places(paged, "after=api")[0], "one that has left apps.yaml meanwhile"
    assert places(paged, "after=web/h11")[0] == [("web", ["h2", "h3"]), ("web-2", ["h1"])], "a host that has left"
    for wrong in ("limit=0", "limit=1001", "after=/h1", "after=web/", "after=Web", "before=web"):
        assert paged.call("GET", f"/v1/apps?{wrong}")[0] == 422, wrong


def test_a_page_tells_what_each_of_its_hosts_runs(paged):
    """Read by app and host: not what another app has there, nor what has left apps.yaml."""
    for app, host, commit in (("web", "h2", "a" * 40), ("api", "h9", "b" * 40), ("web", "h4", "c" * 40)):
        agent = paged.register(host)
        job = paged.create(host=host, repo=f"o/{app}", app=app)
        paged.end(paged.beat(agent)["job"], commit=commit)
        shown = [one for part in paged.ok("GET", "/v1/apps?limit=5")["apps"] for one in part["hosts"] if one["job_id"] == job["id"]]
        assert [(one["hostname"], one["commit"]) for one in shown] == ([] if host == "h4" else [(host, commit)])
    assert [one["commit"] for one in paged.ok("GET", "/v1/apps?limit=2&after=web/h1")["apps"][0]["hosts"]] == ["a" * 40, None]


def test_a_token_of_one_app_pages_through_that_app_alone(paged):
    secret = paged.ok("POST", "/v1/tokens", {"role": "viewer", "app": "web"})["secret"]
    mine = paged.acting(secret)
    assert places(mine, "limit=2") == ([("web", ["h1", "h2"])], "web/h2")
    assert places(mine, "limit=2&after=web/h2") == ([("web", ["h3"])], None)
    assert places(mine, "after=web-2") == ([], None)


def test_what_is_frozen_in_a_job_stays_when_the_mapping_changes(controller):
    controller.set_app(**ENTRY, build="old")
    agent, job = controller.register(), controller.create(repo="myorg/web")
    controller.set_app(**ENTRY, build="new")
    claimed = controller.beat(agent)["job"]
    assert (claimed["id"], claimed["spec"]["build"]) == (job["id"], "old")
