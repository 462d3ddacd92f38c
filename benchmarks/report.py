"""Tables and plots, from the JSON of runs alone."""

import itertools
import json
import math
import os
import pathlib
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.cases import (
    COPY,
    FIRST_CALL,
    FORWARD,
    FUSED,
    FUSED_BATCH,
    FUSED_CLASSES,
    FUSED_FIRST_CALL,
    FUSED_WORKSPACE,
    GROWTH_BATCH,
    GROWTH_CLASSES,
    MARGINS,
    MATMUL,
    OURS,
    STEP,
    VALUE_AND_GRADIENT,
)

Result = dict[str, Any]
Entry = dict[str, Any]
# An entry is found by what identifies its case, and by its contestant.
Key = tuple[str, int, int, str, str, str]

# Of the presets on the page of all tables.
_ORDER = (
    *("accuracy", "quick", "cpu", "small", "options", "gpu", "linear", "growth"),
    *("compiled", "chips", "trust"),
)
# All that is known of these stands there.
_ON_ONE_PAGE = ("compiled", "chips", "trust")
# Models of the README's table by preset, of few and of many classes; it has to stay
# small. A preset without an entry is on the page of all tables only.
_README_MODELS = {
    "cpu": ("ImageNet", "Llama-3"),
    "linear": ("Llama-3",),
    "compiled": ("Llama-3", "Gemma-2"),
}
_README_CASES = (("random", VALUE_AND_GRADIENT), ("random", FUSED))
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
_NAMES = {
    OURS: "ours",
    "torch": "PyTorch",
    "torch.compile": "PyTorch, compiled",
    "tensorflow": "TensorFlow",
}
_LOSSES = (FORWARD, VALUE_AND_GRADIENT)
_MIB = 2**20
# Readable on white and on black.
_TEXT = "#7d8590"
_COLORS = {
    OURS: "#3b8eea",
    "optax": "#e5694c",
    "jax.nn": "#c79a2b",
    "torch": "#a371d0",
    "torch.compile": "#d05fa0",
    "tensorflow": "#3fa66b",
}


def report(
    files: Iterable[pathlib.Path], readme: pathlib.Path, tables: pathlib.Path
) -> None:
    """Writes a page and a plot beside each file, all tables, and the README's part."""
    results = _sorted(files)
    for path, result in results.items():
        if result["preset"] not in _ON_ONE_PAGE:
            path.with_suffix(".md").write_text(_page(result), "utf-8")
        if _has_plot(result):
            _plot(result, path.with_suffix(".svg"))
    tables.write_text(all_tables(results, tables.parent), "utf-8")
    _insert(for_readme(results, readme.parent, tables), readme)


def all_tables(files: Iterable[pathlib.Path], root: pathlib.Path) -> str:
    """The page in the folder `root` that holds the tables of all files."""
    sections = []
    for path, result in _sorted(files).items():
        section = f"## {_title(result)}\n\n{_short(result)}"
        if _has_plot(result):
            section += f"\n\n{_picture(path, result, root)}"
        if result["preset"] not in _ON_ONE_PAGE:
            page = _link(path.with_suffix(".md"), root)
            section += f"\n\n[Every case, with quartiles]({page})"
        sections.append(section)
    return "\n\n".join([f"# Measurements\n\n{_HOW}", *sections]) + "\n"


def for_readme(
    files: Iterable[pathlib.Path], root: pathlib.Path, tables: pathlib.Path
) -> str:
    """What a README in the folder `root` shows: one picture, one table, one link."""
    # Of each kind of run on each device the one with the newest JAX.
    newest: dict[tuple[str, str], tuple[pathlib.Path, Result]] = {}
    for path, result in _sorted(files).items():
        key = result["preset"], _device(result)
        if key not in newest or _jax(newest[key][1]) <= _jax(result):
            newest[key] = path, result
    parts = [
        _picture(path, result, root)
        for path, result in newest.values()
        if result["preset"] == "accuracy"
    ]
    rows = [row for _, result in newest.values() for row in _readme_rows(result)]
    if rows:
        head = ["value and gradient", "on", "ms", "optax ÷ ours"]
        head += ["temporary MiB, ours / optax", "error, ours / optax"]
        parts += [_table(head, rows), _README_LEGEND]
    parts.append(f"[All tables]({_link(tables, root)})")
    return "\n\n".join(parts)


def summary(path: pathlib.Path) -> str:
    """The short table of a run."""
    result = _read(path)
    return f"{_title(result)}\n\n{_short(result)}"


def _read(path: pathlib.Path) -> Result:
    return json.loads(path.read_text("utf-8"))


def _insert(text: str, readme: pathlib.Path) -> None:
    whole = readme.read_text("utf-8")
    if whole.count(START) != 1 or whole.count(END) != 1:
        raise SystemExit(
            f"{readme}: got {whole.count(START)} lines {START} and "
            f"{whole.count(END)} lines {END}, expected one of each. Put them where "
            "the tables belong."
        )
    before, _, rest = whole.partition(START)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{START}\n{text}\n{END}{after}", "utf-8")


