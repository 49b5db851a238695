"""The Python code in the docs runs as it stands or is an excerpt of an example, and their links lead somewhere."""

from __future__ import annotations

import re
import shlex
import string
import textwrap
from pathlib import Path

import pytest

from amtss_fast.runs import load_config

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# A block of code, and the example that the line before it names.
BLOCK = re.compile(r"^(?:From \[examples/(\S+\.py)\]\(\S+\):\n\n)?```python\n(.*?)^```", re.M | re.S)


def blocks(excerpts: bool) -> list[object]:
    return [
        pytest.param(example, code, id=f"{page.name}-{number}")
        for page in PAGES
        for number, (example, code) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
        if bool(example) is excerpts
    ]


def commands() -> list[object]:
    """The commands that read a configuration, as words; `name='value'` before them sets a variable."""
    found, variables = [], {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^    (\S.*)$", text, re.M):
            if assigned := re.fullmatch(r"(\w+)='(.*)'", line):
                variables[assigned[1]] = assigned[2]
            elif re.match(r"amtss-fast (train|cache|teachers check) ", line):
                words = [string.Template(word).substitute(variables) for word in shlex.split(line, comments=True)]
                found.append(pytest.param(words, id=f"{page.name}-{len(found)}"))
    return found


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_are_examples() -> None:
    assert len(blocks(excerpts=False)) + len(blocks(excerpts=True)) >= 5


@pytest.mark.parametrize(("example", "code"), blocks(excerpts=False))
def test_example(example: str, code: str) -> None:
    exec(compile(code, "example", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("example", "code"), blocks(excerpts=True))
def test_excerpt(example: str, code: str) -> None:
    script = (ROOT / "examples" / example).read_text(encoding="utf-8")
    depths = {len(line) - len(line.lstrip()) for line in script.splitlines()}
    assert any(textwrap.indent(code, depth * " ") in script for depth in depths), f"not in {example}:\n{code}"


@pytest.mark.parametrize("words", commands())
def test_overrides_of_commands_are_valid(words: list[str]) -> None:
    overrides = [word for word in words if "=" in word and not word.startswith("-")]
    configs = [word for word in words[2:] if word not in overrides and not word.startswith("-") and word != "check"]
    (config,) = configs
    load_config("demo" if config == "my.yaml" else config, overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://")):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths(page: Path) -> None:
    """Files and folders of the project that a page names are there."""
    rooms = "amtss_fast|kernels|tests|benchmarks|docs|examples"
    for path in re.findall(rf"`(?:python |pytest )?((?:{rooms})/[\w./-]*)", page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), path


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 80
