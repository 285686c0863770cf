"""Downloads from a hub: a real server on this machine that speaks the hub's protocol, and the real client."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from mii.errors import CheckpointNotFoundError
from mii.modeling.checkpoint import locate
from mii.modeling.checkpoint.hub import is_hub_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b'{"eos_token_id": 2}',
    "tokenizer.json": b"{}",
    "modeling_own.py": b"raise SystemExit",
    "README.md": b"# read me",
    "model.safetensors": save({"w": torch.arange(5.0)}),
    "pytorch_model.bin": b"not needed",
    "onnx/model.onnx": b"not needed",
    "q/m-00001-of-00002.gguf": b"first",
    "q/m-00002-of-00002.gguf": b"second",
}
BREAK = 11 << 20  # bytes of a file after which the connection breaks; the client keeps what it has by pieces of 10 MB


class Hub(BaseHTTPRequestHandler):
    """The three routes that a download needs: what a revision holds, what a file is, and the file."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.seen.append((self.command, path))  # type: ignore[attr-defined]
        if path.startswith(("/api/models/own/", "/own/")) and self.headers["Authorization"] == "Bearer secret":
            path = path.replace("own/", "good/", 1)
        if path.startswith(("/api/models/gated/", "/gated/")):
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith(("/api/models/down/", "/down/")):
            self.reply(500, b"{}")
        elif not path.startswith(("/api/models/good/model", "/good/model/")):
            self.reply(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            files = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in REPOSITORY.items()]
            self.reply(200, json.dumps(files).encode())
        elif path.startswith("/api/"):
            self.describe(path.rpartition("/revision/")[2])
        else:
            self.file(path.removeprefix("/good/model/resolve/").partition("/"), body)

    def describe(self, revision: str) -> None:
        if revision not in ("main", COMMIT, "/api/models/good/model"):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": name} for name in REPOSITORY]
        self.reply(200, json.dumps({"id": "good/model", "sha": COMMIT, "siblings": siblings}).encode())

    def file(self, parts: tuple[str, str, str], body: bool) -> None:
        revision, _, name = parts
        if revision not in ("main", COMMIT):
            self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        if name not in REPOSITORY:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        content = REPOSITORY[name]
        etag = hashlib.sha256(content).hexdigest()
        described = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        asked = self.headers["Range"]
        if asked is None or not body:
            self.reply(200, content, described, body)
            return
        first = int(asked.removeprefix("bytes=").rstrip("-"))
        self.server.resumed.append((name, first))  # type: ignore[attr-defined]
        described["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        self.reply(206, content[first:], described)

    def reply(self, status: int, content: bytes, headers: dict[str, str] | None = None, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and status == 200 and len(content) > BREAK:
            self.wfile.write(content[:BREAK])
            self.close_connection = True
        elif body:
            self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.resumed = [], []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


SCRIPT = """
import sys
from mii.errors import MIIError
from mii.modeling.checkpoint import locate, open_checkpoint
for argument in sys.argv[2:]:
    name, _, revision = argument.partition("@")
    try:
        if sys.argv[1] != "open":
            print(locate(name, revision=revision or None, weights=sys.argv[1] == "weights"))
        else:
            with open_checkpoint(name, revision=revision or None) as checkpoint:
                print(checkpoint.path, checkpoint.get("w").tolist(), checkpoint.generation_config)
    except MIIError as error:
        print(type(error).__name__, error)
"""


def ask(hub: ThreadingHTTPServer | None, home: Path, *arguments: str, **environment: str) -> str:
    """In a process of its own: the hub's client reads its settings when it is imported. Only "open" takes the time to
    import torch.
    """
    address = f"http://127.0.0.1:{hub.server_address[1]}" if hub else "http://127.0.0.1:9"
    settings = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env={**os.environ, "PYTHONPATH": str(root), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **settings, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_model_is_downloaded_opened_and_found_again_offline(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    first = ask(hub, tmp_path, "open", "good/model")
    assert first.endswith("[0.0, 1.0, 2.0, 3.0, 4.0] {'eos_token_id': 2}")
    downloaded = {path for method, path in hub.seen if method == "GET" and "/resolve/" in path}  # type: ignore[attr-defined]
    names = {path.rpartition("/")[2] for path in downloaded}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}
    folder = first.partition(" ")[0]
    assert ask(None, tmp_path, "weights", "good/model", HF_HUB_OFFLINE="1") == folder
    assert ask(None, tmp_path, "weights", "good/model") == folder  # the hub does not answer


def test_only_small_files_are_fetched_when_no_weights_are_wanted(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    folder = Path(ask(hub, tmp_path, "locate", "good/model"))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "generation_config.json", "tokenizer.json"]


def test_a_gguf_file_of_a_repository_comes_with_its_other_parts(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    path = Path(ask(hub, tmp_path, "locate", "good/model/q/m-00002-of-00002.gguf"))
    assert path.read_bytes() == b"second"
    assert path.with_name("m-00001-of-00002.gguf").read_bytes() == b"first"


def test_a_download_that_breaks_off_is_resumed(
    hub: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = save({"filler": torch.zeros(3_000_000), "w": torch.arange(5.0)})
    monkeypatch.setitem(REPOSITORY, "model.safetensors", large)
    folder = Path(ask(hub, tmp_path, "weights", "good/model"))
    assert (folder / "model.safetensors").read_bytes() == large
    ((name, first),) = hub.resumed  # type: ignore[attr-defined]
    assert name == "model.safetensors" and 0 < first <= BREAK


def test_a_revision_is_fetched_by_its_commit(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    assert ask(hub, tmp_path, "weights", f"good/model@{COMMIT}").endswith(f"/snapshots/{COMMIT}")
    assert all(COMMIT in path for _, path in hub.seen if "/resolve/" in path)  # type: ignore[attr-defined]


def test_what_is_private_needs_the_token(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    folder = Path(ask(hub, tmp_path, "weights", "own/model", HF_TOKEN="secret"))
    assert (folder / "model.safetensors").read_bytes() == REPOSITORY["model.safetensors"]
    assert "CheckpointNotFoundError" in ask(hub, tmp_path / "other", "weights", "own/model", HF_TOKEN="another")


def test_what_is_wrong_is_said_in_a_sentence(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    names = ("bad/model", "good/model@old", "gated/model", "good/model/x.gguf")
    missing, revision, gated, file = ask(hub, tmp_path, "open", *names).splitlines()
    assert missing.startswith("CheckpointNotFoundError There is neither a folder bad/model here nor such a repository")
    assert revision == "CheckpointNotFoundError The hub repository good/model has no revision 'old'."
    assert gated.startswith("CheckpointError Access to gated/model must be granted first")
    assert file == "CheckpointNotFoundError The hub has no file good/model/x.gguf."


def test_a_hub_out_of_reach_is_said_in_a_sentence(tmp_path: Path) -> None:
    text = ask(None, tmp_path, "open", "good/model")
    assert text.startswith("CheckpointNotFoundError There is no folder or file good/model, it is not in the local hub")


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "TheBloke/Llama-2-7B_x.1", "owner/name/model.Q4_0.gguf"])
def test_hub_ids_are_recognised(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize("name", ["/abs/path", "./here", "~/home", "../up", "a/b/c", "a/../b", "", "a b", "-x", "a/"])
def test_paths_are_not_taken_for_hub_ids(name: str) -> None:
    assert not is_hub_id(name)


def test_an_offline_name_that_is_not_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointNotFoundError, match="or HF_HUB_OFFLINE is set"):
        locate("nobody/nothing-here")
