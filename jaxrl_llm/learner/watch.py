"""The early warning: rules on the logged metrics of RL steps that speak up before a collapse.

What it is: a pure function from what was seen so far and the metrics of one step to alarms, and the
thresholds with their reasons. What it is not: what an alarm does to a run (recovery.py). It is
plain Python, so that any log can be replayed through it.

A rule compares a metric with a threshold, or with its threshold times a value the run itself gave:
its baseline (its median over the first RL steps), its running median, or its best running mean. The
collapses of arXiv 2512.01374 show in KL(mu || pi_old) and in entropy before the reward falls.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal, NamedTuple

import cattrs

Action = Literal["event", "stop", "roll_back", "tighten"]


class EarlyStop(Exception):
    """The early warning ended the run, after a checkpoint; it says why and how to go on."""


@dataclasses.dataclass(frozen=True)
class ThresholdConfig:
    """Where each rule of the early warning begins to hold; 0 or inf turns a rule off."""

    # KL(mu || pi_old), k3, above so many times its baseline and above the floor [nats]. Healthy
    # runs stay near 1e-3; single steps vary threefold, since few tokens carry the k3 estimate.
    kl_rise: float = 5.0
    kl_floor: float = 5e-3  # the least KL that kl_rise minds; it turns nothing off
    kl_high: float = 0.1  # the same KL whatever its baseline [nats]; verl warns there too
    # Effective share of the tokens' pi / mu below this; verl asks for 0.3 of its weights.
    effective_share: float = 0.3
    tail_share: float = 0.01  # share of tokens with pi / mu above 5, the paper's cap
    # Entropy below this share of its running median. Learning lowers entropy too, but by a few per
    # cent a step.
    entropy_drop: float = 0.4
    entropy_rise: float = 2.0  # entropy above so many times its running median
    gradient_rise: float = 5.0  # gradient norm over its running median; lone spikes are common
    reward_drop: float = 0.5  # reward below this share of its best running mean
    clipped_share: float = 0.3  # share of tokens masked by the clip; GSPO's 0.15 is healthy
    nonfinite: float = 1.0  # NaN or infinite numbers in a step; needs no patience

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(
                    f"watch.thresholds.{name} is {value}; it must be positive, or 0 or inf for off"
                )


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """When the early warning speaks, and what it does then."""

    # event: a line in the run log. stop: a checkpoint, then the run ends. roll_back: weights and
    # optimizer of the newest regular checkpoint from before the rule held; the run goes on from
    # them. tighten: the bounds of the importance weight and of the clip move half way to "no
    # off-policy update". An update that is not finite ends the run without a checkpoint under every
    # action but roll_back.
    action: Action = "event"
    patience: int = 3  # consecutive RL steps a rule must hold; 1 hears single outliers
    # First RL steps whose median is a metric's baseline. The first one alone is of weights that no
    # update has moved; a run that is broken from the start spoils the next ones.
    baseline_steps: int = 1
    window: int = 10  # RL steps of a running median or mean; rules on one wait until it is full
    max_actions: int = 3  # roll backs or tightenings of a run; the next alarm stops it
    thresholds: ThresholdConfig = field(default_factory=ThresholdConfig)  # where rules hold
    # RL steps between attributions: log w split into routing, numerics and staleness on one
    # micro-batch, at five forward passes; 0: never.
    attribution_every: int = 10

    def __post_init__(self) -> None:
        for name, least in (
            ("patience", 1),
            ("baseline_steps", 1),
            ("max_actions", 0),
            ("attribution_every", 0),
        ):
            if vars(self)[name] < least:
                raise ValueError(f"watch.{name} is {vars(self)[name]}; it must be at least {least}")
        if self.window < 2 * self.patience:
            raise ValueError(
                f"watch.window is {self.window} with watch.patience {self.patience}: what holds a "
                "rule would be most of the median it is compared with; make the window at least "
                f"{2 * self.patience}"
            )


@dataclasses.dataclass(frozen=True)
class Rule:
    """`metric` (or the sum of several) above or below `threshold` times its reference."""

    name: str  # its field of ThresholdConfig
    metrics: tuple[str, ...]  # names of metrics.METRICS
    side: Literal["above", "below"]
    reference: Literal["fixed", "baseline", "median", "best"]
    threshold: float
    advice: str  # what it usually means and what to try
    floor: float = 0.0  # the limit is never less

    def holds(self, value: float, limit: float) -> bool:
        """Whether a value is beyond the limit; at it, it is not."""
        return value > limit if self.side == "above" else value < limit


DISCREPANCY = (
    "the engine samples from another policy than the learner scores; with falling entropy this is "
    "the collapse that an uncorrected training-inference mismatch leads to: keep the importance "
    "weight, replay the sampler's routes (r3), or raise the engine's precision"
)
OFF_POLICY = (
    "the updates of a rollout batch have left what it was sampled from; more than one without "
    "clipping and routing replay collapses: clip, replay, or lower mini_batches or the "
    "learning rate"
)


def make_rules(thresholds: ThresholdConfig) -> tuple[Rule, ...]:
    """The rules on a step's metrics that are on; the one on non-finite values stands apart."""
    t, kl = thresholds, ("policy/kl_sampler_old_k3",)
    entropy, clipped = ("policy/entropy",), ("clip/high_fraction", "clip/low_fraction")
    every = (
        Rule("kl_rise", kl, "above", "baseline", t.kl_rise, DISCREPANCY, floor=t.kl_floor),
        Rule("kl_high", kl, "above", "fixed", t.kl_high, DISCREPANCY),
        Rule(
            "effective_share",
            ("is_weight/raw_ess_token",),
            "below",
            "fixed",
            t.effective_share,
            "few tokens carry the whole importance-weighted update: " + OFF_POLICY,
        ),
        Rule("tail_share", ("is_weight/raw_above_5",), "above", "fixed", t.tail_share, OFF_POLICY),
        Rule(
            "entropy_drop",
            entropy,
            "below",
            "median",
            t.entropy_drop,
            "the policy stops exploring faster than it learns; look at KL(mu || pi_old), and try a "
            "lower learning rate, a higher clip bound for A > 0 or an entropy bonus",
        ),
        Rule("entropy_rise", entropy, "above", "median", t.entropy_rise, OFF_POLICY),
        Rule(
            "gradient_rise",
            ("learner/grad_norm",),
            "above",
            "median",
            t.gradient_rise,
            "a few tokens or a broken batch dominate the update; look at the largest importance "
            "weights and at the step's rollouts, and try a lower cap or learning rate",
        ),
        Rule(
            "reward_drop",
            ("rollout/reward_mean",),
            "below",
            "best",
            t.reward_drop,
            "the collapse has begun: go back to a checkpoint from before it",
        ),
        Rule("clipped_share", clipped, "above", "fixed", t.clipped_share, OFF_POLICY),
    )
    return tuple(rule for rule in every if 0 < rule.threshold < math.inf)


