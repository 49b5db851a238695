"""Loaded teachers beside one student: what the pools of all tasks share, and the pool for texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import DatasetDict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amtss_fast.errors import UserError
from amtss_fast.models.heads import OutputHead
from amtss_fast.models.names import check_languages
from amtss_fast.models.tokenizers import check_vocabulary, embedding_rows, tokenizer_state
from amtss_fast.teachers.contract import Answers
from amtss_fast.teachers.residence import Residence
from amtss_fast.teachers.streams import Streams
from amtss_fast.teachers.teacher import Teacher


class LiveTeachers(ABC):
    """Several loaded teachers beside one student; the base of the pools.

    Args:
        teachers: K teachers with different names.
        languages: the student's languages; `language_ids` are places in it.
        tokenizer: the student's. A teacher with the same tokenizer reads the student's ids, any other one needs the
            texts. None: every teacher that has a tokenizer needs the texts.

    Raises:
        UserError: no teacher, a name twice, a teacher with a language that the student lacks or with none of its
            languages.
    """

    task: str
    label_names: list[str] | None
    heads: Sequence[OutputHead] = ()

    def __init__(
        self, teachers: Sequence[Teacher], languages: Sequence[str], tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        self.teachers = list(teachers)
        self.languages = check_languages(languages)
        if not self.teachers:
            raise UserError("teachers must hold at least one teacher, got none")
        if len(set(self.names)) != len(self.names):
            raise UserError(f"teachers must have different names (name=), got {self.names}")
        for teacher in self.teachers:
            self._check_languages(teacher)
            if teacher.tokenizer is None and tokenizer is not None:
                check_vocabulary(embedding_rows(teacher.model), tokenizer, f"teacher {teacher.name!r}")
        self.reads_text = _need_text(self.teachers, tokenizer)

    def _check_languages(self, teacher: Teacher) -> None:
        lacking = [code for code in teacher.languages or () if code not in self.languages]
        if lacking:
            raise UserError(
                f"teacher {teacher.name!r} teaches {', '.join(lacking)}, which the student has not; its languages "
                f"are {', '.join(self.languages)}"
            )
        if not any(teacher.teaches(code) for code in self.languages):
            raise UserError(
                f"teacher {teacher.name!r} knows {', '.join(teacher.own_languages or ())}, none of the student's "
                f"languages {', '.join(self.languages)}"
            )

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
        """Whether batches must carry their texts, because a teacher has another tokenizer."""
        return any(self.reads_text)

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

    @abstractmethod
    def ask(self, batch: Mapping[str, Any]) -> Callable[[], Answers]:
        """See :meth:`amtss_fast.teachers.contract.Teachers.ask`."""

    def number_rows(self, splits: DatasetDict) -> DatasetDict:
        """The splits as they are: loaded teachers need no numbers."""
        return splits

    def memory_footprint(self) -> int:
        """Bytes of parameters and buffers of all teachers."""
        return sum(teacher.memory_footprint() for teacher in self.teachers)


class TeacherPool(LiveTeachers):
    """Several teachers beside one student that classifies texts.

    A row goes only to the teachers that teach its language. A teacher without a row in the batch is not run, nor is
    one with prior 0. A language may have no teacher: its rows have no distillation term and keep their cross entropy.

    Args:
        teachers: K teachers with different names.
        label_names: the student's labels in the order of its logits.
        languages: the student's languages; `language_ids` are places in it.
        tokenizer: the student's. A teacher with the same tokenizer reads the student's ids, any other one needs the
            texts. None: every teacher that has a tokenizer needs the texts.
        resident: how many of the teachers, less than K, lie on `device` at a time
            (:class:`amtss_fast.teachers.residence.Residence`); they are given on the CPU, in float32 or bfloat16.
            None: each stays where it is.
        device: a CUDA device; with `resident`.

    Raises:
        UserError: no teacher, a name twice, languages or labels that do not match; `resident` outside its range,
            without a CUDA device, or with a teacher in 8 bits.
        ValueError: only one of `resident` and `device`.
    """

    task = "sequence-classification"
    label_names: list[str]

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
        super().__init__(teachers, languages, tokenizer)
        self.label_names = list(label_names)
        self._order = [teacher.align(self.label_names) for teacher in self.teachers]
        self._streams = Streams()
        self._residence: Residence | None = None
        if resident is not None and device is not None:
            place = torch.device(device)
            if place.type != "cuda":
                raise UserError(f"teachers take turns on a CUDA device, got resident={resident} with device={device}")
            self._take_turns(place, resident)
        elif resident is not None or device is not None:
            raise ValueError(f"resident and device belong together, got resident={resident} and device={device}")

    def _take_turns(self, device: torch.device, resident: int) -> None:
        models = [teacher.model for teacher in self.teachers]
        self._residence = Residence(models, self.names, device, resident, self._streams.of(device))

    def logits(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The teachers' logits of a batch [K, N, C] float32, and the mask [K, N] bool.

        Both lie on the device of `language_ids`, classes in the student's order. Where a teacher does not teach a row,
        its logits are 0 and the mask is False. Teachers may lie on other devices. On CUDA this waits for the device:
        once for the language ids, and once or twice per teacher (the length of its rows, whether its logits are
        finite).

        Args:
            batch: `language_ids` [N]; for teachers with the student's tokenizer `input_ids` and `attention_mask`
                [N, T] and the tokenizer's other outputs; for the others `text`, N strings, and for pairs `text_pair`.
                Other entries are ignored.

        Raises:
            ValueError: a missing or misshapen entry, a language id out of range.
            UserError: more tokens than a teacher takes.
            NotFiniteError: a teacher's logits are not finite.
        """
        return self._start(batch)()

    def ask(self, batch: Mapping[str, Any]) -> Callable[[], Answers]:
        """Starts the teachers; the returned function waits for them and gives the answers of :meth:`logits`.

        On CUDA they run in a stream of their own, beside what is enqueued between the two calls; on a CPU they are
        done before this returns. Raises as :meth:`logits`; logits that are not finite raise in the returned function.
        """
        finish = self._start(batch)

        def answers() -> Answers:
            logits, mask = finish()
            return Answers(logits.unbind(), mask)

        return answers

    def _start(self, batch: Mapping[str, Any]) -> Callable[[], tuple[Tensor, Tensor]]:
        ids = self._language_ids(batch)
        mask = self.teaches[:, ids]  # [K, N]
        places = [row.nonzero().squeeze(1) for row in mask]
        # All inputs are made before the first forward pass: making them may wait for the device.
        inputs = {k: self._inputs(k, batch, rows, ids) for k, rows in enumerate(places) if len(rows)}
        started, wait = self._streams.start(
            list(inputs) if self._residence is None else self._residence.turns(list(inputs)),
            lambda k: self.teachers[k].device,
            lambda k: self.teachers[k].start(inputs[k]),
        )

        def finish() -> tuple[Tensor, Tensor]:
            wait()
            inputs.clear()
            device = batch["language_ids"].device
            logits = torch.zeros(len(self), len(ids), len(self.label_names), dtype=torch.float32, device=device)
            for k, output in sorted(started.items()):
                logits[k, places[k].to(device)] = output()[:, self._order[k]].to(device, torch.float32)
            return logits, mask.to(device)

        return finish

    def _language_ids(self, batch: Mapping[str, Any]) -> Tensor:
        """[N] int64 on the CPU."""
        language_ids = batch.get("language_ids")
        if not isinstance(language_ids, Tensor) or language_ids.dim() != 1:
            raise ValueError(f"batch['language_ids'] must be a tensor [N], got {_describe(language_ids)}")
        ids = language_ids.cpu().long()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.languages):
            raise ValueError(
                f"batch['language_ids'] must be 0 to {len(self.languages) - 1} for "
                f"{', '.join(self.languages)}; got {ids.unique().tolist()}"
            )
        return ids

    def _inputs(self, k: int, batch: Mapping[str, Any], rows: Tensor, ids: Tensor) -> dict[str, Any]:
        """What teacher k is given: `rows` of the batch, and the language ids of an AMTSS student in its own numbers."""
        teacher = self.teachers[k]
        inputs = (_text_rows if self.reads_text[k] else _id_rows)(teacher, batch, rows, len(ids))
        if teacher.own_languages is not None:
            own = [teacher.own_languages.index(self.languages[i]) for i in ids[rows].tolist()]
            inputs["language_ids"] = torch.tensor(own)
        return inputs


