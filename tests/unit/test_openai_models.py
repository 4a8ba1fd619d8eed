"""Addresses of OpenAI-compatible servers, and the lists of models that they give."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from evaluation_fakes import LetterTokenizer
from openai_servers import KEY, ModelServer, letters, listening

from delethink import ConfigError, Sampling
from delethink.engines.openai import OpenAIServer
from delethink.engines.openai_models import addresses

pytest.importorskip("openai")


def opened(models: Any, name: str | None = None, base: str = "/v1", url: str = "") -> OpenAIServer:
    with listening(ModelServer(), models, base) as served:
        root = served.url.removesuffix(base)
        return OpenAIServer(root + (url or base), name, LetterTokenizer(), api_key=KEY)


@pytest.mark.parametrize(
    ("given", "tried"),
    [
        ("http://h:1", ["http://h:1", "http://h:1/v1"]),
        ("http://h:1/", ["http://h:1", "http://h:1/v1"]),
        ("http://h:1/v1", ["http://h:1/v1"]),
        ("http://h:1/v1/", ["http://h:1/v1"]),
        ("http://h:1/v1/completions", ["http://h:1/v1"]),
        ("http://h:1/v1/chat/completions", ["http://h:1/v1"]),
        ("http://h:1/v1/models/", ["http://h:1/v1"]),
        ("https://h/v1beta/openai", ["https://h/v1beta/openai"]),  # new-api issue 853
        ("https://h/openai", ["https://h/openai", "https://h/openai/v1"]),
        ("http://h:1/proxy?key=x", ["http://h:1/proxy?key=x"]),
    ],
)
def test_the_version_is_tried_where_the_address_has_none(given: str, tried: list[str]) -> None:
    assert addresses(given) == tried


LIST = {"data": [{"id": "m", "max_model_len": 100}]}


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("/v1", ""),
        ("/v1", "/"),
        ("/v1", "/v1/chat/completions"),
        ("/openai/v1", "/openai"),
        ("", "/"),  # a server without a version
    ],
)
def test_a_server_is_found_without_the_version(base: str, url: str) -> None:
    server = opened(LIST, base=base, url=url or "/")
    assert server.base_url.endswith(base or str(server.base_url[-5:]))
    assert (server.model, server.max_model_tokens) == ("m", 100)


def test_an_address_without_a_list_is_said_with_both_that_were_tried() -> None:
    with pytest.raises(ConfigError, match=r"no list of models, nor at http://.*/v1: check"):
        opened(404, url="/")
    with pytest.raises(ConfigError, match=r"/v1 has no list of models: check the address"):
        opened(404)
    assert opened(404, "m").model == "m"  # not every server has one


@pytest.mark.parametrize(
    ("models", "window"),
    [
        ({"data": [{"id": "m", "max_model_len": 64}]}, 64),  # vLLM, SGLang
        ({"data": [{"id": "m", "meta": {"n_ctx": 64, "n_ctx_train": 999}}]}, 64),  # llama.cpp
        ({"data": [{"id": "m", "meta": {"n_ctx_train": 999}}]}, None),
        ({"data": [{"id": "m", "meta": None}]}, None),
        ({"data": [{"id": "m", "context_length": 64}]}, 64),  # OpenRouter, Together
        ({"data": [{"id": "m", "max_context_length": 999, "loaded_context_length": 64}]}, 64),
        ([{"id": "m", "context_length": 64}], 64),  # Together: a list alone
        ({"models": [{"name": "m", "details": {}}]}, None),  # Ollama's own list, localmind 11
        ({"object": "list", "data": ["m"]}, None),
        ({"data": [{"id": "m", "max_model_len": 0}]}, None),
        ({"data": [{"id": "m", "max_model_len": "64"}]}, None),
        ({"data": [{"id": "m", "max_model_len": True}]}, None),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_lists_of_many_servers_are_read(models: Any, window: int | None) -> None:
    server = opened(models)
    assert (server.model, server.max_model_tokens) == ("m", window)


@pytest.mark.parametrize(
    "models",
    [{"data": []}, {"data": None}, {"object": "list", "data": [], "models": None}, []],
    ids=str,
)
def test_an_empty_list_asks_for_a_name(models: Any) -> None:
    """Ollama without models, and mlx-omni-server issue 130: models are loaded on demand."""
    with pytest.raises(ConfigError, match="lists no model; name one with --served-model"):
        opened(models)
    assert opened(models, "any").model == "any"


@pytest.mark.parametrize(
    ("listed", "name", "is_served"),
    [
        ("m:latest", "m", True),  # Ollama
        ("m:latest", "m:latest", True),
        ("*", "anything", True),  # LiteLLM
        ("openai/*", "openai/m", True),
        ("openai/*", "other/m", False),
        ("m:7b", "m", False),
    ],
)
def test_names_are_those_that_the_server_takes(listed: str, name: str, is_served: bool) -> None:
    models = {"data": [{"id": listed, "max_model_len": 9}]}
    if is_served:
        assert opened(models, name).model == name
    else:
        with pytest.raises(ConfigError, match=f"lists .*, not '{name}'"):
            opened(models, name)


@pytest.mark.parametrize(
    "body", [b"<html>welcome</html>", b"", b"null", b"7", b'{"a": 1}'], ids=str
)
def test_a_page_is_no_list(body: bytes) -> None:
    """Some servers answer any address with a page, and status 200."""
    with pytest.raises(ConfigError, match="has no list of models"):
        opened(body)
    assert opened(body, "m").model == "m"


@pytest.mark.parametrize("status", [404, 500, 501])
def test_the_version_is_found_without_a_list(status: int) -> None:
    """The server of transformers fails over its list, if it was started with a folder."""
    tokenizer = letters()
    with listening(ModelServer(tokenizer=tokenizer), status) as served:
        url = served.url.removesuffix("/v1")
        lines: list[str] = []
        server = OpenAIServer(
            url, "m", tokenizer, api_key=KEY, eos_ids=(257,), announce=lines.append
        )
        asyncio.run(server.generate(tuple(tokenizer("ask ")["input_ids"]), 5, Sampling(0.0)))
        assert server.base_url == served.url
        assert served.url in lines[0]
