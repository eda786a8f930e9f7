"""What ctl.py keeps between two calls (login), what it tells a shell (completion), what it says of mistyped words, how fast it starts.

Completion is asked of real shells: bash always, zsh and fish where they are, and `make check` fails where they are not.
"""

import io
import json
import os
import pty
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from test_ctl import CTL, LIMIT_S, as_json, problem
from test_ctl import bare_environment as bare_environment
from test_ctl import here as here
from test_ctl import scripted as scripted

import ctl

SESSION = {"name": "alice", "role": "operator", "app": None, "host": None, "expires_at": None}
FILE = Path("config/deploybot/controllers.json")


@pytest.fixture(autouse=True)
def config(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


# ----------------------------------------------------------------------------------------------------------------------
# login, logout


@pytest.fixture
def login(here, monkeypatch):
    def login(url, token, *argv):
        monkeypatch.setattr(sys, "stdin", io.StringIO(token + "\n"))
        return here("login", url, "--token-stdin", *argv)

    return login


@pytest.fixture
def server(scripted):
    """A controller that takes each token, and answers calls with one document for all."""
    return lambda: scripted(as_json(200, {**SESSION, "jobs": [], "next": None}))


def sent(server):
    return server.requests[-1][2].get("authorization")


def test_login_keeps_url_and_token_for_this_user_alone(login, here, server):
    os.umask(os.umask(0))
    one = server()
    result = login(one.url, "dbt_one")
    assert (result.code, result.err) == (0, "")
    assert result.out == f"signed in to {one.url} as alice, operator: kept in {FILE.absolute()}\n"
    assert (one.requests[0][1], sent(one)) == ("/v1/session", "Bearer dbt_one")
    assert json.loads(FILE.read_text()) == {"url": one.url, "tokens": {one.url: "dbt_one"}}
    assert (mode(FILE), mode(FILE.parent)) == (0o600, 0o700)
    assert here("jobs").code == 0 and one.requests[-1][1].startswith("/v1/jobs") and sent(one) == "Bearer dbt_one"
    assert re.search(r"^token +ctl.py login$", here("whoami").out, re.MULTILINE)


def test_a_token_that_the_controller_refuses_is_not_kept(login, here, scripted):
    server = scripted(problem(401, "no"))
    result = login(server.url, "dbt_wrong")
    assert result.code == ctl.REFUSED and "the token from stdin is not valid here, nothing was kept" in result.err
    assert "dbt_" not in result.err and "ctl.py login" not in result.err and "DEPLOYBOT_TOKEN" not in result.err
    assert not FILE.exists()


def test_a_token_goes_to_its_own_controller_alone(login, here, server):
    one, two, other = server(), server(), server()
    login(one.url, "dbt_one"), login(two.url, "dbt_two")
    here("jobs")
    assert sent(two) == "Bearer dbt_two", "the last one is in force"
    here("jobs", "--url", one.url + "/")
    assert sent(one) == "Bearer dbt_one"
    here("jobs", "--url", other.url)
    assert sent(other) is None
    here("jobs", "--url", one.url.replace("127.0.0.1", "localhost"))
    assert sent(one) is None, "another name is another controller"


def test_flag_and_environment_are_stronger(login, here, server, monkeypatch):
    one, two = server(), server()
    login(one.url, "dbt_one")
    monkeypatch.setenv("DEPLOYBOT_URL", two.url)
    here("jobs")
    assert two.requests and sent(two) is None
    monkeypatch.setenv("DEPLOYBOT_TOKEN", "dbt_env")
    assert "DEPLOYBOT_TOKEN is set, and stays stronger\n" in login(one.url, "dbt_one").err
    here("jobs", "--url", one.url)
    assert sent(one) == "Bearer dbt_env"
    FILE.chmod(0o644)
    assert here("jobs").code == 0, "what is not needed is not read"


def test_login_again_takes_the_kept_token_until_it_ends(login, here, scripted, server, tmp_path):
    two = server()
    one = scripted(as_json(200, SESSION), as_json(200, SESSION), problem(401, "ended"), as_json(200, SESSION))
    login(one.url, "dbt_one"), login(two.url, "dbt_two")
    assert here("login", one.url).code == 0 and sent(one) == "Bearer dbt_one"
    assert json.loads(FILE.read_text())["url"] == one.url
    (tmp_path / "token").write_text("dbt_new\n")
    assert "type it on a terminal" in here("login", one.url).err, "it ended: a new one is asked for"
    assert here("login", one.url, "--token-file", tmp_path / "token").code == 0
    assert json.loads(FILE.read_text())["tokens"][one.url] == "dbt_new"


def test_logout_forgets_one_and_with_the_last_the_file(login, here, server):
    one, two = server(), server()
    login(one.url, "dbt_one"), login(two.url, "dbt_two")
    assert here("logout").code == 0
    assert json.loads(FILE.read_text()) == {"url": None, "tokens": {one.url: "dbt_one"}}
    result = here("logout", two.url)
    assert result.code == ctl.WRONG_USE and "dbt_" not in result.err
    assert result.err == f"ctl.py: no token is kept for {two.url}, but for:\n{one.url}\n"
    assert here("logout", one.url).code == 0 and not FILE.exists()
    assert here("logout", one.url) == (ctl.WRONG_USE, "", f"ctl.py: no token is kept for {one.url}\n")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["login", "localhost:9180"], "localhost:9180 is no address: http://localhost:9180?"),
        (["login", "127.0.0.1:9180/"], "127.0.0.1:9180/ is no address: http://127.0.0.1:9180?"),
        (["logout", "deploy.example.com"], "deploy.example.com is no address: https://deploy.example.com?"),
        (["jobs", "--url", "localhost:9180"], "--url localhost:9180 is no address: http://localhost:9180?"),
        (["login", "--url=localhost"], "--url localhost is no address: http://localhost?"),
        (["login", "s3cr3tword"], "that is no controller's address: write it as http://127.0.0.1:8080, without a password"),
        (
            ["login", "me:secret@example.com"],
            "that is no controller's address: write it as http://127.0.0.1:8080, without a password",
        ),
        (["login", "http://localhost:9180/docs"], "that takes no path: http://localhost:9180"),
    ],
)
def test_an_address_without_a_scheme_gets_one_and_what_may_be_a_secret_is_not_repeated(here, argv, said):
    assert here(*argv) == (ctl.WRONG_USE, "", f"ctl.py: {said}\n")