def _text_rows(teacher: Teacher, batch: Mapping[str, Any], rows: Tensor, n: int) -> dict[str, Any]:
    """Texts of some rows, tokenized by the teacher."""
    first = _texts(teacher, batch, "text", n)
    second = None if batch.get("text_pair") is None else _texts(teacher, batch, "text_pair", n)
    places = rows.tolist()
    pairs = None if second is None else [second[i] for i in places]
    return dict(teacher.tokenize([first[i] for i in places], pairs))


def _texts(teacher: Teacher, batch: Mapping[str, Any], name: str, n: int) -> Sequence[str]:
    values = batch.get(name)
    if not isinstance(values, (list, tuple)) or len(values) != n:
        raise ValueError(
            f"teacher {teacher.name!r} has another tokenizer than the student and needs the raw strings: "
            f"batch[{name!r}] must be a list of {n}, got {_describe(values)}"
        )
    return values


def _id_rows(teacher: Teacher, batch: Mapping[str, Any], rows: Tensor, n: int) -> dict[str, Any]:
    """The student's ids of some rows, without the columns that only rows of other teachers use."""
    for name in ("input_ids", "attention_mask"):
        values = batch.get(name)
        if not isinstance(values, Tensor) or values.dim() != 2 or len(values) != n:
            raise ValueError(f"batch[{name!r}] must be a tensor [N, T] with N = {n}, got {_describe(values)}")
    shape = batch["input_ids"].shape
    rows = rows.to(batch["input_ids"].device)
    inputs = {name: value[rows] for name, value in batch.items() if isinstance(value, Tensor) and value.shape == shape}
    used = inputs["attention_mask"].any(0).nonzero().squeeze(1)
    first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
    if teacher.max_length is not None and last - first > teacher.max_length:
        raise UserError(
            f"teacher {teacher.name!r} takes at most {teacher.max_length} tokens, "
            f"batch['input_ids'] has {last - first}: truncate to that"
        )
    return {name: value[:, first:last] for name, value in inputs.items()}


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return "nothing" if value is None else type(value).__name__


def _need_text(teachers: Sequence[Teacher], tokenizer: PreTrainedTokenizerBase | None) -> list[bool]:
    """For each teacher whether the student's ids are not what its own tokenizer would give."""
    own = [teacher.tokenizer for teacher in teachers]
    if tokenizer is None:
        return [other is not None for other in own]
    if all(other is None or other is tokenizer for other in own):
        return [False] * len(own)
    student = tokenizer_state(tokenizer)
    return [other is not None and other is not tokenizer and tokenizer_state(other) != student for other in own]
