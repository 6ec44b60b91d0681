"""Stands in for sgl_kernel on a CPU: the two functions of it that sglang 0.5.23 calls there.

What it is: sglang's compiled kernels have no wheel for an x86-64 CPU without AMX. A text model that
is served there without speculative decoding needs one of them to keep its table of cache slots and
one to sample with seeds; both are written here with torch and numpy. What it is not: fast, or a
stand-in on any other device. Names that sglang merely imports are here too and fail when called.
"""

import numpy as np
import torch

__version__ = "0.0.0+stand.in"  # sglang logs it


def assign_req_to_token_pool_cpu(requests, table, starts, ends, slots, _row_length):
    """Write into `table`, i32[requests, row_length], where the cache holds each request's tokens.

    Request requests[i] gets slots for its tokens starts[i] to ends[i]; `slots` holds those of all
    requests, one request after the other.
    """
    counts = (ends - starts).tolist()
    rows = zip(requests.tolist(), starts.tolist(), slots.split(counts), strict=True)
    for row, start, own in rows:
        table[row, start : start + own.numel()] = own.to(table.dtype)


def murmur_hash32_cpu(seed, positions, columns):
    """MurmurHash3 of (seed, position, column): the noise of sampling with a seed, u32[N, V].

    The same numbers as sglang/kernels/ops/sampling/murmur_hash.py computes on a GPU: four blocks of
    32 bits, the seed being two of them.

    Args:
      seed: u64[N], one for each request.
      positions: int[N], each request's position.
      columns: int[V], the token ids.
    """
    seed = seed.numpy().astype(np.uint64)
    low, high = seed & np.uint64(0xFFFFFFFF), seed >> np.uint64(32)
    blocks = (low, high, positions.numpy(), columns.numpy())
    low, high, position, column = (block.astype(np.uint32) for block in blocks)
    state = np.zeros_like(low)
    for block in (low, high, position):
        state = _mix(state, block)
    state = _mix(state[:, None], column[None, :]) ^ np.uint32(16)  # 16 bytes were hashed
    state = (state ^ (state >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    state = (state ^ (state >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return torch.from_numpy(state ^ (state >> np.uint32(16)))


def _mix(state, block):
    """One block into the state; products of uint32 arrays are taken modulo 2^32."""
    block = _rotate(block * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
    return _rotate(state ^ block, 13) * np.uint32(5) + np.uint32(0xE6546B64)


def _rotate(bits, by):
    return (bits << np.uint32(by)) | (bits >> np.uint32(32 - by))


def _only_imported(name):
    """Belongs to speculative decoding, or to an engine that needs AMX."""

    def call(*_arguments):
        raise NotImplementedError(f"sgl_kernel.{name} is not written for this CPU")

    return call


copy_all_layer_kv_cache_cpu = _only_imported("copy_all_layer_kv_cache_cpu")
fill_accept_out_cache_loc_cpu = _only_imported("fill_accept_out_cache_loc_cpu")
fill_bonus_tokens_cpu = _only_imported("fill_bonus_tokens_cpu")
assign_draft_cache_locs_contiguous_cpu = _only_imported("assign_draft_cache_locs_contiguous_cpu")
assign_extend_cache_locs_cpu = _only_imported("assign_extend_cache_locs_cpu")
build_tree_kernel_efficient_cpu = _only_imported("build_tree_kernel_efficient_cpu")
verify_tree_greedy_cpu = _only_imported("verify_tree_greedy_cpu")

# sglang calls the hash as an operator of torch. The library must outlive this line.
_library = torch.library.Library("sgl_kernel", "DEF")
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor columns) -> Tensor")
_library.impl("murmur_hash32_cpu", murmur_hash32_cpu, "CPU")
