"""What a checkpoint, a run or a folder of runs is, and what differs between runs: `omni inspect`, `omni compare`."""
