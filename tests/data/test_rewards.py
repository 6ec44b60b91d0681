"""Verdicts: right answers in all their spellings, hostile ones in time, and a cause for each 0."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.data import rewards
from jaxrl_llm.data.rewards import (
    RewardConfig,
    Verdict,
    Verifier,
    compare,
    extract_answer,
)

BOXED = RewardConfig(kind="math_verify", extraction="boxed", timeout=60.0)


@pytest.fixture(scope="module")
def patient() -> Iterator[Verifier]:
    """With a time limit that no honest answer meets, however busy the machine."""
    with Verifier(BOXED) as verifier:
        yield verifier


@pytest.fixture(scope="module")
def strict() -> Iterator[Verifier]:
    with Verifier(RewardConfig(kind="math_verify", timeout=0.5, workers=1)) as verifier:
        yield verifier


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("7512#0432", "0432"),
        ("a # b #  c d \n e", "c d"),
        ("#\n5", "5"),
        ("no marker", None),
        ("x#", None),
        ("x# \n ", None),
        ("", None),
    ],
)
def test_the_answer_is_the_line_after_the_last_marker(text: str, answer: str | None) -> None:
    assert extract_answer(text, RewardConfig()) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} no, \boxed{ \frac{1}{2} } yes", r"\frac{1}{2}"),
        (r"\boxed {5}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{(1, 2\}}", r"(1, 2\}"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"\boxed{{ and \boxed{7}", "7"),
        (r"\boxed{\boxed{8}}", "8"),
        (r"} \boxed{9} {", "9"),
        (r"\boxed{}", None),
        (r"\boxed{5", None),
        ("5", None),
        ("", None),
    ],
)
def test_the_answer_is_in_the_last_balanced_box(text: str, answer: str | None) -> None:
    assert extract_answer(text, BOXED) == answer


@settings(deadline=None)
@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "\\", "5", " "]), max_size=14))
def test_a_box_found_is_balanced_and_in_the_text(pieces: list[str]) -> None:
    text = "".join(pieces)
    answer = extract_answer(text, BOXED)
    if answer is not None:
        bare = answer.replace("\\\\", "").replace("\\{", "").replace("\\}", "")
        assert bare.count("{") == bare.count("}")
        assert answer in text


def test_a_megabyte_of_open_boxes_is_read_in_one_pass() -> None:
    """Looking for the partner of each brace anew would take hours; the test would not end."""
    assert extract_answer("\\boxed{" * 150_000, BOXED) is None


def test_exact_verdicts_keep_their_order() -> None:
    with Verifier(RewardConfig()) as verifier:
        verdicts = verifier.score(
            [("1#2", "2"), ("1#3", "2"), ("12", "2"), ("#02", "2"), ("", "")][:4]
        )
    assert verdicts == [
        Verdict(1.0, "correct"),
        Verdict(0.0, "wrong"),
        Verdict(0.0, "no_answer"),
        Verdict(0.0, "wrong"),
    ]


def test_the_whole_response_can_be_the_answer() -> None:
    with Verifier(RewardConfig(extraction="whole")) as verifier:
        verdicts = verifier.score([(" 5 ", "5"), ("is 5", "5"), ("  ", "5")])
    assert [verdict.cause for verdict in verdicts] == ["correct", "wrong", "no_answer"]


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("0.5", r"\frac{1}{2}"),
        (r"\frac{2}{4}", "1/2"),
        ("1,000", "1000"),
        ("1000.0", "1000"),
        (r"3 \cdot 10^{8}", "300000000"),
        (r"2^{10}", "1024"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        (r"50\%", "0.5"),
        (r"x = 5", "5"),
        (r"\{2, 1\}", r"\{1, 2\}"),
        (r"(1, 2)", "(1,2)"),
        (r"[0, 1)", "[0,1)"),
        (r"\frac{\pi}{2}", r"\pi/2"),
        (r"x^2 + 2x + 1", "(x+1)^2"),
        (r"1 + 2i", "2i + 1"),
        (r"$7$", "7"),
        ("9" * 1000, "9" * 1000),
        (r"10^{10^{10}}", r"10^{10^{10}}"),
    ],
)
def test_equal_mathematics_is_correct(patient: Verifier, answer: str, reference: str) -> None:
    assert patient.score([(rf"\boxed{{{answer}}}", reference)]) == [Verdict(1.0, "correct")]


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("-3", "3"),
        ("0.33", r"\frac{1}{3}"),
        ("(2, 1)", "(1, 2)"),
        (r"\frac{1}{0}", "1"),
        (r"\infty", "1"),
        ("10**10**10", "5"),
        ("1e999999999", "1"),
        ("1000000000000000000001", "1000000000000000000000"),
        ("x", "y"),
    ],
)
def test_unequal_mathematics_is_wrong(patient: Verifier, answer: str, reference: str) -> None:
    assert patient.score([(rf"\boxed{{{answer}}}", reference)]) == [Verdict(0.0, "wrong")]


@pytest.mark.parametrize(
    ("answer", "causes"),
    [
        ("10^{10^{10}}", {"timeout"}),
        ("99999999!", {"timeout"}),
        (r"\sum_{n=1}^{10000000000} n^n", {"timeout"}),
        ("{" * 1900, {"timeout", "unparsable"}),
        ("(" * 900 + "1" + ")" * 900, {"timeout", "unparsable", "error"}),
        (r"\frac{" * 300, {"timeout", "unparsable"}),
        (r"\sqrt{" * 250 + "2" + "}" * 250, {"timeout", "wrong", "unparsable"}),
        ("}}}}{", {"unparsable", "timeout"}),
        ("\x00\ud800\u202e", {"wrong", "unparsable", "timeout"}),
        ("7" * 2001, {"too_long"}),
        ("x" * 10**6, {"too_long"}),
        ("", {"no_answer"}),
        (r"\text{" + "a" * 1900 + "}", {"wrong", "unparsable", "timeout"}),
    ],
    ids=range(13),
)
def test_hostile_answers_get_nothing_and_a_cause(
    strict: Verifier, answer: str, causes: set[str]
) -> None:
    (verdict,) = strict.score([(f"#{answer}", "5")])
    assert verdict.reward == 0.0
    assert verdict.cause in causes


def test_a_megabyte_response_is_searched_at_its_end() -> None:
    config = RewardConfig(kind="math_verify", extraction="whole", timeout=60.0, workers=1)
    with Verifier(config) as verifier:
        verdicts = verifier.score(
            [("word " * 200_000 + "so $x = 4$", "4"), ("$4$" + " word" * 200_000, "4")]
        )
    assert [verdict.cause for verdict in verdicts] == ["correct", "unparsable"]


def test_one_hanging_answer_costs_the_others_nothing(strict: Verifier) -> None:
    with Verifier(RewardConfig(kind="math_verify", timeout=5.0)) as verifier:
        verdicts = verifier.score(
            [("#6/2", "3"), ("#10^{10^{10}}", "3"), ("#9/3", "3"), ("#4", "3"), ("", "3")]
        )
    assert [verdict.cause for verdict in verdicts] == [
        "correct",
        "timeout",
        "correct",
        "wrong",
        "no_answer",
    ]


def test_what_a_comparison_raises_is_an_error_with_its_message(strict: Verifier) -> None:
    """Nothing in the response; the reference cannot be read at all."""
    (verdict,) = strict.score([("#5", "$")])
    assert (verdict.reward, verdict.cause) == (0.0, "error")
    assert "the reference answer '$' is not mathematics" in verdict.message


def test_a_raising_reading_is_an_error_unless_another_is_equal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import math_verify

    def verify(gold: str, target: str, **_: object) -> bool:
        if gold == target:
            return True
        raise RecursionError("too deep")

    readings = {"a": ["1", "2"], "b": ["2"], "c": ["3"]}
    monkeypatch.setattr(math_verify, "parse", lambda text, **_: readings[text])
    monkeypatch.setattr(math_verify, "verify", verify)
    assert compare("b", "a") == Verdict(1.0, "correct")
    assert compare("c", "a") == Verdict(0.0, "error", "RecursionError")


def test_a_worker_that_dies_is_an_error_and_is_replaced(strict: Verifier) -> None:
    dead = rewards._finish(strict._pool.schedule(os._exit, args=(3,)))
    assert (dead.reward, dead.cause) == (0.0, "error")
    assert "ProcessExpired" in dead.message
    greedy = rewards._finish(strict._pool.schedule(bytearray, args=(rewards.MEMORY_LIMIT,)))
    assert greedy.cause == "error"
    assert "MemoryError" in greedy.message
    assert strict.score([("#5", "5.0")])[0].cause in ("correct", "timeout")


def test_workers_do_not_import_jax(patient: Verifier) -> None:
    code = "sorted({'jax', 'math_verify'} & set(__import__('sys').modules))"
    assert patient._pool.schedule(eval, args=(code,)).result() == ["math_verify"]


def test_the_module_imports_neither_jax_nor_math_verify() -> None:
    code = (
        "import sys, jaxrl_llm.data.rewards; "
        "print({'jax', 'math_verify', 'sympy', 'pebble', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


def test_scores_come_back_from_a_thread_too(patient: Verifier) -> None:
    """math-verify alone fails there: its own time limit needs the main thread."""
    import threading

    verdicts: list[Verdict] = []
    thread = threading.Thread(
        target=lambda: verdicts.extend(patient.score([(r"\boxed{6/2}", "3")]))
    )
    thread.start()
    thread.join()
    assert verdicts == [Verdict(1.0, "correct")]


def test_workers_that_cannot_start_are_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "compare", os._exit)
    monkeypatch.setattr(rewards, "_prepare_worker", os.getpid)
    with pytest.raises(RuntimeError, match='put its work under `if __name__ == "__main__":`'):
        Verifier(RewardConfig(kind="math_verify", workers=1)).__enter__()


def test_a_closed_verifier_and_an_empty_reference_are_refused() -> None:
    verifier = Verifier(RewardConfig(kind="math_verify"))
    with pytest.raises(RuntimeError, match="the verifier is not running"):
        verifier.score([("#1", "1")])
    verifier.close()
    with pytest.raises(ValueError, match="pair 1: the reference answer is empty"):
        Verifier(RewardConfig()).score([("#1", "1"), ("#", " ")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"marker": " "}, "reward marker is ' '"),
        ({"timeout": 0.0}, "timeout is 0.0"),
        ({"workers": 0}, "workers is 0"),
        ({"answer_limit": -1}, "answer_limit is -1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig(**settings)
