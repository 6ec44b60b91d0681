"""Shared by all tests: eight fake CPU devices, set before JAX starts, to test sharding anywhere."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
