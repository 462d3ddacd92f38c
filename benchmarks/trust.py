"""What a long run may rely on: memory, compilations, bits, the package, the tests.

Each item runs in processes of its own, on one CPU device, and returns its figures and
whether they hold. The script also is what those processes run.
"""

import ast
import datetime
import functools
import hashlib
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
Figures = dict[str, Any]

# Long runs: of a jitted step, and of calls whose options change.
STEPS, CALLS = 20_000, 2_000
PYTHONS = ("python3.11", "python3.12", "python3.13")
STRATEGIES = ("dense", "tokens", "recompute", "vocab")


def _here(code: str, **environment: str) -> Any:
    """What an expression of this module is in a new process, of one CPU device."""
    command = [sys.executable, "-c", f"from benchmarks import trust; print({code})"]
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | environment
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return ast.literal_eval(done.stdout.splitlines()[-1])


# Long runs


def long_runs(steps: int = STEPS, calls: int = CALLS) -> Figures:
    """Growth of memory, arrays and compilations after the first tenth."""
    found = {
        f"{steps} jitted steps": _here(f"trust.jitted_steps({steps})"),
        f"{calls} eager calls, options changing": _here(f"trust.eager_calls({calls})"),
    }
    return found | {"holds": all(figures["holds"] for figures in found.values())}


def jitted_steps(steps: int) -> Figures:
    import jax
    import jax.numpy as jnp

    import jaxlosses as jl

    @jax.jit
    def step(factors: Any, smoothing: jax.Array) -> Any:
        def loss(factors: Any) -> Any:
            hidden, kernel = factors
            given = jl.softmax_cross_entropy_with_integer_labels(
                hidden @ kernel, ids, label_smoothing=smoothing, reduction="mean"
            )
            return given + jl.linear_softmax_cross_entropy(
                hidden, kernel, ids, strategy="tokens", reduction="mean"
            )

        value, gradients = jax.value_and_grad(loss)(factors)
        return jax.tree.map(lambda x, g: x - 1e-3 * g, factors, gradients), value

    keys = jax.random.split(jax.random.key(0))
    factors: Any = (
        jax.random.normal(keys[0], (64, 16)),
        jax.random.normal(keys[1], (16, 100)),
    )
    ids = jnp.arange(64) % 100

    def once(i: int) -> None:
        nonlocal factors
        factors, value = step(factors, jnp.float32(0.1 * (i % 7) / 7))
        if i % 100 == 0:
            assert jnp.isfinite(value)

    return _growth(once, steps)


def eager_calls(calls: int) -> Figures:
    import jax
    import jax.numpy as jnp

    import jaxlosses as jl

    logits = jax.random.normal(jax.random.key(0), (32, 100))
    kernel = jax.random.normal(jax.random.key(1), (100, 50))
    ids = jnp.arange(32) % 50
    integer = jl.softmax_cross_entropy_with_integer_labels
    entropy = functools.partial(jl.softmax_log_probs, return_entropy=True)

    def once(i: int) -> None:
        value = i / calls
        cap = (None, 10.0, 30.0)[i % 3]
        jax.block_until_ready(
            [
                integer(logits, ids, label_smoothing=value, z_loss=1e-3 * value),
                jl.linear_softmax_cross_entropy(
                    logits, kernel, ids, logit_softcap=cap, logit_scale=1 + value
                ),
                entropy(logits, ids, logit_scale=1 + value, logit_softcap=cap),
                jl.softmax_kl_divergence(logits, -logits, temperature=1 + value),
            ]
        )

    return _growth(once, calls)


