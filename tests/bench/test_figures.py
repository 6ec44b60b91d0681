"""What is wanted, tables and JSON, on made-up numbers."""

import json

import pytest
from rich.console import Console

from jaxrl_llm.bench.figures import (
    Direction,
    Findings,
    RowResult,
    Wanted,
    figure,
    make_table,
    show,
    to_json,
)


def text(result: RowResult) -> str:
    console = Console(width=110, record=True, quiet=False)
    with console.capture() as capture:
        console.print(make_table(result))
    return capture.get()


def lines(result: RowResult) -> dict[str, str]:
    """First word of a line -> the line, its spaces collapsed."""
    found = (" ".join(line.split()) for line in text(result).splitlines())
    return {line.split(" ")[0]: line for line in found if line}


@pytest.mark.parametrize(
    ("direction", "below", "at", "above"),
    [
        ("<", True, False, False),
        ("<=", True, True, False),
        (">", False, False, True),
        (">=", False, True, True),
    ],
)
def test_the_median_decides(direction: Direction, below: bool, at: bool, above: bool) -> None:
    wanted = Wanted(direction, 2.0)
    medians = ([0, 1, 9], [0, 2, 9], [0, 3, 9])
    assert [figure("f", m, "x", wanted=wanted).holds for m in medians] == [below, at, above]
    assert figure("f", [1.0], "x").holds is None


def test_a_figure_is_the_median_and_range_of_its_rounds() -> None:
    found = figure("f", [3.0, 1.0, 2.5], "s", roof=[0.2, 0.9, 0.3])
    assert (found.value, found.low, found.high, found.rounds, found.roof) == (2.5, 1, 3, 3, 0.3)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (3.14159, "s", "3.142 s"),
        (0.0123, "s", "12.3 ms"),
        (4.1e11, "FLOP/s", "410 GFLOP/s"),
        (3 * 2**30, "B", "3 GiB"),
        (0, "B", "0 B"),
        (0.616, "share", "61.6 %"),
        (0.94, "x", "0.940 x"),
        (2.1e-6, "nats", "2.1e-06 nats"),
        (2512.3, "tokens/s", "2,512 tok/s"),
    ],
)
def test_units(value: float, unit: str, shown: str) -> None:
    assert show(value, unit) == shown


def findings() -> Findings:
    return Findings(
        "title",
        (
            figure("kept", [0.5, 0.7, 0.6], "share", roof=[0.3], wanted=Wanted(">", 0.55)),
            figure("lost", [2.2, 2.0, 2.4], "x", wanted=Wanted("<=", 2.1)),
            figure("free", [0.012, 0.02, 0.01], "s"),
            figure("counted", [3 * 2**20], "B"),
        ),
    )


def test_a_table_shows_found_beside_wanted_and_marks_misses() -> None:
    found = lines(RowResult("update", 1.0, findings()))
    assert found["kept"] == "kept 60.0 % 50.0 - 70.0 30.0 % > 55 % yes"
    assert found["lost"] == "lost 2.200 x 2.000 - 2.400 <= 2.1 MISSED"
    assert found["free"] == "free 12 ms 10 - 20"
    assert found["counted"] == "counted 3 MiB"
    assert found["update:"] == "update: title"


def test_a_failed_row_is_a_line_with_its_error() -> None:
    shown = text(RowResult("update", 1.0, None, "ValueError: no [peer]"))
    assert "ERROR ValueError: no [peer]" in shown


def test_json_has_every_number_and_what_was_wanted() -> None:
    results = [RowResult("update", 1.5, findings()), RowResult("cost", 0.1, None, "gone")]
    values = json.loads(json.dumps(to_json({"cores": 2}, {"repeats": 5}, results)))
    assert values["machine"] == {"cores": 2}
    assert values["settings"] == {"repeats": 5}
    update, cost = values["rows"]
    assert update["findings"]["figures"][1] == {
        "name": "lost",
        "value": 2.2,
        "unit": "x",
        "low": 2.0,
        "high": 2.4,
        "rounds": 3,
        "roof": None,
        "wanted": {"direction": "<=", "bound": 2.1},
        "holds": False,
    }
    assert (cost["findings"], cost["error"]) == (None, "gone")
