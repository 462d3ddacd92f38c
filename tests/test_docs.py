"""What is written about the code is true: README, docstrings, signatures."""

import ast
import inspect
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import pytest

import jaxlosses as jl
from benchmarks import report

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/results/README.md",
    *(f"notebooks/{path.name}" for path in sorted((ROOT / "notebooks").glob("*.md"))),
]
WITHOUT_LINKS = [
    "CONTRIBUTING.md",
    "notebooks/api.md",
    "notebooks/mathematics.md",
    "notebooks/which_loss.md",
]
# With so many blocks at least.
WITH_CODE = {
    "README.md": 5,
    "notebooks/index.md": 2,
    "notebooks/questions.md": 2,
    "notebooks/which_loss.md": 7,
}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

SECTIONS = ["Args", "Returns", "Raises", "Differentiation", "Example", "Source"]
# What style.md asks of a function; one that returns nothing has no Returns.
HEADING = re.compile(rf"^({'|'.join([*SECTIONS, 'Attributes'])}):$", re.MULTILINE)


def page(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def public(module: Any) -> dict[str, Any]:
    return {
        f"{module.__name__}.{name}": value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        # What a module defines itself, or re-exports from this package.
        and str(getattr(value, "__module__", "")).startswith("jaxlosses")
    }


NAMES = public(jl) | (public(jl.testing) if hasattr(jl, "testing") else {})
FUNCTIONS = {n: f for n, f in NAMES.items() if inspect.isfunction(f)}
CLASSES = {n: c for n, c in NAMES.items() if inspect.isclass(c)}


def sections(text: str) -> dict[str, str]:
    """The text of each section; "" is what comes before the first."""
    parts = HEADING.split(text)
    return {"": parts[0]} | dict(zip(parts[1::2], parts[2::2], strict=True))


# One name or several, and whether another function is to be read for them, as in
# "`weights`, `reduction`: as in `softmax_cross_entropy`".
ENTRY = re.compile(
    r"^    (?P<names>\*{0,2}`?\w+`?(?:,\s+`?\w+`?)*(?:,?\s+and\s+`?\w+`?)?):"
    r"(?:\s+as\s+in\s+`(?P<other>[\w.]+)`)?",
    re.MULTILINE,
)


def entries(section: str) -> list[tuple[str, str]]:
    """Each argument that an Args section names, and the function to be read or ""."""
    return [
        (name, entry["other"] or "")
        for entry in ENTRY.finditer(section)
        for name in re.findall(r"\w+", re.sub(r"\s+and\s+", ", ", entry["names"]))
    ]


def documented(section: str) -> list[str]:
    """What a section says itself, in order."""
    return [name for name, other in entries(section) if not other]


def arguments_at_fault(
    function: Callable[..., Any], functions: dict[str, Callable[..., Any]]
) -> list[str]:
    """What an Args section leaves out, adds, repeats, misplaces or wrongly refers to.

    What is said and what is left to another function each follow the signature. That
    function has to say it: who follows a reference finds no second one.
    """
    found = entries(sections(inspect.getdoc(function) or "")["Args"])
    parameters = list(inspect.signature(function).parameters)
    faults = [n for n in parameters if [name for name, _ in found].count(n) != 1]
    for group in (
        [name for name, other in found if not other],
        [name for name, other in found if other],
    ):
        faults += [name for name in group if name not in parameters]
        faults += [] if group == [n for n in parameters if n in group] else group
    by_name = {name.rpartition(".")[2]: f for name, f in functions.items()}
    for name, other in found:
        if other:
            there = by_name.get(other.rpartition(".")[2])
            text = sections((there and inspect.getdoc(there)) or "").get("Args", "")
            faults += [] if name in documented(text) else [f"{name} of {other}"]
    return faults


@pytest.mark.parametrize("name", WITH_CODE)
def test_python_of_a_page_runs_in_order(name: str) -> None:
    text = page(name)
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) >= WITH_CODE[name]
    assert text.count("```python") == len(blocks)
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        # Padded, so that a traceback shows the line of the page.
        code = "\n" * line + block.group(1)
        # With the promotion rules that a reader's JAX has.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            exec(compile(code, str(ROOT / name), "exec"), namespace)


def test_the_mathematics_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", page("notebooks/mathematics.md")))
    texts = [path.read_text("utf-8") for path in (ROOT / "tests").glob("test_*.py")]
    assert len(named) > 20
    assert {n for n in named if not any(f"def {n}(" in t for t in texts)} == set()


def test_readme_names_every_public_function_and_the_site_every_option() -> None:
    functions = {name.rpartition(".")[2] for name in FUNCTIONS}
    parameters = inspect.signature(jl.softmax_cross_entropy_with_integer_labels)
    options = set(parameters.parameters)
    for wanted, text in ((functions, README), (options, page("notebooks/api.md"))):
        missing = {name for name in wanted if not re.search(rf"\b{name}\b", text)}
        assert missing == set()


@pytest.mark.parametrize("name", PAGES)
def test_links_of_a_page_lead_somewhere(name: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page(name))
    local = [t for t in targets if not t.startswith("https://")]
    assert local or name in WITHOUT_LINKS
    # The notebook is generated from its source, `make notebooks`.
    sources = [re.sub(r"\.ipynb$", ".py", target) for target in local]
    folder = (ROOT / name).parent
    assert [s for s in sources if not (folder / s).exists()] == []


def test_readme_is_short_and_starts_with_what_people_ask() -> None:
    assert README.count("\n") <= 200
    headings = re.findall(r"^## (.*)$", README, re.MULTILINE)
    assert headings[0] == "Logits, softmax and the loss"
    before, _, rest = README.partition("\n## ")
    assert re.findall(r"^make (\w+)", before, re.MULTILINE) == ["demo", "test"]
    answer = rest.partition("\n## ")[0]
    for words in ("unscaled scores", "epsilon", "one-hot", "per example"):
        assert words in answer.replace("\n", " ")
    assert "[0.1, 0.3, 0.5, 0.9]" in answer
    assert "[0.16838508, 0.205666, 0.25120102, 0.37474789]" in answer


