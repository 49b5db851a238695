"""The student: one shared encoder, one projection per language, one classifier.

For row n with language l:

    h_n = pooling(encoder(x_n))                 [H]   "mean" over the attended tokens, or "cls"
    z_n = h_n + act(W_l h_n + b_l)              [H]   the projection of language l
    s_n = V z_n + c                             [C]   `shared`; or V_l, c_l, `per_language`

W_l and b_l start at 0, so every projection starts as the identity: a fresh student reads the
encoder as it is, and a new language cannot start worse than without its projection. All allowed
activations have act(0) = 0 and a slope there, so that the zeros learn.

All L projections see all N rows and each row takes its own: L·N·H² multiplications, a few per cent
of the encoder's. In return a mixed-language batch needs no sorting, no device synchronisation and
no graph break, and the arithmetic of one language does not depend on which other languages exist:
`add_language` leaves the other logits bit-identical.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils.hub import cached_file

from amtss_fast.loss.options import IGNORE_INDEX, UNLABELED_INDEX

POOLINGS = ("mean", "cls")
CLASSIFIERS = ("shared", "per_language")
# A zero projection learns only if the activation has a slope at 0, which relu has not.
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
        TypeError, ValueError: naming the argument, the value given and what is allowed.
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
        if isinstance(classifier_dropout, bool) or not isinstance(classifier_dropout, (int, float)):
            raise TypeError(f"classifier_dropout must be a number, got {classifier_dropout!r}")
        if not 0 <= classifier_dropout < 1:
            raise ValueError(f"classifier_dropout must be in [0, 1), got {classifier_dropout}")
        self.classifier_dropout = float(classifier_dropout)
        # The base class overwrites the encoder's choice of attention even with None.
        attention = self.text_config._attn_implementation
        super().__init__(**kwargs)
        if self._attn_implementation is None:
            self.text_config._attn_implementation = attention
        self._check_labels()

    def _check_labels(self) -> None:
        id2label = cast(dict[int, str], self.id2label)
        if len(id2label) < 2:
            raise ValueError(f"id2label must name at least 2 labels, got {id2label!r}")
        if sorted(id2label) != list(range(len(id2label))):
            raise ValueError(f"id2label must have the ids 0 to C - 1, got {id2label!r}")
        if len({normalise_label(name) for name in id2label.values()}) < len(id2label):
            raise ValueError(f"id2label must have different names (case aside), got {id2label!r}")
        label2id = {name: index for index, name in id2label.items()}
        given = {} if self.label2id is None else self.label2id
        if given and {name: int(index) for name, index in given.items()} != label2id:
            raise ValueError(f"label2id must be the inverse of id2label {id2label!r}, got {given!r}")
        self.label2id = label2id

    @property
    def label_names(self) -> list[str]:
        """The C label names in the order of the logits."""
        names = cast(dict[int, str], self.id2label)
        return [names[index] for index in range(len(names))]

    def language_id(self, code: str) -> int:
        """The id of a language, its place in `languages`.

        Raises:
            ValueError: an unknown code; the message names the languages.
        """
        if code not in self.languages:
            raise ValueError(f"language {code!r} is unknown; allowed: {', '.join(self.languages)}")
        return self.languages.index(code)


@dataclass(frozen=True)
class Prediction:
    """One row of `predict`: the likeliest label, its probability, and all of them by label name."""

    label: str
    score: float
    probabilities: dict[str, float]


class LanguageProjection(nn.Linear):
    """h + act(W h + b), [*, H] to [*, H]; W = 0 and b = 0 make it the identity."""

    def __init__(self, size: int, activation: str) -> None:
        super().__init__(size, size)
        self.activation = ACT2FN[activation]

    def forward(self, hidden: Tensor) -> Tensor:
        projected: Tensor = hidden + self.activation(super().forward(hidden))
        return projected


class AMTSSForSequenceClassification(PreTrainedModel):
    """A sequence classifier with a shared encoder and a projection per language.

    The formula heads this module.

    Make one with `from_encoder`, or from an `AMTSSConfig` (fresh weights); `save_pretrained` and
    `from_pretrained` round-trip bit for bit, and `AutoModelForSequenceClassification` knows it once
    this module is imported.

    Args:
        config: the configuration.
        encoder: a ready encoder of `config.text_config`, used as it is; default: a fresh one.
    """

    config: AMTSSConfig
    config_class = AMTSSConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    # The encoder checks for itself what it supports.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: AMTSSConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if encoder is None:
            encoder = AutoModel.from_config(
                config.text_config,
                # The dtype of the other parts, whatever the encoder's configuration says.
                dtype=torch.get_default_dtype(),
                trust_remote_code=False,
                **_without_pooler(config.text_config),
            )
        self.encoder = encoder
        # One object, so that a change to either (attention, vocabulary size) is seen by both.
        config.text_config = encoder.config
        parameters = inspect.signature(encoder.forward).parameters
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
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

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
        """A student on an encoder.

        Args:
            encoder: a folder or Hub id (its weights are loaded, safetensors only), a configuration
                (fresh weights), or a model, with or without a head (its encoder is copied).
            id2label: label names by id, or in order; exactly one of `id2label` and `num_labels`
                (named LABEL_0, ...).
            languages, pooling, projection_activation, classifier, classifier_dropout: as in
                `AMTSSConfig`.
            dtype: of all parameters; float32 also for a bfloat16 checkpoint, as training needs it.

        Raises:
            TypeError, ValueError: a bad argument; a checkpoint that lacks weights of the encoder.
            OSError: nothing found under that name.
        """
        if (id2label is None) == (num_labels is None):
            raise ValueError(f"give exactly one of id2label and num_labels, got {id2label!r} and {num_labels!r}")
        if not isinstance(encoder, (str, Path, PretrainedConfig, PreTrainedModel)):
            raise TypeError(
                "encoder must be a folder, a Hub id, a PretrainedConfig or a PreTrainedModel, "
                f"got {type(encoder).__name__}"
            )
        if isinstance(encoder, (str, Path)):
            text_config = AutoConfig.from_pretrained(encoder, trust_remote_code=False)
        else:
            text_config = encoder if isinstance(encoder, PretrainedConfig) else encoder.config
        labels: dict[str, Any] = {"num_labels": num_labels}
        if id2label is not None:
            if isinstance(id2label, str):
                raise TypeError(f"id2label must be a mapping or a list of names, got {id2label!r}")
            pairs = id2label.items() if isinstance(id2label, Mapping) else enumerate(id2label)
            labels = {"id2label": {int(index): name for index, name in pairs}}
            labels["label2id"] = {name: index for index, name in labels["id2label"].items()}
        # All arguments are checked here, before a checkpoint is read.
        config = AMTSSConfig(
            text_config,
            languages,
            pooling=pooling,
            projection_activation=projection_activation,
            classifier=classifier,
            classifier_dropout=classifier_dropout,
            **labels,
        )
        body: PreTrainedModel | None = None
        if isinstance(encoder, (str, Path)):
            body = _load_encoder(encoder, config.text_config)
        elif isinstance(encoder, PreTrainedModel):
            body = cast(PreTrainedModel, copy.deepcopy(encoder.base_model))
            if _without_pooler(body.config) and getattr(body, "pooler", None) is not None:
                body.pooler = None  # type: ignore[assignment]
        student = cls(config, body)
        nn.Module.to(student, dtype)
        config.dtype = config.text_config.dtype = dtype
        # Where predict looks for the tokenizer.
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
        inputs: dict[str, Tensor | None] = {}
        if self._takes_token_type_ids:
            inputs["token_type_ids"] = token_type_ids
        hidden = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **inputs
        ).last_hidden_state  # [N, T, H]
        pooled = _pool(hidden, attention_mask, self.config.pooling)
        return _of_language([projection(pooled) for projection in self.projections], language_ids)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        language_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Logits, and with labels the mean cross entropy of the labelled rows.

        No step here waits for the device. (Some encoders of transformers look at the attention
        mask's values in eager mode, which does; under `torch.compile` they do not.)

        Args:
            input_ids: [N, T] int64.
            attention_mask: [N, T], 1 = attend; default: all.
            token_type_ids: [N, T]; dropped if the encoder has none.
            language_ids: [N] integers, places in `config.languages`, mixed freely. Required.
            labels: [N] int64 in [0, C); -1 (unlabelled) and -100 (ignored) count for nothing, and a
                batch of only such rows has loss 0.
            return_dict: False: a tuple; default `config.return_dict`.

        Raises:
            ValueError: `language_ids` missing or of a wrong shape; values of `language_ids` or
                `labels` out of range on CPU tensors outside `torch.compile` (elsewhere looking at
                them would cost a synchronisation; the indexing kernels then assert).
            TypeError: `language_ids` that are no integers.
        """
        features = self.dropout(self.features(input_ids, attention_mask, token_type_ids, language_ids))
        outputs = [classifier(features) for classifier in self.classifiers]
        if self.config.classifier == "per_language":
            assert language_ids is not None  # checked in features
            logits = _of_language(outputs, language_ids)
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

        Its projection (and its classifier, if there is one per language) is a copy of that of
        `like`, or the mean over all languages. Make the optimizer (and any DDP wrapper) after this
        call: it adds parameters.

        Raises:
            ValueError: `code` exists already or is empty; `like` is unknown.
            TypeError: `code` is no string.
        """
        languages = check_languages([*self.config.languages, code])
        sources = range(len(self.projections)) if like is None else [self.config.language_id(like)]
        for modules in self._modules_per_language():
            modules.append(_mean_module([modules[index] for index in sources]))
        self.config.languages = languages
        return len(languages) - 1

    def split_classifier(self) -> None:
        """Gives each language a classifier of its own, a copy of the shared one; all logits keep their bits.

        Make the optimizer after this call.

        Raises:
            ValueError: each language has its own already.
        """
        if self.config.classifier == "per_language":
            raise ValueError("classifier is 'per_language' already")
        shared = self.classifiers[0]
        self.classifiers = nn.ModuleList(copy.deepcopy(shared) for _ in self.config.languages)
        self.config.classifier = "per_language"

    def freeze_all_but(self, languages: str | Sequence[str]) -> None:
        """Leaves only these languages' projections (and classifiers, if per language) trainable.

        Encoder, shared classifier and the other languages are frozen, so training keeps the bits of
        the other languages' logits. `model.requires_grad_(True)` undoes it.

        Raises:
            ValueError: an unknown language.
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
        """Classifies texts; results come in their order.

        Args:
            texts: N texts; with `text_pairs` the first of each pair (in XNLI the premise).
            languages: one code for all, or N codes.
            text_pairs: N second texts.
            tokenizer: default: the one saved beside the model, loaded once.
            batch_size: rows per forward pass; texts of like length go together.

        Raises:
            TypeError, ValueError: not strings, unequal lengths, an unknown language, batch_size
                below 1.
            RuntimeError: no tokenizer given and none found.
        """
        texts, pairs = check_texts(texts, text_pairs)
        codes = [languages] * len(texts) if isinstance(languages, str) else list(languages)
        if len(codes) != len(texts):
            raise ValueError(f"languages must be one code or one per text ({len(texts)}), got {len(codes)}")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        ids = torch.tensor([self.config.language_id(code) for code in codes], dtype=torch.long)
        tokenizer = tokenizer or self._own_tokenizer()
        max_length = max_input_tokens(self, tokenizer)

        # Longest first: a batch that does not fit into memory fails at once.
        lengths = [len(t) + (len(pairs[i]) if pairs else 0) for i, t in enumerate(texts)]
        order = sorted(range(len(texts)), key=lambda i: -lengths[i])
        results: list[Prediction | None] = [None] * len(texts)
        names = self.config.label_names
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                inputs = tokenizer(
                    [texts[i] for i in rows],
                    [pairs[i] for i in rows] if pairs else None,
                    padding=True,
                    truncation=max_length is not None,
                    max_length=max_length,
                    return_tensors="pt",
                ).to(self.device)
                with torch.inference_mode():
                    logits = self(
                        input_ids=inputs["input_ids"],
                        attention_mask=inputs["attention_mask"],
                        token_type_ids=inputs.get("token_type_ids"),
                        language_ids=ids[rows].to(self.device),
                        return_dict=True,
                    ).logits
                for i, row in zip(rows, logits.float().softmax(-1).tolist(), strict=True):
                    best = max(range(len(row)), key=row.__getitem__)
                    results[i] = Prediction(names[best], row[best], dict(zip(names, row, strict=True)))
        finally:
            for module, mode in modes:
                module.training = mode
        return [result for result in results if result is not None]

    def _own_tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            if not self.name_or_path:
                raise RuntimeError(
                    "predict needs a tokenizer, and this model was not loaded from a folder that "
                    "could hold one: pass tokenizer="
                )
            self._tokenizer = load_tokenizer(self.name_or_path)
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


