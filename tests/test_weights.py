import pytest
import torch
from torch import nn

from harness.errors import UserError
from harness.suite.config import Model
from harness.train import weights


class Backbone(nn.Module):
    def __init__(self, blocks=1):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layers = nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(blocks)))


class Whole(nn.Module):
    def __init__(self, classes=3, blocks=1):
        super().__init__()
        self.backbone = Backbone(blocks)
        self.fc = nn.Linear(4, classes)


def parts(path, **more):
    return Model(build="a:b", input=(3, 8, 8), **{"weights": str(path), "exclude": ["fc"]} | more)


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(1)
    path = tmp_path / "weights.pt"
    torch.save(Whole().state_dict(), path)
    return path


def test_training_starts_from_a_file(file):
    torch.manual_seed(1)
    wanted = Whole().state_dict()
    model = Whole()
    weights.load_weights(model, parts(file))
    assert all(torch.equal(a, wanted[name]) for name, a in model.state_dict().items())
    weights.load_weights(model, parts(""))  # from scratch: nothing to do


def test_a_checkpoint_and_a_parallel_model_s_names(file, tmp_path):
    state = {f"module.{name}": t for name, t in torch.load(file).items()}
    torch.save({"epoch": 3, "model": state}, tmp_path / "c.pt")
    model = Whole()
    weights.load_weights(model, parts(tmp_path / "c.pt"))
    assert torch.equal(model.fc.weight, state["module.fc.weight"])


def test_safetensors(file, tmp_path):
    from safetensors.torch import save_file

    state = torch.load(file)
    save_file(state, tmp_path / "w.safetensors")
    model = Whole()
    weights.load_weights(model, parts(tmp_path / "w.safetensors"))
    assert torch.equal(model.backbone.stem.weight, state["backbone.stem.weight"])


def test_a_head_for_other_classes_starts_anew(file):
    model = Whole(classes=7)
    before = model.fc.weight.clone()
    weights.load_weights(model, parts(file))
    assert torch.equal(model.fc.weight, before)
    assert torch.equal(model.backbone.stem.weight, torch.load(file)["backbone.stem.weight"])
    with pytest.raises(UserError, match=r"2 tensors are missing or have another shape, such as fc"):
        weights.load_weights(Whole(classes=7), parts(file, exclude=[]))


def test_weights_of_a_part_of_the_model(tmp_path):
    class Classifier(Backbone):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 9)

    torch.save(Classifier().state_dict(), tmp_path / "b.pt")
    model = Whole()
    weights.load_weights(model, parts(tmp_path / "b.pt", weights_into="backbone"))
    assert torch.equal(model.backbone.stem.bias, torch.load(tmp_path / "b.pt")["stem.bias"])


@pytest.mark.parametrize(
    "model, more, message",
    [
        (
            Whole(blocks=2),
            {},
            r"another architecture: 4 tensors are missing .* backbone\.layers\.1",
        ),
        (Backbone(), {}, "another architecture"),
        (Whole(), {"weights_into": "tail"}, "no part of the model is called 'tail'"),
    ],
)
def test_another_architecture(file, model, more, message):
    with pytest.raises(UserError, match=message):
        weights.load_weights(model, parts(file, **more))


def test_a_deeper_sibling_is_another_architecture(tmp_path):
    """All that the model needs is there, and more of its own parts."""
    torch.save(Whole(blocks=3).state_dict(), tmp_path / "deep.pt")
    with pytest.raises(UserError, match=r"10 tensors are too many, such as backbone\.layers\.1"):
        weights.load_weights(Whole(), parts(tmp_path / "deep.pt"))


def test_files_that_are_none(tmp_path):
    (tmp_path / "text.pt").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": Whole}, tmp_path / "code.pt")
    for name, message in (
        ("text.pt", "cannot be loaded"),
        ("none.pt", "cannot be loaded"),
        ("code.pt", "cannot be loaded"),  # nothing is unpickled but tensors
        ("list.pt", "holds no state dict"),
        ("torchvision:Nothing", "cannot be loaded"),
        ("timm:nothing_at_all", "cannot be loaded"),
    ):
        where = name if ":" in name else tmp_path / name
        with pytest.raises(UserError, match=message) as caught:
            weights.load_weights(Whole(), parts(where))
        assert "\n" not in str(caught.value)


def test_the_key_knows_the_content_and_not_the_place(file, tmp_path):
    (tmp_path / "copy").write_bytes(file.read_bytes())
    assert weights.weights_identity(str(file)) == weights.weights_identity(str(tmp_path / "copy"))
    (tmp_path / "other").write_bytes(file.read_bytes()[:-1])
    assert weights.weights_identity(str(file)) != weights.weights_identity(str(tmp_path / "other"))
    assert weights.weights_identity("timm:resnet18") == "timm:resnet18"
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        weights.weights_identity(str(tmp_path / "gone"))


def test_counters_that_older_files_do_not_have(file, tmp_path):
    state = {k: v for k, v in torch.load(file).items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pt")
    model = Whole()
    weights.load_weights(model, parts(tmp_path / "old.pt"))
    assert torch.equal(model.backbone.layers[0].weight, state["backbone.layers.0.weight"])


@pytest.mark.parametrize("counters", [True, False])
def test_torchvision_s_backbone_goes_into_the_segmentation_suite(vision, monkeypatch, counters):
    from harness.suite import files, parts

    state = vision.models.resnet50().state_dict()
    kept = {k: v for k, v in state.items() if counters or not k.endswith("tracked")}
    kind = vision.models.ResNet50_Weights
    monkeypatch.setattr(kind, "get_state_dict", lambda *_, **__: dict(kept))
    suite, folder = files.load_suite("segmentation")
    model = parts.build_model(suite.model.build, folder, suite.model.arguments)
    weights.load_weights(model, suite.model)
    for name, tensor in model.backbone.state_dict().items():
        assert name.endswith("tracked") or torch.equal(tensor, state[name])


def test_the_layout_in_which_swin_was_published(tmp_path):
    """Downsampling belongs to the stage before, the head has no fc, and 21,841 classes."""
    import timm

    torch.manual_seed(0)
    small = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "img_size": 56}
    name = "swin_base_patch4_window7_224"
    source = timm.create_model(name, num_classes=9, **small)
    published = {}
    for key, tensor in source.state_dict().items():
        key = key.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head")
        published[key] = tensor
    torch.save({"model": published}, tmp_path / "swin.pth")
    model = timm.create_model(name, num_classes=3, **small)
    weights.load_weights(model, parts(tmp_path / "swin.pth", exclude=["head"]))
    for key, tensor in source.state_dict().items():
        if not key.startswith("head"):
            assert torch.equal(model.state_dict()[key], tensor), key
