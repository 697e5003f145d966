import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import yaml
from markupsafe import Markup

from stp_ray.artifacts import Store
from stp_ray.elastic.subnet import Subnet
from stp_ray.errors import StorageError
from stp_ray.report import (
    Summary,
    accuracy_against_macs,
    architecture_picture,
    page,
    plots,
    render,
    unequal_epochs,
    with_space,
    write_report,
)
from stp_ray.report.architecture import drawing
from stp_ray.report.sides import changed, classes
from stp_ray.report.spending import spending

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Collects tags, text and attributes, and fails on tags that do not close."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.attributes, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_well_formed_and_asks_nobody(text):
    parsed = Page(text)
    assert not {"script", "link", "iframe"} & set(parsed.tags)
    for name, value in parsed.attributes:
        if name in {"src", "href", "xlink:href", "action"}:
            assert value.startswith(("#", "data:")), (name, value)
    bare = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert not re.findall(r"url\((?!#)|@import|<link|<base", bare)
    outside = set(re.findall(r"https?://[^\s\"'<&]+", bare))
    assert outside <= {"https://evil.example/x"}  # text of the configuration, escaped


def test_user_text_is_escaped(text):
    assert "<script>alert" not in text and "&lt;script&gt;" in text
    assert "<img src=https" not in text and "cat &lt;1&gt;" in text


def test_budgets_come_first_with_how_much_smaller_faster_and_better(text, summary):
    first = text[: text.index("<svg")]
    for budget, entry in summary["budgets"].items():
        assert f"budget {budget}" in first
        assert f"{summary['macs'] / entry['macs']:.1f}<small>×" in first
        assert f"{entry['top1']:.2f}<small> %" in first
        assert f"{entry['retention_dense']:.1f} % kept" in first
        assert f"−{98 - entry['top1']:.2f} points: dense has 98.00" in first
    assert first.count("3.5<small>×") == 2  # 1.75 ms / 0.5 ms
    assert "1 h 2 min" in first


def test_a_notebook_shows_every_network_of_a_run(summary):
    summary["budgets"]["0.15"]["control_top1"] = 91.25
    shown = Summary(summary)._repr_html_()
    Page(shown)
    assert "<script>" not in shown and "&lt;script&gt;" in shown
    assert shown.count(f"{summary['budgets']['0.15']['retention_dense']:.2f}") == 1
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td>", shown)
    assert rows == [
        ("dense, trained alone", "98.00"),
        ("main network", "97.50"),
        ("pruned, 0.5", "97.31"),
        ("pruned, 0.15", "96.12"),
        ("same shape from scratch, 0.15", "91.25"),
    ]
    assert f"<td>{summary['budgets']['0.5']['macs']:,}</td>" in shown


def test_a_control_stands_below_its_pruned_network(summary, config, candidates, curves):
    summary["budgets"]["0.15"]["control_top1"] = 91.25
    shown = render(summary, config, candidates, curves)
    rows = re.findall(r'<tr><th scope="row">(.*?)</tr>', shown)
    (place,) = [i for i, row in enumerate(rows) if row.startswith("same shape from scratch, 0.15")]
    assert rows[place - 1].startswith("pruned, 0.15")
    assert "91.25" in rows[place] and "96.12" not in rows[place]


