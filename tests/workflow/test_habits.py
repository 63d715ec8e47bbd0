"""How people start the workflow: from other folders, with nested `--config`, with paths and networks of their own."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from paretoprune.networks.architectures import Architecture
from paretoprune.networks.names import broken_architecture, torchvision_names
from paretoprune.workflow.configuration import ConfigurationError, check_configuration, merge
from paretoprune.workflow.resolving import resolved
from paretoprune.workflow.schema import configuration_schema
from paretoprune.workflow.trial import unbuildable_networks
from torchvision import models

ROOT = Path(__file__).parents[2]
SCHEMA = configuration_schema()
DEFAULT = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))


def configured(override: Mapping[str, Any]) -> dict[str, Any]:
    return resolved(merge(DEFAULT, override), SCHEMA)


# Types


def test_what_has_its_types_stays_as_it_is() -> None:
    assert configured({}) == DEFAULT
    assert repr(configured({})) == repr(DEFAULT)


# As Snakemake hands them over: text at the leaves.
@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ({"search": {"evaluations": "300"}}, {"search": {"evaluations": 300}}),
        ({"seeds": ["0", "1", "2"]}, {"seeds": [0, 1, 2]}),
        ({"seeds": "[0, 1]"}, {"seeds": [0, 1]}),
        ({"seeds": [1.0, "2.0"]}, {"seeds": [1, 2]}),
        ({"datasets": {"digits": {"search": "1e2"}}}, {"datasets": {"digits": {"search": 100}}}),
        ({"datasets": {"digits": {"search": 100.0}}}, {"datasets": {"digits": {"search": 100}}}),
        ({"networks": {"resnet8": {"checkpoint": "null"}}}, {}),
        ({"search": {"evaluations": "1e3"}}, {"search": {"evaluations": 1000}}),
        ({"training": {"learning_rate": "1e-3", "epochs": "4"}}, {"training": {"learning_rate": 1e-3, "epochs": 4}}),
        ({"inputs_needed": "false"}, {"inputs_needed": False}),
        ({"search": {"sequential_refit": "True"}}, {"search": {"sequential_refit": True}}),
        ({"search": {"front_size": "null"}}, {"search": {"front_size": None}}),
        ({"search": {"batch_size": "auto"}}, {"search": {"batch_size": "auto"}}),
        ({"search": {"batch_size": "64"}}, {"search": {"batch_size": 64}}),
        ({"search": "{evaluations: 300, phase1: {}}"}, {"search": {"evaluations": 300, "phase1": {}}}),
        ({"datasets": {"digits": {"test": "0.2"}}}, {"datasets": {"digits": {"test": 0.2}}}),
        ({"method_settings": {"lamp": {"evaluations": "70"}}}, {"method_settings": {"lamp": {"evaluations": 70}}}),
        ({"runs": [{"dataset": "digits", "network": "resnet8", "seeds": ["4"]}]},
         {"runs": [{"dataset": "digits", "network": "resnet8", "seeds": [4]}]}),
        ({"networks": {"1": DEFAULT["networks"]["resnet8"]}}, {"networks": {"1": DEFAULT["networks"]["resnet8"]}}),
        ({"networks": {"resnet8": {"arguments": {"base_width": "8", "p": "5e-1", "on": "True", "kind": "1_0"}}}},
         {"networks": {"resnet8": {"arguments": {"base_width": 8, "p": 0.5, "on": True, "kind": "1_0"}}}}),
    ],
)  # fmt: skip
def test_texts_get_the_types_that_are_meant(override: dict[str, Any], meant: dict[str, Any]) -> None:
    found, expected = configured(override), merge(DEFAULT, meant)
    if isinstance(override.get("search"), str):
        # A text in the place of a group takes all of it, as YAML would.
        expected = {**DEFAULT, **meant}
    assert found == expected
    assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"search": {"evaluations": "many"}}, r"search\.evaluations: 'many' is not of type 'integer'"),
        ({"search": {"evaluations": "1.5"}}, r"search\.evaluations: 1\.5 is not of type 'integer'"),
        ({"search": {"population": "2"}}, r"search\.population: 2 is less than the minimum of 4"),
        ({"seeds": ["zero"]}, r"seeds\.0: 'zero' is not of type 'integer'"),
        ({"inputs_needed": "perhaps"}, r"inputs_needed: 'perhaps' is not of type 'boolean'"),
        ({"results_directory": "results/{dataset}"}, r"results_directory: braces are wildcards .*without them"),
        ({"data_directory": "a}b"}, r"data_directory: braces are wildcards"),
        (
            {"results_directory": "~nobody-of-this-name/x"},
            r"results_directory: no such user or variable is known, found '~nob",
        ),
        ({"data_directory": "$NO_SUCH_PLACE/x"}, r"data_directory: no such user or variable .*write the path out"),
        ({"training": {"learning_rate": "nan"}}, r"training\.learning_rate: expected a finite number, found nan"),
        ({"training": {"learning_rate": ".inf"}}, r"training\.learning_rate: expected a finite number, found inf"),
        (
            {"networks": {"resnet8": {"architecture": "./nets/my.py:make"}}},
            r"function, found .*; write it as nets\.my:make",
        ),
        ({"networks": {"resnet8": {"architecture": "nets/my:make"}}}, r"write it as nets\.my:make"),
        (
            {"networks": {"resnet8": {"checkpoint": "https://x.org/y.pt"}}},
            r"checkpoint: .*; download it, and give the file",
        ),
        (
            {"networks": {"resnet8": {"checkpoint": "gone.pt"}}},
            r"found nothing that is a file; correct it or `data_direct",
        ),
        ({"networks": {"resnet8": {"architecture": "resnet9"}}}, r"networks\.resnet8\.architecture: .*mean 'resnet8'"),
        ({"networks": {"resnet8": {"architecture": "nowhere.nets:make"}}}, r"found no module 'nowhere\.nets'"),
    ],
)
def test_what_cannot_be_meant_is_answered_by_name(override: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        check_configuration(configured(override), SCHEMA)
    assert "has 1 problem(s)" in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("results/", "results"),
        ("./results", "results"),
        ("a//b/", "a/b"),
        ("~/results", "/home/me/results"),
        ("$HOME/results", "/home/me/results"),
        ("${HOME}/results", "/home/me/results"),
        ("/there/results", "/there/results"),
        ("my results/ä", "my results/ä"),
        ("../results", "../results"),
    ],
)
@pytest.mark.parametrize("key", ["results_directory", "data_directory"])
def test_folders_have_one_name(key: str, typed: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert configured({key: typed})[key] == meant


# Networks


def test_known_names_are_those_that_can_be_built() -> None:
    assert torchvision_names() == frozenset(models.list_models(module=models))
    for name in ("resnet20", "resnet18", "torchvision:resnet50", "mobilenet_v3_small"):
        assert broken_architecture(name, {}) is None
    assert broken_architecture("resnet20", {"base_width": 4}) is None
    assert "has no argument width" in (broken_architecture("resnet20", {"width": 4}) or "")


FACTORIES = """
import torchvision.models
from functools import partial
from torch import nn
from torchvision.models import resnet18 as imported

