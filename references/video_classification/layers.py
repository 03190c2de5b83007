"""How layers compute what they do: with BatchNorm folded in, or with channels that tensor cores like; same weights.

Nothing here is seen in a state_dict, the optimizer or the number of parameters. Padded channels and 2-D views are off
until tests/benchmarks/bench_gpu.py has measured on a GPU what they gain.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import video

# --- frozen layers ----------------------------------------------------------------------------------------------------


def fold(model, frozen, on_gpu, multiple=1):
    """Let the children named `frozen` compute with BatchNorm folded into the convolution before it.

    On a GPU a convolution's ReLU and a block's sum are computed with it, too. Outputs differ by rounding only; weights
    are saved as they are. multiple: as `pad_channels` has it.
    """
    for name in frozen:
        child = model.get_submodule(name)
        if list(child.parameters()):
            copied = folded(copy.deepcopy(child).eval(), on_gpu, multiple).requires_grad_(False)
            child.forward = copied.forward  # an attribute, not a child: it is in no state_dict


def folded(module, on_gpu, multiple=1):
    """The module with BatchNorm folded in. Of an nn.Sequential a new one is made, without others within it."""
    if not isinstance(module, nn.Sequential):
        for name, child in module.named_children():
            setattr(module, name, folded(child, on_gpu, multiple))
        return FrozenBlock(module) if on_gpu and isinstance(module, video.resnet.BasicBlock) else module
    parts = []
    for part in leaves(module):
        last = parts[-1] if parts and isinstance(parts[-1], nn.Conv3d) else None
        if last and isinstance(part, nn.BatchNorm3d):
            parts[-1] = nn.utils.fusion.fuse_conv_bn_eval(last, part)
        elif last and isinstance(part, nn.ReLU) and on_gpu:
            parts[-1] = FrozenConvolution(last)
        else:
            parts.append(folded(part, on_gpu, multiple))
    widen_folded(parts, multiple)
    return nn.Sequential(*parts)


def leaves(sequence):
    for part in sequence:
        yield from leaves(part) if isinstance(part, nn.Sequential) else [part]


class FrozenConvolution(nn.Module):
    """A convolution, its bias, what is added to it, and ReLU in one kernel of cuDNN.

    Without it each of them passes over the whole result once more; torch.compile does not help there.
    """

    def __init__(self, conv):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = conv.stride, conv.padding, conv.dilation, conv.groups

    def forward(self, clips, summand=None):
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else clips.dtype
        clips, weight, bias = (x.to(dtype) for x in (clips, self.weight, self.bias))
        if summand is None:
            return torch.cudnn_convolution_relu(clips, weight, bias, *self.geometry)
        return torch.cudnn_convolution_add_relu(clips, weight, summand.to(dtype), 1.0, bias, *self.geometry)


class FrozenBlock(nn.Module):
    """torchvision's residual block, folded already; its last convolution adds the shortcut."""

    def __init__(self, block):
        super().__init__()
        self.first = nn.Sequential(*block.conv1, *block.conv2[:-1])
        self.last, self.shortcut = FrozenConvolution(block.conv2[-1]), block.downsample or nn.Identity()

    def forward(self, clips):
        return self.last(self.first(clips), self.shortcut(clips))


# --- channels that are multiples of 8 ---------------------------------------------------------------------------------


