"""The rows of the benchmark: each module has measure(config) -> Findings."""