SIZE = 3
part = partial(nn.Linear, 3)
alias = imported

class Net(nn.Module):
    def __init__(self, num_classes, width): ...

def plain(): return nn.Linear(64, 10)
def told(num_classes, in_channels=3): return nn.Linear(64, num_classes)
def wide(num_classes, width): return nn.Linear(width, num_classes)
def named(*, width): return nn.Linear(width, 10)
def anything(**arguments): return nn.Linear(64, 10)
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text(FACTORIES)
    (tmp_path / "inside" / "deep").mkdir(parents=True)
    (tmp_path / "inside" / "deep" / "nets.py").write_text("def make(): ...")
    (tmp_path / "torn.py").write_text("def make(:")
    (tmp_path / "guarded.py").write_text("if True:\n    def make(): ...")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("my_nets:plain", {}, None),
        ("my_nets:told", {"in_channels": 1}, None),
        ("my_nets:wide", {"width": 3}, None),
        ("my_nets:named", {"width": 3}, None),
        ("my_nets:anything", {"what": 3}, None),
        ("my_nets:part", {}, None),
        ("my_nets:alias", {}, None),
        ("my_nets:imported", {}, None),
        ("my_nets:Net", {"width": 3}, None),
        ("inside.deep.nets:make", {}, None),
        ("guarded:make", {}, None),
        ("torchvision.models.resnet:resnet18", {}, None),
        ("my_nets:wide", {}, "'my_nets:wide' needs width; give them in `arguments`"),
        ("my_nets:named", {}, "'my_nets:named' needs width"),
        ("my_nets:plain", {"depth": 3}, "'my_nets:plain' has no argument depth; it has none"),
        ("my_nets:told", {"witdh": 3}, "has no argument witdh; it has num_classes, in_channels; correct `arguments`"),
        ("my_nets:plian", {}, "found no 'plian' in '.*my_nets.py'; did you mean 'plain'"),
        ("my_nets:SIZE", {}, "expected a function or class at 'my_nets:SIZE', found a plain value"),
        ("my_nest:plain", {}, "found no module 'my_nest'; it must be importable from the folder"),
        ("torn:make", {}, r"'.*torn\.py' is no Python: .* in line 1"),
    ],
)
def test_factories_are_looked_at_before_anything_starts(
    name: str, arguments: dict[str, Any], problem: str | None
) -> None:
    found = broken_architecture(name, arguments)
    if problem is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(problem, found), found


@pytest.mark.usefixtures("factories")
def test_what_is_passed_over_can_be_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, arguments in (("my_nets:plain", {}), ("my_nets:wide", {"width": 3}), ("my_nets:alias", {})):
        assert Architecture(name, 10, 3, arguments).build() is not None
    with pytest.raises(ValueError, match="cannot be built"):
        Architecture("my_nets:wide", 10, 3, {}).build()


