"""Writes ``trl_values.json``: what TRL 1.16 makes of fixed numbers. Run it with the Python of TRL's environment.

    .venv-trl/bin/python tests/objectives/trl_values.py    (`make bench` makes that environment)

TRL's own methods run, unchanged: ``_compute_loss`` of its DPO and KTO trainers, the loss functions of its CPO and ORPO
trainers; of its SFT trainer the way from masks to labels, its collator, its fused head, ``compute_loss`` and the count
of tokens that accumulation divides by; of its reward trainer the collator and ``compute_loss``; and NEFTune's hook of
transformers, which TRL takes. Around them nothing is real: a trainer without ``__init__``, with the attributes that the
method reads, and a model that returns log-probs, hidden states or scores from a table. ``test_trl_parity.py`` holds our
functions against the numbers.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.trainer_pt_utils import LabelSmoother
from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

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
    same = SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, num_processes=1, parallelism_config=None
    )
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


# --- supervised fine-tuning

VOCABULARY, WIDTH, PADDING = 11, 3, 0
ROWS: list[dict[str, list[int]]] = [
    # A prompt and its completion: four and three tokens, one and five, …
    {"input_ids": [4, 7, 2, 9, 5, 5, 1], "completion_mask": [0, 0, 0, 0, 1, 1, 1]},
    {"input_ids": [3, 8, 6, 2, 10, 1], "completion_mask": [0, 1, 1, 1, 1, 1]},
    {"input_ids": [9, 9, 4, 1], "completion_mask": [0, 0, 0, 1]},
    # … and completions of several turns, of which another wrote some tokens.
    {"input_ids": [2, 5, 7, 1, 3, 6, 8, 1], "completion_mask": [0, 0, 1, 1, 1, 1, 1, 1]},
    {"input_ids": [6, 3, 1, 4, 10, 2, 7, 9, 1], "completion_mask": [0, 1, 1, 1, 1, 1, 1, 1, 1]},
    {"input_ids": [8, 10, 1], "completion_mask": [0, 0, 1]},
]
OWN_TURNS = [
    *([0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 1]),
    *([0, 0, 1, 1, 0, 0, 1, 1], [0, 1, 1, 0, 0, 1, 1, 1, 1], [0, 0, 1]),
]
MASKED = [row | {"assistant_masks": mask} for row, mask in zip(ROWS, OWN_TURNS, strict=True)]
MICRO_BATCHES = [[0, 3], [1, 2, 5], [4]]


class Positions(torch.nn.Module):
    """A language model without attention: what it knows of a place is its token and its number."""

    is_gradient_checkpointing, _tp_size = False, 1
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

    def __init__(self, embeddings: Tensor, positions: Tensor, head: Tensor) -> None:
        super().__init__()
        self.embeddings, self.positions = embeddings, positions
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=head.dtype)
        self.head.weight = torch.nn.Parameter(head.clone())

    def base_model(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.embeddings[input_ids] + self.positions[: input_ids.shape[1]])

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"logits": self.head(self.base_model(input_ids).last_hidden_state)}


def sft_values(model: Positions) -> dict[str, dict[str, Any]]:
    """Of each case the loss of the six rows (as one batch, and as micro-batches of one step) and its gradient."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as the trainer's __init__ does

    def case(*columns: str, completion_only: bool, max_length: int | None = None, smoothing: float = 0.0) -> Any:
        made = trainer(
            SFTTrainer,
            model,
            None,
            completion_only_loss=completion_only,
            label_smoother=LabelSmoother(smoothing) if smoothing else None,
            compute_loss_func=None,
            model_accepts_loss_kwargs=True,
            _loss_shifts_labels=True,
        )
        made.args = SimpleNamespace(
            loss_type="nll",
            average_tokens_across_devices=True,
            world_size=1,
            n_gpu=0,
            dataset_num_proc=None,
            max_length=max_length,
            truncation_mode="keep_start",
            shuffle_dataset=False,
        )
        rows = Dataset.from_list([{name: row[name] for name in ("input_ids", *columns)} for row in MASKED])
        prepared = made._prepare_dataset(rows, None, made.args, False, None, "train")
        kept = [[list(row) for row in prepared["input_ids"]].index(row["input_ids"][:max_length]) for row in MASKED]
        collate = DataCollatorForLanguageModeling(PADDING)

        def step(cut: list[list[int]], together: bool) -> list[Any]:
            batches = [collate([prepared[kept[index]] for index in part]) for part in cut]
            count = made._get_num_items_in_batch(batches, "cpu") if together else None
            loss = sum(made.compute_loss(model, batch, num_items_in_batch=count) for batch in batches)
            return [loss.item(), torch.autograd.grad(loss, model.head.weight)[0].tolist()]

        return {
            "one batch": step([list(range(len(MASKED)))], together=False),
            "micro-batches": step(MICRO_BATCHES, together=True),
            "rows": [step([[index]], together=False)[0] for index in range(len(MASKED))],
        }

    return {
        "completion": case("completion_mask", completion_only=True),
        "all tokens": case("completion_mask", completion_only=False),
        "own turns": case("assistant_masks", completion_only=False),
        "own turns of the completion": case("completion_mask", "assistant_masks", completion_only=True),
        "completion, at most 6 tokens": case("completion_mask", completion_only=True, max_length=6),
        "completion, label smoothing 0.1": case("completion_mask", completion_only=True, smoothing=0.1),
        "all tokens, label smoothing 0.3": case("completion_mask", completion_only=False, smoothing=0.3),
    }


