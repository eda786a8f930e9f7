"""What the documents tell people to type is run, or says why not; mappings are taken and deployed, the protocol is the controller's."""

import hashlib
import hmac
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from conftest import wait_for
from test_end_to_end import LIMIT, Site
from test_readme import DOCUMENTS, ROOT, blocks, program, section, table

import deploybot

SECRET = "It's a Secret to Everybody"
PROTOCOL = (ROOT / "docs/agent-protocol.md").read_text()
RECIPES = (ROOT / "docs/recipes.md").read_text()
SCHEMAS = json.loads((ROOT / "openapi.json").read_text())["components"]["schemas"]

# ------------------------------------------------------------------------------------------------------------------------
# Every block of shell is run, or says why not
#
# Who adds a block to a document either runs it in a test, and names it here (a document: what only this block holds: file::function),
# or puts `<!-- not run: WHY -->` on the line above it. The whole of a document: what a function runs block by block.

UNITS, LITESTREAM, GUIDE = "tests/proof/units.py", "tests/proof/litestream_units.py", "tests/proof/guide.py"
README_TESTS, CAPACITY = "tests/test_readme.py", "tests/check/test_capacity_docs.py"
FIRST = "tests/check/test_first_deployment.py"
WHOLE = {"docs/guide.md": f"{GUIDE}::followed"}
RUN_BY = {
    "README.md": {
        "git init": f"{FIRST}::test_the_first_deployment_of_the_readme",
        "deploy --app hello": f"{FIRST}::test_the_first_deployment_of_the_readme",
        "/v1/hooks/hello": f"{FIRST}::test_the_first_deployment_of_the_readme",
        "rollback --app hello": f"{FIRST}::test_the_first_deployment_of_the_readme",
    },
    "docs/install.md": {
        "install -D --mode=644 deploybot.service": f"{UNITS}::installed",
        "for name in token": f"{README_TESTS}::test_the_lines_that_make_the_credentials_make_files_that_only_root_can_read",
        "enable --now deploybot\n": f"{UNITS}::installed",
        "sha256sum --check": f"{UNITS}::agent_installed",
        "scripts.env": f"{UNITS}::agent_deploys",
        "tls_cert": f"{UNITS}::encrypted",
    },
    "docs/apps.md": {
        "'the database moves' --for 2h\n./ctl.py apps": f"{README_TESTS}::test_the_evening_with_deployments",
        "/v1/hooks/web-frontend": f"{README_TESTS}::test_each_ci_deploys_with_the_token_of_one_app",
    },
    "docs/notify.md": {"deploybot-notify.service": f"{UNITS}::notified"},
    "docs/ctl.md": {
        "curl -fsSO": "tests/check/test_docs.py::test_ctl_is_fetched_and_used_as_the_page_says",
        "retry 01a2088a": "tests/check/test_docs.py::test_each_call_in_the_list_is_one_that_ctl_takes",
    },
    "docs/api.md": {
        "X-Hub-Signature-256": "tests/check/test_docs.py::test_a_push_signed_by_hand_is_taken",
        "An agent in four calls": "tests/test_agent_controller.py::test_the_shell_agent_does_it_with_four_calls",
        "token create --role operator --app": f"{README_TESTS}::test_the_lines_about_tokens_do_what_they_say",
    },
    "docs/capacity.md": {
        "install -D --mode=755 litestream": f"{LITESTREAM}::prepared",
        "systemctl enable litestream": f"{LITESTREAM}::prove",
        "litestream restore": f"{LITESTREAM}::prove",
        "restored from the backup": f"{CAPACITY}::test_what_waited_at_a_take_over_is_asked_for_again",
        "check-apps": f"{CAPACITY}::test_a_host_in_two_files_is_found",
        "on() {": f"{CAPACITY}::test_ctl_speaks_to_each",
        "everywhere() {": f"{CAPACITY}::test_everywhere_is_one_controller_after_the_other",
    },
    "docs/monitoring.md": {"--name prometheus": "tests/check/test_docs.py::test_a_token_for_prometheus_reads_metrics_and_deploys_nothing"},
    "docs/operations.md": {
        "renewal-hooks": f"{UNITS}::encrypted",
        "CAP_NET_BIND_SERVICE": f"{UNITS}::encrypted",
        "cron.daily": f"{UNITS}::operated",
        "restore --db /var/lib/deploybot/deploybot.db /var/backups": f"{UNITS}::operated",
        "deploybot.py doctor": f"{UNITS}::operated",
        "disable --now": f"{GUIDE}::moved",
        "tar -C / -xzf": f"{GUIDE}::moved",
        "--run-as": f"{UNITS}::agent_deploys",
        "no-sudo.conf": f"{GUIDE}::hardened",
        "backup --db /var/lib/deploybot/deploybot.db /root/deploybot.db.old": f"{UNITS}::upgraded",
        "deploybot.service.old\n": f"{UNITS}::upgraded",
        "cp --archive /usr/local/lib/deploybot/deploybot.py.old": f"{UNITS}::upgraded",
        "deploybot.db /root/deploybot.db.old\nsystemctl start": f"{UNITS}::upgraded",
        "shared/.env": "tests/check/test_docs.py::test_a_shared_file_can_be_written_before_the_first_deployment",
    },
    "docs/recipes.md": {"orders get a new index": "tests/check/test_docs.py::test_an_app_is_locked_while_somebody_migrates"},
}  # fmt: skip


