"""A plugin of sglang 0.5.23 that completes its CPU device for reinforcement learning.

sglang loads it in each of its processes through the entry point in pyproject.toml. It changes two
things and touches no numerics:

- Routes. Their host buffer is page-locked through CUDA on every device that has no allocator of its
  own; a CPU needs plain memory.
- Seeds. Only --enable-deterministic-inference makes the server obey a request's seed, and it takes
  a fixed list of attention backends and replaces operators by accelerator kernels. Here the backend
  torch_native joins the list and the operators stay. What remains is sampling with seeds; that a
  token's log-probability is the same bits in every batch, the mode's other promise, is not kept.
"""

import torch


def activate():
    """Called by sglang before it reads its arguments."""
    from sglang.srt import batch_invariant_ops
    from sglang.srt.arg_groups import choices
    from sglang.srt.mem_cache.pool_host import common

    common.ALLOC_MEMORY_FUNCS["cpu"] = _plain_memory
    batch_invariant_ops.enable_batch_invariant_mode = _keep_operators
    for backends in (
        choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES,
        choices.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND,
    ):
        backends.append("torch_native")


def _plain_memory(dims, dtype, device, pin_memory, allocator, registration_granularity_bytes=None):
    """An allocator as sglang calls it; what it is told about page locking does not apply."""
    return torch.empty(dims, dtype=dtype, device=device)


def _keep_operators():
    """In place of enable_batch_invariant_mode."""
