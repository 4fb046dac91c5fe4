"""Held-out evaluation of an online run: the policy answers prompts that it does not learn from."""

from __future__ import annotations

from typing import Any

import numpy as np

from trueup.runs.progress import RunProgress
from trueup.trainers.players import Players
from trueup.trainers.policy_inputs import PolicyInputs
from trueup.trainers.policy_settings import PolicySettings
from trueup.trainers.session import Session

EVALUATION_STREAM = 1
"""Added to the seed: held-out prompts get random streams of their own, the same ones at every evaluation."""
