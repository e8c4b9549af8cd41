"""How batches are cut: parts join to the whole, labels cross the cut, and what is unclear is asked about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepcore.comm.collectives import TorchTransport
from deepcore.comm.mesh import Axis
from deepcore.errors import LayoutError
from deepcore.sequence import SequenceLoader, cross_entropy, shard_batch, token_mean


def axis(rank: int, size: int) -> Axis:
    """An axis without a group: cutting issues no collective."""
    return Axis("sp", rank, size, tuple(range(size)), None, TorchTransport())


def parts(batch: dict[str, Any], size: int, **options: Any) -> list[dict[str, Any]]:
    return [shard_batch(batch, axis(rank, size), **options) for rank in range(size)]


def joined(pieces: list[dict[str, Any]], name: str) -> torch.Tensor:
    return torch.cat([piece[name] for piece in pieces], 1)


@given(st.integers(1, 13), st.integers(1, 5), st.booleans())
def test_parts_join_to_the_padded_whole(length: int, size: int, causal: bool) -> None:
    ids = torch.arange(2 * length).view(2, length) + 1
    batch = {"input_ids": ids, "labels": ids.clone(), "name": "kept", "lr": torch.tensor(3.0)}
    pieces = parts(batch, size, causal=causal)
    total = -(-length // size) * size
    assert {piece["input_ids"].shape for piece in pieces} == {(2, total // size)}
    assert torch.equal(joined(pieces, "input_ids"), torch.nn.functional.pad(ids, (0, total - length)))
    assert torch.equal(joined(pieces, "position_ids")[1], torch.arange(total))
    assert all(piece["name"] == "kept" and piece["lr"] == 3.0 for piece in pieces)
    if causal:
        expected = torch.full((2, total), -100)
        expected[:, : length - 1] = ids[:, 1:]
        assert torch.equal(joined(pieces, "shift_labels"), expected)
        assert (joined(pieces, "labels") == -100).all()  # a model that shifts by itself gets nan
        assert pieces[0]["num_items_in_batch"] * size == pytest.approx(2 * (length - 1))
    else:
        assert not {"labels", "shift_labels", "num_items_in_batch"} & pieces[0].keys()
        assert torch.equal(joined(pieces, "targets")[:, :length], ids)
        assert (joined(pieces, "targets")[:, length:] == -100).all()
        if total > length:
            assert torch.equal(joined(pieces, "attention_mask")[0].bool(), torch.arange(total) < length)
    assert ids.shape == batch["input_ids"].shape == (2, length)
    assert "position_ids" not in batch


def test_what_is_given_is_kept() -> None:
    ids = torch.arange(8).view(1, 8)
    given_all = {
        "input_ids": ids,
        "position_ids": ids % 4,
        "shift_labels": ids + 1,
        "labels": ids,
        "attention_mask": ids > 0,
    }
    pieces = parts(given_all, 2)
    for name in given_all.keys() - {"labels"}:
        assert torch.equal(joined(pieces, name), given_all[name])
    embedded = parts({"inputs_embeds": torch.ones(1, 3, 5)}, 2)
    assert joined(embedded, "inputs_embeds").sum() == 15
    assert embedded[1]["inputs_embeds"].shape == (1, 2, 5)


def test_names_that_are_unclear() -> None:
    ids = torch.ones(2, 6, dtype=torch.int64)
    batch = {"input_ids": ids, "scores": torch.ones(2, 6)}
    with pytest.raises(LayoutError, match="whether 'scores' is cut"):
        parts(batch, 2)
    assert parts(batch, 2, tokens=["scores"])[0]["scores"].shape == (2, 3)
    assert parts(batch, 2, whole=["scores"])[0]["scores"].shape == (2, 6)
    with pytest.raises(LayoutError, match="'labels' does not have one entry per token"):
        parts({"input_ids": ids, "labels": torch.ones(2)}, 2)
    assert parts({"input_ids": ids, "labels": torch.ones(2)}, 2, whole=["labels"])[0]["labels"].shape == (2,)
    with pytest.raises(LayoutError, match="'attention_mask'"):
        parts({"input_ids": ids, "attention_mask": torch.ones(2, 1, 6, 6)}, 2)
    with pytest.raises(LayoutError, match="no sequence"):
        parts({"tokens": ids}, 2)


def test_a_loader_on_one_rank() -> None:
    class Loader(list):
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    inner = Loader([{"input_ids": torch.ones(1, 4, dtype=torch.int64)}] * 3)
    loader = SequenceLoader(inner, axis(0, 1))
    loader.set_epoch(5)
    assert (len(loader), len(list(loader)), inner.epoch) == (3, 3, 5)


def test_losses_on_one_rank_are_torchs() -> None:
    logits = torch.randn(2, 5, 7, requires_grad=True)
    labels = torch.randint(7, (2, 5))
    labels[0, :3] = 6
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=6)
    for where in (None, axis(0, 1)):
        loss = cross_entropy(logits, labels, where, ignore_index=6)
        assert torch.equal(loss, expected)
        assert torch.equal(*(torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected)))
    assert token_mean(torch.tensor(6.0), torch.tensor(4), None) == 1.5
    with pytest.raises(LayoutError, match="do not fit together"):
        cross_entropy(logits, labels[:, :-1], None)
