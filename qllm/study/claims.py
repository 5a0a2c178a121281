"""The claims of arXiv 2309.05210 and how each is tested, fixed before anything is measured.

Only the abstract of the paper is available, so "quality" and "sensitivity" are defined here, not
there. A design may change margins and what is primary; `verdicts.py` makes the tests.
"""

from __future__ import annotations

from collections.abc import Mapping

from .parts import Claim

CLAIMS = {
    "C1a": "nf4 and fp4 are equally fast",
    "C1b": "nf4 and fp4 need the same memory",
    "C1c": "nf4 and fp4 give the same quality",
    "C2": "on Llama 2, nf4 withstands changes of a low temperature better than fp4",
    "C3": "on Falcon, fp4 and fp4-dq are the better choice",
    "C4": "4-bit models are more sensitive to temperature from 0.5 to 0.8 than the original",
    "C5": "int8 is clearly slower than the original",
    "C6": "the original in bf16 is the fastest",
    "C7": "the 4-bit formats differ from each other as the temperature varies",
    "C8": "quantized models perform about as well as their original",
    "C9": "top_k and max_new_tokens change how quantized models respond",
}
"""Claims of the paper (its abstract, in both wordings that are known), in our words."""

DEFAULT_CLAIMS: Mapping[str, Claim] = {
    "C1a": Claim("equivalence", {"tokens_per_second": 0.05}),
    "C1b": Claim("equivalence", {"bytes": 0.02}),
    "C1c": Claim("equivalence", {"ln_ppl": 0.01, "rep_4": 0.01}),
    "C2": Claim("greater", {"slope_nll": 0.1, "slope_rep_4": 0.05}),
    "C3": Claim(
        "greater",
        {"slope_nll": 0.1, "slope_rep_4": 0.05, "distance_nll": 0.05, "distance_rep_4": 0.01},
    ),
    "C4": Claim(
        "greater",
        {"contrast_disagreement": 0.002, "interaction_nll": 0.1, "interaction_rep_4": 0.05},
    ),
    "C5": Claim("greater", {"tokens_per_second": 0.05}),
    "C6": Claim("greater", {"tokens_per_second": 0.0}),
    "C7": Claim("permutation", {"curves_disagreement": 0.005, "curves_nll": 0.05}),
    "C8": Claim("equivalence", {"ln_ppl": 0.01, "nll": 0.05, "loops": 0.05}, primary=False),
    "C9": Claim(
        "interaction",
        {"top_k_nll": 0.05, "top_k_rep_4": 0.01, "length_nll": 0.05, "length_rep_4": 0.01},
        primary=False,
    ),
}
"""Test, endpoints with their margins, and whether it is primary, unless a design says otherwise.

The endpoints, the interval of which decides:

* C1a, C5, C6: ratio of tokens per second when decoding alone; C1b: ratio of bytes.
* C1c: difference of ln perplexity, and of rep-4 (mean over temperatures).
* C2: slope of NLL and of rep-4 from 0.1 to 0.5, fp4 minus nf4. C3: the same, nf4 minus fp4, and the
  largest distance from the reference's curve, nf4 minus fp4; both also for double quantization.
* C4: for every 4-bit arm, 1 - agreement in the band minus around it, and the extra slope of NLL or
  rep-4 in the band over the reference's.
* C7: curves of 1 - agreement and of NLL: a permutation test of the arms' labels; the margin is the
  largest difference at any temperature that would still be none.
* C8: difference of ln perplexity, NLL and rate of loops of greedy texts (with McNemar's test).
* C9: how the difference between arm and reference changes with top_k and with length.
"""

SPEED_CLAIMS = ("C1a", "C5", "C6")
"""Claims that are tested by timing."""

TEXT_CLAIMS = ("C1c", "C2", "C3", "C4", "C7", "C8", "C9")
"""Claims that are tested on generated texts, alone or beside logits."""

VERDICTS = ("confirmed", "refuted", "inconclusive", "not testable")
