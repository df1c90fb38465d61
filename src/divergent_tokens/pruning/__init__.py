"""Zeros where they harm least: rounds of cutting, training and measuring."""
