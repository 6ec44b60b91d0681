"""The Qwen3-MoE transformer: Flax NNX modules whose layers are stacked and scanned.

Callers hold only the parameters, a nested dict of float32 arrays (the same for learner, engine,
checkpoint and export), and a forward function of it:

    {"embed": [V, D], "segments": {"00": BLOCKS, "01": BLOCKS, ...}, "final_norm": [D],
     "head": [D, V], absent if the embedding is tied}

A segment is a maximal run of layers of one kind, dense or MoE, stacked on a leading axis n:

    {"attention_norm": [n, D],
     "attention": {"q": [n, D, H*P], "k": [n, D, KV*P], "v": [n, D, KV*P], "o": [n, H*P, D],
                   "q_norm": [n, P], "k_norm": [n, P]},
     "mlp_norm": [n, D],
     "mlp": {"router": [n, D, E], "gate": [n, E, D, F], "up": [n, E, D, F], "down": [n, E, F, D]}
         or {"gate": [n, D, F], "up": [n, D, F], "down": [n, F, D]}}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jaxrl_llm.arrays import ForwardOutput, ReplayedRoutes, RouterOutput
from jaxrl_llm.model.attention import ATTENTION, blocked_attention, segment_attention
from jaxrl_llm.model.config import ComputeConfig, ModelConfig
from jaxrl_llm.model.kernels import (
    check_attention,
    choose_attention,
    cudnn_attention,
    splash_attention,
)
from jaxrl_llm.model.layers import linear, rms_norm, rotary_table, rotate, swiglu
from jaxrl_llm.model.moe import check_dispatch, dispatch, route, router_logits
from jaxrl_llm.sharding import ONE_DEVICE, TOKEN_AXES, Layout, alike

Array = jax.Array
Params = dict[str, Any]
Rotary = tuple[Array, Array]
Sizes = dict[str | None, int]  # dimension name -> size, in order
Forward = Callable[[Params, Array, Array, Array, ReplayedRoutes | None], ForwardOutput]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all modules of one model share; static under jit."""

    config: ModelConfig
    compute: ComputeConfig
    layout: Layout = ONE_DEVICE

    def weights(self, *params: nnx.Param) -> list[Array]:
        """One layer's matrices in the compute dtype, gathered along the width; else this device's
        shares.

        Cast first: half the bytes travel, of a matrix and of its gradient. Several matrices, of the
        same dimensions, travel as one, side by side.
        """
        names = tuple(name for name in params[0].axes if name != "layers")
        matrices = [param[...].astype(self.compute.dtype) for param in params]
        if not self.layout.gathers(names):  # left as they are, the gradient keeps no copy of them
            return self.layout.vary(matrices, TOKEN_AXES)
        whole = self.layout.whole(jnp.concatenate(matrices, axis=-1), names)
        return jnp.split(whole, len(matrices), axis=-1)

    def weight(self, param: nnx.Param) -> Array:
        """One matrix, as weights() has it."""
        return self.weights(param)[0]


def _matrix(rngs: nnx.Rngs, sizes: Sizes, *, fan_in: int) -> nnx.Param:
    """A parameter of these named dimensions, drawn from a normal of variance 1 / fan_in."""
    value = jax.random.normal(rngs.params(), tuple(sizes.values())) * fan_in**-0.5
    return nnx.Param(value, axes=tuple(sizes))


def _ones(sizes: Sizes) -> nnx.Param:
    return nnx.Param(jnp.ones(tuple(sizes.values())), axes=tuple(sizes))


