"""From documents to batches: sources, tokenizers, the token store, packing, mixtures and the loader."""
