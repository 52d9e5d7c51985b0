"""Penalised critic updates with exact gradients from first-order passes only."""

from .graphed import GraphedCriticStep
from .report import Explanation, explain
from .step import CriticStep, critic_step

__all__ = ["CriticStep", "Explanation", "GraphedCriticStep", "critic_step", "explain"]
