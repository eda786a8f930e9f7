#!/usr/bin/env python3
"""ctl.py, the command line of DeployBot: one file, the standard library only.

It asks the controller over its HTTP API, as any other client does, and keeps nothing between two calls but what `login` was given.
A token is never a flag (others would see it in the list of processes), and only `token create` prints one, the new one. People get
tables and text, fitted to the terminal; programs get --json: one document as the controller answered it, and one object a line where a log is
followed. Results go to stdout, all that is said about them to stderr. `ctl.py --help` has settings and exit codes.
"""

import argparse
import json
import os
import re
import sys
import time
from collections import Counter, deque, namedtuple
from contextlib import suppress
from urllib.parse import quote, urlencode, urlsplit

if sys.version_info < (3, 11):
    print("ctl.py needs Python 3.11 or newer; this is " + sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

VERSION = "0.1.0"
DEFAULT_URL = "http://127.0.0.1:8080"
TOKEN_FILE = "data/admin.token"  # where a controller's first start writes it, seen from the folder it runs in
ENDED = ("success", "failed", "cancelled")
OVER = (*ENDED, "partial", "rolled_back")  # how a deployment may have ended

DONE, FAILED, WRONG_USE, NOT_REACHED, REFUSED = range(5)
INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as shells count

ANSWER_TIMEOUT_S = 20  # connect, and between two packets of an answer
STREAM_SILENCE_S = 45  # the controller sends a comment every 15 s: three missed ones are a dead connection
RETRY_FIRST_S, RETRY_MOST_S = 0.5, 10
GIVE_UP_S = 600  # without a controller; a restart or an upgrade takes less
SSE_READ_BYTES = 65536
PAGE_JOBS = 1000  # the most that GET /v1/jobs, deployments, deliveries and audit give at once
PAGE_LINES = 1000
PAGE_NAMES = 1000  # of hosts, also of those of the apps
ALL = 1 << 30  # more than any list has
STREAM_TAIL_MOST = 1000  # the most that GET /v1/logs/stream gives
DEFAULT_TAIL = 50
RECENT_JOBS = 20  # whose logs `logs` looks through when no job is named
SHORT_ID = 13  # characters: the 48 bits of time of a UUIDv7
COUNTED_ID = 18  # and the count within that time: a deployment is made in one millisecond with its jobs
ID_LENGTH = 36  # characters of a UUID
CANDIDATES = 5
SHORT_COMMIT = 8
MAX_TIMEOUT = 7 * 86400  # seconds that a job may run, as the controller has it
TOKEN_LIFE = (60, 3650 * 86400)  # seconds that a token may last, as the controller has it
LOCK_LIFE = (1, 365 * 86400)  # seconds
EVENTS_AHEAD = 1000  # read, and not yet printed
FRAME_S = 0.05  # what comes within is drawn at once
TICK_S = 0.25  # the times that run are drawn anew, and what turns
ASK_S = 10  # what keeps pending jobs is asked again
COMPLETE_S = 1.5  # in which the controller has to answer whoever pressed Tab
OFFERED = 50  # ids that are offered then
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/@+-]*")  # a word that is nothing else to a shell, and no option


# ----------------------------------------------------------------------------------------------------------------------
# Failure
# Owns: what can go wrong, as a line (a list may follow) and an exit code. Ignores: who catches it (main).


class Failure(Exception):
    """Ends the program with `code`, the line `text` and each of `items` under it.

    `again`: why, in a few words, where asking again may help; `after`: the seconds until then, where the controller said so;
    `status`: of HTTP, where it answered.
    """

    def __init__(self, code, text, again="", items=(), after=None, status=None):
        super().__init__(text)
        self.code, self.text, self.again, self.items, self.after, self.status = code, text, again, items, after, status


# ----------------------------------------------------------------------------------------------------------------------
# Text
# Owns: how values read to a person; `clean` takes the control characters out. Ignores: terminals.

SEQUENCES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-Z\\^-~])")
BREAKS = re.compile(r"[\r\n\v\f\x85\u2028\u2029]+")
CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
SECRETS = re.compile(r"dbt_[\w-]{16,}", re.ASCII)  # tokens of the controller's making
UNITS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


def clean(text):
    """`text` on one line, without terminal sequences (ECMA-48), controls and marks that turn direction; tabs stay."""
    return CONTROLS.sub("", BREAKS.sub(" ", SEQUENCES.sub("", str(text))))


def unsaid(text):
    """`text` without tokens: one that was put on the command line by mistake goes no further."""
    return SECRETS.sub("dbt_***", text)


def cell(value):
    return "-" if value is None or value == "" else clean(value).replace("\t", " ")


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


def ago(stamp):
    """The age of `stamp` in its largest unit; none is negative, whatever the two clocks say."""
    moment = seconds(stamp)
    return "-" if moment is None else span(time.time() - moment, 1) + " ago"


def when(stamp):
    """A moment in UTC, to the second: for what one compares with other records."""
    return stamp[:19].replace("T", " ")


def ends(stamp):
    """in 30d; 2h ago; never. What is left is rounded, from a minute on by a minute, so that 30 days are in 30d at once."""
    left = None if stamp is None else seconds(stamp) - time.time()
    return "never" if left is None else f"in {span(left + (59 if left > 59 else 0.9), 1)}" if left > 0 else ago(stamp)


def took(job):
    """How long a job ran, or has been running."""
    start, end = seconds(job["started_at"]), seconds(job["completed_at"])
    return "-" if start is None else span((end or time.time()) - start)


def short_commit(text):
    """A commit as people write it; any other ref as it is."""
    return text[:SHORT_COMMIT] if text and re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", text) else text


def short_ids(ids, least=SHORT_ID):
    """Each id to its start, of the one length, from `least` on, that tells all of `ids` apart."""
    wanted = set(ids)
    length = next((n for n in range(least, ID_LENGTH) if len({one[:n] for one in wanted}) == len(wanted)), ID_LENGTH)
    return {one: one[:length] for one in wanted}


def width(text):
    """Columns that `text` takes on a terminal."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def cut(text, most):
    """`text` in at most `most` columns, with an ellipsis where something is left out."""
    if width(text) <= most:
        return text
    while text and width(text) > most - 1:
        text = text[:-1]
    return text + "…"


# ----------------------------------------------------------------------------------------------------------------------
# Screen
# Owns: stdout and stderr, colour, tables. Ignores: what the rows are about.

COLOURS = {"red": 31, "green": 32, "yellow": 33, "cyan": 36, "dim": 2, "bold": 1}
COLOUR_OF = {
    **dict.fromkeys(("success", "online", "ok"), "green"),
    **dict.fromkeys(("failed", "rolled_back", "offline", "error", "drift"), "red"),
    **dict.fromkeys(("pending", "partial", "unknown"), "yellow"),
    "running": "cyan",
    **dict.fromkeys(("cancelled", "held"), "dim"),
}
LEVEL_COLOURS = {"error": "red", "warning": "yellow", "debug": "dim"}
GAP = 2  # columns between two columns
NARROWEST = 12  # columns that a shrinking cell keeps: web-01.exam… is still told from web-02.exam…


def columns():
    import shutil

    return shutil.get_terminal_size().columns


def fit(widths, shrinks, most):
    """Widths that fit in `most` columns: those that may shrink do, widest first; then the last ones are dropped."""
    widths = list(widths)
    while sum(widths) + GAP * (len(widths) - 1) > most:
        loose = [i for i in range(len(widths)) if shrinks[i] and widths[i] > NARROWEST]
        if loose:
            widths[max(loose, key=widths.__getitem__)] -= 1
        elif len(widths) > 1:
            widths.pop()
        else:
            break
    return widths


class Screen:
    """Where results go (stdout) and what is said about them (stderr). `as_json`: stdout is for a program."""

    def __init__(self, as_json=False, raw=False):
        self.as_json, self.raw = as_json, raw
        self.terminal = sys.stdout is not None and sys.stdout.isatty()
        self.colour = self.terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.live = self.terminal and not as_json and os.environ.get("TERM") != "dumb"
        self.drawn, self.size = 0, None  # lines of the last frame, and the terminal that it was drawn for

    def paint(self, text, colour):
        return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if self.colour and colour else text

    def status(self, word):
        """`word`, in the colour of its first word."""
        return self.paint(word, COLOUR_OF.get(word.split(" ")[0].rstrip(",")))

    def line(self, text):
        print(text, flush=True)

    def note(self, text):
        print(clean(text), file=sys.stderr, flush=True)

    def show(self, answer, view):
        """`answer` as it is for a program; for people, `view()` prints it."""
        if self.as_json:
            print(json.dumps(answer, indent=2))
        else:
            view()

    def object_line(self, value):
        print(json.dumps(value), flush=True)

    def table(self, headers, rows, shrink=()):
        """Rows under `headers`; on a terminal, columns named in `shrink` are cut first, then the last columns go."""
        for line in self.lines(headers, rows, shrink) if rows else ():
            print(line)

    def lines(self, headers, rows, shrink=()):
        rows = [[cell(value) for value in row] for row in rows]
        widths = [max(map(width, column)) for column in zip(headers, *rows, strict=True)]
        if self.terminal:
            widths = fit(widths, [name in shrink for name in headers], columns())
        return [self._row(headers, widths, lambda text: "bold"), *(self._row(row, widths, COLOUR_OF.get) for row in rows)]

    def redraw(self, frame):
        """Draws `frame(lines)` in the place of the one before; all anew where the size has changed: what has become of it is not known."""
        import shutil

        size = shutil.get_terminal_size()
        back = f"\x1b[{self.drawn}A\r" if self.drawn else ""
        if self.size not in (None, size):
            back = "\x1b[H\x1b[2J"
        shown = frame(size.lines - 1)[: size.lines - 1]
        print(back + "".join(f"\x1b[K{line}\n" for line in shown) + "\x1b[J", end="", flush=True)
        self.drawn, self.size = len(shown), size

    def _row(self, row, widths, colour_of):
        text = ""
        for value, most in zip(row, widths, strict=False):  # there are fewer widths where the last columns are dropped
            shown = cut(value, most)
            text += self.paint(shown, colour_of(value)) + " " * (most - width(shown) + GAP)
        return text.rstrip()

    def fields(self, pairs):
        """Names and values under one another; a value of None is left out."""
        pairs = [(name.replace("_", " "), clean(value)) for name, value in pairs if value is not None]
        margin = max(len(name) for name, _ in pairs) + GAP
        for name, value in pairs:
            print(self.paint(name.ljust(margin), "bold") + (self.status(value) if name == "status" else value))


# ----------------------------------------------------------------------------------------------------------------------
# Settings
# Owns: which controller, which token, how this program was called. Ignores: whether they are right.


def own_name():
    """What it is called as: ctl.py, or deploybot-ctl where it was installed."""
    name = os.path.basename(sys.argv[0])
    return name if name in ("ctl.py", "deploybot-ctl") else "ctl.py"


def own_call():
    """How it is called here, so that a hint can be copied: by its name where it is in the PATH, else by its place."""
    name = own_name()
    if os.path.basename(sys.argv[0]) != name:
        return name
    import shutil

    if shutil.which(name):
        return name
    place = sys.argv[0] if os.path.dirname(sys.argv[0]) else f"./{name}"
    return place if os.access(place, os.X_OK) else f"python3 {place}"


def kept_path():
    """Where `login` keeps what it was given. A relative XDG_CONFIG_HOME does not count, says the XDG Base Directory Specification."""
    home = os.environ.get("XDG_CONFIG_HOME", "")
    return os.path.join(home if os.path.isabs(home) else os.path.expanduser("~/.config"), "deploybot", "controllers.json")


def refuse_shared(path, stat, mode):
    """What another user owns, or what has more than `mode`, is a Failure that says what to do."""
    if stat.st_uid != os.geteuid() or stat.st_mode & 0o777 & ~mode:
        found = f"{path} has owner {stat.st_uid} and mode {stat.st_mode & 0o777:o}, so that others may use its tokens"
        raise Failure(WRONG_USE, f"{found}: `chown {os.geteuid()} {path}`, `chmod {mode:o} {path}`, or remove it and log in again")


def kept():
    """{"url": the controller in force or None, "tokens": {url: token}}, as `login` keeps it."""
    path, found = kept_path(), None
    try:
        with open(path, encoding="utf-8") as file:
            refuse_shared(os.path.dirname(path), os.stat(os.path.dirname(path)), 0o755)
            refuse_shared(path, os.fstat(file.fileno()), 0o600)
            found = json.load(file)
        if isinstance(found["url"], str | None) and all(isinstance(one, str) for one in found["tokens"].values()):
            return found
    except FileNotFoundError:
        return {"url": None, "tokens": {}}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        found = error
    why = getattr(found, "strerror", None) or f"it is not what `{own_call()} login` wrote"
    raise Failure(WRONG_USE, f"{path} cannot be read, {why}: remove it and log in again")


def keep(found):
    """Keeps that whole, for this user alone; without a token there is no file."""
    from tempfile import mkstemp

    path = kept_path()
    try:
        if not found["tokens"]:
            return os.unlink(path)
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        descriptor, scratch = mkstemp(dir=os.path.dirname(path))  # with mode 0600
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=2)
        os.replace(scratch, path)
    except OSError as error:
        raise Failure(WRONG_USE, f"{path} cannot be written: {error.strerror}") from None


def is_loopback(url):
    host = urlsplit(url).hostname
    return host in ("localhost", "::1") or bool(re.fullmatch(r"127(\.\d{1,3}){3}", host))


def lacks_scheme(word):
    """Whether it is a host alone (of more than a word, as that may be a secret), with or without a port."""
    return re.fullmatch(r"(localhost|[A-Za-z0-9-]+(?=[.:]))(\.[A-Za-z0-9-]+)*(:[0-9]{1,5})?/?", word)


def read_url(flag, source="--url"):
    """The controller's address: http(s), no password, no path, no query. A wrong one is not repeated, as it may hold a secret, but
    for one that lacks the scheme alone. `source`: of `flag`; none for an argument, which is named by what it is.
    """
    source = source if flag else "DEPLOYBOT_URL"
    url = flag or os.environ.get("DEPLOYBOT_URL") or kept()["url"] or DEFAULT_URL
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if lacks_scheme(url):
        meant = f"http{'' if is_loopback('//' + url) else 's'}://{url.rstrip('/')}"
        raise Failure(WRONG_USE, f"{source + ' ' if source else ''}{url} is no address: {meant}?")
    source = source or "that"
    if not good or parts.username is not None or parts.query or parts.fragment or not re.fullmatch(r"[!-~]+", url):
        raise Failure(WRONG_USE, f"{source} is no controller's address: write it as {DEFAULT_URL}, without a password")
    root = f"{parts.scheme}://{parts.netloc.lower()}"
    if parts.path.strip("/"):
        raise Failure(WRONG_USE, f"{source} takes no path: {root}")
    return root


def own_file(path):
    """The text of a file that this user owns, else None."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read() if os.fstat(file.fileno()).st_uid == os.geteuid() else None
    except (OSError, ValueError):
        return None