class Attention(nnx.Module):
    """Grouped-query attention with RMSNorm on queries and keys before the rotation."""

    def __init__(self, setup: Setup, layers: int, rngs: nnx.Rngs) -> None:
        config = setup.config
        width, size = config.width, config.head_dim
        heads, kv_heads = config.num_heads * size, config.num_kv_heads * size
        stack: Sizes = {"layers": layers}
        self.setup = setup
        self.q = _matrix(rngs, {**stack, "embed": width, "heads": heads}, fan_in=width)
        self.k = _matrix(rngs, {**stack, "embed": width, "heads": kv_heads}, fan_in=width)
        self.v = _matrix(rngs, {**stack, "embed": width, "heads": kv_heads}, fan_in=width)
        self.o = _matrix(rngs, {**stack, "heads": heads, "embed": width}, fan_in=heads)
        self.q_norm = _ones({**stack, None: size})
        self.k_norm = _ones({**stack, None: size})

    def __call__(self, x: Array, rotary: Rotary, segment_ids: Array) -> Array:
        config, layout = self.setup.config, self.setup.layout
        flat = x.reshape(-1, x.shape[-1])  # once, or the gradient keeps it three times

        def heads(matrix: nnx.Param) -> Array:
            projected = linear(flat, self.setup.weight(matrix))
            return projected.reshape(*x.shape[:-1], -1, config.head_dim)

        query = rotate(rms_norm(heads(self.q), self.q_norm[...], config.norm_eps), rotary)
        key = rotate(rms_norm(heads(self.k), self.k_norm[...], config.norm_eps), rotary)
        value = heads(self.v)
        first: Array | int = 0
        if context := layout.split(("context",)):
            # This device has some queries of a row and needs all its keys, whose heads are few.
            key, value, segment_ids = (
                jax.lax.all_gather(part, context, axis=1, tiled=True)
                for part in (key, value, segment_ids)
            )
            first = jax.lax.axis_index(context) * x.shape[1]
        compute, length = self.setup.compute, segment_ids.shape[1]
        match choose_attention(compute, layout, head_dim=config.head_dim, length=length):
            case "splash":
                attended = splash_attention(query, key, value, segment_ids, layout)
            case "cudnn":
                attended = cudnn_attention(query, key, value, segment_ids, layout)
            case "blocked":
                operands = alike((query, key, value, segment_ids, jnp.asarray(first)))
                attended = blocked_attention(*operands)
            case _:
                attended = segment_attention(
                    query, key, value, segment_ids, chunk=compute.attention_chunk, first=first
                )
        output = linear(attended.reshape(*x.shape[:-1], -1), self.setup.weight(self.o))
        return layout.total(output, "heads")


class DenseMlp(nnx.Module):
    """The MLP of a layer without experts; replayed routes do not concern it."""

    def __init__(self, setup: Setup, layers: int, rngs: nnx.Rngs) -> None:
        width, inner = setup.config.width, setup.config.moe.dense_width
        columns: Sizes = {"layers": layers, "embed": width, "mlp": inner}
        rows: Sizes = {"layers": layers, "mlp": inner, "embed": width}
        self.setup = setup
        self.gate = _matrix(rngs, columns, fan_in=width)
        self.up = _matrix(rngs, columns, fan_in=width)
        self.down = _matrix(rngs, rows, fan_in=inner)

    def __call__(self, x: Array, replayed: ReplayedRoutes | None) -> tuple[Array, None]:
        gate, up, down = (self.setup.weight(matrix) for matrix in (self.gate, self.up, self.down))
        return self.setup.layout.total(swiglu(x, gate, up, down), "mlp"), None


class MoeMlp(nnx.Module):
    """Router and experts: route() then dispatch()."""

    def __init__(self, setup: Setup, layers: int, rngs: nnx.Rngs) -> None:
        moe, width = setup.config.moe, setup.config.width
        stack: Sizes = {"layers": layers, "expert": moe.num_experts}
        columns = {**stack, "expert_embed": width, "mlp": moe.expert_width}
        rows = {**stack, "mlp": moe.expert_width, "expert_embed": width}
        router: Sizes = {"layers": layers, "embed": width, None: moe.num_experts}
        self.setup = setup
        self.router = _matrix(rngs, router, fan_in=width)
        self.gate = _matrix(rngs, columns, fan_in=width)
        self.up = _matrix(rngs, columns, fan_in=width)
        self.down = _matrix(rngs, rows, fan_in=moe.expert_width)

    def __call__(self, x: Array, replayed: ReplayedRoutes | None) -> tuple[Array, RouterOutput]:
        setup, moe = self.setup, self.setup.config.moe
        flat = x.reshape(-1, x.shape[-1])
        logits = router_logits(flat, setup.layout.whole(self.router[...], ("embed", None)))
        router = route(
            logits.reshape(*x.shape[:-1], -1),
            moe.experts_per_token,
            replayed,
            normalize=moe.normalize_weights,
        )
        gate, up = setup.weights(self.gate, self.up)
        output = dispatch(
            flat,
            router.experts.reshape(-1, moe.experts_per_token),
            router.weights.reshape(-1, moe.experts_per_token),
            {"gate": gate, "up": up, "down": setup.weight(self.down)},
            implementation=setup.compute.dispatch,
            layout=setup.layout,
        )
        return output.reshape(x.shape), router


