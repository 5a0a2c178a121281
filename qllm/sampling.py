"""Drawing tokens from logits, and comparing two rows of logits exactly; the arithmetic is in C.

A draw is `argmax_i (logit_i / temperature + g_i)` with standard Gumbel noise `g_i` that depends on
(seed, prompt, step, token id) alone: an exact sample of the softmax, and the same noise for every
arm, every temperature and every place in a batch. docs/sampling.md has the definitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from . import _core


class Sampled(NamedTuple):
    """What `sample` drew: arrays (n,), or plain numbers for one row of logits."""

    tokens: Any
    """int64; the token ids."""
    logprobs: Any
    """float32; natural log of softmax(logits)[token] of the logits as they were given."""
    sampling_logprobs: Any
    """float32; natural log of the token's probability in the distribution it was drawn from, after
    all processors; 0 at temperature 0."""


def sample(
    logits: Any,
    *,
    temperature: Any = 1.0,
    top_k: Any = None,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    repetition_penalty: Any = 1.0,
    seed: Any = 0,
    prompt: Any = 0,
    step: Any = 0,
    keep_ties: Any = False,
    history: Any = None,
    threads: int | None = None,
) -> Sampled:
    """Draws the next token of each row of `logits`, (vocab,) or (n, vocab) float32.

    Each parameter is one value, or a sequence with one for each row. The processors act in the
    order of Hugging Face transformers, whatever the order of the arguments:

    * `repetition_penalty` > 0: the logit of a token in `history` is divided by it where positive,
      else multiplied, once however often the token came (Keskar et al. 2019);
    * `temperature` >= 0: divides the logits; 0 is greedy, the lowest id among equal logits;
    * `top_k`: keeps the k largest, among equals the lower ids, or with `keep_ties` all that equal
      the k-th; None or 0 keeps all;
    * `top_p` in (0, 1]: keeps the fewest largest probabilities that sum to at least top_p
      (Holtzman et al. 2020);
    * `min_p` in [0, 1]: keeps probabilities of at least min_p times the largest (arXiv 2407.01082).

    `seed` and `prompt` (0 to 2^64 - 1) and `step` (0 to 2^32 - 1) name the noise: the Philox4x32-10
    word of (seed, prompt, step, token id) gives u, and g = -log(-log(u)). Booleans are not taken as
    integers. `history` holds token ids: one sequence for one row or shared by all rows, or a
    sequence of n of them, any of which may be None. Long batches are spread over `threads` (None:
    QLLM_THREADS, or all processors); results do not depend on how many.

    A logit of -inf is a token that cannot be drawn. Raises `QllmValueError` for NaN, +inf, rows
    that are all -inf, and every argument outside its range.
    """
    return Sampled(
        *_core.sample(
            logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            prompt=prompt,
            step=step,
            keep_ties=keep_ties,
            history=history,
            threads=threads,
        )
    )


LOGITS_DTYPES = ("float32", "bfloat16")
"""To what `round_logits` rounds."""


def round_logits(logits: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 logits, rounded to `dtype` and back: "float32" leaves them as they are, "bfloat16"
    rounds to the nearest, ties to even, as a model does that returns its logits in bfloat16."""
    if dtype == "float32":
        return logits
    bits = np.ascontiguousarray(logits, np.float32).view(np.uint32)
    nan = np.isnan(logits)
    rounded = bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))
    rounded &= np.uint32(0xFFFF0000)
    return np.where(nan, logits, rounded.view(np.float32))


@dataclass(frozen=True, eq=False)
class LogitStats:
    """How test differs from ref at each temperature: float64 arrays (n, n_temperatures), or
    (n_temperatures,) for one row. p = softmax(ref / T), q = softmax(test / T)."""

    temperatures: np.ndarray
    """(n_temperatures,) float64."""
    kl: np.ndarray
    """KL(p || q) = sum p log(p / q) in nats; inf where q excludes what p can draw."""
    kl_reverse: np.ndarray
    """KL(q || p) in nats."""
    tv: np.ndarray
    """Total variation, 0.5 sum |p - q|."""
    disagreement: np.ndarray
    """1 - agreement, computed without cancellation."""
    entropy_ref: np.ndarray
    """H(p) in nats."""
    entropy_test: np.ndarray
    """H(q) in nats."""
    max_ref: np.ndarray
    """The largest probability of p."""
    delta_p: np.ndarray
    """q[target] - p[target]; 0 without a target."""
    cross: np.ndarray
    """sum q ref: the mean under q of the reference's logits; -inf where q can draw what the
    reference cannot. With log_z_ref it gives KL(q at T || p at any T') as
    -entropy_test(T) - cross(T) / T' + log_z_ref(T')."""
    log_z_ref: np.ndarray
    """log sum exp(ref / T); at temperature 0 its limit, inf with the sign of the largest logit."""
    same_top: np.ndarray = field(repr=False)
    """(n,) bool, or one bool for one row: whether the argmax, lowest id among equals, is one."""

    @property
    def agreement(self) -> np.ndarray:
        """Probability that p and q draw the same token from the same noise, as `sample` does:
        sum_i 1 / sum_j max(p_j / p_i, q_j / q_i)."""
        return 1.0 - self.disagreement


def logit_stats(
    ref: Any,
    test: Any,
    temperatures: float | Sequence[float] | np.ndarray,
    targets: Any = None,
    threads: int | None = None,
    decoder: Any = None,
) -> LogitStats:
    """Compares the distributions of two arrays of logits, (vocab,) or (n, vocab) float32, at every
    temperature, exactly and without sampling.

    `temperatures`: finite numbers >= 0, where 0 is the one-hot argmax. `targets`: the right tokens,
    (n,) integers (a number for one row; -1 for none), for `delta_p`. Sums are in float64; equal
    rows give exactly 0 in every difference. The agreement follows from Gumbel coupling
    (arXiv 2408.07978); docs/sampling.md derives the form used. Many rows are spread over `threads`
    (None: QLLM_THREADS, or all processors), or computed on the device of `decoder`
    (`Model.decoder`) where it offers that; results depend on neither.

    Raises `QllmValueError` for NaN, +inf, rows that are all -inf, shapes that differ, and
    temperatures or targets outside their range.
    """
    arrays = _core.logit_stats(ref, test, temperatures, targets, threads=threads, decoder=decoder)
    same_top = arrays.pop("same_top").astype(bool)
    return LogitStats(
        temperatures=np.atleast_1d(np.array(temperatures, np.float64)),
        same_top=same_top if arrays["kl"].ndim == 2 else same_top[0],
        **arrays,
    )
