"""Trains a small language model on text files and writes it as a Hugging Face folder in bf16.

    python scripts/train_demo.py tinystories_val.txt --family llama --out qllm/demo/llama

The two models of qllm.demo were made by this script (qllm/demo/CARD.md has the commands and the
results). The models are those of transformers itself, so the folder is exactly what transformers
writes: config.json, generation_config.json, model.safetensors, tokenizer.json and
tokenizer_config.json. Needs torch, transformers and tokenizers (pip install "qllm[test]").

A text is cut into stories, the last ones are held out, and training keeps the weights that do best
on them. The held-out stories take no part in the training, the tokenizer included. The text is
small for a model of this size, so over-fitting is what the settings work against: dropout, weight
decay, a running average of the weights, and (option) varied tokenization. The first steps see short
pieces, which is faster; the held-out loss is always that of full pieces, so it drops when the
pieces become full: a model does not know positions that it has not seen. Numbers are the same in
every run on one kind of machine: seeds are fixed and one thread computes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

SEPARATOR = "<|endoftext|>"
"""Ends a story in the text files of TinyStories that mark where stories end."""

OPENING = re.compile(
    r"Once upon a time|Once,|Once there w|There (once )?was once|There once w|Long ago"
    r"|One day, an? "
    r"|[A-Z]\w+ and [A-Z]\w+ (are|were|like|liked|love|loved|live|lived) "
    r"|[A-Z]\w+ (is|was) an? "
)
"""How the first paragraph of a story begins, for files that do not mark where stories end."""

PLAIN = {"â€œ": '"', "â€™": "'", "â€˜": "'", "â€Š": " ", "â€": '"', "“": '"', "”": '"'}
"""Typographic quotes, whole or damaged by a wrong decoding, and what replaces them."""

ENDS = {"llama": ("<|begin_of_text|>", "<|end_of_text|>"), "falcon": (SEPARATOR, SEPARATOR)}
"""The tokens before and after a text: two as in Llama 3, or one for both as in Falcon."""

IGNORED = -100  # target of a position that is padding


@dataclass
class Corpus:
    """Stories as texts, and the tokenizer made from those which are trained on."""

    train: list[str]
    held_out: list[str]
    tokenizer: Tokenizer
    bos: int
    eos: int

    def encode(self, stories: list[str]) -> list[list[int]]:
        """The ids of each story between the token that begins and the token that ends a text."""
        found = self.tokenizer.encode_batch(stories, add_special_tokens=False)
        return [[self.bos, *story.ids, self.eos] for story in found]


def read_stories(paths: list[Path]) -> list[str]:
    """The stories of all files in order. Without separators in a file, a paragraph that opens like
    a story begins a new one, except straight after an opening paragraph."""
    stories: list[str] = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for odd, plain in PLAIN.items():
            text = text.replace(odd, plain)
        if SEPARATOR in text:
            stories += [story.strip() for story in text.split(SEPARATOR)]
        else:
            stories += group_paragraphs(text)
    return [story for story in stories if story]


def group_paragraphs(text: str) -> list[str]:
    """Stories from paragraphs that are parted by empty lines."""
    stories: list[list[str]] = []
    for paragraph in filter(None, (part.strip() for part in text.split("\n\n"))):
        opens = OPENING.match(paragraph) is not None
        follows = bool(stories) and len(stories[-1]) == 1 and not paragraph.startswith("Once upon")
        if not stories or (opens and not follows):
            stories.append([])
        stories[-1].append(paragraph)
    return ["\n\n".join(story) for story in stories]


def split(stories: list[str], held_out: float) -> tuple[list[str], list[str]]:
    """The first stories to train on and, whole, the last ones, which have at least the fraction
    `held_out` of all characters."""
    if len(stories) < 2:
        raise SystemExit("the text has fewer than two stories, so that none can be held out")
    wanted = held_out * sum(map(len, stories))
    kept = len(stories)
    while kept > 1 and sum(map(len, stories[kept:])) < wanted:
        kept -= 1
    return stories[:kept], stories[kept:]


def build_tokenizer(stories: list[str], family: str, vocab: int) -> Tokenizer:
    """Byte-level BPE: any text can be written in it and read back unchanged. The Llama family puts
    its first token in front of a text, Falcon does not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(ENDS[family]))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise SystemExit(
            f"the text gives {tokenizer.get_vocab_size()} tokens, not the --vocab of {vocab}"
        )
    if family == "llama":
        bos = special[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return tokenizer


def read_corpus(arguments: argparse.Namespace) -> Corpus:
    """Reads, splits, and makes the tokenizer or takes that of the folder to start from."""
    train, held_out = split(read_stories(arguments.text), arguments.held_out)
    if arguments.start:
        tokenizer = Tokenizer.from_file(str(arguments.start / "tokenizer.json"))
    else:
        tokenizer = build_tokenizer(train, arguments.family, arguments.vocab)
    bos, eos = (tokenizer.token_to_id(token) for token in ENDS[arguments.family])
    return Corpus(train, held_out, tokenizer, bos, eos)


def build_model(arguments: argparse.Namespace, corpus: Corpus) -> nn.Module:
    """The model of the folder to start from, or an untrained one: a Llama with grouped heads and
    an output matrix of its own, or a Falcon as Falcon-7B is: one key/value head, parallel block,
    output matrix tied to the embedding."""
    if arguments.start:
        return AutoModelForCausalLM.from_pretrained(arguments.start, dtype=torch.float32).train()
    common = dict(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        max_position_embeddings=arguments.context,
        bos_token_id=corpus.bos,
        eos_token_id=corpus.eos,
        initializer_range=0.04,
        use_cache=True,
    )
    if arguments.family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                **common,
                intermediate_size=arguments.intermediate,
                num_key_value_heads=arguments.kv_heads,
                hidden_act="silu",
                rms_norm_eps=1e-5,
                tie_word_embeddings=False,
            )
        )
    return FalconForCausalLM(
        FalconConfig(
            **common,
            ffn_hidden_size=arguments.intermediate,
            multi_query=True,
            parallel_attn=True,
            new_decoder_architecture=False,
            bias=False,
            alibi=False,
            activation="gelu",
            tie_word_embeddings=True,
        )
    )


