"""Write the list of modules behind each step, tests/workflow/modules_of_steps.yaml: `make modules`."""

from pathlib import Path

import yaml
from paretoprune.workflow.reruns import import_closure

SCRIPTS = Path(__file__).parents[1] / "workflow" / "scripts"
LISTED = Path(__file__).with_name("workflow") / "modules_of_steps.yaml"
HEAD = (
    "# The modules of the package behind each step: editing one reruns the step and all that follow. "
    "Held by test_reruns.\n"
)


def listing() -> str:
    """The list as YAML, scripts by name."""
    modules = {
        script.stem: [path.relative_to(SCRIPTS / "paretoprune").as_posix() for path in import_closure(script, SCRIPTS)]
        for script in sorted(SCRIPTS.glob("*.py"))
    }
    return HEAD + yaml.safe_dump(modules, sort_keys=True, width=118, default_flow_style=None)


if __name__ == "__main__":
    LISTED.write_text(listing(), encoding="utf-8")
