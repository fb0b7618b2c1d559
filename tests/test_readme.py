"""The README's and the docs' commands and code are real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from ddpm_edge.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]


def commands() -> list[list[str]]:
    text = "\n".join(page.read_text() for page in PAGES)
    return [
        line.split()[1:] for line in re.findall(r"^    (ddpm-edge [^\n]*)$", text, re.MULTILINE)
    ]


def test_the_readme_is_short_and_complete() -> None:
    text = PAGES[0].read_text()
    assert len(text.splitlines()) <= 250
    assert "@@" not in text
    assert set(main.commands) <= {words[0] for words in commands()}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_options_of_documented_commands_exist(words: list[str]) -> None:
    options = [w for w in words if w.startswith("-")]
    known = {o for p in main.commands[words[0]].params for o in (*p.opts, *p.secondary_opts)}
    assert set(options) <= known
    assert CliRunner().invoke(main, [words[0], "--help"]).exit_code == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_readme_s_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    exec(block.replace("steps=1000", "steps=200"), {})
    assert (tmp_path / "sneakers.png").is_file()
