"""Writes ``trl_values.json``: what TRL 1.16 makes of fixed log-probs. Run it with the Python of TRL's environment.

    .venv-trl/bin/python tests/objectives/trl_values.py    (`make bench` makes that environment)

TRL's own methods run, unchanged: ``_compute_loss`` of its DPO and KTO trainers, the loss functions of its CPO and ORPO
trainers. Around them nothing is real: a trainer without ``__init__``, with the attributes that the method reads, and a
model that returns log-probs from a table. ``test_trl_parity.py`` holds our functions against the numbers.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from torch import Tensor
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

NUM_PAIRS, MAX_LENGTH = 4, 5
LENGTHS = torch.tensor([3, 5, 2, 4, 4, 1, 5, 3])
"""Completion tokens of the four chosen completions, then of the four rejected ones."""
MASK = torch.arange(MAX_LENGTH) < LENGTHS[:, None]
DESIRABLE = torch.tensor([1, 0, 0, 1, 1, 1, 0, 1], dtype=torch.bool)


class Table(torch.nn.Module):
    """A model that knows its answers by heart: log-probs of completions (id 0), or of mismatched ones (id 1)."""

    is_gradient_checkpointing = False

    def __init__(self, logprobs: Tensor, mismatched: Tensor, log_collisions: Tensor) -> None:
        super().__init__()
        self.tables, self.log_collisions = (logprobs, mismatched), log_collisions

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        rows, table = input_ids[:, 1], self.tables[int(input_ids[0, 0])]
        # TRL's model returns 0 for what is not scored.
        values = table[rows] * MASK[rows]
        return SimpleNamespace(
            log_probs=values,
            log_sum_sq_probs=self.log_collisions[rows],
            entropy=torch.zeros_like(values),
            mean_logits=torch.zeros_like(values),
            is_top1=torch.zeros_like(values, dtype=torch.bool),
        )


def inputs(rows: Tensor) -> dict[str, Tensor]:
    """A batch of these rows: one prompt token (which says that these are completions), then the completion."""
    ids = torch.zeros(len(rows), 1 + MAX_LENGTH, dtype=torch.long)
    ids[:, 1] = rows
    mask = torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), MASK[rows].long()], 1)
    mismatched = ids.clone()
    mismatched[:, 0] = 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": mask,
        "KL_input_ids": mismatched,
        "KL_attention_mask": torch.ones_like(ids),
        "KL_completion_mask": mask,
        "label": DESIRABLE[rows],
    }


def trainer(kind: type, policy: Table, reference: Table, **attributes: Any) -> Any:
    made = object.__new__(kind)
    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    defaults = {
        "model": policy,
        "ref_model": reference,
        "accelerator": same,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "label_smoothing": 0.0,
        "use_weighting": False,
        "calculate_KL": True,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    made.__dict__.update(defaults | attributes)
    return made


def main() -> None:
    generator = torch.Generator().manual_seed(2)

    def uniform(low: float, high: float) -> Tensor:
        shape = 2 * NUM_PAIRS, MAX_LENGTH
        return low + (high - low) * torch.rand(shape, dtype=torch.float64, generator=generator)

    policy = Table(uniform(-3, -1), uniform(-3, -1), uniform(-1.5, -0.5))
    # The reference lies near the policy, so that no sigmoid is saturated; mostly below it where completions are
    # mismatched, so that KTO's reference point is above 0.
    reference = Table(
        policy.tables[0] + uniform(-0.8, 0.8), policy.tables[1] + uniform(-0.4, 0.1), policy.log_collisions
    )

    def dpo_trainer(
        loss_type: str | list[str], models: tuple[Table, Table] = (policy, reference), **attributes: Any
    ) -> list[float]:
        """The loss of each pair, from a batch of its own; of AOT, which couples the batch, the mean."""
        types = [loss_type] if isinstance(loss_type, str) else loss_type
        settings = {"loss_types": types, "loss_weights": [1.0] * len(types), "beta": 0.7} | attributes
        made = trainer(DPOTrainer, *models, **settings)
        pairs = torch.arange(NUM_PAIRS)
        batches = [pairs] if types[0].startswith("aot") else pairs.split(1)
        return [
            made._compute_loss(made.model, inputs(torch.cat([rows, rows + NUM_PAIRS])), False).item()
            for rows in batches
        ]

    def kto_trainer(loss_type: str) -> list[float]:
        """The mean over the batch, whose reference point couples it."""
        made = trainer(
            KTOTrainer,
            policy,
            reference,
            loss_type=loss_type,
            beta=0.7,
            desirable_weight=1.2,
            undesirable_weight=0.8,
            calculate_KL=loss_type == "kto",
        )
        return [made._compute_loss(policy, inputs(torch.arange(2 * NUM_PAIRS)), False).item()]

    def single(model: Table) -> Table:
        return Table(*(t.float() for t in model.tables), model.log_collisions.float())

    sums = (policy.tables[0] * MASK).sum(-1)
    means = sums / LENGTHS
    cpo = {"alpha": 0.0, "beta": 0.7}

    def cpo_trainer(logprobs: Tensor, **attributes: Any) -> list[float]:
        made = trainer(CPOTrainer, policy, reference, **(cpo | attributes))
        return made.cpo_loss(*logprobs.split(NUM_PAIRS))[0].tolist()

    odds = trainer(ORPOTrainer, policy, reference, beta=0.4).odds_ratio_loss(*means.split(NUM_PAIRS))[0]
    smoothed = {"label_smoothing": 0.2}
    losses = {
        "sigmoid": dpo_trainer("sigmoid"),
        "sigmoid_norm": dpo_trainer("sigmoid_norm"),
        "hinge": dpo_trainer("hinge"),
        "ipo": dpo_trainer("ipo"),
        "robust": dpo_trainer("robust", **smoothed),
        "exo_pair": dpo_trainer("exo_pair", **smoothed),
        "nca_pair": dpo_trainer("nca_pair"),
        "bco_pair": dpo_trainer("bco_pair"),
        "sppo_hard": dpo_trainer("sppo_hard"),
        "aot": dpo_trainer("aot", **smoothed),
        "aot_unpaired": dpo_trainer("aot_unpaired", **smoothed),
        "apo_zero": dpo_trainer("apo_zero"),
        "apo_down": dpo_trainer("apo_down"),
        "discopop": dpo_trainer("discopop"),
        "sigmoid + 0.3 sft": dpo_trainer(["sigmoid", "sft"], loss_weights=[1.0, 0.3]),
        "0.8 sigmoid + 0.2 hinge": dpo_trainer(["sigmoid", "hinge"], loss_weights=[0.8, 0.2]),
        "sigmoid, ld_alpha 0.4": dpo_trainer("sigmoid", ld_alpha=0.4),
        "sigmoid, use_weighting": dpo_trainer("sigmoid", use_weighting=True),
        "sigmoid, forward_kl": dpo_trainer("sigmoid", f_divergence_type="forward_kl"),
        "sigmoid, js_divergence": dpo_trainer("sigmoid", f_divergence_type="js_divergence"),
        # TRL takes no float64 here.
        "sigmoid, alpha_divergence 0.3": dpo_trainer(
            "sigmoid",
            f_divergence_type="alpha_divergence",
            f_alpha_divergence_coef=0.3,
            models=(single(policy), single(reference)),
        ),
        "kto": kto_trainer("kto"),
        "apo_zero_unpaired": kto_trainer("apo_zero_unpaired"),
        "cpo": cpo_trainer(sums, loss_type="sigmoid", **smoothed),
        "simpo": cpo_trainer(means, loss_type="simpo", simpo_gamma=0.5),
        "orpo": (-odds).tolist(),
    }
    written = {
        "trl": trl.__version__,
        "lengths": LENGTHS.tolist(),
        "desirable": DESIRABLE.tolist(),
        "token_logprobs": policy.tables[0].tolist(),
        "ref_token_logprobs": reference.tables[0].tolist(),
        "mismatched_token_logprobs": policy.tables[1].tolist(),
        "ref_mismatched_token_logprobs": reference.tables[1].tolist(),
        "log_collisions": policy.log_collisions.tolist(),
        "losses": losses,
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in written.items())
    Path(__file__).with_suffix(".json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
