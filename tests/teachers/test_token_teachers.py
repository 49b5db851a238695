"""Teachers of token tasks: their answers, and what does not fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_tokenizer
from tiny_tokens import LANGUAGES, TAGS, make_batch, make_teachers, tiny_model, tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from amtss_fast import QuantizedWeight, linear_amtss_loss
from amtss_fast.data import Targets
from amtss_fast.models.heads import OutputHead
from amtss_fast.teachers import Teacher, TokenTeachers, load_teacher
from amtss_fast.teachers.int8 import why_missing


@pytest.mark.parametrize("task", ["masked-lm", "causal-lm", "token-classification"])
def test_answers_are_the_logits_of_each_teacher_where_it_teaches(task: str) -> None:
    batch = make_batch(task)
    teachers = make_teachers(task, tokenizer())
    targets = Targets.of(task, batch)
    outputs, mask = teachers.ask(batch)()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for k, (output, taught, teacher) in enumerate(zip(outputs, mask, teachers.teachers, strict=True)):
        # The second one reads a part of the batch.
        languages = [0, 1] if k != 1 else [1]
        assert torch.equal(taught, torch.isin(targets.language_ids, torch.tensor(languages)))
        assert isinstance(output, Tensor)
        assert not output[~taught].any()
        with torch.no_grad():
            logits = teacher.model(**inputs).logits.flatten(0, 1)[targets.index]
            if task == "token-classification":
                logits = logits.flip(-1)
            else:
                output = F.linear(output, teachers.heads[k].weight, teachers.heads[k].bias)
        torch.testing.assert_close(output[taught], logits[taught], rtol=1e-4, atol=1e-5)
    again, _ = teachers.outputs(batch, targets)
    assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))


def test_a_teacher_without_a_sequence_is_not_run() -> None:
    batch = make_batch("masked-lm")
    batch["language_ids"] = torch.zeros_like(batch["language_ids"])
    teachers = make_teachers("masked-lm", tokenizer())
    teachers.teachers[1].model.register_forward_pre_hook(lambda *_: pytest.fail("it was run"))
    outputs, mask = teachers.ask(batch)()
    assert mask.any(1).tolist() == [True, False, True]
    assert outputs[1].shape == (mask.shape[1], 16)


def test_teachers_must_fit() -> None:
    tok, model = tokenizer(), tiny_model("masked-lm", "bert")

    def pool(**options: Any) -> TokenTeachers:
        given: dict[str, Any] = {"task": "masked-lm", "languages": LANGUAGES, "tokenizer": tok}
        teachers = [Teacher(model, name="a", **options.pop("teacher", {}))]
        return TokenTeachers(options.pop("teachers", teachers), **given | options)

    for options, message in (
        ({"task": "summary"}, "task must be one of masked-lm"),
        ({"teachers": []}, "at least one teacher"),
        ({"teachers": [Teacher(model, name="a")] * 2}, "different names"),
        ({"label_names": TAGS}, "label_names belong to token-classification"),
        ({"teacher": {"tokenizer": tiny_tokenizer()}}, "teacher 'a' has another tokenizer"),
        ({"teacher": {"languages": ["ur"]}}, "teaches ur, which the student has not"),
    ):
        with pytest.raises(ValueError, match=message):
            pool(**options)
    model.cls.predictions.transform.LayerNorm.weight.data[3] = torch.nan
    with pytest.raises(RuntimeError, match=r"teacher 'a' \(torch.float32\) gave values that are not finite"):
        pool().ask(make_batch("masked-lm"))()


def loss_of(student: PreTrainedModel, teachers: TokenTeachers, batch: dict[str, Tensor]) -> float:
    targets, head = Targets.of(teachers.task, batch), OutputHead(student, "the student")
    hidden = head.hidden(student, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    outputs, mask = teachers.ask(batch)()
    loss: Tensor = linear_amtss_loss(
        hidden.flatten(0, 1)[targets.index],
        head.weight,
        outputs,
        [other.weight for other in teachers.heads],
        targets.labels,
        student_bias=head.bias,
        teacher_bias=[other.bias for other in teachers.heads],
        teacher_mask=mask,
        teacher_prior=teachers.prior,
    )
    return loss.item()


def cross_entropy_of(teachers: TokenTeachers, batch: dict[str, Tensor]) -> float:
    targets, head, (outputs, _) = Targets.of(teachers.task, batch), teachers.heads[0], teachers.ask(batch)()
    weight = head.weight.dequantize() if isinstance(head.weight, QuantizedWeight) else head.weight
    return F.cross_entropy(F.linear(outputs[0], weight, head.bias), targets.labels, reduction="sum").item()


@pytest.mark.skipif(why_missing("onednn") is not None, reason=str(why_missing("onednn")))
@pytest.mark.parametrize(("task", "model_type", "tied"), [("masked-lm", "bert", True), ("causal-lm", "llama", False)])
def test_an_8_bit_teacher_has_an_8_bit_head(tmp_path: Path, task: str, model_type: str, tied: bool) -> None:
    tok = tokenizer()
    tiny_model(task, model_type).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    student, batch = tiny_model(task, model_type, seed=1), make_batch(task)
    losses, sizes, scores = [], [], []
    for precision in ("float32", "int8"):
        teacher = load_teacher(tmp_path, task=task, precision=precision)
        pool = TokenTeachers([teacher], task=task, languages=LANGUAGES, tokenizer=tok)
        losses.append(loss_of(student, pool, batch))
        sizes.append(teacher.memory_footprint())
        scores.append(cross_entropy_of(pool, batch))
    codes = pool.heads[0].weight
    assert isinstance(codes, QuantizedWeight)
    assert (codes.codes.data_ptr() == teacher.model.get_input_embeddings().weight.data_ptr()) == tied
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert losses[1] != losses[0]
    assert scores[1] == pytest.approx(scores[0], rel=0.1)
    # Two matrices of 300 x 16 in float32, or one that both share.
    assert sizes[0] - sizes[1] > 0.7 * 300 * 16 * 4 * (1 if tied else 2)
