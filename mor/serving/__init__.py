"""Serving MoR models: continuous depth-wise batching."""