def text_of(path, setting):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it holds no text"
        raise Failure(WRONG_USE, f"{setting} cannot be read, {path}: {why}") from None


def find_token(url):
    """(token or None, where it comes from). A kept one goes to its controller, an admin.token, this user's own, to this machine alone."""
    if os.environ.get("DEPLOYBOT_TOKEN"):
        return os.environ["DEPLOYBOT_TOKEN"].strip(), "DEPLOYBOT_TOKEN"
    path = os.environ.get("DEPLOYBOT_TOKEN_FILE")
    if path:
        return text_of(path, "DEPLOYBOT_TOKEN_FILE"), f"DEPLOYBOT_TOKEN_FILE ({path})"
    token = kept()["tokens"].get(url)
    if token:
        return token, f"{own_name()} login"
    text = own_file(TOKEN_FILE) if is_loopback(url) else None
    return (text.strip(), f"./{TOKEN_FILE}") if text else (None, "")


def controller_token(url, given=None):
    """As find_token, or `given`; a token that cannot stand in a header is refused here, as http.client would print it."""
    token, source = given or find_token(url)
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise Failure(WRONG_USE, f"the token from {source} is empty or has characters that no token has: write it anew")
    return token, source


# ----------------------------------------------------------------------------------------------------------------------
# Client
# Owns: HTTP, and the words for what comes back wrong. Ignores: what the calls mean.

HINTS = {
    400: "this program and the controller may be of different versions, `ctl.py health` names the controller's",
    403: "`ctl.py whoami` shows what yours may do",
    404: "`ctl.py jobs`, `deployments`, `hosts` and `apps` list what there is",
    409: "`ctl.py status ID` and `ctl.py hosts` show the state",
    413: "send less",
    422: "mend what is named and run it again",
}
TOKEN_HINT = "`ctl.py token list` shows those there are"  # 404 and 409 under /v1/tokens

NO_TLS = "WRONG_VERSION_NUMBER"  # OpenSSL's word for an answer that is no TLS record, such as one of plain HTTP
NOT_VALID_NOW = (9, 10)  # OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID, _CERT_HAS_EXPIRED
OTHER_NAME = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, _IP_ADDRESS_MISMATCH
UNKNOWN_CA = (2, 18, 19, 20, 21)  # its certificate, or that of its CA, is self-signed or nowhere to be found


def reason_of(error):
    """Why a connection failed, in a few words."""
    cause = getattr(error, "reason", error)
    if isinstance(cause, TimeoutError):
        return "no answer in time"
    words = [getattr(cause, name, None) for name in ("verify_message", "strerror")]
    return clean(next(filter(None, words), None) or str(cause) or type(cause).__name__)


def certificate_hint(code):
    """What to do about a certificate that OpenSSL's error `code` refuses."""
    if code in NOT_VALID_NOW:
        return "renew the controller's certificate, or set the clock of this machine"
    if code in OTHER_NAME:
        return "use a name that the certificate has in --url or DEPLOYBOT_URL"
    if code not in UNKNOWN_CA:
        return "make the controller's certificate anew"
    path = os.environ.get("SSL_CERT_FILE")
    if path and not os.access(path, os.R_OK):
        return f"SSL_CERT_FILE cannot be read: {clean(path)}"
    return "name the file of its CA in SSL_CERT_FILE" + (f" ({clean(path)} has another)" if path else "")


def retry_after(headers):
    """The seconds of Retry-After; None where it says none."""
    text = headers.get("Retry-After", "")
    return int(text) if re.fullmatch(r"[0-9]{1,6}", text) else None


def problem_of(response):
    """What a problem document (RFC 9457) says: each field with its message, else its detail, else its title."""
    try:
        problem = json.loads(response.read())
        fields = "; ".join(f"{one['field']}: {one['message']}" for one in problem.get("errors") or ())
        return fields or problem.get("detail") or problem["title"]
    except (ValueError, LookupError, TypeError, AttributeError):
        return response.reason


def own_words(text):
    """`text` with the calls in it, `ctl.py jobs`, as they are made here."""
    return text.replace("`ctl.py ", f"`{own_call()} ")


REMEDY = re.compile(r": unlock it\b[^:]*$")  # at the end of what the controller says of a lock


class Client:
    """Calls to one controller. Every failure to get a good answer is a Failure that names the call's URL."""

    def __init__(self, url, token, token_source, flagged=False):
        self.url, self.token, self.token_source, self.flagged = url, token, token_source, flagged
        self._opener = None
        self.hints = dict(HINTS)  # what to do about a status; a verb may know better

    def call(self, method, path, query=None, body=None):
        """The JSON object that the controller answers."""
        return self._object(method, self.target(path, query), body)[1]

    def health(self):
        """(status, object) of GET /health, which is 503 with the same object when something is wrong."""
        return self._object("GET", self.target("/health"), good=(200, 503))

    def reload(self):
        """(status, object) of POST /v1/reload, which is 422 with `errors` when apps.yaml has mistakes."""
        return self._object("POST", self.target("/v1/reload"), good=(200, 422))

    def stream(self, query, last_id):
        """An open answer of the event stream, 200 or 204; its reads fail after STREAM_SILENCE_S without a byte."""
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last_id} if last_id else {})}
        return self._open("GET", self.target("/v1/logs/stream", query), None, headers, STREAM_SILENCE_S)

    def command(self, words):
        """A ctl.py command that reaches the same controller."""
        return clean(f"{own_call()} {words}{f' --url {self.url}' if self.flagged else ''}")

    def target(self, path, query=None):
        asked = {name: value for name, value in (query or {}).items() if value is not None}
        return self.url + path + ("?" + urlencode(asked) if asked else "")

    def _object(self, method, target, body=None, good=()):
        from http.client import HTTPException

        try:
            with self._open(method, target, body, {"Accept": "application/json"}, ANSWER_TIMEOUT_S, good) as response:
                answer = json.loads(response.read())
        except (OSError, HTTPException) as error:
            raise self._unreached(target, error) from None
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            hint = "--url or DEPLOYBOT_URL must name a DeployBot controller"
            raise Failure(NOT_REACHED, f"{target} did not answer with JSON: {hint}")
        return response.status, answer

    def _open(self, method, target, body, headers, timeout, good=()):
        from http.client import HTTPException
        from urllib.request import Request

        request = Request(target, None if body is None else json.dumps(body).encode(), headers, method=method)
        request.add_header("User-Agent", f"deploybot-ctl/{VERSION}")
        request.add_header("Content-Type", "application/json")
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        try:
            response = self._open_with().open(request, timeout=timeout)
            if response.status >= 300 and response.status not in good:
                with response:
                    raise self._refused(response, method, target)
            return response
        except (OSError, HTTPException) as error:
            raise self._unreached(target, error) from None

    def _open_with(self):
        """An opener without a handler for redirects: followed, they would carry the token elsewhere."""
        if self._opener is None:
            from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler

            self._opener, is_local = OpenerDirector(), is_loopback(self.url)
            for handler in (HTTPHandler(), ProxyHandler({} if is_local else None)):
                self._opener.add_handler(handler)
            # It reads all that the system trusts, which a call to this machine can do without; a proxy may speak TLS, too.
            if not is_local or self.url.startswith("https:"):
                self._opener.add_handler(HTTPSHandler())
        return self._opener

    def _unreached(self, target, error):
        why = reason_of(error)
        if NO_TLS in why:
            why, hint = "it speaks http there", f"try http{self.url.removeprefix('https')}"
            return Failure(NOT_REACHED, f"cannot reach {target}: {why}: {hint}")
        hint = "start the controller there, or name another with --url or DEPLOYBOT_URL"
        if isinstance(error, ConnectionResetError) and self.url.startswith("http:"):
            hint = f"if it speaks https there, write https{self.url.removeprefix('http')}"
        refused = getattr(getattr(error, "reason", error), "verify_code", None)
        if refused is not None:
            hint = certificate_hint(refused)
        return Failure(NOT_REACHED, f"cannot reach {target} ({why}): {hint}", again=why)

    def _refused(self, response, method, target):
        status, said = response.status, clean(problem_of(response)).rstrip(".")
        code = REFUSED if 400 <= status < 500 else NOT_REACHED
        hint = self._hint(status, response.headers, target)
        if " unlock --app " in hint:  # it says the same, so that it can be copied here
            said = REMEDY.sub("", said)
        text = f"{said}{' ' if said.endswith('?') else ': '}{hint} ({status} from {method} {target})"
        again = f"{status} {said}" if status == 429 or status >= 500 else ""
        return Failure(code, text, again, after=retry_after(response.headers) if again else None, status=status)

    def _hint(self, status, headers, target):
        if status < 400:
            return f"redirects are not followed, name the controller itself (this leads to {headers.get('Location')})"
        if status == 401 and 401 not in self.hints:
            sent = f"the token from {self.token_source} is not valid here" if self.token else "no token was sent"
            return f"{sent}, set DEPLOYBOT_TOKEN or DEPLOYBOT_TOKEN_FILE, or keep one with `{own_call()} login {self.url}`"
        if status == 429 or status >= 500:
            return f"try again in {retry_after(headers) or 5} s"
        if status in (404, 409) and target.startswith(self.url + "/v1/tokens"):
            return own_words(TOKEN_HINT)
        return own_words(self.hints.get(status, "see `ctl.py --help`"))


# ----------------------------------------------------------------------------------------------------------------------
# Stream
# Owns: server-sent events (WHATWG HTML, 9.2.6), resuming at Last-Event-ID, several streams as one. Ignores: the screen.

# kind: log, job, deployment, gap, end as the controller sends them (data: dict); note (data: text); opened: from here on all is told
Event = namedtuple("Event", "kind data")


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


def jitter():
    """A factor between 0.5 and 1."""
    return 0.5 + os.urandom(1)[0] / 510


class Backoff:
    """The pauses between connections, and when to stop trying. Time, sleep and jitter are passed in."""

    def __init__(self, now=time.monotonic, sleep=time.sleep, jitter=jitter):
        self.now, self.sleep, self.jitter = now, sleep, jitter
        self.pause, self.since = RETRY_FIRST_S, None

    def connected(self):
        self.since = None

    def delivered(self):
        self.pause = RETRY_FIRST_S

    def wait(self, least=0):
        """Sleeps, for `least` seconds or more; False, at once, when the controller is away for too long."""
        self.since = self.now() if self.since is None else self.since
        if self.now() + least - self.since > GIVE_UP_S:
            return False
        self.sleep(max(least, self.pause * self.jitter()))
        self.pause = min(self.pause * 2, RETRY_MOST_S)
        return True


class Stream:
    """The events that match `query`, over as many connections as it takes; that of one job ends with the job.

    `answered`: this controller answered a moment ago, so the first connection too is tried again. It also is where the
    controller says when to come back.
    """

    def __init__(self, client, query, answered=False):
        self.client, self.query, self.answered, self.backoff = client, query, answered, Backoff()
        self.last_id, self.lost = None, None

    def __iter__(self):
        """Yields Event; raises the Failure of an unanswered first connection, of a refusal, or of giving up."""
        while True:
            try:
                yield from self._connection()
                return
            except Failure as failure:
                if not failure.again or not (self.answered or failure.after):
                    raise
                if self.lost is None:
                    later = f" in {failure.after} s" if failure.after else ""
                    lost = "connection lost, trying" if self.answered else "not now, trying"
                    yield Event("note", f"{lost} again{later}: {self.client.url} ({failure.again})")
                self.lost = failure
            if not self.backoff.wait(self.lost.after or 0):
                raise self.lost

    def _connection(self):
        with self.client.stream(self.query, self.last_id) as response:
            self.backoff.connected()
            if self.lost:
                yield Event("note", f"connected again to {self.client.url}")
            self.answered, self.lost = True, None
            if self.last_id is None:
                yield Event("opened", None)
            if response.status != 204:
                yield from self._read(response)

    def _read(self, response):
        """The events of one connection up to `end`; Failure (again) when it breaks, ends early or falls silent."""
        for seen, kind, data in sse_events(sse_lines(self._pieces(response))):
            self.last_id = seen or self.last_id
            self.backoff.delivered()
            if data is not None:
                yield Event(kind, json.loads(data))
            if kind == "end":
                return

    def _pieces(self, response):
        from http.client import HTTPException

        why = "the controller ended the stream"
        try:
            yield from iter(lambda: response.read1(SSE_READ_BYTES), b"")
        except (OSError, HTTPException) as error:
            why = reason_of(error)
        raise Failure(NOT_REACHED, f"{self.client.url} ({why})", again=why)


def pump(stream, events):
    """Puts every event of `stream`, then None, or the exception that ended it."""
    try:
        for event in stream:
            events.put(event)
        events.put(None)
    except Exception as error:
        events.put(error)


