"""Distillation losses: pure functions, masked, summed, in float32."""
