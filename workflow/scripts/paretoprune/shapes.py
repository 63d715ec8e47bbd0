"""Networks of other widths: the same modules around tensors of other shapes."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from paretoprune.attention import Layers, WithoutHeads, as_plain, layers_of, tell_heads


class Emptied(nn.Module):
    """What is left of a layer that reads nothing, or makes nothing: outputs of its size that cost next to nothing.

    Args:
        layer: The layer whose place it takes, a convolution, a linear layer or a norm.
        bias: (n_channels,), what a layer that reads nothing still makes; None for one that makes nothing: a single
            channel of zeros stands for it, which nobody reads.
    """

    def __init__(self, layer: nn.Module, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.is_convolution, self.is_linear = isinstance(layer, _ConvNd), isinstance(layer, nn.Linear)
        if isinstance(layer, _ConvNd):
            self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
            # `same` is the only padding by name that is not none.
            same = isinstance(layer.padding, str) and layer.padding == "same"
            self.padding = [0] * len(self.stride) if isinstance(layer.padding, str) else list(layer.padding)
            self.keeps_size = same
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, ...) to what the layer's outputs would have been in size."""
        if self.is_linear:
            # A copy, since an activation may change it in place.
            return x.new_zeros((*x.shape[:-1], 1)) if self.bias is None else self.bias.expand(*x.shape[:-1], -1).clone()
        if not self.is_convolution:
            return x  # a norm
        sizes = list(x.shape[2:])
        if not self.keeps_size:
            sizes = [
                (size + 2 * self.padding[i] - self.dilation[i] * (self.kernel_size[i] - 1) - 1) // self.stride[i] + 1
                for i, size in enumerate(sizes)
            ]
        if self.bias is None:
            return x.new_zeros((x.shape[0], 1, *sizes))
        return self.bias.view(1, -1, *[1] * len(sizes)).expand(x.shape[0], -1, *sizes).clone()


