"""Webhooks: a signed push makes the jobs of its app's hosts, once; everything else makes none."""

from __future__ import annotations

import concurrent.futures
import fnmatch
import hashlib
import hmac
import json
import socket
import time
import urllib.parse
from random import Random

import pytest
from conftest import SECRET, wait_for

import deploybot
from deploybot import App, Malformed, Push, ValidationError

SHA = "0123456789abcdef" * 2 + "01234567"
ZERO = "0" * 40
A, B, C = "a" * 40, "b" * 40, "c" * 40
PATH = "/v1/webhooks/github"
WEB = {"name": "web", "repo": "myorg/web", "hosts": ["web-01", "web-02"], "deploy_on_push": True}


def payload(**more):
    """A push as GitHub sends it, in what of it matters."""
    return {
        "ref": "refs/heads/main",
        "before": ZERO,
        "after": SHA,
        "deleted": False,
        "repository": {"full_name": "myorg/web", "default_branch": "main"},
        "head_commit": {"id": SHA, "message": "Say hello"},
        "pusher": {"name": "octocat"},
        **more,
    }


def signature(body, secret=SECRET):
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def deliver(controller, body, **headers):
    """(status, answer) of a signed delivery; a header of None is left out."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"X-GitHub-Event": "push", "X-Hub-Signature-256": signature(body), "Authorization": None}
    return controller.call("POST", PATH, body, sent | {name.replace("_", "-"): value for name, value in headers.items()})


def jobs(controller):
    return controller.ok("GET", "/v1/jobs?limit=1000")["jobs"]


@pytest.fixture
def hooked(controller):
    controller.set_app(**WEB)
    return controller


# -- the signature -----------------------------------------------------------------------------------------------------


def test_the_vector_of_github():
    assert deploybot.signature_of("It's a Secret to Everybody", b"Hello, World!") == (
        "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    )


def signers(setting, body, given):
    return deploybot.signers_of(body, given, deploybot.secrets_in(setting))


def test_either_of_two_secrets_counts_while_one_is_being_replaced():
    for secret in ("old", "new"):
        assert signers("old, new", b"x", signature(b"x", secret)) == {secret}
    assert not signers("old,new", b"x", signature(b"x", "old,new"))
    assert not signers("old,new", b"x", signature(b"x", "other"))


@pytest.mark.parametrize("setting", [None, "", ",", " , "])
def test_no_secret_signs_nothing(setting):
    for secret in ("", " ", setting or ""):
        assert not signers(setting, b"x", signature(b"x", secret))


@pytest.mark.parametrize(
    "given",
    ["", "sha256=", signature(b"x")[7:], signature(b"x").upper(), signature(b"x")[:-1], signature(b"x") + "0", "sha1=" + "0" * 40]
    + [signature(b"y"), signature(b"x", "other"), "é" * 71, "sha256=" + "٣" * 64, " " + signature(b"x"), "\ud800"],
)
def test_what_is_no_signature_is_refused(given):
    assert not signers(SECRET, b"x", given)


def refused(controller):
    text = controller.raw("GET", "/metrics")[2].decode()
    return int(text.partition('deploybot_webhook_deliveries_total{outcome="refused"} ')[2].split()[0])


@pytest.mark.parametrize("given", [None, "", "sha256=" + "0" * 64, "sha1=" + "0" * 40, "é"])
def test_a_wrong_signature_makes_nothing(hooked, given):
    status, answer = deliver(hooked, payload(), X_Hub_Signature_256=given)
    assert (status, answer["status"]) == (401, 401)
    assert jobs(hooked) == [] and refused(hooked) == 1


def test_the_signature_is_of_the_raw_bytes(hooked):
    """The same JSON in other bytes is another body."""
    body = json.dumps(payload(), indent=1).encode()
    other = json.dumps(payload()).encode()
    assert deliver(hooked, other, X_Hub_Signature_256=signature(body))[0] == 401
    assert deliver(hooked, body)[0] == 200


def test_the_signature_is_looked_at_before_the_body_is_parsed(hooked):
    for body in (b"{", b"\xff", b"[" * 1000, b""):
        assert deliver(hooked, body, X_Hub_Signature_256="sha256=" + "0" * 64)[0] == 401
        assert deliver(hooked, body)[0] == 400


def test_an_unsigned_ping_is_refused_too(hooked):
    assert deliver(hooked, b"{}", X_GitHub_Event="ping", X_Hub_Signature_256=None)[0] == 401


def test_without_a_secret_the_endpoint_refuses(make_controller):
    controller = make_controller()
    controller.set_app(**WEB)
    for given in (None, signature(json.dumps(payload()).encode(), "")):
        status, answer = deliver(controller, payload(), X_Hub_Signature_256=given)
        assert (status, "DEPLOYBOT_WEBHOOK_SECRET" in answer["detail"]) == (401, True)
    assert jobs(controller) == [] and refused(controller) == 2


def test_two_secrets_over_the_wire(make_controller):
    controller = make_controller(webhook_secret="old,new")
    body = b"{}"
    for secret, status in (("old", 200), ("new", 200), ("third", 401)):
        assert deliver(controller, body, X_GitHub_Event="ping", X_Hub_Signature_256=signature(body, secret))[0] == status


# -- events ------------------------------------------------------------------------------------------------------------


def test_a_push_makes_a_job_for_each_host(hooked):
    status, answer = deliver(hooked, payload())
    assert (status, answer["received"], answer["message"]) == (200, True, "2 jobs for web")
    made = {job["id"]: job for job in jobs(hooked)}
    assert list(made) == answer["jobs_created"][::-1]
    assert {job["host"] for job in made.values()} == {"web-01", "web-02"}
    for job in made.values():
        assert (job["repo"], job["ref"], job["app"], job["status"], job["created_by"]) == (
            "myorg/web",
            SHA,
            "web",
            "pending",
            "github",
        )
        assert job["metadata"] == {
            **{"app": "web", "branch": "main", "commit_message": "Say hello"},
            **{"pusher": "octocat", "trigger": "github_webhook"},
        }


def test_ping_is_answered(hooked):
    assert deliver(hooked, {"zen": "x"}, X_GitHub_Event="ping") == (200, {"received": True, "jobs_created": [], "message": "pong"})


@pytest.mark.parametrize("kind", ["pull_request", "create", "x" * 300, "PUSH"])
def test_another_event_is_ignored(hooked, kind):
    status, answer = deliver(hooked, payload(), X_GitHub_Event=kind)
    assert (status, answer["jobs_created"], answer["message"][:7]) == (200, [], "ignored")
    assert jobs(hooked) == []


@pytest.mark.parametrize(
    "more",
    [
        {"deleted": True, "after": ZERO, "head_commit": None},
        {"after": ZERO},
        {"deleted": True},
        {"ref": "refs/tags/v1"},
        {"ref": "refs/tags/main"},
        {"ref": "refs/notes/x"},
        {"ref": "main"},
        {"ref": "refs/heads/other"},
        {"repository": {"full_name": "myorg/other", "default_branch": "main"}},
    ],
    ids=str,
)
def test_what_deploys_nothing_is_answered_with_its_reason(hooked, more):
    status, answer = deliver(hooked, payload(**more))
    assert (status, answer["received"], answer["jobs_created"], answer["message"][:9]) == (200, True, [], "ignored: ")
    assert jobs(hooked) == []


def test_a_repository_is_compared_without_case(hooked):
    _, answer = deliver(hooked, payload(repository={"full_name": "MyOrg/WEB", "default_branch": "main"}))
    assert len(answer["jobs_created"]) == 2


def test_an_app_that_is_not_deployed_on_push_is_left_alone(controller):
    controller.set_app(**{**WEB, "deploy_on_push": False})
    assert deliver(controller, payload())[1]["jobs_created"] == []


def test_a_form_body_says_the_same(hooked):
    body = ("payload=" + urllib.parse.quote_plus(json.dumps(payload(head_commit={"message": "é+ &=%"})))).encode()
    status, answer = deliver(hooked, body, Content_Type="application/x-www-form-urlencoded; charset=utf-8")
    assert (status, len(answer["jobs_created"])) == (200, 2)
    assert jobs(hooked)[0]["metadata"]["commit_message"] == "é+ &=%"


@pytest.mark.parametrize(
    "body", [b"", b"x", b"payload=", b"other=1", b"payload={", b"payload=%ff", b"\xff=1", b"&".join([b"a=1"] * 50), b"%"]
)
def test_a_form_without_a_good_payload_is_malformed(hooked, body):
    assert deliver(hooked, body, Content_Type="application/x-www-form-urlencoded")[0] == 400
    with pytest.raises(Malformed):
        deploybot.push_payload(body, "Application/X-WWW-Form-Urlencoded")


# -- once --------------------------------------------------------------------------------------------------------------


def finish_all(controller):
    for hostname in ("web-01", "web-02"):
        agent = controller.register(hostname)
        controller.end(controller.beat(agent)["job"], exit_code=0)


def test_a_redelivery_answers_the_same_jobs_also_after_a_restart(hooked):
    _, first = deliver(hooked, payload(), X_GitHub_Delivery="d-1")
    assert len(first["jobs_created"]) == 2
    for between in (lambda: finish_all(hooked), hooked.restart, lambda: None):
        status, again = deliver(hooked, payload(), X_GitHub_Delivery="d-1")
        assert (status, again["jobs_created"]) == (200, first["jobs_created"])
        assert again["message"].startswith("taken before, nothing new is made: 2 jobs for web")
        between()
    assert len(jobs(hooked)) == 2


def test_a_signed_body_under_another_id_makes_nothing_more(hooked):
    """The id is not signed: who saw one delivery could send it again under another."""
    _, first = deliver(hooked, payload(), X_GitHub_Delivery="d-1")
    finish_all(hooked)
    for delivery in ("d-2", None, ""):
        assert deliver(hooked, payload(), X_GitHub_Delivery=delivery)[1]["jobs_created"] == first["jobs_created"]
    assert len(jobs(hooked)) == 2


def test_a_redelivery_after_a_failure_works(hooked):
    def fail(*_):
        raise deploybot.Unavailable("on purpose")

    push, hooked.jobs.add = hooked.jobs.add, fail
    assert deliver(hooked, payload(), X_GitHub_Delivery="d-1")[0] == 503
    hooked.jobs.add = push
    assert len(deliver(hooked, payload(), X_GitHub_Delivery="d-1")[1]["jobs_created"]) == 2


def test_another_push_of_a_commit_under_way_makes_no_second_job(hooked):
    deliver(hooked, payload(), X_GitHub_Delivery="d-1")
    _, answer = deliver(hooked, payload(before=SHA), X_GitHub_Delivery="d-2")
    assert (answer["jobs_created"], len(jobs(hooked))) == ([], 2)


def test_many_deliveries_of_one_push_at_once_make_its_jobs_once(hooked):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: deliver(hooked, payload(), X_GitHub_Delivery="d-1"), range(16)))
    assert {status for status, _ in answers} == {200}
    assert len({tuple(answer["jobs_created"]) for _, answer in answers}) == 1
    assert len(jobs(hooked)) == 2


def in_one_commit(controller, *bodies, **headers):
    """Answers to deliveries that all looked at the database before the first of them was stored."""
    store = controller.daemon.store
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        with store._writer:
            waiting = []
            for count, body in enumerate(bodies, 1):
                waiting.append(pool.submit(deliver, controller, body, **headers))
                wait_for(lambda count=count: len(store._waiting) == count)
        return [one.result(20) for one in waiting]


@pytest.mark.parametrize("headers", [{"X_GitHub_Delivery": "d-1"}, {}], ids=["by its id", "by what was signed"])
def test_a_redelivery_that_looked_before_the_first_was_stored(hooked, headers):
    (first, made), (again, same) = in_one_commit(hooked, payload(), payload(), **headers)
    assert (first, again, len(made["jobs_created"]), same["jobs_created"]) == (200, 200, 2, made["jobs_created"])
    assert "taken before" in same["message"]
    assert len(jobs(hooked)) == 2


def test_an_older_push_that_looked_before_the_newer_was_stored(hooked):
    newer = payload(repository={"full_name": "myorg/web", "default_branch": "main", "pushed_at": 200})
    older = payload(after="b" * 40, repository={"full_name": "myorg/web", "default_branch": "main", "pushed_at": 100})
    (_, made), (_, late) = in_one_commit(hooked, newer, older)
    assert (len(made["jobs_created"]), late["jobs_created"]) == (2, [])
    assert late["message"] == "ignored: web: a newer push to main was taken before"


# -- branches ----------------------------------------------------------------------------------------------------------


def wanted(branch, branches=None, default="main", on_push=True):
    push = Push.parse(payload(ref=f"refs/heads/{branch}", repository={"full_name": "o/n", "default_branch": default}))
    return not push.rule(App("a", "o/n", ("h",), "u", on_push, branches))


@pytest.mark.parametrize(
    ("branch", "pattern", "wants"),
    [
        ("main", "main", True),
        ("Main", "main", False),
        ("main2", "main", False),
        ("release/1.0", "release/*", True),
        ("release/1/2", "release/*", True),
        ("release", "release/*", False),
        ("pre/release/1", "release/*", False),
        ("v1", "v?", True),
        ("v10", "v?", False),
        ("a1", "a[0-9]", True),
        ("ab", "a[!0-9]", True),
        ("mainx", "main.", False),
        ("main", "*", True),
    ],
)
def test_branches_are_shell_patterns(branch, pattern, wants):
    assert wanted(branch, (pattern,)) is wants
    assert wanted(branch, ("never", pattern)) is wants


def test_without_branches_the_default_branch_is_deployed():
    assert wanted("trunk", default="trunk")
    assert not wanted("main", default="trunk")
    for default in (None, "", 7):
        assert [wanted(branch, default=default) for branch in ("main", "master", "trunk")] == [True, True, False]


def test_a_pattern_of_stars_takes_no_time():
    assert not wanted("a" * 200, ("*a" * 100 + "b",))


# -- rules -------------------------------------------------------------------------------------------------------------


def commit(*files, id=SHA, **more):
    return {"id": id, "message": "x", "added": [], "removed": [], "modified": list(files), **more}


def changing(*commits, **more):
    """A push to a branch that GitHub lists whole."""
    return payload(before="a" * 40, created=False, forced=False, commits=list(commits), **more)


DEPLOYED = {"deploy_on_push": True, "paths": ("web/**",), "ignore_paths": ("**/*.md",)}
OTHER_BRANCH = {"ref": "refs/heads/other"}
SKIP = {"head_commit": {"id": SHA, "message": "Typo\n\n[Skip Deploy] please"}}
ASIDE = {"commits": [commit("api/x.py")]}


@pytest.mark.parametrize(
    ("app", "push", "rule"),
    [
        ({}, {}, ""),
        ({"deploy_on_push": False}, {"deleted": True, "after": ZERO, **OTHER_BRANCH, **SKIP, **ASIDE}, "deleted"),
        ({}, {"after": ZERO}, "deleted"),
        ({"deploy_on_push": False}, {**OTHER_BRANCH, **SKIP, **ASIDE}, "not_on_push"),
        ({}, {**OTHER_BRANCH, **SKIP, **ASIDE}, "ref"),
        ({}, {"ref": "refs/tags/main"}, "ref"),
        ({"branches": ("*",)}, {"ref": "refs/tags/v1"}, "ref"),
        ({"tags": ("v*",)}, {"ref": "refs/heads/v1"}, "ref"),
        ({"tags": ("v*",)}, {"ref": "refs/tags/w1"}, "ref"),
        ({"tags": ("w", "v*")}, {"ref": "refs/tags/v1"}, ""),
        ({"tags": ("v*",)}, {}, "ref"),  # with tags alone, no branch is meant
        ({"tags": ("v*",), "branches": ("main",)}, {}, ""),
        ({"tags": ("*",), "branches": ("*",)}, {"ref": "refs/notes/x"}, "ref"),
        ({}, {**SKIP, **ASIDE}, "skip"),
        ({}, {"head_commit": {"id": SHA, "message": "x" * 2000 + "[skip deploy]"}}, "skip"),
        ({}, {"head_commit": {"id": SHA, "message": "skip deploy"}}, ""),
        ({}, {"commits": [commit("web/x.js", message="[skip deploy]")]}, ""),
        ({}, ASIDE, "paths"),
        ({}, {"commits": [commit("api/x.py"), commit("web/x.js")]}, ""),
        ({}, {"commits": [commit("web/x.md", "web/y/z.md")]}, "paths"),
        ({}, {"commits": [commit("web/x.md"), commit("api/y.py")]}, ""),
        ({"paths": ()}, ASIDE, ""),
        ({"paths": ()}, {"commits": [commit("x.md")]}, "paths"),
        ({"ignore_paths": ()}, {"commits": [commit("web/x.md")]}, ""),
        ({}, {**ASIDE, "forced": True}, ""),
    ],
    ids=str,
)
def test_the_first_rule_that_applies(app, push, rule):
    parsed = Push.parse(changing(commit("web/x.js"), **push) if "commits" not in push else {**changing(), **push})
    assert parsed.rule(App("a", "myorg/web", ("h",), **{**DEPLOYED, **app})) == rule


def test_the_words_of_each_rule(controller):
    """Each app of the repository says its own."""
    apps = [
        {**WEB, "name": "all", "branches": ["dev"]},
        {**WEB, "name": "asked", "deploy_on_push": False},
        {**WEB, "name": "part", "paths": ["web/**"]},
    ]
    controller.apps_file.write_text(json.dumps({"apps": apps}))
    controller.ok("POST", "/v1/reload")
    assert deliver(controller, changing(commit("api/x")))[1]["message"] == (
        "ignored: all: neither branches nor tags name main; asked: deploy_on_push is off; "
        "part: it changes nothing that paths and ignore_paths leave"
    )
    assert "part: its message says [skip deploy]" in deliver(controller, changing(**SKIP))[1]["message"]
    assert "all: the ref was deleted; asked:" in deliver(controller, payload(after=ZERO))[1]["message"]
    assert "all: neither branches nor tags name v1;" in deliver(controller, payload(ref="refs/tags/v1"))[1]["message"]
    assert deliver(controller, changing(commit("web/x")))[1]["message"] == "2 jobs for part"


def test_a_tag_deploys_the_commit_that_it_points_at(controller):
    controller.set_app(**WEB, tags=["v*"])
    tagged = payload(ref="refs/tags/v1.2", after=B, head_commit={"id": A, "message": "x"}, created=True)
    assert deliver(controller, tagged)[1]["message"] == "2 jobs for web"
    assert {(job["ref"], job["metadata"]["tag"], job["metadata"]["branch"]) for job in jobs(controller)} == {(A, "v1.2", None)}
    status, answer = deliver(controller, payload(ref="refs/tags/v1..2"))
    assert (status, answer["errors"][0]["field"]) == (422, "ref")


# (pattern, paths that it names, paths that it does not).
PATTERNS = [
    ("web/**", ["web/a", "web/a/b.c", "web/ "], ["web", "webs/a", "a/web/b", "Web/a"]),
    ("**/*.md", ["a.md", "a/b.md", "a/b/c.md", ".md"], ["a.mdx", "a.md/b", "amd"]),
    ("*.md", ["a.md", ".md"], ["a/b.md", "a.md/c"]),
    ("**", ["a", "a/b", "\n"], []),
    ("**/**", ["a", "a/b"], []),
    ("a/**/b", ["a/b", "a/x/b", "a/x/y/b", "a/b/b"], ["ab", "a/b/c", "x/a/b", "a/xb"]),
    ("a/**/b/**/c", ["a/b/c", "a/x/b/y/c", "a/b/b/c", "a/b/c/c"], ["a/c", "a/b", "a/bc", "a/c/b"]),
    ("**/a/*b", ["a/b", "a/ab", "x/a/xb", "a/a/b", "a/x/a/b"], ["a/b/c", "a/x/b"]),
    ("**/a/*/c/**", ["a/b/c/d", "a/a/b/c/d/e"], ["a/c/d", "a/b/c"]),
    ("src/?.py", ["src/a.py", "src/é.py"], ["src/ab.py", "src//.py", "src/.py"]),
    ("a*b*c", ["abc", "axbxc", "abcc", "abbc"], ["ab/c", "abcd", "acb"]),
    ("a*b?c*d", ["abxcd", "abbxcd", "aabbbcxd"], ["abcd", "ab/cd"]),
    ("*", ["a", ""], ["a/b"]),
    ("a/*", ["a/b", "a/"], ["a/b/c", "a"]),
    ("[ab].(x)+", ["[ab].(x)+"], ["a.x", "a.(x)+"]),
    ("a***b", ["ab", "axb"], ["a/b"]),
]


@pytest.mark.parametrize(("pattern", "named", "others"), PATTERNS, ids=[pattern for pattern, _, _ in PATTERNS])
def test_patterns_of_paths(pattern, named, others):
    for patterns in ((pattern,), ("never", pattern, "nor/**/this")):
        matching = deploybot.path_form(patterns).fullmatch
        assert [path for path in [*named, *others] if matching(path)] == named


def simple(pattern, path):
    """What a pattern means, by trying everything."""
    if not pattern:
        return not path
    if pattern == ["**"]:
        return bool(path)
    if pattern[0] == "**":
        return any(simple(pattern[1:], path[i:]) for i in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and simple(pattern[1:], path[1:])


def test_patterns_mean_what_trying_everything_finds():
    random = Random(7)
    seen = set()
    for _ in range(5_000):
        pattern = [random.choice(["**", "a", "b", "*", "a*", "*b", "?", "a?*", "*a*b"]) for _ in range(random.randint(1, 5))]
        path = ["".join(random.choices("ab", k=random.randint(1, 3))) for _ in range(random.randint(1, 6))]
        found = bool(deploybot.path_form(("/".join(pattern),)).fullmatch("/".join(path)))
        assert found == simple(pattern, path), ("/".join(pattern), "/".join(path))
        seen.add((found, "**" in pattern))
    assert len(seen) == 4


@pytest.mark.parametrize(
    "pattern",
    [
        "**/" + "a*" * 60 + "b",
        "/".join(["**", "a"] * 40 + ["b"]),
        "/".join(["*a*a*a"] * 20),
        "**/*a*/**/*a*/**/*a*b",
        "*" + "?*" * 60 + "b",
    ],
)
def test_no_path_makes_a_pattern_slow(pattern):
    """Twenty times the path takes some twenty times as long: with squares it were four hundred, and with powers the end of days."""

    def seconds(path):
        begin = time.perf_counter()
        for _ in range(5):
            assert not deploybot.path_form((pattern,)).fullmatch(path)
        return time.perf_counter() - begin

    for part in ("a", "a/", "aab/", "a/b/"):
        short, long = seconds(part * 500), seconds(part * 10_000)
        assert long < max(short, 0.001) * 100, part


FULL_LIST = [commit("a", added=["b"], removed=["c"]), commit("d")]


@pytest.mark.parametrize(
    ("push", "files"),
    [
        (changing(*FULL_LIST), {"a", "b", "c", "d"}),
        (changing(*FULL_LIST) | {"forced": True}, None),
        (changing(*FULL_LIST) | {"created": True}, None),
        (changing(*FULL_LIST) | {"forced": None}, None),
        (changing(*FULL_LIST) | {"before": ZERO}, None),
        (changing(*FULL_LIST) | {"before": None}, None),
        (changing(*[commit("a")] * 2047), {"a"}),
        (changing(*[commit("a")] * 2048), None),
        (changing(commit("a"), commit()), None),
        (changing(commit("a"), {"id": SHA}), None),
        (changing(commit("a"), 7), None),
        (changing(commit("a", added=None)), {"a"}),
        (changing(commit("a", added="b")), None),
        (changing(commit("a", 7)), None),
        (changing(), None),
        (changing() | {"commits": None}, None),
        (changing() | {"commits": {"a": 1}}, None),
        (payload(before=A), None),
    ]
    # Gitea and Forgejo say how many there were
    + [
        (payload(before=A, commits=FULL_LIST, total_commits=total), {"a", "b", "c", "d"} if total == 2 else None)
        for total in (2, 3, 1, 0, "2", True)
    ]
    + [(payload(before=A, commits=FULL_LIST), None)],
)
def test_the_files_of_a_push_are_known_where_the_list_is_whole(push, files):
    assert Push.parse(push).files == files


# -- hostile pushes ----------------------------------------------------------------------------------------------------

HOSTILE = [
    "$(touch canary)",
    "`id`",
    "'; DROP TABLE jobs; --",
    "\x1b[31mred",
    "<script>alert(1)</script>",
    "a\r\nX-Evil: 1",
    "\0",
    "\u202eevil",
    "x" * 5000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:15]))
def test_hostile_messages_are_kept_as_text_and_cut(hooked, text):
    status, answer = deliver(hooked, payload(head_commit={"message": text}, pusher={"name": text}))
    assert (status, len(answer["jobs_created"])) == (200, 2)
    metadata = jobs(hooked)[0]["metadata"]
    assert (metadata["commit_message"], metadata["pusher"]) == (text[:1000], text[:100])


@pytest.mark.parametrize(
    "branch", ["-x", "--upload-pack=x", "a..b", "a b", "a\nb", "", "a@{1}", "a\\b", "x" * 300, "\x1b[31m", ".lock", "a.lock"]
)
def test_hostile_branches_are_refused(hooked, branch):
    controller = hooked
    controller.set_app(**WEB, branches=["*"])
    status, answer = deliver(controller, payload(ref="refs/heads/" + branch))
    assert (status, answer["errors"][0]["field"]) == (422, "ref")
    assert jobs(controller) == []


def test_a_branch_that_git_takes_is_taken_and_only_its_commit_is_deployed(controller):
    controller.set_app(**WEB, branches=["*"])
    deliver(controller, payload(ref="refs/heads/a;touch${IFS}x"))
    assert {(job["ref"], job["metadata"]["branch"]) for job in jobs(controller)} == {(SHA, "a;touch${IFS}x")}


def test_every_wrong_field_of_a_push_is_named(hooked):
    wrong = payload(ref=7, after="main", repository={"full_name": "../x"}, deleted="no")
    status, answer = deliver(hooked, wrong)
    assert status == 422
    assert {error["field"] for error in answer["errors"]} == {"ref", "after", "repository.full_name", "deleted"}


@pytest.mark.parametrize("name", ["ref", "after", "repository"])
@pytest.mark.parametrize("value", [None, 7, [], {}, True], ids=repr)
def test_a_push_without_what_it_needs_is_refused(name, value):
    with pytest.raises(ValidationError):
        Push.parse(payload(**{name: value}))


@pytest.mark.parametrize("value", [None, 7, [], "x", {"message": 7}, {"name": []}], ids=repr)
def test_what_is_only_nice_to_have_may_be_odd(value):
    push = Push.parse(payload(head_commit=value, pusher=value))
    assert (push.message, push.pusher, push.commit) == ("", "", SHA)


def test_the_clone_url_never_comes_from_the_push(controller):
    controller.set_app(**WEB, clone_url="https://git.example.com/web.git")
    evil = {"full_name": "myorg/web", "default_branch": "main", "clone_url": "ext::sh -c id", "ssh_url": "-x"}
    deliver(controller, payload(repository=evil))
    claimed = controller.beat(controller.register("web-01"))["job"]
    assert claimed["spec"]["clone_url"] == "https://git.example.com/web.git"


# -- secrets of apps ---------------------------------------------------------------------------------------------------

OWN = {"name": "own", "repo": "myorg/web", "hosts": ["own-01"], "deploy_on_push": True, "webhook_secret_file": "own.secret"}
OTHER = {"name": "other", "repo": "evil/other", "hosts": ["h"], "deploy_on_push": True, "webhook_secret_file": "other.secret"}


@pytest.fixture
def guarded(make_controller):
    """Apps of the same repository with the secret of the controller and with one of its own, and one of another repository."""
    return guard(make_controller(webhook_secret=SECRET), WEB, OWN, OTHER)


def guard(controller, *apps, own="own secret\n", other="other secret\n"):
    (controller.folder / "own.secret").write_text(own)
    (controller.folder / "other.secret").write_text(other)
    controller.apps_file.write_text(json.dumps({"apps": apps}))
    controller.ok("POST", "/v1/reload")
    return controller


def signed(controller, secret, body=None, **headers):
    """(status, hosts of the jobs made, message) of a push signed with that secret."""
    data = json.dumps(body or payload()).encode()
    status, answer = deliver(controller, data, X_Hub_Signature_256=signature(data, secret), **headers)
    made = [controller.job(job)["host"] for job in answer.get("jobs_created", ())]
    return status, made, answer.get("message", answer.get("detail"))


def test_an_app_takes_what_is_signed_with_its_own_secret_alone(guarded):
    assert signed(guarded, "own secret", X_GitHub_Delivery="d-1")[:2] == (200, ["own-01"])
    # the repository has two webhooks: the same push comes twice, with two signatures
    assert signed(guarded, SECRET, X_GitHub_Delivery="d-2")[:2] == (200, ["web-01", "web-02"])
    assert signed(guarded, SECRET, X_GitHub_Delivery="d-3")[1] == ["web-01", "web-02"] and len(jobs(guarded)) == 3


def test_the_secret_of_the_controller_is_not_that_of_such_an_app(guarded):
    assert signed(guarded, SECRET)[1] == ["web-01", "web-02"]
    assert {job["app"] for job in jobs(guarded)} == {"web"}


def test_a_redelivery_that_is_signed_anew_is_known_by_its_id(guarded):
    """As GitHub does after the secret was changed."""
    _, made, _ = signed(guarded, "own secret", X_GitHub_Delivery="d-1")
    guarded.end(guarded.beat(guarded.register("own-01"))["job"])
    guard(guarded, OWN, own="new secret")
    assert signed(guarded, "new secret", X_GitHub_Delivery="d-1")[1] == made == ["own-01"]
    assert len(jobs(guarded)) == 1


def test_the_secret_of_another_app_makes_nothing(guarded):
    """Who may sign pushes of one repository cannot forge another's."""
    status, made, message = signed(guarded, "other secret")
    assert (status, made) == (200, [])
    assert message == "ignored: it is signed with another secret than those of the apps of myorg/web"
    assert jobs(guarded) == []
    assert signed(guarded, "nobody's")[0] == 401
    assert signed(guarded, "own secret")[1] == ["own-01"], "and the forged one does not count as this delivery"


