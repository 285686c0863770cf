"""The functions that users call first: they merge arguments into a config, build what it says, and return it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mii.config import GenerateParamsConfig, MIIConfig, ModelConfig
from mii.config.model import world_size
from mii.errors import (
    ArgumentConflictError,
    ArgumentTypeError,
    CheckpointNotFoundError,
    LauncherError,
    UnknownArgument,
)
from mii.imports import importing
from mii.validation import suggest

if TYPE_CHECKING:
    from mii.backend import MIIClient
    from mii.batching import MIIAsyncPipeline, MIIPipeline
    from mii.batching.driver import TokenEngine
    from mii.modeling.tokenizers import MIITokenizerWrapper
    from mii.parallel.ranks import Ranks

__all__ = ["async_pipeline", "client", "pipeline", "serve"]


def pipeline(
    model_name_or_path: str = "",
    model_config: dict[str, Any] | None = None,
    all_rank_output: bool = False,
    **kwargs: Any,
) -> MIIPipeline:
    """Loads a model into this process.

    Args:
        model_name_or_path: a folder, a ``.gguf`` file, or the id of a Hugging Face repository.
        model_config: options of `mii.config.ModelConfig` as a dict, which is not changed.
        all_rank_output: with several processes, whether each returns the answers, or the first one only.
        **kwargs: the same options one by one.

    Returns:
        A callable that takes prompts and gives a list of responses. Its ``destroy()`` gives the memory back.

    Raises:
        UnknownArgument: an option does not exist.
        ArgumentConflictError: an option is given twice, with different values.
        ArgumentTypeError: `model_config` is not a dict.
        pydantic.ValidationError: a value is wrong, or no model was named.
        LauncherError: `tensor_parallel` is not the number of processes.
        LoadError: the model cannot be loaded; nothing of it stays in memory.

    Example:
        pipe = mii.pipeline("path-or-id", dtype="bf16")
        print(pipe(["DeepSpeed is", "Seattle is"], max_new_tokens=128))
    """
    config, unknown = _parse_kwargs_to_model_config(model_name_or_path, model_config, **kwargs)
    if unknown:
        _refuse("mii.pipeline", unknown, [*ModelConfig.option_names(), "all_rank_output"])
    from mii.batching import MIIPipeline

    engine, tokenizer = _load(config, all_rank_output)
    try:
        return MIIPipeline(
            inference_engine=engine, tokenizer=tokenizer, model_config=config, all_rank_output=all_rank_output
        )
    except BaseException:
        engine.destroy()
        raise


def async_pipeline(model_config: ModelConfig) -> MIIAsyncPipeline:
    """Loads a model into this process, for requests that come and go from several threads.

    Args:
        model_config: the whole config, a `mii.config.ModelConfig`.

    Raises:
        ArgumentTypeError: `model_config` is something else.
        LauncherError, LoadError: as in `pipeline`.
    """
    if not isinstance(model_config, ModelConfig):
        raise ArgumentTypeError(f"model_config is {model_config!r}; it must be a mii.config.ModelConfig")
    from mii.batching import MIIAsyncPipeline

    engine, tokenizer = _load(model_config)
    try:
        return MIIAsyncPipeline(inference_engine=engine, tokenizer=tokenizer, model_config=model_config)
    except BaseException:
        engine.destroy()
        raise


def serve(
    model_name_or_path: str = "",
    model_config: dict[str, Any] | None = None,
    mii_config: dict[str, Any] | None = None,
    **kwargs: Any,
) -> MIIClient:
    """Starts a deployment: processes that load the model and answer, on after this program has ended.

    While they start, standard error shows what each does and how far it is; ``progress=False`` turns that off.

    Args:
        model_name_or_path: a folder, a ``.gguf`` file, or the id of a Hugging Face repository.
        model_config: options of `mii.config.ModelConfig` as a dict, which is not changed.
        mii_config: options of `mii.config.MIIConfig` as a dict, which is not changed.
        **kwargs: the same options one by one.

    Returns:
        A client of the deployment, which is ready. Its ``terminate_server()`` ends the deployment.

    Raises:
        UnknownArgument: an option does not exist.
        ArgumentConflictError: an option is given twice, with different values.
        ArgumentTypeError: a config is not a dict.
        pydantic.ValidationError: a value is wrong, or no model was named.
        CheckpointNotFoundError: there is no such folder or file.
        DeploymentExistsError: a deployment of this name is running.
        PortTakenError: a port that was asked for is taken.
        PlacementError, HostfileError: replicas, devices, hosts or ports do not fit together.
        UnsupportedFeatureError: a tokenizer that is an object.
        LauncherError: this program runs in several processes, or what starts them on other hosts is missing.
        DeploymentError: a process did not start. Nothing of the deployment is left.

    Example:
        client = mii.serve("path-or-id", deployment_name="demo", replica_num=2, enable_restful_api=True)
        print(client.generate("DeepSpeed is", max_new_tokens=128))
        client.terminate_server()
    """
    config = serve_config(model_name_or_path, model_config, mii_config, **kwargs)
    from mii.backend.server import MIIServer

    server = MIIServer(config)
    from mii.backend import MIIClient

    return MIIClient(server.mii_config)


def serve_config(
    model_name_or_path: str = "",
    model_config: dict[str, Any] | None = None,
    mii_config: dict[str, Any] | None = None,
    **kwargs: Any,
) -> MIIConfig:
    """The config that `serve` starts, from the same arguments; raises what `serve` says of them."""
    config = _parse_kwargs_to_mii_config(model_name_or_path, model_config, mii_config, **kwargs)
    _check_model_path(config.model_conf.model_name_or_path)
    return config


def balance_config(model: str, replica_addresses: list[str], **kwargs: Any) -> MIIConfig:
    """The config of a load balancer over replicas that others run.

    Args:
        model: its name, as callers give it; no file is read.
        replica_addresses: see `MIIConfig`.
        **kwargs: options of `MIIConfig`.
    """
    return _parse_kwargs_to_mii_config(model, mii_config={"replica_addresses": replica_addresses}, **kwargs)


def client(model_or_deployment_name: str) -> MIIClient:
    """A client of a deployment that runs on this machine, whoever started it under the same user.

    Args:
        model_or_deployment_name: its name or, if it was given none, its model's.

    Raises:
        DeploymentNotFoundError: there is none of that name, or it has ended.
        TypeError: the name is neither a string nor a path.

    Example:
        print(mii.client("demo").generate("DeepSpeed is"))
    """
    if not isinstance(model_or_deployment_name, str | os.PathLike):
        raise TypeError(f"the deployment is {model_or_deployment_name!r}; give its name, or its model's, as a string")
    from mii.backend.deployment import find_alive

    config = find_alive(os.fspath(model_or_deployment_name)).config
    from mii.backend import MIIClient

    return MIIClient(config)


def _load(config: ModelConfig, all_rank_output: bool = False) -> tuple[TokenEngine, MIITokenizerWrapper]:
    """All of a model, or this process's part of it."""
    _check_processes(config)
    with importing():
        import mii.engine.loading  # noqa: F401  and with it torch
    if config.tensor_parallel == 1:
        return _read_model(config)
    from mii.parallel.engines import OtherEngine
    from mii.parallel.script import join

    ranks = join(config, keeps=all_rank_output)
    with ranks.loading():
        engine, tokenizer = _read_model(config, ranks)
    if isinstance(engine, OtherEngine):
        engine.start()
    return engine, tokenizer


