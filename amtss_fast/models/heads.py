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


class OutputHead:
    """Logits of `model` as scale (hidden weight^T + bias), for :func:`amtss_fast.linear_amtss_loss`.

    Some models change the logits after `get_output_embeddings()`. A trial with one short row shows how: a constant
    factor (Cohere, Granite) becomes `scale`, every other change is refused.

    Args:
        model: a masked or causal language model.
        name: what messages call it.

    Raises:
        UserError: no output embeddings; a head that is not one matrix and a bias; an encoder-decoder; logits that are
            capped, shifted or otherwise changed after the head.
    """

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
        self.scale = self._find_scale(model, f"{name}: {type(model).__name__}")

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
            # The rest of the model needs a tensor in the place of the logits.
            return hidden[..., :1]

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

    def _find_scale(self, model: PreTrainedModel, what: str) -> float:
        """The factor that the model applies to its logits.

        With z in place of the head's logits the model gives f(z). f(0) = 0, and f(z) = c z for a small and for a large
        z, leave only a constant factor c.
        """
        with eval_mode(model):
            hidden = self._check_no_shift(model, what)
            small, large = (self._factor(model, size, what) for size in (1.0, 100.0))
            plain = F.linear(hidden, self._parameter, getattr(self._module, "bias", None))
            if not torch.allclose(self._module(hidden), plain, equal_nan=True):
                raise UserError(f"{what} has an output layer {type(self._module).__name__} that is not hidden W^T + b")
        if abs(small - large) > 4 * torch.finfo(self._parameter.dtype).eps * abs(small):
            raise UserError(f"{what} scales its logits by {small} or {large}, depending on their size")
        # A difference of rounding alone is no factor.
        return 1.0 if abs(large - 1) < 1e-6 else large

    def _check_no_shift(self, model: PreTrainedModel, what: str) -> Tensor:
        """The input of the head for the trial row; raises UserError where f(0) is not 0."""
        hidden, _, got = self._with_logits(model, 0.0, what)
        # A result that requires a gradient comes from a bias whose value is still 0.
        if got.requires_grad or (got != 0).any():
            raise UserError(f"{what} adds to its logits behind its output embeddings, which is not supported")
        return hidden

    def _factor(self, model: PreTrainedModel, size: float, what: str) -> float:
        """The factor c of f(z) = c z for logits z of this size; raises UserError where f is not linear."""
        _, logits, got = self._with_logits(model, size, what)
        got = got.detach().double()
        factor = float((got * logits).sum() / logits.double().square().sum())
        if not torch.allclose(got, factor * logits.double(), rtol=4 * torch.finfo(logits.dtype).eps, atol=0):
            capping = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
            cause = "" if capping is None else f" (final_logit_softcapping = {capping})"
            raise UserError(
                f"{what} changes its logits behind its output embeddings{cause}, which the fused head "
                "cannot do: only a constant factor is supported"
            )
        return factor

    def _with_logits(self, model: PreTrainedModel, size: float, what: str) -> tuple[Tensor, Tensor, Tensor]:
        """The input of the head for a row of two tokens, logits z of this size, and the model's f(z)."""
        logits = size * torch.randn(1, 2, len(self._parameter), generator=torch.Generator().manual_seed(0))
        logits = logits.to(self._parameter.device, self._parameter.dtype)
        entered: list[Tensor] = []

        def give(hidden: Tensor) -> Tensor:
            entered.append(hidden)
            return logits

        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        with self._with_forward(give):
            got: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if not entered or got.shape != logits.shape:
            raise UserError(f"{what} does not make its logits by calling its output embeddings once")
        return entered[0], logits, got
