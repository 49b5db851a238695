"""Teachers: loading, alignment of labels by name, routing of rows by language.

A `Teacher` is one frozen classifier. A `TeacherPool` asks several of them about a batch and gives
the loss what it wants: logits [K, N, C] in the student's order of labels, and the mask [K, N] of
who teaches which row.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from amtss_fast.models.student import (
    AMTSSConfig,
    check_languages,
    check_texts,
    load_tokenizer,
    max_input_tokens,
    normalise_label,
)
from amtss_fast.teachers import int8
from amtss_fast.teachers.residence import Residence

_T = TypeVar("_T")

PRECISIONS = ("float32", "bfloat16", "int8")

# On one thread of a CPU a row's logits have the same bits in every batch of at least this many rows whose length is a
# multiple of the second number: below that, matrix products and sums over positions take other paths. So logits of a
# cache are those of training. Several threads share a product out according to its size, which moves last bits.
_ROWS = 8
_COLUMNS = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
# Where products are this fast, one more forward pass takes as long as so many tokens (12 layers of 384, 2 cores).
_NATIVE_SAVED = 128

TASK_MODELS = {
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "masked-lm": AutoModelForMaskedLM,
    "causal-lm": AutoModelForCausalLM,
}

# Settings of a tokenizer that say where it came from or how it cuts and pads, or that its list of
# special tokens repeats.
_NOT_ABOUT_IDS = {
    "additional_special_tokens",
    "extra_special_tokens",
    "is_local",
    "local_files_only",
    "model_max_length",
    "name_or_path",
    "padding_side",
    "truncation_side",
}


class Teacher:
    """A frozen sequence classifier that teaches some languages; usually made by `load_teacher`.

    Args:
        model: any sequence classifier, an AMTSS student too. It is set to eval mode and frozen.
        name: how messages and reports call it.
        tokenizer: its tokenizer; None: it reads the ids that it is given.
        languages: codes that it teaches; None: all (of an AMTSS student: all of its own).
        prior: its weight alpha before the margins speak, finite and at least 0; 0 takes it out.
        label_names: the names of its outputs in order, in place of the model's `id2label`.
        max_length: the most tokens per row; default: what tokenizer and model allow.
        precision: what reports call the precision of its weights; default: the model's dtype.
        compile: run it through `torch.compile`, once for all shapes; its first call then takes long.

    Raises:
        TypeError, ValueError: naming the argument, the value given and what is allowed.
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
        self._forward: Any = torch.compile(model, dynamic=True) if compile else model
        # Sums of the native attention do not depend on what is padded.
        native = model.config._attn_implementation == int8.ATTENTION
        self._columns = 1 if native else _COLUMNS
        self._least_saved = _NATIVE_SAVED if native else 0
        self.name = name
        self.tokenizer = tokenizer
        self.languages = None if languages is None else tuple(check_languages(languages))
        # A student as teacher wants its own language ids, and knows only its own languages.
        self.own_languages = tuple(model.config.languages) if isinstance(model.config, AMTSSConfig) else None
        if self.languages is not None and self.own_languages is not None:
            unknown = [code for code in self.languages if code not in self.own_languages]
            if unknown:
                raise ValueError(
                    f"languages: teacher {name!r} does not know {', '.join(unknown)}; "
                    f"it knows {', '.join(self.own_languages)}"
                )
        if isinstance(prior, bool) or not isinstance(prior, (int, float)):
            raise TypeError(f"prior must be a number, got {prior!r}")
        if not math.isfinite(prior) or prior < 0:
            raise ValueError(f"prior must be finite and at least 0, got {prior}")
        self.prior = float(prior)
        self.label_names = _label_names(model, name, label_names)
        allowed = None if tokenizer is None else max_input_tokens(model, tokenizer)
        if max_length is not None and (
            isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1
        ):
            raise ValueError(f"max_length must be an integer of at least 1, got {max_length!r}")
        if max_length is not None and allowed is not None and max_length > allowed:
            raise ValueError(f"max_length of teacher {name!r} must be at most {allowed}, got {max_length}")
        self.max_length = allowed if max_length is None else max_length
        # What its forward takes. Only what the signature names: behind a **kwargs nobody checks what arrives.
        parameters = inspect.signature(model.forward).parameters.values()
        self.inputs = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {
            "labels",
            "return_dict",
        }

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its logits, and of all weights that are not in 8 bits."""
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

        Runs in inference mode and outside autocast: the precision is the teacher's own. The result
        is an ordinary tensor, so it may enter a loss. On CUDA the check for finite values waits for
        the device, once per call.

        Args:
            **batch: `input_ids` [N, T] in its own vocabulary, `attention_mask` and what else its
                model's forward names; other entries, and labels, are left out. A student as teacher
                wants `language_ids`, in its own numbering.

        Raises:
            ValueError: no input_ids.
            RuntimeError: a logit that is not finite; the message names the teacher.
        """
        if batch.get("input_ids") is None:
            raise ValueError(f"teacher {self.name!r} needs input_ids, got {sorted(batch)}")
        output, finite = self._start(batch)
        self._check(finite)
        # Tensors of inference mode cannot be saved for a backward pass; a copy made outside can.
        return output.clone()

    def _start(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits [N, C] and which rows of them are finite [N]; on CUDA without waiting for them."""
        inputs = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
            if name in self.inputs and value is not None
        }
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            output = self._in_groups(inputs)
            return output, output.isfinite().all(-1)

    def _check(self, finite: Tensor) -> None:
        if not finite.all():
            raise RuntimeError(
                f"teacher {self.name!r} ({self.precision}) gave logits that are not finite in "
                f"{int((~finite).sum())} of {len(finite)} rows"
            )

    def _in_groups(self, inputs: dict[str, Any]) -> Tensor:
        """On CPUs rows of like length go together, as padding costs what words cost; on CUDA all rows at once."""
        n, length = inputs["input_ids"].shape
        mask = inputs.get("attention_mask")
        groups = [slice(n)]
        if mask is not None and self.device.type == "cpu":
            lengths, order = mask.sum(1).sort(descending=True, stable=True)
            groups = _groups(lengths.tolist(), self._least_saved)
        if len(groups) == 1:
            return cast(Tensor, self._forward(**self._padded(inputs), return_dict=True).logits[:n])
        parts = []
        for group in groups:
            rows = order[group]
            part = {
                name: value[rows] if isinstance(value, Tensor) and len(value) == n else value
                for name, value in inputs.items()
            }
            used = part["attention_mask"].any(0).nonzero().squeeze(1)
            # On the right only: positions may count from the first column.
            columns = slice(int(used[-1]) + 1 if len(used) else 1)
            part = {
                name: value[:, columns] if isinstance(value, Tensor) and value.shape[1:] == (length,) else value
                for name, value in part.items()
            }
            parts.append(self._forward(**self._padded(part), return_dict=True).logits[: len(rows)])
        return torch.cat(parts)[order.argsort()]

    def _padded(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """At least `_ROWS` rows, by copies of the first, and a multiple of `_columns` tokens if it takes them."""
        n, length = inputs["input_ids"].shape
        columns = -length % self._columns
        if self.max_length is None or length + columns > self.max_length or "attention_mask" not in inputs:
            columns = 0
        copies = max(0, _ROWS - n) if n else 0
        padded = {}
        for name, value in inputs.items():
            if isinstance(value, Tensor) and len(value) == n:
                if value.dim() == 2 and value.shape[1] == length:
                    value = F.pad(value, (0, columns), value=self._pad_id if name == "input_ids" else 0)
                value = torch.cat([value, value[:1].expand(copies, *value.shape[1:])])
            padded[name] = value
        return padded

    @property
    def _pad_id(self) -> int:
        for holder in (self.model.config, self.tokenizer):
            pad_id = getattr(holder, "pad_token_id", None)
            if pad_id is not None:
                return int(pad_id)
        return 0

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
        )

    def align(self, label_names: Sequence[str]) -> list[int]:
        """For each of the student's labels the teacher's output of that name.

        Names are compared without case and outer blanks; their order may differ.

        Raises:
            ValueError: the two sets of names differ; shows both.
        """
        own = [normalise_label(name) for name in self.label_names]
        wanted = [normalise_label(name) for name in label_names]
        if sorted(own) != sorted(wanted):
            raise ValueError(
                f"labels of teacher {self.name!r} do not match: it has {list(self.label_names)}, "
                f"the student {list(label_names)}; if only the words differ, name the teacher's "
                "outputs in their order with label_names="
            )
        return [own.index(name) for name in wanted]

    def memory_footprint(self) -> int:
        """Bytes of parameters and buffers."""
        return sum(map(_bytes, [*self.model.parameters(), *self.model.buffers()]))

    def __repr__(self) -> str:
        languages = "all" if self.languages is None else ",".join(self.languages)
        if self.languages is None and self.own_languages is not None:
            languages = ",".join(self.own_languages)
        return (
            f"Teacher({self.name!r}, {type(self.model).__name__}, {self.precision}, {self.device}, "
            f"languages={languages}, prior={self.prior:g}, labels={'/'.join(self.label_names)}, "
            f"{self.memory_footprint() / 2**20:.1f} MiB)"
        )


def load_teacher(
    name_or_path: str | Path,
    *,
    precision: str = "float32",
    engine: str | None = None,
    compile: bool = False,
    languages: Sequence[str] | None = None,
    prior: float = 1.0,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    device: torch.device | str | None = None,
    label_names: Sequence[str] | None = None,
    max_length: int | None = None,
    name: str | None = None,
    task: str = "sequence-classification",
) -> Teacher:
    """Loads a fine-tuned classifier or language model (safetensors only) as a teacher.

    Args:
        name_or_path: a Hub id or a folder, also of an AMTSS student.
        precision: `"float32"` or `"bfloat16"`, of all parameters; or `"int8"`: linear layers of the encoder and word
            embeddings in 8 bits, quantised one at a time as they are read. What that changes for a teacher,
            `amtss-fast teachers check` measures.
        engine: what runs int8: `"native"` (CPUs with AVX-512 VNNI), `"onednn"` (x86 CPUs), `"bitsandbytes"` or
            `"torchao"` (packages of that name); default: bitsandbytes on CUDA; on CPUs native, else onednn.
        compile: run it through `torch.compile` (needs a C++ compiler on CPUs): one compilation for all shapes, of
            half a minute or more at the first call.
        languages: codes that it teaches; default: all (of an AMTSS student: all of its own).
        prior: its weight before the margins speak, at least 0; 0 takes it out.
        tokenizer: a tokenizer, or where to load it; default: the one saved with the model.
        device: default: the CPU.
        label_names: the names of its outputs in order, where the checkpoint's are LABEL_0, ... or
            in other words than the student's.
        max_length: the most tokens per row when it tokenises for itself; default: the tokenizer's
            `model_max_length`, bounded by the model's positions.
        name: how messages and reports call it; default: the last part of `name_or_path`.
        task: what it does: `"sequence-classification"`, `"token-classification"`, `"masked-lm"` or `"causal-lm"`.

    Raises:
        TypeError, ValueError: a bad argument; a checkpoint without a trained head.
        RuntimeError: no tokenizer given and none beside the model.
        ImportError: an engine that is missing.
        OSError: nothing found under that name, or no safetensors file.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if task not in TASK_MODELS:
        raise ValueError(f"task must be one of {', '.join(TASK_MODELS)}; got {task!r}")
    if engine is not None and precision != "int8":
        raise ValueError(f"engine={engine!r} is for precision 'int8', not {precision!r}")
    place = torch.device("cpu" if device is None else device)
    options: dict[str, Any]
    if precision == "int8":
        engine = int8.choose_engine(engine, place)
        with torch.device("meta"):
            skeleton = TASK_MODELS[task].from_config(AutoConfig.from_pretrained(name_or_path, trust_remote_code=False))
        options = int8.loading_options(engine, place, skeleton)
    else:
        options = {"dtype": getattr(torch, precision)}
    model, info = TASK_MODELS[task].from_pretrained(
        name_or_path,
        **options,
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    # transformers only warns of them, and draws them at random.
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ValueError(
            f"teacher {str(name_or_path)!r} is no fine-tuned {type(model).__name__}: "
            f"its checkpoint lacks {', '.join(missing)}"
        )
    if precision == "int8":
        int8.quantize_embedding(model)
        int8.leave_file(model)
        precision = f"int8 ({engine})"
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = load_tokenizer(name_or_path if tokenizer is None else tokenizer)
    return Teacher(
        model if "quantization_config" in options else model.to(place),
        name=Path(name_or_path).resolve().name if name is None else name,
        tokenizer=tokenizer,
        languages=languages,
        prior=prior,
        label_names=label_names,
        max_length=max_length,
        precision=precision,
        compile=compile,
    )


class Teachers:
    """Several teachers beside one student, and what each of them teaches: what is common to the pools of all tasks.

    Args:
        teachers: K teachers with different names.
        languages: the student's languages; `language_ids` are places in it.
        tokenizer: the student's, or None.
        resident: how many of them, less than K, lie on `device` at a time (`residence.Residence`);
            they come on the CPU, in float32 or bfloat16. None: each stays where it is.
        device: a CUDA device; with `resident`.

    Raises:
        ValueError: no teacher, a name twice, a teacher with a language that the student lacks or with none of its
            languages; `resident` outside its range, without a CUDA device, or with a teacher in 8 bits.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        languages: Sequence[str],
        tokenizer: PreTrainedTokenizerBase | None,
        resident: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.teachers = list(teachers)
        self.languages = check_languages(languages)
        if not self.teachers:
            raise ValueError("teachers must hold at least one teacher, got none")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"teachers must have different names (name=), got {self.names}")
        for teacher in self.teachers:
            lacking = [code for code in teacher.languages or () if code not in self.languages]
            if lacking:
                raise ValueError(
                    f"teacher {teacher.name!r} teaches {', '.join(lacking)}, which the student has not; its languages "
                    f"are {', '.join(self.languages)}"
                )
            if not any(teacher.teaches(code) for code in self.languages):
                raise ValueError(
                    f"teacher {teacher.name!r} knows {', '.join(teacher.own_languages or ())}, none of the student's "
                    f"languages {', '.join(self.languages)}"
                )
        self._reads_text = _need_text(self.teachers, tokenizer)
        self._streams: dict[torch.device, Any] = {}
        self._residence: Residence | None = None
        if (resident is None) != (device is None):
            raise ValueError(f"resident and device belong together, got resident={resident} and device={device}")
        if resident is not None:
            place = torch.device(cast(Any, device))
            if place.type != "cuda":
                raise ValueError(f"teachers take turns on a CUDA device, got resident={resident} with device={device}")
            self._take_turns(place, resident)

    def _take_turns(self, device: torch.device, resident: int) -> None:
        models = [teacher.model for teacher in self.teachers]
        self._residence = Residence(models, self.names, device, resident, self._stream(device))

    def _stream(self, device: torch.device) -> Any:
        """Where teachers work on a device: beside the student, not in its stream."""
        if device not in self._streams:
            self._streams[device] = torch.get_device_module(device).Stream(device)
        return self._streams[device]

    def _each(self, wanted: Sequence[int], run: Callable[[int], _T]) -> tuple[dict[int, _T], Callable[[], None]]:
        """run(k) of each teacher in `wanted`, in its device's stream for teachers and with its weights there; and a
        function after which the device's current stream has waited for it all.

        What `run` reads on a device must live until then.
        """
        results = {}
        used = set()
        for k in wanted if self._residence is None else self._residence.turns(wanted):
            device = self.teachers[k].device
            stream, module = self._stream(device), torch.get_device_module(device)
            if device not in used:
                stream.wait_stream(module.current_stream(device))
                used.add(device)
            with module.stream(stream):
                results[k] = run(k)

        def wait() -> None:
            for device in used:
                torch.get_device_module(device).current_stream(device).wait_stream(self._stream(device))

        return results, wait

    def __len__(self) -> int:
        return len(self.teachers)

    def __repr__(self) -> str:
        lines = "".join(f"\n  {teacher!r}" for teacher in self.teachers)
        size = self.memory_footprint() / 2**20
        return f"{type(self).__name__}({len(self)} teachers, {size:.1f} MiB):{lines}"

    @property
    def names(self) -> list[str]:
        """The K names."""
        return [teacher.name for teacher in self.teachers]

    @property
    def needs_text(self) -> bool:
        """Whether batches must carry the raw strings, because a tokenizer differs."""
        return any(self._reads_text)

    @property
    def prior(self) -> Tensor:
        """[K] float32 on the CPU: the teachers' priors, `teacher_prior` of the loss."""
        return torch.tensor([teacher.prior for teacher in self.teachers], dtype=torch.float32)

    @property
    def teaches(self) -> Tensor:
        """[K, L] bool on the CPU: teacher k teaches language l (and its prior is not 0)."""
        return torch.tensor(
            [[t.prior > 0 and t.teaches(code) for code in self.languages] for t in self.teachers], dtype=torch.bool
        )

    def memory_footprint(self) -> int:
        """Bytes of parameters and buffers of all teachers."""
        return sum(teacher.memory_footprint() for teacher in self.teachers)


class TeacherPool(Teachers):
    """Several teachers beside one student that classifies texts.

    A row goes only to the teachers that teach its language; a teacher without a row in the batch is
    not run, nor is one with prior 0. A language that nobody teaches is legal: its rows have no
    distillation term and keep their cross entropy.

    Args:
        teachers: K teachers with different names.
        label_names: the student's labels in the order of its logits.
        languages: the student's languages; `language_ids` are places in it.
        tokenizer: the student's. A teacher with the same tokenizer reads the student's ids; any
            other needs the texts. None: every teacher that has a tokenizer needs the texts.
        resident, device: as of :class:`Teachers`.

    Raises:
        ValueError: as :class:`Teachers`; labels that do not match.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        *,
        label_names: Sequence[str],
        languages: Sequence[str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        resident: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(teachers, languages, tokenizer, resident, device)
        self.label_names = list(label_names)
        self._order = [teacher.align(self.label_names) for teacher in self.teachers]

    def logits(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """What the teachers say about a batch: logits [K, N, C] float32 and mask [K, N] bool.

        Both lie on the device of `language_ids`, classes in the student's order. Rows that a
        teacher does not teach are 0 with mask False. Teachers may lie on other devices. On CUDA
        this waits for the device: once for the language ids, and once or twice per teacher (how
        long its rows are, whether its logits are finite).

        Args:
            batch: `language_ids` [N]; for teachers with the student's tokenizer `input_ids`,
                `attention_mask` [N, T] and what else the tokenizer gave; for the others `text`, N
                strings, and for pairs `text_pair`. Other entries are left alone.

        Raises:
            ValueError: a missing or misshapen entry, a language id out of range, more tokens than a
                teacher takes.
            RuntimeError: from a teacher whose logits are not finite.
        """
        return self.ask(batch)()

    def ask(self, batch: Mapping[str, Any]) -> Callable[[], tuple[Tensor, Tensor]]:
        """Starts the teachers; the function that it returns waits for them and gives what :meth:`logits` gives.

        On CUDA they run in a stream of their own, beside what is enqueued between the two calls; on
        a CPU they are done before this returns. Raises as :meth:`logits`: here, but for logits that
        are not finite, which only the function can see.
        """
        language_ids = batch.get("language_ids")
        if not isinstance(language_ids, Tensor) or language_ids.dim() != 1:
            raise ValueError(f"batch['language_ids'] must be a tensor [N], got {_describe(language_ids)}")
        ids = language_ids.cpu().long()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.languages):
            raise ValueError(
                f"batch['language_ids'] must be 0 to {len(self.languages) - 1} for "
                f"{', '.join(self.languages)}; got {ids.unique().tolist()}"
            )
        mask = self.teaches[:, ids]  # [K, N]
        # All inputs first: what has to be known of them waits for the device.
        inputs: dict[int, dict[str, Any]] = {}
        places = [row.nonzero().squeeze(1) for row in mask]
        for k, (teacher, rows) in enumerate(zip(self.teachers, places, strict=True)):
            if not len(rows):
                continue
            taught = self._text_rows if self._reads_text[k] else self._id_rows
            inputs[k] = taught(teacher, batch, rows, len(ids))
            if teacher.own_languages is not None:
                own = [teacher.own_languages.index(self.languages[i]) for i in ids[rows].tolist()]
                inputs[k]["language_ids"] = torch.tensor(own)
        started, wait = self._each(list(inputs), lambda k: self.teachers[k]._start(inputs[k]))

        def finish() -> tuple[Tensor, Tensor]:
            wait()
            inputs.clear()
            device = language_ids.device
            logits = torch.zeros(len(self), len(ids), len(self.label_names), dtype=torch.float32, device=device)
            for k, (output, finite) in sorted(started.items()):
                self.teachers[k]._check(finite)
                logits[k, places[k].to(device)] = output[:, self._order[k]].to(device, torch.float32)
            return logits, mask.to(device)

        return finish

    def _text_rows(self, teacher: Teacher, batch: Mapping[str, Any], rows: Tensor, n: int) -> dict[str, Any]:
        columns: list[list[str] | None] = []
        for name in ("text", "text_pair"):
            values = batch.get(name)
            if values is None and name == "text_pair":
                columns.append(None)
                continue
            if not isinstance(values, (list, tuple)) or len(values) != n:
                raise ValueError(
                    f"teacher {teacher.name!r} has another tokenizer than the student and needs "
                    f"the raw strings: batch[{name!r}] must be a list of {n}, "
                    f"got {_describe(values)}"
                )
            columns.append([values[i] for i in rows.tolist()])
        first, second = columns
        assert first is not None
        return dict(teacher.tokenize(first, second))

    def _id_rows(self, teacher: Teacher, batch: Mapping[str, Any], rows: Tensor, n: int) -> dict[str, Any]:
        for name in ("input_ids", "attention_mask"):
            values = batch.get(name)
            if not isinstance(values, Tensor) or values.dim() != 2 or len(values) != n:
                raise ValueError(f"batch[{name!r}] must be a tensor [N, T] with N = {n}, got {_describe(values)}")
        shape = batch["input_ids"].shape
        rows = rows.to(batch["input_ids"].device)
        inputs = {
            name: value[rows] for name, value in batch.items() if isinstance(value, Tensor) and value.shape == shape
        }
        # Without the columns that only longer rows of other teachers need.
        used = inputs["attention_mask"].any(0).nonzero().squeeze(1)
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
        if teacher.max_length is not None and last - first > teacher.max_length:
            raise ValueError(
                f"teacher {teacher.name!r} takes at most {teacher.max_length} tokens, "
                f"batch['input_ids'] has {last - first}: truncate to that"
            )
        return {name: value[:, first:last] for name, value in inputs.items()}


def _bytes(tensor: Tensor) -> int:
    if is_traceable_wrapper_subclass(tensor):
        # torchao's weights, which say that they are float32.
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def _groups(lengths: Sequence[int], least_saved: int) -> list[slice]:
    """Places of rows sorted from long to short, cut where at least `_ROWS` rows begin that are a quarter shorter, if
    that saves at least so many tokens of padding.
    """
    groups, start = [], 0
    for row in range(_ROWS, len(lengths) - _ROWS + 1):
        saved = (len(lengths) - row) * (lengths[start] - lengths[row])
        if row - start >= _ROWS and lengths[row] <= 0.75 * lengths[start] and saved >= least_saved:
            groups.append(slice(start, row))
            start = row
    return [*groups, slice(start, len(lengths))]


def _label_names(model: PreTrainedModel, name: str, label_names: Sequence[str] | None) -> tuple[str, ...]:
    id2label = cast(dict[int, str], model.config.id2label)
    count = len(id2label)
    if label_names is None:
        return tuple(id2label[index] for index in range(count))
    if isinstance(label_names, str) or not all(isinstance(label, str) for label in label_names):
        raise TypeError(f"label_names must be a list of strings, got {label_names!r}")
    if len(label_names) != count:
        raise ValueError(f"label_names must name the {count} outputs of teacher {name!r}, got {list(label_names)}")
    if len({normalise_label(label) for label in label_names}) < count:
        raise ValueError(f"label_names must name {count} different outputs, got {list(label_names)}")
    return tuple(label_names)


def _need_text(teachers: Sequence[Teacher], tokenizer: PreTrainedTokenizerBase | None) -> list[bool]:
    """For each teacher whether the student's ids are not what its own tokenizer would give."""
    own = [teacher.tokenizer for teacher in teachers]
    if tokenizer is None:
        return [other is not None for other in own]
    if all(other is None or other is tokenizer for other in own):
        return [False] * len(own)
    student = _tokenizer_state(tokenizer)
    return [other is not None and other is not tokenizer and _tokenizer_state(other) != student for other in own]


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Equal for tokenizers that give the same ids: everything but truncation and padding.

    A fast tokenizer is its serialised pipeline (normaliser, vocabulary, merges, added tokens,
    template); any other one its class, vocabulary and settings. Special tokens count in both, as a
    model may look at the padding id, and so do the names of the inputs that it makes.
    """
    state: dict[str, Any] = {
        "roles": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "special": sorted(tokenizer.all_special_tokens),
        "inputs": sorted(tokenizer.model_input_names),
    }
    if tokenizer.is_fast:
        pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
        state["pipeline"] = {**pipeline, "truncation": None, "padding": None}
    else:
        state["class"] = type(tokenizer).__qualname__
        state["vocabulary"] = tokenizer.get_vocab()
        state["settings"] = {
            name: repr(value)
            for name, value in tokenizer.init_kwargs.items()
            if value is not None and name not in _NOT_ABOUT_IDS and not name.endswith("_file")
        }
    return state


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return "nothing" if value is None else type(value).__name__
