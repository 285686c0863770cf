"""The mixes are what other engines were measured on: their numbers must not drift."""

from __future__ import annotations

import hashlib

import pytest

from mii.benchmark.shapes import MIXES, SHAPES, make_batch, make_mix, with_fresh_ids


@pytest.mark.parametrize(
    ("name", "count", "prompt_tokens", "new_tokens", "digest"),
    [
        ("prefill-2048", 64, 131072, 64, "72755ff06d4955a1"),
        ("fastgen-2600-60", 192, 490712, 11658, "37ec8c0582558af6"),
        ("chat", 768, 170245, 146236, "b3ce86796a3b9022"),
        ("decode-128-512", 384, 49152, 196608, "01fda20cf8ac5486"),
        ("even-1024-1024", 128, 131072, 131072, "3b6ebf57263a8314"),
        ("long-7900-256", 48, 379200, 12288, "84378b3b8f70cc7b"),
        ("answers-256", 256, 32768, 131072, "69d047480b08136b"),
    ],
)
def test_mixes_are_the_measured_ones(name: str, count: int, prompt_tokens: int, new_tokens: int, digest: str) -> None:
    jobs = make_mix(name, SHAPES["llama3-8b"]["vocab_size"])
    assert len(jobs) == count
    assert sum(len(job.prompt_ids) for job in jobs) == prompt_tokens
    assert sum(job.new_tokens for job in jobs) == new_tokens
    drawn = repr([(job.prompt_ids, job.new_tokens) for job in jobs])
    assert hashlib.sha256(drawn.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", MIXES)
def test_every_request_fits_into_every_shape(name: str) -> None:
    jobs = make_mix(name, 32000)
    limit = min(shape["max_position_embeddings"] for shape in SHAPES.values())
    assert all(len(job.prompt_ids) + job.new_tokens < limit for job in jobs)


def test_fresh_ids_keep_lengths_and_vocabulary_and_change_every_token() -> None:
    vocab = 300
    jobs = make_batch(3, 40, 5, vocab)
    for shift in (1, 2, 5):
        fresh = with_fresh_ids(jobs, vocab, shift)
        for before, after in zip(jobs, fresh, strict=True):
            assert (len(after.prompt_ids), after.new_tokens) == (40, 5)
            assert all(a != b for a, b in zip(before.prompt_ids, after.prompt_ids, strict=True))
            assert all(10 <= token < vocab - 10 for token in after.prompt_ids)
