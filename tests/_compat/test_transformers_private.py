"""A canary: which private or unstable name this version of transformers or datasets lacks."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from transformers import BertConfig, Trainer

from amtss_fast._compat import transformers as private
from amtss_fast._compat.arguments import TrainingArguments
from amtss_fast._compat.datasets import fingerprint

VERSION = f"transformers {transformers.__version__}"
loads_int8 = pytest.mark.skipif(private.why_no_int8_loading() is not None, reason=str(private.why_no_int8_loading()))


@pytest.mark.parametrize(("name", "parameters"), private.TRAINER_METHODS.items())
def test_methods_of_the_trainer(name: str, parameters: tuple[str, ...]) -> None:
    method = getattr(Trainer, name, None)
    assert method is not None, f"{VERSION} has no Trainer.{name}"
    found = tuple(inspect.signature(method).parameters)[1:]
    assert found == parameters, f"{VERSION}: Trainer.{name} takes {found}"


@pytest.mark.parametrize(("name", "since"), private.TRAINER_ATTRIBUTES.items())
def test_attributes_of_the_trainer(name: str, since: str) -> None:
    if Version(transformers.__version__) >= Version(since):
        assert f"self.{name}" in inspect.getsource(Trainer), f"{VERSION} does not read Trainer.{name}"


def test_the_attention_of_a_configuration() -> None:
    config = BertConfig()
    private.set_attention_implementation(config, "eager")
    assert private.attention_implementation(config) == "eager", f"{VERSION}: PretrainedConfig._attn_implementation"
    assert private.attention_implementation(BertConfig()) is None
    with pytest.raises(RuntimeError, match=rf"{VERSION} has no PretrainedConfig._attn_implementation, which amtss_"):
        private.attention_implementation(object())  # type: ignore[arg-type]


def test_weights_that_were_loaded_stay() -> None:
    fresh, loaded = torch.ones(2), torch.ones(2)
    loaded._is_hf_initialized = True  # type: ignore[attr-defined]
    private.zero_unless_loaded(fresh, loaded)
    assert fresh.tolist() == [0, 0]
    assert loaded.tolist() == [1, 1]
    stock = pytest.importorskip("transformers.initialization", reason="transformers 5 marks single weights")
    stock.zeros_(loaded)
    assert loaded.tolist() == [1, 1], f"{VERSION} marks loaded weights by another name than _is_hf_initialized"


def test_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert private.has_file(tmp_path, "config.json")
    assert not private.has_file(tmp_path, "tokenizer.json")


def test_callbacks_keep_a_state() -> None:
    class Keeps(private.ExportableState):
        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {}}

    assert Keeps().state() == {"args": {}, "attributes": {}}
    assert "ExportableState" in inspect.getsource(Trainer), f"{VERSION} keeps the state of callbacks by another class"


def test_training_arguments_reach_the_trainer(tmp_path: Path) -> None:
    args: Any = TrainingArguments(
        str(tmp_path), activation_checkpointing=True, train_sampling_strategy="group_by_length", use_cpu=True
    )
    stock = inspect.signature(transformers.TrainingArguments).parameters
    assert args.activation_checkpointing if "activation_checkpointing" in stock else args.gradient_checkpointing
    assert args.train_sampling_strategy == "group_by_length"
    assert "train_sampling_strategy" in stock or args.group_by_length
    if "train_sampling_strategy" not in stock:
        with pytest.raises(ValueError, match="got 'sequential'"):
            TrainingArguments(str(tmp_path), train_sampling_strategy="sequential", use_cpu=True)


@loads_int8
def test_hooks_of_the_quantizer() -> None:
    from amtss_fast._compat import loading

    for kind in (loading._Quantizer, loading._Replace, loading._Config):
        stock = kind.__mro__[1]
        for name, value in vars(kind).items():
            if inspect.isfunction(value) and name != "__init__":
                assert hasattr(stock, name), f"{VERSION} has no {stock.__name__}.{name}"


def test_fingerprints_of_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_dict({"a": [1, 2]})
    assert fingerprint(rows) == fingerprint(Dataset.from_dict({"a": [1, 2]}))
    assert fingerprint(rows) != fingerprint(Dataset.from_dict({"a": [1, 3]}))
    monkeypatch.delattr(rows, "_fingerprint")
    with pytest.raises(
        RuntimeError, match=rf"datasets {datasets.__version__} has no Dataset._fingerprint, which amtss"
    ):
        fingerprint(rows)
