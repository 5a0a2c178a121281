"""A model for the language model evaluation harness (lm-eval, `lm_eval`).

    import lm_eval
    from qllm.integrations.lm_eval import QllmLM

    lm_eval.simple_evaluate(model=QllmLM("demo:llama", quantization="nf4"), tasks=[...])

Contexts that begin alike, such as the examples of a few-shot task, are computed once, and all
answers to a question share its keys and values. Results do not depend on `batch_size`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from .. import _core
from ..config import GenerationConfig
from ..errors import QllmValueError
from ..generation import Request, host_threads
from ..model import Model
from ..strict_json import quoted
from .chat import ChatTemplates, Message
from .prefix import common_length

LOGITS = 1 << 24
"""float32 values of logits that are held at a time."""

_DRAWING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "do_sample", "seed")
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

Scored = tuple[Any, list[int], list[int]]
"""What was asked (None: a window of a text), and the token ids of context and continuation."""


@dataclass
class _Question:
    """A continuation to be scored: its place among the requests, all input ids and the ids that are
    predicted, which stand behind the last of `given` inputs and the following ones."""

    place: int
    inputs: tuple[int, ...]
    targets: list[int]

    @property
    def given(self) -> tuple[int, ...]:
        """The inputs before the first position that is scored."""
        return self.inputs[: len(self.inputs) - len(self.targets)]


@register_model("qllm")
class QllmLM(TemplateLM):
    """A `Model`, or a folder or name that `Model.from_pretrained` loads with `options`.

    `batch_size` answers are computed together. `max_length` are the positions of a window (None:
    the model's), `max_gen_toks` the tokens that are generated where a task does not say.
    `add_bos_token` False leaves out the special tokens that the tokenizer adds, None leaves it to
    the tokenizer. `prefix_token_id` stands before texts without a context (None: the model's BOS,
    else its EOS). `progress` shows a bar.

    From the command line of lm-eval, after `import qllm.integrations.lm_eval`, the name is "qllm"
    and `pretrained` the folder.
    """

    def __init__(
        self,
        pretrained: Model | str,
        *,
        batch_size: int | str = 16,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        progress: bool = True,
        max_batch_size: Any = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        del max_batch_size  # lm-eval passes it to every model; the size here is one number
        if device is not None:
            options["device"] = device
        if isinstance(pretrained, Model):
            if options:
                raise QllmValueError(
                    f"the options {', '.join(options)} are for a model that is loaded here; a "
                    "Model was given"
                )
            self.model = pretrained
        else:
            self.model = Model.from_pretrained(pretrained, **options)
        vocab = self.model.architecture.decoder["vocab"]
        positions = self.model.architecture.decoder["max_positions"]
        self.batch_size = _whole("batch_size", batch_size, 1, 1 << 20)
        self.max_length = _whole("max_length", max_length or positions, 2, positions)
        self.max_gen_toks = _whole("max_gen_toks", max_gen_toks, 1, positions - 1)
        self._add_bos_token = add_bos_token
        self._prefix = prefix_token_id
        if prefix_token_id is not None:
            _whole("prefix_token_id", prefix_token_id, 0, vocab - 1)
        self._progress = progress

    # ------------------------------------------------------------------------------- tokens

    @property
    def eot_token_id(self) -> int:
        """The model's first EOS."""
        if not self.model.eos_token_id:
            raise QllmValueError(f"{self.model.name} names no eos_token_id; pass prefix_token_id")
        return self.model.eos_token_id[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        if self._prefix is not None:
            return self._prefix
        stored = self.model.checkpoint.config.get("bos_token_id")
        return stored if type(stored) is int else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Folder and digest of the tokenizer, by which lm-eval names what it has cached."""
        path = self.model.tokenizer.path
        digest = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
        return f"{path.parent.name}__{digest}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """Token ids; special tokens are not added to a text that begins with BOS."""
        wanted = self._add_bos_token if add_special_tokens is None else add_special_tokens
        if wanted is None:
            bos = self.model.decode([self.prefix_token_id], skip_special_tokens=False)
            wanted = not (bos and string.startswith(bos))
        return self.model.tokenizer.encode(string, add_special_tokens=wanted)

    # ------------------------------------------------------------------------------- scoring

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        questions = [self._question(place, *ids) for place, (_, *ids) in enumerate(requests)]
        questions.sort(key=lambda question: question.inputs)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        quiet = disable_tqdm or not self._progress
        with tqdm(total=len(requests), desc="qllm", disable=quiet) as bar:
            for chunk, sequences in self._prepared(questions):
                for question, answer in zip(chunk, self._score(chunk, sequences)):
                    results[question.place] = answer
                    asked = requests[question.place][0]
                    if asked is not None:  # windows of a text are cached as a whole
                        self.cache_hook.add_partial("loglikelihood", asked, answer)
                bar.update(len(chunk))
        return results

    def _question(self, place: int, context: list[int], continuation: list[int]) -> _Question:
        if not context or not continuation:
            raise QllmValueError(
                f"request {place}: a context of {len(context)} and a continuation of "
                f"{len(continuation)} tokens; both need one at least"
            )
        if len(continuation) > self.max_length:
            raise QllmValueError(
                f"request {place}: a continuation of {len(continuation)} tokens, but there are "
                f"{self.max_length} positions"
            )
        inputs = (context + continuation)[-(self.max_length + 1) : -1]
        return _Question(place, tuple(inputs), continuation)

    def _prepared(
        self, questions: Sequence[_Question]
    ) -> Iterator[tuple[Sequence[_Question], list[Any]]]:
        """Questions in chunks, each with a sequence that holds what is given. The given ids are in
        ascending order, so that what neighbours share is computed once."""
        held: tuple[int, ...] = ()
        sequence = self.model.decoder.sequence()
        for start in range(0, len(questions), self.batch_size):
            chunk, sequences = questions[start : start + self.batch_size], []
            for question in chunk:
                kept = common_length(held, question.given)
                if kept < len(held):
                    sequence.truncate(kept)
                held = question.given
                self._read(sequence, held[kept:])
                sequences.append(sequence.fork())
            yield chunk, sequences

    def _read(self, sequence: Any, ids: Sequence[int]) -> None:
        if ids:
            nothing = np.zeros(len(ids), bool)
            self.model.decoder.step([sequence] * len(ids), np.array(ids, np.int64), nothing)

    def _score(
        self, questions: Sequence[_Question], sequences: Sequence[Any]
    ) -> list[tuple[float, bool]]:
        """Sums of log-probabilities, and whether each target has the largest logit."""
        decoder = self.model.decoder
        rows = [seq for seq, q in zip(sequences, questions) for _ in q.targets]
        tokens = np.array([id for q in questions for id in q.inputs[len(q.given) :]], np.int64)
        targets = np.array([id for q in questions for id in q.targets], np.int64)
        logprobs, largest = np.empty(len(rows)), np.empty(len(rows), bool)
        piece = max(1, LOGITS // self.model.architecture.decoder["vocab"])
        threads = host_threads(decoder)
        for start in range(0, len(rows), piece):
            part = slice(start, start + piece)
            logits = decoder.step(rows[part], tokens[part])
            logprobs[part] = _core.logprobs(logits, targets[part], threads=threads)
            largest[part] = logits.argmax(axis=1) == targets[part]
        ends = np.cumsum([len(q.targets) for q in questions])
        return [
            (float(logprobs[end - len(q.targets) : end].sum()),
             bool(largest[end - len(q.targets) : end].all()))
            for q, end in zip(questions, ends)
        ]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of `max_length` as lm-eval cuts them."""
        windows: list[Scored] = []
        counts = []
        for (text,) in (request.args for request in requests):
            cut = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [utils.make_disjoint_window(window) for window in cut]
            windows += [(None, context, continuation) for context, continuation in parts]
            counts.append(len(parts))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        sums = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, sums):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    # ------------------------------------------------------------------------------ generation

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The texts that follow the contexts, up to a string of `until`, an EOS or `max_gen_toks`.
        Greedy, unless a task asks for draws."""
        asked = [self._request(request.args[0], request.args[1]) for request in requests]
        quiet = disable_tqdm or not self._progress
        with tqdm(total=len(asked), desc="qllm", disable=quiet) as bar:
            found = self.model.generate_batch(
                asked, batch_size=self.batch_size, progress=lambda *_: bar.update()
            )
        texts = [str(generation) for generation in found]
        for request, text in zip(requests, texts):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _request(self, context: str, options: Mapping[str, Any]) -> Request:
        words = dict(options)
        until = words.pop("until", None) or []
        lengths = [words.pop(name) for name in _LENGTHS if name in words]
        length = _whole("max_gen_toks", (lengths or [self.max_gen_toks])[0], 1, self.max_length - 1)
        unknown = [name for name in words if name not in _DRAWING]
        if unknown:
            raise QllmValueError(
                f"the task's generation_kwargs have {', '.join(map(quoted, unknown))}, which has "
                f"no meaning here; there are until, {', '.join((*_LENGTHS, *_DRAWING))}"
            )
        # as transformers has it: no draw unless it is asked for
        drawn = words.pop("do_sample", words.get("temperature", 0) > 0)
        neutral = {"temperature": 1.0, "top_k": 0}
        config = GenerationConfig(
            **{**neutral, **words},
            do_sample=drawn,
            max_new_tokens=length,
            stop=tuple([until] if isinstance(until, str) else until),
        )
        ids = self.tok_encode(context)[-(self.max_length - length) :]
        return Request(ids, config)

    # ---------------------------------------------------------------------------------- chats

    @cached_property
    def _chats(self) -> ChatTemplates:
        return ChatTemplates(self.model.checkpoint)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that is used: True the folder's, a name one of several, False none."""
        self._template_name = chat_template if isinstance(chat_template, str) else None
        return self._chats.choose(self._template_name) if chat_template else None

    _template_name: str | None = None

    def apply_chat_template(
        self, chat_history: Sequence[Message], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the text that the model was trained on."""
        return self._chats.render(chat_history, add_generation_prompt, self._template_name)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        info = self.model.info()
        return {
            "model_name": info.name, "formats": self.model.formats, "device": info.device,
            "compute": info.compute, "kernels": info.kernels,
        }


def _whole(name: str, value: Any, low: int, high: int) -> int:
    """An integer, also as the text that a command line gives."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if type(number) is not int or not low <= number <= high:
        raise QllmValueError(
            f"{name} is {quoted(value)}; an integer from {low} to {high} was expected"
        )
    return number
