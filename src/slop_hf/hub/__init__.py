"""Runs on the Hub: published stage by stage, and read back to be continued.

The only package that writes there. Its modules are imported one by one, so that planning from a published stage needs
no torch.
"""