def _read_model(config: ModelConfig, ranks: Ranks | None = None) -> tuple[TokenEngine, MIITokenizerWrapper]:
    """The tokenizer comes first: a model without one is found out before its weights are read."""
    from mii.engine import build_engine
    from mii.modeling.checkpoint import open_checkpoint
    from mii.modeling.tokenizers import load_tokenizer

    model, revision, trust = config.model_name_or_path, config.revision, config.trust_remote_code
    with open_checkpoint(model, revision=revision, trust_remote_code=trust) as checkpoint:
        if config.tokenizer == model:
            tokenizer = load_tokenizer(model, checkpoint=checkpoint, revision=revision, trust_remote_code=trust)
        else:  # the revision is the model's
            tokenizer = load_tokenizer(config.tokenizer, trust_remote_code=trust)
        return build_engine(config, checkpoint, config.progress, ranks), tokenizer


def _check_model_path(model: str) -> None:
    """What can only be a path must exist; whether anything else is a model is found out by the processes."""
    path = Path(model).expanduser()
    if model.startswith((".", "~", "/")) and not path.exists():
        raise CheckpointNotFoundError(f"there is no folder or file {model}; give one, or the id of a hub repository")


def _check_processes(config: ModelConfig) -> None:
    processes = world_size()
    wanted = config.tensor_parallel
    if wanted == processes:
        return
    from mii.parallel.environment import told_by_first

    if wanted > processes:
        raise told_by_first(
            LauncherError(
                f"tensor_parallel={wanted} needs {wanted} processes and there are {processes}; start the script with "
                f"deepspeed --num_gpus {wanted} script.py or torchrun --nproc_per_node {wanted} script.py"
            )
        )
    raise told_by_first(
        LauncherError(
            f"tensor_parallel={wanted} and {processes} processes were started (WORLD_SIZE); leave tensor_parallel out, "
            f"or start {wanted}"
        )
    )


