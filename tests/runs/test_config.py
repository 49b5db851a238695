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


@pytest.mark.parametrize(
    ("yaml", "value"),
    [
        ("data: {name: x, label_names: [no, yes, 1, 01, 1.0, 1e5, null, true, 2024-01-01, ~]}", None),
        ("data: {name: x, languages: [no, 1, null, true]}", None),
        ("title: 2024-01-01", "2024-01-01"),
        ("title: ${oc.env:HOME}", "${oc.env:HOME}"),
        ("title: 'null'", "null"),
        ("title: null", None),
        ("title:", None),
    ],
)
def test_texts_are_kept_as_they_were_written(yaml: str, value: str | None, tmp_path: Path) -> None:
    if yaml.startswith("title"):
        config = load(tmp_path, f"{LEAST}{yaml}\n")
        assert config.title == value
    else:
        config = load(tmp_path, LEAST.replace("data: {name: data.csv}", yaml))
        found = config.data.label_names or config.data.languages
        assert found == yaml.partition("[")[2].rstrip("]}").split(", ")
    assert load(tmp_path, config.to_yaml()) == config
    assert load(tmp_path, LEAST, f"teachers.0.name={'no'}", "data.revision=2024-01-01").data.revision == "2024-01-01"


def test_options_of_the_loss(tmp_path: Path) -> None:
    section = "training: {divergence: jsd, divergence_beta: 0.3, teacher_temperature: [1, 2.5]}\n"
    text = LEAST.replace("path: hub/a}", "path: hub/a}, {name: b, path: hub/b}") + section
    config = load(tmp_path, text)
    assert config.training == {"divergence": "jsd", "divergence_beta": 0.3, "teacher_temperature": [1.0, 2.5]}
    assert load(tmp_path, config.to_yaml()) == config
    overrides = ("training.teacher_temperature=3", "training.divergence=tvd", "training.divergence_beta=null")
    changed = {"divergence": "tvd", "divergence_beta": None, "teacher_temperature": 3.0}
    assert load(tmp_path, text, *overrides).training == changed


def test_free_sections_have_the_types_of_yaml(tmp_path: Path) -> None:
    encoder = "{model_type: bert, a: no, b: true, c: 1, d: 1e-5, e: null, f: '1', g: [1, {h: off}], 0: x}"
    config = load(tmp_path, LEAST, f"student.encoder={encoder}")
    found = {"model_type": "bert", "a": "no", "b": True, "c": 1, "d": 1e-5, "e": None, "f": "1"}
    assert config.student.encoder == {**found, "g": [1, {"h": "off"}], "0": "x"}
    assert load(tmp_path, LEAST, "memory.budget=1e9").memory.budget == 1e9  # type: ignore[union-attr]
    assert load(tmp_path, LEAST, "memory.budget=6GB").memory.budget == "6GB"  # type: ignore[union-attr]
    assert load(tmp_path, LEAST, "training.max_steps=1e3").training == {"max_steps": 1000}


