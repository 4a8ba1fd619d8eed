"""The address of an OpenAI-compatible server, and the models it lists."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import openai

from delethink.errors import ConfigError

_VERSION = "/v1"
_ROUTES = re.compile(r"/(?:chat/completions|completions|models)/?$")
_HAS_VERSION = re.compile(r"/v\d+\w*(?:/|$)")
# Keys of the longest sequence: vLLM and SGLang, then OpenRouter and LiteLLM, LM Studio, others.
_WINDOWS = (
    "max_model_len",
    "loaded_context_length",
    "context_length",
    "context_window",
    "max_context_length",
)
_ANY = "*"  # a proxy may list patterns of names


class ModelList(NamedTuple):
    """Models of a server."""

    base_url: str  # the address at which they are listed, or the given one
    windows: dict[str, int | None]  # longest sequence by name; empty without a list
    is_listed: bool  # the server has a list

    def serves(self, model: str) -> bool:
        """Return whether a name may be served, as far as the list says."""
        names = list(self.windows)
        return not names or any(
            model in (name, name.removesuffix(":latest"))
            or (name.endswith(_ANY) and model.startswith(name[:-1]))
            for name in names
        )

    def window(self, model: str) -> int | None:
        """Return the longest sequence of a model in tokens, if the list says it."""
        return self.windows.get(model, self.windows.get(f"{model}:latest"))


def addresses(base_url: str) -> list[str]:
    """Return the addresses to try: the given one without a route, then with the version.

    >>> addresses("http://h:1/v1/completions")
    ['http://h:1/v1']
    """
    base = _ROUTES.sub("", base_url.rstrip("/"))
    if "?" in base or _HAS_VERSION.search(base.partition("://")[2]):
        return [base]
    return [base, base + _VERSION]


def list_models(base_url: str, open_client: Callable[[str], openai.OpenAI]) -> ModelList:
    """Return the models listed at the first address that has a list.

    Raises:
        openai.APIConnectionError: no server at the address.
        openai.AuthenticationError, openai.PermissionDeniedError: the key is rejected.
    """
    tried = addresses(base_url)
    there = None  # an address with the route, which may fail
    for address in tried:
        try:
            with open_client(address) as client:
                response: Any = client.get("/models", cast_to=object)
            windows = _read(json.loads(response) if isinstance(response, str) else response)
        except (openai.AuthenticationError, openai.PermissionDeniedError):
            if address == tried[-1]:
                raise
        except openai.APIConnectionError:
            raise
        except openai.InternalServerError:
            there = there or address
        except (openai.APIError, ValueError, TypeError, AttributeError):
            continue  # no list of models
        else:
            return ModelList(address, windows, True)
    return ModelList(there or tried[0], {}, False)


def _read(response: Any) -> dict[str, int | None]:
    """Return the windows by model name; a response that lists nothing is a ``ValueError``."""
    entries = response
    if isinstance(response, Mapping):
        if "data" not in response and "models" not in response:
            raise ValueError("no list of models")
        entries = response.get("data") or response.get("models") or []
    if not isinstance(entries, list):
        raise ValueError("no list of models")
    windows: dict[str, int | None] = {}
    for entry in entries:
        fields = entry if isinstance(entry, Mapping) else {"id": entry}
        name = next((fields[key] for key in ("id", "name", "model", "key") if fields.get(key)), "")
        if name:
            windows[str(name)] = _window(fields)
    return windows


def _window(fields: Mapping[str, Any]) -> int | None:
    meta = fields.get("meta")  # of llama.cpp; its n_ctx_train is the model's, not the server's
    values = [fields.get(key) for key in _WINDOWS]
    values.append(meta.get("n_ctx") if isinstance(meta, Mapping) else None)
    return next((value for value in values if type(value) is int and value > 0), None)


def choose_model(models: ModelList, model: str | None, shown: Callable[[str], str]) -> str:
    """Return the name of the model to ask for.

    Args:
        models: the server's list.
        model: the name asked for; ``None`` takes the only model.
        shown: makes a text of the server safe to show.

    Raises:
        ConfigError: the server does not list it, or no name is given and there is not one model.
    """
    names = list(models.windows)
    if model is None and len(names) == 1 and not names[0].endswith(_ANY):
        return names[0]
    if model is not None and models.serves(model):
        return model
    address = shown(models.base_url)
    if not models.is_listed:
        hint = "" if len(addresses(models.base_url)) == 1 else f", nor at {address}{_VERSION}"
        raise ConfigError(
            f"the server at {address} has no list of models{hint}: check the address, and name the "
            "model with --served-model"
        )
    listed = shown(", ".join(names)) or "no model"
    wanted = "" if model is None else f", not {model!r}"
    raise ConfigError(
        f"the server at {address} lists {listed}{wanted}; name one with --served-model"
    )
