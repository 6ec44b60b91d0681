"""`jaxrl-llm bench`: how fast this is, against the machine's limit and against a peer.

    config.py      what is measured and at what sizes
    command.py     the command: every row in a process of its own, the table, the JSON
    measure.py     contestants take turns; medians of rounds, and of ratios within a round
    roof.py        what the machine can do: a large matrix product and a large copy
    figures.py     a measured number, what is wanted of it; tables and JSON of them
    isolation.py   fresh processes, and the environment they get
    machine.py     what it ran on
    memory.py      bytes a process or a device holds
    peer.py        what is asked of a peer's file
    workload.py    models, batches and steps that the rows share
    rows/          a module for each row, with measure(config) -> Findings

A figure is the median over rounds, and a ratio the median of the ratios within each round: whatever
disturbs the machine hits neighbours alike. What it is not: a profile, or a place to tune.
"""
