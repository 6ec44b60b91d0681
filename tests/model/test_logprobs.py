"""Chunked log-probabilities against the full float64 softmax, in values, gradients and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.model.logprobs import token_logprobs
from tests.model.tiny import array_shapes
from tests.reference.model import softmax

ROWS, LENGTH, WIDTH, VOCABULARY = 3, 10, 5, 17


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    hidden = random.standard_normal((ROWS, LENGTH, WIDTH)).astype(np.float32)
    unembed = 2 * random.standard_normal((WIDTH, VOCABULARY)).astype(np.float32)
    return hidden, unembed, random.integers(0, VOCABULARY, (ROWS, LENGTH), np.int32)


def reference(temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """logprobs, entropy, and the gradients of their sum with respect to hidden and unembed."""
    hidden, unembed, targets = inputs()
    shares = softmax(hidden.astype(np.float64) @ unembed / temperature)
    logs = np.log(shares)
    entropy = -np.sum(shares * logs, -1)
    hot = np.eye(VOCABULARY)[targets]
    to_logits = (hot - shares - shares * (logs + entropy[..., None])) / temperature
    to_unembed = np.einsum("bsd,bsv->dv", hidden, to_logits)
    return np.sum(hot * logs, -1), entropy, to_logits @ unembed.T, to_unembed


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 5, 64])
def test_values_and_gradients_equal_the_full_softmax(chunk: int, keep: bool) -> None:
    hidden, unembed, targets = inputs()
    logprobs, entropy, to_hidden, to_unembed = reference(0.7)

    def total(hidden: jax.Array, unembed: jax.Array) -> tuple[jax.Array, tuple]:
        outputs = token_logprobs(hidden, unembed, targets, temperature=0.7, chunk=chunk, keep=keep)
        return sum(jnp.sum(output) for output in outputs), outputs

    gradients, outputs = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(hidden, unembed)
    np.testing.assert_allclose(outputs[0], logprobs, atol=1e-5)
    np.testing.assert_allclose(outputs[1], entropy, atol=1e-5)
    np.testing.assert_allclose(gradients[0], to_hidden, atol=1e-4)
    np.testing.assert_allclose(gradients[1], to_unembed, atol=1e-4)


@pytest.mark.parametrize(("keep", "chunks", "products"), [(False, 1, 4), (True, 3, 3)])
def test_logits_of_all_positions_exist_only_if_kept_and_are_not_computed_again_then(
    keep: bool, chunks: int, products: int
) -> None:
    hidden, unembed, targets = inputs()

    def total(hidden: jax.Array, unembed: jax.Array) -> jax.Array:
        found = token_logprobs(hidden, unembed, targets, temperature=1.0, chunk=4, keep=keep)
        return sum(jnp.sum(output) for output in found)

    program = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(hidden, unembed)
    largest = max(int(np.prod(s)) for s in array_shapes(program) if VOCABULARY in s)
    assert largest == chunks * ROWS * 4 * VOCABULARY
    assert str(program).count("dot_general") == products


def test_extreme_logits_give_certain_tokens_and_no_nan() -> None:
    hidden = np.full((1, 2, 1), 1e4, np.float32)
    unembed = np.array([[1.0, -1.0]], np.float32)
    targets = np.array([[0, 1]], np.int32)
    logprobs, entropy = token_logprobs(hidden, unembed, targets, temperature=1.0, chunk=1)
    np.testing.assert_array_equal(logprobs, [[0.0, -2e4]])
    np.testing.assert_array_equal(entropy, [[0.0, 0.0]])


def test_hidden_states_in_bfloat16_meet_16_bits_of_the_head() -> None:
    hidden, unembed, targets = inputs()
    hidden = jnp.asarray(hidden, jnp.bfloat16)

    def total(hidden: jax.Array, unembed: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = token_logprobs(hidden, unembed, targets, temperature=1.0, chunk=64)[0]
        return jnp.sum(found), found

    both = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))
    gradients, low = both(hidden, unembed)
    wanted, high = both(hidden.astype(jnp.float32), unembed)
    _, rounded = both(hidden.astype(jnp.float32), unembed.astype(jnp.bfloat16).astype(jnp.float32))
    assert low.dtype == jnp.float32
    error, of_bfloat16 = (np.abs(found - high).max() for found in (low, rounded))
    assert error < 5e-5
    assert error < of_bfloat16 / 100
    # The gradients are rounded to bfloat16, which has 8 bits.
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, jnp.float32]
    for found, exact in zip(gradients, wanted, strict=True):
        difference = np.abs(found.astype(jnp.float32) - exact).max()
        assert 0 < difference < 2**-7 * np.abs(exact).max()


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(*inputs(), temperature=temperature, chunk=4)
