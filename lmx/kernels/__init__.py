"""Attention and cross-entropy: one entry point each, one implementation per platform behind it."""
