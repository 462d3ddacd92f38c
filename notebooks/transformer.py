"""The small transformer that the language models here train, in Flax NNX."""

import jax
import jax.numpy as jnp
from flax import nnx


class Block(nnx.Module):
    """Attention and a hidden layer, with the normalisation in front of each."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        def linear(inputs, outputs):
            return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)

        self.heads = heads
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.queries_keys_values = linear(width, 3 * width)
        self.attention_output = linear(width, width)
        self.hidden_norm = nnx.RMSNorm(width, rngs=rngs)
        self.hidden = linear(width, 4 * width)
        self.hidden_output = linear(4 * width, width)

    def __call__(self, x):
        heads = self.queries_keys_values(self.attention_norm(x))
        width = x.shape[-1]
        shape = (*x.shape[:-1], 3 * self.heads, width // self.heads)
        queries, keys, values = jnp.split(heads.reshape(shape), 3, axis=-2)
        mixed = jax.nn.dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.attention_output(mixed.reshape(x.shape))
        return x + self.hidden_output(nnx.gelu(self.hidden(self.hidden_norm(x))))


class Transformer(nnx.Module):
    """From tokens to the features that go into the output layer.

    The output layer is tied: its kernel is `tokens.embedding`, one row per token.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        context: int,
        layers: int,
        width: int,
        heads: int,
        rngs: nnx.Rngs,
    ):
        def table(rows):
            small = nnx.initializers.normal(0.02)
            return nnx.Embed(rows, width, embedding_init=small, rngs=rngs)

        self.tokens = table(vocabulary)
        self.positions = table(context)
        self.blocks = nnx.Sequential(
            *(Block(width, heads, rngs) for _ in range(layers))
        )
        self.norm = nnx.RMSNorm(width, rngs=rngs)

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        return self.norm(self.blocks(x))
