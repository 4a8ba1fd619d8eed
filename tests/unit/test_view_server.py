"""The viewer's server: its token, its folder, its headers, and answers without live texts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from installed import need

need("starlette", "uvicorn", "httpx")

from starlette.testclient import TestClient  # noqa: E402

from delethink import Chunk, Problem, Trace  # noqa: E402
from delethink.cli.main import main  # noqa: E402
from delethink.errors import ConfigError  # noqa: E402
from delethink.trace_html import TraceView, token_texts  # noqa: E402
from delethink.trace_io import TraceRecord  # noqa: E402
from delethink.types import StopReason, TraceStop  # noqa: E402
from delethink.view.index import TraceIndex  # noqa: E402
from delethink.view.server import OpenTrace, Viewer, open_socket  # noqa: E402
from delethink.view.traces import TraceOpener  # noqa: E402

TOKEN = "the-token"
ATTACK = "<script>alert(1)</script>\x1b[2J\u202e"


def trace(chunks: int = 2, tokens: int = 6) -> Trace:
    made, carried = [], ()
    for number in range(chunks):
        output = tuple(range(number * tokens, (number + 1) * tokens))
        stop = StopReason.EOS if number == chunks - 1 else StopReason.LENGTH
        made.append(Chunk((1, *carried), output, (-0.1,) * tokens, stop, len(carried)))
        carried = output[-2:]
    return Trace((1,), tuple(made), TraceStop.COMPLETED)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "traces").mkdir(parents=True)
    records = [
        TraceRecord(Problem("p", "a"), trace(), {"exact": 1.0}, reward=1.0, text=ATTACK),
        TraceRecord(Problem(ATTACK, ATTACK), trace(5, 900), {}, reward=0.0, text=ATTACK),
    ]
    text = "".join(json.dumps(record.to_json()) + "\n" for record in records)
    (folder / "traces/step_000001.jsonl").write_text(text)
    (tmp_path / "secret.txt").write_text("SECRET")
    return folder


@pytest.fixture
def viewer(run: Path) -> Viewer:
    index = TraceIndex(run)
    index.refresh()
    return Viewer(index, TraceOpener(index), TOKEN)


@pytest.fixture
def client(viewer: Viewer) -> Any:
    return TestClient(viewer.app(), base_url="http://127.0.0.1")


PATHS = ("", "viewer.js", "api/state", "api/list", "report", "api/export?name=x")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("token", ["", "wrong", "the-tokens", "THE-TOKEN"])
def test_without_the_token_nothing_is_told(client: Any, path: str, token: str) -> None:
    answer = client.get(f"/{token}/{path}")
    assert answer.status_code in (403, 404)
    assert "step_" not in answer.text


def test_another_host_name_is_refused(viewer: Viewer) -> None:
    answer = TestClient(viewer.app(), base_url="http://evil.example").get(f"/{TOKEN}/api/list")
    assert answer.status_code == 400


@pytest.mark.parametrize("method", ["post", "put", "delete", "patch"])
def test_nothing_can_be_written(client: Any, method: str) -> None:
    assert getattr(client, method)(f"/{TOKEN}/api/list").status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt",
        "..%2f..%2fsecret.txt",
        "index.html",
        "api/trace?name=../secret.txt:1",
        "api/trace?name=/etc/passwd:1",
        "api/page?name=traces/../../secret.txt:1&n=0",
        "api/export?name=../secret.txt:1",
        "%2e%2e/%2e%2e/etc/passwd",
    ],
)
def test_no_address_leads_out_of_the_folder(client: Any, path: str) -> None:
    answer = client.get(f"/{TOKEN}/{path}")
    assert answer.status_code in (403, 404)
    assert "SECRET" not in answer.text
    assert "root:" not in answer.text


@pytest.mark.parametrize("path", ["", "viewer.css", "api/state", "api/list", "nothing"])
def test_every_answer_forbids_foreign_scripts(client: Any, path: str) -> None:
    headers = client.get(f"/{TOKEN}/{path}").headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_the_list_gives_plain_values(client: Any) -> None:
    found = client.get(f"/{TOKEN}/api/list?sort=reward&desc=1").json()
    assert found["total"] == 2
    assert [row["reward"] for row in found["rows"]] == [1.0, 0.0]
    assert client.get(f"/{TOKEN}/api/list?by=problem").json()["total"] == 2
    assert client.get(f"/{TOKEN}/api/list?sort=none").status_code == 400


def test_a_trace_is_served_in_bounded_pages_without_live_texts(client: Any) -> None:
    name = "traces/step_000001.jsonl:2"
    head = client.get(f"/{TOKEN}/api/trace", params={"name": name}).json()
    assert len(head["pages"]) > 3
    assert head["chunks"] == 5
    pages = [
        client.get(f"/{TOKEN}/api/page", params={"name": name, "n": n}).text
        for n in range(len(head["pages"]))
    ]
    shown = "".join([head["head"], *pages])
    assert max(page.count("<i ") for page in pages) <= 1200
    assert shown.count("<i ") == 5 * 900 + 4 * 2
    assert shown.count("context reset</b>") == 4
    for live in ("<script", "\x1b", "\u202e"):
        assert live not in shown
    assert "&lt;script&gt;" in shown
    assert client.get(f"/{TOKEN}/api/page", params={"name": name, "n": 99}).status_code == 404


def test_a_card_has_verdict_and_map_without_live_texts(client: Any) -> None:
    name = "traces/step_000001.jsonl:2"
    page = client.get(f"/{TOKEN}/api/card", params={"name": name}).text
    assert "✕ wrong" in page
    assert page.count("<g data-chunk") == 5
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[2J" in page  # the gold answer
    assert "<script" not in page
    assert client.get(f"/{TOKEN}/api/card", params={"name": "none:1"}).status_code == 404


def test_a_list_of_a_problem_has_as_many_rows_as_asked(client: Any) -> None:
    whole = client.get(f"/{TOKEN}/api/list").json()
    part = client.get(f"/{TOKEN}/api/list?rows=1&offset=1").json()
    assert (part["page"], part["total"]) == (1, 2)
    assert part["rows"] == whole["rows"][1:]
    group = whole["rows"][0]["group"]
    assert client.get(f"/{TOKEN}/api/list", params={"group": group}).json()["total"] == 1
    assert client.get(f"/{TOKEN}/api/list?rows=x").status_code == 400


def test_an_export_holds_the_chosen_traces_and_no_script(client: Any) -> None:
    names = [("name", f"traces/step_000001.jsonl:{n}") for n in (1, 2)]
    answer = client.get(f"/{TOKEN}/api/export", params=names)
    assert "attachment" in answer.headers["content-disposition"]
    assert answer.text.count('<article class="trace">') == 2
    assert answer.text.count('<li class="card">') == 2
    assert "<script" not in answer.text


def test_a_trace_of_a_file_that_went_is_an_error_in_words(client: Any, run: Path) -> None:
    (run / "traces/step_000001.jsonl").unlink()
    answer = client.get(f"/{TOKEN}/api/trace", params={"name": "traces/step_000001.jsonl:1"})
    assert answer.status_code == 410
    assert "cannot be read any more" in answer.json()["error"]


def test_a_report_is_shown_without_access_to_the_viewer(client: Any, run: Path) -> None:
    assert client.get(f"/{TOKEN}/report").status_code == 404
    (run / "report.html").write_text("<h1>report</h1>")
    policy = client.get(f"/{TOKEN}/report").headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts;")
    assert "allow-same-origin" not in policy


def test_a_report_that_is_a_link_out_is_not_shown(client: Any, run: Path) -> None:
    (run / "report.html").symlink_to(run.parent / "secret.txt")
    assert client.get(f"/{TOKEN}/report").status_code == 404


def test_the_page_of_the_answer_is_found() -> None:
    class Letters:
        def decode(self, ids: Any) -> str:
            return "".join(map(chr, ids))

    text = "x" * 3000 + "</think>42."
    chunk = Chunk((1,), tuple(map(ord, text)), (), StopReason.EOS)
    view = TraceView(
        Trace((1,), (chunk,), TraceStop.COMPLETED), token_texts(Letters()), answer=(3008, 3010)
    )
    opened = OpenTrace(view)
    page = opened.head("0")["answer_page"]
    assert 'answer" title' in opened.page(page)


def test_stored_values_of_tokens_are_shown_and_wrong_ones_left_out(
    viewer: Viewer, run: Path
) -> None:
    row = viewer.index.rows[0]
    assert viewer.opener.open(row).shades == ["logprob"]
    (run / "token_stats").mkdir()
    good = {"trainer_logprobs": [-0.2] * 6, "entropies": [1.5] * 6}
    lines = [
        {"trace": 1, "chunk": 0, **good},
        {"trace": 0, "chunk": 0, **good},
        {"trace": 0, "chunk": 0, **good, "entropies": [9.0] * 6},  # of a later step on the batch
        {"trace": 0, "chunk": 1, "trainer_logprobs": [1], "entropies": "x"},
        {"trace": 0, "chunk": 99, **good},
    ]
    file = run / "token_stats/step_000001.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    file.write_text(text + '{"trace": 0, broken\n')
    view = viewer.opener.open(row)
    assert view.shades == ["logprob", "entropy", "difference"]
    assert view.value("entropy", 0, 3) == 1.5
    assert view.value("difference", 0, 3) == pytest.approx(0.1)
    assert view.value("entropy", 1, 0) is None
    viewer.index.refresh()
    assert not viewer.index.damaged


def test_a_port_in_use_is_a_sentence() -> None:
    with open_socket(0) as first, pytest.raises(ConfigError, match="leave out --port"):
        open_socket(first.getsockname()[1])


# -- the command -------------------------------------------------------------------------------


def test_text_prints_a_trace(run: Path, capsys: Any) -> None:
    assert main(["view", str(run), "--text"]) == 0
    printed = capsys.readouterr().out
    assert "---- context reset: 4 of 6 tokens dropped, 2 carried over ----" in printed
    assert "\x1b" not in printed


def test_export_writes_the_chosen_trace(run: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "one.html"
    name = "traces/step_000001.jsonl:2"
    assert main(["view", str(run), "--export", str(file), "--trace", name]) == 0
    assert "Chunk 5 of 5" in file.read_text()
    assert "1 trace\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--export", "x.pdf"], "--export writes .html or .eval"),
        (["--text", "--trace", "nothing:1"], "there is no trace 'nothing:1'"),
        (["--trace", "x:1"], "add one of them"),
    ],
)
def test_mistakes_are_sentences(run: Path, capsys: Any, more: list[str], said: str) -> None:
    assert main(["view", str(run), *more]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_without_traces_is_a_sentence(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    for more in ([], ["--text"]):
        assert main(["view", str(tmp_path / "empty"), *more]) == 2
        assert "holds no traces" in capsys.readouterr().err
    assert main(["view", str(tmp_path / "absent")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_folder_that_may_not_be_read_is_a_sentence(
    run: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root, as in containers, may read everything; so the refusal is made here.
    monkeypatch.setattr("os.access", lambda path, mode: mode == os.F_OK)
    for more in ([], ["--text"]):
        assert main(["view", str(run), *more]) == 2
        assert "cannot be read: permission denied" in capsys.readouterr().err