def test_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = "{name: b, model: {encoder: ~/e}, tokenizer: ~/t}"
    config = load(
        tmp_path,
        LEAST,
        *("output_dir=~/run", "data.name=~/d/*.csv", "student.encoder=~/s", "teachers.0.path=~", f"teachers=[{model}]"),
        *("tokenizer.path=~/t", "teacher_cache.path=~/c", "training.deepspeed=~/ds.json"),
    )
    teacher, home = config.teachers[0], str(tmp_path)
    assert teacher.model is not None
    assert config.teacher_cache is not None
    paths = [config.output_dir, config.data.name, config.student.encoder, teacher.model.encoder, teacher.tokenizer]
    paths += [config.tokenizer.path, config.teacher_cache.path, config.training["deepspeed"]]
    assert paths == [f"{home}/{place}" for place in ("run", "d/*.csv", "s", "e", "t", "t", "c", "ds.json")]
    assert load(tmp_path, config.to_yaml()) == config
    assert load_config("~/run.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("output_dir=", "output_dir: Input should be a valid string, got None"),
        ("output_dir=''", "output_dir: must be a path, it is empty"),
        ("output_dir=null", "output_dir: must be a path; a file of this name needs quotes, 'null'"),
        ("output_dir=~nobody-here/run", "output_dir: there is no home folder ~nobody-here"),
        ('output_dir="a\\0b"', "output_dir: must be a path, it has a NUL character"),
        (
            "data.languages=[en, a/b]",
            "data.languages.1: a language code consists of letters, digits, - and _, got 'a/b'",
        ),
        ("data.languages=[]", "data.languages: List should have at least 1 item"),
        ("data.language_default=../x", "data.language_default: a language code consists of .*, got '../x'"),
        ("teachers.0.languages=[a b]", "teachers.0.languages.0: a language code consists of .*, got 'a b'"),
        ("teachers.0.name=..", r"teachers.0 \('..'\): this name cannot be that of a folder"),
        ("teachers.0.name=a.partial", "this name cannot be that of a folder"),
        ("teachers=[{name: student, model: {encoder: e}}]", "the run itself keeps a training under this name"),
        ("teachers.0.training.max_steps=1", "training has no effect on a teacher with a path"),
        ("teachers.0.prior=-1", "teachers.0.prior: Input should be greater than or equal to 0, got -1"),
        ("teachers.0.prior=.nan", "teachers.0.prior: Input should be a finite number, got nan"),
        ("teachers.0.precision=int4", "teachers.0.precision: must be one of float32, bfloat16, int8, got 'int4'"),
        ("student.pooling=max", "student.pooling: must be one of mean, cls, got 'max'"),
        ("student.classifier_dropout=1", "student.classifier_dropout: Input should be less than 1, got 1"),
        ("data=file.csv", "data: must be a section"),
        ("training=fast", "training: must be a section"),
        ("data.max_length=true", "data.max_length: Input should be a valid integer.*, got 'true'"),
        ("seed=-1", "seed: Input should be greater than or equal to 0, got -1"),
        ("data.mask_probability=0.3", "data.mask_probability is for masked-lm, not for task 'sequence-classification'"),
        ("training.seed=true", "training.seed: Input should be a valid integer.*, got 'true'"),
        ("training.num_train_epochs=-1", "training.num_train_epochs: must be above 0, got -1"),
        ("training.max_steps=0", "training.max_steps: must be at least 1; .*, got 0"),
        ("training.per_device_eval_batch_size=0", "training.per_device_eval_batch_size: must be at least 1, got 0"),
        ("training.learning_rate=.nan", "training.learning_rate: must be a finite number, got nan"),
        ("training.learning_rate=1e999", "training.learning_rate: must be a finite number, got inf"),
        ("training.learning_rate=[1]", r"training.learning_rate: Input should be a valid number, got \['1'\]"),
        (
            f"training.max_steps={'9' * 5000}",
            "training.max_steps: Unable to parse input string as an integer, exceeded.*99999",
        ),
        ("training.max_steps=99999999999999999999", "training.max_steps: is too large, got 9999"),
        ("training.eval_strategy=never", "training.eval_strategy: must be one of no, steps, epoch, got 'never'"),
        ("training.optim=sdg", "training.optim: must be one of adamw_torch, .*, got 'sdg'"),
        ("training.log_level=loud", "training.log_level: must be one of .*, got 'loud'"),
        ("training.temperature=0", "training.temperature: must be positive and finite, got 0"),
        ("training.kd_weight=0", "training.kd_weight must be above 0"),
        ("training.ce_weight=-1", "training.ce_weight: must be finite and >= 0, got -1"),
        ("training.divergence=kl", "training.divergence: Input should be 'forward_kl', .* or 'tvd', got 'kl'"),
        (
            "training.divergence_beta=0.3",
            "training.divergence_beta: has no meaning for divergence='forward_kl', got 0.3",
        ),
        (
            "training={divergence: jsd, divergence_beta: 1}",
            r"training.divergence_beta: must be in \(0, 1\), .*, got 1.0",
        ),
        ("training.teacher_temperature=0", "training.teacher_temperature: must be positive and finite, got 0"),
        ("training.teacher_temperature=[.nan]", r"teacher_temperature\[0\] must be positive and finite, got \[nan\]"),
        ("training.teacher_temperature=[x]", "training.teacher_temperature: .* valid number, .*, got 'x'"),
        ("training.teacher_temperature=[]", r"teacher_temperature must .* hold one for each of 1 teachers, got \[\]"),
        ("training.teacher_temperature=[1, 2]", r"hold one for each of 1 teachers, got \[1.0, 2.0\]"),
        ("teacher_training.divergence=jsd", "teacher_training.divergence: .* teachers learn from labels alone"),
        ("training.gap_temperature=0", "training.gap_temperature: must be above 0 .*, got 0"),
        ("training.chunk_rows=8", "training.chunk_rows is for masked-lm and causal-lm"),
        ("teacher_training.kd_weight=1", "teacher_training.kd_weight: .* teachers learn from labels alone"),
        (
            "teacher_training.learnin_rate=1",
            r"teacher_training.learnin_rate: unknown key, did you mean learning_rate\?",
        ),
    ],
)
def test_wrong_values(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, LEAST, override)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1500