# What can only be told by building them.
BUILT = """
import torch
from torch import nn
print("said while importing")
def nothing(num_classes): nn.Linear(64, num_classes)
def words(): return ["no", "network"]
def two(): return nn.Linear(64, 10), nn.Linear(64, 10)
def weights(): return nn.Linear(64, 10).state_dict()
def raises(in_channels):
    if in_channels != 3: raise RuntimeError("colour only")
    return nn.Linear(64, 10)
def cls(): return nn.Linear
def good(num_classes, in_channels):
    print("said while building")
    return nn.Linear(64 * in_channels, num_classes)
"""


def with_networks(source: str, **networks: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
    digits = {**DEFAULT["datasets"]["digits"], "source": source}
    return configured(
        {
            "datasets": {"digits": digits},
            "networks": {
                name: {**DEFAULT["networks"]["resnet8"], "architecture": architecture, "arguments": dict(arguments)}
                for name, (architecture, arguments) in networks.items()
            },
            "runs": [{"dataset": "digits", "network": name} for name in networks],
        }
    )


def test_what_factories_return_is_known_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "built.py").write_text(BUILT)
    monkeypatch.chdir(tmp_path)
    names = ("nothing", "words", "two", "weights", "raises", "cls", "good")
    networks: dict[str, tuple[str, dict[str, Any]]] = {name: (f"built:{name}", {}) for name in names} | {
        "plain": ("resnet8", {}),
        "typo": ("torchvision:resnet18", {"width_pergroup": 3}),
        "fine": ("torchvision:resnet18", {"zero_init_residual": True}),
    }
    lines = list(unbuildable_networks(with_networks("digits", **networks)))
    found = {line.partition(": ")[0]: line for line in lines}
    assert set(found) == {
        f"networks.{name}.architecture" for name in ("nothing", "words", "two", "weights", "raises", "cls", "typo")
    }
    for name, kind in (("nothing", "NoneType"), ("words", "list"), ("two", "tuple"), ("weights", "OrderedDict")):
        assert f"'built:{name}' returned {kind}, expected a torch.nn.Module" in found[f"networks.{name}.architecture"]
    assert "RuntimeError: colour only" in found["networks.raises.architecture"]
    assert "width_pergroup" in found["networks.typo.architecture"]
    # Numbers of classes and channels that only the images tell are guessed, and what they lead to is left to the step.
    assert not list(unbuildable_networks(with_networks("npz", raises=("built:raises", {}))))


def test_nothing_is_built_where_nothing_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "built.py").write_text(BUILT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    assert not list(unbuildable_networks(with_networks("digits", plain=("resnet8", {"base_width": 4}))))
    assert not list(unbuildable_networks(with_networks("digits", plain=("torchvision:resnet18", {}))))
    cached = {**with_networks("digits", words=("built:words", {})), "inputs_needed": False}
    assert not list(unbuildable_networks(cached))


# Starts


def dry_run(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--cores", "1", *arguments]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ, check=False)
    return f"{run.stdout}{run.stderr}\nexit {run.returncode}"


@pytest.mark.workflow
def test_the_workflow_starts_from_another_folder(tmp_path: Path) -> None:
    here = tmp_path / "my folder"
    here.mkdir()
    said = dry_run(
        here, "-s", str(ROOT / "Snakefile"), "--config", "seeds=[5,6]", "search={evaluations: 300}",
        "results_directory=Ergebnisse ä/",
    )  # fmt: skip
    assert said.endswith("exit 0")
    assert "Ergebnisse ä/digits/resnet8/seed5/dense/model.safetensors" in said
    assert "seed6" in said
    assert "seed0" not in said
    # What lies in the working folder is laid over the shipped configuration.
    (here / "config.yaml").write_text("seeds: [7]\ntraining: {learning_rate: 1e-2}\n")
    said = dry_run(tmp_path, "-s", str(ROOT / "Snakefile"), "--directory", str(here))
    assert said.endswith("exit 0")
    assert "results/digits/resnet8/seed7/dense/model.safetensors" in said
    assert "seed0" not in said


@pytest.mark.workflow
def test_mistakes_are_named_before_anything_starts(tmp_path: Path) -> None:
    shutil.copy2(ROOT / "config.yaml", tmp_path / "config.yaml")
    said = dry_run(
        tmp_path, "-s", str(ROOT / "Snakefile"), "--config", "results_directory=r{x}", "seeds=[0]",
        "networks={resnet8: {architecture: 'my_nets:make'}}",
    )  # fmt: skip
    assert said.endswith("exit 1")
    assert "has 2 problem(s)" in said
    assert "results_directory: braces are wildcards to Snakemake, found 'r{x}'" in said
    assert "networks.resnet8.architecture: expected a factory at 'my_nets:make'" in said
    assert "Traceback" not in said
