"""The training run: state, step, loop, metrics and the checks of it."""