def test_such_an_address_of_the_environment_is_named_as_that(here, monkeypatch):
    monkeypatch.setenv("DEPLOYBOT_URL", "controller:8080")
    for verb in ("jobs", "login"):
        assert here(verb).err == "ctl.py: DEPLOYBOT_URL controller:8080 is no address: https://controller:8080?\n"


@pytest.mark.parametrize("path, modes", [(FILE, 0o640), (FILE, 0o604), (FILE.parent, 0o770), (FILE.parent, 0o757)])
def test_modes_that_let_others_in_are_refused_with_what_to_do(login, here, server, path, modes):
    login(server().url, "dbt_one")
    path.chmod(modes)
    result = here("jobs")
    assert result.code == ctl.WRONG_USE and result.err.count("\n") == 1 and "dbt_" not in result.err
    command = re.search(r"`(chmod [0-9]+ [^`]+)`", result.err)[1]
    assert subprocess.run(command, shell=True, check=True) and here("jobs").code == 0


def test_a_file_of_another_user_is_refused(login, here, server, monkeypatch):
    login(server().url, "dbt_one")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    result = here("jobs")
    assert result.code == ctl.WRONG_USE and "has owner" in result.err and "chown" in result.err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"url": 1, "tokens": {}}', '{"url": null, "tokens": {"x": 1}}', "\udcff"])
def test_a_file_that_login_did_not_write_is_named(login, here, server, text):
    login(server().url, "dbt_one")
    FILE.write_bytes(text.encode(errors="surrogateescape"))
    result = here("jobs")
    assert result.code == ctl.WRONG_USE and f"{FILE.absolute()} cannot be read" in result.err and "remove it" in result.err


def test_without_an_absolute_xdg_config_home_it_is_in_the_home(login, server, monkeypatch):
    for value in ("", "config"):
        monkeypatch.setenv("XDG_CONFIG_HOME", value)
        assert login(server().url, "dbt_one").code == 0
        assert Path("home/.config/deploybot/controllers.json").exists() and not Path("config").exists()


def test_http_to_another_machine_is_warned_of(login):
    assert "http shows the token to everyone on the way" in login("http://192.0.2.1:1", " ").err


def test_on_a_terminal_the_token_is_asked_for_without_echo(scripted):
    server = scripted(as_json(200, SESSION))
    pid, master = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, str(CTL), "login", server.url], dict(os.environ))
    shown = b""
    while b"token for" not in shown:
        shown += os.read(master, 1000)
    os.write(master, b"dbt_typed\n")
    try:
        while data := os.read(master, 1000):
            shown += data
    except OSError:  # EIO: it has gone
        pass
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown
    assert b"dbt_typed" not in shown and sent(server) == "Bearer dbt_typed"


