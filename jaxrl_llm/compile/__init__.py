"""Will it fit? The programs of a config, compiled for a TPU pod on a machine without TPUs.

topology.py     the devices of a topology, from the compiler in libtpu
programs.py     the steps that the loop runs, and the shapes it gives them
report.py       compile one, and what that says: memory, costs, times
costs.py        FLOPs, bytes and collectives, loops counted as often as they run
hlo.py          the compiled program's text as values
products.py     FLOPs of one instruction
traffic.py      bytes of one instruction
chips.py        the chips in numbers
model_flops.py  what the model needs, whatever the program does
table.py        all of it for people, and as JSON
"""
