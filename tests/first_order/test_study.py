"""The study and its command, small: what is measured, written and refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from jaxrl_llm.first_order.output import cosines, figure, spread, table
from jaxrl_llm.first_order.study import METHODS, Study, StudyConfig, run_study
from jaxrl_llm.main import main

SMALL = StudyConfig(
    seeds=2,
    vocab_size=4,
    length=3,
    prompts=2,
    warmup_updates=2,
    precisions=("float32", "int4"),
    precision_updates=0,
    updates=(1, 3),
    staleness_precision="float32",
)


@pytest.fixture(scope="module")
def study() -> Study:
    return run_study(SMALL, lambda line: None)


def test_every_cell_is_measured_once(study: Study) -> None:
    keys = [(c.sweep, c.seed, c.precision, c.updates, c.method, c.clipped) for c in study.cells]
    assert len(keys) == len(set(keys)) == 2 * (2 + 2) * len(METHODS) * 2
    assert len(study.attributions) == 2 * (2 + 2)
    assert {(c.precision, c.updates) for c in study.cells if c.sweep == "precision"} == {
        ("float32", 0),
        ("int4", 0),
    }


def test_on_policy_in_float32_all_methods_are_exact(study: Study) -> None:
    cells = [c for c in study.cells if c.updates == 0 and c.precision == "float32"]
    assert len(cells) == 2 * len(METHODS) * 2
    for cell in cells:
        assert cell.agreement.relative_error < 1e-4, cell
    for error in study.attributions:
        if error.updates == 0 and error.precision == "float32":
            assert max(error.staleness, error.with_routing, error.with_numerics) < 1e-4


def test_attribution_adds_one_source_after_another(study: Study) -> None:
    for error in study.attributions:
        if error.precision == "int4":
            assert error.staleness < 1e-4, "there were no updates"
            assert error.with_routing > 1e-3, "other routes, the same arithmetic"
            assert error.with_numerics > 0.01
            assert abs(error.with_numerics - error.with_routing) > 1e-3
        if error.updates > 0:
            assert error.staleness > 1e-3
            assert error.with_numerics == pytest.approx(error.staleness, rel=0.05), "same engine"
    full = {
        (c.sweep, c.seed, c.precision, c.updates): c.agreement.relative_error
        for c in study.cells
        if c.method == "token IS" and not c.clipped
    }
    for b in study.attributions:
        assert b.with_numerics == pytest.approx(full[b.sweep, b.seed, b.precision, b.updates])


def test_means_and_errors_are_over_policies(study: Study) -> None:
    values = [
        c.agreement.cosine
        for c in study.cells
        if (c.sweep, c.method, c.clipped, c.updates) == ("staleness", "token IS", True, 3)
    ]
    found = cosines(study, "staleness", "token IS", clipped=True)[1]
    assert found.mean == pytest.approx(np.mean(values))
    assert found.error == pytest.approx(abs(values[0] - values[1]) / 2)
    assert math.isnan(spread([1.0]).error)


def test_the_figure_names_every_method_in_every_panel(study: Study) -> None:
    for axes in figure(study).axes:
        assert {text.get_text() for text in axes.texts} == set(METHODS)


def test_the_table_has_every_method_and_source(study: Study) -> None:
    header, *rows = table(study, "precision").splitlines()
    assert header.split() == ["cosine", "clip", "float32", "int4"]
    assert len(rows) == 2 * len(METHODS) + 1 + 3
    for row in rows[:2] + rows[-3:]:
        assert row.count(" ± ") == 2, row


def test_the_command_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--seeds 1 --vocab-size 3 --length 2 --warmup-updates 1 --precisions fp8_e4m3"
    sweep = "--updates 1 --staleness-precision fp8_e4m3 --precision-updates 1"
    arguments = ["first-order", "--output", str(tmp_path / "out"), *f"{flags} {sweep}".split()]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Sweep of staleness" in printed
    stored = json.loads((tmp_path / "out/study.json").read_text())
    assert stored["config"]["precisions"] == ["fp8_e4m3"]
    assert len(stored["cells"]) == 2 * len(METHODS) * 2
    assert -1 <= stored["cells"][0]["agreement"]["cosine"] <= 1
    assert (tmp_path / "out/cosine.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, "seeds is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"updates": ()}, "a sweep needs at least one point"),
        ({"warmup_updates": -1}, "numbers of updates are 0 or more"),
        ({"prompts": 5}, "to tell prompts apart"),
    ],
)
def test_contradictions_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudyConfig(**settings)


def test_a_policy_too_large_to_list_is_refused_by_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["first-order", "--vocab-size", "12", "--length", "6"]) == 1
    assert "more than 100000; lower the length" in " ".join(capsys.readouterr().err.split())
