"""The parameters that an optimizer steps, by name, and the gradients that they have now."""

from __future__ import annotations

import operator
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ewma.names import named_tensors
from ewma.shards import local

GROUP_KEY = "gradient_ema"

Owner: TypeAlias = tuple[str, nn.Parameter]


class Owners:
    """Whose gradients are filtered, asked anew at every step: groups are added to an optimizer, parameters exchanged.

    Args:
        model: names the parameters. Without it they have the optimizer's own names, or their places as names.
        densify: whether a sparse gradient becomes a dense one; else it is an error.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module | None, densify: bool) -> None:
        self.optimizer, self.model, self.densify = optimizer, model, densify
        self._parameters: list[nn.Parameter] = []
        self._owners: list[Owner] = []

    def named(self) -> list[Owner]:
        """All of the optimizer's parameters by name."""
        now = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if len(now) != len(self._parameters) or not all(map(operator.is_, now, self._parameters)):
            self._parameters, self._owners = now, list(zip(self._names(now), now, strict=True))
        return self._owners

    def present(self) -> tuple[list[Owner], list[Tensor]]:
        """Who has a gradient now and is not left alone; and this rank's part of each one's gradient."""
        alone = {
            id(parameter)
            for group in self.optimizer.param_groups
            if not group.get(GROUP_KEY, True)
            for parameter in group["params"]
        }
        present = [owner for owner in self.named() if owner[1].grad is not None and id(owner[1]) not in alone]
        return present, [self._part(name, parameter) for name, parameter in present]

    def _part(self, name: str, parameter: nn.Parameter) -> Tensor:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.layout != torch.strided:
            if not self.densify:
                raise TypeError(
                    f"{name}: its gradient is sparse, and an average of it would be dense, as large as the parameter. "
                    f'Pass sparse="densify" if that is meant, or leave its param group alone with "{GROUP_KEY}": False.'
                )
            gradient = parameter.grad = gradient.to_dense()
        if gradient.is_conj():  # whose memory does not hold what it shows
            gradient = parameter.grad = gradient.resolve_conj()
        return gradient if type(gradient) is Tensor else local(gradient)

    def _names(self, parameters: list[nn.Parameter]) -> list[str]:
        names: dict[int, str] = {}
        for number, group in enumerate(self.optimizer.param_groups):
            own = group.get("param_names")
            for place, parameter in enumerate(group["params"]):
                names[id(parameter)] = own[place] if own else f"{number}.{place}"
        if self.model is not None:
            known = {id(named.tensor): named.name for named in named_tensors(self.model) if id(named.tensor) in names}
            if names and not known:
                raise ValueError(
                    f"model= names none of the optimizer's {len(names)} parameters: it is another "
                    f"{type(self.model).__name__} than the one that is trained. Pass the one whose parameters() the "
                    f"optimizer was made with."
                )
            names |= known
        if len(set(names.values())) < len(names):
            raise ValueError("two of the optimizer's parameters have the same name: pass model= to name them")
        return [names[id(parameter)] for parameter in parameters]
