"""A tiny random model of one family, and what its sublayers are, written by hand.

Nothing here imports skipguide: this is the truth that skipguide is tested against. A reference edit is always
a deep copy of the model with the edit built in, never a hook.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

TEXT, HEADS, HEAD_DIM = 6, 2, 16  # every family: six text tokens, width 32


def randomise(model: nn.Module, seed: int = 0, std: float = 0.15) -> nn.Module:
    """Every parameter random, norms around 1, so that each sublayer has a visible effect; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_((1 + 0.1 * noise) if is_norm else std * noise)
    return model.eval().requires_grad_(False)


def rows(batch: int, seed: int, *shape: int) -> Tensor:
    """Normal noise `[batch, *shape]` whose row r does not depend on how many rows there are."""
    made = [torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + r)) for r in range(batch)]
    return torch.stack(made)


def timesteps(batch: int, first: float = 700.0) -> Tensor:
    return torch.tensor([first - 37.0 * (r % 8) for r in range(batch)])


def prefix_mask(batch: int, length: int) -> Tensor:
    """Integer text mask `[batch, length]`: row r has its last r % 3 tokens masked out."""
    mask = torch.ones(batch, length, dtype=torch.long)
    for r in range(batch):
        mask[r, length - r % 3 :] = 0
    return mask


class PassThrough(nn.Module):
    """A block that returns its streams in the family's form: h, (h, e) or (e, h)."""

    def __init__(self, returns: str):
        super().__init__()
        self.returns = returns

    def forward(self, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        streams = {"h": hidden_states, "e": encoder_hidden_states}
        out = tuple(streams[letter] for letter in self.returns)
        return out[0] if len(out) == 1 else out


@dataclass(frozen=True)
class BlockKind:
    """What one class of blocks consists of.

    Attributes:
        returns: The streams a block returns, in order: h is the video (or image), e the text.
        projections: Part -> dotted names of the Linear layers that end it. Names a block lacks are left out
            (the last block of some models has no text output). `"proj_out:attn"` and `"proj_out:mlp"` are the
            columns of a parallel block's one output projection that read that sublayer; its bias stays.
        values: Self-attention name -> module that computes it with the identity as attention map of the
            video tokens, built from the attention module and the number of text tokens. Empty where the attention
            has no map.
        identity: Builds what takes the place of a block that is left out, where `PassThrough(returns)` cannot.
    """

    returns: str
    projections: dict[str, tuple[str, ...]]
    values: dict[str, Callable[[nn.Module, int], nn.Module]] = field(default_factory=dict)
    identity: Callable[[], nn.Module] | None = None


@dataclass(frozen=True)
class Family:
    """One model family: how to make it, how to call it, and its reference edits.

    Attributes:
        thin: Whether the laws are checked on the first block of every stack and the last of all, not on every block:
            for the many families whose blocks are all alike. Or the numbers of the blocks.
        slack: How far two runs may differ where equality is to rounding.
        visible: The least relative effect of an edit.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[..., dict[str, object]]
    blocks: tuple[tuple[str, BlockKind], ...]
    text_length: Callable[[dict[str, object]], int] = lambda inputs: len(inputs.get("encoder_hidden_states", [[]])[0])
    std: float = 0.15
    thin: bool | tuple[int, ...] = False
    slack: float = 2e-6
    visible: float = 0.03

    def __repr__(self) -> str:
        return self.name

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)  # for what is not a parameter
        return randomise(self.make(), seed + 1, self.std)

    @property
    def block_names(self) -> list[str]:
        """Dotted names in execution order."""
        return [name for name, _ in self.blocks]

    @property
    def layers(self) -> list[int]:
        """The blocks that the laws are checked on."""
        if not self.thin:
            return list(range(len(self.blocks)))
        if isinstance(self.thin, tuple):
            return list(self.thin)
        stacks = [name.rpartition(".")[0] for name in self.block_names]
        return sorted({*(stacks.index(stack) for stack in stacks), len(self.blocks) - 1})

    def parts(self, i: int) -> tuple[str, ...]:
        """The sublayers of block i: a subset of attn, cross_attn, mlp."""
        return tuple(self.blocks[i][1].projections)

    def run(self, model: nn.Module, inputs: dict[str, object]) -> Tensor:
        with torch.no_grad():
            out = model(**inputs, return_dict=False)
        if isinstance(out, Tensor):
            return out
        if isinstance(out[0], list):  # one entry per row
            return torch.stack(out[0])
        return out[0] if len(out) == 1 else torch.cat([stream.flatten(1) for stream in out], dim=1)

    def identity_block(self, model: nn.Module, i: int) -> nn.Module:
        """A copy in which block i returns its streams as they came."""
        edited = copy.deepcopy(model)
        kind = self.blocks[i][1]
        edited.set_submodule(
            self.block_names[i], PassThrough(kind.returns) if kind.identity is None else kind.identity()
        )
        return edited

    def zeroed(self, model: nn.Module, i: int, part: str) -> nn.Module:
        """A copy in which the output projections of that sublayer in block i are zero, weight and bias."""
        return self.scaled(model, i, part, 0.0)

    def scaled(self, model: nn.Module, i: int, part: str, factor: float) -> nn.Module:
        """A copy in which they are multiplied by a factor, weight and bias."""
        edited = copy.deepcopy(model)
        name, kind = self.blocks[i]
        block = edited.get_submodule(name)
        touched = 0
        for target in kind.projections[part]:
            path, _, columns = target.partition(":")
            try:
                linear = block.get_submodule(path)
            except AttributeError:
                continue
            with torch.no_grad():
                if columns:  # a parallel block: proj_out reads cat([attention, mlp])
                    width = linear.out_features
                    linear.weight[:, slice(width) if columns == "attn" else slice(width, None)] *= factor
                else:
                    linear.weight *= factor
                    if linear.bias is not None:
                        linear.bias *= factor
            touched += 1
        assert touched, f"{self.name}: block {i} has no {part}"
        return edited

    def value_identity(self, model: nn.Module, i: int, inputs: dict[str, object]) -> nn.Module:
        """A copy whose self-attention in block i passes the values through for the video tokens.

        In a joint attention the text queries still attend to everything, as in the stock model.
        """
        edited = copy.deepcopy(model)
        name, kind = self.blocks[i]
        block = edited.get_submodule(name)
        for path, module in kind.values.items():
            parent, _, name = path.rpartition(".")
            parent = block.get_submodule(parent)
            if getattr(parent, name, None) is not None:
                setattr(parent, name, module(getattr(parent, name), self.text_length(inputs)))
        return edited


def numbered(kinds: dict[str, tuple[int, BlockKind]]) -> tuple[tuple[str, BlockKind], ...]:
    """Blocks of consecutive stacks: `{stack: (how many, kind)}`."""
    return tuple((f"{stack}.{i}", kind) for stack, (n, kind) in kinds.items() for i in range(n))
