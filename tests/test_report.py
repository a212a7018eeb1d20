"""The report, opened in a real browser: nothing is loaded, nothing complains, everything is drawn and readable."""

from __future__ import annotations

import copy
import io
import json
import math
import random
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import chromium
import pytest

from transfuse.core.errors import BadInput, MissingExtra
from transfuse.report import write_report
from transfuse.report.geometry import Box, place_labels, ticks
from transfuse.report.view import front, interval, limits, number, percent, rows_of, seconds, size

FIXTURES = Path(__file__).parent / "fixtures" / "report"
WIDTHS = {"phone": 390, "tablet": 800, "desktop": 1280}
# Per mark of the picture that is shown: its box, its label's box, the picture's box.
MARKS = """
(() => {
  const svg = [...document.querySelectorAll("svg.scatter")].filter(s => s.getBoundingClientRect().width > 0);
  const box = node => { const b = node.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
  return svg.map(s => ({picture: box(s), front: s.querySelectorAll(".front").length,
    marks: [...s.querySelectorAll(".mark")].map(m => ({carrier: m.dataset.carrier,
      shape: box(m.querySelector(".shape")), label: box(m.querySelector(".label")),
      text: m.querySelector(".label").textContent}))}));
})()
"""
# Every element with text of its own, shown, whose contrast with what is behind it is below 4.5 to 1.
FAINT = """
(() => {
  const channels = c => { const m = c.match(/[\\d.]+/g).map(Number); return [...m, 1].slice(0, 4); };
  const linear = v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = node => {
    for (let n = node; n; n = n.parentElement) {
      const c = channels(getComputedStyle(n).backgroundColor);
      if (c[3] > 0.99) return c;
    }
    return channels(getComputedStyle(document.body).backgroundColor);
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    const b = node.getBoundingClientRect();
    if (!own || !b.width || b.width < 2 || ["SCRIPT", "STYLE", "title", "desc"].includes(node.tagName)) continue;
    const s = getComputedStyle(node), ink = channels(node instanceof SVGElement ? s.fill : s.color);
    const [a, c] = [light(ink), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (c + 0.05);
    if (ratio < 4.5) found.push([node.tagName, node.className.baseVal ?? node.className, ratio.toFixed(2)]);
  }
  return found;
})()
"""
# Text cut off: a child that sticks out of the page, except inside regions that scroll.
CUT = """
(() => {
  const wide = document.documentElement.clientWidth + 1;
  return [...document.querySelectorAll("body *")].filter(n => {
    const b = n.getBoundingClientRect();
    return b.width > 1 && (b.right > wide || b.left < -1) && !n.closest(".scroll") && !n.matches(".skip");
  }).map(n => n.outerHTML.slice(0, 80));
})()
"""


@pytest.fixture(scope="module")
def browser():
    running = chromium.Chromium()
    yield running
    running.close()


@pytest.fixture(scope="module")
def sample():
    """Records and context of a comparison of 14 carriers, two of them not measured."""
    lines = (FIXTURES / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], json.loads(
        (FIXTURES / "context.json").read_text(encoding="utf-8")
    )


@pytest.fixture(scope="module")
def page(sample, tmp_path_factory):
    return write_report(*sample, tmp_path_factory.mktemp("report"))


def drawable(records):
    return [r for r in records if r["status"] == "done" and r["gap_closed"] and r["locality"]["all"]]


def overlap(a, b):
    return min(a[2], b[2]) - max(a[0], b[0]) > 0 and min(a[3], b[3]) - max(a[1], b[1]) > 0


