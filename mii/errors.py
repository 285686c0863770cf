"""Every exception of mii, in one tree.

Each class also derives from the builtin exception that a caller would expect, so `except ValueError` works too. Bad
option values are `pydantic.ValidationError` (itself a `ValueError`), with messages written by `mii.validation`.

    MIIError
    ├── UnknownArgument                       an option that neither mii.pipeline nor mii.serve has
    ├── ArgumentConflictError                 (AssertionError) the same option given twice, with different values
    ├── ArgumentTypeError                     (AssertionError, AttributeError) a config dict that is no dict
    ├── LauncherError                         (AssertionError, RuntimeError) tensor parallelism without its processes
    ├── PlacementError                        (ValueError) devices, hosts or ports that do not fit the deployment
    │   └── PortTakenError                    a port that was asked for is in use; says by whom
    ├── HostfileError                         (ValueError, AssertionError) a hostfile that cannot be read
    ├── UnsupportedFeatureError               (NotImplementedError) known to the API, not done by this version
    ├── RegistryError                         (OSError) the folder in which deployments are recorded cannot be written
    ├── DeploymentNotFoundError               no deployment of that name on this machine
    ├── DeploymentExistsError                 (ValueError) one of that name is running already
    ├── DeploymentError                       (RuntimeError) a deployment did not start; says which part failed and why
    ├── LoadError                             a model could not be made ready
    │   ├── CheckpointError                   (ValueError) files missing, truncated, corrupt or misshapen
    │   │   └── CheckpointNotFoundError       (FileNotFoundError) no such folder, file or hub repository
    │   ├── TokenizerError                    (ValueError) no tokenizer, or one that cannot be used
    │   ├── UnsupportedModelError             (ValueError) an architecture that mii does not have
    │   ├── UnsupportedDeviceError            (RuntimeError) no such device, or one that is too old
    │   └── OutOfMemoryError                  (MemoryError) weights or KV cache do not fit; says needed and free
    ├── RequestError                          (ValueError) one request is refused; the pipeline stays usable
    │   ├── EmptyPromptError                  nothing to start generating from
    │   ├── PromptTypeError                   (TypeError) a prompt that is neither text nor token ids
    │   ├── PromptEncodingError               text that is not valid Unicode, or bytes that are not UTF-8
    │   └── PromptTooLongError                prompt against max_length or the KV cache; says both numbers
    ├── ServingError                          (RuntimeError) a deployment cannot answer now; trying again may help
    │   ├── ServerBusyError                   its queue is full; says when to come back
    │   ├── ServerUnavailableError            (ConnectionError) it is not there, is ending, or lost its engine
    │   ├── RequestTimeoutError               (TimeoutError) the answer was not complete in the time given
    │   └── RequestCancelledError             somebody else ended the call
    ├── AccessError                           (PermissionError) a deployment's token is wanted and was not given
    ├── GenerationError                       (RuntimeError) a running request ended with an error
    └── PipelineDestroyedError                (RuntimeError) a pipeline or engine used after destroy()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mii.batching.data_classes import Response

__all__ = [
    "AccessError",
    "ArgumentConflictError",
    "ArgumentTypeError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "DeploymentError",
    "DeploymentExistsError",
    "DeploymentNotFoundError",
    "EmptyPromptError",
    "GenerationError",
    "HostfileError",
    "LauncherError",
    "LoadError",
    "MIIError",
    "OutOfMemoryError",
    "PipelineDestroyedError",
    "PlacementError",
    "PortTakenError",
    "PromptEncodingError",
    "PromptTooLongError",
    "PromptTypeError",
    "RegistryError",
    "RequestCancelledError",
    "RequestError",
    "RequestTimeoutError",
    "ServerBusyError",
    "ServerUnavailableError",
    "ServingError",
    "TokenizerError",
    "UnknownArgument",
    "UnsupportedDeviceError",
    "UnsupportedFeatureError",
    "UnsupportedModelError",
]


class MIIError(Exception):
    """Base of all errors that mii raises on purpose: what was given, what is allowed and what to do."""


class UnknownArgument(MIIError):
    """An option that the called function does not have; the message names it and the nearest one that exists."""


class ArgumentConflictError(MIIError, AssertionError):
    """The same option was given as an argument and in a config dict, with different values."""


class ArgumentTypeError(MIIError, AssertionError, AttributeError):
    """`model_config=` or `mii_config=` is not a plain dict."""


class LauncherError(MIIError, AssertionError, RuntimeError):
    """`tensor_parallel` does not match the number of processes that were started."""


class PlacementError(MIIError, ValueError):
    """Replicas cannot be laid out on the given hosts, devices and ports."""


class PortTakenError(PlacementError):
    """A port that was asked for is in use; the message names the port and, where it can be known, the process."""


class HostfileError(MIIError, ValueError, AssertionError):
    """A hostfile is missing, empty or has a line that is not `host slots=N`."""


class UnsupportedFeatureError(MIIError, NotImplementedError):
    """The API knows this, this version does not do it; the message says what to use instead."""


class RegistryError(MIIError, OSError):
    """The folder in which deployments are recorded cannot be made or written."""


class DeploymentNotFoundError(MIIError):
    """No deployment with this name is registered on this machine."""


class DeploymentExistsError(MIIError, ValueError):
    """A deployment of this name is running already."""


class DeploymentError(MIIError, RuntimeError):
    """A deployment did not start or has ended: the message says in its first line which part failed and why, and goes
    on with the end of that part's log. Nothing of the deployment is left running.
    """


class LoadError(MIIError):
    """A model could not be made ready; nothing of it stays in memory."""


class CheckpointError(LoadError, ValueError):
    """The files of a model are missing, truncated, corrupt, or hold other tensors than its config asks for."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no such folder, file or hub repository."""


