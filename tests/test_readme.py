"""The README lists every option there is, and its two commands stand where people and CI look for them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from mii.batching.generation.params import GenerateParamsConfig
from mii.config import DSStateManagerConfig, ModelConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def section(heading: str) -> str:
    level = heading.split(" ")[0]
    start = README.index(f"\n{heading}\n") + 1
    following = re.search(rf"^#{{1,{len(level)}}} ", README[start + len(heading) :], re.MULTILINE)
    return README[start : start + len(heading) + following.start()] if following else README[start:]


def first_column(text: str) -> set[str]:
    rows = re.findall(r"^\|([^|]*)\|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_every_generation_option_is_listed_and_nothing_else() -> None:
    assert first_column(section("### Generation")) == set(GenerateParamsConfig.option_names())


def test_every_model_option_is_listed_and_nothing_else() -> None:
    assert first_column(section("### Model and engine")) == set(ModelConfig.option_names())


def test_every_limit_of_the_engine_that_can_be_set_is_named() -> None:
    text = section("### Model and engine")
    assert all(f"`{name}" in text for name in DSStateManagerConfig.model_fields if name != "offload")


@pytest.mark.parametrize("heading", ["## Quick start", "## Tests"])
def test_each_of_the_two_commands_is_one_line_in_a_code_block(heading: str) -> None:
    block = re.search(r"```bash\n(.*?)```", section(heading), re.DOTALL)
    assert block is not None
    assert len(block[1].strip().splitlines()) == 1


def test_links_inside_the_repository_lead_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_ci_is_executable_and_valid() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True)
