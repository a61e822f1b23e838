"""Deltas on the Hugging Face Hub. Only this part of the package imports huggingface_hub, on first use.

The Hub's metadata is a hint. Only digests prove that a file is the right one.
"""
