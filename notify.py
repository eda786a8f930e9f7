#!/usr/bin/env python3
"""notify.py, DeployBot's messenger: reads the controller's stream and tells GitHub and people how deployments go.

The way of a piece of news. The reader takes `event: deployment` off the stream and makes a message of it for each receiver: GitHub,
and the URLs that apps.yaml names under `notify`. The messages are written as files, then memory.json (what is known of
deployments), then the cursor; then the senders are told. Each receiver has one sender, which posts its messages in their order and
removes each one's file when it was taken. No receiver waits for another, and none makes the controller wait: the stream is the outbox.

What a crash costs. Nothing is lost: the cursor goes on last. A message is sent a second time only where the crash came between the
receiver's answer and the removal of its file; a GitHub deployment is made twice only between GitHub's answer and the note of its
number. An event that is read again is known from memory.json and makes no second message.

Threads: main waits for signals; one reader; one sender a receiver. Locks: Desk._lock, under it Receiver._ready; no I/O to receivers
is done under either. Exit codes: 0 done; 1 something is not well (--check), was not sent (--once), or another notify.py works in the
folder; 2 wrong use.
"""

import argparse
import contextlib
import fcntl
import functools
import hashlib
import hmac
import json
import logging
import os
import re
import shutil
import signal
import ssl
import sys
import threading
import time
from collections import deque, namedtuple
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

VERSION = "0.1.0"

STREAM = "/v1/logs/stream?tail=0"  # without a cursor: only what comes
STREAM_SILENCE_S = 45  # the controller sends a comment every 15 s: three missed ones are a dead connection
ANSWER_TIMEOUT_S = 20  # connect, and between two packets of an answer
RETRY_FIRST_S = 1
RETRY_READER_S, RETRY_SENDER_S = 15, 300  # the longest pauses: a controller that is back is soon read, a receiver not pestered
WAIT_MOST_S = 3600  # what a receiver may ask us to wait; GitHub's limit begins anew every hour
UNNAMED_LIMIT_S = 60  # GitHub: "otherwise, wait for at least one minute"
GITHUB_API_VERSION = "2022-11-28"
GITHUB_PACE_S = 1  # GitHub: "wait at least one second between each request"
CURSOR_EVERY_S = 5  # what is read again after a crash are lines of logs, which nobody is told of
LOOK_EVERY_S = 5  # for deployments that are stuck
STOP_LIMIT_S = 10  # for the requests under way; what is left goes out at the next start

SSE_READ_BYTES = 65536
ANSWER_BYTES = 65536
QUEUE_MOST = 1000  # messages that wait for one receiver
KNOWN_MOST = 500  # deployments that are remembered, and GitHub's numbers of them
DESCRIPTION_MOST = 140  # characters: GitHub refuses more
SAID_MOST = 300  # characters of others' words in a message or a log line

DONE, NOT_WELL, WRONG_USE = range(3)

EVENTS = ("failed", "recovered", "success", "stuck")
BAD = ("failed", "partial", "rolled_back")
ENDED = ("success", *BAD, "cancelled")
UNHURRIED = ("lock", "pause")  # holds that somebody asked for: such a deployment is not stuck

log = logging.getLogger("notify")


# ----------------------------------------------------------------------------------------------------------------------
# Errors
# Owns: what can go wrong with a setting, a stream, a message. Ignores: what is done about it.


class ConfigError(Exception):
    def __init__(self, problems):
        super().__init__("; ".join(problems))
        self.problems = problems


class Later(Exception):
    """Not now: to be tried again, after `wait` seconds or more."""

    def __init__(self, why, wait=None):
        super().__init__(why)
        self.wait = min(wait or 0, WAIT_MOST_S)


class Refused(Exception):
    """Not ever: the same request would get the same answer."""


# ----------------------------------------------------------------------------------------------------------------------
# Text and files
# Owns: others' words made harmless, times, files that are whole or not there. Ignores: what they hold.

SEQUENCES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-Z\\^-~])")
BREAKS = re.compile(r"[\r\n\v\f\x85\u2028\u2029]+")
CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
UNITS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


def clean(text):
    """`text` on one line, without terminal sequences (ECMA-48), controls and marks that turn direction; tabs stay."""
    return CONTROLS.sub("", BREAKS.sub(" ", SEQUENCES.sub("", str(text))))


def brief(text, most=SAID_MOST):
    text = clean(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def seconds(stamp):
    """RFC 3339 to seconds since the epoch; None stays None."""
    from datetime import datetime

    return None if stamp is None else datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def span(length, units=2):
    """Seconds in their largest units: 3d4h, 2m5s, 0s."""
    left, words = max(0, int(length)), []
    for unit, size in UNITS:
        if left >= size or words:
            words.append(f"{left // size}{unit}")
            left %= size
    shown = [word for word in words[:units] if not word.startswith("0")]
    return "".join(shown) or "0s"


def sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path, text, sync=True):
    """Replaces a file whole, readable for its owner alone; with `sync` it is on the disk when this returns."""
    scratch = path.with_name(path.name + ".new")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    os.replace(scratch, path)
    if sync:
        sync_folder(path.parent)


def read_whole(path, otherwise):
    """The text of a file that write_whole() wrote; `otherwise` where there is none yet."""
    return path.read_text(encoding="utf-8") if path.exists() else otherwise


