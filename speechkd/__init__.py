"""Distil large speech and multimodal models into small ones."""
