"""Sensitivities and a budget in, a plan out."""
