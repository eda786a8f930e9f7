#!/usr/bin/env python3
"""Plots of a benchmark's JSON, as SVG: plots.py RESULTS.json FOLDER

How cost grows with agents, jobs and log lines. The same JSON gives the same bytes. A background of their own keeps the plots
readable on a dark page. Steps on the x axis stand at equal distances, whatever they are.
"""

from __future__ import annotations

import html
import json
import math
import pathlib
import sys
from typing import Any, NamedTuple

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 72, 56  # of the area where the lines are
COLORS = ("#0b5cad", "#b8500b", "#2e7d32")
DASHED = ' stroke-width="1.5" stroke-dasharray="6 4"'
INK, FAINT, PAPER, TARGET = "#1f2328", "#d0d7de", "#ffffff", "#a40e26"
TICKS = 5


class Plot(NamedTuple):
    """`lines`: what it is called and its series in the JSON; `targets`: the step that one is for, and the value."""

    file: str
    title: str
    x: str
    y: str
    lines: tuple[tuple[str, str], ...]
    targets: tuple[tuple[float, float], ...] = ()


RATES = ("requests a second", (("heartbeats", "heartbeats_by_{}"), ("creates", "creates_by_{}")))


def rates(name: str, title: str, x: str) -> Plot:
    y, lines = RATES
    return Plot(f"rates-by-{name}.svg", title, x, y, tuple((label, series.format(name)) for label, series in lines))


PLOTS = (
    rates("agents", "Heartbeats and creates, by agents that are parked", "parked agents"),
    rates("pending", "Heartbeats and creates, by jobs that wait", "pending jobs in the database"),
    rates("ended", "Heartbeats and creates, by jobs that ended", "ended jobs in the database"),
    Plot(
        "memory-by-agents.svg",
        "Memory of the controller, by agents that are parked",
        "parked agents",
        "resident memory, MiB",
        (("parked", "memory_by_agents"),),
        ((10_000, 350.0),),
    ),
    Plot(
        "latency-by-agents.svg",
        "From a create to the agent's socket, with the targets of p99",
        "parked agents",
        "milliseconds",
        (("p50", "latency_p50_by_agents"), ("p99", "latency_p99_by_agents")),
        ((1000, 10.0), (10_000, 25.0)),
    ),
    Plot(
        "log-lines.svg",
        "Log lines of 80 bytes, 16 connections",
        "lines in one upload",
        "lines stored a second",
        (("durable before the answer", "lines_by_call"),),
        ((100, 150_000.0),),
    ),
)


def top_of(highest: float) -> float:
    """The end of an axis from 0 on, with round ticks below it."""
    step = highest / TICKS or 1.0
    scale = 10.0 ** math.floor(math.log10(step))
    return next(factor for factor in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if factor * scale >= step) * scale * TICKS


def short(number: float) -> str:
    """`150k`, `1M`, `2.5`."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def text(x: float, y: float, words: str, anchor: str = "middle", size: int = 12, color: str = INK, more: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}"{more}>{html.escape(words)}</text>'
    )


def line(x1: float, y1: float, x2: float, y2: float, color: str, more: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"{more}/>'


class Area:
    """Where a value stands: steps from left to right, heights from 0 upwards."""

    def __init__(self, steps: list[float], top: float):
        self.steps, self.top = steps, top
        self.right, self.bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(self, step: float) -> float:
        margin = 40.0
        share = self.steps.index(step) / max(1, len(self.steps) - 1)
        return LEFT + margin + share * (self.right - LEFT - 2 * margin)

    def y(self, value: float) -> float:
        return self.bottom - value / self.top * (self.bottom - TOP)


def axes(plot: Plot, area: Area) -> list[str]:
    parts = []
    for tick in range(TICKS + 1):
        value = area.top * tick / TICKS
        parts.append(line(LEFT, area.y(value), area.right, area.y(value), FAINT))
        parts.append(text(LEFT - 8, area.y(value) + 4, short(value), "end"))
    for step in area.steps:
        parts.append(text(area.x(step), area.bottom + 18, short(step)))
    parts.append(text((LEFT + area.right) / 2, HEIGHT - 14, plot.x))
    middle = (TOP + area.bottom) / 2
    parts.append(text(20, middle, plot.y, more=f' transform="rotate(-90 20 {middle:.1f})"'))
    return parts


def curve(area: Area, points: list[list[float]], color: str) -> list[str]:
    places = [(area.x(step), area.y(value), value) for step, value in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
    parts = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>']
    for x, y, value in places:
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>')
        parts.append(text(x, y - 8, short(value), size=11, color=color))
    return parts


def legend(names: list[str], has_targets: bool) -> list[str]:
    parts, x = [], float(LEFT)
    for name, color in zip(names, COLORS, strict=False):
        parts.append(line(x, 50, x + 20, 50, color, ' stroke-width="3"'))
        parts.append(text(x + 26, 54, name, "start"))
        x += 46 + 7 * len(name)
    if has_targets:
        parts += [line(x, 50, x + 20, 50, TARGET, DASHED), text(x + 26, 54, "target", "start")]
    return parts


def target(area: Area, step: float, value: float) -> list[str]:
    """A dashed line about the step that it is for."""
    x, y, half = area.x(step), area.y(value), 38.0
    return [line(x - half, y, x + half, y, TARGET, DASHED), text(x - half - 4, y + 4, short(value), "end", 11, TARGET)]


def draw(plot: Plot, series: dict[str, list[list[float]]]) -> str:
    found = [(name, series[key]) for name, key in plot.lines]
    steps = sorted({step for _, points in found for step, _ in points})
    targets = [(step, value) for step, value in plot.targets if step in steps]
    highest = max([value for _, points in found for _, value in points] + [value for _, value in targets])
    area = Area(steps, top_of(highest * 1.08))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="system-ui, sans-serif" role="img" aria-label="{html.escape(plot.title)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="6" fill="{PAPER}"/>',
        text(LEFT, 28, plot.title, "start", 15, more=' font-weight="600"'),
        *legend([name for name, _ in found], bool(targets)),
        *axes(plot, area),
    ]
    for step, value in targets:
        parts += target(area, step, value)
    for (_, points), color in zip(found, COLORS, strict=False):
        parts += curve(area, points, color)
    return "\n".join([*parts, "</svg>"]) + "\n"


def plot_all(results: dict[str, Any], folder: pathlib.Path) -> list[str]:
    """Writes every plot of which the series are there; the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    series, written = results["series"], []
    for plot in PLOTS:
        if all(series.get(key) for _, key in plot.lines):
            (folder / plot.file).write_text(draw(plot, series))
            written.append(plot.file)
    return written


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__.splitlines()[0], file=sys.stderr)
        return 2
    for name in plot_all(json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2])):
        print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
