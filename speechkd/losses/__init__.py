"""Distillation losses under one contract: see README.md here for which to choose."""
