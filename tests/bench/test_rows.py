"""Every row at a tiny size: it measures what it promises. How fast is nobody's business here."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_llm.bench.config import BenchConfig, DecodeSizes
from jaxrl_llm.bench.figures import Figure, Findings
from jaxrl_llm.bench.measure import Turns
from jaxrl_llm.bench.roof import COPIES, COPY, PRODUCT, make_roof
from jaxrl_llm.bench.rows import cost, decode, logprobs, publish, replay, start, update
from jaxrl_llm.bench.rows import slice as slice_row
from jaxrl_llm.bench.workload import Trainee, make_setup, make_tokens
from jaxrl_llm.compile.model_flops import FORWARD, TRAINING, model_flops
from tests.bench.sizes import MODEL, PEER, tiny

ROOF = ["roof: matrix product, 64^3, float32", "roof: copy in place, 1 MiB"]


def by_name(findings: Findings) -> dict[str, Figure]:
    names = [found.name for found in findings.figures]
    assert len(set(names)) == len(names)
    for found in findings.figures:
        assert found.low <= found.value <= found.high, found
        assert math.isfinite(found.value), found
        assert found.roof is None or found.roof > 0, found
    return {found.name: found for found in findings.figures}


def wanted(figures: dict[str, Figure]) -> dict[str, str]:
    """Name -> what is wanted, of figures of which something is."""
    return {
        name: f"{found.wanted.direction} {found.wanted.bound:g}"
        for name, found in figures.items()
        if found.wanted
    }


def test_update() -> None:
    findings = update.measure(tiny(peer=PEER))
    figures = by_name(findings)
    assert list(figures)[:6] == [
        *ROOF,
        "learner step",
        "peer's step",
        "RL update",
        "step, ragged dispatch",
    ]
    assert all(figures[name].roof for name in list(figures)[2:6])
    assert wanted(figures) == {
        "learner step, MFU": "> 0.6",
        "learner step / peer's step": "< 1",
        "step, ragged dispatch / learner step": ">= 10",
        "first loss, ours less peer's": "<= 0.0001",
        "peak memory, ours / peer's": "< 1",
    }
    # Random weights know nothing, almost: their loss is near that of the fake.
    assert 0 < figures["first loss, ours less peer's"].value < 0.5
    assert figures["learner step, peak memory"].value > 0
    fastest = figures["learner step"].low
    assert figures["learner step, speed"].high == pytest.approx(2 * 16 / fastest)
    assert any("a fake" in note for note in findings.notes)


FAKE = {
    PRODUCT: (1.0,),
    COPY: (1.0,),
    update.STEP: (2.0,),
    update.RL: (3.0,),
    update.RAGGED: (40.0,),
}


def test_update_without_a_peer_says_how_to_get_one() -> None:
    config = tiny()
    figures = update._times(Turns(FAKE), make_roof(config.roof), config)
    assert not any("peer" in figure.name for figure in figures)
    assert any("--peer" in note for note in update._notes(None))


def test_the_figures_of_a_step_by_hand() -> None:
    config = tiny()
    roof = make_roof(config.roof)
    flops = model_flops(MODEL, rows=2, length=16, passes=TRAINING)
    found = update._times(Turns(FAKE | {update.PEER: (4.0,)}), roof, config)
    assert {figure.name: figure.value for figure in found} == {
        "learner step": 2.0,
        "peer's step": 4.0,
        "RL update": 3.0,
        "step, ragged dispatch": 40.0,
        "learner step, speed": 2 * 16 / 2.0,
        "learner step, MFU": pytest.approx(flops / 2.0 / roof.flops),
        "learner step / peer's step": 0.5,
        "RL update / learner step": 1.5,
        "step, ragged dispatch / learner step": 20.0,
    }


def test_the_share_of_the_roof_is_model_flops_over_the_products() -> None:
    roof = make_roof(tiny().roof)
    turns = Turns({PRODUCT: (1.0, 2.0), COPY: (1.0, 1.0), "work": (4.0, 4.0)})
    assert roof.flops == 2 * 64**3
    assert roof.of_product(turns, "work", roof.flops) == [0.25, 0.5]
    assert roof.bytes == COPIES * 2 * 2**20
    assert roof.of_copy(turns, "work", roof.bytes) == [0.25, 0.25]


def test_cost() -> None:
    figures = by_name(cost.measure(tiny()))
    assert wanted(figures) == {
        "4 rows of 16 / 2 rows of 16": "<= 2.1",
        "8 experts / 2 rows of 16": "<= 1.15",
        "2 sequences in one row of 32 / 2 rows of 16": "<= 1.1",
    }
    assert "2 rows of 32 / 2 rows of 16" in figures


def test_packed_rows_compute_what_separate_rows_do() -> None:
    """Else the packed contestant would time something else."""
    setup = make_setup(MODEL)
    step = setup.sft_step()
    tokens = make_tokens(MODEL, 2, 17)
    apart = setup.batch(tokens)
    packed = setup.batch(make_tokens(MODEL, 1, 33), segments=2)
    packed = dataclasses.replace(
        packed,
        inputs=jax.device_put(apart.inputs.reshape(1, 32), packed.inputs.sharding),
        targets=jax.device_put(apart.targets.reshape(1, 32), packed.targets.sharding),
    )
    assert np.asarray(packed.positions).tolist() == [[*range(16), *range(16)]]
    losses = [
        float(Trainee(setup).advance(step, batch)["learner/loss"].value())
        for batch in (apart, packed)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_replay() -> None:
    figures = by_name(replay.measure(tiny()))
    assert wanted(figures) == {
        "train step, r3 replay / train step": "<= 1.02",
        "train step / train step, no metrics": "<= 1.03",
        "score step / train step": "<= 0.4",
    }


def test_the_step_without_metrics_makes_the_same_update() -> None:
    setup = make_setup(MODEL)
    batch = setup.batch(make_tokens(MODEL, 2, 17))
    full, bare = Trainee(setup), Trainee(setup)
    loss = full.advance(setup.train_step(), batch)["learner/loss"].value()
    reported = bare.advance(replay.bare_step(setup), batch)
    assert list(reported) == ["learner/loss"]
    assert float(loss) == pytest.approx(float(reported["learner/loss"].value()), abs=1e-6)
    for a, b in zip(
        jax.tree.leaves(full.state.params), jax.tree.leaves(bare.state.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_logprobs() -> None:
    figures = by_name(logprobs.measure(tiny()))
    assert wanted(figures) == {
        "time, in chunks / unchunked": "<= 1.1",
        "temporary memory, in chunks / unchunked": "< 0.125",
    }
    chunked = figures["temporary memory, in chunks"].value
    assert 0 < chunked < figures["temporary memory, unchunked"].value


def test_decode() -> None:
    findings = decode.measure(tiny(peer=PEER))
    figures = by_name(findings)
    assert wanted(figures) == {
        "float32, of the limit": ">= 0.5",
        "bfloat16 (simulated), of the limit": ">= 0.5",
        "speed, bfloat16 / float32": ">= 0.97",
        "speed, int8 / float32": ">= 0.97",
        "speed, fp8_e4m3 / float32": ">= 0.97",
        "speed, fp8_e5m2 / float32": ">= 0.97",
        "speed, int4 / float32": ">= 0.97",
        "speed, float32 / peer's generate": ">= 2",
        "speed, unequal lengths / equal lengths": ">= 0.8",
    }
    assert list(figures)[:5] == [*ROOF, "limit", "float32", "float32, of the limit"]
    assert "equal lengths, 4 requests of 8" in figures
    assert "unequal lengths, 1 to 15" in figures
    assert any(note.startswith("The peer's fastest mode: only mode;") for note in findings.notes)


def test_unequal_lengths_have_the_mean_of_equal_ones() -> None:
    assert DecodeSizes().lengths == (16, 240)
    assert sum(DecodeSizes().lengths) / 2 == DecodeSizes().new_tokens


def test_the_limit_of_decoding_by_hand() -> None:
    config = tiny(decode=DecodeSizes(slots=3, prompt=2, new_tokens=2))
    roof = make_roof(config.roof)
    # D 16, 2 layers of 2 heads and 1 KV head of 8, 4 experts of 8, V 24: the matrices of
    layers = 2 * (16 * 2 * 16 + 16 * 2 * 8 + 16 * 4 + 4 * 3 * 16 * 8)
    entries = layers + 16 * 24
    reads = [4 * (entries + 3 * 2 * 2 * 8 * context) for context in (2, 3)]
    # One token of each prompt, and no head: no engine needs its logits.
    prompts = model_flops(MODEL, rows=3, length=1, passes=FORWARD) - 2 * 3 * 16 * 24
    # Reading at 1 byte/s is all that counts, then computing at 1 FLOP/s.
    turns = Turns({PRODUCT: (roof.flops * 1e-9,), COPY: (roof.bytes,)})
    assert decode._limits(MODEL, config, roof, turns) == [
        pytest.approx(sum(reads) + prompts * 1e-9)
    ]
    # Every token meets 2 of the 4 experts.
    active = entries - 2 * 2 * 3 * 16 * 8
    steps = [3 * (2 * active + 4 * 2 * 2 * 8 * context) for context in (2, 3)]
    turns = Turns({PRODUCT: (roof.flops,), COPY: (roof.bytes * 1e-9,)})
    assert decode._limits(MODEL, config, roof, turns) == [pytest.approx(sum(steps) + prompts)]


def test_publish(tmp_path: Path) -> None:
    figures = by_name(publish.measure(tiny(folder=tmp_path, repeats=1)))
    assert wanted(figures) == {
        "to the engine, device memory added": "<= 0",
        "speed, through a folder / plain write and fsync": ">= 0.8",
    }
    assert figures["to the engine, device memory added"].value == 0
    assert figures["to the engine, float32"].value > 0
    written = figures["through a folder"].value * figures["through a folder, speed"].value
    entries = sum(leaf.size for leaf in jax.tree.leaves(make_setup(MODEL).params()))
    assert 2 * entries < written < 2 * entries + 20_000  # in bfloat16; heads, index and manifest
    assert not list(tmp_path.iterdir())  # it cleans up


CONFIG = """
from pathlib import Path
from tests.tiny import tiny_config

