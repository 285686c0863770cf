"""Finding out what requests are sent to: where it is, what it takes, what it is called."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import msgspec

from mii.benchmark.serving.target import GRPC, TargetSpec
from mii.errors import ServerUnavailableError, ServingError

__all__ = ["API_KEY_ENV", "Server", "find_server"]

API_KEY_ENV = "OPENAI_API_KEY"
_HEALTH_SECONDS = 10.0
_GREEDY = {api: {"do_sample": False} for api in ("grpc", "rpc", "mii")}
_OPENAI_GREEDY = {"temperature": 0}


@dataclass(frozen=True)
class Server:
    """What requests are sent to.

    Args:
        spec: how.
        described: what the report says of it.
        vocab: token ids are below this; 0: it does not say.
        max_length: tokens of prompt plus answer that it takes; None: it does not say.
        deployment: name of the deployment, where it runs on this machine; else empty.
        tokenizer: that `--text` is tokenised with; empty: none is known.
    """

    spec: TargetSpec
    described: dict[str, Any]
    vocab: int = 0
    max_length: int | None = None
    deployment: str = ""
    tokenizer: str = ""


async def find_server(args: argparse.Namespace) -> Server:
    """The server that the command's options name, which is asked what it takes.

    Raises:
        argparse.ArgumentError: not exactly one was named, or what it does not say itself was not given.
        mii.errors.MIIError: it is not there.
    """
    given = [name for name in ("deployment", "port", "url") if getattr(args, name) is not None]
    if len(given) != 1:
        raise argparse.ArgumentError(None, "give one of --deployment NAME, --port N (with --host) and --url URL")
    server = await {"deployment": _deployment, "port": _grpc, "url": _http}[given[0]](args)
    tokenizer = args.tokenizer or server.tokenizer
    if args.text is not None and not tokenizer:
        raise argparse.ArgumentError(None, "--text needs --tokenizer MODEL to count the text's tokens")
    vocab = args.vocab or server.vocab
    if args.text is None and server.spec.api == "chat":
        raise argparse.ArgumentError(None, "chats have no token ids; give --text FILE for the prompts")
    if args.text is None and not vocab:
        raise argparse.ArgumentError(
            None, "the server does not say how many token ids it has; give --vocab N or --text"
        )
    spec = msgspec.structs.replace(server.spec, stream=not args.no_stream, timeout=args.timeout)
    return Server(spec, server.described, vocab, server.max_length, server.deployment, tokenizer)


async def _deployment(args: argparse.Namespace) -> Server:
    import mii

    with mii.client(args.deployment) as client:
        config, address = client.mii_config, client.address
    described, vocab, max_length = await _ask(address)
    model = config.model_conf
    described = {"name": config.deployment_name, "model": model.model_name_or_path, **described}
    api = args.api
    if api not in GRPC:
        if not config.enable_restful_api:
            raise argparse.ArgumentError(None, f"{config.deployment_name!r} answers no HTTP; start it with --http")
        path = f"mii/{quote(config.deployment_name)}" if api == "mii" else "v1/completions"
        address = f"http://{config.restful_api_host}:{config.restful_api_port}/{path}"
    name = args.model or (await _first_model(address) if api == "completions" else "")
    spec = _spec(args, api, address, name)
    described |= {"api": api, "address": address}
    return Server(spec, described, vocab, max_length, config.deployment_name, str(model.tokenizer))


async def _grpc(args: argparse.Namespace) -> Server:
    from mii.backend.channels import address_of

    address = address_of(args.host, args.port)
    described, vocab, max_length = await _ask(address)
    api = args.api if args.api in GRPC else "grpc"
    described = {"name": address, **described, "api": api, "address": address}
    return Server(_spec(args, api, address, ""), described, vocab, max_length)


async def _http(args: argparse.Namespace) -> Server:
    from mii.benchmark.serving.http_target import api_of

    try:
        api = api_of(args.url)
    except ValueError as error:
        raise argparse.ArgumentError(None, f"--url: {error}") from None
    model = args.model or ("" if api == "mii" else await _first_model(args.url))
    described = {"name": model or args.url, "api": api, "address": args.url}
    return Server(_spec(args, api, args.url, model), described)


async def _ask(address: str) -> tuple[dict[str, Any], int, int]:
    """What a load balancer or replica says of itself, the vocabulary's size and the longest request."""
    import grpc.aio
    from google.protobuf.empty_pb2 import Empty

    from mii.backend.replies import health_of
    from mii.grpc_related.proto.modelresponse_pb2_grpc import ModelResponseStub
    from mii.grpc_related.statuses import error_of

    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            health = health_of(await ModelResponseStub(channel).Health(Empty(), timeout=_HEALTH_SECONDS))
        except grpc.aio.AioRpcError as error:
            raise error_of(error, f"{address} does not answer: {error.details()}") from None
    replicas = [replica for replica in health["replicas"] if replica["ready"]]
    if not replicas:
        raise ServerUnavailableError(f"{address} is not ready: {health['reason']}")
    first = replicas[0]
    described = {"replicas": len(replicas), "device": first["device"], "dtype": first["dtype"]}
    return described, first["vocab_size"], min(replica["max_length"] for replica in replicas)


async def _first_model(url: str) -> str:
    """The first model that an OpenAI server lists."""
    import asyncio

    return await asyncio.to_thread(_list_models, url)


def _list_models(url: str) -> str:
    from urllib.request import ProxyHandler, Request, build_opener

    parts = urlsplit(url)
    root = parts.path.partition("/completions")[0].removesuffix("/chat")
    models = urlunsplit((parts.scheme, parts.netloc, f"{root}/models", "", ""))
    key = os.environ.get(API_KEY_ENV)
    request = Request(models, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=_HEALTH_SECONDS) as answer:
            return str(msgspec.json.decode(answer.read())["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError, msgspec.DecodeError) as error:
        raise ServingError(f"{models} lists no model ({error}); is the server there? or give --model NAME") from None


def _spec(args: argparse.Namespace, api: str, address: str, model: str) -> TargetSpec:
    options = {"ignore_eos": True, **_GREEDY.get(api, _OPENAI_GREEDY), **dict(args.param)}
    options = {name: value for name, value in options.items() if value is not None}
    key = os.environ.get(API_KEY_ENV, "") if api not in GRPC else ""
    exact = options.get("ignore_eos") is True and "stop" not in options
    return TargetSpec(api=api, address=address, model=model, api_key=key, options=options, exact=exact)
