"""Evaluation on held-out prompts: average accuracy, pass@k and greedy accuracy, with intervals.

What it is: pure numpy statistics over counts of correct samples, and evaluate(), which drives any
engine through its protocol and a verifier. What it is not: a benchmark harness; prompts, stop
tokens and the verifier come from the caller.

A request that the engine failed is no wrong answer: it leaves the statistics and is counted.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import zlib
from collections.abc import Sequence

import numpy as np

from jaxrl_llm.data.rewards import Verifier
from jaxrl_llm.rollout.engine import Engine, EngineFailure, Request
from jaxrl_llm.types import Group, Prompt, Rollout, SamplingParams, without_routes


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How the held-out split is sampled and how sure the numbers are."""

    every: int = 0  # RL steps between evaluations; 0 evaluates only before and after RL
    prompts: int = 0  # prompts used, from the first on; 0 uses the whole split
    samples: int = 8  # samples of every prompt, n
    pass_k: int = 8  # the k of pass@k; at most samples
    top_p: float = 1.0  # nucleus of the samples; 1 keeps all tokens
    top_k: int = 0  # likeliest tokens kept in the samples; 0 keeps all
    greedy: bool = True  # one more sample of every prompt at temperature 0
    confidence: float = 0.95  # coverage of the intervals
    resamples: int = 2000  # bootstrap resamples of the prompts behind an interval

    def __post_init__(self) -> None:
        at_least = {"every": 0, "prompts": 0, "samples": 1, "pass_k": 1, "resamples": 100}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"evaluation.{name} is {value}; it must be at least {least}")
        if self.pass_k > self.samples:
            raise ValueError(
                f"evaluation.pass_k is {self.pass_k} but only {self.samples} samples are taken; "
                "raise evaluation.samples or lower evaluation.pass_k"
            )
        SamplingParams(max_new_tokens=1, top_p=self.top_p, top_k=self.top_k)  # checks both
        if not 0 < self.confidence < 1:
            raise ValueError(f"evaluation.confidence is {self.confidence}; it must be in (0, 1)")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its bootstrap confidence interval; all NaN without prompts."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """What evaluate() found, and the samples it found it in."""

    avg_at_k: Estimate  # fraction of samples correct
    pass_at_k: Estimate  # chance that one of pass_k samples is correct
    greedy_accuracy: Estimate | None  # None if not asked for
    verdicts: dict[str, int]  # cause -> sampled responses
    failures: dict[str, int]  # the engine's cause -> requests
    samples: int  # asked of every prompt, the k of avg@k
    pass_k: int  # the k of pass@k
    groups: tuple[
        Group, ...
    ]  # the samples with rewards, without routes, in the order of the prompts

    def metrics(self) -> dict[str, float]:
        """The eval/* values of the run log."""
        named = {"avg_at_k": self.avg_at_k, "pass_at_k": self.pass_at_k}
        if self.greedy_accuracy is not None:
            named["greedy_accuracy"] = self.greedy_accuracy
        metrics = {}
        for name, estimate in named.items():
            metrics[f"eval/{name}"] = estimate.value
            metrics[f"eval/{name}_low"] = estimate.low
            metrics[f"eval/{name}_high"] = estimate.high
        lengths = [r.response_length for group in self.groups for r in group.rollouts]
        metrics["eval/response_tokens"] = float(np.mean(lengths)) if lengths else float("nan")
        metrics["eval/prompts"] = float(len(self.groups))
        metrics["eval/samples"] = float(self.samples)
        metrics["eval/pass_k"] = float(self.pass_k)
        metrics["eval/failures"] = float(sum(self.failures.values()))
        for cause, count in sorted(self.verdicts.items()):
            metrics[f"eval/verdict_{cause}"] = float(count)
        return metrics


def avg_at_k(correct: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Share of correct samples, f64[P], from counts i[P]; NaN for a prompt without samples."""
    correct, samples = _counts(correct, samples)
    return np.divide(correct, samples, out=np.full(samples.shape, np.nan), where=samples > 0)


def pass_at_k(correct: np.ndarray, samples: np.ndarray, k: int) -> np.ndarray:
    """Unbiased estimate of the chance that one of k samples is correct, f64[P].

    1 - C(n - c, k) / C(n, k) for n samples of which c are correct (Chen et al. 2021,
    arXiv 2107.03374, eq. 1), as a product that cannot overflow.

    Args:
      correct: i[P], correct samples of every prompt, c.
      samples: i[P], samples of every prompt, n.
      k: at least 1. A prompt with fewer samples than k has no unbiased estimate: NaN.
    """
    if k < 1:
        raise ValueError(f"pass@k needs k of at least 1; got {k}")
    correct, samples = _counts(correct, samples)
    wrong = samples - correct
    missed = np.ones(samples.shape)  # chance that none of k draws without replacement is correct
    for drawn in range(k):
        missed *= (wrong - drawn) / np.maximum(samples - drawn, 1)
    return np.where(samples >= k, 1 - missed, np.nan)


def bootstrap(values: np.ndarray, *, confidence: float, resamples: int, seed: int) -> Estimate:
    """Mean over prompts with a percentile bootstrap interval.

    Whole prompts are resampled, since samples of one prompt are not independent. The interval
    shrinks to a point where all prompts agree, so read it with the number of prompts.

    Args:
      values: f64[P], one value a prompt; NaN ones (prompts without an estimate) are left out.
      confidence: coverage in (0, 1).
      resamples: number of bootstrap resamples.
      seed: makes the interval reproducible.
    """
    values = values[np.isfinite(values)]
    if values.size == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    # One resample at a time: resamples x prompts numbers would not fit for a large split.
    means = [
        np.mean(generator.choice(values, values.size), dtype=np.float64) for _ in range(resamples)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(float(np.mean(values)), float(low), float(high))


def request_seed(seed: int, prompt_id: str, sample_index: int) -> int:
    """Seed of one request: the same for the same prompt wherever it stands in the split.

    Two evaluations of a run share their random numbers, so that their difference is less noisy.
    """
    entropy = (seed, zlib.crc32(prompt_id.encode()), sample_index)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    verifier: Verifier,
    *,
    sampling: SamplingParams,
    config: EvaluationConfig,
    seed: int,
) -> EvaluationResult:
    """Samples every prompt, verifies the responses and computes the statistics.

    Args:
      engine: serves the weights that were published last.
      prompts: the held-out split, with unique prompt ids.
      verifier: scores (response text, reference answer) pairs.
      sampling: limits, stop tokens and temperature of the samples; the greedy pass takes the
        former two. Truncation is the config's.
      config: how many prompts and samples.
      seed: of the samples and of the intervals.

    Raises:
      ValueError: no prompts, or two of them share an id.
    """
    prompts = [prompts[index] for index in range(min(config.prompts or len(prompts), len(prompts)))]
    _check_prompts(prompts)
    sampling = dataclasses.replace(sampling, top_p=config.top_p, top_k=config.top_k)
    passes = _passes(prompts, sampling, config, seed)
    requests = [request for part in passes for request in part]
    failures: collections.Counter[str] = collections.Counter()
    rollouts: dict[tuple[str, int], Rollout] = {}
    for result in itertools.chain.from_iterable(engine.generate(part) for part in passes):
        if isinstance(result, EngineFailure):
            failures[result.cause] += 1
        else:
            # Nothing here reads routes, and those of a whole split would fill the memory.
            key = (result.prompt_id, result.sample_index)
            rollouts[key] = without_routes(result)
    if len(rollouts) + sum(failures.values()) != len(requests):
        raise ValueError(
            f"the engine answered {len(rollouts)} of {len(requests)} requests and failed "
            f"{sum(failures.values())}: it must answer or fail each exactly once"
        )
    answers = {prompt.prompt_id: prompt.answer for prompt in prompts}
    # In the order of the requests, not of completion: the result depends on the seed alone.
    order = [key for r in requests if (key := (r.prompt.prompt_id, r.sample_index)) in rollouts]
    verdicts = verifier.score([(rollouts[key].text, answers[key[0]]) for key in order])
    scored = {
        key: dataclasses.replace(rollouts[key], reward=verdict.reward, verdict=verdict.cause)
        for key, verdict in zip(order, verdicts, strict=True)
    }
    return _result(prompts, scored, dict(failures), config, seed)


def _passes(
    prompts: Sequence[Prompt], sampling: SamplingParams, config: EvaluationConfig, seed: int
) -> list[list[Request]]:
    """The samples 0 .. n-1 of every prompt; then, with index n, the greedy ones, if asked for.

    Apart, because SGLang draws another sample from the same seed where a greedy request shares the
    batch: which ones would be a matter of timing.
    """
    greedy = dataclasses.replace(sampling, temperature=0.0, top_p=1.0, top_k=0)
    kinds = [(sampling, range(config.samples))]
    if config.greedy:
        kinds.append((greedy, range(config.samples, config.samples + 1)))
    return [
        [
            Request(prompt, index, request_seed(seed, prompt.prompt_id, index), params)
            for prompt in prompts
            for index in indices
        ]
        for params, indices in kinds
    ]


def _result(
    prompts: Sequence[Prompt],
    scored: dict[tuple[str, int], Rollout],
    failures: dict[str, int],
    config: EvaluationConfig,
    seed: int,
) -> EvaluationResult:
    groups = []
    for prompt in prompts:
        keys = ((prompt.prompt_id, index) for index in range(config.samples))
        groups.append(Group(prompt, tuple(scored[key] for key in keys if key in scored)))
    samples = np.array([len(group.rollouts) for group in groups])
    correct = np.array([sum(map(_is_correct, group.rollouts)) for group in groups])

    def estimate(values: np.ndarray) -> Estimate:
        return bootstrap(
            values, confidence=config.confidence, resamples=config.resamples, seed=seed
        )

    greedy = [scored.get((prompt.prompt_id, config.samples)) for prompt in prompts]
    hits = [np.nan if rollout is None else float(_is_correct(rollout)) for rollout in greedy]
    causes = collections.Counter(r.verdict for group in groups for r in group.rollouts)
    return EvaluationResult(
        avg_at_k=estimate(avg_at_k(correct, samples)),
        pass_at_k=estimate(pass_at_k(correct, samples, config.pass_k)),
        greedy_accuracy=estimate(np.array(hits)) if config.greedy else None,
        verdicts=dict(causes),
        failures=failures,
        samples=config.samples,
        pass_k=config.pass_k,
        groups=tuple(groups),
    )


def _is_correct(rollout: Rollout) -> bool:
    return rollout.verdict == "correct"


def _counts(correct: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    correct, samples = np.asarray(correct), np.asarray(samples)
    if correct.shape != samples.shape or correct.ndim != 1:
        raise ValueError(
            f"correct {correct.shape} and samples {samples.shape} must both be [prompts]"
        )
    if np.any(correct < 0) or np.any(correct > samples):
        raise ValueError("a prompt has more correct samples than samples, or fewer than none")
    return correct, samples


def _check_prompts(prompts: Sequence[Prompt]) -> None:
    if not prompts:
        raise ValueError("evaluation has no prompts; give the data a held-out split")
    ids = collections.Counter(prompt.prompt_id for prompt in prompts)
    repeated = [prompt_id for prompt_id, count in ids.items() if count > 1]
    if repeated:
        raise ValueError(f"evaluation prompts must have unique ids; repeated: {repeated[:5]}")
