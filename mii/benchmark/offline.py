"""`mii bench offline`: how fast the engine is on this machine, without a server.

    mii bench offline --shape smollm2-135m --device cpu
    mii bench offline --shape llama3-8b --json results.json
    mii bench offline --shape llama3-8b --tensor-parallel 2

Weights are random and made in memory, so no model file is needed; a folder or a .gguf file in place of a shape's name
is read as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mii.benchmark.shapes import MIXES, SHAPES
from mii.cli_options import add_config_option
from mii.errors import CheckpointNotFoundError, UnsupportedFeatureError

if TYPE_CHECKING:
    import torch

    from mii.benchmark.rows import Row
    from mii.config import ModelConfig
    from mii.engine import Engine
    from mii.modeling.checkpoint import Checkpoint
    from mii.parallel.engines import FirstEngine

ROW_NAMES = ("decode-1", "decode-8", "decode-64", "prompt-512", "batch-16", *MIXES, "host-256", "first-token", "start")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--shape",
        metavar="SHAPE",
        help=f"{', '.join(SHAPES)}, or a model folder or .gguf file (default: smollm2-135m, on a GPU llama3-8b)",
    )
    parser.add_argument(
        "--rows",
        "--mix",
        dest="rows",
        nargs="+",
        choices=(*ROW_NAMES, "all"),
        metavar="ROW",
        help=f"what to measure, of {', '.join(ROW_NAMES)}; all: every one for GPUs (default: what suits the device)",
    )
    parser.add_argument("--layers", type=_positive, help="use only this many layers of the shape")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", help="bf16, fp16 or fp32 (default: what the checkpoint says)")
    parser.add_argument(
        "--tensor-parallel",
        type=_positive,
        default=1,
        metavar="N",
        help="divide the model among N processes, which are started here: one a GPU, or a share of the cores each",
    )
    add_config_option(parser)
    parser.add_argument("--repeats", type=_positive, default=3, help="runs of each figure (default: 3; of mixes 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    parser.add_argument("--timeline", type=Path, metavar="FILE", help="host-256: write what each step's time went into")
    parser.add_argument("--verbose", action="store_true", help="show the engine's log")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table and writes the JSON file; returns the command's exit code.

    Raises:
        mii.errors.MIIError: The shape is unknown, or the model cannot be loaded.
        pydantic.ValidationError: An --option that ModelConfig does not take.
    """
    from mii.benchmark.report import make_report, print_report, write_json
    from mii.engine.devices import choose_device
    from mii.logging import set_level

    if not args.verbose:
        set_level("warning")

    args.shape = args.shape or ("llama3-8b" if choose_device(args.device).type == "cuda" else "smollm2-135m")
    report = make_report(**measure(args, say=lambda line: print(line, flush=True)))
    print_report(report)
    if args.json is not None:
        write_json(report, args.json)
        print(f"written to {args.json}")
    return 0


