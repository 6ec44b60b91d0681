"""Shared by all tests: eight fake CPU devices, set before JAX starts, to test sharding anywhere."""

import os

# Enough threads for the collectives of eight devices; see sharding.make_layout, which is too late
# where a test has used JAX before.
os.environ.setdefault("PJRT_NPROC", "256")

# The tests need libtpu for its compiler; with it installed, JAX would look for chips and complain.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_num_cpu_devices", 8)
# Most of the tests' time is compilation, which these halve; what they end is the tuning of loops.
FLAGS = ["--xla_backend_optimization_level=0"]
if jax.__version_info__[:2] == (0, 10):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # XLA does not start with one it lacks
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
# With JAX_COMPILATION_CACHE_DIR set, small programs are kept as well: the tests have many of them.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@pytest.fixture(autouse=True, scope="module")
def kept_programs() -> None:
    """Each file begins with the compilation cache, which make_layout ends for several devices."""
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
