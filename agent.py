#!/usr/bin/env python3
"""DeployBot's agent: takes the jobs of this host from the controller and deploys them.

Life of a job: a heartbeat brings it; its tracking file is written and synced; under the app's file lock its branches and
tags are fetched, the commit is checked out into a new release, what is shared is linked into it, `build` or `deploy` runs there,
`current` is switched, `activate` runs, the health check is asked; output goes up while it runs; the result is kept on disk until
the controller has acknowledged it.

Threads: the main thread acts on signals and on the end of jobs. One thread sends heartbeats. Each job has two: the worker
(git, scripts, their output) and the uploader (log lines, then the result). A health check's GET has one of its own. Locks, none
of which is held while another is taken: Agent._lock, Spool._ready, Children._lock, Stop._lock.

Rights. git runs as the agent. Scripts run as the agent, or as the user that --run-as names, who then owns what was checked out
and what is shared, and nothing else: the mirror, `current`, the tracking files and the secret stay the agent's. A script's
environment is made anew, and the values that --env-file puts into it are masked in what goes up.

Output and lines. A message is one line of output without its newline. A line that stays without one for PARTIAL_AFTER, or
grows past LINE_LIMIT, goes up in pieces, each a message of its own, so the stored messages put end to end are the output
less its newlines: nothing missing, nothing twice. Output is read as UTF-8; what is none becomes U+FFFD. What the agent
itself says starts with "[deploybot] ". The spool of an attempt is a file from its first line on, so that neither memory
nor a killed agent sets its limit. A script that is HELD_FROM ahead of a controller that takes its lines is held back by its
pipe. While the controller is away it goes on; past SPOOL_LIMIT one line says that output is not kept until it is back.

Processes. Each script runs in a session of its own and carries DEPLOY_JOB_ID. What a failed, cancelled or timed out step
leaves behind is ended: TERM, 10 s, KILL. What a successful one leaves in the background stays; it has to send its output
elsewhere, as nobody reads it any more.

Exit codes: 0 done; 1 with --once: no job succeeded; 2 wrong use; 3 a newer agent took over this hostname; 4 another agent
works in this folder.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # before the imports that an older one does not have
    sys.exit(f"agent.py needs Python 3.11 or newer; this is {sys.version_info[0]}.{sys.version_info[1]}")

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the folder of this file: root may run it where another user could put an argparse.py beside it

import argparse
import codecs
import contextlib
import ctypes
import email.utils
import errno
import fcntl
import fnmatch
import hashlib
import http.client
import json
import logging
import os
import platform
import pwd
import queue
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from stat import S_IFREG, S_ISDIR, S_ISREG
from typing import Any, NamedTuple

VERSION = "0.1.0"

# Times, in seconds.
HEARTBEAT_WAIT = 25  # the longest that the protocol lets a heartbeat park
ANSWER_TIMEOUT = 30  # for an answer, on top of what it may park
IDLE_PAUSE = 0.2  # between heartbeats that brought nothing: a controller that does not park is not flooded
INTERVAL_LIMIT = 300  # a controller may not put an agent to sleep for longer
BACKOFF_FIRST, BACKOFF_LIMIT = 0.5, 15.0  # the first window to try again in, and the last: no person is to wait for it
SIGN_IN_FIRST, SIGN_IN_LIMIT = 10.0, 30.0  # after a refused registration: up to two failed sign-ins of the 10 that a minute has
RETURN_FIRST = 8.0  # the first one of a heart: 10,000 that lose the controller at once come back at about 1,250 a second
TICK = 0.04  # how often a running script's limits, and its lines without newline, are looked at
TURN = 0.0005  # reading a script's output keeps the thread that sends it waiting for so long after each answer
PARTIAL_AFTER = 0.06  # a line without newline waits this long for the rest of it ...
BATCH_AFTER = 0.05  # ... and a batch this long for more lines: with a TICK, the 200 ms that output may be late
HELD_FOR = 10.0  # a controller that took no line for so long is away: it holds no script back any more
DRAIN = 1.0  # for the last output of a script whose children hold the pipe: `exec > >(tee log)` needs a moment
KILL_GRACE = 10.0  # between TERM and KILL
KILL_PATIENCE = 10.0  # after KILL: a process that hangs in the kernel holds nobody up for ever
WAY_BACK_LIMIT = 300  # for `activate` of the old release, which neither cancel nor timeout stops
HEALTH_ANSWER = 5.0  # for one answer to a health check
HEALTH_LIMIT = 7 * 86400  # a health check may not ask for longer
PARTING = 1.0  # for a job that is on its way to an agent that was just told to end
LEAVING_GRACE = 10.0  # for the last uploads of an agent that was told to end; what is left goes up at the next start
JOB_TIMEOUT = 3600  # of a job that names none

# Sizes, in bytes where nothing else is said.
LINE_LIMIT = 64 * 1024  # the controller cuts longer lines
BATCH_BYTES = 64 * 1024  # a batch of this size does not wait
BODY_LINES, BODY_BYTES = 1000, 900 * 1024  # a body has at most 1,000 lines and 1 MiB
PIPE_BYTES = 256 * 1024  # of a script's output that is read at once
SPOOL_LIMIT = 64 * 1024 * 1024  # of one attempt, on disk: a script in a loop must not fill it
SPOOL_ANEW = SPOOL_LIMIT // 2  # from here on a script waits until all is acknowledged and the file begun anew
HELD_FROM = 4 * 1024 * 1024  # a script may be ahead of the controller by so much
ANSWER_LIMIT = 4 * 1024 * 1024
CAPTURE_LIMIT = 16 * 1024  # of what a git command says
ERROR_LIMIT = 4096  # the controller cuts longer errors
KEEP_RELEASES, KEEP_LIMIT = 5, 1000  # where a job names none; the most that it may name
HEALTH_BODY = 1024  # of the answer to a health check; its log shows HEALTH_SHOWN characters
HEALTH_SHOWN = 200
HEALTH_LINES = 20  # about one health check, whose cause may change without end
KEEP_ENTRIES = 1000  # tracking files of acknowledged attempts, so that none is started twice
RECALLED = 10  # results that go up again to a controller that forgot this host: what it was restored to may still wait for them
MASK_FROM = 6  # characters: a shorter value would mask half of a log
GAP_LIMIT = 5  # gaps in a row that are closed from the spool; a controller that names one after another is not followed for ever

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_NEWER, EXIT_BUSY = range(5)

PROC = Path("/proc")
HEX = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
ENV_NAME = re.compile("[A-Za-z_][A-Za-z0-9_]*")

log = logging.getLogger("agent")


# ---------------------------------------------------------------------------------------------------------------------
# Errors and small helpers
# Owns: the errors that cross sections; text and file helpers. Ignores: what is done about an error.


class ConfigError(Exception):
    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Unreachable(Exception):
    """No usable answer: to be tried again, after `retry_after` seconds where the controller named them."""

    def __init__(self, detail: str, retry_after: float = 0.0) -> None:
        super().__init__(detail)
        self.retry_after = retry_after


class PutOff(Unreachable):
    """429: too many tokens from this address were not valid. One that is valid passes all the same."""


class Refused(Exception):
    """The controller said no. `next_offset` comes with a gap in the log lines."""

    def __init__(self, status: int, detail: str, next_offset: int | None = None) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.next_offset = next_offset
        self.of_token = False  # whether it is the token that the agent was given which was refused, not the host's own secret


def is_unknown_token(error: Exception) -> bool:
    return isinstance(error, PutOff) or (isinstance(error, Refused) and error.status == 401)


class Stopped(Exception):
    """What ran was ended: `cause` is cancelled, timeout, stopped or fenced."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class StepFailed(Exception):
    """One end of a job, as the result names it."""

    def __init__(self, reason: str | None, detail: str, exit_code: int | None = None) -> None:
        super().__init__(detail)
        self.reason = reason
        self.exit_code = exit_code


def unexpected(error: Exception, job_id: str) -> StepFailed:
    """What ends a job that no step of it foresaw: a folder without the right to write is the host's matter, no mistake of ours."""
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        return StepFailed("rejected", f"cannot write {error.filename}: {error.strerror}")
    log.error("job %s failed in the agent", job_id, exc_info=error)
    return StepFailed(None, f"{type(error).__name__}: {error}"[:ERROR_LIMIT])


