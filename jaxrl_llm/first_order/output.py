"""What a study leaves behind: a table, study.json and a figure. What it is not: the measuring."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxrl_llm.first_order.study import METHODS, Attribution, Cell, Study, Sweep
from jaxrl_llm.report.plots import BLUE, GREEN, GREY, INK, ORANGE, PURPLE

COLOURS = dict(zip(METHODS, (GREY, INK, BLUE, GREEN, ORANGE, PURPLE), strict=True))
FACTORS = ("staleness", "with_routing", "with_numerics")
"""Of Attribution, in the order in which they join."""

_STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#c9ced6",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.0,
    "font.size": 9.0,
    "grid.color": "#eaeef2",
}


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean over the policies, and its standard error; NaN for a single policy."""

    mean: float
    error: float


def spread(values: list[float]) -> Spread:
    """Of values of independent policies; those that are NaN (all tokens clipped) stay NaN."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Spread(float(np.mean(values)), float(error))


def points(study: Study, sweep: Sweep) -> list[str | int]:
    """The positions of a sweep, in order: precisions, or numbers of updates."""
    config = study.config
    return list(config.precisions if sweep == "precision" else config.updates)


def cosines(study: Study, sweep: Sweep, method: str, *, clipped: bool) -> list[Spread]:
    """The cosine of one method at every point of a sweep."""
    cells = [c for c in study.cells if (c.sweep, c.method, c.clipped) == (sweep, method, clipped)]
    return [
        spread([c.agreement.cosine for c in cells if _point(c) == point])
        for point in points(study, sweep)
    ]


def table(study: Study, sweep: Sweep) -> str:
    """Lines of text: the cosine of every method, then the relative errors of Attribution."""
    rows = [["cosine", "clip", *map(str, points(study, sweep))]]
    for method in METHODS:
        for clipped in (False, True):
            values = cosines(study, sweep, method, clipped=clipped)
            rows.append([method, "yes" if clipped else "no", *map(_text, values)])
    rows.append(["error of token IS", "no"])
    rows += [
        [f"  {f.replace('_', ' ')}", "", *map(_text, attribution(study, sweep, f))] for f in FACTORS
    ]
    return "\n".join(
        f"{row[0]:<18}{row[1]:<6}{''.join(f'{x:>16}' for x in row[2:])}" for row in rows
    )


def _text(value: Spread) -> str:
    return f"{value.mean:.3f} ± {value.error:.3f}"


def attribution(study: Study, sweep: Sweep, factor: str) -> list[Spread]:
    """One of FACTORS at every point of a sweep: the relative error of token IS."""
    errors = [e for e in study.attributions if e.sweep == sweep]
    return [
        spread([vars(error)[factor] for error in errors if _point(error) == point])
        for point in points(study, sweep)
    ]


def write_study(study: Study, folder: Path) -> list[Path]:
    """Writes study.json (every cell of every policy) and cosine.png; returns their paths.

    A cosine that does not exist is NaN in the JSON, as Python's json module reads and writes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "study.json", folder / "cosine.png"]
    text = json.dumps(dataclasses.asdict(study), indent=1)
    paths[0].write_text(text + "\n", encoding="utf-8")
    figure(study).savefig(paths[1], dpi=160)
    return paths


def figure(study: Study) -> Figure:
    """Cosine against precision and staleness, without and with the clip mask."""
    config = study.config
    titles: dict[Sweep, str] = {
        "precision": f"engine precision, {config.precision_updates} updates after publication",
        "staleness": f"updates after publication, {config.staleness_precision} engine",
    }
    with matplotlib.rc_context(_STYLE):
        drawn = Figure(figsize=(11, 7), layout="constrained")
        grid = drawn.subplots(2, 2, sharey="row", sharex="col")
        ends = []
        for row, clipped in zip(grid, (False, True), strict=True):
            for axes, sweep in zip(row, titles, strict=True):
                ends.append((axes, _draw(axes, study, sweep, clipped=clipped)))
                name = "with the clip mask" if clipped else "without clipping"
                axes.set_title(f"{sweep.capitalize()}, {name}")
                if clipped:
                    axes.set_xlabel(titles[sweep])
            row[0].set_ylabel("cosine with the gradient of J_seq")
        for axes, heights in ends:  # once all panels that share a scale are drawn
            _label(axes, heights)
        drawn.suptitle(
            "Expected gradient of the surrogate against the exact one: cosine, mean and standard "
            f"error of {config.seeds} policies",
            x=0.01,
            ha="left",
        )
    return drawn


def _draw(axes: Axes, study: Study, sweep: Sweep, *, clipped: bool) -> dict[str, float]:
    """The lines of one panel; returns where each method's ends."""
    names = [str(point) for point in points(study, sweep)]
    ends = {}
    for index, method in enumerate(METHODS):
        values = cosines(study, sweep, method, clipped=clipped)
        means = [value.mean for value in values]
        # Side by side, so that the bars of methods that agree can be told apart.
        places = np.arange(len(names)) + 0.05 * (index - (len(METHODS) - 1) / 2)
        errors = np.nan_to_num([value.error for value in values])
        axes.errorbar(
            places, means, errors, color=COLOURS[method], linewidth=1.4, marker="o", markersize=3
        )
        ends[method] = means[-1]
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.4, len(names) + 0.35)
    return ends


def _label(axes: Axes, ends: dict[str, float]) -> None:
    """Every method's name beside the end of its line; NaN is labelled at the bottom."""
    low, high = axes.get_ylim()
    known = {method: end if math.isfinite(end) else low for method, end in ends.items()}
    right = len(axes.get_xticks()) - 0.75
    for method, height in _apart(known, 0.055 * (high - low)).items():
        axes.text(right, height, method, color=COLOURS[method], va="center", fontsize=8)


def _apart(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Heights in the same order, no two closer than `gap`, together where they were on average."""
    ordered = sorted((height, name) for name, height in heights.items())
    placed: dict[str, float] = {}
    floor = -math.inf
    for height, name in ordered:
        placed[name] = floor = max(height, floor + gap)
    shift = sum(placed[name] - height for height, name in ordered) / max(len(ordered), 1)
    return {name: height - shift for name, height in placed.items()}


def _point(measured: Cell | Attribution) -> str | int:
    return measured.precision if measured.sweep == "precision" else measured.updates