# ----------------------------------------------------------------------------------------------------------------------
# Mistyped words


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["deplyo", "--app", "web"], "no verb deplyo: did you mean deploy?"), (["token", "crate"], "no verb token crate: did you mean create?"),
        (["xyz"], "no verb xyz: there are deploy, rollback, "), (["deploy", "--apq", "web", "--ref", "x"], "no option --apq: did you mean --app?"),
        (["jobs", "--url", "x", "--stat=failed"], "no option --stat: did you mean --status?"), (["--jsn", "jobs"], "no option --jsn: did you mean --json?"),
        (["hosts", "drian", "web-01"], "no hosts action drian: did you mean drain?"), (["deploy", "--app"], "expected one argument"),
        (["hosts", "web-01"], "no hosts action web-01: there are drain, resume, "), (["completion", "bsh"], "no completion shell bsh: did you mean bash or zsh?"),
        (["logs", "shop"], "logs takes no word shop there: did you mean --app shop or --host shop?"),
        (["deployments", "shop"], "takes no word shop there: did you mean --app shop? (see ctl.py deployments --help)"),
        (["apps", "shop"], "apps takes no word shop there (see ctl.py apps --help)"), (["help", "deplyo"], "no verb deplyo: did you mean deploy?"),
        (["apps", "dbt_0123456789abcdefgh"], "takes no word dbt_*** there"), (["hosts", "drain", "web-01", "web-02"], "takes no word web-02 there"),
    ],
)  # fmt: skip
def test_a_mistyped_word_gets_what_it_may_have_been(here, argv, said):
    result = here(*argv)
    assert (result.code, result.out) == (ctl.WRONG_USE, "")
    assert said in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["deploy"], ["token"], ["token", "create"]])
def test_help_is_a_verb_too(here, words):
    asked = here("help", *words)
    assert asked == here(*words, "--help") and (asked.code, asked.err) == (0, "") and asked.out.startswith("usage: ")


def test_a_list_of_nothing_says_what_app_or_host_may_have_been_meant(here, controller, monkeypatch):
    monkeypatch.setenv("DEPLOYBOT_URL", controller.url)
    controller.set_app(name="web-frontend", repo="myorg/web", hosts=["web-01"])
    controller.register("db-01")
    assert here("jobs", "--app", "web-fronted").err.endswith("; did you mean web-frontend?\n")
    assert here("jobs", "--host", "db-1").err.endswith("; did you mean db-01?\n")
    assert "did you mean" not in here("deployments", "--app", "web-frontend").err + here("jobs", "--host", "zzz").err


# ----------------------------------------------------------------------------------------------------------------------
# Completion

HOSTILE = [
    "$(touch x)",
    "`touch x`",
    "'; touch x; '",
    '"$(touch x)"',
    "a\ntouch x",
    "a b",
    "*",
    "--json",
    "~root",
    "a\x1b[2J",
    "a;b",
    "a|b",
    "!!",
]
APPS = [{"name": name, "repo": "myorg/web", "hosts": [], "lock": None} for name in ["web-api", "web-site", *HOSTILE]]
HOSTS = [{"hostname": name, "agent_status": "online $(touch x)"} for name in ["web-01.example.com", *HOSTILE]]
ID = "0199c2f0-1111-7000-8000-000000000001"
ONE = {
    "id": ID,
    "status": "failed",
    "app": "$(touch x)",
    "host": "`touch x`",
    "ref": "%F{red}",
    "created_at": "2026-11-23T13:13:37.123Z",
}


@pytest.fixture
def names(scripted, monkeypatch):
    """A controller with good and hostile names; the environment points to it."""

    def answer(handler):
        path = handler.path.partition("?")[0].rpartition("/")[2]
        lists = {"apps": APPS, "hosts": HOSTS, "jobs": [ONE], "deployments": [{**ONE, "id": ID[:-1] + "2"}]}
        text = json.dumps({path: lists[path], "next": None}).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    server = scripted(answer)
    monkeypatch.setenv("DEPLOYBOT_URL", server.url)
    return server


def script_of(shell):
    done = subprocess.run([sys.executable, CTL, "completion", shell], capture_output=True, text=True, check=True)
    Path("script").write_text(done.stdout)
    return Path("script").absolute()


def in_bash(*words):
    """What bash offers after these words, the last of which is being typed."""
    code = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); "$(complete -p ctl.py | sed "s/.*-F \\([^ ]*\\) .*/\\1/")" ctl.py; '
    code += 'printf "%s\\n" "${COMPREPLY[@]}"'
    return ask(["bash", "--norc", "-c", code, script_of("bash"), "ctl.py", *words])


