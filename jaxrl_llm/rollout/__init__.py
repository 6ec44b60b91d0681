"""Inference engines behind one protocol, and the buffer of finished groups."""
