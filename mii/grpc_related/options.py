"""Options of every gRPC server and channel of a deployment."""

from __future__ import annotations

__all__ = ["CHANNEL_OPTIONS", "MAX_MESSAGE_BYTES", "SERVER_OPTIONS", "SERVICE_NAME"]

SERVICE_NAME = "modelresponse.ModelResponse"
MAX_MESSAGE_BYTES = 64 << 20
_SIZES = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_send_message_length", MAX_MESSAGE_BYTES)]
_KEEPALIVE = [("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 10_000)]

SERVER_OPTIONS: list[tuple[str, int]] = [
    *_SIZES,
    *_KEEPALIVE,  # finds callers whose machine or network is gone
    ("grpc.so_reuseport", 0),  # a port that another process has is an error
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # callers may look after their connections too
]
CHANNEL_OPTIONS: list[tuple[str, int]] = [*_SIZES, *_KEEPALIVE]
