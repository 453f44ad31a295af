"""Links, files, commands and config keys that the documents name exist."""

import ast
import importlib
import importlib.util
import pathlib
import re
import textwrap

import pytest

from vjepa_jax.config import defaults
from vjepa_jax.evals import settings

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "launch").glob("*.md"),
    ]
)
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
# Of a stream, a mask type, an evaluation or a grid that the user names.
NAMED = re.compile(r"(streams|masks|evals|grids)\.\w+")


def anchors(page: pathlib.Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_named_in_code_exist(page):
    folders = r"(?:vjepa_jax|configs|launch|benchmarks|tests|docs)"
    pattern = rf"(?<![\w/.]){folders}/[\w/]+\.(?:py|sh|md)\b"
    names = re.findall(pattern, page.read_text())
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_are_modules(page):
    names = set(re.findall(r"python -m (vjepa_jax[\w.]*)", page.read_text()))
    assert [name for name in names if importlib.util.find_spec(name) is None] == []


def imports_in(block: str) -> list[tuple[str, str]]:
    """Return (module, name) of what Python code imports from the package."""
    return [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("vjepa_jax")
        for alias in node.names
    ]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_code_imports_what_exists(page):
    blocks = re.findall(r"^ *```python\n(.*?)```", page.read_text(), re.DOTALL | re.M)
    for block in map(textwrap.dedent, blocks):
        if "import" not in block:
            continue  # lines of a larger file
        for module, name in imports_in(block):
            if not hasattr(importlib.import_module(module), name):
                importlib.import_module(f"{module}.{name}")


def known_keys() -> set[str]:
    """Return all keys of the configs of runs and of evaluations."""
    configs = [defaults.get_config(), defaults.stream(path="x")]
    configs += [make() for make in settings.DEFAULTS.values()]
    keys = set()
    for config in configs:
        for key in defaults.flatten(config.to_dict()):
            parts = key.split(".")
            keys |= {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
    return keys | set(defaults.stream(path="x").to_dict())


def general(key: str) -> str:
    """Return a key with the names that users choose replaced by `NAME`."""
    return NAMED.sub(r"\1.NAME", key)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_config_keys_exist(page):
    known = {general(key) for key in known_keys()}
    keys = set(re.findall(r"--config\.([\w.]+)=", page.read_text()))
    unknown = {key for key in keys if general(key) not in known}
    assert unknown - {"key"} == set()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {page for page in pages if f"({page})" not in index} == set()


def test_diagrams_are_what_their_script_draws(monkeypatch):
    folder = ROOT / "docs/pictures"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("diagrams", folder / "diagrams.py")
    diagrams = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(diagrams)
    for name, draw in diagrams.PICTURES.items():
        assert (folder / f"{name}.svg").read_text() == draw().render(), name
    rooms = {room for row in diagrams.ROOMS for room in row}
    package = ROOT / "vjepa_jax"
    assert rooms == {path.parent.name for path in package.glob("*/__init__.py")}
