"""bfloat16 with float32 masters follows the float32 run; bfloat16 alone does not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from trueup.errors import CheckpointError
from trueup.models.precision import MasterWeights, gradient_sum, round_parameters
from trueup.objectives.logprobs import linear_logprobs

STEPS, LEARNING_RATE = 60, 2e-5


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1)).to(torch.bfloat16).to(dtype)


def batch(step: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 16, generator=generator)
    return x.to(dtype), x.sum(-1, keepdim=True).to(dtype)


def backward(model: nn.Module, step: int, dtype: torch.dtype, num_parts: int = 1) -> None:
    x, y = batch(step, dtype)
    for part_x, part_y in zip(x.chunk(num_parts), y.chunk(num_parts), strict=True):
        (((model(part_x) - part_y) ** 2).sum() / len(x)).backward()


def flat(parameters: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in parameters])


def train(dtype: torch.dtype, *, masters: bool, start: int = 0, stop: int = STEPS, state: dict | None = None):
    """Returns what the optimiser worked on before and after, and the state to resume from."""
    model = network(dtype)
    weights = MasterWeights(model.parameters()) if masters else None
    parameters = list(model.parameters()) if weights is None else weights.parameters
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    if state is not None and weights is not None:
        weights.load_state_dict(state["masters"])
        optimizer.load_state_dict(state["optimizer"])
    before = flat(parameters)
    for step in range(start, stop):
        backward(model, step, dtype)
        optimizer.step()
        if weights is not None:
            weights.copy_back()
        optimizer.zero_grad()
    state = {"masters": weights.state_dict() if weights else {}, "optimizer": optimizer.state_dict()}
    return before, flat(parameters), copy.deepcopy(state), flat(list(model.parameters()))


def test_masters_follow_the_float32_run_where_bfloat16_alone_stalls():
    start, exact, _, _ = train(torch.float32, masters=False)
    moved = exact - start

    _, with_masters, _, rounded = train(torch.bfloat16, masters=True)
    error = (with_masters - exact).norm() / moved.norm()
    assert error < 0.01, f"masters are {error:.3f} of the float32 run's path away from it"
    assert torch.equal(rounded, with_masters.bfloat16().float()), "the model is not its masters, rounded"

    _, alone, _, _ = train(torch.bfloat16, masters=False)
    stuck = (alone == start) & (moved.abs() > 0)
    assert stuck.float().mean() > 0.9, "most weights should be unable to take so small a step in bfloat16"
    assert (alone - exact).norm() / moved.norm() > 0.5


def test_accumulation_is_in_float32_and_frees_the_low_precision_gradient():
    """The sum over micro-batches is the float32 sum of their bfloat16 gradients, to the bit."""
    model, reference = network(torch.bfloat16), network(torch.bfloat16)
    weights = MasterWeights(model.parameters())
    expected = [torch.zeros_like(p, dtype=torch.float32) for p in reference.parameters()]
    for step in range(5):
        backward(model, step, torch.bfloat16)
        assert all(p.grad is None for p in model.parameters())
        backward(reference, step, torch.bfloat16)
        for total, parameter in zip(expected, reference.parameters(), strict=True):
            total += parameter.grad.float()
            parameter.grad = None
    for master, total in zip(weights.parameters, expected, strict=True):
        assert master.dtype == torch.float32
        assert torch.equal(master.grad, total)


def test_resume_from_a_saved_state_is_exact():
    _, straight, _, _ = train(torch.bfloat16, masters=True)
    _, _, state, _ = train(torch.bfloat16, masters=True, stop=20)
    _, resumed, _, rounded = train(torch.bfloat16, masters=True, start=20, state=state)
    assert torch.equal(straight, resumed)
    assert torch.equal(rounded, resumed.bfloat16().float())


def test_float32_parameters_are_handed_through():
    model = network(torch.float32)
    weights = MasterWeights(model.parameters())
    assert all(a is b for a, b in zip(weights.parameters, model.parameters(), strict=True))
    backward(model, 0, torch.float32)
    assert all(p.grad is not None for p in model.parameters())
    before = flat(list(model.parameters()))
    weights.copy_back()
    weights.load_state_dict(weights.state_dict())
    assert torch.equal(before, flat(list(model.parameters())))


def test_mixed_precision_frozen_and_repeated_parameters():
    frozen = nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)
    low, high = nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(2))
    weights = MasterWeights([low, frozen, high, low])
    assert len(weights.parameters) == 2
    assert weights.parameters[1] is high
    assert [working for working, _ in weights.pairs] == [low]
    (low.sum() + high.sum()).backward()
    assert torch.equal(weights.parameters[0].grad, torch.ones(3))
    assert high.grad is not None


def test_a_state_of_another_model_is_refused_and_changes_nothing():
    weights = MasterWeights(network(torch.bfloat16).parameters())
    before = flat(weights.parameters)
    other = MasterWeights([nn.Parameter(torch.ones(3, dtype=torch.bfloat16))]).state_dict()
    with pytest.raises(CheckpointError, match="master weights"):
        weights.load_state_dict(other)
    assert torch.equal(before, flat(weights.parameters))


def test_close_takes_the_hooks_off():
    model = network(torch.bfloat16)
    weights = MasterWeights(model.parameters())
    weights.close()
    backward(model, 0, torch.bfloat16)
    assert all(p.grad is not None for p in model.parameters())
    assert all(master.grad is None for master in weights.parameters)


class Tied(nn.Module):
    """An embedding whose weights are those of the head, as language models have it; entry 3 is padding."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.middle = nn.Embedding(11, 6, padding_idx=3), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.middle(self.embedding(tokens)).tanh().flatten(0, -2)
        return linear_logprobs(hidden, self.head.weight, tokens.flatten(), weight_grad=gradient_sum(self.head)).logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_of_the_vocabulary_are_summed_in_place(dtype) -> None:
    """Over micro-batches, repeated and padding tokens inside, they are autograd's own; a cleared sum starts anew."""
    parts = torch.tensor([[[1, 2, 3], [2, 2, 0]], [[7, 3, 2], [10, 5, 7]]])
    plain, summed = Tied(dtype), Tied(dtype)
    masters = MasterWeights(summed.parameters(), [summed.embedding, summed.head])
    for _ in range(2):
        masters.clear_gradients()
        for part in parts:
            summed(part).sum().backward()
    for part in parts:
        plain(part).sum().backward()
    found = dict(zip((name for name, _ in summed.named_parameters()), masters.parameters, strict=True))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2**-6}[dtype]
    for name, parameter in plain.named_parameters():
        assert found[name].grad.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
        torch.testing.assert_close(
            found[name].grad,
            parameter.grad.to(found[name].dtype),
            rtol=0,
            atol=tolerance * float(parameter.grad.abs().max()),
        )


