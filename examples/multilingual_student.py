"""One multilingual student from two teachers with `AMTSSTrainer`, on the embedded texts.

    python examples/multilingual_student.py

The models are tiny and fresh, and the teachers train for a few steps only, so that the script runs in seconds: it shows
the calls, and its accuracies are low. `amtss-fast demo` is a run of a useful size.
"""

import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import BertConfig, PreTrainedTokenizerBase

from amtss_fast import (
    AMTSSForSequenceClassification,
    AMTSSTrainer,
    AMTSSTrainingArguments,
    TeacherPool,
    load_teacher,
)
from amtss_fast.data import DistillationCollator, encode, keep_labels, load_data, train_tokenizer

LANGUAGES = ["en", "sw"]
SHAPE = BertConfig(vocab_size=600, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)


def new_student(names: list[str], languages: list[str]) -> AMTSSForSequenceClassification:
    return AMTSSForSequenceClassification.from_encoder(SHAPE, languages=languages, id2label=names)


def arguments(folder: Path, **options: float) -> AMTSSTrainingArguments:
    return AMTSSTrainingArguments(
        str(folder),
        max_steps=40,
        per_device_train_batch_size=32,
        learning_rate=5e-3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


def train_teacher(
    folder: Path, names: list[str], languages: list[str], rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Saves a classifier trained on the labels of `languages`; any fine-tuned sequence classifier would do."""
    rows = rows.filter(lambda language: language in languages, input_columns="language")
    trainer = AMTSSTrainer(
        new_student(names, languages),
        arguments(folder / "training", kd_weight=0.0, ce_weight=1.0),
        train_dataset=encode(rows, tokenizer, languages=languages, max_length=32),
        data_collator=DistillationCollator(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder))


def main() -> None:
    data = load_data("cldr_topic", languages=LANGUAGES)
    names = data["train"].features["label"].names
    rows = data["train"].shuffle(seed=0).select(range(1280))
    tokenizer = train_tokenizer(rows["text"], vocab_size=600)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train_teacher(folder / "both", names, LANGUAGES, rows, tokenizer)
        train_teacher(folder / "swahili", names, ["sw"], rows, tokenizer)
        teachers = TeacherPool(
            [
                load_teacher(folder / "both", name="both"),
                load_teacher(folder / "swahili", name="swahili", languages=["sw"], prior=2.0),
            ],
            label_names=names,
            languages=LANGUAGES,
            tokenizer=tokenizer,
        )
        # The student sees the label of one row in ten; the other rows are distilled all the same.
        few_labels = keep_labels(rows, 0.1, seed=0)
        trainer = AMTSSTrainer(
            new_student(names, LANGUAGES),
            arguments(folder / "student", temperature=2.0, ce_weight=0.5),
            teachers=teachers,
            train_dataset=encode(few_labels, tokenizer, languages=LANGUAGES, max_length=32),
            eval_dataset=encode(data["validation"], tokenizer, languages=LANGUAGES, max_length=32),
            data_collator=DistillationCollator(tokenizer, keep_text=teachers.needs_text),
            processing_class=tokenizer,
        )
        trainer.train()
        metrics = trainer.evaluate()
    print({name: round(metrics[f"eval_{name}"], 3) for name in ("accuracy_en", "accuracy_sw", "macro_accuracy")})

    student = trainer.model
    for prediction in student.predict(["a red apple", "mvua"], ["en", "sw"], tokenizer=tokenizer):
        print(f"predicted {prediction.label}, probability {prediction.score:.3f}")
    # The projection of the new language starts as a copy of English's; outputs in English and Swahili do not change.
    student.add_language("ur", like="en")
    print("languages of the student", ", ".join(student.config.languages))


if __name__ == "__main__":
    main()
