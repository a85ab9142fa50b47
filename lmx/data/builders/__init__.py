"""TFDS dataset builders whose records are documents, in ArrayRecord files, built without TensorFlow."""
