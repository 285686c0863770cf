"""An engine process with random weights in place of a checkpoint's, for deployments that are to be measured.

    python -m benchmarks.random_engine <folder of the deployment> replica-<i>-engine

The model is a folder with a config.json and a tokenizer, as `write_shape` makes it; its weights are made on the device,
so nothing of their size is ever on a disk.
"""

from __future__ import annotations

import json
from pathlib import Path

from mii.benchmark.shapes import SHAPES
from mii.launch.engine import serve
from mii.launch.process import Process
from mii.progress import report_progress_to

__all__ = ["write_shape"]


def write_shape(shape: str, folder: Path, layers: int | None = None) -> None:
    """Writes what the processes of a deployment read of a model, but for the weights.

    Args:
        shape: one of `mii.benchmark.shapes.SHAPES`.
        folder: where to.
        layers: how many of the shape's layers; None: all.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    fields = dict(SHAPES[shape])
    if layers is not None:
        fields["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(fields))
    # A word for each token, so that every token of an answer is text that has to be carried.
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"\u0120{number:x}" for number in range(int(fields["vocab_size"]) - len(tokens))]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def main() -> None:
    """Makes the weights and serves until a stop is requested."""
    with Process.from_arguments() as process:
        process.report("importing torch")
        from mii.benchmark.random_checkpoint import RandomCheckpoint
        from mii.engine import build_engine
        from mii.engine.devices import choose_device

        report_progress_to(process.report)
        config = process.model_config
        fields = json.loads(Path(config.model_name_or_path, "config.json").read_text())
        device = choose_device(config.device, config.local_device)
        with RandomCheckpoint(fields, device, config.model_name_or_path) as checkpoint:
            engine = build_engine(config, checkpoint)
        serve(engine, process)


if __name__ == "__main__":
    main()
