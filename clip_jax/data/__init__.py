"""From bytes on disk to host batches: sources, transforms, tokenizers, pipeline.

Imports nothing of JAX: worker processes load these modules.
"""
