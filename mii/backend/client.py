"""`MIIClient`: prompts to a deployment, answers from it; from any thread, process, event loop or notebook."""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, closing
from types import TracebackType
from typing import Any

from google.protobuf.empty_pb2 import Empty

from mii.backend import channels
from mii.backend.bundled import BundledCall
from mii.backend.calls import Attempts, Metadata, stream, stream_async, unary, unary_async
from mii.backend.channels import AsyncConnection
from mii.backend.own_loop import OwnLoop
from mii.backend.replies import check_complete, health_of, read_pieces, responses_of
from mii.batching.data_classes import Response, StreamedResponse
from mii.batching.intake import prompt_list
from mii.config import MIIConfig
from mii.errors import (
    DeploymentNotFoundError,
    RequestTimeoutError,
    ServerUnavailableError,
    ServingError,
    UnsupportedFeatureError,
)
from mii.grpc_related.convert import pack_request
from mii.grpc_related.options import REQUEST_ID, TOKEN
from mii.grpc_related.proto.modelresponse_pb2 import MultiStringRequest
from mii.grpc_related.proto.modelresponse_pb2_grpc import ModelResponseStub

__all__ = ["MIIClient"]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_EVERYWHERE = ("0.0.0.0", "::", "*")
_LOOK_SECONDS = 0.1
_HEALTH_SECONDS = 10.0

StreamingFn = Callable[[list[StreamedResponse]], Any]


