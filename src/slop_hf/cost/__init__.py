"""Costs of a structure: parameters, FLOPs, memory, device hours, and the loss predicted for them."""
