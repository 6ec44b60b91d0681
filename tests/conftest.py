"""Shared by all tests: eight fake CPU devices, set before JAX starts, to test sharding anywhere."""

import os

# Eight devices on two busy cores may reach a collective minutes apart; after one, XLA would abort.
_PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=500"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_PATIENT}"

# The tests need libtpu for its compiler; with it installed, JAX would look for chips and complain.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402  (reads XLA_FLAGS)

jax.config.update("jax_num_cpu_devices", 8)
# With JAX_COMPILATION_CACHE_DIR set, small programs are kept as well: the tests have many of them.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
