"""raygr: LLM scores of items and users inside the sequential recommender you already run."""

__version__ = "0.1.0"
