"""Buffers that share memory: which may, and that those that may not never do."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mii.modeling.liveness import ALWAYS, STAGES, Claim, lay_out, life

SPANS = st.tuples(st.sampled_from(STAGES), st.sampled_from(STAGES))
CLAIMS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=2),
    st.builds(Claim, st.integers(0, 9), st.builds(lambda spans: life(*spans), st.lists(SPANS, max_size=2))),
    max_size=10,
)


@given(CLAIMS)
def test_no_two_that_are_needed_at_once_share_memory(claims: dict[str, Claim]) -> None:
    places = lay_out(claims)
    assert places.keys() == claims.keys()
    for stage in STAGES:
        taken = [
            unit
            for name, claim in claims.items()
            if stage in claim.life
            for unit in range(places[name], places[name] + claim.size)
        ]
        assert len(taken) == len(set(taken))


def test_what_is_needed_at_other_times_takes_the_same_place() -> None:
    claims = {"a": Claim(4, life(("norm", "qkv"))), "b": Claim(6, life(("attend", "end"))), "c": Claim(1, ALWAYS)}
    assert lay_out(claims) == {"b": 0, "a": 0, "c": 6}


def test_a_gap_that_is_large_enough_is_used() -> None:
    first, last = life(("norm", "norm")), life(("end", "end"))
    claims = {"long": Claim(9, last), "both": Claim(5, first | last), "short": Claim(3, first), "more": Claim(8, first)}
    assert lay_out(claims) == {"long": 0, "more": 0, "both": 9, "short": 14}
    del claims["more"]
    assert lay_out(claims)["short"] == 0


def test_a_life_is_all_stages_of_its_spans() -> None:
    assert life(("qkv", "output"), ("end", "end")) == {"qkv", "attend", "output", "end"}
    assert life() == frozenset()
