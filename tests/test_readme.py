"""README.md and docs/ say what is so: their tables against the programs, their examples run, the demo as printed."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from conftest import command

import ctl
import deploybot
import notify

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(["README.md", "SECURITY.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))])
PROGRAMS = ("deploybot.py", "agent.py", "ctl.py", "notify.py")
LEAVE_LIMIT_S = 30


def headings(text):
    """(line number, level, title) of each; a # in a block of code is none."""
    fenced = False
    for number, line in enumerate(text.splitlines()):
        fenced ^= line.startswith("```")
        found = re.match(r"(#+) (.+)", line)
        if found and not fenced:
            yield number, len(found[1]), found[2]


def section(name, title):
    """The text of that document under that heading, up to the next one of its level or above."""
    text = (ROOT / name).read_text()
    found = [(number, level) for number, level, heading in headings(text) if heading == title]
    assert len(found) == 1, f"{name} has {len(found)} sections {title!r}"
    ((start, own),) = found
    end = next((number for number, level, _ in headings(text) if number > start and level <= own), None)
    return "\n".join(text.splitlines()[start + 1 : end]) + "\n"


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def table(text, heading):
    """The rows of the first table whose head starts with that cell, each a list of cells."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith(f"| {heading} |"):
            next(lines)
            break
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    assert rows, f"no table {heading!r}"
    return rows


def program(name, *arguments, **options):
    plain = {k: v for k, v in os.environ.items() if not k.startswith("DEPLOYBOT_")}
    return subprocess.run(
        [*command(name), *arguments], env=plain | {"COLUMNS": "200"}, capture_output=True, text=True, check=False, **options
    )


def help_of(name, *verb):
    done = program(name, *verb, "--help")
    assert done.returncode == 0, done.stderr
    return done.stdout


def flags(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)) - {"--help", "--version"}


def variables(text):
    return set(re.findall(r"\bDEPLOYBOT_[A-Z_]*[A-Z]", text))


# ------------------------------------------------------------------------------------------------------------------------
# Tables


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_configuration_table_has_each_flag_and_variable_of_help_and_no_other(name):
    rows = table(section("docs/configuration.md", f"Configuration of {name}"), "flag")
    text, said = "\n".join(" ".join(row[:2]) for row in rows), help_of(name)
    options = said.partition("\nexamples:")[0] if name == "ctl.py" else said
    assert flags(text) == flags(options)
    assert variables(text) == variables(said)


def test_each_verb_of_ctl_is_in_its_table_with_its_flags():
    rows = {
        re.match(r"`(\w+(?: (?:create|list|revoke))?)", row[0])[1]: row[0]
        for row in table(section("docs/ctl.md", "ctl.py"), "call")
    }
    assert {verb.split()[0] for verb in rows} == set(re.findall(r"^    (\w+)  ", help_of("ctl.py"), re.M))
    assert {verb.split()[1] for verb in rows if " " in verb} == set(re.findall(r"^    (\w+)  ", help_of("ctl.py", "token"), re.M))
    for verb, shown in rows.items():
        assert flags(shown) == flags(help_of("ctl.py", *verb.split()).partition("\nexample:")[0]) - {"--url", "--json"}, verb


NAMED = {
    "token create",
    "token list",
    "token revoke",
    "deploy --app",
}  # of these a text speaks without telling anybody to type them


@pytest.mark.parametrize("name", [*DOCUMENTS, "www/dashboard.html"])
def test_what_people_are_told_to_type_is_taken_by_ctl(name, monkeypatch, capsys, tmp_path):
    """With nobody at the other end each of them ends with 3, and not with 2."""
    monkeypatch.setattr(os, "environ", {"DEPLOYBOT_URL": "http://127.0.0.1:1", "DEPLOYBOT_TOKEN": "dbt_x", "HOME": str(tmp_path)})
    text = (ROOT / name).read_text()
    calls = re.findall(r"`(?:\./)?ctl\.py ([a-z]+ [^`|#\n]+)`", text) + re.findall(r'"python3 ctl\.py ([^"]+)"', text)
    for call in [re.sub(r"\b(ID|JOB)\b", "01a2088a", call) for call in calls]:
        if call.strip() not in NAMED and not call.startswith("completion "):
            assert ctl.main(shlex.split(call)) == 3, (call, capsys.readouterr().err)


def test_the_verbs_of_the_controller_are_those_that_help_names():
    rows = {
        re.match(r"`([a-z-]+)", row[0])[1]
        for row in table(section("docs/configuration.md", "Configuration of deploybot.py"), "verb")
    }
    assert rows == set(re.findall(r"^  ([a-z-]+)(?: FILE)?  ", help_of("deploybot.py").partition("Other verbs:")[2], re.M))


@pytest.mark.parametrize(
    "name, document, title",
    [
        ("ctl.py", "docs/ctl.md", "ctl.py"),
        ("agent.py", "docs/install.md", "The agent on a host"),
        ("notify.py", "docs/configuration.md", "Configuration of notify.py"),
    ],
)
def test_the_exit_codes_are_those_that_help_names(name, document, title):
    codes = {row[0] for row in table(section(document, title), "exit code")}
    said = help_of(name)
    listed = re.findall(r"^  (\d+) {2,}", said, re.M) or re.findall(r"(?:codes:|,)\s+(\d+) ", said[said.index("Exit codes") :])
    assert codes == set(listed)


def test_the_api_overview_has_each_call_of_openapi_with_its_role_and_no_other():
    document = json.loads((ROOT / "openapi.json").read_text())
    calls = {
        (f"{method.upper()} {path}", item[method]["x-role"])
        for path, item in document["paths"].items()
        for method in item
        if method != "parameters"
    }
    named = {(re.match(r"`([A-Z]+ [^`?]+)", row[0])[1], row[1]) for row in table(section("docs/api.md", "HTTP API"), "call")}
    assert named == calls


def test_the_roles_are_those_of_ctl():
    (roles,) = set(re.findall(r"--role \{([a-z,]+)\}", help_of("ctl.py", "token", "create")))
    assert {row[0] for row in table(section("docs/api.md", "Who may call"), "role")} == set(roles.split(","))


def test_make_targets_are_those_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M))
    assert {
        row[0].strip("`").removeprefix("make ") for row in table(section("docs/development.md", "Targets"), "target")
    } == targets


@pytest.mark.parametrize("name", DOCUMENTS)
def test_it_names_no_other_target(name):
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M))
    code = "\n".join(re.findall(r"`[^`]+`|^```.*?^```", (ROOT / name).read_text(), re.M | re.S))
    assert set(re.findall(r"\bmake ([a-z-]+)", code)) <= targets


def anchors(text):
    """What GitHub makes of its headings."""
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for _, _, title in headings(text)}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_it_links_to_is_there(name):
    text, folder = (ROOT / name).read_text(), (ROOT / name).parent
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        if "://" in link:
            continue
        target = folder / link if link else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), (link, anchor)


# ------------------------------------------------------------------------------------------------------------------------
# Examples


def test_the_shell_agent_is_the_one_in_examples():
    assert (ROOT / "examples/agent.sh").read_text() in blocks(section("docs/api.md", "Write your own agent"), "sh")


@pytest.mark.parametrize("name", ["apps.yaml", "examples/apps.yaml"])
def test_the_shipped_mappings_are_taken(name):
    done = program("deploybot.py", "check-apps", ROOT / name)
    assert done.returncode == 0, done.stderr


def test_the_mapping_with_every_key_is_taken(tmp_path):
    (text,) = blocks(section("docs/apps.md", "apps.yaml"), "yaml")
    (tmp_path / "apps.yaml").write_text(text)
    done = program("deploybot.py", "check-apps", tmp_path / "apps.yaml")
    assert done.returncode == 0, done.stderr
    (tmp_path / "apps.yaml").write_text(text.replace("hosts:", "host:", 1))
    assert program("deploybot.py", "check-apps", tmp_path / "apps.yaml").returncode != 0


def test_what_is_said_of_notifications_is_so(tmp_path, monkeypatch):
    """Its mapping is taken, its table has each event, its JSON has the fields, its check takes the signature."""
    text = section("docs/notify.md", "Tell GitHub and people")
    (mapping,), (shown,), (code,) = blocks(text, "yaml"), blocks(text, "json"), blocks(text, "python")
    (tmp_path / "apps.yaml").write_text(mapping)
    config = notify.load_config(["--apps", str(tmp_path / "apps.yaml")], {"DEPLOYBOT_NOTIFY_SECRET": "s3cret"})
    (app,) = notify.read_apps(config).values()
    assert [target.format for target in app.targets] == ["slack", "json"] and app.on_github
    assert {row[0].strip("`") for row in table(text, "event")} == set(notify.EVENTS)
    (keys,) = re.findall(r"^\| `notify` \|.*`events`: (.*?) \(", (ROOT / "docs/apps.md").read_text(), re.M)
    assert tuple(re.findall("`([^`]+)`", keys)) == notify.EVENTS
    shown = json.loads(shown)
    made = notify.json_body(shown["event"], shown["deployment"], shown["url"], 0, notify.seconds(shown["at"]))
    assert made == shown
    sent = {}
    monkeypatch.setattr(notify, "ask", lambda url, headers, data: (sent.update(headers, body=data), (200, {}, ""))[1])
    notify.Webhook(tmp_path / "outbox", app.targets[1], config.secret).send({"format": "json", "body": made})
    names = {}
    exec(code, names)
    assert names["is_genuine"](sent["body"], sent["X-DeployBot-Signature-256"], "s3cret")
    assert not names["is_genuine"](sent["body"], sent["X-DeployBot-Signature-256"], "other")


def test_the_table_of_github_says_what_github_is_told():
    rows = table(section("docs/notify.md", "Tell GitHub and people"), "status")
    told = {}
    for names, state, phase in rows:
        for name in re.findall(r"`(\w+)`", names):
            told[name] = (re.findall(r"`(\w+)`", state)[0], re.findall(r"`(\w+)`", phase)[0])
    assert told == notify.STATES


def test_the_lines_that_make_the_credentials_make_files_that_only_root_can_read(tmp_path):
    (script,) = [b for b in blocks(section("docs/install.md", "On a real server"), "sh") if "secrets." in b]
    subprocess.run(["sh", "-euc", script.replace("/etc/deploybot", str(tmp_path))], check=True, capture_output=True)
    made = tmp_path / "credentials"
    assert made.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in made.iterdir()} <= set(deploybot.SECRETS)
    assert {path.stat().st_mode & 0o777 for path in made.iterdir()} == {0o600}
    values = [path.read_text().strip() for path in made.iterdir()]
    assert len(values) == len(set(values)) == 3
    assert all(re.fullmatch(r"dbt_[\w-]{40,}", value) for value in values)


def test_the_lines_about_tokens_do_what_they_say(make_controller):
    controller = make_controller(open=False, token="dbt_admin")
    controller.set_app(name="web-frontend", repo="myorg/web-frontend", hosts=["web-01.example.com"])
    (script,) = [b for b in blocks(section("docs/api.md", "Who may call"), "sh") if "token create" in b]
    environment = os.environ | {"DEPLOYBOT_URL": controller.url, "DEPLOYBOT_TOKEN": "dbt_admin"}
    done = subprocess.run(["sh", "-euc", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^dbt_\S+$", done.stdout, re.M)) == script.count("token create")
    made = {token["name"]: token for token in controller.ok("GET", "/v1/tokens")["tokens"]}
    assert "alice" in made and "ci-web" not in made
    assert "web-03.example.com" in {token["host"] for token in made.values()}


def test_the_evening_with_deployments(make_controller):
    controller = make_controller(open=False, token="dbt_admin")
    controller.token = "dbt_admin"
    controller.set_app(name="web-frontend", repo="myorg/web-frontend", hosts=["web-01", "web-02"], strategy={"type": "rolling"})
    (script,) = blocks(section("docs/apps.md", "Deployments"), "sh")
    environment = os.environ | {"DEPLOYBOT_URL": controller.url, "DEPLOYBOT_TOKEN": "dbt_admin"}
    done = subprocess.run(["sh", "-euc", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the database moves" in done.stdout
    refs = [made["ref"] for made in controller.ok("GET", "/v1/deployments")["deployments"]]
    assert refs == ["hotfix", "main"] and controller.ok("GET", "/v1/apps")["apps"][0]["lock"] is None
    status, answer = controller.call("POST", "/v1/deployments", {"app": "web-frontend", "rollback": True})
    assert status == 409 and answer["detail"].startswith("no host can go back")


def scripts_of_ci():
    """The shell of each example: the block itself, the step of GitHub Actions, the script of GitLab CI."""
    text = section("docs/apps.md", "From any CI")
    actions, gitlab = (yaml.safe_load(block) for block in blocks(text, "yaml"))
    return blocks(text, "sh")[:1] + [actions["jobs"]["deploy"]["steps"][0]["run"], "\n".join(gitlab["deploy"]["script"])]


@pytest.mark.parametrize("number", range(3))
def test_each_ci_deploys_with_the_token_of_one_app(make_controller, number):
    controller = make_controller(open=False, token="dbt_admin")
    controller.set_app(name="web-frontend", repo="myorg/web-frontend", hosts=["web-01.example.com"])
    controller.token = "dbt_admin"
    secret = controller.ok("POST", "/v1/tokens", {"name": "ci", "role": "operator", "app": "web-frontend"})["secret"]
    names = {"COMMIT": "c" * 40, "GITHUB_SHA": "c" * 40, "CI_COMMIT_SHA": "c" * 40}
    names |= {"GITHUB_REF_NAME": "main", "CI_COMMIT_REF_NAME": "main"}
    environment = os.environ | names | {"DEPLOYBOT_URL": controller.url, "DEPLOYBOT_TOKEN": secret}
    command = ["sh", "-euc", scripts_of_ci()[number]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = controller.ok("GET", "/v1/deployments")["deployments"]
    assert (made["kind"], made["ref"], made["branch"], made["created_by"]) == ("hook", "c" * 40, "main", "ci")


@pytest.mark.parametrize("name, language", [("nginx.conf", "nginx"), ("Caddyfile", "text")])
def test_the_proxies_are_those_in_examples(name, language):
    assert (ROOT / "examples" / name).read_text() in blocks(section("docs/install.md", "Behind a proxy"), language)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_block_of_shell_parses(name):
    for block in blocks((ROOT / name).read_text(), "sh"):
        done = subprocess.run(["sh", "-n"], input=block, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (block, done.stderr)


def test_the_files_of_credentials_are_those_that_the_controller_reads():
    rows = table((ROOT / "docs/operations.md").read_text(), "file")
    names = set(re.findall(r"`(\w+)`", " ".join(row[0] for row in rows)))
    assert names == {*deploybot.SECRETS, "tls_cert", "tls_key"}


def test_env_of_make_keeps_blanks_quotes_and_hashes(tmp_path):
    (tmp_path / "Makefile").write_text(
        (ROOT / "Makefile").read_text() + '\nshow:\n\t@$(load_env); printf \'%s|%s\' "$$ONE" "$$TWO"\n'
    )
    (tmp_path / ".env").write_text("ONE='two  words # and $HOME \"quoted\"'\nTWO=plain # a comment\n")
    done = subprocess.run(["make", "-s", "show"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == 'two  words # and $HOME "quoted"|plain'


# ------------------------------------------------------------------------------------------------------------------------
# The demo


def left_over(folder):
    """Processes that were started with that folder in their environment or arguments."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue  # it ended meanwhile
        if os.fsencode(str(folder)) in text and state != "Z":
            found.append((int(entry.name), text[:200]))
    return found