def shell_of(name):
    """(why it is not run or None, text) of each block of shell."""
    found = re.findall(
        r"^(?:<!-- not run: ([^\n]+) -->\n)?```(?:sh|shell|bash|console)\n(.*?)^```$", (ROOT / name).read_text(), re.M | re.S
    )
    return [(why or None, text) for why, text in found]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_block_of_shell_is_run_by_a_test_or_says_why_not(name):
    marks = RUN_BY.get(name, {})
    for why, text in shell_of(name):
        runs = [mark for mark in marks if mark in text]
        if name in WHOLE or why:
            assert not runs, f"{runs} is named as run, and the block is marked or its whole document is run"
        else:
            assert len(runs) == 1, f"{name}: no test is named for this block, or more than one ({runs}); see above RUN_BY:\n{text}"
    texts = [text for _, text in shell_of(name)]
    assert [mark for mark in marks if sum(mark in text for text in texts) != 1] == []


@pytest.mark.parametrize("place", sorted({*WHOLE.values(), *(place for marks in RUN_BY.values() for place in marks.values())}))
def test_what_is_named_as_running_them_is_there(place):
    file, name = place.split("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M)


def test_the_proofs_that_run_them_are_in_the_list():
    (listed,) = re.findall(r"^readonly PROOFS=\((.*)\)$", (ROOT / ".ci/proofs").read_text(), re.M)
    assert {Path(file).stem for file in (UNITS, LITESTREAM, GUIDE)} <= set(listed.split())


def test_the_readme_lists_every_document_once():
    linked = re.findall(r"\]\((docs/[^)#]+)\)", section("README.md", "Where to go from here"))
    assert sorted(linked) == [name for name in DOCUMENTS if name.startswith("docs/")]


def test_what_the_guide_quotes_is_what_the_programs_say():
    (text,) = re.findall(r"^## When it does not work\n(.*?)^## ", (ROOT / "docs/guide.md").read_text(), re.M | re.S)
    quoted = [words for row in table(text, "look at") for words in re.findall(r"`([^`]+)`", row[1])]
    said = "".join((ROOT / name).read_text() for name in ("deploybot.py", "agent.py"))
    known = {*deploybot.RULES, *SCHEMAS["Reason"]["enum"]}
    assert len(quoted) > 12 and [words for words in quoted if words not in known and words not in said] == []


# ------------------------------------------------------------------------------------------------------------------------
# ctl.py


@pytest.fixture
def closed(make_controller):
    controller = make_controller(open=False, token="dbt_admin")
    controller.set_app(name="shop", repo="myorg/shop", hosts=["app-01.example.com"])
    return controller


def shell(script, folder, said="", **environment):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("DEPLOYBOT_")}
    command = ["sh", "-euc", script]
    return subprocess.run(command, cwd=folder, env=plain | environment, input=said, capture_output=True, text=True, check=False)


