"""Time, memory and accuracy of the losses, beside other libraries."""
