"""One frozen teacher: its logits, its tokens, its labels and its languages."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from amtss_fast._compat.torch import inner_tensors
from amtss_fast._compat.transformers import attention_implementation
from amtss_fast.errors import NotFiniteError, UserError
from amtss_fast.models.config import AMTSSConfig
from amtss_fast.models.names import check_languages, check_texts, normalize_label, show_names
from amtss_fast.models.positions import max_input_tokens
from amtss_fast.models.tokenizers import adopt_pad_token, check_vocabulary, embedding_rows
from amtss_fast.teachers import int8
from amtss_fast.teachers.batching import LENGTH_MULTIPLE, Batching, padded_right

# With the native kernels one more forward pass takes as long as this many tokens (12 layers of width 384, 2 cores).
_NATIVE_LEAST_SAVED = 128


class Teacher:
    """A frozen model that teaches some languages; usually made by :func:`load_teacher`.

    Args:
        model: a classifier or language model of transformers, also an AMTSS student. It is set to eval mode and frozen.
        name: its name in messages and reports.
        tokenizer: its tokenizer. None: it reads the ids that it is given.
        languages: codes that it teaches. None: all (an AMTSS student: all of its own).
        prior: its weight alpha before the margins are applied, finite and at least 0; 0 excludes it.
        label_names: the names of its outputs in order, in place of the model's `id2label`.
        max_length: the most tokens per row; default: what tokenizer and model allow.
        precision: the name of its weights' precision in reports; default: the model's dtype.
        compile: run it through `torch.compile`, once for all shapes; the first call then takes long.

    Raises:
        UserError: languages that an AMTSS student does not have; a prior or `max_length` outside its range; wrong
            `label_names`.
        TypeError: a prior, languages or label names of another type.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        name: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        languages: Sequence[str] | None = None,
        prior: float = 1.0,
        label_names: Sequence[str] | None = None,
        max_length: int | None = None,
        precision: str | None = None,
        compile: bool = False,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.precision = str(model.dtype).removeprefix("torch.") if precision is None else precision
        self.name = name
        self.tokenizer = tokenizer
        # An AMTSS student needs its own language ids and has a fixed list of languages.
        self.own_languages = tuple(model.config.languages) if isinstance(model.config, AMTSSConfig) else None
        self.languages = None if languages is None else tuple(check_languages(languages))
        self._check_own_languages()
        self.prior = _checked_prior(prior)
        self.label_names = _checked_labels(model, name, label_names)
        if tokenizer is not None:
            _fit_tokenizer(model, tokenizer, f"teacher {name!r}")
        self.max_length = self._checked_length(max_length)
        self.inputs = _input_names(model)
        self._forward: Any = torch.compile(model, dynamic=True) if compile else model
        # The native attention's sums do not depend on padding, so lengths need none.
        native = attention_implementation(model.config) == int8.ATTENTION
        self._batching = Batching(
            multiple=1 if native else LENGTH_MULTIPLE,
            least_saved=_NATIVE_LEAST_SAVED if native else 0,
            max_length=self.max_length,
            pad_id=_pad_id(model, tokenizer),
        )

    def _check_own_languages(self) -> None:
        if self.languages is None or self.own_languages is None:
            return
        unknown = [code for code in self.languages if code not in self.own_languages]
        if unknown:
            raise UserError(
                f"languages: teacher {self.name!r} does not know {', '.join(unknown)}; "
                f"it knows {', '.join(self.own_languages)}"
            )

    def _checked_length(self, max_length: int | None) -> int | None:
        allowed = None if self.tokenizer is None else max_input_tokens(self.model, self.tokenizer)
        if max_length is None:
            return allowed
        if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
            raise UserError(f"max_length must be an integer of at least 1, got {max_length!r}")
        if allowed is not None and max_length > allowed:
            raise UserError(f"max_length of teacher {self.name!r} must be at most {allowed}, got {max_length}")
        return max_length

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its logits, and of all weights that are not in 8 bits."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    def to(self, device: torch.device | str) -> Teacher:
        """Moves the model; returns the teacher."""
        self.model.to(device)
        return self

    def teaches(self, language: str) -> bool:
        """Whether it teaches this language."""
        languages = self.own_languages if self.languages is None else self.languages
        return languages is None or language in languages

    def logits(self, **batch: Any) -> Tensor:
        """Its logits [N, C] on its device, in its own dtype and order of labels (`label_names`).

        Runs in inference mode and outside autocast, so the precision is the teacher's own. The result is an ordinary
        tensor and may enter a loss. On CUDA the check for finite values waits for the device, once per call.

        Args:
            **batch: `input_ids` [N, T] in its own vocabulary, `attention_mask` and other arguments of its model's
                forward; labels and other entries are dropped. An AMTSS student needs `language_ids` in its own
                numbering.

        Raises:
            ValueError: no input_ids.
            NotFiniteError: a logit that is not finite; the message names the teacher.
        """
        if batch.get("input_ids") is None:
            raise ValueError(f"teacher {self.name!r} needs input_ids, got {sorted(batch)}")
        # Tensors of inference mode cannot be saved for a backward pass; a copy made outside can.
        return self.start(batch)().clone()

    def start(self, batch: Mapping[str, Any]) -> Callable[[], Tensor]:
        """Starts the forward pass of :meth:`logits`; the returned function waits for it, checks and gives the logits.

        They are a tensor of inference mode. On CUDA the forward pass is enqueued in the current stream, and only the
        returned function waits for it.
        """
        inputs = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
            if name in self.inputs and value is not None
        }
        inputs = padded_right(inputs)
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            logits = self._batching.run(self._forward, inputs)
            finite = logits.isfinite().all(-1)  # [N]

        def finish() -> Tensor:
            if not finite.all():
                raise NotFiniteError(
                    f"teacher {self.name!r} ({self.precision}) gave logits that are not finite in "
                    f"{int((~finite).sum())} of {len(finite)} rows"
                )
            return logits

        return finish

    def tokenize(self, texts: Sequence[str], text_pairs: Sequence[str] | None = None) -> Any:
        """The batch of its own tokenizer: tensors [N, T], T at most `max_length`.

        Raises:
            RuntimeError: it has no tokenizer.
            TypeError, ValueError: not strings, or unequal lengths.
        """
        if self.tokenizer is None:
            raise RuntimeError(f"teacher {self.name!r} has no tokenizer: pass tokenizer=")
        first, second = check_texts(texts, text_pairs)
        return self.tokenizer(
            first,
            second,
            padding=True,
            truncation=self.max_length is not None,
            max_length=self.max_length,
            return_tensors="pt",
            padding_side="right",
        )

    def align(self, label_names: Sequence[str]) -> list[int]:
        """For each of the student's labels the teacher's output of that name.

        Names are compared without case and outer blanks, with composed characters; their order may differ.

        Raises:
            UserError: the two sets of names differ; the message shows both.
        """
        own = [normalize_label(name) for name in self.label_names]
        wanted = [normalize_label(name) for name in label_names]
        if sorted(own) != sorted(wanted):
            raise UserError(
                f"labels of teacher {self.name!r} do not match: it has {show_names(self.label_names, label_names)}, "
                f"the student {show_names(label_names, self.label_names)}; if only the words differ, name the "
                "teacher's outputs in their order with label_names="
            )
        return [own.index(name) for name in wanted]

    def memory_footprint(self) -> int:
        """Bytes of parameters and buffers."""
        return sum(map(_bytes, [*self.model.parameters(), *self.model.buffers()]))

    def __repr__(self) -> str:
        languages = self.own_languages if self.languages is None else self.languages
        return (
            f"Teacher({self.name!r}, {type(self.model).__name__}, {self.precision}, {self.device}, "
            f"languages={'all' if languages is None else ','.join(languages)}, prior={self.prior:g}, "
            f"labels={'/'.join(self.label_names)}, {self.memory_footprint() / 2**20:.1f} MiB)"
        )


