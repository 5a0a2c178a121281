"""Tables from cells with planted effects: against the effects, and against pandas and NumPy written
out."""

import math
from dataclasses import replace

import numpy as np
import pytest
from synthetic_cells import DESIGN, Planted, cells

from qllm.study.measures import distinct_n, spread
from qllm.study.statistics import Intervals
from qllm.study.tables import TABLES, make_tables, write_tables
from qllm.study.tables_logits import logit_clusters

INTERVALS = Intervals(draws=1000)
SCALE = 1.03
GRID = np.asarray(DESIGN.logit_temperatures)


@pytest.fixture(scope="module")
def found():
    """(cells, tables) of a study whose arms have logits 3 % too large."""
    bodies = cells(DESIGN, Planted(scale=SCALE, loops=lambda arm, temperature: 0.3))
    return bodies, make_tables(DESIGN, bodies)


def at(frame, **equal):
    for name, value in equal.items():
        frame = frame[frame[name] == value]
    return frame


def test_all_tables_are_there_and_whole(found):
    _, tables = found
    assert list(tables) == list(TABLES)
    for name, frame in tables.items():
        assert len(frame) > 0 and frame.columns.is_unique, name
        keys = [key for key in ("claim", "model", "arm", "comparison", "endpoint", "source", "text",
                                "seed", "prompt", "kind", "measure", "check", "temperature",
                                "position", "tenth", "top_k", "length", "module", "phase", "batch",
                                "round") if key in frame]  # fmt: skip
        assert not frame.duplicated(keys).any(), name
        if {"estimate", "low", "high"} <= set(frame.columns):
            there = frame.dropna(subset=["low", "high"])
            assert len(there) > len(frame) / 3 or name == "checks", name
            assert (there["low"] <= there["estimate"] + 1e-12).all(), name
            assert (there["estimate"] <= there["high"] + 1e-12).all(), name


def test_the_same_cells_give_the_same_bytes(found, tmp_path):
    bodies, tables = found
    write_tables(tmp_path / "one", tables)
    write_tables(tmp_path / "two", make_tables(DESIGN, bodies))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_null_arms_are_zero_with_an_interval_of_no_width(found):
    _, tables = found
    for name in ("curves", "tenths", "differences", "slopes", "knobs"):
        rows = at(tables[name], arm="null-batch")
        if name == "slopes":
            rows = rows[rows["kind"].isin(["interaction", "distance"])]
        rows = rows.dropna(subset=["estimate"])
        assert len(rows) > 0
        assert (rows[["estimate", "low", "high"]] == 0).all(axis=None), name
    rows = at(tables["survival"], arm="null-batch")
    assert (rows[["estimate", "low", "high"]] == 1).all(axis=None)


# ------------------------------------------------------------------------------------- logits


def test_a_prompt_counts_once_and_its_texts_by_their_tokens():
    def text(source, name, tokens, kl):
        names = ("kl", "entropy_ref", "entropy_test", "delta_p_squared")
        curves = {measure: [kl, 2 * kl] for measure in names}
        return {"source": source, "id": name, "tokens": tokens, "ln_ppl_ratio": kl,
                "curves": curves}  # fmt: skip

    texts = [text("own", "a", 30, 1.0), text("own", "a", 10, 5.0), text("held", "a", 99, 4.0)]
    assert logit_clusters(texts, "all", "kl").tolist() == [[2.0, 4.0], [4.0, 8.0]]
    assert logit_clusters(texts, "own", "kl").tolist() == [[2.0, 4.0]]
    assert logit_clusters(texts, "held", "ln_ppl_ratio").tolist() == [4.0]
    assert logit_clusters(texts, "all", "entropy_shift").tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_curves_are_means_over_prompts_of_means_over_tokens(found):
    _, tables = found
    texts = at(tables["texts"], arm="fp4", source="own", temperature=0.8)
    weighted = texts["kl"] * texts["tokens"]
    by_prompt = weighted.groupby(texts["text"]).sum() / texts.groupby("text")["tokens"].sum()
    row = at(tables["curves"], arm="fp4", source="own", temperature=0.8, measure="kl").iloc[0]
    assert row["estimate"] == pytest.approx(by_prompt.mean()) and row["clusters"] == len(by_prompt)


