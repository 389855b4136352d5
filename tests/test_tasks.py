import numpy
import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score
from torch.nn import functional

from harness.errors import UserError
from harness.seeds import seeded
from harness.tasks import Classification, Segmentation

CPU = torch.device("cpu")


def scenes(seed, samples=3, classes=5, border=True):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, 7, 9, generator=draw)
    targets = torch.randint(classes - 1, (samples, 7, 9), generator=draw, dtype=torch.uint8)
    if border:
        targets[:, 0] = 255
    return logits, targets


def test_accuracy_is_scikit_learn_s():
    draw = torch.Generator().manual_seed(0)
    meter, outputs = Classification().meter(CPU), torch.randn(30, 4, generator=draw)
    targets = torch.randint(4, (30,), generator=draw)
    for part in (slice(0, 13), slice(13, 30)):
        meter.add(outputs[part], targets[part])
    assert meter.value() == accuracy_score(targets, outputs.argmax(1))
    assert numpy.isnan(Classification().meter(CPU).value())


def test_mean_iou_is_scikit_learn_s_without_the_border():
    meter, seen = Segmentation(5).meter(CPU), []
    for seed in range(3):
        logits, targets = scenes(seed)
        meter.add({"out": logits, "aux": None}, targets)
        kept = targets != 255
        seen.append((targets[kept], logits.argmax(1)[kept]))
    truth, guess = (torch.cat(parts).numpy() for parts in zip(*seen, strict=True))
    assert meter.value() == pytest.approx(jaccard_score(truth, guess, average="macro"))
    assert 4 not in truth
    assert 4 in guess  # a class that is only predicted counts as zero


def test_classes_that_do_not_occur_are_left_out():
    meter = Segmentation(5).meter(CPU)
    logits = torch.zeros(1, 5, 2, 2)
    logits[:, 1] = 1
    meter.add(logits, torch.tensor([[[1, 1], [1, 0]]], dtype=torch.uint8))
    assert meter.value() == pytest.approx((3 / 4 + 0) / 2)
    assert numpy.isnan(Segmentation(5).meter(CPU).value())


def test_the_border_has_no_loss():
    logits, targets = scenes(0)
    seen = targets != 255
    rows = logits.movedim(1, -1)[seen]
    expected = functional.cross_entropy(rows, targets[seen].long())
    task = Segmentation(5)
    assert task.loss(logits, targets) == pytest.approx(float(expected), rel=1e-6)
    both = task.loss({"out": logits, "aux": 2 * logits}, targets)
    auxiliary = functional.cross_entropy(2 * rows, targets[seen].long())
    assert both == pytest.approx(float(expected + 0.5 * auxiliary), rel=1e-6)
    logits.requires_grad_()
    task.loss(logits, targets).backward()
    assert (logits.grad[:, :, 0] == 0).all()
    assert (logits.grad[:, :, 1:] != 0).any()


def test_nothing_but_border_is_no_loss_and_not_nan():
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    loss = Segmentation(5).loss(logits, torch.full((2, 4, 4), 255, dtype=torch.uint8))
    loss.backward()
    assert loss == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("task", [Classification(), Segmentation(5)])
def test_counts_of_workers_add_up(task):
    parts = [scenes(seed) for seed in range(4)]
    if isinstance(task, Classification):
        parts = [(logits[:, :, 0, 0], targets[:, 1, 0]) for logits, targets in parts]
    whole, *halves = (task.meter(CPU) for _ in range(3))
    for place, part in enumerate(parts):
        whole.add(*part)
        halves[place % 2].add(*part)
    halves[0].counts += halves[1].counts
    assert halves[0].value() == whole.value()


def test_mixup_and_cutmix_mix_images_and_labels_alike():
    task = Classification(mixup=0.8, cutmix=1.0, classes=4)
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8).contiguous()
    labels, kinds = torch.arange(4), set()
    for seed in range(12):
        with seeded(seed, "mix"):
            mixed, shares = task.mix(images, labels)
        assert shares.shape == (4, 4)
        assert torch.allclose(shares.sum(1), torch.ones(4))
        # The mean pixel is the mean label: each image's pixels are its label.
        expected = shares @ torch.arange(4.0)
        assert torch.allclose(mixed.mean((1, 2, 3)), expected, atol=1e-5)
        kinds.add(bool((mixed == mixed.round()).all()))
        with seeded(seed, "mix"):
            assert torch.equal(task.mix(images, labels)[0], mixed)
    assert kinds == {True, False}  # cut out whole pixels, and blended ones
    loss = task.loss(torch.randn(4, 4), shares)
    assert loss.isfinite()
    with pytest.raises(ValueError, match="number of classes"):
        Classification(mixup=0.5)


def test_label_smoothing_is_torch_s():
    outputs, targets = torch.randn(6, 4), torch.randint(4, (6,))
    smoothed = functional.cross_entropy(outputs, targets, label_smoothing=0.1)
    assert torch.equal(Classification(label_smoothing=0.1).loss(outputs, targets), smoothed)


@pytest.mark.parametrize(
    "task, outputs, targets, message",
    [
        (Classification(), torch.zeros(2, 3), torch.tensor([0, 3]), "labels from 0 to 3 do not"),
        (Classification(), torch.zeros(2, 3), torch.tensor([0, -1]), "labels from -1 to 0"),
        (Classification(), torch.zeros(2, 3), torch.zeros(2), "must be whole numbers"),
        (Classification(), {"out": 1}, torch.tensor([0, 1]), "the model returns dict"),
        (Classification(), torch.zeros(2, 3), torch.zeros(2, 4).long(), r"batch are \[2, 4\]"),
        (Segmentation(3), torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 5).long(), r"\[2, 4, 5\]"),
        (Segmentation(3), torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), 3), "labels from 3 to 3"),
        (Segmentation(4), torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4), "has 3 classes, the task"),
    ],
)
def test_what_does_not_fit_is_said(task, outputs, targets, message):
    with pytest.raises(UserError, match=message):
        task.check(outputs, targets)


def test_what_fits_is_accepted():
    Classification().check(torch.zeros(2, 3), torch.tensor([0, 2]))
    ignored = torch.full((2, 4, 4), 255, dtype=torch.uint8)
    Segmentation(3).check({"out": torch.zeros(2, 3, 4, 4)}, ignored)
    draw = torch.Generator().manual_seed(0)
    for task, outputs in (
        (Classification(), torch.zeros(5, 3)),
        (Segmentation(3), torch.zeros(5, 3, 4, 4)),
    ):
        task.check(outputs, task.random_targets(outputs, draw))
