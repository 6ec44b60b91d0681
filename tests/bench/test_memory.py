"""Bytes of this very process and of its arrays."""

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.bench import memory


def test_the_peak_of_what_came_after_the_reset() -> None:
    size = 2**28
    np.ones(size, np.uint8)  # a peak of before
    assert memory.reset_peak()
    before = memory.resident_bytes()
    assert memory.peak_resident_bytes() < before + size // 4
    np.ones(size, np.uint8)
    assert memory.peak_resident_bytes() >= before + size // 2
    assert memory.resident_bytes() < before + size // 4


def test_a_buffer_that_two_arrays_share_counts_once() -> None:
    before = memory.array_bytes()
    array = jnp.arange(1000, dtype=jnp.float32)
    assert memory.array_bytes() == before + 4000
    shared = array.addressable_data(0)  # another array of the same buffer
    assert shared is not array
    assert memory.array_bytes() == before + 4000
    own = jnp.copy(array)
    assert memory.array_bytes() == before + 8000
    del array, shared, own
    assert memory.array_bytes() == before
