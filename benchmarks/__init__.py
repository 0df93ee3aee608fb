"""What an update costs, as ratios to what the same machine can do in the same minute."""
