"""The student: one shared encoder, one projection per language, one classifier.

For row n with language l:

    h_n = pooling(encoder(x_n))                 [H]   "mean" over the attended tokens, or "cls"
    z_n = h_n + act(W_l h_n + b_l)              [H]   the projection of language l
    s_n = V z_n + c                             [C]   `shared`; or V_l, c_l, `per_language`

W_l and b_l start at 0, so every projection starts as the identity, and the classifier of a new student gets the
encoder's vectors unchanged. All allowed activations have act(0) = 0 and a slope there, so that the zeros learn.

All L projections run on all N rows, and each row takes the result of its language: L·N·H² multiplications, a few per
cent of the encoder's. In return a batch of mixed languages needs no sorting, no device synchronization and no graph
break, and the arithmetic of one language does not depend on which other languages exist: `add_language` leaves the
other logits bit-identical.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from amtss_fast._compat.transformers import zero_unless_loaded
from amtss_fast.errors import UserError
from amtss_fast.loss.options import IGNORE_INDEX, UNLABELED_INDEX
from amtss_fast.models.checkpoints import check_weights
from amtss_fast.models.config import AMTSSConfig, label_arguments
from amtss_fast.models.encoder import encoder_config, make_encoder
from amtss_fast.models.layers import LanguageProjection, flush_left, mean_module, of_language, pool
from amtss_fast.models.names import check_languages
from amtss_fast.models.places import check_index, loading
from amtss_fast.models.predict import Prediction, check_predict_arguments, predict
from amtss_fast.models.sections import check_reads_tokens
from amtss_fast.models.tokenizers import load_tokenizer


class AMTSSForSequenceClassification(PreTrainedModel):
    """A sequence classifier with a shared encoder and a projection per language.

    The docstring of this module gives the formula.

    Make one with `from_encoder`, or from an `AMTSSConfig` (fresh weights). `save_pretrained` and `from_pretrained` keep
    every bit. `AutoModelForSequenceClassification` can load it after `amtss_fast.models` is imported.

    Args:
        config: the configuration.
        encoder: an encoder of `config.text_config`, used as it is; default: one with fresh weights.
    """

    config: AMTSSConfig
    config_class = AMTSSConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    # The encoder refuses what it does not support.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: AMTSSConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.encoder = make_encoder(config.text_config, config.text_config) if encoder is None else encoder
        # One object, so that a change to either (attention, vocabulary size) is a change to both.
        config.text_config = self.encoder.config
        parameters = inspect.signature(self.encoder.forward).parameters
        self._takes_token_type_ids = "token_type_ids" in parameters

        hidden_size = config.text_config.hidden_size
        self.projections = nn.ModuleList(
            LanguageProjection(hidden_size, config.projection_activation) for _ in config.languages
        )
        self.dropout = nn.Dropout(config.classifier_dropout)
        # One classifier, or one per language in the order of the languages.
        self.classifiers = nn.ModuleList(
            nn.Linear(hidden_size, len(config.label_names))
            for _ in (config.languages if config.classifier == "per_language" else [None])
        )
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, LanguageProjection):
            zero_unless_loaded(module.weight, module.bias)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """A saved student, as `PreTrainedModel.from_pretrained` loads it, but safetensors only.

        Raises:
            FileNotFoundError: a path without a folder.
            UserError: a broken checkpoint, or one that lacks weights of a student; the message names them.
        """
        asked = options.pop("output_loading_info", False)
        with loading("student", pretrained_model_name_or_path) as place:
            check_index(place)
            loaded: Any = super().from_pretrained(
                place, *args, **{**options, "output_loading_info": True, "use_safetensors": True}
            )
            student, info = loaded
            check_weights(student, info)
        return (student, info) if asked else student

    @classmethod
    def from_encoder(
        cls,
        encoder: str | Path | PretrainedConfig | PreTrainedModel,
        *,
        languages: Sequence[str],
        id2label: Mapping[int, str] | Sequence[str] | None = None,
        num_labels: int | None = None,
        pooling: str = "mean",
        projection_activation: str = "tanh",
        classifier: str = "shared",
        classifier_dropout: float = 0.1,
        dtype: torch.dtype = torch.float32,
    ) -> AMTSSForSequenceClassification:
        """A student with this encoder.

        Args:
            encoder: a folder or Hub id (its weights are loaded, safetensors only), a configuration (fresh weights), or
                a model, with or without a head (its encoder is copied).
            id2label: label names by id, or in order; give exactly one of `id2label` and `num_labels` (names LABEL_0,
                LABEL_1, ...).
            languages, pooling, projection_activation, classifier, classifier_dropout: as in `AMTSSConfig`.
            dtype: of all parameters; float32 also for a bfloat16 checkpoint, because training needs it.

        Raises:
            TypeError, UserError: a wrong argument; an encoder that reads no texts or states nothing for them; a
                checkpoint that lacks weights of the encoder, or a name that nothing has.
            FileNotFoundError: a path without a folder.
        """
        if (id2label is None) == (num_labels is None):
            raise UserError(f"give exactly one of id2label and num_labels, got {id2label!r} and {num_labels!r}")
        text_config = encoder_config(encoder)
        # All arguments are checked here, before a checkpoint is read.
        check_reads_tokens(text_config)
        config = AMTSSConfig(
            text_config,
            languages,
            pooling=pooling,
            projection_activation=projection_activation,
            classifier=classifier,
            classifier_dropout=classifier_dropout,
            **({"num_labels": num_labels} if id2label is None else label_arguments(id2label)),
        )
        check_reads_tokens(text_config, alone=True)
        student = cls(config, make_encoder(encoder, config.text_config))
        nn.Module.to(student, dtype)
        config.dtype = config.text_config.dtype = dtype
        # predict looks for the tokenizer there.
        student.name_or_path = config.name_or_path = text_config.name_or_path or ""
        return student

    def features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        language_ids: Tensor | None = None,
    ) -> Tensor:
        """The projected sentence vectors z [N, H], before dropout and classifier; see `forward`."""
        language_ids = self._check_language_ids(input_ids, language_ids)
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask, ids, token_type_ids = flush_left(attention_mask, input_ids, token_type_ids)
            assert ids is not None  # input_ids is not
            input_ids = ids
        inputs: dict[str, Tensor | None] = {}
        if self._takes_token_type_ids:
            inputs["token_type_ids"] = token_type_ids
        hidden = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **inputs
        ).last_hidden_state  # [N, T, H]
        pooled = pool(hidden, attention_mask, self.config.pooling)
        return of_language([projection(pooled) for projection in self.projections], language_ids)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        language_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Logits [N, C], and with labels the mean cross entropy of the labeled rows.

        No step of this model waits for the device. (Some encoders of transformers read the values of the attention
        mask in eager mode, which waits; under `torch.compile` they do not.)

        Args:
            input_ids: [N, T] int64.
            attention_mask: [N, T], 1 = attend; default: all. Padding may be on either side.
            token_type_ids: [N, T]; ignored if the encoder has none.
            language_ids: [N] integers, places in `config.languages`; one batch may mix languages. Required.
            labels: [N] int64 in [0, C); rows with -1 (unlabeled) or -100 (ignored) are left out, and a batch of only
                such rows has loss 0.
            return_dict: False: a tuple; default `config.return_dict`.

        Raises:
            ValueError: `language_ids` missing or of a wrong shape; values of `language_ids` or `labels` out of range
                on CPU tensors outside `torch.compile` (elsewhere reading the values would cost a synchronization;
                the indexing kernels then assert).
            TypeError: `language_ids` that are no integers.
        """
        features = self.dropout(self.features(input_ids, attention_mask, token_type_ids, language_ids))
        outputs = [classifier(features) for classifier in self.classifiers]
        if self.config.classifier == "per_language":
            assert language_ids is not None  # checked in features
            logits = of_language(outputs, language_ids)
        else:
            logits = outputs[0]
        loss = None if labels is None else self._loss(logits, labels)
        if return_dict is None:
            return_dict = self.config.return_dict
        if not return_dict:
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def add_language(self, code: str, like: str | None = None) -> int:
        """Adds a language and returns its id; the logits of all other languages keep their bits.

        Its projection (and its classifier, if there is one per language) is a copy of that of `like`, or the mean over
        all languages. Make the optimizer (and any DDP wrapper) after this call, because it adds parameters.

        Raises:
            UserError: `code` exists already or is empty; `like` is unknown.
            TypeError: `code` is no string.
        """
        languages = check_languages([*self.config.languages, code])
        sources = range(len(self.projections)) if like is None else [self.config.language_id(like)]
        for modules in self._modules_per_language():
            modules.append(mean_module([modules[index] for index in sources]))
        self.config.languages = languages
        return len(languages) - 1

    def split_classifier(self) -> None:
        """Gives each language a classifier of its own, a copy of the shared one; all logits keep their bits.

        Make the optimizer after this call.

        Raises:
            UserError: each language has its own already.
        """
        if self.config.classifier == "per_language":
            raise UserError("classifier is 'per_language' already")
        shared = self.classifiers[0]
        self.classifiers = nn.ModuleList(copy.deepcopy(shared) for _ in self.config.languages)
        self.config.classifier = "per_language"

    def freeze_all_but(self, languages: str | Sequence[str]) -> None:
        """Leaves only these languages' projections (and classifiers, if per language) trainable.

        Encoder, shared classifier and the other languages are frozen, so training does not change a bit of the other
        languages' logits. `model.requires_grad_(True)` reverses this.

        Raises:
            UserError: an unknown language.
        """
        codes = [languages] if isinstance(languages, str) else list(languages)
        indices = [self.config.language_id(code) for code in codes]
        self.requires_grad_(False)
        for modules in self._modules_per_language():
            for index in indices:
                modules[index].requires_grad_(True)

    def predict(
        self,
        texts: Sequence[str],
        languages: str | Sequence[str],
        *,
        text_pairs: Sequence[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 32,
    ) -> list[Prediction]:
        """Classifies texts; the results are in the order of the texts.

        Args:
            texts: N texts; with `text_pairs` the first of each pair (in XNLI the premise).
            languages: one code for all, or N codes.
            text_pairs: N second texts.
            tokenizer: default: the one saved beside the model, loaded once.
            batch_size: rows per forward pass; texts of similar length share a batch.

        Raises:
            TypeError: texts that are not strings.
            UserError: unequal lengths, an unknown language, batch_size below 1.
            RuntimeError: no tokenizer given and none found.
        """
        texts, codes, pairs = check_predict_arguments(texts, languages, text_pairs, batch_size)
        language_ids = [self.config.language_id(code) for code in codes]
        return predict(self, tokenizer or self._own_tokenizer(), texts, language_ids, pairs, batch_size)

    def _own_tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            if not self.name_or_path:
                raise RuntimeError(
                    "predict needs a tokenizer, and this model was not loaded from a folder that "
                    "could hold one: pass tokenizer="
                )
            self._tokenizer = load_tokenizer(self.name_or_path, whose="student")
        return self._tokenizer

    def _modules_per_language(self) -> list[nn.ModuleList]:
        if self.config.classifier == "per_language":
            return [self.projections, self.classifiers]
        return [self.projections]

    def _check_language_ids(self, input_ids: Tensor, language_ids: Tensor | None) -> Tensor:
        allowed = f"0 to {len(self.config.languages) - 1} for {', '.join(self.config.languages)}"
        if language_ids is None:
            raise ValueError(f"language_ids is missing: one id per row, {allowed}")
        if language_ids.is_floating_point() or language_ids.is_complex():
            raise TypeError(f"language_ids must be integers, got {language_ids.dtype}")
        if language_ids.shape != input_ids.shape[:1]:
            raise ValueError(
                f"language_ids must have shape [N] = {list(input_ids.shape[:1])}, got {list(language_ids.shape)}"
            )
        _check_range("language_ids", language_ids, len(self.config.languages), (), allowed)
        return language_ids

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        skipped = (IGNORE_INDEX, UNLABELED_INDEX)
        _check_range(
            "labels",
            labels,
            logits.shape[-1],
            skipped,
            f"0 to {logits.shape[-1] - 1} for {', '.join(self.config.label_names)}, or -1 or -100",
        )
        targets = labels.masked_fill(labels == UNLABELED_INDEX, IGNORE_INDEX)
        # Half precision is summed in float32.
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(wide, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def _check_range(name: str, ids: Tensor, size: int, skipped: tuple[int, ...], allowed: str) -> None:
    # Elsewhere reading the values would cost a synchronization or a graph break.
    if torch.compiler.is_compiling() or ids.device.type != "cpu":
        return
    bad = (ids < 0) | (ids >= size)
    for index in skipped:
        bad &= ids != index
    if bad.any():
        raise ValueError(f"{name} must be {allowed}; got {ids[bad].unique().tolist()}")


AutoModelForSequenceClassification.register(AMTSSConfig, AMTSSForSequenceClassification, exist_ok=True)