def test_a_forged_push_holds_back_no_real_one(guarded):
    """Neither by the id of a delivery nor by its time."""
    future = {"full_name": "myorg/web", "default_branch": "main", "pushed_at": 4_000_000_000}
    signed(guarded, "other secret", payload(repository=future), X_GitHub_Delivery="d-1")
    now = {**future, "pushed_at": 1_790_000_000}
    assert signed(guarded, "own secret", payload(repository=now), X_GitHub_Delivery="d-1")[1] == ["own-01"]


def test_without_a_secret_of_the_controller_an_app_with_its_own_is_served(make_controller):
    controller = guard(make_controller(), WEB, OWN)
    assert signed(controller, "own secret")[:2] == (200, ["own-01"])
    assert signed(controller, SECRET)[0] == 401
    assert signed(controller, "")[0] == 401


def test_while_a_secret_is_rotated_its_file_holds_both(guarded):
    guard(guarded, OWN, own="\n  new secret \r\n\nown secret\n")
    for number, secret in enumerate(("new secret", "own secret")):
        assert signed(guarded, secret, payload(after=f"{number + 1}" * 40, before=f"{number + 3}" * 40))[1] == ["own-01"]
    assert signed(guarded, "new secret \r")[0] == 401
    guard(guarded, OWN, own="new secret")
    assert signed(guarded, "own secret", payload(after="8" * 40))[0] == 401
    assert signed(guarded, "new secret", payload(after="9" * 40, before="7" * 40))[1] == ["own-01"]


