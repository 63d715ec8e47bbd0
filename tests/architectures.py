"""Untrained networks with one peculiarity each, for the paths that rewrite a network before they run it.

All take 8x8 grey images, and define their layers in the order in which they run them.
"""

from collections.abc import Callable

import torch
from small_networks import digits
from torch import Tensor, nn
from torch.nn import functional

N_CLASSES = 10


def conv(n_in: int, n_out: int, size: int = 3, **options: object) -> nn.Conv2d:
    """A convolution that keeps the size of its images unless `options` say otherwise."""
    return nn.Conv2d(n_in, n_out, size, **({"padding": size // 2, "bias": False} | options))  # type: ignore[arg-type]


class Small(nn.Module):
    """A stem of eight channels, something, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = conv(1, 8), nn.BatchNorm2d(8)
        self.body()
        # Corners apart: the mean over whole images is nearly the same for all digits.
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(32, N_CLASSES)

    def body(self) -> None:
        """Define the layers in between."""
        self.a, self.a_norm = conv(8, 8), nn.BatchNorm2d(8)
        self.b, self.b_norm = conv(8, 8), nn.BatchNorm2d(8)

    def middle(self, x: Tensor) -> Tensor:
        """What is peculiar."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem_norm(self.stem(x)))
        return self.head(self.pool(self.middle(x)).flatten(1))


class PreActivation(Small):
    """Batch norm and ReLU come before each convolution, and not all of them can be folded."""

    def body(self) -> None:
        self.a_norm, self.a = nn.BatchNorm2d(8), conv(8, 8)
        self.b_norm, self.b = nn.BatchNorm2d(8), conv(8, 8)
        self.last_norm = nn.BatchNorm2d(8)

    def middle(self, x: Tensor) -> Tensor:
        y = self.a(functional.relu(self.a_norm(x)))
        x = self.b(functional.relu(self.b_norm(y))) + x
        return functional.relu(self.last_norm(x))


class Downsampled(Small):
    """Two convolutions are summed, one of them the shortcut."""

    def body(self) -> None:
        self.a, self.a_norm = conv(8, 8, stride=2), nn.BatchNorm2d(8)
        self.b, self.b_norm = conv(8, 8), nn.BatchNorm2d(8)
        self.shortcut, self.shortcut_norm = conv(8, 8, 1, stride=2), nn.BatchNorm2d(8)

    def middle(self, x: Tensor) -> Tensor:
        y = self.b_norm(self.b(functional.relu(self.a_norm(self.a(x)))))
        return functional.relu(y + self.shortcut_norm(self.shortcut(x)))


class ShortcutFirst(Downsampled):
    """The shortcut is computed before the block that it is added to, and is the first summand."""

    def body(self) -> None:
        self.shortcut, self.shortcut_norm = conv(8, 8, 1, stride=2), nn.BatchNorm2d(8)
        self.a, self.a_norm = conv(8, 8, stride=2), nn.BatchNorm2d(8)
        self.b, self.b_norm = conv(8, 8), nn.BatchNorm2d(8)

    def middle(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut_norm(self.shortcut(x))
        y = self.b_norm(self.b(functional.relu(self.a_norm(self.a(x)))))
        return (shortcut + y).relu()


class InPlace(Small):
    """ReLU modules and a sum that change their input, which nobody reads again."""

    def body(self) -> None:
        self.first = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.second = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8))
        self.third = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8))
        self.relu = nn.ReLU(inplace=True)

    def middle(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        y += x
        y = self.relu(y)
        z = self.third(y)
        z += y
        return self.relu(z).clamp_(max=5)


class ReadAgain(Small):
    """Summands that are needed after the sum, which must not be written over them."""

    def middle(self, x: Tensor) -> Tensor:
        y = functional.relu(self.a_norm(self.a(x)) + x)
        z = functional.relu(self.b_norm(self.b(y)) + x)
        return x + 2 * y + 3 * z


class ViewReadAgain(Small):
    """A summand of which a view is needed after the sum."""

    def middle(self, x: Tensor) -> Tensor:
        part = x[:, :, 2:6, 2:6]
        y = functional.relu(self.a_norm(self.a(functional.hardswish(x))) + x)
        return self.b_norm(self.b(y)).mean((2, 3), keepdim=True) + part


class SumOfInput(Small):
    """What is added is what is convolved."""

    def middle(self, x: Tensor) -> Tensor:
        x = functional.relu(x + self.a_norm(self.a(x)))
        return torch.add(self.b(x), x).relu()


class SqueezeExcite(Small):
    """A sum and a product with one number for each channel."""

    def body(self) -> None:
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.a, self.a_norm = conv(8, 8), nn.BatchNorm2d(8)
        self.b = conv(8, 8)

    def middle(self, x: Tensor) -> Tensor:
        pooled = functional.adaptive_avg_pool2d(x, 1)
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(pooled))))
        x = functional.relu(self.a_norm(self.a(x * gate)) + gate)
        return functional.relu(pooled + self.b(x))


