#!/usr/bin/env python3
"""DeployBot, the controller: "this commit, on these hosts" comes in, waits in a durable queue and goes to each host's agent.

One file, the standard library, one SQLite database. A signed GitHub push, the API or ctl.py asks for jobs; the agent of a host
takes its job by a heartbeat, uploads its output while it runs and reports how it ended; people watch over SSE.

Life of a job    pending -> running -> success | failed | cancelled. Each change is one UPDATE that names the status and the attempt
                 it starts from, so that an ended job never changes and an old attempt changes nothing.
What is true     The database. Memory (queue, leases, hub) is an index that Jobs.recover() rebuilds at start.
Commit, then     Whatever memory learns or a reader is told is an effect of a transaction: Store.write() runs effects after COMMIT, in
announce         the order of commit. If the COMMIT fails, none of them happens.
Threads          main: signals, sweep once a second. accept: one. A connection: one each; parked heartbeats and streams sleep on a
                 Condition. There is no writer thread: of the threads that want to write, one commits for all that wait.
Lock order       Store._writer, then one of the others (each guards one structure and is held for a look or an assignment), never two.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import contextlib
import dataclasses
import datetime
import difflib
import email.utils
import enum
import errno
import fcntl
import fnmatch
import functools
import gc
import hashlib
import hmac
import http.server
import ipaddress
import itertools
import json
import logging
import math
import os
import pathlib
import queue
import re
import resource
import secrets
import select
import signal
import socket
import socketserver
import sqlite3
import ssl
import struct
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple, Self, TypeVar

if sys.version_info < (3, 11):
    sys.exit("deploybot.py needs Python 3.11 or newer; this is " + sys.version.split()[0])

VERSION = "0.1.0"

KIB = 1024
MIB = 1024 * KIB
MAX_HEAD = 16 * KIB  # bytes of a request's head; each unfinished one costs us that much memory
MAX_LINE = 8 * KIB  # bytes of one line of a head
MAX_BODY = 1 * MIB  # bytes of a request's body
MAX_PUSH = 25 * MIB  # bytes: what GitHub sends at most
MAX_DEPTH = 64  # levels of nested JSON
MAX_WAIT = 25  # seconds that a heartbeat parks: under the 30 s at which many proxies give up
MAX_LINES = 1000  # log lines an upload
MAX_MESSAGE = 64 * KIB  # bytes of one log line; longer ones are cut and say so
MAX_METADATA = 16 * KIB  # bytes of a job's metadata as JSON
MAX_ERROR = 4 * KIB  # characters of a job's error
MAX_TIMEOUT = 7 * 86400  # seconds that a job may run
MAX_RETRIES = 100
MAX_VALUE = 32_768  # characters of an environment variable
MAX_BATCH = 10_000  # hosts at a time, or that may fail
MAX_RUNNING = 256  # jobs that one heartbeat names
MAX_FAILED_SIGN_INS = 10  # a minute from one address
MAX_RATE_KEYS = 10_000  # addresses or tokens that a rate limit remembers
MAX_PUBLIC_BODIES = 64 * MIB  # of callers without a token, in memory at once, beside FREE_BODY of each
FREE_BODY = 64 * KIB  # bytes of such a body that count for nothing, so that an ordinary push always passes
HEAD_DEADLINE = 10.0  # seconds from the first byte of a head to its last
BODY_DEADLINE = 20.0  # seconds for a body
IDLE_DEADLINE = 75  # seconds that a kept-alive connection may say nothing
SEND_DEADLINE = 20  # seconds without progress after which a reader counts as gone
STOP_DEADLINE = 4.0  # seconds that connections get to end at stop
PULSE = 15.0  # seconds between the comments on a silent stream: what finds dead readers
RETRY_AFTER = 5  # seconds
MANY = 64  # connections: above, requests are asked how long they have lain unread
UPLOADS = 1 * MIB  # of log lines in one commit: what a claim may have to wait for
MAX_WRITES = 256  # callers that wait for a commit: a fraction of a second's work
RETURNS = 500  # agents a second that are asked to come back after a restart: a quarter of what two cores can take
GRACE = 60  # seconds that an agent gets to report a timeout before the controller ends the job itself
POLL_INTERVAL = 5  # seconds between heartbeats of an agent that does not park, at least
POLLS = 1000  # such heartbeats a second of all agents together, at most
FLUSH_INTERVAL = 10.0  # seconds between two writings of the agents' last contact
MAX_SESSIONS = 100  # browsers that are signed in with one token: the oldest goes
LONG_SWEEP = 3.0  # seconds between two sweeps after which it was the controller that was away, not its agents
SESSION_LIFETIME = 7 * 86400  # seconds that a browser stays signed in
DELIVERY_DAYS = 30  # days that a delivery is remembered: GitHub redelivers for three
FOR_EVER = 1_000_000  # days
RETENTION_PAUSE = 3600.0  # seconds between two walks over the old jobs
RETENTION_BUDGET = 0.1  # seconds of one sweep that go into removing
RETENTION_JOBS = 50  # jobs that one transaction of retention looks at
RETENTION_EVENTS = 1000  # events that it removes: nobody waits for long behind it
HUB_EVENTS = 1024  # recent events kept in memory; a reader that is behind them reads the database
HUB_BYTES = 8 * MIB
READ_BYTES = 128 * KIB  # of events that one step of a reader takes: what a slow one holds
PAGE_BYTES = 1 * MIB  # of events in one page of a log
MANY_ROWS = 64  # of one kind in one statement
RECENT = 4096  # jobs, and ends of their logs, that are known without asking SQLite: some 3 KiB each
READERS = 2  # reading connections: more would only wait for the same two cores
MIGRATION_LIMIT = 3600  # seconds that systemd is asked to wait for a migration and its backup
SHORT_SECRET = 20  # characters: shorter ones can be guessed
ACCEPTS = 256  # connections that are accepted before the others go on
TURN = 0.005  # seconds: a thread that wants the GIL looks up once in so long, as Python has it
TURN_MORE = 100e-6  # seconds for each connection, where that is more: a look costs up to 30 us, and ten thousand threads would do nothing else
RUSH = 2.0  # seconds of their time that the accepting may owe the others: thousands that connect at once cost 0.2 s
SPARE_FILES = 64  # descriptors that connections leave for the database and the rest
COLUMNS = 80  # of a terminal
MAX_APP_LABELS = 1000  # apps that /metrics tells apart, with up to five lines each
MAX_ERRORS = 20  # wrong fields that one answer names: enough to see what is wrong
STACK = 512 * KIB  # a thread's stack; what is not touched costs no memory

ASSETS: dict[str, str] = {}

log = logging.getLogger("deploybot")
T = TypeVar("T")
NOTHING: Mapping[str, Any] = {}  # a default that nobody changes


# == Errors ============================================================================================================
# Owns what can go wrong, as data. Ignores statuses and words of HTTP: a table near the server has them.


class DeployBotError(Exception):
    """What a caller can be told. `str(error)` says what is wrong and, where it can, what to do next; `more` is for programs."""

    def __init__(self, detail: str, **more: Any):
        super().__init__(detail)
        self.more = more


class ValidationError(DeployBotError):
    """Fields are wrong. `errors` is [(field, message)], every wrong field at once."""

    def __init__(self, errors: list[tuple[str, str]]):
        said = [{"field": field, "message": message} for field, message in errors]
        super().__init__("; ".join(f"{field}: {message}" for field, message in errors), errors=said)
        self.errors = errors


def named(name: str, meaning: str) -> type[DeployBotError]:
    """One that is no more than its name."""
    return type(name, (DeployBotError,), {"__doc__": meaning})


Malformed = named("Malformed", "the input cannot be parsed at all")
NotFound = named("NotFound", "no such thing")
Conflict = named("Conflict", "the state does not allow it; a gap in a log brings `next_offset`")
Unauthorized = named("Unauthorized", "no token, or none that counts")
Forbidden = named("Forbidden", "the token counts, but not for this")
TooLarge = named("TooLarge", "more bytes than the limit")
TooMany = named("TooMany", "more calls than the limit; `retry_after`: seconds until there is room again")
Unavailable = named("Unavailable", "cannot be done now, and may be in RETRY_AFTER seconds")


class StartError(DeployBotError):
    """The controller cannot start. `problems`: all of them, a line each, whatever stands in it."""

    def __init__(self, *problems: str):
        self.problems = tuple("".join(char if char.isprintable() else " " for char in problem) for problem in problems)
        super().__init__("\n".join(self.problems))


class AppsError(ValidationError):
    """apps.yaml is wrong. `problems` is [(line, message)], every mistake at once."""

    def __init__(self, problems: list[tuple[int, str]]):
        super().__init__([(f"line {line}", message) for line, message in problems])
        self.problems = problems


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean ...?` for the word that looks most like this one, or nothing."""
    choices = list(words)
    if len(choices) > 100:  # difflib is slow, and who has so many mistypes the end more often than the start
        choices = [choice for choice in choices if choice[:2] == word[:2]][:1000]
    one = choices if len(choices) == 1 and choices[0].startswith(word) else difflib.get_close_matches(word, choices, 1)
    return f"; did you mean {one[0]}?" if one else ""


# == Config ============================================================================================================
# Owns every setting: flags over environment over defaults, all problems at once. Ignores what the settings do.

TIMES = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
SIZES = {"": 1, "KiB": KIB, "MiB": MIB, "GiB": 1024 * MIB}
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def quantity(text: str, units: Mapping[str, float], words: str) -> float:
    """A number above 0 with one of the units behind it. Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([A-Za-z]*)", text, re.ASCII)
    if not match or match[2] not in units or not float(match[1]):
        raise ValueError(f"must be {words}")
    return float(match[1]) * units[match[2]]


def size(text: str) -> int:
    """Bytes. Raises ValueError."""
    return math.ceil(quantity(text, SIZES, "a size such as 512KiB, 10MiB or 1GiB"))


def whole(text: str, most: int = 999_999_999, words: str = "a whole number, 0 or more") -> int:
    """Raises ValueError."""
    if not re.fullmatch("[0-9]+", text) or len(text) > len(str(most)) or int(text) > most:
        raise ValueError(f"must be {words}")
    return int(text)


duration = functools.partial(quantity, units=TIMES, words="a duration such as 200ms, 30s, 5m, 2h or 3d")  # seconds
port = functools.partial(whole, most=65535, words="a port from 0 to 65535")  # 0 lets the system choose


def one_of(*words: str) -> Callable[[str], str]:
    """A check that takes these words, in any case, and returns them as they stand here."""
    known = {word.lower(): word for word in words}

    def check(text: str) -> str:
        if text.lower() not in known:
            raise ValueError("must be one of " + ", ".join(words))
        return known[text.lower()]

    return check


def flag(text: str) -> bool:
    """A switch from the environment. Raises ValueError."""
    return one_of("true", "false", "1", "0", "yes", "no", "")(text) in ("true", "1", "yes")


def optional_path(text: str) -> pathlib.Path | None:
    return pathlib.Path(text) if text else None


def networks(text: str) -> tuple[Network, ...]:
    """Addresses and networks with commas between them. Raises ValueError."""
    return tuple(ipaddress.ip_network(word.strip()) for word in text.split(",") if word.strip())


def bearer(token: str) -> str:
    """A token that a header can carry (RFC 6750, 2.1). Raises ValueError."""
    if not re.fullmatch(r"[!-~]+", token):
        raise ValueError("a token must be of visible ASCII characters, without blanks")
    return token


class Option(NamedTuple):
    field: str  # a_b of Config
    name: str  # the flag --a-b; a secret has none
    variable: str  # DEPLOYBOT_A_B
    parse: Callable[[str], Any]  # raises ValueError
    default: str | None  # None: a secret
    help: str


def option(parse: Callable[[str], Any], default: str | None, help: str) -> Any:
    return dataclasses.field(repr=default is not None, metadata={"option": (parse, default, help)})


def options_of(config: Any, secrets: bool) -> list[Option]:
    names = [(one.name, one.metadata["option"]) for one in dataclasses.fields(config)]
    found = [Option(name, name.replace("_", "-"), "DEPLOYBOT_" + name.upper(), *rest) for name, rest in names]
    return [option for option in found if (option.default is None) is secrets]


def credential(variable: str, env: Mapping[str, str]) -> str:
    """The file that systemd's LoadCredential=deploybot_... brought for it (systemd.exec(5)), or nothing."""
    path = os.path.join(env.get("CREDENTIALS_DIRECTORY") or "/nonexistent", variable.lower())
    return path if os.path.isfile(path) else ""


def read_secret(variable: str, env: Mapping[str, str]) -> str | None:
    """The secret in VARIABLE, in the file that VARIABLE_FILE names, or a credential. Raises ValueError or OSError."""
    value, path = env.get(variable), env.get(variable + "_FILE")
    if value and path:
        raise ValueError(f"is set, and {variable}_FILE too; keep one")
    path = path or ("" if value else credential(variable, env))
    if path:
        try:
            value = pathlib.Path(path).read_text(encoding="utf-8").strip()
        except UnicodeDecodeError:  # which would tell a byte of it
            raise ValueError(f"{path} is not UTF-8") from None
        if not value:
            raise ValueError(f"{path} is an empty file")
    return (value or "").strip() or None


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting, checked. Durations in seconds; secrets are None where not set."""

    host: str = option(str, "0.0.0.0", "address to listen on")
    port: int = option(port, "8080", "port to listen on")
    db: pathlib.Path = option(pathlib.Path, "./data/deploybot.db", "the database; it and its folder are made when missing")
    apps: pathlib.Path = option(pathlib.Path, "./apps.yaml", "which repository goes to which hosts")
    log_level: str = option(one_of("DEBUG", "INFO", "WARNING", "ERROR"), "INFO", "DEBUG, INFO, WARNING or ERROR")
    log_format: str = option(one_of("plain", "json"), "plain", "plain or json")
    agent_timeout: float = option(duration, "60s", "without contact for so long, a host is shown offline")
    lost_after: float = option(duration, "10m", "without contact for so long, a running job is ended as agent_lost")
    pending_expiry: float = option(duration, "24h", "a job that waits for longer is ended as expired")
    retention_days: int = option(whole, "90", "ended jobs, logs and audit rows are removed after so long; 0: never")
    log_limit: int = option(size, "10MiB", "what is kept of the log of one job")
    rate_limit: int = option(whole, "0", "writes a minute that one token may make, agents' calls aside; 0: no limit")
    trusted_proxy: tuple[Network, ...] = option(networks, "", "addresses or networks of proxies whose X-Forwarded-For/-Proto count")
    tls_cert: pathlib.Path | None = option(optional_path, "", "PEM file of the certificate and its chain; read again on SIGHUP")
    tls_key: pathlib.Path | None = option(optional_path, "", "PEM file of its key")
    open: bool = option(flag, "false", "requests from this machine need no token; never behind a proxy")
    replicated: bool = option(flag, "false", "Litestream replicates the database, and makes all of its checkpoints")
    webhook_secret: str | None = option(str, None, "what GitHub signs its pushes with; two, comma separated, while you change it")
    token: str | None = option(bearer, None, "for everything; without it the first start writes one to admin.token by the database")
    agent_token: str | None = option(bearer, None, "for enrolment: an agent registers with it, then uses a secret of its own")
    read_token: str | None = option(bearer, None, "for reading alone")

    @classmethod
    def load(cls, flags: Mapping[str, str | None], env: Mapping[str, str]) -> Config:
        """From flags and environment. Raises StartError with every problem."""
        values: dict[str, Any] = {}
        problems: list[str] = []
        for option in options_of(cls, secrets=False):
            given = flags.get(option.field)
            source = f"--{option.name}" if given is not None else option.variable
            text = given if given is not None else env.get(option.variable) or option.default or ""  # empty is not set
            if option.parse is optional_path and given is None:
                text = text or credential(option.variable, env)
            try:
                values[option.field] = option.parse(text)
            except ValueError as error:
                problems.append(f"{source}: {text!r} {error}")
        for option in options_of(cls, secrets=True):
            try:
                value = read_secret(option.variable, env)
                values[option.field] = value and option.parse(value)
            except (ValueError, OSError) as error:
                problems.append(f"{option.variable}: {error}")
        if bool(values.get("tls_cert")) != bool(values.get("tls_key")):
            problems.append("--tls-cert and --tls-key belong together: set both or none")
        if problems:
            raise StartError(*problems)
        return cls(**values)


OPTIONS = options_of(Config, secrets=False)
SECRETS = {option.field: option for option in options_of(Config, secrets=True)}


# == Models ============================================================================================================
# Owns the shapes: what comes from outside becomes a model here, or one ValidationError. Ignores where it came from.

Status = enum.StrEnum("Status", ["PENDING", "RUNNING", "SUCCESS", "FAILED", "CANCELLED"])
ENDED = frozenset((Status.SUCCESS, Status.FAILED, Status.CANCELLED))
# Why a job ended as it did, where that says more than its status.
Reason = enum.StrEnum(
    "Reason", "EXIT_CODE FETCH_FAILED TIMEOUT HEALTH_CHECK REJECTED AGENT_LOST AGENT_CRASHED CANCELLED SUPERSEDED STOPPED EXPIRED"
)
Hold = enum.StrEnum("Hold", ["BATCH", "PAUSE", "LOCK"])  # why a pending job is in no queue
State = enum.StrEnum("State", ["PENDING", "RUNNING", "SUCCESS", "PARTIAL", "FAILED", "ROLLED_BACK", "CANCELLED"])  # of a deployment
UNDER_WAY = frozenset((State.PENDING, State.RUNNING))
Kind = enum.StrEnum("Kind", ["PUSH", "DEPLOY", "HOOK", "RETRY", "ROLLBACK"])  # what made a deployment
# What a route asks for (ANY: whoever has a token), and the last four are roles that a principal has.
Scope = enum.StrEnum("Scope", ["PUBLIC", "ANY", "VIEWER", "OPERATOR", "AGENT", "ADMIN"])
ROLES = (Scope.ADMIN, Scope.OPERATOR, Scope.VIEWER, Scope.AGENT)
# Seconds that a request may have lain unread: then it is told to come again, so that waiting has an end. An agent can wait better
# than a person; a push, which GitHub sends once, is always taken.
TOO_LATE = {Scope.AGENT: 2.0, Scope.VIEWER: 5.0, Scope.OPERATOR: 5.0, Scope.ADMIN: 5.0}
# What each role may call, beside what is public and what takes any token; an admin may call all.
GRANTS = {Scope.VIEWER: {Scope.VIEWER}, Scope.OPERATOR: {Scope.VIEWER, Scope.OPERATOR}, Scope.AGENT: {Scope.AGENT}}

LEVELS = ("debug", "info", "warning", "error")
LINE = ("message", "level", "timestamp")  # of a log
ENDED_WORDS = ("success", "failed", "cancelled")
NOTIFY_EVENTS = ("failed", "recovered", "success", "stuck")
NOTIFY_FORMATS = ("json", "slack")
# What a job's agent gets of its app.
IN_SPEC = ("clone_url", "build", "activate", "deploy", "env", "shared", "keep_releases", "health_check", "rollback_on_failure")
AGENT_REASONS = ("exit_code", "fetch_failed", "timeout", "health_check", "rejected", "agent_crashed", "cancelled")

COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
OUR_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", re.ASCII)
STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)", re.ASCII)
# What git-check-ref-format(1) refuses, and a leading `-`, which a program could take for an option.
BAD_REF = re.compile(r"\.\.|//|@\{|[\x00-\x20\x7f~^:?*\[\\]|^[-/.]|/\.|[/.]$|\.lock(?:/|$)|^@$")

NO_MARK = bytes(set(range(256)) - set(b'[]{}"'))
ONE_KIND = bytes.maketrans(b"{}", b"[]")

dump = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":")).encode  # JSON without blanks


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def small_integer(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= int(text) < 1 << 63:
        raise ValueError("an integer has more than 64 bits")
    return int(text)


def finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:40]} is not a number of JSON")
    return float(text)


DECODER = json.JSONDecoder(object_pairs_hook=without_repeats, parse_int=small_integer, parse_float=finite, parse_constant=finite)


def is_too_deep(body: bytes) -> bool:
    """More than MAX_DEPTH levels of nesting; what is no JSON may be called so, too."""
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = body.translate(ONE_KIND, NO_MARK).replace(b'""', b"")  # most strings hold no bracket
    brackets = b"".join(marks.split(b'"')[::2])  # outside of strings
    levels = MAX_DEPTH if b"[" * (MAX_DEPTH + 1) in brackets else 0  # so many in a row are so many levels
    while brackets and levels < MAX_DEPTH:  # each round takes the innermost level away
        brackets, levels = brackets.replace(b"[]", b""), levels + 1
    return brackets != b""


def load_json(body: bytes) -> Any:
    """RFC 8259, and what RFC 7493 asks for: no repeated keys, no lone surrogates. Raises Malformed."""
    try:
        text = body.decode("utf-8")
        if is_too_deep(body):
            raise ValueError(f"more than {MAX_DEPTH} levels")
        value = DECODER.decode(text)
        if "\\" in text and "\\u" in text:  # the first is found, or not, ten times as fast
            dump(value).encode("utf-8")
    except ValueError as error:  # of JSON, of Unicode, or ours
        raise Malformed(f"the body is not good JSON: {error}") from None
    return value


def matches(pattern: str | re.Pattern[str], words: str) -> Callable[[str], str | None]:
    """A check of a text: what is wrong with it, or None."""
    form = re.compile(pattern)
    return lambda text: None if form.fullmatch(text) else "must be " + words


LABEL = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
is_commit = matches(COMMIT, "40 or 64 hex digits in lower case")
is_id = matches(ID, "a job's id")
is_repo = matches(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}/(?!\.{1,2}\Z)[A-Za-z0-9._][A-Za-z0-9._-]{0,99}", "owner/name")
is_host = matches(rf"(?=.{{1,253}}\Z){LABEL}(?:\.{LABEL})*", "a host name as in RFC 1123")
is_delivery = matches("[A-Za-z0-9._-]{1,100}", "a delivery's id")
is_token_name = matches("[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", "1 to 64 of A-Z, a-z, 0-9, dot, dash, underscore and @")
is_app = matches("[a-z0-9][a-z0-9._-]{0,63}", "1 to 64 of a-z, 0-9, dot, dash and underscore, starting with a letter or digit")


def is_ref(text: str) -> str | None:
    """git-check-ref-format(1), at most 255 characters, only printable ones."""
    if 0 < len(text) <= 255 and text.isprintable() and not BAD_REF.search(text):
        return None
    return "must be a branch, a tag or a commit as git names them, of at most 255 characters, and not start with -"


def lower(text: str) -> str:
    """In lower case, but for letters outside ASCII, of which some have an ASCII letter as their lower case."""
    return text.lower() if text.isascii() else text


@functools.lru_cache(maxsize=256)  # what happens together has one time
def stamp_of(milliseconds: int) -> str:
    at = datetime.datetime.fromtimestamp(milliseconds // 1000, datetime.UTC)
    return f"{at.isoformat()[:19]}.{milliseconds % 1000:03d}Z"


def rfc3339(seconds: float) -> str:
    """`2026-11-23T13:13:37.123Z` of a Unix time."""
    return stamp_of(round(seconds * 1e6) // 1000)


def unix_time(stamp: str) -> float:
    return datetime.datetime.fromisoformat(stamp).timestamp()


@functools.lru_cache(maxsize=4096)  # lines of one moment come together
def stored_time(text: str) -> str:
    """A time of RFC 3339 as it is stored, in UTC and milliseconds. Raises ValueError."""
    with contextlib.suppress(ValueError, OverflowError):  # no such day, or a year that UTC pushes out of 1 to 9999
        if STAMP.fullmatch(text):
            stamp = rfc3339(unix_time(text))
            return text if OUR_STAMP.fullmatch(text) else stamp
    raise ValueError("must be a time as in RFC 3339")


class Fields:
    """Reads the fields of an untrusted dict one by one, gathers every error, and raises them together in done()."""

    def __init__(self, data: Any, known: Set[str] | None = None, prefix: str = "", quotes: bool = False):
        self.errors: list[tuple[str, str]] = []
        self.prefix, self.quotes = prefix, quotes  # quotes: an error brings the value along
        if not isinstance(data, dict):
            raise ValidationError([(prefix.rstrip(".") or "body", "must be an object")])
        self.data: Any = data
        if known is not None and not data.keys() <= known:
            for name in sorted(data.keys() - known)[:MAX_ERRORS]:
                self.wrong(name[:100], "is not known" + nearest(name[:100], sorted(known)))

    def wrong(self, name: str, message: str) -> None:
        self.errors.append((self.prefix + name, message))

    def take(self, name: str, kind: type, words: str, required: bool) -> Any:
        """The value if it is there and of that type; else None, and an error where that is wrong."""
        value = self.data.get(name)
        if type(value) is kind:
            return value
        if value is not None or required:
            self.wrong(name, "is required" if value is None else f"must be {words}")
        return None

    def text(self, name: str, check: Callable[[str], str | None], required: bool = False, fold: bool = False) -> Any:
        value = self.data.get(name)
        if type(value) is not str:
            return self.take(name, str, "a string", required)
        return self._checked(name, value, check, fold)

    def _checked(self, name: str, value: str, check: Callable[[str], str | None], fold: bool) -> str:
        folded = lower(value) if fold else value
        if problem := check(folded):
            self.wrong(name, f"{value[:80]!r} {problem}" if self.quotes else problem)
        return folded

    def texts(self, name: str, check: Callable[[str], str | None], required: bool = False, fold: bool = False) -> Any:
        """A list of at least one; repeated entries are dropped."""
        words = "a list with at least one string: [first, second]"
        values = self.take(name, list, words, required)
        if values is None or (values and all(isinstance(value, str) for value in values)):
            read = (self._checked(name, value, check, fold) for value in values or () if len(self.errors) < MAX_ERRORS)
            return values and tuple(dict.fromkeys(read))
        self.wrong(name, f"must be {words}")
        return None

    def read(self, name: str, parse: Callable[[Any], T]) -> T | None:
        """What `parse` makes of it; ValueError is an error of the field."""
        try:
            return None if self.data.get(name) is None else parse(self.data[name])
        except ValueError as error:
            self.wrong(name, str(error))
            return None

    def choice(self, name: str, words: Iterable[str], required: bool = False) -> Any:
        words = tuple(words)
        return self.text(name, lambda text: None if text in words else "must be one of " + ", ".join(words), required)

    def integer(self, name: str, low: int, high: int, required: bool = False) -> Any:
        value = self.take(name, int, "an integer", required)
        if value is not None and not low <= value <= high:
            self.wrong(name, f"must be from {low} to {high}")
        return value

    def boolean(self, name: str) -> bool:
        return bool(self.take(name, bool, "true or false", False))

    def mapping(self, name: str, limit: int) -> dict[str, Any]:
        value = self.take(name, dict, "an object", False) or {}
        if value and len(dump(value).encode()) > limit:
            self.wrong(name, f"must be at most {limit} bytes of JSON")
        return value

    def items(self, name: str, limit: int, read: Callable[[Any], T], required: bool = False, at_once: Any = None) -> list[T] | None:
        """A list of objects, each read by `read`, which raises ValidationError; `at_once` reads those that are good, or none."""
        values = self.take(name, list, "a list", required)
        if values is None or len(values) > limit:
            if values:
                self.wrong(name, f"must have at most {limit} entries")
            return None
        found: list[T] = (at_once and at_once(values)) or []
        for index, value in enumerate(values if not found else ()):
            try:
                found.append(read(value))
            except ValidationError as error:
                for inner, message in error.errors:
                    self.wrong(f"{name}[{index}]" + (f".{inner}" if isinstance(value, dict) else ""), message)
            if len(self.errors) >= MAX_ERRORS:
                break
        return found

    def done(self, model: T) -> T:
        """The model, or ValidationError with all that was wrong."""
        if self.errors:
            raise ValidationError(self.errors)
        return model


def field(how: Callable[..., Any], *rest: Any, default: Any = None, then: Any = None, **more: Any) -> Any:
    """A field of a model: the method of Fields that reads it, what that takes, and a default. `then` converts what was read."""

    def read(f: Fields, name: str) -> Any:
        found = how(f, name, *rest, **more)
        return default if found is None else then(found) if then else found

    values: dict[str, Any] = {"default_factory": dict} if how is Fields.mapping else {"default": default}
    return dataclasses.field(**values, metadata={"read": read, "required": more.get("required", False)})


@functools.cache
def readers(model: Any) -> dict[str, tuple[Callable[[Fields, str], Any], bool]]:
    """By the name of the field: what reads it, and whether it has to be there."""
    return {one.name: (one.metadata["read"], one.metadata["required"]) for one in dataclasses.fields(model) if one.metadata}


class Model:
    """A dataclass whose fields say how they are read from an untrusted dict; `strict`: no others may be in it."""

    strict = False

    @classmethod
    def read(cls: type[T], f: Fields) -> T:
        fields, there = readers(cls).items(), f.data  # type: ignore[arg-type]
        return cls(**{name: read(f, name) for name, (read, required) in fields if required or name in there})

    @classmethod
    def parse(cls, data: Any) -> Self:
        """Raises ValidationError with all that is wrong."""
        f = Fields(data, readers(cls).keys() if cls.strict else None)  # type: ignore[arg-type]
        return f.done(cls.read(f))


class Job(NamedTuple):
    """One deployment of one ref on one host: a row of `jobs`, in the order of its columns. Times are RFC 3339, UTC."""

    id: str
    repo: str
    ref: str
    host: str
    app: str
    status: str
    reason: str | None
    hold: str | None
    metadata: str  # JSON
    attempt: int
    retries: int
    timeout: int  # seconds
    created_at: str
    created_by: str
    started_at: str | None
    completed_at: str | None
    cancel_requested_at: str | None
    assigned_agent: str | None
    exit_code: int | None
    error: str | None
    commit: str | None
    rolled_back_to: str | None
    superseded_by: str | None
    retry_of: str | None
    deployment_id: str | None
    spec: str  # JSON; its agent alone gets it
    session: str | None  # of the agent that claimed it; nobody gets it
    queued_at: str  # since when it is pending, which expiry counts from; nobody gets it

    def public(self) -> dict[str, Any]:
        """What every reader may see: all but the last three."""
        shown: dict[str, Any] = dict(zip(self._fields[:-3], self, strict=False))
        shown["metadata"] = json.loads(self.metadata) if self.metadata != "{}" else {}
        return shown

    def for_agent(self) -> dict[str, Any]:
        return {**self.public(), "spec": json.loads(self.spec)}

    def place(self) -> str:
        """Which of the counts of its deployment it is in."""
        return "held" if self.hold and self.status == Status.PENDING else self.status


PROGRESS = ("held", "pending", "running", "success", "failed", "cancelled")


class Deployment(NamedTuple):
    """Jobs of one app that belong together: a row of `deployments`, in the order of its columns. The counts are of its jobs."""

    id: str
    app: str
    repo: str
    ref: str
    branch: str | None  # what a push was to: newer ones to it win
    kind: str
    status: str
    reason: str | None  # in words
    strategy: str  # JSON
    hosts: int
    held: int = 0
    pending: int = 0
    running: int = 0
    success: int = 0
    failed: int = 0
    cancelled: int = 0
    rolled_back: int = 0  # of the failed ones: whose host went back to what it ran before
    hold: str | None = None  # why the held ones wait
    resume_at: str | None = None  # when a pause is over
    override: int = 0  # goes on although the app is locked
    retry_of: str | None = None
    superseded_by: str | None = None
    delivery_id: str | None = None
    created_at: str = ""
    created_by: str = ""
    started_at: str | None = None
    completed_at: str | None = None

    def judged(self) -> State:
        """What the counts say."""
        if self.held or self.pending or self.running:
            return State.RUNNING if self.running or self.success or self.failed else State.PENDING
        if self.success:
            return State.SUCCESS if self.success == self.hosts else State.PARTIAL
        if self.failed:
            return State.ROLLED_BACK if self.rolled_back == self.failed else State.FAILED
        return State.CANCELLED

    def public(self) -> dict[str, Any]:
        shown = self._asdict()
        progress = {name: shown.pop(name) for name in PROGRESS}
        del shown["rolled_back"]
        return {**shown, "strategy": json.loads(self.strategy), "override": bool(self.override), "progress": progress}


class Lock(NamedTuple):
    """What keeps an app from being deployed: a row of `locks`."""

    app: str
    reason: str
    by: str
    at: str
    until: str | None

    def __str__(self) -> str:
        until = f" until {self.until}" if self.until else ""
        return f"{self.app} is locked by {self.by} since {self.at}{until}: {self.reason}"


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Agent:
    """A registered agent: a row of `agents`, in the order of its columns, and below what is in memory alone."""

    id: str
    hostname: str
    capabilities: str  # JSON
    slots: int
    session: str
    drained: int
    token_sha256: str | None
    registered_at: str
    last_heartbeat: str  # written every FLUSH_INTERVAL
    current: str = "{}"  # JSON of `runs`
    contact: float = 0.0  # monotonic
    online: bool = True  # what it last said of itself
    told: frozenset[tuple[str, int]] = frozenset()  # (job id, attempt) that the last answer named as to be stopped
    labels: frozenset[str] = frozenset()  # key=value, of its capabilities
    runs: Mapping[str, str] = dataclasses.field(default_factory=dict)  # app to the commit that the host says it runs

    def row(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__slots__[:10])


@dataclasses.dataclass(slots=True)
class JobRequest(Model):
    """What somebody asked for: POST /v1/jobs, or a push for one host."""

    strict = True
    repo: str = field(Fields.text, is_repo, required=True)
    ref: str = field(Fields.text, is_ref, required=True)
    host: str = field(Fields.text, is_host, required=True, fold=True)
    app: str | None = field(Fields.text, is_app)
    metadata: dict[str, Any] = field(Fields.mapping, MAX_METADATA)
    force: bool = field(Fields.boolean, default=False)
    timeout: int | None = field(Fields.integer, 1, MAX_TIMEOUT)
    retries: int | None = field(Fields.integer, 0, MAX_RETRIES)
    override: bool = field(Fields.boolean, default=False)  # although the app is locked


is_some_commit = matches("[0-9a-f]{7,64}", "a commit, or its first 7 digits or more")


@dataclasses.dataclass(slots=True)
class DeploymentRequest(Model):
    """POST /v1/deployments."""

    strict = True
    app: str = field(Fields.text, is_app, required=True)
    ref: str | None = field(Fields.text, is_ref)
    hosts: tuple[str, ...] | None = field(Fields.texts, is_host, fold=True)  # None: all of the app
    rollback: bool = field(Fields.boolean, default=False)
    to: str | None = field(Fields.text, is_some_commit)
    lock: bool = field(Fields.take, bool, "true or false", False, default=True)  # after a rollback
    override: bool = field(Fields.boolean, default=False)
    force: bool = field(Fields.boolean, default=False)
    dry_run: bool = field(Fields.boolean, default=False)
    metadata: dict[str, Any] = field(Fields.mapping, MAX_METADATA)

    def check(self) -> DeploymentRequest:
        """Raises ValidationError for fields that do not go together."""
        if self.rollback and self.ref:
            raise ValidationError([("ref", "has no place in a rollback: `to` names the commit")])
        if not self.rollback and self.to:
            raise ValidationError([("to", "is of a rollback")])
        if not self.rollback and not self.ref:
            raise ValidationError([("ref", "is required")])
        return self


@dataclasses.dataclass(slots=True)
class HookRequest(Model):
    """POST /v1/hooks/{app}: what a CI says that it has built."""

    strict = True
    ref: str = field(Fields.text, is_ref, required=True)
    commit: str | None = field(Fields.text, is_commit)
    message: str = field(Fields.text, lambda text: None if len(text) <= 1000 else "must have at most 1000 characters", default="")
    pusher: str = field(Fields.text, lambda text: None if len(text) <= 100 else "must have at most 100 characters", default="")
    hosts: tuple[str, ...] | None = field(Fields.texts, is_host, fold=True)


def is_reason(text: str) -> str | None:
    return None if text.strip() and len(text) <= 200 and text.isprintable() else "must be one line of 1 to 200 characters"


@dataclasses.dataclass(slots=True)
class LockRequest(Model):
    strict = True
    reason: str = field(Fields.text, is_reason, required=True)
    seconds: int | None = None

    @classmethod
    def of(cls, data: Any) -> LockRequest:
        """`for` is a word of Python, so no field can have its name."""
        f = Fields(data, {"reason", "for"})
        found = cls.read(f)
        found.seconds = f.integer("for", 1, 365 * 86400)
        return f.done(found)


@dataclasses.dataclass(slots=True)
class Registration(Model):
    hostname: str = field(Fields.text, is_host, required=True, fold=True)
    capabilities: dict[str, Any] = field(Fields.mapping, MAX_METADATA)
    slots: int = field(Fields.integer, 1, 64, default=1)
    token_sha256: str | None = field(Fields.text, matches("[0-9a-f]{64}", "64 hex digits in lower case"))


def held_job(value: Any) -> tuple[str, int]:
    """(job id, attempt) of what an agent holds."""
    f = Fields(value)
    return f.done((f.text("job_id", is_id, required=True), f.integer("attempt", 1, 1 << 31, required=True)))


def commits_of(said: dict[str, Any]) -> dict[str, str]:
    """App to commit, of what an agent says that its host runs; what is neither is left out."""
    found = ((app, commit) for app, commit in said.items() if isinstance(commit, str))
    return {app: commit for app, commit in found if is_app(app) is None and is_commit(commit) is None}


@dataclasses.dataclass(slots=True)
class Heartbeat(Model):
    status: str = field(Fields.choice, ("online", "offline"), required=True)
    session: str | None = field(Fields.text, matches("[0-9a-f-]{1,64}", "a session that a registration answered"))
    running: frozenset[tuple[str, int]] | None = field(Fields.items, MAX_RUNNING, held_job, then=frozenset)  # None: not said
    wait: int = field(Fields.integer, 0, MAX_WAIT, default=0)  # seconds
    current: dict[str, Any] = field(Fields.mapping, MAX_METADATA, then=commits_of)


def fit_line(message: str) -> str:
    """A log line as it is stored: at most MAX_MESSAGE bytes; a longer one is cut and says so."""
    raw = message.encode()
    if len(raw) <= MAX_MESSAGE:
        return message
    note = f" [cut: the line had {len(raw)} bytes]"
    return raw[: MAX_MESSAGE - len(note)].decode(errors="ignore") + note


def log_line(value: Any) -> list[str | None]:
    """[message, level, time or None] of an object with these names, or of such a list. Raises ValidationError."""
    f = Fields(dict(zip(LINE, value, strict=True)) if type(value) is list and len(value) == len(LINE) else value)
    message, level = f.take("message", str, "a string", True), f.choice("level", LEVELS)
    stamp = None if f.take("timestamp", str, "a string", False) is None else f.read("timestamp", stored_time)
    return f.done([fit_line(message or ""), level or "info", stamp])


def log_lines(values: list[Any]) -> list[list[str | None]] | None:
    """log_line() of each, column by column: an upload has up to MAX_LINES. None where one may be wrong."""
    rows = [[v.get("message"), v.get("level"), v.get("timestamp")] if type(v) is dict else v for v in values]
    try:
        messages, levels, stamps = zip(*rows, strict=True)
        times = {stamp: stored_time(stamp) for stamp in set(stamps) - {None}}
        if {*map(type, messages)} != {str} or not set(levels) <= {None, *LEVELS}:  # nor is a text of three characters a line
            return None
    except (TypeError, ValueError):  # no list, another length, no time
        return None
    is_long = max(map(len, messages)) * 4 > MAX_MESSAGE
    if not is_long and None not in levels and all(stamp == kept for stamp, kept in times.items()):
        return rows  # as agent.py sends them
    fit = map(fit_line, messages) if is_long else messages
    return [[text, level or "info", times.get(stamp)] for text, level, stamp in zip(fit, levels, stamps, strict=True)]


@dataclasses.dataclass(slots=True)
class LogUpload(Model):
    attempt: int = field(Fields.integer, 1, 1 << 31, required=True)
    offset: int = field(Fields.integer, 0, 1 << 53, required=True)
    lines: list[list[Any]] = field(Fields.items, MAX_LINES, log_line, required=True, at_once=log_lines)  # see log_line()
    commit: str | None = field(Fields.text, is_commit)


@dataclasses.dataclass(slots=True)
class Result(Model):
    attempt: int = field(Fields.integer, 1, 1 << 31, required=True)
    status: str = field(Fields.choice, ENDED_WORDS, required=True)
    exit_code: int | None = field(Fields.integer, -(1 << 31), (1 << 31) - 1)
    error: str | None = field(Fields.take, str, "a string", False, then=lambda text: text[:MAX_ERROR] or None)
    reason: str | None = field(Fields.choice, AGENT_REASONS)
    commit: str | None = field(Fields.text, is_commit)
    rolled_back_to: str | None = field(Fields.text, is_commit)

    def __post_init__(self) -> None:
        default = "exit_code" if self.status == "failed" else self.status
        self.reason = None if self.status == "success" else self.reason or default


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Event:
    """A row of `events`: log lines of one upload, or one change of a job or a deployment. A chunk of n lines takes n positions."""

    position: int  # of its last line
    lines: int
    kind: str  # log | job | deployment
    job_id: str  # or the deployment's
    host: str
    app: str
    attempt: int
    offset: int  # of its first line
    data: str  # JSON: [[message, level, time], ...] of a log, else the job or the deployment
    log_bytes: int = 0  # of the job's log up to here
    frame: bytes | None = None  # in memory alone: what the readers of a stream get, written by the first of them

    def row(self) -> tuple[Any, ...]:
        return tuple([getattr(self, name) for name in self.__slots__[:-1]])

    def size(self) -> int:
        """About the bytes of its frame: each line brings its names along."""
        return len(self.data) + 256 * self.lines

    def after(self, position: int) -> Event:
        """Without the lines up to that position."""
        skip = position - (self.position - self.lines)
        if skip <= 0:
            return self
        lines = json.loads(self.data)[skip:]
        return dataclasses.replace(self, lines=len(lines), offset=self.offset + skip, data=dump(lines), frame=None)

    def log_lines(self) -> Iterator[dict[str, Any]]:
        positions, offsets = itertools.count(self.position - self.lines + 1), itertools.count(self.offset)
        for at, offset, (text, level, stamp) in zip(positions, offsets, json.loads(self.data), strict=False):
            yield {"position": at, "attempt": self.attempt, "offset": offset, "message": text, "level": level, "timestamp": stamp}


class EventFilter(NamedTuple):
    """Which events a reader wants; None: any."""

    host: str | None = None
    app: str | None = None
    job_id: str | None = None

    def wants(self, event: Event) -> bool:
        host, app, job_id = self.host or event.host, self.app or event.app, self.job_id or event.job_id
        return event.job_id == job_id and event.host == host and event.app == app


class Principal(NamedTuple):
    """Who asks, and from where. `host`, `app`: the only ones that it may speak for, or deploy; None for any."""

    name: str
    scope: Scope
    host: str | None = None
    app: str | None = None
    digest: str = ""  # SHA-256 of the token, where that can be revoked
    is_own: bool = False  # came with the secret that the host itself made
    address: str = ""

    def may(self, scope: Scope) -> bool:
        return scope in (Scope.PUBLIC, Scope.ANY) or self.scope is Scope.ADMIN or scope in GRANTS.get(self.scope, ())

    def speaks_for(self, host: str) -> None:
        """Raises Forbidden."""
        if self.scope is Scope.ADMIN or self.host == host:
            return
        if self.host is None:
            raise Forbidden("an enrolment token may only register: go on with the host's own secret, or with register's `token`")
        raise Forbidden(f"this token belongs to {self.host}, not to {host}")

    def sees(self, app: str | None) -> str | None:
        """That app, or the only one that it may see, where none is named. Raises Forbidden."""
        if self.app not in (None, app or self.app):
            raise Forbidden(f"this token is for the app {self.app} alone")
        return app or self.app


@dataclasses.dataclass(slots=True)
class TokenRequest(Model):
    strict = True
    role: str = field(Fields.choice, ROLES, required=True)
    name: str | None = field(Fields.text, is_token_name)
    host: str | None = field(Fields.text, is_host, fold=True)
    app: str | None = field(Fields.text, is_app)
    expires_in: int | None = field(Fields.integer, 60, 10 * 365 * 86400)  # seconds

    def check(self) -> TokenRequest:
        """Raises ValidationError for what does not go together."""
        if self.host and self.role != Scope.AGENT:
            raise ValidationError([("host", "is for tokens of the role agent alone")])
        if self.app and self.role not in (Scope.OPERATOR, Scope.VIEWER):
            raise ValidationError([("app", "is for tokens of the roles operator and viewer alone")])
        return self


class Token(NamedTuple):
    """A row of `tokens`, in the order of its columns. A browser's sign-in is one too, with a `parent`."""

    id: str
    name: str
    role: str
    host: str | None
    app: str | None
    sha256: str
    parent: str | None  # SHA-256 of the token that somebody signed in with: this one ends with it
    created_at: str
    created_by: str
    expires_at: str | None
    last_used_at: str | None

    def public(self) -> dict[str, Any]:
        return {name: value for name, value in self._asdict().items() if name not in ("sha256", "parent")}

    def principal(self) -> Principal:
        """A signed-in browser acts in the name of the token that it signed in with."""
        name = self.created_by if self.parent else self.name
        return Principal(name, Scope(self.role), self.host, self.app, self.sha256)


