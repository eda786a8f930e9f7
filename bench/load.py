"""Load over HTTP: wrk where it is there, a client of ours where not, with the same result.

Owns: the command line of wrk and what it prints. Ignores: what is asked.
"""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
from typing import NamedTuple

from clients import closed_loop
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
        found = re.search(rf"^ +{percent}%\s+([0-9.]+)(us|ms|s|m)$", text, re.MULTILINE)
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


def by_wrk(port: int, requests: list[bytes], connections: int, seconds: int, folder: pathlib.Path) -> Load:
    file = folder / "requests"
    with open(file, "wb") as out:
        for request in requests:
            out.write(b"%d\n" % len(request) + request)
    argv = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "20s", "-s", str(HERE / "load.lua")]
    done = subprocess.run(
        [*argv, f"http://127.0.0.1:{port}/", "--", str(file)], check=False, capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        raise Wrong(f"wrk: {done.stdout}{done.stderr}")
    return parse_wrk(done.stdout)


def by_ourselves(port: int, requests: list[bytes], connections: int, seconds: int) -> Load:
    seen = in_process(closed_loop, port, requests, connections, seconds).result()
    refused = sum(count for status, count in seen["statuses"].items() if status >= 400)
    return Load(seen["rate"], seen["requests"] + refused, seen["p50_ms"], seen["p99_ms"], refused, seen["lost"])


def drive(port: int, requests: list[bytes], connections: int, seconds: int, folder: pathlib.Path, allow: bool = False) -> Load:
    """So many kept connections, each with one request at a time. Raises Wrong for answers other than 2xx, unless they are allowed,
    and where `requests` began anew and must not have (`allow` aside, the caller sees that from `requests`)."""
    load = by_wrk(port, requests, connections, seconds, folder) if has_wrk() else by_ourselves(port, requests, connections, seconds)
    if (load.refused or load.failed) and not allow:
        raise Wrong(f"of {load.requests} requests {load.refused} were refused and {load.failed} failed")
    return load
