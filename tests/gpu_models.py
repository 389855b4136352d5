"""Models of the speed tables that the command line can't name: they take arguments."""

from torch import nn

from harness.vision import torchvision
from suites.segmentation import model


def swin_tiny() -> nn.Module:
    """timm's Swin-T (Liu et al. 2021) for images of 224 × 224, without weights."""
    timm = torchvision("timm")
    return timm.create_model("swin_tiny_patch4_window7_224", pretrained=False)


def deeplab() -> nn.Module:
    """DeepLabv3-ResNet50 for the 21 classes of VOC, without weights."""
    return model.deeplabv3(21)
