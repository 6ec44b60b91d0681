"""Library kernels, interpreted on the CPU, against the plain computation: values and gradients."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.model.config import Attention, ComputeConfig, ModelConfig, MoEConfig
from jaxrl_llm.model.kernels import choose_attention, grouped_product, splash_attention
from jaxrl_llm.model.layers import segment_attention
from jaxrl_llm.model.transformer import init_params, make_forward, parameter_axes
from jaxrl_llm.sharding import (
    ONE_DEVICE,
    Layout,
    MeshConfig,
    batch_sharding,
    make_layout,
    parameter_shardings,
)
from tests.model.tiny import assert_close

LENGTH, HEADS, KV_HEADS, SIZE = 256, 4, 2, 128


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def packed(rows: int) -> np.ndarray:
    """Segment ids of rows with two segments and padding, cut at other places in each."""
    place = np.arange(LENGTH)
    cuts = [(90 + 20 * row, 200 + 10 * row) for row in range(rows)]
    return np.stack([1 + (place >= a) - 2 * (place >= b) for a, b in cuts]).astype(np.int32)


def test_splash_attention_is_attention() -> None:
    """On real tokens: what padding attends to is nobody's business, but it must be finite."""
    ids = packed(2)
    operands = tuple(
        normal(2, LENGTH, heads, SIZE, seed=heads) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    probe = normal(2, LENGTH, HEADS, SIZE, seed=9) * (ids > 0)[..., None, None]

    def plain(*operands: jax.Array) -> jax.Array:
        return jnp.sum(probe * segment_attention(*operands, ids, chunk=0))

    def kernel(*operands: jax.Array) -> jax.Array:
        return jnp.sum(probe * splash_attention(*operands, ids, ONE_DEVICE))

    found, wanted = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(*operands) for f in (kernel, plain)
    )
    assert_close(found, wanted, 3e-5)


@pytest.mark.parametrize("rows", [192, 4096])
def test_the_grouped_product_is_a_ragged_product(rows: int) -> None:
    """With empty groups, and rows after the last group; tiles are small where rows are few."""
    x, matrices = normal(rows, 24), normal(4, 24, 40, seed=1)
    sizes = np.array([rows // 3, 0, rows // 2, 5], np.int32)
    real = (np.arange(rows) < sizes.sum())[:, None]
    probe = normal(rows, 40, seed=2)

    def total(product: Any, x: jax.Array, matrices: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(real, probe * product(x, matrices), 0))

    def kernel(x: jax.Array, matrices: jax.Array) -> jax.Array:
        return grouped_product(x, matrices, sizes, ONE_DEVICE)

    def plain(x: jax.Array, matrices: jax.Array) -> jax.Array:
        owner = np.searchsorted(np.cumsum(sizes), np.arange(rows), side="right")
        return jnp.einsum("ri,rio->ro", x, matrices[np.minimum(owner, 3)])

    found, wanted = (
        jax.jit(jax.value_and_grad(lambda *a: total(f, *a), argnums=(0, 1)))(x, matrices)  # noqa: B023
        for f in (kernel, plain)
    )
    to_rows = np.where(real, found[1][0], 0)  # of undefined rows, undefined
    assert_close((found[0], to_rows, found[1][1]), (wanted[0], *wanted[1]), 3e-5)


CONFIG = ModelConfig(
    vocab_size=16,
    width=128,
    num_layers=2,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    head_dim=SIZE,
    moe=MoEConfig(num_experts=4, experts_per_token=2, expert_width=128),
)


@pytest.mark.parametrize("remat", ["none", "block"])
@pytest.mark.parametrize(
    "mesh", [MeshConfig(), MeshConfig(expert=2, context=2, tensor=2)], ids=["one", "eight"]
)
def test_a_model_of_kernels_is_the_plain_model(mesh: MeshConfig, remat: Any) -> None:
    """Inside the model's shard_map, with rows that are split: values, every gradient leaf."""
    rows = 4
    tokens = np.random.default_rng(0).integers(0, 16, (rows, LENGTH)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    probe = normal(rows, LENGTH, 128, seed=3) * (packed(rows) > 0)[..., None]
    params = init_params(CONFIG, jax.random.key(1))

    def run(layout: Layout, compute: ComputeConfig) -> Any:
        forward = make_forward(CONFIG, compute, layout)
        placed = jax.device_put(params, parameter_shardings(params, parameter_axes(CONFIG), layout))
        batch = jax.device_put((tokens, positions, packed(rows), probe), batch_sharding(layout))

        def total(params: Any, inputs: Any, positions: Any, ids: Any, probe: Any) -> jax.Array:
            return jnp.sum(probe * forward(params, inputs, positions, ids, None).hidden)

        return jax.device_get(jax.jit(jax.value_and_grad(total))(placed, *batch))

    plain = ComputeConfig(attention="plain", dispatch="dense", remat=remat)
    kernels = dataclasses.replace(plain, attention="splash", dispatch="megablox")
    assert_close(run(make_layout(mesh), kernels), run(make_layout(MeshConfig()), plain), 5e-5)


class Elsewhere(Layout):
    """A layout whose devices are of another kind."""

    platform: str = ""  # type: ignore[assignment]


def elsewhere(platform: str) -> Layout:
    layout = Elsewhere()
    object.__setattr__(layout, "platform", platform)
    return layout


@pytest.mark.parametrize(
    ("platform", "head_dim", "length", "chosen"),
    [
        ("cpu", 128, 256, "plain"),
        ("gpu", 128, 256, "plain"),
        ("tpu", 128, 256, "splash"),
        ("tpu", 64, 256, "plain"),
        ("tpu", 128, 257, "plain"),
    ],
)
def test_auto_takes_a_kernel_where_there_is_one(
    platform: str, head_dim: int, length: int, chosen: Attention
) -> None:
    layout = elsewhere(platform)
    assert choose_attention("auto", layout, head_dim=head_dim, length=length) == chosen
    assert choose_attention("plain", layout, head_dim=head_dim, length=length) == "plain"


def test_a_kernel_that_cannot_run_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"compute.attention is splash, .* this is a gpu"):
        choose_attention("splash", elsewhere("gpu"), head_dim=128, length=256)
    with pytest.raises(ValueError, match=r"head_dim \(64\) .* \(256 over 1\) .* multiples of 128"):
        choose_attention("splash", elsewhere("tpu"), head_dim=64, length=256)
