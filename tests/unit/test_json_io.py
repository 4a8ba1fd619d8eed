"""Files that may hold anything are read, or refused with the documented error, file and line."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from delethink.config import load_recipe
from delethink.cost.calibrate import read_efficiency, read_lengths, read_steps
from delethink.cost.models import model_shape
from delethink.envs.dataset import dataset_task
from delethink.errors import ConfigError, RunDirectoryError, TraceFileError, UserError
from delethink.evaluation.records import BudgetOutcome, Record, ResultsDirectory, SampleKey
from delethink.json_io import (
    MAX_DEPTH,
    get_count,
    get_flag,
    get_ids,
    get_list,
    get_mapping,
    get_number,
    get_numbers,
    get_text,
    parse_json,
    read_json,
    read_json_lines,
    read_text,
)
from delethink.trace_io import TraceRecord, read_traces, write_traces
from delethink.training.checkpointing import changed_settings
from delethink.training.run_directory import RunDirectory
from delethink.types import Chunk, Problem, StopReason, Trace, TraceStop

HUGE = "9" * 5000
BAD_VALUES = {
    "deep list": "[" * 100_000,
    "deep and whole": "[" * 3000 + "]" * 3000,
    "a little too deep": "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
    "deep mapping": '{"a":' * 5000 + "1" + "}" * 5000,
    "huge number": HUGE,
    "huge number below": f'{{"a": [-{HUGE}]}}',
    "overflow": "1e999",
    "NaN": "NaN",
    "infinity": '{"a": -Infinity}',
    "repeated key": '{"a": 1, "a": 2}',
    "half a pair": '"\\ud800"',
    "NUL": "\x00",
    "NUL in a text": '"a\x00b"',
    "empty": "",
    "cut": '{"a": ',
    "two values": "1 2",
    "mark of byte order": "\ufeff{}",
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_text_is_one_short_error(case: str) -> None:
    with pytest.raises(TraceFileError, match="^f, line 3 (is not JSON|cannot be used): ") as caught:
        parse_json(BAD_VALUES[case], "f, line 3", TraceFileError)
    assert len(str(caught.value)) < 200


def test_bytes_must_be_utf8() -> None:
    for data in (b'"\xff"', '"ü"'.encode("latin-1"), '"a"'.encode("utf-16")):
        with pytest.raises(ConfigError, match="no UTF-8"):
            parse_json(data, "f", ConfigError)


def test_ordinary_text_with_many_brackets_and_characters_is_read() -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse_json(deep, "f", ConfigError)) == deep
    values = ["{[" * 200, "\\ud800 as text", "😀", "\u202e", [{"a": [1]}] * 100, 2**70, 1e300]
    for text in (json.dumps(values), json.dumps(values, ensure_ascii=False)):
        assert parse_json(text.encode(), "f", ConfigError) == values


@pytest.mark.parametrize(
    ("get", "good", "bad"),
    [
        (get_text, ["", "a"], [1, None, ["a"]]),
        (get_flag, [True, False], [1, 0, None, "true"]),
        (get_count, [0, 2**63 - 1], [-1, 2**63, 1.0, True, "1", None, 10**4000]),
        (get_number, [0, -1, 1e300, 2**70], [True, "1", None, 10**400, float("nan"), 10**5000]),
        (get_ids, [(), (0, 2**63 - 1)], [(-1,), (2**63,), (1.0,), (True,), ("1",), 3, "12", {}]),
        (get_numbers, [(), (1, -0.5)], [(True,), (None,), (10**400,), (float("inf"),), "12"]),
        (get_list, [[], [1]], [{}, "ab", None]),
        (get_mapping, [{}, {"a": 1}], [[], {1: 2}, None]),
    ],
)
def test_values_have_their_type_or_are_refused(
    get: Callable[[dict[str, Any], str], Any], good: list[Any], bad: list[Any]
) -> None:
    for value in good:
        assert get({"key": value}, "key") == value
    for value in bad:
        with pytest.raises(ValueError, match="'key' must be ") as caught:
            get({"key": value}, "key")
        assert len(str(caught.value)) < 200
    with pytest.raises(KeyError):
        get({}, "key")


def test_lines_have_numbers_and_a_partial_one_is_treated_as_said(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('1\n\n2\n{"a"')
    assert list(read_json_lines(path, ConfigError, partial="skip")) == [(1, 1), (3, 2)]
    with pytest.raises(ConfigError, match=r"x\.jsonl, line 4 is not JSON: .*is incomplete"):
        list(read_json_lines(path, ConfigError))
    for wrong in (tmp_path, tmp_path / "none", tmp_path / "a\0b"):
        with pytest.raises(RunDirectoryError, match="cannot read"):
            list(read_json_lines(wrong, RunDirectoryError))


def test_a_file_may_begin_with_a_mark_or_be_compressed(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for end in (b"\n", b"\r\n"):
        data = b'{"a": 1}' + end
        marked = codecs.BOM_UTF8 + data
        for written in (marked, gzip.compress(data), gzip.compress(marked)):
            path.write_bytes(written)
            assert read_json(path, ConfigError) == {"a": 1}
            assert list(read_json_lines(path, ConfigError)) == [(1, {"a": 1})]
            assert read_text(path, ConfigError) == data.decode()
    path.write_bytes(b'{"a": "' + codecs.BOM_UTF8 + b'"}\n')
    assert read_json(path, ConfigError) == {"a": "\ufeff"}


def test_a_compressed_file_may_be_damaged_or_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = tmp_path / "x.jsonl.gz", gzip.compress(b"1\n" * 5000)
    for bad in (data[:-9], data[:12] + b"\xff" * 9 + data[12:], data[:-8] + b"\0" * 8, data + b"x"):
        path.write_bytes(bad)
        with pytest.raises(ConfigError, match=r"cannot read .*x\.jsonl\.gz: "):
            list(read_json_lines(path, ConfigError))
    path.write_bytes(data)
    assert len(list(read_json_lines(path, ConfigError))) == 5000
    monkeypatch.setattr("delethink.json_io._MAX_DECOMPRESSED_BYTES", 9999)
    for read in (read_text, read_json, lambda *of: list(read_json_lines(*of))):
        with pytest.raises(ConfigError, match="more than 9,999 bytes once decompressed"):
            read(path, ConfigError)


# -- every reader --------------------------------------------------------------------------------

TRACE = TraceRecord(
    Problem("a", "b", {"steps": [1, {"x": None}]}, ({"role": "system", "content": "s"},)),
    Trace(
        (1, 2),
        (Chunk((1, 2), (3, 4), (-0.5, 0.0), StopReason.EOS, carried=0, policy_version=3),),
        TraceStop.COMPLETED,
    ),
    {"exact": 1.0, "other": None},
    0.5,
    "text",
    1.0,
    {"other": "failed"},
)
OUTCOME = BudgetOutcome(8, 1.0, 7, 2, 30, False, "b")
RECORD = Record(SampleKey("toy", 0, 1), (OUTCOME,), 5, 1.5, 2.5)
RECIPE = """
name: x
model: toy
task: {name: automaton, args: {min_steps: 2, max_steps: 4}}
rewards: {exact: 1.0}
thinking: {context_size: 32, carryover_size: 16, max_chunks: 4}
training: {max_steps: 3, per_device_train_batch_size: 8, num_generations: 4}
"""
CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 16,
}
METRICS = {
    "step": 1,
    "loss": None,
    "reward": 0.5,
    "seconds_sampling": 1,
    "seconds_training": 2.0,
    "by_chunk": {"entropy": [0.5, 0.25]},
}


def read_trace(folder: Path, data: bytes) -> Any:
    (folder / "x.jsonl").write_bytes(data)
    return list(read_traces(folder / "x.jsonl"))


def read_records(folder: Path, data: bytes) -> Any:
    (folder / "traces.jsonl").write_bytes(data)
    return list(ResultsDirectory(folder).read())


def read_settings(folder: Path, data: bytes) -> Any:
    (folder / "settings.json").write_bytes(data)
    now = {"samples": 2, "models": {"toy": "a"}, "settings": [{"key": "a"}], "seed": 0}
    directory = ResultsDirectory.resume(folder, now)
    directory.close()
    return None


def read_metrics(folder: Path, data: bytes) -> Any:
    (folder / "metrics.jsonl").write_bytes(data)
    return RunDirectory(folder).read_metrics()


def read_table(folder: Path, data: bytes) -> Any:
    (folder / "table.json").write_bytes(data)
    return RunDirectory(folder).read_table()


def read_finished(folder: Path, data: bytes) -> Any:
    (folder / "finished.json").write_bytes(data)
    return RunDirectory(folder).finished_step


def read_versions(folder: Path, data: bytes) -> Any:
    (folder / "versions.json").write_bytes(data)
    return RunDirectory(folder).first_weights


def read_recipe(folder: Path, data: bytes) -> Any:
    (folder / "recipe.yaml").write_bytes(data)
    return load_recipe(folder / "recipe.yaml")


def read_changed(folder: Path, data: bytes) -> Any:
    (folder / "good.yaml").write_text(RECIPE)
    (folder / "config.yaml").write_bytes(data)
    return changed_settings(folder, load_recipe(folder / "good.yaml"))


def read_rows_of(suffix: str) -> Callable[[Path, bytes], Any]:
    def read(folder: Path, data: bytes) -> Any:
        (folder / f"rows{suffix}").write_bytes(data)
        task = dataset_task(str(folder / f"rows{suffix}"), pass_rate_key="rate")
        return [*task.train, *task.heldout]

    return read


def read_rates(folder: Path, data: bytes) -> Any:
    (folder / "rates.jsonl").write_bytes(data)
    (folder / "good.jsonl").write_text('{"problem": "a", "answer": "b"}\n')
    task = dataset_task(
        str(folder / "good.jsonl"), pass_rates=str(folder / "rates.jsonl"), template="{problem}"
    )
    return task.left_out


def read_config(folder: Path, data: bytes) -> Any:
    (folder / "config.json").write_bytes(data)
    return model_shape(str(folder / "config.json"))


def read_figures(folder: Path, data: bytes) -> Any:
    (folder / "efficiency.json").write_bytes(data)
    return read_efficiency(folder / "efficiency.json")


def read_length_file(folder: Path, data: bytes) -> Any:
    (folder / "lengths.csv").write_bytes(data)
    return read_lengths(folder / "lengths.csv").tolist()


def read_step_file(folder: Path, data: bytes) -> Any:
    (folder / "traces").mkdir(exist_ok=True)
    (folder / "traces" / "step_000001.jsonl").write_bytes(data)
    return read_lengths(folder).tolist()


def read_run(folder: Path, data: bytes) -> Any:
    (folder / "traces").mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(RECIPE)
    for step in (1, 2):
        line = json.dumps(TRACE.to_json()) + "\n"
        (folder / "traces" / f"step_00000{step}.jsonl").write_text(line)
    (folder / "metrics.jsonl").write_bytes(data)
    return read_steps(folder)


def lines(*values: Any) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


Reader = Callable[[Path, bytes], Any]
READERS: dict[str, tuple[Reader, bytes]] = {
    "traces": (read_trace, lines(TRACE.to_json())),
    "records": (read_records, lines(RECORD.to_json())),
    "settings": (
        read_settings,
        lines({"samples": 1, "models": {"toy": "a"}, "settings": [{"key": "a"}], "seed": 0}),
    ),
    "metrics": (read_metrics, lines(METRICS)),
    "table": (read_table, lines([{"setting": "base"}])),
    "finished": (read_finished, lines({"step": 3})),
    "versions": (read_versions, lines({"first_weights": "ab"})),
    "recipe": (read_recipe, RECIPE.encode()),
    "recipe of a run": (read_changed, RECIPE.encode()),
    "rows": (read_rows_of(".jsonl"), lines({"problem": "a", "answer": "b", "rate": 0.5})),
    "rows of JSON": (
        read_rows_of(".json"),
        json.dumps({"data": [{"problem": "a", "answer": 3, "rate": 1}]}, indent=1).encode(),
    ),
    "rows of CSV": (read_rows_of(".csv"), b"problem,answer,rate\na,b,0.5\n"),
    "pass rates": (read_rates, lines({"prompt": "a", "rewards": {"exact": 1.0}})),
    "model": (read_config, json.dumps(CONFIG).encode()),
    "efficiencies": (read_figures, lines({"bandwidth": 0.5, "source": "a"})),
    "lengths": (read_length_file, b"3,2\n7\n"),
    "traces of a run": (read_step_file, lines(TRACE.to_json())),
    "steps of a run": (read_run, lines(METRICS, METRICS | {"step": 2})),
}


@pytest.mark.parametrize("name", READERS)
def test_a_valid_file_is_read(name: str, tmp_path: Path) -> None:
    read, data = READERS[name]
    read(tmp_path, data)


@pytest.mark.parametrize("name", READERS)
def test_bad_files_are_the_documented_error(name: str, tmp_path: Path) -> None:
    """Those that no reader accepts: bad text, and a bad value inside a valid file."""
    read, valid = READERS[name]
    if name not in ("lengths", "rows of CSV"):
        for bad in ("[" * 100_000, HUGE, "\x00", "{a: {a: 1", "- 1e999", "[[]]", '"a"', "3"):
            with pytest.raises(UserError):
                read(tmp_path, bad.encode() + b"\n")
    with pytest.raises(UserError):
        read(tmp_path, b"\xff\xfe" + valid)
    for file in [file for file in tmp_path.rglob("*") if file.is_file()]:
        file.unlink()


def parts(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a JSON value."""
    yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from parts(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


# Written as they stand, so that they may be no JSON.
ODD = ["null", "true", "-1", "0.5", "1e999", "NaN", HUGE, "1" + "0" * 400, "18446744073709551616"]
ODD += ['"x"', '"\\ud800"', '"\\u0000"', "[]", "{}", "[[1]]", '{"a": {"b": [1]}}', "[" * 2000]
ODD += ['{"a": 1, "a": 2}', '"1"', '"NaN"', "1e300"]
_JSON_READERS = [name for name in READERS if "recipe" not in name and name != "lengths"]


@pytest.mark.parametrize("name", _JSON_READERS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_valid_file_with_one_odd_value_is_read_or_refused(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    read, valid = READERS[name]
    if name == "rows of CSV":
        text = data.draw(st.sampled_from(ODD)).join(["problem,answer,rate\na,b,", "\n"])
    else:
        first, *rest = [valid.decode()] if name == "rows of JSON" else valid.decode().splitlines()
        value = json.loads(first)
        path = data.draw(st.sampled_from(list(parts(value))))
        odd = data.draw(st.sampled_from(ODD))
        text = json.dumps(replaced(value, path, "ODD")).replace('"ODD"', odd)
        text = "\n".join([text, *rest]) + "\n"
    read_or_refuse(read, text.encode(), tmp_path_factory.mktemp("a"))


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_valid_file_with_other_bytes_is_read_or_refused(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    read, valid = READERS[name]
    begin = data.draw(st.integers(0, len(valid)))
    end = data.draw(st.integers(begin, min(len(valid), begin + 8)))
    new = data.draw(st.binary(max_size=6) | st.sampled_from([b"\n", b'"', b"[", b"{", b"\\", b","]))
    read_or_refuse(read, valid[:begin] + new + valid[end:], tmp_path_factory.mktemp("a"))


def read_or_refuse(read: Reader, data: bytes, folder: Path) -> None:
    """Read a file; any other error than the documented one fails the test."""
    try:
        value = read(folder, data)
    except UserError as error:
        value = str(error)
    repr(value)  # whatever is read can be shown


@pytest.mark.parametrize("name", READERS)
def test_a_folder_in_place_of_a_file_is_the_documented_error(name: str, tmp_path: Path) -> None:
    read, valid = READERS[name]
    read(tmp_path, valid)
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file.stem != "good"]
    changed = [file for file in files if file.read_bytes() == valid]
    for file in changed or [tmp_path / "settings.json"]:  # an empty evaluation is removed
        file.unlink(missing_ok=True)
        file.mkdir()

    def read_folder(folder: Path, data: bytes) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "write_bytes", lambda path, data: 0)
            return read(folder, data)

    with pytest.raises(UserError):
        read_folder(tmp_path, valid)


# -- recipes -------------------------------------------------------------------------------------


def bomb(levels: int, merge: bool = False) -> str:
    """Return a text of a few lines that has 9**levels values with its aliases written out."""
    before = "{<<: [" if merge else "["
    after = "]}" if merge else "]"
    first = "x0: &x0 {k: 1}" if merge else "x0: &x0 [1]"
    more = [
        f"x{i}: &x{i} {before}{', '.join([f'*x{i - 1}'] * 9)}{after}" for i in range(1, levels + 1)
    ]
    return "\n".join([first, *more]) + "\n"


BAD_RECIPES = {
    "aliases": (bomb(12), "with each alias written out"),
    "merged aliases": (bomb(12, merge=True), "with each alias written out"),
    "alias of itself": ("a: &a [*a]\n", "with each alias written out"),
    "deep": ("a: " + "[" * 5000, "more than 100 levels"),
    "deep and whole": ("a: " + "[" * 101 + "]" * 101, "more than 100 levels"),
    "deep by aliases": (
        "a0: &a0 [[[[[[[[[[1]]]]]]]]]]\n"
        + "".join(f"a{i}: &a{i} [[[[[[[[[[*a{i - 1}]]]]]]]]]]\n" for i in range(1, 12)),
        "more than 100 levels",
    ),
    "huge number": (f"seed: {HUGE}\n", "line 1 has a number of 5000 characters"),
    "hexadecimal": (f"a: 1\nseed: 0x{HUGE}\n", "line 2 has a number of 5002 characters"),
    "repeated key": ("name: a\nmodel: b\nname: c\n", "line 3 has the key 'name' a second time"),
    "no date": ("name: 2024-13-45\n", "month must be in 1..12"),
    "long": ("a: '" + "x" * 2**20 + "'", "more than 1,048,576 characters"),
    "object": ("a: !!python/object/apply:os.getcwd []\n", "is not allowed"),
    "NUL": ("a: \0\n", "which YAML does not allow"),
    "empty": ("", "is empty"),
    "unknown key": ("? [a]\n: 1\n", "cannot be used as YAML"),
    "key of another type": ("1: 2\n", "."),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_bad_recipes_are_refused(case: str, tmp_path: Path) -> None:
    text, says = BAD_RECIPES[case]
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"r\.yaml") as caught:
        load_recipe(tmp_path / "r.yaml")
    assert says in str(caught.value)


def test_bad_bytes_of_a_recipe_have_their_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(RECIPE.encode() + b"output: \xff\n")
    with pytest.raises(ConfigError, match=r"r\.yaml, line 8 is no UTF-8"):
        load_recipe(tmp_path / "r.yaml")


def test_ordinary_aliases_and_merges_stay(tmp_path: Path) -> None:
    text = RECIPE.replace("args: {min_steps", "args: &args {min_steps") + (
        "evaluation: {task: {name: automaton, args: {<<: *args, max_steps: 9}}}\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    evaluated = load_recipe(tmp_path / "r.yaml").evaluation.task
    assert evaluated is not None
    assert evaluated.args == {"min_steps": 2, "max_steps": 9}


@pytest.mark.parametrize("value", ["[" * 5000, HUGE, f"{{a: {HUGE}}}", "{a: 1, a: 2}"])
def test_bad_overrides_are_refused(value: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    with pytest.raises(ConfigError, match="'seed'"):
        load_recipe(tmp_path / "r.yaml", [f"seed={value}"])


# -- traces: what is written can be read ---------------------------------------------------------


def test_an_existing_file_of_traces_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    write_traces(path, [TRACE])
    with pytest.raises(TraceFileError, match=r"exists already; .* overwrite=True"):
        write_traces(path, [])
    assert list(read_traces(path)) == [TRACE]
    write_traces(path, [TRACE, TRACE], overwrite=True)
    assert list(read_traces(path)) == [TRACE, TRACE]
    wrong = TraceRecord(Problem("a", "b"), TRACE.trace, advantage=float("nan"))
    with pytest.raises(TraceFileError, match="cannot be written"):
        write_traces(path, [TRACE, wrong], overwrite=True)
    assert list(read_traces(path)) == [TRACE, TRACE]
    assert [file.name for file in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize("text", ["\ud800", "a\udfff"])
def test_text_that_could_not_be_read_is_not_written(tmp_path: Path, text: str) -> None:
    for problem in (Problem(text, "b"), Problem("a", "b", {"key": text})):
        with pytest.raises(TraceFileError):
            write_traces(tmp_path / "x.jsonl", [TraceRecord(problem, TRACE.trace)])
    deep: Any = []
    for _ in range(200):
        deep = [deep]
    record = TraceRecord(Problem("a", "b", {"key": deep}), TRACE.trace)
    with pytest.raises(TraceFileError, match="metadata 'key'"):
        write_traces(tmp_path / "x.jsonl", [record])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt_ids": [1, -2]}, "'prompt_ids' must be a list of token ids, got -2"),
        ({"output_ids": [3, True]}, "'output_ids' must be a list of token ids, got True"),
        ({"output_ids": "ab"}, "'output_ids' must be a list, got 'ab'"),
        ({"logprobs": [-0.5]}, "2 sampled tokens and 1 log-probs"),
        ({"logprobs": [-0.5, None]}, "'logprobs' must be a list of finite numbers, got None"),
        ({"carried": 3}, "carries 3 tokens, and its prompt has 2"),
        ({"carried": -1}, "'carried' must be a whole number"),
        ({"policy_version": "3"}, "'policy_version' must be a whole number"),
        ({"stop": ["eos"]}, "'stop' must be a text"),
        ({"error": 3}, "'error' must be a text"),
        ({"role": None}, "'role' must be a text"),
    ],
)
def test_values_of_a_chunk_are_validated(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    values = TRACE.to_json()
    values["chunks"][0] |= changes
    with pytest.raises(TraceFileError, match="record 1: the trace cannot be read: ") as caught:
        read_trace(tmp_path, lines(values))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": 3},
        {"answer": None},
        {"metadata": []},
        {"before": [{"role": 3}]},
        {"before": [3]},
        {"rewards": {"exact": "1"}},
        {"rewards": []},
        {"reward": True},
        {"reward_errors": {"exact": 3}},
        {"advantage": "0.5"},
        {"text": 3},
        {"length": "2"},
        {"query_ids": {}},
        {"version": True},
        {"chunks": {"a": 1}},
    ],
)
def test_values_of_a_trace_are_validated(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(TraceFileError, match="record 1: "):
        read_trace(tmp_path, lines(TRACE.to_json() | changes))
