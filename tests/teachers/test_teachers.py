from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LABELS, TEXTS, tiny_bert_config, tiny_teacher, tiny_tokenizer
from tokenizers import normalizers
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    ByT5Tokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from amtss_fast import AMTSSForSequenceClassification, amtss_loss
from amtss_fast.teachers import Teacher, TeacherPool, load_teacher
from amtss_fast.teachers.batching import LENGTH_MULTIPLE

LANGUAGES = ["en", "es", "sw", "de", "ur"]
OTHER_TEXTS = ["zebra quilt jump", "lazy dogs over", "ไทย ไทย", "мир мир"] * 3
# Twice each language, mixed.
IDS = torch.tensor([0, 2, 1, 4, 3, 2, 0, 1, 3, 4])


def make_batch(ids: Tensor = IDS) -> dict[str, Any]:
    """Row n says TEXTS[language] (and a number): lengths differ between languages."""
    texts = [f"{TEXTS[i]} {n}" for n, i in enumerate(ids.tolist())]
    batch = dict(tiny_tokenizer()(texts, padding=True, return_tensors="pt"))
    labels = torch.zeros(len(ids), dtype=torch.long)
    return {**batch, "language_ids": ids, "labels": labels, "text": texts}


def make_pool(*teachers: Teacher, **options: Any) -> TeacherPool:
    values: dict[str, Any] = {
        "label_names": LABELS,
        "languages": LANGUAGES,
        "tokenizer": tiny_tokenizer(),
        **options,
    }
    return TeacherPool(teachers, **values)


class Spy:
    """Records what a teacher's model is given."""

    def __init__(self, teacher: Teacher) -> None:
        self.calls: list[dict[str, Any]] = []
        teacher.model.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not args
        self.calls.append(kwargs)

    def assert_saw(self, name: str, expected: Tensor) -> None:
        """The last call had these rows, then copies of the first up to 8, all padded to a multiple of 8 or 16."""
        seen = self.calls[-1][name]
        n = len(expected)
        assert len(seen) == max(n, 8)
        assert torch.equal(seen[n:], seen[:1].expand_as(seen[n:]))
        if expected.dim() == 2:
            width = expected.shape[1]
            assert seen.shape[1] in (width, width + -width % LENGTH_MULTIPLE)
            assert not seen[:, width:].any()
            expected = nn.functional.pad(expected, (0, seen.shape[1] - width))
        assert torch.equal(seen[:n], expected)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_loaded_teacher(tmp_path: Path, precision: str) -> None:
    folder = tiny_teacher(tmp_path)
    teacher = load_teacher(folder, precision=precision, languages=["en"], prior=2)
    batch = make_batch()
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        expected = model(**inputs).logits
    # Labels, language ids and texts are not for this model.
    logits = teacher.logits(**batch)
    half = precision == "bfloat16"
    assert logits.dtype == (torch.bfloat16 if half else torch.float32)
    if half:
        torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.1)
    else:
        assert torch.equal(logits, expected)
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    size = sum(p.numel() for p in model.parameters()) * (2 if half else 4)
    # The two index buffers of BERT are int64 at any precision.
    assert teacher.memory_footprint() == size + 2 * 64 * 8
    assert (teacher.prior, teacher.label_names, teacher.max_length) == (2.0, LABELS, 64)
    assert teacher.name == folder.name
    assert repr(teacher).startswith(f"Teacher({folder.name!r}, BertForSequenceClassification, ")
    assert "languages=en, prior=2, labels=entailment/neutral/contradiction" in repr(teacher)


def test_logits_may_enter_a_loss(tmp_path: Path) -> None:
    teacher = load_teacher(tiny_teacher(tmp_path))
    logits = teacher.logits(**make_batch())
    assert not logits.requires_grad
    assert not logits.is_inference()
    student = torch.randn(10, 3, requires_grad=True)
    # Saves the teacher's logits for the backward pass.
    (student * logits).sum().backward()
    assert torch.equal(student.grad, logits)  # type: ignore[arg-type]


