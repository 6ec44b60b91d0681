"""The mixture of experts, in two functions: route() chooses experts, dispatch() computes them.

Routing replay enters at route() as an argument and the choices leave it as a value; nothing else
in the model knows about it. dispatch() is dropless and exact: every token meets every expert it
was given, and all implementations agree with the dense sum in values and gradients.

Shapes: N tokens, D width, E experts, K experts per token, F width inside one expert.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_llm.arrays import NO_ROUTE, ReplayedRoutes, RouterOutput
from jaxrl_llm.model.config import Dispatch
from jaxrl_llm.model.exchange import exchange
from jaxrl_llm.model.grouped import Experts, Implementation, expert_sum
from jaxrl_llm.model.kernels import LANES
from jaxrl_llm.sharding import ONE_DEVICE, TOKEN_AXES, Layout

Array = jax.Array

FEW_TOKENS = 64
"""Up to this many tokens, "auto" on an accelerator computes all experts rather than sort."""


def route(
    logits: Array, k: int, replayed: ReplayedRoutes | None, *, normalize: bool
) -> RouterOutput:
    """Choose k experts per token and give each its gate value.

    Args:
      logits: f32[..., E] of the live router.
      replayed: fields [..., k]; a token whose ids are NO_ROUTE, and every token if None, takes the
        k experts with the highest logits, best first, and their live gate values.
      normalize: make the gate values of a token sum to 1; replayed ones are used as they are.

    Without replayed gates only the choice is replayed. Gate values are then the softmax of the live
    logits at the chosen ids, so the router keeps learning under replay (R2 and R3 of arXiv
    2512.01374). Replayed gates are constants: at such a token nothing depends on the logits.
    """
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(logits), k)
    if replayed is not None:
        live = replayed.experts == NO_ROUTE
        experts = jnp.where(live, experts, replayed.experts.astype(jnp.int32))
    shares = jax.nn.softmax(logits, axis=-1)
    # A comparison and a sum instead of an index: its gradient is no scatter.
    chosen = experts[..., None] == jnp.arange(logits.shape[-1])
    weights = jnp.sum(jnp.where(chosen, shares[..., None, :], 0.0), axis=-1)
    if normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    if replayed is not None and replayed.gates is not None:
        weights = jnp.where(live, weights, jax.lax.stop_gradient(replayed.gates))
    return RouterOutput(logits, experts, weights)


def router_logits(x: Array, router: Array) -> Array:
    """x[N, D] @ router[D, E] in float32 -> f32[N, E]; a rounded logit flips choices."""
    return jnp.matmul(x.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST)


def dispatch(
    x: Array,
    experts: Array,
    weights: Array,
    expert_params: Experts,
    *,
    implementation: Dispatch,
    layout: Layout = ONE_DEVICE,
) -> Array:
    """Sum over k of weights[n, k] * swiglu of expert experts[n, k] on x[n]: [N, D] -> [N, D].

    Args:
      x: [N, D] in the compute dtype.
      experts: i32[N, K], ids in 0 .. E-1.
      weights: f32[N, K], gate values.
      expert_params: gate and up [E, D, F], down [E, F, D]; cast to the dtype of x.
      implementation: "dense" computes all experts for all tokens (small batches); "blocked" sorts
        tokens by expert and multiplies the rows of each expert a block at a time; "ragged" is one
        ragged product over the sorted tokens, "megablox" the same by a kernel for TPUs; "auto"
        picks.
      layout: all of the above are this device's share, inside layout.shard(): its own tokens, its
        part of the experts and of their width F. Tokens travel to their experts and back
        (exchange), and what the parts of F give is added up.
    """
    widths = expert_params["gate"].shape[1:]
    chosen = _resolve(implementation, x.shape[0], layout.platform, widths=widths)
    # Every operand is first made to vary over the axes that any of them varies over. The sums over
    # devices that the gradient needs then stand at this border. Left inside, they depend on which
    # values JAX takes to be equal on all devices, and it takes argsort's result to be, silently.
    axes = (*TOKEN_AXES, *layout.axes("mlp"))
    x, experts, weights, expert_params = layout.vary((x, experts, weights, expert_params), axes)
    if layout.axes("expert"):
        output = exchange(chosen, layout, x, experts, weights, expert_params)
    else:
        output = expert_sum(x, experts, weights, expert_params, chosen, layout)
    return layout.total(output.astype(x.dtype), "mlp")


def check_dispatch(implementation: Dispatch, layout: Layout, *, widths: tuple[int, int]) -> None:
    """Raises ValueError for a kernel that the devices of this layout cannot run.

    widths: D and F of the model.
    """
    if implementation != "megablox":
        return
    if layout.platform == "gpu":
        raise ValueError(
            "learner.compute.dispatch is megablox, a kernel for TPUs (interpreted on CPUs), and "
            "this is a gpu; use auto, or ragged"
        )
    here = (widths[0], widths[1] // layout.size(layout.axes("mlp")))
    if layout.platform == "tpu" and not _fit_kernel(here):
        raise ValueError(
            f"learner.compute.dispatch is megablox, for multiples of {LANES}, and on a device "
            f"model.width is {here[0]} and model.moe.expert_width {here[1]}; use auto, or ragged"
        )


def _fit_kernel(widths: tuple[int, ...]) -> bool:
    return all(width % LANES == 0 for width in widths)


def _resolve(
    implementation: Dispatch, tokens: int, platform: str, *, widths: tuple[int, ...]
) -> Implementation:
    """What "auto" stands for.

    widths: D and F of a device.
    """
    if implementation != "auto":
        return implementation
    if platform == "cpu":
        return "blocked"  # it won at every size measured
    if tokens <= FEW_TOKENS:
        return "dense"
    if platform == "gpu":
        # XLA computes a ragged product there as a dense one of every row with every expert: with
        # a recent cuDNN only in the gradient by the matrices, before that everywhere, and it makes
        # rows E times as wide for it. Blocks take the arithmetic and memory that the routing asks
        # for, in many small products. Which is faster was not measured: there was no GPU.
        return "blocked"
    # On a TPU the gradient of a ragged product by its matrices is computed for all groups alike.
    return "megablox" if _fit_kernel(widths) else "ragged"
