"""The structs of `csrc/include/mii/abi.h` as ctypes. `native.py` checks their sizes against the loaded library."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
OK, INVALID, UNSUPPORTED, DEVICE = range(4)
NUM_SEQS, NUM_TOKENS, NUM_SAMPLES, NUM_UPDATES = range(4)
COUNTS = 8
RMS, RMS_PLUS1, LAYER = range(3)
NORMS = {"rms": RMS, "rms_plus1": RMS_PLUS1, "layer": LAYER}
MOE_SCORINGS = {"softmax": 0, "sigmoid": 1}
MOE_CHUNK = 16
ALGORITHM_BYTES = 64
PEER_ALLOCATE, PEER_OPEN, PEER_CLOSE, PEER_FREE = range(4)
MOE_SIMPLE, MOE_STREAM, MOE_MMA, MOE_WGMMA = range(4)
SHARD_NOTHING, SHARD_BEST, SHARD_COUNTS, _, _, SHARD_WEIGHTS, _, _, SHARD_KEPT, SHARD_DRAWN, SHARD_TOKEN = range(11)
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "gelu_quick": 4, "relu2": 5, "softcap": 6}


def _struct(name: str, *fields: tuple[type, str]) -> type[ctypes.Structure]:
    """A ctypes structure from (type, "name name ...") groups, in the order of the header."""
    members = [(member, ctype) for ctype, names in fields for member in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": members, "__slots__": [m for m, _ in members]})


MiiPrepare = _struct(
    "MiiPrepare",
    (c_void_p, "counts seq_slot q_start kv_len host_ids sample_seq table_updates block_table last_token"),
    (c_void_p, "ids positions kv_slots sample_rows sample_slots sample_positions rope_shift rope_rows"),
    (c_int64, "max_seqs max_tokens max_updates max_blocks"),
    (c_int32, "block_size"),
)
MiiEmbedding = _struct(
    "MiiEmbedding",
    (c_void_p, "out table ids position_table positions"),
    (c_int64, "rows width vocab max_positions"),
    (c_int32, "position_offset"),
    (c_float, "scale"),
    (c_int32, "dtype"),
)
MiiNorm = _struct(
    "MiiNorm",
    (c_void_p, "out x residual weight bias x_weight"),
    (c_int64, "rows width x_stride out_stride"),
    (c_float, "eps"),
    (c_int32, "kind dtype"),
    (c_void_p, "parts"),
    (c_int64, "num_parts part_stride part_row_stride"),
    (c_int32, "parts_dtype"),
)
MiiRopeKv = _struct(
    "MiiRopeKv",
    (c_void_p, "qkv k_cache v_cache cos_sin positions kv_slots q_norm k_norm"),
    (c_int64, "tokens qkv_stride max_positions"),
    (c_int32, "q_heads kv_heads head_dim rotary_dim interleaved block_size"),
    (c_float, "norm_eps"),
    (c_int32, "norm_kind dtype"),
)
MiiAttention = _struct(
    "MiiAttention",
    (c_void_p, "out q k_cache v_cache counts seq_slot q_start kv_len block_table alibi_slopes work workspace"),
    (c_int64, "max_seqs max_tokens max_blocks num_blocks q_stride out_stride"),
    (c_int32, "q_heads kv_heads head_dim block_size window"),
    (c_float, "scale softcap"),
    (c_int32, "dtype"),
)
MiiDecodeAttention = _struct(
    "MiiDecodeAttention",
    (MiiAttention, "attention"),
    (c_void_p, "cos_sin positions kv_slots"),
    (c_int64, "max_positions"),
)
MiiActivation = _struct(
    "MiiActivation",
    (c_void_p, "out x bias"),
    (c_int64, "rows width x_stride out_stride"),
    (c_float, "limit"),
    (c_int32, "kind gated dtype"),
)
MiiGather = _struct(
    "MiiGather",
    (c_void_p, "out x index"),
    (c_int64, "rows width x_stride"),
    (c_int32, "dtype"),
)
MiiSample = _struct(
    "MiiSample",
    (c_void_p, "tokens logprobs last_token logits counts slots positions temperature top_p min_p top_k seed"),
    (c_void_p, "suppress suppress_ids workspace"),
    (c_int64, "rows vocab logits_stride"),
    (c_int32, "num_suppress dtype"),
)
MiiSampleShard = _struct(
    "MiiSampleShard",
    (MiiSample, "sample"),
    (c_void_p, "gathered out state"),
    (c_int64, "start rows first whole"),
    (c_int32, "rank size takes gives"),
)
MiiLinear = _struct(
    "MiiLinear",
    (c_void_p, "out x weight bias"),
    (c_int64, "rows in_features out_features x_stride out_stride"),
    (c_int32, "dtype"),
    (c_void_p, "workspace"),
)

MiiLinearStreamed = _struct(
    "MiiLinearStreamed",
    (MiiLinear, "product"),
    (c_void_p, "next"),
    (c_int64, "next_bytes next_fetch"),
    (c_int32, "gated activation parts"),
)

MiiProduct = _struct("MiiProduct", (MiiLinear, "product"), (c_void_p, "algorithm"), (c_int64, "workspace_bytes"))
MiiProductChoice = _struct(
    "MiiProductChoice",
    (MiiProduct, "product"),
    (c_void_p, "weights"),
    (c_int64, "num_weights patience"),
    (c_void_p, "times"),
)

MiiLinearPack = _struct(
    "MiiLinearPack",
    (c_void_p, "packed weight"),
    (c_int64, "in_features out_features weight_stride"),
    (c_int32, "dtype"),
)

MiiMoeRoute = _struct(
    "MiiMoeRoute",
    (c_void_p, "chosen weights offsets pairs places tiles logits bias counts workspace"),
    (c_int64, "tokens logits_stride"),
    (c_int32, "experts top_k scoring renormalise tile_rows groups top_groups"),
    (c_float, "scale"),
    (c_int32, "dtype"),
)
MiiMoeLinear = _struct(
    "MiiMoeLinear",
    (c_void_p, "out x weight pair_weights offsets pairs places tiles"),
    (c_int64, "tokens in_features out_features x_stride out_stride"),
    (c_int32, "experts top_k tile_rows activation kernel dtype"),
    (c_void_p, "gathered"),
    (c_int64, "gathered_stride"),
)
MiiMoeStream = _struct(
    "MiiMoeStream",
    (c_void_p, "out hidden x up down pair_weights pairs tiles workspace"),
    (c_int64, "tokens in_features width x_stride hidden_stride out_stride"),
    (c_int32, "experts top_k tile_rows activation dtype"),
)
MiiMoeCombine = _struct(
    "MiiMoeCombine",
    (c_void_p, "out parts shared shared_gate counts"),
    (c_int64, "tokens width out_stride shared_stride"),
    (c_int32, "top_k dtype"),
)
MiiMoePack = _struct(
    "MiiMoePack",
    (c_void_p, "packed weight"),
    (c_int64, "in_features out_features weight_stride"),
    (c_int32, "gated dtype"),
)

MiiRanks = _struct(
    "MiiRanks",
    (c_void_p, "memory lost alive"),
    (c_int64, "bytes patience"),
    (c_int32, "rank size ctas"),
)
MiiAllReduce = _struct(
    "MiiAllReduce",
    (MiiRanks, "ranks"),
    (c_void_p, "x"),
    (c_int64, "count"),
    (c_int32, "shots dtype"),
)
MiiAllReduceNorm = _struct("MiiAllReduceNorm", (MiiRanks, "ranks"), (MiiNorm, "norm"), (c_int32, "shots"))
MiiCopiedSum = _struct(
    "MiiCopiedSum",
    (MiiRanks, "ranks"),
    (c_void_p, "x"),
    (c_int64, "place count"),
    (c_int32, "round dtype"),
)
MiiCopiedSumNorm = _struct(
    "MiiCopiedSumNorm", (MiiRanks, "ranks"), (MiiNorm, "norm"), (c_int64, "place"), (c_int32, "round")
)
MiiAllGather = _struct("MiiAllGather", (MiiRanks, "ranks"), (c_void_p, "out x"), (c_int64, "words"))
MiiPeerMemory = _struct("MiiPeerMemory", (c_void_p, "memory handle"), (c_int64, "bytes"), (c_int32, "device action"))
MiiEventWait = _struct("MiiEventWait", (c_void_p, "event lost"))

MiiCall = _struct("MiiCall", (c_void_p, "function args"))
MiiRun = _struct("MiiRun", (c_void_p, "calls"), (c_int64, "count"))

MiiUnpack = _struct(
    "MiiUnpack",
    (c_void_p, "out blocks"),
    (c_int64, "count"),
    (c_int32, "type dtype"),
)

# operation -> (function, struct); functions that return a byte count end in _bytes
FUNCTIONS: dict[str, type[ctypes.Structure]] = {
    "mii_prepare": MiiPrepare,
    "mii_embedding": MiiEmbedding,
    "mii_norm": MiiNorm,
    "mii_rope_kv": MiiRopeKv,
    "mii_attention_plan": MiiAttention,
    "mii_attention": MiiAttention,
    "mii_decode_attention": MiiDecodeAttention,
    "mii_attention_work_bytes": MiiAttention,
    "mii_attention_workspace_bytes": MiiAttention,
    "mii_activation": MiiActivation,
    "mii_gather": MiiGather,
    "mii_sample": MiiSample,
    "mii_sample_workspace_bytes": MiiSample,
    "mii_sample_shard": MiiSampleShard,
    "mii_linear": MiiLinear,
    "mii_linear_streamed": MiiLinearStreamed,
    "mii_linear_wide": MiiLinearStreamed,
    "mii_linear_workspace_bytes": MiiLinear,
    "mii_product": MiiProduct,
    "mii_product_choose": MiiProductChoice,
    "mii_linear_pack": MiiLinearPack,
    "mii_linear_packed_bytes": MiiLinearPack,
    "mii_moe_route": MiiMoeRoute,
    "mii_moe_up": MiiMoeLinear,
    "mii_moe_down": MiiMoeLinear,
    "mii_moe_stream": MiiMoeStream,
    "mii_moe_workspace_bytes": MiiMoeStream,
    "mii_moe_combine": MiiMoeCombine,
    "mii_moe_pack": MiiMoePack,
    "mii_moe_packed_bytes": MiiMoePack,
    "mii_all_reduce": MiiAllReduce,
    "mii_all_reduce_bytes": MiiAllReduce,
    "mii_all_reduce_norm": MiiAllReduceNorm,
    "mii_send_copy": MiiCopiedSum,
    "mii_copied_sum": MiiCopiedSum,
    "mii_copied_sum_norm": MiiCopiedSumNorm,
    "mii_all_gather": MiiAllGather,
    "mii_all_gather_bytes": MiiAllGather,
    "mii_peer_memory": MiiPeerMemory,
    "mii_event_wait": MiiEventWait,
    "mii_unpack": MiiUnpack,
    "mii_run": MiiRun,
}
