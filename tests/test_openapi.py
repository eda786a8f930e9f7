"""openapi.json against itself, against ROUTES, and against what a running controller really answers; and the rules of the pages.

The validator below knows the keywords that openapi.json uses, and a test holds that it uses no others.
"""

import hashlib
import hmac
import http.client
import json
import re
import socket
import sqlite3
import urllib.parse
from pathlib import Path

import pytest
from conftest import EventStream

import deploybot

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = json.loads((ROOT / "openapi.json").read_text(encoding="utf-8"))
PAGES = ("www/docs.html", "www/dashboard.html")
ROLES = ("public", "any", "viewer", "operator", "agent", "admin")
MAY = {  # least role of a call to the roles that may make it
    "any": ("viewer", "operator", "agent", "admin"),
    "viewer": ("viewer", "operator", "admin"),
    "operator": ("operator", "admin"),
    "agent": ("agent", "admin"),
    "admin": ("admin",),
}


# ---------------------------------------------------------------- JSON Schema
# Owns: the subset of JSON Schema 2020-12 in use here. Ignores: where a value came from.

TYPES = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
}
NOTES = {"description", "format", "default", "examples"}  # say something to a reader, and refuse nothing


def resolve(schema):
    while "$ref" in schema:
        target = DOCUMENT
        for key in schema["$ref"].removeprefix("#/").split("/"):
            target = target[key]
        schema = target
    return schema


def check_ref(schema, value, where):
    return problems(resolve({"$ref": schema}), value, where)


def check_type(kinds, value, where):
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return [] if any(TYPES[kind](value) for kind in kinds) else [f"{where}: {value!r} is not {' or '.join(kinds)}"]


def check_properties(properties, value, where):
    if not isinstance(value, dict):
        return []
    return [p for key in properties.keys() & value.keys() for p in problems(properties[key], value[key], f"{where}.{key}")]


def check_required(names, value, where):
    return [f"{where}: {name} is missing" for name in names if isinstance(value, dict) and name not in value]


def check_items(schema, value, where):
    return [p for n, item in enumerate(value) for p in problems(schema, item, f"{where}[{n}]")] if isinstance(value, list) else []


def check_one_of(choices, value, where):
    fitting = [choice for choice in choices if not problems(choice, value, where)]
    return [] if len(fitting) == 1 else [f"{where}: {value!r} fits {len(fitting)} of {len(choices)} choices"]


def check_any_of(choices, value, where):
    return [] if any(not problems(choice, value, where) for choice in choices) else [f"{where}: {value!r} fits no choice"]


def bound(holds, measure, kind, words):
    def check(limit, value, where):
        applies = TYPES[kind](value)
        return [f"{where}: {value!r} {words} {limit}"] if applies and not holds(measure(value), limit) else []

    return check