def _growth(once: Callable[[int], None], times: int) -> Figures:
    import jax

    compiled = 0

    def count(event: str, seconds: float, **_: Any) -> None:
        nonlocal compiled
        compiled += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)
    first = max(12, times // 10)  # everything has been compiled, the heap is filled
    for i in range(first):
        once(i)
    before = compiled, len(jax.live_arrays()), _resident()
    for i in range(first, times):
        once(i)
    after = compiled, len(jax.live_arrays()), _resident()
    grown = [b - a for a, b in zip(before, after, strict=True)]
    return {
        "compilations at first": before[0],
        "compilations later": grown[0],
        "more live arrays": grown[1],
        "more MiB resident": round(grown[2] / 2**20, 2),
        "holds": grown[0] == 0 and grown[1] <= 0 and grown[2] < 16 * 2**20,
    }


def _resident() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text("utf-8").split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


# Determinism


def determinism() -> Figures:
    """Bits of losses and gradients, of every strategy, between runs."""
    reference, again = _here("[trust.bits(), trust.bits()]")
    other = {
        "again in the process": again,
        "in another process": _here("trust.bits()"),
        "on one thread": _here("trust.bits(threads=1)"),
        "beside other work in the program": _here("trust.bits(beside=True)"),
        "in other chunks": _here("trust.bits(workspace=2**16)"),
        "on two devices": _here("trust.bits(devices=2)"),
    }
    changed = {
        where: [name for name in reference if found[name] != reference[name]]
        for where, found in other.items()
    }
    figures: Figures = {
        f"other bits {where}": ", ".join(names) or "none"
        for where, names in changed.items()
    }
    # XLA:CPU sums the products of the last one in an order that depends on threads.
    apart = [n for n in changed["on one thread"] if not n.endswith("by kernel")]
    same = ("again in the process", "in another process")
    return figures | {"holds": not apart and not any(changed[n] for n in same)}


def bits(
    workspace: int | None = None,
    threads: int | None = None,
    devices: int = 1,
    beside: bool = False,
) -> dict[str, str]:
    """A hash of each loss and gradient: of every strategy, and of given logits.

    `beside` has the program compute something else of the same arrays as well.
    """
    if threads is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    import jax
    import numpy as np

    import jaxlosses as jl

    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((600, 64), np.float32)
    kernel = rng.standard_normal((64, 3000), np.float32) / 8
    ids = rng.integers(3000, size=600, dtype=np.int32)
    logits = rng.standard_normal((600, 3000), np.float32)
    if devices > 1:
        automatic = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((devices,), ("data",), axis_types=automatic)
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        hidden, ids, logits = jax.device_put((hidden, ids, logits), rows)

    def fused(hidden: Any, kernel: Any, strategy: str) -> Any:
        return jl.linear_softmax_cross_entropy(
            hidden,
            kernel,
            ids,
            strategy=strategy,
            workspace_bytes=workspace,
            reduction="mean",
        )

    def given(logits: Any) -> Any:
        return jl.softmax_cross_entropy_with_integer_labels(
            logits, ids, reduction="mean"
        )

    found = {}
    losses: dict[str, Any] = {
        s: functools.partial(fused, strategy=s) for s in STRATEGIES
    }
    for name, loss in (losses | {"logits": given}).items():
        factors = (logits,) if name == "logits" else (hidden, kernel)
        by = ("logits",) if name == "logits" else ("hidden", "kernel")

        @jax.jit
        def program(*factors: Any, loss: Any = loss) -> Any:
            places = tuple(range(len(factors)))
            other = jax.nn.relu(factors[0]).sum() if beside else 0
            return jax.value_and_grad(loss, places)(*factors), other

        (value, gradients), _ = program(*factors)
        parts = {"loss": value} | {
            f"by {n}": g for n, g in zip(by, gradients, strict=True)
        }
        for part, array in parts.items():
            content = np.asarray(array).tobytes()
            found[f"{name} {part}"] = hashlib.sha256(content).hexdigest()[:16]
    return found


# The package


def packaging() -> Figures:
    """Wheel and source distribution, in an environment with nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder)
        _run(sys.executable, "-m", "build", "--outdir", str(out), str(ROOT))
        (wheel,) = out.glob("*.whl")
        (source,) = out.glob("*.tar.gz")
        names = _wheel_names(wheel)
        _run(sys.executable, "-m", "venv", str(out / "env"))
        python = str(out / "env" / "bin" / "python")
        _run(python, "-m", "pip", "install", "--quiet", str(wheel), cwd=out)
        checked = _run(python, "-m", "pip", "check", cwd=out).strip()
        smoke = "import jaxlosses as jl; print(jl.__file__, jl.softmax([.1, .3]))"
        printed = _run(python, "-c", smoke, cwd=out)
        _run(python, "-m", "pip", "install", "--quiet", "optax", cwd=out)
        seconds = {
            name: min(_import_seconds(python, name, out) for _ in range(3))
            for name in ("jax", "jaxlosses", "optax")
        }
        touched = ast.literal_eval(_run(python, "-c", AUDIT, cwd=out))
        sizes = {
            "wheel, KiB": round(wheel.stat().st_size / 1024),
            "source distribution, KiB": round(source.stat().st_size / 1024),
        }
    foreign = [n for n in names if not re.match(r"jaxlosses[/-]", n)]
    added = {name: round(seconds[name] - seconds["jax"], 2) for name in seconds}
    return sizes | {
        "files in the wheel": len(names),
        "of them not the package's": foreign,
        "pip check": checked,
        "import, s beyond jax": added["jaxlosses"],
        "import of optax, s beyond jax": added["optax"],
        "network, processes and writes at import": touched,
        "holds": not foreign
        and not touched
        and checked == "No broken requirements found."
        and "site-packages" in printed
        and "0.45016602" in printed,
    }


# What the import does beyond reading modules. Those of others come first.
AUDIT = """
import sys
import chex, jax, jax.export, jaxtyping, optax
touched = []
def hook(event, args):
    writes = event == "open" and args[1] is not None and set(str(args[1])) & set("wax+")
    started = event.split(".")[0] in ("socket", "subprocess", "ftplib", "urllib")
    made = event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove",
                     "os.mkdir", "os.rename", "os.putenv")
    if writes and ".pyc" in str(args[0]):
        return  # Python keeps what it compiled
    if writes or started or made:
        touched.append(event)
