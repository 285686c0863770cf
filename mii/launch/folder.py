"""The folder of one deployment: what lies in it and under which names.

    deployment.json     the config, as `mii.client` reads it         state.json   what runs, written by the supervisor
    plan.json           what the supervisor starts                   logs/        <role>.log, one for each process
    token               what `Terminate` asks for                    lock         held by the supervisor while it lives
    run/                unix sockets; a link to a temporary folder where the path would be too long for one

Everything is readable by its owner only.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DeploymentFolder"]

# A unix socket's address has room for 107 bytes (man 7 unix); the rest is for the longest file name in run/.
_LONGEST_RUN_FOLDER = 107 - len("/replica-999-engine-999.sock")


@dataclass(frozen=True)
class DeploymentFolder:
    """Paths of one deployment.

    Args:
        path: the folder itself.
    """

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "deployment.json"

    @property
    def state_file(self) -> Path:
        return self.path / "state.json"

    @property
    def plan_file(self) -> Path:
        return self.path / "plan.json"

    @property
    def lock_file(self) -> Path:
        return self.path / "lock"

    @property
    def run(self) -> Path:
        """Where sockets lie, as a path short enough for them."""
        link = self.path / "run"
        return Path(os.readlink(link)) if link.is_symlink() else link

    def log(self, role: str) -> Path:
        """Everything that a process of this role prints."""
        return self.path / "logs" / f"{role}.log"

    def socket(self, name: str) -> str:
        """A ZeroMQ address within this folder, ``ipc://.../<name>.sock``."""
        return f"ipc://{self.run / name}.sock"

    @property
    def control_socket(self) -> Path:
        """Where the supervisor is asked for changes."""
        return self.run / "control.sock"

    @property
    def balancer_socket(self) -> Path:
        """Whoever connects makes the load balancer look which replicas there are; it answers with one byte."""
        return self.run / "balancer.sock"

    @property
    def calls_socket(self) -> Path:
        """Where the load balancer takes calls from processes of this machine."""
        return self.run / "calls.sock"

    def front_socket(self, port: int) -> Path:
        """Where the front that has this gRPC port takes calls from processes of this machine."""
        return self.run / f"front-{port}.sock"

    def engine_address(self, replica: int) -> str:
        """Where the engine process of a replica (the first rank) listens for its front."""
        return self.socket(f"engine-{replica}")

    def meeting_file(self, replica: int) -> Path:
        """Where the ranks of a replica that is divided over hosts find the first one; all hosts see it."""
        return self.path / f"replica-{replica}-meeting"

    def read_token(self) -> str:
        """The deployment's secret; a caller shows it as gRPC metadata ``mii-token`` to end the deployment."""
        return (self.path / "token").read_text(encoding="ascii").strip()

    def create(self) -> None:
        """Makes the folders and a new token. A run folder that was there is emptied; logs are started anew."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.clear()
        (self.path / "logs").mkdir(mode=0o700)
        self._make_run_folder()
        with open(os.open(self.path / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(16))

    def clear(self) -> None:
        """Removes everything but the config and the lock."""
        self.clear_run()
        shutil.rmtree(self.path / "logs", ignore_errors=True)
        for name in ("token", "plan.json", "state.json"):
            (self.path / name).unlink(missing_ok=True)

    def clear_run(self) -> None:
        """Removes the run folder and what is in it."""
        run = self.path / "run"
        if run.is_symlink():
            shutil.rmtree(os.readlink(run), ignore_errors=True)
            run.unlink()
        shutil.rmtree(run, ignore_errors=True)

    def forget_replica(self, replica: int) -> None:
        """Removes what a replica has left."""
        for folder in (self.path, self.path / "logs", self.run):
            for pattern in (f"replica-{replica}-*", f"engine-{replica}.sock"):
                for file in folder.glob(pattern):
                    file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes the whole folder; one that is not there is fine."""
        self.clear()
        shutil.rmtree(self.path, ignore_errors=True)

    def _make_run_folder(self) -> None:
        run = self.path / "run"
        if _fits(run.absolute()):
            run.mkdir(mode=0o700)
            return
        temporary = tempfile.gettempdir()
        parent = temporary if _fits(Path(temporary) / "mii-12345678") else "/tmp"
        run.symlink_to(tempfile.mkdtemp(prefix="mii-", dir=parent))  # mode 700


def _fits(folder: Path) -> bool:
    return len(os.fsencode(folder)) <= _LONGEST_RUN_FOLDER
