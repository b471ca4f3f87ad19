"""What a device tells of its answers: counts by fixed bins, never an input; numpy alone."""
