"""Published weights: whole and in the engine's precision, through the host and mapped by another process."""

import multiprocessing
import os
from types import SimpleNamespace

import pytest
import torch

from plumbline.rl.handover import Shelf, cards, from_arrays, see_also

WEIGHTS = {"a.weight": torch.randn(3, 5), "b": torch.randn(7), "c.weight": torch.randn(2, 2, 4)}


def put(shelf, weights):
    """In another order than the shelf's."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    shelf.put(reversed(weights.items()), shapes)


def answer(tickets, answers):
    """Sums of the tensors of each ticket, as this process sees them."""
    for ticket in iter(tickets.get, None):
        answers.put({name: (tuple(t.shape), t.double().sum().item()) for name, t in ticket.tensors().items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arrays_give_the_weights_back(dtype):
    shelf = Shelf(dtype)
    put(shelf, WEIGHTS)
    back = from_arrays(shelf.arrays())
    assert list(back) == list(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor.to(dtype))


def test_a_second_policy_of_another_shape_is_set_out_too():
    shelf = Shelf(torch.float32)
    put(shelf, WEIGHTS)
    put(shelf, {"a.weight": torch.ones(4, 4)})
    assert {name: t.sum().item() for name, t in shelf.tensors().items()} == {"a.weight": 16}


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


@pytest.mark.parametrize("device", DEVICES)
def test_another_process_maps_what_was_published_last(device):
    context = multiprocessing.get_context("spawn")
    tickets, answers = context.Queue(), context.Queue()
    reader = context.Process(target=answer, args=(tickets, answers), daemon=True)
    reader.start()
    shelf = Shelf(torch.bfloat16)
    for scale in (1, 2):
        put(shelf, {name: scale * tensor.to(device) for name, tensor in WEIGHTS.items()})
        tickets.put(shelf.ticket())
        seen = answers.get(timeout=120)
        want = {name: (tuple(t.shape), (scale * t).bfloat16().double().sum().item()) for name, t in WEIGHTS.items()}
        assert seen.keys() == want.keys()
        for name, (shape, total) in want.items():
            assert seen[name] == (shape, pytest.approx(total, abs=1e-6))
    tickets.put(None)
    reader.join(60)


def test_only_a_gpu_has_a_name():
    assert cards("cpu") == {}


def test_gpus_are_named_the_own_first_and_only_those_that_can_be_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"gpu{number}"))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: (own, other) != (2, 0))
    assert {name.split("/")[1]: number for name, number in cards("cuda:2").items()} == {"gpu2": 2, "gpu1": 1, "gpu3": 3}
    assert list(cards("cuda:2").values()) == [2, 1, 3]


def test_a_process_sees_more_gpus_behind_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    see_also(["0", "3"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,0"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    see_also(["1"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,0"  # too late
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # no GPU of its own
    see_also(["1"])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
