"""Tokens of many requests become their texts, lengths and reasons."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mii.batching.data_classes import EngineRequest, GenerationFinishReason, StepOutput, TokenLogprob, TokenOutput
from mii.batching.generation.detokenizer import TokenDecoder
from mii.batching.generation.stops import StopStrings
from mii.batching.tracker import RequestTracker, TextEvent
from tests.batching.fake_engine import END, byte_tokenizer
from tests.batching.generation.vocabularies import sentencepiece

DECODER = TokenDecoder(byte_tokenizer())
STOP, LENGTH, NONE = GenerationFinishReason.STOP, GenerationFinishReason.LENGTH, GenerationFinishReason.NONE


def track(
    text: bytes, stops: list[str], *, end: str = "length", min_new_tokens: int = 0, step: int = 1
) -> list[TextEvent]:
    """The events of an answer whose tokens are the bytes of `text`, `step` of them at a time."""
    tracker = RequestTracker(DECODER)
    request = EngineRequest(1, [0], 1000, min_new_tokens, (END,))
    tracker.add(request, StopStrings(stops))
    tokens = [*text, END] if end == "stop" else list(text)
    starts = range(0, len(tokens), step)
    events = [
        tracker.update(TokenOutput(1, tokens[at : at + step], end if at == starts[-1] else None)) for at in starts
    ]
    return [event for event in events if event is not None]


def joined(events: list[TextEvent]) -> str:
    return "".join(event.text for event in events)


def test_the_end_of_text_token_is_counted_and_not_shown() -> None:
    events = track(b"ab", [], end="stop")
    assert joined(events) == "ab"
    assert (events[-1].generated_length, events[-1].finish_reason) == (3, STOP)
    assert [event.finish_reason for event in events[:-1]] == [NONE, NONE]


def test_a_token_that_ends_by_length_is_shown() -> None:
    events = track(b"ab", [])
    assert (joined(events), events[-1].generated_length, events[-1].finish_reason) == ("ab", 2, LENGTH)


def test_a_stop_string_ends_the_text_and_tells_the_engine() -> None:
    events = track(b"one\nUser: two", ["\nUser:"])
    assert (joined(events), events[-1].finish_reason, events[-1].abort) == ("one", STOP, True)
    assert events[-1].generated_length == len("one\nUser:")
    assert len(events) == events[-1].generated_length


def test_tokens_after_a_stop_string_in_the_same_step_are_not_counted() -> None:
    events = track(b"one END two", ["END"], step=9)
    assert (joined(events), events[-1].generated_length, events[-1].abort) == ("one ", 7, True)


def test_a_stop_string_on_the_last_token_needs_no_abort() -> None:
    events = track(b"ab END", ["END"])
    assert (joined(events), events[-1].finish_reason, events[-1].abort) == ("ab ", STOP, False)


def test_what_was_held_back_comes_when_the_text_ends_otherwise() -> None:
    events = track(b"ab EN", ["END"], end="stop")
    assert [event.text for event in events] == ["a", "b", " ", "", "", "EN"]


def test_a_stop_string_does_not_count_within_min_new_tokens() -> None:
    events = track(b"xEND and END", ["END"], min_new_tokens=6)
    assert (joined(events), events[-1].finish_reason) == ("xEND and ", STOP)


def test_a_character_cut_in_half_by_the_end_is_a_replacement_character() -> None:
    assert joined(track("a😀".encode()[:3], [])) == "a\ufffd"


def test_an_error_ends_the_request_and_keeps_its_text() -> None:
    tracker = RequestTracker(DECODER)
    tracker.add(EngineRequest(1, [0], 10), StopStrings())
    tracker.update(TokenOutput(1, [ord("a")]))
    event = tracker.update(TokenOutput(1, [], "error", "no room"))
    assert event is not None
    assert (event.error, event.finished, event.finish_reason, 1 in tracker) == ("no room", True, NONE, False)


def test_what_comes_after_the_end_is_ignored() -> None:
    tracker = RequestTracker(DECODER)
    tracker.add(EngineRequest(1, [0], 10), StopStrings(["a"]))
    assert tracker.update(TokenOutput(1, [ord("a")])) is not None
    assert tracker.update(TokenOutput(1, [ord("b")])) is None
    assert tracker.update(TokenOutput(2, [ord("b")])) is None
    assert len(tracker) == 0


def test_special_tokens_are_skipped_when_asked() -> None:
    tracker = RequestTracker(DECODER)
    tracker.add(EngineRequest(1, [0], 10), StopStrings(), skip_special_tokens=True)
    tracker.add(EngineRequest(2, [0], 10), StopStrings())
    events = [tracker.update(TokenOutput(uid, [ord("a"), END, ord("b")], "length")) for uid in (1, 2)]
    assert [event.text for event in events if event is not None] == ["ab", "a</s>b"]


@pytest.fixture(scope="module")
def llama_like() -> Tokenizer:
    return sentencepiece()


def test_a_stop_string_of_byte_tokens_is_found_with_its_last_byte(llama_like: Tokenizer) -> None:
    """Llama 2 writes a newline as a byte token, whose text is sure with the next token only; the stop must not wait."""
    tracker = RequestTracker(TokenDecoder(llama_like))
    tracker.add(EngineRequest(1, [0], 10), StopStrings(["\n\n"]))
    ids = [llama_like.token_to_id(token) for token in ("▁a", "<0x0A>", "<0x0A>", "b")]
    events = [tracker.update(TokenOutput(1, [token])) for token in ids]
    seen = [event and (event.text, event.finish_reason) for event in events]
    assert seen == [("a", NONE), ("", NONE), ("", STOP), None]


@given(
    text=st.text(alphabet="abE é😀\n", max_size=40),
    stops=st.lists(st.text(alphabet="abE é😀\n", min_size=1, max_size=5), max_size=3),
    step=st.integers(1, 5),
    end=st.sampled_from(["stop", "length"]),
)
def test_text_and_length_do_not_depend_on_how_many_tokens_come_at_once(
    text: str, stops: list[str], step: int, end: str
) -> None:
    raw = text.encode()
    if not raw and end == "length":
        return
    one, many = track(raw, stops, end=end), track(raw, stops, end=end, step=step)
    assert joined(one) == joined(many)
    assert (one[-1].generated_length, one[-1].finish_reason) == (many[-1].generated_length, many[-1].finish_reason)
    if not any(stop in text for stop in stops):
        assert (joined(one), one[-1].generated_length) == (text, len(raw) + (end == "stop"))
    else:
        assert all(stop not in joined(one) for stop in stops)


def scored(tokens: list[int]) -> list[TokenLogprob]:
    return [TokenLogprob(token, -0.5, (TokenLogprob(token, -0.5), TokenLogprob(65, -2.0))) for token in tokens]


def test_log_probabilities_get_their_tokens_bytes_and_those_behind_the_end_of_the_text_are_dropped() -> None:
    tracker = RequestTracker(DECODER)
    tracker.add(EngineRequest(1, [0], 1000, 0, (END,)), StopStrings(["cd"]))
    tokens = list("é".encode())
    prompt = [TokenLogprob(END, None), *scored([66])]
    first = tracker.update(TokenOutput(1, tokens, logprobs=scored(tokens), prompt_logprobs=prompt))
    assert first is not None
    assert [(entry.token, [top.token for top in entry.top]) for entry in first.logprobs or ()] == [
        (b"\xc3", [b"\xc3", b"A"]),
        (b"\xa9", [b"\xa9", b"A"]),
    ]
    assert [(entry.token, entry.logprob) for entry in first.prompt_logprobs or ()] == [(b"</s>", None), (b"B", -0.5)]
    last = tracker.update(TokenOutput(1, list(b"bcdef"), logprobs=scored(list(b"bcdef"))))
    assert last is not None
    assert (last.text, last.finish_reason, last.prompt_logprobs) == ("b", STOP, None)
    assert [entry.token for entry in last.logprobs or ()] == [b"b", b"c", b"d"]


def test_the_token_that_ends_the_text_has_its_log_probability_too() -> None:
    tracker = RequestTracker(DECODER)
    tracker.add(EngineRequest(1, [0], 1000, 0, (END,)), StopStrings([]))
    event = tracker.update(TokenOutput(1, [97, END], "stop", logprobs=scored([97, END])))
    assert event is not None
    assert (event.text, [entry.token for entry in event.logprobs or ()]) == ("a", [b"a", b"</s>"])


def test_an_answer_whose_log_probabilities_nobody_wants_has_none() -> None:
    assert all(event.logprobs is event.prompt_logprobs is None for event in track(b"abc", []))


def events_of(texts: dict[int, bytes], stops: list[str], whole: bool) -> dict[int, list[TextEvent]]:
    """The events of answers that end by length, a token of each in a step; the shortest end first."""
    tracker = RequestTracker(DECODER)
    for uid in texts:
        tracker.add(EngineRequest(uid, [0], 1000, stop_ids=(END,)), StopStrings(stops), whole=whole)
    events: dict[int, list[TextEvent]] = {uid: [] for uid in texts}
    for at in range(max(map(len, texts.values()))):
        outputs = [
            TokenOutput(uid, [text[at]], "length" if at == len(text) - 1 else None)
            for uid, text in texts.items()
            if at < len(text)
        ]
        for event in tracker.take(StepOutput.of(outputs)):
            events[event.uid].append(event)
    assert len(tracker) == 0
    return events


@given(st.dictionaries(st.integers(1, 9), st.text("aUse:\né", min_size=1, max_size=30), min_size=1, max_size=5))
def test_an_answer_told_of_at_its_end_is_what_its_pieces_come_to(texts: dict[int, str]) -> None:
    given = {uid: text.encode() for uid, text in texts.items()}
    pieces, wholes = (events_of(given, ["User:", "ee"], whole) for whole in (False, True))
    for uid, events in pieces.items():
        (whole,) = wholes[uid]
        last = events[-1]
        assert whole.text == joined(events)
        assert whole.new_tokens == whole.generated_length == sum(event.new_tokens for event in events)
        assert (whole.generated_length, whole.finish_reason) == (last.generated_length, last.finish_reason)
        assert whole.abort == last.abort
        assert [event.generated_length for event in events] == [at + 1 for at in range(len(events))]


def test_a_step_tells_nothing_of_requests_that_are_gone_or_of_others() -> None:
    tracker = RequestTracker(DECODER)
    tracker.add(EngineRequest(1, [0], 1000), StopStrings())
    step = StepOutput([1, 2], [97, 98], [TokenOutput(3, [99], "stop")])
    assert [(event.uid, event.text) for event in tracker.take(step)] == [(1, "a")]
    tracker.discard(1)
    assert tracker.take(step) == []


@pytest.mark.parametrize("whole", [False, True])
def test_tokens_of_which_there_is_more_to_say_and_others_come_in_their_order(whole: bool) -> None:
    tracker = RequestTracker(DECODER)
    tracker.add(EngineRequest(1, [0], 1000, stop_ids=(END,)), StopStrings([]), whole=whole)
    text = b"now one, now the other"
    events: list[TextEvent] = []
    for at, token in enumerate(text[:-1]):
        columns = StepOutput([1], [token], []) if at % 3 else StepOutput([], [], [TokenOutput(1, [token])])
        events += tracker.take(columns)
    events += tracker.take(StepOutput([], [], [TokenOutput(1, [text[-1]], "length")]))
    assert joined(events) == text.decode()
    assert len(events) == (1 if whole else len(text))
    assert sum(event.new_tokens for event in events) == events[-1].generated_length == len(text)
