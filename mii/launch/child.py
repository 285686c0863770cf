"""One process of a deployment, as its supervisor has it: started, listened to, ended, started again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time

import msgspec

from mii.launch.folder import DeploymentFolder
from mii.launch.process import CONTROL_ENV, Failed, Message, Progress, Ready, decode_message
from mii.launch.state import ProcessState, Spec, start_ticks
from mii.logging import logger

__all__ = ["LONGEST_LOG_BYTES", "Child", "read_tail"]

_PAUSES = (
    0.1,
    0.5,
    2.0,
    5.0,
    10.0,
)  # seconds before the first, second, ... start in a row; the last one for all further
_HEALTHY_SECONDS = 60.0  # ready for this long, and earlier deaths no longer count
_LOG_LINES = 15
_LOG_BYTES = 8192
_READ_BYTES = 65536
LONGEST_LOG_BYTES = 32 << 20
_KEPT_LOG_BYTES = 1 << 20


class Child:
    """A process and what is known about it.

    Args:
        spec: what to start.
        folder: of the deployment; its output goes to the log there.
        max_restarts: how many starts in a row may fail before it is given up.
    """

    def __init__(self, spec: Spec, folder: DeploymentFolder, max_restarts: int) -> None:
        self.spec = spec
        self.state = ProcessState(spec.role)
        self.pipe: int | None = None
        self.start_at = 0.0
        """When a waiting child is due, by `time.monotonic`."""
        self.reason = ""
        """Why it failed, where more is known than how it ended."""
        self.port_taken = False
        """Whether it failed because somebody else has its port."""
        self.taken_down = False
        """Whether it was killed because another one of its group has died."""
        self._folder, self._max_restarts = folder, max_restarts
        self._process: subprocess.Popen[bytes] | None = None
        self._received = b""
        self._ready_since: float | None = None
        self._deaths, self._waits = 0, False

    @property
    def running(self) -> bool:
        return self._process is not None

    @property
    def ready(self) -> bool:
        return self.state.stage == "ready"

    @property
    def busy(self) -> bool:
        """Whether it starts, and has not said that it only waits for others."""
        return self.state.stage == "starting" and not self._waits

    def start(self) -> None:
        """Starts the process.

        Raises:
            OSError: it cannot be started.
        """
        self.reason, self.port_taken, self._received, self._ready_since = "", False, b"", None
        self.state.stage, self._waits = "starting", False
        read_end, write_end = os.pipe()
        try:
            with open(os.open(self._folder.log(self.spec.role), _APPEND, 0o600), "ab") as log:
                self._process = subprocess.Popen(
                    self.spec.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(write_end,),
                    env=self._environment(write_end),
                )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        os.set_blocking(read_end, False)
        self.pipe = read_end
        self._enter_cpus(self._process.pid)
        self.state.pid = self._process.pid
        self.state.start_ticks = start_ticks(self._process.pid)

    def read(self) -> list[Message]:
        """What it has said since; empty too when it has closed the pipe, after which `pipe` is None."""
        if self.pipe is None:
            return []
        try:
            while chunk := os.read(self.pipe, _READ_BYTES):
                self._received += chunk
            self._close_pipe()
        except BlockingIOError:
            pass
        *lines, self._received = self._received.split(b"\n")
        messages = []
        for line in lines:
            with contextlib.suppress(msgspec.DecodeError):
                messages.append(decode_message(line))
        for message in messages:
            self._note(message)
        return messages

    def ended(self) -> bool:
        """Whether it has ended since the last call. If so, `state.last_end` says how."""
        if self._process is None or (code := self._process.poll()) is None:
            return False
        self.read()
        self._close_pipe()
        self._process = None
        self.state.pid = None
        if self.state.stage != "given up":
            self.state.stage = "ended"
        self.state.last_end = _how(code)
        return True

    def plan_restart(self) -> bool:
        """Sets `start_at` for a child that has died; False when it died too often in a row and is given up."""
        now = time.monotonic()
        if self._ready_since is not None and now - self._ready_since >= _HEALTHY_SECONDS:
            self._deaths = 0
        self._deaths += 1
        self.state.last_end = self.reason or self.state.last_end
        if self._deaths > self._max_restarts:
            self.state.stage = "given up"
            return False
        self.state.restarts += 1
        self.state.stage = "waiting"
        self.start_at = now + _PAUSES[min(self._deaths, len(_PAUSES)) - 1]
        return True

    def describe_end(self) -> str:
        """Who ended, and why or how."""
        return f"{self.spec.role}: {self.reason}" if self.reason else f"{self.spec.role} {self.state.last_end}"

    def describe_restart(self) -> str:
        """What happened, and what happens now."""
        pause = max(0.0, self.start_at - time.monotonic())
        return f"{self.describe_end()}; starting it again in {pause:.1f} s ({self._deaths} of {self._max_restarts})"

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal if it runs."""
        if self._process is not None:
            self._process.send_signal(number)

    def give_up(self) -> None:
        """Marks it as not to be started again."""
        self.state.stage = "given up"

    def leave(self) -> None:
        """Marks it as one that is wanted no more."""
        self.state.stage = "leaving"

    def revive(self) -> None:
        """What happened to it before counts no more."""
        self.reason, self._deaths = "", 0

    def log_tail(self) -> str:
        """The last lines of its log."""
        return read_tail(self._folder, self.spec.role)

    def trim_log(self) -> None:
        """Keeps the end of a log that has grown long; a line that is written in this moment may be lost."""
        with contextlib.suppress(OSError), open(self._folder.log(self.spec.role), "r+b") as file:
            if os.fstat(file.fileno()).st_size > LONGEST_LOG_BYTES:
                file.seek(-_KEPT_LOG_BYTES, os.SEEK_END)
                end = file.read()
                file.truncate(0)  # the process appends, so it goes on after what is put back here
                file.seek(0)
                file.write(b"(the beginning was cut off)\n" + end)

    def _note(self, message: Message) -> None:
        if isinstance(message, Ready):
            self.state.stage = "ready"
            self.state.ports = message.ports
            self._ready_since = time.monotonic()
        elif isinstance(message, Progress):
            self._waits = message.waits
        elif isinstance(message, Failed):
            self.reason, self.port_taken = message.reason, message.port_taken

    def _environment(self, write_end: int) -> dict[str, str]:
        merged = {**os.environ, **self.spec.environment, CONTROL_ENV: f"{os.getpid()}:{write_end}"}
        return {name: value for name, value in merged.items() if value is not None}

    def _enter_cpus(self, pid: int) -> None:
        if self.spec.cpus:
            try:
                os.sched_setaffinity(pid, self.spec.cpus)
            except OSError as error:  # it runs slower, but it runs; or it has ended already
                logger.warning("%s stays on all cores: %s", self.spec.role, error)

    def _close_pipe(self) -> None:
        if self.pipe is not None:
            os.close(self.pipe)
            self.pipe = None


_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND


def read_tail(folder: DeploymentFolder, role: str) -> str:
    """The last lines of a role's log; empty where there is none."""
    try:
        with open(folder.log(role), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-_LOG_LINES:])


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