def neftune_values(alpha: float, length: int, width: int) -> list[list[float]]:
    """The noise that one row gets right after ``torch.manual_seed(0)``."""
    embedding = SimpleNamespace(training=True, neftune_noise_alpha=alpha)
    torch.manual_seed(0)
    return neftune_post_forward_hook(embedding, None, torch.zeros(1, length, width))[0].tolist()


# --- the reward model

MARGINS = [0.5, -0.25, 0.0, 1.75]
"""Of each pair; exact in float32, which TRL's collator makes of them."""


class Scores(torch.nn.Module):
    """A reward model that knows the score of every row by heart: the row's number is its first token."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.scores[input_ids[:, 0], None])


def reward_values(scores: Tensor) -> dict[str, list[Any]]:
    """Of each case the loss of each pair, the mean over the batch, and the gradient of that."""

    def case(center: float | None = None, margins: bool = False) -> list[Any]:
        leaf = scores.clone().requires_grad_()
        model = Scores(leaf)
        made = trainer(RewardTrainer, model, None, args=SimpleNamespace(center_rewards_coefficient=center))

        def loss(pairs: range) -> Tensor:
            rows = [
                {"chosen_ids": [pair] + [1] * pair, "rejected_ids": [pair + NUM_PAIRS, 1]}
                | ({"margin": MARGINS[pair]} if margins else {})
                for pair in pairs
            ]
            return made.compute_loss(model, DataCollatorForPreference(PADDING)(rows))

        mean = loss(range(NUM_PAIRS))
        each = [loss(range(pair, pair + 1)).item() for pair in range(NUM_PAIRS)]
        return [each, mean.item(), torch.autograd.grad(mean, leaf)[0].tolist()]

    return {
        "plain": case(),
        "margin": case(margins=True),
        "centred 0.01": case(center=0.01),
        "margin, centred 0.3": case(center=0.3, margins=True),
    }


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
    generator.manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    tables = {
        "embeddings": normal(VOCABULARY, WIDTH),
        "positions": normal(9, WIDTH),
        "head": 2 * normal(VOCABULARY, WIDTH),
    }
    scores = 2 * normal(2 * NUM_PAIRS)
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
        "rows": MASKED,
        "micro_batches": MICRO_BATCHES,
        **{name: table.tolist() for name, table in tables.items()},
        "sft": sft_values(Positions(**tables)),
        "neftune": neftune_values(5.0, length=7, width=4),
        "scores": scores.tolist(),
        "margins": MARGINS,
        "reward": reward_values(scores),
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in written.items())
    Path(__file__).with_suffix(".json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
