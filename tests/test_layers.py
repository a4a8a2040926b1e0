"""Imports only fall: a module may import those below it in this list, never those above. Also what must not import torch."""

import ast
import subprocess
import sys
from pathlib import Path

import memcontrol

LAYERS = """errors saying estimate interrupt seeds files yaml_files explain config attempts database space spec artifacts data features tuners peft_tuners adapters families models extractors memory shards augment mitigate figures marks stopping copying rewards probe cost derive evidence train round_files ensemble bench scoring gallery run
prepare calibrate pareto executors worker local_executor ray_executor slurm_executor launch jobs predict gp points study replicates growth surrogate mirror sampling effects picking notes plots publish pictures comparing retraining auditing card exporting orchestrate watch guard serving display tables facts charts reporting propose demo api looking commands cli tiny""".split()
PACKAGE = Path(memcontrol.__file__).parent


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("memcontrol."):
            yield node.module.split(".")[1]


def test_every_module_has_its_layer_and_opens_with_what_it_owns():
    modules = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    assert set(modules) == set(LAYERS)
    for path in modules.values():
        assert ast.get_docstring(ast.parse(path.read_text())).startswith("Owns "), path


def test_imports_only_fall():
    for name in LAYERS:
        for other in imported(PACKAGE / f"{name}.py"):
            assert LAYERS.index(other) < LAYERS.index(name), f"{name} imports {other}"


def test_few_modules_import_optuna():
    users = {path.stem for path in PACKAGE.glob("*.py") for line in path.read_text().splitlines() if line.strip().startswith(("import optuna", "from optuna"))}
    assert users == {"study", "mirror", "artifacts", "publish", "serving"}


def test_the_orchestrating_process_needs_no_torch():
    code = "import sys, memcontrol.cli, memcontrol.orchestrate, memcontrol.retraining, memcontrol.display, memcontrol.picking; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_help_imports_next_to_nothing():
    code = "import sys; sys.argv=['memcontrol','--help']\ntry:\n from memcontrol.cli import main; main()\nexcept SystemExit: pass\nsys.exit(bool({'torch', 'numpy', 'optuna', 'yaml', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
