"""Stop strings against a search of the whole text, for any texts, stop strings and borders between pieces."""

from __future__ import annotations

import itertools
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mii.batching.generation.stops import StopMatcher, StopStrings

LETTERS = st.text(alphabet="ab\n😀", max_size=40)
STOPS = st.lists(st.text(alphabet="ab\n😀", min_size=1, max_size=6), max_size=5)


def first_stop(text: str, stops: list[str], armed_from: int = 0) -> tuple[int, str] | None:
    """Where the first complete stop string begins, and which: tries every end, longest first."""
    for end in range(armed_from + 1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return end - len(longest), longest
    return None


def split(text: str, borders: list[int]) -> list[str]:
    cuts = [0, *sorted(min(border, len(text)) for border in borders), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(cuts)]


@given(text=LETTERS, stops=STOPS, borders=st.lists(st.integers(0, 40)))
def test_text_ends_where_the_full_search_says_for_any_pieces(text: str, stops: list[str], borders: list[int]) -> None:
    matcher = StopMatcher(StopStrings(stops))
    shown = "".join(matcher.feed(piece) for piece in split(text, borders)) + matcher.flush()
    expected = first_stop(text, stops)
    if expected is None:
        assert (shown, matcher.matched) == (text, None)
    else:
        assert (shown, matcher.matched) == (text[: expected[0]], expected[1])


@given(text=LETTERS, stops=STOPS)
def test_only_what_might_become_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    matcher, shown = StopMatcher(StopStrings(stops)), ""
    for at, char in enumerate(text, 1):
        shown += matcher.feed(char)
        if matcher.matched is not None:
            return
        held = text[len(shown) : at]
        starts = {stop[:size] for stop in stops for size in range(1, len(stop))}
        assert held == max((s for s in starts if text[:at].endswith(s)), key=len, default="")


@given(text=LETTERS, stops=STOPS, armed_from=st.integers(0, 20), borders=st.lists(st.integers(0, 40)))
def test_stop_strings_complete_before_they_count_are_text(
    text: str, stops: list[str], armed_from: int, borders: list[int]
) -> None:
    matcher, at, shown = StopMatcher(StopStrings(stops)), 0, ""
    for piece in split(text, [*borders, armed_from]):
        shown += matcher.feed(piece, armed=at >= armed_from)
        at += len(piece)
    expected = first_stop(text, stops, armed_from)
    assert shown + matcher.flush() == text[: expected[0] if expected else None]


@given(fed=LETTERS, ahead=st.lists(LETTERS, max_size=4), later=LETTERS, stops=STOPS)
def test_looking_ahead_finds_what_feeding_would_and_changes_nothing(
    fed: str, ahead: list[str], later: str, stops: list[str]
) -> None:
    looking, feeding = StopMatcher(StopStrings(stops)), StopMatcher(StopStrings(stops))
    shown = looking.feed(fed)
    assert shown == feeding.feed(fed)
    for piece in ahead:
        found = looking.look_ahead(piece)
        if looking.matched is not None:
            total = first_stop(fed + "".join(ahead), stops)
            assert total is not None
            assert (shown + (found or ""), looking.matched) == ((fed + "".join(ahead))[: total[0]], total[1])
            return
    assert looking.matched is not None or first_stop(fed + "".join(ahead), stops) is None
    assert looking.feed(later) + looking.flush() == feeding.feed(later) + feeding.flush()


def test_nothing_comes_after_the_match() -> None:
    matcher = StopMatcher(StopStrings(["END"]))
    assert [matcher.feed(piece) for piece in ("abE", "NDxyz", "more")] == ["ab", "", ""]
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


def test_work_grows_with_the_text_and_not_with_the_stop_string() -> None:
    """Counts lines run: a stop string of 2,000 characters costs no more a character than one of 20."""

    def lines_run(size: int) -> int:
        matcher, count = StopMatcher(StopStrings(["a" * size + "b"])), 0

        def trace(frame: object, event: str, _: object) -> object:
            nonlocal count
            count += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            for _ in range(4000):
                matcher.feed("a")
        finally:
            sys.settrace(before)
        return count

    assert lines_run(2000) < 1.2 * lines_run(20)
