"""Whole programs: FLOPs equal those counted by hand, loops and what XLA spreads included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxrl_llm.compile.chips import CHIPS
from jaxrl_llm.compile.costs import Cost, Traffic, program_cost
from jaxrl_llm.compile.hlo import parse
from jaxrl_llm.compile.programs import make_programs
from jaxrl_llm.model.config import ComputeConfig
from jaxrl_llm.sharding import MeshConfig, make_layout
from tests.compile.small import LENGTH, ROWS, forward_flops, on_mesh, training_flops

CHIP = CHIPS["v5e"]
RECORDED = Path(__file__).parent.parent / "recorded" / "tpu_v5e_scan.hlo"


def cost_of(text: str, devices: int = 1) -> Cost:
    return program_cost(parse(text), CHIP, devices)


def compiled_cost(function: Callable[..., Any], *arguments: Any, devices: int = 1) -> Cost:
    """Of a function compiled for the CPU."""
    step = function if hasattr(function, "lower") else jax.jit(function)
    return cost_of(step.lower(*arguments).compile().as_text(), devices)


def test_a_scanned_gradient_with_remat_costs_four_forward_passes() -> None:
    def loss(weights: jax.Array, x: jax.Array, *, remat: bool) -> jax.Array:
        def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            # The second product needs the first's result again for its gradient.
            return jnp.tanh(jnp.tanh(x @ weight) @ weight), None

        body = jax.checkpoint(layer, prevent_cse=False) if remat else layer
        return jnp.sum(jax.lax.scan(body, x, weights)[0] ** 2)

    weights, x = jnp.ones((5, 64, 64)), jnp.ones((32, 64))
    forward = 5 * 2 * (2 * 32 * 64 * 64)
    for remat, passes in ((False, 3), (True, 4)):
        step = jax.jit(jax.grad(lambda w, x, remat=remat: loss(w, x, remat=remat), (0, 1)))
        assert compiled_cost(step, weights, x).flops == passes * forward
    assert compiled_cost(lambda w, x: loss(w, x, remat=False), weights, x).flops == forward


def test_loops_in_loops_multiply_and_unknown_ones_count_once() -> None:
    def nested(x: jax.Array) -> jax.Array:
        inner = lambda x: jax.lax.fori_loop(0, 3, lambda _, x: x @ x, x)  # noqa: E731
        return jax.lax.fori_loop(2, 9, lambda _, x: inner(x), x)

    def until(x: jax.Array, count: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda _, x: x @ x, x)

    x, product = jnp.eye(16), 2 * 16**3
    cost = compiled_cost(nested, x)
    assert (cost.flops, cost.once) == (7 * 3 * product, frozenset())
    cost = compiled_cost(until, x, jnp.int32(4))
    assert cost.flops == product
    assert [name.rsplit("/", 1)[-1] for name in cost.once] == ["while"]


def test_of_a_branch_the_dearer_one_counts() -> None:
    def either(x: jax.Array, yes: jax.Array) -> jax.Array:
        return jax.lax.cond(yes, lambda x: x @ x @ x, lambda x: x + 1, x)

    # Computed on the device, so that the compiler cannot choose.
    assert compiled_cost(either, jnp.eye(16), jnp.bool_(True)).flops == 2 * 2 * 16**3


@pytest.mark.parametrize(
    ("remat", "keep_logits", "micro_batch_rows"), [("none", True, 0), ("block", False, 8)]
)
def test_the_steps_cost_what_a_hand_count_says(
    remat: str, keep_logits: bool, micro_batch_rows: int
) -> None:
    compute = ComputeConfig(
        dispatch="dense",
        remat=remat,  # type: ignore[arg-type]
        logprob_chunk=64,
        keep_logits=keep_logits,
    )
    config = on_mesh(MeshConfig(), compute, micro_batch_rows)
    mesh, tokens = make_layout(config.learner.mesh), ROWS * LENGTH
    train, score = make_programs(config, mesh, ("train", "score"))
    cost = compiled_cost(score.step, *score.arguments)
    assert cost.flops == sum(forward_flops(tokens).values())
    cost = compiled_cost(train.step, *train.arguments)
    # A metric is a product too: 3 layers x 8 numbers for every token.
    flops = training_flops(tokens, remat=remat == "block", keep_logits=keep_logits)
    assert cost.flops == pytest.approx(flops, rel=1e-4)
    assert not cost.once


def test_a_sharded_step_divides_its_flops_and_exchanges_its_parameters() -> None:
    compute = ComputeConfig(dispatch="dense", remat="block", logprob_chunk=64)
    config = on_mesh(MeshConfig(fsdp=4, tensor=2), compute, 2)
    mesh = make_layout(config.learner.mesh)
    (score,) = make_programs(config, mesh, ("score",))
    cost = compiled_cost(score.step, *score.arguments, devices=8)
    parts = forward_flops(ROWS * LENGTH // 4)
    for shared in parts.keys() - {"router"}:  # by two devices with the same tokens
        parts[shared] //= 2
    assert cost.flops == sum(parts.values())
    assert cost.collectives["all-gather"].count > 0
    assert cost.collectives["all-reduce"].count > 0


def test_collectives_are_counted_with_their_loops_sizes_and_groups() -> None:
    mesh = jax.make_mesh((4, 2), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)
    bytes_of_x = 8 * 128 * 4  # float32 on each device

    def body(x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            x = x + jax.lax.psum(x, "b")
            whole = jax.lax.all_gather(x, "a", tiled=True)
            x = x + jax.lax.psum_scatter(whole * 2, "a", tiled=True)
            return jax.lax.ppermute(x, "a", [(0, 1), (1, 2), (2, 3), (3, 0)]), None

        return jax.lax.scan(layer, x, None, length=5)[0]

    step = jax.shard_map(body, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(("a", "b")))
    cost = compiled_cost(step, jnp.ones((64, 128)), devices=8)
    quarters = 4 * bytes_of_x * 3 / 4  # what arrives from the three others of four
    assert cost.collectives == {
        "all-reduce": Traffic(5, 5 * bytes_of_x, 5 * bytes_of_x, 0),
        "all-gather": Traffic(5, 5 * 4 * bytes_of_x, 5 * quarters, 0),
        "reduce-scatter": Traffic(5, 5 * 4 * bytes_of_x, 5 * quarters, 0),
        "collective-permute": Traffic(5, 5 * bytes_of_x, 5 * bytes_of_x, 0),
    }


def test_a_recorded_tpu_program_is_read_as_it_was_written() -> None:
    """The gradient of five layers tanh(x[1024, 512] @ w[512, 512]) with remat, on 4 devices."""
    cost = cost_of(RECORDED.read_text(), devices=4)
    assert cost.flops == 4 * 5 * (2 * 256 * 512 * 512)
    matrix = 512 * 512 * 2
    gathered, reduced = cost.collectives["all-gather"], cost.collectives["all-reduce"]
    # Each layer's matrix is gathered for the forward pass and again for the gradient.
    assert (gathered.count, gathered.size) == (10, 10 * matrix)
    assert gathered.waited == 10 * matrix * 3 / 4
    # Its gradient is summed, and so is the loss.
    assert (reduced.count, reduced.size) == (6, 5 * matrix + 4)
    assert not cost.once
    assert cost.cycles > 0
    # Through HBM: shards of the matrices twice, x, and the gradient; the rest stays on the chip.
    assert cost.bytes == pytest.approx(2 * 5 * matrix / 4 + 256 * 512 * 2 + 5 * matrix, rel=1e-3)
    assert 0 < cost.rest < 1e-6  # little is left that the compiler gives no cycles


ASYNCHRONOUS = """
HloModule jit_f, is_scheduled=true, num_partitions=4