def test_tenths_are_means_over_tokens(found):
    bodies, tables = found
    place = DESIGN.logit_temperatures.index(0.65)
    texts = bodies["demo:llama", "nf4"]["texts"]
    for tenth in (1, 9):
        counts = [text["tenths"]["count"][tenth] for text in texts]
        sums = [text["tenths"]["tv"][tenth][place] for text in texts if
                text["tenths"]["count"][tenth]]  # fmt: skip
        row = at(tables["tenths"], arm="nf4", tenth=tenth, temperature=0.65, measure="tv").iloc[0]
        assert row["estimate"] == pytest.approx(sum(sums) / sum(counts))
        assert row["tokens"] == sum(counts) and row["low"] < row["estimate"] < row["high"]
    empty = at(tables["tenths"], arm="nf4", tenth=0)
    assert (empty["tokens"] == 0).all() and empty["estimate"].isna().all()


def test_effective_temperature_is_the_planted_one(found):
    _, tables = found
    rows = at(tables["effective_temperature"], arm="nf4", source="all").set_index("temperature")
    assert list(rows.index) == list(DESIGN.logit_temperatures[1:-1])
    for temperature in (0.5, 0.8, 1.0):
        planted = temperature / SCALE - temperature
        assert rows.loc[temperature, "estimate"] == pytest.approx(planted, abs=1e-3)
        assert rows.loc[temperature, "high"] < 0
    null = at(tables["effective_temperature"], arm="null-batch")
    assert (null[["estimate", "low", "high"]] == 0).all(axis=None)


def test_sensitivity_sees_a_planted_band():
    def bump(arm, temperature):
        return 0.05 + 0.03 * (0.5 <= temperature <= 0.8)

    tables = make_tables(DESIGN, cells(DESIGN, Planted(disagreement=bump)))
    rows = at(tables["sensitivity"], arm="fp4", source="all", measure="disagreement")
    rows = rows.set_index("kind")
    assert rows.loc["contrast", "low"] < 0.03 < rows.loc["contrast", "high"]
    assert rows.loc["low_contrast", "high"] < 0
    assert 0.5 <= rows.loc["peak", "low"] <= rows.loc["peak", "high"] <= 0.8


# -------------------------------------------------------------------------------------- texts


def test_generation_is_a_mean_over_prompts(found):
    _, tables = found
    samples = at(tables["samples"], arm="nf4", temperature=0.8)
    for measure in ("nll_reference", "rep_4", "diversity", "loop", "loop_start", "equal", "eos",
                    "zlib_ratio", "repeated_sentences", "tokens"):  # fmt: skip
        wanted = samples.groupby("prompt")[measure].mean().dropna()
        row = at(tables["generation"], arm="nf4", temperature=0.8, measure=measure).iloc[0]
        assert row["estimate"] == pytest.approx(wanted.mean()), measure
        assert row["clusters"] == len(wanted)
    ids = [list(map(int, text.split())) for text in samples["ids"]]
    groups = [[text for text, prompt in zip(ids, samples["prompt"]) if prompt == name]
              for name in samples["prompt"].unique()]  # fmt: skip
    for measure, function in (("edit_distance", spread), ("distinct_3", lambda x: distinct_n(x, 3))):
        row = at(tables["generation"], arm="nf4", temperature=0.8, measure=measure).iloc[0]
        assert row["estimate"] == pytest.approx(np.mean([function(group) for group in groups]))
    assert at(tables["generation"], arm="nf4", measure="edit_distance", temperature=0.0)[
        "estimate"
    ].tolist() == [0.0]


def test_differences_are_paired(found):
    """The prompts' own levels of NLL cancel: the interval is far shorter than that of the means."""
    _, tables = found
    generation = tables["generation"]
    for measure in ("nll_reference", "rep_4", "edit_distance"):
        row = at(tables["differences"], arm="nf4", temperature=0.5, measure=measure).iloc[0]
        sides = [at(generation, arm=arm, temperature=0.5, measure=measure)["estimate"].iloc[0]
                 for arm in ("nf4", "bf16")]  # fmt: skip
        assert row["estimate"] == pytest.approx(sides[0] - sides[1])
    paired = at(tables["differences"], arm="nf4", temperature=0.5, measure="nll_reference").iloc[0]
    alone = at(generation, arm="nf4", temperature=0.5, measure="nll_reference").iloc[0]
    assert (paired["high"] - paired["low"]) < 0.2 * (alone["high"] - alone["low"])


