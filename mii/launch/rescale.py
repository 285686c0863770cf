"""Replicas that are added to and taken from a deployment while it runs.

New ones are started first, and get calls once they are ready. Those that go get no more calls; what they have may end
within the time to drain, and what is left then, and has sent nothing yet, runs again elsewhere. Where a new one does
not come up, everything is as it was before.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import time
from collections.abc import Generator, Iterable, Sequence
from typing import Protocol, TypeAlias

import msgspec

from mii.launch.child import Child
from mii.launch.folder import DeploymentFolder
from mii.launch.state import (
    Accepted,
    Event,
    Failure,
    Notice,
    Plan,
    Refused,
    Scale,
    Scaled,
    Spec,
    front_role,
    write_private,
)
from mii.launch.watcher import Watcher

__all__ = ["Crew", "Rescale"]

_BALANCER_SECONDS = 5.0  # it answers at once, unless the machine is very busy
_FOREVER = float("inf")

# Gives, whenever there is nothing to do, the time (by `time.monotonic`) by which it goes on at the latest.
_Steps: TypeAlias = Generator[float, None, None]


class Crew(Protocol):
    """What is changed: a supervisor's children."""

    plan: Plan
    children: list[Child]

    @property
    def folder(self) -> DeploymentFolder:
        """Of the deployment."""
        ...

    @property
    def selector(self) -> selectors.BaseSelector:
        """What the supervisor sleeps in."""
        ...

    def start(self, child: Child) -> bool:
        """Starts one and listens to it; False where it cannot be started."""
        ...

    def save(self) -> None:
        """Writes down how they are."""
        ...

    def tell(self, event: Event) -> None:
        """For whoever watches the deployment."""
        ...