def test_a_redelivery_with_another_secret_is_not_answered_with_the_jobs(guarded):
    """What was made for an app is told to those who can sign for it."""
    assert signed(guarded, "own secret", X_GitHub_Delivery="d-1")[1] == ["own-01"]
    evil = payload(repository={"full_name": "evil/other", "default_branch": "main"})
    assert signed(guarded, "other secret", X_GitHub_Delivery="d-1")[:2] == (200, [])
    assert signed(guarded, "other secret", evil, X_GitHub_Delivery="d-1")[1] == ["h"], "another delivery, though of that id"


def test_a_secret_file_that_is_none_is_a_mistake_with_its_line(controller, tmp_path):
    """And says what is wrong without what is in it."""
    good = "apps:\n- name: web\n  repo: o/n\n  hosts: [h]\n  webhook_secret_file: {}\n"
    (controller.folder / "empty").write_text(" \n\n")
    (controller.folder / "odd").write_bytes(b"s3cr3t\xff\xfe")
    (controller.folder / "good").write_text("x")
    for file, message in (
        ("missing", "missing: No such file or directory"),
        ("empty", "empty is empty"),
        ("odd", "odd is not UTF-8"),
        (".", ".: Is a directory"),
        ("7", "must be the path of a file"),
        ('"a\\0b"', "must be the path of a file"),
        ("[good]", "must be the path of a file"),
        (controller.folder / "gone" / "x", "No such file or directory"),
    ):
        controller.apps_file.write_text(good.format(file))
        status, answer = controller.call("POST", "/v1/reload")
        assert (status, [error["field"] for error in answer["errors"]]) == (422, ["line 5"]), file
        told = answer["errors"][0]["message"]
        assert told.startswith("webhook_secret_file: ") and message in told, told
        assert "s3cr3t" not in told and "0xff" not in told
    for file in ("good", "./good", controller.folder / "good"):
        controller.apps_file.write_text(good.format(file))
        assert controller.ok("POST", "/v1/reload")["apps"] == 1


