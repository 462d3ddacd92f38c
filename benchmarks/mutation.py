"""How many small changes to the package its tests notice.

cosmic-ray makes the changes. A sample of them, always the same, is tested one by one in
copies of the checkout, by the tests of the room that is changed, and then by others;
as many of the sample as there is time for.
"""

import concurrent.futures
import itertools
import os
import pathlib
import queue
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
MUTANTS = 400
BUDGET = 900  # seconds, after which no further change is begun
TIMEOUT = 600  # seconds, after which a change counts as noticed

# Rooms, and the tests that say what they do; the first that fits.
_ROOMS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("_math/divergence", "_math/ratios"), ("divergence",)),
    (("_math/top_k", "_math/picks"), ("top_k",)),
    (("_math/softcap", "_math/pairs"), ("softcap", "cross_entropy")),
    (("_math/online", "_math/sets"), ("online", "lowering")),
    (("_math/tails", "_backends/folds"), ("log_probs", "blocks")),
    (
        ("_math/gradient", "_math/transform"),
        ("scale", "cross_entropy", "transforms", "top_k"),
    ),
    (
        tuple(f"_backends/{m}" for m in ("cpu", "direct", "once", "logits", "choose")),
        ("blocks", "cross_entropy", "log_probs"),
    ),
    (("_backends/strips", "_backends/vocab"), ("sharding", "linear", "top_k")),
    (("_backends/plan",), ("testing", "linear")),
    (("_backends/recompute", "_backends/examples"), ("linear", "divergence")),
    (("_backends/",), ("properties", "linear", "linear_loss")),
    (
        ("_options", "_combine"),
        ("denominators", "cross_entropy", "stats", "divergence"),
    ),
    (("",), ("properties", "cross_entropy", "transforms", "top_k", "divergence")),
)
# What a change of any room may show in: several devices, fused losses, bug reports.
_OTHERS = ("linear", "sharding", "explicit_mesh", "field", "export")
_PATHS = ("_math", "_backends", "_rules.py", "_options.py", "_combine.py")
# Of one operator into another: what people confuse. Others are errors at once, and
# those of `|` are of annotations.
_OPERATORS = (
    *("ReplaceBinaryOperator_Add_Sub", "ReplaceBinaryOperator_Sub_Add"),
    *("ReplaceBinaryOperator_Mul_Div", "ReplaceBinaryOperator_Div_Mul"),
    *("ReplaceBinaryOperator_BitAnd_BitOr", "ReplaceUnaryOperator_Delete_USub"),
    *("ReplaceUnaryOperator_Delete_Invert", "ReplaceUnaryOperator_Delete_Not"),
    *("ReplaceComparisonOperator_Lt_LtE", "ReplaceComparisonOperator_Lt_Gt"),
    *("ReplaceComparisonOperator_Gt_GtE", "ReplaceComparisonOperator_Gt_Lt"),
    *("ReplaceComparisonOperator_LtE_Lt", "ReplaceComparisonOperator_GtE_Gt"),
    *("ReplaceComparisonOperator_Eq_NotEq", "ReplaceComparisonOperator_NotEq_Eq"),
    *("ReplaceComparisonOperator_Is_IsNot", "ReplaceComparisonOperator_IsNot_Is"),
    *("ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "AddNot", "NumberReplacer"),
    *("ReplaceAndWithOr", "ReplaceOrWithAnd"),
)

_CONSTANT = re.compile("_?[A-Z_]+ = ")
# Lines of which a change changes no result, or none that a bound could tell, and why.
_EQUIVALENT = {
    "def _read(spec: Spec, inputs: Inputs, uniform: Values | None, slices: int = 1)": (
        "slices of a row are merged: another number of them gives the same"
    ),
    "one, two = constant(factor, dtype, info.nmant // 2 + 1)": (
        "both parts are used: another split of a constant is the same constant"
    ),
    "step = pairs.constant(pairs.LOG_2, dtype, jnp.finfo(dtype).nmant - 7)": (
        "of a term of a sum, which is rough, another split takes a third more roundings"
    ),
    "if part.slack is not None and part.share is not None:": (
        "who has one has the other: the second is asked for the types"
    ),
    "_LAST_OF_EXP = {": "a last term more or less is less than a rounding",
    "return 8 if dtype == jnp.float32 else 15": (
        "a last term more or less is less than a rounding"
    ),
    "lowest = jnp.where(lowest == NOBODY, -1, lowest)": (
        "without a class the spread is NaN, and with it the arg max is -1"
    ),
    "if first.fine is not None and second.fine is not None:": (
        "who has one has the other: the second is asked for the types"
    ),
    "chunk = sizes.features // 4 * sizes.classes * sizes.entry if": (
        "a byte more or less; another quarter is noticed"
    ),
    "tail = zeros.tail._replace(peak=none, excess=jnp.full_like(none, -1))": (
        "what is merged of no class is multiplied by 0"
    ),
    "one = 2.0 ** (jnp.finfo(probs.dtype).nmant // 2)": (
        "all of the digits, too, add up exactly"
    ),
    "return jnp.where(self._picks >= fresh, self._picks - start, -1)": (
        "every negative number is no class"
    ),
}


class Mutant(NamedTuple):
    """A change, as cosmic-ray numbers it, and where it is."""

    module: str
    operator: str
    occurrence: int
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line} {self.operator.partition('/')[2]}"


