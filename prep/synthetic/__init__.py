"""Synthetic scenes: of the competition and of HKH."""