def _sorted(files: Iterable[pathlib.Path]) -> dict[pathlib.Path, Result]:
    results = {path: _read(path) for path in files}
    order = sorted(results, key=lambda p: _ORDER.index(results[p]["preset"]))
    return {path: results[path] for path in order}


def _link(path: pathlib.Path, root: pathlib.Path) -> str:
    return pathlib.Path(os.path.relpath(path, root)).as_posix()


def _picture(path: pathlib.Path, result: Result, root: pathlib.Path) -> str:
    return f"![{_caption(result)}]({_link(path.with_suffix('.svg'), root)})"


def _has_plot(result: Result) -> bool:
    if result["preset"] == "linear":  # of growth
        return bool(_fused_cases(result, growth=True))
    return result["preset"] not in (*_ON_ONE_PAGE, "options")


def _jax(result: Result) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", result["versions"]["jax"]))


def _title(result: Result) -> str:
    kinds = {
        "accuracy": "Accuracy: ",
        "chips": "Compiled, not run: ",
        "compiled": "Compiled, not run: ",
        "growth": "Growth of cost: ",
        "linear": "Fused loss: ",
        "options": "Options: ",
        "small": "Small calls: ",
        "trust": "What a long run may rely on: ",
    }
    kind = kinds.get(result["preset"], "")
    only = f", only '{result['only']}'" if result["only"] else ""
    return f"{kind}{_device(result)}, JAX {result['versions']['jax']}{only}"


def _device(result: Result) -> str:
    environment = result["environment"]
    if environment["platform"] == "cpu":
        return f"{environment['processor']}, {environment['threads']} threads"
    return environment["device"]


def _caption(result: Result) -> str:
    if result["preset"] == "accuracy":
        return "Error of the loss against how far the label's logit leads"
    if result["preset"] == "linear":
        return "Time and temporary memory of the fused loss"
    if result["preset"] == "growth":
        return "Time and temporary memory against classes and against rows"
    return "Time of each peer, divided by ours, per shape"


def _short(result: Result) -> str:
    if result["preset"] == "growth":
        return _growth_table(result)
    if result["preset"] == "compiled":
        return _compiled_tables(result)
    if result["preset"] == "chips":
        return _chips_table(result)
    if result["preset"] == "trust":
        return _trust_table(result)
    if result["preset"] == "options":
        return "\n\n".join([_options_table(result), *_remarks(result)])
    if result["preset"] == "accuracy":
        return "\n\n".join([_accuracy_table(result), *_remarks(result)])
    tables = []
    if _fused_cases(result):
        tables.append(_fused_table(result))
    if any(case["what"] in (*_LOSSES, STEP) for case in result["cases"]):
        tables.append(_comparison_table(result))
    return "\n\n".join([*tables, *_remarks(result)])


_HOW = """\
Rendered by `python -m benchmarks report` from the JSON files of this folder, none of it
by hand. `make bench` measures time, memory and accuracy beside other libraries and
renders them again. Ratios are medians of calls in turns within one process. On a GPU,
`python -m benchmarks run --preset gpu` measures its own list. Without one,
`python -m benchmarks compile --target h100` (or `v5e`, a TPU) compiles the losses for
it and counts reads, writes and matmuls. [NOTES.md](../NOTES.md) says what was tried,
and what is known to be slower."""


# The short table.

_README_LEGEND = (
    "Of the mean, ours beside optax. Given logits are rows×classes, a head is "
    "tokens×features×classes. ms: ours. optax ÷ ours: time, median of paired calls; "
    "above 1 ours is faster. Error: of the loss, worst relative; given logits, in rows "
    "with a margin of 20 nats; a head, on random inputs."
)


def _readme_rows(result: Result) -> list[list[str]]:
    """The cases of the README: what a training step asks for, ours beside optax."""
    index = _index(result)
    where = f"{_device(result)}, JAX {result['versions']['jax']}"
    if result["preset"] == "compiled":
        where = f"compiled for {where}"
    rows = []
    for case in result["cases"]:
        model, what, dtype = case["model"], case["what"], case["dtype"]
        chosen = model in _README_MODELS.get(result["preset"], ())
        if not chosen or (case["inputs"], what) not in _README_CASES:
            continue
        ours, theirs = _both(case["entries"])
        accuracy, error = (ours, theirs), "order 1"
        shape = f"head, {model} {case['batch']}×{case['features']}×{case['classes']}"
        if what != FUSED:
            key = (model, case["batch"], case["classes"], dtype, "confident", FORWARD)
            accuracy, error = _both(index.get(key, {})), "confident"
            shape = f"logits, {model} {case['batch']}×{case['classes']}"
        memory = (None if e is None else e["temp_bytes"] for e in (ours, theirs))
        errors = ((e or {}).get("worst_error", {}).get(error) for e in accuracy)
        rows.append(
            [
                f"{shape} {dtype}",
                where,
                _number(_median(ours, "ms"), 3),
                _number(_median(theirs, "ratio_to_ours")),
                _join(map(_mib, memory)),
                _pair(errors),
            ]
        )
    return rows


