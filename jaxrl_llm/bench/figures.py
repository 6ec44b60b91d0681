"""Measured numbers as values, what is wanted of them, and tables and JSON of both; pure.

A figure stands for its rounds: the median, the lowest and the highest. Whether it is what was
wanted is decided by the median, or, where noise may decide, by the better end of the range.
"""

from __future__ import annotations

import dataclasses
import operator
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

Unit = Literal["s", "tokens/s", "FLOP/s", "B/s", "B", "share", "x", "nats"]
"""share: of 1, shown in per cent; x: a ratio of two measurements, named by the figure."""

Direction = Literal["<", "<=", ">", ">="]
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


COLUMNS = {"median": 13, "range": 15, "of roof": 7, "wanted": 10, "": 6}
"""Of a table, beside the name of the figure: their widths."""
ERROR = 500
"""Characters of an error that the table shows; the JSON has all."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a figure should be."""

    direction: Direction
    bound: float


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number."""

    name: str  # what was measured; of a ratio, both sides
    value: float  # median over rounds
    unit: Unit
    low: float  # least of the rounds
    high: float  # greatest of them
    rounds: int  # 1: counted or measured once
    roof: float | None = None  # median share of the machine's product or copy in the same rounds
    wanted: Wanted | None = None

    @property
    def holds(self) -> bool | None:
        """Whether it is what was wanted; None where nothing was."""
        if self.wanted is None:
            return None
        return _COMPARE[self.wanted.direction](self.value, self.wanted.bound)


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a row measured."""

    title: str
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = ()  # what is compared, and what could not be measured


@dataclasses.dataclass(frozen=True)
class RowResult:
    """What came of a row."""

    row: str
    seconds: float  # that it took, set-up and compilation included
    findings: Findings | None
    error: str = ""  # why there are no findings


def figure(
    name: str,
    rounds: Sequence[float],
    unit: Unit,
    *,
    roof: Sequence[float] | None = None,
    wanted: Wanted | None = None,
) -> Figure:
    """The figure of a value, and perhaps a share of the roof, for each round."""
    share = None if roof is None else statistics.median(roof)
    low, high = min(rounds), max(rounds)
    return Figure(name, statistics.median(rounds), unit, low, high, len(rounds), share, wanted)


def make_table(result: RowResult) -> Table:
    """The table of one row. All have the same widths, so that they read as one."""
    title = result.findings.title if result.findings else "failed"
    table = Table(
        title=f"{result.row}: {title}", title_justify="left", box=box.SIMPLE_HEAD, expand=True
    )
    table.add_column("figure", ratio=1)
    for name, width in COLUMNS.items():
        table.add_column(name, justify="right", width=width, no_wrap=True)
    for found in result.findings.figures if result.findings else ():
        table.add_row(
            found.name,
            show(found.value, found.unit),
            _range(found),
            "" if found.roof is None else show(found.roof, "share"),
            _wish(found),
            {None: "", True: "yes", False: "[bold red]MISSED[/]"}[found.holds],
        )
    if result.error:
        table.add_row(Text(f"ERROR {result.error[:ERROR]}", "bold red"))
    return table


def show(value: float, unit: Unit) -> str:
    """A value with its unit, to three or four digits."""
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "x":
        return f"{value:.3f} x"
    if unit == "nats":
        return f"{value:.1e} nats"
    if unit == "tokens/s":
        return f"{value:,.0f} tok/s"
    scale, prefix = _prefix(value, unit)
    return f"{value / scale:.4g} {prefix}{unit}"


def _prefix(value: float, unit: Unit) -> tuple[float, str]:
    prefixes = {
        "s": ((1.0, ""), (1e-3, "m"), (1e-6, "µ")),
        "B": ((2.0**30, "Gi"), (2.0**20, "Mi"), (1.0, "")),
    }.get(unit, ((1e9, "G"), (1e6, "M"), (1.0, "")))
    return next((pair for pair in prefixes if abs(value) >= pair[0]), prefixes[-1])


def _range(found: Figure) -> str:
    if found.rounds == 1:
        return ""
    return f"{_digits(found.low, found)} - {_digits(found.high, found)}"


def _digits(value: float, found: Figure) -> str:
    """An end of a range, on the scale of the median and without its unit."""
    if found.unit in ("share", "x", "nats", "tokens/s"):
        return show(value, found.unit).split(" ")[0]
    return f"{value / _prefix(found.value, found.unit)[0]:.4g}"


def _wish(found: Figure) -> str:
    if found.wanted is None:
        return ""
    bound = found.wanted.bound
    text = f"{100 * bound:g} %" if found.unit == "share" else f"{bound:g}"
    return f"{found.wanted.direction} {text}"


def to_json(
    machine: dict[str, Any], settings: dict[str, Any], results: Sequence[RowResult]
) -> dict[str, Any]:
    """All numbers in units without prefixes, with what was wanted and whether it is so."""
    return {
        "machine": machine,
        "settings": settings,
        "rows": [_plain(result) for result in results],
    }


def _plain(result: RowResult) -> dict[str, Any]:
    values = dataclasses.asdict(result)
    if result.findings:
        for found, plain in zip(
            result.findings.figures, values["findings"]["figures"], strict=True
        ):
            plain["holds"] = found.holds
    return values