class Clock:
    """Time, so that a test can hold it. Durations are measured on `monotonic`; what is stored and shown is `stamp`."""

    now, monotonic = staticmethod(time.time), staticmethod(time.monotonic)

    def stamp(self, ago: float = 0.0) -> str:
        return rfc3339(max(0.0, self.now() - ago))

    def ms(self, ago: float = 0.0) -> int:
        """Unix time in milliseconds."""
        return max(0, int((self.now() - ago) * 1000))


class TimeOrderedIds:
    """UUIDs of version 7 (RFC 9562, method 1: 12 bits count within a millisecond), each greater than the one before. `kind`, 0 or 1,
    is the last bit of the count: a deployment is made in one millisecond with its jobs, and a start of its id is to be none of theirs.
    Called by the thread that holds Store._writer alone, so the order of ids is the order of commit."""

    def __init__(self, clock: Clock, last: str | None, kind: int = 0):
        self._clock, self._kind = clock, kind
        self._last = int((last or "0").replace("-", "")[:12] + "fff", 16)  # milliseconds and count, as one number

    def __call__(self) -> str:
        # A count that is full goes on in the next millisecond.
        self._last = max(self._last + 2, self._clock.ms() << 12) & ~1 | self._kind
        return self.layout(self._last >> 12, self._last & 0xFFF, (2 << 62) | secrets.randbits(62))

    @staticmethod
    def layout(milliseconds: int, count: int = 0, low: int = 0) -> str:
        """Without a count, not greater than any id of that millisecond or later."""
        parts = (milliseconds >> 16, milliseconds & 0xFFFF, count, low >> 48, low & 0xFFFFFFFFFFFF)
        return "{:08x}-{:04x}-7{:03x}-{:04x}-{:012x}".format(*parts)


# == Apps ==============================================================================================================
# Owns apps.yaml: from text to models, each mistake with its line. Ignores who reads them.


class Located(dict[str, Any]):
    """A mapping of apps.yaml that knows where it stands. `items`: (key, line, value). Raises AppsError for a key that stands twice."""

    def __init__(self, line: int, items: Iterable[tuple[str, int, Any]]):
        self.line, self.lines = line, dict[str, int]()
        for key, at, value in items:
            if key in self:
                raise AppsError([(at, f"{key}: stands here for the second time")])
            self[key], self.lines[key] = value, at


is_variable = matches("(?!DEPLOY_)[A-Za-z_][A-Za-z0-9_]{0,127}", "the name of a variable, and none of the agent's own, DEPLOY_...")


def is_value(value: Any) -> str | None:
    is_text = type(value) is str and len(value) <= MAX_VALUE and not re.search("[\0\ud800-\udfff]", value)
    return None if is_text else f"must be a string (in quotes) of at most {MAX_VALUE} characters, without NUL"


def one_in(words: Sequence[str]) -> Callable[[str], str | None]:
    """A check that the text is one of these."""
    return lambda text: None if text in words else f"must be one of {', '.join(words)}{nearest(text, words)}"


class Entry(Fields):
    """The fields of a mapping of apps.yaml. Each error gets its line, and joins those of the mappings around it in `problems`."""

    def __init__(self, data: Any, known: Set[str] | None, prefix: str = "", problems: list[tuple[int, str]] | None = None):
        self.problems = [] if problems is None else problems
        super().__init__(data, known, prefix, quotes=True)

    def wrong(self, name: str, message: str) -> None:
        super().wrong(name, message)
        self.problems.append((self.data.lines.get(name, self.data.line), f"{self.prefix}{name}: {message}"))

    def within(self, name: str, known: Set[str] | None = None) -> Entry:
        """The fields of the mapping that stands there."""
        return Entry(self.data[name], known, f"{self.prefix}{name}.", self.problems)

    def model(self, model: Any) -> Any:
        found = model.read(self)
        found.check(self)
        return found

    def part(self, name: str, model: Any) -> Any:
        found = self.take(name, Located, "a mapping", False)
        return None if found is None else self.within(name, readers(model).keys()).model(model)

    def parts(self, name: str, model: Any) -> list[Any]:
        values = self.take(name, list, "a list of mappings", False) or []
        if not all(isinstance(value, Located) for value in values):
            self.wrong(name, "each must be a mapping")
            return []
        named = [(f"{self.prefix}{name}[{index}].", value) for index, value in enumerate(values)]
        return [Entry(value, readers(model).keys(), prefix, self.problems).model(model) for prefix, value in named]

    def variables(self, name: str) -> dict[str, str]:
        """Of an environment. Values must be texts, as YAML reads 010 as 8 and `on` as true; no error repeats one."""
        found = self.take(name, Located, "a mapping", False)
        inner = self.within(name) if found else self
        for variable, value in (found or {}).items():
            if problem := is_variable(variable) or is_value(value):
                inner.wrong(variable, problem)
        return dict(found or {})


class Part(Model):
    """A model of apps.yaml."""

    def check(self, entry: Entry) -> None:
        """Tells `entry` what does not go together."""


def clone_url(text: Any) -> str:
    """https, http, ssh, git and file URLs, paths, and git's own host:path; no password, no option. No error repeats it."""
    if not isinstance(text, str) or not 0 < len(text) <= 2048 or not text.isprintable() or " " in text or text[0] == "-":
        raise ValueError("must be a URL that git can clone")
    if "::" in text.partition("/")[0]:
        raise ValueError("must not name a transport helper")
    try:
        parts = urllib.parse.urlsplit(text)
    except ValueError:
        raise ValueError("must be a URL that git can clone") from None
    if parts.password is not None or (parts.scheme in ("http", "https") and parts.username is not None):
        raise ValueError("must not hold a password or token: give the agent's user credentials of its own (git help credentials)")
    return text


def command(value: Any) -> list[str] | str:
    """A list is argv, a string is for `sh -c`."""
    words = value if isinstance(value, list) else [value]
    if not words or not all(isinstance(word, str) and "\0" not in word for word in words) or not words[0].strip():
        raise ValueError("must be a command: a list of strings, or one string for sh -c")
    "".join(words).encode()  # a lone surrogate is a ValueError
    return value


def is_pattern(text: str) -> str | None:
    return None if 0 < len(text) <= 255 and text.isprintable() else "must be a shell pattern such as release/*"


def is_path_pattern(text: str) -> str | None:
    parts = text.split("/")
    is_good = 0 < len(text) <= 255 and text.isprintable() and text[0] != "!" and "" not in parts
    if is_good and all(part == "**" or "**" not in part for part in parts):
        return None
    return "must be a pattern of paths such as web/** or **/*.md, where ** stands alone between slashes"


def seconds(value: Any) -> int:
    found = duration(str(value))
    if not 1 <= found <= MAX_TIMEOUT:
        raise ValueError("must be from 1s to 7d")
    return int(found)


def span(value: Any) -> float:
    """Seconds, a whole number of them as such."""
    found = duration(str(value))
    if found > MAX_TIMEOUT:
        raise ValueError("must be at most 7d")
    return int(found) if found == int(found) else found