def test_ctl_is_fetched_and_used_as_the_page_says(closed, tmp_path):
    (script,) = [text for _, text in shell_of("docs/ctl.md") if "curl -fsSO" in text]
    script = script.replace("https://deploy.example.com", closed.url)
    signed_in = f"login {closed.url} --token-stdin"
    assert f"login {closed.url}" in script
    done = shell(script.replace(f"login {closed.url}", signed_in), tmp_path, said="dbt_admin\n", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ctl.py").read_bytes() == (ROOT / "ctl.py").read_bytes()


def test_each_call_in_the_list_is_one_that_ctl_takes(tmp_path):
    """With nobody at the other end each of them ends with 3, and not with 2."""
    (script,) = [text for _, text in shell_of("docs/ctl.md") if "retry 01a2088a" in text]
    for line in script.splitlines():
        done = shell(line, ROOT, DEPLOYBOT_URL="http://127.0.0.1:1", DEPLOYBOT_TOKEN="dbt_admin")
        assert done.returncode == 3, (line, done.stderr)


def test_a_token_for_prometheus_reads_metrics_and_deploys_nothing(closed, tmp_path):
    (script,) = [text for _, text in shell_of("docs/monitoring.md") if "--name prometheus" in text]
    done = shell(script.replace("./ctl.py", str(ROOT / "ctl.py")), tmp_path, DEPLOYBOT_URL=closed.url, DEPLOYBOT_TOKEN="dbt_admin")
    assert done.returncode == 0, done.stderr
    file = tmp_path / "deploybot.token"
    assert file.stat().st_mode & 0o777 == 0o600
    prometheus = closed.acting(file.read_text().strip())
    assert prometheus.raw("GET", "/metrics")[0] == 200
    assert prometheus.call("POST", "/v1/deployments", {"app": "shop", "ref": "main"})[0] == 403


def test_a_push_signed_by_hand_is_taken(make_controller):
    controller = make_controller(open=False, token="dbt_admin", webhook_secret=SECRET)
    controller.set_app(name="web-frontend", repo="myorg/web-frontend", hosts=["web-01"], deploy_on_push=True)
    (script,) = [text for _, text in shell_of("docs/api.md") if "X-Hub-Signature-256" in text]
    script = script.replace("https://deploy.example.com", controller.url).replace("$(git rev-parse HEAD)", "a" * 40)
    refused = json.loads(shell(script, ROOT, WEBHOOK_SECRET="another").stdout)
    taken = json.loads(shell(script, ROOT, WEBHOOK_SECRET=SECRET).stdout)
    assert (refused["status"], "does not match" in refused["detail"]) == (401, True)
    assert taken["message"] == "1 job for web-frontend" and len(taken["jobs_created"]) == 1


def test_an_app_is_locked_while_somebody_migrates(closed):
    (script,) = [text for _, text in shell_of("docs/recipes.md") if "new index" in text]
    done = shell(script, ROOT, DEPLOYBOT_URL=closed.url, DEPLOYBOT_TOKEN="dbt_admin")
    assert done.returncode == 0 and "orders get a new index" in done.stdout, done.stderr
    assert closed.ok("GET", "/v1/apps")["apps"][0]["lock"] is None


def test_a_shared_file_can_be_written_before_the_first_deployment(tmp_path):
    (script,) = [text for _, text in shell_of("docs/operations.md") if "shared/.env" in text]
    script = script.replace("/var/lib/deploybot-agent", str(tmp_path)).replace("deploybot-agent", str(os.getuid()), 2)
    done = shell(re.sub(r"--(owner|group)=\S+", r"--\1=" + str(os.getuid()), script), tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "web/shared/.env").stat().st_mode & 0o777 == 0o600


# ------------------------------------------------------------------------------------------------------------------------
# Recipes: each is taken; what they choose, and what they do


def recipe(title):
    (text,) = re.findall(rf"^## {title}\n.*?^```yaml\n(.*?)^```$", RECIPES, re.M | re.S)
    return text


TITLES = re.findall(r"^## (.+)$", RECIPES, re.M)


@pytest.mark.parametrize("title", TITLES)
def test_each_recipe_is_taken(title, tmp_path):
    (tmp_path / "apps.yaml").write_text(recipe(re.escape(title)))
    done = program("deploybot.py", "check-apps", tmp_path / "apps.yaml")
    assert done.returncode == 0, done.stderr


def push(controller, repo, ref, *files):
    """What became of a signed push that changed these files: {app: rule}."""
    commit = hashlib.sha1(os.urandom(8)).hexdigest()
    changed = {"id": commit, "message": "a change", "added": [], "removed": [], "modified": list(files)}
    body = json.dumps({
        "ref": ref, "before": "b" * 40, "after": commit, "created": False, "deleted": False, "forced": False, "commits": [changed],
        "head_commit": changed, "repository": {"full_name": repo, "default_branch": "main"}, "pusher": {"name": "ada"},
    }).encode()  # fmt: skip
    signature = "sha256=" + hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
    headers = {"X-GitHub-Event": "push", "X-GitHub-Delivery": commit, "X-Hub-Signature-256": signature}
    status, answer = controller.call("POST", "/v1/webhooks/github", body, headers)
    assert status == 200, answer
    return {one["app"]: one["rule"] for one in controller.ok("GET", f"/v1/deliveries/{commit}")["delivery"]["outcomes"]}


def test_a_monorepo_deploys_what_a_push_changes(make_controller):
    controller = make_controller(apps=recipe("A monorepo"), webhook_secret=SECRET)

    def deployed(*files):
        outcomes = push(controller, "myorg/shop", "refs/heads/main", *files)
        assert set(outcomes.values()) <= {"deployed", "paths"}
        return sorted(app for app, rule in outcomes.items() if rule == "deployed")

    assert deployed("frontend/app.js") == ["shop-frontend"]
    assert deployed("backend/main.go", "README.md") == ["shop-backend"]
    assert deployed("shared/model.json") == ["shop-backend", "shop-frontend"]
    assert deployed("backend/docs/api.md") == deployed("README.md") == []


def test_a_branch_goes_to_staging_and_a_tag_to_production_by_its_canary(make_controller):
    controller = make_controller(apps=recipe("Several environments"), webhook_secret=SECRET)
    assert push(controller, "myorg/web", "refs/heads/main", "a") == {"web-production": "ref", "web-staging": "deployed"}
    assert push(controller, "myorg/web", "refs/heads/other", "a") == {"web-production": "ref", "web-staging": "ref"}
    assert push(controller, "myorg/web", "refs/tags/v1.4.0") == {"web-production": "deployed", "web-staging": "ref"}
    jobs = controller.ok("GET", "/v1/jobs?app=web-production")["jobs"]
    assert {job["host"]: job["hold"] for job in jobs} == {
        "web-01.example.com": None, "web-02.example.com": "batch", "web-03.example.com": "batch", "web-04.example.com": "batch",
    }  # fmt: skip


# Stand-ins for what a test machine lacks; scripts find them first.
STAND_INS = {
    "sudo": 'exec "$@"',
    "systemctl": 'echo "$*" >> "$STATE/restarts"; if [ -e health ]; then cp health "$STATE/health"; fi',
    "python3": f'{sys.executable} "$@" --without-pip && printf "#!/bin/sh\\necho \\$* > installed\\n" > .venv/bin/pip && chmod +x .venv/bin/pip',
    "npm": 'echo "$*" >> "$STATE/npm"; mkdir -p .npm-cache; touch .npm-cache/seen; if [ "$1" = ci ]; then mkdir node_modules; fi',
}


class Kitchen(Site):
    """The hosts of a recipe as processes, with one repository for all of its apps, and a service that is as well as `health` says."""

    def __init__(self, folder, title):
        self.mapping = yaml.safe_load(recipe(title))
        super().__init__(folder, sorted({host for app in self.mapping["apps"] for host in app["hosts"]}))
        self.state, tools = folder / "state", folder / "tools"
        for place in (self.state, tools):
            place.mkdir()
        for name, text in STAND_INS.items():
            (tools / name).write_text(f"#!/bin/sh\nSTATE='{self.state}'\n{text}\n")
            (tools / name).chmod(0o755)
        self.env["PATH"] = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        (self.state / "health").write_text("well")
        self.service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.answers())
        threading.Thread(target=self.service.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        for app in self.mapping["apps"]:
            app["clone_url"] = f"file://{self.source}"
            if check := app.get("health_check"):  # the same, on a port of the test and in its time
                check["url"] = re.sub(r":\d+/", f":{self.service.server_port}/", check["url"])
                check |= {"timeout": "1s", "interval": "50ms"}
        (folder / "apps.yaml").write_text(json.dumps(self.mapping))

    def answers(self):
        health = self.state / "health"

        class Service(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200 if health.read_text() == "well" else 503)
                self.end_headers()

            def log_message(self, *_):
                pass

        return Service

    def commit(self, **files):
        for name, text in files.items():
            path = self.source / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755 if text.startswith("#!") else 0o644)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message=a change")
        return self.git("rev-parse", "HEAD")

    def deploy(self, app):
        """(exit code, what ctl.py said)."""
        code, out, errors = self.ctl("deploy", "--app", app, "--ref", "main", "--follow")
        return code, out + errors

    def current(self, app, host=None):
        return self.folder / (host or self.hosts[0]) / app / "current"

    def end(self):
        super().end()
        self.service.shutdown()
        self.service.server_close()


