"""The jitted steps of RL: score a rollout batch, then update on each of its mini-batches.

What it is: the one place where model, loss, routing replay and optimizer meet. Which factor of
arXiv 2512.01374, eq. 8, uses which experts is decided here and nowhere else:

    replay   pi_old (score step)        pi (train step)
    none     its own routing            its own routing
    r2       its own routing            the experts of pi_old, which prepare() hands over
    r3       the sampler's experts      the sampler's experts

With learner.replay_gates the gate values of pi_old go with the experts, and no gradient of the
policy loss reaches pi's router at replayed tokens.
Under r3 with learner.route_fallback "live", a token without routes has its own routing in both.

What it is not: the maths of the loss (losses/) or the loop over mini-batches (loop.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import field
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.arrays import (
    NOT_REPLAYED,
    OLD_ROUTES,
    Array,
    LossOutput,
    Metrics,
    ReplayedRoutes,
    RouteFallback,
    RouterOutput,
    TrainBatch,
)
from jaxrl_llm.learner.routing import Replay as Replay
from jaxrl_llm.learner.routing import replayed_routes, routing_metrics
from jaxrl_llm.learner.state import (
    Optimizer,
    OptimizerConfig,
    TrainState,
    abstract_params,
    abstract_state,
    shardings_of,
)
from jaxrl_llm.learner.update import accumulate_gradients, apply_gradients, join_rows, split_rows
from jaxrl_llm.learner.watch import WatchConfig
from jaxrl_llm.losses.diagnostics import agreement_metrics, masked_mean
from jaxrl_llm.losses.kl import k1, k3
from jaxrl_llm.losses.policy import LossConfig, policy_loss, token_terms
from jaxrl_llm.losses.router import expert_load, router_loss
from jaxrl_llm.losses.statistics import importance_statistics
from jaxrl_llm.losses.weights import token_weights
from jaxrl_llm.model.config import ComputeConfig, ModelConfig
from jaxrl_llm.model.logprobs import token_logprobs
from jaxrl_llm.model.transformer import Params, make_forward, unembed
from jaxrl_llm.sharding import (
    Layout,
    MeshConfig,
    batch_sharding,
    partitioned,
    replicated,
)

Gradient = Callable[[Params, TrainBatch], tuple[Params, LossOutput]]
TrainStep = Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """How the learner turns a rollout batch into updates."""

    mini_batches: int = 1  # updates per rollout batch, the paper's N; 1 is on-policy
    # Rows of a micro-batch for each share of the mesh (data x fsdp x expert), computed at once: as
    # many as memory allows. 0: all rows of the mini-batch at once.
    micro_batch_rows: int = 0
    replay: Replay = "none"  # routing replay: r2 the learner's old routes, r3 the sampler's
    route_fallback: RouteFallback = "error"  # r3, a token without routes: refused, or routed live
    replay_gates: bool = False  # pi_old's gate values too; no policy gradient to the router
    # Where pi_old comes from: a scoring pass before the first update, or none: then pi_old is the
    # current policy, which is exact only for the first mini-batch.
    old_logprobs: Literal["score", "none"] = "score"
    row_length: int = 0  # positions of a row, S; 0: just enough for the engine's longest sequence
    pack: bool = False  # several responses in a row, to waste less of it on padding
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # of the RL updates
    watch: WatchConfig = field(default_factory=WatchConfig)  # the early warning
    compute: ComputeConfig = field(default_factory=ComputeConfig)  # how a pass is computed
    mesh: MeshConfig = field(default_factory=MeshConfig)  # devices along each axis

    def __post_init__(self) -> None:
        for name, least in (("mini_batches", 1), ("micro_batch_rows", 0)):
            if vars(self)[name] < least:
                raise ValueError(
                    f"learner.{name} is {vars(self)[name]}; it must be at least {least}"
                )
        if self.replay == "r2" and self.old_logprobs == "none":
            raise ValueError(
                "learner.replay r2 replays the routes of the scoring pass, and "
                "learner.old_logprobs none leaves that out; set old_logprobs to score"
            )
        if self.replay == "r2" and self.mini_batches == 1:
            raise ValueError(
                "learner.replay r2 changes nothing with learner.mini_batches 1: the only update "
                "starts at the old weights, whose routes are its own; set mini_batches to 2 or "
                "more, or replay to none or r3"
            )
        if self.replay_gates and (self.replay == "none" or self.old_logprobs == "none"):
            raise ValueError(
                "learner.replay_gates replays the gate values of the scoring pass at the replayed "
                f"experts, but learner.replay is {self.replay} and learner.old_logprobs is "
                f"{self.old_logprobs}; set replay to r2 or r3 and old_logprobs to score"
            )

    @property
    def row_multiple(self) -> int:
        """The rows of a mini-batch must be a multiple of this; pad with empty rows."""
        return max(self.micro_batch_rows, 1) * self.mesh.rows

    def micro_batches(self, rows: int) -> int:
        """Parts of a mini-batch of so many rows, computed one after another to save memory.

        Raises ValueError for rows that are no multiple of row_multiple.
        """
        if rows % self.row_multiple:
            raise ValueError(
                f"the mini-batch has {rows} rows, no multiple of {self.row_multiple}, the "
                "micro_batch_rows x data x fsdp x expert of the settings; pad it with empty rows "
                "or change one of these"
            )
        return rows // self.row_multiple if self.micro_batch_rows else 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoreOutput:
    """What the policy says about a batch at the weights an update starts from."""

    logprobs: Array  # f32[B, S], pi_old of the targets, nats
    entropy: Array  # f32[B, S], of pi_old, nats
    routes: Array  # int16[B, S, L, K], experts this pass used
    gates: Array | None  # f32[B, S, L, K], their gate values if learner.replay_gates
    metrics: Metrics


ScoreStep = Callable[[Params, TrainBatch], ScoreOutput]


class Policy(NamedTuple):
    """One forward pass of the policy over a batch."""

    logprobs: Array  # f32[B, S], of the targets
    entropy: Array  # f32[B, S]
    router: RouterOutput  # fields [L, B, S, ...]


def make_policy(
    model: ModelConfig, compute: ComputeConfig, layout: Layout, *, temperature: float
) -> Callable[[Params, TrainBatch, ReplayedRoutes | None], Policy]:
    """The pure function policy(params, batch, replayed) -> Policy; None replays nothing."""
    forward = make_forward(model, compute, layout)

    def policy(params: Params, batch: TrainBatch, replayed: ReplayedRoutes | None) -> Policy:
        output = forward(params, batch.inputs, batch.positions, batch.segment_ids, replayed)
        logprobs, entropy = token_logprobs(
            output.hidden,
            unembed(params, model),
            batch.targets,
            temperature=temperature,
            chunk=compute.logprob_chunk,
            keep=compute.keep_logits,
            layout=layout,
        )
        return Policy(logprobs, entropy, output.router)

    return policy


def make_score_step(
    model: ModelConfig, learner: LearnerConfig, layout: Layout, *, temperature: float
) -> ScoreStep:
    """The jitted score(params, batch) -> ScoreOutput; run it before the first update of a batch.

    Under r3 it replays batch.routes, the sampler's; otherwise it routes by itself. The metrics
    compare the sampler with pi_old on sampled tokens: policy/kl_sampler_old, its k3 estimate, and
    routing/agreement and routing/overlap_layer_* if the batch has the sampler's routes.
    """
    policy = make_policy(model, learner.compute, layout, temperature=temperature)
    replay: Replay = "r3" if learner.replay == "r3" else "none"

    def compare(logprobs: Array, router_logits: Array, batch: TrainBatch) -> Metrics:
        mask, sampler = batch.loss_mask, batch.sampler_logprobs
        metrics = {
            "policy/kl_sampler_old": masked_mean(k1(sampler, logprobs, mask), mask),
            "policy/kl_sampler_old_k3": masked_mean(k3(sampler, logprobs, mask), mask),
        }
        if batch.routes is None:
            return metrics
        layers = model.moe_layer_indices
        return metrics | agreement_metrics(
            router_logits, batch.routes, mask, layers=layers, kind=""
        )

    def part(params: Params, batch: TrainBatch) -> ScoreOutput:
        replayed = replayed_routes(batch, replay, learner.route_fallback, gates=False)
        logprobs, entropy, router = policy(params, batch, replayed)
        metrics = partitioned(compare, replicated(layout))(logprobs, router.logits, batch)
        used = jnp.moveaxis(router.experts, 0, 2).astype(jnp.int16)
        gates = jnp.moveaxis(router.weights, 0, 2) if learner.replay_gates else None
        return ScoreOutput(logprobs, entropy, used, gates, metrics)

    def score(params: Params, batch: TrainBatch) -> ScoreOutput:
        micro_batches = learner.micro_batches(batch.inputs.shape[0])
        parts = jax.lax.map(partial(part, params), split_rows(batch, micro_batches))
        metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), parts.metrics)
        whole = jax.tree.map(join_rows, dataclasses.replace(parts, metrics={}))
        return dataclasses.replace(whole, metrics=metrics)

    rows = batch_sharding(layout)
    return jax.jit(
        score,
        in_shardings=(shardings_of(abstract_params(model, layout)), rows),
        out_shardings=ScoreOutput(rows, rows, rows, rows, replicated(layout)),  # type: ignore[arg-type]
    )


def prepare(batch: TrainBatch, score: ScoreOutput, replay: Replay) -> TrainBatch:
    """The batch with pi_old, and what the updates replay: r2's routes, gates, and provenance.

    Under r2, pi_old's routes take the place of the sampler's. Gate values are there if
    learner.replay_gates made the score step return them.
    """
    routes, provenance = batch.routes, batch.provenance
    if replay == "r2":
        routes = score.routes
        provenance = jnp.where(batch.segment_ids > 0, OLD_ROUTES, NOT_REPLAYED).astype(jnp.int8)
    return dataclasses.replace(
        batch,
        old_logprobs=score.logprobs,
        routes=routes,
        provenance=provenance,
        gates=score.gates,
    )


def make_train_step(
    model: ModelConfig,
    learner: LearnerConfig,
    loss: LossConfig,
    optimizer: Optimizer,
    layout: Layout,
    *,
    temperature: float,
) -> TrainStep:
    """The jitted train(state, batch) -> (state, metrics): one update on one mini-batch.

    The metrics are those of the gradient, of the optimizer and losses.statistics. `state` is
    donated: its arrays are gone after the call. `batch` comes from prepare(), or as
    collated where learner.old_logprobs is none, has a multiple of learner.row_multiple rows, and
    lies on the devices as sharding.batch_sharding says.
    Raises ValueError, while tracing, for a batch that lacks what the settings read.
    """
    gradient = make_gradient(model, learner, loss, layout, temperature=temperature)

    def train(state: TrainState, batch: TrainBatch) -> tuple[TrainState, Metrics]:
        grads, output = gradient(state.params, batch)
        state, metrics = apply_gradients(state, grads, output.loss, optimizer)
        assert output.logprobs is not None  # make_gradient's are of a policy
        statistics = partitioned(describe, replicated(layout))(output.logprobs, batch)
        return state, output.metrics | metrics | statistics

    def describe(logprobs: Array, batch: TrainBatch) -> Metrics:
        terms = token_terms(logprobs, batch, loss)
        weight = jnp.where(terms.kept, terms.importance.weight, 0.0)
        return importance_statistics(logprobs, batch, weight)

    return jit_update(train, model, optimizer, layout)


def jit_update(
    update: TrainStep, model: ModelConfig, optimizer: Optimizer, layout: Layout
) -> TrainStep:
    """jax.jit of an update over the mesh, its state donated."""
    state = shardings_of(abstract_state(model, optimizer, layout))
    return jax.jit(
        update,
        in_shardings=(state, batch_sharding(layout)),
        out_shardings=(state, replicated(layout)),
        donate_argnums=0,
    )


class _Part(NamedTuple):
    """A micro-batch and its token weights, which were computed on the whole mini-batch."""

    batch: TrainBatch
    weights: Array  # f32[B, S], of the policy loss, by the averaging rule
    router_weights: Array  # f32[B, S], of the router losses: all real tokens alike, sum 1


def make_gradient(
    model: ModelConfig,
    learner: LearnerConfig,
    loss: LossConfig,
    layout: Layout,
    *,
    temperature: float,
) -> Gradient:
    """The pure function gradient(params, batch) -> (gradient, LossOutput) of one mini-batch.

    It is the same, to rounding, for any number of micro-batches. Metrics are those of policy_loss
    and router_loss, routing/*, of which routing/agreement and routing/overlap_layer_* only if
    no scoring pass reports them.
    """
    policy = make_policy(model, learner.compute, layout, temperature=temperature)
    weigh = partitioned(partial(_weights, loss), batch_sharding(layout))
    losses = partitioned(partial(_losses, model, learner, loss), replicated(layout))

    def run(params: Params, batch: TrainBatch) -> tuple[Policy, ReplayedRoutes | None]:
        fallback, gates = learner.route_fallback, learner.replay_gates
        replayed = replayed_routes(batch, learner.replay, fallback, gates=gates)
        return policy(params, batch, replayed), replayed

    def load(params: Params, part: _Part) -> Array:
        count = partial(expert_load, num_experts=model.moe.num_experts)
        experts = run(params, part.batch)[0].router.experts
        return partitioned(count, replicated(layout))(experts, part.router_weights)

    def objective(params: Params, part: _Part, *, whole_load: Array | None) -> LossOutput:
        seen, replayed = run(params, part.batch)
        output = losses(seen, replayed, part, whole_load)
        return dataclasses.replace(output, logprobs=jax.lax.stop_gradient(seen.logprobs))

    def gradient(params: Params, batch: TrainBatch) -> tuple[Params, LossOutput]:
        _check(batch, learner)
        weights = weigh(batch.loss_mask, batch.segment_ids)
        micro_batches = learner.micro_batches(batch.inputs.shape[0])
        parts = split_rows(_Part(batch, *weights), micro_batches)
        whole_load = None
        if loss.router_balance_coefficient and micro_batches > 1:
            # The balance loss is no sum over tokens; with the load of all of them it becomes one.
            loads = jax.lax.map(partial(load, params), parts)
            whole_load = jnp.sum(loads, axis=0)
        return accumulate_gradients(partial(objective, whole_load=whole_load), params, parts)

    return gradient


def _weights(loss: LossConfig, mask: Array, segments: Array) -> tuple[Array, Array]:
    """Of the policy loss and of the router losses, as in _Part."""
    own = token_weights(mask, segments, per=loss.averaging, constant=loss.averaging_length)
    return own, token_weights(segments > 0, segments, per="token")


def _losses(
    model: ModelConfig,
    learner: LearnerConfig,
    loss: LossConfig,
    seen: Policy,
    replayed: ReplayedRoutes | None,
    part: _Part,
    whole_load: Array | None,
) -> LossOutput:
    """The losses of a micro-batch, pi's pass over it being given, and all that they report."""
    (logprobs, entropy, router), batch = seen, part.batch
    main = policy_loss(logprobs, entropy, batch, part.weights, loss)
    side = router_loss(
        router,
        part.router_weights,
        z_coefficient=loss.router_z_coefficient,
        balance_coefficient=loss.router_balance_coefficient,
        load=whole_load,
    )
    layers, replay, routes = model.moe_layer_indices, learner.replay, batch.routes
    metrics = main.metrics | side.metrics
    metrics |= routing_metrics(router, batch, replayed, replay, layers=layers)
    if learner.old_logprobs == "none" and routes is not None:
        mask = batch.loss_mask
        metrics |= agreement_metrics(router.logits, routes, mask, layers=layers, kind="")
    return LossOutput(main.loss + side.loss, metrics)


def _check(batch: TrainBatch, learner: LearnerConfig) -> None:
    if learner.old_logprobs == "score" and batch.old_logprobs is None:
        raise ValueError(
            "the batch has no old_logprobs, and learner.old_logprobs is score; give it what "
            "prepare() returns"
        )
