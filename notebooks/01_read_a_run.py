# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Read a run
#
# A run directory holds everything a run had to say. This notebook reads one with
# `jaxrl_llm.runlog.RunReader` and asks the four questions of any RL run, in this order: did it
# work, was it stable, what did it say, and where did the time go.
#
# It takes the directory from the environment variable `JAXRL_LLM_RUN`, or else the newest one
# below `runs/`. A run that is still going can be read as well. `jaxrl-llm report RUN` makes a
# page of the same material; here you can take it apart.

# %%
import os
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from jaxrl_llm.losses.advantages import group_advantages
from jaxrl_llm.metrics import describe
from jaxrl_llm.runlog import RunReader


def newest_run() -> Path:
    """The run directory written last, below runs/ here or in the repository root."""
    logs = [path for root in (".", "..") for path in Path(root).glob("runs/**/metrics.jsonl")]
    if not logs:
        raise SystemExit("no run below runs/; set JAXRL_LLM_RUN to a run directory")
    return max(logs, key=lambda path: path.stat().st_mtime).parent


run_dir = Path(os.environ.get("JAXRL_LLM_RUN") or newest_run())
reader = RunReader(run_dir)
cold_start, rl, evaluations = (reader.metrics(phase) for phase in ("sft", "rl", "eval"))
print(run_dir.resolve())
for name, columns in (("cold start", cold_start), ("RL", rl), ("evaluation", evaluations)):
    steps = columns["step"]
    print(f"{name:>10}: {len(steps)} records" + (f", to step {steps[-1]}" if len(steps) else ""))

# %% [markdown]
# `metrics(phase)` gives columns: `"step"` and one float64 array for every name, NaN where a step
# did not log it. Every name is documented.

# %%
for name, values in rl.items():
    if name != "step":
        print(f"{name:<30} {values[-1]:>10.4g}   {describe(name)}")

# %% [markdown]
# ## Did it work?
#
# Sampled accuracy on held-out prompts is what counts: it is what RL optimises, on prompts it has
# not seen. The brackets are bootstrap intervals over prompts. If greedy accuracy hardly moves while
# sampled accuracy climbs, RL sharpened what the policy could already do; if pass@k climbs too, it
# found something new.

# %%
for index, step in enumerate(evaluations["step"]):
    print(f"step {step}")
    for name in ("avg_at_k", "pass_at_k", "greedy_accuracy"):
        if f"eval/{name}" in evaluations:
            value, low, high = (
                evaluations[f"eval/{name}{e}"][index] for e in ("", "_low", "_high")
            )
            print(f"    {name:<16} {value:6.1%}  [{low:.1%}, {high:.1%}]")

figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
if "rollout/accuracy" in rl:
    axes.plot(rl["step"], rl["rollout/accuracy"], label="training rollouts")
if len(evaluations["step"]):
    axes.plot(evaluations["step"], evaluations["eval/avg_at_k"], "o--", label="held out, sampled")
axes.set(xlabel="step", ylabel="accuracy", ylim=(0, 1))
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## Was it stable?
#
# The surrogate objective holds to first order, while every token's $\pi/\mu$ is close to 1. It
# factors into the training-inference discrepancy $\pi_{old}/\mu$ and the staleness ratio
# $\pi/\pi_{old}$. So watch four things: the KL between the engines, the mean importance weight,
# how much the clip masks, and the entropy, whose sudden fall announces a collapse.

# %%
panels = {
    "discrepancy [nats]": ("policy/kl_sampler_old_k3",),
    "importance weight": ("is_weight/raw_mean", "is_weight/used_mean"),
    "clipped [fraction]": ("clip/high_fraction", "clip/low_fraction"),
    "entropy [nats]": ("policy/entropy",),
    "routes": ("routing/agreement", "routing/replay_coverage"),
    "effective sample size": ("is_weight/raw_ess_token", "is_weight/raw_ess_sequence"),
}
figure, grid = plt.subplots(2, 3, figsize=(13, 5.5), layout="constrained")
for axes, (title, names) in zip(grid.flat, panels.items(), strict=True):
    for name in names:
        if name in rl:
            axes.plot(rl["step"], rl[name], linewidth=1, label=name)
    axes.set_title(title)
    if axes.get_lines():
        axes.legend(fontsize=7)
plt.show()

# log w is the sum of four terms, measured every few steps: which one broke a run?
for term in ("mismatch_numerics", "mismatch_routing", "staleness_weights", "staleness_routing"):
    values = rl.get(f"attribution/abs_{term}", np.array([]))
    known = values[np.isfinite(values)]
    if known.size:
        print(f"{term:<18} mean |term| {known.mean():.2e} nats, {known.size} steps")

for message, count in Counter(event["message"] for event in reader.events()).most_common():
    print(f"{count:>5} times: {message}")

# %% [markdown]
# ## What did it say?
#
# The sampled groups were written in full. The advantage of a response is its reward minus the mean
# of its group, which the same pure function computes here that the learner used. A group of equal
# rewards has advantage 0 everywhere and teaches nothing.

# %%
for step in reader.rollout_steps()[-1:]:
    for group in reader.rollouts(step)[:2]:
        rewards = np.array([[rollout.reward or 0.0 for rollout in group.rollouts]], np.float32)
        advantages = group_advantages(rewards, np.ones(rewards.shape, bool))[0]
        print(f"step {step}  {group.prompt.text!r}  answer {group.prompt.answer!r}")
        for rollout, advantage in zip(group.rollouts, advantages, strict=True):
            print(f"    {advantage:+.2f}  {rollout.verdict:<10} {rollout.text!r}")

# %% [markdown]
# How sure was the policy of each token it sampled, and is it less sure where it goes wrong? By the
# alignment rule, index $s$ of `sampler_logprobs` belongs to the token at $s + 1$, and the mask
# picks the sampled ones.

# %%
by_outcome: dict[str, list[np.ndarray]] = {"correct": [], "not correct": []}
for step in reader.rollout_steps():
    for group in reader.rollouts(step):
        for rollout in group.rollouts:
            outcome = "correct" if rollout.verdict == "correct" else "not correct"
            by_outcome[outcome].append(-rollout.sampler_logprobs[rollout.loss_mask])

figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
for outcome, surprises in by_outcome.items():
    longest = max((len(surprise) for surprise in surprises), default=0)
    means = [np.mean([s[i] for s in surprises if i < len(s)]) for i in range(longest)]
    axes.plot(means, label=f"{outcome}, {len(surprises)} responses")
axes.set(xlabel="position in the response", ylabel="mean surprise [nats]")
axes.legend()
plt.show()

# %% [markdown]
# ## Where did the time go?
#
# Timings are the one thing in the log that a second run does not reproduce. The first steps contain
# compilation, so the median of a step is the better guide to a longer run.

# %%
timings = reader.timings("rl")
for name, values in timings.items():
    if name.startswith("seconds/"):
        total, median = np.nansum(values), np.nanmedian(values)
        print(f"{name:<22} {total:8.1f} s in all   {median:8.3f} s in the median step")
for name, values in timings.items():
    if name.startswith("rate/"):
        print(f"{name:<36} {np.nanmedian(values):10,.0f}  {describe(name)}")
