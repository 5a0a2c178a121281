"""Designs small enough for tests, on the built-in models."""

from dataclasses import replace

from qllm.study import ARMS, Arm, Design, Speed, Text
from qllm.study.prompts import OPENINGS, PASSAGES

SMALL = Design(
    name="small",
    arms=(
        *(ARMS[name] for name in ("bf16", "int8", "nf4", "nf4-dq", "fp4", "fp4-dq")),
        Arm("null", "bf16", role="null", batch_size=5, threads=2),
    ),
    temperatures=(0.0, 0.5, 0.8, 1.0),
    seeds=(1, 2),
    prompts=tuple(Text(*opening) for opening in OPENINGS[:3]),
    lengths=(4, 8),
    texts=tuple(Text(*passage) for passage in PASSAGES[:3]),
    logit_temperatures=(0.1, 0.25, 0.5, 0.75, 1.0, 1.5),
    bootstrap_draws=100,
    speed=Speed(rounds=2, warmups=0, prompt_tokens=8, decode_tokens=4, batches=(2,)),
)
TINY = replace(
    SMALL,
    name="tiny",
    models=("demo:llama",),
    arms=tuple(arm for arm in SMALL.arms if arm.name in ("bf16", "nf4", "null")),
    seeds=(1,),
    prompts=SMALL.prompts[:2],
    texts=SMALL.texts[:1],
    temperatures=(0.0, 1.0),
    speed=None,
)
"""For what happens to files."""
