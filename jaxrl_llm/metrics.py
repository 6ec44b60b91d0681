"""What every logged name means, and its unit: the glossary of metrics.jsonl.

What it is: METRICS, to which whoever logs a new name adds it. What it is not: the computation of
any of them, or the files they are written to (runlog.py). It never imports jax.
"""

from __future__ import annotations

METRICS: dict[str, str] = {
    # What was sampled.
    "rollout/reward_mean": "mean reward of the step's rollouts [reward]",
    "rollout/accuracy": "share of the step's rollouts that were verified correct [fraction]",
    "rollout/response_tokens": "mean length of a response, stop token included [tokens]",
    "rollout/truncated_fraction": "share of responses cut off at max_new_tokens [fraction]",
    "rollout/equal_reward_groups": "share of groups whose rewards are all equal: advantage 0, "
    "no gradient [fraction]",
    "rollout/verdict_*": "rollouts whose verdict had this cause [rollouts]",
    "rollout/failures": "requests that the inference engine failed [requests]",
    "rollout/dropped_groups": "groups dropped as too incomplete to train on, or too stale; with "
    "over-sampling what the step before had too many of [groups]",
    "rollout/filtered_groups": "groups that rollout.filter kept from the learner [groups]",
    "rollout/sampled_reward_mean": "mean reward of all that was verified in the step, before "
    "filters and ages [reward]",
    "rollout/staleness": "mean of learner step minus weight version of a token [steps]",
    # The servers, since the step before (rollout/sglang.py); the in-process engine has none.
    "engine/servers": "servers in use [servers]",
    "engine/rollouts": "responses that servers finished, those of an evaluation before the step "
    "included [rollouts]",
    "engine/from_journal": "rollouts that an earlier process had finished [rollouts]",
    "engine/spanning": "rollouts with tokens of two or more weight versions; their routes are not "
    "replayed unless asked for [rollouts]",
    "engine/resubmitted": "responses that a publish aborted, sampled again [requests]",
    "engine/retries": "tries that a server failed, repeated [requests]",
    "engine/servers_lost": "servers taken out [servers]",
    "engine/update_retries": "weight updates repeated at a server [updates]",
    "engine/bad_answers_*": "answers refused for this cause [requests]",
    "engine/probe_error": "mean |server - learner| log-probability of the probe, largest among the "
    "servers after the last publish [nats]",
    # What the policy looks like.
    "policy/entropy": "mean entropy of the token distribution at the sampling temperature [nats]",
    "policy/kl_sampler_old": "KL(mu || pi_old), mean of log mu - log pi_old; unbiased, "
    "can be negative [nats]",
    "policy/kl_sampler_old_k3": "KL(mu || pi_old), the k3 estimate: never negative [nats]",
    "policy/kl_ref": "KL(pi || reference) by the configured estimator, importance weighted [nats]",
    # The correction for the training-inference discrepancy and its cap.
    "is_weight/capped_fraction": "share of sampled tokens whose weight the cap cut [fraction]",
    "clip/high_fraction": "share of sampled tokens masked, A > 0 and ratio above 1 + clip.high "
    "[fraction]",
    "clip/low_fraction": "share of sampled tokens masked, A < 0 and ratio below 1 - clip.low "
    "[fraction]",
    "rejection/*": "share of sampled tokens in responses that this bound rejects [fraction]",
    # Ratios of the policies and the weight as used, and their gap by other systems' names: of
    # sampled tokens with finite log-probabilities (losses/statistics.py). More names below.
    "is_weight/used_ess_response": "effective sample size of the responses' mean weights, over "
    "their number [fraction]",
    "is_weight/abs_log_at_*": "mean |log pi - log mu| of tokens at this position of their response "
    "or of this staleness, up to the next power of two [nats]",
    "mismatch/kl_at_*": "mean log mu - log pi_old of tokens at this position of their response or "
    "of this staleness, up to the next power of two [nats]",
    "rollout_corr/kl": "KL(mu || pi_old), mean of log mu - log pi_old [nats]",
    "rollout_corr/k3_kl": "KL(mu || pi_old), the k3 estimate [nats]",
    "rollout_corr/training_ppl": "mean over responses of pi_old's perplexity [1]",
    "rollout_corr/training_log_ppl": "mean over responses of its logarithm [nats]",
    "rollout_corr/rollout_ppl": "mean over responses of mu's perplexity [1]",
    "rollout_corr/rollout_log_ppl": "mean over responses of its logarithm [nats]",
    "rollout_corr/log_ppl_diff": "mean over responses of the mean log mu - log pi_old [nats]",
    "rollout_corr/log_ppl_abs_diff": "mean over responses of its absolute value [nats]",
    "rollout_corr/log_ppl_diff_max": "its maximum over responses [nats]",
    "rollout_corr/log_ppl_diff_min": "its minimum over responses [nats]",
    "rollout_corr/ppl_ratio": "mean over responses of pi_old's perplexity over mu's [ratio]",
    "rollout_corr/chi2_token": "chi-square of pi_old from mu: mean of (pi_old / mu)^2, less 1 [1]",
    "rollout_corr/chi2_seq": "mean over responses of (product of pi_old / mu)^2, less 1 [1]",
    "nonfinite/*": "sampled tokens with NaN or infinity in this array, per mini-batch [tokens]",
    # log w = log pi - log mu split into terms, on some rows (losses/attribution.py).
    "attribution/mean_*": "mean of this term of log w [nats]",
    "attribution/abs_*": "mean absolute value of this term of log w [nats]",
    "attribution/square_*": "mean square of this term of log w [nats^2]",
    "attribution/share_*": "mean |term| over that of all terms of log w together [fraction]",
    "attribution/kl_*": "KL(mu || pi) with pi's own, pi_old's (r2) or mu's (r3) experts [nats]",
    "attribution/*": "tokens that were examined, or left out: a pass was not finite, or the "
    "sampler reported no experts [tokens]",
    # Routers and routing replay.
    "routing/agreement": "share of the sampler's experts that the learner's routers choose too; "
    "under r3 given the replayed experts of the layers below [fraction]",
    "routing/overlap_layer_*": "routing/agreement of one MoE layer, by its index among all layers "
    "[fraction]",
    "routing/live_agreement": "share of the replayed experts that the live routers would choose "
    "too, in the passes of the updates; under r2 it falls as the routers move [fraction]",
    "routing/live_overlap_layer_*": "routing/live_agreement of one MoE layer, by its index among "
    "all layers [fraction]",
    "routing/replay_coverage": "share of tokens whose forward pass used just the routes it was "
    "given; 1 when a replay fired everywhere [fraction]",
    "routing/fallback_fraction": "share of sampled tokens that the live router served although a "
    "replay is configured; the provenances unreported and missing [fraction]",
    "routing/provenance_not_replayed": "share of sampled tokens without a replay: none is "
    "configured [fraction]",
    "routing/provenance_sampler": "share of sampled tokens on the sampler's experts, r3 [fraction]",
    "routing/provenance_old": "share of sampled tokens on pi_old's experts, r2 [fraction]",
    "routing/provenance_unreported": "share of sampled tokens on the live router because the "
    "engine reported no routes for their rollout [fraction]",
    "routing/provenance_missing": "share of sampled tokens on the live router because their "
    "rollout has routes but they have none [fraction]",
    "router/z_loss": "mean of logsumexp(router logits)^2 over tokens and layers [nats^2]",
    "router/balance_loss": "load balance of the experts; 1 when uniform [1]",
    # The learner's update.
    "learner/loss": "the loss that was minimised, mean over the step's mini-batches [loss]",
    "learner/grad_norm": "global gradient norm before clipping, mean over mini-batches [norm]",
    "learner/update_norm": "global norm of the parameter update, mean over mini-batches [norm]",
    "learner/learning_rate": "learning rate, mean over mini-batches [1]",
    # The early warning, see learner/watch.py.
    "watch/alarms": "rules of the early warning that raised an alarm at this step [rules]",
    "watch/tightened": "times the early warning has tightened the loss, this step included [times]",
    "watch/roll_backs": "times the early warning has rolled the weights back, this step included "
    "[times]",
    "watch/dropped_groups": "groups sampled ahead that a roll back dropped at this step [groups]",
    # Evaluation on the held-out split.
    "eval/avg_at_k": "mean accuracy over k samples of every prompt [fraction]",
    "eval/avg_at_k_low": "lower end of its confidence interval, prompts resampled [fraction]",
    "eval/avg_at_k_high": "upper end of its confidence interval, prompts resampled [fraction]",
    "eval/pass_at_k": "chance that at least one of k samples is correct, unbiased [fraction]",
    "eval/pass_at_k_low": "lower end of its confidence interval, prompts resampled [fraction]",
    "eval/pass_at_k_high": "upper end of its confidence interval, prompts resampled [fraction]",
    "eval/greedy_accuracy": "accuracy at temperature 0, one sample of every prompt [fraction]",
    "eval/greedy_accuracy_low": "lower end of its confidence interval [fraction]",
    "eval/greedy_accuracy_high": "upper end of its confidence interval [fraction]",
    "eval/prompts": "size of the evaluated split [prompts]",
    "eval/samples": "samples of every prompt, the k of avg@k [samples]",
    "eval/pass_k": "the k of pass@k [samples]",
    "eval/verdict_*": "sampled responses whose verdict had this cause [rollouts]",
    "eval/failures": "requests that the inference engine failed [requests]",
    "eval/response_tokens": "mean length of a sampled response [tokens]",
    # Where the time went; timings are not reproducible and stand apart from the metrics.
    "seconds/rollout": "sampling [s]",
    "seconds/reward": "verifying answers [s]",
    "seconds/spread": "mini-batches from the host to the devices of all processes [s]",
    "seconds/score": "old log-probabilities and the learner's own routes [s]",
    "seconds/update": "gradient steps [s]",
    "seconds/attribution": "passes that split log w into its causes, every few steps [s]",
    "seconds/publish": "handing the new weights to the inference engine [s]",
    "seconds/step": "the whole step, evaluation left out [s]",
    "seconds/evaluate": "evaluation on the held-out split [s]",
    "rate/rollout_tokens_per_second": "sampled tokens over seconds/rollout [tokens/s]",
    "rate/learner_tokens_per_second": "trained tokens over seconds/score + update [tokens/s]",
}
"""Every logged name -> meaning [unit]. A name ending in * documents a prefix."""

