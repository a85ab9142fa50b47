"""Looking inside of a model: what it predicts, layer by layer, and what it attends to."""