def add_dropout(model: nn.Module, rate: float) -> None:
    """Dropout on the embedding and on what each block adds to the residual stream. The classes of
    transformers have no such option for Llama; hooks leave the saved model untouched."""

    def drop(module: nn.Module, _: object, output: Tensor) -> Tensor:
        return functional.dropout(output, rate, training=module.training)

    ends = ("embed_tokens", "word_embeddings", "o_proj", "down_proj", "dense", "dense_4h_to_h")
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in ends:
            module.register_forward_hook(drop)


def streams(corpus: Corpus, seed: int, varied: float) -> Iterator[list[int]]:
    """Endless passes over the stories to train on, each shuffled anew and joined to one list of
    ids. In every second pass each merge of the tokenizer is left out with probability `varied`
    (BPE-dropout, Provilkov et al., arXiv 1910.13267)."""
    order = random.Random(seed)
    plain = corpus.encode(corpus.train)
    varying = copy.deepcopy(corpus)
    varying.tokenizer.model.dropout = varied or None
    vary = False
    while True:
        stories = list(varying.encode(corpus.train) if vary else plain)
        order.shuffle(stories)
        yield [token for story in stories for token in story]
        vary = bool(varied) and not vary


class Batches:
    """Draws the batches of a training: pieces of the stream of stories, in random order."""

    def __init__(self, corpus: Corpus, arguments: argparse.Namespace) -> None:
        self._streams = streams(corpus, arguments.seed, arguments.bpe_dropout)
        self._order = random.Random(arguments.seed)
        self._left: list[list[int]] = []

    def draw(self, pieces: int, length: int) -> Tensor:
        """(pieces, length + 1) ids; a piece's last id is only a target. A change of length starts a
        new pass."""
        if self._left and len(self._left[0]) != length + 1:
            self._left = []
        while len(self._left) < pieces:
            ids = next(self._streams)
            starts = range(self._order.randrange(length), len(ids) - length, length)
            if not starts:
                raise SystemExit(f"the text has {len(ids)} tokens, too few for pieces of {length}")
            fresh = [ids[start : start + length + 1] for start in starts]
            self._order.shuffle(fresh)
            self._left = fresh + self._left
        batch, self._left = self._left[-pieces:], self._left[:-pieces]
        return torch.tensor(batch)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(batch, length, vocab) float32; matrices are multiplied in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=ids, use_cache=False).logits.float()