def merged(streams):
    """The events of several streams as they come. Threads read, the caller alone prints: none dies holding stdout."""
    if len(streams) == 1:
        yield from streams[0]
        return
    from queue import Queue
    from threading import Thread

    events = Queue(EVENTS_AHEAD)
    for stream in streams:
        Thread(target=pump, args=(stream, events), daemon=True).start()
    open_ones = len(streams)
    while open_ones:
        event = events.get()
        if isinstance(event, Exception):
            raise event
        if event is None:
            open_ones -= 1
        else:
            yield event


# ----------------------------------------------------------------------------------------------------------------------
# Views
# Owns: what people see of jobs, hosts, apps and log lines. Ignores: where they came from.


def beyond(job, name):
    """Its reason or error where that says more than the status: those of a cancelled job may be "cancelled" too."""
    return None if job[name] == job["status"] else job[name]


def state(job):
    """running; running, cancel asked for; failed (timeout); cancelled; ..."""
    asked, reason = job["cancel_requested_at"] and job["status"] not in ENDED, beyond(job, "reason")
    return job["status"] + (f" ({reason})" if reason else ", cancel asked for" if asked else "")


def show_jobs(screen, jobs):
    """A row a job; ids are cut to the one length that tells them apart."""
    ids = short_ids(job["id"] for job in jobs)
    rows = []
    for job in jobs:
        what = [ids[job["id"]], job["status"], job["app"], job["host"], short_commit(job["ref"]), short_commit(job["commit"])]
        rows.append([*what, ago(job["created_at"]), took(job), beyond(job, "reason") or job["hold"]])
    headers = ["JOB", "STATUS", "APP", "HOST", "REF", "COMMIT", "CREATED", "TOOK", "REASON"]
    screen.table(headers, rows, shrink=("APP", "HOST", "REF"))


def why_waits(client, host):
    """What keeps a Host of the API from taking the next job; None where nothing is known to. `host` has a pending job."""
    name, running, pending = host["hostname"], host["running"], host["pending"]
    if host["agent_status"] == "unknown":
        return f"no agent has registered as {name}"
    if host["agent_status"] != "online":
        return f"{name} is offline since {span(time.time() - seconds(host['last_seen']), 1)}: is its agent running?"
    if host["drained"]:
        return f"{name} is drained ({client.command('hosts resume ' + name)})"
    if not running or not pending:  # it is about to take one, or has just taken the last
        return None
    return f"{name} runs {running} job{'s' * (running > 1)}, {pending} wait{'s' * (pending == 1)} there"


def show_job(screen, client, job, waits_for=None):
    metadata = ", ".join(f"{name}={value}" for name, value in (job["metadata"] or {}).items())
    pairs = [
        ("job", job["id"]),
        ("status", state(job)),
        ("waits_for", waits_for),
        *[(name, job[name]) for name in ("hold", "exit_code")],
        ("error", beyond(job, "error")),
        *[(name, job[name]) for name in ("app", "repo", "ref", "commit", "rolled_back_to", "host")],
        ("attempt", f"{job['attempt']} of {job['retries'] + 1}" if job["retries"] else job["attempt"]),
        ("created", f"{ago(job['created_at'])} by {job['created_by'] or '-'}"),
        ("started", job["started_at"] and ago(job["started_at"])),
        ("took", job["started_at"] and took(job)),
        *[(name, job[name]) for name in ("superseded_by", "retry_of", "deployment_id")],
        ("metadata", metadata or None),
        ("log", client.command(f"logs --job {job['id']}")),
    ]
    screen.fields(pairs)


def show_outcome(screen, client, job):
    """The end of a deployment in a line, and what one needs to know where it failed."""
    commit = f", commit {cell(short_commit(job['commit']))}" if job["commit"] else ""
    ran = f", took {took(job)}" if job["started_at"] else ""
    screen.line(f"{screen.status(job['status'])}: {cell(job['app'])} on {cell(job['host'])}{commit}{ran}")
    if job["status"] != "success":
        for name in ("reason", "error", "exit_code", "rolled_back_to"):
            if beyond(job, name) is not None:
                screen.line(f"  {name.replace('_', ' ')}: {cell(job[name])}")
        screen.line(f"  log: {client.command('logs --job ' + job['id'])}")


# Deployments. What is counted is called as in these words; a cancelled job by its reason, such as stopped or superseded.

COUNTED = ("success", "failed", "running", "pending", "held")
HOLDS = {"batch": "its batch comes later", "pause": "the canary is watched", "lock": "the app is locked"}


def counted_as(job):
    if job["status"] == "pending":
        return "held" if job["hold"] else "pending"
    return (job["reason"] if job["status"] == "cancelled" else None) or job["status"]


def counts(numbers):
    """1 failed, 5 stopped: what there is of {word: number}, in the order of COUNTED."""
    ranked = sorted(numbers, key=lambda word: COUNTED.index(word) if word in COUNTED else len(COUNTED))
    return ", ".join(f"{numbers[word]} {clean(word)}" for word in ranked if numbers[word])


def progress(numbers):
    """2 of 8 succeeded, 1 failed, 5 stopped."""
    rest = counts({word: number for word, number in numbers.items() if word != "success"})
    return f"{numbers.get('success', 0)} of {sum(numbers.values())} succeeded" + (rest and f", {rest}")


def count_of(jobs):
    """{word: number} of jobs."""
    return Counter(map(counted_as, jobs))


def strategy_words(strategy):
    """2 hosts at a time, canary web-01 first, watched for 5m, stops at the first failure."""
    batch = strategy["batch"]
    size = f"{batch} of the hosts" if isinstance(batch, str) else f"{batch} host{'s' * (batch != 1)}"
    words = ["all hosts at once" if strategy["type"] == "parallel" else f"{size} at a time"]
    if strategy["canary"]:
        words += [f"canary {strategy['canary']} first", f"watched for {span(strategy['pause'] or 0)}"]
    most = strategy["max_failures"]
    if most is not None:
        words.append(f"stops after more than {most} failures" if most else "stops at the first failure")
    return clean(", ".join(words))


def lock_words(client, lock):
    """locked by alice 2h ago (ctl.py unlock --app web): the database moves, until 2026-11-23 13:13:37 UTC"""
    until = f", until {when(lock['until'])} UTC" if lock["until"] else ""
    return f"locked by {lock['by']} {ago(lock['at'])} ({client.command('unlock --app ' + lock['app'])}): {lock['reason']}{until}"


def held_words(client, deployment, lock=None):
    """Why a deployment waits; None where nothing holds it. `lock`: that of its app, where it is known."""
    hold = deployment["hold"]
    if hold == "pause" and deployment["resume_at"]:
        return f"the canary is watched until {when(deployment['resume_at'])} UTC ({ends(deployment['resume_at'])})"
    if hold == "lock" and lock:
        return lock_words(client, lock)
    return "the next batch waits for the one that runs" if hold == "batch" else HOLDS.get(hold, hold)


def show_deployments(screen, deployments):
    ids = short_ids((one["id"] for one in deployments), COUNTED_ID)
    rows = []
    for one in deployments:
        what = [ids[one["id"]], one["status"], one["app"], short_commit(one["ref"]), one["kind"], progress(one["progress"])]
        why = one["reason"] or HOLDS.get(one["hold"], one["hold"])
        rows.append([*what, ago(one["created_at"]), took(one), one["created_by"], why])
    headers = ["DEPLOYMENT", "STATUS", "APP", "REF", "KIND", "HOSTS", "CREATED", "TOOK", "BY", "REASON"]
    screen.table(headers, rows, shrink=("APP", "REF", "HOSTS", "BY", "REASON"))


def show_deployment(screen, client, deployment, lock=None, jobs=None):
    """What it is and how far it is. `jobs`: its jobs, where they are known; `lock`: that of its app."""
    override = " (passes the lock)" if deployment["override"] else ""
    pairs = [
        ("deployment", deployment["id"]),
        ("status", deployment["status"]),
        ("progress", progress(count_of(jobs) if jobs else deployment["progress"])),
        ("waits_for", held_words(client, deployment, lock)),
        *[(name, deployment[name]) for name in ("reason", "app", "repo", "ref", "branch")],
        ("kind", deployment["kind"] + override),
        ("strategy", strategy_words(deployment["strategy"])),
        ("created", f"{ago(deployment['created_at'])} by {deployment['created_by'] or '-'}"),
        ("took", deployment["started_at"] and took(deployment)),
        *[(name, deployment[name]) for name in ("superseded_by", "retry_of", "delivery_id")],
    ]
    screen.fields(pairs)


def failure_words(job):
    """exit_code: npm ci ended, exit code 3, back on c0ffee00; the number where nothing else says it"""
    back = job["rolled_back_to"] and f"back on {short_commit(job['rolled_back_to'])}"
    said = ": ".join(job[name] for name in ("reason", "error") if beyond(job, name))
    code = f"exit code {job['exit_code']}" if job["exit_code"] and not re.search(rf"\b{job['exit_code']}\b", said) else None
    return clean(", ".join(filter(None, (said, code, back))))


def failures(client, jobs, deployment_id=None):
    """A line each for some of the jobs that failed, why and the command that shows the log; then how many more, and what shows them."""
    failed, log = [job for job in jobs if job["status"] == "failed"], "logs --job "
    said = [f"{cell(job['host'])}: {failure_words(job)} ({client.command(log + job['id'])})" for job in failed[:CANDIDATES]]
    more = len(failed) - CANDIDATES
    where = f": {client.command('status ' + deployment_id)}" if deployment_id else ""
    return said + [f"and {more} more failed{where}"] * (more > 0)


def show_end(screen, client, deployment, jobs):
    """The end of a deployment in a line, and what one needs to know where not all went well."""
    status, what = deployment["status"], f"{cell(deployment['app'])} {cell(short_commit(deployment['ref']))}"
    ran = f", took {took(deployment)}" if deployment["started_at"] else ""
    screen.line(f"{screen.status(cell(status))}: {what}, {progress(count_of(jobs))}{ran}")
    if status == "success":
        return
    if deployment["reason"]:
        screen.line(f"  reason: {cell(deployment['reason'])}")
    for words in failures(client, jobs, deployment["id"]):
        screen.line(f"  {words}")
    screen.line(f"  once more where it did not succeed: {client.command('retry ' + deployment['id'])}")


def command_words(command):
    """A command of apps.yaml as a shell reads it."""
    import shlex

    return shlex.join(command) if isinstance(command, list) else command


def show_plan(screen, client, plan, skipped):
    starts = {"success": "when the step before has succeeded", "pause": "when the canary has been watched"}
    screen.line(f"{cell(plan['app'])} ({cell(plan['repo'])}), {cell(plan['kind'])}: {strategy_words(plan['strategy'])}")
    for number, step in enumerate(plan["steps"], 1):
        start = starts.get(step["waits"], "at once")
        by_ref, runs = {}, plan.get("runs", {})  # an older controller does not say what runs
        for host in step["hosts"]:
            by_ref.setdefault((step["refs"][host], runs.get(host)), []).append(host)
        now = {ran: f" (now {short_commit(ran)})" if ran else "" for _, ran in by_ref}
        what = "; ".join(f"{short_commit(ref)} on {', '.join(hosts)}{now[ran]}" for (ref, ran), hosts in by_ref.items())
        screen.line(f"  {number}. {start}: {cell(what)}")
    for name in ("build", "activate", "deploy"):
        if plan[name]:
            screen.line(f"  {name}: {cell(command_words(plan[name]))}")
    if plan["health_check"]:
        check = plan["health_check"]
        screen.line(f"  health check: {cell(check.get('url') or command_words(check.get('command')))}")
    if plan["lock"]:
        locked = lock_words(client, plan["lock"]) if isinstance(plan["lock"], dict) else "the app is locked then"
        screen.line(f"  lock: {clean(locked)}")
    for one in skipped:
        screen.line(f"  left out: {cell(one['host'])}: {cell(one['reason'])}")
    screen.note("a dry run: nothing was made")


# Deliveries: what became of pushes. Each rule of the controller in words.

RULES = {
    "deleted": "a branch or tag was deleted: nothing to deploy",
    "not_on_push": "deploy_on_push is off: no push deploys it",
    "ref": "neither branches nor tags of it match what was pushed",
    "skip": "the commit's message asks to skip it",
    "paths": "no file of the push is one of its paths",
    "older": "a newer push came first, an older one changes nothing",
    "no_host": "it has no host",
    "duplicate": "the same is under way already",
    "locked": "it was made, and is held while the app is locked",
    "deployed": "it was deployed",
    "no_app": "no app of apps.yaml has this repository",
    "wrong_secret": "it was signed with a secret that this app does not have",
}


def outcome_words(client, outcome):
    """The rule that applied, by name and in words, and what to look at."""
    words = [f"{outcome['rule']}: {RULES.get(outcome['rule'], 'a rule that this program does not know')}"]
    if outcome["detail"]:
        words.append(f"({outcome['detail']})")
    if outcome["deployment_id"]:
        words.append(f"[{client.command('why ' + outcome['deployment_id'])}]")
    return " ".join(words)


def show_deliveries(screen, deliveries):
    ids = short_ids(one["id"] for one in deliveries)
    rows = []
    for one in deliveries:
        what = [ids[one["id"]], ago(one["received_at"]), one["repo"], one["ref"], short_commit(one["commit"]), one["pusher"]]
        outcomes = [f"{outcome['app'] or '-'} {outcome['rule']}" for outcome in one["outcomes"]]
        rows.append([*what, ", ".join(outcomes)])
    headers = ["DELIVERY", "RECEIVED", "REPO", "REF", "COMMIT", "PUSHER", "OUTCOME"]
    screen.table(headers, rows, shrink=("REPO", "REF", "PUSHER", "OUTCOME"))


def push_words(delivery):
    commit = f", {short_commit(delivery['commit'])}" if delivery["commit"] else ""
    return f"{delivery['ref']} of {delivery['repo']}{commit}, by {delivery['pusher'] or '-'}"


