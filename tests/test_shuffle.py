"""Partial shuffling: every column of the text begins at an offset of its own, drawn anew in each epoch."""

import torch
from conftest import SMALL
from runner import run_cli

from data import rotate_columns


def test_every_column_is_rotated_by_its_own_offset():
    ids = torch.arange(3 * 7 + 2)  # two tokens too many for three columns
    columns = rotate_columns(ids, 3, torch.tensor([0, 1, 6])).view(3, 7).tolist()
    assert columns == [[0, 1, 2, 3, 4, 5, 6], [8, 9, 10, 11, 12, 13, 7], [20, 14, 15, 16, 17, 18, 19]]


def test_a_shuffled_run_sees_other_batches_and_no_shuffle_the_same(trained):
    shuffled, plain = trained("--epochs", 2, "--shuffle"), trained("--epochs", 2)
    assert [e["loss"] for e in shuffled.log("valid")] != [e["loss"] for e in plain.log("valid")]


def test_a_cut_shuffled_run_ends_bit_for_bit_where_the_whole_one_does(trained, corpus, tmp_path):
    whole = trained("--epochs", 2, "--shuffle")
    for step in (7, 24, 31):  # in the first epoch, about its end, in the second
        flags = ["--epochs", 2, "--shuffle", "--save", f"m{step}.pt"]
        assert run_cli("--data", corpus, *SMALL, *flags, "--max_steps", step, cwd=tmp_path).status == 0
        assert run_cli("--resume", f"m{step}.pt", cwd=tmp_path).status == 0
        found = torch.load(tmp_path / f"m{step}.pt.state", weights_only=True)
        for name, tensor in whole.state["weights"].items():
            assert torch.equal(found["weights"][name], tensor), name