def test_dark_light_and_phone(text):
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    svgs = re.findall(r"<svg[^>]*>", text)
    # accuracy, front, two losses, one accuracy over training, two of the sparsity
    assert len(svgs) == 7
    for opening in svgs:
        assert "viewBox" in opening and "width=" not in opening and "aria-label" in opening
    assert "mathdefault" not in text and "font-family:" not in text[text.index("<svg") :]
    assert "currentColor" in text and plots._FOREGROUND not in text
    ids = [value for name, value in Page(text).attributes if name == "id"]
    referenced = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", text))
    assert referenced and referenced <= set(ids)


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("color", [*plots.PALETTE, plots.FAINT])
def test_series_colours_are_visible_on_both_pages(color):
    for background in ("#ffffff", "#14171c"):
        high, low = sorted((luminance(color), luminance(background)), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 3


def test_the_network_is_drawn_layer_by_layer_in_its_own_order(space, candidates):
    table = with_space(candidates, space, ["", "stem", "block", "block.inner"])
    found = drawing(
        table,
        {
            "a": {"subnet": '{"dropped": [], "widths": {"stem": 4, "block.inner": 16}}'},
            "b": {"subnet": '{"dropped": ["block"], "widths": {"stem": 16, "block.inner": 8}}'},
        },
    )
    # The block's last layer writes into the stem's stream, and goes with the block.
    assert [row["layer"] for row in found["rows"]] == ["stem", "block.inner", "block.last"]
    stem, inner, last = found["rows"]
    assert [cell["width"] for cell in stem["cells"]] == [4, 16]
    assert [cell["share"] for cell in stem["cells"]] == [25, 100]
    assert [row["span"] for row in found["rows"]] == [50, 100, 50]
    assert inner["cells"][0]["width"] == 16 and not inner["cells"][0]["dropped"]
    assert inner["cells"][1]["dropped"] and last["cells"][1]["dropped"]
    assert last["cells"][0]["width"] == 4
    assert found["dropped"] == {"a": [], "b": ["block"]}


def test_the_drawing_is_on_the_page(text):
    layers = re.findall(r'<th scope="row" title="(.*?)"', text)
    assert sorted(layers) == ["block.inner", "block.last", "stem"]
    assert "Architecture before and after" in text


def test_a_subnet_that_was_cut_down_to_its_budget_is_drawn(
    tmp_path, summary, config, candidates, monkeypatch
):
    cut = Subnet({"stem": 4, "block.inner": 8}, frozenset({"block"}))
    summary["budgets"]["0.5"]["subnet_id"] = cut.id
    scored = candidates.filter(pc.field("subnet_id") != cut.id)
    store = Store(tmp_path / "run")
    store.write_json("summary.json", summary)
    store.write_json("config.json", config)
    store.write_table("explore/candidates.parquet", scored)
    store.write_bytes("budget-0.5/subnet.json", f"{cut.to_json()}\n".encode())
    write_report(store)
    text = store.read_bytes("report.html").decode()
    assert "Budget 0.5 keeps 0 of 1 residual blocks; dropped: block." in text
    drawn = []
    monkeypatch.setattr(plots, "architecture_png", lambda found: drawn.append(found) or b"")
    assert architecture_picture(store) == b""
    assert drawn[0]["budgets"] == ["0.5", "0.15"]
    assert [cells[0]["width"] for cells in (row["cells"] for row in drawn[0]["rows"])] == [4, 0, 0]


def test_classes_show_what_they_lost_and_won(text, predictions):
    found = classes(predictions)
    cat, dog = found["rows"]
    assert (cat["images"], dog["images"]) == (3, 1)
    assert cat["before"] == pytest.approx(200 / 3) and dog["before"] == 0
    assert cat["cells"][0]["change"] == pytest.approx(-100 / 3)
    assert dog["cells"][0]["change"] == 100
    assert found["largest"] == 100
    assert "the dense network trained alone" in text


def test_of_many_classes_those_that_changed_most_are_shown(predictions):
    rows = [{"label": i % 40, "before": i % 40, "after": i % 40, "image": None} for i in range(80)]
    rows[3]["after"] = rows[43]["after"] = rows[9]["after"] = 0
    names = {"class_names": json.dumps([f"c{i}" for i in range(40)])}
    found = classes({"0.5": pa.Table.from_pylist(rows).replace_schema_metadata(names)})
    assert len(found["rows"]) + found["left_out"] == 40 and found["left_out"] > 0
    assert [row["name"] for row in found["rows"]][:2] == ["c3", "c9"]


def test_images_that_changed_sides(text, predictions):
    both = changed(predictions["0.15"])
    assert (both["lost"]["count"], both["won"]["count"]) == (1, 1)
    (lost,) = both["lost"]["images"]
    assert (lost["label"], lost["after"]) == ("cat <1>", "dog")
    assert text.count("<img ") == 2 and 'alt="cat &lt;1&gt;, taken for dog"' in text


def test_runtimes_and_spending(text, stages):
    assert "ONNX Runtime, 0.15" in text and "<td>0.25</td>" in text and "2.0e-07" in text
    found = spending(stages, price=36.0)
    assert [row["share"] for row in found["rows"]] == [75, 25]
    assert found["total"]["money"] == pytest.approx(2.4)
    assert spending(stages, None)["total"]["money"] is None
    assert "2.40" in text and "Money is not shown" not in text and spending({}, 1.0) is None


def test_a_subnet_counts_once_with_its_best_score(candidates):
    rows = page._best_fidelity(candidates)
    assert len(rows) == candidates.num_rows - 1
    twice = candidates.to_pylist()[0]["subnet_id"]
    assert [row["score"] for row in rows if row["subnet_id"] == twice] == [0.123]


@pytest.mark.parametrize("tuned", [True, False])
def test_scores_of_tuned_candidates_are_drawn_apart_and_make_the_front(
    summary, candidates, tuned, monkeypatch
):
    drawn = {}

    def front_svg(candidates, front, chosen):
        drawn.update(front=front, again=candidates.get((25, True)))
        drawn.update(points=candidates[0, False])
        assert list(candidates) == sorted(candidates)
        return Markup("")

    monkeypatch.setattr(page.plots, "front_svg", front_svg)
    rows = candidates.to_pylist()
    table = candidates if tuned else pa.Table.from_pylist(rows[:-1]).drop_columns("steps")
    render(summary, {}, table, {})
    assert len(drawn["points"]) == len(rows) - 1 - tuned
    assert drawn["again"] == ([(rows[-1]["macs"], 0.123)] if tuned else None)
    assert (drawn["front"] == drawn["again"]) == tuned


def test_scores_on_all_images_are_drawn_apart_and_make_the_front(summary, candidates, monkeypatch):
    rows = candidates.to_pylist()[:-1]
    again = {**rows[-1], "images": 0, "score": 2.0}  # worse than others on some of the images
    svg = plots.front_svg

    def front_svg(candidates, front, chosen):
        assert list(candidates) == [(0, False), (0, True)]
        assert front == candidates[0, True] == [(again["macs"], 2.0)]
        return svg(candidates, front, chosen)

    monkeypatch.setattr(page.plots, "front_svg", front_svg)
    text = render(summary, {}, pa.Table.from_pylist([*rows, again]), {})
    assert f"{len(rows) - 1} candidates" in text and "1 on all images" in text


def test_the_front_holds_what_nothing_beats():
    assert page._front([(3, 1.0), (1, 2.0), (2, 2.5), (2, 1.5), (4, 1.0)]) == [
        (1, 2.0),
        (2, 1.5),
        (3, 1.0),
    ]


def test_curves_skip_holes_and_stay_small(curves):
    x_name, series = page._series(curves["supernet"])
    assert x_name == "step"
    assert set(series) == {"loss", "kl", "top1", "kept_norm", "dropped_norm", "ratio"}
    assert len(series["loss"]) <= page._MOST_POINTS
    assert len(series["top1"]) == 10
    assert series["top1"][-1] == (999.0, 50.0 + 999 / 25)


def test_a_run_without_dense_baseline_latency_or_history_still_reports(summary, config, stages):
    summary["dense_top1"] = None
    for entry in summary["budgets"].values():
        entry.update(retention_dense=None, latency_ms=None, dense_latency_ms=None)
    empty = pa.table({"macs": pa.array([], pa.int64()), "score": pa.array([], pa.float64())})
    text = render(summary, {**config, "cluster": {}}, empty, {}, stages=stages)
    Page(text)
    assert "not measured" in text and "Money is not shown" in text
    shown = text[text.index("<body>") :]
    for word in ("faster", "Training", "Architecture", "changed sides", "Other runtimes"):
        assert word not in shown
    assert "main has 97.50" in text


def test_a_card_says_how_a_latency_budget_was_met(summary, config, candidates):
    assert "latency budget" not in render(summary, config, candidates, {})
    for entry in summary["budgets"].values():
        entry["measured"] = {"latency_ms": 1.234, "limit_ms": 1.25, "where": "1 CPU thread"}
    text = render(summary, config, candidates, {})
    Page(text)
    assert "latency budget" in text and "of at most 1.25; 1 CPU thread" in text


@pytest.mark.parametrize(
    ("baseline", "begun", "told"),
    [
        (None, False, None),
        (7, False, None),  # 3 + 4
        (6, False, "for 6 epochs; the weights of the pruned one have seen 7."),
        (7, True, "for 7 epochs, from which the pruned one started; the weights of the pruned one "
                  "have seen 14."),
        (0, False, "has the weights that were given; the pruned one started from them and was "
                   "trained for 7 epochs more, as long as its shape from scratch where there is "
                   "one."),
    ],
)  # fmt: skip
def test_a_dense_network_of_other_epochs_is_told_of(
    summary, config, candidates, baseline, begun, told
):
    config = {
        **config,
        "baseline": None if baseline is None else {"epochs": baseline},
        "supernet": {"from_baseline": begun, "optimisation": {"epochs": 3}},
        "finalize": {"optimisation": {"epochs": 4}},
    }
    *sentences, main = unequal_epochs(config)
    seen = 14 if begun else 7
    assert f"before the last 4 of the {seen} epochs that the weights of the pruned one" in main
    text = render(summary, config, candidates, {})
    if told is None:
        assert sentences == [] and "retention is against" not in text
    else:
        (sentence,) = sentences
        assert sentence.endswith(told)
    for sentence in (*sentences, main):
        assert text.index('id="cost"') < text.index(sentence) < text.index("<table>")


def test_nothing_is_said_of_epochs_that_nobody_wrote_down():
    assert unequal_epochs({"baseline": {"epochs": 3}, "supernet": {}, "finalize": None}) == []


def test_a_latency_is_told_with_its_threads(summary, config, candidates):
    assert "that finished the run." in render(summary, config, candidates, {})
    text = render(summary, config, candidates, {}, environment={"latency_threads": 4})
    assert "that finished the run, threads: 4." in text


@pytest.mark.parametrize(
    ("expansion", "told", "kd"),
    [
        ({}, "the main network teaches an expanded network, and", "main network → expanded"),
        ({"rungs": 0}, "the main network teaches the chosen one", None),
        ({"main": "drop"}, "an expanded network teaches the chosen one", None),
        ({"main": "drop", "rungs": 2}, "an expanded network teaches", "expanded → expanded"),
    ],
)
def test_a_ladder_says_who_teaches_whom(summary, config, candidates, expansion, told, kd):
    config = {**config, "finalize": {"expansion": expansion}}
    losses = {"ce": [2.0, 1.0], "kd": [0.0, 0.0], "kd_target": [0.5, 0.25]}
    if kd is not None:
        losses["kd"] = [1.0, 0.0]
    ladder = pa.table({"epoch": [0, 1], **losses})
    text = render(summary, config, candidates, {"budget-0.15": ladder})
    assert f"On the ladder {told}" in text
    teacher = "main network" if expansion.get("rungs") == 0 else "expanded"
    assert f"{teacher} → chosen" in text
    assert set(re.findall(r"\w[\w ]* → expanded", text)) == ({kd} if kd else set())


def test_a_chosen_network_that_goes_on_alone_has_no_teacher(summary, config, candidates):
    config = {**config, "finalize": {"expansion": {"main": "drop", "p_start": 0, "p_end": 0}}}
    losses = {"ce": [2.0, 1.0], "kd": [0.0, 0.0], "ce_target": [2.0, 1.0], "kd_target": [0.0, 0.0]}
    ladder = pa.table({"epoch": [0, 1], **losses})
    text = render(summary, config, candidates, {"budget-0.15": ladder})
    assert "On the ladder the chosen network goes on alone, on the labels." in text
    assert "labels → chosen" in text
    assert not re.search(r"(main network|expanded) → (chosen|expanded)", text)


def test_missing_columns_are_named(summary, config):
    with pytest.raises(StorageError, match="score"):
        render(summary, config, pa.table({"macs": [1]}), {})


def test_configuration_and_environment_are_shown(text, config):
    shown = re.findall(r"<pre[^>]*>(.*?)</pre>", text, re.DOTALL)
    assert yaml.safe_load(shown[0].replace("&lt;", "<").replace("&gt;", ">")) == config
    assert "torch" in shown[1]


def test_report_of_a_finished_run(tmp_path, summary, config, candidates, curves):
    store = Store(tmp_path / "run")
    store.write_json("summary.json", summary)
    store.write_json("config.json", config)
    store.write_table("explore/candidates.parquet", candidates)
    with pytest.raises(StorageError, match="candidates"):
        (tmp_path / "run/explore/candidates.parquet").rename(tmp_path / "moved")
        write_report(store)
    (tmp_path / "moved").rename(tmp_path / "run/explore/candidates.parquet")
    store.write_table("budget-0.15/metrics.parquet", curves["supernet"])
    store.write_table("supernet/metrics.parquet", curves["supernet"])
    uri = write_report(store)
    assert uri == f"{store.uri}/report.html"
    text = store.read_bytes("report.html").decode()
    assert "Architecture before and after" in text  # the space survived the Parquet file
    assert text.index('aria-label="supernet"') < text.index('aria-label="ladder to 0.15"')
    assert "Environment" not in text


def test_pictures_stand_alone(summary):
    svg = accuracy_against_macs(summary)
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert b"prefers-color-scheme" in svg and b"96.1 %" in svg
    assert svg == accuracy_against_macs(summary)  # the same bytes every time
    assert accuracy_against_macs(summary, format="png").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("count", "expected"),
    [(950, "950"), (590_000, "590 k"), (41_300_000, "41.3 M"), (4_089_184_256, "4.09 G")],
)
def test_short_counts(count, expected):
    assert plots.short(count) == expected
