"""Log-probabilities, entropies and a loss of both, of all processes or of one.

    python tests/policy_in_parts.py HOST:PORT PROCESS

runs one of two processes with two CPU devices each. Without arguments there is one
process with one device.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlosses as jl

SPLITS = (P("batch", None), P(None, "classes"), P("batch"), P("batch"))


def arguments() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(16, 8)), rng.normal(size=(8, 24))
    labels = rng.integers(0, 24, 16)
    labels[3:6] = -1
    old = rng.normal(size=16) - 3
    return (*(a.astype("float32") for a in (hidden, kernel)), labels, np.float32(old))


def policy(rows: jl.Rows, old: jax.Array) -> jax.Array:
    assert rows.entropy is not None
    return -jnp.minimum(jnp.exp(-rows.nll - old), 1.2) - 0.1 * rows.entropy


def results(*given: Any) -> list[float]:
    """The sums of each result and of each gradient, weighted to tell entries apart."""

    def told_apart(a: jax.Array) -> jax.Array:
        for _ in range(a.ndim):
            a = jnp.cos(jnp.arange(a.shape[-1])) @ jnp.moveaxis(a, -1, 0)
        return a

    @jax.jit
    def run(hidden: Any, kernel: Any, labels: Any, old: Any) -> Any:
        def of_rows(hidden: Any, kernel: Any) -> Any:
            how = {"uses_entropy": True, "ignore_index": -1, "strategy": "tokens"}
            return jl.linear_softmax_loss(
                policy, hidden, kernel, labels, old, workspace_bytes=500, **how
            )

        def of_each(hidden: Any, kernel: Any) -> Any:
            log_probs, entropies = jl.linear_softmax_log_probs(
                *(hidden, kernel, labels),
                return_entropy=True,
                ignore_index=-1,
                strategy="recompute",
                workspace_bytes=500,
            )
            return told_apart(log_probs) + 0.3 * told_apart(entropies)

        found = [
            jax.value_and_grad(f, (0, 1))(hidden, kernel) for f in (of_rows, of_each)
        ]
        return jax.tree.map(told_apart, found)

    return [float(x) for x in jax.tree.leaves(run(*given))]


def main(address: str = "", process: str = "0") -> None:
    given: Any = arguments()
    if address:
        jax.config.update("jax_num_cpu_devices", 2)
        jax.distributed.initialize(
            coordinator_address=address, num_processes=2, process_id=int(process)
        )
        mesh = jax.make_mesh((2, 2), ("batch", "classes"), (AxisType.Auto,) * 2)
        given = [
            jax.make_array_from_callback(
                a.shape, NamedSharding(mesh, split), a.__getitem__
            )
            for a, split in zip(given, SPLITS, strict=True)
        ]
    print("results", results(*given))


if __name__ == "__main__":
    main(*sys.argv[1:])
