"""Distillation in the stock `transformers.Trainer`: its arguments, its loss, and metrics for each language."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from functools import partial
from typing import Any, cast, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from amtss_fast.data.sampling import LANGUAGE_SAMPLINGS, LanguageSampler, LanguageSampling, check_sampling
from amtss_fast.loss import AMTSSStats, LossOptions, amtss_loss
from amtss_fast.loss.adaptive import AdaptiveStrategy, check_adaptive_options
from amtss_fast.loss.options import IGNORE_INDEX, OPTION_NAMES
from amtss_fast.models.student import AMTSSForSequenceClassification
from amtss_fast.teachers.cache import ROW, CachedTeachers
from amtss_fast.teachers.teacher import TeacherPool
from amtss_fast.training.tasks.tokens import TOKEN_TASKS, TokenTask, TokenTeachers, token_metrics, token_targets

TASKS = ("sequence-classification", *TOKEN_TASKS)


# The stock arguments have a smoothing of their own; labels and the mean are the trainer's business.
_NO_ARGUMENTS = ("label_smoothing", "ignore_index", "unlabeled_index", "reduction")
_LOSS_ARGUMENTS = tuple(name for name in OPTION_NAMES if name not in _NO_ARGUMENTS)


def _loss_arguments() -> type:
    """A data class with the options of the loss as arguments, made from :class:`~amtss_fast.LossOptions`."""
    kinds = get_type_hints(LossOptions)
    chosen = [f for f in fields(LossOptions) if f.name in _LOSS_ARGUMENTS]
    return make_dataclass(
        "LossArguments", [(f.name, kinds[f.name], field(default=f.default, metadata=f.metadata)) for f in chosen]
    )


_LossArguments: Any = _loss_arguments()


@dataclass
class AMTSSTrainingArguments(_LossArguments, TrainingArguments):
    """`TrainingArguments` and the options of :func:`amtss_fast.amtss_loss`, with the same names and defaults.

    `label_smoothing_factor`, which `TrainingArguments` has, smooths the cross entropy.

    Raises:
        ValueError: an option outside its range, named in the message.
    """

    task: str = field(default="sequence-classification", metadata={"help": "What the models do.", "choices": TASKS})
    chunk_rows: int | None = field(
        default=None,
        metadata={"help": "Tokens whose logits a language model's loss holds at a time. Default: by their size."},
    )
    importance_temperature: float | None = field(
        default=None,
        metadata={"help": "Lean on the teachers that are better in each language; 0.2 suits margins. Default: off."},
    )
    gap_temperature: float | None = field(
        default=None,
        metadata={"help": "Weigh languages by how far the student lags behind its teachers. Default: off."},
    )
    language_sampling: LanguageSampling | None = field(
        default=None,
        metadata={
            "help": "How languages are drawn; default: the rows of `train_sampling_strategy`, language unseen.",
            "choices": LANGUAGE_SAMPLINGS,
        },
    )
    language_sampling_exponent: float = field(
        default=0.3, metadata={"help": 'Of language_sampling="temperature": 1 is proportional, 0 balanced.'}
    )
    loss_backend: str | None = field(
        default=None, metadata={"help": "Backend of the loss; default: the best that runs the tensors."}
    )
    # All parameters take part in every step, some of them (a fused head) outside of the model's own forward pass.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters without a gradient in each step of several processes."}
    )
    # The teachers may need the texts, which the student's forward does not name.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop the columns that the student's forward does not name."}
    )

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}; got {self.task!r}")
        if self.chunk_rows is not None and self.chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1, got {self.chunk_rows}")
        self.loss_options()
        check_adaptive_options(self.importance_temperature, self.gap_temperature)
        if self.language_sampling is not None:
            check_sampling(self.language_sampling, self.language_sampling_exponent)
            if self.train_sampling_strategy != "random":
                raise ValueError(
                    f"language_sampling={self.language_sampling!r} draws the rows itself: it needs "
                    f'train_sampling_strategy="random", got {str(self.train_sampling_strategy)!r}'
                )
        if self.language_sampling == "adaptive" and self.gap_temperature is None:
            raise ValueError('language_sampling="adaptive" needs gap_temperature, got None')
        super().__post_init__()

    def loss_options(self) -> LossOptions:
        """The options of the loss among these arguments."""
        chosen = {name: getattr(self, name) for name in _LOSS_ARGUMENTS}
        return LossOptions(label_smoothing=self.label_smoothing_factor, **chosen)


class AMTSSTrainer(Trainer):
    """The stock loop with the loss of :func:`amtss_fast.amtss_loss`.

    Rows of the data hold what :func:`amtss_fast.data.encode` makes: token ids, `language_ids` and `labels` (-1: without
    a label, -100: dropped). The loss of an optimiser step is the mean over all its rows, however gradient accumulation
    and processes split them. Evaluation is the labels' cross entropy and :func:`language_metrics`, without teachers.

    Each training log adds, over the rows since the last one, `kd` (mean weighted KL, without temperature²),
    `teacher_weight/NAME/LANGUAGE`, `teacher_margin/NAME/LANGUAGE` and `student_margin/LANGUAGE`; and the state of the
    adaptive strategy, `teacher_importance/NAME/LANGUAGE` and `language_weight/LANGUAGE`.

    `importance_temperature` and `gap_temperature` switch the parts of :class:`amtss_fast.AdaptiveStrategy` on, as
    `adaptive`; with `language_sampling="adaptive"` the language weights act on the sampler in place of the loss. The
    strategy learns from the rows with a label, is saved in checkpoints, and starts from the teachers' margins on the
    labelled rows of `eval_dataset` where there is one.

    Args:
        model: a student of the task: :class:`AMTSSForSequenceClassification`, or for the tasks of tokens any masked or
            causal language model or token classifier.
        teachers: what distils (:class:`TokenTeachers` in tasks of tokens); None trains on the labels
            alone (then `kd_weight` must be 0).
        languages: what `language_ids` number, for the metrics of a token task; default: the teachers'.
        others: as of `transformers.Trainer`. `compute_metrics` gets `label_ids = (labels, language_ids)`.

    In tasks of tokens (`args.task`) `labels` are [N, T] and rows are the tokens that count
    (:func:`~amtss_fast.training.tasks.tokens.token_targets`). Language models go through the fused head
    (:func:`amtss_fast.linear_amtss_loss`), which the optimiser's head is part of: no sharded parameters. Evaluation is
    :func:`~amtss_fast.training.tasks.tokens.token_metrics`.

    Raises:
        ValueError: teachers and `kd_weight` that do not fit, languages or labels that differ from the student's.
    """

    args: AMTSSTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel,
        args: AMTSSTrainingArguments,
        *,
        teachers: TeacherPool | CachedTeachers | TokenTeachers | None = None,
        languages: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if (teachers is None) != (args.kd_weight == 0):
            raise ValueError(
                f"kd_weight = {args.kd_weight} with teachers = {teachers!r}: distillation needs teachers and "
                "kd_weight > 0, training on the labels alone needs teachers=None and kd_weight=0"
            )
        if languages is None:
            languages = teachers.languages if isinstance(teachers, TokenTeachers) else model.config.languages
        if teachers is not None and teachers.languages != list(languages):
            raise ValueError(f"teachers are for languages {teachers.languages}, the student has {languages}")
        if isinstance(teachers, (TeacherPool, CachedTeachers)) and teachers.label_names != model.config.label_names:
            raise ValueError(
                f"teachers are for labels {teachers.label_names}, the student has {model.config.label_names}"
            )
        taught = getattr(teachers, "task", "sequence-classification")
        if teachers is not None and taught != args.task:
            raise ValueError(f"teachers are for task {taught!r}, args.task is {args.task!r}")
        if args.task in TOKEN_TASKS and (args.importance_temperature, args.gap_temperature) != (None, None):
            raise ValueError(f"the adaptive strategy is for sequence-classification, args.task is {args.task!r}")
        self._tokens: TokenTask | None = None
        metrics = language_metrics
        if args.task in TOKEN_TASKS:
            self._tokens, metrics = TokenTask(args.task, model, languages), _token_metrics
        elif not isinstance(model, AMTSSForSequenceClassification):
            raise ValueError(
                f"task 'sequence-classification' trains an AMTSSForSequenceClassification, got {type(model).__name__}"
            )
        if kwargs.get("compute_metrics") is None:
            kwargs["compute_metrics"] = lambda prediction: metrics(prediction, languages)
        super().__init__(model, args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} devices in one process (nn.DataParallel) are not supported: start with "
                "`torchrun --nproc-per-node N` or `accelerate launch`, or show one device (CUDA_VISIBLE_DEVICES)"
            )
        # Evaluation gathers both, so that metrics know the language of each row.
        self.label_names = ["labels", "language_ids"]
        if self._tokens is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("task 'masked-lm' and its kin need whole parameters: no FSDP, no DeepSpeed")
            # `token_targets` shifts.
            self._loss_shifts_labels = False
        # The loss takes `num_items_in_batch`, so the stock loop has to count it and not to divide again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        for stock, short in ((ProgressCallback, _ShortProgress), (PrinterCallback, _ShortPrinter)):
            if self.pop_callback(stock) is not None:
                self.add_callback(short)
        if hasattr(self.data_collator, "epoch"):
            self.add_callback(_SetsEpoch(self.data_collator))
        self.teachers = teachers
        self._meter = None if teachers is None else _Meter(teachers.names, teachers.languages)
        self.adaptive: AdaptiveStrategy | None = None
        self._language_sampler: LanguageSampler | None = None
        if teachers is not None and (args.importance_temperature, args.gap_temperature) != (None, None):
            self.adaptive = AdaptiveStrategy(
                len(teachers),
                len(teachers.languages),
                importance_temperature=args.importance_temperature,
                gap_temperature=args.gap_temperature,
            )
        if args.language_sampling == "adaptive" and self.adaptive is None:
            raise ValueError('language_sampling="adaptive" needs teachers')
        if self.adaptive is not None or args.language_sampling is not None:
            if args.restore_callback_states_from_checkpoint:
                raise ValueError(
                    "restore_callback_states_from_checkpoint=True makes callbacks anew, which those of the adaptive "
                    "strategy and of language_sampling cannot be; they are restored from checkpoints without"
                )
            self.add_callback(_KeepsStrategy(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        args, adaptive = self.args, self.adaptive
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if args.language_sampling is None:
            return super()._get_train_sampler(rows)
        weights = None
        if args.language_sampling == "adaptive":
            assert adaptive is not None
            weights = partial(getattr, adaptive, "language_weight")
        self._language_sampler = LanguageSampler(
            rows["language_ids"],
            args.language_sampling,
            seed=args.seed if args.data_seed is None else args.data_seed,
            exponent=args.language_sampling_exponent,
            weights=weights,
            # Sixteen optimiser steps.
            chunk=16 * args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        )
        return self._language_sampler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The distillation loss in training, the labels' cross entropy in evaluation."""
        if self._tokens is not None:
            return self._compute_token_loss(self._tokens, model, inputs, num_items_in_batch)
        for_teachers = ("text", "text_pair", ROW)
        if not model.training:
            outputs = model(**{name: value for name, value in inputs.items() if name not in for_teachers})
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        labels, language_ids = inputs["labels"], inputs["language_ids"]
        sample_weight = None
        # The teachers start before the student: on CUDA they work beside it.
        asked = None if self.teachers is None else cast("TeacherPool | CachedTeachers", self.teachers).ask(inputs)
        outputs = model(**{name: value for name, value in inputs.items() if name not in ("labels", *for_teachers)})
        student_logits = outputs.logits
        if self.teachers is None or asked is None:
            # The loss wants a teacher; with kd_weight 0 nobody looks at it.
            teacher_logits, mask, prior = student_logits.detach().unsqueeze(0), None, None
        else:
            teacher_logits, mask = asked()
            prior = self.teachers.prior.to(student_logits.device)
            if self.adaptive is not None:
                prior = prior.unsqueeze(1) * self.adaptive.teacher_prior(language_ids)
                if self.args.language_sampling != "adaptive":
                    sample_weight = self.adaptive.sample_weight(language_ids)
        loss, stats = amtss_loss(
            student_logits,
            teacher_logits,
            labels,
            teacher_prior=prior,
            teacher_mask=mask,
            sample_weight=sample_weight,
            num_items=num_items_in_batch,
            return_stats=True,
            backend=self.args.loss_backend,
            **self.args.loss_options().keywords(),
        )
        if self._meter is not None:
            self._meter.update(stats, language_ids, labels != IGNORE_INDEX)
        if self.adaptive is not None:
            self.adaptive.update(stats, language_ids, teacher_mask=mask, row_mask=labels >= 0)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count is that of all processes, and the mean of their gradients divides once more.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _compute_token_loss(
        self, tokens: TokenTask, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None
    ) -> Tensor:
        loss, stats, language_ids = tokens.loss(
            model,
            inputs,
            cast("TokenTeachers | None", self.teachers),
            **self.args.loss_options().keywords(),
            # A step may have no target at all.
            num_items=None if num_items is None else torch.as_tensor(num_items).clamp(min=1),
            backend=self.args.loss_backend,
            chunk_rows=self.args.chunk_rows,
        )
        if self._meter is not None and stats is not None:
            self._meter.update(stats, language_ids, torch.ones_like(language_ids, dtype=torch.bool))
        if self.args.average_tokens_across_devices and num_items is not None:
            loss = loss * self.accelerator.num_processes
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if self._tokens is not None:
            batch_samples = [{"labels": token_targets(self.args.task, batch)} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """The stock step; for tokens, in place of logits, the sums that metrics need of each sequence."""
        if self._tokens is None:
            step: tuple[Any, Any, Any] = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return step
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            scores = self._tokens.scores(model, inputs, backend=self.args.loss_backend, chunk_rows=self.args.chunk_rows)
        return None, scores, inputs["language_ids"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The stock log; training logs get the teachers' weights and margins since the last one."""
        if self._meter is not None and "loss" in logs:
            logs.update(self._meter.read(self.accelerator))
        if self.adaptive is not None and self.teachers is not None and "loss" in logs:
            importance, weight = self.adaptive.importance.tolist(), self.adaptive.language_weight.tolist()
            taught = self.teachers.teaches.tolist()
            for language, code in enumerate(self.teachers.languages):
                if self.args.gap_temperature is not None:
                    logs[f"language_weight/{code}"] = weight[language]
                for k, name in enumerate(self.teachers.names):
                    if self.args.importance_temperature is not None and taught[k][language]:
                        logs[f"teacher_importance/{name}/{code}"] = importance[k][language]
        super().log(logs, start_time)

    @torch.no_grad()
    def start_adaptive(self) -> None:
        """Gives `adaptive` the teachers' margins on the labelled rows of `eval_dataset`; needs both and teachers."""
        assert self.adaptive is not None
        assert self.teachers is not None
        noted = []
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for rows in sets.values():
            for batch in self.get_eval_dataloader(rows):
                teacher_logits, mask = cast("TeacherPool | CachedTeachers", self.teachers).logits(batch)
                _, stats = amtss_loss(
                    torch.zeros(len(batch["labels"]), len(self.teachers.label_names or ()), device=mask.device),
                    teacher_logits,
                    batch["labels"],
                    temperature=self.args.temperature,
                    weighting=self.args.weighting,
                    teacher_mask=mask,
                    return_stats=True,
                    backend=self.args.loss_backend,
                )
                # Gathered, because the last batches of several processes repeat rows, which only this leaves out.
                margins, mask, ids, labels = self.accelerator.gather_for_metrics(
                    (stats.margins.T, mask.T, batch["language_ids"], batch["labels"])
                )
                noted.append((margins, mask, ids, labels))
        if noted and self.is_world_process_zero():
            margins, mask, ids, labels = (torch.cat(parts) for parts in zip(*noted, strict=True))
            self.adaptive.start(margins.T, ids, teacher_mask=mask.T, row_mask=labels >= 0)
        self.adaptive.step()


class _KeepsStrategy(TrainerCallback, ExportableState):
    """Steps the adaptive strategy and the language sampler, and keeps both in `trainer_state.json`."""

    def __init__(self, trainer: AMTSSTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        adaptive, sampler = self._trainer.adaptive, self._trainer._language_sampler
        if state.global_step > 0:
            saved = cast(Any, state.stateful_callbacks)[type(self).__name__]["attributes"]
            if adaptive is not None:
                # A JSON number holds every float32 and float64 exactly.
                adaptive.load_state_dict(
                    {k: torch.tensor(v, dtype=torch.float64) for k, v in saved["adaptive"].items()}
                )
            if sampler is not None:
                sampler.load_state_dict(saved["sampler"])
        elif adaptive is not None and self._trainer.eval_dataset is not None:
            self._trainer.start_adaptive()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer._language_sampler is not None:
            self._trainer._language_sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._trainer.adaptive is not None:
            self._trainer.adaptive.step()

    def state(self) -> dict[str, Any]:
        adaptive, sampler = self._trainer.adaptive, self._trainer._language_sampler
        attributes: dict[str, Any] = {}
        if adaptive is not None:
            attributes["adaptive"] = {name: v.tolist() for name, v in adaptive.state_dict().items()}
        if sampler is not None:
            attributes["sampler"] = sampler.state_dict()
        return {"args": {}, "attributes": attributes}


def _token_metrics(prediction: EvalPrediction, languages: Sequence[str]) -> dict[str, float]:
    scores: Any = prediction.predictions
    return token_metrics(scores, cast(Any, prediction.label_ids), languages)


class _SetsEpoch(TrainerCallback):
    """Tells the collator which epoch it is, for the choice of masked tokens."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._collator.epoch = int(state.epoch or 0)


# Figures of single languages: a line each time would bury the rest.
_OF_A_LANGUAGE = re.compile(r"/|(accuracy|loss|count|gap)_")


class _Short:
    """Prints logs without the figures of single languages; TensorBoard and the log history have them."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        short = {name: value for name, value in (logs or {}).items() if not _OF_A_LANGUAGE.search(name)}
        super().on_log(args, state, control, logs=short, **kwargs)  # type: ignore[misc]


class _ShortProgress(_Short, ProgressCallback):
    pass


class _ShortPrinter(_Short, PrinterCallback):
    pass


class _Meter:
    """Sums of the loss's statistics by teacher and language, kept on the device until they are read."""

    def __init__(self, teachers: Sequence[str], languages: Sequence[str]) -> None:
        self._teachers = teachers
        self._languages = languages
        self._sums: Tensor | None = None

    def update(self, stats: AMTSSStats, language_ids: Tensor, counts: Tensor) -> None:
        n_teachers = len(self._teachers)
        # Rows: count, weighted KL, student's margin, then the teachers' weights and margins.
        rows = torch.cat(
            [
                counts.unsqueeze(0).to(stats.weights.dtype),
                (stats.weights * stats.kd).where(stats.weights != 0, 0.0).sum(0, keepdim=True),
                stats.student_margin.unsqueeze(0),
                stats.weights,
                stats.margins,
            ]
        )
        if self._sums is None:
            self._sums = rows.new_zeros(3 + 2 * n_teachers, len(self._languages))
        self._sums.index_add_(1, language_ids, rows)

    def read(self, accelerator: Any) -> dict[str, float]:
        """The means since the last reading, over all processes."""
        if self._sums is None:
            return {}
        sums = accelerator.reduce(self._sums, "sum").double().cpu()
        self._sums = None
        counts, n_teachers = sums[0], len(self._teachers)
        logs = {"kd": float(sums[1].sum() / counts.sum().clamp(min=1))}
        means = sums / counts.clamp(min=1)
        for language, code in enumerate(self._languages):
            if counts[language] == 0:
                continue
            logs[f"student_margin/{code}"] = float(means[2, language])
            for k, name in enumerate(self._teachers):
                logs[f"teacher_weight/{name}/{code}"] = float(means[3 + k, language])
                logs[f"teacher_margin/{name}/{code}"] = float(means[3 + n_teachers + k, language])
        return logs


def language_metrics(prediction: EvalPrediction, languages: Sequence[str]) -> dict[str, float]:
    """`accuracy` over all labelled rows; `accuracy_CODE`, `loss_CODE` (cross entropy, nats) and `count_CODE` of each
    language with labelled rows; `macro_accuracy`, the mean over these languages, `worst_accuracy`, the least of them,
    and `gap_CODE`, how far a language is below the best one.

    `prediction` has logits [N, C] and `label_ids = (labels [N], language_ids [N])`.
    """
    logits: Any = prediction.predictions
    labels, language_ids = cast(Any, prediction.label_ids)
    return classification_metrics(logits, labels, language_ids, languages)


def classification_metrics(
    logits: np.ndarray, labels: np.ndarray, language_ids: np.ndarray, languages: Sequence[str]
) -> dict[str, float]:
    """See :func:`language_metrics`; ValueError where no row has a label."""
    known = labels >= 0
    if not known.any():
        raise ValueError(f"no labelled row among {len(labels)} to evaluate on")
    logits, labels, language_ids = logits[known].astype(np.float64), labels[known], language_ids[known]
    shifted = logits - logits.max(-1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(-1)) - np.take_along_axis(shifted, labels[:, None], -1)[:, 0]
    right = logits.argmax(-1) == labels
    metrics = {"accuracy": float(right.mean())}
    macro = []
    for index, code in enumerate(languages):
        rows = language_ids == index
        if rows.any():
            macro.append(float(right[rows].mean()))
            metrics |= {
                f"accuracy_{code}": macro[-1],
                f"loss_{code}": float(losses[rows].mean()),
                f"count_{code}": int(rows.sum()),
            }
    gaps = {f"gap_{code}": max(macro) - metrics[f"accuracy_{code}"] for code in languages if f"count_{code}" in metrics}
    return metrics | gaps | {"macro_accuracy": float(np.mean(macro)), "worst_accuracy": min(macro)}
