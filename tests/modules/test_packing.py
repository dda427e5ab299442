"""Packing a padded batch and back."""

import torch

from mor.modules import Packing, pack

CPU = torch.device("cpu")


def test_without_padding_nothing_moves():
    batch = pack((2, 3), CPU)
    x = torch.arange(12.0).reshape(2, 3, 2)
    assert batch.rows is None
    assert batch.packing.cu_seqlens.tolist() == [0, 3, 6]
    assert batch.packing.positions.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(batch.unpack(batch.pack(x)), x)
    assert pack((2, 3), CPU, torch.ones(2, 3)).rows is None


def test_pads_are_left_out_and_show_the_token_before_them():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    batch = pack((3, 4), CPU, mask)
    assert batch.packing.cu_seqlens.tolist() == [0, 2, 6, 7]
    assert batch.packing.lengths == (2, 4, 1)
    assert batch.packing.positions.tolist() == [0, 1, 0, 1, 2, 3, 0]  # of tokens: pads do not count
    x = torch.arange(12.0).reshape(3, 4, 1)
    packed = batch.pack(x)
    assert packed.flatten().tolist() == [1, 2, 4, 5, 6, 7, 8]
    shown = batch.unpack(packed).squeeze(-1).tolist()
    assert shown == [[1, 1, 2, 2], [4, 5, 6, 7], [8, 8, 8, 8]]
    depths = batch.unpack_masked(torch.ones(7, dtype=torch.int64), 0)
    assert torch.equal(depths, mask)


def test_a_row_continues_where_its_own_tokens_end():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    past = pack((2, 2), CPU, mask[:, :2]).last_positions()
    assert past.tolist() == [[-1, 0], [0, 1]]
    batch = pack((2, 1), CPU, mask, past=past)
    assert batch.rows is None
    assert batch.packing.positions.tolist() == [1, 2]
    assert batch.last_positions().tolist() == [[-1, 0, 1], [0, 1, 2]]


def test_a_row_of_pads_shows_its_last_token_of_earlier_calls():
    past = pack((2, 2), CPU).last_positions()
    batch = pack((2, 2), CPU, torch.tensor([[1, 0], [0, 0]]), past=past)
    x, before = torch.tensor([[5.0]]), torch.tensor([[1.0], [2.0]])
    assert batch.unpack(x, before).flatten().tolist() == [5, 5, 2, 2]
    assert batch.unpack(x).flatten().tolist() == [5, 5, 0, 0]
    assert batch.last_positions().tolist() == [[0, 1, 2, 2], [0, 1, 1, 1]]


def test_documents_beside_pads_are_kept_apart():
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 0, 0]])
    batch = pack((2, 6), CPU, mask, positions)
    assert batch.has_documents
    assert batch.packing.lengths == (3, 2, 2)
    numbered = pack((2, 6), CPU, torch.tensor([[1, 1, 1, 2, 2, 0], [0, 0, 5, 5, 0, 0]]))
    assert numbered.packing.lengths == (3, 2, 2)
    assert numbered.packing.positions.tolist() == [0, 1, 2, 0, 1, 0, 1]


def test_documents_start_where_positions_restart():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    batch = pack((2, 5), CPU, position_ids=positions)
    assert batch.packing.cu_seqlens.tolist() == [0, 3, 5, 6, 10]
    assert batch.packing.lengths == (3, 2, 1, 4)


def test_sequences_and_ranks_of_rows():
    packing = Packing.from_lengths([2, 0, 3], torch.arange(5))
    assert packing.sequence_ids.tolist() == [0, 0, 2, 2, 2]
    assert packing.ranks.tolist() == [0, 1, 0, 1, 2]
    chosen = packing.select(torch.tensor([1, 2, 4]), lengths=[1, 0, 2])
    assert chosen.cu_seqlens.tolist() == [0, 1, 1, 3]
    assert chosen.positions.tolist() == [1, 2, 4]
    assert chosen.sequence_ids.tolist() == [0, 2, 2]