def check_languages(languages: Sequence[str] | None) -> list[str]:
    """The language codes as a new list.

    Raises:
        TypeError: not a sequence of strings.
        ValueError: none, an empty code, or one twice.
    """
    if languages is None or isinstance(languages, str) or not isinstance(languages, Iterable):
        raise TypeError(f"languages must be a list of language codes, got {languages!r}")
    codes = list(languages)
    if not all(isinstance(code, str) for code in codes):
        raise TypeError(f"languages must be strings, got {codes!r}")
    if not codes or not all(code.strip() for code in codes):
        raise ValueError(f"languages must hold at least one code and no empty one, got {codes!r}")
    twice = sorted({code for code in codes if codes.count(code) > 1})
    if twice:
        raise ValueError(f"languages must be different, got {', '.join(twice)} twice in {codes!r}")
    return codes


def check_texts(texts: Sequence[str], text_pairs: Sequence[str] | None) -> tuple[list[str], list[str] | None]:
    """Texts and their second texts as lists of strings of one length.

    Raises:
        TypeError: a bare string, or an entry that is no string.
        ValueError: unequal lengths.
    """
    lists: list[list[str] | None] = []
    for name, values in (("texts", texts), ("text_pairs", text_pairs)):
        if values is None and name == "text_pairs":
            lists.append(None)
            continue
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise TypeError(f"{name} must be a list of strings, got {values!r}")
        entries = list(values)
        wrong = [entry for entry in entries if not isinstance(entry, str)]
        if wrong:
            raise TypeError(f"{name} must be strings, got {wrong[0]!r}")
        lists.append(entries)
    first, second = lists
    assert first is not None
    if second is not None and len(second) != len(first):
        raise ValueError(f"text_pairs must have one entry per text ({len(first)}), got {len(second)}")
    return first, second


