"""8-bit logits: error, special values, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from amtss_fast import QuantizedLogits, quantize_logits


def divergence(original: Tensor, quantized: QuantizedLogits, temperature: float) -> Tensor:
    """KL in nats of each row [N], in float64."""
    log_p = (original.double() / temperature).log_softmax(-1)
    log_q = (quantized.dequantize().double() / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).where(log_p > -math.inf, 0.0).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0, 4.0, 8.0, 30.0])
@pytest.mark.parametrize(("rows", "classes"), [(2000, 3), (1000, 100), (200, 5000), (32, 32000), (8, 250_002)])
def test_divergence(rows: int, classes: int, temperature: float) -> None:
    g = torch.Generator().manual_seed(classes)
    logits = torch.randn(rows, classes, generator=g)
    wide = divergence(10 * logits, quantize_logits(10 * logits), temperature)
    assert wide.mean() <= 1e-3
    assert wide.max() <= 5e-3
    assert divergence(3 * logits, quantize_logits(3 * logits), temperature).max() <= 1e-3


def test_codes_and_scales() -> None:
    logits = torch.tensor([[3.0, -251.0, 2.0, -math.inf], [1.0, 1.0, 1.0, 1.0], [0.0, -25.4, -0.1, -12.7]])
    q = quantize_logits(logits)
    assert (q.codes.dtype, q.row_max.dtype, q.step.dtype) == (torch.uint8, torch.float32, torch.float32)
    assert q.row_max.tolist() == [3.0, 1.0, 0.0]
    # 254 logits below the maximum is cut to 66; a row without a range has step 0.
    torch.testing.assert_close(q.step, torch.tensor([66 / 254, 0.0, 0.1]))
    assert q.codes.tolist() == [[0, 254, 4, 255], [0, 0, 0, 0], [0, 254, 1, 127]]
    values = q.dequantize()
    assert values[0, 3] == -math.inf
    assert torch.equal(values[1], logits[1])
    torch.testing.assert_close(values[2], logits[2])


def test_special_rows() -> None:
    inf, nan = math.inf, math.nan
    logits = torch.tensor([[-inf, -inf, -inf], [nan, 1.0, 2.0], [inf, 0.0, -inf], [1.0, -inf, 0.0]])
    values = quantize_logits(logits).dequantize()
    assert torch.equal(values[0], logits[0])
    assert values[1].isnan().all()
    assert not values[2].softmax(-1).isfinite().any()
    assert torch.equal(values[3], logits[3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(50, 40)).to(dtype)
    contiguous = quantize_logits(logits[:, ::2].contiguous())
    for got, want in zip(quantize_logits(logits[:, ::2]), contiguous, strict=True):
        assert torch.equal(got, want)


@settings(max_examples=100)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
    st.sampled_from([0.0, 1e4, -1e4]),
)
def test_every_logit_within_half_a_step(row: list[float], shift: float) -> None:
    logits = torch.tensor([row]) + shift
    q = quantize_logits(logits)
    # The subtraction from the maximum is rounded at the size of the logits.
    slack = 4 * torch.finfo(torch.float32).eps * (60 + abs(shift))
    assert ((q.dequantize() - logits).abs() <= q.step.unsqueeze(-1) / 2 + slack).all()
    assert torch.equal(q.dequantize().amax(-1), logits.amax(-1))


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"logits must be floating, got torch\.int64"):
        quantize_logits(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"logits must be \[N, C\].*got shape \[3\]"):
        quantize_logits(torch.zeros(3))
    with pytest.raises(ValueError, match=r"got shape \[3, 0\]"):
        quantize_logits(torch.zeros(3, 0))
    assert quantize_logits(torch.zeros(0, 3)).codes.shape == (0, 3)
