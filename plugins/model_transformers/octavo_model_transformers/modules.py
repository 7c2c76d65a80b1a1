"""What stands in transformers' modules where Octavo's layers compute."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from octavo.interfaces.model import Unary


class FactoryLinear(nn.Module):
    """In the place of an nn.Linear: `product`, which the factory makes; until then only the shape is computed.

    Attributes:
        has_bias: whether the linear that was here had one.
    """

    def __init__(self, replaced: nn.Linear) -> None:
        super().__init__()
        self.in_features = replaced.in_features
        self.out_features = replaced.out_features
        self.has_bias = replaced.bias is not None
        self.product: Unary = lambda x: x.new_empty(x.shape[0], self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)


class GivenHidden(nn.Module):
    """In the place of a model's decoder, whose output is given: what is left of the model's forward is its head."""

    def forward(self, *positional: object, inputs_embeds: Tensor, **arguments: object) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


def replace_linears(module: nn.Module) -> dict[str, FactoryLinear]:
    """Put a FactoryLinear in the place of every nn.Linear below `module`; by its name there."""
    replaced = {}
    for name, linear in list(module.named_modules()):
        if type(linear) is nn.Linear:  # what transformers derives from it computes something else
            replaced[name] = FactoryLinear(linear)
            parent, _, own_name = name.rpartition(".")
            setattr(module.get_submodule(parent), own_name, replaced[name])
    return replaced
