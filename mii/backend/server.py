"""The server side of a deployment: starts its processes, waits until they are ready, and ends them."""

from __future__ import annotations

import time
from collections.abc import Iterator

from mii.backend.deployment import Launch, describe_failure, launch, stop
from mii.backend.startup import StartupView, startup_view
from mii.config import MIIConfig
from mii.errors import DeploymentError
from mii.launch.state import Failure, Notice, Part, Running

__all__ = ["MIIServer"]

_ATTEMPTS = 3


class MIIServer:
    """A deployment that runs in processes of its own, on after this object and this program are gone.

    Args:
        mii_config: what to run. It is not changed.
        attached: the deployment ends when this process does, however it does.

    Raises:
        DeploymentError: a part did not start; says which and why. Nothing of the deployment is left.
        DeploymentExistsError, PortTakenError, PlacementError, HostfileError, LauncherError: it cannot be as asked.

    Example:
        server = MIIServer(MIIConfig(model_config={"model_name_or_path": "path-or-id"}))
        print(MIIClient(server.mii_config).generate("DeepSpeed is"))
        server.terminate()
    """

    _launch: Launch | None = None

    def __init__(self, mii_config: MIIConfig, *, attached: bool = False) -> None:
        started = time.monotonic()
        view = startup_view(mii_config.model_conf.progress)
        try:
            launched = self._start(mii_config, attached, view)
            view.note(f"{describe(self.mii_config)}, ready after {time.monotonic() - started:.1f} s")
        except BaseException:
            if self._launch is not None:
                self._launch.end()
            raise
        finally:
            view.close()
        if not attached:
            launched.close()
        self.pid = launched.pid
        """The process that watches over the deployment."""

    def notices(self) -> Iterator[str]:
        """What happens to an attached deployment, line by line, until it ends.

        Raises:
            DeploymentError: it could not go on.
        """
        failure: Failure | None = None
        for event in self._events:
            if isinstance(event, Notice):
                yield event.text
            elif isinstance(event, Failure):
                failure = event  # go on until the end: then nothing is left of it
        if failure is not None:
            raise _error(self.mii_config, failure)

    def terminate(self, hurry: bool = False) -> None:
        """Ends the deployment and waits until nothing of it is left. What runs may finish first unless `hurry`."""
        stop(self.mii_config.deployment_name, hurry=hurry)

    def _start(self, mii_config: MIIConfig, attached: bool, view: StartupView) -> Launch:
        """Ports are chosen anew when somebody else was quicker; those that were asked for are then an error."""
        for attempt in range(_ATTEMPTS):
            self._launch = launched = launch(mii_config, attached=attached)
            self.mii_config = launched.config
            """The config with the ports and devices that were chosen."""
            self._events = launched.events()
            import mii.backend.client  # noqa: F401  who starts a deployment talks to it: gRPC loads while it starts

            try:
                failure = self._wait_ready(view)
            finally:
                launched.claims.release()
            if failure is None:
                return launched
            launched.close()
            if not failure.port_taken or attempt + 1 == _ATTEMPTS:
                raise _error(self.mii_config, failure)
            view.note(f"{failure.reason}; starting over on other ports")
        raise AssertionError("the last attempt returns or raises")

    def _wait_ready(self, view: StartupView) -> Failure | None:
        """Until it is ready, or has failed and is gone."""
        failure: Failure | None = None
        for event in self._events:
            if isinstance(event, Running):
                return None
            if isinstance(event, Part):
                view.show(event)
            elif isinstance(event, Failure):
                failure = event  # go on until the end: then nothing is left of it
        if failure is None:
            raise DeploymentError(f"deployment {self.mii_config.deployment_name!r} was stopped while it was starting")
        return failure


def describe(config: MIIConfig) -> str:
    """A deployment's name and addresses in one line."""
    text = f"deployment {config.deployment_name!r}: gRPC on {config.host}:{config.port_number}"
    if config.enable_restful_api:
        text += f", HTTP on http://{config.restful_api_host}:{config.restful_api_port}"
    return text


def _error(config: MIIConfig, failure: Failure) -> DeploymentError:
    return DeploymentError(describe_failure(config.deployment_name, failure.reason, failure.log))
