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
# # Is the update still the sequence-level gradient?
#
# What we want is the gradient of $J_{seq} = E_{y \sim \pi}[R(y)]$. What we follow is that of a sum
# over tokens, on responses that another policy $\mu$ sampled. With one token's ratio
# $w_t = \pi/\mu = 1 + \delta_t$, its score $g_t = \nabla \log \pi(y_t)$ and the centred reward $A$:
#
# $$J_{seq} = E_\mu\Big[\prod_t w_t\, A\Big] \qquad J_{tok} = E_\mu\Big[\sum_t w_t\, A\Big]$$
#
# Around $\pi = \mu$ both rise by $E_\mu[\sum_t \delta_t A]$ to first order. This is what makes the
# surrogate a *first-order approximation* (arXiv 2512.01374). Note what it does not say. The
# *gradients* differ by
#
# $$\nabla J_{tok} - \nabla J_{seq} = -E_\mu\Big[\sum_t g_t\, w_t \Big(\prod_{s \ne t} w_s - 1\Big)
# A\Big],$$
#
# which is of first order in the $\delta$ of the other tokens: zero only at $\pi = \mu$.
#
# For a policy small enough to list every response these expectations are sums, and there is nothing
# to argue about. This notebook computes them. `jaxrl-llm first-order` is the same at full size.

# %%
import dataclasses

import jax
import matplotlib.pyplot as plt
import numpy as np

from jaxrl_llm.first_order.gradients import (
    Behaviour,
    agreement,
    behaviour_at,
    expected_batch,
    sequence_gradient,
    surrogate_gradient,
)
from jaxrl_llm.first_order.output import FACTORS, attribution, figure
from jaxrl_llm.first_order.passes import flat, make_sampler_score
from jaxrl_llm.first_order.study import (
    StudyConfig,
    random_params,
    run_study,
    study_model,
    study_passes,
    study_task,
    warmed_up,
)
from jaxrl_llm.losses.clipping import ClipConfig
from jaxrl_llm.losses.policy import LossConfig, policy_loss
from jaxrl_llm.losses.weights import ImportanceConfig
from jaxrl_llm.rollout.precision import Numerics

config = StudyConfig(
    seeds=2,
    length=4,
    warmup_updates=15,
    precisions=("float32", "fp8_e4m3", "int4"),
    updates=(1, 4, 16),
)
model, passes = study_model(config), study_passes(config)
responses, rewards = study_task(config)
params = warmed_up(passes, random_params(model, 0), (responses, rewards), config.warmup_updates)
value, gradient = sequence_gradient(passes, params, responses, rewards)
exact = flat(gradient)
print(f"{len(rewards)} responses, {exact.size} parameters, J_seq = {value:.3f}")

# %% [markdown]
# ## On policy nothing is approximate
#
# Let the learner's own policy sample: then every correction weighs 1 and the surrogate's expected
# gradient is the exact one, to float32 rounding. Let an engine in fp8 sample, at the same weights,
# and they part. The correction per sequence removes the error whatever the engine, at a price in
# variance that expectations do not show. The correction per token removes a part of it: what the
# token's own ratio does, not what the ratios of the others do.

# %%
unclipped = ClipConfig(kind="none")
corrections = {
    "no correction": ImportanceConfig(ratio="off"),
    "token IS": ImportanceConfig(high=float("inf")),
    "sequence IS": ImportanceConfig(level="sequence", high=float("inf")),
}
engine = make_sampler_score(Numerics(model, "fp8_e4m3", config.router_precision))
fp8 = behaviour_at(passes.score, engine, params, responses)
itself = Behaviour(sampler=fp8.old, old=fp8.old, old_replayed=fp8.old)
for name, importance in corrections.items():
    cfg = LossConfig(importance=importance, clip=unclipped)
    errors = []
    for who in (itself, fp8):
        batch, weights = expected_batch(responses, rewards, who, "none", cfg)
        found = surrogate_gradient(passes, params, batch, weights, cfg)
        errors.append(agreement(found, exact).relative_error)
    print(f"{name:<14} relative error: sampled by itself {errors[0]:.1e}, by fp8 {errors[1]:.1e}")

# %% [markdown]
# ## The two orders
#
# Walk away from the weights that sampled, along a straight line, and compare with the exact values.
# The objective's error falls with the square of the distance, the gradient's in proportion to it.
# The routes of the old weights are replayed on the way (R2): where a router changes its choice the
# policy of an MoE jumps, and no Taylor expansion reaches across a jump.

# %%
cfg = LossConfig(form="ratio", importance=corrections["token IS"], clip=unclipped)
batch, weights = expected_batch(responses, rewards, itself, "r2", cfg)
replaying = dataclasses.replace(responses, batch=batch)
direction = random_params(model, 2)
distances = 0.016 * 2.0 ** -np.arange(4)  # nearer, float32 rounds the objective by 1 % and more


def at(distance: float) -> tuple[float, float, float]:
    """J_seq, J_tok and the relative error of the gradient, this far along the line."""
    there = jax.tree.map(lambda a, b: a + np.float32(distance) * b, params, direction)
    exact_value, exact_gradient = sequence_gradient(passes, there, replaying, rewards)
    scores = passes.score(there, batch)
    token = -float(policy_loss(scores.logprobs, scores.entropy, batch, weights, cfg).loss)
    found = surrogate_gradient(passes, there, batch, weights, cfg, scores=scores)
    return exact_value, token, agreement(found, flat(exact_gradient)).relative_error


start = at(0.0)
walked = [at(distance) for distance in distances]
objective = [abs((seq - start[0]) - (tok - start[1])) for seq, tok, _ in walked]
turned = [error for *_, error in walked]
orders = [np.polyfit(np.log(distances), np.log(e), 1)[0] for e in (objective, turned)]
print(f"order of the error: objective {orders[0]:.2f}, gradient {orders[1]:.2f}")

drawn, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.loglog(distances, objective, "o-")
axes.loglog(distances, turned, "o-")
axes.text(distances[1], objective[1] / 3, f"objective, order {orders[0]:.2f}", color="C0")
axes.text(distances[1], turned[1] / 3, f"gradient, order {orders[1]:.2f}", color="C1")
axes.set(xlabel="distance from the weights that sampled", ylabel="error")
plt.show()

# %% [markdown]
# ## What breaks it: numerics, routing or staleness?
#
# Two sweeps over a few policies: the engine's precision shortly after the publication, and the
# number of learner updates since, in fp8. `token IS + R2` and `+ R3` replay the old or the
# sampler's routes, which makes $\pi$ another policy than the one whose gradient is wanted.
# Expectations show this bias and not what it buys: ratios that do not jump, and so less variance
# and fewer clipped tokens.

# %%
study = run_study(config, lambda line: None)
figure(study)

# %% [markdown]
# Which source is it? Here anybody can be the behaviour policy, so let them join one by one. First
# it is $\pi_{old}$, with only staleness left; then $\pi_{old}$ on the sampler's routes, and
# routing joins; then the engine itself.

# %%
for sweep, places in (("precision", config.precisions), ("staleness", config.updates)):
    print(f"{'relative error of token IS':<28}", *[f"{place!s:>14}" for place in places])
    for factor in FACTORS:
        values = attribution(study, sweep, factor)
        print(f"{factor:<28}", *[f"{v.mean:>7.3f} ±{v.error:5.3f}" for v in values])
