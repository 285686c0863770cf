"""A pipeline's calls: answers in order, streams, failures that stay where they happen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from mii.batching.data_classes import EngineRequest, GenerationFinishReason, Response, StreamedResponse
from mii.errors import GenerationError, PipelineDestroyedError, PromptTooLongError, RequestError
from tests.batching.fake_engine import END, Wrapper, random_letters, saying

Make = Callable[..., tuple[Any, Any]]


def test_answers_are_in_the_order_of_the_prompts_whatever_ends_first(make_pipeline: Make) -> None:
    pipe, _ = make_pipeline(answers=saying("long answer", "x", "middle"), at_once=2)
    responses = pipe(["a", "bb", "ccc"])
    assert [str(response) for response in responses] == ["long answer", "x", "middle"]
    assert [response.prompt_length for response in responses] == [1, 2, 3]
    assert [response.generated_length for response in responses] == [12, 2, 7]
    assert {response.finish_reason for response in responses} == {GenerationFinishReason.STOP}


def test_one_prompt_gives_a_list_of_one_and_none_an_empty_list(make_pipeline: Make) -> None:
    pipe, engine = make_pipeline(answers=saying("hi"))
    assert pipe("a") == [Response("hi", 1, 3, GenerationFinishReason.STOP)]
    assert pipe([]) == []
    assert len(engine.seen) == 1


def test_length_ends_an_answer_exactly(make_pipeline: Make) -> None:
    pipe, _ = make_pipeline(answers=saying("abcdefgh"))
    by_new, by_total = pipe("xx", max_new_tokens=3), pipe("xx", max_length=6)
    assert (str(by_new[0]), by_new[0].finish_reason) == ("abc", "length")
    assert (str(by_total[0]), by_total[0].generated_length) == ("abcd", 4)


def test_the_configs_max_length_bounds_every_call(make_pipeline: Make) -> None:
    pipe, _ = make_pipeline(answers=saying("abcdefgh"), config={"max_length": 5})
    assert pipe.max_length == 5
    assert str(pipe("xx", max_new_tokens=100)[0]) == "abc"


def test_stop_strings_end_an_answer_and_free_the_engine(make_pipeline: Make) -> None:
    pipe, engine = make_pipeline(answers=saying("one. two. three", "no end"))
    first, second = pipe(["a", "b"], stop=["two", ". t"])
    assert (str(first), first.generated_length, first.finish_reason) == ("one", 6, "stop")
    assert str(second) == "no end"
    assert engine.aborted == [engine.seen[0].uid]
    assert not engine.requests


def test_ignore_eos_shows_end_of_text_and_keeps_stop_strings(make_pipeline: Make) -> None:
    def answer(_: EngineRequest) -> Any:
        return iter([*b"a", END, *b"b", END, *b"STOP"])

    pipe, _ = make_pipeline(answers=answer)
    assert str(pipe("x", ignore_eos=True, max_new_tokens=4)[0]) == "a</s>b</s>"
    stopped = pipe("x", ignore_eos=True, stop="STOP")[0]
    assert (str(stopped), stopped.finish_reason) == ("a</s>b</s>", "stop")
    skipped = pipe("x", ignore_eos=True, max_new_tokens=4, skip_special_tokens=True)[0]
    assert (str(skipped), skipped.generated_length) == ("ab", 4)


def test_full_text_is_the_prompt_and_the_answer(make_pipeline: Make) -> None:
    pipe, _ = make_pipeline(answers=saying(" is"), tokenizer=Wrapper(adds_begin=True))
    assert str(pipe("Seattle", return_full_text=True)[0]) == "Seattle is"
    assert str(pipe([[83, 101]], return_full_text=True)[0]) == "Se is"


def test_callbacks_get_one_message_per_token_and_a_last_one(make_pipeline: Make) -> None:
    pipe, _ = make_pipeline(answers=saying("h😀"))
    seen: list[list[Response]] = []
    responses = pipe("ab", streaming_fn=seen.append)
    assert all(len(message) == 1 for message in seen)
    messages = [message[0] for message in seen]
    assert [message.generated_text for message in messages] == ["h", "", "", "", "😀", "", ""]
    assert [message.generated_length for message in messages] == [1, 2, 3, 4, 5, 6, 6]
    assert [message.finish_reason for message in messages] == ["none"] * 6 + ["stop"]
    assert all(message.prompt_length == 2 for message in messages)
    assert len(messages) == responses[0].generated_length + 1
    assert str(responses[0]) == "h😀"


def test_streams_give_each_prompts_pieces_with_its_index(make_pipeline: Make) -> None:
    pipe, _ = make_pipeline(answers=saying("abc END", "d", "ef"), at_once=2)
    texts, reasons = ["", "", ""], {}
    for pieces in pipe.stream(["x", "y", "z"], stop=["END"]):
        assert isinstance(pieces[0], StreamedResponse)
        for piece in pieces:
            texts[piece.index] += piece.generated_text
            if piece.finish_reason != "none":
                reasons[piece.index] = (piece.generated_text, piece.generated_length, piece.finish_reason)
    assert texts == ["abc ", "d", "ef"]
    assert reasons == {0: ("", 7, "stop"), 1: ("", 2, "stop"), 2: ("", 3, "stop")}


def test_a_streams_joined_text_is_the_calls_text(make_pipeline: Make) -> None:
    pipe, _ = make_pipeline()
    options = {"max_new_tokens": 50, "seed": 3, "stop": ["ab", "ca"]}
    joined = "".join(piece.generated_text for pieces in pipe.stream("x", **options) for piece in pieces)
    assert joined == str(pipe("x", **options)[0])


def test_a_stream_checks_at_once_and_generates_later(make_pipeline: Make) -> None:
    pipe, engine = make_pipeline(answers=saying("abc"))
    with pytest.raises(RequestError):
        pipe.stream(["a", ""])
    stream = pipe.stream("a")
    assert not engine.seen
    assert [piece.generated_text for piece in next(stream)] == ["a"]


def test_a_stream_that_is_closed_frees_the_engine(make_pipeline: Make) -> None:
    pipe, engine = make_pipeline(answers=saying("abcdef"))
    stream = pipe.stream(["a", "b"])
    next(stream)
    stream.close()
    assert len(engine.aborted) == 2
    assert not engine.requests


def test_stream_true_is_refused_with_the_way_to_stream(make_pipeline: Make) -> None:
    pipe, _ = make_pipeline()
    with pytest.raises(RequestError, match=r"pipe\.stream"):
        pipe("a", stream=True)


@pytest.mark.parametrize(
    ("prompts", "options", "error"),
    [
        (["good", ""], {}, RequestError),
        (["good", "b" * 3000], {}, PromptTooLongError),
        (["good", "b" * 500], {"max_length": 400}, PromptTooLongError),
        ("good", {"no_such": 1}, ValidationError),
        (["good", None], {}, TypeError),
    ],
)
def test_a_call_that_is_refused_runs_nothing_and_the_next_one_works(
    make_pipeline: Make, prompts: Any, options: dict[str, Any], error: type[Exception]
) -> None:
    pipe, engine = make_pipeline(answers=saying("fine"))
    with pytest.raises(error):
        pipe(prompts, **options)
    assert not engine.seen
    assert [str(response) for response in pipe(["a", "b"])] == ["fine", "fine"]


def test_a_prompt_that_the_engine_refuses_takes_the_whole_call_back(make_pipeline: Make) -> None:
    pipe, engine = make_pipeline(answers=saying("fine"), capacity=10)
    with pytest.raises(PromptTooLongError, match=r"prompt 1 of 3.*11 tokens, the cache holds 10"):
        pipe(["a", "b" * 11, "c"])
    assert not engine.requests
    assert not engine.batch_sizes
    assert str(pipe("a")[0]) == "fine"


def test_a_request_that_fails_alone_leaves_the_others_their_answers(make_pipeline: Make) -> None:
    def answer(request: EngineRequest) -> Any:
        return iter([97, -1]) if request.prompt_ids == [98] else iter(b"fine")

    pipe, _ = make_pipeline(answers=answer)
    with pytest.raises(
        GenerationError, match=r"prompt 1 of 3 \(counted from 0\): its numbers are not finite"
    ) as caught:
        pipe(["a", "b", "c"])
    assert [str(response) for response in caught.value.responses or []] == ["fine", "None", "fine"]
    streamed: list[str] = []
    with pytest.raises(GenerationError):
        streamed.extend(piece.generated_text for pieces in pipe.stream(["b", "c"]) for piece in pieces)
    assert "".join(streamed) == "afine"
    assert str(pipe("a")[0]) == "fine"


def test_a_step_that_fails_ends_the_call_and_the_next_one_works(make_pipeline: Make) -> None:
    def fail_once(step: int) -> None:
        if not failed:
            failed.append(step)
            raise MemoryError("device out of memory")

    failed: list[int] = []
    pipe, engine = make_pipeline(answers=saying("fine"), on_step=fail_once)
    with pytest.raises(GenerationError, match="MemoryError: device out of memory") as caught:
        pipe(["a", "b"])
    assert isinstance(caught.value.__cause__, MemoryError)
    assert not engine.requests
    assert str(pipe("a")[0]) == "fine"


def test_an_engine_that_loses_a_request_is_an_error_and_no_hang(make_pipeline: Make) -> None:
    pipe, engine = make_pipeline(on_step=lambda step: engine.requests.popitem() if step == 2 else None)
    with pytest.raises(GenerationError, match="these requests have not ended"):
        pipe(["a", "b"], max_new_tokens=20)


def test_a_callback_that_raises_ends_the_call_and_the_next_one_works(make_pipeline: Make) -> None:
    pipe, engine = make_pipeline(answers=saying("fine"))
    with pytest.raises(ZeroDivisionError):
        pipe(["a", "b"], streaming_fn=lambda _: 1 / 0)
    assert not engine.requests
    assert str(pipe("a")[0]) == "fine"


def test_a_callback_may_call_the_pipeline(make_pipeline: Make) -> None:
    pipe, _ = make_pipeline(answers=saying("outer", "in"))
    inner: list[str] = []
    outer = pipe("a", streaming_fn=lambda _: inner or inner.append(str(pipe("b")[0])))
    assert (str(outer[0]), inner) == ("outer", ["in"])


def test_destroy_is_harmless_twice_and_use_after_it_is_a_clear_error(make_pipeline: Make) -> None:
    pipe, engine = make_pipeline()
    pipe.destroy()
    pipe.destroy()
    assert engine.destroyed == 1
    assert pipe.inference_engine is None
    for use in (lambda: pipe("a"), lambda: pipe([]), lambda: pipe.stream("a")):
        with pytest.raises(PipelineDestroyedError, match="destroyed"):
            use()
    assert issubclass(PipelineDestroyedError, RuntimeError)


def test_a_pipeline_is_a_context_that_destroys_it(make_pipeline: Make) -> None:
    pipe, engine = make_pipeline(answers=saying("a"))
    with pipe as same:
        same("a")
    assert engine.destroyed == 1


def test_what_scripts_read_off_a_pipeline(make_pipeline: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, engine = make_pipeline()
    assert (pipe.is_rank_0, pipe.local_rank, pipe.max_length, pipe.vocab_size) == (True, 0, 2000, 258)
    assert (pipe.inference_engine, pipe.model_config.model_name_or_path) == (engine, "none")
    assert pipe.tokenizer.eos_token_id == END
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    other, _ = make_pipeline(answers=saying("a"))
    assert (other.is_rank_0, other.local_rank) == (False, 1)
    assert other("x") == []
    assert list(other.stream("x")) == []


def test_equal_seeds_give_equal_answers_and_no_seed_new_ones(make_pipeline: Make) -> None:
    pipe, _ = make_pipeline()
    options = {"max_new_tokens": 20}
    assert pipe(["x", "x"], seed=1, **options) == pipe(["x", "x"], seed=1, **options)
    assert len({str(response) for response in (*pipe(["x", "x"], **options), *pipe(["x", "x"], **options))}) == 4


@pytest.mark.parametrize(
    ("prompts", "options", "config", "terminal", "shown"),
    [
        (6, {}, {}, True, True),
        (6, {}, {}, False, False),
        (6, {}, {"progress": True}, False, True),
        (6, {}, {"progress": False}, True, False),
        (6, {"progress": False}, {"progress": True}, True, False),
        (2, {}, {"progress": True}, True, False),
        (2, {"progress": True}, {}, False, True),
        (6, {"streaming_fn": id}, {}, True, False),
    ],
)
def test_a_progress_bar_shows_for_many_prompts_on_a_terminal(
    make_pipeline: Make,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    prompts: int,
    options: dict[str, Any],
    config: dict[str, Any],
    terminal: bool,
    shown: bool,
) -> None:
    import sys

    pipe, _ = make_pipeline(answers=saying("fine"), config=config)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    pipe(["a"] * prompts, **options)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("prompts" in err) == shown


def test_random_letters_are_a_function_of_prompt_and_seed() -> None:
    """What the tests above rely on."""
    request = EngineRequest(1, [1], 1)
    assert next(random_letters(request)) == next(random_letters(request))
