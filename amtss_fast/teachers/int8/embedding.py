"""Word embeddings of 8-bit teachers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from amtss_fast.loss.logits import quantize_weight


class Int8Embedding(nn.Module):
    """An embedding whose rows are 8-bit codes with one scale each; its vectors have the original's dtype."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        codes, scale = quantize_weight(embedding.weight)
        self.weight = nn.Parameter(codes, requires_grad=False)  # [V, H] int8
        self.scale = nn.Parameter(scale, requires_grad=False)  # [V] float32
        self.padding_idx = embedding.padding_idx
        self.dtype = embedding.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        return (F.embedding(ids, self.weight) * self.scale[ids].unsqueeze(-1)).to(self.dtype)


def quantize_embedding(model: PreTrainedModel) -> None:
    """Replaces the word embeddings, where they are an ordinary `nn.Embedding`, by `Int8Embedding`.

    A model may have several modules of one matrix, as T5 has.
    """
    words = model.get_input_embeddings()
    if type(words) is nn.Embedding:
        same = [
            name
            for name, module in model.named_modules()
            if type(module) is nn.Embedding and module.weight.data_ptr() == words.weight.data_ptr()
        ]
        replacement = Int8Embedding(words)
        for name in same:
            model.set_submodule(name, replacement)