def take_lock(path):
    """A file lock that ends with this process; None while another holds it. Scripts do not inherit it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


# ----------------------------------------------------------------------------------------------------------------------
# Config
# Owns: flags over environment over defaults, every problem at once. Ignores: whether the controller is there.

Config = namedtuple("Config", "url apps state api_url public_url stuck_after log_level check once token github_token secret")

# flag, variable, default, help. No secret is ever a flag: others on this machine can read command lines.
OPTIONS = (
    ("--url", "DEPLOYBOT_URL", "http://localhost:8080", "the controller (http://localhost:8080)"),
    ("--apps", "DEPLOYBOT_APPS", "./apps.yaml", "the controller's mapping, for what stands under notify (./apps.yaml)"),
    ("--state", "STATE_DIRECTORY", "./notify-state", "the cursor, and what is not sent yet (./notify-state)"),
    ("--api-url", "DEPLOYBOT_GITHUB_API_URL", "https://api.github.com", "GitHub's API, https://HOST/api/v3 for your own"),
    ("--public-url", "DEPLOYBOT_PUBLIC_URL", "", "the controller as people reach it, for links (--url, where that is no loopback)"),
    ("--stuck-after", "DEPLOYBOT_STUCK_AFTER", "30m", "a deployment that takes longer is stuck (30m)"),
    ("--log-level", "DEPLOYBOT_LOG_LEVEL", "INFO", "DEBUG, INFO, WARNING or ERROR (INFO)"),
)
SECRETS = (  # field, variable, the variable that names a file
    ("token", "DEPLOYBOT_TOKEN", "DEPLOYBOT_TOKEN_FILE"),
    ("github_token", "GITHUB_TOKEN", "DEPLOYBOT_GITHUB_TOKEN_FILE"),
    ("secret", "DEPLOYBOT_NOTIFY_SECRET", "DEPLOYBOT_NOTIFY_SECRET_FILE"),
)
SECRETS_HELP = """Secrets come from the environment, from a file, or as a credential of systemd (in lower case, without _FILE):
  DEPLOYBOT_TOKEN, DEPLOYBOT_TOKEN_FILE                  a viewer's token of the controller
  GITHUB_TOKEN, DEPLOYBOT_GITHUB_TOKEN_FILE              may write commit statuses and deployments; none: GitHub is told nothing
  DEPLOYBOT_NOTIFY_SECRET, DEPLOYBOT_NOTIFY_SECRET_FILE  signs what is sent as json
Exit codes: 0 done, 1 with --check: something is not well, with --once: something was not sent, or another notify.py works in the
folder, 2 wrong use."""
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
CALLED = "deploybot-notify" if os.path.basename(sys.argv[0]) == "deploybot-notify" else "notify.py"  # the first: installed


def build_parser():
    parser = argparse.ArgumentParser(
        prog=CALLED,
        description="Tells GitHub and people how DeployBot's deployments go. SIGHUP reads apps.yaml again, SIGTERM ends it.",
        epilog=SECRETS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for flag, variable, _, text in OPTIONS:
        parser.add_argument(flag, metavar="VALUE", help=f"{text} [{variable}]")
    parser.add_argument("--check", action="store_true", help="look at apps.yaml, the tokens and the controller, and end")
    parser.add_argument("--once", action="store_true", help="read and send what is due, and end")
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    return parser


def is_web_url(text):
    """http(s), a host, no user, no fragment, nothing that a request line could not hold."""
    try:
        port = urlsplit(text).port
    except ValueError:
        return False
    return port != 0 and bool(re.fullmatch(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]+)?(/[!-\"$-~]*)?", text))


def is_loopback(url):
    host = urlsplit(url).hostname
    return host in ("localhost", "::1") or bool(re.fullmatch(r"127(\.\d{1,3}){3}", host))


def read_secret(variable, file_variable, env, problems):
    value, path = env.get(variable), env.get(file_variable)
    if value and path:
        problems.append(f"{variable} and {file_variable} are both set: keep one")
    given = os.path.join(env.get("CREDENTIALS_DIRECTORY") or "/nonexistent", file_variable.lower().removesuffix("_file"))
    path = path or (given if not value and os.path.isfile(given) else None)
    try:
        value = Path(path).read_text(encoding="ascii").strip() if path else value
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{file_variable}: {clean(path)} cannot be read: {getattr(error, 'strerror', None) or 'it is not ASCII'}")
    if value is not None and (path or value) and not re.fullmatch(r"[!-~]+", value):
        problems.append(f"{file_variable if path else variable}: must be visible ASCII characters without blanks")
    return value or None


def length_of(text, problems):
    found = re.fullmatch(r"([0-9]{1,6})([smhd]?)", text)
    length = int(found[1]) * dict(UNITS)[found[2] or "s"] if found else 0
    if not 1 <= length <= 7 * 86400:
        problems.append("--stuck-after: must be from 1s to 7d: 90s, 30m, 2h, 1d")
    return length


def load_config(argv, env):
    """Raises ConfigError with every problem."""
    args = build_parser().parse_args(argv)
    given = [(flag, getattr(args, flag[2:].replace("-", "_")), variable, default) for flag, variable, default, _ in OPTIONS]
    values = {flag: env.get(variable) or default if value is None else value for flag, value, variable, default in given}
    problems = []
    for flag in ("--url", "--api-url", "--public-url"):
        values[flag] = values[flag].rstrip("/")
        if (values[flag] or flag != "--public-url") and ("?" in values[flag] or not is_web_url(values[flag])):
            problems.append(f"{flag}: must be http(s)://HOST[:PORT], without user, query and fragment")
            values[flag] = "http://localhost"  # to go on looking for problems
    if urlsplit(values["--url"]).path:
        problems.append("--url: takes no path")
    level = values["--log-level"].upper()
    if level not in LOG_LEVELS:
        problems.append(f"--log-level: must be one of {', '.join(LOG_LEVELS)}")
    stuck_after = length_of(values["--stuck-after"], problems)
    secrets = [read_secret(*names, env, problems) for _, *names in SECRETS]
    if problems:
        raise ConfigError(problems)
    public_url = values["--public-url"] or ("" if is_loopback(values["--url"]) else values["--url"])
    paths = [Path(values[flag]).expanduser().absolute() for flag in ("--apps", "--state")]
    return Config(values["--url"], *paths, values["--api-url"], public_url, stuck_after, level, args.check, args.once, *secrets)


# ----------------------------------------------------------------------------------------------------------------------
# apps.yaml
# Owns: who is told of which app. Ignores: all other keys, which the controller checks (deploybot.py check-apps).

App = namedtuple("App", "name repo on_github targets")
Target = namedtuple("Target", "key label url events format")  # key names its folder, label stands in logs: neither tells the URL

REPO = re.compile(r"(?!\.\.?/)[\w.-]+/(?!\.\.?$)[\w.-]+", re.ASCII)  # no part of a path that leads elsewhere
COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def parse_document(text):
    """JSON or YAML. Raises ConfigError, which shows no piece of the text: it holds secrets."""
    try:
        if text.lstrip()[:1] == "{":
            with contextlib.suppress(ValueError):  # YAML's own flow style begins like JSON
                return json.loads(text)
        import yaml
    except ImportError:
        raise ConfigError(["reading YAML needs the package PyYAML (apt install python3-yaml); JSON works without"]) from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        raise ConfigError([f"line {mark.line + 1 if mark else 1}: {brief(problem or 'is no YAML')}"]) from None
    except (ValueError, RecursionError):
        raise ConfigError(["is no YAML that can be read"]) from None


def clone_host(url):
    """The host of a URL or of git's own host:path; "" where it names none."""
    found = re.match(r"(?:[A-Za-z][A-Za-z0-9+.-]*://)?(?:[^@/\s]*@)?([^:/@\s]+)[:/]", url)
    return found[1].lower().removeprefix("ssh.") if found else ""


