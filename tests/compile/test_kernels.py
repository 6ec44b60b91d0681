"""The kernels that a TPU program of a train step contains, with the real TPU compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.compile.kernel_calls import HEAD_DIM, HEADS, LENGTH, MESH, MODEL, ROWS

ROOT = Path(__file__).parent.parent.parent
CHOICES = ("auto auto", "plain ragged")  # of attention and dispatch


@pytest.fixture(scope="module")
def programs() -> list[dict[str, Any]]:
    """Of each of CHOICES."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.compile.kernel_calls", *CHOICES],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def named(calls: dict[str, list[int]], part: str) -> list[int]:
    return [flops for name, each in calls.items() if part in name for flops in each]


def test_auto_on_a_tpu_computes_attention_and_experts_with_kernels_in_both_passes(
    programs: list[dict[str, Any]],
) -> None:
    auto, _ = programs
    calls = auto["calls"]
    # The layers are scanned and recomputed for the gradient: each kernel stands there once a pass.
    # Of a row that two devices share, each has two parts.
    assert len(named(calls, "splash_mha_fwd")) == 2 * 2
    assert len(named(calls, "splash_mha_dq")) == len(named(calls, "splash_mha_dkv")) == 2
    # Two products; the first again for the gradient, which multiplies by each matrix and into each.
    assert len(named(calls, "tgmm")) == 2
    assert len(named(calls, "gmm")) == 2 + 1 + 2 + 2
    assert auto["unknown"] == []


def test_no_kernel_of_a_library_where_none_is_chosen(programs: list[dict[str, Any]]) -> None:
    _, plain = programs
    assert named(plain["calls"], "splash") == named(plain["calls"], "gmm") == []


def test_the_kernels_cost_what_a_hand_count_says(programs: list[dict[str, Any]]) -> None:
    calls = programs[0]["calls"]
    rows = ROWS // 2 // MESH.expert  # of a device in a micro-batch
    # A device has two of the four parts of a row, an early and a late one; they see 1, 2, 3 and 4
    # blocks of 256. Each is a call.
    product = 2 * rows * HEADS * HEAD_DIM * 256 * 256 * (1 + 2 + 3 + 4) // 4
    assert named(calls, "splash_mha_fwd") == [2 * product] * 4
    assert named(calls, "splash_mha_dq") == [3 * product] * 2
    assert named(calls, "splash_mha_dkv") == [4 * product] * 2
    # As many rows as one round brings: to within a quarter more than an even load.
    assignments = rows * LENGTH // MESH.context * MODEL.moe.experts_per_token
    grouped = 2 * (1.25 * assignments) * MODEL.width * MODEL.moe.expert_width
    assert sorted(named(calls, "gmm")) == [grouped] * 3 + [2 * grouped] * 4
