"""The pages for readers: their links, the paths that they name, the drawing of the rooms, and the README's example."""

import ast
import re
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from list_modules import LISTED, listing
from small_networks import digits, trained
from test_rooms import FLOOR, PACKAGE

from docs import draw_rooms, survey_channels

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "experiments" / "README.md",
]
MOST_WORDS = 1200
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return CODE.sub("", page.read_text(encoding="utf-8"))


@lru_cache
def anchors(page: Path) -> frozenset[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings)


def test_every_page_is_there() -> None:
    assert {
        "README.md",
        "CONTRIBUTING.md",
        "docs/results.md",
        "docs/method.md",
        "docs/outputs.md",
        "docs/limits.md",
        "docs/data.md",
        "docs/glossary.md",
        "docs/architecture.md",
        "benchmarks/README.md",
        "experiments/README.md",
    } <= {name_of(page) for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_images_point_at_what_is_there(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    missing = []
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert not missing, f"{name_of(page)} links to what is not there: {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_readme_leads_to_every_page(page: Path) -> None:
    assert page == README or f"({name_of(page)})" in prose(README)


def test_the_readme_can_be_read_in_five_minutes() -> None:
    n_words = len(README.read_text(encoding="utf-8").split())
    assert n_words <= MOST_WORDS, f"expected at most {MOST_WORDS} words, found {n_words}; move text to docs/"


def named_paths(page: Path) -> set[str]:
    """Paths of files between backticks, those with a placeholder left out."""
    found = re.findall(r"`([\w./-]+)`", prose(page))
    return {name for name in found if re.search(r"/\w|\.(py|yaml|md|toml|svg)$", name)}


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_that_a_page_names_exist(name: str) -> None:
    """From the root, or from the package."""
    paths = named_paths(ROOT / name)
    assert len(paths) > 5
    missing = {path for path in paths if not any((start / path).exists() for start in (ROOT, PACKAGE))}
    # Files of every room.
    missing -= {"__init__.py", "utils.py", "verb_noun.py"}
    assert not missing, f"{name} names files that do not exist: {', '.join(sorted(missing))}"


def test_the_table_of_rooms_is_complete() -> None:
    table = re.findall(r"^\| `(\w+)` \|", prose(ROOT / "docs" / "architecture.md"), re.MULTILINE)
    assert len(table) == len(set(table))
    assert set(table) == set(FLOOR)
    floors = [FLOOR[room] for room in table]
    assert floors == sorted(floors), "expected the rooms from the ground up"


def drawn_imports(svg: Path) -> set[str]:
    groups = ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}g")
    return {name for group in groups if (name := group.get("id", "")).startswith(("room-", "import-"))}


def test_the_drawing_of_the_rooms_is_up_to_date() -> None:
    rooms = {f"room-{room}" for room in FLOOR}
    imports = {f"import-{room}-{imported}" for room, imported in draw_rooms.count_imports()}
    assert drawn_imports(draw_rooms.DRAWING) == rooms | imports, "the imports have changed; run `make rooms`"


def test_the_rooms_are_drawn_the_same_each_time(tmp_path: Path) -> None:
    draw_rooms.draw(tmp_path / "once.svg")
    draw_rooms.draw(tmp_path / "twice.svg")
    assert (tmp_path / "once.svg").read_bytes() == (tmp_path / "twice.svg").read_bytes()
    assert drawn_imports(tmp_path / "once.svg") == drawn_imports(draw_rooms.DRAWING)


def test_make_modules_would_write_the_list_as_it_is() -> None:
    assert listing() == LISTED.read_text(encoding="utf-8"), f"{LISTED.name} is not what `make modules` writes"


def readme_example() -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    return str(blocks[0])


def test_the_readme_s_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a small network, few images and few evaluations."""
    images, labels = digits()
    tree = ast.parse(readme_example())
    given = {"network": "network_given", "(images, labels)": "data_given"}
    replaced = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.value) == "...":
            replaced.append(ast.unparse(node.targets[0]))
            node.value = ast.copy_location(ast.Name(given[replaced[-1]], ast.Load()), node.value)
        if isinstance(node, ast.keyword) and node.arg == "evaluations":
            node.value = ast.copy_location(ast.Constant(56), node.value)
    assert replaced == list(given)
    names: dict[str, Any] = {"network_given": trained("residual"), "data_given": (images[:300], labels[:300])}
    monkeypatch.chdir(tmp_path)
    exec(compile(tree, "README.md", "exec"), names)
    assert re.search(r"\d% removed, error \d+\.\d%, hypervolume 0\.\d{3}", capsys.readouterr().out)
    state = torch.load(tmp_path / "pruned.pt")
    network = trained("residual")
    network.load_state_dict(state)
    removed = float((network.get_parameter("layer1.0.conv1.weight") == 0).float().mean())
    assert removed > 0


def test_the_table_of_networks_is_what_was_measured() -> None:
    page = survey_channels.PAGE.read_text(encoding="utf-8")
    shown = page.partition(survey_channels.BEGIN)[2].partition(survey_channels.END)[0]
    assert shown == survey_channels.table()
    assert shown.count("\n") > 20
