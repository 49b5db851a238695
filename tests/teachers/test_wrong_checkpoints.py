"""Checkpoints that are no teachers are refused by name, and padding changes no logits."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LABELS, tiny_bert_config, tiny_teacher, tiny_tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from amtss_fast.errors import UserError
from amtss_fast.teachers import Teacher, TeacherPool, load_teacher
from amtss_fast.teachers.int8 import why_missing

ENDS = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
TEXTS = ["a red apple on the table in the rain", "a", "a red apple", "un gato"]


def edit(folder: Path, **values: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def named(names: dict[str, str]) -> dict[str, Any]:
    return {"id2label": names, "label2id": {name: int(index) for index, name in names.items()}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (named({"1": "a", "2": "b", "3": "c"}), r"ids of id2label must be 0 to 2, got \[1, 2, 3\]"),
        (named({"0": "a", "1": "b", "7": "c"}), r"got \[0, 1, 7\]"),
        (named({"0": "a", "-1": "b", "1": "c"}), r"got \[-1, 0, 1\]"),
        (named({"0": "a", "1": "b"}), r"id2label names 2 outputs, .* classifier.bias is \[3\], not \[2\]"),
        (named({str(i): f"l{i}" for i in range(5)}), r"id2label names 5 outputs, .* is \[3\], not \[5\]"),
        (named({"0": "a", "1": "A ", "2": "c"}), "id2label must have different names"),
        (named({"0": "a"}), "has 1 output"),
        ({"id2label": {"a": 0, "b": 1, "c": 2}, "label2id": None}, "id2label must map ids"),
        ({"id2label": ["a", "b", "c"]}, "id2label must map ids"),
        ({"architectures": ["BertForTokenClassification"]}, "BertForTokenClassification, which is no model for task"),
        ({**named({"0": "a", "1": "b", "2": "c"}), "label2id": {"a": 2, "b": 1, "c": 0}}, "contradict"),
        ({"problem_type": "multi_label_classification"}, "problem_type 'multi_label_classification'"),
        ({"problem_type": "regression"}, "problem_type 'regression'"),
        ({"hidden_size": 8}, r"hidden_size 8.*not \[.*8"),
        ({"num_hidden_layers": 1}, "layers that config.json leaves out: .*layer.1"),
        ({"num_hidden_layers": 3}, r"it lacks bert.encoder.layer.2"),
        ({"vocab_size": 200}, r"vocab_size 200.*\[300, 16\], not \[200, 16\]"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_act": "no-such"}, "no-such"),
        ({"model_type": "no-such-model"}, "no-such-model"),
        ({"model_type": "vit"}, "teacher 'vera'"),
    ],
)
def test_configurations_and_weights_that_disagree(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    folder = edit(tiny_teacher(tmp_path / "t"), **values)
    with pytest.raises(UserError, match=message) as caught:
        load_teacher(folder, name="vera")
    assert re.match(r"teacher 'vera' \(", str(caught.value))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_given_by_hand_take_the_place_of_wrong_ids(tmp_path: Path) -> None:
    folder = edit(tiny_teacher(tmp_path), **named({"1": "a", "2": "b", "3": "c"}))
    assert load_teacher(folder, label_names=["x", "y", "z"]).label_names == ("x", "y", "z")


def test_more_token_ids_than_embeddings(tmp_path: Path) -> None:
    folder = tiny_teacher(tmp_path / "t")
    larger = tiny_tokenizer(vocab_size=310)
    larger.add_tokens(["<a>", "<b>"])
    message = r"teacher 'vera': its embedding table has 300 rows .* ids up to \d+, so it needs 3\d\d"
    with pytest.raises(UserError, match=message):
        load_teacher(folder, name="vera", tokenizer=larger)
    larger.save_pretrained(folder)
    with pytest.raises(UserError, match=message):
        load_teacher(folder, name="vera")
    # One without a tokenizer reads the student's ids.
    model = BertForSequenceClassification(tiny_bert_config(**ENDS))
    with pytest.raises(UserError, match=message):
        TeacherPool([Teacher(model, name="vera")], label_names=LABELS, languages=["en"], tokenizer=larger)


@pytest.mark.parametrize(
    "damage", ["empty", "weights", "lying", "config", "tokenizer", "outside", "absolute", "shard", "bin"]
)
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    folder, other = tiny_teacher(tmp_path / "t"), tiny_teacher(tmp_path / "other")
    weights = folder / "model.safetensors"
    if damage == "empty":
        (folder / "config.json").unlink()
    elif damage == "weights":
        weights.write_bytes(weights.read_bytes()[:500])
    elif damage == "lying":
        weights.write_bytes((10**12).to_bytes(8, "little") + weights.read_bytes()[8:])
    elif damage == "config":
        (folder / "config.json").write_text("{")
    elif damage == "tokenizer":
        (folder / "tokenizer.json").write_text('{"model": 3}')
    elif damage == "bin":
        weights.rename(folder / "pytorch_model.bin")
    else:
        names = {"outside": "../other/model.safetensors", "absolute": str(other / "model.safetensors"), "shard": "x"}
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {"classifier.bias": names[damage]}})
        )
    with pytest.raises(UserError) as caught:
        load_teacher(folder, name="vera")
    assert str(caught.value).startswith(f"teacher 'vera' ({folder}): ")
    assert "\n" not in str(caught.value)
    if damage in ("outside", "absolute", "shard"):
        assert names[damage] in str(caught.value)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path) -> None:
    """Neither of its models nor of its tokenizer, whatever they call themselves."""
    folder, mark = tiny_teacher(tmp_path / "t"), tmp_path / "mark"
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    own = {
        "AutoConfig": "code.Config",
        "AutoModelForSequenceClassification": "code.Model",
        "AutoTokenizer": ["code.Tok", "code.Tok"],
    }
    known = edit(Path(shutil.copytree(folder, tmp_path / "known")), auto_map=own)
    file = known / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": own}))
    load_teacher(known)
    with pytest.raises(UserError, match="teacher 'unknown'"):
        load_teacher(edit(Path(shutil.copytree(known, tmp_path / "unknown")), model_type="mine"))
    assert not mark.exists()


def test_places_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "none", str(tmp_path / "none"), "./none", "~/none", Path("none")):
        with pytest.raises(FileNotFoundError, match=r"teacher 'vera': there is no folder .*none"):
            load_teacher(path, name="vera")
    file = tmp_path / "file.safetensors"
    file.touch()
    with pytest.raises(UserError, match=r"teacher 'vera': .*file.safetensors is a file"):
        load_teacher(file, name="vera")
    tiny_teacher(tmp_path / "home" / "vera")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load_teacher("~/vera", tokenizer="~/vera").name == "vera"


def bare_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """Like GPT-2's: nothing is added to a text."""
    base = tiny_tokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=_without_template(base), **special)


