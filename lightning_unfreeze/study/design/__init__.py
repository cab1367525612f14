"""What a study runs: arms, data, shifted images."""
