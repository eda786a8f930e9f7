"""Load over HTTP: wrk where it is there, a client of ours where not, with the same result.

Owns: the command line of wrk and what it prints. Ignores: what is asked.
"""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
from typing import Any, NamedTuple

from clients import closed_loop, paced
from machine import HERE, Wrong, in_process

UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}


class Load(NamedTuple):
    """What a run of a load generator saw. Times in milliseconds; `refused`: answers other than 2xx and 3xx."""

    rate: float
    requests: int
    p50: float
    p99: float
    refused: int
    failed: int  # connections that broke, and answers that never came


def parse_wrk(text: str) -> Load:
    """Raises Wrong for what is no report of wrk's."""

    def time(percent: int) -> float:
        found = re.search(rf"^ +{percent}%\s+([0-9.]+)(us|ms|s|m) *$", text, re.MULTILINE)
        if not found:
            raise ValueError(f"no {percent}%")
        return float(found[1]) * UNITS[found[2]]

    def number(pattern: str) -> float:
        found = re.search(pattern, text)
        return float(found[1]) if found else 0.0

    try:
        rate = re.search(r"^Requests/sec: +([0-9.]+)$", text, re.MULTILINE)
        errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", text)
        return Load(
            float(rate[1] if rate else ""),
            int(number(r"(\d+) requests in ")),
            time(50),
            time(99),
            int(number(r"Non-2xx or 3xx responses: (\d+)")),
            sum(map(int, errors.groups())) if errors else 0,
        )
    except ValueError as error:
        raise Wrong(f"wrk said something else than expected ({error}): {text}") from None


def has_wrk() -> bool:
    return shutil.which("wrk") is not None


def by_wrk(
    port: int, requests: list[bytes], connections: int, seconds: int, folder: pathlib.Path, pause: int = 0, own: bool = False
) -> Load:
    """`pause`: milliseconds on average that a connection waits before each request. `own`: each connection has one request of its
    own and sends it again and again."""
    file = folder / "requests"
    with open(file, "wb") as out:
        for request in requests:
            out.write(b"%d\n" % len(request) + request)
    threads = connections if own else 1
    argv = [
        "wrk",
        f"-t{threads}",
        f"-c{connections}",
        f"-d{seconds}s",
        "--latency",
        "--timeout",
        "20s",
        "-s",
        str(HERE / "load.lua"),
    ]
    argv += [f"http://127.0.0.1:{port}/", "--", str(file), str(pause), *(["own"] if own else [])]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise Wrong(f"wrk: {done.stdout}{done.stderr}")
    return parse_wrk(done.stdout)


def as_load(seen: dict[str, Any]) -> Load:
    """What a client of ours saw."""
    refused = sum(count for status, count in seen["statuses"].items() if status >= 400)
    good = seen["requests"]
    rate = seen["rate"] * (good + refused) / max(good, 1)
    return Load(rate, good + refused, seen["p50_ms"], seen["p99_ms"], refused, seen["lost"])


def drive(
    port: int, requests: list[bytes], connections: int, seconds: float, folder: pathlib.Path, wrk: bool, own: bool = False
) -> Load:
    """By wrk or by a client of ours: so many kept connections, each with one request at a time, none of which may be refused (else
    raises Wrong). After the last request the first one comes again: who must not send one twice looks at how many were sent."""
    if wrk:
        load = by_wrk(port, requests, connections, round(seconds), folder, own=own)
    else:
        load = as_load(in_process(closed_loop, port, requests, connections, seconds).result())
    if load.failed or load.refused:
        raise Wrong(f"of {load.requests} requests {load.refused} were refused and {load.failed} failed")
    return load


def flood(port: int, requests: list[bytes], connections: int, rate: float, seconds: int, folder: pathlib.Path) -> Load:
    """So many requests a second, as far as the machine can send them, over very many connections; answers of any status. A
    connection whose answer takes longer than its share of the time sends less."""
    if has_wrk():
        return by_wrk(port, requests, connections, seconds, folder, max(1, round(connections / rate * 1000)))
    return as_load(in_process(paced, port, requests, connections, rate, seconds).result())