def mutation(
    number: int = MUTANTS, workers: int = 2, budget: float = BUDGET
) -> dict[str, Any]:
    """Changes, of which tests notice so many."""
    with tempfile.TemporaryDirectory() as folder:
        copies = [_copy(pathlib.Path(folder) / str(i)) for i in range(workers)]
        chosen = _sample(copies[0], number)
        # Most programs are those of the package as it is: they are compiled once, by a
        # run of all tests, without whose success no failure would say anything.
        environment = {
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        used = sorted({*itertools.chain(_OTHERS, *(tests for _, tests in _ROOMS))})
        if _fail(copies[0], (*used,), environment, timeout=None, workers=workers):
            raise RuntimeError("The tests fail without a change.")
        free: queue.Queue[pathlib.Path] = queue.Queue()
        for copy in copies:
            free.put(copy)

        began = time.monotonic()

        def tested(mutant: Mutant) -> bool | None:
            if time.monotonic() - began > budget:
                return None
            copy = free.get()
            try:
                return _is_noticed(copy, mutant, environment)
            finally:
                free.put(copy)

        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            noticed = list(pool.map(tested, chosen))
    pairs = zip(chosen, noticed, strict=True)
    found = {mutant: known for mutant, known in pairs if known is not None}
    missed = [mutant for mutant, known in found.items() if not known]
    same = {str(m): why for m in missed if (why := _why_equivalent(m)) is not None}
    number = len(found) - len(same)
    return {
        "changes": number,
        "noticed, %": round(100 * (len(found) - len(missed)) / number, 1),
        "not noticed": [str(m) for m in missed if str(m) not in same],
        "that change no result": [f"{where}: {why}" for where, why in same.items()],
        "holds": len(found) - len(missed) >= 0.9 * number,
    }


def _why_equivalent(mutant: Mutant) -> str | None:
    lines = (ROOT / mutant.module).read_text("utf-8").splitlines()
    line = lines[mutant.line - 1]
    if "_backends" in mutant.module and _CONSTANT.match(line):
        return "a size that was measured, or a bound with room: not what is computed"
    found = (why for text, why in _EQUIVALENT.items() if line.strip().startswith(text))
    return next(found, None)


def _copy(to: pathlib.Path) -> pathlib.Path:
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "__pycache__")
    shutil.copytree(ROOT, to, ignore=unwanted)
    return to


def _sample(copy: pathlib.Path, number: int) -> list[Mutant]:
    paths = ", ".join(f'"jaxlosses/{path}"' for path in _PATHS)
    (copy / "mutation.toml").write_text(
        f"[cosmic-ray]\nmodule-path = [{paths}]\ntimeout = {TIMEOUT}\n"
        'excluded-modules = []\ntest-command = ""\n'
        '[cosmic-ray.distributor]\nname = "local"\n',
        "utf-8",
    )
    _cosmic_ray(copy, "init", "mutation.toml", "mutation.sqlite")
    with sqlite3.connect(copy / "mutation.sqlite") as session:
        rows = session.execute(
            "SELECT module_path, operator_name, occurrence, start_pos_row "
            "FROM mutation_specs"
        ).fetchall()
    found = [Mutant(*row) for row in rows if row[1].partition("/")[2] in _OPERATORS]
    found.sort()
    return random.Random(0).sample(found, number)


def _cosmic_ray(copy: pathlib.Path, *arguments: str) -> None:
    command = [str(pathlib.Path(sys.executable).parent / "cosmic-ray"), *arguments]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)


def _is_noticed(
    copy: pathlib.Path, mutant: Mutant, environment: dict[str, str]
) -> bool:
    path = copy / mutant.module
    original = path.read_text("utf-8")
    place = (mutant.module, mutant.operator, str(mutant.occurrence))
    _cosmic_ray(copy, "apply", *place)
    assert path.read_text("utf-8") != original, mutant
    room = mutant.module.partition("/")[2]
    names = next(t for starts, t in _ROOMS if room.startswith(starts))
    noticed = any(_fail(copy, tests, environment) for tests in (names, _OTHERS))
    path.write_text(original, "utf-8")
    print("." if noticed else f"\n    not noticed: {mutant}", end="", flush=True)
    return noticed


def _fail(
    copy: pathlib.Path,
    names: tuple[str, ...],
    environment: dict[str, str],
    timeout: float | None = TIMEOUT,
    workers: int = 0,
) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-n", str(workers)]
    command += [f"tests/test_{name}.py" for name in names]
    try:
        done = subprocess.run(
            command,
            cwd=copy,
            env=os.environ | environment | {"PYTHONPATH": str(copy)},
            capture_output=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0