def test_the_precision_is_the_teachers_own_under_autocast(tmp_path: Path) -> None:
    teacher = load_teacher(tiny_teacher(tmp_path))
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        inside = teacher.logits(**batch)
    assert torch.equal(inside, teacher.logits(**batch))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_name_the_teacher(tmp_path: Path, value: float) -> None:
    good = load_teacher(tiny_teacher(tmp_path / "good"))
    bad = load_teacher(tiny_teacher(tmp_path / "bad"), name="the bad one", languages=["sw"])
    with torch.no_grad():
        bad.model.classifier.bias[1] = value
    message = r"teacher 'the bad one' \(float32\) gave logits that are not finite in 2 of 2"
    with pytest.raises(RuntimeError, match=message):
        make_pool(good, bad).logits(make_batch())


def test_labels_are_aligned_by_name(tmp_path: Path) -> None:
    order = [2, 0, 1]
    base = load_teacher(tiny_teacher(tmp_path / "a"))
    names = [f" {LABELS[i].upper()} " for i in order]
    permuted = load_teacher(tiny_teacher(tmp_path / "b", labels=names))
    with torch.no_grad():
        permuted.model.load_state_dict(base.model.state_dict())
        permuted.model.classifier.weight.copy_(base.model.classifier.weight[order])
        permuted.model.classifier.bias.copy_(base.model.classifier.bias[order])
    assert permuted.align(LABELS) == [1, 2, 0]
    logits, _ = make_pool(base, permuted).logits(make_batch())
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)
    assert not torch.equal(permuted.logits(**make_batch()), logits[1])


def test_labels_that_do_not_match_show_both_lists(tmp_path: Path) -> None:
    folder = tiny_teacher(tmp_path, labels=["LABEL_0", "LABEL_1", "LABEL_2"])
    message = (
        r"labels of teacher 't' do not match: it has \['LABEL_0', 'LABEL_1', 'LABEL_2'\], "
        r"the student \['entailment', 'neutral', 'contradiction'\].*label_names="
    )
    with pytest.raises(ValueError, match=message):
        make_pool(load_teacher(folder, name="t"))
    named = load_teacher(folder, label_names=["contradiction", "entailment", "neutral"])
    logits, _ = make_pool(named).logits(make_batch())
    assert torch.equal(logits[0], named.logits(**make_batch())[:, [1, 2, 0]])
    with pytest.raises(ValueError, match=r"do not match"):
        make_pool(named, label_names=LABELS[:2])
    with pytest.raises(ValueError, match="label_names must name the 3 outputs"):
        load_teacher(folder, label_names=["yes", "no"])
    with pytest.raises(ValueError, match="label_names must name 3 different outputs"):
        load_teacher(folder, label_names=["yes", "no", "No"])
    with pytest.raises(TypeError, match="label_names must be a list of strings, got 'yes'"):
        load_teacher(folder, label_names="yes")