def timestamp(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def one_line(text: object) -> str:
    """Others' words for a log line: no control character, no end of line, not endless."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", str(text)).strip()[:1000]


def without_passwords(text: str) -> str:
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"user {os.geteuid()}"


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str, sync: bool = True) -> None:
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


def open_folders(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.chmod(0o700)
    for folder, names, _ in os.walk(path):
        for entry in (os.path.join(folder, name) for name in names):
            with contextlib.suppress(OSError):
                if not os.path.islink(entry):
                    os.chmod(entry, 0o700)


def remove_tree(path: Path) -> None:
    """Removes what can be removed, a file as well. Some builds leave folders without the right to write (Go's module cache)."""
    if path.is_symlink() or not path.is_dir():
        return path.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    if path.exists() and os.geteuid() != 0:  # root needs no such right, and could be led elsewhere by whoever owns this
        open_folders(path)
        shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        log.warning("%s could not be removed", path)


def take_lock(path: Path) -> int | None:
    """A file lock that ends with this process; None while another holds it. Scripts do not inherit it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def take_name(name: str) -> socket.socket | None:
    """A name on this machine that ends with this process, whatever folder or user it works in; None while another holds it.

    An abstract socket, unix(7): no file that two users would have to share. Other systems than Linux have none, nothing is
    held there.
    """
    holder = socket.socket(socket.AF_UNIX)
    try:
        holder.bind("\0deploybot-" + hashlib.sha256(name.encode()).hexdigest())
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            holder.close()
            return None
    return holder


class Backoff:
    """Pauses anywhere in a window that doubles: thousands of agents that lose the controller in one moment come back in many."""

    def __init__(self, first: float = BACKOFF_FIRST, chance: Callable[[], float] = random.random) -> None:
        self._first, self._chance = first, chance
        self._failures = 0

    def reset(self) -> None:
        self._failures = 0

    def next(self, at_least: float = 0.0) -> float:
        """Seconds. What all were told to wait `at_least` comes on top, or they would come back together."""
        window = min(BACKOFF_LIMIT, self._first * 2 ** min(self._failures, 10))
        self._failures += 1
        return min(at_least, INTERVAL_LIMIT) + window * self._chance()


def sign_in_pause(failures: int) -> float:
    """Seconds, at least, after so many registrations in a row that were refused before this one: an agent alone must not use up
    the failed sign-ins of its address, which others behind it, and `doctor`, need as well."""
    return min(SIGN_IN_LIMIT, SIGN_IN_FIRST * 2 ** min(failures, 10))


class Stop:
    """Why a job is to end early, if it is. The first cause stands."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards cause: of two callers the first one wins. Nobody waits for it.
        self.cause: str | None = None

    def set(self, cause: str) -> None:
        with self._lock:
            self.cause = self.cause or cause


@dataclass(frozen=True)
class Limits:
    """What ends a running command early. `stop` is None where only the clock may."""

    stop: Stop | None
    deadline: float
    clock: Callable[[], float]

    def cause(self) -> str | None:
        if self.stop is not None and self.stop.cause:
            return self.stop.cause
        return "timeout" if self.clock() >= self.deadline else None

    def check(self) -> None:
        if cause := self.cause():
            raise Stopped(cause)


# ---------------------------------------------------------------------------------------------------------------------
# Config
# Owns: flags over environment over defaults, every problem at once. Ignores: whether the controller is there.


class Account(NamedTuple):
    """Whose rights scripts have."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


@dataclass(frozen=True)
class Config:
    url: str
    hostname: str
    workdir: Path
    git_protocols: str = "https:ssh"
    slots: int = 1
    once: bool = False
    log_level: str = "INFO"
    token: str | None = None
    allow_repos: tuple[str, ...] = ()  # none: any
    account: Account | None = None
    variables: dict[str, str] = field(default_factory=dict)  # for scripts, from --env-file
    labels: dict[str, str] = field(default_factory=dict)  # what apps.yaml may choose hosts by


# flag, variable, help. No secret is ever a flag: others on this machine can read command lines.
OPTIONS = (
    ("--url", "DEPLOYBOT_URL", "the controller (http://localhost:8080)"),
    ("--hostname", "DEPLOYBOT_HOSTNAME", "the host whose jobs to take (this machine's name)"),
    ("--workdir", "DEPLOYBOT_WORKDIR", "mirrors, releases, the agent's own state (/var/lib/deploybot-agent as root)"),
    ("--git-protocols", "DEPLOYBOT_GIT_PROTOCOLS", "what git may fetch over (https:ssh); add file for trials"),
    ("--allow-repo", "DEPLOYBOT_ALLOW_REPO", "what may be deployed here: myorg/*; again, or with commas, for more (any)"),
    ("--run-as", "DEPLOYBOT_RUN_AS", "the user that scripts run as, where the agent is root (the agent's own user)"),
    ("--env-file", "DEPLOYBOT_ENV_FILE", "NAME=VALUE lines for scripts; the values are shown as *** in logs (none)"),
    ("--label", "DEPLOYBOT_LABELS", "role=web: what apps.yaml may choose this host by; again, or with commas, for more (none)"),
    ("--slots", "DEPLOYBOT_SLOTS", "how many jobs run at once, each of another app, 1 to 64 (1)"),
    ("--log-level", "DEPLOYBOT_LOG_LEVEL", "DEBUG, INFO, WARNING or ERROR (INFO)"),
)
TOKEN_VARIABLE = "DEPLOYBOT_AGENT_TOKEN"
GIT_PROTOCOLS = ("file", "git", "http", "https", "ssh")  # what git fetches over; not ext, which runs any command
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
CALLED = "deploybot-agent" if os.path.basename(sys.argv[0]) == "deploybot-agent" else "agent.py"  # the first: installed


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=CALLED,
        description="DeployBot's agent: takes the jobs of this host from the controller and deploys them.",
        epilog="Verbs: install, uninstall, status and doctor, each with a --help of its own, are for the service of this machine. "
        f"The token comes from {TOKEN_VARIABLE}, or from the file that {TOKEN_VARIABLE}_FILE names. "
        "Exit codes: 0 done, 1 with --once: no job succeeded, 2 wrong use, 3 a newer agent took over this hostname, "
        "4 another agent works in this folder.",
    )
    for flag, variable, text in OPTIONS:
        action = "append" if flag in ("--allow-repo", "--label") else "store"
        parser.add_argument(flag, metavar="VALUE", action=action, help=f"{text} [{variable}]")
    parser.add_argument("--once", action="store_true", help="take one job and end")
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    return parser


def default_workdir(env: dict[str, str]) -> str:
    if os.geteuid() == 0:
        return "/var/lib/deploybot-agent"
    state = env.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return os.path.join(state, "deploybot-agent")


def url_problem(url: str) -> str | None:
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port  # raises where it is no number
    except ValueError:
        port, parts = 0, urllib.parse.urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        return "--url: must be http://HOST[:PORT] or https://HOST[:PORT]"
    if "@" in parts.netloc or parts.query or parts.fragment:
        return f"--url: takes no user, query or fragment (the token belongs into {TOKEN_VARIABLE})"
    if parts.path.strip("/"):
        return f"--url takes no path: {parts.scheme}://{parts.netloc}"
    return None


def read_token(env: dict[str, str], problems: list[str]) -> str | None:
    token, file = env.get(TOKEN_VARIABLE), env.get(TOKEN_VARIABLE + "_FILE")
    if file and token:
        problems.append(f"{TOKEN_VARIABLE} and {TOKEN_VARIABLE}_FILE are both set")
    elif file:
        try:
            token = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{TOKEN_VARIABLE}_FILE: {one_line(error)}")
    if token and not re.fullmatch(r"[\x21-\x7e]+", token):
        problems.append(f"{TOKEN_VARIABLE}: must be printable ASCII without blanks")
    return token or None


def repo_patterns(text: str, problems: list[str]) -> tuple[str, ...]:
    patterns = tuple(part.strip().lower() for part in text.split(",") if part.strip())
    if not all(re.fullmatch(r"[a-z0-9._*?\[\]!-]+/[a-z0-9._*?\[\]!-]+", pattern) for pattern in patterns):
        problems.append("--allow-repo: must be OWNER/NAME, each with * or ? where need be, as myorg/*")
    return patterns


def host_labels(text: str, problems: list[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        found = re.fullmatch(r"([a-z0-9_.-]{1,63})=([A-Za-z0-9_.-]{1,63})", part)
        if found is None:
            problems.append(
                f"--label: {one_line(part)!r} is no KEY=VALUE of at most 63 letters, digits, _, . and - each (no capital in KEY)"
            )
        elif labels.setdefault(found[1], found[2]) != found[2]:
            problems.append(f"--label: {found[1]} has two values")
    return labels


def find_account(name: str, problems: list[str]) -> Account | None:
    if not name:
        return None
    try:
        entry = pwd.getpwnam(name)
    except (KeyError, ValueError):
        problems.append(f"--run-as: there is no user {one_line(name)!r} on this machine")
        return None
    if os.geteuid() != 0:
        problems.append(f"--run-as: only root can run scripts as another user; this agent runs as {user_name()}")
    if entry.pw_uid == 0:
        problems.append("--run-as: is to take rights away from scripts, and root has them all")
    groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, groups, entry.pw_dir)


def check_account(account: Account, workdir: Path) -> None:
    """Raises ConfigError where scripts could swap what the agent does as root, or could not reach their release."""
    owners = [(folder, folder.stat()) for folder in (workdir.resolve(), *workdir.resolve().parents)]
    sticky = 0o1000  # as in /tmp: one may add there, and not touch what is another's
    for folder, found in [*owners, (workdir / ".agent", (workdir / ".agent").stat())]:
        if found.st_uid != 0 or (found.st_mode & 0o022 and not found.st_mode & sticky):
            raise ConfigError([f"--run-as: only root may write {folder}: chown root: {folder}; chmod go-w {folder}"])
    enter = ["/bin/sh", "-c", 'cd -- "$1"', "sh", str(workdir)]
    rights = {"user": account.uid, "group": account.gid, "extra_groups": account.groups}
    try:
        done = subprocess.run(enter, cwd="/", capture_output=True, check=False, **rights)
    except OSError as error:
        raise ConfigError([f"--run-as: {one_line(error)}"]) from error
    if done.returncode != 0:
        raise ConfigError([f"--run-as: {account.name} may not enter {workdir}: chmod a+x each folder on the way"])


# One item of systemd.exec(5)'s EnvironmentFile=: a comment, or a name, values in quotes (which may hold ends of lines), and a
# value without.
ENV_ITEM = re.compile(
    r"[#;][^\r\n]*|(?P<name>[^=\r\n]*)=[ \t]*"
    r"(?P<quoted>(?:(?:'[^']*'|\"(?:\\[\s\S]|[^\"\\])*\")[ \t]*)*)(?P<plain>(?:\\[\s\S]|[^\r\n\\])*)"
)
ENV_BLANK, ENV_LINE = re.compile(r"[ \t\r\n]*"), re.compile(r"[^\r\n]*")
ENV_QUOTED = re.compile(r"'([^']*)'|\"((?:\\[\s\S]|[^\"\\])*)\"")
ENV_TAIL = re.compile(r"(?<!\\)((?:\\\\)*)[ \t]+\Z")  # blanks at the end, less one that a backslash keeps


def env_value(quoted: str, plain: str) -> str:
    def in_quotes(found: re.Match) -> str:
        kept = {"\n": ""} | {sign: sign for sign in '"\\`$'}
        return found[1] if found[2] is None else re.sub(r"\\([\s\S])", lambda e: kept.get(e[1], e[0]), found[2])

    bare = re.sub(r"\\([\s\S])", lambda e: e[1].strip("\r\n"), ENV_TAIL.sub(r"\1", plain))
    return "".join(map(in_quotes, ENV_QUOTED.finditer(quoted))) + bare


def parse_env_file(text: str, problems: list[str], of_scripts: bool = True) -> dict[str, str]:
    """As systemd reads it, but what systemd leaves out in silence is a problem, named by its line and never by its text."""
    values: dict[str, str] = {}
    at = 0
    while (at := ENV_BLANK.match(text, at).end()) < len(text):
        number, item = text.count("\n", 0, at) + 1, ENV_ITEM.match(text, at)
        at = (item or ENV_LINE.match(text, at)).end()
        if item and item["name"] is None:
            continue
        name = item["name"].rstrip() if item else ""
        if not ENV_NAME.fullmatch(name):
            problems.append(f"--env-file: line {number} is no NAME=VALUE")
        elif of_scripts and name.startswith("DEPLOYBOT_"):
            problems.append(f"--env-file: line {number}: {name} is a setting of the agent, and no script gets it")
        elif item["plain"][:1] in ("'", '"') or "\0" in item[0]:
            problems.append(f"--env-file: line {number}: the value of {name} has no closing quote, or a NUL")
        else:
            values[name] = env_value(item["quoted"], item["plain"])
    return values


def read_env_file(path: str, problems: list[str]) -> dict[str, str]:
    if not path:
        return {}
    try:
        text, mode = Path(path).read_bytes().decode(), Path(path).stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"--env-file: {one_line(error)}")
        return {}
    if Path(path).is_file() and mode & 0o027:
        problems.append(f"--env-file: others can read or change {one_line(path)}: chmod u=rw,g=r,o= {one_line(path)}")
    return parse_env_file(text, problems)


def check_ca_file(url: str, env: dict[str, str], problems: list[str]) -> None:
    """OpenSSL passes over a SSL_CERT_FILE that it cannot read, and then knows no CA at all."""
    if url.startswith("https:") and (file := env.get("SSL_CERT_FILE")):
        try:
            ssl.create_default_context(cafile=file)
        except OSError as error:
            problems.append(f"SSL_CERT_FILE: no certificate can be read from {one_line(file)} ({one_line(error)})")


def load_config(argv: list[str], env: dict[str, str]) -> Config:
    """Raises ConfigError with every problem."""
    args = build_parser().parse_args(argv)

    def value(flag: str, variable: str, default: str) -> str:
        given = getattr(args, flag[2:].replace("-", "_"))
        given = ",".join(given) if isinstance(given, list) else given
        return given if given is not None else env.get(variable) or default

    machine = socket.gethostname(), default_workdir(env)
    defaults = ("http://localhost:8080", *machine, "https:ssh", "", "", "", "", "1", "INFO")
    values = [value(flag, variable, default) for (flag, variable, _), default in zip(OPTIONS, defaults, strict=True)]
    url, hostname, workdir, protocols, repos, user, env_file, labels, slots, level = values
    problems = [problem] if (problem := url_problem(url)) else []
    if not re.fullmatch(r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", hostname):
        problems.append(f"--hostname: {one_line(hostname)!r} is no host name (RFC 1123)")
    if not set(protocols.split(":")) <= set(GIT_PROTOCOLS):
        known = ", ".join(GIT_PROTOCOLS)
        problems.append(f"--git-protocols: must be some of {known}, with colons between them, as https:ssh")
    if not re.fullmatch(r"[0-9]{1,2}", slots) or not 1 <= int(slots) <= 64:
        problems.append("--slots: must be 1 to 64")
    if level.upper() not in LOG_LEVELS:
        problems.append(f"--log-level: must be one of {', '.join(LOG_LEVELS)}")
    token = read_token(env, problems)
    check_ca_file(url, env, problems)
    more = (
        repo_patterns(repos, problems),
        find_account(user, problems),
        read_env_file(env_file, problems),
        host_labels(labels, problems),
    )
    if shutil.which("git", path=env.get("PATH")) is None:
        problems.append("git is not installed, or not on PATH")
    if problems:
        raise ConfigError(problems)
    folder = Path(workdir).expanduser().absolute()
    return Config(url, hostname, folder, protocols, int(slots), args.once, level.upper(), token, *more)


# ---------------------------------------------------------------------------------------------------------------------
# Models
# Owns: what the controller hands over, checked before anything is done with it. Ignores: HTTP, files, git.

Command = list[str] | str | None
FULL_REF = re.compile(r"refs/(heads|tags)/.+")
# What git check-ref-format refuses, and a leading dash, which git would read as an option.
BAD_REF = re.compile(r"^[-/.]|[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|\.lock(/|$)|[/.]$|^@$")
# No option, no blank, nothing that could leave a folder.
JOB_FIELDS = {
    "app": re.compile(r"[a-z0-9][a-z0-9._-]{0,199}"),
    "repo": re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}/(?!\.{1,2}\Z)[A-Za-z0-9._][A-Za-z0-9._-]{0,99}"),
    "host": re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?"),
}


class JobKey(NamedTuple):
    """One delivery of a job: the attempt is the fencing token."""

    job_id: str
    attempt: int


@dataclass(frozen=True)
class HealthCheck:
    """What is asked after a switch, each `interval` s, until it passed `success` times in a row; within `timeout` s."""

    url: str | None = None  # this one, or ...
    command: Command = None
    timeout: float = 60
    interval: float = 2
    success: int = 1


@dataclass(frozen=True)
class Job:
    key: JobKey
    app: str
    repo: str
    ref: str
    host: str
    branch: str
    timeout: float
    clone_url: str
    build: Command
    activate: Command
    deploy: Command
    env: dict[str, str]  # of its scripts
    shared: tuple[str, ...]  # paths within a release; one that ends in / is a folder
    keep_releases: int
    health_check: HealthCheck | None
    rollback_on_failure: bool
    reuse: bool  # a rollback: a release of that commit that is still there will do
    agent: str  # the controller's id of this host, the same for whichever agent speaks for it


def parse_key(data: Any) -> JobKey | None:
    """None for what cannot even be answered: the id becomes a file name and a path of the API."""
    if not isinstance(data, dict):
        return None
    job_id, attempt = data.get("id"), data.get("attempt")
    if not isinstance(job_id, str) or not re.fullmatch(r"[0-9a-f-]{1,64}", job_id):
        return None
    if type(attempt) is not int or attempt < 1:
        return None
    return JobKey(job_id, attempt)


def is_text(value: Any) -> bool:
    """Text that can stand in an environment: no NUL, no half of a surrogate pair."""
    return isinstance(value, str) and "\0" not in value and not re.search("[\ud800-\udfff]", value)


def is_command(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(is_text, value)) and bool(value[0])
    return value is None or (is_text(value) and bool(value.strip()))


def is_clone_url(value: Any) -> bool:
    return is_text(value) and bool(re.fullmatch(r"[^-\x00-\x20\x7f][^\x00-\x20\x7f]*", value))


def is_environment(value: Any) -> bool:
    return isinstance(value, dict) and all(ENV_NAME.fullmatch(name) and is_text(text) for name, text in value.items())


def is_part(text: str) -> bool:
    """One name of a path."""
    return text not in ("", ".", "..") and text.isprintable() and len(text.encode()) <= 255


def is_shared(value: Any) -> bool:
    """Paths that stay within a release, and none within another: the other is a link to elsewhere."""
    if not isinstance(value, list) or not all(map(is_text, value)):
        return False
    paths = sorted(path.removesuffix("/").split("/") for path in value)
    return all(is_part(part) for path in paths for part in path) and not any(a == b[: len(a)] for a, b in pairwise(paths))


def is_number(value: Any, least: float, most: float, kinds: tuple[type, ...] = (int, float)) -> bool:
    return type(value) in kinds and least <= value <= most


def is_health_url(value: Any) -> bool:
    if not is_text(value) or not re.fullmatch(r"https?://[!-~]+", value):
        return False
    try:
        parts = urllib.parse.urlsplit(value)
        return bool(parts.hostname) and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        return False


def read_health_check(data: dict) -> HealthCheck:
    names = HealthCheck.__dataclass_fields__
    return HealthCheck(**{name: value for name, value in data.items() if name in names and value is not None})


def is_health_check(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    check = read_health_check(value)
    asked = is_command(check.command) if check.url is None else is_health_url(check.url)
    numbers = is_number(check.timeout, 0.001, HEALTH_LIMIT) and is_number(check.interval, 0, HEALTH_LIMIT)
    return asked and numbers and (check.url is None) != (check.command is None) and is_number(check.success, 1, 1000, (int,))


# What a job's spec may say besides clone_url; null is as if it were not said.
SPEC_FIELDS = {
    "build": is_command,
    "activate": is_command,
    "deploy": is_command,
    "env": is_environment,
    "shared": is_shared,
    "keep_releases": lambda value: is_number(value, 1, KEEP_LIMIT, (int,)),
    "health_check": is_health_check,
    "rollback_on_failure": lambda value: isinstance(value, bool),
    "reuse": lambda value: isinstance(value, bool),
}


def read_spec(said: dict) -> tuple:
    """The fields of a Job from `build` on."""
    commands = said.get("build"), said.get("activate"), said.get("deploy")
    check = read_health_check(said["health_check"]) if "health_check" in said else None
    kept = said.get("env", {}), tuple(said.get("shared", ())), said.get("keep_releases", KEEP_RELEASES), check
    return *commands, *kept, said.get("rollback_on_failure", True), said.get("reuse", False)


def parse_job(data: dict) -> Job:
    """Raises StepFailed("rejected") that lists every field at fault."""
    spec = data.get("spec") if isinstance(data.get("spec"), dict) else {}
    metadata = data.get("metadata") if isinstance(data.get("metadata"), dict) else {}
    wrong = [name for name, rule in JOB_FIELDS.items() if not rule.fullmatch(str(data.get(name)))]
    if not is_text(data.get("ref")) or len(data["ref"]) > 255 or not data["ref"] or BAD_REF.search(data["ref"]):
        wrong.append("ref")
    timeout = data.get("timeout") or JOB_TIMEOUT
    if not isinstance(timeout, (int, float)) or timeout <= 0:
        wrong.append("timeout")
    said = {name: spec[name] for name in SPEC_FIELDS if spec.get(name) is not None}
    wrong += [f"spec.{name}" for name, value in said.items() if not SPEC_FIELDS[name](value)]
    if not is_clone_url(spec.get("clone_url")):
        wrong.append("spec.clone_url")
    if wrong:
        raise StepFailed("rejected", f"the agent does not take this job: {', '.join(wrong)}")
    branch = metadata.get("branch") if is_text(metadata.get("branch")) else ""
    key = JobKey(data["id"], data["attempt"])
    told = (key, data["app"], data["repo"], data["ref"], data["host"], branch, timeout, spec["clone_url"])
    return Job(*told, *read_spec(said), str(data.get("assigned_agent")))


# ---------------------------------------------------------------------------------------------------------------------
# Spool
# Owns: output without its secrets, cut into lines, kept in a file until it is uploaded. Ignores: HTTP, and who writes.


def secret_words(values: Iterable[str]) -> tuple[str, ...]:
    """What a Masker looks for: a value of several lines is printed as several, so each of them is a word of its own."""
    lines = {line.strip() for value in values for line in re.split(r"[\r\n]+", value)}
    return tuple(sorted(line for line in lines if len(line) >= MASK_FROM))


class Masker:
    """Puts *** in the place of words, in text that comes in pieces.

    The end of a piece that may be the start of a word is held back until what follows decides it. Words that overlap are
    masked together, and a word that is the start of another does not give away the rest of that one.
    """

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = words
        self._rest = ""  # held back ...
        self._covered = 0  # ... and how much of it belongs to a word whose *** was passed on before

    def feed(self, piece: str, final: bool = False) -> str:
        if not self._words:
            return piece
        text = self._rest + piece
        held = self._start_of_a_word(text)
        end = len(text) if final else held
        spans = self._found(text)
        if final and end - held >= MASK_FROM:  # its writer was cut off in the middle of it
            spans.append((held, end))
        shown, at = [], self._covered
        for begin, stop in sorted(spans):
            if begin >= end:
                break
            if begin >= at:
                shown += [text[at:begin], "***"]
            at = max(at, stop)
        shown.append(text[at:end])
        self._rest, self._covered = text[end:], max(0, at - end)
        return "".join(shown)

    def _found(self, text: str) -> list[tuple[int, int]]:
        """Where words begin and end, those that overlap as well."""
        spans = []
        for word in self._words:
            at = text.find(word)
            while at >= 0:
                spans.append((at, at + len(word)))
                at = text.find(word, at + 1)
        return spans

    def _start_of_a_word(self, text: str) -> int:
        """Where the longest end of the text begins that is a start of a word, and not the whole of it."""
        line = text[text.rfind("\n") + 1 :]

        def overlap(word: str) -> int:
            longest = min(len(word) - 1, len(line))
            return next((size for size in range(longest, 0, -1) if line.endswith(word[:size])), 0)

        return len(text) - max(map(overlap, self._words))


class LineCutter:
    """Bytes to messages. Keeps what has no newline yet, and never cuts a character in two, or a secret."""

    def __init__(self, words: tuple[str, ...] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._masker = Masker(words)
        self._rest = ""

    def feed(self, data: bytes, final: bool = False) -> list[str]:
        text = self._masker.feed(self._decoder.decode(data, final), final)
        *lines, self._rest = (self._rest + text).split("\n")
        if max(map(len, lines), default=0) * 4 > LINE_LIMIT:
            lines = [piece for line in lines for piece in self._pieces(line)]
        *full, self._rest = self._pieces(self._rest)
        return lines + full

    def flush(self) -> list[str]:
        """What stands without a newline."""
        rest, self._rest = self._rest, ""
        return [rest] if rest else []

    @staticmethod
    def _pieces(line: str) -> list[str]:
        """At least one piece, none longer than LINE_LIMIT in UTF-8."""
        pieces = []
        while len(line) * 4 > LINE_LIMIT and len(raw := line.encode()) > LINE_LIMIT:
            pieces.append(raw[:LINE_LIMIT].decode("utf-8", "ignore"))
            line = line[len(pieces[-1]) :]
        return [*pieces, line]


TO_JSON = json.JSONEncoder(ensure_ascii=False).encode


class Spool:
    """The messages of one attempt in a file, each a JSON list (message, level, time) on a line; `offset` counts those that are acknowledged.

    One thread writes, one reads. The file outlives the agent, so that a killed one loses no output. It holds no word of
    `words`. Its first line is the one that the controller counts as `first`: of an attempt that goes up again, as a
    controller that was restored asks for its result once more, the lines before are gone. So they are where a file grew to
    SPOOL_ANEW, was acknowledged whole, and was begun anew: such a one starts with {"first": N}.
    """

    def __init__(
        self,
        path: Path,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        words: tuple[str, ...] = (),
        first: int = 0,
    ) -> None:
        self._path, self._now, self._clock = path, now, clock
        # Guards _end, _position, _since, _moved and _closed. The uploader waits in batch() for lines, the worker in room() for
        # the uploader; every write, seek() and close() wakes them.
        self._ready = threading.Condition()
        self._words = words
        self._cutter = LineCutter(words)
        self._partial_since: float | None = None  # when the line that has no newline yet began
        self._dropping = False  # the newest output was not kept
        self._closed = False
        self.last = ""  # the newest line of output: of a command that did not start it has the cause
        self._bridge: bytes | None = None  # the line before the first one, which stands for those that are gone
        self._open(first)
        self._since = 0.0 if self._end > self._position else None  # when the oldest line came that no batch has seen
        self._moved = self._clock()  # when the controller took a line, or the oldest that it did not take came

    def _open(self, first: int) -> None:
        self._writer = open(self._path, "ab", buffering=0)  # noqa: SIM115 - both live as long as the spool
        self._reader = open(self._path, "rb")  # noqa: SIM115
        self._end = self._cut_torn_end()
        head = self._reader.readline() if self._end else b""
        found = re.fullmatch(rb'\{"first": (\d+)\}\n', head)
        self._first = self.offset = int(found[1]) if found else first
        self._begin = self._position = len(head) if found else 0  # of all lines; of those that are not acknowledged
        self._ahead = self.offset, self._position  # where the controller is when it has taken the newest batch

    def _cut_torn_end(self) -> int:
        """An agent that died while it wrote may have left half a line."""
        size = end = os.fstat(self._writer.fileno()).st_size
        while end and os.pread(self._reader.fileno(), 1, end - 1) != b"\n":
            end -= 1
        if end < size:
            self._writer.truncate(end)
        return end

    # For the writer.

    def room(self, timeout: float) -> bool:
        """Waits at most `timeout` for the time to read more of a script's output; False while the script is to be held back."""
        deadline = self._clock() + timeout
        with self._ready:
            while (held := self._is_held()) and (left := deadline - self._clock()) > 0:
                self._ready.wait(left)
            return not held

    def _is_held(self) -> bool:
        """Called with _ready held."""
        ahead = self._end - self._position
        far = ahead >= HELD_FROM or (ahead > 0 and self._end >= SPOOL_ANEW)
        return far and self._clock() - self._moved < HELD_FOR

    def write(self, data: bytes) -> None:
        """Output of a script, as it comes."""
        if self._end >= SPOOL_ANEW:
            self._begin_anew()
        if self._end >= SPOOL_LIMIT:
            return self._drop()
        if self._dropping:  # goes on with a whole line: the rest of one may be the rest of a secret
            _, newline, data = data.partition(b"\n")
            if not newline:
                return
            self._dropping = False
        messages = self._cutter.feed(data)
        self._store(messages)
        self.last = messages[-1] if messages else self.last
        if messages or self._partial_since is None:
            self._partial_since = self._clock()

    def _begin_anew(self) -> None:
        """Where all is acknowledged. The file is replaced whole, so that an agent that is killed meanwhile can count its lines."""
        with self._ready:
            if self._position < self._end:
                return
            try:
                write_whole(self._path, f'{{"first": {self.offset}}}\n', sync=False)
            except OSError as error:
                return log.error("%s cannot be begun anew: %s", self._path, one_line(error))
            self._writer.close()
            self._reader.close()
            self._bridge = None
            self._open(0)

    def _drop(self) -> None:
        if not self._dropping:
            self._dropping = True
            self.end_output()
            self.say(f"{SPOOL_LIMIT >> 20} MiB wait for the controller: output is not kept from here until it is back", "warning")

    def idle(self) -> None:
        """To be called every TICK: lets go of a line that waits too long for its end."""
        if self._partial_since is not None and self._clock() - self._partial_since >= PARTIAL_AFTER:
            self._partial_since = None
            self._store(self._cutter.flush())

    def end_output(self) -> None:
        """One command is done: what the next one prints starts a line of its own."""
        self._partial_since = None
        self._store(self._cutter.feed(b"", final=True) + self._cutter.flush())

    def say(self, text: str, level: str = "info") -> None:
        """A line of the agent's own."""
        self._store([f"[deploybot] {one_line(self.masked(text))}"], level)

    def masked(self, text: str) -> str:
        """For what is told about the output elsewhere, as in the result."""
        return Masker(self._words).feed(text, final=True)

    def close(self) -> None:
        self.end_output()
        with self._ready:
            self._closed = True
            self._ready.notify_all()

    def _store(self, messages: list[str], level: str = "info") -> None:
        for at in range(0, len(messages), BODY_LINES):  # a read of short lines is many times its size by now
            self._append(self._lines(messages[at : at + BODY_LINES], level))

    def _append(self, data: bytes) -> None:
        try:
            if self._writer.write(data) != len(data):
                raise OSError("the disk is full")
        except OSError as error:  # costs the log, not the deployment
            log.error("output is lost: %s", one_line(error))
            self._writer.truncate(self._end)
            return
        with self._ready:
            if self._position == self._end:
                self._moved = self._clock()
            self._end += len(data)
            self._since = self._clock() if self._since is None else self._since
            self._ready.notify_all()

    def _lines(self, messages: list[str], level: str) -> bytes:
        tail = f',"{level}","{timestamp(self._now())}"]\n'
        return f"[{f'{tail}['.join(map(TO_JSON, messages))}{tail}".encode()

    # For the reader.

    def batch(self, timeout: float) -> bytes | None:
        """The next lines as JSON, each with its newline, when they are due; empty after `timeout` without; None when all is acknowledged and closed."""
        deadline = self._clock() + timeout
        with self._ready:
            while (pause := self._pause()) > 0 and (left := deadline - self._clock()) > 0:
                self._ready.wait(min(pause, left))
            done = self._closed
            if pause <= 0 and self._position < self._end:
                self._since = None
        if pause > 0:
            return b""
        bridge = self._bridge if self._bridge and self.offset < self._first else b""
        lines = self._read(self._position, BODY_LINES - bool(bridge))
        self._ahead = self.offset + (bridge + lines).count(b"\n"), self._position + len(lines)
        return bridge + lines or (None if done else b"")

    def _pause(self) -> float:
        """Seconds until a batch is due. Called with _ready held."""
        if self._closed or self._end - self._position >= BATCH_BYTES:
            return 0.0
        if self._end <= self._position:
            return float(ANSWER_TIMEOUT)
        return (self._since or 0.0) + BATCH_AFTER - self._clock()

    def _read(self, position: int, count: int) -> bytes:
        """That many lines, fewer where there are no more or a body holds no more."""
        block = os.pread(self._reader.fileno(), min(BODY_BYTES, self._end - position), position)
        rest = block.split(b"\n", count)[-1] if block.count(b"\n") > count else block[block.rfind(b"\n") + 1 :]
        return block.removesuffix(rest)

    def seek(self, offset: int) -> None:
        """Go on at the line that the controller waits for, wherever that is."""
        if offset < self._first - (self._bridge is not None):
            lost, self._first = self._first - offset, offset + 1
            text = f"[deploybot] {lost} line(s) are missing here: the controller lost them, and this host no longer has them"
            self._bridge = self._lines([text], "warning")
        if offset == self._ahead[0]:
            at, position = self._ahead
        elif offset >= self.offset:
            at, position = max(self.offset, min(offset, self._first)), self._position
        else:
            at, position = min(offset, self._first), self._begin
        while at < offset and position < self._end:
            lines = self._read(position, offset - at)
            at, position = at + lines.count(b"\n"), position + len(lines)
        moved = offset > self.offset
        self.offset = offset  # past our end: lines that a full disk took; what comes next follows the controller's
        with self._ready:
            self._position = position
            self._moved = self._clock() if moved else self._moved
            if self._position < self._end and self._since is None:
                self._since = 0.0
            self._ready.notify_all()

    def remove(self) -> None:
        self._writer.close()
        self._reader.close()
        self._path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Journal
# Owns: the tracking files, one a (job, attempt), so that none is started twice. Ignores: what a job does.


class Entry:
    """The tracking file of one attempt: running, then ended (result not acknowledged), then done."""

    def __init__(self, path: Path, data: dict) -> None:
        self._path = path
        self.data = data
        self.key = JobKey(data["job"]["id"], data["job"]["attempt"])

    @property
    def spool_path(self) -> Path:
        return self._path.with_suffix(".log")

    @property
    def result(self) -> dict | None:
        return self.data.get("result")

    def note(self, sync: bool = True, **values: Any) -> None:
        self.data.update(values)
        write_whole(self._path, json.dumps(self.data), sync)

    def end(self, result: dict) -> None:
        self.note(state="ended", result=result)

    def done(self, lines: int) -> None:
        """Acknowledged, with that many lines. The commands go, as they may hold secrets; the key and the result stay."""
        self.data["job"] = {"id": self.key.job_id, "attempt": self.key.attempt}
        self.note(state="done", lines=lines)


class Journal:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def begin(self, job_data: dict, boot: str) -> Entry:
        """Raises OSError where it cannot be written; then the job must not start."""
        entry = Entry(self._path(parse_key(job_data)), {"job": job_data})
        entry.note(state="running", boot=boot)
        return entry

    def find(self, key: JobKey) -> Entry | None:
        return self._load(self._path(key))

    def unfinished(self) -> list[Entry]:
        """What an earlier agent left, oldest first; old files of finished attempts are removed on the way."""
        entries = [(path, self._load(path)) for path in sorted(self._folder.glob("*.json"))]
        finished = [path for path, entry in entries if entry and entry.data["state"] == "done"]
        for path in finished[:-KEEP_ENTRIES] + [path.with_suffix(".log") for path in finished]:
            path.unlink(missing_ok=True)
        return [entry for _, entry in entries if entry and entry.data["state"] != "done"]

    def recent(self, count: int) -> list[Entry]:
        """The attempts that were acknowledged last."""
        paths = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        return [entry for path in paths[-count:] if (entry := self._load(path)) and entry.data["state"] == "done"]

    def _path(self, key: JobKey) -> Path:
        return self._folder / f"{key.job_id}.{key.attempt}.json"

    @staticmethod
    def _load(path: Path) -> Entry | None:
        try:
            return Entry(path, json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:  # it was started; more is not known
            log.error("the tracking file %s is not readable: %s", path, one_line(error))
            job_id, attempt = path.stem.rsplit(".", 1)
            result = {"status": "failed", "reason": "agent_crashed", "error": "the tracking file was not readable"}
            return Entry(path, {"job": {"id": job_id, "attempt": int(attempt)}, "state": "ended", "result": result})


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# Owns: what a command sees of the environment; starting it, following it, ending all that it started. Ignores: what the command is for.


# Settings and secrets of the agent, what systemd tells its service, what git tells a hook that an agent was started from.
PRIVATE = re.compile(
    r"DEPLOYBOT_.*|GIT_(DIR|WORK_TREE|INDEX_FILE|OBJECT_DIRECTORY|ALTERNATE_OBJECT_DIRECTORIES|COMMON_DIR|NAMESPACE|PREFIX)"
    r"|NOTIFY_SOCKET|WATCHDOG_.*|LISTEN_(FDS|PID|FDNAMES)|CREDENTIALS_DIRECTORY|INVOCATION_ID|JOURNAL_STREAM"
)


STANDARD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def git_environment(env: dict[str, str]) -> dict[str, str]:
    """The host's own, as proxies, agents of ssh and credential helpers count."""
    return {name: value for name, value in env.items() if not PRIVATE.fullmatch(name)}


def script_environment(env: dict[str, str], account: Account | None, variables: dict[str, str]) -> dict[str, str]:
    """Made anew: what an agent was started with, secrets of whoever started it among it, is no script's business."""
    home = account.home if account else env.get("HOME") or os.path.expanduser("~")
    user = account.name if account else user_name()
    path, language = env.get("PATH") or STANDARD_PATH, env.get("LANG") or "C.UTF-8"
    return {"PATH": path, "HOME": home, "USER": user, "LANG": language, **variables}


def prctl(option: int, value: int) -> bool:
    """prctl(2); False where there is none."""
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) == 0
    return False


def hide_memory() -> None:
    """PR_SET_DUMPABLE: a script of the same user cannot read the agent's environment or memory, where its tokens are."""
    prctl(4, 0)


class Stat(NamedTuple):
    """The part of /proc/PID/stat that is used; proc(5). `start` is in ticks since boot and tells two owners of a pid apart."""

    state: str
    ppid: int
    pgrp: int
    session: int
    start: int


def read_stat(pid: int) -> Stat | None:
    try:
        raw = (PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    fields = raw[raw.rindex(b")") + 2 :].split()  # the name before it may hold blanks and brackets
    return Stat(fields[0].decode(), int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))


def read_processes() -> dict[int, Stat]:
    try:
        pids = [int(name) for name in os.listdir(PROC) if name.isdigit()]
    except OSError:
        return {}
    return {pid: stat for pid in pids if (stat := read_stat(pid)) is not None}


NOBODYS = "\0"  # a mark that no process can have: for a command that is to be ended alone


def read_mark(pid: int) -> str | None:
    """DEPLOY_JOB_ID as the process was started with it; "" for what cannot be read, None for no mark."""
    try:
        environ = (PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return ""
    found = re.search(rb"(?:^|\0)DEPLOY_JOB_ID=([^\0]*)", environ)
    return found[1].decode("ascii", "replace") if found else None


def boot_id() -> str:
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def send_signal(pid: int, stat: Stat | None, signum: int) -> None:
    """To the process that `stat` is of, and never to another that got its pid since. Without stat: to the group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if stat is None:
            os.killpg(pid, signum)
        elif (now := read_stat(pid)) is not None and now.start == stat.start:
            os.kill(pid, signum)


class Children:
    """The processes that this agent started itself, told apart from those that it adopted.

    As their subreaper the agent becomes the parent of what scripts leave behind, so that even a daemon with an empty
    environment is found. It then also has to collect them when they end.
    """

    def __init__(self) -> None:
        # Guards _own: held over each start, so that reap() never takes the end of a child from the Popen that waits for it.
        self._lock = threading.Lock()
        self._own: set[int] = set()
        self.adopting = False

    def adopt(self) -> None:
        """PR_SET_CHILD_SUBREAPER; without it only marked and related processes are found."""
        self.adopting = prctl(36, 1)

    def start(self, argv: list[str], cwd: Path, env: dict[str, str], account: Account | None) -> subprocess.Popen:
        """With `account` as that user, in its groups and no other, and without any capability of ours."""
        rights = {"user": account.uid, "group": account.gid, "extra_groups": account.groups} if account else {}
        with self._lock:
            process = subprocess.Popen(
                argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                bufsize=0, start_new_session=True, **rights,
            )  # fmt: skip
            self._own.add(process.pid)
        return process

    def wait(self, process: subprocess.Popen) -> int:
        """Its exit code as a shell gives it. It has exited, or does not react to KILL."""
        try:
            code = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return 128 + signal.SIGKILL
        with self._lock:
            self._own.discard(process.pid)
        return code if code >= 0 else 128 - code

    def owns(self, pid: int) -> bool:
        with self._lock:
            return pid in self._own

    def reap(self) -> None:
        for pid, stat in read_processes().items() if self.adopting else ():
            if stat.ppid == os.getpid() and stat.state == "Z":
                with self._lock, contextlib.suppress(ChildProcessError):
                    if pid not in self._own:
                        os.waitpid(pid, os.WNOHANG)


CHILDREN = Children()


class Leader(NamedTuple):
    """The first process of a session that the agent started."""

    pid: int
    start: int


class Family:
    """All processes of one job: those that carry its mark, those in a session of its commands, those that the agent
    adopted from it, and what descends from any of these."""

    def __init__(self, mark: str, sole: bool, leader: Leader | None) -> None:
        self._mark = mark
        self._sole = sole  # no other job can run beside it: what is adopted meanwhile belongs to it
        self._since = 0
        self.leader = leader  # of the command that runs, or that ran last

    def lead(self, pid: int) -> None:
        stat = read_stat(pid)
        self.leader = Leader(pid, stat.start if stat else 0)
        self._since = self._since or self.leader.start

    def members(self) -> dict[int, Stat | None]:
        """Living ones. A zombie is not: it does nothing any more. Without /proc only the process group is known."""
        if not PROC.is_dir():
            return {self.leader.pid: None} if self.leader and self._group_lives(self.leader.pid) else {}
        table = read_processes()
        session = self._session(table)
        found = {pid for pid, stat in table.items() if self._belongs(pid, stat, session)}
        while more := {pid for pid, stat in table.items() if stat.ppid in found and pid not in found}:
            found |= more
        return {pid: table[pid] for pid in found if table[pid].state not in "ZX" and pid != os.getpid()}

    def _belongs(self, pid: int, stat: Stat, session: int | None) -> bool:
        if session in (stat.session, stat.pgrp):
            return True
        mark = read_mark(pid)
        if mark is None and self._sole and CHILDREN.adopting and stat.ppid == os.getpid() and not CHILDREN.owns(pid):
            return 0 < self._since <= stat.start
        return mark == self._mark

    def _session(self, table: dict[int, Stat]) -> int | None:
        """A session is named by its leader's pid; that number means it only while it is the leader's."""
        if self.leader and self.leader.pid in table and table[self.leader.pid].start == self.leader.start:
            return self.leader.pid
        return None

    @staticmethod
    def _group_lives(pgid: int) -> bool:
        try:
            os.killpg(pgid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True


class Ending:
    """TERM to all of a family now, KILL after the grace, until none is left."""

    def __init__(self, family: Family, grace: float, clock: Callable[[], float]) -> None:
        self._family, self._clock = family, clock
        self._kill_at = clock() + grace
        self._told: set[tuple[int, Stat | None]] = set()

    def step(self) -> bool:
        """True when it is over. What was forked since the last step gets its TERM now."""
        members = self._family.members()
        now = self._clock()
        for pid, stat in members.items():
            start = (pid, stat and stat.start)
            if now >= self._kill_at:
                send_signal(pid, stat, signal.SIGKILL)
            elif start not in self._told:
                self._told.add(start)
                send_signal(pid, stat, signal.SIGTERM)
        if members and now >= self._kill_at + KILL_PATIENCE:
            log.error("processes that cannot be ended: %s", " ".join(map(str, sorted(members))))
            return True
        return not members


class Output:
    """The reading end of a command's pipe. `sink` has write(bytes), idle() and room(timeout)."""

    def __init__(self, pipe: Any, sink: Any) -> None:
        self._fd, self._sink = pipe.fileno(), sink
        self.open = True
        os.set_blocking(self._fd, False)
        with contextlib.suppress(OSError, AttributeError):  # a pipe of the usual size does as well
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def wanted(self, timeout: float) -> bool:
        """False when after `timeout` there still is no room for more: then the command waits, as its pipe is full."""
        return self._sink.room(timeout)

    def pump(self, timeout: float, exit_fd: int | None = None) -> None:
        """Waits for output, or for the exit that `exit_fd` tells, at most `timeout`; passes on what is there."""
        watched = [fd for fd in (self._fd if self.open else None, exit_fd) if fd is not None]
        ready = select.select(watched, [], [], timeout)[0]
        if self._fd in ready:
            self._read()
        self._sink.idle()

    def pump_on(self, patience: float) -> None:
        """Until the end of the output, but not for ever: children of a command may hold its pipe."""
        deadline = time.monotonic() + patience
        while self.open and (left := deadline - time.monotonic()) > 0:
            self.pump(min(left, TICK))

    def _read(self) -> None:
        try:
            data = os.read(self._fd, PIPE_BYTES)
        except BlockingIOError:
            return
        self.open = bool(data)
        if data:
            self._sink.write(data)


def peek_exit(process: subprocess.Popen) -> int | None:
    """None while it runs, 0 when it succeeded. It stays a zombie where that can be had, so that its pid keeps naming its
    session until all of that is ended."""
    if not hasattr(os, "waitid"):
        return process.poll()
    info = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    return info and (info.si_status if info.si_code == os.CLD_EXITED else 128 + info.si_status)


class Runner:
    """Runs the commands of one job, one after another, and leaves nothing of one that did not succeed."""

    def __init__(self, family: Family, grace: float, clock: Callable[[], float], on_start: Callable[[], None]) -> None:
        self._family, self._grace, self._clock, self._on_start = family, grace, clock, on_start

    def run(
        self, argv: list[str], cwd: Path, env: dict[str, str], sink: Any, limits: Limits, account: Account | None = None
    ) -> int:
        """Its exit code. Raises Stopped when its limits ended it, OSError when it does not start."""
        limits.check()
        process = CHILDREN.start(argv, cwd, env, account)
        self._family.lead(process.pid)
        try:
            self._on_start()
            cause = self._follow(process, Output(process.stdout, sink), limits)
        except BaseException:
            self.end(lambda: time.sleep(TICK))
            raise
        finally:
            process.stdout.close()
            code = CHILDREN.wait(process)
        if cause:
            raise Stopped(cause)
        return code

    def _follow(self, process: subprocess.Popen, output: Output, limits: Limits) -> str | None:
        cause = self._wait(process, output, limits)
        if cause is None:
            output.pump_on(DRAIN)
            if peek_exit(process) == 0:
                return None
        self.end(lambda: output.pump_on(TICK) or time.sleep(0 if output.open else TICK))
        output.pump(0.0)
        return cause

    def _wait(self, process: subprocess.Popen, output: Output, limits: Limits) -> str | None:
        try:
            exit_fd = os.pidfd_open(process.pid)
        except (AttributeError, OSError):  # the exit is then seen at the next tick
            exit_fd = None
        try:
            while peek_exit(process) is None:
                if cause := limits.cause():
                    return cause
                if output.wanted(TICK):
                    output.pump(TICK, exit_fd)
            return None
        finally:
            if exit_fd is not None:
                os.close(exit_fd)

    def end(self, between: Callable[[], None]) -> None:
        """Ends all processes of the job; `between` is called between two looks, and takes a moment."""
        ending = Ending(self._family, self._grace, self._clock)
        while not ending.step():
            between()


# ---------------------------------------------------------------------------------------------------------------------
# Git
# Owns: the bare mirror of one app: fetch, resolve, check out. Ignores: releases, `current`, and the scripts.

# The host's own configuration counts (credentials, proxies, insteadOf), but not what would run code, prompt or surprise.
GIT_SETTINGS = (
    "core.hooksPath=/dev/null", "core.fsmonitor=false", "core.autocrlf=false", "gc.autoDetach=false",
    "maintenance.autoDetach=false", "submodule.recurse=false", "advice.detachedHead=false",
)  # fmt: skip
LFS_SETTINGS = (
    "filter.lfs.process=git-lfs filter-process", "filter.lfs.smudge=git-lfs smudge -- %f", "filter.lfs.required=true",
)  # fmt: skip
NOT_ALLOWED = re.compile(rf"transport '({'|'.join(GIT_PROTOCOLS)})' not allowed")
# Branches and tags, and nothing else: a forge also serves the commits of forks, by SHA and under refs/pull.
REFSPECS = ("+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*")


class GitError(Exception):
    """What git said."""


class Capture:
    """Keeps the start of what a command says, without the passwords that a host's insteadOf may put into URLs."""

    def __init__(self) -> None:
        self._data = b""

    def write(self, data: bytes) -> None:
        self._data = (self._data + data)[:CAPTURE_LIMIT]

    def idle(self) -> None:
        pass

    def room(self, timeout: float) -> bool:
        return True

    def text(self) -> str:
        return without_passwords(self._data.decode("utf-8", "replace")).strip()


class Resolved(NamedTuple):
    commit: str
    branch: str  # "" where the ref names none


class Mirror:
    """repo.git of one app. Its owner holds the app's lock, so a lock file of git's in it is one that a dead git left."""

    def __init__(self, path: Path, url: str, run: Callable[..., int], env: dict[str, str]) -> None:
        self._path, self._url, self._run, self._env = path, url, run, env
        self._settings = GIT_SETTINGS + (LFS_SETTINGS if shutil.which("git-lfs", path=env.get("PATH")) else ())
        self._marker = path / "deploybot.json"  # how the mirror was fetched; there once a first fetch was complete

    def fetch(self) -> None:
        """Raises GitError. Without blobs where the remote can do that: a checkout then fetches those that it needs."""
        state = self._state()
        if state.get("url") == self._url:
            self._clear_locks()
            try:
                return self._fetch(state["partial"])
            except GitError:  # where the remote answers it is the mirror that is broken, as after a power cut
                self._git("ls-remote", "--quiet", "origin", "HEAD")
        try:
            self._build(partial=True)
        except GitError:
            self._build(partial=False)

    def resolve(self, ref: str) -> Resolved:
        """A branch, a tag, or a commit that one of them reaches. Raises GitError."""
        for name, branch in self._candidates(ref):
            if commit := self._verify(name):
                return Resolved(commit, branch)
        commit = self._verify(ref) if re.fullmatch(r"[0-9a-fA-F]{4,64}", ref) else None
        if commit is None:
            raise GitError(f"{without_passwords(self._url)} has no branch, tag or commit {ref}")
        if not self._git("for-each-ref", "--count=1", f"--contains={commit}", "refs/heads", "refs/tags"):
            raise GitError(f"no branch or tag of {without_passwords(self._url)} reaches {ref}")
        return Resolved(commit, "")

    def check_out(self, commit: str, folder: Path) -> None:
        """Plain files, no .git. Raises GitError."""
        place = {"GIT_WORK_TREE": str(folder), "GIT_INDEX_FILE": str(self._path / "deploybot.index")}
        try:
            self._read_tree(commit, folder, place)
        except GitError:
            if not self._state().get("partial"):
                raise
            self._build(partial=False)  # a remote that takes the filter and then does not hand out single blobs
            self._read_tree(commit, folder, place)
        if not (folder / ".gitmodules").exists():
            return
        try:
            self._update_submodules(folder, place)
        except GitError:
            # A clone that was interrupted, or that is of another place, stays broken until it is made anew.
            remove_tree(self._path / "modules")
            self._read_tree(commit, folder, place)
            self._update_submodules(folder, place)

    def remember(self, release: str, commit: str) -> None:
        """A ref for each release: the way back knows its commit, and git keeps the objects."""
        self._git("update-ref", f"refs/deploybot/{release}", commit)

    def recall(self, release: str) -> str | None:
        return self._verify(f"refs/deploybot/{release}") or self._verify(release.rpartition("-")[2])

    def forget(self, release: str) -> None:
        self._git("update-ref", "-d", f"refs/deploybot/{release}")

    @staticmethod
    def _candidates(ref: str) -> list[tuple[str, str]]:
        if FULL_REF.fullmatch(ref):
            return [(ref, ref.removeprefix("refs/heads/") if ref.startswith("refs/heads/") else "")]
        if HEX.fullmatch(ref.lower()):
            return []  # a whole SHA is one, whatever branches are called
        return [(f"refs/heads/{ref}", ref), (f"refs/tags/{ref}", "")]

    def _verify(self, name: str) -> str | None:
        """The commit in full, and nothing that is not hex goes on from here."""
        try:
            said = self._git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        except GitError:
            return None
        return said if HEX.fullmatch(said) else None

    def _state(self) -> dict:
        """{} for a mirror that is to be made anew. Its configuration can name commands, so another user's is none of ours."""
        try:
            if self._path.lstat().st_uid != os.geteuid():
                return {}
            return json.loads(self._marker.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def _clear_locks(self) -> None:
        for pattern in ("*.lock", "refs/**/*.lock", "objects/info/*.lock", "modules/**/*.lock"):
            for path in self._path.glob(pattern):
                path.unlink(missing_ok=True)

    def _build(self, partial: bool) -> None:
        remove_tree(self._path)
        self._path.mkdir(parents=True, mode=0o700)  # history and other branches are nobody else's to read
        self._git("init", "--quiet", "--bare", "--template=")
        self._git("config", "remote.origin.url", self._url)
        self._fetch(partial)
        self._marker.write_text(json.dumps({"url": self._url, "partial": partial}), encoding="utf-8")

    def _fetch(self, partial: bool) -> None:
        how = ["--filter=blob:none"] if partial else []
        what = ("--quiet", "--prune", "--no-tags", "--no-recurse-submodules", *how, "origin", *REFSPECS)
        # Over dumb HTTP a fetch that lacks an object would start the same fetch again, without end.
        self._git("fetch", *what, env={"GIT_NO_LAZY_FETCH": "1"})

    def _read_tree(self, commit: str, folder: Path, place: dict[str, str]) -> None:
        for path in (folder, Path(place["GIT_INDEX_FILE"])):
            remove_tree(path)
        folder.mkdir()
        self._git("read-tree", "-u", "--reset", commit, cwd=folder, env=place)

    def _update_submodules(self, folder: Path, place: dict[str, str]) -> None:
        self._git("submodule", "--quiet", "sync", cwd=folder, env=place)
        self._git("submodule", "--quiet", "update", "--init", "--recursive", "--force", cwd=folder, env=place)
        for path, _, files in os.walk(folder):
            if ".git" in files:
                os.unlink(os.path.join(path, ".git"))

    def _git(self, *args: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        settings = [word for setting in self._settings for word in ("-c", setting)]
        said = Capture()
        variables = {**self._env, "GIT_DIR": str(self._path), **(env or {})}
        code = self._run(["git", *settings, *args], cwd or self._path, variables, said)
        if code != 0:
            hint = "; allow it with --git-protocols / DEPLOYBOT_GIT_PROTOCOLS on the agent"
            more = hint if NOT_ALLOWED.search(said.text()) else ""
            raise GitError(f"git {args[0]} ended with exit code {code}: {said.text() or 'no message'}{more}")
        return said.text()


# ---------------------------------------------------------------------------------------------------------------------
# Health
# Owns: asking until an answer is good often enough, and what of it is told. Ignores: what follows from it.


class Verdict(NamedTuple):
    cause: str | None  # None: it passed
    detail: str = ""  # the first words of a bad answer, which may differ each time


def first_words(text: str) -> str:
    return one_line(text)[:HEALTH_SHOWN].rstrip()


def without_query(url: str) -> str:
    """For a log: what comes behind the ? may be a secret."""
    return url.partition("?")[0].partition("#")[0]


class Request:
    """One GET, in a thread of its own: neither a resolver nor a server that sends a byte a second keeps to a timeout.

    No redirect is followed: it could lead to another host, or to a page that is always there.
    """

    def __init__(self, url: str, timeout: float) -> None:
        parts = urllib.parse.urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname, parts.port, timeout=timeout)
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self.verdict = Verdict("no answer in time")
        self.done = threading.Event()
        threading.Thread(target=self._work, name="health", daemon=True).start()

    def _work(self) -> None:
        try:
            self._ask()
        except TimeoutError:
            pass
        except Exception as error:  # also what a connection says that was hung up meanwhile
            if self.verdict.cause == "no answer in time":
                self.verdict = Verdict(one_line(error) or type(error).__name__)
        finally:
            self._connection.close()
            self.done.set()

    def _ask(self) -> None:
        headers = {"User-Agent": f"deploybot-agent/{VERSION}", "Connection": "close"}
        self._connection.request("GET", self._target, headers=headers)
        response = self._connection.getresponse()
        said = one_line(f"{response.status} {response.reason}")
        if 300 <= response.status < 400:
            said += " (redirects are not followed)"
        self.verdict = Verdict(None if 200 <= response.status < 300 else said)
        if self.verdict.cause:
            self.verdict = Verdict(said, response.read1(HEALTH_BODY).decode("utf-8", "replace"))

    def hang_up(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self._connection.sock.shutdown(socket.SHUT_RDWR)


def ask_url(url: str, limits: Limits) -> Verdict:
    patience = min(HEALTH_ANSWER, max(TICK, limits.deadline - limits.clock()))
    request, until = Request(url, patience), limits.clock() + patience
    while not request.done.wait(TICK) and limits.clock() < until and limits.cause() is None:
        pass
    verdict = request.verdict  # before a connection that is hung up says so
    request.hang_up()
    return verdict


class Watch:
    """One health check, from its first question to its end."""

    def __init__(self, check: HealthCheck, ask: Callable[[Limits], Verdict], spool: Spool, limits: Limits) -> None:
        self._check, self._ask, self._spool, self._limits = check, ask, spool, limits
        self._told: str | None = None  # the newest cause that the log has
        self._lines = 0

    def run(self) -> None:
        """Raises StepFailed with the last cause, or Stopped where the job's own limits ended it."""
        check, clock = self._check, self._limits.clock
        begun = at = clock()
        end = begun + check.timeout
        mine = Limits(self._limits.stop, min(end, self._limits.deadline), clock)
        passed, before = 0, Verdict(None)
        while True:
            verdict = self._ask(mine)
            self._limits.check()
            if verdict.cause and before.cause and clock() >= end:
                verdict = before  # the last question was cut short: that is not what is wrong
            before = verdict
            passed = 0 if verdict.cause else passed + 1
            if passed >= check.success:
                return self._spool.say(f"health check: passed after {clock() - begun:.1f} s")
            self._tell(verdict)
            at = max(at + check.interval, clock() + TICK)
            if at >= end:
                raise StepFailed("health_check", self._failure(verdict, passed))
            self._wait(at)

    def _tell(self, verdict: Verdict) -> None:
        if verdict.cause and verdict.cause != self._told and self._lines < HEALTH_LINES:
            self._lines += 1
            self._spool.say(f"health check: {self._words(verdict)}", "warning")
        self._told = verdict.cause

    def _failure(self, verdict: Verdict, passed: int) -> str:
        cause = self._words(verdict) if verdict.cause else f"it passed {passed} of {self._check.success} times in a row"
        return f"the health check did not pass within {self._check.timeout:g} s: {cause}"

    def _words(self, verdict: Verdict) -> str:
        """Masked before it is cut: half of a secret would not be known as one."""
        words = (first_words(self._spool.masked(text)) for text in (verdict.cause or "", verdict.detail))
        return ": ".join(filter(None, words))

    def _wait(self, until: float) -> None:
        while (left := until - self._limits.clock()) > 0:
            self._limits.check()
            time.sleep(min(left, TICK))


# ---------------------------------------------------------------------------------------------------------------------
# Releases
# Owns: WORKDIR/APP: the locks, releases/TIME-SHORTSHA, the `current` link. Ignores: git and scripts.


def hand_over(tree: Path, account: Account) -> None:
    """Makes all in it the account's, links themselves and not what they lead to. From the leaves to the root: a folder is its
    own only after what is in it, so that it can swap nothing under our feet."""
    for _, folders, files, descriptor in os.fwalk(tree, topdown=False):
        for name in folders + files:
            os.chown(name, account.uid, account.gid, dir_fd=descriptor, follow_symlinks=False)
    os.chown(tree, account.uid, account.gid, follow_symlinks=False)


class Ledger:
    """releases.json: {NAME: {"commit": HEX, "succeeded": MOMENT or null}}, the moment at which a job with it last succeeded.

    Written by the holder of the app's lock alone. A release that is not in it was made by an earlier version, which kept none
    that failed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, dict]:
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
            return {name: {"commit": entry["commit"], "succeeded": entry["succeeded"]} for name, entry in data.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
            log.error("%s is not readable: %s", self._path, one_line(error))
            return {}

    def note(self, name: str, **values: str | None) -> None:
        entries = self.read()
        entries[name] = {"commit": None, "succeeded": None} | entries.get(name, {}) | values
        write_whole(self._path, json.dumps(entries))

    def drop(self, names: Iterable[str]) -> None:
        entries = self.read()
        gone = [name for name in names if entries.pop(name, None)]
        if gone:
            write_whole(self._path, json.dumps(entries))


def moment(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%S%f")[:-3] + "Z"


class AppFolder:
    """`host` names who else may run this app on this machine: agents with other folders, of the same host at its controller."""

    def __init__(self, path: Path, now: Callable[[], float], host: str, account: Account | None = None) -> None:
        self.path, self._now, self._account = path, now, account
        self._name = f"{host} {path.name}"
        self.current = path / "current"
        self._releases = path / "releases"
        self.ledger = Ledger(path / "releases.json")
        self._releases.mkdir(parents=True, exist_ok=True)

    def _check_owner(self) -> None:
        """Scripts may enter, and change nothing but their release. Raises StepFailed where the folders are not the agent's."""
        for folder in (self.path, self._releases):
            found = folder.lstat()
            if folder.is_symlink() or found.st_uid != os.geteuid():
                owner = user_name()
                raise StepFailed("rejected", f"{folder} must be {owner}'s own folder: chown {owner}: {folder}")
            folder.chmod(0o755)

    @contextlib.contextmanager
    def locked(self, limits: Limits, on_wait: Callable[[], None]) -> Iterator[None]:
        """Keeps two jobs of the app apart, whatever agents run them: by the file those of this folder, by the name those of
        this machine. Raises Stopped when the limits come first."""
        if self._account:
            self._check_owner()
        with contextlib.ExitStack() as held:
            for take, close in ((self._take_file, os.close), (self._take_name, socket.socket.close)):
                while (taken := take()) is None:
                    limits.check()
                    on_wait()
                    time.sleep(TICK)
                held.callback(close, taken)
            yield

    def _take_file(self) -> int | None:
        return take_lock(self.path / "lock")

    def _take_name(self) -> socket.socket | None:
        return take_name(self._name)

    def hand_over(self, release: Path) -> None:
        if self._account:
            hand_over(release, self._account)

    def new_name(self, commit: str) -> str:
        """Of a release that is not there yet. It is noted before add() makes it, so that whoever comes after a crash knows of it."""
        now = self._now()
        while True:
            name = f"{moment(now)}-{commit[:12]}"
            if not (self._releases / name).exists():
                return name
            now += 0.001

    def add(self, name: str, commit: str | None = None) -> Path:
        self.ledger.note(name, commit=commit)
        release = self._releases / name
        release.mkdir()
        return release

    def release(self, name: str | None) -> Path | None:
        """The release of that name, if it is still there."""
        path = self._releases / name if name else None
        return path if path and path.is_dir() else None

    def find(self, commit: str) -> Path | None:
        """The newest release of that commit that succeeded, if it is still there and the scripts' own."""
        owner = self._account.uid if self._account else os.geteuid()
        entries = [(entry["succeeded"], name) for name, entry in self.ledger.read().items() if entry["commit"] == commit]
        paths = [self.release(name) for succeeded, name in sorted(filter(all, entries), reverse=True)]
        return next((path for path in paths if path and path.lstat().st_uid == owner), None)

    def commit_of(self, release: Path) -> str | None:
        return self.ledger.read().get(release.name, {}).get("commit")

    def succeeded(self, release: Path) -> None:
        self.ledger.note(release.name, succeeded=moment(self._now()))

    def unknown(self) -> list[str]:
        """Releases that the ledger has not."""
        known = self.ledger.read()
        return [path.name for path in self._releases.iterdir() if path.is_dir() and path.name not in known]

    def active(self) -> Path | None:
        """The release that `current` leads to."""
        try:
            target = self.path / os.readlink(self.current)
        except OSError:
            return None
        return target if target.parent == self._releases and target.is_dir() else None

    def switch(self, release: Path | None) -> None:
        """At every moment `current` leads to the old or to the new one. None: as before the first deployment."""
        if release is None:
            self.current.unlink(missing_ok=True)
        else:
            scratch = self.path / "current.new"
            scratch.unlink(missing_ok=True)
            scratch.symlink_to(os.path.join("releases", release.name))
            os.replace(scratch, self.current)
        sync_folder(self.path)

    def prune(self, keep: set[Path], count: int) -> list[str]:
        """Removes what failed, and what succeeded but the newest `count`; never `keep`. The names of what went, now or before."""
        known = self.ledger.read()

        def last(path: Path) -> str:
            return known.get(path.name, {}).get("succeeded") or ""

        releases = [path for path in self._releases.iterdir() if path.is_dir()]
        good = sorted(filter(last, releases), key=last)
        old = set(releases) - set(good[-count:]) - keep
        for path in old:
            remove_tree(path)
        gone = [name for name in {*known, *(path.name for path in old)} if self.release(name) is None]
        self.ledger.drop(gone)
        return gone


def commit_in_force(path: Path) -> str | None:
    """What `current` of that app's folder is, by the agent's own notes."""
    if not (path / "current").is_symlink():
        return None
    folder = AppFolder(path, time.time, "")
    release = folder.active()
    return folder.commit_of(release) if release else None


# ---------------------------------------------------------------------------------------------------------------------
# Shared
# Owns: WORKDIR/APP/shared, and the links to it in a release. Ignores: what is kept there.

FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def entry_at(folder: int, name: str) -> os.stat_result | None:
    """Of a link the link itself."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def clear_entry(folder: int, name: str) -> None:
    found = entry_at(folder, name)
    if found and S_ISDIR(found.st_mode):
        shutil.rmtree(name, dir_fd=folder)
    elif found:
        os.unlink(name, dir_fd=folder)


def move_entry(source: int, folder: int, name: str) -> None:
    try:
        os.rename(name, name, src_dir_fd=source, dst_dir_fd=folder)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        raise StepFailed("rejected", f"shared {name}: that place is on another disk: make it there by hand") from error


class Shared:
    """What the releases of one app have in common.

    A commit may hold links, and what is shared belongs to the account of the scripts, who can change it at any moment. So
    every step goes by descriptors and follows no link; and what is made is made in `shared.new`, where only the agent gets,
    handed over there, and then moved into its place: nothing that others put there is ever handed over.
    """

    def __init__(self, app: Path, account: Account | None, say: Callable[[str, str], None]) -> None:
        self._app, self._account, self._say = app, account, say
        self._home, self._scratch = app / "shared", app / "shared.new"

    def link(self, release: Path, paths: Iterable[str], fresh: bool) -> None:
        """`fresh`: the release is still the agent's own, to be handed over as a whole. Raises StepFailed."""
        with contextlib.ExitStack() as opened:
            opened.callback(remove_tree, self._scratch)
            remove_tree(self._scratch)
            self._scratch.mkdir(mode=0o700)
            scratch = self._open(opened, self._scratch, [], "")
            self._make(scratch, self._open(opened, self._app, [], ""), "shared", give=True)
            for path in paths:
                self._link(scratch, release, path, fresh)

    def _link(self, scratch: int, release: Path, path: str, fresh: bool) -> None:
        *parents, name = path.removesuffix("/").split("/")
        target = os.path.join(*[".."] * (len(parents) + 2), "shared", *parents, name)
        with contextlib.ExitStack() as opened:
            here = self._open(opened, release, parents, path, scratch, give=not fresh)
            there = self._open(opened, self._home, parents, path, scratch, give=True)
            if entry_at(there, name) is None:
                self._fill(scratch, here, there, name, path.endswith("/"), fresh)
            if not self._leads(here, name, target):
                clear_entry(here, name)
                os.symlink(target, name, dir_fd=here)
            if entry_at(there, name) is None:
                self._say(f"shared {path} is not there yet: {self._home / path}", "warning")

    def _open(
        self, opened: contextlib.ExitStack, base: Path, names: list[str], path: str, scratch: int = -1, give: bool = False
    ) -> int:
        """A descriptor of the folder below `base`, made where it is missing."""
        folder, at = -1, base
        for name in ["", *names]:
            at = at / name
            try:
                if name:
                    self._make(scratch, folder, name, give)
                folder = os.open(name or base, FOLDER, dir_fd=folder if name else None)
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                    raise
                raise StepFailed("rejected", f"shared {path}: {at} must be a folder, and no link") from error
            opened.callback(os.close, folder)
        return folder

    def _make(self, scratch: int, folder: int, name: str, give: bool) -> None:
        if entry_at(folder, name) is None:
            os.mkdir(name, 0o755, dir_fd=scratch)
            self._give(name, give)
            move_entry(scratch, folder, name)

    def _give(self, name: str, give: bool) -> None:
        if self._account and give:
            hand_over(self._scratch / name, self._account)

    def _fill(self, scratch: int, here: int, there: int, name: str, folder: bool, fresh: bool) -> None:
        """What the first release brings becomes the shared one."""
        found = entry_at(here, name)
        if found and (S_ISDIR(found.st_mode) or (S_ISREG(found.st_mode) and not folder)):
            if not fresh:  # it is the account's already, who may have put there what it has no right to
                return move_entry(here, there, name)
            move_entry(here, scratch, name)
            self._give(name, True)
            move_entry(scratch, there, name)
        elif folder:
            self._make(scratch, there, name, give=True)

    @staticmethod
    def _leads(folder: int, name: str, target: str) -> bool:
        try:
            return os.readlink(name, dir_fd=folder) == target
        except OSError:
            return False


# ---------------------------------------------------------------------------------------------------------------------
# Deployment
# Owns: the steps of one job and its way back; makes the result. Ignores: HTTP, heartbeats, other jobs.

CAUSES = {
    "cancelled": ("cancelled", "cancelled", "cancelled"),
    "stopped": ("cancelled", "cancelled", "the agent was stopped"),
    "fenced": ("cancelled", "cancelled", "the controller gave this job up"),
    "timeout": ("failed", "timeout", "the timeout of {timeout:g} s is over"),
}
CONVENTION = ".deploybot/deploy"
# Exit codes of a shell for a command that does not start.
NOT_STARTED = {126: "is it executable?", 127: "is it there, and what its #! line names?"}


@dataclass
class Machine:
    """What a deployment needs of the agent and its host; a test puts its own clock and environment in."""

    workdir: Path
    git_protocols: str
    env: dict[str, str]
    slots: int = 1
    allow_repos: tuple[str, ...] = ()
    account: Account | None = None
    variables: dict[str, str] = field(default_factory=dict)
    grace: float = KILL_GRACE
    now: Callable[[], float] = time.time
    clock: Callable[[], float] = time.monotonic


class Deployment:
    """One attempt at one job. `on_commit` is told the commit as soon as it is known, `on_switch` that `current` leads elsewhere."""

    def __init__(
        self,
        job: Job,
        entry: Entry,
        spool: Spool,
        stop: Stop,
        machine: Machine,
        on_commit: Callable[[str], None],
        on_switch: Callable[[], None] = lambda: None,
    ) -> None:
        self._job, self._entry, self._spool, self._machine = job, entry, spool, machine
        self._on_commit, self._on_switch = on_commit, on_switch
        same_boot = entry.data["boot"] == boot_id() != ""  # pids of an earlier boot are others'
        leader = Leader(*entry.data["leader"]) if same_boot and entry.data.get("leader") else None
        self._family = Family(job.key.job_id, machine.slots == 1, leader)
        self._runner = Runner(self._family, machine.grace, machine.clock, self._note_leader)
        self._limits = Limits(stop, machine.clock() + job.timeout, machine.clock)
        self._app = AppFolder(machine.workdir / job.app, machine.now, f"{job.agent} {job.host}", machine.account)
        mark = {"DEPLOY_JOB_ID": job.key.job_id}
        protections = {"GIT_TERMINAL_PROMPT": "0", "GIT_ALLOW_PROTOCOL": machine.git_protocols}
        git_env = git_environment(machine.env) | protections | mark
        self._mirror = Mirror(self._app.path / "repo.git", job.clone_url, self._run_git, git_env)
        variables = job.env | machine.variables  # as systemd has it: the file of this host wins
        self._script_env = script_environment(machine.env, machine.account, variables) | mark
        self._shared = Shared(self._app.path, machine.account, spool.say)
        self._resolved = Resolved("", "")
        self._aftermath = ""  # what the error says about the time after the failure
        self._rolled_back_to: str | None = None

    # The two ways in.

    def perform(self) -> dict:
        """Deploys. Returns the result for the controller; never raises."""
        return self._judged(self._deploy)

    def recover(self) -> dict:
        """Ends what an agent that died left running, and undoes a switch whose `activate` it did not see through."""
        result = self._judged(self._undo)
        error = "the agent ended while this ran; its processes were stopped"
        if result["error"]:
            error += f"; {result['error']}"
        self._spool.say(error, "error")
        return {**result, "status": "failed", "reason": "agent_crashed", "exit_code": None, "error": error}

    def _judged(self, action: Callable[[], None]) -> dict:
        status, reason, error, exit_code = "failed", None, None, None
        try:
            action()
            status, exit_code = "success", 0
        except Stopped as stopped:
            status, reason, error = CAUSES[stopped.cause]
            error = error.format(timeout=self._job.timeout)
        except StepFailed as failure:
            reason, error, exit_code = failure.reason, str(failure), failure.exit_code
        except GitError as failure:
            reason, error = "fetch_failed", str(failure)
        except Exception as failure:
            step = unexpected(failure, self._job.key.job_id)
            reason, error = step.reason, str(step)
        error = "; ".join(filter(None, (error, self._aftermath))) or None
        error = error and self._spool.masked(error)[:ERROR_LIMIT]
        result = {"status": status, "reason": reason, "exit_code": exit_code, "error": error}
        return {**result, "commit": self._resolved.commit or None, "rolled_back_to": self._rolled_back_to}

    # The steps.

    def _deploy(self) -> None:
        repo, patterns = self._job.repo.lower(), self._machine.allow_repos
        if patterns and not any(fnmatch.fnmatchcase(repo, pattern) for pattern in patterns):
            allowed = ", ".join(patterns)
            raise StepFailed("rejected", f"this host does not deploy {self._job.repo}: --allow-repo is {allowed}")
        waiting = iter([f"waiting for another job of {self._job.app} on this host"])
        with self._app.locked(self._limits, lambda: [self._spool.say(text) for text in waiting]):
            release = self._find() or self._prepare()
            before = self._app.active()
            try:
                self._fill(release, before)
                self._switch(release, before)
            except BaseException:
                self._discard(release)
                raise
            self._spool.say(f"deployed {self._resolved.commit}")
            self._prune({release, before} - {None})

    @property
    def _reused(self) -> bool:
        return bool(self._entry.data.get("reused"))

    def _find(self) -> Path | None:
        """For a rollback: a release of that commit that is still there needs neither git nor a build."""
        commit = self._job.ref.lower()
        release = self._app.find(commit) if self._job.reuse and HEX.fullmatch(commit) else None
        if release:
            self._resolved = Resolved(commit, "")
            self._on_commit(commit)
            self._entry.note(release=release.name, reused=True)
            self._spool.say(f"commit {commit} is still there as releases/{release.name}")
        return release

    def _prepare(self) -> Path:
        self._spool.say(f"fetching {without_passwords(self._job.clone_url)}")
        self._mirror.fetch()
        self._resolved = self._mirror.resolve(self._job.ref)
        self._on_commit(self._resolved.commit)
        name = self._app.new_name(self._resolved.commit)
        self._entry.note(release=name)
        release = self._app.add(name, self._resolved.commit)
        self._mirror.remember(release.name, self._resolved.commit)
        self._spool.say(f"commit {self._resolved.commit} into releases/{release.name}")
        return release

    def _fill(self, release: Path, before: Path | None) -> None:
        if not self._reused:
            self._mirror.check_out(self._resolved.commit, release)
        if self._job.shared:
            self._shared.link(release, self._job.shared, fresh=not self._reused)
        if not self._reused:
            self._app.hand_over(release)
            self._build(release, before)

    def _build(self, release: Path, before: Path | None) -> None:
        job = self._job
        name, command = ("deploy", job.deploy) if job.deploy else ("build", job.build)
        if not (job.deploy or job.build or job.activate) and os.access(release / CONVENTION, os.X_OK):
            name, command = CONVENTION, [f"./{CONVENTION}"]
        if command:
            self._script(name, command, release, self._variables(release, self._resolved.commit, before))

    def _switch(self, release: Path, before: Path | None) -> None:
        self._limits.check()
        self._entry.note(switched_from=before.name if before else "")
        self._point(release)
        try:
            self._bring_up(release, self._resolved.commit, before)
        except BaseException:
            self._way_back(release, before)
            raise
        try:
            self._app.succeeded(release)
        except OSError as error:
            log.error("releases/%s will go before its time: %s", release.name, one_line(error))
        with contextlib.suppress(OSError):  # an agent that dies from here on has nothing to undo
            self._entry.end({"status": "success", "exit_code": 0, "commit": self._resolved.commit})

    def _point(self, release: Path | None) -> None:
        self._app.switch(release)
        self._on_switch()

    def _bring_up(self, release: Path, commit: str, previous: Path | None) -> None:
        """What follows a switch."""
        variables = self._variables(release, commit, previous)
        if self._job.activate and not self._job.deploy:
            self._script("activate", self._job.activate, release, variables)
        if check := self._job.health_check:
            self._spool.say(f"health check: {without_query(check.url) if check.url else 'running its command'}")
            Watch(check, lambda limits: self._ask(check, release, variables, limits), self._spool, self._limits).run()

    def _way_back(self, release: Path, before: Path | None) -> None:
        """Neither cancel nor timeout stops it: it is what puts the host right again."""
        if not self._job.rollback_on_failure or release == before:
            return self._stay(release)
        where = f"releases/{before.name}" if before else "no release"
        try:
            self._point(before)
            self._runner.end(lambda: time.sleep(TICK))  # what activate left running, where it was well and its health is not
            if before is None:
                return self._spool.say("there is no release to go back to", "warning")
            self._spool.say(f"going back to {where}", "warning")
            self._limits = Limits(None, self._machine.clock() + self._way_back_limit(), self._machine.clock)
            commit = self._app.commit_of(before) or self._mirror.recall(before.name)
            self._bring_up(before, commit or "", release)
            self._rolled_back_to = commit
        except Exception as failure:
            known = isinstance(failure, (StepFailed, Stopped))
            cause = failure if known else unexpected(failure, self._job.key.job_id)
            self._aftermath = f"going back to {where} failed too: {cause}"
            self._spool.say(self._aftermath, "error")

    def _way_back_limit(self) -> float:
        return WAY_BACK_LIMIT + (self._job.health_check.timeout if self._job.health_check else 0)

    def _stay(self, release: Path) -> None:
        if self._app.active() == release:
            self._aftermath = f"current stays at releases/{release.name}"
            self._spool.say(self._aftermath, "warning")

    def _undo(self) -> None:
        self._runner.end(lambda: time.sleep(TICK))
        limits = Limits(None, float("inf"), self._machine.clock)
        with self._app.locked(limits, lambda: None):
            release = self._app.release(self._entry.data.get("release"))
            if release is None:
                return
            if "switched_from" in self._entry.data:
                self._way_back(release, self._app.release(self._entry.data["switched_from"]))
            self._discard(release)

    # Their tools.

    def _variables(self, release: Path, commit: str, previous: Path | None) -> dict[str, str]:
        job = self._job
        return {
            **self._script_env,
            "DEPLOY_APP": job.app,
            "DEPLOY_REPO": job.repo,
            "DEPLOY_REF": job.ref,
            "DEPLOY_COMMIT": commit,
            "DEPLOY_BRANCH": job.branch or self._resolved.branch,
            "DEPLOY_HOST": job.host,
            "DEPLOY_RELEASE": str(release),
            "DEPLOY_CURRENT": str(self._app.current),
            "DEPLOY_PREVIOUS": str(previous) if previous else "",
        }

    def _script(self, name: str, command: Command, cwd: Path, env: dict[str, str]) -> None:
        """Raises StepFailed or Stopped. What was pushed comes in the environment, never in the command."""
        argv = command if isinstance(command, list) else ["/bin/sh", "-c", command]
        self._spool.last = ""
        self._spool.say(f"running {name}")  # not the command itself: it may hold a secret, and more people read logs
        try:
            code = self._runner.run(argv, cwd, env, self._spool, self._limits, self._machine.account)
        except OSError as error:
            code = 127 if isinstance(error, FileNotFoundError) else 126  # as a shell says it
            self._spool.last = f"{argv[0]}: {error.strerror}"
        finally:
            self._spool.end_output()
        if code != 0:
            cause = f": {self._spool.last}; {NOT_STARTED[code]}" if code in NOT_STARTED and self._spool.last else ""
            raise StepFailed("exit_code", f"{name} ended with exit code {code}{one_line(cause)}", code)

    def _ask(self, check: HealthCheck, cwd: Path, env: dict[str, str], limits: Limits) -> Verdict:
        """Its command has a runner of its own: one that fails ends nothing of what `activate` left running."""
        if check.url:
            return ask_url(check.url, limits)
        argv = check.command if isinstance(check.command, list) else ["/bin/sh", "-c", check.command]
        family, said, machine = Family(NOBODYS, False, None), Capture(), self._machine
        runner = Runner(family, machine.grace, machine.clock, lambda: self._entry.note(sync=False, leader=family.leader))
        try:
            code = runner.run(argv, cwd, env, said, limits, machine.account)
        except Stopped:
            return Verdict("its command did not end in time")
        except OSError as error:
            return Verdict(f"{argv[0]}: {error.strerror}")
        return Verdict(f"exit code {code}" if code else None, said.text().rpartition("\n")[2])

    def _run_git(self, argv: list[str], cwd: Path, env: dict[str, str], sink: Any) -> int:
        return self._runner.run(argv, cwd, env, sink, self._limits)

    def _note_leader(self) -> None:
        self._entry.note(sync=False, leader=self._family.leader)  # after a power cut nobody looks for it

    def _discard(self, release: Path) -> None:
        """A failed release goes at once. Not one that succeeded once, nor one that `current` leads to."""
        if self._app.active() != release and not self._reused:
            remove_tree(release)

    def _prune(self, keep: set[Path]) -> None:
        """The deployment is done: what cannot be tidied up now does not undo it."""
        try:
            for name in self._app.unknown():
                commit = None if self._reused else self._mirror.recall(name)  # a mirror that no fetch has looked at is not asked
                self._app.ledger.note(name, commit=commit, succeeded=name)  # its name begins with a moment, too
            for name in self._app.prune(keep, self._job.keep_releases):
                self._mirror.forget(name)
        except (OSError, GitError, Stopped) as error:
            log.warning("old releases of %s: %s", self._job.app, one_line(error))


# ---------------------------------------------------------------------------------------------------------------------
# Controller
# Owns: HTTP to the controller over one kept-alive connection. Ignores: what is said over it.


# X509_V_ERR_*: no issuer found (2, 20), self-signed, alone or at the end of the chain (18, 19), nothing to verify it with (21).
UNKNOWN_CA = {2, 18, 19, 20, 21}


class Controller:
    """One connection, for one thread. Redirects are not followed: they would carry the token to another host."""

    def __init__(self, url: str, token: Callable[[], str | None], timeout: float = ANSWER_TIMEOUT) -> None:
        parts = urllib.parse.urlsplit(url)
        self._token, self._timeout = token, timeout
        self._address, self._netloc = (parts.hostname, parts.port), parts.netloc
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._connection: http.client.HTTPConnection | None = None
        self._interrupted = threading.Event()

    def call(self, method: str, path: str, body: dict | bytes, parked: float = 0.0) -> dict:
        """The answer's JSON object. Raises Unreachable or Refused."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._judge(*self._reach(method, path, data, self._timeout + parked))

    def look(self, path: str) -> tuple[str, dict]:
        """A GET: the answer's Date and its JSON object. Raises Unreachable or Refused."""
        response, answer = self._reach("GET", path, None, self._timeout)
        return response.headers.get("Date", ""), self._judge(response, answer)

    def _reach(self, method: str, path: str, data: bytes | None, timeout: float) -> tuple[http.client.HTTPResponse, bytes]:
        try:
            return self._exchange(method, path, data, timeout)
        except (http.client.HTTPException, OSError) as error:
            self.close()
            raise Unreachable(self._cause(error)) from error

    def _cause(self, error: Exception) -> str:
        if getattr(error, "reason", None) == "WRONG_VERSION_NUMBER":
            return f"it speaks http there: try http://{self._netloc}"
        if isinstance(error, ssl.SSLCertVerificationError) and error.verify_code in UNKNOWN_CA:
            hint = "name the file of that CA in SSL_CERT_FILE"
            return f"its certificate is of a CA that this machine does not know: {hint} ({error.verify_message})"
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"its certificate is refused: {error.verify_message}"
        return one_line(getattr(error, "strerror", None) or error) or type(error).__name__

    def _exchange(self, method: str, path: str, data: bytes | None, timeout: float) -> tuple[http.client.HTTPResponse, bytes]:
        kept = getattr(self._connection, "sock", None)
        if kept and select.select([kept], [], [], 0)[0]:
            self.close()  # nothing was asked, so what is there to read is its end: a controller keeps none for ever
        connection = self._connection = self._connection or self._connect()
        if connection.sock is None:
            connection.connect()
        connection.sock.settimeout(timeout)
        if self._interrupted.is_set():
            raise ConnectionAbortedError("interrupted")
        headers = {"Content-Type": "application/json", "User-Agent": f"deploybot-agent/{VERSION}"}
        if token := self._token():
            headers["Authorization"] = f"Bearer {token}"
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        answer = response.read(ANSWER_LIMIT)
        if not response.isclosed():
            self.close()
        return response, answer

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._address
        if self._tls is None:
            return http.client.HTTPConnection(host, port, timeout=self._timeout)
        return http.client.HTTPSConnection(host, port, timeout=self._timeout, context=self._tls)

    @staticmethod
    def _judge(response: http.client.HTTPResponse, answer: bytes) -> dict:
        """Only a problem document is the controller's own no; what a proxy says in its place is tried again."""
        status, kind = response.status, response.headers.get_content_type()
        try:
            data = json.loads(answer)
        except ValueError:
            data = None
        if not isinstance(data, dict):
            data, kind = {}, ""
        if status < 300 and kind == "application/json":
            return data
        detail = one_line(data.get("detail") or data.get("title") or response.reason)
        if 400 <= status < 500 and status != 429 and kind == "application/problem+json":
            offset = data.get("next_offset")
            raise Refused(status, detail, offset if type(offset) is int else None)
        if 300 <= status < 400:
            detail = "redirects are not followed: set --url to where the controller is"
        wait = response.headers.get("Retry-After", "")
        trouble = PutOff if status == 429 else Unreachable
        raise trouble(f"{status}: {detail}", float(wait) if re.fullmatch("[0-9]{1,4}", wait) else 0.0)

    @property
    def interrupted(self) -> bool:
        return self._interrupted.is_set()

    def resume(self) -> None:
        if self.interrupted:
            self.close()
        self._interrupted.clear()

    def interrupt(self, patience: float = 0.0) -> None:
        """From another thread: ends a parked call. With patience (s) an answer that is on its way may still arrive: from the
        half-closed connection on, the controller hands nothing out."""
        self._interrupted.set()
        sock = getattr(self._connection, "sock", None)
        if sock is None:
            return

        def hang_up(how: int = socket.SHUT_RDWR) -> None:
            with contextlib.suppress(OSError):
                sock.shutdown(how)

        if patience:
            hang_up(socket.SHUT_WR)
            timer = threading.Timer(patience, hang_up)
            timer.daemon = True
            timer.start()
        else:
            hang_up()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


# ---------------------------------------------------------------------------------------------------------------------
# Uploads
# Owns: bringing the lines of one attempt, then its result, to the controller. Ignores: how they came about.


class Run:
    """One attempt that this agent holds until its end is acknowledged."""

    def __init__(self, entry: Entry, machine: Machine, words: tuple[str, ...]) -> None:
        self.entry = entry
        self.key = entry.key
        self.stop = Stop()
        self.spool = Spool(entry.spool_path, machine.now, machine.clock, words, entry.data.get("lines", 0))
        self.app = entry.data["job"].get("app")
        self.recalled = entry.data["state"] == "done"  # known to a controller that may have forgotten it
        self.commit: str | None = None
        self.ended = threading.Event()  # the worker is done: nothing of the job runs here any more

    def know_commit(self, commit: str) -> None:
        self.commit = commit


class Uploader:
    """Tries again until the controller has it all. `over` ends it early; what is left goes up after the next start."""

    def __init__(self, controller: Controller, run: Run, over: threading.Event, backoff: Backoff) -> None:
        self._controller, self._run, self._over, self._backoff = controller, run, over, backoff
        self._path = f"/v1/jobs/{run.key.job_id}"
        self._commit_sent = False

    def upload(self) -> bool:
        """True when the controller has the end of it, or wants to hear no more."""
        try:
            self._logs()
            self._result()
        except Unreachable:
            return False
        except Refused as refusal:
            # 409: a newer attempt, or an end that stands already. 404: no such job. Then this script has no business any more.
            log.log(logging.INFO if self._run.recalled else logging.WARNING, "job %s: %s", self._run.key.job_id, refusal)
            self._run.stop.set("fenced")
            while not self._run.ended.wait(1):
                if self._over.is_set():
                    return False
        return True

    def _logs(self) -> None:
        spool, gaps = self._run.spool, 0
        while (lines := spool.batch(timeout=1.0)) is not None:
            if self._over.is_set():
                raise Unreachable("the agent ends")
            if lines:
                try:
                    self._send(lines)
                    gaps = 0
                except Refused as refusal:
                    gaps += 1
                    if refusal.next_offset is None and refusal.status in (404, 409):
                        raise
                    if refusal.next_offset not in (None, spool.offset) and gaps <= GAP_LIMIT:
                        spool.seek(refusal.next_offset)
                    else:  # lines that are never taken must not keep the result from getting there
                        log.error("job %s: log lines were refused: %s", self._run.key.job_id, refusal)
                        spool.seek(spool.offset + lines.count(b"\n"))

    def _send(self, lines: bytes) -> None:
        run, commit = self._run, self._run.commit
        head = {"attempt": run.key.attempt, "offset": run.spool.offset}
        if commit and not self._commit_sent:
            head["commit"] = commit
        body = json.dumps(head)[:-1].encode() + b', "lines": [' + lines[:-1].replace(b"\n", b",") + b"]}"
        answer = self._insist(self._path + "/logs", body)
        self._commit_sent = "commit" in head or self._commit_sent
        next_offset = answer.get("next_offset")
        run.spool.seek(next_offset if type(next_offset) is int else run.spool.offset + lines.count(b"\n"))
        if answer.get("cancel"):
            run.stop.set("cancelled")

    def _result(self) -> None:
        result = {name: value for name, value in self._run.entry.result.items() if value is not None}
        self._insist(self._path + "/result", {"attempt": self._run.key.attempt, **result})

    def _insist(self, path: str, body: dict | bytes) -> dict:
        """Raises Refused, and Unreachable only when the agent ends. A 401 is put right by the next registration, and is a failed
        sign-in: only the first wait is short, as mostly the host is known again by then."""
        wait_again = 0.0
        while True:
            try:
                answer = self._controller.call("POST", path, body)
                self._backoff.reset()
                return answer
            except Unreachable as trouble:
                wait, error = trouble.retry_after, trouble
            except Refused as refusal:
                if refusal.status != 401:
                    raise
                wait, error = wait_again, refusal
                wait_again = SIGN_IN_LIMIT
            log.debug("POST %s: %s", path, error)
            if self._over.wait(self._backoff.next(wait)):
                raise Unreachable("the agent ends")


# ---------------------------------------------------------------------------------------------------------------------
# Agent
# Owns: registration, heartbeats, who runs, the order of start and end. Ignores: the steps of a deployment.


def own_secret(folder: Path) -> str:
    """What this host signs in with from its first registration on; never on a command line, readable for its owner alone."""
    path = folder / "secret"
    try:
        return path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        write_whole(path, f"dbt_{secrets.token_urlsafe(32)}\n")
        return path.read_text(encoding="ascii").strip()


class Agent:
    def __init__(self, config: Config, machine: Machine, backoff: Callable[[float], Backoff] = Backoff) -> None:
        self._config, self._machine, self._backoff = config, machine, backoff
        self._state = config.workdir / ".agent"  # no app's name starts with a dot
        self._journal = Journal(self._state / "jobs")
        self._secret = own_secret(self._state)
        self._words = secret_words([*machine.variables.values(), config.token or "", self._secret])
        self._registered = self._state / "registered"  # there once the controller knew this secret
        self._sign_in: str | None = self._secret  # what the heart sends; the enrolment token while it registers
        self._heart = Controller(config.url, lambda: self._sign_in)
        self._identity: tuple[str, str | None] | None = None  # id and session, None until registered; the heart's own
        self._lock = threading.Lock()  # guards _runs and _named, which all threads read or change; nobody waits for it
        self._runs: dict[JobKey, Run] = {}
        self._named: set[JobKey] = set()  # what the heartbeat that is under way says it holds
        # For the main thread: "signal", "ended" or "newer". A SimpleQueue, as its put() is safe in a signal handler.
        self.events: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._nudge = threading.Event()  # wakes the heart from a pause
        self._leaving = False  # takes no new job; set by the main thread, or by the heart with --once
        self._silent = threading.Event()  # no more heartbeats
        self._over = threading.Event()  # no more uploads
        self._forgotten = False  # the heart's own: whether a registration would be one of an agent that was known before
        self._chosen: Run | None = None  # the one job of --once
        self._recovering: list[Run] = []  # what an agent that died left; set before any job is taken
        self._trouble = ""
        self._accepts: tuple[str, ...] = ()  # what the controller takes in a heartbeat beside what all of them do; the heart's own
        self._current = self._look_around()  # app: commit. Guarded by _lock; changes with `current` itself

    def _look_around(self) -> dict[str, str]:
        found = {}
        for path in self._config.workdir.iterdir():
            if JOB_FIELDS["app"].fullmatch(path.name):
                with contextlib.suppress(OSError):
                    found[path.name] = commit_in_force(path)
        return {app: commit for app, commit in sorted(found.items()) if commit}

    def _look(self, app: str) -> None:
        commit = None
        with contextlib.suppress(OSError):  # not known is better than wrong
            commit = commit_in_force(self._config.workdir / app)
        with self._lock:
            self._current.pop(app, None)
            self._current |= {app: commit} if commit else {}

    # The main thread.

    def run(self) -> int:
        """Works until it is told to end; returns the exit code."""
        self._recovering = [self._hold(entry, Deployment.recover) for entry in self._journal.unfinished()]
        heart = threading.Thread(target=self._beat, name="heart", daemon=True)
        heart.start()
        code = self._serve()
        self._silent.set()
        self._hurry(PARTING)
        heart.join(3)
        self._say_goodbye(code)
        if self._config.once and code == EXIT_DONE:
            succeeded = self._chosen is not None and (self._chosen.entry.result or {}).get("status") == "success"
            return EXIT_DONE if succeeded else EXIT_FAILED
        return code

    def _serve(self) -> int:
        signals = 0
        deadline: float | None = None
        while True:
            if self._leaving and not self._holding():
                return EXIT_DONE
            if self._leaving and signals and deadline is None and not self._working():
                deadline = self._machine.clock() + LEAVING_GRACE
            left = None if deadline is None else deadline - self._machine.clock()
            if left is not None and left <= 0:
                self._over.set()
                log.warning("results that the controller does not have yet go up at the next start")
                return EXIT_DONE
            try:
                event = self.events.get(timeout=left)
            except queue.Empty:
                continue
            if event == "newer":
                return self._give_way()
            if event == "signal":
                signals += 1
                self._leave(signals)

    def _leave(self, signals: int) -> None:
        """The first signal lets what runs finish, the second one stops it."""
        self._leaving = True
        runs = self._holding()
        if signals > 1:
            log.warning("stopping %d job(s)", len(runs))
            for run in runs:
                run.stop.set("stopped")
        elif runs:
            log.info("taking no new job; %d job(s) still to finish, a second signal stops them", len(runs))
        self._hurry(PARTING)

    def _give_way(self) -> int:
        for run in self._holding():
            run.stop.set("fenced")
        for run in self._holding():
            run.ended.wait(self._machine.grace + KILL_PATIENCE + WAY_BACK_LIMIT + HEALTH_LIMIT)
        self._over.set()
        return EXIT_NEWER

    def _hurry(self, patience: float = 0.0) -> None:
        """The heart gives up its parked call and looks again at what to say."""
        self._nudge.set()
        self._heart.interrupt(patience)

    def _say_goodbye(self, code: int) -> None:
        if self._identity is None or code == EXIT_NEWER:
            return
        farewell = Controller(self._config.url, lambda: self._secret, timeout=2)
        for _ in range(2):  # a controller that has much to do may miss the first
            try:
                farewell.call("POST", *self._heartbeat_request("offline"))
                break
            except Refused as error:
                log.debug("the last heartbeat: %s", error)
                break
            except Unreachable as error:
                log.info("the controller was not told that this agent ends: %s", error)
        farewell.close()

    def _holding(self) -> list[Run]:
        with self._lock:
            return list(self._runs.values())

    def _working(self) -> bool:
        return any(not run.ended.is_set() for run in self._holding())

    # The heart.

    def _beat(self) -> None:
        backoff, refused, unknown = self._backoff(RETURN_FIRST), self._backoff(BACKOFF_FIRST), 0
        while not self._silent.is_set():
            self._nudge.clear()
            self._heart.resume()
            begun = self._machine.clock()
            try:
                if self._identity is None:
                    self._register()
                pause = self._obey(self._send_heartbeat())
                backoff.reset()
                refused.reset()
                unknown = 0
                self._complain("")
            except Unreachable as trouble:
                if self._heart.interrupted:
                    continue
                pause = backoff.next(trouble.retry_after)
                state = "puts this address off" if isinstance(trouble, PutOff) else "is not reached"
                self._complain(f"the controller at {self._config.url} {state}: {trouble}")
            except Refused as refusal:
                is_unknown = self._identity is None and refusal.status in (401, 403)
                if self._is_newer(refusal):
                    self.events.put("newer")
                    return
                # The controller is there: a heartbeat that it refused may only need a new registration.
                pause = refused.next(sign_in_pause(unknown) if is_unknown else 0.0)
                unknown += is_unknown
            except OSError as error:
                pause = backoff.next()
                self._complain(f"no job is taken: {one_line(error)}")
            except Exception:  # the heart outlives a mistake of its own: a silent host looks dead
                log.exception("a heartbeat failed in the agent")
                pause = backoff.next()
            CHILDREN.reap()
            self._nudge.wait(max(pause, IDLE_PAUSE - (self._machine.clock() - begun)))

    def _complain(self, text: str) -> None:
        """Says it once; "" says that the trouble is over."""
        if text and text != self._trouble:
            log.warning("%s", text)
        elif self._trouble and not text:
            log.info("the controller is reached again")
        self._trouble = text

    def _is_newer(self, refusal: Refused) -> bool:
        """Everything else that is refused is put right by a new registration, or by a person. Where that is refused, as the host is
        bound to another secret now, and was not before: it was reset for another agent."""
        if refusal.status == 409 and (self._identity is not None or self._forgotten):
            log.error("another agent registered as %s after this one: %s", self._config.hostname, refusal)
            return True
        said = self._advice(refusal) if self._identity is None else None
        self._complain(f"the controller refused: {said or refusal}")
        self._identity = None
        return False

    def _advice(self, refusal: Refused) -> str | None:
        """What to do about a registration that was refused, where that is known."""
        make = f"`ctl.py token create --role agent --host {self._config.hostname}` makes one"
        if refusal.status == 401 and self._config.token is None and self._registered.exists():
            return f"401: the secret of this host is no longer known there: set {TOKEN_VARIABLE} ({make})"
        if refusal.status == 401 and self._config.token is None:
            return f"401: no token: set {TOKEN_VARIABLE} ({make})"
        if refusal.status == 401:
            return f"401: {TOKEN_VARIABLE} is not known there, or not any more ({make})"
        if refusal.status == 403 and refusal.of_token:
            return f"403: {TOKEN_VARIABLE} is for something else: {str(refusal).removeprefix('403: ')} ({make})"
        if owner := re.search(r"belongs to (another host|\S+)[,:]", str(refusal)):
            whose = owner[1] if owner[1] == "another host" else f"the host {owner[1]}"
            way_out = f"use another --workdir for {self._config.hostname}, or remove {self._state}"
            return f"{refusal.status}: this folder belongs to {whose}: {way_out}"
        return None

    def _show(self, token: str | None, body: dict) -> dict:
        """The answer to a registration with this token. Raises Refused or Unreachable."""
        try:
            self._sign_in = token
            return self._heart.call("POST", "/v1/agents/register", body)
        except Refused as refusal:
            refusal.of_token = token == self._config.token
            raise
        finally:
            self._sign_in = self._secret

    def _register(self) -> None:
        """As whoever this host already is, or with the token that it was given. Raises Refused or Unreachable.

        A host that the controller knew once shows its own secret first: a token that has been revoked since would count as a
        failed sign-in each time, against all hosts behind the same address.
        """
        body = {
            "hostname": self._config.hostname,
            "capabilities": {
                "agent": VERSION,
                "python": platform.python_version(),
                "system": platform.system(),
                "labels": self._config.labels,
            },
            "slots": self._config.slots,
            "token_sha256": hashlib.sha256(self._secret.encode()).hexdigest(),
        }
        ways = [self._config.token, self._secret]
        first, second = reversed(ways) if self._registered.exists() else ways
        try:
            answer = self._show(first, body)
        except (Refused, PutOff) as refusal:
            # 403: a token for something else, as the one for reading; of the host's own secret it is the last word.
            is_for_another = isinstance(refusal, Refused) and refusal.status == 403 and refusal.of_token
            if not (is_for_another or is_unknown_token(refusal)):
                raise
            try:
                answer = self._show(second, body)
            except (Refused, PutOff) as other:  # of a host that nobody knows yet the secret never is, which says nothing
                raise refusal if is_for_another and is_unknown_token(other) else other from None
        with contextlib.suppress(OSError):
            self._registered.touch(mode=0o600)
        accepts = answer.get("accepts")
        self._accepts = tuple(filter(is_text, accepts)) if isinstance(accepts, list) else ()
        self._identity = (urllib.parse.quote(str(answer.get("id")), safe=""), answer.get("session"))
        log.info("registered as %s at %s", self._config.hostname, self._config.url)
        if self._forgotten:
            self._recall()
        self._forgotten = True  # the next time it will have been

    def _recall(self) -> None:
        """A controller that was restored may take for running what ended since its backup: this agent knows better. Where it
        knows as well it refuses what it is told again, and that is the end of it."""
        for entry in self._journal.recent(RECALLED):
            with self._lock:
                held = entry.key in self._runs
            if not held:
                self._hold(entry, Deployment.recover)

    def _heartbeat_request(self, status: str, wait: int = 0) -> tuple[str, dict]:
        agent_id, session = self._identity
        with self._lock:
            self._named = set(self._runs)
            current = dict(self._current)
        running = [key._asdict() for key in self._named]
        body: dict[str, Any] = {"status": status, "running": running}
        if session is not None:
            body["session"] = session
        if "current" in self._accepts:
            body["current"] = current
        if wait:
            body["wait"] = wait
        return f"/v1/agents/{agent_id}/heartbeat", body

    def _send_heartbeat(self) -> dict:
        try:
            if self._leaving:  # says that it takes no more, and still hears of cancels
                return self._heart.call("POST", *self._heartbeat_request("offline"))
            return self._heart.call("POST", *self._heartbeat_request("online", HEARTBEAT_WAIT), parked=HEARTBEAT_WAIT)
        finally:
            with self._lock:
                self._named = set()

    def _obey(self, answer: dict) -> float:
        """Does what the answer says; seconds until the next heartbeat."""
        for job_id in answer.get("cancel") or []:
            runs = sorted((run for run in self._holding() if run.key.job_id == job_id), key=lambda run: run.key)
            for run in runs[:-1] or runs:  # of two attempts the older is meant: it has no business here any more
                run.stop.set("fenced" if len(runs) > 1 else "cancelled")
        interval = answer.get("interval")
        pause = min(float(interval), INTERVAL_LIMIT) if isinstance(interval, (int, float)) and interval > 0 else 0.0
        if answer.get("job") is not None:
            self._take(answer["job"])
        return pause

    def _take(self, data: Any) -> None:
        """Raises OSError where the tracking file cannot be written: then nothing starts, and the job comes again."""
        key = parse_key(data)
        if key is None:
            log.error("a job without a usable id and attempt: %s", one_line(data))
            return
        with self._lock:
            if key in self._runs:
                return
        if known := self._journal.find(key):
            log.warning("job %s, attempt %d was started before; its result goes up again", *key)
            self._hold(known, Deployment.recover)
            return
        for run in self._holding():
            if run.key.job_id == key.job_id and run.key.attempt < key.attempt:
                run.stop.set("fenced")  # this one takes its place
        log.info("job %s, attempt %d: %s %s", *key, one_line(data.get("app")), one_line(data.get("ref")))
        run = self._hold(self._journal.begin(data, boot_id()), Deployment.perform)
        if self._config.once:
            self._chosen, self._leaving = run, True
            self.events.put("ended")  # it may have been quicker than this line

    # The threads of a job.

    def _hold(self, entry: Entry, work: Callable[[Deployment], dict]) -> Run:
        run = Run(entry, self._machine, self._words)
        if run.recalled:
            entry.note(state="ended")
            run.spool.say("this attempt ended before; its result goes up again")
        with self._lock:
            self._runs[run.key] = run
        threading.Thread(target=self._worker, args=(run, work), name="worker", daemon=True).start()
        threading.Thread(target=self._uploader, args=(run,), name="uploader", daemon=True).start()
        return run

    def _wait_for_recovery(self, run: Run) -> None:
        """What a dead agent left of this app is ended first. No lock keeps it apart, as that ended with its agent; and of an older
        attempt at the same job it has the same mark."""
        for other in self._recovering:
            while other.app == run.app and not run.stop.cause and not other.ended.wait(TICK):
                pass

    def _worker(self, run: Run, work: Callable[[Deployment], dict]) -> None:
        if work is Deployment.perform:
            self._wait_for_recovery(run)
        if run.entry.result is None:
            result = self._result_of(run, work)
            try:
                run.entry.end(result)
            except OSError as error:  # it is sent all the same; only a crash before that would lose it
                log.error("the result of job %s is not on disk: %s", run.key.job_id, one_line(error))
            if result["status"] != "success":
                run.spool.say(f"{result['status']}: {result.get('error')}", "error")
            words = [one_line(run.entry.data["job"].get("app")), result["status"], result.get("reason")]
            log.info("job %s: %s", run.key.job_id, " ".join(filter(None, words)))
        run.spool.close()
        run.ended.set()
        self.events.put("ended")

    def _result_of(self, run: Run, work: Callable[[Deployment], dict]) -> dict:
        try:
            return work(self._deployment(run))
        except Exception as failure:
            step = failure if isinstance(failure, StepFailed) else unexpected(failure, run.key.job_id)
            return {"status": "failed", "reason": step.reason, "error": run.spool.masked(str(step))}

    def _deployment(self, run: Run) -> Deployment:
        job = parse_job(run.entry.data["job"])
        return Deployment(job, run.entry, run.spool, run.stop, self._machine, run.know_commit, lambda: self._look(job.app))

    def _uploader(self, run: Run) -> None:
        controller = Controller(self._config.url, lambda: self._secret)
        acknowledged = Uploader(controller, run, self._over, self._backoff(BACKOFF_FIRST)).upload()
        controller.close()
        if acknowledged:
            self._let_go(run)
        self.events.put("ended")

    def _let_go(self, run: Run) -> None:
        try:
            run.entry.done(run.spool.offset)
            run.spool.remove()
        except OSError as error:
            log.error("job %s: %s", run.key.job_id, one_line(error))
        with self._lock:
            del self._runs[run.key]
            named = run.key in self._named
        if named and not self._leaving:  # a parked heartbeat that still names it gets no job in its place
            self._hurry()


# ---------------------------------------------------------------------------------------------------------------------
# Install
# Owns: the agent as a service of this machine: user, program, settings, unit; put there, shown, taken away. Ignores: what it does.

NAME = "deploybot-agent"  # of the unit, of its user, of the folder of its state
PROGRAM, SETTINGS = "/usr/local/lib/deploybot/agent.py", "/etc/deploybot/agent.env"
UNIT_FILE = f"/etc/systemd/system/{NAME}.service"
DROP_IN, STATE = f"{UNIT_FILE}.d/run-as.conf", f"/var/lib/{NAME}"
COMMAND_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
UNIT = r"""# The agent of one host. `agent.py install` writes this unit and its settings (/etc/deploybot/agent.env: 0600, root's, it holds the
# token), and makes the user. What is to be otherwise here belongs into a drop-in: systemctl edit deploybot-agent.
# Private repositories are fetched with that user's own git credentials (its .ssh, or a credential helper).
[Unit]
Description=DeployBot agent
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
Type=exec
User=deploybot-agent
Group=deploybot-agent
ExecStart=/usr/bin/python3 /usr/local/lib/deploybot/agent.py
WorkingDirectory=/var/lib/deploybot-agent
StateDirectory=deploybot-agent
StateDirectoryMode=0755
Environment=DEPLOYBOT_WORKDIR=/var/lib/deploybot-agent
EnvironmentFile=/etc/deploybot/agent.env

# 2: the settings are wrong. 3: another agent took over this hostname; starting again would only take it back.
Restart=always
RestartSec=5
RestartPreventExitStatus=2 3

# TERM goes to the agent alone, which lets its running job finish; a job may take an hour (the default of its timeout). Meanwhile
# `systemctl kill --kill-whom=main deploybot-agent` is the second TERM, which stops the job. When the time is up all is killed, as
# is what a script left running when the agent dies. A deployment that restarts this very unit has to do so with
# `systemctl --no-block`. What a script leaves running in the background ends with this unit too: a service of yours belongs
# into a unit of its own.
KillMode=mixed
TimeoutStopSec=3700

# Deployments ask systemd, docker or sudo for what this user has no right to. So nothing stands here that takes setuid from sudo:
# NoNewPrivileges=, and what implies it for a unit with User= (PrivateDevices=, SystemCallFilter=, most of Protect*= and Restrict*=).
# `systemd-analyze security` counts that, the network, and what root behind sudo may need: 6.7 is what a deployer leaves. What no
# deployment needs is taken from root behind sudo, too. A deployment that writes elsewhere than below /var and /srv gets a drop-in
# with ReadWritePaths=/usr/local/bin or the like, one that needs a device (/dev/fuse, /dev/kvm) one with DeviceAllow=.
# One whose deployments need no sudo can have far less, and scripts can have another user: docs/operations.md, "Agents".
UMask=0022
PrivateTmp=yes
PrivateMounts=yes
RemoveIPC=yes
ProtectSystem=full
ProtectHome=read-only
ProtectControlGroups=yes
DevicePolicy=closed
CapabilityBoundingSet=~CAP_SYS_ADMIN CAP_SYS_MODULE CAP_SYS_RAWIO CAP_SYS_TIME CAP_SYS_BOOT CAP_SYS_PTRACE CAP_SYS_PACCT
CapabilityBoundingSet=~CAP_SYS_CHROOT CAP_SYS_TTY_CONFIG CAP_SYSLOG CAP_WAKE_ALARM CAP_BLOCK_SUSPEND CAP_MKNOD CAP_LEASE
CapabilityBoundingSet=~CAP_LINUX_IMMUTABLE CAP_IPC_LOCK CAP_MAC_ADMIN CAP_MAC_OVERRIDE CAP_BPF CAP_PERFMON
CapabilityBoundingSet=~CAP_CHECKPOINT_RESTORE CAP_NET_ADMIN CAP_NET_RAW CAP_NET_BROADCAST CAP_AUDIT_CONTROL CAP_AUDIT_READ
LimitNOFILE=65536
TasksMax=8192
# A build that runs out of memory costs that build, not the agent.
OOMPolicy=continue

[Install]
WantedBy=multi-user.target
"""
RUN_AS = "[Service]\nUser=root\nGroup=root\nEnvironment=DEPLOYBOT_RUN_AS={}\nCapabilityBoundingSet=CAP_SYS_PTRACE\n"
GIT_NEEDED = (2, 30)  # `git rev-parse --end-of-options`
FREE_NEEDED = 512 << 20  # bytes
CLOCK_LIMIT = 30  # seconds
DOCTOR_PATIENCE = 10  # seconds, for an answer


def run_command(*command: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": COMMAND_PATH, "LC_ALL": "C"}
    return subprocess.run(command, cwd="/", env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def settings_of(text: str) -> dict[str, str]:
    problems: list[str] = []
    values = parse_env_file(text, problems, of_scripts=False)
    if problems:
        raise ConfigError([problem.replace("--env-file", SETTINGS) for problem in problems])
    return values


class System:
    """This machine; a test's has another root and another `run`. With `dry`, what would be done is said and not done."""

    def __init__(self, root: Path = Path("/"), run: Callable[..., subprocess.CompletedProcess[str]] = run_command) -> None:
        self._root, self.run, self.dry, self.changed = root, run, False, False

    def at(self, place: str) -> Path:
        return self._root / place[1:]

    def does(self, what: str) -> bool:
        print(f"would {what}" if self.dry else what, flush=True)
        self.changed = True
        return not self.dry

    def holds(self, *command: str) -> bool:
        return self.run(*command).returncode == 0

    def do(self, *command: str) -> None:
        """Raises ConfigError where it fails."""
        if self.does(f"run {shlex.join(command)}") and (done := self.run(*command)).returncode != 0:
            raise ConfigError([f"{shlex.join(command)}: {one_line(done.stderr or done.stdout) or done.returncode}"])

    def put(self, place: str, data: bytes, mode: int) -> None:
        """A file, whole or not at all, and never through a link."""
        path, scratch = self.at(place), self.at(place + ".new")
        found = path.lstat() if os.path.lexists(path) else None
        if found and (found.st_mode, found.st_uid) == (S_IFREG | mode, os.geteuid()) and path.read_bytes() == data:
            print(f"{place} is as it should be")
        elif self.does(f"write {place} ({mode:o})"):
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.unlink(missing_ok=True)
            with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)

    def remove(self, place: str) -> None:
        if os.path.lexists(self.at(place)) and self.does(f"remove {place}"):
            self.at(place).unlink()

    def settings(self) -> tuple[str, dict[str, str]]:
        """The text of the service's settings, and what it says; empty where there are none. Raises ConfigError."""
        try:
            text = self.at(SETTINGS).read_text(encoding="utf-8")
        except FileNotFoundError:
            return "", {}
        except PermissionError as error:
            raise ConfigError([f"only root can read {SETTINGS}: sudo python3 agent.py ..."]) from error
        return text, settings_of(text)

    def run_as(self) -> str | None:
        """Whose rights scripts have, where the service is root's."""
        with contextlib.suppress(OSError):
            found = re.search(r"^Environment=DEPLOYBOT_RUN_AS=(\S+)$", self.at(DROP_IN).read_text(), re.M)
            return found and found[1]
        return None

    def check(self, instead: str) -> None:
        """Raises ConfigError where there can be no service, with what to do `instead`, or where this user may not change it."""
        if os.geteuid() != 0 and self.at("/") == Path("/") and not self.dry:
            raise ConfigError(["only root may do that: sudo python3 agent.py ...; --dry-run shows what it would do"])
        if not self.at("/run/systemd/system").exists():
            raise ConfigError([f"systemd does not run here: {instead}"])
        if not self.holds("/usr/bin/python3", "-Ic", "import sys; sys.exit(sys.version_info < (3, 11))"):
            raise ConfigError(["/usr/bin/python3, which the unit starts, is older than 3.11"])
        os.umask(0o022)  # the agent's user has to get at the program, and others have nothing to write


def with_settings(text: str, wanted: dict[str, str]) -> str:
    """The text with these settings; all else stands as it stood. Raises ConfigError where that cannot be."""
    before = settings_of(text)
    changes = {name: value for name, value in wanted.items() if before.get(name) != value}
    lines = [line for line in text.splitlines() if line.partition("=")[0].strip() not in changes]
    lines += ['{}="{}"'.format(name, re.sub(r'(["\\$`])', r"\\\1", value)) for name, value in changes.items()]
    made = "\n".join(lines) + "\n" if changes else text
    if settings_of(made) != before | changes:
        raise ConfigError([f"{SETTINGS}: set {', '.join(changes)} there by hand"])
    return made


def wanted_settings(args: argparse.Namespace, before: dict[str, str]) -> dict[str, str]:
    """What the flags say, over what is there. Raises ConfigError with every problem."""
    problems: list[str] = []
    token = read_token({TOKEN_VARIABLE + "_FILE": args.token_file or ""}, problems)
    hostname = args.hostname or before.get("DEPLOYBOT_HOSTNAME") or socket.gethostname()
    names = ("DEPLOYBOT_URL", TOKEN_VARIABLE, "DEPLOYBOT_HOSTNAME", "DEPLOYBOT_LABELS")
    given = zip(names, (args.url, token, hostname, ",".join(args.label)), strict=True)
    wanted = {name: value for name, value in given if value}
    if "DEPLOYBOT_URL" not in before and not (args.url and token):
        problems.append("the first install needs --controller URL, and --token-file with what to register with")
    if args.run_as and (args.run_as == "root" or not re.fullmatch("[a-z_][a-z0-9_-]{0,30}", args.run_as)):
        problems.append("--run-as: must be the name of a user, and not root")
    try:
        load_config([], {"PATH": COMMAND_PATH, **before, **wanted})
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems)
    return wanted


def install(argv: list[str], system: System) -> int:
    """Puts the service there, or brings it up to date; what is as it should be stays. Raises ConfigError."""
    parser = argparse.ArgumentParser(prog=f"{CALLED} install", description="Makes this agent a service, or updates it; as root.")
    parser.add_argument("--controller", "--url", dest="url", metavar="URL", help="where it is; an update may leave it out")
    parser.add_argument("--token-file", metavar="FILE", help="holds the token to register with; its content is copied")
    parser.add_argument("--hostname", metavar="NAME", help="the host whose jobs to take (this machine's name)")
    parser.add_argument("--label", metavar="KEY=VALUE", action="append", default=[], help="what apps.yaml may choose this host by")
    parser.add_argument("--run-as", metavar="USER", help="scripts run as USER, who is made where missing, and the agent as root")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    args = parser.parse_args(argv)
    system.dry = args.dry_run
    system.check("start agent.py by hand, --help has its settings")
    text, before = system.settings()
    text = with_settings(text, wanted_settings(args, before))
    user = args.run_as or system.run_as() or NAME
    if not system.holds("getent", "passwd", user):
        home = ["--home-dir", STATE] if user == NAME else []
        system.do("useradd", "--system", "--create-home", *home, "--shell", "/usr/sbin/nologin", user)
    system.put(PROGRAM, Path(__file__).read_bytes(), 0o644)
    system.put(SETTINGS, text.encode(), 0o600)
    system.put(UNIT_FILE, UNIT.encode(), 0o644)
    if args.run_as:
        system.put(DROP_IN, RUN_AS.format(args.run_as).encode(), 0o644)
    is_new, is_running = system.changed, system.holds("systemctl", "is-active", "--quiet", NAME)
    if is_new:
        system.do("systemctl", "daemon-reload")
    if not system.holds("systemctl", "is-enabled", "--quiet", NAME):
        system.do("systemctl", "enable", NAME)
    if is_running and is_new:
        system.do("systemctl", "restart", "--no-block", NAME)
        print("a job that it runs ends first")
    elif not is_running:
        system.do("systemctl", "start", NAME)
    print(f"`ctl.py hosts` shows this host in a moment; where not, `python3 {PROGRAM} doctor` says why")
    return EXIT_DONE


def uninstall(argv: list[str], system: System) -> int:
    """Raises ConfigError."""
    parser = argparse.ArgumentParser(prog=f"{CALLED} uninstall", description="Takes the service away; as root.")
    parser.add_argument("--purge", action="store_true", help=f"{STATE} too: releases, what is shared, the host's secret")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    args = parser.parse_args(argv)
    system.dry = args.dry_run
    system.check("there is no service to take away; end agent.py where it was started, what it keeps is in its --workdir")
    if args.purge and (found := re.search(rf"{STATE}[^ ]*", system.at("/proc/self/mounts").read_text())):
        raise ConfigError([f"--purge would empty {found[0]}, which is mounted: umount it first"])
    if system.at(UNIT_FILE).exists():
        print("a job that it runs ends first")
        system.do("systemctl", "disable", "--now", NAME)
    for place in (DROP_IN, UNIT_FILE, PROGRAM, SETTINGS):
        system.remove(place)
    if system.changed:
        system.do("systemctl", "daemon-reload")
    if args.purge and system.at(STATE).exists() and system.does(f"remove {STATE}"):
        shutil.rmtree(system.at(STATE))
    if args.purge and system.holds("getent", "passwd", NAME):
        system.do("userdel", NAME)
    return EXIT_DONE


def status(argv: list[str], system: System) -> int:
    """1 where it does not run."""
    argparse.ArgumentParser(prog=f"{CALLED} status", description="Shows the service of this machine.").parse_args(argv)
    print(f"{PROGRAM}: {system.run('/usr/bin/python3', str(system.at(PROGRAM)), '--version').stdout.strip() or 'not installed'}")
    if not system.at("/run/systemd/system").exists():
        print("no systemd here, so no service to show: `agent.py doctor` looks over an agent that was started by hand (give it the")
        print("same options), `ctl.py hosts` says whether it is online, and its log is where it was started")
        return EXIT_FAILED
    done = system.run("systemctl", "status", "--no-pager", NAME)
    print(done.stdout or done.stderr, end="")
    return EXIT_DONE if done.returncode == 0 else EXIT_FAILED


# ---------------------------------------------------------------------------------------------------------------------
# Doctor
# Owns: what can be wrong with an agent and its host, and what to do about it. Ignores: doing it.

Finding = tuple[str, str]  # ok, warn or FAIL; what it is and, where it is not ok, what to do


def judged(good: bool, what: str, cure: str, level: str = "FAIL") -> Finding:
    return ("ok", what) if good else (level, f"{what}: {cure}")


def look_at_machine(config: Config, system: System) -> Iterator[Finding]:
    said = system.run("git", "--version").stdout.strip()
    version = tuple(map(int, re.findall(r"\d+", said)[:2]))
    yield judged(version >= GIT_NEEDED, said or "no git", f"the agent needs git {'.'.join(map(str, GIT_NEEDED))} or newer")
    folder = next(path for path in (config.workdir, *config.workdir.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    yield judged(free >= FREE_NEEDED, f"{free >> 20} MiB are free in {folder}", "a release may need more, make room")


def look_at_service(config: Config, system: System) -> Iterator[Finding]:
    if not system.at(UNIT_FILE).exists():
        yield "ok", f"no service {NAME}: looked at with the options and variables given here"
        return
    mode, user = system.at(SETTINGS).stat().st_mode & 0o777, system.run_as() or NAME
    yield judged(not mode & 0o077, f"{SETTINGS} has the mode {mode:o}", f"it holds a token, chmod 600 {SETTINGS}")
    yield judged(system.holds("getent", "passwd", user), f"scripts run as {user}", "there is no such user, run agent.py install")
    is_own = system.at(UNIT_FILE).read_text() == UNIT
    yield judged(is_own, f"{UNIT_FILE} of {VERSION}", "it is another: agent.py install; changes belong into a drop-in", "warn")
    state = system.run("systemctl", "is-active", NAME).stdout.strip()
    yield judged(state == "active", f"the service is {state}", f"journalctl -u {NAME} says why; systemctl restart {NAME}")


def look_at_folder(config: Config, system: System) -> Iterator[Finding]:
    """No link is followed that a script could have put there."""
    known = system.run("getent", "passwd", NAME).stdout.split(":")
    is_its_users = system.at(UNIT_FILE).exists() and config.account is None and len(known) > 2
    owner, folder = int(known[2]) if is_its_users else os.geteuid(), config.workdir
    if not folder.exists():
        yield "warn", f"{folder} is not there: the agent makes it when it starts"
    for path, others in ((folder, 0o022), (folder / ".agent", 0o077), (folder / ".agent/secret", 0o077)):
        with contextlib.suppress(FileNotFoundError):
            found = path.lstat()
            mode = found.st_mode & 0o777
            yield judged(not mode & others, f"{path} has the mode {mode:o}", f"chmod {mode & ~others:o} {path}")
            yield judged(
                found.st_uid == owner, f"{path} belongs to user {found.st_uid}", f"the agent is {owner}: chown {owner} {path}"
            )
    if config.account and folder.exists():
        check_account(config.account, folder)


def known_secret(folder: Path) -> str | None:
    """What the agent signs in with, if it is there; of root's no file of another, to which a script left a link."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        with open(os.open(folder / ".agent/secret", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="ascii") as file:
            return file.read(200).strip() if os.fstat(file.fileno()).st_uid == folder.stat().st_uid else None
    return None


def look_at_controller(config: Config, _: System) -> Iterator[Finding]:
    try:
        date, said = Controller(config.url, lambda: None, DOCTOR_PATIENCE).look("/health")
    except (Unreachable, Refused) as error:
        is_silent = isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, ssl.SSLError)
        cure = ": does the controller run, is that its address and port, is there a firewall between?" * is_silent
        yield "FAIL", f"{config.url} is not reached: {error}{cure}"
        return
    version, cure = one_line(said.get("version")), f"curl -fsS {config.url}/agent.py -o agent.py && sudo python3 agent.py install"
    yield judged(version == VERSION, f"{config.url} has version {version}, this is {VERSION}", f"the same on both: {cure}", "warn")
    ahead = round(time.time() - email.utils.parsedate_to_datetime(date).timestamp())
    yield judged(abs(ahead) <= CLOCK_LIMIT, f"the clock is {ahead} s ahead of the controller's", "timedatectl set-ntp true")
    make = f"`ctl.py token create --role agent --host {config.hostname}` makes one for agent.py install --token-file FILE"
    put_off: PutOff | None = None
    for what, token in (("its own secret", known_secret(config.workdir)), (TOKEN_VARIABLE, config.token), ("no token", None)):
        if token or what == "no token":
            try:
                _, who = Controller(config.url, lambda token=token: token, DOCTOR_PATIENCE).look("/v1/session")
            except Refused:
                continue
            except PutOff as error:  # a token that is valid passes all the same
                put_off = error
                continue
            role, host = one_line(who.get("role")), one_line(who.get("host") or config.hostname)
            good = role in ("agent", "admin") and host.lower() == config.hostname.lower()
            cure = f"which is for the role {role} and the host {host}: {make}"
            yield judged(good, f"{config.hostname} signs in with {what}", cure)
            return
    if put_off:
        wait = f"wait {put_off.retry_after:.0f} s and run doctor again"
        yield "FAIL", f"{put_off}: whether this host's secret or token is known there was not judged: {wait}"
        return
    yield "FAIL", f"neither a secret nor a token of this host is known there: {make}"


def doctor(argv: list[str], system: System) -> int:
    """1 where something is wrong; with the settings of the service, or where there is none, of the agent that `argv` is for."""
    found: list[Finding] = [("ok", f"{CALLED} {VERSION}, Python {platform.python_version()}")]
    _, settings = system.settings()
    env = {**os.environ, "DEPLOYBOT_RUN_AS": system.run_as() or os.environ.get("DEPLOYBOT_RUN_AS", ""), **settings}
    try:
        config = load_config(argv, env)
    except ConfigError as error:
        found += [("FAIL", problem) for problem in error.problems]
    else:
        for look in (look_at_machine, look_at_service, look_at_folder, look_at_controller):
            try:
                found.extend(look(config, system))
            except (ConfigError, Unreachable, OSError, ValueError) as error:
                found += [("FAIL", problem) for problem in getattr(error, "problems", [one_line(error)])]
    print(*(f"{level:<5}{text}" for level, text in found), sep="\n")
    return EXIT_FAILED if any(level == "FAIL" for level, _ in found) else EXIT_DONE


# ---------------------------------------------------------------------------------------------------------------------
# Main
# Owns: arguments, logging, signals, the lock on the working folder. Ignores: everything else.


class LogFormat(logging.Formatter):
    """Times as the controller's log has them: UTC, RFC 3339."""

    converter = time.gmtime
    default_time_format, default_msec_format = "%Y-%m-%dT%H:%M:%S", "%s.%03dZ"


def set_up_logging(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormat("%(asctime)s %(levelname)-7s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def catch_signals(agent: Agent) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: agent.events.put("signal"))


def lock_workdir(folder: Path) -> int | None:
    """Two agents in one folder would take each other's running jobs for those of a dead one. Raises ConfigError."""
    try:
        (folder / ".agent").mkdir(parents=True, exist_ok=True, mode=0o700)
        return take_lock(folder / ".agent" / "lock")
    except OSError as error:
        raise ConfigError([f"--workdir {folder}: cannot be written by {user_name()} ({error.strerror})"]) from error


def prepare(config: Config) -> int | None:
    """The lock on the working folder, None while another agent has it. Raises ConfigError."""
    lock = lock_workdir(config.workdir)
    if lock is not None and config.account:
        check_account(config.account, config.workdir)
    return lock


VERBS = {"install": install, "uninstall": uninstall, "status": status, "doctor": doctor}


def check_verb(argv: list[str]) -> None:
    """Raises ConfigError where the first word is no verb: without one all are options."""
    from difflib import get_close_matches  # which an agent at work has no use for

    if argv and not argv[0].startswith("-") and argv[0] not in VERBS:
        meant = get_close_matches(argv[0], VERBS, 2)
        asked = f"did you mean {' or '.join(meant)}?" if meant else f"there are {', '.join(VERBS)}"
        raise ConfigError([f"no verb {argv[0]}: {asked} (see {CALLED} --help)"])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in VERBS:
            return VERBS[argv[0]](argv[1:], System())
        check_verb(argv)
        config = load_config(argv, dict(os.environ))
        lock = prepare(config)
    except (ConfigError, OSError) as error:
        for problem in getattr(error, "problems", [one_line(error)]):
            print(f"{CALLED}: {problem}", file=sys.stderr)
        return EXIT_USAGE
    if lock is None:
        print(f"{CALLED}: another agent works in {config.workdir}", file=sys.stderr)
        return EXIT_BUSY
    set_up_logging(config.log_level)
    sys.setswitchinterval(TURN)
    hide_memory()
    CHILDREN.adopt()
    more = config.slots, config.allow_repos, config.account, config.variables
    agent = Agent(config, Machine(config.workdir, config.git_protocols, dict(os.environ), *more))
    catch_signals(agent)
    return agent.run()


if __name__ == "__main__":
    sys.exit(main())
