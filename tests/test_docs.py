"""Every example in the README and the docs runs, or says why it is not run and is checked for its spelling.

A block under `<!-- not run: reason -->` is not run. Its `weft` lines must still parse, and its `make` targets exist.
"""

import functools
import importlib
import os
import re
import shlex
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
from cyclopts import CycloptsError
from markdown_it import MarkdownIt

from weft.backbones import load_backbone
from weft.cli import build_app, explain, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOT_RUN = re.compile(r"<!--\s*not run:\s*(\S.*?)\s*-->")


def blocks(text: str):
    """(language, code, line, is_run) of each fenced bash or python block."""
    tokens = MarkdownIt().parse(text)
    for before, token in zip([None, *tokens], tokens, strict=False):
        language = token.info.split()[0] if token.type == "fence" and token.info else ""
        if language in ("bash", "python"):
            note = NOT_RUN.fullmatch(before.content.strip()) if before and before.type == "html_block" else None
            yield language, token.content, token.map[0] + 1, note is None


def commands(code: str) -> list[list[str]]:
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def check_spelling(words: list[str]) -> None:
    """The verb, its options and its arguments are such as there are; nothing is run."""
    if words[0] == "weft":
        try:
            build_app().parse_args([w for w in words[1:] if w != "--debug"], exit_on_error=False, print_error=False)
        except CycloptsError as error:
            raise AssertionError(f"{shlex.join(words)}: {explain(error).what}") from error
    elif words[0] == "make":
        for target in words[1:]:
            declared = re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert declared, f"the Makefile has no target {target}"


@functools.cache
def preload() -> None:
    """What most commands import, which takes longer than what they do; a fork has it already."""
    load_backbone("nano")
    for module in ("weft.training", "weft.generation", "weft.data.build", "weft.adapters.inspection"):
        importlib.import_module(module)


def run_command(words: list[str], folder: Path) -> tuple[int, str]:
    """Exit status and output of `weft` in a process that is forked, not started."""
    preload()
    with tempfile.TemporaryFile() as said:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                for stream in (1, 2):
                    os.dup2(said.fileno(), stream)
                sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
                os.chdir(folder)
                os.environ["COLUMNS"] = "100"
                main(words)
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        said.seek(0)
        return status, said.read().decode(errors="replace")


def check_page(text: str, folder: Path) -> int:
    """Run a page's examples in `folder`, python in one namespace; how many blocks there were."""
    namespace: dict[str, object] = {}
    count = 0
    for language, code, line, is_run in blocks(text):
        count += 1
        if language == "python":
            compiled = compile(code, f"line {line}", "exec")
            if is_run:
                exec(compiled, namespace)
            continue
        for words in commands(code):
            check_spelling(words)
            if is_run and words[0] == "weft":
                code, said = run_command(words[1:], folder)
                assert code == 0, f"line {line}: {shlex.join(words)}\n{said}"
            elif is_run and words[0] != "make":  # what make does is run by the checks themselves
                raise AssertionError(f"line {line}: {words[0]} is not run here; say why with <!-- not run: ... -->")
    return count


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_of_a_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_page(page.read_text(), tmp_path)


def test_the_readme_has_examples():
    assert len(list(blocks((ROOT / "README.md").read_text()))) >= 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "page",
    [
        "```python\nraise ValueError\n```",
        "```bash\nweft bake\n```",
        "```bash\nweft doctor --jsn\n```",
        "```bash\nmake cake\n```",
        "```bash\nrm -rf x\n```",
        "<!-- not run: -->\n\n```bash\nrm x\n```",
        "<!-- not run: takes long -->\n\n```bash\nweft generate tiny hello --sed 1\n```",
        "<!-- not run: takes long -->\n\n```python\nx = (\n```",
        "```bash\nweft generate nano hello --image absent.png\n```",
    ],
)
def test_a_wrong_example_is_noticed(page, tmp_path):
    with pytest.raises((AssertionError, ValueError, SyntaxError)):
        check_page(page, tmp_path)


def test_a_note_excuses_a_block(tmp_path):
    page = "<!-- not run: takes hours -->\n\n```bash\ngit clone x\nweft generate tiny hello \\\n  --seed 1\n```"
    assert check_page(page, tmp_path) == 1
