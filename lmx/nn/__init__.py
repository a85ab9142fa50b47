"""Layers: linear, norm, embedding, position, attention, mlp; and the caches that they write."""
