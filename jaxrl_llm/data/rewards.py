"""Verified rewards: is the answer in a response the reference answer?

What it is: extraction of the answer, and two ways to compare it: as text, or as mathematics with
math-verify in worker processes. What it is not: a reward model; a reward is 0 or 1, and every 0 has
a cause that can be counted.

math-verify runs computer algebra on text that a policy wrote, and some of it never returns
(10^{10^{10}}) or eats all memory. Its own time limit needs the main thread's SIGALRM and fails in
threads. So it runs in processes with bounded memory, which are killed when their time is over.
This module stays light to import: workers import it, and never jax.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import multiprocessing
import re
import resource
import sys
import types
from collections.abc import Sequence
from typing import Any, Literal, Self

Cause = Literal["correct", "wrong", "no_answer", "too_long", "unparsable", "timeout", "error"]

MEMORY_LIMIT = 4 * 2**30
"""Address space of a worker in bytes; beyond it Python raises MemoryError, counted as "error"."""

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
"""An opening \\boxed, an escaped character, or a brace."""

WARM_UP_SECONDS = 120
"""Time for a worker to start and import its libraries, on a busy machine."""


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """Where the answer of a response is, and how it is compared with the reference answer."""

    # "exact": equal as text; "math_verify": equal as mathematics.
    kind: Literal["exact", "math_verify"] = "exact"
    # "marker": the line after the last `marker`; "boxed": inside the last \boxed{}; "whole": the
    # whole response, in which math_verify searches an expression itself.
    extraction: Literal["marker", "boxed", "whole"] = "marker"
    # Text in front of the answer, for extraction "marker".
    marker: str = "#"
    # math_verify: longest answer in characters that is looked at ("whole": the response's end).
    answer_limit: int = 2000
    # math_verify: seconds of one comparison, after which its worker is killed.
    timeout: float = 5.0
    # math_verify: number of worker processes.
    workers: int = 2

    def __post_init__(self) -> None:
        if self.extraction == "marker" and not self.marker.strip():
            raise ValueError(
                f"reward marker is {self.marker!r}; give the text before the answer, "
                'or set extraction to "boxed" or "whole"'
            )
        for name in ("answer_limit", "timeout", "workers"):
            if getattr(self, name) <= 0:
                raise ValueError(f"reward {name} is {getattr(self, name)}; it must be positive")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The reward of one response, and why."""

    reward: float  # 1.0 iff cause is "correct", else 0.0
    cause: Cause
    message: str = ""  # what was raised, for "error"


def extract_answer(text: str, config: RewardConfig) -> str | None:
    """The answer in a response, without blanks around it; None if there is none."""
    if config.extraction == "marker":
        _, found, after = text.rpartition(config.marker)
        lines = after.strip().splitlines() if found else []
        answer = lines[0].strip() if lines else ""
    elif config.extraction == "boxed":
        answer = _last_boxed(text)
    else:
        answer = text.strip()
    return answer or None