_RATIOS = {
    "is_weight/raw_": "pi / mu, before any bound",
    "is_weight/used_": "the importance weight w as it entered the loss",
    "mismatch/ratio_": "pi_old / mu",
    "staleness/ratio_": "pi / pi_old",
}
_RATIO_STATISTICS = {
    "mean": "mean over sampled tokens of {} [ratio]",
    "std": "standard deviation over sampled tokens of {}; mean over mini-batches [ratio]",
    "max": "largest of {} [ratio]",
    "min": "smallest of {} [ratio]",
    "p50": "median over sampled tokens of {}; mean over mini-batches [ratio]",
    "p99": "99 % quantile over sampled tokens of {}; mean over mini-batches [ratio]",
    "p999": "99.9 % quantile over sampled tokens of {}; mean over mini-batches [ratio]",
    "above_2": "F(2), share of sampled tokens with more than 2 of {} [fraction]",
    "above_5": "F(5), share of sampled tokens with more than 5 of {} [fraction]",
    "below_half": "share of sampled tokens with less than 1/2 of {} [fraction]",
    "ess_token": "effective sample size over the number of sampled tokens of {}; mean over "
    "mini-batches [fraction]",
    "ess_sequence": "effective sample size over the number of responses of their products of {}; "
    "mean over mini-batches [fraction]",
}
METRICS |= {
    family + name: meaning.format(ratio)
    for family, ratio in _RATIOS.items()
    for name, meaning in _RATIO_STATISTICS.items()
    if family + name != "is_weight/used_ess_sequence"  # it has used_ess_response instead
}


def describe(name: str) -> str | None:
    """Meaning and unit of a metric or timing; None for a name that METRICS does not document."""
    if name in METRICS:
        return METRICS[name]
    prefixes = (p for p in METRICS if p.endswith("*") and name.startswith(p[:-1]))
    return next((METRICS[prefix] for prefix in prefixes), None)
