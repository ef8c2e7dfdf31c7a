"""The report says what config.json and metrics.jsonl say, needs nothing else, and can be read without seeing it."""

import json
import math
import os
import re
import shutil
import signal
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.train.tasks import QUICK, metrics, run
from train.report.__main__ import main
from train.report.charts import bar_chart, line_chart, number, thin
from train.report.sections import duration, size
from train.trainer import Trainer

REWIRED = ("--rewire", "random", "--rewire-every", "5")
VOID = {"meta", "link"}


class Page(HTMLParser):
    """The page's tables by caption, charts by title, and text. A tag that is not closed in its place is an error."""

    def __init__(self, html):
        super().__init__()
        self.tables, self.charts, self.text, self.ids, self.named_by, self.links = {}, {}, "", [], [], []
        self.open, self.caption, self.row, self.chart = [], None, None, None
        assert html.startswith("<!doctype html>")
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.named_by += attributes.get("aria-labelledby", "").split()
        self.links += [attributes[name] for name in ("href", "src", "srcset", "xlink:href") if name in attributes]
        self.begin(tag)
        if tag not in VOID:
            self.open.append(tag)

    def begin(self, tag):
        assert tag not in ("script", "img", "iframe")
        if tag == "tr":
            self.row = []
        elif tag in ("td", "th"):
            self.row.append("")
        elif tag == "svg":
            self.chart = {"path": 0, "rect": 0, "circle": 0}
        elif tag in ("path", "rect", "circle"):
            self.chart[tag] += 1

    def handle_startendtag(self, tag, attributes):
        assert "svg" in self.open
        self.begin(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "tr" and self.caption is not None:
            self.tables[self.caption].append(self.row)
        elif tag == "table":
            self.caption = None

    def handle_data(self, data):
        where = self.open[-1] if self.open else None
        if where == "style":
            assert "url(" not in data
            assert "@import" not in data
            return
        self.text += data
        if where == "caption":
            self.caption = data
            assert data not in self.tables
            self.tables[data] = []
        elif where in ("td", "th") and self.row:
            self.row[-1] += data
        elif where == "title" and self.open[-2:] == ["svg", "title"]:
            self.charts[data] = self.chart


def page(path):
    html = path.read_text()
    found = Page(html)
    assert len(set(found.ids)) == len(found.ids)
    assert set(found.named_by) <= set(found.ids)
    assert found.links == ["data:,"], "nothing is fetched, not even an icon"
    assert "http" not in html
    assert set(found.charts) <= set(found.tables), "each chart has a table of its numbers"
    return found


@pytest.fixture(scope="module")
def rewired(task, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "rewired"
    assert run(task, out, *QUICK, *REWIRED, "--epochs", "3", "--dense-labels", "30%") == 0
    return out


def test_the_figures_are_those_of_the_metrics(rewired):
    found, rows = page(rewired / "report.html"), metrics(rewired)
    evaluations = [row for row in rows if row["kind"] == "eval"]
    last = evaluations[-1]
    head, (*result,) = found.tables["Results"]
    result = dict(zip(head, result, strict=True))
    assert (result["run"], result["split"], result["epoch"]) == ("rewired", "test", "3")
    for metric in ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "nDCG@5", "recall@10", "macro-F1@5", "coverage@5"):
        assert float(result[metric]) == pytest.approx(last[metric], abs=5e-5)
    head, *epochs = found.tables["P@k on test"]
    assert head == ["epoch", "P@1", "P@3", "P@5"]
    for row, shown in zip(evaluations, epochs, strict=True):
        assert [float(cell) for cell in shown] == pytest.approx([row["epoch"], row["P@1"], row["P@3"], row["P@5"]], abs=5e-5)
    losses = {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}
    shown = {int(step): float(loss) for step, loss in found.tables["Training loss"][1:]}
    assert shown == pytest.approx(losses, rel=1e-3)
    assert found.charts["Training loss"]["path"] == 1
    assert found.charts["P@k on test"] == {"path": 3, "rect": 0, "circle": 9}
    assert "finished" in found.text


def test_the_figures_of_deciles_rewiring_stages_and_memory(rewired):
    found, rows = page(rewired / "report.html"), metrics(rewired)
    deciles = [row for row in rows if row["kind"] == "eval"][-1]["deciles"]
    head, *shown = found.tables["Part in P@k"]
    for i, (decile, cells) in enumerate(zip(deciles, shown, strict=True)):
        cells = dict(zip(head, cells, strict=True))
        assert (cells["decile"], cells["labels"]) == (str(i + 1), str(decile["labels"]))
        assert cells["training texts of a label"].split("–")[0] == str(decile["texts"][0])
        for metric in ("P@1", "P@3", "P@5"):
            assert float(cells[metric]) == pytest.approx(decile[metric], rel=0.01, abs=5e-5)
    assert found.charts["Part in P@k"]["rect"] == 30

    moves = [row for row in rows if row["kind"] == "rewire"]
    assert len(moves) > 3
    survival = {int(step): float(value) for step, value in found.tables["First connections that are still there"][1:]}
    assert survival == pytest.approx({row["step"]: row["survival"] for row in moves}, abs=5e-5)
    moved = {int(step): float(value) for step, value in found.tables["Share of the connections moved at a time"][1:]}
    assert moved == pytest.approx({row["step"]: row["moved"] / row["connections"] for row in moves}, rel=0.01, abs=5e-5)

    stages = {row["stage"] for row in rows if row["kind"] == "stage"}
    shown = {cells[0]: cells[1:] for cells in found.tables["Time and memory by stage"][1:]}
    assert shown.keys() == stages
    seconds = sum(row["seconds"] for row in rows if row.get("stage") == "training")
    assert shown["training"] == [
        duration(seconds),
        size(1e6 * max(row["peak_memory_mb"] for row in rows if row.get("stage") == "training")),
    ]

    config = json.loads((rewired / "config.json").read_text())
    table = {cells[0]: cells for cells in found.tables["Memory of the head of rewired"]}
    for i, block in enumerate(config["model"]["blocks"]):
        dense = block["labels"] * (64 + 1) * 4
        assert table[f"block {i}: {block['connectivity']}"][-3:] == [
            size(block["bytes"]), size(dense), f"{block['bytes'] / dense:.1%}",
        ]  # fmt: skip
    # The encoder gives 32 numbers, the intermediate layer turns them into 64.
    together, dense = config["model"]["head_bytes"] + (32 + 1) * 64 * 4, 40 * (32 + 1) * 4
    assert table["with intermediate layer; dense without it"][-3:] == [size(together), size(dense), f"{together / dense:.1%}"]


def test_settings_that_differ_from_their_defaults_come_first(rewired):
    found = page(rewired / "report.html")
    changed = {row[0]: row[1:] for row in found.tables["Settings that differ from their defaults"][1:]}
    others = {row[0]: row[1:] for row in found.tables["Settings left at their defaults"][1:]}
    assert changed["--epochs"] == ["3", "5"]
    assert changed["--dense-labels"] == ["0.3", "0.02"]
    assert others["--seed"] == ["0", "0"]
    settings = json.loads((rewired / "config.json").read_text())["settings"]
    assert len(changed) + len(others) == len(settings) - len({"out", "cache"})


def test_it_is_made_again_from_two_files(rewired, tmp_path, capsys):
    copy = tmp_path / "rewired"
    copy.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(rewired / name, copy)
    assert main([str(copy)]) == 0
    assert capsys.readouterr().out.strip() == str(copy / "report.html")
    assert (copy / "report.html").read_text() == (rewired / "report.html").read_text()


def test_runs_are_compared_side_by_side(task, rewired, tmp_path, capsys):
    one = tmp_path / "one"
    assert run(task, one, *QUICK, "--epochs", "1", "--rewire", "off") == 0
    alone = page(one / "report.html")
    assert alone.charts["P@k on test"] == {"path": 3, "rect": 0, "circle": 3}, "an epoch is a point"
    assert "Rewiring" not in alone.text

    with pytest.raises(SystemExit, match="2"):
        main([str(rewired), str(one)])
    assert "several runs need --out" in capsys.readouterr().err
    out = tmp_path / "both.html"
    assert main([str(rewired), str(one), "--out", str(out)]) == 0
    found = page(out)
    assert [row[0] for row in found.tables["Results"]] == ["run", "rewired", "one"]
    assert found.tables["Results"][2][1:] == alone.tables["Results"][1][1:]
    assert found.tables["P@1"][0] == ["epoch", "rewired", "one"]
    assert [row[2] != "" for row in found.tables["P@1"][1:]] == [True, False, False], "one has an epoch only"
    assert found.charts["Training loss"]["path"] == 2
    assert found.charts["Part in P@5"]["rect"] == 20
    assert found.charts["First connections that are still there"]["path"] == 1, "the other was not rewired"
    assert {row[0]: row[1:] for row in found.tables["Settings that differ from their defaults"]}["--epochs"] == ["3", "1", "5"]


def test_runs_of_the_same_name_are_told_apart(rewired, tmp_path):
    twin = tmp_path / "rewired"
    shutil.copytree(rewired, twin)
    assert main([str(rewired), str(twin), "--out", str(tmp_path / "both.html")]) == 0
    assert [row[0] for row in page(tmp_path / "both.html").tables["Results"][1:]] == [str(rewired), str(twin)]


def test_a_run_that_was_stopped_has_a_report(task, tmp_path, monkeypatch):
    steps, real = [], Trainer._step

    def signalled(self, rows):
        steps.append(rows)
        if len(steps) == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", signalled)
        assert run(task, tmp_path / "run", *QUICK, "--epochs", "2") == 130
    found = page(tmp_path / "run" / "report.html")
    assert "not finished: step 12, epoch 1 of 2" in found.text
    assert "Training loss" in found.charts
    assert not any("P@k" in title for title in found.charts)
    assert run(None, tmp_path / "run", "--resume") == 0
    assert "not finished" not in page(tmp_path / "run" / "report.html").text


def test_names_are_text_and_no_markup(rewired, tmp_path):
    odd = tmp_path / '<b>R&D "1"'
    shutil.copytree(rewired, odd)
    assert main([str(odd)]) == 0
    found = page(odd / "report.html")
    assert found.tables["Results"][1][0] == '<b>R&D "1"'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "config.json: missing: no run is there"),
        ("config.json", "{", "config.json: cannot be read"),
        ("config.json", '{"settings": {}, "data": {"sha256": {}}}', "config.json: no model in it"),
        ("metrics.jsonl", '{"kind": "train", "step": 1}\n[3]\n', "metrics.jsonl:2: not a row that train writes"),
        ("metrics.jsonl", '{"kind": "train", "step": 1}\n{"ki\n{}\n', "metrics.jsonl:2: not a row that train writes"),
        ("metrics.jsonl", '{"kind": "train"}\n', "metrics.jsonl:1: not a row that train writes"),
    ],
)
def test_what_is_no_run_is_named(rewired, tmp_path, capsys, name, content, message):
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in ("config.json", "metrics.jsonl"):
        shutil.copy(rewired / file, bad)
    if content is None:
        (bad / name).unlink()
    else:
        (bad / name).write_text(content)
    assert main([str(bad)]) == 2
    assert f"error: {bad}/{message}" in capsys.readouterr().err
    assert not (bad / "report.html").exists()


