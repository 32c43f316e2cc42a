"""Attention back ends: functions (q, k, v) of [B, L, H, K] to [B, L, H, K], causal."""