def normalise_label(name: str) -> str:
    """How label names are compared: without case and outer blanks."""
    return str(name).strip().casefold()


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id.

    Unlike `AutoTokenizer` alone it refuses a checkpoint without tokenizer files, for which
    transformers makes an empty tokenizer that maps every word to "unknown".

    Raises:
        RuntimeError: no tokenizer there.
    """
    name = str(name_or_path)
    hint = f"no tokenizer found in {name!r}: save one there with tokenizer.save_pretrained, or pass tokenizer="
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise RuntimeError(f"{hint} ({error})") from error
    files = {"tokenizer_config.json", "tokenizer.json", *tokenizer.vocab_files_names.values()}
    for file in sorted(files):
        if cached_file(name, file, _raise_exceptions_for_missing_entries=False) is not None:
            return tokenizer
    raise RuntimeError(hint)


def max_input_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The most tokens that model and tokenizer take, or None if neither has a limit.

    The least of the tokenizer's `model_max_length`, the configuration's `max_position_embeddings`
    and the rows of the position table. Tables with a padding row (XLM-R and its kin) start counting
    behind it: 514 rows hold 512 tokens.
    """
    limits = [tokenizer.model_max_length]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - unused)
    limit = min(limits)
    # transformers writes "no limit" as 1e30.
    return None if limit > 10**9 else int(limit)