def check_page(browser, page, records, **view):
    """What holds of every report: silent, self-contained, all marks drawn, no label over another."""
    browser.open(page, **view)
    assert browser.complaints() == []
    assert browser.requests() == [page.resolve().as_uri()]
    assert browser.run(CUT) == []
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    pictures = browser.run(MARKS)
    expected = sorted(r["carrier"] for r in drawable(records))
    if not expected:
        assert pictures == [] and "Nothing to draw" in browser.run("document.body.innerText")
        return None
    [picture] = pictures
    assert sorted(m["carrier"] for m in picture["marks"]) == expected
    frame = picture["picture"]
    for mark in picture["marks"]:
        for left, top, right, bottom in (mark["shape"], mark["label"]):
            assert right - left > 4 and bottom - top > 4, mark
            assert left >= frame[0] - 1 and right <= frame[2] + 1, mark
            assert top >= frame[1] - 1 and bottom <= frame[3] + 1, mark
    return picture


def overlapping_labels(picture):
    """Pairs of labels that overlap (3 px of a line box are air above and below the letters)."""
    labels = [
        (m["text"], (m["label"][0], m["label"][1] + 3, m["label"][2], m["label"][3] - 3))
        for m in picture["marks"]
    ]
    return [(a, b) for i, (a, x) in enumerate(labels) for b, y in labels[i + 1 :] if overlap(x, y)]


# In the browser.


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_is_whole_and_readable(browser, page, sample, width, dark):
    picture = check_page(browser, page, sample[0], width=WIDTHS[width], dark=dark)
    assert len(picture["marks"]) == 12 and picture["front"] == 1
    assert overlapping_labels(picture) == []
    for mark in picture["marks"]:  # no label hides another carrier's mark
        others = [m["shape"] for m in picture["marks"] if m is not mark]
        inner = [mark["label"][0] + 1, mark["label"][1] + 3, mark["label"][2] - 1, mark["label"][3] - 3]
        assert not any(overlap(inner, shape) for shape in others), mark
    assert browser.run(FAINT) == []
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == dark


def test_marks_lie_where_the_figures_say(browser, page, sample):
    """Mark positions are linear in the two figures: three carriers fix the map, the others must agree."""
    picture = check_page(browser, page, sample[0])
    at = {
        m["carrier"]: ((m["shape"][0] + m["shape"][2]) / 2, (m["shape"][1] + m["shape"][3]) / 2)
        for m in picture["marks"]
    }
    figure = {
        r["carrier"]: (r["gap_closed"]["mean"], r["locality"]["all"]["mean"]) for r in drawable(sample[0])
    }
    for axis in (0, 1):
        one, two = ("none", "lora") if axis == 0 else ("none", "rome")
        slope = (at[two][axis] - at[one][axis]) / (figure[two][axis] - figure[one][axis])
        assert slope * (1 if axis == 0 else -1) > 0, "right is more gap closed, up is more locality"
        for carrier, place in at.items():
            expected = at[one][axis] + slope * (figure[carrier][axis] - figure[one][axis])
            assert abs(place[axis] - expected) < 1.0, carrier


def test_facts_are_text_never_markup(browser, page):
    browser.open(page)
    assert browser.run("document.scripts.length") == 1
    assert not any(e.get("method") == "Page.javascriptDialogOpening" for e in browser.events)
    cells = browser.run("[...document.querySelectorAll('.samples td')].map(n => n.textContent)")
    assert "<script>alert('loaf')</script> & rye" in cells and "Zwölf Möwen über 東京 🙂" in cells
    heads = browser.run("[...document.querySelectorAll('.missed th')].map(n => n.textContent.trim())")
    assert heads == ["MEMIT", "Graph <lookup>"]


def test_page_may_load_nothing(browser, page):
    """Not only does it ask for nothing: its policy refuses what a script would ask for."""
    reached = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            reached.append(self.path)
            self.send_response(200)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        browser.open(page)
        assert browser.run(f"fetch('{address}/a').then(() => 'loaded', () => 'refused')") == "refused"
        image = """new Promise(done => {
            const i = new Image();
            i.onload = () => done("loaded"); i.onerror = () => done("refused"); i.src = "ADDRESS/b.png";
        })"""
        assert browser.run(image.replace("ADDRESS", address)) == "refused"
        added = """(() => {
            const s = document.createElement("script");
            s.textContent = "window.ran = 1"; document.body.append(s); return window.ran ?? 0;
        })()"""
        assert browser.run(added) == 0
    finally:
        server.shutdown()
        server.server_close()
    assert reached == []


