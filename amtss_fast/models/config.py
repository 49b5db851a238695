"""The configuration of a student."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from amtss_fast._compat.transformers import attention_implementation, set_attention_implementation
from amtss_fast.errors import UserError
from amtss_fast.models.names import check_languages, normalize_label, show_names
from amtss_fast.models.places import told_of

POOLINGS = ("mean", "cls")
CLASSIFIERS = ("shared", "per_language")
# A projection of zeros learns only if the activation has a slope at 0; that of relu is 0 there.
ACTIVATIONS = ("tanh", "gelu", "silu")


class AMTSSConfig(PretrainedConfig):
    """Configuration of `AMTSSForSequenceClassification`.

    Args:
        text_config: the encoder's configuration, or its dict with `model_type`; copied. Any
            `AutoModel` encoder; encoder-decoder models are refused.
        languages: language codes, unique; their order gives `language_ids`.
        pooling: `"mean"` over the attended tokens, or `"cls"`, the first token (right padding).
        projection_activation: `"tanh"` (default: bounded, symmetric), `"gelu"` or `"silu"`.
        classifier: `"shared"`, or `"per_language"`.
        classifier_dropout: in [0, 1), before the classifier.
        **kwargs: of `PretrainedConfig`, above all `id2label` or `num_labels` (at least 2).

    Raises:
        TypeError, UserError: naming the argument, the value given and what is allowed.
    """

    model_type = "amtss"
    sub_configs: ClassVar[dict[str, type]] = {"text_config": AutoConfig}
    has_no_defaults_at_init = True

    def __init__(
        self,
        text_config: PretrainedConfig | Mapping[str, Any] | None = None,
        languages: Sequence[str] | None = None,
        pooling: str = "mean",
        projection_activation: str = "tanh",
        classifier: str = "shared",
        classifier_dropout: float = 0.1,
        **kwargs: Any,
    ) -> None:
        self.text_config = _as_text_config(text_config)
        self.languages = check_languages(languages)
        self.pooling = _one_of("pooling", pooling, POOLINGS)
        self.projection_activation = _one_of("projection_activation", projection_activation, ACTIVATIONS)
        self.classifier = _one_of("classifier", classifier, CLASSIFIERS)
        self.classifier_dropout = _dropout(classifier_dropout)
        # The base class overwrites the encoder's choice of attention even with None.
        attention = attention_implementation(self.text_config)
        super().__init__(**kwargs)
        if attention_implementation(self) is None:
            set_attention_implementation(self.text_config, attention)
        self.label2id = _inverse(self._names(), self.label2id)

    @property
    def label_names(self) -> list[str]:
        """The C label names in the order of the logits."""
        names = self._names()
        return [names[index] for index in range(len(names))]

    def language_id(self, code: str) -> int:
        """The id of a language, its place in `languages`.

        Raises:
            UserError: an unknown code; the message names the languages.
        """
        if code not in self.languages:
            raise UserError(f"language {code!r} is unknown; allowed: {', '.join(self.languages)}")
        return self.languages.index(code)

    def _names(self) -> dict[int, str]:
        return {int(index): name for index, name in (self.id2label or {}).items()}


def label_arguments(id2label: Mapping[int, str] | Sequence[str]) -> dict[str, Any]:
    """The arguments of a configuration that name the labels, from names by id or in order."""
    if isinstance(id2label, str):
        raise TypeError(f"id2label must be a mapping or a list of names, got {id2label!r}")
    pairs = id2label.items() if isinstance(id2label, Mapping) else enumerate(id2label)
    names = {int(index): name for index, name in pairs}
    return {"id2label": names, "label2id": {name: index for index, name in names.items()}}


def _as_text_config(text_config: PretrainedConfig | Mapping[str, Any] | None) -> PretrainedConfig:
    if isinstance(text_config, Mapping):
        values = dict(text_config)
        model_type = values.pop("model_type", None)
        if model_type is None:
            raise UserError("text_config needs a model_type, such as 'bert'")
        with told_of(f"text_config of model_type {model_type!r}"):
            config = AutoConfig.for_model(model_type, **values)
    elif isinstance(text_config, PretrainedConfig):
        config = copy.deepcopy(text_config)
    else:
        raise TypeError(f"text_config must be a PretrainedConfig or a dict, got {text_config!r}")
    if config.is_encoder_decoder:
        raise UserError(f"text_config must be an encoder's, got the encoder-decoder {config.model_type!r}")
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise UserError(f"text_config must have a hidden_size, {config.model_type!r} has none")
    return config


def _inverse(id2label: dict[int, str], label2id: Mapping[str, int | str] | None) -> dict[str, int]:
    """The id of each label name; raises UserError unless the ids are 0 to C - 1 and `label2id` says the same."""
    if len(id2label) < 2:
        raise UserError(f"id2label must name at least 2 labels, got {id2label!r}")
    if sorted(id2label) != list(range(len(id2label))):
        raise UserError(f"id2label must have the ids 0 to C - 1, got {id2label!r}")
    if len({normalize_label(name) for name in id2label.values()}) < len(id2label):
        raise UserError(f"id2label must have different names (case aside), got {show_names(id2label.values())}")
    inverse = {name: index for index, name in id2label.items()}
    if label2id and {name: int(index) for name, index in label2id.items()} != inverse:
        raise UserError(f"label2id must be the inverse of id2label {id2label!r}, got {label2id!r}")
    return inverse


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    return value


def _dropout(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"classifier_dropout must be a number, got {value!r}")
    if not 0 <= value < 1:
        raise UserError(f"classifier_dropout must be in [0, 1), got {value}")
    return float(value)


AutoConfig.register(AMTSSConfig.model_type, AMTSSConfig, exist_ok=True)