def _pool(hidden: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """[N, T, H] to [N, H]. A row that attends to nothing has mean 0."""
    if pooling == "cls":
        return hidden[:, 0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if attention_mask is None:
        return hidden.mean(1, dtype=wide).to(hidden.dtype)
    attended = attention_mask.bool().unsqueeze(-1)  # [N, T, 1]
    total = hidden.masked_fill(~attended, 0).sum(1, dtype=wide)
    return (total / attended.sum(1).clamp(min=1)).to(hidden.dtype)


def _of_language(outputs: Sequence[Tensor], language_ids: Tensor) -> Tensor:
    """Row n of the output of its language: L tensors [N, D] and [N] to [N, D].

    gather refuses negative ids, which indexing would wrap round.
    """
    stacked = torch.stack(list(outputs))  # [L, N, D]
    index = language_ids.long().view(1, -1, 1).expand(1, -1, stacked.shape[-1])
    return stacked.gather(0, index).squeeze(0)


def _mean_module(modules: Sequence[nn.Module]) -> nn.Module:
    """A trainable copy of the first module with the mean of all; dtype and device are kept."""
    mean = copy.deepcopy(modules[0])
    for name, parameter in mean.named_parameters():
        values = torch.stack([module.get_parameter(name).detach() for module in modules])
        wide = torch.promote_types(values.dtype, torch.float32)
        parameter.data.copy_(values.to(wide).mean(0))
        parameter.grad = None
    return mean.requires_grad_(True)


def _check_range(name: str, ids: Tensor, size: int, skipped: tuple[int, ...], allowed: str) -> None:
    # Elsewhere a look at the values would cost a synchronisation or a graph break.
    if torch.compiler.is_compiling() or ids.device.type != "cpu":
        return
    bad = (ids < 0) | (ids >= size)
    for index in skipped:
        bad &= ids != index
    if bad.any():
        raise ValueError(f"{name} must be {allowed}; got {ids[bad].unique().tolist()}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    return value


def _as_text_config(
    text_config: PretrainedConfig | Mapping[str, Any] | None,
) -> PretrainedConfig:
    if isinstance(text_config, Mapping):
        values = dict(text_config)
        model_type = values.pop("model_type", None)
        if model_type is None:
            raise ValueError("text_config needs a model_type, such as 'bert'")
        config = AutoConfig.for_model(model_type, **values)
    elif isinstance(text_config, PretrainedConfig):
        config = copy.deepcopy(text_config)
    else:
        raise TypeError(f"text_config must be a PretrainedConfig or a dict, got {text_config!r}")
    if config.is_encoder_decoder:
        raise ValueError(f"text_config must be an encoder's, got the encoder-decoder {config.model_type!r}")
    if not isinstance(getattr(config, "hidden_size", None), int):
        raise ValueError(f"text_config must have a hidden_size, which {config.model_type!r} has not")
    return config


def _without_pooler(text_config: PretrainedConfig) -> dict[str, bool]:
    """Keyword arguments that leave out a pooler where the encoder knows how to.

    This model does not use it, and DDP refuses parameters without a gradient.
    """
    model_class = MODEL_MAPPING.get(type(text_config), None)
    classes = model_class if isinstance(model_class, (tuple, list)) else [model_class]
    if any(c is None or "add_pooling_layer" not in inspect.signature(c).parameters for c in classes):
        return {}
    return {"add_pooling_layer": False}


def _load_encoder(name_or_path: str | Path, text_config: PretrainedConfig) -> PreTrainedModel:
    encoder: PreTrainedModel
    encoder, info = AutoModel.from_pretrained(
        name_or_path,
        config=text_config,
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=False,
        **_without_pooler(text_config),
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise ValueError(
            f"encoder {str(name_or_path)!r} lacks weights of {type(encoder).__name__}: missing "
            f"{sorted(info['missing_keys'])}, of another shape {sorted(info['mismatched_keys'])}"
        )
    return encoder


AutoConfig.register(AMTSSConfig.model_type, AMTSSConfig, exist_ok=True)
AutoModelForSequenceClassification.register(AMTSSConfig, AMTSSForSequenceClassification, exist_ok=True)
