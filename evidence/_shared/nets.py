"""Small image networks with named stages, and their plain training and scoring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transfuse.core.batches import minibatches
from transfuse.core.training import loop, seeded


class MLP(nn.Sequential):
    """Linear layers with ReLU between: `MLP(64, 32, 10)`. Modules are numbered 0, 1, ..., activations included."""

    def __init__(self, *widths: int):
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:]):  # noqa: RUF007
            layers += [nn.Linear(a, b), nn.ReLU()]
        super().__init__(*layers[:-1])

    def forward(self, pixel_values: Tensor) -> Tensor:
        return super().forward(pixel_values.flatten(1))


class CNN(nn.Module):
    """3x3 convolutions with batch norm and ReLU, one stage per width; every stage after the first halves the image.

    Stages are `stage1`, `stage2`, ...; then a global mean and the linear `head`.
    """

    def __init__(self, widths: Sequence[int], classes: int = 10, channels: int = 1):
        super().__init__()
        self.depth = len(widths)
        before = channels
        for i, width in enumerate(widths, 1):
            stage = nn.Sequential(
                nn.Conv2d(before, width, 3, stride=1 if i == 1 else 2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            )
            self.add_module(f"stage{i}", stage)
            before = width
        self.head = nn.Linear(before, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = pixel_values
        for i in range(1, self.depth + 1):
            x = self.get_submodule(f"stage{i}")(x)
        return self.head(x.mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.more = stride, width - before

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        if self.more:
            short = nn.functional.pad(short, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return torch.relu(y + short)


class ResNet(nn.Module):
    """The CIFAR ResNets: `ResNet(3)` is ResNet-20, `ResNet(1)` ResNet-8. Stages `layer1` to `layer3`, then `head`."""

    def __init__(self, blocks: int, classes: int = 10, width: int = 16, channels: int = 3):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        before = width
        for i in range(3):
            own = width * 2**i
            steps = [_Block(before if j == 0 else own, own, 2 if j == 0 and i else 1) for j in range(blocks)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*steps))
            before = own
        self.head = nn.Linear(before, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values)
        for i in (1, 2, 3):
            x = self.get_submodule(f"layer{i}")(x)
        return self.head(x.mean((2, 3)))


def make(seed: int, build: type[nn.Module], *arguments: object, **options: object) -> nn.Module:
    """A network whose initial weights depend on the seed alone."""
    with seeded(seed):
        return build(*arguments, **options)


def learn(
    model: nn.Module, images: Tensor, labels: Tensor, *, steps: int, lr: float, batch_size: int, seed: int
) -> nn.Module:
    """Train on labels alone, with Adam."""
    per_epoch = len(images) // batch_size
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    batches = minibatches({"x": images, "y": labels}, batch_size, seed=seed, drop_last=True)
    loop(
        model, batches, lambda b: nn.functional.cross_entropy(model(b["x"]), b["y"]), optimizer=optimizer,
        epochs=max(1, round(steps / per_epoch)), seed=seed,
    )  # fmt: skip
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 512) -> float:
    """Percent right, in evaluation mode."""
    mode = model.training
    model.eval()
    right = sum(
        int((model(x).argmax(-1) == y).sum())
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    )
    model.train(mode)
    return 100.0 * right / len(images)