def _both(entries: dict[str, Entry]) -> tuple[Entry | None, Entry | None]:
    return entries.get(OURS), entries.get("optax")


# Entries of a result.


def _index(result: Result) -> dict[Key, dict[str, Entry]]:
    return {
        (
            case["model"],
            case["batch"],
            case["classes"],
            case["dtype"],
            case["inputs"],
            case["what"],
        ): case["entries"]
        for case in result["cases"]
    }


def _peers(result: Result) -> list[str]:
    """Who was measured beside ours, in the order in which they ran."""
    names = [name for case in result["cases"] for name in case["entries"]]
    return [name for name in dict.fromkeys(names) if name in _COLORS and name != OURS]


def _median(entry: Entry | None, key: str) -> float | None:
    return None if entry is None or key not in entry else entry[key][1]


# Markdown.


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, digits: int = 2) -> str:
    if value is None or math.isnan(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 10**digits:
        return f"{value:#.{digits}g}".rstrip(".") if value else "0"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}"
    return f"{value:.0f}"


def _pair(values: Iterable[float | None], digits: int = 2) -> str:
    return _join(_number(value, digits) for value in values)


def _join(texts: Iterable[str]) -> str:
    texts = list(texts)
    return "-" if set(texts) == {"-"} else " / ".join(texts)


def _mib(size: int | None) -> str:
    if size is not None and 0 < size < 0.01 * _MIB:
        return "<0.01"
    return _number(None if size is None else size / _MIB)


def _name(contestant: str) -> str:
    return _NAMES.get(contestant, contestant)


def _comparison_table(result: Result) -> str:
    """One row per shape and dtype; `a / b` is forward / value and gradient."""
    index, peers = _index(result), _peers(result)
    shapes = list(dict.fromkeys(key[:4] for key in index if key[5] in (*_LOSSES, STEP)))
    ceilings = _ceilings(result)

    def entry(shape: Any, what: str, name: str, inputs: str = "random") -> Entry | None:
        return index.get((*shape, inputs, what), {}).get(name)

    def both(shape: Any, name: str, key: str) -> list[float | None]:
        return [_median(entry(shape, what, name), key) for what in _LOSSES]

    def columns(shape: Any) -> dict[str, list[float | None]]:
        """What is averaged over the shapes of a dtype."""
        found = {name: both(shape, name, "ratio_to_ours") for name in peers}
        found["÷ floor"] = both(shape, OURS, "ratio_to_floor")
        step = _median(entry(shape, STEP, "optax"), "ratio_to_ours")
        return found | {"step, optax": [step]}

    def rest(shape: Any) -> list[str]:
        memory = [entry(shape, VALUE_AND_GRADIENT, name) for name in (OURS, "optax")]
        errors = [entry(shape, FORWARD, n, "confident") for n in (OURS, "optax")]
        cells = [
            _join(_mib(None if m is None else m["temp_bytes"]) for m in memory),
            _pair(None if e is None else e["worst_error"]["confident"] for e in errors),
        ]
        if "copy" in ceilings:
            share = _shares(shape, both(shape, OURS, "ms"), ceilings["copy"])
            cells.append(_pair(share))
        return cells

    averaged = ["÷ floor", *peers, "step, optax"]
    head = ["logits", "ms", *map(_name, averaged)]
    head += ["temporary MiB, ours / optax", "error if confident, ours / optax"]
    head += ["share of copy bandwidth"] if "copy" in ceilings else []
    rows = []
    for dtype in dict.fromkeys(shape[3] for shape in shapes):
        collected = []
        for shape in [shape for shape in shapes if shape[3] == dtype]:
            found = columns(shape)
            collected.append(found)
            model, batch, classes, _ = shape
            row = [f"{model} {batch}×{classes} {dtype}"]
            row.append(_pair(both(shape, OURS, "ms"), 3))
            rows.append([*row, *(_pair(found[c]) for c in averaged), *rest(shape)])
        means = [
            _pair(map(_geometric_mean, zip(*(f[c] for f in collected), strict=True)))
            for c in averaged
        ]
        blank = [""] * (len(head) - len(means) - 2)
        rows.append([f"*geometric mean, {dtype}*", "", *means, *blank])
    legend = (
        "`a / b` is forward / value and gradient. ms: ours, median. Under a peer: its "
        "time divided by ours, median of paired calls; above 1 ours is faster. "
        "÷ floor: ours, divided by `max` over the classes / by `x + 1`. step: a "
        "training step around the loss. error: worst relative error of the loss in "
        "rows with a margin of 20 nats. Random logits otherwise."
    )
    parts = [legend, *_ceiling_lines(ceilings), _table(head, rows)]
    return "\n\n".join(parts)


