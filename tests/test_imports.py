"""Imports point one way: scripts -> lit_swa -> torch, and downwards within lit_swa, also those inside functions."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Config reads the tables of named shapes when it is asked for one, and they check what they read with its constants.
ALLOWED = {("lit_swa.config", "lit_swa.families")}


def imports(tree: ast.AST) -> Iterator[str]:
    """What a module imports at any depth, but for the types' sake."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            place = node.module or ""
            if node.level:  # relative imports stand in lit_swa's own files only, not in its folders
                place = f"lit_swa.{place}".rstrip(".")
            yield from (f"{place}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node)


def module_graph() -> dict[str, set[str]]:
    """Module of lit_swa -> those that it imports."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "lit_swa").rglob("*.py")
    }
    graph = {}
    for name, path in files.items():
        found = set(imports(ast.parse(path.read_text(encoding="utf-8"))))
        graph[name] = {n if n in files else n.rpartition(".")[0] for n in found if n.startswith("lit_swa.")}
    return graph


def test_no_module_imports_one_that_imports_it() -> None:
    """Catches: a circle between modules, such as one that is hidden by an import inside a function."""
    graph = module_graph()
    assert len(graph) > 30
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in graph.get(name, ()):
                if (name, other) not in ALLOWED:
                    visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_model_imports_its_config_and_positions_only() -> None:
    """Catches: a definition that needs more than the three files which README says can be copied."""
    graph = module_graph()
    assert graph["lit_swa.model"] == {"lit_swa.config", "lit_swa.rope"}
    assert graph["lit_swa.rope"] == {"lit_swa.config"} and graph["lit_swa.config"] == {"lit_swa.families"}
    assert graph["lit_swa.fast_attention"] == {"lit_swa.config", "lit_swa.rope"}


def test_no_script_imports_a_script_and_the_package_none() -> None:
    """Catches: code that is shared by scripts and belongs into the package."""
    scripts = [
        path for folder in ("generate", "finetune", "pretrain", "scripts") for path in (ROOT / folder).glob("*.py")
    ]
    names = {path.stem for path in scripts} | {"generate", "finetune", "pretrain", "scripts"}
    for path in (*scripts, *(ROOT / "lit_swa").rglob("*.py")):
        found = imports(ast.parse(path.read_text(encoding="utf-8")))
        found = {name.split(".")[0] for name in found if not (path in scripts and name.startswith("scripts.peers"))}
        assert not found & names, f"{path.name} imports {found & names}"  # peers: what benchmarks measure beside us


def test_what_is_imported_is_declared_and_pinned() -> None:
    """Catches: a package that is there by chance only, because another one needs it; a folder that is not shipped."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

    def names(lines: list[str]) -> set[str]:
        found = {re.split(r"[^\w.-]", line)[0].lower().replace("-", "_") for line in lines if line[:1].isalpha()}
        return found

    needed = names(project["project"]["dependencies"])
    declared = needed.union(*map(names, project["project"]["optional-dependencies"].values()))
    folders = ("lit_swa", "generate", "finetune", "pretrain", "scripts")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = {name.split(".")[0] for path in files for name in imports(ast.parse(path.read_text(encoding="utf-8")))}
    projects = {"PIL": "pillow", "yaml": "pyyaml", "cudnn": "nvidia_cudnn_frontend"}
    found = {projects.get(name, name) for name in found}
    own = {"lit_swa", "scripts", "config", "rope", "model"}  # the latter where files are copied without the package
    used_where_they_are_there = {"fla", "flash_attn", "triton", "xllamacpp"}
    assert found - set(sys.stdlib_module_names) - own - declared == used_where_they_are_there
    assert needed <= names((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
    shipped = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "lit_swa").rglob("__init__.py")}
    assert shipped == set(project["tool"]["setuptools"]["packages"])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Python {project['project']['requires-python'].removeprefix('>=')} " in readme
