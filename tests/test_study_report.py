"""The report and its pictures: on tables made up for the purpose, and on a small real study."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.text import Text as DrawnText
from small_studies import TINY
from synthetic_study import DESIGN, NASTY, synthetic_study

from qllm.errors import QllmValueError
from qllm.study import ARMS, Arm, Study, Text, load, run
from qllm.study import captions, explorer
from qllm.study.figure_style import NARROW, WIDE, looks, rendered
from qllm.study.lookup import label, shown_temperatures
from qllm.study.markup import Value, escape, html_table
from qllm.study.plots import PICTURES, Drawn, absent
from qllm.study.report import report_html
from qllm.study.side_by_side import side_by_side
from qllm.study.verdict_table import verdict_table
from qllm.study.wording import interval, listed, number, percent, size

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which(
    "google-chrome"
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return synthetic_study(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture(scope="module")
def page(study):
    """The report with a stand-in for every picture, which are tested by themselves."""
    drawn = Drawn(b"<svg wide/>", b"<svg narrow/>")
    return report_html(study, dict.fromkeys(PICTURES, drawn))


def changed(study, **tables):
    """The study with other tables; None takes one away."""
    kept = {name: frame for name, frame in {**study.tables, **tables}.items() if frame is not None}
    return Study(study.folder, study.design, study.manifest, kept)


# ------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_readable(study, name):
    """Letters of 8 points or more in a width of 3.6 inches, which a phone shows at its own size;
    nothing beyond the paper."""
    for narrow, width in ((False, WIDE), (True, NARROW)):
        figure = study.plot(name, narrow=narrow)
        assert figure.get_figwidth() == width
        figure.draw_without_rendering()
        canvas = figure.get_window_extent()
        ticks = {
            tick_label
            for axes in figure.findobj(Axes)
            for tick in axes.xaxis.majorTicks + axes.yaxis.majorTicks
            for tick_label in (tick.label1, tick.label2)
        }
        names = {tick.label1 for axes in figure.axes for tick in axes.yaxis.majorTicks}
        for text in figure.findobj(DrawnText):
            if not text.get_visible() or not text.get_text().strip():
                continue
            assert text.get_fontsize() >= 8, text.get_text()
            box = text.get_window_extent()
            if text in names or text not in ticks:  # ticks beyond the end of an axis are not drawn
                assert box.x0 >= canvas.x0 - 2, text.get_text()
            if text not in ticks:
                assert box.x1 <= canvas.x1 + 2 and box.y1 <= canvas.y1 + 2, text.get_text()


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_picture_is_the_same_every_time(study, kind):
    first, again = (rendered(study.plot("survival", narrow=True), kind) for _ in range(2))
    assert first == again and first[:9] in (b"<?xml ver", b"\x89PNG\r\n\x1a\n\x00")


def test_an_arm_has_one_colour_everywhere(study):
    known = looks(DESIGN)
    assert len({(look.colour, str(look.dash)) for look in known.values()}) == len(known)
    seen = 0
    for name in ("effective_temperature", "hazard", "generation", "cost", "play"):
        for entry in study.plot(name).legends[0].get_lines():
            if entry.get_label() in known:
                assert to_hex(entry.get_color()).upper() == known[entry.get_label()].colour.upper()
                seen += 1
    assert seen == 7 + 6 + 8 + 7 + 8
    page_data = json.loads(explorer.script_data(study))
    assert {arm["name"]: arm["colour"] for arm in page_data["arms"]} == {
        name: look.colour for name, look in known.items() if name != "null-batch"
    }


def test_arms_from_elsewhere_have_colours_of_their_own():
    arms = ("bf16", "nf4", Arm("coarse", "fp4", blocksize=4096), "fp4",
            Arm("gptq", "gptq", source="transformers"), Arm("q4", "q4_k", source="gguf"), "null")
    known = looks(replace(DESIGN, arms=arms))
    assert len({look.colour for look in known.values()}) == 6  # coarse and fp4 share theirs
    assert known["coarse"].colour == known["fp4"].colour != known["gptq"].colour
    assert known["coarse"].dash != known["fp4"].dash


def test_curves_are_those_of_the_table(study):
    figure = study.plot("divergence")
    assert [axes.get_yscale() for axes in figure.axes] == ["log"] * 6
    frame = study.tables["curves"].query(
        "model == 'demo:llama' and arm == 'fp4' and measure == 'tv'"
    )
    drawn = [line.get_xydata() for line in figure.axes[1].get_lines()]
    wanted = frame[["temperature", "estimate"]].to_numpy()
    assert any(line.shape == wanted.shape and np.allclose(line, wanted) for line in drawn)


def test_heat_map_has_a_dot_where_the_interval_excludes_0(study):
    axes = study.plot("differences").axes[0]
    table = study.tables["differences"].query(
        "model == 'demo:llama' and measure == 'nll_reference'"
    )
    arms = [arm.name for arm in DESIGN.others]
    wanted = {
        (DESIGN.temperatures.index(row["temperature"]), arms.index(row["arm"]))
        for _, row in table.iterrows()
        if row["low"] > 0 or row["high"] < 0
    }
    found = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.get_lines()}
    assert found == wanted and 0 < len(wanted) < len(table)
    values = axes.get_images()[0].get_array()
    row = table.query("arm == 'nf4' and temperature == 1.0").iloc[0]
    assert values[arms.index("nf4"), DESIGN.temperatures.index(1.0)] == row["estimate"]


def test_hazard_is_parted_texts_per_token_at_risk(study):
    from qllm.study.plots_texts import hazards

    survival = pd.DataFrame(
        {"model": "demo:llama", "arm": "nf4", "temperature": 1.0, "position": [0, 1, 2],
         "at_risk": [10, 8, 4], "hazard": [0.2, 0.5, 0.25], "expected_hazard": [0.1, 0.4, 0.2],
         "estimate": 1.0, "low": 1.0, "high": 1.0}
    )
    row = hazards(changed(study, survival=survival)).iloc[0]
    assert row["observed"] == pytest.approx(7 / 22)
    assert row["expected"] == pytest.approx((1 + 3.2 + 0.8) / 22)


@pytest.mark.parametrize("name", ["tenths", "slopes", "effective_temperature", "cost"])
def test_a_missing_table_leaves_its_picture_out_with_a_sentence(study, name):
    table = {"cost": "speed"}.get(name, name)
    less = changed(study, **{table: None})
    assert name not in less.plots and absent(less, name) == f"the study has no table {table}"
    with pytest.raises(QllmValueError, match=f"no plot '{name}': the study has no table {table}"):
        less.plot(name)
    drawn = {other: Drawn(b"", b"") for other in less.plots}
    assert (
        f"\u201c{html.escape(PICTURES[name].heading)}\u201d is left out: the study has no table"
        f" {table}." in report_html(less, drawn)
    )
    empty = changed(study, **{table: study.tables[table].iloc[:0]})
    assert absent(empty, name) == f"the table {table} has no rows"


def test_unknown_picture(study):
    with pytest.raises(QllmValueError, match="no plot 'pie'; there are divergence, tenths"):
        study.plot("pie")


# ------------------------------------------------------------------------------------ sentences


def test_numbers_in_words():
    assert number(0.012345) == "0.0123" and number(-3.0) == "\u22123"
    assert number(1.5e-7, 2) == "1.5 \u00d7 10\u207b\u2077" and number(float("nan")) == "\u2013"
    assert number(166.4, 2) == "166" and number(12345.6) == "12,346"
    assert number(float("inf")) == "\u221e" and percent(0.034) == "3.4 %" and percent(0.5) == "50 %"
    assert interval({"low": 1.0, "high": 1.0}) == "" == interval({"low": np.nan, "high": 1.0})
    assert interval({"low": -0.5, "high": 0.25}) == "[\u22120.5, 0.25]"
    assert listed([]) == "" and listed(["a"]) == "a" and listed(["a", "b", "c"]) == "a, b and c"
    assert size(12.3e9) == "12.3 GB" and size(500) == "500 bytes"


def test_captions_are_computed_from_the_tables(study):
    for name, picture in PICTURES.items():
        text = picture.caption(study)
        assert text.endswith(".") and "nan" not in text and len(text) > 80, name
    assert "peaks at temperature 0.7 [0.699, 0.701], inside the band" in captions.divergence(study)
    worse = study.tables["sensitivity"].copy()
    peaks = worse["kind"] == "peak"
    worse.loc[peaks, "estimate"] = 1.8
    assert "peaks at temperature 1.8" in captions.divergence(changed(study, sensitivity=worse))
    assert "outside the band" in captions.divergence(changed(study, sensitivity=worse))
    end = study.tables["survival"].query(
        "model == 'demo:falcon' and arm == 'fp4' and temperature == 1.0 and position == 16"
    )["estimate"].iloc[0]
    last = captions.survival(study).split("demo falcon at temperature 1:")[1]
    assert f"fp4 {percent(end)}" in last


def test_null_and_control_are_judged(study):
    assert captions.null_sentence(study)[0] and captions.control_sentence(study)[0]
    checks = study.tables["checks"].copy()
    checks.loc[0, ["largest_difference", "exactly_zero"]] = [0.25, False]
    ok, text = captions.null_sentence(changed(study, checks=checks))
    assert not ok and "NOT 0 in 1 of 4 checks (demo llama null-batch kl 0.25)" in text
    checks = study.tables["checks"].copy()
    checks.loc[checks.index[-1], "passed"] = False
    ok, text = captions.control_sentence(changed(study, checks=checks))
    assert not ok and "NOT clearly beyond what counts as equal in ln_ppl_ratio in demo" in text
    plain = replace(DESIGN, arms=("bf16", "nf4"))
    bare = Study(study.folder, plain, study.manifest, study.tables)
    assert captions.null_sentence(bare)[1].startswith("This study has no null arm")
    assert captions.control_sentence(bare)[1].startswith("This study has no positive control")


# -------------------------------------------------------------------------------------- the page


class Outline(HTMLParser):
    """Checks that elements are closed in order, and keeps headings and scripts."""

    void = frozenset({"meta", "img", "br", "source"})

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.stack, self.headings, self.scripts, self.policy = [], [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag not in self.void:
            self.stack.append(tag)
        if tag == "script":
            self.scripts.append((dict(attributes), ""))
        if dict(attributes).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attributes)["content"]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "h2":
            self.headings.append(data)
        if self.stack and self.stack[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)


def test_page_is_whole_and_needs_nothing_else(page, study):
    outline = Outline(page)
    assert outline.stack == []
    order = ["Verdicts", "Short answer", *(
        picture.heading for name, picture in PICTURES.items() if name != "play"),
        "Look and play", "The same prompt, the same noise", "Tables", "Methods", "Limits",
        "Files, versions, hashes"]  # fmt: skip
    assert outline.headings == order
    assert not re.search(r"https?:|//[a-z]|<link|<iframe|@import|url\(|\bfetch\(", page, re.I)
    assert page.count('src="data:image/svg+xml;base64,') == len(PICTURES)
    assert page.count('srcset="data:image/svg+xml;base64,') == len(PICTURES)
    for words in ("prefers-color-scheme: dark", 'name="viewport"', "@media print", "demonstration",
                  "Positive control (arm control)", "exactly 0 in all 2 measures", "0" * 64):
        assert words in page


def test_only_its_own_scripts_may_run(page):
    outline = Outline(page)
    run = [text for attributes, text in outline.scripts if "type" not in attributes]
    assert len(run) == 2
    for text in run:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in outline.policy
    assert "default-src 'none'" in outline.policy and "unsafe-eval" not in outline.policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", page)
    assert not re.search(r"<[a-z][^>]*\son[a-z]+=", page)


def test_what_a_model_wrote_is_text(study, page):
    assert "<script>alert" not in page and "\x1b" not in page and "\u2028" not in page
    data = next(text for attributes, text in Outline(page).scripts if "type" in attributes)
    assert not set(data) & set("<>&\u2028") and data.isascii()
    first = json.loads(data)["models"][0]["prompts"][0]["places"][0]
    assert NASTY in [piece for _, piece in first["tokens"]]
    design = replace(DESIGN, name=NASTY, prompts=[Text(p.id, "x", NASTY) for p in DESIGN.prompts])
    samples = study.tables["samples"].assign(text=NASTY)
    other = Study(study.folder, design, study.manifest, {**study.tables, "samples": samples})
    hostile = report_html(other, dict.fromkeys(PICTURES, Drawn(b"", b"")))
    assert "<script>alert" not in hostile and "\x1b" not in hostile
    assert escape(NASTY) in hostile and "<script>" not in other._repr_html_()
    assert escape("\ta\nb") == "\ta\nb" and escape("\x00") == "\ufffd"


def test_verdicts_come_with_estimate_prompts_and_reason(study):
    table = verdict_table(study)
    assert table.count('<th scope="rowgroup"') == 11
    assert "0.11 [0.09, 0.13]" in table and "reason 11" in table
    for claim, models in (("C2", 1), ("C4", 2)):
        head = re.search(rf'rowspan="(\d)">{claim}<', table)
        assert head and int(head.group(1)) == models
    assert "all models" in table and "not testable" in table
    assert verdict_table(study) in study._repr_html_()


def test_tables_hold_numbers_to_sort_by():
    table = html_table("t", ["a", "b"], [["x<y", Value("1.5 [1, 2]", 1.5)], ["z", 12345]])
    assert 'data-v="1.5">1.5 [1, 2]' in table and 'data-v="12345">12,345' in table
    assert "x&lt;y" in table and 'class="sortable"' in table


def test_methods_and_limits_follow_the_design(study, page):
    text = html.unescape(page)
    for words in ("control (format nf4, blocks of 4096, uniform levels, positive control",
                  "nf4+head (format nf4, blocks of 64, output embedding quantized)",
                  "temperatures 0, 0.5, 0.65, 0.8, 1 and 1.5, 8 and 16 tokens, top_k off",
                  "Texts of 16 tokens are too short", "95 % intervals", "ln_ppl 0.01, rep_4 0.01"):
        assert words in text
    other = replace(DESIGN, lengths=(256,), top_k=(0, 50), keep_ties=True, speed=None)
    found = html.unescape(
        report_html(Study(study.folder, other, study.manifest, study.tables), {})
    )
    assert "256 tokens, top_k off and 50, ties of the last place kept" in found
    assert "are too short" not in found and "rounds in one process" not in found


def test_side_by_side_marks_the_first_token_that_differs(study):
    text = side_by_side(study)
    plain = " the cat"
    assert f'{plain}<mark title="1.6 nats"> sat</mark>' in text.replace(
        '<span class="u0">', "").replace("</span><mark", "<mark")
    # int8 never parts, the other seven arms only above temperature 0: models x prompts x ...
    assert text.count("(equal)") == 2 * 2 * (len(shown_temperatures(DESIGN)) + 6)
    assert text.count("<details") == 2 * len(shown_temperatures(DESIGN))
    assert text.count("<details open") == 2
    shades = re.findall(r'<span class="u(\d)" title="([\d.]+) nats">', text)
    assert shades and all(int(level) == sum(float(nll) >= b for b in (1, 2, 4, 7))
                          for level, nll in shades)


def test_side_by_side_without_pieces_marks_a_word(study, tmp_path):
    bare = Study(tmp_path, DESIGN, study.manifest, study.tables)
    assert bare.play == {} and "play" not in bare.plots
    text = side_by_side(bare)
    assert "the cat </span><mark>sat</mark> down" in text and "(equal)" in text
    assert "Look and play" not in report_html(bare, {})


# ------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Opens a page in Chromium, lets a script do things to it, returns what it found as JSON."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    folder = tmp_path_factory.mktemp("browser")

    def browse(body, script):
        path = folder / "page.html"
        path.write_text(
            f"{body}<script>window.addEventListener('load', function () {{ var found;"
            f" try {{ found = (function () {{ {script} }})(); }}"
            " catch (error) { found = String(error); }"
            " var out = document.createElement('pre'); out.id = 'found';"
            " out.textContent = JSON.stringify(found); document.body.appendChild(out); });"
            "</script>",
            encoding="utf-8",
        )
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                   f"--user-data-dir={folder}", "--virtual-time-budget=5000", "--dump-dom",
                   path.as_uri()]  # fmt: skip
        shown = subprocess.run(command, capture_output=True, timeout=60).stdout.decode()
        found = re.search(r'<pre id="found">(.*?)</pre>', shown, re.S)
        assert found, shown[-500:]
        return json.loads(html.unescape(found.group(1)))

    return browse


@pytest.fixture(scope="module")
def free(page):
    """The page without the policy that would forbid the scripts of these tests."""
    return re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)


def test_interactive_figure_shows_what_was_computed(browse, free, study):
    """At every temperature and place: the drawn tokens, the probabilities, and who parts."""
    found = browse(free, """
        var slider = document.querySelector('#explorer input[type=range]'), seen = [];
        [0, 1, 2].forEach(function (place) {
          document.querySelectorAll('#explorer .steps button')[place].click();
          [0, 13, 39].forEach(function (t) {
            slider.value = t;
            slider.dispatchEvent(new Event('input'));
            seen.push({place: place, t: t,
              picks: Array.from(document.querySelectorAll('.picks li')).map(function (item) {
                return [item.querySelector('b').textContent, item.querySelector('code').textContent,
                        item.className, item.textContent]; }),
              said: document.querySelector('.said').textContent,
              bars: document.querySelectorAll('.bar.picked').length,
              alert: slider.getAttribute('aria-valuetext')});
          });
        });
        return {seen: seen, still: getComputedStyle(document.querySelector('.still')).display,
                live: document.querySelector('.live').hidden,
                scripts: document.querySelectorAll('#explorer .live script').length,
                text: document.querySelector('#explorer .bars').textContent};
    """)
    assert found["scripts"] == 0 and "</script><script>alert('&')</script>" in found["text"]
    assert found["still"] == "none" and found["live"] is False
    places = study.play["models"][0]["prompts"][0]["places"]
    temperatures = study.play["temperatures"]
    parted = 0
    for item in found["seen"]:
        place, t = places[item["place"]], item["t"]
        arms = place["arms"]
        assert item["bars"] == len(arms) and item["alert"] == f"temperature {temperatures[t]:g}"
        for name, piece, kind, text in item["picks"]:
            pick = arms[name]["pick"][t]
            assert piece == explorer.visible(place["tokens"][pick][1])
            assert kind == ("parted" if pick != arms["bf16"]["pick"][t] else "")
            parted += kind == "parted"
            share = np.exp(arms[name]["logits"][pick] / temperatures[t] - arms[name]["log_z"][t])
            shown = float(re.search(r"\(([\d.]+)\s%\)", text).group(1))
            assert shown == pytest.approx(100 * share, abs=0.51)
        others = [name for name, _, kind, _ in item["picks"] if kind == "parted"]
        assert all(name in item["said"] for name in others)
    assert parted > 0


def test_a_press_on_a_heading_sorts(browse, free):
    found = browse(free, """
        var table = Array.from(document.querySelectorAll('table.sortable')).find(function (item) {
          return item.caption.textContent.startsWith('Weights'); });
        function column() {
          return Array.from(table.tBodies[0].rows).map(function (row) {
            return parseFloat(row.cells[4].dataset.v); });
        }
        var button = table.tHead.rows[0].cells[4].querySelector('button'), states = [column()];
        button.click(); states.push(column());
        button.click(); states.push(column());
        return {states: states, said: table.tHead.rows[0].cells[4].getAttribute('aria-sort')};
    """)
    before, rising, falling = found["states"]
    assert rising == sorted(before) != before and falling == rising[::-1]
    assert found["said"] == "descending"


def test_page_fits_a_phone_and_a_desk(browse, page):
    """Nothing is wider than the window: wide tables scroll in themselves. The policy of the page
    lets its own scripts run."""
    frames = "".join(
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{html.escape(page)}">'
        "</iframe>"
        for width in (360, 1280)
    )
    found = browse(frames, """
        return Array.from(document.querySelectorAll('iframe')).map(function (frame) {
          var inner = frame.contentDocument;
          return [inner.documentElement.clientWidth, inner.documentElement.scrollWidth,
                  inner.querySelector('.live').hidden, inner.querySelectorAll('th button').length];
        });
    """)
    assert [item[:3] for item in found] == [[360, 360, False], [1280, 1280, False]]
    assert found[0][3] > 20


# --------------------------------------------------------------------------------- a real study


def test_a_real_study_has_its_report(tmp_path):
    design = replace(TINY, arms=(*TINY.arms, ARMS["control"]))
    study = run(design, out=tmp_path / "out")
    again = load(study.folder)
    assert again.play == study.play and again.plots == study.plots
    page = study.report.read_text("utf-8")
    assert Outline(page).stack == []
    texts = study.play["models"][0]["texts"]
    assert len(texts) == 3 * len(design.prompts) * len(design.temperatures)
    for text in texts:
        row = study.tables["samples"].query(
            f"arm == '{text['arm']}' and prompt == '{text['prompt']}'"
            f" and temperature == {text['temperature']}"
        ).iloc[0]
        assert "".join(text["pieces"]) == row["text"]
        assert len(text["pieces"]) == len(text["nll"]) == row["tokens"]
        assert np.mean(text["nll"]) == pytest.approx(row["nll_reference"], abs=1e-3)
    assert '<span class="u' in page and "<mark" in page
    for name in study.plots:
        assert (study.folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (study.folder / "plots" / f"{name}.svg").read_bytes()[:600]
    assert label("demo:llama") in page and "Null arm null" in page
    before = page
    from qllm.study.report import write_report

    write_report(again)
    assert study.report.read_text("utf-8") == before