class TokenizerError(LoadError, ValueError):
    """A model has no tokenizer, or one that cannot be read or used."""


class UnsupportedModelError(LoadError, ValueError):
    """The checkpoint's architecture, or an option of it, is one that mii does not have; says which it has."""


class UnsupportedDeviceError(LoadError, RuntimeError):
    """The device is absent or too old for mii's kernels."""


class OutOfMemoryError(LoadError, MemoryError):
    """Weights or KV cache do not fit; the message says how much was needed and how much was free."""


class RequestError(MIIError, ValueError):
    """One request was refused before it reached the engine; other requests and the pipeline are untouched."""


class EmptyPromptError(RequestError):
    """A prompt has no tokens at all, so there is nothing to continue."""


class PromptTypeError(RequestError, TypeError):
    """A prompt is neither a string nor a list of token ids."""


class PromptEncodingError(RequestError):
    """A prompt cannot be encoded: lone surrogates, or bytes that are not UTF-8."""


class PromptTooLongError(RequestError):
    """A prompt leaves no room for an answer under `max_length`, or is larger than the whole KV cache."""


class ServingError(MIIError, RuntimeError):
    """A deployment cannot answer a request now. The request itself may be fine, so trying again later may help."""


class ServerBusyError(ServingError):
    """A deployment's queue is full. Nothing of the request was run.

    Args:
        retry_after: Seconds after which there may be room; None when that is not known.
    """

    retry_after: float | None = None


class ServerUnavailableError(ServingError, ConnectionError):
    """A deployment cannot be reached, is ending, or lost the engine that ran the request."""


class RequestTimeoutError(ServingError, TimeoutError):
    """The time that a call was given is over, and its answer is not complete. What it had running is ended."""


class RequestCancelledError(ServingError):
    """A call was ended by something else than its caller: a client that was closed, or a server that gave it up."""


class AccessError(MIIError, PermissionError):
    """What was asked for needs the deployment's token, which only its owner can read."""


class GenerationError(MIIError, RuntimeError):
    """A request that was running ended with an error; its blocks are free again.

    Args:
        responses: The responses of the call's other prompts in their order, None for those that failed; None when the
            call had no answers to give.
    """

    responses: Sequence[Response | None] | None = None


class PipelineDestroyedError(MIIError, RuntimeError):
    """A pipeline or an engine was used after `destroy()`."""