def show_delivery(screen, client, delivery):
    pairs = [("delivery", delivery["id"]), ("received", ago(delivery["received_at"])), ("push", push_words(delivery))]
    pairs += [(clean(one["app"] or "no app"), outcome_words(client, one)) for one in delivery["outcomes"]]
    screen.fields([*pairs, ("answered", delivery["message"] or None)])  # to the sender


REASONS = {
    "superseded": "a newer push took its place",
    "stopped": "too many hosts before it failed",
    "expired": "it was pending for too long",
    "agent_lost": "its agent was away for too long",
    "agent_crashed": "its agent died while it ran",
    "rejected": "its agent refused it",
}


def show_why(screen, client, waits, job, deployment, delivery, jobs=()):
    """Who and what made a job (or, where that is None, a deployment), and why it waits or ended as it did. `jobs`: its own."""
    one, where = (job, f" on {job['host']}") if job else (deployment, "")
    outcomes = [outcome for outcome in (delivery or {"outcomes": ()})["outcomes"] if outcome["app"] == one["app"]]
    kind = deployment["kind"] if deployment else "a job of its own"
    said = [REASONS.get(one["reason"], one["reason"]), job and beyond(job, "error")]
    failed = job and job["status"] == "failed"
    pairs = [
        ("job" if job else "deployment", one["id"]),
        ("status", state(job) if job else one["status"]),
        ("what", f"{one['app']} {short_commit(one['ref'])}{where}"),
        ("made", f"{ago(one['created_at'])} by {one['created_by'] or '-'}: {kind}"),
        ("push", delivery and push_words(delivery)),
        *[("rule", outcome_words(client, {**outcome, "deployment_id": None})) for outcome in outcomes],
        ("deployment", f"{deployment['id']}, {deployment['status']}" if job and deployment else None),
        ("waits_for", waits),
        ("because", ": ".join(filter(None, said)) or None),
        *[("failed", words) for words in failures(client, jobs, one["id"])],
        ("log", client.command(f"logs --job {one['id']}") if failed else None),
        *[(name, one[name] and f"{one[name]} ({client.command('why ' + one[name])})") for name in ("superseded_by", "retry_of")],
    ]
    screen.fields(pairs)


def show_hosts(screen, hosts):
    rows = []
    for host in hosts:
        counts = [host[name] for name in ("running", "pending", "slots")]
        marks = ["drained"] * bool(host["drained"]) + [f"behind: {host.get('agent_version')}"] * bool(host.get("behind"))
        rows.append([host["hostname"], host["agent_status"], ago(host["last_seen"]), *counts, ", ".join(marks) or " "])
    screen.table(["HOST", "AGENT", "LAST SEEN", "RUNNING", "PENDING", "SLOTS", ""], rows, shrink=("HOST",))


def pushed_branches(app):
    """Which pushes deploy an app."""
    return (", ".join(app["branches"] or ()) or "default branch") if app["deploy_on_push"] else None


def versions(host):
    """[wanted, actual, mark] of a host of an app: where its agent says nothing, actual is the last success, in brackets."""
    wanted, actual, last = (short_commit(one) for one in (host.get("wanted"), host.get("actual"), host["commit"]))
    drift = wanted and actual and short_commit(host["wanted"]) != host["wanted"] and wanted != actual  # a branch is like any commit
    return [wanted, actual or (last and f"({last})"), "drift" if drift else " "]


def show_apps(screen, client, apps):
    """A row an app and host; what belongs to the app stands in its first. Then the locks. An older controller says less."""
    jobs = short_ids(host["job_id"] for app in apps for host in app["hosts"] if host["job_id"])
    never = {"hostname": None, "commit": None, "job_id": None, "deployed_at": None}
    rows = []
    for app in apps:
        named, of_app = [app["name"], app["repo"]], [pushed_branches(app), app.get("strategy") and strategy_words(app["strategy"])]
        for host in app["hosts"] or [never]:
            rows.append([*named, host["hostname"], *versions(host), ago(host["deployed_at"]), jobs.get(host["job_id"]), *of_app])
            named = of_app = [" ", " "]
    headers = ["APP", "REPO", "HOST", "WANTED", "ACTUAL", " ", "DEPLOYED", "JOB", "ON PUSH", "STRATEGY"]
    screen.table(headers, rows, shrink=("APP", "REPO", "HOST", "ON PUSH", "STRATEGY"))
    for app in apps:
        if app.get("lock"):
            screen.line(f"{cell(app['name'])} is {cell(lock_words(client, app['lock']))}")


def bound_to(token):
    """The one app or host that a Token of the API is for."""
    return next((f"{name} {token[name]}" for name in ("app", "host") if token[name]), None)


def show_tokens(screen, tokens):
    ids = short_ids(token["id"] for token in tokens)
    rows = []
    for token in tokens:
        made = [ago(token["created_at"]), token["created_by"]]
        what = [token["name"], token["role"], bound_to(token), *made]
        rows.append([*what, ends(token["expires_at"]), ago(token["last_used_at"]), ids[token["id"]]])
    headers = ["NAME", "ROLE", "ONLY FOR", "CREATED", "BY", "ENDS", "LAST USED", "ID"]
    screen.table(headers, rows, shrink=("NAME", "ONLY FOR", "BY"))


def show_audit(screen, entries):
    """A row a deed; ids of jobs are cut to the one length that tells them apart."""
    ids = short_ids(one["target"] for one in entries if one["action"].startswith("job."))
    rows = []
    for one in entries:
        what = [one[name] for name in ("who", "address", "action")]
        rows.append([when(one["at"]), *what, ids.get(one["target"], one["target"]), one["detail"]])
    screen.table(["TIME (UTC)", "WHO", "FROM", "ACTION", "TARGET", "DETAIL"], rows, shrink=("TARGET", "DETAIL"))


class LogView:
    """Log lines and events as text, each line behind what tells its source apart; or an object a line."""

    def __init__(self, screen, prefix=(), events=True, times=False):
        self.screen, self.prefix, self.events, self.times = screen, prefix, events, times
        self.last = {}  # job id to what was last said of its state

    def line(self, line):
        message = line["message"]
        if not self.screen.raw:
            message = self.screen.paint(clean(message), LEVEL_COLOURS.get(line["level"]))
        source = " ".join(cell(line[name]) for name in self.prefix)
        when = self.screen.paint(f"{cell(line['timestamp'])} ", "dim") if self.times else ""
        self.screen.line(when + (self.screen.paint(source + " | ", "cyan") if source else "") + message)

    def event(self, event):
        """One Event. Notes go to stderr, for programs too."""
        if event.kind == "opened":
            return
        if event.kind == "note":
            self.screen.note(event.data)
        elif self.screen.as_json:
            self.screen.object_line({"event": event.kind, "data": event.data})
        elif event.kind == "log":
            self.line(event.data)
        elif event.kind == "gap":
            self.screen.note(f"lines are missing here: {event.data['detail']}")
        elif event.kind == "job" and self.events:
            self.job(event.data)

    def job(self, job):
        said = f"-- {job['app']} on {job['host']}: {state(job)} (attempt {job['attempt']} of job {job['id']})"
        if self.last.get(job["id"]) != said:  # an event may tell of the commit alone
            self.screen.note(said)
        self.last[job["id"]] = said


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# Owns: lists over their pages, and what an id or its start names. Ignores: what is done with it.


def newest(client, path, name, most, limit, filters):
    """{name: […], next} with up to `limit` of what `path` lists, over as many pages of at most `most` as it takes."""
    found, before = [], None
    while True:
        page = client.call("GET", path, {**filters, "limit": min(most, limit - len(found)), "before": before})
        found += page[name]
        before = page["next"]
        if before is None or len(found) >= limit:
            return {name: found, "next": before}


def all_of(client, path, name):
    """All that `path` lists by name, page after page."""
    found, after = [], None
    while True:
        page = client.call("GET", path, {"limit": PAGE_NAMES, "after": after})
        found += page[name]
        after = page["next"]
        if after is None:
            return found


def list_hosts(client):
    return {"hosts": all_of(client, "/v1/hosts", "hosts")}


def list_apps(client):
    """Each app once, with all of its hosts: in the pages one with many hosts goes on from one to the next."""
    apps = {}
    for part in all_of(client, "/v1/apps", "apps"):
        apps.setdefault(part["name"], {**part, "hosts": []})["hosts"] += part["hosts"]
    return {"apps": list(apps.values())}


def list_jobs(client, limit, **filters):
    return newest(client, "/v1/jobs", "jobs", PAGE_JOBS, limit, filters)


def job_path(job_id, action=""):
    return f"/v1/jobs/{quote(job_id, safe='')}{action}"


def get_job(client, job_id):
    return client.call("GET", job_path(job_id))["job"]


def waiting(client, jobs):
    """[(job, what it waits for)] of those of `jobs` that are pending and where that is known; no answer, none known."""
    pending = [job for job in jobs if job["status"] == "pending" and not job["hold"]]
    with suppress(Failure):
        hosts = list_hosts(client)["hosts"] if pending else ()
        reasons = {host["hostname"]: why_waits(client, host) for host in hosts}
        return [(job, reasons[job["host"]]) for job in pending if reasons.get(job["host"])]
    return []


def deployment_path(deployment_id, action=""):
    return f"/v1/deployments/{quote(deployment_id, safe='')}{action}"


def get_deployment(client, deployment_id):
    return client.call("GET", deployment_path(deployment_id))["deployment"]


def jobs_of(client, deployment_id):
    """Its jobs in the order in which they were made, which is that of the batches."""
    return sorted(list_jobs(client, ALL, deployment_id=deployment_id)["jobs"], key=lambda job: job["id"])


def lock_of(client, deployment):
    """The lock of a deployment that is held by it; None where there is none, or no telling."""
    with suppress(Failure):
        apps = list_apps(client)["apps"] if deployment["hold"] == "lock" else ()
        return next((app["lock"] for app in apps if app["name"] == deployment["app"]), None)


def unless(status, call, *given):
    """What `call(*given)` answers; None where it is refused with that status: 404 also where a controller does not know the call."""
    try:
        return call(*given)
    except Failure as failure:
        if failure.status != status:
            raise


def find_delivery(client, text):
    """The Delivery of that id, or the only one of the newest whose id starts so; None where there is none."""
    answer = unless(404, client.call, "GET", f"/v1/deliveries/{quote(text, safe='')}")
    if answer:
        return answer["delivery"]
    page = unless(404, client.call, "GET", "/v1/deliveries", {"limit": PAGE_JOBS}) or {"deliveries": ()}
    found = [one for one in page["deliveries"] if one["id"].startswith(text)]
    return found[0] if len(found) == 1 else None


def named(client, prefix):
    """[(kind, Job or Deployment)] whose id is or starts with `prefix`; deployments only where it names no single job."""
    if len(prefix) == ID_LENGTH:
        found = [("job", unless(404, get_job, client, prefix))]
        found = found if found[0][1] else [("deployment", unless(404, get_deployment, client, prefix))]
        return [one for one in found if one[1]]
    jobs = [("job", job) for job in client.call("GET", "/v1/jobs", {"id": prefix, "limit": CANDIDATES})["jobs"]]
    if len(jobs) == 1:
        return jobs
    page = unless(404, client.call, "GET", "/v1/deployments", {"id": prefix, "limit": CANDIDATES}) or {"deployments": ()}
    return [("deployment", one) for one in page["deployments"]] + jobs


def find(client, text, deliveries=False):
    """(kind, object): the one Job, or else Deployment, or else, where asked for, Delivery whose id starts with `text`."""
    prefix = text.lower()
    if not deliveries and not re.fullmatch(r"[0-9a-f-]{1,36}", prefix):
        raise Failure(WRONG_USE, f"{text!r} is no start of an id (hex and dashes): `{own_call()} jobs` and `deployments` list them")
    found = named(client, prefix) if re.fullmatch(r"[0-9a-f-]{1,36}", prefix) else []
    if len(found) > 1:
        what = [f"{one['app']} {'on ' + one['host'] if kind == 'job' else kind}" for kind, one in found]
        items = [f"{one['id']}  {words}, {ago(one['created_at'])}" for words, (_, one) in zip(what, found, strict=True)]
        more = " or more" if len(found) >= CANDIDATES else ""
        raise Failure(WRONG_USE, f"{prefix} is the start of {len(found)}{more} ids ({client.url}), give more of one:", items=items)
    if not found and deliveries and text:
        found = [("delivery", one) for one in [find_delivery(client, text)] if one]
    if not found:
        lists = "`ctl.py jobs` and `ctl.py deployments` list them" + (", `ctl.py deliveries` pushes" if deliveries else "")
        raise Failure(REFUSED, f"no id of a job or deployment starts with {text} ({client.url}): {own_words(lists)}")
    return found[0]


def find_job(client, text):
    kind, one = find(client, text)
    if kind != "job":
        raise Failure(WRONG_USE, f"{text} is a deployment: `{client.command('status ' + one['id'])}` lists its jobs")
    return one


# ----------------------------------------------------------------------------------------------------------------------
# Board
# Owns: a deployment while it is followed, as a frame of a terminal and as lines. Ignores: who made it.