def read_target(entry, where, config, problems):
    """A Target, or None with what is wrong in `problems`. No problem repeats the URL."""
    if not isinstance(entry, dict):
        problems.append(f"{where}: must be a mapping with url, events and format")
        return None
    wrong = [f"unknown key {brief(key, 40)!r}" for key in entry if key not in ("url", "events", "format")]
    url, events, form = entry.get("url"), entry.get("events", ["failed", "recovered"]), entry.get("format", "json")
    if not isinstance(url, str) or not is_web_url(url):
        wrong.append("url: must be http(s)://HOST/..., without user and fragment")
    if not isinstance(events, list) or not events or not all(one in EVENTS for one in events):
        wrong.append(f"events: must be a list of {', '.join(EVENTS)}")
    if form not in ("json", "slack"):
        wrong.append("format: must be json or slack")
    if form == "json" and not config.secret:
        wrong.append("format json is signed: set DEPLOYBOT_NOTIFY_SECRET or DEPLOYBOT_NOTIFY_SECRET_FILE")
    problems += [f"{where}: {text}" for text in wrong]
    if wrong:
        return None
    key = hashlib.sha256(url.encode()).hexdigest()[:32]
    return Target(key, f"{urlsplit(url).hostname} ({key[:6]})", url, tuple(events), form)


def read_app(entry, where, defaults, config, problems):
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("name", "repo")):
        problems.append(f"{where}: must be a mapping with name and repo")
        return None
    notify = entry.get("notify", defaults.get("notify")) or []
    if not isinstance(notify, list):
        problems.append(f"{where}.notify: must be a list")
        notify = []
    targets = [read_target(one, f"{where}.notify[{number}]", config, problems) for number, one in enumerate(notify)]
    clone_url = entry.get("clone_url", defaults.get("clone_url")) or f"https://github.com/{entry['repo']}.git"
    host = urlsplit(config.api_url).hostname.removeprefix("api.")
    on_github = bool(REPO.fullmatch(entry["repo"])) and isinstance(clone_url, str) and clone_host(clone_url) == host
    return App(entry["name"], entry["repo"], on_github, targets)


