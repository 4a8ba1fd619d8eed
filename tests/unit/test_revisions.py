"""Revisions of hub models: every loader asks for the one that the user named."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest

pytest.importorskip("transformers")

import transformers
from huggingface_hub import HfApi as RealHfApi
from transformers.utils import hub

from delethink.config import EngineConfig
from delethink.engines import loading
from delethink.engines.base import WorkerSpec
from delethink.engines.loading import (
    check_checkpoint,
    load_model,
    load_shell,
    load_tokenizer,
    locate,
    split_revision,
)
from delethink.errors import ModelError


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("toy", ("toy", None)),
        ("a/b", ("a/b", None)),
        ("a/b@main", ("a/b", "main")),
        ("a/b@v1.0", ("a/b", "v1.0")),
        ("a/b@refs/pr/3", ("a/b", "refs/pr/3")),
        ("b@0123abc", ("b", "0123abc")),
    ],
)
def test_an_id_may_have_a_revision(model: str, expected: tuple[str, str | None]) -> None:
    assert split_revision(model) == expected
    if model != "toy":
        assert locate(model) == model


def test_a_folder_may_have_an_at_sign(tmp_path: Path) -> None:
    folder = tmp_path / "a@b"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert locate(str(folder)) == str(folder)
    assert split_revision(str(folder)) == (str(folder), None)
    with pytest.raises(ModelError, match="does not exist"):
        locate(f"{folder}@main")
    with pytest.raises(ModelError, match="names no revision after @"):
        locate("a/b@")


class _StopError(Exception):
    """A loader was called."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """The pairs of name and revision that transformers is asked for; nothing is fetched."""
    seen: list[tuple[str, str | None]] = []

    def from_pretrained(name: str, **options: Any) -> Any:
        seen.append((name, options.get("revision")))
        raise _StopError

    for loader in ("AutoTokenizer", "AutoConfig", "AutoModelForCausalLM"):
        monkeypatch.setattr(getattr(transformers, loader), "from_pretrained", from_pretrained)

    def cached_file(name: str, file: str, revision: str | None = None, **options: Any) -> Any:
        seen.append((name, revision))
        return f"/nowhere/{file}" if file == "config.json" or "index" in file else None

    def shards(name: str, index: str, revision: str | None = None) -> None:
        seen.append((name, revision))

    loading._hub_file.cache_clear()
    monkeypatch.setattr(loading, "hub_error", lambda *name: None)
    monkeypatch.setattr(hub, "cached_file", cached_file)
    monkeypatch.setattr(hub, "get_checkpoint_shard_files", shards)
    monkeypatch.setattr(loading, "weight_files", lambda folder: [])
    monkeypatch.setattr(loading, "check_values", lambda files: None)
    return seen


def test_every_loader_asks_for_it(asked: list[tuple[str, str | None]]) -> None:
    for load in (
        load_tokenizer,
        load_shell,
        check_checkpoint,
        lambda model: load_model(model, "float32"),
    ):
        before = len(asked)
        with pytest.raises(ModelError, match="cannot load the"):
            load("a/b@v2")
        assert len(asked) > before
    assert set(asked) == {("a/b", "v2")}
    asked.clear()
    with pytest.raises(ModelError, match="cannot load the"):
        load_tokenizer("a/b")
    assert set(asked) == {("a/b", None)}


def test_generation_settings_too(
    asked: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.Qwen2Config()
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name, **options: config)
    assert load_shell("a/b@v2").config is config
    assert set(asked) == {("a/b", "v2")}


def test_vllm_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    from delethink.engines.vllm import _engine_args

    fake = SimpleNamespace(AsyncEngineArgs=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm.engine.arg_utils", fake)  # type: ignore[arg-type]
    spec = WorkerSpec("a/b@v2", EngineConfig(), (1,), 99, False, 0, 1)
    made: Any = _engine_args(spec, "extension")
    assert (made["model"], made["revision"]) == ("a/b", "v2")


# -- ids that cannot be had ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (404, "RepoNotFound", "hub has no such model, or it is private"),
        (401, "RepoNotFound", "hub has no such model, or it is private"),
        (404, "RevisionNotFound", "has no revision 'v9'"),
        (None, "", "the Hugging Face hub cannot be asked"),
        (200, "", None),
        (500, "", None),  # loading then says why
    ],
    ids=["unknown", "private", "revision", "offline", "found", "broken"],
)
def test_an_id_that_cannot_be_had_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, status: int | None, code: str, text: str | None
) -> None:
    """The hub is a server on loopback: there is no connection to the real one."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status or 500)
            self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(b'{"id": "some/model", "siblings": []}')

        def log_message(self, *args: Any) -> None:
            """Print nothing."""

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            if status is None:
                server.shutdown()
                server.server_close()
            monkeypatch.setattr(huggingface_hub, "HfApi", lambda: RealHfApi(endpoint=address))
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
            loading.hub_error.cache_clear()
            found = loading.hub_error("some/model", "v9")
        finally:
            loading.hub_error.cache_clear()
            server.shutdown()
    assert (text in found) if text else found is None  # type: ignore[operator]
    assert len(asked) == (0 if status is None else 1)