def up_to(number, multiple):
    """The next multiple, or the number itself."""
    return -(-number // multiple) * multiple


def pad_channels(model, multiple=8, flat=False):
    """Let the layers within R(2+1)D's factored convolutions compute with a multiple of channels; the others are zero.

    Those have 45, 230, 460 or 921 channels, for which cuDNN has no fast 16-bit kernels. Weights, BatchNorm and its
    statistics stay as they are and are padded at each step. flat: convolutions that change space alone, or time alone,
    are 2-D ones on a view. Outputs and gradients are the same but for rounding. Returns how many layers it padded.
    """
    number = 0
    for module in list(model.modules()):
        if isinstance(module, nn.Sequential):
            own = list(module.named_children())
            for (first, conv), (middle, norm), (_, relu), (last, after) in zip(own, own[1:], own[2:], own[3:]):
                kinds = [type(part) for part in (conv, norm, relu, after)]
                if kinds == [nn.Conv3d, nn.BatchNorm3d, nn.ReLU, nn.Conv3d]:
                    between = up_to(conv.out_channels, multiple)
                    setattr(module, first, sharing(conv, PaddedConv3d, wanted=between, flat=flat))
                    setattr(module, middle, sharing(norm, PaddedBatchNorm3d))
                    setattr(module, last, sharing(after, PaddedConv3d, wanted=after.out_channels, flat=flat))
                    number += 1
    return number


def sharing(module, kind, **settings):
    """A module of another class that holds the very parameters, buffers and settings of this one."""
    other = kind.__new__(kind)
    other.__dict__ = module.__dict__ | settings
    return other


def padded(values, channels, fill=0.0):
    """One value a channel, with more of them up to a number of channels."""
    return F.pad(values, (0, channels - len(values)), value=fill)


class PaddedConv3d(nn.Conv3d):
    """A convolution that takes as many channels as come and gives `wanted` ones; those it has no weights for are 0."""

    def forward(self, clips):
        more_in, more_out = clips.shape[1] - self.in_channels, self.wanted - self.out_channels
        weight = F.pad(self.weight, (0, 0, 0, 0, 0, 0, 0, more_in, 0, more_out))
        bias = None if self.bias is None else padded(self.bias, self.wanted)
        convolve = flat_conv if self.flat else F.conv3d
        return convolve(clips, weight, bias, self.stride, self.padding)


class PaddedBatchNorm3d(nn.BatchNorm3d):
    """BatchNorm for its own channels and any number of zero ones behind them, which stay zero."""

    def forward(self, clips):
        channels, momentum = clips.shape[1], self.momentum
        if self.training:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if momentum is None else momentum
        mean, variance = padded(self.running_mean, channels), padded(self.running_var, channels, 1.0)
        weight, bias = padded(self.weight, channels), padded(self.bias, channels)
        clips = F.batch_norm(clips, mean, variance, weight, bias, self.training, momentum, self.eps)
        if self.training:
            self.running_mean.copy_(mean[: self.num_features])
            self.running_var.copy_(variance[: self.num_features])
        return clips


def flat_conv(clips, weight, bias, stride, padding):
    """F.conv3d with a kernel of (1, h, w) or (t, 1, 1) as a 2-D convolution on a view of channels-last clips."""
    number, channels, frames, height, width = clips.shape
    if weight.shape[2] == 1 and stride[0] == 1 and padding[0] == 0:
        pictures = clips.transpose(1, 2).reshape(number * frames, channels, height, width)
        pictures = F.conv2d(pictures, weight[:, :, 0], bias, stride[1:], padding[1:])
        return pictures.unflatten(0, (number, frames)).transpose(1, 2)
    if weight.shape[3:] == (1, 1) and stride[1:] == (1, 1) and padding[1:] == (0, 0):
        lines = F.conv2d(clips.flatten(3), weight[..., 0], bias, (stride[0], 1), (padding[0], 0))
        return lines.unflatten(3, (height, width))
    return F.conv3d(clips, weight, bias, stride, padding)


def widen_folded(parts, multiple):
    """Pad the channels between two folded convolutions that follow one another, ReLU between them or within the first.

    parts: modules in their order; their weights are those of a copy and are replaced.
    """
    convolutions = [part for part in parts if isinstance(part, (nn.Conv3d, FrozenConvolution))]
    if len(convolutions) != 2:
        return
    first, last = convolutions
    more = up_to(len(first.weight), multiple) - len(first.weight)
    shape = torch.channels_last_3d
    first.weight = nn.Parameter(F.pad(first.weight, (0, 0, 0, 0, 0, 0, 0, 0, 0, more)).contiguous(memory_format=shape))
    first.bias = nn.Parameter(padded(first.bias, len(first.weight)))
    last.weight = nn.Parameter(F.pad(last.weight, (0, 0, 0, 0, 0, 0, 0, more)).contiguous(memory_format=shape))