def test_rows_go_to_the_teachers_of_their_language(tmp_path: Path) -> None:
    west = load_teacher(tiny_teacher(tmp_path / "w", seed=1), languages=["es", "en"])
    east = load_teacher(tiny_teacher(tmp_path / "e", seed=2), languages=["ur", "sw", "en"])
    idle = load_teacher(tiny_teacher(tmp_path / "i", seed=3), prior=0)
    # Urdu, made the longest by more than padding adds, comes to one teacher only; nobody teaches German.
    batch = make_batch()
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        batch[name] = torch.cat([batch[name], batch[name][:, 16:] * (IDS == 4).unsqueeze(1)], 1)
    pool = make_pool(west, east, idle)
    spies = [Spy(west), Spy(east), Spy(idle)]
    logits, mask = pool.logits(batch)
    assert logits.shape == (3, 10, 3)
    assert logits.dtype == torch.float32
    assert mask.dtype == torch.bool
    assert len(pool) == 3
    assert pool.prior.tolist() == [1, 1, 0]
    lengths = batch["attention_mask"].sum(1)
    for k, languages in enumerate([[0, 1], [0, 2, 4], []]):
        rows = [n for n in range(10) if int(IDS[n]) in languages]
        assert mask[k].nonzero().squeeze(1).tolist() == rows
        assert pool.teaches[k].nonzero().squeeze(1).tolist() == languages
        assert len(spies[k].calls) == bool(rows)
        assert not logits[k, ~mask[k]].any()
        if not rows:
            continue
        width = int(lengths[rows].max())
        seen = spies[k].calls[0]
        spies[k].assert_saw("input_ids", batch["input_ids"][rows, :width])
        assert seen.keys() == {"input_ids", "attention_mask", "token_type_ids", "return_dict"}
        alone = pool.teachers[k].logits(**batch)[rows]
        torch.testing.assert_close(logits[k, rows], alone, rtol=1e-4, atol=1e-5)
    assert spies[0].calls[0]["input_ids"].shape[1] < batch["input_ids"].shape[1]
    # What comes out is what the loss takes.
    student = torch.randn(10, 3, requires_grad=True)
    _, stats = amtss_loss(
        student,
        logits,
        teacher_mask=mask,
        teacher_prior=pool.prior,
        return_stats=True,
        backend="reference",
    )
    assert torch.equal(stats.weights > 0, mask)


def test_left_padding_is_trimmed_too(tmp_path: Path) -> None:
    teacher = load_teacher(tiny_teacher(tmp_path), languages=["en"])
    right, left = make_batch(), make_batch()
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        for n in range(10):
            used = int(right["attention_mask"][n].sum())
            left[name][n] = right[name][n].roll(right[name].shape[1] - used)
    pool = make_pool(teacher)
    # Both English texts have the same length here, so that nothing but the trimming matters.
    assert len(set(right["attention_mask"][IDS == 0].sum(1).tolist())) == 1
    assert torch.equal(pool.logits(right)[0], pool.logits(left)[0])


def test_a_batch_without_rows(tmp_path: Path) -> None:
    pool = make_pool(load_teacher(tiny_teacher(tmp_path)))
    batch = {name: value[:0] for name, value in make_batch().items()}
    logits, mask = pool.logits(batch)
    assert logits.shape == (1, 0, 3)
    assert mask.shape == (1, 0)


def test_a_student_as_teacher_gets_its_own_language_ids(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student: Any = AMTSSForSequenceClassification.from_encoder(
        tiny_bert_config(), languages=["ur", "fr", "en"], id2label=LABELS
    )
    for projection in student.projections:
        nn.init.normal_(projection.weight)
    student.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path)
    # It knows French, which the pool lacks, and was not asked to teach it.
    pool, batch = make_pool(teacher), make_batch()
    spy = Spy(teacher)
    logits, mask = pool.logits(batch)
    assert mask[0].tolist() == [i in (0, 4) for i in IDS.tolist()]
    spy.assert_saw("language_ids", torch.tensor([2, 0, 2, 0]))
    rows = mask[0]
    with torch.no_grad():
        expected = student.eval()(
            input_ids=batch["input_ids"][rows],
            attention_mask=batch["attention_mask"][rows],
            token_type_ids=batch["token_type_ids"][rows],
            language_ids=torch.tensor([2, 0, 2, 0]),
        ).logits
    torch.testing.assert_close(logits[0, rows], expected, rtol=1e-4, atol=1e-5)
    assert load_teacher(tmp_path, languages=["en"]).languages == ("en",)
    with pytest.raises(ValueError, match="does not know es; it knows ur, fr, en"):
        load_teacher(tmp_path, languages=["en", "es"])
    with pytest.raises(ValueError, match=r"knows ur, fr, en, none of the student's languages"):
        make_pool(teacher, languages=["sw"])


