"""VideoMAE (Tong et al., 2022), which torchvision lacks: a plain vision transformer on pairs of frames.

Registered in torchvision's registry as `videomae_base` and `videomae_small`: `get_model`, `get_model_weights` and all
that is built on them know the two. The figures are those of Hugging Face's model, whose weights `from_hugging_face`
takes; the form is another one. Two frames make one picture of six channels, so that the patches are a 2-D convolution:
Qualcomm's compiler takes that wholly, and the same as a 3-D one not.
"""

import re
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models._api import Weights, WeightsEnum, register_model
from torchvision.ops import StochasticDepth
from torchvision.transforms._presets import VideoClassification

PATCH, PAIR = 16, 2  # pixels of a patch's side; frames of a patch
MOST_TOKENS = 3136  # patches of 32 frames of 224 x 224
EPSILON = 1e-12  # of LayerNorm, as in Hugging Face's configuration
HUB = "hf://"  # before a name on Hugging Face's Hub, where torchvision's weights have a URL


def sine_table(tokens, width):
    """Positions, float32 (1, tokens, width): entry 2i of token n is sin(n / 10000^(2i / width)), the next its cosine.

    Nothing in it is learned, and token n has the same row in a table of any length.
    """
    rate = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * rate
    return torch.stack([angles.sin(), angles.cos()], 2).reshape(1, tokens, width).float()


