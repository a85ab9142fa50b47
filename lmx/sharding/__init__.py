"""The device mesh, the rules that lay logical axes on it, and multi-process start-up."""
