"""The page of a run shows what the run has, loads nothing, and refuses broken files by name."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from amtss_fast.runs.report import format_table, read_log, read_metrics, read_run, write_report

VOID = {"meta", "br", "img", "link", "input", "hr"}


def result(accuracies: dict[str, float]) -> dict[str, Any]:
    cells = {code: {"accuracy": x, "count": 400, "loss": 1.0} for code, x in accuracies.items()}
    return {
        "accuracy": sum(accuracies.values()) / len(cells),
        "loss": 1.0,
        "per_language": cells,
    }


@pytest.fixture
def metrics() -> dict[str, Any]:
    return {
        "task": "three languages",
        "languages": ["en", "sw", "ur"],
        "label_names": ["entailment", "neutral"],
        "created": "2026-11-22T10:00:00+00:00",
        "versions": {"torch": "2.13.0"},
        "machine": "Linux x86_64, 2 cores",
        "seconds": {"teachers": 61.0, "student": 20.5, "total": 3700.0},
        "test": {
            "student": result({"en": 0.70, "sw": 0.60, "ur": 0.50}),
            "labels only": result({"en": 0.65, "sw": 0.62, "ur": 0.40}),
            "teacher:west": result({"en": 0.80}),
            "teacher:south": result({"sw": 0.55, "ur": 0.55}),
        },
        "teacher_languages": {"west": ["en"], "south": ["sw", "ur"]},
        "sizes": {"student": 1_350_000, "west": 4_000_000, "south": 5_000_000},
    }


@pytest.fixture
def log() -> list[dict[str, Any]]:
    return [
        {"step": 10, "epoch": 0.1, "loss": 2.0, "kd": 1.2, "ce": 0.8},
        {"step": 10, "teacher_weight": {"west": {"en": 0.11}, "south": {"sw": 0.9}}},
        {"step": 20, "epoch": 0.2, "loss": 1.5, "kd": 0.9, "ce": 0.6},
        {
            "step": 20,
            "eval_loss": 1.4,
            "eval_accuracy": 0.5,
            "eval_accuracy_en": 0.6,
            "eval_accuracy_sw": 0.4,
        },
        {
            "step": 20,
            "teacher_weight": {"west": {"en": 0.37}},
            "teacher_margin": {"west": {"en": -0.21}},
        },
    ]


def make_run(
    path: Path,
    metrics: dict[str, Any],
    log: list[dict[str, Any]] | None = None,
    config: str | None = None,
) -> Path:
    path.mkdir(exist_ok=True)
    (path / "metrics.json").write_text(json.dumps(metrics), "utf-8")
    if log is not None:
        (path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log), "utf-8")
    if config is not None:
        (path / "config.yaml").write_text(config, "utf-8")
    return path


class Page(HTMLParser):
    """Checks that tags nest, and collects text, headings, tags with their attributes, and tables."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(self.source)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += f"*{data}*" if "b" in self.open else data

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def attributes(self, name: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(name)) is not None]


def test_full_page(tmp_path: Path, metrics: dict[str, Any], log: list[dict[str, Any]]) -> None:
    run = make_run(tmp_path / "run", metrics, log, "data:\n  name: cldr_topic\n")
    path = write_report(run)
    assert path == run / "report.html"
    assert sorted(file.name for file in run.iterdir()) == [
        "config.yaml",
        "log.jsonl",
        "metrics.json",
        "report.html",
    ]
    page = Page(path)
    assert page.source.startswith("<!DOCTYPE html>")
    assert [tag for tag, _ in page.tags].count("svg") == 3
    assert page.headings == [
        "Accuracy per language",
        "Table",
        "Training",
        "Teachers",
        "Time",
        "Languages of the teachers",
        "Labels",
        "Settings",
        "Machine and versions",
    ]
    for text in (
        "three languages",
        "60.0 %",
        "student +4.3 points",
        "63.3 %",
        "1.35\u00a0M",
        "the teachers together 9\u00a0M",
        "1 h 01 min",
        "1 min 01 s",
        "20.5 s",
        "name: cldr_topic",
        "2.13.0",
        "2 cores",
        "entailment, neutral",
        "2026-11-22",
    ):
        assert text in page.text, text


def test_table_of_page(tmp_path: Path, metrics: dict[str, Any]) -> None:
    page = Page(write_report(make_run(tmp_path, metrics)))
    assert page.rows == [
        ["language", "texts", "student", "labels only", "gain", "west", "south"],
        ["en", "400", "70.0", "65.0", "+5.0", "*80.0*", "-"],
        ["sw", "400", "60.0", "*62.0*", "-2.0", "-", "55.0"],
        ["ur", "400", "50.0", "40.0", "+10.0", "-", "*55.0*"],
        ["mean", "1,200", "60.0", "55.7", "+4.3", "80.0", "55.0"],
    ]


