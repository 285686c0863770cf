"""The `mii` command: picks the subcommand, and turns what goes wrong into one line and an exit code.

    mii generate "DeepSpeed is" "Seattle is"
    mii bench offline    mii bench serve --deployment NAME
    mii serve MODEL    mii list    mii health NAME    mii scale NAME 3    mii stop NAME
    mii --version

Exit codes: 0 done, 1 it went wrong, 2 the command line is wrong, 130 Ctrl-C, 141 the reader of the output is gone.
Torch and what else is heavy load only when a command needs them, so that help comes at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

import mii
from mii import cli_generate, cli_serve

FAILED, WRONG_USAGE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: The words after `mii`; None takes them from the process.

    Returns:
        The exit code. Wrong words and `--help` raise `SystemExit`, as argparse does.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = _parser(words).parse_args(words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" for what it does not have
    if args.debug:
        return _run(args)
    try:
        return _run(args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Nobody reads, and Python flushes what is buffered as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except Exception as error:
        print(f"{args.command_name}: error: {_message(error)}", file=sys.stderr)
        return WRONG_USAGE if _is_wrong_usage(error) else FAILED


def _run(args: argparse.Namespace) -> int:
    code: int = args.run(args)
    sys.stdout.flush()
    return code


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mii", description="LLM inference on this machine's GPU or CPU.")
    parser.add_argument("--version", action="version", version=f"mii {mii.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    generate = commands.add_parser(
        "generate",
        help="generate text for prompts",
        description="Generates text for prompts given as arguments, in a file, or on standard input.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=cli_generate.EXAMPLES,
    )
    cli_generate.add_arguments(generate)
    _finish(generate, cli_generate.run)
    cli_serve.add_commands(commands, _finish)
    bench = commands.add_parser("bench", help="measure how fast this machine is", description="Measures speed.")
    if "bench" in words[:1]:
        _add_benchmarks(bench)
    return parser


def _add_benchmarks(parser: argparse.ArgumentParser) -> None:
    from mii.benchmark import offline, serve

    kinds = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    kind = kinds.add_parser(
        "offline", help="the engine, without a server", description="How fast the engine is, without a server."
    )
    offline.add_arguments(kind)
    _finish(kind, offline.run)
    kind = kinds.add_parser(
        "serve",
        help="a running deployment, or any server with OpenAI's completions",
        description="How fast a server answers under load.",
    )
    serve.add_arguments(kind)
    _finish(kind, serve.run)


def _finish(parser: argparse.ArgumentParser, run: object) -> None:
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    parser.set_defaults(run=run, command_name=parser.prog)


def _is_wrong_usage(error: Exception) -> bool:
    """Options that exist but cannot have these values are found out by the config classes."""
    from pydantic import ValidationError

    from mii.errors import ArgumentConflictError, ArgumentTypeError, UnknownArgument

    usage = (argparse.ArgumentError, ArgumentConflictError, ArgumentTypeError, UnknownArgument, ValidationError)
    return isinstance(error, usage)


def _message(error: Exception) -> str:
    """One line, and where a part of a deployment failed the end of its log."""
    from mii.errors import DeploymentError, MIIError
    from mii.validation import explain

    if isinstance(error, DeploymentError):
        return str(error)
    text = "; ".join(line.strip() for line in explain(error).splitlines() if line.strip())
    known = isinstance(error, MIIError | ValueError | OSError | argparse.ArgumentError) and text
    return text if known else f"{type(error).__name__}: {text} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
