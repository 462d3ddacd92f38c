"""Train a language model with its vocabulary split over devices, by any processes.

One process, with eight CPU devices:

    python notebooks/sharded_language_model.py --cpu-devices 8

The same run by two processes on one machine, in two terminals, with I = 0 and 1:

    python notebooks/sharded_language_model.py --cpu-devices 4 \\
        --coordinator 127.0.0.1:9876 --processes 2 --process I

Where JAX finds the other processes itself (Cloud TPU, Slurm, Open MPI), each of them
runs

    python notebooks/sharded_language_model.py --distributed --vocabulary-axis 8 \\
        --checkpoints /a/folder/that/all/see

With --checkpoints, a run goes on from the last step that was saved there. A process
that dies ends the others with an error: start all of them again.
"""

import argparse
import functools
import sys
import sysconfig
import zlib
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformer import Transformer

import jaxlosses as jl

VOCABULARY, CONTEXT, LAYERS, WIDTH, HEADS = 2048, 64, 2, 64, 2
BATCH = 16
CHUNKS = 4  # small as this model is, its logits are cut as those of a large one are


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=30)
    add("--vocabulary-axis", type=int, default=4, help="devices that share the classes")
    add("--checkpoints", type=Path, help="folder, seen by all processes")
    add("--save-every", type=int, default=10, metavar="STEPS")
    add("--cpu-devices", type=int, help="of this process, on a machine without others")
    add("--distributed", action="store_true", help="find the other processes")
    add("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    add("--processes", type=int, help="how many there are")
    add("--process", type=int, help="which one this is, from 0")
    add("--timeout", type=int, default=60, help="seconds until silence means death")
    return parser.parse_args(arguments)


def connect(options: argparse.Namespace) -> None:
    """Before anything asks JAX for its devices."""
    if options.cpu_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    if options.distributed or options.coordinator is not None:
        jax.distributed.initialize(
            coordinator_address=options.coordinator,
            num_processes=options.processes,
            process_id=options.process,
            heartbeat_timeout_seconds=options.timeout,
            shutdown_timeout_seconds=options.timeout,
        )


def read_tokens() -> np.ndarray:
    """Part of the source of Python's standard library: (windows, CONTEXT + 1)."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text("utf-8") for path in sorted(library.glob("*.py"))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    stream = np.concatenate([e.ids for e in tokenizer.encode_batch(texts)])
    windows = len(stream) // (CONTEXT + 1)
    stream = stream[: windows * (CONTEXT + 1)].astype(np.int32)
    # Another Python has another standard library.
    checksum = np.array(zlib.crc32(stream.tobytes()))
    multihost_utils.assert_equal(checksum, "The processes have read different texts.")
    return stream.reshape(windows, CONTEXT + 1)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    connect(options)
    tokens = read_tokens()

    # Devices that are close to each other share the classes: they exchange sums for
    # each chunk, and the gradient of the features. Over the other axis go gradients of
    # parameters, once a step.
    split = options.vocabulary_axis
    mesh = jax.make_mesh(
        (jax.device_count() // split, split),
        ("data", "vocabulary"),
        axis_types=(AxisType.Auto,) * 2,
    )

    def place(array):
        """Rows of the embedding and of its moments are split, all else is copied."""
        rows = array.shape[:1] == (VOCABULARY,)
        return NamedSharding(mesh, P("vocabulary") if rows else P())

    def new_model():
        return Transformer(
            vocabulary=VOCABULARY,
            context=CONTEXT,
            layers=LAYERS,
            width=WIDTH,
            heads=HEADS,
            rngs=nnx.Rngs(0),
        )

    graph = nnx.graphdef(nnx.eval_shape(new_model))
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3, b2=0.95))

    def new_state():
        parameters = nnx.state(new_model())
        return {"parameters": parameters, "optimizer": adam.init(parameters)}

    shapes = jax.eval_shape(new_state)
    shardings = jax.tree.map(place, shapes)

    # By hand, so that each device adds up its own chunks, and the gradient of the
    # embedding is summed over the data axis once.
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("data"), P("vocabulary"), P("data")),
        out_specs=P(),
    )
    def head(hidden, embedding, labels):
        mean = jl.linear_softmax_cross_entropy(
            hidden,
            embedding,
            labels,
            kernel_layout="vd",
            strategy="tokens",
            workspace_bytes=labels.size * embedding.shape[0] * 4 // CHUNKS,
            reduction="mean",
            axis_name="vocabulary",
        )
        # Every device has as many tokens that count.
        return jax.lax.pmean(mean, "data")

    def mean_loss(parameters, inputs, labels):
        model = nnx.merge(graph, parameters)
        return head(model(inputs), model.tokens.embedding[...], labels)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings, None))
    def train_step(state, inputs, labels):
        parameters = state["parameters"]
        loss, gradients = jax.value_and_grad(mean_loss)(parameters, inputs, labels)
        updates, optimizer = adam.update(gradients, state["optimizer"], parameters)
        parameters = optax.apply_updates(parameters, updates)
        return {"parameters": parameters, "optimizer": optimizer}, loss

    def batch(step):
        """Each process makes the part that its devices hold."""
        chosen = np.random.default_rng(step).choice(len(tokens), BATCH, replace=False)
        windows = tokens[chosen]
        sharding = NamedSharding(mesh, P("data"))
        return [
            jax.make_array_from_callback(part.shape, sharding, part.__getitem__)
            for part in (windows[:, :-1], windows[:, 1:])
        ]

    first, manager = 0, None
    if options.checkpoints is not None:
        manager = ocp.CheckpointManager(
            options.checkpoints.absolute(),
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=options.save_every, max_to_keep=2
            ),
        )
        first = manager.latest_step() or 0
    if first:
        like = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            shapes,
            shardings,
        )
        state = manager.restore(first, args=ocp.args.StandardRestore(like))
    else:
        state = jax.jit(new_state, out_shardings=shardings)()

    speaks = jax.process_index() == 0
    if speaks:
        print(f"{jax.process_count()} processes, mesh {dict(mesh.shape)}, from {first}")
    for step in range(first, options.steps):
        state, loss = train_step(state, *batch(step))
        if speaks:
            print(f"step {step:4d}  loss {float(loss):.7f}", flush=True)
        if manager is not None:
            manager.save(step + 1, args=ocp.args.StandardSave(state))
    if manager is not None:
        manager.close()


if __name__ == "__main__":
    main(sys.argv[1:])
