"""What the documents promise: links that lead somewhere, code that compiles, two languages that agree."""

import ast
import re
import stat
from importlib.util import module_from_spec, spec_from_file_location
from itertools import chain
from pathlib import Path

import pytest

from aios_model.families import FAMILIES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TOP_LEVEL = ("README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in chain(DOCS.rglob("*.md"), (ROOT / "packages").glob("*/README.md"), (ROOT / name for name in TOP_LEVEL))
)
TRANSLATED = sorted(path.relative_to(DOCS / "zh") for path in (DOCS / "zh").rglob("*.md"))


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("docs")])
def test_links_to_files_lead_somewhere(page: str) -> None:
    """MkDocs checks the site's own pages; this is for the files it does not see."""
    path = ROOT / page
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text_without_code(path))
    broken = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES)
def test_python_in_documents_compiles(page: str) -> None:
    for code in code_blocks(ROOT / page, "python"):
        if "--8<--" not in code:
            ast.parse(code)


@pytest.mark.parametrize("page", TRANSLATED, ids=str)
def test_a_translated_page_has_the_code_and_structure_of_the_english_one(page: Path) -> None:
    assert_same_structure(DOCS / "en" / page, DOCS / "zh" / page)


def test_the_chinese_readme_has_the_code_and_structure_of_the_english_one() -> None:
    assert_same_structure(ROOT / "README.md", ROOT / "README.zh.md")


def test_ci_runs_the_test_command_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    commands = [line.split("#")[0].strip() for line in code_blocks(ROOT / "README.md", "bash")[0].splitlines()]
    assert len(commands) == 2
    install, _, command = commands[1].partition(" && ")
    assert install == "pip install uv"
    assert f"exec {command}\n" in script.read_text(encoding="utf-8")
    assert script.stat().st_mode & stat.S_IXUSR


def test_every_decision_is_in_the_index_of_decisions() -> None:
    folder = DOCS / "en" / "decisions"
    index = (folder / "index.md").read_text(encoding="utf-8")
    names = sorted(path.name for path in folder.glob("0*.md"))
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))
    assert [name for name in names if f"({name})" not in index] == []


def test_every_supported_architecture_is_in_the_quick_start() -> None:
    text = (DOCS / "en" / "quick-start.md").read_text(encoding="utf-8")
    assert [name for family in FAMILIES for name in family.architectures if f"`{name}`" not in text] == []


def test_every_module_is_on_a_page_of_the_reference() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "en" / "reference").rglob("*.md"))
    documented = re.findall(r"^::: ([\w.]+)$", pages, flags=re.MULTILINE)
    modules = {
        ".".join(path.relative_to(source).with_suffix("").parts)
        for source in (ROOT / "packages").glob("*/src")
        for path in source.rglob("*.py")
        if path.stem not in ("__init__", "__main__", "cli")
    }
    assert modules - set(documented) == set(), "add them to the reference"
    assert len(documented) == len(set(documented))


def test_the_tables_of_options_are_those_of_the_commands() -> None:
    spec = spec_from_file_location("cli_tables", DOCS / "cli_tables.py")
    assert spec is not None
    assert spec.loader is not None
    cli_tables = module_from_spec(spec)
    spec.loader.exec_module(cli_tables)
    page = cli_tables.PAGE.read_text(encoding="utf-8")
    assert page == cli_tables.updated(page), "run: uv run python docs/cli_tables.py"


def assert_same_structure(english: Path, chinese: Path) -> None:
    """Same headings by level, same code but for comments, same rows of tables."""
    for shape in (heading_levels, table_rows, all_code):
        assert shape(chinese) == shape(english), f"{shape.__name__} of {chinese.name} and {english.name} differ"


def heading_levels(path: Path) -> list[int]:
    return [len(line) - len(line.lstrip("#")) for line in text_without_code(path).splitlines() if line.startswith("#")]


def table_rows(path: Path) -> int:
    return sum(line.startswith("|") for line in text_without_code(path).splitlines())


def all_code(path: Path) -> list[str]:
    """The lines of all code blocks, comments removed: those are translated."""
    lines = chain.from_iterable(block.splitlines() for block in code_blocks(path, r"\w*"))
    return [line for line in (re.sub(r"(^|\s+)#.*$", "", line) for line in lines) if line]


def code_blocks(path: Path, language: str) -> list[str]:
    """The contents of the fenced blocks in `language` (a regular expression), without common indentation."""
    pattern = rf"^( *)```{language}[^\n`]*\n(.*?)^\1```$"
    found = re.findall(pattern, path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return ["\n".join(line.removeprefix(indent) for line in code.splitlines()) for indent, code in found]


def text_without_code(path: Path) -> str:
    return re.sub(r"^( *)```.*?^\1```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
