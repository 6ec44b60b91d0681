"""The text of compiled programs becomes values; how often loops run is found or not claimed."""

import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm.compile.hlo import Program, Shape, parse, trip_count

LOOP = """
HloModule jit_f, is_scheduled=true

%body (p.0: (s32[], bf16[4,8], s32[])) -> (s32[], bf16[4,8], s32[]) {{
  %p.0 = (s32[]{{:T(128)}}, bf16[4,8]{{1,0:T(8,128)(2,1)S(1)}}, s32[]{{:T(128)}}) parameter(0)
  %get-tuple-element.1 = s32[]{{:T(128)}} get-tuple-element(%p.0), index=0
  %copy.1 = s32[]{{:T(128)S(6)}} copy(%get-tuple-element.1)
  %constant.1 = s32[]{{:T(128)}} constant({step})
  %add.1 = s32[]{{:T(128)}} add(%copy.1, %constant.1)
  %get-tuple-element.2 = bf16[4,8]{{1,0:T(8,128)(2,1)S(1)}} get-tuple-element(%p.0), index=1
  %get-tuple-element.3 = s32[]{{:T(128)}} get-tuple-element(%p.0), index=2
  ROOT %tuple.1 = (s32[], bf16[4,8], s32[]) tuple(%add.1, %get-tuple-element.2, %get-tuple-element.3)
}}

%condition (p.1: (s32[], bf16[4,8], s32[])) -> pred[] {{
  %p.1 = (s32[]{{:T(128)}}, bf16[4,8]{{1,0:T(8,128)(2,1)S(1)}}, s32[]{{:T(128)}}) parameter(0)
  %get-tuple-element.4 = s32[]{{:T(128)}} get-tuple-element(%p.1), index=0
  %get-tuple-element.5 = s32[]{{:T(128)}} get-tuple-element(%p.1), index=2
  %constant.2 = s32[]{{:T(128)}} constant(48)
  ROOT %lt.1 = pred[]{{:T(512)}} compare(%get-tuple-element.4, %{limit}), direction={direction}
}}

ENTRY %main.1 (a.0: bf16[4,8], a.1: s32[]) -> bf16[4,8] {{
  %a.0 = bf16[4,8]{{1,0:T(8,128)(2,1)}} parameter(0)
  %a.1 = s32[]{{:T(128)}} parameter(1)
  %constant.3 = s32[]{{:T(128)}} constant(0)
  %copy.2 = s32[]{{:T(128)}} copy(%constant.3)
  %tuple.2 = (s32[], bf16[4,8], /*index=2*/s32[]) tuple(%{start}, %a.0, %a.1)
  %while.1 = (s32[], bf16[4,8], s32[]) while(%tuple.2), condition=%condition, body=%body, metadata={{op_name="jit(f)/while"}}
  ROOT %get-tuple-element.6 = bf16[4,8]{{1,0:T(8,128)(2,1)}} get-tuple-element(%while.1), index=1
}}
"""  # noqa: E501


def loops(program: Program) -> list[tuple[str, int | None]]:
    """Origin and count of every loop."""
    return [
        (instruction.origin, trip_count(program, computation, instruction))
        for computation in program.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "while"
    ]


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({}, 48),
        ({"step": "5"}, 10),  # 0, 5, ..., 45
        ({"step": "-1"}, None),
        ({"start": "a.1"}, None),  # an argument
        ({"limit": "get-tuple-element.5"}, None),  # an argument
        ({"direction": "GT"}, None),
    ],
)
def test_the_count_of_a_tpu_loop_is_read_or_unknown(
    change: dict[str, str], count: int | None
) -> None:
    values = {"step": "1", "start": "copy.2", "limit": "constant.2", "direction": "LT"} | change
    assert loops(parse(LOOP.format(**values))) == [("jit(f)/while", count)]


def test_counts_of_the_cpu_compiler_are_its_own() -> None:
    def f(x: jax.Array, count: jax.Array) -> jax.Array:
        x = jax.lax.scan(lambda x, _: (jnp.sin(x), None), x, None, length=17)[0]
        return jax.lax.fori_loop(0, count, lambda _, x: jnp.cos(x), x)

    text = jax.jit(f).lower(jnp.ones(9), jnp.int32(3)).compile().as_text()
    assert sorted(count or 0 for _, count in loops(parse(text))) == [0, 17]


def test_shapes_have_sizes_bytes_and_a_memory_space() -> None:
    text = """
ENTRY %main (a: f32[3,5]) -> f32[3,5] {
  %a = f32[3,5]{1,0} parameter(0)
  %t = (bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/pred[7]{0}, s4[3]{0:T(128)}, f8e4m3fn[2]{0}, token[]) custom-call(%a), custom_call_target="x"
  ROOT %r = f32[3,5]{1,0} negate(%a)
}
"""  # noqa: E501
    program = parse(text)
    shapes = program.computations["main"].shapes_of("t")
    assert shapes[0] == Shape("bf16", (2, 3), 1)
    assert [shape.bytes for shape in shapes] == [12, 7, 2, 2, 0]
    assert program.computations["main"].root.operands == ("a",)


def test_a_line_that_a_kernels_metadata_breaks_is_one_instruction() -> None:
    text = """
ENTRY %main (a: f32[3]) -> f32[3] {
  %a = f32[3]{0} parameter(0)
  ROOT %kernel.1 = f32[3]{0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": "{128}"
}}, metadata={op_name="jit(f)/kernel"}, backend_config={"flops":"7"}
}
"""  # noqa: E501
    root = parse(text).computations["main"].root
    assert (root.name, root.origin, root.number("flops")) == ("kernel.1", "jit(f)/kernel", 7)


def test_a_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("HloModule nothing")


@pytest.mark.parametrize(
    ("estimate", "cycles"),
    [('"2663"', 2663), ("12", 12), ('"9223372036854775807"', None), ('"-1"', None)],
)
def test_the_largest_number_of_cycles_means_that_there_is_no_estimate(
    estimate: str, cycles: int | None
) -> None:
    line = (
        "  ROOT %copy.1 = s32[4]{0} copy(%a), "
        f'backend_config={{"window_config":{{"estimated_cycles":{estimate}}}}}'
    )
    text = f"ENTRY %main (a: s32[4]) -> s32[4] {{\n  %a = s32[4]{{0}} parameter(0)\n{line}\n}}"
    main = parse(text).computations["main"]
    assert main.root.cycles == cycles
    assert main.instructions["a"].cycles is None


def test_a_computation_of_a_sparse_core_ends_in_a_line_that_says_so() -> None:
    text = """
%elsewhere (p.0: s32[8]) -> s32[8] {
  ROOT %p.0 = s32[8]{0} parameter(0)
}, execution_thread="sparsecore"

ENTRY %main (a.0: s32[8]) -> s32[8] {
  %a.0 = s32[8]{0} parameter(0)
  ROOT %negate.0 = s32[8]{0} negate(%a.0)
}
"""
    program = parse(text)
    assert set(program.computations) == {"elsewhere", "main"}
    assert program.computations["elsewhere"].root.attributes == ""
