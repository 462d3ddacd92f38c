"""Logits of some classes by id, beside the statistics of all others.

Everywhere here the classes are the last axis. An id of an example is -1 for none;
several of one example are different classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxlosses._math.classes import (
    Ids,
    Inputs,
    Mask,
    Spec,
    Values,
    accumulation_dtype,
    masked,
    total,
)
from jaxlosses._types import Size, Tree


def rest_of(spec: Spec, inputs: Inputs) -> Inputs:
    """The inputs of statistics of all classes but the picks."""
    *_, num_classes = shape = inputs.logits.shape
    assert inputs.picks is not None
    at = _local(spec, inputs.picks, num_classes)
    every = jnp.ones((*at.shape[:-1], num_classes), bool)
    kept = _of_rows(_without, every, at)
    if inputs.where is not None:
        kept = kept & jnp.broadcast_to(inputs.where, shape)
    return inputs._replace(where=kept, labels=None, picks=None)


def picked(spec: Spec, inputs: Inputs) -> Values:
    """The logits of the picks, as they are; 0 where there is none."""
    assert inputs.picks is not None
    z = spec.shards.sum(_taken(spec, inputs.logits, inputs.picks))
    return masked(inputs.counted, z.astype(accumulation_dtype(z.dtype)))


def exists(spec: Spec, where: Mask | None, picks: Ids) -> Mask:
    """Which picks are classes that exist, of ids that are classes."""
    if where is None:
        return picks >= 0
    rows = where.reshape(-1) if where.size == where.shape[-1] else where
    found = _taken(spec, rows.astype(jnp.int32), picks)
    return spec.shards.sum(found) > 0


def beside(spec: Spec, inputs: Inputs, rest: Inputs, found: Tree) -> Tree:
    """Statistics of the rest, and the picks; a rest of no probability has `-inf`."""
    is_some = rest.logits != -jnp.inf
    if rest.where is not None:
        is_some = is_some & rest.where
    some = total(spec, is_some.astype(jnp.int32)) > 0
    return with_rest(inputs, found, some, picked(spec, inputs))


def with_rest(inputs: Inputs, found: Tree, some: Mask, picks: Values) -> Tree:
    """The same where it is known whether the rest has a probability."""
    spread = jnp.where(some, found.spread, -jnp.inf)
    return found._replace(
        peak=jnp.where(some, found.peak, 0),
        spread=masked(inputs.counted, spread),
        nll=jnp.where(some & jnp.isnan(found.spread), jnp.nan, 0),
        picks=picks,
    )


def add(spec: Spec, d_logits: Values, picks: Ids, d_picks: Values) -> Values:
    """Cotangents of logits, with those of the picks."""
    at = _local(spec, picks, d_logits.shape[-1])
    return _of_rows(_added, d_logits, at, d_picks.astype(d_logits.dtype))


def _local(spec: Spec, picks: Ids, num_classes: Size) -> Ids:
    """Places in what is here of a row, and its size for what is elsewhere."""
    at = picks - spec.shards.first_id(num_classes)
    here = (picks >= 0) & (at >= 0) & (at < num_classes)
    return jnp.where(here, at, num_classes)


def _taken(spec: Spec, rows: Tree, picks: Ids) -> Tree:
    at = _local(spec, picks, rows.shape[-1])
    if rows.shape[-1] == 0:  # of which no slice can be taken
        return jnp.zeros(picks.shape, rows.dtype)
    if rows.ndim == 1:
        return rows.at[at].get(mode="fill", fill_value=0)
    return _of_rows(_entries, rows, at)


def _without(row: Mask, at: Ids) -> Mask:
    return row.at[at].set(False, mode="drop")


def _entries(row: Tree, at: Ids) -> Tree:
    return row.at[at].get(mode="fill", fill_value=0)


def _added(row: Values, at: Ids, more: Values) -> Values:
    return row.at[at].add(more, mode="drop")


def _of_rows(function: Callable[..., Tree], *arrays: Tree) -> Tree:
    """Of every row: batch axes that a partitioner knows to be such."""
    for _ in range(arrays[0].ndim - 1):
        function = jax.vmap(function)
    return function(*arrays)
