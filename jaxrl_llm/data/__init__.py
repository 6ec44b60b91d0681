"""From prompt files to mini-batches: datasets, tokenizers, verified rewards, collation."""
