"""Networks of several runs in one against plain PyTorch: outputs, gradients, first weights, clipping; each alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from trueup.control.networks import Activation, Head, Network

ONE_TRUNK = (Head(0, 3, 0.01), Head(0, 1, 1.0))
TWO_TRUNKS = (Head(0, 3, 0.01), Head(1, 1, 1.0))
THREE_HEADS = (Head(1, 2, 0.5), Head(0, 3, 1.0), Head(1, 1, 1.0))
HEADS = pytest.mark.parametrize("heads", [ONE_TRUNK, TWO_TRUNKS, THREE_HEADS], ids=["one", "two", "three heads"])
ACTIVATIONS = pytest.mark.parametrize("activation", ["tanh", "relu"])
INPUTS, BATCH = 4, 6


def network(
    seeds: Sequence[int] = (3, 1, 4),
    heads: Sequence[Head] = TWO_TRUNKS,
    *,
    activation: Activation = "tanh",
    hidden: Sequence[int] = (5, 7),
    spread: int = 2,
    dtype: torch.dtype = torch.float64,
) -> Network:
    return Network(seeds, INPUTS, heads, hidden=hidden, activation=activation, spread=spread, log_std=-0.5, dtype=dtype)


def moved(net: Network, seed: int = 0) -> Network:
    """With all parameters somewhere, biases too."""
    net.flat.copy_(torch.randn(net.flat.shape, generator=torch.Generator().manual_seed(seed), dtype=net.flat.dtype))
    return net


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def plain(net: Network, parameters: dict[str, Tensor], observations: np.ndarray) -> list[list[Tensor]]:
    """The outputs of each run's heads, by layers of PyTorch: of run r, trunk k has the weights at k·S + r."""
    activate = torch.tanh if net.activation == "tanh" else torch.relu
    outputs = []
    for run in range(net.num_runs):
        of_run = []
        for number, head in enumerate(net.heads):
            x = torch.from_numpy(observations[run])
            for layer in range(len(net.hidden)):
                row = head.trunk * net.num_runs + run
                weight, bias = parameters[f"trunk.{layer}.weight"][row], parameters[f"trunk.{layer}.bias"][row]
                x = activate(torch.nn.functional.linear(x, weight.T, bias[0]))
            weight, bias = parameters[f"head.{number}.weight"][run], parameters[f"head.{number}.bias"][run]
            of_run.append(torch.nn.functional.linear(x, weight.T, bias[0]))
        outputs.append(of_run)
    return outputs


def assert_same(one: np.ndarray | Tensor, other: np.ndarray | Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-12, atol=1e-12)


def test_forward_golden() -> None:
    """One hidden layer of two: tanh and ReLU of (1 − 2 + 1, 3·1 + 0), summed by the head with 10 added."""
    for activation, expected in (("relu", 13.0), ("tanh", 10 + np.tanh(3))):
        net = Network([0], 2, [Head(0, 1, 1.0)], hidden=(2,), activation=activation, dtype=torch.float64)
        net.load(
            {
                "trunk.0.weight": torch.tensor([[[1.0, 3.0], [-2.0, 0.0]]]),
                "trunk.0.bias": torch.tensor([[[1.0, 0.0]]]),
                "head.0.weight": torch.tensor([[[1.0], [1.0]]]),
                "head.0.bias": torch.tensor([[[10.0]]]),
            }
        )
        assert net.forward(np.array([[[1.0, 1.0]]])).outputs[0].item() == pytest.approx(expected)


@HEADS
@ACTIVATIONS
@pytest.mark.parametrize("seeds", [(7,), (3, 1, 4)], ids=["one run", "three runs"])
def test_forward_is_plain_torchs(seeds: tuple[int, ...], activation: Activation, heads: tuple[Head, ...]) -> None:
    net = moved(network(seeds, heads, activation=activation))
    observations = normal(len(seeds), BATCH, INPUTS, seed=1)
    outputs = net.forward(observations).outputs
    for run, of_run in enumerate(plain(net, net.parameters, observations)):
        for output, expected in zip(outputs, of_run, strict=True):
            assert_same(output[run], expected)
    for number in range(len(heads)):
        assert_same(net.act(observations, number), outputs[number])
    np.testing.assert_array_equal(net.act(observations), net.act(observations, 0))


