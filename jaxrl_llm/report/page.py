"""The HTML of a report: sections as text, every outside string escaped."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from jaxrl_llm.metrics import describe
from jaxrl_llm.report.plots import Columns, Plot, known_mean, phase_seconds
from jaxrl_llm.runlog import PHASES, RunReader
from jaxrl_llm.types import Group, Rollout

Decode = Callable[[Sequence[int]], str]

_MOST_TOKENS = 600  # shown of one response; the rest is counted
_FULL_SURPRISE = 4.0  # nats at which a token's background is fully coloured


def page(name: str, reader: RunReader, plots: Sequence[Plot], decode: Decode | None) -> str:
    """The whole document of the run called `name`; see write_report for `decode`."""
    curves = "".join(_plot_html(plot) for plot in plots)
    sections = (
        ("Outcome", _outcome_html(reader)),
        ("Curves", f'<div class="grid">{curves}</div>'),
        ("Events", _events_html(reader.events())),
        ("Sampled responses", _rollouts_html(reader, decode)),
        ("All metrics", _metrics_html(reader)),
        ("Configuration", _config_html(reader.config())),
    )
    body = "".join(f"<section><h2>{title}</h2>{text}</section>" for title, text in sections)
    title = escape(f"Run {name}")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_CSS}</style></head><body><main>"
        f"<h1>{title}</h1>{_facts_html(reader)}{body}</main></body></html>\n"
    )


def _facts_html(reader: RunReader) -> str:
    facts = []
    for phase, label in zip(PHASES, ("cold start", "RL", "evaluation"), strict=True):
        steps = reader.metrics(phase)["step"]
        if steps.size:
            facts.append(f"{label}: steps {steps[0]:,} to {steps[-1]:,}")
    seconds = sum(phase_seconds(reader).values())
    if seconds:
        facts.append(f"{seconds / 60:.1f} minutes")
    return f'<p class="facts">{escape(" · ".join(facts))}</p>'


def _outcome_html(reader: RunReader) -> str:
    """First against last evaluation, and the training rollouts beside them."""
    rl, evaluations = reader.metrics("rl"), reader.metrics("eval")
    rows = []
    for name, label in (
        ("eval/avg_at_k", "held out, sampled (avg@{samples})"),
        ("eval/pass_at_k", "held out, pass@{pass_k}"),
        ("eval/greedy_accuracy", "held out, greedy"),
    ):
        if name in evaluations:
            counts = {n: _count(evaluations, f"eval/{n}") for n in ("samples", "pass_k")}
            values = evaluations[name]
            cells = [_interval(evaluations, name, 0), _interval(evaluations, name, -1)]
            rows.append((label.format(**counts), *cells, values[-1] - values[0]))
    if "rollout/accuracy" in rl:
        values = rl["rollout/accuracy"]
        window = max(1, len(values) // 20)
        first, last = known_mean(values[:window]), known_mean(values[-window:])
        label = f"training rollouts, mean of {window} step{'s' if window > 1 else ''}"
        rows.append((label, f"{first:.1%}", f"{last:.1%}", last - first))
    if not rows:
        return "<p>No evaluation and no RL step yet.</p>"
    heads = ("start of RL", "end of RL")
    steps = evaluations["step"]
    if steps.size:
        heads = (f"first evaluation (step {steps[0]:,})", f"last evaluation (step {steps[-1]:,})")
    body = "".join(
        f"<tr><td>{escape(label)}</td><td>{first}</td><td>{last}</td>"
        f'<td class="{_direction(change)}">{change * 100:+.1f} points</td></tr>'
        for label, first, last, change in rows
    )
    head = "".join(f"<th>{h}</th>" for h in ("accuracy", *heads, "change"))
    note = ""
    if steps.size and "eval/prompts" in evaluations:
        note = (
            f'<p class="note">{_count(evaluations, "eval/prompts")} held-out prompts. Brackets are '
            "bootstrap confidence intervals over prompts.</p>"
        )
    return f'<table class="outcome"><tr>{head}</tr>{body}</table>{note}'


def _direction(change: float) -> str:
    return "up" if change > 0 else "down" if change < 0 else ""


def _count(columns: Columns, name: str) -> str:
    return f"{columns[name][-1]:.0f}" if name in columns else "k"


def _interval(columns: Columns, name: str, index: int) -> str:
    text = f"<b>{columns[name][index]:.1%}</b>"
    if f"{name}_low" in columns:
        low, high = columns[f"{name}_low"][index], columns[f"{name}_high"][index]
        text += f' <span class="note">[{low:.1%}, {high:.1%}]</span>'
    return text


def _plot_html(plot: Plot) -> str:
    data = base64.b64encode(plot.path.read_bytes()).decode("ascii")
    title = escape(plot.title)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{title}">'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _events_html(events: Sequence[Mapping[str, Any]]) -> str:
    """Every message once, with the steps it came at."""
    steps: dict[str, list[int]] = {}
    for event in events:
        steps.setdefault(event["message"], []).append(event["step"])
    if not steps:
        return "<p>None: no warning was raised.</p>"
    items = []
    for message, at in steps.items():
        when = (
            f"step {at[0]:,}" if len(at) == 1 else f"{len(at):,}x in steps {at[0]:,} to {at[-1]:,}"
        )
        items.append(f'<li><span class="note">{when}</span> {escape(message)}</li>')
    return f"<ul>{''.join(items)}</ul>"


def _rollouts_html(reader: RunReader, decode: Decode | None) -> str:
    """One group of the first, a middle and the last step that has any."""
    steps = reader.rollout_steps()
    if not steps:
        return "<p>The run wrote no rollouts.</p>"
    parts = [
        '<p class="note">Background: how unlikely the sampled token was, from '
        f"{_token_html('certain', 0.0, '')} to {_token_html('4 nats or more', -4.0, '')}. "
        "Hover over a token for its log-probability.</p>"
    ]
    for step in sorted({steps[0], steps[len(steps) // 2], steps[-1]}):
        # The group that taught most: rewards that differ, where there is one.
        groups = sorted(reader.rollouts(step), key=lambda g: -len({r.reward for r in g.rollouts}))
        parts += [_group_html(step, group, decode) for group in groups[:1]]
    return "".join(parts)


def _group_html(step: int, group: Group, decode: Decode | None) -> str:
    samples = sorted(group.rollouts, key=lambda rollout: -(rollout.reward or 0.0))
    shown = samples[:2] + samples[2:][-2:]  # the best and the worst
    cards = "".join(_rollout_html(rollout, decode) for rollout in shown)
    return (
        f'<article><h3>Step {step:,}</h3><p class="note">prompt {escape(group.prompt.prompt_id)}, '
        f"{len(shown)} of its {len(samples)} samples; reference answer "
        f"<b>{escape(group.prompt.answer)}</b></p><pre>{escape(group.prompt.text)}</pre>"
        f"{cards}</article>"
    )


def _rollout_html(rollout: Rollout, decode: Decode | None) -> str:
    ids = rollout.tokens[1:][rollout.loss_mask]
    logprobs = rollout.sampler_logprobs[rollout.loss_mask]
    texts = token_texts(rollout, decode)
    tokens = [
        _token_html(text, float(logprob), f"id {token}")
        for text, token, logprob in zip(texts, ids, logprobs, strict=True)
    ]
    hidden = len(tokens) - _MOST_TOKENS
    more = f' <span class="note">… {hidden:,} more tokens</span>' if hidden > 0 else ""
    reward = "none" if rollout.reward is None else f"{rollout.reward:g}"
    kind = "good" if (rollout.reward or 0.0) > 0 else "bad"
    facts = f"{rollout.verdict} · {len(tokens):,} tokens · {rollout.finish}"
    return (
        f'<div class="sample {kind}"><div class="facts"><b>reward {reward}</b> {escape(facts)}'
        f'</div><div class="tokens">{"".join(tokens[:_MOST_TOKENS])}{more}</div></div>'
    )


def token_texts(rollout: Rollout, decode: Decode | None) -> list[str]:
    """The text of every sampled token, in order; see write_report for the cases."""
    ids = [int(token) for token in rollout.tokens[1:][rollout.loss_mask]]
    if decode is not None:
        return [decode([token]) or f"⟨{token}⟩" for token in ids]
    stop = [f"⟨{ids[-1]}⟩"] if rollout.finish == "stop" else []
    characters = list(rollout.text) + stop
    return characters if len(characters) == len(ids) else [f"{token} " for token in ids]


def _token_html(text: str, logprob: float, label: str) -> str:
    strength = 0.8 * min(1.0, -logprob / _FULL_SURPRISE)
    title = f"{label} · log p {logprob:.3f} · p {math.exp(logprob):.3f}".strip(" ·")
    return (
        f'<span style="background:rgba(213,94,0,{strength:.2f})" title="{escape(title)}">'
        f"{escape(text)}</span>"
    )


def _metrics_html(reader: RunReader) -> str:
    """The last value of everything logged, with its meaning and unit."""
    rows = []
    for phase in PHASES:
        columns = {**reader.metrics(phase), **reader.timings(phase)}
        for name, values in columns.items():
            if name != "step":
                cells = (phase, name, f"{values[-1]:.5g}", describe(name) or "not documented")
                rows.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    head = "".join(f"<th>{h}</th>" for h in ("phase", "name", "last value", "meaning [unit]"))
    table = f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
    return f"<details><summary>{len(rows)} columns</summary>{table}</details>"


def _config_html(config: Mapping[str, Any]) -> str:
    text = escape(json.dumps(config, indent=2))
    return f"<details><summary>config.json</summary><pre>{text}</pre></details>"


_CSS = """
body { margin: 0; background: #f6f8fa; color: #1f2328; line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0; } h2 { font-size: 18px; margin: 36px 0 12px; }
h3 { font-size: 14px; margin: 0 0 6px; } p { margin: 6px 0; }
.facts, .note, figcaption { color: #57606a; font-size: 13px; }
.grid { display: grid; grid-template-columns: repeat(2, 1fr); gap: 16px; }
@media (max-width: 900px) { .grid { grid-template-columns: 1fr; } }
figure, article, table { margin: 0; background: #fff; border: 1px solid #d8dee4;
  border-radius: 8px; }
figure, article { padding: 14px 16px; } article { margin-bottom: 16px; }
figure img { width: 100%; display: block; } figcaption { margin-top: 6px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 13px;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 14px; border-top: 1px solid #eaeef2; }
tr:first-child > * { border-top: 0; } th { color: #57606a; font-weight: 600; }
.outcome { font-size: 15px; } .up { color: #1a7f37; } .down { color: #cf222e; }
pre, .tokens { font: 13px/1.7 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0; }
pre { background: #f6f8fa; border-radius: 6px; padding: 8px 10px; }
.sample { border-left: 3px solid #d8dee4; padding: 2px 0 2px 12px; margin-top: 10px; }
.sample.good { border-color: #1a7f37; } .sample.bad { border-color: #cf222e; }
.tokens span, .note span { border-radius: 2px; padding: 1px 0; color: #1f2328; }
ul { padding-left: 20px; } summary { cursor: pointer; color: #57606a; }
"""
