"""The plots of a report, as matplotlib figures of a run's columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxrl_llm.runlog import PHASES, RunReader

Columns = Mapping[str, np.ndarray]

# Okabe and Ito: apart for colour-blind readers too.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8a8f98"
INK = "#1f2328"

_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#c9ced6",
    "axes.grid": True,
    "axes.labelcolor": "#57606a",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "font.size": 9.0,
    "grid.color": "#eaeef2",
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
}


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot of columns over steps. Left out where the run has none of its columns."""

    name: str  # of the PNG file
    title: str
    caption: str  # how to read it
    series: tuple[tuple[str, str, str], ...]  # (column, label, colour)
    scale: Literal["linear", "from 0", "log", "percent", "percent from 0"] = "linear"
    level: float | None = None  # a dotted line: the value of an ideal run


PANELS = (
    Panel(
        "entropy",
        "Token entropy (nats)",
        "Falls as the policy grows sure of itself. A sudden fall together with a rising KL is how "
        "a collapse announces itself.",
        (("policy/entropy", "entropy", BLUE),),
    ),
    Panel(
        "kl",
        "KL(μ ‖ π_old): training-inference discrepancy (nats)",
        "Between the engine that sampled and the learner at the same weights. k1 is unbiased and "
        "may turn negative, where a log scale leaves a gap; k3 never does.",
        (
            ("policy/kl_sampler_old_k3", "k3", BLUE),
            ("policy/kl_sampler_old", "k1", ORANGE),
            ("policy/kl_ref", "to the reference", GREEN),
        ),
        scale="log",
    ),
    Panel(
        "is_weight",
        "Importance weight (mean)",
        "What corrects for the discrepancy, before and after its cap. Near 1 the surrogate "
        "objective is a good one.",
        (("is_weight/raw_mean", "raw", ORANGE), ("is_weight/used_mean", "used", BLUE)),
        level=1.0,
    ),
    Panel(
        "effective_sample",
        "Effective sample size (share)",
        "How many tokens, or whole responses, would be worth as much if all weighed the same. The "
        "weight of a response is a product over its tokens, so it falls first.",
        (
            ("is_weight/raw_ess_token", "tokens", BLUE),
            ("is_weight/raw_ess_sequence", "responses", ORANGE),
        ),
        scale="percent",
    ),
    Panel(
        "attribution",
        "What moves the importance weights (mean |term| of log w, nats)",
        "log w is the sum of these four, measured every few steps. R3 removes both routing terms, "
        "R2 the one of staleness; precision and fewer updates per batch lower the others.",
        (
            ("attribution/abs_mismatch_numerics", "engine numerics", BLUE),
            ("attribution/abs_mismatch_routing", "engine routing", GREEN),
            ("attribution/abs_staleness_weights", "staleness, weights", ORANGE),
            ("attribution/abs_staleness_routing", "staleness, routing", PURPLE),
        ),
        scale="log",
    ),
    Panel(
        "clip",
        "Tokens clipped or capped (share)",
        "Masked by the clip on either side, and weights that the cap changed.",
        (
            ("clip/high_fraction", "clipped, too likely", ORANGE),
            ("clip/low_fraction", "clipped, too unlikely", BLUE),
            ("is_weight/capped_fraction", "weight capped", GREY),
        ),
        scale="percent from 0",
    ),
    Panel(
        "routing",
        "Routes",
        "Agreement: experts that the learner's router would choose itself among those replayed or "
        "sampled with. Coverage: trained tokens whose experts were replayed.",
        (
            ("routing/agreement", "agreement", BLUE),
            ("routing/replay_coverage", "replay coverage", GREEN),
        ),
        scale="percent",
    ),
    Panel(
        "grad_norm",
        "Gradient and update norm",
        "Global, the gradient before clipping.",
        (
            ("learner/grad_norm", "gradient", BLUE),
            ("learner/update_norm", "update", ORANGE),
        ),
        scale="log",
    ),
    Panel(
        "length",
        "Response length (tokens)",
        "Mean over the step's rollouts, the stop token included.",
        (("rollout/response_tokens", "length", BLUE),),
    ),
    Panel(
        "groups",
        "What the batch was worth (share)",
        "Groups whose rewards are all equal teach nothing; truncated responses never answered.",
        (
            ("rollout/equal_reward_groups", "groups of equal reward", PURPLE),
            ("rollout/truncated_fraction", "truncated responses", GREY),
        ),
        scale="percent from 0",
    ),
)


COLD_START = Panel(
    "cold_start",
    "Cold start: loss (nats)",
    "Mean cross entropy of the demonstrations' tokens, one point a step.",
    (("learner/loss", "loss", BLUE),),
)
RATES = Panel(
    "rate",
    "Tokens per second",
    "Sampled by the inference engine, and trained on by the learner.",
    (
        ("rate/rollout_tokens_per_second", "rollout", BLUE),
        ("rate/learner_tokens_per_second", "learner", ORANGE),
    ),
    scale="from 0",
)


@dataclasses.dataclass(frozen=True)
class Plot:
    """A drawn panel."""

    path: Path  # of the PNG file
    title: str
    caption: str


def draw(reader: RunReader, folder: Path) -> list[Plot]:
    """Draws everything the run has data for into PNG files in `folder`."""
    plots = []
    with matplotlib.rc_context(_STYLE):
        for name, title, caption, figure in _figures(reader):
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=160)
            plots.append(Plot(path, title, caption))
    return plots