def measure(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Loads the model and measures the rows; gives the arguments of `make_report`."""
    from mii.benchmark.limits import describe_machine, measure_limits
    from mii.benchmark.memory import memory_ledger, reset_peak
    from mii.benchmark.roofline import Roofline
    from mii.benchmark.rows import ROWS, Bench, Row, first_token_row
    from mii.engine.devices import choose_device
    from mii.engine.startup import process_age

    device = choose_device(args.device)
    machine, names = describe_machine(device), _row_names(args, device.type)
    if machine["load_average"] > 0.5 * machine["cores"]:
        say(f"note: other programs use this machine (load {machine['load_average']:.1f}); figures will be too low.")
    with _engine(args) as engine:
        phases = engine.start_report.as_dict() if engine.start_report is not None else {}
        rows = [Row("ready", process_age(), "s", False, None, [], phases)]
        runner = engine.runner
        assert runner is not None
        dtype, spec = runner.dtype, runner.spec
        limits = measure_limits(runner.device, dtype)
        reset_peak(runner.device)
        bench = Bench(engine, Roofline.of(spec, dtype, limits), args.repeats, args.timeline)
        for name in [name for name in names if name in ROWS]:
            rows.append(ROWS[name](bench))
            say(f"{name}: {rows[-1].value:,.4g} {rows[-1].unit}")
        memory = memory_ledger(engine)
    if "first-token" in names:
        rows.append(first_token_row(str(_model_file(args.shape)), device.type))
    if "start" in names:
        rows.append(_start_row(args))
    model = {
        "name": args.shape,
        "layers": spec.num_layers,
        "dtype": str(dtype).removeprefix("torch."),
        "tensor_parallel": args.tensor_parallel,
        "options": dict(args.option),
    }
    return {"model": model, "machine": machine, "limits": limits, "memory": memory, "rows": rows}


@contextmanager
def _engine(args: argparse.Namespace) -> Iterator[Engine | FirstEngine]:
    """The engine, divided among processes where that is asked for; destroyed afterwards."""
    if args.tensor_parallel > 1:
        from mii.benchmark.ranks import divided_engine

        with divided_engine(args) as first:
            yield first
        return
    engine = load(args)
    try:
        yield engine
    finally:
        engine.destroy()


def load(args: argparse.Namespace) -> Engine:
    """The engine of the shape or model that the arguments name, on one device."""
    from mii.engine import build_engine
    from mii.engine.devices import choose_device

    config = config_of(args)
    with open_model(args, choose_device(config.device, config.local_device)) as checkpoint:
        return build_engine(config, checkpoint)


def config_of(args: argparse.Namespace) -> ModelConfig:
    """How the arguments say that the model is run."""
    from mii.config import ModelConfig

    options: dict[str, Any] = {"device": args.device, "dtype": args.dtype, **dict(args.option)}
    return ModelConfig(model_name_or_path=args.shape, tensor_parallel=args.tensor_parallel, **options)


def open_model(args: argparse.Namespace, device: torch.device) -> Checkpoint:
    """The model's files; of a named shape, weights that are made up on the device."""
    if args.shape in SHAPES:
        from mii.benchmark.random_checkpoint import RandomCheckpoint

        return RandomCheckpoint(_config(args), device, args.shape)
    if args.layers is not None:
        raise CheckpointNotFoundError("--layers cuts a named shape; a model from files has the layers that it has.")
    if not Path(args.shape).exists():
        raise CheckpointNotFoundError(
            f"--shape is {args.shape!r}, which is neither a file or folder here nor one of {', '.join(SHAPES)}."
        )
    from mii.modeling.checkpoint import open_checkpoint

    return open_checkpoint(args.shape)


def _start_row(args: argparse.Namespace) -> Row:
    from mii.benchmark.start import start_row

    if args.shape not in SHAPES:
        raise CheckpointNotFoundError("start is timed on a named shape, whose weights it writes; see first-token.")
    options = {"device": args.device, "dtype": args.dtype, **dict(args.option)}
    return start_row(_config(args), options, args.repeats)


def _config(args: argparse.Namespace) -> dict[str, Any]:
    """config.json of the named shape, with as many layers as asked for."""
    config = dict(SHAPES[args.shape])
    return config | ({"num_hidden_layers": args.layers} if args.layers is not None else {})


def _row_names(args: argparse.Namespace, device_type: str) -> list[str]:
    from mii.benchmark.rows import CPU_ROWS, GPU_ROWS, RANKS_ROWS

    if args.tensor_parallel > 1:
        return _rows_of_ranks(args.rows or list(RANKS_ROWS if device_type == "cuda" else CPU_ROWS))
    if args.rows == ["all"]:
        return list(dict.fromkeys((*GPU_ROWS, *MIXES, "start")))
    if args.rows:
        return list(dict.fromkeys(args.rows))
    rows = list(GPU_ROWS if device_type == "cuda" else CPU_ROWS)
    try:
        _model_file(args.shape)
    except CheckpointNotFoundError:
        return rows
    return [*rows, "first-token"]


def _rows_of_ranks(rows: list[str]) -> list[str]:
    from mii.benchmark.rows import GPU_ROWS

    timed = [name for name in rows if name in ("start", "first-token")]
    if timed:
        raise UnsupportedFeatureError(
            f"--rows {' '.join(timed)} is of one process; leave --tensor-parallel out for it."
        )
    return list(dict.fromkeys((*GPU_ROWS, *MIXES) if rows == ["all"] else rows))


def _model_file(shape: str) -> Path:
    """The file or folder that a process is timed on until its first token."""
    from mii.modeling.checkpoint import find_default_model

    if shape == "smollm2-135m":
        return find_default_model()
    if shape in SHAPES:
        raise CheckpointNotFoundError(f"first-token is timed on a model from files, and {shape} is made up in memory.")
    return Path(shape)
