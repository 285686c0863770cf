"""What every process of a deployment does alike, tried in processes of its own."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mii.config import MIIConfig
from mii.config.registry import deployment_folder, save_deployment
from mii.launch.folder import DeploymentFolder
from mii.launch.lock import acquire, is_held, locked
from mii.launch.process import CONTROL_ENV, Failed, Message, Process, Progress, Ready, StopWanted, decode_message
from tests.serving.deployments import wait_until


def run(tmp_path: Path, body: str, role: str = "balancer") -> tuple[subprocess.Popen[bytes], int]:
    """A process with this body inside `with Process...`, and the end of its pipe that the supervisor reads."""
    code = (
        "from mii.launch.process import Process\nimport asyncio, os, time\nwith Process.from_arguments() as process:\n"
    )
    code += textwrap.indent(textwrap.dedent(body), "    ")
    read_end, write_end = os.pipe()
    environment = {**os.environ, CONTROL_ENV: f"{os.getpid()}:{write_end}"}
    command = [sys.executable, "-c", code, str(tmp_path), role]
    process = subprocess.Popen(command, env=environment, pass_fds=(write_end,), stderr=subprocess.PIPE)
    os.close(write_end)
    return process, read_end


def messages(read_end: int, count: int | None = None) -> list[Message]:
    """What it says, to its end or until there are `count`."""
    received = b""
    while count is None or received.count(b"\n") < count:
        assert select.select([read_end], [], [], 60)[0], "nothing came"
        chunk = os.read(read_end, 65536)
        if not chunk:
            break
        received += chunk
    return [decode_message(line) for line in received.splitlines()]


def end(process: subprocess.Popen[bytes], read_end: int) -> bytes:
    """Waits for it; returns what it wrote to its log."""
    _, log = process.communicate(timeout=60)
    os.close(read_end)
    return log


def test_it_tells_its_supervisor_how_far_it_is_and_that_it_is_ready(tmp_path: Path) -> None:
    process, pipe = run(
        tmp_path, 'process.report("weights", 1, 4, "B")\nprocess.ready(grpc=7)\nprocess.stop_deployment()'
    )
    assert messages(pipe) == [Progress("weights", 1, 4, "B"), Ready({"grpc": 7}), StopWanted()]
    end(process, pipe)
    assert process.returncode == 0


def test_reports_from_an_inner_loop_are_thinned_out_but_for_the_last(tmp_path: Path) -> None:
    process, pipe = run(tmp_path, 'for step in range(10001): process.report("weights", step, 10000)')
    told = messages(pipe)
    end(process, pipe)
    assert len(told) < 200
    assert told[-1] == Progress("weights", 10000, 10000)


def test_an_error_is_told_in_one_sentence_and_logged_with_its_traceback(tmp_path: Path) -> None:
    process, pipe = run(tmp_path, 'from mii.errors import LoadError\nraise LoadError("it is too large")')
    assert messages(pipe) == [Failed("it is too large")]
    log = end(process, pipe)
    assert process.returncode == 1
    assert b"balancer failed: it is too large" in log and b"Traceback" in log


def test_the_class_of_an_error_that_is_not_ours_is_told_too_and_a_long_one_is_cut(tmp_path: Path) -> None:
    process, pipe = run(tmp_path, 'raise OSError("\\u00fc" * 5000)')
    (failed,) = messages(pipe)
    end(process, pipe)
    assert isinstance(failed, Failed) and failed.reason.startswith("OSError: üü") and len(failed.reason) == 900


def test_before_it_is_ready_sigterm_kills_it(tmp_path: Path) -> None:
    process, pipe = run(tmp_path, 'process.report("x")\ntime.sleep(60)')
    messages(pipe, 1)
    process.terminate()
    end(process, pipe)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    "wait",
    [
        "process.wait_stop()",
        "asyncio.run(process.stopping())",
        "while not process.stop_requested: time.sleep(0.001)",
        "import select; select.select([process.stop_fd], [], [])",
    ],
)
def test_once_it_is_ready_sigterm_lets_it_finish(tmp_path: Path, wait: str) -> None:
    process, pipe = run(tmp_path, f'process.ready()\n{wait}\nassert process.stop_requested\nprocess.report("finished")')
    assert messages(pipe, 1) == [Ready()]
    process.terminate()
    assert messages(pipe) == [Progress("finished")]
    end(process, pipe)
    assert process.returncode == 0


def test_ctrl_c_is_not_for_it(tmp_path: Path) -> None:
    process, pipe = run(tmp_path, "process.ready()\nprocess.wait_stop()")
    messages(pipe, 1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert process.poll() is None
    process.terminate()
    end(process, pipe)
    assert process.returncode == 0


def test_it_dies_with_its_supervisor(tmp_path: Path) -> None:
    body = 'with Process({folder!r}, "balancer") as process: process.ready(); process.wait_stop()'
    child = f"from mii.launch.process import Process\n{body.format(folder=str(tmp_path))}"
    parent = f"""
        import os, subprocess, sys, time
        read_end, write_end = os.pipe()
        environment = {{**os.environ, "{CONTROL_ENV}": f"{{os.getpid()}}:{{write_end}}"}}
        child = subprocess.Popen([sys.executable, "-c", {child!r}], env=environment, pass_fds=(write_end,))
        os.read(read_end, 100)
        print(child.pid, flush=True)
        time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(parent)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.communicate()
    wait_until(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes())


