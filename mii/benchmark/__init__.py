"""Measures the engine: `mii bench offline` runs fixed request mixes on public model shapes.

Each figure stands beside the limit that was measured on the same machine in the same run.

shapes.py            the model shapes and request mixes
random_checkpoint.py weights made up in memory, so no file is needed
limits.py            what this machine's memory and matrix units reach
roofline.py          the least time that a workload can take within these limits
workload.py          requests in, seconds out
rows.py              the figures, each with how it is measured
memory.py            where the memory went
report.py            the table and the JSON file
offline.py           the command
"""