def test_no_reader_sees_the_secret_of_an_app(guarded):
    agent = guarded.register("own-01")
    signed(guarded, "own secret")
    seen = [guarded.raw("GET", path)[2] for path in ("/v1/apps", "/v1/jobs", "/v1/audit")]
    seen.append(json.dumps(guarded.beat(agent)["job"]).encode())
    for text in seen:
        assert b"own" in text and b"own secret" not in text and b"own.secret" not in text


# -- deliveries come in any order --------------------------------------------------------------------------------------


def pushed(controller, after, before=ZERO, at=None, ref="refs/heads/main", **headers):
    """(how many jobs were made, the message) of a push."""
    repository = {"full_name": "myorg/web", "default_branch": "main", **({} if at is None else {"pushed_at": at})}
    status, answer = deliver(controller, payload(after=after, before=before, ref=ref, repository=repository), **headers)
    assert status == 200
    return len(answer["jobs_created"]), answer["message"]


LATE = (0, "ignored: web: a newer push to main was taken before")


def test_an_older_push_that_comes_late_replaces_nothing(hooked):
    assert pushed(hooked, B, A, 200)[0] == 2
    assert pushed(hooked, A, ZERO, 150) == LATE
    assert pushed(hooked, C, ZERO, 199) == LATE, "what came late is not the newest"
    assert {job["ref"] for job in jobs(hooked)} == {B}
    assert pushed(hooked, C, B, 201)[0] == 2