def test_it_knows_its_replica_its_config_and_its_devices_count_from_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MII_CACHE_PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    model = {"model_name_or_path": "m", "device": "cpu", "replica_num": 2, "device_map": [[0], [3]]}
    config = MIIConfig(deployment_name="demo", model_config=model)
    config.generate_replica_configs()
    save_deployment(config)
    process = Process(deployment_folder("demo").path, "replica-1-engine-2")
    assert (process.replica, process.rank) == (1, 2)
    assert process.config == config
    assert process.replica_config == config.model_conf.replica_configs[1]
    assert process.model_config.device_map == "auto"
    assert process.model_config.memory_fraction == config.model_conf.memory_fraction
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert process.model_config.memory_fraction == 0.4
    assert "memory_fraction" in process.model_config.model_fields_set
    assert process.drain_seconds == config.drain_seconds
    assert process.listen_host == "127.0.0.1"
    assert process.engine_address.endswith("/engine-1.sock")


def test_sockets_fit_into_their_addresses_however_deep_the_folder_is(tmp_path: Path) -> None:
    for path in (tmp_path / "a", tmp_path / ("long" * 30)):
        folder = DeploymentFolder(path)
        folder.create()
        assert len(folder.engine_address(999).removeprefix("ipc://")) <= 107
        run_folder = folder.run
        assert run_folder.stat().st_mode & 0o777 == 0o700
        token = folder.read_token()
        folder.create()
        assert folder.read_token() != token
        folder.remove()
        assert not run_folder.exists() and not path.exists()


def test_a_lock_is_held_until_its_holder_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_held(path)
    assert not path.exists()
    descriptor = acquire(path)
    assert is_held(path)
    os.close(descriptor)
    assert not is_held(path)


def test_a_lock_that_its_holder_removed_is_made_anew_by_whoever_waited(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = "import pathlib, sys; from mii.launch.lock import acquire; path = pathlib.Path(sys.argv[1]); print(); "
    code += "sys.stdout.flush(); acquire(path); sys.exit(not path.exists())"
    with locked(path):
        waiting = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        assert waiting.stdout is not None
        waiting.stdout.readline()
        time.sleep(0.1)
        assert waiting.poll() is None
    waiting.communicate(timeout=60)
    assert waiting.returncode == 0


def test_a_process_says_that_it_only_waits_for_others(tmp_path: Path) -> None:
    process, pipe = run(tmp_path, 'process.waiting("waiting for the engine")')
    assert messages(pipe) == [Progress("waiting for the engine", waits=True)]
    end(process, pipe)


def test_what_was_made_before_a_process_settled_is_not_looked_at_any_more(tmp_path: Path) -> None:
    body = """
        import gc
        from mii.imports import importing
        from mii.launch.loop import settle
        with importing():
            assert not gc.isenabled()
            import mii.config
        assert gc.isenabled()
        settle()
        assert gc.get_freeze_count() > 10_000 and len(gc.get_objects()) < 1_000
    """
    process, pipe = run(tmp_path, body)
    assert messages(pipe) == [] and end(process, pipe) == b"" and process.returncode == 0


@pytest.mark.parametrize(("body", "code"), [("leave()", 0), ("raise SystemExit(3)", 3)])
def test_a_process_that_leaves_does_what_is_asked_of_it_at_its_end_and_nothing_else(body: str, code: int) -> None:
    script = f"""
import atexit
from mii.launch.loop import leave
class Kept:
    def __del__(self): print("taken apart", flush=True)
kept = Kept()
atexit.register(print, "asked for")
print("worked")
{body}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    taken = ["taken apart"] if code else []
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (code, ["worked", "asked for", *taken], "")
