"""From a prompt to text: sampling, the jitted decoding loop, and the loaded model of the Python API."""
