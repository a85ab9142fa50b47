"""Optimizers, schedules and decay masks, as data."""