def test_the_guard_outlives_a_restart_and_the_end_of_the_jobs(hooked):
    pushed(hooked, B, A, 200)
    finish_all(hooked)
    hooked.restart()
    assert pushed(hooked, A, ZERO, 199) == LATE
    assert pushed(hooked, A, ZERO, 199, X_GitHub_Delivery="again")[1].startswith("taken before, nothing new is made: ignored")


def test_two_pushes_of_one_second_are_told_apart_by_the_commit_before(hooked):
    assert pushed(hooked, B, A, 200)[0] == 2
    assert pushed(hooked, A, ZERO, 200) == LATE
    assert pushed(hooked, C, B, 200)[0] == 2


@pytest.mark.parametrize(("first", "second"), [(None, None), (200, None), (None, 200), (None, "300"), (None, True)])
def test_without_a_time_the_commit_before_tells(hooked, first, second):
    assert pushed(hooked, B, A, first)[0] == 2
    assert pushed(hooked, A, ZERO, second) == LATE
    assert pushed(hooked, C, B, second)[0] == 2


def test_a_forced_push_back_is_the_newest(hooked):
    """It names a commit that was there before, and it is what somebody wants now."""
    pushed(hooked, B, A, 200)
    finish_all(hooked)
    assert pushed(hooked, A, B, 201)[0] == 2
    assert pushed(hooked, B, A, 200, X_GitHub_Delivery="x")[0] in (0, 2) and hooked.job(jobs(hooked)[0]["id"])["ref"] == A