class BroadcastSummand(Small):
    """A convolution of one pixel is added to images, so that the sum is larger than the convolution's own output."""

    def body(self) -> None:
        self.a = nn.Conv2d(8, 8, 1)

    def middle(self, x: Tensor) -> Tensor:
        return functional.relu(self.a(functional.adaptive_avg_pool2d(x, 1)) + x)


class BiasAndNorm(Small):
    """Convolutions with a bias and a batch norm, one of them without scale and shift, one without any bias at all."""

    def body(self) -> None:
        self.a, self.a_norm = conv(8, 8, bias=True), nn.BatchNorm2d(8, eps=1e-2)
        self.b, self.b_norm = conv(8, 8, bias=True), nn.BatchNorm2d(8, affine=False)
        self.c, self.c_norm = conv(8, 8), nn.BatchNorm2d(8, affine=False)

    def middle(self, x: Tensor) -> Tensor:
        x = functional.relu(self.a_norm(self.a(x)))
        x = functional.relu(self.b_norm(self.b(x)) + x)
        return functional.relu(self.c_norm(self.c(x)))


class OddGeometry(Small):
    """Paddings that are no numbers or no zeros, dilation, strides, groups, and kernels that are not square."""

    def body(self) -> None:
        self.reflecting = conv(8, 8, padding_mode="reflect")
        self.circular = conv(8, 8, padding_mode="circular")
        self.norm = nn.BatchNorm2d(8)
        self.same = conv(8, 8, 3, padding="same")
        self.dilated = conv(8, 8, dilation=2, padding=2, bias=True)
        self.depthwise = conv(8, 16, groups=8)
        self.wide = nn.Conv2d(16, 8, (1, 3), stride=(2, 1), padding=(0, 1), groups=4)
        self.last_norm = nn.BatchNorm2d(8)

    def middle(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.circular(self.reflecting(x))))
        x = functional.relu(self.dilated(self.same(x)) + x)
        return functional.relu(self.last_norm(self.wide(self.depthwise(x))))


class OtherNorms(Small):
    """Group norm, and batch norm that has no running statistics."""

    def body(self) -> None:
        self.a, self.groups = conv(8, 8), nn.GroupNorm(2, 8)
        self.b, self.b_norm = conv(8, 8), nn.BatchNorm2d(8, track_running_stats=False)

    def middle(self, x: Tensor) -> Tensor:
        return functional.relu(self.b_norm(self.b(functional.relu(self.groups(self.a(x))))))


class UsedTwice(Small):
    """One convolution that runs three times, with two batch norms of its own."""

    def body(self) -> None:
        self.a, self.first_norm, self.second_norm = conv(8, 8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def middle(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first_norm(self.a(x)))
        x = functional.relu(self.second_norm(self.a(x)) + x)
        return functional.relu(self.a(x))


class NormUsedTwice(Small):
    """A block of which also the batch norm runs three times, so that its first run decides on the repair."""

    def middle(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = functional.relu(self.a_norm(self.a(x)) + x)
        return functional.relu(self.b_norm(self.b(x)))


class Concatenated(Small):
    """Channels that are concatenated, shuffled and split, with lone batch norms and no ReLU in between."""

    def body(self) -> None:
        self.a, self.a_norm = conv(8, 8), nn.BatchNorm2d(8)
        self.both_norm = nn.BatchNorm2d(16)
        self.b = conv(8, 8, bias=True)

    def middle(self, x: Tensor) -> Tensor:
        both = self.both_norm(torch.cat([x, self.a_norm(self.a(x))], 1))
        n, c, h, w = both.shape
        left, right = both.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w).chunk(2, 1)
        return functional.relu(self.b(left) - right)


class Linear(Small):
    """No convolution after the stem: lines of pixels as tokens, with attention between them."""

    def body(self) -> None:
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def middle(self, x: Tensor) -> Tensor:
        tokens = x.mean(3).transpose(1, 2)
        tokens = self.norm(tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0])
        return tokens.transpose(1, 2)[..., None]


