"""VGG-16 (Simonyan and Zisserman 2015, configuration D) with BatchNorm, for images of 32 × 32."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

BLOCKS = (2, 2, 3, 3, 3)  # convolutions before each pooling
WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)


class VGG(nn.Module):
    """13 convolutions of 3 × 3 in five blocks, pooling after each, and one dense layer.

    As usual for small images, in the place of the paper's three dense layers. `widths`: channels
    of the convolutions; `channels`: of the images. Weights start as torchvision's do; convolutions
    have no bias, which the BatchNorm behind would take out again. Raises ValueError for other than
    13 widths, or one below 1.
    """

    def __init__(
        self, widths: Sequence[int] = WIDTHS, channels: int = 3, classes: int = 10
    ) -> None:
        super().__init__()
        _check(widths)
        layers: list[nn.Module] = []
        left, inputs = list(widths), channels
        for convolutions in BLOCKS:
            for _ in range(convolutions):
                outputs = left.pop(0)
                layers += _convolution(inputs, outputs)
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.fc.weight, 0, 0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, 32, 32] → logits [n, classes]."""
        logits: Tensor = self.fc(torch.flatten(self.features(x), 1))
        return logits


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def _check(widths: Sequence[int]) -> None:
    given = list(widths)
    if len(given) != len(WIDTHS) or not all(isinstance(w, int) and w >= 1 for w in given):
        raise ValueError(
            f"VGG: widths must be {len(WIDTHS)} whole numbers from 1 on, such as "
            f"{', '.join(map(str, WIDTHS))}; got {', '.join(map(str, given)) or 'none'}"
        )


def vgg16() -> VGG:
    """The usual network for CIFAR-10: 8458 neurons, 14,724,042 parameters."""
    return VGG()