def _without_template(base: PreTrainedTokenizerFast) -> Any:
    from tokenizers import Tokenizer

    pipeline = json.loads(base.backend_tokenizer.to_str())
    return Tokenizer.from_str(json.dumps({**pipeline, "post_processor": None, "truncation": None, "padding": None}))


def gpt2(folder: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, **ENDS, **options
    )
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("special", "options"),
    [
        # No pad token anywhere, one that only the tokenizer knows, the end of text, and one that differs.
        ({"eos_token": "[SEP]"}, {}),
        ({"eos_token": "[SEP]", "pad_token": "[PAD]"}, {}),
        ({"eos_token": "[SEP]", "pad_token": "[SEP]"}, {"pad_token_id": 3}),
        ({"eos_token": "[SEP]", "pad_token": "[PAD]"}, {"pad_token_id": 2}),
        ({"eos_token": "[SEP]", "pad_token": "[PAD]", "padding_side": "left"}, {"pad_token_id": 0}),
    ],
)
def test_padding_of_a_language_model_classifier(
    tmp_path: Path, special: dict[str, str], options: dict[str, Any]
) -> None:
    teacher = load_teacher(gpt2(tmp_path, bare_tokenizer(**special), **options))
    assert teacher.tokenizer is not None
    plain = GPT2ForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ids = [torch.tensor([teacher.tokenizer(text)["input_ids"]]) for text in TEXTS]
        expected = torch.cat([plain(input_ids=row).logits for row in ids])
    torch.testing.assert_close(teacher.logits(**teacher.tokenize(TEXTS)), expected, rtol=1e-4, atol=1e-5)
    # Rows that somebody else padded on the left.
    width = max(row.shape[1] for row in ids)
    pad = int(teacher.tokenizer.pad_token_id)
    left = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=pad) for row in ids])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in ids])
    torch.testing.assert_close(teacher.logits(input_ids=left, attention_mask=mask), expected, rtol=1e-4, atol=1e-5)


def test_no_token_to_pad_with(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"teacher 'vera' .* no pad token"):
        load_teacher(gpt2(tmp_path, bare_tokenizer()), name="vera")


def test_a_model_that_reads_its_padding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=300, d_model=16, n_layer=1, n_head=2, d_inner=16, initializer_range=0.3, **ENDS)
    XLNetForSequenceClassification(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"teacher 'vera' \(XLNet.*it reads its padding"):
        load_teacher(tmp_path, name="vera")


@pytest.mark.skipif(why_missing("onednn") is not None, reason="int8 engine")
def test_models_that_look_at_the_weight_of_a_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=300, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, eos_token_id=3, pad_token_id=0,
        decoder_start_token_id=0, **ENDS,
    )  # fmt: skip
    T5ForSequenceClassification(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    exact, teacher = load_teacher(tmp_path), load_teacher(tmp_path, precision="int8", engine="onednn")
    want, got = (t.logits(**t.tokenize(TEXTS)) for t in (exact, teacher))
    assert (want - got).abs().max() < 0.1 * want.abs().max()
    # The table that encoder and decoder share is in 8 bits in both.
    assert teacher.memory_footprint() < 0.5 * exact.memory_footprint()


@pytest.mark.skipif(why_missing("onednn") is not None, reason="int8 engine")
def test_layers_that_8_bits_do_not_reach(tmp_path: Path) -> None:
    folder = gpt2(tmp_path / "gpt2", bare_tokenizer(eos_token="[SEP]"))
    with pytest.raises(UserError, match=r"teacher 'vera' .*GPT2For.* has no linear layer that int8"):
        load_teacher(folder, name="vera", precision="int8", engine="onednn")
    # Most of these weights are positions.
    tiny_teacher(tmp_path / "bert")
    config = BertConfig.from_pretrained(tmp_path / "bert", max_position_embeddings=4096)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    teacher = load_teacher(tmp_path / "bert", precision="int8", engine="onednn")
    assert re.fullmatch(r"int8 \(onednn, 1\d% of the weights\)", teacher.precision)


def test_labels_that_look_the_same(tmp_path: Path) -> None:
    decomposed = ("cafe\u0301", "neutral", "contradiction")
    teacher = load_teacher(tiny_teacher(tmp_path, labels=decomposed), name="vera")
    assert teacher.align(["neutral", "caf\u00e9", "contradiction"]) == [1, 0, 2]
    cyrillic = "c\u0430f\u00e9"
    with pytest.raises(UserError, match=r"c\\u0430f\\xe9"):
        teacher.align(["neutral", cyrillic, "contradiction"])
