import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import neq
from suites.resnet import resnet32


def test_resnet32_has_the_published_number_of_neurons():
    index = neq.NeuronIndex(resnet32())
    sizes = {name: part.stop - part.start for name, part in index.items()}
    assert len(index) == sum(sizes.values()) == 2282
    assert sum(n for name, n in sizes.items() if "conv" in name) == 1136
    assert sum(n for name, n in sizes.items() if "bn" in name) == 1136
    assert sizes["fc"] == 10


@pytest.mark.slow
def test_resnet18_swin_and_deeplab_have_the_published_numbers(vision):
    import timm
    from torchvision.models import segmentation

    swin = timm.create_model("swin_base_patch4_window7_224", num_classes=0)
    deeplab = segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=21, aux_loss=True
    )
    assert len(neq.NeuronIndex(vision.models.resnet18())) == 10600
    assert len(neq.NeuronIndex(swin)) == 139008
    assert len(neq.NeuronIndex(deeplab)) == 57258


def test_slices_lie_one_after_the_other(net):
    index = neq.NeuronIndex(net)
    end = 0
    for name, part in index.items():
        assert part.start == end
        assert index[name] == part
        assert name in index
        end = part.stop
    assert end == len(index)


def test_select_takes_dotted_prefixes_only():
    model = nn.ModuleDict(
        {"layer1": nn.ModuleDict({"conv": nn.Conv1d(1, 2, 1)}), "layer10": nn.Linear(3, 4)}
    )
    index = neq.NeuronIndex(model)
    assert index.select(["layer1"]).tolist() == [True] * 2 + [False] * 4
    with pytest.raises(ValueError, match="no layer is called 'layer2'"):
        index.select(["layer2"])


class _Subclass(nn.Linear):
    pass


def test_layers_whose_rows_may_mean_something_else_are_left_out_with_a_reason():
    tied = nn.Linear(3, 3)
    other = nn.Linear(3, 3, bias=False)
    other.weight = tied.weight
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(3, 3),
            "subclass": _Subclass(3, 3),
            "parametrised": parametrizations.weight_norm(nn.Linear(3, 3)),
            "tied": tied,
            "other": other,
            "image_norm": nn.LayerNorm([3, 3]),
            "attention": nn.MultiheadAttention(4, 2),
            "no_parameters": nn.BatchNorm1d(3, affine=False),
        }
    )
    index = neq.NeuronIndex(model)
    assert dict(index.items()) == {"plain": slice(0, 3)}
    assert {"subclass", "tied", "other", "image_norm", "attention"} <= index.unsupported.keys()
    assert "shared" in index.unsupported["tied"]
    assert "_Subclass" in index.unsupported["subclass"]
    assert any(name.startswith("parametrised") for name in index.unsupported)
    assert "no_parameters" not in index.unsupported
    assert not index.select(["subclass", "parametrised"]).any()  # known, and never freeze anyway


def test_a_module_registered_twice_is_one_layer():
    shared = nn.Linear(2, 2)
    assert len(neq.NeuronIndex(nn.Sequential(shared, shared))) == 2
    assert not neq.NeuronIndex(nn.ReLU())
    assert torch.equal(neq.NeuronIndex(shared).select([]), torch.tensor([False, False]))
