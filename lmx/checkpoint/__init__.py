"""Run checkpoints: saved asynchronously, verified when loaded; and tensors of other systems read in."""