def start_demo(folder):
    return subprocess.Popen(
        [sys.executable, ROOT / "examples/demo.py"],
        env=os.environ | {"TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def folder():
    """A temporary folder with a name that no other process knows."""
    with tempfile.TemporaryDirectory(prefix="demo-test-") as name:
        yield Path(name)


def steady(text):
    """`text` without what differs between two runs: folder, port, ids, signature, times, and when ctl.py said "running"."""
    text = re.sub(r"^ +-- .*\n", "", text, flags=re.M)
    text = re.sub(r"/\S*deploybot-demo-\w+", "FOLDER", text)
    text = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", text)
    text = re.sub(r"sha256=[0-9a-f]+", "sha256=SIGNATURE", text)
    text = re.sub(r"\b\d{8}T\d{9}Z", "TIME", text)
    text = re.sub(r"\b[0-9a-f]{8}-[0-9a-f]{4}(-[0-9a-f-]+)?\b", "ID", text)
    text = re.sub(r"took .*", "took TIME", text)
    return text.rstrip("\n")


def test_the_demo_prints_what_the_page_says_and_leaves_nothing(folder):
    demo = start_demo(folder)
    out, err = demo.communicate(timeout=120)
    assert (demo.returncode, err) == (0, "")
    (shown,) = blocks(section("docs/development.md", "The demo"), "text")
    assert steady(out) == steady(shown.removeprefix("$ make demo\n"))
    assert "\x1b" not in out
    assert list(folder.iterdir()) == []
    assert left_over(folder) == []


@pytest.mark.parametrize(
    "moment, number", list(zip(["DeployBot:", "1.", "2.", "3.", "page index"], [signal.SIGINT, signal.SIGTERM] * 3, strict=False))
)
def test_an_interrupted_demo_leaves_nothing(folder, moment, number):
    demo = start_demo(folder)
    for line in demo.stdout:
        if moment in line:
            break
    else:
        pytest.fail(f"the demo never printed {moment!r}: {demo.stderr.read()}")
    demo.send_signal(number)
    _, err = demo.communicate(timeout=LEAVE_LIMIT_S)
    assert (demo.returncode, err) == (128 + number, "\ndemo: stopped; nothing is left behind\n")
    assert list(folder.iterdir()) == []
    assert left_over(folder) == []


def test_the_search_for_leftovers_finds_one(folder):
    with subprocess.Popen(["sleep", "60"], env={"TMPDIR": str(folder)}) as process:
        deadline = time.monotonic() + LEAVE_LIMIT_S
        while not left_over(folder) and time.monotonic() < deadline:  # until it is exec'ed
            pass
        assert [pid for pid, _ in left_over(folder)] == [process.pid]
        process.kill()
