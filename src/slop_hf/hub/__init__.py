"""Publishing of runs on the Hub stage by stage, and fetching of published stages to continue from.

The only package that writes to the Hub. Import from its modules: planning from a published stage then needs no torch.
"""