def with_tensors(network: nn.Module, tensors: Mapping[str, Tensor | None]) -> nn.Module:
    """Put tensors of other shapes into a network, in place, and tell its layers their new widths.

    A layer that loses its weight becomes `Emptied`, attention that loses all heads `WithoutHeads`, and attention that
    counts on the widths it had a plain form of it.

    Args:
        network: Its own copy, which is changed.
        tensors: Parameters and buffers by name, None for those that go; those that are not there stay as they are.

    Returns:
        The same network.
    """
    attentions, gone = _open_attention(network, tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        prefix = f"{owner}." if owner else ""
        own = {
            name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.rpartition(".")[0] == owner
        }
        module = network.get_submodule(owner)
        if ("weight" in own and own["weight"] is None) or (own and all(tensor is None for tensor in own.values())):
            network.set_submodule(owner, Emptied(module, own.get("bias")))
            continue
        for name, tensor in own.items():
            _replace(module, name, tensor)
        tell_widths(module)
    for name, layers in attentions.items():
        tell_heads(network.get_submodule(name), layers)
    return network


def _open_attention(
    network: nn.Module, tensors: Mapping[str, Tensor | None]
) -> tuple[dict[str, Layers], tuple[str, ...]]:
    """Make attention whose tensors change ready for it, in place.

    Returns:
        What attention has layers that change, by name, as they are now; and the beginnings of names of tensors for
        which there is nothing left to do.
    """
    changed = {owner for name in _changed(network, tensors) for owner in _owners(name)}
    attentions, gone = {}, []
    for name, module in list(network.named_modules()):
        layers = layers_of(module) if name in changed else None
        if layers is None:
            continue
        makers = [f"{name}.{maker}" for maker in layers.makers]
        if all(maker in tensors and tensors[maker] is None for maker in makers):
            reader = Emptied(module.get_submodule(layers.reader), tensors.get(f"{name}.{layers.reader}.bias"))
            network.set_submodule(name, WithoutHeads(module, layers.reader, reader))
            gone.append(f"{name}.")
            continue
        attentions[name] = layers
        if (plain := as_plain(module)) is not None:
            network.set_submodule(name, plain)
    return attentions, tuple(gone)


def _changed(network: nn.Module, tensors: Mapping[str, Tensor | None]) -> Iterator[str]:
    """Names of the tensors that go, come, or get another shape."""
    now = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for name, tensor in tensors.items():
        old = now.get(name)
        if (tensor is None) != (old is None) or (tensor is not None and old is not None and tensor.shape != old.shape):
            yield name


def _owners(tensor: str) -> Iterator[str]:
    """Names of the module that has a tensor, and of all around it but the network itself."""
    while "." in tensor:
        tensor = tensor.rpartition(".")[0]
        yield tensor


def with_state(network: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Make a network, in place, the one that has this state: parameters and buffers of other shapes, or fewer of them.

    Args:
        network: Its own copy of the whole network, which is changed.
        state: All parameters and buffers of the smaller network.

    Raises:
        ValueError: The state has a tensor that the network has not, or of another number of dimensions.
    """
    whole = network.state_dict()
    if whole.keys() == state.keys() and all(_shape(whole[name]) == _shape(state[name]) for name in whole):
        network.load_state_dict(dict(state))
        return network
    constants = {name for name in state if name not in whole and name.endswith(".bias")}
    known = {name for name in constants if f"{name.removesuffix('bias')}weight" in whole}
    odd = [name for name in state if name not in whole and name not in known]
    odd += [name for name in state if name in whole and whole[name].ndim != state[name].ndim]
    if odd:
        raise ValueError(
            f"expected tensors of the whole network or smaller ones, found {', '.join(odd[:3])}; give the network that "
            "was pruned"
        )
    return with_tensors(network, {name: state.get(name) for name in (*whole, *known)})


def _shape(value: Any) -> Any:
    """The shape of a tensor; anything else that a state may hold has none."""
    return value.shape if isinstance(value, Tensor) else None


def _replace(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    old = getattr(module, name)
    if tensor is None or old is None:
        setattr(module, name, tensor)
    elif old.shape == tensor.shape:
        with torch.no_grad():
            old.copy_(tensor)
    elif isinstance(old, nn.Parameter):
        # A tensor that was made in inference mode could never be trained.
        setattr(module, name, nn.Parameter(tensor.detach().clone(), requires_grad=old.requires_grad))
    else:
        setattr(module, name, tensor.detach().clone())


def tell_widths(module: nn.Module) -> None:
    """Set what a layer says of its width to the shapes of its tensors, in place."""
    given: Any = module
    if isinstance(module, _ConvNd):
        depthwise = is_depthwise(module)
        n_out, n_in = module.weight.shape[:2]
        if isinstance(module, _ConvTransposeNd):
            n_out, n_in = n_in, n_out
            given.groups = n_in if depthwise else module.groups
            given.in_channels, given.out_channels = n_in, n_out * module.groups
        else:
            given.groups = n_out // (module.out_channels // module.groups) if depthwise else module.groups
            given.in_channels, given.out_channels = n_in * module.groups, n_out
    elif isinstance(module, nn.Linear):
        given.out_features, given.in_features = module.weight.shape
    elif isinstance(module, _NormBase):
        held = module.weight if module.weight is not None else module.running_mean
        if held is not None:
            given.num_features = len(held)
    elif isinstance(module, nn.LayerNorm) and module.weight is not None:
        given.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        given.num_channels = len(module.weight)
    elif is_rms_norm(module):
        if isinstance(getattr(module, "normalized_shape", None), tuple | list):
            given.normalized_shape = tuple(module.get_parameter("weight").shape)
    elif isinstance(module, nn.PReLU):
        given.num_parameters = len(module.weight)


def is_depthwise(module: nn.Module) -> bool:
    """Whether a convolution treats each of several channels by itself."""
    return isinstance(module, _ConvNd) and module.groups == module.in_channels > 1


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module scales channels by their root mean square, torch's own or one of that name."""
    return "rmsnorm" in type(module).__name__.lower() and isinstance(getattr(module, "weight", None), nn.Parameter)