finite = st.floats(-1e6, 1e6).map(lambda value: round(value, 6))


@given(st.dictionaries(st.sampled_from("abc"), st.lists(st.tuples(st.integers(0, 10**6), finite), max_size=50), min_size=1))
def test_lines_stay_within_their_frame(series):
    chart = line_chart("title", "step", series)
    if chart is None:
        assert not any(series.values())
        return
    assert chart.names == [name for name, points in series.items() if points]
    for line in chart.lines:
        for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", line.path):
            assert chart.left - 0.1 <= float(x) <= chart.right + 0.1
            assert chart.top - 0.1 <= float(y) <= chart.bottom + 0.1
    for ticks, low, high in ((chart.x_ticks, chart.left, chart.right), (chart.y_ticks, chart.top, chart.bottom)):
        assert 1 <= len(ticks) <= 12
        assert all(low - 0.1 <= tick.at <= high + 0.1 for tick in ticks)
        assert len({tick.text for tick in ticks}) == len(ticks)


def test_numbers_that_are_not_finite_are_left_out_of_a_line():
    chart = line_chart("loss", "step", {"loss": [(1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0)]})
    assert chart.lines[0].path.count("L") == 1
    assert [row[0] for row in chart.table.rows] == ["1", "4"]
    assert line_chart("loss", "step", {"loss": [(1, math.nan)]}) is None


