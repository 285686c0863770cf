"""The container of GGUF files: what is read, and that every kind of damage is one clear error."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from mii.errors import CheckpointError, CheckpointNotFoundError, UnsupportedModelError
from mii.modeling.checkpoint import open_checkpoint
from mii.modeling.checkpoint.gguf.reader import GGUFFile
from tests.modeling.gguf_files import by_hand, description, finish, number_key, string, text_key


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file with metadata of every kind and two tensors."""
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
    writer.add_uint8("k.u8", 200)
    writer.add_int8("k.i8", -7)
    writer.add_int16("k.i16", -300)
    writer.add_uint64("k.u64", 1 << 60)
    writer.add_int64("k.i64", -(1 << 60))
    writer.add_float32("k.f32", 0.5)
    writer.add_float64("k.f64", 0.1)
    writer.add_bool("k.yes", True)
    writer.add_bool("k.no", False)
    writer.add_string("k.text", "naïve 日本")
    writer.add_array("k.strings", ["a", "", "ß", "b" * 300])
    writer.add_array("k.numbers", [1, 2, 3])
    writer.add_array("k.floats", [0.25, -1.5])
    writer.add_array("k.bools", [True, False])
    writer.add_tensor("first", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("second", np.arange(6, dtype=np.float16))
    return finish(writer)


def test_metadata_of_every_kind_is_read(written: Path) -> None:
    metadata = GGUFFile(written).metadata
    assert metadata["general.architecture"] == "llama"
    assert [metadata[f"k.{kind}"] for kind in ("u8", "i8", "i16")] == [200, -7, -300]
    assert [metadata["k.u64"], metadata["k.i64"]] == [1 << 60, -(1 << 60)]
    assert [metadata["k.f32"], metadata["k.f64"]] == [0.5, 0.1]
    assert metadata["k.yes"] is True
    assert metadata["k.no"] is False
    assert metadata["k.text"] == "naïve 日本"
    assert metadata["k.strings"] == ["a", "", "ß", "b" * 300]
    assert metadata["k.numbers"].tolist() == [1, 2, 3]
    assert metadata["k.floats"].tolist() == [0.25, -1.5]
    assert metadata["k.bools"].tolist() == [True, False]


def test_shapes_have_rows_first_and_data_is_found(written: Path) -> None:
    file = GGUFFile(written)
    first, second = file.tensors["first"], file.tensors["second"]
    assert (first.shape, second.shape) == ((3, 4), (6,))
    assert (first.type.name, second.type.name) == ("F32", "F16")
    stored = file.file.tensor(first.start, first.type.dtype, first.shape)
    assert stored.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_version_2_is_read_like_version_3(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "2.gguf", version=2, keys=number_key("n", 5), key_count=1)
    assert GGUFFile(path).metadata == {"n": 5}


def test_a_file_cut_anywhere_is_reported_as_truncated(written: Path, tmp_path: Path) -> None:
    whole = written.read_bytes()  # ends with 12 bytes of data and 20 of padding
    for length in [*range(4, 700, 7), len(whole) - 33, len(whole) - 21]:
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            GGUFFile(cut)


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_to_the_header_never_escapes_as_another_error(written: Path, tmp_path: Path, seed: int) -> None:
    whole = bytearray(written.read_bytes())
    random = np.random.default_rng(seed)
    for _ in range(150):
        damaged = bytearray(whole)
        for position in random.integers(0, 700, 3):
            damaged[position] = random.integers(0, 256)
        path = tmp_path / "damaged.gguf"
        path.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):  # anything else fails the test; so would a crash
            GGUFFile(path).close()


