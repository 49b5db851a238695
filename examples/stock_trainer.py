"""The loss in a stock `transformers.Trainer`, through `compute_loss_func`.

    python examples/stock_trainer.py

The teachers' logits are a column of the training data. `num_items_in_batch` counts the rows of the whole accumulated
batch, so that one batch of 32 rows and four accumulated batches of 8 give the same step.
"""

import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from amtss_fast import amtss_loss


class WithTeachers(BertForSequenceClassification):
    """Hands the teachers' logits from the batch on to `compute_loss`."""

    def forward(self, teacher_logits: Tensor | None = None, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output["teacher_logits"] = teacher_logits
        return output


def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    teachers = outputs["teacher_logits"].transpose(0, 1)  # [N, K, C] to [K, N, C]
    return amtss_loss(outputs["logits"], teachers, labels, ce_weight=0.5, num_items=num_items_in_batch)


def main() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    rows = [
        {"input_ids": torch.randint(50, (6,)), "labels": torch.tensor(i % 3), "teacher_logits": torch.randn(2, 3)}
        for i in range(128)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4,
            max_steps=4,
            logging_steps=1,
            # The trainer would drop `teacher_logits`, which the stock model does not have.
            remove_unused_columns=False,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
            use_cpu=True,
        )
        trainer = Trainer(WithTeachers(config), arguments, train_dataset=rows, compute_loss_func=compute_loss)
        trainer.train()


if __name__ == "__main__":
    main()
