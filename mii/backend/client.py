"""`MIIClient`: prompts to a deployment, answers from it; from any thread, process, event loop or notebook."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, closing
from types import TracebackType
from typing import Any

from mii.backend.bundled import BundledCall
from mii.backend.calls import Attempts, Metadata, stream, stream_async, unary, unary_async
from mii.backend.deployment_client import DeploymentClient
from mii.backend.replies import check_complete, read_pieces, responses_of
from mii.batching.data_classes import Response, StreamedResponse
from mii.batching.intake import prompt_list
from mii.config import MIIConfig
from mii.grpc_related.convert import pack_request
from mii.grpc_related.options import REQUEST_ID
from mii.grpc_related.proto.modelresponse_pb2 import MultiStringRequest

__all__ = ["MIIClient"]

StreamingFn = Callable[[list[StreamedResponse]], Any]


class MIIClient(DeploymentClient):
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
        super().__init__(mii_config, host, token)
        self.timeout = timeout

    def __repr__(self) -> str:
        return f"MIIClient({self.mii_config.deployment_name!r} at {self.address})"

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

    # Life

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
