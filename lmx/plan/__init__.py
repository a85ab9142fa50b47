"""What a run will cost, before there are devices to run it on: programs compiled ahead of time, and formulas."""