def read_apps(config):
    """{name: App}. Raises ConfigError with every problem."""
    try:
        document = parse_document(config.apps.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{config.apps}: {getattr(error, 'strerror', None) or 'is not UTF-8'}"]) from None
    except ConfigError as error:
        raise ConfigError([f"{config.apps}: {error}"]) from None
    document = {} if document is None else document
    entries, defaults = (document.get("apps") or [], document.get("defaults") or {}) if isinstance(document, dict) else (None, {})
    if not isinstance(entries, list) or not isinstance(defaults, dict):
        raise ConfigError([f"{config.apps}: must be a mapping with the list apps"])
    problems, apps = [], []
    for number, entry in enumerate(entries):
        name = f" ({brief(entry.get('name'), 64)})" if isinstance(entry, dict) else ""
        apps.append(read_app(entry, f"{config.apps}: apps[{number}]{name}", defaults, config, problems))
    if problems:
        raise ConfigError(problems)
    return {app.name: app for app in apps}


# ----------------------------------------------------------------------------------------------------------------------
# Messages
# Owns: what a deployment (a dict, as docs/design.md has it) is to GitHub, to Slack, to a program. Ignores: who sends it.

# status: the state of the commit, the state of GitHub's deployment
# https://docs.github.com/rest/commits/statuses, https://docs.github.com/rest/deployments/statuses
STATES = {
    "pending": ("pending", "queued"),
    "running": ("pending", "in_progress"),
    "success": ("success", "success"),
    **dict.fromkeys(BAD, ("failure", "failure")),
    "cancelled": ("error", "error"),
}
STATUS_WORDS = {
    "pending": "waits for its hosts",
    "running": "is being deployed",
    "success": "deployed",
    "partial": "deployed in part",
    "failed": "failed",
    "rolled_back": "failed, all hosts went back",
    "cancelled": "cancelled",
}
HOLD_WORDS = {"lock": "waits: the app is locked", "pause": "the canary is being watched"}
EVENT_WORDS = {"recovered": "works again", "success": "deployed", "stuck": "is stuck"}


def short_ref(ref):
    return ref[:8] if COMMIT.fullmatch(ref or "") else ref


def story(deployment):
    """failed: 1 of 3 hosts succeeded, 2 failed: the canary failed"""
    progress = deployment.get("progress") or {}
    known = deployment.get("hosts") and deployment["status"] != "pending"
    counts = f"{progress.get('success', 0)} of {deployment['hosts']} hosts succeeded" if known else ""
    counts += f", {progress['failed']} failed" if counts and progress.get("failed") else ""
    words = HOLD_WORDS.get(deployment.get("hold")) or STATUS_WORDS[deployment["status"]]
    return ": ".join(filter(None, (words, counts, deployment.get("reason"))))


def link_of(deployment, public_url):
    return f"{public_url}/#deployment={deployment['id']}" if public_url else None


def github_messages(app, deployment, link):
    """The state of the commit, then that of GitHub's own deployment, which is made where there is none yet."""
    if not COMMIT.fullmatch(deployment.get("ref") or ""):  # a branch may have moved on: it would tell of the wrong commit
        return []
    state, phase = STATES[deployment["status"]]
    phase = "inactive" if deployment.get("superseded_by") else phase
    text = re.sub(r"[^\0-\uffff]", "?", brief(story(deployment), DESCRIPTION_MOST))  # GitHub has refused what is beyond
    status = {"state": state, "context": f"deploybot/{app.name}", "description": text, **({"target_url": link} if link else {})}
    create = {"ref": deployment["ref"], "environment": app.name, "auto_merge": False, "required_contexts": []}
    create |= {"description": f"DeployBot: {app.name}", "payload": {"deploybot_id": deployment["id"]}}
    body = {"state": phase, "description": text, **({"log_url": link} if link else {})}
    path = f"/repos/{app.repo}"
    return [
        {"path": f"{path}/statuses/{deployment['ref']}", "body": status},
        {"path": f"{path}/deployments", "body": body, "of": deployment["id"], "create": create},
    ]


def slack_text(text):
    """https://docs.slack.dev/messaging/formatting-message-text: with these three escaped nothing is a link or a mention."""
    return brief(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def slack_body(event, deployment, link, since, now):
    """An incoming webhook's: `text` for notifications, the block for the screen; verbatim: URLs in it stay text, too."""
    stuck = f" ({deployment['status']} for {span(now - since, 1)})" if event == "stuck" else ""
    headline = f"{deployment['app']} {EVENT_WORDS.get(event) or STATUS_WORDS[deployment['status']]}{stuck}"
    of, by = deployment.get("branch"), deployment.get("created_by")
    what = f"{short_ref(deployment.get('ref')) or 'rollback'}{f' of {of}' if of else ''}{f' by {by}' if by else ''}"
    rest = f"{slack_text(what)}\n{slack_text(story(deployment))}" + (f"\n<{slack_text(link)}|details>" if link else "")
    block = {"type": "mrkdwn", "text": f"*{slack_text(headline)}*\n{rest}", "verbatim": True}
    return {"text": f"{slack_text(headline)}: {slack_text(what)}", "blocks": [{"type": "section", "text": block}]}


def json_body(event, deployment, link, since, now):
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    return {"id": f"{deployment['id']}-{event}", "event": event, "at": at, "url": link, "deployment": deployment}


BODIES = {"json": json_body, "slack": slack_body}


# ----------------------------------------------------------------------------------------------------------------------
# HTTP
# Owns: one request, and what its answer means for the next one. Ignores: what is said. Follows no redirect, ever.


def reason_of(error):
    """Why a connection failed, in a few words."""
    cause = getattr(error, "reason", error)
    if isinstance(cause, TimeoutError):
        return "no answer in time"
    words = [getattr(cause, name, None) for name in ("verify_message", "strerror")]
    return clean(next(filter(None, words), None) or str(cause) or type(cause).__name__)


def retry_after(headers):
    """The seconds of Retry-After; None where it says none."""
    text = headers.get("Retry-After", "")
    return int(text) if re.fullmatch(r"[0-9]{1,6}", text) else None


@functools.cache
def tls_context():
    """Made once: to read all that the system trusts takes as long as the rest of a call."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def open_url(url, headers, data=None, timeout=ANSWER_TIMEOUT_S):
    """An open answer, whatever its status. The opener has no handler for redirects: they would carry secrets elsewhere."""
    opener, is_local = OpenerDirector(), is_loopback(url)
    for handler in (HTTPHandler(), ProxyHandler({} if is_local else None)):
        opener.add_handler(handler)
    if not is_local or url.startswith("https:"):  # a proxy may speak TLS, too
        opener.add_handler(HTTPSHandler(context=tls_context()))
    try:
        return opener.open(Request(url, data, {"User-Agent": f"deploybot-notify/{VERSION}", **headers}), timeout=timeout)
    except (OSError, HTTPException, UnicodeError) as error:  # UnicodeError: a host that is no name for IDNA
        raise Later(reason_of(error)) from None


def ask(url, headers, data=None):
    """(status, headers, text). Raises Later, but not for a good answer that breaks off: what was sent has been taken."""
    with open_url(url, headers, data) as response:
        try:
            return response.status, response.headers, response.read(ANSWER_BYTES).decode("utf-8", "replace")
        except (OSError, HTTPException) as error:
            if response.status < 300:
                return response.status, response.headers, ""
            raise Later(reason_of(error)) from None


def judge(status, headers, said, wait=None):
    """Nothing for a 2xx. Raises Later or Refused."""
    why = f"{status} {said}".strip()
    if status in (408, 425, 429) or status >= 500 or wait:
        raise Later(why, wait or retry_after(headers))
    if status >= 300:
        raise Refused(f"{why} (redirects are not followed)" if status < 400 else why)


def github_wait(status, headers, text, now):
    """Seconds that GitHub's limits ask for, or None: https://docs.github.com/rest/using-the-rest-api/rate-limits-for-the-rest-api"""
    if status not in (403, 429):
        return None
    reset = headers.get("X-RateLimit-Reset", "")
    if headers.get("X-RateLimit-Remaining") == "0" and re.fullmatch(r"[0-9]{1,12}", reset):
        return max(1, retry_after(headers) or int(reset) - now)
    return retry_after(headers) or (UNNAMED_LIMIT_S if status == 429 or "rate limit" in text.lower() else None)


# ----------------------------------------------------------------------------------------------------------------------
# Receivers
# Owns: a queue on disk for each place that is told, and the thread that empties it in order. Ignores: where messages come from.


class Receiver:
    """`folder` has a file a message, named by its number; who subclasses it sends one: send(message) raises Later or Refused."""

    def __init__(self, folder, label):
        self.folder, self.label = folder, label
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._ready = threading.Condition()  # guards the four below; the sender waits on it, add() and end() wake it
        self._queue = deque(sorted(int(path.stem) for path in folder.glob("[0-9]*.json")))  # numbers, oldest first
        self._busy, self._ended = False, False  # busy: the first one is on its way
        self._dropped = 0  # since the last one that was taken
        self._trouble, self._failures = None, 0  # the sender's alone
        self.thread = None

    def path(self, number):
        return self.folder / f"{number:012}.json"

    def write(self, number, message):
        write_whole(self.path(number), json.dumps(message))

    def add(self, number):
        """The sender may have it. Where too many wait the oldest goes, but for one that is just being sent."""
        with self._ready:
            self._queue.append(number)
            gone = None
            if len(self._queue) > QUEUE_MOST:
                gone = self._queue[self._busy]
                del self._queue[self._busy]
                self._dropped += 1
                if self._dropped == 1:
                    log.error("%s: %d messages wait, from here on the oldest are dropped", self.label, QUEUE_MOST)
            self._ready.notify()
        if gone is not None:
            self.path(gone).unlink(missing_ok=True)

    def waiting(self):
        with self._ready:
            return len(self._queue)

    def start(self, once=False):
        self.thread = threading.Thread(target=self.run, args=(once,), name=self.label, daemon=True)
        self.thread.start()

    def end(self):
        with self._ready:
            self._ended = True
            self._ready.notify_all()

    def run(self, once=False):
        """Sends until end(); with `once` until nothing is left, or a message has to wait."""
        while (number := self._first(once)) is not None:
            pause = self._attempt(number)
            if pause is None:
                self._remove(number)
            elif once:
                return
            else:
                self._rest(pause)

    def _first(self, once):
        with self._ready:
            while not (self._queue or self._ended or once):
                self._ready.wait()
            self._busy = bool(self._queue) and not self._ended
            return self._queue[0] if self._busy else None

    def _attempt(self, number):
        """None when done with it, else the seconds to wait."""
        try:
            self.send(json.loads(self.path(number).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):
            log.error("%s: message %d was removed or damaged, it is dropped", self.label, number)
        except (Later, OSError) as error:  # OSError: of the disk
            return self._put_off(reason_of(error), getattr(error, "wait", 0))
        except Refused as refused:
            log.error("%s refuses message %d, it is dropped: %s", self.label, number, brief(refused))
        else:
            self._taken()
        self._trouble, self._failures = None, 0
        return None

    def _put_off(self, why, wait):
        pause = min(RETRY_SENDER_S, RETRY_FIRST_S * 2 ** min(self._failures, 16)) * (0.5 + os.urandom(1)[0] / 510)
        self._failures += 1
        if why != self._trouble:
            self._trouble = why
            log.warning("%s: %s; %d messages wait", self.label, brief(why), self.waiting())
        return max(wait, pause)

    def _taken(self):
        with self._ready:
            dropped, self._dropped = self._dropped, 0
        if self._trouble or dropped:
            log.info("%s takes messages again%s", self.label, f", {dropped} were dropped" if dropped else "")

    def _remove(self, number):
        """A crash ahead of this sends the message again. While it was busy nobody else took it from the queue."""
        with self._ready:
            self._queue.popleft()
        with contextlib.suppress(OSError):  # the folder is gone where apps.yaml no longer names this receiver
            self.path(number).unlink(missing_ok=True)
            sync_folder(self.folder)

    def _rest(self, pause, busy=False):
        with self._ready:
            self._busy = busy
            self._ready.wait_for(lambda: self._ended, pause)


class Webhook(Receiver):
    def __init__(self, folder, target, secret):
        super().__init__(folder, target.label)
        self.url, self.secret = target.url, (secret or "").encode()

    def send(self, message):
        data, headers = json.dumps(message["body"]).encode(), {"Content-Type": "application/json"}
        if message["format"] == "json":
            headers["X-DeployBot-Signature-256"] = "sha256=" + hmac.new(self.secret, data, hashlib.sha256).hexdigest()
        status, headers, text = ask(self.url, headers, data)
        judge(status, headers, text if re.fullmatch(r"[a-z_]{1,40}", text) else "")  # Slack's one word; others may echo the URL


class GitHub(Receiver):
    """Its folder also has `ids`: GitHub's number of each of the newest deployments."""

    def __init__(self, folder, api_url, token):
        super().__init__(folder, "GitHub")
        self.api_url, self.token, self.last = api_url, token, -GITHUB_PACE_S
        self.ids = json.loads(read_whole(folder / "ids", "{}"))  # the sender's alone

    def send(self, message):
        path = message["path"]
        if "create" in message:
            if message["of"] not in self.ids:
                self._create(path, message)
            path += f"/{self.ids[message['of']]}/statuses"
        self._post(path, message["body"])

    def _create(self, path, message):
        """A crash ahead of the note makes a second one."""
        answer = self._post(path, message["create"])
        number = answer.get("id")
        if type(number) is not int:
            raise Refused("GitHub made no deployment") if answer else Later("GitHub's answer broke off")
        self.ids = dict([*self.ids.items(), (message["of"], number)][-KNOWN_MOST:])
        write_whole(self.folder / "ids", json.dumps(self.ids))

    def _post(self, path, body):
        self._rest(max(0, self.last + GITHUB_PACE_S - time.monotonic()), busy=True)
        headers = {"Accept": "application/vnd.github+json", "X-GitHub-Api-Version": GITHUB_API_VERSION}
        headers |= {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        status, headers, text = ask(self.api_url + path, headers, json.dumps(body).encode())
        self.last = time.monotonic()
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        answer = answer if isinstance(answer, dict) else {}
        said = f"{answer.get('message') or ''} ({path})"
        judge(status, headers, said, github_wait(status, headers, text, time.time()))
        return answer


# ----------------------------------------------------------------------------------------------------------------------
# Desk
# Owns: what is known of deployments, which messages follow from what is new, and that both are on disk together. Ignores: the stream.


class Desk:
    """`state` has cursor, memory.json, and a folder a receiver in outbox. `now` is passed in.

    memory: `next`, the number of the next message; `known`, {id: {app, status, hold, since, told}} of the newest deployments; `failed`,
    the apps whose last deployment that counts failed. A message of the number `next` or above was never announced: it belongs to an
    event that the cursor has not passed.
    """

    def __init__(self, config, apps, now=time.time):
        self.config, self.now = config, now
        self.outbox = config.state / "outbox"
        self._lock = threading.Lock()  # guards apps, receivers, memory: events of the reader against main's SIGHUP
        self.apps, self.receivers, self.running, self.saved_at = {}, {}, False, -CURSOR_EVERY_S
        try:
            self.memory = json.loads(read_whole(config.state / "memory.json", '{"next": 1, "known": {}, "failed": []}'))
            self.cursor = self.saved = read_whole(config.state / "cursor", "")
            for path in self.outbox.glob("*/[0-9]*"):
                if path.suffix == ".new" or int(path.stem) >= self.memory["next"]:
                    path.unlink()
            self.adopt(apps)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError([f"--state: {config.state} cannot be used: {reason_of(error)}"]) from None

    # -- receivers -----------------------------------------------------------------------------------------------------

    def adopt(self, apps):
        """The mapping in force from now on. What waits for a receiver that it does not name goes. Raises OSError, and then nothing is changed."""
        targets = {target.key: target for app in apps.values() for target in app.targets}
        wanted = [*targets, *(["github"] if self.config.github_token else [])]
        with self._lock:
            before = self.receivers
            self.receivers = {key: before.get(key) or self._receiver(key, targets) for key in wanted}
            self.apps = apps
            for key, receiver in before.items():
                if key not in self.receivers:
                    receiver.end()
            for folder in self.outbox.glob("*"):
                if folder.name not in self.receivers:
                    log.warning("a receiver is gone, %d messages for it are dropped", len(list(folder.glob("[0-9]*.json"))))
                    shutil.rmtree(folder, ignore_errors=True)
            for key, receiver in self.receivers.items():
                if self.running and key not in before:
                    receiver.start()

    def _receiver(self, key, targets):
        if key == "github":
            return GitHub(self.outbox / key, self.config.api_url, self.config.github_token)
        return Webhook(self.outbox / key, targets[key], self.config.secret)

    def start(self, once=False):
        with self._lock:
            self.running = not once
            receivers = list(self.receivers.values())
        for receiver in receivers:
            receiver.start(once)
        return receivers

    def end(self):
        """Requests under way may come to their end."""
        deadline = time.monotonic() + STOP_LIMIT_S
        with self._lock:
            receivers = list(self.receivers.values())
        for receiver in receivers:
            receiver.end()
        for receiver in receivers:
            receiver.thread.join(max(0, deadline - time.monotonic()))

    # -- news ----------------------------------------------------------------------------------------------------------

    def take(self, deployment, stuck=False):
        """Stores and announces what follows from a deployment as it is now; `stuck`: that it takes too long, where nothing else is new.

        Raises OSError where it cannot be stored, and then nothing of it counts.
        """
        name, status, hold = deployment["id"], deployment["status"], deployment.get("hold")
        if status not in STATES:
            raise ValueError(f"a status {status}")
        with self._lock:
            app, before = self.apps.get(deployment["app"]), self.memory["known"].get(name)
            if app is None or app.repo.lower() != deployment["repo"].lower():
                return
            is_new = before is None or (before["status"] not in ENDED and (before["status"], before["hold"]) != (status, hold))
            if not is_new and not (stuck and before["status"] == status and not before["told"]):
                return  # told already: an event that was read again, or is older than what was asked for
            since = before["since"] if before and not is_new else self._since(deployment, before)
            events = self._events(deployment) if is_new else ["stuck"]
            messages = list(self._messages(app, deployment, events, since, is_new))
            told = not is_new or bool(before and before["told"])
            entry = {"app": app.name, "status": status, "hold": hold, "since": since, "told": told}
            self._store(messages, name, entry)

    def _since(self, deployment, before):
        """When its status began, in seconds; what it was held for on purpose does not count."""
        if before and before["hold"] in UNHURRIED:
            return self.now()
        stamp = seconds(deployment.get("started_at") or deployment.get("created_at")) or self.now()
        return max(stamp, before["since"]) if before and before["status"] == deployment["status"] else stamp

    def _events(self, deployment):
        """What is to be told, the word that says most first. An end is new only once."""
        status = deployment["status"]
        if status == "success":
            return ["recovered", "success"] if deployment["app"] in self.memory["failed"] else ["success"]
        return ["failed"] if status in BAD else []

    def _messages(self, app, deployment, events, since, is_new):
        """(receiver, message) of all that are to be told."""
        link = link_of(deployment, self.config.public_url)
        if is_new and app.on_github and "github" in self.receivers:
            for message in github_messages(app, deployment, link):
                yield self.receivers["github"], message
        for target in app.targets:
            event = next((event for event in events if event in target.events), None)
            if event:
                body = BODIES[target.format](event, deployment, link, since, self.now())
                yield self.receivers[target.key], {"format": target.format, "body": body}

    def _store(self, messages, name, entry):
        """Messages, then the memory that counts them in; then they are announced."""
        first = self.memory["next"]
        failed = set(self.memory["failed"]) - ({entry["app"]} if entry["status"] == "success" else set())
        failed |= {entry["app"]} if entry["status"] in BAD else set()
        others = [(other, kept) for other, kept in self.memory["known"].items() if other != name]
        known = dict([*others, (name, entry)][-KNOWN_MOST:])
        memory = {"next": first + len(messages), "known": known, "failed": sorted(failed)}
        try:
            for number, (receiver, message) in enumerate(messages, first):
                receiver.write(number, message)
            write_whole(self.config.state / "memory.json", json.dumps(memory))
        except OSError:
            for number, (receiver, _) in enumerate(messages, first):
                receiver.path(number).unlink(missing_ok=True)
            raise
        self.memory = memory
        for number, (receiver, _) in enumerate(messages, first):
            receiver.add(number)

    # -- progress ------------------------------------------------------------------------------------------------------

    def reached(self, cursor, at_once):
        """The reader has taken all up to here. Raises OSError."""
        self.cursor = cursor
        if cursor != self.saved and (at_once or not self.saved or time.monotonic() > self.saved_at + CURSOR_EVERY_S):
            write_whole(self.config.state / "cursor", cursor)
            self.saved, self.saved_at = cursor, time.monotonic()

    def overdue(self):
        """The ids of deployments that take too long by what is known, and of which nobody was told so."""
        with self._lock:
            latest = self.now() - self.config.stuck_after
            entries = self.memory["known"].items()
            open_ones = [(name, entry) for name, entry in entries if entry["status"] not in ENDED and not entry["told"]]
            late = [(name, entry) for name, entry in open_ones if entry["since"] <= latest and entry["app"] in self.apps]
            return [name for name, entry in late if entry["hold"] not in UNHURRIED]

    def forget(self, name):
        """A deployment that the controller does not know any more. It is written with the next news."""
        with self._lock:
            self.memory["known"].pop(name, None)


# ----------------------------------------------------------------------------------------------------------------------
# Reader
# Owns: the stream of server-sent events (WHATWG HTML, 9.2.6) and its resuming. Ignores: what becomes of the news.


def sse_lines(chunks):
    """Lines out of pieces of bytes; each ends with LF, CR or CRLF (a CR at the end of a piece waits for the next)."""
    rest = b""
    for chunk in chunks:
        *lines, rest = re.split(rb"\r\n|\n|\r(?=[^\n])", rest + chunk)
        yield from lines


def sse_events(lines):
    """(id or None, kind, data or None) at each blank line; comments are dropped. An id may come without data."""
    seen, kind, data = None, "message", []
    for line in lines:
        name, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if not line:
            yield seen, kind, "\n".join(data) if data else None
            kind, data = "message", []
        elif name == "id" and "\0" not in value:
            seen = value
        elif name == "event":
            kind = value
        elif name == "data":
            data.append(value)


CURSOR = re.compile(r"[0-9a-f]{1,16}-([0-9]{1,18})")  # EPOCH-POSITION


class Reader:
    """Follows the stream from the desk's cursor on, over as many connections as it takes."""

    def __init__(self, config, desk):
        self.config, self.desk = config, desk
        self.looked_at = -LOOK_EVERY_S

    def run(self):
        """For ever. What fails is tried again, from the last event that was stored."""
        pause, trouble = RETRY_FIRST_S, None
        while True:
            before = self.desk.cursor
            try:
                self.follow()
            except (Later, OSError) as error:
                why, wait = reason_of(error), getattr(error, "wait", 0)
            if self.desk.cursor != before:
                pause, trouble = RETRY_FIRST_S, None
            if why != trouble:
                log.warning("the stream of %s: %s; trying again", self.config.url, brief(why))
            trouble = why
            time.sleep(max(wait, pause * (0.5 + os.urandom(1)[0] / 510)))
            pause = min(pause * 2, RETRY_READER_S)

    def follow(self, until=None):
        """One connection; with `until`, a position of the stream, it ends there. Raises Later, and OSError where it cannot store."""
        sent, whole = self.desk.cursor, None
        with self._open(sent) as response:
            for seen, kind, data in sse_events(sse_lines(self._pieces(response))):
                if data is not None:
                    self._guard(self._handle, kind, data)
                if found := CURSOR.fullmatch(seen or ""):
                    whole = kind == "gap" or (seen == sent if whole is None else whole)  # begun elsewhere: a gap is told next
                    self.desk.reached(seen, at_once=kind == "deployment")
                    if until is not None and whole and int(found[1]) >= until:
                        return self.look()
                if time.monotonic() >= self.looked_at + LOOK_EVERY_S:
                    self.look()
        raise Later("the controller ended the stream")

    def newest(self):
        """The cursor of the newest event. Raises Later."""
        with self._open("") as response:
            for seen, _, _ in sse_events(sse_lines(self._pieces(response))):
                if CURSOR.fullmatch(seen or ""):
                    return seen
        raise Later("the controller ended the stream")

    def look(self):
        """Asks for what seems stuck: it may have ended, and the event of that be on its way or gone."""
        self.looked_at = time.monotonic()
        for name in self.desk.overdue():
            status, data = self.get(f"/v1/deployments/{name}")
            if status == 200:
                self._guard(self._asked, data)
            elif status == 404:
                self.desk.forget(name)

    def get(self, path):
        """(status, the JSON of the answer or {}). Raises Later."""
        status, _, text = ask(self.config.url + path, self._headers("application/json"))
        with contextlib.suppress(ValueError):
            return status, json.loads(text)
        return status, {}

    def _headers(self, accept):
        return {"Accept": accept, **({"Authorization": f"Bearer {self.config.token}"} if self.config.token else {})}

    def _open(self, cursor):
        headers = self._headers("text/event-stream") | ({"Last-Event-ID": cursor} if cursor else {})
        response = open_url(self.config.url + STREAM, headers, timeout=STREAM_SILENCE_S)
        if response.status != 200:
            with response:
                hints = {401: ": is DEPLOYBOT_TOKEN right?", 403: ": a viewer's token is needed"}
                raise Later(f"it answers {response.status}{hints.get(response.status, '')}", retry_after(response.headers))
        return response

    def _pieces(self, response):
        try:
            yield from iter(lambda: response.read1(SSE_READ_BYTES), b"")
        except (OSError, HTTPException) as error:
            raise Later(reason_of(error)) from None

    def _handle(self, kind, data):
        if kind == "deployment":
            self.desk.take(json.loads(data))
        elif kind == "gap":
            log.warning("events are gone: %s", brief(json.loads(data)["detail"]))

    def _asked(self, data):
        self.desk.take(data["deployment"], stuck=True)

    @staticmethod
    def _guard(do, *given):
        """A controller of another version does not end this program."""
        try:
            do(*given)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            log.error("passed over, as it is not understood: %s: %s", type(error).__name__, brief(error))


# ----------------------------------------------------------------------------------------------------------------------
# Main
# Owns: the state folder, signals, the ways to run. Ignores: the rest.

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def fault(url, token, good=(200,)):
    """What is wrong there, or ""."""
    try:
        status = ask(url, {"Authorization": f"Bearer {token}"} if token else {})[0]
    except Later as later:
        return str(later)
    return "" if status in good else f"answers {status}" + (": is the token right?" if status in (401, 403) else "")


def check(config, apps):
    """Says how things are; the exit code."""
    targets = {target.key: target.label for app in apps.values() for target in app.targets}
    print(f"ok: {config.apps}: {len(apps)} apps, {len(targets)} receivers: {', '.join(sorted(targets.values()))}")
    faults = {config.url: fault(config.url + "/v1/jobs?limit=1", config.token)}  # what a viewer may, and an agent may not
    if config.github_token:
        faults[config.api_url] = fault(config.api_url + "/rate_limit", config.github_token, good=(200, 404))  # 404: no limits there
    for where, wrong in faults.items():
        print(f"wrong: {where}: {wrong}" if wrong else f"ok: {where}")
    return NOT_WELL if any(faults.values()) else DONE


def run_once(desk, reader):
    code = DONE
    try:
        newest = reader.newest()
        if desk.cursor:
            reader.follow(until=int(CURSOR.fullmatch(newest)[1]))
        desk.reached(desk.cursor or newest, at_once=True)
    except (Later, OSError) as error:
        log.error("the stream of %s: %s", reader.config.url, brief(reason_of(error)))
        code = NOT_WELL
    receivers = desk.start(once=True)
    for receiver in receivers:
        receiver.thread.join()
    left = sum(receiver.waiting() for receiver in receivers)
    if left:
        log.error("%d messages could not be sent, they stay in %s", left, desk.outbox)
    return NOT_WELL if left else code


def read_again(desk):
    try:
        desk.adopt(read_apps(desk.config))
        log.info("%s is in force", desk.config.apps)
    except (ConfigError, OSError) as error:
        for problem in getattr(error, "problems", [reason_of(error)]):
            log.error("the mapping in force stays: %s", problem)


def die(failure):
    """A thread that ends by a mistake of ours ends the program: a crash loses nothing, and is seen."""
    log.critical("a mistake in notify.py", exc_info=(failure.exc_type, failure.exc_value, failure.exc_traceback))
    os._exit(NOT_WELL)


def run(desk, reader):
    threading.excepthook = die
    desk.start()
    threading.Thread(target=reader.run, name="reader", daemon=True).start()
    log.info("notify.py %s reads %s and tells %d receivers", VERSION, desk.config.url, len(desk.receivers))
    while signal.sigwait(SIGNALS) == signal.SIGHUP:
        read_again(desk)
    desk.end()
    log.info("ended")
    return DONE


def prepare(folder):
    """Makes the state folder, for this user alone, and locks it; None where another notify.py has it. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        return take_lock(folder / "lock")
    except OSError as error:
        raise ConfigError([f"--state: {folder} cannot be written: {error.strerror}"]) from None


def main(argv=None):
    try:
        config = load_config(sys.argv[1:] if argv is None else argv, dict(os.environ))
        logging.Formatter.converter = time.gmtime
        form, date = "%(asctime)s.%(msecs)03dZ %(levelname)-7s %(message)s", "%Y-%m-%dT%H:%M:%S"  # as the controller's
        logging.basicConfig(level=config.log_level, stream=sys.stderr, format=form, datefmt=date, force=True)
        apps = read_apps(config)
        if config.check:
            return check(config, apps)
        lock = prepare(config.state)
        if lock is None:
            print(f"{CALLED}: another one works in {config.state}", file=sys.stderr)
            return NOT_WELL
        if not config.once:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # ahead of all threads, so that main alone takes them
        desk = Desk(config, apps)
    except ConfigError as error:
        for problem in error.problems:
            print(f"{CALLED}: {problem}", file=sys.stderr)
        return WRONG_USE
    try:
        return (run_once if config.once else run)(desk, Reader(config, desk))
    finally:
        os.close(lock)


if __name__ == "__main__":
    sys.exit(main())