@pytest.fixture
def cook(tmp_path):
    made = []

    def start(title):
        made.append(Kitchen(tmp_path, title))
        made[0].begin()
        return made[0]

    yield start
    for kitchen in made:
        kitchen.end()


def test_the_static_site_is_served_from_current(cook):
    kitchen = cook("A static site")
    kitchen.commit(**{"index.html": "one"})
    code, said = kitchen.deploy("website")
    assert code == 0, said
    assert (kitchen.current("website") / "index.html").read_text() == "one"
    assert not (kitchen.current("website") / ".git").exists(), "nothing of git's is served"


def test_the_service_is_restarted_and_goes_back_where_it_is_not_well(cook):
    kitchen = cook("A systemd service")
    first = kitchen.commit(**{"build.sh": "#!/bin/sh\ntouch built\n", "health": "well"})
    code, said = kitchen.deploy("api")
    assert code == 0, said
    assert [(kitchen.current("api", host) / "built").exists() for host in kitchen.hosts] == [True, True]
    assert all((kitchen.current("api", host) / ".env").is_symlink() for host in kitchen.hosts)
    kitchen.commit(health="sick")
    code, said = kitchen.deploy("api")
    assert code == 1 and "health" in said
    jobs = {job["host"]: job for job in kitchen.api.ok("GET", "/v1/jobs?limit=2")["jobs"]}
    assert jobs["api-01.example.com"]["rolled_back_to"] == first and jobs["api-02.example.com"]["reason"] == "stopped"
    assert (kitchen.state / "health").read_text() == "well"
    assert (kitchen.state / "restarts").read_text() == "restart api\n" * 4


