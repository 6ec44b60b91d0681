"""The early warning: each rule at its limit, the state as JSON, and two recorded runs."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from jaxrl_llm.learner.watch import (
    Alarm,
    Observation,
    ThresholdConfig,
    WatchConfig,
    WatchState,
    make_rules,
    observe,
)
from jaxrl_llm.metrics import describe

RECORDED = Path(__file__).parent.parent / "recorded"
HEALTHY = {
    "policy/kl_sampler_old_k3": 8e-4,
    "policy/entropy": 0.3,
    "is_weight/raw_ess_token": 0.98,
    "is_weight/raw_above_5": 1e-4,
    "learner/grad_norm": 2.0,
    "learner/loss": -0.1,
    "rollout/reward_mean": 0.6,
    "clip/high_fraction": 0.01,
    "clip/low_fraction": 0.01,
    "nonfinite/current": 0.0,
}
FIRST = 11
"""The step of the first row: RL follows a cold start."""


def alarms_of(
    rows: list[dict[str, float]], config: WatchConfig, state: WatchState | None = None
) -> list[tuple[int, Alarm]]:
    """(step, alarm) of every alarm over a run of these rows."""
    state, found = state or WatchState(), []
    for step, row in enumerate(rows, start=FIRST):
        state, alarms, _ = observe(state, row, step, config)
        found += [(step, alarm) for alarm in alarms]
    return found


# A rule, and for each of its metrics a value just within its limit and one just beyond, given that
# all steps before were HEALTHY.
LIMITS = {
    "kl_rise": ("policy/kl_sampler_old_k3", 5e-3, 5.01e-3),
    "kl_high": ("policy/kl_sampler_old_k3", 0.1, 0.101),
    "effective_share": ("is_weight/raw_ess_token", 0.3, 0.299),
    "tail_share": ("is_weight/raw_above_5", 0.01, 0.0101),
    "entropy_drop": ("policy/entropy", 0.1201, 0.1199),
    "entropy_rise": ("policy/entropy", 0.6, 0.601),
    "gradient_rise": ("learner/grad_norm", 10.0, 10.1),
    "reward_drop": ("rollout/reward_mean", 0.3001, 0.2999),
    "clipped_share": ("clip/low_fraction", 0.2899, 0.2901),
    "nonfinite": ("nonfinite/current", 0.0, 1.0),
}


def only(rule: str) -> ThresholdConfig:
    """The default threshold of one rule, all others off."""
    values = dataclasses.asdict(ThresholdConfig())
    return ThresholdConfig(
        **{name: value if name in (rule, "kl_floor") else 0.0 for name, value in values.items()}
    )


def test_every_threshold_has_a_limit_here_and_every_metric_is_logged_by_name() -> None:
    fields = {field.name for field in dataclasses.fields(ThresholdConfig)} - {"kl_floor"}
    assert set(LIMITS) == fields
    rules = make_rules(ThresholdConfig())
    assert {rule.name for rule in rules} == fields - {"nonfinite"}
    for rule in rules:
        for name in rule.metrics:
            assert describe(name) is not None, f"{rule.name} reads {name}, which nothing logs"
    assert describe("nonfinite/current") is not None


@pytest.mark.parametrize("rule", LIMITS)
@pytest.mark.parametrize("off", [0.0, math.inf])
def test_a_rule_speaks_beyond_its_limit_and_not_within_or_when_off(rule: str, off: float) -> None:
    name, within, beyond = LIMITS[rule]
    config = WatchConfig(thresholds=only(rule))
    healthy = [HEALTHY] * 12
    assert alarms_of([*healthy, *[HEALTHY | {name: within}] * 6], config) == []
    broken = [*healthy, *[HEALTHY | {name: beyond}] * 6]
    ((step, alarm),) = alarms_of(broken, config)
    start = FIRST + 12
    assert (alarm.rule, alarm.since) == (rule, start)
    assert alarm.value == pytest.approx(beyond + (0.01 if rule == "clipped_share" else 0.0))
    assert step == (start if rule == "nonfinite" else start + config.patience - 1)
    assert rule in alarm.message()
    assert f"since step {start}" in alarm.message()
    thresholds = dataclasses.replace(config.thresholds, **{rule: off})
    assert alarms_of(broken, dataclasses.replace(config, thresholds=thresholds)) == []


def test_healthy_steps_raise_nothing_under_all_rules() -> None:
    assert alarms_of([HEALTHY] * 40, WatchConfig()) == []


def test_a_rule_must_hold_without_a_gap_and_is_said_once_an_episode() -> None:
    config = WatchConfig(thresholds=only("kl_high"))
    high = HEALTHY | {"policy/kl_sampler_old_k3": 0.2}
    rows = [high, high, HEALTHY, high, high, high, high, HEALTHY, high, high, high]
    found = [(step - FIRST, alarm.since - FIRST) for step, alarm in alarms_of(rows, config)]
    assert found == [(5, 3), (10, 8)]


def test_the_baseline_is_the_median_of_the_first_steps() -> None:
    config = WatchConfig(baseline_steps=3, patience=1, thresholds=only("kl_rise"))
    name = "policy/kl_sampler_old_k3"
    rows = [HEALTHY | {name: value} for value in (0.02, 0.5, 0.03, 0.149, 0.151)]
    ((step, alarm),) = alarms_of(rows, config)
    assert (step - FIRST, alarm.limit) == (4, pytest.approx(5 * 0.03))


def test_slow_learning_is_not_a_drop_of_entropy_but_a_fall_is() -> None:
    """Entropy halves in ten steps, then to a third within three."""
    config = WatchConfig(thresholds=only("entropy_drop"))
    slow = [HEALTHY | {"policy/entropy": 0.5 ** (step / 10)} for step in range(40)]
    assert alarms_of(slow, config) == []
    last = slow[-1]["policy/entropy"]
    falls = [HEALTHY | {"policy/entropy": last / 3 ** (step / 3)} for step in range(1, 8)]
    assert [alarm.rule for _, alarm in alarms_of(slow + falls, config)] == ["entropy_drop"]


def test_a_reference_that_is_not_positive_silences_its_rule() -> None:
    """Rewards of -1 and 1, and gradients of nothing but equal rewards."""
    config = WatchConfig(thresholds=ThresholdConfig())
    rows = [
        HEALTHY | {"rollout/reward_mean": -0.5 - step / 100, "learner/grad_norm": step // 12 * 1.0}
        for step in range(16)
    ]
    assert alarms_of(rows, config) == []


def test_a_nan_is_heard_at_once_and_enters_no_median() -> None:
    rows = [HEALTHY] * 12 + [HEALTHY | {"policy/entropy": math.nan}] + [HEALTHY] * 12
    ((step, alarm),) = alarms_of(rows, WatchConfig())
    assert (step - FIRST, alarm.rule, alarm.value) == (12, "nonfinite", 1.0)
    state = WatchState()
    for number, row in enumerate(rows[:13], start=FIRST):
        state = observe(state, row, number, WatchConfig()).state
    json.dumps(state.to_json(), allow_nan=False)


def test_an_absent_metric_is_reported_once_and_the_rest_is_watched() -> None:
    row = {name: value for name, value in HEALTHY.items() if not name.startswith("clip/")}
    row["policy/kl_sampler_old_k3"] = 0.2
    state, alarms, notices = observe(WatchState(), row, 1, WatchConfig(patience=1))
    assert [alarm.rule for alarm in alarms] == ["kl_high"]
    assert len(notices) == 2
    assert "clipped_share cannot be checked: this step has no clip/high_fraction" in notices[0]
    assert observe(state, row, 2, WatchConfig(patience=1)).notices == ()


@pytest.mark.parametrize("stop_after", range(0, 26, 5))
def test_the_state_goes_through_json_and_goes_on_alike(stop_after: int) -> None:
    rows = recorded("failing")[:26]
    config, state = WatchConfig(), WatchState()
    for step, row in enumerate(rows[:stop_after], start=FIRST):
        state = observe(state, row, step, config).state
    state = state.after_action(FIRST, FIRST + stop_after)
    back = WatchState.from_json(json.loads(json.dumps(state.to_json())))
    assert back == state
    after: list[Observation] = []
    for start in (state, back):
        for step, row in enumerate(rows[stop_after:], start=FIRST + stop_after):
            after.append(observe(start, row, step, config))
            start = after[-1].state
    half = len(after) // 2
    assert after[:half] == after[half:]


def test_an_action_clears_all_but_the_baselines() -> None:
    config = WatchConfig()
    state = WatchState()
    for step, row in enumerate([HEALTHY] * 12, start=FIRST):
        state = observe(state, row, step, config).state
    high = HEALTHY | {"policy/kl_sampler_old_k3": 0.05}
    state = observe(state, high, FIRST + 12, config).state
    assert state.since == {"kl_rise": FIRST + 12}
    cleared = state.after_action(FIRST + 12, FIRST + 12)
    assert cleared.acted == ((FIRST + 12, FIRST + 12),)
    assert cleared.since == {}
    assert cleared.series["kl_rise"].first == (8e-4,)
    assert cleared.series["reward_drop"].best == 0.0
    found = []
    for step in range(FIRST + 13, FIRST + 17):
        cleared, alarms, _ = observe(cleared, high, step, config)
        found += [(step - FIRST, alarm.rule) for alarm in alarms]
    assert found == [(15, "kl_rise")]  # patience counts anew, the baseline does not


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patience": 0}, "watch.patience is 0"),
        ({"baseline_steps": 0}, "watch.baseline_steps is 0"),
        ({"max_actions": -1}, "watch.max_actions is -1"),
        ({"patience": 6, "window": 11}, "make the window at least 12"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WatchConfig(**settings)


@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_a_threshold_is_a_positive_number_or_off(value: float) -> None:
    with pytest.raises(ValueError, match=r"thresholds.kl_rise is .* 0 or inf for off"):
        ThresholdConfig(kl_rise=value)


def recorded(name: str) -> list[dict[str, float]]:
    """The RL steps of a recorded run, see tests/recorded/README.md."""
    lines = (RECORDED / f"{name}.jsonl").read_text().splitlines()
    names, *rows = (json.loads(line) for line in lines)
    return [dict(zip(names, map(float, row), strict=True)) for row in rows]


def collapse(rewards: list[float], *, window: int = 10) -> int | None:
    """Index from which on the running mean of the reward stays below half of its best until then.

    None if it ends above.
    """
    means = [
        sum(rewards[max(0, end - window) : end]) / min(window, end)
        for end in range(1, len(rewards) + 1)
    ]
    low = [mean < 0.5 * max(means[: index + 1]) for index, mean in enumerate(means)]
    if not low[-1]:
        return None
    return max((index + 1 for index, is_low in enumerate(low) if not is_low), default=0)


def test_the_recorded_failing_run_is_heard_well_before_it_collapses() -> None:
    rows = recorded("failing")
    end = collapse([row["rollout/reward_mean"] for row in rows])
    assert end is not None
    found = alarms_of(rows, WatchConfig())
    causes = [step - FIRST for step, alarm in found if alarm.rule != "reward_drop"]
    assert causes
    assert causes[0] <= end - 10


@pytest.mark.parametrize("name", ["good", "good_seed_1"])
def test_the_recorded_good_runs_raise_no_alarm(name: str) -> None:
    rows = recorded(name)
    rewards = [row["rollout/reward_mean"] for row in rows]
    assert collapse(rewards) is None
    assert sum(rewards[-10:]) > 2 * sum(rewards[:10])
    state = WatchState()
    for step, row in enumerate(rows, start=FIRST):
        state, alarms, notices = observe(state, row, step, WatchConfig())
        assert (alarms, notices) == ((), ())


def test_recorded_runs_hold_just_what_the_rules_read() -> None:
    wanted = {name for rule in make_rules(ThresholdConfig()) for name in rule.metrics}
    for path in RECORDED.glob("*.jsonl"):
        assert path.stat().st_size < 40_000
        for row in recorded(path.stem):
            others = {name for name in row if not name.startswith("nonfinite/")}
            assert others == wanted | {"step", "learner/loss"}
