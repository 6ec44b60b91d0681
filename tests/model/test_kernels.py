"""Library kernels, interpreted on the CPU, against the plain computation: values and gradients."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.model import kernels
from jaxrl_llm.model.attention import segment_attention
from jaxrl_llm.model.config import Attention, ComputeConfig, ModelConfig, MoEConfig
from jaxrl_llm.model.kernels import (
    choose_attention,
    cudnn_attention,
    grouped_product,
    splash_attention,
)
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

LENGTH, HEADS, KV_HEADS, SIZE = 384, 4, 2, 128  # of three blocks


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def packed(rows: int) -> np.ndarray:
    """Segment ids of rows with two segments and padding, cut at other places in each."""
    place = np.arange(LENGTH)
    cuts = [(90 + 20 * row, 200 + 10 * row) for row in range(rows)]
    return np.stack([1 + (place >= a) - 2 * (place >= b) for a, b in cuts]).astype(np.int32)


@pytest.fixture
def cudnn_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX's own computation in cuDNN's place, which is called in the same way, on GPUs only."""
    attention = jax.nn.dot_product_attention

    def instead(*arguments: Any, implementation: str, **settings: Any) -> jax.Array:
        assert implementation == "cudnn"
        assert all(x.shape[1] % 2 == 0 for x in arguments), "cuDNN would refuse it"
        return attention(*arguments, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)