def _parse_kwargs_to_model_config(
    model_name_or_path: str = "", model_config: dict[str, Any] | None = None, **kwargs: Any
) -> tuple[ModelConfig, dict[str, Any]]:
    """The config of a model, and the keyword arguments that are none of its options."""
    options = dict(_checked_dict("model_config", {} if model_config is None else model_config))
    if model_name_or_path:
        _merge(options, "model_config", "model_name_or_path", model_name_or_path)
    unknown = {}
    for name, value in kwargs.items():
        if name in ModelConfig.model_fields:
            _merge(options, "model_config", name, value)
        else:
            unknown[name] = value
    return ModelConfig(**options), unknown


def _parse_kwargs_to_mii_config(
    model_name_or_path: str = "",
    model_config: dict[str, Any] | None = None,
    mii_config: dict[str, Any] | None = None,
    **kwargs: Any,
) -> MIIConfig:
    """The config of a deployment; `model_config` counts before one inside `mii_config`."""
    options = dict(_checked_dict("mii_config", {} if mii_config is None else mii_config))
    if model_config is None:
        model_config = options.get("model_config", {})
    model, others = _parse_kwargs_to_model_config(model_name_or_path, model_config, **kwargs)
    options["model_config"] = model
    for name, value in others.items():
        if name not in MIIConfig.model_fields:
            _refuse("mii.serve", {name: value}, [*MIIConfig.option_names(), *ModelConfig.option_names()])
        _merge(options, "mii_config", name, value)
    return MIIConfig(**options)


def _checked_dict(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise ArgumentTypeError(
        f"{name} is of type {type(value).__name__}; it must be a dict (of a config object: its model_dump())"
    )


def _merge(options: dict[str, Any], origin: str, name: str, value: Any) -> None:
    if name in options and options[name] != value:
        raise ArgumentConflictError(
            f"{name} is {value!r} as an argument and {options[name]!r} in {origin}; give it once, or twice the same"
        )
    options[name] = value


def _refuse(function: str, unknown: Mapping[str, Any], allowed: list[str]) -> NoReturn:
    """Raises `UnknownArgument` with the way out for each unknown option."""
    raise UnknownArgument("; ".join(_way_out(function, name, allowed) for name in unknown))


def _way_out(function: str, name: str, allowed: list[str]) -> str:
    message = f"{function} has no option {name!r}"
    if name in MIIConfig.option_names():
        return f"{message}, which is one of mii.serve"
    if name == "all_rank_output":
        return f"{message}, which is one of mii.pipeline"
    if name in GenerateParamsConfig.option_names():
        return f"{message}, which is one of each call: pipe(prompts, {name}=...)"
    return message + suggest(name, allowed)
