"""What is measured, and the inputs. NumPy alone: the workers have no JAX."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np

FORWARD = "forward"
VALUE_AND_GRADIENT = "value-and-gradient"
STEP = "step"
FUSED = "fused"
FIRST_CALL = "first-call"
FUSED_FIRST_CALL = "fused-first-call"
# Ceilings of the device: nothing is compared with them in their own case.
COPY = "copy"
MATMUL = "matmul"

OURS = "jaxlosses"
MARGIN = 20.0  # nats between the label and the runner-up in a confident row
CONTROL, BEHIND = 32, 15.0  # classes that a trained model never predicts
MARGINS = tuple(float(nats) for nats in range(-10, 81))
# Values drawn per input, 64 MiB of float32. The rows of a larger one repeat.
_POOL = 2**24
# An input smaller than this has a twin, and calls alternate between the two.
_SINGLE = 2**28

INPUTS = {
    "random": "logits normal(0, 1), labels uniform",
    "confident": (
        "as random, but in 9 of 10 rows the label's logit exceeds all others by "
        f"{MARGIN:g}"
    ),
    "margins": (
        "as random, but the label's logit exceeds all others by "
        f"{MARGINS[0]:g} to {MARGINS[-1]:g}, row by row"
    ),
    "trained": (
        f"as confident, and the first {CONTROL} classes, as control tokens, "
        f"{BEHIND:g} below the others"
    ),
}
OPTIONS = (
    *("plain", "dense labels", "smoothing", "z-loss", "cap", "scale", "mask"),
    *("class weights", "statistics", "entropy", "forward KL"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One table entry: every contestant runs it, in turns.

    Attributes:
        model: where logits of this shape come from.
        batch: rows.
        classes: columns.
        dtype: of logits, and of hidden states and kernel in a step.
        inputs: a key of `INPUTS`.
        what: `FORWARD` returns one loss per row, `VALUE_AND_GRADIENT` is of their
            mean, `STEP` has the logits come from a matmul and updates both factors,
            `FUSED` is value and gradient of the mean by both factors, `FIRST_CALL` is
            to trace, lower and compile `VALUE_AND_GRADIENT`, and `FUSED_FIRST_CALL`
            the same of `FUSED`.
        features: inner size of that matmul, so small that it does not dominate.
        workspace_bytes: what our fused loss is given, or None for its default.
        option: one of `OPTIONS`, compared with what people write by hand.
    """

    model: str
    batch: int
    classes: int
    dtype: str
    inputs: str
    what: str
    features: int = 64
    workspace_bytes: int | None = None
    option: str = ""

    @property
    def shape(self) -> str:
        return f"{self.batch}x{self.classes}"

    @property
    def name(self) -> str:
        parts = (self.model, self.shape, self.dtype, self.inputs, self.what)
        return " ".join(filter(None, (*parts, self.option)))

    @property
    def logits_bytes(self) -> int:
        return self.batch * self.classes * (2 if self.dtype == "bfloat16" else 4)

    @property
    def turns(self) -> int:
        """How many inputs the calls alternate between."""
        return 2 if self.logits_bytes < _SINGLE else 1

    @property
    def pool_rows(self) -> int:
        """Rows that are drawn; the others repeat them."""
        return min(self.batch, math.ceil(_POOL / self.classes))

    @property
    def repeats(self) -> int:
        return math.ceil(self.batch / self.pool_rows)

    def shrunk(self, divisor: int) -> "Case":
        """A try-out of the same, every size divided."""
        sizes = ("batch", "classes", "features")
        smaller = {name: max(1, getattr(self, name) // divisor) for name in sizes}
        return dataclasses.replace(self, **smaller)

    def pool(self, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """The drawn rows: float32 logits, still to be rounded, and int32 labels."""
        return _draw(self.pool_rows, self.classes, self.inputs, turn)

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Hidden states and kernel whose product is of order 1, in float32."""
        rng = np.random.default_rng((self.batch, self.classes, self.features))
        hidden = rng.standard_normal((self.batch, self.features), np.float32)
        kernel = rng.standard_normal((self.features, self.classes), np.float32)
        return hidden, kernel / np.float32(math.sqrt(self.features))


def groups(case: Case) -> dict[str, np.ndarray]:
    """Which of the drawn rows one error is given for, by its name."""
    rows = np.arange(case.pool_rows)
    if case.inputs == "margins":
        own = rows % len(MARGINS)
        return {f"{nats:g}": own == i for i, nats in enumerate(MARGINS)}
    sure = (rows % 10 != 0) & (case.inputs in ("confident", "trained"))
    return {"order 1": ~sure, "confident": sure}


@functools.lru_cache(maxsize=2)
def _draw(
    rows: int, classes: int, inputs: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((rows, classes, seed))
    logits = rng.standard_normal((rows, classes), np.float32)
    labels = rng.integers(classes, size=rows, dtype=np.int32)
    if inputs == "trained":
        logits[:, :CONTROL] -= BEHIND
        labels = np.maximum(labels, min(CONTROL, classes - 1), dtype=np.int32)
    if inputs != "random":
        chosen = np.arange(rows)
        leads = np.resize(np.float32(MARGINS), rows)
        if inputs != "margins":
            chosen, leads = chosen[chosen % 10 != 0], np.float32(MARGIN)
        logits[chosen, labels[chosen]] = -np.inf
        logits[chosen, labels[chosen]] = logits[chosen].max(axis=-1) + leads
    return logits, labels


@dataclasses.dataclass(frozen=True)
class Preset:
    """A run.

    Attributes:
        cases: most valuable first.
        peers: who is compared by default.
        device: `"cpu"` or `"gpu"`.
        budget: seconds of timed calls per case, for all contestants together.
        time_limit: seconds after which no further case is started.
    """

    cases: tuple[Case, ...]
    peers: tuple[str, ...]
    device: str
    budget: float
    time_limit: float = math.inf


_MODELS = (
    ("digits, MNIST", 65536, 10),
    ("CIFAR-100", 65536, 128),
    ("ImageNet", 16384, 1000),
    ("10k words", 4096, 10000),
    ("Llama-2", 2048, 32000),
    ("GPT-2", 2048, 50257),
    ("Llama-3", 1024, 128256),
)
_RAGGED = (("Llama-3, ragged", 1024, 128255), ("Llama-3, ragged", 1023, 128257))
_DTYPES = ("float32", "bfloat16")
_LOSSES = (FORWARD, VALUE_AND_GRADIENT)


def _cpu() -> Iterator[Case]:
    for dtype in _DTYPES:
        for shape in _MODELS:
            for inputs in ("random", "confident"):
                for what in _LOSSES:
                    yield Case(*shape, dtype, inputs, what)
            yield Case(*shape, dtype, "random", STEP)
        for shape in _RAGGED:
            for what in _LOSSES:
                yield Case(*shape, dtype, "random", what)


# Of a try-out, of a last batch, of a token at a time.
_SMALL = (
    *((8, 10), (32, 10), (4096, 32), (4096, 64), (128, 100), (512, 100)),
    *((32, 1000), (256, 1000), (8, 4096), (256, 4096), (8, 32000), (8, 128256)),
)


def _small() -> Iterator[Case]:
    for dtype in _DTYPES:
        for shape in _SMALL:
            for what in _LOSSES:
                yield Case("small", *shape, dtype, "random", what)


def _options() -> Iterator[Case]:
    shapes = (("Llama-2", 2048, 32000), ("ImageNet", 4096, 1000), ("", 256, 1000))
    for option in OPTIONS:
        for model, *size in shapes:
            for what in (*_LOSSES, FIRST_CALL):
                yield Case(model, *size, "float32", "random", what, option=option)
    for dtype in _DTYPES:
        for what in _LOSSES:
            shape = shapes[0]
            yield Case(*shape, dtype, "trained", what, option="plain")


def _gpu() -> Iterator[Case]:
    yield Case("1 GiB", 16384, 16384, "float32", "random", COPY)
    yield Case("square", 8192, 8192, "bfloat16", "random", MATMUL)
    yield from fused_on_gpu()
    shapes = (
        ("Llama-2", 32768, 32000),
        ("GPT-2", 8192, 50257),
        ("ImageNet", 65536, 1000),
    )
    for what in (VALUE_AND_GRADIENT, FORWARD):
        for shape in shapes:
            for dtype in ("bfloat16", "float32"):
                yield Case(*shape, dtype, "random", what)
    for shape in shapes:
        yield Case(*shape, "float32", "confident", FORWARD)


def fused_on_gpu() -> Iterator[Case]:
    for head in (
        ("Llama-3", 8192, 128256, 4096),
        ("Gemma-2", 8192, 256000, 2304),
        ("Llama-2", 16384, 32000, 4096),
    ):
        yield _fused(*head, "bfloat16")


def fused_grid() -> Iterator[Case]:
    """Heads of large models, with few tokens and many."""
    sizes = itertools.product(
        (2048, 8192, 32768), (32000, 128256, 256000), (2048, 4096)
    )
    for batch, classes, features in sizes:
        yield _fused("grid", batch, classes, features, "bfloat16")


def _fused(model: str, batch: int, classes: int, features: int, dtype: str) -> Case:
    return Case(model, batch, classes, dtype, "random", FUSED, features)


# Along V the batch is fixed, along B the classes are, and the workspace along both.
FUSED_BATCH, FUSED_CLASSES, FUSED_FEATURES = 1024, 32768, 128
FUSED_WORKSPACE = 2**23


def _linear() -> Iterator[Case]:
    for dtype in _DTYPES:
        yield _fused("Llama-2", 1024, 32000, 512, dtype)
        yield _fused("GPT-2", 2048, 50257, 512, dtype)
        yield _fused("Llama-3", 4096, 128256, 256, dtype)
    for shape in (("Llama-2", 1024, 32000, 512), ("", 256, 1000, 64)):
        yield dataclasses.replace(_fused(*shape, "float32"), what=FUSED_FIRST_CALL)
    along_v = (("V", FUSED_BATCH, 2**power) for power in range(13, 18))
    along_b = (("B", 2**power, FUSED_CLASSES) for power in range(8, 13))
    for shape in (*along_v, *along_b):
        case = _fused(*shape, FUSED_FEATURES, "float32")
        yield dataclasses.replace(case, workspace_bytes=FUSED_WORKSPACE)


GROWTH_BATCH, GROWTH_CLASSES = 256, 8192


def _growth() -> Iterator[Case]:
    for dtype in _DTYPES:
        for what in _LOSSES:
            for power in range(10, 19):
                yield Case("V", GROWTH_BATCH, 2**power, dtype, "random", what)
            for power in range(6, 14):
                yield Case("B", 2**power, GROWTH_CLASSES, dtype, "random", what)


def _accuracy() -> Iterator[Case]:
    for dtype in _DTYPES:
        yield Case("margins", 11 * len(MARGINS), 1000, dtype, "margins", FORWARD)


def _quick() -> Iterator[Case]:
    shape = ("digits, MNIST", 96, 10)
    yield Case(*shape, "float32", "confident", FORWARD)
    yield Case(*shape, "bfloat16", "random", VALUE_AND_GRADIENT)
    yield Case(*shape, "float32", "random", STEP, features=4)
    yield Case(*shape, "float32", "random", FUSED, features=4)


_CPU_PEERS = ("optax", "jax.nn", "torch", "torch.compile", "tensorflow")
PRESETS = {
    "cpu": Preset(tuple(_cpu()), _CPU_PEERS, "cpu", budget=4.0),
    "accuracy": Preset(tuple(_accuracy()), _CPU_PEERS, "cpu", budget=0.1),
    "options": Preset(tuple(_options()), (), "cpu", budget=2.0),
    "small": Preset(tuple(_small()), ("optax",), "cpu", budget=1.0),
    "gpu": Preset(
        tuple(_gpu()),
        ("optax", "jax.nn", "torch", "torch.compile", "tokamax", "jax-cce"),
        "gpu",
        budget=4.0,
        time_limit=510.0,
    ),
    "linear": Preset(
        tuple(_linear()), ("optax", "tokamax", "jax-cce"), "cpu", budget=15.0
    ),
    "growth": Preset(tuple(_growth()), ("optax",), "cpu", budget=1.5),
    "quick": Preset(tuple(_quick()), ("optax",), "cpu", budget=0.1),
}
