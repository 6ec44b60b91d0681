"""The first-order instrument: is the token-level update still the sequence-level gradient?

What it is: the exact sequence-level objective of a policy small enough to enumerate and its
gradient, beside the expected gradient of the token-level surrogate under any LossConfig; for larger
policies a Monte-Carlo estimate with error bars. What it is not: part of training.

What "first-order approximation" (arXiv 2512.01374) means, with w_t = pi / mu = 1 + delta_t for one
token, g_t = grad log pi(y_t), A the centred reward, and E the mean over responses of mu:

    J_seq = E[prod_t w_t A]      grad J_seq = E[sum_t g_t w_t (prod_{s != t} w_s) A]
    J_tok = E[sum_t w_t A]       grad J_tok = E[sum_t g_t w_t A]

Measured from mu, the OBJECTIVES agree to first order: E[(prod w - 1) A] - E[sum delta_t A] is
E[sum_{s < t} delta_s delta_t A] + ..., of second order in delta. Differentiating costs one order.
The GRADIENTS agree to order zero: they are equal at pi = mu, and off it they differ by
E[sum_t g_t w_t (prod_{s != t} w_s - 1) A], first order in the delta of the OTHER tokens. Dropping
the correction adds E[sum_t g_t delta_t A], first order in the token's own delta. So importance
sampling per token removes one of two first-order errors, which is all of it for responses of one
token. The two may cancel in part, so for longer responses the corrected gradient need not be the
closer one.

In an MoE delta is not continuous in the weights: where a router changes its choice the policy
jumps. The orders above hold along a path without such jumps, as under R2, whose target policy is
then another one. Expectations show bias alone; what a correction costs in variance, and what clip
and replay save of it, is not seen in them.
"""
