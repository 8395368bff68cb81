"""What a run will hold in memory and how long a step takes, on this device or another: `manylora plan`."""
