"""The suites that prune large networks on CIFAR-10 and ImageNet, and VGG-16."""

import pytest
import torch
from trials import run

from harness import load_results
from harness.errors import UserError
from harness.run.preflight import preflight
from harness.run.trials import specs
from harness.suite import files
from harness.suite.config import Published
from harness.suite.parts import build_model
from suites.vgg import VGG, WIDTHS, vgg16

SUITES = ["cifar10-pruning", "cifar10-pruning-vgg", "imagenet-pruning"]
THIN = [12] * 13
TINY = [
    "data.train_size=25",
    "data.validation_size=5",
    "recipe.batch_size=20",
    "recipe.epochs=2",
    "recipe.precision=float32",
    "resources.cpus=1",
]
SHARPNESS = ["sharpness.samples=10", "sharpness.iterations=2"]
MODELS = {
    "cifar10-pruning": ["model.arguments={blocks=1, width=8, channels=3, classes=10}", *SHARPNESS],
    "cifar10-pruning-vgg": [f"model.arguments={{widths={THIN}}}", *SHARPNESS],
    "imagenet-pruning": ["model.input=[3, 32, 32]", "recipe.forward_batch=20"],
}


def tiny(suite, methods=None, *settings):
    return specs(suite, [*TINY, *MODELS[suite], *settings], methods, "0", synthetic=True)


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_vgg16_is_torchvision_s_without_biases_that_batch_norm_takes_out(vision):
    theirs, ours = vision.models.vgg16_bn().features, vgg16()
    biases = sum(m.bias.numel() for m in theirs if isinstance(m, torch.nn.Conv2d))
    assert parameters(ours.features) == parameters(theirs) - biases
    assert parameters(ours) == 14_724_042
    state = {k: v for k, v in theirs.state_dict().items() if k in ours.features.state_dict()}
    ours.features.load_state_dict(state)  # under the same names
    for net in (theirs, ours):
        net.eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # their biases start at zero
        expected = ours.fc(theirs(images).flatten(1))
        assert torch.allclose(ours(images), expected, atol=1e-5)


def test_vgg_starts_as_torchvision_s_does(vision):
    torch.manual_seed(0)
    theirs, ours = vision.models.vgg16_bn(num_classes=10), vgg16()
    pairs = [(ours.fc, theirs.classifier[-1]), *zip(ours.features, theirs.features, strict=False)]
    for one, other in pairs:
        if isinstance(one, torch.nn.Conv2d | torch.nn.Linear):
            ratio = one.weight.detach().std() / other.weight.detach().std()
            assert float(ratio) == pytest.approx(1, abs=0.1)
    assert not ours.fc.bias.any()


def test_vgg_of_other_widths_colours_and_classes():
    widths = list(range(2, 15))
    model = VGG(widths, channels=1, classes=3)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 3)
    inputs = [1, *widths[:-1]]
    convolutions = sum(9 * a * b for a, b in zip(inputs, widths, strict=True))
    assert parameters(model) == convolutions + 2 * sum(widths) + 3 * (widths[-1] + 1)


@pytest.mark.parametrize("widths", [[], WIDTHS[:-1], [*WIDTHS, 512], [0] * 13, [1.5] * 13])
def test_wrong_widths_are_said(widths):
    with pytest.raises(ValueError, match="VGG: widths must be 13 whole numbers from 1 on"):
        VGG(widths)


@pytest.mark.parametrize("name", SUITES)
def test_the_suites_compare_with_controls_and_with_nothing_published(name):
    suite, _ = files.load_suite(name)
    assert suite.published == Published()
    assert "scaled, not the papers'" in suite.title
    kinds = {suite.methods[method].kind for method in suite.default_methods}
    assert {"baseline", "one-shot", "gradual", "lobster", "serene"} <= kinds
    assert {"decay", "random-pruning", "lottery"} <= kinds
    assert not {spec.kind for spec in suite.methods.values()} & {"neq", "random", "freeze_after"}
    for units in ("weights", "neurons"):  # what is compared leaves as much
        mine = [suite.methods[m] for m in suite.default_methods]
        sparsity = {spec.sparsity for spec in mine if getattr(spec, "units", "") == units}
        assert len(sparsity) == 1


@pytest.mark.parametrize("name", ["cifar10-pruning", "cifar10-pruning-vgg"])
def test_the_smaller_model_has_as_many_parameters_as_pruning_leaves(name):
    suite, folder = files.load_suite(name)
    changes = suite.methods["smaller"].arguments
    dense, smaller = (
        parameters(build_model(suite.model.build, folder, suite.model.arguments | more))
        for more in ({}, changes)
    )
    assert smaller / dense == pytest.approx(1 - suite.methods["gradual"].sparsity, rel=0.05)


def test_what_the_suites_train():
    resnet, _ = files.load_suite("cifar10-pruning")
    vgg, _ = files.load_suite("cifar10-pruning-vgg")
    imagenet, _ = files.load_suite("imagenet-pruning")
    assert resnet.model.arguments == {"blocks": 5, "width": 16, "channels": 3, "classes": 10}
    assert (vgg.model.build, vgg.model.arguments) == ("suites.vgg:VGG", {})
    assert resnet.data == vgg.data
    assert (resnet.sharpness.samples, resnet.sharpness.every) == (500, 20)
    assert imagenet.model.weights == "torchvision:ResNet18_Weights.IMAGENET1K_V1"
    assert imagenet.recipe.optimizer.arguments["lr"] < 0.1


def test_torchvision_knows_the_weights(vision):
    suite, _ = files.load_suite("imagenet-pruning")
    library, _, name = suite.model.weights.partition(":")
    weights = vision.models.get_weight(name)
    assert (library, weights.url.split("/")[-1].split("-")[0]) == ("torchvision", "resnet18")


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_every_default_method_can_be_built(name):
    trials = tiny(name)
    assert len(trials) == len(files.load_suite(name)[0].default_methods)
    preflight(trials)


@pytest.mark.slow
def test_too_narrow_a_vgg_is_one_line():
    settings = [*TINY, *SHARPNESS, "methods.smaller.arguments={widths=[3, 3]}"]
    with pytest.raises(UserError, match="widths must be 13 whole numbers") as caught:
        preflight(specs("cifar10-pruning-vgg", settings, "smaller", "0", synthetic=True))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_a_trial(tmp_path, name):
    (spec,) = tiny(name, "random-pruning", "recipe.epochs=1")
    run(spec, tmp_path)
    found = load_results(name, root=str(tmp_path))
    assert len(found.epochs) == 1
    rows = found.measures[found.measures["layer"].isna()].set_index("name")["value"]
    assert ("sharpness_low" in rows) == (spec.suite.sharpness is not None)
    model = build_model(spec.suite.model.build, spec.folder, spec.suite.model.arguments)
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)  # all else is never pruned
    pruned = round(spec.suite.methods["random-pruning"].sparsity * weights)
    assert rows["parameters_left"] == rows["parameters"] - pruned == parameters(model) - pruned
