"""The student, its configuration and tokenizer, and the output heads of language models."""
# The guard stands before the imports that it guards.
# ruff: noqa: E402

from amtss_fast._compat.extras import need_training_extra

need_training_extra(__name__)

from amtss_fast.models.config import AMTSSConfig
from amtss_fast.models.heads import OutputHead
from amtss_fast.models.names import check_code, check_languages, check_texts, normalize_label
from amtss_fast.models.places import read_model_config, told_of
from amtss_fast.models.positions import max_input_tokens, max_positions, sees_later_tokens
from amtss_fast.models.predict import Prediction
from amtss_fast.models.sections import read_encoder
from amtss_fast.models.student import AMTSSForSequenceClassification
from amtss_fast.models.tokenizers import adopt_pad_token, load_tokenizer, tokenizer_state

__all__ = [
    "AMTSSConfig",
    "AMTSSForSequenceClassification",
    "OutputHead",
    "Prediction",
    "adopt_pad_token",
    "check_code",
    "check_languages",
    "check_texts",
    "load_tokenizer",
    "max_input_tokens",
    "max_positions",
    "normalize_label",
    "read_encoder",
    "read_model_config",
    "sees_later_tokens",
    "tokenizer_state",
    "told_of",
]