def get_config():
    return tiny_config(Path(__file__).parent / "run")
"""


def test_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent.parent))
    figures = by_name(start.measure(tiny(train=config, repeats=1)))
    assert wanted(figures) == {
        "to the first update, cold cache": "<= 25",
        "to the first update, warm cache": "<= 10",
        "jaxrl-llm --help": "<= 1",
    }


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file here"):
        start.measure(tiny(train=tmp_path / "nowhere.py"))
    broken = tmp_path / "broken.py"
    broken.write_text("raise ValueError('on purpose')")
    with pytest.raises(ValueError, match="on purpose"):
        start.first_update(broken, tmp_path / "run", {})


def test_slice_needs_a_gpu_and_measures_its_kernels() -> None:
    findings = slice_row.measure(tiny())
    assert findings.figures == ()
    assert "needs a GPU" in findings.notes[0]
    figures = by_name(Findings("", slice_row.measure_kernels(tiny(), "blocked", "plain")))
    assert wanted(figures) == {"blocked dispatch, plain attention, MFU": ">= 0.35"}


def test_the_defaults_are_what_the_figures_are_of() -> None:
    config = BenchConfig()
    learner, head = config.learner, config.logprobs
    assert (learner.rows, learner.length, learner.model.vocab_size) == (4, 1024, 8192)
    assert (learner.model.moe.num_experts, learner.model.moe.experts_per_token) == (32, 4)
    assert (learner.model.moe.expert_width, learner.model.width, learner.more_experts) == (
        256,
        512,
        128,
    )
    assert (head.vocabulary, config.slice.rows * config.slice.length) == (151_936, 8 * 4096)
