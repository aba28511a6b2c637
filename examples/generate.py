"""Text from a small transformer with a cache in pages: NumPy arrays, or CuPy's where there is a GPU.

    python examples/generate.py
    python examples/generate.py --tokens 64 --check          # once more without a cache: the same tokens

Its weights are drawn from a seed, so what it says is nonsense; how it is made is what counts. Two prompts of different
lengths share one pool of pages. Each is read in chunks; then all sequences go on together, a token at a time. Every
layer makes one call, `decode`: it turns queries and keys by their positions, puts the new rows into their pages, and
attends to all that the sequence has.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from cupyflash import Rotary, attention, decode

ALPHABET = "abcdefghijklmnopqrstuvwxyz .,\n"
LAYERS, HEADS, HEADS_K, HEAD_DIM = 2, 4, 2, 16
WIDTH, LONGEST = HEADS * HEAD_DIM, 512  # of a token's vector; positions that the model knows
PAGE, CHUNK = 16, 8  # rows of a page; tokens of a prompt that are read at a time


@dataclass
class Model:
    """Weights, each (columns out, columns in): what a layer has for q, k, v, its output, and the block behind it."""

    xp: ModuleType
    embedding: Any  # (alphabet, WIDTH), and so is what turns vectors into letters again
    letters: Any
    layers: list[dict[str, Any]]
    rotary: Rotary

    @classmethod
    def drawn(cls, xp: ModuleType, seed: int) -> Model:
        """The same weights from the same seed, on either side."""
        rng = np.random.default_rng(seed)

        def weight(columns: int, wide: int) -> Any:
            return xp.asarray((rng.standard_normal((columns, wide)) / wide**0.5).astype(np.float32))

        shapes = {
            "q": (WIDTH, WIDTH), "k": (HEADS_K * HEAD_DIM, WIDTH), "v": (HEADS_K * HEAD_DIM, WIDTH),
            "out": (WIDTH, WIDTH), "up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH),
        }  # fmt: skip
        embedding, letters = (weight(len(ALPHABET), WIDTH) for _ in range(2))
        layers = [{name: weight(*shape) for name, shape in shapes.items()} for _ in range(LAYERS)]
        angles = np.arange(LONGEST)[:, None] * 10000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
        rotary = Rotary(*(xp.asarray(f(angles).astype(np.float32)) for f in (np.cos, np.sin)))
        return cls(xp, embedding, letters, layers, rotary)

    def logits(self, tokens: Any, attend: Any) -> Any:
        """Of the last token of each sequence: (batch, alphabet). ``attend(layer, q, k, v)`` is the attention."""
        x = self.embedding[tokens]  # (batch, T, WIDTH)
        for n, w in enumerate(self.layers):
            y = _normal(x)
            q, k, v = (_heads(y @ w[name].T) for name in ("q", "k", "v"))
            out = attend(n, q, k, v)  # (batch, HEADS, T, HEAD_DIM)
            x = x + out.swapaxes(1, 2).reshape(x.shape) @ w["out"].T
            x = x + self.xp.tanh(_normal(x) @ w["up"].T) @ w["down"].T
        return _normal(x[:, -1]) @ self.letters.T


def _normal(x: Any) -> Any:
    return x / ((x * x).mean(axis=-1, keepdims=True) + 1e-6) ** 0.5


def _heads(x: Any) -> Any:
    """(batch, T, heads * HEAD_DIM) as (batch, heads, T, HEAD_DIM): a view."""
    return x.reshape(*x.shape[:2], -1, HEAD_DIM).swapaxes(1, 2)


# ------------------------------------------------------------------------------------------------------ with a cache


@dataclass
class Cache:
    """Pages of all sequences and layers. Which page a sequence has where is one table for all layers."""

    model: Model
    pages: int
    free: list[int] = field(init=False)
    table: Any = field(init=False)  # (sequences, pages of one) on the host

    def __post_init__(self) -> None:
        shape = (LAYERS, self.pages, PAGE, HEADS_K, HEAD_DIM)
        self.k, self.v = (self.model.xp.zeros(shape, np.float32) for _ in range(2))
        self.free = list(range(self.pages))
        self.table = np.zeros((0, LONGEST // PAGE), np.int32)

    def new_sequence(self) -> int:
        """Its number."""
        self.table = np.concatenate([self.table, np.zeros((1, LONGEST // PAGE), np.int32)])
        return len(self.table) - 1

    def make_room(self, sequence: int, have: int, more: int) -> None:
        """Pages for rows ``have`` to ``have + more - 1``."""
        for n in range(-(-have // PAGE), -(-(have + more) // PAGE)):
            self.table[sequence, n] = self.free.pop()

    def attend(self, sequences: list[int], lens: list[int]) -> Any:
        """What `Model.logits` asks for: sequences have ``lens`` rows before new ones."""
        xp = self.model.xp
        table, kv_lens = xp.asarray(self.table[sequences]), xp.asarray(np.array(lens, np.int32))

        def one_layer(n: int, q: Any, k: Any, v: Any) -> Any:
            return decode(
                q, self.k[n], self.v[n], kv_lens, page_table=table, k_new=k, v_new=v, rotary=self.model.rotary
            )

        return one_layer


def generate(model: Model, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The prompts, and behind each ``count`` tokens: of all the likeliest one, again and again."""
    xp = model.xp
    longest = max(map(len, prompts)) + count
    cache = Cache(model, pages=len(prompts) * -(-longest // PAGE))
    texts = [list(prompt) for prompt in prompts]
    sequences = [cache.new_sequence() for _ in prompts]
    for sequence, prompt in zip(sequences, prompts, strict=True):  # chunk by chunk
        for begin in range(0, len(prompt), CHUNK):
            chunk = prompt[begin : begin + CHUNK]
            cache.make_room(sequence, begin, len(chunk))
            logits = model.logits(xp.asarray([chunk]), cache.attend([sequence], [begin]))
        texts[sequence].append(int(logits[0].argmax()))
    for _ in range(count - 1):  # all sequences, a token each
        lens = [len(text) - 1 for text in texts]
        for sequence in sequences:
            cache.make_room(sequence, lens[sequence], 1)
        last = xp.asarray([[text[-1]] for text in texts])
        chosen = model.logits(last, cache.attend(sequences, lens)).argmax(axis=-1)
        for text, token in zip(texts, chosen.tolist(), strict=True):
            text.append(token)
    return texts


# --------------------------------------------------------------------------------------------------- without a cache


def generate_without_cache(model: Model, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The same, from all tokens anew each time."""

    def turned(x: Any) -> Any:
        rows = x.shape[-2]
        cos, sin = (table[:rows] for table in model.rotary[:2])
        first, second = x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2 :]
        return model.xp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    texts = [list(prompt) for prompt in prompts]
    for text in texts:
        for _ in range(count):
            logits = model.logits(
                model.xp.asarray([text]), lambda _, q, k, v: attention(turned(q), turned(k), v, causal=True)
            )
            text.append(int(logits[0].argmax()))
    return texts


def main(argv: list[str] | None = None) -> int:
    """Print what the model says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", nargs="+", default=["once upon a time, there was a cache", "so"])
    parser.add_argument("--tokens", type=int, default=40, help="behind each prompt")
    parser.add_argument("--seed", type=int, default=3, help="of the weights")
    parser.add_argument("--numpy", action="store_true", help="even where there is a GPU")
    parser.add_argument("--check", action="store_true", help="once more without a cache; exit code 1 if tokens differ")
    args = parser.parse_args(argv)
    if any(not prompt or set(prompt) - set(ALPHABET) for prompt in args.prompts):
        parser.error(f"prompts are written in {ALPHABET!r}, and have a letter at least")
    if args.tokens < 1 or max(map(len, args.prompts)) + args.tokens > LONGEST:
        parser.error(f"--tokens is at least 1, and a prompt with its tokens at most {LONGEST}")
    xp = np if args.numpy else _arrays()
    model = Model.drawn(xp, args.seed)
    prompts = [[ALPHABET.index(letter) for letter in prompt] for prompt in args.prompts]
    texts = generate(model, prompts, args.tokens)
    print(f"{xp.__name__}, {LAYERS} layers, {HEADS} heads over {HEADS_K} of width {HEAD_DIM}")
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{''.join(ALPHABET[n] for n in text)!r}\n  tokens {text[len(prompt):]}")
    if args.check:
        same = generate_without_cache(model, prompts, args.tokens) == texts
        print("without a cache: the same tokens" if same else "without a cache: OTHER TOKENS")
        return 0 if same else 1
    return 0


def _arrays() -> ModuleType:
    """CuPy where it finds a GPU, else NumPy."""
    try:
        import cupy

        return cupy if cupy.cuda.runtime.getDeviceCount() else np
    except Exception:  # CuPy is not there, or no driver is
        return np


if __name__ == "__main__":
    raise SystemExit(main())