def test_weights_are_the_last_logged(tmp_path: Path, metrics: dict[str, Any], log: list[dict[str, Any]]) -> None:
    page = Page(write_report(make_run(tmp_path, metrics, log)))
    assert "0.37" in page.texts
    assert "0.90" in page.texts
    assert "0.11" not in page.texts
    assert "-0.21" in page.texts


def test_nothing_is_loaded(tmp_path: Path, metrics: dict[str, Any], log: list[dict[str, Any]]) -> None:
    page = Page(write_report(make_run(tmp_path, metrics, log)))
    assert not re.search(r"https?:|//|@import|data:", page.source)
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
    }
    assert not page.attributes("src")
    assert all(href.startswith("#") for href in page.attributes("xlink:href") + page.attributes("href"))
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", page.source))
    assert "default-src 'none'" in page.source


def test_pictures_share_the_page(tmp_path: Path, metrics: dict[str, Any], log: list[dict[str, Any]]) -> None:
    page = Page(write_report(make_run(tmp_path, metrics, log)))
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(|href=")#([^")]+)', page.source)
    assert used
    assert set(used) <= set(ids)
    # Each color is a variable that both the light and the dark half define.
    variables = set(re.findall(r"var\((--[\w]+)\)", page.source)) - {"--w"}
    for variable in variables:
        assert page.source.count(f"{variable}: #") == 2, variable
    assert "prefers-color-scheme: dark" in page.source
    pictures = page.source[page.source.index("<svg") :]
    # Black and white would vanish in one of the two.
    assert not re.findall(r"#(?:0[1-9a-d]){3}\b|#000000|#ffffff", pictures)


def test_same_run_same_page(tmp_path: Path, metrics: dict[str, Any], log: list[dict[str, Any]]) -> None:
    first = write_report(make_run(tmp_path, metrics, log)).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_escapes(tmp_path: Path, metrics: dict[str, Any]) -> None:
    evil = "<img src=x>&\"'$\\frac$"
    metrics["task"] = metrics["machine"] = evil
    metrics["versions"] = {evil: evil}
    metrics["label_names"] = [evil]
    metrics["languages"].append(evil)
    for system in ("student", "labels only"):
        metrics["test"][system]["per_language"][evil] = {"accuracy": 0.5, "count": 10}
    metrics["test"][f"teacher:{evil}"] = result({"en": 0.5})
    metrics["teacher_languages"] = {evil: [evil]}
    metrics["config"] = {"name": evil}
    log: list[dict[str, Any]] = [
        {"step": 1, "loss": 1.0, "eval_accuracy": 0.5},
        {"step": 1, "teacher_weight": {evil: {"en": 1.0, evil: 0.5}}},
    ]
    page = Page(write_report(make_run(tmp_path, metrics, log)))
    assert "img" not in [tag for tag, _ in page.tags]
    assert page.texts.count(evil) >= 10
    assert "<img" not in page.source


def test_least_run(tmp_path: Path) -> None:
    least = {"languages": ["en"], "test": {"student": {"per_language": {"en": {"accuracy": 1.0}}}}}
    page = Page(write_report(make_run(tmp_path / "my-run", least)))
    assert page.headings == ["Accuracy per language", "Table"]
    assert page.rows == [["language", "student"], ["en", "100.0"], ["mean", "100.0"]]
    assert "my-run" in page.text
    assert not re.search(r"teacher|labels only|best|nan|None", page.text.split("}")[-1])


def test_teachers_of_some_languages(tmp_path: Path, metrics: dict[str, Any]) -> None:
    assert "the best one of each language\n" in Page(write_report(make_run(tmp_path, metrics))).text
    del metrics["test"]["teacher:south"]
    assert "the best one of each language, 1 of 3\n" in Page(write_report(make_run(tmp_path, metrics))).text


def test_losses_that_are_not_finite(tmp_path: Path, metrics: dict[str, Any]) -> None:
    log = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 0.5}]
    page = Page(write_report(make_run(tmp_path, metrics, log)))
    assert "1 logged values are not finite and not drawn." in page.text
    assert "Training" in page.headings
    assert "Teachers" not in page.headings


def test_config_of_metrics(tmp_path: Path, metrics: dict[str, Any]) -> None:
    metrics["config"] = {"student": {"layers": 2}}
    assert read_run(make_run(tmp_path, metrics)).config == "student:\n  layers: 2\n"
    assert read_run(make_run(tmp_path, metrics, config="a: 1\n")).config == "a: 1\n"


