"""Saving and loading the states of a model: checksums on the way, rounds of ranks, memory for copies to a GPU."""

import pytest
import torch
from training_runs import small_model

from slop_hf.growth import GrownStateReader
from slop_hf.training import state_io
from slop_hf.training.checksums import CHECKSUM_FILE, find_corruption, write_checksums
from slop_hf.training.ranks import Ranks
from slop_hf.training.state_io import load_states, save_states
from slop_hf.training.states import ReplicatedStates


@pytest.fixture(scope="module")
def trained():
    """A model and its AdamW after a step."""
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(16)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("size", ["2GB", "3KB"])
def test_checksums_are_computed_while_files_are_written(trained, tmp_path, size):
    model, optimizer = trained
    written = save_states(ReplicatedStates(model, optimizer, Ranks()), model.config, tmp_path, size)
    files = {path.name for path in tmp_path.glob("*.safetensors")}
    assert written.keys() == files and len(files) == (2 if size == "2GB" else 33)
    write_checksums(tmp_path, written, Ranks())
    assert find_corruption(tmp_path, Ranks()) is None, "files read again have the same checksums"
    assert (tmp_path / CHECKSUM_FILE).read_text().count('"hash"') == len(files) + (size != "2GB")  # and the index


class ThreeRanks(Ranks):
    """The second of three ranks, all of which succeed."""

    def gather_all(self, value):
        return [value] * 3


class LoggedStates(ReplicatedStates):
    """Notes which rank gathers which tensor."""

    def __init__(self, *parts, log):
        super().__init__(*parts)
        self.log = log

    def gather(self, name, key, owner, numbers=None):
        self.log.append(owner)
        return super().gather(name, key, owner, numbers)


@pytest.mark.parametrize(("numbers", "senders"), [(range(3, 9), [0, 1, 2]), (range(4, 8), [1]), (range(8, 10), [2])])
def test_only_ranks_with_some_of_a_slice_send(monkeypatch, numbers, senders):
    """Rank 1 of three, for ten numbers in parts of four."""
    whole, sent = torch.arange(10.0), []

    def broadcast(tensor, src):
        first = max(numbers.start, 4 * src)
        if src != 1:
            tensor.copy_(whole[first : first + len(tensor)])
        sent.append(src)

    monkeypatch.setattr("slop_hf.training.ranks.dist.broadcast", broadcast)
    gathered = [Ranks(1, 3).gather_slice(whole[4:8], 4, numbers, owner, torch.float64) for owner in (0, 1)]
    assert gathered[0] is None and gathered[1].equal(whole[numbers.start : numbers.stop].double())
    assert sent == 2 * senders


def test_ranks_write_in_rounds(trained, tmp_path, monkeypatch):
    """In each round every rank gathers a tensor for a different owner, before this one copies and writes its own."""
    model, optimizer = trained
    log, write = [], state_io.write_tensor
    monkeypatch.setattr(state_io, "write_tensor", lambda *args: (log.append("write"), write(*args)))
    states = LoggedStates(model, optimizer, ThreeRanks(1, 3), log=log)
    written = save_states(states, model.config, tmp_path, "3KB")
    assert len(written) == 11
    rounds = [[]]
    for event in log:
        rounds[-1].append(event)
        if event == "write":
            rounds.append([])
    assert all(len(owners) == len(set(owners)) for owners in rounds), "each owner has one tensor per round"
    assert max(map(len, rounds)) == 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_states_are_read_into_pinned_memory_for_a_gpu(trained, tmp_path, device):
    model, optimizer = trained
    save_states(ReplicatedStates(model, optimizer, Ranks()), model.config, tmp_path, "2GB")
    pinned = []

    class Reader(GrownStateReader):
        def allocate(self, name, key, *, pin=False):
            pinned.append(pin)
            return super().allocate(name, key)  # this machine may have no GPU to pin for

    fresh = small_model()
    states = ReplicatedStates(fresh, torch.optim.AdamW(fresh.parameters()), Ranks(device=torch.device(device)))
    load_states(states, Reader(tmp_path, model.config))
    assert set(pinned) == {device == "cuda"}
    assert all(value.equal(model.state_dict()[name]) for name, value in fresh.state_dict().items())