def same(a, b):
    """Equal in JSON, where 1 is not true."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def itself(value):
    return value


def at_least(size, limit):
    return size >= limit


def at_most(size, limit):
    return size <= limit


KEYWORDS = {
    "$ref": check_ref,
    "type": check_type,
    "properties": check_properties,
    "required": check_required,
    "items": check_items,
    "oneOf": check_one_of,
    "anyOf": check_any_of,
    "allOf": lambda parts, value, where: [p for part in parts for p in problems(part, value, where)],
    "enum": lambda choices, value, where: (
        [] if any(same(value, one) for one in choices) else [f"{where}: {value!r} is none of {choices}"]
    ),
    "const": lambda one, value, where: [] if same(value, one) else [f"{where}: {value!r} is not {one!r}"],
    "pattern": lambda pattern, value, where: (
        [] if not isinstance(value, str) or re.search(pattern, value) else [f"{where}: {value!r} does not match {pattern}"]
    ),
    "minimum": bound(at_least, itself, "number", "is under"),
    "maximum": bound(at_most, itself, "number", "is over"),
    "minLength": bound(at_least, len, "string", "is shorter than"),
    "maxLength": bound(at_most, len, "string", "is longer than"),
    "minItems": bound(at_least, len, "array", "has fewer items than"),
    "maxItems": bound(at_most, len, "array", "has more items than"),
}


def problems(schema, value, where="$"):
    """All that is wrong with the value, as text; an empty list if it is valid."""
    found = [p for key, rule in schema.items() if key in KEYWORDS for p in KEYWORDS[key](rule, value, where)]
    extra = schema.get("additionalProperties")
    if isinstance(value, dict) and extra is not None and extra is not True:
        unknown = value.keys() - schema.get("properties", {}).keys()
        found += [f"{where}: {key} is not known" for key in unknown] if extra is False else []
    return found


def closed(schema):
    """The same schema where no object may carry a field that it does not name: an answer has to be documented whole.

    `allOf` is made one object first, as each of its parts names only some of the fields.
    """
    schema = resolve(schema)
    if "allOf" in schema:
        parts = [resolve(part) for part in schema["allOf"]]
        merged = {"type": "object", "properties": {}, "required": []}
        for part in parts:
            merged["properties"].update(part["properties"])
            merged["required"] += part["required"]
        schema = merged
    schema = dict(schema)
    if "properties" in schema:
        schema["properties"] = {key: closed(field) for key, field in schema["properties"].items()}
        schema.setdefault("additionalProperties", False)
    if "items" in schema:
        schema["items"] = closed(schema["items"])
    for key in ("oneOf", "anyOf"):
        if key in schema:
            schema[key] = [closed(choice) for choice in schema[key]]
    return schema


def test_validator_refuses_what_is_wrong():
    schema = {
        "type": "object",
        "required": ["a"],
        "additionalProperties": False,
        "properties": {
            "a": {"type": ["string", "null"], "pattern": "^x", "maxLength": 3},
            "b": {"type": "array", "maxItems": 1, "items": {"type": "integer", "minimum": 0}},
            "c": {"oneOf": [{"const": True}, {"type": "null"}]},
        },
    }
    assert problems(schema, {"a": "xy", "b": [0], "c": None}) == []
    assert problems(schema, {"a": None}) == []
    for wrong in (
        [],
        {},
        {"a": "y"},
        {"a": "xyzz"},
        {"a": 1},
        {"a": "x", "b": [-1]},
        {"a": "x", "b": [True]},
        {"a": "x", "b": [1, 2]},
        {"a": "x", "c": 1},
        {"a": "x", "d": 1},
    ):
        assert problems(schema, wrong), wrong


# ---------------------------------------------------------------- the document
# Owns: what can be said of openapi.json without a controller. Ignores: whether it is true.


def operations():
    return [(method.upper(), path, op) for path, item in DOCUMENT["paths"].items() for method, op in item.items()]


def walk(node, path=""):
    """Each schema in the document, with where it stands."""
    if isinstance(node, list):
        for n, item in enumerate(node):
            yield from walk(item, f"{path}/{n}")
    elif isinstance(node, dict):
        for key, item in node.items():
            if key in ("example", "examples", "value", "default"):
                continue
            if key == "schema":
                yield f"{path}/schema", item
            yield from walk(item, f"{path}/{key}")


def subschemas(schema):
    yield schema
    for key in ("oneOf", "anyOf", "allOf"):
        for part in schema.get(key, []):
            yield from subschemas(part)
    for part in schema.get("properties", {}).values():
        yield from subschemas(part)
    if "items" in schema:
        yield from subschemas(schema["items"])


def all_schemas():
    roots = [
        *walk(DOCUMENT),
        *((f"/components/schemas/{name}", schema) for name, schema in DOCUMENT["components"]["schemas"].items()),
    ]
    return [(where, schema) for where, root in roots for schema in subschemas(root)]


def media(content, where):
    for kind, entry in content.items():
        for name, example in entry.get("examples", {}).items():
            yield f"{where} {kind} {name}", entry["schema"], example["value"]


def all_examples():
    for method, path, op in operations():
        where = f"{method} {path}"
        yield from media(op.get("requestBody", {}).get("content", {}), where)
        for status, response in op["responses"].items():
            yield from media(resolve(response).get("content", {}), f"{where} {status}")
        for parameter in map(resolve, op.get("parameters", [])):
            if "example" in parameter:
                yield f"{where} {parameter['name']}", parameter["schema"], parameter["example"]
        for name, event in op.get("x-events", {}).items():
            yield f"{where} event {name}", event["schema"], event["example"]
    for name, schema in DOCUMENT["components"]["schemas"].items():
        for example in schema.get("examples", []):
            yield name, schema, example


def test_every_reference_leads_somewhere():
    for reference in re.findall(r'"\$ref": "([^"]+)"', json.dumps(DOCUMENT)):
        assert resolve({"$ref": reference})


def test_schemas_use_only_what_the_validator_knows():
    for where, schema in all_schemas():
        assert schema.keys() <= KEYWORDS.keys() | NOTES | {"additionalProperties"}, where


def test_every_field_is_described():
    for where, schema in all_schemas():
        for name, field in schema.get("properties", {}).items():
            words = field.get("description") or resolve(field).get("description")
            assert words, f"{where}: {name}"


@pytest.mark.parametrize(("where", "schema", "value"), [pytest.param(*example, id=example[0]) for example in all_examples()])
def test_example_is_valid(where, schema, value):
    assert problems(closed(schema), value, where) == []


def test_every_call_is_whole():
    ids = [op["operationId"] for _, _, op in operations()]
    assert len(ids) == len(set(ids))
    tags = {tag["name"] for tag in DOCUMENT["tags"]}
    for method, path, op in operations():
        where = f"{method} {path}"
        assert op["x-role"] in ROLES and (op["security"] == []) == (op["x-role"] == "public"), where
        assert op["summary"] and op["description"] and set(op["tags"]) <= tags, where
        said = op["description"].rpartition("\n\n")[2]
        if op["x-role"] == "any":
            assert said == "Needs a token, of any role."
        elif op["x-role"] == "public":
            assert said == "Needs no token."
        else:
            assert tuple(re.findall(r"`(\w+)`", said)) == MAY[op["x-role"]], where
            assert op.get("x-app", False) == ("of one app" in said), where
        schemes = [*op["security"]]
        assert schemes == ([] if not schemes else [{"bearer": []}] + [{"cookie": []}] * (op["x-role"] != "agent")), where
        named = {p["name"] for p in map(resolve, op.get("parameters", [])) if p["in"] == "path"}
        assert named == set(re.findall(r"{(\w+)}", path)), where
        for status, response in op["responses"].items():
            for kind, entry in resolve(response).get("content", {}).items():
                assert "schema" in entry, f"{where} {status}"
                assert entry.get("examples") or kind.startswith(("text/html", "text/x-python")) or path == "/openapi.json", (
                    f"{where} {status} {kind}"
                )


def test_the_same_calls_as_routes():
    said = {(method, path): (op["x-role"], op.get("x-app", False)) for method, path, op in operations()}
    real = {(route.method, route.pattern): (str(route.scope), route.for_app) for route in deploybot.ROUTES}
    assert said == real


def test_the_statuses_of_every_call():
    """What any call of its kind may answer is said of each."""
    for method, path, op in operations():
        wanted = {"400", "503", "4XX"}
        wanted |= {"401", "403", "429"} if op["x-role"] != "public" or path == "/v1/session" else set()
        wanted |= {"403"} if method != "GET" else set()
        wanted |= {"413"} if "requestBody" in op else set()
        wanted |= {"404"} if "{" in path else set()
        if op["operationId"] == "signOut":
            wanted -= {"401"}
        assert wanted <= op["responses"].keys(), f"{method} {path}"
    assert DOCUMENT["components"]["responses"]["Refused"]["x-statuses"] == [405, 408, 413, 417, 431]


def test_version_is_the_controllers():
    assert DOCUMENT["info"]["version"] == deploybot.VERSION


# ---------------------------------------------------------------- the pages
# Owns: what the Content-Security-Policy and the rule of no other host ask of the files. Ignores: how they look.


@pytest.fixture(params=PAGES)
def page(request):
    return (ROOT / request.param).read_text(encoding="utf-8")


def test_page_has_one_script_and_one_style_with_the_nonce(page):
    """Beside them at most a program as text, which the script runs when the first frame is painted."""
    scripts = re.findall(r"<script[^>]*>", page)
    assert scripts[-1] == '<script nonce="{{nonce}}">' and scripts[:-1] in ([], ['<script type="text/plain">'])
    assert re.findall(r"<style[^>]*>", page) == ['<style nonce="{{nonce}}">']
    assert page.count("{{nonce}}") == 2


def test_page_names_no_other_host(page):
    assert re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]{2,}", page) == []
    assert not re.search(r"@import|url\(|<(?:iframe|object|embed|base|form[^>]+action)\b", page)
    for link in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert link.startswith(("/", "#", "data:")) and not link.startswith("//"), link


def test_page_keeps_markup_and_handlers_out_of_attributes(page):
    tags = re.findall(r"<[a-z][^>]*>", page.split("<script")[0] + page.split("</script>")[-1])
    for tag in tags:
        assert not re.search(r"\s(?:on[a-z]+|style)\s*=", tag), tag
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|javascript:|localStorage|sessionStorage|document\.cookie",
        page,
    )


def test_dashboard_signs_in_by_cookie_alone():
    page = (ROOT / "www/dashboard.html").read_text(encoding="utf-8")
    assert "Authorization" not in page and "Bearer" not in page
    for call in ('"/v1/session", {method: "POST"', 'read("/v1/session", "DELETE")', 'read("/v1/session")'):
        assert page.count(call) == 1, call


def test_dashboard_is_small():
    page = (ROOT / "www/dashboard.html").read_bytes()
    assert len(page.replace(b"{{nonce}}", b"0123456789abcdef012345")) < 60 * 1024, "as it is served: a nonce has 22 characters"


# ---------------------------------------------------------------- the running controller
# Owns: real answers against the document. Ignores: whether the controller does the right thing; the other tests ask that.

SECRET = "It's a Secret to Everybody"
NOWHERE = "01a2088a-6463-7c1e-9a40-000000000000"
SHA = "9f2c4e1ab03d5f6788c1d2e3f4a5b6c7d8e9f0a1"


class Api:
    """Makes calls, and holds each answer against the document: its status, its media type, its body, its headers."""

    def __init__(self, controller, tokens):
        self.controller, self.tokens = controller, tokens

    def ask(self, method, target, body=None, *, status, role="admin", headers=None):
        token = self.tokens.get(role)
        sent = {"Authorization": token and f"Bearer {token}", **(headers or {})}
        got, headers, data = self.controller.raw(method, target, body, sent)
        assert got == status, f"{method} {target}: {got} {data!r}"
        return self.hold(method, target.partition("?")[0], got, headers, data.decode())

    def hold(self, method, path, status, headers, text):
        where = f"{method} {path} {status}"
        documented = operation(method, path)["responses"]
        assert str(status) in documented, f"{where} is not documented: {text}"
        said = resolve(documented[str(status)])
        for name in said.get("headers", {}):
            assert headers[name], f"{where}: no {name}"
        if "content" not in said:
            assert text == "", where
            return None
        kind = headers["Content-Type"].partition(";")[0]
        assert kind in said["content"], f"{where}: {kind}"
        value = json.loads(text) if kind.endswith("json") else text
        assert problems(closed(said["content"][kind]["schema"]), value, where) == []
        assert kind != "application/problem+json" or value["status"] == status, where
        return value


@pytest.fixture
def api(make_controller):
    """A closed controller with a token of each role, and one app on two hosts."""
    app = {"name": "web-frontend", "repo": "myorg/web-frontend", "hosts": ["web-01", "web-02"], "deploy_on_push": True}
    tokens = {"admin": "dbt_admin", "agent": "dbt_agent", "viewer": "dbt_read"}
    secrets = {"agent_token": tokens["agent"], "read_token": tokens["viewer"], "webhook_secret": SECRET}
    controller = make_controller(apps=json.dumps({"apps": [app]}), open="false", **secrets)
    tokens["admin"] = (controller.folder / "admin.token").read_text().strip()
    api = Api(controller, tokens)
    tokens["operator"] = make_token(api, role="operator", name="operator")
    return api


def make_token(api, status=201, **asked):
    """The secret of a new token."""
    return api.ask("POST", "/v1/tokens", asked, status=status).get("secret")


def operation(method, path):
    for known, template, op in operations():
        if known == method and re.fullmatch(re.sub(r"{\w+}", "[^/]+", template), path):
            return op
    raise AssertionError(f"{method} {path} is not documented")


def register(api, hostname):
    return api.ask("POST", "/v1/agents/register", {"hostname": hostname, "capabilities": {"agent": "0.1.0"}}, status=200)


def beat(api, agent, **more):
    return api.ask(
        "POST", f"/v1/agents/{agent['id']}/heartbeat", {"status": "online", "session": agent["session"], **more}, status=200
    )


def create(api, hostname, **more):
    return api.ask("POST", "/v1/jobs", {"repo": "myorg/app", "ref": "main", "host": hostname, **more}, status=201)["job"]


def running(api, hostname):
    """A job in the hands of the agent of that host."""
    agent, job = register(api, hostname), create(api, hostname)
    assert beat(api, agent)["job"]["id"] == job["id"]
    return agent, job


def finish(api, job, **more):
    return api.ask(
        "POST",
        f"/v1/jobs/{job['id']}/result",
        {"attempt": 1, "status": "success", "exit_code": 0, "commit": SHA, **more},
        status=200,
    )


def upload(api, job, offset, *messages, status=200, **more):
    lines = [{"message": message} for message in messages]
    return api.ask("POST", f"/v1/jobs/{job['id']}/logs", {"attempt": 1, "offset": offset, "lines": lines, **more}, status=status)


def push(api, event="push", *, body=None, secret=SECRET, kind="application/json", sender="GitHub", status=200):
    payload = {
        "ref": "refs/heads/main",
        "after": SHA,
        "deleted": False,
        "repository": {"full_name": "myorg/web-frontend", "default_branch": "main"},
        "head_commit": {"id": SHA, "message": "Fix the header", "timestamp": "2026-11-23T13:13:35Z"},
    }
    data = json.dumps(payload).encode() if body is None else body
    if kind != "application/json":
        data = urllib.parse.urlencode({"payload": data.decode()}).encode()
    signature = hmac.new(secret.encode(), data, hashlib.sha256).hexdigest()
    headers = {f"X-{sender}-Signature": signature} if sender != "GitHub" else {"X-Hub-Signature-256": f"sha256={signature}"}
    headers |= {
        f"X-{sender}-Event": event,
        f"X-{sender}-Delivery": hashlib.sha256(data + event.encode()).hexdigest()[:36],
        "Content-Type": kind,
    }
    known = {parameter["name"] for parameter in operation("POST", "/v1/webhooks/github")["parameters"]}
    assert headers.keys() - known == {"Content-Type"}
    return api.ask("POST", "/v1/webhooks/github", data, headers=headers, status=status, role=None)


def test_jobs_answer_as_documented(api):
    job = create(api, "web-01")
    assert not api.ask("POST", "/v1/jobs", {"repo": "myorg/app", "ref": "main", "host": "web-01"}, status=201)["created"]
    api.ask("POST", "/v1/jobs", {"repo": "no", "ref": "-x", "host": "a b", "wrong": 1, "retries": -1}, status=422)
    create(api, "web-02", app="other", metadata={"ticket": "OPS-118"}, timeout=900, retries=1, force=True)
    api.ask("GET", f"/v1/jobs/{job['id']}", status=200)
    page = api.ask("GET", "/v1/jobs?limit=1", status=200)
    assert page["next"] and api.ask("GET", f"/v1/jobs?limit=1&before={page['next']}", status=200)["next"] is None
    assert api.ask("GET", f"/v1/jobs?status=pending&host=web-01&app=myorg--app&repo=MyOrg/App&id={job['id'][:20]}", status=200)[
        "jobs"
    ] == [job]
    for wrong in ("status=done", "limit=0", "limit=1001", "limit=x", "before=x", "id=xyz"):
        api.ask("GET", f"/v1/jobs?{wrong}", status=422)
    api.ask("POST", f"/v1/jobs/{job['id']}/retry", status=409)
    api.ask("POST", f"/v1/jobs/{job['id']}/cancel", status=200)
    api.ask("POST", f"/v1/jobs/{job['id']}/cancel", status=200)
    assert api.ask("POST", f"/v1/jobs/{job['id']}/retry", status=201)["job"]["retry_of"] == job["id"]
    api.controller.set_app(name="other", repo="myorg/moved", hosts=["web-02"])
    other = api.ask("GET", "/v1/jobs?app=other", status=200)["jobs"][0]["id"]
    api.ask("POST", f"/v1/jobs/{other}/cancel", status=200)
    api.ask("POST", f"/v1/jobs/{other}/retry", status=422)
    api.ask("POST", "/v1/jobs", [], status=422)


def test_agent_calls_answer_as_documented(api):
    agent, job = running(api, "web-01")
    held = [{"job_id": job["id"], "attempt": 1}]
    assert upload(api, job, 0, "one", "two", commit=SHA)["next_offset"] == 2
    assert upload(api, job, 5, "gap", status=409)["next_offset"] == 2
    upload(api, job, -1, status=422)
    api.ask("POST", f"/v1/jobs/{job['id']}/cancel", status=200)
    assert beat(api, agent, running=held, wait=1)["cancel"] == [job["id"]]
    assert upload(api, job, 2, "three")["cancel"]
    api.ask("POST", f"/v1/jobs/{job['id']}/result", {"attempt": 0, "status": "done"}, status=422)
    finish(api, job, status="failed", reason="exit_code", exit_code=2, error="no", rolled_back_to=SHA)
    api.ask("POST", f"/v1/jobs/{job['id']}/result", {"attempt": 1, "status": "success"}, status=409)
    upload(api, job, 3, "late", status=409)
    api.ask("POST", f"/v1/jobs/{job['id']}/cancel", status=409)
    assert len(api.ask("GET", f"/v1/jobs/{job['id']}/logs?after=0&limit=2", status=200)["lines"]) == 2
    assert api.ask("GET", f"/v1/jobs/{job['id']}/logs", headers={"Accept": "text/plain"}, status=200) == "one\ntwo\nthree\n"
    api.ask("GET", f"/v1/jobs/{job['id']}/logs?limit=0", status=422)
    register(api, "web-01")
    api.ask("POST", f"/v1/agents/{agent['id']}/heartbeat", {"status": "online", "session": agent["session"]}, status=409)
    api.ask("POST", f"/v1/agents/{agent['id']}/heartbeat", {"status": "away", "wait": 26}, status=422)
    api.ask("POST", "/v1/agents/register", {"hostname": "a b", "slots": 65}, status=422)


def test_a_host_with_a_secret_answers_as_documented(api):
    digests = [hashlib.sha256(secret).hexdigest() for secret in (b"one", b"two")]
    api.ask("POST", "/v1/agents/register", {"hostname": "web-01", "token_sha256": digests[0]}, role="agent", status=200)
    api.ask("POST", "/v1/agents/register", {"hostname": "web-01", "token_sha256": digests[1]}, role="agent", status=409)


def test_an_enrolment_answers_as_documented(api):
    ask = {"hostname": "web-01"}
    agent = api.ask("POST", "/v1/agents/register", ask, role="agent", status=200)
    beating = f"/v1/agents/{agent['id']}/heartbeat"
    api.ask("POST", beating, {"status": "online"}, role="agent", status=403)
    api.tokens["web-01"] = agent["token"]
    api.ask("POST", beating, {"status": "online"}, role="web-01", status=200)
    assert "token" not in api.ask("POST", "/v1/agents/register", ask, role="web-01", status=200)
    assert "ctl.py hosts reset web-01" in api.ask("POST", "/v1/agents/register", ask, role="agent", status=409)["detail"]
    api.tokens["web-02"] = make_token(api, role="agent", host="web-02")
    for path, body in ((beating, {"status": "online"}), ("/v1/agents/register", ask)):
        api.ask("POST", path, body, role="web-02", status=403)
    assert "token" not in api.ask("POST", "/v1/agents/register", {"hostname": "web-02"}, role="web-02", status=200)
    assert api.ask("POST", "/v1/hosts/web-01/reset", status=200)["host"]["agent_id"] == agent["id"]
    api.ask("POST", beating, {"status": "online"}, role="web-01", status=401)
    assert api.ask("POST", "/v1/agents/register", ask, role="agent", status=200)["id"] == agent["id"]


def test_tokens_answer_as_documented(api):
    made = api.ask("POST", "/v1/tokens", {"role": "operator", "app": "web-frontend", "name": "ci", "expires_in": 60}, status=201)
    make_token(api, role="agent", host="web-01.example.com")
    make_token(api, 409, role="viewer", name="ci")
    make_token(api, 409, role="viewer", name="admin")
    wrong = {"role": "public", "name": "-", "host": "a b", "app": "A", "expires_in": 59, "more": 1}
    assert {error["field"] for error in api.ask("POST", "/v1/tokens", wrong, status=422)["errors"]} == wrong.keys()
    for role, field in (("admin", "app"), ("agent", "app"), ("viewer", "host")):
        (error,) = api.ask("POST", "/v1/tokens", {"role": role, field: "web"}, status=422)["errors"]
        assert error["field"] == field
    api.tokens["ci"] = made["secret"]
    api.ask("GET", "/v1/jobs", role="ci", status=200)
    listed = api.ask("GET", "/v1/tokens", status=200)["tokens"]
    assert [token["name"] for token in listed][:2] == ["operator", "ci"] and listed[2]["name"].startswith("agent-")
    assert api.ask("DELETE", f"/v1/tokens/{made['token']['id']}", status=200)["token"]["name"] == "ci"
    api.ask("GET", "/v1/jobs", role="ci", status=401)
    api.ask("DELETE", f"/v1/tokens/{made['token']['id']}", status=404)


def test_the_token_of_one_app_answers_as_documented(api):
    api.tokens["ci"] = make_token(api, role="operator", app="web-frontend")
    ask = {"repo": "myorg/web-frontend", "ref": "main", "host": "web-01"}
    job = api.ask("POST", "/v1/jobs", ask, role="ci", status=201)["job"]
    other = create(api, "web-02")
    api.ask("POST", "/v1/jobs", {**ask, "repo": "myorg/app"}, role="ci", status=403)
    assert api.ask("GET", "/v1/jobs", role="ci", status=200)["jobs"] == [job]
    assert [app["name"] for app in api.ask("GET", "/v1/apps", role="ci", status=200)["apps"]] == ["web-frontend"]
    assert api.ask("GET", "/v1/session", role="ci", status=200)["app"] == "web-frontend"
    api.ask("GET", "/v1/jobs?app=other", role="ci", status=403)
    api.ask("GET", "/v1/logs/stream?app=other", role="ci", status=403)
    api.ask("GET", f"/v1/logs/stream?job_id={other['id']}", role="ci", status=403)
    for method, action in (("GET", ""), ("GET", "/logs"), ("POST", "/cancel"), ("POST", "/retry")):
        api.ask(method, f"/v1/jobs/{other['id']}{action}", role="ci", status=403)
    for method, path, op in operations():
        if op["x-role"] != "public" and not op.get("x-app"):
            api.ask(method, filled(path), b"{}", role="ci", status=403)
    api.ask("POST", f"/v1/jobs/{job['id']}/cancel", role="ci", status=200)
    api.ask("POST", f"/v1/jobs/{job['id']}/retry", role="ci", status=201)
    api.ask("POST", "/v1/jobs", {**ask, "ref": "v1", "override": True}, role="ci", status=201)


def test_the_token_of_one_app_deploys_as_documented(api):
    apps = [{"name": name, "repo": f"myorg/{name}", "hosts": ["web-01"]} for name in ("web-frontend", "other")]
    api.controller.apps_file.write_text(json.dumps({"apps": apps}))
    api.ask("POST", "/v1/reload", status=200)
    api.tokens["ci"] = make_token(api, role="operator", app="web-frontend")
    api.tokens["screen"] = make_token(api, role="viewer", app="web-frontend")
    mine = deploy(api, role="ci", ref="main")["deployment"]
    other = deploy(api, app="other", ref="main")["deployment"]
    for role in ("ci", "screen"):
        assert api.ask("GET", "/v1/deployments", role=role, status=200)["deployments"] == [mine]
        assert api.ask("GET", f"/v1/deployments/{mine['id']}", role=role, status=200)["deployment"] == mine
        assert api.ask("GET", f"/v1/jobs?deployment_id={other['id']}", role=role, status=200)["jobs"] == []
        api.ask("GET", "/v1/deployments?app=other", role=role, status=403)
        api.ask("GET", f"/v1/deployments/{other['id']}", role=role, status=403)
        for path in ("/v1/deliveries", "/v1/deliveries/x"):
            api.ask("GET", path, role=role, status=403)
    for app in ("other", "othre"):  # nor is it told that there is one
        for asked in ({"ref": "main"}, {"ref": "main", "dry_run": True}, {"rollback": True}):
            deploy(api, 403, role="ci", app=app, **asked)
        api.ask("POST", f"/v1/hooks/{app}", {"ref": "main"}, role="ci", status=403)
        api.ask("PUT", f"/v1/apps/{app}/lock", {"reason": "x"}, role="ci", status=403)
        api.ask("DELETE", f"/v1/apps/{app}/lock", role="ci", status=403)
    for action in ("cancel", "retry"):
        api.ask("POST", f"/v1/deployments/{other['id']}/{action}", role="ci", status=403)
    api.ask("POST", "/v1/hooks/web-frontend", {"ref": "v1"}, role="ci", status=201)
    api.ask("PUT", "/v1/apps/web-frontend/lock", {"reason": "x"}, role="ci", status=200)
    api.ask("DELETE", "/v1/apps/web-frontend/lock", role="ci", status=200)
    api.ask("POST", f"/v1/deployments/{mine['id']}/cancel", role="ci", status=200)
    api.ask("POST", f"/v1/deployments/{mine['id']}/retry", role="ci", status=201)


def sign_in(api, token, status=200, **headers):
    """(what was answered, the cookie's header)."""
    got, said, data = api.controller.raw("POST", "/v1/session", {"token": token}, {"Authorization": None, **headers})
    assert got == status, data
    return api.hold("POST", "/v1/session", got, said, data.decode()), said["Set-Cookie"]


def test_a_sign_in_answers_as_documented(api):
    me, cookie = sign_in(api, api.tokens["operator"])
    assert (me["name"], me["role"]) == ("operator", "operator") and me["expires_at"]
    value, *attributes = cookie.split("; ")
    assert attributes == ["Path=/", "Max-Age=604800", "HttpOnly", "SameSite=Strict"]
    scheme = DOCUMENT["components"]["securitySchemes"]["cookie"]
    assert re.fullmatch(scheme["name"] + r"=dbt_[\w-]{43}", value)
    assert api.ask("GET", "/v1/session", role=None, headers={"Cookie": f"a=b; {value}"}, status=200) == me
    assert api.ask("GET", "/v1/session", role="viewer", headers={"Cookie": value}, status=200)["role"] == "viewer"
    assert len(api.ask("GET", "/v1/tokens", status=200)["tokens"]) == 1
    for _ in range(2):
        assert api.ask("DELETE", "/v1/session", role=None, headers={"Cookie": value}, status=200) == {}
    api.ask("GET", "/v1/session", role=None, headers={"Cookie": value}, status=401)
    for body, status in (({}, 422), ({"token": ""}, 422), ({"token": "dbt_wrong"}, 401), (b"{", 400)):
        api.ask("POST", "/v1/session", body, role=None, status=status)
    api.ask("POST", "/v1/session", {"token": api.tokens["agent"]}, role=None, status=403)


def test_who_asks_is_told_to_any_token(api):
    for role in api.tokens:
        me = api.ask("GET", "/v1/session", role=role, status=200)
        assert me["role"] == role and me["app"] is me["host"] is me["expires_at"] is None
    api.tokens["host"] = make_token(api, role="agent", host="web-01")
    assert api.ask("GET", "/v1/session", role="host", status=200)["host"] == "web-01"


def test_a_write_from_another_sites_page_is_403(api):
    for method, path, _ in operations():
        if method != "GET":
            for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
                detail = api.ask(method, filled(path), b"{}", headers=headers, status=403)["detail"]
                assert "another site" in detail, (method, path)


def test_too_many_failed_sign_ins_answer_as_documented(api):
    for _ in range(10):
        api.ask("GET", "/v1/session", headers={"Authorization": "Bearer dbt_wrong"}, status=401)
    for method, path, op in operations():
        if "429" in op["responses"]:
            headers = {"Authorization": "Bearer dbt_wrong"}
            api.ask(method, filled(path), {"token": "dbt_wrong"}, headers=headers, status=429)
    assert 0 < api.ask("GET", "/v1/jobs", headers={"Authorization": "Bearer dbt_wrong"}, status=429)["retry_after"] <= 60
    api.ask("GET", "/v1/jobs", status=200)


def test_too_many_writes_answer_as_documented(make_controller):
    api = Api(make_controller(open=False, token="dbt_admin", rate_limit=2), {"admin": "dbt_admin"})
    for status in (200, 200, 429):
        api.ask("POST", "/v1/reload", status=status)
    api.ask("GET", "/v1/jobs", status=200)


def test_the_audit_answers_as_documented(api):
    """Every action that the document names, and no other."""
    _, job = running(api, "web-01")
    finish(api, job)
    waiting = create(api, "web-02")
    api.ask("POST", f"/v1/jobs/{waiting['id']}/cancel", status=200)
    api.ask("POST", f"/v1/jobs/{waiting['id']}/retry", status=201)
    push(api)
    rolled_out(api, "1" * 40, "2" * 40)
    api.ask("POST", "/v1/deployments", {"app": "web-frontend", "rollback": True}, status=201)
    api.ask("DELETE", "/v1/apps/web-frontend/lock", status=200)
    found = api.ask("POST", "/v1/hooks/web-frontend", {"ref": "main"}, status=201)["deployment"]
    api.ask("POST", f"/v1/deployments/{found['id']}/cancel", status=200)
    api.ask("POST", f"/v1/deployments/{found['id']}/retry", status=201)
    for host in ("web-01", "web-02"):
        drained(api, host)
    for action in ("drain", "resume", "reset"):
        api.ask("POST", f"/v1/hosts/web-01/{action}", status=200)
    api.ask("DELETE", "/v1/hosts/web-01", status=200)
    _, cookie = sign_in(api, api.tokens["operator"])
    api.ask("DELETE", "/v1/session", role=None, headers={"Cookie": cookie.split(";")[0]}, status=200)
    api.ask("DELETE", f"/v1/tokens/{api.ask('GET', '/v1/tokens', status=200)['tokens'][0]['id']}", status=200)
    api.ask("POST", "/v1/reload", status=200)
    page = api.ask("GET", "/v1/audit?limit=1000", status=200)
    assert page["next"] is None
    actions = DOCUMENT["components"]["schemas"]["AuditEntry"]["properties"]["action"]["enum"]
    assert {entry["action"] for entry in page["audit"]} == set(actions)
    first = api.ask("GET", "/v1/audit?limit=1", status=200)
    assert first["audit"] == page["audit"][:1] and first["next"] == page["audit"][0]["id"]
    assert api.ask("GET", f"/v1/audit?limit=1&before={first['next']}", status=200)["audit"] == page["audit"][1:2]
    pushes = api.ask("GET", "/v1/audit?who=github&action=push", status=200)["audit"]
    assert [entry["target"] for entry in pushes] == ["myorg/web-frontend"]
    for wrong in ("limit=0", "limit=1001", "before=0", "before=x", "how=so", "who=" + "x" * 201):
        api.ask("GET", f"/v1/audit?{wrong}", status=422)


def drained(api, host, **more):
    """Every job that there is for that host, to its end."""
    agent = register(api, host)
    while job := beat(api, agent)["job"]:
        finish(api, job, commit=job["ref"] if re.fullmatch("[0-9a-f]{40}", job["ref"]) else SHA, **more)


def rolled_out(api, *commits):
    """Deployments that succeed on both hosts, one after the other."""
    for commit in commits:
        api.ask("POST", "/v1/deployments", {"app": "web-frontend", "ref": commit}, status=201)
        for host in ("web-01", "web-02"):
            drained(api, host)


def deploy(api, status=201, role="admin", **asked):
    return api.ask("POST", "/v1/deployments", {"app": "web-frontend", **asked}, status=status, role=role)


def test_deployments_answer_as_documented(api):
    made = deploy(api, ref="main", hosts=["web-01"], metadata={"ticket": "OPS-118"})
    found, path = made["deployment"], f"/v1/deployments/{made['deployment']['id']}"
    assert deploy(api, ref="main", hosts=["web-01"])["created"] is False
    assert deploy(api, ref="main")["skipped"] and deploy(api, ref="v1", force=True, dry_run=None, to=None, lock=None)["created"]
    assert api.ask("GET", path, status=200, role="viewer")["deployment"] == found
    assert api.ask("GET", f"/v1/jobs?deployment_id={found['id']}", status=200)["jobs"] == made["jobs"]
    api.ask("POST", f"{path}/retry", status=409)
    api.ask("POST", f"{path}/cancel", status=200)
    api.ask("POST", f"{path}/cancel", status=409)
    again = api.ask("POST", f"{path}/retry", status=201)
    assert again["deployment"]["retry_of"] == found["id"]
    drained(api, "web-01", status="failed", reason="health_check", rolled_back_to=SHA)
    assert api.ask("GET", f"/v1/deployments/{again['deployment']['id']}", status=200)["deployment"]["status"] == "rolled_back"
    page = api.ask("GET", "/v1/deployments?limit=1", status=200)
    assert page["next"] and api.ask("GET", f"/v1/deployments?before={page['next']}&app=web-frontend", status=200)["next"] is None
    assert len(api.ask("GET", f"/v1/deployments?status=cancelled&id={found['id'][:20]}", status=200)["deployments"]) == 1
    for wrong in ("status=done", "limit=0", "limit=1001", "before=x", "id=xyz", "app=A", "host=web-01"):
        api.ask("GET", f"/v1/deployments?{wrong}", status=422)
    wrong = {"app": "A", "ref": "-x", "hosts": [], "to": "x"}
    wrong |= dict.fromkeys(("rollback", "lock", "override", "force", "dry_run", "metadata"), 1)
    assert {error["field"] for error in deploy(api, 422, **wrong, more=1)["errors"]} == {*wrong, "more"}
    for asked in ({}, {"ref": "main", "rollback": True}, {"ref": "main", "to": SHA}, {"ref": "main", "hosts": ["web-03"]}):
        deploy(api, 422, **asked)
    assert "did you mean web-frontend?" in deploy(api, 404, app="web-frontned", ref="main")["detail"]


def test_a_deployment_that_is_jobs_of_their_own_is_null(api):
    for host in ("web-01", "web-02"):
        create(api, host, repo="myorg/web-frontend")
    made = deploy(api, ref="main")
    assert (made["deployment"], made["created"], len(made["jobs"])) == (None, False, 2)


def test_each_strategy_answers_as_documented(api):
    both = {"name": "web-frontend", "repo": "myorg/web-frontend", "hosts": ["web-01", "web-02"]}
    check = {"command": ["curl", "localhost"], "timeout": "30s"}
    for more in (
        {"strategy": {"batch": 1, "max_failures": 1}, "build": "make", "activate": ["systemctl", "restart", "web"]},
        {"strategy": {"batch": "25%", "canary": "web-02", "pause": "500ms"}, "deploy": "./deploy.sh", "health_check": check},
        {"strategy": {"type": "parallel"}, "health_check": {"url": "http://localhost/health"}},
    ):
        api.controller.set_app(**both, **more)
        api.ask("GET", "/v1/apps", status=200)
        planned = deploy(api, 200, ref="main", dry_run=True)["plan"]
        found = deploy(api, ref="main", force=True)["deployment"]
        assert found["strategy"] == planned["strategy"]
        drained(api, "web-02")
        shown = api.ask("GET", f"/v1/deployments/{found['id']}", status=200)["deployment"]
        assert bool(shown["resume_at"]) == (planned["strategy"]["pause"] > 0)


def test_a_rollback_answers_as_documented(api):
    deploy(api, 409, rollback=True)
    rolled_out(api, "1" * 40, "2" * 40)
    deploy(api, 409, rollback=True, dry_run=True, to="abcdef0")
    assert deploy(api, 200, rollback=True, dry_run=True)["plan"]["kind"] == "rollback"
    assert deploy(api, rollback=True)["deployment"]["ref"] == "1" * 40
    agent = register(api, "web-01")
    assert beat(api, agent, current={"web-frontend": "1" * 40})["job"]["spec"]["reuse"]
    assert api.ask("GET", "/v1/apps", status=200)["apps"][0]["hosts"][0]["actual"] == "1" * 40
    assert "rolled back to" in deploy(api, 409, ref="main")["detail"]


def test_locks_answer_as_documented(api):
    path = "/v1/apps/web-frontend/lock"
    lock = api.ask("PUT", path, {"reason": "incident 7", "for": 60}, status=200, role="operator")["lock"]
    assert lock["by"] == "operator" and api.ask("GET", "/v1/apps", status=200)["apps"][0]["lock"] == lock
    ended = create(api, "web-01", repo="myorg/web-frontend", ref="v1", override=True)
    api.ask("POST", f"/v1/jobs/{ended['id']}/cancel", status=200)
    api.ask("POST", f"/v1/jobs/{ended['id']}/retry", status=409)
    api.ask("POST", "/v1/jobs", {"repo": "myorg/web-frontend", "ref": "v1", "host": "web-01"}, status=409)
    deploy(api, 409, ref="main")
    assert deploy(api, 200, ref="main", dry_run=True)["plan"]["lock"] == lock
    assert deploy(api, ref="main", override=True)["deployment"]["override"]
    assert "held" in push(api)["message"]
    held = api.ask("GET", "/v1/deployments?limit=1", status=200)["deployments"][0]
    assert (held["hold"], held["progress"]["held"]) == ("lock", 2)
    assert api.ask("PUT", path, {"reason": "freeze", "for": None}, status=200)["lock"]["until"] is None
    for more in ({"reason": None}, {"reason": ""}, {"reason": "x" * 201}, {"for": 0}, {"for": 31536001}, {"a": 1}):
        api.ask("PUT", path, {"reason": "x", **more}, status=422)
    assert api.ask("DELETE", path, status=200)["deployments"] == [held["id"]]
    api.ask("DELETE", path, status=404)


def test_hooks_answer_as_documented(api):
    path = "/v1/hooks/web-frontend"
    made = api.ask("POST", path, {"ref": "main", "commit": SHA, "message": "Fix", "pusher": "ci"}, status=201, role="operator")
    assert made["deployment"]["kind"] == "hook"
    api.ask("POST", path, {"ref": "main", "commit": None, "message": None, "pusher": None, "hosts": None}, status=201)
    wrong = {"ref": "-x", "commit": "main", "message": "x" * 1001, "pusher": "x" * 101, "hosts": ["a b"], "app": "x"}
    assert {error["field"] for error in api.ask("POST", path, wrong, status=422)["errors"]} == wrong.keys()


def test_deliveries_answer_as_documented(api):
    push(api)
    push(api, body=json.dumps({"ref": "refs/tags/v1", "deleted": True, "repository": {"full_name": "else/where"}}).encode())
    first = api.ask("GET", "/v1/deliveries?limit=1", status=200, role="viewer")
    assert first["deliveries"][0]["outcomes"][0]["rule"] == "no_app"
    second = api.ask("GET", f"/v1/deliveries?before={first['next']}&repo=MyOrg/Web-Frontend", status=200)["deliveries"][0]
    assert api.ask("GET", f"/v1/deliveries/{second['id']}", status=200)["delivery"] == second
    found = api.ask("GET", f"/v1/deployments/{second['outcomes'][0]['deployment_id']}", status=200)["deployment"]
    assert (found["delivery_id"], found["kind"], found["branch"]) == (second["id"], "push", "main")
    assert api.ask("GET", f"/v1/deliveries?before={second['id']}", status=200) == {"deliveries": [], "next": None}
    for wrong in ("limit=0", "limit=1001", "before=a/b", "repo=x", "app=web-frontend"):
        api.ask("GET", f"/v1/deliveries?{wrong}", status=422)


def test_the_rules_of_a_push_are_those_that_are_documented():
    assert DOCUMENT["components"]["schemas"]["Outcome"]["properties"]["rule"]["enum"] == [*deploybot.RULES]


def test_hosts_and_apps_answer_as_documented(api):
    _, job = running(api, "web-01")
    create(api, "web-99")
    hosts = {host["hostname"]: host for host in api.ask("GET", "/v1/hosts", status=200)["hosts"]}
    assert hosts["web-01"]["running"] == 1 and hosts["web-99"]["agent_status"] == "unknown"
    assert api.ask("POST", "/v1/hosts/web-01/drain", status=200, role="operator")["host"]["drained"]
    assert not api.ask("POST", "/v1/hosts/web-01/resume", status=200)["host"]["drained"]
    api.ask("DELETE", "/v1/hosts/web-01", status=409)
    finish(api, job)
    api.ask("DELETE", "/v1/hosts/web-01", status=200)
    apps = api.ask("GET", "/v1/apps", status=200)["apps"]
    assert [app["name"] for app in apps] == ["web-frontend"]
    api.ask("POST", "/v1/reload", status=200)
    api.controller.apps_file.write_text('{"apps": [{"name": "A B"}]}')
    assert api.ask("POST", "/v1/reload", status=422)["errors"]


def test_the_webhook_answers_as_documented(api):
    made = push(api)["jobs_created"]
    assert len(made) == 2 and push(api)["jobs_created"] == made
    assert push(api, "ping")["jobs_created"] == []
    push(api, kind="application/x-www-form-urlencoded")
    for sender in ("Gitea", "Forgejo", "Gogs"):
        push(api, secret="wrong", sender=sender, status=401)
        assert push(api, sender=sender)["jobs_created"] == made
    push(api, secret="wrong", status=401)
    push(api, body=b"{", status=400)
    push(api, body=b'{"ref": 1, "repository": {}}', status=422)
    api.ask(
        "POST",
        "/v1/webhooks/github",
        headers={"Content-Length": str(25 * 2**20 + 1), "X-Hub-Signature-256": "sha256=" + "0" * 64},
        role=None,
        status=413,
    )


def test_pages_and_operations_answer_as_documented(api):
    for path in ("/", "/docs", "/redoc", "/openapi.json", "/agent.py", "/ctl.py", "/v1/programs", "/health"):
        api.ask("GET", path, role=None, status=200)
    api.ask("GET", "/metrics", status=200)
    assert api.ask("GET", "/openapi.json", status=200) == DOCUMENT


def test_the_stream_answers_as_documented(api):
    _, job = running(api, "web-01")
    upload(api, job, 0, "one", "two")
    finish(api, job)
    path = f"/v1/logs/stream?job_id={job['id']}"
    blocks = [block.split("\n") for block in api.ask("GET", path, status=200).split("\n\n")]
    events = [dict(line.split(": ", 1) for line in block) for block in blocks if any(line.startswith("event") for line in block)]
    known = operation("GET", "/v1/logs/stream")["x-events"]
    for event in events:
        assert problems(closed(known[event["event"]]["schema"]), json.loads(event["data"]), event["event"]) == []
    assert [event["event"] for event in events[-4:]] == ["log", "log", "job", "end"]
    api.ask("GET", path, headers={"Last-Event-ID": events[-2]["id"]}, status=204)
    gap = api.ask("GET", path, headers={"Last-Event-ID": "00000000-1"}, status=200)
    assert "event: gap\n" in gap
    api.ask("GET", f"/v1/logs/stream?job_id={NOWHERE}", status=404)
    api.ask("GET", "/v1/logs/stream?tail=1001", status=422)


def filled(path):
    return path.replace("{id}", NOWHERE).replace("{hostname}", "nowhere").replace("{app}", "nowhere")


CALLS = [pytest.param(method, path, op, id=op["operationId"]) for method, path, op in operations()]


def test_the_stream_of_deployments_answers_as_documented(api):
    deploy(api, ref="main", hosts=["web-01"])
    drained(api, "web-01")
    origin = f"{api.controller.daemon.jobs.epoch}-0"
    known, seen = operation("GET", "/v1/logs/stream")["x-events"], []
    viewer = {"Authorization": f"Bearer {api.tokens['viewer']}"}
    with EventStream(api.controller, last_id=origin, headers=viewer) as stream:
        for event in stream:
            assert problems(closed(known[event["event"]]["schema"]), event["data"], event["event"]) == []
            seen += [event["data"]["status"]] if event["event"] == "deployment" else []
            if seen[-1:] == ["success"]:
                break
    assert seen == ["pending", "running", "success"]


def calls_with(status):
    return [param for param in CALLS if status in param.values[2]["responses"] and param.values[2]["x-role"] != "public"]


@pytest.mark.parametrize(("method", "path", "op"), calls_with("401"))
def test_no_token_and_a_wrong_one(api, method, path, op):
    for authorization in (None, "Bearer dbt_wrong", "Basic YTpi"):
        api.ask(method, filled(path), b"{}", headers={"Authorization": authorization}, status=401)


@pytest.mark.parametrize(("method", "path", "op"), calls_with("403"))
def test_a_role_that_may_not(api, method, path, op):
    for role in set(api.tokens) - set(MAY[op["x-role"]]):
        assert f"role {op['x-role']}" in api.ask(method, filled(path), b"{}", role=role, status=403)["detail"]


@pytest.mark.parametrize(("method", "path", "op"), [param for param in CALLS if "{" in param.values[1]])
def test_an_id_that_is_not_there(api, method, path, op):
    body = (
        next(iter(op["requestBody"]["content"]["application/json"]["examples"].values()))["value"] if "requestBody" in op else None
    )
    api.ask(method, filled(path), body, status=404)


@pytest.mark.parametrize(("method", "path", "op"), [param for param in calls_with("400") if "requestBody" in param.values[2]])
def test_a_body_that_cannot_be_parsed(api, method, path, op):
    for body in (b"", b"{", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"\xff", b"[" * 5000):
        api.ask(method, filled(path), body, status=400)


@pytest.mark.parametrize(("method", "path", "op"), calls_with("413"))
def test_a_body_that_is_too_large(api, method, path, op):
    api.ask(method, filled(path), None, headers={"Content-Length": str(2**20 + 1)}, status=413)


@pytest.mark.parametrize(("method", "path", "op"), CALLS)
def test_a_request_that_is_not_http(api, method, path, op):
    with socket.create_connection(("127.0.0.1", api.controller.port), timeout=20) as connection:
        connection.sendall(f"{method} {filled(path)} HTTP/1.1\r\nno colon here\r\n\r\n".encode())
        response = http.client.HTTPResponse(connection, method=method)
        response.begin()
        assert response.status == 400
        api.hold(method, filled(path), 400, response.headers, response.read().decode())


@pytest.mark.parametrize("path", [*DOCUMENT["paths"]])
def test_another_method_is_405(api, path):
    status, headers, body = api.controller.raw("PATCH", filled(path), headers={"Authorization": f"Bearer {api.tokens['admin']}"})
    assert status == 405
    assert set(DOCUMENT["paths"][path]) == {method.strip().lower() for method in headers["Allow"].split(",")} - {"head"}
    assert problems(closed({"$ref": "#/components/schemas/Problem"}), json.loads(body)) == []


def test_a_missing_file_is_404(api, monkeypatch):
    monkeypatch.setattr(deploybot, "__file__", "/nowhere/deploybot.py")
    for path in ("/", "/docs", "/redoc", "/openapi.json", "/agent.py", "/ctl.py"):
        assert "is missing" in api.ask("GET", path, status=404)["detail"]
    assert api.ask("GET", "/v1/programs", status=200)["programs"] == []


def test_a_database_that_cannot_be_read_is_503(api, monkeypatch):
    def broken(*_):
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(deploybot.Queries, "meta", broken)
    assert api.ask("GET", "/health", role=None, status=503)["status"] == "error"
    monkeypatch.setattr(deploybot.Queries, "jobs", broken)
    api.ask("GET", "/v1/jobs", status=503)
