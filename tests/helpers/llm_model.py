"""A tiny random language model of one family, and where its sublayers end, written by hand.

Nothing here imports skipguide: this is the truth that skipguide is tested against. A model without a sublayer is a
deep copy whose output projections of that sublayer are zero, never a hook.
"""

import copy
import inspect
from dataclasses import dataclass, field

import torch
import transformers
from torch import nn

# what the forwards of this transformers, generate() and their outputs call a KV cache
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
VOCAB, WIDTH, LAYERS = 64, 32, 4
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GPT = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@dataclass(frozen=True)
class LM:
    """One family in one configuration.

    Attributes:
        name: of the test.
        cls: the class in transformers, without Config and its head.
        config: its arguments.
        layers: path of the layers.
        attn: the attention's output projection, from a layer.
        mlp: the feed-forward's, all that may be there.
        parallel: both sublayers read the layer's input.
        shares: of its six layers the last two read the keys of the two before; a layer is more than two sublayers.
    """

    name: str
    cls: str
    config: dict = field(default_factory=dict)
    layers: str = "model.layers"
    attn: str = "self_attn.o_proj"
    mlp: tuple[str, ...] = ("mlp.down_proj",)
    parallel: bool = False
    shares: bool = False
    head: str = "ForCausalLM"
    config_cls: str = ""

    def __repr__(self):
        return self.name

    @property
    def exists(self):
        return hasattr(transformers, self.cls + self.head)

    def build(self, seed=0, **config):
        made = getattr(transformers, self.config_cls or f"{self.cls}Config")(**self.config | config)
        torch.manual_seed(seed)
        model = getattr(transformers, self.cls + self.head)(made)
        model.generation_config.pad_token_id = 0
        return randomise(model, seed)

    def layer(self, model, i):
        return model.get_submodule(self.layers)[i]

    def zeroed(self, model, attn=(), mlp=()):
        edited = copy.deepcopy(model)
        for layers, paths in ((attn, (self.attn,)), (mlp, self.mlp)):
            for i in layers:
                assert sum(_zero(self.layer(edited, i), path) for path in paths), (self.name, i, paths)
        return edited


def _zero(layer, path):
    """Zero a projection, or a parameter (experts in one tensor), and its bias."""
    owner, _, last = path.rpartition(".")
    try:
        module = layer.get_submodule(owner)
    except AttributeError:
        return 0
    target = getattr(module, last, None)
    if target is None:
        return 0
    tensors = (target.weight, getattr(target, "bias", None)) if isinstance(target, nn.Module) else (target,)
    if not isinstance(target, nn.Module):
        tensors += (getattr(module, f"{last}_bias", None),)
    with torch.no_grad():
        for tensor in tensors:
            if tensor is not None:
                tensor.zero_()
    return 1


def randomise(model, seed=0, std=0.2):
    """Every parameter random, norms around 1, so that each sublayer has a visible effect; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_((1 + 0.1 * noise) if is_norm else std * noise)
    return model.eval().requires_grad_(False)


def prompt(batch=2, tokens=7, seed=0):
    """Token ids `[batch, tokens]`."""
    return torch.randint(3, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def left_padded(batch=2, tokens=7, seed=0):
    """Token ids with row 0 padded by three on the left, and the mask."""
    ids = prompt(batch, tokens, seed)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids.masked_fill(mask == 0, 0), mask


# where experts and shared experts end, and a dense feed-forward among them
MOE = ("mlp.down_proj", "mlp.experts.down_proj", "mlp.shared_expert.down_proj")
MOE += ("mlp.shared_experts.down_proj", "mlp.shared_mlp.down_proj")
SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2), "sliding_window": 4}


def llama(cls, name=None, mlp=("mlp.down_proj",), **config):
    return LM(name or cls.lower(), cls, LLAMA | config, mlp=mlp)
