"""Options of every gRPC server and channel of a deployment."""

from __future__ import annotations

from mii.constants import GRPC_MAX_MESSAGE_BYTES as MAX_MESSAGE_BYTES

__all__ = [
    "CHANNEL_OPTIONS",
    "MAX_MESSAGE_BYTES",
    "REQUEST_ID",
    "SERVER_OPTIONS",
    "SERVICE_NAME",
    "STALL_SECONDS",
    "TOKEN",
]

SERVICE_NAME = "modelresponse.ModelResponse"
TOKEN = "mii-token"
"""Metadata that shows that a caller may end the deployment."""
REQUEST_ID = "mii-request-id"
"""Metadata that names a request in the logs."""
STALL_SECONDS = 120.0
"""A stream whose reader takes nothing for so long is ended."""
_SIZES = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_send_message_length", MAX_MESSAGE_BYTES)]
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),  # no limit: one who only waits for an answer looks after it too
]

SERVER_OPTIONS: list[tuple[str, int]] = [
    *_SIZES,
    *_KEEPALIVE,  # finds callers whose machine or network is gone
    ("grpc.so_reuseport", 0),  # a port that another process has is an error
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # callers may look after their connections too
]
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    *_SIZES,
    *_KEEPALIVE,
    ("grpc.enable_http_proxy", 0),  # http_proxy is for the web
    # What was restarted is found again soon; by default, gRPC's pauses grow to minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),  # how long one attempt may take
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Bytes of one stream that may be under way. What a slow reader has not taken is merged in the replica; what has
    # left that already comes as it is. Longer messages pass all the same.
    ("grpc.http2.lookahead_bytes", 8_192),
    ("grpc.http2.bdp_probe", 0),  # which would let them grow
]
