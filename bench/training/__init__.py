"""What every training loop shares, whatever is trained."""
