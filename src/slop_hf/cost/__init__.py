"""What a structure costs: parameters, FLOPs, memory, device hours, loss."""