def test_page_is_accessible(browser, page):
    browser.open(page)
    assert browser.run("document.documentElement.lang") == "en"
    assert browser.run(
        "[...document.querySelectorAll('table')].every(t => t.caption && t.caption.textContent.trim())"
    )
    assert browser.run("[...document.querySelectorAll('th')].every(t => t.scope)")
    assert browser.run(
        "[...document.querySelectorAll('svg:not([aria-hidden=true])')].every(s => s.querySelector('title'))"
    )
    levels = browser.run("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    ids = browser.run("[...document.querySelectorAll('[id]')].map(n => n.id)")
    assert len(ids) == len(set(ids))
    targets = browser.run(
        "[...document.querySelectorAll('a.mark')].map(a => a.getAttribute('href').slice(1))"
    )
    assert set(targets) <= set(ids)


def test_keyboard_sorts_and_opens(browser, page, sample):
    browser.open(page)
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.textContent") == "Skip to the figures"
    assert browser.run("document.activeElement.getBoundingClientRect().left") >= 0
    first = "[...document.querySelector('table.costs').tBodies[0].rows].map(r => r.cells[0].dataset.sort)"
    assert browser.run(first)[0] == "Gold context"  # by gap closed, as written
    browser.run("document.querySelectorAll('table.costs thead button')[4].focus()")
    browser.press("Enter", 13)
    by_latency = sorted(drawable(sample[0]), key=lambda r: r["latency_seconds"]["mean"])
    shown = browser.run(
        "[...document.querySelector('table.costs').tBodies[0].rows].map(r => +r.cells[4].dataset.sort)"
    )
    assert shown == [r["latency_seconds"]["mean"] for r in by_latency]
    assert (
        browser.run("document.querySelectorAll('table.costs th')[4].getAttribute('aria-sort')") == "ascending"
    )
    browser.press("Enter", 13)
    assert browser.run(first)[0] == by_latency[-1]["title"]
    browser.run("document.querySelectorAll('table.costs thead button')[0].focus()")
    browser.press("Enter", 13)
    assert browser.run(first) == sorted(browser.run(first), key=str.lower)
    assert browser.run("document.querySelectorAll('table.costs th[aria-sort]').length") == 1
    browser.run("document.querySelector('details:not([open]) summary').focus()")
    before = browser.run("document.querySelectorAll('details[open]').length")
    browser.press(" ", 32)
    assert browser.run("document.querySelectorAll('details[open]').length") == before + 1


def test_printing_shows_what_is_folded(browser, page):
    browser.open(page)
    closed = "document.querySelectorAll('details:not([open])').length"
    folded = browser.run(closed)
    assert folded > 5
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run(closed) == 0
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run(closed) == folded
    browser.send(
        "Emulation.setDeviceMetricsOverride", width=718, height=1000, deviceScaleFactor=1, mobile=False
    )
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth"), "tables fit a sheet of A4"
    browser.send("Emulation.setEmulatedMedia", media="")


def test_verdict_and_tables_say_what_the_records_say(browser, page, sample):
    browser.open(page)
    verdict = browser.run("document.querySelector('.verdict').textContent")
    assert "LoRA" in verdict and all(reason in verdict for reason in sample[1]["recommendation"]["reasons"])
    assert all(e["reason"] in verdict for e in sample[1]["recommendation"]["excluded"])
    for chip in ("latency ≤ 2.0\u00a0s", "locality ≥ 85\u00a0%", "can be removed again"):
        assert chip in verdict
    row = "[...document.querySelectorAll('table.{} tr')].find(r => r.cells[0].dataset.sort === 'LoRA').innerText"
    main = browser.run(row.format("sortable")).replace("\u00a0", " ")
    assert all(text in main for text in ("96 %", "85–107 %", "90 %", "89 %", "1.06 ×"))
    costs = browser.run(row.format("costs")).replace("\u00a0", " ")
    assert all(text in costs for text in ("21 s", "1.24 GB", "1.87 MB", "0.24 s", "9.4", "weights", "yes"))
    missed = browser.run("[...document.querySelectorAll('.missed tr')].map(r => r.innerText)")
    assert (
        "the loss is nan at step 7" in missed[0] and "failed" in missed[0] and "not applicable" in missed[1]
    )
    everything = browser.run("document.querySelector('#lineage').parentElement.textContent")
    for text in (
        sample[1]["model"]["fingerprint"],
        sample[1]["knowledge"]["sha256"],
        "2.13.0",
        "8.2\u00a0GB",
        "train_paraphrases: 2",
    ):
        assert text in everything


def _only_failures(records, context):
    context["recommendation"] = {"carrier": None, "reasons": ["No carrier was measured."], "excluded": []}
    return records[-2:], context


def _one(records, context):
    return [r for r in records if r["carrier"] == "lora"], context


def _nulls(records, context):
    for record in records[:6]:
        for key in ("recall", "locality"):
            record[key] = dict.fromkeys(record[key])
        for key in ("gap_closed", "perplexity", "perplexity_ratio", "install_seconds", "install_peak_bytes",
                    "stored_bytes", "latency_seconds", "tokens_read", "reason"):  # fmt: skip
            record[key] = None
        record["samples"] = []
    return records, context


def _bare(records, context):
    return [{"carrier": "a", "status": "done"}, {"carrier": "b", "status": "failed"}], {}


def _nothing(records, context):
    return [], {}


def _extreme(records, context):
    done = drawable(records)
    for record, gap in zip(done, (-0.4, 1.6, math.nan, 0.5), strict=False):
        record["gap_closed"] = {"mean": gap, "low": gap - 0.3, "high": gap + 0.3, "n": 24}
    for record in done[4:8]:  # four carriers at one point
        record["gap_closed"]["mean"], record["locality"]["all"]["mean"] = 0.7, 0.9
    done[0]["title"] = "A carrier whose name goes on and on, and then some, until nobody reads it " * 2
    done[1]["title"] = "Unbreakable" * 12
    done[3]["samples"] = [
        {
            "prompt": "\x00\x07\ud800 </td></table><!--",
            "target": "x" * 400,
            "before": "\u202eabc",
            "after": "]]>",
            "ok": False,
        }
    ] * 300
    done[2]["reason"] = done[2]["arguments"] = None
    context["title"] = "<b>T</b>" * 12
    context["recipe"] = "a: </pre><script>alert(1)</script>\n" + "long " * 200
    context["constraints"] = {"max_bytes": 10**7, "context": False, "unheard_of": "x", "weight_access": True}
    return [r for r in records if r["carrier"] != done[2]["carrier"]], context


@pytest.mark.parametrize("change", [_only_failures, _one, _nulls, _bare, _nothing, _extreme])
def test_odd_comparisons_make_whole_pages(browser, sample, tmp_path, change):
    records, context = change(*copy.deepcopy(sample))
    page = write_report(records, context, tmp_path)
    full = [r for r in records if r.get("gap_closed")]
    pictures = [check_page(browser, page, full, width=width) for width in WIDTHS.values()]
    text = browser.run("document.body.innerText")
    for record in records:
        assert (record.get("title") or record["carrier"]) in text
        if record["status"] != "done":
            assert record["status"] in text and (record.get("reason") or "no reason was recorded") in text
    for word in ("None", "nan", "undefined", "inf\u00a0"):
        assert word not in text.replace("the loss is nan at step 7", "")
    for picture in filter(None, pictures):
        assert overlapping_labels(picture) == []
    for name in ("pareto", "recall", "costs"):
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 1000


def test_a_machine_without_a_browser_is_told_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CHROMIUM", raising=False)
    with pytest.raises(RuntimeError, match="apt-get install chromium"):
        chromium.Chromium()


# Files.


def test_plots_are_pictures_in_the_pages_colours(page):
    import matplotlib.image
    import numpy as np

    for name in ("pareto", "recall", "costs"):
        pixels = matplotlib.image.imread(io.BytesIO((page.parent / "plots" / f"{name}.png").read_bytes()))
        height, width = pixels.shape[:2]
        assert 1200 <= width <= 2400 and 500 <= height <= 1200
        for colour in ("2463a9", "b8560f"):
            rgb = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)]) / 255
            share = (np.abs(pixels[..., :3] - rgb).max(-1) < 0.01).mean()
            assert share > 2e-4, (name, colour, share)
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])[:, :3]
        assert (edge > 0.99).all(), f"{name}: something touches the border"


