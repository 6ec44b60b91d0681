"""The dependency order and the size budgets of the package, read from its syntax trees."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxrl_llm"

# What each part may import of ours, besides itself. A key is a module or package of jaxrl_llm.
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "arrays": {"types"},  # for the constants of routes alone
    "sharding": set(),
    "processes": {"sharding"},
    "lock": set(),
    "metrics": set(),
    "runlog": {"types"},
    "losses": {"arrays"},
    "model": {"arrays", "sharding"},
    "data": {"types", "arrays"},
    "learner": {"arrays", "lock", "losses", "model", "sharding"},
    "rollout": {"types"},
    "config": {
        "data",
        "evaluate",
        "learner",
        "losses",
        "model",
        "rollout",
        "runlog",
        "sharding",
        "types",
    },
}
LEVEL_4 = {
    "assembly",
    "checks",
    "engines",
    "export",
    "stored",
    "recovery",
    "loop",
    "collect",
    "evaluate",
    "report",
    "display",
    "bench",
    "compile",
    "first_order",
}
LEVEL_5 = {"main"}
# Its shape alone: they must not reach jax.
KNOWS_THE_MODEL = {"rollout.routes", "rollout.wire", "rollout.inspection", "rollout.sglang"}
LOCAL_ENGINE = {"rollout.local", "rollout.decode", "rollout.precision", "rollout.sampling"}
NO_JAX = {
    "types",
    "metrics",
    "lock",
    "runlog",
    "data.prompts",
    "data.rewards",
    "data.tasks",
    "data.tokenizer",
    "rollout.engine",
    "rollout.buffer",
    "rollout.routes",
    "rollout.wire",
    "rollout.journal",
    "rollout.sglang",
    "evaluate",
    "learner.watch",
    "report",
}


def modules() -> dict[str, Path]:
    """Dotted name below jaxrl_llm -> file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def imports(path: Path) -> set[str]:
    """Every absolute module name the file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    """Names below jaxrl_llm that the file imports."""
    return {n.removeprefix("jaxrl_llm.") for n in imports(path) if n.startswith("jaxrl_llm.")}


@pytest.mark.parametrize("name", modules())
def test_imports_go_one_way(name: str) -> None:
    part = name.split(".")[0]
    wanted = {other.split(".")[0] for other in ours(modules()[name])} - {part}
    if part in LEVEL_5:
        return
    if part in LEVEL_4:
        allowed = set(ALLOWED) | LEVEL_4
    elif name in KNOWS_THE_MODEL:
        allowed = ALLOWED["rollout"] | {"model"}
    elif name in LOCAL_ENGINE:
        allowed = ALLOWED["rollout"] | {"arrays", "model", "sharding"}
    else:
        allowed = ALLOWED[part]
    assert wanted <= allowed, f"{name} may not import {sorted(wanted - allowed)}"


@pytest.mark.parametrize("name", sorted(NO_JAX))
def test_host_modules_do_not_import_jax(name: str) -> None:
    """Directly or through others of ours; imports inside functions count too."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        module = todo.pop()
        if module in seen or module not in modules():
            continue
        seen.add(module)
        path = modules()[module]
        outside = {n.split(".")[0] for n in imports(path)}
        assert "jax" not in outside, f"{name} reaches jax through {module}"
        todo += ours(path)


def test_only_the_checkpoint_module_imports_orbax() -> None:
    users = [name for name, path in modules().items() if any("orbax" in i for i in imports(path))]
    assert users == ["learner.checkpoint"]


@pytest.mark.parametrize("name", modules())
def test_files_functions_and_configs_stay_within_budget(name: str) -> None:
    source = modules()[name].read_text()
    assert source.count("\n") <= 500, f"{name} has more than 500 lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            count = len([a for a in arguments if a.arg not in ("self", "cls")])
            assert lines <= 60, f"{name}.{node.name} has {lines} lines"
            assert count <= 7, f"{name}.{node.name} has {count} parameters"
            assert node.args.kwarg is None, f"{name}.{node.name} takes **{node.args.kwarg}"
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            assert len(fields) <= 12, f"{name}.{node.name} has {len(fields)} fields"


def test_the_six_files_of_the_method_stay_readable() -> None:
    """The reading order promised in the README: under 1,500 lines together."""
    root = PACKAGE.parent
    order = [root / "configs/quickstart.py"]
    order += [PACKAGE / f for f in ("loop.py", "losses/policy.py", "learner/step.py")]
    order += [PACKAGE / f for f in ("model/moe.py", "rollout/sglang.py")]
    assert sum(path.read_text().count("\n") for path in order) < 1500
