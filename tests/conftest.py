"""What every test runs under."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# bitsandbytes, the oracle of many tests, computes as it does without qllm.
os.environ["QLLM_BNB_BACKEND"] = "0"

# The same examples on every run, and no failure for being slow.
settings.register_profile("qllm", derandomize=True, deadline=None)
settings.load_profile("qllm")


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that qllm reads are as on a machine where nobody has set them."""
    for name in ("QLLM_CPU", "QLLM_THREADS", "QLLM_DEBUG", "QLLM_EMULATE_DEVICES",
                 "QLLM_EMULATE_GRAPHS", "QLLM_EMULATE_HOST_MEMORY", "QLLM_EMULATE_MEMORY",
                 "QLLM_EMULATE_ORDER", "QLLM_EMULATE_STREAMS"):
        monkeypatch.delenv(name, raising=False)