def in_fish(*words):
    return [
        one.partition("\t")[0]
        for one in ask(["fish", "--no-config", "-c", f"source {script_of('fish')}; complete -C 'ctl.py {' '.join(words)}'"])
    ]


def in_zsh(*words):
    """As typed into a zsh on a terminal of its own, where Tab writes what there is to a file."""
    rc = f"unsetopt beep; autoload -Uz compinit; compinit -u -D; source {script_of('zsh')}\n"
    rc += 'compadd() { print -rl -- $found >$HOME/offered }; PS1="ready>"\n'
    home = Path("zsh")
    home.mkdir(exist_ok=True)
    (home / ".zshrc").write_text(rc)
    (home / "offered").unlink(missing_ok=True)
    pid, master = pty.fork()
    if pid == 0:
        os.execvpe(
            "zsh", ["zsh", "-i"], {**os.environ, "HOME": str(home.absolute()), "ZDOTDIR": str(home.absolute()), "TERM": "dumb"}
        )
    read_until(master, b"ready>")
    os.write(master, f"ctl.py {' '.join(words)}\t".encode())
    os.write(master, b"\x15print -r do''ne; exit\n")
    read_until(master, b"done")
    os.close(master)
    os.waitpid(pid, 0)
    offered = home / "offered"
    return offered.read_text().split("\n")[:-1] if offered.exists() else []


def read_until(master, words):
    text = b""
    while words not in text:
        text += os.read(master, 4096)
    return text