def test_format_table(metrics: dict[str, Any]) -> None:
    assert format_table(metrics).splitlines() == [
        "language  texts  student  labels only   gain  west  south",
        "---------------------------------------------------------",
        "en          400     70.0         65.0   +5.0  80.0      -",
        "sw          400     60.0         62.0   -2.0     -   55.0",
        "ur          400     50.0         40.0  +10.0     -   55.0",
        "---------------------------------------------------------",
        "mean      1,200     60.0         55.7   +4.3  80.0   55.0",
    ]


def test_format_table_of_few(metrics: dict[str, Any]) -> None:
    del metrics["test"]["labels only"]
    metrics["test"] = {"student": metrics["test"]["student"]}
    metrics["test"]["teacher:owner/a-model-with-a-very-long-name-v2"] = result({"ur": 0.123})
    lines = format_table(metrics).splitlines()
    assert lines[0].split() == ["language", "texts", "student", "owner/a-mode…ong-name-v2"]
    assert lines[-1].split() == ["mean", "1,200", "60.0", "12.3"]
    with pytest.raises(ValueError, match="no 'languages'"):
        format_table({"test": {}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"languages": "en"}, "'languages' is a list of strings, not 'en'"),
        (
            {"test": {"teacher:west": {}}},
            r"needs the results of 'student'; it has \['teacher:west'\]",
        ),
        ({"test": {"student": {"accuracy": 1}}}, "'student' needs 'per_language'"),
        ({"test": {"student": {"per_language": {}}}}, "'student' has no language"),
        (
            {"test": {"student": result({"xx": 0.5})}},
            r"'student' was tested in 'xx', .*\['en', 'sw', 'ur'\]",
        ),
        (
            {"test": {"student": result({"en": 70.0})}},
            r"'student' in 'en' is in \[0, 1\], not 70.0",
        ),
        ({"seconds": {"total": "long"}}, "'seconds' of 'total' is a number, not 'long'"),
        ({"sizes": [1]}, r"'sizes' is an object, not \[1\]"),
    ],
)
def test_broken_metrics(tmp_path: Path, metrics: dict[str, Any], change: dict[str, Any], message: str) -> None:
    run = make_run(tmp_path, {**metrics, **change})
    with pytest.raises(ValueError, match=rf"metrics\.json: .*{message}"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_broken_files(tmp_path: Path, metrics: dict[str, Any]) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.json is missing: .* not the folder of a run"):
        write_report(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json is not JSON"):
        read_metrics(tmp_path / "metrics.json")
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(ValueError, match=r"metrics\.json: metrics are an object, not list"):
        write_report(tmp_path)
    make_run(tmp_path, metrics, config="a: [")
    with pytest.raises(ValueError, match=r"config\.yaml is not YAML"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 2, "lo', "is not JSON"),
        ('{"loss": 1.0}', "has no number 'step'"),
        ("3", "has no number 'step'"),
        (
            '{"step": 1, "teacher_weight": {"west": 0.3}}',
            r"teacher_weight is not \{teacher: \{language",
        ),
        ('{"step": 1, "teacher_margin": {"west": {"en": "x"}}}', "teacher_margin is not"),
    ],
)
def test_broken_log(tmp_path: Path, metrics: dict[str, Any], line: str, message: str) -> None:
    run = make_run(tmp_path, metrics, [{"step": 1, "loss": 1.0}])
    assert read_log(run / "log.jsonl") == [{"step": 1, "loss": 1.0}]
    with (run / "log.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=rf"log\.jsonl, line 2:? {message}"):
        write_report(run)


def test_failed_write_leaves_the_old_page(
    tmp_path: Path, metrics: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = write_report(make_run(tmp_path, metrics)).read_text("utf-8")
    metrics["task"] = "another"
    make_run(tmp_path, metrics)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text("utf-8") == before
    assert len(list(tmp_path.iterdir())) == 2


def test_draws_the_adaptive_strategy(tmp_path: Path, metrics: dict[str, Any], log: list[dict[str, Any]]) -> None:
    assert "Adaptive strategy" not in write_report(make_run(tmp_path / "off", metrics, log)).read_text("utf-8")
    for step, share in ((10, 0.6), (20, 0.8)):
        importance = {"west": {"en": 1.0, "sw": share}, "south": {"sw": 1 - share}}
        log.append({"step": step, "teacher_importance": importance, "language_weight": {"sw": 1.2, "en": 0.8}})
    page = write_report(make_run(tmp_path / "on", metrics, log)).read_text("utf-8")
    picture = page[page.index("<h2>Adaptive strategy") :]
    picture = picture[: picture.index("</section>")]
    # Both languages that have figures, and what the lines are.
    for name in (">en<", ">sw<", ">west<", ">south<", ">weight of the language<"):
        assert name in picture
    assert ">ur<" not in picture
