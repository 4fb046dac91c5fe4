"""Tabular Markov decision processes: the exact truth that estimators are tested against."""

from trueup.mdp.sequences import SequenceSpace
from trueup.mdp.tabular import TabularMDP
from trueup.mdp.trajectories import Trajectories, enumerate_trajectories

__all__ = ["SequenceSpace", "TabularMDP", "Trajectories", "enumerate_trajectories"]
