"""Linear CKA of a layer's outputs between two epochs, in blocks of its neurons.

κ = ‖Cxy‖²_F / (‖Cxx‖_F ‖Cyy‖_F) with the covariances C of outputs now (X) and one epoch ago (Y);
Kornblith et al., "Similarity of Neural Network Representations Revisited" (ICML 2019), equation 4.
A rotation or a shift within the block leaves it as it is.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neq.neurons import Layer, NeuronIndex
from neq.parallel import add_up
from neq.positions import by_sample

POSITIONS = 256  # of each sample that are looked at, at the most
CHUNK = 2**22  # elements of an output that are multiplied in float64 at a time
NOTHING = 1e-12  # the share of variance, mean included, below which a block does not vary


class CkaSums:
    """Sums over rows (sample, position) from which the CKA of each block follows.

    `width`: neurons of a block; a layer is cut into such blocks, of which the last may be smaller.
    """

    def __init__(self, neurons: NeuronIndex, width: int) -> None:
        self._neurons, self._width = neurons, width
        self._sums: dict[str, _Sums] = {}
        self._unmatched: set[str] = set()
        self.flops = 0

    def add(
        self,
        layer: Layer,
        before: Tensor,
        now: Tensor,
        samples: int,
        masks: Sequence[Tensor] = (),
    ) -> None:
        """The outputs of one call of `layer`, of like shape, on a batch of so many samples.

        `masks`: as of neq.positions.by_sample; what they leave out is no row.
        """
        sums = self._sums.setdefault(layer.name, _Sums.zeros(layer.size, self._width, now.device))
        for x, y in zip(*(_rows(out, layer, samples, masks) for out in (now, before)), strict=True):
            sums.add(x.to(torch.float64), y.to(torch.float64))

    def miss(self, layer: str) -> None:
        """The layer has outputs that can't be compared."""
        self._unmatched.add(layer)

    def result(self, device: torch.device) -> Tensor:
        """κ of the block of each neuron, over the samples of all ranks: float64 [neurons].

        NaN where there are fewer than two rows for each neuron of the block, where the layer was
        not called, and where its outputs had other shapes. `flops` is then what the products took,
        of all ranks.
        """
        values = torch.full((len(self._neurons),), torch.nan, dtype=torch.float64)
        self.flops = 0
        for layer in self._neurons.layers:
            sums = self._sums.get(layer.name) or _Sums.zeros(layer.size, self._width, device)
            missing = torch.tensor([float(layer.name in self._unmatched)], device=device)
            total = add_up(torch.cat([missing.double(), sums.flat()]))
            sums.fill(total[1:])
            self.flops += sums.flops()
            if total[0] == 0:
                values[layer.neurons] = sums.kappa().cpu()
        return values


@dataclass(slots=True)
class _Sums:
    """n [1], Σx and Σy [neurons] of a layer, and of each block X'X, Y'Y and X'Y [3, d, d]."""

    rows: Tensor
    means: Tensor
    products: list[Tensor]

    @classmethod
    def zeros(cls, size: int, width: int, device: torch.device) -> "_Sums":
        widths = [len(part) for part in torch.split(torch.arange(size), width)]
        shapes = [(1,), (2, size), *((3, d, d) for d in widths)]
        rows, means, *products = (
            torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes
        )
        return cls(rows, means, products)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows of outputs now and before: float64 [rows, neurons] each."""
        self.rows += len(x)
        self.means += torch.stack([x.sum(0), y.sum(0)])
        widths = [product.shape[-1] for product in self.products]
        for product, a, b in zip(
            self.products, torch.split(x, widths, 1), torch.split(y, widths, 1), strict=True
        ):
            for place, (left, right) in enumerate(((a, a), (b, b), (a, b))):
                product[place].addmm_(left.t(), right)

    def flat(self) -> Tensor:
        return torch.cat([t.flatten() for t in (self.rows, self.means, *self.products)])

    def fill(self, flat: Tensor) -> None:
        parts = (self.rows, self.means, *self.products)
        values = torch.split(flat, [part.numel() for part in parts])
        for part, value in zip(parts, values, strict=True):
            part.copy_(value.view(part.shape))

    def flops(self) -> int:
        return sum(2 * int(self.rows) * product.numel() for product in self.products)

    def kappa(self) -> Tensor:
        """By neuron: float64 [neurons]."""
        widths = [product.shape[-1] for product in self.products]
        means = torch.split(self.means, widths, 1)
        found = [
            torch.full((d,), self._of_block(product, *mean), dtype=torch.float64)
            for d, product, mean in zip(widths, self.products, means, strict=True)
        ]
        return torch.cat(found)

    def _of_block(self, products: Tensor, a: Tensor, b: Tensor) -> float:
        n = float(self.rows)
        if n < 2 * len(a):
            return torch.nan
        pairs = ((a, a), (b, b), (a, b))
        shifts = torch.stack([torch.outer(left, right) / n for left, right in pairs])
        xx, yy, xy = products - shifts
        still = [
            bool(centred.trace() <= NOTHING * whole.trace())
            for centred, whole in zip((xx, yy), products, strict=False)
        ]
        if any(still):
            return float(all(still))
        kappa = xy.square().sum() / (xx.norm() * yy.norm())
        return float(kappa.clamp(0.0, 1.0))


def _rows(
    output: Tensor, layer: Layer, samples: int, masks: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The rows [≤ n, neurons] of an output, some of its positions of each sample, in chunks.

    Where samples are not its outermost axis, as many positions are drawn of the whole batch.
    """
    parted, counts = by_sample(output, layer.axis, samples, masks)
    flat = parted.reshape(len(parted), -1, layer.size)
    if counts is not None:
        flat = _counted(flat, counts.repeat_interleave(flat.shape[1] // counts.shape[1], 1), layer)
    else:
        most = POSITIONS * samples // len(parted)
        if flat.shape[1] > most:
            flat = flat[:, _drawn(layer.name, flat.shape[1], most).to(output.device)]
    return torch.split(flat.reshape(-1, layer.size), max(CHUNK // layer.size, 1))


def _counted(flat: Tensor, counts: Tensor, layer: Layer) -> Tensor:
    """The rows of each sample that count, drawn as if the sample had no others: [rows, neurons]."""
    if flat.shape[1] > POSITIONS:
        counts = counts.clone()
        for row in counts:
            places = row.nonzero().squeeze(1)
            if len(places) > POSITIONS:
                drawn = _drawn(layer.name, len(places), POSITIONS).to(row.device)
                row.zero_()
                row[places[drawn]] = True
    return flat[counts]


def _drawn(name: str, positions: int, most: int) -> Tensor:
    """Which positions of a layer are looked at: the same in every epoch and on every machine."""
    digest = hashlib.sha256(f"0 {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    return torch.randperm(positions, generator=generator)[:most].sort().values
