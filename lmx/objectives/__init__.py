"""What a model is trained to do: each objective turns batches into a weighted loss."""