NONFINITE = "nonfinite/"
"""Prefix of the metrics that count non-finite values; the rule `nonfinite` adds them all up."""


@dataclasses.dataclass(frozen=True)
class Series:
    """What is kept of one rule's metric; finite values only."""

    first: tuple[float, ...] = ()  # of the run, at most baseline_steps
    newest: tuple[float, ...] = ()  # at most window
    best: float = 0.0  # the highest mean of a full window; 0 before, and if none is positive

    def extended(self, value: float, config: WatchConfig) -> Series:
        """With one more value."""
        first = (*self.first, value)[: config.baseline_steps]
        newest = (*self.newest, value)[-config.window :]
        full = len(newest) == config.window
        best = max(self.best, statistics.fmean(newest)) if full else self.best
        return Series(first, newest, best)


@dataclasses.dataclass(frozen=True)
class WatchState:
    """What the early warning remembers from step to step; plain numbers, exact as JSON."""

    series: Mapping[str, Series] = field(default_factory=dict)  # by rule
    since: Mapping[str, int] = field(default_factory=dict)  # rule that holds -> its first step
    absent: tuple[str, ...] = ()  # metrics whose absence has been reported
    acted: tuple[tuple[int, int], ...] = ()  # roll backs and tightenings: held since, done at
    # Since when an alarm held that could only stop the run; 0: none. The weights from there on are
    # no target of a roll back, until one has gone behind it.
    condemned: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values for a checkpoint."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> WatchState:
        """Inverse of to_json."""
        return cattrs.Converter(forbid_extra_keys=True).structure(value, cls)

    def cleared(self) -> WatchState:
        """Anew but for the baselines and what was done: the next alarm takes as long again."""
        series = {name: Series(first=old.first) for name, old in self.series.items()}
        return dataclasses.replace(self, series=series, since={})

    def after_action(self, since: int, step: int) -> WatchState:
        """Cleared, with a roll back or tightening noted."""
        return dataclasses.replace(self.cleared(), acted=(*self.acted, (since, step)), condemned=0)