class Rescale:
    """One change, from the request to its end.

    Args:
        crew: what is changed.
        request: the change.
        watcher: who asked for it; is told of its end.
        quick_seconds: for processes that have nothing to finish.
    """

    def __init__(self, crew: Crew, request: Scale, watcher: Watcher, quick_seconds: float) -> None:
        self._crew, self._request, self._watcher, self._quick_seconds = crew, request, watcher, quick_seconds
        wanted = {spec.role: spec for spec in request.plan.processes}
        here = {child.spec.role: child for child in crew.children}
        self._going = [child for child in crew.children if child.spec.role not in wanted]
        self._coming = [
            here[role] if role in here else Child(spec, crew.folder, crew.plan.max_restarts)
            for role, spec in wanted.items()
            if role not in here or (here[role].state.stage == "given up" and not here[role].running)
        ]
        self._ended: list[Child] = []
        self._steps = self._run(wanted)
        self.wake_at = 0.0
        """By when `go_on` is to be called at the latest."""

    def go_on(self) -> bool:
        """Does what can be done now; False when it is over."""
        try:
            self.wake_at = next(self._steps)
        except StopIteration:
            return False
        return True

    def takes(self, child: Child) -> bool:
        """Whether the end of a child belongs to the change, so that it is not started again."""
        if child not in self._coming and child not in self._going:
            return False
        self._ended.append(child)
        return True

    def hear(self, event: Event, child: Child) -> None:
        """A child has said something."""
        if child in self._coming:
            self._watcher.tell(event)

    def give_up(self) -> None:
        """The whole deployment ends first."""
        self._steps.close()
        self._watcher.tell(Refused("the deployment ends"))

    def _run(self, wanted: dict[str, Spec]) -> _Steps:
        crew, new, before = self._crew, list(self._coming), self._files()
        specs = [child.spec for child in crew.children]
        for child in crew.children:
            child.spec = wanted.get(child.spec.role, child.spec)
        self._write(msgspec.json.encode(self._request.plan), self._request.config.encode())
        self._watcher.tell(Accepted())
        failure = yield from self._add()
        if failure is not None:
            for child, spec in zip(crew.children, specs, strict=False):
                child.spec = spec
            self._write(*before)
            self._coming, self._going = [], [child for child in new if child.spec not in specs]
            for child in new:
                if child not in self._going and not child.running:
                    child.give_up()
            yield from self._remove(self._going)
            self._watcher.tell(failure)
            return
        self._coming = []  # from here on they are as all the others
        crew.plan = self._request.plan
        yield from self._tell_balancer()
        yield from self._remove(self._going)
        self._report(new)
        self._watcher.tell(Scaled())

    def _add(self) -> Generator[float, None, Failure | None]:
        """Starts what is new and waits until all of it is ready. Returns why it never will be."""
        crew, plan = self._crew, self._crew.plan
        crew.children += [child for child in self._coming if child not in crew.children]
        for child in self._coming:
            child.revive()
            if not crew.start(child):
                return _failure(child)
        crew.save()
        deadline = _FOREVER if plan.start_seconds is None else time.monotonic() + plan.start_seconds
        while not all(child.ready for child in self._coming):
            yield deadline
            if self._ended:
                return _failure(min(self._ended, key=lambda child: not child.reason))  # the one that can say why
            if time.monotonic() >= deadline:
                late = next(child for child in self._coming if not child.ready)
                late.reason = f"it was not ready within start_seconds={plan.start_seconds:g}"
                return _failure(late)
        crew.save()
        return None

    def _remove(self, children: Sequence[Child]) -> _Steps:
        """Ends them, fronts first, whose callers wait, and forgets them."""
        crew = self._crew
        if not children:
            return
        for child in children:
            child.leave()
        crew.save()
        yield from self._tell_balancer()
        replicas = {child.spec.replica for child in children if child.spec.replica is not None}
        fronts = [child for child in children if child.spec.role in map(front_role, replicas)]
        yield from self._end(fronts, crew.plan.drain_seconds + self._quick_seconds)
        yield from self._end(children, self._quick_seconds)
        crew.children[:] = [child for child in crew.children if child not in children]
        for replica in replicas:
            crew.folder.forget_replica(replica)
        crew.save()

    def _end(self, children: Iterable[Child], seconds: float) -> _Steps:
        running = [child for child in children if child.running]
        for child in running:
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + seconds
        while any(child.running for child in running):
            yield deadline
            if time.monotonic() >= deadline:
                deadline = _FOREVER
                for child in running:
                    child.signal(signal.SIGKILL)

    def _tell_balancer(self) -> _Steps:
        """Until the load balancer has taken in which replicas there are. One that is about to start reads it then."""
        deadline = time.monotonic() + _BALANCER_SECONDS
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(self._crew.folder.balancer_socket))
            connection.setblocking(False)
            self._crew.selector.register(connection, selectors.EVENT_READ, lambda: None)
            try:
                while not _is_readable(connection) and time.monotonic() < deadline:
                    yield deadline
            finally:
                self._crew.selector.unregister(connection)

    def _files(self) -> tuple[bytes, bytes]:
        folder = self._crew.folder
        return folder.plan_file.read_bytes(), folder.config_file.read_bytes()

    def _write(self, plan: bytes, config: bytes) -> None:
        write_private(self._crew.folder.plan_file, plan)
        write_private(self._crew.folder.config_file, config)

    def _report(self, new: Sequence[Child]) -> None:
        for children, what in ((new, "added"), (self._going, "taken away")):
            replicas = sorted({child.spec.replica for child in children if child.spec.replica is not None})
            if replicas:
                self._crew.tell(Notice(f"{what}: replica {', '.join(map(str, replicas))}"))


def _failure(child: Child) -> Failure:
    return Failure(child.spec.role, child.describe_end(), child.log_tail(), child.port_taken)


def _is_readable(connection: socket.socket) -> bool:
    """Whether an answer has come, or the other end is gone."""
    try:
        connection.recv(1)
    except BlockingIOError:
        return False
    return True
