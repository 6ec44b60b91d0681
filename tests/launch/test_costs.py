"""The figures of launch/README.md, computed again from the model's shape and the paper's batch."""

import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxrl_llm.data.collate import collate
from jaxrl_llm.model.config import ModelConfig, MoEConfig
from jaxrl_llm.model.transformer import init_params
from jaxrl_llm.processes import LARGEST
from tests.launch.shapes import documents
from tests.synthetic_run import make_group

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "launch" / "README.md").read_text()
MODEL = ModelConfig(
    vocab_size=151936,
    width=2048,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    moe=MoEConfig(num_experts=128, experts_per_token=8, expert_width=768),
)
SPEEDS = {"at 10 Gbit/s": 10e9 / 8, "at 100 Gbit/s": 100e9 / 8}  # bytes a second
FILESTORE = {"read": 2600 * 2**20, "write": 880 * 2**20}  # bytes a second of 10 TiB


def parameters() -> int:
    shapes = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


NAMES = {"P": parameters(), "L": 48, "K": 8, "B": 2 * 1024, "T": 32768}


def table(first: str) -> list[dict[str, str]]:
    """The rows of the table whose first column is `first`."""
    lines = TEXT[TEXT.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


def value(formula: str) -> float:
    assert re.fullmatch(r"`[0-9PLKBT *+/()]+`", formula)
    return float(eval(formula.strip("`"), {"__builtins__": {}}, NAMES))


def rounded(number: float, like: str) -> str:
    """With as many decimals as `like`."""
    return f"{number:.{len(like.partition('.')[2])}f}"


def test_the_shape_is_that_of_the_text() -> None:
    assert f"`P` = {NAMES['P']:,} parameters" in TEXT
    assert MODEL.num_moe_layers == NAMES["L"]
    assert MODEL.moe.experts_per_token == NAMES["K"]


COSTS = table("what | bytes")
ANSWER = value("`T * L * K * 4 * 4 / 3`")  # bytes of the routes of the longest one, as base64


@pytest.mark.parametrize("row", COSTS, ids=[row["what"].split(",")[0] for row in COSTS])
def test_every_figure_follows_from_its_formula(row: dict[str, str]) -> None:
    size = value(row["bytes"])
    assert row["GB"] == rounded(size / 1e9, row["GB"])
    for column, speed in SPEEDS.items():
        if row[column]:
            seconds = row[column].removesuffix(" s")
            assert seconds == rounded(size / speed, seconds)


def test_bytes_of_a_token_on_the_wire_are_those_of_real_answers() -> None:
    recorded = json.loads((ROOT / "tests/recorded/sglang_0.5.23.json").read_text())
    entries = list(_entries(recorded))
    # With an id of six digits, as most of this vocabulary have.
    sizes = [len(json.dumps([e[0], 151643, None], separators=(",", ":"))) + 1 for e in entries]
    assert len(sizes) > 50
    assert round(sum(sizes) / len(sizes)) == 33
    assert "44 bytes a token are 33 for" in TEXT
    assert len("151643,") == 7


def _entries(value: Any) -> Any:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from part if name == "output_token_logprobs" else _entries(part)
    elif isinstance(value, list):
        for part in value:
            yield from _entries(part)


def test_the_conclusions_follow_too() -> None:
    weights, routes = value("`2 * P`"), value("`B * T * L * K * 4 * 4 / 3`")
    checkpoint = value("`12 * P`")
    slow, fast = ((weights + routes) / speed for speed in SPEEDS.values())
    assert f"{slow / 60:.0f} minutes of a step at 10 Gbit/s, {fast:.0f} s at 100" in TEXT
    assert f"write a publication in {weights / FILESTORE['write']:.0f} s" in TEXT
    assert f"give 4 servers theirs in {4 * weights / FILESTORE['read']:.0f} s" in TEXT
    assert f"a checkpoint takes {checkpoint / FILESTORE['write'] / 60:.1f} minutes" in TEXT
    assert f"two copies of {ANSWER / 1e6:.0f} MB" in TEXT


def test_bytes_of_a_token_in_memory_are_those_of_its_fields() -> None:
    """Of each beside its routes, which are int16 in both."""
    (rollout, *_) = make_group(0).rollouts
    assert rollout.routes is not None
    arrays = (rollout.loss_mask, rollout.sampler_logprobs, rollout.weight_version)
    positions, advantages = rollout.loss_mask.size, np.zeros(1, np.float32)
    one_more = rollout.tokens[1:].nbytes + sum(array.nbytes for array in arrays)
    assert one_more == 13 * positions
    batch = collate([rollout], advantages, step=3, rows=1, length=positions, pack=False)
    routes = np.asarray(batch.routes)
    assert routes.nbytes == rollout.routes.nbytes == 2 * rollout.routes.size
    in_rows = sum(leaf.nbytes for leaf in jax.tree.leaves(batch)) - routes.nbytes
    assert in_rows == 30 * positions
    formulas = [row["bytes"] for row in COSTS]
    assert "`B * T * (L * K * 2 + 30)`" in formulas
    assert "`B * T * (2 * L * K * 2 + 13 + 30)`" in formulas


def test_the_padding_of_rows_that_are_sent_is_as_the_text_says() -> None:
    row = int(value("`T * L * K * 2`"))
    block = LARGEST // row * row
    assert f"blocks of up to {LARGEST // 2**20} MiB" in TEXT
    assert (block // row, LARGEST / block) == (2, pytest.approx(4 / 3))
    assert "for two rows of routes makes a third more" in TEXT


def test_a_pod_asks_for_the_memory_that_the_first_process_needs() -> None:
    requests, parts = set(), {}
    for path in (ROOT / "launch" / "gke").glob("learner_*.yaml"):
        (document,) = documents(path)
        job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
        (container,) = job["template"]["spec"]["containers"]
        requests.add(container["resources"]["requests"]["memory"])
        parts[path.stem] = value("`12 * P`") / job["parallelism"]
    assert requests == {"256Gi"}
    memory, batch = 256 * 2**30, value("`B * T * (2 * L * K * 2 + 13 + 30)`")
    assert f"a pod asks for 256 GiB, {memory / 1e9:.0f} GB" in TEXT
    assert f"{batch / 1e9:.0f} GB for the batch" in TEXT
    part, smaller = parts["learner_v5p_64"] / 1e9, parts["learner_v6e_64"] / 1e9
    assert (
        f"{part:.0f} GB for its part of a checkpoint being written (v6e: {smaller:.0f} GB)" in TEXT
    )
    left = memory - batch - max(parts.values())
    assert f"leaves {left / 1e9:.0f} GB for the answers being read" in TEXT
    assert f"{left / 2 / ANSWER // 100 * 100:.0f} at once" in TEXT
    assert f"are {value('`B * T * (L * K * 2 + 13)`') / 1e9:.0f} GB more for each batch" in TEXT


SLICES = table("`ACCELERATOR` of TPU VMs, SkyPilot")


@pytest.mark.parametrize("row", SLICES, ids=[next(iter(row.values())) for row in SLICES])
def test_the_slices_are_what_their_names_say(row: dict[str, str]) -> None:
    name = row["`ACCELERATOR` of TPU VMs, SkyPilot"].strip("`")
    version, _, number = name.partition("-")
    topology = row["GKE accelerator, topology"].split()[-1].strip("`")
    chips = math.prod(int(size) for size in topology.split("x"))
    assert int(row["chips"]) == chips == int(number) // (2 if version == "v5p" else 1)
    assert int(row["hosts"]) == chips // 4
    assert row["`jaxrl-llm compile --topology`"] == f"`{version}:{topology}`"


def test_every_file_that_the_page_names_is_there() -> None:
    names = set(re.findall(r"launch/[\w./]*\w", TEXT))
    names |= {f"launch/{link}" for link in re.findall(r"\]\(([\w./]+)\)", TEXT)}
    assert len(names) > 8
    missing = {name for name in names if not (ROOT / name).exists()}
    assert missing == set()