class Board:
    """A deployment and its jobs as their stream tells of them, the last line that each has logged, and what the pending ones wait for."""

    def __init__(self, client, deployment):
        self.client, self.deployment = client, deployment
        self.jobs, self.last, self.waits = {}, {}, {}  # all by the job's id
        self.lock, self.note, self.asked = None, "", -ASK_S

    def is_over(self):
        return self.deployment["status"] in OVER

    def read(self):
        """All of it as the controller has it now. The deployment first: where that is over, so are its jobs."""
        backoff = Backoff()
        while True:
            try:
                self.deployment = get_deployment(self.client, self.deployment["id"])
                self.jobs = {job["id"]: job for job in jobs_of(self.client, self.deployment["id"])}
                self.lock = lock_of(self.client, self.deployment)
                return
            except Failure as failure:
                if not failure.again or not backoff.wait(failure.after or 0):
                    raise

    def take(self, event):
        """Lets the event change it; whether it is one of this deployment. What tells of earlier than is known changes nothing."""
        (kind, data), wanted = event, self.deployment["id"]
        self.note = data if kind == "note" else ""
        if kind in ("opened", "gap"):
            self.read()
        elif kind == "log" and data["job_id"] in self.jobs:
            self.last[data["job_id"]] = data["message"]
        elif kind == "job" and data["deployment_id"] == wanted:
            known = self.jobs.get(data["id"])
            if not known or (known["status"] not in ENDED and known["attempt"] <= data["attempt"]):
                self.jobs[data["id"]] = data
        elif kind == "deployment" and data["id"] == wanted:
            if not self.is_over():
                self.deployment, self.lock = data, lock_of(self.client, data)
        else:
            return False
        return True

    def ask(self):
        """What keeps its pending jobs, asked now and then."""
        if not self.is_over() and time.monotonic() - self.asked >= ASK_S:
            self.asked = time.monotonic()
            self.waits = {job["id"]: reason for job, reason in waiting(self.client, self.jobs.values())}

    def title(self):
        """web main: running, 2 of 8 succeeded, 6 held"""
        one = self.deployment
        return f"{one['app']} {short_commit(one['ref'])}: {one['status']}, {progress(count_of(self.jobs.values()))}"

    def why(self, job):
        """What keeps a job, or why it ended as it did; None where there is nothing to say."""
        kept = HOLDS.get(job["hold"], job["hold"]) or self.waits.get(job["id"])
        return kept if job["status"] == "pending" else failure_words(job) or None


RANKS = {"running": 0, "failed": 1, "pending": 2, "held": 3}  # who is shown first where there is no room for all


def chosen(jobs, most):
    """The jobs that are shown in so many lines: all, else those that run, failed or are next; in their order."""
    if len(jobs) <= most:
        return jobs
    those = sorted((job for job in jobs if counted_as(job) in RANKS), key=lambda job: RANKS[counted_as(job)])
    return sorted(those[: max(most, 0)], key=lambda job: job["id"])


def frame(screen, board, lines):
    """What a terminal with room for so many lines shows of a board."""
    one, jobs, most = board.deployment, list(board.jobs.values()), columns()
    said = [strategy_words(one["strategy"]), held_words(board.client, one, board.lock), board.note]
    said = list(filter(None, said))
    shown = chosen(jobs, lines - len(said) - 2)  # a title and headers
    if len(shown) < len(jobs):
        shown = chosen(jobs, lines - len(said) - 3)  # and the count of the others
    rows = []
    for job in shown:
        log = board.last.get(job["id"]) if job["status"] == "running" else None
        words = log or board.why(job) or short_commit(job["commit"]) or " "
        status = "held" if counted_as(job) == "held" else job["status"]
        rows.append([job["host"], status, took(job) if job["started_at"] else " ", words])
    ran = f", {took(one)}" if one["started_at"] else ""
    left = count_of(jobs) - count_of(shown)
    table = screen.lines(["HOST", "STATUS", "TIME", " "], rows, shrink=("HOST", " ")) if rows else []
    others = [cut(f"and {left.total()} others: {counts(left)}", most)] if left else []
    title = "" if board.is_over() else "|/-\\"[int(time.monotonic() / TICK_S) % 4] + " "
    title = cut(title + cell(board.title()), most - width(ran)) + ran
    return [screen.paint(title, "bold"), *(cut(cell(text), most) for text in said), *table, *others]


def gathered(events):
    """The events that came: waits for one as long as TICK_S, then a moment for more."""
    from queue import Empty

    found = []
    with suppress(Empty):
        found.append(events.get(timeout=TICK_S))
        time.sleep(FRAME_S)
        while True:
            found.append(events.get_nowait())
    return found


def draw(screen, board, stream):
    """Follows on a terminal, until the deployment is over: a thread reads the stream, this one draws."""
    import signal
    from queue import SimpleQueue
    from threading import Thread

    events = SimpleQueue()  # the one whose put() a handler of signals may call
    before = signal.signal(signal.SIGWINCH, lambda *_: events.put(Event("resized", None)))
    Thread(target=pump, args=(stream, events), daemon=True).start()
    try:
        while not board.is_over():
            for event in gathered(events):
                if isinstance(event, Exception):
                    raise event
                board.take(event)
            if board.jobs:
                board.ask()
                screen.redraw(lambda lines: frame(screen, board, lines))
        board.read()
        screen.redraw(lambda lines: frame(screen, board, lines))
    except KeyboardInterrupt:
        print("\r\x1b[K", end="", flush=True)  # the ^C that the terminal shows
        raise
    finally:
        signal.signal(signal.SIGWINCH, before)


class Changes:
    """What there is to say of a board, a line a change of status: time, host, status, reason."""

    def __init__(self, screen, board):
        self.screen, self.board, self.told = screen, board, {}

    def tell(self):
        """What has changed since. At first all of it in a line, and of the jobs those that are not about to start."""
        one, first = self.board.deployment, not self.told
        held = held_words(self.board.client, one, self.board.lock)
        if first:
            self.say(None, None, None, self.board.title(), held)
        self.say(one["id"], (one["status"], one["hold"]), one["completed_at"], f"deployment: {one['status']}", held, first)
        for job in list(self.board.jobs.values()):
            stamp, why = job["completed_at"] or (job["status"] == "running" and job["started_at"]), self.board.why(job)
            known = first and job["status"] == "pending" and job["id"] not in self.board.waits
            self.say(job["id"], (job["status"], job["hold"], bool(why)), stamp, f"{job['host']}: {job['status']}", why, known)

    def say(self, key, state, stamp, what, why, known=False):
        if not known and (key is None or self.told.get(key) != state):
            clock = stamp[11:19] if stamp else time.strftime("%H:%M:%S", time.gmtime())
            self.screen.line(clean(f"{clock}Z {what}" + (f" ({why})" if why else "")))
        self.told[key] = state


def note_waits(client, screen, jobs):
    """What some of the jobs wait for, where it is not another batch."""
    for _, reason in waiting(client, jobs)[:CANDIDATES]:
        screen.note(f"waits for: {reason}")


def tell(screen, board, stream, quiet):
    """Follows in lines, or objects a line, or `quiet`, until the deployment is over."""
    changes = Changes(screen, board)
    for event in stream:
        ours = board.take(event)
        if quiet and not screen.as_json and event.kind == "opened":
            note_waits(board.client, screen, board.jobs.values())
        if event.kind == "note":
            screen.note(event.data)
        elif ours and screen.as_json and not quiet and event.kind != "opened":
            screen.object_line({"event": event.kind, "data": event.data})
        elif ours and event.kind != "log" and not (quiet or screen.as_json):
            board.ask()
            changes.tell()
        if board.is_over():
            break
    board.read()
    if not (quiet or screen.as_json):
        changes.tell()


# ----------------------------------------------------------------------------------------------------------------------
# Verbs
# Owns: one function a verb, (client, screen, options) -> exit code. Ignores: argv, what a failure looks like.


def tell_waiting(client, screen, results):
    """Says once what jobs wait for: those that wait still, and where no warning has said so."""
    warnings = " ".join(one.get("warning") or "" for one in results)
    with suppress(Failure):
        for job, reason in () if screen.as_json else waiting(client, [one["job"] for one in results]):
            if reason.split(" (")[0] not in warnings and get_job(client, job["id"])["status"] == "pending":
                screen.note(f"waits for: {reason}")


def watch(client, screen, results, show):
    """Waits for the end of the jobs of `results`, with their logs where `show`; the jobs as they ended."""
    jobs = [one["job"] for one in results]
    view = LogView(screen, ("host",) if len(jobs) > 1 else (), events=False)
    tail = STREAM_TAIL_MOST if show else 0
    try:
        tell_waiting(client, screen, results)
        streams = [Stream(client, {"job_id": job["id"], "tail": tail}, answered=True) for job in jobs]
        for event in merged(streams):
            if show or event.kind == "note":
                view.event(event)
        return [get_job(client, job["id"]) for job in jobs]
    except (KeyboardInterrupt, Failure):
        commands = ", ".join(client.command(f"cancel {job['id']}") for job in jobs)
        screen.note(f"no longer watched, the deployment goes on; to end it: {commands}")
        raise


def already(job):
    """What to say of a deployment that is there already. A branch may have moved since its start; a full SHA stays."""
    ref = cell(job["ref"])
    if job["status"] != "running" or short_commit(ref) != ref:
        return f"this deployment is {job['status']} already, --force makes a new one"
    commit = f" (commit {short_commit(job['commit'])})" if job["commit"] else ""
    return f"this deployment is running already, with {ref} as it was at its start{commit}; --force deploys {ref} as it is now"


def conclude(client, screen, options, results):
    """Shows the answers to creations, {job, created, warning?} each; waits for the ends where the options say so."""
    for one in results:
        if one.get("warning"):
            screen.note(f"warning: {one['warning']}")
        if not one["created"]:
            screen.note(f"{one['job']['host']}: {already(one['job'])}")
    made = [one["job"] for one in results]
    if not (options.follow or options.wait):
        screen.show({"results": results}, lambda: show_jobs(screen, made))
        return DONE
    ended = watch(client, screen, results, options.follow)
    document = {"results": [{**one, "job": job} for one, job in zip(results, ended, strict=True)]}
    if screen.as_json and options.follow:
        screen.object_line({"event": "results", "data": document})
    else:
        screen.show(document, lambda: [show_outcome(screen, client, job) for job in ended])
    return DONE if all(job["status"] == "success" for job in ended) else FAILED


def follow_deployment(client, screen, answer, quiet=False):
    """Follows the deployment of `answer` to its end, `quiet`: says how it ended alone; the exit code."""
    board = Board(client, answer["deployment"])
    live = screen.live and not quiet
    tail = STREAM_TAIL_MOST if live or (screen.as_json and not quiet) else 0
    stream = Stream(client, {"app": board.deployment["app"], "tail": tail}, answered=True)
    try:
        draw(screen, board, stream) if live else tell(screen, board, stream, quiet)
    except (KeyboardInterrupt, Failure):
        again, end = (client.command(f"{verb} {board.deployment['id']}") for verb in ("follow", "cancel"))
        screen.note(f"no longer watched, the deployment goes on; to follow it again: {again}; to end it: {end}")
        raise
    one, jobs = board.deployment, list(board.jobs.values())
    document = {**answer, "deployment": one, "jobs": jobs}
    if screen.as_json and not quiet:
        screen.object_line({"event": "results", "data": document})
    else:
        screen.show(document, lambda: show_end(screen, client, one, jobs))
    return DONE if one["status"] == "success" else FAILED


def present(screen, client, deployment, jobs=()):
    """What was made of a deployment, and how to see the rest."""
    show_deployment(screen, client, deployment, lock_of(client, deployment))
    screen.table(["HOST", "STATUS", "REF"], [[job["host"], counted_as(job), short_commit(job["ref"])] for job in jobs])
    note_waits(client, screen, jobs)
    if deployment["status"] not in OVER:
        screen.note(f"to follow it: {client.command('follow ' + deployment['id'])}")


def settle(client, screen, options, answer):
    """Shows the answer to the creation of a deployment, {deployment, created, jobs, skipped}; follows it where the options say so."""
    one, jobs = answer["deployment"], answer["jobs"]
    for left_out in answer["skipped"]:
        screen.note(f"left out: {left_out['host']}: {left_out['reason']}")
    if not answer["created"]:
        screen.note(f"this deployment is {one['status']} already" + ", --force makes a new one" * hasattr(options, "force"))
    for job in jobs if answer["created"] else ():
        if job["deployment_id"] != one["id"]:
            other = client.command(f"status {job['deployment_id'] or job['id']}")
            screen.note(f"{job['host']}: the same is {job['status']} there already ({other})")
    if options.follow or options.wait:
        return follow_deployment(client, screen, answer, quiet=not options.follow)
    screen.show(answer, lambda: present(screen, client, one, jobs))
    return DONE


def ask_for(client, screen, options, **given):
    """POST /v1/deployments with what is given; a dry run shows the plan. The answer, None after a dry run."""
    given |= {"app": options.app, "hosts": list(dict.fromkeys(options.host or ())), "dry_run": options.dry_run}
    body = {name: value for name, value in given.items() if value or name == "lock"}
    answer = client.call("POST", "/v1/deployments", body=body)
    if options.dry_run:
        screen.show(answer, lambda: show_plan(screen, client, answer["plan"], answer["skipped"]))
        return None
    return answer


def deploy_app(client, screen, options):
    """A deployment of an app, by its strategy."""
    if not options.app:
        raise Failure(WRONG_USE, "deploy needs --app APP (its hosts, by its strategy), or --repo OWNER/NAME and --host HOST")
    if options.timeout is not None or options.retries is not None:
        raise Failure(WRONG_USE, "--timeout and --retries are of jobs that --repo and --host make: an app has its own in apps.yaml")
    unlock = client.command(f"unlock --app {options.app}")
    client.hints[409] = f"`{unlock}` ends the lock, --override deploys all the same"
    given = {name: getattr(options, name) for name in ("ref", "override", "force")}
    answer = ask_for(client, screen, options, **given, metadata=dict(options.metadata or ()) or None)
    return settle(client, screen, options, answer) if answer else DONE


def rollback(client, screen, options):
    client.hints[409] = f"--to COMMIT names another one, `{client.command('apps')}` shows what each host runs"
    given = {"rollback": True, "to": options.to} | ({"lock": False} if options.no_lock else {})
    answer = ask_for(client, screen, options, **given)
    if answer and not options.no_lock:
        unlock = client.command(f"unlock --app {options.app}")
        screen.note(f"{options.app} is locked now, so that no push brings it back: {unlock}")
    return settle(client, screen, options, answer) if answer else DONE


