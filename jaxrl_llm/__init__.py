"""jaxrl_llm: stable reinforcement learning on Mixture-of-Experts language models, in JAX."""
