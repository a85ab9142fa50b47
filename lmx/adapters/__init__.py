"""Adapters: small trained parameters beside a frozen model, as a transformation of its parameter tree."""