def _geometric_mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.geometric_mean(known) if known else None


def _remarks(result: Result) -> list[str]:
    remarks = [f"{_name(k)} took no part: {v}." for k, v in result["absent"].items()]
    for case in result["cases"]:
        for name, reason in case["failed"].items():
            where = f"{case['model']} {case['batch']}×{case['classes']} {case['dtype']}"
            remarks.append(f"{_name(name)} failed at {where} {case['what']}: {reason}.")
    if result["not_run"]:
        remarks.append(f"Not run: {'; '.join(result['not_run'])}.")
    return remarks


# Ceilings of the device.

_CEILINGS = (COPY, MATMUL)


def _ceilings(result: Result) -> dict[str, float]:
    """Bytes per second of a copy, read and written, and FLOP/s of a matmul."""
    found = {}
    for case in result["cases"]:
        if case["what"] in _CEILINGS and case["floor"] in case["entries"]:
            seconds = case["entries"][case["floor"]]["ms"][1] / 1e3
            entries = case["batch"] * case["classes"]
            work = 2 * _itemsize(case["dtype"]) * entries
            if case["what"] == MATMUL:
                work = 2 * entries * case["classes"]
            found[case["what"]] = work / seconds
    return found


def _ceiling_lines(ceilings: dict[str, float]) -> list[str]:
    texts = []
    if COPY in ceilings:
        texts.append(f"copy {ceilings[COPY] / 1e12:.2f} TB/s, read and written")
    if MATMUL in ceilings:
        texts.append(f"bfloat16 matmul {ceilings[MATMUL] / 1e12:.0f} TFLOP/s")
    return [f"Ceilings in this run: {'; '.join(texts)}."] if texts else []


def _shares(
    shape: tuple[str, int, int, str], ms: list[float | None], copy: float
) -> list[float | None]:
    """Forward counted as one read, value and gradient as two reads and one write."""
    _, batch, classes, dtype = shape
    size = batch * classes * _itemsize(dtype)
    return [
        None if time is None else passes * size / (time / 1e3) / copy
        for passes, time in zip((1, 3), ms, strict=True)
    ]


