"""The addition task: right sums, distinct problems, and mistakes that are followed through."""

import numpy as np
import pytest

from jaxrl_llm.data.demonstrations import make_demonstrations
from jaxrl_llm.data.tasks import ALPHABET, LARGEST, MARKER, SMALLEST, corrupt, demonstrate, generate
from jaxrl_llm.data.tokenizer import CharacterTokenizer
from jaxrl_llm.types import Prompt

SHARE = 0.2


def columns(text: str) -> tuple[list[list[int]], list[int]]:
    """[first operand digit, second, carry out, sum digit] from the units up, and the answer."""
    scratch, answer = text.split(MARKER)
    digits = [int(character) for character in scratch]
    return [digits[i : i + 4] for i in range(0, len(digits), 4)], [int(c) for c in answer]


def mistakes(prompt: str, text: str) -> list[bool]:
    """Per scratch digit: does it differ from what the text before it demands?"""
    found = []
    carry = 0
    for place, (a, b, carry_out, digit) in enumerate(columns(text)[0]):
        total = a + b + carry
        wanted = (int(prompt[2 - place]), int(prompt[6 - place]), total // 10, total % 10)
        found += [w != g for w, g in zip(wanted, (a, b, carry_out, digit), strict=True)]
        carry = carry_out
    return found


def test_a_demonstration_by_hand() -> None:
    assert demonstrate("347+085=") == "7512" + "4813" + "3004" + "#" + "0432"
    assert demonstrate("999+999=") == "9918" + "9919" + "9919" + "#" + "1998"


def test_problems_are_right_distinct_and_of_fixed_width() -> None:
    problems = generate(seed=3, count=5000)
    assert len({problem.prompt for problem in problems}) == 5000
    seen = set()
    for problem in problems:
        left, right = (int(number) for number in problem.prompt.rstrip("=").split("+"))
        seen |= {left, right}
        assert problem.answer == f"{left + right:04d}"
        assert problem.demonstration.endswith(f"{MARKER}{problem.answer}")
        assert not any(mistakes(problem.prompt, problem.demonstration))
        assert (len(problem.prompt), len(problem.demonstration)) == (8, 17)
        assert set(problem.prompt + problem.demonstration) <= set(ALPHABET)
    assert min(seen) == SMALLEST
    assert max(seen) == LARGEST


def test_problems_depend_on_the_seed_alone() -> None:
    assert generate(1, 20) == generate(1, 20)
    assert generate(1, 20) != generate(2, 20)


def test_corruption_has_the_asked_share_in_every_place_and_is_followed_through() -> None:
    rng = np.random.default_rng(0)
    prompts = [problem.prompt for problem in generate(0, 4000)]
    texts = [corrupt(prompt, rng, SHARE) for prompt in prompts]
    rates = np.mean(
        [mistakes(prompt, text) for prompt, text in zip(prompts, texts, strict=True)], axis=0
    )
    # Four standard errors of 4,000 draws.
    np.testing.assert_allclose(rates, SHARE, atol=4 * np.sqrt(SHARE * (1 - SHARE) / 4000))
    for text in texts:
        worked, answer = columns(text)
        assert answer == [worked[-1][2], *(column[3] for column in reversed(worked))]


def test_a_single_mistake_changes_the_answer() -> None:
    """So a sampled response is right only if no scratch digit went wrong."""
    rng = np.random.default_rng(0)
    prompt = "347+085="
    single = 0
    for text in (corrupt(prompt, rng, 0.1) for _ in range(500)):
        if sum(mistakes(prompt, text)) == 1:
            single += 1
            assert not text.endswith("#0432")
    assert single > 50


@pytest.mark.parametrize("prompt", ["347+85=", "347+085", "34a+085=", "347-085=", "", "²47+085="])
def test_a_strange_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="is no addition prompt"):
        demonstrate(prompt)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share of corrupted digits"):
        corrupt("347+085=", np.random.default_rng(0), share)


def test_more_problems_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="980100 distinct prompts"):
        generate(0, 980_101)


def make_prompt(tokenizer: CharacterTokenizer, text: str, demonstration: str) -> Prompt:
    return Prompt(text, np.array(tokenizer.encode(text), np.int32), text, "0432", demonstration)


def test_demonstration_tokens_end_with_stop_and_mask_exactly_the_response() -> None:
    tokenizer = CharacterTokenizer(ALPHABET)
    text = "347+085="
    prompt = make_prompt(tokenizer, text, demonstrate(text))
    (made,) = make_demonstrations([prompt], tokenizer, corrupted_share=0.0, seed=0)
    assert made.tokens.tolist() == [*tokenizer.encode(text + demonstrate(text)), 1]
    targets = made.tokens[1:]
    assert targets[made.loss_mask].tolist() == [*tokenizer.encode(demonstrate(text)), 1]
    assert made.loss_mask.shape == targets.shape


def test_demonstrations_are_a_function_of_the_seed() -> None:
    tokenizer = CharacterTokenizer(ALPHABET)
    prompts = [make_prompt(tokenizer, p.prompt, p.demonstration) for p in generate(0, 8)]

    def texts(seed: int) -> list[str]:
        made = make_demonstrations(prompts, tokenizer, corrupted_share=0.3, seed=seed)
        return [tokenizer.decode(d.tokens.tolist()) for d in made]

    assert texts(0) == texts(0)
    assert texts(0) != texts(1)
    assert texts(0) != [p.text + p.demonstration for p in prompts]


def test_a_prompt_without_demonstration_is_named() -> None:
    tokenizer = CharacterTokenizer(ALPHABET)
    prompt = make_prompt(tokenizer, "347+085=", "")
    with pytest.raises(ValueError, match=r"prompt '347\+085=' has no demonstration"):
        make_demonstrations([prompt], tokenizer, corrupted_share=0.0, seed=0)
