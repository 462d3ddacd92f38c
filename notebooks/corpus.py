"""The text that the language models here learn: the source of Python's library.

Every machine that runs this has it. Files are cut into windows of tokens, and losses
are counted in bits per byte, which can be compared between vocabularies.
"""

import math
import sysconfig
import zlib
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<end of file>"
IGNORED = -100
# The tables of character sets in `encodings` resemble each other so much that one in
# the training set gives away another.
LEFT_OUT = {"dist-packages", "site-packages", "encodings"}


def read(quick):
    """Texts to train on, and texts that are held out.

    A checksum decides which files are held out, and so the split is the same on every
    run, and two copies of a file are on the same side of it.
    """
    left_out = LEFT_OUT | ({"idle_test", "test", "tests"} if quick else set())
    library = Path(sysconfig.get_path("stdlib"))
    train, held_out = [], []
    for path in sorted(library.rglob("*.py")):
        if not left_out.isdisjoint(path.relative_to(library).parts):
            continue
        content = path.read_bytes()
        try:
            text = content.decode()
        except UnicodeDecodeError:  # a test of another encoding
            continue
        remainder = zlib.crc32(content) % 64
        if remainder < 2:
            held_out.append(text)
        elif not quick or remainder < 20:
            train.append(text)
    return train, held_out


def new_tokenizer(texts, vocabulary):
    """Byte-pair encoding: every text can be written in its tokens and read back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == vocabulary
    return tokenizer


def windows(tokenizer, texts, context):
    """Inputs and labels of shape (windows, context), each file filled up at its end.

    The label of what fills up is `IGNORED`.
    """
    end = tokenizer.token_to_id(END)
    inputs, labels = [], []
    for encoded in tokenizer.encode_batch(texts):
        tokens = np.array([end, *encoded.ids, end], np.int32)
        padding = -(len(tokens) - 1) % context
        inputs.append(np.pad(tokens[:-1], (0, padding), constant_values=end))
        labels.append(np.pad(tokens[1:], (0, padding), constant_values=IGNORED))
    shape = (-1, context)
    return np.concatenate(inputs).reshape(shape), np.concatenate(labels).reshape(shape)


def bytes_of_tokens(tokenizer):
    """How many bytes each token stands for: one for each of its characters."""
    size = tokenizer.get_vocab_size()
    number = np.array([len(tokenizer.id_to_token(token)) for token in range(size)])
    number[tokenizer.token_to_id(END)] = 0
    return number


def bits_per_byte(nats, labels, bytes_of_token):
    """Of labels whose losses sum to `nats`."""
    return nats / math.log(2) / bytes_of_token[labels[labels != IGNORED]].sum()


class Batches:
    """The windows of each step: every one is seen once before any is seen twice."""

    def __init__(self, number, size):
        self.number, self.size = number, size

    def __getitem__(self, step):
        epoch, step = divmod(step, self.number // self.size)
        order = np.random.default_rng(epoch).permutation(self.number)
        return order[step * self.size :][: self.size]
