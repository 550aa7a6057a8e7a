"""Fine-tune BERT classifiers and compare classification heads honestly."""

__version__ = "0.1.0"
