"""Reports of compiled programs as a table for people and as JSON for programs; pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rich.table import Table

from jaxrl_llm.compile.chips import GIB, Chip
from jaxrl_llm.compile.report import Report


def make_table(title: str, reports: Sequence[Report], chip: Chip) -> Table:
    """One column for each program; what is not per device says so."""
    table = Table("per device", *(report.name for report in reports), title=title)

    def row(label: str, value: Callable[[Report], str]) -> None:
        table.add_row(label, *(value(report) for report in reports))

    row("batch, all devices", lambda r: f"{r.rows:,} rows x {r.length:,}" if r.rows else "-")
    row("compiled in", lambda r: f"{r.compile_seconds:.0f} s")
    row("arguments", partial(_memory, "arguments"))
    row("temporaries", partial(_memory, "temporaries"))
    row("outputs of their own", partial(_memory, "outputs"))
    row("generated code", partial(_memory, "code"))
    row("total", partial(_memory, "total"))
    row("outputs in arguments' place", partial(_memory, "donated"))
    row(f"free of {_size(chip.hbm)}", lambda r: f"{r.free(chip):.1%}" if r.memory else "none")
    table.add_section()
    row("FLOPs of products", lambda r: f"{r.cost.flops:.3e}" if r.cost else "-")
    row("  of all, over model FLOPs", lambda r: f"{r.repeated:.2f}" if r.repeated else "-")
    row("HBM traffic", lambda r: _size(r.cost.bytes) if r.cost else "-")
    for kind in sorted({kind for r in reports if r.cost for kind in r.cost.collectives}):
        row(kind, partial(_collectives, kind))
    table.add_section()
    row("computing, by cycles", partial(_times, "compute"))
    row("  without cycles, roofline", partial(_times, "without_cycles"))
    row("collectives, waited for", partial(_times, "waited"))
    row("collectives, hidden", partial(_times, "hidden"))
    row("step, estimated", partial(_times, "step"))
    row("step at best, roofline", partial(_times, "roofline"))
    row("model FLOPs, all devices", lambda r: f"{r.model_flops:.3e}" if r.model_flops else "-")
    row("MFU of the estimate", lambda r: "-" if r.utilisation is None else f"{r.utilisation:.1%}")
    return table


def _memory(field: str, report: Report) -> str:
    return "-" if report.memory is None else _size(getattr(report.memory, field))


def _times(field: str, report: Report) -> str:
    if report.times is None:
        return "-"
    seconds = getattr(report.times, field)
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{seconds * 1e3:,.2f} ms"


def _collectives(kind: str, report: Report) -> str:
    if report.cost is None or kind not in report.cost.collectives:
        return "-"
    traffic = report.cost.collectives[kind]
    return f"{traffic.count:,.0f}, {_size(traffic.size)}"


def _size(count: float) -> str:
    return f"{count / GIB:,.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.2f} MiB"


def notes(reports: Sequence[Report]) -> list[str]:
    """What the table leaves out, a line each."""
    lines = []
    for report in reports:
        if report.failure:
            lines.append(f"{report.name} does not fit: {report.failure}")
        if report.cost is None:
            continue
        for loop in sorted(report.cost.once):
            lines.append(f"{report.name}: counted once, it runs as often as data says: {loop}")
        for kernel in sorted(report.cost.unknown):
            lines.append(f"{report.name}: FLOPs counted as 0, it has no cost estimate: {kernel}")
    return lines


def to_json(topology: str, devices: int, chip: Chip, reports: Sequence[Report]) -> dict[str, Any]:
    """All numbers, in bytes, seconds and FLOPs; of one device where the table says so."""
    return {
        "topology": topology,
        "devices": devices,
        "chip": dataclasses.asdict(chip),
        "programs": [_plain(report, chip) for report in reports],
    }


def _plain(report: Report, chip: Chip) -> dict[str, Any]:
    values = dataclasses.asdict(report)
    if report.memory and report.cost and report.times:
        values["memory"] |= {"total": report.memory.total, "free_share": report.free(chip)}
        values["times"] |= {"step": report.times.step}
        values["cost"] |= {
            "once": sorted(report.cost.once),
            "unknown": sorted(report.cost.unknown),
        }
    return values
