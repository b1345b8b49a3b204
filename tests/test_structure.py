"""The promises about the package's own source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ptuning

PACKAGE = Path(ptuning.__file__).parent
README = PACKAGE.parent.parent / "README.md"
# A module imports only modules that stand above it.
ORDER = [
    "errors",
    "config",
    "encoder",
    "template",
    "task",
    "files",
    "peft_files",
    "model_card",
    "prompt_files",
    "inject",
    "placement",
    "base_model",
    "prompt",
    "vocabulary",
    "layout",
    "render",
    "collate",
    "attachment",
    "grouped_queries",
    "loss",
    "settings",
    "fast.output_head",
    "fast.label_words",
    "fast.chunked",
    "fast.packing",
    "fast.kept_cache",
    "fast.shared_head",
    "fast.prefix",
    "score",
    "population",
    "processes",
    "static_shapes",
    "graphs",
    "variants",
    "devices",
    "learner",
    "checkpoint",
    "progress",
    "loop",
    "training",
    "trainer",
    "prediction",
    "evaluation",
    "nearest",
    "models",
    "fetch",
    "data",
    "plot",
    "environment",
    "demo",
    "experiments.ledger",
    "experiments.lama_data",
    "experiments.lama_templates",
    "experiments.ranking",
    "experiments.lama",
    "experiments.superglue_tasks",
    "experiments.superglue_data",
    "experiments.superglue_metrics",
    "experiments.superglue",
    "peft_compat.names",
    "peft_compat.heads",
    "peft_compat.frame",
    "peft_compat.seats",
    "peft_compat.inputs",
    "peft_compat.outputs",
    "peft_compat.generation",
    "peft_compat.calls",
    "peft_compat.adapters",
    "peft_compat.saving",
    "peft_compat.stored",
    "peft_compat.surface",
    "peft_compat.model",
    "peft_compat.tasks",
    "peft_compat.auto",
    "cli.console",
    "cli.run_files",
    "cli.options",
    "cli.training_report",
    "cli.train",
    "cli.use",
    "cli.lama",
    "cli.superglue_task",
    "cli.superglue",
    "cli.run_demo",
    "cli.app",
    "__main__",
]


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


def test_every_module_has_its_place_in_the_order() -> None:
    assert sorted(_modules()) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_modules_above_it(name: str) -> None:
    for imported, line in _imports(name, _modules()[name]):
        inner = imported.removeprefix("ptuning.")
        if inner in ORDER:
            assert ORDER.index(inner) < ORDER.index(name), f"{name}:{line} imports {inner}"


@pytest.mark.parametrize("name", ORDER)
def test_no_module_imports_peft(name: str) -> None:
    roots = {imported.split(".")[0] for imported, _ in _imports(name, _modules()[name])}
    assert "peft" not in roots


def test_the_readme_tree_names_every_module() -> None:
    text = README.read_text()
    for name in ORDER:
        assert f"{name.split('.')[-1]}.py" in text, name


def test_all_public_names_can_be_imported() -> None:
    for name in ptuning.__all__:
        value = getattr(ptuning, name)
        assert callable(value), f"{name} is a {type(value).__name__}"
    with pytest.raises(AttributeError, match="no_such_name"):
        ptuning.no_such_name  # noqa: B018


def test_importing_submodules_leaves_functions_callable() -> None:
    import ptuning.attachment
    import ptuning.training

    assert callable(ptuning.train) and callable(ptuning.attach)