def path(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError("must be the path of a file")
    return value


def batch(value: Any) -> int | str:
    is_share = type(value) is str and re.fullmatch("([1-9][0-9]?|100)%", value, re.ASCII)
    if not is_share and not (type(value) is int and 1 <= value <= MAX_BATCH):
        raise ValueError("must be a number of hosts, 1 or more, or a share from 1% to 100%")
    return value


def web_url(value: Any) -> str:
    """No error repeats it: who knows the URL of a chat's webhook can write there."""
    with contextlib.suppress(ValueError):
        if type(value) is str and re.fullmatch("https?://[!-~]{1,2040}", value) and urllib.parse.urlsplit(value).hostname:
            return value
    raise ValueError("must be a URL that starts with http:// or https://")


is_label = matches(r"[a-z0-9_.-]{1,63}=[A-Za-z0-9_.-]{1,63}", "a label such as role=edge")  # as agent.py takes it


def is_group_or_host(text: str) -> str | None:
    wrong = is_app(text[1:]) if text.startswith("@") else is_host(lower(text))
    return wrong and "must be a host name as in RFC 1123, or the @name of a group"


def is_target(text: str) -> str | None:
    wrong = is_label(text) if "=" in text else is_group_or_host(text)
    return wrong and "must be a host name as in RFC 1123, the @name of a group, or a label such as role=edge"


def is_shared(text: str) -> str | None:
    parts = text.removesuffix("/").split("/")
    if 0 < len(text) <= 255 and text.isprintable() and not {"", ".", ".."}.intersection(parts):
        return None
    return "must be a path within the release, such as .env or uploads/"


@dataclasses.dataclass(slots=True, unsafe_hash=True)
class Strategy(Part):
    """In which order the hosts of an app get a commit. `canary` first, alone; then, `pause` seconds after its success, a batch at a
    time. More failures than `max_failures` stop what has not begun; None: no number does. All at once is a batch of 100%."""

    type: str = field(Fields.text, one_in(("parallel", "rolling")), default="")  # rolling where there is a batch
    batch: int | str = field(Fields.read, batch, default=0)  # hosts, or a share of them
    canary: str | None = field(Fields.text, is_host, fold=True)
    pause: float = field(Fields.read, span, default=0)
    max_failures: int | None = field(Fields.integer, 0, MAX_BATCH)

    def __post_init__(self) -> None:
        if self.type == "rolling" or (not self.type and self.batch):
            self.type, self.batch, self.max_failures = "rolling", self.batch or 1, self.max_failures or 0
        else:
            self.type, self.batch = "parallel", "100%"

    def check(self, entry: Entry) -> None:
        if entry.data.get("type") == "parallel" and entry.data.get("batch") is not None:
            entry.wrong("batch", "is for the type rolling alone")
        if self.pause and not entry.data.get("canary"):
            entry.wrong("pause", "comes after the canary: name one")

    def size(self, hosts: int) -> int:
        """How many of so many hosts are one batch: a share is rounded up."""
        if isinstance(self.batch, int):
            return self.batch
        return max(1, -(-hosts * int(self.batch[:-1]) // 100))


@dataclasses.dataclass(slots=True)
class HealthCheck(Part):
    url: str | None = field(Fields.read, web_url)
    command: list[str] | str | None = field(Fields.read, command)
    timeout: float = field(Fields.read, span, default=60)
    interval: float = field(Fields.read, span, default=2)
    success: int = field(Fields.integer, 1, 100, default=1)  # times in a row

    def check(self, entry: Entry) -> None:
        url, command = entry.data.get("url"), entry.data.get("command")
        if url is not None and command is not None:
            entry.wrong("command", "stands instead of url; keep one")
        elif url is command:
            entry.wrong("url", "is required, or a command")
        if self.url and "@" in urllib.parse.urlsplit(self.url).netloc:
            entry.wrong("url", "must not hold a password or token: use a command")


@dataclasses.dataclass(slots=True)
class Notify(Part):
    url: str | None = field(Fields.read, web_url)
    events: tuple[str, ...] = field(Fields.texts, one_in(NOTIFY_EVENTS), default=("failed", "recovered"))
    format: str = field(Fields.text, one_in(NOTIFY_FORMATS), default="json")

    def check(self, entry: Entry) -> None:
        if entry.data.get("url") is None:
            entry.wrong("url", "is required")


def plain(part: Any) -> Any:
    """A part as the object of JSON that others get; what was not said is left out."""
    return {name: value for name, value in dataclasses.asdict(part).items() if value is not None}


@dataclasses.dataclass(slots=True)
class App(Part):
    name: str = field(Fields.text, is_app, required=True)
    repo: str = field(Fields.text, is_repo, required=True)
    hosts: tuple[str, ...] = field(Fields.texts, is_target, required=True)  # as they stand; in force: names alone, sorted
    clone_url: str = field(Fields.read, clone_url, default="")
    deploy_on_push: bool = field(Fields.boolean, default=False)
    branches: tuple[str, ...] | None = field(Fields.texts, is_pattern)  # None: the repository's default branch
    build: list[str] | str | None = field(Fields.read, command)
    activate: list[str] | str | None = field(Fields.read, command)
    deploy: list[str] | str | None = field(Fields.read, command)
    timeout: int = field(Fields.read, seconds, default=3600)
    retries: int = field(Fields.integer, 0, MAX_RETRIES, default=0)  # attempts after one that an agent lost
    webhook_secret_file: str | None = field(Fields.read, path)
    webhook_secrets: tuple[str, ...] = ()  # that sign its pushes; none: the one of the whole controller
    spec: str = ""  # what the agent needs, as JSON: frozen into each job when it is made
    labels: tuple[str, ...] = ()  # KEY=VALUE: hosts whose agents have registered with that, beside `hosts`
    tags: tuple[str, ...] = field(Fields.texts, is_pattern, default=())
    paths: tuple[str, ...] = field(Fields.texts, is_path_pattern, default=())  # only pushes that change one of these
    ignore_paths: tuple[str, ...] = field(Fields.texts, is_path_pattern, default=())  # no push that changes nothing else
    strategy: Strategy = field(Entry.part, Strategy, default=Strategy())
    shared: tuple[str, ...] = field(Fields.texts, is_shared, default=())
    env: dict[str, str] = field(Entry.variables)
    keep_releases: int = field(Fields.integer, 1, 1000, default=5)
    health_check: dict[str, Any] | None = field(Entry.part, HealthCheck, then=plain)
    rollback_on_failure: bool = field(Fields.take, bool, "true or false", False, default=True)
    notify: list[dict[str, Any]] = field(Entry.parts, Notify, then=lambda parts: [plain(part) for part in parts])  # secret

    def __post_init__(self) -> None:
        self.clone_url = self.clone_url or f"https://github.com/{self.repo}.git"
        self.env, self.notify = self.env or {}, self.notify or []
        self.spec = dump({name: getattr(self, name) for name in IN_SPEC})

    def check(self, entry: Entry) -> None:
        if self.deploy and (self.build or self.activate):
            entry.wrong("deploy", "stands instead of build and activate; keep one form")
        paths = sorted(path.removesuffix("/") + "/" for path in self.shared)
        for outer, inner in itertools.pairwise(paths):
            if inner.startswith(outer):
                entry.wrong("shared", f"{inner[:80].rstrip('/')} lies within {outer[:80].rstrip('/')}, which is shared already")


@functools.lru_cache(maxsize=1024)
def app_without_entry(repo: str, name: str | None) -> App:
    """Of a repository that apps.yaml does not name: commands by the convention of the agent, nothing shared."""
    if name is None:
        name = repo.lower().replace("/", "--").lstrip("._-")
        if len(name) > 64:
            name = f"{name[:51]}-{hashlib.sha256(repo.lower().encode()).hexdigest()[:12]}"
    return App(name, repo, ())


def parse_json(text: str) -> Any:
    """Its objects know their lines. Raises AppsError, and ValueError for what is no JSON."""
    if is_too_deep(text.encode("utf-8", "replace")):  # the scanner, in C, would go past the end of a small stack
        raise RecursionError
    json.loads(text, parse_int=small_integer)
    ends = [match.start() for match in re.finditer("\n", text)]

    def numbered(found: re.Match[str]) -> str:
        """A key has its line in front; each object begins with a key that is its line alone; other strings stay."""
        line = bisect.bisect_left(ends, found.start()) + 1
        if found[0][0] == "{":
            return f'{{"{line}": 0{found[2] or ","}'
        return f'"{line} {found[0][1:]}' if found[1] else found[0]

    def located(pairs: list[tuple[str, Any]]) -> Located:
        (start, _), *items = [(key.partition(" "), value) for key, value in pairs]
        return Located(int(start[0]), [(key, int(line), value) for (line, _, key), value in items])

    text = re.sub(r'"(?:[^"\\]|\\.)*"(\s*:)?|\{(\s*\})?', numbered, text)
    return json.loads(text, parse_int=small_integer, object_pairs_hook=located)


def located_loader(yaml: Any) -> Any:
    """A SafeLoader whose mappings know their lines. It builds an alias once, so none can grow."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except (yaml.YAMLError, AppsError, RecursionError):
                raise
            except Exception:  # PyYAML lets through what int(), date() and its own tables raise
                message = f"{node.value[:80]!r} is not a value of the type {node.tag}"
                raise AppsError([(node.start_mark.line + 1, message)]) from None

        def located(self, node: Any) -> Located:
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise AppsError([(key.start_mark.line + 1, "a key must be a word")])
            found = [(key, self.construct_object(value, deep=True)) for key, value in node.value]
            return Located(node.start_mark.line + 1, [(key.value, key.start_mark.line + 1, value) for key, value in found])

    Loader.add_constructor("tag:yaml.org,2002:map", Loader.located)
    return Loader


def parse_yaml(text: str, otherwise: tuple[int, str]) -> Any:
    """Raises AppsError; where there is no PyYAML, with that (line, message)."""
    try:
        import yaml
    except ImportError:
        raise AppsError([otherwise]) from None
    try:
        return yaml.load(text, located_loader(yaml))  # a SafeLoader
    except yaml.reader.ReaderError as error:
        raise AppsError([(text.count("\n", 0, error.position) + 1, "a control character stands here")]) from None
    except yaml.MarkedYAMLError as error:
        raise AppsError([(error.problem_mark.line + 1 if error.problem_mark else 1, error.problem or str(error))]) from None


def parse_apps_text(text: str) -> Any:
    """The document of a JSON or YAML text, its mappings Located. Raises AppsError."""
    needed = "reading YAML needs the package PyYAML (apt install python3-yaml, or pip install PyYAML); JSON works without"
    try:
        if text.lstrip()[:1] not in ("{", "["):
            return parse_yaml(text, (1, needed)) if text.strip() else None
        try:
            return parse_json(text)
        except ValueError as mistake:  # YAML's own flow style begins like JSON
            return parse_yaml(text, (getattr(mistake, "lineno", 1), getattr(mistake, "msg", str(mistake))))
    except RecursionError:
        raise AppsError([(1, "is nested too deeply")]) from None


def signing_secrets(folder: pathlib.Path, file: str) -> tuple[str, ...]:
    """The secrets in that file, a line each. Raises ValueError."""
    try:
        text = (folder / file).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{file[:80]}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file[:80]} is not UTF-8") from None
    if not text.strip():
        raise ValueError(f"{file[:80]} is empty")
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def reach(names: Iterable[str], groups: Mapping[str, Sequence[str]]) -> set[str]:
    """These names, and what stands in the groups among them, however deep."""
    found, left = set[str](), list(names)
    while left:
        if (name := left.pop()) not in found:
            found.add(name)
            left += groups.get(name, ())
    return found


def check_groups(entry: Entry, name: str, names: Iterable[str], groups: Mapping[str, Sequence[str]]) -> None:
    for group in names:
        if group.startswith("@") and group not in groups and not is_app(group[1:]):
            entry.wrong(name, f"{group!r} is no group{nearest(group, groups)}")


def read_groups(top: Entry) -> dict[str, tuple[str, ...]]:
    """@name to what stands in it."""
    if not top.take("groups", Located, "a mapping", False):
        return {}
    inner = top.within("groups")
    groups = {f"@{name}": inner.texts(name, is_group_or_host, required=True) or () for name in inner.data}
    for group, names in groups.items():
        if problem := is_app(group[1:]):
            inner.wrong(group[1:], problem)
        check_groups(inner, group[1:], names, groups)
        if group in reach(names, groups):
            inner.wrong(group[1:], "holds itself, by the groups in it")
    return groups


def settle(app: App, entry: Entry, groups: Mapping[str, Sequence[str]], folder: pathlib.Path) -> None:
    """What an app's entry means where it stands: its hosts, and the secrets in its file."""
    check_groups(entry, "hosts", app.hosts or (), groups)
    names = reach(app.hosts or (), groups)
    app.labels = tuple(sorted(name for name in names if "=" in name))
    app.hosts = tuple(sorted({lower(name) for name in names if "=" not in name and not name.startswith("@")}))
    canary = app.strategy.canary
    if canary and canary not in app.hosts and not is_host(canary) and all(name != "hosts" for name, _ in entry.errors):
        entry.within("strategy").wrong("canary", f"{canary} is none of the hosts that {app.name} names{nearest(canary, app.hosts)}")
    if app.webhook_secret_file:
        app.webhook_secrets = entry.read("webhook_secret_file", functools.partial(signing_secrets, folder)) or ()


# What an app says in the place of what; a default of the one form says nothing to an app that has the other.
INSTEAD = {"deploy": ("build", "activate"), "build": ("deploy",), "activate": ("deploy",)}


def read_defaults(top: Entry) -> list[tuple[str, int, Any]]:
    """(key, line, value) of those that are good."""
    if not top.take("defaults", Located, "a mapping", False):
        return []
    known = {name: read for name, (read, required) in readers(App).items() if not required}
    entry, good = top.within("defaults", known.keys()), []
    for name in entry.data.keys() & known.keys():
        before = len(top.problems)
        known[name](entry, name)
        good += [(name, entry.data.lines[name], entry.data[name])] if len(top.problems) == before else []
    return good


def with_defaults(said: Located, defaults: Iterable[tuple[str, int, Any]]) -> Located:
    """What an app says counts, also where it says null."""
    taken = {*said, *(other for name in INSTEAD if said.get(name) for other in INSTEAD[name])}
    own = [(name, said.lines[name], value) for name, value in said.items()]
    return Located(said.line, [*own, *(default for default in defaults if default[0] not in taken)])


def apps_in(document: Any, folder: pathlib.Path) -> tuple[App, ...]:
    """Of a document of parse_apps_text(), by name; `folder`: of its paths. Raises AppsError with every mistake and its line."""
    if not isinstance(document, Located):
        raise AppsError([(1, "must be a mapping with the key 'apps'")])
    apps: dict[str, App] = {}
    top = Entry(document, {"groups", "defaults", "apps"})
    groups, defaults = read_groups(top), read_defaults(top)
    for value in top.take("apps", list, "a list", False) or []:
        if not isinstance(value, Located):
            top.wrong("apps", "each must be a mapping with name, repo and hosts")
            continue
        entry = Entry(with_defaults(value, defaults), readers(App).keys(), "", top.problems)
        app = entry.model(App)
        settle(app, entry, groups, folder)
        if not entry.errors and apps.setdefault(app.name, app) is not app:
            entry.wrong("name", f"{app.name} stands here twice")
    if top.problems:
        raise AppsError(sorted(set(top.problems)))
    return tuple(apps[name] for name in sorted(apps))


def read_apps(path: pathlib.Path) -> tuple[App, ...]:
    """The apps of that file. Raises AppsError, with every mistake, and OSError."""
    try:
        document = parse_apps_text(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise AppsError([(error.object[: error.start].count(b"\n") + 1, "is not UTF-8")]) from None
    return () if document is None else apps_in(document, path.parent)


class Apps:
    """The mapping in force. It is replaced whole, in one assignment, so readers need no lock."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.all = ()  # by name, and so are the hosts of each

    @property
    def all(self) -> tuple[App, ...]:
        return self._in_force[0]

    @all.setter
    def all(self, apps: tuple[App, ...]) -> None:
        of_repo: dict[str, list[App]] = {}
        for app in apps:
            of_repo.setdefault(app.repo.lower(), []).append(app)
        self._in_force = apps, {app.name: app for app in apps}, of_repo

    def named(self, name: str) -> App | None:
        return self._in_force[1].get(name)

    def lacks(self, name: str | None) -> str:
        """What to say where there is no app of that name, else nothing."""
        if name is None or self.named(name):
            return ""
        return f"apps.yaml has no app {name[:100]}{nearest(name[:100], [app.name for app in self.all])}"

    def of_repo(self, repo: str) -> Sequence[App]:
        """GitHub compares names of repositories without case, so do we."""
        return self._in_force[2].get(repo.lower(), ())

    def places(self, after: str, only: str | None, hosts_of: Callable[[App], Sequence[str]]) -> Iterator[tuple[App, str]]:
        """Each (app, host) by name, behind `after`: APP/HOST, or an APP with all of its hosts. `only`: of that app."""
        name, _, host = after.partition("/")
        apps = self.all
        for app in apps[bisect.bisect_left(apps, name, key=lambda app: app.name) :]:
            if only in (None, app.name):
                hosts = hosts_of(app)
                begin = bisect.bisect_right(hosts, host or "~") if app.name == name else 0  # no host's name reaches ~
                yield from zip(itertools.repeat(app), hosts[begin:])


# == Store =============================================================================================================
# Owns SQLite: schema, SQL, transactions. Ignores what the rows mean; the only place that knows `sqlite3`.

# To change the schema: append a tuple of statements, never edit one that was released; put a database of the schema before
# into tests/test_migrations.py. A migration runs in one transaction with its `user_version`, so it happened or it did not.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID",
        "INSERT INTO meta VALUES ('epoch', lower(hex(randomblob(4)))), ('removed_through', '0')",
        """CREATE TABLE agents (
            id TEXT PRIMARY KEY, hostname TEXT NOT NULL UNIQUE, capabilities TEXT NOT NULL, slots INTEGER NOT NULL,
            session TEXT NOT NULL, drained INTEGER NOT NULL DEFAULT 0, token_sha256 TEXT,
            registered_at TEXT NOT NULL, last_heartbeat TEXT NOT NULL
        ) STRICT""",
        "CREATE INDEX agents_secret ON agents (token_sha256)",
        """CREATE TABLE jobs (
            id TEXT PRIMARY KEY, repo TEXT NOT NULL, ref TEXT NOT NULL, host TEXT NOT NULL, app TEXT NOT NULL,
            status TEXT NOT NULL CHECK (status IN ('pending', 'running', 'success', 'failed', 'cancelled')),
            reason TEXT, hold TEXT CHECK (hold IN ('batch', 'lock', 'pause')), metadata TEXT NOT NULL,
            attempt INTEGER NOT NULL, retries INTEGER NOT NULL, timeout INTEGER NOT NULL,
            created_at TEXT NOT NULL, created_by TEXT NOT NULL, started_at TEXT, completed_at TEXT, cancel_requested_at TEXT,
            assigned_agent TEXT, exit_code INTEGER, error TEXT, "commit" TEXT, rolled_back_to TEXT, superseded_by TEXT,
            retry_of TEXT, deployment_id TEXT, spec TEXT NOT NULL, session TEXT,
            queued_at TEXT NOT NULL
        ) STRICT""",
        "CREATE INDEX jobs_open ON jobs (host, status, app) WHERE status IN ('pending', 'running')",
        "CREATE UNIQUE INDEX jobs_running ON jobs (host, app) WHERE status = 'running'",
        "CREATE INDEX jobs_host ON jobs (host, id)",
        "CREATE INDEX jobs_app ON jobs (app, id)",
        "CREATE INDEX jobs_repo ON jobs (repo COLLATE NOCASE, id)",
        "CREATE INDEX jobs_status ON jobs (status, id)",
        """CREATE TABLE events (
            position INTEGER PRIMARY KEY, lines INTEGER NOT NULL, kind TEXT NOT NULL CHECK (kind IN ('log', 'job')),
            job_id TEXT NOT NULL, host TEXT NOT NULL, app TEXT NOT NULL, attempt INTEGER NOT NULL,
            "offset" INTEGER NOT NULL, data TEXT NOT NULL
        ) STRICT""",
        "CREATE INDEX events_job ON events (job_id, position, kind)",
        # What each host runs now: the last success of each app.
        """CREATE TABLE releases (
            app TEXT NOT NULL, host TEXT NOT NULL, job_id TEXT NOT NULL, "commit" TEXT, deployed_at TEXT NOT NULL,
            PRIMARY KEY (app, host)
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE deliveries (
            id TEXT PRIMARY KEY, body_sha256 TEXT NOT NULL, received_at TEXT NOT NULL, jobs TEXT NOT NULL, message TEXT NOT NULL
        ) STRICT""",
        "CREATE INDEX deliveries_body ON deliveries (body_sha256)",
    ),
    (
        """CREATE TABLE tokens (
            id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, role TEXT NOT NULL, host TEXT, app TEXT, sha256 TEXT NOT NULL UNIQUE,
            parent TEXT, created_at TEXT NOT NULL, created_by TEXT NOT NULL, expires_at TEXT, last_used_at TEXT
        ) STRICT""",
        """CREATE TABLE audit (
            id INTEGER PRIMARY KEY, at TEXT NOT NULL, who TEXT NOT NULL, address TEXT NOT NULL, action TEXT NOT NULL,
            target TEXT NOT NULL, detail TEXT NOT NULL
        ) STRICT""",
        # The newest push of each ref that an app took: an older one that comes late must not replace it.
        """CREATE TABLE pushes (
            app TEXT NOT NULL, ref TEXT NOT NULL, pushed_at INTEGER, before TEXT NOT NULL, PRIMARY KEY (app, ref)
        ) STRICT, WITHOUT ROWID""",
        # What retention keeps of each app on each host: the last successes.
        "CREATE INDEX jobs_success ON jobs (app, host, id) WHERE status = 'success'",
        "ALTER TABLE events ADD COLUMN log_bytes INTEGER NOT NULL DEFAULT 0",
    ),
    ("DROP INDEX jobs_open",),  # memory knows the open jobs: Jobs.recover()
    (
        """CREATE TABLE deployments (
            id TEXT PRIMARY KEY, app TEXT NOT NULL, repo TEXT NOT NULL, ref TEXT NOT NULL, branch TEXT, kind TEXT NOT NULL,
            status TEXT NOT NULL, reason TEXT, strategy TEXT NOT NULL, hosts INTEGER NOT NULL, held INTEGER NOT NULL,
            pending INTEGER NOT NULL, running INTEGER NOT NULL, success INTEGER NOT NULL, failed INTEGER NOT NULL,
            cancelled INTEGER NOT NULL, rolled_back INTEGER NOT NULL, hold TEXT, resume_at TEXT, override INTEGER NOT NULL,
            retry_of TEXT, superseded_by TEXT, delivery_id TEXT, created_at TEXT NOT NULL, created_by TEXT NOT NULL, started_at TEXT,
            completed_at TEXT
        ) STRICT""",
        "CREATE INDEX deployments_app ON deployments (app, id)",
        "CREATE INDEX deployments_status ON deployments (status, id)",
        "CREATE INDEX deployments_open ON deployments (app, id) WHERE completed_at IS NULL",
        "CREATE INDEX deployments_paused ON deployments (resume_at) WHERE resume_at IS NOT NULL",
        "CREATE INDEX jobs_deployment ON jobs (deployment_id, id) WHERE deployment_id IS NOT NULL",
        """CREATE TABLE locks (
            app TEXT PRIMARY KEY, reason TEXT NOT NULL, "by" TEXT NOT NULL, at TEXT NOT NULL, until TEXT
        ) STRICT, WITHOUT ROWID""",
        # What became of each push. `settled`: the same delivery makes nothing new.
        "ALTER TABLE deliveries ADD COLUMN guid TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE deliveries ADD COLUMN repo TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE deliveries ADD COLUMN ref TEXT NOT NULL DEFAULT ''",
        'ALTER TABLE deliveries ADD COLUMN "commit" TEXT',
        "ALTER TABLE deliveries ADD COLUMN pusher TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE deliveries ADD COLUMN outcomes TEXT NOT NULL DEFAULT '[]'",
        "ALTER TABLE deliveries ADD COLUMN settled INTEGER NOT NULL DEFAULT 1",
        "UPDATE deliveries SET repo = substr(id, 1, instr(id, ' ') - 1), guid = substr(id, instr(id, ' ') + 1)",
        "CREATE INDEX deliveries_guid ON deliveries (guid)",
        "ALTER TABLE agents ADD COLUMN current TEXT NOT NULL DEFAULT '{}'",
        # Another word in a CHECK changes no row, so the text of the schema is enough: https://sqlite.org/lang_altertable.html, 7
        "PRAGMA writable_schema = ON",
        """UPDATE sqlite_schema SET sql = replace(sql, '(''log'', ''job'')', '(''log'', ''job'', ''deployment'')')
            WHERE name = 'events'""",
        "PRAGMA writable_schema = RESET",
    ),
)

JOB_COLUMNS = ", ".join(f'"{name}"' for name in Job._fields)
DEPLOYMENT_COLUMNS = ", ".join(f'"{name}"' for name in Deployment._fields)
DELIVERY_COLUMNS = ("guid", "received_at", "repo", "ref", "commit", "pusher", "message", "outcomes")
# Where a new job goes in, with its event and its audit row: all that wait for one commit are then one statement, which SQLite
# commits by itself. Python lets go of the GIL once for it, where each further statement has to come by it again.
LANDS = {"INSERT INTO new_jobs": ("jobs", "events", "audit")}  # in which tables, where not in that alone
NEW_JOB_ROW = (*Job._fields, "position", "data", "address", "action", "detail")
NEW_JOBS = (
    "CREATE TEMP VIEW new_jobs AS SELECT " + ", ".join(f'NULL AS "{name}"' for name in NEW_JOB_ROW),
    "CREATE TEMP TRIGGER new_job INSTEAD OF INSERT ON new_jobs BEGIN INSERT INTO jobs VALUES ("
    + ", ".join(f'new."{name}"' for name in Job._fields)
    + """); INSERT INTO events VALUES (new.position, 1, 'job', new.id, new.host, new.app, new.attempt, 0, new.data, 0);
    INSERT INTO audit SELECT NULL, new.created_at, new.created_by, new.address, new.action, new.id, new.detail WHERE new.action != '';
    END""",
)
JOB_JSON = ", ".join(f"'{name}', " + ('json("metadata")' if name == "metadata" else f'"{name}"') for name in Job._fields[:-3])
EVENT_COLUMNS = ", ".join(f'"{name}"' for name in Event.__slots__[:-1])
AUDIT_COLUMNS = ("id", "at", "who", "address", "action", "target", "detail")


class Queries:
    """What can be asked of the database, on one connection."""

    def __init__(self, db: sqlite3.Connection):
        self._db = db

    def one(self, sql: str, *values: Any) -> Any:
        """The first row, or None."""
        return self._db.execute(sql, values).fetchone()

    def rows(self, sql: str, *values: Any) -> list[Any]:
        return self._db.execute(sql, values).fetchall()

    def meta(self, name: str) -> str:
        """Empty where there is none."""
        return str((self.one("SELECT value FROM meta WHERE name = ?", name) or ("",))[0])

    def last_position(self) -> int:
        """Also of those that retention removed: no position is used twice."""
        return max(int(self.one("SELECT coalesce(max(position), 0) FROM events")[0]), int(self.meta("removed_through")))

    def last_id(self, table: str) -> str | None:
        return self.one(f"SELECT max(id) FROM {table}")[0]

    def agents(self, where: str = "1", *values: Any) -> list[Agent]:
        return [Agent(*row) for row in self.rows(f"SELECT * FROM agents WHERE {where}", *values)]

    def agent_of(self, hostname: str) -> Agent | None:
        return next(iter(self.agents("hostname = ?", hostname)), None)

    def job(self, job_id: str) -> Job:
        """Raises NotFound."""
        return Job._make(self._job(JOB_COLUMNS, job_id))

    def shown(self, job_id: str) -> tuple[str, str]:
        """(app, public JSON) of a job, which SQLite writes faster than we could. Raises NotFound."""
        return self._job(f"app, json_object({JOB_JSON})", job_id)

    def _job(self, columns: str, job_id: str) -> Any:
        row = self.one(f"SELECT {columns} FROM jobs WHERE id = ?", job_id)
        if row is None:
            raise NotFound(f"no job {job_id}")
        return row

    def jobs_that_are(self, status: Status) -> list[Job]:
        return [Job._make(row) for row in self.rows(f"SELECT {JOB_COLUMNS} FROM jobs WHERE status = ?", status)]

    def pending(self) -> Iterator[tuple[str, str, str, str, str, bool]]:
        """(job id, repo, ref, host, app, whether it is held) of each pending job, oldest first."""
        sql = "SELECT id, repo, ref, host, app, hold IS NOT NULL FROM jobs INDEXED BY jobs_status WHERE status = 'pending'"
        return self._db.execute(sql + " ORDER BY id")

    def expired(self, oldest_id: str, oldest: str) -> list[str]:
        """Ids of some jobs that wait for their host since before that time; `oldest_id`: the least id that a job made then could have."""
        sql = "SELECT id FROM jobs WHERE status = 'pending' AND id < ? AND queued_at < ? AND hold IS NULL LIMIT 500"
        return [row[0] for row in self.rows(sql, oldest_id, oldest)]

    def _deployments(self, where: str, *values: Any) -> list[Deployment]:
        return [Deployment._make(row) for row in self.rows(f"SELECT {DEPLOYMENT_COLUMNS} FROM deployments WHERE {where}", *values)]

    def deployment(self, deployment_id: str) -> Deployment:
        """Raises NotFound."""
        for found in self._deployments("id = ?", deployment_id):
            return found
        raise NotFound(f"no deployment {deployment_id[:100]}")

    def deployments(self, equal: Mapping[str, str], starts: str | None, before: str | None, limit: int) -> list[Deployment]:
        """Newest first. `equal`: column to value, columns of ours alone."""
        where = [f"{'+' * (column == 'status' and len(equal) > 1)}{column} = ?" for column in equal]
        bounds = [("id >= ?", starts), ("id < ?", starts and starts + "~"), ("id < ?", before)]
        where += [bound for bound, text in bounds if text]
        values = [*equal.values(), *(text for _, text in bounds if text), limit]
        return self._deployments(f"{' AND '.join(['1', *where])} ORDER BY id DESC LIMIT ?", *values)

    def open_deployments(self, app: str) -> list[Deployment]:
        return self._deployments("app = ? AND completed_at IS NULL ORDER BY id", app)

    def paused_until(self, now: str) -> list[str]:
        """Ids of those whose pause is over."""
        return [row[0] for row in self.rows("SELECT id FROM deployments WHERE resume_at <= ? AND hold = 'pause'", now)]

    def jobs_of(self, deployment_id: str, where: str = "1", limit: int = -1) -> list[Job]:
        """In the order in which they were made, which is that of their turns."""
        sql = f"SELECT {JOB_COLUMNS} FROM jobs WHERE deployment_id = ? AND {where} ORDER BY id LIMIT ?"
        return [Job._make(row) for row in self.rows(sql, deployment_id, limit)]

    def lock_of(self, app: str) -> Lock | None:
        return next(iter(self.locks("app = ?", app)), None)

    def locks(self, where: str = "1", *values: Any) -> list[Lock]:
        return [Lock._make(row) for row in self.rows(f"SELECT * FROM locks WHERE {where}", *values)]

    def was_overtaken(self, job: Job) -> bool:
        """By a success that was asked for after it: to make it again would put back what is older."""
        return self.one("SELECT 1 FROM releases WHERE app = ? AND host = ? AND job_id > ?", job.app, job.host, job.id) is not None

    def before(self, app: str, host: str, to: str | None) -> tuple[str | None, str | None]:
        """(the commit that the host runs, the one that it goes back to) of an app; `to`: the start of that commit.
        What a rollback brought back counts where it was deployed first, else a second one would go forward again."""
        row = self.one('SELECT "commit" FROM releases WHERE app = ? AND host = ?', app, host)
        current, such = row and row[0], "FROM jobs INDEXED BY jobs_success WHERE status = 'success' AND app = ? AND host = ?"
        if to:
            found = self.one(f'SELECT "commit" {such} AND substr("commit", 1, ?) = ? ORDER BY id DESC', app, host, len(to), to)
        else:
            first = f"""SELECT max(id) {such} AND "commit" = ? AND spec NOT LIKE '%,"reuse":true}}'"""
            sql = f'SELECT "commit" {such} AND id < ({first}) AND "commit" != ? ORDER BY id DESC'
            found = self.one(sql, app, host, app, host, current, current)
        return current, found and found[0]

    def deliveries(self, repo: str | None, before: str | None, limit: int, guid: str | None = None) -> list[dict[str, Any]]:
        """Newest first; `guid`: of that one alone."""
        parts = [("guid = ?", guid), ("repo = ? COLLATE NOCASE", repo)]
        parts.append(("rowid < (SELECT max(rowid) FROM deliveries WHERE guid = ?)", before))
        where = " AND ".join(["1", *(part for part, value in parts if value)])
        columns = ", ".join(f'"{name}"' for name in DELIVERY_COLUMNS)
        sql = f"SELECT {columns} FROM deliveries WHERE {where} ORDER BY rowid DESC LIMIT ?"
        rows = self.rows(sql, *(value for _, value in parts if value), limit)
        names = ("id", *DELIVERY_COLUMNS[1:])
        return [dict(zip(names, (*row[:-1], json.loads(row[-1])), strict=True)) for row in rows]

    def running_apps(self, host: str) -> list[str]:
        sql = "SELECT app FROM jobs INDEXED BY jobs_running WHERE host = ? AND status = 'running'"
        return [row[0] for row in self.rows(sql, host)]

    def jobs(self, equal: Mapping[str, str], starts: str | None, before: str | None, limit: int) -> tuple[str, str, int]:
        """(their public JSON, newest first, the id of the last, how many): one row, as each takes a turn at the GIL.
        `equal`: column to value, columns of ours alone."""
        where, values = ["1"], []
        for column, value in equal.items():
            plus = "+" if column == "status" and len(equal) > 1 else ""  # keeps SQLite to the index that narrows more
            where.append(f"{plus}{column} = ?" + (" COLLATE NOCASE" if column == "repo" else ""))
            values.append(value)
        for bound, text in (("id >= ?", starts), ("id < ?", starts and starts + "~"), ("id < ?", before)):
            if text:
                where.append(bound)
                values.append(text)
        some = f"SELECT {JOB_COLUMNS} FROM jobs WHERE {' AND '.join(where)} ORDER BY id DESC LIMIT ?"
        sql = f"SELECT json_group_array(json_object({JOB_JSON})), min(id), count(*) FROM ({some})"
        return self.one(sql, *values, limit)

    def events(self, wanted: EventFilter, after: int, until: int) -> Iterator[Event]:
        """In order, as one reads them. Host and app have no index: the reader drops what it does not want."""
        sql = f"SELECT {EVENT_COLUMNS} FROM events WHERE position > ? AND position <= ?"
        values: list[Any] = [after, until]
        if wanted.job_id is not None:
            sql += " AND job_id = ?"
            values.append(wanted.job_id)
        return (Event(*row) for row in self._db.execute(sql + " ORDER BY position", values))

    def log_events(self, job_id: str, after: int) -> Iterator[Event]:
        sql = f"SELECT {EVENT_COLUMNS} FROM events WHERE job_id = ? AND kind = 'log' AND position > ? ORDER BY position"
        return (Event(*row) for row in self._db.execute(sql, (job_id, after)))

    def log_end(self, job_id: str, attempt: int) -> tuple[int, int]:
        """(the offset after the last stored line of that attempt, bytes of the log of the job)."""
        last = "SELECT attempt, \"offset\" + lines, log_bytes FROM events WHERE job_id = ? AND kind = 'log' ORDER BY position DESC"
        row = self.one(f"{last} LIMIT 1", job_id)
        return (row[1] if row[0] == attempt else 0, row[2]) if row else (0, 0)

    def last_position_of(self, job_id: str, kind: str) -> int:
        return self.one("SELECT max(position) FROM events WHERE job_id = ? AND kind = ?", job_id, kind)[0] or 0

    def recent_chunks(self, wanted: EventFilter, limit: int) -> list[tuple[int, int]]:
        """(position, lines) of the newest log chunks, newest first. For a host or an app: those of its 20 newest jobs;
        for all: of the last 2,000 positions."""
        newest = "SELECT position, lines FROM events WHERE kind = 'log' AND {} ORDER BY position DESC LIMIT ?"
        if wanted.job_id is not None:
            return self.rows(newest.format("job_id = ?"), wanted.job_id, limit)
        equal = {name: value for name, value in (("host", wanted.host), ("app", wanted.app)) if value is not None}
        if not equal:
            return self.rows(newest.format("position > (SELECT max(position) FROM events) - 2000"), limit)
        jobs = " AND ".join(f"{name} = ?" for name in equal)
        recent = f"job_id IN (SELECT id FROM jobs WHERE {jobs} ORDER BY id DESC LIMIT 20)"
        return self.rows(newest.format(recent), *equal.values(), limit)

    def releases(self, pairs: list[tuple[str, str]]) -> Iterator[dict[str, str | None]]:
        """What each (app, host) of these runs, and is to run by the newest of the last jobs of the host, in their order."""
        newest = """SELECT coalesce(job."commit", job.ref) FROM (SELECT id, ref, "commit", app, status FROM jobs
            WHERE host = json_extract(value, '$[1]') ORDER BY id DESC LIMIT 16) AS job
            WHERE job.app = json_extract(value, '$[0]') AND job.status != 'cancelled' ORDER BY job.id DESC LIMIT 1"""
        sql = f"""SELECT json_extract(value, '$[1]'), "commit", job_id, deployed_at, coalesce(({newest}), "commit") FROM json_each(?)
            LEFT JOIN releases ON app = json_extract(value, '$[0]') AND host = json_extract(value, '$[1]') ORDER BY key"""
        names = ("hostname", "commit", "job_id", "deployed_at", "wanted")
        return (dict(zip(names, row, strict=True)) for row in self.rows(sql, dump(pairs)))

    def newest_push(self, app: str, ref: str) -> tuple[int | None, str] | None:
        """(pushed_at, the commit that it came after) of the newest push that the app took."""
        return self.one("SELECT pushed_at, before FROM pushes WHERE app = ? AND ref = ?", app, ref)

    def tokens(self) -> list[Token]:
        return [Token._make(row) for row in self.rows("SELECT * FROM tokens ORDER BY id")]

    def audit(self, equal: Mapping[str, str], before: int | None, limit: int) -> list[dict[str, Any]]:
        """Newest first. `equal`: column to value, columns of ours alone."""
        where = "".join(f" AND {column} = ?" for column in equal)
        sql = f"SELECT * FROM audit WHERE id < ?{where} ORDER BY id DESC LIMIT ?"
        found = self.rows(sql, (1 << 62) if before is None else before, *equal.values(), limit)
        return [dict(zip(AUDIT_COLUMNS, row, strict=True)) for row in found]

    def old_jobs(self, after: str, oldest_id: str, limit: int) -> list[tuple[str, str | None, str | None, bool]]:
        """(id, end, deployment, whether it is among the last two successes of its app on its host) of jobs between the ids, oldest first."""
        newer = "SELECT 1 FROM jobs AS newer INDEXED BY jobs_success WHERE newer.status = 'success'"
        newer += " AND newer.app = jobs.app AND newer.host = jobs.host AND newer.id > jobs.id LIMIT 2"
        kept = f"CASE WHEN status = 'success' THEN (SELECT count(*) < 2 FROM ({newer})) ELSE 0 END"
        sql = f"SELECT id, completed_at, deployment_id, {kept} FROM jobs WHERE id > ? AND id < ? ORDER BY id LIMIT ?"
        return self.rows(sql, after, oldest_id, limit)

    def delivery(self, delivery_id: str, signature: str) -> tuple[list[str], str] | None:
        """What a delivery of that id, or of that signed body, made: the id is not signed, so it does not count alone."""
        sql = "SELECT jobs, message FROM deliveries WHERE settled AND (id = ? OR body_sha256 = ?)"
        row = self.one(sql, delivery_id, signature)
        return (json.loads(row[0]), row[1]) if row else None


@functools.cache
def insert(into: str, columns: int, rows: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return f"{into} VALUES {', '.join([row] * rows)}"


class TryAlone(Exception):
    """A part of a transaction that others share has failed and cannot be undone by itself."""


class Tx(Queries):
    """A transaction, which several callers may share: queries, changes, and effects that happen after COMMIT in the order of commit.

    Each statement of SQLite lets go of the GIL and has to come by it again, which under load costs more than the statement. So new
    rows are put off and go in together, and what is known of recent jobs is not asked again. SQLite's transaction begins with the
    first change, as nobody else writes; where there are rows of one kind alone, their statement is the transaction."""

    def __init__(self, db: sqlite3.Connection, position: int, recent: Mapping[Any, Any]):
        super().__init__(db)
        self.position, self._recent = position, recent
        self.effects: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self.added: list[Event] = []
        self.opened: dict[int, list[str]] = {}  # key_of() a deployment to ids of jobs that it makes
        self.learned: dict[Any, Any] = {}  # what `recent` learns with the COMMIT
        self._tallies: dict[str, collections.Counter[str]] = {}  # deployment to what is added to its counts with the next change
        self.due: dict[str, Callable[[Tx, str], Any]] = {}  # what to do with that key before the part ends, once for many reasons
        self._put_off: dict[str, list[tuple[Any, ...]]] = {}  # INSERT INTO table to rows that SQLite does not have yet
        # Of the part that runs: what it learned, how many rows were put off before it, whether SQLite has changes of it.
        self._news: dict[Any, Any] = {}
        self._before: dict[str, int] = {}
        self._is_changed = False

    def part(self, do: Callable[[Tx], T]) -> tuple[T | None, Exception | None]:
        """One caller's work: its value, or the error that has undone it. Raises SQLite's own errors, which end the whole transaction,
        and TryAlone."""
        position, effects, added = self.position, len(self.effects), len(self.added)
        self._news, self._is_changed = {}, False
        self._before = {into: len(rows) for into, rows in self._put_off.items()}
        try:
            value = do(self)
            self.settle()
        except Exception as error:
            self.due.clear()
            self._tallies.clear()
            if isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.IntegrityError):
                raise
            if self._is_changed or not isinstance(error, DeployBotError):  # it may have met a row of another part
                raise TryAlone from error
            del self.effects[effects:], self.added[added:]
            for into, rows in self._put_off.items():
                del rows[self._before.get(into, 0) :]
            self.position = position
            return None, error
        self.learned.update(self._news)
        return value, None

    def settle(self) -> None:
        """Does what is due, and what becomes due by it."""
        while self.due:
            key, do = self.due.popitem()
            do(self, key)

    def _begin(self) -> None:
        if not self._db.in_transaction:
            self._db.execute("BEGIN IMMEDIATE")

    def _flush(self, sql: str = "") -> None:
        """Gives SQLite the rows that were put off; with `sql`, those of the tables that it names."""
        for into, rows in self._put_off.items():
            if rows and (not sql or any(table in sql for table in LANDS.get(into, (into.rpartition(" ")[2],)))):
                self._begin()
                self._is_changed = self._is_changed or len(rows) > self._before.get(into, 0)
                self._before[into] = 0
                self._insert(into, rows)

    def _insert(self, into: str, rows: list[tuple[Any, ...]]) -> None:
        while some := rows[:MANY_ROWS]:
            self._db.execute(insert(into, len(some[0]), len(some)), tuple(itertools.chain.from_iterable(some)))
            del rows[: len(some)]

    def commit(self) -> None:
        kinds = [rows for rows in self._put_off.values() if rows]
        if self._db.in_transaction or len(kinds) > 1 or any(len(rows) > MANY_ROWS for rows in kinds):
            self._flush()
            self._db.execute("COMMIT")
        else:
            for into, rows in self._put_off.items():
                self._insert(into, rows)

    def one(self, sql: str, *values: Any) -> Any:
        self._flush(sql)
        return super().one(sql, *values)

    def rows(self, sql: str, *values: Any) -> list[Any]:
        self._flush(sql)
        return super().rows(sql, *values)

    def _do(self, sql: str, *values: Any) -> sqlite3.Cursor:
        self._begin()
        self._flush(sql)
        self._is_changed = True
        return self._db.execute(sql, values)

    def after(self, effect: Callable[..., Any], *values: Any) -> None:
        """`effect` touches memory alone: no SQL, no I/O, and it does not raise."""
        self.effects.append((effect, values))

    def learn(self, key: Any, value: Any) -> None:
        """None: from now on SQLite has to be asked."""
        self._news[key] = value

    def _recall(self, key: Any) -> Any:
        return next((known[key] for known in (self._news, self.learned, self._recent) if key in known), None)

    def job(self, job_id: str) -> Job:
        known = self._recall(job_id)
        return known[0] if known else super().job(job_id)

    def log_end(self, job_id: str, attempt: int) -> tuple[int, int]:
        known = self._recall(("log", job_id))
        if known is None:
            return super().log_end(job_id, attempt)
        last, end, log_bytes = known
        return (end if last == attempt else 0), log_bytes

    def add(self, table: str, *row: Any) -> None:
        """A row with all columns, in their order."""
        self._put_off.setdefault(f"INSERT INTO {table}", []).append(row)

    def put(self, table: str, *row: Any) -> None:
        """As add(); it replaces the row with the same key."""
        self._put_off.setdefault(f"INSERT OR REPLACE INTO {table}", []).append(row)

    def change_job(self, job: Job, **columns: Any) -> Job:
        """The job with these columns. It was read in this transaction, so it still has the status and the attempt that `job` says."""
        names = ", ".join(f'"{name}" = ?' for name in columns)
        sql = f"UPDATE jobs SET {names} WHERE id = ? AND status = ? AND attempt = ? RETURNING {JOB_COLUMNS}"
        row = self._do(sql, *columns.values(), job.id, job.status, job.attempt).fetchone()
        assert row is not None, f"job {job.id} was read in this transaction"
        self.learn(job.id, None)
        return Job._make(row)

    def add_job(self, job: Job, data: str, address: str, action: str, detail: str) -> None:
        """With its event, and with its audit row where there is an `action`."""
        self.position += 1
        self.add("new_jobs", *job, self.position, data, address, action, detail)
        self.added.append(Event(self.position, 1, "job", job.id, job.host, job.app, job.attempt, 0, data))

    def tally(self, deployment_id: str, counts: Mapping[str, int]) -> None:
        """Adds to the counts of a deployment, once for many jobs."""
        self._tallies.setdefault(deployment_id, collections.Counter()).update(counts)

    def deployment(self, deployment_id: str) -> Deployment:
        return self.change_deployment(deployment_id) if deployment_id in self._tallies else super().deployment(deployment_id)

    def change_deployment(self, deployment_id: str, **columns: Any) -> Deployment:
        by = self._tallies.pop(deployment_id, NOTHING)
        sets = ", ".join([*(f"{name} = {name} + ?" for name in by), *(f"{name} = ?" for name in columns)])
        sql = f"UPDATE deployments SET {sets} WHERE id = ? RETURNING {DEPLOYMENT_COLUMNS}"
        return Deployment._make(self._do(sql, *by.values(), *columns.values(), deployment_id).fetchone())

    def add_deployment_event(self, deployment: Deployment) -> None:
        self.position += 1
        data = dump(deployment.public())
        event = Event(self.position, 1, "deployment", deployment.id, "", deployment.app, 0, 0, data)
        self.added.append(event)
        self.add("events", *event.row())

    def add_event(self, job: Job, kind: str, lines: int, offset: int, data: str, log_bytes: int = 0) -> Event:
        self.position += lines
        event = Event(self.position, lines, kind, job.id, job.host, job.app, job.attempt, offset, data, log_bytes)
        self.added.append(event)
        self.add("events", *event.row())
        if kind == "log":
            self.learn(("log", job.id), (job.attempt, offset + lines, log_bytes))
        return event

    def each(self, table: str, column: str, key: str, values: Iterable[tuple[str, str]]) -> None:
        """Writes a column in many rows: (value, key)."""
        self._begin()
        self._flush(table)
        self._is_changed = True
        self._db.executemany(f"UPDATE {table} SET {column} = ? WHERE {key} = ?", values)

    def begin_epoch(self, epoch: str) -> None:
        """Of a copy: its positions count anew, no job gets another attempt, no agent has a session."""
        self._do("UPDATE meta SET value = ? WHERE name = 'epoch'", epoch)
        self._do("DELETE FROM meta WHERE name = 'copied_at'")
        self._do("UPDATE jobs SET retries = 0 WHERE status = 'running'")
        self._do("UPDATE agents SET session = ''")

    def audited(self, at: str, by: Principal, action: str, target: str, detail: str = "") -> None:
        """Who did it, and from where: in the transaction that does it."""
        self.add("audit", None, at, by.name, by.address, action, target, detail)

    def remove_events(self, job_id: str, limit: int) -> int:
        """The oldest of a job, up to `limit`; how many."""
        some = "SELECT position FROM events WHERE job_id = ? ORDER BY position LIMIT ?"
        rows = self._do(f"DELETE FROM events WHERE position IN ({some}) RETURNING position", job_id, limit).fetchall()
        if rows:
            through = max(int(self.meta("removed_through")), *(row[0] for row in rows))
            self._do("UPDATE meta SET value = ? WHERE name = 'removed_through'", str(through))
        return len(rows)

    def remove_empty(self, deployment_id: str) -> int:
        """A deployment, if it has no job any more; how many events went with it."""
        sql = "DELETE FROM deployments WHERE id = ? AND NOT EXISTS (SELECT 1 FROM jobs WHERE deployment_id = deployments.id)"
        return self.remove_events(deployment_id, RETENTION_EVENTS) if self._do(sql, deployment_id).rowcount else 0

    def remove(self, table: str, column: str, value: str) -> int:
        return self._do(f"DELETE FROM {table} WHERE {column} = ?", value).rowcount

    def remove_oldest(self, table: str, column: str, before: str, limit: int) -> int:
        """Rows of a table that grows at its end; how many went."""
        some = f"SELECT rowid FROM {table} ORDER BY rowid LIMIT ?"
        return self._do(f"DELETE FROM {table} WHERE rowid IN ({some}) AND {column} < ?", limit, before).rowcount

    def give_back(self, pages: int) -> None:
        """Free pages to the file system, one a statement: sqlite3 of Python 3.11 ends this one after its first step."""
        for _ in range(min(pages, self.one("PRAGMA freelist_count")[0])):
            self._do("PRAGMA incremental_vacuum(1)").fetchall()


SQLITE = sqlite3.sqlite_version
DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
BESIDE = ("-wal", "-shm", "-journal")  # what SQLite keeps beside a database, and takes for a part of whatever stands there
CHECKED_AT_START = 256 * MIB  # bytes of a database: reading them takes a second; a larger one is for `doctor`
RESTORE = "restore a backup: deploybot.py restore FILE"


@contextlib.contextmanager
def database_errors(path: object) -> Iterator[None]:
    """What is wrong with that database becomes a StartError of one line, which says what to do where it is damaged."""
    try:
        yield
    except OSError as error:
        raise StartError(f"database {path}: {error.strerror}: {error.filename}") from None
    except sqlite3.Error as error:
        hint = f"; {RESTORE}" if getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGE else ""
        raise StartError(f"database {path}: {error}{hint}") from None
    except (Unavailable, ValueError, TypeError, LookupError) as error:  # what stands in it makes no sense
        log.debug("database %s", path, exc_info=True)
        raise StartError(f"database {path}: damaged: {error}; {RESTORE}") from None


def lock_database(path: pathlib.Path) -> Any:
    """The lock file, locked: two daemons on one database would hand out a job twice."""
    file = open(f"{path}.lock", "w")  # noqa: SIM115 (held for as long as the store is)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise StartError(f"database {path}: another deploybot.py uses it") from None
    return file


def connect(path: pathlib.Path, mode: str = "rwc") -> sqlite3.Connection:
    """Mode `ro` changes nothing: it neither writes the WAL back nor removes it."""
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, timeout=10.0, isolation_level=None, check_same_thread=False, cached_statements=256, uri=True)


def schema_of(db: sqlite3.Connection, path: pathlib.Path, whole: bool) -> int:
    """0 of an empty database. Raises StartError for one that is not ours or made by a newer DeployBot; `whole`: reads all of it."""
    if sqlite3.sqlite_version_info < (3, 37):  # STRICT tables; RETURNING came with 3.35, VACUUM INTO with 3.27
        raise StartError(f"SQLite {SQLITE} is too old: 3.37 is needed")
    version, newest = db.execute("PRAGMA user_version").fetchone()[0], len(MIGRATIONS)
    tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
    if version < 0 or not ({"meta", "jobs"} <= tables if version else not tables):
        raise StartError(f"database {path}: not one of DeployBot's, or damaged: choose another --db, or {RESTORE}")
    if version > newest:
        raise StartError(f"database {path}: made by a newer DeployBot (schema {version}, this one knows {newest})")
    if whole and (found := db.execute("PRAGMA integrity_check(1)").fetchone()[0]) != "ok":
        raise StartError(f"database {path}: damaged: {found}; {RESTORE}")
    return version


def examine(path: pathlib.Path) -> tuple[int, int, int]:
    """(schema, jobs, agents) of a database, whose daemon may run. Raises StartError where it is not whole."""
    with database_errors(path), contextlib.closing(connect(path, "ro")) as db:
        return schema_of(db, path, True), *Queries(db).one("SELECT (SELECT count(*) FROM jobs), (SELECT count(*) FROM agents)")


def sync(path: pathlib.Path) -> None:
    """Makes a file, or what was created, renamed and removed in a folder, outlive a power cut."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def must_be_there(path: pathlib.Path, cure: str, kind: str = "file") -> None:
    if not path.exists():
        raise StartError(f"there is no {kind} {path}: {cure}")


def copy_database(source: pathlib.Path, target: pathlib.Path) -> tuple[int, int, int]:
    """A snapshot as a file of its own (0600), there whole or not at all. Only reads the source, whose daemon may run.
    It says since when it is a copy, also as a copy of one: a daemon that serves it one day begins a new epoch (Jobs.recover)."""
    partial = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
    if target.resolve() in [pathlib.Path(f"{source.resolve()}{end}") for end in ("", ".lock", *BESIDE)]:
        raise StartError(f"{target} is the database itself: choose another FILE")
    with database_errors(f"{source} to {target}"):
        must_be_there(source, "name the database with --db")
        must_be_there(target.parent, "make it, or name another FILE", "folder")
        try:
            with contextlib.closing(connect(source, "ro")) as db:
                schema_of(db, source, False)
                os.close(os.open(partial, os.O_CREAT | os.O_EXCL, 0o600))
                db.execute("VACUUM INTO ?", (str(partial.absolute()),))
            with contextlib.closing(connect(partial)) as db:
                db.execute("PRAGMA journal_mode = OFF")  # it is nobody's yet
                db.execute("INSERT OR IGNORE INTO meta VALUES ('copied_at', strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))")
            facts = examine(partial)
            sync(partial)
            os.replace(partial, target)
            sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)
    return facts


def give_to_owner(path: pathlib.Path) -> None:
    """Root, who restores, leaves nothing that the daemon's user cannot open."""
    if os.geteuid() == 0:
        folder = path.parent.stat()
        os.chown(path, folder.st_uid, folder.st_gid)


def restore_database(source: pathlib.Path, path: pathlib.Path, kept: pathlib.Path) -> tuple[int, int, int]:
    """Puts a copy of `source` in the place of a database that no daemon serves; what was there is kept.
    It may be killed anywhere: while PATH.restoring is there no daemon starts, the old files have their new names before they lose
    the old ones, and to restore once more ends the work."""
    ready = pathlib.Path(f"{path}.restoring")
    with database_errors(path):
        must_be_there(source, "name the FILE that backup wrote")
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock_database(path):
            give_to_owner(pathlib.Path(f"{path}.lock"))
            examine(source)
            facts = copy_database(source, ready)
            give_to_owner(ready)
            for end in ("", *BESIDE):
                with contextlib.suppress(FileNotFoundError):
                    os.link(f"{path}{end}", f"{kept}{end}")
                    if end:
                        os.unlink(f"{path}{end}")
            sync(path.parent)
            os.replace(ready, path)
            sync(path.parent)
    return facts


class Work:
    """What one caller of Store.write() wants done, and how it went."""

    __slots__ = ("do", "done", "error", "size", "turn", "value")

    def __init__(self, do: Callable[[Tx], Any], size: int):
        self.do, self.size, self.done = do, size, False
        self.value: Any = None
        self.error: BaseException | None = None
        self.turn = threading.Lock()  # its caller waits on it; released when the work is done, or when the caller is to commit
        self.turn.acquire()

    def finish(self, value: Any, error: BaseException | None) -> None:
        self.value, self.error, self.done = value, error, True


class Store:
    """The database. Raises StartError where it cannot be used, Unavailable where it cannot be used now."""

    def __init__(self, path: pathlib.Path, lasts: Callable[[], None] = lambda: None, replicated: bool = False):
        """`lasts` is called before what may take minutes. `replicated`: checkpoints are left to Litestream."""
        self.path, self._lasts, self._replicated = path, lasts, replicated
        with database_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_file = lock_database(path)
            if os.path.exists(f"{path}.restoring"):
                raise StartError(f"database {path}: a restore was interrupted; {RESTORE}")
            self._db = connect(path)
            self._prepare()
            for statement in ("PRAGMA temp_store = MEMORY", *NEW_JOBS):
                self._db.execute(statement)
            self._readers: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
            for _ in range(READERS):
                reader = connect(path, "ro")
                reader.executescript("PRAGMA query_only = ON; PRAGMA schema_version")  # the second opens the WAL, see close()
                self._readers.put(reader)
            self.position = Queries(self._db).last_position()
        # Jobs and ends of logs that were written last, oldest first: job id to (job, its public JSON), ("log", job id) to (attempt,
        # offset after the last line, bytes). Changed after a commit alone, by the thread that holds _writer; read without a lock.
        self.recent: dict[Any, Any] = {}
        self.announce: Callable[[list[Event]], None] = lambda events: None  # called after each commit that has some
        self._lock = threading.Lock()  # guards _waiting, _uploads and _is_led
        self._waiting: collections.deque[Work] = collections.deque()
        self._uploads: collections.deque[Work] = collections.deque()  # the same, of those who bring many bytes
        self._is_led = False  # whether one of the callers commits, or was told to
        self._writer = threading.Lock()  # guards _db and position; who holds it commits for all that wait

    def _prepare(self) -> None:
        version = schema_of(self._db, self.path, self.path.stat().st_size <= CHECKED_AT_START)
        if version == 0:
            log.warning("%s is not there: a new database is made", self.path)
            self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        elif version < len(MIGRATIONS):
            self._lasts()
            kept = self.path.with_name(f"{self.path.name}.schema-{version}")
            copy_database(self.path, kept)
            log.warning("%s is brought to schema %d; as it was, it is kept as %s", self.path, len(MIGRATIONS), kept)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # what a client was told is done survives a power cut
        self._db.execute(f"PRAGMA wal_autocheckpoint = {0 if self._replicated else 1000}")
        for number in range(version, len(MIGRATIONS)):
            self._migrate(number)

    def _migrate(self, number: int) -> None:
        with self._db:  # COMMIT at its end, ROLLBACK after an error
            self._db.execute("BEGIN IMMEDIATE")
            for statement in MIGRATIONS[number]:
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {number + 1}")

    def write(self, do: Callable[[Tx], T], size: int = 0, patient: bool = False) -> T:
        """Runs do(tx) in a transaction that others may share; returns its value once it is durable and its effects have happened.
        `size`: bytes that it stores; who stores many waits for one another, and nobody else for more than some of them.
        `patient`: waits however many wait already, where others are sent away: a push, and the sweep.
        What `do` raises undoes its own changes alone and is raised here. Raises Unavailable where SQLite cannot write now."""
        work, waiting = Work(do, size), self._uploads if size else self._waiting
        if len(waiting) >= MAX_WRITES and not patient:
            raise Unavailable("more is to be written than the disk can take: try again later")
        with self._lock:
            waiting.append(work)
            leads, self._is_led = not self._is_led, True
        if not leads:
            work.turn.acquire()
        if not work.done:
            self._lead()
        if work.error is not None:
            raise work.error
        return work.value

    def _lead(self) -> None:
        """Commits for all that wait; of those that came meanwhile, the first leads next."""
        with self._writer:
            batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
            room = UPLOADS
            while self._uploads and room > 0:
                batch.append(self._uploads.popleft())
                room -= batch[-1].size
            self._commit(batch)
        with self._lock:
            following = list(itertools.islice(itertools.chain(self._waiting, self._uploads), 1))
            self._is_led = bool(following)
        for work in following + batch:
            work.turn.release()

    def _commit(self, batch: list[Work]) -> None:
        tx = Tx(self._db, self.position, self.recent)
        try:
            results = [(work, *tx.part(work.do)) for work in batch]
            tx.commit()
        except BaseException as error:
            is_of_one = not isinstance(error, sqlite3.Error) or isinstance(error, sqlite3.IntegrityError)
            shared = batch if len(batch) > 1 and is_of_one and isinstance(error, Exception) else []
            self._give_up([] if shared else batch, (error.__cause__ or error) if isinstance(error, TryAlone) else error)
            for work in shared:
                self._commit([work])
            return
        self.position = tx.position
        self._remember(tx.learned)
        if tx.added:
            self.announce(tx.added)
        for effect, values in tx.effects:
            try:
                effect(*values)
            except Exception:  # a fault of ours; the others' work is committed all the same
                log.exception("after a commit")
        for work, value, failure in results:
            work.finish(value, failure)

    def _remember(self, learned: Mapping[Any, Any]) -> None:
        for key, value in learned.items():
            self.recent.pop(key, None)
            if value is not None:
                self.recent[key] = value
        while len(self.recent) > RECENT:
            del self.recent[next(iter(self.recent))]

    def _give_up(self, batch: list[Work], error: BaseException) -> None:
        """Nothing of the batch happened; each caller is told."""
        with contextlib.suppress(sqlite3.Error):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        if isinstance(error, sqlite3.Error) and not isinstance(error, sqlite3.IntegrityError):
            log.error("the database cannot be written: %s", error)
            error = Unavailable(f"the database cannot be written now: {error}")
        for work in batch:
            work.finish(None, error)

    @contextlib.contextmanager
    def read(self) -> Iterator[Queries]:
        """Queries on a connection of the pool; one thread at a time has it. Raises Unavailable."""
        try:
            reader = self._readers.get(timeout=10.0)
        except queue.Empty:
            raise Unavailable("too many readers of the database") from None
        try:
            yield Queries(reader)
        except sqlite3.Error as error:
            raise Unavailable(f"the database cannot be read now: {error}") from None
        finally:
            self._readers.put(reader)

    def space(self) -> list[int]:
        """Bytes: free for the database, of it, of its WAL. Raises Unavailable."""
        try:
            disk = os.statvfs(self.path)
            return [disk.f_bavail * disk.f_frsize, *(os.stat(f"{self.path}{end}").st_size for end in ("", "-wal"))]
        except OSError as error:
            raise Unavailable(f"the database cannot be looked at: {error.strerror}") from None

    def close(self) -> None:
        """After the last write. Readers that still work are waited for."""
        if self._replicated:  # the last one to close writes the WAL back and removes it, unless it may only read
            with self._writer:
                self._db.close()
        for _ in range(READERS):
            with contextlib.suppress(queue.Empty):
                self._readers.get(timeout=1.0).close()
        with self._writer:
            self._db.close()
        self._lock_file.close()


# == JobQueue ==========================================================================================================
# Owns which job ids wait for which host. Ignores SQL, models, and what is done with a job.


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Lane:
    """What waits for one host, in order of id, which is the order of creation."""

    _lock: threading.Lock
    waiting: collections.deque[tuple[str, str]] = dataclasses.field(default_factory=collections.deque)  # (job id, app)
    ticket: int = 0  # counts what a parked heartbeat should look at
    _woken: threading.Condition | None = None

    @property
    def woken(self) -> threading.Condition:
        """Parked heartbeats of this host wait here; made for the first, as most hosts of a large queue have none."""
        self._woken = self._woken or threading.Condition(self._lock)
        return self._woken

    def alert(self) -> None:
        """Wakes them all: they are one or two."""
        self.ticket += 1
        if self._woken:
            self._woken.notify_all()


class JobQueue:
    """First come, first served for each host."""

    def __init__(self) -> None:
        # Guards every lane and depth. One Condition a host on this one lock: a job wakes the heartbeats of its host and no other.
        self._lock = threading.Lock()
        self._lanes: dict[str, Lane] = {}
        self.depth = 0  # jobs in all lanes
        self.closed = False

    def _lane(self, host: str) -> Lane:
        return self._lanes.get(host) or self._lanes.setdefault(host, Lane(self._lock))

    def put(self, host: str, job_id: str, app: str) -> None:
        """A job that comes back (another attempt, a client that went away) takes its old place."""
        with self._lock:
            lane = self._lane(host)
            if lane.waiting and lane.waiting[-1][0] > job_id:
                bisect.insort(lane.waiting, (job_id, app))
            else:
                lane.waiting.append((job_id, app))
            self.depth += 1
            lane.alert()

    def load(self, host: str, entries: list[tuple[str, str]]) -> None:
        """All that waits for a host, in its order, before anybody parks."""
        with self._lock:
            self._lane(host).waiting.extend(entries)
            self.depth += len(entries)

    def remove(self, host: str, job_ids: Set[str]) -> None:
        with self._lock:
            lane = self._lane(host)
            kept = collections.deque(entry for entry in lane.waiting if entry[0] not in job_ids)
            self.depth, lane.waiting = self.depth - len(lane.waiting) + len(kept), kept

    def wake(self, host: str) -> None:
        """Something about this host has changed: parked heartbeats look again."""
        with self._lock:
            self._lane(host).alert()

    def ticket(self, host: str) -> int:
        """Taken before one looks at what take() then waits for, so that no wake() in between is missed."""
        with self._lock:
            return self._lane(host).ticket

    def holds(self, host: str) -> bool:
        """Whether a job waits for that host: a look that takes no lock."""
        lane = self._lanes.get(host)
        return lane is not None and bool(lane.waiting)

    def oldest(self, drained: Set[str]) -> str | None:
        """Of all jobs that wait, but for these hosts, the id of the one made first."""
        with self._lock:
            first = [lane.waiting[0][0] for host, lane in self._lanes.items() if lane.waiting and host not in drained]
        return min(first, default=None)

    def take(self, host: str, busy: frozenset[str] | None, ticket: int, deadline: float) -> tuple[str, str] | None:
        """The oldest (job id, app) whose app is not busy; None at the deadline (monotonic), after a wake() or at the end.
        `busy` None: wants no job, waits for a wake() alone."""
        with self._lock:
            lane = self._lane(host)
            while True:
                entry = None if self.closed or busy is None else self._pick(lane, busy)
                if entry or self.closed or lane.ticket != ticket:
                    return entry
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    return None
                lane.woken.wait(remaining)

    def _pick(self, lane: Lane, busy: frozenset[str]) -> tuple[str, str] | None:
        for index, entry in enumerate(lane.waiting):
            if entry[1] not in busy:
                del lane.waiting[index]
                self.depth -= 1
                return entry
        return None

    def close(self) -> None:
        """Parked heartbeats return, and no more park."""
        with self._lock:
            self.closed = True
            for lane in self._lanes.values():
                lane.alert()


# == EventHub ==========================================================================================================
# Owns the most recent events, in order of commit. Ignores who reads them and how they are framed.


def first_of(events: Iterable[Event], budget: int = READ_BYTES) -> tuple[list[Event], bool]:
    """About so many bytes of them, at least one, and whether there are more."""
    taken: list[Event] = []
    size = 0
    for event in events:
        if size > budget:
            return taken, True
        taken.append(event)
        size += event.size()
    return taken, False


class EventHub:
    """A window on the end of `events`: positions after `floor` up to `head`."""

    def __init__(self, position: int, max_events: int = HUB_EVENTS, max_bytes: int = HUB_BYTES):
        # Guards all below. Readers wait on it; publish(), touch() and close() wake them all.
        self._cond = threading.Condition()
        self._recent: collections.deque[Event] = collections.deque()
        self._bytes = 0
        self._max_events, self._max_bytes = max_events, max_bytes
        self.floor = self.head = position
        self.changes = 0  # how often touch() was called
        self.closed = False

    def touch(self) -> None:
        """Hosts, apps or locks have changed: what has no event, and is read anew."""
        with self._cond:
            self.changes += 1
            self._cond.notify_all()

    def publish(self, events: Iterable[Event]) -> None:
        """Those of one commit, in their order."""
        with self._cond:
            for event in events:
                self._recent.append(event)
                self._bytes += event.size()
                self.head = event.position
            while len(self._recent) > self._max_events or self._bytes > self._max_bytes:
                old = self._recent.popleft()
                self._bytes -= old.size()
                self.floor = old.position
            self._cond.notify_all()

    def since(self, position: int, timeout: float, changes: int | None = None) -> list[Event] | None:
        """Some events after the position, waiting for the first; [] after `timeout` seconds, once there are other than so many
        `changes`, or at the end; None for a reader that is behind the window and has to ask the database."""
        with self._cond:
            self._cond.wait_for(lambda: self.head > position or changes not in (None, self.changes) or self.closed, timeout)
            if position < self.floor:
                return None
            newer = list(itertools.takewhile(lambda event: event.position > position, reversed(self._recent)))
        return first_of(reversed(newer))[0]

    def close(self) -> None:
        with self._cond:
            self.closed = True
            self._cond.notify_all()


# == Metrics ===========================================================================================================
# Owns counters, histograms and their text. Ignores what is counted.

METRICS = {
    "deploybot_deployments_ended_total": "Deployments ended, by app of apps.yaml (else other) and status.",
    "deploybot_http_requests_total": "Requests answered, by method, route and status.",
    "deploybot_jobs_created_total": "Jobs created.",
    "deploybot_jobs_ended_total": "Jobs ended, by status and reason.",
    "deploybot_log_lines_total": "Log lines stored.",
    "deploybot_webhook_deliveries_total": "Deliveries to the webhook, by outcome.",
    "deploybot_deployment_duration_seconds": "From the making of a deployment to its end, by status.",
    "deploybot_http_request_duration_seconds": "From the end of a request's head to its answer, parking included.",
    "deploybot_queue_wait_seconds": "How long a job waited in the queue for its agent.",
    "deploybot_queue_jobs": "Jobs that wait for an agent.",
    "deploybot_queue_oldest_job_age_seconds": "Age of the oldest of them whose host is not drained; 0 without one.",
    "deploybot_running_jobs": "Jobs that an agent holds.",
    "deploybot_agents_online": "Agents with contact within --agent-timeout.",
    "deploybot_agents_registered": "Agents registered.",
    "deploybot_agents_oldest_contact_age_seconds": "Since the last contact of the agent that is silent for longest; drained hosts aside.",
    "deploybot_disk_free_bytes": "Free for the controller on the file system of the database.",
    "deploybot_database_size_bytes": "Size of the database.",
    "deploybot_database_wal_size_bytes": "Size of its write-ahead log.",
    "deploybot_http_connections": "Open connections.",
    "deploybot_uptime_seconds": "Seconds since the start.",
}
# Upper ends in seconds: of a request, milliseconds to a parked heartbeat; of waiting, a parked agent to one that is off for a night.
BUCKETS: dict[str, tuple[float, ...]] = {
    "deploybot_deployment_duration_seconds": (1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 14_400),
    "deploybot_http_request_duration_seconds": (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30),
    "deploybot_queue_wait_seconds": (0.1, 1, 5, 15, 60, 300, 900, 3600, 14_400, 43_200),
}
Labels = str | tuple[str, str, int]  # as they stand in the text; of a request, its method, route and status


def samples(name: str, labels: str, value: Any) -> Iterator[str]:
    """Of a histogram `value` is a list: how many in each bucket, how many beyond, and the sum of all."""
    words = f"{{{labels}}}" if labels else ""
    if not isinstance(value, list):
        yield f"{name}{words} {value:.15g}"
        return
    begin, count = f"{name}_bucket{{{labels}{',' if labels else ''}le=", 0
    for end, more in zip((*BUCKETS[name], "+Inf"), value, strict=False):
        count += more
        yield f'{begin}"{end}"}} {count}'
    yield from (f"{name}_sum{words} {value[-1]:.15g}", f"{name}_count{words} {count}")


class Metrics:
    """In Prometheus's text format (https://prometheus.io/docs/instrumenting/exposition_formats/). Labels are our own words only."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards both
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self._tallies: dict[tuple[str, Labels], list[float]] = {}

    def count(self, name: str, labels: str = "", by: int = 1) -> None:
        with self._lock:
            self._counts[name, labels] += by

    def observe(self, name: str, labels: Labels, seconds: float) -> None:
        """With requests by status, text() counts them as well: each of them pays for one look-up."""
        ends = BUCKETS[name]
        with self._lock:
            tally = self._tallies.get((name, labels)) or self._tallies.setdefault((name, labels), [0] * (len(ends) + 2))
            tally[bisect.bisect_left(ends, seconds)] += 1
            tally[-1] += seconds

    def text(self, gauges: Mapping[str, float]) -> str:
        with self._lock:
            told: dict[tuple[str, str], Any] = dict(self._counts)
            tallies = [(key, list(tally)) for key, tally in self._tallies.items()]
        for (name, labels), tally in tallies:
            words = labels if isinstance(labels, str) else 'method="{}",route="{}"'.format(*labels)
            if words != labels:
                told["deploybot_http_requests_total", f'{words},status="{labels[2]}"'] = sum(tally[:-1])
            told[name, words] = [*map(sum, zip(told.get((name, words), [0] * len(tally)), tally, strict=True))]
        lines: dict[str, list[str]] = collections.defaultdict(list)
        for (name, words), value in (*sorted(told.items()), *(((name, ""), value) for name, value in gauges.items())):
            lines[name] += samples(name, words, value)
        for name, some in lines.items():
            kind = "histogram" if name in BUCKETS else "gauge" if name in gauges else "counter"
            some[:0] = f"# HELP {name} {METRICS[name]}", f"# TYPE {name} {kind}"
        return "\n".join(itertools.chain.from_iterable(lines.values())) + "\n"


# == Auth ==============================================================================================================
# Owns who a token is. Ignores what a principal then does.

NO_TOKEN = "this call needs a token: Authorization: Bearer TOKEN (ctl.py login, or DEPLOYBOT_TOKEN in its environment; with --open, calls to localhost need none)"
COOKIE = "deploybot_session"
COOKIE_VALUE = re.compile(rf"(?:\A|;)[ \t]*{COOKIE}=([\w-]{{1,128}})(?:;|\Z)", re.ASCII)
TAKEN_NAMES = ("admin", "agents", "reader", "local", "github", "controller")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def bearer_token(headers: Mapping[str, str]) -> str | None:
    """Of RFC 6750. Raises Unauthorized for credentials of another kind."""
    kind, _, token = headers.get("authorization", "").partition(" ")
    if kind.lower() not in ("", "bearer"):
        raise Unauthorized(NO_TOKEN)
    return token.strip() if kind else None


class RateLimit:
    """At most so many events a minute for each key, counted in minutes that begin with the first."""

    def __init__(self, limit: int, clock: Clock):
        self._limit, self._clock = limit, clock
        self._lock = threading.Lock()  # guards _minutes
        self._minutes: dict[str, tuple[float, int]] = {}  # key to (end of its minute, events); the oldest first

    def add(self, key: str, what: str) -> None:
        """Raises TooMany."""
        now = self._clock.monotonic()
        with self._lock:
            end, count = self._minutes.get(key, (0.0, 0))
            if now >= end:
                self._minutes.pop(key, None)
                end, count = now + 60.0, 0
            if key not in self._minutes and len(self._minutes) >= MAX_RATE_KEYS:
                self._minutes.pop(next(iter(self._minutes)))
            self._minutes[key] = end, count + 1
        if count >= self._limit:
            raise TooMany(f"more than {self._limit} {what} in a minute", retry_after=math.ceil(end - now))


def network_of(address: str) -> str:
    """What one caller has for sure: an IPv4 address, or the /64 of an IPv6 one."""
    return ":".join(ipaddress.IPv6Address(address.partition("%")[0]).exploded.split(":")[:4]) if ":" in address else address


def new_secret() -> str:
    return "dbt_" + secrets.token_urlsafe(32)


class Auth:
    """Tokens (RFC 6750) to principals. All are known by their SHA-256, in memory, so a look-up tells nothing by its time and
    asks no database; those made over the API stand in `tokens` as well."""

    def __init__(self, tokens: Mapping[str, Principal], is_open: bool, hosts: Mapping[str, Principal], store: Store, clock: Clock):
        self._configured = {sha256(token): principal for token, principal in tokens.items()}
        self._open, self._hosts, self._store, self._clock = is_open, hosts, store, clock
        self._failed = RateLimit(MAX_FAILED_SIGN_INS, clock)
        self._new_id = TimeOrderedIds(clock, None)
        # By SHA-256. Changed after a commit alone, by the thread that holds Store._writer; read without a lock.
        with store.read() as db:
            self._tokens = {token.sha256: token for token in db.tokens()}
        self._used: set[str] = set()  # SHA-256 of tokens whose last use is not in the database yet
        self._flushed = clock.monotonic()

    # -- who asks ------------------------------------------------------------------------------------------------------

    def principal(self, headers: Mapping[str, str], address: str, is_local: Callable[[], bool]) -> Principal:
        """Raises Unauthorized, and TooMany where too many tokens from that address were none. A token that is sent counts,
        also where none is needed."""
        token = bearer_token(headers)
        if token is not None:
            return self.of_token(token, address)
        found = COOKIE_VALUE.search(headers.get("cookie", ""))
        session = self._tokens.get(sha256(found[1])) if found else None
        principal = self.find(session.sha256) if session and session.parent else None  # not any token: only what sign_in() made
        if principal or (self._open and is_local()):
            return (principal or Principal("local", Scope.ADMIN))._replace(address=address)
        raise Unauthorized(NO_TOKEN)

    def of_token(self, token: str, address: str) -> Principal:
        """As principal(). The answer is the same for a token that never was, that ran out and that was revoked."""
        principal = self.find(sha256(token))
        if principal is None:
            self._failed.add(network_of(address), "tokens from your address were not valid")
            log.warning("a token that is not valid came from %s", address)
            raise Unauthorized("this token is not valid (any more)")
        return principal._replace(address=address)

    def find(self, digest: str) -> Principal | None:
        """Whose token has this SHA-256, if it counts now; to ask is to use it."""
        principal = self._known(digest)
        if principal and principal.digest:
            self._used.add(digest)
        return principal

    def _known(self, digest: str) -> Principal | None:
        principal = self._configured.get(digest) or self._hosts.get(digest)  # as nearly always
        if principal is None and (token := self._tokens.get(digest)) and self._counts(token):
            principal = token.principal()
        return principal

    def _counts(self, token: Token) -> bool:
        in_time = token.expires_at is None or token.expires_at > self._clock.stamp()
        return in_time and (token.parent is None or self._known(token.parent) is not None)

    def still(self, principal: Principal) -> bool:
        """Whether the token that was good when a long call began still is."""
        return not principal.digest or self._known(principal.digest) is not None

    def expiry(self, principal: Principal) -> str | None:
        token = self._tokens.get(principal.digest)
        return token.expires_at if token else None

    # -- tokens --------------------------------------------------------------------------------------------------------

    def tokens(self) -> list[Token]:
        """Oldest first, without the sign-ins of browsers."""
        return sorted(token for token in list(self._tokens.values()) if token.parent is None)

    def create(self, asked: TokenRequest, by: Principal) -> tuple[Token, str]:
        """The new token, and its secret, which is told this once. Raises Conflict for a name in use."""
        return self._store.write(lambda tx: self._add(tx, asked, by))

    def sign_in(self, text: str, address: str) -> tuple[Token, str]:
        """A token of its own for a browser, and its secret. Raises Forbidden for the tokens of agents."""
        by = self.of_token(text, address)
        if not by.may(Scope.VIEWER):
            raise Forbidden(f"a token of the role {by.scope} cannot sign in")
        used = self._tokens.get(sha256(text))
        parent = used.parent if used and used.parent else sha256(text)

        def do(tx: Tx) -> tuple[Token, str]:
            for older in sorted(one for one in self._tokens.values() if one.parent == parent)[: 1 - MAX_SESSIONS]:
                self._remove(tx, older, by, "session.end")
            return self._add(tx, TokenRequest(by.scope, None, None, by.app, SESSION_LIFETIME), by, parent)

        return self._store.write(do)

    def _add(self, tx: Tx, asked: TokenRequest, by: Principal, parent: str | None = None) -> tuple[Token, str]:
        """As create(); with a `parent` it is a sign-in, which ends with the token of `by` at the latest."""
        new, secret, now = self._new_id(), new_secret(), self._clock.stamp()
        name = asked.name or (f"session-{new}" if parent else f"{asked.role}-{new[-6:]}")
        if name in TAKEN_NAMES or any(name == other.name for other in tx.tokens()):
            raise Conflict(f"there is a token named {name}: choose another name, or revoke that one first")
        own = None if asked.expires_in is None else self._clock.stamp(ago=-asked.expires_in)
        ends = min(filter(None, (own, self.expiry(by) if parent else None)), default=None)
        token = Token(new, name, asked.role, asked.host, asked.app, sha256(secret), parent, now, by.name, ends, None)
        only = f" for {asked.host or asked.app}" if asked.host or asked.app else ""
        action, detail = ("session.create", "") if parent else ("token.create", f"{asked.role}{only}, expires {ends or 'never'}")
        tx.add("tokens", *token)
        tx.audited(now, by, action, name, detail)
        tx.after(self._tokens.__setitem__, token.sha256, token)
        return token, secret

    def revoke(self, token_id: str, by: Principal) -> Token:
        """Raises NotFound."""
        token = next((token for token in list(self._tokens.values()) if token.id == token_id), None)
        if token is None or not self._store.write(lambda tx: self._remove(tx, token, by, "token.revoke")):
            raise NotFound(f"no token {token_id[:100]}")
        return token

    def sign_out(self, by: Principal) -> None:
        token = self._tokens.get(by.digest)
        if token and token.parent:
            self._store.write(lambda tx: self._remove(tx, token, by, "session.end"))

    def _remove(self, tx: Tx, token: Token, by: Principal | None, action: str = "") -> bool:
        """With the sign-ins made with it. False where it has just ended. `by` None: it ran out, which nobody did."""

        def forget() -> None:
            for other in [other for other in self._tokens.values() if token.sha256 in (other.sha256, other.parent)]:
                del self._tokens[other.sha256]

        tx.after(forget)
        is_there = tx.remove("tokens", "parent", token.sha256) + tx.remove("tokens", "sha256", token.sha256) > 0
        if is_there and by:
            tx.audited(self._clock.stamp(), by, action, token.name)
        return is_there

    def sweep(self, every: float = FLUSH_INTERVAL) -> None:
        """Every so many seconds: which tokens were used, and an end for the sign-ins that ran out."""
        if self._clock.monotonic() - self._flushed < every:
            return
        self._flushed = self._clock.monotonic()
        used, self._used = self._used, set()
        at = self._clock.stamp()
        over = [token for token in list(self._tokens.values()) if token.parent and not self._counts(token)]

        def remember() -> None:
            for digest in used & self._tokens.keys():
                self._tokens[digest] = self._tokens[digest]._replace(last_used_at=at)

        def do(tx: Tx) -> None:
            tx.each("tokens", "last_used_at", "sha256", [(at, digest) for digest in used])
            tx.after(remember)
            for token in over:
                self._remove(tx, token, by=None)

        if used or over:
            self._store.write(do, patient=True)


def is_loopback(address: str) -> bool:
    name = re.sub(r":[0-9]*\Z", "", address) if address.startswith("[") or address.count(":") == 1 else address
    name = name.strip("[]").lower()
    with contextlib.suppress(ValueError):
        found = ipaddress.ip_address(name)
        return (getattr(found, "ipv4_mapped", None) or found).is_loopback
    return name == "localhost" or name.endswith(".localhost")


def is_from_here(peer: str, headers: Mapping[str, str]) -> bool:
    """True for a request of this machine itself: no proxy, no name that DNS could point here, no other site's page."""
    host = headers.get("host", "")
    return (
        is_loopback(peer)
        and is_loopback(host)
        and not any(name in ("forwarded", "via", "x-real-ip") or name.startswith("x-forwarded-") for name in headers)
        and headers.get("origin", f"http://{host}") == f"http://{host}"
        and headers.get("sec-fetch-site", "none") in ("none", "same-origin")
    )


def first_token(path: pathlib.Path) -> str:
    """The admin token in that file; without the file, one is made, 0600 from its first moment. Raises StartError."""
    try:
        if path.exists():
            return bearer(path.read_text(encoding="utf-8").strip())
        token = new_secret()
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(token + "\n")
    except (OSError, ValueError) as error:
        raise StartError(f"{path}: {error}; delete it, and the next start makes a new one") from None
    log.warning("no DEPLOYBOT_TOKEN is set: a token for everything is now in %s", path)
    return token


# == Webhooks ==========================================================================================================
# Owns signatures and push events of GitHub, Gitea, Forgejo and Gogs. Ignores jobs: which apps there are is passed in.

SIGNATURES = ("x-hub-signature-256", "x-gitea-signature", "x-forgejo-signature", "x-gogs-signature")
SENDERS = ("github", "gitea", "forgejo", "gogs")  # Gitea and Forgejo send the headers of the others, too
MAX_COMMITS = 2048  # that GitHub lists of one push
# Why a push does not deploy an app, in the order in which they are looked at.
RULES = {
    "deleted": "the ref was deleted",
    "not_on_push": "deploy_on_push is off",
    "ref": "neither branches nor tags name {ref}",
    "skip": "its message says [skip deploy]",
    "paths": "it changes nothing that paths and ignore_paths leave",
    "older": "a newer push to {ref} was taken before",
    "no_host": "it has no host now",
    "duplicate": "the same deployment is under way",
    "locked": "it is locked: this is held until that ends",
    "deployed": "its jobs were made",
    "no_app": "no app of apps.yaml has the repository {repo}",
    "wrong_secret": "it is signed with another secret than those of the apps of {repo}",
}


def signature_of(secret: str, body: bytes) -> str:
    """X-Hub-Signature-256: https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries"""
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def signature_in(headers: Mapping[str, str]) -> str:
    """The signature in the form of GitHub, whatever header brings it, so that a body that was seen before is known by it; "" where
    there is none. Several must be the same, and none is passed over for being empty: if one decided, then who can set a header on the
    way could choose which one is looked at."""
    given = {("" if name == SIGNATURES[0] else "sha256=") + headers[name] for name in SIGNATURES if name in headers}
    signature = given.pop() if len(given) == 1 else ""
    return signature if re.fullmatch("sha256=[0-9a-f]{64}", signature) else ""


def sent(headers: Mapping[str, str], what: str, default: str) -> str:
    """The `event` or the `delivery`, by the name that the first of SENDERS has for it. It is not signed."""
    return next((headers[f"x-{name}-{what}"] for name in SENDERS if headers.get(f"x-{name}-{what}")), default)


def secrets_in(setting: str | None) -> tuple[str, ...]:
    """One secret, or two with a comma while one is being replaced."""
    return tuple(secret.strip() for secret in (setting or "").split(",") if secret.strip())


def signers_of(body: bytes, signature: str, known: Iterable[str]) -> frozenset[str]:
    """Those of the secrets that the body was signed with; all are tried, so the time tells nothing."""
    given = signature.encode("utf-8", "replace")
    return frozenset(secret for secret in known if hmac.compare_digest(signature_of(secret, body).encode(), given))


def said(data: Any, name: str, limit: int) -> str:
    """A text that is nice to have: cut, and empty where it is missing."""
    value = data.get(name) if isinstance(data, dict) else None
    return value[:limit] if isinstance(value, str) else ""


def segment_expression(segment: str) -> str:
    """Of what stands between two slashes. It matches in one way or none, so nothing is tried twice."""
    first, *rest = ["".join("[^/]" if char == "?" else re.escape(char) for char in part) for part in re.split(r"\*+", segment)]
    inner = "".join(f"(?>[^/]*?{part})" for part in rest[:-1])
    return first + inner + (f"[^/]*{rest[-1]}(?![^/])" if rest else "")


def path_expression(pattern: str) -> str:
    """** is any folders, or none; at the end, all that is in the folder. What stands behind it is looked for from the left, and where
    it is found first no later place could be better: the time is proportional to the length of the path, whatever that is."""
    runs = re.split(r"(?:^|/)\*\*(?:/\*\*)*(?:/|$)", pattern)
    first, *others = ["/".join(map(segment_expression, run.split("/"))) if run else "" for run in runs]
    if not others:
        return first
    *middle, last = others
    found = "".join(f"(?>(?:[^/]*+/)*?{run}/)" for run in middle)
    return (f"{first}/" if first else "") + found + (f"(?:[^/]*+/)*?{last}" if last else ".+")


@functools.lru_cache(maxsize=1024)
def path_form(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """What fullmatch()es a path that one of the patterns names."""
    return re.compile("|".join(map(path_expression, patterns)), re.DOTALL)


def changed_files(data: Any) -> frozenset[str] | None:
    """What the commits of a push added, removed and modified; None where that may not be all. GitHub says `forced` and `created`, ends
    its list at MAX_COMMITS and leaves out the files of a huge commit. Gitea and Forgejo list a few commits and say how many there
    were (`total_commits`); Gogs lists a few and does not."""
    commits, total, is_new = data.get("commits"), data.get("total_commits"), set(said(data, "before", 64)) <= {"0"}
    if type(commits) is not list or is_new or data.get("forced") or data.get("created"):
        return None
    if len(commits) != total if type(total) is int else type(data.get("forced")) is not bool or len(commits) >= MAX_COMMITS:
        return None
    found: set[str] = set()
    for commit in commits:
        lists = [commit.get(name) or [] for name in ("added", "removed", "modified")] if isinstance(commit, dict) else []
        if not any(lists) or not all(type(paths) is list and all(type(path) is str for path in paths) for paths in lists):
            return None
        found.update(*lists)
    return frozenset(found) or None


def push_of(data: Any, kind: str) -> Any:
    """The push that an event tells of, or None. Gogs tells of a new tag by `create` alone; `sha` and `default_branch` stand in
    no other's, whose same tag comes as a push as well. https://gogs.io/advancing/webhooks"""
    if kind == "push":
        return data
    if not isinstance(data, dict) or said(data, "ref_type", 8) != "tag" or not (data.get("sha") and data.get("default_branch")):
        return None
    about, pusher = data.get("repository"), data.get("sender")
    return {"ref": f"refs/tags/{said(data, 'ref', 255)}", "after": data["sha"], "repository": about, "pusher": pusher}


class Push(NamedTuple):
    """What a push event says: https://docs.github.com/en/webhooks/webhook-events-and-payloads#push, and the like of
    https://docs.gitea.com/usage/webhooks, https://forgejo.org/docs/latest/user/webhooks and https://gogs.io/advancing/webhooks"""

    repo: str
    branch: str | None  # None: not a branch
    tag: str | None  # None: not a tag
    commit: str | None  # None: the ref was deleted
    message: str
    pusher: str
    default_branch: str | None
    ref: str
    before: str  # the commit that the ref named before
    pushed_at: int | None  # Unix time
    files: frozenset[str] | None  # that it changed; None: not known
    is_skipped: bool  # its message says so

    @classmethod
    def parse(cls, data: Any) -> Push:
        f = Fields(data)
        ref = f.take("ref", str, "a string", True) or ""
        about = f.take("repository", dict, "an object", True) or {}
        repository = Fields(about, prefix="repository.")
        repo = repository.text("full_name", is_repo, required=True)
        f.errors += repository.errors
        branch, tag = (ref.removeprefix(kind) if ref.startswith(kind) else None for kind in ("refs/heads/", "refs/tags/"))
        if any(name is not None and is_ref(name) for name in (branch, tag)):
            f.wrong("ref", "must be a ref as git names them")
        after = None if f.boolean("deleted") else f.text("after", matches(COMMIT, "a commit"), required=True)
        head = cls.head_of(data, after)
        if after and tag and COMMIT.fullmatch(said(head, "id", 64)):  # `after` may be the tag's own object
            after = head["id"]
        commit = None if after is None or set(after) == {"0"} else after
        message, by = said(head, "message", MAX_PUSH), data.get("pusher")
        pusher = said(by, "name", 100) or said(by, "login", 100) or said(by, "username", 100)
        default, at, before = said(about, "default_branch", 255) or None, about.get("pushed_at"), said(data, "before", 64)
        what = (repo, branch, tag, commit, message[:1000], pusher, default, ref[:255], before, at if type(at) is int else None)
        return f.done(cls(*what, changed_files(data), "[skip deploy]" in message.lower()))

    @staticmethod
    def head_of(data: Any, after: str | None) -> Any:
        """The commit that the ref names now: Gogs has it only among the others."""
        commits = data.get("commits")
        listed = [one for one in commits if said(one, "id", 64) == after] if type(commits) is list else []
        return data.get("head_commit") or (listed[0] if listed else None)

    def is_older(self, newest: tuple[int | None, str] | None) -> bool:
        """Than the newest push that was taken of this ref: GitHub's deliveries come in any order."""
        if newest is None:
            return False
        pushed_at, before = newest
        if pushed_at is not None and self.pushed_at is not None and pushed_at != self.pushed_at:
            return self.pushed_at < pushed_at
        return before == self.commit  # the one that was taken came after this one

    def is_named(self, app: App) -> bool:
        """By `branches` or `tags`; with neither, the default branch is."""
        if self.tag is not None:
            return any(fnmatch.fnmatchcase(self.tag, pattern) for pattern in app.tags)
        if self.branch is None or (app.branches is None and app.tags):
            return False
        if app.branches is None:
            return self.branch in ((self.default_branch,) if self.default_branch else ("main", "master"))
        return any(fnmatch.fnmatchcase(self.branch, pattern) for pattern in app.branches)  # * matches a slash, too

    def is_touching(self, app: App) -> bool:
        files = self.files
        if files is None:
            return True
        is_in = not app.paths or any(map(path_form(app.paths).fullmatch, files))
        return is_in and not (app.ignore_paths and all(map(path_form(app.ignore_paths).fullmatch, files)))

    def rule(self, app: App) -> str:
        """The first of RULES that keeps it from the app, or "" where it is to be deployed."""
        if self.commit is None:
            return "deleted"
        if not app.deploy_on_push:
            return "not_on_push"
        if not self.is_named(app):
            return "ref"
        if self.is_skipped:
            return "skip"
        return "" if self.is_touching(app) else "paths"

    def words(self, rule: str) -> str:
        return RULES[rule].format(ref=self.branch or self.tag or self.ref, repo=self.repo)

    def metadata(self, app: App) -> dict[str, Any]:
        told = {"app": app.name, "branch": self.branch, "commit_message": self.message, "pusher": self.pusher}
        return {**told, **({"tag": self.tag} if self.tag else {}), "trigger": "github_webhook"}


def push_payload(body: bytes, content_type: str) -> Any:
    """JSON, or a form whose field `payload` is JSON. Raises Malformed."""
    if content_type.partition(";")[0].strip().lower() == "application/x-www-form-urlencoded":
        try:
            fields = urllib.parse.parse_qs(body.decode("ascii"), strict_parsing=True, max_num_fields=16)
            return load_json(fields["payload"][0].encode())
        except (ValueError, KeyError):
            raise Malformed("the form has no field `payload`") from None
    return load_json(body)


# == Jobs ==============================================================================================================
# Owns the use cases of jobs and agents; joins Store, JobQueue and EventHub. Ignores HTTP and argv.

Connected = Callable[[], bool]  # whether the client is still there
ALTHOUGH = ", although it is locked"  # of what the audit says
NOTHING_YET = (None,) * (Job._fields.index("retry_of") - Job._fields.index("started_at"))  # of a job that has not run


def release(version: Any) -> tuple[int, ...]:
    """(1, 2, 3) of 1.2.3, () of what is no such version."""
    found = re.fullmatch(r"([0-9]{1,6})\.([0-9]{1,6})\.([0-9]{1,6})", version) if isinstance(version, str) else None
    return tuple(map(int, found.groups())) if found else ()


class Draft(NamedTuple):
    """A job that is asked for, without its id: made by each caller before the commit that all share."""

    job: Job
    text: str  # its public JSON
    key: int  # key_of() it


class Terms(NamedTuple):
    """What a deployment says of its jobs."""

    deployment_id: str | None = None
    hold: Hold | None = None
    reuses: bool = False  # the release that the host still has


ALONE = Terms()
REUSES = ',"reuse":true}'  # how the spec of a job that goes back ends


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Lease:
    """A running job, in memory."""

    job_id: str
    host: str
    app: str
    attempt: int
    session: str | None
    since: float  # monotonic: when it was claimed, or the controller started
    deadline: float  # monotonic: when the controller ends it itself
    cancel: bool = False
    answered: int | None = None  # tick of Jobs at which the answer that carried it was written


def key_of(repo: str, ref: str, host: str, app: str) -> int:
    """The same for the same deployment; two others may, rarely, share one."""
    return hash((repo.lower(), ref, host, app))


def check_unlocked(tx: Tx, app: str) -> None:
    """Raises Conflict."""
    if lock := tx.lock_of(app):
        raise Conflict(f"{lock}: unlock it first (ctl.py unlock --app {lock.app})")


def what_of(job: Job) -> str:
    return f"{job.app} {job.ref} on {job.host}"


def in_words(job: Job) -> str:
    """`failed (exit_code 1)`, `running (attempt 2)`, `pending`."""
    if job.status == Status.RUNNING:
        return f"running (attempt {job.attempt})"
    code = f" {job.exit_code}" if job.reason == Reason.EXIT_CODE and job.exit_code is not None else ""
    return f"{job.status} ({job.reason}{code})" if job.reason and job.reason != job.status else job.status


class Jobs:
    """Every public method is a use case: it raises what Errors has, and returns after what it did is durable. Those that take a
    transaction are parts of one, which Deployments shares."""

    def __init__(self, store: Store, queue: JobQueue, hub: EventHub, apps: Apps, metrics: Metrics, config: Config, clock: Clock):
        self.store, self.queue, self.hub, self.apps, self.metrics = store, queue, hub, apps, metrics
        self.config, self.clock = config, clock
        store.announce = hub.publish
        self.moved: Callable[[Tx, Job, Job], None] = lambda tx, before, after: None  # told of each change of a deployment's job
        self.locks: dict[str, Lock] = {}  # app to its lock; changed by effects, as the seven below
        # The seven below are changed by effects of transactions alone, so by one thread at a time, the one that holds Store._writer;
        # read without a lock, by single look-ups and list().
        self._agents: dict[str, Agent] = {}  # by id
        self._by_host: dict[str, Agent] = {}
        self.by_secret: dict[str, Principal] = {}  # SHA-256 of a host's own secret to whom it stands for
        self._leases: dict[str, dict[str, Lease]] = {}  # host to job id to lease
        self._open: dict[int, tuple[str, ...]] = {}  # key_of() a deployment to ids of its pending and running jobs, oldest first
        self._open_on: collections.Counter[str] = collections.Counter()  # host to how many of these
        self._changes = 0  # of which hosts there are in the two above: counted after each
        self._lock = threading.Lock()  # guards Lease.answered: of two heartbeats one gets the job again
        self._flushed = self._retention_due = clock.monotonic()
        self._ticks = itertools.count(1)  # orders the coming of heartbeats and the writing of answers
        self._retained = ""  # the last job that the walk over the old ones looked at
        self._seen: set[str] = set()  # ids of agents whose contact is not in the database yet
        with store.read() as db:
            self._new_id = TimeOrderedIds(clock, db.last_id("jobs"))
            self.epoch = db.meta("epoch")
            self.removed_through = int(db.meta("removed_through"))

    # -- start ---------------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Rebuilds memory from the database: agents, leases, which start anew, and the queue in its old order."""
        with self.store.read() as db:
            copied_at = db.meta("copied_at")
        if copied_at:
            self.store.write(functools.partial(self._begin_anew, copied_at=copied_at))
            log.warning("this is the backup of %s: a new epoch begins, jobs that waited are cancelled", copied_at)
        with self.store.read() as db:
            self.locks = {lock.app: lock for lock in db.locks()}
            for agent in db.agents():
                agent.contact = self.clock.monotonic() - max(0.0, self.clock.now() - unix_time(agent.last_heartbeat))
                self._remember(agent)
            for job in db.jobs_that_are(Status.RUNNING):
                self._lease(job, answered=0)
                self._opened(key_of(job.repo, job.ref, job.host, job.app), job.host, job.id)
            waiting: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
            opened = self._open
            for job_id, repo, ref, host, app, is_held in db.pending():  # of which there may be very many
                key = key_of(repo, ref, host, app)
                opened[key] = (*opened[key], job_id) if key in opened else (job_id,)
                if is_held:
                    self._open_on[host] += 1
                else:
                    waiting[host].append((job_id, sys.intern(app)))
        for host, entries in waiting.items():
            self._open_on[host] += len(entries)
            self.queue.load(host, entries)

    def _begin_anew(self, tx: Tx, copied_at: str) -> None:
        """A copy is served for the first time: no position, attempt or session that came after it was made is given out again."""
        error = f"the database was restored from the backup of {copied_at}"
        self.end_pending(tx, tx.jobs_that_are(Status.PENDING), Reason.CANCELLED, error)
        self.epoch = secrets.token_hex(4)
        tx.begin_epoch(self.epoch)

    # -- agents --------------------------------------------------------------------------------------------------------

    def register(self, asked: Registration, principal: Principal, secret: str | None = None) -> Agent:
        """A new session for that host; its id stays. Raises Conflict where another secret is bound to the host.
        `secret`: one that the controller made for it, where the agent makes none."""
        if principal.host is not None:
            principal.speaks_for(asked.hostname)

        def do(tx: Tx) -> Agent:
            old = tx.agent_of(asked.hostname)
            bound = old.token_sha256 if old else None
            enrols = principal.scope is Scope.AGENT and not principal.is_own
            known = asked.token_sha256 == bound or (asked.token_sha256 is None and principal.host is not None)
            if enrols and bound and not known:
                cure = f"start the agent with its old working directory, or run ctl.py hosts reset {asked.hostname}"
                raise Conflict(f"{asked.hostname} is registered with a secret of its own: {cure}")
            if any(other.hostname != asked.hostname for other in tx.agents("token_sha256 = ?", asked.token_sha256)):
                raise Conflict("token_sha256 belongs to another host: each host makes a secret of its own")
            now = self.clock.stamp()
            before = old or Agent(self._new_id(), asked.hostname, "", 1, "", 0, None, now, now)
            digest = asked.token_sha256 or (sha256(secret) if secret else bound)
            agent = dataclasses.replace(before, capabilities=dump(asked.capabilities), slots=asked.slots, token_sha256=digest)
            agent.session, agent.last_heartbeat, agent.contact = secrets.token_hex(16), now, self.clock.monotonic()
            tx.put("agents", *agent.row())
            if old is None or agent.token_sha256 != bound:
                tx.audited(now, principal, "host.enrol", agent.hostname)
            tx.after(self._remember, agent)
            tx.after(self.hub.touch)
            tx.after(self.queue.wake, agent.hostname)  # a parked heartbeat of the older session learns of the newer
            return agent

        agent = self.store.write(do)
        log.info("agent of %s registered", agent.hostname)
        return agent

    def heartbeat(self, agent_id: str, beat: Heartbeat, by: Principal, connected: Connected) -> tuple[Job | None, list[str], int]:
        """(a job or None, ids of jobs to stop, seconds to the next call); renews the agent's leases, parks for `beat.wait` seconds.
        `connected` says whether the client is still there; a call whose client has gone claims nothing.
        Raises NotFound (register again) and Conflict (a newer session has this host)."""
        arrived = next(self._ticks)
        agent = self._agents.get(agent_id) or self._agent(agent_id)
        if by.host != agent.hostname:
            by.speaks_for(agent.hostname)
        if beat.session != agent.session or not agent.session:
            self._check_session(agent, beat.session)
        # A heartbeat that was held up until its client went may come behind the farewell.
        agent.online = beat.status == "online" and (agent.online or connected())
        agent.contact = self.clock.monotonic()
        self._seen.add(agent_id)
        if beat.current and beat.current != agent.runs:
            self._note_runs(agent, beat.current)
        interval = 0 if beat.wait and agent.online else max(POLL_INTERVAL, len(self._agents) // POLLS)
        if not (beat.wait or beat.running or self._leases.get(agent.hostname) or self.queue.holds(agent.hostname)):
            agent.told = frozenset()
            return None, [], interval  # nothing runs there, nothing waits for it: what nearly every call finds
        # To park for longer than contact may be missing would make a healthy agent look lost.
        deadline = time.monotonic() + min(beat.wait, self.config.agent_timeout / 2, self.config.lost_after / 2)
        if beat.running is not None:
            self._settle(agent, beat)
        job, again = None, agent.online
        while again:
            job, again = self._look(agent, beat, arrived, deadline, connected)
        agent.told, agent.contact = self._stops(agent, beat), self.clock.monotonic()
        if self.queue.closed:  # the controller stops: agents come back one by one
            interval = secrets.randbelow(1 + len(self._agents) // RETURNS)
        return job, sorted({job_id for job_id, _ in agent.told}), interval

    def _note_runs(self, agent: Agent, runs: dict[str, str]) -> None:
        def do(tx: Tx) -> None:
            tx.each("agents", "current", "id", [(dump(runs), agent.id)])
            tx.after(setattr, agent, "runs", runs)

        self.store.write(do)

    def runs(self, host: str, app: str) -> str | None:
        """The commit that the host says it runs."""
        agent = self._by_host.get(host)
        return agent.runs.get(app) if agent else None

    def _look(self, agent: Agent, beat: Heartbeat, arrived: int, deadline: float, connected: Connected) -> tuple[Job | None, bool]:
        """One look at what there is for the agent, parked until there may be something: (a job or None, whether to look again)."""
        ticket = self.queue.ticket(agent.hostname)  # before all else that is looked at
        agent = self._current(agent.id, beat)
        job = self._undelivered(agent, beat, arrived)
        untold = self._stops(agent, beat) - agent.told
        if job or untold:  # what it is to stop is told at once; but once, or the agent would spin
            return job, False
        entry = self.queue.take(agent.hostname, self._busy(agent, beat), ticket, deadline)
        job = self._try(agent, entry, connected) if entry else None
        in_time = entry is not None or time.monotonic() < deadline
        return job, job is None and in_time and connected() and not self.queue.closed

    def delivered(self, job: Job) -> None:
        """The answer that carries this job was written, or could not be: from now on a heartbeat without it asks for it again."""
        with self._lock:
            lease = self._leases.get(job.host, {}).get(job.id)
            if lease and lease.attempt == job.attempt:
                lease.answered = next(self._ticks)

    def heard(self, by: Principal) -> None:
        """A host has called, be it in vain: it is not lost."""
        if by.host in self._by_host:
            self._by_host[by.host].contact = self.clock.monotonic()

    def _agent(self, agent_id: str) -> Agent:
        agent = self._agents.get(agent_id)
        if agent is None:
            raise NotFound(f"no agent {agent_id[:100]}: register again")
        return agent

    def _current(self, agent_id: str, beat: Heartbeat) -> Agent:
        """The agent as registered last. Raises as _check_session()."""
        agent = self._agent(agent_id)
        self._check_session(agent, beat.session)
        return agent

    def _check_session(self, agent: Agent, session: str | None) -> None:
        """Raises NotFound, and Conflict where this call speaks for an older session."""
        if not agent.session:
            raise NotFound(f"{agent.hostname} has no session any more: register again")
        if session not in (None, agent.session):
            raise Conflict(f"a newer agent has registered as {agent.hostname}: this one is to end")

    def _leases_of(self, host: str) -> list[Lease]:
        return list(self._leases.get(host, {}).values())

    def _settle(self, agent: Agent, beat: Heartbeat) -> None:
        """What an older session ran: goes on where the agent still holds it, else it has crashed with the agent."""
        session = self._current(agent.id, beat).session
        for lease in self._leases_of(agent.hostname):
            if (lease.job_id, lease.attempt) in (beat.running or ()):
                lease.session = session
            elif lease.session != session:
                error = "the agent was restarted and knows nothing of this job"
                self._close(lease, Status.FAILED, Reason.AGENT_CRASHED, error, may_retry=True)

    def _undelivered(self, agent: Agent, beat: Heartbeat, arrived: int) -> Job | None:
        """A job whose answer got lost on its way: claimed by this session, answered before this call came, and not held."""
        if beat.running is None:
            return None
        for lease in self._leases_of(agent.hostname):
            held = (lease.job_id, lease.attempt) in beat.running
            if held or lease.answered is None or lease.answered > arrived:
                continue
            if lease.cancel:  # it never arrived, so nothing has to be stopped
                self._close(lease, Status.CANCELLED, Reason.CANCELLED)
                continue
            with self.store.read() as db:
                job = db.job(lease.job_id)
            with self._lock:  # of two calls one gets it
                mine, lease.answered = lease.answered, None
            if mine is not None and job.status == Status.RUNNING and job.attempt == lease.attempt:
                return job
        return None

    def _stops(self, agent: Agent, beat: Heartbeat) -> frozenset[tuple[str, int]]:
        """(job id, attempt) that the agent is to stop: a cancel was asked for, or it is not the agent's (any more)."""
        leases = self._leases_of(agent.hostname)
        held = {(lease.job_id, lease.attempt) for lease in leases}
        wanted = {(lease.job_id, lease.attempt) for lease in leases if lease.cancel}
        return frozenset(wanted | ((beat.running or frozenset()) - held))

    def _busy(self, agent: Agent, beat: Heartbeat) -> frozenset[str] | None:
        """Apps that run on the host now; None where it may take no job."""
        leases = self._leases_of(agent.hostname)
        if agent.drained or max(len(leases), len(beat.running or ())) >= agent.slots:
            return None
        return frozenset(lease.app for lease in leases)

    def _try(self, agent: Agent, entry: tuple[str, str], connected: Callable[[], bool]) -> Job | None:
        try:
            if connected():
                return self.store.write(lambda tx: self._claim(tx, agent, *entry))
        except BaseException:
            self.queue.put(agent.hostname, *entry)
            raise
        self.queue.put(agent.hostname, *entry)
        return None

    def _claim(self, tx: Tx, agent: Agent, job_id: str, app: str) -> Job | None:
        """pending -> running for the session of this agent, decided in the database, where claims come one after another."""
        registered = tx.agent_of(agent.hostname)
        if registered is None:
            raise NotFound(f"no agent {agent.id}: register again")
        self._check_session(registered, agent.session)
        try:
            job = tx.job(job_id)
        except NotFound:
            return None
        if job.status != Status.PENDING or job.hold is not None:
            return None
        running = tx.running_apps(agent.hostname)
        if app in running or len(running) >= registered.slots or registered.drained:
            tx.after(self.queue.put, agent.hostname, job_id, app)
            return None
        taker = {"assigned_agent": agent.id, "session": agent.session}
        claimed = tx.change_job(job, status=Status.RUNNING, attempt=job.attempt + 1, started_at=self.clock.stamp(), **taker)
        self._announce(tx, claimed, job)
        tx.after(self._lease, claimed)
        tx.after(self.metrics.observe, "deploybot_queue_wait_seconds", "", max(0.0, self.clock.now() - unix_time(job.queued_at)))
        return claimed

    # -- what an agent says of its job -------------------------------------------------------------------------------

    def append_logs(self, job_id: str, upload: LogUpload, principal: Principal, is_plain: bool = False) -> tuple[int, bool]:
        """Stores what is new of the upload; (next offset, whether the job is to be cancelled). `is_plain`: no text in it needs an escape.
        Raises Conflict for an attempt that is not running any more, and for a gap, with `next_offset`."""
        now = self.clock.stamp()
        for line in upload.lines:
            line[2] = line[2] or now
        data = '[["' + '"],["'.join(['","'.join(line) for line in upload.lines]) + '"]]' if is_plain else dump(upload.lines)

        def do(tx: Tx) -> tuple[int, bool]:
            job = self._running(tx, job_id, upload.attempt, principal)
            end, log_bytes = tx.log_end(job.id, job.attempt)
            last, is_full = upload.offset + len(upload.lines), end > 0 and log_bytes > self.config.log_limit
            if upload.offset > end and not is_full:
                raise Conflict(f"lines before offset {upload.offset} are missing: send from {end}", next_offset=end)
            if upload.commit and upload.commit != job.commit:
                job = tx.change_job(job, commit=upload.commit)
                self._announce(tx, job)
            fresh, log_bytes = ([], 0) if is_full else self._within_limit(upload.lines[end - upload.offset :], log_bytes)
            if fresh:  # else it is there, or the log has said that it takes no more
                tx.add_event(job, "log", len(fresh), end, data if fresh == upload.lines else dump(fresh), log_bytes)
                tx.after(self.metrics.count, "deploybot_log_lines_total", "", len(fresh))
            return max(end, last), job.cancel_requested_at is not None

        return self.store.write(do, len(data))

    def _within_limit(self, lines: list[list[str]], log_bytes: int) -> tuple[list[list[str]], int]:
        """Those that the log of a job still takes, then a line that says so; and the bytes of the log with them."""
        limit = self.config.log_limit
        end = log_bytes + len("\n".join([line[0] for line in lines]).encode()) + 1 if lines else log_bytes
        if end <= limit:
            return lines, end
        ends = list(itertools.accumulate((len(line[0].encode()) + 1 for line in lines), initial=log_bytes))
        fit = bisect.bisect_right(ends, limit) - 1
        shown = f"{limit // MIB} MiB" if limit % MIB == 0 else f"{limit} bytes"
        note = f"[the log of this job has reached its limit of {shown}: what follows is not kept]"
        return [*lines[: max(fit, 0)], [note, "warning", self.clock.stamp()]], max(limit + 1, log_bytes)

    def finish(self, job_id: str, result: Result, principal: Principal) -> Job:
        """running -> an end. The same result again answers the same; anything else of an ended job raises Conflict."""

        def do(tx: Tx) -> Job:
            job = tx.job(job_id)
            told = (result.attempt, result.status, result.reason, result.exit_code)
            if (job.attempt, job.status, job.reason, job.exit_code) == told:
                principal.speaks_for(job.host)
                return job
            job = self._running(tx, job_id, result.attempt, principal)
            rest = {name: getattr(result, name) for name in ("exit_code", "error", "rolled_back_to")}
            return self.end(tx, job, result.status, result.reason, commit=result.commit or job.commit, **rest)

        return self._logged(self.store.write(do))

    def _running(self, tx: Tx, job_id: str, attempt: int, principal: Principal) -> Job:
        """The job, if this attempt of it runs; else Conflict with its state in words."""
        job = tx.job(job_id)
        principal.speaks_for(job.host)
        if job.status != Status.RUNNING or job.attempt != attempt:
            raise Conflict(f"attempt {attempt} of job {job.id} does not run: {in_words(job)}")
        return job

    # -- what a person or a push asks for ----------------------------------------------------------------------------

    def shown(self, job_id: str) -> tuple[str, str]:
        """(app, public JSON) of a job. Raises NotFound."""
        known = self.store.recent.get(job_id)
        if known:
            return known[0].app, known[1]
        with self.store.read() as db:
            return db.shown(job_id)

    def text(self, job: Job) -> str:
        """Its public JSON, which nearly always is there."""
        known = self.store.recent.get(job.id)
        return known[1] if known and known[0] is job else dump(job.public())

    def submit(self, asked: JobRequest, principal: Principal) -> tuple[Job, bool, str | None]:
        """(job, whether it was made now, a warning or None)."""
        app = self.app_of(asked)
        self.check_allowed(principal, app.name, asked.host)
        lock = self.locks.get(app.name)
        if lock and not asked.override:
            raise Conflict(f"{lock}: unlock it, or ask with override")
        draft, more = self.draft(asked, app, principal), ALTHOUGH if lock else ""

        def do(tx: Tx) -> tuple[Job, bool]:
            same = None if asked.force else self.same(tx, draft, asked.override)
            return (same, False) if same else (self.add(tx, draft, principal, "job.create", more), True)

        job, created = self.store.write(do)
        return job, created, self._warning(job, asked)

    def check_allowed(self, principal: Principal, name: str, host: str) -> None:
        """The token of one app deploys what apps.yaml says of it, where apps.yaml says. Raises Forbidden."""
        principal.sees(name)
        app = self.apps.named(name)
        if principal.app and (app is None or host not in self.hosts_of(app)):
            raise Forbidden(f"this token is for {name} alone, and apps.yaml does not name it on {host}")

    def hosts_of(self, app: App) -> tuple[str, ...]:
        """Those that apps.yaml names, and those whose agents have one of its labels."""
        if not app.labels:
            return app.hosts
        labelled = (agent.hostname for agent in list(self._by_host.values()) if not agent.labels.isdisjoint(app.labels))
        return tuple(sorted({*app.hosts, *labelled}))

    def _audit(self, tx: Tx, principal: Principal, action: str, job: Job) -> None:
        tx.audited(self.clock.stamp(), principal, action, job.id, what_of(job))

    def app_of(self, asked: JobRequest) -> App:
        """The app that the request names; the only one of the repository; else one by convention. Raises ValidationError."""
        apps = self.apps.of_repo(asked.repo)
        if asked.app is None and len(apps) == 1:
            return apps[0]
        unnamed = app_without_entry(asked.repo, asked.app)
        app = self.apps.named(unnamed.name) or unnamed
        if app.repo.lower() != asked.repo.lower():
            raise ValidationError([("app", f"{app.name} belongs to {app.repo}")])
        return app

    def draft(self, asked: JobRequest, app: App, by: Principal, retry_of: str | None = None, of: Terms = ALONE) -> Draft:
        now, metadata = self.clock.stamp(), dump(asked.metadata) if asked.metadata else "{}"
        timeout, retries = asked.timeout or app.timeout, app.retries if asked.retries is None else asked.retries
        what = ("", asked.repo, asked.ref, asked.host, app.name, Status.PENDING, None, of.hold, metadata)
        spec = app.spec[:-1] + REUSES if of.reuses else app.spec
        job = Job._make((*what, 0, retries, timeout, now, by.name, *NOTHING_YET, retry_of, of.deployment_id, spec, None, now))
        return Draft(job, dump(job.public()), key_of(job.repo, job.ref, job.host, job.app))

    def add(self, tx: Tx, draft: Draft, by: Principal, action: str = "", more: str = "") -> Job:
        """Makes the job. `action`: of the audit row, where that is not the caller's; `more`: what it says beside."""
        wanted, text, key = draft
        job = Job(self._new_id(), *wanted[1:])
        text = text.replace('""', f'"{job.id}"', 1)
        tx.learn(job.id, (job, text))
        tx.opened.setdefault(key, []).append(job.id)
        tx.add_job(job, text, by.address, action, what_of(job) + more)
        tx.after(self._made, key, job)
        return job

    def _made(self, key: int, job: Job) -> None:
        self._opened(key, job.host, job.id)
        if job.hold is None:
            self.queue.put(job.host, job.id, job.app)
        self.metrics.count("deploybot_jobs_created_total")

    def same(self, tx: Tx, draft: Draft, override: bool = False) -> Job | None:
        """The pending or running job of exactly this, if there is one that nobody wants to end; `override`: and that no lock holds."""
        wanted = draft.job
        for job_id in (*self._open.get(draft.key, ()), *tx.opened.get(draft.key, ())):
            with contextlib.suppress(NotFound):  # what would have made it has failed
                job = tx.job(job_id)
                is_same = (job.repo.lower(), job.ref, job.host, job.app) == (wanted.repo.lower(), *wanted[2:5])
                is_held = override and job.hold == Hold.LOCK
                if is_same and not is_held and job.status not in ENDED and job.cancel_requested_at is None:
                    return job
        return None

    def _opened(self, key: int, host: str, job_id: str) -> None:
        self._open[key] = (*self._open.get(key, ()), job_id)
        self._open_on[host] += 1
        self._changes += host not in self._by_host

    def _closed(self, job: Job) -> None:
        key = key_of(job.repo, job.ref, job.host, job.app)
        left = tuple(other for other in self._open.pop(key, ()) if other != job.id)
        if left:
            self._open[key] = left
        self._open_on[job.host] -= 1
        if self._open_on[job.host] <= 0:  # below: what a restore cancels was never counted
            del self._open_on[job.host]
            self._changes += job.host not in self._by_host

    def _warning(self, job: Job, asked: JobRequest) -> str | None:
        """What a person would want to know of a job that was taken all the same."""
        agent = self._by_host.get(job.host)
        if agent is None:
            return self._no_agent(job.host, len(self._by_host))
        if agent.drained:
            return f"{job.host} is drained: the job waits until ctl.py hosts resume {job.host}"
        if not asked.app and self.apps.all and not self.apps.of_repo(asked.repo):
            repos = [app.repo for app in self.apps.all]
            return f"apps.yaml has no app of {asked.repo}{nearest(asked.repo, repos)} (it deploys without commands of its own)"
        lacks = self.apps.lacks(asked.app)
        return f"{lacks} (it deploys without commands of its own)" if lacks else None

    @functools.lru_cache(maxsize=1024)  # noqa: B019 (there is one Jobs; to look through thousands of names takes milliseconds)
    def _no_agent(self, hostname: str, count: int) -> str:
        hosts = list(self._by_host)
        longer = sorted(host for host in hosts if host.startswith(hostname + "."))
        return f"no agent has registered as {hostname}{nearest(hostname, longer[:1] or hosts)}"

    def cancel(self, job_id: str, principal: Principal) -> Job:
        """A pending job ends at once; a running one is stopped by its agent, which reports. Raises Conflict for an ended one."""

        def do(tx: Tx) -> Job:
            job = tx.job(job_id)
            principal.sees(job.app)
            if job.status == Status.CANCELLED or (job.status == Status.RUNNING and job.cancel_requested_at):
                return job
            if job.status in ENDED:
                raise Conflict(f"job {job.id} cannot be cancelled: {in_words(job)}")
            self._audit(tx, principal, "job.cancel", job)
            if job.status == Status.PENDING:
                tx.after(self.queue.remove, job.host, {job.id})
                return self.end(tx, job, Status.CANCELLED, Reason.CANCELLED, cancel_requested_at=self.clock.stamp())
            return self.ask_to_stop(tx, job)

        return self._logged(self.store.write(do))

    def retry(self, job_id: str, principal: Principal) -> tuple[Job, bool]:
        """The same again as a new job, by the mapping in force. Raises Conflict while the job is open, or the app is locked; what goes
        back passes the lock, as its deployment did."""

        def do(tx: Tx) -> tuple[Job, bool]:
            job = tx.job(job_id)
            self.check_allowed(principal, job.app, job.host)
            if job.status not in ENDED:
                raise Conflict(f"job {job.id} cannot be retried: {in_words(job)}")
            if tx.was_overtaken(job):
                raise Conflict(f"a newer {job.app} succeeded on {job.host} since: to put {job.ref} back, deploy it by its name")
            goes_back = job.spec.endswith(REUSES)
            if not goes_back:
                check_unlocked(tx, job.app)
            asked = JobRequest(job.repo, job.ref, job.host, job.app, json.loads(job.metadata), False, job.timeout, job.retries)
            draft = self.draft(asked, self.app_of(asked), principal, job.id, Terms(reuses=goes_back))
            same = self.same(tx, draft)
            return (same, False) if same else (self.add(tx, draft, principal, "job.retry"), True)

        return self.store.write(do)

    # -- hosts -------------------------------------------------------------------------------------------------------

    def hosts(self, after: str, limit: int) -> list[dict[str, Any]]:
        """Up to so many that have an agent or open jobs, by name, behind that one."""
        names = self._names(self._changes)
        return [self.host(name) for name in names[bisect.bisect_right(names, after) :][:limit]]

    @functools.lru_cache(maxsize=1)  # noqa: B019 (there is one Jobs)
    def _names(self, changes: int) -> list[str]:
        """Sorted once for each change, as that takes milliseconds where there are thousands."""
        return sorted({*list(self._by_host), *list(self._open_on)})

    def _no_host(self, hostname: str) -> Any:
        raise NotFound(f"no agent has registered as {hostname}{nearest(hostname, list(self._by_host))}")

    def host(self, name: str) -> dict[str, Any]:
        agent, running = self._by_host.get(name), len(self._leases.get(name, ()))
        capabilities = json.loads(agent.capabilities) if agent else {}
        version = release(capabilities.get("agent"))
        is_online = agent and agent.online and self.clock.monotonic() - agent.contact <= self.config.agent_timeout
        return {
            "hostname": name,
            "agent_id": agent.id if agent else None,
            "agent_status": ("online" if is_online else "offline") if agent else "unknown",
            "last_seen": self._last_seen(agent) if agent else None,
            "capabilities": capabilities,
            "agent_version": capabilities["agent"] if version else None,
            "behind": () < version < release(VERSION),
            "slots": agent.slots if agent else 1,
            "drained": bool(agent and agent.drained),
            "running": running,
            "pending": max(0, self._open_on.get(name, 0) - running),
        }

    def _last_seen(self, agent: Agent) -> str:
        return self.clock.stamp(ago=max(0.0, self.clock.monotonic() - agent.contact))

    def change_host(self, hostname: str, by: Principal, action: str, **columns: Any) -> dict[str, Any]:
        """The host with these columns of its agent: what parks there looks again. Raises NotFound."""

        def do(tx: Tx) -> None:
            agent = dataclasses.replace(tx.agent_of(hostname) or self._no_host(hostname), **columns)
            tx.put("agents", *agent.row())
            tx.audited(self.clock.stamp(), by, action, hostname)
            tx.after(self._remember, agent)
            tx.after(self.queue.wake, hostname)
            tx.after(self.hub.touch)

        self.store.write(do)
        return self.host(hostname)

    def remove_host(self, hostname: str, principal: Principal) -> dict[str, Any]:
        """Its agent must register anew; jobs that wait for the host wait on. Raises Conflict while one runs there."""

        def do(tx: Tx) -> None:
            tx.agent_of(hostname) or self._no_host(hostname)
            if tx.running_apps(hostname):
                raise Conflict(f"{hostname} runs a job: wait for its end or cancel it first")
            tx.remove("agents", "hostname", hostname)
            tx.audited(self.clock.stamp(), principal, "host.remove", hostname)
            tx.after(self._forget, hostname)
            tx.after(self.hub.touch)

        self.store.write(do)
        return {"hostname": hostname, "removed": True}

    # -- time --------------------------------------------------------------------------------------------------------

    def excuse(self, away: float) -> None:
        """The controller was stopped for so many seconds, and nobody could reach it: no agent is to blame for them."""
        now = self.clock.monotonic()
        for lease in self._all_leases():
            lease.since, lease.deadline = now, lease.deadline + away

    def _all_leases(self) -> list[Lease]:
        return [lease for held in list(self._leases.values()) for lease in list(held.values())]

    def sweep(self) -> None:
        """What time brings: lost agents, jobs over their time, pending jobs that waited too long. Called about once a second."""
        now = self.clock.monotonic()
        for lease in self._all_leases():
            agent = self._by_host.get(lease.host)
            quiet = now - max(lease.since, agent.contact if agent else 0.0)
            if now > lease.deadline:
                self._close(lease, Status.FAILED, Reason.TIMEOUT, "ran for longer than its timeout, and the agent did not say so")
            elif quiet > self.config.lost_after:
                error = f"no contact with the agent of {lease.host} for {quiet:.0f} s"
                self._close(lease, Status.FAILED, Reason.AGENT_LOST, error, may_retry=True)
        self._expire()
        if now - self._flushed >= FLUSH_INTERVAL:
            self.flush_contacts()
        if now >= self._retention_due:
            self._retain()

    def _retain(self) -> None:
        """Removes what is old for RETENTION_BUDGET; at the end of the walk, pauses until the next."""
        stop = time.monotonic() + RETENTION_BUDGET
        while time.monotonic() < stop:
            if not self.store.write(self._remove_some, patient=True):
                self._retained, self._retention_due = "", self.clock.monotonic() + RETENTION_PAUSE
                return

    def _remove_some(self, tx: Tx) -> bool:
        """One slice: ended jobs and their events, oldest first. Whether there may be more to remove."""
        age = (self.config.retention_days or FOR_EVER) * 86400  # deliveries go all the same
        before = self.clock.stamp(ago=age)
        jobs = tx.old_jobs(self._retained, TimeOrderedIds.layout(self.clock.ms(ago=age)), RETENTION_JOBS)
        left, walked = RETENTION_EVENTS, self._retained
        for job_id, ended, deployment_id, is_kept in jobs:
            if ended is not None and ended < before and not is_kept:
                left -= tx.remove_events(job_id, left)
                if left <= 0:  # it may have more
                    break
                tx.remove("jobs", "id", job_id)
                left -= tx.remove_empty(deployment_id) if deployment_id else 0
                tx.learn(job_id, None)
                tx.learn(("log", job_id), None)
            walked = job_id
        more = len(jobs) == RETENTION_JOBS or left <= 0
        delivered = self.clock.stamp(ago=DELIVERY_DAYS * 86400)
        for table, column, oldest in (("audit", "at", before), ("deliveries", "received_at", delivered)):
            more = tx.remove_oldest(table, column, oldest, RETENTION_EVENTS) == RETENTION_EVENTS or more
        tx.give_back(RETENTION_EVENTS)
        tx.after(setattr, self, "_retained", walked)
        tx.after(setattr, self, "removed_through", int(tx.meta("removed_through")))
        return more

    def flush_contacts(self) -> None:
        self._flushed = self.clock.monotonic()
        seen, self._seen = self._seen, set()
        agents = [agent for agent in map(self._agents.get, list(seen)) if agent]
        for agent in agents:
            agent.last_heartbeat = self._last_seen(agent)
        times = [(agent.last_heartbeat, agent.id) for agent in agents]
        if times:
            self.store.write(lambda tx: tx.each("agents", "last_heartbeat", "id", times), patient=True)

    def _close(self, lease: Lease, status: Status, reason: Reason, error: str | None = None, may_retry: bool = False) -> None:
        """Ends that attempt from here, if it still runs; `may_retry`: the job waits for another if its `retries` say so."""

        def do(tx: Tx) -> Job | None:
            job = tx.job(lease.job_id)
            if job.status != Status.RUNNING or job.attempt != lease.attempt:
                return None
            if may_retry and job.attempt <= job.retries and not job.cancel_requested_at:
                return self._requeue(tx, job)
            return self.end(tx, job, status, reason, error=error)

        self._logged(self.store.write(do, patient=True))

    def _requeue(self, tx: Tx, job: Job) -> Job | None:
        nobody = {"started_at": None, "assigned_agent": None, "session": None, "commit": None}
        waiting = tx.change_job(job, status=Status.PENDING, queued_at=self.clock.stamp(), **nobody)
        self._announce(tx, waiting, job)
        tx.after(self._release, waiting)
        tx.after(self.queue.put, waiting.host, waiting.id, waiting.app)
        return waiting

    def _logged(self, job: Any) -> Any:
        if job:
            log.info("job %s of %s on %s: %s", job.id, job.app, job.host, in_words(job))
        return job

    def _expire(self) -> None:
        limit = self.config.pending_expiry
        with self.store.read() as db:
            expired = db.expired(TimeOrderedIds.layout(self.clock.ms(ago=limit)), self.clock.stamp(ago=limit))
        if expired:
            for job in self.store.write(functools.partial(self._expire_some, job_ids=expired), patient=True):
                self._logged(job)

    def _expire_some(self, tx: Tx, job_ids: list[str]) -> list[Job]:
        """One transaction for many: a host that is away may have thousands."""
        pending = [job for job in map(tx.job, job_ids) if job.status == Status.PENDING]
        error = f"no agent took it within {self.config.pending_expiry:.0f} s"
        self.end_pending(tx, pending, Reason.EXPIRED, error)
        return [tx.job(job.id) for job in pending]

    # -- streams -----------------------------------------------------------------------------------------------------

    def stream_start(self, wanted: EventFilter, last_id: str | None, tail: int) -> tuple[int | None, str | None]:
        """(position to read after, what a gap says or None). Position None: a stream of one job was read to its end."""
        head, end = self.hub.head, math.inf  # end: position of the end of the one job
        with self.store.read() as db:
            if wanted.job_id is not None and db.job(wanted.job_id).status in ENDED:
                end = db.last_position_of(wanted.job_id, "job")
            position, gap = self._resume(last_id, head)
            if position is not None:
                return (position if position < end else None), None
            start = head
            for position, lines in db.recent_chunks(wanted, tail):
                if tail > 0:
                    start, tail = position - min(lines, tail), tail - lines
        return int(min(start, end - 1)), gap  # also without a tail, the reader of a job that has ended learns its end

    def _resume(self, last_id: str | None, head: int) -> tuple[int | None, str | None]:
        """The position of a Last-Event-ID, or None and, where events are gone, what to say."""
        match = re.fullmatch(r"([0-9a-f]{8})-([0-9]{1,18})", last_id or "", re.ASCII)
        if not match:
            return None, None
        position = int(match[2])
        if match[1] != self.epoch or position > head:
            return None, "the controller was restored from a backup: this goes on with its newest events"
        if position < self.removed_through:
            return None, "some events since then were removed by retention: this goes on with the newest"
        return position, None

    def follow(self, wanted: EventFilter, position: int, changes: int, pulse: float) -> Iterator[tuple[int, list[Event], bool]]:
        """(position reached, wanted events up to there, whether hosts, apps or locks changed), for ever; no events after `pulse`
        seconds of silence. Reads the hub, and the database, about READ_BYTES at once, where it is behind the hub. Ends when the
        controller stops."""
        told = time.monotonic()
        while True:
            events, head = self.hub.since(position, max(0.0, told + pulse - time.monotonic()), changes), self.hub.head
            known, changes = changes, self.hub.changes
            if events is None:
                with self.store.read() as db:
                    events, more = first_of(db.events(wanted, position, head))
                reached = events[-1].position if more else head
            else:
                reached = events[-1].position if events else position
            events = [event.after(position) for event in events if wanted.wants(event)]
            position = reached
            if events or changes != known or time.monotonic() >= told + pulse:
                yield reached, events, changes != known
                told = time.monotonic()
            if self.hub.closed and position >= self.hub.head:
                return

    def log_lines(self, job_id: str, after: int, limit: int) -> tuple[list[dict[str, Any]], int | None]:
        """Lines after that position and, where there are more, the position to go on from. A page ends early at PAGE_BYTES."""
        with self.store.read() as db:
            db.job(job_id)
            events, more = first_of(db.log_events(job_id, after), PAGE_BYTES)
        lines = [line for event in events for line in event.after(after).log_lines()]
        return lines[:limit], lines[:limit][-1]["position"] if more or len(lines) > limit else None

    # -- small parts that the use cases share ------------------------------------------------------------------------

    def _announce(self, tx: Tx, job: Job, before: Job | None = None) -> None:
        """`before`: where it moves from one count of its deployment to another."""
        text = dump(job.public())
        tx.learn(job.id, (job, text))
        tx.add_event(job, "job", 1, 0, text)
        if before is not None and job.deployment_id:
            self.moved(tx, before, job)

    def end(self, tx: Tx, job: Job, status: str, reason: str | None, **columns: Any) -> Job:
        """The one way to an end."""
        ended = tx.change_job(job, status=status, reason=reason, completed_at=self.clock.stamp(), **columns)
        self._announce(tx, ended, job)
        if status == Status.SUCCESS:
            tx.put("releases", ended.app, ended.host, ended.id, ended.commit, ended.completed_at)
        tx.after(self._release, ended)
        tx.after(self._closed, ended)
        tx.after(self.queue.wake, ended.host)  # a parked heartbeat may have waited for this app or slot
        tx.after(self.metrics.count, "deploybot_jobs_ended_total", f'status="{status}",reason="{reason or ""}"')
        return ended

    def ask_to_stop(self, tx: Tx, job: Job) -> Job:
        """A running one: its agent hears of it, and reports."""
        if job.cancel_requested_at:
            return job
        asked = tx.change_job(job, cancel_requested_at=self.clock.stamp())
        self._announce(tx, asked)
        tx.after(self._tell_cancel, asked)
        return asked

    def end_pending(self, tx: Tx, jobs: list[Job], why: Reason, error: str | None = None, by: Mapping[str, str] = NOTHING) -> None:
        """Ends many that wait; `by`: host to the job that takes its place."""
        waited: dict[str, set[str]] = collections.defaultdict(set)
        for job in jobs:
            self.end(tx, job, Status.CANCELLED, why, error=error, superseded_by=by.get(job.host))
            waited[job.host].add(job.id)
        for host, job_ids in waited.items():
            tx.after(self.queue.remove, host, job_ids)

    def let_go(self, tx: Tx, job: Job) -> Job:
        """Lifts the hold."""
        ready = tx.change_job(job, hold=None, queued_at=self.clock.stamp())
        self._announce(tx, ready, job)
        tx.after(self.queue.put, ready.host, ready.id, ready.app)
        return ready

    def hold(self, tx: Tx, job: Job, why: Hold) -> None:
        self._announce(tx, tx.change_job(job, hold=why), None if job.hold else job)
        if job.hold is None:
            tx.after(self.queue.remove, job.host, {job.id})

    def _remember(self, agent: Agent) -> None:
        old = self._by_host.get(agent.hostname)
        if old and not agent.contact:  # read from the database just now
            agent.contact, agent.told, agent.online = old.contact, old.told, old.online and agent.session != ""
        labels = json.loads(agent.capabilities).get("labels")
        agent.labels = frozenset(f"{key}={value}" for key, value in labels.items()) if isinstance(labels, dict) else frozenset()
        agent.runs = json.loads(agent.current)
        self._agents[agent.id] = self._by_host[agent.hostname] = agent
        self._changes += old is None
        if old and old.token_sha256:
            self.by_secret.pop(old.token_sha256, None)
        if agent.token_sha256:
            self.by_secret[agent.token_sha256] = Principal(f"agent:{agent.hostname}", Scope.AGENT, agent.hostname, is_own=True)

    def _forget(self, hostname: str) -> None:
        agent = self._by_host.pop(hostname)
        self._agents.pop(agent.id, None)
        self._changes += 1
        self.by_secret.pop(agent.token_sha256 or "", None)
        self.queue.wake(hostname)

    def _lease(self, job: Job, answered: int | None = None) -> None:
        now = self.clock.monotonic()
        ran = max(0.0, self.clock.now() - unix_time(job.started_at or job.created_at))
        lease = Lease(job.id, job.host, job.app, job.attempt, job.session, now, now - ran + job.timeout + GRACE)
        lease.cancel, lease.answered = job.cancel_requested_at is not None, answered
        self._leases.setdefault(job.host, {})[job.id] = lease

    def _release(self, job: Job) -> None:
        self._leases.get(job.host, {}).pop(job.id, None)

    def _tell_cancel(self, job: Job) -> None:
        lease = self._leases.get(job.host, {}).get(job.id)
        if lease:
            lease.cancel = True
        self.queue.wake(job.host)

    def gauges(self) -> dict[str, float]:
        """What is so now. Of a drained host nobody expects anything."""
        now, agents = self.clock.monotonic(), list(self._agents.values())
        in_time = now - self.config.agent_timeout
        last = min([agent.contact for agent in agents if not agent.drained], default=now)
        oldest = self.queue.oldest({agent.hostname for agent in agents if agent.drained})
        made = int(oldest.replace("-", "")[:12], 16) if oldest else self.clock.ms()  # ids begin with the time
        free, database, wal = self.store.space()
        return {
            "deploybot_queue_jobs": self.queue.depth,
            "deploybot_queue_oldest_job_age_seconds": max(0, self.clock.ms() - made) / 1000,
            "deploybot_running_jobs": sum(map(len, list(self._leases.values()))),
            "deploybot_agents_online": sum([agent.online and agent.contact >= in_time for agent in agents]),
            "deploybot_agents_registered": len(agents),
            "deploybot_agents_oldest_contact_age_seconds": now - last,
            "deploybot_disk_free_bytes": free,
            "deploybot_database_size_bytes": database,
            "deploybot_database_wal_size_bytes": wal,
        }


# == Deployments =======================================================================================================
# Owns groups of jobs: pushes, strategies, locks, rollback. Ignores HTTP, argv, and how a single job runs.

HELD = "status = 'pending' AND hold IS NOT NULL"
SETTLED = ("deployed", "locked", "duplicate", "older")


def what(deployment: Deployment) -> str:
    return f"{deployment.kind} of {deployment.app} {deployment.ref} on {deployment.hosts} host{'s' * (deployment.hosts != 1)}"


def outcome(deployment: Deployment) -> str | None:
    """In words, for one that not all hosts went well with."""
    parts = [f"{getattr(deployment, name)} {name}" for name in ("failed", "cancelled") if getattr(deployment, name)]
    return f"{', '.join(parts)} of {deployment.hosts}" if parts else None


def in_turn(app: App, hosts: Iterable[str]) -> list[str]:
    """By name, but for the canary, which comes first."""
    return sorted(hosts, key=lambda host: (host != app.strategy.canary, host))


def batch_size(strategy: Mapping[str, Any], hosts: int) -> int:
    return Strategy(strategy["type"], strategy["batch"]).size(hosts)


def push_message(outcomes: list[dict[str, Any]], made: int) -> str:
    """For the page of GitHub's deliveries."""
    names = [one["app"] for one in outcomes if one["rule"] in ("deployed", "duplicate", "locked")]
    if not names:
        return "ignored: " + "; ".join(": ".join(filter(None, (one["app"], one["detail"]))) for one in outcomes)
    is_held = any(one["rule"] == "locked" for one in outcomes)
    told = f"{made} job{'' if made == 1 else 's'} for {', '.join(names)}{', held: the app is locked' if is_held else ''}"
    return told if made else f"{told}: the same deployment is under way"


class Plan(NamedTuple):
    """What a deployment would do."""

    app: App
    kind: Kind
    ref: str
    targets: list[tuple[str, str]]  # (host, ref), in their turn
    skipped: Sequence[dict[str, str]] = ()
    branch: str | None = None
    metadata: Mapping[str, Any] = NOTHING
    override: bool = False
    force: bool = False
    retry_of: str | None = None
    retries: Mapping[str, Job] = NOTHING  # host to the job that is tried again

    def steps(self) -> list[list[tuple[str, str]]]:
        """The batches, the canary's first."""
        strategy, first = self.app.strategy, int(self.canary() is not None)
        rest, size = self.targets[first:], strategy.size(len(self.targets))
        return [self.targets[:1]] * first + [rest[at : at + size] for at in range(0, len(rest), size)]

    def canary(self) -> str | None:
        hosts = [host for host, _ in self.targets[:1]]
        return self.app.strategy.canary if self.app.strategy.canary in hosts and len(self.targets) > 1 else None

    def strategy(self) -> dict[str, Any]:
        """As it is stored: where a canary goes first, its failure ends the rest."""
        told, canary = dataclasses.asdict(self.app.strategy), self.canary()
        limit = 0 if canary and told["max_failures"] is None else told["max_failures"]
        return {**told, "canary": canary, "max_failures": limit}

    def public(self, lock: Lock | None, runs: Mapping[str, str]) -> dict[str, Any]:
        """`runs`: host to the commit that it replaces, where that is known."""
        waits = [None, "pause" if self.canary() and self.app.strategy.pause else "success", *["success"] * len(self.targets)]
        pairs = zip(self.steps(), waits, strict=False)
        steps = [{"hosts": [host for host, _ in step], "refs": dict(step), "waits": wait} for step, wait in pairs]
        commands = {name: getattr(self.app, name) for name in ("build", "activate", "deploy", "health_check")}
        told = {"app": self.app.name, "repo": self.app.repo, "kind": self.kind, "strategy": self.strategy(), "steps": steps}
        return {"plan": {**told, "runs": runs, **commands, "lock": lock and lock._asdict()}, "skipped": self.skipped}


def held(draft: Draft, hold: Hold | None) -> Draft:
    job = draft.job._replace(hold=hold)
    return draft._replace(job=job, text=dump(job.public()))


class Made(NamedTuple):
    """What came of a plan: the deployment, its jobs, and whether it was made now; without a deployment nothing was to be made."""

    deployment: Deployment | None
    jobs: list[Job]
    created: bool
    skipped: Sequence[dict[str, str]] = ()


class Deployments:
    """Every public method is a use case, as in Jobs. One function moves a deployment, _step(): it is due in each transaction that
    moved one of its jobs, so that there is no state between two steps."""

    def __init__(self, jobs: Jobs):
        self._jobs, self._store, self._apps, self._clock = jobs, jobs.store, jobs.apps, jobs.clock
        self._lock = threading.Lock()  # guards _new_id
        with self._store.read() as db:
            self._new_id = TimeOrderedIds(self._clock, db.last_id("deployments"), kind=1)
        jobs.moved = self._moved

    # -- what a person, a push or a CI asks for ------------------------------------------------------------------------

    def create(self, asked: DeploymentRequest, by: Principal) -> tuple[Plan, Made]:
        """Raises NotFound, ValidationError, Forbidden, and Conflict where the app is locked or no host can go back."""
        plan = self.plan(asked, by)
        action = "deployment.rollback" if asked.rollback else "deployment.create"
        locks = asked.rollback and asked.lock

        def do(tx: Tx) -> Made:
            lock = tx.lock_of(plan.app.name)
            if lock and not plan.override:
                raise Conflict(f"{lock}: unlock it (ctl.py unlock --app {lock.app}), or deploy all the same with override")
            made = make(tx)
            if locks and made.created and not lock:
                self._put_lock(tx, Lock(plan.app.name, f"rolled back to {plan.ref[:12]}", by.name, self._clock.stamp(), None), by)
            return made

        make = self._maker(plan, by, action)
        return plan, self._logged(self._store.write(do))

    def plan(self, asked: DeploymentRequest, by: Principal) -> Plan:
        app = self._app(asked.app, by)
        hosts = self._hosts(app, asked.hosts)
        if not asked.rollback:
            targets = [(host, asked.ref or "") for host in hosts]
            told = {**asked.metadata, "app": app.name, "trigger": "deploy"}
            return Plan(app, Kind.DEPLOY, asked.ref or "", targets, metadata=told, override=asked.override, force=asked.force)
        targets, skipped = self._ways_back(app, hosts, asked.to)
        if not targets:
            raise Conflict("no host can go back: " + "; ".join(f"{one['host']}: {one['reason']}" for one in skipped[:5]))
        told = {**asked.metadata, "app": app.name, "trigger": "rollback"}
        return Plan(app, Kind.ROLLBACK, targets[0][1], targets, skipped, metadata=told, override=True, force=asked.force)

    def running(self, plan: Plan) -> dict[str, str]:
        """The commit that each of its hosts runs, as its agent says, else as it was deployed; those alone where it is known."""
        name = plan.app.name
        with self._store.read() as db:
            deployed = [(str(one["hostname"]), one["commit"]) for one in db.releases([(name, host) for host, _ in plan.targets])]
        return {host: runs for host, commit in deployed if (runs := self._jobs.runs(host, name) or commit)}

    def _app(self, name: str, by: Principal) -> App:
        by.sees(name)  # first: who may see one app alone is told of no other
        app = self._apps.named(name)
        if app is None:
            raise NotFound(self._apps.lacks(name))
        return app

    def _hosts(self, app: App, asked: tuple[str, ...] | None) -> list[str]:
        """Those that are asked for, else all of the app; the canary first."""
        known = self._jobs.hosts_of(app)
        strangers = sorted(set(asked or ()).difference(known))[:MAX_ERRORS]
        errors = [("hosts", f"{host} is no host of {app.name}{nearest(host, known)}") for host in strangers]
        if errors or not known:
            raise ValidationError(errors or [("app", f"no agent has a label of {app.name}: it has no hosts now")])
        return in_turn(app, asked or known)

    def _ways_back(self, app: App, hosts: list[str], to: str | None) -> tuple[list[tuple[str, str]], list[dict[str, str]]]:
        """(host and commit of those that can go back, why the others cannot)."""
        targets, skipped = [], []
        with self._store.read() as db:
            for host in hosts:
                current, before = db.before(app.name, host, to)
                commit = before or (to if to and is_commit(to) is None else None)
                if commit is None or commit == current:
                    runs = f"runs {current[:12]}" if current else "runs nothing of it yet"
                    why = f"{runs} already" if commit and current else f"{runs}; no release {to or 'before that'} is known"
                    skipped.append({"host": host, "reason": why})
                else:
                    targets.append((host, commit))
        return targets, skipped

    def retry(self, deployment_id: str, by: Principal) -> tuple[Plan, Made]:
        """The hosts whose job ended without success, as a new deployment by the mapping in force; it passes the lock and goes back where
        that did. Raises Conflict while it is open."""
        with self._store.read() as db:
            old = db.deployment(deployment_id)
            failed = db.jobs_of(old.id, "status IN ('failed', 'cancelled')")
            overtaken = {job.host for job in failed if db.was_overtaken(job)}
        by.sees(old.app)
        if old.completed_at is None:
            raise Conflict(f"deployment {old.id} is {old.status}: cancel it, or wait")
        app = self._app(old.app, by)
        known, refs = {*self._jobs.hosts_of(app)}, {job.host: job for job in failed}
        hosts = [host for host in refs if host in known - overtaken]
        if not hosts:
            newer = f"newer ones succeeded since: to put {old.ref} back, deploy it by its name"
            why = newer if overtaken else "none is the app's now" if refs else "all succeeded"
            raise Conflict(f"deployment {old.id} has no host to try again: {why}")
        targets = [(host, refs[host].ref) for host in in_turn(app, hosts)]
        reasons = {host: "a newer one succeeded there since" if host in known else f"is no host of {app.name} now" for host in refs}
        skipped = [{"host": host, "reason": reasons[host]} for host in refs if host not in hosts]
        told = {"app": app.name, "trigger": "retry"}
        plan = Plan(app, Kind.RETRY, old.ref, targets, skipped, old.branch, told, bool(old.override), retry_of=old.id)
        plan = plan._replace(retries=refs)
        make = self._maker(plan, by, "deployment.retry")

        def do(tx: Tx) -> Made:
            if not plan.override:
                check_unlocked(tx, app.name)
            return make(tx)

        return plan, self._logged(self._store.write(do))

    def hook(self, name: str, asked: HookRequest, by: Principal) -> tuple[Plan, Made]:
        """What a CI says that it has built: held like a push while the app is locked."""
        app = self._app(name, by)
        hosts, ref = self._hosts(app, asked.hosts), asked.commit or asked.ref
        told = {"app": app.name, "branch": asked.ref, "commit_message": asked.message, "pusher": asked.pusher, "trigger": "hook"}
        plan = Plan(app, Kind.HOOK, ref, [(host, ref) for host in hosts], branch=asked.ref, metadata=told)
        return plan, self._logged(self._store.write(self._maker(plan, by, "deployment.hook")))

    def cancel(self, deployment_id: str, by: Principal) -> Deployment:
        """What waits ends at once; what runs is stopped by its agent, which reports. Raises Conflict for an ended one."""

        def do(tx: Tx) -> Deployment:
            deployment = tx.deployment(deployment_id)
            by.sees(deployment.app)
            if deployment.completed_at:
                raise Conflict(f"deployment {deployment.id} cannot be cancelled: {deployment.status}")
            tx.change_deployment(deployment.id, reason=f"cancelled by {by.name}")
            self._jobs.end_pending(tx, tx.jobs_of(deployment.id, "status = 'pending'"), Reason.CANCELLED)
            for job in tx.jobs_of(deployment.id, "status = 'running'"):
                self._jobs.ask_to_stop(tx, job)
            tx.audited(self._clock.stamp(), by, "deployment.cancel", deployment.id, what(deployment))
            tx.due[deployment.id] = self._step
            tx.settle()
            return tx.deployment(deployment.id)

        return self._store.write(do)

    # -- pushes --------------------------------------------------------------------------------------------------------

    def push(self, push: Push, guid: str, signature: str, signers: frozenset[str], address: str) -> tuple[list[str], str]:
        """What a signed push makes, stored in one transaction with its delivery: (ids of jobs, message). The same delivery answers the
        same. `signers`: the secrets that the body was signed with; an app with a secret of its own takes no other."""
        default = secrets_in(self._jobs.config.webhook_secret)
        known = self._apps.of_repo(push.repo)
        trusting = [app for app in known if signers.intersection(app.webhook_secrets or default)]
        github = Principal("github", Scope.PUBLIC, address=address)
        makers = [(app, self._push_maker(push, app, guid, github)) for app in trusting]
        delivery = f"{push.repo.lower()} {guid}"[:300]  # the guid is not signed

        def do(tx: Tx) -> tuple[list[str], str]:
            before = tx.delivery(delivery, signature) if trusting else None
            if before:
                return before[0], f"taken before, nothing new is made: {before[1]} (ctl.py retry JOB deploys it again)"
            outcomes, made = [], list[str]()
            for app, make in makers:
                rule, deployment, jobs = make(tx) if callable(make) else (make, None, [])
                made += jobs
                outcomes.append({"app": app.name, "rule": rule, "detail": push.words(rule), "deployment_id": deployment})
            if not makers:
                rule = "wrong_secret" if known else "no_app"
                outcomes = [{"app": None, "rule": rule, "detail": push.words(rule), "deployment_id": None}]
            message = push_message(outcomes, len(made))
            settled = any(one["rule"] in SETTLED for one in outcomes)  # else a redelivery counts, once apps.yaml says more
            about = (guid[:100], push.repo, push.ref, push.commit, push.pusher, dump(outcomes), int(settled))
            tx.put("deliveries", delivery, signature, self._clock.stamp(), dump(made), message, *about)
            if settled:
                tx.audited(self._clock.stamp(), github, "push", push.repo, f"{push.branch or push.ref} {push.commit}: {message}")
            return made, message

        return self._store.write(do, patient=True)  # GitHub sends it once

    def _push_maker(
        self, push: Push, app: App, guid: str, github: Principal
    ) -> str | Callable[[Tx], tuple[str, str | None, list[str]]]:
        """The rule by which the push does not count for that app, or what makes its deployment: (rule, its id, ids of its jobs)."""
        if rule := push.rule(app):
            return rule
        targets = [(host, push.commit or "") for host in in_turn(app, self._jobs.hosts_of(app))]
        plan = Plan(app, Kind.PUSH, push.commit or "", targets, branch=push.branch or push.tag, metadata=push.metadata(app))
        make = self._maker(plan, github, "", guid)

        def do(tx: Tx) -> tuple[str, str | None, list[str]]:
            if push.is_older(tx.newest_push(app.name, push.ref)):
                return "older", None, []
            tx.put("pushes", app.name, push.ref, push.pushed_at, push.before)
            made = make(tx)
            rule = "deployed" if made.created else "duplicate" if targets else "no_host"
            if made.created and tx.lock_of(app.name):
                rule = "locked"
            return rule, made.deployment and made.deployment.id, [job.id for job in made.jobs if made.created]

        return do

    # -- how one is made, and moves on ---------------------------------------------------------------------------------

    def _maker(self, plan: Plan, by: Principal, action: str, delivery: str | None = None) -> Callable[[Tx], Made]:
        """What makes it in a transaction; the drafts of its jobs are made before."""
        with self._lock:
            new = self._new_id()
        steps = plan.steps()
        hold = Hold.LOCK if plan.app.name in self._jobs.locks and not plan.override else Hold.BATCH if len(steps) > 1 else None
        told, drafts = dict(plan.metadata), []
        for host, ref in itertools.chain.from_iterable(steps):
            asked, old = JobRequest(plan.app.repo, ref, host, plan.app.name, told), plan.retries.get(host)
            terms = Terms(new, hold, old.spec.endswith(REUSES) if old else plan.kind is Kind.ROLLBACK)
            drafts.append(self._jobs.draft(asked, plan.app, by, old and old.id, terms))

        def do(tx: Tx) -> Made:
            is_locked = not plan.override and tx.lock_of(plan.app.name) is not None  # by now: the drafts may be older
            first = hold or (Hold.LOCK if is_locked else None)
            found = self._add(tx, plan, [draft if hold == first else held(draft, first) for draft in drafts], by)
            jobs, there = [job for job, created in found if created], [job for job, created in found if not created]
            if not jobs:
                known = next((job.deployment_id for job in there if job.deployment_id), None)
                self._supersede(tx, plan, known, [], there)
                tx.settle()
                return Made(tx.deployment(known) if known else None, [tx.job(job.id) for job in there], False)
            deployment = self._first_row(new, plan, jobs, by, delivery)
            tx.add("deployments", *deployment)
            tx.add_deployment_event(deployment)
            if action:
                said = what(deployment) + (ALTHOUGH if plan.override and tx.lock_of(plan.app.name) else "")
                tx.audited(self._clock.stamp(), by, action, new, said)
            self._supersede(tx, plan, new, jobs, there)
            if first:
                tx.due[new] = self._step
                tx.settle()
                deployment, jobs = tx.deployment(new), tx.jobs_of(new)
            left_out = [{"host": job.host, "reason": f"the same is under way: job {job.id}"} for job in there]
            return Made(deployment, jobs, True, left_out)

        return do

    def _first_row(self, new: str, plan: Plan, jobs: list[Job], by: Principal, delivery: str | None) -> Deployment:
        strategy, count, hold = plan.strategy(), len(jobs), jobs[0].hold
        strategy["canary"] = strategy["canary"] if jobs[0].host == strategy["canary"] else None
        app, now = plan.app, self._clock.stamp()
        row = Deployment(new, app.name, app.repo, plan.ref, plan.branch, plan.kind, State.PENDING, None, dump(strategy), count)
        row = row._replace(held=count, hold=hold) if hold else row._replace(pending=count)
        row = row._replace(override=int(plan.override), retry_of=plan.retry_of, delivery_id=delivery)
        return row._replace(created_at=now, created_by=by.name)

    def _add(self, tx: Tx, plan: Plan, drafts: list[Draft], by: Principal) -> list[tuple[Job, bool]]:
        """(job, whether it was made now) of each. What goes back is the same as a whole or not at all, as all else that waits is ended
        for it."""
        same = [None if plan.force else self._jobs.same(tx, draft, plan.override) for draft in drafts]
        is_new = plan.kind is Kind.ROLLBACK and not all(job and job.spec.endswith(REUSES) for job in same)
        found = []
        for draft, job in zip(drafts, same, strict=True):
            waits = is_new and job is not None and job.status == Status.PENDING
            found.append((job, False) if job and not waits else (self._jobs.add(tx, draft, by), True))
        return found

    def _supersede(self, tx: Tx, plan: Plan, new: str | None, jobs: list[Job], there: list[Job]) -> None:
        """Latest wins: what older pushes to that branch, or to any while the app is locked, have not begun on these hosts ends. A
        rollback ends what any deployment of the app has not begun. `there`: of what is the same, nothing ends."""
        if plan.kind not in (Kind.PUSH, Kind.HOOK, Kind.ROLLBACK):
            return
        goes_back, places = plan.kind is Kind.ROLLBACK, {job.host: job.id for job in (*there, *jobs)}
        kept = {new, *(job.deployment_id for job in there if job.status == Status.PENDING or not goes_back)}
        any_branch, others = tx.lock_of(plan.app.name) is not None, {*self._jobs.hosts_of(plan.app)} - places.keys()
        for old in tx.open_deployments(plan.app.name):
            is_older = old.kind in (Kind.PUSH, Kind.HOOK) and (any_branch or old.branch == plan.branch)
            if old.id in kept or not (is_older or goes_back):
                continue
            pending = [job for job in tx.jobs_of(old.id, "status = 'pending'") if goes_back or job.host not in others]
            if pending:
                tx.change_deployment(old.id, superseded_by=new, reason=f"superseded by {new or plan.ref}")
                self._jobs.end_pending(tx, pending, Reason.SUPERSEDED, f"by {new or plan.ref}", places)

    def _moved(self, tx: Tx, before: Job, job: Job) -> None:
        counts = collections.Counter({job.place(): 1})
        counts[before.place()] -= 1
        if job.status == Status.FAILED and job.rolled_back_to:
            counts["rolled_back"] = 1
        tx.tally(job.deployment_id or "", counts)
        tx.due[job.deployment_id or ""] = self._step

    def _step(self, tx: Tx, deployment_id: str) -> None:
        """What follows from where its jobs are: some go, or all that wait end, or it ends itself."""
        old = deployment = tx.deployment(deployment_id)
        if deployment.held or deployment.pending:
            deployment = self._advance(tx, deployment)
        status = deployment.judged()
        now, columns = self._clock.stamp(), dict[str, Any](status=status)
        if deployment.started_at is None and (deployment.running or deployment.success or deployment.failed):
            columns["started_at"] = now
        if deployment.hold and not deployment.held:
            columns |= {"hold": None, "resume_at": None}
        if status not in UNDER_WAY:
            reason = None if status == State.SUCCESS else deployment.reason or outcome(deployment)
            columns |= {"completed_at": now, "reason": reason}
            tx.after(self._measure, deployment, status)
        if deployment.status != status or len(columns) > 1:
            deployment = tx.change_deployment(deployment.id, **columns)
        shown = ("status", "hold", "resume_at", "reason", "superseded_by")
        if any(getattr(old, name) != getattr(deployment, name) for name in shown):
            tx.add_deployment_event(deployment)

    def _measure(self, ended: Deployment, status: str) -> None:
        apps, metrics = self._jobs.apps, self._jobs.metrics
        app = ended.app if apps.named(ended.app) and len(apps.all) <= MAX_APP_LABELS else "other"
        metrics.count("deploybot_deployments_ended_total", f'app="{app}",status="{status}"')
        seconds = max(0.0, self._clock.now() - unix_time(ended.created_at))
        metrics.observe("deploybot_deployment_duration_seconds", f'status="{status}"', seconds)

    def _advance(self, tx: Tx, deployment: Deployment) -> Deployment:
        strategy = json.loads(deployment.strategy)
        without, limit = deployment.failed + deployment.cancelled, strategy["max_failures"]
        if limit is not None and without > limit:
            why = f"stopped: {outcome(deployment)}"
            deployment = tx.change_deployment(deployment.id, reason=deployment.reason or why)
            self._jobs.end_pending(tx, tx.jobs_of(deployment.id, "status = 'pending'"), Reason.STOPPED, outcome(deployment))
            return tx.deployment(deployment.id)
        hold, resume_at = self._why_held(tx, deployment, strategy)
        if hold == Hold.LOCK and deployment.pending:  # what no host has taken yet waits, too
            for job in tx.jobs_of(deployment.id, "status = 'pending' AND hold IS NULL"):
                self._jobs.hold(tx, job, hold)
            deployment = tx.deployment(deployment.id)
        if not deployment.held:
            return deployment
        if hold is None:
            hold = Hold.BATCH
            first = tx.jobs_of(deployment.id, HELD, 1)[0]
            count = 1 if first.host == strategy["canary"] else batch_size(strategy, deployment.hosts)
            for job in tx.jobs_of(deployment.id, HELD, count):
                self._jobs.let_go(tx, job)
        if hold != deployment.hold:  # which all of them have
            for job in tx.jobs_of(deployment.id, HELD):
                self._jobs.hold(tx, job, hold)
        return tx.change_deployment(deployment.id, hold=hold, resume_at=resume_at)

    def _why_held(self, tx: Tx, deployment: Deployment, strategy: Mapping[str, Any]) -> tuple[Hold | None, str | None]:
        """(why nothing more may go now, when a pause is over)."""
        if not deployment.override and tx.lock_of(deployment.app):
            return Hold.LOCK, deployment.resume_at
        if deployment.pending or deployment.running:
            return Hold.BATCH, None
        resume_at = deployment.resume_at
        if resume_at is None and strategy["canary"] and strategy["pause"]:
            begun = tx.jobs_of(deployment.id, "hold IS NULL", 2)  # what ended before its turn keeps its hold
            if [job.host for job in begun] == [strategy["canary"]]:
                resume_at = self._clock.stamp(ago=-strategy["pause"])
        return (Hold.PAUSE, resume_at) if resume_at and resume_at > self._clock.stamp() else (None, None)

    # -- locks ---------------------------------------------------------------------------------------------------------

    def lock(self, name: str, asked: LockRequest, by: Principal) -> Lock:
        """Until it is unlocked, or for so long: pushes are held, and nothing more of what is under way begins."""
        app, now = self._app(name, by), self._clock.stamp()
        until = self._clock.stamp(ago=-asked.seconds) if asked.seconds else None
        lock = Lock(app.name, asked.reason, by.name, now, until)
        self._store.write(lambda tx: self._put_lock(tx, lock, by))
        return lock

    def _put_lock(self, tx: Tx, lock: Lock, by: Principal) -> None:
        tx.put("locks", *lock)
        tx.audited(lock.at, by, "app.lock", lock.app, lock.reason)
        tx.after(self._jobs.locks.__setitem__, lock.app, lock)
        tx.after(self._jobs.hub.touch)
        tx.due.update((deployment.id, self._step) for deployment in tx.open_deployments(lock.app))

    def unlock(self, name: str, by: Principal, over: Lock | None = None) -> list[str]:
        """Ids of the deployments that go on. `over`: only where that lock is still the one in force."""

        def do(tx: Tx) -> list[str]:
            by.sees(name)
            is_another = over is not None and tx.lock_of(name) != over
            if is_another or not tx.remove("locks", "app", name):
                raise NotFound(self._apps.lacks(name) or f"{name} is not locked")
            tx.audited(self._clock.stamp(), by, "app.unlock", name)
            tx.after(self._jobs.locks.pop, name, None)
            tx.after(self._jobs.hub.touch)
            held = [deployment.id for deployment in tx.open_deployments(name) if deployment.hold == Hold.LOCK]
            tx.due.update((deployment_id, self._step) for deployment_id in held)
            return held

        return self._store.write(do)

    def sweep(self) -> None:
        """Pauses and locks that are over. Called about once a second."""
        now = self._clock.stamp()
        with self._store.read() as db:
            over = db.paused_until(now)
        for deployment_id in over:
            self._store.write(functools.partial(self._step, deployment_id=deployment_id), patient=True)
        for lock in list(self._jobs.locks.values()):
            if lock.until and lock.until <= now:
                with contextlib.suppress(NotFound):
                    self.unlock(lock.app, Principal("controller", Scope.ADMIN), lock)

    def _logged(self, made: Made) -> Made:
        if made.created and made.deployment:
            log.info("deployment %s: %s", made.deployment.id, what(made.deployment))
        return made


# == HTTP ==============================================================================================================
# Owns requests, answers, connections and the table from error to status. Ignores what the routes do.

REQUEST_LINE = re.compile(rb"([A-Z]{1,20}) (/[!-~]*) HTTP/1\.([01])")  # origin form alone (RFC 9112, 3.2.1)
# A colon right after the name, and no control character but a tab in the value (RFC 9112, 5.1).
HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)")
BARE = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")  # CR or LF without the other
# A name or an address, and a port (RFC 9112, 3.2; RFC 3986, 3.2.2); no comma, as two joined by a proxy look so.
AUTHORITY = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?", re.ASCII)
NO_HOST = "the Host header must be a name or an address, and perhaps a port; HTTP/1.1 needs one"
ONCE = ("host", "content-length", "authorization", "content-type", "expect", "last-event-id", "origin")
NOBODY = Principal("nobody", Scope.PUBLIC)
Headers = tuple[tuple[str, str], ...]
# Ends a side of a connection, also for a thread that does not own it: that of SSLSocket would drop the state of TLS.
end_of = socket.socket.shutdown


class Refusal(DeployBotError):
    """A request that is answered with an error and then never read on: what follows it cannot be told apart from it."""

    def __init__(self, status: int, detail: str):
        super().__init__(detail)
        self.status = status


def is_foreign(headers: Mapping[str, str]) -> bool:
    """A browser says which page a call comes from; writes come from our own."""
    origin = headers.get("origin")
    is_ours = origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower()
    return not is_ours or headers.get("sec-fetch-site", "none") not in ("none", "same-origin")


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Request:
    """What is asked. A client that is kept alive repeats its headers to the letter: then this is the same one with another line and
    body, and whose token it brings is known."""

    method: str
    path: str
    query_text: str
    headers: dict[str, str]  # by name in lower case
    peer: str  # who connected
    address: str  # who asked: another one than the peer behind a trusted proxy
    secure: bool  # came over TLS, of ours or of a trusted proxy
    connected: Callable[[], bool]
    is_foreign: bool = False  # comes from another site's page
    late: float = 0.0  # seconds that it has lain unread
    body: bytes = b""
    route: Any = None  # the Route below
    params: tuple[str, ...] = ()
    digest: str = ""  # SHA-256 of the token
    known: Principal | None = None  # who the token was when it was looked at last
    principal: Principal = NOBODY  # who asks
    granted: Any = None  # the Route that this principal may call

    def json(self) -> Any:
        return load_json(self.body)

    def query(self, texts: tuple[str, ...], integers: tuple[str, ...]) -> Fields:
        """The parameters; an unknown or repeated one is an error, an empty one is none."""
        try:
            pairs = urllib.parse.parse_qsl(self.query_text, errors="strict", max_num_fields=32)
        except ValueError:
            raise Malformed("the query cannot be parsed") from None
        values = {name: int(value) if name in integers and re.fullmatch(r"[0-9]{1,18}", value) else value for name, value in pairs}
        fields = Fields(values, {*texts, *integers})
        for name, count in collections.Counter(name for name, _ in pairs).items():
            if count > 1:
                fields.wrong(name[:100], "is given more than once")
        return fields


class FirstLine(NamedTuple):
    method: str
    path: str
    query: str
    minor: int  # of HTTP/1


class HeaderBlock(NamedTuple):
    values: dict[str, str]  # by name in lower case
    length: int  # bytes of the body
    expects: bool  # 100-continue
    ends: bool  # the connection, with the answer


@functools.lru_cache(maxsize=256)  # a proxy's connection carries the requests of many, who ask the same again and again
def parse_line(line: bytes) -> FirstLine:
    """Raises Refusal."""
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise Refusal(400, "the request line must be METHOD /path HTTP/1.1")
    path, _, query = match[2].decode().partition("?")
    return FirstLine(match[1].decode(), path, query, int(match[3]))


def parse_headers(block: bytes) -> HeaderBlock:
    """The lines behind the first, without the blank one. Raises Refusal."""
    values: dict[str, str] = {}
    for line in block.split(b"\r\n") if block else ():
        found = HEADER.fullmatch(line)
        if not found:
            raise Refusal(400, "a header line is malformed")
        name = found[1].decode("ascii").lower()
        value = found[2].strip(b" \t").decode("latin-1")
        if name in values:
            if name in ONCE:
                raise Refusal(400, f"more than one {name} header")
            value = f"{values[name]}, {value}"
        values[name] = value
    if "transfer-encoding" in values:
        raise Refusal(400, "Transfer-Encoding is not taken: send Content-Length")
    expected, length = values.get("expect", "").lower(), values.get("content-length", "0")
    ends = "close" in re.split(r"[ \t]*,[ \t]*", values.get("connection", "").lower())
    if not AUTHORITY.fullmatch(values.get("host", "missing")):
        raise Refusal(400, NO_HOST)
    if expected not in ("", "100-continue"):
        raise Refusal(417, "the only expectation known is 100-continue")
    if not re.fullmatch(r"[0-9]{1,9}", length, re.ASCII):
        raise Refusal(400, "Content-Length must be 1 to 9 digits")
    return HeaderBlock(values, int(length), expected != "", ends)


def is_one_of(address: str, trusted: Iterable[Network]) -> bool:
    with contextlib.suppress(ValueError):
        found = ipaddress.ip_address(address)
        return any(found in network for network in trusted)
    return False


def forwarded(peer: str, headers: Mapping[str, str], trusted: tuple[Network, ...]) -> tuple[str, bool]:
    """(who asked, whether over TLS) as a trusted proxy says; what others say of it counts for nothing."""
    if not trusted or not is_one_of(peer, trusted):
        return peer, False
    hops = (hop.strip() for hop in reversed(headers.get("x-forwarded-for", "").split(",")))
    asked = next((hop for hop in hops if hop and not is_one_of(hop, trusted)), peer)
    with contextlib.suppress(ValueError):  # what the proxy passed on may be no address
        peer = str(ipaddress.ip_address(asked))
    return peer, headers.get("x-forwarded-proto", "").lower() == "https"


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class Response:
    status: int
    body: bytes | Iterator[bytes] = b""  # chunks, where its length is not known: sent as they come (RFC 9112, 7.1)
    content_type: str = "application/json"
    headers: Headers = ()
    sent: Callable[[], None] | None = None  # called when the answer was written, or could not be


Answer = Response | dict[str, Any]  # a dict is sent as JSON, with 200


def answer(status: int, value: Any, sent: Callable[[], None] | None = None, headers: Headers = ()) -> Response:
    return Response(status, (dump(value) + "\n").encode(), headers=headers, sent=sent)


def problem(status: int, title: str, detail: str, more: Mapping[str, Any], headers: Any) -> Response:
    """RFC 9457."""
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail, **more}
    return Response(status, (dump(body) + "\n").encode("utf-8", "replace"), "application/problem+json", tuple(headers))


class MethodNotAllowed(DeployBotError):
    def __init__(self, allowed: list[str]):
        super().__init__("this path takes " + " and ".join(allowed))
        self.allowed = allowed


# From error to status, title and headers; the first class that fits.
STATUSES: tuple[tuple[type[DeployBotError], int, str, Mapping[str, str]], ...] = (
    (Malformed, 400, "Not parseable", {}),
    (Unauthorized, 401, "No valid token", {"WWW-Authenticate": "Bearer"}),
    (Forbidden, 403, "Not allowed", {}),
    (NotFound, 404, "Not found", {}),
    (MethodNotAllowed, 405, "Method not allowed", {}),
    (Conflict, 409, "Conflict", {}),
    (TooLarge, 413, "Too large", {}),
    (TooMany, 429, "Too many", {}),
    (AppsError, 422, "apps.yaml is wrong", {}),
    (ValidationError, 422, "Fields are wrong", {}),
    (Unavailable, 503, "Not available now", {"Retry-After": str(RETRY_AFTER)}),
)


def problem_of(error: DeployBotError) -> Response:
    if isinstance(error, Refusal):
        return problem(error.status, http.HTTPStatus(error.status).phrase, str(error), {}, ())
    _, status, title, headers = next(row for row in STATUSES if isinstance(error, row[0]))
    more = [("Allow", ", ".join(error.allowed))] if isinstance(error, MethodNotAllowed) else []
    more += [("Retry-After", str(error.more["retry_after"]))] if isinstance(error, TooMany) else []
    return problem(status, title, str(error), error.more, [*headers.items(), *more])


class Route(NamedTuple):
    method: str
    pattern: str  # {name} stands for one segment
    scope: Scope
    function: Callable[[Any, Request], Answer]
    limit: int = MAX_BODY  # bytes of a body
    admit: Callable[[Any, Request], None] | None = None  # called before the body is read; raises where it need not be
    for_app: bool = False  # may be called with the token of one app; the function sees to it that it stays with that


class Router:
    """Finds the route of a method and a path. What a pattern leaves open is the third segment: /v1/jobs/{id}/logs."""

    def __init__(self, routes: Iterable[Route]):
        self._methods: dict[str, dict[str, Route]] = {}
        for route in routes:
            self._methods.setdefault(re.sub(r"{\w+}", "\0", route.pattern), {})[route.method] = route

    @functools.lru_cache(maxsize=256)  # noqa: B019 (there is one Router)
    def find(self, method: str, path: str) -> tuple[Route, tuple[str, ...]]:
        """The route and the segment that its pattern left open. Raises NotFound or MethodNotAllowed."""
        methods = self._methods.get(path)
        params: tuple[str, ...] = ()
        begin = path.find("/", 4) + 1  # of the third segment
        if methods is None and begin:
            end = path.find("/", begin)
            end = len(path) if end < 0 else end
            if end > begin:
                methods, params = self._methods.get(f"{path[:begin]}\0{path[end:]}"), (path[begin:end],)  # \0: no path can hold it
        if methods is None:
            raise NotFound("no such path: /docs lists what there is")
        route = methods.get("GET" if method == "HEAD" else method)
        if route is None:
            raise MethodNotAllowed([*methods, *(["HEAD"] if "GET" in methods else [])])
        return route, params


class Dispatcher:
    """From a request to its answer: route, token, body, function; every error becomes a problem."""

    def __init__(self, api: Any, routes: Iterable[Route], auth: Auth, metrics: Metrics, writes: RateLimit | None = None):
        self._api, self._router, self._auth, self._metrics, self._writes = api, Router(routes), auth, metrics, writes

    def respond(self, request: Request, read_body: Callable[[int, bool], bytes]) -> Response:
        """`read_body(limit, is_public)` is called once path and token are accepted. Raises OSError where the client goes away."""
        begun = time.monotonic()
        try:
            if request.route is None:
                request.route, request.params = self._router.find(request.method, request.path)
            route = request.route
            if request.is_foreign and route.method != "GET":
                raise Forbidden("this call comes from another site's page")
            if route.scope is not Scope.PUBLIC:
                self._admit(request, route)
            if route.admit:
                route.admit(self._api, request)
            request.body = read_body(route.limit, route.scope is Scope.PUBLIC)
            if request.late and request.late > TOO_LATE.get(route.scope, math.inf):
                self._api.jobs.heard(request.principal)
                raise Unavailable("the controller has more to do than it can: try again later")
            made = route.function(self._api, request)
            response = answer(200, made) if isinstance(made, dict) else made
        except DeployBotError as error:
            response = problem_of(error)
        except OSError:
            raise
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            response = problem(500, "Internal error", "this is a fault of the controller: its log says more", {}, ())
        method, pattern = (request.method, request.route.pattern) if request.route else ("other", "none")
        labels = (method, pattern, response.status)
        self._metrics.observe("deploybot_http_request_duration_seconds", labels, time.monotonic() - begun)
        return response

    def _admit(self, request: Request, route: Route) -> None:
        """Raises what refuses a request before its body is read: Unauthorized, Forbidden, TooMany."""
        known = self._auth.find(request.digest) if request.digest else None
        if known is None or known != request.known:
            self._identify(request)
        if request.granted is not route:
            if not request.principal.may(route.scope):
                raise Forbidden(f"this call needs a token of the role {route.scope}; this one has {request.principal.scope}")
            if request.principal.app and not route.for_app:
                raise Forbidden(f"this token is for the app {request.principal.app} alone")
            request.granted = route
        if self._writes and route.method != "GET" and route.scope is not Scope.AGENT:
            self._writes.add(request.principal.name, "writes came with this token")

    def _identify(self, request: Request) -> None:
        request.known = request.granted = None
        is_local = functools.partial(is_from_here, request.peer, request.headers)
        request.principal = self._auth.principal(request.headers, request.address, is_local)
        if (token := bearer_token(request.headers)) is not None:
            request.digest = sha256(token)
            request.known = self._auth.find(request.digest)


@functools.lru_cache(maxsize=64)
def start_of(status: int, content_type: str, keep: bool, second: int) -> bytes:
    """The lines that many answers of one second share."""
    first = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nDate: {email.utils.formatdate(second, usegmt=True)}\r\n"
    fixed = "X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\n"
    kind = "" if status == 204 else f"Content-Type: {content_type}\r\n"
    return f"{first}{fixed}Connection: {'keep-alive' if keep else 'close'}\r\n{kind}".encode()


def header_value(value: str) -> str:
    """Raises ValueError where a value could start another header."""
    if any(char in value for char in "\r\n\0"):
        raise ValueError("a header value holds CR, LF or NUL")
    return value


def age_of_input(connection: socket.socket) -> float:
    """Seconds since its last bytes came: tcpi_last_data_recv, 52 bytes into Linux's tcp_info (tcp(7)), in milliseconds."""
    option = getattr(socket, "TCP_INFO", None)
    info = b"" if option is None else connection.getsockopt(socket.IPPROTO_TCP, option, 56)
    return struct.unpack_from("I", info, 52)[0] / 1000 if len(info) >= 56 else 0.0


def tls_context(cert: pathlib.Path, key: pathlib.Path) -> ssl.SSLContext:
    """TLS 1.2 and newer (the defaults of `ssl`) with this certificate. Raises OSError, of which ssl.SSLError is one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(cert, key, password=lambda: "")  # an encrypted key would ask at the terminal
    return context


class Handler(socketserver.BaseRequestHandler):
    """One connection: reads strictly, answers each request with one write, keeps the connection where both sides may."""

    request: socket.socket
    server: Any  # the Server below

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", IDLE_DEADLINE, 0))
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_DEADLINE, 0))
        self._is_tls = isinstance(self.request, ssl.SSLSocket)
        peer = self.client_address[0]
        self._peer = peer.removeprefix("::ffff:") if "." in peer else peer
        self._waiting = self.server.waiting
        self._buffer = b""  # what came after the last request
        self._free = -math.inf  # when that had its answer (monotonic): what came earlier lay behind it
        # The head of the last request, what stands behind its first line, and what they say.
        self._raw: bytes | None = None
        self._block: bytes | None = None
        self._line, self._headers = FirstLine("GET", "/", "", 1), HeaderBlock({}, 0, False, False)
        self._asked = self._request({})
        self._unread = self._reserved = 0  # bytes of the current body that nobody has read, and of the server's budget

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # a client that goes away is no error
            if self._is_tls:
                self._shake_hands()
            while self._serve_one():
                pass

    def _shake_hands(self) -> None:
        """In this thread, so that a client that says nothing keeps nobody else waiting. OpenSSL takes no notice of SO_RCVTIMEO, so
        a TLS connection always has a timeout."""
        self._waiting[self.request] = None
        self.request.settimeout(HEAD_DEADLINE)
        self.request.do_handshake()  # type: ignore[attr-defined]
        self.request.settimeout(SEND_DEADLINE)

    def finish(self) -> None:
        if self._is_tls:  # tells the reader that this is the end, and waits for no answer
            with contextlib.suppress(OSError, ValueError):
                self.request.settimeout(0)
                self.request.unwrap()  # type: ignore[attr-defined]

    def _serve_one(self) -> bool:
        try:
            self._waiting[self.request] = None
            with self.server.turnstile:
                pass
            raw = self._read_head()
            if raw is None:
                return False
            if raw != self._raw:
                self._parse(raw)
        except Refusal as error:
            refused = problem_of(error)
            self._send(refused, refused.body, keep=False)
            self._linger()
            return False
        request, self._unread = self._asked, self._headers.length
        request.late = self._age()
        try:
            response = self.server.dispatcher.respond(request, self._read_body)
        finally:
            request.body = b""
            if self._reserved:
                self._reserve(0)
        keep = not (self._headers.ends or not self._line.minor or self._unread or self.server.stopping)
        send = self._send if isinstance(response.body, bytes) else self._send_chunks
        send(response, response.body if request.method != "HEAD" else b"", keep)
        if self._unread:
            self._linger()
        return keep

    def _age(self) -> float:
        """Seconds that a request has lain unread in a crowd; those in which it lay behind the one before do not count."""
        is_crowded = len(self.server.open) > MANY
        return min(age_of_input(self.request), time.monotonic() - self._free) if is_crowded else 0.0

    def _parse(self, raw: bytes) -> None:
        """A head that is not that of the request before. Raises Refusal."""
        if len(raw) > MAX_LINE and max(map(len, raw.split(b"\r\n"))) > MAX_LINE:
            raise Refusal(431, f"a line of the head has more than {MAX_LINE} bytes")
        line, _, block = raw.partition(b"\r\n")
        self._line = parse_line(line)
        if block != self._block:
            self._headers, self._block = parse_headers(block), block
            self._asked = self._request(self._headers.values)
        if self._line.minor and "host" not in self._headers.values:
            raise Refusal(400, NO_HOST)
        self._asked.method, self._asked.path, self._asked.query_text, _ = self._line
        self._raw, self._asked.route = raw, None

    def _request(self, headers: dict[str, str]) -> Request:
        address, secure = forwarded(self._peer, headers, self.server.trusted)
        return Request("", "", "", headers, self._peer, address, secure or self._is_tls, self._connected, is_foreign(headers))

    def _read_head(self) -> bytes | None:
        """The head without its blank line; None where the client ended the connection or said nothing for too long."""
        data, deadline = self._buffer, 0.0
        while (end := data.find(b"\r\n\r\n")) < 0:
            if data:
                self._check_unfinished(data)
                deadline = deadline or time.monotonic() + HEAD_DEADLINE
            try:
                chunk = self._receive(16 * KIB, deadline) if deadline or self._is_tls else self.request.recv(16 * KIB)
            except TimeoutError:
                raise Refusal(408, f"the head did not come within {HEAD_DEADLINE:.0f} s") from None
            except BlockingIOError:  # idle for IDLE_DEADLINE
                return None
            if not chunk:
                return None
            data += chunk
        if end > MAX_HEAD:
            raise Refusal(431, f"the head has more than {MAX_HEAD} bytes")
        self._buffer = data[end + 4 :]
        return data[:end]

    @staticmethod
    def _check_unfinished(data: bytes) -> None:
        """Refuses what can no longer become a good head, without waiting for its end."""
        line, complete, _ = data.partition(b"\r\n")
        if len(data) > MAX_HEAD + 3 or len(line) > MAX_LINE:  # 3: the blank line may have begun
            raise Refusal(431, f"a head has at most {MAX_HEAD} bytes, and {MAX_LINE} a line")
        if BARE.search(data) or (complete and not REQUEST_LINE.fullmatch(line)):
            raise Refusal(400, "the request line must be METHOD /path HTTP/1.1, and lines end with CR LF")

    def _receive(self, size: int, deadline: float) -> bytes:
        """With a deadline (monotonic, 0 for none) raises TimeoutError; without, BlockingIOError after IDLE_DEADLINE, as recv() does
        by SO_RCVTIMEO where there is no TLS."""
        remaining = deadline - time.monotonic() if deadline else IDLE_DEADLINE
        if remaining <= 0:
            raise TimeoutError
        self.request.settimeout(remaining)
        try:
            return self.request.recv(size)
        except TimeoutError:
            raise TimeoutError if deadline else BlockingIOError from None
        finally:
            self.request.settimeout(SEND_DEADLINE if self._is_tls else None)

    def _read_body(self, limit: int, is_public: bool) -> bytes:
        """Raises TooLarge, Refusal at the deadline, ConnectionError where the client goes away."""
        if self._unread > limit:
            raise TooLarge(f"the body has {self._unread} bytes; {limit} are the most")
        body, self._buffer = self._buffer[: self._unread], self._buffer[self._unread :]
        if len(body) < self._unread:
            body = self._read_rest(bytearray(body), is_public)
        self._unread = 0
        self._waiting.pop(self.request, None)  # from now on it is we who work, or let it wait
        return body

    def _read_rest(self, body: bytearray, is_public: bool) -> bytes:
        if self._headers.expects and self._line.minor == 1:
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        deadline = time.monotonic() + BODY_DEADLINE
        while (missing := self._unread - len(body)) > 0:
            try:
                chunk = self._receive(min(missing, 256 * KIB), deadline)
            except TimeoutError:
                raise Refusal(408, f"the body did not come within {BODY_DEADLINE:.0f} s") from None
            if not chunk:
                raise ConnectionError("the client ended within its body")
            body += chunk
            if is_public and len(body) > FREE_BODY:
                self._reserve(len(body))
        return bytes(body)

    def _reserve(self, size: int) -> None:
        """Raises Unavailable where callers without a token would fill the memory."""
        with self.server.budget_lock:
            if self.server.budget < size - self._reserved:
                raise Unavailable("too many large bodies at once: send it again in a moment")
            self.server.budget -= size - self._reserved
            self._reserved = size

    def _connected(self) -> bool:
        """False once the client has ended its side."""
        try:
            if self._is_tls:  # its end comes behind a message of TLS, so there is something to read
                poll = select.poll()
                poll.register(self.request, getattr(select, "POLLRDHUP", 0))
                return not poll.poll(0)
            return self.request.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _start(self, response: Response, keep: bool, length: str) -> bytes:
        more = "".join(f"{name}: {header_value(value)}\r\n" for name, value in response.headers) if response.headers else ""
        start = start_of(response.status, response.content_type, keep, int(time.time()))
        return start + f"{length}{more}\r\n".encode("latin-1", "replace")

    def _send(self, response: Response, body: Any, keep: bool) -> None:
        length = "" if response.status == 204 else f"Content-Length: {len(response.body)}\r\n"  # type: ignore[arg-type]
        self._waiting[self.request], self._free = None, time.monotonic()  # who does not read may go
        try:
            self.request.sendall(self._start(response, keep, length) + body[:FREE_BODY])  # one write for nearly all
            if len(body) > FREE_BODY:
                self.request.sendall(memoryview(body)[FREE_BODY:])
        finally:
            if response.sent:
                response.sent()

    def _send_chunks(self, response: Response, body: Any, keep: bool) -> None:
        chunked = self._line.minor == 1
        head = self._start(response, keep and chunked, "Transfer-Encoding: chunked\r\n" if chunked else "")
        with contextlib.closing(response.body):  # type: ignore[type-var]
            self.request.sendall(head)
            try:
                for chunk in body:
                    self.request.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunked else chunk)
            except DeployBotError as error:  # too late for another answer: without its last chunk the reader knows
                raise ConnectionAbortedError(str(error)) from None
        self._free = time.monotonic()
        if chunked and body:
            self.request.sendall(b"0\r\n\r\n")

    def _linger(self) -> None:
        """Lets the answer arrive: to close with unread input would reset the connection and lose it."""
        self.finish()
        end_of(self.request, socket.SHUT_WR)
        self.request.settimeout(2.0)
        deadline, left = time.monotonic() + 2.0, MAX_PUSH
        while left > 0 and time.monotonic() < deadline and (chunk := socket.socket.recv(self.request, 64 * KIB)):
            left -= len(chunk)


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections, a thread each, and ends them all within STOP_DEADLINE at stop."""

    server_bind = socketserver.TCPServer.server_bind  # without the look-up of our own name in DNS that HTTPServer does
    request_queue_size = 16_384  # what the system allows of it: who finds it full would come again after a second, then three

    def __init__(self, address: tuple[str, int], dispatcher: Dispatcher, tls: ssl.SSLContext | None, trusted: tuple[Network, ...]):
        self.tls, self.trusted, self.dispatcher, self.stopping = tls, trusted, dispatcher, False
        self.budget = MAX_PUBLIC_BODIES
        self.budget_lock = threading.Lock()  # guards budget
        # Guards nothing: while process_request() holds it, no connection begins another request.
        self.turnstile, self._others_until = threading.Lock(), 0.0
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        # Guards open; stop() waits on it, each connection that ends wakes it.
        self._ended = threading.Condition()
        self.open: set[socket.socket] = set()
        # Connections that owe us a request or the reading of an answer, oldest first; each is put in and out by its own thread.
        self.waiting: dict[socket.socket, None] = {}
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._limit = sys.maxsize if files == resource.RLIM_INFINITY else max(16, files - SPARE_FILES)
        super().__init__(address, Handler)
        self.socket.setblocking(False)

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        connection.setblocking(True)  # not on every system does it differ from the socket that listens
        if self.tls:  # says nothing yet: the handshake is the worker's
            connection = self.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """With it, those that wait behind it. Of hundreds of threads that want the GIL the accepting one would nearly never get it,
        and a person not be heard; so the others stand still until it is done; in the long run for a tenth of the time, whoever connects."""
        begun = time.monotonic()
        is_ours = self._others_until - begun < RUSH
        with self.turnstile if is_ours else contextlib.nullcontext(), contextlib.suppress(OSError):
            self._begin(request, client_address)
            for _ in range(ACCEPTS if is_ours else 0):
                self._begin(*self.get_request())  # BlockingIOError: nobody waits any more
        if is_ours:
            now = time.monotonic()
            self._others_until = max(now, self._others_until) + 9 * (now - begun)

    def _begin(self, request: Any, client_address: Any) -> None:
        if self.connections() >= self._limit and not self._evict():
            super().shutdown_request(request)
            return
        with self._ended:
            self.open.add(request)
            # Kept when they go: a stop wakes up all that wait at once.
            sys.setswitchinterval(max(TURN, len(self.open) * TURN_MORE))
        try:
            threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True).start()
        except RuntimeError:  # no more threads: this client is sent away, and the next one finds room
            self._evict()
            self.shutdown_request(request)

    def _evict(self) -> bool:
        """Ends the connection that owes us something for longest; parked heartbeats and streams stay."""
        with contextlib.suppress(StopIteration, RuntimeError, OSError):  # it may end itself meanwhile
            oldest = next(iter(self.waiting))
            self.waiting.pop(oldest, None)
            end_of(oldest, socket.SHUT_RDWR)
            return True
        return False

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.waiting.pop(request, None)
        with self._ended:
            self.open.discard(request)
            self._ended.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("a connection failed")

    def connections(self) -> int:
        with self._ended:
            return len(self.open)

    def stop(self) -> None:
        """Ends the accepting, lets what is being answered be answered, and ends every connection."""
        self.stopping = True
        self.shutdown()
        self.server_close()
        with self._ended:
            # First an idle one ends at once, a working one after its answer; then those whose reader does not read.
            for side in (socket.SHUT_RD, socket.SHUT_RDWR):
                for connection in self.open:
                    with contextlib.suppress(OSError):
                        end_of(connection, side)
                self._ended.wait_for(lambda: not self.open, STOP_DEADLINE / 2)


# == Routes ============================================================================================================
# Owns the API: thin functions, then one table that shows every call and who may make it. Ignores how they are served.


def job_id(request: Request) -> str:
    """The id in the path, in its one spelling. Raises NotFound."""
    if not ID.fullmatch(request.params[0]):
        raise NotFound(f"no job {request.params[0][:100]}")
    return request.params[0]


@functools.lru_cache(maxsize=4096)
def heartbeat_of(body: bytes) -> Heartbeat:
    """An agent with nothing to do says the same again and again."""
    return Heartbeat.parse(load_json(body))


@functools.cache
def nothing_to_do(interval: int) -> Response:
    return answer(200, {"acknowledged": True, "job": None, "cancel": [], "interval": interval})


def answer_with(text: str, status: int = 200, **more: Any) -> Response:
    """`text`: the public JSON of a job."""
    rest = "," + dump(more)[1:] if more else "}"
    return Response(status, f'{{"job":{text}{rest}\n'.encode())


def made_of(plan: Plan, made: Made) -> Response:
    deployment = made.deployment.public() if made.deployment else None
    jobs = [job.public() for job in made.jobs]
    return answer(201, {"deployment": deployment, "created": made.created, "jobs": jobs, "skipped": [*plan.skipped, *made.skipped]})


def cookie_of(request: Request, secret: str, seconds: int) -> str:
    """RFC 6265. SameSite: no other site's page brings it along; HttpOnly: no script reads it."""
    return f"{COOKIE}={secret}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Strict{'; Secure' if request.secure else ''}"


def frame(event: Event, epoch: str) -> bytes:
    """An event as SSE, written once for all readers. JSON has no CR and no LF, so one data line holds it."""
    if event.frame is None:
        if event.kind != "log":
            text = f"id: {epoch}-{event.position}\nevent: {event.kind}\ndata: {event.data}\n\n"
        else:
            origin = {"job_id": event.job_id, "host": event.host, "app": event.app}
            lines = ((line["position"], dump({**origin, **line})) for line in event.log_lines())
            text = "".join(f"id: {epoch}-{position}\nevent: log\ndata: {data}\n\n" for position, data in lines)
        event.frame = text.encode()
    return event.frame


def asset(name: str) -> str:
    """A file from inside this one, else from beside it. Raises NotFound, which says what is missing."""
    path = pathlib.Path(__file__).resolve().parent / name
    try:
        return ASSETS[name] if name in ASSETS else path.read_text(encoding="utf-8")
    except OSError:
        raise NotFound(f"{name} is missing: put it at {path}, or run the dist/deploybot.py that `make dist` writes") from None


PROGRAMS = ("agent.py", "ctl.py")
ACCEPTS_OF_AGENTS = ("current",)  # fields of a heartbeat that came after the first agents: an agent sends what is named here
POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)


class Controller:
    """What the routes act on: all parts, built and recovered. Raises StartError."""

    def __init__(self, config: Config, apps: Apps, store: Store, tokens: Mapping[str, Principal], clock: Clock, pulse: float):
        self.config, self.apps, self.store, self.clock, self.pulse = config, apps, store, clock, pulse
        self.started = clock.monotonic()
        self.queue, self.metrics, self.hub = JobQueue(), Metrics(), EventHub(store.position)
        with database_errors(config.db):
            self.jobs = Jobs(store, self.queue, self.hub, apps, self.metrics, config, clock)
            self.deployments = Deployments(self.jobs)
            self.jobs.recover()
            self.auth = Auth(tokens, config.open, self.jobs.by_secret, store, clock)
        self.connections: Callable[[], int] = lambda: 0
        # Uploads are parsed one after another: each holds the GIL for milliseconds, and who else needs it would wait for all of them.
        self.parsing = threading.Lock()

    def register_agent(self, request: Request) -> Answer:
        asked = Registration.parse(request.json())
        enrols = request.principal.scope is Scope.AGENT and request.principal.host is None
        secret = new_secret() if enrols and asked.token_sha256 is None else None  # for an agent that makes none: told this once
        agent = self.jobs.register(asked, request.principal, secret)
        shown = {name: getattr(agent, name) for name in ("id", "hostname", "slots", "registered_at", "last_heartbeat", "session")}
        shown |= {"capabilities": json.loads(agent.capabilities), "status": "online", "accepts": ACCEPTS_OF_AGENTS}
        return {**shown, "token": secret} if secret else shown

    def heartbeat(self, request: Request) -> Answer:
        beat = heartbeat_of(request.body) if len(request.body) <= KIB else Heartbeat.parse(request.json())
        job, stops, interval = self.jobs.heartbeat(request.params[0], beat, request.principal, request.connected)
        if job is None and not stops:
            return nothing_to_do(interval)
        body = {"acknowledged": True, "job": job.for_agent() if job else None, "cancel": stops, "interval": interval}
        return answer(200, body, functools.partial(self.jobs.delivered, job) if job else None)

    def create_job(self, request: Request) -> Answer:
        job, created, warning = self.jobs.submit(JobRequest.parse(request.json()), request.principal)
        return answer_with(self.jobs.text(job), 201, created=created, **({"warning": warning} if warning else {}))

    def list_jobs(self, request: Request) -> Answer:
        f = request.query(("status", "host", "app", "repo", "deployment_id", "id", "before"), ("limit",))
        equal = {"status": f.choice("status", Status), "host": f.text("host", is_host, fold=True)}
        equal |= {"app": request.principal.sees(f.text("app", is_app)), "repo": f.text("repo", is_repo)}
        equal["deployment_id"] = f.text("deployment_id", is_id)
        starts = f.text("id", matches("[0-9a-f-]{1,36}", "the start of a job's id"), fold=True)
        before = f.text("before", is_id)
        limit = f.done(f.integer("limit", 1, 1000)) or 100
        wanted = {name: value for name, value in equal.items() if value}
        with self.store.read() as db:
            text, last, count = db.jobs(wanted, starts, before, limit)
            more = count == limit and db.jobs(wanted, starts, last, 1)[2] > 0
        return Response(200, f'{{"jobs":{text},"next":{dump(last if more else None)}}}\n'.encode())

    def visible_job(self, request: Request) -> str:
        """Its public JSON."""
        app, text = self.jobs.shown(job_id(request))
        request.principal.sees(app)
        return text

    def cancel_job(self, request: Request) -> Answer:
        return answer_with(self.jobs.text(self.jobs.cancel(job_id(request), request.principal)))

    def retry_job(self, request: Request) -> Answer:
        job, created = self.jobs.retry(job_id(request), request.principal)
        return answer_with(self.jobs.text(job), 201, created=created)

    def create_deployment(self, request: Request) -> Answer:
        asked = DeploymentRequest.parse(request.json()).check()
        if asked.dry_run:
            plan = self.deployments.plan(asked, request.principal)
            return plan.public(self.jobs.locks.get(plan.app.name), self.deployments.running(plan))
        return made_of(*self.deployments.create(asked, request.principal))

    def list_deployments(self, request: Request) -> Answer:
        f = request.query(("app", "status", "id", "before"), ("limit",))
        equal = {"app": request.principal.sees(f.text("app", is_app)), "status": f.choice("status", State)}
        starts = f.text("id", matches("[0-9a-f-]{1,36}", "the start of a deployment's id"), fold=True)
        before = f.text("before", is_id)
        limit = f.done(f.integer("limit", 1, 1000)) or 100
        wanted = {name: value for name, value in equal.items() if value}
        with self.store.read() as db:
            found = db.deployments(wanted, starts, before, limit + 1)
        shown = [deployment.public() for deployment in found[:limit]]
        return {"deployments": shown, "next": shown[-1]["id"] if len(found) > limit else None}

    def read_deployment(self, request: Request) -> Answer:
        with self.store.read() as db:
            deployment = db.deployment(request.params[0])
        request.principal.sees(deployment.app)
        return {"deployment": deployment.public()}

    def cancel_deployment(self, request: Request) -> Answer:
        return {"deployment": self.deployments.cancel(request.params[0], request.principal).public()}

    def retry_deployment(self, request: Request) -> Answer:
        return made_of(*self.deployments.retry(request.params[0], request.principal))

    def hook(self, request: Request) -> Answer:
        asked = HookRequest.parse(request.json())
        return made_of(*self.deployments.hook(request.params[0], asked, request.principal))

    def list_deliveries(self, request: Request) -> Answer:
        f = request.query(("repo", "before"), ("limit",))
        repo, before = f.text("repo", is_repo), f.text("before", is_delivery)
        limit = f.done(f.integer("limit", 1, 1000)) or 100
        with self.store.read() as db:
            found = db.deliveries(repo, before, limit + 1)
        return {"deliveries": found[:limit], "next": found[limit - 1]["id"] if len(found) > limit else None}

    def read_delivery(self, request: Request) -> Answer:
        with self.store.read() as db:
            for delivery in db.deliveries(None, None, 1, request.params[0]):
                return {"delivery": delivery}
        raise NotFound(f"no delivery {request.params[0][:100]}: they are kept for {DELIVERY_DAYS} days")

    def lock_app(self, request: Request) -> Answer:
        lock = self.deployments.lock(request.params[0], LockRequest.of(request.json()), request.principal)
        return {"lock": lock._asdict()}

    def unlock_app(self, request: Request) -> Answer:
        going_on = self.deployments.unlock(request.params[0], request.principal)
        return {"app": request.params[0], "unlocked": True, "deployments": going_on}

    def append_logs(self, request: Request) -> Answer:
        with self.parsing:
            upload = LogUpload.parse(request.json())
        next_offset, cancel = self.jobs.append_logs(job_id(request), upload, request.principal, b"\\" not in request.body)
        return {"next_offset": next_offset, "cancel": cancel}

    def log_text(self, job: str, after: int | None) -> Iterator[bytes]:
        while after is not None:
            lines, after = self.jobs.log_lines(job, after, 1000)
            if lines:
                yield "".join(line["message"] + "\n" for line in lines).encode()

    def read_logs(self, request: Request) -> Answer:
        self.visible_job(request)  # or NotFound, or Forbidden
        f = request.query((), ("after", "limit"))
        after = f.integer("after", 0, 1 << 53) or 0
        limit = f.done(f.integer("limit", 1, 10_000)) or 1000
        if "text/plain" in request.headers.get("accept", ""):
            return Response(200, self.log_text(request.params[0], after), "text/plain; charset=utf-8")
        lines, following = self.jobs.log_lines(request.params[0], after, limit)
        return {"lines": lines, "next": following}

    def report_result(self, request: Request) -> Answer:
        return answer_with(self.jobs.text(self.jobs.finish(job_id(request), Result.parse(request.json()), request.principal)))

    def create_token(self, request: Request) -> Answer:
        token, secret = self.auth.create(TokenRequest.parse(request.json()).check(), request.principal)
        warning = self.apps.lacks(token.app)
        return answer(201, {"token": token.public(), "secret": secret, **({"warning": warning} if warning else {})})

    def who_asks(self, request: Request, principal: Principal | None = None, cookie: str = "") -> Response:
        who = principal or request.principal
        shown = {"name": who.name, "role": who.scope, "app": who.app, "host": who.host, "expires_at": self.auth.expiry(who)}
        return answer(200, shown, headers=(("Set-Cookie", cookie),) if cookie else ())

    def sign_in(self, request: Request) -> Answer:
        f = Fields(request.json(), {"token"})
        text = f.done(f.text("token", lambda text: None if text.strip() else "must not be empty", required=True))
        token, secret = self.auth.sign_in(text.strip(), request.address)
        return self.who_asks(request, token.principal(), cookie_of(request, secret, SESSION_LIFETIME))

    def sign_out(self, request: Request) -> Answer:
        with contextlib.suppress(Unauthorized):  # it ran out already
            self.auth.sign_out(self.auth.principal(request.headers, request.address, lambda: False))
        return Response(200, b"{}\n", headers=(("Set-Cookie", cookie_of(request, "", 0)),))

    def list_audit(self, request: Request) -> Answer:
        f = request.query(("who", "action"), ("limit", "before"))
        equal = {name: f.text(name, lambda text: None if len(text) <= 200 else "is too long") for name in ("who", "action")}
        before = f.integer("before", 1, 1 << 53)
        limit = f.done(f.integer("limit", 1, 1000)) or 100
        with self.store.read() as db:
            rows = db.audit({name: value for name, value in equal.items() if value}, before, limit + 1)
        return {"audit": rows[:limit], "next": rows[limit - 1]["id"] if len(rows) > limit else None}

    def list_hosts(self, request: Request) -> Answer:
        f = request.query(("after",), ("limit",))
        after = f.text("after", is_host, fold=True) or ""
        limit = f.done(f.integer("limit", 1, 1000)) or 100
        hosts = self.jobs.hosts(after, limit + 1)
        return {"hosts": hosts[:limit], "next": hosts[limit - 1]["hostname"] if len(hosts) > limit else None}

    def list_apps(self, request: Request) -> Answer:
        """A page has so many hosts: an app that it cannot hold goes on in the next."""
        f = request.query(("after",), ("limit",))
        after = f.text("after", matches("[a-z0-9][a-z0-9._-]*(?:/[a-z0-9][a-z0-9.-]*)?", "an app, or app/host")) or ""
        limit = f.done(f.integer("limit", 1, 1000)) or 100
        places = self.apps.places(after, request.principal.app, self.jobs.hosts_of)
        page = list(itertools.islice(places, limit))
        with self.store.read() as db:
            releases = db.releases([(app.name, host) for app, host in page])
        shown: list[dict[str, Any]] = []
        fields = ("name", "repo", "clone_url", "deploy_on_push", "branches")  # no commands: they may hold secrets
        for app, hosts in itertools.groupby(page, key=lambda place: place[0]):
            runs = [{**next(releases), "actual": self.jobs.runs(host, app.name)} for _, host in hosts]
            lock, strategy = self.jobs.locks.get(app.name), dataclasses.asdict(app.strategy)
            more = {"labels": app.labels, "strategy": strategy, "lock": lock and lock._asdict(), "hosts": runs}
            shown.append({**{name: getattr(app, name) for name in fields}, **more})
        is_last = next(places, None) is None
        return {"apps": shown, "next": None if is_last else f"{shown[-1]['name']}/{shown[-1]['hosts'][-1]['hostname']}"}

    def reload_apps(self, request: Request) -> Answer:
        try:
            found = read_apps(self.apps.path)
        except OSError as error:
            raise Unavailable(f"{self.apps.path} cannot be read: {error.strerror}; the mapping in force stays") from None

        def do(tx: Tx) -> None:
            tx.audited(self.clock.stamp(), request.principal, "reload", str(self.apps.path), f"{len(found)} apps")
            tx.after(setattr, self.apps, "all", found)
            tx.after(self.hub.touch)

        self.store.write(do)
        return {"apps": len(found), "message": f"{self.apps.path} is in force"}

    def sse(self, wanted: EventFilter, position: int, changes: int, gap: str | None, principal: Principal) -> Iterator[bytes]:
        """The body of a stream: https://html.spec.whatwg.org/multipage/server-sent-events.html"""
        yield f"retry: 2000\nid: {self.jobs.epoch}-{position}\n\n".encode()  # who loses us before the first event comes back here
        if gap:
            yield f"event: gap\ndata: {dump({'detail': gap})}\n\n".encode()
        for reached, events, is_changed in self.jobs.follow(wanted, position, changes, self.pulse):
            if not self.auth.still(principal):  # revoked meanwhile
                return
            frames = b"".join(frame(event, self.jobs.epoch) for event in events)
            yield frames or f": nothing new\nid: {self.jobs.epoch}-{reached}\n\n".encode()
            if is_changed and wanted.host is wanted.job_id is None:
                yield b"event: change\ndata: {}\n\n"
            for event in events if wanted.job_id is not None else ():
                status = json.loads(event.data)["status"] if event.kind == "job" else None
                if status in ENDED:
                    yield f"event: end\ndata: {dump({'job_id': event.job_id, 'status': status})}\n\n".encode()
                    return

    def stream_logs(self, request: Request) -> Answer:
        f = request.query(("host", "app", "job_id"), ("tail",))
        host, app = f.text("host", is_host, fold=True), request.principal.sees(f.text("app", is_app))
        wanted = EventFilter(host, app, f.text("job_id", is_id))
        tail = f.done(f.integer("tail", 0, 1000))
        if wanted.job_id is not None:
            request.principal.sees(self.jobs.shown(wanted.job_id)[0])
        changes = self.hub.changes  # before the head is sent: who has it reads hosts and apps, and is to miss nothing after
        position, gap = self.jobs.stream_start(wanted, request.headers.get("last-event-id"), 50 if tail is None else tail)
        if position is None:
            return Response(204)
        chunks = self.sse(wanted, position, changes, gap, request.principal)
        return Response(200, chunks, "text/event-stream", (("X-Accel-Buffering", "no"),))  # nginx would gather it in its buffer

    def webhook_secrets(self) -> set[str]:
        return {*secrets_in(self.config.webhook_secret), *(one for app in self.apps.all for one in app.webhook_secrets)}

    def admit_webhook(self, request: Request) -> None:
        """Refuses what cannot be signed well, before 25 MiB of it are read."""
        known = self.webhook_secrets()
        if known and signature_in(request.headers):
            return
        self.metrics.count("deploybot_webhook_deliveries_total", 'outcome="refused"')
        why = "missing, malformed or not that of other headers: is a secret set in GitHub's settings?"
        raise Unauthorized(f"X-Hub-Signature-256 is {why}" if known else "no DEPLOYBOT_WEBHOOK_SECRET is set: no push is taken")

    def github_webhook(self, request: Request) -> Answer:
        signature = signature_in(request.headers)
        signers = signers_of(request.body, signature, self.webhook_secrets())
        if not signers:
            self.metrics.count("deploybot_webhook_deliveries_total", 'outcome="refused"')
            raise Unauthorized("X-Hub-Signature-256 does not match the body: is the secret in GitHub's settings the same?")
        kind = sent(request.headers, "event", "push")
        data = push_payload(request.body, request.headers.get("content-type", "")) if kind in ("push", "create") else None
        if kind != "push" and (data := push_of(data, kind)) is None:
            message = "pong" if kind == "ping" else f"ignored: the event is {kind[:100]}, not push"
            return {"received": True, "jobs_created": [], "message": message}
        push = Push.parse(data)
        guid = sent(request.headers, "delivery", "")
        guid = signature.removeprefix("sha256=")[:40] if is_delivery(guid) else guid  # what no path could name is none
        made, message = self.deployments.push(push, guid, signature, signers, request.address)
        self.metrics.count("deploybot_webhook_deliveries_total", f'outcome="{"deployed" if made else "ignored"}"')
        return {"received": True, "jobs_created": made, "message": message}

    def health(self, request: Request) -> Answer:
        status, said, database = 200, "ok", "ok"
        try:
            with self.store.read() as db:
                db.meta("epoch")
        except Unavailable as error:
            status, said, database = 503, "error", str(error)
        uptime = round(self.clock.monotonic() - self.started, 3)
        return answer(status, {"status": said, "version": VERSION, "uptime": uptime, "database": database})

    def list_programs(self, request: Request) -> Answer:
        """For anyone, as the files are: a machine that is to get one has no token yet. What is not there is left out."""
        shown = []
        for name in PROGRAMS:
            with contextlib.suppress(NotFound):
                data = asset(name).encode()
                shown.append({"name": name, "sha256": hashlib.sha256(data).hexdigest(), "size": len(data)})
        return {"version": VERSION, "programs": shown}

    def scrape(self, request: Request) -> Answer:
        uptime = self.clock.monotonic() - self.started
        gauges = {**self.jobs.gauges(), "deploybot_http_connections": self.connections(), "deploybot_uptime_seconds": uptime}
        return Response(200, self.metrics.text(gauges).encode(), "text/plain; version=0.0.4; charset=utf-8")


def on_host(action: str, **columns: Any) -> Callable[[Controller, Request], Answer]:
    """A route that changes these columns of the host's agent."""
    return lambda api, request: {"host": api.jobs.change_host(request.params[0].lower(), request.principal, action, **columns)}


def file(name: str, content_type: str = "text/html; charset=utf-8") -> Callable[[Controller, Request], Response]:
    """A page's one script and one style carry a nonce; nothing else may run or load."""

    def show(api: Controller, request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        page = (("Content-Security-Policy", POLICY.format(nonce)), ("Referrer-Policy", "no-referrer"))
        text = asset(name).replace("{{nonce}}", nonce)
        return Response(200, text.encode(), content_type, page if name.endswith(".html") else ())

    return show


ROUTES = [
    Route("POST", "/v1/agents/register", Scope.AGENT, Controller.register_agent),
    Route("POST", "/v1/agents/{id}/heartbeat", Scope.AGENT, Controller.heartbeat),
    Route("POST", "/v1/jobs", Scope.OPERATOR, Controller.create_job, for_app=True),
    Route("GET", "/v1/jobs", Scope.VIEWER, Controller.list_jobs, for_app=True),
    Route("GET", "/v1/jobs/{id}", Scope.VIEWER, lambda api, r: answer_with(api.visible_job(r)), for_app=True),
    Route("POST", "/v1/jobs/{id}/cancel", Scope.OPERATOR, Controller.cancel_job, for_app=True),
    Route("POST", "/v1/jobs/{id}/retry", Scope.OPERATOR, Controller.retry_job, for_app=True),
    Route("POST", "/v1/jobs/{id}/logs", Scope.AGENT, Controller.append_logs),
    Route("GET", "/v1/jobs/{id}/logs", Scope.VIEWER, Controller.read_logs, for_app=True),
    Route("POST", "/v1/jobs/{id}/result", Scope.AGENT, Controller.report_result),
    Route("GET", "/v1/logs/stream", Scope.VIEWER, Controller.stream_logs, for_app=True),
    Route("GET", "/v1/hosts", Scope.VIEWER, Controller.list_hosts),
    Route("POST", "/v1/hosts/{hostname}/drain", Scope.OPERATOR, on_host("host.drain", drained=1)),
    Route("POST", "/v1/hosts/{hostname}/resume", Scope.OPERATOR, on_host("host.resume", drained=0)),
    Route("POST", "/v1/hosts/{hostname}/reset", Scope.ADMIN, on_host("host.reset", token_sha256=None, session="")),
    Route("DELETE", "/v1/hosts/{hostname}", Scope.ADMIN, lambda api, r: api.jobs.remove_host(r.params[0].lower(), r.principal)),
    Route("GET", "/v1/apps", Scope.VIEWER, Controller.list_apps, for_app=True),
    Route("PUT", "/v1/apps/{app}/lock", Scope.OPERATOR, Controller.lock_app, for_app=True),
    Route("DELETE", "/v1/apps/{app}/lock", Scope.OPERATOR, Controller.unlock_app, for_app=True),
    Route("POST", "/v1/deployments", Scope.OPERATOR, Controller.create_deployment, for_app=True),
    Route("GET", "/v1/deployments", Scope.VIEWER, Controller.list_deployments, for_app=True),
    Route("GET", "/v1/deployments/{id}", Scope.VIEWER, Controller.read_deployment, for_app=True),
    Route("POST", "/v1/deployments/{id}/cancel", Scope.OPERATOR, Controller.cancel_deployment, for_app=True),
    Route("POST", "/v1/deployments/{id}/retry", Scope.OPERATOR, Controller.retry_deployment, for_app=True),
    Route("POST", "/v1/hooks/{app}", Scope.OPERATOR, Controller.hook, for_app=True),
    Route("GET", "/v1/deliveries", Scope.VIEWER, Controller.list_deliveries),
    Route("GET", "/v1/deliveries/{id}", Scope.VIEWER, Controller.read_delivery),
    Route("POST", "/v1/reload", Scope.ADMIN, Controller.reload_apps),
    Route("POST", "/v1/tokens", Scope.ADMIN, Controller.create_token),
    Route("GET", "/v1/tokens", Scope.ADMIN, lambda api, _: {"tokens": [token.public() for token in api.auth.tokens()]}),
    Route("DELETE", "/v1/tokens/{id}", Scope.ADMIN, lambda api, r: {"token": api.auth.revoke(r.params[0], r.principal).public()}),
    Route("GET", "/v1/session", Scope.ANY, Controller.who_asks, for_app=True),
    Route("POST", "/v1/session", Scope.PUBLIC, Controller.sign_in, 4 * KIB),
    Route("DELETE", "/v1/session", Scope.PUBLIC, Controller.sign_out),
    Route("GET", "/v1/audit", Scope.ADMIN, Controller.list_audit),
    Route("POST", "/v1/webhooks/github", Scope.PUBLIC, Controller.github_webhook, MAX_PUSH, Controller.admit_webhook),
    Route("GET", "/v1/programs", Scope.PUBLIC, Controller.list_programs),
    Route("GET", "/health", Scope.PUBLIC, Controller.health),
    Route("GET", "/metrics", Scope.VIEWER, Controller.scrape),
    Route("GET", "/", Scope.PUBLIC, file("www/dashboard.html")),
    Route("GET", "/docs", Scope.PUBLIC, file("www/docs.html")),
    Route("GET", "/redoc", Scope.PUBLIC, file("www/docs.html")),
    Route("GET", "/openapi.json", Scope.PUBLIC, file("openapi.json", "application/json")),
    Route("GET", "/agent.py", Scope.PUBLIC, file("agent.py", "text/x-python; charset=utf-8")),
    Route("GET", "/ctl.py", Scope.PUBLIC, file("ctl.py", "text/x-python; charset=utf-8")),
]


# == Main ==============================================================================================================
# Owns arguments, admin verbs, logging, signals, and the order of start and stop. Ignores the rest.


class LogFormat(logging.Formatter):
    """A line a record, plain or JSON; control characters are escaped, so that no input can forge a line."""

    def __init__(self, as_json: bool):
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        at, message = rfc3339(record.created), record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        if self._as_json:
            return json.dumps({"time": at, "level": record.levelname, "message": message})
        shown = "".join(char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in message)
        return f"{at} {record.levelname:<7} " + (shown if record.exc_info else shown.replace("\n", "\\n"))


def tokens_of(config: Config) -> dict[str, Principal]:
    """Token to principal: the configured ones; without an admin's, the one in admin.token, which a closed first start makes."""
    path = config.db.parent / "admin.token"
    admin = config.token or (first_token(path) if not config.open or path.exists() else None)
    named = ("reader", Scope.VIEWER, config.read_token), ("agents", Scope.AGENT, config.agent_token), ("admin", Scope.ADMIN, admin)
    return {token: Principal(name, role) for name, role, token in named if token}


def notify(*lines: str) -> None:
    """Tells systemd, where it started this process (sd_notify(3)). What it does not hear is no error."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        if address:
            systemd.sendto("\n".join(lines).encode(), re.sub("^@", "\0", address))


def tls_of(config: Config) -> ssl.SSLContext | None:
    """Raises StartError."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    try:
        return tls_context(config.tls_cert, config.tls_key)
    except OSError as error:  # of ssl, too
        names = f"--tls-cert {config.tls_cert} --tls-key {config.tls_key}"
        raise StartError(f"{names}: {error.strerror or error} (they must be a pair, in PEM)") from None


def apps_of(path: pathlib.Path) -> tuple[App, ...]:
    """Raises StartError with every mistake and its line."""
    try:
        return read_apps(path)
    except OSError as error:
        raise StartError(f"{path}: {error.strerror}") from None
    except AppsError as error:
        raise StartError(*(f"{path}:{line}: {message}" for line, message in error.problems)) from None


class Daemon(Controller):
    """The controller as a process: serves, sweeps, stops."""

    def __init__(self, config: Config, clock: Clock | None = None, pulse: float = PULSE):
        apps = Apps(config.apps)
        if config.apps.exists():
            apps.all = apps_of(config.apps)
        else:
            log.warning("%s is not there: no push deploys anything until it is, and is reloaded", config.apps)
        store = Store(config.db, lambda: notify(f"EXTEND_TIMEOUT_USEC={MIGRATION_LIMIT * 1_000_000}"), config.replicated)
        super().__init__(config, apps, store, tokens_of(config), clock or Clock(), pulse)
        self._swept = self.started
        writes = RateLimit(config.rate_limit, self.clock) if config.rate_limit else None
        dispatcher = Dispatcher(self, ROUTES, self.auth, self.metrics, writes)
        try:
            self.server = Server((config.host, config.port), dispatcher, tls_of(config), config.trusted_proxy)
        except OSError as error:
            hint = "; choose another --port" if error.errno == errno.EADDRINUSE else ""
            raise StartError(f"--host {config.host} --port {config.port}: {error.strerror}{hint}") from None
        self.port = self.server.server_address[1]
        self.connections = self.server.connections

    def start(self, poll_interval: float = 0.5) -> None:
        threading.stack_size(STACK)
        threading.Thread(target=self.server.serve_forever, args=(poll_interval,), daemon=True).start()
        mode = "open: requests from this machine need no token" if self.config.open else "closed"
        here = "localhost" if self.config.host in ("0.0.0.0", "::") else self.config.host
        url = f"{'https' if self.server.tls else 'http'}://{f'[{here}]' if ':' in here else here}:{self.port}"
        log.info("DeployBot %s listens on %s port %s (%s): %s", VERSION, self.config.host, self.port, mode, url)

    def reload(self) -> None:
        """On SIGHUP. A file with a mistake changes nothing."""
        try:
            self.server.tls = tls_of(self.config)
        except StartError as error:
            log.error("%s: the certificate in force stays", error)
        try:
            self.apps.all = apps_of(self.config.apps)
            self.hub.touch()
            log.info("%s is in force: %d apps", self.config.apps, len(self.apps.all))
        except StartError as error:
            for problem in error.problems:
                log.error("%s (the mapping in force stays)", problem)

    def sweep(self) -> bool:
        """False after a fault of ours. A database that cannot be written is none: it is not cured by a restart."""
        now = self.clock.monotonic()
        away, self._swept = now - self._swept, now
        try:
            if away > LONG_SWEEP:
                self.jobs.excuse(away)
            self.jobs.sweep()
            self.deployments.sweep()
            self.auth.sweep()
        except Unavailable as error:
            log.error("sweep: %s", error)
        except Exception:
            log.exception("sweep")
            return False
        return True

    def stop(self) -> None:
        """Parked heartbeats are answered, streams end, what is known goes to the database."""
        self.server.stopping = True  # who is answered is not waited for again
        self.queue.close()
        self.hub.close()
        self.server.stop()
        with contextlib.suppress(Unavailable):
            self.jobs.flush_contacts()
            self.auth.sweep(every=0)
        self.store.close()
        log.info("stopped")


def watchdog(env: Mapping[str, str]) -> float:
    """Seconds within which systemd wants a sign of life of this process; infinite where it wants none (sd_watchdog_enabled(3))."""
    allowed = env.get("WATCHDOG_USEC", "")
    ours = env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(allowed) / 1e6 if ours and re.fullmatch(r"[1-9][0-9]{0,17}", allowed) else math.inf


def run(daemon: Daemon, signals: int) -> None:
    """Sweeps and acts on signals; returns on SIGTERM or SIGINT."""
    limit = watchdog(os.environ)
    while True:
        ready, _, _ = select.select([signals], [], [], min(1.0, limit / 3))
        received = os.read(signals, 64) if ready else b""
        if signal.SIGHUP in received:
            notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
            daemon.reload()
            notify("READY=1")
        if signal.SIGTERM in received or signal.SIGINT in received:
            return
        if daemon.sweep() and limit < math.inf:
            notify("WATCHDOG=1")


def stay_on_one_core() -> None:
    """Of several threads Python runs one. On several cores each change of thread would go from one core to another, which takes
    longer than what a thread does meanwhile: with all on one core twice as many heartbeats are answered (docs/capacity.md)."""
    with contextlib.suppress(AttributeError, OSError):  # not on every system, and a sandbox may refuse it
        os.sched_setaffinity(0, {secrets.choice(sorted(os.sched_getaffinity(0)))})


def serve(config: Config, _: pathlib.Path) -> int:
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormat(config.log_format == "json"))
    log.addHandler(handler)
    log.setLevel(config.log_level)
    os.umask(0o077)  # the database holds commands, which may hold secrets
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each agent that waits holds a connection
    signals, writer = os.pipe()  # a handler does nothing but write its number, which run() reads
    os.set_blocking(writer, False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: os.write(writer, bytes([number])))
    stay_on_one_core()
    gc.disable()  # what is made now stays
    daemon = Daemon(config)
    daemon.start()
    gc.freeze()  # so that no collection has to walk through a queue of 100,000 jobs
    gc.enable()
    notify("READY=1")
    run(daemon, signals)
    notify("STOPPING=1")
    daemon.stop()
    return 0


def told(path: pathlib.Path, schema: int, jobs: int, agents: int) -> str:
    return f"{path}: {path.stat().st_size / MIB:.1f} MiB, {jobs} jobs, {agents} agents, schema {schema}"


def backup(config: Config, file: pathlib.Path) -> int:
    print(told(file, *copy_database(config.db, file)))
    return 0


def restore(config: Config, file: pathlib.Path) -> int:
    os.umask(0o077)
    kept = config.db.with_name(f"{config.db.name}.before-restore-{Clock().stamp().replace(':', '')}")
    facts = restore_database(file, config.db, kept)
    print(told(config.db, *facts) + (f"\nwhat was there before is kept as {kept}" if kept.exists() else ""))
    print("Now start the controller: jobs that waited are cancelled, agents register anew, those that still run go on.")
    print("Tokens and secrets of hosts are as they were then: see ctl.py token list, ctl.py hosts.")
    return 0


Finding = tuple[str, str]  # ok, warn or FAIL; what it is and, where it is not ok, what to do


def judged(good: bool, what: str, cure: str, level: str = "warn") -> Finding:
    return ("ok", what) if good else (level, f"{what}: {cure}")


def look_at_database(config: Config) -> Iterator[Finding]:
    yield "ok", f"DeployBot {VERSION}, Python {sys.version.split()[0]}, SQLite {SQLITE}: let no other program write to its database"
    folder = next(path for path in config.db.absolute().parents if path.exists())
    disk, size = os.statvfs(folder), config.db.stat().st_size if config.db.exists() else 0
    free, wanted = disk.f_bavail * disk.f_frsize // MIB, size // MIB + 256
    yield judged(free >= wanted, f"{free} MiB are free in {folder}", f"make room, a migration takes up to {wanted}")
    if not config.db.exists():
        yield "warn", f"{config.db} is not there: the next start makes a new one, or {RESTORE}"
        return
    try:
        lock_database(config.db).close()
        yield "ok", "no controller runs on it"
    except StartError:
        yield "ok", "a controller runs on it"
    schema, jobs, agents = examine(config.db)
    yield "ok", told(config.db, schema, jobs, agents)
    if config.replicated:
        version = tuple(map(int, SQLITE.split(".")))
        mended = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
        yield judged(mended, f"SQLite {SQLITE} beside Litestream's", "has the WAL-reset bug, update both (docs/capacity.md)")
        waits = sum(path.stat().st_size for path in folder.glob(f"{config.db.name}-wal")) // MIB
        yield judged(waits < 1024, f"{waits} MiB of the WAL wait for Litestream", "see that it runs: systemctl status litestream")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    enough = files == resource.RLIM_INFINITY or files >= 2 * (agents + SPARE_FILES)
    yield judged(enough, f"{files} descriptors for {agents} agents", "raise LimitNOFILE= of the unit, or ulimit -Hn")


def look_at_files(config: Config) -> Iterator[Finding]:
    folder = config.db.parent
    secret = [os.environ.get(f"{secret.variable}_FILE") or "" for secret in SECRETS.values()]
    for path in filter(os.path.exists, [str(config.db), str(folder / "admin.token"), str(config.tls_key or ""), *secret]):
        mode = os.stat(path).st_mode & 0o777
        yield judged(not mode & 0o027, f"{path} has the mode {mode:o}", f"others can read it, chmod 600 {path}", "FAIL")
    for path in filter(os.path.exists, [str(folder), *(f"{config.db}{end}" for end in ("", ".lock", *BESIDE))]):
        if os.stat(path).st_mode & 0o022:
            yield "FAIL", f"{path} can be changed by others: chmod go-w {path}"
        if os.stat(path).st_uid != folder.stat().st_uid:
            yield "FAIL", f"{path} belongs to another user than its folder: chown --reference={folder} {path}"


def look_at_settings(config: Config) -> Iterator[Finding]:
    """Whether secrets are set and long enough; never what they are."""
    for secret in SECRETS.values():
        value = secrets_in(getattr(config, secret.field))
        what = f"{secret.variable} is {'set' if value else 'not set'} ({secret.help})"
        yield judged(min(map(len, value), default=99) >= SHORT_SECRET, what, "short, take openssl rand -hex 32")
    if config.open:
        yield "warn", "--open: who is on this machine may do everything; never behind a proxy"
    if not config.apps.exists():
        yield "warn", f"{config.apps} is not there: no push deploys anything"
        return
    apps = apps_of(config.apps)
    deaf = [app.name for app in apps if app.deploy_on_push and not app.webhook_secrets and not config.webhook_secret]
    what = f"{config.apps} has {len(apps)} apps"
    yield judged(not deaf, what, f"set DEPLOYBOT_WEBHOOK_SECRET, or pushes for {', '.join(deaf)} are refused")


def look_at_tls(config: Config) -> Iterator[Finding]:
    if tls_of(config) is None or config.tls_cert is None:
        yield "ok", "no --tls-cert: plain HTTP, for this machine or behind a proxy that has TLS"
        return
    pem = re.search(f"{ssl.PEM_HEADER}.+?{ssl.PEM_FOOTER}", config.tls_cert.read_text(), re.DOTALL)
    der = ssl.PEM_cert_to_DER_cert(pem[0] if pem else "")
    end = re.search(rb"Z(?:\x17\r|\x18\x0f)(\d+)Z", der)  # the second of two times, without its century up to 2049 (RFC 5280)
    last = datetime.datetime.strptime(f"20{end[1].decode() if end else ''}"[-14:] + "+0000", "%Y%m%d%H%M%S%z")
    days = int((last.timestamp() - time.time()) // 86400)
    yield judged(days >= 14, f"{config.tls_cert} is good for {days} days", "renew it, then SIGHUP", "warn" if days >= 0 else "FAIL")


def doctor(config: Config, _: pathlib.Path) -> int:
    """1 where something has to be mended."""
    found: list[Finding] = []
    for look in (look_at_database, look_at_files, look_at_settings, look_at_tls):
        try:
            found.extend(look(config))
        except (StartError, OSError, ValueError) as error:
            found += [("FAIL", line) for line in str(error).splitlines()]
    print(*(f"{level:<5}{text}" for level, text in found), sep="\n")
    return int(any(level == "FAIL" for level, _ in found))


def as_duration(seconds: float) -> str:
    """As apps.yaml says it: 5m for 300."""
    unit = next((unit for unit in "dhms" if seconds % TIMES[unit] == 0), "ms")
    return f"{round(seconds / TIMES[unit])}{unit}"


def listed(words: Sequence[str], room: int) -> str:
    """With commas between; those without room are counted."""
    shown, text = list(words[:room]), ", ".join(words)
    while len(text) > room and len(shown) > 1:
        shown.pop()
        text = f"{', '.join(shown)} and {len(words) - len(shown)} more"
    return text


def steps_of(app: App) -> str:
    """What its strategy does, in words; of labels nobody knows yet how many hosts they are."""
    strategy, share = app.strategy, f" ({app.strategy.batch})" if isinstance(app.strategy.batch, str) else ""
    number = strategy.size(len(app.hosts))
    batch = f"{number} host{'' if number == 1 else 's'} at a time{share}"
    if share and app.labels:
        batch = f"{strategy.batch} of the hosts at a time"
    if strategy.batch == "100%":
        batch = "all others at once" if strategy.canary else "all hosts at once"
    pause = f"{as_duration(strategy.pause)}, " if strategy.pause else ""
    return f"canary {strategy.canary}, {pause}then {batch}" if strategy.canary else batch


def filters_of(app: App) -> Iterator[tuple[str, str]]:
    if not app.deploy_on_push:
        yield "deploys", "only when asked"
        return
    default = () if app.tags else ("the default branch",)
    branches, tags = ", ".join(default if app.branches is None else app.branches), ", ".join(app.tags)
    yield "deploys", "; ".join(words for words, names in ((f"pushes to {branches}", branches), (f"tags {tags}", tags)) if names)
    yield "paths", ", ".join(app.paths)
    yield "but not", ", ".join(app.ignore_paths)


def rows_of(app: App, room: int) -> Iterator[tuple[str, str]]:
    """What apps.yaml says of it; neither values of variables nor URLs of chats, which are secrets."""
    most, check = app.strategy.max_failures, app.health_check
    yield "from", app.clone_url
    yield "hosts", listed(app.hosts, room)
    yield "and with", listed(app.labels, room)
    yield "order", steps_of(app)
    yield "stops", "" if most is None else f"at more than {most} failure{'s' * (most != 1)}" if most else "at the first failure"
    yield from filters_of(app)
    yield from ((name, json.dumps(said)) for name in ("build", "activate", "deploy") if (said := getattr(app, name)))
    if check:
        often = f"every {as_duration(check['interval'])}, {check['success']} in a row within {as_duration(check['timeout'])}"
        yield "health", check.get("url") or json.dumps(check["command"])
        yield "", often
    yield "shared", listed(app.shared, room)
    yield "env", listed(tuple(app.env), room)
    yield from (("notify", f"{one['format']}: {', '.join(one['events'])}") for one in app.notify)


def check_apps(_: Config, file: pathlib.Path) -> int:
    """Says what a file means, or every mistake with its line; 0 where it has none. A terminal gets short lines, a program all."""
    apps, room = apps_of(file), COLUMNS - 12 if sys.stdout.isatty() else MIB
    for app in apps:
        print(f"{app.name}: {app.repo}")
        for name, said in rows_of(app, room):
            if said:
                print(f"  {name:<9} {said if len(said) <= room else said[: room - 3] + '...'}")
    print(f"{file} is good: {len(apps)} app{'' if len(apps) == 1 else 's'}")
    return 0


# Name to what it does, the argument that it takes, and what --help says.
VERBS: dict[str, tuple[Callable[[Config, pathlib.Path], int], str, str]] = {
    "serve": (serve, "", "The deployment controller. SIGHUP reads apps.yaml again, SIGTERM stops."),
    "backup": (backup, "FILE", "Write a copy of the database to FILE, also while the controller runs."),
    "restore": (restore, "FILE", "Put a backup in the place of the database; the controller must be stopped."),
    "doctor": (doctor, "", "Check the database, the settings and the machine, and say what to do."),
    "check-apps": (check_apps, "FILE", "Say whether FILE would be taken as apps.yaml."),
}
CALLED = "deploybot" if os.path.basename(sys.argv[0]) == "deploybot" else "deploybot.py"  # the first: installed


def parse(verb: str, arguments: list[str]) -> tuple[Config, pathlib.Path]:
    """Every option, also from the environment, but for check-apps, which reads none; and FILE where the verb takes one."""
    _, takes, description = VERBS[verb]
    options, env = ([], {}) if verb == "check-apps" else (OPTIONS, os.environ)
    secret_lines = "".join(f"  {secret.variable:<26}{secret.help}\n" for secret in SECRETS.values())
    verbs = "".join(f"  {f'{name} {file}':<26}{help}\n" for name, (_, file, help) in VERBS.items() if name != "serve")
    also = "Each also as ..._FILE, which names a file that holds it, or as a credential of systemd, deploybot_...."
    epilog = f"Secrets are never flags:\n{secret_lines}{also}\n\n\nOther verbs:\n{verbs}" if options else ""
    name, raw = f"{CALLED} {verb}".removesuffix(" serve"), argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=name, description=description, epilog=epilog, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"deploybot {VERSION}")
    if takes:
        parser.add_argument("file", metavar=takes, type=pathlib.Path)
    for option in options:
        switch, value = {"action": "store_const", "const": "true"}, {"metavar": option.field.upper()}
        more: dict[str, Any] = switch if option.parse is flag else value
        parser.add_argument(f"--{option.name}", help=f"{option.help} [{option.variable}, {option.default}]", **more)
    given = vars(parser.parse_args(arguments))
    return Config.load(given, env), given.get("file", pathlib.Path())


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 refused or could not start, 2 wrong use."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
        asked = nearest(arguments[0], VERBS)[2:] or f"there are {', '.join(VERBS)}"
        print(f"{CALLED}: no verb {arguments[0]}: {asked} (see {CALLED} --help)", file=sys.stderr)
        return 2
    verb, rest = (arguments[0], arguments[1:]) if arguments and arguments[0] in VERBS else ("serve", arguments)
    try:
        return VERBS[verb][0](*parse(verb, rest))
    except StartError as error:
        for line in error.problems:
            print(f"{CALLED}: {line}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
