"""The emulation of the GPU against NumPy: what kernels share with each other, one by one."""

from __future__ import annotations

import emulated
import numpy as np
import pytest


@pytest.fixture(params=["", "reversed"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> emulated.Device:
    monkeypatch.setenv("QLLM_EMULATE_ORDER", request.param)
    return emulated.device()


def test_shuffles_and_votes(device: emulated.Device) -> None:
    rng = np.random.default_rng(1)
    n = 128
    v = rng.integers(0, 1000, n, dtype=np.uint32)
    v[32:64] = 7
    lanes = rng.integers(0, 32, n, dtype=np.int32)
    out = device.empty((6, n), np.uint32)
    device.call("gpu_test_shuffles", device.array(v), device.array(lanes), 500, out, n)
    warps, lane = v.reshape(-1, 32), np.arange(32)
    every = np.ones_like(warps)
    expected = [np.take_along_axis(warps, lanes.reshape(-1, 32), 1), warps[:, lane ^ 5],
                warps[:, np.where(lane + 3 < 32, lane + 3, lane)],
                every * np.sum((warps & 1) << lane.astype(np.uint32), 1, keepdims=True),
                every * np.any(warps < 500, 1, keepdims=True),
                every * np.all(warps < 500, 1, keepdims=True)]
    np.testing.assert_array_equal(out.get(), np.reshape(expected, (6, n)))
