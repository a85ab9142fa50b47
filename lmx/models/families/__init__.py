"""The model families: one short file each, a configuration with presets over the shared parts."""
