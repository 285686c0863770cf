"""What the OpenAI routes take, with the defaults of DeepSpeed-MII, and what it comes to in mii's own options."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from mii.entrypoints.http.bodies import ApiModel
from mii.entrypoints.http.errors import bad_request
from mii.entrypoints.openai.fields import Bias, Limit, Messages, Prompt, Stop, TokenIds, Tools

__all__ = ["ChatCompletionRequest", "CompletionRequest", "SamplingFields", "StreamOptions"]

_MAX_TOKENS = 128  # DeepSpeed-MII's; OpenAI has 16 for completions and no bound for chats
_MAX_TOKENS_SAYS = f"most tokens of an answer, which the model's length may end earlier; {_MAX_TOKENS} by default"
_MOST_CHOICES = 128
_REFUSED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "use_beam_search": (False,),
}


class StreamOptions(ApiModel):
    """What a stream holds besides its text."""

    refused: ClassVar = {"include_obfuscation": (False,)}

    include_usage: bool | None = Field(default=None, description="send a last event with the counts of tokens")


class SamplingFields(ApiModel):
    """Fields that both kinds of completions have."""

    model: str | None = Field(default=None, description="name of the model that is served")
    max_tokens: Limit = Field(default=None, description=_MAX_TOKENS_SAYS)
    max_completion_tokens: Limit = Field(default=None, description="the same, and counts before max_tokens")
    min_tokens: Limit = Field(default=None, description="end-of-text and stop count only after this many tokens")
    temperature: float | None = Field(
        default=0.7, ge=0, allow_inf_nan=False, description="0 is greedy; above 2 little sense is left, and allowed"
    )
    top_p: float | None = Field(default=0.9, gt=0, le=1, description="1 turns it off")
    top_k: int | None = Field(default=None, ge=-1, description="-1 and 0 turn it off")
    min_p: float | None = Field(default=None, ge=0, le=1, description="0 turns it off")
    n: int | None = Field(default=1, ge=1, le=_MOST_CHOICES, description="answers to each prompt")
    seed: int | None = Field(default=None, description="makes answers repeatable")
    stop: Stop = Field(default=[], description="texts at which an answer ends")
    stop_token_ids: TokenIds = Field(default=[], description="tokens at which an answer ends")
    allowed_token_ids: TokenIds = Field(default=[], description="the only tokens of an answer; empty: all")
    ignore_eos: bool | None = Field(default=False, description="go on after end-of-text tokens")
    skip_special_tokens: bool | None = Field(default=True, description="leave special tokens out of the text")
    presence_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)
    logit_bias: Bias = Field(default={}, description="what is added to the logits of tokens")
    stream: bool | None = Field(default=False, description="send the answer as it is made, as server-sent events")
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, description="not used")
    metadata: dict[str, Any] | None = Field(default=None, description="not used")
    prompt_cache_key: str | None = Field(default=None, description="not used; like beginnings are always cached")
    safety_identifier: str | None = Field(default=None, description="not used")

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def options(self) -> dict[str, Any]:
        """mii's generation options. What asks for nothing is left out.

        Raises:
            ApiError: fields do not go together.
        """
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options goes with stream=true only", "stream_options")
        wanted: dict[str, Any] = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "max_new_tokens": self._most_tokens(),
            "skip_special_tokens": self.skip_special_tokens is not False,
        }
        asked = {
            "top_k": self.top_k if self.top_k and self.top_k > 0 else None,
            "min_p": self.min_p,
            "min_new_tokens": self.min_tokens,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "allowed_token_ids": self.allowed_token_ids,
            "ignore_eos": self.ignore_eos,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty if self.repetition_penalty != 1 else None,
            "logit_bias": self.logit_bias,
        }
        wanted.update({name: value for name, value in asked.items() if value})
        if self.seed is not None:
            wanted["seed"] = self.seed % 2**63  # OpenAI takes negative ones too
        return wanted

    def _most_tokens(self) -> int:
        for name in ("max_completion_tokens", "max_tokens"):
            value = getattr(self, name)
            if value == 0:
                raise bad_request(f"{name} is 0; an answer has at least one token", name)
            if value is not None:
                return int(value)
        return _MAX_TOKENS


class CompletionRequest(SamplingFields):
    """Body of ``POST /v1/completions``."""

    refused: ClassVar = _REFUSED | {"suffix": ("",)}

    prompt: Prompt = Field(description="a text or token ids, or a list of such")
    max_length: int | None = Field(default=None, ge=1, description="most tokens of prompt plus answer")
    echo: bool | None = Field(default=False, description="put the prompt before the answer")
    logprobs: int | None = Field(
        default=None, ge=0, le=20, description="log-probabilities of the tokens and of so many others at each place"
    )

    @property
    def scores_only(self) -> bool:
        """``max_tokens=0`` with `echo`: the prompt is wanted back (with its log-probabilities), and no answer."""
        return bool(self.echo) and self.max_tokens == 0 and self.max_completion_tokens is None

    def options(self) -> dict[str, Any]:
        wanted = super().options()
        if self.max_length is not None:
            wanted["max_length"] = self.max_length
        if self.logprobs is not None:
            wanted["logprobs"] = self.logprobs
        if self.echo and (self.logprobs is not None or self._text_is_unknown()):
            wanted["prompt_logprobs"] = self.logprobs or 0
        return wanted

    def _text_is_unknown(self) -> bool:
        """Whether only what is said of the prompt's tokens tells its text without an answer."""
        first = self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        return self.scores_only and not isinstance(first, str)

    def _most_tokens(self) -> int:
        return 1 if self.scores_only else super()._most_tokens()


# Arguments of the template's own function, so no variables of it.
_TEMPLATE_NAMES = frozenset(
    {
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents"),
        *("max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors"),
        *("tokenize", "tokenizer_kwargs", "tools", "truncation"),
    }
)


class ChatCompletionRequest(SamplingFields):
    """Body of ``POST /v1/chat/completions``."""

    refused: ClassVar = _REFUSED | {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "prediction": (),
        "reasoning_effort": ("none",),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: Messages = Field(description="the conversation so far")
    add_generation_prompt: bool | None = Field(default=True, description="open the assistant's turn")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="more variables of the template")
    tools: Tools = Field(default=[], description="functions, for templates that know them; answers come as text")
    tool_choice: str | dict[str, Any] | None = Field(default=None, description="'auto', or 'none' to leave tools out")
    parallel_tool_calls: bool | None = Field(default=None, description="not used")
    logprobs: bool | None = Field(default=False, description="log-probabilities of the answer's tokens")
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="and of so many others at each place")

    def options(self) -> dict[str, Any]:
        wanted = super().options()
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs goes with logprobs=true only", "top_logprobs")
        if self.logprobs:
            wanted["logprobs"] = self.top_logprobs or 0
        return wanted

    def template_options(self) -> dict[str, Any]:
        """What the chat template is given besides the messages.

        Raises:
            ApiError: the template cannot be given this.
        """
        if self.tool_choice not in (None, "none", "auto"):
            raise bad_request("tool_choice must be 'auto' or 'none'; calls cannot be forced here", "tool_choice")
        wanted = dict(self.chat_template_kwargs or {})
        taken = sorted(wanted.keys() & _TEMPLATE_NAMES)
        if taken:
            raise bad_request(f"chat_template_kwargs may not have {taken[0]!r}", "chat_template_kwargs")
        wanted["add_generation_prompt"] = self.add_generation_prompt is not False
        if self.tools and self.tool_choice != "none":
            wanted["tools"] = self.tools
        return wanted
