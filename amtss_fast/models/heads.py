"""The output head of a language model as hidden states, matrix and bias, in place of logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from amtss_fast.errors import UserError
from amtss_fast.loss.logits import QuantizedWeight, quantize_weight
from amtss_fast.models.modes import eval_mode

# Logits far beyond every cap, and logits that no cap changes much.
_HUGE, _SMALL = 1e30, 1e-2


class OutputHead:
    """Logits of `model` as softcap tanh(scale (hidden weight^T + bias) / softcap).

    They are for :func:`amtss_fast.linear_amtss_loss`: `hidden`, `weight`, `bias` and `softcap` are its arguments, and
    `scale` is in the first and the third of them already.

    What a model does to its logits after `get_output_embeddings()` is configured under names that differ, and so do
    their meanings: Granite divides by its `logits_scaling`, HyperCLOVA X multiplies by it, MiniCPM3 divides the hidden
    states. So a trial with one short row measures it: a constant factor (Cohere, Falcon-H1) is `scale`, a cap (Gemma)
    is `softcap`, and every other change is refused.

    Args:
        model: a masked or causal language model.
        name: what messages call it.

    Raises:
        UserError: no output embeddings; a head that is not one matrix and a bias; an encoder-decoder; logits that are
            clipped, shifted or otherwise changed after the head.
    """

    scale: float
    """What the model multiplies its logits by."""
    softcap: float | None
    """What the model's logits never exceed; None without a cap."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        module = model.get_output_embeddings()
        if module is None or getattr(module, "weight", None) is None or module.weight.dim() != 2:
            raise UserError(
                f"{name}: {type(model).__name__} has no output embeddings, one matrix [C, H] in "
                "get_output_embeddings(), which the fused head needs"
            )
        if model.config.is_encoder_decoder:
            raise UserError(f"{name}: {type(model).__name__} is an encoder-decoder, which is not supported")
        self._module: nn.Module = module
        self._codes: QuantizedWeight | None = None
        self.scale, self.softcap = self._measure(model, f"{name}: {type(model).__name__}")

    @property
    def weight(self) -> Tensor | QuantizedWeight:
        """[C, H], the parameter itself, or its codes after `quantize`."""
        return self._parameter if self._codes is None else self._codes

    @property
    def width(self) -> int:
        """H."""
        return int((self._parameter if self._codes is None else self._codes.codes).shape[1])

    @property
    def bias(self) -> Tensor | None:
        """[C], multiplied by the scale; None without a bias."""
        bias: Tensor | None = getattr(self._module, "bias", None)
        return bias if bias is None or self.scale == 1 else self.scale * bias

    @property
    def _parameter(self) -> Tensor:
        return self._module.get_parameter("weight")

    def quantize(self, embedding: QuantizedWeight | None = None) -> None:
        """Replaces the matrix of a frozen model by 8-bit codes. After that the model can only give hidden states.

        Args:
            embedding: the 8-bit codes of the model's word embeddings. Where a model shares one matrix between the two,
                its codes are equal, and the head then uses these tensors in place of new ones.
        """
        codes = quantize_weight(self._parameter)
        if embedding is not None and torch.equal(codes.codes, embedding.codes):
            codes = embedding
        self._codes = codes
        self._module.weight = nn.Parameter(self._parameter.new_empty(0, self.width), requires_grad=False)

    def hidden(self, model: nn.Module, **inputs: Any) -> Tensor:
        """The input of the head [N, T, H], multiplied by the scale; no logits are computed.

        Args:
            model: the model of this head, or a wrapper of it.
            **inputs: of `model`.
        """
        caught: list[Tensor] = []

        def catch(hidden: Tensor) -> Tensor:
            caught.append(hidden)
            # The rest of the model needs a tensor in the place of the logits, and may write to it.
            return hidden[..., :1].clone()

        with self._with_forward(catch):
            model(**inputs)
        (hidden,) = caught
        return hidden if self.scale == 1 else self.scale * hidden

    @contextmanager
    def _with_forward(self, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
        own = vars(self._module).get("forward")
        self._module.forward = forward
        try:
            yield
        finally:
            del self._module.forward
            if own is not None:
                self._module.forward = own

    def _measure(self, model: PreTrainedModel, what: str) -> tuple[float, float | None]:
        """The scale and the cap that the model applies to its logits.

        With z in place of the head's logits the model gives f(z). Of a huge z it gives the cap, if it has one, and of a
        small z then the scale. For z of every size f(z) must be what the two say.
        """
        with eval_mode(model):
            self._check_head(model, what)
            _, reached = self._answer(model, _HUGE, what)
            reached = reached.abs()
            capped = bool(reached.isfinite().all()) and bool((reached == reached.max()).all())
            softcap = float(reached.max()) if capped else None
            logits, got = self._answer(model, _SMALL, what)
            inner = got if softcap is None else softcap * (got / softcap).atanh()
            scale = float((inner * logits).sum() / logits.square().sum())
            # A difference of rounding alone is no factor.
            scale = 1.0 if abs(scale - 1) < 1e-6 else scale
            for size in (_SMALL, 1.0, 10.0, 100.0):
                self._check_form(model, size, scale, softcap, what)
        return scale, softcap

    def _check_head(self, model: PreTrainedModel, what: str) -> None:
        """UserError where the output layer is not a product and a bias, or where f(0) is not 0."""
        hidden, _, got = self._with_logits(model, 0.0, what)
        # A result that requires a gradient comes from a bias whose value is still 0.
        if got.requires_grad or (got != 0).any():
            raise UserError(f"{what} adds to its logits behind its output embeddings, which is not supported")
        plain = F.linear(hidden, self._parameter, getattr(self._module, "bias", None))
        if not torch.allclose(self._module(hidden), plain, equal_nan=True):
            raise UserError(f"{what} has an output layer {type(self._module).__name__} that is not hidden W^T + b")

    def _check_form(self, model: PreTrainedModel, size: float, scale: float, softcap: float | None, what: str) -> None:
        """UserError where f(z) is not that of this scale and cap for z of this size."""
        _, logits, got = self._with_logits(model, size, what)
        wanted = scale * logits.double()
        if softcap is not None:
            wanted = softcap * (wanted / softcap).tanh()
        if not torch.allclose(got.double(), wanted, rtol=8 * torch.finfo(got.dtype).eps, atol=0):
            raise UserError(
                f"{what} changes its logits behind its output embeddings in a way that the fused head cannot: only a "
                "constant factor and a cap by tanh are supported"
            )

    def _answer(self, model: PreTrainedModel, size: float, what: str) -> tuple[Tensor, Tensor]:
        """Logits z of this size and the model's f(z), in float64."""
        _, logits, got = self._with_logits(model, size, what)
        return logits.double(), got.detach().double()

    def _with_logits(self, model: PreTrainedModel, size: float, what: str) -> tuple[Tensor, Tensor, Tensor]:
        """The input of the head for a row of two tokens, logits z of this size, and the model's f(z)."""
        # At least in float32, in which a factor is measured well.
        dtype = torch.promote_types(self._parameter.dtype, torch.float32)
        logits = size * torch.randn(1, 2, len(self._parameter), generator=torch.Generator().manual_seed(0))
        logits = logits.to(self._parameter.device, dtype)
        entered: list[Tensor] = []

        def give(hidden: Tensor) -> Tensor:
            entered.append(hidden)
            # The model may write to it.
            return logits.clone()

        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        with self._with_forward(give):
            got: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if not entered or got.shape != logits.shape:
            raise UserError(f"{what} does not make its logits by calling its output embeddings once")
        return entered[0], logits, got
