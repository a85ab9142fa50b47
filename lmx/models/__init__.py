"""The one Transformer: specs, block, stack, heads; ``families`` builds the known models from them."""
