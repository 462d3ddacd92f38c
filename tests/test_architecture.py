"""Each room knows what it may, and the package needs nothing undeclared."""

import ast
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest

import jaxlosses

PACKAGE = pathlib.Path(jaxlosses.__file__).parent


def dotted(path: pathlib.Path) -> str:
    """The name of a module inside the package; that of a folder for its `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and parts[1:] else parts)


MODULES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in MODULES.items()}
FOLDERS = {"_math", "_backends"}

# Lower layers know nothing of higher ones. `_checks` is open to everyone.
LAYERS = [
    {"_types"},
    {"_platform", "_math.pairs"},
    {"_elementary"},
    {"_math.classes", "_math.softcap"},
    {"_math.transform", "_math.ratios", "_math.picks", "_sharding"},
    {"_math.tails", "_math.teacher"},
    {"_math.statistics", "_math.divergence", "_math.sets", "_math.top_k"},
    {"_math.gradient", "_math.online", "_combine"},
    {"_rules", "_rows"},
    {"_options"},
    {f"_backends.{name}" for name in ("head", "blocks", "folds", "once", "strips")},
    {"_backends.chunks", "_backends.direct"},
    {"_backends.cpu"},
    {"_backends.examples"},
    {"_backends.choose", "_backends.plan", "_backends.tokens", "_backends.vocab"},
    {"_backends.logits", "_backends.recompute"},
    {"_teacher", "_top_k", "_softmax"},
    {"_logits"},
    {"_chunk"},
    {"_linear"},
    {
        "_cross_entropy",
        "_divergence",
        "_linear_divergence",
        "_linear_top_k_labels",
        "_top_k_labels",
        "_linear_cross_entropy",
        "_linear_loss",
        "_log_probs",
        "_planned",
    },
    {"testing", "_accuracy"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# What the modules of a room may import of the package; others may import all below.
KNOWS = {
    "_math": {"_math", "_elementary", "_types"},
    "_combine": {"_math"},
    "_rows": {"_math", "_combine", "_types", "_checks"},
    "_options": {"_math", "_combine", "_rows", "_sharding", "_types", "_checks"},
    "_rules": {"_math", "_sharding", "_platform", "_types"},
    "_backends": {
        *("_backends", "_rules", "_math", "_elementary"),
        *("_sharding", "_platform", "_types"),
    },
}
# What a trace can ask about the machine, asked in one room.
QUESTIONS = {"platform_dependent", "optimization_barrier", "default_backend"}
QUESTIONS |= {"devices", "device_count", "local_devices", "get_abstract_mesh"}
# What mathematics neither has nor makes: it is handed in.
MACHINERY = {"scan", "while_loop", "fori_loop", "cond", "map", "pcast", "shard_map"}
MACHINERY |= {"psum", "pmax", "pmin", "all_gather", "axis_index", "axis_size"}

RUNTIME = {"jax", "jaxlib", "numpy", "chex", "jaxtyping"}
# Compared with when it is there, and only then imported.
OPTIONAL = {"testing": {"optax"}, "_accuracy": {"optax"}}


class Import(NamedTuple):
    module: str  # as written, "" for the package itself
    names: tuple[str, ...]
    line: int
    lazy: bool


def imports(tree: ast.Module) -> Iterator[Import]:
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, (), node.lineno, id(node) in inside)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            names = tuple(alias.name for alias in node.names)
            yield Import(node.module or "", names, node.lineno, id(node) in inside)


def own_modules(found: Import) -> set[str]:
    """The modules of this package that an import names."""
    if found.module == "jaxlosses":
        # `import jaxlosses` and public names go through `__init__`.
        names = {name if name in MODULES else "__init__" for name in found.names}
        return names or {"__init__"}
    if not found.module.startswith("jaxlosses."):
        return set()
    module = found.module.removeprefix("jaxlosses.")
    if module in FOLDERS:
        return {f"{module}.{name}" for name in found.names}
    return {module}


def room(module: str) -> str:
    return module.split(".")[0]


def called(tree: ast.Module) -> set[str]:
    """Names of `jax` and `jax.lax` that a module uses, by attribute or import."""
    found = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in ("jax", "lax", "jax.lax", "jax.sharding")
    }
    return found.union(*(i.names for i in imports(tree) if room(i.module) == "jax"))


def test_every_module_has_its_place() -> None:
    assert set(MODULES) - {"__init__", "_checks", *FOLDERS} == set(LEVEL)


def test_one_room_asks_for_the_platform() -> None:
    asking = {name for name, tree in TREES.items() if called(tree) & QUESTIONS}
    # The report says where it ran; a message about an axis looks at the mesh.
    assert asking - {"__main__", "_checks"} == {"_platform"}


def test_the_mathematics_has_no_loop_no_barrier_and_no_collective() -> None:
    for name, tree in TREES.items():
        if room(name) == "_math":
            assert called(tree) & (QUESTIONS | MACHINERY) == set(), name


@pytest.mark.parametrize("name", [m for m in MODULES if room(m) in KNOWS])
def test_a_room_knows_what_it_may_and_no_more(name: str) -> None:
    others = set().union(*map(own_modules, imports(TREES[name])))
    assert set(map(room, others)) <= KNOWS[room(name)]


def test_statistics_have_one_reverse_and_one_forward_rule() -> None:
    registered = [
        (name, node.func.attr, ast.unparse(node.func.value))
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "defvjp"
    ]
    # Beside it: a matmul, and losses of more than the statistics: a sum that forms its
    # gradient in the forward pass, and one of each example.
    assert sorted(registered) == [
        ("_backends.head", "defvjp", "logits"),
        ("_backends.recompute", "defvjp", "of_each"),
        ("_backends.tokens", "defvjp", "summed"),
        ("_rules", "defvjp", "_reverse"),
    ]


def test_no_room_is_too_large_to_read() -> None:
    lines = {
        name: path.read_text("utf-8").count("\n") for name, path in MODULES.items()
    }
    assert max(n for name, n in lines.items() if name != "_checks") <= 400


@pytest.mark.parametrize(
    "name", [m for m in MODULES if m not in {"__init__"} | FOLDERS]
)
def test_imports_run_from_the_public_modules_to_the_statistics(name: str) -> None:
    for found in imports(TREES[name]):
        for other in own_modules(found):
            where = f"{name}.py, line {found.line}: imports {other}"
            if other == "_checks":
                assert name != "_checks", where
            elif other == "__init__":
                assert LEVEL.get(name, 0) >= LEVEL["testing"], where
            else:
                assert name in LEVEL, f"{where}, which is above it"
                assert LEVEL[other] <= LEVEL[name], f"{where}, which is above it"


def test_checks_know_no_other_module() -> None:
    assert set().union(*map(own_modules, imports(TREES["_checks"]))) == set()


def test_no_two_modules_import_each_other() -> None:
    arrows = {
        name: set().union(*map(own_modules, imports(tree))) - {"__init__"}
        for name, tree in TREES.items()
    }
    done: set[str] = set()
    while len(done) < len(arrows):
        ready = {n for n, to in arrows.items() if to <= done} - done
        assert ready, f"a cycle among {sorted(set(arrows) - done)}"
        done |= ready


def test_init_only_re_exports() -> None:
    body = TREES["__init__"].body
    docstring, *rest = body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(docstring.value, ast.Constant)
    for node in rest:
        if isinstance(node, ast.ImportFrom):
            # `X as X` is how type checkers see a public name.
            assert all(alias.asname == alias.name for alias in node.names)
            assert str(node.module).split(".")[0] == "jaxlosses"
        else:
            assert isinstance(node, ast.Assign), ast.unparse(node)
            assert [ast.unparse(t) for t in node.targets] == ["__version__"]


def test_public_names_of_the_package_are_the_re_exports() -> None:
    exported = {
        alias.name
        for node in TREES["__init__"].body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    visible = {name for name in vars(jaxlosses) if not name.startswith("_")}
    visible -= {"jaxtyping"}  # put there by the checker of annotations, in tests only
    assert visible == exported


@pytest.mark.parametrize("name", MODULES)
def test_runtime_imports_are_the_declared_dependencies(name: str) -> None:
    for found in imports(TREES[name]):
        root = found.module.split(".")[0]
        if root == "jaxlosses" or root in sys.stdlib_module_names or root in RUNTIME:
            continue
        where = f"{name}.py, line {found.line}: imports {root}"
        assert root in OPTIONAL.get(name, set()), where
        assert found.lazy, f"{where} outside of a function"


@pytest.mark.parametrize("name", MODULES)
def test_no_module_reaches_into_the_internals_of_jax(name: str) -> None:
    for found in imports(TREES[name]):
        parts = [*found.module.split("."), *found.names]
        if parts[0] in RUNTIME:
            private = [part for part in parts if part.startswith("_")]
            assert private == [], f"{name}.py, line {found.line}: {private}"


@pytest.mark.parametrize("name", MODULES)
def test_annotations_stay_objects_for_the_shape_checker(name: str) -> None:
    futures = [f for f in imports(TREES[name]) if f.module == "__future__"]
    assert futures == []


ABSOLUTE = re.compile(r"(?<![\w.:/~<])/(?:home|root|work|tmp|Users|mnt|opt|data)/\w")


def repository_texts() -> list[pathlib.Path]:
    root = PACKAGE.parent
    if not (root / "pyproject.toml").exists():
        return list(MODULES.values())
    folders = ["jaxlosses", "tests", "benchmarks", "notebooks", ".github", ".ci"]
    found = [p for folder in folders for p in (root / folder).rglob("*")]
    found += [root / name for name in ("README.md", "Makefile", "pyproject.toml")]
    texts = {".py", ".md", ".toml", ".yml", ".yaml", ".ipynb", ".json", ""}
    return [p for p in found if p.is_file() and p.suffix in texts]


def test_no_file_names_a_path_of_one_machine() -> None:
    this = pathlib.Path(__file__)
    lines = [
        f"{path.name}:{number}: {line.strip()[:80]}"
        for path in repository_texts()
        if path != this and "__pycache__" not in path.parts
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if ABSOLUTE.search(line)
    ]
    assert lines == []


def test_the_pattern_of_machine_paths_finds_one() -> None:
    assert ABSOLUTE.search('open("/home/someone/data.npz")')
    assert not ABSOLUTE.search("https://example.org/home/page")
