"""What has been learned, ready to act: networks, action space and the statistics of observations, of all runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trueup.control.actions import ActionSpace, Choices, Gaussian
from trueup.control.networks import Head, Network
from trueup.control.normalization import ObservationScale
from trueup.errors import ModelError


@dataclass
class Agent:
    """S policies (or sets of action values) for one environment."""

    env: str
    algorithm: str
    seeds: tuple[int, ...]
    actions: ActionSpace
    network: Network
    scale: ObservationScale | None
    """Frozen here: acting doesn't change it."""

    def seen(self, observations: Float[np.ndarray, "s n d"]) -> Float[np.ndarray, "s n d"]:
        """Observations as the networks take them."""
        return observations if self.scale is None else self.scale(observations)

    def act(self, seen: Float[np.ndarray, "s n d"], noise: np.ndarray | None = None) -> Float[np.ndarray, "s n a"]:
        """Actions: samples of the policy, or without noise its most probable (or most valuable) ones."""
        network = self.network
        return self.actions.act(network.act(seen), noise, network.arrays.get("log_std"))

    def save(self, folder: Path) -> None:
        """Write ``agent.safetensors`` and ``agent.json``."""
        network, actions = self.network, self.actions
        tensors = {name: parameter.clone() for name, parameter in network.parameters.items()}
        if self.scale is not None:
            tensors |= {f"observations.{name}": tensor.clone() for name, tensor in self.scale.state().items()}
        save_file(tensors, folder / "agent.safetensors")
        if isinstance(actions, Choices):
            space = {"sizes": actions.sizes, "starts": actions.starts, "single": actions.single}
        else:
            assert isinstance(actions, Gaussian)
            space = {"low": actions.low.tolist(), "high": actions.high.tolist(), "shape": actions.shape}
        record = {
            "env": self.env,
            "algorithm": self.algorithm,
            "seeds": self.seeds,
            "actions": space,
            "num_inputs": network.num_inputs,
            "heads": [vars(head) for head in network.heads],
            "hidden": network.hidden,
            "activation": network.activation,
            "observation_clip": None if self.scale is None else self.scale.clip,
        }
        (folder / "agent.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Agent:
        """Read what ``save`` wrote. Raises ``ModelError`` for a folder that holds no agent."""
        try:
            record = json.loads((folder / "agent.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "agent.safetensors")
            return cls._of(record, tensors)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ModelError(
                f"no agent can be read here: {error}",
                where=str(folder),
                way_out="a run folder of `trueup control train`",
            ) from error

    @classmethod
    def _of(cls, record: Mapping[str, Any], tensors: Mapping[str, Any]) -> Agent:
        space = record["actions"]
        actions: ActionSpace
        if "sizes" in space:
            actions = Choices(tuple(space["sizes"]), tuple(space["starts"]), space["single"])
        else:
            low, high = (np.array(space[name], np.float32) for name in ("low", "high"))
            actions = Gaussian(low, high, tuple(space["shape"]))
        network = Network(
            record["seeds"],
            record["num_inputs"],
            [Head(**head) for head in record["heads"]],
            hidden=record["hidden"],
            activation=record["activation"],
            spread=actions.size if actions.has_spread else 0,
        )
        network.load({name: tensor for name, tensor in tensors.items() if not name.startswith("observations.")})
        scale = None
        if record["observation_clip"] is not None:
            scale = ObservationScale(len(record["seeds"]), record["num_inputs"], record["observation_clip"])
            scale.restore({name: tensors[f"observations.{name}"] for name in ("count", "mean", "variance")})
        return cls(record["env"], record["algorithm"], tuple(record["seeds"]), actions, network, scale)
