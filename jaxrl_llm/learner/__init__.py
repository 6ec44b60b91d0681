"""The jitted update and scoring steps, their state, and checkpoints."""
