"""What ranks that do not fit together, or come apart, make of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mii.batching.data_classes import EngineRequest
from mii.errors import GenerationError, LauncherError
from mii.parallel.channel import FirstChannel, OtherChannel
from mii.parallel.messages import Hello
from tests.parallel.test_sharded_models import NINE_HEADS
from tests.parallel.threads import ranked_engine

HELLO = Hello(1, "mii 1", "fp32", "abc", 10)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"versions": "mii 2"}, "its versions are not those of rank 0"),
        ({"options": "bf16"}, "its options are not those of rank 0"),
        ({"options": "fp32, optimize_for=latency"}, "its options are not those of rank 0"),
        ({"weights": "def"}, "its weights are not those of rank 0"),
    ],
)
def test_ranks_with_other_versions_options_or_weights_are_refused(
    tmp_path: Path, change: dict[str, str], said: str
) -> None:
    first = FirstChannel(2, f"ipc://{tmp_path}/steps")
    other = OtherChannel(1, first.address)
    other._send(Hello(**{**{name: getattr(HELLO, name) for name in HELLO.__struct_fields__}, **change}))  # type: ignore[arg-type]
    with pytest.raises(LauncherError, match=f"rank 1 of 2: {said}"):
        first.settle(HELLO)
    assert "rank 1" in str(other.receive())
    first.close()
    other.close()


def test_the_rank_with_the_least_room_decides_how_many_blocks_there_are(tmp_path: Path) -> None:
    first = FirstChannel(2, f"ipc://{tmp_path}/steps")
    other = OtherChannel(1, first.address)
    other._send(Hello(1, "mii 1", "fp32", "abc", 7))
    assert first.settle(HELLO) == 7
    assert other.receive().blocks == 7  # type: ignore[union-attr]
    first.close()
    other.close()


def test_other_weights_on_one_rank_are_found_out(make_checkpoint: Callable[..., Path]) -> None:
    folders = [make_checkpoint(**NINE_HEADS), make_checkpoint(**NINE_HEADS, seed=1)]
    with (
        pytest.raises(LauncherError, match=r"rank 1 of 2: its weights are not those of rank 0"),
        ranked_engine(folders[0], 2, folders=folders),
    ):
        pass


def test_ranks_that_plan_different_steps_end_with_the_reason(make_checkpoint: Callable[..., Path]) -> None:
    with ranked_engine(make_checkpoint(**NINE_HEADS), 2) as first:
        first.add_request(EngineRequest(uid=1, prompt_ids=[5, 6, 7], max_new_tokens=8))
        first.step()
        next(iter(first.engine._sequences.values())).tokens[-1] ^= 1
        with pytest.raises(GenerationError, match=r"rank 1 of 2 failed: it has planned another step than rank 0"):
            first.step()
        with pytest.raises(GenerationError, match="planned another step"):
            first.step()
