"""The examples run, and do what they say."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("generate_example", FOLDER / "generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


def test_tokens_are_the_same_with_a_cache_and_without(example):
    """Prompts that end in, at and behind the end of a page and of a chunk; entries grow into new pages."""
    model = example.Model.drawn(np, 3)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, len(example.ALPHABET), n).tolist() for n in (1, 8, 16, 17)]
    texts = example.generate(model, prompts, 16)
    assert texts == example.generate_without_cache(model, prompts, 16)
    assert [text[: len(prompt)] for text, prompt in zip(texts, prompts, strict=True)] == prompts
    assert len({token for text in texts for token in text[-16:]}) > 5
    # What was said before matters: another first letter, another text.
    other = [[(prompt[0] + 1) % 26, *prompt[1:]] for prompt in prompts[2:]]
    for x, y in zip(texts[2:], example.generate(model, other, 16), strict=True):
        assert x[-16:] != y[-16:]


def test_program(example, capsys):
    assert example.main(["--numpy", "--tokens", "12", "--check"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("tokens [") == 2
    assert "without a cache: the same tokens" in printed
    for wrong in (["--tokens", "0"], ["--prompts", "Capitals"], ["--tokens", "600"]):
        with pytest.raises(SystemExit):
            example.main(["--numpy", *wrong])


@pytest.mark.gpu
def test_tokens_on_a_gpu(example, gpu):
    model = example.Model.drawn(gpu.xp, 3)
    prompts = [[1, 2, 3], list(range(20))]
    texts = example.generate(model, prompts, 40)
    assert texts == example.generate_without_cache(model, prompts, 40)