class Block(nnx.Module):
    """One layer, or several of one kind stacked on a leading axis until the scan takes one."""

    def __init__(self, setup: Setup, layers: int, rngs: nnx.Rngs, *, is_moe: bool) -> None:
        self.setup = setup
        self.attention_norm = _ones({"layers": layers, None: setup.config.width})
        self.attention = Attention(setup, layers, rngs)
        self.mlp_norm = _ones({"layers": layers, None: setup.config.width})
        self.mlp = (MoeMlp if is_moe else DenseMlp)(setup, layers, rngs)

    def __call__(
        self,
        hidden: Array,
        replayed: ReplayedRoutes | None,
        rotary: Rotary,
        segment_ids: Array,
    ) -> tuple[Array, RouterOutput | None]:
        eps = self.setup.config.norm_eps
        normed = rms_norm(hidden, self.attention_norm[...], eps)
        hidden = hidden + self.attention(normed, rotary, segment_ids)
        change, router = self.mlp(rms_norm(hidden, self.mlp_norm[...], eps), replayed)
        return hidden + change, router


class Transformer(nnx.Module):
    """Tokens to final hidden states and router outputs; the head is left to logprobs.py."""

    def __init__(self, setup: Setup, rngs: nnx.Rngs) -> None:
        config = setup.config
        width, vocab = config.width, config.vocab_size
        self.setup = setup
        self.embed = _matrix(rngs, {"vocab": vocab, "embed": width}, fan_in=width)
        self.segments = nnx.Dict(
            {
                f"{index:02}": Block(setup, layers, rngs, is_moe=is_moe)
                for index, (is_moe, layers) in enumerate(config.segments)
            }
        )
        self.final_norm = _ones({None: width})
        if not config.tie_embeddings:
            self.head = _matrix(rngs, {"embed": width, "vocab": vocab}, fan_in=width)

    def __call__(
        self,
        inputs: Array,
        positions: Array,
        segment_ids: Array,
        replayed: ReplayedRoutes | None,
    ) -> ForwardOutput:
        """See make_forward."""
        config = self.setup.config
        rotary = rotary_table(positions, config.head_dim, config.rope_theta)
        hidden = self._embedded(inputs).astype(self.setup.compute.dtype)
        by_layer = jax.tree.map(lambda field: jnp.moveaxis(field, 2, 0), replayed)
        outputs, first = [], 0
        for index, (is_moe, layers) in enumerate(config.segments):
            blocks = self.segments[f"{index:02}"]
            part = _take_layers(by_layer, first, layers) if is_moe else None
            hidden, router = _scan(blocks, hidden, part, rotary, segment_ids)
            if is_moe:
                outputs.append(router)
                first += layers
        hidden = rms_norm(hidden, self.final_norm[...], config.norm_eps)
        router = jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
        return ForwardOutput(hidden, router)

    def _embedded(self, inputs: Array) -> Array:
        """f32[B, S, D]; in float32, since its gradient adds up the tokens of an id."""
        layout = self.setup.layout
        table = layout.whole(self.embed[...], ("vocab", "embed"))
        if not layout.axes("vocab"):
            return table[inputs]
        local = inputs - layout.share("vocab") * table.shape[0]
        return layout.total(_rows_or_zero(table, local), "vocab")


def _rows_or_zero(table: Array, index: Array) -> Array:
    """table[index], and zeros where the table has no such row."""
    here = (index >= 0) & (index < table.shape[0])
    return jnp.where(here[..., None], table.at[index].get(mode="clip"), 0)


def _take_layers(replayed: ReplayedRoutes | None, first: int, count: int) -> ReplayedRoutes | None:
    return jax.tree.map(lambda field: field[first : first + count], replayed)


