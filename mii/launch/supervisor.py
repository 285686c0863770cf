"""The supervisor of a deployment: starts its processes, watches them, starts those that die again, and ends them all.

    python -m mii.launch.supervisor <folder of the deployment>

It is one thread that sleeps until a process says something, ends, or is due. Processes die with it (see
`mii.launch.process`); whoever started it sees its events through a socket. It imports little, so that it starts fast.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

import msgspec

from mii.launch.child import Child
from mii.launch.folder import DeploymentFolder
from mii.launch.lock import locked
from mii.launch.process import StopWanted
from mii.launch.rescale import Rescale
from mii.launch.start_queue import StartQueue
from mii.launch.state import (
    BALANCER,
    GATEWAY,
    SUPERVISOR,
    Event,
    Failure,
    Notice,
    Part,
    Plan,
    Refused,
    Running,
    Scale,
    State,
    front_role,
    read_plan,
    write_private,
)
from mii.launch.watcher import Door, Watcher
from mii.logging import logger

__all__ = ["END_SECONDS", "STARTER_ENV", "Supervisor", "main"]

# "<file descriptor of the socket to whoever started this>:<file descriptor that holds the deployment's lock>"
STARTER_ENV = "MII_STARTER"
_QUICK_SECONDS = 3.0  # for processes that have nothing left to finish
_KILL_SECONDS = 1.0  # after the time to drain, before SIGKILL
# Everything that an end may take apart from the time to drain, and some more on a busy machine.
END_SECONDS = _KILL_SECONDS + _QUICK_SECONDS + 6.0
_LOG_SECONDS = 60.0  # between two looks at the length of logs


class Supervisor:
    """Runs one deployment from its start to its end.

    Args:
        folder: of the deployment.
        plan: what to run.
        starter: socket to whoever started it.
    """

    def __init__(self, folder: DeploymentFolder, plan: Plan, starter: socket.socket) -> None:
        self.folder, self.plan = folder, plan
        self.children = [Child(spec, folder, plan.max_restarts) for spec in plan.processes]
        self.selector = selectors.DefaultSelector()
        self._starter = Watcher(starter, self.selector, self._on_starter_gone)
        self._door: Door | None = None
        self._change: Rescale | None = None
        self._state = State(os.getpid(), started_at=time.time())
        self._stops = 0
        """How often somebody asked for the end: once drains; twice, or SIGINT, hurries."""
        self._starter_counts = True
        self._failed: Child | None = None
        self._wake_up: socket.socket | None = None

    def run(self) -> None:
        """Returns when everything has ended."""
        self._listen()
        try:
            if self._start():
                self._watch()
        finally:
            self._end_all()
        self._clean_up()

    def _listen(self) -> None:
        self._wake_up, write_end = socket.socketpair()
        write_end.setblocking(False)
        self._wake_up.setblocking(False)
        signal.set_wakeup_fd(os.dup(write_end.fileno()), warn_on_full_buffer=False)
        write_end.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whoever started this may have blocked some
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop_signal)
        self.selector.register(self._wake_up, selectors.EVENT_READ, self._drop_wake_ups)
        self._door = Door(self.folder.control_socket, self.selector, self._on_request)

    def _on_stop_signal(self, number: int, frame: FrameType | None) -> None:
        self._stops += 2 if number == signal.SIGINT else 1

    def _drop_wake_ups(self) -> None:
        assert self._wake_up is not None
        with contextlib.suppress(BlockingIOError):
            self._wake_up.recv(4096)

    def _on_starter_gone(self, watcher: Watcher) -> None:
        if self._starter_counts:
            logger.info("whoever started this deployment is gone, so it ends")
            self._stops += 1

    def tell(self, event: Event) -> None:
        """For whoever started the deployment, as long as that process listens."""
        if isinstance(event, Notice):
            logger.warning(event.text)
        self._starter.tell(event)

    # Start

    def _start(self) -> bool:
        """Starts everything and waits until all of it is ready; False when it never will be."""
        self.save()
        deadline = None if self.plan.start_seconds is None else time.monotonic() + self.plan.start_seconds
        queue = StartQueue(self.children, len(os.sched_getaffinity(0)))
        while queue or not all(child.ready for child in self.children):
            for child in queue.take():
                if not self.start(child):
                    return self._fail(child)
                self.save()
            ended = self._turn(self._patience(deadline, queue.wake_at if queue else None))
            if self._stops:
                return False
            if ended:
                culprit = min(ended, key=lambda child: not child.reason)  # the one that can say why
                return self._fail(culprit)
            if deadline is not None and time.monotonic() > deadline:
                late = next(child for child in self.children if not child.ready)
                late.reason = f"it was not ready within start_seconds={self.plan.start_seconds:g}"
                return self._fail(late)
        self._state.stage, self._state.ready_at = "running", time.time()
        self.save()
        self._starter_counts = self.plan.attached
        self.tell(Running())
        return True

    def start(self, child: Child) -> bool:
        """Starts one and listens to it; False where it cannot be started."""
        try:
            child.start()
        except OSError as error:
            child.reason = f"it cannot be started: {error}"
            return False
        assert child.pipe is not None
        self.selector.register(child.pipe, selectors.EVENT_READ, lambda: self._on_child(child))
        return True

    def _fail(self, child: Child, addition: str = "") -> bool:
        self._failed = child
        self._state.reason = ", ".join(filter(None, (child.describe_end(), addition)))
        logger.error(self._state.reason)
        return False

    def _patience(self, *deadlines: float | None) -> float | None:
        """Seconds until something is due that nobody will tell of."""
        times = [child.start_at for child in self.children if child.state.stage == "waiting"]
        times += [each for each in deadlines if each is not None]
        if self._change is not None:
            times.append(self._change.wake_at)
        return max(0.0, min(times) - time.monotonic()) if times else None

    # Watch

    def _watch(self) -> None:
        """Until somebody asks for the end, or nothing is left that could serve."""
        logs_at = time.monotonic() + _LOG_SECONDS
        while not self._stops:
            for child in self._turn(self._patience(logs_at)):
                if self._change is None or not self._change.takes(child):
                    self._restart(child)
            if self._change is not None and not self._change.go_on():
                self._change = None
            if time.monotonic() >= logs_at:
                logs_at = time.monotonic() + _LOG_SECONDS
                for child in self.children:
                    child.trim_log()
            for child in self.children:
                if child.state.stage == "waiting" and child.start_at <= time.monotonic() and not self.start(child):
                    self._restart(child)
                    self.save()
            if self._failed is not None:
                return

    def _on_request(self, watcher: Watcher, line: bytes) -> None:
        """Somebody asks for other replicas."""
        try:
            request = msgspec.json.decode(line, type=Scale)
        except msgspec.DecodeError as error:
            watcher.tell(Refused(f"the request is not understood: {error}"))
            return
        if self._change is not None:
            watcher.tell(Refused("replicas are being added or taken away already; wait until that is done"))
        elif self._state.stage != "running":
            watcher.tell(
                Refused(f"the deployment is {self._state.stage}; its replicas can be changed once it is running")
            )
        else:
            self._change = Rescale(self, request, watcher, _QUICK_SECONDS)

    def _restart(self, child: Child) -> None:
        notice, alone = None, not child.taken_down
        if alone:
            self._take_down_group(child)
        child.taken_down = False
        if child.state.stage == "given up":
            pass  # it was ended because the other process of its replica is
        elif child.plan_restart():
            notice = child.describe_restart() if alone else None
        else:
            notice = f"{child.describe_end()}; it died too often and is given up"
            self._give_up_replica(child)
            if self._is_lost(child):
                self._fail(child, "too often to be started again")
        self.save()
        if notice:
            self.tell(Notice(notice))

    def _take_down_group(self, child: Child) -> None:
        """Kills the other ranks of an engine, which cannot go on without this one."""
        for other in self.children:
            if other is not child and child.spec.group and other.spec.group == child.spec.group and other.running:
                other.taken_down = True
                other.signal(signal.SIGKILL)

    def _give_up_replica(self, child: Child) -> None:
        for other in self.children:
            if other is not child and child.spec.replica is not None and other.spec.replica == child.spec.replica:
                other.give_up()
                other.signal(signal.SIGKILL)

    def _is_lost(self, child: Child) -> bool:
        """Whether nothing can be served without this child."""
        replicas = [other for other in self.children if other.spec.replica is not None]
        gone = ("given up", "leaving")
        return child.spec.role == BALANCER or (
            child.spec.replica is not None and all(other.state.stage in gone for other in replicas)
        )

    def _turn(self, timeout: float | None) -> list[Child]:
        """Sleeps until something happens, takes it in, and returns the children that have ended."""
        for key, _ in self.selector.select(timeout):
            callback: Callable[[], None] = key.data
            callback()
        return [child for child in self.children if child.running and self._has_ended(child)]

    def _has_ended(self, child: Child) -> bool:
        pipe = child.pipe
        if pipe is not None:
            self._on_child(child)
        if not child.ended():
            return False
        self._forget_pipe(pipe)
        return True

    def _forget_pipe(self, pipe: int | None) -> None:
        with contextlib.suppress(KeyError, ValueError):
            if pipe is not None:
                self.selector.unregister(pipe)

    def _on_child(self, child: Child) -> None:
        pipe = child.pipe
        was_ready = child.ready
        for message in child.read():
            if isinstance(message, StopWanted):
                logger.info("%s asks for the end: %s", child.spec.role, message.reason or "no reason given")
                self._stops = max(1, self._stops)
            else:
                part = Part(child.spec.role, message)
                self.tell(part)
                if self._change is not None:
                    self._change.hear(part, child)
        if child.pipe is None:
            self._forget_pipe(pipe)
        if child.ready and not was_ready and self._state.stage == "running":
            self.save()
            self.tell(Notice(f"{child.spec.role} is back"))

    # End

    def _end_all(self) -> None:
        """What answers callers drains first, and has its replicas until it is done."""
        if self._change is not None:
            self._change.give_up()
        if self._door is not None:
            self._door.close(_KILL_SECONDS)
        draining = self._state.stage == "running" and self._failed is None
        self._state.stage = "stopping"
        self.save()
        doors = [child for child in self.children if child.spec.role in (GATEWAY, BALANCER)]
        if not doors:  # a replica alone
            doors = [child for child in self.children if child.spec.role == front_role(0)]
        rest = [child for child in self.children if child not in doors]
        if draining:
            self._end(doors, self.plan.drain_seconds + _KILL_SECONDS)
            self._end(rest, _QUICK_SECONDS)
        else:
            self._end(self.children, _QUICK_SECONDS)

    def _end(self, children: Iterable[Child], seconds: float) -> None:
        """SIGTERM, and SIGKILL to what is still there after `seconds` or when somebody hurries."""
        deadline = time.monotonic() + seconds
        running = [child for child in children if child.running]
        for child in running:
            child.signal(signal.SIGTERM)
        killed = False
        while any(child.running for child in running):
            if not killed and (self._stops > 1 or time.monotonic() >= deadline):
                killed = True
                for child in running:
                    child.signal(signal.SIGKILL)
            self._turn(None if killed else max(0.0, deadline - time.monotonic()))

    def _clean_up(self) -> None:
        """Nothing stays but, where a deployment failed that had been running, its logs and the reason."""
        failure = None
        if self._failed is not None:
            part = self._failed
            failure = Failure(part.spec.role, self._state.reason, part.log_tail(), part.port_taken)
        with locked(self.folder.path.parent / ".lock"):
            if failure is not None and self._state.ready_at is not None:
                self._state.stage = "failed"
                self.save()
                self.folder.clear_run()
            else:
                self.folder.remove()
        if failure is not None:
            self.tell(failure)
        self._starter.close(_KILL_SECONDS)

    def save(self) -> None:
        """Writes down how everything is."""
        self._state.processes = [child.state for child in self.children]
        write_private(self.folder.state_file, msgspec.json.encode(self._state))


def main() -> None:
    """Entry point; see the module."""
    starter, lock = (int(part) for part in os.environ.pop(STARTER_ENV).split(":"))
    os.set_inheritable(lock, False)
    folder = DeploymentFolder(Path(sys.argv[1]))
    # What clears /tmp of old files leaves folders alone that somebody has locked (man 5 tmpfiles.d).
    fcntl.flock(os.open(folder.path, os.O_RDONLY | os.O_CLOEXEC), fcntl.LOCK_SH)
    with socket.socket(fileno=starter) as connection:
        connection.set_inheritable(False)
        try:
            Supervisor(folder, read_plan(folder.plan_file), connection).run()
        except BaseException as error:
            logger.exception("the supervisor failed")
            with contextlib.suppress(OSError):
                connection.sendall(msgspec.json.encode(Failure(SUPERVISOR, f"{SUPERVISOR}: {error!r}")) + b"\n")
            raise


if __name__ == "__main__":
    main()