%begins (p.0: bf16[128,512]) -> (bf16[128,512], bf16[512,512], u32[]) {
  %p.0 = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[512,512]{1,0:T(8,128)(2,1)} all-gather(%p.0), channel_id=9, replica_groups={{0,1,2,3}}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %custom-call.1 = (bf16[128,512]{1,0}, bf16[512,512]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%goes_on (p.1: bf16[128,512], p.2: bf16[512,512], p.3: bf16[256,512]) -> (bf16[256,512], bf16[512,512]) {
  %p.1 = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(0)
  %p.2 = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %p.3 = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %all-gather.2 = bf16[512,512]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=9, replica_groups={{0,1,2,3}}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  %convolution.1 = bf16[256,512]{1,0:T(8,128)(2,1)} convolution(%p.3, %p.2), dim_labels=bf_io->bf
  ROOT %tuple.1 = (bf16[256,512]{1,0}, bf16[512,512]{1,0}) tuple(%convolution.1, %all-gather.2)
}

ENTRY %main (a.0: bf16[128,512], a.1: bf16[512,512], a.2: bf16[256,512]) -> bf16[256,512] {
  %a.0 = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(0)
  %a.1 = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %a.2 = bf16[256,512]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %fusion.1 = (bf16[128,512]{1,0}, bf16[512,512]{1,0:S(1)}, u32[]{:S(2)}) fusion(%a.0), kind=kCustom, calls=%begins
  %fusion.2 = (bf16[256,512]{1,0:S(1)}, bf16[512,512]{1,0:S(1)}) fusion(%a.0, %a.1, %a.2), kind=kCustom, calls=%goes_on, backend_config={"window_config":{"estimated_cycles":"1500"}}
  %collective-permute-start.1 = (bf16[256,512]{1,0:S(1)}, bf16[256,512]{1,0:S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a.2), channel_id=2, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %copy-start.1 = (bf16[512,512]{1,0:S(1)}, bf16[512,512]{1,0}, u32[]{:S(2)}) copy-start(%a.1)
  ROOT %collective-permute-done.1 = bf16[256,512]{1,0:S(1)} collective-permute-done(%collective-permute-start.1)
}
"""  # noqa: E501


def test_collectives_that_a_tpu_runs_beside_other_work_count_once() -> None:
    cost = cost_of(ASYNCHRONOUS, devices=4)
    matrix, rows = 512 * 512 * 2, 256 * 512 * 2
    assert cost.collectives == {
        "all-gather": Traffic(1, matrix, 0, matrix * 3 / 4),
        "collective-permute": Traffic(1, rows, 0, rows),
    }
    assert cost.flops == 2 * 256 * 512 * 512
    assert cost.cycles == 1500


def test_hbm_traffic_of_slices_and_updates_in_place_is_their_own() -> None:
    def add_at(big: jax.Array, small: jax.Array, index: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_index_in_dim(big, index, keepdims=True)
        return jax.lax.dynamic_update_index_in_dim(big, row * small, index + 1, 0)

    big, small = jnp.ones((1024, 256)), jnp.ones((1, 256))
    step = jax.jit(add_at, donate_argnums=0)
    cost = compiled_cost(step, big, small, jnp.int32(3))
    row = 256 * 4
    # It reads the row, the factor and the index, and writes the row; perhaps over two fusions.
    assert 3 * row <= cost.bytes <= 8 * row
    whole = compiled_cost(lambda x: x * 2 + 1, big)
    assert whole.bytes == 2 * 1024 * 256 * 4


def test_costs_add_and_multiply() -> None:
    one = Cost(1, 2, 3, 4, {"all-gather": Traffic(1, 10, 5, 0)}, frozenset({"a"}))
    other = Cost(10, 20, 30, 40, {"all-to-all": Traffic(1, 1, 1, 1)}, unknown=frozenset({"k"}))
    total = one.times(3) + other
    assert (total.flops, total.bytes, total.cycles, total.rest) == (13, 26, 39, 52)
    assert total.collectives["all-gather"] == Traffic(3, 30, 15, 0)
    assert total.collectives["all-to-all"] == Traffic(1, 1, 1, 1)
    assert (total.once, total.unknown) == (frozenset({"a"}), frozenset({"k"}))


SCATTERED = """
HloModule jit_f, is_scheduled=true, num_partitions=4

%all-reduce-scatter.1 (p.0: f32[256,512]) -> f32[64,512] {
  %p.0 = f32[256,512]{1,0:T(8,128)} parameter(0)
  %partition-id.1 = u32[]{:T(128)} partition-id()
  %all-reduce.1 = f32[256,512]{1,0:T(8,128)} all-reduce(%p.0), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %dynamic-slice.1 = f32[64,512]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %partition-id.1, %partition-id.1), dynamic_slice_sizes={64,512}
}

ENTRY %main (a.0: f32[256,512]) -> f32[64,512] {
  %a.0 = f32[256,512]{1,0:T(8,128)} parameter(0)
  ROOT %fusion.1 = f32[64,512]{1,0:T(8,128)} fusion(%a.0), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def test_a_sum_of_which_a_slice_is_kept_is_a_reduce_scatter() -> None:
    whole = 256 * 512 * 4
    collectives = cost_of(SCATTERED, devices=4).collectives
    assert collectives == {"reduce-scatter": Traffic(1, whole, whole * 3 / 4, 0)}


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,2},{1,3},{4,6},{5,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1':(1)2}", 2),
        ("{}", 8),
    ],
)
def test_groups_are_read_however_they_are_written(groups: str, size: int) -> None:
    text = (
        "ENTRY %main (a: f32[64]) -> f32[64] {\n  %a = f32[64]{0} parameter(0)\n"
        f"  ROOT %r = f32[64]{{0}} all-reduce(%a), replica_groups={groups}, to_apply=%add\n}}"
    )
    received = cost_of(text, devices=8).collectives["all-reduce"].waited
    assert received == pytest.approx(2 * 256 * (size - 1) / size)