def deploy_jobs(client, screen, options):
    """A job a host. A refusal ends it there; the jobs that were made before are shown and go on."""
    if not options.host:
        raise Failure(WRONG_USE, "deploy --repo needs --host HOST; --app APP without --repo takes all hosts of the app")
    if options.override or options.dry_run:
        raise Failure(WRONG_USE, "--override and --dry-run are of deployments: name the app with --app, and leave out --repo")
    given = {name: getattr(options, name) for name in ("repo", "ref", "app", "timeout", "retries")}
    given |= {"force": options.force or None, "metadata": dict(options.metadata) if options.metadata else None}
    body = {name: value for name, value in given.items() if value is not None}
    results = []
    for host in dict.fromkeys(options.host):
        try:
            results.append(client.call("POST", "/v1/jobs", body={**body, "host": host}))
        except Failure as failure:
            if results:
                screen.show({"results": results}, lambda: show_jobs(screen, [one["job"] for one in results]))
                failure.text += f" ({len(results)} made before it go on; {host} and those after it have no job)"
            raise
    return conclude(client, screen, options, results)


def deploy(client, screen, options):
    return (deploy_jobs if options.repo else deploy_app)(client, screen, options)


def retry(client, screen, options):
    """A job anew; of a deployment the hosts that have not succeeded."""
    kind, one = find(client, options.id)
    if kind == "deployment":
        return settle(client, screen, options, client.call("POST", deployment_path(one["id"], "/retry")))
    return conclude(client, screen, options, [client.call("POST", job_path(one["id"], "/retry"))])


def show_state(client, screen, deployment):
    jobs = jobs_of(client, deployment["id"])

    def view():
        show_deployment(screen, client, deployment, lock_of(client, deployment), jobs)
        print()
        show_jobs(screen, jobs)
        for words in failures(client, jobs):
            screen.note(words)
        note_waits(client, screen, jobs)

    screen.show({"deployment": deployment, "jobs": jobs}, view)
    return DONE


def status(client, screen, options):
    kind, job = find(client, options.id)
    if kind == "deployment":
        return show_state(client, screen, job)
    waits = [] if screen.as_json else waiting(client, [job])
    screen.show({"job": job}, lambda: show_job(screen, client, job, *(reason for _, reason in waits)))
    return DONE


def cancel(client, screen, options):
    kind, one = find(client, options.id)
    if kind == "deployment":
        answer = client.call("POST", deployment_path(one["id"], "/cancel"))
        screen.show(answer, lambda: present(screen, client, answer["deployment"]))
        return DONE
    answer = client.call("POST", job_path(one["id"], "/cancel"))
    job = answer["job"]
    asked = f"cancel asked for: the agent of {cell(job['host'])} stops it ({client.command('status ' + job['id'])})"
    screen.show(answer, lambda: show_outcome(screen, client, job) if job["status"] in ENDED else screen.line(asked))
    return DONE


def known(client, kind):
    """The names of the apps of apps.yaml; of the hosts those that have an agent or open jobs, and those of the apps.

    A token of one app alone is told of that and its hosts.
    """
    apps = list_apps(client)["apps"]
    if kind == "app":
        return [one["name"] for one in apps]
    hosts = (unless(403, list_hosts, client) or {"hosts": []})["hosts"]
    return [one["hostname"] for one in hosts + [host for app in apps for host in app["hosts"]]]


def nearest(name, names):
    """`; did you mean ...?` where `name` is not one of `names` and one looks like it, else nothing."""
    from difflib import get_close_matches

    return "".join(f"; did you mean {one}?" for one in get_close_matches(name, names, 1) if name not in names)


def meant(client, app, host):
    """What an app or a host that the controller does not know may have been; a deed's answer says so itself, a list's does not."""
    return "".join(nearest(one, known(client, kind)) for kind, one in (("app", app), ("host", host)) if one)


NO_JOBS = "no such jobs at {}: {} deploy --repo OWNER/NAME --ref main --host HOST makes one"


def say_nothing(client, screen, nothing, app=None, host=None):
    """Says that a list is empty, with what may have been meant."""
    screen.note(nothing.format(client.url, own_call()) + meant(client, app, host))


def listed(client, screen, options, name, show, nothing, **filters):
    """Shows the newest of what /v1/`name` lists, up to --limit; the exit code."""
    page = newest(client, f"/v1/{name}", name, PAGE_JOBS, options.limit, filters)
    screen.show(page, lambda: show(screen, page[name]))
    if not page[name]:
        say_nothing(client, screen, nothing, filters.get("app"), filters.get("host"))
    elif page["next"]:
        screen.note(f"there are older ones: --limit {options.limit * 10}")
    return DONE


def jobs(client, screen, options):
    filters = {name: getattr(options, name) for name in ("status", "host", "app", "repo")}
    return listed(client, screen, options, "jobs", show_jobs, NO_JOBS, **filters)


def deployments(client, screen, options):
    nothing = "no such deployments at {}: {} deploy --app APP --ref main makes one"
    return listed(client, screen, options, "deployments", show_deployments, nothing, app=options.app, status=options.status)


def deliveries(client, screen, options):
    return listed(client, screen, options, "deliveries", show_deliveries, "no such push has come to {}", repo=options.repo)


def why(client, screen, options):
    """What became of a push, or what a job or deployment came of."""
    kind, one = find(client, options.id, deliveries=True)
    if kind == "delivery":
        screen.show({"delivery": one}, lambda: show_delivery(screen, client, one))
        return DONE
    job = one if kind == "job" else None
    above = one if kind == "deployment" else one["deployment_id"] and unless(404, get_deployment, client, one["deployment_id"])
    delivery = find_delivery(client, above["delivery_id"]) if above and above["delivery_id"] else None
    waits = held_words(client, above, lock_of(client, above)) if above and one["hold"] else None
    if job and not waits and not screen.as_json:
        waits = next((reason for _, reason in waiting(client, [job])), HOLDS.get(job["hold"]))
    document = {"job": job, "deployment": above or None, "delivery": delivery}
    parts = () if job or screen.as_json else jobs_of(client, one["id"])
    screen.show(document, lambda: show_why(screen, client, waits, **document, jobs=parts))
    return DONE


def lock_path(app):
    return f"/v1/apps/{quote(app, safe='')}/lock"


def lock(client, screen, options):
    length = getattr(options, "for")
    body = {"reason": options.reason} | ({} if length is None else {"for": length})
    answer = client.call("PUT", lock_path(options.app), body=body)
    end = answer["lock"]["until"]
    until = f" until {when(end)} UTC ({ends(end)})" if end else ""
    said = f"{clean(options.app)} is locked{until}: pushes are held, deploys are refused"
    screen.show(answer, lambda: screen.line(f"{said} ({client.command('unlock --app ' + clean(options.app))})"))
    return DONE


def unlock(client, screen, options):
    client.hints[404] = f"`{client.command('apps')}` shows which are locked"
    answer = client.call("DELETE", lock_path(options.app))
    ids = answer["deployments"]

    def view():
        waited = f"deployments that waited and go on: {len(ids)}" if ids else "nothing waited; the next push is deployed"
        screen.line(f"{clean(options.app)} is unlocked: {waited}")
        show_deployments(screen, list(filter(None, (unless(404, get_deployment, client, one) for one in ids))))

    screen.show(answer, view)
    return DONE


HOST_ACTIONS = {
    "drain": ("POST", "/drain", "drained: it gets no new job"),
    "resume": ("POST", "/resume", "resumed: it gets jobs again"),
    "remove": ("DELETE", "", "removed: its agent must register anew"),
    "reset": ("POST", "/reset", "reset: its secret no longer counts, its agent must register with an enrolment token"),
}


def change_host(client, screen, options):
    if not options.host:
        raise Failure(WRONG_USE, f"hosts {options.action} needs a host: {own_call()} hosts {options.action} web-01")
    method, end, words = HOST_ACTIONS[options.action]
    answer = client.call(method, f"/v1/hosts/{quote(options.host, safe='')}{end}")
    screen.show(answer, lambda: screen.line(f"{clean(options.host)} {words}"))
    return DONE


def hosts(client, screen, options):
    if options.action:
        return change_host(client, screen, options)
    answer = list_hosts(client)
    screen.show(answer, lambda: show_hosts(screen, answer["hosts"]))
    if not answer["hosts"]:
        screen.note(f"no host has registered at {client.url}; run agent.py on one")
    return DONE


def apps(client, screen, options):
    answer = list_apps(client)
    screen.show(answer, lambda: show_apps(screen, client, answer["apps"]))
    if not answer["apps"]:
        screen.note(f"no apps at {client.url}; write them into its apps.yaml, then: {client.command('reload')}")
    return DONE


def reload(client, screen, options):
    code, answer = client.reload()
    if code == 422:
        mistakes = [f"{one['field']}: {one['message']}" for one in answer["errors"]]
        raise Failure(REFUSED, f"the mapping in force at {client.url} stays, apps.yaml is wrong:", items=mistakes)
    screen.show(answer, lambda: screen.line(f"{clean(answer['message'])}, apps: {cell(answer['apps'])}"))
    return DONE


def health(client, screen, options):
    code, answer = client.health()
    pairs = [(name, answer[name]) for name in ("status", "version", "database")]
    screen.show(answer, lambda: screen.fields([*pairs, ("uptime", span(answer["uptime"])), ("url", client.url)]))
    if code != 200:
        why = f"{client.target('/health')} answers {code}, {answer['database']}"
        raise Failure(NOT_REACHED, f"{why}: the controller's log says more")
    return DONE


def whoami(client, screen, options):
    me = client.call("GET", "/v1/session")
    pairs = [*[(name, me[name]) for name in ("name", "role", "app", "host")], ("ends", ends(me["expires_at"]))]
    sent = client.token_source if client.token else "none was sent"
    screen.show(me, lambda: screen.fields([*pairs, ("token", sent), ("url", client.url)]))
    return DONE


def audit(client, screen, options):
    nothing = "nothing of that kind was done at {}"
    return listed(client, screen, options, "audit", show_audit, nothing, who=options.who, action=options.action)


STRONGER = ("DEPLOYBOT_URL", "DEPLOYBOT_TOKEN", "DEPLOYBOT_TOKEN_FILE")  # than what is kept


def given_token(url, options):
    """(token, where it comes from): of a file, asked for where nobody sees it, or of a stdin that is no terminal."""
    if options.token_file:
        return text_of(options.token_file, "--token-file"), options.token_file
    with suppress(OSError, ValueError, EOFError, AttributeError):  # AttributeError: there is no stdin at all
        if sys.stdin.isatty():
            from getpass import getpass

            return getpass(f"token for {url}: ").strip(), "the terminal"
        if options.token_stdin:
            return sys.stdin.read().strip(), "stdin"
    raise Failure(WRONG_USE, "no token was given: type it on a terminal, or use --token-stdin or --token-file FILE")


def login(client, screen, options):
    """Makes client.url the controller in force, with a token that it takes: the one kept for it, else a new one."""
    found, me = kept(), None
    if client.url.startswith("http:") and not is_loopback(client.url):
        screen.note("warning: http shows the token to everyone on the way, https does not")
    if not (options.token_file or options.token_stdin) and client.url in found["tokens"]:
        client.token, client.token_source = controller_token(client.url, (found["tokens"][client.url], f"{own_name()} login"))
        me = unless(401, client.call, "GET", "/v1/session")
    if me is None:
        client.token, client.token_source = controller_token(client.url, given_token(client.url, options))
        client.hints[401] = f"the token from {client.token_source} is not valid here, nothing was kept"
        me = client.call("GET", "/v1/session")
    keep({"url": client.url, "tokens": {**found["tokens"], client.url: client.token}})
    said = f"signed in to {client.url} as {me['name']}, {me['role']}: kept in {kept_path()}"
    screen.show(me, lambda: screen.line(clean(said)))
    for name in filter(os.environ.get, STRONGER):
        screen.note(f"{name} is set, and stays stronger")
    return DONE


def logout(client, screen, options):
    found = kept()
    if client.url not in found["tokens"]:
        others = ", but for:" if found["tokens"] else ""
        raise Failure(WRONG_USE, f"no token is kept for {client.url}{others}", items=found["tokens"])
    del found["tokens"][client.url]
    keep({**found, "url": None if found["url"] == client.url else found["url"]})
    said = f"signed out of {client.url}: its token is kept no more; `{client.command('token revoke NAME')}` would end it there"
    screen.show({"url": client.url}, lambda: screen.line(said))
    return DONE


# Tokens. The secret of a new one is the only thing that goes to stdout, so that a script can keep it and show it to nobody.

SETTING_OF = {"agent": "DEPLOYBOT_AGENT_TOKEN of the agent"}


def create_token(client, screen, options):
    given = {name: getattr(options, name) for name in ("role", "name", "host", "app")} | {"expires_in": options.expires}
    answer = client.call("POST", "/v1/tokens", body={name: value for name, value in given.items() if value is not None})
    token, secret = answer["token"], answer["secret"]
    if answer.get("warning"):
        screen.note(f"warning: {answer['warning']}")
    screen.show(answer, lambda: screen.line(clean(secret)))
    only = f" for {bound_to(token)} alone" if bound_to(token) else ""
    setting = SETTING_OF.get(token["role"], "DEPLOYBOT_TOKEN of whoever uses it")
    said = f"token {token['name']}, {token['role']}{only}, ends {ends(token['expires_at'])}"
    screen.note(f"{said}. It is not shown again; it goes into {setting}.")
    return DONE


def list_tokens(client, screen, options):
    answer = client.call("GET", "/v1/tokens")
    screen.show(answer, lambda: show_tokens(screen, answer["tokens"]))
    if not answer["tokens"]:
        screen.note(f"no token was made at {client.url}: {own_call()} token create makes one")
    return DONE