def _itemsize(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 4


# Growth.


def _growth_axes(result: Result) -> list[tuple[str, str, Callable[[Any], bool]]]:
    """Axis label, field of a case, and which cases lie on it."""
    return [
        (f"classes, {GROWTH_BATCH} rows", "classes", lambda c: c["model"] == "V"),
        (f"rows, {GROWTH_CLASSES} classes", "batch", lambda c: c["model"] == "B"),
    ]


def _growth_table(result: Result) -> str:
    rows = []
    for label, field, on_axis in _growth_axes(result):
        along = sorted(filter(on_axis, result["cases"]), key=lambda c: c[field])
        groups = dict.fromkeys((c["dtype"], c["what"]) for c in along)
        for dtype, what in groups:
            cases = [c for c in along if (c["dtype"], c["what"]) == (dtype, what)]
            span = f"{cases[0][field]} to {cases[-1][field]}"
            row = [f"{label}: {span}", dtype, what]
            for name in (OURS, "optax"):
                entries = [c["entries"].get(name) for c in cases]
                each = [
                    1e6 * e["ms"][1] / (c["batch"] * c["classes"])
                    for c, e in zip(cases, entries, strict=True)
                    if e is not None
                ]
                temp = [e["temp_bytes"] or 0 for e in entries if e is not None]
                row.append(f"{_number(min(each))} to {_number(max(each))}")
                row.append(f"{_mib(temp[0])} to {_mib(temp[-1])}")
            rows.append(row)
    head = ["along", "dtype", "what"]
    for name in ("ours", "optax"):
        head += [f"{name}, ns per logit", f"{name}, temporary MiB"]
    return "\n\n".join([_table(head, rows), *_remarks(result)])


def _fused_cases(result: Result, growth: bool = False) -> list[Any]:
    return [
        case
        for case in result["cases"]
        if case["what"] == FUSED and (case["model"] in ("V", "B")) == growth
    ]


def _fused_table(result: Result) -> str:
    """Value and gradient of the mean: time beside ours, and temporaries."""
    cases = _fused_cases(result)
    names = dict.fromkeys(n for c in cases for n in c["entries"] if n != OURS)
    rows = []
    for case in cases:
        shape = f"{case['batch']}×{case['features']}×{case['classes']}"
        ours = case["entries"].get(OURS)
        row = [f"{case['model']} {shape}", case["dtype"]]
        row += [_number(_median(ours, key), 3) for key in ("ms", "ratio_to_floor")]
        work = 6 * case["batch"] * case["features"] * case["classes"]
        row.append("-" if ours is None else _number(work / ours["ms"][1] / 1e9, 3))
        error = {} if ours is None else ours.get("worst_error", {})
        row.append(_pair(error.get(key) for key in ("order 1", "gradient")))
        row.append("-" if ours is None else _mib(ours["temp_bytes"]))
        for name in names:
            entry = case["entries"].get(name)
            memory = "-" if entry is None else _mib(entry["temp_bytes"])
            row.append(f"{_number(_median(entry, 'ratio_to_ours'))}, {memory}")
        rows.append(row)
    head = ["tokens×features×classes", "dtype", "ours, ms", "÷ three matmuls"]
    head += ["TFLOP/s of three", "error of loss / gradient"]
    head += ["ours, MiB", *(f"{_name(name)}: time ÷ ours, MiB" for name in names)]
    first_calls = [
        _first_call(case)
        for case in result["cases"]
        if case["what"] == FUSED_FIRST_CALL
    ]
    return "\n\n".join([_table(head, rows), *first_calls])


def _first_call(case: Any) -> str:
    shape = f"{case['batch']}×{case['features']}×{case['classes']}"
    ms = _number(_median(case["entries"].get(OURS), "ms"), 3)
    times = _number(_inverse(_beside(case["entries"], "optax")))
    return (
        f"A first call of {shape} (to trace, lower and compile): {ms} ms, "
        f"{times} times Optax's."
    )


# Accuracy.

_SHOWN_MARGINS = (-10, 0, 5, 10, 15, 20, 40, 80)


def _accuracy_table(result: Result) -> str:
    """A row per margin, a column per contestant; `a / b` are the dtypes."""
    cases = result["cases"]
    names = [OURS, *_peers(result)]
    rows = [
        [
            str(nats),
            *(_pair(_error(case, name, nats) for case in cases) for name in names),
        ]
        for nats in _SHOWN_MARGINS
    ]
    legend = (
        "Worst relative error of the loss against float64, in "
        f"{' / '.join(case['dtype'] for case in cases)}. The margin is how many nats "
        "the label's logit leads by; behind zero the label is not the prediction. An "
        "error of 1 is a loss of zero."
    )
    return f"{legend}\n\n{_table(['margin', *map(_name, names)], rows)}"


def _error(case: Any, name: str, nats: float) -> float | None:
    errors = case["entries"].get(name, {}).get("worst_error", {})
    return errors.get(f"{nats:g}")


def _accuracy_figure(result: Result) -> Any:
    """The error of the loss against the margin, a column per dtype."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    grid = figure.subplots(1, len(result["cases"]), squeeze=False, sharey="row")
    for axes, case in zip(grid.flat, result["cases"], strict=True):
        for name in [*_peers(result), OURS]:
            points = [(m, e) for m in MARGINS if (e := _error(case, name, m))]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    linewidth=2.2 if name == OURS else 1.2,
                    color=_COLORS[name],
                    label=_name(name),
                )
        axes.set_yscale("log")
        axes.set_title(f"{case['dtype']} logits", fontsize=10)
        axes.set_xlabel("nats by which the label leads")
    grid[0, 0].set_ylabel("relative error of the loss")
    _legend(figure, grid.flat)
    return figure


# Options.


def _options_table(result: Result) -> str:
    """A row per option and inputs, a column per shape."""
    found: dict[tuple[str, str, str], dict[Any, dict[str, Any]]] = {}
    for case in result["cases"]:
        row = found.setdefault((case["option"], case["dtype"], case["inputs"]), {})
        shape = case["batch"], case["classes"]
        row.setdefault(shape, {})[case["what"]] = case["entries"]
    shapes = list(dict.fromkeys(shape for row in found.values() for shape in row))
    kinds: list[tuple[str, Callable[[Any], list[float | None]]]] = [
        ("time", lambda of: [_beside(of.get(what), "by hand") for what in _LOSSES]),
        ("first call", lambda of: [_inverse(_beside(of.get(FIRST_CALL), "by hand"))]),
    ]
    rows = []
    collected: list[list[list[float | None]]] = []
    for (option, dtype, inputs), by_shape in found.items():
        plain = (dtype, inputs) == ("float32", "random")
        cells = [[figures(by_shape.get(s, {})) for s in shapes] for _, figures in kinds]
        flat = [cell for kind in cells for cell in kind]
        if plain:
            collected.append(flat)
        entries = by_shape.get(shapes[0], {}).get(VALUE_AND_GRADIENT, {})
        both = (entries.get(name, {}).get("temp_bytes") for name in (OURS, "by hand"))
        name = option if plain else f"{option}, {inputs}, {dtype}"
        rows.append([name, *map(_pair, flat), _join(map(_mib, both))])
    means = [
        _pair(map(_geometric_mean, zip(*cells, strict=True)))
        for cells in zip(*collected, strict=True)
    ]
    rows.append(["*geometric mean, float32, random*", *means, ""])
    head = ["option"]
    head += [f"{what}, {b}×{v}" for what, _ in kinds for b, v in shapes]
    head += [f"temporary MiB, ours / by hand, {shapes[0][0]}×{shapes[0][1]}"]
    legend = (
        "Beside what people write by hand with Optax and `jax.nn`. Time: theirs "
        "divided by ours, forward / value and gradient of the mean; above 1 ours is "
        "faster. "
        "First call: to trace, lower and compile value and gradient, ours divided by "
        "theirs. The float32 loss by hand has the errors that the picture shows."
    )
    return f"{legend}\n\n{_table(head, rows)}"


def _beside(entries: Any, name: str) -> float | None:
    """The time of another, divided by ours."""
    return _median((entries or {}).get(name), "ratio_to_ours")


def _inverse(ratio: float | None) -> float | None:
    return 1 / ratio if ratio else ratio


# What a long run may rely on.


def _trust_table(result: Result) -> str:
    """A row per figure."""
    rows = []
    for item, figures in result["items"].items():
        found = {k: v for k, v in figures.items() if k not in _ABOUT}
        state = "holds" if figures["holds"] else "**does not hold**"
        rows.append([f"**{item}**, at {figures['revision']}", state])
        rows += [[key, _figure(value)] for key, value in found.items()]
    return _table(["figure", "measured"], rows)


_ABOUT = ("holds", "seconds", "revision")


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k != "holds"}
        return "; ".join(f"{k}: {_figure(v)}" for k, v in kept.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_figure, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


# What compilers made.


def _compiled_tables(result: Result) -> str:
    """Reads and writes of given logits; memory and matmuls of the fused loss."""
    given = [case for case in result["cases"] if case["what"] != FUSED]
    fused = [case for case in result["cases"] if case["what"] == FUSED]
    rows = [
        [
            f"{case['model']} {case['batch']}×{case['classes']} {case['dtype']}",
            case["what"],
            _name(name),
            *(str(e[key]) for key in ("reads", "writes", "float32_arrays")),
            _mib(e["temp_bytes"]),
        ]
        for case in given
        for name, e in case["entries"].items()
    ]
    head = ["logits", "what", "who", "reads", "writes", "in float32", "temporary MiB"]
    legend = (
        "Reads and writes of arrays of the logits' size, and how many of those written "
        "are float32, counted in the optimised module."
    )
    parts = [legend, _table(head, rows)]
    rows = []
    for case in fused:
        shape = f"{case['batch']}×{case['features']}×{case['classes']}"
        most = case["entries"].get("optax", {}).get("temp_bytes")
        for name, e in case["entries"].items():
            kinds = [
                f"{' × '.join(m['factors'])} → {m['product']}" for m in e["matmuls"]
            ]
            counted = (f"{kinds.count(k)} of {k}" for k in dict.fromkeys(kinds))
            plan = f" ({case['plan']['strategy']})" if name == "jaxlosses" else ""
            part = f"{e['temp_bytes'] / most:.0%}" if most else "-"
            rows.append(
                [
                    f"{case['model']} {shape} {case['dtype']}",
                    _name(name) + plan,
                    _mib(e["temp_bytes"]),
                    part,
                    str(e["work"]["launches"]),
                    *_estimates(result, case, name, e),
                    "; ".join(counted),
                ]
            )
    head = ["tokens×features×classes", "who", "temporary MiB", "of optax's"]
    head += ["launches", "GB", "estimate, ms", "matmuls in the module"]
    parts += [_FUSED_LEGEND, _table(head, rows)]
    return "\n\n".join(parts)


def _chips_table(result: Result) -> str:
    """A row per kind of axes and strategy."""
    rows = [
        [
            f"{entry['axes']}, {entry['strategy']}",
            _mib(entry["temp_bytes"]),
            _mib(entry["work"]["bytes_moved"]),
            _number(entry["work"]["cycles"] / 1e6, 3),
            "; ".join(f"{k} {v}" for k, v in entry["largest_moved"].items()),
        ]
        for entry in result["entries"]
    ]
    head = ["axes, strategy", "temporary MiB", "moved, MiB", "million cycles"]
    head += ["largest array of each collective"]
    legend = (
        f"A head of {result['shape']}, its examples over four chips and its classes "
        "over two, value and gradient of the mean; of each chip. Both gradients in "
        f"float32 are {_mib(result['ideal_bytes_moved'])} MiB. The program asks for "
        "sums in float32; where an array is bf16, the compiler has rounded first."
    )
    return f"{legend}\n\n{_table(head, rows)}"


_FUSED_LEGEND = (
    "Value and gradient of a mean. Launches and bytes count loops by their trips. The "
    "estimate is no measurement: on a TPU the compiler's own cycles at 1.5 GHz, on an "
    "H100 matmuls at 700 TFLOP/s and bytes at 3.35 TB/s, one after the other."
)


def _estimates(result: Result, case: Any, name: str, entry: Any) -> tuple[str, str]:
    """Gigabytes that are read and written, and milliseconds."""
    work = entry["work"]
    traffic = work["bytes_read"] + work["bytes_written"]
    seconds = work["cycles"] / 1.5e9
    if result["environment"]["platform"] == "cuda":
        four = name.endswith(("recompute", "vocab"))
        number = case["plan"]["matmuls"] if name == "jaxlosses" else 3 + four
        flop = 2 * number * case["batch"] * case["features"] * case["classes"]
        seconds = flop / 700e12 + traffic / 3.35e12
    return f"{traffic / 1e9:.1f}", f"{seconds * 1e3:.1f}"


# The page of a run.


def _page(result: Result) -> str:
    """Everything of a run but the single samples."""
    rows = []
    for case in result["cases"]:
        where = f"{case['model']} {case['batch']}×{case['classes']} {case['dtype']}"
        where += f" {case['option']}" if case.get("option") else ""
        for name, entry in case["entries"].items():
            error = entry.get("worst_error", {})
            rows.append(
                [
                    f"{where} {case['inputs']} {case['what']}",
                    f"{_name(name)} (floor)" if name == case["floor"] else _name(name),
                    *(
                        _quartiles(entry.get(key))
                        for key in ("ms", "ratio_to_ours", "ratio_to_floor")
                    ),
                    _mib(entry["temp_bytes"]),
                    _number(error.get("order 1")),
                    _number(error.get("confident")),
                    str(len(entry["samples_ms"])),
                ]
            )
    head = ["case", "who", "ms", "÷ ours", "÷ floor", "temporary MiB"]
    head += ["error, order 1", "error, confident", "samples"]
    environment = "; ".join(f"{k}: {v}" for k, v in result["environment"].items())
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    inputs = "\n".join(f"- {name}: {text}" for name, text in result["inputs"].items())
    parts = [
        f"# {_title(result)}",
        "Rendered by `python -m benchmarks report`. Median [lower quartile, upper "
        "quartile]; ratios are of calls in the same turn. Errors are relative to "
        "float64 on the same rounded logits.",
        f"{result['date']}. {environment}. {versions}.",
        inputs,
        _table(head, rows),
        *_remarks(result),
    ]
    return "\n\n".join(parts) + "\n"


def _quartiles(values: list[float] | None) -> str:
    if values is None:
        return "-"
    low, middle, high = (_number(value, 3) for value in values)
    return f"{middle} [{low}, {high}]"


# Plots.


def _plot(result: Result, path: pathlib.Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    settings: Any = {
        "text.color": _TEXT,
        "axes.labelcolor": _TEXT,
        "axes.edgecolor": _TEXT,
        "xtick.color": _TEXT,
        "ytick.color": _TEXT,
        "grid.color": _TEXT,
        "grid.alpha": 0.3,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "savefig.transparent": True,
        "svg.hashsalt": "benchmarks",  # the same picture from the same numbers
    }
    figures = {
        "accuracy": _accuracy_figure,
        "growth": _growth_figure,
        "linear": _fused_figure,
    }
    draw = figures.get(result["preset"], _comparison_figure)
    with mpl.rc_context(settings):
        figure = draw(result)
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


def _comparison_figure(result: Result) -> Any:
    """Ratios to ours: a row per quantity, a column per dtype."""
    from matplotlib.figure import Figure

    index = _index(result)
    dtypes = list(dict.fromkeys(key[3] for key in index if key[5] in (*_LOSSES, STEP)))
    figure = Figure(figsize=(5 * max(1, len(dtypes)), 6), layout="constrained")
    grid = figure.subplots(
        2, max(1, len(dtypes)), squeeze=False, sharex="col", sharey="row"
    )
    for row, what in zip(grid, _LOSSES, strict=True):
        for axes, dtype in zip(row, dtypes, strict=False):
            keys = [key for key in index if key[3] == dtype and key[5] in _LOSSES]
            shapes = list(dict.fromkeys(key[:3] for key in keys))
            for name, inputs in itertools.product(
                _peers(result), ("random", "confident")
            ):
                found = [
                    (i, entry)
                    for i, shape in enumerate(shapes)
                    if (entry := index.get((*shape, dtype, inputs, what), {}).get(name))
                ]
                if not found:
                    continue
                at = [i + _offset(name, inputs, result) for i, _ in found]
                low, middle, high = zip(
                    *(entry["ratio_to_ours"] for _, entry in found), strict=True
                )
                axes.vlines(at, low, high, color=_COLORS[name], alpha=0.6)
                face = _COLORS[name] if inputs == "random" else "none"
                axes.plot(
                    at,
                    middle,
                    "o",
                    markersize=5,
                    color=_COLORS[name],
                    markerfacecolor=face,
                    label=f"{_name(name)}, {inputs}",
                )
            axes.axhline(1, color=_COLORS[OURS], linewidth=1.2)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(_plain)
            axes.yaxis.set_minor_formatter(_plain_if_few)
            axes.set_title(f"{what}, {dtype}", fontsize=10)
            axes.grid(visible=False, axis="x")
            for i in range(1, len(shapes)):
                axes.axvline(i - 0.5, color=_TEXT, alpha=0.3, linewidth=0.6)
            labels = [f"{model}\n{batch}×{classes}" for model, batch, classes in shapes]
            axes.set_xticks(range(len(shapes)), labels, rotation=60, ha="right")
        row[0].set_ylabel("time ÷ ours")
    _legend(figure, grid.flat)
    return figure


def _plain(value: float, position: int | None = None) -> str:
    return f"{value:g}"


def _plain_if_few(value: float, position: int | None = None) -> str:
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _offset(name: str, inputs: str, result: Result) -> float:
    """Beside its neighbours at the same shape, from -0.3 to 0.3."""
    peers = _peers(result)
    place = 2 * peers.index(name) + (inputs == "confident")
    return 0.6 * ((place + 0.5) / (2 * len(peers)) - 0.5)


def _growth_figure(result: Result) -> Any:
    """Time and memory, a row each, against classes and rows, per dtype."""
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(case["dtype"] for case in result["cases"]))
    axes_of = list(itertools.product(dtypes, _growth_axes(result)))
    figure = Figure(figsize=(3.2 * len(axes_of), 6), layout="constrained")
    grid = figure.subplots(2, len(axes_of), squeeze=False, sharey="row")
    quantities: list[tuple[str, Callable[[Entry], float]]] = [
        ("ms", lambda entry: entry["ms"][1]),
        ("temporary MiB", lambda entry: (entry["temp_bytes"] or 0) / _MIB),
    ]
    for row, (unit, value) in zip(grid, quantities, strict=True):
        for axes, (dtype, (label, field, on_axis)) in zip(row, axes_of, strict=True):
            along = [c for c in result["cases"] if on_axis(c) and c["dtype"] == dtype]
            along.sort(key=lambda case: case[field])
            for name, what in itertools.product((OURS, "optax"), _LOSSES):
                points = [
                    (case[field], value(case["entries"][name]))
                    for case in along
                    if case["what"] == what and name in case["entries"]
                ]
                if not points:
                    continue
                axes.plot(
                    *zip(*points, strict=True),
                    "o-" if what == FORWARD else "s--",
                    markersize=3.5,
                    color=_COLORS[name],
                    label=f"{_name(name)}, {what}",
                )
            axes.set_xscale("log", base=2)
            if unit == "ms":
                axes.set_yscale("log")
            else:
                axes.set_yscale("symlog", linthresh=1 / 64)
            axes.set_title(dtype, fontsize=10)
            axes.set_xlabel(label)
        row[0].set_ylabel(unit)
    _legend(figure, grid.flat)
    return figure


def _fused_figure(result: Result) -> Any:
    """Time and temporaries of the fused loss, against classes and against tokens."""
    from matplotlib import pyplot

    styles = {
        OURS: (_COLORS[OURS], "o-"),
        f"{OURS} recompute": ("#6fb3f2", "s--"),
        f"{OURS} vocab": ("#1f5fa8", "^:"),
        "optax": (_COLORS["optax"], "o-"),
        "tokamax": (_COLORS["torch"], "o-"),
        "jax-cce": (_COLORS["tensorflow"], "o-"),
    }
    figure, all_axes = pyplot.subplots(
        2, 2, figsize=(8, 6), squeeze=False, layout="constrained"
    )
    given = f"; ours within {FUSED_WORKSPACE // _MIB} MiB"
    along = (
        ("V", "classes", f"classes, {FUSED_BATCH} tokens{given}"),
        ("B", "batch", f"tokens, {FUSED_CLASSES} classes{given}"),
    )
    for column, (model, field, label) in enumerate(along):
        cases = [c for c in _fused_cases(result, growth=True) if c["model"] == model]
        for name, (color, style) in styles.items():
            shown = [c for c in cases if name in c["entries"]]
            if not shown:
                continue
            x = [c[field] for c in shown]
            entries = [c["entries"][name] for c in shown]
            times = [e["ms"][1] for e in entries]
            memory = [(e["temp_bytes"] or 0) / _MIB for e in entries]
            for row, values in enumerate((times, memory)):
                all_axes[row][column].plot(
                    x, values, style, color=color, label=_name(name), markersize=4
                )
        for row, what in enumerate(("ms", "temporary MiB")):
            axes = all_axes[row][column]
            if axes.lines:  # a run may have ended before
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
            axes.set_xlabel(label)
            axes.set_ylabel(what)
    _legend(figure, all_axes.flat)
    return figure


def _legend(figure: Any, all_axes: Iterable[Any]) -> None:
    handles: dict[str, Any] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=4,
            frameon=False,
        )