def _scan(
    blocks: Block,
    hidden: Array,
    replayed: ReplayedRoutes | None,
    rotary: Rotary,
    segment_ids: Array,
) -> tuple[Array, RouterOutput | None]:
    """Run stacked layers one after another: routes [n, B, S, K] go in, router outputs come out."""
    definition, stacked = nnx.split(blocks)

    def layer(
        hidden: Array, xs: tuple[Any, ReplayedRoutes | None]
    ) -> tuple[Array, RouterOutput | None]:
        params, routes = xs
        return nnx.merge(definition, params)(hidden, routes, rotary, segment_ids)

    remat = blocks.setup.compute.remat
    if remat != "none":
        policies = jax.checkpoint_policies
        keep = {
            "block": None,
            "attention": policies.save_only_these_names(ATTENTION),
            "dots": policies.dots_with_no_batch_dims_saveable,  # matmuls with parameters
        }
        layer = jax.checkpoint(layer, policy=keep[remat], prevent_cse=False)
    return jax.lax.scan(layer, hidden, (stacked, replayed))


def make_forward(
    config: ModelConfig, compute: ComputeConfig, layout: Layout = ONE_DEVICE
) -> Forward:
    """The pure function forward(params, inputs, positions, segment_ids, replayed) -> ForwardOutput.

    inputs, positions, segment_ids: i32[B, S] under the alignment rule of types.py; a token sees
      the tokens before it in its own segment, so packed rows equal unpacked ones.
    replayed: experts int[B, S, L, K] to replay, L over the MoE layers in global order, NO_ROUTE
      where the live router decides, and their gate values if those are replayed too; None replays
      nothing.

    With a mesh, arrays are split over it: parameters by the layout's rules, the rest and the output
    by rows and positions.

    Raises ValueError when heads do not divide over the mesh, when this backend lacks a kernel that
    `compute` names, and, from forward, when replayed routes or gates have another shape.
    """
    check_attention(compute, layout, head_dim=config.head_dim)
    check_dispatch(compute.dispatch, layout, widths=(config.width, config.moe.expert_width))
    parts = layout.size(layout.axes("heads"))
    for name, count in (("num_heads", config.num_heads), ("num_kv_heads", config.num_kv_heads)):
        if count % parts:
            raise ValueError(
                f"{name} is {count}, which mesh axes {layout.axes('heads')} of size {parts} cannot "
                "share; lower their size, or give the rule heads no axes"
            )
    definition, _ = nnx.split(_abstract(Setup(config, compute, layout)))
    names = parameter_axes(config)
    specs = jax.tree.map(layout.spec, names, is_leaf=lambda leaf: isinstance(leaf, tuple))
    by_layer = PartitionSpec(None, *layout.tokens)

    def share(
        params: Params,
        inputs: Array,
        positions: Array,
        segment_ids: Array,
        replayed: ReplayedRoutes | None,
    ) -> ForwardOutput:
        return nnx.merge(definition, params)(inputs, positions, segment_ids, replayed)

    outward = ForwardOutput(layout.tokens, by_layer)  # type: ignore[arg-type]
    sharded = layout.shard(share, (specs, *[layout.tokens] * 4), outward)

    def forward(
        params: Params,
        inputs: Array,
        positions: Array,
        segment_ids: Array,
        replayed: ReplayedRoutes | None,
    ) -> ForwardOutput:
        wanted = (*inputs.shape, config.num_moe_layers, config.moe.experts_per_token)
        for field in jax.tree.leaves(replayed):
            if field.shape != wanted:
                raise ValueError(
                    f"replayed routes or gates have shape {field.shape}; inputs {inputs.shape} and "
                    f"this model need {wanted}: [rows, positions, MoE layers, experts per token]"
                )
        return sharded(params, inputs, positions, segment_ids, replayed)

    return forward


def init_params(config: ModelConfig, key: Array) -> Params:
    """Random float32 parameters: matrices of variance 1 / fan-in, norm scales of 1."""
    model = Transformer(Setup(config, ComputeConfig()), nnx.Rngs(key))
    return nnx.to_pure_dict(nnx.state(model))


def parameter_axes(config: ModelConfig) -> Params:
    """The parameter tree with the logical dimension names of each array for leaves."""
    state = nnx.state(_abstract(Setup(config, ComputeConfig())))
    variables = nnx.to_flat_state(state)
    return nnx.traversals.unflatten_mapping({path: leaf.axes for path, leaf in variables})


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, those of all experts included."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def unembed(params: Params, config: ModelConfig) -> Array:
    """The head, f32[D, V]: its own matrix, or the embedding transposed where they are tied."""
    return params["embed"].T if config.tie_embeddings else params["head"]


def _abstract(setup: Setup) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(setup, nnx.Rngs(0)))
