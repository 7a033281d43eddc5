"""What the published size takes, from measured costs and stated devices: `dim plan`."""
