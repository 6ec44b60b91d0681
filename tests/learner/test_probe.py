"""The probe's log-probabilities: those of the reference, on any mesh, through any experts."""

import jax
import numpy as np
import pytest

from jaxrl_llm.learner.probe import make_probe_score
from jaxrl_llm.model.config import ComputeConfig
from jaxrl_llm.model.transformer import parameter_axes
from jaxrl_llm.sharding import MeshConfig, make_layout, parameter_shardings
from tests.model.tiny import TINY, params
from tests.reference import model as reference

TOKENS = np.array([3, 1, 4, 1, 5, 9, 2], np.int32)


@pytest.mark.parametrize("mesh_config", [MeshConfig(), MeshConfig(data=2, context=2, expert=2)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("routed", [False, True])
def test_a_probe_is_scored_as_the_reference_scores_it(
    mesh_config: MeshConfig, temperature: float, routed: bool
) -> None:
    """With the experts that came with it, where some did, and they are not the learner's own."""
    mesh = make_layout(mesh_config)
    shardings = parameter_shardings(params(), parameter_axes(TINY), mesh)
    score = make_probe_score(TINY, ComputeConfig(), mesh, length=9)
    exact = reference.to_float64(params())
    own = np.moveaxis(np.asarray(reference.forward(exact, TINY, TOKENS[:-1], None)[2]), 0, 1)
    routes = ((own + 1) % TINY.moe.num_experts).astype(np.int16) if routed else None
    found = score(jax.device_put(params(), shardings), TOKENS, routes, temperature)
    hidden = reference.forward(exact, TINY, TOKENS[:-1], routes)[0]
    expected, _ = reference.token_logprobs(exact, TINY, hidden, TOKENS[1:], temperature)
    assert found.shape == (TOKENS.size - 1,)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("size", [1, 10])
def test_a_sequence_that_does_not_fit_is_refused(size: int) -> None:
    score = make_probe_score(TINY, ComputeConfig(), make_layout(MeshConfig()), length=9)
    with pytest.raises(ValueError, match=f"the probe has {size} tokens; it may have 2 to 9"):
        score({}, np.zeros(size, np.int32), None, 1.0)
