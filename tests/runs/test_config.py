"""Configurations: what YAML values become, what overrides change, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amtss_fast.errors import UserError
from amtss_fast.runs.config import SHIPPED, RunConfig, load_config, parse_config
from amtss_fast.runs.scalars import core_value
from amtss_fast.runs.settings import apply_overrides, read_settings

LEAST = "output_dir: run\ndata: {name: data.csv}\nstudent: {encoder: hub/student}\nteachers: [{name: a, path: hub/a}]\n"


def load(folder: Path, text: str, *overrides: str) -> RunConfig:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, overrides)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("[no, en, on, yes, off, No]", ["no", "en", "on", "yes", "off", "No"]),
        ("{no: yes}", {"no": "yes"}),
        ("'no'", "no"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("1e-5", 1e-5),
        ("1.0e-3", 1e-3),
        ("-2E+3", -2000.0),
        (".inf", float("inf")),
        ("1_000", 1000),
        ("0", 0),
        ("0o17", "0o17"),
        ("017", "017"),
        ("1:30", "1:30"),
        ("2026-11-28", "2026-11-28"),
        ("2026-11-28 10:00:00", "2026-11-28 10:00:00"),
        ("a=b", "a=b"),
        ("nowhere", "nowhere"),
        ("# nothing", None),
    ],
)
def test_values(text: str, value: Any) -> None:
    for found in (
        core_value(read_settings(f"key: {text}\n", "file")["key"]),
        core_value(apply_overrides({}, [f"key={text}"])["key"]),
    ):
        assert found == value
        assert type(found) is type(value)


def test_a_language_may_be_norwegian(tmp_path: Path) -> None:
    config = load(tmp_path, LEAST, "data.languages=[no, en]", "data.language_default=no")
    assert config.data.languages == ["no", "en"]
    assert config.data.language_default == "no"
    assert load(tmp_path, LEAST.replace("name: a,", "name: no, languages: [no],")).teachers[0].languages == ["no"]


def test_words_are_booleans_where_booleans_are_expected(tmp_path: Path) -> None:
    settings = ["labels_only=yes", "teachers.0.compile=off", "training.bf16=no", "training.eval_strategy=no"]
    config = load(tmp_path, LEAST, *settings, "teacher_training.use_cpu=on", "training.report_to=none")
    assert config.labels_only is True
    assert config.teachers[0].compile is False
    assert config.teacher_training == {"use_cpu": True}
    assert config.training == {"bf16": False, "eval_strategy": "no", "report_to": "none"}


def test_numbers_that_look_like_numbers_are_numbers() -> None:
    config = load_config("demo", ["training.learning_rate=2e-5", "training.weight_temperature=.inf"])
    assert config.training["learning_rate"] == 2e-5
    assert config.training["weight_temperature"] == float("inf")


def test_anchors_and_merges(tmp_path: Path) -> None:
    text = LEAST + "teacher_training: &common\n  seed: 1\n  max_steps: 5\ntraining:\n  <<: *common\n  max_steps: 7\n"
    config = load(tmp_path, text, "training.seed=2")
    assert config.teacher_training == {"seed": 1, "max_steps": 5}
    assert config.training == {"seed": 2, "max_steps": 7}
    demo = load_config("demo")
    assert demo.teachers[0].model == demo.teachers[2].model
    assert demo.training["num_train_epochs"] == demo.teacher_training["num_train_epochs"] == 3


def test_overrides() -> None:
    values: dict[str, Any] = {"seed": 0, "training": None, "teachers": [{"name": "a"}, {"name": "b"}]}
    changed = core_value(
        apply_overrides(
            values,
            [
                "teachers.1.name=c",
                "teachers.0.model.encoder={model_type: bert, hidden_size: 16}",
                "training.max_steps=5",
                "tokenizer.vocab_size=600",
                "data.splits=[train, test]",
                "seed=1",
                "seed=2",
            ],
        )
    )
    assert changed == {
        "seed": 2,
        "training": {"max_steps": 5},
        "teachers": [{"name": "a", "model": {"encoder": {"model_type": "bert", "hidden_size": 16}}}, {"name": "c"}],
        "tokenizer": {"vocab_size": 600},
        "data": {"splits": ["train", "test"]},
    }
    assert values == {"seed": 0, "training": None, "teachers": [{"name": "a"}, {"name": "b"}]}
    # A section is replaced, not merged.
    assert core_value(apply_overrides({"a": {"b": 1}}, ["a={c: 2}"])) == {"a": {"c": 2}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "an override must be key=value, got 'seed'"),
        ("=1", "an override must be key=value, got '=1'"),
        ("data..name=1", "an override must be key=value"),
        ("teachers[0].name=x", "an override must be key=value"),
        ("teachers.7.name=x", "'7' must be a place in a list of 1, from 0"),
        ("teachers.1={name: x}", "'1' must be a place in a list of 1, from 0"),
        ("teachers.-1.name=x", "'-1' must be a place in a list of 1, from 0"),
        ("teachers.first.name=x", "'first' must be a place in a list of 1, from 0"),
        ("seed.x=1", "seed is 0, not a section"),
        ("data.name.x=1", "data.name is 'data.csv', not a section"),
        ("seed=[1", "is not valid YAML"),
        ("seed={a: 1, a: 2}", "override seed={a: 1, a: 2}, line 1 is not valid YAML: duplicate key a, it stands in"),
        ("data.label_names=[a", r"override data.label_names=\[a is not valid YAML: .*expected ',' or ']'"),
        ("title=*x", r"override title=\*x is not valid YAML: found undefined alias 'x'"),
        ("title=[draft] results", "override title=.* is not valid YAML"),
        ("title=draft: results", "title: Input should be a valid string; a text with such characters needs quotes"),
        ("data.langages=[en]", r"data.langages: unknown key, did you mean languages\?, got \['en'\]"),
        ("training.learning_rat=1", r"training.learning_rat: unknown key, did you mean learning_rate\?, got '1'"),
        ("training.learning_rate=fast", "training.learning_rate: Input should be a valid number.*, got 'fast'"),
        ("training.max_steps=0o17", "training.max_steps: Input should be a valid integer.*, got '0o17'"),
        ("training.bf16=maybe", "training.bf16: Input should be a valid boolean.*, got 'maybe'"),
        ("teachers.0.training.sed=1", r"teachers.0.training.sed: unknown key, did you mean seed\?"),
        ("seed=1.5", "seed: Input should be a valid integer.*, got 1.5"),
        ("teachers=[]", "teachers: List should have at least 1 item"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(tmp_path, LEAST + "seed: 0\n", override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a mapping of settings, found nothing"),
        ("- 1", "must hold a mapping of settings, found a list"),
        ("text", "must hold a mapping of settings, found a text"),
        ("data: [", "is not valid YAML"),
        ("seed: 1\nseed: 2", "duplicate key seed"),
        (LEAST + "data: {name: b}\n", "duplicate key data"),
        (LEAST + "training: {seed: 1, seed: 2}\n", "line 5 .*duplicate key training.seed"),
        (LEAST + "tile: x\n", r"tile: unknown key, did you mean title\?"),
        (LEAST + "title: !!python/object:os.system x\n", "is not valid YAML"),
        (LEAST.replace("output_dir: run\n", ""), "output_dir: is missing$"),
        (LEAST.replace("path: hub/a", "prior: 1"), "teacher 'a' needs either a path or a model to train"),
        (LEAST.replace("[{name", "[{name: a, path: b}, {name"), r"different names, got \['a', 'a'\]"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, text)
    assert "run.yaml" in str(error.value)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"title: \xff")
    with pytest.raises(UserError, match=r"run.yaml, line 1 is not UTF-8: .* b'\\xff'"):
        load_config(tmp_path / "run.yaml")
    with pytest.raises(FileNotFoundError, match="no configuration 'nothing': give a YAML file, or one of demo"):
        load_config("nothing")


def test_saved_configurations_are_read_back(tmp_path: Path) -> None:
    for file in SHIPPED.glob("*.yaml"):
        config = load_config(file)
        assert load(tmp_path, config.to_yaml()) == config
    names = {"title": "1e5", "output_dir": "017", "data": {"name": "2026-11-28", "languages": ["no", "on", "null"]}}
    others = {"student": {"encoder": "1_000"}, "teachers": [{"name": "1.5", "path": "~"}]}
    config = parse_config({**names, **others, "training": {"learning_rate": 1e-5}}, [], "test")
    assert load(tmp_path, config.to_yaml()) == config
