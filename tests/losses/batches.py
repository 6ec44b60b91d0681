"""Small batches for the loss tests: three responses in two packed rows and a row of padding."""

import dataclasses

import numpy as np

from jaxrl_llm.arrays import TrainBatch

#                        prompt of 2, response of 3 | prompt of 1, response of 2
SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0, 0], [0] * 8], np.int32)
MASK = np.array(
    [[0, 1, 1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0], [0] * 8], bool
)  # the last position of a segment whose targets cross into nothing is not sampled


def poison(values: np.ndarray, mask: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Values with NaN, -inf and inf off the mask."""
    rubbish = np.random.default_rng(seed).choice([np.nan, -np.inf, np.inf], values.shape)
    return np.where(mask, values, rubbish).astype(np.float32)


def random_batch(
    seed: int, *, mask: np.ndarray = MASK, segment_ids: np.ndarray = SEGMENTS, spread: float = 0.5
) -> tuple[np.ndarray, np.ndarray, TrainBatch]:
    """(logprobs, entropy, batch), all rubbish off the mask.

    `spread` is the standard deviation, in nats, of the log-ratios between the policies: at 0.5 the
    clip mask closes on either side and ratios pass 2.
    """
    rng = np.random.default_rng(seed)

    def near(logprobs: np.ndarray) -> np.ndarray:
        moved = logprobs + spread * rng.normal(size=mask.shape)
        return poison(np.minimum(moved, -0.01), mask)  # still a probability

    logprobs = -rng.uniform(0.1, 3, mask.shape)
    zeros = np.zeros(mask.shape, np.int32)
    batch = TrainBatch(
        inputs=zeros,
        targets=zeros,
        positions=zeros,
        segment_ids=segment_ids,
        staleness=zeros,
        loss_mask=mask,
        sampler_logprobs=near(logprobs),
        advantages=poison(rng.choice([-1.5, -0.25, 0.0, 0.5, 1.0], mask.shape), mask),
        old_logprobs=near(logprobs),
        ref_logprobs=near(logprobs),
    )
    entropy = poison(rng.uniform(0, 2, mask.shape), mask)
    return poison(logprobs, mask), entropy, batch


def ragged_layout(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(mask, segment_ids) of 4 packed rows: responses of any length, gaps in the mask, padding."""
    rng = np.random.default_rng([seed, 1])
    segments, mask = np.zeros((4, 8), np.int32), np.zeros((4, 8), bool)
    for row in range(3):
        ends = np.sort(rng.choice(np.arange(1, 9), size=rng.integers(1, 5), replace=False))
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True), start=1):
            segments[row, start:end] = number
            mask[row, start:end] = rng.random(end - start) < 0.7
    return mask, segments


def as_dict(batch: TrainBatch) -> dict[str, np.ndarray | None]:
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


def per_response(batch: TrainBatch, advantages: list[float]) -> TrainBatch:
    """The batch with one advantage for each of its three responses."""
    values = np.zeros(batch.loss_mask.shape)
    places = [(0, 1), (0, 2), (1, 1)]  # row and segment
    for (row, segment), advantage in zip(places, advantages, strict=True):
        values[row, batch.segment_ids[row] == segment] = advantage
    return dataclasses.replace(batch, advantages=poison(values, batch.loss_mask))