def test_masters_begin_with_what_rounding_took_away() -> None:
    model = network(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)  # off bfloat16's grid
    model[0].bias.requires_grad_(False)
    model.register_buffer("frequencies", torch.tensor([0.1]))
    exact = [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]
    round_parameters(model, torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert model.frequencies.dtype == torch.float32
    first, second = MasterWeights(model.parameters()), MasterWeights(model.parameters())
    assert [master.tolist() for master in first.parameters] == [values.tolist() for values in exact]
    before = flat(list(model.parameters()))
    first.copy_back()
    assert torch.equal(flat(list(model.parameters())), before)
    # Handed over, not kept: what trains the model later starts from the model.
    assert all(torch.equal(master, low.float()) for low, master in second.pairs)


def test_nothing_stays_on_the_model_after_closing() -> None:
    model = Tied(torch.float32)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    masters = MasterWeights(model.parameters(), [model.embedding, model.head])
    assert gradient_sum(model.head) is gradient_sum(model.embedding) is model.head.weight.grad
    masters.close()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not model.embedding._forward_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_vocabulary_has_no_sum() -> None:
    model = Tied(torch.float32)
    model.embedding.weight.requires_grad_(False)
    MasterWeights(model.parameters(), [model.embedding, model.head])
    assert gradient_sum(model.head) is None
