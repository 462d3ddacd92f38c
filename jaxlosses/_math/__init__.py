"""The mathematics of the losses, which knows no machine."""
