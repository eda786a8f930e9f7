"""What is reported: rows with their yardstick, their target and whether it holds; the table and the JSON.

Owns: comparing and showing. Ignores: how a figure came about.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any


@dataclasses.dataclass
class Row:
    """One line of the table. `yardstick`: name and values, taken around the measurement. With a yardstick it is the ratio
    to their mean that the target is about, else the value. `holds` is None where no speed is judged."""

    name: str
    work: str
    value: float
    unit: str
    yardstick: tuple[str, list[float]] | None = None
    at_least: float | None = None
    at_most: float | None = None
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)
    failed: str = ""  # what is not as it must be, beside the figure
    judged: bool = True

    @property
    def ratio(self) -> float | None:
        if self.yardstick is None:
            return None
        mean = sum(self.yardstick[1]) / len(self.yardstick[1])
        return self.value / mean if mean else 0.0

    @property
    def holds(self) -> bool | None:
        if not self.judged or (self.at_least is None and self.at_most is None and not self.failed):
            return None
        compared = self.value if self.ratio is None else self.ratio
        enough = self.at_least is None or compared >= self.at_least
        return enough and (self.at_most is None or compared <= self.at_most) and not self.failed

    @property
    def target(self) -> str:
        unit = "" if self.ratio is not None else f" {self.unit}"
        if self.at_least is not None:
            return f">= {amount(self.at_least)}{unit}"
        return f"<= {amount(self.at_most)}{unit}" if self.at_most is not None else ""

    def as_json(self) -> dict[str, Any]:
        name, values = self.yardstick or (None, [])
        return {
            "name": self.name,
            "work": self.work,
            "value": self.value,
            "unit": self.unit,
            "yardstick": name,
            "yardstick_values": values,
            "ratio": self.ratio,
            "target": self.target,
            "holds": self.holds,
            "failed": self.failed,
            "detail": self.detail,
        }


def amount(number: float) -> str:
    """About three digits."""
    if number == int(number) or abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.1f}" if abs(number) >= 10 else f"{number:.2f}"


def cells(row: Row) -> tuple[str, ...]:
    holds = {None: "", True: "yes", False: "NO"}[row.holds]
    yardstick = f"{row.yardstick[0]} {' / '.join(map(amount, row.yardstick[1]))}" if row.yardstick else ""
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return row.work, f"{amount(row.value)} {row.unit}", yardstick, ratio, row.target, holds


def table(rows: list[Row]) -> str:
    """Below each row that does not hold for another reason than its figure, that reason."""
    head = ("work", "measured", "yardstick, before / after", "ratio", "target", "holds")
    lines = [head, *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    shown.insert(1, "  ".join("-" * width for width in widths))
    for number, row in reversed(list(enumerate(rows))):
        if row.failed:
            shown.insert(number + 3, f"    {row.failed}")
    return "\n".join(shown)


def write(path: pathlib.Path, machine: dict[str, Any], rows: list[Row], series: dict[str, Any], wrong: list[str]) -> None:
    value = {"machine": machine, "rows": [row.as_json() for row in rows], "series": series, "wrong": wrong}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")