class Verifier:
    """Scores responses; a context manager that owns the worker processes.

    with Verifier(RewardConfig(kind="math_verify", extraction="boxed")) as verifier:
        verdicts = verifier.score([(response, answer), ...])
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._pool: Any = None

    def __enter__(self) -> Self:
        """Start the workers; RuntimeError if they cannot work."""
        if self._config.kind == "math_verify":
            self._pool = _start_pool(self._config)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the workers, whatever they are doing; may be called twice."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """One verdict for each (response text, reference answer), in their order.

        Never raises for what a response says. Raises RuntimeError when the verifier is closed, and
        ValueError for an empty reference answer, which no response could match.
        """
        for index, (_, reference) in enumerate(pairs):
            if not reference.strip():
                raise ValueError(f"pair {index}: the reference answer is empty; repair the dataset")
        if self._config.kind == "math_verify" and self._pool is None:
            raise RuntimeError("the verifier is not running; use it as a context manager")
        started = [self._start(text, reference.strip()) for text, reference in pairs]
        return [job if isinstance(job, Verdict) else _finish(job) for job in started]

    def _start(self, text: str, reference: str) -> Verdict | concurrent.futures.Future:
        """The verdict where it is plain to see, else a comparison under way."""
        answer = extract_answer(text, self._config)
        if answer is None:
            return Verdict(0.0, "no_answer")
        # Equal texts need no algebra. This also accepts what algebra could not read.
        if answer == reference:
            return Verdict(1.0, "correct")
        if self._config.kind == "exact":
            return Verdict(0.0, "wrong")
        whole = self._config.extraction == "whole"
        if len(answer) > self._config.answer_limit:
            if not whole:
                return Verdict(0.0, "too_long")
            answer = answer[-self._config.answer_limit :]
        candidate = answer if whole else as_latex(answer)
        arguments = (candidate, as_latex(reference))
        job: concurrent.futures.Future = self._pool.schedule(
            compare, args=arguments, timeout=self._config.timeout
        )
        return job


def as_latex(answer: str) -> str:
    """An answer as a text in which math-verify sees one formula."""
    delimited = any(sign in answer for sign in ("$", "\\(", "\\[", "\\boxed"))
    return answer if delimited else f"${answer}$"


def compare(candidate: str, reference: str) -> Verdict:
    """Compare two texts as mathematics, without a time limit: runs in a worker.

    A comparison that raises counts as "error" unless another reading of the texts is equal;
    a reference that cannot be read raises.
    """
    import math_verify

    def read(text: str) -> list[Any]:
        return math_verify.parse(text, parsing_timeout=None, raise_on_error=True)

    wanted = read(reference)
    if not wanted:
        raise ValueError(f"the reference answer {reference!r} is not mathematics")
    found = read(candidate)
    failure = ""
    # Each text has up to two readings, an expression and a string (the same text, tidied).
    for gold in wanted:
        for target in found:
            try:
                if math_verify.verify(gold, target, timeout_seconds=None, raise_on_error=True):
                    return Verdict(1.0, "correct")
            except Exception as error:
                failure = type(error).__name__
    if failure:
        return Verdict(0.0, "error", failure)
    readable = any(not isinstance(target, str) for target in found)
    return Verdict(0.0, "wrong" if readable else "unparsable")


def _finish(job: concurrent.futures.Future) -> Verdict:
    try:
        verdict: Verdict = job.result()
    # In Python 3.11 and later this is the builtin TimeoutError, which a comparison could raise too;
    # both mean that time ran out.
    except concurrent.futures.TimeoutError:
        return Verdict(0.0, "timeout")
    except Exception as error:  # raised by the comparison, or the worker died
        return Verdict(0.0, "error", f"{type(error).__name__}: {error}"[:500])
    return verdict


def _start_pool(config: RewardConfig) -> Any:
    import pebble

    # A fork server has no threads and no jax, so its children are safe, and with the libraries
    # loaded beforehand a killed worker is replaced in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["math_verify", "jaxrl_llm.data.rewards"])
    pool = pebble.ProcessPool(
        max_workers=config.workers, initializer=_prepare_worker, context=context
    )
    probe = _finish(pool.schedule(compare, args=("$1/2$", "$0.5$"), timeout=WARM_UP_SECONDS))
    if probe.cause != "correct":
        pool.stop()
        pool.join()
        raise RuntimeError(
            f"math-verify workers do not work ({probe.cause}: {probe.message}). Worker processes "
            'import the main script again: put its work under `if __name__ == "__main__":`'
        )
    return pool


def _prepare_worker() -> None:
    if sys.platform == "linux":  # others refuse the limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    # It warns, once a process, that its own time limits are off: ours are on.
    logging.getLogger("math_verify").setLevel(logging.ERROR)


def _last_boxed(text: str) -> str:
    """What is inside the last \\boxed{...} with balanced braces; "" if there is none."""
    last = slice(0, 0)
    # One pass with a stack of open braces: looking for each partner anew takes quadratic time, and
    # a response of nothing but braces would stop the run. -1 stands for a brace without \\boxed.
    opened: list[int] = []
    for token in _BRACES.finditer(text):
        if token[0] == "{":
            opened.append(-1)
        elif token[0].startswith("\\boxed"):
            opened.append(token.end())
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start > last.start:
                last = slice(start, token.start())
    return text[last].strip()