def find_token_of(client, text):
    """The Token with that id, that name, or else the only one whose id starts with `text`."""
    if SECRETS.fullmatch(text):
        hint = "revoke it if others could see it"
        raise Failure(WRONG_USE, f"that is a token itself: give its name or id (`{own_call()} token list`), and {hint}")
    tokens = client.call("GET", "/v1/tokens")["tokens"]
    for fits in (
        lambda token: token["id"] == text.lower(),
        lambda token: token["name"] == text,
        lambda token: token["id"].startswith(text.lower()),
    ):
        found = list(filter(fits, tokens))
        if len(found) > 1:
            items = [f"{token['id']}  {token['name']}, {token['role']}" for token in found]
            said = f"{clean(text)} is the start of {len(found)} tokens' ids ({client.url}), give more of one:"
            raise Failure(WRONG_USE, said, items=items)
        if found and text:
            return found[0]
    raise Failure(REFUSED, f"no token is called {clean(text)!r} ({client.url}): {own_words(TOKEN_HINT)}")


def revoke_token(client, screen, options):
    token = find_token_of(client, options.token)
    answer = client.call("DELETE", f"/v1/tokens/{quote(token['id'], safe='')}")
    screen.show(answer, lambda: screen.line(f"{clean(answer['token']['name'])} revoked: it counts no more"))
    return DONE


# Completion. A script asks this file for every word, so none can be forgotten; no shell evaluates an answer: bash does with compgen -W.

COMPLETIONS = {
    "bash": """_deploybot_ctl() {
    local word
    COMPREPLY=()
    while IFS= read -r word; do COMPREPLY+=("$word"); done \\
        < <(PROGRAM complete-words bash "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -o default -F _deploybot_ctl ctl.py deploybot-ctl
""",
    "zsh": """_deploybot_ctl() {
    local word said
    local -a found shown
    while IFS=$'\\t' read -r word said; do
        found+=("$word") shown+=("${(r:26:)word} $said")
    done < <(PROGRAM complete-words zsh "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)
    if (( $#found )); then compadd -l -d shown -a found; else _files; fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
compdef _deploybot_ctl ctl.py deploybot-ctl
""",
    "fish": """function __deploybot_ctl
    set -l given (commandline -opc)
    set -e given[1]
    PROGRAM complete-words fish $given (commandline -ct) 2>/dev/null
end
complete -c ctl.py -c deploybot-ctl -f -a '(__deploybot_ctl)'
complete -c ctl.py -c deploybot-ctl -n 'string match -q -- --token-file (commandline -opc)[-1]' -F
""",
}


def completion(client, screen, options):
    import shlex

    print(COMPLETIONS[options.shell].replace("PROGRAM", shlex.join([sys.executable, os.path.abspath(__file__)])), end="")
    return DONE


# Logs are three readings: `-f` the stream; --job a job's stored lines, page by page; neither, the newest jobs' lines.


def log_lines(client, job):
    """Every stored line of a job, as the stream would send it: with job_id, host and app."""
    source = {"job_id": job["id"], "host": job["host"], "app": job["app"]}
    after = None
    while True:
        page = client.call("GET", job_path(job["id"], "/logs"), {"after": after, "limit": PAGE_LINES})
        for line in page["lines"]:
            yield {**source, **line}
        after = page["next"]
        if after is None:
            return


def last_lines(client, job, tail):
    return log_lines(client, job) if tail is None else deque(log_lines(client, job), tail)


def newest_lines(client, options, jobs):
    """(job, its last lines) of those of `jobs` that started, older ones first."""
    left = DEFAULT_TAIL if options.tail is None else options.tail
    found = []
    for job in jobs:
        if left > 0 and job["attempt"]:
            found.append((job, last_lines(client, job, left)))
            left -= len(found[-1][1])
    return found[::-1]


def refuse_unknown(client, kind, name):
    """Raises Failure for an app or a host that nothing is known of: what never comes would be waited for."""
    if name is None or list_jobs(client, 1, **{kind: name})["jobs"]:
        return
    names = known(client, kind)
    if name not in names:
        asked = nearest(name, names) or f": `{client.command(kind + 's')}` lists them"
        raise Failure(REFUSED, f"no {kind} is called {name} at {client.url}{asked}")


def check_names(client, options):
    """Raises Failure for an unknown app or host; a controller that is away for a moment is no reason to end what it streams."""
    try:
        refuse_unknown(client, "app", options.app)
        refuse_unknown(client, "host", options.host)
    except Failure as failure:
        if not failure.again:
            raise


def follow_logs(client, screen, options, job, view):
    """The stream; of one job it ends with the job, and the outcome decides the exit code."""
    query = {"job_id": job and job["id"], "host": options.host, "app": options.app, "tail": options.tail}
    for event in Stream(client, query, answered=job is not None):
        if event.kind == "opened":  # not before: a controller that is busy is waited for
            check_names(client, options)
            tell_waiting(client, screen, [{"job": job}] if job else ())
        view.event(event)
    if job is None:
        return DONE
    job = get_job(client, job["id"])
    if not screen.as_json:
        show_outcome(screen, client, job)
    return DONE if job["status"] == "success" else FAILED


def follow(client, screen, options):
    kind, one = find(client, options.id)
    if kind == "deployment":
        return follow_deployment(client, screen, {"deployment": one})
    every = argparse.Namespace(host=None, app=None, tail=STREAM_TAIL_MOST)
    return follow_logs(client, screen, every, one, LogView(screen))


def logs(client, screen, options):
    if options.job and (options.host or options.app):
        raise Failure(WRONG_USE, "--job names one job already: leave out --host and --app")
    if options.follow and options.tail is not None and options.tail > STREAM_TAIL_MOST:
        raise Failure(WRONG_USE, f"--tail is at most {STREAM_TAIL_MOST} with -f: leave out -f for more")
    job = find_job(client, options.job) if options.job else None
    prefix = () if job else [name for name in ("host", "app") if not getattr(options, name)]
    view = LogView(screen, prefix, times=options.timestamps)
    if options.follow:
        return follow_logs(client, screen, options, job, view)
    jobs = [] if job else list_jobs(client, RECENT_JOBS, host=options.host, app=options.app)["jobs"]
    found = [(job, last_lines(client, job, options.tail))] if job else newest_lines(client, options, jobs)

    def show():
        for one, lines in found:
            if len(found) > 1:
                view.job(one)
            for line in lines:
                view.line(line)

    screen.show({"lines": [line for _, lines in found for line in lines]} if screen.as_json else None, show)
    if not job and not jobs:
        say_nothing(client, screen, NO_JOBS, options.app, options.host)
    return DONE


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# Owns: argv, the table of verbs, help. Ignores: what the verbs do.

EXIT_CODES = """exit codes:
  0    done (with --wait, --follow, `follow` and `logs -f --job`: the deployment succeeded)
  1    the deployment failed, in part too, or was cancelled (from those four alone)
  2    wrong use: an option, a setting, or a start of an id that fits several
  3    the controller was not reached, or did not answer as one (5xx, a redirect, no JSON); `health`: it is not well
  4    refused: not signed in (401), not allowed (403), not there (404), not in this state (409), wrong fields (422),
       too large (413), too often (429: the line says when to come back; what follows a log waits until then)
  130  ended by Ctrl-C; the deployment goes on
  141  what reads the output went away"""