class MIIClient:
    """Talks to a deployment. Making one costs nothing: those of a process share connections.

    A call that finds nobody there, as while a part of the deployment is started again, is tried again for a few
    seconds; one of whose answer something has come is not. Whatever ends a call early (Ctrl-C, an exception in a
    callback, a stream that is closed, a task that is cancelled) ends its generation in the deployment too.

    Args:
        mii_config: of the deployment.
        host: the machine that it runs on.
        timeout: seconds that a call may take where it is not given its own; None: any time.
        token: the deployment's secret, to terminate one on another machine.

    Example:
        with mii.client("demo") as client:
            print(client.generate(["DeepSpeed is", "Seattle is"], max_new_tokens=128))
            for pieces in client.stream("DeepSpeed is"):
                print("".join(piece.generated_text for piece in pieces), end="", flush=True)
    """

    def __init__(
        self,
        mii_config: MIIConfig,
        host: str = "localhost",
        *,
        timeout: float | None = None,
        token: str | None = None,
    ) -> None:
        self.mii_config = mii_config
        self.task = mii_config.model_conf.task
        self.host, self.port = host, mii_config.port_number
        self.timeout = timeout
        reachable = host
        if host in _LOOPBACK:  # the deployment may listen on another address of this machine only
            reachable = "127.0.0.1" if mii_config.host in (*_EVERYWHERE, *_LOOPBACK[:2]) else mii_config.host
        self.address = channels.address_of(reachable, self.port)
        """``host:port`` of the deployment."""
        self._token = token
        self._closed = False
        self._own_loop = OwnLoop()
        channels.join(self.address, self)

    def __repr__(self) -> str:
        return f"MIIClient({self.mii_config.deployment_name!r} at {self.address})"

    @property
    def asyncio_loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of `stub`: the one that runs here or, where none does, one that the client keeps for this and
        makes the current one of this thread.
        """
        try:
            return asyncio.get_running_loop()
        except RuntimeError:
            self._check_open()
            return self._own_loop.get()

    @property
    def stub(self) -> ModelResponseStub:
        """gRPC's own asynchronous stub, for programs that make the calls of the proto themselves, in `asyncio_loop`.

        Example:
            client.asyncio_loop.run_until_complete(client.stub.Health(Empty()))
        """
        loop = self.asyncio_loop
        return (self._async_connection() if loop.is_running() else loop.run_until_complete(self._connect())).stub

    # Generating

    def __call__(self, *args: Any, **kwargs: Any) -> list[Response] | None:
        """The same as `generate`."""
        return self.generate(*args, **kwargs)

    def generate(
        self,
        prompts: Any,
        streaming_fn: StreamingFn | None = None,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **generate_kwargs: Any,
    ) -> list[Response] | None:
        """The answers to `prompts`, in their order.

        Args:
            prompts: a string, a list of strings, a list of token ids, or a list of such lists; arrays count as lists.
            streaming_fn: called with a list of one response as text comes: the new text and the count of tokens so far,
                at the end once with no text and the finish reason. Its `index` is the prompt's place in the call.
            timeout: seconds that the call may take in all; None: as the client was made.
            request_id: names the call in the deployment's logs.
            **generate_kwargs: options of `mii.config.GenerateParamsConfig`, for every prompt of the call.

        Returns:
            One response for each prompt; None with `streaming_fn`.

        Raises:
            RequestError: a prompt or an option is refused. Nothing was run.
            ServerBusyError: the queue is full; says when to come back.
            ServerUnavailableError: the deployment is not there, or lost the engine that ran the call.
            RequestTimeoutError: the time is over.
            GenerationError: an answer ended with an error; `responses` has those to the other prompts.

        All of these are also `grpc.RpcError` with `code()` and `details()` where the deployment sent them.
        """
        if streaming_fn is None:
            arguments = self._arguments(prompts, generate_kwargs, timeout, request_id)
            return responses_of(unary(self._stub().GeneratorReply, *arguments))
        with closing(self.stream(prompts, timeout=timeout, request_id=request_id, **generate_kwargs)) as steps:
            for pieces in steps:
                for piece in pieces:
                    streaming_fn([piece])
        return None

    async def generate_async(
        self,
        prompts: Any,
        streaming_fn: StreamingFn | None = None,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **generate_kwargs: Any,
    ) -> list[Response] | None:
        """As `generate`, in an event loop. What `streaming_fn` returns is awaited where it can be."""
        if streaming_fn is None:
            arguments = self._arguments(prompts, generate_kwargs, timeout, request_id)
            return responses_of(await unary_async(self._async_connection().stub.GeneratorReply, *arguments))
        async with aclosing(self.astream(prompts, timeout=timeout, request_id=request_id, **generate_kwargs)) as steps:
            async for pieces in steps:
                for piece in pieces:
                    result = streaming_fn([piece])
                    if inspect.isawaitable(result):
                        await result
        return None

    def stream(
        self, prompts: Any, *, timeout: float | None = None, request_id: str | None = None, **generate_kwargs: Any
    ) -> Generator[list[StreamedResponse], None, None]:
        """The answers as they come, a list of pieces of text at a time; see `generate`.

        A piece says with `index` whose it is. Each answer ends with a piece that has no text and the finish reason. A
        reader who is slow gets fewer and longer pieces. The call is made when the first piece is asked for.

        Raises:
            MIIError: as `generate` does; `GenerationError` when all other answers have ended.
        """
        arguments = self._arguments(prompts, generate_kwargs, timeout, request_id)
        return self._stream(*arguments)

    def astream(
        self, prompts: Any, *, timeout: float | None = None, request_id: str | None = None, **generate_kwargs: Any
    ) -> AsyncGenerator[list[StreamedResponse], None]:
        """As `stream`, in an event loop.

        Example:
            async for pieces in client.astream("DeepSpeed is"):
                print("".join(piece.generated_text for piece in pieces), end="", flush=True)
        """
        arguments = self._arguments(prompts, generate_kwargs, timeout, request_id)
        return self._astream(*arguments)

    # The deployment

    def health(self, timeout: float = _HEALTH_SECONDS) -> dict[str, Any]:
        """What the deployment says when its engines are asked.

        Returns:
            "ready": whether it can answer requests; "reason": why not; "replicas": the same for each, with its address,
            limits, device and the prompts that it has.

        Raises:
            ServerUnavailableError: it does not answer.
            RequestTimeoutError: nor within `timeout` seconds.
        """
        return health_of(unary(self._stub().Health, Empty(), self._attempts(timeout)))

    async def health_async(self, timeout: float = _HEALTH_SECONDS) -> dict[str, Any]:
        """As `health`, in an event loop."""
        return health_of(await unary_async(self._async_connection().stub.Health, Empty(), self._attempts(timeout)))

    def stats(self, timeout: float = _HEALTH_SECONDS) -> dict[str, Any]:
        """What the deployment counts: "balancer", and "replicas" with an entry for each."""
        return dict(json.loads(unary(self._stub().Stats, Empty(), self._attempts(timeout)).json))

    def wait_ready(self, timeout: float | None = None) -> None:
        """Waits until the deployment can answer requests.

        Args:
            timeout: seconds; None: as long as it takes.

        Raises:
            RequestTimeoutError: it was not ready in time; says what it was waiting for.
            ServerUnavailableError: it has ended.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _HEALTH_SECONDS if deadline is None else min(_HEALTH_SECONDS, deadline - time.monotonic())
            reason = self._not_ready(max(left, _LOOK_SECONDS))
            if reason is None:
                return
            if deadline is not None and time.monotonic() + _LOOK_SECONDS > deadline:
                raise RequestTimeoutError(f"{self._where()} was not ready within {timeout:g} s: {reason}")
            time.sleep(_LOOK_SECONDS)

    def scale(self, replicas: int, *, device_map: Any = None, progress: bool | None = False) -> None:
        """Gives the deployment another number of replicas, and returns when it has them.

        New ones come on devices that are free. The last ones go: they get no more requests, and what they have may end
        within the config's `drain_seconds`. On the deployment's machine only.

        Args:
            replicas: how many it is to have, from 1 up.
            device_map: devices of those that are added, as `mii.serve` takes them; None: those that are free.
            progress: as in `mii.serve`.

        Raises:
            PlacementError: fewer than one, or more than there are devices for.
            DeploymentError: it cannot be changed now, or a new replica did not start; then it has those that it had.
            UnsupportedFeatureError: the deployment runs on another machine.
        """
        if not self._is_registered():
            raise UnsupportedFeatureError(f"{self._where()} is on another machine; use 'mii scale' there")
        from mii.backend.scaling import scale

        self.mii_config = scale(self.mii_config.deployment_name, replicas, device_map=device_map, progress=progress)

    def terminate_server(self) -> None:
        """Ends the deployment; what runs may finish first, for the config's `drain_seconds`.

        On this machine it returns when nothing of the deployment is left. On another one it needs the deployment's
        token and returns when the deployment has begun to end.

        Raises:
            DeploymentNotFoundError: there is none.
            AccessError: the token is missing or wrong.
            ServerUnavailableError: the deployment does not answer.
        """
        if self._is_registered():
            from mii.backend.deployment import stop

            stop(self.mii_config.deployment_name)
        else:
            metadata = ((TOKEN, self._token or ""),)
            unary(self._stub().Terminate, Empty(), self._attempts(_HEALTH_SECONDS), metadata)
        self.close()

    async def terminate_async(self) -> None:
        """As `terminate_server`, in an event loop."""
        if self._is_registered():
            from mii.backend.deployment import stop

            await asyncio.to_thread(stop, self.mii_config.deployment_name)
        else:
            metadata = ((TOKEN, self._token or ""),)
            await unary_async(
                self._async_connection().stub.Terminate, Empty(), self._attempts(_HEALTH_SECONDS), metadata
            )
        await self.close_async()

    # Life

    def close(self) -> None:
        """Lets go of the connection, which closes when no other client uses it; twice is fine."""
        self._closed = True
        self._own_loop.close()
        channels.leave(self.address, self)

    async def close_async(self) -> None:
        """As `close`, and waits for it."""
        self._closed = True
        self._own_loop.close()
        await channels.leave_async(self.address, self)

    def __enter__(self) -> MIIClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> MIIClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close_async()

    # Within

    def _stream(
        self, request: MultiStringRequest, attempts: Attempts, metadata: Metadata
    ) -> Generator[list[StreamedResponse], None, None]:
        errors: list[str] = []
        with closing(stream(self._stub().GeneratorReplyStream, request, attempts, metadata)) as replies:
            for reply in replies:
                yield read_pieces(reply.response, errors)
        check_complete(errors)

    async def _astream(
        self, request: MultiStringRequest, attempts: Attempts, metadata: Metadata
    ) -> AsyncGenerator[list[StreamedResponse], None]:
        connection = self._async_connection()
        errors: list[str] = []
        if len(request.request) + len(request.token_prompts) == 1:
            # Hundreds of such calls at once are common, and a message that is theirs together costs no more than one's.
            name = dict(metadata).get(REQUEST_ID, "")
            async with BundledCall(connection.bundle, [request.SerializeToString()], attempts, name) as call:
                while pieces := await call.take():
                    yield read_pieces(pieces, errors)
        else:
            replies = stream_async(connection.stub.GeneratorReplyStream, request, attempts, metadata)
            async with aclosing(replies):
                async for reply in replies:
                    yield read_pieces(reply.response, errors)
        check_complete(errors)

    def _arguments(
        self, prompts: Any, options: dict[str, Any], timeout: float | None, request_id: str | None
    ) -> tuple[MultiStringRequest, Attempts, Metadata]:
        request = pack_request(prompt_list(prompts), options)
        metadata = () if request_id is None else ((REQUEST_ID, request_id),)
        return request, self._attempts(self.timeout if timeout is None else timeout), metadata

    def _attempts(self, timeout: float | None) -> Attempts:
        return Attempts(timeout, self._ended, self._where())

    def _stub(self) -> Any:
        self._check_open()
        return channels.stub(self.address)

    def _async_connection(self) -> AsyncConnection:
        self._check_open()
        return channels.async_connection(self.address)

    async def _connect(self) -> AsyncConnection:
        return self._async_connection()

    def _check_open(self) -> None:
        if self._closed:
            raise ServingError(f"{self!r} is closed; make another one with mii.client(...)")

    def _where(self) -> str:
        return f"deployment {self.mii_config.deployment_name!r} at {self.address}"

    def _is_registered(self) -> bool:
        """Whether the deployment that this client talks to is one that this user runs on this machine."""
        if self.host not in (*_LOOPBACK, self.mii_config.host):
            return False
        from mii.config import get_mii_config

        try:
            return get_mii_config(self.mii_config.deployment_name).port_number == self.port
        except DeploymentNotFoundError:
            return False

    def _ended(self) -> str | None:
        """Why nobody can be there, as far as it can be known."""
        from mii.backend.deployment import find_alive

        if not self._is_registered():
            return None
        try:
            find_alive(self.mii_config.deployment_name)
        except DeploymentNotFoundError as error:
            return str(error)
        return None

    def _not_ready(self, timeout: float) -> str | None:
        """Why the deployment cannot answer requests yet; None: it can."""
        try:
            health = self.health(timeout)
        except RequestTimeoutError as error:
            return str(error)
        except ServerUnavailableError as error:
            if self._ended():
                raise
            return str(error)
        return None if health["ready"] else health["reason"] or "it does not say why"
