"""The Qwen3-MoE model in Flax NNX, with explicit router outputs and a seam for replayed routes."""