class Attention(nn.Module):
    """Self-attention with several heads; keys have no bias. (N, tokens, width) -> the same shape."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)

    def forward(self, x):
        number, tokens, width = x.shape
        each = number, tokens, self.heads, width // self.heads
        query, key, value = (part(x).view(each).transpose(1, 2) for part in (self.query, self.key, self.value))
        if torch.jit.is_tracing() or torch.compiler.is_exporting():  # in operations that every compiler knows
            mixed = ((query * self.scale) @ key.transpose(2, 3)).softmax(3) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return self.out(mixed.transpose(1, 2).reshape(number, tokens, width))


class Block(nn.Module):
    """A transformer's layer, normalised before each of its two parts; either may be dropped for a clip in training."""

    def __init__(self, width, heads, drop_path):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width, EPSILON), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, EPSILON)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x):
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VideoMAE(nn.Module):
    """Normalised clips (N, 3, T, H, W) -> logits (N, num_classes); T even, H and W multiples of 16.

    stochastic_depth_prob: of dropping a part of the last layer; it rises linearly from 0 at the first.
    """

    def __init__(self, width, layers, heads, num_classes=400, stochastic_depth_prob=0.0):
        super().__init__()
        self.patches = nn.Conv2d(3 * PAIR, width, PATCH, PATCH)
        self.register_buffer("positions", sine_table(MOST_TOKENS, width), persistent=False)
        rates = torch.linspace(0, stochastic_depth_prob, layers, device="cpu").tolist()
        self.blocks = nn.Sequential(*[Block(width, heads, rate) for rate in rates])
        self.norm, self.head = nn.LayerNorm(width, EPSILON), nn.Linear(width, num_classes)
        self.apply(start_small)

    def forward(self, clips):
        number, _, frames, height, width = clips.shape
        tokens = frames // PAIR * (height // PATCH) * (width // PATCH)
        if frames % PAIR or height % PATCH or width % PATCH or not 0 < tokens <= MOST_TOKENS:
            raise ValueError(f"frames must be even, sides multiples of {PATCH}, patches at most {MOST_TOKENS}")
        pairs = clips.transpose(1, 2).reshape(number * frames // PAIR, 3 * PAIR, height, width)
        x = self.patches(pairs).flatten(2).transpose(1, 2).reshape(number, tokens, -1)
        x = self.blocks(x + self.positions[:, :tokens])
        return self.head(self.norm(x.mean(1)))


    @torch.no_grad()
    def take_unnormalised(self, mean, std):
        """Let the patches normalise: from now on the network takes clips in [0, 1]. mean, std: a value a colour.

        Exact, as patches have no border. Done before them, Qualcomm's compiler has no costs for 64 operations.
        """
        mean, std = (torch.tensor(values).repeat(PAIR).view(1, -1, 1, 1) for values in (mean, std))
        self.patches.weight /= std
        self.patches.bias -= (self.patches.weight * mean).sum((1, 2, 3))


def start_small(module):
    """First weights as in BERT and VideoMAE: a normal distribution of 0.02, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# --- the registry -----------------------------------------------------------------------------------------------------


class HubWeights(WeightsEnum):
    """Weights that lie on Hugging Face's Hub; their URL is HUB and the name there."""

    def get_state_dict(self, *args, **kwargs):
        """The state_dict of our form, from the Hub's cache or the network. Raises OSError without either."""
        import huggingface_hub
        import safetensors.torch

        path = huggingface_hub.hf_hub_download(self.url.removeprefix(HUB), "model.safetensors")
        return from_hugging_face(safetensors.torch.load_file(path))[0]


def kinetics(name):
    """Weights for Kinetics-400; sizes, mean and std are those of Hugging Face's preprocessor_config.json."""
    colours = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return Weights(HUB + name, partial(VideoClassification, crop_size=(224, 224), resize_size=(224,), **colours), {})


class VideoMAE_Base_Weights(HubWeights):
    KINETICS400_V1 = kinetics("MCG-NJU/videomae-base-finetuned-kinetics")
    DEFAULT = KINETICS400_V1


class VideoMAE_Small_Weights(HubWeights):
    KINETICS400_V1 = kinetics("MCG-NJU/videomae-small-finetuned-kinetics")
    DEFAULT = KINETICS400_V1


def build(shape, weights, progress, kwargs):
    """A VideoMAE of a shape (width, layers, heads); with weights it has their 400 classes."""
    model = VideoMAE(*shape, **kwargs)
    if weights is not None:
        model.load_state_dict(weights.get_state_dict(progress=progress))
    return model


@register_model()
def videomae_base(*, weights: VideoMAE_Base_Weights | None = None, progress: bool = True, **kwargs):
    """ViT-B: 12 layers of 768, 87 million parameters."""
    return build((768, 12, 12), VideoMAE_Base_Weights.verify(weights), progress, kwargs)


@register_model()
def videomae_small(*, weights: VideoMAE_Small_Weights | None = None, progress: bool = True, **kwargs):
    """ViT-S: 12 layers of 384, 22 million parameters."""
    return build((384, 12, 6), VideoMAE_Small_Weights.verify(weights), progress, kwargs)


# --- weights of Hugging Face's form -----------------------------------------------------------------------------------

NAMES = {  # patterns of their names and ours, after "videomae."; weight and bias alike
    r"embeddings\.patch_embeddings\.projection\.": "patches.",
    r"encoder\.layer\.(\d+)\.layernorm_before\.": r"blocks.\1.norm1.",
    r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.": r"blocks.\1.attention.\2.",
    r"encoder\.layer\.(\d+)\.attention\.attention\.([qv])_": r"blocks.\1.attention.\2_",
    r"encoder\.layer\.(\d+)\.attention\.output\.dense\.": r"blocks.\1.attention.out.",
    r"encoder\.layer\.(\d+)\.layernorm_after\.": r"blocks.\1.norm2.",
    r"encoder\.layer\.(\d+)\.intermediate\.dense\.": r"blocks.\1.mlp.0.",
    r"encoder\.layer\.(\d+)\.output\.dense\.": r"blocks.\1.mlp.2.",
    r"fc_norm\.": "norm.",
    r"classifier\.": "head.",
}
OF_BIASES = {"attention.q_bias": "attention.query.bias", "attention.v_bias": "attention.value.bias"}
MARK = "embeddings.patch_embeddings.projection.weight"  # without this a file is not of that form


def is_hugging_face(state):
    """Whether weights {name: tensor} are a VideoMAE as transformers saves it, fine-tuned or not."""
    return any(name.removeprefix("videomae.") == MARK and value.ndim == 5 for name, value in state.items())


def from_hugging_face(state):
    """Weights of transformers' VideoMAE in our form, and the names of what has no place in it.

    A self-supervised file lacks norm and head and has a decoder: the latter is left out. Returns (state_dict, [names]).
    """
    ours, unused = {}, []
    for name, value in state.items():
        plain, found = name.removeprefix("videomae."), None
        for theirs, mine in NAMES.items():
            if found := re.match(theirs, plain):
                plain = found.expand(mine) + plain[found.end() :]
                break
        if not found:
            unused.append(name)
            continue
        for theirs, mine in OF_BIASES.items():
            plain = plain.replace(theirs, mine)
        if plain == "patches.weight":  # (width, 3, pair, side, side): the colours of the first frame, of the second
            value = value.transpose(1, 2).flatten(1, 2)
        ours[plain] = value
    return ours, unused


def name_by_width(state):
    """The registered network whose weights, in our form, these are: by the width of a token; None for another width."""
    return {768: "videomae_base", 384: "videomae_small"}.get(len(state["patches.weight"]))