@dataclasses.dataclass(frozen=True)
class Alarm:
    """A rule that has held for `patience` steps."""

    rule: str
    metric: str
    value: float
    limit: float
    since: int  # the first of the consecutive steps at which it held
    advice: str

    def message(self) -> str:
        """One line for the run log."""
        return (
            f"early warning {self.rule}: {self.metric} is {self.value:.4g}, its limit "
            f"{self.limit:.4g}, since step {self.since}; {self.advice}"
        )


class Observation(NamedTuple):
    """What one step adds."""

    state: WatchState
    alarms: tuple[Alarm, ...]
    notices: tuple[str, ...]  # rules that cannot be checked, each said once


def observe(
    state: WatchState, metrics: Mapping[str, float], step: int, config: WatchConfig
) -> Observation:
    """Apply the rules to one RL step.

    An alarm is raised once, when its rule has held for `patience` consecutive steps, and again only
    after the rule has not held in between. A rule whose metric is absent from the step is reported
    in `notices` the first time, and not checked.

    Args:
      state: after the RL step before this one; WatchState() at the first.
      metrics: of the step, names of metrics.METRICS.
      step: of the run; RL steps follow each other without gaps.
      config: the same at every step.
    """
    series, since = dict(state.series), {}
    alarms, absent = [], []
    for rule in make_rules(config.thresholds):
        missing = [name for name in rule.metrics if name not in metrics]
        if missing:
            absent += [(rule.name, name) for name in missing]
            continue
        value = sum(metrics[name] for name in rule.metrics)
        seen = series.get(rule.name, Series())
        limit = _limit(rule, seen, config)
        if limit is not None and rule.holds(value, limit):
            since[rule.name] = state.since.get(rule.name, step)
            if step - since[rule.name] + 1 == config.patience:
                name = " + ".join(rule.metrics)
                alarms.append(Alarm(rule.name, name, value, limit, since[rule.name], rule.advice))
        if rule.reference != "fixed" and math.isfinite(value):
            series[rule.name] = seen.extended(value, config)
    count = _nonfinite(metrics, config)
    if 0 < config.thresholds.nonfinite <= count:
        since["nonfinite"] = state.since.get("nonfinite", step)
        if since["nonfinite"] == step:
            alarms.append(_nonfinite_alarm(count, step, config))
    unseen = tuple(dict.fromkeys(name for _, name in absent if name not in state.absent))
    notices = tuple(
        f"early warning {rule} cannot be checked: this step has no {name}; make it log the metric, "
        f"or set learner.watch.thresholds.{rule} to 0"
        for rule, name in absent
        if name in unseen
    )
    after = dataclasses.replace(state, series=series, since=since, absent=(*state.absent, *unseen))
    return Observation(after, tuple(alarms), notices)


def _limit(rule: Rule, seen: Series, config: WatchConfig) -> float | None:
    """What the rule compares with, from the steps before this one; None if they give nothing."""
    match rule.reference:
        case "fixed":
            reference = 1.0
        case "baseline":
            if len(seen.first) < config.baseline_steps:
                return None
            reference = statistics.median(seen.first)
        case "median":
            if len(seen.newest) < config.window:
                return None
            reference = statistics.median(seen.newest)
        case "best":
            reference = seen.best
    if reference <= 0:  # nothing yet, or nothing to take a multiple of
        return None
    return max(rule.floor, rule.threshold * reference)


def _nonfinite(metrics: Mapping[str, float], config: WatchConfig) -> float:
    """Non-finite values that the step counted, and its non-finite metrics that matter."""
    watched = {name for rule in make_rules(config.thresholds) for name in rule.metrics}
    watched |= {"learner/loss", "learner/grad_norm"}
    bad = [name for name, value in metrics.items() if name in watched and not math.isfinite(value)]
    return len(bad) + sum(value for name, value in metrics.items() if name.startswith(NONFINITE))


def _nonfinite_alarm(count: float, step: int, config: WatchConfig) -> Alarm:
    return Alarm(
        "nonfinite",
        f"{NONFINITE}* and the watched metrics",
        count,
        config.thresholds.nonfinite,
        step,
        "a NaN spreads to all weights in one update: go back to a checkpoint, and look at the "
        "step's log-probabilities and at the engine's numerics",
    )