ENVIRONMENT = f"""environment:
  DEPLOYBOT_URL         the controller (default: that of the last `login`, else {DEFAULT_URL})
  DEPLOYBOT_TOKEN       the token to send
  DEPLOYBOT_TOKEN_FILE  or the file that holds it; where neither is set, what `login` kept for the URL is sent, or,
                        to a loopback one, what ./{TOKEN_FILE} holds, if it is your own file
  XDG_CONFIG_HOME       where `login` keeps it, in deploybot/ (default ~/.config)
  NO_COLOR              no colour, also on a terminal
  SSL_CERT_FILE         the file (PEM) of the CA of an https controller, where the system does not know it"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise Failure(WRONG_USE, f"{clean(message)}: see {self.prog} --help")


def whole(least):
    """A type for whole numbers from `least` on."""

    def number(text):
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        return int(text)

    return number


def time_of(least, most):
    """A type for a length of time, as apps.yaml takes it: 30s, 5m, 2h, 1d or plain seconds; in seconds."""

    def length_of(text):
        found = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text)
        length = int(found[1]) * dict(UNITS)[found[2] or "s"] if found else 0
        if not least <= length <= most:
            limits = f"from {span(least)} to {span(most)}"
            raise argparse.ArgumentTypeError(f"{text!r} is no time {limits}: write 30s, 5m, 2h, 1d or plain seconds")
        return length

    return length_of


def pair(text):
    key, sign, value = text.partition("=")
    if not key or not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


TIME_HELP = "30s, 15m, 2h, 1d or plain seconds"
JOB_HELP = "a job's id, or any start of it that only it has"
TAIL_HELP = f"the last N lines (default: all of a job, else {DEFAULT_TAIL}; with -f at most {STREAM_TAIL_MOST})"

HOST, APP, REPO = (("--host", {}), ("--app", {}), ("--repo", {"metavar": "OWNER/NAME"}))
ID = ("id", {"metavar": "ID", "help": "the id of a job or of a deployment, or any start of it that only one has"})
WHY = ("id", {"metavar": "ID", "help": "the id of a delivery, a job or a deployment, or a start of it"})
WATCH = (
    ("--follow", {"action": "store_true", "help": "show all hosts live, or the log of a job, until the end"}),
    ("--wait", {"action": "store_true", "help": "wait for the end without that, then show how it ended"}),
)
AN_APP = ("--app", {"required": True, "help": "of apps.yaml"})
HOSTS_OF = ("--host", {"action": "append", "help": "only this one, and again for each further host (default: all of the app)"})
DRY_RUN = ("--dry-run", {"action": "store_true", "help": "show hosts, batches and commands, and make nothing"})
DEPLOY = (
    ("--app", {"help": "of apps.yaml: a deployment of its hosts, by its strategy"}),
    ("--ref", {"required": True, "help": "a branch, a tag or a commit"}),
    HOSTS_OF,
    ("--override", {"action": "store_true", "help": "also while the app is locked"}),
    ("--force", {"action": "store_true", "help": "a new one, also while the same is pending or running"}),
    DRY_RUN,
    ("--repo", {"metavar": "OWNER/NAME", "help": "instead of a deployment a job for each --host, at once"}),
    ("--timeout", {"type": time_of(1, MAX_TIMEOUT), "metavar": "TIME", "help": f"{TIME_HELP} (default: the app's, or an hour)"}),
    ("--retries", {"type": whole(0), "metavar": "N", "help": "attempts after one that was lost (or the app's)"}),
    ("--metadata", {"type": pair, "action": "append", "metavar": "KEY=VALUE", "help": "kept with the jobs; repeatable"}),
)
ROLLBACK = (
    AN_APP,
    ("--to", {"metavar": "COMMIT", "help": "default: on each host the success before the present one"}),
    HOSTS_OF,
    ("--no-lock", {"action": "store_true", "help": "leave the app unlocked: the next push deploys again"}),
    DRY_RUN,
)
LOCK = (
    AN_APP,
    ("--reason", {"required": True, "help": "what others are told"}),
    ("--for", {"type": time_of(*LOCK_LIFE), "metavar": "TIME", "help": f"{TIME_HELP} (default: until it is unlocked)"}),
)
NEWEST = ("--limit", {"type": whole(1), "default": 20, "metavar": "N", "help": "the newest N (default 20)"})
LOGS = (
    ("--job", {"metavar": "JOB", "help": JOB_HELP}),
    ("--follow", "-f", {"action": "store_true", "help": "go on with what comes; with --job until its deployment ends"}),
    ("--tail", {"type": whole(0), "metavar": "N", "help": TAIL_HELP}),
    ("--timestamps", "-t", {"action": "store_true", "help": "the time of each line before it, in UTC"}),
    ("--raw", {"action": "store_true", "help": "leave control characters and colours of the scripts in"}),
)
JOBS = (("--status", {"choices": ("pending", "running", *ENDED)}), NEWEST)
DEPLOYMENTS = (("--status", {"choices": ("pending", "running", *OVER)}), NEWEST)
HOSTS = (
    ("action", {"nargs": "?", "choices": HOST_ACTIONS, "help": "what to do to HOST (default: list all)"}),
    ("host", {"nargs": "?", "metavar": "HOST", "help": "the name that `hosts` shows"}),
)
HOSTS_MORE = """
  drain   no new job starts there; what runs goes on to its end, what is pending waits; its agent stays
  resume  ends that: what is pending starts
  remove  forgets its agent, which must enrol anew, and that it was drained; what is pending waits, while a job runs it is refused
  reset   its agent's secret no longer counts: it must enrol anew, with an enrolment token; what runs goes on, and ends as agent_lost
          if that takes too long"""
TOKEN = (
    ("--role", {"required": True, "choices": ("admin", "operator", "viewer", "agent"), "help": "what it may do"}),
    ("--host", {"help": "an agent's: only for this host"}),
    ("--app", {"help": "an operator's or viewer's: only for this app, and nothing else"}),
    ("--expires", {"type": time_of(*TOKEN_LIFE), "metavar": "TIME", "help": f"{TIME_HELP} (default: never)"}),
    ("--name", {"help": "what the audit calls it (default: its role and a part of its id)"}),
)
AUDIT = (
    ("--who", {"metavar": "NAME", "help": "only what this one did: the name of a token"}),
    ("--action", {"help": "only this, such as job.create, token.create, host.reset or reload"}),
    NEWEST,
)
COMMON = (  # before or behind the verb
    ("--url", {"default": argparse.SUPPRESS, "metavar": "CONTROLLER", "help": "its address (default: DEPLOYBOT_URL)"}),
    ("--json", {"action": "store_true", "default": argparse.SUPPRESS, "help": "JSON on stdout, for programs"}),
)

LOGIN = (
    ("url", {"nargs": "?", "default": argparse.SUPPRESS, "metavar": "URL", "help": "of the controller (default: that in force)"}),
    ("--token-stdin", {"action": "store_true", "help": "read the token from stdin, instead of asking for it"}),
    ("--token-file", {"metavar": "FILE", "help": "or from a file"}),
)
LOGOUT = LOGIN[:1]

SHELL = (("shell", {"choices": ("bash", "zsh", "fish"), "help": "to be read by it: the example is for ~/.bashrc"}),)
COMPLETION_EXAMPLE = 'bash > ~/.ctl-completion && echo ". ~/.ctl-completion" >> ~/.bashrc'

LOGS_HELP = f"show a job's log, or the last lines of the {RECENT_JOBS} newest jobs, or with -f what comes"

Verb = namedtuple("Verb", "name run options help example more", defaults=("",))  # more: lines that --help has below help

VERBS = (
    Verb("deploy", deploy, DEPLOY + WATCH, "deploy a ref to the hosts of an app", "--app web --ref main --follow"),
    Verb("rollback", rollback, ROLLBACK + WATCH, "let hosts go back, and lock the app", "--app web --host web-01 --dry-run"),
    Verb("lock", lock, LOCK, "hold pushes and refuse deploys of an app", '--app web --reason "migration under way" --for 2h'),
    Verb("unlock", unlock, (AN_APP,), "end the lock of an app: what it held goes on", "--app web"),
    Verb("status", status, (ID,), "show a deployment or a job, and what it waits for", "0199c2f0"),
    Verb("follow", follow, (ID,), "show a deployment live, or a job's log, until its end", "0199c2f0"),
    Verb("why", why, (WHY,), "tell what became of a push, or what a job or deployment came of", "0199c2f0"),
    Verb("deployments", deployments, (APP, *DEPLOYMENTS), "list deployments, newest first", "--app web --status failed"),
    Verb("deliveries", deliveries, (REPO, NEWEST), "list pushes and what became of them", "--repo myorg/web"),
    Verb("logs", logs, (HOST, APP, *LOGS), LOGS_HELP, "-f --host web-01"),
    Verb("jobs", jobs, (HOST, APP, REPO, *JOBS), "list jobs, newest first", "--status failed --limit 50"),
    Verb("hosts", hosts, HOSTS, "list hosts; drain, resume, remove or reset one", "drain web-01", HOSTS_MORE),
    Verb("apps", apps, (), "list the apps of apps.yaml, their locks and what each host runs", "--json"),
    Verb("cancel", cancel, (ID,), "end a job or all of a deployment: pending at once, running through the agent", "0199c2f0"),
    Verb("retry", retry, (ID, *WATCH), "make an ended job again; of a deployment the hosts without success", "0199c2f0 --follow"),
    Verb("reload", reload, (), "make the controller read its apps.yaml again", ""),
    Verb("health", health, (), "ask whether the controller is well", ""),
    Verb("login", login, LOGIN, "keep a controller and a token for the calls to come", "https://deploy.example.com"),
    Verb("logout", logout, LOGOUT, "forget the token that is kept for a controller", "https://deploy.example.com"),
    Verb("whoami", whoami, (), "show who one is to the controller, and the role", ""),
    Verb("token create", create_token, TOKEN, "make a token, print it once", "--role operator --app web --expires 90d --name ci"),
    Verb("token list", list_tokens, (), "list the tokens that were made", ""),
    Verb("token revoke", revoke_token, (("token", {"metavar": "NAME|ID"}),), "end a token, and the sign-ins made with it", "ci"),
    Verb("completion", completion, SHELL, "print what makes a shell complete the words of a call", COMPLETION_EXAMPLE),
    Verb("audit", audit, AUDIT, "list who did what, newest first", "--action token.create"),
)
GROUPS = {"token": "make, list and revoke tokens"}  # the first word of verbs that have two
ANYWHERE = (("--help", "-h", {"action": "help", "help": "show what there is"}), *COMMON)  # argparse adds the first
VERSION_OPTION = ("--version", {"action": "version", "version": f"{own_name()} {VERSION}"})


def following(path):
    """{word: help} of the verbs that go on from the words of `path`."""
    named, at = [(verb.name.split(), verb.help) for verb in VERBS], len(path)
    return {words[at]: GROUPS.get(words[at], said) for words, said in named if words[:at] == path and len(words) > at}


class Place:
    """Where a command line is after `words`: the verb so far, options and arguments that may come, the option whose value `waits`.

    It reads the tables that the parser is made of. `wrong`: the first word that is in none, and where it stands the `known` ones,
    None behind the last argument of a verb; `url`: of --url.
    """

    def __init__(self, words):
        self.path, self.arguments, self.options = [], [], [VERSION_OPTION, *ANYWHERE]
        self.waits = self.wrong = self.url = self.known = None
        for word in words:
            if self.waits:
                self.url, self.waits = word if "--url" in self.waits else self.url, None
            elif self.wrong is None:
                (self.option if word.startswith("-") else self.word)(word)

    def option(self, word):
        name, sign, value = word.partition("=")
        found = next((one for one in self.options if name in one), None)
        if found is None and name[:2] == "--" != name:
            self.wrong, self.known = name, [one[0] for one in self.options]
        elif found and found[-1].get("action", "append") == "append":  # it takes a value
            self.url, self.waits = value if sign and name == "--url" else self.url, None if sign else found

    def word(self, word):
        if word in following(self.path):
            self.path.append(word)
            given = next((verb.options for verb in VERBS if verb.name.split() == self.path), ())
            self.arguments = [one for one in given if not one[0].startswith("-")]
            self.options = [*(one for one in given if one[0].startswith("-")), *ANYWHERE]
        elif following(self.path):
            self.wrong, self.known = word, list(following(self.path))
        elif not self.arguments or word not in self.arguments[0][-1].get("choices", [word]):
            self.wrong, self.known = word, list(self.arguments[0][-1]["choices"]) if self.arguments else None
        else:
            self.arguments = self.arguments[1:]

    def kind(self):
        """What was wanted where the wrong word stands: an option, a verb, hosts action."""
        if self.wrong.startswith("-"):
            return "option"
        return " ".join([*self.path, self.arguments[0][0]] if self.arguments else ["verb", *self.path])


def mistyped(argv):
    """What is said of the first word that is no verb or no option, with what it may have been; None where there is none."""
    from difflib import get_close_matches

    place = Place(argv)
    if place.wrong is None:
        return None
    see = f"(see {' '.join([own_call(), *place.path])} --help)"
    if place.known is None:
        named = [f"{name} {place.wrong}" for name in ("--app", "--host") if any(name in one for one in place.options)]
        asked = f": did you mean {' or '.join(named)}?" if named else ""
        return clean(f"{' '.join(place.path)} takes no word {place.wrong} there{asked} {see}")
    known = place.known
    meant = [one for one in known if one.startswith(place.wrong)] or get_close_matches(place.wrong, known, 2)
    asked = f"did you mean {' or '.join(meant)}?" if meant else f"there are {', '.join(known)}"
    return f"no {place.kind()} {clean(place.wrong)}: {asked} {see}"


def ids_of(client, path, start):
    """[(id, what it is)] of the newest of jobs or deployments whose id starts so."""
    page = client.call("GET", f"/v1/{path}", {"id": start.lower() or None, "limit": OFFERED})
    on = "host" if path == "jobs" else "ref"
    return [(one["id"], f"{one['status']}, {one['app']} {one[on]}, {ago(one['created_at'])}") for one in page[path]]


def hosts_of(client):
    """[(host, what it is)]: with a token of one app alone, which may not list them all, those of the app."""
    answer = unless(403, list_hosts, client)
    if answer:
        return [(one["hostname"], one["agent_status"]) for one in answer["hosts"]]
    return [(one["hostname"], app["name"]) for app in list_apps(client)["apps"] for one in app["hosts"]]


NAMES = {  # of an argument: (client, its start) to [(name, what it is)]
    "app": lambda client, start: [(one["name"], one["repo"]) for one in list_apps(client)["apps"]],
    "host": lambda client, start: hosts_of(client),
    "job": lambda client, start: ids_of(client, "jobs", start),
    "id": lambda client, start: ids_of(client, "deployments", start) + ids_of(client, "jobs", start),
    "url": lambda client, start: [(url, "") for url in kept()["tokens"]],
}


def values(argument, start, url):
    """[(word, what it is)] for the value of an option or argument. A name that a shell or ctl.py would take for more is left out."""
    if "choices" in argument[-1]:
        return [(one, "") for one in argument[-1]["choices"]]
    names = NAMES.get(argument[0].lstrip("-"))
    if names is None:
        return []
    url = read_url(url)
    client = Client(url, *controller_token(url))
    return [(name, clean(said)) for name, said in names(client, start) if PLAIN.fullmatch(name)]


def offers(words):
    """[(word, what it is)] that may stand where the last of `words` is."""
    *before, last = words or [""]
    is_help, (name, sign, start) = before[:1] == ["help"], last.partition("=")
    place = Place(before[is_help:])
    if place.wrong or (is_help and not following(place.path)):
        return []
    if place.waits:
        found = values(place.waits, last, place.url)
    elif sign:
        option = next((one for one in place.options if name in one), ("", {}))
        found = [(f"{name}={value}", said) for value, said in values(option, start, place.url)]
    elif following(place.path) and not last.startswith("-"):
        found = list(following(place.path).items())
    elif place.arguments and not last.startswith("-"):
        found = values(place.arguments[0], last, place.url)
    else:
        again = [one for one in place.options if one[0] not in before or one[-1].get("action") == "append"]
        found = [(name, settings.get("help", "")) for name, *_, settings in again]
    return [one for one in found if one[0].startswith(last)]


def complete_words(shell, *words):
    """Prints a line for each word that may come: the word and, but for bash, a tab and what it is. Is silent about failures.

    To bash, --app=web is three words, of which the last is asked for.
    """
    from threading import Thread

    found = []
    if shell == "bash":
        words = re.sub("\0=(\0|$)", "=", "\0".join(words)).split("\0")

    def look():
        with suppress(Exception):
            found.extend(offers(list(words)))

    thread = Thread(target=look, daemon=True)  # ends with this process, wherever it hangs
    thread.start()
    thread.join(COMPLETE_S)
    for word, said in list(found):
        print(word.rpartition("=")[2] if shell == "bash" else f"{word}\t{said}")
    return DONE


def add_options(parser, options):
    for *names, settings in options:
        parser.add_argument(*names, **settings)


def make_parser(argv=None):
    """The parser; for `argv`, options of the verbs that it does not name are left out, as they take half of the time to start."""
    called = own_call()
    examples = {verb.name: f"{called} {verb.name} {verb.example}".rstrip() for verb in VERBS}
    listed = "\n  ".join(examples.values())
    parser = Parser(
        prog=called, description="The command line of DeployBot.", epilog=f"examples:\n  {listed}\n\n{EXIT_CODES}\n\n{ENVIRONMENT}"
    )
    add_options(parser, (VERSION_OPTION, *COMMON))
    verbs = {"": parser.add_subparsers(title="verbs (each has its own --help, or: help VERB)", metavar="VERB", dest="verb")}
    for verb in VERBS:
        group, _, name = verb.name.rpartition(" ")
        if group not in verbs:
            those = "\n  ".join(said for name, said in examples.items() if name.startswith(group + " "))
            words = {"help": GROUPS[group], "description": GROUPS[group], "epilog": f"examples:\n  {those}"}
            two = verbs[""].add_parser(group, **words)
            verbs[group] = two.add_subparsers(metavar="|".join(following([group])), required=True)
        words = {"help": verb.help, "description": verb.help + verb.more, "epilog": f"example:\n  {examples[verb.name]}"}
        one = verbs[group].add_parser(name, **words)
        one.set_defaults(run=verb.run)
        if argv is None or verb.name.split()[0] in argv:
            add_options(one, verb.options + COMMON)
    return parser


# ----------------------------------------------------------------------------------------------------------------------
# Main
# Owns: the exit code, and that nobody sees a traceback. Ignores: the rest.


def run(argv):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["complete-words"]:  # for the scripts of `completion` alone
        return complete_words(*argv[1:])
    if argv[:1] == ["help"]:
        argv = [*argv[1:], "--help"]
    try:
        options = make_parser(argv).parse_args(argv)
    except Failure as failure:
        failure.text = mistyped(argv) or failure.text
        raise
    if options.verb is None:
        raise Failure(WRONG_USE, f"name a verb: {', '.join(following([]))} (see {own_call()} --help)")
    flag = getattr(options, "url", None)
    is_argument = options.run in (login, logout) and not any(one.startswith("--url") for one in argv)
    url = DEFAULT_URL if options.run is completion else read_url(flag, "" if is_argument else "--url")
    given = (None, "") if options.run in (login, logout, completion) else controller_token(url)
    client = Client(url, *given, flagged=bool(flag))
    screen = Screen(getattr(options, "json", False), getattr(options, "raw", False))
    try:
        return options.run(client, screen, options)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {clean(error)}"
        hint = f"`{own_call()} health` shows whether its version fits this one's"
        raise Failure(NOT_REACHED, f"{url} answered what was not expected ({why}): {hint}, {VERSION}") from None


def complain(text, items=()):
    with suppress(OSError):  # nobody is left to be told
        print(unsaid("\n".join([f"{own_name()}: {clean(text)}", *map(clean, items)])), file=sys.stderr, flush=True)


def abandon_stdout():
    """What is still buffered for a reader that has gone is dropped, else the interpreter fails on it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def outcome(argv):
    """`run`, with what goes wrong told; the exit code."""
    try:
        return run(argv)
    except SystemExit as end:  # argparse, after --help and --version
        return end.code or DONE
    except Failure as failure:
        complain(failure.text, failure.items)
        return failure.code
    except KeyboardInterrupt:
        return INTERRUPTED


def main(argv=None):
    """Runs one command; its exit code."""
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.reconfigure(errors="replace")
        code = outcome(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        abandon_stdout()
        return BROKEN_PIPE
    except OSError as error:
        abandon_stdout()
        complain(f"cannot write the output: {error.strerror}")
        return WRONG_USE


if __name__ == "__main__":
    sys.exit(main())