def test_each_branch_and_repository_has_an_order_of_its_own(controller):
    apps = [{**WEB, "branches": ["*"]}, {**WEB, "name": "two", "repo": "myorg/two", "branches": ["*"]}]
    controller.apps_file.write_text(json.dumps({"apps": apps}))
    controller.ok("POST", "/v1/reload")
    assert pushed(controller, B, A, 200)[0] == 2
    assert pushed(controller, A, ZERO, 100, ref="refs/heads/dev")[0] == 2
    two = payload(repository={"full_name": "myorg/two", "pushed_at": 100})
    assert len(deliver(controller, two)[1]["jobs_created"]) == 2
    late = payload(after=A, repository={"full_name": "MyOrg/WEB", "pushed_at": 100})
    assert deliver(controller, late)[1]["message"] == LATE[1], "names of repositories have no case"


def test_each_app_has_an_order_of_its_own(guarded):
    """Two webhooks of one repository, whose deliveries come as they like: what one app took says nothing of the other's."""

    def push(secret, commit, at):
        repository = {"full_name": "myorg/web", "default_branch": "main", "pushed_at": at}
        return signed(guarded, secret, payload(after=commit, repository=repository))[1]

    assert push("own secret", B, 200) == ["own-01"]
    assert push(SECRET, A, 100) == ["web-01", "web-02"]
    assert push(SECRET, B, 200) == ["web-01", "web-02"]
    assert push("own secret", A, 100) == push(SECRET, C, 150) == []


