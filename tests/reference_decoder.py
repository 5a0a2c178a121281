"""A decoder in float64 NumPy, straight from the definitions, and random models to try it on.

One position after another, one head after another, with whole lists of keys and values: slow, and
with nothing in common with the way the C core does it.
"""

from __future__ import annotations

import math

import numpy as np

from qllm import _core

SIZES = {"vocab": 37, "hidden": 48, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16,
         "intermediate": 80, "max_positions": 96}


def inv_freq(rotary_dim: int, base: float = 10000.0) -> np.ndarray:
    exponent = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    return (np.float32(1) / np.float32(base) ** exponent).astype(np.float32)


def llama(**changes) -> dict:
    config = {**SIZES, "block": "serial", "norm": "rms", "norm_eps": 1e-5, "activation": "silu",
              "attention_scale": 0.25, "position": "rope", "rotary_dim": 16} | changes
    if config["position"] == "rope" and "rope_inv_freq" not in config:
        config["rope_inv_freq"] = inv_freq(config["rotary_dim"])
    return config


def falcon(**changes) -> dict:
    """Falcon 7B: parallel block, layer norm, one key-value head, fused query-key-value."""
    return llama(**{"block": "parallel", "norm": "layer", "activation": "gelu", "gated": False,
                    "fused_qkv": True, "kv_heads": 1, **changes})


def falcon_rw(**changes) -> dict:
    slopes = (2.0 ** -np.arange(1, 5)).astype(np.float32) * np.float32(1.37)
    return falcon(**{"block": "serial", "kv_heads": 4, "position": "alibi", "alibi_slopes": slopes,
                     "rotary_dim": None, **changes})


CONFIGS = {
    "llama": llama(),
    "one head each": llama(kv_heads=4),
    "odd sizes": llama(vocab=41, hidden=35, head_dim=10, rotary_dim=10, intermediate=57,
                       heads=6, kv_heads=3, attention_scale=0.3),
    "mistral": llama(sliding_window=np.array([5, 0], np.int64)),
    "window of one": llama(sliding_window=np.array([1, 17], np.int64)),
    "qwen3": llama(qk_norm=True),
    "partial rotation": llama(rotary_dim=6, rope_scale=1.25),
    "dynamic rope": llama(rope_dynamic_factor=2.0, rope_base=10000.0, rope_original_positions=8),
    "gelu_tanh gated": llama(activation="gelu_tanh"),
    "falcon 7b": falcon(),
    "falcon 40b": falcon(block="parallel2", kv_heads=2),
    "falcon rw": falcon_rw(),
    "many heads on one": falcon(heads=19, head_dim=8, rotary_dim=8),
    "many heads on one, alibi": falcon_rw(
        heads=18, kv_heads=1, head_dim=8,
        alibi_slopes=(1.5 ** -np.arange(1, 19)).astype(np.float32)),
}


def rounded(values: np.ndarray, fmt: str) -> np.ndarray:
    """The float32 values that a format keeps of a matrix."""
    return _core.quantize(values, fmt).dequantize()


def alibi_bias(slopes: np.ndarray, positions: int, head_dim: int) -> np.ndarray:
    """(heads, positions) float32: ALiBi with the roundings of Falcon in transformers."""
    places = rounded(np.arange(positions, dtype=np.float32)[None], "bf16")
    products = rounded(rounded(slopes[None], "bf16").T * places, "bf16")
    return products / np.float32(math.sqrt(head_dim))


class Weights:
    """Random weights for a config: float32 arrays by slot, and biases of linear layers."""

    def __init__(self, config: dict, fmt: str = "f32", seed: int = 0, biased: bool = True):
        rng = np.random.default_rng(seed)
        self.config, self.format = config, fmt
        decoder = _core.Decoder(config, threads=1)
        self.slots = decoder.slots()
        self.arrays: dict[str, np.ndarray] = {}
        self.biases: dict[str, np.ndarray] = {}
        for slot, shape in self.slots.items():
            if len(shape) == 2:
                values = rng.normal(0, 1.5 / math.sqrt(shape[1]), shape).astype(np.float32)
                self.arrays[slot] = rounded(values, fmt if slot != "embedding" else "f32")
                if biased and slot != "embedding":
                    self.biases[slot] = rng.normal(0, 0.1, shape[0]).astype(np.float32)
            else:
                near = 0.0 if slot.endswith("bias") else 1.0
                self.arrays[slot] = rng.normal(near, 0.2, shape).astype(np.float32)

    def decoder(self, **options) -> _core.Decoder:
        decoder = _core.Decoder(self.config, **options)
        for slot, array in self.arrays.items():
            if slot == "embedding":
                decoder.set_embedding(_core.quantize(array, "f32"))
            elif array.ndim == 1:
                decoder.set_vector(slot, array)
            else:
                decoder.set_linear(slot, _core.quantize(array, self.format), self.biases.get(slot))
        return decoder


