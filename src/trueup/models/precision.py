"""bfloat16 compute with float32 master weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from trueup.errors import CheckpointError


class MasterWeights:
    """Float32 copies of low-precision parameters, for the optimiser to work on.

    bfloat16 has 8 significant bits: an update below 1/512 of a weight rounds to nothing (depending on the weight, one
    up to 1/256), and at the learning rates of fine-tuning most updates are smaller. So the model computes in bfloat16
    and the optimiser keeps what rounding would lose (Micikevicius et al. 2018, arXiv 1710.03740, section 3.1):

        master ← master − update(master.grad)         in float32
        parameter ← round(master)                     in bfloat16

    As soon as a backward pass has finished a parameter's gradient, it is added to the master's float32 gradient and the
    low-precision one is freed: accumulating over micro-batches rounds each micro-batch's gradient once, never the sum.

    Use: ``optimizer = AdamW(masters.parameters)``; after the backward passes, clip ``masters.parameters``, step, then
    ``copy_back()``; ``optimizer.zero_grad()`` clears what has accumulated. Parameters that already have 32 bits or more
    are handed through as they are, so a float32 model runs exactly as without this class.

    ``parameters``: what is trained; frozen parameters and repetitions are left out.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        trained = list({id(p): p for p in parameters if p.requires_grad}.values())
        self.parameters: list[torch.nn.Parameter] = []
        """What the optimiser works on: masters, and parameters that need none, in the order given."""
        self.pairs: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        """(low-precision parameter, its master)."""
        self.hooks: list[torch.utils.hooks.RemovableHandle] = []
        for parameter in trained:
            if parameter.dtype.itemsize >= 4:
                self.parameters.append(parameter)
                continue
            master = torch.nn.Parameter(parameter.detach().to(torch.float32))
            self.parameters.append(master)
            self.pairs.append((parameter, master))
            self.hooks.append(parameter.register_post_accumulate_grad_hook(hand_over_to(master)))

    @torch.no_grad()
    def copy_back(self) -> None:
        """Round the masters into the parameters that compute. Call it after every optimiser step."""
        if self.pairs:
            working, masters = zip(*self.pairs, strict=True)
            torch._foreach_copy_(list(working), list(masters))  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Any]:
        """The masters, which hold more than the model's own parameters do. Empty for a float32 model."""
        return {"masters": [master.detach() for _, master in self.pairs]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the masters of an earlier ``state_dict``, and round them into the model.

        Raises ``CheckpointError`` if they belong to another model or precision.
        """
        found, wanted = state["masters"], [master for _, master in self.pairs]
        if [tuple(t.shape) for t in found] != [tuple(t.shape) for t in wanted]:
            raise CheckpointError(
                f"{len(found)} master weights were saved, and this model has {len(wanted)} (or other shapes)",
                way_out="resume with the model, adapter and precision of the run that wrote the checkpoint",
            )
        for master, saved in zip(wanted, found, strict=True):
            master.copy_(saved)
        self.copy_back()

    def close(self) -> None:
        """Take the hooks off: gradients stay with the low-precision parameters again."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()


def hand_over_to(master: torch.nn.Parameter) -> Any:
    """A hook that adds a parameter's finished gradient to ``master.grad`` in float32, and frees it."""

    def hand_over(parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        if master.grad is None:
            master.grad = gradient.to(torch.float32)
        else:
            master.grad.add_(gradient)
        parameter.grad = None

    return hand_over
