"""EfficientCLIP: a text tower trained against frozen image features, on packed tokens, with noisy pairs thrown out.

The way of the data is the way of the imports: shards, store, batches, towers, objectives, confidence, trainer,
evaluation.
"""

__version__ = "0.1.0"