def test_a_teacher_with_another_tokenizer_reads_the_text(tmp_path: Path) -> None:
    other = tiny_tokenizer(OTHER_TEXTS, vocab_size=280)
    folder = tiny_teacher(tmp_path / "other", tokenizer=other)
    reader = load_teacher(folder, languages=["sw", "ur"], max_length=9)
    same = load_teacher(tiny_teacher(tmp_path / "same"))
    batch = make_batch()
    assert not make_pool(same).needs_text
    pool = make_pool(same, reader)
    assert pool.needs_text
    spy = Spy(reader)
    logits, mask = pool.logits(batch)
    texts = [batch["text"][n] for n in range(10) if mask[1, n]]
    expected = other(texts, padding=True, truncation=True, max_length=9, return_tensors="pt")
    spy.assert_saw("input_ids", expected["input_ids"])
    assert torch.equal(logits[1, mask[1]], reader.logits(**expected))
    # The second text of a pair arrives in its place.
    pairs = [f"pair {n}" for n in range(10)]
    pool.logits({**batch, "text_pair": pairs})
    expected = other(
        texts,
        [pairs[n] for n in range(10) if mask[1, n]],
        padding=True,
        truncation=True,
        max_length=9,
        return_tensors="pt",
    )
    spy.assert_saw("input_ids", expected["input_ids"])
    spy.assert_saw("token_type_ids", expected["token_type_ids"])
    # Without the student's ids, if nobody reads them.
    make_pool(reader).logits({"language_ids": IDS, "text": batch["text"]})
    del batch["text"]
    message = r"another tokenizer than the student and needs the raw strings: batch\['text'\]"
    with pytest.raises(ValueError, match=message):
        pool.logits(batch)
    with pytest.raises(ValueError, match=r"batch\['text'\] must be a list of 10, got a list of 2"):
        pool.logits({**batch, "text": ["a", "b"]})


def test_what_makes_tokenizers_differ(tmp_path: Path) -> None:
    folder = tiny_teacher(tmp_path)

    def needs_text(student: Any, teacher: Any = None, folder: Path = folder) -> bool:
        return make_pool(load_teacher(folder, tokenizer=teacher), tokenizer=student).needs_text

    used = tiny_tokenizer(model_max_length=9)
    # Truncation and padding are part of a call, not of the vocabulary.
    used(list(TEXTS), padding="max_length", truncation=True, max_length=7)
    used.padding_side = "left"
    assert not needs_text(used)
    assert not needs_text(tiny_tokenizer(), str(folder))
    assert needs_text(None)
    assert needs_text(tiny_tokenizer(vocab_size=280))
    changed = tiny_tokenizer()
    changed.add_tokens(["<new>"])
    assert needs_text(changed)
    lower = tiny_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert needs_text(lower)
    padding = tiny_tokenizer()
    padding.pad_token = "[UNK]"
    assert needs_text(padding)
    # A tokenizer without a fast pipeline, fresh and from a folder.
    tiny_teacher(tmp_path / "bytes", tokenizer=ByT5Tokenizer())
    assert not needs_text(ByT5Tokenizer(), folder=tmp_path / "bytes")
    assert needs_text(ByT5Tokenizer(extra_ids=3), folder=tmp_path / "bytes")
    without_types = tiny_tokenizer()
    without_types.model_input_names = ["input_ids", "attention_mask"]
    assert needs_text(without_types)


def test_inputs_that_a_model_does_not_take_are_left_out() -> None:
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=300,
        dim=16,
        n_layers=1,
        n_heads=2,
        hidden_dim=32,
        id2label=dict(enumerate(LABELS)),
    )
    teacher = Teacher(DistilBertForSequenceClassification(config), name="distil")
    spy = Spy(teacher)
    # Made without a tokenizer it reads the ids that it is given.
    pool = make_pool(teacher, tokenizer=None)
    assert not pool.needs_text
    pool.logits(make_batch())
    assert spy.calls[0].keys() == {"input_ids", "attention_mask", "return_dict"}
    with pytest.raises(RuntimeError, match="teacher 'distil' has no tokenizer"):
        teacher.tokenize(["a"])


def test_longer_rows_than_a_teacher_takes(tmp_path: Path) -> None:
    teacher = load_teacher(tiny_teacher(tmp_path), name="short", max_length=20, languages=["ur"])
    message = r"teacher 'short' takes at most 20 tokens, batch\['input_ids'\] has [34]\d: truncate"
    with pytest.raises(ValueError, match=message):
        make_pool(teacher).logits(make_batch())
    # Rows of other languages do not count.
    make_pool(teacher).logits(make_batch(torch.tensor([0, 1])))


