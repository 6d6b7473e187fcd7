"""The pages that only the site has, and its list of pages; that links lead somewhere, `make docs` says."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from slimvlm.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OWN = ("index.md", "your-model.md", "discovery.md", "troubleshooting.md")
CODE = ("compress", "export", "serve", "console", "pipeline.py")


def pages(nav):
    for entry in nav:
        for found in entry.values():
            yield from pages(found) if isinstance(found, list) else [found]


def test_every_page_is_in_the_nav_once_and_every_one_in_the_nav_is_there():
    listed = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert sorted(listed) == sorted([*(path.name for path in DOCS.glob("*.md")), "contributing.md"])


@pytest.mark.parametrize("page", OWN)
def test_the_commands_and_options_of_a_page_exist(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    assert set(re.findall(r"(?:`|^    )slimvlm ([a-z]+)", text, re.MULTILINE)) <= set(main.commands)
    options = [one for command in main.commands.values() for one in command.params]
    known = {name for one in options for name in (*one.opts, *one.secondary_opts)}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known


@pytest.mark.parametrize(
    "command", re.findall(r"^    slimvlm (.+)$", (DOCS / "your-model.md").read_text(), re.MULTILINE)
)
def test_the_commands_of_the_first_page_are_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("vlm-256m", "vlm-3b", "out/model"):
        Path(path).mkdir(parents=True)
    for name in ("samples.jsonl", "photo.jpg"):
        Path(name).touch()
    name, *words = re.sub(r'"[^"]*"', "question", command).split()
    with main.commands[name].make_context(name, words) as context:
        assert context.params


@pytest.fixture(scope="module")
def code():
    """All text of the code that may be part of a message, its parts put together."""
    return list(said())


def said():
    for place in CODE:
        for path in [ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(one.value if isinstance(one, ast.Constant) else "\0" for one in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


@pytest.mark.parametrize("page", ["discovery.md", "troubleshooting.md"])
def test_the_sentences_that_a_page_explains_are_those_of_the_code(page, code):
    sentences = re.findall(r"^\| `([^`]+)` \|", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(sentences) >= 8
    unsaid = []
    for sentence in sentences:
        pattern = re.compile(".*".join(map(re.escape, sentence.strip(". ").split("..."))), re.DOTALL)
        if not any(pattern.search(text) for text in code):
            unsaid.append(sentence)
    assert unsaid == []