sys.addaudithook(hook)
import jaxlosses, jaxlosses.testing
print(touched)
"""


def _wheel_names(wheel: pathlib.Path) -> list[str]:
    with zipfile.ZipFile(wheel) as opened:
        return opened.namelist()


def _import_seconds(python: str, name: str, folder: pathlib.Path) -> float:
    began = time.monotonic()
    _run(python, "-c", f"import {name}", cwd=folder)
    return time.monotonic() - began


def _run(*command: str, cwd: pathlib.Path = ROOT) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)}: {(done.stdout + done.stderr)[-2000:]}"
        )
    return done.stdout


# The tests


def _pytest(*arguments: str) -> tuple[bool, str]:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "-p"]
    command += ["no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        failed = re.findall("^(?:FAILED|ERROR|E ).*", done.stdout, re.MULTILINE)
        print(*failed, sep="\n")
    return done.returncode == 0, done.stdout + done.stderr


def _counted(text: str) -> str:
    """The last line of a run of pytest, without its time."""
    found = re.findall(r"^=*\s*(\d+ (?:passed|failed).*?) in ", text, re.MULTILINE)
    return found[-1] if found else "none"


def properties() -> Figures:
    """Random calls, the long profile."""
    statistics = "--hypothesis-show-statistics"
    long = ("--hypothesis-profile", "long", statistics)
    held, text = _pytest("tests/test_properties.py", *long)
    drawn = sum(map(int, re.findall(r"(\d+) passing", text)))
    failing = sum(map(int, re.findall(r"(\d+) failing", text)))
    return {
        "claims": _counted(text),
        "calls drawn": drawn,
        "failing": failing,
        "holds": held,
    }


def hostile() -> Figures:
    """Wrong calls, of every public function and argument."""
    held, text = _pytest("tests/test_hostile.py", "tests/test_checks.py")
    code = "sum(len(m.WRONG[a]) for _, a in m.TAKEN)"
    count = _run(
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, 'tests'); import test_hostile as m; "
        f"print({code})",
    )
    return {"tests": _counted(text), "wrong calls": int(count), "holds": held}


def processes() -> Figures:
    """Two processes, of which one is killed in every phase of a step."""
    held, text = _pytest("tests/test_processes.py", "-m", "")
    return {"tests": _counted(text), "holds": held}


def coverage() -> Figures:
    """Lines and branches of the package that the tests run."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "coverage.json"
        kinds = ("--cov", "jaxlosses", "--cov-branch", f"--cov-report=json:{path}")
        held, text = _pytest("tests", *kinds)
        # The command line, and what only a longer sweep has: explicit axes.
        names = ("main", "explicit_mesh")
        more = [f"tests/test_{name}.py" for name in names]
        also, longer = _pytest(*more, "-m", "long", "--cov-append", *kinds)
        report = json.loads(path.read_text("utf-8"))
    total = report["totals"]
    files = {
        name: round(found["summary"]["percent_covered"], 1)
        for name, found in report["files"].items()
        if found["summary"]["percent_covered"] < 98
    }
    return {
        "tests": f"{_counted(text)}; {_counted(longer)}",
        "lines and branches, %": round(total["percent_covered"], 2),
        "lines": f"{total['covered_lines']} of {total['num_statements']}",
        "branches": f"{total['covered_branches']} of {total['num_branches']}",
        "modules below 98 %": files,
        "holds": held and also and total["percent_covered"] >= 98,
    }


