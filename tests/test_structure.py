"""The promises about the package's own source: rooms, directions, names."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ptuning

PACKAGE = Path(ptuning.__file__).parent
README = PACKAGE.parent.parent / "README.md"
ROOMS = [
    "errors",
    "threads",
    "formats",
    "places",
    "storage",
    "devices",
    "distributed",
    "data",
    "reporting",
    "backbone",
    "fetch",
    "prompts",
    "rendering",
    "forward",
    "training",
    "inference",
    "experiments",
    "peft_compat",
    "serving",
    "cli",
    "__main__",
]
"""The folders, and the modules beside them: each imports only what stands above it."""
FLOORS = 12
"""Rooms that stand on one another at the most."""


def _modules() -> dict[str, Path]:
    paths = [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"]
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in paths}


def _imports(name: str, path: Path) -> list[tuple[str, int]]:
    """Absolute names of all that a module imports, wherever in it the import stands."""
    found = []
    package = ["ptuning", *name.split(".")[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found.append((origin, node.lineno))
            found += [(f"{origin}.{alias.name}", node.lineno) for alias in node.names]
    return found


def _own_imports() -> dict[str, set[str]]:
    """Module -> the modules of this package that it imports."""
    modules = _modules()
    return {
        name: {
            inner
            for imported, _ in _imports(name, path)
            if (inner := imported.removeprefix("ptuning.")) in modules and inner != name
        }
        for name, path in modules.items()
    }


def test_a_room_imports_only_rooms_above_it() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in _own_imports().items()
        for other in others
        if ROOMS.index(other.split(".")[0]) > ROOMS.index(name.split(".")[0])
    ]
    assert wrong == []


def test_nothing_imports_in_a_circle() -> None:
    left = _own_imports()
    while free := [name for name, others in left.items() if not others & set(left)]:
        for name in free:
            del left[name]
    assert left == {}


def test_the_rooms_stand_on_few_floors() -> None:
    below: dict[str, set[str]] = {room: set() for room in ROOMS}
    for name, path in _modules().items():
        named = {imported.removeprefix("ptuning.") for imported, _ in _imports(name, path)}
        below[name.split(".")[0]] |= {other.split(".")[0] for other in named} & set(ROOMS)
    floor: dict[str, int] = {}
    for room in ROOMS:
        floor[room] = 1 + max((floor[other] for other in below[room] - {room}), default=0)
    assert max(floor.values()) <= FLOORS, floor


def test_no_module_imports_peft() -> None:
    for name, path in _modules().items():
        roots = {imported.split(".")[0] for imported, _ in _imports(name, path)}
        assert "peft" not in roots, name


def test_the_readme_tree_equals_the_files() -> None:
    (tree,) = re.findall(r"```text\nsrc/ptuning/\n(.*?)```", README.read_text(), re.DOTALL)
    folders: list[str] = []
    named = set()
    for line in tree.splitlines():
        if not line.startswith("    "):  # tests, benchmarks, docs
            break
        indent = (len(line) - len(line.lstrip())) // 4
        entry = line.split()[0]
        folders = folders[: indent - 1]
        if entry.endswith("/"):
            folders.append(entry.rstrip("/"))
        else:
            named.add(".".join([*folders, entry.removesuffix(".py")]))
    assert named == set(_modules())


def test_no_folder_bears_the_name_of_a_public_function() -> None:
    folders = {path.parent.name for path in PACKAGE.rglob("__init__.py")}
    assert not folders & set(ptuning.__all__)


@pytest.mark.parametrize("room", ["prompts/template.py", "rendering/layout.py"])
def test_templates_know_no_model(room: str) -> None:
    name = room.removesuffix(".py").replace("/", ".")
    roots = {imported.split(".")[0] for imported, _ in _imports(name, PACKAGE / room)}
    assert not roots & {"torch", "transformers", "accelerate"}


def test_importing_the_package_loads_no_torch() -> None:
    script = "import sys, ptuning, ptuning.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def _private_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Names with one underscore in front that a module reads off an object, however it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.args[1] if len(node.args) > 1 else None
            by_name = node.func.id in ("getattr", "hasattr", "setattr")
            if by_name and isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value, node.lineno


def _own_names(tree: ast.Module) -> Iterator[str]:
    """Names that a module gives to something of its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
            yield from [node.attr] * isinstance(node.ctx, ast.Store)
        elif isinstance(node, ast.alias):
            yield node.asname or node.name


def test_private_names_of_other_packages_stand_in_upstream_alone() -> None:
    trees = {name: ast.parse(path.read_text()) for name, path in _modules().items()}
    own = {name for tree in trees.values() for name in _own_names(tree)}
    own |= {"_replace", "_asdict", "_fields", "_exit"}  # of named tuples and os: public
    foreign = [
        f"{module}:{line} {name}"
        for module, tree in trees.items()
        for name, line in _private_names(tree)
        if re.match(r"_[a-zA-Z]", name) and name not in own and module != "backbone.upstream"
    ]
    assert foreign == []


def test_callers_know_no_fast_path() -> None:
    open_to_all = {"engine", "scoring", "plain", "together", "label_scores"}
    open_to_all |= {"graphs", "static_shapes"}  # what captured parts of a training are made of, too
    wrong = [
        f"{name} imports {other}"
        for name, others in _own_imports().items()
        for other in others
        if other.startswith("forward.")
        and not name.startswith("forward.")
        and other.removeprefix("forward.") not in open_to_all
    ]
    assert wrong == []


def test_a_long_module_says_why() -> None:
    for name, path in _modules().items():
        text = path.read_text()
        if len(text.splitlines()) > 400:
            assert "over 400 lines" in (ast.get_docstring(ast.parse(text)) or ""), name


def test_all_public_names_can_be_imported() -> None:
    for name in ptuning.__all__:
        value = getattr(ptuning, name)
        assert callable(value), f"{name} is a {type(value).__name__}"
    with pytest.raises(AttributeError, match="no_such_name"):
        ptuning.no_such_name  # noqa: B018


def _classes_in(hint: Any) -> Iterator[type]:
    """The classes that a type hint names, however deep."""
    if isinstance(hint, type):
        yield hint
    for inner in hint if isinstance(hint, list) else typing.get_args(hint):
        yield from _classes_in(inner)


def test_every_type_in_a_public_signature_is_public() -> None:
    public = {getattr(ptuning, name) for name in ptuning.__all__}
    hidden = {
        found.__qualname__
        for thing in public
        for function in [thing, *vars(thing).values()]
        if inspect.isfunction(function) and not function.__name__.startswith("_")
        for hint in typing.get_type_hints(function).values()
        for found in _classes_in(hint)
        if found.__module__.startswith("ptuning.") and found not in public
    }
    assert hidden == set()


def test_importing_submodules_leaves_functions_callable() -> None:
    import ptuning.inference.attachment
    import ptuning.training.train

    assert callable(ptuning.train) and callable(ptuning.attach)


def test_paths_of_the_documentation_go_on_working() -> None:
    from ptuning.backbone import fetched
    from ptuning.fetch import fetch

    assert fetch is fetched.fetch
