"""RunConfig: all settings of a run, nested from the parts' own configs.

What it is: the one tree of frozen dataclasses behind configs/*.py, the command line and
config.json, and the place where settings of different parts are checked against each other. What it
is not: defaults for an experiment; those live in configs/, one file each.
"""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
from pathlib import Path
from typing import Any, Literal

import cattrs

from jaxrl_llm.data.prompts import DataConfig
from jaxrl_llm.data.rewards import RewardConfig
from jaxrl_llm.data.tokenizer import TokenizerConfig
from jaxrl_llm.evaluate import EvaluationConfig
from jaxrl_llm.learner.checkpoint import CheckpointConfig
from jaxrl_llm.learner.publish import PublishConfig
from jaxrl_llm.learner.state import OptimizerConfig
from jaxrl_llm.learner.step import LearnerConfig
from jaxrl_llm.learner.tighten import check_tightening
from jaxrl_llm.losses.policy import LossConfig
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.rollout.buffer import BufferConfig
from jaxrl_llm.rollout.local import LocalEngineConfig
from jaxrl_llm.rollout.sglang import SGLangConfig
from jaxrl_llm.rollout.wire import GREEDY_BELOW, unscorable
from jaxrl_llm.runlog import RunLogConfig
from jaxrl_llm.types import SamplingParams


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What is asked and how an answer is judged."""

    data: DataConfig  # prompts and their splits
    tokenizer: TokenizerConfig = TokenizerConfig()  # text to token ids
    reward: RewardConfig = RewardConfig()  # the verifier


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How a rollout batch is sampled.

    Always from the full distribution: under top-p or top-k the sampler's probabilities would be
    renormalised and the learner's not, and importance weights would measure the truncation. An
    evaluation may truncate (EvaluationConfig).
    """

    groups: int = 32  # prompts in a rollout batch, G
    samples: int = 8  # responses to each prompt, N
    max_new_tokens: int = 256  # longest response, stop token included
    temperature: float = 1.0  # of sampling; the learner scores at the same one
    # Groups that are sampled but not learned from: those of equal rewards have no gradient
    # (DAPO's dynamic sampling, arXiv 2503.14476).
    filter: Literal["none", "equal_rewards"] = "none"
    # Prompts asked for per group that is missing, for filters to choose among. With max_staleness 0
    # a step waits for all that it asked for, also when it has its groups.
    oversample: float = 1.0
    refills: int = 3  # times a step may ask for more, after failures and filters
    # Rollout batches sampled ahead of the learner: max_staleness 1 trains on what the previous
    # weights sampled, 0 on what the current ones did.
    buffer: BufferConfig = BufferConfig()
    engine: LocalEngineConfig = LocalEngineConfig()  # in-process, used where there are no servers
    sglang: SGLangConfig = SGLangConfig()  # SGLang servers
    publish: PublishConfig = PublishConfig()  # weights on their way to the servers

    def __post_init__(self) -> None:
        for name, least in (("groups", 1), ("samples", 2), ("oversample", 1), ("refills", 0)):
            value = vars(self)[name]
            if not value >= least:
                raise ValueError(f"rollout.{name} is {value}; it must be at least {least}")
        if self.temperature == 0:
            raise ValueError(
                "rollout.temperature is 0: greedy rollouts are all equal and have no gradient; "
                "use a positive temperature"
            )
        self.sampling(())

    @property
    def max_length(self) -> int:
        """Longest prompt plus response, in tokens, that the engine in use takes."""
        return self.sglang.max_length if self.sglang.servers else self.engine.max_length

    def sampling(self, stop_token_ids: tuple[int, ...]) -> SamplingParams:
        """The sampling settings of a request."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            stop_token_ids=stop_token_ids,
            temperature=self.temperature,
        )


@dataclasses.dataclass(frozen=True)
class ColdStartConfig:
    """Where training starts: given or random weights, then supervised training."""

    weights: str = ""  # Hugging Face folder to start from; "": random weights
    steps: int = 0  # updates; 0 starts RL from the initial weights
    batch: int = 64  # demonstrations per update
    # Probability that a scratch digit of a demonstration is wrong. It keeps sampled accuracy low
    # while greedy accuracy is high: the skill is there for RL to sharpen.
    corrupted_share: float = 0.0
    optimizer: OptimizerConfig = OptimizerConfig()  # of the cold start; RL has its own

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1:
            raise ValueError(
                f"cold_start.steps is {self.steps} and cold_start.batch {self.batch}; "
                "they must be at least 0 and 1"
            )

    @property
    def prompts(self) -> int:
        """Prompts of the training split that the whole cold start draws."""
        return self.steps * self.batch


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A whole experiment."""

    steps: int  # RL steps: rollout batches learned from
    model: ModelConfig  # the architecture
    task: TaskConfig  # prompts, tokenizer, reward
    rollout: RolloutConfig  # sampling
    learner: LearnerConfig  # updates
    run_dir: str = "runs/{seed}"  # where everything is written; {seed} is filled in
    seed: int = 0  # of weights, data order, sampling and evaluation
    loss: LossConfig = LossConfig()  # the objective
    cold_start: ColdStartConfig = ColdStartConfig()  # supervised start
    evaluation: EvaluationConfig = EvaluationConfig()  # on the held-out split
    checkpoint: CheckpointConfig = CheckpointConfig()  # what is saved and kept
    log: RunLogConfig = RunLogConfig()  # what the run leaves to read

    def __post_init__(self) -> None:
        _check(self)

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.run_dir.replace("{seed}", str(self.seed)))

    @property
    def responses(self) -> int:
        """Responses of a mini-batch."""
        return self.rollout.groups // self.learner.mini_batches * self.rollout.samples

    @property
    def row_length(self) -> int:
        """Positions of a row, S: they divide over the context axis."""
        wanted = self.learner.row_length or self.rollout.max_length - 1
        return -(-wanted // self.learner.mesh.context) * self.learner.mesh.context

    def rows(self, needed: int) -> int:
        """`needed` rows and those of padding that fill the last micro-batch on all devices."""
        multiple = self.learner.row_multiple
        return -(-needed // multiple) * multiple


def _check(config: RunConfig) -> None:
    """Contradictions between parts, each with its remedy."""
    rollout, learner, loss = config.rollout, config.learner, config.loss
    if config.steps < 0:
        raise ValueError(f"steps is {config.steps}; it must be at least 0")
    if rollout.groups % learner.mini_batches:
        raise ValueError(
            f"rollout.groups is {rollout.groups}, which does not split into learner.mini_batches "
            f"= {learner.mini_batches} equal parts; change one of them"
        )
    engine = "sglang" if rollout.sglang.servers else "engine"
    if rollout.max_new_tokens >= rollout.max_length:
        raise ValueError(
            f"rollout.max_new_tokens is {rollout.max_new_tokens}, which leaves no token for a "
            f"prompt in rollout.{engine}.max_length = {rollout.max_length}; change one of them"
        )
    if 0 < learner.row_length < rollout.max_length - 1:
        raise ValueError(
            f"learner.row_length is {learner.row_length}, too short for the longest sequence of "
            f"rollout.{engine}.max_length = {rollout.max_length} tokens; make it at least "
            f"{rollout.max_length - 1}, or 0"
        )
    if learner.old_logprobs == "none" and learner.mini_batches > 1 and loss.reads_old:
        raise ValueError(
            f"learner.old_logprobs is 'none' with learner.mini_batches = {learner.mini_batches}: "
            "after the first update pi_old is no longer the current policy, and the loss reads it "
            f"(loss.clip.anchor {loss.clip.anchor!r}, loss.importance.ratio "
            f"{loss.importance.ratio!r}, loss.rejection.ratio {loss.rejection.ratio!r}); set "
            "learner.old_logprobs to 'score', or anchor both on the sampler"
        )
    _check_watch(config)
    _check_servers(config)


def _check_servers(config: RunConfig) -> None:
    """What the servers cannot do, or would do only to be refused at the loss."""
    rollout, learner, evaluation = config.rollout, config.learner, config.evaluation
    if not rollout.sglang.servers:
        return
    if dense := config.model.moe.dense_layers:
        # Seen in 0.5.23: it never reads mlp_only_layers, gives all layers experts, leaves those
        # that no tensor fills random, and says nothing.
        raise ValueError(
            f"model.moe.dense_layers is {dense}, but SGLang computes every layer of a Qwen3-MoE "
            "with experts; leave rollout.sglang.servers empty, to sample with the in-process "
            "engine, or use a model without dense layers"
        )
    if rollout.temperature < GREEDY_BELOW:
        raise ValueError(
            f"rollout.temperature is {rollout.temperature}, which SGLang takes for greedy "
            f"sampling; make it at least {GREEDY_BELOW}"
        )
    truncated = dataclasses.replace(
        rollout.sampling(()), top_p=evaluation.top_p, top_k=evaluation.top_k
    )
    if reason := unscorable(truncated):
        raise ValueError(
            f"evaluation.top_p is {evaluation.top_p} and evaluation.top_k {evaluation.top_k}: "
            f"{reason}"
        )
    spans = rollout.sglang.on_publish != "abort" and rollout.buffer.max_staleness > 0
    replayed = learner.replay == "r3" and not rollout.sglang.keep_spanning_routes
    if spans and replayed and learner.route_fallback == "error":
        raise ValueError(
            f"rollout.sglang.on_publish is {rollout.sglang.on_publish!r}: responses under way at a "
            "publish span two versions and come without routes, which learner.replay r3 with "
            "learner.route_fallback 'error' refuses; set route_fallback to 'live', on_publish to "
            "'abort', or rollout.sglang.keep_spanning_routes"
        )


def _check_watch(config: RunConfig) -> None:
    """What the action of the early warning needs of other parts."""
    watch, checkpoint = config.learner.watch, config.checkpoint
    if watch.action == "tighten":
        check_tightening(config.loss)
    if watch.action == "roll_back":
        # The newest regular checkpoints may be of steps at which the rule held already, and the
        # next newest may have been rolled back from.
        spoiled = 2 * -(-watch.patience // checkpoint.every) if checkpoint.every else 0
        if not checkpoint.every or checkpoint.keep_last <= spoiled:
            raise ValueError(
                f"learner.watch.action is roll_back with checkpoint.every {checkpoint.every} and "
                f"checkpoint.keep_last {checkpoint.keep_last}: no checkpoint from before an alarm "
                f"would be left; make checkpoint.every positive and keep_last at least "
                f"{spoiled + 1}"
            )


def to_json(config: RunConfig) -> dict[str, Any]:
    """The config as plain JSON values, infinities as text; inverse of from_json."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, float) and math.isinf(value) else value

    values: dict[str, Any] = plain(dataclasses.asdict(config))
    return values


def from_json(values: dict[str, Any]) -> RunConfig:
    """Inverse of to_json. ValueError naming every unknown, missing or invalid field."""
    converter = cattrs.Converter(forbid_extra_keys=True)
    try:
        return converter.structure(values, RunConfig)
    except cattrs.BaseValidationError as error:
        problems = cattrs.transform_error(error, path="config", format_exception=_explain)
        raise ValueError("; ".join(problems)) from error


def _explain(error: BaseException, kind: type | None) -> str:
    if isinstance(error, ValueError):
        return str(error)
    return cattrs.v.format_exception(error, kind)


def read_config(path: Path) -> RunConfig:
    """The config.json of a run directory; ValueError naming the file and what is wrong in it."""
    try:
        return from_json(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as the settings of a run: {error}") from error


def load_config(path: Path) -> RunConfig:
    """What get_config() of a Python file returns; ValueError if there is no such thing."""
    if not path.is_file():
        raise ValueError(f"{path} is no file; give a config such as configs/quickstart.py")
    namespace = runpy.run_path(str(path))
    if "get_config" not in namespace:
        raise ValueError(f"{path} defines no get_config(); see configs/quickstart.py for one")
    config = namespace["get_config"]()
    if not isinstance(config, RunConfig):
        raise ValueError(f"get_config() of {path} returned {type(config).__name__}, no RunConfig")
    return config


# Where the servers are, how patient the learner is with them and how weights reach them. A run may
# go on with other ones: they decide whether a rollout arrives, not what it is drawn from.
_OPERATIONAL = {
    "sglang": (
        "api_key_env",
        "concurrency",
        "attempts",
        "request_seconds",
        "health_seconds",
        "update_seconds",
        "probe_tolerance",
        "journal",
    ),
    "publish": ("folder", "server_folder", "keep"),
}


def differences(left: RunConfig, right: RunConfig) -> list[str]:
    """Dotted names of settings that differ, with both values.

    Left out is what makes no other experiment: run_dir, the mesh, the addresses of servers where
    both have some, and what else operates them.
    """
    a, b = to_json(left), to_json(right)
    both = left.rollout.sglang.servers and right.rollout.sglang.servers
    for values in (a, b):
        del values["run_dir"]
        del values["learner"]["mesh"]
        for part, names in _OPERATIONAL.items():
            for name in names:
                del values["rollout"][part][name]
        if both:
            del values["rollout"]["sglang"]["servers"]
    return unequal(a, b)


def unequal(left: Any, right: Any, path: str = "") -> list[str]:
    """Dotted names, below `path`, at which nested dicts differ, with both values."""
    if isinstance(left, dict) and isinstance(right, dict):
        names = sorted(left.keys() | right.keys())
        found = (unequal(left.get(n), right.get(n), f"{path}.{n}") for n in names)
        return [line for lines in found for line in lines]
    return [] if left == right else [f"{path.removeprefix('.')}: {left!r} != {right!r}"]