def one(name: str = "t", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> dict[str, object]:
    return {"tensors": description(name, shape, kind, offset), "tensor_count": 1, "data": bytes(64)}


BROKEN = {
    "another magic": ({"magic": b"GGML"}, "is not a GGUF file"),
    "version 1": ({"version": 1}, "version 1; mii reads versions 2 and 3"),
    "version 9": ({"version": 9}, "version 9; mii reads versions 2 and 3"),
    "big-endian": ({"version": 3 << 24}, "big-endian"),
    "more keys than bytes": ({"key_count": 1 << 62}, "truncated or corrupt"),
    "more tensors than bytes": ({"tensor_count": 1 << 62}, "truncated or corrupt"),
    "a huge string": ({"keys": struct.pack("<Q", 1 << 63), "key_count": 1}, "truncated or corrupt"),
    "a huge array": (
        {"keys": string("a") + struct.pack("<IIQ", 9, 8, 1 << 61), "key_count": 1},
        "truncated or corrupt",
    ),
    "an array of arrays of arrays": (
        {"keys": string("a") + struct.pack("<IIQIQIQ", 9, 9, 1, 9, 1, 9, 1), "key_count": 1},
        "unknown type 9",
    ),
    "an unknown value type": ({"keys": string("a") + struct.pack("<I", 77), "key_count": 1}, "unknown type 77"),
    "the same key twice": ({"keys": number_key("a", 1) * 2, "key_count": 2}, "'a' occurs twice"),
    "an alignment of 0": ({"keys": number_key("general.alignment", 0), "key_count": 1}, "general.alignment is 0"),
    "an alignment in words": ({"keys": text_key("general.alignment", "x"), "key_count": 1}, "general.alignment is 'x'"),
    "five dimensions": (one(shape=(1, 1, 1, 1, 1)), "5 dimensions"),
    "an unknown tensor type": (one(kind=1234), "of type 1234"),
    "a row that is no multiple of the block": (one(shape=(2, 33), kind=8), "no multiple of Q8_0's block of 32"),
    "data past the end": (one(offset=1 << 40), "truncated: tensor t ends at byte"),
    "a tensor larger than the file": (one(shape=(1 << 50,)), "truncated: tensor t ends at byte"),
    "an offset off the alignment": (one(offset=4), "off the alignment of 32"),
    "the same tensor twice": (
        {"tensors": description("t", (4,), 0, 0) + description("t", (4,), 0, 32), "tensor_count": 2, "data": bytes(64)},
        "tensor t occurs twice",
    ),
    "overlapping tensors": (
        {"tensors": description("a", (16,), 0, 0) + description("b", (4,), 0, 32), "tensor_count": 2,
         "data": bytes(64)},
        "inside of a",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    parts, message = BROKEN[case]
    with pytest.raises(CheckpointError, match=message):
        GGUFFile(by_hand(tmp_path / "broken.gguf", **parts))


def test_an_empty_file_and_a_git_lfs_pointer_are_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is empty"):
        GGUFFile(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        GGUFFile(path)


def test_a_file_that_does_not_say_what_model_it_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no metadata key general\.architecture"):
        open_checkpoint(by_hand(tmp_path / "m.gguf"))


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "m.gguf", keys=text_key("general.architecture", "rwkv7"), key_count=1)
    with pytest.raises(UnsupportedModelError, match=r"'rwkv7'; mii reads these from GGUF: llama, "):
        open_checkpoint(path)


def test_a_quantisation_without_unpacking_is_named(tmp_path: Path) -> None:
    path = by_hand(
        tmp_path / "m.gguf",
        keys=text_key("general.architecture", "llama"),
        key_count=1,
        tensors=description("token_embd.weight", (1, 256), 16, 0),
        tensor_count=1,
        data=bytes(96),
    )
    with pytest.raises(CheckpointError, match=r"token_embd.weight is quantised as IQ2_XXS.*Q4_K"):
        open_checkpoint(path)


def test_a_missing_part_of_a_split_file_is_named(tmp_path: Path) -> None:
    path = by_hand(tmp_path / "m-00002-of-00003.gguf")
    with pytest.raises(CheckpointNotFoundError, match=r"m-00001-of-00003\.gguf is missing"):
        open_checkpoint(path)