ARCHITECTURES: dict[str, Callable[[], Small]] = {
    kind.__name__: kind
    for kind in (
        PreActivation,
        Downsampled,
        ShortcutFirst,
        InPlace,
        ReadAgain,
        ViewReadAgain,
        SumOfInput,
        SqueezeExcite,
        BroadcastSummand,
        BiasAndNorm,
        OddGeometry,
        OtherNorms,
        UsedTwice,
        NormUsedTwice,
        Concatenated,
        Linear,
    )
}


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    """An untrained network whose batch norms have seen the digits, in evaluation mode."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = kind().train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        for batch in digits()[0][:1000].clone().split(100):
            network(batch)
    return network.eval()


class Plain(Small):
    """Two convolutions in a row, for networks that differ in one call."""

    def middle(self, x: Tensor) -> Tensor:
        return self.after(self.b_norm(self.b(self.between(self.a_norm(self.a(x))))))

    def between(self, x: Tensor) -> Tensor:
        """What happens between the two."""
        return functional.relu(x)

    def after(self, x: Tensor) -> Tensor:
        """What happens after them."""
        return functional.relu(x)


class Branching(Plain):
    """What is computed depends on the images."""

    def between(self, x: Tensor) -> Tensor:
        return functional.relu(x) if x.mean() > -100 else x


class Assigning(Plain):
    """Writes into a part of its activations."""

    def between(self, x: Tensor) -> Tensor:
        x[:, 0] = 0
        return functional.relu(x)


class Filling(Plain):
    """Fills its activations by a method."""

    def between(self, x: Tensor) -> Tensor:
        x[:, 0].fill_(0.5)
        return functional.relu(x)


class ReadAfterInPlace(Small):
    """Reads activations again which a ReLU has changed in place."""

    def middle(self, x: Tensor) -> Tensor:
        y = self.a_norm(self.a(x))
        return self.b_norm(self.b(functional.relu(y, inplace=True))) + y


class ReadAfterSharedInPlace(Small):
    """The same with a module that has been used before, where nobody read again."""

    def body(self) -> None:
        super().body()
        self.relu = nn.ReLU(inplace=True)

    def middle(self, x: Tensor) -> Tensor:
        y = self.a_norm(self.a(self.relu(x)))
        return self.b_norm(self.b(self.relu(y))) + y


class ViewOfInPlace(Small):
    """Reads a view of activations that a ReLU has changed in place."""

    def middle(self, x: Tensor) -> Tensor:
        y = self.a_norm(self.a(x))
        turned = y.transpose(2, 3)
        return self.b_norm(self.b(functional.relu(y, inplace=True))) + turned


class InPlaceOnView(Plain):
    """Changes activations through a view of a part of them."""

    def between(self, x: Tensor) -> Tensor:
        x[:, :4].relu_()
        return x


class Hooked(Plain):
    """A convolution whose answer a hook changes."""

    def body(self) -> None:
        super().body()
        self.b.register_forward_hook(lambda module, inputs, output: 2 * output)


class OwnBatchNorm(nn.BatchNorm2d):
    """Batch norm and activation in one, as several libraries have it."""

    def forward(self, x: Tensor) -> Tensor:
        normal = functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )
        return functional.relu(normal)


class OwnNorms(Plain):
    """Batch norms of a kind of its own."""

    def body(self) -> None:
        self.a, self.a_norm = conv(8, 8), OwnBatchNorm(8)
        self.b, self.b_norm = conv(8, 8), OwnBatchNorm(8)


class TwoInputs(Plain):
    """May be given features instead."""

    def forward(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        return super().forward(x)


class TakesTwo(Plain):
    """Needs more than images, unless it is called with them alone."""

    def forward(self, x: Tensor, *features: Tensor) -> Tensor:
        return super().forward(x)


class TwoOutputs(Plain):
    """Gives its features as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x
