"""Names and numbers that the API, the configs and the servers agree on.

Example:
    >>> from mii.constants import GenerationFinishReason
    >>> GenerationFinishReason.STOP == "stop"
    True
"""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path


class _Name(str, Enum):
    """A string with a fixed set of values; prints as its value on every Python version."""

    __str__ = str.__str__


class DeploymentType(_Name):
    """Where a deployment runs. Only LOCAL can be served; NON_PERSISTENT is what `mii.pipeline` is."""

    LOCAL = "local"
    AML = "aml"
    NON_PERSISTENT = "non-persistent"


class TaskType(_Name):
    """What a model is asked to do. `mii.pipeline` and `mii.serve` generate text; the others belong to the first API."""

    TEXT_GENERATION = "text-generation"
    TEXT_CLASSIFICATION = "text-classification"
    QUESTION_ANSWERING = "question-answering"
    FILL_MASK = "fill-mask"
    TOKEN_CLASSIFICATION = "token-classification"
    TEXT2IMG = "text-to-image"
    ZERO_SHOT_IMAGE_CLASSIFICATION = "zero-shot-image-classification"
    INPAINTING = "text-to-image-inpainting"


class ModelProvider(_Name):
    """Where checkpoints come from: the Hugging Face hub, or a folder or file in its formats."""

    HUGGING_FACE = "hugging-face"


class GenerationFinishReason(_Name):
    """Why an answer ended. A `str`, so it compares and serialises as its value.

    STOP: an end-of-text token or a stop string. LENGTH: `max_new_tokens` or `max_length`. NONE: not ended yet (a
    stream's pieces).
    """

    STOP = "stop"
    LENGTH = "length"
    NONE = "none"


# Ports. Replica i uses the next TENSOR_PARALLEL gRPC ports after the load balancer's, zmq + i and torch + i * stride.
HOST_DEFAULT = "127.0.0.1"
PORT_NUMBER_DEFAULT = 50050
RESTFUL_API_PORT_DEFAULT = 28080
TORCH_DIST_PORT_DEFAULT = 29500
TORCH_DIST_PORT_STRIDE = 100
ZMQ_PORT_DEFAULT = 25555

RESTFUL_API_PATH = "mii"
RESTFUL_PROCESSES_DEFAULT = 32
HOSTFILE_DEFAULT = "/job/hostfile"
DEPLOYMENT_NAME_SUFFIX = "mii-deployment"

GRPC_MAX_MESSAGE_BYTES = 2**27
SERVER_STOP_GRACE_SECONDS = 10
REST_SHUTDOWN_DELAY_SECONDS = 1

# Tokens of one KV cache block.
BLOCK_SIZES = (16, 32, 64, 128)

CACHE_PATH_ENV = "MII_CACHE_PATH"
CACHE_PATH_DEFAULT = "/tmp/mii_cache"


def cache_path() -> Path:
    """The folder of mii's deployment registry: `MII_CACHE_PATH`, else `/tmp/mii_cache`. It need not exist."""
    return Path(os.environ.get(CACHE_PATH_ENV) or CACHE_PATH_DEFAULT)
