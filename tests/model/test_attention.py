"""Attention against float64 numpy; attention by blocks against the plain one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.model.attention import (
    BLOCK,
    _places,
    attend,
    blocked_attention,
    segment_attention,
)
from tests.model.tiny import array_shapes, assert_close
from tests.reference import model as reference


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_grouped_attention_equals_a_loop_over_heads() -> None:
    query, key, value = normal(2, 3, 6, 4), normal(2, 5, 2, 4, seed=1), normal(2, 5, 2, 4, seed=2)
    visible = np.random.default_rng(3).random((2, 3, 5)) < 0.5
    visible[..., 0] = True
    output = jax.jit(attend)(query, key, value, visible)
    for b, q, h in np.ndindex(2, 3, 6):
        scores = key[b, :, h // 3].astype(np.float64) @ query[b, q, h] / 2
        shares = reference.softmax(np.where(visible[b, q], scores, -np.inf))
        np.testing.assert_allclose(output[b, q, h], shares @ value[b, :, h // 3], rtol=1e-4)


def test_a_query_that_sees_nothing_is_finite() -> None:
    visible = np.zeros((1, 2, 2), bool)
    gradient_of = jax.jit(jax.value_and_grad(lambda q: jnp.sum(attend(q, q, q, visible))))
    output, gradient = gradient_of(normal(1, 2, 1, 4))
    assert np.isfinite(output)
    assert np.all(np.isfinite(gradient))


def test_chunks_of_queries_change_neither_value_nor_gradient() -> None:
    arrays = normal(2, 7, 4, 4), normal(2, 7, 2, 4, seed=1), normal(2, 7, 2, 4, seed=2)
    segment_ids = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    probe = normal(2, 7, 4, 4, seed=3)

    def total(chunk: int, *qkv: jax.Array) -> jax.Array:
        return jnp.sum(probe * segment_attention(*qkv, segment_ids, chunk=chunk))

    gradient = jax.jit(jax.value_and_grad(total, argnums=(1, 2, 3)), static_argnums=0)
    assert_close(gradient(3, *arrays), gradient(0, *arrays), 1e-5)
    np.testing.assert_array_equal(gradient(7, *arrays)[0], gradient(0, *arrays)[0])


LENGTH = 2 * BLOCK + 90
HEADS, KV_HEADS, SIZE = 4, 2, 8
SEGMENTS = {
    "one": (LENGTH,),
    "several": (40, 300, 310, LENGTH - 100),
    "block by block": (BLOCK, 2 * BLOCK, LENGTH),
    "padding alone": (0,),
}
"""Where the segments of a row end; what follows is padding."""


def segment_ids(*ends: int, length: int = LENGTH) -> np.ndarray:
    """i32[length]: 1, 2, ... up to these places, then 0."""
    place = np.arange(length)
    ids = 1 + np.searchsorted(ends, place, side="right")
    return np.where(place < ends[-1], ids, 0).astype(np.int32)


def gradients(attention: Any, *operands: np.ndarray, ids: np.ndarray, probe: np.ndarray) -> Any:
    """The output at tokens that are no padding, and the gradients of its product with probe."""
    real = (ids > 0)[:, :, None, None]

    def total(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
        output = jnp.where(real, attention(*operands, ids), 0)
        return jnp.sum(probe * output), output

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(*operands)


def operands(rows: int, dtype: Any = np.float32) -> tuple[np.ndarray, ...]:
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return tuple(normal(rows, LENGTH, h, SIZE, seed=i).astype(dtype) for i, h in enumerate(heads))


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_attention_by_blocks_is_attention(dtype: Any, tolerance: float) -> None:
    """Of rows packed in different ways, in values and gradients."""
    ids = np.stack([segment_ids(*ends) for ends in SEGMENTS.values()])
    probe = normal(len(ids), LENGTH, HEADS, SIZE, seed=9)
    wide = operands(len(ids), dtype)
    exact = tuple(np.asarray(x, np.float32) for x in wide)

    def plain(*arguments: Any) -> jax.Array:
        return segment_attention(*arguments, chunk=0)

    found = gradients(blocked_attention, *wide, ids=ids, probe=probe)
    wanted = gradients(plain, *exact, ids=ids, probe=probe)
    assert {x.dtype for x in jax.tree.leaves(found[1])} == {np.dtype(dtype)}
    assert_close(jax.tree.map(lambda x: np.asarray(x, np.float32), found), wanted, tolerance)


def test_by_blocks_padding_sees_nothing_and_gets_zeros() -> None:
    ids = np.stack([segment_ids(100), segment_ids(0)])
    output = jax.jit(blocked_attention)(*operands(2), ids)
    np.testing.assert_array_equal(np.asarray(output)[ids == 0], 0)
    assert np.all(np.any(np.asarray(output)[ids > 0], axis=(1, 2)))


@pytest.mark.parametrize("first", [0, 130, BLOCK])
def test_some_queries_of_a_row_see_all_keys_before_them(first: int) -> None:
    """As on a device that has a share of the row's positions."""
    query, key, value = operands(1)
    ids, part = segment_ids(90, LENGTH)[None], slice(first, first + 300)
    whole = segment_attention(query, key, value, ids, chunk=0)
    found = jax.jit(blocked_attention)(query[:, part], key, value, ids, first)
    np.testing.assert_allclose(found, whole[:, part], atol=1e-5)


@pytest.mark.parametrize(
    ("ends", "pairs"),
    [
        ((4 * BLOCK,), 1 + 2 + 3 + 4),
        ((BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK), 4),
        ((2 * BLOCK, 4 * BLOCK), 2 * (1 + 2)),
        ((2 * BLOCK,), 1 + 2),
        ((BLOCK + 1, 2 * BLOCK), 1 + 2),
        ((0,), 0),
    ],
    ids=["one segment", "four", "two", "half padding", "across a border", "padding"],
)
def test_only_blocks_with_something_to_see_are_computed(ends: tuple[int, ...], pairs: int) -> None:
    ids = segment_ids(*ends, length=4 * BLOCK)[None]
    places = _places(ids, ids, 0)
    assert int(np.sum(places.end - places.start)) == pairs


def test_by_blocks_scores_of_a_row_never_exist() -> None:
    """Neither in the gradient: the largest array has those of a block with another."""
    ids = segment_ids(LENGTH)[None]

    def total(*operands: jax.Array) -> jax.Array:
        return jnp.sum(blocked_attention(*operands, ids))

    program = jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(*operands(1))
    largest = max(int(np.prod(shape)) for shape in array_shapes(program))
    assert largest == HEADS * BLOCK**2
