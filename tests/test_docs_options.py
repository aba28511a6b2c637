"""docs/options.md: its examples run, its table and its pictures are those of the library. So are docstrings."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

import cupyflash

DOCS = Path(__file__).resolve().parent.parent / "docs"
TEXT = (DOCS / "options.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S))
WITH_EXAMPLES = [title for title, text in SECTIONS.items() if "```python" in text]
MAX_BYTES = 20_000


def examples(text):
    """The code blocks of some text."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


def test_every_block_is_an_example_with_its_result():
    parser = doctest.DocTestParser()
    blocks = examples(TEXT)
    assert len(blocks) == TEXT.count("```python") == sum(len(examples(SECTIONS[title])) for title in WITH_EXAMPLES)
    assert all(any(example.want for example in parser.get_examples(block)) for block in blocks)


def run(text):
    """Run the blocks of a text one after the other, as doctest does; the report of what failed."""
    source = "\n".join(examples(text))
    report = []
    test = doctest.DocTestParser().get_doctest(source, {}, "options.md", str(DOCS / "options.md"), 0)
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    return "".join(report)


def test_examples_run():
    """In the order of the page, on the names that the blocks before have made."""
    assert run(TEXT) == ""


def test_a_wrong_example_is_found():
    assert "Expected:" in run("```python\n>>> 1 + 1\n3\n\n```\n")


def test_the_table_has_every_option():
    """All arguments of attention that change what is computed have a row and a section that the row leads to."""
    table = dict(re.findall(r"^\| \[(.+?)\]\(#(.+?)\) \|", TEXT, re.M))
    names = {name for cell in table for name in re.findall(r"`(\w+)`", cell)}
    others = {"q", "k", "v", "scale", "layout", "precision", "family", "tile", "out", "return_lse"}
    assert names == set(inspect.signature(cupyflash.attention).parameters) - others
    anchors = {title.lower().replace(" ", "-") for title in SECTIONS}
    assert set(re.findall(r"\]\(#(.+?)\)", TEXT)) <= anchors


@pytest.mark.parametrize("name", [name for name in cupyflash.__all__ if inspect.isfunction(getattr(cupyflash, name))])
def test_docstrings_name_every_parameter(name):
    function = getattr(cupyflash, name)
    _, _, after = inspect.getdoc(function).partition("Parameters\n----------\n")
    lines = after.split("\n----", 1)[0].splitlines()[:-1]  # less the next section's title
    named = [word for line in lines if line[:1].strip() for word in line.split(" : ")[0].split(", ")]
    assert sorted(named) == sorted(inspect.signature(function).parameters)


def pictures():
    """docs/pictures/options.py as a module."""
    found = importlib.util.spec_from_file_location("pictures_of_options", DOCS / "pictures" / "options.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_pictures_are_there_and_small():
    shown = set(re.findall(r"!\[.+?\]\(pictures/(\w+)\.png\)", TEXT))
    drawn = {path.stem for path in (DOCS / "pictures").glob("*.png")}
    assert shown == drawn == set(pictures().PICTURES)
    sizes = {path.name: path.stat().st_size for path in (DOCS / "pictures").glob("*.png")}
    assert max(sizes.values()) < MAX_BYTES, sizes


def test_pictures_show_what_a_loop_says():
    """The weights behind the pictures are above 0 where the rules of the page, pair by pair, say visible."""
    module = pictures()
    for panel in (panel for panels in module.PICTURES.values() for panel in panels):
        asked, entry = panel.options, panel.entry or 0
        q_len = int(np.broadcast_to(asked.get("q_lens", panel.seqlen_q), 2)[entry])
        kv_len = int(np.broadcast_to(asked.get("kv_lens", panel.seqlen_k), 2)[entry])
        causal = asked.get("causal", False)
        offset = asked.get("q_offset", 0 if causal == "top_left" else kv_len - q_len)
        left, right = (np.inf if bound is None else bound for bound in asked.get("window", (None, None)))
        q_ids, kv_ids = asked.get("segment_ids", (np.zeros(8), np.zeros(8)))
        mask = asked.get("mask", np.ones((8, 8), bool))
        visible = [
            [
                i < q_len and j < kv_len and i + offset - left <= j <= i + offset + right and bool(mask[i, j])
                and q_ids[i] == kv_ids[j] and (not causal or j <= i + offset)
                for j in range(panel.seqlen_k)
            ]
            for i in range(panel.seqlen_q)
        ]  # fmt: skip
        np.testing.assert_array_equal(module.weights(panel) > 0, visible, err_msg=panel.title)
