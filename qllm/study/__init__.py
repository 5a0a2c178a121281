"""Temperature studies of quantized models: design, run, measures, statistics, report.

study = qllm.study.run("smoke", out="my-study")
study.claims                  # verdicts with intervals
study.plot("divergence")      # a matplotlib figure
study.report                  # path of a self-contained HTML file
"""

from __future__ import annotations

from .cluster import cluster
from .design import ARMS, PROFILES, Arm, Claim, Design, Speed, Text, resolve
from .plan import Plan, plan
from .progress import Event
from .result import Study, load
from .runner import run

__all__ = [
    "ARMS",
    "PROFILES",
    "Arm",
    "Claim",
    "Design",
    "Event",
    "Plan",
    "Speed",
    "Study",
    "Text",
    "cluster",
    "load",
    "plan",
    "resolve",
    "run",
]
