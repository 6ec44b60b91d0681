"""The common layers against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.model import layers
from tests.model.tiny import assert_close
from tests.reference import model as reference


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_rms_norm_equals_the_reference() -> None:
    x, scale = normal(3, 5, 8) * 10, normal(8, seed=1)
    wanted = reference.rms_norm(x.astype(np.float64), scale, 1e-2)
    np.testing.assert_allclose(layers.rms_norm(x, scale, 1e-2), wanted, rtol=1e-5)


def test_rms_norm_of_bfloat16_is_computed_in_float32() -> None:
    x = jnp.asarray(normal(4, 512), jnp.bfloat16)
    normed = layers.rms_norm(x, jnp.ones(512), 1e-6)
    wanted = reference.rms_norm(np.asarray(x, np.float64), np.ones(512), 1e-6)
    assert normed.dtype == jnp.bfloat16
    # Half a unit in the last place of a bfloat16, so rounded once and not on the way.
    np.testing.assert_allclose(np.asarray(normed, np.float64), wanted, rtol=2.0**-8)


def test_the_gradient_of_rms_norm_is_that_of_its_definition() -> None:
    x, scale, probe = normal(3, 5, 8) * 10, normal(8, seed=1), normal(3, 5, 8, seed=2)

    def plain(x: jax.Array, scale: jax.Array) -> jax.Array:
        mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return jnp.sum(probe * x / jnp.sqrt(mean + 1e-2) * scale)

    def ours(x: jax.Array, scale: jax.Array) -> jax.Array:
        return jnp.sum(probe * layers.rms_norm(x, scale, 1e-2))

    found, wanted = (jax.jit(jax.grad(f, argnums=(0, 1)))(x, scale) for f in (ours, plain))
    assert_close(found, wanted, 1e-5)


@pytest.mark.parametrize("rows", [3, 150])
def test_the_gradients_of_a_linear_layer_are_the_products_that_they_should_be(rows: int) -> None:
    x, matrix, probe = normal(rows, 2, 8), normal(8, 5, seed=1), normal(rows, 2, 5, seed=2)
    found = jax.jit(jax.grad(lambda *factors: jnp.sum(probe * layers.linear(*factors)), (0, 1)))
    wanted = probe @ matrix.T, np.einsum("bsi,bso->io", x, probe)
    assert_close(found(x, matrix), wanted, 1e-5)


def test_rotation_equals_the_reference_and_is_one() -> None:
    heads, positions = normal(2, 3, 2, 8), np.array([[0, 1, 7], [4000, 2, 30000]], np.int32)
    rotated = layers.rotate(heads, layers.rotary_table(positions, 8, 1e4))
    for index in np.ndindex(2, 3, 2):
        wanted = reference.rotate(heads[index].astype(np.float64), positions[index[:2]], 1e4)
        # The angle itself is a float32: 30,000 radians are known to about 1e-3.
        np.testing.assert_allclose(rotated[index], wanted, atol=5e-3)
    np.testing.assert_array_equal(rotated[0, 0], heads[0, 0])
    np.testing.assert_allclose(
        np.linalg.norm(rotated, axis=-1), np.linalg.norm(heads, axis=-1), rtol=1e-5
    )


def test_map_chunks_joins_outputs_of_any_rank() -> None:
    x = normal(2, 7, 3)
    both = jax.jit(lambda x: layers.map_chunks(lambda y: (2 * y, y.sum(-1)), (x,), chunk=3))
    doubled, sums = both(x)
    np.testing.assert_array_equal(doubled, 2 * x)
    np.testing.assert_allclose(sums, x.sum(-1), rtol=1e-6)
