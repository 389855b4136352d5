"""Copies and files of models at work are plain models, also where this package is not."""

import copy
import io
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from test_plain import INPUTS, at_work, build, gradients, looks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import neq


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "file": lambda model: torch.load(io.BytesIO(saved(model)), weights_only=False),
    "process": lambda model: pickle.loads(ForkingPickler.dumps(model)),
    "average": lambda model: AveragedModel(model).module,
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_copies_are_plain_models(way, inside):
    model, freezer, _ = at_work(True)
    before = looks(model)
    if inside:
        with freezer.plain():
            twin = WAYS[way](model)
    else:
        twin = WAYS[way](model)
    assert looks(twin) == looks(build())
    assert list(twin.state_dict()) == list(model.state_dict())
    assert torch.equal(twin.eval()(INPUTS), model.eval()(INPUTS))
    for gradient, dense in zip(gradients(twin), gradients(build().eval()), strict=True):
        assert torch.equal(gradient, dense)
    assert looks(model) == before
    assert gradients(model)[0] is None  # frozen as before


def test_shallow_copies_of_a_layer_are_plain():
    model, _, _ = at_work(True)
    twin = copy.copy(model[0])
    assert looks(twin) == looks(build()[0])
    assert twin.weight is model[0].weight
    assert not copy.copy(model)._forward_hooks


def test_a_layer_that_is_the_whole_model():
    layer = nn.Linear(5, 4)
    fresh = looks(layer)
    freezer = neq.NeuronFreezer(layer, torch.optim.SGD(layer.parameters()), neq.Everyone())
    freezer.freeze(torch.ones_like(freezer.frozen))
    for twin in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert looks(twin) == fresh
    with freezer.plain():
        assert looks(layer) == fresh
    freezer.remove()
    assert looks(layer) == fresh


class Own(nn.Sequential):
    """A class that copies all of its attributes by itself."""

    def __deepcopy__(self, memo):
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce__(self):
        return rebuilt, (self.__dict__,)


def rebuilt(attributes):
    twin = Own()
    twin.__dict__.update(attributes)
    return twin


def test_classes_that_copy_themselves():
    model, _, _ = at_work(True, Own(*build()))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert b"neq." not in pickle.dumps(twin)
        assert torch.equal(twin.eval()(INPUTS), model.eval()(INPUTS))
        assert all((gradient != 0).any() for gradient in gradients(twin))
    twin = copy.deepcopy(model)
    twin[0].weight.data.zero_()
    assert (twin.__getstate__()["_modules"]["0"].weight == 0).all()


def test_wrapped_models():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, freezer, _ = at_work(True, DistributedDataParallel(build()))
        assert b"neq." not in saved(model)
        assert looks(copy.deepcopy(model).module) == looks(build())
        with freezer.plain():
            assert looks(model.module) == looks(build())
            assert all(gradient is not None for gradient in gradients(model))
        assert not gradients(model)[0].any()  # zeros are DistributedDataParallel's
    finally:
        torch.distributed.destroy_process_group()
    model, twin = (torch.compile(build(), backend="eager") for _ in range(2))
    at_work(True, model)
    assert looks(copy.deepcopy(model)) == looks(copy.deepcopy(twin))


LOAD = """
import sys, torch
sys.modules["neq"] = None
for whole in ("rows", "whole"):
    model = torch.load(f"{sys.argv[1]}/{whole}.pt", weights_only=False)
    inputs, output = torch.load(f"{sys.argv[1]}/{whole}-output.pt")
    assert torch.equal(model(inputs), output)
    assert type(model[0]) is torch.nn.Conv2d and not model._forward_hooks
    model(inputs).sum().backward()
    assert all((p.grad != 0).any() for p in model.parameters())
"""


@pytest.mark.slow
def test_files_are_read_where_this_package_is_not(tmp_path):
    for name in ("rows", "whole"):
        model, _, _ = at_work(name == "whole")
        model.eval()
        torch.save(model, tmp_path / f"{name}.pt")
        torch.save((INPUTS, model(INPUTS).detach()), tmp_path / f"{name}-output.pt")
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