def _checked_prior(prior: float) -> float:
    if isinstance(prior, bool) or not isinstance(prior, (int, float)):
        raise TypeError(f"prior must be a number, got {prior!r}")
    if not math.isfinite(prior) or prior < 0:
        raise UserError(f"prior must be finite and at least 0, got {prior}")
    return float(prior)


def _checked_labels(model: PreTrainedModel, name: str, label_names: Sequence[str] | None) -> tuple[str, ...]:
    id2label: Any = model.config.id2label
    count = len(id2label)
    if label_names is None:
        if sorted(id2label) != list(range(count)):
            raise UserError(f"teacher {name!r}: the ids of id2label must be 0 to {count - 1}, got {id2label}")
        return tuple(id2label[index] for index in range(count))
    if isinstance(label_names, str) or not all(isinstance(label, str) for label in label_names):
        raise TypeError(f"label_names must be a list of strings, got {label_names!r}")
    if len(label_names) != count:
        raise UserError(f"label_names must name the {count} outputs of teacher {name!r}, got {list(label_names)}")
    if len({normalize_label(label) for label in label_names}) < count:
        raise UserError(f"label_names must name {count} different outputs, got {show_names(label_names)}")
    return tuple(label_names)


def _fit_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
    check_vocabulary(embedding_rows(model), tokenizer, whose)
    if tokenizer.pad_token_id is None:
        raise UserError(f"{whose}: its tokenizer has no pad token; set tokenizer.pad_token")
    adopt_pad_token(model.config, tokenizer)


def _input_names(model: PreTrainedModel) -> set[str]:
    """The inputs that its forward names. What a `**kwargs` would swallow is left out, because nothing checks it."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return named - {"labels", "return_dict"}


def _pad_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    for holder in (model.config, tokenizer):
        pad_id = getattr(holder, "pad_token_id", None)
        if pad_id is not None:
            return int(pad_id)
    return 0


def _bytes(tensor: Tensor) -> int:
    # torchao's weights report float32; what they hold counts.
    inner = inner_tensors(tensor)
    return sum(map(_bytes, inner)) if inner else tensor.numel() * tensor.element_size()
