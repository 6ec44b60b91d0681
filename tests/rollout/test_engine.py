"""Requests and refusals: what every engine checks before it samples."""

import numpy as np
import pytest

from jaxrl_llm.rollout.engine import EngineFailure, Request, refusal
from jaxrl_llm.types import Prompt, SamplingParams


def request(tokens: list[int], max_new_tokens: int) -> Request:
    prompt = Prompt("p", np.array(tokens, np.int32), text="", answer="")
    return Request(prompt, 4, seed=0, sampling=SamplingParams(max_new_tokens))


def test_a_request_that_fits_exactly_is_not_refused() -> None:
    assert refusal(request([0, 15, 7], 5), vocab_size=16, max_length=8) is None


def test_a_request_that_is_one_token_too_long_is_refused() -> None:
    failure = refusal(request([0, 15, 7], 6), vocab_size=16, max_length=8)
    assert isinstance(failure, EngineFailure)
    assert (failure.prompt_id, failure.sample_index, failure.cause) == ("p", 4, "too_long")
    assert "max_length, 8" in failure.message


@pytest.mark.parametrize("token", [16, -1])
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    failure = refusal(request([3, token], 1), vocab_size=16, max_length=8)
    assert failure is not None
    assert failure.cause == "bad_token"
    assert f"[{token}]" in failure.message


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_must_fit_every_engine(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed is {seed}"):
        Request(
            Prompt("p", np.array([1], np.int32), text="", answer=""), 0, seed, SamplingParams(1)
        )