@HEADS
@ACTIVATIONS
@pytest.mark.parametrize("spread", [0, 2])
@pytest.mark.parametrize("seeds", [(7,), (3, 1, 4)], ids=["one run", "three runs"])
def test_backward_is_autograds(
    seeds: tuple[int, ...], spread: int, activation: Activation, heads: tuple[Head, ...]
) -> None:
    net = moved(network(seeds, heads, activation=activation, spread=spread))
    observations = normal(len(seeds), BATCH, INPUTS, seed=1)
    errors = [normal(len(seeds), BATCH, head.num_outputs, seed=2 + number) for number, head in enumerate(heads)]
    of_spread = normal(len(seeds), 1, spread, seed=9) if spread else None
    leaves = {name: parameter.clone().requires_grad_() for name, parameter in net.parameters.items()}
    loss = sum(
        (torch.from_numpy(error[run]) * output).sum()
        for run, of_run in enumerate(plain(net, leaves, observations))
        for error, output in zip(errors, of_run, strict=True)
    )
    if of_spread is not None:
        loss = loss + (torch.from_numpy(of_spread) * leaves["log_std"]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    # A second pass replaces the first one's gradient, and doesn't add to it.
    for scale in (3.0, 1.0):
        net.backward(net.forward(observations), [scale * error for error in errors], of_spread)
    assert_same(net.flat.grad, torch.cat([gradient.flatten() for gradient in gradients]))


def test_parameters_are_views_into_one_vector() -> None:
    net = network()
    assert sum(parameter.numel() for parameter in net.parameters.values()) == len(net.flat)
    net.flat.fill_(7.0)
    assert all((parameter == 7).all() for parameter in net.parameters.values())
    assert all((array == 7).all() for array in net.arrays.values())
    assert set(net.parameters) == {
        *(f"trunk.{layer}.{kind}" for layer in range(2) for kind in ("weight", "bias")),
        *(f"head.{number}.{kind}" for number in range(2) for kind in ("weight", "bias")),
        "log_std",
    }
    assert "log_std" not in network(spread=0).parameters
    assert network(dtype=torch.float32).flat.dtype == torch.float32


def test_first_parameters() -> None:
    """Weights are orthogonal, times their gain: the shorter side's products with each other are gain²·1."""
    net = network(heads=THREE_HEADS)
    gains = {"trunk.0": 2**0.5, "trunk.1": 2**0.5} | {f"head.{n}": head.gain for n, head in enumerate(THREE_HEADS)}
    for layer, gain in gains.items():
        assert (net.parameters[f"{layer}.bias"] == 0).all()
        for matrix in net.parameters[f"{layer}.weight"]:
            short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            assert_same(short @ short.T, gain**2 * torch.eye(len(short), dtype=torch.float64))
    assert (net.parameters["log_std"] == -0.5).all()


def test_no_two_matrices_begin_alike() -> None:
    """The trunks of a run, the same trunk in two runs; and the same seed twice begins the same."""
    weights = network((0, 1, 0)).parameters["trunk.0.weight"]
    alike = [(a, b) for a in range(6) for b in range(a) if torch.equal(weights[a], weights[b])]
    assert alike == [(2, 0), (5, 3)]


@HEADS
@ACTIVATIONS
def test_a_run_does_not_depend_on_those_beside_it(activation: Activation, heads: tuple[Head, ...]) -> None:
    """Its first parameters, outputs, gradient and clipping are the same alone and in company."""
    together = network((3, 1, 4), heads, activation=activation)
    observations = normal(3, BATCH, INPUTS, seed=1)
    errors = [normal(3, BATCH, head.num_outputs, seed=2 + number) for number, head in enumerate(heads)]
    of_spread = normal(3, 1, 2, seed=9)
    passed = together.forward(observations)
    together.backward(passed, errors, of_spread)
    together.clip_gradient(0.5)
    for run, seed in enumerate((3, 1, 4)):
        only = slice(run, run + 1)
        alone = network((seed,), heads, activation=activation)
        for name, parameter in alone.parameters.items():
            assert torch.equal(parameter, together.parameters[name][run::3])
        outputs = alone.forward(observations[only])
        for one, other in zip(outputs.outputs, passed.outputs, strict=True):
            assert_same(one, other[only])
        alone.backward(outputs, [error[only] for error in errors], of_spread[only])
        alone.clip_gradient(0.5)
        for name, gradient in gradients_by_name(alone).items():
            assert_same(gradient, gradients_by_name(together)[name][run::3])


def gradients_by_name(net: Network) -> dict[str, Tensor]:
    assert net.flat.grad is not None
    sizes = [parameter.numel() for parameter in net.parameters.values()]
    parts = net.flat.grad.split(sizes)
    return {name: part.view(net.parameters[name].shape) for name, part in zip(net.parameters, parts, strict=True)}


@pytest.mark.parametrize("most", [0.01, 0.5, 1e3])
def test_clipping_of_one_run_is_torchs(most: float) -> None:
    net = network((0,))
    gradient = torch.from_numpy(normal(len(net.flat), seed=0))
    net.flat.grad.copy_(gradient)
    leaf = torch.zeros_like(net.flat).requires_grad_()
    leaf.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_([leaf], most)
    net.clip_gradient(most)
    assert_same(net.flat.grad, leaf.grad)


def test_each_run_is_clipped_by_itself() -> None:
    """Of three runs with gradients of norm 0.1, 1 and 10 (and zeros), only what is longer than ½ is cut, to ½."""
    net = network((0, 1, 2, 3))
    before = {}
    for name, gradient in gradients_by_name(net).items():
        gradient.copy_(torch.from_numpy(normal(*gradient.shape, seed=len(name))))
        before[name] = gradient
    norms = torch.tensor([0.1, 1.0, 10.0, 0.0], dtype=torch.float64)
    for run, norm in enumerate(norms):
        of_run = torch.cat([gradient[run::4].flatten() for gradient in before.values()])
        for gradient in before.values():
            gradient[run::4] *= norm / of_run.norm()
    before = {name: gradient.clone() for name, gradient in before.items()}
    net.clip_gradient(0.5)
    for run, norm in enumerate(norms.tolist()):
        scale = min(1.0, 0.5 / (norm + 1e-6))
        for name, gradient in gradients_by_name(net).items():
            assert_same(gradient[run::4], scale * before[name][run::4])


@pytest.mark.parametrize("spread", [0, 2])
def test_a_copy_is_the_same_and_another(spread: int) -> None:
    net = moved(network(heads=THREE_HEADS, activation="relu", spread=spread))
    other = net.copy()
    observations = normal(3, BATCH, INPUTS, seed=1)
    assert torch.equal(other.flat, net.flat)
    for one, expected in zip(other.forward(observations).outputs, net.forward(observations).outputs, strict=True):
        np.testing.assert_array_equal(one, expected)
    before = net.flat.clone()
    other.flat.zero_()
    assert torch.equal(net.flat, before)


def test_load_takes_over_by_name() -> None:
    net, other = network((3, 1, 4)), moved(network((0, 0, 0)))
    storage = net.flat
    net.load({name: parameter.clone() for name, parameter in other.parameters.items()})
    assert net.flat is storage
    assert torch.equal(net.flat, other.flat)
    tensors = dict(other.parameters)
    with pytest.raises(RuntimeError):
        net.load(tensors | {"head.0.weight": tensors["head.0.weight"][..., :2]})
    del tensors["log_std"]
    with pytest.raises(KeyError, match="log_std"):
        net.load(tensors)