def held_out_pieces(corpus: Corpus, context: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets of the held-out stories, in batches. A story longer than the context goes
    on in a next piece, which starts without memory; every id but the first is a target once."""
    pieces = [
        torch.tensor(story[start : start + context + 1])
        for story in corpus.encode(corpus.held_out)
        for start in range(0, len(story) - 1, context)
    ]
    pieces.sort(key=len)
    batches = []
    for first in range(0, len(pieces), 8):
        group = pieces[first : first + 8]
        pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
        inputs = pad([piece[:-1] for piece in group], padding_value=corpus.eos)
        batches.append((inputs, pad([piece[1:] for piece in group], padding_value=IGNORED)))
    return batches


@torch.no_grad()
def held_out_nats(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """The negative log-probability of all held-out ids, in nats, and their number."""
    model.eval()
    nats, count = 0.0, 0
    for inputs, targets in batches:
        row = logits(model, inputs).flatten(0, 1)
        nats += functional.cross_entropy(
            row, targets.flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
        count += int((targets != IGNORED).sum())
    model.train()
    return nats, count


def optimizer_of(model: nn.Module, rate: float, decay: float) -> torch.optim.AdamW:
    """AdamW; the vectors of the norms do not decay."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: a linear rise over a twentieth, then half a cosine to 1 %."""
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2


def train(arguments: argparse.Namespace, corpus: Corpus, model: nn.Module) -> None:
    """Trains `model`, prints a line of numbers at each look at the held-out stories, and writes the
    running average of the weights whenever it is better than before."""
    average = copy.deepcopy(model)
    add_dropout(model, arguments.dropout)
    optimizer = optimizer_of(model, arguments.lr, arguments.weight_decay)
    source = Batches(corpus, arguments)
    held_out = held_out_pieces(corpus, arguments.context)
    lowest, losses, tokens, start = math.inf, [], 0, time.monotonic()
    print("  step   tokens   train  held-out nats/token  nats/byte  bits/byte  seconds")
    for step in range(1, arguments.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * schedule(step - 1, arguments.steps)
        short = step <= arguments.short * arguments.steps
        length = arguments.piece if short else arguments.context
        batch = source.draw(max(1, arguments.batch // length), length)
        losses.append(train_step(model, optimizer, batch))
        tokens += batch[:, 1:].numel()
        update_average(average, model, min(arguments.average, 1 - 1 / (step + 1)))
        last = step == (arguments.until or arguments.steps)
        if step % arguments.every and not last:
            continue
        nats, count = held_out_nats(average, held_out)
        print(
            f"{step:6d} {tokens:8d} {sum(losses) / len(losses):7.4f} {nats / count:20.4f} "
            f"{bytewise(nats, corpus)} {time.monotonic() - start:8.0f}",
            flush=True,
        )
        losses.clear()
        if nats < lowest:
            lowest = nats
            save(average, corpus, arguments)
        if last:
            return


def bytewise(nats: float, corpus: Corpus) -> str:
    """Nats and bits per byte of the held-out text, as printed."""
    per_byte = nats / sum(len(story.encode()) for story in corpus.held_out)
    return f"{per_byte:10.4f} {per_byte / math.log(2):10.4f}"


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> float:
    """One step on a batch of ids; its mean loss in nats per token."""
    predicted, targets = logits(model, batch[:, :-1]), batch[:, 1:]
    loss = functional.cross_entropy(predicted.flatten(0, 1), targets.flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, keep: float) -> None:
    """average = keep * average + (1 - keep) * weights."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)


def save(model: nn.Module, corpus: Corpus, arguments: argparse.Namespace) -> None:
    """Writes the five files, the weights rounded to bf16."""
    folder: Path = arguments.out
    bos, eos = ENDS[arguments.family]
    saved = copy.deepcopy(model).to(torch.bfloat16)
    saved.generation_config = GenerationConfig(
        bos_token_id=corpus.bos, eos_token_id=corpus.eos, pad_token_id=corpus.eos
    )
    saved.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    corpus.tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "model_max_length": arguments.context,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def report(corpus: Corpus, arguments: argparse.Namespace) -> None:
    """Prints the held-out numbers of the folder that was written."""
    model = AutoModelForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    nats, count = held_out_nats(model, held_out_pieces(corpus, arguments.context))
    print(
        f"saved in bf16: {nats / count:.4f} nats/token, perplexity {math.exp(nats / count):.3f}, "
        f"nats and bits per byte {bytewise(nats, corpus)} ({count} tokens held out)"
    )


def parse(words: list[str] | None) -> argparse.Namespace:
    """The options in `words`, or of the command line, with the defaults of the family."""
    parser = argparse.ArgumentParser(
        description="Train a small Llama or Falcon on text and write a Hugging Face folder (bf16).",
        epilog="example: python scripts/train_demo.py tinystories_val.txt --family llama --out out",
    )

    def number(name: str, default: float, meaning: str) -> None:
        parser.add_argument(
            name, type=type(default), default=default, help=f"{meaning} (default {default})"
        )

    parser.add_argument("text", type=Path, nargs="+", help="UTF-8 text files")
    parser.add_argument("--family", choices=sorted(ENDS), required=True, help="kind of model")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, made if need be")
    parser.add_argument(
        "--start", type=Path, help="folder of this script to go on from; its sizes are kept"
    )
    number("--vocab", 1024, "tokens in the vocabulary, at least 258")
    number("--hidden", 192, "width of the model")
    number("--layers", 4, "blocks")
    number("--intermediate", 0, "width inside the MLP; 0: 512 for llama, 4 * hidden for falcon")
    number("--heads", 0, "attention heads; 0: 6 for llama, 3 for falcon")
    number("--kv-heads", 2, "key/value heads of a llama; a falcon has one")
    number("--context", 512, "tokens the model is made for")
    number("--piece", 128, "tokens in a piece of text at first, for speed")
    number("--short", 0.5, "share of the steps with pieces of that length")
    number("--batch", 2048, "tokens in a step")
    number("--steps", 2400, "training steps")
    number("--until", 0, "step to stop at before the learning rate has fallen; 0: the last one")
    number("--lr", 3e-3, "highest learning rate")
    number("--dropout", 0.15, "dropout on the embedding and the residual branches")
    number("--weight-decay", 0.3, "decay of AdamW, on matrices")
    number("--average", 0.995, "share that the running average of the weights keeps in a step")
    number("--bpe-dropout", 0.0, "share of the tokenizer's merges left out in every second pass")
    number("--held-out", 0.08, "fraction of the text that is held out, whole last stories")
    number("--every", 200, "steps between looks at the held-out loss")
    number("--seed", 1, "of weights, order and dropout")
    number("--threads", 1, "threads of torch; 1 gives the same numbers again")
    arguments = parser.parse_args(words)
    llama = arguments.family == "llama"
    arguments.intermediate = arguments.intermediate or (512 if llama else 4 * arguments.hidden)
    arguments.heads = arguments.heads or (6 if llama else 3)
    return arguments


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    torch.set_num_threads(arguments.threads)
    transformers.set_seed(arguments.seed)
    corpus = read_corpus(arguments)
    model = build_model(arguments, corpus)
    print(
        f"{sum(p.numel() for p in model.parameters())} parameters, {len(corpus.train)} stories to "
        f"train on, {len(corpus.held_out)} held out"
    )
    train(arguments, corpus, model)
    report(corpus, arguments)


if __name__ == "__main__":
    main()
