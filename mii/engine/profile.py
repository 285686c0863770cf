"""What `profile_model_time` and `sync_debug` show: how long steps take."""

from __future__ import annotations

import time

import torch

from mii.logging import logger

_EVERY = 100  # steps between two lines of the log


class StepProfile:
    """Times an engine's steps. With neither option it costs a comparison a step.

    Args:
        device: Where the steps run.
        average: `profile_model_time`: log mean milliseconds a step and tokens a millisecond, every 100 steps.
        synchronise: `sync_debug`: wait for the device after each step and log its time.
    """

    def __init__(self, device: torch.device, *, average: bool, synchronise: bool) -> None:
        self._device, self._average, self._synchronise = device, average, synchronise
        self._started = 0.0
        self._seconds, self._tokens, self._steps = 0.0, 0, 0

    def begin(self) -> None:
        self._started = time.perf_counter()

    def end(self, tokens: int) -> None:
        """`tokens`: how many the step read back."""
        if not (self._average or self._synchronise):
            return
        if self._synchronise and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._started
        if self._synchronise:
            logger.debug("step: %d tokens in %.3f ms", tokens, 1e3 * seconds)
        self._seconds, self._tokens, self._steps = self._seconds + seconds, self._tokens + tokens, self._steps + 1
        if self._average and self._steps == _EVERY:
            logger.info(
                "generate: %.3f ms a step, %.3f tokens a millisecond, over %d steps",
                1e3 * self._seconds / self._steps,
                self._tokens / (1e3 * self._seconds),
                self._steps,
            )
            self._seconds, self._tokens, self._steps = 0.0, 0, 0