def test_what_deploys_nothing_holds_nothing_back(hooked):
    """A push is the newest once an app took it."""
    hooked.set_app(**{**WEB, "deploy_on_push": False})
    assert pushed(hooked, B, A, 200)[0] == 0
    hooked.set_app(**WEB)
    assert pushed(hooked, A, ZERO, 100)[0] == 2


def test_the_commit_of_a_tag_is_what_it_points_at():
    """`after` may be the tag's own object, which no branch reaches."""
    push = Push.parse(payload(ref="refs/tags/v1", after=B, head_commit={"id": A, "message": "x"}))
    assert (push.commit, push.branch) == (A, None)
    for odd in (None, {}, {"id": "main"}, {"id": 7}, {"id": A + "0"}):
        assert Push.parse(payload(ref="refs/tags/v1", after=B, head_commit=odd)).commit == B
    assert Push.parse(payload(ref="refs/heads/main", after=B, head_commit={"id": A})).commit == B
    assert Push.parse(payload(ref="refs/tags/v1", after=ZERO, deleted=True, head_commit=None)).commit is None


# -- Gitea, Forgejo and Gogs -------------------------------------------------------------------------------------------

GITEA_USER = {"id": 1, "login": "gitea", "full_name": "", "email": "g@example.com", "username": "gitea"}
GITEA = {  # https://docs.gitea.com/usage/webhooks, and Forgejo's is the same
    **{"ref": "refs/heads/main", "before": A, "after": SHA, "compare_url": "http://git.example.com/myorg/web/compare/a...b"},
    **{
        "commits": [commit("web/x.js", message="Say hello\n")],
        "total_commits": 1,
        "head_commit": commit("web/x.js", message="Say hello\n"),
    },
    **{"repository": {"id": 140, "full_name": "myorg/web", "default_branch": "main", "updated_at": "2026-11-23T13:13:37Z"}},
    **{"pusher": GITEA_USER, "sender": GITEA_USER},
}
GOGS = {  # https://gogs.io/advancing/webhooks
    **{"ref": "refs/heads/main", "before": A, "after": SHA, "compare_url": "http://git.example.com/myorg/web/compare/a...b"},
    "commits": [commit("web/x.js", message="Say hello\n"), commit("web/y.js", id=B, message="not this one")],
    "repository": {"id": 140, "full_name": "myorg/web", "default_branch": "main", "updated_at": "2026-11-23T13:13:37Z"},
    **{"pusher": {"id": 1, "username": "gitea", "full_name": ""}, "sender": {"id": 1, "login": "gitea"}},
}
GOGS_TAG = {
    "ref": "v1",
    "ref_type": "tag",
    "sha": SHA,
    "default_branch": "main",
    "repository": GOGS["repository"],
    "sender": GOGS["sender"],
}
GITEA_TAG = {name: value for name, value in GOGS_TAG.items() if name != "default_branch"}


def headers_of(sender, body, event="push", delivery="d-1", secret=SECRET):
    """As that program sends them."""
    mac = signature(body, secret)
    names = {"gogs": ["gogs"], "gitea": ["gitea", "gogs"], "forgejo": ["forgejo", "gitea", "gogs"]}[sender]
    found = {
        f"X-{name}-{what}": value
        for name in names
        for what, value in (("Event", event), ("Delivery", delivery), ("Signature", mac[7:]))
    }
    if sender != "gogs":
        found |= {
            "X-GitHub-Event": event,
            "X-GitHub-Delivery": delivery,
            "X-Hub-Signature-256": mac,
            "X-Hub-Signature": "sha1=" + "0" * 40,
        }
    return {"X-GitHub-Event": None, "X-Hub-Signature-256": None, **found}


def deliver_from(controller, sender, document, event="push", **more):
    body = json.dumps(document).encode()
    return deliver(controller, body, **headers_of(sender, body, event, **more))


@pytest.mark.parametrize(("sender", "document"), [("gitea", GITEA), ("forgejo", GITEA), ("gogs", GOGS)])
def test_a_push_of_another_program_deploys(hooked, sender, document):
    status, answer = deliver_from(hooked, sender, document)
    assert (status, answer["message"]) == (200, "2 jobs for web")
    assert {(job["ref"], job["created_by"]) for job in jobs(hooked)} == {(SHA, "github")}
    assert jobs(hooked)[0]["metadata"] == {
        **{"app": "web", "branch": "main", "commit_message": "Say hello\n", "pusher": "gitea", "trigger": "github_webhook"}
    }
    for job in jobs(hooked):
        hooked.ok("POST", f"/v1/jobs/{job['id']}/cancel")
    assert "taken before" in deliver_from(hooked, sender, document)[1]["message"], "the same delivery"
    assert "taken before" in deliver_from(hooked, sender, document, delivery="d-2")[1]["message"], "the same body"
    again = json.dumps(document, indent=1).encode()
    assert "taken before" in deliver(hooked, again, **headers_of(sender, again))[1]["message"], "the same id"
    assert len(jobs(hooked)) == 2


@pytest.mark.parametrize("sender", ["gitea", "forgejo", "gogs"])
@pytest.mark.parametrize(
    ("more", "rule"),
    [
        ({"after": ZERO, "commits": [], "head_commit": None, "total_commits": 0}, "the ref was deleted"),
        ({"ref": "refs/heads/dev"}, "neither branches nor tags name dev"),
        (
            {"commits": [commit("x", message="[skip deploy]")], "head_commit": {"id": SHA, "message": "[skip deploy]"}},
            "its message says [skip deploy]",
        ),
    ],
    ids=["deleted", "ref", "skip"],
)
def test_rules_hold_for_other_programs(hooked, sender, more, rule):
    document = {**(GOGS if sender == "gogs" else GITEA), **more}
    if sender == "gogs":
        document.pop("head_commit", None)
    status, answer = deliver_from(hooked, sender, document)
    assert (status, answer["jobs_created"], answer["message"]) == (200, [], f"ignored: web: {rule}")


@pytest.mark.parametrize(
    ("sender", "document", "made"),
    [
        ("gitea", GITEA, 0),
        ("forgejo", GITEA, 0),
        ("gitea", {**GITEA, "total_commits": 9}, 2),  # the others are not listed
        ("gogs", GOGS, 2),  # nor said to be there
        ("gitea", {**GITEA, "before": ZERO}, 2),
    ],
)
def test_paths_hold_where_the_list_of_another_program_is_whole(controller, sender, document, made):
    controller.set_app(**WEB, paths=["api/**"])
    assert len(deliver_from(controller, sender, document)[1]["jobs_created"]) == made


