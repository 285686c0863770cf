"""The wheel: one for every Python, with both libraries inside and nothing that does not belong there."""

from __future__ import annotations

import configparser
import platform
import re
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What any Linux has; CUDA's runtime is linked in
ALLOWED = re.compile(r"lib(c|m|stdc\+\+|gcc_s|dl|pthread|rt)\.so|ld-linux")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    done = subprocess.run(pip, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel: Path, name: str) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (path for path in archive.namelist() if path.endswith(f".dist-info/{name}"))
        return Parser().parsestr(archive.read(path).decode())


def test_one_wheel_serves_every_python_on_this_platform(wheel: Path) -> None:
    tag = f"py3-none-linux_{platform.machine()}"
    assert wheel.name.endswith(f"-{tag}.whl")
    described = metadata(wheel, "WHEEL")
    assert described["Tag"] == tag
    assert described["Root-Is-Purelib"] == "false"


def test_the_wheel_holds_the_package_and_nothing_else(files: set[str]) -> None:
    found = [path for kind in ("*.py", "*.pyi") for path in (ROOT / "mii").rglob(kind)]
    sources = {str(path.relative_to(ROOT)) for path in found} | {"mii/py.typed"}
    shipped = {name for name in files if not name.split("/")[0].endswith(".dist-info")}
    libraries = {name for name in shipped if name.endswith(".so")}
    assert "mii/_lib/libmii_cpu.so" in libraries
    assert libraries <= {"mii/_lib/libmii_cpu.so", "mii/_lib/libmii_cuda.so"}
    assert shipped - libraries == sources


def test_libraries_need_only_what_any_linux_has(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path, libraries)
    for name in libraries:
        dynamic = subprocess.run(["readelf", "-d", tmp_path / name], text=True, capture_output=True, check=True)
        needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic.stdout)
        assert needed
        assert [library for library in needed if not ALLOWED.match(library)] == []


def test_the_command_mii_exists(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (path for path in archive.namelist() if path.endswith("entry_points.txt"))
        entries = configparser.ConfigParser()
        entries.read_string(archive.read(path).decode())
    assert dict(entries["console_scripts"]) == {"mii": "mii.cli:main"}
    from mii.cli import main

    assert callable(main)


def test_deepspeed_is_an_extra_and_not_a_dependency(wheel: Path) -> None:
    needed = metadata(wheel, "METADATA").get_all("Requires-Dist")
    assert needed is not None
    plain = {re.split(r"[\s<>=!~;\[]", line)[0] for line in needed if "extra ==" not in line}
    assert {"torch", "transformers", "safetensors", "msgspec"} <= plain
    assert "deepspeed" not in plain


def test_a_second_build_compiles_nothing(wheel: Path) -> None:
    command = [sys.executable, "setup.py", "build_native", "--only=cpu"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    assert "libmii_cpu.so is up to date" in done.stdout
