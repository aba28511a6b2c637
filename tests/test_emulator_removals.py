"""Every barrier, wait and fence of every kernel is needed, or the reason why that can't be shown stands in a file."""

import pytest
from emulator import removals, why_not

SITES = removals.removals()


@pytest.fixture(scope="module", autouse=True)
def emulator():
    why_not()


@pytest.mark.share(30)
@pytest.mark.parametrize("removal", SITES, ids=lambda removal: removal.id)
def test_removal_is_found(removal):
    key = removals.key_of(removal)
    found = removals.is_found(removal)
    if key is None:
        assert found, f"{removal.id} can go and nothing shows: is it needed? If it is, unseen.txt must say why not"
    else:
        assert not found, f"{removal.id} stands in unseen.txt, but its removal shows: {found}"


def test_unseen_lines_exist():
    assert set(removals.unseen()) == {removals.key_of(removal) for removal in SITES} - {None}


def test_there_is_something_to_remove():
    assert {site.file for site in SITES} >= {
        "fwd_simt.cu", "bwd_simt_dq.cu", "bwd_simt_dkdv.cu", "fwd_sm80.cu", "bwd_sm80.cu", "fwd_sm90.cu",
        "bwd_sm90.cu", "tile_sm90.cuh", "fwd_wide.cu", "bwd_wide.cu", "fwd_parts_sm90.cu", "sm80.cu", "sm90.cu",
    }  # fmt: skip