def test_a_tag_of_gogs_comes_as_create_and_of_the_others_as_a_push(controller):
    controller.set_app(**WEB, tags=["v*"])
    assert deliver_from(controller, "gogs", GOGS_TAG, "create")[1]["message"] == "2 jobs for web"
    assert {(job["ref"], job["metadata"]["tag"], job["metadata"]["pusher"]) for job in jobs(controller)} == {(SHA, "v1", "gitea")}
    tag_push = {**GITEA, "ref": "refs/tags/v2", "before": ZERO, "after": B, "commits": [], "total_commits": 0}
    assert (
        deliver_from(controller, "gitea", {**tag_push, "head_commit": commit(id=C)}, delivery="d-2")[1]["message"]
        == "2 jobs for web"
    )
    assert {job["ref"] for job in jobs(controller)} == {SHA, C}


@pytest.mark.parametrize(
    "document", [GITEA_TAG, {**GOGS_TAG, "ref_type": "branch"}, {**GOGS_TAG, "sha": ""}, GITEA, [], None, 7], ids=str
)
@pytest.mark.parametrize("sender", ["gogs", "gitea"])
def test_no_other_create_is_a_push(controller, sender, document):
    """A tag that came as a push would else be deployed again by whoever sends its `create` a second time, with other headers."""
    controller.set_app(**WEB, tags=["*"], branches=["*"])
    status, answer = deliver_from(controller, sender, document, "create")
    assert (status, answer["message"], jobs(controller)) == (200, "ignored: the event is create, not push", [])


GOOD, OTHER_MAC, NONE = "good", "other", "absent"
HEADERS = ("X-Hub-Signature-256", "X-Gitea-Signature", "X-Forgejo-Signature", "X-Gogs-Signature")


@pytest.mark.parametrize(
    ("given", "is_taken"),  # in the order of HEADERS
    [
        ((GOOD, NONE, NONE, NONE), True),
        ((NONE, GOOD, NONE, NONE), True),
        ((NONE, NONE, GOOD, NONE), True),
        ((NONE, NONE, NONE, GOOD), True),
        ((GOOD, GOOD, GOOD, GOOD), True),
        ((NONE, GOOD, NONE, GOOD), True),
        ((NONE, NONE, NONE, NONE), False),
        ((OTHER_MAC, GOOD, NONE, NONE), False),
        ((GOOD, OTHER_MAC, NONE, NONE), False),
        ((GOOD, GOOD, GOOD, OTHER_MAC), False),
        ((NONE, OTHER_MAC, GOOD, NONE), False),
        ((GOOD, "", NONE, NONE), False),
        (("", GOOD, NONE, NONE), False),
        (("sha256=", "", NONE, ""), False),  # Gitea without a secret
        ((NONE, "", NONE, NONE), False),
        ((NONE, "sha256=", NONE, NONE), False),
        ((NONE, NONE, NONE, "upper"), False),
        ((NONE, "prefixed", NONE, NONE), False),
        (("bare", NONE, NONE, NONE), False),
        ((NONE, "sha1", NONE, NONE), False),
        ((OTHER_MAC, OTHER_MAC, OTHER_MAC, OTHER_MAC), False),
        ((NONE, NONE, NONE, "empty secret"), False),
    ],
    ids=str,
)
def test_signatures_of_several_headers_agree_or_nothing_is_taken(hooked, given, is_taken):
    body = json.dumps(GITEA).encode()
    good, other = signature(body)[7:], signature(body, "other")[7:]
    values = {"upper": good.upper(), "prefixed": f"sha256={good}", "sha1": good[:40], "empty secret": signature(body, "")[7:]}
    headers = {"X-GitHub-Event": None, "X-Gitea-Event": "push", "X-Hub-Signature-256": None}
    for index, (header, word) in enumerate(zip(HEADERS, given, strict=True)):
        prefix = "" if index else "sha256="
        values |= {GOOD: prefix + good, OTHER_MAC: prefix + other, "bare": good}
        headers |= {} if word == NONE else {header: values.get(word, word)}
    status, answer = deliver(hooked, body, **headers)
    assert (status, len(jobs(hooked))) == ((200, 2) if is_taken else (401, 0)), answer


def test_a_body_that_was_seen_is_known_whatever_header_signs_it(hooked):
    """The header is not signed: who saw a delivery could send it under another."""
    body = json.dumps(GITEA).encode()
    assert len(deliver(hooked, body, X_GitHub_Delivery="d-1")[1]["jobs_created"]) == 2
    finish_all(hooked)
    for number, header in enumerate(HEADERS[1:]):
        sent = {"X-Hub-Signature-256": None, header: signature(body)[7:], "X-Gogs-Delivery": f"e-{number}"}
        assert "taken before" in deliver(hooked, body, **sent)[1]["message"]
    assert len(jobs(hooked)) == 2


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_a_push_may_have_25_mib(hooked):
    body = b"{}".ljust(25 * 1024 * 1024)
    assert deliver(hooked, body, X_GitHub_Event="ping")[0] == 200


def status_of_head(controller, path, length, *headers):
    """The status line for a head that announces so many bytes and sends none."""
    with socket.create_connection(("127.0.0.1", controller.port), timeout=20) as connection:
        lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {length}", *headers, "", ""]
        connection.sendall("\r\n".join(lines).encode())
        return int(connection.recv(65536).split(b" ")[1])


def test_more_is_refused_before_it_is_sent(hooked):
    signed = "X-Hub-Signature-256: sha256=" + "0" * 64
    assert status_of_head(hooked, PATH, 25 * 1024 * 1024 + 1, signed) == 413
    assert status_of_head(hooked, PATH, 999_999_999, signed) == 413
    assert status_of_head(hooked, "/v1/jobs", 1024 * 1024 + 1) == 413


def test_an_unsigned_body_is_not_even_read(hooked):
    assert status_of_head(hooked, PATH, 1024) == 401


def test_other_calls_take_one_mib(controller):
    body = json.dumps({"repo": "o/n", "ref": "main", "host": "web-01"}).encode()
    assert controller.raw("POST", "/v1/jobs", body.ljust(1024 * 1024))[0] == 201


def test_a_real_push_of_a_megabyte_is_taken(hooked):
    commits = [{"id": SHA, "message": "x" * 1000, "added": ["a"], "removed": [], "modified": []}] * 1500
    status, answer = deliver(hooked, payload(commits=commits))
    assert (status, len(answer["jobs_created"])) == (200, 2)
