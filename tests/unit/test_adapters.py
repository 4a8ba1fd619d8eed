"""LoRA adapters of PEFT: merged as PEFT merges them, or refused in a sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from chat_tokenizers import make_chat_tokenizer  # noqa: E402
from tiny_adapters import (  # noqa: E402
    MARKS,
    TEMPLATE,
    VOCABULARY,
    edit_settings,
    edit_weights,
    load_base,
    save_adapter,
    save_model,
)
from transformers.utils import hub  # noqa: E402

from delethink.config import EngineConfig  # noqa: E402
from delethink.engines import loading  # noqa: E402
from delethink.engines.loading import (  # noqa: E402
    digest,
    eos_ids,
    find_adapter,
    find_source,
    load_model,
    load_shell,
    load_tokenizer,
    locate,
)
from delethink.errors import ModelError, WeightSyncError  # noqa: E402

IDS = torch.tensor([[3, 5, 200, 7, 2, 9, 90]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def sentence(caught: pytest.ExceptionInfo[ModelError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# -- what merges -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"use_dora": True},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"bias": "all", "init_lora_weights": "gaussian"},
        {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
        {"trainable_token_indices": [3, 5]},
        {"target_modules": ["q_proj"], "exclude_modules": [r".*\.1\.self_attn\.q_proj"]},
    ],
    ids=lambda settings: "+".join(settings) or "plain",
)
def test_the_merged_model_is_that_of_peft(
    tmp_path: Path, base: Path, settings: dict[str, Any]
) -> None:
    folder = save_adapter(tmp_path / "adapter", base, **settings)
    merged = load_model(str(folder), "float32").eval()
    adapted = peft.PeftModel.from_pretrained(load_base(base), str(folder)).eval()
    with torch.no_grad():
        logits = merged(IDS).logits
        torch.testing.assert_close(logits, adapted(IDS).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits, load_base(base)(IDS).logits, atol=0.1)
    whole = load_base(base).state_dict()
    assert {n: t.shape for n, t in merged.state_dict().items()} == {
        n: t.shape for n, t in whole.items()
    }
    assert all(p.requires_grad for p in merged.parameters())
    merged.save_pretrained(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"), "float32").eval()
    torch.testing.assert_close(again(IDS).logits, logits)


def test_weights_are_merged_in_the_data_type_asked_for(tmp_path: Path, base: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", base)
    merged = load_model(str(folder), "bfloat16")
    own = peft.PeftModel.from_pretrained(load_base(base, torch.bfloat16), str(folder))
    expected = own.merge_and_unload().state_dict()
    for name, tensor in merged.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name]), name


def test_weights_beyond_the_data_type_are_a_sentence(tmp_path: Path, base: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", base)
    edit_settings(folder, lora_alpha=1e6)
    load_model(str(folder), "float32")
    with pytest.raises(ModelError, match=r"q_proj.weight of .* beyond the range of torch.float16"):
        load_model(str(folder), "float16")


def test_tied_embeddings_stay_tied_beside_an_adapter(tmp_path: Path, tied: Path) -> None:
    merged = load_model(str(save_adapter(tmp_path / "adapter", tied)), "float32")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_an_adapter_may_adapt_another_one(tmp_path: Path, base: Path) -> None:
    """As training from an adapter's folder writes it."""
    first = save_adapter(tmp_path / "first", base)
    start = load_model(str(first), "float32")
    adapted = peft.get_peft_model(start, peft.LoraConfig(r=2, target_modules=["k_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(str(tmp_path / "second"))
    assert find_adapter(str(tmp_path / "second")).base == str(first)  # type: ignore[union-attr]
    merged = load_model(str(tmp_path / "second"), "float32")
    torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, rtol=1e-4, atol=1e-4)
    assert locate(str(tmp_path / "second")) == str(base)


def test_an_adapter_trained_on_a_relative_folder_finds_it_from_anywhere(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "base")
    save_adapter(tmp_path / "first", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for model in ("base", "first"):
        start = load_model(model, "float32")
        adapted = peft.get_peft_model(start, peft.LoraConfig(r=2, target_modules=["k_proj"]))
        adapted.save_pretrained(str(tmp_path / f"on {model}"))
    monkeypatch.chdir("/")
    for model in ("base", "first"):
        found = find_adapter(str(tmp_path / f"on {model}"))
        assert found is not None
        assert found.base == str(tmp_path / model)


# -- the base model ----------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["../base", "base", "./base", "absolute"])
def test_the_base_is_found_beside_the_adapter_or_anywhere(
    tmp_path: Path, base: Path, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_adapter(tmp_path / "adapter", base)
    inside = named in ("base", "./base")
    own = Path(shutil.copytree(base, (folder if inside else tmp_path) / "base"))
    edit_settings(folder, base_model_name_or_path=str(own) if named == "absolute" else named)
    monkeypatch.chdir(base)  # which has no such folder
    assert locate(str(folder)) == str(own)
    load_model(str(folder), "float32")


def test_the_base_may_be_relative_to_the_current_directory_as_for_peft(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_adapter(tmp_path / "adapter", base)
    shutil.copytree(base, tmp_path / "models" / "tiny")
    edit_settings(folder, base_model_name_or_path="models/tiny")
    monkeypatch.chdir(tmp_path)
    assert locate(str(folder)) == "models/tiny"


def test_ids_of_adapters_and_bases_keep_their_revisions(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a stand-in: files of two folders, by id and revision."""
    folder = save_adapter(tmp_path / "adapter", base)
    edit_settings(folder, base_model_name_or_path="some/base", revision="v1")
    there: dict[Any, Path] = {("some/adapter", "v2"): folder, ("some/base", "v1"): base}

    def cached_file(
        name: str, file: str, revision: str | None = None, **options: Any
    ) -> str | None:
        path = there[name, revision] / file
        return str(path) if path.is_file() else None

    monkeypatch.setattr(hub, "cached_file", cached_file)
    monkeypatch.setattr(loading, "hub_error", lambda *name: None)
    loading._hub_file.cache_clear()
    try:
        assert find_adapter("some/adapter@v2").base == "some/base@v1"  # type: ignore[union-attr]
        assert find_source("some/adapter@v2") == "some/base@v1"
        assert find_source("some/adapter@v2", "tokenizer") == "some/base@v1"
        assert locate("some/adapter@v2") == "some/adapter@v2"  # without a look-up
        make_chat_tokenizer(TEMPLATE, MARKS).save_pretrained(folder)
        loading._hub_file.cache_clear()
        assert find_source("some/adapter@v2", "tokenizer") == "some/adapter@v2"
        assert find_adapter("some/base@v1") is None
        assert digest("some/adapter@v2") is None
    finally:
        loading._hub_file.cache_clear()


@pytest.mark.parametrize(
    ("named", "text"),
    [
        ("/no/such/model", "the model folder /no/such/model does not exist"),
        ("../gone", "gone does not exist"),
        ("~/no/such/model", "no/such/model does not exist"),
    ],
)
def test_a_missing_base_is_named(tmp_path: Path, base: Path, named: str, text: str) -> None:
    folder = save_adapter(tmp_path / "adapter", base)
    edit_settings(folder, base_model_name_or_path=named)
    for load in (locate, load_tokenizer, load_shell, lambda model: load_model(model, "float32")):
        with pytest.raises(ModelError) as caught:
            load(str(folder))
        assert f"the base model of the adapter in {folder} cannot be used" in sentence(caught)
        assert text in str(caught.value)
        assert "base_model_name_or_path" in str(caught.value)


def test_a_base_without_its_weights_is_named(tmp_path: Path, base: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", base)
    empty = Path(shutil.copytree(base, tmp_path / "empty"))
    (empty / "model.safetensors").unlink()
    edit_settings(folder, base_model_name_or_path=str(empty))
    with pytest.raises(ModelError, match=f"{empty} has no weights in safetensors"):
        load_model(str(folder), "float32")


def test_adapters_in_a_circle_are_a_sentence(tmp_path: Path, base: Path) -> None:
    first = save_adapter(tmp_path / "first", base)
    second = save_adapter(tmp_path / "second", base)
    edit_settings(first, base_model_name_or_path=str(first))
    with pytest.raises(ModelError, match="as its base model, which is the adapter itself"):
        locate(str(first))
    edit_settings(first, base_model_name_or_path=str(second))
    edit_settings(second, base_model_name_or_path=str(first))
    with pytest.raises(ModelError, match="or adapts it"):
        locate(str(second))


# -- tokenizer and chat template -----------------------------------------------------------------


def test_tokenizer_and_template_are_the_adapters_if_it_has_them(tmp_path: Path, base: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", base)
    assert load_tokenizer(str(folder)).chat_template == TEMPLATE  # of the base
    (folder / "chat_template.jinja").write_text("own " + TEMPLATE)
    assert load_tokenizer(str(folder)).chat_template == "own " + TEMPLATE
    (folder / "chat_template.jinja").unlink()

    other = make_chat_tokenizer(None, [MARKS[1], "<|turn|>"], eos="<|turn|>")
    other.save_pretrained(folder)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.eos_token == "<|turn|>"
    assert tokenizer.chat_template == TEMPLATE  # its own tokenizer has none
    assert eos_ids(load_shell(str(folder)), tokenizer)[0] == VOCABULARY - 1

    make_chat_tokenizer("own " + TEMPLATE, MARKS).save_pretrained(folder)
    assert load_tokenizer(str(folder)).chat_template == "own " + TEMPLATE


def test_tokens_outside_the_base_models_vocabulary_are_a_sentence(
    tmp_path: Path, base: Path
) -> None:
    folder = save_adapter(tmp_path / "adapter", base)
    make_chat_tokenizer(TEMPLATE, [*MARKS, "<|added|>"]).save_pretrained(folder)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(folder))
    expected = f"has the token '<|added|>', outside the vocabulary of {VOCABULARY}"
    assert expected in sentence(caught)


def test_tokens_that_the_base_model_lacks_too_are_no_fault_of_the_adapter(tmp_path: Path) -> None:
    """Gemma 3 of 1B, for example, has one token more than embeddings."""
    base = save_model(tmp_path / "base", marks=(*MARKS, "<|image|>"))
    folder = save_adapter(tmp_path / "adapter", base)
    make_chat_tokenizer(TEMPLATE, [*MARKS, "<|image|>"]).save_pretrained(folder)
    load_tokenizer(str(folder))


# -- what is refused -----------------------------------------------------------------------------


def first_name(weights: dict[str, Any]) -> str:
    return next(name for name in sorted(weights) if "q_proj.lora_A" in name)


def cut_rank(weights: dict[str, Any]) -> None:
    for name, tensor in weights.items():
        weights[name] = tensor[:2] if "lora_A" in name else tensor[:, :2]


def spoil(value: float) -> Callable[[dict[str, Any]], None]:
    def change(weights: dict[str, Any]) -> None:
        weights[first_name(weights)][0, 0] = value

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (cut_rank, "lora_A.weight [2, 64] instead of [4, 64]"),
        (lambda w: w.pop(first_name(w)), "q_proj.lora_A.weight missing"),
        (lambda w: w.clear(), "and 9 more missing"),
        (lambda w: w.update({"x.lora_A.weight": torch.zeros(1)}), "x.lora_A.weight unexpected"),
        (spoil(float("nan")), "NaN or infinite values in base_model.model"),
        (spoil(float("inf")), "NaN or infinite values in base_model.model"),
    ],
    ids=["rank", "missing", "empty", "unexpected", "nan", "infinite"],
)
def test_weights_are_whole_or_refused(
    tmp_path: Path, base: Path, change: Callable[[dict[str, Any]], object], text: str
) -> None:
    folder = save_adapter(tmp_path / "adapter", base)
    edit_weights(folder, change)
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), "float32")
    assert text in sentence(caught)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"target_modules": ["c_attn"]}, "target_modules name c_attn, no layer of that model"),
        ({"target_modules": ["q_proj", "v_proj"]}, "down_proj.lora_A.weight"),
        ({"target_modules": ["q_proj", "v_proj", "down_proj", "k_proj"]}, "k_proj.lora_A.weight"),
        ({"r": 8}, "[4, 64] instead of [8, 64]"),
        ({"peft_type": "PREFIX_TUNING"}, "an adapter of the type 'PREFIX_TUNING'"),
        ({"peft_type": "IA3"}, "only LORA (DoRA and saved modules included)"),
        ({"peft_type": None}, "an adapter of the type None"),
        ({"base_model_name_or_path": ""}, "names no base model"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"alora_invocation_tokens": [3]}, "it sets alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "it repeats layers"),
        ({"init_lora_weights": "pissa_niter_4"}, "belongs to a changed base model"),
        ({"init_lora_weights": "olora"}, "belongs to a changed base model"),
        ({"r": "four"}, "cannot be merged into its base model"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_settings_of_another_kind_are_a_sentence(
    tmp_path: Path, base: Path, settings: dict[str, Any], text: str
) -> None:
    folder = save_adapter(tmp_path / "adapter", base)
    edit_settings(folder, **settings)
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), "float32")
    assert text in sentence(caught)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '"LORA"', '{"peft_type": ["LORA"]}'])
def test_settings_that_are_none_are_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        locate(str(tmp_path))
    assert "adapter_config.json" in sentence(caught)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"num_hidden_layers": 1}, "layers.1.mlp.down_proj.lora_A.weight"),
        ({"num_hidden_layers": 3}, "layers.2.mlp.down_proj.lora_A.weight"),
        ({"intermediate_size": 48}, "[4, 64] instead of [4, 48]"),
        ({"hidden_size": 64, "num_attention_heads": 4}, "q_proj.lora_A.weight [4, 32] instead"),
    ],
    ids=["layer less", "layer more", "narrower", "wider"],
)
def test_an_adapter_of_another_model_is_a_sentence(
    tmp_path: Path, base: Path, sizes: dict[str, Any], text: str
) -> None:
    other = save_model(tmp_path / "other", **sizes)
    folder = save_adapter(tmp_path / "adapter", base)
    edit_settings(folder, base_model_name_or_path=str(other))
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), "float32")
    assert text in sentence(caught)
    assert f"base model {other}" in str(caught.value)


def test_another_architecture_is_a_sentence(tmp_path: Path, base: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    other = tmp_path / "other"
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(other)
    folder = save_adapter(tmp_path / "adapter", base)
    edit_settings(folder, base_model_name_or_path=str(other))
    with pytest.raises(ModelError, match="name down_proj, q_proj, v_proj, no layer"):
        load_model(str(folder), "float32")


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head", "embed_tokens"]}])
def test_another_vocabulary_is_a_sentence(
    tmp_path: Path, base: Path, settings: dict[str, Any]
) -> None:
    """PEFT saves the embeddings of a model with added tokens beside the adapter."""
    folder = save_adapter(tmp_path / "adapter", base, **settings)
    bigger = save_model(tmp_path / "bigger", vocab_size=VOCABULARY + 4)
    if not settings:
        own = {
            f"base_model.model.{name}": tensor.clone()
            for name, tensor in load_base(bigger).state_dict().items()
            if "embed_tokens" in name or "lm_head" in name
        }
        edit_weights(folder, lambda weights: weights.update(own))
    else:
        edit_settings(folder, base_model_name_or_path=str(bigger))
    with pytest.raises(ModelError) as caught:
        load_model(str(folder), "float32")
    assert "the vocabularies differ" in sentence(caught)


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}],
    ids=["saved", "adapted"],
)
def test_a_change_of_one_of_two_tied_layers_is_a_sentence(
    tmp_path: Path, tied: Path, settings: dict[str, Any]
) -> None:
    folder = save_adapter(tmp_path / "adapter", tied, **settings)
    with pytest.raises(ModelError, match="shares this weight between embeddings") as caught:
        load_model(str(folder), "float32")
    sentence(caught)


def test_pickles_of_adapters_are_refused_and_never_opened(tmp_path: Path, base: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", base)

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "opened"),)

    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no adapter_model.safetensors: download"):
        load_model(str(folder), "float32")
    torch.save(Evil(), folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="a pickle can run any code"):
        load_model(str(folder), "float32")
    assert not (tmp_path / "opened").exists()


def test_a_quantized_base_is_a_sentence(tmp_path: Path, base: Path) -> None:
    """A stand-in for a quantized model, whose kernels need a GPU."""
    from delethink.engines.adapters import merge

    folder = save_adapter(tmp_path / "adapter", base)
    model = load_base(base)
    model.config.quantization_config = {"quant_method": "gptq"}
    adapter = find_adapter(str(folder))
    assert adapter is not None
    with pytest.raises(ModelError, match="is quantized, and merging would round"):
        merge(model, adapter)


def test_a_model_and_an_adapter_in_one_folder_are_a_sentence(tmp_path: Path, base: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", base)
    shutil.copy(base / "config.json", folder)
    load_model(str(folder), "float32")  # a configuration alone is no model
    shutil.copy(base / "model.safetensors", folder)
    with pytest.raises(ModelError, match="holds a whole model and a LoRA adapter") as caught:
        load_model(str(folder), "float32")
    sentence(caught)


@pytest.mark.parametrize("refuses", [False, True])
def test_workers_start_with_the_base_model_and_are_sent_merged_weights(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    """The pool is a stand-in; tests/integration/test_adapter_eval.py has a real one."""
    from delethink.engines.vllm import VllmPool

    folder = save_adapter(tmp_path / "adapter", base)
    seen: dict[str, Any] = {}

    def update_weights(self: Any, weights: dict[str, Any], version: int) -> None:
        seen["weights"], seen["version"] = weights, version
        if refuses:
            raise WeightSyncError("the engine has no weight called 'x'")

    monkeypatch.setattr(VllmPool, "__init__", lambda self, model, *a, **o: seen.update(model=model))
    monkeypatch.setattr(VllmPool, "update_weights", update_weights)
    monkeypatch.setattr(VllmPool, "close", lambda self: seen.update(closed=True))

    def create() -> None:
        VllmPool.create(
            EngineConfig(dtype="bfloat16"),
            str(folder),
            None,
            load_tokenizer(str(folder)),
            trust_remote_code=False,
            seed=0,
            is_trained=False,
        )

    if refuses:
        with pytest.raises(ModelError, match="does not take the merged weights of") as caught:
            create()
        assert "set engine=transformers" in sentence(caught)
        assert seen["closed"]
        return
    create()
    assert (seen["model"], seen["version"]) == (str(base), 0)
    merged = load_model(str(folder), "bfloat16").state_dict()
    assert seen["weights"].keys() == merged.keys()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in seen["weights"].items())
    assert "closed" not in seen


def test_the_digest_covers_settings_weights_and_base(tmp_path: Path, base: Path) -> None:
    folder = save_adapter(tmp_path / "adapter", base)
    digests = [digest(str(folder))]
    edit_settings(folder, lora_alpha=17)
    digests.append(digest(str(folder)))
    edit_weights(folder, spoil(3.0))
    digests.append(digest(str(folder)))
    other = save_model(tmp_path / "other", num_hidden_layers=1)
    edit_settings(folder, base_model_name_or_path=str(other))
    digests.append(digest(str(folder)))
    assert None not in digests
    assert len(set(digests)) == 4


def test_a_whole_model_in_the_cache_of_the_hub_is_not_looked_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a connection, each look-up would wait for several retries."""
    import huggingface_hub

    there = {"model.safetensors"}

    def try_to_load_from_cache(name: str, file: str, **options: Any) -> str | None:
        return f"/cache/{file}" if file in there else None

    asked: list[str] = []

    def cached_file(name: str, file: str, **options: Any) -> None:
        asked.append(file)

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", try_to_load_from_cache)
    monkeypatch.setattr(hub, "cached_file", cached_file)
    monkeypatch.setattr(loading, "hub_error", lambda *name: None)
    loading._hub_file.cache_clear()
    assert find_adapter("some/cached_model") is None
    assert not asked
    there.add("adapter_config.json")
    assert find_adapter("some/cached_model") is None
    assert asked == ["adapter_config.json"]
    loading._hub_file.cache_clear()
