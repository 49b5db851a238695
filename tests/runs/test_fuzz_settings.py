"""Random settings: what is written is read again, and no text does worse than an error for its user."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from amtss_fast.errors import UserError
from amtss_fast.runs.config import RunConfig, load_config, parse_config
from amtss_fast.runs.scalars import core_value
from amtss_fast.runs.settings import apply_overrides, read_settings, write_settings

WORDS = st.sampled_from(
    [
        *(
            "no",
            "yes",
            "on",
            "null",
            "Null",
            "~",
            "true",
            "False",
            "1",
            "01",
            "1.0",
            "-1",
            "1e5",
            "0x1F",
            "1_000",
            ".inf",
        ),
        *(
            ".nan",
            "2024-01-01",
            "1:30",
            "${x}",
            "${",
            "a: b",
            "a #b",
            "#",
            "- a",
            "[a",
            "{a",
            "*x",
            "&x",
            "!x",
            "%x",
            "@",
        ),
        *(
            "'",
            '"',
            "'no'",
            '"1"',
            "a\nb",
            "\ta",
            " a ",
            "\x85",
            "\u2028",
            "\ufeff",
            "=",
            "<<",
            "?",
            "|",
            ">",
            "---",
            "...",
        ),
    ]
)
TEXTS = WORDS | st.text(st.characters(exclude_categories=["Cs"]))
NAMES = WORDS.filter(str.strip) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
SCALARS = TEXTS | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none()
# In the order in which they are; YAML has one spelling of a key.
NESTED = st.recursive(SCALARS, lambda part: st.lists(part, max_size=3) | st.dictionaries(TEXTS, part, max_size=3))


def texts(value: Any) -> Any:
    """The value with texts alone: everything else is its kind of thing."""
    if isinstance(value, dict):
        return {key: texts(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [texts(entry) for entry in value]
    return value if isinstance(value, str) else None


@given(st.dictionaries(TEXTS, NESTED, max_size=4))
def test_texts_are_read_as_another_writer_wrote_them(values: dict[str, Any]) -> None:
    def check(wanted: Any, found: Any) -> None:
        if isinstance(wanted, dict):
            assert list(found) == list(wanted)
            for key, entry in wanted.items():
                check(entry, found[key])
        elif isinstance(wanted, list):
            assert len(found) == len(wanted)
            for pair in zip(wanted, found, strict=True):
                check(*pair)
        elif isinstance(wanted, str):
            assert str(found) == wanted

    check(values, read_settings(yaml.safe_dump(values, sort_keys=False), "file"))


@given(st.dictionaries(TEXTS, NESTED, max_size=4))
def test_settings_are_read_as_they_were_written(values: dict[str, Any]) -> None:
    assert core_value(read_settings(write_settings(values), "file")) == values


@given(st.text() | st.text("{}[]:,-&*!|>'\"%@`#?~<\n\t ab1") | WORDS)
def test_no_text_does_worse_than_an_error(text: str) -> None:
    for read in (
        lambda: read_settings(text, "file"),
        lambda: read_settings(f"a:\n  b: {text}", "file"),
        lambda: apply_overrides({"a": [{}]}, [f"a.0.b={text}", f"c={text}"]),
        lambda: apply_overrides({"a": [{}]}, [text]),
        lambda: parse_config({"title": text}, [f"data={text}", f"training.logging_steps={text}"], "file"),
    ):
        with contextlib.suppress(UserError):
            read()


@given(st.binary() | st.text().map(lambda text: text.encode("utf-16")))
def test_no_file_does_worse_than_an_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_bytes(content)
        with contextlib.suppress(UserError):
            load_config(file)


@given(
    title=TEXTS | st.none(),
    labels=st.lists(TEXTS, max_size=3) | st.none(),
    column=TEXTS,
    languages=st.lists(st.from_regex(r"[\w-]+", fullmatch=True) | st.sampled_from(["no", "1", "null"]), min_size=1),
    teacher=st.sampled_from(["no", "1", "1.0", "01", "1e5", "null", "2024-01-01", "-", "true"]),
    encoder=st.dictionaries(TEXTS, NESTED, max_size=3),
    rate=st.floats(min_value=0, allow_infinity=False),
)
def test_configurations_are_read_back(
    title: str | None,
    labels: list[str] | None,
    column: str,
    languages: list[str],
    teacher: str,
    encoder: dict[str, Any],
    rate: float,
) -> None:
    config = RunConfig.model_validate(
        {
            "title": title,
            "output_dir": "run",
            "data": {"name": "data", "label_names": labels, "text": column, "languages": languages},
            "student": {"encoder": encoder},
            "teachers": [{"name": teacher, "path": teacher, "label_names": labels}],
            "training": {"learning_rate": rate, "report_to": [column], "run_name": title},
        }
    )
    assert parse_config(read_settings(config.to_yaml(), "file"), [], "file") == config


@given(NAMES)
def test_an_unquoted_override_keeps_its_text(text: str) -> None:
    values = {"output_dir": "run", "data": {"name": "data"}, "student": {"encoder": "e"}}
    values["teachers"] = [{"name": "a", "path": "b"}]
    try:
        title = parse_config(values, [f"title={text}"], "file").title
    except UserError:
        return
    # Quotes and null are YAML's.
    assert title is None or title == text.strip() or text.strip()[:1] in "'\"!&|>#"
