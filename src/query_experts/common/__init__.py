"""What every room uses: errors, files, checkpoints, settings, devices, timing, formatting, plots."""
