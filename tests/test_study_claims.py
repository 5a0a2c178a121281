"""How verdicts are put together from endpoints."""

from qllm.study.claims import _c4_verdict, overall
from qllm.study.tables import logit_clusters


def test_verdicts_are_put_together():
    assert _c4_verdict(["confirmed", "refuted", "confirmed"]) == "confirmed"
    assert _c4_verdict(["confirmed", "refuted", "refuted"]) == "refuted"
    assert _c4_verdict(["refuted", "confirmed", "confirmed"]) == "refuted"
    assert _c4_verdict(["confirmed", "inconclusive", "refuted"]) == "inconclusive"
    assert overall(["confirmed", "refuted"]) == "refuted"
    assert overall(["confirmed", "inconclusive"]) == "inconclusive"
    assert overall(["confirmed", "confirmed"]) == "confirmed"
    assert overall(["not tested"]) == "not tested"


def _text(source, name, tokens, kl):
    curve = [kl, 2 * kl]
    names = ("kl", "entropy_ref", "entropy_test", "delta_p_squared")
    return {
        "source": source,
        "id": name,
        "tokens": tokens,
        "same_top": 1.0,
        "ln_ppl_ratio": kl,
        "curves": {name: curve for name in names},
    }


def test_a_prompt_counts_once_and_its_texts_by_their_tokens():
    texts = [_text("own", "a", 30, 1.0), _text("own", "a", 10, 5.0), _text("held", "a", 99, 4.0)]
    assert logit_clusters(texts, "all", "kl").tolist() == [[2.0, 4.0], [4.0, 8.0]]
    assert logit_clusters(texts, "own", "kl").tolist() == [[2.0, 4.0]]
    assert logit_clusters(texts, "held", "ln_ppl_ratio").tolist() == [4.0]
    assert logit_clusters(texts, "all", "entropy_shift").tolist() == [[0.0, 0.0], [0.0, 0.0]]