@pytest.mark.usefixtures("cudnn_on_cpu")
@pytest.mark.parametrize("length", [LENGTH, 131], ids=["whole", "padded"])
@pytest.mark.parametrize("kernel", [splash_attention, cudnn_attention])
def test_a_kernel_of_attention_is_attention(kernel: Any, length: int) -> None:
    """Of packed rows, padding at their end, a row of padding alone: it sees padding, as in ours."""
    ids = packed(3)[:, :length]
    ids[2] = 0  # a row of padding alone
    operands = tuple(
        normal(3, length, heads, SIZE, seed=heads) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    probe = normal(3, length, HEADS, SIZE, seed=9)

    def plain(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = segment_attention(*operands, ids, chunk=0)
        return jnp.sum(probe * output), output

    def by_kernel(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = kernel(*operands, ids, ONE_DEVICE)
        return jnp.sum(probe * output), output

    found, wanted = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(*operands)
        for f in (by_kernel, plain)
    )
    assert_close(found, wanted, 3e-5)


@pytest.mark.parametrize("count", [2 * LENGTH, 4 * 131], ids=["halved", "odd"])
def test_devices_that_share_a_row_compute_all_of_it(count: int) -> None:
    """Each has two parts of the row, far from where they belong, if it can be halved."""
    layout = make_layout(MeshConfig(context=4))
    ids = 1 + (np.arange(count) >= count // 3).astype(np.int32)[None]
    operands = tuple(
        normal(1, count, heads, SIZE, seed=heads) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    probe = normal(1, count, HEADS, SIZE, seed=9)

    def share(query: jax.Array, *others: jax.Array) -> jax.Array:
        whole = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in others)
        return splash_attention(query, *whole, layout)

    kernel = layout.shard(share, (layout.tokens,) * 4, layout.tokens)

    def total(*operands: jax.Array, attend: Any, ids: Any, probe: Any) -> jax.Array:
        return jnp.sum(probe * attend(*operands, ids))

    placed = jax.device_put((operands, ids, probe), batch_sharding(layout))
    found = jax.jit(jax.value_and_grad(partial(total, attend=kernel), argnums=(0, 1, 2)))(
        *placed[0], ids=placed[1], probe=placed[2]
    )
    plain = partial(segment_attention, chunk=0)
    wanted = jax.jit(jax.value_and_grad(partial(total, attend=plain), argnums=(0, 1, 2)))(
        *operands, ids=ids, probe=probe
    )
    assert_close(jax.device_get(found), wanted, 3e-5)


@pytest.mark.parametrize("shards", [2, 3, 4])
def test_parts_are_dealt_so_that_all_devices_see_as_many_tokens(shards: int) -> None:
    parts = range(2 * shards)
    owned = [[p for p in parts if kernels._mirrored(p, len(parts)) == d] for d in range(shards)]
    assert [sum(own) for own in owned] == [2 * shards - 1] * shards
    # One even and one odd part each, so that all even ones can travel at once, and all odd ones.
    assert [sorted(p % 2 for p in own) for own in owned] == [[0, 1]] * shards


@pytest.mark.parametrize(
    ("count", "block"), [(8, 128), (384, 128), (640, 128), (768, 256), (1000, 512), (4095, 512)]
)
def test_blocks_are_large_where_that_pads_little(count: int, block: int) -> None:
    assert kernels._block(count) == block


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


@pytest.mark.usefixtures("cudnn_on_cpu")
@pytest.mark.parametrize(
    ("attention", "remat"),
    [
        ("splash", "none"),
        ("splash", "attention"),
        ("cudnn", "block"),
        ("blocked", "none"),
        ("blocked", "attention"),
    ],
)
@pytest.mark.parametrize(
    "mesh", [MeshConfig(), MeshConfig(expert=2, context=2, tensor=2)], ids=["one", "eight"]
)
def test_a_model_of_kernels_is_the_plain_model(
    mesh: MeshConfig, attention: Attention, remat: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside the model's shard_map, with rows that are split: values, every gradient leaf.

    What stands in padding is anything: by blocks it sees nothing, else it sees padding.
    """
    monkeypatch.setattr(kernels, "_obstacle", lambda *_: "")  # cuDNN's, which is not really called
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
    by_kernels = dataclasses.replace(plain, attention=attention, dispatch="megablox")
    assert_close(run(make_layout(mesh), by_kernels), run(make_layout(MeshConfig()), plain), 5e-5)


class Elsewhere(Layout):
    """A layout whose devices are of another kind."""

    platform: str = ""  # type: ignore[assignment]


def elsewhere(platform: str) -> Layout:
    layout = Elsewhere()
    object.__setattr__(layout, "platform", platform)
    return layout


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "length", "chosen"),
    [
        ("cpu", "bfloat16", 128, 256, "plain"),
        ("cpu", "bfloat16", 128, 257, "blocked"),
        ("tpu", "float32", 128, 8, "splash"),
        ("tpu", "bfloat16", 64, 8, "plain"),
        ("gpu", "bfloat16", 64, 8, "cudnn"),
        ("gpu", "float32", 128, 8, "plain"),
        ("gpu", "bfloat16", 256, 8, "plain"),
    ],
)
def test_auto_takes_a_kernel_where_there_is_one(
    platform: str, dtype: Any, head_dim: int, length: int, chosen: Attention
) -> None:
    layout, compute = elsewhere(platform), ComputeConfig(dtype=dtype)
    sizes = {"head_dim": head_dim, "length": length}
    assert choose_attention(compute, layout, **sizes) == chosen
    plain = dataclasses.replace(compute, attention="plain")
    assert choose_attention(plain, layout, **sizes) == "plain"


@pytest.mark.parametrize(
    ("platform", "choice", "message"),
    [
        ("gpu", {"attention": "splash"}, "attention is splash, a kernel for TPUs .* this is a gpu"),
        ("tpu", {"attention": "splash"}, "multiple of 128, and model.head_dim is 4; use auto, or"),
        ("tpu", {"attention": "cudnn"}, "attention is cudnn, a library for NVIDIA GPUs, .* a tpu"),
        ("gpu", {"attention": "cudnn"}, "learner.compute.dtype is float32; use auto, or plain"),
        (
            "gpu",
            {"attention": "cudnn", "dtype": "bfloat16"},
            "as wide as 8, 16, ... 128, and model.head_dim is 4",
        ),
        (
            "gpu",
            {"dispatch": "megablox"},
            "dispatch is megablox, a kernel for TPUs .* use auto, or",
        ),
        (
            "tpu",
            {"dispatch": "megablox"},
            "model.width is 128 and model.moe.expert_width 96; use auto, or ragged",
        ),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_by_name_before_anything_is_traced(
    platform: str, choice: dict[str, Any], message: str
) -> None:
    moe = dataclasses.replace(CONFIG.moe, expert_width=96)
    narrow = dataclasses.replace(CONFIG, head_dim=4, moe=moe)
    with pytest.raises(ValueError, match=message):
        make_forward(narrow, ComputeConfig(**choice), elsewhere(platform))
