"""The command-line options of the two HTTP servers."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mii.cli_options import add_config_option
from mii.constants import HOST_DEFAULT

__all__ = ["cors_options", "model_options", "parser", "read_chat_template"]

DEFAULT_MODEL = "mistralai/Mistral-7B-Instruct-v0.1"
_ROLE = "assistant"
_ADDRESS = re.compile(r"(?P<host>\[[^\]]+\]|[^:\s]+):(?P<port>\d{1,5})")


def parser(program: str, description: str, environment: Mapping[str, str], *, openai: bool) -> argparse.ArgumentParser:
    """The options of a server.

    Args:
        program: how it is started.
        description: of what it does.
        environment: gives the defaults of some.
        openai: whether it has the OpenAI routes.
    """
    result = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)
    _add_deployment(result.add_argument_group("deployment"), environment)
    _add_http(result.add_argument_group("HTTP"))
    _add_cors(result.add_argument_group("pages of other origins (off unless one of these is given)"))
    if openai:
        _add_openai(result.add_argument_group("OpenAI"), environment)
    return result


def _add_deployment(group: argparse._ArgumentGroup, environment: Mapping[str, str]) -> None:
    default = environment.get("MODEL_ID") or DEFAULT_MODEL
    group.add_argument(
        "--model",
        default=default,
        help="folder, .gguf file or hub id; also its name in requests (default: %(default)s)",
    )
    name = environment.get("DEPLOYMENT_NAME") or "deepspeed-mii"
    group.add_argument(
        "--deployment-name", default=name, help="name of the deployment that is started (default: %(default)s)"
    )
    group.add_argument(
        "--load-balancer", type=_address, metavar="HOST:PORT", help="use the deployment there and start none"
    )
    group.add_argument(
        "--max-length", "--max_length", type=int, help="tokens of prompt and answer (default: the model's)"
    )
    group.add_argument("--tensor-parallel", type=int, default=1, help="devices of each replica (default: %(default)s)")
    group.add_argument("--replica-num", type=int, default=1, help="copies of the model (default: %(default)s)")
    add_config_option(group)


def _add_http(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host",
        default=HOST_DEFAULT,
        help="address to listen on; 0.0.0.0 is every one of the machine (default: %(default)s)",
    )
    group.add_argument(
        "--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: %(default)s)"
    )
    group.add_argument("--timeout", type=float, metavar="SECONDS", help="longest time that a request may take")
    group.add_argument("--max-body-bytes", type=int, metavar="N", help="longest body that is taken (default: 16 MiB)")


def _add_cors(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--allowed-origins", type=_strings, metavar="JSON", help='origins, as ["https://example.org"]')
    group.add_argument("--allowed-methods", type=_strings, metavar="JSON", help='methods, as ["POST"]')
    group.add_argument("--allowed-headers", type=_strings, metavar="JSON", help='headers, as ["*"]')
    group.add_argument("--allow-credentials", action="store_true", help="let them send cookies")


def _add_openai(group: argparse._ArgumentGroup, environment: Mapping[str, str]) -> None:
    group.add_argument(
        "--chat-template", metavar="FILE", help="Jinja template of chats: a file, or the template itself"
    )
    role = environment.get("RESPONSE_ROLE") or _ROLE
    group.add_argument("--response-role", default=role, help="role of the model's turns (default: %(default)s)")
    keys = group.add_mutually_exclusive_group()
    keys.add_argument("--api-keys", metavar="KEYS", help="keys that callers need, with commas; all users can see them")
    keys.add_argument("--api-key-file", metavar="FILE", help="the same from a file, one on each line")
    group.add_argument("--ssl", action="store_true", help="TLS with the files that SSL_CERTFILE and SSL_KEYFILE name")


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `mii.serve` is given."""
    options = {
        "deployment_name": args.deployment_name,
        "tensor_parallel": args.tensor_parallel,
        "replica_num": args.replica_num,
        "max_length": args.max_length,
    }
    return {**{name: value for name, value in options.items() if value is not None}, **dict(args.option)}


def cors_options(args: argparse.Namespace) -> dict[str, Any] | None:
    """What pages of other origins may do; None: nothing."""
    given = {"origins": args.allowed_origins, "methods": args.allowed_methods, "headers": args.allowed_headers}
    wanted: dict[str, Any] = {name: tuple(value) for name, value in given.items() if value is not None}
    if args.allow_credentials:
        wanted["credentials"] = True
    return wanted or None


def read_chat_template(given: str | None) -> str | None:
    r"""The template: what a file holds, or what was given itself with escapes such as ``\n`` undone.

    Raises:
        ValueError: it is no file and no template.
    """
    if given is None:
        return None
    if len(given) < 4096 and os.path.isfile(given):
        return Path(given).read_text(encoding="utf-8")
    if "{" not in given:
        raise ValueError(f"there is no file {given}, and it is no Jinja template")
    return given.encode("latin-1", "backslashreplace").decode("unicode_escape")


def _address(text: str) -> str:
    match = _ADDRESS.fullmatch(text)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form HOST:PORT")
    return text


def _strings(text: str) -> list[str]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON list of strings, such as ["*"]')
    return value
