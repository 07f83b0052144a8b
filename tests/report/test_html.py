"""The page as text: escaped, complete, and without a single address to load from."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_factory import defended, picture, png, results, row

pytest.importorskip("altair", reason='the page needs pip install "ironclip[report]"')
pytest.importorskip("vl_convert", reason='the page needs pip install "ironclip[report]"')
pytest.importorskip("jinja2", reason='the page needs pip install "ironclip[report]"')

from ironclip.report import charts, html, write_all, write_html
from ironclip.report.pairs import matrices
from ironclip.report.summary import blocks

NASTY = '<script>alert("x")</script>&\'"'
VOID = {"meta", "link", "img", "br", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.texts: list[str] = []
        self.scripts: dict[str, str] = {}
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] == "script":
            name = self.tags[-1][1].get("id") or ""
            self.scripts[name] = self.scripts.get(name, "") + data
        elif self.stack and self.stack[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str, **attrs: str) -> list[dict[str, str | None]]:
        wanted = {k.strip("_").replace("_", "-"): v for k, v in attrs.items()}
        return [a for t, a in self.tags if t == tag and wanted.items() <= a.items()]


@pytest.fixture(scope="module")
def full() -> dict:
    found = results(
        defended("none", 62.5, 3.0, 0.0, title="undefended"),
        defended("tecoa", 40.0, 30.5, 28.125, title="TeCoA"),
        defended("ttc", 60.0, 45.0, 3.125, title=f"TTC {NASTY}", flags=["dynamic"]),
        defended("clipure", 60.0, 44.0, 40.625, title="CLIPure", flags=["zero-grad"], unreliable=True),
        defended("rtpt", 60.0, 50.0, None, title="R-TPT"),
        notes=[f"note {NASTY}"],
        gallery=[picture("ttc", class_name=NASTY), picture("tecoa", seen_png=None)],
        errors=[{"vlm": "lite", "data": "photos", "defense": "aom", "error": NASTY, "traceback": NASTY}],
        pairs=[
            {"vlm": "lite", "data": "photos", "eps": "1/255", "a": "TECOA()", "b": "TTC()", "metric": "R*",
             "diff": 25.0, "diff_lo": 14.1, "diff_hi": 36.0, "p": 0.0001, "p_holm": 0.0002, "verdict": "a"},
        ],
    )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def text(full: dict) -> str:
    return html.render(full)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_nothing_is_loaded_from_a_network(text: str, page: Page) -> None:
    for _, attrs in page.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            value = attrs.get(name) or ""
            assert value.startswith(("#", "data:")) or not value, (name, value)
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    policy = page.all("meta", http_equiv="Content-Security-Policy")[0]["content"]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "unsafe-eval" not in policy


def test_names_cannot_become_markup(page: Page, text: str) -> None:
    assert NASTY in page.text  # as text, three times or more
    assert page.text.count('alert("x")') >= 4
    assert '<script>alert("x")' not in text
    assert set(page.scripts) == {"images", "specs", ""}
    assert NASTY in json.dumps(json.loads(page.scripts["specs"]), ensure_ascii=False).replace('\\"', '"')


def test_unreliable_rows_print_no_robust_number(page: Page) -> None:
    assert page.text.count("unreliable") >= 3
    assert "40.6" not in page.text
    assert "44.0" not in page.text
    assert "CLIPure" in page.text


def test_board_has_numbers_intervals_and_sort_keys(page: Page) -> None:
    assert "28.1" in page.text
    assert "18.6\u201340.1" in page.text
    assert {"28.125", "3.125"} <= {a.get("data-v") for t, a in page.tags if t == "td"}
    heads = page.all("th")
    assert [h for h in heads if h.get("aria-sort") == "descending"]
    assert "n = 64, quick: 10 steps, EOT 2, 4 fresh draws" in page.text


def test_raised_flags_are_explained_and_linked(page: Page) -> None:
    linked = {(a.get("href") or "")[1:] for a in page.all("a") if "tag" in (a.get("class") or "")}
    assert linked == {"flag-dynamic", "flag-zero-grad"}
    assert linked <= {a.get("id") for _, a in page.tags}
    assert "The attacker had no usable gradient" in page.text


def test_errors_command_and_recipe_are_there(page: Page) -> None:
    for part in ("Cells that failed", "aom", "ironclip bench --vlm lite", "photos-224-bicubic", "TECOA()"):
        assert part in page.text


def test_each_picture_is_in_the_page_once(page: Page, text: str, full: dict) -> None:
    images = json.loads(page.scripts["images"])
    assert len(images) == 4  # two entries share clean, adv and diff; one has seen
    for entry in full["gallery"]:
        assert text.count(entry["clean_png"]) == 1
    names = {a["data-image"] for _, a in page.tags if a.get("data-image")}
    assert names == set(images)
    cards = page.all("article")
    assert len(cards) == 2
    assert [len([a for _, a in page.tags if a.get("data-view") == v]) for v in ("clean", "adv", "diff", "seen")] == [
        2,
        2,
        2,
        1,
    ]


def test_gallery_that_is_too_large_is_cut_evenly_and_says_so() -> None:
    entries = [
        picture(d, sample, clean_png=png((i, 0, 0)), seen_png=None)
        for d in ("ttc", "tecoa")
        for i, sample in enumerate("abc")
    ]
    size = len(entries[0]["clean_png"])
    shared = len(entries[0]["adv_png"]) + len(entries[0]["diff_png"])
    cards, images, left_out = html.gallery(entries, shared + 2 * size + 8)
    assert [(c["sample_id"], c["defense"]) for c in cards] == [
        ("a", "ttc"),
        ("a", "tecoa"),
        ("b", "ttc"),
        ("b", "tecoa"),
    ]
    assert (len(images), left_out) == (4, 2)
    assert (
        "2 of 6 pictures are left out"
        in Page(html.render(results(*PLAIN, gallery=entries), shared + 2 * size + 8)).text
    )


PLAIN = [defended("ttc", 60.0, 45.0, 3.125), defended("tecoa", 40.0, 30.5, 28.125)]


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="gallery: adv_png of sample 'a1' must be a base64 PNG"):
        html.render(results(*PLAIN, gallery=[picture("ttc", adv_png='"><script>')]))


def test_empty_and_bare_results_make_a_page() -> None:
    empty = Page(html.render(results()))
    assert "No results: every cell failed or none was run." in empty.text
    assert empty.all("table") == []
    bare = {"vlm": "lite", "data": "photos", "defense": "ttc"}
    assert "ttc" in Page(html.render({"format": 1, "rows": [bare]})).text


def test_filters_appear_only_where_there_is_a_choice(page: Page) -> None:
    assert [a["data-key"] for a in page.all("select")] == ["threat", "defense"]
    more = results(*PLAIN, defended("ttc", 60.0, 45.0, 3.1, data="shapes", eps="4/255"))
    chosen = Page(html.render(more)).all("select")
    assert [a["data-key"] for a in chosen] == ["set", "eps", "threat"]


def test_verdicts_read_from_the_row_to_the_column(full: dict) -> None:
    (matrix,) = matrices(full["pairs"], blocks(full))
    assert matrix.names[0] == "TeCoA"
    win, loss = matrix.cells[0][1], matrix.cells[1][0]
    assert (win.text, win.kind) == ("+25.0", "win")
    assert (loss.text, loss.kind) == ("-25.0", "loss")
    assert "interval -36.0 to -14.1" in loss.detail
    assert matrix.cells[0][0].kind == "none"
    tie = matrices([{**full["pairs"][0], "verdict": "tie"}], blocks(full))[0].cells[0][1]
    assert (tie.text, tie.kind) == ("tie", "tie")


def test_charts_leave_out_what_is_unreliable_or_missing(full: dict) -> None:
    figures = charts.figures(blocks(full))
    assert [f.kind for f in figures] == ["accuracy", "tradeoff"]
    curve, cloud = (json.dumps(f.spec()) for f in figures)
    assert "CLIPure" not in curve + cloud
    assert "R-TPT" in curve
    assert "R-TPT" not in cloud
    points = [p for p in figures[0].chart.data.values if p["defense"] == "TeCoA" and p["metric"] == "R*"]
    assert sorted((p["eps"], p["accuracy"]) for p in points) == [(0.0, 40.0), (1.0, 28.125)]


def test_undefended_is_grey_and_colours_do_not_depend_on_the_order(full: dict) -> None:
    made = blocks(full)
    colors = charts.palette(made)
    assert colors["undefended"] == charts.BASELINE
    assert len(set(colors.values())) == len(colors)
    specs = [f.spec() for f in charts.figures(made)]
    for spec in specs:
        scale = json.dumps(spec)
        assert colors["TeCoA"] in scale


@pytest.mark.parametrize("missing", ["altair", "vl_convert", "jinja2"])
def test_a_missing_extra_is_named(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=re.escape('type pip install "ironclip[report]"')):
        write_all(results(*PLAIN), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_write_all_writes_five_files_and_replaces_them(tmp_path: Path) -> None:
    found = results(*PLAIN)
    paths = write_all(found, tmp_path / "out")
    names = ["report.html", "results.json", "table.md", "table.tex", "table.csv"]
    assert [p.name for p in paths] == names
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(names)
    back = json.loads(paths[1].read_text())
    assert {k: v for k, v in back.items() if k != "macro"} == found
    write_all(results(), tmp_path / "out")
    assert "No results" in paths[2].read_text()


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="must have format 1"):
        write_html({"format": 7}, path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_row_of_another_norm_keeps_its_name() -> None:
    found = results({"rows": [row("ttc", eps="0.5", norm="l2"), row("ttc", eps="2", norm="l2")], "worst": []})
    assert [a["value"] for a in Page(html.render(found)).all("option")][:3] == ["", "0.5 (l2)", "2 (l2)"]