def test_slopes_and_interaction_find_what_was_planted():
    """NLL of the reference rises by 1 per unit of temperature, that of the arms by 0.5 more within
    the band."""

    def steeper(arm, temperature):
        return 0.5 * min(max(temperature - 0.5, 0), 0.3)

    tables = make_tables(DESIGN, cells(DESIGN, Planted(nll=steeper)))
    rows = at(tables["slopes"], measure="nll_reference", arm="nf4").set_index("kind")
    for kind, wanted in (("slope_band", 1.5), ("slope_around", 1.0), ("B", 0.5),
                         ("interaction", 0.5)):  # fmt: skip
        assert rows.loc[kind, "low"] < wanted < rows.loc[kind, "high"], kind
    assert rows.loc["interaction", "low"] > 0.3
    assert rows.loc["distance", "estimate"] == pytest.approx(0.15, abs=0.02)
    assert rows.loc["slope_band", "estimate"] - rows.loc["slope_around", "estimate"] == (
        pytest.approx(rows.loc["B", "estimate"])
    )
    plain = at(tables["slopes"], measure="nll_reference", arm="bf16")
    assert set(plain["kind"]) == {"slope_band", "slope_around", "B"}
    reps = at(tables["slopes"], measure="rep_4")
    assert set(reps["arm"]) == {arm.name for arm in DESIGN.arms}


def test_null_interaction_contains_0(found):
    _, tables = found
    rows = at(tables["slopes"], kind="interaction", measure="nll_reference")
    assert ((rows["low"] <= 0) & (0 <= rows["high"])).all()


def test_survival_is_kaplan_meier_over_texts(found):
    _, tables = found
    samples = at(tables["samples"], arm="fp4", temperature=0.65)
    curve = at(tables["survival"], arm="fp4", temperature=0.65).set_index("position")
    share = 1.0
    for position in range(1, DESIGN.max_new_tokens + 1):
        written = np.where(samples["equal"], samples["tokens"], samples["first_divergence"] + 1)
        risk = (written >= position).sum()
        events = ((written == position) & ~samples["equal"]).sum()
        share *= 1 - (events / risk if risk else 0)
        assert curve.loc[position, "at_risk"] == risk
        assert curve.loc[position, "estimate"] == pytest.approx(share)
    assert curve.loc[0, "at_risk"] == len(samples) and curve.loc[0, "estimate"] == 1
    greedy = at(tables["survival"], arm="fp4", temperature=0.0)
    assert greedy["at_risk"].iloc[0] == len(DESIGN.prompts)  # once per prompt, whatever the seeds
    hazards = curve["hazard"].dropna()
    assert 0.02 < hazards.mean() < 0.09  # 0.05 was planted


def test_expected_hazard_is_1_minus_agreement_of_own_texts(found):
    _, tables = found
    own = at(tables["curves"], arm="nf4", source="own", measure="disagreement")
    for temperature in (0.5, 0.8):
        row = at(tables["survival"], arm="nf4", temperature=temperature).iloc[3]
        wanted = at(own, temperature=temperature)["estimate"].iloc[0]
        assert row["expected_hazard"] == pytest.approx(wanted)
    top = at(tables["summary"], arm="nf4", source="own", measure="same_top")["estimate"].iloc[0]
    greedy = at(tables["survival"], arm="nf4", temperature=0.0)["expected_hazard"].iloc[0]
    assert greedy == pytest.approx(1 - top)
    assert at(tables["survival"], temperature=0.25)["expected_hazard"].isna().all()  # off the grid


def test_knobs_of_the_longest_texts_are_the_differences(found):
    _, tables = found
    rows = at(tables["knobs"], arm="nf4", top_k=0, length=24).set_index("measure")
    for measure in ("nll_reference", "rep_4", "loop", "diversity", "distinct_2"):
        differences = at(tables["differences"], arm="nf4", measure=measure)["estimate"]
        assert rows.loc[measure, "estimate"] == pytest.approx(differences.mean(), abs=1e-9)
    assert set(tables["knobs"]["length"]) == {8, 24} and set(tables["knobs"]["top_k"]) == {0, 50}


# ---------------------------------------------------------------------------------------- cost


def test_speed_is_a_median_over_rounds_with_a_paired_ratio(found):
    bodies, tables = found
    rounds = at(tables["speed_rounds"], arm="nf4", phase="decode", batch=4)
    row = at(tables["speed"], arm="nf4", phase="decode", batch=4).iloc[0]
    assert row["tokens_per_second"] == rounds["tokens_per_second"].median()
    assert row["rounds"] == 12 and 0.97 < row["low"] < row["ratio"] < row["high"] < 1.03
    steps = row["tokens_per_second"] / 4
    assert row["percent_of_read"] == pytest.approx(100 * steps * 32 / 1e6)
    assert at(tables["speed"], phase="prefill")["percent_of_read"].isna().all()
    assert set(tables["speed"]["arm"]) == {arm.name for arm in DESIGN.timed}


def test_memory_and_weights(found):
    _, tables = found
    row = at(tables["memory"], arm="nf4").iloc[0]
    assert row["peak_loading"] == 2000 and math.isnan(row["peak_running"])
    assert at(tables["weights"], arm="fp4")["bits_per_weight"].tolist() == [4.0]