def test_writing_again_gives_the_same_bytes_and_leaves_the_records(sample, page, tmp_path):
    before = copy.deepcopy(sample)
    again = write_report(*sample, tmp_path)
    assert before == sample
    for name in ("report.html", "plots/pareto.png", "plots/recall.png", "plots/costs.png"):
        assert (again.parent / name).read_bytes() == (page.parent / name).read_bytes(), name
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "costs.png",
        "pareto.png",
        "plots",
        "recall.png",
        "report.html",
    ]


def test_unwritable_and_missing_parts_are_said_before_anything_is_written(sample, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is not a folder"):
        write_report(*sample, tmp_path / "file")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"transfuse\[report\]"):
        write_report(*sample, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Figures and geometry.


def test_figures_are_written_in_units_people_read():
    def plain(text):
        return text.replace("\u00a0", " ")

    cases = {
        percent: {0: "0 %", 1: "100 %", 0.957: "96 %", 0.9972: "99.7 %", 0.9999: "100 %", 0.003: "0.3 %",
                  -0.043: "−4 %", 1.07: "107 %", -0.0001: "0 %", 0.005: "0 %"},
        seconds: {0: "0 s", 0.0004: "< 1 ms", 0.0031: "3 ms", 0.0994: "99 ms", 0.0996: "0.10 s", 0.244: "0.24 s",
                  0.996: "1.0 s", 9.94: "9.9 s", 9.96: "10 s", 59.4: "59 s", 59.6: "1 min 00 s", 125: "2 min 05 s",
                  3599.6: "1 h 00 min", 3720: "1 h 02 min"},
        size: {0: "0 B", 999: "999 B", 1000: "1 kB", 4100: "4.1 kB", 999_600: "1 MB", 1_870_000: "1.87 MB",
               36_540_000: "36.5 MB", 310e6: "310 MB", 1.24e9: "1.24 GB", 2.4e12: "2400 GB"},
        number: {9.4: "9.4", 122.4: "122", 3: "3", 134515008: "134,515,008", 99.96: "100"},
    }  # fmt: skip
    for write, table in cases.items():
        for value, text in table.items():
            assert plain(write(value)) == text, (write, value)


def test_figures_that_are_not_numbers_are_none():
    assert interval({"mean": 0.5, "low": 0.4, "high": 0.6, "n": 3}) == (0.5, 0.4, 0.6)
    assert interval(2) == (2.0, None, None)
    assert interval({"mean": 0.5, "low": None, "high": 0.6}) == (0.5, None, None)
    for nothing in (
        None,
        "3",
        True,
        math.nan,
        math.inf,
        {},
        {"mean": None},
        {"mean": math.nan, "low": 0, "high": 1},
    ):
        assert interval(nothing) is None


def test_limits_in_words():
    words = [w.replace("\u00a0", " ") for w in limits({
        "max_latency": 0.5, "max_bytes": 2_000_000, "min_recall": 0.8, "reversible": True, "weight_access": False,
        "context": None, "min_locality": None, "new_one": 3,
    })]  # fmt: skip
    assert words == ["latency ≤ 0.50 s", "stored ≤ 2 MB", "paraphrase recall ≥ 80 %", "can be removed again",
                     "no access to weights", "new_one = 3"]  # fmt: skip
    assert limits({"reversible": False, "weight_access": True}) == []


def _record(name, gap, kept, **more):
    return {"carrier": name, "status": "done", "gap_closed": gap, "locality": {"all": kept}, **more}


def test_front_is_what_no_candidate_beats():
    generator = random.Random(3)
    records = [_record(f"c{i}", generator.randrange(8) / 8, generator.randrange(8) / 8) for i in range(40)]
    records += [_record("none", 0.0, 1.0), _record("gold", 1.0, 1.0), _record("void", None, 1.0)]
    found = {row.carrier for row in front(rows_of(records, {"reference": "gold"}))}
    points = {r["carrier"]: (r["gap_closed"], r["locality"]["all"]) for r in records[:40]}
    slow = set()
    for name, (x, y) in points.items():
        beaten = False
        for u, v in points.values():
            if (u > x and v >= y) or (u >= x and v > y):
                beaten = True
        if not beaten:
            slow.add(name)
    assert found == slow


def test_rows_are_sorted_and_the_best_marked():
    records = [
        _record("low", 0.2, 0.99), _record("none", 0.0, 1.0), {"carrier": "bad", "status": "failed"},
        _record("high", 0.9, 0.8), _record("gold", 1.0, 1.0), _record("alike", 0.2, 0.991), _record("void", None, None),
    ]  # fmt: skip
    rows = rows_of(records, {"reference": "gold", "recommendation": {"carrier": "high"}})
    assert [row.carrier for row in rows] == ["gold", "high", "low", "alike", "none", "void", "bad"]
    assert {row.carrier for row in rows if row.cells["gap_closed"].best} == {"high"}
    # 99 % and 99 % read the same, so both are best; the yardsticks compete with nobody
    assert {row.carrier for row in rows if row.cells["locality.all"].best} == {"low", "alike"}
    assert [row.role for row in rows if row.yardstick] == ["reference", "untouched"]
    assert [row.carrier for row in rows if row.recommended] == ["high"]


def test_ticks_are_round_and_inside():
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-0.04, 1.04) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    for low, high in ((0.77, 1.01), (-0.5, 1.7), (0.949, 1.002)):
        values = ticks(low, high)
        assert 3 <= len(values) <= 8 and low <= values[0] and values[-1] <= high
        steps = {round(b - a, 9) for a, b in pairwise(values)}
        assert len(steps) == 1


