"""schemathesis over openapi.json, against a controller as a process: in open mode, then closed with the token of each role.

It makes requests out of the document, good ones and wrong ones, and holds each answer against it: none is a server error, and
none says a status, a media type, a header or a field that the document does not. What the document says in prose of all calls
(a field that is null counts as left out) is written into the copy that schemathesis reads.

Ids and host names that it makes up are replaced, two times in three, by those that there are, so that it comes further than
404; a push that has a signature gets the right one. The stream never ends by itself: it is read for STREAM_SECONDS or
STREAM_BYTES, and each event of it is held against the document as well.

Needs schemathesis (`pip install schemathesis`), in the Python that runs this or in .venv-check.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import hashlib
import hmac
import importlib.util
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import urllib.parse
from typing import Any, NamedTuple

from common import AGENT_TOKEN, READ_TOKEN, ROOT, TOKEN, Controller, Failure, LightAgent, Proof, check, run

sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
sys.dont_write_bytecode = True

SECRET = "It's a Secret to Everybody"
STREAM_SECONDS, STREAM_BYTES = 0.05, 256 * 1024
AT_ONCE = 2  # passes
APP, REPO = "web-frontend", "myorg/web-frontend"  # as the document's examples have them
HOSTS = ("web-01.example.com", "test-host", "web-02.example.com")
DELIVERY = "72d3162e-cc78-11e3-81ab-4c9367dc0958"
PUSH = json.dumps({"ref": "refs/heads/main", "after": "5" * 40, "repository": {"full_name": REPO}}).encode()
# Each answer is held against these, and the others in the pass that names them. Not among them: positive_data_acceptance, as a good
# request can still be refused for what a schema does not say (git's rules for a ref, fields that exclude one another).
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "as_documented",
)
OTHERS = (
    "ignored_auth",
    "use_after_free",
    "ensure_resource_availability",
    "positive_data_acceptance",
    "object_level_authorization",
)
# What comes from GitHub is read for what is needed of it, and no further.
# A text that is too long for a line of the head is refused before its query is read (431).
CONFIG = """{checks}
checks.negative_data_rejection.expected-statuses = [400, 401, 403, 404, 405, 406, 409, 415, 422, 428, 429, 431, "5xx"]
[[operations]]
include-operation-id = "githubWebhook"
checks.negative_data_rejection.enabled = false
"""
ID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
HOST = r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?"
APPS = r"[a-z0-9][a-z0-9._-]{0,63}"
# Of what stands in a path and is no id: (parameter, whether a delivery is there to be found).
FORMS = {("hostname", False): HOST, ("app", False): APPS, ("id", True): r"[A-Za-z0-9._-]{1,100}"}
EVERY_PHASE = "examples,coverage,fuzzing,stateful"


class Pass(NamedTuple):
    name: str
    token: Any  # None: open mode; text; or what to ask POST /v1/tokens for
    phases: str = "examples,fuzzing"
    examples: int = 2  # a call, in the short form
    more: tuple[str, ...] = ()  # checks


PASSES = (
    Pass("open", None, "examples,fuzzing,stateful", 5, ("use_after_free", "ensure_resource_availability")),
    Pass("admin", TOKEN, "examples,coverage", 1, ("ignored_auth",)),
    Pass("operator", {"role": "operator"}),
    Pass("viewer", READ_TOKEN),
    Pass("enrolment", AGENT_TOKEN),
    Pass("agent of a host", {"role": "agent", "host": HOSTS[0]}),
    Pass("operator of an app", {"role": "operator", "app": APP}),
)
FULL_EXAMPLES = 200


# ---------------------------------------------------------------------------------------------------------------------
# The proof
# Owns: controllers, the passes, what the controller itself says of them. Ignores: what schemathesis does inside.


def schemathesis() -> list[str]:
    if importlib.util.find_spec("schemathesis"):
        return [sys.executable, "-m", "schemathesis.cli"]
    program = ROOT / ".venv-check" / "bin" / "schemathesis"
    check(program.exists(), "schemathesis is not there: pip install schemathesis, into this Python or into .venv-check")
    return [str(program)]


def config(one: Pass) -> str:
    enabled = dict.fromkeys(OTHERS, False) | dict.fromkeys(CHECKS + one.more, True)
    lines = [f"checks.{name}.enabled = {str(wanted).lower()}" for name, wanted in enabled.items()]
    return CONFIG.replace("{checks}", "\n".join(lines))


def loosened(document: dict[str, Any]) -> dict[str, Any]:
    """With null for each optional field of a request."""
    schemas = document["components"]["schemas"]
    operations = [op for item in document["paths"].values() for op in item.values()]
    asked = re.findall(r'"#/components/schemas/(\w+)"', json.dumps([op.get("requestBody") for op in operations]))
    for name in {*asked, "LogLineIn", "RunningJob"}:
        fields = schemas[name]["properties"]
        for field in fields.keys() - set(schemas[name].get("required", ())):
            fields[field] = or_null(fields[field], schemas)
    stream = document["paths"]["/v1/logs/stream"]["get"]["responses"]["200"]["content"]["text/event-stream"]
    del stream["schema"]  # of the text as a whole; schemathesis would take it for that of an event, as OpenAPI 3.2 has it
    return document


def or_null(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """Of one piece: the limits of an `anyOf` are not tried out."""
    if "$ref" in schema:
        schema = {**schemas[schema["$ref"].rpartition("/")[2]], **schema}
        del schema["$ref"]
    if "type" not in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    return {**schema, "type": [*kinds, "null"], **({"enum": [*schema["enum"], None]} if "enum" in schema else {})}


def furnish(controller: Controller) -> dict[str, list[str]]:
    """Hosts, jobs and deployments in every state, a push, and tokens to be found; their ids by the path that they stand in."""
    jobs, agents = [], []
    client = controller.client(controller.settings["admin"])
    app = client.ok("GET", "/v1/apps")["apps"][0]["name"]
    for host in HOSTS:
        agent = LightAgent(controller.port, host)
        agent.enrolment.token = controller.settings["enrolment"]
        status, _ = agent.register()
        check(status == 200, "an agent cannot register", status)
        agents.append(agent.id)
        for number in range(4):
            body = {"repo": REPO, "ref": f"r{number}", "host": host, "app": APP if number % 2 else f"app-{number}"}
            jobs.append(client.ok("POST", "/v1/jobs", body)["job"]["id"])
            job = agent.beat()[1]["job"] if number in (0, 1, 3) else None
            if job:
                agent.logs(job, 0, ["one", "<b>two</b> \x1b[31m", "é\u202e"])
            if job and number:
                agent.result(job, "failed" if number == 1 else "success", exit_code=number)
        agent.close()
    headers = {"X-GitHub-Delivery": DELIVERY, "X-Hub-Signature-256": signed(SECRET, PUSH)}
    status, _ = client.call("POST", "/v1/webhooks/github", PUSH, headers)
    check(status == 200, "a push was answered with", status)
    deployments = []
    for number in range(4):  # few: a tail is that of the newest jobs of an app
        made = client.ok("POST", "/v1/deployments", {"app": app, "ref": f"d{number}"})["deployment"]["id"]
        deployments.append(made)
        if number % 2:  # the others are under way
            client.ok("POST", f"/v1/deployments/{made}/cancel")
    tokens = [client.ok("POST", "/v1/tokens", {"role": "viewer"})["token"]["id"] for _ in range(20)]
    client.close()
    of_paths = {"/v1/deployments/": deployments, "/v1/deliveries/": [DELIVERY], "/v1/apps/": [app], "/v1/hooks/": [app]}
    return {"/v1/jobs/": jobs, "/v1/agents/": agents, "/v1/tokens/": tokens, "/v1/hosts/": list(HOSTS), **of_paths}


def signed(secret: str, body: bytes) -> str:
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def start(proof: Proof, one: Pass) -> tuple[Controller, str | None]:
    """A controller for that pass, and the token to send."""
    folder = proof.folder / one.name.replace(" ", "-")
    (folder / "spare").mkdir(parents=True)
    secrets = {"webhook_secret": SECRET}
    if one.token is None:
        secrets |= {"token": None, "agent_token": None, "read_token": None}
    flags = ["--agent-timeout", "100ms"]  # it bounds the parking of heartbeats
    flags += ["--open"] if one.token is None else []
    flags += ["--trusted-proxy", "127.0.0.1"] if "ignored_auth" in one.more else []
    # Elsewhere under another name: an app belongs to one repository, and the parts of examples are mixed.
    name = APP if isinstance(one.token, dict) and "app" in one.token else "shop"
    app = {"name": name, "repo": REPO, "hosts": HOSTS[:1], "deploy_on_push": True}
    controller = Controller(folder, *flags, apps={"apps": [app]}, **secrets).start()
    controller.settings |= {"admin": controller.settings["token"], "enrolment": controller.settings["agent_token"]}
    token = one.token
    if isinstance(token, dict):
        token = controller.client().ok("POST", "/v1/tokens", token)["secret"]
    return controller, token


def spare_token(controller: Controller) -> str:
    """For signing in, where none is needed."""
    return str(controller.client(None).ok("POST", "/v1/tokens", {"role": "viewer"})["secret"])


def requests_by_status(controller: Controller) -> dict[tuple[str, str], dict[str, int]]:
    """(method, route) to status to number of requests, as /metrics has them."""
    _, _, text = controller.client(controller.settings["admin"]).raw("GET", "/metrics")
    found: dict[tuple[str, str], dict[str, int]] = {}
    pattern = r'^deploybot_http_requests_total\{method="(\w+)",route="([^"]+)",status="(\d+)"\} (\d+)'
    for method, route, status, count in re.findall(pattern, text.decode(), re.MULTILINE):
        found.setdefault((method, route), {})[status] = int(count)
    return found


def one_pass(proof: Proof, one: Pass, document: pathlib.Path) -> dict[str, int]:
    """Runs schemathesis once; number of requests by status. Raises Failure with what it found."""
    controller, token = start(proof, one)
    known = {"ids": furnish(controller), "secret": SECRET, "token": token or spare_token(controller)}
    known["many"] = "ignored_auth" in one.more  # wrong tokens come from an address each: none is one too many
    env = {**os.environ, "PROOF_KNOWN": json.dumps(known), "SCHEMATHESIS_HOOKS": "schemathesis_run", "NO_COLOR": "1"}
    env["PYTHONPATH"] = str(ROOT / "tests" / "proof")
    argv = [*schemathesis(), "run", str(document), "--url", controller.url, "--seed", str(proof.seed), "--no-color"]
    argv += ["--continue-on-failure", "--warnings", "off"]
    argv += ["--phases", EVERY_PHASE if proof.full else one.phases]
    argv += ["-n", str(FULL_EXAMPLES if proof.full else one.examples), "--generation-database", "none"]
    argv += ["--generation-with-security-parameters", "false", "--suppress-health-check", "all"]
    argv += ["-H", f"Authorization: Bearer {token}"] if token else []
    (controller.folder / "spare" / "schemathesis.toml").write_text(config(one))
    said = subprocess.run(argv, cwd=controller.folder / "spare", env=env, capture_output=True, text=True, check=False)
    (controller.folder / "schemathesis.txt").write_text(said.stdout + said.stderr)
    check(said.returncode == 0, f"{one.name}: schemathesis found\n", said.stdout[-8000:], said.stderr[-2000:])
    answers = requests_by_status(controller)
    events = collections.Counter((controller.folder / "spare" / "events").read_text().split())
    check(
        one.token == AGENT_TOKEN or one.name == "agent of a host" or {"log", "job"} <= events.keys(),
        f"{one.name}: no events",
        events,
    )
    held(one, controller, answers, json.loads(document.read_text()))
    controller.stop()
    check("Traceback" not in controller.said(), f"{one.name}: the controller's log has a traceback:", controller.said()[-3000:])
    counts: dict[str, int] = {}
    for statuses in answers.values():
        for status, count in statuses.items():
            counts[status] = counts.get(status, 0) + count
    return counts


def held(one: Pass, controller: Controller, answers: Any, document: dict[str, Any]) -> None:
    """What the controller counted: no server error, each call made, and with all rights each call made with success."""
    check(controller.poll() is None, f"{one.name}: the controller ended:", controller.said()[-3000:])
    wrong = {route: statuses for route, statuses in answers.items() if any(status >= "500" for status in statuses)}
    check(not wrong, f"{one.name}: server errors", wrong)
    asked = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    check(asked <= answers.keys(), f"{one.name}: never asked", asked - answers.keys())
    if one.token in (None, TOKEN):
        hollow = [route for route in asked if not any(status < "300" for status in answers[route])]
        check(not hollow, f"{one.name}: never with success", hollow)


def prove(proof: Proof) -> None:
    document = proof.folder / "openapi.json"
    document.write_text(json.dumps(loosened(json.loads((ROOT / "openapi.json").read_text()))))
    wanted = [one for one in PASSES if proof.options.only in (None, one.name)]
    check(wanted, "--only names one of", [one.name for one in PASSES])
    failures: list[Failure] = []
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        running = [(one, pool.submit(one_pass, proof, one, document)) for one in wanted]
        for one, future in running:
            try:
                counts = future.result()
            except Failure as failure:
                failures.append(failure)
                continue
            shown = ", ".join(f"{status}: {count}" for status, count in sorted(counts.items()))
            proof.figure(one.name, f"{sum(counts.values()):,} requests ({shown})")
    check(not failures, *("\n" + str(failure) for failure in failures))


# ---------------------------------------------------------------------------------------------------------------------
# Inside schemathesis
# Owns: what is put in place of made-up ids, signatures, the bounded stream, the check. Ignores: everything above.


def install(known: dict[str, Any]) -> None:
    import itertools

    import requests.adapters
    import schemathesis as st
    import test_openapi as contract
    import urllib3

    turns: dict[str, Any] = {}
    addresses = itertools.count(1)
    first = min(known["ids"]["/v1/agents/"])  # ids of this controller are not before it
    strict: dict[tuple[str, str, str], Any] = {}
    events_read = open("events", "w")  # noqa: SIM115 (as long as the process)

    @st.hook
    def filter_failure(context: Any, failure: Any, case: Any, response: Any) -> bool:
        """A parameter that was sent empty, as an object without fields is, counts as left out: to take it is no mistake."""
        sent = urllib.parse.parse_qsl(urllib.parse.urlsplit(response.request.url).query, keep_blank_values=True)
        return failure.code != "ST201" or all(value for _, value in sent)

    @st.hook
    def before_call(context: Any, case: Any, kwargs: Any) -> None:
        """What nobody made is replaced by what there is, two times in three; what is wrong on purpose stays as it is."""
        turn = next(turns.setdefault(case.path, itertools.count()))
        pool = next((ids for start, ids in known["ids"].items() if case.path.startswith(start)), ())
        if pool and turn % 3:
            replace(case.path_parameters, pool[turn % len(pool)])
        if case.path == "/v1/logs/stream" and turn % 3:
            case.headers.pop("Last-Event-ID", None)
            replace(case.query, known["ids"]["/v1/jobs/"][turn % len(known["ids"]["/v1/jobs/"])])
            for name in ("host", "app"):  # else they leave nothing of that job
                if re.fullmatch(HOST, str(case.query.get(name, "-"))):
                    del case.query[name]
        asked = case.body if case.path == "/v1/deployments" and isinstance(case.body, dict) else {}
        if turn % 3 and re.fullmatch(APPS, str(asked.get("app", "-"))):
            asked["app"] = known["ids"]["/v1/apps/"][0]
        body = case.body if case.path == "/v1/session" and isinstance(case.body, dict) else {}
        if known["token"] and turn % 2 and body.get("token") and isinstance(body["token"], str):
            body["token"] = known["token"]

    def replace(parameters: Any, there: str) -> None:
        for name, value in parameters.items():
            is_id = name in ("id", "job_id") and re.fullmatch(ID, str(value)) and (value < first or value[0] != "0")
            is_name = re.fullmatch(FORMS.get((name, there == DELIVERY), "(?!)"), str(value))
            if is_id or is_name:
                parameters[name] = there

    send = requests.adapters.HTTPAdapter.send

    def bounded(self: Any, request: Any, stream: bool = False, timeout: Any = None, **more: Any) -> Any:
        path = urllib.parse.urlsplit(request.url).path
        signature = request.headers.get("X-Hub-Signature-256", b"")
        signature = signature.decode("latin-1") if isinstance(signature, bytes) else signature
        if path == "/v1/webhooks/github" and re.fullmatch(r"sha256=[0-9a-f]{64}", signature):
            body = request.body.encode() if isinstance(request.body, str) else request.body or b""
            request.headers["X-Hub-Signature-256"] = signed(known["secret"], body)
        if known["many"]:
            request.headers["X-Forwarded-For"] = f"2001:db8:{next(addresses):x}::1"
        if path != "/v1/logs/stream":
            return send(self, request, stream=stream, timeout=timeout, **more)
        response = send(self, request, stream=True, timeout=timeout, **more)
        live, read = response.raw, b""
        if live.connection and live.connection.sock:  # else the answer has come whole
            live.connection.sock.settimeout(STREAM_SECONDS)
        with contextlib.suppress(urllib3.exceptions.HTTPError, TimeoutError):  # silence
            for piece in live.stream(65536):
                read += piece
                if len(read) > STREAM_BYTES:
                    break
        live.close()
        headers = {name: value for name, value in live.headers.items() if name.lower() != "transfer-encoding"}
        version = {"status": live.status, "reason": live.reason, "version": live.version}
        response.raw = urllib3.HTTPResponse(io.BytesIO(read), headers, preload_content=False, **version)
        return response

    requests.adapters.HTTPAdapter.send = bounded  # type: ignore[method-assign]

    def schema_of(case: Any, status: str, kind: str) -> Any:
        """The schema of that answer where no object may have more fields than it names; None where it is no JSON."""
        key = (case.operation.label, status, kind)
        if key not in strict:
            said = contract.DOCUMENT["paths"][case.path][case.method.lower()]["responses"]
            rest = contract.resolve(said["4XX"])
            described = said.get(status) or (rest if int(status) in rest["x-statuses"] else None)
            assert described, f"{key}: the status is not described"
            content = contract.resolve(described).get("content", {})
            assert kind in content or not (kind or content), f"{key}: the media type is not described"
            strict[key] = contract.closed(content[kind]["schema"]) if kind.endswith("json") else None
        return strict[key]

    def hold(schema: Any, text: str) -> None:
        wrong = contract.problems(schema, json.loads(text))
        assert not wrong, wrong

    @st.check
    def as_documented(context: Any, response: Any, case: Any) -> None:
        """The status, the media type, each field of the answer, and each event of a stream."""
        if case.method.lower() not in contract.DOCUMENT["paths"][case.path]:
            return  # a method that there is not: `unsupported_method` looks at it
        kind = (response.headers.get("content-type") or [""])[0].partition(";")[0]
        schema = schema_of(case, str(response.status_code), kind)
        if schema is not None:
            hold(schema, response.content)
        if kind == "text/event-stream":
            events = contract.DOCUMENT["paths"][case.path]["get"]["x-events"]
            *blocks, _ = response.content.decode().split("\n\n")  # the last one may be cut
            for block in blocks:
                fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
                assert fields.keys() <= {"id", "event", "data", "retry"}, block
                if "data" in fields:
                    hold(contract.closed(events[fields["event"]]["schema"]), fields["data"])
                    print(fields["event"], file=events_read, flush=True)


if "PROOF_KNOWN" in os.environ:
    install(json.loads(os.environ["PROOF_KNOWN"]))

if __name__ == "__main__":
    sys.exit(run(prove, __doc__, ("--only", {"metavar": "PASS", "help": "one pass alone, such as open"})))
