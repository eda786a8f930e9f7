#!/usr/bin/env python3
"""The benchmark: every figure of docs/capacity.md in one run, each beside its yardstick and its target.

    bench.py [--only NAME[,NAME...]] [--json FILE] [--short] [--controller PATH] [--agent PATH] [--folder FOLDER] [--seconds N]

Progress goes to standard error; then comes one table. A target that does not hold is marked with NO and changes no exit code, as
speed differs from machine to machine. What is wrong on any machine (an error status, a lost line) ends it with 1.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable

import agent_work
import figures
import fleet_work
import http_work
import page_work
import size_work
from machine import ROOT, Wrong, end_all, raise_descriptor_limit
from setting import SHORT, Scale, Setting

MEASUREMENTS: dict[str, Callable[[Setting], None]] = {
    "heartbeats": http_work.heartbeats,
    "reads": http_work.reads,
    "creates": http_work.creates,
    "pushes": http_work.pushes,
    "logs": http_work.log_uploads,
    "starts": size_work.starts,
    "fleets": fleet_work.fleets,
    "streams": fleet_work.streams,
    "claims": fleet_work.claims_under_load,
    "restarts": fleet_work.restarts,
    "retention": fleet_work.retention,
    "pages": page_work.pages,
    "beyond": page_work.beyond,
    "long_log": size_work.long_log,
    "disk": size_work.disk,
    "output": agent_work.output,
    "growth": size_work.growth,
}


def names(text: str) -> list[str]:
    chosen = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := set(chosen) - set(MEASUREMENTS):
        raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(MEASUREMENTS)}")
    return chosen


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--controller", type=pathlib.Path, default=ROOT / "deploybot.py", help="the program that is measured")
    parser.add_argument("--agent", type=pathlib.Path, default=ROOT / "agent.py", help="the agent that is measured")
    parser.add_argument("--only", type=names, default=list(MEASUREMENTS), metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="where the figures go; of a whole run bench/results.json")
    parser.add_argument("--short", action="store_true", help="everything in small: whether it works, and no speeds")
    parser.add_argument("--seconds", type=int, default=4, metavar="N", help="of each measurement [4]")
    parser.add_argument("--line-size", type=int, default=1000, metavar="BYTES", help="of the agent's 1 GB of output [1000]")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT, help="where the databases go: a real disk [the checkout]")
    return parser.parse_args()


def measure(setting: Setting, chosen: list[str]) -> None:
    for name in chosen:
        setting.say(f"== {name}")
        before = len(setting.rows) + len(setting.series)
        try:
            MEASUREMENTS[name](setting)
            setting.check(len(setting.rows) + len(setting.series) > before, f"{name} measured nothing")
        except Wrong as wrong:
            setting.check(False, f"{name}: {wrong}")
        except Exception as error:
            traceback.print_exc()
            setting.check(False, f"{name}: {type(error).__name__}: {error}")
        finally:
            end_all()


def show(setting: Setting, machine: dict[str, object]) -> None:
    print(*(f"{name}: {value}" for name, value in machine.items()), "", sep="\n")
    print(figures.table(setting.rows))
    judged = [row for row in setting.rows if row.holds is not None]
    missed = [row for row in judged if not row.holds]
    print(f"\n{len(judged)} targets, {len(missed)} of them missed" if judged else "")
    print(*(f"WRONG: {what}" for what in setting.wrong), sep="\n")


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that what was started ends too
    scale = SHORT if options.short else Scale(max(1, options.seconds), line_size=max(20, options.line_size))
    descriptors = raise_descriptor_limit()
    folder = pathlib.Path(tempfile.mkdtemp(prefix=".bench-", dir=options.folder)).resolve()
    setting = Setting(options.controller.resolve(), options.agent.resolve(), folder, scale, not options.short, descriptors)
    try:
        machine = setting.machine()
        setting.say(", ".join(f"{name} {value}" for name, value in machine.items()))
        measure(setting, options.only)
    finally:
        end_all()
        shutil.rmtree(folder, ignore_errors=True)
    show(setting, machine)
    is_whole = options.only == list(MEASUREMENTS) and not options.short and not setting.wrong
    if kept := options.json or (ROOT / "bench" / "results.json" if is_whole else None):  # a part does not take its place
        figures.write(kept, machine, setting.rows, setting.series, setting.wrong)
    return int(bool(setting.wrong))


if __name__ == "__main__":
    sys.exit(main())