@pytest.mark.parametrize("seed", range(6))
def test_labels_do_not_overlap(seed):
    """Random and clustered points, more crowded than any comparison here."""
    generator = random.Random(seed)
    bounds = Box(50, 20, 700, 450)
    centre = generator.uniform(120, 600), generator.uniform(80, 400)
    points = [(generator.uniform(60, 690), generator.uniform(30, 440)) for _ in range(7)]
    points += [(centre[0] + generator.gauss(0, 25), centre[1] + generator.gauss(0, 15)) for _ in range(6)]
    points += [points[-1]]  # two at one place
    sizes = [(generator.uniform(40, 190), 16.0) for _ in points]
    boxes = place_labels(points, sizes, bounds, radii=[6.0] * len(points))
    for i, box in enumerate(boxes):
        assert abs((box.right - box.left) - sizes[i][0]) < 1e-9
        assert box.overlap(bounds) == pytest.approx(sizes[i][0] * 16.0)
        assert not any(box.overlap(other) for other in boxes[i + 1 :])
        marks = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in points]
        assert not any(box.overlap(mark) for mark in marks)


def test_the_losses_of_a_run(tmp_path):
    from transfuse.report import write_losses

    record = {"losses": [5.0 / (i + 1) for i in range(60)], "perplexity": {"before": 812.3, "after": 40.1}}
    (tmp_path / "training.json").write_text(json.dumps(record))
    picture = write_losses(tmp_path)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 5000
