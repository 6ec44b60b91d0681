"""Shared by all tests: eight fake CPU devices, set before JAX starts, to test sharding anywhere."""

import os

# Enough threads for the collectives of eight devices; see sharding.make_layout, which is too late
# where a test has used JAX before.
os.environ.setdefault("PJRT_NPROC", "256")

# The tests need libtpu for its compiler; with it installed, JAX would look for chips and complain.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
# With JAX_COMPILATION_CACHE_DIR set, small programs are kept as well: the tests have many of them.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