def test_checkpoints_that_are_no_classifier(tmp_path: Path) -> None:
    BertModel(tiny_bert_config()).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    message = r"teacher 'encoder' \(.*\): .* is no BertForSequenceClassification: it lacks classifier.bias, classif"
    with pytest.raises(ValueError, match=message):
        load_teacher(tmp_path / "encoder")
    BertForSequenceClassification(tiny_bert_config()).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"teacher 'bare' .*no tokenizer found"):
        load_teacher(tmp_path / "bare")
    load_teacher(tmp_path / "bare", tokenizer=tmp_path / "encoder")
    torch.save({}, tmp_path / "pickle.bin")
    tiny_bert_config().save_pretrained(tmp_path / "pickle")
    (tmp_path / "pickle.bin").rename(tmp_path / "pickle" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"teacher 'pickle' .*safetensors"):
        load_teacher(tmp_path / "pickle")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "int4"}, ValueError, "one of float32, bfloat16, int8; got 'int4'"),
        ({"engine": "onednn"}, ValueError, "engine='onednn' is for precision 'int8', not 'float32'"),
        (
            {"precision": "int8", "engine": "none"},
            ValueError,
            "native, onednn, bitsandbytes, torchao; got 'none'",
        ),
        ({"prior": -1.0}, ValueError, "prior must be finite and at least 0, got -1.0"),
        ({"prior": float("inf")}, ValueError, "prior must be finite and at least 0, got inf"),
        ({"prior": "1"}, TypeError, "prior must be a number, got '1'"),
        ({"languages": "en"}, TypeError, "languages must be a list of language codes, got 'en'"),
        ({"languages": []}, ValueError, "languages must hold at least one code"),
        ({"max_length": 0}, ValueError, "max_length must be an integer of at least 1, got 0"),
        ({"max_length": 65}, ValueError, "max_length of teacher 't' must be at most 64, got 65"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    folder = tiny_teacher(tmp_path)
    with pytest.raises(error, match=message):
        load_teacher(folder, **{"name": "t", **options})


def test_wrong_pools(tmp_path: Path) -> None:
    folder = tiny_teacher(tmp_path)
    teacher = load_teacher(folder, name="t", languages=["en", "fr"])
    message = "teacher 't' teaches fr, which the student has not; its languages are en, es, sw"
    with pytest.raises(ValueError, match=message):
        make_pool(teacher)
    with pytest.raises(ValueError, match="at least one teacher, got none"):
        make_pool()
    with pytest.raises(ValueError, match=r"different names \(name=\), got \['t', 't'\]"):
        make_pool(load_teacher(folder, name="t"), load_teacher(folder, name="t"))
    with pytest.raises(ValueError, match="languages must be different"):
        make_pool(load_teacher(folder), languages=["en", "en"])


def test_wrong_batches(tmp_path: Path) -> None:
    teacher = load_teacher(tiny_teacher(tmp_path), name="t")
    pool, batch = make_pool(teacher), make_batch()
    with pytest.raises(ValueError, match=r"batch\['language_ids'\] .* got nothing"):
        pool.logits({**batch, "language_ids": None})
    with pytest.raises(ValueError, match=r"batch\['language_ids'\] must be 0 to 4 for en, .*5"):
        pool.logits({**batch, "language_ids": IDS + 1})
    with pytest.raises(ValueError, match=r"batch\['input_ids'\] .* N = 10, got nothing"):
        pool.logits({**batch, "input_ids": None})
    with pytest.raises(ValueError, match=r"batch\['attention_mask'\] .* got a tensor \[9, "):
        pool.logits({**batch, "attention_mask": batch["attention_mask"][1:]})
    with pytest.raises(ValueError, match="teacher 't' needs input_ids, got"):
        teacher.logits(attention_mask=batch["attention_mask"])
