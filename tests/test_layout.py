"""The layout of the project: imports run in one direction, and facts that stand in two files agree."""

import ast
import re
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

from runner import ROOT

FOLDERS = ("benchmarks", "bridges", "corpus", "harness", "hub", "layers", "scoring")
FILES = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))]


def place(path: Path) -> str:
    """A file at the top by its name, a file in a folder by the folder's."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The names that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_no_import_runs_in_a_circle():
    """A folder counts as one place."""
    places = {place(path) for path in FILES}
    graph = {name: set() for name in places}
    for path in FILES:
        graph[place(path)] |= (imported(path) & places) - {place(path)}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError for a circle
    assert order.index("harness") < order.index("train") < order.index("main")


def test_importing_the_table_of_corpora_needs_no_package():
    """getdata.sh runs before any is installed."""
    for name in ("corpora", "fetch", "__init__"):
        assert not imported(ROOT / "corpus" / f"{name}.py") & {"torch", "numpy", "tqdm", "torchnlp", "utils"}


def test_pyproject_has_the_requirements():
    """So that `uv run main.py` installs what `pip install -r requirements.txt` does."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    assert project["dependencies"] == [line for line in requirements if line and not line.startswith("#")]
    cuda = (ROOT / "requirements-cuda.txt").read_text().splitlines()
    cuda = [line.partition("#")[0].strip() for line in cuda]
    assert project["optional-dependencies"]["cuda"] == [line for line in cuda if line]


def test_every_page_and_file_that_the_pages_name_is_there():
    """Links of README and docs/, their headings too."""
    for page in [ROOT / "README.md", ROOT / "results" / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", page.read_text(encoding="utf-8")):
            file = page.parent / target if target else page
            assert file.exists(), (page.name, target)
            if heading:
                headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
                assert heading[1:] in slugs, (page.name, target, heading)
