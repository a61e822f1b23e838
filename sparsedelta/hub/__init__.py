"""Deltas on the Hugging Face Hub: the only part of the package that imports huggingface_hub, when it must.

Whatever the Hub says is a hint; what is proved is proved by digests.
"""