def test_bars_are_as_high_as_their_numbers():
    chart = bar_chart("title", "decile", ["1", "2"], {"a": [0.2, 0.4], "b": [None, 0.1]}, {"labels": ["3", "4"]})
    heights = [bar.height for bar in chart.bars]
    assert heights[1] == pytest.approx(2 * heights[0])
    assert heights[2] == pytest.approx(heights[0] / 2)
    assert all(bar.y + bar.height == pytest.approx(chart.bottom) for bar in chart.bars)
    assert chart.table.rows == [["1", "3", "0.2000", ""], ["2", "4", "0.4000", "0.1000"]]
    assert bar_chart("title", "decile", ["1"], {"a": [None]}, {}) is None


def test_numbers_read_well():
    assert [number(value) for value in (None, 0, 12345, 0.43119, 12.3456, 1234.56, 0.0000251)] == [
        "", "0", "12,345", "0.4312", "12.35", "1,234.6", "2.51e-05",
    ]  # fmt: skip
    assert [size(n) for n in (999, 1000, 12_340_000, 768_000_000, 1.5e9)] == [
        "999 B",
        "1.00 kB",
        "12.3 MB",
        "768 MB",
        "1.50 GB",
    ]
    assert [duration(seconds) for seconds in (1.25, 245, 11_240)] == ["1.2 s", "4 min 5 s", "3 h 7 min"]
    assert thin(list(range(100)), 5) == [0, 24, 49, 74, 99]
    assert thin([1, 2], 5) == [1, 2]