class Reference:
    """The same model in float64; `step` takes one token and returns its logits."""

    def __init__(self, weights: Weights):
        self.c = weights.config
        self.arrays = {slot: a.astype(np.float64) for slot, a in weights.arrays.items()}
        self.biases = {slot: b.astype(np.float64) for slot, b in weights.biases.items()}
        self.keys = [[] for _ in range(self.c["layers"])]
        self.values = [[] for _ in range(self.c["layers"])]
        self.bias = np.zeros((self.c["heads"], self.c["max_positions"]))
        if self.c["position"] == "alibi":
            self.bias += alibi_bias(self.c["alibi_slopes"], self.c["max_positions"],
                                    self.c["head_dim"])

    def linear(self, slot: str, x: np.ndarray) -> np.ndarray:
        return self.arrays[slot] @ x + self.biases.get(slot, 0.0)

    def rms(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * x / np.sqrt(np.mean(x * x) + self.c["norm_eps"])

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        weight = self.arrays[f"{name}.weight"]
        if self.c["norm"] == "rms":
            return self.rms(x, weight)
        centred = x - x.mean()
        return (weight * centred / np.sqrt(np.mean(centred**2) + self.c["norm_eps"])
                + self.arrays[f"{name}.bias"])

    def heads(self, layer: int, x: np.ndarray) -> tuple[list, list, list]:
        c, d = self.c, self.c["head_dim"]
        group = c["heads"] // c["kv_heads"]
        if not c.get("fused_qkv"):
            q, k, v = (self.linear(f"layers.{layer}.{part}", x).reshape(-1, d) for part in "qkv")
            return list(q), list(k), list(v)
        q, k, v = [], [], []
        for block in self.linear(f"layers.{layer}.qkv", x).reshape(c["kv_heads"], group + 2, d):
            q += list(block[:group])
            k.append(block[group])
            v.append(block[group + 1])
        return q, k, v

    def angles(self, position: int) -> np.ndarray:
        c = self.c
        frequencies = c["rope_inv_freq"].astype(np.float64)
        factor, original = c.get("rope_dynamic_factor") or 0.0, c.get("rope_original_positions")
        if factor and position + 1 > original:
            dim = c["rotary_dim"]
            base = c["rope_base"] * (factor * (position + 1) / original - (factor - 1)) ** (
                dim / (dim - 2))
            frequencies = base ** -(np.arange(0, dim, 2) / dim)
        return position * frequencies

    def rotate(self, x: np.ndarray, position: int) -> np.ndarray:
        half = self.c["rotary_dim"] // 2
        scale = self.c.get("rope_scale") or 1.0
        turn = scale * np.exp(1j * self.angles(position))
        turned = (x[:half] + 1j * x[half:2 * half]) * turn
        return np.concatenate([turned.real, turned.imag, x[2 * half:]])

    def attention(self, layer: int, x: np.ndarray, position: int) -> np.ndarray:
        c = self.c
        q, k, v = self.heads(layer, x)
        if c.get("qk_norm"):
            q = [self.rms(h, self.arrays[f"layers.{layer}.q_norm.weight"]) for h in q]
            k = [self.rms(h, self.arrays[f"layers.{layer}.k_norm.weight"]) for h in k]
        if c["position"] == "rope":
            q = [self.rotate(h, position) for h in q]
            k = [self.rotate(h, position) for h in k]
        self.keys[layer].append(k)
        self.values[layer].append(v)
        windows = c.get("sliding_window")
        window = int(windows[layer]) if windows is not None else 0
        begin = max(0, position + 1 - window) if window else 0
        out = []
        for h, query in enumerate(q):
            g = h // (c["heads"] // c["kv_heads"])
            scores = np.array([query @ self.keys[layer][j][g] * c["attention_scale"]
                               + self.bias[h, j] for j in range(begin, position + 1)])
            p = np.exp(scores - scores.max())
            p /= p.sum()
            out.append(sum(p[i] * self.values[layer][begin + i][g] for i in range(len(p))))
        return self.linear(f"layers.{layer}.o", np.concatenate(out))

    def activation(self, x: np.ndarray) -> np.ndarray:
        kind = self.c["activation"]
        if kind == "silu":
            return x / (1 + np.exp(-x))
        if kind == "gelu":
            return x / 2 * (1 + np.array([math.erf(value / math.sqrt(2)) for value in x]))
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def mlp(self, layer: int, x: np.ndarray) -> np.ndarray:
        up = self.linear(f"layers.{layer}.up", x)
        if self.c.get("gated", True):
            up = self.activation(self.linear(f"layers.{layer}.gate", x)) * up
        else:
            up = self.activation(up)
        return self.linear(f"layers.{layer}.down", up)

    def step(self, token: int) -> np.ndarray:
        x = self.arrays["embedding"][token]
        position = len(self.keys[0])
        for layer in range(self.c["layers"]):
            prefix = f"layers.{layer}"
            first = self.norm(f"{prefix}.attention_norm", x)
            attended = self.attention(layer, first, position)
            if self.c["block"] == "serial":
                x = x + attended
                x = x + self.mlp(layer, self.norm(f"{prefix}.mlp_norm", x))
            elif self.c["block"] == "parallel":
                x = x + attended + self.mlp(layer, first)
            else:
                x = x + attended + self.mlp(layer, self.norm(f"{prefix}.mlp_norm", x))
        return self.linear("head", self.norm("final_norm", x))

    def logits(self, tokens) -> np.ndarray:
        return np.array([self.step(int(token)) for token in tokens])


def isas() -> list[str]:
    """The instruction sets that this build and machine can run."""
    return _core.cpu_info()["isas"]


def tokens(n: int, seed: int = 0, vocab: int = SIZES["vocab"]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, n)


def prefill(decoder, ids, sequence=None, chunk: int | None = None) -> np.ndarray:
    """Logits of all ids, given in chunks."""
    sequence = sequence or decoder.sequence()
    chunk = chunk or len(ids)
    return np.concatenate([decoder.step([sequence] * len(ids[i:i + chunk]), ids[i:i + chunk])
                           for i in range(0, len(ids), chunk)])