def ask(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return [line for line in done.stdout.split("\n") if line]


SHELLS = [
    pytest.param(ask_it, id=name, marks=pytest.mark.skipif(not shutil.which(name), reason=f"no {name} here"))
    for name, ask_it in (("bash", in_bash), ("zsh", in_zsh), ("fish", in_fish))
]


@pytest.mark.parametrize("ask_it", SHELLS)
def test_a_shell_completes_verbs_options_and_names(names, ask_it):
    assert sorted(ask_it("de")) == ["deliveries", "deploy", "deployments"]
    assert sorted(ask_it("token", "")) == ["create", "list", "revoke"]
    assert sorted(ask_it("retry", "x", "--")) == ["--follow", "--help", "--json", "--url", "--wait"]
    assert sorted(ask_it("deploy", "--app", "web-s")) == ["web-site"]
    assert sorted(ask_it("help", "to")) == ["token"] and sorted(ask_it("help", "token", "")) == ["create", "list", "revoke"]
    assert sorted(ask_it("status", ID[:9])) == [ID, ID[:-1] + "2"]


def test_the_value_behind_an_equals_sign_is_completed(names):
    assert complete("deploy", "--app=web-s") == ["--app=web-site"] and complete("jobs", "--status=f") == ["--status=failed"]
    assert sorted(complete("lock", "--app=")) == ["--app=web-api", "--app=web-site"] and complete("help", "--app=") == []
    if shutil.which("bash"):  # which breaks words there
        assert in_bash("deploy", "--app", "=", "web-s") == in_bash("deploy", "--ref", "=", "x", "--app", "web-s") == ["web-site"]
        assert sorted(in_bash("lock", "--app", "=")) == ["web-api", "web-site"]


def test_a_token_of_one_app_is_offered_its_hosts_and_told_of_them(here, make_controller, monkeypatch):
    controller = make_controller("closed", open=False, token="dbt_admin")
    monkeypatch.setenv("DEPLOYBOT_URL", controller.url)
    monkeypatch.setenv("DEPLOYBOT_TOKEN", "dbt_admin")
    controller.set_app(name="web", repo="myorg/web", hosts=["web-01", "web-02"])
    secret = here("token", "create", "--role", "operator", "--app", "web").out.strip()
    monkeypatch.setenv("DEPLOYBOT_TOKEN", secret)
    assert complete("deploy", "--app", "web", "--host", "w") == ["web-01", "web-02"]
    assert here("jobs", "--host", "wbe-01").err.endswith("; did you mean web-01?\n")
    assert "no host is called wbe-01" in here("logs", "-f", "--host", "wbe-01").err


@pytest.mark.parametrize("ask_it", SHELLS)
def test_a_hostile_name_is_no_code_and_no_option(names, ask_it, tmp_path):
    assert sorted(ask_it("lock", "--app", "")) == ["web-api", "web-site"]
    assert ask_it("hosts", "drain", "") == ["web-01.example.com"]
    assert sorted(ask_it("why", "")) == [ID, ID[:-1] + "2"]
    assert not list(tmp_path.rglob("x"))


@pytest.mark.parametrize("ask_it", SHELLS)
def test_a_script_evaluates_nothing_that_it_is_told(monkeypatch, ask_it, tmp_path):
    """Here ctl.py itself lies; it says nothing with a line break."""
    told = [one for one in HOSTILE if one.isprintable()]
    Path("told").write_text("".join(f"{one}\n" for one in told))
    Path("script").write_text(ctl.COMPLETIONS[ask_it.__name__[3:]].replace("PROGRAM", f"cat {tmp_path}/told ||"))
    monkeypatch.setitem(globals(), "script_of", lambda shell: Path("script").absolute())
    assert sorted(ask_it("lock", "--app", "")) == sorted(told)
    assert not Path("x").exists() and not Path("zsh/x").exists()


def complete(*words):
    done = subprocess.run(
        [sys.executable, CTL, "complete-words", "zsh", *words], capture_output=True, text=True, timeout=LIMIT_S, check=True
    )
    assert done.stderr == ""
    return [line.partition("\t")[0] for line in done.stdout.splitlines()]


def test_every_verb_and_option_of_help_is_offered(here, capsys):
    offered = {word for word, _ in ctl.offers([""])}
    assert offered == {verb.name.split()[0] for verb in ctl.VERBS}
    assert {word for word, _ in ctl.offers(["-"])} == set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", here("--help").out, re.MULTILINE))
    for verb in ctl.VERBS:
        wanted = set(re.findall(r"^  (?:-\w(?: \w+)?, )?(--[a-z-]+)", here(*verb.name.split(), "--help").out, re.MULTILINE))
        assert {word for word, _ in ctl.offers([*verb.name.split(), "-"])} == wanted, verb.name
    files = {one[0] for verb in ctl.VERBS for one in verb.options if one[-1].get("metavar") == "FILE"}
    assert files == set(map("--{}".format, re.findall(r"-- --(\S+) \(.*-F$", ctl.COMPLETIONS["fish"], re.MULTILINE)))


def test_what_an_option_takes_is_offered_and_it_not_again(names):
    assert complete("jobs", "--status", "f") == ["failed"]
    assert "--status" not in complete("jobs", "--status", "failed", "--")
    assert "--host" in complete("deploy", "--host", "web-01", "--")
    assert complete("--url", "http://127.0.0.1:1", "lock", "--app", "") == [], "the controller that is named there"
    assert complete("hosts", "") == ["drain", "resume", "remove", "reset"] and complete("nonsense", "") == []


def test_a_controller_that_does_not_answer_holds_nobody_up(scripted, monkeypatch):
    """Its answer comes after that of the shell, whatever that takes."""
    import threading

    asked, over = threading.Event(), threading.Event()

    def hang(handler):
        asked.set()
        over.wait(LIMIT_S * 2)

    monkeypatch.setenv("DEPLOYBOT_URL", scripted(hang).url)
    assert complete("lock", "--app", "") == [] and asked.is_set()
    over.set()


@pytest.mark.parametrize("answer", [problem(401, "no"), problem(500, "no"), (200, {}, "<html>"), as_json(200, {"apps": 1})])
def test_whatever_goes_wrong_is_silent(scripted, monkeypatch, answer):
    monkeypatch.setenv("DEPLOYBOT_URL", scripted(answer).url)
    assert complete("lock", "--app", "") == []
    FILE.parent.mkdir(parents=True)
    FILE.write_text("{}")
    assert complete("lock", "--app", "") == []


# ----------------------------------------------------------------------------------------------------------------------
# Its start


HEAVY = {
    "ssl",
    "socket",
    "http.client",
    "urllib.request",
    "email",
    "subprocess",
    "threading",
    "logging",
    "typing",
    "dataclasses",
    "datetime",
}


def test_it_starts_without_what_only_a_call_needs():
    """Most of a start is the import of the standard library; the rest is the compiling of the one file."""
    command = [sys.executable, "-I", "-S", "-X", "importtime", str(CTL), "--version"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    imported = {line.rpartition("|")[2].strip() for line in told.splitlines()}
    assert "argparse" in imported and imported & HEAVY == set()


def test_options_of_other_verbs_are_not_made():
    made = [
        len(ctl.make_parser(argv)._subparsers._group_actions[0].choices["deploy"]._actions) for argv in (None, ["deploy"], ["jobs"])
    ]
    assert made[0] == made[1] > 10 and made[2] == 1
