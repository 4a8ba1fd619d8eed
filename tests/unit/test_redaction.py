"""Secrets are redacted in texts and JSON, in every form in which they are written."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from delethink import redaction
from delethink.config import dump_recipe, load_recipe, parse_engine, parse_values
from delethink.redaction import (
    hidden_settings,
    hide_settings,
    json_text,
    redact,
    redact_error,
    redacted,
    register_secret,
    register_settings,
    register_url,
)

KEY = "sk-test-3f9a0c77e1"


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_registered", set())


@pytest.mark.parametrize(
    "name",
    [
        *("OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN", "MY_PASSWORD"),
        *("AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "db_passwd", "CLIENT_SECRET", "OPENAI_APIKEY"),
    ],
)
def test_variables_with_a_telling_name_are_secret(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, KEY)
    assert redact(f"a {KEY} b") == "a *** b"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "somevalue"),
        ("SHELL_LINE", "somevalue"),
        ("API_KEY", "EMPTY"),  # short: it occurs in ordinary text
        ("EOS_TOKEN", "<|endoftext|>"),
        ("LAST_TOKEN", "12345678"),
        ("SOME_SECRET", "two ordinary words"),
    ],
)
def test_other_variables_are_not(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert redact(f"a {value} b") == f"a {value} b"


@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), min_size=8))
def test_every_form_of_a_registered_secret_is_redacted(secret: str) -> None:
    redaction._registered.clear()
    register_secret(secret)
    body = json.dumps({"error": f"got {secret}"})
    for form in (secret, quote(secret, safe=""), repr(secret), body, json.dumps(body)):
        assert secret not in redact(f"({form})")
        if "***" not in secret:
            assert "***" in redact(f"({form})")
    values = {"text": f"-{secret}-", "nested": [{secret: 1}], "body": body}
    shown = json.loads(json_text(values))
    assert shown["text"] == "-***-"
    assert "***" in shown["nested"][0]


def test_json_stays_json_and_numbers_stay_exact() -> None:
    register_secret("12345678")
    values = {"ids": [12345678, 1], "text": "12345678", "logprobs": [-0.1], "none": None}
    expected = values | {"text": "***"}
    assert json.loads(json_text(values)) == expected
    assert json.loads(json_text(values, indent=2)) == expected
    assert redacted(values) == expected
    assert redacted({"a": (1, 2)}) == {"a": (1, 2)}


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{KEY}@host/v1",
        f"https://{KEY}@host/v1",
        f"https://host/v1?api_key={KEY}",
        f"https://user:{quote('a/b@' + KEY, safe='')}@host/v1",
    ],
)
def test_what_authenticates_in_a_url_is_redacted(url: str) -> None:
    register_url(url)
    assert KEY not in redact(f"cannot reach {url}")
    assert KEY not in redact_error(f"cannot reach {url}")


def test_basic_authentication_is_redacted() -> None:
    register_url(f"https://user:{KEY}@host")
    header = base64.b64encode(f"user:{KEY}".encode()).decode()
    assert redact(f"Basic {header}") == "Basic ***"


def test_an_unknown_password_in_a_url_is_redacted_in_messages_only() -> None:
    text = "see http://a:b@host/x and mail a@b.org"
    assert redact_error(text) == "see http://***@host/x and mail a@b.org"
    assert redact(text) == text  # the text of a model is not changed without need


def test_an_address_that_is_no_url_is_no_error() -> None:
    register_url("http://[")
    register_url("")


def test_secret_settings_are_hidden_by_name() -> None:
    settings = {
        "args": {"api_key": KEY, "base_url": f"https://u:{KEY}2@h", "headers": {"x-api-key": KEY}},
        "answer_key": "solution",
        "token": "</think>",
        "list": [{"hf_token": KEY}, f"Bearer {KEY}"],
        "auth_token": None,
        "size": 3,
    }
    register_settings(settings)
    hidden = hide_settings(settings)
    assert KEY not in json.dumps(hidden)
    assert (hidden["answer_key"], hidden["token"], hidden["size"]) == ("solution", "</think>", 3)
    assert hidden["list"] == [{"hf_token": "***"}, "Bearer ***"]
    assert hidden_settings(hidden) == [
        *("args.api_key", "args.base_url", "args.headers.x-api-key", "list.hf_token")
    ]
    assert hidden_settings(settings) == []
    assert redact(f"</think> {KEY}") == "</think> ***"


def test_overrides_on_the_command_line_are_registered() -> None:
    parse_values([f"judge.api_key={KEY}"])
    assert redact(KEY) == "***"
    with pytest.raises(Exception, match="unknown"):
        parse_engine([f"engine.api_key={KEY}2"])
    assert redact(f"{KEY}2") == "***"


def test_a_recipe_is_written_without_its_secrets(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.replace("KEY", KEY))
    recipe = load_recipe(file)
    assert recipe.rewards["judge"].args["api_key"] == KEY
    assert KEY not in dump_recipe(recipe)
    assert "api_key: '***'" in dump_recipe(recipe)


RECIPE = """
name: a
model: toy
task: automaton
rewards:
  exact: 1.0
  judge: {reward: exact, args: {api_key: KEY, note: "bearer KEY"}}
thinking: {context_size: 90, carryover_size: 45, max_chunks: 9}
training: {max_steps: 1}
"""