@pytest.mark.parametrize("section", ["training", "teacher_training", "teachers.0.training"])
@pytest.mark.parametrize(
    "name",
    [
        *(
            "output_dir",
            "resume_from_checkpoint",
            "do_train",
            "do_eval",
            "do_predict",
            "label_names",
            "task",
            "local_rank",
        ),
        *("include_for_metrics", "push_to_hub", "hub_model_id", "length_column_name"),
    ],
)
def test_settings_that_nobody_reads(section: str, name: str, tmp_path: Path) -> None:
    text = LEAST.replace("path: hub/a", "model: {encoder: hub/a}")
    with pytest.raises(UserError, match=f"{section}.{name}: is not for a configuration: .*, got 'x'"):
        load(tmp_path, text, f"{section}.{name}=x")


def test_every_argument_is_either_read_or_refused() -> None:
    from amtss_fast.runs.arguments import _NOT_FOR_TEACHERS, _RANGES, _REFUSED, _types

    for name in (*_NOT_FOR_TEACHERS, *_RANGES, *_REFUSED):
        assert name in _types().model_fields or name.startswith(("hub_", "parallelism"))


def test_all_problems_are_listed(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, LEAST, "seed=x", "training.max_steps=many", "teachers.0.prior=y")
    first, *rest = str(error.value).splitlines()
    assert first == f"{tmp_path / 'run.yaml'} is not a valid configuration:"
    assert sorted(line.partition(":")[0] for line in rest) == ["  seed", "  teachers.0.prior", "  training.max_steps"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {\n", "line 2"),
        ("a:\n\tb: 1\n", "line 2"),
        ("a: 1\nb: *x\n", "line 2.* undefined alias 'x'"),
        ("a: 1\nb: \0\n", r"line 2 .*the character '\\x00' is not allowed"),
        ("a: 1\nb: {c: 1, c: 2}\n", "line 2 .*duplicate key b.c, it stands in line 2 too"),
        ("a:\n  - b: 1\n    b: 2\n", "line 3 .*duplicate key a.0.b, it stands in line 2 too"),
        ("a: 1\n'a': 2\n", "line 2 .*duplicate key a"),
        ("a: &x [*x]\n", "line 1 .*nested too deeply"),
        ("[" * 5000, "nested too deeply"),
        ("a: " + "[" * 100 + "]" * 100, "nested too deeply"),
        ("? [a]\n: b\n", "a key must be a text"),
        ("<<: 1\n", "<< needs a mapping"),
        ("a: !!set {b}\n", "tags such as .*set' are not supported"),
        ("a: 1\n---\nb: 2\n", "single document"),
        ("a0: &a [x, x, x, x, x, x, x, x, x]\n"
         + "".join(f"a{i}: &{chr(97 + i)} [{', '.join(['*' + chr(96 + i)] * 9)}]\n" for i in range(1, 9)), "too many"),
    ],
)  # fmt: skip
def test_files_that_are_no_yaml(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path / "run.yaml"))
    assert "\n" not in str(error.value)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=f"{tmp_path} is a folder: give a YAML file, for that of a run {tmp_path}/config"
    ):
        load_config(tmp_path)


def test_saved_configurations_are_read_back(tmp_path: Path) -> None:
    for file in SHIPPED.glob("*.yaml"):
        config = load_config(file)
        assert load(tmp_path, config.to_yaml()) == config
    names = {"title": "1e5", "output_dir": "017", "data": {"name": "2026-11-28", "languages": ["no", "on", "null"]}}
    others = {"student": {"encoder": "1_000"}, "teachers": [{"name": "1.5", "path": "~"}]}
    config = parse_config({**names, **others, "training": {"learning_rate": 1e-5}}, [], "test")
    assert load(tmp_path, config.to_yaml()) == config