def versions() -> Figures:
    """The tests with the oldest JAX, and with the newest of every Python here."""
    found, holds = {}, True
    for python, jax in ((PYTHONS[0], "oldest"), *((p, "newest") for p in PYTHONS)):
        if shutil.which(python) is None:
            found[python] = "not here"
            continue
        command = ["make", "versions", f"PYTHONS={python}", f"JAX={jax}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        print(python, jax, _counted(done.stdout), flush=True)
        name = "import jax; print(jax.__version__)"
        version = _run(f"build/{python}-{jax}/bin/python", "-c", name).strip()
        found[f"{python}, JAX {version}, {jax} of all"] = _counted(done.stdout)
        holds = holds and done.returncode == 0
    return found | {"holds": holds}


def mutation() -> Figures:
    """Small changes to the package that the tests notice."""
    from benchmarks import mutation

    return mutation.mutation()


ITEMS: dict[str, Callable[[], Figures]] = {
    "hostile calls": hostile,
    "long runs": long_runs,
    "determinism": determinism,
    "packaging": packaging,
    "properties": properties,
    "processes": processes,
    "coverage": coverage,
    "versions": versions,
    "mutation": mutation,
}


def inspect(names: Iterable[str], out: pathlib.Path) -> pathlib.Path:
    """Runs items, and returns the path of the file, which is written after each."""
    from benchmarks import run

    environment = run.environment("cpu")
    versions = {"python": platform.python_version(), "jax": metadata.version("jax")}
    path = out / f"trust-jax{versions['jax']}.json"
    items = json.loads(path.read_text("utf-8"))["items"] if path.exists() else {}
    for name in names:
        began = time.monotonic()
        print(f"{name} ...", end=" ", flush=True)
        figures = ITEMS[name]()
        seconds = round(time.monotonic() - began)
        print(f"{'holds' if figures['holds'] else 'DOES NOT HOLD'}, {seconds} s")
        for key, value in figures.items():
            print(f"    {key}: {value}")
        items[name] = figures | {"seconds": seconds, "revision": run.revision()}
        result = {
            "preset": "trust",
            "only": "",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "environment": environment,
            "versions": versions,
            "items": {name: items[name] for name in ITEMS if name in items},
            "cases": [],
        }
        run.write(result, path)
    return path
