"""The head of a language model, taken off: hidden states, matrix and bias in place of logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from amtss_fast.loss.logits import QuantizedWeight, quantize_weight
from amtss_fast.teachers.int8 import Int8Embedding


class OutputHead:
    """Logits of `model` as scale (hidden weight^T + bias), for :func:`amtss_fast.linear_amtss_loss`.

    What a model does to its logits behind `get_output_embeddings()` is found by giving it logits to work on, for one
    short row: a constant factor (Cohere, Granite) is honoured as `scale`, anything else refused.

    Args:
        model: a masked or causal language model.
        name: how messages call it.

    Raises:
        ValueError: no output embeddings; a head that is not one matrix and a bias; an encoder-decoder; logits that are
            capped, shifted or otherwise changed behind the head.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        module = model.get_output_embeddings()
        if module is None or getattr(module, "weight", None) is None or module.weight.dim() != 2:
            raise ValueError(
                f"{name}: {type(model).__name__} has no output embeddings, one matrix [C, H] in "
                "get_output_embeddings(), which the fused head needs"
            )
        if model.config.is_encoder_decoder:
            raise ValueError(f"{name}: {type(model).__name__} is an encoder-decoder, which is not supported")
        self._module: nn.Module = module
        self._model = model
        self._name = name
        self._codes: QuantizedWeight | None = None
        self.scale = self._find_scale()

    @property
    def weight(self) -> Tensor | QuantizedWeight:
        """[C, H], the parameter itself, or its codes after `quantize`."""
        return self._parameter if self._codes is None else self._codes

    @property
    def width(self) -> int:
        """H."""
        return int((self._parameter if self._codes is None else self._codes.codes).shape[1])

    @property
    def _parameter(self) -> Tensor:
        return self._module.get_parameter("weight")

    def quantize(self) -> None:
        """Keeps the matrix of a frozen model in 8 bits, those of its word embeddings where they are the same.

        From then on the model gives hidden states only.
        """
        codes = quantize_weight(self._parameter)
        embedding = self._model.get_input_embeddings()
        if isinstance(embedding, Int8Embedding) and torch.equal(codes.codes, embedding.weight):
            codes = QuantizedWeight(embedding.weight.data, embedding.scale.data)
        self._codes = codes
        self._module.weight = nn.Parameter(self._parameter.new_empty(0, self.width), requires_grad=False)

    @property
    def bias(self) -> Tensor | None:
        """[C], or None; with the model's scale."""
        bias: Tensor | None = getattr(self._module, "bias", None)
        return bias if bias is None or self.scale == 1 else self.scale * bias

    def hidden(self, model: nn.Module, **inputs: Any) -> Tensor:
        """What enters the head [N, T, H], with the model's scale, from `model`: this one or a wrapper of it.

        No logits are made.
        """
        caught: list[Tensor] = []

        def catch(hidden: Tensor) -> Tensor:
            caught.append(hidden)
            # Something to call logits, for what follows in the model.
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

    def _find_scale(self) -> float:
        """The factor that the model puts on its logits.

        With logits z in place of the head's the model gives f(z); f(0) = 0 and f(z) = c z for a small and a large z
        leave nothing else.
        """
        model, what = self._model, f"{self._name}: {type(self._model).__name__}"
        ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
        hidden: list[Tensor] = []
        factors = []
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            for size in (0.0, 1.0, 100.0):
                generator = torch.Generator().manual_seed(0)
                logits = size * torch.randn(1, 2, len(self._parameter), generator=generator)
                logits = logits.to(self._parameter.device, self._parameter.dtype)

                def give(entering: Tensor, logits: Tensor = logits) -> Tensor:
                    hidden.append(entering)
                    return logits

                with self._with_forward(give):
                    got = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                if not hidden or got.shape != logits.shape:
                    raise ValueError(f"{what} does not make its logits by calling its output embeddings once")
                # What needs a gradient here is a bias that only happens to be 0 yet.
                if size == 0 and (got.requires_grad or (got != 0).any()):
                    raise ValueError(f"{what} adds to its logits behind its output embeddings, which is not supported")
                if size > 0:
                    got = got.detach().double()
                    factor = float((got * logits).sum() / logits.double().square().sum())
                    tolerance = 4 * torch.finfo(logits.dtype).eps
                    if not torch.allclose(got, factor * logits.double(), rtol=tolerance, atol=0):
                        capping = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
                        cause = "" if capping is None else f" (final_logit_softcapping = {capping})"
                        raise ValueError(
                            f"{what} changes its logits behind its output embeddings{cause}, which the fused head "
                            "cannot do: only a constant factor is supported"
                        )
                    factors.append(factor)
            plain = F.linear(hidden[0], self._parameter, getattr(self._module, "bias", None))
            if not torch.allclose(self._module(hidden[0]), plain, equal_nan=True):
                raise ValueError(f"{what} has an output layer {type(self._module).__name__} that is not hidden W^T + b")
        finally:
            for module, mode in modes:
                module.training = mode
        small, large = factors
        if abs(small - large) > 4 * torch.finfo(self._parameter.dtype).eps * abs(small):
            raise ValueError(f"{what} scales its logits by {small} or {large}, depending on their size")
        # Rounding alone is no factor.
        return 1.0 if abs(large - 1) < 1e-6 else large
