"""The algorithms of the family as settings of one loss. README.md beside this file has the table.

    from jaxrl_llm.losses import presets
    loss = presets.dapo()                                    # as its paper has it
    loss = dataclasses.replace(presets.grpo(), kl=KLConfig())    # without the penalty

Each returns a LossConfig with what its paper fixes, importance weight and clip included; whatever a
paper leaves open is said in the docstring. None but minirl(), decoupled_ppo() and the two DPPOs
correct for the difference between inference and training engine, because their papers do not: give
them importance.ratio "mismatch" where the engines differ. What this is not: the parts of an
algorithm outside of the loss, such as DAPO's dynamic sampling or a critic.
"""

from __future__ import annotations

import math

from jaxrl_llm.losses.advantages import AdvantageConfig
from jaxrl_llm.losses.clipping import ClipConfig
from jaxrl_llm.losses.kl import KLConfig
from jaxrl_llm.losses.policy import LossConfig
from jaxrl_llm.losses.weights import ImportanceConfig

_STALENESS = ImportanceConfig(ratio="staleness", high=math.inf)
"""PPO's ratio pi / pi_old, bounded by nothing but the clip."""

_NO_CLIP = ClipConfig(kind="none")


def minirl() -> LossConfig:
    """MiniRL (arXiv 2512.01374): min(pi/mu, 5), masked outside 0.8 to 1.27 of pi/pi_old."""
    return LossConfig()


def reinforce() -> LossConfig:
    """REINFORCE (Williams, 1992) without a baseline: A = R, on-policy, no correction."""
    return LossConfig(
        advantage=AdvantageConfig(baseline="none"),
        importance=ImportanceConfig(ratio="off"),
        clip=_NO_CLIP,
    )


def rloo() -> LossConfig:
    """RLOO (arXiv 2402.14740): REINFORCE with the mean of the other responses as baseline."""
    return LossConfig(
        advantage=AdvantageConfig(baseline="leave_one_out"),
        importance=ImportanceConfig(ratio="off"),
        clip=_NO_CLIP,
    )


def ppo() -> LossConfig:
    """PPO's clipped objective (arXiv 1707.06347), epsilon 0.2, on group advantages for a critic's.

    clip.dual = 3 makes it dual-clip PPO (arXiv 1912.09729).
    """
    return LossConfig(
        form="ratio", importance=_STALENESS, clip=ClipConfig(high=0.2), averaging="token"
    )


def decoupled_ppo() -> LossConfig:
    """Decoupled PPO (arXiv 2110.00641): PPO's clip around pi_old, times the weight pi_old/mu.

    The weight is truncated at 5, as AReaL (arXiv 2505.24298) does; importance.high = inf for the
    original.
    """
    return LossConfig(
        form="ratio",
        importance=ImportanceConfig(ratio="mismatch"),
        clip=ClipConfig(high=0.2),
        averaging="token",
    )


def grpo() -> LossConfig:
    """GRPO (arXiv 2402.03300): PPO's clip, A over the group's std, mean over a response's tokens.

    Its penalty, 0.04 of k3 on the sampled tokens as they are, needs a reference policy.
    """
    return LossConfig(
        advantage=AdvantageConfig(scale="std"),
        form="ratio",
        importance=_STALENESS,
        clip=ClipConfig(high=0.2),
        averaging="sequence",
        kl=KLConfig(coefficient=0.04, estimator="k3", weight="none"),
    )


def dr_grpo(max_tokens: int) -> LossConfig:
    """Dr. GRPO (arXiv 2503.20783): GRPO without std, without penalty, tokens over a constant.

    max_tokens is that constant, the longest response allowed.
    """
    return LossConfig(
        form="ratio",
        importance=_STALENESS,
        clip=ClipConfig(high=0.2),
        averaging="constant",
        averaging_length=max_tokens,
    )


def dapo() -> LossConfig:
    """DAPO (arXiv 2503.14476): clip-higher 0.28, mean over all tokens, overlong responses masked.

    Its dynamic sampling and soft overlong punishment are not part of a loss.
    """
    return LossConfig(
        advantage=AdvantageConfig(scale="std", overlong="mask"),
        form="ratio",
        importance=_STALENESS,
        clip=ClipConfig(high=0.28),
        averaging="token",
    )


def gspo() -> LossConfig:
    """GSPO (arXiv 2507.18071), its token form (eq. 13): the ratio is the response's geometric mean.

    s_it = sg(s_i) * pi / sg(pi) weighs every token of response i; clipped at 3e-4 below and 4e-4
    above 1.
    """
    return LossConfig(
        advantage=AdvantageConfig(scale="std"),
        form="ratio",
        importance=ImportanceConfig(ratio="staleness", level="geometric", high=math.inf),
        clip=ClipConfig(level="geometric", low=3e-4, high=4e-4),
        averaging="sequence",
    )


def cispo() -> LossConfig:
    """CISPO (arXiv 2506.13585): the weight pi/pi_old is clipped, and no token is ever masked.

    importance.low and high bound the weight itself: low = 1 - epsilon_low, high = 1 + epsilon_high.
    The paper bounds it from above only; its epsilon_high is not given, and 4 is a choice.
    """
    return LossConfig(
        advantage=AdvantageConfig(scale="std"),
        importance=ImportanceConfig(ratio="staleness", high=5.0),
        clip=_NO_CLIP,
        averaging="token",
    )


def dppo_tv() -> LossConfig:
    """DPPO (arXiv 2602.04879) with the binary total variation from mu, bounded at 0.15.

    Bound, truncation of pi/mu at 20 and averaging are those of its recipe in verl.
    """
    return LossConfig(
        advantage=AdvantageConfig(scale="std"),
        importance=ImportanceConfig(ratio="sampler", high=20.0),
        clip=ClipConfig(kind="tv", anchor="sampler", low=0.15, high=0.15),
        averaging="token",
    )


def dppo_kl() -> LossConfig:
    """DPPO (arXiv 2602.04879) with the binary KL from mu, bounded at 0.05 nats; else dppo_tv()."""
    return LossConfig(
        advantage=AdvantageConfig(scale="std"),
        importance=ImportanceConfig(ratio="sampler", high=20.0),
        clip=ClipConfig(kind="kl", anchor="sampler", low=0.05, high=0.05),
        averaging="token",
    )