def test_measurements_of_the_pages_are_those_that_the_report_renders() -> None:
    files, tables = sorted(RESULTS.glob("*.json")), RESULTS / "README.md"
    assert files
    shown = README.partition(report.START)[2].partition(report.END)[0]
    assert shown.strip("\n") == report.for_readme(files, ROOT, tables)
    assert tables.read_text("utf-8") == report.all_tables(files, RESULTS)


def test_readme_shows_one_picture_and_one_small_table_of_measurements() -> None:
    pictures = re.findall(r"!\[", README)
    shown = README.partition(report.START)[2].partition(report.END)[0]
    assert len(pictures) == shown.count("![") == 1
    rows = re.findall(r"^\| (?!---)", shown, re.MULTILINE)[1:]
    assert 1 <= len(rows) <= 10


def test_targets_of_make_in_the_readme_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named <= set(targets)


def test_there_are_public_functions() -> None:
    assert {
        "jaxlosses.softmax",
        "jaxlosses.log_softmax",
        "jaxlosses.softmax_cross_entropy",
        "jaxlosses.softmax_cross_entropy_with_integer_labels",
    } <= set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_has_the_sections_in_order(name: str) -> None:
    function = FUNCTIONS[name]
    found = list(sections(inspect.getdoc(function) or ""))[1:]
    returns_nothing = inspect.signature(function).return_annotation is None
    assert found == [s for s in SECTIONS if s != "Returns" or not returns_nothing]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_starts_with_one_sentence(name: str) -> None:
    summary, blank, *rest = (inspect.getdoc(FUNCTIONS[name]) or "").split("\n")
    assert summary.endswith(".")
    assert ". " not in summary
    assert blank == ""
    assert rest


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if ".testing." not in n])
def test_docstring_shows_the_formula_before_the_arguments(name: str) -> None:
    before = sections(inspect.getdoc(FUNCTIONS[name]) or "")[""]
    formula = re.search(r"^    .*=.*$", before, re.MULTILINE)
    assert formula, "an indented line with an equation"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_are_documented_in_the_order_of_the_signature(name: str) -> None:
    assert arguments_at_fault(FUNCTIONS[name], FUNCTIONS) == []


def _first(logits: Any, weights: Any = None, reduction: Any = "none") -> None:
    """Says it.

    Args:
        logits: scores.
        weights, reduction: one entry for
            both: of the second line nothing is taken for an argument.
    """


def _second(kernel: Any, weights: Any, bias: Any, reduction: Any) -> None:
    """Refers.

    Args:
        kernel: as wide as logits.
        bias: what is added.
        `weights`,
        `reduction`: as in
            `first`, in every case.
    """


def _third(kernel: Any, weights: Any, bias: Any) -> None:
    """Refers to what does not say it, and to no function.

    Args:
        weights: as in `second`.
        kernel and bias: as in `nothing`.
    """


def _fourth(a: Any, b: Any, c: Any) -> None:
    """Is out of order, leaves one out and adds one.

    Args:
        b: the second.
        a: the first.
        d: none.
    """


def test_an_argument_may_be_left_to_a_function_that_documents_it() -> None:
    functions = {"package.first": _first, "package.second": _second}
    assert arguments_at_fault(_first, functions) == []
    assert arguments_at_fault(_second, functions) == []
    third = ["weights of second", "kernel of nothing", "bias of nothing"]
    assert set(arguments_at_fault(_third, functions)) >= set(third)
    assert set(arguments_at_fault(_fourth, functions)) == {"a", "b", "c", "d"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_example_is_a_doctest(name: str) -> None:
    text = sections(inspect.getdoc(FUNCTIONS[name]) or "")["Example"]
    assert re.search(r"^    >>> ", text, re.MULTILINE)
    assert "+SKIP" not in text


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_that_are_raised_are_documented(name: str) -> None:
    text = sections(inspect.getdoc(FUNCTIONS[name]) or "")["Raises"]
    # JAX's own errors have dots in their names.
    assert re.findall(r"^    ([\w.]+Error): \S", text, re.MULTILINE)


@pytest.mark.parametrize("name", CLASSES)
def test_fields_of_a_class_are_documented_in_order(name: str) -> None:
    cls = CLASSES[name]
    text = inspect.getdoc(cls) or ""
    assert text.split("\n")[0].endswith(".")
    if hasattr(cls, "_fields"):
        assert documented(sections(text)["Attributes"]) == list(cls._fields)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jaxlosses").rglob("*.py")), ids=lambda path: path.stem
)
def test_every_module_says_what_it_is(path: pathlib.Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert text
    assert text.split("\n")[0].endswith(".")


def test_doctests_are_collected() -> None:
    settings = (ROOT / "pyproject.toml").read_text("utf-8")
    assert '"--doctest-modules"' in settings
    assert re.search(r'^testpaths = \[.*"jaxlosses".*\]$', settings, re.MULTILINE)


@pytest.mark.parametrize(
    "function",
    [jl.softmax_cross_entropy, jl.softmax_cross_entropy_with_integer_labels],
)
def test_options_are_keywords_and_the_rest_is_that_of_optax(
    function: Callable[..., Any],
) -> None:
    import optax

    theirs = list(inspect.signature(getattr(optax, function.__name__)).parameters)
    parameters = inspect.signature(function).parameters.values()
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == theirs
    assert set(keywords) >= {"label_smoothing", "weights", "reduction", "forward_mode"}
