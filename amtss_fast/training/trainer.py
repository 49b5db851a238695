"""Distillation in the stock `transformers.Trainer`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer

from amtss_fast.data import LanguageSampler
from amtss_fast.errors import NotFiniteError
from amtss_fast.loss import AdaptiveStrategy, amtss_loss
from amtss_fast.loss.options import IGNORE_INDEX
from amtss_fast.models import AMTSSConfig
from amtss_fast.teachers import LiveTeachers, Teachers
from amtss_fast.training.arguments import AMTSSTrainingArguments
from amtss_fast.training.callbacks import KeepsStrategy, SetsEpoch, ShortPrinter, ShortProgress
from amtss_fast.training.finite import StopsWhenNotFinite
from amtss_fast.training.meter import Meter
from amtss_fast.training.notices import Notices
from amtss_fast.training.tasks import Objective, Task, find_task


class AMTSSTrainer(Trainer):
    """The stock loop with the loss of :func:`amtss_fast.amtss_loss`.

    Rows of the data hold what :func:`amtss_fast.data.encode` makes: token ids, `language_ids` and `labels` (-1: no
    label, -100: dropped). The loss of an optimizer step is the mean over all its rows, however gradient accumulation
    and processes split them. Evaluation computes the metrics of the task, without teachers.

    Each training log adds, over the rows since the last one, `kd` (mean weighted divergence, without temperature²),
    `teacher_weight/NAME/LANGUAGE`, `teacher_margin/NAME/LANGUAGE` and `student_margin/LANGUAGE`; and the state of the
    adaptive strategy, `teacher_importance/NAME/LANGUAGE` and `language_weight/LANGUAGE`.

    `importance_temperature` and `gap_temperature` switch the parts of :class:`amtss_fast.AdaptiveStrategy` on, as
    `adaptive`; with `language_sampling="adaptive"` the language weights act on the sampler in place of the loss. The
    strategy learns from the rows with a label, is saved in checkpoints, and starts from the teachers' margins on the
    labeled rows of `eval_dataset` where there is one.

    In tasks of tokens (`args.task`) `labels` are [N, T] and rows are the tokens that count
    (:func:`amtss_fast.data.token_targets`). Language models go through the fused head
    (:func:`amtss_fast.linear_amtss_loss`), whose parameters must not be sharded.

    Args:
        model: a student of the task: :class:`~amtss_fast.AMTSSForSequenceClassification`, or for the tasks of tokens
            any masked or causal language model or token classifier.
        teachers: live or cached teachers of the task; None trains on the labels alone (then `kd_weight` must be 0).
        languages: what `language_ids` number; default: the student's, or else the teachers'.
        others: as of `transformers.Trainer`. `compute_metrics` gets what the task predicts: for texts logits and
            `label_ids = (labels, language_ids)`, for tokens the scores of each sequence and `label_ids = language_ids`.

    Raises:
        ValueError: teachers and `kd_weight` that do not fit, languages or labels that differ from the student's, or
            arguments that the parts of this trainer do not support.

    A training stops with :class:`amtss_fast.errors.NotFiniteError` where a loss, a gradient, a weight or a figure of an
    evaluation is NaN or infinite.
    """

    args: AMTSSTrainingArguments
    objective: Objective

    def __init__(
        self,
        model: PreTrainedModel,
        args: AMTSSTrainingArguments,
        *,
        teachers: Teachers | None = None,
        languages: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        task = find_task(args.task)
        self.objective = task.objective(model)
        self.languages = _languages(model, teachers, languages)
        _check_teachers(task, model, args, teachers, self.languages)
        if kwargs.get("compute_metrics") is None:
            kwargs["compute_metrics"] = partial(task.metrics, languages=self.languages)
        super().__init__(model, args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} devices in one process (nn.DataParallel) are not supported: start with "
                "`torchrun --nproc-per-node N` or `accelerate launch`, or show one device (CUDA_VISIBLE_DEVICES)"
            )
        # accelerate's own configuration says it in the environment.
        asked = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
        if asked and not self.is_fsdp_enabled:
            raise ValueError(
                f"fsdp={asked!r} would have no effect: parameters are sharded over the GPUs of several processes, "
                f"and this is {self.accelerator.distributed_type}, on {self.args.device}"
            )
        if not task.shards_parameters and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(f"task {task.name!r} needs whole parameters: no FSDP, no DeepSpeed")
        # Without them the stock loop does not evaluate a loss.
        self.label_names = ["labels", "language_ids"]
        # The loss takes `num_items_in_batch`, so the stock loop has to count it and not to divide again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        for stock, short in ((ProgressCallback, ShortProgress), (PrinterCallback, ShortPrinter)):
            if self.pop_callback(stock) is not None:
                self.add_callback(short)
        if hasattr(self.data_collator, "epoch"):
            self.add_callback(SetsEpoch(self.data_collator))
        self._finite = StopsWhenNotFinite(self)
        self.add_callback(self._finite)
        self.teachers = teachers
        self.language_sampler: LanguageSampler | None = None
        self.adaptive = _adaptive_strategy(args, teachers)
        self._meter = None if teachers is None else Meter(teachers.names, teachers.languages)
        self._notices = Notices([] if teachers is None else teachers.names, self.languages)
        if self.adaptive is not None or args.language_sampling is not None:
            if args.restore_callback_states_from_checkpoint:
                raise ValueError(
                    "restore_callback_states_from_checkpoint=True makes callbacks anew, which those of the adaptive "
                    "strategy and of language_sampling cannot be; they are restored from checkpoints without"
                )
            self.add_callback(KeepsStrategy(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        args = self.args
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if args.language_sampling is None:
            return super()._get_train_sampler(rows)
        weights = None
        if args.language_sampling == "adaptive":
            weights = partial(getattr, self.adaptive, "language_weight")
        self.language_sampler = LanguageSampler(
            rows["language_ids"],
            args.language_sampling,
            seed=args.seed if args.data_seed is None else args.data_seed,
            exponent=args.language_sampling_exponent,
            weights=weights,
            # Sixteen optimizer steps.
            chunk=16 * args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        )
        return self.language_sampler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The distillation loss of a training batch."""
        if num_items_in_batch is not None:
            # All rows of a step may be ignored.
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        try:
            step = self.objective.step(
                model,
                inputs,
                self.teachers,
                self._weigh,
                num_items=num_items_in_batch,
                chunk_rows=self.args.chunk_rows,
                backend=self.args.loss_backend,
                **self.args.loss_options().keywords(),
            )
        except NotFiniteError as error:
            self._finite.stop_of_teacher(error)
        self._finite.check_loss(step.loss, step.rows.student, model)
        labels, language_ids = step.rows.labels, step.rows.language_ids
        if self._meter is not None and step.stats is not None:
            self._meter.update(step.stats, language_ids, labels != IGNORE_INDEX)
        if self.adaptive is not None and step.stats is not None:
            self.adaptive.update(step.stats, language_ids, teacher_mask=step.mask, row_mask=labels >= 0)
        loss = step.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The count is that of all processes, and the mean of their gradients divides once more.
            loss = loss * self.accelerator.num_processes
        return (loss, step.rows.outputs) if return_outputs else loss

    def _weigh(self, language_ids: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The teachers' prior and the weights of rows, from the teachers and the adaptive strategy."""
        if self.teachers is None:
            return None, None
        prior, weight = self.teachers.prior.to(language_ids.device), None
        if self.adaptive is not None:
            prior = prior.unsqueeze(1) * self.adaptive.teacher_prior(language_ids)
            if self.args.language_sampling != "adaptive":
                weight = self.adaptive.sample_weight(language_ids)
        return prior, weight

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm: Any = super()._get_grad_norm(model, grad_norm)
        self._finite.check_gradient(norm)
        return norm

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The main process then writes the state, which makes the checkpoint whole, and removes older ones.
        self.accelerator.wait_for_everyone()

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        count = torch.stack([(self.objective.targets(b) != IGNORE_INDEX).sum() for b in batch_samples]).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Loss, predictions and labels of an evaluation batch, as the task gives them."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, predictions, labels = self.objective.predict(
                model, inputs, backend=self.args.loss_backend, chunk_rows=self.args.chunk_rows
            )
        return (loss, None, None) if prediction_loss_only else (loss, predictions, labels)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The stock log; training logs get the teachers' weights and margins since the last one.

        Raises:
            NotFiniteError: a figure is not finite.
        """
        if self.teachers is not None and self._meter is not None and "loss" in logs:
            logs.update(self._meter.read(self.accelerator))
            self._notices.read(logs, self.state.global_step)
            logs.update(self._strategy_logs(self.teachers))
        self._finite.check_logs(logs)
        super().log(logs, start_time)

    def _strategy_logs(self, teachers: Teachers) -> dict[str, float]:
        """The state of the adaptive strategy."""
        if self.adaptive is None:
            return {}
        importance, weight = self.adaptive.importance.tolist(), self.adaptive.language_weight.tolist()
        taught = teachers.teaches.tolist()
        logs = {}
        for language, code in enumerate(teachers.languages):
            if self.args.gap_temperature is not None:
                logs[f"language_weight/{code}"] = weight[language]
            for k, name in enumerate(teachers.names):
                if self.args.importance_temperature is not None and taught[k][language]:
                    logs[f"teacher_importance/{name}/{code}"] = importance[k][language]
        return logs

    @torch.no_grad()
    def start_adaptive(self) -> None:
        """Gives `adaptive` the teachers' margins on the labeled rows of `eval_dataset`.

        Raises:
            RuntimeError: the strategy is off.
        """
        if self.adaptive is None or self.teachers is None:
            raise RuntimeError("start_adaptive needs teachers, and importance_temperature or gap_temperature")
        noted = []
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for rows in sets.values():
            for batch in self.get_eval_dataloader(rows):
                outputs, mask = self.teachers.ask(batch)()
                _, stats = amtss_loss(
                    torch.zeros(len(batch["labels"]), len(self.teachers.label_names or ()), device=mask.device),
                    outputs,
                    batch["labels"],
                    temperature=self.args.temperature,
                    teacher_temperature=self.args.teacher_temperature,
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


def _languages(model: PreTrainedModel, teachers: Teachers | None, languages: Sequence[str] | None) -> list[str]:
    if languages is not None:
        return list(languages)
    if isinstance(model.config, AMTSSConfig):
        return list(model.config.languages)
    if teachers is not None:
        return list(teachers.languages)
    raise ValueError(f"languages is missing: a {type(model).__name__} does not list its languages")


def _check_teachers(
    task: Task,
    model: PreTrainedModel,
    args: AMTSSTrainingArguments,
    teachers: Teachers | None,
    languages: list[str],
) -> None:
    """Raise ValueError for teachers that do not fit student and arguments."""
    if (teachers is None) != (args.kd_weight == 0):
        raise ValueError(
            f"kd_weight = {args.kd_weight} with teachers = {teachers!r}: distillation needs teachers and "
            "kd_weight > 0, training on the labels alone needs teachers=None and kd_weight=0"
        )
    if args.is_adaptive and not task.is_adaptive:
        raise ValueError(f"the adaptive strategy is for sequence-classification, args.task is {args.task!r}")
    # As many as there are teachers, or one number for all.
    args.loss_options().teacher_temperatures(0 if teachers is None else len(teachers))
    if teachers is None:
        return
    if args.remove_unused_columns and (teachers.needs_text or not isinstance(teachers, LiveTeachers)):
        raise ValueError(
            "remove_unused_columns=True drops the columns that the teachers read (texts, or the numbers of cached "
            "rows): leave it False"
        )
    if teachers.languages != languages:
        raise ValueError(f"teachers are for languages {teachers.languages}, the student has {languages}")
    if teachers.task != task.name:
        raise ValueError(f"teachers are for task {teachers.task!r}, args.task is {args.task!r}")
    if isinstance(model.config, AMTSSConfig) and teachers.label_names != model.config.label_names:
        raise ValueError(f"teachers are for labels {teachers.label_names}, the student has {model.config.label_names}")


def _adaptive_strategy(args: AMTSSTrainingArguments, teachers: Teachers | None) -> AdaptiveStrategy | None:
    if teachers is None and args.language_sampling == "adaptive":
        raise ValueError('language_sampling="adaptive" needs teachers')
    if teachers is None or not args.is_adaptive:
        return None
    return AdaptiveStrategy(
        len(teachers),
        len(teachers.languages),
        importance_temperature=args.importance_temperature,
        gap_temperature=args.gap_temperature,
    )
