"""torchvision's segmentation models, without weights: a suite says where those come from."""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from harness.vision import torchvision
from suites.resnet import ResNet


def deeplabv3(classes: int) -> nn.Module:
    """DeepLabv3-ResNet50 with an auxiliary head (Chen et al. 2017): 57,258 neurons for VOC."""
    models: Any = torchvision("torchvision.models.segmentation")
    built: nn.Module = models.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=classes, aux_loss=True
    )
    return built


def light(classes: int, width: int) -> nn.Module:
    """LR-ASPP (Howard et al. 2019) on a residual network of eight layers with a stride of two."""
    models: Any = torchvision("torchvision.models.segmentation")
    built: nn.Module = models.LRASPP(
        Trunk(width), low_channels=width, high_channels=4 * width, num_classes=classes
    )
    return built


class Trunk(nn.Module):
    """Features of the first and of the last stage, at half and at an eighth of the resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        whole = ResNet(1, width, 3, 1)
        whole.conv1.stride = (2, 2)
        self.stages = nn.ModuleDict(
            {name: part for name, part in whole.named_children() if name != "fc"}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[n, 3, h, w] → low [n, width, h / 2, w / 2], high [n, 4 · width, h / 8, w / 8]."""
        x = functional.relu(self.stages["bn1"](self.stages["conv1"](x)))
        low = self.stages["layer1"](x)
        high = self.stages["layer3"](self.stages["layer2"](low))
        return OrderedDict(low=low, high=high)