def test_the_canary_alone_migrates_and_a_failed_migration_changes_no_host(cook):
    kitchen = cook("A database migration, with a lock")
    migrate = f'#!/bin/sh\nflock --nonblock var/migrate.lock true && exit 9\necho "$DEPLOY_HOST" >> {kitchen.state}/migrated\n'
    first = kitchen.commit(**{"build.sh": "#!/bin/sh\n", "migrate.sh": migrate, "page": "one"})
    code, said = kitchen.deploy("shop")
    assert code == 0, said
    assert (kitchen.state / "migrated").read_text() == "app-01.example.com\n"
    kitchen.commit(**{"migrate.sh": "#!/bin/sh\nexit 3\n", "page": "two"})
    assert kitchen.deploy("shop")[0] == 1
    assert [(kitchen.current("shop", host) / "page").read_text() for host in kitchen.hosts] == ["one"] * 3
    hosts = kitchen.api.ok("GET", "/v1/apps")["apps"][0]["hosts"]
    assert {host["commit"] for host in hosts} == {first}


def test_node_and_python_build_into_the_release_and_share_what_is_to_stay(cook):
    kitchen = cook("Node and Python builds, with shared files")
    kitchen.commit(**{"requirements.txt": "", "page": "one"})
    for app in ("web", "jobs"):
        code, said = kitchen.deploy(app)
        assert code == 0, said
    web, jobs = kitchen.current("web"), kitchen.current("jobs")
    assert (kitchen.state / "npm").read_text().splitlines() == [
        "ci --include=dev --cache .npm-cache --prefer-offline", "run build", "prune --omit=dev",
    ]  # fmt: skip
    assert (web / "node_modules").is_dir() and (web / "uploads").is_symlink()
    assert (web.parent / "shared/.npm-cache/seen").exists()
    assert (jobs / "installed").read_text() == "install --quiet --cache-dir .pip-cache --requirement requirements.txt\n"
    assert (jobs / ".venv/bin/python").exists() and not (jobs / ".venv").is_symlink()
    assert (kitchen.state / "restarts").read_text() == "restart web\nrestart jobs\n"


