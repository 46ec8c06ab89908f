"""What is done with masks: score, preview, export."""