def test_checks_hold_the_null_arm_and_the_control(found):
    _, tables = found
    checks = tables["checks"]
    null, control = at(checks, check="null arm"), at(checks, check="positive control")
    assert len(null) == 14 and (null["largest_difference"] == 0).all() and null["passed"].all()
    assert set(control["measure"]) == {"ln_ppl_ratio", "disagreement"} and control["passed"].all()
    assert (control["low"] > control["margin"]).all()
    broken = cells(DESIGN)
    for text in broken["demo:llama", "null-batch"]["texts"]:
        text["curves"]["tv"][3] = 1e-7
    for text in broken["demo:llama", "control"]["texts"]:
        text["ln_ppl_ratio"] *= 0.05
    checks = make_tables(DESIGN, broken)["checks"].set_index(["arm", "measure"])["passed"]
    assert not checks["null-batch", "tv"] and not checks["control", "ln_ppl_ratio"]
    assert checks.sum() == len(checks) - 2


def test_intervals_stay_within_the_range_of_a_measure():
    """Of three prompts, intervals are symmetric and would reach below 0."""
    design = replace(DESIGN, prompts=DESIGN.prompts[:3], texts=(), bootstrap_draws=100)
    tables = make_tables(design, cells(design, Planted(loops=lambda arm, temperature: 0.3)))
    for name, measures in (("generation", ["loop", "rep_4", "edit_distance"]),
                           ("curves", ["kl", "rms_delta_p"])):  # fmt: skip
        rows = tables[name][tables[name]["measure"].isin(measures)].dropna()
        assert len(rows) > 20 and (rows["low"] >= 0).all()
        assert name == "curves" or (rows["high"] <= 1).all()
    slopes = tables["slopes"].dropna()
    assert (at(slopes, kind="interaction")["low"] < 0).any()
    assert (at(slopes, kind="distance")["low"] >= 0).all()
    assert (tables["differences"]["low"] < 0).any()


# ------------------------------------------------------------------------------ small studies


ONE_PROMPT = {"prompts": DESIGN.prompts[:1]}
ONE_SEED = {"seeds": (1,), "own_temperature": 0.5}
NO_PASSAGES = {"texts": ()}
NO_OWN = {"own_temperature": None, "top_k": (0,), "lengths": (24,)}
NO_SPEED = {"speed": None, "models": ("demo:llama", "some/folder")}
ONE_TEMPERATURE = {"temperatures": (1.0,), "logit_temperatures": (1.0,)}
FEW_ARMS = {"arms": DESIGN.arms[:1] + DESIGN.arms[6:7]}
CUT = {"top_k": (50, 0), "lengths": (1, 3)}


@pytest.mark.parametrize(
    "changes",
    [ONE_PROMPT, ONE_SEED, NO_PASSAGES, NO_OWN, NO_SPEED, ONE_TEMPERATURE, FEW_ARMS, CUT,
     {**ONE_PROMPT, **ONE_SEED, **NO_PASSAGES}],
)  # fmt: skip
def test_whatever_a_study_lacks_it_has_tables(changes, tmp_path):
    small = {"prompts": DESIGN.prompts[:3], "texts": DESIGN.texts[:2], "bootstrap_draws": 100}
    design = replace(DESIGN, **{**small, **changes})
    bodies = cells(design)
    if design.own_temperature is None:
        for body in bodies.values():
            body["texts"] = [text for text in body.get("texts", ()) if text["source"] == "held"]
    tables = make_tables(design, bodies)
    missing = {"speed", "speed_rounds"} if design.speed is None else set()
    assert set(tables) == set(TABLES) - missing
    both = [*tables["verdicts"]["claim"], *tables["speed_verdicts"]["claim"]]
    assert len(both) == 11 * len(design.models)
    write_tables(tmp_path, tables)


def test_texts_without_a_token_and_arms_without_figures():
    design = replace(DESIGN, prompts=DESIGN.prompts[:3], texts=(), bootstrap_draws=100)
    bodies = cells(design)
    for name, body in bodies.items():
        for row in body.get("generations", ()):
            row |= {"ids": [], "text": "", "finish": "eos", "token_nll": [], "nll_reference": None}
        if name[1] != "speed":
            body["texts"], body["weights"] = [], []
            body["memory"] = dict.fromkeys(body["memory"])
    tables = make_tables(design, bodies)
    assert len(tables["summary"]) == 0 and "estimate" in tables["summary"]
    assert at(tables["generation"], measure="rep_4")["estimate"].isna().all()
    assert not (tables["verdicts"]["verdict"] == "confirmed").any()
