"""Tensor parallelism: the processes (ranks) that share one copy of a model, and how they come to the same tokens.

Rank 0 takes requests. What travels is requests and aborts, once a step; every rank schedules alike and computes its
part of each layer, and tokens are drawn on parts of the vocabulary (`mii.ops.shard_sampler`). Before a step begins,
each rank compares the plan that it made with rank 0's.
"""