def _figures(reader: RunReader) -> Iterator[tuple[str, str, str, Figure]]:
    """(file name, title, caption, figure) of every plot."""
    sft, rl, evaluations = (reader.metrics(phase) for phase in PHASES)
    if "rollout/accuracy" in rl or "eval/avg_at_k" in evaluations:
        caption = (
            "Of the training rollouts step by step, and on held-out prompts with confidence "
            "intervals. Sampled accuracy is what RL optimises."
        )
        yield "accuracy", "Accuracy", caption, _accuracy_figure(rl, evaluations)
    for panel in PANELS:
        figure = _panel_figure(panel, rl)
        if figure is not None:
            yield panel.name, panel.title, panel.caption, figure
    figure = _panel_figure(COLD_START, sft)
    if figure is not None:
        yield COLD_START.name, COLD_START.title, COLD_START.caption, figure
    figure = _panel_figure(RATES, reader.timings("rl"))
    if figure is not None:
        yield RATES.name, RATES.title, RATES.caption, figure
    seconds = phase_seconds(reader)
    if seconds:
        caption = "Of the whole run as logged, compilation included."
        yield "time", "Time by phase", caption, _time_figure(seconds)


def _panel_figure(panel: Panel, columns: Columns) -> Figure | None:
    series = [(columns[c], label, colour) for c, label, colour in panel.series if c in columns]
    if not series:
        return None
    figure, axes = _axes()
    for values, label, colour in series:
        _curve(axes, columns["step"], values, label, colour)
    if panel.level is not None:
        axes.axhline(panel.level, color=GREY, linestyle=":", linewidth=1)
    # A log scale without a positive value has no axis to draw.
    positive = (np.isfinite(values) & (values > 0) for values, _, _ in series)
    if panel.scale == "log" and any(map(np.any, positive)):
        axes.set_yscale("log", nonpositive="mask")
    if panel.scale.startswith("percent"):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if panel.scale.endswith("from 0"):
        axes.set_ylim(bottom=0.0)
    _finish(axes, panel.title, legend=len(series) > 1)
    return figure


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.2, 2.9), layout="constrained")
    return figure, figure.add_subplot()


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str, colour: str) -> None:
    """The values, thin, under their moving mean; short runs get the values alone.

    Steps without a value are passed over, so that what is measured every few steps is a line.
    """
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    window = len(values) // 20
    if window < 2:
        marker = "o" if len(values) < 12 else ""
        axes.plot(steps, values, color=colour, label=label, linewidth=1.6, marker=marker, ms=3)
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, moving_mean(values, window), color=colour, label=label, linewidth=1.8)


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window // 2` neighbours on either side and the value, f64[n], finite only."""
    half = window // 2
    near = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return np.array([known_mean(part) for part in near])


def known_mean(values: np.ndarray) -> float:
    """Mean of the finite values; NaN, without a warning, if there is none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def _finish(axes: Axes, title: str, *, legend: bool) -> None:
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("step")
    if legend:
        axes.legend(loc="best", ncols=2)


def _accuracy_figure(rl: Columns, evaluations: Columns) -> Figure:
    figure, axes = _axes()
    if "rollout/accuracy" in rl:
        _curve(axes, rl["step"], rl["rollout/accuracy"], "training rollouts", BLUE)
    for name, label, colour in (
        ("eval/greedy_accuracy", "held out, greedy", GREEN),
        ("eval/pass_at_k", "held out, pass@k", PURPLE),
        ("eval/avg_at_k", "held out, sampled", ORANGE),
    ):
        if name in evaluations:
            value = evaluations[name]
            low, high = (evaluations.get(f"{name}_{end}", value) for end in ("low", "high"))
            reach = np.clip([value - low, high - value], 0, None)
            axes.errorbar(
                evaluations["step"],
                value,
                reach,
                color=colour,
                label=label,
                marker="o",
                markersize=4,
                linewidth=1.2,
                linestyle="--",
                capsize=3,
            )
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _finish(axes, "Accuracy", legend=True)
    return figure


def phase_seconds(reader: RunReader) -> dict[str, float]:
    """Total seconds of every phase of the run, in the order in which they happen."""
    sft, rl, evaluations = (reader.timings(phase) for phase in PHASES)
    parts = {"cold start": sft.get("seconds/step")}
    for name in ("rollout", "reward", "spread", "score", "update", "publish"):
        parts[name] = rl.get(f"seconds/{name}")
    parts["evaluation"] = evaluations.get("seconds/evaluate")
    totals = {name: float(np.nansum(v)) for name, v in parts.items() if v is not None}
    if "seconds/step" in rl:
        inside = sum(v for name, v in totals.items() if name not in ("cold start", "evaluation"))
        totals["rest of the step"] = max(0.0, float(np.nansum(rl["seconds/step"])) - inside)
    return totals


def _time_figure(seconds: Mapping[str, float]) -> Figure:
    figure, axes = _axes()
    whole = sum(seconds.values()) or 1.0
    names = list(seconds)
    axes.barh(names, [seconds[name] for name in names], color=BLUE, height=0.62)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.2)
    for index, name in enumerate(names):
        text = f"  {seconds[name]:.1f} s · {seconds[name] / whole:.0%}"
        axes.text(seconds[name], index, text, va="center", fontsize=8)
    axes.set_title("Time by phase")
    axes.set_xlabel("seconds")
    return figure
