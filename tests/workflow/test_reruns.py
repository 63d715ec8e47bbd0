"""Import closures: on a small tree made for the purpose, and on the real scripts."""

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from paretoprune.workflow.reruns import import_closure

LISTED = Path(__file__).with_name("modules_of_steps.yaml")
SCRIPTS = Path(__file__).parents[2] / "workflow" / "scripts"


def write_tree(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def closure(root: Path, files: Mapping[str, str]) -> list[str]:
    """Files behind `script.py` as posix paths relative to the root."""
    write_tree(root, files)
    return [path.relative_to(root).as_posix() for path in import_closure(root / "script.py", root)]


def closure_of_script(name: str) -> list[Path]:
    return import_closure(SCRIPTS / f"{name}.py", SCRIPTS)


MODULES = {"pkg/__init__.py": "", "pkg/a.py": "", "pkg/b.py": "", "pkg/c.py": ""}


@pytest.mark.parametrize(
    "text",
    [
        "import pkg.a",
        "import pkg.a as short, sys",
        "from pkg import a",
        "from pkg.a import something",
        "from pkg.a import (\n    one,\n    two as other,\n)",
        "def late():\n    from pkg import a\n",
        "class Late:\n    def method(self):\n        import pkg.a\n",
        "if True:\n    import pkg.a\n",
        "try:\n    import pkg.a\nexcept ImportError:\n    pass\n",
    ],
)
def test_a_direct_import_is_found_wherever_it_stands(text: str, tmp_path: Path) -> None:
    assert closure(tmp_path, {**MODULES, "script.py": text}) == ["pkg/__init__.py", "pkg/a.py"]


def test_imports_are_followed_through_one_another(tmp_path: Path) -> None:
    files = {**MODULES, "script.py": "import pkg.a", "pkg/a.py": "from pkg import b", "pkg/b.py": "import pkg.c"}
    assert closure(tmp_path, files) == ["pkg/__init__.py", "pkg/a.py", "pkg/b.py", "pkg/c.py"]


def test_a_package_brings_its_init_and_what_that_imports(tmp_path: Path) -> None:
    files = {**MODULES, "script.py": "import pkg.a", "pkg/__init__.py": "from pkg.b import name"}
    assert closure(tmp_path, files) == ["pkg/__init__.py", "pkg/a.py", "pkg/b.py"]


def test_every_package_on_the_way_is_executed(tmp_path: Path) -> None:
    files = {**MODULES, "script.py": "import pkg.deep.d", "pkg/deep/__init__.py": "", "pkg/deep/d.py": ""}
    assert closure(tmp_path, files) == ["pkg/__init__.py", "pkg/deep/__init__.py", "pkg/deep/d.py"]


def test_cycles_end(tmp_path: Path) -> None:
    files = {**MODULES, "script.py": "import pkg.a", "pkg/a.py": "import pkg.b", "pkg/b.py": "import pkg.a, script"}
    assert closure(tmp_path, files) == ["pkg/__init__.py", "pkg/a.py", "pkg/b.py"]


@pytest.mark.parametrize("test", ["TYPE_CHECKING", "typing.TYPE_CHECKING"])
def test_imports_for_the_type_checker_alone_are_ignored(test: str, tmp_path: Path) -> None:
    files = {**MODULES, "script.py": f"if {test}:\n    import pkg.a\n    from pkg import b\nimport pkg.c"}
    assert closure(tmp_path, files) == ["pkg/__init__.py", "pkg/c.py"]


@pytest.mark.parametrize(
    "text",
    [
        "if TYPE_CHECKING:\n    import pkg.b\nelse:\n    import pkg.a\n",
        "if not TYPE_CHECKING:\n    import pkg.a\n",
    ],
)
def test_imports_that_run_beside_a_check_for_types_are_found(text: str, tmp_path: Path) -> None:
    assert closure(tmp_path, {**MODULES, "script.py": text}) == ["pkg/__init__.py", "pkg/a.py"]


def test_relative_imports_are_not_taken_for_absolute_ones(tmp_path: Path) -> None:
    assert closure(tmp_path, {**MODULES, "script.py": "from .pkg import a\nfrom . import pkg"}) == []


def test_other_libraries_and_the_standard_library_do_not_count(tmp_path: Path) -> None:
    assert closure(tmp_path, {**MODULES, "script.py": "import os, numpy\nfrom json import dumps"}) == []


def test_a_file_that_cannot_be_parsed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SyntaxError):
        closure(tmp_path, {**MODULES, "script.py": "import pkg.a", "pkg/a.py": "def broken(:"})


def imported_when_loaded(file: Path) -> set[str]:
    """Top-level packages that importing a file imports: bodies of functions and type-checking blocks do not run."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        waiting += ast.iter_child_nodes(node)
    return found


def test_the_report_depends_on_no_module_that_imports_torch() -> None:
    files = closure_of_script("write_report")
    assert {"report.py", "run_plots.py", "files.py"} <= {file.name for file in files}
    # `Front.network` alone loads `shapes`, and that `attention`, which are made of torch's modules.
    needs_torch = [file.name for file in files if imported_when_loaded(file) & {"torch", "torchvision", "safetensors"}]
    assert needs_torch == ["attention.py", "shapes.py"]
    assert "shapes" not in {name for file in files for name in imported_when_loaded(file)}


def test_each_step_depends_on_the_modules_listed_for_it_and_no_others() -> None:
    """Editing a module reruns every step that it is listed for: hours, where one innocent import puts it there."""
    found = {
        script.stem: [path.relative_to(SCRIPTS / "paretoprune").as_posix() for path in closure_of_script(script.stem)]
        for script in sorted(SCRIPTS.glob("*.py"))
    }
    assert found == yaml.safe_load(LISTED.read_text(encoding="utf-8")), (
        f"a step depends on other modules than {LISTED.name} says; drop the import that is new or, where it is meant, "
        "change the list"
    )


@pytest.mark.parametrize(
    ("script", "does_without"),
    [
        ("read_images", {"networks", "importance", "repair", "evaluation", "search", "training", "reporting"}),
        ("split_images", {"networks", "importance", "repair", "evaluation", "search", "training", "reporting"}),
        ("prepare_dense_network", {"importance", "repair", "search", "reporting"}),
        ("collect_statistics", {"repair", "evaluation", "search", "training", "reporting"}),
        ("compute_importance", {"repair", "evaluation", "search", "training", "reporting"}),
        ("choose_anchors", {"importance", "repair", "evaluation", "training", "reporting"}),
        ("search_thresholds", {"training", "reporting"}),
        ("search_corridor", {"training", "reporting"}),
        ("search_flat", {"training", "reporting"}),
        ("sweep_allocation", {"training", "reporting"}),
        ("evaluate_front", {"importance", "repair", "search", "training", "reporting"}),
        ("finetune_members", {"importance", "repair", "search", "reporting"}),
        ("write_report", {"data", "networks", "importance", "repair", "evaluation", "search", "training"}),
    ],
)
def test_the_list_keeps_stages_apart(script: str, does_without: set[str]) -> None:
    assert not does_without & {file.parent.name for file in closure_of_script(script)}


def test_no_step_depends_on_the_interface_for_library_users() -> None:
    scripts = [file.stem for file in SCRIPTS.glob("*.py")]
    assert len(scripts) >= 12
    for script in scripts:
        names = {file.name for file in closure_of_script(script)}
        assert "__init__.py" in names, script
        assert "api.py" not in names, script
