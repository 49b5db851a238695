"""Teachers in 8 bits: the engines that run them, and loading that never holds a model twice.

The encoder's linear layers and word embeddings are kept in 8 bits. Position embeddings, norms, pooler, projections and
classifier stay as they are: they are small, and errors in them reach the logits directly.
"""

from amtss_fast.teachers.int8.attention import ATTENTION
from amtss_fast.teachers.int8.embedding import Int8Embedding, quantize_embedding
from amtss_fast.teachers.int8.engines import ENGINES, choose_engine, why_missing
from amtss_fast.teachers.int8.layers import Int8Linear
from amtss_fast.teachers.int8.loading import leave_file, loading_options, share_in_8_bits

__all__ = [
    "ATTENTION",
    "ENGINES",
    "Int8Embedding",
    "Int8Linear",
    "choose_engine",
    "leave_file",
    "loading_options",
    "quantize_embedding",
    "share_in_8_bits",
    "why_missing",
]
