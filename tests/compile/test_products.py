"""FLOPs of single products, as the CPU and as a TPU write them, against XLA's own count."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm.compile.hlo import parse
from jaxrl_llm.compile.products import is_unknown_kernel, product_flops


def flops_of(text: str) -> int:
    return sum(
        product_flops(computation, instruction)
        for computation in parse(text).computations.values()
        for instruction in computation.instructions.values()
    )


@pytest.mark.parametrize(
    ("formula", "left", "right", "flops"),
    [
        ("ij,jk->ik", (3, 5), (5, 7), 2 * 3 * 5 * 7),
        ("bij,bjk->bik", (4, 3, 5), (4, 5, 7), 2 * 4 * 3 * 5 * 7),
        ("bkrp,bksp->bkrs", (2, 3, 5, 7), (2, 3, 11, 7), 2 * 2 * 3 * 5 * 11 * 7),
        ("abi,abj->ij", (4, 3, 5), (4, 3, 7), 2 * 4 * 3 * 5 * 7),
    ],
)
def test_a_dot_multiplies_all_of_one_with_all_of_the_other(
    formula: str, left: tuple[int, ...], right: tuple[int, ...], flops: int
) -> None:
    step = jax.jit(lambda x, y: jnp.einsum(formula, x, y))
    text = step.lower(jnp.ones(left), jnp.ones(right)).compile().as_text()
    assert flops_of(text) == flops


CONVOLUTION = """
ENTRY %main (a: {left}, b: {right}) -> {result} {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %convolution.1 = {result} convolution(%a, %b), {attributes}
}}
"""


@pytest.mark.parametrize(
    ("left", "right", "result", "attributes", "flops"),
    [
        # Written by the TPU compiler for a plain product, for grouped-query attention with 4 rows
        # and 2 heads (scores [128, 64] x [64, 256]), for projections to heads, and for one of a
        # batch that is summed over.
        (
            "bf16[256,512]{1,0:T(8,128)(2,1)S(1)}",
            "bf16[512,512]{1,0:T(8,128)(2,1)}",
            "bf16[256,512]{1,0:T(8,128)(2,1)}",
            "dim_labels=bf_io->bf",
            2 * 256 * 512 * 512,
        ),
        (
            "bf16[4,2,128,64]{3,2,1,0}",
            "bf16[4,2,256,64]{3,2,1,0}",
            "f32[4,2,128,256]{3,2,1,0:T(8,128)}",
            "window={size=4x2 stride=3x1 lhs_dilate=4x2}, dim_labels=01bf_01oi->01bf",
            2 * 4 * 2 * 128 * 64 * 256,
        ),
        (
            "bf16[4,256,256,1]{2,1,0,3}",
            "bf16[2,64,256,1]{2,1,0,3}",
            "bf16[4,256,2,64]{1,3,2,0:T(8,128)(2,1)S(1)}",
            "window={size=1x2 pad=0_0x1_1 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f",
            2 * 4 * 256 * 256 * 2 * 64,
        ),
        (
            "f32[4,128,256]{2,1,0}",
            "f32[4,256,8]{2,1,0}",
            "f32[128,8,1]{0,1,2:T(8,128)}",
            "window={size=4}, dim_labels=0bf_0io->bf0",
            2 * 4 * 128 * 256 * 8,
        ),
    ],
)
def test_a_tpu_writes_products_as_convolutions(
    left: str, right: str, result: str, attributes: str, flops: int
) -> None:
    text = CONVOLUTION.format(left=left, right=right, result=result, attributes=attributes)
    assert flops_of(text) == flops


@pytest.mark.parametrize(
    "settings",
    [
        {"window_strides": (1, 1), "padding": "VALID"},
        {"window_strides": (2, 1), "padding": ((1, 2), (0, 3))},
        {"window_strides": (1, 2), "padding": ((2, 2), (1, 0)), "lhs_dilation": (2, 3)},
        {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 3)},
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
    ],
)
def test_a_convolution_agrees_with_the_count_of_xla(settings: dict[str, Any]) -> None:
    groups = settings.get("feature_group_count", 1)
    left, right = jnp.ones((3, 4, 9, 8)), jnp.ones((6, 4 // groups, 3, 2))
    step = jax.jit(lambda x, y: jax.lax.conv_general_dilated(x, y, **settings))
    compiled = step.lower(left, right).compile()
    assert flops_of(compiled.as_text()) == compiled.cost_analysis()["flops"]


KERNEL = """
ENTRY %main (a: s32[5], b: bf16[2048,256], c: bf16[4,256,128]) -> bf16[2048,128] {{
  %a = s32[5]{{0:T(128)}} parameter(0)
  %b = bf16[2048,256]{{1,0:T(8,128)(2,1)}} parameter(1)
  %c = bf16[4,256,128]{{2,1,0:T(8,128)(2,1)}} parameter(2)
  ROOT %ragged-dot-none.1 = bf16[2048,128]{{1,0:T(8,128)(2,1)S(1)}} custom-call(%a, %b, %c), custom_call_target="tpu_custom_call", backend_config={{"custom_call_config":{{"body":"TUzvUg",{estimate}"needs_layout_passes":true}}}}
}}
"""  # noqa: E501


def test_a_kernel_says_itself_what_it_costs_or_is_unknown() -> None:
    estimate = '"cost_estimate":{"flops":"134217728","bytes_accessed":"1835024"},'
    assert flops_of(KERNEL.format(estimate=estimate)) == 2 * 2048 * 256 * 128
    assert flops_of(KERNEL.format(estimate="")) == 0
    for text, unknown in ((estimate, False), ("", True)):
        root = parse(KERNEL.format(estimate=text)).computations["main"].root
        assert is_unknown_kernel(root) is unknown


SOFTMAX = """
ENTRY %main (a: f32[2,2,256,128], b: f32[2,2,128,64]) -> f32[2,2,256,64] {
  %a = f32[2,2,256,128]{3,2,1,0:T(8,128)} parameter(0)
  %b = f32[2,2,128,64]{3,2,1,0:T(8,128)} parameter(1)
  ROOT %online-softmax = f32[2,2,256,64]{3,2,1,0:T(8,128)S(1)} custom-call(%a, %b), custom_call_target="tpu_custom_call", metadata={op_name="online-softmax"}, backend_config={"custom_call_config":{"body":"TUzvUg"}}
}
"""  # noqa: E501


def test_the_compilers_own_softmax_kernel_multiplies_shares_with_values() -> None:
    assert flops_of(SOFTMAX) == 2 * (2 * 2 * 256 * 128) * 64
    assert not is_unknown_kernel(parse(SOFTMAX).computations["main"].root)


SPLASH = """
ENTRY %main (a: s8[1,{rows},4], b: bf16[2,4,{queries},128], c: bf16[2,2,2048,128]) -> bf16[2,4,{queries},128] {{
  %a = s8[1,{rows},4]{{2,1,0}} parameter(0)
  %b = bf16[2,4,{queries},128]{{3,2,1,0:T(8,128)(2,1)}} parameter(1)
  %c = bf16[2,2,2048,128]{{3,2,1,0:T(8,128)(2,1)}} parameter(2)
  ROOT %splash_mha.1 = bf16[2,4,{queries},128]{{3,2,1,0:T(8,128)(2,1)}} custom-call(%a, %a, %b, %c, %c), custom_call_target="tpu_custom_call", metadata={{op_name="jit(train)/splash_mha_{phase}_residuals/pallas_call"}}, backend_config={{"custom_call_config":{{"body":"TUzvUg"}}}}
}}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("queries", "blocks"),
    [
        (2048, 1 + 2 + 3 + 4),
        (512, (1 + 2 + 3 + 4) / 4),  # of a device that has an early and a late part of this size
    ],
)
def test_splash_attention_multiplies_in_the_blocks_that_the_causal_mask_leaves(
    queries: int, blocks: float
) -> None:
    product = 2 * (2 * 4) * 128 * (blocks * 512 * 512)
    for phase, products in (("fwd_segmented", 2), ("dq_segmented_no", 3), ("dkv_segmented_no", 4)):
        text = SPLASH.format(rows=queries // 512, queries=queries, phase=phase)
        assert flops_of(text) == products * product
        assert not is_unknown_kernel(parse(text).computations["main"].root)