# ------------------------------------------------------------------------------------------------------------------------
# The agent's protocol


def part(title):
    (text,) = re.findall(rf"^### {title}\n(.*?)(?=^##)", PROTOCOL, re.M | re.S)
    return text


def named(text, heading):
    return {name for row in table(text, heading) for name in re.findall(r"`(\w+)`", row[0])}


@pytest.mark.parametrize(
    "title, heading, schema",
    [
        ("Register", "sent", "RegisterRequest"),
        ("Heartbeat", "sent", "HeartbeatRequest"),
        ("Heartbeat", "field", "Spec"),
        ("Logs", "sent", "LogUpload"),
        ("Logs", "answered", "LogAck"),
        ("Result", "sent", "ResultRequest"),
    ],
)
def test_the_protocol_names_each_field_of_the_contract_and_no_other(title, heading, schema):
    assert named(part(title), heading) == set(SCHEMAS[schema]["properties"])


@pytest.mark.parametrize("title, schema", [("Register", "Agent"), ("Heartbeat", "HeartbeatAnswer")])
def test_what_the_protocol_says_of_answers_is_in_the_contract(title, schema):
    assert named(part(title), "answered") <= set(SCHEMAS[schema]["properties"])


def test_the_reasons_are_those_of_the_contract():
    (row,) = [row for row in table(part("Result"), "sent") if row[0] == "`reason`"]
    assert set(re.findall(r"`(\w+)`", row[1])) == {one for one in SCHEMAS["ResultRequest"]["properties"]["reason"]["enum"] if one}


NAMES = ("AGENT", "SESSION", "SECRET", "JOB", "DEPLOYMENT")
TIME = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z")


def compare(shown, got, known):
    """Raises where an answer is not what is shown; learns what a name in capitals stands for."""
    if isinstance(shown, dict):
        assert isinstance(got, dict) and set(shown) == set(got), (set(shown) ^ set(got), got)
        for name in shown:
            compare(shown[name], got[name], known)
    elif shown in NAMES:
        assert known.setdefault(shown, got) == got
    elif isinstance(shown, str) and TIME.fullmatch(shown):
        assert TIME.fullmatch(got)
    elif isinstance(shown, str):
        assert filled(shown, known) == got
    else:
        assert shown == got


def filled(text, known):
    return re.sub("|".join(NAMES), lambda found: known.get(found[0], found[0]), text)


def test_the_requests_of_the_protocol_get_the_answers_that_it_shows(make_controller):
    talk = re.findall(r"^```http\nPOST (\S+)\n(.*?)\n\n(\d+)\n(.*?)^```$", PROTOCOL, re.M | re.S)
    assert len(talk) == PROTOCOL.count("```http")
    spec = next(json.loads(answer)["job"]["spec"] for *_, answer in talk if '"spec"' in answer)
    controller = make_controller(open=False, token="dbt_admin", agent_token="dbt_enrol")
    of_apps = {name: spec[name] for name in ("build", "activate", "env", "shared", "health_check")}
    controller.set_app(
        name="web-frontend", repo="myorg/web-frontend", hosts=["role=web"], timeout="15m", retries=1, **of_apps,
    )  # fmt: skip
    known = {}
    for number, (path, body, status, answer) in enumerate(talk):
        if number == 1:
            controller.ok("POST", "/v1/deployments", {"app": "web-frontend", "ref": "main"})
        caller = controller.acting(known.get("SECRET", "dbt_enrol"))
        got = caller.call("POST", filled(path, known), json.loads(filled(body, known)))
        assert got[0] == int(status), got
        compare(json.loads(answer), got[1], known)
    assert set(known) == set(NAMES)
    controller.token = "dbt_admin"
    wait_for(lambda: controller.job(known["JOB"])["completed_at"], LIMIT)


def test_the_shell_agent_is_as_long_as_the_protocol_says():
    (lines,) = re.findall(r"a whole agent of (\d+) lines", PROTOCOL)
    assert len((ROOT / "examples/agent.sh").read_text().splitlines()) <= int(lines)


def test_every_block_of_json_in_the_documents_is_json():
    for name in DOCUMENTS:
        for text in blocks((ROOT / name).read_text(), "json"):
            json.loads(text)
