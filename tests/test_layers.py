"""The packages and their rule: a package imports only those named before it; study, search, view and
dashboard import nothing from reading to trial."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import memcontrol

PACKAGE = Path(memcontrol.__file__).parent
ORDER = (
    "core config reading data model training scoring trial execution study search view dashboard auditing "
    "recipes checks commands cli"
).split()
TORCH = {"reading", "data", "model", "training", "scoring", "trial"}
HEAD = {"study", "search", "view", "dashboard"}
MODULES = [path for name in ORDER for path in sorted((PACKAGE / name).glob("*.py"))]


def list_imports(path):
    """Of each import from memcontrol, the module and the name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("memcontrol."):
            yield from ((node.module, alias.name) for alias in node.names)
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.startswith("memcontrol."))


def find_package(module):
    return module.split(".")[1] if "." in module else None


def test_imports_only_fall_and_the_wings_do_not_meet():
    for path in MODULES:
        own = path.parent.name
        for module, name in list_imports(path):
            other = find_package(f"{module}.{name}")
            assert ORDER.index(other) <= ORDER.index(own), f"{path} imports {module}"
            assert not (own in HEAD and other in TORCH), f"{path} imports {module}"


def test_no_underscored_name_crosses_a_module():
    for path in MODULES:
        for module, name in list_imports(path):
            assert not name.startswith("_") or name == "__version__", f"{path} imports {name} from {module}"


def test_every_module_opens_with_what_it_owns_and_no_folder_is_crowded():
    for path in MODULES:
        assert re.match(r"Owns .*\w{2}", ast.get_docstring(ast.parse(path.read_text()))), path
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} == {*ORDER, "assets"}
    assert max(len(list((PACKAGE / name).glob("*.py"))) for name in ORDER) <= 20


def list_names(path):
    """What a module defines at its top level."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            names = (name for target in node.targets for name in ast.walk(target))
            yield from (name.id for name in names if isinstance(name, ast.Name))


def test_a_name_is_defined_in_one_module_and_none_ends_in_of():
    homes = {}
    for path in MODULES:
        for name in set(list_names(path)):
            assert homes.setdefault(name, path) == path, f"{name} in {homes[name]} and {path}"
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.FunctionDef) and node.name.endswith("_of")), (path, node.name)


def test_few_modules_import_optuna():
    users = {
        f"{path.parent.name}.{path.stem}"
        for path in MODULES
        for line in path.read_text().splitlines()
        if line.strip().startswith(("import optuna", "from optuna"))
    }
    assert users == {
        "study.opening",
        "study.store",
        "study.trials",
        "study.artifacts",
        "study.optuna_private",
        "search.optuna_samplers",
        "dashboard.server",
    }


def test_the_orchestrating_process_needs_no_torch():
    code = (
        "import sys, memcontrol.cli, memcontrol.search.orchestrator, memcontrol.commands.retrain, "
        "memcontrol.view.live, memcontrol.study.pick; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_imports_next_to_nothing():
    code = (
        "import sys; sys.argv=['memcontrol','--help']\ntry:\n from memcontrol.cli import main; "
        "main()\nexcept SystemExit: pass\nsys.exit(bool({'torch', 'numpy', 'optuna', 'yaml', "
        "'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
